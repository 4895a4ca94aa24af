// Passes arguments from the Python ops to the kernels; only TensorHandles look at tensors themselves. To the kernels they
// arrive as tuples or None: activations as (pointer, dtype, batch stride, token stride), modulation as (pointer, dtype, stride).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"
#include "torch_tensors.h"
#ifdef HARMONICA_CUDA
#include "cuda/graph.h"
#endif

namespace py = pybind11;
using namespace harmonica;

namespace {

using ActivationTuple = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t>>;
using RowsTuple = std::optional<std::tuple<uintptr_t, int, int64_t>>;
using TermTuple = std::tuple<ActivationTuple, ActivationTuple, double, RowsTuple>;  // latest, previous, e, gate
using NormTuple = std::tuple<RowsTuple, RowsTuple, bool, double>;                   // shift, scale, norm, eps
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;

Activation activation(const ActivationTuple& a) {
    if (!a) return {};
    const auto& [data, dtype, batch_stride, token_stride] = *a;
    return {reinterpret_cast<void*>(data), DType(dtype), batch_stride, token_stride};
}

Rows rows(const RowsTuple& r) {
    if (!r) return {};
    const auto& [data, dtype, stride] = *r;
    return {reinterpret_cast<void*>(data), DType(dtype), stride};
}

std::vector<Term> run(const std::vector<TermTuple>& terms) {
    std::vector<Term> run;
    for (const auto& [latest, previous, e, gate] : terms)
        run.push_back({activation(latest), activation(previous), e, rows(gate)});
    return run;
}

Norm norm(const NormTuple& n) {
    const auto& [shift, scale, norm, eps] = n;
    return {rows(shift), rows(scale), norm, eps};
}

Shape shape(const ShapeTuple& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

void py_residual_norm(const ShapeTuple& s, const ActivationTuple& x, const ActivationTuple& x_out,
                      const ActivationTuple& h, const ActivationTuple& first, const std::vector<TermTuple>& terms,
                      const ActivationTuple& fresh, double r, const NormTuple& n, int threads) {
    py::gil_scoped_release release;
    residual_norm(shape(s), activation(x), activation(x_out), activation(h), activation(first), run(terms),
                  {activation(fresh), r}, norm(n), threads);
}

void py_bias_gelu(const ShapeTuple& s, const ActivationTuple& x, const RowsTuple& bias, int threads) {
    py::gil_scoped_release release;
    bias_gelu(shape(s), activation(x), rows(bias), threads);
}

std::pair<double, std::vector<double>> py_residual_norm_backward(
    const ShapeTuple& s, const ActivationTuple& dx_out, const ActivationTuple& dh, const ActivationTuple& x_out,
    const std::vector<TermTuple>& terms, const ActivationTuple& fresh, double r, const NormTuple& n,
    const ActivationTuple& dx, const ActivationTuple& dfresh, const std::vector<ActivationTuple>& dlatest,
    const RowsTuple& dshift, const RowsTuple& dscale, const std::vector<RowsTuple>& dgate, bool scalars, int threads) {
    Gradients gradients{activation(dx), activation(dfresh), {}, rows(dshift), rows(dscale), {}};
    for (const ActivationTuple& a : dlatest) gradients.latest.push_back(activation(a));
    for (const RowsTuple& g : dgate) gradients.gate.push_back(rows(g));
    py::gil_scoped_release release;
    ScalarGradients result =
        residual_norm_backward(shape(s), activation(dx_out), activation(dh), activation(x_out), run(terms),
                               {activation(fresh), r}, norm(n), gradients, scalars, threads);
    return {result.r, std::move(result.e)};
}

// The keys are the names in kernels.h, the values addresses and sizes.
DecisionMemory decision_memory(const std::map<std::string, uintptr_t>& named) {
    auto in = [&](const char* name, auto*& pointer) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(named.at(name));
    };
    DecisionMemory m{};
    m.steps = int32_t(named.at("steps")), m.branches = int32_t(named.at("branches"));
    m.history = int32_t(named.at("history")), m.parts = int32_t(named.at("parts"));
    in("scores", m.scores), in("extrapolation", m.extrapolation), in("threshold", m.threshold);
    in("conditions", m.conditions), in("change", m.change), in("step", m.step), in("again", m.again);
    in("compute", m.compute), in("start", m.start), in("slot", m.slot), in("latest_at", m.latest_at);
    in("previous_at", m.previous_at), in("forecast_weights", m.forecast_weights);
    in("reference", m.reference), in("reused", m.reused);
    return m;
}

DecisionRule decision_rule(const std::string& rule) {
    return rule == "scores" ? DecisionRule::scores : rule == "change" ? DecisionRule::change : DecisionRule::always;
}

// functions: their addresses, in the order of TorchFunctions. capsules: from PyTorch's unsafe_alloc_void_ptrs_from_tensors.
std::unique_ptr<TensorHandles> tensor_handles(const std::array<uintptr_t, 3>& functions,
                                              const std::vector<py::capsule>& capsules) {
    TorchFunctions torch;
    torch.get_data_ptr = reinterpret_cast<decltype(torch.get_data_ptr)>(functions[0]);
    torch.get_dtype = reinterpret_cast<decltype(torch.get_dtype)>(functions[1]);
    torch.delete_tensor_object = reinterpret_cast<decltype(torch.delete_tensor_object)>(functions[2]);
    std::vector<void*> handles;
    for (const py::capsule& capsule : capsules) handles.push_back(capsule.get_pointer<void>());
    return std::make_unique<TensorHandles>(torch, std::move(handles));
}

py::dict py_cuda_build() {
    CudaBuild build = cuda_build();
    py::dict facts;
    facts["runtime"] = build.runtime, facts["architectures"] = build.architectures, facts["driver"] = build.driver;
    facts["needed"] = build.needed, facts["devices"] = build.devices, facts["error"] = build.error;
    return facts;
}

#ifdef HARMONICA_CUDA
void bind_graph(py::module_& m) {
    py::class_<GatedGraph>(m, "GatedGraph")
        .def(py::init<int>())
        .def("condition", &GatedGraph::condition)
        .def("fill", [](GatedGraph& g, int graph, uintptr_t data, int byte, size_t bytes,
                        const std::string& name) { g.fill(graph, reinterpret_cast<void*>(data), byte, bytes, name); })
        .def("decide",
             [](GatedGraph& g, int graph, const std::map<std::string, uintptr_t>& memory, int first, int last,
                const std::string& rule, const std::string& name) {
                 g.decide(graph, decision_memory(memory), first, last, decision_rule(rule), name);
             })
        .def("change",
             [](GatedGraph& g, int graph, uintptr_t o, uintptr_t reference, int dtype, int64_t values, uintptr_t sums,
                int parts, uintptr_t which, const std::string& name) {
                 g.change(graph,
                          {reinterpret_cast<void*>(o), reinterpret_cast<void*>(reference), DType(dtype), values,
                           reinterpret_cast<double*>(sums), parts, reinterpret_cast<int32_t*>(which)},
                          name);
             })
        .def("child", &GatedGraph::child)
        .def("conditional", &GatedGraph::conditional)
        .def("instantiate", &GatedGraph::instantiate, py::call_guard<py::gil_scoped_release>())
        .def("launch", &GatedGraph::launch, py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled kernels; csrc/kernels.h has their contracts.";
    m.def("residual_norm", &py_residual_norm);
    m.def("residual_norm_backward", &py_residual_norm_backward);
    m.def("bias_gelu", &py_bias_gelu);
    m.def("decide", [](const std::map<std::string, uintptr_t>& memory, int first, int last, const std::string& rule) {
        decide(decision_memory(memory), first, last, decision_rule(rule));
    });
    py::class_<TensorHandles>(m, "TensorHandles")
        .def(py::init(&tensor_handles))
        .def("places", [](const TensorHandles& handles) {  // bytes that are equal if addresses and dtypes are
            std::vector<TensorHandles::Place> found = handles.places();
            return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(found[0]));
        });
    m.def("cuda_build", &py_cuda_build);
#ifdef HARMONICA_CUDA
    bind_graph(m);
#endif
    m.def("available_isas", &available_isas);
    m.def("isa", &isa);
    m.def("set_isa", &set_isa);
    m.def("threading", &threading);
    isa();  // raises on an unknown HARMONICA_CPU at import, not in the first kernel
}
