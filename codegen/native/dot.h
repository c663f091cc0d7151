// Products with weights that are stored output-major: each row lies along the reduction.
//
// A tile holds TOKENS x ROWS vectors of sums in registers and walks along the reduction a cache line
// of weights at a time, so nothing is repacked and each weight is widened once for all tokens of
// the tile. Every (token, row) pair has one vector of sums and one order of addition whatever the
// tile, so a token's result does not depend on which other tokens share it.
#pragma once

#include "vec.h"

#include <algorithm>
#include <type_traits>

// How a line of weights meets a line of inputs: PARTS steps, each with the inputs that belong to it.
template <class Weight>
struct Line {
  static constexpr int LENGTH = LINE_BYTES / sizeof(Weight);
  static constexpr int PARTS = LENGTH / LANES;
  using Input = float;
  static INLINE vf weights(const Weight* line, int part) { return widen(line + part * LANES); }
  static INLINE vf inputs(const float* line, int part) { return load(line + part * LANES); }
  static INLINE vf add_product(vf sum, vf x, vf w) { return fma(x, w, sum); }
  // Where the element of a lane of a part lies in the line.
  static constexpr int element(int part, int lane) { return part * LANES + lane; }
};

#if defined(__AVX512BF16__) && defined(MOECC_AVX512)
// The CPU multiplies pairs of bf16 and adds in float: inputs stay (or are rounded to) bf16.
template <>
struct Line<bf16> {
  static constexpr int LENGTH = 32, PARTS = 1;
  using Input = bf16;
  static INLINE __m512bh weights(const bf16* line, int) { return load_as<__m512bh>(line); }
  static INLINE __m512bh inputs(const bf16* line, int) { return load_as<__m512bh>(line); }
  static INLINE vf add_product(vf sum, __m512bh x, __m512bh w) {
    return _mm512_dpbf16_ps(sum, x, w);
  }
};
#else
// Two bf16 in a 32-bit word widen with one shift or one mask: even elements make one part, odd
// elements the next, and inputs are kept in that order.
template <>
struct Line<bf16> {
  static constexpr int LENGTH = 32, PARTS = LENGTH / LANES;
  using Input = float;
  static INLINE vf weights(const bf16* line, int part) {
    // Volatile: read again rather than kept in a register between the two parts.
    typedef vu words __attribute__((aligned(2), may_alias));
    vu pairs = *reinterpret_cast<const volatile words*>(line + part / 2 * 2 * LANES);
    return bitcast<vf>(part % 2 ? pairs & 0xffff0000 : pairs << 16);
  }
  static INLINE vf inputs(const float* line, int part) { return load(line + part * LANES); }
  static INLINE vf add_product(vf sum, vf x, vf w) { return fma(x, w, sum); }
  static constexpr int element(int part, int lane) {
    return part / 2 * 2 * LANES + 2 * lane + part % 2;
  }
};
#endif

template <class Weight>
struct Dot {
  using L = Line<Weight>;
  using Input = typename L::Input;
  static constexpr int LENGTH = L::LENGTH;     // inputs are padded with zeros to whole lines
  static constexpr int UNITS = LENGTH;         // inputs that a packed line takes
  static constexpr int64_t PANEL_BYTES = 256 << 10;  // of weights that stay in L2
  static constexpr int PANEL = 128 / sizeof(Weight);  // rows a task: 256 KiB of 2048
  // Widening needs registers too: with 16 of them, a larger tile would spill.
  static constexpr int TILE_TOKENS = REGISTERS == 32 || sizeof(Weight) == 4 ? 6 : 4;
  static constexpr int BLOCK_BYTES = 24576;    // of L1, for the inputs and weights of a tile

  // Put one line of inputs in the order in which weights meet them.
  static INLINE void pack(const float* line, Input* packed) {
    if constexpr (std::is_same_v<Input, bf16>) {
      for (int i = 0; i < LENGTH; ++i) packed[i] = narrow<bf16>(line[i]);
    } else {
      for (int part = 0; part < L::PARTS; ++part)
        for (int lane = 0; lane < LANES; ++lane)
          packed[part * LANES + lane] = line[L::element(part, lane)];
    }
  }

  static Rows<Weight> at(const Weight* expert, ptrdiff_t stride, int64_t row) {
    return {expert + row * stride, stride};
  }

  // out[t * width + r] = x[t] . weights[r] for `rows` rows. `next` are the rows that will be
  // multiplied after these. Rows are taken as many at a time as stay in L2 with those after them,
  // which are fetched meanwhile.
  static void product(Rows<Weight> weights, int rows, Rows<Weight> next, const Input* const* x,
                      int tokens, int64_t length, float* out, int width) {
    int64_t bytes = PANEL * length * int64_t(sizeof(Weight));
    int parts = int(std::clamp<int64_t>((bytes + PANEL_BYTES - 1) / PANEL_BYTES, 1, PANEL / 16));
    int most = (PANEL / parts + 3) / 4 * 4;
    for (int r = 0; r < rows; r += most) {
      int count = std::min(most, rows - r);
      Rows<Weight> some = at(weights.begin, weights.stride, r);
      Rows<Weight> after = r + count < rows ? at(some.begin, weights.stride, count) : next;
      part(some, count, after, x, tokens, length, out + r, width);
    }
  }

 private:
  struct Panel {
    const Weight* weights;
    ptrdiff_t stride;
    int rows;
    int64_t length;
    int tile, tiles;  // which tile of tokens meets the panel now, of how many
  };

  // Reads ahead, row after row. Memory is then read in one stream, which is faster than the
  // several of a tile, and while all tiles compute, not only the first to use the weights.
  struct Fetch {
    const Weight* row;
    ptrdiff_t stride;
    int64_t length, along;

    template <int LINES>
    INLINE void lines(int64_t step) {
#pragma GCC unroll 8
      for (int i = 0; i < LINES; ++i) __builtin_prefetch(row + along + i * LENGTH, 0, 2);
      along += step;
      if (along >= length) along = 0, row += stride;
    }
  };

  static void part(Rows<Weight> weights, int rows, Rows<Weight> next, const Input* const* x,
                   int tokens, int64_t length, float* out, int width) {
    int tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    Fetch fetch = {next.begin, next.stride, length, 0};
    for (int tile = 0, t = 0; tile < tiles; ++tile) {
      int count = (tokens - t + tiles - tile - 1) / (tiles - tile);  // tiles of nearly equal size
      auto sweep = count == 1   ? &Dot::sweep<1>
                   : count == 2 ? &Dot::sweep<2>
                   : count == 3 ? &Dot::sweep<3>
                   : count == 4 ? &Dot::sweep<4>
                   : count == 5 ? &Dot::sweep<5>
                                : &Dot::sweep<6>;
      Panel panel = {weights.begin, weights.stride, rows, length, tile, tiles};
      sweep(panel, x + t, fetch, out + t * width, width);
      t += count;
    }
  }

  struct Span { int64_t from, to, length; };  // a block [from, to) of the reduction

  // As many rows as leave registers for one input and the widened weights.
  static constexpr int rows_of(int tokens) {
    return REGISTERS == 32 ? 4 : tokens >= 4 ? 2 : tokens == 3 ? 3 : 4;
  }

  // All rows of the panel for one tile of tokens, a block of the reduction at a time: the tile's
  // inputs then stay in L1 while weights pass by. Sums wait in `partial` between blocks.
  template <int TOKENS>
  static void sweep(const Panel& panel, const Input* const* x, Fetch& fetch, float* out,
                    int width) {
    constexpr int ROWS = rows_of(TOKENS);
    constexpr int64_t most =
        BLOCK_BYTES / (TOKENS * sizeof(Input) + 2 * ROWS * sizeof(Weight));
    alignas(64) float partial[PANEL * TOKENS * LANES];
    int64_t blocks = (panel.length + most - 1) / most;
    int64_t block = ((panel.length + blocks - 1) / blocks + LENGTH - 1) / LENGTH * LENGTH;
    for (int64_t from = 0; from < panel.length; from += block) {
      Span span = {from, std::min(from + block, panel.length), panel.length};
      int r = 0;
      for (; r + ROWS <= panel.rows; r += ROWS) {
        // Tiles take turns in reading ahead, so that it is spread over all of them.
        int64_t step = r / ROWS % panel.tiles == panel.tile ? ROWS * LENGTH : 0;
        tile<TOKENS, ROWS>(panel.weights + r * panel.stride, panel.stride, x, span, fetch, step,
                           partial + r * TOKENS * LANES, out + r, width);
      }
      for (; r < panel.rows; ++r)
        tile<TOKENS, 1>(panel.weights + r * panel.stride, panel.stride, x, span, fetch, 0,
                        partial + r * TOKENS * LANES, out + r, width);
    }
  }

  template <int TOKENS, int ROWS>
  static INLINE void add_line(vf (&sums)[TOKENS][ROWS], const Weight* w, ptrdiff_t stride,
                              const Input* const* x, int64_t at) {
#pragma GCC unroll 8
    for (int part = 0; part < L::PARTS; ++part) {
      decltype(L::weights(w, 0)) row[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        row[r] = L::weights(w + r * stride, part);
        if (TOKENS > 1) row[r] = keep(row[r]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        auto input = L::inputs(x[t] + at, part);
        if (ROWS > 1) input = keep(input);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[t][r] = L::add_product(sums[t][r], input, row[r]);
      }
    }
  }

  template <int TOKENS, int ROWS>
  static void tile(const Weight* w, ptrdiff_t stride, const Input* const* x, Span span,
                   Fetch& fetch, int64_t step, float* partial, float* out, int width) {
    vf sums[TOKENS][ROWS] = {};
    if (span.from > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < TOKENS * ROWS; ++i)
        sums[i / ROWS][i % ROWS] = load(partial + i * LANES);
    }
    const Input* inputs[TOKENS];
    for (int t = 0; t < TOKENS; ++t) inputs[t] = x[t];
    Fetch ahead = fetch;  // in registers
    int64_t k = span.from;
    for (; k + LENGTH <= span.to; k += LENGTH) {
      ahead.template lines<ROWS>(step);
      add_line<TOKENS, ROWS>(sums, w + k, stride, inputs, k);
    }
    fetch = ahead;
    if (k < span.to) {  // the last, short line: never read past a row
      alignas(64) Weight last[ROWS][LENGTH] = {};
      for (int r = 0; r < ROWS; ++r)
        memcpy(last[r], w + r * stride + k, (span.to - k) * sizeof(Weight));
      add_line<TOKENS, ROWS>(sums, last[0], LENGTH, inputs, k);
    }
    if (span.to < span.length) {
#pragma GCC unroll 32
      for (int i = 0; i < TOKENS * ROWS; ++i)
        store(partial + i * LANES, sums[i / ROWS][i % ROWS]);
      return;
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) out[t * width + r] = sum_lanes(sums[t][r]);
  }
};
