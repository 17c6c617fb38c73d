// layer_attend without Python and torch: one dtype and mixed ones, every choice of parameters and gradients.
#include <memory>

#include "layer_attend/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

struct Case {
    DType even, odd, widest, parameters;  // of the sources with even and odd numbers, of u, of the parameters
    int64_t features, sources;
    bool rms, has_key_weight, has_norm, has_bias;
    bool source_gradients, query_gradient, affine_gradient;
};

void run(const LayerAttendKernels& kernels, const Case& test) {
    const int64_t C = test.features, L = test.sources, gap = C % 2 ? 3 : 0;
    std::vector<std::unique_ptr<Matrix>> x, dx;
    std::vector<Source> sources;
    for (int64_t l = 0; l < L; ++l) {
        const DType type = l % 2 ? test.odd : test.even;
        x.push_back(std::make_unique<Matrix>(type, C, gap));
        x.back()->randomise();
        dx.push_back(std::make_unique<Matrix>(type, C));
        sources.push_back({x.back()->data, x.back()->stride, type, nullptr});
    }
    const DType type = test.parameters;
    Buffer query(type, C), key_weight(type, C), weight(type, C), bias(type, C);
    Buffer dquery(type, C), dkey_weight(type, C), dweight(type, C), dbias(type, C);
    Matrix du(test.widest, C, gap), u(test.widest, C);
    for (Buffer* input : std::initializer_list<Buffer*>{&query, &key_weight, &weight, &bias, &du}) input->randomise();
    for (int64_t d = 0; d < C; ++d) query.set(d, query.get(d) / 2);  // scores that leave more than one source a share

    LayerAttendCall call;
    call.rows = kRows;
    call.features = C;
    call.sources = L;
    call.dtype = test.widest;
    call.uniform = test.even == test.widest && test.odd == test.widest;
    call.stream = C % 64 == 0 && size_of(test.widest) > 2;
    call.norm = test.rms ? Normalisation::rms : Normalisation::layer;
    call.eps = 1e-3;
    call.source = sources.data();
    call.query = {query.data, type, nullptr};
    if (test.has_key_weight) call.key_weight = {key_weight.data, type, nullptr};
    if (test.has_norm) call.weight = {weight.data, type, nullptr};
    if (test.has_norm && test.has_bias) call.bias = {bias.data, type, nullptr};
    LayerAttendCall forward = call;
    forward.u = u.written();
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kRows);
    }
    LayerAttendCall backward = call;
    backward.du = du.rows();
    backward.source_gradients = test.source_gradients;
    backward.query_gradient = test.query_gradient;
    backward.affine_gradient = test.affine_gradient && test.has_norm;
    for (int64_t l = 0; l < L && test.source_gradients; ++l) sources[l].gradient = dx[l]->data;
    if (test.query_gradient) backward.query.gradient = dquery.data;
    if (test.query_gradient && test.has_key_weight) backward.key_weight.gradient = dkey_weight.data;
    if (backward.affine_gradient) backward.weight.gradient = dweight.data;
    if (backward.affine_gradient && test.has_bias) backward.bias.gradient = dbias.data;
    const bool sums = test.query_gradient || backward.affine_gradient;
    {
        const int64_t partial_bytes = sums ? kernels.partial_bytes(backward) : 0;
        Scratch packed(kernels.packed_bytes(backward)), scratch(kernels.scratch_bytes(backward));
        Scratch partials(2 * partial_bytes);
        kernels.pack(backward, packed.data);
        kernels.backward(backward, packed.data, scratch.data, sums ? partials.data : nullptr, 0, 1);
        kernels.backward(backward, packed.data, scratch.data, sums ? partials.data + partial_bytes : nullptr, 1, kRows);
        if (sums) kernels.reduce(backward, partials.data, 2);
    }

    Values wanted_u, wanted_dquery(C), wanted_dkey_weight(C);
    std::vector<Values> wanted_dx(L);
    const Buffer* none = nullptr;
    PlainNorm norm{test.has_norm ? &weight : none, test.has_norm && test.has_bias ? &bias : none, test.rms, call.eps};
    for (int64_t row = 0; row < kRows; ++row) {
        std::vector<Values> values(L);
        Values q(C), attended(C), dot(L), inverse(L), share(L), through(L);
        for (int64_t d = 0; d < C; ++d) q[d] = query.get(d) * (test.has_key_weight ? key_weight.get(d) : 1);
        double largest = -INFINITY, total = 0, mean = 0;
        for (int64_t l = 0; l < L; ++l) {
            values[l] = x[l]->row(row);
            double square = 0;
            for (int64_t d = 0; d < C; ++d) {
                square += values[l][d] * values[l][d] / double(C);
                dot[l] += q[d] * values[l][d];
            }
            inverse[l] = 1 / std::sqrt(square + call.eps);
            largest = std::fmax(largest, dot[l] * inverse[l]);
        }
        for (int64_t l = 0; l < L; ++l) total += std::exp(dot[l] * inverse[l] - largest);
        for (int64_t l = 0; l < L; ++l) {
            share[l] = std::exp(dot[l] * inverse[l] - largest) / total;
            attended = sum(1, attended, share[l], values[l]);
        }
        append(wanted_u, norm.apply(attended));
        const Values dy = norm.backward(du.row(row));
        for (int64_t l = 0; l < L; ++l) {
            for (int64_t d = 0; d < C; ++d) through[l] += dy[d] * values[l][d];
            mean += share[l] * through[l];
        }
        for (int64_t l = 0; l < L; ++l) {
            const double slope = share[l] * (through[l] - mean) * inverse[l];
            const double back = slope * dot[l] * inverse[l] * inverse[l] / double(C);
            append(wanted_dx[l], sum(1, sum(share[l], dy, slope, q), -back, values[l]));
            for (int64_t d = 0; d < C; ++d) {
                wanted_dquery[d] += slope * values[l][d] * (test.has_key_weight ? key_weight.get(d) : 1);
                wanted_dkey_weight[d] += slope * values[l][d] * query.get(d);
            }
        }
    }
    char words[160];
    std::snprintf(words, sizeof words,
                  "layer_attend: types %d and %d, parameters %d, C %d, L %d, rms %d, key %d, N %d, "
                  "bias %d, wants %d %d %d",
                  int(test.even), int(test.odd), int(type), int(C), int(L), test.rms, test.has_key_weight,
                  test.has_norm, test.has_bias, test.source_gradients, test.query_gradient, test.affine_gradient);
    const Problem problem{words, relative_error({test.even, test.odd, type})};
    compare(problem, "u", u, wanted_u);
    for (int64_t l = 0; l < L && test.source_gradients; ++l) compare(problem, "dx", *dx[l], wanted_dx[l]);
    if (test.query_gradient) compare(problem, "dquery", dquery, wanted_dquery);
    if (backward.key_weight.gradient != nullptr) compare(problem, "dkey_weight", dkey_weight, wanted_dkey_weight);
    if (backward.affine_gradient) compare(problem, "dweight", dweight, norm.dweight);
    if (backward.bias.gradient != nullptr) compare(problem, "dbias", dbias, norm.dbias);
}

}  // namespace

void smoke_layer_attend() {
    const LayerAttendKernels& kernels = *select_layer_attend_kernels();
    const DType f32 = DType::float32, f64 = DType::float64, bf16 = DType::bfloat16, f16 = DType::float16;
    // the sources' two, the widest of them, the parameters'
    const DType types[][4] = {{f32, f32, f32, f32}, {f64, f64, f64, f64},  {bf16, bf16, bf16, f32},
                              {f16, f16, f16, f16}, {bf16, f32, f32, f32}, {f16, bf16, f32, bf16},
                              {f32, f64, f64, f32}};
    for (const auto& type : types) {
        int number = 0;
        for (int64_t sources : {1, 2, 5, 13}) {
            for (int64_t features : {1, 2, 3, 4, 7, 15, 16, 17, 31, 33, 64, 130}) {
                at_the_end = ++number % 4 != 0;
                const bool rms = number % 3 == 0;
                run(kernels,
                    {type[0], type[1], type[2], type[3], features, sources, rms, number % 5 != 0, number % 7 != 0,
                     !rms && number % 2 == 0, number % 11 != 0, number % 13 != 0, number % 6 != 0});
            }
        }
    }
}

}  // namespace depthlstm::smoke
