// Decode attention over a short cache: the kernel.
#pragma once

#include "common/counters.h"
#include "decode/short_products.cuh"

namespace minikv {

// The queries of a row as half pairs, [step][lane]: channels 16 step + 4 quad .. + 3 of query `row`; zero if there is
// no such query. A warp takes every step that its number and the number of warps give.
template <int H>
struct ShortQueries {
  const uint16_t* q;
  bool exists;
  uint2 next;  // of the warp's first step, requested early

  __device__ __forceinline__ ShortQueries(const void* all, int64_t first, int queries, int lane, int warp) {
    exists = lane / 4 < queries;
    q = static_cast<const uint16_t*>(all) + (first + (exists ? lane / 4 : 0)) * H + lane % 4 * 4;
    if (warp < ShortShape<H>::kSteps) next = *reinterpret_cast<const uint2*>(q + 16 * warp);
  }

  __device__ __forceinline__ void store(uint2* to, int lane, int warp) {
    const int warps = blockDim.x / kWarpSize;
#pragma unroll 1
    for (int step = warp; step < ShortShape<H>::kSteps;) {
      to[step * kWarpSize + lane] =
          exists ? make_uint2(bfloat2_to_half2(next.x), bfloat2_to_half2(next.y)) : make_uint2(0, 0);
      step += warps;
      if (step < ShortShape<H>::kSteps) next = *reinterpret_cast<const uint2*>(q + 16 * step);
    }
  }
};

// A block's row, and how its tokens are cut into tiles: room for the whole tail first, then packed tokens. So the first
// tiles can be copied before the lengths are known.
struct ShortRow {
  const ShortParams& p;
  int kv_row, row, first_query, queries;  // queries: of the block of queries, from `first_query` of all N on
  int tail_tiles, packed, tail;

  __device__ __forceinline__ explicit ShortRow(const ShortParams& params) : p(params) {
    const int batch = blockIdx.z, kv_head = p.query_blocks == 1 ? blockIdx.y : blockIdx.y / p.query_blocks;
    const int query_block = blockIdx.y - kv_head * p.query_blocks;
    packed = p.packed_length[batch];
    tail = p.tail_length[batch];
    kv_row = batch * p.kv_heads + kv_head;
    row = batch * gridDim.y + blockIdx.y;
    first_query = kv_row * p.group + query_block * kQueries;
    queries = min(p.group - query_block * kQueries, kQueries);
    tail_tiles = (p.tail_capacity + kTailTokens - 1) / kTailTokens;
  }

  __device__ __forceinline__ bool is_packed(int tile) const { return tile >= tail_tiles; }
  // The tile's first token in its region.
  __device__ __forceinline__ int first(int tile) const {
    return is_packed(tile) ? (tile - tail_tiles) * kTileTokens : tile * kTailTokens;
  }
  // Tokens of the tile's region from its first one on, and those that there is room for; perhaps less than 1.
  __device__ __forceinline__ int valid(int tile) const { return (is_packed(tile) ? packed : tail) - first(tile); }
  __device__ __forceinline__ int room(int tile) const {
    return (is_packed(tile) ? p.packed_capacity : p.tail_capacity) - first(tile);
  }
  __device__ __forceinline__ bool ends_before(int tile) const { return is_packed(tile) && valid(tile) <= 0; }
};

// Waits for both warps of a pair.
__device__ __forceinline__ void pair_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kPairThreads) : "memory");
}

// A warp of a pair, and what it has of its tiles so far.
template <int H>
struct ShortWarp {
  const ShortParams& p;
  const ShortRow& at;
  ShortLane lane;
  int thread, barrier;  // of the pair
  uint8_t* area;        // of the pair: a tile's keys, then its values
  const uint2* queries;
  float* out;
  ShortSoftmax softmax;
  uint32_t low[4], high[4];  // probabilities of the tile

  // Copies a side of a tile of which `tokens` exist, perhaps none or more than a tile has.
  template <int kSide>
  __device__ __forceinline__ void copy(int tile, int tokens) {
    const uint32_t to = shared_address(area + (kSide ? p.side_bytes[0] : 0));
    if (at.is_packed(tile)) {
      const int64_t first = static_cast<int64_t>(at.kv_row) * p.packed_capacity + at.first(tile);
      if (tokens > 0) copy_packed<H, kSide>(p, to, first, min(tokens, kTileTokens), lane.half, lane.lane);
    } else {
      const int64_t first = static_cast<int64_t>(at.kv_row) * p.tail_capacity + at.first(tile);
      copy_tail<H, kSide>(p, to, first, min(tokens, kTailTokens), lane.half, lane.lane);
    }
    async_copies_commit();
  }

  __device__ __forceinline__ void take_keys(int tile) {
    float s[4][4];
    const ShortSide& side = p.side[0];
    if (!at.is_packed(tile)) {
      tail_logits<H>(s, area, queries, lane, at.valid(tile));
    } else {
      if (!side.direct) {
        if (p.metadata == kFloat8) convert_keys<H, true>(side, area, thread);
        if (p.metadata != kFloat8) convert_keys<H, false>(side, area, thread);
        pair_barrier(barrier);
      }
      if (side.bits == 2) packed_logits<H, 2>(s, side, area, queries, lane, at.valid(tile));
      if (side.bits == 3) packed_logits<H, 3>(s, side, area, queries, lane, at.valid(tile));
      if (side.bits == 4) packed_logits<H, 4>(s, side, area, queries, lane, at.valid(tile));
    }
    softmax.take(s, p.scale_log2, low, high);
  }

  __device__ __forceinline__ void take_values(int tile) {
    uint8_t* values = area + p.side_bytes[0];
    const ShortSide& side = p.side[1];
    const int valid = at.valid(tile);
    if (!at.is_packed(tile)) {
      tail_values<H>(out, values, low[0], high[0], softmax.rescale, lane, at.queries, valid);
    } else {
      if (!side.direct) {
        const bool bfloat16 = p.metadata == kBFloat16;
        if (p.metadata == kFloat8) convert_values<H, true>(side, bfloat16, values, thread);
        if (p.metadata != kFloat8) convert_values<H, false>(side, bfloat16, values, thread);
        pair_barrier(barrier);
      }
      if (side.bits == 2) packed_values<H, 2>(out, side, values, low, high, softmax.rescale, lane, at.queries, valid);
      if (side.bits == 3) packed_values<H, 3>(out, side, values, low, high, softmax.rescale, lane, at.queries, valid);
      if (side.bits == 4) packed_values<H, 4>(out, side, values, low, high, softmax.rescale, lane, at.queries, valid);
    }
  }

  // Writes maxima (in log2 units) and denominators beside the output.
  __device__ __forceinline__ void finish() {
    const int slot_queries = p.partial_queries();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = softmax.denominator[c];
#pragma unroll
      for (int d = 4; d < kWarpSize; d <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, d);
      const int query = 2 * lane.quad + c;
      if (lane.row == 0 && query < slot_queries) {
        out[slot_queries * H + query] = softmax.maximum[c] * p.scale_log2;
        out[slot_queries * (H + 1) + query] = sum;
      }
    }
  }
};

// ---- Joining.

#if __CUDA_ARCH__ >= 900
// Waits for all blocks of the cluster. What they wrote to shared memory before is seen then.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without what was written.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ const float* in_block_of_cluster(const float* own, int rank) {
  const float* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
}
#endif

// Whether the block is the last of `blocks` to arrive. It then sees what all wrote before. `last` is shared.
__device__ __forceinline__ bool last_of_blocks(int* counter, int blocks, volatile int& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_acquire_release(counter, 1) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

// One value of an output, with the maximum and the denominator of its query.
struct Joined {
  float maximum, denominator, value;
};

// Joins value `i` of `count` slots; slot k is at slot(k). Always in the same order, so equal launches give equal bits.
template <int H, typename Slot>
__device__ __forceinline__ Joined join_slots(int i, int count, int slot_queries, const Slot& slot) {
  const int query = i / H;
  Joined all{kMasked, 0.0f, 0.0f};
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    const float* of = slot(k);
    const float maximum = of[slot_queries * H + query], denominator = of[slot_queries * (H + 1) + query], value = of[i];
    const float next = fmaxf(all.maximum, maximum);
    const float before = exp2_approx(all.maximum - next), now = exp2_approx(maximum - next);
    all.denominator = all.denominator * before + denominator * now;
    all.value = all.value * before + value * now;
    all.maximum = next;
  }
  return all;
}

template <int H>
__device__ __forceinline__ void store_slot(float* slot, int i, int slot_queries, const Joined& joined) {
  slot[i] = joined.value;
  if (i % H == 0) {
    slot[slot_queries * H + i / H] = joined.maximum;
    slot[slot_queries * (H + 1) + i / H] = joined.denominator;
  }
}

// Value `i` of the row's output; zero if the row has no tokens.
__device__ __forceinline__ void store_output(const ShortParams& p, const ShortRow& at, int64_t head_dim, int i,
                                             const Joined& joined) {
  const float x = joined.denominator > 0.0f ? joined.value / joined.denominator : 0.0f;
  static_cast<__nv_bfloat16*>(p.out)[at.first_query * head_dim + i] = __float2bfloat16(x);
}

// Joins the slots of the block's warps, and those of the row's blocks.
template <int H>
__device__ __forceinline__ void join_row(const ShortParams& p, const ShortRow& at, float* warps_slots,
                                         float* block_slot) {
  const int slot_queries = p.partial_queries(), stride = p.slot_floats(H), values = at.queries * H;
  float* slots = p.partial + static_cast<int64_t>(at.row) * p.splits * stride;
  float* own = p.cluster ? block_slot : slots + blockIdx.x * stride;
#pragma unroll 1
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    const Joined joined =
        join_slots<H>(i, blockDim.x / kWarpSize, slot_queries, [&](int k) { return warps_slots + k * stride; });
    if (p.splits == 1) {
      store_output(p, at, H, i, joined);
    } else {
      store_slot<H>(own, i, slot_queries, joined);
    }
  }
  if (p.splits == 1) return;
#if __CUDA_ARCH__ >= 900
  if (p.cluster) {
    cluster_barrier();
#pragma unroll 1
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < values; i += p.splits * blockDim.x) {
      store_output(p, at, H, i,
                   join_slots<H>(i, p.splits, slot_queries, [&](int k) { return in_block_of_cluster(block_slot, k); }));
    }
    cluster_barrier_relaxed();  // shared memory stays until all have read it
    return;
  }
#endif
  if (!last_of_blocks(p.counters + at.row, p.splits, *reinterpret_cast<int*>(block_slot))) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    store_output(p, at, H, i, join_slots<H>(i, p.splits, slot_queries, [&](int k) { return slots + k * stride; }));
  }
}

template <int H>
__global__ void __launch_bounds__(kMaxPairs* kPairThreads, 1)
    short_decode_kernel(const __grid_constant__ ShortParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  release_next_launch();
  wait_for_launch_before();
  const ShortRow at(p);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int pair = warp >> 1, pairs = blockDim.x / kPairThreads, slot_floats = p.slot_floats(H);
  uint2* queries = reinterpret_cast<uint2*>(shared);
  float* block_slot = reinterpret_cast<float*>(shared + ShortShape<H>::kQueryBytes);
  float* slots = block_slot + slot_floats;
  uint8_t* areas = shared + short_fixed_bytes(H, pairs, slot_floats);
  ShortWarp<H> w{p,
                 at,
                 {lane, lane >> 2, lane & 3, warp & 1},
                 static_cast<int>(threadIdx.x % kPairThreads),
                 pair + 1,
                 areas + pair * (p.side_bytes[0] + p.side_bytes[1]),
                 queries,
                 slots + warp * slot_floats};
  const int stride = p.splits * pairs, first = blockIdx.x + p.splits * pair;
  ShortQueries<H> q(p.q, at.first_query, at.queries, lane, warp);
#pragma unroll 1
  for (int tile = first - stride;; tile += stride) {
    const int next = tile + stride;
    const bool begun = tile >= 0;  // else only the first copies are requested, before the lengths are known
    if (begun) {
      if (at.ends_before(tile)) break;
      async_copies_wait<1>();  // for all but the values
      pair_barrier(w.barrier);
      if (at.valid(tile) > 0) w.take_keys(tile);
      pair_barrier(w.barrier);
    }
    w.template copy<0>(next, begun ? at.valid(next) : at.room(next));
    if (begun) {
      async_copies_wait<1>();  // for all but the next keys
      pair_barrier(w.barrier);
      if (at.valid(tile) > 0) w.take_values(tile);
      pair_barrier(w.barrier);
    }
    w.template copy<1>(next, begun ? at.valid(next) : at.room(next));
    if (begun) continue;
    q.store(queries, lane, warp);
    for (int i = lane; i < slot_floats; i += kWarpSize) w.out[i] = 0.0f;
    __syncthreads();
  }
  async_copies_wait<0>();
  w.finish();
  __syncthreads();
  join_row<H>(p, at, slots, block_slot);
}

}  // namespace minikv
