// A graph with conditional nodes, built node by node, and its executable.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace harmonica {

// The root is graph 0; `conditional` returns the numbers of the bodies' graphs. Each graph is a chain: a node runs
// after the node added to the same graph before it. If CUDA refuses, std::runtime_error is thrown with the node's name,
// and the object stays destructible. The caller owns the memory behind addresses and captured graphs, and must keep it
// as long as this object.
class GatedGraph {
  public:
    explicit GatedGraph(int device);
    ~GatedGraph();
    GatedGraph(const GatedGraph&) = delete;
    GatedGraph& operator=(const GatedGraph&) = delete;

    // A condition's handle, for `conditional` and for DecisionMemory. With `initially`, the condition is 1 at the start
    // of every launch. Without it, a kernel must write the condition before its node is reached.
    uint64_t condition(bool initially);

    void fill(int graph, void* data, int byte, size_t bytes, const std::string& name);
    void decide(int graph, const DecisionMemory& memory, int first, int last, DecisionRule rule,
                const std::string& name);
    void change(int graph, const Change& change, const std::string& name);

    // Clones a captured cudaGraph_t. First checks that each node, in child graphs too, may stand in a conditional. In
    // the clone every node begins after the ones before it have ended.
    void child(int graph, uintptr_t captured, const std::string& name);

    // Adds an IF node (with one body) or, with `loop`, a WHILE node. Returns the number of its body.
    int conditional(int graph, uint64_t condition, bool loop, const std::string& name);

    cudaGraph_t made(int graph) const { return chains_.at(graph).graph; }  // to read it back

    void instantiate(uintptr_t stream);  // also uploads the executable, on the stream
    void launch(uintptr_t stream);

  private:
    struct Chain {
        cudaGraph_t graph;
        cudaGraphNode_t last = nullptr;
    };
    Chain& chain(int graph);
    void append(Chain& chain, cudaGraphNode_t node, const std::string& name);

    int device_;
    cudaGraph_t root_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
    std::vector<Chain> chains_;
    std::map<cudaGraphNode_t, std::string> names_;
};

}  // namespace harmonica
