// Reads a buffer as fast as the device can: the yardstick of the memory-bound kernels.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ffi_checks.h"

namespace minikv {

constexpr int kReadThreads = 512;
constexpr int kUnroll = 8;

// Exclusive-or of all words, one partial result per block.
__global__ void __launch_bounds__(kReadThreads) read_kernel(const uint4* data, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kReadThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kReadThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < count; i += step) sum ^= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
  for (int d = 16; d; d >>= 1) sum ^= __shfl_xor_sync(0xFFFFFFFFu, sum, d);
  __shared__ uint32_t parts[kReadThreads / 32];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kReadThreads / 32; ++w) sum ^= parts[w];
    out[blockIdx.x] = sum;
  }
}

ffi::Error read_checksum(cudaStream_t stream, ffi::AnyBuffer data, ffi::Result<ffi::AnyBuffer> out) {
  Checker check("read_checksum");
  check.dtype("data", data, {ffi::U32});
  check.dtype("out", *out, {ffi::U32});
  check.rank("out", *out, 1);
  check.require(data.element_count() % 4 == 0, "data of ", data.element_count(), " words, expected a multiple of 4");
  if (!check.ok()) return check.error();
  read_kernel<<<out->element_count(), kReadThreads, 0, stream>>>(static_cast<const uint4*>(data.untyped_data()),
                                                                 data.element_count() / 4,
                                                                 static_cast<uint32_t*>(out->untyped_data()));
  return cuda_status("read_checksum", cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvReadChecksum, minikv::read_checksum,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
