// The gates' operands of the CPU and CUDA operators: checked, seen as rows, filled into a GatesCall.
#pragma once

#include <optional>
#include <tuple>

#include "call.h"
#include "common/torch/tensors.h"

namespace depthlstm {

// The common inputs of forward and backward, with the tensors that keep them alive. The device's own code reads the
// seed.
struct Inputs {
    GatesCall call;
    RowView z, c;
    std::optional<RowView> hidden;
    OptionalTensor z_bias, weight, bias;
    int64_t z_width = 0;

    Inputs(const Tensor& z_in, const OptionalTensor& z_bias_in, const OptionalTensor& hidden_in, const Tensor& c_in,
           const OptionalTensor& weight_in, const OptionalTensor& bias_in, const OptionalTensor& seed, int64_t norm,
           int64_t activation, double eps, double dropout_p)
        : z{z_in, 0}, c{c_in, 0} {
        STD_TORCH_CHECK(c_in.dim() >= 1 && c_in.size(c_in.dim() - 1) >= 1, "c must have shape (..., D) with D >= 1");
        STD_TORCH_CHECK(norm >= 0 && norm <= int64_t(Norm::none), "norm must be 0, 1 or 2; found ", norm);
        STD_TORCH_CHECK(activation >= 0 && activation < int64_t(Activation::given),
                        "activation must be the code of one of", activation_names, "; found ", activation);
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1); found ", dropout_p);
        const int64_t features = c_in.size(c_in.dim() - 1);
        const int64_t gates = hidden_in ? 3 : 4;
        z_width = gates * features;
        call.rows = c_in.numel() / features;
        call.features = features;
        call.z_dtype = dtype_of(z_in, "z");
        call.c_dtype = dtype_of(c_in, "c");
        STD_TORCH_CHECK(
            call.c_dtype == call.z_dtype || (call.c_dtype == DType::float32 && call.z_dtype != DType::float64),
            "c must have the dtype of z, or float32 beside a 16-bit z");
        call.norm = Norm(norm);
        call.activation = hidden_in ? Activation::given : Activation(activation);
        call.eps = eps;
        if (seed) {
            STD_TORCH_CHECK(device_of(*seed) == device_of(c_in) && seed->numel() == 1 &&
                                dtype_code(*seed) == aoti_torch_dtype_int64(),
                            "seed must be an int64 tensor of one element on the device of c");
            call.dropout_p = dropout_p;
        }
        z = as_rows(z_in, z_width, "z", c_in, call.z_dtype);
        c = as_rows(c_in, features, "c", c_in, call.c_dtype);
        call.z = z.rows();
        call.c = c.rows();
        if (hidden_in) {
            hidden = as_rows(*hidden_in, features, "hidden", c_in, call.z_dtype);
            call.hidden = hidden->rows();
        }
        if (z_bias_in) {
            z_bias = parameter(*z_bias_in, z_width, "z_bias", c_in, call.z_dtype);
            call.z_bias = z_bias->const_data_ptr();
            call.z_bias_dtype = dtype_of(*z_bias, "z_bias");
        }
        STD_TORCH_CHECK(weight_in.has_value() == bias_in.has_value(),
                        "weight and bias must both be given or both be None");
        if (weight_in) {
            STD_TORCH_CHECK(call.norm != Norm::none, "weight and bias must be None with norm none");
            weight = parameter(*weight_in, z_width, "weight", c_in, call.z_dtype);
            bias = parameter(*bias_in, z_width, "bias", c_in, call.z_dtype);
            call.weight = weight->const_data_ptr();
            call.bias = bias->const_data_ptr();
            call.affine_dtype = dtype_of(*weight, "weight");
            STD_TORCH_CHECK(dtype_of(*bias, "bias") == call.affine_dtype, "bias must have the dtype of weight");
        }
    }
};

// The backward pass's own operands. Incoming gradients are null for None. Outgoing gradients have no elements if they
// are not wanted or have no input.
struct Gradients {
    std::optional<RowView> dh, dc;
    Tensor dz, dhidden, dc_in, dweight, dbias, dz_bias;
    bool affine, z_bias;

    Gradients(GatesCall& call, const OptionalTensor& dh_in, const OptionalTensor& dc_out, const Tensor& z,
              const OptionalTensor& z_bias_in, const OptionalTensor& hidden, const Tensor& c,
              const OptionalTensor& weight, const OptionalTensor& bias, bool affine_gradient, bool z_bias_gradient)
        : dz(empty_as(z)),
          dhidden(hidden ? empty_as(*hidden) : absent(z)),
          dc_in(empty_as(c)),
          dweight(affine_gradient && weight ? empty_as(*weight) : absent(z)),
          dbias(affine_gradient && weight ? empty_as(*bias) : absent(z)),
          dz_bias(z_bias_gradient && z_bias_in ? empty_as(*z_bias_in) : absent(z)),
          affine(affine_gradient && weight),
          z_bias(z_bias_gradient && z_bias_in) {
        if (dh_in) {
            dh = as_rows(*dh_in, call.features, "dh", c, call.z_dtype);
            call.dh = dh->rows();
        }
        if (dc_out) {
            dc = as_rows(*dc_out, call.features, "dc", c, call.c_dtype);
            call.dc = dc->rows();
        }
        call.dz = {dz.mutable_data_ptr(), z.size(z.dim() - 1)};
        call.dc_in = {dc_in.mutable_data_ptr(), call.features};
        if (hidden) call.dhidden = {dhidden.mutable_data_ptr(), call.features};
        if (affine) call.dweight = dweight.mutable_data_ptr(), call.dbias = dbias.mutable_data_ptr();
        if (z_bias) call.dz_bias = dz_bias.mutable_data_ptr();
    }

    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
        return {dz, dhidden, dc_in, dweight, dbias, dz_bias};
    }
};

}  // namespace depthlstm
