// A graph built node by node, with conditionals, and its executable.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace harmonica {

// Every graph in it is a chain: a node runs after the one that was added to the same graph before it. Graph 0 is the
// root; `conditional` gives the numbers of others. Names appear in errors. Throws std::runtime_error where CUDA
// refuses, with the node's name; the object stays destructible. Addresses and captured graphs' memory stay the
// caller's, and have to live as long as this object.
class GatedGraph {
  public:
    explicit GatedGraph(int device);
    ~GatedGraph();
    GatedGraph(const GatedGraph&) = delete;
    GatedGraph& operator=(const GatedGraph&) = delete;

    // A condition's handle, for `conditional` and for DecisionMemory. With `initially` every launch begins with 1;
    // without, a kernel has to write it before its node is reached.
    uint64_t condition(bool initially);

    void fill(int graph, void* data, int byte, size_t bytes, const std::string& name);
    void decide(int graph, const DecisionMemory& memory, int first, int last, DecisionRule rule,
                const std::string& name);
    void change(int graph, const Change& change, const std::string& name);

    // Clones a captured cudaGraph_t, after checking node by node, children too, that it may stand in a conditional.
    void child(int graph, uintptr_t captured, const std::string& name);

    // An IF (one body) or, with `loop`, a WHILE node; returns its body's number.
    int conditional(int graph, uint64_t condition, bool loop, const std::string& name);

    void instantiate(uintptr_t stream);  // and uploads, on the stream
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
