// Instances of the decode kernel for one head_dim and number of key bits, which the build defines so that instances
// compile in parallel.
#include "decode/kernel.cuh"

namespace minikv {

template <int H, int KBits, int VBits, Metadata kMetadata, bool kVectorMetadata>
DecodeInstance instance() {
  return {reinterpret_cast<const void*>(&decode_kernel<H, KBits, VBits, kMetadata, kVectorMetadata>),
          DecodeLayout<H, KBits, VBits, kMetadata, kVectorMetadata>::kStageBytes, TokenMap<KBits, VBits>::kShares};
}

template <int H, int KBits, int VBits>
DecodeInstance with_bits(Metadata metadata, bool vector_metadata) {
  if constexpr (H == 128) {
    if (vector_metadata && metadata == kFloat16) return instance<H, KBits, VBits, kFloat16, true>();
    if (vector_metadata && metadata == kBFloat16) return instance<H, KBits, VBits, kBFloat16, true>();
  }
  if (metadata == kFloat16) return instance<H, KBits, VBits, kFloat16, false>();
  if (metadata == kBFloat16) return instance<H, KBits, VBits, kBFloat16, false>();
  return instance<H, KBits, VBits, kFloat8, false>();
}

template <>
DecodeInstance decode_instance<MINIKV_HEAD_DIM, MINIKV_KEY_BITS>(int v_bits, Metadata metadata, bool vector_metadata) {
  if (v_bits == 2) return with_bits<MINIKV_HEAD_DIM, MINIKV_KEY_BITS, 2>(metadata, vector_metadata);
  return with_bits<MINIKV_HEAD_DIM, MINIKV_KEY_BITS, 4>(metadata, vector_metadata);
}

}  // namespace minikv
