// The cell of the depth-wise GRU and its gradient.
#pragma once

#include "common/activations.h"

namespace depthlstm {

// h' = (1 - u) n + u h
template <class V>
DEPTHLSTM_HD V gru_forward(V u, V n, V h) {
    using P = Primitives<V>;
    return P::fma(V(typename P::Scalar(1)) - u, n, u * h);
}

// Gradients of a_r, a_u, a_n, a_m and of h, from that of h'. n = tanh(a_n + r a_m), and `slope` is the slope there.
template <class V>
struct GruGradient {
    V da[4], dh;
};

template <class V>
DEPTHLSTM_HD GruGradient<V> gru_backward(V r, V u, V n, V slope, V a_m, V h, V dh_out) {
    const V one = V(typename Primitives<V>::Scalar(1));
    const V rest = one - u;
    const V direct = dh_out * u;
    const V da_n = dh_out * rest * slope;
    const V da_m = da_n * r;
    return {{da_m * a_m * (one - r), direct * rest * (h - n), da_n, da_m}, direct};
}

}  // namespace depthlstm
