// Decode attention: joining the partial outputs of a row.
//
// The block that stores a row's last partial output joins them all, in the order of the list, so equal launches give
// equal bits. A counter holds the number of the row's tiles that have arrived.
#pragma once

#include "common/counters.h"
#include "decode/work.cuh"

namespace minikv {

// The partial outputs of a segment, tiles begin .. end - 1: one of every warp in its first and last block, and one of
// each block between. A block whose tiles are all of the segment has joined its warps' itself.
struct SegmentParts {
  const DecodeParams& p;
  Split split;
  int teams_per_block, number;
  int first_team, second_block, last_team;  // teams: where the parts of each of the three kinds begin
  int lead, between, trail;                 // parts of the first block, of those between, of the last
  bool first_joined, last_joined;

  __device__ SegmentParts(const DecodeParams& params, const Split& work, int block_teams, int begin, int end, int row,
                          bool packed)
      : p(params), split(work), teams_per_block(block_teams), number(first_slot(p, 0, row, packed)) {
    const int from = split.team_of(begin), to = split.team_of(end - 1);
    const int first_block = quick_divide(from, teams_per_block), last_block = quick_divide(to, teams_per_block);
    const int first_end = (first_block + 1) * teams_per_block, last_begin = last_block * teams_per_block;
    const bool begins = split.first(first_end - teams_per_block) == begin;
    const bool ends = split.first(last_begin + teams_per_block) == end, one = first_block == last_block;
    first_joined = begins && (!one || ends);
    last_joined = ends;
    first_team = first_joined ? first_end - teams_per_block : from;
    second_block = first_end;
    last_team = last_begin;
    lead = first_joined ? 1 : ((one ? to + 1 : first_end) - from) << p.shares_log2;
    between = one ? 0 : last_block - first_block - 1;
    trail = one ? 0 : ends ? 1 : (to + 1 - last_begin) << p.shares_log2;
  }

  __device__ int count() const { return lead + between + trail; }

  // Slot of part `i`; -1 if it had no tiles.
  __device__ int slot(int i) const {
    const bool first = i < lead, last = i >= lead + between;
    const int team = first ? first_team : last ? last_team : second_block + (i - lead) * teams_per_block;
    const int warp = first ? i : last ? i - lead - between : 0;
    const bool joined = first ? first_joined : last ? last_joined : true;
    const int own = team + (warp >> p.shares_log2), next = own + (joined ? teams_per_block : 1);
    if (split.each == 0 && split.first(own) == split.first(next)) return -1;
    return number + (team << p.shares_log2) + warp;
  }
};

// One warp's running softmax over the partial outputs of one query, for 64 channels: a lane has 2.
template <int H>
struct QueryMerge {
  const DecodeParams& p;
  int query, channel, lane;
  float highest = kMasked, denominator = 0.0f;
  float2 sum{};

  __device__ QueryMerge(const DecodeParams& params, int q, int first_channel, int l)
      : p(params), query(q), channel(first_channel + 2 * l), lane(l) {}

  __device__ void add(const SegmentParts& parts) {
    const int queries = p.partial_queries(), slot_fours = p.slot_floats(H) / 4;
    const auto at = [&](int place, int first) { return p.partial + first + static_cast<int64_t>(place) * 4; };
#pragma unroll 1
    for (int first = 0; first < parts.count(); first += kWarpSize) {
      const int slot = first + lane < parts.count() ? parts.slot(first + lane) : -1;
      const int place = slot * slot_fours;  // in fours of floats
      const float maximum = slot < 0 ? kMasked : __ldcg(at(place, queries * H + query));
      const float own = slot < 0 ? 0.0f : __ldcg(at(place, queries * (H + 1) + query));
      float2 x[kWarpSize];  // all loads first: one latency
#pragma unroll
      for (int i = 0; i < kWarpSize; ++i) {
        const int from = __shfl_sync(kAllLanes, place, i);
        x[i] = make_float2(0.0f, 0.0f);
        if (from >= 0) x[i] = __ldcg(reinterpret_cast<const float2*>(at(from, query * H + min(channel, H - 2))));
      }
      const float weight = rescale(maximum, own);
#pragma unroll
      for (int i = 0; i < kWarpSize; ++i) {
        const float w = __shfl_sync(kAllLanes, weight, i);
        sum.x += w * x[i].x, sum.y += w * x[i].y;
      }
    }
  }

  // Adds up to 32 more partial outputs, one per lane, to the maximum and the denominator; returns their weights.
  __device__ float rescale(float maximum, float own) {
    float next = fmaxf(maximum, highest);
    for (int d = 16; d; d >>= 1) next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, d));
    const float old = exp2_approx(highest - next), weight = exp2_approx(maximum - next);
    float total = weight * own;
    for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(kAllLanes, total, d);
    highest = next;
    denominator = denominator * old + total;
    sum.x *= old, sum.y *= old;
    return weight;
  }

  // `head`: of all rows' query heads.
  __device__ void store(int64_t head) const {
    if (channel >= H) return;
    static_cast<__nv_bfloat162*>(p.out)[(head * H + channel) / 2] =
        __floats2bfloat162_rn(sum.x / denominator, sum.y / denominator);
  }
};

// Result of a warp without tiles, for `join_warps`.
template <int H>
__device__ void clear_result(const DecodeParams& p, float* result, int lane) {
  const int queries = p.partial_queries();
  for (int i = lane; i < p.slot_floats(H); i += kWarpSize) {
    result[i] = i / queries == H ? kMasked : 0.0f;  // the maxima follow the outputs
  }
}

// The one partial output of a block whose tiles all lie in one segment, from those of its `warps` warps, `stride`
// floats apart in shared memory. A thread takes 4 channels.
template <int H, int kMaxWarps>
__device__ void join_warps(const DecodeParams& p, const BlockWork& block, const float* parts, int stride, int warps) {
  const int queries = p.partial_queries(), team = blockIdx.x * (warps >> p.shares_log2);
  float* destination =
      p.partial + static_cast<int64_t>(first_slot(p, team, block.at.row(p), block.at.packed())) * p.slot_floats(H);
  __syncthreads();
  for (int i = threadIdx.x; i < queries * H / 4; i += blockDim.x) {
    const int query = 4 * i / H;
    const float* states = parts + queries * H + query;
    float maximum[kMaxWarps], highest = kMasked, denominator = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxWarps; ++k) {
      maximum[k] = k < warps ? states[k * stride] : kMasked;
      highest = fmaxf(highest, maximum[k]);
    }
    float4 sum{};
#pragma unroll
    for (int k = 0; k < kMaxWarps; ++k) {
      if (k >= warps) continue;
      const float4 x = reinterpret_cast<const float4*>(parts + k * stride)[i];
      const float weight = exp2_approx(maximum[k] - highest);
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
      denominator += weight * states[k * stride + queries];
    }
    reinterpret_cast<float4*>(destination)[i] = sum;
    if (4 * i % H == 0) {
      destination[queries * H + query] = highest;
      destination[queries * (H + 1) + query] = denominator;
    }
  }
}

// Calls visit(index, row, begin) for every row that a block has tiles of; `begin` is the row's first tile in the list.
template <typename Visit>
__device__ __forceinline__ void visit_rows(const DecodeParams& p, const BlockWork& block, const Visit& visit) {
  TileCursor row = block.at;
  int begin = block.first - row.tile;
#pragma unroll 1
  for (int index = 0; begin < block.last; ++index) {
    visit(index, row, begin);
    begin += row.tiles;
    row.advance(p, row.tiles - row.tile);
  }
}

// After a block has stored its partial outputs: joins the rows that are complete now. Rows, then queries and 64
// channels of them, are dealt to its warps. `complete`: shared memory, a byte per row.
template <int H>
__device__ void merge_rows(const DecodeParams& p, const BlockWork& block, int teams_per_block, uint8_t* complete,
                           int warp, int lane) {
  const int block_warps = blockDim.x / kWarpSize;
  visit_rows(p, block, [&](int index, const TileCursor& row, int begin) {
    if (index % block_warps != warp || lane != 0) return;
    const int own = min(begin + row.tiles, block.last) - max(begin, block.first);
    int arrived = own;
    if (own < row.tiles) {
      int* counter = p.counters + row.row(p);
      arrived += add_acquire_release(counter, own);
      if (arrived == row.tiles) *counter = 0;
    }
    complete[index] = arrived == row.tiles;
  });
  __syncthreads();
  int turn = 0;
  visit_rows(p, block, [&](int index, const TileCursor& row, int begin) {
    if (!complete[index]) return;
    const int packed_end = begin + row.packed_tiles, end = begin + row.tiles;
    const int first_query = row.query_block * kQueries, heads = min(kQueries, p.group - first_query);
#pragma unroll 1
    for (int channel = 0; channel < H; channel += 2 * kWarpSize) {
#pragma unroll 1
      for (int query = 0; query < heads; ++query) {
        const bool own = turn == warp;
        turn = turn + 1 == block_warps ? 0 : turn + 1;
        if (!own) continue;
        QueryMerge<H> merge(p, query, channel, lane);
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
          const int first = part == 0 ? begin : packed_end, last = part == 0 ? packed_end : end;
          if (first == last) continue;
          merge.add(SegmentParts(p, block.split, teams_per_block, first, last, row.row(p), part == 0));
        }
        merge.store(static_cast<int64_t>(row.kv_row) * p.group + first_query + query);
      }
    }
  });
}

// Writes zeros for batch entries without tokens, which are in no list.
template <int H>
__device__ void clear_empty_rows(const DecodeParams& p) {
  for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
    if (p.tiles(p.packed_length[b], p.tail_length[b]) > 0) continue;
    const int64_t pairs = static_cast<int64_t>(p.kv_heads) * p.group * H / 2;
    for (int64_t i = threadIdx.x; i < pairs; i += blockDim.x) static_cast<uint32_t*>(p.out)[b * pairs + i] = 0;
  }
}

}  // namespace minikv
