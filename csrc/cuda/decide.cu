// The kernel that decides a step, and the kernel that measures the change of the first branch's output.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../decide.h"
#include "error.h"
#include "kernels.h"

namespace harmonica {
namespace {

constexpr int THREADS = 256;

// The sums of a and b over the block, for every thread. Their order depends on the block's size alone.
__device__ double2 block_sum(double a, double b) {
    __shared__ double2 sums[THREADS];
    sums[threadIdx.x] = {a, b};
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x].x += sums[threadIdx.x + half].x;
            sums[threadIdx.x].y += sums[threadIdx.x + half].y;
        }
    }
    __syncthreads();
    return sums[0];
}

// One block. It settles the branches in parallel. Then a single thread writes the runs and every condition, since
// concurrent cudaGraphSetConditional calls are undefined.
__global__ void __launch_bounds__(THREADS) decide_kernel(DecisionMemory m, int first, int last, DecisionRule rule) {
    int step = *m.step + (first == 0);
    double2 sums = {0, 0};
    if (rule == DecisionRule::change) {
        for (int i = threadIdx.x; i < m.parts; i += THREADS) {
            sums.x += m.change[i];
            sums.y += m.change[m.parts + i];
        }
        sums = block_sum(sums.x, sums.y);
    }
    // All threads read what the single one needs, so that it does not wait for memory once a branch.
    __shared__ int computes[THREADS];
    __shared__ cudaGraphConditionalHandle handles[THREADS];
    int start = first == 0 ? 0 : m.start[first];
    for (int begin = first; begin < last; begin += THREADS) {
        int k = begin + threadIdx.x;
        if (k < last) {
            computes[threadIdx.x] = settle(m, step, k, asks_for(m, rule, step, k, sums.x, sums.y));
            handles[threadIdx.x] = m.conditions[k];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < min(THREADS, last - begin); ++i) {
                if (computes[i]) start = begin + i;
                m.start[begin + i + 1] = start;
                cudaGraphSetConditional(handles[i], computes[i]);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x) return;
    if (first == 0) {
        bool again = step + 1 < m.steps;
        *m.step = step;
        *m.again = again;
        m.start[0] = 0;
        cudaGraphSetConditional(m.conditions[m.branches], again);
    }
    if (rule == DecisionRule::change && m.compute[first]) *m.reference ^= 1;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) change_kernel(Change c) {
    const T* o = static_cast<const T*>(c.o);
    T* halves = static_cast<T*>(c.reference);
    const T* reference = halves + *c.which * c.values;
    T* next = halves + (1 - *c.which) * c.values;
    double difference = 0, size = 0;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < c.values; i += int64_t(c.parts) * THREADS) {
        float now = static_cast<float>(o[i]), before = static_cast<float>(reference[i]);
        difference += fabsf(now - before);
        size += fabsf(before);
        next[i] = o[i];
    }
    double2 sums = block_sum(difference, size);
    if (threadIdx.x == 0) {
        c.sums[blockIdx.x] = sums.x;
        c.sums[c.parts + blockIdx.x] = sums.y;
    }
}

cudaGraphNode_t add_kernel(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const void* kernel,
                           int blocks, void** arguments, const char* name) {
    cudaKernelNodeParams params{};
    params.func = const_cast<void*>(kernel);
    params.gridDim = dim3(blocks);
    params.blockDim = dim3(THREADS);
    params.kernelParams = arguments;
    cudaGraphNode_t node;
    check(cudaGraphAddKernelNode(&node, graph, after, count, &params), std::string("adding the ") + name + " kernel");
    return node;
}

}  // namespace

cudaGraphNode_t add_decide(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const DecisionMemory& memory,
                           int first, int last, DecisionRule rule) {
    DecisionMemory m = memory;
    void* arguments[] = {&m, &first, &last, &rule};
    return add_kernel(graph, after, count, reinterpret_cast<const void*>(decide_kernel), 1, arguments, "decision");
}

cudaGraphNode_t add_change(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const Change& change) {
    Change c = change;
    void* arguments[] = {&c};
    const void* kernel = nullptr;
    switch (c.dtype) {
        case DType::f32: kernel = reinterpret_cast<const void*>(change_kernel<float>); break;
        case DType::f16: kernel = reinterpret_cast<const void*>(change_kernel<__half>); break;
        case DType::bf16: kernel = reinterpret_cast<const void*>(change_kernel<__nv_bfloat16>); break;
        case DType::f64: throw std::invalid_argument("change: float64 outputs are not supported");
    }
    return add_kernel(graph, after, count, kernel, c.parts, arguments, "change");
}

}  // namespace harmonica
