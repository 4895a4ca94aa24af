#include "graph.h"

#include <cuda.h>

#include "error.h"

namespace harmonica {
namespace {

// The driver's node type, since the runtime does not know all types. The function is asked for by name, so that nothing
// links to libcuda.
CUgraphNodeType node_type(cudaGraphNode_t node, const std::string& where) {
    static const auto get = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuGraphNodeGetType", &function, 12000, cudaEnableDefault, &found),
              "asking the driver for cuGraphNodeGetType");
#else
        check(cudaGetDriverEntryPoint("cuGraphNodeGetType", &function, cudaEnableDefault, &found),
              "asking the driver for cuGraphNodeGetType");
#endif
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuGraphNodeGetType");
        return reinterpret_cast<CUresult (*)(CUgraphNode, CUgraphNodeType*)>(function);
    }();
    CUgraphNodeType type;
    if (CUresult result = get(node, &type); result != CUDA_SUCCESS)
        throw std::runtime_error(where + ": the driver does not say what this node is (CUresult " +
                                 std::to_string(int(result)) + ")");
    return type;
}

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
    throw std::runtime_error(where + ": " + what + " cannot stand in the body of a conditional node");
}

void check_memory(const void* address, const std::string& where) {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, address), where + ": asking where an address lies");
    if (attributes.type == cudaMemoryTypeUnregistered || !attributes.devicePointer)
        refuse(where, "a copy from or to pageable host memory (make the tensor on the GPU before the capture)");
}

void check_cooperative(cudaGraphNode_t node, const std::string& where) {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    if (driver >= 12060) return;
    cudaLaunchAttributeValue value{};
    check(cudaGraphKernelNodeGetAttribute(node, cudaLaunchAttributeCooperative, &value),
          where + ": asking how it launches");
    if (value.cooperative) refuse(where, "before driver 12.6, a cooperative kernel");
}

std::vector<cudaGraphNode_t> nodes_of(cudaGraph_t graph, const std::string& where) {
    size_t count = 0;
    check(cudaGraphGetNodes(graph, nullptr, &count), where + ": counting nodes");
    std::vector<cudaGraphNode_t> nodes(count);
    check(cudaGraphGetNodes(graph, nodes.data(), &count), where + ": listing nodes");
    return nodes;
}

void check_nodes(cudaGraph_t graph, const std::string& where) {
    const std::vector<cudaGraphNode_t> nodes = nodes_of(graph, where);
    const size_t count = nodes.size();
    if (!count) throw std::runtime_error(where + ": captured no node; an empty body can hang older drivers");
    for (size_t i = 0; i < count; ++i) {
        const std::string here = where + ", node " + std::to_string(i) + " of " + std::to_string(count);
        switch (node_type(nodes[i], here)) {
            case CU_GRAPH_NODE_TYPE_EMPTY: break;
            case CU_GRAPH_NODE_TYPE_KERNEL: check_cooperative(nodes[i], here); break;
            case CU_GRAPH_NODE_TYPE_MEMSET: {
                cudaMemsetParams params{};
                check(cudaGraphMemsetNodeGetParams(nodes[i], &params), here + ": reading a memset");
                check_memory(params.dst, here);
                break;
            }
            case CU_GRAPH_NODE_TYPE_MEMCPY: {
                cudaMemcpy3DParms params{};
                check(cudaGraphMemcpyNodeGetParams(nodes[i], &params), here + ": reading a copy");
                if (params.srcArray || params.dstArray) refuse(here, "a copy from or to a CUDA array");
                check_memory(params.srcPtr.ptr, here);
                check_memory(params.dstPtr.ptr, here);
                break;
            }
            case CU_GRAPH_NODE_TYPE_GRAPH: {
                cudaGraph_t inner;
                check(cudaGraphChildGraphNodeGetGraph(nodes[i], &inner), here + ": opening a child graph");
                check_nodes(inner, here);
                break;
            }
            case CU_GRAPH_NODE_TYPE_HOST: refuse(here, "a host function (a Python callback, a CPU op)");
            case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
            case CU_GRAPH_NODE_TYPE_EVENT_RECORD: refuse(here, "an external event");
            case CU_GRAPH_NODE_TYPE_EXT_SEMAS_SIGNAL:
            case CU_GRAPH_NODE_TYPE_EXT_SEMAS_WAIT: refuse(here, "an external semaphore");
            case CU_GRAPH_NODE_TYPE_MEM_ALLOC:
            case CU_GRAPH_NODE_TYPE_MEM_FREE:
                refuse(here,
                       "an allocation (PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync records them; use the "
                       "native allocator)");
            case CU_GRAPH_NODE_TYPE_CONDITIONAL: refuse(here, "a cloned graph with a conditional node of its own");
            default: refuse(here, "a node of this type");
        }
    }
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                     cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
    return cudaGraphAddNode(node, graph, after, nullptr, count, params);
#else
    return cudaGraphAddNode(node, graph, after, count, params);
#endif
}

cudaError_t get_edges(cudaGraph_t graph, cudaGraphNode_t* from, cudaGraphNode_t* to, cudaGraphEdgeData* data,
                      size_t* count) {
#if CUDART_VERSION >= 13000
    return cudaGraphGetEdges(graph, from, to, data, count);
#else
    return cudaGraphGetEdges_v2(graph, from, to, data, count);
#endif
}

cudaError_t remove_edge(cudaGraph_t graph, cudaGraphNode_t from, cudaGraphNode_t to, const cudaGraphEdgeData& data) {
#if CUDART_VERSION >= 13000
    return cudaGraphRemoveDependencies(graph, &from, &to, &data, 1);
#else
    return cudaGraphRemoveDependencies_v2(graph, &from, &to, &data, 1);
#endif
}

cudaError_t add_edge(cudaGraph_t graph, cudaGraphNode_t from, cudaGraphNode_t to) {
#if CUDART_VERSION >= 13000
    return cudaGraphAddDependencies(graph, &from, &to, nullptr, 1);
#else
    return cudaGraphAddDependencies(graph, &from, &to, 1);
#endif
}

// Edges of programmatic dependent launch let a kernel begin before the one before it has ended; cuBLAS launches so on
// Hopper. No source says that they may stand in the body of a conditional node, so plain ones take their places.
void make_edges_plain(cudaGraph_t graph, const std::string& where) {
    size_t count = 0;
    check(get_edges(graph, nullptr, nullptr, nullptr, &count), where + ": counting edges");
    std::vector<cudaGraphNode_t> from(count), to(count);
    std::vector<cudaGraphEdgeData> data(count);
    if (count) check(get_edges(graph, from.data(), to.data(), data.data(), &count), where + ": listing edges");
    for (size_t i = 0; i < count; ++i) {
        if (!data[i].type && !data[i].from_port && !data[i].to_port) continue;
        check(remove_edge(graph, from[i], to[i], data[i]), where + ": removing an edge that lets kernels overlap");
        check(add_edge(graph, from[i], to[i]), where + ": adding a plain edge in its place");
    }
    for (cudaGraphNode_t node : nodes_of(graph, where)) {
        if (node_type(node, where) != CU_GRAPH_NODE_TYPE_GRAPH) continue;
        cudaGraph_t inner;
        check(cudaGraphChildGraphNodeGetGraph(node, &inner), where + ": opening a child graph");
        make_edges_plain(inner, where);
    }
}

const char* reason(cudaGraphInstantiateResult result) {
    switch (result) {
        case cudaGraphInstantiateInvalidStructure: return "invalid structure";
        case cudaGraphInstantiateNodeOperationNotSupported: return "node not supported";
        case cudaGraphInstantiateMultipleDevicesNotSupported: return "nodes on several devices or contexts";
#if CUDART_VERSION >= 12080
        case cudaGraphInstantiateConditionalHandleUnused: return "a condition that no node uses";
#endif
        default: return "error";
    }
}

}  // namespace

GatedGraph::GatedGraph(int device) : device_(device) {
    OnDevice guard(device_);
    check(cudaGraphCreate(&root_, 0), "creating a graph");
    chains_.push_back({root_});
}

GatedGraph::~GatedGraph() {
    if (executable_) cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(root_);
}

uint64_t GatedGraph::condition(bool initially) {
    OnDevice guard(device_);
    cudaGraphConditionalHandle handle;
    check(cudaGraphConditionalHandleCreate(&handle, root_, initially, initially ? cudaGraphCondAssignDefault : 0),
          "creating a condition");
    return handle;
}

GatedGraph::Chain& GatedGraph::chain(int graph) {
    if (executable_) throw std::logic_error("the graph has been instantiated and takes no more nodes");
    return chains_.at(graph);
}

void GatedGraph::append(Chain& chain, cudaGraphNode_t node, const std::string& name) {
    chain.last = node;
    names_[node] = name;
}

void GatedGraph::fill(int graph, void* data, int byte, size_t bytes, const std::string& name) {
    OnDevice guard(device_);
    Chain& c = chain(graph);
    cudaMemsetParams params{};
    params.dst = data;
    params.value = byte;
    params.elementSize = 1;
    params.width = bytes;
    params.height = 1;
    cudaGraphNode_t node;
    check(cudaGraphAddMemsetNode(&node, c.graph, &c.last, c.last != nullptr, &params), name);
    append(c, node, name);
}

void GatedGraph::decide(int graph, const DecisionMemory& memory, int first, int last, DecisionRule rule,
                        const std::string& name) {
    OnDevice guard(device_);
    Chain& c = chain(graph);
    append(c, add_decide(c.graph, &c.last, c.last != nullptr, memory, first, last, rule), name);
}

void GatedGraph::change(int graph, const Change& change, const std::string& name) {
    OnDevice guard(device_);
    Chain& c = chain(graph);
    append(c, add_change(c.graph, &c.last, c.last != nullptr, change), name);
}

void GatedGraph::child(int graph, uintptr_t captured, const std::string& name) {
    OnDevice guard(device_);
    Chain& c = chain(graph);
    auto source = reinterpret_cast<cudaGraph_t>(captured);
    check_nodes(source, name);
    cudaGraphNode_t node;
    check(cudaGraphAddChildGraphNode(&node, c.graph, &c.last, c.last != nullptr, source), name + ": cloning its graph");
    cudaGraph_t clone;  // what is changed in it is changed in the node
    check(cudaGraphChildGraphNodeGetGraph(node, &clone), name + ": opening its clone");
    make_edges_plain(clone, name);
    append(c, node, name);
}

int GatedGraph::conditional(int graph, uint64_t condition, bool loop, const std::string& name) {
    OnDevice guard(device_);
    Chain& c = chain(graph);
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = condition;
    params.conditional.type = loop ? cudaGraphCondTypeWhile : cudaGraphCondTypeIf;
    params.conditional.size = 1;
    cudaGraphNode_t node;
    check(add_node(&node, c.graph, &c.last, c.last != nullptr, &params), name + ": adding the conditional node");
    append(c, node, name);
    chains_.push_back({params.conditional.phGraph_out[0]});
    return int(chains_.size()) - 1;
}

void GatedGraph::instantiate(uintptr_t stream) {
    OnDevice guard(device_);
    chain(0);
    cudaGraphInstantiateParams params{};
    params.flags = cudaGraphInstantiateFlagUpload;
    params.uploadStream = reinterpret_cast<cudaStream_t>(stream);
    cudaError_t error = cudaGraphInstantiateWithParams(&executable_, root_, &params);
    if (error == cudaSuccess && params.result_out == cudaGraphInstantiateSuccess) return;
    executable_ = nullptr;
    auto named = names_.find(params.errNode_out);
    std::string where = named != names_.end() ? named->second
                        : params.errNode_out  ? "a node in a child"
                                              : "no node named";
    std::string what = std::string("instantiating the graph: ") + reason(params.result_out) + " at " + where +
                       " (CUDA_LOG_FILE=stderr says more)";
    check(error, what);
    throw std::runtime_error(what);
}

void GatedGraph::launch(uintptr_t stream) {
    if (!executable_) throw std::logic_error("the graph has not been instantiated");
    OnDevice guard(device_);
    check(cudaGraphLaunch(executable_, reinterpret_cast<cudaStream_t>(stream)), "launching the graph");
}

}  // namespace harmonica
