// Quantise and pack keys (groups of tokens) or values (groups of channels): one read, one write.
#include "ffi_checks.h"
#include "quantize.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "quantize";
constexpr int kThreads = 256;

// One thread a channel and group of tokens; neighbouring threads take neighbouring channels.
template <int Bits, typename X, typename M>
__global__ void __launch_bounds__(kThreads)
    tokens_kernel(const X* x, uint32_t* words, M* scale, M* zero, int64_t groups, int head_dim, int group) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= groups * head_dim) return;
  const int64_t row = i / head_dim;
  const int channel = static_cast<int>(i % head_dim);
  quantize_tokens_group<Bits>(x + row * group * head_dim + channel, head_dim, group,
                              words + row * (group * Bits / 32) * head_dim + channel, head_dim, scale + i, zero + i);
}

// One block of head_dim threads (rounded up to warps) a row of 16 tokens.
template <int Bits, typename X, typename M>
__global__ void __launch_bounds__(kThreads)
    channels_kernel(const X* x, uint32_t* words, M* scale, M* zero, int head_dim, int group) {
  __shared__ float shared[2 * (kThreads / 32) * 16];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 16;  // token
  const int channel = threadIdx.x, groups = head_dim / group;
  quantize_channels_rows<Bits>(x + first * head_dim + channel, head_dim, group, channel < head_dim,
                               words + first * Bits / 32 * head_dim + channel, head_dim,
                               scale + first * groups + channel / group, zero + first * groups + channel / group,
                               groups, shared);
}

struct Call {
  const void* x;
  uint32_t* words;
  void *scale, *zero;
  int64_t tokens;  // of all rows together
  int head_dim, group;
  bool by_tokens;
  cudaStream_t stream;
};

template <int Bits, typename X, typename M>
void launch(const Call& c) {
  const X* x = static_cast<const X*>(c.x);
  M *scale = static_cast<M*>(c.scale), *zero = static_cast<M*>(c.zero);
  if (c.by_tokens) {
    const int64_t groups = c.tokens / c.group, threads = groups * c.head_dim;
    tokens_kernel<Bits><<<(threads + kThreads - 1) / kThreads, kThreads, 0, c.stream>>>(x, c.words, scale, zero, groups,
                                                                                        c.head_dim, c.group);
  } else {
    channels_kernel<Bits>
        <<<c.tokens / 16, round_up(c.head_dim, 32), 0, c.stream>>>(x, c.words, scale, zero, c.head_dim, c.group);
  }
}

template <int Bits, typename X>
void launch_metadata(const Call& c, ffi::DataType metadata) {
  metadata == ffi::F16 ? launch<Bits, X, __half>(c) : launch<Bits, X, __nv_bfloat16>(c);
}

template <int Bits>
void launch_input(const Call& c, ffi::DataType input, ffi::DataType metadata) {
  if (input == ffi::F32) return launch_metadata<Bits, float>(c, metadata);
  if (input == ffi::F16) return launch_metadata<Bits, __half>(c, metadata);
  launch_metadata<Bits, __nv_bfloat16>(c, metadata);
}

}  // namespace

ffi::Error quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> words,
                    ffi::Result<ffi::AnyBuffer> scale, ffi::Result<ffi::AnyBuffer> zero, int32_t bits,
                    int32_t group_size, bool by_tokens) {
  Checker check(kOp);
  check.rank("x", x, 4);
  if (!check.ok()) return check.error();
  const int64_t B = x.dimensions()[0], K = x.dimensions()[1], S = x.dimensions()[2], H = x.dimensions()[3];
  check.require(bits == 2 || bits == 4, "bits=" + std::to_string(bits) + ", supported: 2, 4");
  check.require(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128,
                "group_size=" + std::to_string(group_size) + ", supported: 16, 32, 64, 128");
  check.require(H <= kThreads && H % 32 == 0, "head_dim=" + std::to_string(H) + ", supported: multiples of 32 to 256");
  if (!check.ok()) return check.error();
  check.require(
      S % 16 == 0 && (by_tokens ? S : H) % group_size == 0,
      "shape " + shape_text(x.dimensions()) + " does not divide into groups of " + std::to_string(group_size));
  check.dtype("x", x, {ffi::F32, ffi::F16, ffi::BF16});
  check.shape("words", *words, {B, K, S * bits / 32, H});
  check.dtype("words", *words, {ffi::U32});
  check.dtype("scale", *scale, {ffi::F16, ffi::BF16});
  for (auto& [name, buffer] : {std::pair{"scale", *scale}, {"zero", *zero}}) {
    check.dtype(name, buffer, {scale->element_type()});
    by_tokens ? check.shape(name, buffer, {B, K, S / group_size, H})
              : check.shape(name, buffer, {B, K, S, H / group_size});
  }
  if (!check.ok()) return check.error();
  if (x.element_count() == 0) return ffi::Error::Success();
  const Call call{x.untyped_data(),
                  static_cast<uint32_t*>(words->untyped_data()),
                  scale->untyped_data(),
                  zero->untyped_data(),
                  B * K * S,
                  static_cast<int>(H),
                  group_size,
                  by_tokens,
                  stream};
  bits == 2 ? launch_input<2>(call, x.element_type(), scale->element_type())
            : launch_input<4>(call, x.element_type(), scale->element_type());
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvQuantize, minikv::quantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Ret<xla::ffi::AnyBuffer>()  // words
                                  .Ret<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>()  // zero
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<bool>("by_tokens"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
