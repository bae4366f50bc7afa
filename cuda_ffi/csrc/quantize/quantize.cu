// Quantise and pack keys (groups of tokens) or values (groups of channels): one read, one write.
#include <algorithm>

#include "common/ffi_checks.h"
#include "quantize/quantize.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "quantize";
constexpr int kThreads = 128;  // of a block, about

struct Call {
  const void* x;
  Stored to;
  uint32_t slabs;  // of all rows together
  int head_dim, group, block;
};

template <int Bits, bool ByTokens, typename X, typename M>
__global__ void __maxnreg__(sizeof(X) == 2 ? 96 : 128) quantize_kernel(Call c, int block_slabs) {
  __shared__ QuantizeScratch scratch;
  const uint32_t first = blockIdx.x * block_slabs;
  Slab<M> slab(c.group, c.block, c.head_dim, min(c.slabs - first, static_cast<uint32_t>(block_slabs)));
  const uint32_t at = first + slab.team * (c.block / kSlabTokens) + slab.index;  // of all rows
  slab.template place<Bits, ByTokens>(c.to, at, c.block);
  const X* x = static_cast<const X*>(c.x) + static_cast<int64_t>(at) * kSlabTokens * c.head_dim + 4 * slab.quad;
  quantize_slab<Bits, ByTokens, X, M>(slab, scratch,
                                      [&](int t) { return *reinterpret_cast<const Quad<X>*>(x + t * c.head_dim); });
}

struct Kinds {
  ffi::DataType input, metadata;
  int bits;
  bool by_tokens;
};

template <int Bits, typename X, typename M>
void launch(const Call& c, const Kinds& kinds, cudaStream_t stream) {
  const int quads = c.head_dim / 4, team = c.block / kSlabTokens;
  const uint32_t slabs = std::max(kThreads / quads / team, 1) * team;
  const uint32_t blocks = (c.slabs + slabs - 1) / slabs;
  const auto kernel = kinds.by_tokens ? quantize_kernel<Bits, true, X, M> : quantize_kernel<Bits, false, X, M>;
  kernel<<<blocks, round_up(slabs * quads, 32), 0, stream>>>(c, slabs);
}

template <typename X, typename M>
void launch_bits(const Call& c, const Kinds& kinds, cudaStream_t stream) {
  if (kinds.bits == 2) return launch<2, X, M>(c, kinds, stream);
  if (kinds.bits == 3) return launch<3, X, M>(c, kinds, stream);
  launch<4, X, M>(c, kinds, stream);
}

template <typename X>
void launch_metadata(const Call& c, const Kinds& kinds, cudaStream_t stream) {
  if (kinds.metadata == ffi::F16) return launch_bits<X, __half>(c, kinds, stream);
  if (kinds.metadata == ffi::BF16) return launch_bits<X, __nv_bfloat16>(c, kinds, stream);
  launch_bits<X, __nv_fp8_e4m3>(c, kinds, stream);
}

void launch_input(const Call& c, const Kinds& kinds, cudaStream_t stream) {
  if (kinds.input == ffi::F32) return launch_metadata<float>(c, kinds, stream);
  if (kinds.input == ffi::F16) return launch_metadata<__half>(c, kinds, stream);
  launch_metadata<__nv_bfloat16>(c, kinds, stream);
}

}  // namespace

ffi::Error quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> words,
                    ffi::Result<ffi::AnyBuffer> high_words, ffi::Result<ffi::AnyBuffer> scale,
                    ffi::Result<ffi::AnyBuffer> zero, ffi::Result<ffi::AnyBuffer> scale_factor,
                    ffi::Result<ffi::AnyBuffer> zero_factor, int32_t bits, int32_t group_size, int32_t factor_block,
                    bool by_tokens) {
  Checker check(kOp);
  check.rank("x", x, 4);
  check.require(bits == 2 || bits == 3 || bits == 4, "bits=", bits, ", supported: 2, 3, 4");
  check.require(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128,
                "group_size=", group_size, ", supported: 16, 32, 64, 128");
  const int least = packing_block(bits, group_size), most = std::max(group_size, 32);
  check.require(factor_block == least || factor_block == most, "factor_block=", factor_block, ", supported: ", least,
                ", ", most);
  if (!check.ok()) return check.error();
  const int64_t B = x.dimensions()[0], K = x.dimensions()[1], S = x.dimensions()[2], H = x.dimensions()[3];
  const bool factors = scale->element_type() == ffi::F8E4M3FN;
  check.require(H <= 256 && H % 32 == 0, "head_dim=", H, ", supported: multiples of 32 to 256");
  const int unit = factors ? factor_block : by_tokens ? least : word_tokens(bits);
  check.require(S % unit == 0 && (by_tokens || H % group_size == 0), "tokens=", S, ", head_dim=", H,
                ": does not divide into groups of ", group_size);
  check.dtype("x", x, {ffi::F32, ffi::F16, ffi::BF16});
  check.require(S / kSlabTokens * B * K < (int64_t{1} << 31), "too many tokens");
  check.shape("words", *words, {B, K, S * first_plane(bits) / 32, H});
  check.shape("high_words", *high_words, {B, K, bits == 3 ? S / 32 : 0, H});
  check.dtype("words", *words, {ffi::U32});
  check.dtype("high_words", *high_words, {ffi::U32});
  check.dtype("scale", *scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
  for (auto& [name, buffer] : {std::pair{"scale", *scale}, {"zero", *zero}}) {
    check.dtype(name, buffer, {scale->element_type()});
    by_tokens ? check.shape(name, buffer, {B, K, S / group_size, H})
              : check.shape(name, buffer, {B, K, S, H / group_size});
  }
  for (auto& [name, buffer] : {std::pair{"scale_factor", *scale_factor}, {"zero_factor", *zero_factor}}) {
    check.dtype(name, buffer, {ffi::F32});
    check.shape(name, buffer, {B, K, factors ? S / factor_block : 0, 1});
  }
  if (!check.ok()) return check.error();
  if (x.element_count() == 0) return ffi::Error::Success();
  const Call call{x.untyped_data(),
                  {static_cast<uint32_t*>(words->untyped_data()), static_cast<uint32_t*>(high_words->untyped_data()),
                   scale->untyped_data(), zero->untyped_data(), static_cast<float*>(scale_factor->untyped_data()),
                   static_cast<float*>(zero_factor->untyped_data())},
                  static_cast<uint32_t>(B * K * S / kSlabTokens),
                  static_cast<int>(H),
                  group_size,
                  factor_block};
  launch_input(call, {x.element_type(), scale->element_type(), bits, by_tokens}, stream);
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvQuantize, minikv::quantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Ret<xla::ffi::AnyBuffer>()  // words
                                  .Ret<xla::ffi::AnyBuffer>()  // high_words
                                  .Ret<xla::ffi::AnyBuffer>()  // scale
                                  .Ret<xla::ffi::AnyBuffer>()  // zero
                                  .Ret<xla::ffi::AnyBuffer>()  // scale_factor
                                  .Ret<xla::ffi::AnyBuffer>()  // zero_factor
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("factor_block")
                                  .Attr<bool>("by_tokens"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
