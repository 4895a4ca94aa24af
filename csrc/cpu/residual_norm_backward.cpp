// Backward of residual_norm: one pass over the rows, then a small one that adds up the jobs' sums over tokens.
//
// G is the whole gradient of x', the part through h included. dx = G, and for each term do = gate·G, dgate = Σ G·o,
// dfresh = r·do, dlatest = (1 - r)(1 + e)·do, dr = Σ do·(fresh - reuse), de = (1 - r)·Σ do·(latest - previous).
#include "parallel.h"
#include "run.h"

namespace harmonica {
namespace {

constexpr int64_t kWorthThreads = 32 * 1024;  // threads pay from this many values in all arguments together
constexpr int64_t kJobTokens = 32;            // tokens a job: fixed, so that no sum depends on the number of threads

// The wanted modulation gradients and each job's partial sums of them, [jobs, wanted, D].
template <class A>
class TokenSums {
  public:
    TokenSums(const Gradients& gradients, int64_t jobs, int64_t width) : width_(width) {
        shift = want(gradients.shift);
        scale = want(gradients.scale);
        for (const Rows& rows : gradients.gate) gate.push_back(want(rows));
        sums_.resize(jobs * wanted_.size() * width);
    }

    // A job's sum; nullptr if it is not wanted (index -1).
    A* of(int64_t job, int index) {
        return index < 0 ? nullptr : &sums_[(job * int64_t(wanted_.size()) + index) * width_];
    }

    // Adds up the jobs' sums: a gradient [B, D] gets those of each batch entry, a gradient [1, D] all of them.
    void write(const RowOps<A>& ops, Shape shape, int64_t batch_jobs, int threads) {
        const int64_t outputs = int64_t(wanted_.size()) * shape.batch;
        if (outputs * batch_jobs * width_ < kWorthThreads) threads = 1;
        Queue queue(outputs);
        std::vector<A> scratch(threads * width_);
        parallel(threads, [&](int worker) {
            A* total = &scratch[worker * width_];
            for (int64_t output; (output = queue.next()) >= 0;) {
                const int index = int(output / shape.batch);
                const int64_t b = output % shape.batch;
                const Rows& rows = wanted_[index];
                if (rows.stride == 0 && b > 0) continue;
                const int64_t begin = b * batch_jobs, count = (rows.stride == 0 ? shape.batch : 1) * batch_jobs;
                std::fill_n(total, width_, A(0));
                for (int64_t job = begin; job < begin + count; ++job)
                    for (int64_t d = 0; d < width_; ++d) total[d] += of(job, index)[d];
                const StorageOps<A>& io = ops.storage[int(rows.dtype)];
                io.write(total, {}, nullptr, nullptr, static_cast<char*>(rows.data) + b * rows.stride * io.size,
                         width_);
            }
        });
    }

    int shift, scale;
    std::vector<int> gate;

  private:
    int want(const Rows& rows) {
        if (!rows.data) return -1;
        wanted_.push_back(rows);
        return int(wanted_.size()) - 1;
    }

    const int64_t width_;
    std::vector<Rows> wanted_;
    std::vector<A> sums_;
};

template <class A>
ScalarGradients backward(Shape shape, Activation dx_out_, Activation dh_, Activation x_out_,
                         const std::vector<Term>& run, const Blend& blend, const Norm& norm, const Gradients& gradients,
                         bool scalars, int threads) {
    const RowOps<A>& ops = row_ops<A>();
    const RowIO<A> dx_out(ops, dx_out_, shape), dh(ops, dh_, shape), x_out(ops, x_out_, shape);
    const RowIO<A> dx(ops, gradients.x, shape), dfresh(ops, gradients.fresh, shape);
    std::vector<RowIO<A>> dlatest;
    for (const Activation& a : gradients.latest) dlatest.emplace_back(ops, a, shape);

    const int64_t width = shape.width, batch_jobs = (shape.tokens + kJobTokens - 1) / kJobTokens;
    const int64_t count = shape.batch * batch_jobs, terms = int64_t(run.size());
    if (shape.batch * shape.tokens * width * (terms + 3) < kWorthThreads) threads = 1;
    TokenSums<A> sums(gradients, count, width);
    std::vector<double> scalar_sums(scalars ? count * (terms + 1) : 0);
    std::vector<Run<A>> runs(threads, Run<A>(ops, shape, run, blend, norm));
    std::vector<A> scratch(threads * 4 * width);
    Queue jobs(count);

    parallel(threads, [&](int worker) {
        Run<A>& in = runs[worker];
        A *g = &scratch[worker * 4 * width], *x = g + width, *o = x + width, *d_o = o + width;

        for (int64_t job; (job = jobs.next()) >= 0;) {
            const int64_t b = job / batch_jobs, first = job % batch_jobs * kJobTokens;
            const int64_t last = std::min(first + kJobTokens, shape.tokens);
            in.enter(b);
            for (int64_t row = b * shape.tokens + first; row < b * shape.tokens + last; ++row) {
                if (dx_out)
                    dx_out.read(row, g);
                else
                    std::fill_n(g, width, A(0));
                if (dh) {
                    x_out.read(row, x);
                    dh.read(row, o);
                    const Moments<A> moments = norm.norm ? ops.moments(x, A(norm.eps), width) : Moments<A>{};
                    ops.norm_backward(x, moments, norm.norm, o, in.scale, g, sums.of(job, sums.shift),
                                      sums.of(job, sums.scale), width);
                }
                if (dx) dx.write(g, row);

                for (int64_t j = 0; j < terms; ++j) {
                    const bool blended = j == 0 && in.fresh;
                    const A e = A(run[j].e), reused = blended ? 1 - in.r : A(1);
                    if (A* dgate = sums.of(job, sums.gate[j])) {
                        in.output(j, row, o);
                        ops.multiply_add(g, o, dgate, width);
                    }
                    const A* d = g;
                    if (in.gate[j]) {
                        ops.multiply(g, in.gate[j], d_o, width);
                        d = d_o;
                    }
                    if (dlatest[j]) dlatest[j].write(d, row, {A(0), reused * (1 + e)});
                    if (blended && dfresh) dfresh.write(d, row, {A(0), in.r});
                    if (!scalars) continue;
                    double* scalar = &scalar_sums[job * (terms + 1)];
                    if (blended) {
                        in.fresh.read(row, o);
                        in.add_reuse(j, row, A(-1), nullptr, o);
                        scalar[0] += double(ops.dot(d, o, width));
                    }
                    if (in.previous[j]) {
                        in.latest[j].read(row, o);
                        in.previous[j].add(row, A(-1), nullptr, o);
                        scalar[1 + j] += double(reused) * double(ops.dot(d, o, width));
                    }
                }
            }
        }
    });

    sums.write(ops, shape, batch_jobs, threads);
    ScalarGradients result{0, std::vector<double>(run.size())};
    for (size_t i = 0; i < scalar_sums.size(); ++i) {
        const int64_t j = int64_t(i) % (terms + 1);
        (j == 0 ? result.r : result.e[j - 1]) += scalar_sums[i];
    }
    return result;
}

}  // namespace

ScalarGradients residual_norm_backward(Shape shape, Activation dx_out, Activation dh, Activation x_out,
                                       const std::vector<Term>& run, const Blend& blend, const Norm& norm,
                                       const Gradients& gradients, bool scalars, int threads) {
    auto compute = x_out.dtype == DType::f64 ? backward<double> : backward<float>;
    return compute(shape, dx_out, dh, x_out, run, blend, norm, gradients, scalars, threads);
}

}  // namespace harmonica
