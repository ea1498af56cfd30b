// cp.async by CUDA's primitives. cuda::pipeline is libcu++'s.
#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0, SIMT_WHERE) {
    simt::cp_async(to, from, int(bytes), int(bytes - zeros), at);
}
inline void __pipeline_commit() { simt::cp_async_commit(); }
inline void __pipeline_wait_prior(size_t groups) { simt::cp_async_wait(int(groups)); }
