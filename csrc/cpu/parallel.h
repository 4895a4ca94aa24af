// Threads: a queue of jobs that the process's own OpenMP threads take from.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace harmonica {

// Jobs 0..size-1, each handed out once.
class Queue {
  public:
    explicit Queue(int64_t size) : size_(size) {}

    // The next job, or -1 when none is left.
    int64_t next() {
        const int64_t job = next_.fetch_add(1, std::memory_order_relaxed);
        return job < size_ ? job : -1;
    }

  private:
    std::atomic<int64_t> next_{0};
    const int64_t size_;
};

// Calls work(worker) on up to `threads` threads at once, worker = 0, 1, ..: fewer where the runtime grants fewer, so
// the work must come from a Queue. It must not throw. One thread: the caller's alone.
void parallel(int threads, const std::function<void(int)>& work);

}  // namespace harmonica
