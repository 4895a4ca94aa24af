// Calls each kernel once for a shape, for bench/instructions.py: `instructions B N D`, under callgrind, which is told the
// name of each call after it. The row primitives are those of HARMONICA_ISA, whatever the processor has beyond it.
#include <valgrind/callgrind.h>

#include <cstdlib>
#include <vector>

#include "cpu/row.h"

namespace harmonica {
namespace HARMONICA_ISA {
extern const RowOps<float> float_ops;
extern const RowOps<double> double_ops;
}  // namespace HARMONICA_ISA
template <>
const RowOps<float>& row_ops<float>() {
    return HARMONICA_ISA::float_ops;
}
template <>
const RowOps<double>& row_ops<double>() {
    return HARMONICA_ISA::double_ops;
}
}  // namespace harmonica

using namespace harmonica;

namespace {

// Tensors of ones in one storage type.
struct Tensors {
    Shape shape;
    DType dtype;
    std::vector<std::vector<char>> memory;

    void* make(int64_t values) {
        const uint32_t one = 0x3f800000;  // its upper half is bfloat16's
        const size_t size = dtype == DType::f32 ? 4 : 2;
        memory.emplace_back(values * size);
        for (int64_t i = 0; i < values; ++i)
            for (size_t byte = 0; byte < size; ++byte)
                memory.back()[i * size + byte] = char(one >> 8 * (byte + 4 - size));
        return memory.back().data();
    }
    Activation activation() {
        return {make(shape.batch * shape.tokens * shape.width), dtype, shape.tokens * shape.width, shape.width};
    }
    Rows rows() { return {make(shape.batch * shape.width), dtype, shape.width}; }
};

void forward(Shape shape, DType dtype, int terms, const char* name) {
    Tensors t{shape, dtype, {}};
    std::vector<Term> run;
    for (int j = 0; j < terms; ++j) run.push_back({t.activation(), {}, 0, t.rows()});
    const Activation x = t.activation(), h = t.activation();
    const Norm norm{t.rows(), t.rows(), true, 1e-6};
    CALLGRIND_ZERO_STATS;
    residual_norm(shape, x, x, h, {}, run, {}, norm, 1);
    CALLGRIND_DUMP_STATS_AT(name);
}

void backward(Shape shape, const char* name) {  // of one blended term, with all gradients
    Tensors t{shape, DType::f32, {}};
    const std::vector<Term> run{{t.activation(), {}, 0, t.rows()}};
    const Blend blend{t.activation(), 0.5};
    const Norm norm{t.rows(), t.rows(), true, 1e-6};
    const Activation dx_out = t.activation(), dh = t.activation(), x_out = t.activation();
    const Gradients gradients{t.activation(), t.activation(), {t.activation()}, t.rows(), t.rows(), {t.rows()}};
    CALLGRIND_ZERO_STATS;
    residual_norm_backward(shape, dx_out, dh, x_out, run, blend, norm, gradients, true, 1);
    CALLGRIND_DUMP_STATS_AT(name);
}

void gelu(Shape shape, DType dtype, const char* name) {
    Tensors t{shape, dtype, {}};
    const Activation x = t.activation();
    const Rows bias{t.make(shape.width), dtype, 0};
    CALLGRIND_ZERO_STATS;
    bias_gelu(shape, x, bias, 1);
    CALLGRIND_DUMP_STATS_AT(name);
}

}  // namespace

int main(int count, char** sizes) {
    if (count != 4) return 2;
    const Shape shape{std::atoll(sizes[1]), std::atoll(sizes[2]), std::atoll(sizes[3])};
    forward(shape, DType::f32, 1, "residual_norm, float32, R=1");
    forward(shape, DType::f32, 4, "residual_norm, float32, R=4");
    forward(shape, DType::bf16, 1, "residual_norm, bfloat16, R=1");
    backward(shape, "residual_norm_backward, float32, R=1");
    gelu(shape, DType::f32, "bias_gelu, float32");
    gelu(shape, DType::bf16, "bias_gelu, bfloat16");
}
