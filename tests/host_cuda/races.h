// Finds races: two threads use the same byte, one of them writes, and no barrier that both take part in lies
// between. Whether it sees a kernel's loads and stores depends on how that was compiled; see races.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>

namespace cen::cuda::simulator {

// A thread of the launch, and how many barriers of each kind it has passed.
struct Moment {
  int64_t thread = -1, block = 0, cluster = 0;
  int64_t block_barriers = 0, cluster_barriers = 0, grid_barriers = 0;
  const void* place = nullptr;  // in the program

  bool is_before(const Moment& later) const {
    return thread < 0 || thread == later.thread || grid_barriers < later.grid_barriers ||
           (cluster == later.cluster && cluster_barriers < later.cluster_barriers) ||
           (block == later.block && block_barriers < later.block_barriers);
  }
};

class Races {
 public:
  // An earlier access that this one races with, or null. Of more than two threads that read a byte in the
  // same interval, two are remembered.
  const Moment* add(const void* address, int64_t bytes, bool write, const Moment& now);

  // Memory is given back.
  void forget(const void* address, int64_t bytes);

  // All of a launch is before all of the next.
  void clear() { lines_.clear(); }

 private:
  struct Byte {
    Moment write, reads[2];
  };
  static constexpr uintptr_t kLine = 64;

  std::unordered_map<uintptr_t, std::array<Byte, kLine>> lines_;
};

}  // namespace cen::cuda::simulator
