// A formula that is the same on the CPU and in CUDA kernels is written once: SRPPO_EITHER in place of inline.
#pragma once

#if defined(__CUDACC__)
#define SRPPO_EITHER __host__ __device__ inline
#else
#define SRPPO_EITHER inline
#endif
