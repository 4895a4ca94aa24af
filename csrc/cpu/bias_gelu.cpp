// A feed-forward's bias and GELU: one pass, in place, in the tanh form.
#include "parallel.h"
#include "run.h"

namespace harmonica {
namespace {

constexpr int64_t kWorthThreads = 16 * 1024;  // threads pay from this many values
constexpr int64_t kJobValues = 64 * 1024;     // values a job

template <class A>
void pass(Shape shape, Activation x_, Rows bias_, int threads) {
    const RowOps<A>& ops = row_ops<A>();
    const RowIO<A> x(ops, x_, shape);
    std::vector<A> buffer(shape.width);
    const A* bias = modulation_row(ops, bias_, 0, shape.width, buffer.data());

    const int64_t rows = shape.batch * shape.tokens, job_rows = std::max<int64_t>(1, kJobValues / shape.width);
    if (rows * shape.width < kWorthThreads) threads = 1;
    Queue jobs((rows + job_rows - 1) / job_rows);
    parallel(threads, [&](int) {
        for (int64_t job; (job = jobs.next()) >= 0;)
            for (int64_t row = job * job_rows; row < std::min(rows, (job + 1) * job_rows); ++row)
                x.bias_gelu(row, bias);
    });
}

}  // namespace

void bias_gelu(Shape shape, Activation x, Rows bias, int threads) {
    (x.dtype == DType::f64 ? pass<double> : pass<float>)(shape, x, bias, threads);
}

}  // namespace harmonica
