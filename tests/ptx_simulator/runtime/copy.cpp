// The accesses of a cp.async, compiled with the sanitizers, like the kernels.
#include <cstring>

#include "scheduler.h"

namespace ptx {

// Until the wait the target holds rubbish.
void begin_copy(u8* target, const u8* source, u32 size, u32 source_size) {
    volatile u8 byte = 0;
    for (u32 i = 0; i < source_size; i++) byte = source[i];
    for (u32 i = 0; i < size; i++) target[i] = 0xff;
    (void)byte;
}

void finish_copy(u8* target, const u8* source, u32 size, u32 source_size) {
    for (u32 i = 0; i < size; i++) target[i] = i < source_size ? source[i] : 0;
}

}  // namespace ptx
