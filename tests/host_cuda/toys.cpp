// Kernels that test the simulated device, some of them wrong on purpose: `toys NAME` runs one on
// x = 1, 2, 3, ... and prints y.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "host_device.h"

namespace cen::cuda {

namespace {

using Kernel = void (*)(const float* x, float* y);
constexpr int kBlocks = 6, kThreadsX = 4, kThreadsY = 4, kCluster = 3;

CEN_DEVICE int rank() { return thread_index().y * block_threads().x + thread_index().x; }
CEN_DEVICE int count() { return block_threads().x * block_threads().y; }
CEN_DEVICE int64_t own() { return block_index() * count() + rank(); }
CEN_DEVICE float* shared() { return static_cast<float*>(shared_memory()); }

// The sum of value over the block's threads. Shared memory holds a float per thread.
template <bool kBarrier = true>
CEN_DEVICE float block_sum(float value) {
  shared()[rank()] = value;
  if (kBarrier) sync_threads();
  float sum = 0;
  for (int i = 0; i < count(); ++i) sum += shared()[i];
  return sum;
}

CEN_KERNEL void block_sums(const float* x, float* y) {
  const float sum = block_sum(x[own()]);
  if (rank() == 0) y[block_index()] = sum;
}

CEN_KERNEL void no_barrier(const float* x, float* y) { y[own()] = block_sum<false>(x[own()]); }

// Every thread of a cluster gets the sum over the cluster.
template <bool kWait>
CEN_KERNEL void cluster_sums(const float* x, float* y) {
  const float part = block_sum(x[own()]);
  sync_threads();
  if (rank() == 0) shared()[0] = part;
  cluster_sync();
  float sum = 0;
  for (int i = 0; i < cluster_size(); ++i) sum += *of_rank(shared(), i);
  y[own()] = sum;
  if (kWait) cluster_sync();
}

// Reads the shared memory of another block, which may have ended.
CEN_KERNEL void kept_pointer(const float* x, float* y) {
  const float* next = of_rank(shared(), (cluster_rank() + 1) % cluster_size()) + rank();
  shared()[rank()] = x[own()];
  cluster_sync();
  y[own()] = *next;
}

// The first block of a cluster ends early.
CEN_KERNEL void early_end(const float* x, float* y) {
  y[own()] = x[own()];
  if (cluster_rank() > 0) cluster_sync();
}

// Every thread of the grid gets the sum over the grid. The end of y holds the sums per block.
template <bool kBarrier>
CEN_KERNEL void grid_sums(const float* x, float* y) {
  float* parts = y + grid_blocks() * count();
  const float part = block_sum(x[own()]);
  if (rank() == 0) parts[block_index()] = part;
  if (kBarrier) grid_sync();
  float sum = 0;
  for (int64_t i = 0; i < grid_blocks(); ++i) sum += parts[i];
  y[own()] = sum;
}

// y = x reversed within the block, through two groups of copies to shared memory.
template <bool kWait>
CEN_KERNEL void copies(const float* x, float* y) {
  const float* from = x + block_index() * count();
  const int half = count() / 2;
  for (int part = 0; part < 2; ++part) {
    for (int i = 4 * rank(); i < half; i += 4 * count())
      copy_async16(shared() + part * half + i, from + part * half + i);
    commit_copies();
  }
  for (int part = 0; part < 2; ++part) {
    if (part == 0)
      wait_copies<1>();
    else if (kWait)
      wait_copies<0>();
    sync_threads();
    if (rank() / half == part) y[block_index() * count() + count() - 1 - rank()] = shared()[rank()];
  }
  wait_copies<0>();
}

// All blocks write the same values to the same addresses, which is a race.
CEN_KERNEL void same_place(const float*, float* y) { y[rank()] = 1; }

CEN_KERNEL void no_wait(const float* x, float*) {
  if (rank() == 0) copy_async16(shared(), x);
  commit_copies();
}

CEN_KERNEL void misaligned(const float* x, float*) { copy_async16(shared(), x + 1); }

CEN_KERNEL void past_shared(const float* x, float* y) { y[own()] = x[own()] + shared()[count()]; }

CEN_KERNEL void unset_shared(const float*, float* y) { y[own()] = shared()[rank()]; }

CEN_KERNEL void divergent(const float* x, float* y) {
  if (rank() % 2)
    sync_threads();
  else
    sync_threads();
  y[own()] = x[own()];
}

CEN_KERNEL void left(const float* x, float* y) {
  if (rank() == 1) return;
  sync_threads();
  y[own()] = x[own()];
}

// Threads write adjacent bytes, which is no race, then read those of others.
CEN_KERNEL void bytes(const float* x, float* y) {
  char* flags = static_cast<char*>(shared_memory());
  flags[rank()] = x[own()] > 0;
  sync_threads();
  y[own()] = flags[count() - 1 - rank()];
}

const std::map<std::string, Kernel> kAlone = {
    {"block_sums", block_sums},
    {"no_barrier", no_barrier},
    {"copies", copies<true>},
    {"early_copies", copies<false>},
    {"no_wait", no_wait},
    {"misaligned", misaligned},
    {"past_shared", past_shared},
    {"unset_shared", unset_shared},
    {"divergent", divergent},
    {"left", left},
    {"bytes", bytes},
    {"same_place", same_place},
    {"no_grid", grid_sums<true>},
};
const std::map<std::string, Kernel> kClusters = {{"cluster_sums", cluster_sums<true>},
                                                 {"no_last_wait", cluster_sums<false>},
                                                 {"kept_pointer", kept_pointer},
                                                 {"early_end", early_end}};
const std::map<std::string, Kernel> kCooperative = {{"grid_sums", grid_sums<true>},
                                                    {"no_grid_barrier", grid_sums<false>}};

int main_of(const std::string& name) {
  constexpr int64_t kThreads = kThreadsX * kThreadsY;
  std::vector<float> x(kBlocks * kThreads), y(x.size() + kBlocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i + 1);
  const auto run = [&](const std::map<std::string, Kernel>& kernels, int cluster, bool cooperative) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) return false;
    const Launch shape{kBlocks, kThreadsX, kThreadsY, kThreads * 4, cluster, cooperative, nullptr};
    launch(found->second, shape, x.data(), y.data());
    return true;
  };
  if (!run(kAlone, 1, false) && !run(kClusters, kCluster, false) && !run(kCooperative, 1, true)) return 2;
  for (const float value : y) std::printf("%g\n", value);
  return 0;
}

}  // namespace
}  // namespace cen::cuda

int main(int, char** arguments) { return cen::cuda::main_of(arguments[1]); }
