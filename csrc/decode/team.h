// A leader that shares tasks of some chunks with helpers, and never waits for one.
//
// The leader takes chunks from the front, helpers take them from the back, by one atomic word. A helper writes to
// memory of its own and reports by a compare-and-swap; the leader copies the result to its place. Where a helper has
// claimed a chunk and does not run, the leader takes the chunk back and computes it: a later report is refused.
//
// So a helper may read what the leader changes meanwhile. Its numbers are thrown away then, but what it takes for an
// address must have been checked by is_current() after it was read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <type_traits>

#include "helpers.h"

namespace depthlstm {
namespace decode {

class Team final : public Helped {
public:
    static constexpr int64_t result_floats = int64_t(1)
                                             << 16;  // of a helper: the chunks that the leader has not copied
    static constexpr int64_t most_chunks = 255, most_helpers = 15;

    // Who runs a chunk. A helper has memory for the chunk's result and for scratch, the leader has neither.
    struct Worker {
        float *result = nullptr, *scratch = nullptr;
        const std::atomic<uint64_t>* word = nullptr;
        uint64_t epoch = 0;

        bool is_current() const {
            if (word == nullptr) return true;
            std::atomic_thread_fence(std::memory_order_acquire);
            return word->load(std::memory_order_relaxed) >> 32 == epoch;
        }
    };

    // At most `helpers` of the first `all_helpers` come, each with `scratch` floats. The team lives until has_left().
    Team(int64_t helpers, int64_t all_helpers, int64_t scratch)
        : helpers_(Helpers::reserve(helpers, all_helpers, result_floats + scratch)) {
        for (Helper* helper : helpers_) helper->send(*this);
    }

    int64_t helpers() const { return int64_t(helpers_.size()); }
    void finish() { word_.store(over, std::memory_order_release); }
    bool has_left() {
        return std::all_of(helpers_.begin(), helpers_.end(), [&](Helper* helper) { return helper->has_left(*this); });
    }
    // Most helpers leave within a microsecond.
    void await_helpers() {
        for (int i = 0; i < 200 && !has_left(); ++i) pause();
    }

    // Runs every chunk of a task, which has run(chunk, worker), place(chunk, result) and chunk_floats().
    template <class Task>
    void share(const Task& task, int64_t chunks) {
        static_assert(std::is_trivially_copyable_v<Task> && sizeof(Task) <= sizeof(Payload::task));
        if (helpers_.empty() || chunks < 2) return run_alone(task, chunks);
        Payload payload;
        payload.run = [](const void* given, int64_t chunk, const Worker& worker) {
            static_cast<const Task*>(given)->run(chunk, worker);
        };
        payload.floats = task.chunk_floats();
        std::memcpy(payload.task, &task, sizeof task);
        publish(payload, uint64_t(chunks));
        lead(task, chunks);
        // closed before the leader changes anything that the task reads
        word_.store(++epoch_ << 32, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_release);
    }

    template <class Task>
    static void run_alone(const Task& task, int64_t chunks) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) task.run(chunk, {});
    }

    void help(float* memory) override {
        const uint64_t own = joined_.fetch_add(1, std::memory_order_relaxed);
        results_[own] = memory;
        Payload payload;
        uint64_t known = 0;
        int64_t taken = 0;
        for (;;) {
            uint64_t found = word_.load(std::memory_order_acquire);
            if (found == over) return;
            const uint64_t epoch = found >> 32, front = found >> 16 & 0xffff, back = found & 0xffff;
            if (front >= back) {
                pause();
                continue;
            }
            if (epoch != known) {
                read(payload);
                std::atomic_thread_fence(std::memory_order_acquire);
                if (word_.load(std::memory_order_relaxed) >> 32 != epoch) continue;
                known = epoch;
                taken = 0;
            }
            if ((taken + 1) * payload.floats > result_floats) {
                pause();
                continue;
            }
            if (!word_.compare_exchange_weak(found, found - 1, std::memory_order_relaxed)) continue;
            float* result = memory + taken * payload.floats;
            payload.run(payload.task, int64_t(back) - 1, {result, memory + result_floats, &word_, epoch});
            uint64_t expected = epoch << 16;
            chunks_[back - 1].compare_exchange_strong(expected, epoch << 16 | (2 + own * 256 + uint64_t(taken)),
                                                      std::memory_order_release, std::memory_order_relaxed);
            ++taken;
        }
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr uint64_t over = ~uint64_t(0), by_leader = 1;

    struct Payload {
        void (*run)(const void*, int64_t, const Worker&);
        int64_t floats;
        char task[240];
    };
    static constexpr std::size_t words = sizeof(Payload) / 8;
    static_assert(sizeof(Payload) % 8 == 0);

    uint64_t epoch_ = 0;  // the leader's
    float* results_[most_helpers];
    std::atomic<uint64_t> joined_{0};
    alignas(64) std::atomic<uint64_t> word_{0};  // epoch | the first free chunk | behind the last
    alignas(64) std::atomic<uint64_t> payload_[words]{};
    alignas(64) std::atomic<uint64_t> chunks_[most_chunks]{};  // epoch | 0: nobody's result, 1: the leader's, or where
    const std::vector<Helper*> helpers_;                       // the last: they begin when it is made

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void publish(const Payload& payload, uint64_t chunks) {
        ++epoch_;
        uint64_t copy[words];
        std::memcpy(copy, &payload, sizeof payload);
        for (std::size_t i = 0; i < words; ++i) payload_[i].store(copy[i], std::memory_order_relaxed);
        for (uint64_t i = 0; i < chunks; ++i) chunks_[i].store(epoch_ << 16, std::memory_order_relaxed);
        word_.store(epoch_ << 32 | chunks, std::memory_order_release);
    }

    void read(Payload& payload) const {
        uint64_t copy[words];
        for (std::size_t i = 0; i < words; ++i) copy[i] = payload_[i].load(std::memory_order_relaxed);
        std::memcpy(static_cast<void*>(&payload), copy, sizeof payload);
    }

    template <class Task>
    void lead(const Task& task, int64_t chunks) {
        // As long as a chunk takes the leader, it waits for a helper's: its shortest one, which nothing interrupted.
        Clock::duration patience = Clock::duration::max();
        uint64_t found = word_.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t front = found >> 16 & 0xffff, back = found & 0xffff;
            if (front >= back) break;
            if (!word_.compare_exchange_weak(found, found + (1 << 16), std::memory_order_relaxed)) continue;
            const Clock::time_point began = Clock::now();
            task.run(int64_t(front), {});
            patience = std::min(patience, Clock::now() - began);
            found = word_.load(std::memory_order_relaxed);
        }
        patience = std::min<Clock::duration>(patience, std::chrono::milliseconds(10));  // or it ran none
        for (int64_t chunk = chunks - 1; chunk >= int64_t(found & 0xffff); --chunk) {
            uint64_t state = chunks_[chunk].load(std::memory_order_acquire);
            if (state == epoch_ << 16) {
                const Clock::time_point began = Clock::now();
                do {
                    pause();
                    state = chunks_[chunk].load(std::memory_order_acquire);
                } while (state == epoch_ << 16 && Clock::now() - began < patience);
            }
            if (state == epoch_ << 16 &&
                chunks_[chunk].compare_exchange_strong(state, epoch_ << 16 | by_leader, std::memory_order_acquire)) {
                task.run(chunk, {});
                continue;
            }
            const int64_t where = int64_t(state & 0xffff) - 2;
            task.place(chunk, results_[where / 256] + where % 256 * task.chunk_floats());
        }
    }
};

}  // namespace decode
}  // namespace depthlstm
