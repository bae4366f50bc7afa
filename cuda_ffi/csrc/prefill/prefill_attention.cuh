// Column sums of the causal softmax map of a whole prompt, in the two passes of `softmax_rows.cuh`.
#pragma once

#include "prefill/softmax_rows.cuh"

namespace minikv {

struct PrefillParams {
  const void *q, *k;  // [B, T, N, H], [B, T, K, H]
  const int32_t* lengths;
  float* row_log_sum_exp;  // [B, N, T]: written by pass 1, read by pass 2
  float* head_sums;        // [B, N, T]: written by pass 2
  int tokens, heads, kv_heads;
  int window;        // at least `tokens` if there is none
  float scale_log2;  // softmax scale over ln 2
};

// blockIdx: (query head, rows of the resident matrix, batch); the rows with most columns come first.
template <typename Config, typename T, bool Columns>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) prefill_kernel(PrefillParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int batch = blockIdx.z, head = blockIdx.x, length = min(p.lengths[batch], p.tokens);
  const int first_row = (Columns ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * Config::kRows;
  const int64_t last_row = first_row + Config::kRows - 1;
  // Columns that some row sees, from a multiple of a tile on.
  const int begin = Columns ? first_row : max(first_row - p.window + 1, 0) / Config::kColumns * Config::kColumns;
  const int end = static_cast<int>(min(static_cast<int64_t>(length), Columns ? last_row + p.window : last_row + 1));
  const int tiles = first_row < length ? (end - begin + Config::kColumns - 1) / Config::kColumns : 0;

  const int kv_head = head / (p.heads / p.kv_heads);
  const int64_t row_of_batch = static_cast<int64_t>(batch) * p.tokens;
  const T* q = static_cast<const T*>(p.q) + (row_of_batch * p.heads + head) * Config::kHeadDim;
  const T* k = static_cast<const T*>(p.k) + (row_of_batch * p.kv_heads + kv_head) * Config::kHeadDim;
  const int q_stride = p.heads * Config::kHeadDim, k_stride = p.kv_heads * Config::kHeadDim;
  const int64_t head_row = (static_cast<int64_t>(batch) * p.heads + head) * p.tokens;

  const int stride = Columns ? q_stride : k_stride;
  const TileCopies<Config, T, Columns> copies((Columns ? q : k) + static_cast<int64_t>(begin) * stride, stride,
                                              p.tokens - begin, p.row_log_sum_exp + head_row + begin);
  const TileRing ring(shared, copies, tiles, [](int step) { return step * Config::kColumns; });
  const int warp_row = first_row + static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  const int warp_last = warp_row + Config::kWarpRows - 1;
  SoftmaxRows<Config, T, Columns> rows(p.scale_log2, kLog2E, Columns ? k : q, Columns ? k_stride : q_stride, warp_row,
                                       [&](int row) { return min(row, p.tokens - 1); });
  // Whether the pair counts: row and column are query and key in pass 1, key and query in pass 2.
  const auto seen = [&](int row, int column) {
    const int distance = Columns ? column - row : row - column;
    return distance >= 0 && distance < p.window && (!Columns || column < length);
  };
  ring.stream([&](int step, uint32_t tile, const float* statistic) {
    const int column = begin + step * Config::kColumns, last = column + Config::kColumns - 1;
    // Distance from key to query over the warp's pairs.
    const int nearest = Columns ? column - warp_last : warp_row - last;
    const int farthest = Columns ? last - warp_row : warp_last - column;
    if (nearest >= 0 && farthest < p.window && (!Columns || last < length)) {
      rows.template add<false>(tile, statistic, column, Config::kColumns, seen);
    } else if (farthest >= 0 && nearest < p.window) {
      rows.template add<true>(tile, statistic, column, Config::kColumns, seen);
    }
  });
  float* out = (Columns ? p.head_sums : p.row_log_sum_exp) + head_row;
  rows.finish([&](int token, float sum, float top) {
    if (token >= p.tokens) return;
    if constexpr (Columns) {
      out[token] = token < length ? sum : 0.0f;
    } else {
      out[token] = token < length ? (top + log2f(sum)) * kLn2 : INFINITY;
    }
  });
}

}  // namespace minikv
