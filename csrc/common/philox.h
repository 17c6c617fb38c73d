// The random words of dropout, the same on every device: see dropout_mask in depthlstm_fast/reference/depth_lstm.py.
#pragma once

#include "types.h"

namespace depthlstm {

// One block of Philox4x32-10 (Salmon et al., SC 2011): the dropout bits of features 4 block .. 4 block + 3 of a row.
DEPTHLSTM_HD void philox(uint64_t seed, uint64_t row, uint32_t block, uint32_t out[4]) {
    uint32_t x0 = block, x1 = uint32_t(row), x2 = uint32_t(row >> 32), x3 = 0;
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(0xD2511F53u) * x0;
        const uint64_t product1 = uint64_t(0xCD9E8D57u) * x2;
        x0 = uint32_t(product1 >> 32) ^ x1 ^ key0;
        x1 = uint32_t(product1);
        x2 = uint32_t(product0 >> 32) ^ x3 ^ key1;
        x3 = uint32_t(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = x0, out[1] = x1, out[2] = x2, out[3] = x3;
}

}  // namespace depthlstm
