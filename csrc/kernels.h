// Every kernel's declaration and contract. No torch here: plain pointers, sizes, strides, dtypes.
//
// Shapes: batch B, tokens N, width D >= 1; B and N may be 0. Strides count elements; the last dimension's is 1.
// The arguments of a call may mix f32, f16 and bf16, and the arithmetic is float; or all are f64, and it is double.
// The Python ops check arguments; apart from overlaps, nothing is checked here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace harmonica {

enum class DType : int { f32, f16, bf16, f64 };

struct Shape {
    int64_t batch, tokens, width;
};

// [B, N, D]; data == nullptr: absent.
struct Activation {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t batch_stride = 0, token_stride = 0;
};

// Modulation [B or 1, D]; stride 0 if one row serves every batch entry; data == nullptr: absent.
struct Rows {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;
};

// One branch's share in a run, gate·o with o = (1 + e)·latest - e·previous; without previous, e must be 0.
struct Term {
    Activation latest, previous;
    double e = 0;
    Rows gate;
};

// Of h = LN(x')·(1 + scale) + shift; norm == false leaves the LN out.
struct Norm {
    Rows shift, scale;
    bool norm = true;
    double eps = 0;
};

// Blends the first term's output with a fresh one, r·fresh + (1 - r)·o; fresh.data == nullptr: no blend.
struct Blend {
    Activation fresh;
    double r = 0;
};

// x_out = x + Σ gate·o over the run; h = LN(x_out)·(1 + scale) + shift; first = the first term's o, blended if there is
// a fresh output. Absent outputs are not written. x_out may be x itself. Throws std::invalid_argument if an output
// shares any other memory with another argument.
void residual_norm(Shape shape, Activation x, Activation x_out, Activation h, Activation first,
                   const std::vector<Term>& run, const Blend& blend, const Norm& norm, int threads);

// x = GELU(x + bias) in its tanh form, in place: inference. bias is one row of a type that x's may be mixed with.
void bias_gelu(Shape shape, Activation x, Rows bias, int threads);

// The gradients to write; data == nullptr: not wanted. latest and gate have one entry for each term.
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

// Backward of residual_norm from dx_out and dh (one of them may be absent), given its result x_out. scalars: whether dr
// and de are wanted; if not, they are 0. The order of sums over tokens depends on the shape alone, so the number of
// threads does not change them.
ScalarGradients residual_norm_backward(Shape shape, Activation dx_out, Activation dh, Activation x_out,
                                       const std::vector<Term>& run, const Blend& blend, const Norm& norm,
                                       const Gradients& gradients, bool scalars, int threads);

// --- The decision which branches a step computes ---------------------------------------------------------------------

// The memory in which a gated executor's device decides, for K branches and T steps. The host writes scores,
// extrapolation and threshold; this changes the decisions of the next trajectory.
struct DecisionMemory {
    int32_t steps, branches, history;  // T, K, cache slots a branch (1 or 2)
    const float* scores;               // [T, K]
    const float* extrapolation;        // [T, K] the schedule's coefficients a; not read where history is 1
    const double* threshold;           // τ of the rule in use
    const uint64_t* conditions;        // CUDA: [K + 1] handles of the branches' IF nodes, then of the loop
    const double* change;              // [2, parts]: partial sums of |o - reference|, then of |reference|
    int32_t parts;
    int32_t* step;         // -1 before the first
    int32_t* again;        // whether another step follows
    int32_t* compute;      // [K] this step's decisions
    int32_t* start;  // [K + 1] first branch of the run that the norm before k adds: the one computed last, or 0
    int32_t* slot;  // [K] cache slot of the latest output
    int32_t* latest_at;  // [K] step of the latest computed output
    int32_t* previous_at;  // [K] step of the computed output before that, -1 if there is none
    float* forecast_weights;  // [K] the weights e of this step
    int32_t* reference;  // which half of [2, ...] holds the reference of the change rule
    uint8_t* reused;  // [T, K] the entries that the trajectory reused
};

// A branch is computed if... scores: its score > τ (Huang et al., 2025). change: the first branch's output has moved by
// more than τ relative to the reference, its output when the rule last computed (the idea of first-block caching).
// always: in any case.
enum class DecisionRule : int { scores, always, change };

// Decides the branches first..last-1 of a step; with first == 0, the next step begins. If the change rule decides to
// compute, the output just compared becomes the reference.
void decide(const DecisionMemory& memory, int first, int last, DecisionRule rule);

// What the CUDA part was built with and what this machine has. Nothing here needs a GPU or a driver.
struct CudaBuild {
    int runtime = 0;  // CUDART_VERSION, 0 if nvcc was absent or too old
    std::string architectures;  // "80 90 100"
    int driver = 0;  // the highest CUDA version that the driver serves, 0 without a driver
    int needed = 0;  // the lowest that it must serve
    int devices = 0;
    std::string error;  // why the devices could not be counted
};
CudaBuild cuda_build();

// Instruction sets: those compiled that this processor has, the one in use, and a setter for tests.
std::vector<std::string> available_isas();
std::string isa();
void set_isa(const std::string& name);

// What runs the threads: the process's OpenMP runtime and its library, or std::thread.
std::string threading();

}  // namespace harmonica
