// The cell of the depth-wise LSTM and its gradient, once for scalars and SIMD vectors, host and device.
#pragma once

#include "common/activations.h"

namespace depthlstm {

// c = f c' + i g,  h = o c
template <class V>
DEPTHLSTM_HD void cell_forward(V i, V f, V o, V g, V c_in, V& c, V& h) {
    c = Primitives<V>::fma(f, c_in, i * g);
    h = o * c;
}

// Gradients of a_i, a_f, a_o, of g and of c', from those of h and c. g is the value after dropout.
template <class V>
struct CellGradient {
    V da_i, da_f, da_o, dg, dc_in;
};

template <class V>
DEPTHLSTM_HD CellGradient<V> cell_backward(V i, V f, V o, V g, V c_in, V dh, V dc) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
    const V one = V(T(1));
    const V c = P::fma(f, c_in, i * g);
    const V t = P::fma(dh, o, dc);
    const V ti = t * i;
    const V tf = t * f;
    return {ti * (one - i) * g, tf * (one - f) * c_in, dh * c * o * (one - o), ti, tf};
}

}  // namespace depthlstm
