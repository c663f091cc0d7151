// Products with 8-bit floats (e4m3): codes are widened to float, inputs stay float.
//
// Weights lie in the panels of quantized.h. A token's sums take their terms in ascending order, one
// rounding each, and are scaled once a BLOCK, so they do not depend on which other tokens share the
// tile.
#pragma once

#include "quantized.h"

// One scale for all 16 rows of a panel.
struct OneFloat {
  static constexpr int BYTES = 4;
  static INLINE vf read(const uint8_t* at, int) { return splat(load_as<float>(at)); }
};

template <class Scale, bool PER_ROW, int BLOCK, int ROWS>
struct Floating {
  using Input = float;
  static constexpr int LENGTH = BLOCK;
  static constexpr int UNITS = BLOCK;
  static constexpr int PANEL = ROWS;
  static constexpr int TILE_TOKENS = REGISTERS == 32 ? 8 : 4;

  static INLINE void pack(const float* line, Input* packed) {
    memcpy(packed, line, BLOCK * sizeof(float));
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
        int count = tokens - t >= TILE_TOKENS ? TILE_TOKENS : tokens - t >= 4 ? 4 : tokens - t;
        auto tile = count == 8   ? &Floating::tile<8>
                    : count == 4 ? &Floating::tile<4>
                    : count == 3 ? &Floating::tile<3>
                    : count == 2 ? &Floating::tile<2>
                                 : &Floating::tile<1>;
        tile(panel, after, blocks, x + t, out + t * width + row, width);
        t += count;
        after = panel;  // fetched: what follows reads what is there
      }
    }
  }

 private:
  // Column `c` of the four in each lane. A float's exponent has 120 more than e4m3's, and
  // multiplying by 2^120 adds them for subnormal codes too.
  static INLINE vf widen_code(vi codes, int c) {
    vi size = (c < 3 ? codes << (20 - 8 * c) : vi(vu(codes) >> 4)) & 0x07f00000;
    vi sign = codes << (24 - 8 * c) & int32_t(0x80000000);
    return bitcast<vf>(size | sign) * splat(0x1p120f);
  }

  template <int TOKENS>
  static void tile(const uint8_t* panel, const uint8_t* after, int64_t blocks, const Input* const* x,
                   float* out, int width) {
    const uint8_t* scale = panel;
    const uint8_t* line = panel + (Scale::BYTES * (PER_ROW ? 1 : blocks) + 63) / 64 * 64;
    ptrdiff_t ahead = after - panel;
    vf sums[TOKENS][VECTORS] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      vf terms[TOKENS][VECTORS] = {};
      for (int column = 0; column < BLOCK; column += 4, line += 64) {
        __builtin_prefetch(line + ahead, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          vi codes = load_as<vi>(line + v * 4 * LANES);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            vf weight = keep(widen_code(codes, c));
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
              terms[t][v] = fma(splat(x[t][b * BLOCK + column + c]), weight, terms[t][v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        vf one = Scale::read(scale, v);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) sums[t][v] = fma(terms[t][v], one, sums[t][v]);
      }
      if (!PER_ROW) scale += Scale::BYTES;
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(out + t * width + v * LANES, sums[t][v]);
  }
};
