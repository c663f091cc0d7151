// One vector layer for every CPU: `vf` holds LANES floats.
// AVX-512 and AVX2 use intrinsics where GCC's vector extensions have no word for the instruction;
// everything else (SSE2, NEON) goes through the extensions alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MOECC_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOECC_AVX2 1
#endif
#if defined(MOECC_AVX512) || defined(MOECC_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(MOECC_AVX512)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(MOECC_AVX2)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 16;
#endif
constexpr int LINE_BYTES = 64;  // a cache line: the unit of prefetch, and of a row's main loop

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

// Storage types of weights: float, and two 16-bit floats that are told apart by type.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Where the weights of a product begin, and the elements between rows that follow one another.
template <class Weight>
struct Rows { const Weight* begin; ptrdiff_t stride; };

template <class To, class From>
static INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
static INLINE Vector load_as(const void* at) {
  Vector value;
  memcpy(&value, at, sizeof value);  // one unaligned load
  return value;
}

// Hold a value in a register: without this, compilers read it from memory once for each use, and
// two loads a cycle become the limit instead of two multiplications.
template <class Vector>
static INLINE Vector keep(Vector value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

static INLINE vf splat(float value) { return value - vf{}; }
static INLINE vf load(const float* at) { return load_as<vf>(at); }
static INLINE void store(float* at, vf value) { memcpy(at, &value, sizeof value); }

// a * b + c, rounded once where the CPU can.
static INLINE vf fma(vf a, vf b, vf c) {
#if defined(MOECC_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(MOECC_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, always in the same order.
static INLINE float sum_lanes(vf value) {
#if defined(MOECC_AVX512)
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
#elif defined(MOECC_AVX2)
  __m256 eight = value;
#endif
#if defined(MOECC_AVX512) || defined(MOECC_AVX2)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}

static INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// LANES consecutive weights as floats.
static INLINE vf widen(const float* at) { return load(at); }

static INLINE vf widen(const bf16* at) {
  return bitcast<vf>(__builtin_convertvector(load_as<vh>(at), vu) << 16);
}

static INLINE vf widen(const fp16* at) {
#if defined(MOECC_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(MOECC_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  vu half = __builtin_convertvector(load_as<vh>(at), vu);
  vu magnitude = (half & 0x7fff) << 13;
  // Rebias the exponent by multiplying with 2^112, which also normalises subnormal halves.
  vf finite = bitcast<vf>(magnitude) * splat(0x1p112f);
  vu special = magnitude | 0x7f800000;  // inf and NaN keep their mantissa
  vu value = bitcast<vu>(select(bitcast<vi>(magnitude) >= 0x0f800000, bitcast<vf>(special), finite));
  return bitcast<vf>(value | (half & 0x8000) << 16);
#endif
}

// One weight as a float, and a float as a weight (to nearest, ties to even; NaN stays NaN).
static INLINE float widen1(float value) { return value; }
static INLINE float widen1(bf16 value) { return bitcast<float>(uint32_t(value.bits) << 16); }
static INLINE float widen1(fp16 value) {
  fp16 padded[LANES] = {value};
  return widen(padded)[0];
}

template <class Weight>
Weight narrow(float value);

template <>
INLINE float narrow<float>(float value) { return value; }

template <>
INLINE bf16 narrow<bf16>(float value) {
  uint32_t bits = bitcast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded)};
}

template <>
INLINE fp16 narrow<fp16>(float value) {
#if defined(MOECC_AVX512) || defined(MOECC_AVX2)
  return {uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits = bitcast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past 65504
  if (magnitude < 0x38800000) {  // subnormal half: let a float addition do the rounding
    float shifted = bitcast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bitcast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13)};
#endif
}
