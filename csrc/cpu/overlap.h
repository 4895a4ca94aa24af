// Refuses outputs that would be overwritten while the same memory is still to be read.
#pragma once

#include <vector>

#include "../kernels.h"

namespace harmonica {

struct Named {
    const char* name;
    Activation a;
};

// Throws std::invalid_argument, naming both, where an output has rows that overlap each other, or shares memory with
// another output, an input, or a row of the run or the norm. x is an input of its own: x_out may be equal to it.
void refuse_overlap(const char* op, Shape shape, const std::vector<Named>& outputs, const Activation& x,
                    const std::vector<Term>& run, const Blend& blend, const Norm& norm);

}  // namespace harmonica
