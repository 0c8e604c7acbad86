// The CUDA stream that an op runs on.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "../tensors.h"

// LibTorch declares this in its CUDA builds only. A weak symbol lets the extension load beside a LibTorch
// without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);

namespace cen {

// Calls f(stream) with the device of x as current device and its current stream. A refusal by a kernel
// becomes torch's error.
template <class F>
void on_stream(const Tensor& x, F f) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  try {
    f(stream);
  } catch (const std::invalid_argument& refusal) {
    STD_TORCH_CHECK(false, refusal.what());
  }
}

}  // namespace cen
