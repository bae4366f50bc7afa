// Group-wise asymmetric quantisation, shared by `quantize` and `append`.
//
// A thread holds 16 tokens of 4 neighbouring channels in registers, so that everything is read once, in rows, and every
// word is whole, but for the 1-bit plane of 3 bits: two slabs write half a word each. `head_dim / 4` threads make a
// slab of 16 tokens, `block / 16` slabs a team: the tokens of one packing block, which for 8-bit metadata share their
// factors. The slabs of a group of tokens share their ranges. A team lies within a thread block.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common/device.cuh"

namespace minikv {

constexpr int kSlabTokens = 16;
constexpr int kQuantizeMaxThreads = 512;  // a team of groups of 128 at a head dim of 256
constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestBFloat16 = 3.3895313892515355e38f;
constexpr float kLargestFloat8 = 448.0f;
constexpr float kSmallestNormal = 1.17549435e-38f;

// 1 / x, and 0 if x is 0 or its reciprocal could overflow. Rounded once, like everything here, because the codes are
// defined bit by bit.
__device__ __forceinline__ float safe_reciprocal(float x) { return x >= kSmallestNormal ? __frcp_rn(x) : 0.0f; }

// ---- Two and four values of the input's type.

template <typename X>
struct PairOf;
template <>
struct PairOf<float> {
  using Type = float2;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <typename X>
using Pair = typename PairOf<X>::Type;

__device__ __forceinline__ float2 lower(float2 a, float2 b) { return {fminf(a.x, b.x), fminf(a.y, b.y)}; }
__device__ __forceinline__ float2 upper(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
__device__ __forceinline__ __half2 lower(__half2 a, __half2 b) { return __hmin2(a, b); }
__device__ __forceinline__ __half2 upper(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 lower(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2(a, b); }
__device__ __forceinline__ __nv_bfloat162 upper(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }

__device__ __forceinline__ float2 to_floats(float2 x) { return x; }
__device__ __forceinline__ float2 to_floats(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }

__device__ __forceinline__ float2 shuffle_xor(float2 x, int lanes) {
  return {__shfl_xor_sync(0xFFFFFFFFu, x.x, lanes), __shfl_xor_sync(0xFFFFFFFFu, x.y, lanes)};
}
template <typename P>
__device__ __forceinline__ P shuffle_xor(P x, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
}

// `condition ? a : b` on values. On objects the compiler may select an address, which needs a stack frame.
__device__ __forceinline__ float2 select(bool condition, float2 a, float2 b) {
  return {condition ? a.x : b.x, condition ? a.y : b.y};
}
template <typename P>
__device__ __forceinline__ P select(bool condition, P a, P b) {
  const uint32_t bits = condition ? reinterpret_cast<uint32_t&>(a) : reinterpret_cast<uint32_t&>(b);
  return reinterpret_cast<const P&>(bits);
}

template <typename X>
struct alignas(4 * sizeof(X)) Quad {
  Pair<X> ab, cd;
};

// The least and greatest of some values, as one pair.
template <typename P>
__device__ __forceinline__ P join_ranges(P a, P b) {
  return {lower(a, b).x, upper(a, b).y};
}

template <typename X>
__device__ __forceinline__ Pair<X> range_of(Quad<X> v) {
  const Pair<X> low = lower(v.ab, v.cd), high = upper(v.ab, v.cd);
  const Pair<X> swapped_low{low.y, low.x}, swapped_high{high.y, high.x};
  return {lower(low, swapped_low).x, upper(high, swapped_high).x};
}

// ---- Metadata: what is stored, and the float32 value that it stands for.

__device__ __forceinline__ float round_to(__half& stored, float x) {
  stored = __float2half_rn(fminf(fmaxf(x, -kLargestHalf), kLargestHalf));
  return __half2float(stored);
}

__device__ __forceinline__ float round_to(__nv_bfloat16& stored, float x) {
  stored = __float2bfloat16_rn(fminf(fmaxf(x, -kLargestBFloat16), kLargestBFloat16));
  return __bfloat162float(stored);
}

__device__ __forceinline__ float round_to(__nv_fp8_e4m3& stored, float x) {
  stored = __nv_fp8_e4m3(x);
  return static_cast<float>(stored);
}

template <typename M>
struct alignas(4 * sizeof(M)) MetadataQuad {
  M m[4];
};

// Rounds four values to M in place. Float8 uses a factor per packing block, which maps the block's largest magnitude to
// the largest float8. Called by all threads of the block; `largest` is the team's and starts at zero.
template <typename M>
__device__ __forceinline__ MetadataQuad<M> round_metadata(float (&x)[4], uint32_t* largest, float* factor, bool first) {
  MetadataQuad<M> stored;
  if constexpr (std::is_same_v<M, __nv_fp8_e4m3>) {
    const float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    atomicMax(largest, __float_as_uint(most));  // magnitudes order as their bits do
    __syncthreads();
    const float block_factor = __fmul_rn(__uint_as_float(*largest), 1.0f / kLargestFloat8);
    const float reciprocal = safe_reciprocal(block_factor);
    if (first) *factor = block_factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(round_to(stored.m[i], __fmul_rn(x[i], reciprocal)), block_factor);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = round_to(stored.m[i], x[i]);
  }
  return stored;
}

// ---- One slab.

// Where keys or values are stored. Codes of 3 bits have a second plane, of 1 bit.
struct Stored {
  uint32_t *words, *high_words;
  void *scale, *zero;
  float *scale_factor, *zero_factor;  // float8 metadata's
};

// Bits of a code in the first plane.
__host__ __device__ constexpr int first_plane(int bits) { return bits == 3 ? 2 : bits; }

// Tokens that fill a word of every plane; at least a slab.
constexpr int word_tokens(int bits) { return bits == 3 ? 32 : kSlabTokens; }

// Tokens that fill whole groups and words.
constexpr int packing_block(int bits, int group) { return group > word_tokens(bits) ? group : word_tokens(bits); }

// A thread's place in its block, and the memory it reads and writes. Inactive threads fill up the last warp.
template <typename M>
struct Slab {
  int quad, quads;      // of 4 channels
  int team, index;      // in the thread block, in the team
  int group, head_dim;  // tokens or channels, channels
  bool active;
  uint32_t* words;                    // the thread's first words
  uint16_t* high_words;               // its halves of the second plane's words, every other one
  M *scale, *zero;                    // by tokens the group's row, by channels the slab's first row
  float *scale_factor, *zero_factor;  // the team's

  __device__ __forceinline__ Slab(int group, int block, int head_dim, int slabs) : group(group), head_dim(head_dim) {
    quads = head_dim / 4;
    const int slab = threadIdx.x / quads, per_team = block / kSlabTokens;
    quad = threadIdx.x % quads, team = slab / per_team, index = slab % per_team;
    active = slab < slabs;
  }

  // Number of the slab in its group of tokens.
  __device__ __forceinline__ int index_in_group() const { return index % (group / kSlabTokens); }

  // Points at what `to` holds of slab number `at` of all rows.
  template <int Bits, bool ByTokens>
  __device__ __forceinline__ void place(const Stored& to, uint32_t at, int block) {
    const int64_t token = static_cast<int64_t>(at) * kSlabTokens;
    words = to.words + token * first_plane(Bits) / 32 * head_dim + 4 * quad;
    if constexpr (Bits == 3) {
      high_words = reinterpret_cast<uint16_t*>(to.high_words + token / 32 * head_dim + 4 * quad) + at % 2;
    }
    const int64_t row = ByTokens ? at / (group / kSlabTokens) : token;
    const int64_t metadata = row * (ByTokens ? head_dim : head_dim / group);
    scale = static_cast<M*>(to.scale) + metadata, zero = static_cast<M*>(to.zero) + metadata;
    const uint32_t packing_block = at / (block / kSlabTokens);
    scale_factor = to.scale_factor + packing_block, zero_factor = to.zero_factor + packing_block;
  }
};

struct QuantizeScratch {
  union {
    float4 ranges[2][kQuantizeMaxThreads];  // by tokens
    // By channels, {zero, 1 / scale} of a group's tokens; two more to keep neighbours in different banks.
    float2 tokens[kQuantizeMaxThreads / 4][kSlabTokens + 2];
  };
  uint32_t largest[kQuantizeMaxThreads / 8][2];  // of a team, for float8 metadata
};

// Exchanges ranges between lanes so that the lane with bit `lanes` clear has the first half of the tokens, merged, and
// the other one the second.
template <int Tokens, typename P>
__device__ __forceinline__ void exchange_halves(P (&range)[kSlabTokens], int lanes) {
  const bool second = threadIdx.x & lanes;
#pragma unroll
  for (int t = 0; t < Tokens / 2; ++t) {
    const P a = range[t], b = range[t + Tokens / 2];
    range[t] = join_ranges(select(second, b, a), shuffle_xor(select(second, a, b), lanes));
  }
}

// Adding this to 0 <= x < 2**22 rounds half to even and leaves the integer in the low bits.
constexpr float kRoundingShift = 12582912.0f;
constexpr uint32_t kRoundingShiftBits = 0x4B400000u;

// Packs codes of 16 tokens x 4 channels into words; `zero(t, c)` and `reciprocal(t, c)` are a value's metadata.
template <int Bits, typename X, typename M, typename Zero, typename Reciprocal>
__device__ __forceinline__ void pack_codes(const Quad<X> (&v)[kSlabTokens], const Slab<M>& slab, Zero zero,
                                           Reciprocal reciprocal) {
  constexpr int kPlane = first_plane(Bits), kWord = 32 / kPlane;
  constexpr float kLevels = (1 << Bits) - 1;
#pragma unroll
  for (int w = 0; w < kSlabTokens / kWord; ++w) {
    uint32_t word[4] = {}, high[4] = {};
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const int t = w * kWord + i;
      const float2 ab = to_floats(v[t].ab), cd = to_floats(v[t].cd);
      const float x[4] = {ab.x, ab.y, cd.x, cd.y};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float steps = fminf(fmaxf(__fmul_rn(x[c] - zero(t, c), reciprocal(t, c)), 0.0f), kLevels);
        const uint32_t code = __float_as_uint(steps + kRoundingShift) - kRoundingShiftBits;
        word[c] += (Bits == 3 ? code % 4 : code) << (i * kPlane);
        if constexpr (Bits == 3) high[c] += code / 4 << i;
      }
    }
    *reinterpret_cast<uint4*>(slab.words + w * slab.head_dim) = make_uint4(word[0], word[1], word[2], word[3]);
    if constexpr (Bits == 3) {
#pragma unroll
      for (int c = 0; c < 4; ++c) slab.high_words[2 * c] = static_cast<uint16_t>(high[c]);
    }
  }
}

// Quantises one slab; `load(t)` gives the thread's four channels of token t. Called by all threads of the block.
template <int Bits, bool ByTokens, typename X, typename M, typename Load>
__device__ __forceinline__ void quantize_slab(const Slab<M>& slab, QuantizeScratch& scratch, Load load) {
  constexpr float kStep = 1.0f / ((1 << Bits) - 1);
  constexpr bool kFactors = std::is_same_v<M, __nv_fp8_e4m3>;
  if constexpr (kFactors) {
    if (threadIdx.x < kQuantizeMaxThreads / 8) scratch.largest[threadIdx.x][0] = scratch.largest[threadIdx.x][1] = 0;
    __syncthreads();
  }
  Quad<X> v[kSlabTokens];
#pragma unroll
  for (int t = 0; t < kSlabTokens; ++t) v[t] = slab.active ? load(t) : Quad<X>{};

  // The four ranges that this thread rounds: by tokens its channels', by channels those of tokens 4 * (quad % 4) and
  // up of its group.
  float step[4], low[4];
  if constexpr (ByTokens) {
    Quad<X> least = v[0], most = v[0];
#pragma unroll
    for (int t = 1; t < kSlabTokens; ++t) {
      least = {lower(least.ab, v[t].ab), lower(least.cd, v[t].cd)};
      most = {upper(most.ab, v[t].ab), upper(most.cd, v[t].cd)};
    }
    float2 low_ab = to_floats(least.ab), low_cd = to_floats(least.cd);
    float2 high_ab = to_floats(most.ab), high_cd = to_floats(most.cd);
    if (slab.group > kSlabTokens) {
      scratch.ranges[0][threadIdx.x] = make_float4(low_ab.x, low_ab.y, low_cd.x, low_cd.y);
      scratch.ranges[1][threadIdx.x] = make_float4(high_ab.x, high_ab.y, high_cd.x, high_cd.y);
      __syncthreads();
      const int first = threadIdx.x - slab.index_in_group() * slab.quads;
      for (int s = 0; s < slab.group / kSlabTokens; ++s) {
        const int thread = first + s * slab.quads;
        if (!slab.active) break;
        const float4 l = scratch.ranges[0][thread], h = scratch.ranges[1][thread];
        low_ab = lower(low_ab, {l.x, l.y}), low_cd = lower(low_cd, {l.z, l.w});
        high_ab = upper(high_ab, {h.x, h.y}), high_cd = upper(high_cd, {h.z, h.w});
      }
    }
    low[0] = low_ab.x, low[1] = low_ab.y, low[2] = low_cd.x, low[3] = low_cd.y;
    step[0] = high_ab.x - low_ab.x, step[1] = high_ab.y - low_ab.y;
    step[2] = high_cd.x - low_cd.x, step[3] = high_cd.y - low_cd.y;
  } else {
    Pair<X> range[kSlabTokens];
#pragma unroll
    for (int t = 0; t < kSlabTokens; ++t) range[t] = range_of<X>(v[t]);
    exchange_halves<16>(range, 2);
    exchange_halves<8>(range, 1);
    for (int lanes = 4; lanes < slab.group / 4; lanes *= 2) {
#pragma unroll
      for (int t = 0; t < 4; ++t) range[t] = join_ranges(range[t], shuffle_xor(range[t], lanes));
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 ends = to_floats(range[t]);
      low[t] = ends.x, step[t] = ends.y - ends.x;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) step[i] = __fmul_rn(step[i], kStep);

  const bool first = slab.active && slab.index == 0 && slab.quad == 0;
  uint32_t* largest = scratch.largest[slab.active ? slab.team : kQuantizeMaxThreads / 8 - 1];
  const MetadataQuad<M> scale = round_metadata<M>(step, largest, slab.scale_factor, first);
  const MetadataQuad<M> zero = round_metadata<M>(low, largest + 1, slab.zero_factor, first);
  float reciprocal[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) reciprocal[i] = safe_reciprocal(step[i]);

  if constexpr (ByTokens) {
    if (!slab.active) return;
    if (slab.index_in_group() == 0) {
      *reinterpret_cast<MetadataQuad<M>*>(slab.scale + 4 * slab.quad) = scale;
      *reinterpret_cast<MetadataQuad<M>*>(slab.zero + 4 * slab.quad) = zero;
    }
    pack_codes<Bits, X>(v, slab, [&](int, int c) { return low[c]; }, [&](int, int c) { return reciprocal[c]; });
  } else {
    const int lanes = slab.group / 4, groups = slab.quads / lanes, token = 4 * (slab.quad % 4);
    float2(&tokens)[kSlabTokens + 2] = scratch.tokens[threadIdx.x / lanes];
    if (slab.active && slab.quad % lanes < 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tokens[token + i] = make_float2(low[i], reciprocal[i]);
        const int at = (token + i) * groups + slab.quad / lanes;
        slab.scale[at] = scale.m[i], slab.zero[at] = zero.m[i];
      }
    }
    __syncwarp();  // the lanes of a group are lanes of one warp
    if (!slab.active) return;
    pack_codes<Bits, X>(v, slab, [&](int t, int) { return tokens[t].x; }, [&](int t, int) { return tokens[t].y; });
  }
}

}  // namespace minikv
