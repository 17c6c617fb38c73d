// This file is compiled without the sanitizers: only the kernels' own accesses are checked.
#include "scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "fiber.h"

namespace ptx {
namespace {

enum class State { ready, at_barrier, in_warp, finished };

struct Copy {
    u8* target;
    const u8* source;
    u32 size, source_size;
};

struct Thread {
    ThreadContext context;
    Fiber fiber;
    State state;
    const Location* at;  // where the thread waits
    u32 waits_for;       // the barrier's number, or the mask of lanes
    WarpOperation operation;
    void* order;  // the address that it acquires when it continues
    u32 barrier_result[3];
    u32 lane_values[32];
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> copy_groups;
};

struct Barrier {
    u32 arrived = 0, expected = 0, votes = 0;
    const Location* at = nullptr;
    void* order = nullptr;
    std::vector<Thread*> waiting;
    const Location* warp_at[32] = {};  // where threads of each warp wait
};

// Lanes of a warp at the same instruction.
struct Meeting {
    u32 mask, arrived = 0;
    WarpOperation operation;
    const Location* at;
    void* order;
    u32 values[32];
};

const char* const operation_names[] = {
    "bar.warp.sync", "shfl.sync.up", "shfl.sync.down", "shfl.sync.bfly", "shfl.sync.idx",
    "vote.sync",     "redux.sync",   "ldmatrix",       "stmatrix",
};

std::vector<std::unique_ptr<Thread>> made;  // kept from launch to launch
std::unique_ptr<Thread>* threads;           // of the running block
u32 block_threads;
u32 living;
Barrier barriers[16];
std::vector<std::vector<Meeting>> meetings;  // by warp
const Kernel* kernel;
const u8* const* kernel_parameters;
std::string error;
u64 random_state;

char launch_order, end_order, fence_order;  // addresses known to acquire() and release()
char order_pool[1 << 16];
u32 next_order;

// Each barrier and each __syncwarp orders by its own address. A late thread does not acquire the release of the next
// one.
void* new_order() { return &order_pool[next_order++ % sizeof(order_pool)]; }

u32 random_below(u32 bound) {
    random_state += 0x9e3779b97f4a7c15;
    u64 value = random_state;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return static_cast<u32>(((value ^ value >> 31) >> 32) * bound >> 32);
}
template <class T>
void shuffle_order(std::vector<T>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof(buffer), format, arguments);
    va_end(arguments);
    return buffer;
}
std::string text_of(const char* what, const Dimensions& index) {
    return text("%s (%u,%u,%u)", what, index.x, index.y, index.z);
}
std::string text_of(const Location& at) { return text("%s:%d", at.file, at.line); }

std::string text_of(WarpOperation operation, u32 mask) {
    return text("%s with mask 0x%08x", operation_names[int(operation)], mask);
}

Thread& running() {
    return *threads[current->thread.x +
                    current->block_size.x * (current->thread.y + current->block_size.y * current->thread.z)];
}

void wait(Thread& thread) {
    release(&end_order);  // a failed launch never resumes it
    thread.fiber.suspend();
    if (thread.order) acquire(thread.order);
}

void end_launch() {
    for (u32 i = 0; i < block_threads; i++) threads[i]->state = State::finished;
    living = 0;
}

void run_thread() {
    Fiber::enter();
    acquire(&launch_order);
    kernel->function(kernel_parameters);
    Thread& thread = running();
    {
        NotChecked scope;
        if ((!thread.open_copies.empty() || !thread.copy_groups.empty()) && error.empty()) {
            error = std::string(kernel->name) + ": a thread ends with cp.async copies that it never waited for";
        }
        thread.state = State::finished;
        living--;
    }
    release(&end_order);
    thread.fiber.finish();
}

// Arrives at a barrier. `waiting` is the thread that then waits for the others, if any.
void arrive(u32 identifier, u32 count, bool vote, const Location& at, Thread* waiting) {
    if (identifier >= 16) fail(at, "barrier %u of 0 to 15", identifier);
    Barrier& barrier = barriers[identifier];
    const u32 expected = count == all_threads ? block_threads : count;
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.at = &at;
        barrier.order = new_order();
    } else if (barrier.expected != expected) {
        fail(at, "barrier %u for %u threads here, for %u at %s", identifier, expected, barrier.expected,
             text_of(*barrier.at).c_str());
    } else if (count == all_threads && barrier.at != &at) {
        fail(at, "__syncthreads here, while other threads of the block wait in the one at %s",
             text_of(*barrier.at).c_str());
    }
    if (waiting) {
        const Location*& warp_at = barrier.warp_at[waiting->context.warp];
        if (warp_at && warp_at != &at) {
            fail(at, "barrier %u here, while other threads of the warp wait in the one at %s", identifier,
                 text_of(*warp_at).c_str());
        }
        warp_at = &at;
    }
    release(barrier.order);
    barrier.votes += vote;
    barrier.arrived++;
    if (waiting) {
        waiting->state = State::at_barrier;
        waiting->at = &at;
        waiting->waits_for = identifier;
        waiting->order = barrier.order;
        barrier.waiting.push_back(waiting);
    }
    if (barrier.arrived < barrier.expected) return;
    for (Thread* thread : barrier.waiting) {
        thread->state = State::ready;
        thread->barrier_result[int(Reduction::any)] = barrier.votes > 0;
        thread->barrier_result[int(Reduction::all)] = barrier.votes == barrier.arrived;
        thread->barrier_result[int(Reduction::count)] = barrier.votes;
    }
    barrier = Barrier();
}

void start_block(const LaunchSize& size, const Dimensions& block) {
    living = block_threads;
    for (Barrier& barrier : barriers) barrier = Barrier();
    meetings.assign((block_threads + 31) / 32, {});
    for (u32 i = 0; i < block_threads; i++) {
        Thread& thread = *threads[i];
        const Dimensions index = {i % size.block.x, i / size.block.x % size.block.y, i / size.block.x / size.block.y};
        thread.context = {index, block, size.block, size.grid, i % 32, i / 32, u32(size.dynamic_shared)};
        thread.state = State::ready;
        thread.open_copies.clear();
        thread.copy_groups.clear();
        thread.fiber.start(run_thread);
    }
}

std::string deadlock(const Dimensions& block) {
    std::map<std::string, std::pair<u32, const Thread*>> groups;
    u32 ended = 0;
    for (u32 i = 0; i < block_threads; i++) {
        const Thread& thread = *threads[i];
        if (thread.state == State::finished) {
            ended++;
        } else {
            const std::string place = thread.state == State::at_barrier ? text("barrier %u", thread.waits_for)
                                                                        : text_of(thread.operation, thread.waits_for);
            auto& group = groups[text_of(*thread.at) + " in " + place];
            if (group.first++ == 0) group.second = &thread;
        }
    }
    std::string report = text("%s %s: deadlock: ", kernel->name, text_of("block", block).c_str());
    report += text("%u threads have ended", ended);
    for (const auto& [place, group] : groups) {
        report += text("; %u wait at %s, first %s", group.first, place.c_str(),
                       text_of("thread", group.second->context.thread).c_str());
    }
    return report;
}

void run_block(const Dimensions& block) {
    std::vector<Thread*> ready;
    while (living > 0) {
        ready.clear();
        for (u32 i = 0; i < block_threads; i++) {
            if (threads[i]->state == State::ready) ready.push_back(threads[i].get());
        }
        if (ready.empty()) {
            error = deadlock(block);
            end_launch();
        }
        shuffle_order(ready);
        for (Thread* thread : ready) {
            if (thread->state != State::ready) continue;  // the launch has failed
            current = &thread->context;
            thread->fiber.resume();
        }
    }
}

}  // namespace

ThreadContext* current;

void fail(const Location& at, const char* format, ...) {
    {
        NotChecked scope;
        char message[512];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message, sizeof(message), format, arguments);
        va_end(arguments);
        if (error.empty()) {
            error = std::string(kernel->name) + " " + text_of("block", current->block) + " " +
                    text_of("thread", current->thread) + ": " + text_of(at) + ": " + message;
        }
        end_launch();
    }
    NotChecked::end_all();
    release(&end_order);
    running().fiber.finish();
}

void barrier(u32 identifier, u32 count, const Location& at) {
    barrier_reduce(identifier, count, Reduction::any, false, at);
}

u32 barrier_reduce(u32 identifier, u32 count, Reduction reduction, bool value, const Location& at) {
    Thread& thread = running();
    {
        NotChecked scope;
        arrive(identifier, count, value, at, &thread);
    }
    wait(thread);
    NotChecked scope;
    return thread.barrier_result[int(reduction)];
}

void barrier_arrive(u32 identifier, u32 count, const Location& at) {
    NotChecked scope;
    arrive(identifier, count, false, at, nullptr);
}

void fence() {
    acquire(&fence_order);
    release(&fence_order);
}

void exchange(u32 mask, WarpOperation operation, u32 value, const Location& at, u32 (&values)[32]) {
    Thread& thread = running();
    const u32 lane = thread.context.lane, warp = thread.context.warp;
    {
        NotChecked scope;
        if (!(mask >> lane & 1))
            fail(at, "lane %u calls %s, which leaves it out", lane, text_of(operation, mask).c_str());
        const bool orders = operation == WarpOperation::synchronize;
        std::vector<Meeting>& open = meetings[warp];
        auto meeting = std::find_if(open.begin(), open.end(), [&](const Meeting& other) {
            return other.mask == mask && other.operation == operation && (orders || other.at == &at);
        });
        if (meeting == open.end()) {
            open.push_back({.mask = mask,
                            .operation = operation,
                            .at = &at,
                            .order = orders ? new_order() : nullptr,
                            .values = {}});
            meeting = open.end() - 1;
        }
        meeting->values[lane] = value;
        meeting->arrived |= 1u << lane;
        if (orders) release(meeting->order);
        thread.state = State::in_warp;
        thread.at = &at;
        thread.waits_for = mask;
        thread.operation = operation;
        thread.order = meeting->order;
        if (meeting->arrived == mask) {
            for (u32 i = 0; i < 32; i++) {
                if (!(mask >> i & 1)) continue;
                Thread& other = *threads[warp * 32 + i];
                other.state = State::ready;
                memcpy(other.lane_values, meeting->values, sizeof(values));
            }
            open.erase(meeting);
        }
    }
    wait(thread);
    NotChecked scope;
    memcpy(values, thread.lane_values, sizeof(values));
}

void copy_async(u64 shared, u64 global, u32 size, u32 source_size, const Location& at) {
    u8* target = reinterpret_cast<u8*>(shared);
    const u8* source = reinterpret_cast<const u8*>(global);
    if (shared % size || global % size) fail(at, "misaligned cp.async of %u bytes", size);
    if (source_size > size) fail(at, "cp.async of %u bytes out of %u", size, source_size);
    begin_copy(target, source, size, source_size);
    NotChecked scope;
    running().open_copies.push_back({target, source, size, source_size});
}

void commit_copies() {
    NotChecked scope;
    Thread& thread = running();
    thread.copy_groups.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
}

void wait_for_copies(u32 groups_left) {
    Thread& thread = running();
    while (thread.copy_groups.size() > groups_left) {
        for (const Copy& copy : thread.copy_groups.front())
            finish_copy(copy.target, copy.source, copy.size, copy.source_size);
        NotChecked scope;
        thread.copy_groups.pop_front();
    }
}

std::string run_grid(const Kernel& launched, const LaunchSize& size, const u8* const* parameters, u64 seed) {
    constexpr u32 most_sanitizer_threads = 1024;  // each costs the sanitizer a millisecond, once
    kernel = &launched;
    kernel_parameters = parameters;
    error.clear();
    random_state = seed;
    block_threads = size.block.count();
    std::vector<u32> order(size.grid.count());
    for (u32 i = 0; i < order.size(); i++) order[i] = i;
    shuffle_order(order);

    // one batch happens before the next
    const u32 batch = races_are_checked() ? std::clamp(most_sanitizer_threads / block_threads, 1u, largest_batch) : 1;
    while (made.size() < std::min<size_t>(batch, order.size()) * block_threads)
        made.push_back(std::make_unique<Thread>());
    release(&launch_order);
    for (u32 i = 0; i < order.size() && error.empty(); i++) {
        if (i > 0 && i % batch == 0) {
            acquire(&end_order);
            release(&launch_order);
        }
        const u32 index = order[i];
        const Dimensions& first = size.first_block;
        const Dimensions block = {first.x + index % size.grid.x, first.y + index / size.grid.x % size.grid.y,
                                  first.z + index / size.grid.x / size.grid.y};
        threads = &made[i % batch * block_threads];
        prepare_shared_memory(launched, size.dynamic_shared, i % batch);
        start_block(size, block);
        run_block(block);
    }
    acquire(&end_order);
    if (!error.empty()) made.clear();  // some are in the middle of their kernel
    return error;
}

}  // namespace ptx
