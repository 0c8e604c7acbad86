// The kernels for double x.
#include "norm_exchange/launch.cuh"
#include "pixel_shift.cuh"

namespace cen::cuda {

template void forward(const Problem&, const ForwardTensors<double>&, Kind, const Device&, const Allocate&,
                      void*);
template void backward(const Problem&, const BackwardTensors<double>&, Kind, const Device&, const Allocate&,
                       void*);
template void pixel_shift(const PixelShift&, const double*, const double*, double*, void*);

}  // namespace cen::cuda
