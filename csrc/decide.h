// One branch's decision at one step. The CUDA kernel and the CPU's `decide` both run these functions.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__
#define HARMONICA_HOST_DEVICE __host__ __device__ inline
#else
#define HARMONICA_HOST_DEVICE inline
#endif

namespace harmonica {

// Whether the rule asks for branch k to be computed. difference and size: sums of |o - reference| and |reference|.
HARMONICA_HOST_DEVICE bool asks_for(const DecisionMemory& m, DecisionRule rule, int step, int k, double difference,
                                    double size) {
    if (rule == DecisionRule::always) return true;
    if (rule == DecisionRule::change) return difference > *m.threshold * size;
    return m.scores[step * m.branches + k] > *m.threshold;  // in double, as Python floats compare
}

// Records the decision on branch k and returns it. A branch not yet computed in this trajectory is computed whatever
// the rule says.
HARMONICA_HOST_DEVICE bool settle(const DecisionMemory& m, int step, int k, bool compute) {
    int latest = step ? m.latest_at[k] : -1, previous = step ? m.previous_at[k] : -1;
    compute = compute || latest < 0;
    float e = 0;
    if (compute) {
        m.previous_at[k] = latest;
        m.latest_at[k] = step;
        m.slot[k] = m.history == 2 && latest >= 0 ? 1 - m.slot[k] : 0;
    } else if (m.history == 2 && previous >= 0) {
        e = m.extrapolation[step * m.branches + k] * (float(step - latest) / float(latest - previous));
    }
    m.forecast_weights[k] = e;
    m.compute[k] = compute;
    m.reused[step * m.branches + k] = !compute;
    return compute;
}

}  // namespace harmonica
