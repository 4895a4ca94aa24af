// Stands in for csrc/cuda in a build without nvcc.
#include "../kernels.h"

namespace harmonica {

CudaBuild cuda_build() { return {}; }

}  // namespace harmonica
