// A CUDA thread runs as a fiber with its own stack. The sanitizers are told of switches to and from the scheduler.
#pragma once
#include <cstddef>

namespace ptx {

// ThreadSanitizer's and AddressSanitizer's interfaces, null in a process without them.
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

// The simulator's own memory is not part of the kernel. No access is checked for races during the lifetime of one of
// these.
class NotChecked {
public:
    NotChecked() {
        depth++;
        if (!AnnotateIgnoreReadsBegin) return;
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~NotChecked() { end(); }
    // Ends all scopes, for a fiber that is left for good from within them.
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

// Maps memory without a sanitizer's knowledge. To ThreadSanitizer a mapping is a write to all of it, which takes time
// and may race with later accesses. `flags` are added to those of private anonymous memory.
void* map_memory(size_t size, int flags = 0);

// ThreadSanitizer sees each fiber as a thread. Only acquire() and release() order their accesses.
class Fiber {
public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() calls entry(), on an empty stack.
    void start(void (*entry)());
    // Runs the fiber, from the scheduler, until it calls suspend() or finish().
    void resume();
    void suspend();
    [[noreturn]] void finish();

    static void enter();  // the first call in entry()

private:
    void leave(bool for_good);

    char* stack;
    void* stack_pointer = nullptr;
    void* sanitizer_thread = nullptr;
    void* fake_stack = nullptr;
};

}  // namespace ptx
