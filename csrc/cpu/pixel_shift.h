// The pixel shift: y = base + x of the next modality, moved by a pixel (csrc/pixel_shift.h). Every value is
// read and written once, in runs that are contiguous in x, base and y.
#pragma once

#include "vec.h"

namespace cen::cpu {
namespace {

// y = shifted + base along a run of n values, where either may be missing.
template <bool kShifted, bool kBase, class T>
CEN_INLINE void add_run(const T* shifted, const T* base, T* y, int64_t n, bool streamed) {
  using R = Real<T>;
  const auto add = [&](int64_t i, auto count, bool aligned) CEN_INLINE_LAMBDA {
    Vec<R> v{};
    if constexpr (kShifted) v = load(shifted + i, count);
    if constexpr (kShifted && kBase) v += load(base + i, count);
    if constexpr (!kShifted && kBase) v = load(base + i, count);
    store(y + i, v, count, aligned);
  };
  int64_t i = streamed ? smaller(n, (kVecSize<R> - phase_of(y)) % kVecSize<R>) : 0;
  if (i > 0) add(0, i, false);
  for (; i + kVecSize<R> <= n; i += kVecSize<R>) add(i, FullVec<R>{}, streamed);
  if (i < n) add(i, n - i, false);
}

template <class T>
CEN_INLINE void add_run(const T* shifted, const T* base, T* y, int64_t n, bool streamed) {
  if (shifted && base)
    add_run<true, true>(shifted, base, y, n, streamed);
  else if (shifted)
    add_run<true, false>(shifted, base, y, n, streamed);
  else if (base)
    add_run<false, true>(shifted, base, y, n, streamed);
  else
    add_run<false, false>(shifted, base, y, n, streamed);
}

template <class T>
CEN_INLINE const T* or_null(const T* tensor, int64_t at) {
  return tensor ? tensor + at : nullptr;
}

// A channel of an image, channels first.
template <class T>
void shift_plane(const PixelShift& p, const T* x, const T* base, T* y, int direction) {
  const int64_t row_step = p.row_step(direction), column_step = p.column_step(direction);
  const auto run = [&](int64_t at, int64_t n, const T* shifted) CEN_INLINE_LAMBDA {
    add_run(shifted, or_null(base, at), y + at, n, p.streaming_stores);
  };
  if (direction == kDirections) return run(0, p.pixels(), nullptr);
  if (row_step != 0) {
    const int64_t moved = (p.rows - 1) * p.columns;  // all but the row where zeros enter
    if (row_step < 0) run(0, p.columns, nullptr);
    run(row_step < 0 ? p.columns : 0, moved, x + (row_step < 0 ? 0 : p.columns));
    if (row_step > 0) run(moved, p.columns, nullptr);
    return;
  }
  for (int64_t at = 0; at < p.pixels(); at += p.columns) {
    if (column_step < 0) run(at, 1, nullptr);
    run(at + (column_step < 0), p.columns - 1, x + at + (column_step > 0));
    if (column_step > 0) run(at + p.columns - 1, 1, nullptr);
  }
}

// A row of an image, channels last; x and y point to the row's first value.
template <class T>
void shift_row(const PixelShift& p, const T* x, const T* base, T* y, int64_t row) {
  const int64_t shifted_channels = kDirections * p.group;
  for (int64_t column = 0; column < p.columns; ++column) {
    const int64_t at = column * p.channels;
    for (int direction = 0; direction < kDirections; ++direction) {
      const int64_t from_row = row + p.row_step(direction), from = column + p.column_step(direction);
      const bool inside = from_row >= 0 && from_row < p.rows && from >= 0 && from < p.columns;
      const int64_t first = direction * p.group;
      const T* shifted = x + (p.row_step(direction) * p.columns + from) * p.channels + first;
      add_run(inside ? shifted : nullptr, or_null(base, at + first), y + at + first, p.group, false);
    }
    add_run<T>(nullptr, or_null(base, at + shifted_channels), y + at + shifted_channels,
               p.channels - shifted_channels, false);
  }
}

template <class T>
void pixel_shift(const PixelShift& p, const T* x, const T* base, T* y, const Parallel& parallel) {
  const int64_t parts = p.channels_last ? p.rows : p.channels, size = p.image_size() / parts;
  parallel_tasks(parallel, p.images() * parts, [&](int64_t i) {
    const int64_t image = i / parts, part = i % parts, at = i * size;
    const T* from = x + (p.source(image) * parts + part) * size;
    if (p.channels_last)
      shift_row(p, from, or_null(base, at), y + at, part);
    else
      shift_plane(p, from, or_null(base, at), y + at, p.direction(part));
  });
}

}  // namespace
}  // namespace cen::cpu
