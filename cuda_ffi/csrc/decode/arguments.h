// The decode handler's arguments and their checks.
#pragma once

#include "common/ffi_checks.h"
#include "decode/layout.cuh"

namespace minikv {

inline int integer_log2(int x) { return x <= 1 ? 0 : 1 + integer_log2(x / 2); }

// As `_KERNELS` in decode_attention.py numbers them.
enum DecodeKernel { kAnyKernel, kShortCache, kLongCache };

// Bits of the lowest plane of a code.
constexpr int lowest_plane(int bits) { return bits == 3 ? 2 : bits; }

// The handler's arguments.
struct DecodeArguments {
  ffi::AnyBuffer q, k_words, k_scale, k_zero, v_words, v_scale, v_zero;
  ffi::AnyBuffer k_high, v_high;                                                // planes of the third bit
  ffi::AnyBuffer k_scale_factor, k_zero_factor, v_scale_factor, v_zero_factor;  // of float8 metadata
  ffi::AnyBuffer tail_k, tail_v, packed_length, tail_length, out, partial;
  int32_t k_bits, v_bits, group_size, factor_block;

  int64_t B() const { return q.dimensions()[0]; }
  int64_t N() const { return q.dimensions()[1]; }
  int64_t H() const { return q.dimensions()[2]; }
  int64_t K() const { return tail_k.dimensions()[1]; }
  int64_t C() const { return tail_k.dimensions()[2]; }
  int64_t P() const { return k_words.dimensions()[2] * (32 / lowest_plane(k_bits)); }

  Metadata metadata() const {
    return k_scale.element_type() == ffi::F16 ? kFloat16 : k_scale.element_type() == ffi::BF16 ? kBFloat16 : kFloat8;
  }
  bool vector_metadata() const { return H() == 128 && group_size == 16 && metadata() != kFloat8; }
};

// Checks the buffers that sizes are read from.
inline void check_sizes(Checker& check, const DecodeArguments& a) {
  check.rank("q", a.q, 3);
  check.rank("k_words", a.k_words, 4);
  check.rank("tail_k", a.tail_k, 4);
  if (!check.ok()) return;
  check.require(a.k_bits >= 2 && a.k_bits <= 4, "k_bits=", a.k_bits, ", supported: 2, 3, 4");
  check.require(a.v_bits >= 2 && a.v_bits <= 4, "v_bits=", a.v_bits, ", supported: 2, 3, 4");
  check.require(a.group_size >= 16 && a.group_size <= kTileTokens && (a.group_size & (a.group_size - 1)) == 0,
                "group_size=", a.group_size, ", supported: 16, 32, 64, 128");
  check.require(a.K() > 0 && a.N() % a.K() == 0, "N=", a.N(), " is not a multiple of K=", a.K());
  check.require(a.H() % a.group_size == 0, "head_dim ", a.H(), " is not a multiple of group_size ", a.group_size);
}

// Checks every buffer's shape and dtype, after `check_sizes`.
inline void check_buffers(Checker& check, const DecodeArguments& a) {
  const int64_t B = a.B(), N = a.N(), H = a.H(), K = a.K(), C = a.C(), P = a.P();
  check.dtype("q", a.q, {ffi::BF16});
  check.shape("k_words", a.k_words, {B, K, P * lowest_plane(a.k_bits) / 32, H});
  check.shape("v_words", a.v_words, {B, K, P * lowest_plane(a.v_bits) / 32, H});
  if (a.k_bits == 3) check.shape("k_high", a.k_high, {B, K, P / 32, H});
  if (a.v_bits == 3) check.shape("v_high", a.v_high, {B, K, P / 32, H});
  for (auto& [name, buffer] :
       {std::pair{"k_words", a.k_words}, {"v_words", a.v_words}, {"k_high", a.k_high}, {"v_high", a.v_high}}) {
    check.dtype(name, buffer, {ffi::U32});
  }
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

// Launches the kernel for short caches (short_cache.cu), for arguments that have been checked. Warps of a
// block: 0 chooses.
void launch_short(Checker& check, cudaStream_t stream, const DecodeArguments& a, const Device& device, float scale,
                  int requested_warps);

}  // namespace minikv
