#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../kernels.h"

namespace harmonica {
namespace {

// Compilers emit this entry point for `#pragma omp parallel` (libgomp; Intel's and LLVM's runtimes have it too). It is
// looked up in the process instead of linked: torch brings its own copy of the runtime, and a second copy or another
// thread pool would fight with torch's spinning workers for the same cores.
// After fork() it has none of its threads and waits for them for ever, so a child process starts threads of its own.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
[[maybe_unused]] const int told_of_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel gomp_parallel() {
#ifdef HARMONICA_WITHOUT_OPENMP
    return nullptr;
#endif
    if (forked) return nullptr;
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Region {
    const std::function<void(int)>& work;
    std::atomic<int> workers{0};

    static void enter(void* self) {
        auto* region = static_cast<Region*>(self);
        region->work(region->workers.fetch_add(1));
    }
};

}  // namespace

void parallel(int threads, const std::function<void(int)>& work) {
    if (threads <= 1) return work(0);
    Region region{work};
    if (gomp_parallel()) return gomp_parallel()(Region::enter, &region, unsigned(threads), 0);
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        while (int(others.size()) < threads - 1) others.emplace_back(Region::enter, &region);
    } catch (const std::system_error&) {  // the process gets no more threads; those that started share the work
    }
    Region::enter(&region);
    for (std::thread& other : others) other.join();
}

std::string threading() {
    Dl_info library;
    if (gomp_parallel() && dladdr(reinterpret_cast<void*>(gomp_parallel()), &library))
        return std::string("OpenMP (") + library.dli_fname + ")";
    return forked ? "std::thread (this process was forked)" : "std::thread (no OpenMP runtime in this process)";
}

}  // namespace harmonica
