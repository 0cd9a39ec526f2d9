/*
matmul.h: the inner products of the CPU. Nearly all the time of a training step is spent in this file.

What it is:  two products, each packed into panels and blocked for registers and caches:
               gemm_f32   C = A B       float operands, B may be int8 codes; all three products of the backward pass
               gemm_i8    y = q w'      int8 activations times ternary weights, summed in int32: the forward at lambda = 1
What not:    no policy and no shapes of the network; train_bitnet.c decides what is multiplied by what.
Read before: bitnet/ops.h.
Defines:     exp_fast; Product, gemm_f32, gemm_scratch_bytes; ternary_panel_bytes, ternary_pack_panels, gemm_i8.

How a fast product works. A value that was loaded should be used as often as possible before it leaves the register. So C
is computed in tiles of MR x NR that live in registers: each step of the inner loop loads NR values of B and MR of A
and does MR*NR multiply-adds. To feed that loop with plain sequential loads, A and B are first copied ("packed") into
panels in exactly the order in which the tile will read them; the copy also converts (int8 -> float, float -> bf16
precision), transposes where the operand lies the other way, and multiplies scales in. A block of A is small enough for
the L2 cache, a panel of B for L1.

Determinism. Every element of C is summed over k in the same order, in blocks of KC, whatever the number of threads, the tile it
falls into or the number of rows beside it: edge tiles run the same kernel on panels padded with zeros.
*/
#ifndef BITNET_MATMUL_H
#define BITNET_MATMUL_H

#include "bitnet/ops.h"
#include "bitnet/utils.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__) && !defined(BITNET_SCALAR)
#include <immintrin.h>
#define BITNET_VNNI 1
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
enum { VL = VBYTES / sizeof(float), NR = 2 * VL, KC = 256, MC = 8 * MR, NC = 64 * NR };

static int thread_count(void) {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

static int thread_index(void) {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

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
  const int8_t *B_codes;       //   the same in int8 codes
  size_t b_row, b_col;
  float *C;                    // C[i*N + j]
  int accumulate;              // 0: C = ..., 1: C += ...
  const float *bias;           // [N] or NULL, added at the end
  const float *residual;       // [M,N] or NULL, added at the end; must not be C
  int precision;               // PRECISION_BF16: operands are rounded to bf16 as they are packed (sums stay fp32)
} Product;

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

// Bytes of scratch for any product: one packed block of B, shared, and one block of A for each thread.
static size_t gemm_scratch_bytes(void) {
  return ((size_t)KC * NC + (size_t)thread_count() * MC * KC) * sizeof(float);
}

// One panel of A: rows i0 .. i0+MR-1, columns p0 .. p0+kc-1, laid out [kc][MR]; missing rows are zeros.
static void pack_a(float *RESTRICT out, const Product *g, size_t i0, size_t p0, size_t kc) {
  size_t rows = g->M - i0 < MR ? g->M - i0 : MR;
  if (rows < MR) memset(out, 0, kc * MR * sizeof(float));
  for (size_t i = 0; i < rows; i++) {
    const float *a = g->A + (i0 + i) * g->a_row + p0 * g->a_col;
    for (size_t p = 0; p < kc; p++) out[p * MR + i] = a[p * g->a_col];
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

// One panel of B: columns j0 .. j0+NR-1, rows p0 .. p0+kc-1, laid out [kc][NR]; missing columns are zeros.
static void pack_b(float *RESTRICT out, const Product *g, size_t j0, size_t p0, size_t kc) {
  size_t cols = g->N - j0 < NR ? g->N - j0 : NR;
  size_t first = p0 * g->b_row + j0 * g->b_col;
  if (cols < NR) memset(out, 0, kc * NR * sizeof(float));
  if (g->b_col == 1) {   // rows of B are contiguous: copy along them
    for (size_t p = 0; p < kc; p++) {
      if (g->B) {
        for (size_t j = 0; j < cols; j++) out[p * NR + j] = g->B[first + p * g->b_row + j];
      } else {
        for (size_t j = 0; j < cols; j++) out[p * NR + j] = (float)g->B_codes[first + p * g->b_row + j];
      }
    }
  } else {               // columns are contiguous: transpose
    for (size_t j = 0; j < cols; j++) {
      if (g->B) {
        for (size_t p = 0; p < kc; p++) out[p * NR + j] = g->B[first + p * g->b_row + j * g->b_col];
      } else {
        for (size_t p = 0; p < kc; p++) out[p * NR + j] = (float)g->B_codes[first + p * g->b_row + j * g->b_col];
      }
    }
  }
  if (g->precision == PRECISION_BF16 && g->B) {
    for (size_t k = 0; k < kc * NR; k++) out[k] = round_bf16(out[k]);
  }
}

// The register tile: tile (=) [MR][NR] = panel of A times panel of B. The compiler keeps c in MR*2 vector registers.
static void tile_f32(float *RESTRICT tile, const float *RESTRICT a, const float *RESTRICT b, size_t kc) {
  vfloat c[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = (vfloat){0};
  for (size_t p = 0; p < kc; p++) {
    vfloat b0 = *(const vfloat *)(b + p * NR), b1 = *(const vfloat *)(b + p * NR + VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      c[i][0] += a[p * MR + i] * b0;
      c[i][1] += a[p * MR + i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    *(vfloat *)(tile + i * NR) = c[i][0];
    *(vfloat *)(tile + i * NR + VL) = c[i][1];
  }
}

// Puts a finished tile into C: the first block of k replaces (unless accumulating), later ones add, the last one also adds
// bias and residual.
static void tile_store(const Product *g, const float *RESTRICT tile, size_t i0, size_t j0, int first, int last) {
  size_t rows = g->M - i0 < MR ? g->M - i0 : MR, cols = g->N - j0 < NR ? g->N - j0 : NR;
  for (size_t i = 0; i < rows; i++) {
    float *RESTRICT c = g->C + (i0 + i) * g->N + j0;
    const float *RESTRICT t = tile + i * NR;
    if (first && !g->accumulate) {
      for (size_t j = 0; j < cols; j++) c[j] = t[j];
    } else {
      for (size_t j = 0; j < cols; j++) c[j] += t[j];
    }
    if (last && g->bias) {
      for (size_t j = 0; j < cols; j++) c[j] += g->bias[j0 + j];
    }
    if (last && g->residual) {
      const float *RESTRICT r = g->residual + (i0 + i) * g->N + j0;
      for (size_t j = 0; j < cols; j++) c[j] += r[j];
    }
  }
}

/*
The loops around the tile (the scheme of GotoBLAS): a block of B, KC x NC, is packed by all threads together; then each thread takes
blocks of rows of A, packs them for itself and runs over the tiles. scratch: gemm_scratch_bytes().
*/
static void gemm_f32(const Product *g, float *scratch) {
  float *b_block = scratch, *a_blocks = scratch + (size_t)KC * NC;
  // Small outputs get small blocks of rows, so that every thread has work; the result does not depend on it.
  size_t mc = (g->M / (size_t)(2 * thread_count()) / MR + 1) * MR;
  if (mc > MC) mc = MC;
  for (size_t j0 = 0; j0 < g->N; j0 += NC) {
    size_t nc = g->N - j0 < NC ? g->N - j0 : NC, b_panels = (nc + NR - 1) / NR;
    for (size_t p0 = 0; p0 < g->K; p0 += KC) {
      size_t kc = g->K - p0 < KC ? g->K - p0 : KC;
      int first = p0 == 0, last = p0 + kc == g->K;
#pragma omp parallel
      {
#pragma omp for schedule(static)
        for (size_t q = 0; q < b_panels; q++) pack_b(b_block + q * kc * NR, g, j0 + q * NR, p0, kc);
        float *a_block = a_blocks + (size_t)thread_index() * MC * KC;
#pragma omp for schedule(static)
        for (size_t i0 = 0; i0 < g->M; i0 += mc) {
          size_t a_panels = ((g->M - i0 < mc ? g->M - i0 : mc) + MR - 1) / MR;
          for (size_t q = 0; q < a_panels; q++) pack_a(a_block + q * kc * MR, g, i0 + q * MR, p0, kc);
          for (size_t q = 0; q < b_panels; q++) {
            for (size_t r = 0; r < a_panels; r++) {
              float tile[MR * NR] __attribute__((aligned(64)));
              tile_f32(tile, a_block + r * kc * MR, b_block + q * kc * NR, kc);
              tile_store(g, tile, i0 + r * MR, j0 + q * NR, first, last);
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
/*
Integer products: int8 activations times ternary weights.

Weights are packed once per optimizer step, when they are quantised. A panel is 16 outputs wide; four values of k lie side by side,
because the byte dot product multiplies four pairs at once and adds them into one int32 lane:

    panel[k/4][16 outputs][4]   as unsigned bytes code + 1 in {0, 1, 2}

The instruction wants one unsigned operand; with code + 1 the sum comes out too large by sum_k q[k], the same for every output, which
is subtracted once per row. Sums are exact: |sum| <= 3 * 127 * K < 2^31 for K below five million.
*/
enum { I8_WIDTH = 16, I8_ROWS = 6 };

static size_t ternary_panel_bytes(size_t N, size_t K) {
  return (N + I8_WIDTH - 1) / I8_WIDTH * ((K + 3) / 4) * (I8_WIDTH * 4);
}

// panels (=) from codes [N,K]; outputs and inputs beyond the matrix become 0, which adds nothing.
static void ternary_pack_panels(uint8_t *panels, const int8_t *codes, size_t N, size_t K) {
  size_t groups = (K + 3) / 4, n_panels = (N + I8_WIDTH - 1) / I8_WIDTH;
#pragma omp parallel for schedule(static)
  for (size_t panel = 0; panel < n_panels; panel++) {
    uint8_t *out = panels + panel * groups * I8_WIDTH * 4;
    memset(out, 0, groups * I8_WIDTH * 4);
    for (size_t lane = 0; lane < I8_WIDTH && panel * I8_WIDTH + lane < N; lane++) {
      const int8_t *row = codes + (panel * I8_WIDTH + lane) * K;
      for (size_t k = 0; k < K; k++) out[(k / 4 * I8_WIDTH + lane) * 4 + k % 4] = (uint8_t)(row[k] + 1);
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
panels. Called with constant rows and n_panels, so that each call site becomes its own unrolled kernel. First with the byte dot
product, then its twin in plain C: all of it on other machines, and what the tests compare the fast one with.
*/
#ifdef BITNET_VNNI
static inline __attribute__((always_inline)) void tile_i8(int32_t *sums, const int8_t *q, const uint8_t *panels, size_t K,
                                                          const int rows, const int n_panels) {
  size_t groups = (K + 3) / 4, full = K / 4;
  __m512i acc[I8_ROWS][4];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < n_panels; j++) acc[i][j] = _mm512_setzero_si512();
  }
  for (size_t g = 0; g < groups; g++) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int j = 0; j < n_panels; j++) w[j] = _mm512_loadu_si512(panels + ((size_t)j * groups + g) * 64);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      int32_t word;
      if (g < full) memcpy(&word, q + (size_t)i * K + 4 * g, 4);
      else word = four_codes(q + (size_t)i * K, 4 * g, K);
      __m512i a = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int j = 0; j < n_panels; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], w[j], a);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < n_panels; j++) _mm512_storeu_si512(sums + (i * n_panels + j) * I8_WIDTH, acc[i][j]);
  }
}
#else
#define tile_i8 tile_i8_scalar
#endif

UNUSED static inline void tile_i8_scalar(int32_t *sums, const int8_t *q, const uint8_t *panels, size_t K, const int rows, const int n_panels) {
  size_t groups = (K + 3) / 4;
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < n_panels; j++) {
      int32_t *acc = sums + (i * n_panels + j) * I8_WIDTH;
      memset(acc, 0, I8_WIDTH * sizeof *acc);
      for (size_t g = 0; g < groups; g++) {
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

/*
out (=) [M,N] = (q w') * s[m] * gamma[n] + bias[n] + residual[m,n].
q [M,K] codes, s [M]; panels of w from ternary_pack_panels, gamma [N]; bias, residual or NULL. exact (or NULL) (=) [M,N] receives the
int32 sums themselves, for tests.
*/
static void gemm_i8(float *out, int32_t *exact, const int8_t *q, const float *s, const uint8_t *panels, const float *gamma,
                    const float *bias, const float *residual, size_t M, size_t N, size_t K) {
  size_t groups = (K + 3) / 4, n_panels = (N + I8_WIDTH - 1) / I8_WIDTH;
  size_t row_blocks = (M + I8_ROWS - 1) / I8_ROWS, col_blocks = (n_panels + 3) / 4;
  // Tasks go row block by row block when there are many rows (activations stay in L1); a few rows are split by columns.
#pragma omp parallel for schedule(static)
  for (size_t task = 0; task < row_blocks * col_blocks; task++) {
    size_t m0 = task / col_blocks * I8_ROWS, p0 = task % col_blocks * 4;
    int rows = (int)(M - m0 < I8_ROWS ? M - m0 : I8_ROWS), width = (int)(n_panels - p0 < 4 ? n_panels - p0 : 4);
    const uint8_t *w = panels + p0 * groups * I8_WIDTH * 4;
    int32_t sums[I8_ROWS * 4 * I8_WIDTH];
    if (rows == I8_ROWS && width == 4) {
      tile_i8(sums, q + m0 * K, w, K, I8_ROWS, 4);
    } else {
      for (int i = 0; i < rows; i++) {
        for (int j = 0; j < width; j++) {
          tile_i8(sums + (i * width + j) * I8_WIDTH, q + (m0 + (size_t)i) * K, w + (size_t)j * groups * I8_WIDTH * 4, K, 1, 1);
        }
      }
    }
    for (int i = 0; i < rows; i++) {
      size_t m = m0 + (size_t)i, n0 = p0 * I8_WIDTH, cols = N - n0 < (size_t)width * I8_WIDTH ? N - n0 : (size_t)width * I8_WIDTH;
      int32_t excess = 0;   // sum of q: what "code + 1" added to every output
      for (size_t k = 0; k < K; k++) excess += q[m * K + k];
      const int32_t *RESTRICT sum = sums + i * width * I8_WIDTH;
      float *RESTRICT o = out + m * N + n0;
      for (size_t n = 0; n < cols; n++) o[n] = (float)(sum[n] - excess) * (s[m] * gamma[n0 + n]);
      if (bias) {
        for (size_t n = 0; n < cols; n++) o[n] += bias[n0 + n];
      }
      if (residual) {
        const float *RESTRICT r = residual + m * N + n0;
        for (size_t n = 0; n < cols; n++) o[n] += r[n];
      }
      if (exact) {
        for (size_t n = 0; n < cols; n++) exact[m * N + n0 + n] = sum[n] - excess;
      }
    }
  }
}

#endif
