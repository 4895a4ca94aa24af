// Refuses outputs whose memory is also another argument's.
#pragma once

#include <vector>

#include "../kernels.h"

namespace harmonica {

struct Named {
    const char* name;
    Activation a;
};

// Throws std::invalid_argument if an output has rows that overlap each other, or shares memory with another output, an
// input, or a row of the run or the norm. The message names both. An output may be exactly x, as x_out is in place.
void refuse_overlap(const char* op, Shape shape, const std::vector<Named>& outputs, const Activation& x,
                    const std::vector<Term>& run, const Blend& blend, const Norm& norm);

}  // namespace harmonica
