// The operator of cen_ext/ops/norm_exchange/reference.py on single slices.
#pragma once

#include "../activation.cuh"
#include "moments.cuh"

namespace cen::cuda {

// Threads per block of the two-pass plan, and blocks per multiprocessor, which registers limit: for channels
// last every element of a vector has its own coefficients.
constexpr int kTwoPassThreads = 256;
template <class T, bool kLast>
constexpr int kForwardBlocks = (kLast && sizeof(T) == 2) || sizeof(T) == 8 ? 2 : 3;
constexpr int kBackwardBlocks = 2;
// Maximum threads per block that keeps its data in shared memory.
constexpr int kResidentThreads = 512;

// Hands out a block's shared memory. The host makes the same allocations from a null base to learn the size.
struct SharedAllocator {
  char* base;
  int64_t used = 0;

  template <class X>
  CEN_HOST_DEVICE X* alloc(int64_t count) {
#if defined(__CUDA_ARCH__)
    X* piece = reinterpret_cast<X*>(base + used);  // without a condition nvcc infers the shared address space
#else
    X* piece = base ? reinterpret_cast<X*>(base + used) : nullptr;
#endif
    used += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
    return piece;
  }
};

// Weight, bias and statistics folded into coefficients, for the channels of a strip in every modality.
//   z = (x - shift) * scale + offset
// shift is the mean rounded to R; offset compensates the rounding. Backward through batch statistics:
//   dx = dz * scale + (x - shift) * on_x + constant
enum Coefficient { kShift, kScale, kOffset, kOnX, kConstant };
constexpr int kForwardCoefficients = kOffset + 1, kBackwardCoefficients = kConstant + 1;
enum Flag : uint8_t {
  kReplaced = 1,  // by the exchange
  kDead = 2,      // replaced and borrowed by no other modality: x is of no use but for its statistics
  kAlone = 4,     // replaced by one modality, not by the mean of the others
};

// The flags of a vector's channels. For channels first, all elements have those of the line.
template <class T, bool kLast>
struct Flags {
  uint8_t of[kLast ? kVecSize<T> : 1];

  CEN_DEVICE bool replaced(int i) const { return of[kLast ? i : 0] & kReplaced; }
  CEN_DEVICE bool dead(int i) const { return of[kLast ? i : 0] & kDead; }
  CEN_DEVICE bool alone(int i) const { return of[kLast ? i : 0] & kAlone; }
  CEN_DEVICE bool any_replaced() const {
    uint8_t any = 0;
    for (const uint8_t f : of) any |= f;
    return any & kReplaced;
  }
  CEN_DEVICE bool all(Flag flag) const {
    uint8_t every = flag;
    for (const uint8_t f : of) every &= f;
    return every;
  }
};

// The channels of a vector, a bit each, that one modality lends to another. For channels first there is one
// bit, of the line. Bits rather than the lender per channel save registers where every channel may differ.
template <bool kLast>
struct Lent {
  uint8_t bits;

  CEN_DEVICE bool has(int i) const { return bits >> (kLast ? i : 0) & 1; }
};

template <class T, bool kLast>
struct Table {
  using R = Real<T>;
  static constexpr int kElements = kLast ? kVecSize<T> : 1;  // channels per vector

  R* coefficients;  // [coefficient][M][width]
  uint8_t* flags;   // [M][width]
  uint8_t* lent;    // [M][M][lines], borrower first
  int modalities, width, lines;

  static CEN_HOST_DEVICE int width_of(const Geometry& geo) {
    return kLast ? geo.threads_x * kVecSize<T> : geo.threads_y;
  }

  CEN_HOST_DEVICE Table(SharedAllocator& allocator, const Problem& p, const Geometry& geo, int count)
      : modalities(int(p.modalities)), width(width_of(geo)), lines(width / kElements) {
    coefficients = allocator.alloc<R>(count * p.modalities * width);
    flags = allocator.alloc<uint8_t>(p.modalities * width);
    lent = allocator.alloc<uint8_t>(p.modalities * p.modalities * lines);
  }

  CEN_DEVICE R& at(Coefficient coefficient, int m, int w) const {
    return coefficients[(coefficient * modalities + m) * width + w];
  }

  // Calls f(m, c, w) for every modality m and channel c of the strip, where w is the channel's index in the
  // table.
  template <class F>
  CEN_DEVICE void each(const Problem& p, const ThreadCoord<kLast>& coord, F f) const {
    for (int e = coord.thread_rank; e < modalities * width; e += coord.num_threads) {
      const int m = e / width, w = e % width;
      const int64_t c = coord.strip * width + w;
      if (c < p.channels) f(m, c, w);
    }
  }

  // Sets the flags of padding channels, too, because a vector may contain some. `dead` is 0 where results of
  // other channels depend on x of any channel.
  CEN_DEVICE void set_flags(const Problem& p, const ThreadCoord<kLast>& coord, const R* weight,
                            const int32_t* route, int dead = kDead) const {
    for (int e = coord.thread_rank; e < modalities * width; e += coord.num_threads) flags[e] = 0;
    each(p, coord, [&](int m, int64_t c, int w) {
      const int source = route_of(p, weight, route, m, c);
      if (source == kOwn) return;
      const bool unread = is_unread(p, weight, route, m, c);
      flags[m * width + w] = uint8_t(kReplaced | (unread ? dead : 0) | (source == kMean ? 0 : int(kAlone)));
    });
    for (int e = coord.thread_rank; e < modalities * modalities * lines; e += coord.num_threads) {
      const int m = e / lines / modalities, lender = e / lines % modalities;
      uint8_t bits = 0;
      for (int l = 0; l < kElements; ++l) {
        const int64_t c = coord.strip * width + e % lines * kElements + l;
        if (lender != m && c < p.channels) bits |= lends(route_of(p, weight, route, m, c), lender) << l;
      }
      lent[e] = bits;
    }
  }

  CEN_DEVICE RealVec<T> row(Coefficient coefficient, int m, int line) const {
    RealVec<T> v;
    if constexpr (kLast)
      v = *reinterpret_cast<const RealVec<T>*>(&at(coefficient, m, line * kVecSize<T>));
    else
      for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = at(coefficient, m, line);
    return v;
  }

  CEN_DEVICE Flags<T, kLast> flags_of(int m, int line) const {
    return *reinterpret_cast<const Flags<T, kLast>*>(&flags[m * width + line * kElements]);
  }
  CEN_DEVICE Lent<kLast> lent_to(int m, int lender, int line) const {
    return {lent[(m * modalities + lender) * lines + line]};
  }
};

// The coefficients of z for one line or vector of channels of a modality, in registers.
template <class T, bool kLast>
struct Affine {
  RealVec<T> shift, scale, offset;

  CEN_DEVICE Affine(const Table<T, kLast>& table, int m, int line)
      : shift(table.row(kShift, m, line)),
        scale(table.row(kScale, m, line)),
        offset(table.row(kOffset, m, line)) {}

  CEN_DEVICE RealVec<T> z(const RealVec<T>& x) const {
    RealVec<T> v;
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l)
      v.element[l] = (x.element[l] - shift.element[l]) * scale.element[l] + offset.element[l];
    return v;
  }
};

// The line or vector of channels that a thread processes, in modality m.
template <class T, bool kLast>
struct Strip {
  using R = Real<T>;
  using Wide = RealVec<T>;

  const Table<T, kLast>& table;
  const int m, line;
  const Affine<T, kLast> own;
  const Flags<T, kLast> flags;
  const bool all_replaced, any_replaced;
  const R per_other;  // 1 / (M - 1)

  CEN_DEVICE Strip(const Table<T, kLast>& table, int m, int line)
      : table(table),
        m(m),
        line(line),
        own(table, m, line),
        flags(table.flags_of(m, line)),
        all_replaced(flags.all(kReplaced)),
        any_replaced(flags.any_replaced()),
        per_other(table.modalities > 1 ? R(1) / R(table.modalities - 1) : R(0)) {}

  // The weight of each modality in what replaces a channel.
  CEN_DEVICE R share(const Flags<T, kLast>& borrower, int l) const {
    return borrower.alone(l) ? R(1) : per_other;
  }

  // z after the exchange, at a slice where x(m) returns the widened vector of modality m.
  template <class X>
  CEN_DEVICE Wide exchanged(X x) const {
    Wide v{};
    if (!all_replaced) v = own.z(x(m));
    if (!any_replaced) return v;
    Wide sum{};
    CEN_UNROLL_1
    for (int other = 0; other < table.modalities; ++other) {
      if (other == m) continue;
      const Lent<kLast> lent = table.lent_to(m, other, line);
      const Wide z = Affine<T, kLast>(table, other, line).z(x(other));
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) sum.element[l] += lent.has(l) ? z.element[l] : R(0);
    }
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l)
      v.element[l] = flags.replaced(l) ? sum.element[l] * share(flags, l) : v.element[l];
    return v;
  }
};

}  // namespace cen::cuda
