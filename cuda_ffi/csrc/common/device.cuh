// Instructions the kernels share: tensor-core products, asynchronous copies, and the arithmetic on packed codes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace minikv {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Stands for minus infinity in the softmax: finite, so that the difference of two of them is not NaN.
constexpr float kMasked = -1e30f;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Tensor cores: m16n8k16, float32 accumulation. Lane = 4 * row + quad.
// a0 = A[row][2 quad, +1], a1 = A[row + 8][same], a2 = A[row][2 quad + 8, +9], a3 = A[row + 8][same];
// b0 = B[2 quad, +1][row], b1 = B[2 quad + 8, +9][row]; c0, c1 = C[row][2 quad, +1], c2, c3 = C[row + 8][same].

__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// 8x8 matrix of 16-bit values: the lane that gave M[row][2 quad, +1] gets M[2 quad, +1][row].
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// ---- Half pairs.

__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t half2_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ uint32_t bfloat2_to_half2(uint32_t x) {
  return pack_half2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u));
}

// Two float8_e4m3fn in the high bytes of two halves -> the half pair 2**-8 times their value (exact, subnormals too).
__device__ __forceinline__ uint32_t float8x2_to_half2_scaled(uint32_t x) {
  return (x & 0x80008000u) | ((x & 0x7F007F00u) >> 1);
}

// The same times `factor`, which carries the missing 2**8, in float32: a factor rounded to half would shift a whole
// block.
__device__ __forceinline__ uint32_t scaled_float8(uint32_t x, float factor) {
  const uint32_t pair = float8x2_to_half2_scaled(x);
  const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return pack_half2(v.x * factor, v.y * factor);
}

__device__ __forceinline__ uint32_t rotate_left(uint32_t x, int bits) { return __funnelshift_l(x, x, bits); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Hides where a value comes from, so that the compiler does not compute dependent values early and hold them in
// registers.
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

// Index of the thread in its block, and number of threads in the block, read anew instead of held in registers.
__device__ __forceinline__ int2 read_thread() {
  int2 x;
  asm volatile("mov.u32 %0, %%tid.x;\nmov.u32 %1, %%ntid.x;" : "=r"(x.x), "=r"(x.y));
  return x;
}

// a / b for a >= 0, b > 0 and a quotient below 2**22: an estimate, corrected, because an integer division is a long
// chain.
__device__ __forceinline__ int quick_divide(int a, int b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(static_cast<float>(b)));
  const int quotient = static_cast<int>(a * reciprocal), rest = a - quotient * b;
  return quotient + (rest >= b ? 1 : rest < 0 ? -1 : 0);
}

// ---- Codes to half pairs: a code under the mantissa of a power of two is `offset + code`, no conversion needed.

// Slots are the 16 / Bits codes in each 16-bit half of a word. They are taken one after the other, the `N`-th from bits
// 2 to 9 of both halves of a word turned for it (`SlotOrder`): under an offset of at most 256, so that `offset * scale`
// stays finite for scales up to 255.
template <int Bits, int N>
struct CodeSlot {
  static constexpr int kSlots = 16 / Bits;
  static constexpr int kBit = 2 + Bits * (N % (kSlots / 2));
  static constexpr uint32_t kMask = (((1u << Bits) - 1u) << kBit) * 0x00010001u;
  static constexpr uint32_t kOffset = (0x6400u - (kBit << 10)) * 0x00010001u;
  static constexpr uint32_t kMinusOffset = kOffset | 0x80008000u;
};

// How a warp rotates a word if `Shares` warps take its slots. Rotated left by 2, the first half of the slots is at bits
// 2 to 9; by 24 more, the second half. A whole word of 2 bits has slots 1 to 4 there without rotation, and 5, 6, 7 and
// 0 with the bytes of each half swapped: one instruction instead of two.
template <int Bits, int Shares>
struct SlotOrder {
  static constexpr bool kByBytes = Bits == 2 && Shares == 1;

  __host__ __device__ static constexpr int slot(int n) { return kByBytes ? (n + 1) % 8 : n; }

  // The word for slot number `N`, from the one for the slot before or, at first, as it is stored.
  template <int N>
  __device__ __forceinline__ static uint32_t turn(uint32_t word, int share) {
    if constexpr (N == 8 / Bits) return kByBytes ? __byte_perm(word, 0, 0x2301) : rotate_left(word, 24);
    if constexpr (N == 0 && !kByBytes) return rotate_left(word, 2 - share * (16 / Shares));
    return word;
  }
};

// `(word & mask) | offset` for a word turned for slot number `N`.
template <int Bits, int N>
__device__ __forceinline__ uint32_t offset_code(uint32_t turned_word) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
      : "=r"(d)
      : "r"(turned_word), "n"(CodeSlot<Bits, N>::kMask), "r"(CodeSlot<Bits, N>::kOffset));
  return d;
}

// ---- Asynchronous copies into shared memory, completing on an mbarrier.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nwait%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end%=;\n"
      "bra wait%=;\nend%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\nwait%=: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end%=;\n"
      "bra wait%=;\nend%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// ---- Programmatic dependent launch: blocks of the next launch may take the room this one leaves, and wait in
// `wait_for_launch_before` until all of this one is done and in memory. Nothing global is read or written before that.

__device__ __forceinline__ void release_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Data of these copies are read once per launch, so they are marked as the first to leave the L2. The word is the
// policy that `createpolicy.fractional.L2::evict_first` makes for every line.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;

__device__ __forceinline__ void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a three-dimensional tensor map: {byte in span, row, span}.
__device__ __forceinline__ void tensor_copy(uint32_t destination, const CUtensorMap* map, int row, int span,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(span), "l"(kEvictFirst)
      : "memory");
}
#endif

// 16 bytes per lane; `valid` false writes zeros instead.
__device__ __forceinline__ void async_copy_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void async_copy_4(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void async_copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void async_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Arrives on the barrier once every async_copy_16 this lane has issued is done.
__device__ __forceinline__ void async_copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- Shared-memory tiles: rows of bytes cut into spans of at most 128 bytes, span-major, with the 16-byte chunks of a
// row permuted by row so that equal columns of neighbouring rows fall into different banks. This is what the tensor-map
// swizzle modes write; `kRows` is a multiple of 8 and the tile starts at a multiple of 1024 bytes.
template <int RowBytes, int Rows>
struct SwizzledTile {
  static constexpr int kSpan = RowBytes % 128 == 0 ? 128 : RowBytes % 64 == 0 ? 64 : RowBytes % 32 == 0 ? 32 : 16;
  static constexpr int kSpans = RowBytes / kSpan;
  static constexpr int kRows = Rows;
  static constexpr int kRowBytes = RowBytes;
  static constexpr int kBytes = RowBytes * Rows;
  static_assert(Rows % 8 == 0);

  // Where byte `byte` of row `row` lies.
  __device__ __forceinline__ static uint32_t offset(uint32_t row, uint32_t byte) {
    const uint32_t mix = row / (128 / kSpan) % (kSpan / 16) * 16;
    return byte / kSpan * (Rows * kSpan) + row * kSpan + (byte % kSpan ^ mix);
  }

  // Where the byte `further` behind the one at `at` lies, in its row; its place in the row and `further` share no bit.
  __device__ __forceinline__ static uint32_t along(uint32_t at, uint32_t further) {
    return (at ^ further % kSpan) + further / kSpan * (Rows * kSpan);
  }
};

__host__ __device__ constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

}  // namespace minikv
