// The packed model: a uint8 tensor with a head, the plan, and the weights as this instruction set reads them.
#pragma once

#include <cstdlib>

#include "model.h"

namespace depthlstm {
namespace decode {

constexpr int64_t blob_format = 2;
constexpr char blob_magic[8] = {'d', 'l', 's', 't', 'm', 'd', 'e', 'c'};

struct BlobHead {
    char magic[8];
    int64_t format;
    char isa[16];
    int64_t bytes, plan_count, real_count;
    uint64_t weights_sum;  // of everything behind the plan
    uint64_t head_sum;     // of the head up to here, and of the plan
};
static_assert(sizeof(BlobHead) <= 128);
constexpr int64_t plan_begin = 128;

// A sum of 64 bits over memory. Every word enters by a bijection, so that no single changed word goes unseen. Eight
// lanes, because one would wait for its multiplication.
inline uint64_t checksum(const void* data, int64_t bytes, uint64_t seed = 0) {
    constexpr uint64_t factor = 0x9E3779B97F4A7C15ULL;
    uint64_t lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = seed + uint64_t(i + 1) * factor;
    const char* at = static_cast<const char*>(data);
    int64_t done = 0;
    for (; done + 64 <= bytes; done += 64) {
        uint64_t words[8];
        std::memcpy(words, at + done, 64);
        for (int i = 0; i < 8; ++i) {
            lane[i] = (lane[i] ^ words[i]) * factor;
            lane[i] ^= lane[i] >> 32;
        }
    }
    uint64_t sum = uint64_t(bytes);
    for (; done < bytes; ++done) sum = (sum ^ uint8_t(at[done])) * factor;
    for (int i = 0; i < 8; ++i) {
        sum = (sum ^ lane[i]) * factor;
        sum ^= sum >> 29;
    }
    return sum;
}

inline const DecodeKernels& kernels() {
    const DecodeKernels* chosen = select_decode_kernels();
    STD_TORCH_CHECK(chosen != nullptr, "DEPTHLSTM_CPU_ISA must name an instruction set of this build and CPU; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

inline int64_t weights_begin(int64_t plan_count, int64_t real_count) {
    return round_up(plan_begin + 8 * (plan_count + real_count), 64);
}

inline uint64_t head_sum(const BlobHead& head, const char* blob) {
    const uint64_t sum = checksum(&head, int64_t(offsetof(BlobHead, head_sum)));
    return checksum(blob + plan_begin, 8 * (head.plan_count + head.real_count), sum);
}

inline void check_bytes(const Tensor& tensor, const char* argument) {
    STD_TORCH_CHECK(dtype_code(tensor) == aoti_torch_dtype_uint8() && tensor.dim() == 1 && tensor.is_contiguous() &&
                        tensor.is_cpu(),
                    argument, " must be a contiguous uint8 tensor of one dimension on the CPU");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 64 == 0, argument,
                    " must begin at a multiple of 64 bytes: clone() it");
}

// Reads the model from a blob that this process can run. The tensor must outlive it.
inline Model open_blob(const Tensor& blob) {
    check_bytes(blob, "blob");
    char* memory = static_cast<char*>(blob.data_ptr());
    BlobHead head{};
    STD_TORCH_CHECK(blob.numel() >= plan_begin, "blob must be a packed model; found ", blob.numel(), " bytes");
    std::memcpy(&head, memory, sizeof head);
    STD_TORCH_CHECK(std::memcmp(head.magic, blob_magic, sizeof head.magic) == 0,
                    "blob must be a packed model; found other bytes");
    STD_TORCH_CHECK(head.format == blob_format, "blob must have format ", blob_format, "; found ", head.format,
                    ": pack the model again");
    STD_TORCH_CHECK(head.bytes == blob.numel(), "blob must have ", head.bytes, " bytes; found ", blob.numel(),
                    ": it was cut");
    const bool fits = head.plan_count >= 0 && head.real_count >= 0 && head.plan_count <= head.bytes / 8 &&
                      head.real_count <= head.bytes / 8 &&
                      weights_begin(head.plan_count, head.real_count) <= head.bytes;
    STD_TORCH_CHECK(fits && head.head_sum == head_sum(head, memory), "blob is damaged: its head has another checksum");
    head.isa[sizeof head.isa - 1] = '\0';
    STD_TORCH_CHECK(std::strcmp(head.isa, kernels().isa) == 0, "blob must be packed for ", kernels().isa, "; found ",
                    static_cast<const char*>(head.isa), ": pack the model again");
    const int64_t* plan = reinterpret_cast<const int64_t*>(memory + plan_begin);
    Model model(plan, head.plan_count, reinterpret_cast<const double*>(plan + head.plan_count), head.real_count);
    const int64_t begin = weights_begin(head.plan_count, head.real_count);
    STD_TORCH_CHECK(begin + model.bytes == head.bytes, "blob must have ", begin + model.bytes, " bytes; found ",
                    head.bytes);
    model.place(memory + begin);
    return model;
}

}  // namespace decode
}  // namespace depthlstm
