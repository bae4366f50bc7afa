// Decode attention: the XLA FFI handler. The kernel is in kernel.cuh.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/ffi_checks.h"
#include "decode/kernel.cuh"

namespace minikv {

constexpr const char* kOp = "decode_attention";
// Counters of launches: a launch takes the next ones, so that two share some only if about a million lie between them
// (those must not run at the same time). Every launch leaves its own at zero.
constexpr uint32_t kCounters = 1 << 20;
__device__ int counters[kCounters];

namespace {

int integer_log2(int x) { return x <= 1 ? 0 : 1 + integer_log2(x / 2); }

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

// What a tensor map is of: `rows` rows of `row_bytes`, read in boxes of `box_rows` rows that land as `SwizzledTile`
// says; `all_spans` false reads one span of each row at a time.
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

// `encode_rows`, which takes the driver over 0.1 us, or what it made before: a map holds an address and sizes, nothing
// of what lies there. A loop calls with the same buffers again and again.
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

// Lets the kernel have all shared memory of a block on the current device. That holds for every thread's launches, so
// all set the same; this one need not where its last launch was of the same kernel.
void allow_all_shared_bytes(const void* kernel, const Device& device) {
  thread_local const void* last_kernel = nullptr;
  thread_local int last_device = -1;
  if (kernel == last_kernel && device.ordinal == last_device) return;
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes_per_block);
  last_kernel = set == cudaSuccess ? kernel : nullptr;
  last_device = device.ordinal;
}

// `count` counters of `device`, the current one; at most kCounters.
int* take_counters(int device, uint32_t count) {
  static std::atomic<uint32_t> next{0};
  thread_local int known = -1;
  thread_local int* all = nullptr;
  if (device != known) {
    cudaGetSymbolAddress(reinterpret_cast<void**>(&all), counters);
    known = device;
  }
  uint32_t first = next.fetch_add(count) % kCounters;
  if (first + count > kCounters) first = next.fetch_add(count) % kCounters;
  return all + (first + count > kCounters ? 0 : first);
}

}  // namespace

ffi::Error decode_attention(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_words, ffi::AnyBuffer k_scale,
                            ffi::AnyBuffer k_zero, ffi::AnyBuffer v_words, ffi::AnyBuffer v_scale,
                            ffi::AnyBuffer v_zero, ffi::AnyBuffer k_scale_factor, ffi::AnyBuffer k_zero_factor,
                            ffi::AnyBuffer v_scale_factor, ffi::AnyBuffer v_zero_factor, ffi::AnyBuffer tail_k,
                            ffi::AnyBuffer tail_v, ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length,
                            ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> partial, int32_t k_bits,
                            int32_t v_bits, int32_t group_size, int32_t factor_block, float scale,
                            int32_t requested_warps, int32_t requested_stages) {
  Checker check(kOp);
  check.rank("q", q, 3);
  check.rank("k_words", k_words, 4);
  check.rank("tail_k", tail_k, 4);
  if (!check.ok()) return check.error();
  const int64_t B = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2];
  const int64_t K = tail_k.dimensions()[1], C = tail_k.dimensions()[2];
  check.require(k_bits == 2 || k_bits == 4, "k_bits=", k_bits, ", supported: 2, 4");
  check.require(v_bits == 2 || v_bits == 4, "v_bits=", v_bits, ", supported: 2, 4");
  check.require(group_size >= 16 && group_size <= kTileTokens && (group_size & (group_size - 1)) == 0,
                "group_size=", group_size, ", supported: 16, 32, 64, 128");
  check.require(K > 0 && N % K == 0, "N=", N, " is not a multiple of K=", K);
  check.require(H % group_size == 0, "head_dim ", H, " is not a multiple of group_size ", group_size);
  if (!check.ok()) return check.error();
  const int64_t P = k_words.dimensions()[2] * (32 / k_bits);
  check.dtype("q", q, {ffi::BF16});
  check.shape("k_words", k_words, {B, K, P * k_bits / 32, H});
  check.shape("v_words", v_words, {B, K, P * v_bits / 32, H});
  check.dtype("k_words", k_words, {ffi::U32});
  check.dtype("v_words", v_words, {ffi::U32});
  check.dtype("k_scale", k_scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
  for (auto& [name, buffer] : {std::pair{"k_scale", k_scale}, {"k_zero", k_zero}}) {
    check.shape(name, buffer, {B, K, P / group_size, H});
    check.dtype(name, buffer, {k_scale.element_type()});
  }
  for (auto& [name, buffer] : {std::pair{"v_scale", v_scale}, {"v_zero", v_zero}}) {
    check.shape(name, buffer, {B, K, P, H / group_size});
    check.dtype(name, buffer, {k_scale.element_type()});
  }
  const Metadata metadata = k_scale.element_type() == ffi::F16    ? kFloat16
                            : k_scale.element_type() == ffi::BF16 ? kBFloat16
                                                                  : kFloat8;
  check.require(factor_block >= 16 && (factor_block & (factor_block - 1)) == 0 && P % factor_block == 0,
                "packed capacity ", P, " is not a multiple of a packing block that is a power of 2: ", factor_block);
  for (auto& [name, buffer] : {std::pair{"k_scale_factor", k_scale_factor},
                               {"k_zero_factor", k_zero_factor},
                               {"v_scale_factor", v_scale_factor},
                               {"v_zero_factor", v_zero_factor}}) {
    if (metadata == kFloat8) check.shape(name, buffer, {B, K, P / factor_block, 1});
    check.dtype(name, buffer, {ffi::F32});
  }
  check.shape("tail_k", tail_k, {B, K, C, H});
  check.shape("tail_v", tail_v, {B, K, C, H});
  check.dtype("tail_k", tail_k, {ffi::BF16});
  check.dtype("tail_v", tail_v, {ffi::BF16});
  check.shape("packed_length", packed_length, {B});
  check.shape("tail_length", tail_length, {B});
  check.dtype("packed_length", packed_length, {ffi::S32});
  check.dtype("tail_length", tail_length, {ffi::S32});
  check.shape("out", *out, {B, N, H});
  check.dtype("out", *out, {ffi::BF16});
  check.dtype("partial", *partial, {ffi::F32});
  if (!check.ok()) return check.error();

  const bool vector_metadata = H == 128 && group_size == 16 && metadata != kFloat8;
  const DecodeInstance instance = k_bits == 2 ? find_instance<2>(H, v_bits, metadata, vector_metadata)
                                              : find_instance<4>(H, v_bits, metadata, vector_metadata);
  check.require(instance.kernel != nullptr, "head_dim=", H, ", supported: 64, 96, 128, 256");
  if (!check.ok()) return check.error();

  DecodeParams p{};
  p.q = q.untyped_data();
  const ffi::AnyBuffer sources[kSources] = {k_words, k_scale, k_zero, v_words, v_scale, v_zero, tail_k, tail_v};
  for (int i = 0; i < kSources; ++i) p.base[i] = static_cast<const uint8_t*>(sources[i].untyped_data());
  const ffi::AnyBuffer factors[4] = {k_scale_factor, k_zero_factor, v_scale_factor, v_zero_factor};
  for (int i = 0; i < 4; ++i) p.factor[i] = static_cast<const float*>(factors[i].untyped_data());
  p.packed_length = static_cast<const int32_t*>(packed_length.untyped_data());
  p.tail_length = static_cast<const int32_t*>(tail_length.untyped_data());
  p.partial = static_cast<float*>(partial->untyped_data());
  p.out = out->untyped_data();
  p.batch = static_cast<int>(B);
  p.kv_heads = static_cast<int>(K);
  p.group = static_cast<int>(N / K);
  p.query_blocks = (p.group + kQueries - 1) / kQueries;
  p.packed_capacity = static_cast<int>(P);
  p.tail_capacity = static_cast<int>(C);
  p.group_log2 = integer_log2(group_size);
  p.factor_log2 = integer_log2(factor_block);
  p.scale_log2 = scale * kLog2E;

  const Device device = current_device();
  const int blocks = device.multiprocessors;
  p.stages = requested_stages;
  const int warp_bytes = p.stages * (instance.stage_bytes + 16) + kQueries * 2 * static_cast<int>(H);  // 2 barriers
  const int rows = p.batch * p.rows_per_batch();
  const int64_t most = static_cast<int64_t>(rows) * p.tiles(p.packed_capacity, p.tail_capacity);  // tiles, cache full
  const int most_warps = std::min(max_warps(static_cast<int>(H)),
                                  (device.shared_bytes_per_block - static_cast<int>(sizeof(BlockWork))) / warp_bytes);
  const int useful =
      static_cast<int>(std::clamp<int64_t>((most + blocks - 1) / blocks, 2, max_warps(static_cast<int>(H))));
  // Few tiles: warps that would find none take shares of the others'.
  const bool shared_tiles = requested_warps <= 0 && most > 0 && useful * instance.shares <= most_warps;
  p.shares_log2 = shared_tiles ? integer_log2(instance.shares) : 0;
  const int warps = std::min(most_warps, requested_warps > 0 ? requested_warps : useful << p.shares_log2);
  const int64_t slots = static_cast<int64_t>(blocks) * warps + (2 * rows << p.shares_log2);
  check.require(warps >= 1, "stages=", p.stages, " do not fit into shared memory");
  check.require(static_cast<int64_t>(partial->element_count()) >= slots * p.slot_floats(static_cast<int>(H)),
                "scratch of ", partial->element_count(), " floats is too small for ", slots, " slots");
  check.require(B * K * std::max(P, C) <= std::numeric_limits<int>::max(), B * K * std::max(P, C),
                " tokens of all rows are more than a launch can count");
  check.require(rows <= static_cast<int>(kCounters) && most / blocks < warps * p.stages * instance.stage_bytes, rows,
                " rows of ", most, " tiles are more than a launch can count");
  if (!check.ok()) return check.error();

  const int shared_bytes = warps * warp_bytes + static_cast<int>(sizeof(BlockWork));
  DecodeMaps maps{};
  if (device.major >= 9) {
    check.require(encode_tiled() != nullptr, "the driver has no cuTensorMapEncodeTiled");
    if (!check.ok()) return check.error();
    const bool made =
        make_maps(maps, p, static_cast<int>(H), k_bits, v_bits, metadata == kFloat8 ? 1 : 2, vector_metadata);
    check.require(made, "the driver refused a tensor map");
    if (!check.ok()) return check.error();
  }

  allow_all_shared_bytes(instance.kernel, device);
  p.counters = take_counters(device.ordinal, rows);
  void* arguments[] = {&maps, &p};
  cudaLaunchAttribute early{};  // the kernel itself waits for the launch before it
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(blocks);
  launch.blockDim = dim3((warps + producers(H)) * kWarpSize);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &early;
  launch.numAttrs = device.major >= 9 ? 1 : 0;
  cudaLaunchKernelExC(&launch, instance.kernel, arguments);
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvDecodeAttention, minikv::decode_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k_words
                                  .Arg<xla::ffi::AnyBuffer>()  // k_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // k_zero
                                  .Arg<xla::ffi::AnyBuffer>()  // v_words
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
                                  .Attr<int32_t>("warps")
                                  .Attr<int32_t>("stages"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
