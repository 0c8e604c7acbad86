// Queries the properties of the current device and the occupancy of kernels on it.
#include <map>
#include <mutex>
#include <tuple>

#include "device.cuh"
#include "kernels.h"

namespace cen::cuda {

static int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "device");
  return value;
}

const Device& current_device() {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int index = 0;
  check(cudaGetDevice(&index), "device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(index);
  if (known != devices.end()) return known->second;
  Device device{};
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                      attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return devices.emplace(index, device).first->second;
}

static int64_t query_max_active(const void* kernel, const Launch& l, int device) {
  int running = 0;
  if (l.cluster > 1) {
    const LaunchConfig config(l);
    if (cudaOccupancyMaxActiveClusters(&running, kernel, &config) == cudaSuccess) return running;
    cudaGetLastError();  // a device without clusters
    return 0;
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&running, kernel, l.threads_x * l.threads_y,
                                                      l.shared_bytes),
        "occupancy");
  return int64_t(running) * attribute(cudaDevAttrMultiProcessorCount, device);
}

int64_t max_active(const void* kernel, const Launch& l) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int64_t, int>, int64_t> answers;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::tuple(device, kernel, l.threads_x * l.threads_y, l.shared_bytes, l.cluster);
  const auto known = answers.find(key);
  if (known != answers.end()) return known->second;
  return answers.emplace(key, query_max_active(kernel, l, device)).first->second;
}

}  // namespace cen::cuda
