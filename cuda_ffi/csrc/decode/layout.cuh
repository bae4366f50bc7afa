// Decode attention: shared-memory layout of a kernel instance, and the tokens of a tile that each lane holds.
#pragma once

#include "decode/work.cuh"

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
  // scale and zero per token serve the whole run.
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
  // Warps that can share a tile, each with a share of the slots of every word: at least two.
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
  // If a tile is cut into `shares`, slots count from the share's first.
  __host__ __device__ static constexpr int p_register(int u, int shares) {
    if (KBits == 2) return 2 * (u % 8) + (u / 8) % 2;
    const int half = VBits == 4 ? u / 16 : (u / 8) % 2;
    return 2 * (4 / shares * half + u % 4) + (u / 4) % 2;
  }
  __host__ __device__ static constexpr int p_high(int u) { return KBits == 4 && VBits == 4 ? (u / 8) % 2 : u / 16; }
};
}  // namespace minikv
