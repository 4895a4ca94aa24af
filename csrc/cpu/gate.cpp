// The gate on the host: what the plan's interpreter runs, and the reference of the CUDA kernel.
#include "../gate.h"

namespace harmonica {

void gate(const GateMemory& m, int first, int last, GateRule rule) {
    if (first == 0) {
        *m.again = ++*m.step + 1 < m.steps;
        m.start[0] = 0;
    }
    int step = *m.step;
    double difference = 0, size = 0;
    for (int i = 0; rule == GateRule::change && i < m.parts; ++i) {
        difference += m.change[i];
        size += m.change[m.parts + i];
    }
    for (int k = first; k < last; ++k) {
        bool compute = settle(m, step, k, wanted(m, rule, step, k, difference, size));
        m.start[k + 1] = compute ? k : m.start[k];
    }
    if (rule == GateRule::change && m.compute[first]) *m.reference ^= 1;
}

}  // namespace harmonica
