// Shared by the forward and the backward kernel: rows of activations and of modulations, and a run's outputs.
#pragma once

#include <algorithm>
#include <vector>

#include "row.h"

namespace harmonica {

// Reads and writes the rows [B·N, D] of an activation, converting between its storage type and accumulators.
template <class A>
class RowIO {
  public:
    RowIO() = default;
    RowIO(const RowOps<A>& ops, Activation a, Shape shape) : a_(a), shape_(shape) {
        if (a.data) ops_ = ops.storage[int(a.dtype)];
    }
    explicit operator bool() const { return a_.data; }

    // to = factor·row
    void read(int64_t row, A* to, A factor = 1) const {
        ops_.read(at(row), next(row), true, nullptr, factor, to, shape_.width);
    }
    // to += factor·gate·row
    void add(int64_t row, A factor, const A* gate, A* to) const {
        ops_.read(at(row), next(row), false, gate, factor, to, shape_.width);
    }
    // row = (from - mean)·rstd·(1 + scale) + shift
    void write(const A* from, int64_t row, Moments<A> moments = {}, const A* scale = nullptr,
               const A* shift = nullptr) const {
        ops_.write(from, moments, scale, shift, at(row), shape_.width);
    }

    // row = GELU(row + bias)
    void bias_gelu(int64_t row, const A* bias) const { ops_.bias_gelu(at(row), bias, shape_.width); }

  private:
    void* at(int64_t row) const {
        const int64_t b = row / shape_.tokens, n = row % shape_.tokens;
        return static_cast<char*>(a_.data) + (b * a_.batch_stride + n * a_.token_stride) * ops_.size;
    }
    const void* next(int64_t row) const { return row + 1 < shape_.batch * shape_.tokens ? at(row + 1) : nullptr; }

    Activation a_;
    Shape shape_{};
    StorageOps<A> ops_{};
};

// A modulation row as accumulators: the row itself if it is stored as A, else converted into `buffer`.
template <class A>
const A* modulation_row(const RowOps<A>& ops, const Rows& rows, int64_t b, int64_t width, A* buffer) {
    if (!rows.data) return nullptr;
    const StorageOps<A>& io = ops.storage[int(rows.dtype)];
    const void* row = static_cast<const char*>(rows.data) + b * rows.stride * io.size;
    if (io.size == sizeof(A)) return static_cast<const A*>(row);
    io.read(row, nullptr, true, nullptr, A(1), buffer, width);
    return buffer;
}

// A run, and the modulation rows of one batch entry at a time. Every worker has its own.
template <class A>
class Run {
  public:
    Run(const RowOps<A>& ops, Shape shape, const std::vector<Term>& run, const Blend& blend, const Norm& norm)
        : fresh(ops, blend.fresh, shape),
          r(A(blend.r)),
          gate(run.size()),
          ops_(ops),
          shape_(shape),
          run_(run),
          norm_(norm),
          buffers_((run.size() + 2) * shape.width) {
        for (const Term& term : run) {
            latest.emplace_back(ops, term.latest, shape);
            previous.emplace_back(ops, term.previous, shape);
        }
    }

    const RowIO<A> fresh;
    const A r;
    std::vector<RowIO<A>> latest, previous;
    // Rows of the batch entry that `enter` was last called with; nullptr if there is none.
    std::vector<const A*> gate;
    const A *shift = nullptr, *scale = nullptr;

    void enter(int64_t b) {
        if (b == b_) return;
        b_ = b;
        A* buffer = buffers_.data();
        auto row = [&](const Rows& rows) {
            buffer += shape_.width;
            return modulation_row(ops_, rows, b, shape_.width, buffer - shape_.width);
        };
        for (size_t j = 0; j < run_.size(); ++j) gate[j] = row(run_[j].gate);
        shift = row(norm_.shift);
        scale = row(norm_.scale);
    }

    // to += factor·gate·((1 + e)·latest - e·previous) of term j
    void add_reuse(size_t j, int64_t row, A factor, const A* gate, A* to) const {
        const A e = A(run_[j].e);
        latest[j].add(row, factor * (1 + e), gate, to);
        if (e != 0) previous[j].add(row, -factor * e, gate, to);
    }

    // to = o of term j; the first term's is blended if there is a fresh output
    void output(size_t j, int64_t row, A* to) const {
        const bool blended = j == 0 && fresh;
        if (blended)
            fresh.read(row, to, r);
        else
            std::fill_n(to, shape_.width, A(0));
        add_reuse(j, row, blended ? 1 - r : A(1), nullptr, to);
    }

  private:
    const RowOps<A>& ops_;
    const Shape shape_;
    const std::vector<Term>& run_;
    const Norm& norm_;
    int64_t b_ = -1;
    std::vector<A> buffers_;
};

}  // namespace harmonica
