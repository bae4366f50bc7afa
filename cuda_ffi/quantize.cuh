// Group-wise asymmetric quantisation of one packing block, shared by `quantize` and `append`.
#pragma once

#include <cuda_fp8.h>

#include "device.cuh"

namespace minikv {

constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestBFloat16 = 3.3895313892515355e38f;
constexpr float kSmallestNormal = 1.17549435e-38f;

// 1 / x, and 0 where x is 0 or its reciprocal could overflow. Rounded once, as everything here: the codes are defined
// bit by bit.
__device__ __forceinline__ float safe_reciprocal(float x) { return x >= kSmallestNormal ? __frcp_rn(x) : 0.0f; }

// Stores one scale or zero and returns the float32 value that it stands for.
template <typename T>
__device__ __forceinline__ float store_metadata(T* destination, float x);

template <>
__device__ __forceinline__ float store_metadata(__half* destination, float x) {
  const __half stored = __float2half_rn(fminf(fmaxf(x, -kLargestHalf), kLargestHalf));
  *destination = stored;
  return __half2float(stored);
}

template <>
__device__ __forceinline__ float store_metadata(__nv_bfloat16* destination, float x) {
  const __nv_bfloat16 stored = __float2bfloat16_rn(fminf(fmaxf(x, -kLargestBFloat16), kLargestBFloat16));
  *destination = stored;
  return __bfloat162float(stored);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ uint32_t code_of(float x, float zero, float reciprocal, float levels) {
  return static_cast<uint32_t>(fminf(fmaxf(rintf(__fmul_rn(x - zero, reciprocal)), 0.0f), levels));
}

struct Range {
  float low, high;
  __device__ __forceinline__ void include(float x) { low = fminf(low, x), high = fmaxf(high, x); }
};

// Keys: one thread quantises one group of `group` tokens of one channel. x advances by `stride` elements a token; token
// `fresh`, if it lies in the group, is read from `fresh_value` instead.
template <int Bits, typename X, typename M>
__device__ __forceinline__ void quantize_tokens_group(const X* x, int64_t stride, int group, uint32_t* words,
                                                      int64_t word_stride, M* scale, M* zero, int fresh = -1,
                                                      const X* fresh_value = nullptr) {
  constexpr int kWord = 32 / Bits;
  constexpr float kLevels = (1 << Bits) - 1;
  const auto load = [&](int t) { return to_float(t == fresh ? *fresh_value : x[t * stride]); };
  Range range{INFINITY, -INFINITY};
  for (int first = 0; first < group; first += 16) {
    float v[16];
#pragma unroll
    for (int t = 0; t < 16; ++t) v[t] = load(first + t);
#pragma unroll
    for (int t = 0; t < 16; ++t) range.include(v[t]);
  }
  const float s = store_metadata(scale, __fmul_rn(range.high - range.low, 1.0f / kLevels));
  const float z = store_metadata(zero, range.low);
  const float reciprocal = safe_reciprocal(s);
  for (int first = 0; first < group; first += 16) {  // a second read of a group of 16 comes from the first level cache
    float v[16];
#pragma unroll
    for (int t = 0; t < 16; ++t) v[t] = load(first + t);
#pragma unroll
    for (int w = 0; w < 16 / kWord; ++w) {
      uint32_t word = 0;
#pragma unroll
      for (int t = 0; t < kWord; ++t) word |= code_of(v[w * kWord + t], z, reciprocal, kLevels) << (t * Bits);
      words[(first / kWord + w) * word_stride] = word;
    }
  }
}

// Values: one thread per channel of 16 tokens; the `group` threads of a group are neighbouring lanes (and, for groups
// larger than a warp, exchange their ranges through `shared`, [2][threads / 32][16] floats). All threads of the block
// call.
template <int Bits, typename X, typename M>
__device__ __forceinline__ void quantize_channels_rows(const X* x, int64_t stride, int group, bool active,
                                                       uint32_t* words, int64_t word_stride, M* scale, M* zero,
                                                       int64_t meta_stride, float* shared) {
  constexpr int kWord = 32 / Bits;
  constexpr float kLevels = (1 << Bits) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float v[16], low[16], high[16];
#pragma unroll
  for (int t = 0; t < 16; ++t) v[t] = low[t] = high[t] = active ? to_float(x[t * stride]) : 0.0f;
  // Reduce over 16 lanes and scatter: each step halves the tokens a lane holds, until lane i has those of token i % 16.
#pragma unroll
  for (int d = 8; d; d >>= 1) {
    const bool upper = lane & d;
#pragma unroll
    for (int t = 0; t < d; ++t) {
      const float other_low = __shfl_xor_sync(0xFFFFFFFFu, upper ? low[t] : low[t + d], d);
      const float other_high = __shfl_xor_sync(0xFFFFFFFFu, upper ? high[t] : high[t + d], d);
      low[t] = fminf(upper ? low[t + d] : low[t], other_low);
      high[t] = fmaxf(upper ? high[t + d] : high[t], other_high);
    }
  }
  if (group > 16) {
    low[0] = fminf(low[0], __shfl_xor_sync(0xFFFFFFFFu, low[0], 16));
    high[0] = fmaxf(high[0], __shfl_xor_sync(0xFFFFFFFFu, high[0], 16));
  }
  const int token = lane % 16;
  if (group > 32) {
    if (lane < 16) shared[warp * 16 + token] = low[0], shared[(warps + warp) * 16 + token] = high[0];
    __syncthreads();
    const int first = warp / (group / 32) * (group / 32);
    for (int w = first; w < first + group / 32; ++w) {
      low[0] = fminf(low[0], shared[w * 16 + token]);
      high[0] = fmaxf(high[0], shared[(warps + w) * 16 + token]);
    }
    __syncthreads();
  }
  M stored_scale, stored_zero;
  const float reciprocal = safe_reciprocal(store_metadata(&stored_scale, __fmul_rn(high[0] - low[0], 1.0f / kLevels)));
  const float base = store_metadata(&stored_zero, low[0]);
  if (active && threadIdx.x % group < 16) {
    scale[token * meta_stride] = stored_scale;
    zero[token * meta_stride] = stored_zero;
  }
  uint32_t word = 0;
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const int source = (lane & 16) | t;
    const float z = __shfl_sync(0xFFFFFFFFu, base, source), r = __shfl_sync(0xFFFFFFFFu, reciprocal, source);
    word |= code_of(v[t], z, r, kLevels) << (t % kWord * Bits);
    if (t % kWord == kWord - 1) {
      if (active) words[t / kWord * word_stride] = word;
      word = 0;
    }
  }
}

}  // namespace minikv
