// The kernels' primitives on one row of D values. A row under work lies in a buffer of accumulators A (float, or double
// if the storage is f64) that stays in the L1 cache. Only read and write know the storage type.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace harmonica {

template <class A>
struct Moments {
    A mean = 0, rstd = 1;
};

// The passes of one storage type.
template <class A>
struct StorageOps {
    int size;  // bytes of an element

    // set: row = factor·src; else row += factor·gate·src (gate == nullptr: 1). next: the row to be read after this one,
    // or nullptr. It is prefetched, since hardware prefetchers lose track of many short streams.
    void (*read)(const void* src, const void* next, bool set, const A* gate, A factor, A* row, int64_t n);

    // dst = (row - mean)·rstd·(1 + scale) + shift; scale or shift == nullptr: 0
    void (*write)(const A* row, Moments<A> moments, const A* scale, const A* shift, void* dst, int64_t n);

    // x = GELU(x + bias) in its tanh form
    void (*bias_gelu)(void* x, const A* bias, int64_t n);
};

template <class A>
struct RowOps {
    StorageOps<A> storage[4];  // by DType; empty for the types that do not go with A

    // Two passes. The second takes the variance about the first one's mean and corrects that mean's rounding error.
    Moments<A> (*moments)(const A* row, A eps, int64_t n);

    // out = a·b
    void (*multiply)(const A* a, const A* b, A* out, int64_t n);

    // sum += a·b
    void (*multiply_add)(const A* a, const A* b, A* sum, int64_t n);

    // Σ a·b
    A (*dot)(const A* a, const A* b, int64_t n);

    // dx += gradient of (x - mean)·rstd·(1 + scale) + shift; dshift += dh; dscale += dh·(x - mean)·rstd (those that are
    // not nullptr). norm == false: mean and rstd are constants.
    void (*norm_backward)(const A* x, Moments<A> moments, bool norm, const A* dh, const A* scale, A* dx, A* dshift,
                          A* dscale, int64_t n);
};

// The primitives of the instruction set in use.
template <class A>
const RowOps<A>& row_ops();

}  // namespace harmonica
