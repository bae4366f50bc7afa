// Decode attention over a short cache: a warp's products with its half of a tile, and the softmax between them.
//
// Operands are swapped, S^T = K Q^T and O^T = V^T P^T, as in kernel.cuh. Whatever the number of bits, a lane row holds
// units of 16 tokens, and the warp takes four slots of each: slot j is the tokens `4 * half + j` and 8 further.
#pragma once

#include "decode/short_cache.cuh"
#include "decode/short_copy.cuh"

namespace minikv {

// The four slots of a pair of 16-bit halves, turned so that the first is at bit 2 (of the lower plane) and at bit 4 (of
// the plane of the third bit).
template <int Bits>
struct FourSlots {
  uint32_t low, high;

  template <int J>
  __device__ __forceinline__ uint32_t offset_pair() const {
    if constexpr (Bits == 3) {
      return offset_code<2, 0>(rotate_left(low, 32 - 2 * J)) | (rotate_left(high, 32 - J) & 0x00100010u);
    } else {
      return offset_code<Bits, J>(Bits == 4 && J >= 2 ? rotate_left(low, 24) : low);
    }
  }

  template <int J>
  static constexpr uint32_t kMinusOffset = CodeSlot < Bits == 3 ? 2 : Bits,
                            Bits == 3 ? 0 : J > ::kMinusOffset;
};

// Selects 16-bit half `half` of two words for __byte_perm.
__device__ __forceinline__ uint32_t select_halves(int half) { return half ? 0x7632 : 0x5410; }

__device__ __forceinline__ uint4 load_chunk(const uint8_t* at) { return *reinterpret_cast<const uint4*>(at); }

// ---- Keys.

template <int Bits, int J>
__device__ __forceinline__ void key_slots(float (*s)[4], const FourSlots<Bits> (&codes)[4], uint2 scale, uint2 query) {
  if constexpr (J < 4) {
    constexpr uint32_t kMinusOffset = FourSlots<Bits>::template kMinusOffset<J>;
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t channels = i < 2 ? scale.x : scale.y;
      a[i] = half2_fma(codes[i].template offset_pair<J>(), channels, half2_mul(channels, kMinusOffset));
    }
    mma_f16(s[J], a[0], a[1], a[2], a[3], query.x, query.y);
    key_slots<Bits, J + 1>(s, codes, scale, query);
  }
}

// Codes of the lane's four channels of a step: [channels 0 and 1, tokens 0 .. 7 of the unit], [the same, 8 .. 15],
// [channels 2 and 3, ...], [...]. `words`, `high`: where the lane's words of the step are.
template <int H, int Bits>
__device__ __forceinline__ void key_codes(FourSlots<Bits> (&codes)[4], const uint8_t* words, const uint8_t* high,
                                          const ShortLane& lane) {
  if constexpr (Bits == 4) {
    const uint4 a = load_chunk(words), b = load_chunk(words + ShortShape<H>::kSecondWords);
    const uint32_t select = select_halves(lane.half);
    codes[0].low = rotate_left(__byte_perm(a.x, a.y, select), 2);
    codes[1].low = rotate_left(__byte_perm(b.x, b.y, select), 2);
    codes[2].low = rotate_left(__byte_perm(a.z, a.w, select), 2);
    codes[3].low = rotate_left(__byte_perm(b.z, b.w, select), 2);
  } else {
    const uint4 w = load_chunk(words);
    const int turn = 2 - 8 * lane.half;
    codes[0].low = rotate_left(__byte_perm(w.x, w.y, 0x5410), turn);
    codes[1].low = rotate_left(__byte_perm(w.x, w.y, 0x7632), turn);
    codes[2].low = rotate_left(__byte_perm(w.z, w.w, 0x5410), turn);
    codes[3].low = rotate_left(__byte_perm(w.z, w.w, 0x7632), turn);
  }
  if constexpr (Bits == 3) {
    const uint4 w = load_chunk(high);
    const uint32_t select = select_halves(lane.unit() & 1);
    const uint32_t first = __byte_perm(w.x, w.y, select), second = __byte_perm(w.z, w.w, select);
    const int turn = 4 - 4 * lane.half;
    codes[0].high = rotate_left(first, turn);
    codes[1].high = rotate_left(first, turn - 8);
    codes[2].high = rotate_left(second, turn);
    codes[3].high = rotate_left(second, turn - 8);
  }
}

// Logits of the warp's packed tokens: s[j][0, 1] of tokens `4 * half + j` of the lane's unit, s[j][2, 3] 8 further.
// Minus infinity for units beyond `valid` tokens.
template <int H, int Bits>
__device__ __forceinline__ void packed_logits(float (&s)[4][4], const ShortSide& side, const uint8_t* tile,
                                              const uint2* queries, const ShortLane& lane, int valid) {
  using Shape = ShortShape<H>;
  const int unit = lane.unit();
  const uint8_t* words = tile + unit * Shape::kWordRow + 16 * lane.quad;
  const uint8_t* high = tile + side.high_at + (unit >> 1) * Shape::kHighRow + 16 * lane.quad;
  const uint8_t* scales =
      tile + side.halves_at + (unit * kUnitTokens >> side.group_log2) * Shape::kHalvesRow + 8 * lane.quad;
  const uint8_t* zeros = scales + side.halves_bytes;
  float zero_part[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
  }
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    FourSlots<Bits> codes[4];
    key_codes<H, Bits>(codes, words + 64 * step, high + 64 * step, lane);
    const uint2 scale = *reinterpret_cast<const uint2*>(scales + 32 * step);
    const uint2 zero = *reinterpret_cast<const uint2*>(zeros + 32 * step);
    const uint2 query = queries[step * kWarpSize + lane.lane];
    mma_f16(zero_part, zero.x, 0, zero.y, 0, query.x, query.y);
    key_slots<Bits, 0>(s, codes, scale, query);
  }
  const bool exists = unit * kUnitTokens < valid;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = exists ? s[j][i] + zero_part[i & 1] : -INFINITY;
  }
}

// Logits of the warp's 16 tokens of the tail: s[0][0, 1] of token `row`, s[0][2, 3] of `row + 8`.
template <int H>
__device__ __forceinline__ void tail_logits(float (&s)[4][4], const uint8_t* tile, const uint2* queries,
                                            const ShortLane& lane, int valid) {
  const int token = 16 * lane.half + lane.row;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = j == 0 ? 0.0f : -INFINITY;
  }
#pragma unroll 1
  for (int step = 0; step < ShortShape<H>::kSteps; ++step) {
    const uint8_t* at = tile + token * ShortShape<H>::kHalvesRow + 32 * step + 8 * lane.quad;
    const uint2 low = *reinterpret_cast<const uint2*>(at);
    const uint2 high = *reinterpret_cast<const uint2*>(at + 8 * ShortShape<H>::kHalvesRow);
    const uint2 query = queries[step * kWarpSize + lane.lane];
    mma_f16(s[0], bfloat2_to_half2(low.x), bfloat2_to_half2(high.x), bfloat2_to_half2(low.y), bfloat2_to_half2(high.y),
            query.x, query.y);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[0][i] = token + 8 * (i >> 1) < valid ? s[0][i] : -INFINITY;
}

// ---- Softmax. Lane columns are queries 2 * quad and 2 * quad + 1.

struct ShortSoftmax {
  float maximum[2] = {kMasked, kMasked}, denominator[2] = {0.0f, 0.0f};
  float rescale[2];  // of outputs so far

  // Turns logits into transposed half pairs of probabilities: row `query`, column pair (2 quad, 2 quad + 1) of the
  // lane rows that gave the logits; low: of s[j][0, 1], high: of s[j][2, 3].
  __device__ __forceinline__ void take(float (&s)[4][4], float scale_log2, uint32_t (&low)[4], uint32_t (&high)[4]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float next = maximum[c];
#pragma unroll
      for (int j = 0; j < 4; ++j) next = fmaxf(next, fmaxf(s[j][c], s[j][c + 2]));
#pragma unroll
      for (int d = 4; d < kWarpSize; d <<= 1) next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, d));
      rescale[c] = exp2_approx((maximum[c] - next) * scale_log2);
      maximum[c] = next;
      denominator[c] *= rescale[c];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = c; i < 4; i += 2) {
          s[j][i] = exp2_approx(fmaf(s[j][i], scale_log2, -next * scale_log2));
          denominator[c] += s[j][i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      low[j] = transpose_8x8(pack_half2(s[j][0], s[j][1]));
      high[j] = transpose_8x8(pack_half2(s[j][2], s[j][3]));
    }
  }
};

// ---- Values. `out` is the warp's own output [G'][H] in shared memory.

template <int Bits, int J>
__device__ __forceinline__ void value_slots(float (&o)[4], const FourSlots<Bits> (&codes)[4],
                                            const uint32_t (&scale)[2][4], const uint32_t (&b0)[4],
                                            const uint32_t (&b1)[4]) {
  if constexpr (J < 4) {
    constexpr uint32_t kMinusOffset = FourSlots<Bits>::template kMinusOffset<J>;
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t unit = scale[i / 2][J];
      a[i] = half2_fma(codes[i].template offset_pair<J>(), unit, half2_mul(unit, kMinusOffset));
    }
    mma_f16(o, a[0], a[1], a[2], a[3], b0[J], b1[J]);
    value_slots<Bits, J + 1>(o, codes, scale, b0, b1);
  }
}

// Codes of four consecutive channels of a unit. `words`, `high`: where the unit's words of the channels are.
template <int H, int Bits>
__device__ __forceinline__ void value_codes(FourSlots<Bits> (&codes)[4], const uint8_t* words, const uint8_t* high,
                                            int half, int unit) {
  if constexpr (Bits == 4) {
    const uint4 a = load_chunk(words), b = load_chunk(words + ShortShape<H>::kSecondWords);
    const uint32_t select = select_halves(half);
    codes[0].low = rotate_left(__byte_perm(a.x, b.x, select), 2);
    codes[1].low = rotate_left(__byte_perm(a.y, b.y, select), 2);
    codes[2].low = rotate_left(__byte_perm(a.z, b.z, select), 2);
    codes[3].low = rotate_left(__byte_perm(a.w, b.w, select), 2);
  } else {
    const uint4 w = load_chunk(words);
    const uint32_t all[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) codes[c].low = rotate_left(all[c], 2 - 8 * half);
  }
  if constexpr (Bits == 3) {
    const uint4 w = load_chunk(high);
    const uint32_t all[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      codes[c].high = rotate_left(__byte_perm(all[c], 0, unit & 1 ? 0x4342 : 0x4140), 4 - 4 * half);
    }
  }
}

// Scales or zeros of four slots of the lane row's run: [units quad and quad + 4][slot], each a pair of tokens. Missing
// units have probability 0, but their metadata may be NaN, so the first unit's are read.
__device__ __forceinline__ void value_metadata(uint32_t (&d)[2][4], const uint8_t* halves, const ShortLane& lane,
                                               int valid) {
  const int slot = 4 * lane.half + (lane.lane >> 3) + 8 * (lane.lane & 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int unit = 4 * i + (lane.lane >> 1 & 3);
    const int token = (unit * kUnitTokens < valid ? unit * kUnitTokens : 0) + slot;
    load_matrices_transposed(d[i], shared_address(halves + 16 * padded_token(token)));
  }
}

// Adds the warp's packed values times their probabilities to the output.
template <int H, int Bits>
__device__ __forceinline__ void packed_values(float* out, const ShortSide& side, const uint8_t* tile,
                                              const uint32_t (&low)[4], const uint32_t (&high)[4],
                                              const float (&rescale)[2], const ShortLane& lane, int queries,
                                              int valid) {
  using Shape = ShortShape<H>;
  uint32_t b0[4], b1[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    b0[j] = __byte_perm(low[j], high[j], 0x5410);
    b1[j] = __byte_perm(low[j], high[j], 0x7632);
  }
#pragma unroll 1
  for (int block = 0; block < Shape::kBlocks; ++block) {
    const uint8_t* halves = tile + side.halves_at + block * Shape::kValueHalves;
    uint32_t scale[2][4], zero[2][4];
    value_metadata(scale, halves, lane, valid);
    value_metadata(zero, halves + side.halves_bytes, lane, valid);
    float zero_part[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) mma_f16(zero_part, zero[0][j], 0, zero[1][j], 0, b0[j], b1[j]);
#pragma unroll 1
    for (int c = 0; c < Shape::kRun; c += 4) {
      const int channel = block * Shape::kBlockChannels + lane.row * Shape::kRun + c;
      FourSlots<Bits> first[4], second[4];  // of units quad and quad + 4
      const uint8_t* words = tile + lane.quad * Shape::kWordRow + 4 * channel;
      const uint8_t* high = tile + side.high_at + (lane.quad >> 1) * Shape::kHighRow + 4 * channel;
      value_codes<H, Bits>(first, words, high, lane.half, lane.quad);
      value_codes<H, Bits>(second, words + 4 * Shape::kWordRow, high + 2 * Shape::kHighRow, lane.half, lane.quad);
      float o[2][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const FourSlots<Bits> codes[4] = {first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1]};
        value_slots<Bits, 0>(o[i], codes, scale, b0, b1);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = 2 * lane.quad + i;
        if (query < queries) {
          float4& total = *reinterpret_cast<float4*>(out + query * H + channel);
          total = make_float4(
              fmaf(total.x, rescale[i], o[0][i] + zero_part[i]), fmaf(total.y, rescale[i], o[0][i + 2] + zero_part[i]),
              fmaf(total.z, rescale[i], o[1][i] + zero_part[i]), fmaf(total.w, rescale[i], o[1][i + 2] + zero_part[i]));
        }
      }
    }
  }
}

// Adds the warp's values of the tail times their probabilities to the output.
template <int H>
__device__ __forceinline__ void tail_values(float* out, const uint8_t* tile, uint32_t low, uint32_t high,
                                            const float (&rescale)[2], const ShortLane& lane, int queries, int valid) {
  const int first = 16 * lane.half, matrix = lane.lane >> 3;
  const int token = first + 8 * (matrix >> 1) + (lane.lane & 7);
  const uint32_t rows = shared_address(tile + token * ShortShape<H>::kHalvesRow + 16 * (matrix & 1));
  uint32_t keep[2];  // clears values of missing tokens, which may be NaN
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int of = first + 8 * i + 2 * lane.quad;
    keep[i] = (of < valid ? 0xFFFFu : 0u) | (of + 1 < valid ? 0xFFFF0000u : 0u);
  }
#pragma unroll 1
  for (int step = 0; step < ShortShape<H>::kSteps; ++step) {
    uint32_t a[4];
    load_matrices_transposed(a, rows + 32 * step);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = bfloat2_to_half2(a[i] & keep[i >> 1]);
    float o[4] = {};
    mma_f16(o, a[0], a[1], a[2], a[3], low, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = 2 * lane.quad + (i & 1);
      if (query < queries) {
        float& total = out[query * H + 16 * step + lane.row + 8 * (i >> 1)];
        total = fmaf(total, rescale[i & 1], o[i]);
      }
    }
  }
}

}  // namespace minikv
