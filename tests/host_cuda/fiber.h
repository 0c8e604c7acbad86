// Fibers: functions with their own stacks that switch to one another, and announce that to AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cen::cuda::simulator {

// Runs the function given to start(), which may call pause(), to its end, and then the next.
class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) || getcontext(&own_.context)) {
      std::perror("no memory for the stack of a simulated thread");
      std::abort();
    }
    own_.stack = static_cast<char*>(memory) + kGuard;
    own_.bytes = kStack;
    own_.context.uc_stack.ss_sp = static_cast<char*>(memory) + kGuard;
    own_.context.uc_stack.ss_size = kStack;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&own_.context, reinterpret_cast<void (*)()>(loop), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
    // AddressSanitizer's swapcontext clears the shadow of a stack that is named here.
    own_.context.uc_stack.ss_sp = nullptr;
    own_.context.uc_stack.ss_size = 0;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs f up to its first pause or its end. f must live until its end.
  template <class F>
  void start(const F& f) {
    call_ = [](const void* function) { (*static_cast<const F*>(function))(); };
    function_ = &f;
    resume();
  }

  // Continues to the next pause or the end.
  void resume() { change(caller_, own_); }

  // Returns control to the caller of start() or resume(). Must be called on this fiber.
  void pause() { change(own_, caller_); }

  bool owns(const void* address) const {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(own_.stack) < kStack;
  }

 private:
  static constexpr int64_t kGuard = 1 << 16, kStack = 1 << 18;  // only touched pages of a stack take memory

  struct Side {
    ucontext_t context;  // of the first entry
    void* place[5];      // of all others
    bool entered = false;
    const void* stack = nullptr;
    size_t bytes = 0;
    void* fake_stack = nullptr;
  };

  static void loop(unsigned high, unsigned low) {
    Fiber& fiber = *reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &fiber.caller_.stack, &fiber.caller_.bytes);
#endif
    for (;; fiber.pause()) fiber.call_(fiber.function_);
  }

  static void change(Side& from, Side& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#endif
    from.entered = true;
    swap(from, to);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  // The builtins, since swapcontext() calls the system twice, for the mask of signals; and AddressSanitizer
  // would forget what it knows of a stack that longjmp() leaves.
  [[gnu::noinline, gnu::no_sanitize_address]] static void swap(Side& from, Side& to) {
    if (!__builtin_setjmp(from.place)) enter(to);
  }
  [[noreturn, gnu::noinline, gnu::no_sanitize_address]] static void enter(Side& to) {
    if (to.entered) __builtin_longjmp(to.place, 1);
    setcontext(&to.context);
    std::abort();
  }

  Side own_, caller_;
  void (*call_)(const void*) = nullptr;
  const void* function_ = nullptr;
};

}  // namespace cen::cuda::simulator
