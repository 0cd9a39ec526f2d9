/*
matmul_i8.h: the integer products of the CPU, int8 activations times ternary weights: the forward pass at lambda = 1, and the gradients of
inputs where they were rounded to int8.

What it is:  gemm_i8          y = q w', summed in int32, scaled as it is stored
             gemm_i8_slice    the same for a few rows that their thread uses at once
             gemm_i8_rounded  dx = dy w: rows of dy are rounded at random to int8 first
             each in several kernels, chosen when the program is compiled: plain C, any machine; vectors.h (AVX-512, AVX-VNNI, AVX2, NEON);
             AMX, 16 x 16 x 64 in one instruction.
What not:    weights of 2 bits and fewer, as inference reads them: packed.h. No policy: train_bitnet.c decides what is multiplied by what.
Read before: matmul.h, whose blocks and tiles these are, in integers; vectors.h.
Defines:     ternary_panel_bytes, ternary_pack_panels, ternary_pack_transposed, codes_sum, gemm_i8, i8_slice_rows, gemm_i8_slice,
             gemm_i8_rounded.
*/
#ifndef BITNET_MATMUL_I8_H
#define BITNET_MATMUL_I8_H

#include "matmul.h"
#include "quant.h"
#include "vectors.h"

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
  I8_BLOCK = 512,        // rows that a thread takes at a time; with AMX half as many
  I8_ROUNDED = 1 << 20,  // bytes of codes that it makes of a gradient at a time
  I8_CACHE = 5 << 20,    // bytes of a result for each thread that the caches keep until they are used, and
  I8_STREAM = 1 << 20,   // of the residual stream, which is not used before all of it is there
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
// Without AMX there is time to read it while tiles are multiplied (tile_i8_store).
static I8Result i8_result(float *out, int32_t *exact, const float *s, const float *gamma, const float *bias, const float *residual,
                          size_t M, size_t N) {
  size_t bytes = M * N * sizeof(float), most = residual ? (size_t)I8_STREAM : (size_t)thread_count() * I8_CACHE;
  int whole = (uintptr_t)out % 64 == 0 && N % 16 == 0, past = bytes > most && (residual || amx_ready());
  I8Result r = {out, exact, s, gamma, bias, residual, N, whole && past};
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
// Sixteen exact sums where they belong, without bias: what training does. residual: NULL or what is added; stream: see I8Result. Both are
// constants where this is called, so that nothing is asked within the loops.
static inline __attribute__((always_inline)) void i8_put(float *out, __m512i exact, __m512 s, const float *gamma, const float *residual,
                                                         const int stream) {
  __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(s, _mm512_loadu_ps(gamma)));
  if (residual) x = _mm512_add_ps(rounded_here(x), _mm512_loadu_ps(residual));
  if (stream) _mm512_stream_ps(out, x);
  else _mm512_storeu_ps(out, x);
}

// i8_store for `rows` rows of `width` sums that all count.
static inline __attribute__((always_inline)) void i8_store_plain(const I8Result *r, const int32_t *sums, const int32_t *excess, size_t m0,
                                                                 size_t rows, size_t n0, const size_t width, const int residual,
                                                                 const int stream) {
  for (size_t t = 0; t < rows; t++, sums += width) {
    size_t at = (m0 + t) * r->N + n0;
    __m512i too_much = _mm512_set1_epi32(excess[t]);
    __m512 s = _mm512_set1_ps(r->s[m0 + t]);
#pragma GCC unroll 4
    for (size_t n = 0; n < width; n += 16) {
      __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sums + n), too_much);
      i8_put(r->out + at + n, exact, s, r->gamma + n0 + n, residual ? r->residual + at + n : NULL, stream);
    }
  }
}

/*
tile_i8 for I8_ROWS rows, four panels and K a multiple of four, with the epilogue in it: sums begin at minus the excess and are stored as
results, without a way through memory. The lines that the tile below this one will write, and what will be added there, are fetched on the
way, a few every eight steps: all at once they would keep the panels waiting. The empty instructions keep gcc from seeing that sums begin
alike, and from moving the epilogue's loads up: either makes it run out of registers inside the loop.
*/
static inline __attribute__((always_inline)) void tile_i8_store(const I8Result *r, const int8_t *q, const uint8_t *panels,
                                                                const int32_t *excess, size_t m0, size_t n0, size_t K, const int residual,
                                                                const int stream) {
  ivec acc[I8_ROWS][8];
#pragma GCC unroll 8
  for (int i = 0; i < I8_ROWS; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      acc[i][v] = _mm512_set1_epi32(-excess[i]);
      __asm__("" : "+v"(acc[i][v]));
    }
  }
  const size_t stride = ternary_groups(K) * 64, groups = K / 4, lines = I8_ROWS * 4, each = (8 * lines + groups - 1) / groups;
  const size_t below = (m0 + I8_ROWS) * r->N + n0;
  for (size_t g0 = 0, line = 0; g0 < groups; g0 += 8) {
    size_t g1 = groups - g0 < 8 ? groups : g0 + 8, end = line + each < lines ? line + each : lines;
    for (; line < end; line++) {
      size_t at = below + line / 4 * r->N + line % 4 * 16;
      if (!stream) __builtin_prefetch(r->out + at, 1);
      if (residual) __builtin_prefetch(r->residual + at);
    }
#pragma GCC unroll 4   // see tile_f32
    for (size_t g = g0; g < g1; g++) tile_step(acc, panels + g * 64, stride, 0, q + 4 * g, K, I8_ROWS, 4);
  }
#pragma GCC unroll 8
  for (int i = 0; i < I8_ROWS; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) __asm__ volatile("" : "+v"(acc[i][v]) : : "memory");
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < I8_ROWS; i++) {
    size_t at = (m0 + i) * r->N + n0;
    __m512 s = _mm512_set1_ps(r->s[m0 + i]);
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++)
      i8_put(r->out + at + 16 * v, acc[i][v], s, r->gamma + n0 + 16 * v, residual ? r->residual + at + 16 * v : NULL, stream);
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
#ifdef BITNET_VNNI
      if (cols == 4 * I8_WIDTH && K % 4 == 0 && !r->bias && !r->exact) {
        const int8_t *a = q + (m0 + i) * K;
        if (r->residual && r->stream) tile_i8_store(r, a, w, excess + i, m0 + i, n0, K, 1, 1);
        else if (r->residual) tile_i8_store(r, a, w, excess + i, m0 + i, n0, K, 1, 0);
        else if (r->stream) tile_i8_store(r, a, w, excess + i, m0 + i, n0, K, 0, 1);
        else tile_i8_store(r, a, w, excess + i, m0 + i, n0, K, 0, 0);
        continue;
      }
#endif
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

// Rows that a thread takes at a time, at most: whole tiles.
static size_t i8_most(void) {
  return (amx_ready() ? I8_BLOCK / 2 : I8_BLOCK) / i8_unit() * i8_unit();
}

// How many of M rows are one task. Each thread gets the same even share of neighbouring rows that it has in the loops over
// rows before and after a product, so that it finds them in its own cache.
static size_t i8_step(size_t M) {
  size_t threads = (size_t)thread_count(), unit = i8_unit(), most = i8_most();
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
  size_t unit = i8_unit(), rows = I8_SLICE / (N * sizeof(float)) / unit * unit, most = i8_most();
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

// Rows whose codes a thread holds at a time: i8_most(), or as many as I8_ROUNDED bytes hold where rows are wide, at least one tile.
static size_t rounded_rows(size_t N) {
  size_t unit = i8_unit(), rows = I8_ROUNDED / padded_to(N, 64) / unit * unit, most = i8_most();
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
