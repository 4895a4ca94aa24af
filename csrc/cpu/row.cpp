// The row primitives. This file is compiled once for each instruction set, with HARMONICA_ISA its name. It exports only
// the two tables at its end, so that code for a newer processor is never linked into the path of an older one.
#include "row.h"

#include "vec.h"

namespace harmonica {
namespace {

template <class A, class T>
void read(const void* src, const void* next, bool set, const A* gate, A factor, A* row, int64_t n) {
    const T* from = static_cast<const T*>(src);
    const T* ahead = static_cast<const T*>(next ? next : src);  // to prefetch the row that is read now costs nothing
    if (set) {
        sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
            using V = typename decltype(lane)::type;
            __builtin_prefetch(ahead + i);
            store(row + i, factor * load<V>(from + i));
        });
    } else if (gate) {
        sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
            using V = typename decltype(lane)::type;
            __builtin_prefetch(ahead + i);
            store(row + i, load<V>(row + i) + factor * load<V>(gate + i) * load<V>(from + i));
        });
    } else {
        sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
            using V = typename decltype(lane)::type;
            __builtin_prefetch(ahead + i);
            store(row + i, load<V>(row + i) + factor * load<V>(from + i));
        });
    }
}

template <class A, class T>
void write(const A* row, Moments<A> moments, const A* scale, const A* shift, void* dst, int64_t n) {
    T* to = static_cast<T*>(dst);
    sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        V value = (load<V>(row + i) - moments.mean) * moments.rstd;
        if (scale) value += value * load<V>(scale + i);
        if (shift) value += load<V>(shift + i);
        store(to + i, value);
    });
}

// With u = √(2/π)·(v + 0.044715·v³) the tanh form v/2·(1 + tanh u) is v/(1 + exp(-2u)), which cancels nowhere.
template <class A, class T>
void bias_gelu(void* x, const A* bias, int64_t n) {
    constexpr A factor = A(-2 * 0.79788456080286535588 * 1.44269504088896340736);  // -2·√(2/π)/ln 2
    T* to = static_cast<T*>(x);
    sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        V v = load<V>(to + i) + load<V>(bias + i);
        V z = factor * v + factor * A(0.044715) * v * v * v;
        store(to + i, v / (A(1) + power_of_two(z)));
    });
}

template <class A>
Moments<A> moments(const A* row, A eps, int64_t n) {
    Sum<A> sum, rest, squares;
    sweep<A>(n, [&](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        sum.add(load<V>(row + i));
    });
    const A mean = sum.total() / A(n);
    sweep<A>(n, [&](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        V centred = load<V>(row + i) - mean;
        rest.add(centred);
        squares.add(centred * centred);
    });
    const A missed = rest.total() / A(n);  // the rounding error of the mean
    return {mean + missed, A(1) / A(__builtin_sqrt(squares.total() / A(n) - missed * missed + eps))};
}

template <class A>
void multiply(const A* a, const A* b, A* out, int64_t n) {
    sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        store(out + i, load<V>(a + i) * load<V>(b + i));
    });
}

template <class A>
void multiply_add(const A* a, const A* b, A* sum, int64_t n) {
    sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        store(sum + i, load<V>(sum + i) + load<V>(a + i) * load<V>(b + i));
    });
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
    Sum<A> sum;
    sweep<A>(n, [&](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        sum.add(load<V>(a + i) * load<V>(b + i));
    });
    return sum.total();
}

template <class A>
void norm_backward(const A* x, Moments<A> moments, bool norm, const A* dh, const A* scale, A* dx, A* dshift, A* dscale,
                   int64_t n) {
    // With y the normalised x and g = dh·(1 + scale): dx += rstd·(g - mean(g) - y·mean(g·y)).
    Sum<A> sum_g, sum_gy;
    sweep<A>(n, [&](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        V d = load<V>(dh + i), y = (load<V>(x + i) - moments.mean) * moments.rstd;
        V g = scale ? d + d * load<V>(scale + i) : d;
        sum_g.add(g);
        sum_gy.add(g * y);
        if (dshift) store(dshift + i, load<V>(dshift + i) + d);
        if (dscale) store(dscale + i, load<V>(dscale + i) + d * y);
    });
    const A mean_g = norm ? sum_g.total() / A(n) : A(0), mean_gy = norm ? sum_gy.total() / A(n) : A(0);
    sweep<A>(n, [=](int64_t i, auto lane) __attribute__((always_inline)) {
        using V = typename decltype(lane)::type;
        V d = load<V>(dh + i), y = (load<V>(x + i) - moments.mean) * moments.rstd;
        V g = scale ? d + d * load<V>(scale + i) : d;
        store(dx + i, load<V>(dx + i) + (g - mean_g - y * mean_gy) * moments.rstd);
    });
}

template <class A, class T>
constexpr StorageOps<A> storage() {
    return {sizeof(T), read<A, T>, write<A, T>, bias_gelu<A, T>};
}

template <class A>
constexpr RowOps<A> row_ops_of(StorageOps<A> f32, StorageOps<A> half, StorageOps<A> brain, StorageOps<A> f64) {
    return {{f32, half, brain, f64}, moments<A>, multiply<A>, multiply_add<A>, dot<A>, norm_backward<A>};
}

}  // namespace

namespace HARMONICA_ISA {
extern const RowOps<float> float_ops;
extern const RowOps<double> double_ops;
const RowOps<float> float_ops =
    row_ops_of<float>(storage<float, float>(), storage<float, f16>(), storage<float, bf16>(), {});
const RowOps<double> double_ops = row_ops_of<double>({}, {}, {}, storage<double, double>());
}  // namespace HARMONICA_ISA

}  // namespace harmonica
