// Products with weights that are stored input-major (GPT-OSS): outputs lie next to each other.
//
// Sums of a strip of outputs stay in L1 while blocks of DEPTH weight rows pass by, so each row is
// read in pieces of a kilobyte rather than a cache line. Each (token, output) sum takes its terms
// in ascending order, one rounding each, whatever the blocking.
#pragma once

#include "vec.h"

template <class Weight>
struct Axpy {
  using Input = float;
  static constexpr int LENGTH = 16;  // inputs are padded with zeros to whole blocks of this
  static constexpr int UNITS = LENGTH;   // inputs that a packed line takes
  static constexpr int PANEL = 256;  // outputs a task
  static constexpr int DEPTH = 32;   // weight rows a block
  static constexpr int TILE_TOKENS = REGISTERS == 32 ? 6 : 4;
  static constexpr int VECTORS = REGISTERS == 32 ? 4 : 2;

  static INLINE void pack(const float* line, float* packed) {
    memcpy(packed, line, LENGTH * sizeof(float));
  }

  static Rows<Weight> at(const Weight* expert, ptrdiff_t stride, int64_t output) {
    return {expert + output, stride};
  }

  // out[t * width + n] = sum_k x[t][k] * weights[k][n] for `outputs` outputs.
  // `next` are the weights that will be multiplied after these.
  static void product(Rows<Weight> weights, int outputs, Rows<Weight> next, const Input* const* x,
                      int tokens, int64_t length, float* out, int width) {
    for (int t = 0; t < tokens; ++t)
      for (int n = 0; n < outputs; n += LANES) store(out + t * width + n, vf{});
    for (int64_t k = 0; k < length; k += DEPTH) {
      int depth = length - k < DEPTH ? int(length - k) : DEPTH;
      const Weight* w = weights.begin + k * weights.stride;
      Rows<Weight> after = next;
      if (k + DEPTH < length) after = {w + DEPTH * weights.stride, weights.stride};
      Fetch fetch = {after.begin, after.stride, outputs, 0};
      for (int t = 0; t < tokens;) {
        int count = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
        auto strip = count == 1   ? &Axpy::strip<1>
                     : count == 2 ? &Axpy::strip<2>
                     : count == 3 ? &Axpy::strip<3>
                     : count == 4 ? &Axpy::strip<4>
                     : count == 5 ? &Axpy::strip<5>
                                  : &Axpy::strip<6>;
        strip(w, weights.stride, outputs, x + t, k, depth, fetch, out + t * width, width);
        fetch.pause();
        t += count;
      }
    }
  }

 private:
  // Reads the next block ahead, row after row: one stream, not one for each row of the block.
  struct Fetch {
    const Weight* row;
    ptrdiff_t stride;
    int outputs, along;
    int pace = 1;  // 0 once the first tokens have read the block ahead

    template <int WIDE>
    INLINE void step() {
      constexpr int line = LINE_BYTES / sizeof(Weight), span = WIDE * LANES;
#pragma GCC unroll 8
      for (int n = 0; n < span; n += line) __builtin_prefetch(row + along + n, 0, 2);
      along += span * pace;
      if (along >= outputs) along = 0, row += stride;
    }
    void pause() { pace = 0; }
  };

  template <int TOKENS>
  static void strip(const Weight* w, ptrdiff_t stride, int outputs, const Input* const* x,
                    int64_t k, int depth, Fetch& fetch, float* out, int width) {
    int n = 0;
    for (; n + VECTORS * LANES <= outputs; n += VECTORS * LANES)
      tile<TOKENS, VECTORS>(w + n, stride, x, k, depth, fetch, out + n, width);
    for (; n + LANES <= outputs; n += LANES)
      tile<TOKENS, 1>(w + n, stride, x, k, depth, fetch, out + n, width);
    if (n < outputs) {  // the last, short vector: never read past a row
      Weight last[DEPTH * LANES] = {};
      for (int d = 0; d < depth; ++d)
        memcpy(last + d * LANES, w + d * stride + n, (outputs - n) * sizeof(Weight));
      tile<TOKENS, 1>(last, LANES, x, k, depth, fetch, out + n, width);
    }
  }

  template <int TOKENS, int WIDE>
  static void tile(const Weight* w, ptrdiff_t stride, const Input* const* x, int64_t k, int depth,
                   Fetch& fetch, float* out, int width) {
    vf sums[TOKENS][WIDE];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < WIDE; ++v) sums[t][v] = load(out + t * width + v * LANES);
    const Input* inputs[TOKENS];
    for (int t = 0; t < TOKENS; ++t) inputs[t] = x[t] + k;
    Fetch ahead = fetch;  // in registers
    for (int d = 0; d < depth; ++d) {
      const Weight* row = w + d * stride;
      ahead.template step<WIDE>();
      vf weights[WIDE];
#pragma GCC unroll 8
      for (int v = 0; v < WIDE; ++v) weights[v] = keep(widen(row + v * LANES));
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        vf input = keep(splat(inputs[t][d]));
#pragma GCC unroll 8
        for (int v = 0; v < WIDE; ++v) sums[t][v] = fma(input, weights[v], sums[t][v]);
      }
    }
    fetch = ahead;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < WIDE; ++v) store(out + t * width + v * LANES, sums[t][v]);
  }
};
