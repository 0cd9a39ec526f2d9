/*
matmul.h: the inner products of the CPU. Nearly all the time of a training step is spent in this file.

What it is:  three products, the large ones packed into panels and blocked for registers and caches:
               gemm      C = A B      float operands, B may be int8 codes; both products of the backward pass, the classifier, and
                                      the forward pass while lambda < 1
               gemm_i8   y = q w'     int8 activations times ternary weights, summed in int32: the forward pass at lambda = 1
               block_product   what attention multiplies: small blocks that the caller has packed
             in several kernels, chosen when the program is compiled for the machine's instructions:
               fp32      vectors of the compiler, any machine           int8   plain C, any machine
               bf16      AVX-512 BF16 of AMD, 2 products a lane                vectors.h: AVX-512, AVX-VNNI, AVX2, NEON
               bf16      ARM BF16, 2 x 2 x 4 in one instruction
               bf16      AMX, 16 x 16 x 32 in one instruction                  AMX, 16 x 16 x 64 in one instruction
             Without fast bf16 instructions the fp32 kernel multiplies numbers that were rounded to bf16 when they were packed.
What not:    no policy and no shapes of the network; train_bitnet.c decides what is multiplied by what.
Read before: bitnet/ops.h.
Defines:     exp_fast; Product, gemm, gemm_scratch_bytes; pack_left, pack_right, left_put,
             block_product, transpose; ternary_panel_bytes, ternary_pack_panels, ternary_pack_transposed,
             codes_sum, gemm_i8, i8_slice_rows, gemm_i8_slice, gemm_i8_rounded.

How a fast product works. A value that was loaded should be used as often as possible before it leaves the register. So C
is computed in tiles of mr x nr that live in registers: each step of the inner loop loads nr values of B and mr of A
and does mr*nr multiply-adds. To feed that loop with plain sequential loads, A and B are first copied ("packed") into
panels in exactly the order in which the tile will read them; the copy also converts (int8 -> float, float -> bf16),
transposes where the operand lies the other way, and multiplies scales in. A block of A is small enough for
the L2 cache, a panel of B for L1.

Determinism. Every element of C is summed over k in the same order, in blocks of kc, whatever the number of threads, the tile it
falls into or the number of rows beside it: edge tiles run the same kernel on panels padded with zeros. Integer sums are exact, so there
any kernel may take any part.
*/
#ifndef BITNET_MATMUL_H
#define BITNET_MATMUL_H

#include "bitnet/ops.h"
#include "bitnet/utils.h"
#include "quant.h"
#include "threads.h"
#include "vectors.h"
// BITNET_SCALAR compiles the plain kernels only; BITNET_FLOAT64 is the build for finite differences.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(BITNET_SCALAR) && !defined(BITNET_FLOAT64)
#include <immintrin.h>
#define BITNET_VNNI 1
// Intel's cores, which have FP16, too, sum bf16 products at half the speed of fp32 ones, AMD's at twice: the former take AMX or fp32.
#if defined(__AVX512BF16__) && !defined(__AVX512FP16__)
#define BITNET_BF16 1
#endif
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#define BITNET_AMX 1
#endif
#elif defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(BITNET_SCALAR) && !defined(BITNET_FLOAT64)
#define BITNET_BF16 1
#define BITNET_BFMMLA 1
#endif

// Vectors through the compiler's own extension: one source for SSE, AVX, AVX-512 and NEON. VL floats in a vector; a tile is MR
// rows of two vectors, sized so that its MR*2 accumulators, two vectors of B and one of A fit the register file.
#if defined(__AVX512F__)
#define VBYTES 64
#define MR 12
#elif defined(__AVX__)
#define VBYTES 32
#define MR 6
#elif defined(__aarch64__)
#define VBYTES 16
#define MR 8
#else
#define VBYTES 16
#define MR 6
#endif
typedef float vfloat __attribute__((vector_size(VBYTES)));
typedef float vfloat_anywhere __attribute__((vector_size(VBYTES), aligned(sizeof(float))));
#define ALIGNED __attribute__((aligned(64)))
enum { VL = VBYTES / sizeof(float), NR = 2 * VL };

/*
e^x without a branch or a table, so that the compiler can vectorise loops that call it. x = n ln2 + r with |r| <= ln2/2; e^r by
a polynomial (Cephes), then 2^n is added into the exponent bits. Relative error below 2e-7; below -87 the result is 1.6e-38
instead of a denormal, above 88 it saturates, NaN stays NaN. Adding 1.5 * 2^23 rounds to an integer and leaves it in the
low bits.
*/
#ifndef BITNET_FLOAT64
static inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float z = x * 1.44269504f + 12582912.0f;
  float n = z - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &z, 4);
  bits = (bits << 23) + 0x3F800000u;   // 2^n
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}
#else
static inline float exp_fast(float x) {   // the finite-difference tests see the function itself
  return exp(x);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// What AVX-512 and AMX need: transposing, and permission to use the tile registers.

#ifdef BITNET_VNNI
// Transposes a 16 x 16 matrix of 32-bit words whose rows are t[0..15]: pairs of words, then pairs of pairs, then 128-bit lanes.
static inline __attribute__((always_inline)) void transpose16(__m512i t[16]) {
  __m512i u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    u[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    u[i + 4] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    u[i + 8] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    u[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(u[i], u[i + 8], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(u[i], u[i + 8], 0xDD);
    t[i + 4] = _mm512_shuffle_i32x4(u[i + 4], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(u[i + 4], u[i + 12], 0xDD);
  }
}

// The first n lanes of 16, n may be larger.
static inline __mmask16 lanes16(size_t n) {
  return (__mmask16)(n >= 16 ? 0xFFFF : (1u << n) - 1);
}
#endif

#ifdef BITNET_AMX
// 1 if the kernel lets this process use the tile registers; asked once.
static int amx_ready(void) {
  static int answer = -1;
  if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return answer;
}

// gcc's headers do not say that tile instructions read memory (of a configuration they name 8 bytes, of a tile none), so what they are
// to read could be stored too late or not at all. This comes between: everything at and around p is in memory now.
static inline void amx_reads(const void *p) {
  __asm__ volatile("" : : "r"(p) : "memory");
}

// Every thread describes its eight tiles before it uses them: 16 rows of 64 bytes each.
static void amx_begin(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((aligned(64))) config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  amx_reads(&config);
  _tile_loadconfig(&config);
}

static void amx_end(void) {
  _tile_release();
}
#else
static int amx_ready(void) {
  return 0;
}
static void amx_begin(void) {}
static void amx_end(void) {}
#endif

// ---------------------------------------------------------------------------------------------------------
// Float products.

/*
One product  C[i,j] = sum_p A(i,p) B(p,j),  i < M, j < N, p < K.
Operands are addressed by strides, so that a transposed operand is the same matrix with its strides swapped.
*/
typedef struct {
  size_t M, N, K;
  const float *A;              // A(i,p) = A[i*a_row + p*a_col] * (a_scale ? a_scale[p] : 1)
  size_t a_row, a_col;
  const float *a_scale;        // [K] or NULL
  const float *B;              // B(p,j) = B[p*b_row + j*b_col], or NULL: then
  const int8_t *B_codes;       //   the same in int8 codes, or
  const uint16_t *B_half;      //   in bf16
  size_t b_row, b_col;
  float *C;                    // C[i*N + j]
  int accumulate;              // 0: C = ..., 1: C += ...
  const float *bias;           // [N] or NULL, added at the end
  const float *residual;       // [M,N] or NULL, added at the end; must not be C
  int precision;               // PRECISION_BF16: operands are rounded to bf16 as they are packed (sums stay fp32)
} Product;

/*
A kernel: how panels are packed, and the product of two of them. Panels hold mr rows of A or nr columns of B, kc values of k at most.
Packing pads with zeros: rows and columns beyond the matrix, and k up to a multiple of k_step.
*/
typedef struct {
  size_t mr, nr, kc, k_step, bytes;   // bytes of an element in a panel
  size_t mc, qc;                      // rows and columns of C that a thread's own cache holds beside kc x qc of B and mc x kc of A
  void (*pack_a)(void *out, const Product *g, size_t i0, size_t p0, size_t kc);
  void (*pack_b)(void *out, const Product *g, size_t j0, size_t p0, size_t kc);
  // c [mr][nr], rows ldc apart: = a b, or += a b where load is set
  void (*tile)(float *c, size_t ldc, int load, const void *a, const void *b, size_t kc);
  int amx;
} Kernel;

enum {
  KB = 2048,               // k that are packed at a time
  B_MAX = 4 << 20,         // elements of B that are packed at a time
  MR_MAX = 32, NR_MAX = 32, KC_MAX = 512, MC_MAX = 384
};

// A bf16 number as a float.
static inline float float_of_half(uint16_t half) {
  uint32_t u = (uint32_t)half << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The upper half of a float whose lower half is 0: a bf16 number.
static inline uint16_t half_of_float(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (uint16_t)(u >> 16);
}

// float rounded to the nearest bf16 (ties to even), returned as a float. Codes up to 256 and their products are exact.
static inline float round_bf16(float x) {
#ifndef BITNET_FLOAT64
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return x;   // NaN
  u = (u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u;
  memcpy(&x, &u, 4);
#endif
  return x;
}

// y (=) [m,n], rows `stride` apart, the transpose of x [n,m], whose rows lie ldx apart.
static void transpose(float *y, size_t stride, const float *x, size_t ldx, size_t m, size_t n) {
#ifdef BITNET_VNNI
  for (size_t i = 0; i < m; i += 16) {
    for (size_t k = 0; k < n; k += 16) {
      __m512i t[16];
      size_t rows = m - i < 16 ? m - i : 16, columns = n - k < 16 ? n - k : 16;
      for (size_t c = 0; c < 16; c++)
        t[c] = c < columns ? _mm512_maskz_loadu_epi32(lanes16(rows), x + (k + c) * ldx + i) : _mm512_setzero_si512();
      transpose16(t);
      for (size_t r = 0; r < rows; r++) _mm512_mask_storeu_epi32(y + (i + r) * stride + k, lanes16(columns), t[r]);
    }
  }
#else
  for (size_t i = 0; i < m; i++) {
    for (size_t k = 0; k < n; k++) y[i * stride + k] = x[k * ldx + i];
  }
#endif
}

// ---- fp32: panels of A are [kc][MR], of B [kc][NR] ----

static void pack_a_f32(void *panel, const Product *g, size_t i0, size_t p0, size_t kc) {
  float *RESTRICT out = (float *)panel;
  size_t rows = g->M - i0 < MR ? g->M - i0 : (size_t)MR;
  const float *a = g->A + i0 * g->a_row + p0 * g->a_col;
  if (rows < MR) memset(out, 0, kc * MR * sizeof(float));
  if (g->a_col == 1) {
    transpose(out, MR, a, g->a_row, kc, rows);
  } else {
    for (size_t p = 0; p < kc; p++) {
      for (size_t i = 0; i < rows; i++) out[p * MR + i] = a[p * g->a_col + i * g->a_row];
    }
  }
  if (g->a_scale) {
    for (size_t p = 0; p < kc; p++) {
      for (size_t i = 0; i < MR; i++) out[p * MR + i] *= g->a_scale[p0 + p];
    }
  }
  if (g->precision == PRECISION_BF16) {
    for (size_t k = 0; k < kc * MR; k++) out[k] = round_bf16(out[k]);
  }
}

static void pack_b_f32(void *panel, const Product *g, size_t j0, size_t p0, size_t kc) {
  float *RESTRICT out = (float *)panel;
  size_t cols = g->N - j0 < NR ? g->N - j0 : (size_t)NR;
  size_t first = p0 * g->b_row + j0 * g->b_col;
  if (cols < NR) memset(out, 0, kc * NR * sizeof(float));
  if (g->b_col == 1) {   // rows of B are contiguous: copy along them
    for (size_t p = 0; p < kc; p++) {
      if (g->B) {
        for (size_t j = 0; j < cols; j++) out[p * NR + j] = g->B[first + p * g->b_row + j];
      } else if (g->B_half) {
        for (size_t j = 0; j < cols; j++) out[p * NR + j] = float_of_half(g->B_half[first + p * g->b_row + j]);
      } else {
        for (size_t j = 0; j < cols; j++) out[p * NR + j] = (float)g->B_codes[first + p * g->b_row + j];
      }
    }
  } else if (g->B && g->b_row == 1) {   // columns of B are: transpose
    transpose(out, NR, g->B + first, g->b_col, kc, cols);
  } else {
    for (size_t j = 0; j < cols; j++) {
      if (g->B) {
        for (size_t p = 0; p < kc; p++) out[p * NR + j] = g->B[first + p * g->b_row + j * g->b_col];
      } else if (g->B_half) {
        for (size_t p = 0; p < kc; p++) out[p * NR + j] = float_of_half(g->B_half[first + p * g->b_row + j * g->b_col]);
      } else {
        for (size_t p = 0; p < kc; p++) out[p * NR + j] = (float)g->B_codes[first + p * g->b_row + j * g->b_col];
      }
    }
  }
  if (g->precision == PRECISION_BF16 && g->B) {
    for (size_t k = 0; k < kc * NR; k++) out[k] = round_bf16(out[k]);
  }
}

// The compiler keeps acc in MR*2 vector registers.
static void tile_f32(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc) {
  const float *RESTRICT a = (const float *)a_panel, *RESTRICT b = (const float *)b_panel;
  vfloat acc[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    acc[i][0] = load ? *(const vfloat_anywhere *)(c + (size_t)i * ldc) : (vfloat){0};
    acc[i][1] = load ? *(const vfloat_anywhere *)(c + (size_t)i * ldc + VL) : (vfloat){0};
  }
#pragma GCC unroll 2   // counting takes slots of the units that multiply
  for (size_t p = 0; p < kc; p++) {
    vfloat b0 = *(const vfloat *)(b + p * NR), b1 = *(const vfloat *)(b + p * NR + VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      acc[i][0] += a[p * MR + i] * b0;
      acc[i][1] += a[p * MR + i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    *(vfloat_anywhere *)(c + (size_t)i * ldc) = acc[i][0];
    *(vfloat_anywhere *)(c + (size_t)i * ldc + VL) = acc[i][1];
  }
}

static const Kernel kernel_f32 = {MR, NR, 256, 1, sizeof(float), 192, 384, pack_a_f32, pack_b_f32, tile_f32, 0};

// ---- bf16: two neighbouring k share a 32-bit word; panels are words ----

#if defined(BITNET_VNNI) && (defined(BITNET_BF16) || defined(BITNET_AMX))
// One operand as packing sees it: element (x, k), where x is a row of A or a column of B. One of the strides is 1.
typedef struct {
  const float *f;       // floats, or
  const int8_t *q;      // codes, or
  const uint16_t *h;    // bf16
  size_t sx, sk, nx, nk;
  const float *scale;   // [nk] or NULL
} Operand;

static Operand operand_a(const Product *g) {
  Operand o = {g->A, NULL, NULL, g->a_row, g->a_col, g->M, g->K, g->a_scale};
  return o;
}

static Operand operand_b(const Product *g) {
  Operand o = {g->B, g->B_codes, g->B_half, g->b_col, g->b_row, g->N, g->K, NULL};
  return o;
}

static inline __m512 load16(const Operand *o, size_t at, __mmask16 lanes) {
  if (o->f) return _mm512_maskz_loadu_ps(lanes, o->f + at);
  if (o->h) return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, o->h + at)), 16);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, o->q + at)));
}

// Pairs (a[i], b[i]) in bf16.
static inline __m512i woven(__m512 a, __m512 b) {
  const __m512i weave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                         3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(weave, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/*
Sixteen x from x0 on and 32 k from k0 on (up to k_end; beyond it zeros) as a 16 x 16 matrix of words, a word being the pair (k, k+1) in
bf16: by_x: t[x] holds the 16 pairs of one x; else t[pair] holds 16 x. The operand's memory gives one of the two, a transpose the
other.
*/
static inline __attribute__((always_inline)) void load_pairs(__m512i t[16], const Operand *o, size_t x0, size_t k0, size_t k_end,
                                                             int by_x) {
  size_t nx = x0 < o->nx ? o->nx - x0 : 0, nk = k_end - k0;
  if (o->sk == 1 && o->h) {   // bf16 already: the pairs lie side by side
    __mmask32 lanes = nk >= 32 ? ~0u : (1u << nk) - 1;
    for (size_t x = 0; x < 16; x++) t[x] = x < nx ? _mm512_maskz_loadu_epi16(lanes, o->h + (x0 + x) * o->sx + k0) : _mm512_setzero_si512();
    if (!by_x) transpose16(t);
  } else if (o->sk == 1) {
    __mmask16 low = lanes16(nk), high = nk > 16 ? lanes16(nk - 16) : 0;
    __m512 scale_low = _mm512_set1_ps(1), scale_high = scale_low;
    if (o->scale) {
      scale_low = _mm512_maskz_loadu_ps(low, o->scale + k0);
      scale_high = _mm512_maskz_loadu_ps(high, o->scale + k0 + 16);
    }
    for (size_t x = 0; x < 16; x++) {
      if (x >= nx) {
        t[x] = _mm512_setzero_si512();
        continue;
      }
      size_t at = (x0 + x) * o->sx + k0;
      __m512 a = _mm512_mul_ps(load16(o, at, low), scale_low), b = _mm512_mul_ps(load16(o, at + 16, high), scale_high);
      t[x] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    }
    if (!by_x) transpose16(t);
  } else {
    __mmask16 lanes = lanes16(nx);
    for (size_t pair = 0; pair < 16; pair++) {
      size_t k = 2 * pair, at = (k0 + k) * o->sk + x0;
      if (o->f) {   // the panel after this one, which begins 32 x further: hundreds of rows from now
        _mm_prefetch(o->f + at + 32, _MM_HINT_T1);
        _mm_prefetch(o->f + at + o->sk + 32, _MM_HINT_T1);
      }
      __m512 a = k < nk ? load16(o, at, lanes) : _mm512_setzero_ps(),
             b = k + 1 < nk ? load16(o, at + o->sk, lanes) : _mm512_setzero_ps();
      if (o->scale) {
        a = _mm512_mul_ps(a, _mm512_set1_ps(k < nk ? o->scale[k0 + k] : 0));
        b = _mm512_mul_ps(b, _mm512_set1_ps(k + 1 < nk ? o->scale[k0 + k + 1] : 0));
      }
      t[pair] = woven(a, b);
    }
    if (by_x) transpose16(t);
  }
}

// 1 if 16 x from x0 on and n >= 32 k are all there, floats without a scale, and few enough to lie in a cache.
static inline int whole_floats(const Operand *o, size_t x0, size_t n) {
  return o->f && o->scale == NULL && x0 + 16 <= o->nx && n >= 32 && o->nk <= KV_BLOCK;
}

/*
What attention packs most: whole blocks of floats that need no transpose and have just been written. Loads without masks can take their
numbers from stores that are still on their way; masked ones wait. Here sixteen x of each of 16 pairs, rows of `out` `apart` words apart:
*/
static void whole_by_pair(uint32_t *out, size_t apart, const float *f, size_t sk) {
#pragma GCC unroll 4
  for (size_t pair = 0; pair < 16; pair++, f += 2 * sk)
    _mm512_storeu_si512(out + pair * apart, woven(_mm512_loadu_ps(f), _mm512_loadu_ps(f + sk)));
}

// A panel of B, 32 columns: for each 32 k 16 pairs of 16 columns and 16 of the other 16, the halves half_at and the pairs pair_at words
// apart.
static inline __attribute__((always_inline)) void pack_b_words(uint32_t *out, const Product *g, size_t j0, size_t p0, size_t kc,
                                                               size_t half_at, size_t pair_at) {
  Operand o = operand_b(g);
  for (size_t k = 0; k < kc; k += 32, out += 512) {
    for (size_t half = 0; half < 2; half++) {
      __m512i t[16];
      size_t x = j0 + 16 * half;
      if (whole_floats(&o, x, kc - k) && o.sx == 1) {
        whole_by_pair(out + half * half_at, pair_at, o.f + x + (p0 + k) * o.sk, o.sk);
        continue;
      }
      load_pairs(t, &o, x, p0 + k, p0 + kc, 0);
      for (size_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(out + half * half_at + pair * pair_at, t[pair]);
    }
  }
}

#ifdef BITNET_BF16
enum { BF_MR = 12 };   // 24 accumulators, two vectors of B, one of A

// Panels of B: [kc/2][32] words.
static void pack_b_bf16(void *panel, const Product *g, size_t j0, size_t p0, size_t kc) {
  pack_b_words((uint32_t *)panel, g, j0, p0, kc, 16, 32);
}

// Panels of A: [kc/2][12] words.
static void pack_a_bf16(void *panel, const Product *g, size_t i0, size_t p0, size_t kc) {
  uint32_t *out = (uint32_t *)panel;
  Operand o = operand_a(g);
  if (o.nx > i0 + BF_MR) o.nx = i0 + BF_MR;
  for (size_t k = 0; k < kc; k += 32) {
    __m512i t[16];
    load_pairs(t, &o, i0, p0 + k, p0 + kc, 0);
    for (size_t pair = 0; pair < 16; pair++) _mm512_mask_storeu_epi32(out + (k / 2 + pair) * BF_MR, 0x0FFF, t[pair]);
  }
}

static void tile_bf16(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc) {
  const uint32_t *a = (const uint32_t *)a_panel, *b = (const uint32_t *)b_panel;
  __m512 acc[BF_MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < BF_MR; i++) {
    acc[i][0] = load ? _mm512_loadu_ps(c + (size_t)i * ldc) : _mm512_setzero_ps();
    acc[i][1] = load ? _mm512_loadu_ps(c + (size_t)i * ldc + 16) : _mm512_setzero_ps();
  }
  for (size_t pair = 0; pair < (kc + 1) / 2; pair++) {
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + pair * 32), b1 = (__m512bh)_mm512_loadu_si512(b + pair * 32 + 16);
#pragma GCC unroll 16
    for (int i = 0; i < BF_MR; i++) {
      __m512bh ai = (__m512bh)_mm512_set1_epi32((int)a[pair * BF_MR + (size_t)i]);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < BF_MR; i++) {
    _mm512_storeu_ps(c + (size_t)i * ldc, acc[i][0]);
    _mm512_storeu_ps(c + (size_t)i * ldc + 16, acc[i][1]);
  }
}

static const Kernel kernel_bf16 = {BF_MR, 32, 256, 32, 2, 192, 384, pack_a_bf16, pack_b_bf16, tile_bf16, 0};
#endif
#endif

// ---- bf16 of ARM: one instruction multiplies 2 rows of four k by 2 columns ----

#ifdef BITNET_BFMMLA
enum { BF_MR = 8 };   // rows and columns: 16 accumulators of 2 x 2, 4 pairs of rows and 4 of columns

// Panels of A and of B: [kc/4][8 rows or columns][4]. Element (x, k) lies at x*sx + k*sk in f, in codes q or in bf16 h. Inlined, so
// that two of the three are known not to be there.
static inline __attribute__((always_inline)) void pack_fours(uint16_t *RESTRICT out, const float *f, const int8_t *q, const uint16_t *h,
                                                             size_t sx, size_t sk, size_t nx, size_t nk, const float *scale) {
  if (nx > BF_MR) nx = BF_MR;
  if (nx < BF_MR || nk % 4) memset(out, 0, (nk + 3) / 4 * BF_MR * 4 * sizeof *out);
  for (size_t k = 0; k < nk; k++) {
    for (size_t x = 0; x < nx; x++) {
      size_t at = x * sx + k * sk;
      float v = f ? f[at] : q ? (float)q[at] : float_of_half(h[at]);
      out[(k / 4 * BF_MR + x) * 4 + k % 4] = half_of_float(round_bf16(scale ? v * scale[k] : v));
    }
  }
}

static void pack_a_bf16(void *panel, const Product *g, size_t i0, size_t p0, size_t kc) {
  const float *a = g->A + i0 * g->a_row + p0 * g->a_col;
  if (g->a_scale) pack_fours((uint16_t *)panel, a, NULL, NULL, g->a_row, g->a_col, g->M - i0, kc, g->a_scale + p0);
  else pack_fours((uint16_t *)panel, a, NULL, NULL, g->a_row, g->a_col, g->M - i0, kc, NULL);
}

static void pack_b_bf16(void *panel, const Product *g, size_t j0, size_t p0, size_t kc) {
  size_t first = p0 * g->b_row + j0 * g->b_col;
  if (g->B) pack_fours((uint16_t *)panel, g->B + first, NULL, NULL, g->b_col, g->b_row, g->N - j0, kc, NULL);
  else if (g->B_half) pack_fours((uint16_t *)panel, NULL, NULL, g->B_half + first, g->b_col, g->b_row, g->N - j0, kc, NULL);
  else pack_fours((uint16_t *)panel, NULL, g->B_codes + first, NULL, g->b_col, g->b_row, g->N - j0, kc, NULL);
}

// acc[i][j]: rows 2i, 2i+1 of columns 2j, 2j+1.
static void tile_bf16(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc) {
  const bfloat16_t *a = (const bfloat16_t *)a_panel, *b = (const bfloat16_t *)b_panel;
  float32x4_t acc[4][4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; i++) {
#pragma GCC unroll 2
    for (size_t j = 0; j < 4; j += 2) {
      const float *at = c + 2 * i * ldc + 2 * j;
      float32x4_t zero = vdupq_n_f32(0), even = load ? vld1q_f32(at) : zero, odd = load ? vld1q_f32(at + ldc) : zero;
      acc[i][j] = vcombine_f32(vget_low_f32(even), vget_low_f32(odd));
      acc[i][j + 1] = vcombine_f32(vget_high_f32(even), vget_high_f32(odd));
    }
  }
  for (size_t k = 0; k < kc; k += 4, a += 32, b += 32) {
    bfloat16x8_t columns[4];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; j++) columns[j] = vld1q_bf16(b + 8 * j);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
      bfloat16x8_t rows = vld1q_bf16(a + 8 * i);
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; j++) acc[i][j] = vbfmmlaq_f32(acc[i][j], rows, columns[j]);
    }
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; i++) {
#pragma GCC unroll 2
    for (size_t j = 0; j < 4; j += 2) {
      float *at = c + 2 * i * ldc + 2 * j;
      vst1q_f32(at, vcombine_f32(vget_low_f32(acc[i][j]), vget_low_f32(acc[i][j + 1])));
      vst1q_f32(at + ldc, vcombine_f32(vget_high_f32(acc[i][j]), vget_high_f32(acc[i][j + 1])));
    }
  }
}

static const Kernel kernel_bf16 = {BF_MR, BF_MR, 256, 4, 2, 192, 384, pack_a_bf16, pack_b_bf16, tile_bf16, 0};
#endif

#ifdef BITNET_AMX
// A whole block (whole_floats): the 16 pairs of each of 16 rows.
static void whole_by_x(uint32_t *out, const float *f, size_t sx) {
#pragma GCC unroll 4
  for (size_t x = 0; x < 16; x++)
    _mm512_storeu_si512(out + x * 16, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(f + x * sx + 16), _mm512_loadu_ps(f + x * sx)));
}

// Panels of A: for each 32 k, the two tiles of 16 rows: [kc/32][32 rows][16 words].
static void pack_a_amx(void *panel, const Product *g, size_t i0, size_t p0, size_t kc) {
  uint32_t *out = (uint32_t *)panel;
  Operand o = operand_a(g);
  for (size_t k = 0; k < kc; k += 32) {
    for (size_t half = 0; half < 2; half++, out += 256) {
      __m512i t[16];
      size_t x0 = i0 + 16 * half;
      if (whole_floats(&o, x0, kc - k) && o.sk == 1) {
        whole_by_x(out, o.f + x0 * o.sx + p0 + k, o.sx);
        continue;
      }
      load_pairs(t, &o, x0, p0 + k, p0 + kc, 1);
      for (size_t x = 0; x < 16; x++) _mm512_storeu_si512(out + x * 16, t[x]);
    }
  }
}

// Panels of B: for each 32 k, the two tiles of 16 pairs: [kc/32][2][16 pairs][16 words].
static void pack_b_amx(void *panel, const Product *g, size_t j0, size_t p0, size_t kc) {
  pack_b_words((uint32_t *)panel, g, j0, p0, kc, 256, 16);
}

// Two by two tiles of C; a tile instruction multiplies 16 rows of 32 k by 16 columns. Where sums are long (kc a product's, not
// attention's), what C held is added at the end, by ordinary instructions: its lines have time to come until then.
static void tile_amx(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc) {
  const char *a = (const char *)a_panel, *b = (const char *)b_panel;
  float sums[32 * 32] ALIGNED, *to = c;
  size_t to_row = ldc;
  int late = load && kc >= 256;
  if (late) to = sums, to_row = 32;
  amx_reads(c);
  if (load && !late) {
    _tile_loadd(0, c, ldc * sizeof(float));
    _tile_loadd(1, c + 16, ldc * sizeof(float));
    _tile_loadd(2, c + 16 * ldc, ldc * sizeof(float));
    _tile_loadd(3, c + 16 * ldc + 16, ldc * sizeof(float));
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (size_t k = 0; k < kc; k += 32, a += 2048, b += 2048) {
    for (size_t i = k / 16; late && i < k / 16 + 2 && i < 32; i++) {   // all 32 rows of C in 512 k
      __builtin_prefetch(c + i * ldc);
      __builtin_prefetch(c + i * ldc + 16);
    }
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_row * sizeof(float));
  _tile_stored(1, to + 16, to_row * sizeof(float));
  _tile_stored(2, to + 16 * to_row, to_row * sizeof(float));
  _tile_stored(3, to + 16 * to_row + 16, to_row * sizeof(float));
  amx_reads(to);
#pragma GCC unroll 4
  for (size_t i = 0; late && i < 32; i++, c += ldc) {
    _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), _mm512_load_ps(sums + 32 * i)));
    _mm512_storeu_ps(c + 16, _mm512_add_ps(_mm512_loadu_ps(c + 16), _mm512_load_ps(sums + 32 * i + 16)));
  }
}

static const Kernel kernel_amx = {32, 32, 512, 32, 2, 384, 384, pack_a_amx, pack_b_amx, tile_amx, 1};
#endif

// The fastest kernel for this precision. The bf16 kernels need operands of which one stride is 1.
static const Kernel *fastest_kernel(int precision) {
#ifdef BITNET_AMX
  if (precision == PRECISION_BF16 && amx_ready()) return &kernel_amx;
#endif
#ifdef BITNET_BF16
  if (precision == PRECISION_BF16) return &kernel_bf16;
#endif
  (void)precision;
  return &kernel_f32;
}

// Every thread calls these around its use of a kernel.
static void kernel_begin(const Kernel *k) {
  if (k->amx) amx_begin();
}

static void kernel_end(const Kernel *k) {
  if (k->amx) amx_end();
}

static const Kernel *gemm_kernel(const Product *g) {
  int contiguous = (g->a_row == 1 || g->a_col == 1) && (g->b_row == 1 || g->b_col == 1);
  return contiguous ? fastest_kernel(g->precision) : &kernel_f32;
}

// Elements of a packed block of B, k x columns, with padding.
static size_t b_block_elements(size_t k, size_t columns) {
  return (k + 31) / 32 * 32 * ((columns + NR_MAX - 1) / NR_MAX * NR_MAX);
}

/*
Bytes of scratch for a product whose three sizes are these, in any order: one packed block of B, shared, and one block of A for each thread.
*/
static size_t gemm_scratch_bytes(size_t x, size_t y, size_t z) {
  size_t most = b_block_elements(x, y);
  if (b_block_elements(y, z) > most) most = b_block_elements(y, z);
  if (b_block_elements(x, z) > most) most = b_block_elements(x, z);
  if (most > B_MAX) most = B_MAX;
  return (most + (size_t)thread_count() * MC_MAX * KB) * sizeof(float);
}

// One tile of C. Inside the matrix the kernel works in place; at its edges on a copy, of which the valid part is put back.
static void gemm_tile(const Kernel *k, const Product *g, size_t i0, size_t j0, int load, const void *a, const void *b, size_t kc) {
  size_t rows = g->M - i0 < k->mr ? g->M - i0 : k->mr, cols = g->N - j0 < k->nr ? g->N - j0 : k->nr;
  float *c = g->C + i0 * g->N + j0;
  if (rows == k->mr && cols == k->nr) {
    k->tile(c, g->N, load, a, b, kc);
    return;
  }
  float copy[MR_MAX * NR_MAX] __attribute__((aligned(64)));
  if (load) {
    memset(copy, 0, sizeof copy);
    for (size_t i = 0; i < rows; i++) memcpy(copy + i * k->nr, c + i * g->N, cols * sizeof(float));
  }
  k->tile(copy, k->nr, load, a, b, kc);
  for (size_t i = 0; i < rows; i++) memcpy(c + i * g->N, copy + i * k->nr, cols * sizeof(float));
}

// Adds bias and residual to rows i0 .. i1-1, columns j0 .. j1-1 of the finished product.
static void gemm_finish(const Product *g, size_t i0, size_t i1, size_t j0, size_t j1) {
  for (size_t i = i0; i < i1; i++) {
    float *RESTRICT c = g->C + i * g->N;
    if (g->bias) {
      for (size_t j = j0; j < j1; j++) c[j] += g->bias[j];
    }
    if (g->residual) {
      const float *RESTRICT r = g->residual + i * g->N;
      for (size_t j = j0; j < j1; j++) c[j] += r[j];
    }
  }
}

// Piece p of kb values of k: where it begins, how many there are, and how many with padding.
typedef struct {
  size_t first, kc, padded;
} GemmPiece;

static inline GemmPiece gemm_piece(const Kernel *k, size_t kb, size_t p) {
  GemmPiece x;
  x.first = p * k->kc;
  x.kc = kb - x.first < k->kc ? kb - x.first : k->kc;
  x.padded = (x.kc + k->k_step - 1) / k->k_step * k->k_step;
  return x;
}

/*
The loops around the tile, after the scheme of GotoBLAS. A block of B of up to B_MAX elements is packed by all threads together and stays
in the shared cache. Each thread takes mc rows of A and qc columns, and adds kc after kc to these mc x qc numbers of C, which stay in its
own cache beside kc x qc of B and the mc x kc of A that it packs for itself; the panel of A that the innermost loop uses
again and again stays in the first-level cache. Rows are shared out evenly; where there are few, columns, too.

The sums run over k in pieces of kc from 0 on, however the rest is cut: no bit depends on the number of threads.
scratch: gemm_scratch_bytes(M, N, K), aligned to 64.
*/
static void gemm_by(const Kernel *k, const Product *g, void *scratch) {
  size_t threads = (size_t)thread_count(), panels = (g->M + k->mr - 1) / k->mr, blocks = (g->M + k->mc - 1) / k->mc;
  if (panels >= threads) blocks = (blocks + threads - 1) / threads * threads;
  if (blocks > panels) blocks = panels;
  size_t kb_max = g->K < KB ? g->K : (size_t)KB, nc_max = B_MAX / ((kb_max + 31) / 32 * 32) / NR_MAX * NR_MAX;
  char *a_blocks = (char *)scratch, *b_block = a_blocks + threads * MC_MAX * KB * sizeof(float);
  for (size_t j0 = 0; j0 < g->N; j0 += nc_max) {
    size_t nc = g->N - j0 < nc_max ? g->N - j0 : nc_max, b_panels = (nc + k->nr - 1) / k->nr;
    size_t groups = panels >= 4 * threads ? 1 : (2 * threads + blocks - 1) / blocks;
    if (groups > b_panels) groups = b_panels;
    for (size_t kb0 = 0; kb0 < g->K; kb0 += KB) {
      size_t kb = g->K - kb0 < KB ? g->K - kb0 : (size_t)KB, pieces = (kb + k->kc - 1) / k->kc;
      int last = kb0 + kb == g->K;
#pragma omp parallel
      {
        kernel_begin(k);
#pragma omp for schedule(static) collapse(2)
        for (size_t p = 0; p < pieces; p++) {
          for (size_t q = 0; q < b_panels; q++) {
            GemmPiece x = gemm_piece(k, kb, p);
            k->pack_b(b_block + (p * k->kc * b_panels + q * x.padded) * k->nr * k->bytes, g, j0 + q * k->nr, kb0 + x.first, x.kc);
          }
        }
        char *a_block = a_blocks + (size_t)thread_index() * MC_MAX * KB * sizeof(float);
#pragma omp for schedule(static)
        for (size_t task = 0; task < blocks * groups; task++) {
          size_t r0 = panels * (task / groups) / blocks, r1 = panels * (task / groups + 1) / blocks;
          size_t q0 = b_panels * (task % groups) / groups, q1 = b_panels * (task % groups + 1) / groups;
          int once = q1 - q0 <= k->qc / k->nr;   // all columns at a time: a panel of A serves once, and is packed over the last one
          for (size_t qq = q0; qq < q1; qq += k->qc / k->nr) {
            size_t q_end = qq + k->qc / k->nr < q1 ? qq + k->qc / k->nr : q1;
            for (size_t p = 0; p < pieces; p++) {
              GemmPiece x = gemm_piece(k, kb, p);
              char *a = a_block + p * k->kc * (r1 - r0) * k->mr * k->bytes;
              const char *b = b_block + p * k->kc * b_panels * k->nr * k->bytes;
              size_t a_bytes = x.padded * k->mr * k->bytes, b_bytes = x.padded * k->nr * k->bytes;
              int load = g->accumulate || kb0 + p > 0;
              for (size_t r = r0; r < r1 && qq == q0 && !once; r++) k->pack_a(a + (r - r0) * a_bytes, g, r * k->mr, kb0 + x.first, x.kc);
              for (size_t r = r0; r < r1; r++) {
                char *panel = once ? a_block : a + (r - r0) * a_bytes;
                if (once) k->pack_a(panel, g, r * k->mr, kb0 + x.first, x.kc);
                for (size_t q = qq; q < q_end; q++)
                  gemm_tile(k, g, r * k->mr, j0 + q * k->nr, load, panel, b + q * b_bytes, x.kc);
              }
            }
            size_t i1 = r1 * k->mr < g->M ? r1 * k->mr : g->M, j1 = q_end * k->nr < nc ? q_end * k->nr : nc;
            if (last && (g->bias || g->residual)) gemm_finish(g, r0 * k->mr, i1, j0 + qq * k->nr, j0 + j1);
          }
        }
        kernel_end(k);
      }
    }
  }
}

static void gemm(const Product *g, void *scratch) {
  gemm_by(gemm_kernel(g), g, scratch);
}

// ---------------------------------------------------------------------------------------------------------
/*
Blocks: what attention multiplies. Its operands are small and each is used many times, so the caller packs them himself, into panels of
the kernel k, the left one [M,K] or the right one [K,N], and multiplies whole blocks. Every element of the result is summed over k in
order, so its bits depend on its own row of the left and column of the right operand alone.
*/
static size_t padded_to(size_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
}

static size_t left_bytes(const Kernel *k, size_t M, size_t K) {
  return padded_to(M, k->mr) * padded_to(K, k->k_step) * k->bytes;
}

static size_t right_bytes(const Kernel *k, size_t K, size_t N) {
  return padded_to(N, k->nr) * padded_to(K, k->k_step) * k->bytes;
}

// left (=) the matrix with elements x[i*row + p*col]; one of row and col is 1.
static void pack_left(const Kernel *k, void *left, const float *x, size_t row, size_t col, size_t M, size_t K, int precision) {
  Product g;
  memset(&g, 0, sizeof g);
  g.M = M, g.K = K;
  g.A = x, g.a_row = row, g.a_col = col;
  g.precision = precision;
  for (size_t i = 0; i < M; i += k->mr) k->pack_a((char *)left + left_bytes(k, i, K), &g, i, 0, K);
}

// right (=) the matrix with elements x[p*row + j*col]; one of row and col is 1.
static void pack_right(const Kernel *k, void *right, const float *x, size_t row, size_t col, size_t K, size_t N, int precision) {
  Product g;
  memset(&g, 0, sizeof g);
  g.N = N, g.K = K;
  g.B = x, g.b_row = row, g.b_col = col;
  g.precision = precision;
  for (size_t j = 0; j < N; j += k->nr) k->pack_b((char *)right + right_bytes(k, K, j), &g, j, 0, K);
}

// One element (i, p) of a left operand with K columns (=).
static inline void left_put(const Kernel *k, void *left, size_t K, size_t i, size_t p, float x, int precision) {
  char *panel = (char *)left + left_bytes(k, i / k->mr * k->mr, K);
#ifdef BITNET_BFMMLA
  size_t run = 4;                   // values of k that lie side by side in a bf16 panel
#else
  size_t run = k->amx ? 32 : 2;
#endif
  i %= k->mr;
  if (precision == PRECISION_BF16) x = round_bf16(x);
  if (k->bytes == sizeof(float)) ((float *)panel)[p * k->mr + i] = x;
  else ((uint16_t *)panel)[(p / run * k->mr + i) * run + p % run] = half_of_float(x);
}

// c, rows ldc apart: = left right, or += where load is set. It is written in whole tiles: M and N rounded up to mr and nr. The left
// operand may have been packed with more columns, left_K; the first K of them count.
static void block_product(const Kernel *k, float *c, size_t ldc, int load, const void *left, const void *right, size_t M, size_t N,
                          size_t K, size_t left_K) {
  for (size_t i = 0; i < M; i += k->mr) {
    for (size_t j = 0; j < N; j += k->nr)
      k->tile(c + i * ldc + j, ldc, load, (const char *)left + left_bytes(k, i, left_K), (const char *)right + right_bytes(k, K, j), K);
  }
}

// ---------------------------------------------------------------------------------------------------------
/*
Integer products: int8 activations times ternary weights.

Weights are packed once per optimizer step, when they are quantised. A panel is 16 outputs wide; four values of k lie side by side,
because the byte dot product multiplies four pairs at once and adds them into one int32 lane:

    panel[k/4][16 outputs][4]   as unsigned bytes code + 1 in {0, 1, 2}

The instruction wants one unsigned operand; with code + 1 the sum comes out too large by sum_k q[k], the same for every output, which
is subtracted once per row. Sums are exact: |sum| <= 3 * 127 * K < 2^31 for K below five million. The number of groups of four is padded
to a multiple of 16, which is what an AMX tile holds; padding is multiplied by zeros.
*/
enum {
  I8_WIDTH = 16, I8_ROWS = 6,
  I8_BLOCK = 256,        // rows that a thread takes at a time
  I8_ROUNDED = 1 << 20,  // bytes of codes that it makes of a gradient at a time
  I8_CACHE = 5 << 20,    // bytes of a result for each thread that the caches keep until they are used
  I8_STREAM = 1 << 20,   // and of the residual stream, which is not used before all of it is there
  I8_PANELS = 1 << 20,   // bytes of panels that meet 32 rows of AMX after 32
  I8_SLICE = 512 << 10   // bytes of a result that its thread uses at once
};

// Groups of four k in a panel.
static size_t ternary_groups(size_t K) {
  return (K + 63) / 64 * 16;
}

static size_t ternary_panel_bytes(size_t N, size_t K) {
  return (N + I8_WIDTH - 1) / I8_WIDTH * ternary_groups(K) * (I8_WIDTH * 4);
}

// panels (=) from codes [N,K]; outputs and inputs beyond the matrix become 0.
static void ternary_pack_panels(uint8_t *panels, const int8_t *codes, size_t N, size_t K) {
  size_t groups = ternary_groups(K), n_panels = (N + I8_WIDTH - 1) / I8_WIDTH;
#pragma omp parallel for schedule(static)
  for (size_t panel = 0; panel < n_panels; panel++) {
    uint8_t *out = panels + panel * groups * I8_WIDTH * 4;
    size_t rows = N - panel * I8_WIDTH < I8_WIDTH ? N - panel * I8_WIDTH : (size_t)I8_WIDTH;
    const int8_t *in = codes + panel * I8_WIDTH * K;
#ifdef BITNET_VNNI
    for (size_t k = 0; k < K; k += 64, out += 1024) {   // 16 rows of 16 words, transposed
      __m512i t[16];
      __mmask64 lanes = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
      for (size_t lane = 0; lane < 16; lane++) {
        t[lane] = lane < rows ? _mm512_maskz_add_epi8(lanes, _mm512_maskz_loadu_epi8(lanes, in + lane * K + k), _mm512_set1_epi8(1))
                              : _mm512_setzero_si512();
      }
      transpose16(t);
      for (size_t g = 0; g < 16; g++) _mm512_storeu_si512(out + g * 64, t[g]);
    }
#else
    memset(out, 0, groups * I8_WIDTH * 4);
    for (size_t lane = 0; lane < rows; lane++) {
      for (size_t k = 0; k < K; k++) out[(k / 4 * I8_WIDTH + lane) * 4 + k % 4] = (uint8_t)(in[lane * K + k] + 1);
    }
#endif
  }
}

// panels (=) of the transposed matrix: its outputs are the K inputs of codes [N,K], its inputs the N outputs.
static void ternary_pack_transposed(uint8_t *panels, const int8_t *codes, size_t N, size_t K) {
  size_t groups = ternary_groups(N), n_panels = (K + I8_WIDTH - 1) / I8_WIDTH;
#pragma omp parallel for schedule(static)
  for (size_t panel = 0; panel < n_panels; panel++) {
    uint8_t *out = panels + panel * groups * I8_WIDTH * 4;
    size_t k0 = panel * I8_WIDTH, lanes = K - k0 < I8_WIDTH ? K - k0 : (size_t)I8_WIDTH;
    memset(out, 0, groups * I8_WIDTH * 4);
    for (size_t g = 0; g < (N + 3) / 4; g++, out += I8_WIDTH * 4) {
      uint8_t rows[4][I8_WIDTH] = {{0}};
      for (size_t j = 0; j < 4 && 4 * g + j < N; j++) {
        for (size_t lane = 0; lane < lanes; lane++) rows[j][lane] = (uint8_t)(codes[(4 * g + j) * K + k0 + lane] + 1);
      }
      for (size_t lane = 0; lane < I8_WIDTH; lane++) {
        for (size_t j = 0; j < 4; j++) out[lane * 4 + j] = rows[j][lane];
      }
    }
  }
}

// Four activations from k on as one 32-bit word; beyond K they are zeros.
static inline int32_t four_codes(const int8_t *q, size_t k, size_t K) {
  int32_t word = 0;
  if (k + 4 <= K) memcpy(&word, q + k, 4);
  else memcpy(&word, q + k, K - k);
  return word;
}

/*
sums (=) [rows][n_panels*16]: the raw sums of (code + 1) * q for `rows` rows of activations (stride K) against n_panels neighbouring
panels. Called with constant rows and n_panels, so that each call site becomes its own unrolled kernel. The plain form is all there is on
other machines, and what the tests compare the fast ones with.
*/
UNUSED static inline void tile_i8_scalar(int32_t *sums, const int8_t *q, const uint8_t *panels, size_t K, const int rows,
                                         const int n_panels) {
  size_t groups = ternary_groups(K);
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < n_panels; j++) {
      int32_t *acc = sums + (i * n_panels + j) * I8_WIDTH;
      memset(acc, 0, I8_WIDTH * sizeof *acc);
      for (size_t g = 0; g < (K + 3) / 4; g++) {
        const uint8_t *w = panels + ((size_t)j * groups + g) * I8_WIDTH * 4;
        int32_t word = four_codes(q + (size_t)i * K, 4 * g, K);
        int8_t a[4];
        memcpy(a, &word, 4);
        for (int lane = 0; lane < I8_WIDTH; lane++) {
          for (int k = 0; k < 4; k++) acc[lane] += (int32_t)w[lane * 4 + k] * a[k];
        }
      }
    }
  }
}

#ifdef IVEC
// acc += four k of `rows` rows of activations, `apart` bytes apart, times `vectors` vectors of weights, panels `stride` bytes apart.
static inline __attribute__((always_inline)) void tile_step(ivec acc[I8_ROWS][8], const uint8_t *panels, size_t stride, int v0,
                                                            const int8_t *a, size_t apart, const int rows, const int vectors) {
  const int parts = 64 / IVEC;
  ivec w[8];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) w[v] = ivec_load(panels + (size_t)((v0 + v) / parts) * stride + (size_t)((v0 + v) % parts * IVEC));
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    ifour four = ivec_four(a + (size_t)i * apart);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) acc[i][v] = ivec_ternary(acc[i][v], w[v], four);
  }
}

static inline __attribute__((always_inline)) void tile_i8(int32_t *sums, const int8_t *q, const uint8_t *panels, size_t K,
                                                          const int rows, const int n_panels) {
  const int parts = 64 / IVEC, most = rows == 1 ? 8 : TILE_VECTORS, vectors = n_panels * parts < most ? n_panels * parts : most;
  size_t groups = ternary_groups(K), used = (K + 3) / 4;
  int8_t last[I8_ROWS * 4] = {0};   // the activations of an incomplete group
  for (int i = 0; i < rows && K % 4; i++) memcpy(last + 4 * i, q + (size_t)i * K + K / 4 * 4, K % 4);
  for (int v0 = 0; v0 < n_panels * parts; v0 += vectors) {
    for (size_t first = 0; first < used; first += TERNARY_STEPS) {
      size_t end = used - first < TERNARY_STEPS ? used : first + TERNARY_STEPS;
      ivec acc[I8_ROWS][8];
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) acc[i][v] = ivec_zero();
      }
      size_t whole = end < K / 4 ? end : K / 4;
#pragma GCC unroll 4   // see tile_f32
      for (size_t g = first; g < whole; g++) tile_step(acc, panels + g * 64, groups * 64, v0, q + 4 * g, K, rows, vectors);
      for (size_t g = whole; g < end; g++) tile_step(acc, panels + g * 64, groups * 64, v0, last, 4, rows, vectors);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
          int32_t *out = sums + (i * n_panels + (v0 + v) / parts) * I8_WIDTH + (v0 + v) % parts * (IVEC / 4);
          ivec_store(out, ivec_ternary_sum(first > 0 ? ivec_load(out) : ivec_zero(), acc[i][v]));
        }
      }
    }
  }
}
#else
#define tile_i8 tile_i8_scalar
#endif

#ifdef BITNET_AMX
// sums (=) [32][32] for 32 rows of activations against two neighbouring panels.
static void tile_i8_amx(int32_t *sums, const int8_t *q, const uint8_t *panels, size_t K) {
  size_t groups = ternary_groups(K), whole = K / 64 * 64;
  const uint8_t *w0 = panels, *w1 = panels + groups * 64;
  int8_t tail[32 * 64] __attribute__((aligned(64)));
  if (whole < K) {
    memset(tail, 0, sizeof tail);
    for (size_t i = 0; i < 32; i++) memcpy(tail + i * 64, q + i * K + whole, K - whole);
  }
  amx_reads(tail);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t k = 0; k < K; k += 64, w0 += 1024, w1 += 1024) {
    const int8_t *a = k < whole ? q + k : tail;
    size_t row = k < whole ? K : 64;
    _tile_loadd(4, a, row);
    _tile_loadd(6, w0, 64);
    _tile_loadd(7, w1, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, a + 16 * row, row);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
}
#endif

// Where the results of gemm_i8 go.
typedef struct {
  float *out;                    // [M,N]
  int32_t *exact;                // [M,N] or NULL
  const float *s, *gamma, *bias, *residual;
  size_t N;
  int stream;                    // 1: out is larger than the caches and in whole aligned vectors, so it is written past them
} I8Result;

// A result that leaves the caches before it is read again is written past them: an ordinary store would read each line from memory first.
static I8Result i8_result(float *out, int32_t *exact, const float *s, const float *gamma, const float *bias, const float *residual,
                          size_t M, size_t N) {
  size_t bytes = M * N * sizeof(float), most = residual ? (size_t)I8_STREAM : (size_t)thread_count() * I8_CACHE;
  int whole = (uintptr_t)out % 64 == 0 && N % 16 == 0;
  I8Result r = {out, exact, s, gamma, bias, residual, N, whole && bytes > most};
  return r;
}

#ifdef BITNET_VNNI
// Keeps the compiler from fusing the multiplication that made x with an addition that follows.
static inline __m512 rounded_here(__m512 x) {
  __asm__("" : "+v"(x));
  return x;
}
#endif

// Row m, columns n0 .. n0+cols-1 from raw sums. What follows adds to the rounded product, as the GPU does: barriers keep the compiler
// from fusing multiplication and addition.
static void i8_store(const I8Result *r, const int32_t *RESTRICT sum, int32_t excess, size_t m, size_t n0, size_t cols) {
  float *RESTRICT o = r->out + m * r->N + n0, s = r->s[m];
  const float *RESTRICT gamma = r->gamma + n0, *RESTRICT bias = r->bias ? r->bias + n0 : NULL;
  const float *RESTRICT residual = r->residual ? r->residual + m * r->N + n0 : NULL;
  int32_t *RESTRICT whole = r->exact ? r->exact + m * r->N + n0 : NULL;
  size_t done = 0;
#ifdef BITNET_VNNI
  for (; done + 16 <= cols; done += 16) {
    __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sum + done), _mm512_set1_epi32(excess));
    __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(_mm512_set1_ps(s), _mm512_loadu_ps(gamma + done)));
    if (bias) x = _mm512_add_ps(rounded_here(x), _mm512_loadu_ps(bias + done));
    if (residual) x = _mm512_add_ps(rounded_here(x), _mm512_loadu_ps(residual + done));
    if (r->stream) _mm512_stream_ps(o + done, x);
    else _mm512_storeu_ps(o + done, x);
    if (whole) _mm512_storeu_si512(whole + done, exact);
  }
#endif
  for (size_t n = done; n < cols; n++) o[n] = (float)(sum[n] - excess) * (s * gamma[n]);
  if (bias) {
    __asm__ volatile("" : : : "memory");
    for (size_t n = done; n < cols; n++) o[n] += bias[n];
  }
  if (residual) {
    __asm__ volatile("" : : : "memory");
    for (size_t n = done; n < cols; n++) o[n] += residual[n];
  }
  for (size_t n = done; n < cols && whole; n++) whole[n] = sum[n] - excess;
}

#ifdef BITNET_VNNI
// i8_store for `rows` rows of `width` sums that all count, without bias: what training does. With constants for width, residual and
// stream nothing is asked within the loops.
static inline __attribute__((always_inline)) void i8_store_plain(const I8Result *r, const int32_t *sums, const int32_t *excess, size_t m0,
                                                                 size_t rows, size_t n0, const size_t width, const int residual,
                                                                 const int stream) {
  float *o = r->out + m0 * r->N + n0;
  const float *add = residual ? r->residual + m0 * r->N + n0 : NULL;
  for (size_t t = 0; t < rows; t++, sums += width, o += r->N) {
    __m512i too_much = _mm512_set1_epi32(excess[t]);
    __m512 s = _mm512_set1_ps(r->s[m0 + t]);
#pragma GCC unroll 4
    for (size_t n = 0; n < width; n += 16) {
      __m512 x = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums + n), too_much));
      x = _mm512_mul_ps(x, _mm512_mul_ps(s, _mm512_loadu_ps(r->gamma + n0 + n)));
      if (residual) x = _mm512_add_ps(rounded_here(x), _mm512_loadu_ps(add + t * r->N + n));
      if (stream) _mm512_stream_ps(o + n, x);
      else _mm512_storeu_ps(o + n, x);
    }
  }
}
#endif

// `rows` rows of `width` sums each.
static inline __attribute__((always_inline)) void i8_store_rows(const I8Result *r, const int32_t *sums, const int32_t *excess, size_t m0,
                                                                size_t rows, size_t n0, const size_t width) {
  size_t cols = r->N - n0 < width ? r->N - n0 : width;
#ifdef BITNET_VNNI
  if (cols == width && !r->bias && !r->exact) {
    if (r->residual && r->stream) i8_store_plain(r, sums, excess, m0, rows, n0, width, 1, 1);
    else if (r->residual) i8_store_plain(r, sums, excess, m0, rows, n0, width, 1, 0);
    else if (r->stream) i8_store_plain(r, sums, excess, m0, rows, n0, width, 0, 1);
    else i8_store_plain(r, sums, excess, m0, rows, n0, width, 0, 0);
    return;
  }
#endif
  for (size_t t = 0; t < rows; t++) i8_store(r, sums + t * width, excess[t], m0 + t, n0, cols);
}

#ifdef BITNET_AMX
// `rows`, a multiple of 32, against panels p0 .. p1-1. As many panels as a core's cache keeps meet 32 rows after 32 rows: results are
// written along rows, which the hardware foresees, and AMX is so fast that it waits for little else.
static void i8_block_amx(const I8Result *r, const int8_t *q, const uint8_t *panels, const int32_t *excess, size_t m0, size_t rows,
                         size_t p0, size_t p1, size_t K) {
  size_t stride = ternary_groups(K) * I8_WIDTH * 4, step = I8_PANELS / stride / 2 * 2 + 2;
  for (size_t c0 = p0; c0 < p1; c0 += step) {
    size_t c1 = p1 - c0 < step ? p1 : c0 + step;
    for (size_t i = 0; i < rows; i += 32) {
      size_t p = c0;
      for (; p + 2 <= c1; p += 2) {
        int32_t sums[32 * 32] __attribute__((aligned(64)));
        for (size_t t = 0; r->residual && t < 32; t++) {
          const float *next = r->residual + (m0 + i + t) * r->N + p * I8_WIDTH;
          __builtin_prefetch(next);
          __builtin_prefetch(next + 16);
        }
        tile_i8_amx(sums, q + (m0 + i) * K, panels + (p - p0) * stride, K);
        i8_store_rows(r, sums, excess + i, m0 + i, 32, p * I8_WIDTH, 32);
      }
      for (size_t t = 0; t < 32 && p < c1; t++) {   // an odd last panel
        int32_t sums[I8_WIDTH];
        tile_i8(sums, q + (m0 + i + t) * K, panels + (p - p0) * stride, K, 1, 1);
        i8_store_rows(r, sums, excess + i + t, m0 + i + t, 1, p * I8_WIDTH, I8_WIDTH);
      }
    }
  }
}
#endif

// Rows m0 .. m0+rows-1 against panels p0 .. p1-1, which lie at `panels`. excess [rows]: the sum of each row's codes.
static void i8_block(const I8Result *r, const int8_t *q, const uint8_t *panels, const int32_t *excess, size_t m0, size_t rows,
                     size_t p0, size_t p1, size_t K) {
  size_t stride = ternary_groups(K) * I8_WIDTH * 4, done = 0;
#ifdef BITNET_AMX
  if (amx_ready()) i8_block_amx(r, q, panels, excess, m0, done = rows / 32 * 32, p0, p1, K);
#endif
  for (size_t p = p0; p < p1 && done < rows; p += 4) {
    size_t width = p1 - p < 4 ? p1 - p : 4, i = done;
    const uint8_t *w = panels + (p - p0) * stride;
    size_t n0 = p * I8_WIDTH, cols = r->N - n0 < width * I8_WIDTH ? r->N - n0 : width * I8_WIDTH;
    int32_t sums[I8_ROWS * 4 * I8_WIDTH];
    for (; width == 4 && i + I8_ROWS <= rows; i += I8_ROWS) {
      tile_i8(sums, q + (m0 + i) * K, w, K, I8_ROWS, 4);
      i8_store_rows(r, sums, excess + i, m0 + i, I8_ROWS, p * I8_WIDTH, 4 * I8_WIDTH);
    }
    for (; i < rows; i++) {
      if (width == 4) tile_i8(sums, q + (m0 + i) * K, w, K, 1, 4);
      else for (size_t j = 0; j < width; j++) tile_i8(sums + j * I8_WIDTH, q + (m0 + i) * K, w + j * stride, K, 1, 1);
      i8_store(r, sums, excess[i], m0 + i, n0, cols);
    }
  }
}

// The sum of K codes.
static int32_t codes_sum(const int8_t *q, size_t K) {
#ifdef BITNET_VNNI
  __m512i sums = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
  for (size_t k = 0; k < K; k += 64)
    sums = _mm512_dpbusd_epi32(sums, ones, _mm512_maskz_loadu_epi8(K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1, q + k));
  return _mm512_reduce_add_epi32(sums);
#else
  int32_t sum = 0;
  for (size_t k = 0; k < K; k++) sum += q[k];
  return sum;
#endif
}

// i8_block for at most I8_BLOCK rows of the whole matrix of codes q, whose sums it makes first.
static void i8_task(const I8Result *r, const int8_t *q, const uint8_t *panels, size_t m0, size_t rows, size_t p0, size_t p1, size_t K) {
  int32_t excess[I8_BLOCK];
  for (size_t i = 0; i < rows; i++) excess[i] = codes_sum(q + (m0 + i) * K, K);
  i8_block(r, q, panels, excess, m0, rows, p0, p1, K);
}

// Every thread calls this after its last i8_block: others see what was written past the caches.
static void i8_done(void) {
#ifdef BITNET_VNNI
  _mm_sfence();
#endif
}

// Rows of one tile.
static size_t i8_unit(void) {
  return amx_ready() ? 32 : I8_ROWS;
}

// How many of M rows are one task: at most I8_BLOCK. Each thread gets the same even share of neighbouring rows that it has in the loops over
// rows before and after a product, so that it finds them in its own cache.
static size_t i8_step(size_t M) {
  size_t threads = (size_t)thread_count(), unit = i8_unit(), most = I8_BLOCK / unit * unit;
  size_t share = padded_to((M + threads - 1) / threads, unit), tasks = (share + most - 1) / most;
  return padded_to((share + tasks - 1) / tasks, unit);
}

/*
out (=) [M,N] = (q w') * s[m] * gamma[n] + bias[n] + residual[m,n].
q [M,K] codes, s [M]; panels of w from ternary_pack_panels, gamma [N]; bias, residual or NULL. exact (or NULL) (=) [M,N] receives the
int32 sums themselves, for tests. Tasks are blocks of rows; where there are few rows, the columns are shared out as well.
*/
static void gemm_i8(float *out, int32_t *exact, const int8_t *q, const float *s, const uint8_t *panels, const float *gamma,
                    const float *bias, const float *residual, size_t M, size_t N, size_t K) {
  const I8Result r = i8_result(out, exact, s, gamma, bias, residual, M, N);
  size_t n_panels = (N + I8_WIDTH - 1) / I8_WIDTH, threads = (size_t)thread_count(), step = i8_step(M);
  size_t row_blocks = (M + step - 1) / step, quads = (n_panels + 3) / 4;
  size_t groups = row_blocks >= threads ? 1 : (2 * threads + row_blocks - 1) / row_blocks;
  if (groups > quads) groups = quads;
#pragma omp parallel
  {
    if (amx_ready()) amx_begin();
#pragma omp for schedule(static)
    for (size_t task = 0; task < row_blocks * groups; task++) {
      size_t m0 = task / groups * step, rows = M - m0 < step ? M - m0 : step;
      size_t p0 = task % groups * quads / groups * 4, p1 = (task % groups + 1) * quads / groups * 4;
      i8_task(&r, q, panels + p0 * ternary_groups(K) * I8_WIDTH * 4, m0, rows, p0, p1 < n_panels ? p1 : n_panels, K);
    }
    i8_done();
    if (amx_ready()) amx_end();
  }
}

// Rows of a result of N columns that a core's cache keeps beside the panels they came from: whole tiles.
static size_t i8_slice_rows(size_t N) {
  size_t unit = i8_unit(), rows = I8_SLICE / (N * sizeof(float)) / unit * unit, most = I8_BLOCK / unit * unit;
  return rows < unit ? unit : rows < most ? rows : most;
}

/*
One thread's part of a product whose rows are used as soon as they are there: out (=) [rows,N] from rows of q [rows,K], s [rows], else as
gemm_i8. rows: i8_slice_rows(N) at most. Every thread of the caller has called amx_begin.
*/
static void gemm_i8_slice(float *out, const int8_t *q, const float *s, const uint8_t *panels, const float *gamma, const float *bias,
                          size_t rows, size_t N, size_t K) {
  const I8Result r = {out, NULL, s, gamma, bias, NULL, N, 0};
  i8_task(&r, q, panels, 0, rows, 0, (N + I8_WIDTH - 1) / I8_WIDTH, K);
}

// Rows whose codes a thread holds at a time: I8_BLOCK, or as many as I8_ROUNDED bytes hold where rows are wide, at least one tile.
static size_t rounded_rows(size_t N) {
  size_t unit = i8_unit(), rows = I8_ROUNDED / padded_to(N, 64) / unit * unit, most = I8_BLOCK / unit * unit;
  return rows < unit ? unit : rows < most ? rows : most;
}

/*
dx (=) [M,K] = dy w, both operands integers: w in transposed panels (ternary_pack_transposed), dy [M,N] times gamma [N] rounded at random
to int8, with one scale for each row. A row of sums is exact, so no bit depends on the number of threads. key: of the random numbers;
scratch: gemm_i8_rounded_bytes(N, K): the codes of rounded_rows(N) rows for each thread, and K ones, for the outputs have no scale.
*/
static size_t gemm_i8_rounded_bytes(size_t N, size_t K) {
  return (size_t)thread_count() * rounded_rows(N) * padded_to(N, 64) + padded_to(K * sizeof(float), 64);
}

// One row of codes q (=) [N]; *sum (=) what they add up to. Returns the scale, NaN where the row is not finite. Plain: any machine, and
// what the tests compare with.
UNUSED static float round_row_scalar(int8_t *RESTRICT q, int32_t *sum, const float *RESTRICT dy, const float *RESTRICT gamma, size_t N,
                                     uint32_t key, uint32_t row) {
  float top = 0, bad = 0;
#pragma omp simd reduction(max : top) reduction(+ : bad)
  for (size_t n = 0; n < N; n++) {
    float a = fabsf(dy[n] * gamma[n]);
    top = a > top ? a : top;
    bad += a * 0.0f;
  }
  float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
#pragma omp simd
  for (size_t n = 0; n < N; n++) {
    float v = dy[n] * gamma[n] * inverse;
    v = v < 127.0f ? v : 127.0f;
    q[n] = (int8_t)noisy_code(v > -127.0f ? v : -127.0f, noise_at(key, row, (uint32_t)n, (uint32_t)N));
  }
  *sum = 0;
  for (size_t n = 0; n < N; n++) *sum += q[n];
  return top / 127.0f + bad;
}

#ifdef BITNET_VNNI
// Sixteen places, or fewer in `lanes`: noisy_code. Returns the codes.
static inline __attribute__((always_inline)) __m512i round16(int8_t *q, const float *dy, const float *gamma, __mmask16 lanes,
                                                             __m512i bits, __m512 inverse) {
  __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, dy), _mm512_maskz_loadu_ps(lanes, gamma)), inverse);
  v = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
  __m512i steps = _mm512_cvttps_epi32(_mm512_fmadd_ps(v, _mm512_set1_ps(65536), _mm512_set1_ps(8388608)));
  __m512i code = _mm512_srli_epi32(_mm512_add_epi32(steps, bits), 16);
  code = _mm512_maskz_sub_epi32(lanes, code, _mm512_set1_epi32(128));
  if (lanes == 0xFFFF) _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(code));
  else _mm_mask_storeu_epi8(q, lanes, _mm512_cvtepi32_epi8(code));
  return code;
}

// The words of noise_at. place: the number * 0x9E3779B1 of each.
static inline __attribute__((always_inline)) __m512i noise_words(__m512i place, __m512i key) {
  __m512i x = _mm512_xor_si512(place, key);
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32((int)0x85EBCA6Bu));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)), _mm512_set1_epi32((int)0xC2B2AE35u));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// What compilers make of the plain loops multiplies once more for each number, to find its place, and reads the codes again for their
// sum.
static float round_row(int8_t *RESTRICT q, int32_t *sum, const float *RESTRICT dy, const float *RESTRICT gamma, size_t N, uint32_t key,
                       uint32_t row) {
  __m512 top = _mm512_setzero_ps(), bad = top, top2 = top, bad2 = top;   // two of each: neither waits for itself
  for (size_t n = 0; n < N; n += 32) {
    __mmask16 lanes = lanes16(N - n), lanes2 = N - n > 16 ? lanes16(N - n - 16) : 0;
    __m512 a = _mm512_abs_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, dy + n), _mm512_maskz_loadu_ps(lanes, gamma + n)));
    __m512 b = _mm512_abs_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes2, dy + n + 16), _mm512_maskz_loadu_ps(lanes2, gamma + n + 16)));
    top = _mm512_max_ps(a, top);   // of a NaN and a number the second, so that NaN does not stay
    top2 = _mm512_max_ps(b, top2);
    bad = _mm512_fmadd_ps(a, _mm512_setzero_ps(), bad);
    bad2 = _mm512_fmadd_ps(b, _mm512_setzero_ps(), bad2);
  }
  top = _mm512_max_ps(top, top2);
  bad = _mm512_add_ps(bad, bad2);
  float highest = _mm512_reduce_max_ps(top);
  const __m512 inverse = _mm512_set1_ps(highest > 1e-30f ? 127.0f / highest : 0.0f);
  const __m512i golden = _mm512_set1_epi32((int)0x9E3779B1u), step = _mm512_slli_epi32(golden, 4), word = _mm512_set1_epi32((int)key);
  const __m512i low = _mm512_set1_epi32(0xFFFF);
  __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), sums = _mm512_setzero_si512();
  place = _mm512_mullo_epi32(_mm512_add_epi32(place, _mm512_set1_epi32((int)(row * (uint32_t)((N + 31) / 32 * 16)))), golden);
  size_t n = 0;
  for (; n + 32 <= N; n += 32, place = _mm512_add_epi32(place, step)) {
    __m512i bits = noise_words(place, word);
    sums = _mm512_add_epi32(sums, round16(q + n, dy + n, gamma + n, 0xFFFF, _mm512_and_si512(bits, low), inverse));
    sums = _mm512_add_epi32(sums, round16(q + n + 16, dy + n + 16, gamma + n + 16, 0xFFFF, _mm512_srli_epi32(bits, 16), inverse));
  }
  if (n < N) {
    __m512i bits = noise_words(place, word);
    sums = _mm512_add_epi32(sums, round16(q + n, dy + n, gamma + n, lanes16(N - n), _mm512_and_si512(bits, low), inverse));
    if (n + 16 < N)
      sums = _mm512_add_epi32(sums, round16(q + n + 16, dy + n + 16, gamma + n + 16, lanes16(N - n - 16), _mm512_srli_epi32(bits, 16), inverse));
  }
  *sum = _mm512_reduce_add_epi32(sums);
  return highest / 127.0f + _mm512_reduce_add_ps(bad);
}
#else
#define round_row round_row_scalar
#endif

static void gemm_i8_rounded(float *dx, const float *dy, const float *gamma, const uint8_t *panels, size_t M, size_t N, size_t K,
                            uint32_t key, void *scratch) {
  size_t threads = (size_t)thread_count(), stride = padded_to(N, 64), room = rounded_rows(N) * stride, step = i8_step(M);
  float *ones = (float *)((char *)scratch + threads * room);
  if (step > rounded_rows(N)) step = rounded_rows(N);
  for (size_t k = 0; k < K; k++) ones[k] = 1;
#pragma omp parallel
  {
    int8_t *q = (int8_t *)scratch + (size_t)thread_index() * room;
    float s[I8_BLOCK];
    int32_t excess[I8_BLOCK];
    if (amx_ready()) amx_begin();
#pragma omp for schedule(static)
    for (size_t m0 = 0; m0 < M; m0 += step) {
      size_t rows = M - m0 < step ? M - m0 : step;
      I8Result r = i8_result(dx + m0 * K, NULL, s, ones, NULL, NULL, M, K);
      for (size_t i = 0; i < rows; i++) {
        s[i] = round_row(q + i * N, &excess[i], dy + (m0 + i) * N, gamma, N, key, (uint32_t)(m0 + i));
      }
      i8_block(&r, q, panels, excess, 0, rows, 0, (K + I8_WIDTH - 1) / I8_WIDTH, N);
    }
    i8_done();
    if (amx_ready()) amx_end();
  }
}

#endif
