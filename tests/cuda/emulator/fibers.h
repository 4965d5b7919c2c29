// One stack and one saved place for each thread of a block.
//
// On x86-64 a switch is six pushes and a jump; elsewhere POSIX's contexts do the same, slower.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__x86_64__) && defined(__linux__) && !defined(NYBBLE_EMULATOR_PORTABLE)
#define OWN_SWITCH
extern "C" void nybble_fiber_switch(void **save, void *load);
asm(R"(
.text
.weak nybble_fiber_switch
.type nybble_fiber_switch, @function
nybble_fiber_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

// AddressSanitizer pads every local, so a kernel's frame grows several times.
#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void *, size_t);
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

class Fiber {
public:
    Fiber() : stack(static_cast<char *>(std::malloc(STACK))) {
        if (!stack) std::abort();
    }
    ~Fiber() { std::free(stack); }
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;

    // Makes the next `resume` begin at `entry`, which never returns.
    void begin(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack, STACK); // frames of the entry before, which never returned
#endif
#ifdef OWN_SWITCH
        void **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15));
        *--top = nullptr; // the entry sees a stack as after a call
        *--top = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        place = top;
#else
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
#endif
    }

    void resume() {
#ifdef OWN_SWITCH
        nybble_fiber_switch(&caller, place);
#else
        swapcontext(&caller, &context);
#endif
    }

    // Called on the fiber itself: back to whoever resumed it.
    void suspend() {
#ifdef OWN_SWITCH
        nybble_fiber_switch(&place, caller);
#else
        swapcontext(&context, &caller);
#endif
    }

private:
    char *stack;
#ifdef OWN_SWITCH
    void *place = nullptr;
    void *caller = nullptr;
#else
    ucontext_t context, caller;
#endif
};

} // namespace emulator
