// Decode attention: joining the partial outputs of a row.
//
// Whichever block stores a row's last partial output joins them all, in the order of the list, so that equal launches
// give equal bits. A counter for each query says how many of the row's tiles have arrived.
#pragma once

#include "decode_work.cuh"

namespace minikv {

// The partial outputs of a segment, tiles begin .. end - 1: one of every warp in its first and last block, and one of
// each block between, which has joined its warps' itself.
struct SegmentParts {
  Split split;
  int warps_per_block, begin, end, number;
  int first_block, last_block, between, count;

  __device__ SegmentParts(const Split& work, int block_warps, int first, int last, int segment)
      : split(work), warps_per_block(block_warps), begin(first), end(last), number(segment) {
    first_block = split.warp_of(begin) / warps_per_block;
    last_block = split.warp_of(end - 1) / warps_per_block;
    between = max(0, last_block - first_block - 1);
    count = warps_per_block + (last_block > first_block ? between + warps_per_block : 0);
  }

  // Where part `i` lies; -1 where that warp has none.
  __device__ int slot(int i) const {
    int block = first_block, warp = i;
    if (i >= warps_per_block + between) {
      block = last_block, warp = i - warps_per_block - between;
    } else if (i >= warps_per_block) {
      block = first_block + 1 + i - warps_per_block, warp = 0;
    }
    const int block_first = split.first(block * warps_per_block);
    const int block_last = split.first((block + 1) * warps_per_block);
    const bool joined = block_first < block_last && block_first >= begin && block_last <= end;
    const int w = block * warps_per_block + warp;
    const bool valid = joined ? warp == 0 : max(split.first(w), begin) < min(split.first(w + 1), end);
    return valid ? w + number : -1;
  }
};

// One warp's running softmax over the partial outputs of one query. Lane l has channels 2 l + 64 j and the next.
template <int H>
struct QueryMerge {
  static constexpr int kPairs = (H + 63) / 64;
  static constexpr int kAhead = 32 / kPairs;  // partial outputs a lane has in flight

  const DecodeParams& p;
  int query, lane;
  float highest = kMasked, denominator = 0.0f;
  float2 sum[kPairs] = {};

  __device__ QueryMerge(const DecodeParams& params, int q, int l) : p(params), query(q), lane(l) {}

  __device__ bool has(int j) const { return H % 64 == 0 || 2 * lane + 64 * j < H; }

  __device__ void add(const SegmentParts& parts) {
    const int queries = p.partial_queries(), slot_floats = p.slot_floats(H);
#pragma unroll 1
    for (int first = 0; first < parts.count; first += kWarpSize) {
      const int slot = first + lane < parts.count ? parts.slot(first + lane) : -1;
      const float* state = p.partial + static_cast<int64_t>(slot) * slot_floats + queries * H + query;
      const float maximum = slot < 0 ? kMasked : __ldcg(state);
      const float own = slot < 0 ? 0.0f : __ldcg(state + queries);
      float weight = 0.0f;
      bool weighted = false;
#pragma unroll 1
      for (unsigned valid = __ballot_sync(kAllLanes, slot >= 0); valid;) {
        float2 x[kAhead][kPairs];
        unsigned left = valid;
#pragma unroll
        for (int i = 0; i < kAhead; ++i, left &= left - 1) {
          const int from = __shfl_sync(kAllLanes, slot, left ? __ffs(left) - 1 : 0);
          const float* part = p.partial + static_cast<int64_t>(from) * slot_floats + query * H + 2 * lane;
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            x[i][j] = left && has(j) ? __ldcg(reinterpret_cast<const float2*>(part + 64 * j)) : make_float2(0.0f, 0.0f);
          }
        }
        if (!weighted) {  // after the loads have gone out: one latency, not two
          weight = rescale(maximum, own);
          weighted = true;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i, valid &= valid - 1) {
          const float w = __shfl_sync(kAllLanes, weight, valid ? __ffs(valid) - 1 : 0);
#pragma unroll
          for (int j = 0; j < kPairs; ++j) sum[j].x += w * x[i][j].x, sum[j].y += w * x[i][j].y;
        }
      }
    }
  }

  // Takes up to 32 more partial outputs, one a lane, into the maximum and the denominator; their weights.
  __device__ float rescale(float maximum, float own) {
    float next = fmaxf(maximum, highest);
    for (int d = 16; d; d >>= 1) next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, d));
    const float old = exp2_approx(highest - next), weight = exp2_approx(maximum - next);
    float total = weight * own;
    for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(kAllLanes, total, d);
    highest = next;
    denominator = denominator * old + total;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) sum[j].x *= old, sum[j].y *= old;
    return weight;
  }

  // `head`: of all rows' query heads.
  __device__ void store(int64_t head) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!has(j)) continue;
      const int64_t at = (head * H + 2 * lane) / 2 + 32 * j;
      const float x = sum[j].x / denominator, y = sum[j].y / denominator;
      if (p.bfloat16) {
        static_cast<__nv_bfloat162*>(p.out)[at] = __floats2bfloat162_rn(x, y);
      } else {
        static_cast<__half2*>(p.out)[at] = __floats2half2_rn(x, y);
      }
    }
  }
};

// What a warp without tiles leaves for `join_warps`.
template <int H>
__device__ void clear_result(const DecodeParams& p, float* result, int lane) {
  const int queries = p.partial_queries();
  for (int i = lane; i < p.slot_floats(H); i += kWarpSize) {
    result[i] = i / queries == H ? kMasked : 0.0f;  // the maxima follow the outputs
  }
}

// The one partial output of a block whose tiles all lie in one segment, from those of its warps, `stride` floats apart
// in shared memory.
template <int H>
__device__ void join_warps(const DecodeParams& p, const BlockWork& block, const float* parts, int stride, int warps) {
  const int queries = p.partial_queries();
  const int slot = blockIdx.x * warps + segment_number(block.at.row(p), block.at.packed());
  float* destination = p.partial + static_cast<int64_t>(slot) * p.slot_floats(H);
  __syncthreads();
  for (int i = threadIdx.x; i < queries * H; i += blockDim.x) {
    const int query = i / H;
    float highest = kMasked, sum = 0.0f, denominator = 0.0f;
    for (int k = 0; k < warps; ++k) highest = fmaxf(highest, parts[k * stride + queries * H + query]);
    for (int k = 0; k < warps; ++k) {
      const float weight = exp2_approx(parts[k * stride + queries * H + query] - highest);
      sum += weight * parts[k * stride + i];
      denominator += weight * parts[k * stride + queries * (H + 1) + query];
    }
    destination[i] = sum;
    if (i % H == 0) {
      destination[queries * H + query] = highest;
      destination[queries * (H + 1) + query] = denominator;
    }
  }
}

// After a block has stored its partial outputs: joins the rows that are complete now. Queries are dealt to its warps.
template <int H>
__device__ void merge_rows(const DecodeParams& p, const BlockWork& block, int warps_per_block, int warp, int lane) {
  const int block_warps = blockDim.x / kWarpSize, queries = p.partial_queries();
  TileCursor row = block.at;
  int begin = block.first - row.tile, dealt = 0;
#pragma unroll 1
  while (begin < block.last) {
    const int tiles = row.tiles, packed_end = begin + row.packed_tiles, end = begin + tiles;
    const int own = min(end, block.last) - max(begin, block.first);
    const int heads = min(kQueries, p.group - row.query_block * kQueries);
#pragma unroll 1
    for (int query = 0; query < heads; ++query) {
      if (dealt++ % block_warps != warp) continue;
      if (own < tiles) {
        int arrived = 0;
        int* counter = p.counters + row.row(p) * queries + query;
        if (lane == 0) {
          __threadfence();
          arrived = atomicAdd(counter, own);
        }
        if (__shfl_sync(kAllLanes, arrived, 0) + own < tiles) continue;
        __threadfence();
        if (lane == 0) *counter = 0;
      }
      QueryMerge<H> merge(p, query, lane);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const int first = part == 0 ? begin : packed_end, last = part == 0 ? packed_end : end;
        if (first == last) continue;
        merge.add(SegmentParts(block.split, warps_per_block, first, last, segment_number(row.row(p), part == 0)));
      }
      merge.store(static_cast<int64_t>(row.kv_row) * p.group + row.query_block * kQueries + query);
    }
    row.advance(p, tiles - row.tile);
    begin = end;
  }
}

// Zeros for the batch entries without tokens, which are in nobody's list.
template <int H>
__device__ void clear_empty_rows(const DecodeParams& p) {
  for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
    if (p.tiles(p.packed_length[b], p.tail_length[b]) > 0) continue;
    const int64_t pairs = static_cast<int64_t>(p.kv_heads) * p.group * H / 2;
    for (int64_t i = threadIdx.x; i < pairs; i += blockDim.x) static_cast<uint32_t*>(p.out)[b * pairs + i] = 0;
  }
}

}  // namespace minikv
