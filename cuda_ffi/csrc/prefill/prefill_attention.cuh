// Column sums of the causal softmax map in two passes over Q K^T, without an array of queries by keys.
//
// Both passes are one loop. A thread block keeps some rows of one matrix in registers, as the left operand of the
// tensor cores, and streams the other matrix past them through a ring in shared memory; every warp reduces its rows'
// logits over all columns. Pass 1 keeps queries and streams keys: the log-sum-exp of each query. Pass 2 keeps keys and
// streams the queries of one head: the sum of exp(logit - log-sum-exp) of each key; a last kernel adds up the heads of
// a group. Rows stay with their lanes, so there is nothing to exchange before the end, and the order of all sums is
// fixed.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace minikv {

// Tuning of one head dim. A block has `8 * 16 * RowTiles` rows and takes `Columns` of the other matrix at a time, of
// which a warp holds the logits of `kChunk`.
template <int HeadDim, int RowTiles, int Columns>
struct PrefillConfig {
  static constexpr int kHeadDim = HeadDim, kRowTiles = RowTiles, kColumns = Columns;
  static constexpr int kWarps = 8, kChunk = 16, kStages = 3;
  static constexpr int kBlocks = 2;  // per multiprocessor, a hint for the compiler
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * RowTiles, kRows = kWarpRows * kWarps;
  using Tile = SwizzledTile<2 * HeadDim, Columns>;
  static constexpr int kStatisticBytes = Columns * sizeof(float);
  static constexpr int kSharedBytes = kStages * (Tile::kBytes + kStatisticBytes);
  static_assert(kRows % Columns == 0 && Columns % kChunk == 0 && HeadDim % 32 == 0 && Columns <= kThreads);
};

struct PrefillParams {
  const void *q, *k;  // [B, T, N, H], [B, T, K, H]
  const int32_t* lengths;
  float* row_log_sum_exp;  // [B, N, T]: written by pass 1, read by pass 2
  float* head_sums;        // [B, N, T]: written by pass 2
  int tokens, heads, kv_heads;
  int window;        // at least `tokens` if there is none
  float scale_log2;  // softmax scale over ln 2
};

__device__ __forceinline__ void async_copy_4(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void async_copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void async_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_f16(c, a[0], a[1], a[2], a[3], b0, b1);
  } else {
    mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
  }
}

// A row's running sum in pass 1 is relative to a lagging maximum, which moves only when a sum outgrows it by this much.
// The common step then needs neither a comparison per logit nor a rescaling.
constexpr float kLargestSum = 0x1p60f;

template <typename Config, typename T, bool Columns>
struct PrefillPass {
  static constexpr int kSteps = Config::kHeadDim / 16;  // of the contraction
  static constexpr int kBlocks = Config::kChunk / 8;    // of columns
  using Tile = typename Config::Tile;
  using Logits = float[Config::kRowTiles][kBlocks][4];

  const PrefillParams& p;
  const int batch, head, length;
  const int lane = threadIdx.x % 32;
  const int row;  // this lane's first
  uint32_t resident[Config::kRowTiles][kSteps][4];
  uint32_t tile_offset[kSteps / 2];
  float total[Config::kRowTiles][2] = {};  // of `row` and `row` + 8 of each row tile
  float tile_total[Config::kRowTiles][2];  // of one tile of columns: short sums first keep float32 exact enough
  float top[Config::kRowTiles][2];         // pass 1: the lagging maximum

  __device__ __forceinline__ PrefillPass(const PrefillParams& p, int batch, int head, int length, int warp_row)
      : p(p), batch(batch), head(head), length(length), row(warp_row + lane / 4) {
    const int heads = Columns ? p.kv_heads : p.heads, resident_head = Columns ? head / (p.heads / p.kv_heads) : head;
    const T* base = static_cast<const T*>(Columns ? p.k : p.q) +
                    (static_cast<int64_t>(batch) * p.tokens * heads + resident_head) * Config::kHeadDim +
                    2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = min(row_of(i, half), p.tokens - 1);
        const uint32_t* x = reinterpret_cast<const uint32_t*>(base + token * heads * Config::kHeadDim);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) resident[i][s][half] = x[8 * s], resident[i][s][half + 2] = x[8 * s + 4];
        top[i][half] = kMasked;
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) tile_offset[s] = Tile::offset(lane % 8, 64 * s + 16 * (lane / 8));
  }

  __device__ __forceinline__ int row_of(int tile, int half) const { return row + 16 * tile + 8 * half; }

  // Whether the pair counts: row and column are query and key in pass 1, key and query in pass 2.
  __device__ __forceinline__ bool seen(int row, int column) const {
    const int distance = Columns ? column - row : row - column;
    return distance >= 0 && distance < p.window && (!Columns || column < length);
  }

  // Logits of a chunk of columns from `column` of the shared-memory tile on.
  __device__ __forceinline__ void logits(Logits& x, uint32_t tile, int column) const {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) x[i][n][0] = x[i][n][1] = x[i][n][2] = x[i][n][3] = 0.0f;
    }
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t b[4];
        load_matrices(b, tile + tile_offset[s] + (column + 8 * n) * Tile::kSpan);
#pragma unroll
        for (int i = 0; i < Config::kRowTiles; ++i) {
          mma<T>(x[i][n], resident[i][2 * s], b[0], b[1]);
          mma<T>(x[i][n], resident[i][2 * s + 1], b[2], b[3]);
        }
      }
    }
  }

  // `column` is the tile's first; `statistic` the address of its queries' log-sum-exp (pass 2).
  template <bool Masked>
  __device__ __forceinline__ void tile(uint32_t tile, const float* statistic, int column) {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) tile_total[i][0] = tile_total[i][1] = 0.0f;
#pragma unroll 1  // more makes the compiler spill
    for (int c = 0; c < Config::kColumns; c += Config::kChunk) {
      Logits x;
      logits(x, tile, c);
      if constexpr (Masked) mask(x, column + c + 2 * (lane % 4));
      if constexpr (Columns) {
        add_weights(x, statistic + c + 2 * (lane % 4));
      } else {
        add_terms(x);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) total[i][0] += tile_total[i][0], total[i][1] += tile_total[i][1];
  }

  __device__ __forceinline__ void mask(Logits& x, int column) const {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!seen(row_of(i, e / 2), column + 8 * n + e % 2)) x[i][n][e] = -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void add_weights(const Logits& x, const float* statistic) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(statistic + 8 * n);
      const float minus[2] = {lse.x * -kLog2E, lse.y * -kLog2E};
#pragma unroll
      for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          tile_total[i][e / 2] += exp2_approx(__fmaf_rn(x[i][n][e], p.scale_log2, minus[e % 2]));
        }
      }
    }
  }

  __device__ __forceinline__ void add_terms(const Logits& x) {
    float sum[Config::kRowTiles][2], most = 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[i][half] = terms(x[i], half, top[i][half]);
        most = fmaxf(most, sum[i][half]);
      }
    }
    if (most > kLargestSum) {
#pragma unroll
      for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[i][half] = raise(x[i], half, i);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) tile_total[i][0] += sum[i][0], tile_total[i][1] += sum[i][1];
  }

  __device__ __forceinline__ float terms(const float (&x)[kBlocks][4], int half, float most) const {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) sum += exp2_approx(__fmaf_rn(x[n][e], p.scale_log2, -most));
    }
    return sum;
  }

  // Brings a row's maximum up to date and returns the terms' sum relative to it.
  __device__ __forceinline__ float raise(const float (&x)[kBlocks][4], int half, int i) {
    float most = top[i][half];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]) * p.scale_log2);
    }
    const float factor = exp2_approx(top[i][half] - most);
    total[i][half] *= factor, tile_total[i][half] *= factor, top[i][half] = most;
    return terms(x, half, most);
  }

  // Joins the four lanes of each row and writes it.
  __device__ __forceinline__ void finish() {
    float* out =
        (Columns ? p.head_sums : p.row_log_sum_exp) + (static_cast<int64_t>(batch) * p.heads + head) * p.tokens;
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = total[i][half], most = top[i][half];
        if constexpr (!Columns) {
          most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
          most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
          sum *= exp2_approx(top[i][half] - most);
        }
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        const int token = row_of(i, half);
        if (lane % 4 || token >= p.tokens) continue;
        if constexpr (Columns) {
          out[token] = token < length ? sum : 0.0f;
        } else {
          out[token] = token < length ? (most + log2f(sum)) * kLn2 : INFINITY;
        }
      }
    }
  }
};

// Copies tiles of the streamed matrix, and in pass 2 their queries' log-sum-exp. A thread copies the same 16 bytes of
// every `kRowStep`-th row.
template <typename Config, typename T, bool Columns>
struct TileCopies {
  using Tile = typename Config::Tile;
  static constexpr int kChunks = Config::kHeadDim / 8;                  // of a row
  static constexpr int kLanes = Config::kHeadDim == 96 ? 16 : kChunks;  // the last four of 16 idle at 96
  static constexpr int kRowStep = Config::kThreads / kLanes;
  static_assert(kRowStep % 8 == 0 && Config::kColumns % kRowStep == 0);  // a step keeps the swizzle

  const PrefillParams& p;
  const float* statistics;
  const T* source;
  uint32_t destination;
  int stride, tokens;  // elements between tokens; tokens from `begin` on
  bool active;

  __device__ __forceinline__ TileCopies(const PrefillParams& p, int batch, int head, int begin) : p(p) {
    const int heads = Columns ? p.heads : p.kv_heads, streamed_head = Columns ? head : head / (p.heads / p.kv_heads);
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    stride = heads * Config::kHeadDim, active = chunk < kChunks;
    source = static_cast<const T*>(Columns ? p.q : p.k) +
             (static_cast<int64_t>(batch) * p.tokens + begin + row) * stride + streamed_head * Config::kHeadDim +
             8 * chunk;
    tokens = p.tokens - begin;
    destination = Tile::offset(row, 16 * chunk);
    statistics = p.row_log_sum_exp + (static_cast<int64_t>(batch) * p.heads + head) * p.tokens + begin;
  }

  __device__ __forceinline__ void operator()(int column, uint32_t tile, uint32_t statistic) const {
#pragma unroll
    for (int row = 0; row < Config::kColumns; row += kRowStep) {
      const bool valid = column + row + static_cast<int>(threadIdx.x / kLanes) < tokens;
      const T* x = source + static_cast<int64_t>(valid ? column + row : 0) * stride;
      if (active) async_copy_16(tile + destination + row * Tile::kSpan, x, valid);
    }
    if (Columns && threadIdx.x < Config::kColumns) {
      const int i = column + threadIdx.x;
      const bool valid = i < tokens;
      async_copy_4(statistic + 4 * threadIdx.x, valid ? statistics + i : statistics, valid);
    }
  }
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
  const uint32_t ring = shared_address(shared);
  float* statistics = reinterpret_cast<float*>(shared + Config::kStages * Config::Tile::kBytes);

  const TileCopies<Config, T, Columns> copy_tile(p, batch, head, begin);
  const auto copy = [&](int step) {
    if (step < tiles) {
      const int stage = step % Config::kStages;
      copy_tile(step * Config::kColumns, ring + stage * Config::Tile::kBytes,
                shared_address(statistics + stage * Config::kColumns));
    }
    async_copies_commit();
  };
#pragma unroll
  for (int i = 0; i < Config::kStages - 1; ++i) copy(i);

  const int warp_row = first_row + static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  const int warp_last = warp_row + Config::kWarpRows - 1;
  PrefillPass<Config, T, Columns> pass(p, batch, head, length, warp_row);
  for (int step = 0; step < tiles; ++step) {
    async_copies_wait<Config::kStages - 2>();
    __syncthreads();
    copy(step + Config::kStages - 1);
    const int stage = step % Config::kStages, column = begin + step * Config::kColumns;
    const int last = column + Config::kColumns - 1;
    const uint32_t tile = ring + stage * Config::Tile::kBytes;
    const float* statistic = statistics + stage * Config::kColumns;
    // Distance from key to query over the warp's pairs.
    const int nearest = Columns ? column - warp_last : warp_row - last;
    const int farthest = Columns ? last - warp_row : warp_last - column;
    if (nearest >= 0 && farthest < p.window && (!Columns || last < length)) {
      pass.template tile<false>(tile, statistic, column);
    } else if (farthest >= 0 && nearest < p.window) {
      pass.template tile<true>(tile, statistic, column);
    }
  }
  pass.finish();
}

// Sums over the query heads of each KV head; one thread per key.
__global__ void group_sums_kernel(const float* head_sums, float* column_sums, int64_t keys, int tokens, int group) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= keys) return;
  const float* x = head_sums + i / tokens * group * tokens + i % tokens;
  float sum = 0.0f;
  for (int g = 0; g < group; ++g) sum += x[static_cast<int64_t>(g) * tokens];
  column_sums[i] = sum;
}

}  // namespace minikv
