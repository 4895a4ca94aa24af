// Every kernel's declaration and contract. No torch here: plain pointers, sizes, strides, dtypes.
//
// Shapes: batch B, tokens N, width D >= 1; B and N may be 0. Strides count elements; the last dimension's is 1.
// Storage types mix freely among the arguments of a call, except that f64 stands alone: either all are f64 and the
// arithmetic is double, or none is and it is float. Arguments are checked by the Python ops, not here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace harmonica {

enum class DType : int { f32, f16, bf16, f64 };

struct Shape {
    int64_t batch, tokens, width;
};

// [B, N, D]; data == nullptr where the argument is absent.
struct Activation {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t batch_stride = 0, token_stride = 0;
};

// [B or 1, D] modulation, stride 0 where one row serves every batch entry; data == nullptr where absent.
struct Rows {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;
};

// One branch's share in a run, gate·o with o = (1 + e)·latest - e·previous; e == 0 where previous is absent.
struct Term {
    Activation latest, previous;
    double e = 0;
    Rows gate;
};

// How h = LN(x')·(1 + scale) + shift is made; norm == false leaves the LN out.
struct Norm {
    Rows shift, scale;
    bool norm = true;
    double eps = 0;
};

// A first term's output blended with a fresh one, r·fresh + (1 - r)·o; fresh.data == nullptr where it is not.
struct Blend {
    Activation fresh;
    double r = 0;
};

// x_out = x + Σ gate·o over the run; h = LN(x_out)·(1 + scale) + shift; first = the first term's o, blended where there
// is a fresh output. Absent outputs are not written. x_out may be x itself; any other memory that an output shares with
// another argument throws std::invalid_argument.
void residual_norm(Shape shape, Activation x, Activation x_out, Activation h, Activation first,
                   const std::vector<Term>& run, const Blend& blend, const Norm& norm, int threads);

// The gradients asked for; data == nullptr where one is not. latest and gate have one entry for each term.
struct Gradients {
    Activation x, fresh;
    std::vector<Activation> latest;
    Rows shift, scale;
    std::vector<Rows> gate;
};

// dr, and de for each term.
struct ScalarGradients {
    double r = 0;
    std::vector<double> e;
};

// Backward of residual_norm from dx_out and dh (one of them may be absent), given its result x_out. `scalars`: whether
// dr and de are wanted (else 0). Sums over tokens are taken in an order that depends on the shape alone: they come out
// the same for every number of threads.
ScalarGradients residual_norm_backward(Shape shape, Activation dx_out, Activation dh, Activation x_out,
                                       const std::vector<Term>& run, const Blend& blend, const Norm& norm,
                                       const Gradients& gradients, bool scalars, int threads);

// Instruction sets: those compiled in that this processor has, the one in use, and a setter for tests.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);

// What runs the threads: the process's OpenMP runtime (its library) or std::thread.
std::string threading();

}  // namespace harmonica
