// The pixel shift: y = base + x of the next modality, moved by a pixel (csrc/pixel_shift.h). Every value is
// read and written once.
#pragma once

#include <stdexcept>

#include "../pixel_shift.h"
#include "norm_exchange/geometry.cuh"

namespace cen::cuda {

// Values per thread, whose loads are in flight together, and threads per block. Not measured yet.
constexpr int kShiftValues = 4, kShiftThreads = 256;

// Divisions of a value's number within its image, and the blocks per image.
struct ShiftGeometry {
  Divider by_channel;  // the pixels of a channel, or the channels of a pixel if they are last
  Divider by_row, by_group;
  int64_t chunks;

  explicit ShiftGeometry(const PixelShift& p)
      : by_channel(uint32_t(p.channels_last ? p.channels : p.pixels())),
        by_row(uint32_t(p.columns)),
        by_group(uint32_t(p.group > 0 ? p.group : 1)),
        chunks(divide_up(p.image_size(), kShiftValues * kShiftThreads)) {}
};

// The distance, within an image, from a value to the one that is added there; false if none is.
CEN_DEVICE bool find_shifted(const PixelShift& p, const ShiftGeometry& geo, int value, int64_t& distance) {
  const int line = int(geo.by_channel(uint32_t(value))),
            rest = value - line * int(p.channels_last ? p.channels : p.pixels());
  const int channel = p.channels_last ? rest : line, pixel = p.channels_last ? line : rest;
  if (channel >= kDirections * p.group) return false;
  const int direction = int(geo.by_group(uint32_t(channel)));
  const int row = int(geo.by_row(uint32_t(pixel))), column = pixel - row * int(p.columns);
  const int row_step = p.row_step(direction), column_step = p.column_step(direction);
  distance = (row_step * p.columns + column_step) * (p.channels_last ? p.channels : 1);
  return row + row_step >= 0 && row + row_step < p.rows && column + column_step >= 0 &&
         column + column_step < p.columns;
}

template <class T>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kShiftThreads, 1)
    pixel_shift_kernel(CEN_PARAMETER PixelShift p, CEN_PARAMETER ShiftGeometry geo, const T* x, const T* base,
                       T* y) {
  const int64_t image = block_index() / geo.chunks, chunk = block_index() % geo.chunks;
  const int64_t to = image * p.image_size(), from = p.source(image) * p.image_size();
  Real<T> sums[kShiftValues];
  CEN_UNROLL
  for (int i = 0; i < kShiftValues; ++i) {
    const int64_t value = (chunk * kShiftValues + i) * kShiftThreads + thread_index().x;
    if (value >= p.image_size()) break;
    int64_t distance;
    sums[i] = find_shifted(p, geo, int(value), distance) ? to_real(x[from + value + distance]) : 0;
    if (base) sums[i] += to_real(base[to + value]);
  }
  CEN_UNROLL
  for (int i = 0; i < kShiftValues; ++i) {
    const int64_t value = (chunk * kShiftValues + i) * kShiftThreads + thread_index().x;
    if (value < p.image_size()) from_real(sums[i], y[to + value]);
  }
}

template <class T>
void pixel_shift(const PixelShift& p, const T* x, const T* base, T* y, void* stream) {
  const ShiftGeometry geo(p);
  const int64_t blocks = p.images() * geo.chunks;
  if (p.image_size() >= int64_t{1} << 31 || blocks >= int64_t{1} << 31)
    throw std::invalid_argument("cen_ext: an image has more than 2^31 values, or there are too many images");
  const Launch shape{blocks, kShiftThreads, 1, 0, 1, false, stream};
  launch(pixel_shift_kernel<T>, shape, p, geo, x, base, y);
}

}  // namespace cen::cuda
