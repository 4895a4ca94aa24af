// Threads: the process's own OpenMP threads take jobs from a queue.
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

// Calls work(worker) on up to `threads` threads at once, worker = 0, 1, ... The runtime may grant fewer threads, so
// workers must take their jobs from a Queue. work must not throw. With threads = 1 only the caller's thread runs.
void parallel(int threads, const std::function<void(int)>& work);

}  // namespace harmonica
