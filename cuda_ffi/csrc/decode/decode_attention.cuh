// Decode attention over packed keys and values plus a full-precision tail: the kernel.
//
// Operands are swapped, S^T = K Q^T and O^T = V^T P^T, so that the large operand (codes, dequantised in registers) is
// the row operand of the tensor cores and the few queries of a KV head are the 8 columns.
//
// Each team of computing warps has a private ring of shared-memory stages (keys of a tile, values of a tile, keys of
// the next,
// ...), which further warps of the block, the producers, keep full. Each segment of a warp's tiles (work.cuh)
// leaves an unnormalised partial output with its softmax maximum and denominator; those of a row are joined at the end
// (merge.cuh).
#pragma once

#include <type_traits>

#include "decode/merge.cuh"

namespace minikv {

enum Metadata { kFloat16, kBFloat16, kFloat8 };

// Warps of a block that compute, and that copy for them: as many as the registers allow, since one warp alone cannot
// hide the latency of its own chain (unpack, product, softmax, product), nor one copying warp keep up with eight.
__host__ __device__ constexpr int max_warps(int head_dim) { return head_dim <= 128 ? 8 : 6; }
__host__ __device__ constexpr int producers(int head_dim) { return head_dim <= 64 ? 4 : head_dim <= 128 ? 3 : 2; }

// Shared-memory geometry of one instance of the kernel.
template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
struct DecodeLayout {
  static constexpr int kMetaBytes = kMetadata == kFloat8 ? 1 : 2;
  static constexpr int kKeyRows = kTileTokens * KBits / 32;
  static constexpr int kValueRows = kTileTokens * VBits / 32;
  using KeyWords = SwizzledTile<4 * H, kKeyRows>;
  using KeyMeta = SwizzledTile<kMetaBytes * H, kTileTokens / 16>;  // rows for the smallest group; larger ones use fewer
  using ValueWords = SwizzledTile<4 * H, kValueRows>;
  using ValueMeta = SwizzledTile<kMetaBytes * H, kTileTokens / 16>;  // rows of 16 tokens x 8 groups (vector path only)
  using Tail = SwizzledTile<2 * H, kTailTokens>;
  static constexpr int kMetaStride = round_up(KeyMeta::kBytes, 1024);
  static constexpr int kKeyBytes = KeyWords::kBytes + 2 * kMetaStride;
  static constexpr int kValueBytes = ValueWords::kBytes + 2 * kMetaStride;
  static constexpr int kPackedBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  static constexpr int kStageBytes = round_up(kPackedBytes > Tail::kBytes ? kPackedBytes : Tail::kBytes, 1024);
  static_assert(kQueries * (H + 2) * 4 <= kStageBytes,
                "a partial output is staged in half a ring of two stages or more");

  // Output channels are taken in blocks; inside a block, lane row r owns a run of consecutive channels, so that one
  // scale and zero a token serve the whole run.
  static constexpr int kBlockChannels = H == 96 ? 32 : (H < 128 ? H : 128);
  static constexpr int kBlocks = H / kBlockChannels;
  static constexpr int kRun = kBlockChannels / 8;
  static_assert(!kVectorMetadata || (H == 128 && kMetaBytes == 2));
};

// Which tokens of a tile each lane holds. A lane (row, quad) computes logits for the words `key_word(half, row)`, and,
// after P has been transposed, multiplies values of the words `value_word(quad, i)`: the maps make these the same
// tokens, and neighbouring lanes read different shared-memory banks.
template <int KBits, int VBits>
struct TokenMap {
  static constexpr int kKeySlots = 16 / KBits;         // tokens in half a word
  static constexpr int kHalves = KBits == 2 ? 1 : 2;   // groups of 8 key words in a tile
  static constexpr int kValueWordTokens = 32 / VBits;  // tokens in a value word
  static constexpr int kValueWordsPerLane = VBits == 2 ? 2 : 4;
  static constexpr int kTiles = kHalves * kKeySlots;  // tensor-core row tiles: always 8, of 16 tokens
  // Warps that can take one tile together, each a share of the slots of every word: two of them are the fewest.
  static constexpr int kShares = KBits == VBits ? 8 / KBits : 1;

  __device__ __forceinline__ static int key_word(int half, int row) {
    const int quad = row >> 1, odd = row & 1;
    if constexpr (KBits == 2) return quad + 4 * odd;
    if constexpr (VBits == 4) return quad + 4 * odd + 8 * half;
    return half + 2 * (quad & 1) + 4 * odd + 8 * (quad >> 1);
  }

  __device__ __forceinline__ static int value_word(int quad, int i) {
    if constexpr (KBits == 2 && VBits == 4) return 2 * (quad + 4 * (i >> 1)) + (i & 1);
    if constexpr (KBits == 4 && VBits == 2) return (quad & 1) + 2 * i + 4 * (quad >> 1);
    return quad + 4 * i;
  }

  // Local token u (0..31) of a lane after the transposition: register and half-register that hold its probability.
  // Where a tile is cut into `shares`, slots count from the share's first.
  __host__ __device__ static constexpr int p_register(int u, int shares) {
    if (KBits == 2) return 2 * (u % 8) + (u / 8) % 2;
    const int half = VBits == 4 ? u / 16 : (u / 8) % 2;
    return 2 * (4 / shares * half + u % 4) + (u / 4) % 2;
  }
  __host__ __device__ static constexpr int p_high(int u) { return KBits == 4 && VBits == 4 ? (u / 8) % 2 : u / 16; }
};

template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kAllLanes, x, 0);
}

// A warp that keeps rings of a block full: those of teams `first_team`, `first_team` + producers(H), ... Lane `t`
// follows the tiles of team `t`.
template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
struct DecodeProducer {
  using Layout = DecodeLayout<H, KBits, VBits, kMetadata, kVectorMetadata>;

  const DecodeParams& p;
  const DecodeMaps& maps;
  int lane, first_team, teams;
  uint32_t rings;        // [team][stage]
  uint32_t full, empty;  // barriers [team][stage]
  int slot = 0;
  uint32_t parity = 1;

  // Copies `rows` rows from row `first` of a source of `total` rows into a swizzled tile.
  template <typename Tile>
  __device__ __forceinline__ void copy_rows(Source source, uint32_t stage, int first, int total, int rows,
                                            uint32_t barrier) const {
#if __CUDA_ARCH__ >= 900
    // A box of fewer rows than the tile has comes span by span, which keeps the distance between spans.
    const int copies = rows == Tile::kRows ? 1 : Tile::kSpans;
#pragma unroll 1
    for (int s = 0; s < copies; ++s) {
      tensor_copy(stage + s * Tile::kRows * Tile::kSpan, &maps.map[source], first, s, barrier);
    }
#else
    constexpr int kChunks = Tile::kRowBytes / 16;
    for (int i = lane; i < rows * kChunks; i += kWarpSize) {
      const int r = i / kChunks, byte = i % kChunks * 16;
      const bool valid = first + r < total;
      async_copy_16(stage + Tile::offset(r, byte),
                    p.base[source] + static_cast<int64_t>(valid ? first + r : 0) * Tile::kRowBytes + byte, valid);
    }
#endif
  }

  // Copies `bytes` consecutive bytes.
  __device__ __forceinline__ void copy_bytes(Source source, uint32_t stage, int64_t first, int bytes,
                                             uint32_t barrier) const {
#if __CUDA_ARCH__ >= 900
    bulk_copy(stage, p.base[source] + first, bytes, barrier);
#else
    for (int i = lane * 16; i < bytes; i += 16 * kWarpSize) async_copy_16(stage + i, p.base[source] + first + i, true);
#endif
  }

  // Asks for the keys or the values of a packed tile, from token `first` of all rows; its row has room for `room`
  // tokens from there, the tile's or, at the row's end, fewer.
  template <bool kKeys>
  __device__ __forceinline__ void copy_packed(int first, int room, uint32_t stage, uint32_t barrier) const {
    using Words = std::conditional_t<kKeys, typename Layout::KeyWords, typename Layout::ValueWords>;
    using Meta = std::conditional_t<kKeys, typename Layout::KeyMeta, typename Layout::ValueMeta>;
    constexpr bool kMetaAsRows = kKeys || kVectorMetadata;  // of a tile, not as plain bytes
    constexpr int kWordTokens = 32 / (kKeys ? KBits : VBits);
    const int all = p.batch * p.kv_heads * p.packed_capacity;
    const int meta_log2 = kKeys ? p.group_log2 : 4, meta_rows = kTileTokens >> meta_log2;
    const int meta_bytes = (H >> p.group_log2) * Layout::kMetaBytes;  // of a token's values, where they are plain
    const int copied = kMetaAsRows ? meta_rows * Meta::kRowBytes : room * meta_bytes;
#if __CUDA_ARCH__ >= 900
    barrier_expect(barrier, Words::kBytes + 2 * copied);
#endif
    copy_rows<Words>(kKeys ? kKeyWords : kValueWords, stage, first / kWordTokens, all / kWordTokens, Words::kRows,
                     barrier);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // scales, zeros
      const uint32_t meta = stage + Words::kBytes + i * Layout::kMetaStride;
      const Source source = static_cast<Source>((kKeys ? kKeyScale : kValueScale) + i);
      if constexpr (kMetaAsRows) {
        copy_rows<Meta>(source, meta, first >> meta_log2, all >> meta_log2, meta_rows, barrier);
      } else {
        copy_bytes(source, meta, static_cast<int64_t>(first) * meta_bytes, copied, barrier);
      }
    }
  }

  // The same of a tail tile, from slot `first` of all rows' tails.
  template <bool kKeys>
  __device__ __forceinline__ void copy_tail(int first, uint32_t stage, uint32_t barrier) const {
    using Tail = typename Layout::Tail;
#if __CUDA_ARCH__ >= 900
    barrier_expect(barrier, Tail::kBytes);
#endif
    copy_rows<Tail>(kKeys ? kTailKeys : kTailValues, stage, first, p.batch * p.kv_heads * p.tail_capacity, kTailTokens,
                    barrier);
  }

  // The keys or the values of one tile of each team. Lane `t` knows team `t`'s: `first` as above; `room` as above of a
  // packed tile, 0 of a tail tile, -1 where the team has none left.
  template <bool kKeys>
  __device__ __forceinline__ void copy_tiles(int first, int room, bool one_by_one) {
#pragma unroll 1
    for (int t = first_team; t < teams; t += producers(H)) {
      const int team_room = __shfl_sync(kAllLanes, room, t), team_first = __shfl_sync(kAllLanes, first, t);
      if (team_room < 0) continue;
      const int index = t * p.stages + slot;
      const uint32_t stage = rings + index * Layout::kStageBytes, barrier = full + 8 * index;
      barrier_wait(empty + 8 * index, parity);  // passes at once in the first round
      if (one_by_one) {
        const bool wrapped = slot == 0;
        barrier_wait(wrapped ? barrier + 8 * (p.stages - 1) : barrier - 8, wrapped ? parity : parity ^ 1);
      }
      if (!kBulkCopies || elect_one()) {
        if (team_room > 0) {
          copy_packed<kKeys>(team_first, team_room, stage, barrier);
        } else {
          copy_tail<kKeys>(team_first, stage, barrier);
        }
      }
      if constexpr (!kBulkCopies) async_copies_arrive(barrier);
      __syncwarp();
    }
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }

  // `at` and `tiles`: the lane's team's first tile and number of tiles, `stride` apart.
  __device__ void run(TileCursor at, int tiles, int stride) {
    const int most = __reduce_max_sync(kAllLanes, tiles);
#pragma unroll 1
    for (int n = 0; n < most; ++n) {
      const int tail_tile = at.tile - at.packed_tiles;
      const int first = at.packed() ? at.kv_row * p.packed_capacity + at.tile * kTileTokens
                                    : at.kv_row * p.tail_capacity + tail_tile * kTailTokens;
      const int packed_room = at.packed() ? min(kTileTokens, p.packed_capacity - at.tile * kTileTokens) : 0;
      const int room = n < tiles ? packed_room : -1;
      // A team has one copy on its way at a time: that keeps the memory busy, and more would make what is needed first
      // wait among what is needed later. Where there is little to copy, all of it is asked for at once.
      copy_tiles<true>(first, room, n > 0 && most > 2);
      copy_tiles<false>(first, room, most > 2);
      if (n < tiles) at.advance(p, stride);
    }
  }
};

template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
struct DecodeWarp {
  using Layout = DecodeLayout<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Map = TokenMap<KBits, VBits>;
  static constexpr int kSteps = H / 16;  // 16-channel steps of a product
  static constexpr int kMetaBytes = Layout::kMetaBytes;

  const DecodeParams& p;
  uint8_t* ring;
  uint32_t full, empty;  // barriers, one a stage
  uint2* queries;        // the lane's query pairs, one a step; in shared memory to leave registers for the accumulators
  int lane, row, quad;

  int slot = 0;
  uint32_t parity = 0;

  // Softmax state and accumulators. Lane columns are queries 2 * quad and 2 * quad + 1.
  float maximum[2], denominator[2];
  float out[kSteps][4];
  float out_zero[Layout::kBlocks][4];

  __device__ explicit DecodeWarp(const DecodeParams& params) : p(params) {}

  __device__ __forceinline__ const uint8_t* wait_stage() {
    barrier_wait(full + 8 * slot, parity);
    return ring + slot * Layout::kStageBytes;
  }

  // All lanes have read the current stage: hand it back to the producer.
  __device__ __forceinline__ void release_stage() {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * slot);
    if (++slot == p.stages) {
      slot = 0;
      parity ^= 1;
    }
  }

  // ---- Queries.

  // Packed keys take channels 16 s + 4 quad .. + 3 in step s (four words of one load), the tail the plain order.
  __device__ void load_queries(const TileCursor& at) {
    const int query = at.query_block * kQueries + row;
    const bool valid = query < p.group;
    const uint16_t* q =
        static_cast<const uint16_t*>(p.q) + (static_cast<int64_t>(at.kv_row) * p.group + (valid ? query : 0)) * H;
    const int first = at.packed() ? 4 * quad : 2 * quad, second = at.packed() ? first + 2 : first + 8;
    uint2 pairs[kSteps];  // all loads first: one latency, not one a step
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      pairs[s].x = *reinterpret_cast<const uint32_t*>(q + 16 * s + first);
      pairs[s].y = *reinterpret_cast<const uint32_t*>(q + 16 * s + second);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      queries[s * kWarpSize] =
          valid ? make_uint2(bfloat2_to_half2(pairs[s].x), bfloat2_to_half2(pairs[s].y)) : make_uint2(0, 0);
    }
    __syncwarp();
  }

  // ---- Softmax over `kCount` row tiles of logits [16 tokens x 8 queries]; turns them into transposed half pairs.
  // `added`: what is to be added to the logits of each `kCount / kHalves` row tiles, of the lane's two queries.
  template <int kCount, int kHalves>
  __device__ __forceinline__ void softmax(float (&s)[kCount][4], const float (&added)[kHalves][2],
                                          uint32_t (&probability)[2 * kCount]) {
    constexpr int kEach = kCount / kHalves;
    float highest[2] = {kMasked, kMasked};
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float own = fmaxf(s[h * kEach][c], s[h * kEach][c + 2]);
#pragma unroll
        for (int t = h * kEach + 1; t < (h + 1) * kEach; ++t) own = fmaxf(own, fmaxf(s[t][c], s[t][c + 2]));
        highest[c] = fmaxf(highest[c], own + added[h][c]);
      }
    }
    float rescale[2], shift[kHalves][2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int d = 4; d < kWarpSize; d <<= 1) highest[c] = fmaxf(highest[c], __shfl_xor_sync(kAllLanes, highest[c], d));
      const float next = fmaxf(maximum[c], highest[c]);
      rescale[c] = exp2_approx((maximum[c] - next) * p.scale_log2);
      maximum[c] = next;
      denominator[c] *= rescale[c];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) shift[h][c] = (next - added[h][c]) * p.scale_log2;
    }
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[t][i] = exp2_approx(fmaf(s[t][i], p.scale_log2, -shift[t / kEach][i & 1]));
        denominator[i & 1] += s[t][i];
      }
      probability[2 * t] = transpose_8x8(pack_half2(s[t][0], s[t][1]));
      probability[2 * t + 1] = transpose_8x8(pack_half2(s[t][2], s[t][3]));
    }
    // Maxima seldom move.
    if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) rescale_out(rescale);
  }

  __device__ __forceinline__ void rescale_out(const float (&factor)[2]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[s][i] *= factor[i & 1];
    }
#pragma unroll
    for (int b = 0; b < Layout::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_zero[b][i] *= factor[i & 1];
    }
  }

  // ---- Packed tiles.

  // 2**8 * factor, for 8-bit metadata (float8x2_to_half2_scaled leaves 2**-8 of the value).
  __device__ __forceinline__ float factor_of(int which, int kv_row, int token) const {
    if constexpr (kMetadata != kFloat8) return 0.0f;
    const int blocks = p.packed_capacity >> p.factor_log2;
    return 256.0f * p.factor[which][static_cast<int64_t>(kv_row) * blocks + (token >> p.factor_log2)];
  }

  // Scale or zero of four of a lane's key channels, as two half pairs.
  __device__ __forceinline__ void key_metadata(uint32_t (&d)[2], const uint8_t* at, float factor) const {
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

  template <int kShares, int N>
  __device__ __forceinline__ void key_slots(int share, float (*s)[4], uint32_t (&halves)[4], const uint32_t (&scale)[2],
                                            uint2 query) {
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
      key_slots<kShares, N + 1>(share, s, halves, scale, query);
    }
  }

  // Logits of share `share` of a tile, less `added`: what zeros add to them, the same for all tokens of a word, or
  // kMasked for those of a word that does not exist. `valid` tokens exist from the tile's first on: that one at least,
  // and no word by half.
  template <int kShares>
  __device__ __forceinline__ void packed_logits(int share, float (&s)[Map::kTiles / kShares][4],
                                                float (&added)[Map::kHalves][2], const uint8_t* stage, int kv_row,
                                                int first_token, int valid) {
    using Words = typename Layout::KeyWords;
    using Meta = typename Layout::KeyMeta;
    constexpr int kSlots = Map::kKeySlots / kShares;
#pragma unroll
    for (int t = 0; t < Map::kTiles / kShares; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][i] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < Map::kHalves; ++h) {
      const int word = Map::key_word(h, row);
      const bool exists = word * (32 / KBits) < valid;
      // Metadata of what does not exist may be NaN: the first token's stand in.
      const int token = exists ? word * (32 / KBits) : 0;
      const float scale_factor = factor_of(0, kv_row, first_token + token);
      const float zero_factor = factor_of(1, kv_row, first_token + token);
      const uint32_t words_at = Words::offset(word, 16 * quad);
      const uint32_t meta_at = Meta::offset(token >> p.group_log2, 4 * kMetaBytes * quad);
      const uint8_t* scales = stage + Words::kBytes;
      float zero_part[4] = {};
#pragma unroll 2  // not further: the loop over tiles has to fit into the instruction cache
      for (int step = 0; step < kSteps; ++step) {
        const uint4 w = *reinterpret_cast<const uint4*>(stage + Words::along(words_at, 64 * step));
        const uint8_t* meta = scales + Meta::along(meta_at, 16 * kMetaBytes * step);
        uint32_t scale[2], zero[2];
        key_metadata(scale, meta, scale_factor);
        key_metadata(zero, meta + Layout::kMetaStride, zero_factor);
        const uint2 query = queries[step * kWarpSize];
        mma_f16(zero_part, zero[0], 0, zero[1], 0, query.x, query.y);
        // Halves of two channels side by side: tokens of the low half of the word are row r, of the high half row r
        // + 8.
        uint32_t halves[4] = {__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632),
                              __byte_perm(w.z, w.w, 0x5410), __byte_perm(w.z, w.w, 0x7632)};
        key_slots<kShares, 0>(share, s + h * kSlots, halves, scale, query);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) added[h][c] = exists ? zero_part[c] : kMasked;
    }
  }

  // Values of a pair of tokens: a slot in both halves of each of two words.
  template <int kShares, int N>
  __device__ __forceinline__ void value_slot(int share, float (*o)[4], float (&o_zero)[4],
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
  __device__ __forceinline__ uint32_t value_metadata(const uint8_t* tile, int first, int slot, float factor) const {
    const int groups = H >> p.group_log2, low = first + slot * groups, high = low + Map::kValueWordTokens / 2 * groups;
    if constexpr (kMetadata == kFloat8) {
      const uint32_t x = (static_cast<uint32_t>(tile[low]) << 8) | (static_cast<uint32_t>(tile[high]) << 24);
      return scaled_float8(x, factor);
    } else {
      const uint16_t* values = reinterpret_cast<const uint16_t*>(tile);
      const uint32_t x = __byte_perm(values[low], values[high], 0x5410);
      return kMetadata == kBFloat16 ? bfloat2_to_half2(x) : x;
    }
  }

  // Where a lane finds the metadata of two words' values: by `at` where metadata are vectors, else by the rest.
  struct ValueMetadata {
    uint32_t at;         // the lane's row of the first two slots' matrices
    int first[2];        // each word's first token's, of the group of the lane's channels
    float factor[2][2];  // [scale, zero][word]
  };

  // That of the lane's words number `2 * pair` and `2 * pair + 1`. Metadata of what does not exist may be NaN, and NaN
  // times a probability of 0 is NaN: the tile's first word's stand in.
  template <int kShares>
  __device__ __forceinline__ ValueMetadata value_metadata_of(int share, int block, int pair, int kv_row,
                                                             int first_token, int valid) const {
    constexpr int kTokens = Map::kValueWordTokens;
    const auto existing_or_first = [&](int of, int local) {
      const int word = Map::value_word(of, 2 * pair + local);
      return word * kTokens < valid ? word : 0;
    };
    ValueMetadata m;
    if constexpr (kVectorMetadata) {
      // 8x8 matrices whose rows are tokens and columns are groups: transposed, a lane gets the token pair of group
      // `row`. Two slots' matrices at a time, of two words each.
      const int matrix = lane >> 3, target = lane & 7;
      const int token = existing_or_first(target >> 1, matrix & 1) * kTokens + (target & 1) * (kTokens / 2);
      const int slot = (matrix >> 1) + SlotOrder<VBits, kShares>::slot(0);
      const uint32_t first = Layout::ValueMeta::offset(token / 16, (token % 16 + slot) * 16);
      m.at = Layout::ValueMeta::along(first, share * (kTokens / 2 / kShares) * 16);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = existing_or_first(quad, i) * kTokens,
                  channel = block * Layout::kBlockChannels + row * Layout::kRun;
        m.first[i] = token * (H >> p.group_log2) + (channel >> p.group_log2);
        m.factor[0][i] = factor_of(2, kv_row, first_token + token);
        m.factor[1][i] = factor_of(3, kv_row, first_token + token);
      }
    }
    return m;
  }

  // Slots number `N` and on.
  template <int kShares, int N>
  __device__ __forceinline__ void value_slots(int share, int block, int pair, const uint8_t* stage,
                                              uint32_t (&words)[2][Layout::kRun], const ValueMetadata& metadata,
                                              const uint32_t (&probability)[2 * Map::kTiles / kShares]) {
    constexpr int kSlots = Map::kValueWordTokens / 2;
    using Order = SlotOrder<VBits, kShares>;
    if constexpr (N < kSlots / kShares) {
      const uint8_t* scales = stage + Layout::ValueWords::kBytes;
      const uint8_t* zeros = scales + Layout::kMetaStride;
      uint32_t scale[2][2], zero[2][2];  // [number N, N + 1][word]
      if constexpr (kVectorMetadata) {
        // Slots are 16 bytes apart. From number 0 to 2 it is slot 0 to 2 (exclusive or 2); by bytes, 1 to 3 (2) in the
        // lower lanes and 2 to 4 (6) in the upper. From number 0 to 4 and from 2 to 6, always 4.
        const uint32_t second = N % 4 == 0 ? 0 : Order::kByBytes ? 32 + (lane & 16) * 4 : 32;
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
          scale[i >> 1][i & 1] = value_metadata(scales, first, slot, metadata.factor[0][i & 1]);
          zero[i >> 1][i & 1] = value_metadata(zeros, first, slot, metadata.factor[1][i & 1]);
        }
      }
      float (*o)[4] = out + block * (Layout::kRun / 2);
      const auto probability_pair = [&](int i, int n) {
        const int u = (2 * pair + i) * Map::kValueWordTokens + Order::slot(n), v = u + kSlots;
        const uint32_t select = (Map::p_high(u) ? 0x32u : 0x10u) | (Map::p_high(v) ? 0x7600u : 0x5400u);
        return __byte_perm(probability[Map::p_register(u, kShares)], probability[Map::p_register(v, kShares)], select);
      };
      value_slot<kShares, N>(share, o, out_zero[block], words, scale[0], zero[0], probability_pair(0, N),
                             probability_pair(1, N));
      value_slot<kShares, N + 1>(share, o, out_zero[block], words, scale[1], zero[1], probability_pair(0, N + 1),
                                 probability_pair(1, N + 1));
      value_slots<kShares, N + 2>(share, block, pair, stage, words, metadata, probability);
    }
  }

  // Share `share` of a tile that `kShares` warps take together.
  template <int kShares>
  __device__ __forceinline__ void packed_tile(int share, int kv_row, int first_token, int valid) {
    constexpr int kTiles = Map::kTiles / kShares;
    // Two loops' worth would not fit.
    if constexpr (Map::kShares > 1) forget(lane), forget(row), forget(quad), forget(share);
    float s[kTiles][4], added[Map::kHalves][2];
    packed_logits<kShares>(share, s, added, wait_stage(), kv_row, first_token, valid);
    release_stage();
    uint32_t probability[2 * kTiles];
    softmax(s, added, probability);
    const uint8_t* stage = wait_stage();
#pragma unroll
    for (int block = 0; block < Layout::kBlocks; ++block) {
#pragma unroll
      for (int pair = 0; pair < Map::kValueWordsPerLane / 2; ++pair) {
        uint32_t words[2][Layout::kRun];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int word = Map::value_word(quad, 2 * pair + i);
          const int byte = 4 * (block * Layout::kBlockChannels + row * Layout::kRun);
#pragma unroll
          for (int c = 0; c < Layout::kRun; c += 4) {
            const uint4 x = *reinterpret_cast<const uint4*>(stage + Layout::ValueWords::offset(word, byte + 4 * c));
            words[i][c] = x.x, words[i][c + 1] = x.y, words[i][c + 2] = x.z, words[i][c + 3] = x.w;
          }
        }
        const ValueMetadata metadata = value_metadata_of<kShares>(share, block, pair, kv_row, first_token, valid);
        value_slots<kShares, 0>(share, block, pair, stage, words, metadata, probability);
      }
    }
    release_stage();
  }

  // ---- Tail tiles: 32 full-precision tokens.

  // The first warp of a team takes them alone.
  __device__ __forceinline__ void tail_tile(int share, int valid) {
    if (share > 0) {
      for (int i = 0; i < 2; ++i) wait_stage(), release_stage();
      return;
    }
    using Tail = typename Layout::Tail;
    constexpr int kTiles = kTailTokens / 16;
    float s[kTiles][4] = {};
    uint32_t stage = shared_address(wait_stage());
    const int matrix = lane >> 3, line = lane & 7;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        load_matrices(a, stage + Tail::offset(16 * t + 8 * (matrix & 1) + line, 32 * step + 16 * (matrix >> 1)));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = bfloat2_to_half2(a[i]);
        const uint2 query = queries[step * kWarpSize];
        mma_f16(s[t], a[0], a[1], a[2], a[3], query.x, query.y);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][i] = 16 * t + row + 8 * (i >> 1) < valid ? s[t][i] : kMasked;
    }
    release_stage();
    uint32_t probability[2 * kTiles];
    softmax(s, {{0.0f, 0.0f}}, probability);
    stage = shared_address(wait_stage());
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t keep[2];  // clears values of tokens that do not exist: they may be NaN
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 16 * t + 8 * i + 2 * quad;
        keep[i] = (token < valid ? 0xFFFFu : 0u) | (token + 1 < valid ? 0xFFFF0000u : 0u);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        load_matrices_transposed(
            a, stage + Tail::offset(16 * t + 8 * (matrix >> 1) + line, 32 * step + 16 * (matrix & 1)));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = bfloat2_to_half2(a[i] & keep[i >> 1]);
        mma_f16(out[step], a[0], a[1], a[2], a[3], probability[2 * t], probability[2 * t + 1]);
      }
    }
    release_stage();
  }

  // ---- Segments.

  __device__ void reset() {
#pragma unroll
    for (int c = 0; c < 2; ++c) maximum[c] = kMasked, denominator[c] = 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[s][i] = 0.0f;
    }
#pragma unroll
    for (int b = 0; b < Layout::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_zero[b][i] = 0.0f;
    }
  }

  // Writes output [G'][H], maxima [G'] (log2 units) and denominators [G'].
  __device__ void store(float* destination, bool packed) {
    const int queries = p.partial_queries();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int d = 4; d < kWarpSize; d <<= 1) denominator[c] += __shfl_xor_sync(kAllLanes, denominator[c], d);
      const int query = 2 * quad + c;
      if (query < queries) {
        if (row == 0) {
          destination[queries * H + query] = maximum[c] * p.scale_log2;
          destination[queries * (H + 1) + query] = denominator[c];
        }
        float* channels = destination + query * H;
        if (packed) {
#pragma unroll
          for (int s = 0; s < kSteps; s += 2) {
            const int block = s / (Layout::kRun / 2), in_block = s % (Layout::kRun / 2);
            const float zero = out_zero[block][c];
            *reinterpret_cast<float4*>(channels + block * Layout::kBlockChannels + row * Layout::kRun + 2 * in_block) =
                make_float4(out[s][c] + zero, out[s][c + 2] + zero, out[s + 1][c] + zero, out[s + 1][c + 2] + zero);
          }
        } else {
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            channels[16 * s + row] = out[s][c];
            channels[16 * s + row + 8] = out[s][c + 2];
          }
        }
      }
    }
  }
};

template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
__global__ void __launch_bounds__((max_warps(H) + producers(H)) * kWarpSize, 1)
    decode_kernel(const __grid_constant__ DecodeMaps maps, const __grid_constant__ DecodeParams p) {
  using Warp = DecodeWarp<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Layout = typename Warp::Layout;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int shares_log2 = Warp::Map::kShares == 1 ? 0 : p.shares_log2;  // known where tiles are never shared
  const int warps = blockDim.x / kWarpSize - producers(H), teams = warps >> shares_log2;
  const int warp = uniform(static_cast<int>(threadIdx.x / kWarpSize)), lane = threadIdx.x % kWarpSize;
  const int team = warp >> shares_log2, share = warp - (team << shares_log2);
  const int ring_bytes = p.stages * Layout::kStageBytes, stages = teams * p.stages;
  uint8_t* queries_of_warps = shared + warps * ring_bytes;
  uint8_t* barriers = queries_of_warps + warps * kQueries * 2 * H;
  const uint32_t full = shared_address(barriers), empty = full + 8 * stages;
  BlockWork& block = *reinterpret_cast<BlockWork*>(barriers + 16 * stages);  // not in registers, which the loop needs
  const bool producer = warp >= warps;
  release_next_launch();
#if __CUDA_ARCH__ >= 900
  if (producer && lane == 0) {
    for (int i = warp - warps; i < kSources; i += producers(H)) {
      if (p.mapped >> i & 1) prefetch_map(&maps.map[i]);
    }
  }
#endif
  wait_for_launch_before();
  const Lengths lengths(p, lane);  // asked for first: all else waits for them
  // One lane a warp: initialisations by several lanes of a warp run one after the other.
  if (warp < teams && lane == 0) {
    for (int i = warp * p.stages; i < (warp + 1) * p.stages; ++i) {
      barrier_init(full + 8 * i, kBulkCopies ? 1 : kWarpSize);
      barrier_init(empty + 8 * i, 1 << shares_log2);
    }
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif

  const BlockWork work(p, lengths, teams, lane);
  // The producer's lanes follow one team each, so these are the lane's there.
  const TeamTiles tiles(work, teams, producer ? min(lane, teams - 1) : team);
  TileCursor at = work.at;
  if (tiles.count > 0) at.advance(p, tiles.first - work.first);
  if (threadIdx.x == 0) block = work;
  __syncthreads();  // the barriers exist

  // Where the block joins its warps' results: in their rings, or beside them, where others of a team may still read.
  const int result_bytes = shares_log2 == 0 ? ring_bytes : ring_bytes / 2;
  uint8_t* results = shared + (shares_log2 == 0 ? 0 : teams * ring_bytes);
  if (producer) {
    DecodeProducer<H, KBits, VBits, kMetadata, kVectorMetadata> copies{
        p, maps, lane, warp - warps, teams, shared_address(shared), full, empty};
    copies.run(at, tiles.count, tiles.stride);
  } else {
    Warp w(p);
    w.lane = lane;
    w.row = lane >> 2;
    w.quad = lane & 3;
    w.ring = shared + team * ring_bytes;
    w.full = full + 8 * team * p.stages;
    w.empty = empty + 8 * team * p.stages;
    w.queries = reinterpret_cast<uint2*>(queries_of_warps) + warp * Warp::kSteps * kWarpSize + lane;
    const auto result = [&](int of) {
      if (Warp::Map::kShares > 1) forget(of);
      return reinterpret_cast<float*>(results + of * result_bytes);
    };
    if (tiles.count == 0 && block.joined()) clear_result<H>(p, result(warp), lane);
    for (int left = tiles.count; left > 0;) {
      const bool packed = at.packed();
      const int end = packed ? at.packed_tiles : at.tiles;
      int tile = at.tile;
      w.reset();
      w.load_queries(at);
      const auto each = [&](const auto& take) {
        for (; left > 0 && tile < end; --left, tile += tiles.stride) take(tile);
      };
      const auto take_share = [&](auto shares) {
        each([&](int t) {
          w.template packed_tile<decltype(shares)::value>(share, at.kv_row, t * kTileTokens,
                                                          at.packed_length - t * kTileTokens);
        });
      };
      if (!packed) {
        each([&](int t) { w.tail_tile(share, at.tail_length - (t - at.packed_tiles) * kTailTokens); });
      } else if (Warp::Map::kShares == 1 || shares_log2 == 0) {
        take_share(std::integral_constant<int, 1>());
      } else {
        take_share(std::integral_constant<int, Warp::Map::kShares>());
      }
      const int slot = first_slot(p, blockIdx.x * teams + team, at.row(p), packed) + share;
      w.store(block.joined() ? result(warp) : p.partial + static_cast<int64_t>(slot) * p.slot_floats(H), packed);
      at.advance(p, tile - at.tile);
    }
  }

  int block_warps = warps, block_teams = teams, own_warp = warp, own_lane = lane;
  if constexpr (Warp::Map::kShares == 1) {  // read again, not held in registers during the loop
    const int2 thread = read_thread();
    block_warps = block_teams = thread.y / kWarpSize - producers(H);
    own_warp = thread.x / kWarpSize, own_lane = thread.x % kWarpSize;
  }
  if (block.joined()) {
    join_warps<H, max_warps(H)>(p, block, reinterpret_cast<const float*>(results), result_bytes / 4, block_warps);
  }
  __syncthreads();  // the block's partial outputs are stored, and the rings free
  merge_rows<H>(p, block, block_teams, shared, own_warp, own_lane);
  clear_empty_rows<H>(p);
}

// What the host needs to launch one instance.
struct DecodeInstance {
  const void* kernel;
  int stage_bytes, shares;  // shares: warps of a team, where a tile is shared
};

// Null kernel where there is no such instance.
template <int H, int KBits>
DecodeInstance decode_instance(int v_bits, Metadata metadata, bool vector_metadata);

}  // namespace minikv
