/*
train_bitnet.c: THE TUTORIAL. Every operation of a BitNet b1.58 language model on the CPU, forward beside its
handwritten backward, in the order in which a token meets them on its way through the network.

What it is:  the CPU side of bitnet/ops.h, and a main of a few lines.
What not:    the model (bitnet/model.h puts these operations in a row), the training loop (bitnet/trainer.h), the fast inner
             products (matmul.h), the formulas of the quantisers (quant.h).
Read before: bitnet/ops.h, which states the shapes and who overwrites and who adds.
Read after:  bitnet/model.h, modes/pretrain.h.

A training step is this, and nothing else:
    forward    tokens -> embedding -> L times [norm, attention, norm, feed-forward] -> norm -> logits -> loss
    backward   the same list from the end to the start; each function turns "gradient of its output" into "gradient of its
               inputs and parameters"
    update     AdamW moves the float master weights; the ternary weights of the next step are rounded from them

Derivations stand above the backward functions. Notation: dy means the gradient of the loss with respect to y; sums over rows are
over all tokens of the batch. Every loop over rows is parallel; every sum across rows is cut into blocks whose size
depends on the shape only and folded in order, so the result has the same bits for any number of threads.
*/
#include "bitnet/ops.h"        // the contract that this file implements
#include "bitnet/utils.h"      // die, memory, random numbers, time
#include "matmul.h"            // exp_fast, gemm
#include "matmul_i8.h"         // gemm_i8, ternary_pack_panels
#include "packed.h"            // packed_i8, gemm_few, screen_argmax: what only inference needs
#include "peaks.h"             // dev_peaks: what the machine can do
#include "quant.h"             // ternary_gamma, ternary_code, act_inverse_scale, act_round, lambda_mix
#include "threads.h"           // choose_threads, thread_count, thread_index, wait_briefly

#ifdef __linux__
#include <sys/mman.h>
#endif

// ---------------------------------------------------------------------------------------------------------
// The device. On the CPU device memory is ordinary memory.

enum { ROWS_PER_CHUNK = 256 };   // rows that are summed together before the partial sums are folded

static struct {
  char *data;
  size_t bytes;
} scratch_;

int dev_init(int threads) {
  return choose_threads(threads);
}

const char *dev_name(void) {
  static char name[128];
#if defined(BITNET_VNNI)
  const char *isa = "AVX-512 VNNI";
#elif defined(__AVX512F__)
  const char *isa = "AVX-512";
#elif defined(__AVX2__) && defined(__AVXVNNI__)
  const char *isa = "AVX2 VNNI";
#elif defined(__AVX2__)
  const char *isa = "AVX2";
#elif defined(BITNET_BFMMLA)
  const char *isa = "NEON bf16";
#elif defined(__aarch64__)
  const char *isa = "NEON";
#else
  const char *isa = "portable";
#endif
#ifdef _OPENMP
  snprintf(name, sizeof name, "CPU, %d thread%s, %s", thread_count(), thread_count() == 1 ? "" : "s", isa);
#else
  snprintf(name, sizeof name, "CPU, 1 thread (built without OpenMP), %s", isa);
#endif
  return name;
}

void *dev_malloc(size_t bytes) {
  if (alloc_guard) die(EXIT_FAILED, "bug: %zu bytes of device memory allocated inside a training step", bytes);
  size_t rounded = (bytes + 63) / 64 * 64;
  if (rounded < bytes) return NULL;
  char *p = (char *)aligned_alloc(64, rounded ? rounded : 64);
  if (p == NULL) return NULL;
#ifdef MADV_HUGEPAGE
  if (rounded >= (size_t)8 << 20) {
    // Pages of 2 MB where the kernel has them: reading a large model through pages of 4 KB costs up to a third of the memory's speed.
    // What is given back comes again as zeros, so that the kernel's clearing of a page at its first touch is the only one.
    size_t page = (size_t)sysconf(_SC_PAGESIZE), head = (page - (uintptr_t)p % page) % page, pages = (rounded - head) / page;
    madvise(p + head, pages * page, MADV_HUGEPAGE);
    if (madvise(p + head, pages * page, MADV_DONTNEED) == 0) {
      memset(p, 0, head);
      memset(p + head + pages * page, 0, rounded - head - pages * page);
#pragma omp parallel for schedule(static)   // the first touch of a page costs more than writing to it
      for (size_t i = 0; i < pages; i++) *(volatile char *)(p + head + i * page) = 0;
      return p;
    }
  }
#endif
  memset(p, 0, rounded);
  return p;
}

void dev_free(void *p) {
  free(p);
}

// What the kernel believes can be given out without swapping.
size_t dev_memory_free(void) {
  size_t kib = 0;
  char line[256];
  FILE *f = fopen("/proc/meminfo", "r");
  if (f == NULL) return 0;
  while (fgets(line, sizeof line, f)) {
    if (sscanf(line, "MemAvailable: %zu kB", &kib) == 1) break;
  }
  fclose(f);
  return kib * 1024;
}

void dev_zero(void *dst, size_t bytes) {
  enum { PIECE = 1 << 20 };
#pragma omp parallel for schedule(static) if (bytes > PIECE)
  for (size_t at = 0; at < bytes; at += PIECE) memset((char *)dst + at, 0, bytes - at < PIECE ? bytes - at : PIECE);
}

void dev_copy(void *dst, const void *src, size_t bytes) {
  memcpy(dst, src, bytes);
}

void dev_copy_in(void *dst, const void *src, size_t bytes) {
  memcpy(dst, src, bytes);
}

void dev_copy_out(void *dst, const void *src, size_t bytes) {
  memcpy(dst, src, bytes);
}

void dev_read(const void *p, size_t bytes) {
  const uint64_t *x = (const uint64_t *)p;
  size_t pages = bytes / 4096;
  uint64_t all = 0;
#pragma omp parallel for schedule(static) reduction(^ : all)
  for (size_t page = 0; page < pages; page++) {
    uint64_t part = 0;
    __builtin_prefetch((const char *)p + (page + 1) * 4096);
    for (size_t i = 0; i < 512; i++) part ^= x[page * 512 + i];
    all ^= part;
  }
  __asm__ volatile("" : : "r"(all));   // the sum is needed, as far as the compiler knows
}

void dev_floatx_in(floatX *dst, const float *src, size_t n) {
  memcpy(dst, src, n * sizeof(float));
}

void dev_floatx_out(float *dst, const floatX *src, size_t n) {
  memcpy(dst, src, n * sizeof(float));
}

int dev_reads_host(void) {
  return 1;
}

void host_parallel(int n, void (*work)(void *ctx, int i), void *ctx) {
#pragma omp parallel for schedule(static) if (n > 1)
  for (int i = 0; i < n; i++) work(ctx, i);
}

int ops_row_block(void) {
  return 1024;
}

// The largest of: packed operands of a product; two rows for each thread beside one partial sum for each chunk of rows; a number for
// each row and thread; unpacked weights.
size_t ops_scratch_bytes(size_t max_rows, size_t max_n, size_t max_k) {
  size_t width = max_n > max_k ? max_n : max_k;
  size_t rows = (size_t)thread_count() * 2 * width * sizeof(float);
  size_t chunks = rows + (max_rows / ROWS_PER_CHUNK + 1) * width * sizeof(float);
  size_t most = gemm_scratch_bytes(max_rows, max_n, max_k);
  size_t numbers = (size_t)thread_count() * max_rows * sizeof(float);
  if (numbers > most) most = numbers;
  if (gemm_i8_rounded_bytes(max_n, max_k) > most) most = gemm_i8_rounded_bytes(max_n, max_k);
  if (packed_scratch_bytes(max_rows, max_k) > most) most = packed_scratch_bytes(max_rows, max_k);
  if (gemm_few_scratch_bytes(max_k) > most) most = gemm_few_scratch_bytes(max_k);
  return chunks > most ? chunks : most;
}

int ops_honours_precision(int precision) {
  (void)precision;
  return 1;
}

size_t ops_logits_bytes(void) {
  return (size_t)256 << 20;
}

// Starting an op costs a function call here, so there is nothing to record.
int dev_graph_begin(Graph *g) {
  (void)g;
  return 1;
}

void dev_graph_end(Graph *g) {
  (void)g;
}

void dev_graph_free(Graph *g) {
  (void)g;
}

void ops_set_scratch(void *scratch, size_t bytes) {
  scratch_.data = (char *)scratch;
  scratch_.bytes = bytes;
}

static float *scratch_floats(size_t n) {
  if (n * sizeof(float) > scratch_.bytes)
    die(EXIT_FAILED, "bug: an op needs %zu bytes of scratch, %zu reserved", n * sizeof(float), scratch_.bytes);
  return (float *)scratch_.data;
}

// Scratch for one product with these sizes, in any order.
static float *gemm_scratch(size_t x, size_t y, size_t z) {
  return scratch_floats(gemm_scratch_bytes(x, y, z) / sizeof(float));
}

// ---------------------------------------------------------------------------------------------------------
// Sums across rows and over whole tensors, in an order that only depends on the shape.

/*
out[c] += sum over rows r of f(r, c), where a caller has left the sums of each chunk of ROWS_PER_CHUNK rows in
partial [chunks, C].
*/
static void fold_chunks(float *out, const float *partial, size_t chunks, size_t C) {
#pragma omp parallel for schedule(static)
  for (size_t c = 0; c < C; c++) {
    float sum = 0;
    for (size_t k = 0; k < chunks; k++) sum += partial[k * C + c];
    out[c] += sum;
  }
}

// out[c] += sum_r x[r,c], x [R,C]: the gradient of a bias.
static void add_column_sums(float *out, const float *x, size_t R, size_t C) {
  size_t chunks = (R + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
  float *partial = scratch_floats(chunks * C);
#pragma omp parallel for schedule(static)
  for (size_t k = 0; k < chunks; k++) {
    float *sum = partial + k * C;
    memset(sum, 0, C * sizeof(float));
    for (size_t r = k * ROWS_PER_CHUNK; r < R && r < (k + 1) * ROWS_PER_CHUNK; r++) {
      for (size_t c = 0; c < C; c++) sum[c] += x[r * C + c];
    }
  }
  fold_chunks(out, partial, chunks, C);
}

// The sum of |x| or of x^2 over n values in double: up to 1024 equal chunks, folded in order.
static double fold_sum(const float *x, size_t n, int squares) {
  double partial[1024];
  size_t size = n / 1024 + 1, chunks = (n + size - 1) / size;
#pragma omp parallel for schedule(static)
  for (size_t k = 0; k < chunks; k++) {
    size_t end = (k + 1) * size < n ? (k + 1) * size : n;
    double sum = 0;
    if (squares) {
#pragma omp simd reduction(+ : sum)
      for (size_t i = k * size; i < end; i++) sum += (double)x[i] * (double)x[i];
    } else {
#pragma omp simd reduction(+ : sum)
      for (size_t i = k * size; i < end; i++) sum += fabs((double)x[i]);
    }
    partial[k] = sum;
  }
  double total = 0;
  for (size_t k = 0; k < chunks; k++) total += partial[k];
  return total;
}

void sum_squares(double *out, const float *x, size_t n) {
  *out = fold_sum(x, n, 1);
}

// ---------------------------------------------------------------------------------------------------------
// Embedding: each token id picks a row of the table.

void embedding_forward(floatX *out, const int *tokens, const float *wte, int R, int C) {
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) memcpy(out + (size_t)r * C, wte + (size_t)tokens[r] * C, (size_t)C * sizeof(float));
}

/*
out[r] = wte[tokens[r]], so a row of the table collects the gradients of all places where its token occurred:
    dwte[v] += sum over r with tokens[r] = v of dout[r]
Two rows of the batch may hold the same token, so threads share the columns out, not the rows: each adds its own for all r in order.
*/
void embedding_backward(float *dwte, const floatX *dout, const int *tokens, int R, int V, int C) {
  (void)V;
#pragma omp parallel for schedule(static)
  for (int c0 = 0; c0 < C; c0 += 16) {
    int c1 = c0 + 16 < C ? c0 + 16 : C;
    for (int r = 0; r < R; r++) {
      float *d = dwte + (size_t)tokens[r] * C;
      for (int c = c0; c < c1; c++) d[c] += dout[(size_t)r * C + c];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Quantisation of activations.

/*
Writes row r of a QAct from K floats; quant.h explains the quantiser. At lambda = 1 that is K int8 codes and one scale, else the mix of
the value and its quantised form as floats. Infinity or NaN in the row makes the scale NaN, so that it reaches the loss
and is seen there, instead of being rounded to a harmless integer.
*/
static void quantise_row(QAct *out, size_t r, const float *RESTRICT x, size_t K) {
  if (out->bits == 0) {
    memcpy((float *)out->data + r * K, x, K * sizeof(float));
    return;
  }
  float top = 0, top2 = 0, bad = 0, bad2 = 0;   // of each half, so that neither waits for itself; bad: 0, or NaN if a value is not finite
  size_t half = K / 2;
#pragma omp simd reduction(max : top, top2) reduction(+ : bad, bad2)
  for (size_t k = 0; k < half; k++) {
    float a = fabsf(x[k]), b = fabsf(x[half + k]);
    top = a > top ? a : top;
    top2 = b > top2 ? b : top2;
    bad += x[k] * 0.0f;
    bad2 += x[half + k] * 0.0f;
  }
  if (K % 2) {
    top = fabsf(x[K - 1]) > top ? fabsf(x[K - 1]) : top;
    bad += x[K - 1] * 0.0f;
  }
  top = top2 > top ? top2 : top;
  bad += bad2;
  float levels = act_levels(out->bits), inverse = act_inverse_scale(top, out->bits), scale = 1.0f / inverse;
  if (out->lambda == 1.0f) {
    int8_t *RESTRICT q = (int8_t *)out->data + r * K;
    out->s[r] = bad == 0 ? scale : NAN;
    if (bad == 0) {
      for (size_t k = 0; k < K; k++) q[k] = (int8_t)act_round(x[k], inverse, levels);
    } else {
      memset(q, 0, K);
    }
  } else {
    float *RESTRICT eff = (float *)out->data + r * K, lambda = out->lambda;
    for (size_t k = 0; k < K; k++) eff[k] = lambda_mix(x[k], act_round(x[k], inverse, levels) * scale, lambda) + bad;
  }
}

void act_quant_forward(QAct *out, const floatX *x, int R, int K) {
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) quantise_row(out, (size_t)r, x + (size_t)r * K, (size_t)K);
}

// ---------------------------------------------------------------------------------------------------------
// RMSNorm: every token is scaled to a root mean square of 1, then each channel by its gain.

// 1 / sqrt(mean x^2 + eps) of one row.
static float row_rstd(const float *x, size_t C, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t c = 0; c < C; c++) sum += x[c] * x[c];
  return 1.0f / sqrtf(sum / (float)C + eps);
}

void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps) {
#pragma omp parallel for schedule(static) if (R > 1)   // one row is done before a second thread has woken up
  for (int r = 0; r < R; r++) {
    const float *row = x + (size_t)r * C;
    float s = rstd[r] = row_rstd(row, (size_t)C, eps);
    for (int c = 0; c < C; c++) out[(size_t)r * C + c] = gain[c] * (row[c] * s);
  }
}

void rmsnorm_quant_forward(QAct *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps) {
  float *rows = scratch_floats((size_t)thread_count() * C);
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) {
    float *RESTRICT normed = rows + (size_t)thread_index() * C;
    const float *row = x + (size_t)r * C;
    float s = rstd[r] = row_rstd(row, (size_t)C, eps);
    for (int c = 0; c < C; c++) normed[c] = gain[c] * (row[c] * s);
    quantise_row(out, (size_t)r, normed, (size_t)C);
  }
}

/*
y = g * xh,  xh = x r,  r = (mean x^2 + eps)^(-1/2)           (g and xh are vectors of C channels, r one number)

  dg  += dy * xh                                              summed over rows
  dxh  = g * dy
  r depends on every x:  dr/dx_c = -r^3 x_c / C, so
  dx_c = r dxh_c + (sum_k dxh_k x_k) (-r^3 x_c / C)
       = r (dxh_c - xh_c mean_k(dxh_k xh_k))
The second term removes the part of the gradient that points along x: making x longer does not change y.

One row: dx (+=) or (=), dg (+=).
*/
static inline __attribute__((always_inline)) void rmsnorm_backward_row(float *RESTRICT dx, float *RESTRICT dgain,
                                                                       const float *RESTRICT dy, const float *RESTRICT x,
                                                                       const float *RESTRICT gain, float r, size_t C, int add) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (size_t c = 0; c < C; c++) dot += gain[c] * dy[c] * (x[c] * r);
  float mean = dot / (float)C;
  for (size_t c = 0; c < C; c++) {
    float xh = x[c] * r;
    dgain[c] += dy[c] * xh;
    dx[c] = (add ? dx[c] : 0.0f) + r * (gain[c] * dy[c] - xh * mean);
  }
}

void rmsnorm_backward(floatX *dx, float *dgain, const floatX *dout, const floatX *x, const float *gain, const float *rstd, int R,
                      int C, int add) {
  int chunks = (R + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
  float *partial = scratch_floats((size_t)chunks * C);
#pragma omp parallel for schedule(static)
  for (int k = 0; k < chunks; k++) {
    float *dg = partial + (size_t)k * C;
    memset(dg, 0, (size_t)C * sizeof(float));
    for (int r = k * ROWS_PER_CHUNK; r < R && r < (k + 1) * ROWS_PER_CHUNK; r++) {
      size_t at = (size_t)r * C;
      if (add) rmsnorm_backward_row(dx + at, dg, dout + at, x + at, gain, rstd[r], (size_t)C, 1);
      else rmsnorm_backward_row(dx + at, dg, dout + at, x + at, gain, rstd[r], (size_t)C, 0);
    }
  }
  fold_chunks(dgain, partial, (size_t)chunks, (size_t)C);
}

/*
The same norm over each head of q and k (Qwen3 has it): a "row" is one head of HS values, q heads share one gain, k heads another, and
v passes through.
*/
void headnorm_forward(floatX *out, float *rstd, const floatX *qkv, const float *qgain, const float *kgain,
                      int R, int NH, int NKV, int HS, float eps) {
  size_t QKV = (size_t)(NH + 2 * NKV) * HS;
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) {
    for (int h = 0; h < NH + NKV; h++) {
      const float *x = qkv + (size_t)r * QKV + (size_t)h * HS, *gain = h < NH ? qgain : kgain;
      float *y = out + (size_t)r * QKV + (size_t)h * HS;
      float s = rstd[(size_t)r * (NH + NKV) + h] = row_rstd(x, (size_t)HS, eps);
      for (int i = 0; i < HS; i++) y[i] = gain[i] * (x[i] * s);
    }
    size_t v = (size_t)r * QKV + (size_t)(NH + NKV) * HS;
    memcpy(out + v, qkv + v, (size_t)NKV * HS * sizeof(float));
  }
}

// rmsnorm_backward_row for each head; the gains' gradients are summed in chunks of rows. The gradient is replaced, not added
// to, so each head works on a copy.
void headnorm_backward(floatX *dqkv, float *dqgain, float *dkgain, const floatX *qkv, const float *qgain, const float *kgain,
                       const float *rstd, int R, int NH, int NKV, int HS) {
  size_t QKV = (size_t)(NH + 2 * NKV) * HS;
  int chunks = (R + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
  size_t stride = 2 * (size_t)HS;                                       // partial sums of both gains
  float *partial = scratch_floats((size_t)(chunks + thread_count()) * stride), *copies = partial + (size_t)chunks * stride;
#pragma omp parallel for schedule(static)
  for (int k = 0; k < chunks; k++) {
    float *dg = partial + (size_t)k * stride, *dy = copies + (size_t)thread_index() * stride;
    memset(dg, 0, stride * sizeof(float));
    for (int r = k * ROWS_PER_CHUNK; r < R && r < (k + 1) * ROWS_PER_CHUNK; r++) {
      for (int h = 0; h < NH + NKV; h++) {
        size_t at = (size_t)r * QKV + (size_t)h * HS;
        memcpy(dy, dqkv + at, (size_t)HS * sizeof(float));
        rmsnorm_backward_row(dqkv + at, h < NH ? dg : dg + HS, dy, qkv + at, h < NH ? qgain : kgain,
                             rstd[(size_t)r * (NH + NKV) + h], (size_t)HS, 0);
      }
    }
  }
  for (int i = 0; i < HS; i++) {
    float dq = 0, dk = 0;
    for (int k = 0; k < chunks; k++) {
      dq += partial[(size_t)k * stride + i];
      dk += partial[(size_t)k * stride + HS + i];
    }
    dqgain[i] += dq;
    dkgain[i] += dk;
  }
}

// ---------------------------------------------------------------------------------------------------------
// BitLinear: the matrix product whose weights are ternary and whose inputs are int8.

// data of a BitWeight at lambda = 1: codes [N,K] row by row, then the same codes in the panels that gemm_i8 reads.
static uint8_t *ternary_panels(const BitWeight *w) {
  return (uint8_t *)w->data + ((size_t)w->N * w->K + 63) / 64 * 64;
}

static uint8_t *transposed_panels(const BitWeight *w) {
  return ternary_panels(w) + ternary_panel_bytes((size_t)w->N, (size_t)w->K);
}

size_t bitweight_bytes(int N, int K) {
  size_t n = (size_t)N, k = (size_t)K, codes = (n * k + 63) / 64 * 64 + ternary_panel_bytes(n, k) + ternary_panel_bytes(k, n);
  return n * k * sizeof(float) > codes ? n * k * sizeof(float) : codes;
}

// The scale of a matrix of n weights; NaN if one of them is.
static float matrix_gamma(const float *master, size_t n) {
  float mean = (float)(fold_sum(master, n, 0) / (double)n);
  return mean == mean ? ternary_gamma(mean) : mean;
}

void weight_quantize(BitWeight *w, const float *master, float lambda) {
  size_t K = (size_t)w->K, row = 0;
  w->lambda = lambda;
  w->packed = 0;
  for (int part = 0; part < 3 && w->parts[part] > 0; part++) {
    size_t rows = (size_t)w->parts[part];
    float gamma = matrix_gamma(master + row * K, rows * K), inverse = 1.0f / gamma;
    for (size_t i = 0; i < rows; i++) w->gamma[row + i] = gamma;
#pragma omp parallel for schedule(static)
    for (size_t i = row; i < row + rows; i++) {
      const float *RESTRICT m = master + i * K;
      if (lambda == 1.0f) {
        int8_t *RESTRICT q = (int8_t *)w->data + i * K;
        for (size_t k = 0; k < K; k++) q[k] = (int8_t)ternary_code(m[k], inverse);
      } else {
        float *RESTRICT eff = (float *)w->data + i * K;
        for (size_t k = 0; k < K; k++) eff[k] = lambda_mix(m[k], (float)ternary_code(m[k], inverse) * gamma, lambda);
      }
    }
    row += rows;
  }
  if (lambda == 1.0f) ternary_pack_panels(ternary_panels(w), (const int8_t *)w->data, (size_t)w->N, K);
  if (lambda == 1.0f && w->dx_int8) ternary_pack_transposed(transposed_panels(w), (const int8_t *)w->data, (size_t)w->N, K);
}

size_t bitweight_packed_bytes(int N, int K) {
  return packed_bytes((size_t)N, (size_t)K);
}

// Rows first .. first+rows-1 of w from codes [rows,K], or from master weights where codes is NULL.
static void pack_rows(BitWeight *w, size_t first, size_t rows, const float *master, const int8_t *codes, float gamma) {
  size_t K = (size_t)w->K, begin = first / I8_WIDTH, end = (first + rows + I8_WIDTH - 1) / I8_WIDTH;
  float inverse = 1.0f / gamma;
  int8_t *copies = (int8_t *)scratch_floats((size_t)thread_count() * (K / sizeof(float) + 1));
  w->lambda = 1;
  w->packed = 1;
#pragma omp parallel for schedule(static)
  for (size_t p = begin; p < end; p++) {
    size_t n = p * I8_WIDTH < first ? first : p * I8_WIDTH, behind = (p + 1) * I8_WIDTH;
    if (behind > first + rows) behind = first + rows;
    if (codes) packed_set_rows((uint8_t *)w->data, n, behind - n, codes + (n - first) * K, K);
    for (; n < behind; n++) {
      int8_t *row = copies + (size_t)thread_index() * (K / sizeof(float) + 1) * sizeof(float);
      for (size_t k = 0; k < K && !codes; k++) row[k] = (int8_t)ternary_code(master[(n - first) * K + k], inverse);
      if (!codes) packed_set_rows((uint8_t *)w->data, n, 1, row, K);
      w->gamma[n] = gamma;
    }
  }
}

// The first row of logical matrix `part`.
static size_t part_start(const BitWeight *w, int part) {
  size_t first = 0;
  for (int p = 0; p < part; p++) first += (size_t)w->parts[p];
  return first;
}

void weight_pack(BitWeight *w, int part, const float *master) {
  size_t rows = (size_t)w->parts[part];
  pack_rows(w, part_start(w, part), rows, master, NULL, matrix_gamma(master, rows * (size_t)w->K));
}

void weight_pack_codes(BitWeight *w, int part, const int8_t *codes, int first, int rows, float gamma) {
  pack_rows(w, part_start(w, part) + (size_t)first, (size_t)rows, NULL, codes, gamma);
}

void weight_changes(int64_t *counts, int8_t *codes, const float *master, int rows, int K) {
  size_t n = (size_t)rows * K;
  float inverse = 1.0f / matrix_gamma(master, n);
  int64_t zeros = 0, changed = 0;
#pragma omp parallel for schedule(static) reduction(+ : zeros, changed)
  for (size_t i = 0; i < n; i++) {
    int8_t code = (int8_t)ternary_code(master[i], inverse);
    zeros += code == 0;
    changed += code != codes[i];
    codes[i] = code;
  }
  counts[0] = zeros;
  counts[1] = changed;
}

void bitweight_codes(int8_t *codes, const BitWeight *w) {
  size_t N = (size_t)w->N, K = (size_t)w->K;
  if (!w->packed) memcpy(codes, w->data, N * K);
  for (size_t n = 0; n < N && w->packed; n++) packed_get_row(codes + n * K, (const uint8_t *)w->data, n, K);
}

// Sets the operand B of a product to a matrix that lies as floats or as codes.
static void set_b(Product *g, const void *data, int codes, size_t row_stride, size_t col_stride) {
  g->B = codes ? NULL : (const float *)data;
  g->B_codes = codes ? (const int8_t *)data : NULL;
  g->b_row = row_stride;
  g->b_col = col_stride;
}

static int has_codes(const QAct *x) {
  return x->lambda == 1.0f && x->bits > 0;
}

/*
y = x_eff w_eff' (+ bias) (+ residual). At lambda = 1 both are integers times a scale,

    y[r,n] = sum_k (q[r,k] s[r]) (t[n,k] gamma[n]) = s[r] gamma[n] * sum_k q[r,k] t[n,k]

and the sum runs in int32, exactly. Otherwise, and where activations stay float, it is an ordinary product.
*/
void bitlinear_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  size_t N = (size_t)w->N, K = (size_t)w->K;
  if (w->packed) {
    if (!has_codes(x)) die(EXIT_FAILED, "bug: packed weights multiply int8 activations only");
    void *scratch = scratch_floats(packed_scratch_bytes((size_t)R, K) / sizeof(float));
    packed_i8(out, NULL, (const int8_t *)x->data, x->s, (const uint8_t *)w->data, w->gamma, w->bias, residual, (size_t)R, N, K,
              scratch);
    return;
  }
  if (w->lambda == 1.0f && has_codes(x)) {
    gemm_i8(out, NULL, (const int8_t *)x->data, x->s, ternary_panels(w), w->gamma, w->bias, residual, (size_t)R, N, K);
    return;
  }
  Product g = {0};
  g.M = (size_t)R, g.N = N, g.K = K;
  g.A = (const float *)x->data, g.a_row = K, g.a_col = 1;
  set_b(&g, w->data, w->lambda == 1.0f, 1, K);   // B(k,n) = w[n,k]
  g.C = out;
  g.precision = w->precision;
  if (w->lambda == 1.0f) {                        // float activations, ternary weights: the scale comes last
    gemm(&g, gemm_scratch(g.M, g.N, g.K));
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < (size_t)R; r++) {
      for (size_t n = 0; n < N; n++)
        out[r * N + n] = out[r * N + n] * w->gamma[n] + (w->bias ? w->bias[n] : 0.0f) + (residual ? residual[r * N + n] : 0.0f);
    }
  } else {
    g.bias = w->bias;
    g.residual = residual;
    gemm(&g, gemm_scratch(g.M, g.N, g.K));
  }
}

/*
y = x_eff w_eff' with x_eff = x + lambda (Q(x) - x) and w_eff likewise. Straight-through: (Q(x) - x) and (Q(w) - w) count as constants,
so dx = dx_eff and dw = dw_eff, at every lambda:

    dx[r,k] = sum_n dy[r,n] w_eff[n,k]          dw[n,k] += sum_r dy[r,n] x_eff[r,k]          dbias[n] += sum_r dy[r,n]

At lambda = 1 w_eff = gamma[n] t[n,k] and x_eff = s[r] q[r,k]. The scale belongs to the index that is summed over, so it is
multiplied into dy while dy is packed; the other operand stays a matrix of small integers, exact in any format. With dx_int8 the rows
of dy gamma are rounded to int8, at random and without bias, and dx becomes an integer product like the forward one.
*/
void bitlinear_backward(floatX *dx, float *dw, float *dbias, const floatX *dout, const QAct *x, const BitWeight *w, int R) {
  size_t N = (size_t)w->N, K = (size_t)w->K;
  int ternary = w->lambda == 1.0f;
  Product g = {0};
  g.A = dout;
  g.precision = w->precision;
  if (ternary && w->dx_int8) {
    void *scratch = scratch_floats(gemm_i8_rounded_bytes(N, K) / sizeof(float));
    gemm_i8_rounded(dx, dout, w->gamma, transposed_panels(w), (size_t)R, N, K, (uint32_t)(w->noise ^ w->noise >> 32), scratch);
  } else {
    g.M = (size_t)R, g.N = K, g.K = N;                  // dx = dy w_eff
    g.a_row = N, g.a_col = 1, g.a_scale = ternary ? w->gamma : NULL;
    set_b(&g, w->data, ternary, K, 1);
    g.C = dx;
    gemm(&g, gemm_scratch(g.M, g.N, g.K));
  }
  g.M = N, g.N = K, g.K = (size_t)R;                    // dw += dy' x_eff
  g.a_row = 1, g.a_col = N, g.a_scale = has_codes(x) ? x->s : NULL;
  set_b(&g, x->data, has_codes(x), K, 1);
  g.C = dw, g.accumulate = 1;
  gemm(&g, gemm_scratch(g.M, g.N, g.K));
  if (dbias) add_column_sums(dbias, dout, (size_t)R, N);
}

// ---------------------------------------------------------------------------------------------------------
// Rotary position embedding.

/*
Every pair (x_i, x_{i+HS/2}) of a head is rotated by the angle pos * theta^(-2i/HS). The dot product of a rotated q and a rotated k
then depends only on the distance of their positions.

    y_i = x_i cos - x_j sin        y_j = x_j cos + x_i sin        (j = i + HS/2)

The rotation R is orthogonal, so the gradient goes back through its transpose, the rotation by the opposite angle:
dx = R' dy, the same code with direction -1.
*/
void rope_apply(floatX *qkv, const int *pos, const float *cossin, int R, int NH, int NKV, int HS, int direction) {
  size_t QKV = (size_t)(NH + 2 * NKV) * HS;
  int half = HS / 2;
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) {
    const float *RESTRICT cosine = cossin + (size_t)pos[r] * HS, *RESTRICT sine = cosine + half;
    for (int h = 0; h < NH + NKV; h++) {
      float *RESTRICT x = qkv + (size_t)r * QKV + (size_t)h * HS, *RESTRICT y = x + half;
      for (int i = 0; i < half; i++) {
        float a = x[i], b = y[i], s = sine[i] * (float)direction;
        x[i] = a * cosine[i] - b * s;
        y[i] = b * cosine[i] + a * s;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Attention.

/*
    s_j = q.k_j / sqrt(HS),   p = softmax(s),   out = sum_j p_j v_j        (j runs over the keys that this query sees)

Queries and keys meet in blocks of KEYS x QUERIES, and nothing of size T x T is stored. A block is a product of small matrices that
lies with one column for each query,

    S' [keys, queries] = K Q'            P' = exp(S' - ...)            out' [HS, queries] += V' P'

so that all that softmax does to a query runs down a column, and a vector holds many queries. Keys are counted from the first token of
the query's document, in training and against a cache alike, and both go through attend_columns: the bits of a query depend on its
own document up to itself, not on what is computed beside it.
*/
enum {
  KEYS = KV_BLOCK,           // keys that are scored before the running softmax is corrected
  QUERIES = 32,              // queries that meet a block of keys together
  KEY_ROOM = KEYS + MR_MAX,  // rows that whole tiles may fill: of a block of keys,
  HEAD_ROOM = HEAD_MAX + MR_MAX   // of a head
};

// A head of HS numbers in the panels of kernel k. Columns: HS rounded up to whole panels.
typedef struct {
  const Kernel *k;
  int precision;
  size_t HS, columns;
} HeadForm;

static HeadForm head_form(int HS, int precision) {
  HeadForm f = {fastest_kernel(precision), precision, (size_t)HS, 0};
  f.columns = padded_to((size_t)HS, f.k->nr);
  return f;
}

// A block of keys as left operand, K [KEYS,HS] or K' [HS,KEYS]: bytes.
static size_t block_bytes(const HeadForm *f, int transposed) {
  return transposed ? left_bytes(f->k, f->HS, KEYS) : left_bytes(f->k, KEYS, f->HS);
}

// n rows of HS numbers from x, rows `from` apart, to y, rows `to` apart.
static void copy_rows(float *y, size_t to, const float *x, size_t from, size_t n, size_t HS) {
  for (size_t i = 0; i < n; i++) memcpy(y + i * to, x + i * from, HS * sizeof(float));
}

// packed (=) n rows of HS numbers, `stride` apart, block by block. Rows beyond n of the last block are zeros.
static void pack_blocks(const HeadForm *f, char *packed, const float *x, size_t stride, size_t n, int transposed) {
  float rest[KEYS * HEAD_MAX];
  for (size_t j = 0; j < n; j += KEYS, packed += block_bytes(f, transposed)) {
    const float *rows = x + j * stride;
    size_t apart = stride;
    if (n - j < KEYS) {
      memset(rest, 0, KEYS * f->HS * sizeof(float));
      copy_rows(rest, f->HS, rows, stride, n - j, f->HS);
      rows = rest;
      apart = f->HS;
    }
    if (transposed) pack_left(f->k, packed, rows, 1, apart, f->HS, KEYS, f->precision);
    else pack_left(f->k, packed, rows, apart, 1, KEYS, f->HS, f->precision);
  }
}

/*
A head's rows lie far apart, a few lines of memory each, which no hardware prefetcher foresees. While one head's queries are computed the
same rows of the head to the right of it, which comes next, are fetched: n rows of HS numbers, `stride` apart.
*/
static void fetch_right(const float *x, size_t stride, size_t n, size_t HS) {
  for (size_t i = 0; i < n; i++) {
    for (size_t k = 0; k < HS; k += 16) __builtin_prefetch(x + i * stride + HS + k, 0, 2);
  }
}

static float dot_product(const float *RESTRICT a, const float *RESTRICT b, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/*
Queries meet n keys of a block: p [n][QUERIES] holds the products k_j.q_i and becomes exp(k_j.q_i / sqrt(HS) - top_i), or 0 from
seen[i] on.

Softmax needs the largest score to stay in range, which is only known at the end, so the sums so far carry the largest score seen so
far (top) and are scaled down whenever a block raises it ("online softmax"). sum [QUERIES] and o [HS][QUERIES] are such sums. A query
starts with top = -infinity. Keys that it does not see change no bit.
*/
static inline __attribute__((always_inline)) void softmax_columns(float *RESTRICT p, float *RESTRICT top, float *RESTRICT sum,
                                                                  float *RESTRICT o, const int *RESTRICT seen, int n,
                                                                  const int columns, int HS) {
  float scale = 1.0f / sqrtf((float)HS), high[QUERIES], shrink[QUERIES], total[QUERIES] = {0};
  int all = 1;
  for (int i = 0; i < columns; i++) {
    high[i] = top[i];
    all &= seen[i] >= n;
  }
  for (int j = 0; j < n; j++) {
    float *RESTRICT pj = p + j * QUERIES;
    for (int i = 0; i < columns; i++) {
      float s = pj[i] * scale;
      pj[i] = s = all || j < seen[i] ? s : -INFINITY;
      high[i] = s > high[i] ? s : high[i];
    }
  }
  for (int i = 0; i < columns; i++) shrink[i] = top[i] == -INFINITY ? 0.0f : exp_fast(top[i] - high[i]);
  for (int j = 0; j < n; j++) {
    float *RESTRICT pj = p + j * QUERIES;
    for (int i = 0; i < columns; i++) pj[i] = exp_fast(pj[i] - high[i]);
    for (int i = 0; i < columns && !all; i++) pj[i] = j < seen[i] ? pj[i] : 0.0f;
    for (int i = 0; i < columns; i++) total[i] += pj[i];
  }
  for (int i = 0; i < columns; i++) {
    top[i] = high[i];
    sum[i] = sum[i] * shrink[i] + total[i];
  }
  for (int k = 0; k < HS; k++) {
    for (int i = 0; i < columns; i++) o[k * QUERIES + i] *= shrink[i];
  }
}

/*
m <= QUERIES queries of one head: rows of out (=), `out_stride` apart, and log_sum (=) [m], the log of each softmax's denominator. q:
rows `stride` apart; query i sees the first seen[i] keys, at least one; keys, values: packed blocks, the values transposed.
*/
static void attend_columns(const HeadForm *f, float *out, size_t out_stride, float *log_sum, const float *q, size_t stride,
                           const int *seen, size_t m, const char *keys, const char *values) {
  char q_right[QUERIES * HEAD_MAX * sizeof(float)] ALIGNED, p_right[QUERIES * KEYS * sizeof(float)] ALIGNED;
  float p[KEY_ROOM * QUERIES] ALIGNED, o[HEAD_ROOM * QUERIES] ALIGNED, top[QUERIES], sum[QUERIES];
  size_t columns = padded_to(m, f->k->nr), HS = f->HS;
  int most = 0, left[QUERIES];
  for (size_t i = 0; i < columns; i++) {
    top[i] = -INFINITY;
    sum[i] = 0;
    if (i < m && seen[i] > most) most = seen[i];
  }
  memset(o, 0, padded_to(HS, f->k->mr) * QUERIES * sizeof(float));
  pack_right(f->k, q_right, q, 1, stride, HS, m, f->precision);
  for (int j0 = 0; j0 < most; j0 += KEYS) {
    int n = most - j0 < KEYS ? most - j0 : KEYS;
    size_t block = (size_t)(j0 / KEYS);
    for (size_t i = 0; i < columns; i++) left[i] = i < m ? seen[i] - j0 : n;
    block_product(f->k, p, QUERIES, 0, keys + block * block_bytes(f, 0), q_right, (size_t)n, m, HS, HS);
    if (columns == QUERIES) softmax_columns(p, top, sum, o, left, n, QUERIES, (int)HS);   // a constant: sums stay in registers
    else softmax_columns(p, top, sum, o, left, n, (int)columns, (int)HS);
    pack_right(f->k, p_right, p, QUERIES, 1, (size_t)n, m, f->precision);
    block_product(f->k, o, QUERIES, 1, values + block * block_bytes(f, 1), p_right, HS, m, (size_t)n, KEYS);
  }
  for (size_t i = 0; i < m; i++) {
    log_sum[i] = top[i] + logf(sum[i]);
    sum[i] = 1.0f / sum[i];
  }
  for (size_t k = 0; k < HS; k++) {
    for (size_t i = 0; i < columns; i++) o[k * QUERIES + i] *= sum[i];
  }
  transpose(out, out_stride, o, QUERIES, m, HS);
}

// The end of the row's document: the first position after t that starts another one, or T.
static int document_end(const int *start, int t, int T) {
  int s = start[t];
  while (t < T && start[t] == s) t++;
  return t;
}

// Bytes of each thread's room for T positions: keys and values packed, the keys once more, and the gradients of both.
static size_t attention_room(size_t T, size_t HS) {
  size_t most = 3 * (padded_to(T, KEYS) / KEYS) * KEY_ROOM + 2 * (padded_to(T, KEYS) + KEY_ROOM);
  return padded_to(most * (padded_to(HS, 32) + MR_MAX) * sizeof(float), 64);
}

size_t attention_scratch_bytes(int T, int HS) {
  return (size_t)thread_count() * attention_room((size_t)T, (size_t)HS);
}

void attention_forward(floatX *out, float *lse, const floatX *qkv, const int *start, int B, int T, int NH, int NKV, int HS,
                       int precision) {
  HeadForm f = head_form(HS, precision);
  size_t QKV = (size_t)(NH + 2 * NKV) * HS, width = (size_t)NH * HS, room = attention_room((size_t)T, (size_t)HS);
  char *scratch = (char *)scratch_floats(attention_scratch_bytes(T, HS) / sizeof(float));
#pragma omp parallel
  {
    char *keys = scratch + (size_t)thread_index() * room, *values = keys + padded_to((size_t)T, KEYS) / KEYS * block_bytes(&f, 0);
    float log_sum[QUERIES];
    int seen[QUERIES];
    kernel_begin(f.k);
#pragma omp for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
      for (int kvh = 0; kvh < NKV; kvh++) {
        const float *x = qkv + (size_t)b * T * QKV, *k = x + (size_t)(NH + kvh) * HS, *v = k + (size_t)NKV * HS;
        for (int first = 0, end; first < T; first = end) {
          end = document_end(start + (size_t)b * T, first, T);
          pack_blocks(&f, keys, k + (size_t)first * QKV, QKV, (size_t)(end - first), 0);
          pack_blocks(&f, values, v + (size_t)first * QKV, QKV, (size_t)(end - first), 1);
          for (int h = kvh * (NH / NKV); h < (kvh + 1) * (NH / NKV); h++) {   // NH/NKV query heads share one key/value head
            for (int t0 = first; t0 < end; t0 += QUERIES) {
              int m = end - t0 < QUERIES ? end - t0 : QUERIES;
              size_t row = (size_t)b * T + t0;
              for (int i = 0; i < m; i++) seen[i] = t0 + i - first + 1;
              fetch_right(qkv + row * QKV + (size_t)h * HS, QKV, (size_t)m, (size_t)HS);
              fetch_right(out + row * width + (size_t)h * HS, width, (size_t)m, (size_t)HS);
              if (h == kvh * (NH / NKV)) {
                fetch_right(k + (size_t)t0 * QKV, QKV, (size_t)m, (size_t)HS);
                fetch_right(v + (size_t)t0 * QKV, QKV, (size_t)m, (size_t)HS);
              }
              attend_columns(&f, out + row * width + (size_t)h * HS, width, log_sum, qkv + row * QKV + (size_t)h * HS, QKV, seen,
                             (size_t)m, keys, values);
              for (int i = 0; i < m; i++) lse[(row + (size_t)i) * NH + h] = log_sum[i];
            }
          }
        }
      }
    }
    kernel_end(f.k);
  }
}

/*
s_j = scale q.k_j,   p_j = exp(s_j - lse),   o = sum_j p_j v_j             (j runs over the keys that this query sees)

  dv_j += p_j do                      from o
  dp_j  = do.v_j
  ds_j  = p_j (dp_j - sum_m p_m dp_m) the derivative of softmax; and sum_m p_m dp_m = do.o, one number D for each query
  dq   += scale ds_j k_j
  dk_j += scale ds_j q
The probabilities are recomputed from lse, so the forward stores one number per query and head instead of a row of T. All five are
products of a block of keys with a block of queries, and lie as in the forward pass: S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q,
dQ' += K' dS'.
*/
typedef struct {
  const char *keys, *values, *keys_transposed;   // of one document, packed
  float *dk, *dv;                                // [positions + KEY_ROOM][columns] (+=)
} DocumentRoom;

// m queries of one head, the first of which stands at position t0 of its document, against all keys that they see. dq (=), q, dout,
// out, lse: rows the given strides apart.
static void attend_columns_backward(const HeadForm *f, float *dq, const DocumentRoom *d, const float *dout, const float *out,
                                    size_t width,
                                    const float *q, size_t stride, const float *lse, size_t lse_stride, size_t t0, size_t m) {
  typedef char Right[QUERIES * HEAD_MAX * sizeof(float)];
  Right q_deep ALIGNED, do_deep ALIGNED, q_wide ALIGNED, do_wide ALIGNED;   // Q' and dO' [HS,m], Q and dO [m,HS], as right operands
  char block_left[KEY_ROOM * QUERIES * sizeof(float)] ALIGNED, block_right[QUERIES * KEYS * sizeof(float)] ALIGNED;
  float p[KEY_ROOM * QUERIES] ALIGNED, ds[KEY_ROOM * QUERIES] ALIGNED, dq_columns[HEAD_ROOM * QUERIES] ALIGNED;
  float log_sum[QUERIES] = {0}, D[QUERIES] = {0}, scale = 1.0f / sqrtf((float)f->HS);
  size_t columns = padded_to(m, f->k->nr), HS = f->HS;
  memset(dq_columns, 0, padded_to(HS, f->k->mr) * QUERIES * sizeof(float));
  for (size_t i = 0; i < m; i++) {
    D[i] = dot_product(dout + i * width, out + i * width, (int)HS);
    log_sum[i] = lse[i * lse_stride];
  }
  pack_right(f->k, q_deep, q, 1, stride, HS, m, f->precision);
  pack_right(f->k, do_deep, dout, 1, width, HS, m, f->precision);
  pack_right(f->k, q_wide, q, stride, 1, m, HS, f->precision);
  pack_right(f->k, do_wide, dout, width, 1, m, HS, f->precision);
  for (size_t j0 = 0; j0 < t0 + m; j0 += KEYS) {
    size_t block = j0 / KEYS, n = t0 + m - j0 < KEYS ? t0 + m - j0 : KEYS;
    block_product(f->k, p, QUERIES, 0, d->keys + block * block_bytes(f, 0), q_deep, n, m, HS, HS);
    block_product(f->k, ds, QUERIES, 0, d->values + block * block_bytes(f, 0), do_deep, n, m, HS, HS);   // dP'
    for (size_t j = 0; j < n; j++) {
      float *RESTRICT pj = p + j * QUERIES, *RESTRICT dsj = ds + j * QUERIES;
      for (size_t i = 0; i < columns; i++) pj[i] = exp_fast(pj[i] * scale - log_sum[i]);
      for (size_t i = 0; t0 + i < j0 + j; i++) pj[i] = 0;   // queries that stand before this key
      for (size_t i = 0; i < columns; i++) dsj[i] = pj[i] * (dsj[i] - D[i]) * scale;
    }
    pack_left(f->k, block_left, p, QUERIES, 1, n, m, f->precision);
    block_product(f->k, d->dv + j0 * f->columns, f->columns, 1, block_left, do_wide, n, HS, m, m);
    pack_left(f->k, block_left, ds, QUERIES, 1, n, m, f->precision);
    block_product(f->k, d->dk + j0 * f->columns, f->columns, 1, block_left, q_wide, n, HS, m, m);
    pack_right(f->k, block_right, ds, QUERIES, 1, n, m, f->precision);
    block_product(f->k, dq_columns, QUERIES, 1, d->keys_transposed + block * block_bytes(f, 1), block_right, HS, m, n, KEYS);
  }
  transpose(dq, stride, dq_columns, QUERIES, m, HS);
}

// Each key/value head of a row of the batch, with all the query heads that share it, is one task: nobody else writes its dk and dv.
void attention_backward(floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv, const int *start,
                        int B, int T, int NH, int NKV, int HS, int precision) {
  HeadForm f = head_form(HS, precision);
  size_t QKV = (size_t)(NH + 2 * NKV) * HS, width = (size_t)NH * HS, room = attention_room((size_t)T, (size_t)HS);
  size_t blocks = padded_to((size_t)T, KEYS) / KEYS, gradient = (blocks * KEYS + KEY_ROOM) * f.columns;
  char *scratch = (char *)scratch_floats(attention_scratch_bytes(T, HS) / sizeof(float));
#pragma omp parallel
  {
    char *keys = scratch + (size_t)thread_index() * room, *values = keys + blocks * block_bytes(&f, 0);
    char *transposed = values + blocks * block_bytes(&f, 0);
    float *dk = (float *)(transposed + blocks * block_bytes(&f, 1)), *dv = dk + gradient;
    DocumentRoom d = {keys, values, transposed, dk, dv};
    kernel_begin(f.k);
#pragma omp for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
      for (int kvh = 0; kvh < NKV; kvh++) {
        for (int first = 0, end; first < T; first = end) {
          end = document_end(start + (size_t)b * T, first, T);
          size_t n = (size_t)(end - first), row = (size_t)b * T + (size_t)first, k_at = row * QKV + (size_t)(NH + kvh) * HS;
          size_t v_at = k_at + (size_t)NKV * HS;
          pack_blocks(&f, keys, qkv + k_at, QKV, n, 0);
          pack_blocks(&f, values, qkv + v_at, QKV, n, 0);
          pack_blocks(&f, transposed, qkv + k_at, QKV, n, 1);
          memset(dk, 0, (n + KEY_ROOM) * f.columns * sizeof(float));
          memset(dv, 0, (n + KEY_ROOM) * f.columns * sizeof(float));
          for (int h = kvh * (NH / NKV); h < (kvh + 1) * (NH / NKV); h++) {
            for (size_t t0 = 0; t0 < n; t0 += QUERIES) {
              size_t m = n - t0 < QUERIES ? n - t0 : QUERIES, r = row + t0, at = r * width + (size_t)h * HS, q_at = r * QKV + (size_t)h * HS;
              fetch_right(qkv + q_at, QKV, m, (size_t)HS);
              fetch_right(dqkv + q_at, QKV, m, (size_t)HS);
              fetch_right(out + at, width, m, (size_t)HS);
              fetch_right(dout + at, width, m, (size_t)HS);
              if (h == kvh * (NH / NKV)) {
                fetch_right(qkv + k_at + t0 * QKV, QKV, m, (size_t)HS);
                fetch_right(qkv + v_at + t0 * QKV, QKV, m, (size_t)HS);
                fetch_right(dqkv + k_at + t0 * QKV, QKV, m, (size_t)HS);
                fetch_right(dqkv + v_at + t0 * QKV, QKV, m, (size_t)HS);
              }
              attend_columns_backward(&f, dqkv + q_at, &d, dout + at, out + at, width, qkv + q_at, QKV, lse + r * NH + h, (size_t)NH, t0, m);
            }
          }
          copy_rows(dqkv + k_at, QKV, dk, f.columns, n, (size_t)HS);
          copy_rows(dqkv + v_at, QKV, dv, f.columns, n, (size_t)HS);
        }
      }
    }
    kernel_end(f.k);
  }
}

// The cache holds keys and values packed, block by block: for each sequence and head one run of blocks.
size_t kv_cache_bytes(int capacity, int NKV, int HS, int precision) {
  HeadForm f = head_form(HS, precision);
  size_t block = block_bytes(&f, 0) > block_bytes(&f, 1) ? block_bytes(&f, 0) : block_bytes(&f, 1);
  return (size_t)(capacity / KEYS) * (size_t)NKV * block;
}

/*
Rows of one sequence at neighbouring positions are a run; the query heads that share a key/value head go through its blocks together, a
few rows at a time. All rows are stored first, so the rows of a prompt can come in one call.
*/
void attention_cached(floatX *out, void *kcache, void *vcache, const floatX *qkv, const int *seq, const int *pos,
                      int R, int capacity, int NH, int NKV, int HS, int precision) {
  HeadForm f = head_form(HS, precision);
  int group = NH / NKV, *first = (int *)scratch_floats((size_t)R + 1), runs = 0;
  size_t QKV = (size_t)(NH + 2 * NKV) * HS, head = kv_cache_bytes(capacity, 1, HS, precision);
#pragma omp parallel for collapse(2) schedule(static) if (R > 1)
  for (int kvh = 0; kvh < NKV; kvh++) {
    for (int r = 0; r < R; r++) {
      size_t base = ((size_t)seq[r] * NKV + kvh) * head, block = (size_t)(pos[r] / KEYS), at = (size_t)(pos[r] % KEYS);
      const float *k = qkv + (size_t)r * QKV + (size_t)(NH + kvh) * HS, *v = k + (size_t)NKV * HS;
      char *keys = (char *)kcache + base + block * block_bytes(&f, 0), *values = (char *)vcache + base + block * block_bytes(&f, 1);
      for (size_t i = 0; i < (size_t)HS; i++) {
        left_put(f.k, keys, (size_t)HS, at, i, k[i], precision);
        left_put(f.k, values, KEYS, i, at, v[i], precision);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    int goes_on = r > 0 && seq[r] == seq[r - 1] && pos[r] == pos[r - 1] + 1 && r - first[runs - 1] < QUERIES;
    if (!goes_on) first[runs++] = r;
  }
  first[runs] = R;
#pragma omp parallel
  {
    float q[QUERIES * HEAD_MAX], rows_out[QUERIES * HEAD_MAX], log_sum[QUERIES];
    int seen[QUERIES];
    kernel_begin(f.k);
#pragma omp for collapse(2) schedule(static)
    for (int run = 0; run < runs; run++) {
      for (int kvh = 0; kvh < NKV; kvh++) {
        int rows = (first[run + 1] - first[run]) * group;   // row e: query head e % group of position e / group
        size_t base = ((size_t)seq[first[run]] * NKV + kvh) * head;
        for (int e0 = 0; e0 < rows; e0 += QUERIES) {
          int m = rows - e0 < QUERIES ? rows - e0 : QUERIES;
          for (int e = 0; e < m; e++) {
            int r = first[run] + (e0 + e) / group, h = kvh * group + (e0 + e) % group;
            memcpy(q + (size_t)e * HS, qkv + (size_t)r * QKV + (size_t)h * HS, (size_t)HS * sizeof(float));
            seen[e] = pos[r] + 1;
          }
          attend_columns(&f, rows_out, (size_t)HS, log_sum, q, (size_t)HS, seen, (size_t)m, (char *)kcache + base,
                         (char *)vcache + base);
          for (int e = 0; e < m; e++) {
            int r = first[run] + (e0 + e) / group, h = kvh * group + (e0 + e) % group;
            memcpy(out + ((size_t)r * NH + h) * HS, rows_out + (size_t)e * HS, (size_t)HS * sizeof(float));
          }
        }
      }
    }
    kernel_end(f.k);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The gated feed-forward unit: u = act(gate) * up, then (sub-norm and) quantisation for the last product of the block.

// act(z), and act'(z) if wanted. relu2: max(z,0)^2, 2 max(z,0). silu: z sig(z), sig(z) (1 + z (1 - sig(z))).
static inline float gate_value(float z, int act) {
  float positive = z < 0 ? 0.0f : z;   // this way round NaN stays NaN
  return act == ACT_RELU2 ? positive * positive : z / (1.0f + exp_fast(-z));
}

static inline float gate_slope(float z, int act) {
  float sigmoid = 1.0f / (1.0f + exp_fast(-z));
  return act == ACT_RELU2 ? 2.0f * (z < 0 ? 0.0f : z) : sigmoid * (1.0f + z * (1.0f - sigmoid));
}

// u (=) [F] for one row of gate_up.
static void glu_row(float *RESTRICT u, const float *RESTRICT gate_up, size_t F, int act) {
  if (act == ACT_RELU2) {
    for (size_t f = 0; f < F; f++) u[f] = gate_value(gate_up[f], ACT_RELU2) * gate_up[F + f];
  } else {
    for (size_t f = 0; f < F; f++) u[f] = gate_value(gate_up[f], ACT_SILU) * gate_up[F + f];
  }
}

// One row of the backward pass: dgate, dup side by side (=) [2F] from du [F] and gate, up side by side [2F], which may be the same row.
static inline __attribute__((always_inline)) void glu_slope_row(float *dgate_up, const float *du, const float *gate_up, size_t F,
                                                                int act) {
#pragma omp simd
  for (size_t f = 0; f < F; f++) {
    float d = du[f], gate = gate_up[f], up = gate_up[F + f];
    dgate_up[f] = d * up * gate_slope(gate, act);
    dgate_up[F + f] = d * gate_value(gate, act);
  }
}

// Row r of out from one row of gate_up; u [F] is work space.
static void glu_quant_row(QAct *out, float *rstd, size_t r, float *RESTRICT u, const float *gate_up, const float *gain, size_t F, int act,
                          float eps) {
  glu_row(u, gate_up, F, act);
  if (gain) {
    float s = rstd[r] = row_rstd(u, F, eps);
    for (size_t f = 0; f < F; f++) u[f] = gain[f] * (u[f] * s);
  }
  quantise_row(out, r, u, F);
}

void glu_quant_forward(QAct *out, float *rstd, const floatX *gate_up, const float *gain, int R, int F, int act, float eps) {
  float *rows = scratch_floats((size_t)thread_count() * F);
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++)
    glu_quant_row(out, rstd, (size_t)r, rows + (size_t)thread_index() * F, gate_up + (size_t)r * 2 * F, gain, (size_t)F, act, eps);
}

// 1 if the rows of x w' can be made a slice at a time: an integer product that gives every thread some.
static int in_slices(const QAct *x, const BitWeight *w, int R) {
  return w->lambda == 1.0f && !w->packed && has_codes(x) && (size_t)R >= (size_t)thread_count() * i8_unit();
}

// A few rows of x w' from row r0 on (=) [rows,N].
static void bitlinear_slice(float *out, const QAct *x, const BitWeight *w, size_t r0, size_t rows) {
  gemm_i8_slice(out, (const int8_t *)x->data + r0 * (size_t)w->K, x->s + r0, ternary_panels(w), w->gamma, w->bias, rows, (size_t)w->N,
                (size_t)w->K);
}

void gated_forward(QAct *out, float *rstd, floatX *gate_up, const QAct *x, const BitWeight *w, const float *gain, int R, int act,
                   float eps) {
  size_t F = (size_t)w->N / 2, rows = (size_t)R, share = rows / (size_t)thread_count() / i8_unit() * i8_unit();
  size_t step = i8_slice_rows(2 * F) < share ? i8_slice_rows(2 * F) : share;   // one slice for each thread fits gate_up
  if (!in_slices(x, w, R)) {
    bitlinear_forward(gate_up, x, w, NULL, R);
    glu_quant_forward(out, rstd, gate_up, gain, R, (int)F, act, eps);
    return;
  }
  float *u_rows = scratch_floats((size_t)thread_count() * F);
#pragma omp parallel
  {
    if (amx_ready()) amx_begin();
    float *u = u_rows + (size_t)thread_index() * F, *slice = gate_up + (size_t)thread_index() * step * 2 * F;
#pragma omp for schedule(static)
    for (size_t r0 = 0; r0 < rows; r0 += step) {
      size_t n = rows - r0 < step ? rows - r0 : step;
      bitlinear_slice(slice, x, w, r0, n);
      for (size_t r = 0; r < n; r++) glu_quant_row(out, rstd, r0 + r, u, slice + r * 2 * F, gain, F, act, eps);
    }
    if (amx_ready()) amx_end();
  }
}

/*
u = act(gate) * up,  y = rmsnorm(u) (or y = u)

  du     from dy as in rmsnorm_backward; u is recomputed from gate_up, which is cheaper than storing it
  dup    = du * act(gate)
  dgate  = du * up * act'(gate)
The quantiser behind y is straight-through: its gradient is dy itself. A row of gate_up is read before the same row of dgate_up is
written, so the two may be one: these are the widest activations of the network, and what is not written need not be fetched.
*/
// Rows r0 .. r1-1; rows [2F] is work space, dg [F] collects the gains' gradients.
static void glu_backward_rows(float *dgate_up, float *dg, const float *dout, const float *gate_up, const float *gain, const float *rstd,
                              size_t r0, size_t r1, size_t F, int act, float *rows) {
  float *u = rows, *du_row = rows + F;
  for (size_t r = r0; r < r1; r++) {
    const float *gate = gate_up + r * 2 * F, *dy = dout + r * F, *du = dy;
    float *dgate = dgate_up + r * 2 * F;
    if (gain) {
      glu_row(u, gate, F, act);
      rmsnorm_backward_row(du_row, dg, dy, u, gain, rstd[r], F, 0);
      du = du_row;
    }
    if (act == ACT_RELU2) glu_slope_row(dgate, du, gate, F, ACT_RELU2);
    else glu_slope_row(dgate, du, gate, F, ACT_SILU);
  }
}

// x, w: NULL, or gate_up is not there yet but made from them, where dgate_up goes.
static void glu_backward_from(floatX *dgate_up, float *dgain, const floatX *dout, const floatX *gate_up, const QAct *x, const BitWeight *w,
                              const float *gain, const float *rstd, size_t R, size_t F, int act) {
  size_t chunks = (R + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK, step = w ? i8_slice_rows(2 * F) : (size_t)ROWS_PER_CHUNK;
  float *rows = scratch_floats((gain ? 2 * (size_t)thread_count() + chunks : 0) * F), *partial = rows + 2 * (size_t)thread_count() * F;
#pragma omp parallel
  {
    if (w && amx_ready()) amx_begin();
#pragma omp for schedule(static)
    for (size_t k = 0; k < chunks; k++) {
      float *dg = partial + k * F;
      size_t end = R < (k + 1) * ROWS_PER_CHUNK ? R : (k + 1) * ROWS_PER_CHUNK;
      if (gain) memset(dg, 0, F * sizeof(float));
      for (size_t r = k * ROWS_PER_CHUNK; r < end; r += step) {
        size_t r1 = end - r < step ? end : r + step;
        if (w) bitlinear_slice(dgate_up + r * 2 * F, x, w, r, r1 - r);
        glu_backward_rows(dgate_up, dg, dout, gate_up, gain, rstd, r, r1, F, act, rows + (size_t)thread_index() * 2 * F);
      }
    }
    if (w && amx_ready()) amx_end();
  }
  if (gain) fold_chunks(dgain, partial, chunks, F);
}

void glu_backward(floatX *dgate_up, float *dgain, const floatX *dout, const floatX *gate_up, const float *gain, const float *rstd,
                  int R, int F, int act) {
  glu_backward_from(dgate_up, dgain, dout, gate_up, NULL, NULL, gain, rstd, (size_t)R, (size_t)F, act);
}

void gated_backward(floatX *dgate_up, float *dgain, const floatX *dout, const QAct *x, const BitWeight *w, const float *gain,
                    const float *rstd, int R, int act) {
  int slices = in_slices(x, w, R);
  if (!slices) bitlinear_forward(dgate_up, x, w, NULL, R);
  glu_backward_from(dgate_up, dgain, dout, dgate_up, slices ? x : NULL, slices ? w : NULL, gain, rstd, (size_t)R, (size_t)w->N / 2, act);
}

// ---------------------------------------------------------------------------------------------------------
// The classifier: a plain float matrix (often the embedding table itself) from the last hidden state to one logit per token.

void linear_forward(floatX *out, const floatX *x, const float *w, int R, int N, int K, int precision) {
  Product g = {0};
  g.M = (size_t)R, g.N = (size_t)N, g.K = (size_t)K;
  g.A = x, g.a_row = (size_t)K, g.a_col = 1;
  set_b(&g, w, 0, 1, (size_t)K);
  g.C = out;
  g.precision = precision;
  gemm(&g, gemm_scratch(g.M, g.N, g.K));
}

// y = x w':  dx = dy w,  dw += dy' x.
void linear_backward(floatX *dx, float *dw, const floatX *dout, const floatX *x, const float *w, int R, int N, int K, int precision) {
  float *scratch = gemm_scratch((size_t)R, (size_t)N, (size_t)K);
  Product g = {0};
  g.M = (size_t)R, g.N = (size_t)K, g.K = (size_t)N;
  g.A = dout, g.a_row = (size_t)N, g.a_col = 1;
  set_b(&g, w, 0, (size_t)K, 1);
  g.C = dx;
  g.precision = precision;
  gemm(&g, scratch);
  g.M = (size_t)N, g.N = (size_t)K, g.K = (size_t)R;
  g.a_row = 1, g.a_col = (size_t)N;
  set_b(&g, x, 0, (size_t)K, 1);
  g.C = dw, g.accumulate = 1;
  gemm(&g, scratch);
}

// ---------------------------------------------------------------------------------------------------------
// The same table in a model that only runs: embedding, classifier, and the largest logit without the others (the screen of packed.h).

size_t head_table_bytes(int V, int C, int half) {
  return (size_t)V * C * (half ? sizeof(uint16_t) : sizeof(float));
}

size_t head_screen_bytes(int V, int C) {
  return screen_bytes((size_t)V, (size_t)C);
}

size_t head_scratch_bytes(int V, int C) {
  size_t logits = ((size_t)V * sizeof(float) + 63) / 64 * 64;
  return logits + screen_scratch_bytes((size_t)V, (size_t)C);
}

void head_rows(Head *h, const float *rows, int first, int n) {
  size_t C = (size_t)h->C;
#pragma omp parallel for schedule(static)
  for (int i = 0; i < n; i++) {
    const float *RESTRICT x = rows + (size_t)i * C;
    size_t at = (size_t)(first + i) * C;
    if (h->half) {
      uint16_t *RESTRICT t = (uint16_t *)h->table + at;
      for (size_t c = 0; c < C; c++) {
        uint32_t bits;
        memcpy(&bits, &x[c], 4);
        t[c] = (uint16_t)(bits >> 16);
      }
    } else {
      memcpy((float *)h->table + at, x, C * sizeof(float));
    }
  }
  head_screen(h, first, n);
}

void head_screen(Head *h, int first, int n) {
  size_t C = (size_t)h->C;
  float *rounded = scratch_floats((size_t)thread_count() * C), norm_max = 0;
  if (h->screen == NULL) return;
  Screen s = screen_at(h->screen);
#pragma omp parallel for schedule(static) reduction(max : norm_max)
  for (int i = first; i < first + n; i++) {
    float *RESTRICT r = rounded + (size_t)thread_index() * C;
    if (h->half) {
      const uint16_t *RESTRICT t = (const uint16_t *)h->table + (size_t)i * C;
      for (size_t c = 0; c < C; c++) r[c] = float_of_half(t[c]);
    } else {
      const float *RESTRICT x = (const float *)h->table + (size_t)i * C;
      for (size_t c = 0; c < C; c++) r[c] = h->precision == PRECISION_BF16 ? round_bf16(x[c]) : x[c];
    }
    float norm = screen_set_row(&s, (size_t)i, r, C);
    norm_max = norm > norm_max ? norm : norm_max;
  }
  *s.norm_max = norm_max > *s.norm_max ? norm_max : *s.norm_max;
}

void head_embedding(floatX *out, const int *tokens, const Head *h, int R) {
  size_t C = (size_t)h->C;
#pragma omp parallel for schedule(static) if (R > 1)
  for (int r = 0; r < R; r++) {
    float *RESTRICT o = out + (size_t)r * C;
    if (h->half) {
      const uint16_t *RESTRICT t = (const uint16_t *)h->table + (size_t)tokens[r] * C;
      for (size_t c = 0; c < C; c++) o[c] = float_of_half(t[c]);
    } else {
      memcpy(o, (const float *)h->table + (size_t)tokens[r] * C, C * sizeof(float));
    }
  }
}

static Product head_product(floatX *logits, const floatX *x, const Head *h, int R) {
  Product g = {0};
  g.M = (size_t)R, g.N = (size_t)h->V, g.K = (size_t)h->C;
  g.A = x, g.a_row = g.K, g.a_col = 1;
  if (h->half) g.B_half = (const uint16_t *)h->table;
  else g.B = (const float *)h->table;
  g.b_row = 1, g.b_col = g.K;
  g.C = logits;
  g.precision = h->precision;
  return g;
}

void head_forward(floatX *logits, const floatX *x, const Head *h, int R) {
  Product g = head_product(logits, x, h, R);
  if (gemm_is_few(&g)) gemm_few(&g, scratch_floats(gemm_few_scratch_bytes(g.K) / sizeof(float)));
  else gemm(&g, gemm_scratch(g.M, g.N, g.K));
}

void head_argmax(int *best, const floatX *x, const Head *h, int R, int V) {
  size_t space = ((size_t)h->V * sizeof(float) + 63) / 64 * 64;   // logits of one row
  float *logits = scratch_floats(head_scratch_bytes(h->V, h->C) / sizeof(float));
  char *scratch = (char *)logits + space;
  Product g = head_product(NULL, x, h, R);
  for (int r = 0; r < R; r++) best[r] = -1;
  if (h->screen) {
    Screen s = screen_at(h->screen);
    screen_argmax(best, &g, &s, (size_t)V, scratch);
  }
  for (int r = 0; r < R; r++) {
    if (best[r] >= 0) continue;
    Product row = head_product(logits, x + (size_t)r * g.K, h, 1);
    gemm_few(&row, scratch);
    best[r] = 0;
    for (int v = 1; v < V; v++) best[r] = logits[v] > logits[best[r]] ? v : best[r];
  }
}

// ---------------------------------------------------------------------------------------------------------
// Cross-entropy.

// loss = log sum_v exp(z_v) - z_target, with the largest logit taken out first so that nothing overflows.
void cross_entropy_forward(float *losses, float *lse, const floatX *logits, const int *targets, int R, int V) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < R; r++) {
    const float *z = logits + (size_t)r * V;
    float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
    for (int v = 0; v < V; v++) top = z[v] > top ? z[v] : top;
#pragma omp simd reduction(+ : sum)
    for (int v = 0; v < V; v++) sum += exp_fast(z[v] - top);
    lse[r] = top + logf(sum);
    losses[r] = targets[r] < 0 ? 0.0f : lse[r] - z[targets[r]];
  }
}

/*
loss = lse - z_target and d lse / dz_v = exp(z_v - lse) = p_v, so dz_v = coef (p_v - [v = target]). The coefficient is the
gradient of the total loss with respect to this row's loss: 1/N for a mean over N tokens, a weight, or an advantage.
*/
void cross_entropy_backward(floatX *logits, const float *lse, const int *targets, const float *coef, int R, int V) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < R; r++) {
    float *z = logits + (size_t)r * V, c = coef[r], log_sum = lse[r];
    if (targets[r] < 0) {
      memset(z, 0, (size_t)V * sizeof(float));
      continue;
    }
    for (int v = 0; v < V; v++) z[v] = c * exp_fast(z[v] - log_sum);
    z[targets[r]] -= c;
  }
}

/*
KL(p || q) = sum_v p_v (log p_v - log q_v). With g_v = log p_v - log q_v and dp_v/dz_j = p_v ([v = j] - p_j):

    dKL/dz_j = sum_v dp_v/dz_j (g_v + 1) = p_j (g_j + 1) - p_j sum_v p_v (g_v + 1) = p_j (g_j - KL)

The first pass over the row folds KL in double, because its terms are small and of both signs; the second writes the gradient.
*/
void policy_backward(float *kl, floatX *logits, const float *lse, const floatX *ref, const float *ref_lse, const int *targets,
                     const float *coef, const float *kl_coef, int R, int V) {
#pragma omp parallel for schedule(static)
  for (int r = 0; r < R; r++) {
    float *z = logits + (size_t)r * V, c = coef[r], k = kl_coef[r];
    const float *q = ref + (size_t)r * V;
    double sum = 0;
    kl[r] = 0;
    if (targets[r] < 0) {
      memset(z, 0, (size_t)V * sizeof(float));
      continue;
    }
    for (int v = 0; v < V; v++) sum += (double)exp_fast(z[v] - lse[r]) * (double)((z[v] - lse[r]) - (q[v] - ref_lse[r]));
    kl[r] = (float)sum;
    for (int v = 0; v < V; v++) {
      float p = exp_fast(z[v] - lse[r]), g = (z[v] - lse[r]) - (q[v] - ref_lse[r]);
      z[v] = p * (c + k * (g - kl[r]));
    }
    z[targets[r]] -= c;
  }
}

// ---------------------------------------------------------------------------------------------------------
// The optimizer.

/*
Adam keeps a running mean m of the gradient and v of its square and divides one by the root of the other, so every parameter moves by
about lr whatever the size of its gradients. Both start at zero, so early averages are too small; dividing by 1 - beta^t
corrects that. The W in AdamW: decay shrinks the parameter directly instead of being added to the gradient.
*/
void adamw_update(float *p, float *m, float *v, const float *g, size_t n, const Segment *segments, int count, float gscale, float lr,
                  float beta1, float beta2, float eps, float wd, int t) {
  float correct1 = (float)(1.0 / (1.0 - pow((double)beta1, t))), correct2 = (float)(1.0 / (1.0 - pow((double)beta2, t)));
  for (int s = 0; s < (count > 0 ? count : 1); s++) {
    size_t first = count > 0 ? segments[s].first : 0, end = s + 1 < count ? segments[s + 1].first : n;
    float keep = count > 0 && !segments[s].decays ? 1.0f : 1.0f - lr * wd;
#pragma omp parallel for simd schedule(static)
    for (size_t i = first; i < end; i++) {
      float gi = g[i] * gscale;
      float mi = m[i] = beta1 * m[i] + (1.0f - beta1) * gi;
      float vi = v[i] = beta2 * v[i] + (1.0f - beta2) * gi * gi;
      p[i] = p[i] * keep - lr * (mi * correct1) / (sqrtf(vi * correct2) + eps);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// The program. Tests include this file and bring their own main.

#ifndef TESTING
#include "modes/modes.h"   // the table of modes; everything above the ops

int main(int argc, char **argv) {
  wait_briefly(argv);
  return run_mode(argc, argv);
}
#endif
