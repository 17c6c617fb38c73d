// The decode engine's kernels without Python and torch: every kernel and type of weights at odd sizes, against plain
// loops in double, each buffer against a page that may not be touched. Part of the program of smoke.cpp.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <vector>

#include "decode/cpu.h"
#include "guarded.h"

using namespace depthlstm;

namespace {

int failures = 0;
int checks = 0;

// Floats of an array that ends, or begins, at the forbidden page. They are NaN before they are written.
struct Floats : Guarded {
    int64_t count;
    explicit Floats(int64_t count) : Guarded(count * 4, 4), count(count) {}
    float* at() const { return reinterpret_cast<float*>(data); }
    void randomise() {
        for (int64_t i = 0; i < count; ++i) at()[i] = float(random_value());
    }
};

void near(const char* name, int64_t i, double found, double wanted, double scale) {
    ++checks;
    if (std::fabs(found - wanted) <= 1e-5 * (1 + scale)) return;
    if (++failures < 20) std::printf("wrong %s[%lld]: found %.9g, wanted %.9g\n", name, (long long)i, found, wanted);
}

void same(const char* name, int64_t found, int64_t wanted) {
    ++checks;
    if (found == wanted) return;
    if (++failures < 20) std::printf("wrong %s: found %lld, wanted %lld\n", name, (long long)found, (long long)wanted);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

enum class Base { none, other, own };

void product(const DecodeKernels& kernels, WeightType type, int64_t outputs, int64_t inputs, int64_t rows, Base base,
             bool has_bias) {
    // multiples of 1/32 that every type holds: each row of weights has 127/32, of which int8's scale is made
    Floats weight(outputs * inputs), bias(outputs);
    bias.randomise();
    for (int64_t i = 0; i < weight.count; ++i) {
        const double q = i % inputs == 0 ? 127 : std::round(std::fmin(std::fmax(40 * random_value(), -127), 127));
        weight.at()[i] = float(q / 32);
    }
    const int64_t padded = round_up(outputs, panel_outputs);
    const int64_t bytes = type == WeightType::float32    ? inputs * 4
                          : type == WeightType::bfloat16 ? round_up(inputs, 2) * 2
                                                         : round_up(inputs, 2);
    Guarded weights(padded * bytes, type == WeightType::float32 ? 4 : type == WeightType::bfloat16 ? 2 : 1);
    Floats packed_bias(padded), scale(padded);
    Panels panels;
    panels.outputs = outputs;
    panels.inputs = inputs;
    panels.type = type;
    panels.weights = weights.data;
    panels.bias = packed_bias.at();
    panels.scale = type == WeightType::int8 ? scale.at() : nullptr;
    kernels.pack(panels, weight.at(), has_bias ? bias.at() : nullptr);

    const int64_t x_stride = inputs + 3, y_stride = outputs + 1, base_stride = outputs + 2;
    Floats x((rows - 1) * x_stride + inputs), y((rows - 1) * y_stride + outputs);
    Floats given((rows - 1) * base_stride + outputs);
    x.randomise();
    if (type == WeightType::int8) {  // which rounds rows to 16 bits of their largest number
        for (int64_t i = 0; i < x.count; ++i) {
            const double q = std::fmin(std::fmax(8000 * x.at()[i], -32767), 32767);
            x.at()[i] = float((i % x_stride == 0 ? 32767 : std::round(q)) / 32768);
        }
    }
    given.randomise();
    Guarded rounded(type == WeightType::int8 ? rows * rounded_row_bytes(inputs) : 64, 64);
    ProductCall call;
    call.rounded = rounded.data;
    call.panels = panels;
    call.x = x.at();
    call.x_stride = x_stride;
    call.y = y.at();
    call.y_stride = y_stride;
    call.rows = rows;
    std::vector<double> wanted(std::size_t(rows * outputs));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t o = 0; o < outputs; ++o) {
            double sum = has_bias ? bias.at()[o] : 0;
            for (int64_t k = 0; k < inputs; ++k)
                sum += double(weight.at()[o * inputs + k]) * x.at()[row * x_stride + k];
            if (base != Base::none) sum += given.at()[row * base_stride + o];
            if (base == Base::own) y.at()[row * y_stride + o] = given.at()[row * base_stride + o];
            wanted[std::size_t(row * outputs + o)] = sum;
        }
    }
    if (base == Base::other) {
        call.base = given.at();
        call.base_stride = base_stride;
    } else if (base == Base::own) {
        call.base = y.at();
        call.base_stride = y_stride;
    }
    if (call.panels.type == WeightType::int8) kernels.round_rows(call);
    kernels.multiply(call);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < outputs; ++o)
            near("product", o, y.at()[row * y_stride + o], wanted[std::size_t(row * outputs + o)], double(inputs));
    for (int64_t row = 0; row + 1 < rows; ++row)  // what lies between the rows stays as it was
        same("gap of a product", std::isnan(y.at()[row * y_stride + outputs]), 1);
}

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

void activation(const DecodeKernels& kernels, int64_t count) {
    Floats x(count), y(count);
    x.randomise();
    for (int64_t i = 0; i < count; ++i) y.at()[i] = x.at()[i];
    kernels.activate(Activation::gelu, y.at(), count);
    for (int64_t i = 0; i < count; ++i)
        near("gelu", i, y.at()[i], 0.5 * x.at()[i] * (1 + std::erf(x.at()[i] / std::sqrt(2.0))), 1);
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
    for (WeightType type : {WeightType::float32, WeightType::bfloat16, WeightType::int8}) {
        for (int64_t outputs : {1, 3, 31, 32, 33, 64, 97}) {
            for (int64_t inputs : {1, 2, 7, 16, 33, 130}) {
                for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13}) {
                    at_the_end = ++number % 4 != 0;
                    product(kernels, type, outputs, inputs, rows, Base(number % 3), number % 5 != 0);
                }
            }
        }
    }
    for (int64_t count : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130}) {
        at_the_end = ++number % 4 != 0;
        norm(kernels, count, count % 2 == 0);
        norm(kernels, count, count % 2 != 0);
        activation(kernels, count);
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
