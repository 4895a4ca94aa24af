// Accumulate, normalise, modulate: one pass, row by row. A row is summed up in a buffer that stays in the L1 cache, so
// each argument crosses the memory bus once, whatever the length of the run.
#include "overlap.h"
#include "parallel.h"
#include "run.h"

namespace harmonica {
namespace {

constexpr int64_t kWorthThreads = 32 * 1024;  // threads pay from this many values in all arguments together
constexpr int64_t kJobValues = 128 * 1024;    // values a job: small enough to divide the work evenly

template <class A>
void forward(Shape shape, Activation x_, Activation x_out_, Activation h_, Activation first_,
             const std::vector<Term>& run, const Blend& blend, const Norm& norm, int threads) {
    const RowOps<A>& ops = row_ops<A>();
    const RowIO<A> x(ops, x_, shape), x_out(ops, x_out_, shape), h(ops, h_, shape), first(ops, first_, shape);
    const StorageOps<A>& accumulators = ops.storage[int(sizeof(A) == sizeof(double) ? DType::f64 : DType::f32)];

    const int64_t rows = shape.batch * shape.tokens, row_values = shape.width * int64_t(run.size() + 3);
    const int64_t job_rows = std::max<int64_t>(1, kJobValues / row_values);
    if (rows * row_values < kWorthThreads) threads = 1;
    Queue jobs((rows + job_rows - 1) / job_rows);

    std::vector<Run<A>> runs(threads, Run<A>(ops, shape, run, blend, norm));
    std::vector<A> scratch(threads * 2 * shape.width);

    parallel(threads, [&](int worker) {
        Run<A>& terms = runs[worker];
        A *sum = &scratch[worker * 2 * shape.width], *o = sum + shape.width;
        for (int64_t job; (job = jobs.next()) >= 0;) {
            for (int64_t row = job * job_rows; row < std::min(rows, (job + 1) * job_rows); ++row) {
                terms.enter(row / shape.tokens);
                x.read(row, sum);
                for (size_t j = 0; j < run.size(); ++j) {
                    if (j == 0 && (first || terms.fresh)) {
                        terms.output(j, row, o);
                        if (first) first.write(o, row);
                        accumulators.read(o, nullptr, false, terms.gate[j], A(1), sum, shape.width);
                    } else {
                        terms.add_reuse(j, row, A(1), terms.gate[j], sum);
                    }
                }
                if (x_out) x_out.write(sum, row);
                if (h) {
                    const Moments<A> moments = norm.norm ? ops.moments(sum, A(norm.eps), shape.width) : Moments<A>{};
                    h.write(sum, row, moments, terms.scale, terms.shift);
                }
            }
        }
    });
}

}  // namespace

void residual_norm(Shape shape, Activation x, Activation x_out, Activation h, Activation first,
                   const std::vector<Term>& run, const Blend& blend, const Norm& norm, int threads) {
    refuse_overlap("residual_norm", shape, {{"x_out", x_out}, {"h", h}, {"store", first}}, x, run, blend, norm);
    auto compute = x.dtype == DType::f64 ? forward<double> : forward<float>;
    compute(shape, x, x_out, h, first, run, blend, norm, threads);
}

}  // namespace harmonica
