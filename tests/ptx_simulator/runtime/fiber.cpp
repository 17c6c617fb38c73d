#include "fiber.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstdlib>

namespace ptx {
namespace {

constexpr size_t stack_size = 512 << 10;  // AddressSanitizer needs much of it
constexpr size_t guard_size = 4096;

void* scheduler_stack_pointer;
void* scheduler_thread;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;

#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer, and restores those of another stack.
extern "C" [[gnu::visibility("hidden")]] void ptx_switch_stack(void** save, void* load);
asm(R"(
.text
.globl ptx_switch_stack
.hidden ptx_switch_stack
.type ptx_switch_stack,@function
ptx_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch_stack,.-ptx_switch_stack
)");
void* new_stack_pointer(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + stack_size);
    *--top = nullptr;  // the return address of entry(); keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}
#else
void ptx_switch_stack(void** save, void* load) {
    if (!*save) *save = new ucontext_t;
    swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void* new_stack_pointer(char* stack, void (*entry)()) {
    ucontext_t* context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = stack_size;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

}  // namespace

void* map_memory(size_t size, int flags) {
    flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    const long address = syscall(SYS_mmap, nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (address == -1) abort();
    return reinterpret_cast<void*>(address);
}

Fiber::Fiber() {
    stack = static_cast<char*>(map_memory(guard_size + stack_size)) + guard_size;
    if (mprotect(stack - guard_size, guard_size, PROT_NONE)) abort();
    if (races_are_checked()) sanitizer_thread = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
    // an unfinished fiber leaves the red zones of its variables behind
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, stack_size);
    if (sanitizer_thread) __tsan_destroy_fiber(sanitizer_thread);
    syscall(SYS_munmap, stack - guard_size, guard_size + stack_size);
}

void Fiber::start(void (*entry)()) {
    stack_pointer = new_stack_pointer(stack, entry);
    fake_stack = nullptr;
}

void Fiber::resume() {
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, stack_size);
    if (sanitizer_thread) {
        scheduler_thread = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(sanitizer_thread, 1);  // 1: the switch itself orders nothing
    }
    ptx_switch_stack(&scheduler_stack_pointer, stack_pointer);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void Fiber::enter() {
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
}

void Fiber::leave(bool for_good) {
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_size);
    }
    if (sanitizer_thread) __tsan_switch_to_fiber(scheduler_thread, 1);
    ptx_switch_stack(&stack_pointer, scheduler_stack_pointer);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
    leave(true);
    abort();
}

}  // namespace ptx
