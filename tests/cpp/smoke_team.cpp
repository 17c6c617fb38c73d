// A leader and its helpers without Python and torch: every chunk is counted once, whatever the helpers do.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>

#include "decode/team.h"

namespace {

using depthlstm::decode::Team;
using Clock = std::chrono::steady_clock;
int checks = 0, failures = 0;
// Of helpers: chunks that they began with, and chunks that they came back with late.
std::atomic<int64_t> claimed{0}, late{0}, released{0};

void check(bool is_right, const char* what) {
    ++checks;
    if (is_right) return;
    ++failures;
    std::printf("team: %s is wrong\n", what);
}

// Whether it came true in time: helpers wait for an idle core.
template <class Condition>
bool wait_for(Condition condition, int milliseconds = 60'000) {
    const Clock::time_point began = Clock::now();
    while (!condition()) {
        if (Clock::now() - began > std::chrono::milliseconds(milliseconds)) return false;
        usleep(50);
    }
    return true;
}

// Chunk i adds i + salt to its floats.
struct Add {
    float* out;
    int64_t each;
    float salt;
    int64_t wanted = 0;    // claimed chunks that the leader waits for in a chunk of its own
    int64_t held = 0;      // helpers keep a chunk until so much is released
    int64_t releases = 0;  // what the leader releases, and the late chunks that it waits for then
    int64_t wanted_late = 0;
    bool is_too_late = false;  // helpers keep a chunk until the task is over

    int64_t chunk_floats() const { return each; }
    void place(int64_t chunk, const float* result) const { std::memcpy(out + chunk * each, result, size_t(each) * 4); }
    void run(int64_t chunk, const Team::Worker& worker) const {
        const float* base = out + chunk * each;
        float* to = worker.result == nullptr ? out + chunk * each : worker.result;
        for (int64_t i = 0; i < each; ++i) to[i] = base[i] + float(chunk) + salt;
        if (worker.result == nullptr) {
            wait_for([&] { return claimed >= wanted; });
            if (releases == 0) return;
            released = releases;
            wait_for([&] { return late >= wanted_late; });
            usleep(1000);  // the late helper reports
            return;
        }
        ++claimed;
        worker.scratch[0] = float(chunk);
        if (held == 0 && !is_too_late) return;
        while (is_too_late ? worker.is_current() : released < held) {
        }
        for (int64_t i = 0; i < each; ++i) to[i] = NAN;
        ++late;
    }
};

void add(Team& team, int64_t chunks, int64_t each, Add task = {}) {
    static float salt = 0;
    salt = salt < 1000 ? salt + 0.25f : 0;
    // kept: a helper that comes back late still reads it
    static std::vector<float>& out = *new std::vector<float>(std::size_t(4 * (Team::result_floats + 1)));
    std::fill_n(out.begin(), chunks * each, 100.0f);
    task.out = out.data();
    task.each = each;
    task.salt = salt;
    team.share(task, chunks);
    bool is_right = true;
    for (int64_t i = 0; i < chunks * each; ++i) {
        is_right = is_right && out[std::size_t(i)] == 100 + float(i / each) + salt;
    }
    check(is_right, "a shared task");
}

Add waiting(int64_t chunks) {
    Add task{};
    task.wanted = claimed + chunks;
    return task;
}

void end(Team& team) {
    team.finish();
    check(wait_for([&] { return team.has_left(); }), "the end of a team");
}

void many(Team& team) {
    const int64_t before = claimed;
    add(team, 12, 5, waiting(3));
    check(claimed >= before + 3, "help");
    for (int64_t round = 0, floats = 1; round < 2000; ++round) {
        floats = floats * 7 % 1009;
        add(team, 1 + round % 40, 1 + floats, round % 20 == 0 ? waiting(round % 40 > 0) : Add{});
    }
    add(team, Team::most_chunks, 1);
    add(team, 3, Team::result_floats + 1);  // no helper has room for a chunk
}

// A helper whose chunk was taken from it learns that the task is over, and goes on with the next one.
void too_late(Team& team) {
    for (int round = 0; round < 5; ++round) {
        const int64_t before = late;
        Add task = waiting(1);
        task.is_too_late = true;
        add(team, 8, 50, task);
        check(wait_for([&] { return late > before; }), "the end of a task");
        add(team, 12, 5, waiting(1));
    }
}

// One helper comes back with a chunk of the first task while another one has the same chunk of the second.
void crossed(Team& team) {
    for (int round = 0; round < 10; ++round) {
        released = 0;
        Add first = waiting(1);
        first.held = 1;
        add(team, 2, 9, first);
        Add second = waiting(1);
        second.held = 2;
        second.releases = 1;
        second.wanted_late = late + 1;
        add(team, 2, 9, second);
        released = 2;
        check(wait_for([&] { return late >= second.wanted_late + 1; }), "the return of both helpers");
    }
}

void full(Team& team) {
    const int64_t before = claimed;
    add(team, 4, Team::result_floats / 2 + 1, waiting(1));
    usleep(1000);
    check(claimed == before + 1, "the number of chunks that a helper holds");
}

}  // namespace

int smoke_team() {
    {
        Team team(2, 2, 1);
        check(team.helpers() == 2, "the number of helpers");
        Team other(2, 2, 1);
        check(other.helpers() == 0, "the number of helpers beside another team");
        add(other, 5, 3);
        many(team);
        crossed(team);
        end(team);
    }
    {
        Team team(1, 2, 1000);
        check(team.helpers() == 1, "the number of helpers that were free again");
        too_late(team);
        full(team);
        end(team);
    }
    const pid_t child = fork();
    if (child == 0) {  // it has helpers of its own
        failures = 0;
        Team team(2, 2, 1);
        many(team);
        end(team);
        _exit(failures == 0 ? 7 : 3);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 7, "a forked child's team");
    std::printf("smoke: team, %d checks, %d wrong\n", checks, failures);
    return failures;
}
