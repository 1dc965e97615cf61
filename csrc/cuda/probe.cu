// What this build is, and whether the current device can run it.
#include "../gaussian_nll.h"
#include "device.h"

namespace vidfast::cuda {
namespace {

__global__ void probe_kernel(const int) {}

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

}  // namespace

std::string unavailable() {
  int driver = 0, devices = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  if (status == cudaSuccess && driver == 0) return "there is no NVIDIA driver on this machine";
  status = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // an error of this probe must not show up in another check
  if (status == cudaErrorInsufficientDriver)
    return "the driver supports CUDA " + version(driver) + ", but vidfast was built with CUDA " +
           version(CUDART_VERSION) + ": update the driver, or build vidfast with an older toolkit";
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) return "there is no CUDA device";
  if (status != cudaSuccess) return std::string("CUDA cannot start: ") + cudaGetErrorString(status);
  return "";
}

std::string device_unsupported() {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
  cudaGetLastError();
  if (status == cudaSuccess) return "";
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion)
    return "vidfast was built for CUDA architectures " + architectures() + ", which compute capability " +
           std::to_string(major) + "." + std::to_string(minor) + " cannot run (" + cudaGetErrorString(status) +
           "): rebuild with TORCH_CUDA_ARCH_LIST=" + std::to_string(major) + "." + std::to_string(minor);
  return std::string("CUDA cannot use this device: ") + cudaGetErrorString(status);
}

std::string architectures() { return VIDFAST_CUDA_ARCHITECTURES; }

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  cudaGetLastError();
  return driver;
}

}  // namespace vidfast::cuda
