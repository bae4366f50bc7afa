// Decode attention: a computing warp's state, which packed and tail tiles share: the ring of stages, the queries, the
// softmax and the output. The products are in packed_tile.cuh and tail_tile.cuh.
#pragma once

#include "decode/layout.cuh"

namespace minikv {

// A computing warp. It takes segments of tiles: `reset`, `load_queries`, its tiles, `store`.
template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
struct DecodeWarp {
  using Layout = DecodeLayout<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Map = TokenMap<KBits, VBits>;
  static constexpr int kSteps = H / 16;  // 16-channel steps of a product

  const DecodeParams& p;
  uint8_t* ring;
  uint32_t full, empty;  // barriers, one per stage
  uint2* queries;  // the lane's query pairs, one per step; in shared memory to leave registers for the accumulators
  int lane, row, quad;

  int slot = 0;
  uint32_t parity = 0;

  // Softmax state and accumulators. Lane columns are queries 2 * quad and 2 * quad + 1.
  float maximum[2], denominator[2];
  float out[kSteps][4];
  float out_zero[Layout::kBlocks][4];

  __device__ explicit DecodeWarp(const DecodeParams& params) : p(params) {}

  // ---- The ring.

  // Waits until the current stage is full.
  __device__ __forceinline__ const uint8_t* wait_stage() {
    barrier_wait(full + 8 * slot, parity);
    return ring + slot * Layout::kStageBytes;
  }

  // Hands the current stage, which all lanes have read, back to the producer.
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
    uint2 pairs[kSteps];  // all loads first: one latency, not one per step
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

  // ---- Softmax.

  // Turns the logits of `kCount` row tiles [16 tokens x 8 queries] into transposed half pairs of probabilities.
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
    // Maxima rarely move.
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
}  // namespace minikv
