// The operators of the decode engine over libtorch's stable ABI. The headers have what they do.
#include <algorithm>

#include "running.h"
#include "search.h"

namespace depthlstm {
namespace decode {
namespace {

using Tensors = std::vector<Tensor>;

const float* floats_of(const Tensor& tensor, int64_t elements, const char* argument) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && dtype_code(tensor) == aoti_torch_dtype_float32(),
                    argument, " must hold contiguous float32 tensors on the CPU");
    STD_TORCH_CHECK(tensor.numel() == elements, argument, " must hold a tensor of ", elements, " elements; found ",
                    tensor.numel());
    return static_cast<const float*>(tensor.const_data_ptr());
}

void check_numbers(const Tensor& tensor, int32_t dtype, const char* argument) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.dim() == 1 && dtype_code(tensor) == dtype,
                    argument, " must be a contiguous tensor of one dimension on the CPU, int64 or float64");
}

// An empty tensor stands for None.
Tensor decode_pack(const Tensor& plan, const Tensor& reals, const Tensors& weights) {
    check_numbers(plan, aoti_torch_dtype_int64(), "plan");
    check_numbers(reals, aoti_torch_dtype_float64(), "reals");
    const int64_t* numbers = static_cast<const int64_t*>(plan.const_data_ptr());
    const double* given_reals = static_cast<const double*>(reals.const_data_ptr());
    Model model(numbers, plan.numel(), given_reals, reals.numel());
    std::size_t at = 0;
    const auto next = [&](int64_t elements, bool is_optional) -> const float* {
        STD_TORCH_CHECK(at < weights.size(), "weights must hold more than ", weights.size(), " tensors");
        const Tensor& tensor = weights[at++];
        if (is_optional && tensor.numel() == 0) return nullptr;
        return floats_of(tensor, elements, "weights");
    };
    const int64_t begin = weights_begin(plan.numel(), reals.numel()), bytes = begin + model.bytes;
    const int64_t sizes[] = {bytes};
    Tensor blob = empty(sizes, 1, aoti_torch_dtype_uint8(), device_of(plan));
    char* memory = static_cast<char*>(blob.mutable_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "torch must give memory at multiples of 64 bytes");
    use_huge_pages(blob, bytes);  // before the first touch
    std::memset(memory, 0, std::size_t(bytes));
    model.place(memory + begin);
    for (const Panels& matrix : model.matrices) {
        const float* weight = next(matrix.outputs * matrix.inputs, false);
        kernels().pack(matrix, weight, next(matrix.outputs, true));
    }
    const auto copy = [](float* to, const float* from, int64_t count, float otherwise) {
        for (int64_t i = 0; i < count; ++i) to[i] = from == nullptr ? otherwise : from[i];
    };
    for (const Norm& norm : model.norms) {
        copy(norm.weight, next(norm.features, true), norm.features, 1);
        copy(norm.bias, next(norm.features, true), norm.features, 0);
    }
    for (const Cell& cell : model.cells) {
        GatesCall call = model.gates_call(cell);
        const int64_t elements = model.matrices[cell.gates].outputs;
        if (cell.has_affine) {
            call.weight = next(elements, false);
            call.bias = next(elements, false);
        }
        Model::kernels_of_gates().pack(call, cell.packed);
    }
    for (const Stack* stack : {&model.encoder, &model.decoder}) {
        const int64_t D = model.features, words = stack->vocabulary * D;
        const bool is_shared = stack == &model.decoder && model.shares_embeddings;
        if (words > 0 && !is_shared) copy(stack->embedding, next(words, false), words, 0);
        if (stack->has_positions) copy(stack->positions, next(model.max_length * D, false), model.max_length * D, 0);
        if (stack->has_initial_cell) copy(stack->initial_cell, next(D, false), D, 0);
    }
    const int64_t angles = model.max_length * model.head_size;  // cosines and sines of half as many
    if (model.has_rotation) copy(model.rotation, next(angles, false), angles, 0);
    STD_TORCH_CHECK(at == weights.size(), "weights must hold ", int64_t(at), " tensors; found ", weights.size());
    BlobHead head{};
    std::memcpy(head.magic, blob_magic, sizeof head.magic);
    head.format = blob_format;
    std::strncpy(head.isa, kernels().isa, sizeof head.isa - 1);
    head.bytes = bytes;
    head.plan_count = plan.numel();
    head.real_count = reals.numel();
    head.weights_sum = checksum(memory + begin, bytes - begin);
    std::memcpy(memory + plan_begin, numbers, std::size_t(8 * head.plan_count));
    std::memcpy(memory + plan_begin + 8 * head.plan_count, given_reals, std::size_t(8 * head.real_count));
    head.head_sum = head_sum(head, memory);
    std::memcpy(memory, &head, sizeof head);
    return blob;
}

// Raises unless every byte of the blob is as it was packed. The searches look at the head and the plan alone.
void decode_check(const Tensor& blob) {
    (void)open_blob(blob);
    const char* memory = static_cast<const char*>(blob.const_data_ptr());
    const BlobHead& head = *reinterpret_cast<const BlobHead*>(memory);
    const int64_t begin = weights_begin(head.plan_count, head.real_count);
    STD_TORCH_CHECK(head.weights_sum == checksum(memory + begin, head.bytes - begin),
                    "blob is damaged: its weights have another checksum");
}

// A number that changes with any bit of the tensors.
int64_t decode_fingerprint(const Tensors& weights) {
    uint64_t sum = 0;
    for (const Tensor& tensor : weights) {
        STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && dtype_code(tensor) == aoti_torch_dtype_float32(),
                        "weights must hold contiguous float32 tensors on the CPU");
        sum = checksum(tensor.const_data_ptr(), tensor.numel() * 4, sum);
    }
    return int64_t(sum);
}

// The sources without the positions that a mask of -inf forbids. Their keys would add nothing.
std::vector<SourceTokens> read_sources(const Model& model, const Tensor& source, const OptionalTensor& mask) {
    STD_TORCH_CHECK(source.is_cpu() && source.is_contiguous() && source.dim() == 2 &&
                        dtype_code(source) == aoti_torch_dtype_int64() && source.numel() > 0,
                    "source must be a contiguous int64 tensor (batch, length) on the CPU, neither of them 0");
    const int64_t batch = source.size(0), length = source.size(1);
    STD_TORCH_CHECK(length <= model.max_length, "source must have at most ", model.max_length, " tokens; found ",
                    length);
    const float* added = mask ? floats_of(*mask, batch * length, "mask") : nullptr;
    const int64_t* ids = static_cast<const int64_t*>(source.const_data_ptr());
    std::vector<SourceTokens> found(static_cast<std::size_t>(batch));
    for (int64_t row = 0; row < batch; ++row) {
        SourceTokens& tokens = found[row];
        for (int64_t t = 0; t < length; ++t) {
            const int64_t id = ids[row * length + t];
            STD_TORCH_CHECK(id >= 0 && id < model.input_vocabulary(), "source must hold ids from 0 to ",
                            model.input_vocabulary() - 1, "; found ", id);
            const float add = added == nullptr ? 0 : added[row * length + t];
            if (add == -INFINITY) continue;
            tokens.ids.push_back(int32_t(id));
            tokens.positions.push_back(int32_t(t));
            tokens.added.push_back(add);
            tokens.has_mask = tokens.has_mask || add != 0;
        }
        STD_TORCH_CHECK(model.has_encoder() || (!tokens.has_mask && !tokens.ids.empty()),
                        "mask of prompts must hold 0 and -inf alone, and 0 in each row");
    }
    return found;
}

std::vector<int32_t> lengths_of(const std::vector<SourceTokens>& sources) {
    std::vector<int32_t> lengths;
    for (const SourceTokens& tokens : sources) lengths.push_back(int32_t(tokens.ids.size()));
    return lengths;
}

uint64_t sum_of(const std::vector<SourceTokens>& sources) {
    uint64_t sum = sources.size();
    for (const SourceTokens& tokens : sources) {
        const int64_t count = int64_t(tokens.ids.size());
        sum = checksum(tokens.ids.data(), 4 * count, sum);
        sum = checksum(tokens.positions.data(), 4 * count, sum);
        sum = checksum(tokens.added.data(), 4 * count, sum);
    }
    return sum;
}

// The encoder's output (batch, length, D), with zeros where the mask forbids a position.
Tensor decode_encode(const Tensor& blob, const Tensor& source, const OptionalTensor& mask) {
    const Model model = open_blob(blob);
    STD_TORCH_CHECK(model.has_encoder(), "blob must have an encoder; found that of a language model");
    const std::vector<SourceTokens> sources = read_sources(model, source, mask);
    const std::vector<int32_t> lengths = lengths_of(sources);
    const int64_t batch = source.size(0), length = source.size(1), D = model.features;
    Arena counted(nullptr);
    (void)Part(counted, model, 0, batch, 1, 1, lengths.data(), 0);
    const int64_t scratch_sizes[] = {counted.used() + 64};
    const Tensor scratch = empty(scratch_sizes, 1, aoti_torch_dtype_uint8(), device_of(source));
    char* base = static_cast<char*>(scratch.mutable_data_ptr());
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    Arena arena(base);
    Part part(arena, model, 0, batch, 1, 1, lengths.data(), 0);
    const int64_t sizes[] = {batch, length, D};
    Tensor out = empty(sizes, 3, aoti_torch_dtype_float32(), device_of(source));
    float* to = static_cast<float*>(out.mutable_data_ptr());
    int64_t kept = 0;
    for (int32_t each : lengths) kept += each;
    std::vector<float> dense(static_cast<std::size_t>(kept * D));
    Team alone(0, 0, 0);
    Encoder encoder(model, part, sources, alone);
    float* next = dense.data();
    for (int64_t begin = 0, end = 0; begin < batch; begin = end) {
        end = encoder.run(begin, next);
        for (int64_t b = begin; b < end; ++b) next += lengths[b] * D;
    }
    std::memset(to, 0, std::size_t(batch * length * D) * 4);
    int64_t row = 0;
    for (int64_t b = 0; b < batch; ++b) {
        for (int32_t t : sources[b].positions) {
            std::memcpy(to + (b * length + t) * D, dense.data() + row++ * D, std::size_t(D) * 4);
        }
    }
    return out;
}

// Encodes some of the sources, or reads some positions of the prompts.
void read_some(const Model& model, const StateHead& head, Part& part, Team& team,
               const std::vector<SourceTokens>& sources) {
    int64_t& read = part.progress->read_sources;
    if (read == part.sources) return;
    if (model.has_encoder()) {
        read = Encoder(model, part, sources, team).run(read);
    } else {
        Search(model, head, part, team).read_prompts(sources);
    }
}

// Returns the state of a search that has read some of the sources or prompts; decode_read reads the others.
Tensor decode_start(const Tensor& blob, const Tensor& source, const OptionalTensor& mask, int64_t beams,
                    int64_t max_length, double length_penalty, bool scores, int64_t threads) {
    const Model model = open_blob(blob);
    STD_TORCH_CHECK(beams >= 1 && beams <= 4096, "beams must be from 1 to 4096; found ", beams);
    STD_TORCH_CHECK(max_length >= 1 && max_length <= model.max_length, "max_length must be from 1 to ",
                    model.max_length, "; found ", max_length);
    STD_TORCH_CHECK(std::isfinite(length_penalty), "length_penalty must be finite; found ", length_penalty);
    STD_TORCH_CHECK(threads >= 1, "threads must be at least 1; found ", threads);
    const std::vector<SourceTokens> sources = read_sources(model, source, mask);
    const std::vector<int32_t> lengths = lengths_of(sources);
    for (int32_t length : lengths) {
        STD_TORCH_CHECK(model.has_encoder() || length + max_length <= model.max_length,
                        "max_length must leave prompts room among ", model.max_length, " tokens; found ", max_length,
                        " beside a prompt of ", length);
    }
    StateHead head{};
    std::memcpy(head.magic, state_magic, sizeof head.magic);
    head.model = model_sum(blob);
    head.sources = source.size(0);
    head.beams = beams;
    head.max_length = max_length;
    divide(model, threads, head);
    head.given = sum_of(sources);
    head.wants_scores = scores;
    head.alpha = length_penalty;
    head.bytes = State(model, head, lengths.data(), nullptr).bytes;
    const int64_t sizes[] = {head.bytes};
    Tensor state = empty(sizes, 1, aoti_torch_dtype_uint8(), device_of(source));
    char* base = static_cast<char*>(state.mutable_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(base) % 64 == 0, "torch must give memory at multiples of 64 bytes");
    std::memcpy(base + lengths_begin, lengths.data(), lengths.size() * 4);
    head.sum = state_sum(head, base);
    std::memcpy(base, &head, sizeof head);
    Running call(blob, state, model, State(model, head, reinterpret_cast<const int32_t*>(base + lengths_begin), base));
    call.run([&](Part& part, Team& team) {
        Search(call.model(), head, part, team).start(sources);
        read_some(call.model(), head, part, team, sources);
    });
    return state;
}

// How many sources or prompts have not been read, or not to their end.
int64_t waiting(const State& state) {
    int64_t found = 0;
    for (const Part& part : state.parts) found += part.sources - part.progress->read_sources;
    return found;
}

// Reads some more of the sources or prompts that decode_start was given, with their mask. Returns how many wait.
int64_t decode_read(const Tensor& blob, const Tensor& state, const Tensor& source, const OptionalTensor& mask) {
    Running call(blob, state);
    const StateHead& head = call.state().head;
    const std::vector<SourceTokens> sources = read_sources(call.model(), source, mask);
    STD_TORCH_CHECK(sum_of(sources) == head.given, "source and mask must be those of decode_start");
    if (waiting(call.state()) > 0) {
        call.run([&](Part& part, Team& team) { read_some(call.model(), head, part, team, sources); });
    }
    return waiting(call.state());
}

void check_read(const State& state) {
    STD_TORCH_CHECK(waiting(state) == 0,
                    "state must have read all sources: call decode_read until it returns 0; found ", waiting(state),
                    " that wait");
}

// At most `steps` more tokens. Returns three numbers: the sources that go on, and where a logit was NaN the source and
// the token's place, else -1. The caller looks for signals between calls.
Tensor decode_advance(const Tensor& blob, const Tensor& state, int64_t steps) {
    STD_TORCH_CHECK(steps >= 1, "steps must be at least 1; found ", steps);
    Running call(blob, state);
    const State& found = call.state();
    check_read(found);
    call.run([&](Part& part, Team& team) { Search(call.model(), found.head, part, team).advance(steps); });
    const int64_t sizes[] = {3};
    Tensor out = empty(sizes, 1, aoti_torch_dtype_int64(), device_of(state));
    int64_t* numbers = static_cast<int64_t*>(out.mutable_data_ptr());
    numbers[0] = 0, numbers[1] = numbers[2] = -1;
    for (const Part& part : found.parts) {
        const Progress& at = *part.progress;
        numbers[0] += at.active;
        if (at.bad_source >= 0 && (numbers[2] < 0 || at.bad_step < numbers[2])) {
            numbers[1] = at.bad_source, numbers[2] = at.bad_step;
        }
    }
    return out;
}

// The next token's logits (sources, V) in a search of one beam whose tokens the caller chooses: `tokens` (sources) is
// None at the first step, and then what each source goes on with. A source that has been given eos has zeros from
// there.
Tensor decode_step(const Tensor& blob, const Tensor& state, const OptionalTensor& tokens) {
    Running call(blob, state);
    const Model& model = call.model();
    const State& found = call.state();
    const StateHead& head = found.head;
    check_read(found);
    STD_TORCH_CHECK(head.beams == 1, "state must have one beam; found ", head.beams);
    const int64_t V = model.decoder.vocabulary;
    const int64_t* ids = nullptr;
    if (tokens) {
        STD_TORCH_CHECK(tokens->is_cpu() && tokens->is_contiguous() && tokens->dim() == 1 &&
                            dtype_code(*tokens) == aoti_torch_dtype_int64() && tokens->numel() == head.sources,
                        "tokens must be a contiguous int64 tensor (", head.sources, ") on the CPU");
        ids = static_cast<const int64_t*>(tokens->const_data_ptr());
        for (int64_t i = 0; i < head.sources; ++i) {
            STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < V, "tokens must hold ids from 0 to ", V - 1, "; found ", ids[i]);
        }
    }
    for (const Part& part : found.parts) {
        const int64_t step = part.progress->step;
        STD_TORCH_CHECK(step < head.max_length, "state must have room for a token; found all ", step);
        STD_TORCH_CHECK((step > 0) == bool(tokens), "tokens must be None at the first step and given at the others");
    }
    const int64_t sizes[] = {head.sources, V};
    Tensor out = empty(sizes, 2, aoti_torch_dtype_float32(), device_of(state));
    float* logits = static_cast<float*>(out.mutable_data_ptr());
    std::memset(logits, 0, std::size_t(head.sources * V) * 4);
    call.run([&](Part& part, Team& team) {
        const int64_t* own = ids == nullptr ? nullptr : ids + part.first;
        Search(model, head, part, team).step_by_hand(own, logits + part.first * V);
    });
    return out;
}

// Tokens (batch, n), padded, and scores (batch) of the best hypotheses of a search that has ended.
std::tuple<Tensor, Tensor> decode_finish(const Tensor& blob, const Tensor& state) {
    const Model model = open_blob(blob);
    const State found = open_state(state, model, blob);
    int64_t longest = 0;
    for (const Part& part : found.parts) {
        STD_TORCH_CHECK(part.progress->active == 0 && part.progress->by_hand == 0,
                        "state must be that of a search that has ended");
        for (int64_t source = 0; source < part.sources; ++source) {
            longest = std::max<int64_t>(longest, part.hypothesis_length[source * part.beams]);
        }
    }
    const int64_t batch = found.head.sources, sizes[] = {batch, longest};
    Tensor tokens = empty(sizes, 2, aoti_torch_dtype_int64(), device_of(state));
    Tensor scores = empty(sizes, 1, aoti_torch_dtype_float32(), device_of(state));
    int64_t* to = static_cast<int64_t*>(tokens.mutable_data_ptr());
    float* score = static_cast<float*>(scores.mutable_data_ptr());
    for (const Part& part : found.parts) {
        for (int64_t source = 0; source < part.sources; ++source) {
            const int64_t best = source * part.beams, length = part.hypothesis_length[best];
            const int32_t* from = (part.beams > 1 ? part.hypotheses : part.said) + best * part.max_length;
            for (int64_t t = 0; t < longest; ++t) *to++ = t < length ? from[t] : model.pad;
            *score++ = part.hypothesis_score[best];
        }
    }
    return {tokens, scores};
}

}  // namespace
}  // namespace decode
}  // namespace depthlstm

#if !defined(DEPTHLSTM_NAMESPACE)
#define DEPTHLSTM_NAMESPACE depthlstm_fast
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(DEPTHLSTM_NAMESPACE, m) {
    m.def("decode_pack(Tensor plan, Tensor reals, Tensor[] weights) -> Tensor");
    m.def("decode_check(Tensor blob) -> ()");
    m.def("decode_fingerprint(Tensor[] weights) -> int");
    m.def("decode_encode(Tensor blob, Tensor source, Tensor? mask) -> Tensor");
    m.def(
        "decode_start(Tensor blob, Tensor source, Tensor? mask, int beams, int max_length, float length_penalty, bool "
        "scores, int threads) -> Tensor");
    m.def("decode_read(Tensor blob, Tensor(a!) state, Tensor source, Tensor? mask) -> int");
    m.def("decode_advance(Tensor blob, Tensor(a!) state, int steps) -> Tensor");
    m.def("decode_step(Tensor blob, Tensor(a!) state, Tensor? tokens) -> Tensor");
    m.def("decode_finish(Tensor blob, Tensor state) -> (Tensor tokens, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(DEPTHLSTM_NAMESPACE, CPU, m) {
    m.impl("decode_pack", TORCH_BOX(&depthlstm::decode::decode_pack));
    m.impl("decode_check", TORCH_BOX(&depthlstm::decode::decode_check));
    m.impl("decode_fingerprint", TORCH_BOX(&depthlstm::decode::decode_fingerprint));
    m.impl("decode_encode", TORCH_BOX(&depthlstm::decode::decode_encode));
    m.impl("decode_start", TORCH_BOX(&depthlstm::decode::decode_start));
    m.impl("decode_read", TORCH_BOX(&depthlstm::decode::decode_read));
    m.impl("decode_advance", TORCH_BOX(&depthlstm::decode::decode_advance));
    m.impl("decode_step", TORCH_BOX(&depthlstm::decode::decode_step));
    m.impl("decode_finish", TORCH_BOX(&depthlstm::decode::decode_finish));
}
