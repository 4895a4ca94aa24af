// What the CUDA part is made of and what this machine offers it.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../kernels.h"

namespace harmonica {

CudaBuild cuda_build() {
    CudaBuild build;
    build.runtime = CUDART_VERSION;
    build.architectures = HARMONICA_CUDA_ARCHITECTURES;
    // A toolkit's code runs on drivers of its major version; conditional nodes as used here came with 12.4.
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
