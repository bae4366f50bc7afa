// Checks that every handler runs before it launches: each buffer's dtype and shape, with an error that names the wrong
// one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace minikv {

namespace ffi = xla::ffi;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : sizes) text << std::exchange(separator, ", ") << size;
  text << (sizes.size() ? "]" : "[]");
  return text.str();
}

// Collects the first fault; `error()` names the op and the value. Messages are built only for a fault, because handlers
// run for every token.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  void shape(const char* name, ffi::AnyBuffer buffer, std::initializer_list<int64_t> expected) {
    const auto dims = buffer.dimensions();
    if (!std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) {
      fault(name, " has shape ", shape_text(dims), ", expected ", shape_text(expected));
    }
  }

  void dtype(const char* name, ffi::AnyBuffer buffer, std::initializer_list<ffi::DataType> expected) {
    if (std::find(expected.begin(), expected.end(), buffer.element_type()) == expected.end()) {
      fault(name, " has an unsupported element type, XLA type number ", static_cast<int>(buffer.element_type()));
    }
  }

  void rank(const char* name, ffi::AnyBuffer buffer, size_t rank) {
    if (buffer.dimensions().size() != rank) {
      fault(name, " has shape ", shape_text(buffer.dimensions()), ", expected rank ", rank);
    }
  }

  // `parts`: of the text, in order.
  template <typename... Parts>
  void require(bool condition, const Parts&... parts) {
    if (!condition) fault(parts...);
  }

  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  template <typename... Parts>
  void fault(const Parts&... parts) {
    if (!ok()) return;
    std::ostringstream text;
    ((text << op_ << ": ") << ... << parts);
    message_ = text.str();
  }

  const char* op_;
  std::string message_;
};

inline ffi::Error cuda_status(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(op) + ": " + cudaGetErrorString(status));
}

// Properties of the current device that launches depend on. Queried once, because handlers run for every token.
struct Device {
  int ordinal, multiprocessors, shared_bytes_per_block, major;
};

inline Device current_device() {
  thread_local Device device{-1};
  int ordinal = 0;
  cudaGetDevice(&ordinal);
  if (ordinal != device.ordinal) {
    cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
    cudaDeviceGetAttribute(&device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal);
    device.ordinal = ordinal;
  }
  return device;
}

}  // namespace minikv
