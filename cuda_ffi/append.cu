// Appends one token a row to the tail, in place, and packs the oldest block of a tail that has become full.
//
// Everything is decided on the device from the lengths: a first kernel writes the token and, where that fills the tail,
// quantises `block` tokens into the packed region; a second one, which needs the block read first, moves the rest of
// the tail down and writes the new lengths.
#include <array>

#include "ffi_checks.h"
#include "quantize.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "append";
constexpr int kMaxHeadDim = 256;

struct AppendParams {
  const void *k, *v;  // [B, K, H]
  void *tail_k, *tail_v;
  uint32_t *k_words, *v_words;
  void *k_scale, *k_zero, *v_scale, *v_zero;
  const int32_t *packed_length, *tail_length, *count;
  int32_t *new_packed_length, *new_tail_length;
  int kv_heads, head_dim, packed_capacity, tail_capacity, sinks, block, group;
};

// A tail without a free slot takes nothing: its packed region is full too.
__device__ __forceinline__ int added_tokens(const AppendParams& p, int batch) {
  return p.count[batch] > 0 && p.tail_length[batch] < p.tail_capacity ? 1 : 0;
}

// blockIdx: (16-token piece of the block, KV head, batch). Thread: channel.
template <int KBits, int VBits, typename X, typename M>
__global__ void __launch_bounds__(kMaxHeadDim) append_kernel(AppendParams p) {
  __shared__ float shared[2 * (kMaxHeadDim / 32) * 16];
  const int batch = blockIdx.z, channel = threadIdx.x, H = p.head_dim;
  const int64_t row = static_cast<int64_t>(batch) * p.kv_heads + blockIdx.y;
  const bool active = channel < H;
  const int length = p.tail_length[batch], added = added_tokens(p, batch);
  X* tail_k = static_cast<X*>(p.tail_k) + row * p.tail_capacity * H;
  X* tail_v = static_cast<X*>(p.tail_v) + row * p.tail_capacity * H;
  const bool full = length + added == p.tail_capacity;
  const int first = 16 * blockIdx.x;  // of the block's tokens
  // The piece that quantises the new token's slot writes it; without a flush the first piece does.
  const int newest = length - p.sinks;
  const int writer = full && newest >= 0 && newest < p.block ? newest / 16 : 0;
  if (active && added && static_cast<int>(blockIdx.x) == writer) {
    tail_k[static_cast<int64_t>(length) * H + channel] = static_cast<const X*>(p.k)[row * H + channel];
    tail_v[static_cast<int64_t>(length) * H + channel] = static_cast<const X*>(p.v)[row * H + channel];
  }
  const int start = p.packed_length[batch];
  if (!full || start + p.block > p.packed_capacity) return;
  const int64_t at = row * p.packed_capacity + start + first;  // packed token
  const int64_t source = static_cast<int64_t>(p.sinks + first) * H + channel;
  if (active && first % p.group == 0) {
    // A group of keys spans several pieces of 16 tokens: the first of them takes all. The new token may be another
    // piece's to write, so it is read from where it came from.
    const X* x = tail_k + source;
    const int64_t meta = at / p.group * H + channel;
    const int fresh = added ? newest - first : -1;
    quantize_tokens_group<KBits>(x, H, p.group, p.k_words + at * KBits / 32 * H + channel, H,
                                 static_cast<M*>(p.k_scale) + meta, static_cast<M*>(p.k_zero) + meta, fresh,
                                 static_cast<const X*>(p.k) + row * H + channel);
  }
  const int groups = H / p.group;
  const int64_t meta = at * groups + channel / p.group;
  quantize_channels_rows<VBits>(tail_v + source, H, p.group, active, p.v_words + at * VBits / 32 * H + channel, H,
                                static_cast<M*>(p.v_scale) + meta, static_cast<M*>(p.v_zero) + meta, groups, shared);
}

// blockIdx: (KV head, batch). Moves the tokens behind the packed block down and writes the lengths.
template <typename X>
__global__ void __launch_bounds__(kMaxHeadDim) settle_kernel(AppendParams p) {
  const int batch = blockIdx.y, channel = threadIdx.x, H = p.head_dim;
  const int length = p.tail_length[batch] + added_tokens(p, batch), start = p.packed_length[batch];
  const bool flush = length == p.tail_capacity && start + p.block <= p.packed_capacity;
  if (blockIdx.x == 0 && channel == 0) {
    p.new_tail_length[batch] = flush ? length - p.block : length;
    p.new_packed_length[batch] = flush ? start + p.block : start;
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

template <int KBits, int VBits, typename X, typename M>
void launch(const AppendParams& p, int batch, cudaStream_t stream) {
  const int threads = round_up(p.head_dim, 32);
  append_kernel<KBits, VBits, X, M><<<dim3(p.block / 16, p.kv_heads, batch), threads, 0, stream>>>(p);
  settle_kernel<X><<<dim3(p.kv_heads, batch), threads, 0, stream>>>(p);
}

template <typename X, typename M>
void launch_bits(const AppendParams& p, int k_bits, int v_bits, int batch, cudaStream_t stream) {
  if (k_bits == 2) return v_bits == 2 ? launch<2, 2, X, M>(p, batch, stream) : launch<2, 4, X, M>(p, batch, stream);
  v_bits == 2 ? launch<4, 2, X, M>(p, batch, stream) : launch<4, 4, X, M>(p, batch, stream);
}

}  // namespace

// The tails, words, scales and zeros are updated in place: each argument is its result's buffer.
ffi::Error append(cudaStream_t stream, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer count,
                  ffi::AnyBuffer packed_length, ffi::AnyBuffer tail_length, ffi::AnyBuffer tail_k,
                  ffi::AnyBuffer tail_v, ffi::AnyBuffer k_words, ffi::AnyBuffer k_scale, ffi::AnyBuffer k_zero,
                  ffi::AnyBuffer v_words, ffi::AnyBuffer v_scale, ffi::AnyBuffer v_zero,
                  ffi::Result<ffi::AnyBuffer> tail_k_out, ffi::Result<ffi::AnyBuffer> tail_v_out,
                  ffi::Result<ffi::AnyBuffer> k_words_out, ffi::Result<ffi::AnyBuffer> k_scale_out,
                  ffi::Result<ffi::AnyBuffer> k_zero_out, ffi::Result<ffi::AnyBuffer> v_words_out,
                  ffi::Result<ffi::AnyBuffer> v_scale_out, ffi::Result<ffi::AnyBuffer> v_zero_out,
                  ffi::Result<ffi::AnyBuffer> packed_length_out, ffi::Result<ffi::AnyBuffer> tail_length_out,
                  int32_t k_bits, int32_t v_bits, int32_t group_size, int32_t sinks, int32_t block) {
  Checker check(kOp);
  check.rank("tail_k", tail_k, 4);
  check.rank("k_words", k_words, 4);
  check.require((k_bits == 2 || k_bits == 4) && (v_bits == 2 || v_bits == 4),
                "k_bits=" + std::to_string(k_bits) + ", v_bits=" + std::to_string(v_bits) + ", supported: 2, 4");
  check.require(group_size >= 16 && group_size <= 128, "group_size=" + std::to_string(group_size));
  if (!check.ok()) return check.error();
  const int64_t B = tail_k.dimensions()[0], K = tail_k.dimensions()[1], C = tail_k.dimensions()[2];
  const int64_t H = tail_k.dimensions()[3], P = k_words.dimensions()[2] * (32 / k_bits);
  check.require(H <= kMaxHeadDim && H % 32 == 0 && H % group_size == 0, "head_dim=" + std::to_string(H));
  check.require(
      block % group_size == 0 && sinks + block <= C,
      "block=" + std::to_string(block) + ", sinks=" + std::to_string(sinks) + " in a tail of " + std::to_string(C));
  if (!check.ok()) return check.error();
  check.dtype("tail_k", tail_k, {ffi::F32, ffi::BF16, ffi::F16});
  check.dtype("k_scale", k_scale, {ffi::F16, ffi::BF16});
  for (auto& [name, buffer] : {std::pair{"k", k}, {"v", v}}) check.shape(name, buffer, {B, K, H});
  for (auto& [name, buffer] : {std::pair{"k", k}, {"v", v}, {"tail_v", tail_v}}) {
    check.dtype(name, buffer, {tail_k.element_type()});
  }
  check.shape("tail_v", tail_v, {B, K, C, H});
  check.shape("v_words", v_words, {B, K, P * v_bits / 32, H});
  for (auto& [name, buffer] : {std::pair{"k_words", k_words}, {"v_words", v_words}})
    check.dtype(name, buffer, {ffi::U32});
  for (auto& [name, buffer] : {std::pair{"k_scale", k_scale}, {"k_zero", k_zero}}) {
    check.shape(name, buffer, {B, K, P / group_size, H});
  }
  for (auto& [name, buffer] : {std::pair{"v_scale", v_scale}, {"v_zero", v_zero}}) {
    check.shape(name, buffer, {B, K, P, H / group_size});
  }
  for (auto& [name, buffer] : {std::pair{"k_zero", k_zero}, {"v_scale", v_scale}, {"v_zero", v_zero}}) {
    check.dtype(name, buffer, {k_scale.element_type()});
  }
  for (auto& [name, buffer] :
       {std::pair{"count", count}, {"packed_length", packed_length}, {"tail_length", tail_length}}) {
    check.shape(name, buffer, {B});
    check.dtype(name, buffer, {ffi::S32});
  }
  const std::array<std::pair<void*, void*>, 8> aliases = {{{tail_k.untyped_data(), tail_k_out->untyped_data()},
                                                           {tail_v.untyped_data(), tail_v_out->untyped_data()},
                                                           {k_words.untyped_data(), k_words_out->untyped_data()},
                                                           {k_scale.untyped_data(), k_scale_out->untyped_data()},
                                                           {k_zero.untyped_data(), k_zero_out->untyped_data()},
                                                           {v_words.untyped_data(), v_words_out->untyped_data()},
                                                           {v_scale.untyped_data(), v_scale_out->untyped_data()},
                                                           {v_zero.untyped_data(), v_zero_out->untyped_data()}}};
  for (const auto& [in, out] : aliases) check.require(in == out, "a cache buffer is not updated in place");
  check.shape("packed_length_out", *packed_length_out, {B});
  check.shape("tail_length_out", *tail_length_out, {B});
  if (!check.ok()) return check.error();

  AppendParams p{};
  p.k = k.untyped_data(), p.v = v.untyped_data();
  p.tail_k = tail_k.untyped_data(), p.tail_v = tail_v.untyped_data();
  p.k_words = static_cast<uint32_t*>(k_words.untyped_data());
  p.v_words = static_cast<uint32_t*>(v_words.untyped_data());
  p.k_scale = k_scale.untyped_data(), p.k_zero = k_zero.untyped_data();
  p.v_scale = v_scale.untyped_data(), p.v_zero = v_zero.untyped_data();
  p.packed_length = static_cast<const int32_t*>(packed_length.untyped_data());
  p.tail_length = static_cast<const int32_t*>(tail_length.untyped_data());
  p.count = static_cast<const int32_t*>(count.untyped_data());
  p.new_packed_length = static_cast<int32_t*>(packed_length_out->untyped_data());
  p.new_tail_length = static_cast<int32_t*>(tail_length_out->untyped_data());
  p.kv_heads = static_cast<int>(K), p.head_dim = static_cast<int>(H);
  p.packed_capacity = static_cast<int>(P), p.tail_capacity = static_cast<int>(C);
  p.sinks = sinks, p.block = block, p.group = group_size;

  const bool half_metadata = k_scale.element_type() == ffi::F16;
  const int batch = static_cast<int>(B);
  switch (tail_k.element_type()) {
    case ffi::F32:
      half_metadata ? launch_bits<float, __half>(p, k_bits, v_bits, batch, stream)
                    : launch_bits<float, __nv_bfloat16>(p, k_bits, v_bits, batch, stream);
      break;
    case ffi::F16:
      half_metadata ? launch_bits<__half, __half>(p, k_bits, v_bits, batch, stream)
                    : launch_bits<__half, __nv_bfloat16>(p, k_bits, v_bits, batch, stream);
      break;
    default:
      half_metadata ? launch_bits<__nv_bfloat16, __half>(p, k_bits, v_bits, batch, stream)
                    : launch_bits<__nv_bfloat16, __nv_bfloat16>(p, k_bits, v_bits, batch, stream);
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
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_k
                                  .Arg<xla::ffi::AnyBuffer>()  // tail_v
                                  .Arg<xla::ffi::AnyBuffer>()  // k_words
                                  .Arg<xla::ffi::AnyBuffer>()  // k_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // k_zero
                                  .Arg<xla::ffi::AnyBuffer>()  // v_words
                                  .Arg<xla::ffi::AnyBuffer>()  // v_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // v_zero
                                  .Ret<xla::ffi::AnyBuffer>()  // tail_k
                                  .Ret<xla::ffi::AnyBuffer>()  // tail_v
                                  .Ret<xla::ffi::AnyBuffer>()  // k_words
                                  .Ret<xla::ffi::AnyBuffer>()  // k_scale
                                  .Ret<xla::ffi::AnyBuffer>()  // k_zero
                                  .Ret<xla::ffi::AnyBuffer>()  // v_words
                                  .Ret<xla::ffi::AnyBuffer>()  // v_scale
                                  .Ret<xla::ffi::AnyBuffer>()  // v_zero
                                  .Ret<xla::ffi::AnyBuffer>()  // packed_length
                                  .Ret<xla::ffi::AnyBuffer>()  // tail_length
                                  .Attr<int32_t>("k_bits")
                                  .Attr<int32_t>("v_bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("sinks")
                                  .Attr<int32_t>("block"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
