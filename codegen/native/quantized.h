// Products with low-bit weights: integer dot products with activations in 8 bits.
//
// Weights lie in panels of 16 rows (moecc/runtime/schemes/packing.py writes them). A line of 64 bytes holds
// four columns of all 16 rows, eight or sixteen when codes have four bits or less, so a vector of sums
// belongs to as many rows and nothing is added up across lanes. Activations are quantized once for
// each BLOCK of a token's row. Integer sums are exact and blocks follow one another in ascending
// order, so a token's result does not depend on which other tokens share the tile.
#pragma once

#include "vec.h"

#include <algorithm>

constexpr int PANEL_ROWS = 16;
constexpr int VECTORS = PANEL_ROWS / LANES;  // of the rows of a panel

// Sums of products of bytes. `Sums` may be narrower than 32 bits for the eight steps of 32 columns.
#if defined(__AVX512VNNI__) && defined(MOECC_AVX512)
#define MOECC_VNNI 1
static INLINE vi dot(vi sums, vi codes, int32_t x) {
  return vi(_mm512_dpbusd_epi32(__m512i(sums), __m512i(codes), _mm512_set1_epi32(x)));
}
#elif defined(__AVXVNNI__) && defined(MOECC_AVX2)
#define MOECC_VNNI 1
static INLINE vi dot(vi sums, vi codes, int32_t x) {
  return vi(_mm256_dpbusd_avx_epi32(__m256i(sums), __m256i(codes), _mm256_set1_epi32(x)));
}
#elif defined(MOECC_AVX2)
// Codes below 32: eight products of two fit into 16 bits.
static INLINE vi dot16(vi sums, vi codes, int32_t x) {
  __m256i pairs = _mm256_maddubs_epi16(__m256i(codes), _mm256_set1_epi32(x));
  return vi(_mm256_add_epi16(__m256i(sums), pairs));
}
static INLINE vi fold16(vi sums) {
  return vi(_mm256_madd_epi16(__m256i(sums), _mm256_set1_epi16(1)));
}
// Signed codes in words of 16 bits: two columns a step, and no product too large for them.
static INLINE vi dot_words(vi sums, vi codes, int32_t x) {
  return sums + vi(_mm256_madd_epi16(__m256i(codes), _mm256_set1_epi32(x)));
}
#endif
// One step for any CPU: four bytes of a lane at a time.
template <bool SIGNED>
static INLINE vi dot_plainly(vi sums, vi codes, int32_t x) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    vi high = codes << (24 - 8 * i);
    vi code = SIGNED ? high >> 24 : vi(vu(high) >> 24);
    sums += code * int32_t(int8_t(x >> 8 * i));
  }
  return sums;
}

// How codes become factors, and what they stand for: (factor - OFFSET) * scale. A step multiplies four
// bytes of each lane by as many inputs, or two words.
template <bool WHOLE_ROWS>
struct Int8 {
  static constexpr int COLUMNS = 4;  // of a line
  static constexpr bool ZEROS = false, POINTS = false;
  static constexpr bool PER_ROW = WHOLE_ROWS, HIGH_LINE = false, FOLDS = false;
#if defined(MOECC_VNNI)
  using Input = int8_t;
  static constexpr int OFFSET = 128;
  static INLINE vi factors(vi line, int) { return line ^ int32_t(0x80808080); }
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot(sums, codes, x); }
#elif defined(MOECC_AVX2)
  using Input = int16_t;
  static constexpr int OFFSET = 0;
  static INLINE vi factors(vi line, int odd) {  // columns 0 and 2 of each four, or 1 and 3
    __m256i words = __m256i(line);
    return vi(_mm256_srai_epi16(odd ? words : _mm256_slli_epi16(words, 8), 8));
  }
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot_words(sums, codes, x); }
#else
  using Input = int8_t;
  static constexpr int OFFSET = 0;
  static INLINE vi factors(vi line, int) { return line; }
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot_plainly<true>(sums, codes, x); }
#endif
};

// Codes below 32, `BITS` of them in each byte of a line (of 3-bit codes the lower two: the third of 32
// columns have a line of their own).
template <int BITS>
struct Narrow {
  using Input = int8_t;
  static constexpr int LOW = BITS == 3 ? 2 : BITS;
  static constexpr int COLUMNS = 4 * 8 / LOW;
  static constexpr bool PER_ROW = false, HIGH_LINE = BITS == 3;
  static INLINE vi low(vi line, int part) {
    return (part ? line >> LOW * part : line) & (LOW == 4 ? 0x0f0f0f0f : 0x03030303);
  }
#if defined(MOECC_VNNI)
  static constexpr bool FOLDS = false;
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot(sums, codes, x); }
#elif defined(MOECC_AVX2)
  static constexpr bool FOLDS = true;  // sums of 32 columns are kept in 16 bits
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot16(sums, codes, x); }
#else
  static constexpr bool FOLDS = false;
  static INLINE vi step(vi sums, vi codes, int32_t x) { return dot_plainly<false>(sums, codes, x); }
#endif
};

// With ZEROS each group has the weight of code 0, with POINTS the code of weight 0, else the code in
// the middle is 0.
template <int BITS, bool HAS_ZEROS, bool HAS_POINTS = false>
struct Grouped : Narrow<BITS> {
  static constexpr bool ZEROS = HAS_ZEROS, POINTS = HAS_POINTS;
  static constexpr int OFFSET = ZEROS ? 0 : 1 << (BITS - 1);
  static INLINE vi factors(vi line, int part) { return Narrow<BITS>::low(line, part); }
};

struct Mxfp4 : Narrow<4> {  // e2m1: sign and one of eight magnitudes, doubled to be whole
  static constexpr bool ZEROS = false, POINTS = false;
  static constexpr int OFFSET = 12;
  static INLINE vi factors(vi line, int part) {
    vi codes = low(line, part);
#if defined(MOECC_AVX512)
    const __m128i four = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return vi(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(four), __m512i(codes)));
#elif defined(MOECC_AVX2)
    const __m128i four = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return vi(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), __m256i(codes)));
#else
    static const uint8_t values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    uint8_t each[4 * LANES];
    memcpy(each, &codes, sizeof each);
    for (uint8_t& code : each) code = values[code];
    return load_as<vi>(each);
#endif
  }
};

// How the scales of 16 rows are stored.
struct Floats {
  static constexpr int BYTES = 64;
  static INLINE vf read(const uint8_t* at, int v) {
    return load_as<vf>(at + v * LANES * sizeof(float));
  }
};
struct Halves {
  static constexpr int BYTES = 32;
  static INLINE vf read(const uint8_t* at, int v) {
    return widen(reinterpret_cast<const fp16*>(at) + v * LANES);
  }
};
struct Powers {  // e8m0; halved, because magnitudes are doubled
  static constexpr int BYTES = 16;
  static INLINE vf read(const uint8_t* at, int v) {
#if defined(MOECC_AVX512)
    vi exponent = vi(_mm512_cvtepu8_epi32(load_as<__m128i>(at)));
#elif defined(MOECC_AVX2)
    vi exponent = vi(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + v * LANES))));
#else
    vi exponent;
    for (int i = 0; i < LANES; ++i) exponent[i] = at[v * LANES + i];
#endif
    return bitcast<vf>(exponent << 23) * splat(0.5f);
  }
};

// BLOCK columns share an activation's scale, and a weight's unless rows have one each.
template <class Code, class Scale, int BLOCK, int ROWS>
struct Quantized {
  using Input = typename Code::Input;
  struct Header { float scale; int32_t sum; };  // before the BLOCK values of a line
  static constexpr int LENGTH = BLOCK;
  static constexpr int HEAD = int(sizeof(Header) / sizeof(Input)), UNITS = HEAD + BLOCK;
  static constexpr int STEP = int(4 / sizeof(Input));  // columns
  static constexpr int PANEL = ROWS;
  static constexpr int TILE_TOKENS = REGISTERS == 32 ? 8 : VECTORS == 2 ? 6 : 4;
  static_assert(BLOCK % 32 == 0 && ROWS % PANEL_ROWS == 0);

  static INLINE void pack(const float* line, Input* packed) {
    int32_t size = 0;  // the largest: bits of positive floats are in their order, those of NaN last
    for (int i = 0; i < BLOCK; ++i)
      size = std::max(size, bitcast<int32_t>(line[i]) & 0x7fffffff);
    bool finite = size < 0x7f800000;
    float most = bitcast<float>(size), inverse = finite && most > 0 ? 127 / most : 0;
    Header header = {finite ? most / 127 : __builtin_nanf(""), 0};
    int32_t values[BLOCK] = {};
    for (int i = 0; finite && i < BLOCK; ++i) values[i] = int(__builtin_nearbyintf(line[i] * inverse));
    for (int i = 0; i < BLOCK; ++i) header.sum += values[i];
    for (int i = 0; i < BLOCK; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) packed[HEAD + i + place(j)] = Input(values[i + j]);
    memcpy(packed, &header, sizeof header);
  }

  // `stride` is that of a panel of 16 rows, in bytes.
  static Rows<uint8_t> at(const uint8_t* expert, ptrdiff_t stride, int64_t row) {
    return {expert + row / PANEL_ROWS * stride, stride};
  }

  // out[t * width + r] = x[t] . weights[r] for `rows` rows. `next` are the rows that will be
  // multiplied after these; the panel after each is fetched into L2 meanwhile.
  static void product(Rows<uint8_t> weights, int rows, Rows<uint8_t> next, const Input* const* x,
                      int tokens, int64_t length, float* out, int width) {
    int64_t blocks = (length + BLOCK - 1) / BLOCK;
    for (int row = 0; row < rows; row += PANEL_ROWS) {
      const uint8_t* panel = weights.begin + row / PANEL_ROWS * weights.stride;
      const uint8_t* after = row + PANEL_ROWS < rows ? panel + weights.stride : next.begin;
      for (int t = 0; t < tokens;) {
        int count = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
        auto tile = count >= 8   ? &Quantized::tile<8>
                    : count == 7 ? &Quantized::tile<7>
                    : count == 6 ? &Quantized::tile<6>
                    : count == 5 ? &Quantized::tile<5>
                    : count == 4 ? &Quantized::tile<4>
                    : count == 3 ? &Quantized::tile<3>
                    : count == 2 ? &Quantized::tile<2>
                                 : &Quantized::tile<1>;
        tile(panel, after, blocks, x + t, out + t * width + row, width);
        t += count;
        after = panel;  // fetched: what follows reads what is there
      }
    }
  }

 private:
  static Header header(const Input* line) { return load_as<Header>(line); }
  // Where the input of a column of four lies: words are in the order 0, 2, 1, 3.
  static constexpr int place(int i) { return STEP == 4 ? i : (i & 1) << 1 | i >> 1; }

  template <int TOKENS>
  static void tile(const uint8_t* panel, const uint8_t* after, int64_t blocks, const Input* const* x, float* out,
                   int width) {
    constexpr int scales = Scale::BYTES * (Code::ZEROS ? 2 : 1);
    const uint8_t* scale = panel;
    const uint8_t* line = panel + scales * (Code::PER_ROW ? 1 : blocks);
    line = panel + (line - panel + 63) / 64 * 64;
    ptrdiff_t ahead = after - panel;
    vf sums[TOKENS][VECTORS] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const Input* inputs[TOKENS];
      vi whole[TOKENS][VECTORS];
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        inputs[t] = x[t] + b * UNITS;
        int32_t start = Code::OFFSET ? -Code::OFFSET * header(inputs[t]).sum : 0;
        inputs[t] += HEAD;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) whole[t][v] = start - vi{};
      }
      for (int part = 0; part < BLOCK; part += 32) {
        vi narrow[TOKENS][VECTORS] = {};
        vi(&into)[TOKENS][VECTORS] = Code::FOLDS ? narrow : whole;
        const uint8_t* high = line + 64 * (32 / Code::COLUMNS);
#pragma GCC unroll 8
        for (int column = 0; column < 32; column += Code::COLUMNS, line += 64) {
          __builtin_prefetch(line + ahead, 0, 2);
          steps<TOKENS>(into, line, high, inputs, part, column);
        }
        if (Code::HIGH_LINE) {
          __builtin_prefetch(line + ahead, 0, 2);
          line += 64;
        }
        if constexpr (Code::FOLDS) {
#pragma GCC unroll 8
          for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) whole[t][v] += fold16(narrow[t][v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        vf one = Scale::read(scale, v);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
          Header head = header(inputs[t] - HEAD);
          vf value = __builtin_convertvector(whole[t][v], vf);
          sums[t][v] = fma(value, one * splat(head.scale), sums[t][v]);
          if (Code::ZEROS) {
            vf zero = Scale::read(scale + Scale::BYTES, v);
            if (Code::POINTS) zero = -zero * one;
            sums[t][v] = fma(zero, splat(head.scale * float(head.sum)), sums[t][v]);
          }
        }
      }
      __builtin_prefetch(scale + ahead, 0, 2);
      if (!Code::PER_ROW) scale += scales;
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(out + t * width + v * LANES, sums[t][v]);
  }

  // Sums are kept where they are: compilers would rather store products and add them up later.
  template <int TOKENS>
  static INLINE void steps(vi (&sums)[TOKENS][VECTORS], const uint8_t* line, const uint8_t* high,
                           const Input* const* x, int part, int column) {
#pragma GCC unroll 4
    for (int i = 0; i < Code::COLUMNS / STEP; ++i) {
      vi factors[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        factors[v] = Code::factors(load_as<vi>(line + v * 4 * LANES), i);
        if constexpr (Code::HIGH_LINE) {
          vi thirds = load_as<vi>(high + v * 4 * LANES) >> (column / 4 + i);
          factors[v] |= (thirds & 0x01010101) << 2;
        }
        factors[v] = keep(factors[v]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        int32_t inputs = load_as<int32_t>(x[t] + part + column + STEP * i);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          sums[t][v] = keep(Code::step(sums[t][v], factors[v], inputs));
      }
    }
  }
};
