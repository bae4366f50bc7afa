// Decode attention over a short cache: copying tiles into a pair's shared memory, and metadata in it to halves.
//
// Rows are padded, so that lanes that read the same columns of different units hit different banks.
#pragma once

#include <type_traits>

#include "decode/short_cache.cuh"

namespace minikv {

// Copies rows of `kChunks` chunks of 16 bytes.
template <int kChunks>
__device__ __forceinline__ void copy_rows(uint32_t to, int to_stride, const uint8_t* from, int from_stride, int rows,
                                          int lane) {
  constexpr int kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32, kRows = kWarpSize / kLanes;
  const int column = lane % kLanes, first = lane / kLanes;
  to += first * to_stride + 16 * column;
  from += first * from_stride + 16 * column;
#pragma unroll 1
  for (int row = first; row < rows; row += kRows) {
#pragma unroll
    for (int c = 0; c < kChunks; c += kLanes) {
      if (column + c < kChunks) async_copy_16(to + 16 * c, from + 16 * c, true);
    }
    to += kRows * to_stride;
    from += kRows * from_stride;
  }
}

// Copies a warp's half of one side (keys 0, values 1) of `tokens` packed tokens, whole units from token `first` of all
// rows on: every second row of words, and scales (half 0) or zeros (half 1).
template <int H, int kSide>
__device__ __forceinline__ void copy_packed(const ShortParams& p, uint32_t to, int64_t first, int tokens, int half,
                                            int lane) {
  using Shape = ShortShape<H>;
  const ShortSide& s = p.side[kSide];
  const int words_log2 = s.bits >> 2, rows = tokens / kUnitTokens << words_log2;  // 1 or 2 words per unit
  const int64_t units = first / kUnitTokens;
  copy_rows<H / 4>(to + half * (words_log2 ? Shape::kSecondWords : Shape::kWordRow),
                   words_log2 ? Shape::kWordRow : 2 * Shape::kWordRow,
                   s.words + ((units << words_log2) + half) * (4 * H), 8 * H, (rows + 1 - half) / 2, lane);
  if (s.bits == 3) {
    copy_rows<H / 4>(to + s.high_at + half * Shape::kHighRow, 2 * Shape::kHighRow,
                     s.high + (units / 2 + half) * (4 * H), 8 * H, (tokens / 32 + 1 - half) / 2, lane);
  }
  const int bytes = p.metadata == kFloat8 ? 1 : 2;
  const uint8_t* metadata = s.metadata[half] + (first * H >> s.group_log2) * bytes;
  if (!s.direct) {
    const int chunks = (tokens * H >> s.group_log2) * bytes / 16;
#pragma unroll 1
    for (int i = lane; i < chunks; i += kWarpSize) {
      async_copy_16(to + s.raw_at + half * s.raw_bytes + 16 * i, metadata + 16 * i, true);
    }
  } else if (kSide == 0) {
    copy_rows<H / 8>(to + s.halves_at + half * s.halves_bytes, Shape::kHalvesRow, metadata, 2 * H,
                     tokens >> s.group_log2, lane);
  } else {
    copy_rows<8>(to + s.halves_at + half * s.halves_bytes, 128 + 16, metadata, 128, tokens / 8, lane);
  }
  if (p.metadata == kFloat8 && lane < 8 && lane << s.factor_log2 < tokens) {  // a tile has at most 8
    async_copy_4(to + s.factors_at + 32 * half + 4 * lane, s.factor[half] + (first >> s.factor_log2) + lane, true);
  }
}

// Copies a warp's tokens of one side of the tail, from token `first` of all rows on.
template <int H, int kSide>
__device__ __forceinline__ void copy_tail(const ShortParams& p, uint32_t to, int64_t first, int tokens, int half,
                                          int lane) {
  constexpr int kPerWarp = kTailTokens / 2;
  copy_rows<H / 8>(to + half * kPerWarp * ShortShape<H>::kHalvesRow, ShortShape<H>::kHalvesRow,
                   p.side[kSide].tail + (first + half * kPerWarp) * (2 * H), 2 * H,
                   min(tokens - half * kPerWarp, kPerWarp), lane);
}

// Where the 16 bytes of a token's metadata of values lie.
__device__ __forceinline__ int padded_token(int token) { return token + (token >> 3); }

// Converts the keys' scales and zeros of a tile: rows of groups, [row][H], four channels at a time.
template <int H, bool kIsFloat8>
__device__ __forceinline__ void convert_keys(const ShortSide& s, uint8_t* tile, int thread) {
  const int each = kTileTokens * (H / 4) >> s.group_log2;
#pragma unroll 1
  for (int i = thread; i < 2 * each; i += kPairThreads) {
    const int which = i >= each, at = i - which * each, row = at / (H / 4);
    const uint8_t* raw = tile + s.raw_at + which * s.raw_bytes;
    uint2 halves;
    if constexpr (kIsFloat8) {
      const int block = row << s.group_log2 >> s.factor_log2;
      const float factor = 256.0f * reinterpret_cast<const float*>(tile + s.factors_at)[8 * which + block];
      const uint32_t x = reinterpret_cast<const uint32_t*>(raw)[at];
      halves = make_uint2(scaled_float8(__byte_perm(x, 0, 0x1404), factor),
                          scaled_float8(__byte_perm(x, 0, 0x3424), factor));
    } else {
      const uint2 x = reinterpret_cast<const uint2*>(raw)[at];
      halves = make_uint2(bfloat2_to_half2(x.x), bfloat2_to_half2(x.y));
    }
    uint8_t* to = tile + s.halves_at + which * s.halves_bytes;
    *reinterpret_cast<uint2*>(to + row * ShortShape<H>::kHalvesRow + 8 * (at - row * (H / 4))) = halves;
  }
}

// Converts the values' scales and zeros of a tile to, for every block of channels, [token][run] (16 bytes per token).
template <int H, bool kIsFloat8>
__device__ __forceinline__ void convert_values(const ShortSide& s, bool bfloat16, uint8_t* tile, int thread) {
  using Shape = ShortShape<H>;
  using Stored = std::conditional_t<kIsFloat8, uint8_t, uint16_t>;
#pragma unroll 1
  for (int i = thread; i < 2 * Shape::kBlocks * kTileTokens; i += kPairThreads) {
    const int token = i % kTileTokens, which = i / kTileTokens & 1, block = i / kTileTokens >> 1;
    const Stored* raw =
        reinterpret_cast<const Stored*>(tile + s.raw_at + which * s.raw_bytes) + token * (H >> s.group_log2);
    const auto of_run = [&](int run) -> uint32_t {
      return raw[block * Shape::kBlockChannels + run * Shape::kRun >> s.group_log2];
    };
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = of_run(2 * j), high = of_run(2 * j + 1);
      if constexpr (kIsFloat8) {
        const float factor = reinterpret_cast<const float*>(tile + s.factors_at)[8 * which + (token >> s.factor_log2)];
        pairs[j] = scaled_float8(low << 8 | high << 24, 256.0f * factor);
      } else {
        const uint32_t pair = low | high << 16;
        pairs[j] = bfloat16 ? bfloat2_to_half2(pair) : pair;
      }
    }
    uint8_t* to = tile + s.halves_at + which * s.halves_bytes + block * Shape::kValueHalves;
    *reinterpret_cast<uint4*>(to + 16 * padded_token(token)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

}  // namespace minikv
