// Decode attention: the arguments of a launch, and how its work is cut up.
//
// Work is cut into tiles of equal bytes: 128 packed tokens, or 32 tokens of the tail. The tiles of all rows (a row is
// one batch entry, KV head and block of 8 queries) form one list, split evenly over the teams of a grid that fills the
// device once. A team is one computing warp or, if tiles are few, several that each take a share of every tile. A run
// of tiles of one kind in one row is a segment.
#pragma once

#include "common/device.cuh"

namespace minikv {

constexpr int kTileTokens = 128;
constexpr int kTailTokens = 32;
constexpr int kQueries = 8;  // columns of one tensor-core product
constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The eight arrays a tile is read from.
enum Source { kKeyWords, kKeyScale, kKeyZero, kValueWords, kValueScale, kValueZero, kTailKeys, kTailValues, kSources };

struct DecodeMaps {
  CUtensorMap map[kSources];
};

struct DecodeParams {
  // What a block needs to find its work comes first: one line of the constant cache.
  const int32_t* packed_length;              // [B]
  const int32_t* tail_length;                // [B]
  int batch, kv_heads, group, query_blocks;  // group: query heads of one KV head
  int packed_capacity, tail_capacity, stages;
  int group_log2, factor_log2;  // of the group size and of the packing block
  float scale_log2;
  int shares_log2;  // of the warps in a team
  uint32_t mapped;  // bit i: source i has a tensor map
  const void* q;    // [B, N, H]
  float* partial;   // [slots]: outputs [G'][H], maxima [G'], denominators [G'], with G' = min(G, 8)
  int* counters;    // [rows], zero before and after a launch
  void* out;        // [B, N, H]
  const uint8_t* base[kSources];
  const float* factor[4];  // second level of 8-bit metadata: key scale, key zero, value scale, value zero

  __host__ __device__ int rows_per_batch() const { return kv_heads * query_blocks; }
  __host__ __device__ int partial_queries() const { return group < kQueries ? group : kQueries; }
  // A multiple of 4: outputs are written and read in fours.
  __host__ __device__ int slot_floats(int head_dim) const {
    return partial_queries() * head_dim + (2 * partial_queries() + 3) / 4 * 4;
  }
  __host__ __device__ int tiles(int packed, int tail) const {
    return (packed + kTileTokens - 1) / kTileTokens + (tail + kTailTokens - 1) / kTailTokens;
  }
};

// A place in the list of tiles.
struct TileCursor {
  int batch = 0, tile = 0;
  int kv_row = 0, query_block = 0;  // batch * K + KV head, and which 8 of its queries
  int packed_length = 0, tail_length = 0, packed_tiles = 0, tiles = 0;

  __device__ void set_lengths(int packed, int tail) {
    packed_length = packed;
    tail_length = tail;
    packed_tiles = (packed_length + kTileTokens - 1) / kTileTokens;
    tiles = packed_tiles + (tail_length + kTailTokens - 1) / kTailTokens;
  }

  // Advances by `count` tiles, across rows.
  __device__ void advance(const DecodeParams& p, int count) {
    tile += count;
    while (tile >= tiles && batch < p.batch) {
      tile -= tiles;
      if (++query_block < p.query_blocks) continue;
      query_block = 0;
      if (++kv_row < (batch + 1) * p.kv_heads) continue;
      do {
        if (++batch >= p.batch) break;
        kv_row = batch * p.kv_heads;
        set_lengths(p.packed_length[batch], p.tail_length[batch]);
      } while (tiles == 0);
    }
  }

  __device__ int row(const DecodeParams& p) const { return kv_row * p.query_blocks + query_block; }
  __device__ bool packed() const { return tile < packed_tiles; }
};

// Lengths of 32 batch entries, one per lane; zero past the last.
struct Lengths {
  int packed, tail;

  __device__ Lengths(const DecodeParams& p, int batch) {
    packed = batch < p.batch ? p.packed_length[batch] : 0;
    tail = batch < p.batch ? p.tail_length[batch] : 0;
  }
};

// Tiles of all rows. `lengths`: those of the first 32 batch entries.
__device__ inline int count_tiles(const DecodeParams& p, Lengths lengths, int lane) {
  int sum = p.tiles(lengths.packed, lengths.tail);
#pragma unroll 1
  for (int b = lane + kWarpSize; b < p.batch; b += kWarpSize) {
    lengths = Lengths(p, b);
    sum += p.tiles(lengths.packed, lengths.tail);
  }
  return __reduce_add_sync(kAllLanes, sum) * p.rows_per_batch();
}

// The place of tile `target` of the list. `lengths`: those of the first 32 batch entries.
__device__ inline TileCursor locate(const DecodeParams& p, Lengths lengths, int target, int lane) {
  TileCursor c;
  int start = 0;
#pragma unroll 1
  for (int first = 0; first < p.batch; first += kWarpSize) {
    if (first) lengths = Lengths(p, first + lane);
    const int own = p.tiles(lengths.packed, lengths.tail) * p.rows_per_batch();
    int inclusive = own;
#pragma unroll 1
    for (int d = 1; d < kWarpSize && d < p.batch; d <<= 1) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, d);
      if (lane >= d) inclusive += other;
    }
    const unsigned found = __ballot_sync(kAllLanes, start + inclusive > target);
    if (found) {
      const int source = __ffs(found) - 1;
      const int rest = target - start - __shfl_sync(kAllLanes, inclusive - own, source);
      c.batch = first + source;
      c.set_lengths(__shfl_sync(kAllLanes, lengths.packed, source), __shfl_sync(kAllLanes, lengths.tail, source));
      const int row = quick_divide(rest, c.tiles), head = p.query_blocks == 1 ? row : quick_divide(row, p.query_blocks);
      c.tile = rest - row * c.tiles;
      c.kv_row = c.batch * p.kv_heads + head;
      c.query_block = row - head * p.query_blocks;
      return c;
    }
    start += __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
  }
  return c;
}

// An even split of `total` tiles over `teams` teams.
struct Split {
  int total, teams, each, rest;

  __device__ Split(int tiles, int parts)
      : total(tiles), teams(parts), each(quick_divide(tiles, parts)), rest(tiles - each * parts) {}

  // floor(total * team / teams).
  __device__ __forceinline__ int first(int team) const { return each * team + quick_divide(rest * team, teams); }

  // The team of tile `tile`: the last one whose first tile is at or before it. The estimate is off by at most one.
  __device__ int team_of(int tile) const {
    const int team = min(static_cast<int>(__fdividef((tile + 1.0f) * teams, total)), teams - 1);
    return first(team) > tile ? team - 1 : first(team + 1) <= tile ? team + 1 : team;
  }
};

// A block's share of the list: tiles first .. last - 1.
struct BlockWork {
  Split split;
  TileCursor at;  // of the first tile
  int first, last;

  __device__ BlockWork(const DecodeParams& p, const Lengths& lengths, int teams_per_block, int lane)
      : split(count_tiles(p, lengths, lane), gridDim.x * teams_per_block),
        first(split.first(blockIdx.x * teams_per_block)),
        last(split.first((blockIdx.x + 1) * teams_per_block)) {
    at = locate(p, lengths, first, lane);
  }

  // Whether all tiles lie in one segment; the block then joins its warps' results itself.
  __device__ bool joined() const {
    return first < last && last <= first - at.tile + (at.packed() ? at.packed_tiles : at.tiles);
  }
};

// The tiles of one team of a block: a run of the list or, if the block joins its warps' results anyway, tiles dealt in
// turn, so that the teams read neighbouring memory.
struct TeamTiles {
  int first, count, stride;

  __device__ TeamTiles(const BlockWork& work, int teams_per_block, int team) {
    const int all = blockIdx.x * teams_per_block + team;
    const bool joined = work.joined();
    stride = joined ? teams_per_block : 1;
    first = joined ? work.first + team : work.split.first(all);
    count = joined ? quick_divide(max(work.last - first, 0) + stride - 1, stride) : work.split.first(all + 1) - first;
  }
};

// Slots of a team's partial outputs, one per warp. They are unique, because along the list of tiles each next segment
// has a larger team or a larger number (a row has two segments, packed and tail).
__device__ __forceinline__ int first_slot(const DecodeParams& p, int team, int row, bool packed) {
  return (team + 2 * row + (packed ? 0 : 1)) << p.shares_log2;
}

}  // namespace minikv
