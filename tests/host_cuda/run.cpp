// Runs the CUDA kernels on the simulated device:
//   run CASES RESULTS
// A case is a call of the operator, forward and backward, or of the pixel shift.
// tests/ops/test_cuda_host.py writes the file of cases and reads the file of results.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "host_device.h"

namespace cen::cuda {
namespace {

// The header of a case in the file.
struct Header {
  int64_t type;  // type of x, an index into kTypes
  int64_t kind, multiprocessors, capability, shared_bytes, threads;
  int64_t refused;  // the device refuses clusters and cooperative launches
  int64_t moved;    // bit i: the i-th tensor with the shape of x begins one value after an aligned address
  int64_t has_residual, has_running, has_route;
  int64_t norm, joined;
  int64_t modalities, groups, samples, channels, spatial, order, channels_last, batch_statistics;
  int64_t region, criterion, activation;
  int64_t columns;  // of a pixel shift; 0 for the operator
  int64_t adjoint;
  double threshold, eps, negative_slope, momentum;

  Problem problem() const {
    return {static_cast<Norm>(norm),
            modalities,
            groups,
            samples,
            joined,
            channels,
            spatial,
            static_cast<Order>(order),
            channels_last != 0,
            batch_statistics != 0,
            false,
            threshold,
            static_cast<Region>(region),
            static_cast<Criterion>(criterion),
            eps,
            static_cast<Activation>(activation),
            negative_slope,
            momentum};
  }
  PixelShift shift() const {
    return {modalities, samples,      channels,           spatial / columns,
            columns,    channels / 5, channels_last != 0, adjoint != 0};
  }
  Device device() const {
    return {static_cast<int>(multiprocessors), static_cast<int>(capability), shared_bytes,
            static_cast<int>(threads)};
  }
};

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

// The files of cases and results. flush() writes the results of a case at once.
struct Files {
  std::FILE *cases, *results;
  std::string pending;

  bool read(void* to, int64_t bytes) {
    return bytes == 0 || std::fread(to, 1, bytes, cases) == static_cast<size_t>(bytes);
  }
  void write(const void* from, int64_t bytes) { pending.append(static_cast<const char*>(from), bytes); }
  void flush() {
    if (std::fwrite(pending.data(), 1, pending.size(), results) != pending.size() || std::fflush(results))
      fail("results");
    pending.clear();
  }
};

// Memory of exactly this size, initialized to NaN, so that AddressSanitizer detects out-of-bounds accesses.
// The value before a moved tensor must stay NaN.
template <class T>
class Array {
 public:
  explicit Array(int64_t size, bool moved = false)
      : size_(size), front_(moved), memory_(std::malloc((size + front_) * sizeof(T))) {
    std::memset(memory_.get(), 0xff, (size + front_) * sizeof(T));
  }
  ~Array() {
    unsigned char front[sizeof(T)];
    std::memset(front, 0xff, sizeof(T));
    if (front_ && std::memcmp(front, memory_.get(), sizeof(T)) != 0) {
      std::fputs("written in front of a tensor\n", stderr);
      std::abort();
    }
  }
  Array(const Array&) = delete;

  T* get() const { return size_ ? static_cast<T*>(memory_.get()) + front_ : nullptr; }
  void read(Files& files) const {
    if (!files.read(get(), size_ * sizeof(T))) fail("cases");
  }
  void write(Files& files) const {
    if (size_) files.write(get(), size_ * sizeof(T));
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  int64_t size_, front_;
  std::unique_ptr<void, Free> memory_;
};

// Calls call(kind, allocate), and again with the two-pass plan if that kind is refused. Writes whether it
// was.
template <class Call>
void run_planned(const Header& h, Files& files, Call call) {
  int64_t refused = 0;
  for (Kind kind = static_cast<Kind>(h.kind);; kind = Kind::two_pass, refused = 1) {
    std::vector<std::unique_ptr<Array<char>>> scratch;
    const auto allocate = [&](int64_t bytes) {
      scratch.push_back(std::make_unique<Array<char>>(bytes));
      return scratch.back()->get();
    };
    try {
      call(kind, allocate);
    } catch (const std::invalid_argument&) {
      if (kind == Kind::two_pass) throw;
      continue;
    }
    return files.write(&refused, sizeof(refused));
  }
}

template <class T>
void run_case(const Header& h, Files& files) {
  using R = Real<T>;
  const Problem p = h.problem();
  const int64_t size = p.units() * p.unit_size(), of_residual = h.has_residual ? size : 0;
  const int64_t table = p.modalities * p.channels;
  const int64_t rows = p.units() * (p.norm == Norm::layer ? p.spatial : p.channels / p.joined);
  const int64_t given = p.batch_statistics ? 0 : rows, own = p.batch_statistics ? rows : 0;
  const int64_t running = h.has_running ? table : 0;
  const auto moved = [&](int tensor) { return (h.moved >> tensor & 1) != 0; };

  const Array<T> x(size, moved(0)), dy(size, moved(1)), residual(of_residual, moved(2));
  const Array<R> weight(table), bias(table), mean(given), var(given);
  const Array<R> running_mean(running), running_var(running);
  const Array<int32_t> route(h.has_route ? table : 0);
  for (const auto* tensor : {&x, &dy, &residual}) tensor->read(files);
  for (const auto* tensor : {&weight, &bias, &mean, &var, &running_mean, &running_var}) tensor->read(files);
  route.read(files);

  const Array<T> y(size, moved(3)), dx(size, moved(4));
  const Array<R> batch_mean(own), batch_var(own), dweight(table), dbias(table);
  simulator::refuse_together(h.refused != 0);
  run_planned(h, files, [&](Kind kind, const Allocate& allocate) {
    const ForwardTensors<T> t{x.get(),         weight.get(),       bias.get(),        mean.get(),
                              var.get(),       residual.get(),     y.get(),           batch_mean.get(),
                              batch_var.get(), running_mean.get(), running_var.get(), route.get()};
    forward(p, t, kind, h.device(), allocate, nullptr);
  });
  for (const auto* tensor : {&y}) tensor->write(files);
  for (const auto* tensor : {&batch_mean, &batch_var, &running_mean, &running_var}) tensor->write(files);

  // Without an activation the gradient of the residual is dy, so there is no dresidual.
  const int64_t of_dresidual = p.activation == Activation::identity ? 0 : of_residual;
  const Array<T> dresidual(of_dresidual, moved(5));
  const auto &used_mean = p.batch_statistics ? batch_mean : mean,
             &used_var = p.batch_statistics ? batch_var : var;
  run_planned(h, files, [&](Kind kind, const Allocate& allocate) {
    const BackwardTensors<T> t{dy.get(),
                               x.get(),
                               weight.get(),
                               bias.get(),
                               used_mean.get(),
                               used_var.get(),
                               of_dresidual ? residual.get() : nullptr,
                               dx.get(),
                               dweight.get(),
                               dbias.get(),
                               dresidual.get(),
                               route.get()};
    backward(p, t, kind, h.device(), allocate, nullptr);
  });
  dx.write(files);
  for (const auto* tensor : {&dweight, &dbias}) tensor->write(files);
  dresidual.write(files);
}

template <class T>
void run_shift(const Header& h, Files& files) {
  const PixelShift p = h.shift();
  const int64_t size = p.images() * p.image_size();
  const auto moved = [&](int tensor) { return (h.moved >> tensor & 1) != 0; };
  const Array<T> x(size, moved(0)), base(h.has_residual ? size : 0, moved(1)), y(size, moved(2));
  x.read(files);
  base.read(files);
  pixel_shift(p, x.get(), base.get(), y.get(), nullptr);
  y.write(files);
}

template <class T>
void run_any(const Header& h, Files& files) {
  if (h.columns)
    run_shift<T>(h, files);
  else
    run_case<T>(h, files);
}

constexpr void (*kTypes[])(const Header&, Files&) = {run_any<float>, run_any<double>, run_any<Half>,
                                                     run_any<BFloat16>};

}  // namespace
}  // namespace cen::cuda

int main(int, char** arguments) {
  cen::cuda::Files files{std::fopen(arguments[1], "rb"), std::fopen(arguments[2], "wb"), {}};
  if (!files.cases || !files.results) cen::cuda::fail("files");
  for (cen::cuda::Header h; files.read(&h, sizeof(h)); files.flush()) cen::cuda::kTypes[h.type](h, files);
}
