// The kernels for half x.
#include "norm_exchange/launch.cuh"
#include "pixel_shift.cuh"

namespace cen::cuda {

template void forward(const Problem&, const ForwardTensors<Half>&, Kind, const Device&, const Allocate&,
                      void*);
template void backward(const Problem&, const BackwardTensors<Half>&, Kind, const Device&, const Allocate&,
                       void*);
template void pixel_shift(const PixelShift&, const Half*, const Half*, Half*, void*);

}  // namespace cen::cuda
