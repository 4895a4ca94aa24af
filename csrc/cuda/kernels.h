// Adds the kernels that decide to a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace harmonica {

// Writes sums of |o - reference| and of |reference|, and copies o into the other half of reference [2, values]. The
// order of the sums depends on `values` and `parts` alone.
struct Change {
    const void* o;
    void* reference;
    DType dtype;
    int64_t values;
    double* sums;  // [2, parts]
    int32_t parts;
    const int32_t* which;  // the half that holds the reference
};

cudaGraphNode_t add_decide(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const DecisionMemory& memory,
                           int first, int last, DecisionRule rule);
cudaGraphNode_t add_change(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const Change& change);

}  // namespace harmonica
