// Memory of the pool as an operator: for products, whose outputs torch would allocate.
#include "common/torch/tensors.h"

namespace depthlstm {
namespace {

Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows and columns must not be negative; found ", rows, " and ", columns);
    const int64_t sizes[] = {rows, columns};
    return empty(sizes, 2, dtype_code(like), device_of(like));
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def("empty_matrix(Tensor like, int rows, int columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) { m.impl("empty_matrix", TORCH_BOX(&depthlstm::empty_matrix)); }
