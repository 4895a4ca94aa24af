// The smallest gated graph: a WHILE whose body holds IF nodes whose bodies hold one kernel each. Does CUDA run it, do
// the conditions hold, and what do idle nodes cost? Needs neither Python nor torch:
//     nvcc -std=c++17 -O2 -arch=native tests/cuda/smallest.cu csrc/cuda/decide.cu csrc/cuda/graph.cpp -o smallest
// Prints a line of JSON for each case, before the next begins; ends with 1 where a count is wrong.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/error.h"
#include "../../csrc/cuda/graph.h"

using namespace harmonica;

namespace {

__global__ void count_up(int* counter) { ++*counter; }

template <typename T>
T* device(size_t count) {
    void* data = nullptr;
    check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, 0, count * sizeof(T)), "cudaMemset");
    return static_cast<T*>(data);
}

template <typename T>
void write(T* to, const std::vector<T>& from) {
    check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
}

cudaGraphNode_t add_count_up(cudaGraph_t graph, int* counter) {
    void* arguments[] = {&counter};
    cudaKernelNodeParams params{};
    params.func = reinterpret_cast<void*>(count_up);
    params.gridDim = params.blockDim = dim3(1);
    params.kernelParams = arguments;
    cudaGraphNode_t node;
    check(cudaGraphAddKernelNode(&node, graph, nullptr, 0, &params), "cudaGraphAddKernelNode");
    return node;
}

// A graph of one kernel, as a capture would give it. Or of two, the second launched as cuBLAS does on Hopper: it need
// not wait for the first one's end, and then counts wrong.
cudaGraph_t counting(int* counter, bool programmatic) {
    cudaGraph_t graph;
    check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
    cudaGraphNode_t first = add_count_up(graph, counter);
    if (!programmatic) return graph;
    cudaGraphNode_t second = add_count_up(graph, counter);
    cudaGraphEdgeData edge{};
    edge.from_port = cudaGraphKernelNodePortLaunchCompletion;
    edge.type = cudaGraphDependencyTypeProgrammatic;
#if CUDART_VERSION >= 13000
    check(cudaGraphAddDependencies(graph, &first, &second, &edge, 1), "cudaGraphAddDependencies");
#else
    check(cudaGraphAddDependencies_v2(graph, &first, &second, &edge, 1), "cudaGraphAddDependencies");
#endif
    return graph;
}

// How many edges let a kernel begin before the one before it has ended, in the graph and in its child graphs.
int overlapping(cudaGraph_t graph) {
    size_t count = 0;
    auto edges = [&](cudaGraphNode_t* from, cudaGraphNode_t* to, cudaGraphEdgeData* data) {
#if CUDART_VERSION >= 13000
        check(cudaGraphGetEdges(graph, from, to, data, &count), "cudaGraphGetEdges");
#else
        check(cudaGraphGetEdges_v2(graph, from, to, data, &count), "cudaGraphGetEdges");
#endif
    };
    edges(nullptr, nullptr, nullptr);
    std::vector<cudaGraphNode_t> from(count), to(count);
    std::vector<cudaGraphEdgeData> data(count);
    if (count) edges(from.data(), to.data(), data.data());
    int found = std::count_if(data.begin(), data.end(), [](const cudaGraphEdgeData& edge) {
        return edge.type || edge.from_port || edge.to_port;
    });
    check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(count);
    if (count) check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
    for (cudaGraphNode_t node : nodes) {
        cudaGraphNodeType type;
        check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
        if (type != cudaGraphNodeTypeGraph) continue;
        cudaGraph_t inner;
        check(cudaGraphChildGraphNodeGetGraph(node, &inner), "cudaGraphChildGraphNodeGetGraph");
        found += overlapping(inner);
    }
    return found;
}

float milliseconds(GatedGraph& graph, cudaStream_t stream) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times(15);
    for (float& time : times) {
        check(cudaEventRecord(begin, stream), "cudaEventRecord");
        graph.launch(reinterpret_cast<uintptr_t>(stream));
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "running the graph");
        check(cudaEventElapsedTime(&time, begin, end), "cudaEventElapsedTime");
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// K branches with an IF node each over T steps; `share` of the scores lie above the threshold. programmatic: as in
// `counting`.
bool run(int K, int T, double share, cudaStream_t stream, bool programmatic = false) {
    DecisionMemory m{};
    m.steps = T, m.branches = K, m.history = 1, m.parts = 1;
    auto scores = device<float>(size_t(T) * K);
    auto threshold = device<double>(1);
    auto conditions = device<uint64_t>(K + 1);
    m.scores = scores, m.threshold = threshold, m.conditions = conditions;
    m.extrapolation = scores, m.change = device<double>(2), m.forecast_weights = device<float>(K);
    m.reused = device<uint8_t>(size_t(T) * K);
    m.step = device<int32_t>(1), m.again = device<int32_t>(1), m.reference = device<int32_t>(1);
    m.compute = device<int32_t>(K), m.start = device<int32_t>(K + 1), m.slot = device<int32_t>(K);
    m.latest_at = device<int32_t>(K), m.previous_at = device<int32_t>(K);
    int* counters = device<int>(K + 1);

    std::vector<float> table(size_t(T) * K);
    std::vector<int> expected(K + 1);
    for (size_t i = 0; i < table.size(); ++i) {
        table[i] = float((i * 2654435761u >> 8) % 1000) < share * 1000 ? 1.0f : 0.0f;
        if (i / K == 0 || table[i] > 0.5f) ++expected[i % K];
    }
    expected[K] = T;
    for (int& count : expected) count *= programmatic ? 2 : 1;
    write(scores, table);
    write(threshold, std::vector<double>{0.5});

    std::vector<uint64_t> handles(K + 1);
    GatedGraph graph(0);
    graph.fill(0, m.step, 0xFF, sizeof(int32_t), "rewind");
    handles[K] = graph.condition(true);
    int body = graph.conditional(0, handles[K], true, "WHILE");
    graph.decide(body, m, 0, K, DecisionRule::scores, "decision");
    std::vector<cudaGraph_t> sources;
    std::vector<int> graphs{0, body};
    for (int k = 0; k < K; ++k) {
        handles[k] = graph.condition(false);
        std::string name = "branch " + std::to_string(k);
        sources.push_back(counting(counters + k, programmatic));
        graphs.push_back(graph.conditional(body, handles[k], false, "IF of " + name));
        graph.child(graphs.back(), uintptr_t(sources.back()), name);
    }
    sources.push_back(counting(counters + K, programmatic));
    graph.child(body, uintptr_t(sources.back()), "step");
    write(conditions, handles);
    int given = 0, left = 0;  // edges that let kernels overlap: in what was captured, in the clones
    for (cudaGraph_t source : sources) given += overlapping(source);
    for (int number : graphs) left += overlapping(graph.made(number));
    graph.instantiate(reinterpret_cast<uintptr_t>(stream));
    for (cudaGraph_t source : sources) cudaGraphDestroy(source);  // the graph holds clones

    graph.launch(reinterpret_cast<uintptr_t>(stream));
    check(cudaStreamSynchronize(stream), "running the graph");
    std::vector<int> found(K + 1);
    check(cudaMemcpy(found.data(), counters, found.size() * sizeof(int), cudaMemcpyDeviceToHost), "cudaMemcpy");
    bool right = found == expected && given == (programmatic ? K + 1 : 0) && !left;
    float time = milliseconds(graph, stream);
    std::printf("{\"step\": \"smallest\", \"if_nodes\": %d, \"steps\": %d, \"computed\": %.2f, \"overlapping\": %d, "
                "\"overlapping_in_clones\": %d, \"right\": %s, \"us_per_step\": %.3f}\n", K, T, share, given, left,
                right ? "true" : "false", 1000 * time / T);
    std::fflush(stdout);
    for (void* data : std::initializer_list<void*>{
             scores, threshold, conditions, const_cast<double*>(m.change), m.forecast_weights, m.reused, m.step, m.again,
             m.reference, m.compute, m.start, m.slot, m.latest_at, m.previous_at, counters})
        cudaFree(data);
    return right;
}

}  // namespace

int main() {
    try {
        cudaStream_t stream;
        check(cudaStreamCreate(&stream), "cudaStreamCreate");
        bool right = true;
        for (int K : {1, 30, 60})
            for (double share : {0.0, 0.5, 1.0}) right = run(K, 100, share, stream) && right;
        int major = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
        if (major >= 9) right = run(8, 100, 0.5, stream, true) && right;
        cudaStreamDestroy(stream);
        return right ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
