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
  uint32_t* words;
  void *scale, *zero;
  float *scale_factor, *zero_factor;  // float8 metadata's
  int64_t slabs;                      // of all rows together
  int head_dim, group;
};

template <int Bits, bool ByTokens, typename X, typename M>
__global__ void __maxnreg__(sizeof(X) == 2 ? 96 : 128) quantize_kernel(Call c, int block_slabs) {
  __shared__ QuantizeScratch scratch;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_slabs;
  Slab<M> slab(c.group, c.head_dim, static_cast<int>(min(c.slabs - first, static_cast<int64_t>(block_slabs))));
  const int per_team = c.group / kSlabTokens;
  const int64_t at = first + slab.team * per_team + slab.index, team = at / per_team;  // of all rows
  const int64_t metadata = ByTokens ? team * c.head_dim : at * kSlabTokens * (c.head_dim / c.group);
  slab.words = c.words + at * kSlabTokens * Bits / 32 * c.head_dim;
  slab.scale = static_cast<M*>(c.scale) + metadata, slab.zero = static_cast<M*>(c.zero) + metadata;
  slab.scale_factor = c.scale_factor + team, slab.zero_factor = c.zero_factor + team;
  const X* x = static_cast<const X*>(c.x) + at * kSlabTokens * c.head_dim + 4 * slab.quad;
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
  const int quads = c.head_dim / 4, team = c.group / kSlabTokens;
  const int slabs = std::max(kThreads / quads / team, 1) * team;
  const int64_t blocks = (c.slabs + slabs - 1) / slabs;
  const auto kernel = kinds.by_tokens ? quantize_kernel<Bits, true, X, M> : quantize_kernel<Bits, false, X, M>;
  kernel<<<blocks, round_up(slabs * quads, 32), 0, stream>>>(c, slabs);
}

template <typename X, typename M>
void launch_bits(const Call& c, const Kinds& kinds, cudaStream_t stream) {
  kinds.bits == 2 ? launch<2, X, M>(c, kinds, stream) : launch<4, X, M>(c, kinds, stream);
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
                    ffi::Result<ffi::AnyBuffer> scale, ffi::Result<ffi::AnyBuffer> zero,
                    ffi::Result<ffi::AnyBuffer> scale_factor, ffi::Result<ffi::AnyBuffer> zero_factor, int32_t bits,
                    int32_t group_size, bool by_tokens) {
  Checker check(kOp);
  check.rank("x", x, 4);
  check.require(bits == 2 || bits == 4, "bits=", bits, ", supported: 2, 4");
  check.require(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128,
                "group_size=", group_size, ", supported: 16, 32, 64, 128");
  if (!check.ok()) return check.error();
  const int64_t B = x.dimensions()[0], K = x.dimensions()[1], S = x.dimensions()[2], H = x.dimensions()[3];
  const bool factors = scale->element_type() == ffi::F8E4M3FN;
  check.require(H <= 256 && H % 32 == 0, "head_dim=", H, ", supported: multiples of 32 to 256");
  check.require(S % (by_tokens || factors ? group_size : kSlabTokens) == 0 && (by_tokens || H % group_size == 0),
                "tokens=", S, ", head_dim=", H, ": does not divide into groups of ", group_size);
  check.dtype("x", x, {ffi::F32, ffi::F16, ffi::BF16});
  check.shape("words", *words, {B, K, S * bits / 32, H});
  check.dtype("words", *words, {ffi::U32});
  check.dtype("scale", *scale, {ffi::F16, ffi::BF16, ffi::F8E4M3FN});
  for (auto& [name, buffer] : {std::pair{"scale", *scale}, {"zero", *zero}}) {
    check.dtype(name, buffer, {scale->element_type()});
    by_tokens ? check.shape(name, buffer, {B, K, S / group_size, H})
              : check.shape(name, buffer, {B, K, S, H / group_size});
  }
  for (auto& [name, buffer] : {std::pair{"scale_factor", *scale_factor}, {"zero_factor", *zero_factor}}) {
    check.dtype(name, buffer, {ffi::F32});
    check.shape(name, buffer, {B, K, factors ? S / group_size : 0, 1});
  }
  if (!check.ok()) return check.error();
  if (x.element_count() == 0) return ffi::Error::Success();
  const Call call{x.untyped_data(),
                  static_cast<uint32_t*>(words->untyped_data()),
                  scale->untyped_data(),
                  zero->untyped_data(),
                  static_cast<float*>(scale_factor->untyped_data()),
                  static_cast<float*>(zero_factor->untyped_data()),
                  B * K * S / kSlabTokens,
                  static_cast<int>(H),
                  group_size};
  launch_input(call, {x.element_type(), scale->element_type(), bits, by_tokens}, stream);
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
                                  .Ret<xla::ffi::AnyBuffer>()  // scale_factor
                                  .Ret<xla::ffi::AnyBuffer>()  // zero_factor
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<bool>("by_tokens"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
