// SPDX-License-Identifier: Apache-2.0
#include "limits.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xpu_fp4::cpu {
namespace {

#if defined(__x86_64__)

constexpr int kOpsPerMultiplyAdd = 2;

// ---- AVX-512 VNNI. Each loop has more independent sums than ports times latency, so that ports are the limit. ----

bool has_avx512_vnni() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"); }

[[gnu::target("avx512bw,avx512vnni")]] int64_t run_avx512_vnni(int64_t iterations) {
  constexpr int kSums = 16;
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  __m512i sums[kSums] = {};
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[s]) : "v"(a), "v"(b));
  }
  return iterations * kSums * 64 * kOpsPerMultiplyAdd;
}

// ---- AVX-VNNI ----

[[gnu::target("avx2")]] int64_t run_avx_vnni(int64_t iterations) {
  constexpr int kSums = 12;
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
  __m256i sums[kSums] = {};
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[s]) : "x"(a), "x"(b));
  }
  return iterations * kSums * 32 * kOpsPerMultiplyAdd;
}

// ---- AVX2: a block's sum of products fits 16 bits, so vpmaddubsw and one 16-bit addition are enough ----

bool has_avx2() { return __builtin_cpu_supports("avx2"); }

[[gnu::target("avx2")]] int64_t run_avx2(int64_t iterations) {
  constexpr int kSums = 10;
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
  __m256i sums[kSums] = {};
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 10
    for (int s = 0; s < kSums; ++s) {
      __m256i pairs;
      asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums[s]), "=&x"(pairs) : "x"(a), "x"(b));
    }
  }
  return iterations * kSums * 32 * kOpsPerMultiplyAdd;
}

// ---- AMX: four sums of 16 x 16 from two tiles of each operand ----

constexpr int kTileRows = 16, kTileRowBytes = 64;

/// The operand of ldtilecfg (Intel's manual, volume 1, 18.3).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Constants, because GCC takes a local's stores for dead that only these instructions read.
constexpr TileConfig kAllTiles = [] {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = kTileRows;
    config.row_bytes[tile] = kTileRowBytes;
  }
  return config;
}();
alignas(64) constexpr std::array<uint8_t, kTileRows * kTileRowBytes> kOnes = [] {
  std::array<uint8_t, kTileRows * kTileRowBytes> ones{};
  for (uint8_t& one : ones) one = 1;
  return ones;
}();

constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // CPUID leaf 7, EDX

template <unsigned kFeature>
bool has_amx() {
  static const bool has = [] {
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kFeature) == 0) return false;
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return has;
}

// Calls products() so many times, between tiles of bytes that are one, and restores the kernels' configuration.
template <class Products>
[[gnu::target("amx-tile,amx-int8,amx-bf16"), gnu::always_inline]] inline void run_amx(int64_t iterations,
                                                                                      const Products& products) {
  TileConfig previous = {};
  _tile_storeconfig(&previous);  // of the kernels, which configure a thread once
  _tile_loadconfig(&kAllTiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, kOnes.data(), kTileRowBytes);
  _tile_loadd(5, kOnes.data(), kTileRowBytes);
  _tile_loadd(6, kOnes.data(), kTileRowBytes);
  _tile_loadd(7, kOnes.data(), kTileRowBytes);
  for (int64_t i = 0; i < iterations; ++i) products();
  if (previous.palette == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(&previous);
  }
}

[[gnu::target("amx-tile,amx-int8,amx-bf16")]] int64_t run_amx_int8(int64_t iterations) {
  run_amx(iterations, []() __attribute__((target("amx-tile,amx-int8,amx-bf16"), always_inline)) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  });
  return iterations * 4 * kTileRows * kTileRows * kTileRowBytes * kOpsPerMultiplyAdd;
}

[[gnu::target("amx-tile,amx-int8,amx-bf16")]] int64_t run_amx_bf16(int64_t iterations) {
  run_amx(iterations, []() __attribute__((target("amx-tile,amx-int8,amx-bf16"), always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
  return iterations * 4 * kTileRows * kTileRows * (kTileRowBytes / 2) * kOpsPerMultiplyAdd;
}

#define XPU_FP4_VECTOR_CLONES [[gnu::target_clones("avx512f", "avx2", "default")]]
#else
#define XPU_FP4_VECTOR_CLONES
#endif

}  // namespace

const std::vector<ComputeLimit>& compute_limits() {
  static const std::vector<ComputeLimit> limits = {
#if defined(__x86_64__)
      {"tdpbusd", has_amx<kInt8>, run_amx_int8},
      {"tdpbf16ps", has_amx<kBf16>, run_amx_bf16},
      {"vpdpbusd", has_avx512_vnni, run_avx512_vnni},
      {"vpdpbusd-256", kAvxVnni.supported, run_avx_vnni},
      {"vpmaddubsw", has_avx2, run_avx2},
#endif
  };
  return limits;
}

// Four streams, each prefetched: one alone leaves a third of the bandwidth unused (measured on two cores of a Xeon).
XPU_FP4_VECTOR_CLONES uint64_t read_once(const std::byte* data, size_t n) {
  using Line = uint64_t __attribute__((vector_size(64), aligned(1)));
  constexpr size_t kStreams = 4, kAhead = 1024;
  const size_t part = n / kStreams / sizeof(Line) * sizeof(Line);
  Line sums[kStreams] = {};
  for (size_t i = 0; i < part; i += sizeof(Line)) {
#pragma GCC unroll 4
    for (size_t s = 0; s < kStreams; ++s) {
      const std::byte* at = data + s * part + i;
      __builtin_prefetch(at + kAhead);
      sums[s] ^= *reinterpret_cast<const Line*>(at);
    }
  }
  uint64_t sum = 0;
  for (const Line& line : sums) {
    for (size_t i = 0; i < sizeof(Line) / sizeof(uint64_t); ++i) sum ^= line[i];
  }
  for (size_t i = kStreams * part; i < n; ++i) sum ^= static_cast<uint64_t>(data[i]) << i % 8 * 8;
  return sum;
}

uint64_t read_and_write(const std::byte* from, size_t read, std::byte* to, size_t written) {
  // Small enough that reads and writes mix.
  const size_t pieces = std::max(read, written) / (64 * 1024) + 1;
  const auto share = [pieces](size_t n, size_t piece) { return n / pieces * piece + n % pieces * piece / pieces; };
  uint64_t sum = 0;
  for (size_t piece = 0; piece < pieces; ++piece) {
    const size_t source = share(read, piece), source_size = share(read, piece + 1) - source;
    const size_t target = share(written, piece), target_size = share(written, piece + 1) - target;
    const size_t copied = std::min(source_size, target_size);
    std::memcpy(to + target, from + source, copied);
    sum ^= read_once(from + source + copied, source_size - copied);
    std::memset(to + target + copied, 0, target_size - copied);
  }
  return sum;
}

}  // namespace xpu_fp4::cpu
