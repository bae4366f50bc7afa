// Appends one token per row to the tail, in place, and packs the oldest block of a tail that becomes full.
//
// Everything is decided on the device from the lengths. A thread block does all this for the keys or the values of one
// row and KV head: it writes the token and, if that fills the tail, quantises `block` tokens into the packed region and
// moves the rest of the tail down. The row's last block to finish writes the new lengths over the old ones, which all
// others have read by then.
#include <algorithm>
#include <array>

#include "common/counters.h"
#include "common/ffi_checks.h"
#include "quantize/quantize.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "append";
constexpr int kMaxHeadDim = 256;
constexpr int kCacheBuffers = 14;  // tail, two planes, scale, zero and two factors of the keys, then of the values

struct AppendParams {
  const void *k, *v;  // [B, K, H]
  void *tail_k, *tail_v;
  Stored keys, values;
  const int32_t* count;
  int32_t *packed_length, *tail_length;
  int* arrived;  // [B] counters of a row's finished blocks
  int kv_heads, head_dim, packed_capacity, tail_capacity, sinks, block, group, packing_block, k_bits, v_bits;
};

// A tail without a free slot takes nothing, because its packed region is full too.
__device__ __forceinline__ int added_tokens(const AppendParams& p, int batch, int tail_length) {
  return p.count[batch] > 0 && tail_length < p.tail_capacity ? 1 : 0;
}

__host__ __device__ inline int team_threads(const AppendParams& p) {
  return p.packing_block / kSlabTokens * p.head_dim / 4;
}

// Packs the oldest `block` tokens behind the sinks of a tail of keys (`kKeys`) or values, to the packed token
// `packed_token` of all rows and on. As many teams at a time as the block has threads for.
template <int Bits, bool kKeys, typename X, typename M>
__device__ __forceinline__ void pack_block(const AppendParams& p, const X* tail, int64_t packed_token,
                                           QuantizeScratch& scratch) {
  const int H = p.head_dim, teams = p.block / p.packing_block, slabs = p.packing_block / kSlabTokens;
  const int at_once = blockDim.x / team_threads(p);
#pragma unroll 1
  for (int first = 0; first < teams; first += at_once) {
    Slab<M> slab(p.group, p.packing_block, H, min(at_once, teams - first) * slabs);
    const int local = (first + slab.team) * p.packing_block + slab.index * kSlabTokens;  // the slab's first token
    const uint32_t at = (packed_token + local) / kSlabTokens;
    slab.template place<Bits, kKeys>(kKeys ? p.keys : p.values, at, p.packing_block);
    const X* x = tail + (p.sinks + local) * H + 4 * slab.quad;
    quantize_slab<Bits, kKeys, X, M>(slab, scratch,
                                     [&](int t) { return *reinterpret_cast<const Quad<X>*>(x + t * H); });
    __syncthreads();  // the scratch is free, and all of the block read
  }
}

template <bool kKeys, typename X, typename M>
__device__ __forceinline__ void pack_block_in(int bits, const AppendParams& p, const X* tail, int64_t packed_token,
                                              QuantizeScratch& scratch) {
  if (bits == 2) return pack_block<2, kKeys, X, M>(p, tail, packed_token, scratch);
  if (bits == 3) return pack_block<3, kKeys, X, M>(p, tail, packed_token, scratch);
  pack_block<4, kKeys, X, M>(p, tail, packed_token, scratch);
}

// blockIdx: (keys or values, KV head, batch).
template <typename X, typename M>
__global__ void __launch_bounds__(kQuantizeMaxThreads) append_kernel(AppendParams p) {
  __shared__ QuantizeScratch scratch;
  const int batch = blockIdx.z, H = p.head_dim;
  const bool keys = blockIdx.x == 0;
  const int64_t head = static_cast<int64_t>(batch) * p.kv_heads + blockIdx.y;
  const int old = p.tail_length[batch], start = p.packed_length[batch], length = old + added_tokens(p, batch, old);
  const bool full = length == p.tail_capacity && start + p.block <= p.packed_capacity;
  X* tail = static_cast<X*>(keys ? p.tail_k : p.tail_v) + head * p.tail_capacity * H;
  if (length > old) {
    const X* token = static_cast<const X*>(keys ? p.k : p.v) + head * H;
    for (int c = threadIdx.x; c < H; c += blockDim.x) tail[old * H + c] = token[c];
  }
  __syncthreads();  // the token is written, and the lengths read
  if (full) {
    const int64_t to = head * p.packed_capacity + start;
    keys ? pack_block_in<true, X, M>(p.k_bits, p, tail, to, scratch)
         : pack_block_in<false, X, M>(p.v_bits, p, tail, to, scratch);
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
#pragma unroll 1
      for (int t = p.sinks + p.block; t < p.tail_capacity; ++t) tail[(t - p.block) * H + c] = tail[t * H + c];
    }
  }
  if (threadIdx.x == 0 && add_acquire_release(p.arrived + batch, 1) == 2 * p.kv_heads - 1) {
    p.arrived[batch] = 0;
    p.tail_length[batch] = full ? length - p.block : length;
    p.packed_length[batch] = full ? start + p.block : start;
  }
}

template <typename X, typename M>
void launch(const AppendParams& p, int batch, cudaStream_t stream) {
  const int teams = std::clamp(kQuantizeMaxThreads / team_threads(p), 1, p.block / p.packing_block);
  const dim3 blocks(2, p.kv_heads, batch);
  append_kernel<X, M><<<blocks, round_up(teams * team_threads(p), 32), 0, stream>>>(p);
}

template <typename X>
void launch_metadata(const AppendParams& p, ffi::DataType metadata, int batch, cudaStream_t stream) {
  if (metadata == ffi::F16) return launch<X, __half>(p, batch, stream);
  if (metadata == ffi::BF16) return launch<X, __nv_bfloat16>(p, batch, stream);
  launch<X, __nv_fp8_e4m3>(p, batch, stream);
}

// The buffers of the keys or of the values.
struct Side {
  const char* name;
  int bits;
  ffi::AnyBuffer token, tail, words, high_words, scale, zero, scale_factor, zero_factor;
};

// The handler's arguments.
struct AppendArguments {
  Side keys, values;
  ffi::AnyBuffer count, packed_length, tail_length, packed_length_out, tail_length_out;
  int32_t group_size, sinks, block;

  int64_t B() const { return keys.tail.dimensions()[0]; }
  int64_t K() const { return keys.tail.dimensions()[1]; }
  int64_t C() const { return keys.tail.dimensions()[2]; }
  int64_t H() const { return keys.tail.dimensions()[3]; }
  int64_t P() const { return keys.words.dimensions()[2] * (32 / first_plane(keys.bits)); }
  int packing_block() const {
    return std::max(minikv::packing_block(keys.bits, group_size), minikv::packing_block(values.bits, group_size));
  }
  ffi::DataType input() const { return keys.tail.element_type(); }
  ffi::DataType metadata() const { return keys.scale.element_type(); }
};

// Checks that each argument is its result's buffer.
void check_in_place(Checker& check, const AppendArguments& a, ffi::RemainingArgs cache, ffi::RemainingRets cache_out) {
  for (int i = 0; i < kCacheBuffers; ++i) {
    const ffi::AnyBuffer buffer = *cache.get<ffi::AnyBuffer>(i), out = **cache_out.get<ffi::AnyBuffer>(i);
    check.require(buffer.element_count() == 0 || buffer.untyped_data() == out.untyped_data(), "cache buffer ", i,
                  " is not updated in place");
  }
  check.require(a.packed_length.untyped_data() == a.packed_length_out.untyped_data() &&
                    a.tail_length.untyped_data() == a.tail_length_out.untyped_data(),
                "the lengths are not updated in place");
}

// Checks the buffers that sizes are read from.
void check_sizes(Checker& check, const AppendArguments& a) {
  check.rank("key tail", a.keys.tail, 4);
  check.rank("key words", a.keys.words, 4);
  for (const Side& side : {a.keys, a.values}) {
    check.require(side.bits == 2 || side.bits == 3 || side.bits == 4, side.name, " bits=", side.bits,
                  ", supported: 2, 3, 4");
  }
  check.require(a.group_size == 16 || a.group_size == 32 || a.group_size == 64 || a.group_size == 128,
                "group_size=", a.group_size, ", supported: 16, 32, 64, 128");
  check.dtype("key tail", a.keys.tail, {ffi::F32, ffi::BF16, ffi::F16});
  check.dtype("key scale", a.keys.scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
}

void check_side(Checker& check, const AppendArguments& a, const Side& side, std::initializer_list<int64_t> metadata) {
  const auto one = [&](const char* what, ffi::AnyBuffer buffer, std::initializer_list<int64_t> shape,
                       ffi::DataType type) {
    const std::string name = std::string(side.name) + what;
    check.shape(name.c_str(), buffer, shape);
    check.dtype(name.c_str(), buffer, {type});
  };
  const int64_t B = a.B(), K = a.K(), P = a.P(), H = a.H();
  const int64_t factors = a.metadata() == ffi::F8E4M3FN ? P / a.packing_block() : 0;
  one(" token", side.token, {B, K, H}, a.input());
  one(" tail", side.tail, {B, K, a.C(), H}, a.input());
  one(" words", side.words, {B, K, P * first_plane(side.bits) / 32, H}, ffi::U32);
  one(" high words", side.high_words, {B, K, side.bits == 3 ? P / 32 : 0, H}, ffi::U32);
  one(" scale", side.scale, metadata, a.metadata());
  one(" zero", side.zero, metadata, a.metadata());
  one(" scale factor", side.scale_factor, {B, K, factors, 1}, ffi::F32);
  one(" zero factor", side.zero_factor, {B, K, factors, 1}, ffi::F32);
}

// Checks every buffer's shape and dtype, after `check_sizes`.
void check_buffers(Checker& check, const AppendArguments& a) {
  const int64_t B = a.B(), K = a.K(), C = a.C(), H = a.H(), P = a.P(), g = a.group_size, Q = a.packing_block();
  check.require(B < 65536, "batch=", B, ", supported: up to 65535");
  check.require(H <= kMaxHeadDim && H % 32 == 0 && H % g == 0, "head_dim=", H);
  check.require(P % Q == 0 && B * K * P / kSlabTokens < (int64_t{1} << 31), "packed capacity=", P);
  check.require(a.block > 0 && a.block % Q == 0 && a.sinks >= 0 && a.sinks + a.block <= C, "block=", a.block,
                ", sinks=", a.sinks, " in a tail of ", C);
  check_side(check, a, a.keys, {B, K, P / g, H});
  check_side(check, a, a.values, {B, K, P, H / g});
  const std::array<std::pair<const char*, ffi::AnyBuffer>, 5> lengths = {{{"count", a.count},
                                                                          {"packed_length", a.packed_length},
                                                                          {"tail_length", a.tail_length},
                                                                          {"packed_length_out", a.packed_length_out},
                                                                          {"tail_length_out", a.tail_length_out}}};
  for (const auto& [name, length] : lengths) {
    check.shape(name, length, {B});
    check.dtype(name, length, {ffi::S32});
  }
}

Stored stored(const Side& side) {
  return {static_cast<uint32_t*>(side.words.untyped_data()),
          static_cast<uint32_t*>(side.high_words.untyped_data()),
          side.scale.untyped_data(),
          side.zero.untyped_data(),
          static_cast<float*>(side.scale_factor.untyped_data()),
          static_cast<float*>(side.zero_factor.untyped_data())};
}

AppendParams make_params(const AppendArguments& a) {
  AppendParams p{};
  const Side &keys = a.keys, &values = a.values;
  p.k = keys.token.untyped_data(), p.v = values.token.untyped_data();
  p.tail_k = keys.tail.untyped_data(), p.tail_v = values.tail.untyped_data();
  p.keys = stored(keys), p.values = stored(values);
  p.count = static_cast<const int32_t*>(a.count.untyped_data());
  p.packed_length = static_cast<int32_t*>(a.packed_length_out.untyped_data());
  p.tail_length = static_cast<int32_t*>(a.tail_length_out.untyped_data());
  p.kv_heads = static_cast<int>(a.K()), p.head_dim = static_cast<int>(a.H());
  p.packed_capacity = static_cast<int>(a.P()), p.tail_capacity = static_cast<int>(a.C());
  p.sinks = a.sinks, p.block = a.block, p.group = a.group_size, p.packing_block = a.packing_block();
  p.k_bits = keys.bits, p.v_bits = values.bits;
  return p;
}

}  // namespace

// The lengths, tails, words, scales, zeros and factors are updated in place: each argument is its result's buffer.
ffi::Error append(cudaStream_t stream, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer count,
                  ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length, ffi::RemainingArgs cache,
                  ffi::Result<ffi::AnyBuffer> packed_length_out, ffi::Result<ffi::AnyBuffer> tail_length_out,
                  ffi::RemainingRets cache_out, int32_t k_bits, int32_t v_bits, int32_t group_size, int32_t sinks,
                  int32_t block) {
  Checker check(kOp);
  check.require(cache.size() == kCacheBuffers && cache_out.size() == kCacheBuffers, cache.size(),
                " cache buffers, expected ", kCacheBuffers);
  if (!check.ok()) return check.error();
  const auto side = [&](const char* name, int bits, ffi::AnyBuffer token, int first) {
    const auto buffer = [&](int i) { return *cache.get<ffi::AnyBuffer>(first + i); };
    return Side{name, bits, token, buffer(0), buffer(1), buffer(2), buffer(3), buffer(4), buffer(5), buffer(6)};
  };
  const AppendArguments a{side("key", k_bits, k, 0),
                          side("value", v_bits, v, kCacheBuffers / 2),
                          count,
                          packed_length,
                          tail_length,
                          *packed_length_out,
                          *tail_length_out,
                          group_size,
                          sinks,
                          block};
  check_in_place(check, a, cache, cache_out);
  check_sizes(check, a);
  if (!check.ok()) return check.error();
  check_buffers(check, a);
  if (!check.ok()) return check.error();

  AppendParams p = make_params(a);
  const int batch = static_cast<int>(a.B());
  p.arrived = take_counters(current_device().ordinal, batch);
  if (a.input() == ffi::F32) {
    launch_metadata<float>(p, a.metadata(), batch, stream);
  } else if (a.input() == ffi::F16) {
    launch_metadata<__half>(p, a.metadata(), batch, stream);
  } else {
    launch_metadata<__nv_bfloat16>(p, a.metadata(), batch, stream);
  }
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvAppend, minikv::append,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // count
                                  .Arg<xla::ffi::AnyBuffer>()  // packed_length
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_length
                                  .RemainingArgs()             // the cache
                                  .Ret<xla::ffi::AnyBuffer>()  // packed_length
                                  .Ret<xla::ffi::AnyBuffer>()  // tail_length
                                  .RemainingRets()             // the cache, updated
                                  .Attr<int32_t>("k_bits")
                                  .Attr<int32_t>("v_bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("sinks")
                                  .Attr<int32_t>("block"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
