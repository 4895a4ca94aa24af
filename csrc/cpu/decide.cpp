// The decisions of a step on the CPU: on_cpu.py runs this, and the CUDA kernel must agree with it.
#include "../decide.h"

namespace harmonica {

void decide(const DecisionMemory& m, int first, int last, DecisionRule rule) {
    if (first == 0) {
        *m.again = ++*m.step + 1 < m.steps;
        m.start[0] = 0;
    }
    int step = *m.step;
    double difference = 0, size = 0;
    for (int i = 0; rule == DecisionRule::change && i < m.parts; ++i) {
        difference += m.change[i];
        size += m.change[m.parts + i];
    }
    for (int k = first; k < last; ++k) {
        bool compute = settle(m, step, k, asks_for(m, rule, step, k, difference, size));
        m.start[k + 1] = compute ? k : m.start[k];
    }
    if (rule == DecisionRule::change && m.compute[first]) *m.reference ^= 1;
}

}  // namespace harmonica
