// Argument passing between the Python ops and the kernels, nothing else. Tensors arrive as tuples or None:
// activations as (pointer, dtype, batch stride, token stride), modulation as (pointer, dtype, stride).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "kernels.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled kernels; csrc/kernels.h has their contracts.";
    m.def("residual_norm", &py_residual_norm);
    m.def("residual_norm_backward", &py_residual_norm_backward);
    m.def("available_isas", &available_isas);
    m.def("isa", &isa);
    m.def("set_isa", &set_isa);
    m.def("threading", &threading);
    isa();  // an unknown HARMONICA_CPU is an error at import, not in the first kernel
}
