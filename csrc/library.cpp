// The library's own facts, read through ctypes by the report command. They must work where the operators do not.
#include "common/activations.h"
#include "common/cpu/isa.h"
#include "common/cpu/pool.h"

#ifndef DEPTHLSTM_BUILD_INFO
#define DEPTHLSTM_BUILD_INFO "unknown"
#endif

#define DEPTHLSTM_EXPORT extern "C" __attribute__((visibility("default")))

DEPTHLSTM_EXPORT const char* depthlstm_build_info() { return DEPTHLSTM_BUILD_INFO; }
// The instruction set that runs; empty where DEPTHLSTM_CPU_ISA names one that cannot.
DEPTHLSTM_EXPORT const char* depthlstm_cpu_isa() { return depthlstm::isa_name(depthlstm::chosen_isa()); }
// The activations by name, in the order of their codes, a space before each.
DEPTHLSTM_EXPORT const char* depthlstm_activations() { return depthlstm::activation_names; }

// The pool of large outputs, for depthlstm_fast/memory.py.
DEPTHLSTM_EXPORT void depthlstm_pool_statistics(depthlstm::PoolStatistics* found) {
    *found = depthlstm::pool_statistics();
}
DEPTHLSTM_EXPORT void depthlstm_pool_empty() { depthlstm::pool_empty(); }
DEPTHLSTM_EXPORT void depthlstm_pool_set_limit(int64_t bytes) { depthlstm::pool_set_limit(bytes); }
DEPTHLSTM_EXPORT void depthlstm_pool_poison(int on) { depthlstm::pool_poison(on != 0); }
