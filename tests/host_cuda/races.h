// Race detector: reports two threads that access the same byte, at least one of them writing, without a
// common barrier in between. It sees a kernel's loads and stores only if that is instrumented; see races.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>

namespace cen::cuda::simulator {

// An access by a thread of the launch, and the barriers of each kind that the thread has passed before.
// Small, since there are three to a byte.
struct Moment {
  int32_t thread = -1, block = 0, cluster = 0;
  int32_t block_barriers = 0, cluster_barriers = 0, grid_barriers = 0;
  const void* place = nullptr;  // code address of the access

  bool is_before(const Moment& later) const {
    return thread < 0 || thread == later.thread || grid_barriers < later.grid_barriers ||
           (cluster == later.cluster && cluster_barriers < later.cluster_barriers) ||
           (block == later.block && block_barriers < later.block_barriers);
  }
};

class Races {
 public:
  // Records an access and returns an earlier one that it races with, or null. Of the threads that read a byte
  // between the same barriers, only two are remembered.
  const Moment* add(const void* address, int64_t bytes, bool write, const Moment& now);

  // Forgets accesses to memory that is freed.
  void forget(const void* address, int64_t bytes);

  // Forgets all accesses, between launches: a launch begins after the previous one has ended.
  void clear() { lines_.clear(); }

 private:
  struct Byte {
    Moment write, reads[2];
  };
  static constexpr uintptr_t kLine = 64;
  using Line = std::array<Byte, kLine>;

  std::unordered_map<uintptr_t, Line> lines_;
};

}  // namespace cen::cuda::simulator
