#include "races.h"

#include <algorithm>

#include "host_device.h"

namespace cen::cuda::simulator {

const Moment* Races::add(const void* address, int64_t bytes, bool write, const Moment& now) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  Line* line = nullptr;
  for (uintptr_t a = begin; a < begin + bytes; ++a) {
    if (!line || a % kLine == 0) line = &lines_[a / kLine];
    Byte& byte = (*line)[a % kLine];
    if (!byte.write.is_before(now)) return &byte.write;
    if (!write) {
      for (Moment& read : byte.reads)
        if (read.is_before(now)) {
          read = now;
          break;
        }
      continue;
    }
    for (Moment& read : byte.reads)
      if (!read.is_before(now)) return &read;
    byte.write = now;
  }
  return nullptr;
}

void Races::forget(const void* address, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  for (uintptr_t a = begin, next; a < end; a = next) {
    next = std::min(end, (a / kLine + 1) * kLine);
    const auto line = lines_.find(a / kLine);
    if (line != lines_.end()) std::fill_n(line->second.begin() + a % kLine, next - a, Byte{});
  }
}

}  // namespace cen::cuda::simulator

// With -fsanitize=thread the compiler calls these functions before every load and store; linking without that
// option selects the definitions here. (GCC instruments no larger accesses, and no variables whose address is
// not taken.)
using cen::cuda::simulator::access;

#define CEN_ACCESS(bytes)                                                                                \
  void __tsan_read##bytes(void* address) { access(address, bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* address) { access(address, bytes, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* address) {                                                     \
    access(address, bytes, false, __builtin_return_address(0));                                          \
  }                                                                                                      \
  void __tsan_unaligned_write##bytes(void* address) {                                                    \
    access(address, bytes, true, __builtin_return_address(0));                                           \
  }

extern "C" {
CEN_ACCESS(1)
CEN_ACCESS(2)
CEN_ACCESS(4)
CEN_ACCESS(8)
CEN_ACCESS(16)
void __tsan_read_range(void* address, long bytes) {
  access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, long bytes) {
  access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
