// Argument checks, allocation and memory layouts of tensors, through LibTorch's stable ABI: one build serves
// every torch from 2.10 on. Only the files that include this one see tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cen_build.h"  // written by setup.py
#include "cpu/kernels.h"

namespace cen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline void check_as(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes,
                     const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == type && sizes_of(tensor) == sizes,
                  "cen_ext: ", name, " is not of the dtype, sizes and device that x and weight ask for");
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// Whether a result with the shape of x uses non-temporal stores. If it is not native it is copied to another
// layout right away and should stay in the cache.
inline bool is_streamed(const Tensor& x, bool native) {
  return x.is_cpu() && native &&
         x.numel() * static_cast<int64_t>(x.element_size()) > cpu::last_level_cache() / 8;
}

// Whether t is contiguous, in channels-last or in the default order of dimensions.
inline bool is_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool fit = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return fit;
  };
  if (channels_last && !fits(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 1; --d)
    if (!(channels_last && d == 1) && !fits(d)) return false;
  return fits(0);
}

inline Sizes strides_of(const Tensor& tensor) { return {tensor.strides().begin(), tensor.strides().end()}; }

inline Sizes dense_strides(const Sizes& sizes, bool channels_last) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  const auto set = [&](size_t d) {
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) set(1);
  for (size_t d = sizes.size() - 1; d >= 1; --d)
    if (!(channels_last && d == 1)) set(d);
  set(0);
  return strides;
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

// Returns an uninitialized tensor on the device of `like`. It comes straight from the allocator: the stable
// ABI's factory functions go through the dispatcher, and one call of our op needs five tensors.
inline Tensor empty(const Sizes& sizes, const Sizes& strides, const Tensor& like, int32_t type) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device, like.get_device_index(),
                                                  &handle));
  const Tensor tensor(handle);
  if (like.is_cpu())
    cpu::prefer_large_pages(tensor.mutable_data_ptr(),
                            tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}
inline Tensor empty_table(const Sizes& sizes, const Tensor& like) {
  return empty(sizes, dense_strides(sizes, false), like, dtype_of(like));
}

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(packed(*tensor)) : std::nullopt;
}

// The memory layout that the kernels use for x, channels first or channels last, and conversion to and from
// it. Results of an op have the strides of torch.empty_like(x), as the fake kernels promise.
class Layout {
 public:
  explicit Layout(const Tensor& x)
      : like_(is_dense(x, false) || is_dense(x, true) ? x : torch::stable::empty_like(x)) {
    const bool first = is_dense(like_, false), last = is_dense(like_, true);
    const int64_t channels = x.size(1), spatial = x.numel() / (x.size(0) * channels);
    // If x is dense in both layouts, vectors run along the longer of the two axes.
    channels_last_ = last && (spatial == 1 || !first);
    // Lines far shorter than a CPU vector cost more than converting x to channels last.
    const bool short_lines = x.is_cpu() && spatial < 16 && channels >= 16;
    native_ = channels_last_ || (first && !short_lines);
    channels_last_ |= first && short_lines;
  }

  bool channels_last() const { return channels_last_; }
  bool native() const { return native_; }

  Tensor empty() const { return empty(dtype_of(like_)); }
  Tensor empty(int32_t type) const {
    const Sizes sizes = sizes_of(like_);
    return cen::empty(sizes, native_ ? strides_of(like_) : dense_strides(sizes, channels_last_), like_, type);
  }

  // Returns the tensor in the kernels' layout, copied only if it is in another.
  Tensor to_kernel(const Tensor& tensor) const {
    if (is_dense(tensor, channels_last_)) return tensor;
    Tensor dense = empty(dtype_of(tensor));
    torch::stable::copy_(dense, tensor);
    return dense;
  }

  std::optional<Tensor> to_kernel(const std::optional<Tensor>& tensor) const {
    return tensor ? std::optional(to_kernel(*tensor)) : std::nullopt;
  }

  // Converts a tensor made by empty() to the strides that the op promises.
  Tensor from_kernel(const Tensor& tensor) const {
    if (native_) return tensor;
    Tensor result = cen::empty(sizes_of(like_), strides_of(like_), like_, dtype_of(tensor));
    torch::stable::copy_(result, tensor);
    return result;
  }

 private:
  Tensor like_;
  bool channels_last_, native_;
};

// Threads for an elementwise op on this many values: one if waking the others costs more than it saves.
inline cpu::Parallel threads_for(int64_t values) {
  constexpr int64_t kWorthSharing = 32768;
  const int64_t threads = values <= kWorthSharing ? 1 : torch::stable::get_num_threads();
  return {threads, [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// Calls f with a zero of the C++ type for a dtype.
template <class F>
void with_type(ScalarType type, F f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::Double) return f(double{});
  if (type == ScalarType::Half) return f(Half{});
  f(BFloat16{});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace cen
