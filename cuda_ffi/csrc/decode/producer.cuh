// Decode attention: the warps of a block that copy tiles into the rings of those that compute.
#pragma once

#include <type_traits>

#include "decode/layout.cuh"

namespace minikv {

// A warp that keeps the rings of teams `first_team`, `first_team` + producers(H), ... full. Lane `t` follows the tiles
// of team `t`.
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

  // Requests the keys or the values of a packed tile, from token `first` of all rows. Its row has room for `room`
  // tokens from there: the tile's or, at the row's end, fewer.
  template <bool kKeys>
  __device__ __forceinline__ void copy_packed(int first, int room, uint32_t stage, uint32_t barrier) const {
    using Words = std::conditional_t<kKeys, typename Layout::KeyWords, typename Layout::ValueWords>;
    using Meta = std::conditional_t<kKeys, typename Layout::KeyMeta, typename Layout::ValueMeta>;
    constexpr bool kMetaAsRows = kKeys || kVectorMetadata;  // of a tile, not as plain bytes
    constexpr int kWordTokens = 32 / (kKeys ? KBits : VBits);
    const int all = p.batch * p.kv_heads * p.packed_capacity;
    const int meta_log2 = kKeys ? p.group_log2 : 4, meta_rows = kTileTokens >> meta_log2;
    const int meta_bytes = (H >> p.group_log2) * Layout::kMetaBytes;  // of a token's values, if they are plain
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
  // packed tile, 0 of a tail tile, -1 if the team has none left.
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
      // A team has one copy in flight at a time: that keeps the memory busy, and more copies would delay those needed
      // first. If there is little to copy, all of it is requested at once.
      copy_tiles<true>(first, room, n > 0 && most > 2);
      copy_tiles<false>(first, room, most > 2);
      if (n < tiles) at.advance(p, stride);
    }
  }
};
}  // namespace minikv
