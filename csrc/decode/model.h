// A model as the engine runs it: matrices, norms, cells and branches, found from a plan of integers.
//
// The plan is what Python sends (depthlstm_fast/decode/plan.py writes it), and what a blob begins with. Every offset
// into the blob follows from the plan, and is never read from memory.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "common/torch/tensors.h"
#include "cpu.h"
#include "depth_lstm/cpu.h"

namespace depthlstm {
namespace decode {

constexpr int64_t plan_version = 2;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out memory behind `base`. With base null it only counts.
class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        char* at = base_ == nullptr ? nullptr : base_ + used_;
        used_ = round_up(used_ + count * int64_t(sizeof(T)), 64);
        return reinterpret_cast<T*>(at);
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

struct Norm {
    int64_t features;
    bool rms;
    float eps;
    float *weight, *bias;
};

struct Cell {
    int64_t gates;  // matrix (K D, I + D)
    depthlstm::Norm norm;
    Activation activation;
    int64_t ffn_in, ffn_norm, ffn_out;  // matrix, norm, matrix; -1 without a feed-forward network
    bool has_affine;
    double eps;
    void* packed;

    bool has_network() const { return ffn_in >= 0; }
};

enum class Kind : int64_t { self, cross, added, concatenated, network };

// What reads the state, and the cell or the sum that writes it.
struct Branch {
    Kind kind;
    Activation activation;                              // of a network
    bool is_gated;                                      // a network's: act(first half of its inner rows) * second half
    int64_t self_in, self_out;                          // matrices ((H + 2 G) P, D) and (D, H P)
    int64_t cross_query, cross_keys_values, cross_out;  // (H P, D), (2 H P, D), (D, H P)
    int64_t network_in, network_out;
    int64_t cell;                     // -1: the output is added to h
    int64_t read_norm;                // -1: h is read as it is
    int64_t self_place, cross_place;  // among the self- and cross-attentions of its stack

    bool has_self() const { return kind == Kind::self || kind == Kind::added || kind == Kind::concatenated; }
    bool has_cross() const { return kind == Kind::cross || kind == Kind::added || kind == Kind::concatenated; }
};

struct Stack {
    std::vector<Branch> branches;
    int64_t norm;  // -1: none
    bool has_initial_cell;
    float* initial_cell;
    bool has_positions;
    float *embedding, *positions;  // positions: null without a table
    int64_t vocabulary;
    int64_t self_attentions = 0, cross_attentions = 0;
};

// Reads a plan's numbers in their order.
class PlanReader {
public:
    PlanReader(const int64_t* numbers, int64_t count) : numbers_(numbers), count_(count) {}
    int64_t next(const char* name, int64_t least, int64_t most) {
        STD_TORCH_CHECK(at_ < count_, "plan must go on with ", name, "; found its end after ", count_, " numbers");
        const int64_t found = numbers_[at_++];
        STD_TORCH_CHECK(found >= least && found <= most, "plan must have a ", name, " from ", least, " to ", most,
                        "; found ", found);
        return found;
    }
    void end() const { STD_TORCH_CHECK(at_ == count_, "plan must have ", at_, " numbers; found ", count_); }

private:
    const int64_t* numbers_;
    int64_t count_, at_ = 0;
};

class Model {
public:
    int64_t features, heads, head_size, width, max_length, pad, bos, eos;  // D, H, D / H, P; eos -1: no token ends
    int64_t key_heads;                                                     // G: of keys and values, each for H / G
    bool shares_embeddings;
    bool has_rotation;  // of queries and keys, by their position
    float* rotation;    // (max_length, 2, D / H / 2): cosines and sines
    std::vector<Panels> matrices;
    std::vector<Norm> norms;
    std::vector<Cell> cells;
    Stack encoder, decoder;
    int64_t output;
    int64_t most_input = 0, most_inner = 0;  // of all cells, and of all networks
    int64_t bytes = 0;

    Model(const int64_t* numbers, int64_t count, const double* reals, int64_t real_count) {
        constexpr int64_t large = int64_t(1) << 24;
        PlanReader plan(numbers, count);
        plan.next("version", plan_version, plan_version);
        features = plan.next("width of the model", 1, 65536);
        heads = plan.next("number of heads", 1, 65536);
        head_size = plan.next("size of a head", 1, 65536);
        STD_TORCH_CHECK(heads * head_size == features, "plan must have heads that fill the width ", features);
        width = round_up(head_size, key_block);
        key_heads = plan.next("number of heads of keys", 1, heads);
        STD_TORCH_CHECK(heads % key_heads == 0, "plan must have heads of keys that divide the ", heads, " heads");
        encoder.vocabulary = plan.next("source vocabulary", 0, int64_t(1) << 30);
        decoder.vocabulary = plan.next("target vocabulary", 2, int64_t(1) << 30);
        max_length = plan.next("longest sequence", 1, large);
        pad = plan.next("pad id", 0, decoder.vocabulary - 1);
        bos = plan.next("bos id", 0, decoder.vocabulary - 1);
        eos = plan.next("eos id", -1, decoder.vocabulary - 1);
        shares_embeddings = plan.next("flag of shared embeddings", 0, has_encoder() ? 1 : 0) != 0;
        has_rotation = plan.next("flag of rotary positions", 0, (has_encoder() || head_size % 2 != 0) ? 0 : 1) != 0;
        STD_TORCH_CHECK(!has_encoder() || key_heads == heads, "plan must have as many heads of keys beside an encoder");
        const int64_t matrix_count = plan.next("number of matrices", 1, 65536);
        const int64_t norm_count = plan.next("number of norms", 0, 65536);
        const int64_t cell_count = plan.next("number of cells", 0, 65536);
        const int64_t encoder_count = plan.next("number of encoder branches", 0, has_encoder() ? 65536 : 0);
        const int64_t decoder_count = plan.next("number of decoder branches", 1, 65536);
        output = plan.next("output matrix", 0, matrix_count - 1);
        for (Stack* stack : {&encoder, &decoder}) {
            stack->norm = plan.next("norm of a stack", -1, norm_count - 1);
            stack->has_initial_cell = plan.next("flag of an initial cell", 0, 1) != 0;
            stack->has_positions = plan.next("flag of positions", 0, 1) != 0;
        }
        // the last one is the base of the angles, whose table comes with the weights
        const int64_t wanted_reals = norm_count + cell_count + (has_rotation ? 1 : 0);
        STD_TORCH_CHECK(real_count == wanted_reals, "reals must hold ", wanted_reals, " numbers; found ", real_count);
        for (int64_t i = 0; i < matrix_count; ++i) {
            Panels matrix;
            matrix.outputs = plan.next("number of outputs", 1, int64_t(1) << 30);
            matrix.inputs = plan.next("number of inputs", 1, large);
            matrix.type = WeightType(plan.next("type of weights", 0, int64_t(WeightType::int8)));
            matrices.push_back(matrix);
        }
        for (int64_t i = 0; i < norm_count; ++i) {
            Norm norm{};
            norm.features = plan.next("width of a norm", 1, large);
            norm.rms = plan.next("kind of a norm", 0, 1) != 0;
            norm.eps = float(reals[i]);
            STD_TORCH_CHECK(norm.eps >= 0, "reals must not be negative");
            norms.push_back(norm);
        }
        for (int64_t i = 0; i < cell_count; ++i) cells.push_back(read_cell(plan, reals[norm_count + i]));
        for (int64_t i = 0; i < encoder_count; ++i) encoder.branches.push_back(read_branch(plan, encoder, false));
        for (int64_t i = 0; i < decoder_count; ++i) decoder.branches.push_back(read_branch(plan, decoder, true));
        plan.end();
        check_matrix(output, decoder.vocabulary, features);
        check_norm(encoder.norm, features);
        check_norm(decoder.norm, features);
        place(nullptr);
    }

    // Without an encoder it is a language model: what comes in is the beginning of what goes out.
    bool has_encoder() const { return encoder.vocabulary > 0; }
    int64_t input_vocabulary() const { return has_encoder() ? encoder.vocabulary : decoder.vocabulary; }
    // Floats of a position's keys, or of its values, in one layer; and what a self-attention's product makes.
    int64_t key_floats() const { return key_heads * width; }
    int64_t self_floats() const { return (heads + 2 * key_heads) * width; }

    // Sets every pointer into the memory behind `base`, or with null counts its bytes.
    void place(char* base) {
        Arena arena(base);
        for (Panels& matrix : matrices) {
            const int64_t padded = round_up(matrix.outputs, panel_outputs);
            matrix.weights = arena.take<char>(padded * weight_bytes(matrix));
            matrix.bias = arena.take<float>(padded);
            if (matrix.type == WeightType::int8) matrix.scale = arena.take<float>(padded);
        }
        for (Norm& norm : norms) {
            norm.weight = arena.take<float>(norm.features);
            norm.bias = arena.take<float>(norm.features);
        }
        for (Cell& cell : cells) {
            cell.packed = arena.take<char>(kernels_of_gates().packed_bytes(gates_call(cell)));
        }
        for (Stack* stack : {&encoder, &decoder}) {
            const bool shared = stack == &decoder && shares_embeddings;
            stack->embedding = shared ? encoder.embedding : arena.take<float>(stack->vocabulary * features);
            stack->positions = stack->has_positions ? arena.take<float>(max_length * features) : nullptr;
            stack->initial_cell = stack->has_initial_cell ? arena.take<float>(features) : nullptr;
        }
        rotation = has_rotation ? arena.take<float>(max_length * head_size) : nullptr;
        bytes = arena.used();
    }

    // The gates of a cell, without rows.
    GatesCall gates_call(const Cell& cell) const {
        static char forward_pass;
        GatesCall call;
        call.features = features;
        call.norm = cell.norm;
        call.activation = cell.has_network() ? Activation::given : cell.activation;
        call.eps = cell.eps;
        call.h.data = &forward_pass;  // which the kernels' pack asks for
        return call;
    }

    static const GatesKernels& kernels_of_gates() {
        const GatesKernels* chosen = select_gates_kernels();
        STD_TORCH_CHECK(chosen != nullptr, "DEPTHLSTM_CPU_ISA must name an instruction set of this build and CPU");
        return *chosen;
    }

    float attention_scale() const { return float(1 / std::sqrt(double(head_size))); }

    int64_t cell_input(const Cell& cell) const { return matrices[cell.gates].inputs - features; }

private:
    void check_matrix(int64_t index, int64_t outputs, int64_t inputs) const {
        const Panels& matrix = matrices[index];
        STD_TORCH_CHECK(matrix.outputs == outputs && matrix.inputs == inputs, "plan must have a matrix ", index,
                        " of shape (", outputs, ", ", inputs, "); found (", matrix.outputs, ", ", matrix.inputs, ")");
    }

    void check_norm(int64_t index, int64_t wanted) const {
        STD_TORCH_CHECK(index < 0 || norms[index].features == wanted, "plan must have a norm ", index, " of ", wanted,
                        " features");
    }

    int64_t matrix_of(PlanReader& plan, bool is_used, const char* name) const {
        return plan.next(name, is_used ? 0 : -1, is_used ? int64_t(matrices.size()) - 1 : -1);
    }

    Cell read_cell(PlanReader& plan, double eps) {
        Cell cell{};
        cell.gates = plan.next("matrix of a cell", 0, int64_t(matrices.size()) - 1);
        cell.norm = depthlstm::Norm(plan.next("norm of a cell", 0, int64_t(depthlstm::Norm::none)));
        cell.activation = Activation(plan.next("activation of a cell", 0, int64_t(Activation::given) - 1));
        cell.ffn_in = plan.next("matrix of a cell's network", -1, int64_t(matrices.size()) - 1);
        const bool network = cell.has_network();
        cell.ffn_norm =
            plan.next("norm of a cell's network", network ? 0 : -1, network ? int64_t(norms.size()) - 1 : -1);
        cell.ffn_out = matrix_of(plan, network, "matrix of a cell's network");
        cell.has_affine = plan.next("flag of a cell's affine", 0, 1) != 0;
        cell.eps = eps;
        STD_TORCH_CHECK(eps >= 0, "reals must not be negative");
        STD_TORCH_CHECK(cell.norm != depthlstm::Norm::none || !cell.has_affine,
                        "plan must have no affine beside a cell without a norm");
        const int64_t input = matrices[cell.gates].inputs - features;
        STD_TORCH_CHECK(input == features || input == 2 * features, "plan must have cells of D or 2 D inputs; found ",
                        input);
        check_matrix(cell.gates, (network ? 3 : 4) * features, input + features);
        if (network) {
            const int64_t inner = matrices[cell.ffn_in].outputs;
            check_matrix(cell.ffn_in, inner, input + features);
            check_matrix(cell.ffn_out, features, inner);
            check_norm(cell.ffn_norm, inner);
            most_inner = std::max(most_inner, inner);
        }
        most_input = std::max(most_input, input);
        return cell;
    }

    Branch read_branch(PlanReader& plan, Stack& stack, bool is_decoder) {
        Branch branch{};
        branch.kind = Kind(plan.next("kind of branch", 0, int64_t(Kind::network)));
        branch.activation = Activation(plan.next("activation of a branch", 0, int64_t(Activation::given) - 1));
        const bool self = branch.has_self(), cross = branch.has_cross(), network = branch.kind == Kind::network;
        branch.is_gated = plan.next("flag of a gated network", 0, network ? 1 : 0) != 0;
        STD_TORCH_CHECK((is_decoder && has_encoder()) || !cross,
                        "plan must have cross-attention beside an encoder alone");
        branch.self_in = matrix_of(plan, self, "matrix of a self-attention");
        branch.self_out = matrix_of(plan, self, "matrix of a self-attention");
        branch.cross_query = matrix_of(plan, cross, "matrix of a cross-attention");
        branch.cross_keys_values = matrix_of(plan, cross, "matrix of a cross-attention");
        branch.cross_out = matrix_of(plan, cross, "matrix of a cross-attention");
        branch.network_in = matrix_of(plan, network, "matrix of a network");
        branch.network_out = matrix_of(plan, network, "matrix of a network");
        branch.cell = plan.next("cell of a branch", -1, int64_t(cells.size()) - 1);
        branch.read_norm = plan.next("norm of a branch", -1, int64_t(norms.size()) - 1);
        check_norm(branch.read_norm, features);
        const int64_t heads_width = heads * width;
        if (self) {
            check_matrix(branch.self_in, self_floats(), features);
            check_matrix(branch.self_out, features, heads_width);
            branch.self_place = stack.self_attentions++;
        }
        if (cross) {
            check_matrix(branch.cross_query, heads_width, features);
            check_matrix(branch.cross_keys_values, 2 * heads_width, features);
            check_matrix(branch.cross_out, features, heads_width);
            branch.cross_place = stack.cross_attentions++;
        }
        if (network) {
            const int64_t inner = matrices[branch.network_in].outputs, halves = branch.is_gated ? 2 : 1;
            STD_TORCH_CHECK(inner % halves == 0, "plan must have an even width of a gated network");
            check_matrix(branch.network_in, inner, features);
            check_matrix(branch.network_out, features, inner / halves);
            most_inner = std::max(most_inner, inner);
        }
        const bool both = branch.kind == Kind::concatenated;
        STD_TORCH_CHECK(!both || branch.cell >= 0, "plan must have a cell behind concatenated attentions");
        STD_TORCH_CHECK(branch.cell < 0 || cell_input(cells[branch.cell]) == (both ? 2 : 1) * features,
                        "plan must have cells as wide as their branches");
        return branch;
    }
};

}  // namespace decode
}  // namespace depthlstm
