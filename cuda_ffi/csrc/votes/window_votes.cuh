// Votes: column sums of the causal softmax map over the last queries of each row, for several nested windows at once.
//
// Queries are numbered backwards: query 0 is a row's last one, at position `length - 1`. Pass 1 splits the keys, so
// that few queries occupy a whole GPU; a small kernel joins the splits. Pass 2 takes the queries in this order, so that
// a key's running sum is its vote whenever a window ends. Both passes are those of `prefill/softmax_rows.cuh`.
#pragma once

#include "prefill/softmax_rows.cuh"

namespace minikv {

constexpr int kMaxWindows = 4;

struct VotesParams {
  const void *q, *k;  // [B, T, N, H], [B, T, K, H]
  const int32_t* lengths;
  float* split_log_sums;   // [splits, B, N, W], base 2: written by pass 1
  float* row_log_sum_exp;  // [B, N, W], base 2, times `power`: read by pass 2
  float* head_sums;        // [windows, B, N, T]: written by pass 2
  int batch, tokens, heads, kv_heads;
  int queries, splits, windows;  // `queries` is W, that of the largest window
  int window;                    // sliding window; at least `tokens` if there is none
  float scale_log2, power;       // softmax scale over ln 2; weights are summed to this power
  int sizes[kMaxWindows + 1];    // queries of each window after a 0, ascending
  int tiles[kMaxWindows + 1];    // tiles of pass 2 up to the end of each window
};

// One head's part of the arrays.
template <typename Config, typename T>
struct VotesHead {
  const T *q, *k;
  int q_stride, k_stride;
  int64_t row;  // of [B, N]

  __device__ __forceinline__ VotesHead(const VotesParams& p, int batch, int head)
      : q_stride(p.heads * Config::kHeadDim),
        k_stride(p.kv_heads * Config::kHeadDim),
        row(static_cast<int64_t>(batch) * p.heads + head) {
    const int64_t row_of_batch = static_cast<int64_t>(batch) * p.tokens;
    q = static_cast<const T*>(p.q) + (row_of_batch * p.heads + head) * Config::kHeadDim;
    k = static_cast<const T*>(p.k) + (row_of_batch * p.kv_heads + head / (p.heads / p.kv_heads)) * Config::kHeadDim;
  }
};

// Pass 1. blockIdx: (query head, split of the keys + splits * block of queries, batch).
template <typename Config, typename T>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    query_sums_kernel(const __grid_constant__ VotesParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int batch = blockIdx.z, length = min(p.lengths[batch], p.tokens);
  const int split = blockIdx.y % p.splits, first_row = blockIdx.y / p.splits * Config::kRows;
  const int rows_end = min(first_row + Config::kRows, p.queries);
  const VotesHead<Config, T> head(p, batch, blockIdx.x);
  // Keys that some query of the block sees, and this split's share of them, a whole number of tiles.
  const int first_key = max(length - rows_end - p.window + 1, 0), keys = max(length - first_row - first_key, 0);
  const int tiles_per_split = (keys + p.splits * Config::kColumns - 1) / (p.splits * Config::kColumns);
  const int begin = min(first_key + split * tiles_per_split * Config::kColumns, first_key + keys);
  const int end = min(begin + tiles_per_split * Config::kColumns, first_key + keys);
  const int tiles = (end - begin + Config::kColumns - 1) / Config::kColumns;

  const TileCopies<Config, T, false> copies(head.k + static_cast<int64_t>(begin) * head.k_stride, head.k_stride,
                                            p.tokens - begin, nullptr);
  const TileRing ring(shared, copies, tiles, [](int step) { return step * Config::kColumns; });
  const int warp_row = first_row + static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  SoftmaxRows<Config, T, false> rows(p.scale_log2, 1.0f, head.q, head.q_stride, warp_row,
                                     [&](int row) { return max(length - 1 - row, 0); });
  const int distance_of_first = length - 1 - begin;  // from the split's first key to query 0
  const auto seen = [&](int row, int column) {
    const int distance = distance_of_first - row - column;
    return distance >= 0 && distance < p.window;
  };
  ring.stream([&](int step, uint32_t tile, const float*) {
    const int column = step * Config::kColumns;
    // Distance from key to query over the warp's pairs.
    const int farthest = distance_of_first - warp_row - column;
    const int nearest = farthest - (Config::kWarpRows - 1) - (Config::kColumns - 1);
    if (warp_row >= p.queries) return;
    if (nearest >= 0 && farthest < p.window) {
      rows.template add<false>(tile, nullptr, column, Config::kColumns, seen);
    } else if (farthest >= 0 && nearest < p.window) {
      rows.template add<true>(tile, nullptr, column, Config::kColumns, seen);
    }
  });
  float* out = p.split_log_sums + (static_cast<int64_t>(split) * p.batch * p.heads + head.row) * p.queries;
  rows.finish([&](int row, float sum, float top) {
    if (row < p.queries) out[row] = top + log2f(sum);  // minus infinity if the query saw nothing here
  });
}

// Joins the splits: base-2 log-sum-exp times `power`, infinity if a row has no such query. One thread per query.
static __global__ void join_splits_kernel(const __grid_constant__ VotesParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  if (i >= count) return;
  float top = -INFINITY, sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) top = fmaxf(top, p.split_log_sums[s * count + i]);
  for (int s = 0; s < p.splits; ++s) sum += exp2f(p.split_log_sums[s * count + i] - top);
  const int query = i % p.queries, batch = i / (static_cast<int64_t>(p.heads) * p.queries);
  p.row_log_sum_exp[i] = query < p.lengths[batch] ? (top + log2f(sum)) * p.power : INFINITY;
}

// Pass 2. blockIdx: (query head, block of keys, batch).
template <typename Config, typename T>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    key_sums_kernel(const __grid_constant__ VotesParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int batch = blockIdx.z, length = min(p.lengths[batch], p.tokens);
  const int first_row = blockIdx.y * Config::kRows, last_row = first_row + Config::kRows - 1;
  const VotesHead<Config, T> head(p, batch, blockIdx.x);
  const int oldest_query = max(length - p.queries, 0);  // its position
  const bool voted_for = first_row < length && oldest_query - last_row < p.window;
  const int tiles = voted_for ? p.tiles[p.windows] : 0;

  const auto window_of = [&](int step) {
    int w = 0;
    while (step >= p.tiles[w + 1]) ++w;
    return w;
  };
  const auto column_of = [&](int step) {
    const int w = window_of(step);
    return p.sizes[w] + (step - p.tiles[w]) * Config::kColumns;
  };
  // Backwards from the last query; a row of length 0 has no tile.
  const TileCopies<Config, T, true> copies(head.q + static_cast<int64_t>(max(length - 1, 0)) * head.q_stride,
                                           -head.q_stride, min(p.queries, length),
                                           p.row_log_sum_exp + head.row * p.queries);
  const TileRing ring(shared, copies, tiles, column_of);
  const int warp_row = first_row + static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  const int warp_last = warp_row + Config::kWarpRows - 1;
  SoftmaxRows<Config, T, true> rows(p.scale_log2 * p.power, 1.0f, head.k, head.k_stride, warp_row,
                                    [&](int row) { return min(row, p.tokens - 1); });
  const auto write = [&](int w) {
    float* out = p.head_sums + (static_cast<int64_t>(w) * p.batch * p.heads + head.row) * p.tokens;
    rows.finish([&](int key, float sum, float) {
      if (key < p.tokens) out[key] = key < length ? sum : 0.0f;
    });
  };
  ring.stream([&](int step, uint32_t tile, const float* statistic) {
    const int w = window_of(step), column = column_of(step), end = p.sizes[w + 1];
    const int columns = min((end - column + Config::kChunk - 1) / Config::kChunk * Config::kChunk, Config::kColumns);
    const int last = column + columns - 1;
    const auto seen = [&](int key, int query) {
      const int distance = length - 1 - query - key;
      return query < end && distance >= 0 && distance < p.window;
    };
    const int nearest = length - 1 - last - warp_last, farthest = length - 1 - column - warp_row;
    if (last < end && nearest >= 0 && farthest < p.window) {
      rows.template add<false>(tile, statistic, column, columns, seen);
    } else if (farthest >= 0 && nearest < p.window) {
      rows.template add<true>(tile, statistic, column, columns, seen);
    }
    if (step + 1 == p.tiles[w + 1]) write(w);
  });
  if (tiles == 0) {
    for (int w = 0; w < p.windows; ++w) write(w);
  }
}

}  // namespace minikv
