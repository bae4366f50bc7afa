// Decode attention over a short cache: the arguments of a launch, and what a block holds in shared memory.
//
// A row (batch entry, KV head and block of 8 queries) is split over `splits` thread blocks. A block consists of pairs
// of warps. Tiles of 128 packed tokens, or of 32 of the tail, are dealt to the pairs of all blocks in turn. A pair
// copies a tile's keys and values into its own shared memory; each of its warps takes half of the tile's tokens. Loops
// stay rolled and the number of bits is no template argument, because a short cache is bound by the size of the code.
#pragma once

#include "decode/layout.cuh"

namespace minikv {

constexpr int kUnitTokens = 16;  // tokens of a tile that a lane row holds: of one group of keys and one packing block
constexpr int kPairThreads = 2 * kWarpSize;
constexpr int kMaxPairs = 8;

// Keys or values: where they are stored, and where in its half of a pair's shared memory a tile is put.
struct ShortSide {
  const uint8_t *words, *high;  // planes; `high` is the one of the third bit
  const uint8_t* metadata[2];   // scale, zero
  const float* factor[2];       // second level of 8-bit metadata
  const uint8_t* tail;
  int bits, group_log2, factor_log2;
  bool direct;  // metadata are copied to where halves are read; else they are copied to `raw` and converted
  int high_at, halves_at, halves_bytes, raw_at, raw_bytes, factors_at;  // halves, raw: two of these, scale and zero
};

struct ShortParams {
  const int32_t* packed_length;  // [B]
  const int32_t* tail_length;    // [B]
  const void* q;                 // [B, N, H]
  void* out;                     // [B, N, H]
  float* partial;  // [rows, splits] slots: outputs [G'][H], maxima [G'], denominators [G'], G' = min(G, 8)
  int* counters;   // [rows], zero before and after a launch
  int kv_heads, group, query_blocks, packed_capacity, tail_capacity, splits;
  int side_bytes[2];  // of shared memory of a pair
  Metadata metadata;
  float scale_log2;
  bool cluster;  // whether a row's blocks are a cluster
  ShortSide side[2];

  __host__ __device__ int partial_queries() const { return group < kQueries ? group : kQueries; }
  // A multiple of 4: outputs are written and read in fours.
  __host__ __device__ int slot_floats(int head_dim) const {
    return partial_queries() * head_dim + (2 * partial_queries() + 3) / 4 * 4;
  }
};

// Bytes of shared memory before the pairs' own: queries, and a slot for the block and for every warp.
__host__ __device__ constexpr int short_fixed_bytes(int head_dim, int pairs, int slot_floats) {
  return round_up(kQueries * head_dim * 2 + (1 + 2 * pairs) * slot_floats * 4, 128);
}

// Output channels are taken in blocks; inside a block, lane row r owns a run of consecutive channels, so that one
// scale and zero per token serve the whole run.
template <int H>
struct ShortShape {
  static constexpr int kSteps = H / 16;  // 16-channel steps of a product
  static constexpr int kBlockChannels = H == 96 ? 32 : (H < 128 ? H : 128);
  static constexpr int kBlocks = H / kBlockChannels;
  static constexpr int kRun = kBlockChannels / 8;
  static constexpr int kQueryBytes = kQueries * H * 2;
  // Bytes of rows in shared memory: words of a unit (of 4 bits: the first of each unit, then the second), words of the
  // third bit, and 16-bit values, which are keys' metadata or tokens of the tail.
  static constexpr int kWordRow = 4 * H + 16;
  static constexpr int kSecondWords = kTileTokens / kUnitTokens * kWordRow;
  static constexpr int kHighRow = 4 * H + 32;
  static constexpr int kHalvesRow = 2 * H + 16;
  static constexpr int kValueHalves = kTileTokens * (16 + 2);  // bytes of values' metadata of a block of channels
};

// A lane of a warp. In the tensor cores' fragments it is `row` and `quad`.
struct ShortLane {
  int lane, row, quad;
  int half;  // of the tile's tokens: packed tokens 4 * half .. + 3 and + 8 of every unit, or tail tokens 16 * half ..

  // As a row of the keys' product, the lane holds this unit. Transposed, lane column `quad` then has the
  // probabilities of units `quad` and `quad + 4`.
  __device__ __forceinline__ int unit() const { return (row >> 1) + 4 * (row & 1); }
};

}  // namespace minikv
