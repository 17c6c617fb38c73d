// Threads that run only where a core is idle.
//
// They have the lowest priority (SCHED_IDLE): beside another busy program they take nothing from it, and nothing from
// the thread that they help. At the usual priority a helper shares a core with the search now and then, which then ran
// at 0.7 of its speed alone. But a thread like this may be stopped anywhere for a second. So nobody waits for one, it
// takes no lock and allocates nothing, and what it reads is kept until it has left.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace depthlstm {
namespace decode {

// What a helper works for.
class Helped {
public:
    virtual void help(float* memory) = 0;

protected:
    ~Helped() = default;
};

class Helper {
public:
    // Whether it was free: it is reserved then, and has `floats` floats of memory. It must be sent to work.
    bool reserve(int64_t floats) {
        Helped* none = nullptr;
        if (!work_.compare_exchange_strong(none, reserved(), std::memory_order_acquire)) return false;
        if (floats > floats_) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::malloc(std::size_t(floats) * sizeof(float)));
            floats_ = memory_ == nullptr ? 0 : floats;
        }
        if (memory_ == nullptr) work_.store(nullptr, std::memory_order_release);
        return memory_ != nullptr;
    }
    void send(Helped& work) {
        work_.store(&work, std::memory_order_release);
        work_.notify_one();
    }
    // Takes the work back if the helper has not begun with it. Returns whether it has nothing to do with it any more.
    bool has_left(Helped& work) {
        Helped* sent = &work;
        if (work_.compare_exchange_strong(sent, nullptr, std::memory_order_acq_rel)) return true;
        return sent != begun(work);
    }

    void run() {
        for (;;) {
            Helped* work = work_.load(std::memory_order_acquire);
            if (work == nullptr || work == reserved()) {
                work_.wait(work, std::memory_order_acquire);
                continue;
            }
            Helped& own = *work;
            if (!work_.compare_exchange_strong(work, begun(own), std::memory_order_acquire)) continue;
            own.help(memory_);
            work_.store(nullptr, std::memory_order_release);
        }
    }

private:
    alignas(64) std::atomic<Helped*> work_{nullptr};
    float* memory_ = nullptr;
    int64_t floats_ = 0;

    static Helped* reserved() { return reinterpret_cast<Helped*>(alignof(Helped)); }
    static Helped* begun(Helped& work) { return reinterpret_cast<Helped*>(reinterpret_cast<uintptr_t>(&work) | 1); }
};

// What helpers read.
class Kept {
public:
    virtual ~Kept() = default;
    virtual bool has_left() = 0;
};

// The helpers of this process, which stay until it ends, and what they have not left.
class Helpers {
public:
    // Keeps it until no helper reads it, and lets go of what they have left since.
    static void keep(std::unique_ptr<Kept> read) {
        Helpers& own = *current();
        const std::lock_guard<std::mutex> guard(own.mutex_);
        if (!read->has_left()) own.kept_.push_back(std::move(read));
        std::erase_if(own.kept_, [](const std::unique_ptr<Kept>& each) { return each->has_left(); });
    }

    // At most `count` helpers that are free among the first `all_helpers`, each with `floats` floats.
    static std::vector<Helper*> reserve(int64_t count, int64_t all_helpers, int64_t floats) {
        std::vector<Helper*> found;
        if (count <= 0) return found;
        Helpers& own = *current();
        const std::lock_guard<std::mutex> guard(own.mutex_);
        constexpr int64_t most = 64;
        for (std::size_t i = 0; i < std::size_t(std::min(all_helpers, most)) && found.size() < std::size_t(count);
             ++i) {
            if (i == own.helpers_.size() && !own.add()) break;
            if (own.helpers_[i]->reserve(floats)) found.push_back(own.helpers_[i]);
        }
        return found;
    }

private:
    std::mutex mutex_;
    std::vector<Helper*> helpers_;
    std::vector<std::unique_ptr<Kept>> kept_;

    // A forked child has none of its parent's threads: it begins anew, and never touches the old ones.
    static Helpers*& current() {
        static Helpers* helpers = [] {
            (void)pthread_atfork(nullptr, nullptr, [] { current() = new Helpers; });
            return new Helpers;
        }();
        return helpers;
    }

    bool add() {
        Helper* helper = new Helper;
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are the program's own threads' affair
        bool is_running = true;
        try {
            std::thread([helper] {
#if defined(SCHED_IDLE)
                const sched_param none{};
                (void)sched_setscheduler(0, SCHED_IDLE, &none);
#endif
                helper->run();
            }).detach();
            helpers_.push_back(helper);
        } catch (const std::system_error&) {  // no more threads: the search runs without
            delete helper;
            is_running = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return is_running;
    }
};

}  // namespace decode
}  // namespace depthlstm
