// Appends one token a row to the tail, in place, and packs the oldest block of a tail that has become full.
//
// Everything is decided on the device from the lengths: a first kernel writes the token and, where that fills the tail,
// quantises `block` tokens into the packed region; a second one, which needs the block read first, moves the rest of
// the tail down and writes the new lengths over the old ones, of which the first kernel has left it a copy.
#include <array>

#include "common/ffi_checks.h"
#include "quantize/quantize.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "append";
constexpr int kMaxHeadDim = 256;
constexpr int kCacheBuffers = 12;  // tail, words, scale, zero and two factors of the keys, then of the values

struct AppendParams {
  const void *k, *v;  // [B, K, H]
  void *tail_k, *tail_v;
  uint32_t *k_words, *v_words;
  void *k_scale, *k_zero, *v_scale, *v_zero;
  float *k_scale_factor, *k_zero_factor, *v_scale_factor, *v_zero_factor;  // float8 metadata's
  const int32_t* count;
  int32_t *packed_length, *tail_length;
  int32_t *old_packed_length, *old_tail_length;  // for the second kernel, which writes over the lengths
  int kv_heads, head_dim, packed_capacity, tail_capacity, sinks, block, group, k_bits, v_bits;
};

// A tail without a free slot takes nothing: its packed region is full too.
__device__ __forceinline__ int added_tokens(const AppendParams& p, int batch, int tail_length) {
  return p.count[batch] > 0 && tail_length < p.tail_capacity ? 1 : 0;
}

// One team of the block's keys or values. `newest` is the new token's place in the tail, or -1; another block may be
// writing it, so it is read from where it came.
template <int Bits, bool ByTokens, typename X, typename M>
__device__ __forceinline__ void pack_team(Slab<M>& slab, QuantizeScratch& scratch, const X* tail, const X* fresh,
                                          int newest, int first) {
  const X* x = tail + static_cast<int64_t>(first) * slab.head_dim + 4 * slab.quad;
  fresh += 4 * slab.quad;
  quantize_slab<Bits, ByTokens, X, M>(slab, scratch, [&](int t) {
    return *reinterpret_cast<const Quad<X>*>(first + t == newest ? fresh : x + t * slab.head_dim);
  });
}

// blockIdx: (the block's teams of keys, then of values; KV head; batch).
template <typename X, typename M>
__global__ void __launch_bounds__(kQuantizeMaxThreads) append_kernel(AppendParams p) {
  __shared__ QuantizeScratch scratch;
  const int batch = blockIdx.z, H = p.head_dim, teams = p.block / p.group;
  const bool keys = static_cast<int>(blockIdx.x) < teams;
  const int team = blockIdx.x - (keys ? 0 : teams);
  const int64_t row = static_cast<int64_t>(batch) * p.kv_heads + blockIdx.y;
  const int length = p.tail_length[batch], start = p.packed_length[batch], added = added_tokens(p, batch, length);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.old_tail_length[batch] = length;
    p.old_packed_length[batch] = start;
  }
  X* tail = static_cast<X*>(keys ? p.tail_k : p.tail_v) + row * p.tail_capacity * H;
  const X* fresh = static_cast<const X*>(keys ? p.k : p.v) + row * H;
  if (added && team == 0) {
    for (int c = threadIdx.x; c < H; c += blockDim.x) tail[static_cast<int64_t>(length) * H + c] = fresh[c];
  }
  if (length + added < p.tail_capacity || start + p.block > p.packed_capacity) return;

  Slab<M> slab(p.group, H, p.group / kSlabTokens);
  const int64_t at = row * p.packed_capacity + start + team * p.group, packing_block = at / p.group;
  const int64_t token = at + slab.index * kSlabTokens;
  const int64_t metadata = keys ? packing_block * H : token * (H / p.group);
  const int bits = keys ? p.k_bits : p.v_bits;
  slab.words = (keys ? p.k_words : p.v_words) + token * bits / 32 * H;
  slab.scale = static_cast<M*>(keys ? p.k_scale : p.v_scale) + metadata;
  slab.zero = static_cast<M*>(keys ? p.k_zero : p.v_zero) + metadata;
  slab.scale_factor = (keys ? p.k_scale_factor : p.v_scale_factor) + packing_block;
  slab.zero_factor = (keys ? p.k_zero_factor : p.v_zero_factor) + packing_block;
  const int first = p.sinks + team * p.group + slab.index * kSlabTokens, newest = added ? length : -1;
  if (keys) {
    bits == 2 ? pack_team<2, true>(slab, scratch, tail, fresh, newest, first)
              : pack_team<4, true>(slab, scratch, tail, fresh, newest, first);
  } else {
    bits == 2 ? pack_team<2, false>(slab, scratch, tail, fresh, newest, first)
              : pack_team<4, false>(slab, scratch, tail, fresh, newest, first);
  }
}

// blockIdx: (KV head, batch). Moves the tokens behind the packed block down and writes the lengths.
template <typename X>
__global__ void __launch_bounds__(kMaxHeadDim) settle_kernel(AppendParams p) {
  const int batch = blockIdx.y, channel = threadIdx.x, H = p.head_dim;
  const int old = p.old_tail_length[batch], start = p.old_packed_length[batch];
  const int length = old + added_tokens(p, batch, old);
  const bool flush = length == p.tail_capacity && start + p.block <= p.packed_capacity;
  if (blockIdx.x == 0 && channel == 0) {
    p.tail_length[batch] = flush ? length - p.block : length;
    p.packed_length[batch] = flush ? start + p.block : start;
  }
  if (!flush || channel >= H) return;
  const int64_t row = static_cast<int64_t>(batch) * p.kv_heads + blockIdx.x;
  for (void* tail : {p.tail_k, p.tail_v}) {
    X* x = static_cast<X*>(tail) + row * p.tail_capacity * H + channel;
    for (int t = p.sinks + p.block; t < p.tail_capacity; ++t) {
      x[static_cast<int64_t>(t - p.block) * H] = x[static_cast<int64_t>(t) * H];
    }
  }
}

template <typename X, typename M>
void launch(const AppendParams& p, int batch, cudaStream_t stream) {
  const int team_threads = p.group / kSlabTokens * p.head_dim / 4;
  append_kernel<X, M><<<dim3(2 * p.block / p.group, p.kv_heads, batch), round_up(team_threads, 32), 0, stream>>>(p);
  settle_kernel<X><<<dim3(p.kv_heads, batch), p.head_dim, 0, stream>>>(p);
}

template <typename X>
void launch_metadata(const AppendParams& p, ffi::DataType metadata, int batch, cudaStream_t stream) {
  if (metadata == ffi::F16) return launch<X, __half>(p, batch, stream);
  if (metadata == ffi::BF16) return launch<X, __nv_bfloat16>(p, batch, stream);
  launch<X, __nv_fp8_e4m3>(p, batch, stream);
}

}  // namespace

// One side's cache buffers, keys' or values'.
struct Side {
  const char* name;
  ffi::AnyBuffer token, tail, words, scale, zero, scale_factor, zero_factor;
};

static void check_side(Checker& check, const Side& side, std::initializer_list<int64_t> token,
                       std::initializer_list<int64_t> tail, std::initializer_list<int64_t> words,
                       std::initializer_list<int64_t> metadata, std::initializer_list<int64_t> factor,
                       ffi::DataType input, ffi::DataType metadata_type) {
  const auto one = [&](const char* what, ffi::AnyBuffer buffer, std::initializer_list<int64_t> shape,
                       ffi::DataType type) {
    const std::string name = std::string(side.name) + what;
    check.shape(name.c_str(), buffer, shape);
    check.dtype(name.c_str(), buffer, {type});
  };
  one(" token", side.token, token, input);
  one(" tail", side.tail, tail, input);
  one(" words", side.words, words, ffi::U32);
  one(" scale", side.scale, metadata, metadata_type);
  one(" zero", side.zero, metadata, metadata_type);
  one(" scale factor", side.scale_factor, factor, ffi::F32);
  one(" zero factor", side.zero_factor, factor, ffi::F32);
}

// The lengths, tails, words, scales, zeros and factors are updated in place: each argument is its result's buffer.
ffi::Error append(cudaStream_t stream, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer count,
                  ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length, ffi::RemainingArgs cache,
                  ffi::Result<ffi::AnyBuffer> packed_length_out, ffi::Result<ffi::AnyBuffer> tail_length_out,
                  ffi::Result<ffi::AnyBuffer> old_lengths, ffi::RemainingRets cache_out, int32_t k_bits, int32_t v_bits,
                  int32_t group_size, int32_t sinks, int32_t block) {
  Checker check(kOp);
  check.require(cache.size() == kCacheBuffers && cache_out.size() == kCacheBuffers, cache.size(),
                " cache buffers, expected ", kCacheBuffers);
  if (!check.ok()) return check.error();
  const auto buffer = [&](int i) { return *cache.get<ffi::AnyBuffer>(i); };
  for (int i = 0; i < kCacheBuffers; ++i) {
    const ffi::AnyBuffer out = **cache_out.get<ffi::AnyBuffer>(i);
    check.require(buffer(i).element_count() == 0 || buffer(i).untyped_data() == out.untyped_data(), "cache buffer ", i,
                  " is not updated in place");
  }
  check.require(packed_length.untyped_data() == packed_length_out->untyped_data() &&
                    tail_length.untyped_data() == tail_length_out->untyped_data(),
                "the lengths are not updated in place");
  const Side keys{"key", k, buffer(0), buffer(1), buffer(2), buffer(3), buffer(4), buffer(5)};
  const Side values{"value", v, buffer(6), buffer(7), buffer(8), buffer(9), buffer(10), buffer(11)};
  check.rank("key tail", keys.tail, 4);
  check.rank("key words", keys.words, 4);
  check.require((k_bits == 2 || k_bits == 4) && (v_bits == 2 || v_bits == 4), "k_bits=", k_bits, ", v_bits=", v_bits,
                ", supported: 2, 4");
  check.require(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128,
                "group_size=", group_size, ", supported: 16, 32, 64, 128");
  check.dtype("key tail", keys.tail, {ffi::F32, ffi::BF16, ffi::F16});
  check.dtype("key scale", keys.scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
  if (!check.ok()) return check.error();
  const ffi::DataType input = keys.tail.element_type(), metadata = keys.scale.element_type();
  const int64_t B = keys.tail.dimensions()[0], K = keys.tail.dimensions()[1], C = keys.tail.dimensions()[2];
  const int64_t H = keys.tail.dimensions()[3], P = keys.words.dimensions()[2] * (32 / k_bits), g = group_size;
  check.require(H <= 256 && H % 32 == 0 && H % g == 0, "head_dim=", H);
  check.require(block > 0 && block % g == 0 && sinks >= 0 && sinks + block <= C, "block=", block, ", sinks=", sinks,
                " in a tail of ", C);
  const int64_t factors = metadata == ffi::F8E4M3FN ? P / g : 0;
  check_side(check, keys, {B, K, H}, {B, K, C, H}, {B, K, P * k_bits / 32, H}, {B, K, P / g, H}, {B, K, factors, 1},
             input, metadata);
  check_side(check, values, {B, K, H}, {B, K, C, H}, {B, K, P * v_bits / 32, H}, {B, K, P, H / g}, {B, K, factors, 1},
             input, metadata);
  const std::array<std::pair<const char*, ffi::AnyBuffer>, 5> lengths = {{{"count", count},
                                                                          {"packed_length", packed_length},
                                                                          {"tail_length", tail_length},
                                                                          {"packed_length_out", *packed_length_out},
                                                                          {"tail_length_out", *tail_length_out}}};
  for (const auto& [name, length] : lengths) {
    check.shape(name, length, {B});
    check.dtype(name, length, {ffi::S32});
  }
  check.shape("old_lengths", *old_lengths, {2, B});
  check.dtype("old_lengths", *old_lengths, {ffi::S32});
  if (!check.ok()) return check.error();

  AppendParams p{};
  p.k = k.untyped_data(), p.v = v.untyped_data();
  p.tail_k = keys.tail.untyped_data(), p.tail_v = values.tail.untyped_data();
  p.k_words = static_cast<uint32_t*>(keys.words.untyped_data());
  p.v_words = static_cast<uint32_t*>(values.words.untyped_data());
  p.k_scale = keys.scale.untyped_data(), p.k_zero = keys.zero.untyped_data();
  p.v_scale = values.scale.untyped_data(), p.v_zero = values.zero.untyped_data();
  p.k_scale_factor = static_cast<float*>(keys.scale_factor.untyped_data());
  p.k_zero_factor = static_cast<float*>(keys.zero_factor.untyped_data());
  p.v_scale_factor = static_cast<float*>(values.scale_factor.untyped_data());
  p.v_zero_factor = static_cast<float*>(values.zero_factor.untyped_data());
  p.count = static_cast<const int32_t*>(count.untyped_data());
  p.packed_length = static_cast<int32_t*>(packed_length_out->untyped_data());
  p.tail_length = static_cast<int32_t*>(tail_length_out->untyped_data());
  p.old_packed_length = static_cast<int32_t*>(old_lengths->untyped_data());
  p.old_tail_length = p.old_packed_length + B;
  p.kv_heads = static_cast<int>(K), p.head_dim = static_cast<int>(H);
  p.packed_capacity = static_cast<int>(P), p.tail_capacity = static_cast<int>(C);
  p.sinks = sinks, p.block = block, p.group = group_size, p.k_bits = k_bits, p.v_bits = v_bits;

  const int batch = static_cast<int>(B);
  if (input == ffi::F32) {
    launch_metadata<float>(p, metadata, batch, stream);
  } else if (input == ffi::F16) {
    launch_metadata<__half>(p, metadata, batch, stream);
  } else {
    launch_metadata<__nv_bfloat16>(p, metadata, batch, stream);
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
                                  .Ret<xla::ffi::AnyBuffer>()  // old lengths, scratch
                                  .RemainingRets()             // the cache, updated
                                  .Attr<int32_t>("k_bits")
                                  .Attr<int32_t>("v_bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("sinks")
                                  .Attr<int32_t>("block"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
