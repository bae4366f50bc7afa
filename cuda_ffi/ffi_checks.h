// What every handler does before it launches: check each buffer's dtype and shape, and say which one is wrong.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace minikv {

namespace ffi = xla::ffi;

inline std::string shape_text(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Collects the first fault; `error()` names the op and the value.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  void shape(const char* name, ffi::AnyBuffer buffer, std::initializer_list<int64_t> expected) {
    auto dims = buffer.dimensions();
    bool same = dims.size() == expected.size();
    size_t i = 0;
    std::string text = "[";
    for (int64_t size : expected) {
      same = same && dims[i] == size;
      text += (i++ ? ", " : "") + std::to_string(size);
    }
    if (!same) fault(std::string(name) + " has shape " + shape_text(dims) + ", expected " + text + "]");
  }

  void dtype(const char* name, ffi::AnyBuffer buffer, std::initializer_list<ffi::DataType> expected) {
    for (ffi::DataType type : expected) {
      if (buffer.element_type() == type) return;
    }
    fault(std::string(name) + " has an unsupported element type, XLA type number " +
          std::to_string(static_cast<int>(buffer.element_type())));
  }

  void rank(const char* name, ffi::AnyBuffer buffer, size_t rank) {
    if (buffer.dimensions().size() != rank) {
      fault(std::string(name) + " has shape " + shape_text(buffer.dimensions()) + ", expected rank " +
            std::to_string(rank));
    }
  }

  void require(bool condition, const std::string& text) {
    if (!condition) fault(text);
  }

  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  void fault(const std::string& text) {
    if (message_.empty()) message_ = std::string(op_) + ": " + text;
  }

  const char* op_;
  std::string message_;
};

inline ffi::Error cuda_status(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(op) + ": " + cudaGetErrorString(status));
}

// What launches depend on, of the current device. Asked for once: handlers run for every token.
struct Device {
  int multiprocessors, shared_bytes_per_block, major;
};

inline Device current_device() {
  thread_local int known = -1;
  thread_local Device device{};
  int ordinal = 0;
  cudaGetDevice(&ordinal);
  if (ordinal != known) {
    cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
    cudaDeviceGetAttribute(&device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal);
    known = ordinal;
  }
  return device;
}

}  // namespace minikv
