// The gates of the depth-wise GRU without Python and torch: with a LayerNorm on each gate and without, in every type.
#include "depth_gru_gates/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

struct Case {
    DType z, h, weight, bias;
    int64_t features;
    bool has_norm, wants_affine;
};

void run(const GruKernels& kernels, const Case& test) {
    const int64_t D = test.features, width = gru_gates * D, gap = D % 2 ? 3 : 0;
    Matrix z(test.z, width, gap), h(test.h, D, gap), dh_out(test.h, D);
    Buffer weight(test.weight, width), bias(test.bias, width), dweight(test.weight, width), dbias(test.bias, width);
    for (Buffer* input : std::initializer_list<Buffer*>{&z, &h, &dh_out, &weight, &bias}) input->randomise();
    Matrix h_out(test.h, D), dz(test.z, width), dh(test.h, D);

    GruCall call;
    call.rows = kRows;
    call.features = D;
    call.z_dtype = test.z;
    call.h_dtype = test.h;
    call.weight_dtype = test.weight;
    call.bias_dtype = test.bias;
    call.eps = 1e-3;
    call.stream = D % 64 == 0;
    call.z = z.rows();
    call.h = h.rows();
    if (test.has_norm) call.weight = weight.data, call.bias = bias.data;
    GruCall forward = call;
    forward.h_out = h_out.written();
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        if (test.has_norm) kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kRows);
    }
    GruCall backward = call;
    backward.dh_out = {dh_out.data, D % 3 == 0 ? 0 : dh_out.stride};  // rows may be one
    backward.dz = dz.written();
    backward.dh = dh.written();
    const bool sums = test.has_norm && test.wants_affine;
    if (sums) backward.dweight = dweight.data, backward.dbias = dbias.data;
    {
        const int64_t partial_bytes = sums ? kernels.partial_bytes(backward) : 0;
        Scratch packed(kernels.packed_bytes(backward)), scratch(kernels.scratch_bytes(backward));
        Scratch partials(2 * partial_bytes);
        if (test.has_norm) kernels.pack(backward, packed.data);
        kernels.backward(backward, packed.data, scratch.data, sums ? partials.data : nullptr, 0, 1);
        kernels.backward(backward, packed.data, scratch.data, sums ? partials.data + partial_bytes : nullptr, 1, kRows);
        if (sums) kernels.reduce(backward, partials.data, 2, 0, kernels.feature_blocks(backward));
    }

    Values wanted_h_out, wanted_dz, wanted_dh, wanted_dweight, wanted_dbias;
    PlainNorm norms[gru_gates];
    for (int gate = 0; gate < gru_gates; ++gate) {
        const Buffer* none = nullptr;
        norms[gate] = {test.has_norm ? &weight : none, test.has_norm ? &bias : none, false, call.eps, gate * D};
    }
    for (int64_t row = 0; row < kRows; ++row) {
        const Values from = z.row(row), state = h.row(row);
        const Values gradient = dh_out.row(backward.dh_out.stride == 0 ? 0 : row);
        Values a[gru_gates], da[gru_gates];
        for (int gate = 0; gate < gru_gates; ++gate) {
            a[gate] = norms[gate].apply(Values(from.begin() + gate * D, from.begin() + (gate + 1) * D));
            da[gate].resize(D);
        }
        for (int64_t d = 0; d < D; ++d) {
            const double r = sigmoid(a[0][d]), u = sigmoid(a[1][d]), n = std::tanh(a[2][d] + r * a[3][d]);
            wanted_h_out.push_back((1 - u) * n + u * state[d]);
            da[2][d] = gradient[d] * (1 - u) * (1 - n * n);
            da[3][d] = da[2][d] * r;
            da[0][d] = da[2][d] * a[3][d] * r * (1 - r);
            da[1][d] = gradient[d] * (state[d] - n) * u * (1 - u);
            wanted_dh.push_back(gradient[d] * u);
        }
        for (int gate = 0; gate < gru_gates; ++gate) append(wanted_dz, norms[gate].backward(da[gate]));
    }
    for (const PlainNorm& norm : norms) {
        append(wanted_dweight, norm.dweight);
        append(wanted_dbias, norm.dbias);
    }
    char words[160];
    std::snprintf(words, sizeof words, "depth_gru_gates: z type %d, h type %d, weight type %d, norm %d, sums %d, D %d",
                  int(test.z), int(test.h), int(test.weight), test.has_norm, sums, int(D));
    const Problem problem{words, relative_error({test.z, test.h, test.weight, test.bias})};
    compare(problem, "h_out", h_out, wanted_h_out);
    compare(problem, "dz", dz, wanted_dz);
    compare(problem, "dh", dh, wanted_dh);
    if (sums) compare(problem, "dweight", dweight, wanted_dweight);
    if (sums) compare(problem, "dbias", dbias, wanted_dbias);
}

}  // namespace

void smoke_depth_gru_gates() {
    const GruKernels& kernels = *select_gru_kernels();
    for (const auto& type : kTypes) {
        int number = 0;
        for (bool has_norm : {true, false}) {
            for (int64_t features : {1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 130}) {
                at_the_end = ++number % 4 != 0;
                const DType bias = number % 5 == 0 ? type[0] : type[2];  // the two may differ
                run(kernels, {type[0], type[1], type[2], bias, features, has_norm, number % 6 != 0});
            }
        }
    }
}

}  // namespace depthlstm::smoke
