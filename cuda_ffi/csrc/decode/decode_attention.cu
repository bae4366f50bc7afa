// Decode attention: the XLA FFI handler. The kernel is in kernel.cuh.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/counters.h"
#include "common/ffi_checks.h"
#include "decode/kernel.cuh"

namespace minikv {

constexpr const char* kOp = "decode_attention";

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

// The handler's arguments.
struct DecodeArguments {
  ffi::AnyBuffer q, k_words, k_scale, k_zero, v_words, v_scale, v_zero;
  ffi::AnyBuffer k_scale_factor, k_zero_factor, v_scale_factor, v_zero_factor;  // of float8 metadata
  ffi::AnyBuffer tail_k, tail_v, packed_length, tail_length, out, partial;
  int32_t k_bits, v_bits, group_size, factor_block;

  int64_t B() const { return q.dimensions()[0]; }
  int64_t N() const { return q.dimensions()[1]; }
  int64_t H() const { return q.dimensions()[2]; }
  int64_t K() const { return tail_k.dimensions()[1]; }
  int64_t C() const { return tail_k.dimensions()[2]; }
  int64_t P() const { return k_words.dimensions()[2] * (32 / k_bits); }

  Metadata metadata() const {
    return k_scale.element_type() == ffi::F16 ? kFloat16 : k_scale.element_type() == ffi::BF16 ? kBFloat16 : kFloat8;
  }
  bool vector_metadata() const { return H() == 128 && group_size == 16 && metadata() != kFloat8; }
};

// Checks the buffers that sizes are read from.
void check_sizes(Checker& check, const DecodeArguments& a) {
  check.rank("q", a.q, 3);
  check.rank("k_words", a.k_words, 4);
  check.rank("tail_k", a.tail_k, 4);
  if (!check.ok()) return;
  check.require(a.k_bits == 2 || a.k_bits == 4, "k_bits=", a.k_bits, ", supported: 2, 4");
  check.require(a.v_bits == 2 || a.v_bits == 4, "v_bits=", a.v_bits, ", supported: 2, 4");
  check.require(a.group_size >= 16 && a.group_size <= kTileTokens && (a.group_size & (a.group_size - 1)) == 0,
                "group_size=", a.group_size, ", supported: 16, 32, 64, 128");
  check.require(a.K() > 0 && a.N() % a.K() == 0, "N=", a.N(), " is not a multiple of K=", a.K());
  check.require(a.H() % a.group_size == 0, "head_dim ", a.H(), " is not a multiple of group_size ", a.group_size);
}

// Checks every buffer's shape and dtype, after `check_sizes`.
void check_buffers(Checker& check, const DecodeArguments& a) {
  const int64_t B = a.B(), N = a.N(), H = a.H(), K = a.K(), C = a.C(), P = a.P();
  check.dtype("q", a.q, {ffi::BF16});
  check.shape("k_words", a.k_words, {B, K, P * a.k_bits / 32, H});
  check.shape("v_words", a.v_words, {B, K, P * a.v_bits / 32, H});
  check.dtype("k_words", a.k_words, {ffi::U32});
  check.dtype("v_words", a.v_words, {ffi::U32});
  check.dtype("k_scale", a.k_scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
  for (auto& [name, buffer] : {std::pair{"k_scale", a.k_scale}, {"k_zero", a.k_zero}}) {
    check.shape(name, buffer, {B, K, P / a.group_size, H});
    check.dtype(name, buffer, {a.k_scale.element_type()});
  }
  for (auto& [name, buffer] : {std::pair{"v_scale", a.v_scale}, {"v_zero", a.v_zero}}) {
    check.shape(name, buffer, {B, K, P, H / a.group_size});
    check.dtype(name, buffer, {a.k_scale.element_type()});
  }
  check.require(a.factor_block >= 16 && (a.factor_block & (a.factor_block - 1)) == 0 && P % a.factor_block == 0,
                "packed capacity ", P, " is not a multiple of a packing block that is a power of 2: ", a.factor_block);
  for (auto& [name, buffer] : {std::pair{"k_scale_factor", a.k_scale_factor},
                               {"k_zero_factor", a.k_zero_factor},
                               {"v_scale_factor", a.v_scale_factor},
                               {"v_zero_factor", a.v_zero_factor}}) {
    if (a.metadata() == kFloat8) check.shape(name, buffer, {B, K, P / a.factor_block, 1});
    check.dtype(name, buffer, {ffi::F32});
  }
  check.shape("tail_k", a.tail_k, {B, K, C, H});
  check.shape("tail_v", a.tail_v, {B, K, C, H});
  check.dtype("tail_k", a.tail_k, {ffi::BF16});
  check.dtype("tail_v", a.tail_v, {ffi::BF16});
  check.shape("packed_length", a.packed_length, {B});
  check.shape("tail_length", a.tail_length, {B});
  check.dtype("packed_length", a.packed_length, {ffi::S32});
  check.dtype("tail_length", a.tail_length, {ffi::S32});
  check.shape("out", a.out, {B, N, H});
  check.dtype("out", a.out, {ffi::BF16});
  check.dtype("partial", a.partial, {ffi::F32});
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

}  // namespace

ffi::Error decode_attention(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_words, ffi::AnyBuffer k_scale,
                            ffi::AnyBuffer k_zero, ffi::AnyBuffer v_words, ffi::AnyBuffer v_scale,
                            ffi::AnyBuffer v_zero, ffi::AnyBuffer k_scale_factor, ffi::AnyBuffer k_zero_factor,
                            ffi::AnyBuffer v_scale_factor, ffi::AnyBuffer v_zero_factor, ffi::AnyBuffer tail_k,
                            ffi::AnyBuffer tail_v, ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length,
                            ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> partial, int32_t k_bits,
                            int32_t v_bits, int32_t group_size, int32_t factor_block, float scale,
                            int32_t requested_warps, int32_t requested_stages) {
  const DecodeArguments a{q,      k_words,        k_scale,       k_zero,         v_words,       v_scale,
                          v_zero, k_scale_factor, k_zero_factor, v_scale_factor, v_zero_factor, tail_k,
                          tail_v, packed_length,  tail_length,   *out,           *partial,      k_bits,
                          v_bits, group_size,     factor_block};
  Checker check(kOp);
  check_sizes(check, a);
  if (!check.ok()) return check.error();
  check_buffers(check, a);
  if (!check.ok()) return check.error();
  const int H = static_cast<int>(a.H());
  const DecodeInstance instance = k_bits == 2 ? find_instance<2>(H, v_bits, a.metadata(), a.vector_metadata())
                                              : find_instance<4>(H, v_bits, a.metadata(), a.vector_metadata());
  check.require(instance.kernel != nullptr, "head_dim=", H, ", supported: 64, 96, 128, 256");
  if (!check.ok()) return check.error();

  const Device device = current_device();
  DecodeParams p = make_params(a, scale, requested_stages);
  const int warps = plan_warps(check, p, a, instance, device, requested_warps);
  if (!check.ok()) return check.error();
  DecodeMaps maps{};
  if (device.major >= 9) {
    check.require(encode_tiled() != nullptr, "the driver has no cuTensorMapEncodeTiled");
    if (!check.ok()) return check.error();
    const bool made = make_maps(maps, p, H, k_bits, v_bits, a.metadata() == kFloat8 ? 1 : 2, a.vector_metadata());
    check.require(made, "the driver refused a tensor map");
    if (!check.ok()) return check.error();
  }
  launch_kernel(stream, instance, device, maps, p, H, warps);
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
