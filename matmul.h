/*
matmul.h: the inner products of the CPU. Nearly all the time of a training step is spent in this file and in matmul_i8.h.

What it is:  two products of floats, packed into panels and blocked for registers and caches:
               gemm            C = A B   B may be int8 codes; both products of the backward pass, the classifier, and the forward pass
                                         while lambda < 1
               block_product             what attention multiplies: small blocks that the caller has packed
             in several kernels, chosen when the program is compiled for the machine's instructions:
               fp32      vectors of the compiler, any machine
               bf16      AVX-512 BF16 of AMD, 2 products a lane
               bf16      ARM BF16, 2 x 2 x 4 in one instruction
               bf16      AMX, 16 x 16 x 32 in one instruction
             Without fast bf16 instructions the fp32 kernel multiplies numbers that were rounded to bf16 when they were packed.
What not:    integer products: matmul_i8.h. No policy and no shapes of the network; train_bitnet.c decides what is multiplied by what.
Read before: bitnet/ops.h.
Defines:     exp_fast; Product, gemm, gemm_scratch_bytes; pack_left, pack_right, left_put, block_product, transpose.

How a fast product works. A value that was loaded should be used as often as possible before it leaves the register. So C
is computed in tiles of mr x nr that live in registers: each step of the inner loop loads nr values of B and mr of A
and does mr*nr multiply-adds. To feed that loop with plain sequential loads, A and B are first copied ("packed") into
panels in exactly the order in which the tile will read them; the copy also converts (int8 -> float, float -> bf16),
transposes where the operand lies the other way, and multiplies scales in. A panel of A stays in the L1 cache while the panels of B
that it meets come from L2.

Determinism. Every element of C is summed over k in the same order, in blocks of kc, whatever the number of threads, the tile it
falls into or the number of rows beside it: edge tiles run the same kernel on panels padded with zeros.
*/
#ifndef BITNET_MATMUL_H
#define BITNET_MATMUL_H

#include "bitnet/ops.h"
#include "bitnet/utils.h"
#include "threads.h"
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
#include <arm_neon.h>
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

// What a tile of C that follows will need. It is fetched while this one is multiplied, a few lines at a time: all at once they would keep the
// panels waiting.
typedef struct {
  const float *c;      // where it writes
  const char *a;       // lines of the panel of A that comes next, and how many
  size_t lines;
} Next;

/*
A kernel: how panels are packed, and the product of two of them. Panels hold mr rows of A or nr columns of B, kc values of k at most.
Packing pads with zeros: rows and columns beyond the matrix, and k up to a multiple of k_step.
*/
typedef struct {
  size_t mr, nr, kc, k_step, bytes;   // bytes of an element in a panel
  void (*pack_a)(void *out, const Product *g, size_t i0, size_t p0, size_t kc);
  void (*pack_b)(void *out, const Product *g, size_t j0, size_t p0, size_t kc);
  // c [mr][nr], rows ldc apart: = a b, or += a b where load is set
  void (*tile)(float *c, size_t ldc, int load, const void *a, const void *b, size_t kc, const Next *next);
  int amx;
} Kernel;

enum {
  MR_MAX = 32, NR_MAX = 32, KC_MAX = 1024,
  MC = 1056,               // rows of A that a thread packs at a time, a multiple of every mr, and
  BC = 192 << 10,          // elements of B, which stay in its own cache
  PACKED = 16              // steps of k that go to all panels before the next, where memory lies that way
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

// One operand as packing sees it: element (x, k), where x is a row of A or a column of B, lies at x*sx + k*sk.
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

#ifdef BITNET_VNNI
static inline __m512 load16(const Operand *o, size_t at, __mmask16 lanes) {
  if (o->q) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, o->q + at)));
  if (o->h) return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, o->h + at)), 16);
  return _mm512_maskz_loadu_ps(lanes, o->f + at);
}
#endif

// ---- fp32: panels of A are [kc][MR], of B [kc][NR] ----

// Inlined, so that two of f, q, h are known not to be there, and that sx is 1 where it is. The rows of memory that a panel needs are read side
// by side, which the hardware foresees.
static inline __attribute__((always_inline)) void pack_as(float *RESTRICT out, const size_t W, const float *f, const int8_t *q,
                                                          const uint16_t *h, size_t sx, size_t sk, size_t nx, size_t n) {
  for (size_t k = 0; k < n; k++) {
    for (size_t x = 0; x < nx; x++) {
      size_t at = x * sx + k * sk;
      out[k * W + x] = f ? f[at] : q ? (float)q[at] : float_of_half(h[at]);
    }
  }
}

// out (=) [n][W]: W values of x from x0 on, n of k from k0 on. Plain: any machine, any strides.
static inline __attribute__((always_inline)) void pack_f32_plain(float *RESTRICT out, const size_t W, Operand o, size_t x0, size_t k0,
                                                                 size_t n, const int rounded) {
  size_t nx = o.nx - x0 < W ? o.nx - x0 : W, at = x0 * o.sx + k0 * o.sk;
  if (nx < W) memset(out, 0, n * W * sizeof(float));
  if (o.f && o.sx == 1 && nx == W) pack_as(out, W, o.f + at, NULL, NULL, 1, o.sk, W, n);
  else if (o.f) pack_as(out, W, o.f + at, NULL, NULL, o.sx, o.sk, nx, n);
  else if (o.q && o.sx == 1 && nx == W) pack_as(out, W, NULL, o.q + at, NULL, 1, o.sk, W, n);
  else if (o.q) pack_as(out, W, NULL, o.q + at, NULL, o.sx, o.sk, nx, n);
  else pack_as(out, W, NULL, NULL, o.h + at, o.sx, o.sk, nx, n);
  for (size_t k = 0; k < n && o.scale; k++) {
    for (size_t x = 0; x < W; x++) out[k * W + x] *= o.scale[k0 + k];
  }
  for (size_t i = 0; i < n * W && rounded; i++) out[i] = round_bf16(out[i]);
}

#ifdef BITNET_VNNI
// round_bf16 of sixteen.
static inline __m512 round16_bf16(__m512 x) {
  __m512i u = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  u = _mm512_and_si512(u, _mm512_set1_epi32((int)0xFFFF0000u));
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), (__m512)u);
}

// Strides that vectors cannot follow: one copy of the plain code will do.
static __attribute__((noinline)) void pack_f32_any(float *out, size_t W, const Operand *o, size_t x0, size_t k0, size_t n, int rounded) {
  pack_f32_plain(out, W, *o, x0, k0, n, rounded);
}

// The same for W = 12 or 32, sixteen numbers at a time, scaled and rounded between loading and storing.
static inline __attribute__((always_inline)) void pack_f32(float *out, const size_t W, Operand o, size_t x0, size_t k0, size_t n,
                                                           const int rounded) {
  const __mmask16 stored = W < 16 ? (1 << W) - 1 : 0xFFFF;
  if (o.sx != 1 && o.sk != 1) {
    pack_f32_any(out, W, &o, x0, k0, n, rounded);
    return;
  }
  if (o.nx > x0 + W) o.nx = x0 + W;
  for (size_t part = 0; part < W && o.sk == 1; part += 16) {   // rows of memory are rows of t: transpose
    size_t x = x0 + part, nx = x < o.nx ? o.nx - x : 0;
    for (size_t k = 0; k < n; k += 16) {
      __mmask16 lanes = lanes16(n - k);
      size_t steps = n - k < 16 ? n - k : 16;
      __m512 t[16];
      __m512 scale = o.scale ? _mm512_maskz_loadu_ps(lanes, o.scale + k0 + k) : _mm512_set1_ps(1);
      for (size_t i = 0; i < 16; i++) {
        t[i] = i < nx ? load16(&o, (x + i) * o.sx + k0 + k, lanes) : _mm512_setzero_ps();
        if (o.scale) t[i] = _mm512_mul_ps(t[i], scale);
        if (rounded) t[i] = round16_bf16(t[i]);
      }
      transpose16((__m512i *)t);
      for (size_t i = 0; i < steps; i++) _mm512_mask_storeu_ps(out + (k + i) * W + part, stored, t[i]);
    }
  }
  for (size_t k = 0; k < n && o.sk != 1; k++) {
    for (size_t part = 0; part < W; part += 16) {
      size_t x = x0 + part, nx = x < o.nx ? o.nx - x : 0;
      __m512 v = load16(&o, x + (k0 + k) * o.sk, lanes16(nx));
      if (o.f) __builtin_prefetch(o.f + x + (k0 + k + PACKED) * o.sk);   // the piece after this one
      if (o.scale) v = _mm512_mul_ps(v, _mm512_set1_ps(o.scale[k0 + k]));
      if (rounded) v = round16_bf16(v);
      _mm512_mask_storeu_ps(out + k * W + part, stored, v);
    }
  }
}
#else
#define pack_f32 pack_f32_plain
#endif

// Each call becomes code of its own: what an operand is, and whether it is scaled and rounded, is not asked in the loops.
static void pack_a_f32(void *panel, const Product *g, size_t i0, size_t p0, size_t kc) {
  Operand o = operand_a(g);
  float *out = (float *)panel;
  if (o.scale && g->precision == PRECISION_BF16) pack_f32(out, MR, o, i0, p0, kc, 1);
  else if (o.scale) pack_f32(out, MR, o, i0, p0, kc, 0);
  else if (g->precision == PRECISION_BF16) pack_f32(out, MR, o, i0, p0, kc, 1);
  else pack_f32(out, MR, o, i0, p0, kc, 0);
}

static void pack_b_f32(void *panel, const Product *g, size_t j0, size_t p0, size_t kc) {
  Operand o = operand_b(g);
  float *out = (float *)panel;
  if (o.q) pack_f32(out, NR, o, j0, p0, kc, 0);
  else if (o.h) pack_f32(out, NR, o, j0, p0, kc, 0);
  else if (g->precision == PRECISION_BF16) pack_f32(out, NR, o, j0, p0, kc, 1);
  else pack_f32(out, NR, o, j0, p0, kc, 0);
}

// The compiler keeps acc in MR*2 vector registers.
static void tile_f32(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc, const Next *next) {
  const float *RESTRICT a = (const float *)a_panel, *RESTRICT b = (const float *)b_panel;
  vfloat acc[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    acc[i][0] = load ? *(const vfloat_anywhere *)(c + (size_t)i * ldc) : (vfloat){0};
    acc[i][1] = load ? *(const vfloat_anywhere *)(c + (size_t)i * ldc + VL) : (vfloat){0};
  }
  size_t each = (next->lines * 16 + kc - 1) / kc, line = 0;
  for (size_t p0 = 0, row = 0; p0 < kc; p0 += 16, row++) {
    size_t p1 = p0 + 16 < kc ? p0 + 16 : kc, end = line + each < next->lines ? line + each : next->lines;
    for (; line < end; line++) __builtin_prefetch(next->a + 64 * line);
    if (row < MR) {
      __builtin_prefetch(next->c + row * ldc, 1);
      __builtin_prefetch(next->c + row * ldc + VL, 1);
    }
#pragma GCC unroll 2   // counting takes slots of the units that multiply
    for (size_t p = p0; p < p1; p++) {
      vfloat b0 = *(const vfloat *)(b + p * NR), b1 = *(const vfloat *)(b + p * NR + VL);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        acc[i][0] += a[p * MR + i] * b0;
        acc[i][1] += a[p * MR + i] * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    *(vfloat_anywhere *)(c + (size_t)i * ldc) = acc[i][0];
    *(vfloat_anywhere *)(c + (size_t)i * ldc + VL) = acc[i][1];
  }
}

static const Kernel kernel_f32 = {MR, NR, 1024, 1, sizeof(float), pack_a_f32, pack_b_f32, tile_f32, 0};

// ---- bf16: two neighbouring k share a 32-bit word; panels are words ----

#if defined(BITNET_VNNI) && (defined(BITNET_BF16) || defined(BITNET_AMX))
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

static void tile_bf16(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc, const Next *next) {
  (void)next;
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

static const Kernel kernel_bf16 = {BF_MR, 32, 1024, 32, 2, pack_a_bf16, pack_b_bf16, tile_bf16, 0};
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
static void tile_bf16(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc, const Next *next) {
  (void)next;
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

static const Kernel kernel_bf16 = {BF_MR, BF_MR, 1024, 4, 2, pack_a_bf16, pack_b_bf16, tile_bf16, 0};
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
static void tile_amx(float *c, size_t ldc, int load, const void *a_panel, const void *b_panel, size_t kc, const Next *next) {
  (void)next;
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

static const Kernel kernel_amx = {32, 32, 512, 32, 2, pack_a_amx, pack_b_amx, tile_amx, 1};
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

/*
Bytes of scratch for a product whose three sizes are these, in any order: for each thread MC rows of A, or all, and BC elements of B.
*/
static size_t gemm_scratch_bytes(size_t x, size_t y, size_t z) {
  size_t most = x > y ? x : y;
  if (z > most) most = z;
  most = (most + 31) / 32 * 32 + MR_MAX;
  return (size_t)thread_count() * ((most < MC ? most : (size_t)MC) * (most < KC_MAX ? most : (size_t)KC_MAX) + BC) * sizeof(float);
}

// One tile of C. Inside the matrix the kernel works in place; at its edges on a copy, of which the valid part is put back.
static void gemm_tile(const Kernel *k, const Product *g, size_t i0, size_t j0, int load, const void *a, const void *b, size_t kc,
                      const Next *next) {
  size_t rows = g->M - i0 < k->mr ? g->M - i0 : k->mr, cols = g->N - j0 < k->nr ? g->N - j0 : k->nr;
  float *c = g->C + i0 * g->N + j0;
  if (rows == k->mr && cols == k->nr) {
    k->tile(c, g->N, load, a, b, kc, next);
    return;
  }
  float copy[MR_MAX * NR_MAX] __attribute__((aligned(64)));
  if (load) {
    memset(copy, 0, sizeof copy);
    for (size_t i = 0; i < rows; i++) memcpy(copy + i * k->nr, c + i * g->N, cols * sizeof(float));
  }
  k->tile(copy, k->nr, load, a, b, kc, next);
  for (size_t i = 0; i < rows; i++) memcpy(c + i * g->N, copy + i * k->nr, cols * sizeof(float));
}

// Adds bias and residual to rows i0 .. i1-1, columns j0 .. j1-1 of the finished product, those of them that it has.
static void gemm_finish(const Product *g, size_t i0, size_t i1, size_t j0, size_t j1) {
  if (i1 > g->M) i1 = g->M;
  if (j1 > g->N) j1 = g->N;
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

// How many of the threads stand side by side in C, the others below them: with M/down rows and N/across columns for each, what each has
// to pack is least.
static size_t gemm_across(size_t M, size_t N, size_t threads) {
  size_t best = 1;
  for (size_t across = 2; across <= threads; across++) {
    if (threads % across == 0 && M * across / threads + N / across < M * best / threads + N / best) best = across;
  }
  return best;
}

// Panels r0 .. r1-1 of A, `panel` bytes each, kc values of k from k0 on. Where a column of A lies along memory, a few steps of k go to all
// panels before the next few: each row of memory is read once, from its beginning to its end. (bf16 panels want 32 steps at a time
// and their kernels gain nothing by it.)
static void gemm_pack_a(const Kernel *k, char *a, const Product *g, size_t r0, size_t r1, size_t k0, size_t kc, size_t panel) {
  size_t step = g->a_row == 1 && k->bytes == sizeof(float) ? (size_t)PACKED : kc;
  for (size_t at = 0; at < kc; at += step) {
    for (size_t r = r0; r < r1; r++)
      k->pack_a(a + (r - r0) * panel + at * k->mr * k->bytes, g, r * k->mr, k0 + at, kc - at < step ? kc - at : step);
  }
}

// The same for panels q0 .. q1-1 of B.
static void gemm_pack_b(const Kernel *k, char *b, const Product *g, size_t q0, size_t q1, size_t k0, size_t kc, size_t panel) {
  size_t step = g->b_col == 1 && k->bytes == sizeof(float) ? (size_t)PACKED : kc;
  for (size_t at = 0; at < kc; at += step) {
    for (size_t q = q0; q < q1; q++)
      k->pack_b(b + (q - q0) * panel + at * k->nr * k->bytes, g, q * k->nr, k0 + at, kc - at < step ? kc - at : step);
  }
}

/*
One thread's part of C, panels r0 .. r1-1 of A (MC rows at most) by q0 .. q1-1 of B. For kc values of k after kc, A is packed, then as many
panels of B as stay in the core's own cache. Each panel of A meets all of these; the next one is fetched meanwhile, for all of A lies in a
farther cache. kc is large, so that C is seldom loaded and stored.
*/
static void gemm_part(const Kernel *k, const Product *g, char *a, char *b, size_t r0, size_t r1, size_t q0, size_t q1) {
  for (size_t k0 = 0; k0 < g->K; k0 += k->kc) {
    size_t kc = g->K - k0 < k->kc ? g->K - k0 : k->kc, padded = (kc + k->k_step - 1) / k->k_step * k->k_step;
    size_t a_bytes = padded * k->mr * k->bytes, b_bytes = padded * k->nr * k->bytes, panels = BC / (padded * k->nr);
    gemm_pack_a(k, a, g, r0, r1, k0, kc, a_bytes);
    for (size_t qq = q0, end; qq < q1; qq = end) {
      end = q1 - qq < panels ? q1 : qq + panels;
      gemm_pack_b(k, b, g, qq, end, k0, kc, b_bytes);
      for (size_t r = r0; r < r1; r++) {
        size_t below = r + 1 < r1 ? r + 1 : r0, lines = a_bytes / 64 / (end - qq);
        for (size_t q = qq; q < end; q++) {
          size_t at = q + 1 < end ? r * k->mr * g->N + (q + 1) * k->nr : below * k->mr * g->N + qq * k->nr;
          Next next = {g->C + at, a + (below - r0) * a_bytes + (q - qq) * lines * 64, lines};
          gemm_tile(k, g, r * k->mr, q * k->nr, g->accumulate || k0 > 0, a + (r - r0) * a_bytes, b + (q - qq) * b_bytes, kc, &next);
        }
      }
      if (k0 + kc == g->K && (g->bias || g->residual)) gemm_finish(g, r0 * k->mr, r1 * k->mr, qq * k->nr, end * k->nr);
    }
  }
}

/*
Threads share C out in rows and columns, and each packs for itself what it multiplies: panels that two threads pack together have to travel
from one core's cache to the other's, which takes longer than to pack them twice.

The sums run over k in pieces of kc from 0 on, however the rest is cut: no bit depends on the number of threads.
scratch: gemm_scratch_bytes(M, N, K), aligned to 64.
*/
static void gemm_by(const Kernel *k, const Product *g, void *scratch) {
  size_t threads = (size_t)thread_count(), rows = (g->M + k->mr - 1) / k->mr, columns = (g->N + k->nr - 1) / k->nr;
  size_t across = gemm_across(g->M, g->N, threads), down = threads / across, room = gemm_scratch_bytes(g->M, g->N, g->K) / threads;
#pragma omp parallel
  {
    kernel_begin(k);
    char *b = (char *)scratch + (size_t)thread_index() * room, *a = b + BC * sizeof(float);
#pragma omp for schedule(static)
    for (size_t task = 0; task < threads; task++) {
      size_t first = rows * (task / across) / down, mine = rows * (task / across + 1) / down - first;
      size_t q0 = columns * (task % across) / across, q1 = columns * (task % across + 1) / across;
      size_t blocks = (mine * k->mr + MC - 1) / MC;
      for (size_t block = 0; block < blocks && q0 < q1; block++)
        gemm_part(k, g, a, b, first + mine * block / blocks, first + mine * (block + 1) / blocks, q0, q1);
    }
    kernel_end(k);
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
    for (size_t j = 0; j < N; j += k->nr) {
      Next next = {c + i * ldc + j + k->nr, NULL, 0};
      k->tile(c + i * ldc + j, ldc, load, (const char *)left + left_bytes(k, i, left_K), (const char *)right + right_bytes(k, K, j), K, &next);
    }
  }
}

#endif
