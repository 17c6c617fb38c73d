// One call on a search, in its threads.
#pragma once

#include <deque>
#include <memory>

#include "state.h"

namespace depthlstm {
namespace decode {

// One call on a search. Helpers may read its parts when it is over: these are kept until they have left.
class Running {
public:
    Running(const Tensor& blob, const Tensor& bytes, Model model, State state)
        : call_(new Call(blob, bytes, std::move(model), std::move(state))) {}
    Running(const Tensor& blob, const Tensor& bytes) : Running(blob, bytes, open_blob(blob)) {}
    Running(const Tensor& blob, const Tensor& bytes, const Model& model)
        : Running(blob, bytes, model, open_state(bytes, model, blob)) {}
    ~Running() {
        for (Team& team : call_->teams) team.finish();
        for (Team& team : call_->teams) team.await_helpers();
        Helpers::keep(std::move(call_));
    }
    const Model& model() const { return call_->model; }
    State& state() const { return call_->state; }

    // lead(part, team) runs each part, in a thread of its own beside the part's helpers.
    template <class Lead>
    void run(Lead lead) {
        State& own = state();
        const int64_t all_helpers = own.head.threads - own.head.parts;
        for (const Part& part : own.parts) call_->teams.emplace_back(part.helpers, all_helpers, part.scratch.floats);
        torch::stable::parallel_for(0, own.head.parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                lead(own.parts[i], call_->teams[i]);
                call_->teams[i].finish();
            }
        });
    }

private:
    struct Call final : Kept {
        Tensor blob, bytes;
        Model model;
        State state;
        std::deque<Team> teams;

        Call(const Tensor& blob, const Tensor& bytes, Model model, State state)
            : blob(blob), bytes(bytes), model(std::move(model)), state(std::move(state)) {}
        bool has_left() override {
            return std::all_of(teams.begin(), teams.end(), [](Team& team) { return team.has_left(); });
        }
    };
    std::unique_ptr<Call> call_;
};

// Sets how the threads are divided. Where large products are most of the work, up to four threads share those of one
// part. Otherwise each thread takes sources of its own, for which it reads all weights again.
inline void divide(const Model& model, int64_t threads, StateHead& head) {
    constexpr int64_t most_of_team = 4;
    threads = std::min<int64_t>(threads, 1024);
    head.parts = std::min((threads + most_of_team - 1) / most_of_team, head.sources);
    head.threads = std::min(threads, head.parts * (Team::most_helpers + 1));
    double shared = 0, all = 0;
    for (const Panels& matrix : model.matrices) {
        const int64_t rows = head.sources * head.beams / head.parts;
        const double ns = panel_ns(matrix, rows) * double(matrix.outputs) / panel_outputs;
        all += ns;
        if (is_shared(matrix, rows)) shared += ns;
    }
    if (2 * shared < all) head.parts = head.threads = std::min(threads, head.sources);
}

}  // namespace decode
}  // namespace depthlstm
