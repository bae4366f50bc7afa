// The sum of one small array per device, in one exchange over peer memory: every device writes its array into all
// others' inboxes and adds up what it finds in its own. For decode steps, whose arrays of some kilobytes take NCCL
// several times as long.
//
// A value and the number of the call that it belongs to are written as one 8-byte word, so that a reader needs no fence
// and no second flag: it reads until the number is the present call's. Calls alternate between two inboxes. A device
// can only be one call ahead of another, which has then read all of the inbox that comes next.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "common/device.cuh"
#include "common/ffi_checks.h"

namespace minikv {
namespace {

constexpr const char* kOp = "all_reduce";
constexpr int kMaxDevices = 8;
constexpr int kThreads = 256;
constexpr int kMaxBlocks = 128;              // all of them run at once: they wait for one another
constexpr int64_t kMaxBytes = 2 << 20;       // of an array
constexpr int64_t kPackets = kMaxBytes / 8;  // 16-byte packets: two words of data, each with its call's number
constexpr unsigned long long kTimeoutNs = 60000000000;  // a device that does not answer is an error, not a hang

// What a device keeps: which call this is, and how many blocks have ended it.
struct Calls {
  uint32_t number, ended;
};

struct Group {
  uint4* inbox[kMaxDevices];  // of every device: [2, size, kPackets]
  Calls* calls[kMaxDevices];
  std::vector<int32_t> devices;
};

struct Exchange {
  uint4* inbox[kMaxDevices];
  Calls* calls;
  int rank, size;
};

__device__ __forceinline__ void write_packet(uint4* to, uint2 data, uint32_t number) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(data.x), "r"(number), "r"(data.y),
               "r"(number)
               : "memory");
}

__device__ __forceinline__ uint2 read_packet(const uint4* from, uint32_t number) {
  uint32_t x, first, y, second;
  unsigned long long begin = 0, now;
  while (true) {
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(first), "=r"(y), "=r"(second)
                 : "l"(from)
                 : "memory");
    if (first == number && second == number) return make_uint2(x, y);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (begin == 0) begin = now;
    if (now - begin > kTimeoutNs) __trap();
  }
}

// Adds 8 bytes of values to float sums.
template <typename T>
struct Values {
  static constexpr int kCount = 8 / sizeof(T);
  float sums[kCount] = {};

  __device__ void add(uint2 data) {
    T values[kCount];
    memcpy(values, &data, 8);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += static_cast<float>(values[i]);
  }

  __device__ uint2 rounded() const {
    T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<T>(sums[i]);
    uint2 data;
    memcpy(&data, values, 8);
    return data;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) all_reduce_kernel(const uint2* in, uint2* out, int packets, Exchange e) {
  const uint32_t number = e.calls->number + 1;
  const int64_t half = (number & 1) * e.size * kPackets;
  const int first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  for (int i = first; i < packets; i += step) {
    const uint2 own = in[i];
    for (int p = 0; p < e.size; ++p) {
      if (p != e.rank) write_packet(e.inbox[p] + half + e.rank * kPackets + i, own, number);
    }
  }
  for (int i = first; i < packets; i += step) {
    Values<T> values;  // added in one order on all devices, so that their sums are equal bit by bit
    for (int p = 0; p < e.size; ++p) {
      values.add(p == e.rank ? in[i] : read_packet(e.inbox[e.rank] + half + p * kPackets + i, number));
    }
    out[i] = values.rounded();
  }
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&e.calls->ended, 1) == gridDim.x - 1) {
    e.calls->ended = 0;
    e.calls->number = number;
  }
}

std::mutex groups_mutex;
std::map<std::vector<int32_t>, Group>& groups() {
  static std::map<std::vector<int32_t>, Group> all;
  return all;
}

// The status of letting `device` reach the memory of `peer`.
cudaError_t reach(int device, int peer) {
  int can = 0;
  cudaError_t status = cudaDeviceCanAccessPeer(&can, device, peer);
  if (status != cudaSuccess) return status;
  if (!can) return cudaErrorPeerAccessUnsupported;
  status = cudaDeviceEnablePeerAccess(peer, 0);
  if (status != cudaErrorPeerAccessAlreadyEnabled) return status;
  cudaGetLastError();
  return cudaSuccess;
}

cudaError_t make_group(Group& group) {
  const int size = static_cast<int>(group.devices.size());
  for (int rank = 0; rank < size; ++rank) {
    cudaError_t status = cudaSetDevice(group.devices[rank]);
    for (int peer = 0; peer < size && status == cudaSuccess; ++peer) {
      if (peer != rank) status = reach(group.devices[rank], group.devices[peer]);
    }
    const size_t inbox = 2 * size * kPackets * sizeof(uint4);
    if (status == cudaSuccess) status = cudaMalloc(&group.inbox[rank], inbox);
    if (status == cudaSuccess) status = cudaMemset(group.inbox[rank], 0, inbox);
    if (status == cudaSuccess) status = cudaMalloc(&group.calls[rank], sizeof(Calls));
    if (status == cudaSuccess) status = cudaMemset(group.calls[rank], 0, sizeof(Calls));
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T>
void launch(cudaStream_t stream, ffi::AnyBuffer in, ffi::AnyBuffer out, const Exchange& e) {
  const int packets = static_cast<int>(in.size_bytes() / 8);
  const int blocks = std::min((packets + kThreads - 1) / kThreads, kMaxBlocks);
  all_reduce_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<const uint2*>(in.untyped_data()),
                                                        static_cast<uint2*>(out.untyped_data()), packets, e);
}

}  // namespace

// `members`: the devices of all groups, `size` in each; the present device takes part in its own.
ffi::Error all_reduce(cudaStream_t stream, ffi::AnyBuffer in, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Span<const int32_t> members, int32_t size) {
  Checker check(kOp);
  check.dtype("in", in, {ffi::F32, ffi::F16, ffi::BF16});
  check.dtype("out", *out, {in.element_type()});
  check.require(in.size_bytes() == out->size_bytes(), "in has ", in.size_bytes(), " bytes, out ", out->size_bytes());
  check.require(in.size_bytes() % 8 == 0 && in.size_bytes() <= static_cast<size_t>(kMaxBytes), "an array of ",
                in.size_bytes(), " bytes, expected a multiple of 8 up to ", kMaxBytes);
  if (!check.ok()) return check.error();

  const int device = current_device().ordinal;
  const auto own = std::find(members.begin(), members.end(), device);
  check.require(own != members.end(), "device ", device, " is in no group");
  if (!check.ok()) return check.error();
  const auto rank = (own - members.begin()) % size;
  Exchange e{};
  {
    const std::lock_guard lock(groups_mutex);
    const auto group = groups().find(std::vector<int32_t>(own - rank, own - rank + size));
    check.require(group != groups().end(), "the group of device ", device, " was not made");
    if (!check.ok()) return check.error();
    std::copy_n(group->second.inbox, size, e.inbox);
    e.calls = group->second.calls[rank];
  }
  e.rank = static_cast<int>(rank), e.size = size;
  if (in.element_count() == 0) return ffi::Error::Success();
  if (in.element_type() == ffi::F32) {
    launch<float>(stream, in, *out, e);
  } else if (in.element_type() == ffi::F16) {
    launch<__half>(stream, in, *out, e);
  } else {
    launch<__nv_bfloat16>(stream, in, *out, e);
  }
  return cuda_status(kOp, cudaGetLastError());
}

}  // namespace minikv

// Lets devices exchange arrays. Returns "", or why they cannot. Not while any of them captures a graph.
extern "C" const char* minikv_make_group(const int32_t* devices, int32_t size) {
  using namespace minikv;
  thread_local std::string reason;
  if (size < 2 || size > kMaxDevices) {
    return (reason = std::to_string(size) + " devices, expected 2 to " + std::to_string(kMaxDevices)).c_str();
  }
  const std::lock_guard lock(groups_mutex);
  std::vector<int32_t> key(devices, devices + size);
  if (groups().count(key)) return "";
  int before = 0;
  cudaGetDevice(&before);
  Group group{{}, {}, key};
  const cudaError_t status = make_group(group);
  cudaSetDevice(before);
  if (status != cudaSuccess) return (reason = cudaGetErrorString(status)).c_str();
  groups().emplace(std::move(key), group);
  return "";
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MinikvAllReduce, minikv::all_reduce,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<xla::ffi::Span<const int32_t>>("members")
                                  .Attr<int32_t>("size"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
