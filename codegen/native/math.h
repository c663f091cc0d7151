// The elementwise operations of activations, on whole vectors.
// NaN goes through every one of them; exp saturates to 0 and inf. Polynomials are least-maximum
// fits made for these ranges; their relative error is below 1e-8 before rounding to float.
#pragma once

#include "vec.h"

static INLINE vf polynomial(vf x, const float* coefficients, int degree) {
  vf value = splat(coefficients[degree]);
  for (int i = degree - 1; i >= 0; --i) value = fma(value, x, splat(coefficients[i]));
  return value;
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2.
static INLINE vf exp_(vf x) {
  static const float q[] = {0.49999994f, 0.1666652f, 0.041668393f, 0.008368781f, 0.0013814465f};
  x = select(x > splat(89.f), splat(89.f), x);
  x = select(x < splat(-104.f), splat(-104.f), x);
  vf shift = splat(0x1.8p23f);  // adding it rounds to an integer, held in the low mantissa bits
  vf shifted = fma(x, splat(1.44269504f), shift);
  vi n = bitcast<vi>(shifted) - bitcast<vi>(shift);
  vf whole = shifted - shift;
  vf r = fma(whole, splat(-0.693359375f), x);
  r = fma(whole, splat(2.12194440e-4f), r);
  vf value = fma(r * r, polynomial(r, q, 4), r) + splat(1.f);
  vi half = n >> 1;  // 2^n in two factors: n reaches 128 and -150
  vf low = bitcast<vf>((half + 127) << 23), high = bitcast<vf>((n - half + 127) << 23);
  return value * low * high;
}

static INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + exp_(-x)); }
static INLINE vf silu(vf x) { return x / (splat(1.f) + exp_(-x)); }
static INLINE vf relu(vf x) { return select(x < splat(0.f), splat(0.f), x); }
static INLINE vf square(vf x) { return x * x; }
static INLINE vf negate(vf x) { return -x; }
static INLINE vf absolute(vf x) { return bitcast<vf>(bitcast<vi>(x) & 0x7fffffff); }
static INLINE vf minimum(vf a, vf b) { return select((a < b) | (a != a), a, b); }
static INLINE vf maximum(vf a, vf b) { return select((a > b) | (a != a), a, b); }

static INLINE vf tanh_(vf x) {
  static const float p[] = {-0.33333278f, 0.13331328f, -0.05372923f, 0.020602f, -0.0056607808f};
  vf z = x * x;
  vf small = fma(x * z, polynomial(z, p, 4), x);
  vf size = splat(1.f) - splat(2.f) / (exp_(absolute(x) * splat(2.f)) + splat(1.f));
  vf large = select(x < splat(0.f), -size, size);
  return select(z < splat(0.4f), small, large);
}

// x Phi(x), with Phi from erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + 0.4 z), z = |x| / sqrt(2).
static INLINE vf gelu(vf x) {
  static const float p[] = {0.22570691f, 0.22495203f, 0.21491906f, 0.1296796f, 0.27206624f,
                            -0.2843667f, 0.54743546f, -0.49881151f, 0.19801322f, -0.029594338f};
  vf size = absolute(x);
  vf t = splat(1.f) / fma(size, splat(0.282842712f), splat(1.f));
  vf tail = exp_(size * size * splat(-0.5f)) * t * polynomial(t, p, 9) * splat(0.5f);
  // -inf has a tail of 0 and would make a NaN, as it does in torch.
  return x * select(x < splat(0.f), tail, splat(1.f) - tail);
}

// x (1 + tanh(u)) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
static INLINE vf gelu_tanh(vf x) {
  vf cubic = fma(x * x, splat(0.044715f), splat(1.f)) * x;
  return x * sigmoid(cubic * splat(1.59576912f));
}
