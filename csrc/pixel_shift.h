// One call of the pixel shift as plain numbers; defined in cen_ext/ops/pixel_shift.
#pragma once

#include <cstdint>

namespace cen {

// Groups of channels that are shifted, each in another direction; channels beyond them stay out.
constexpr int kDirections = 4;

struct PixelShift {
  int64_t modalities;             // M
  int64_t samples;                // N, images per modality
  int64_t channels;               // C
  int64_t rows, columns;          // H, W
  int64_t group;                  // channels per direction
  bool channels_last;             // an image is [H, W, C] in memory, else [C, H, W]
  bool adjoint;                   // shift back, from the other side
  bool streaming_stores = false;  // store results with non-temporal stores, because they are large

  constexpr int64_t images() const { return modalities * samples; }
  constexpr int64_t pixels() const { return rows * columns; }
  constexpr int64_t image_size() const { return channels * pixels(); }

  // The image whose shifted values are added to an image of modality m: that of the next modality.
  constexpr int64_t source(int64_t image) const {
    const int64_t from = image + (adjoint ? images() - samples : samples);
    return from < images() ? from : from - images();
  }
  // The direction of a channel, or kDirections if it is not shifted.
  constexpr int direction(int64_t channel) const {
    return channel < kDirections * group ? static_cast<int>(channel / group) : kDirections;
  }
  // Rows and columns from a result to the value that is added there: content moves down, right, left, up.
  constexpr int row_step(int direction) const { return signed_step((direction == 3) - (direction == 0)); }
  constexpr int column_step(int direction) const { return signed_step((direction == 2) - (direction == 1)); }

 private:
  constexpr int signed_step(int step) const { return adjoint ? -step : step; }
};

}  // namespace cen
