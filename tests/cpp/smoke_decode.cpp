// The decode engine's kernels without Python and torch: every kernel and type of weights at odd sizes, against plain
// loops in double, each buffer against a page that may not be touched. Part of the program of smoke.cpp.
#include "smoke_decode.h"

#include <initializer_list>
#include <limits>
#include <vector>

using namespace depthlstm;
using namespace depthlstm::smoke_decoding;

namespace {

void norm(const DecodeKernels& kernels, int64_t features, bool rms) {
    const int64_t rows = 3, x_stride = features + 2, y_stride = features + 1;
    Floats x((rows - 1) * x_stride + features), y((rows - 1) * y_stride + features), weight(features), bias(features);
    for (Floats* each : {&x, &weight, &bias}) each->randomise();
    NormCall call;
    call.rows = rows;
    call.features = features;
    call.rms = rms;
    call.eps = 1e-3f;
    call.weight = weight.at();
    call.bias = bias.at();
    call.x = x.at();
    call.x_stride = x_stride;
    call.y = y.at();
    call.y_stride = y_stride;
    kernels.normalise(call);
    for (int64_t row = 0; row < rows; ++row) {
        double mean = 0, variance = 0;
        for (int64_t d = 0; d < features && !rms; ++d) mean += double(x.at()[row * x_stride + d]) / double(features);
        for (int64_t d = 0; d < features; ++d) {
            const double centred = x.at()[row * x_stride + d] - mean;
            variance += centred * centred / double(features);
        }
        for (int64_t d = 0; d < features; ++d) {
            const double n = (x.at()[row * x_stride + d] - mean) / std::sqrt(variance + 1e-3);
            near("norm", d, y.at()[row * y_stride + d], n * weight.at()[d] + bias.at()[d], 10);
        }
    }
}

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x > 0 ? x : 0;
        case Activation::tanh: return std::tanh(x);
        case Activation::silu: return x / (1 + std::exp(-x));
        default: return 1 / (1 + std::exp(-x));
    }
}

void activation(const DecodeKernels& kernels, Activation activation, int64_t count) {
    Floats x(count), y(count);
    x.randomise();
    for (int64_t i = 0; i < count; ++i) y.at()[i] = x.at()[i];
    kernels.activate(activation, y.at(), count);
    for (int64_t i = 0; i < count; ++i) near("activation", i, y.at()[i], activated(activation, x.at()[i]), 1);
}

// The weighted values of one head, whose scores are given.
std::vector<double> attended(const std::vector<double>& scores, const std::vector<const float*>& values,
                             int64_t width) {
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (double score : scores) most = std::fmax(most, score);
    std::vector<double> out(static_cast<std::size_t>(width));
    if (std::isinf(most)) return out;  // nothing may be attended to
    for (double score : scores) sum += std::exp(score - most);
    for (std::size_t t = 0; t < scores.size(); ++t)
        for (int64_t d = 0; d < width; ++d)
            out[std::size_t(d)] += std::exp(scores[t] - most) / sum * double(values[t][d]);
    return out;
}

void blocks(const DecodeKernels& kernels, int64_t positions, int64_t width, int forbidden) {
    const int64_t padded = round_up(positions, key_block);
    Floats query(width), keys(padded * width), values(positions * width), mask(padded), scores(padded), out(width);
    for (Floats* each : {&query, &keys, &values}) each->randomise();
    for (int64_t t = 0; t < positions; ++t) {
        const bool is_forbidden = forbidden == 2 || (forbidden == 1 && t % 3 == 1);
        mask.at()[t] = is_forbidden ? -std::numeric_limits<float>::infinity() : float(random_value());
    }
    for (int64_t t = positions; t < padded; ++t)  // as transpose_keys leaves them
        for (int64_t d = 0; d < width; ++d) keys.at()[(t / key_block * width + d) * key_block + t % key_block] = 0;
    BlockAttention call;
    call.query = query.at();
    call.keys = keys.at();
    call.values = values.at();
    call.mask = forbidden < 0 ? nullptr : mask.at();
    call.positions = positions;
    call.width = width;
    call.scale = 0.3f;
    call.scores = scores.at();
    call.out = out.at();
    kernels.attend_blocks(call);
    std::vector<double> wanted_scores;
    std::vector<const float*> rows;
    for (int64_t t = 0; t < positions; ++t) {
        double score = 0;
        for (int64_t d = 0; d < width; ++d)
            score += double(query.at()[d]) * keys.at()[(t / key_block * width + d) * key_block + t % key_block];
        wanted_scores.push_back(score * double(0.3f) + (forbidden < 0 ? 0 : double(mask.at()[t])));
        rows.push_back(values.at() + t * width);
    }
    const std::vector<double> wanted = attended(wanted_scores, rows, width);
    for (int64_t d = 0; d < width; ++d)
        near("attention to blocks", d, out.at()[d], wanted[std::size_t(d)], double(width) / 2);
}

// Several queries, of which each attends to `later` positions more than the one before.
void queries(const DecodeKernels& kernels, int64_t count, int64_t positions, int64_t width, int64_t later,
             int forbidden) {
    const int64_t most = positions + (count - 1) * later, padded = round_up(most, key_block), stride = width + 3;
    Floats query((count - 1) * stride + width), keys(padded * width), values(most * width), mask(padded);
    Floats scores(most_queries_at_once * padded), out((count - 1) * stride + width);
    for (Floats* each : {&query, &keys, &values}) each->randomise();
    for (int64_t t = 0; t < padded; ++t) {
        const bool is_forbidden = forbidden == 2 || (forbidden == 1 && t % 3 == 1);
        mask.at()[t] = is_forbidden ? -std::numeric_limits<float>::infinity() : float(random_value());
    }
    BlockAttention call;
    call.query = query.at();
    call.keys = keys.at();
    call.values = values.at();
    call.mask = forbidden < 0 ? nullptr : mask.at();
    call.positions = positions;
    call.width = width;
    call.scale = 0.3f;
    call.scores = scores.at();
    call.out = out.at();
    call.queries = count;
    call.query_stride = call.out_stride = stride;
    call.later = later;
    kernels.attend_queries(call);
    for (int64_t i = 0; i < count; ++i) {
        std::vector<double> wanted_scores;
        std::vector<const float*> rows;
        for (int64_t t = 0; t < positions + i * later; ++t) {
            double score = 0;
            for (int64_t d = 0; d < width; ++d)
                score += double(query.at()[i * stride + d]) *
                         keys.at()[(t / key_block * width + d) * key_block + t % key_block];
            wanted_scores.push_back(score * double(0.3f) + (forbidden < 0 ? 0 : double(mask.at()[t])));
            rows.push_back(values.at() + t * width);
        }
        const std::vector<double> wanted = attended(wanted_scores, rows, width);
        for (int64_t d = 0; d < width; ++d)
            near("attention of several queries", d, out.at()[i * stride + d], wanted[std::size_t(d)],
                 double(width) / 2);
    }
}

// `group` heads of the query share each of `key_heads` heads of keys and values.
void cache(const DecodeKernels& kernels, int64_t positions, int64_t key_heads, int64_t group, int64_t width) {
    const int64_t padded = round_up(positions, key_block), heads = key_heads * group, all = key_heads * width;
    Floats query(group * all), keys(positions * all), values(positions * all), scores(heads * padded), out(group * all);
    for (Floats* each : {&query, &keys, &values}) each->randomise();
    std::vector<int64_t> offsets;
    for (int64_t t = 0; t < positions; ++t) offsets.push_back((positions - 1 - t) * all);
    CacheAttention call;
    call.query = query.at();
    call.keys = keys.at();
    call.values = values.at();
    call.offsets = offsets.data();
    call.positions = positions;
    call.heads = heads;
    call.width = width;
    call.group = group;
    call.scale = 0.3f;
    call.scores = scores.at();
    call.out = out.at();
    kernels.attend_cache(call);
    for (int64_t head = 0; head < heads; ++head) {
        std::vector<double> wanted_scores;
        std::vector<const float*> rows;
        for (int64_t offset : offsets) {
            double score = 0;
            for (int64_t d = 0; d < width; ++d)
                score += double(query.at()[head * width + d]) * keys.at()[offset + head / group * width + d];
            wanted_scores.push_back(score * double(0.3f));
            rows.push_back(values.at() + offset + head / group * width);
        }
        const std::vector<double> wanted = attended(wanted_scores, rows, width);
        for (int64_t d = 0; d < width; ++d)
            near("attention to a cache", d, out.at()[head * width + d], wanted[std::size_t(d)], double(width) / 2);
    }
}

// Values of few levels, so that ties are everywhere: of equal ones the first comes first.
void selection(const DecodeKernels& kernels, int64_t count, int64_t levels) {
    Floats values(count);
    for (int64_t i = 0; i < count; ++i) values.at()[i] = float(std::floor(std::fabs(random_value()) * double(levels)));
    std::vector<int64_t> order(static_cast<std::size_t>(count));
    for (int64_t i = 0; i < count; ++i) {  // insertion behind equal ones
        int64_t at = i;
        for (; at > 0 && values.at()[i] > values.at()[order[std::size_t(at - 1)]]; --at)
            order[std::size_t(at)] = order[std::size_t(at - 1)];
        order[std::size_t(at)] = i;
    }
    same("largest", kernels.largest(values.at(), count), order[0]);
    for (int64_t wanted : {int64_t(1), int64_t(2), int64_t(5), int64_t(8), count, count + 3}) {
        Floats found(wanted);
        Guarded indices(wanted * 4, 4);
        const int32_t* index = reinterpret_cast<const int32_t*>(indices.data);
        const int64_t kept =
            kernels.top(values.at(), count, wanted, found.at(), reinterpret_cast<int32_t*>(indices.data));
        same("number of the top", kept, wanted < count ? wanted : count);
        for (int64_t i = 0; i < kept; ++i) {
            same("index of the top", index[i], order[std::size_t(i)]);
            near("value of the top", i, found.at()[i], values.at()[order[std::size_t(i)]], 0);
        }
    }
    double sum = 0;
    float most = 0;
    const double largest = values.at()[order[0]];
    for (int64_t i = 0; i < count; ++i) sum += std::exp(values.at()[i] - largest);
    near("log of the sum", 0, kernels.log_sum(values.at(), count, &most), std::log(sum), 1);
    near("maximum", 0, most, largest, 0);
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        values.at()[count - 1] = bad;
        same("sum of what is no number", std::isnan(kernels.log_sum(values.at(), count, &most)), 1);
        if (std::isnan(bad)) same("largest of what is no number", kernels.largest(values.at(), count), -1);
    }
}

}  // namespace

int smoke_decode() {
    const DecodeKernels& kernels = *select_decode_kernels();
    int64_t number = 0;
    smoke_decode_products(kernels, number);
    for (int64_t count : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130}) {
        at_the_end = ++number % 4 != 0;
        norm(kernels, count, count % 2 == 0);
        norm(kernels, count, count % 2 != 0);
        for (int code = 0; code < int(Activation::given); ++code) activation(kernels, Activation(code), count);
        for (int64_t levels : {1, 3, 40}) selection(kernels, count, levels);
        for (int64_t width : {16, 32, 48, 64, 80}) {
            blocks(kernels, count, width, int(number % 4) - 1);
            for (int64_t later : {0, 1}) queries(kernels, 1 + number % 18, count, width, later, int(number % 4) - 1);
            cache(kernels, count, 1 + number % 3, 1 + number % 4, width);
            ++number;
        }
    }
    std::printf("smoke of decoding: %s, %d values compared, %d wrong\n", kernels.isa, checks, failures);
    return failures;
}
