/*
quant.h: the numbers of a 1.58-bit model.

What it is:  the ternary quantiser of weights, the int8 quantiser of activations, the lambda mix that leads from float to
             ternary, its schedules over a run, and the packing of four codes into a byte. The scalar formulas here are the
             only ones in the project: the CPU ops, the CUDA kernels and the exporters all call them.
What not:    no loops over models and no products; see train_bitnet.c (ops) and matmul.h (products).
Read before: bitnet/utils.h. Formulas and their sources: README, "The recipe".
Defines:     ternary_gamma, ternary_code, act_levels, act_inverse_scale, act_round, noise_at, noisy_code, lambda_mix, lambda_at, pack4,
             codes_from_bits, unpack4_row.
*/
#ifndef BITNET_QUANT_H
#define BITNET_QUANT_H

#include "bitnet/options.h"   // the names of the lambda schedules
#include "bitnet/utils.h"

// Under nvcc the scalar formulas are compiled for both sides of the bus.
#ifdef __CUDACC__
#define QUANT_FN __host__ __device__ static inline
#else
#define QUANT_FN UNUSED static inline
#endif

// ---------------------------------------------------------------------------------------------------------
/*
Weights: absmean, one scale for a whole matrix (BitNet b1.58).

    gamma = max(mean |W|, 1e-5)        Q(W) = clamp(round(W / gamma), -1, 1) * gamma

Dividing by the mean magnitude puts the rounding thresholds at half of it: weights below 0.5 gamma become 0 (about 31 % of
a Gaussian), the others keep only their sign. Rounding is half to even as in PyTorch, and W is multiplied by the
precomputed inverse because that is what the reference does: a division could round a tie the other way.
*/
QUANT_FN float ternary_gamma(float mean_abs) {
  return mean_abs > 1e-5f ? mean_abs : 1e-5f;
}

QUANT_FN int ternary_code(float w, float inverse_gamma) {
  float x = w * inverse_gamma;   // beyond one half it rounds to 1 or more; one half itself is a tie and goes to the even 0
  return (x > 0.5f) - (x < -0.5f);
}

/*
Activations: absmax, one scale for each token.

    a = max(max |x|, 1e-5)        Q(x) = clamp(round(x * 127 / a), -128, 127) * a / 127

The largest element of the row always becomes +-127, so nothing is clipped and the error of an element is at most a / 254.
With bits = 4 the range is -8..7 and 127 becomes 7.
*/
QUANT_FN float act_levels(int bits) {
  return (float)((1 << (bits - 1)) - 1);
}

// What x is multiplied by before it is rounded; its inverse is the scale of the codes.
QUANT_FN float act_inverse_scale(float abs_max, int bits) {
  return act_levels(bits) / (abs_max > 1e-5f ? abs_max : 1e-5f);
}

// levels = act_levels(bits). Clamping before the conversion keeps huge values from overflowing the integer.
QUANT_FN float act_round(float x, float inverse_scale, float levels) {
  float r = rintf(x * inverse_scale);
  r = r > levels ? levels : r;
  return r < -levels - 1 ? -levels - 1 : r;
}

/*
The bridge from float to ternary: v_eff = v + lambda (Q(v) - v).

lambda = 0 is a plain float network, lambda = 1 the 1.58-bit one. The backward pass is "straight-through": (Q(v) - v) counts as
a constant, so dv = dv_eff at every lambda. Rounding has a zero derivative almost everywhere; pretending that it is the
identity is what lets the float master weights collect many small steps until a code flips.
*/
QUANT_FN float lambda_mix(float v, float quantised, float lambda) {
  return v + lambda * (quantised - v);
}

// ---------------------------------------------------------------------------------------------------------
/*
Gradients as int8, where dx_int8 is on. A row dy is divided by max|dy| / 127 and rounded at random: up with the probability of its
fraction, floor(v + u) with u uniform in [0,1), so that the expected value of a code is v itself. Rounding to the nearest would push
the many small gradients of a row to 0 in every step alike.
*/
// Sixteen random bits for place n of row `row`, N places wide. A word serves two places, n and n + 16 of each 32: a bijection of 32
// bits that mixes well (the finaliser of MurmurHash3), of the word's number in the stream `key`.
QUANT_FN uint32_t noise_at(uint32_t key, uint32_t row, uint32_t n, uint32_t N) {
  uint32_t words = (N + 31) / 32 * 16, x = (row * words + n / 32 * 16 + n % 16) * 0x9E3779B1u ^ key;
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  return n & 16 ? x >> 16 : x & 0xFFFFu;
}

// v in [-127,127] to a code, floor(v + u) with u = bits / 2^16: in steps of 2^-16, and 128 added so that no number is negative.
QUANT_FN int noisy_code(float v, uint32_t bits) {
  return (int)(((uint32_t)(int)(v * 65536.0f + 8388608.0f) + bits) >> 16) - 128;
}

// ---------------------------------------------------------------------------------------------------------
/*
Schedules: lambda for update t = 0 .. T-1, a pure function, so a resumed run needs no state. u = t / T.

    warmup       min(t / W, 1); W steps of ramp (W = 0: 1 from the start)
    linear       u                         accelerated  min(2u, 1)
    cosine       (1 - cos(pi min(t/W, 1))) / 2
    exponential  1 - (1 - u)^k             fast first, then levelling off; k = 8
    sigmoid      1 / (1 + exp(-k (u - 1/2))), stretched so that it starts at 0 and ends at 1; k = 100
    step         1/4, 2/4, 3/4, 1 by quarters of the run
    none         1
*/
UNUSED static double lambda_at(int schedule, int64_t t, int64_t T, int64_t W, double k) {
  double u = T > 0 ? (double)t / (double)T : 1.0;
  double ramp = W > 0 && t < W ? (double)t / (double)W : 1.0;
  if (u > 1) u = 1;
  switch (schedule) {
    case LAMBDA_WARMUP: return ramp;
    case LAMBDA_LINEAR: return u;
    case LAMBDA_ACCELERATED: return 2 * u < 1 ? 2 * u : 1;
    case LAMBDA_COSINE: return 0.5 * (1 - cos(3.14159265358979323846 * ramp));
    case LAMBDA_EXPONENTIAL: return 1 - pow(1 - u, k > 0 ? k : 8);
    case LAMBDA_SIGMOID: {
      if (k <= 0) k = 100;
      double low = 1 / (1 + exp(k / 2)), high = 1 / (1 + exp(-k / 2));
      return (1 / (1 + exp(-k * (u - 0.5))) - low) / (high - low);
    }
    case LAMBDA_STEP: return u < 0.25 ? 0.25 : u < 0.5 ? 0.5 : u < 0.75 ? 0.75 : 1;
    default: return 1;
  }
}

// ---------------------------------------------------------------------------------------------------------
/*
Packing, the layout of transformers' uint8 weights: four rows share a byte. With R = out/4 byte rows, logical row
i*R + r of column c sits in bits 2i..2i+1 of packed[r][c], as code + 1 (0, 1, 2; 3 never occurs).

        byte row r:   [ row r+3R | row r+2R | row r+R | row r ]   high bits ... low bits
*/

// packed (=) [out/4, in] from codes [out, in]; out must be a multiple of 4.
UNUSED static void pack4(uint8_t *packed, const int8_t *codes, size_t out, size_t in) {
  size_t R = out / 4;
  for (size_t r = 0; r < R; r++) {
    for (size_t c = 0; c < in; c++) {
      unsigned byte = 0;
      for (size_t i = 0; i < 4; i++) byte |= (unsigned)(codes[(i * R + r) * in + c] + 1) << (2 * i);
      packed[r * in + c] = (uint8_t)byte;
    }
  }
}

/*
codes (=) [n], n a multiple of 4, from n bytes with one code + 1 each in the two bits from `shift` on. Returns 1, or 0 if one is a 3,
which no packer writes: the data are damaged. The bytes of a word are worked on together; with its top bit set a byte can be lowered
by 1 without borrowing from the next.
*/
UNUSED static int codes_from_bits(int8_t *codes, const uint8_t *bytes, size_t n, int shift) {
  const uint32_t low = 0x03030303u, one = 0x01010101u, top = 0x80808080u;
  uint32_t threes = 0;
  for (size_t i = 0; i < n; i += 4) {
    uint32_t c;
    memcpy(&c, bytes + i, 4);
    c = c >> shift & low;
    threes |= c & c >> 1;
    c = ((c | top) - one) ^ top;
    memcpy(codes + i, &c, 4);
  }
  return (threes & one) == 0;
}

// codes (=) [in] of row r of the packed matrix [out,in]. Returns as codes_from_bits.
UNUSED static int unpack4_row(int8_t *codes, const uint8_t *packed, size_t out, size_t in, size_t r) {
  const uint8_t *bytes = packed + r % (out / 4) * in;
  int shift = (int)(2 * (r / (out / 4))), three = 0;
  size_t whole = in / 4 * 4;
  if (!codes_from_bits(codes, bytes, whole, shift)) return 0;
  for (size_t c = whole; c < in; c++) {
    int code = bytes[c] >> shift & 3;
    three |= code == 3;
    codes[c] = (int8_t)(code - 1);
  }
  return !three;
}

#endif
