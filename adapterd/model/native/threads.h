// Threads that share out the operators' work, and stay awake while a step is on.
//
// A step has hundreds of these short pieces of work, and this is a server: other threads take processors away at any
// moment. OpenMP's team ends each piece with a wait for all its threads, also for one that never got to run, and goes
// to sleep at once where the process has more such teams than processors. Here nobody waits for a thread that has
// not begun: the caller does what is left, alone if it must.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace adapterd {

// Below this many multiplications a piece of work is done by one thread: to share it takes some microseconds.
constexpr int64_t kGrain = 1 << 16;

// How long a thread that has nothing to do looks for work before it sleeps: longer than Python takes from one operator
// to the next, shorter than what anybody else would miss.
constexpr std::chrono::microseconds kAwake{200};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// run(body, item, next) for each item; a thread has claimed the next one before it begins with this one.
struct Job {
  void (*run)(const void* body, int64_t item, int64_t next);
  const void* body;
  int64_t items;
  int helpers;
  std::atomic<int64_t> free{0};

  void work() {
    for (int64_t item = free++, next; item < items; item = next) {
      next = std::min<int64_t>(free++, items);
      run(body, item, next);
    }
  }
};

class Team {
 public:
  // One for the process, never taken down: its threads may be asleep in it when the process ends.
  static Team& shared() {
    static std::atomic<Team*> team{make()};
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads.
    static const int once = pthread_atfork(nullptr, nullptr, [] { team = make(); });
    static_cast<void>(once);
#endif
    return *team;
  }

  // All items are done when it returns. A second caller at the same time works alone.
  void run(Job& job) {
    const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock || job.helpers <= 0) return job.work();
    for (; num_threads_ < job.helpers; ++num_threads_) {
      std::thread([this, number = num_threads_] { help(number); }).detach();
    }
    open_ = &job;
    ++epoch_;
    epoch_.notify_all();
    job.work();
    open_ = nullptr;
    // Only threads that have looked at the job are waited for; each has at most one item left, or two.
    for (int spins = 0; inside_ != 0; ++spins) {
      relax();
      if (spins > 10'000) std::this_thread::yield();  // one of them may need this very processor
    }
  }

 private:
  static Team* make() { return new Team; }

  void help(int number) {
    for (uint32_t seen = 0;; seen = wait(seen)) {
      // Entered before it is read, and closed before `inside_` is: a job that is seen here is not gone before we are.
      ++inside_;
      Job* job = open_;
      if (job && number < job->helpers) job->work();
      --inside_;
    }
  }

  uint32_t wait(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int spins = 1;; ++spins) {
      const uint32_t now = epoch_;
      if (now != seen) return now;
      relax();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
        epoch_.wait(seen);
        return epoch_;
      }
    }
  }

  std::mutex busy_;
  int num_threads_ = 0;
  std::atomic<Job*> open_{nullptr};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> inside_{0};
};

// run(item, next) for every item, handed out one by one: what a thread loses to other processes, or to a dearer item,
// the others make up for. Items should be large beside an atomic increment. `next` is what the thread will run after
// this, so that it can ask memory for it in time; `items` if there is none.
template <typename F>
void share_out(int64_t items, int64_t work_per_item, const F& run) {
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), items, items * work_per_item / kGrain + 1});
  Job job{[](const void* body, int64_t item, int64_t next) { (*static_cast<const F*>(body))(item, next); }, &run, items,
          static_cast<int>(threads - 1)};
  Team::shared().run(job);
}

// run(begin, end) over [0, n) in pieces that are worth sharing.
template <typename F>
void share_ranges(int64_t n, int64_t work_per_item, const F& run) {
  const int64_t step = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item));
  share_out((n + step - 1) / step, step * work_per_item,
            [&](int64_t item, int64_t) { run(item * step, std::min(n, item * step + step)); });
}

}  // namespace adapterd
