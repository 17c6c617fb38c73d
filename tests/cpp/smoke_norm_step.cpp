// norm_step without Python and torch: every placement of the norms, type and kind of b.
#include "norm_step/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

enum class Scale { number, one, features };

struct Placement {
    bool norms[3];  // N1, N2, N3
    Scale scale;
    double a, b;
};

struct Case {
    DType x, y, affine;
    Placement placement;
    int64_t features;
    bool rms, has_bias;
};

void run(const NormStepKernels& kernels, const Case& test) {
    const int64_t D = test.features, gap = D % 2 ? 3 : 0;
    const Placement& place = test.placement;
    const bool has_scale = place.scale != Scale::number;
    Matrix x(test.x, D, gap), y(test.y, D, gap), dx_out(test.x, D), du(test.y, D, gap);
    Buffer scale(test.affine, place.scale == Scale::one ? 1 : D), dscale(test.affine, scale.count);
    Buffer w1(test.affine, D), w2(test.affine, D), w3(test.affine, D), b1(test.affine, D), b2(test.affine, D);
    Buffer b3(test.affine, D), dw1(test.affine, D), dw2(test.affine, D), dw3(test.affine, D), db1(test.affine, D);
    Buffer db2(test.affine, D), db3(test.affine, D);
    Buffer *weights[] = {&w1, &w2, &w3}, *biases[] = {&b1, &b2, &b3};
    Buffer *dweights[] = {&dw1, &dw2, &dw3}, *dbiases[] = {&db1, &db2, &db3};
    for (Buffer* input : std::initializer_list<Buffer*>{&x, &y, &dx_out, &du, &scale, &w1, &w2, &w3, &b1, &b2, &b3})
        input->randomise();
    Matrix x_out(test.x, D), u(test.y, D), dx(test.x, D), dy(test.y, D);

    NormStepCall call;
    call.rows = kRows;
    call.features = D;
    call.x_dtype = test.x;
    call.y_dtype = test.y;
    call.rms = test.rms;
    call.eps = 1e-3;
    call.a = place.a;
    call.b = place.b;
    call.stream = D % 64 == 0;
    call.one_scale = place.scale == Scale::one;
    if (has_scale) call.scale = {scale.data, nullptr, test.affine};
    PlainNorm norms[3];
    for (int i = 0; i < 3; ++i) {
        norms[i] = {nullptr, nullptr, test.rms, call.eps};
        if (!place.norms[i]) continue;
        norms[i].weight = weights[i];
        call.norm[i].weight = {weights[i]->data, nullptr, test.affine};
        if (!test.has_bias) continue;
        norms[i].bias = biases[i];
        call.norm[i].bias = {biases[i]->data, nullptr, test.affine};
    }
    NormStepCall forward = call;
    forward.x = x.rows();
    forward.y = y.rows();
    forward.x_out = x_out.written();
    if (place.norms[1]) forward.u = u.written();
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kRows);
    }

    // What backward need not read is not given.
    NormStepCall backward = call;
    if (place.norms[0]) backward.x = x.rows();
    if (place.norms[0] || place.norms[2] || has_scale) backward.y = y.rows();
    if (place.norms[1] && !place.norms[0]) backward.x_out_read = x_out.rows();
    backward.dx_out = {dx_out.data, D % 3 == 0 ? 0 : dx_out.stride};  // rows may be one
    if (place.norms[1]) backward.du = du.rows();
    backward.dx = dx.written();
    const bool shared = place.a == 1 && place.b == 1 && !has_scale && !place.norms[2] && test.x == test.y;
    if (!shared) backward.dy = dy.written();
    if (has_scale) backward.scale.gradient = dscale.data;
    for (int i = 0; i < 3; ++i) {
        if (place.norms[i]) backward.norm[i].weight.gradient = dweights[i]->data;
        if (place.norms[i] && test.has_bias) backward.norm[i].bias.gradient = dbiases[i]->data;
    }
    {
        const int64_t partial_bytes = kernels.partial_bytes(backward);
        Scratch packed(kernels.packed_bytes(backward)), scratch(kernels.scratch_bytes(backward));
        Scratch partials(2 * partial_bytes);
        kernels.pack(backward, packed.data);
        kernels.backward(backward, packed.data, scratch.data, partials.data, 0, 1);
        kernels.backward(backward, packed.data, scratch.data, partials.data + partial_bytes, 1, kRows);
        kernels.reduce(backward, partials.data, 2, 0, kernels.feature_blocks(backward));
    }

    Values wanted_x_out, wanted_u, wanted_dx, wanted_dy, wanted_dscale(scale.count);
    for (int64_t row = 0; row < kRows; ++row) {
        Values b(D, place.b);
        for (int64_t d = 0; d < D && has_scale; ++d) b[d] = scale.get(call.one_scale ? 0 : d);
        const Values branch = norms[2].apply(y.row(row)), from_x = x.row(row);
        Values joined(D);
        for (int64_t d = 0; d < D; ++d) joined[d] = place.a * from_x[d] + b[d] * branch[d];
        append(wanted_x_out, norms[0].apply(joined));
        Values gradient = dx_out.row(backward.dx_out.stride == 0 ? 0 : row);
        if (place.norms[1]) {
            append(wanted_u, norms[1].apply(x_out.row(row)));  // of x' as it was rounded
            gradient = sum(1, gradient, 1, norms[1].backward(du.row(row)));
        }
        gradient = norms[0].backward(gradient);
        append(wanted_dx, sum(place.a, gradient, 0, gradient));
        for (int64_t d = 0; d < D; ++d) {
            wanted_dscale[call.one_scale ? 0 : d % scale.count] += gradient[d] * branch[d];
            gradient[d] *= b[d];
        }
        append(wanted_dy, norms[2].backward(gradient));
    }
    char words[160];
    std::snprintf(words, sizeof words,
                  "norm_step: x type %d, y type %d, N1 %d, N2 %d, N3 %d, b %d, rms %d, bias %d, D %d", int(test.x),
                  int(test.y), place.norms[0], place.norms[1], place.norms[2], int(place.scale), test.rms,
                  test.has_bias, int(D));
    const Problem problem{words, relative_error({test.x, test.y, test.affine})};
    compare(problem, "x_out", x_out, wanted_x_out);
    if (place.norms[1]) compare(problem, "u", u, wanted_u);
    compare(problem, "dx", dx, wanted_dx);
    if (!shared) compare(problem, "dy", dy, wanted_dy);
    if (has_scale) compare(problem, "dscale", dscale, wanted_dscale);
    for (int i = 0; i < 3; ++i) {
        if (place.norms[i]) compare(problem, "dweight", *dweights[i], norms[i].dweight);
        if (place.norms[i] && test.has_bias) compare(problem, "dbias", *dbiases[i], norms[i].dbias);
    }
}

}  // namespace

void smoke_norm_step() {
    const NormStepKernels& kernels = *select_norm_step_kernels();
    const Placement placements[] = {
        {{false, true, false}, Scale::number, 1, 1},    // pre-norm
        {{true, false, false}, Scale::number, 1, 1},    // post-norm
        {{false, true, true}, Scale::number, 1, 1},     // sandwich
        {{true, false, false}, Scale::number, 1.5, 1},  // DeepNorm
        {{true, true, false}, Scale::number, 3, 1},     // Keel
        {{false, true, false}, Scale::one, 1, 1},       // ReZero
        {{false, true, false}, Scale::features, 1, 1},  // LayerScale
        {{true, true, true}, Scale::features, 1.5, 1}, {{false, false, true}, Scale::number, 1, 0.5},
        {{false, false, false}, Scale::one, 2, 1},
    };
    for (const auto& type : kTypes) {
        int number = 0;
        for (const Placement& placement : placements) {
            for (int64_t features : {1, 2, 3, 7, 16, 17, 31, 64, 130}) {
                at_the_end = ++number % 4 != 0;
                const bool rms = number % 3 == 0;
                run(kernels, {type[1], type[0], type[2], placement, features, rms, !rms && number % 5 != 0});
            }
        }
    }
}

}  // namespace depthlstm::smoke
