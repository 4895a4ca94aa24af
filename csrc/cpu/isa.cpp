// Chooses the instruction set: the best that the processor has, or the one that HARMONICA_CPU names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "row.h"

#define DECLARE_ISA(name)                   \
    namespace harmonica::name {             \
    extern const RowOps<float> float_ops;   \
    extern const RowOps<double> double_ops; \
    }
DECLARE_ISA(portable)
#if defined(__x86_64__)
DECLARE_ISA(avx2)
DECLARE_ISA(avx512)
#endif

namespace harmonica {
namespace {

struct Isa {
    const char* name;
    const RowOps<float>* float_ops;
    const RowOps<double>* double_ops;
};

// The instruction sets that the processor has, best first. `portable` always ends the list.
const std::vector<Isa>& available() {
    static const std::vector<Isa> isas = [] {
        std::vector<Isa> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found.push_back({"avx512", &avx512::float_ops, &avx512::double_ops});
        if (has_avx2) found.push_back({"avx2", &avx2::float_ops, &avx2::double_ops});
#endif
        found.push_back({"portable", &portable::float_ops, &portable::double_ops});
        return found;
    }();
    return isas;
}

const Isa* find(const std::string& name) {
    std::string names;
    for (const Isa& isa : available()) {
        if (name == isa.name) return &isa;
        names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    throw std::invalid_argument("no CPU kernels named '" + name + "' here; this processor can run: " + names);
}

std::atomic<const Isa*>& choice() {
    static std::atomic<const Isa*> isa{[] {
        const char* forced = std::getenv("HARMONICA_CPU");
        return forced && *forced ? find(forced) : &available().front();
    }()};
    return isa;
}

}  // namespace

template <>
const RowOps<float>& row_ops<float>() {
    return *choice().load()->float_ops;
}
template <>
const RowOps<double>& row_ops<double>() {
    return *choice().load()->double_ops;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : available()) names.push_back(isa.name);
    return names;
}

std::string isa() { return choice().load()->name; }
void set_isa(const std::string& name) { choice() = find(name); }

}  // namespace harmonica
