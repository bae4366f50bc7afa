// Counters by which the last block of a launch to arrive finds out that it is the last.
#pragma once

#include <cstdint>

namespace minikv {

// A launch takes the next counters, so two launches share some only if about a million lie between them, and those must
// not run at the same time. Every launch leaves its counters at zero.
constexpr uint32_t kCounters = 1 << 20;

// `count` counters of `device`, the current one; at most kCounters.
int* take_counters(int device, uint32_t count);

#if defined(__CUDACC__)
// Adds to a counter with acquire and release order: whoever reads the sum sees what was written before each addition.
__device__ __forceinline__ int add_acquire_release(int* counter, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
#endif

}  // namespace minikv
