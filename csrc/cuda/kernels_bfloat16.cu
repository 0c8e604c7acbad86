// The kernels for bfloat16 x.
#include "norm_exchange/launch.cuh"
#include "pixel_shift.cuh"

namespace cen::cuda {

template void forward(const Problem&, const ForwardTensors<BFloat16>&, Kind, const Device&, const Allocate&,
                      void*);
template void backward(const Problem&, const BackwardTensors<BFloat16>&, Kind, const Device&, const Allocate&,
                       void*);
template void pixel_shift(const PixelShift&, const BFloat16*, const BFloat16*, BFloat16*, void*);

}  // namespace cen::cuda
