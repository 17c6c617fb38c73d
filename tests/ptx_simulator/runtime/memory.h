// Loads, stores and atomics. Memory is one flat address space; a misaligned access ends the launch.
#pragma once
#include "simulator.h"

namespace ptx {

template <class T>
INLINE T* pointer(u64 address, size_t alignment, const Location& at) {
    if (address % alignment) [[unlikely]] {
        fail(at, "misaligned access of %zu bytes at address 0x%llx", alignment,
             static_cast<unsigned long long>(address));
    }
    return reinterpret_cast<T*>(address);
}
template <class T>
INLINE T load(u64 address, const Location& at) {
    return *pointer<const T>(address, sizeof(T), at);
}
template <class T>
INLINE void store(u64 address, T value, const Location& at) {
    *pointer<T>(address, sizeof(T), at) = value;
}

template <class T, int Count>
struct Vector {
    T element[Count];
};
template <class T, int Count>
INLINE Vector<T, Count> load_vector(u64 address, const Location& at) {
    Vector<T, Count> result;
    const T* source = pointer<const T>(address, sizeof(result), at);
    for (int i = 0; i < Count; i++) result.element[i] = source[i];
    return result;
}
template <class T, int Count>
INLINE void store_vector(u64 address, Vector<T, Count> value, const Location& at) {
    T* target = pointer<T>(address, sizeof(value), at);
    for (int i = 0; i < Count; i++) target[i] = value.element[i];
}

// An unordered load, as `relaxed` and `volatile` accesses are. Such accesses do not race with each other.
template <class T>
INLINE T load_relaxed(u64 address, const Location& at) {
    return std::bit_cast<T>(__atomic_load_n(pointer<Raw<T>>(address, sizeof(T), at), __ATOMIC_RELAXED));
}
template <class T>
INLINE void store_relaxed(u64 address, T value, const Location& at) {
    __atomic_store_n(pointer<Raw<T>>(address, sizeof(T), at), std::bit_cast<Raw<T>>(value), __ATOMIC_RELAXED);
}
// Replaces the value by update(value); returns the old one.
template <class T, class Update>
INLINE Raw<T> atomic(u64 address, const Location& at, Update update) {
    Raw<T>* target = pointer<Raw<T>>(address, sizeof(T), at);
    Raw<T> old = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(target, &old, std::bit_cast<Raw<T>>(T(update(std::bit_cast<T>(old)))), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <class T>
INLINE T increment_wrapping(T old, T limit) {
    return old >= limit ? 0 : old + 1;
}
template <class T>
INLINE T decrement_wrapping(T old, T limit) {
    return old == 0 || old > limit ? limit : old - 1;
}

}  // namespace ptx
