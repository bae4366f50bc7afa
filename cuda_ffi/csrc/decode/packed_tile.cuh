// Decode attention: products of a computing warp with a tile of packed keys and values.
#pragma once

#include "decode/warp.cuh"

namespace minikv {

// A warp's share of a tile of 128 packed tokens, which `kShares` warps take together.
//
// `share` numbers the warps of a team. `valid` tokens exist from the tile's first one, `first_token` of row `kv_row`,
// on: that one at least, and no word by half. These are arguments, not members, and so stay in registers.
template <int kShares, int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
struct PackedTile {
  using Warp = DecodeWarp<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Layout = typename Warp::Layout;
  using Map = typename Warp::Map;
  static constexpr int kSteps = Warp::kSteps;
  static constexpr int kMetaBytes = Layout::kMetaBytes;
  static constexpr int kTiles = Map::kTiles / kShares;  // row tiles of 16 tokens

  __device__ __forceinline__ static void take(Warp& warp, int share, int kv_row, int first_token, int valid) {
    // Twice as many would not fit.
    if constexpr (Map::kShares > 1) forget(warp.lane), forget(warp.row), forget(warp.quad), forget(share);
    float s[kTiles][4], added[Map::kHalves][2];
    logits(warp, share, s, added, warp.wait_stage(), kv_row, first_token, valid);
    warp.release_stage();
    uint32_t probability[2 * kTiles];
    warp.softmax(s, added, probability);
    const uint8_t* stage = warp.wait_stage();
#pragma unroll
    for (int block = 0; block < Layout::kBlocks; ++block) {
#pragma unroll
      for (int pair = 0; pair < Map::kValueWordsPerLane / 2; ++pair) {
        uint32_t words[2][Layout::kRun];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int word = Map::value_word(warp.quad, 2 * pair + i);
          const int byte = 4 * (block * Layout::kBlockChannels + warp.row * Layout::kRun);
#pragma unroll
          for (int c = 0; c < Layout::kRun; c += 4) {
            const uint4 x = *reinterpret_cast<const uint4*>(stage + Layout::ValueWords::offset(word, byte + 4 * c));
            words[i][c] = x.x, words[i][c + 1] = x.y, words[i][c + 2] = x.z, words[i][c + 3] = x.w;
          }
        }
        const ValueMetadata metadata = value_metadata_of(warp, share, block, pair, kv_row, first_token, valid);
        value_slots<0>(warp, share, block, pair, stage, words, metadata, probability);
      }
    }
    warp.release_stage();
  }

  // 2**8 * factor, for 8-bit metadata (float8x2_to_half2_scaled leaves 2**-8 of the value).
  __device__ __forceinline__ static float factor_of(const Warp& warp, int which, int kv_row, int token) {
    if constexpr (kMetadata != kFloat8) return 0.0f;
    const int blocks = warp.p.packed_capacity >> warp.p.factor_log2;
    return 256.0f * warp.p.factor[which][static_cast<int64_t>(kv_row) * blocks + (token >> warp.p.factor_log2)];
  }

  // ---- Keys.

  // Scale or zero of four of a lane's key channels, as two half pairs.
  __device__ __forceinline__ static void key_metadata(uint32_t (&d)[2], const uint8_t* at, float factor) {
    if constexpr (kMetadata == kFloat8) {
      const uint32_t x = *reinterpret_cast<const uint32_t*>(at);
      d[0] = scaled_float8(__byte_perm(x, 0, 0x1404), factor);
      d[1] = scaled_float8(__byte_perm(x, 0, 0x3424), factor);
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(at);
      d[0] = kMetadata == kBFloat16 ? bfloat2_to_half2(x.x) : x.x;
      d[1] = kMetadata == kBFloat16 ? bfloat2_to_half2(x.y) : x.y;
    }
  }

  template <int N>
  __device__ __forceinline__ static void key_slots(int share, float (*s)[4], uint32_t (&halves)[4],
                                                   const uint32_t (&scale)[2], uint2 query) {
    if constexpr (N < Map::kKeySlots / kShares) {
      using Order = SlotOrder<KBits, kShares>;
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        halves[i] = Order::template turn<N>(halves[i], share);
        const uint32_t minus_offset = half2_mul(scale[i / 2], CodeSlot<KBits, N>::kMinusOffset);
        a[i] = half2_fma(offset_code<KBits, N>(halves[i]), scale[i / 2], minus_offset);
      }
      mma_f16(s[Order::slot(N)], a[0], a[1], a[2], a[3], query.x, query.y);
      key_slots<N + 1>(share, s, halves, scale, query);
    }
  }

  // The logits, less `added`: what zeros add to them, the same for all tokens of a word, or kMasked for those of a word
  // that does not exist.
  __device__ __forceinline__ static void logits(const Warp& warp, int share, float (&s)[kTiles][4],
                                                float (&added)[Map::kHalves][2], const uint8_t* stage, int kv_row,
                                                int first_token, int valid) {
    using Words = typename Layout::KeyWords;
    using Meta = typename Layout::KeyMeta;
    constexpr int kSlots = Map::kKeySlots / kShares;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][i] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < Map::kHalves; ++h) {
      const int word = Map::key_word(h, warp.row);
      const bool exists = word * (32 / KBits) < valid;
      // Metadata of missing tokens may be NaN, so the first token's are used instead.
      const int token = exists ? word * (32 / KBits) : 0;
      const float scale_factor = factor_of(warp, 0, kv_row, first_token + token);
      const float zero_factor = factor_of(warp, 1, kv_row, first_token + token);
      const uint32_t words_at = Words::offset(word, 16 * warp.quad);
      const uint32_t meta_at = Meta::offset(token >> warp.p.group_log2, 4 * kMetaBytes * warp.quad);
      const uint8_t* scales = stage + Words::kBytes;
      float zero_part[4] = {};
#pragma unroll 2  // not further: the loop over tiles has to fit into the instruction cache
      for (int step = 0; step < kSteps; ++step) {
        const uint4 w = *reinterpret_cast<const uint4*>(stage + Words::along(words_at, 64 * step));
        const uint8_t* meta = scales + Meta::along(meta_at, 16 * kMetaBytes * step);
        uint32_t scale[2], zero[2];
        key_metadata(scale, meta, scale_factor);
        key_metadata(zero, meta + Layout::kMetaStride, zero_factor);
        const uint2 query = warp.queries[step * kWarpSize];
        mma_f16(zero_part, zero[0], 0, zero[1], 0, query.x, query.y);
        // Halves of two channels side by side: tokens of the low half of the word are row r, those of the high half
        // row r + 8.
        uint32_t halves[4] = {__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632),
                              __byte_perm(w.z, w.w, 0x5410), __byte_perm(w.z, w.w, 0x7632)};
        key_slots<0>(share, s + h * kSlots, halves, scale, query);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) added[h][c] = exists ? zero_part[c] : kMasked;
    }
  }

  // ---- Values.

  // Values of a pair of tokens: a slot in both halves of each of two words.
  template <int N>
  __device__ __forceinline__ static void value_slot(int share, float (*o)[4], float (&o_zero)[4],
                                                    uint32_t (&words)[2][Layout::kRun], const uint32_t (&scale)[2],
                                                    const uint32_t (&zero)[2], uint32_t b0, uint32_t b1) {
    mma_f16(o_zero, zero[0], 0, zero[1], 0, b0, b1);
    uint32_t minus_offset[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) minus_offset[w] = half2_mul(scale[w], CodeSlot<VBits, N>::kMinusOffset);
#pragma unroll
    for (int c = 0; c < Layout::kRun / 2; ++c) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& word = words[i / 2][2 * c + i % 2];
        word = SlotOrder<VBits, kShares>::template turn<N>(word, share);
        a[i] = half2_fma(offset_code<VBits, N>(word), scale[i / 2], minus_offset[i / 2]);
      }
      mma_f16(o[c], a[0], a[1], a[2], a[3], b0, b1);
    }
  }

  // Metadata of the pair of tokens (slot, slot + half a word) of a word, whose first token's are at `first`.
  __device__ __forceinline__ static uint32_t value_metadata(const Warp& warp, const uint8_t* tile, int first, int slot,
                                                            float factor) {
    const int groups = H >> warp.p.group_log2, low = first + slot * groups,
              high = low + Map::kValueWordTokens / 2 * groups;
    if constexpr (kMetadata == kFloat8) {
      const uint32_t x = (static_cast<uint32_t>(tile[low]) << 8) | (static_cast<uint32_t>(tile[high]) << 24);
      return scaled_float8(x, factor);
    } else {
      const uint16_t* values = reinterpret_cast<const uint16_t*>(tile);
      const uint32_t x = __byte_perm(values[low], values[high], 0x5410);
      return kMetadata == kBFloat16 ? bfloat2_to_half2(x) : x;
    }
  }

  // Where a lane finds the metadata of two words' values: `at` if metadata are vectors, else the other fields.
  struct ValueMetadata {
    uint32_t at;         // the lane's row of the first two slots' matrices
    int first[2];        // each word's first token's, of the group of the lane's channels
    float factor[2][2];  // [scale, zero][word]
  };

  // That of the lane's words number `2 * pair` and `2 * pair + 1`. Metadata of missing tokens may be NaN, and NaN times
  // a probability of 0 is NaN, so the tile's first word's are used instead.
  __device__ __forceinline__ static ValueMetadata value_metadata_of(const Warp& warp, int share, int block, int pair,
                                                                    int kv_row, int first_token, int valid) {
    constexpr int kTokens = Map::kValueWordTokens;
    const auto existing_or_first = [&](int of, int local) {
      const int word = Map::value_word(of, 2 * pair + local);
      return word * kTokens < valid ? word : 0;
    };
    ValueMetadata m;
    if constexpr (kVectorMetadata) {
      // 8x8 matrices whose rows are tokens and columns are groups: transposed, a lane gets the token pair of group
      // `row`. Two slots' matrices at a time, of two words each.
      const int matrix = warp.lane >> 3, target = warp.lane & 7;
      const int token = existing_or_first(target >> 1, matrix & 1) * kTokens + (target & 1) * (kTokens / 2);
      const int slot = (matrix >> 1) + SlotOrder<VBits, kShares>::slot(0);
      const uint32_t first = Layout::ValueMeta::offset(token / 16, (token % 16 + slot) * 16);
      m.at = Layout::ValueMeta::along(first, share * (kTokens / 2 / kShares) * 16);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = existing_or_first(warp.quad, i) * kTokens,
                  channel = block * Layout::kBlockChannels + warp.row * Layout::kRun;
        m.first[i] = token * (H >> warp.p.group_log2) + (channel >> warp.p.group_log2);
        m.factor[0][i] = factor_of(warp, 2, kv_row, first_token + token);
        m.factor[1][i] = factor_of(warp, 3, kv_row, first_token + token);
      }
    }
    return m;
  }

  // Slots number `N` and on.
  template <int N>
  __device__ __forceinline__ static void value_slots(Warp& warp, int share, int block, int pair, const uint8_t* stage,
                                                     uint32_t (&words)[2][Layout::kRun], const ValueMetadata& metadata,
                                                     const uint32_t (&probability)[2 * kTiles]) {
    constexpr int kSlots = Map::kValueWordTokens / 2;
    using Order = SlotOrder<VBits, kShares>;
    if constexpr (N < kSlots / kShares) {
      const uint8_t* scales = stage + Layout::ValueWords::kBytes;
      const uint8_t* zeros = scales + Layout::kMetaStride;
      uint32_t scale[2][2], zero[2][2];  // [number N, N + 1][word]
      if constexpr (kVectorMetadata) {
        // Slots are 16 bytes apart. From number 0 to 2 it is slot 0 to 2 (exclusive or 2); by bytes, 1 to 3 (2) in the
        // lower lanes and 2 to 4 (6) in the upper. From number 0 to 4 and from 2 to 6, always 4.
        const uint32_t second = N % 4 == 0 ? 0 : Order::kByBytes ? 32 + (warp.lane & 16) * 4 : 32;
        const uint32_t at = metadata.at ^ second ^ N / 4 * 64;
        uint32_t d[4];
        load_matrices_transposed(d, shared_address(scales) + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) scale[i >> 1][i & 1] = kMetadata == kBFloat16 ? bfloat2_to_half2(d[i]) : d[i];
        load_matrices_transposed(d, shared_address(zeros) + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) zero[i >> 1][i & 1] = kMetadata == kBFloat16 ? bfloat2_to_half2(d[i]) : d[i];
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int first = metadata.first[i & 1], slot = share * (kSlots / kShares) + Order::slot(N + (i >> 1));
          scale[i >> 1][i & 1] = value_metadata(warp, scales, first, slot, metadata.factor[0][i & 1]);
          zero[i >> 1][i & 1] = value_metadata(warp, zeros, first, slot, metadata.factor[1][i & 1]);
        }
      }
      float (*o)[4] = warp.out + block * (Layout::kRun / 2);
      const auto probability_pair = [&](int i, int n) {
        const int u = (2 * pair + i) * Map::kValueWordTokens + Order::slot(n), v = u + kSlots;
        const uint32_t select = (Map::p_high(u) ? 0x32u : 0x10u) | (Map::p_high(v) ? 0x7600u : 0x5400u);
        return __byte_perm(probability[Map::p_register(u, kShares)], probability[Map::p_register(v, kShares)], select);
      };
      value_slot<N>(share, o, warp.out_zero[block], words, scale[0], zero[0], probability_pair(0, N),
                    probability_pair(1, N));
      value_slot<N + 1>(share, o, warp.out_zero[block], words, scale[1], zero[1], probability_pair(0, N + 1),
                        probability_pair(1, N + 1));
      value_slots<N + 2>(warp, share, block, pair, stage, words, metadata, probability);
    }
  }
};

}  // namespace minikv
