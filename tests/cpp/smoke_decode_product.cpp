// The decode engine's products without Python and torch: packing, every type of weights at odd sizes, int8's limits.
// Part of the program of smoke.cpp.
#include <cstring>
#include <limits>
#include <vector>

#include "smoke_decode.h"

namespace depthlstm::smoke_decoding {
namespace {

int64_t input_bytes(WeightType type, int64_t inputs) {
    return type == WeightType::float32    ? inputs * 4
           : type == WeightType::bfloat16 ? round_up(inputs, 2) * 2
                                          : round_up(inputs, 2);
}

// A packed matrix with buffers of its own.
struct Packed {
    Guarded weights;
    Floats bias, scale;
    Panels panels;
    Packed(const DecodeKernels& kernels, WeightType type, int64_t outputs, int64_t inputs, const float* weight,
           const float* given_bias)
        : weights(round_up(outputs, panel_outputs) * input_bytes(type, inputs), input_bytes(type, 1) > 2 ? 4 : 2),
          bias(round_up(outputs, panel_outputs)),
          scale(round_up(outputs, panel_outputs)) {
        panels.outputs = outputs;
        panels.inputs = inputs;
        panels.type = type;
        panels.weights = weights.data;
        panels.bias = bias.at();
        panels.scale = type == WeightType::int8 ? scale.at() : nullptr;
        kernels.pack(panels, weight, given_bias);
    }
    // What stands at the place of a weight; inputs are padded to pairs, outputs to panels.
    double at(int64_t output, int64_t input) const {
        const int64_t panel = output / panel_outputs, lane = output % panel_outputs, K = panels.inputs;
        if (panels.type == WeightType::float32)
            return double(reinterpret_cast<const float*>(weights.data)[(panel * K + input) * panel_outputs + lane]);
        const int64_t pair = panel * ((K + 1) / 2) + input / 2, place = (pair * panel_outputs + lane) * 2 + input % 2;
        if (panels.type == WeightType::int8) return reinterpret_cast<const int8_t*>(weights.data)[place];
        const uint32_t wide = uint32_t(reinterpret_cast<const uint16_t*>(weights.data)[place]) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return double(value);
    }
};

// Each packed weight is the nearest one of its type, and all padding is zero.
void packing(const DecodeKernels& kernels, WeightType type, int64_t outputs, int64_t inputs) {
    Floats weight(outputs * inputs), bias(outputs);
    weight.randomise();
    bias.randomise();
    const Packed packed(kernels, type, outputs, inputs, weight.at(), bias.at());
    for (int64_t o = 0; o < round_up(outputs, panel_outputs); ++o) {
        double most = 0;
        for (int64_t k = 0; k < inputs && o < outputs; ++k)
            most = std::fmax(most, std::fabs(double(weight.at()[o * inputs + k])));
        near("packed bias", o, packed.bias.at()[o], o < outputs ? double(bias.at()[o]) : 0, 0);
        if (type == WeightType::int8) near("scale", o, packed.scale.at()[o], most / 127, 0);
        for (int64_t k = 0; k < (type == WeightType::float32 ? inputs : round_up(inputs, 2)); ++k) {
            const double given = o < outputs && k < inputs ? double(weight.at()[o * inputs + k]) : 0;
            const double wanted = type == WeightType::int8 && most > 0 ? given / most * 127 : given;
            const double half_a_step = type == WeightType::int8       ? 0.5 + 1e-4
                                       : type == WeightType::bfloat16 ? std::fabs(given) / 256
                                                                      : 0;
            same("packed weight", std::fabs(packed.at(o, k) - wanted) <= half_a_step, 1);
        }
    }
}

// Rows side by side, without a base.
void multiply(const DecodeKernels& kernels, const Panels& panels, const Floats& x, const Floats& y, int64_t rows) {
    Guarded rounded(rows * rounded_row_bytes(panels.inputs), 64);
    ProductCall call;
    call.rounded = rounded.data;
    call.panels = panels;
    call.x = x.at();
    call.x_stride = panels.inputs;
    call.y = y.at();
    call.y_stride = panels.outputs;
    call.rows = rows;
    if (panels.type == WeightType::int8) kernels.round_rows(call);
    kernels.multiply(call);
}

// int8 where every sum of a row is as large as int32 must hold, with either sign, and a row of zeros.
void largest_sums(const DecodeKernels& kernels, int64_t outputs, int64_t inputs, int64_t rows) {
    Floats weight(outputs * inputs), bias(outputs), x(rows * inputs), y(rows * outputs);
    const auto of_output = [](int64_t o) { return o % 3 == 0 ? -127.0 / 32 : 127.0 / 32; };
    const auto of_row = [](int64_t row) { return row % 4 == 1 ? 0.0 : row % 2 == 0 ? 1.0 : -1.0; };
    for (int64_t i = 0; i < weight.count; ++i) weight.at()[i] = float(of_output(i / inputs));
    for (int64_t i = 0; i < x.count; ++i) x.at()[i] = float(of_row(i / inputs));
    bias.randomise();
    const Packed packed(kernels, WeightType::int8, outputs, inputs, weight.at(), bias.at());
    multiply(kernels, packed.panels, x, y, rows);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t o = 0; o < outputs; ++o) {
            const double sum = of_output(o) * of_row(row) * double(inputs);
            near("product of the largest", o, y.at()[row * outputs + o], sum + double(bias.at()[o]), std::fabs(sum));
        }
    }
}

// A NaN in a row or an output makes that row and that output NaN, and no other.
void no_number(const DecodeKernels& kernels, WeightType type, int64_t outputs, int64_t inputs, int64_t rows) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    Floats weight(outputs * inputs), x(rows * inputs), y(rows * outputs);
    weight.randomise();
    x.randomise();
    weight.at()[weight.count - 1] = nan;
    x.at()[inputs / 2] = nan;
    const Packed packed(kernels, type, outputs, inputs, weight.at(), nullptr);
    multiply(kernels, packed.panels, x, y, rows);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < outputs; ++o)
            same("NaN of a product", std::isnan(y.at()[row * outputs + o]), row == 0 || o == outputs - 1);
}

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
    const Packed packed(kernels, type, outputs, inputs, weight.at(), has_bias ? bias.at() : nullptr);

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
    call.panels = packed.panels;
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

}  // namespace

void smoke_decode_products(const DecodeKernels& kernels, int64_t& number) {
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
    for (WeightType type : {WeightType::float32, WeightType::bfloat16, WeightType::int8}) {
        for (int64_t outputs : {1, 31, 33}) {
            for (int64_t inputs : {1, 16, 33}) {
                at_the_end = ++number % 4 != 0;
                packing(kernels, type, outputs, inputs);
                for (int64_t rows : {1, 2, 9}) no_number(kernels, type, outputs, inputs, rows);
            }
        }
    }
    for (int64_t inputs : {515, 516, 517, 4096})
        for (int64_t rows : {1, 2, 9}) largest_sums(kernels, 33, inputs, rows);
}

}  // namespace depthlstm::smoke_decoding
