// The gates of the depth-wise LSTM without Python and torch: every type, norm and activation.
#include "depth_lstm/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

double activate(Activation kind, double x) {
    switch (kind) {
        case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x > 0 ? x : 0;
        case Activation::tanh: return std::tanh(x);
        case Activation::silu: return x * sigmoid(x);
        default: return sigmoid(x);
    }
}

double slope(Activation kind, double x) {
    if (kind == Activation::relu) return x > 0 ? 1 : 0;
    const double step = 1e-5;  // central difference in double: good to about 1e-10
    return (activate(kind, x + step) - activate(kind, x - step)) / (2 * step);
}

struct Case {
    DType z, c, affine;
    Norm norm;
    Activation activation;
    int64_t features;
    bool has_affine, has_z_bias;
    double dropout_p;
};

struct Expected {
    std::vector<double> h, c_out, dz, dhidden, dc_in, dweight, dbias, dz_bias;
};

Problem problem_of(const Case& test) {
    char words[160];
    std::snprintf(words, sizeof words,
                  "gates: z type %d, c type %d, norm %d, activation %d, D %lld, affine %d, "
                  "z_bias %d, dropout %g",
                  int(test.z), int(test.c), int(test.norm), int(test.activation), (long long)test.features,
                  test.has_affine, test.has_z_bias, test.dropout_p);
    // the mask is the kernel's own, so only finiteness is known with dropout
    return {words, relative_error({test.z, test.c, test.affine}), test.dropout_p > 0};
}

// Gates of one row, forward and backward, in double.
void expect_row(const Case& test, int64_t gates, int64_t row, const Buffer& z, const Buffer& z_bias,
                const Buffer& hidden, const Buffer& c, const Buffer& weight, const Buffer& bias, const Buffer& dh,
                const Buffer& dc, double eps, Expected& out) {
    const int64_t D = test.features, width = gates * D;
    std::vector<double> n(width), a(width), r(gates, 1.0), da(width), u(width);
    const int64_t span = test.norm == Norm::joint ? width : D;
    for (int64_t i = 0; i < width; ++i) n[i] = z.get(row * width + i) + (test.has_z_bias ? z_bias.get(i) : 0);
    if (test.norm != Norm::none) {
        for (int64_t start = 0; start < width; start += span) {
            double mean = 0, variance = 0;
            for (int64_t i = start; i < start + span; ++i) mean += n[i] / span;
            for (int64_t i = start; i < start + span; ++i) variance += (n[i] - mean) * (n[i] - mean) / span;
            const double scale = 1 / std::sqrt(variance + eps);
            for (int64_t i = start; i < start + span; ++i) n[i] = (n[i] - mean) * scale;
            for (int64_t gate = start / D; gate < (start + span) / D; ++gate) r[gate] = scale;
        }
    }
    for (int64_t i = 0; i < width; ++i) a[i] = test.has_affine ? weight.get(i) * n[i] + bias.get(i) : n[i];
    for (int64_t d = 0; d < D; ++d) {
        const int64_t at = row * D + d;
        const double i = sigmoid(a[d]), f = sigmoid(a[D + d]), o = sigmoid(a[2 * D + d]);
        const bool given = test.activation == Activation::given;
        const double g = given ? hidden.get(at) : activate(test.activation, a[3 * D + d]);
        const double before = c.get(at), after = f * before + i * g;
        out.c_out[at] = after;
        out.h[at] = o * after;
        const double t = dc.get(at) + dh.get(at) * o;
        da[d] = t * g * i * (1 - i);
        da[D + d] = t * before * f * (1 - f);
        da[2 * D + d] = dh.get(at) * after * o * (1 - o);
        if (given) {
            out.dhidden[at] = t * i;
        } else {
            da[3 * D + d] = t * i * slope(test.activation, a[3 * D + d]);
        }
        out.dc_in[at] = t * f;
    }
    for (int64_t i = 0; i < width; ++i) {
        out.dweight[i] += da[i] * n[i];
        out.dbias[i] += da[i];
        u[i] = test.has_affine ? weight.get(i) * da[i] : da[i];
    }
    for (int64_t start = 0; start < width; start += span) {
        double mean_u = 0, mean_un = 0;
        for (int64_t i = start; i < start + span; ++i) {
            mean_u += u[i] / span;
            mean_un += u[i] * n[i] / span;
        }
        for (int64_t i = start; i < start + span; ++i) {
            const double dz = test.norm == Norm::none ? u[i] : r[i / D] * (u[i] - mean_u - n[i] * mean_un);
            out.dz[row * width + i] = dz;
            out.dz_bias[i] += dz;
        }
    }
}

void run(const GatesKernels& kernels, const Case& test) {
    const bool given = test.activation == Activation::given;
    const int64_t D = test.features, gates = given ? 3 : 4, width = gates * D;
    Buffer z(test.z, kRows * width), hidden(test.z, kRows * D), c(test.c, kRows * D), z_bias(test.affine, width);
    Buffer weight(test.affine, width), bias(test.affine, width), dh(test.z, kRows * D), dc(test.c, kRows * D);
    for (Buffer* input : {&z, &hidden, &c, &z_bias, &weight, &bias, &dh, &dc}) input->randomise();
    Buffer h(test.z, kRows * D), c_out(test.c, kRows * D), dz(test.z, kRows * width), dhidden(test.z, kRows * D),
        dc_in(test.c, kRows * D);
    Buffer dweight(test.affine, width), dbias(test.affine, width), dz_bias(test.affine, width);

    GatesCall call;
    call.rows = kRows;
    call.features = D;
    call.z_dtype = test.z;
    call.c_dtype = test.c;
    call.affine_dtype = call.z_bias_dtype = test.affine;
    call.norm = test.norm;
    call.activation = test.activation;
    call.eps = 1e-3;  // large enough for a comparison at D = 1 and 2, where the variance may vanish
    call.dropout_p = test.dropout_p;
    call.seed = 1234;
    call.stream = D % 64 == 0 && int(test.activation) % 2 == 0;  // whole vectors on aligned rows
    call.z = {z.data, width};
    call.c = {c.data, D};
    if (given) call.hidden = {hidden.data, D};
    if (test.has_z_bias) call.z_bias = z_bias.data;
    if (test.has_affine) {
        call.weight = weight.data;
        call.bias = bias.data;
    }
    // One call is either a forward or a backward. Packing differs by whether h is written.
    GatesCall forward = call;
    forward.h = {h.data, D};
    forward.c_out = {c_out.data, D};
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kRows);
    }

    GatesCall backward = call;
    backward.dh = {dh.data, D};
    backward.dc = {dc.data, D};
    backward.dz = {dz.data, width};
    if (given) backward.dhidden = {dhidden.data, D};
    backward.dc_in = {dc_in.data, D};
    if (test.has_affine) {
        backward.dweight = dweight.data;
        backward.dbias = dbias.data;
    }
    if (test.has_z_bias) backward.dz_bias = dz_bias.data;
    {
        const int64_t chunks = 2, partial_bytes = kernels.partial_bytes(backward);
        Scratch packed(kernels.packed_bytes(backward)), scratch(kernels.scratch_bytes(backward)),
            partials(chunks * partial_bytes);
        kernels.pack(backward, packed.data);
        kernels.backward(backward, packed.data, scratch.data, partials.data, 0, 1);
        kernels.backward(backward, packed.data, scratch.data, partials.data + partial_bytes, 1, kRows);
        kernels.reduce(backward, partials.data, chunks, 0, kernels.feature_blocks(backward));
    }

    Expected wanted;
    wanted.h.resize(kRows * D);
    wanted.c_out = wanted.dhidden = wanted.dc_in = wanted.h;
    wanted.dz.resize(kRows * width);
    wanted.dweight.resize(width);
    wanted.dbias = wanted.dz_bias = wanted.dweight;
    for (int64_t row = 0; row < kRows; ++row)
        expect_row(test, gates, row, z, z_bias, hidden, c, weight, bias, dh, dc, call.eps, wanted);
    const Problem problem = problem_of(test);
    compare(problem, "h", h, wanted.h);
    compare(problem, "c", c_out, wanted.c_out);
    compare(problem, "dz", dz, wanted.dz);
    if (given) compare(problem, "dhidden", dhidden, wanted.dhidden);
    compare(problem, "dc", dc_in, wanted.dc_in);
    if (test.has_affine) compare(problem, "dweight", dweight, wanted.dweight);
    if (test.has_affine) compare(problem, "dbias", dbias, wanted.dbias);
    if (test.has_z_bias) compare(problem, "dz_bias", dz_bias, wanted.dz_bias);
}

}  // namespace

void smoke_depth_lstm() {
    const GatesKernels& kernels = *select_gates_kernels();
    for (const auto& type : kTypes) {
        for (int norm = 0; norm < 3; ++norm) {
            for (int activation = 0; activation < 7; ++activation) {
#if defined(DEPTHLSTM_SANITIZED)  // that build has two of the seven
                if (Activation(activation) != Activation::gelu && Activation(activation) != Activation::given) continue;
#endif
                for (int64_t features : {1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 130}) {
                    // The combination of options varies with the size, so that all pairs occur without the whole
                    // product.
                    const bool affine = norm != 2 && features % 3 != 0;
                    const bool z_bias = (features + activation) % 2 == 0;
                    at_the_end = (features + activation + norm) % 4 != 0;
                    run(kernels,
                        {type[0], type[1], type[2], Norm(norm), Activation(activation), features, affine, z_bias, 0.0});
                    if (features % 16 == 1)
                        run(kernels, {type[0], type[1], type[2], Norm(norm), Activation(activation), features, affine,
                                      z_bias, 0.3});
                }
            }
        }
    }
}

}  // namespace depthlstm::smoke
