#include "overlap.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace harmonica {
namespace {

int64_t size_of(DType dtype) {
    static constexpr int64_t kSizes[] = {4, 2, 2, 8};
    return kSizes[int(dtype)];
}

bool is_same(const Activation& a, const Activation& b) {
    return a.data == b.data && a.dtype == b.dtype && a.batch_stride == b.batch_stride &&
           a.token_stride == b.token_stride;
}

// Whether the rows of two views of one buffer alternate without touching, as the halves of a chunk along D do.
bool interleave(Shape shape, const Activation& a, const Activation& b) {
    if (a.dtype != b.dtype || a.batch_stride != b.batch_stride || a.token_stride != b.token_stride) return false;
    const int64_t row = shape.width * size_of(a.dtype);
    const int64_t period = std::gcd(a.batch_stride, a.token_stride) * size_of(a.dtype);
    if (period == 0) return false;
    const int64_t distance = (reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data)) % period;
    const int64_t offset = distance < 0 ? distance + period : distance;
    return offset >= row && period - offset >= row;
}

bool overlap(Shape shape, const Activation& a, const Activation& b) {
    auto end = [shape](const Activation& t) {
        const int64_t last = (shape.batch - 1) * t.batch_stride + (shape.tokens - 1) * t.token_stride + shape.width;
        return static_cast<const char*>(t.data) + last * size_of(t.dtype);
    };
    return a.data < end(b) && b.data < end(a) && !interleave(shape, a, b);
}

Activation as_activation(const Rows& rows) { return {rows.data, rows.dtype, rows.stride, 0}; }

}  // namespace

void refuse_overlap(const char* op, Shape shape, const std::vector<Named>& outputs, const Activation& x,
                    const std::vector<Term>& run, const Blend& blend, const Norm& norm) {
    if (shape.batch * shape.tokens == 0) return;
    for (const Named& out : outputs) {
        if (!out.a.data) continue;
        auto refuse = [&](const std::string& what) {
            throw std::invalid_argument(std::string(op) + ": " + out.name + " is written to and " + what);
        };
        auto check = [&](const char* name, const Activation& other, int term = -1) {
            if (other.data && overlap(shape, out.a, other))
                refuse("shares memory with " + (term < 0 ? name : "run[" + std::to_string(term) + "]." + name));
        };
        if ((shape.tokens > 1 && out.a.token_stride < shape.width) ||
            (shape.batch > 1 && out.a.batch_stride < shape.width))
            refuse("has rows that overlap each other");
        for (const Named& other : outputs)
            if (&other != &out) check(other.name, other.a);
        if (!is_same(out.a, x)) check("x", x);
        for (int j = 0; j < int(run.size()); ++j) {
            check("latest", run[j].latest, j);
            check("previous", run[j].previous, j);
            check("gate", as_activation(run[j].gate), j);
        }
        check("fresh", blend.fresh);
        check("shift", as_activation(norm.shift));
        check("scale", as_activation(norm.scale));
    }
}

}  // namespace harmonica
