// Every CUDA call's result goes through `check`.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace harmonica {

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next call does not meet it
    throw std::runtime_error(what + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// Makes a device current; at the end of its scope, the device before it again.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        check(cudaSetDevice(device), "choosing device " + std::to_string(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

}  // namespace harmonica
