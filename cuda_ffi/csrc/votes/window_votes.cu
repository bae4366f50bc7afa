// Handler of window votes, which selects the kernels for a head dim and dtype.
#include "common/ffi_checks.h"
#include "votes/window_votes.cuh"

namespace minikv {

namespace {

constexpr const char* kOp = "window_votes";
constexpr int kThreads = 256;  // of the kernels with one thread per element

unsigned blocks_for(int64_t elements) { return static_cast<unsigned>((elements + kThreads - 1) / kThreads); }

template <typename Config, typename T>
cudaError_t launch(VotesParams p, cudaStream_t stream) {
  for (int w = 0; w < p.windows; ++w) {
    p.tiles[w + 1] = p.tiles[w] + (p.sizes[w + 1] - p.sizes[w] + Config::kColumns - 1) / Config::kColumns;
  }
  const auto pass_1 = query_sums_kernel<Config, T>;
  const auto pass_2 = key_sums_kernel<Config, T>;
  for (const auto pass : {pass_1, pass_2}) {
    const cudaError_t status =
        cudaFuncSetAttribute(pass, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
    if (status != cudaSuccess) return status;
  }
  const int query_blocks = (p.queries + Config::kRows - 1) / Config::kRows;
  const int key_blocks = (p.tokens + Config::kRows - 1) / Config::kRows;
  const dim3 grid_1(p.heads, query_blocks * p.splits, p.batch), grid_2(p.heads, key_blocks, p.batch);
  pass_1<<<grid_1, Config::kThreads, Config::kSharedBytes, stream>>>(p);
  join_splits_kernel<<<blocks_for(static_cast<int64_t>(p.batch) * p.heads * p.queries), kThreads, 0, stream>>>(p);
  pass_2<<<grid_2, Config::kThreads, Config::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <int HeadDim>
cudaError_t launch_dtype(const VotesParams& p, bool half, cudaStream_t stream) {
  using Config = Tuned<HeadDim>;
  return half ? launch<Config, __half>(p, stream) : launch<Config, __nv_bfloat16>(p, stream);
}

cudaError_t launch_head_dim(const VotesParams& p, int64_t head_dim, bool half, cudaStream_t stream) {
  switch (head_dim) {
    case 64:
      return launch_dtype<64>(p, half, stream);
    case 96:
      return launch_dtype<96>(p, half, stream);
    case 128:
      return launch_dtype<128>(p, half, stream);
    default:
      return launch_dtype<256>(p, half, stream);
  }
}

}  // namespace

ffi::Error window_votes(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer lengths,
                        ffi::Result<ffi::AnyBuffer> votes, ffi::Result<ffi::AnyBuffer> head_sums,
                        ffi::Result<ffi::AnyBuffer> row_log_sum_exp, ffi::Result<ffi::AnyBuffer> split_log_sums,
                        ffi::Span<const int32_t> sizes, float scale, int32_t power, int32_t window) {
  Checker check(kOp);
  check.rank("q", q, 4);
  check.rank("k", k, 4);
  check.rank("split_log_sums", *split_log_sums, 4);
  check.require(sizes.size() >= 1 && sizes.size() <= kMaxWindows, sizes.size(), " windows, supported: 1 to ",
                kMaxWindows);
  if (!check.ok()) return check.error();
  const int64_t B = q.dimensions()[0], T = q.dimensions()[1], N = q.dimensions()[2], H = q.dimensions()[3];
  const int64_t K = k.dimensions()[2], windows = sizes.size(), splits = split_log_sums->dimensions()[0];
  const int64_t W = sizes[sizes.size() - 1];
  check.shape("k", k, {B, T, K, H});
  check.shape("lengths", lengths, {B});
  check.shape("votes", *votes, {windows, B, K, T});
  check.shape("head_sums", *head_sums, {windows, B, N, T});
  check.shape("row_log_sum_exp", *row_log_sum_exp, {B, N, W});
  check.shape("split_log_sums", *split_log_sums, {splits, B, N, W});
  check.dtype("q", q, {ffi::BF16, ffi::F16});
  check.dtype("k", k, {q.element_type()});
  check.dtype("lengths", lengths, {ffi::S32});
  for (auto result : {votes, head_sums, row_log_sum_exp, split_log_sums}) {
    check.dtype("a result", *result, {ffi::F32});
  }
  check.require(K > 0 && N % K == 0, N, " query heads over ", K, " KV heads");
  check.require(H == 64 || H == 96 || H == 128 || H == 256, "head_dim=", H, ", supported: 64, 96, 128, 256");
  check.require(B < 65536, "batch=", B, ", supported: up to 65535");
  check.require(T < 1 << 23, "tokens=", T, ", supported: below 8388608");
  check.require(splits >= 1 && splits * ((W + 127) / 128) < 65536, splits, " splits of ", W, " queries");
  check.require(scale > 0.0f && power >= 1 && window >= 1, "scale=", scale, ", power=", power, ", window=", window,
                ", expected positive numbers");
  VotesParams p{q.untyped_data(),
                k.untyped_data(),
                static_cast<const int32_t*>(lengths.untyped_data()),
                static_cast<float*>(split_log_sums->untyped_data()),
                static_cast<float*>(row_log_sum_exp->untyped_data()),
                static_cast<float*>((N == K ? votes : head_sums)->untyped_data()),
                static_cast<int>(B),
                static_cast<int>(T),
                static_cast<int>(N),
                static_cast<int>(K),
                static_cast<int>(W),
                static_cast<int>(splits),
                static_cast<int>(windows),
                window,
                scale * kLog2E,
                static_cast<float>(power)};
  for (int w = 0; w < windows; ++w) {
    p.sizes[w + 1] = sizes[w];
    check.require(sizes[w] > p.sizes[w] && sizes[w] <= T, "a window of ", sizes[w], " queries after one of ",
                  p.sizes[w], " for ", T, " tokens, expected ascending sizes");
  }
  if (!check.ok()) return check.error();
  if (B == 0) return ffi::Error::Success();
  const cudaError_t status = launch_head_dim(p, H, q.element_type() == ffi::F16, stream);
  if (status != cudaSuccess || N == K) return cuda_status(kOp, status);
  const int64_t keys = windows * B * K * T;
  group_sums_kernel<<<blocks_for(keys), kThreads, 0, stream>>>(p.head_sums, static_cast<float*>(votes->untyped_data()),
                                                               keys, static_cast<int>(T), static_cast<int>(N / K));
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvWindowVotes, minikv::window_votes,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // lengths
                                  .Ret<xla::ffi::AnyBuffer>()  // votes
                                  .Ret<xla::ffi::AnyBuffer>()  // head_sums, scratch
                                  .Ret<xla::ffi::AnyBuffer>()  // row_log_sum_exp, scratch
                                  .Ret<xla::ffi::AnyBuffer>()  // split_log_sums, scratch
                                  .Attr<xla::ffi::Span<const int32_t>>("sizes")
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("power")
                                  .Attr<int32_t>("window"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
