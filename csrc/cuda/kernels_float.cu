// The kernels for float x.
#include "norm_exchange/launch.cuh"
#include "pixel_shift.cuh"

namespace cen::cuda {

template void forward(const Problem&, const ForwardTensors<float>&, Kind, const Device&, const Allocate&,
                      void*);
template void backward(const Problem&, const BackwardTensors<float>&, Kind, const Device&, const Allocate&,
                       void*);
template void pixel_shift(const PixelShift&, const float*, const float*, float*, void*);

}  // namespace cen::cuda
