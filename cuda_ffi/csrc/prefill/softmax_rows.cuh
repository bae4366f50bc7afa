// Sums over the softmax map of Q K^T without an array of queries by keys, the loop of all kernels here and in votes/.
//
// A thread block keeps some rows of one matrix in registers, as the left operand of the tensor cores, and streams the
// other matrix past them through a ring in shared memory; every warp reduces its rows' logits over all columns. Pass 1
// keeps queries and streams keys: the log-sum-exp of each query. Pass 2 keeps keys and streams the queries of one head:
// the sum of exp(logit - log-sum-exp) of each key; a last kernel adds up the heads of a group. Rows stay with their
// lanes, so there is nothing to exchange before the end, and the order of all sums is fixed.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace minikv {

// Tuning of one head dim. A block has `8 * 16 * RowTiles` rows and takes `Columns` of the other matrix at a time, of
// which a warp holds the logits of `kChunk`.
template <int HeadDim, int RowTiles, int Columns>
struct SoftmaxConfig {
  static constexpr int kHeadDim = HeadDim, kRowTiles = RowTiles, kColumns = Columns;
  static constexpr int kWarps = 8, kChunk = 16, kStages = 3;
  static constexpr int kBlocks = 2;  // per multiprocessor, a hint for the compiler
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * RowTiles, kRows = kWarpRows * kWarps;
  using Tile = SwizzledTile<2 * HeadDim, Columns>;
  static constexpr int kStatisticBytes = Columns * sizeof(float);
  static constexpr int kSharedBytes = kStages * (Tile::kBytes + kStatisticBytes);
  static_assert(kRows % Columns == 0 && Columns % kChunk == 0 && HeadDim % 32 == 0 && Columns <= kThreads);
};

// The resident rows take 64 registers per lane at head dims of 128 and 256.
template <int HeadDim>
struct Tuned : SoftmaxConfig<HeadDim, 2, 64> {};
template <>
struct Tuned<256> : SoftmaxConfig<256, 1, 32> {};

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

// A warp's rows: keys if `Columns` (pass 2), else queries (pass 1).
template <typename Config, typename T, bool Columns>
struct SoftmaxRows {
  static constexpr int kSteps = Config::kHeadDim / 16;  // of the contraction
  static constexpr int kBlocks = Config::kChunk / 8;    // of columns
  using Tile = typename Config::Tile;
  static constexpr int kSpanSteps = Tile::kSpan / 64;  // pairs of steps in a span of the tile
  using Logits = float[Config::kRowTiles][kBlocks][4];

  const float scale_log2;  // softmax scale over ln 2
  const float log2_unit;   // base-2 logs per unit of the columns' log-sum-exp (pass 2)
  const int lane = threadIdx.x % 32;
  const int row;  // this lane's first
  uint32_t resident[Config::kRowTiles][kSteps][4];
  uint32_t tile_offset[kSpanSteps];        // of the steps of the first span
  float total[Config::kRowTiles][2] = {};  // of `row` and `row` + 8 of each row tile
  float tile_total[Config::kRowTiles][2];  // of one tile of columns: short sums first keep float32 exact enough
  float top[Config::kRowTiles][2];         // pass 1: the lagging maximum

  // `source` is the head's first token, `stride` the elements between tokens, `token_of` a row's token.
  template <typename TokenOf>
  __device__ __forceinline__ SoftmaxRows(float scale_log2, float log2_unit, const T* source, int stride, int warp_row,
                                         TokenOf token_of)
      : scale_log2(scale_log2), log2_unit(log2_unit), row(warp_row + lane / 4) {
    const T* base = source + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = token_of(row_of(i, half));
        const uint32_t* x = reinterpret_cast<const uint32_t*>(base + token * stride);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) resident[i][s][half] = x[8 * s], resident[i][s][half + 2] = x[8 * s + 4];
        top[i][half] = kMasked;
      }
    }
#pragma unroll
    for (int s = 0; s < kSpanSteps; ++s) tile_offset[s] = Tile::offset(lane % 8, 64 * s + 16 * (lane / 8));
  }

  __device__ __forceinline__ int row_of(int tile, int half) const { return row + 16 * tile + 8 * half; }

  // Logits of a chunk of columns from `column` of the shared-memory tile on.
  __device__ __forceinline__ void logits(Logits& x, uint32_t tile, int column) const {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) x[i][n][0] = x[i][n][1] = x[i][n][2] = x[i][n][3] = 0.0f;
    }
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) {
      const uint32_t span = tile + tile_offset[s % kSpanSteps] + s / kSpanSteps * (Config::kColumns * Tile::kSpan);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t b[4];
        load_matrices(b, span + (column + 8 * n) * Tile::kSpan);
#pragma unroll
        for (int i = 0; i < Config::kRowTiles; ++i) {
          mma<T>(x[i][n], resident[i][2 * s], b[0], b[1]);
          mma<T>(x[i][n], resident[i][2 * s + 1], b[2], b[3]);
        }
      }
    }
  }

  // Adds a tile's first `columns`, of which `first` is the first. `seen(row, column)` says which pairs count if
  // `Masked`; `statistic` is the address of the columns' log-sum-exp (pass 2).
  template <bool Masked, typename Seen>
  __device__ __forceinline__ void add(uint32_t tile, const float* statistic, int first, int columns, Seen seen) {
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) tile_total[i][0] = tile_total[i][1] = 0.0f;
#pragma unroll 1  // more makes the compiler spill
    for (int c = 0; c < columns; c += Config::kChunk) {
      Logits x;
      logits(x, tile, c);
      if constexpr (Masked) mask(x, first + c + 2 * (lane % 4), seen);
      if constexpr (Columns) {
        add_weights(x, statistic + c + 2 * (lane % 4));
      } else {
        add_terms(x);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) total[i][0] += tile_total[i][0], total[i][1] += tile_total[i][1];
  }

  template <typename Seen>
  __device__ __forceinline__ void mask(Logits& x, int column, Seen seen) const {
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
      const float minus[2] = {lse.x * -log2_unit, lse.y * -log2_unit};
#pragma unroll
      for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          tile_total[i][e / 2] += exp2_approx(__fmaf_rn(x[i][n][e], scale_log2, minus[e % 2]));
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
      for (int e = 2 * half; e < 2 * half + 2; ++e) sum += exp2_approx(__fmaf_rn(x[n][e], scale_log2, -most));
    }
    return sum;
  }

  // Brings a row's maximum up to date and returns the terms' sum relative to it.
  __device__ __forceinline__ float raise(const float (&x)[kBlocks][4], int half, int i) {
    float most = top[i][half];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]) * scale_log2);
    }
    const float factor = exp2_approx(top[i][half] - most);
    total[i][half] *= factor, tile_total[i][half] *= factor, top[i][half] = most;
    return terms(x, half, most);
  }

  // Joins the four lanes of each row; `write(row, sum, top)` gets it in one of them.
  template <typename Write>
  __device__ __forceinline__ void finish(Write write) const {
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
        if (lane % 4 == 0) write(row_of(i, half), sum, most);
      }
    }
  }
};

// Copies tiles of the streamed matrix, and in pass 2 their queries' log-sum-exp. A thread copies the same 16 bytes of
// every `kRowStep`-th column.
template <typename Config, typename T, bool Columns>
struct TileCopies {
  using Tile = typename Config::Tile;
  static constexpr int kChunks = Config::kHeadDim / 8;                  // of a column
  static constexpr int kLanes = Config::kHeadDim == 96 ? 16 : kChunks;  // the last four of 16 idle at 96
  static constexpr int kRowStep = Config::kThreads / kLanes;
  static_assert(kRowStep % 8 == 0 && Config::kColumns % kRowStep == 0);  // a step keeps the swizzle

  const float* statistics;
  const T* source;
  uint32_t destination;
  int stride, count;
  bool active;

  // `source` is column 0 and `statistics` its log-sum-exp, `stride` the elements between columns, of which there are
  // `count`.
  __device__ __forceinline__ TileCopies(const T* source, int stride, int count, const float* statistics)
      : statistics(statistics), stride(stride), count(count) {
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    active = chunk < kChunks;
    this->source = source + static_cast<int64_t>(row) * stride + 8 * chunk;
    destination = Tile::offset(row, 16 * chunk);
  }

  __device__ __forceinline__ void operator()(int column, uint32_t tile, uint32_t statistic) const {
#pragma unroll
    for (int row = 0; row < Config::kColumns; row += kRowStep) {
      const bool valid = column + row + static_cast<int>(threadIdx.x / kLanes) < count;
      const T* x = source + static_cast<int64_t>(valid ? column + row : 0) * stride;
      if (active) async_copy_16(tile + destination + row * Tile::kSpan, x, valid);
    }
    if (Columns && threadIdx.x < Config::kColumns) {
      const int i = column + threadIdx.x;
      const bool valid = i < count;
      async_copy_4(statistic + 4 * threadIdx.x, valid ? statistics + i : statistics, valid);
    }
  }
};

// The ring in shared memory. Tile number `step` starts at column `column_of(step)`.
template <typename Config, typename T, bool Columns, typename ColumnOf>
struct TileRing {
  const TileCopies<Config, T, Columns> copies;
  const ColumnOf column_of;
  const int tiles;
  const uint32_t ring;
  float* const statistics;

  // Starts the first copies.
  __device__ __forceinline__ TileRing(uint8_t* shared, const TileCopies<Config, T, Columns>& copies, int tiles,
                                      ColumnOf column_of)
      : copies(copies),
        column_of(column_of),
        tiles(tiles),
        ring(shared_address(shared)),
        statistics(reinterpret_cast<float*>(shared + Config::kStages * Config::Tile::kBytes)) {
#pragma unroll
    for (int i = 0; i < Config::kStages - 1; ++i) copy(i);
  }

  __device__ __forceinline__ void copy(int step) const {
    if (step < tiles) {
      const int stage = step % Config::kStages;
      copies(column_of(step), ring + stage * Config::Tile::kBytes,
             shared_address(statistics + stage * Config::kColumns));
    }
    async_copies_commit();
  }

  // Calls `use(step, tile, statistic)` for every tile.
  template <typename Use>
  __device__ __forceinline__ void stream(Use use) const {
    for (int step = 0; step < tiles; ++step) {
      async_copies_wait<Config::kStages - 2>();
      __syncthreads();
      copy(step + Config::kStages - 1);
      const int stage = step % Config::kStages;
      use(step, ring + stage * Config::Tile::kBytes, statistics + stage * Config::kColumns);
    }
  }
};

// Sums over the query heads of each KV head; one thread per key.
static __global__ void group_sums_kernel(const float* head_sums, float* column_sums, int64_t keys, int tokens,
                                         int group) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= keys) return;
  const float* x = head_sums + i / tokens * group * tokens + i % tokens;
  float sum = 0.0f;
  for (int g = 0; g < group; ++g) sum += x[static_cast<int64_t>(g) * tokens];
  column_sums[i] = sum;
}

}  // namespace minikv
