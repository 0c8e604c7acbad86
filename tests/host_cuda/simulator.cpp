#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <random>
#include <string>

#include "fiber.h"
#include "host_device.h"
#include "races.h"

namespace cen::cuda {
namespace simulator {
namespace {

enum class Reach { block, cluster, grid };

struct Barrier {
  Reach reach;
  const char* file;
  int line;

  bool operator==(const Barrier& b) const {
    return reach == b.reach && line == b.line && (file == b.file || !std::strcmp(file, b.file));
  }
};

struct Copy {
  void* shared;
  const void* global;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  Index3 index{};
  Moment now;    // access() sets its place
  Barrier at{};  // the barrier that it waits at
  bool ended = false;
  std::vector<Copy> copies;               // not committed
  std::vector<std::vector<Copy>> groups;  // committed, but pending; the oldest first
};

struct Block {
  long long index, cluster;
  char* shared;
  std::vector<Thread> threads;
  bool started, waiting, ended;
};

// The state of the launch. `blocks` are the resident ones, ordered by index.
const Grid* grid = nullptr;
const std::function<void()>* kernel = nullptr;
std::vector<Block> blocks;
Thread* running = nullptr;
Races races;
bool refusing = false;

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  std::fputs("simulated device: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (running)
    std::fprintf(stderr, " (block %lld, thread %d,%d)", running->block->index, running->index.x,
                 running->index.y);
  std::fputs("\n", stderr);
  std::abort();
}

std::string text(const Barrier& barrier) {
  static const char* const kNames[] = {"sync_threads", "cluster_sync", "grid_sync"};
  return std::string(kNames[static_cast<int>(barrier.reach)]) + " at " + barrier.file + ":" +
         std::to_string(barrier.line);
}

std::mt19937_64& random_numbers() {
  static std::mt19937_64 generator = [] {
    const char* seed = std::getenv("CEN_HOST_CUDA_SEED");
    return std::mt19937_64(seed ? std::strtoull(seed, nullptr, 10) : 0);
  }();
  return generator;
}

std::vector<int64_t> shuffled(int64_t count) {
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_numbers());
  return order;
}

// --- blocks ---

void make(Block& block, int64_t index, int64_t first_fiber) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  const int64_t threads = int64_t{grid->threads_x} * grid->threads_y;
  while (static_cast<int64_t>(fibers.size()) < first_fiber + threads)
    fibers.push_back(std::make_unique<Fiber>());

  block.index = index;
  block.cluster = index / grid->cluster;
  block.started = block.waiting = block.ended = false;
  block.shared = static_cast<char*>(std::malloc(grid->shared_bytes));  // aligned to 16
  std::memset(block.shared, 0xff, grid->shared_bytes);
  block.threads = std::vector<Thread>(threads);
  for (int64_t i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.fiber = fibers[first_fiber + i].get();
    t.index = {static_cast<int>(i % grid->threads_x), static_cast<int>(i / grid->threads_x)};
    t.now.thread = index * threads + i;
    t.now.block = index;
    t.now.cluster = block.cluster;
  }
}

// Frees the block's shared memory, so that AddressSanitizer reports later accesses.
void end(Block& block) {
  const auto pending = [](const Thread& t) {
    return !t.copies.empty() || std::any_of(t.groups.begin(), t.groups.end(),
                                            [](const std::vector<Copy>& group) { return !group.empty(); });
  };
  for (const Thread& t : block.threads)
    if (pending(t))
      fail("block %lld, thread %d,%d ended with copies that it never waited for", block.index, t.index.x,
           t.index.y);
  races.forget(block.shared, grid->shared_bytes);
  std::free(block.shared);
  block.shared = nullptr;
  block.ended = true;
}

// Runs all threads of the block, in random order, each to its next barrier or its end.
void advance(Block& block) {
  static const auto body = [] {
    (*kernel)();
    running->ended = true;
  };
  for (const int64_t i : shuffled(block.threads.size())) {
    running = &block.threads[i];
    if (block.started)
      running->fiber->resume();
    else
      running->fiber->start(body);
  }
  running = nullptr;
  block.started = true;

  const Thread& first = block.threads[0];
  const auto state = [](const Thread& t) { return t.ended ? "has ended" : "waits in " + text(t.at); };
  for (const Thread& t : block.threads)
    if (t.ended != first.ended || (!t.ended && !(t.at == first.at)))
      fail("the threads of block %lld part: 0,0 %s, %d,%d %s", block.index, state(first).c_str(), t.index.x,
           t.index.y, state(t).c_str());
  if (first.ended)
    end(block);
  else
    block.waiting = true;
}

// Releases the blocks at this block's barrier once all of its block, cluster or grid have arrived.
void release(Block& block) {
  const Barrier at = block.threads[0].at;
  const auto takes_part = [&](const Block& other) {
    return at.reach == Reach::grid || other.index == block.index ||
           (at.reach == Reach::cluster && other.cluster == block.cluster);
  };
  for (const Block& other : blocks) {
    if (!takes_part(other)) continue;
    const Barrier& its = other.threads[0].at;
    if (other.ended)
      fail("block %lld waits in %s, block %lld has ended", block.index, text(at).c_str(), other.index);
    if (!other.waiting || its.reach < at.reach) return;  // has not arrived yet
    if (!(its == at))
      fail("block %lld waits in %s, block %lld in %s", block.index, text(at).c_str(), other.index,
           text(its).c_str());
  }
  for (Block& other : blocks) {
    if (!takes_part(other)) continue;
    other.waiting = false;
    for (Thread& t : other.threads) {
      t.now.block_barriers += 1;
      t.now.cluster_barriers += at.reach >= Reach::cluster;
      t.now.grid_barriers += at.reach == Reach::grid;
    }
  }
}

// Runs blocks that are resident together. A chosen block runs past several barriers, so that some get far
// ahead.
void run_together(int64_t first, int64_t count) {
  blocks.resize(count);
  for (int64_t i = 0; i < count; ++i) make(blocks[i], first + i, i * grid->threads_x * grid->threads_y);
  for (;;) {
    bool any_runs = false;
    for (const int64_t i : shuffled(count)) {
      Block& block = blocks[i];
      for (bool on = true; on && !block.waiting && !block.ended; on = random_numbers()() % 4 != 0) {
        any_runs = true;
        advance(block);
        if (block.waiting) release(block);
      }
    }
    if (any_runs) continue;
    for (Block& block : blocks)
      if (!block.ended) release(block);  // fails with the block that it waits for in vain
    return;
  }
}

void check(const Grid& g) {
  constexpr int64_t kShared = 227 << 10;  // maximum per block at compute capability 9.0
  const int64_t threads = int64_t{g.threads_x} * g.threads_y;
  if (g.blocks < 1 || g.blocks >= int64_t{1} << 31 || threads < 1 || threads > 1024 || g.shared_bytes < 0 ||
      g.shared_bytes > kShared || g.cluster < 1 || g.cluster > 16 || g.blocks % g.cluster)
    fail("no such launch: %lld blocks in clusters of %d, %d * %d threads, %lld bytes of shared memory",
         static_cast<long long>(g.blocks), g.cluster, g.threads_x, g.threads_y,
         static_cast<long long>(g.shared_bytes));
}

void arrive(Reach reach, const char* file, int line) {
  if (reach == Reach::grid && !grid->cooperative) fail("grid_sync at %s:%d: not cooperative", file, line);
  running->at = {reach, file, line};
  running->fiber->pause();
}

bool in_shared_memory(const void* address, int64_t bytes) {
  const int64_t at = static_cast<const char*>(address) - running->block->shared;
  return at >= 0 && at + bytes <= grid->shared_bytes;
}

}  // namespace

void refuse_together(bool refuse) { refusing = refuse; }
bool refuses_together() { return refusing; }

void run(const Grid& of_launch, const std::function<void()>& thread) {
  check(of_launch);
  grid = &of_launch;
  kernel = &thread;
  const int64_t together = grid->cooperative ? grid->blocks : grid->cluster;
  for (const int64_t i : shuffled(grid->blocks / together)) run_together(i * together, together);
  races.clear();
}

void* shared_of_rank(void* shared, int rank) {
  if (!in_shared_memory(shared, 0)) fail("of_rank: no address in this block's shared memory");
  if (rank < 0 || rank >= grid->cluster) fail("of_rank: no rank %d in a cluster of %d", rank, grid->cluster);
  const Block& own = *running->block;
  const Block& other = blocks[own.cluster * grid->cluster + rank - blocks[0].index];
  if (other.ended) fail("of_rank: block %lld of the cluster has ended", other.index);
  return other.shared + (static_cast<char*>(shared) - own.shared);
}

void wait_copies(int pending) {
  auto& groups = running->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front()) {
      access(copy.global, 16, false);
      access(copy.shared, 16, true);
      std::memcpy(copy.shared, copy.global, 16);
    }
}

void access(const void* address, int64_t bytes, bool write, const void* place) {
  if (!running || running->fiber->owns(address)) return;
  running->now.place = place;
  const Moment* other = races.add(address, bytes, write, running->now);
  if (!other) return;
  const long long thread = other->thread % static_cast<int64_t>(running->block->threads.size());
  std::fputs("race between these places:\n", stderr);
  char command[128];
  std::snprintf(command, sizeof(command), "addr2line -Cpfie /proc/%d/exe %p %p >&2", getpid(), place,
                other->place);
  if (std::system(command)) std::fprintf(stderr, "%p, %p\n", place, other->place);
  fail("race: this thread %s what thread %lld of block %lld uses, with no barrier in between",
       write ? "writes" : "reads", thread, static_cast<long long>(other->block));
}

void access16(const void* address, bool write, const void* place) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("%p is not aligned to 16 bytes", address);
  access(address, 16, write, place);
}

}  // namespace simulator

using simulator::arrive, simulator::fail, simulator::grid, simulator::Reach, simulator::running;

Index3 thread_index() { return running->index; }
Index3 block_threads() { return {grid->threads_x, grid->threads_y}; }
int64_t block_index() { return running->block->index; }
int64_t grid_blocks() { return grid->blocks; }
int cluster_rank() { return static_cast<int>(running->block->index % grid->cluster); }
int cluster_size() { return grid->cluster; }
void* shared_memory() { return running->block->shared; }

void sync_threads(const char* file, int line) { arrive(Reach::block, file, line); }
void cluster_sync(const char* file, int line) { arrive(Reach::cluster, file, line); }
void grid_sync(const char* file, int line) { arrive(Reach::grid, file, line); }

void copy_async16(void* shared, const void* global) {
  simulator::access16(global, false);
  if (!simulator::in_shared_memory(shared, 16)) fail("copy_async16: not into this block's shared memory");
  simulator::access16(shared, true);
  std::memset(shared, 0xff, 16);
  running->copies.push_back({shared, global});
}

void commit_copies() {
  running->groups.push_back(std::move(running->copies));
  running->copies.clear();
}

}  // namespace cen::cuda
