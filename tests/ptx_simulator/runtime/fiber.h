// A CUDA thread runs as a fiber: a stack of its own, and switches between it and the scheduler that the sanitizers are
// told of.
#pragma once
#include <cstddef>

namespace ptx {

// ThreadSanitizer's and AddressSanitizer's interfaces, null where the process runs without them.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* address, size_t size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
inline bool races_are_checked() { return __tsan_create_fiber != nullptr; }

// Everything before release() happens before everything after acquire() of the same address.
inline void acquire(void* address) {
    if (__tsan_acquire) __tsan_acquire(address);
}
inline void release(void* address) {
    if (__tsan_release) __tsan_release(address);
}

// The simulator's own memory is no part of the kernel: no access is checked for races while one of these lives.
class NotChecked {
public:
    NotChecked() {
        depth++;
        if (!AnnotateIgnoreReadsBegin) return;
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~NotChecked() { end(); }
    // For a fiber that is left for good from within such scopes.
    static void end_all() {
        while (depth > 0) end();
    }
    NotChecked(const NotChecked&) = delete;
    NotChecked& operator=(const NotChecked&) = delete;

private:
    static void end() {
        depth--;
        if (!AnnotateIgnoreReadsEnd) return;
        AnnotateIgnoreReadsEnd("", 0);
        AnnotateIgnoreWritesEnd("", 0);
    }
    static inline int depth = 0;  // no fiber is suspended within such a scope
};

// Memory that is mapped without a sanitizer's knowledge: to ThreadSanitizer a mapping is a write to all of it, which
// takes time and may race with what comes later. `flags` beside those of private anonymous memory.
void* map_memory(size_t size, int flags = 0);

// To ThreadSanitizer each is a thread: what they do is unordered but for acquire() and release().
class Fiber {
public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() calls entry(), on an empty stack.
    void start(void (*entry)());
    // From the scheduler: runs until the fiber calls suspend() or finish().
    void resume();
    void suspend();
    [[noreturn]] void finish();

    static void enter();  // first of all in entry()

private:
    void leave(bool for_good);

    char* stack;
    void* stack_pointer = nullptr;
    void* sanitizer_thread = nullptr;
    void* fake_stack = nullptr;
};

}  // namespace ptx
