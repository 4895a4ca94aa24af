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

// --- What is computed at a step, decided from memory, and the CUDA graph that it steers ------------------------------

// Memory of a gated executor with K branches and T steps, on the device that runs it. Nothing here is a host's
// decision: writing scores, extrapolation or threshold changes the next trajectory's.
struct DecisionMemory {
    int32_t steps, branches, history;  // T, K, cache slots a branch (1 or 2)
    const float* scores;               // [T, K]
    const float* extrapolation;        // [T, K] the schedule's coefficients a; not read where history is 1
    const double* threshold;           // τ of the rule in use
    const uint64_t* conditions;        // CUDA: [K + 1] handles, a branch's IF node each, then the loop's
    const double* change;              // [2, parts]: partial sums of |o - reference|, then of |reference|
    int32_t parts;
    int32_t* step;         // -1 before the first
    int32_t* again;        // whether another step follows
    int32_t* compute;      // [K] this step's decisions
    int32_t* start;        // [K + 1] where the run that the norm before k adds begins: the branch computed last, or 0
    int32_t* slot;         // [K] cache slot of the latest output
    int32_t* latest_at;    // [K] step of the latest computed output
    int32_t* previous_at;  // [K] of the one before it, -1 where there is none
    float* forecast_weights;  // [K] the weights e of this step
    int32_t* reference;    // which half of [2, ...] holds the reference of the change rule
    uint8_t* reused;       // [T, K] what the trajectory reused
};

// scores: score > τ (Huang et al., 2025). change: the first branch's output moved by more than τ, relative to its
// size, since it was last taken as reference (the idea of first-block caching). always: computed.
enum class DecisionRule : int { scores, always, change };

// Decides the branches first..last-1 of a step; first == 0 goes on to the next step. With the change rule and a
// decision to compute, the output just compared becomes the reference.
void decide(const DecisionMemory& memory, int first, int last, DecisionRule rule);

// What the CUDA part was built with and what this machine has. Nothing here needs a GPU or a driver.
struct CudaBuild {
    int runtime = 0;            // CUDART_VERSION, 0 where nvcc was absent or too old
    std::string architectures;  // "80 90 100"
    int driver = 0;             // highest CUDA version the driver serves, 0 without one
    int needed = 0;             // the least that it has to serve
    int devices = 0;
    std::string error;  // why the devices could not be counted
};
CudaBuild cuda_build();

// Instruction sets: those compiled in that this processor has, the one in use, and a setter for tests.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);

// What runs the threads: the process's OpenMP runtime (its library) or std::thread.
std::string threading();

}  // namespace harmonica
