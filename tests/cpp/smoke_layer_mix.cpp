// layer_mix without Python and torch: one dtype and mixed ones, dense rows and rows apart, outputs without a gradient.
#include <memory>

#include "layer_mix/cpu.h"
#include "smoke.h"

namespace depthlstm::smoke {
namespace {

struct Case {
    DType even, odd, widest, weights;  // of the sources with even and odd numbers, of the outputs, of the weights
    int64_t features, sources, outputs;
    bool dense, source_gradients, weight_gradient;
};

void run(const LayerMixKernels& kernels, const Case& test) {
    const int64_t C = test.features, L = test.sources, V = test.outputs, gap = test.dense ? 0 : 3;
    std::vector<std::unique_ptr<Matrix>> x, dx, u, du;
    std::vector<Source> sources;
    for (int64_t l = 0; l < L; ++l) {
        const DType type = l % 2 ? test.odd : test.even;
        x.push_back(std::make_unique<Matrix>(type, C, gap));
        x.back()->randomise();
        dx.push_back(std::make_unique<Matrix>(type, C));
        sources.push_back({x.back()->data, x.back()->stride, type, nullptr});
    }
    // element (v, l) of weights (V, L), stored by columns
    Buffer weights(test.weights, V * L), dweights(test.weights, V * L);
    weights.randomise();
    LayerMixCall call;
    call.rows = test.dense ? 1 : kRows;
    call.features = test.dense ? kRows * C : C;
    call.sources = L;
    call.dtype = test.widest;
    call.uniform = test.even == test.widest && test.odd == test.widest;
    call.stream = C % 64 == 0;
    call.weights = weights.data;
    call.weight_strides[0] = 1;
    call.weight_strides[1] = V;
    call.weights_dtype = test.weights;

    LayerMixCall forward = call;
    std::vector<Rows> written;
    std::vector<int64_t> all, some;
    std::vector<ConstRows> given;
    for (int64_t v = 0; v < V; ++v) {
        u.push_back(std::make_unique<Matrix>(test.widest, C));
        written.push_back(u.back()->written());
        all.push_back(v);
        du.push_back(std::make_unique<Matrix>(test.widest, C, gap));
        du.back()->randomise();
        if (V > 1 && v == 1) continue;  // an output without a gradient
        some.push_back(v);
        given.push_back(du.back()->rows());
    }
    forward.outputs = V;
    forward.source = sources.data();
    forward.u = written.data();
    forward.output = all.data();
    {
        Scratch packed(kernels.packed_bytes(forward)), scratch(kernels.scratch_bytes(forward));
        kernels.pack(forward, packed.data);
        kernels.forward(forward, packed.data, scratch.data, 0, 1);
        kernels.forward(forward, packed.data, scratch.data, 1, kernels.items(forward));
    }

    LayerMixCall backward = call;
    for (int64_t l = 0; l < L; ++l) {
        if (test.source_gradients) sources[l].gradient = dx[l]->data;
        if (!test.weight_gradient) sources[l].data = nullptr;  // the values are not read
    }
    backward.outputs = int64_t(some.size());
    backward.source = sources.data();
    backward.du = given.data();
    backward.output = some.data();
    backward.source_gradients = test.source_gradients;
    backward.weight_gradient = test.weight_gradient;
    backward.dweights = test.weight_gradient ? dweights.data : nullptr;
    for (int64_t i = 0; i < dweights.count; ++i) dweights.set(i, 0);
    {
        const int64_t sums = test.weight_gradient ? L * backward.outputs : 0;
        Scratch packed(kernels.packed_bytes(backward)), scratch(kernels.scratch_bytes(backward));
        Scratch partials(2 * sums * int64_t(sizeof(double)));
        double* partial = reinterpret_cast<double*>(partials.data);
        for (int64_t i = 0; i < 2 * sums; ++i) partial[i] = 0;
        kernels.pack(backward, packed.data);
        kernels.backward(backward, packed.data, scratch.data, partial, 0, 1);
        kernels.backward(backward, packed.data, scratch.data, partial + sums, 1, kernels.items(backward));
        if (test.weight_gradient) kernels.reduce(backward, partial, 2);
    }

    char words[160];
    std::snprintf(words, sizeof words,
                  "layer_mix: types %d and %d, weights %d, C %d, L %d, V %d, dense %d, wants %d %d", int(test.even),
                  int(test.odd), int(test.weights), int(C), int(L), int(V), test.dense, test.source_gradients,
                  test.weight_gradient);
    const Problem problem{words, relative_error({test.even, test.odd, test.weights})};
    const auto weight = [&](int64_t v, int64_t l) { return weights.get(l * V + v); };
    for (int64_t v = 0; v < V; ++v) {
        Values wanted(kRows * C);
        for (int64_t i = 0; i < kRows * C; ++i)
            for (int64_t l = 0; l < L; ++l) wanted[i] += weight(v, l) * x[l]->get(i / C * x[l]->stride + i % C);
        compare(problem, "u", *u[v], wanted);
    }
    Values wanted_dweights(V * L);
    for (int64_t l = 0; l < L; ++l) {
        Values wanted(kRows * C);
        for (int64_t i = 0; i < kRows * C; ++i) {
            for (int64_t v : some) {
                const double gradient = du[v]->get(i / C * du[v]->stride + i % C);
                wanted[i] += weight(v, l) * gradient;
                wanted_dweights[v * L + l] += x[l]->get(i / C * x[l]->stride + i % C) * gradient;
            }
        }
        if (test.source_gradients) compare(problem, "dx", *dx[l], wanted);
    }
    if (test.weight_gradient) compare(problem, "dweights", dweights, wanted_dweights);
}

}  // namespace

void smoke_layer_mix() {
    const LayerMixKernels& kernels = *select_layer_mix_kernels();
    const DType f32 = DType::float32, f64 = DType::float64, bf16 = DType::bfloat16, f16 = DType::float16;
    // the sources' two, the widest of them, the weights'
    const DType types[][4] = {{f32, f32, f32, f32}, {f64, f64, f64, f64},  {bf16, bf16, bf16, f32},
                              {f16, f16, f16, f16}, {bf16, f32, f32, f32}, {f16, bf16, f32, bf16},
                              {f32, f64, f64, f32}};
    for (const auto& type : types) {
        int number = 0;
        for (int64_t sources : {1, 3, 4, 9}) {
            for (int64_t outputs : {1, 3, 9}) {
                for (int64_t features : {1, 7, 16, 33, 64, 400}) {  // a tile has up to 1,024
                    at_the_end = ++number % 4 != 0;
                    const bool dense = number % 3 != 0 && features != 33;
                    run(kernels, {type[0], type[1], type[2], type[3], features, sources, outputs, dense,
                                  number % 7 != 1, number % 5 != 1});
                }
            }
        }
    }
}

}  // namespace depthlstm::smoke
