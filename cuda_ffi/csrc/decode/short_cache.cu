// Decode attention over a short cache: the launch. The kernel is in short_kernel.cuh.
#include <algorithm>
#include <limits>

#include "decode/arguments.h"
#include "decode/short_kernel.cuh"

namespace minikv {

namespace {

constexpr int kMaxCluster = 8;   // the largest that every device of compute capability 9.0 runs
constexpr int kReserved = 1024;  // bytes of shared memory of every block that the system needs

const uint8_t* bytes_of(const ffi::AnyBuffer& buffer) { return static_cast<const uint8_t*>(buffer.untyped_data()); }
const float* floats_of(const ffi::AnyBuffer& buffer) { return static_cast<const float*>(buffer.untyped_data()); }

// Lays out a side of a tile in shared memory. `halves`, `raw`: bytes of scales or of zeros as halves and as stored.
// Returns the side's bytes.
template <int H>
int lay_out(ShortSide& side, int halves, int raw) {
  using Shape = ShortShape<H>;
  side.high_at = (side.bits == 4 ? 2 : 1) * Shape::kSecondWords;
  side.halves_at = side.high_at + (side.bits == 3 ? kTileTokens / 32 * Shape::kHighRow : 0);
  side.halves_bytes = halves;
  side.raw_at = side.halves_at + 2 * halves;
  side.raw_bytes = side.direct ? 0 : round_up(raw, 16);
  side.factors_at = side.raw_at + 2 * side.raw_bytes;
  const int factors = side.direct ? 0 : 64;
  return round_up(std::max(side.factors_at + factors, kTailTokens * Shape::kHalvesRow), 128);
}

template <int H>
void lay_out(ShortParams& p, int group_size) {
  using Shape = ShortShape<H>;
  const int stored = kTileTokens * H / group_size * (p.metadata == kFloat8 ? 1 : 2);
  p.side[0].direct = p.metadata == kFloat16;
  p.side[1].direct = p.metadata == kFloat16 && group_size == Shape::kRun && Shape::kBlocks == 1;
  p.side_bytes[0] = lay_out<H>(p.side[0], kTileTokens / group_size * Shape::kHalvesRow, stored);
  p.side_bytes[1] = lay_out<H>(p.side[1], Shape::kBlocks * Shape::kValueHalves, stored);
}

struct ShortInstance {
  const void* kernel;
  void (*lay_out)(ShortParams&, int);
};

template <int H>
ShortInstance instance() {
  return {reinterpret_cast<const void*>(&short_decode_kernel<H>), &lay_out<H>};
}

// Null kernel if there is no such instance.
ShortInstance find_instance(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return instance<64>();
    case 96:
      return instance<96>();
    case 128:
      return instance<128>();
    case 256:
      return instance<256>();
    default:
      return {nullptr, nullptr};
  }
}

ShortParams short_params(const DecodeArguments& a, float scale) {
  ShortParams p{};
  p.packed_length = static_cast<const int32_t*>(a.packed_length.untyped_data());
  p.tail_length = static_cast<const int32_t*>(a.tail_length.untyped_data());
  p.q = a.q.untyped_data();
  p.out = a.out.untyped_data();
  p.partial = static_cast<float*>(a.partial.untyped_data());
  p.kv_heads = static_cast<int>(a.K());
  p.group = static_cast<int>(a.N() / a.K());
  p.query_blocks = (p.group + kQueries - 1) / kQueries;
  p.packed_capacity = static_cast<int>(a.P());
  p.tail_capacity = static_cast<int>(a.C());
  p.metadata = a.metadata();
  p.scale_log2 = scale * kLog2E;
  p.side[0] = {bytes_of(a.k_words),
               bytes_of(a.k_high),
               {bytes_of(a.k_scale), bytes_of(a.k_zero)},
               {floats_of(a.k_scale_factor), floats_of(a.k_zero_factor)},
               bytes_of(a.tail_k),
               a.k_bits};
  p.side[1] = {bytes_of(a.v_words),
               bytes_of(a.v_high),
               {bytes_of(a.v_scale), bytes_of(a.v_zero)},
               {floats_of(a.v_scale_factor), floats_of(a.v_zero_factor)},
               bytes_of(a.tail_v),
               a.v_bits};
  for (ShortSide& side : p.side) {
    side.group_log2 = integer_log2(a.group_size);
    side.factor_log2 = integer_log2(a.factor_block);
  }
  return p;
}

// Pairs of warps of which `blocks` blocks fit on a multiprocessor.
int fitting_pairs(const ShortParams& p, const Device& device, int head_dim, int blocks) {
  const int slot_floats = p.slot_floats(head_dim), pair_bytes = p.side_bytes[0] + p.side_bytes[1];
  int pairs = kMaxPairs / blocks;
  while (pairs > 1 && blocks * (kReserved + short_fixed_bytes(head_dim, pairs, slot_floats) + pairs * pair_bytes) >
                          kReserved + device.shared_bytes_per_block) {
    --pairs;
  }
  return pairs;
}

// Chooses the blocks of a row, whether they are a cluster, and the pairs of a block, which it returns.
int plan(ShortParams& p, const Device& device, int rows, int head_dim, int requested_pairs) {
  const int tiles =
      (p.packed_capacity + kTileTokens - 1) / kTileTokens + (p.tail_capacity + kTailTokens - 1) / kTailTokens;
  p.splits = std::clamp(device.multiprocessors / rows, 1, std::clamp(tiles, 1, kMaxCluster));
  const int useful = std::max(1, (tiles + p.splits - 1) / p.splits), blocks = rows * p.splits;
  // If there are more blocks than multiprocessors, two share one and hide each other's waits.
  const int most = fitting_pairs(p, device, head_dim, blocks > device.multiprocessors ? 2 : 1);
  const int pairs =
      requested_pairs > 0 ? std::min(requested_pairs, fitting_pairs(p, device, head_dim, 1)) : std::min(useful, most);
  // Groups of multiprocessors are no multiples of clusters. If blocks need nearly all multiprocessors, some clusters
  // would wait for others to end.
  const bool fit = 10 * blocks <= 9 * device.multiprocessors || pairs <= fitting_pairs(p, device, head_dim, 2);
  p.cluster = device.major >= 9 && p.splits > 1 && fit;
  return pairs;
}

}  // namespace

void launch_short(Checker& check, cudaStream_t stream, const DecodeArguments& a, const Device& device, float scale,
                  int requested_warps) {
  const int H = static_cast<int>(a.H());
  const ShortInstance instance = find_instance(H);
  check.require(instance.kernel != nullptr, "head_dim=", H, ", supported: 64, 96, 128, 256");
  if (!check.ok()) return;
  ShortParams p = short_params(a, scale);
  instance.lay_out(p, a.group_size);
  const int rows_per_batch = p.kv_heads * p.query_blocks, rows = static_cast<int>(a.B()) * rows_per_batch;
  if (rows == 0) return;
  const int pairs = plan(p, device, rows, H, (requested_warps + 1) / 2), slot_floats = p.slot_floats(H);
  const int shared = short_fixed_bytes(H, pairs, slot_floats) + pairs * (p.side_bytes[0] + p.side_bytes[1]);
  const int64_t tokens = a.B() * a.K() * std::max(a.P(), a.C());
  check.require(shared <= device.shared_bytes_per_block, shared, " bytes do not fit into shared memory");
  check.require(tokens <= std::numeric_limits<int>::max() && rows <= static_cast<int>(kCounters) && a.B() <= 65535,
                tokens, " tokens of all rows are more than a launch can count");
  check.require(p.splits == 1 || int64_t{rows} * p.splits * slot_floats <= a.partial.element_count(), "scratch of ",
                a.partial.element_count(), " floats is too small for ", rows * p.splits, " slots");
  if (!check.ok()) return;
  if (p.splits > 1 && !p.cluster) p.counters = take_counters(device.ordinal, rows);
  cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes_per_block);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = p.splits;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(p.splits, rows_per_batch, a.B());
  launch.blockDim = dim3(pairs * kPairThreads);
  launch.dynamicSmemBytes = shared;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = device.major < 9 ? 0 : p.cluster ? 2 : 1;
  void* arguments[] = {&p};
  cudaLaunchKernelExC(&launch, instance.kernel, arguments);
}

}  // namespace minikv
