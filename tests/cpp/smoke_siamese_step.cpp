// siamese_step without Python and torch: with and without N, in every type.
#include "siamese_step/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

struct Case {
    DType stream, o, affine;
    int64_t features;
    bool rms, has_norm, has_bias;
};

void run(const SiameseStepKernels& kernels, const Case& test) {
    const int64_t D = test.features, gap = D % 2 ? 3 : 0;
    const double c = 1.75;
    Matrix x(test.stream, D, gap), y(test.stream, D), o(test.o, D, gap);
    Matrix dx_out(test.stream, D), dy_out(test.stream, D, gap), du(test.o, D);
    Buffer w1(test.affine, D), w2(test.affine, D), w3(test.affine, D), b1(test.affine, D), b2(test.affine, D);
    Buffer b3(test.affine, D), dw1(test.affine, D), dw2(test.affine, D), dw3(test.affine, D), db1(test.affine, D);
    Buffer db2(test.affine, D), db3(test.affine, D);
    Buffer *weights[] = {&w1, &w2, &w3}, *biases[] = {&b1, &b2, &b3};
    Buffer *dweights[] = {&dw1, &dw2, &dw3}, *dbiases[] = {&db1, &db2, &db3};
    for (Buffer* input :
         std::initializer_list<Buffer*>{&x, &y, &o, &dx_out, &dy_out, &du, &w1, &w2, &w3, &b1, &b2, &b3})
        input->randomise();
    Matrix x_out(test.stream, D), y_out(test.stream, D), u(test.o, D);
    Matrix dx(test.stream, D), dy(test.stream, D), d_o(test.o, D);

    SiameseStepCall call;
    call.rows = kRows;
    call.features = D;
    call.stream_dtype = test.stream;
    call.o_dtype = test.o;
    call.rms = test.rms;
    call.eps = 1e-3;
    call.c = c;
    call.stream = D % 64 == 0;
    call.x = x.rows();
    call.y = y.rows();
    call.o = o.rows();
    Affine* affines[] = {&call.x_norm, &call.y_norm, &call.norm};
    PlainNorm norms[3];
    const int count = test.has_norm ? 3 : 2;
    for (int i = 0; i < 3; ++i) {
        norms[i] = {nullptr, nullptr, test.rms, call.eps};
        if (i >= count) continue;
        norms[i].weight = weights[i];
        affines[i]->weight = {weights[i]->data, nullptr, test.affine};
        if (!test.has_bias) continue;
        norms[i].bias = biases[i];
        affines[i]->bias = {biases[i]->data, nullptr, test.affine};
    }
    SiameseStepCall forward = call;
    forward.x_out = x_out.written();
    forward.y_out = y_out.written();
    forward.u = u.written();
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kRows);
    }
    SiameseStepCall backward = call;
    backward.dx_out = {dx_out.data, D % 3 == 0 ? 0 : dx_out.stride};  // rows may be one
    backward.dy_out = dy_out.rows();
    backward.du = du.rows();
    backward.dx = dx.written();
    backward.dy = dy.written();
    backward.d_o = d_o.written();
    Affine* made[] = {&backward.x_norm, &backward.y_norm, &backward.norm};
    for (int i = 0; i < count; ++i) {
        made[i]->weight.gradient = dweights[i]->data;
        if (test.has_bias) made[i]->bias.gradient = dbiases[i]->data;
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

    Values wanted_x_out, wanted_y_out, wanted_u, wanted_dx, wanted_dy, wanted_do;
    for (int64_t row = 0; row < kRows; ++row) {
        append(wanted_x_out, norms[0].apply(sum(1, x.row(row), 1 / c, o.row(row))));
        append(wanted_y_out, sum(1, y.row(row), 1, o.row(row)));
        // N and N_y take the streams as they were rounded
        append(wanted_u, norms[2].apply(sum(1, x_out.row(row), 1, norms[1].apply(y_out.row(row)))));
        const Values joined = norms[2].backward(du.row(row));
        const Values of_x = norms[0].backward(sum(1, dx_out.row(backward.dx_out.stride == 0 ? 0 : row), 1, joined));
        const Values of_y = sum(1, dy_out.row(row), 1, norms[1].backward(joined));
        append(wanted_dx, of_x);
        append(wanted_dy, of_y);
        append(wanted_do, sum(1 / c, of_x, 1, of_y));
    }
    char words[160];
    std::snprintf(words, sizeof words, "siamese_step: stream type %d, o type %d, N %d, rms %d, bias %d, D %d",
                  int(test.stream), int(test.o), test.has_norm, test.rms, test.has_bias, int(D));
    const Problem problem{words, relative_error({test.stream, test.o, test.affine})};
    compare(problem, "x_out", x_out, wanted_x_out);
    compare(problem, "y_out", y_out, wanted_y_out);
    compare(problem, "u", u, wanted_u);
    compare(problem, "dx", dx, wanted_dx);
    compare(problem, "dy", dy, wanted_dy);
    compare(problem, "do", d_o, wanted_do);
    for (int i = 0; i < count; ++i) {
        compare(problem, "dweight", *dweights[i], norms[i].dweight);
        if (test.has_bias) compare(problem, "dbias", *dbiases[i], norms[i].dbias);
    }
}

}  // namespace

void smoke_siamese_step() {
    const SiameseStepKernels& kernels = *select_siamese_step_kernels();
    for (const auto& type : kTypes) {
        int number = 0;
        for (bool has_norm : {true, false}) {
            for (bool rms : {false, true}) {
                for (int64_t features : {1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 130}) {
                    at_the_end = ++number % 4 != 0;
                    run(kernels, {type[1], type[0], type[2], features, rms, has_norm, !rms && number % 5 != 0});
                }
            }
        }
    }
}

}  // namespace depthlstm::smoke
