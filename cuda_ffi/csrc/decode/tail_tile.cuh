// Decode attention: products of a computing warp with a tile of the full-precision tail.
#pragma once

#include "decode/warp.cuh"

namespace minikv {

// A tile of 32 full-precision tokens, of which the first `valid` exist. The first warp of a team (`share` 0) processes
// it; the others only hand its stages back.
template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
__device__ __forceinline__ void take_tail_tile(DecodeWarp<H, KBits, VBits, kMetadata, kVectorMetadata>& warp, int share,
                                               int valid) {
  if (share > 0) {
    for (int i = 0; i < 2; ++i) warp.wait_stage(), warp.release_stage();
    return;
  }
  using Warp = DecodeWarp<H, KBits, VBits, kMetadata, kVectorMetadata>;
  using Tail = typename Warp::Layout::Tail;
  constexpr int kTiles = kTailTokens / 16;
  float s[kTiles][4] = {};
  uint32_t stage = shared_address(warp.wait_stage());
  const int matrix = warp.lane >> 3, line = warp.lane & 7;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int step = 0; step < Warp::kSteps; ++step) {
      uint32_t a[4];
      load_matrices(a, stage + Tail::offset(16 * t + 8 * (matrix & 1) + line, 32 * step + 16 * (matrix >> 1)));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = bfloat2_to_half2(a[i]);
      const uint2 query = warp.queries[step * kWarpSize];
      mma_f16(s[t], a[0], a[1], a[2], a[3], query.x, query.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[t][i] = 16 * t + warp.row + 8 * (i >> 1) < valid ? s[t][i] : kMasked;
  }
  warp.release_stage();
  uint32_t probability[2 * kTiles];
  warp.softmax(s, {{0.0f, 0.0f}}, probability);
  stage = shared_address(warp.wait_stage());
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    uint32_t keep[2];  // clears values of missing tokens, which may be NaN
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 16 * t + 8 * i + 2 * warp.quad;
      keep[i] = (token < valid ? 0xFFFFu : 0u) | (token + 1 < valid ? 0xFFFF0000u : 0u);
    }
#pragma unroll
    for (int step = 0; step < Warp::kSteps; ++step) {
      uint32_t a[4];
      load_matrices_transposed(a,
                               stage + Tail::offset(16 * t + 8 * (matrix >> 1) + line, 32 * step + 16 * (matrix & 1)));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = bfloat2_to_half2(a[i] & keep[i >> 1]);
      mma_f16(warp.out[step], a[0], a[1], a[2], a[3], probability[2 * t], probability[2 * t + 1]);
    }
  }
  warp.release_stage();
}

}  // namespace minikv
