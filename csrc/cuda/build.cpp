// What the CUDA part was built with, and what this machine has.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../kernels.h"

namespace harmonica {

CudaBuild cuda_build() {
    CudaBuild build;
    build.runtime = CUDART_VERSION;
    build.architectures = HARMONICA_CUDA_ARCHITECTURES;
    // Code built by a toolkit runs on any driver of its major version. The conditional nodes used here came with 12.4.
    build.needed = std::max(CUDART_VERSION / 1000 * 1000, 12040);
    if (cudaDriverGetVersion(&build.driver) != cudaSuccess) build.driver = 0;
    cudaError_t error = cudaGetDeviceCount(&build.devices);
    if (error != cudaSuccess) {
        build.devices = 0;
        build.error = cudaGetErrorString(error);
        cudaGetLastError();
    }
    return build;
}

}  // namespace harmonica
