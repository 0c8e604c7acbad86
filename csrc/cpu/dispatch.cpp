// Code that is independent of the instruction set: its choice at run time, scratch memory, the cache size and
// running statistics.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cen_build.h"  // written by setup.py
#include "kernels.h"

namespace cen::cpu {

#if defined(CEN_BUILT_DEFAULT)
extern const Kernels default_kernels;
extern const HalfKernels default_half_kernels;
#endif
#if defined(CEN_BUILT_AVX2)
extern const Kernels avx2_kernels;
extern const HalfKernels avx2_half_kernels;
#endif
#if defined(CEN_BUILT_AVX512)
extern const Kernels avx512_kernels;
extern const HalfKernels avx512_half_kernels;
#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if defined(CEN_BUILT_DEFAULT)
      {"default", &default_kernels, &default_half_kernels, true},
#endif
#if defined(CEN_BUILT_AVX2)
      {"avx2", &avx2_kernels, &avx2_half_kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
#if defined(CEN_BUILT_AVX512)
      {"avx512", &avx512_kernels, &avx512_half_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  return sets;
}

static const InstructionSet& choose() {
  const char* asked = std::getenv("CEN_EXT_CPU_CAPABILITY");
  std::string runs;
  const std::vector<InstructionSet>& sets = instruction_sets();
  for (auto set = sets.rbegin(); set != sets.rend(); ++set) {
    if (!set->supported) continue;
    if (!asked || !*asked || std::string(asked) == set->name) return *set;
    runs += std::string(runs.empty() ? "" : ", ") + set->name;
  }
  if (runs.empty()) throw std::runtime_error("this build's instruction sets do not run on this processor");
  throw std::runtime_error(std::string("CEN_EXT_CPU_CAPABILITY is '") + asked +
                           "'; of this build, this processor runs " + runs);
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

template <class R>
void update_running(const Problem& p, const R* batch_mean, const R* batch_var, R* running_mean,
                    R* running_var) {
  const auto update = [&](R* running, const R* batch, double factor) {
    for (int64_t m = 0; m < p.modalities; ++m)
      for (int64_t c = 0; c < p.channels; ++c) {
        double sum = 0;
        for (int64_t g = 0; g < p.groups; ++g) sum += batch[p.unit(m, g) * p.channels + c];
        R& r = running[m * p.channels + c];
        r = static_cast<R>(r + p.momentum * (sum / p.groups * factor - r));
      }
  };
  update(running_mean, batch_mean, 1);
  update(running_var, batch_var, p.unbiased());
}

template void update_running(const Problem&, const float*, const float*, float*, float*);
template void update_running(const Problem&, const double*, const double*, double*, double*);

namespace {

constexpr auto kAlignment = std::align_val_t{64};

struct Pool {
  struct Block {
    void* memory;
    int64_t bytes;
  };
  std::vector<Block> free;
  int64_t bytes = 0;

  ~Pool() {
    for (const Block& block : free) ::operator delete(block.memory, kAlignment);
  }
};

thread_local Pool pool;

// Rounds up by at most an eighth, so that calls of similar size reuse the same block.
int64_t rounded(int64_t bytes) {
  int64_t step = 256;
  while (16 * step < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

void* acquire_scratch(int64_t bytes) {
  const int64_t size = rounded(bytes);
  for (auto block = pool.free.begin(); block != pool.free.end(); ++block) {
    if (block->bytes != size) continue;
    void* memory = block->memory;
    pool.free.erase(block);
    pool.bytes -= size;
    return memory;
  }
  void* memory = ::operator new(size, kAlignment);
  prefer_large_pages(memory, size);
  return memory;
}

void release_scratch(void* memory, int64_t bytes) {
  constexpr int64_t kMost = 32 << 20;
  const int64_t size = rounded(bytes);
  if (size > kMost) return ::operator delete(memory, kAlignment);
  pool.free.push_back({memory, size});
  pool.bytes += size;
  while (pool.bytes > kMost) {  // oldest first: its size may never be requested again
    ::operator delete(pool.free.front().memory, kAlignment);
    pool.bytes -= pool.free.front().bytes;
    pool.free.erase(pool.free.begin());
  }
}

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory), begin = (first + kPage - 1) / kPage * kPage,
                  end = (first + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // madvise() is a hint, so its failure is ignored.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t last_level_cache() {
  // The system reports the whole processor's, of which these cores may have a small part: in a virtual
  // machine with 2 cores it said 300 MiB. Few processors have more for each core than kMostPerCore.
  constexpr int64_t kMostPerCore = 16 << 20, kUsual = 32 << 20;
  static const int64_t bytes = [] {
    int64_t kibibytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
    const int64_t reported = kibibytes > 0 ? kibibytes << 10 : kUsual;
    const int64_t cores = std::thread::hardware_concurrency();
    return cores > 0 ? std::min(reported, cores * kMostPerCore) : reported;
  }();
  return bytes;
}

}  // namespace cen::cpu
