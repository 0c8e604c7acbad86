// The device that plans are made for.
#include <map>
#include <mutex>

#include "device.h"
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

}  // namespace cen::cuda
