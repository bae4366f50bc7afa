// Handlers of the two passes of prefill column sums, which select the kernel for a head dim and dtype.
#include "common/ffi_checks.h"
#include "prefill/prefill_attention.cuh"

namespace minikv {

namespace {

struct Call {
  const char* op;
  PrefillParams p;
  int batch;
  bool half;  // float16, else bfloat16
  cudaStream_t stream;
};

template <typename Config, typename T, bool Columns>
ffi::Error launch(const Call& c) {
  const auto kernel = prefill_kernel<Config, T, Columns>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (status != cudaSuccess) return cuda_status(c.op, status);
  const dim3 grid(c.p.heads, (c.p.tokens + Config::kRows - 1) / Config::kRows, c.batch);
  kernel<<<grid, Config::kThreads, Config::kSharedBytes, c.stream>>>(c.p);
  return cuda_status(c.op, cudaGetLastError());
}

template <int HeadDim, bool Columns>
ffi::Error launch_dtype(const Call& c) {
  using Config = Tuned<HeadDim>;
  return c.half ? launch<Config, __half, Columns>(c) : launch<Config, __nv_bfloat16, Columns>(c);
}

template <bool Columns>
ffi::Error run(const char* op, cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer lengths,
               ffi::AnyBuffer row_log_sum_exp, ffi::AnyBuffer head_sums, float scale, int32_t window) {
  Checker check(op);
  check.rank("q", q, 4);
  check.rank("k", k, 4);
  if (!check.ok()) return check.error();
  const int64_t B = q.dimensions()[0], T = q.dimensions()[1], N = q.dimensions()[2], H = q.dimensions()[3];
  const int64_t K = k.dimensions()[2];
  check.shape("k", k, {B, T, K, H});
  check.shape("lengths", lengths, {B});
  check.shape("row_log_sum_exp", row_log_sum_exp, {B, N, T});
  check.dtype("q", q, {ffi::BF16, ffi::F16});
  check.dtype("k", k, {q.element_type()});
  check.dtype("lengths", lengths, {ffi::S32});
  check.dtype("row_log_sum_exp", row_log_sum_exp, {ffi::F32});
  check.shape("head_sums", head_sums, {B, N, T});
  check.dtype("head_sums", head_sums, {ffi::F32});
  check.require(K > 0 && N % K == 0, N, " query heads over ", K, " KV heads");
  check.require(B < 65536, "batch=", B, ", supported: up to 65535");
  check.require(T < 1 << 23, "tokens=", T, ", supported: below 8388608");
  check.require(scale > 0.0f, "scale=", scale, ", expected a positive number");
  check.require(window >= 1, "window=", window, ", expected at least 1");
  if (!check.ok()) return check.error();
  if (B == 0 || T == 0) return ffi::Error::Success();
  const PrefillParams p{q.untyped_data(),
                        k.untyped_data(),
                        static_cast<const int32_t*>(lengths.untyped_data()),
                        static_cast<float*>(row_log_sum_exp.untyped_data()),
                        static_cast<float*>(head_sums.untyped_data()),
                        static_cast<int>(T),
                        static_cast<int>(N),
                        static_cast<int>(K),
                        window,
                        scale * kLog2E};
  const Call call{op, p, static_cast<int>(B), q.element_type() == ffi::F16, stream};
  switch (H) {
    case 64:
      return launch_dtype<64, Columns>(call);
    case 96:
      return launch_dtype<96, Columns>(call);
    case 128:
      return launch_dtype<128, Columns>(call);
    case 256:
      return launch_dtype<256, Columns>(call);
  }
  return ffi::Error::InvalidArgument(std::string(op) + ": head_dim=" + std::to_string(H) +
                                     ", supported: 64, 96, 128, 256");
}

}  // namespace

ffi::Error row_log_sum_exp(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer lengths,
                           ffi::Result<ffi::AnyBuffer> row_log_sum_exp, float scale, int32_t window) {
  return run<false>("row_log_sum_exp", stream, q, k, lengths, *row_log_sum_exp, *row_log_sum_exp, scale, window);
}

ffi::Error column_sums(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer lengths,
                       ffi::AnyBuffer row_log_sum_exp, ffi::Result<ffi::AnyBuffer> column_sums,
                       ffi::Result<ffi::AnyBuffer> head_sums, float scale, int32_t window) {
  constexpr const char* kOp = "column_sums";
  const ffi::Error error = run<true>(kOp, stream, q, k, lengths, row_log_sum_exp, *head_sums, scale, window);
  if (error.failure()) return error;
  const int64_t B = q.dimensions()[0], T = q.dimensions()[1], N = q.dimensions()[2], K = k.dimensions()[2];
  Checker check(kOp);
  check.shape("column_sums", *column_sums, {B, K, T});
  check.dtype("column_sums", *column_sums, {ffi::F32});
  if (!check.ok()) return check.error();
  const int64_t keys = B * K * T, threads = 256;
  if (keys == 0) return ffi::Error::Success();
  group_sums_kernel<<<(keys + threads - 1) / threads, threads, 0, stream>>>(
      static_cast<const float*>(head_sums->untyped_data()), static_cast<float*>(column_sums->untyped_data()), keys,
      static_cast<int>(T), static_cast<int>(N / K));
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvRowLogSumExp, minikv::row_log_sum_exp,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // lengths
                                  .Ret<xla::ffi::AnyBuffer>()  // row_log_sum_exp
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("window"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvColumnSums, minikv::column_sums,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // lengths
                                  .Arg<xla::ffi::AnyBuffer>()  // row_log_sum_exp
                                  .Ret<xla::ffi::AnyBuffer>()  // column_sums
                                  .Ret<xla::ffi::AnyBuffer>()  // head_sums, scratch
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("window"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
