// Decode attention: the XLA FFI handler, and the launch of the kernel for long caches (kernel.cuh).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/counters.h"
#include "decode/arguments.h"
#include "decode/kernel.cuh"

namespace minikv {

constexpr const char* kOp = "decode_attention";
// Tiles of all rows' capacities for each multiprocessor up to which the kernel for short caches is faster, as measured
// on an H200.
constexpr int kShortCacheTiles = 24;

namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's tensor-map encoder, looked up at run time so that the library does not link the driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found);
#endif
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(symbol) : nullptr;
  }();
  return function;
}

// Describes a tensor map: `rows` rows of `row_bytes`, read in boxes of `box_rows` rows into a `SwizzledTile`. With
// `all_spans` false, a box is one span of each row.
struct RowsOf {
  const void* base = nullptr;
  int64_t rows = 0;
  int row_bytes = 0, box_rows = 0;
  bool all_spans = false;

  bool operator==(const RowsOf& other) const {
    return base == other.base && rows == other.rows && row_bytes == other.row_bytes && box_rows == other.box_rows &&
           all_spans == other.all_spans;
  }
};

bool encode_rows(CUtensorMap* map, const RowsOf& of) {
  const int span = of.row_bytes % 128 == 0 ? 128 : of.row_bytes % 64 == 0 ? 64 : of.row_bytes % 32 == 0 ? 32 : 16;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(span), static_cast<cuuint64_t>(of.rows),
                               static_cast<cuuint64_t>(of.row_bytes / span)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(of.row_bytes), static_cast<cuuint64_t>(span)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(span), static_cast<cuuint32_t>(of.box_rows),
                             static_cast<cuuint32_t>(of.all_spans ? of.row_bytes / span : 1)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUtensorMapSwizzle swizzle = span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : span == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  return encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(of.base), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Returns a cached map, or calls `encode_rows`, which takes the driver over 0.1 us. A map holds an address and sizes,
// not contents, and a loop calls with the same buffers repeatedly.
bool rows_map(CUtensorMap* map, const RowsOf& of) {
  struct Kept {
    RowsOf of;
    CUtensorMap map;
  };
  constexpr size_t kKept = 1024;  // several for each layer of a model
  thread_local std::vector<Kept> all(kKept);
  // Buffers start at multiples of 256 bytes.
  const uint64_t hash = (reinterpret_cast<uintptr_t>(of.base) >> 8) * 0x9E3779B97F4A7C15ull;
  Kept& kept = all[hash >> 54];
  static_assert(kKept == size_t{1} << (64 - 54));
  if (!(kept.of == of)) {
    kept.of = {};
    if (!encode_rows(&kept.map, of)) return false;
    kept.of = of;
  }
  *map = kept.map;
  return true;
}

// The tensor maps of the sources that are not empty and are copied by rows; `p.mapped` says which.
bool make_maps(DecodeMaps& maps, DecodeParams& p, int H, int k_bits, int v_bits, int meta_bytes, bool vector_metadata) {
  const int64_t kv_rows = int64_t{p.batch} * p.kv_heads, tokens = kv_rows * p.packed_capacity;
  const int group_size = 1 << p.group_log2;
  bool made = true;
  const auto map_rows = [&](int source, int64_t rows, int row_bytes, int box_rows, bool all_spans) {
    if (rows == 0) return;
    made &= rows_map(&maps.map[source], {p.base[source], rows, row_bytes, box_rows, all_spans});
    p.mapped |= 1u << source;
  };
  map_rows(kKeyWords, tokens * k_bits / 32, 4 * H, kTileTokens * k_bits / 32, true);
  map_rows(kValueWords, tokens * v_bits / 32, 4 * H, kTileTokens * v_bits / 32, true);
  for (int i : {kKeyScale, kKeyZero}) {
    map_rows(i, tokens / group_size, meta_bytes * H, kTileTokens / group_size, group_size == 16);
  }
  for (int i : {kValueScale, kValueZero}) {
    if (vector_metadata) map_rows(i, tokens / 16, meta_bytes * H, 8, true);
  }
  for (int i : {kTailKeys, kTailValues}) map_rows(i, kv_rows * p.tail_capacity, 2 * H, kTailTokens, true);
  return made;
}

template <int KBits>
DecodeInstance find_instance(int64_t head_dim, int v_bits, Metadata metadata, bool vector_metadata) {
  switch (head_dim) {
    case 64:
      return decode_instance<64, KBits>(v_bits, metadata, vector_metadata);
    case 96:
      return decode_instance<96, KBits>(v_bits, metadata, vector_metadata);
    case 128:
      return decode_instance<128, KBits>(v_bits, metadata, vector_metadata);
    case 256:
      return decode_instance<256, KBits>(v_bits, metadata, vector_metadata);
    default:
      return {nullptr, 0};
  }
}

// Allows the kernel all shared memory of a block on the current device. The setting applies to launches of all threads,
// which set the same value; a thread skips it if its last launch was of the same kernel.
void allow_all_shared_bytes(const void* kernel, const Device& device) {
  thread_local const void* last_kernel = nullptr;
  thread_local int last_device = -1;
  if (kernel == last_kernel && device.ordinal == last_device) return;
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes_per_block);
  last_kernel = set == cudaSuccess ? kernel : nullptr;
  last_device = device.ordinal;
}

// The kernel's parameters, except those that `plan_warps` and the launch set.
DecodeParams make_params(const DecodeArguments& a, float scale, int stages) {
  DecodeParams p{};
  p.q = a.q.untyped_data();
  const ffi::AnyBuffer sources[kSources] = {a.k_words, a.k_scale, a.k_zero, a.v_words,
                                            a.v_scale, a.v_zero,  a.tail_k, a.tail_v};
  for (int i = 0; i < kSources; ++i) p.base[i] = static_cast<const uint8_t*>(sources[i].untyped_data());
  const ffi::AnyBuffer factors[4] = {a.k_scale_factor, a.k_zero_factor, a.v_scale_factor, a.v_zero_factor};
  for (int i = 0; i < 4; ++i) p.factor[i] = static_cast<const float*>(factors[i].untyped_data());
  p.packed_length = static_cast<const int32_t*>(a.packed_length.untyped_data());
  p.tail_length = static_cast<const int32_t*>(a.tail_length.untyped_data());
  p.partial = static_cast<float*>(a.partial.untyped_data());
  p.out = a.out.untyped_data();
  p.batch = static_cast<int>(a.B());
  p.kv_heads = static_cast<int>(a.K());
  p.group = static_cast<int>(a.N() / a.K());
  p.query_blocks = (p.group + kQueries - 1) / kQueries;
  p.packed_capacity = static_cast<int>(a.P());
  p.tail_capacity = static_cast<int>(a.C());
  p.group_log2 = integer_log2(a.group_size);
  p.factor_log2 = integer_log2(a.factor_block);
  p.scale_log2 = scale * kLog2E;
  p.stages = stages;
  return p;
}

// Bytes of shared memory for each computing warp: its ring with two barriers per stage, and its queries.
int bytes_per_warp(const DecodeParams& p, const DecodeInstance& instance, int head_dim) {
  return p.stages * (instance.stage_bytes + 16) + kQueries * 2 * head_dim;
}

// Chooses the computing warps of a block and how many of them share a tile (`p.shares_log2`), and checks that their
// work can be counted.
int plan_warps(Checker& check, DecodeParams& p, const DecodeArguments& a, const DecodeInstance& instance,
               const Device& device, int requested_warps) {
  const int H = static_cast<int>(a.H()), blocks = device.multiprocessors, rows = p.batch * p.rows_per_batch();
  const int64_t full_tiles = static_cast<int64_t>(rows) * p.tiles(p.packed_capacity, p.tail_capacity);
  const int fitting_warps =
      std::min(max_warps(H),
               (device.shared_bytes_per_block - static_cast<int>(sizeof(BlockWork))) / bytes_per_warp(p, instance, H));
  const int useful_warps = static_cast<int>(std::clamp<int64_t>((full_tiles + blocks - 1) / blocks, 2, max_warps(H)));
  // If tiles are few, idle warps take shares of the others' tiles.
  const bool shared_tiles = requested_warps <= 0 && full_tiles > 0 && useful_warps * instance.shares <= fitting_warps;
  p.shares_log2 = shared_tiles ? integer_log2(instance.shares) : 0;
  const int warps = std::min(fitting_warps, requested_warps > 0 ? requested_warps : useful_warps << p.shares_log2);
  const int64_t slots = static_cast<int64_t>(blocks) * warps + (2 * rows << p.shares_log2);
  const int64_t tokens = a.B() * a.K() * std::max(a.P(), a.C());
  check.require(warps >= 1, "stages=", p.stages, " do not fit into shared memory");
  check.require(static_cast<int64_t>(a.partial.element_count()) >= slots * p.slot_floats(H), "scratch of ",
                a.partial.element_count(), " floats is too small for ", slots, " slots");
  check.require(tokens <= std::numeric_limits<int>::max(), tokens,
                " tokens of all rows are more than a launch can count");
  check.require(rows <= static_cast<int>(kCounters) && full_tiles / blocks < warps * p.stages * instance.stage_bytes,
                rows, " rows of ", full_tiles, " tiles are more than a launch can count");
  return warps;
}

void launch_kernel(cudaStream_t stream, const DecodeInstance& instance, const Device& device, DecodeMaps& maps,
                   DecodeParams& p, int head_dim, int warps) {
  allow_all_shared_bytes(instance.kernel, device);
  p.counters = take_counters(device.ordinal, p.batch * p.rows_per_batch());
  void* arguments[] = {&maps, &p};
  cudaLaunchAttribute early{};  // the kernel itself waits for the launch before it
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(device.multiprocessors);
  launch.blockDim = dim3((warps + producers(head_dim)) * kWarpSize);
  launch.dynamicSmemBytes = warps * bytes_per_warp(p, instance, head_dim) + static_cast<int>(sizeof(BlockWork));
  launch.stream = stream;
  launch.attrs = &early;
  launch.numAttrs = device.major >= 9 ? 1 : 0;
  cudaLaunchKernelExC(&launch, instance.kernel, arguments);
}

void launch_long(Checker& check, cudaStream_t stream, const DecodeArguments& a, const Device& device, float scale,
                 int requested_warps, int stages) {
  const int H = static_cast<int>(a.H());
  const DecodeInstance instance = a.k_bits == 2 ? find_instance<2>(H, a.v_bits, a.metadata(), a.vector_metadata())
                                                : find_instance<4>(H, a.v_bits, a.metadata(), a.vector_metadata());
  check.require(a.k_bits != 3 && a.v_bits != 3, "3 bits: the kernel for long caches supports 2, 4");
  check.require(instance.kernel != nullptr, "head_dim=", H, ", supported: 64, 96, 128, 256");
  if (!check.ok()) return;
  DecodeParams p = make_params(a, scale, stages);
  const int warps = plan_warps(check, p, a, instance, device, requested_warps);
  if (!check.ok()) return;
  DecodeMaps maps{};
  if (device.major >= 9) {
    check.require(encode_tiled() != nullptr, "the driver has no cuTensorMapEncodeTiled");
    if (!check.ok()) return;
    const bool made = make_maps(maps, p, H, a.k_bits, a.v_bits, a.metadata() == kFloat8 ? 1 : 2, a.vector_metadata());
    check.require(made, "the driver refused a tensor map");
    if (!check.ok()) return;
  }
  launch_kernel(stream, instance, device, maps, p, H, warps);
}

// The kernel that is faster for the capacities, or the only one for 3 bits.
DecodeKernel choose_kernel(const DecodeArguments& a, const Device& device) {
  if (a.k_bits == 3 || a.v_bits == 3) return kShortCache;
  if (device.major < 9) return kLongCache;  // not measured there
  const int64_t tiles = (a.P() + kTileTokens - 1) / kTileTokens + (a.C() + kTailTokens - 1) / kTailTokens;
  return a.B() * a.K() * tiles <= int64_t{kShortCacheTiles} * device.multiprocessors ? kShortCache : kLongCache;
}

}  // namespace

ffi::Error decode_attention(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_words, ffi::AnyBuffer k_high,
                            ffi::AnyBuffer k_scale, ffi::AnyBuffer k_zero, ffi::AnyBuffer v_words,
                            ffi::AnyBuffer v_high, ffi::AnyBuffer v_scale, ffi::AnyBuffer v_zero,
                            ffi::AnyBuffer k_scale_factor, ffi::AnyBuffer k_zero_factor, ffi::AnyBuffer v_scale_factor,
                            ffi::AnyBuffer v_zero_factor, ffi::AnyBuffer tail_k, ffi::AnyBuffer tail_v,
                            ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length, ffi::Result<ffi::AnyBuffer> out,
                            ffi::Result<ffi::AnyBuffer> partial, int32_t k_bits, int32_t v_bits, int32_t group_size,
                            int32_t factor_block, float scale, int32_t requested_kernel, int32_t requested_warps,
                            int32_t stages) {
  const DecodeArguments a{
      q,           k_words,        k_scale,       k_zero,         v_words,       v_scale,    v_zero,      k_high,
      v_high,      k_scale_factor, k_zero_factor, v_scale_factor, v_zero_factor, tail_k,     tail_v,      packed_length,
      tail_length, *out,           *partial,      k_bits,         v_bits,        group_size, factor_block};
  Checker check(kOp);
  check_sizes(check, a);
  if (!check.ok()) return check.error();
  check_buffers(check, a);
  if (!check.ok()) return check.error();
  const Device device = current_device();
  const DecodeKernel kernel =
      requested_kernel == kAnyKernel ? choose_kernel(a, device) : static_cast<DecodeKernel>(requested_kernel);
  if (kernel == kShortCache) {
    launch_short(check, stream, a, device, scale, requested_warps);
  } else {
    launch_long(check, stream, a, device, scale, requested_warps, stages);
  }
  return check.ok() ? cuda_status(kOp, cudaGetLastError()) : check.error();
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvDecodeAttention, minikv::decode_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k_words
                                  .Arg<xla::ffi::AnyBuffer>()  // k_high
                                  .Arg<xla::ffi::AnyBuffer>()  // k_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // k_zero
                                  .Arg<xla::ffi::AnyBuffer>()  // v_words
                                  .Arg<xla::ffi::AnyBuffer>()  // v_high
                                  .Arg<xla::ffi::AnyBuffer>()  // v_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // v_zero
                                  .Arg<xla::ffi::AnyBuffer>()  // k_scale_factor
                                  .Arg<xla::ffi::AnyBuffer>()  // k_zero_factor
                                  .Arg<xla::ffi::AnyBuffer>()  // v_scale_factor
                                  .Arg<xla::ffi::AnyBuffer>()  // v_zero_factor
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_k
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_v
                                  .Arg<xla::ffi::AnyBuffer>()  // packed_length
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_length
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // partial (scratch)
                                  .Attr<int32_t>("k_bits")
                                  .Attr<int32_t>("v_bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("factor_block")
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("kernel")
                                  .Attr<int32_t>("warps")
                                  .Attr<int32_t>("stages"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
