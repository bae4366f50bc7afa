// Decode attention over packed keys and values plus a full-precision tail: the kernel.
//
// Operands are swapped, S^T = K Q^T and O^T = V^T P^T, so that the large operand (codes, dequantised in registers) is
// the row operand of the tensor cores and the few queries of a KV head are the 8 columns.
//
// Each team of computing warps has a private ring of shared-memory stages (keys of a tile, values of a tile, keys of
// the next, ...), which further warps of the block, the producers, keep full. Each segment of a warp's tiles (work.cuh)
// leaves an unnormalised partial output with its softmax maximum and denominator; those of a row are joined at the end
// (merge.cuh).
#pragma once

#include <type_traits>

#include "decode/merge.cuh"
#include "decode/packed_tile.cuh"
#include "decode/producer.cuh"
#include "decode/tail_tile.cuh"

namespace minikv {

// The first lane's `x`. Tells the compiler that a value is the same in all lanes.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kAllLanes, x, 0);
}

template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
__global__ void __launch_bounds__((max_warps(H) + producers(H)) * kWarpSize, 1)
    decode_kernel(const __grid_constant__ DecodeMaps maps, const __grid_constant__ DecodeParams p) {
  using Warp = DecodeWarp<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Layout = typename Warp::Layout;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int shares_log2 = Warp::Map::kShares == 1 ? 0 : p.shares_log2;  // constant if tiles are never shared
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
  const Lengths lengths(p, lane);  // read first: all else waits for them
  // One lane per warp, because initialisations by several lanes of a warp run one after the other.
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

  // Where the block joins its warps' results: in their rings, or beside them if others of a team may still read.
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
          using Tile = PackedTile<decltype(shares)::value, H, KBits, VBits, kMetadata, kVectorMetadata>;
          Tile::take(w, share, at.kv_row, t * kTileTokens, at.packed_length - t * kTileTokens);
        });
      };
      if (!packed) {
        each([&](int t) { take_tail_tile(w, share, at.tail_length - (t - at.packed_tiles) * kTailTokens); });
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

// Host-side description of one instance, for its launch.
struct DecodeInstance {
  const void* kernel;
  int stage_bytes, shares;  // shares: warps of a team, if a tile is shared
};

// Null kernel if there is no such instance.
template <int H, int KBits>
DecodeInstance decode_instance(int v_bits, Metadata metadata, bool vector_metadata);

}  // namespace minikv
