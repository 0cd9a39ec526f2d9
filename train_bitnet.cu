/*
train_bitnet.cu: the operations of a BitNet b1.58 language model on an NVIDIA GPU, in the order in which a token meets them.

What it is:  the CUDA side of bitnet/ops.h, kernels and launchers, and the same main of a few lines. Four chapters have files of their
             own, included here at their places: device.cuh, weights.cuh, products.cuh, attention.cuh.
What not:    the mathematics: each operation and the derivation of its backward pass stand in train_bitnet.c; here it is explained
             how the work is dealt out to thousands of threads. Nor the model, the loop and the modes: the same headers serve both.
Read before: bitnet/ops.h, train_bitnet.c. From CUDA: blocks, warps, shared memory, __syncthreads, __shfl_xor_sync.
Needs:       compute capability 8.0 or newer, CUDA 12 or 13, cuBLASLt.

Numbers. Activations and their gradients are bf16 (floatX), sums and statistics fp32, master weights and their gradients fp32.
-DBITNET_FLOATX_F32 makes activations fp32 for the exact tests; only that build honours PRECISION_FP32, the bf16 build multiplies
bf16 operands in either precision.

Products, by the formats that meet:
    int8 x ternary -> int32     forward at lambda = 1. cuBLASLt on int8 codes for many rows; for a few rows (decoding) our own kernel
                                reads the weights at 2 bits each. Integer sums are exact, so both give the same bits.
                                With dx_int8 also the gradient of the input, by cuBLASLt.
    bf16 x bf16 -> fp32         the classifier, and the forward pass where activations stay float: our own kernel
    bf16 x bf16 -> fp32         the other products of the backward pass, and the forward pass of large batches at lambda < 1: cuBLASLt
    fp32 x fp32                 tests

"The bits of a row depend on that row alone" holds by construction for everything that sampling runs: each row of a norm,
quantiser or loss is one block whatever stands beside it; integer sums are exact; our own product kernels add each output in one
order of k that no tile size changes; and the two attention kernels (training, cache) go through the keys in the same blocks of 64
counted from the document's start. It is not promised where cuBLASLt computes floats: the forward pass at lambda < 1 with BLAS_ROWS
rows or more, and the backward pass; nor for the gradients of attention, whose blocks are counted from the row's start.

Determinism. No atomics on floats: sums across rows are cut into chunks by the shape alone, each chunk summed by one block, and the
chunks folded in order by a second kernel. cuBLASLt is deterministic for one algorithm, and algorithms are chosen once per shape.
*/
#ifndef CUDA_EMU_H                // dev/cuda_emu.h stands in for all this when there is no GPU
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

// The type of activations; ops.h leaves it to us.
#define BITNET_FLOATX
#ifdef BITNET_FLOATX_F32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif
typedef __nv_bfloat16 bf16;

#include "bitnet/ops.h"           // the contract that this file implements
#include "bitnet/utils.h"         // die, alloc_guard
#include "quant.h"                // ternary_gamma, ternary_code, act_inverse_scale, act_round, lambda_mix

#include <float.h>                // FLT_MAX
#include <type_traits>            // std::is_same

#include "device.cuh"             // the device, launches, loads, sums, scratch

// ---------------------------------------------------------------------------------------------------------
// Embedding.

template <int W, class T>
__global__ void embedding_forward_kernel(floatX *out, const int *tokens, const T *wte, int C) {
  size_t r = blockIdx.x;
  const T *row = wte + (size_t)tokens[r] * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    float v[W];
    load<W>(v, row + c);
    store<W>(out + r * C + c, v);
  }
}

template <class T>
static void embed(floatX *out, const int *tokens, const T *wte, int R, int C) {
  int width = width_of((size_t)C);
  unsigned threads = row_threads(C, width);
  if (width == 8) LAUNCH((embedding_forward_kernel<8, T>), (unsigned)R, threads, 0, out, tokens, wte, C);
  else if (width == 4) LAUNCH((embedding_forward_kernel<4, T>), (unsigned)R, threads, 0, out, tokens, wte, C);
  else LAUNCH((embedding_forward_kernel<1, T>), (unsigned)R, threads, 0, out, tokens, wte, C);
}

void embedding_forward(floatX *out, const int *tokens, const float *wte, int R, int C) {
  embed(out, tokens, wte, R, C);
}

/*
A row of the table collects the gradients of all places where its token occurred. To do that without atomics, and in a fixed order, the
rows are first sorted by token; then each run of equal tokens is summed by one block.

The sort: order (=) 0 .. R-1, so that tokens[order[i]] ascends and equal tokens stay in order. A radix sort by 4 bits at a time in
one block. Each thread owns a span of neighbouring entries and counts its 16 digits; the sum of all counts before its own, digits
first and threads second, tells where its entries go. Two buffers take turns; the result is in the first one.
*/
enum { SORT_THREADS = 512 };

__global__ void __launch_bounds__(SORT_THREADS) sort_tokens_kernel(int *order, int *other, const int *tokens, int R, int V) {
  __shared__ int count[16 * SORT_THREADS];   // [digit][thread]
  __shared__ int warp_total[WARP];
  int tid = threadIdx.x, lane = tid % WARP, span = (R + SORT_THREADS - 1) / SORT_THREADS;
  int begin = min(tid * span, R), end = min(begin + span, R), passes = 0;
  while (passes < 8 && (V - 1) >> 4 * passes > 0) passes++;
  int *from = passes % 2 ? other : order, *to = passes % 2 ? order : other;
  for (int i = begin; i < end; i++) from[i] = i;
  for (int pass = 0; pass < passes; pass++) {
    for (int d = 0; d < 16; d++) count[d * SORT_THREADS + tid] = 0;
    for (int i = begin; i < end; i++) count[(tokens[from[i]] >> 4 * pass & 15) * SORT_THREADS + tid]++;
    __syncthreads();
    int mine = 0;                            // thread t adds up counts 16t .. 16t+15
    for (int k = 0; k < 16; k++) mine += count[tid * 16 + k];
    int before = mine;                       // of this and all earlier lanes
    for (int m = 1; m < WARP; m <<= 1) {
      int v = __shfl_up_sync(FULL, before, m);
      if (lane >= m) before += v;
    }
    if (lane == WARP - 1) warp_total[tid / WARP] = before;
    __syncthreads();
    before -= mine;
    for (int w = 0; w < tid / WARP; w++) before += warp_total[w];
    for (int k = 0; k < 16; k++) {
      int n = count[tid * 16 + k];
      count[tid * 16 + k] = before;
      before += n;
    }
    __syncthreads();
    for (int i = begin; i < end; i++) to[count[(tokens[from[i]] >> 4 * pass & 15) * SORT_THREADS + tid]++] = from[i];
    __syncthreads();
    int *swap = from;
    from = to;
    to = swap;
  }
}

// Block i adds the run of equal tokens that starts at order[i]; where no run starts there is nothing to do.
template <int W>
__global__ void embedding_backward_kernel(float *dwte, const floatX *dout, const int *tokens, const int *order, int R, int C) {
  int first = blockIdx.x, token = tokens[order[first]];
  if (first > 0 && tokens[order[first - 1]] == token) return;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    float sum[W] = {0}, d[W];
    for (int i = first; i < R && tokens[order[i]] == token; i++) {
      load<W>(d, dout + (size_t)order[i] * C + c);
      for (int w = 0; w < W; w++) sum[w] += d[w];
    }
    load<W>(d, dwte + (size_t)token * C + c);
    for (int w = 0; w < W; w++) d[w] += sum[w];
    store<W>(dwte + (size_t)token * C + c, d);
  }
}

void embedding_backward(float *dwte, const floatX *dout, const int *tokens, int R, int V, int C) {
  int width = width_of((size_t)C);
  scratch_start();
  int *order = (int *)scratch_take((size_t)R * sizeof(int)), *other = (int *)scratch_take((size_t)R * sizeof(int));
  LAUNCH(sort_tokens_kernel, 1, SORT_THREADS, 0, order, other, tokens, R, V);
  LAUNCH_WIDTH(width, embedding_backward_kernel, (unsigned)R, row_threads(C, width), 0, dwte, dout, tokens, order, R, C);
}

// ---------------------------------------------------------------------------------------------------------
/*
Norm and quantisation of a row: one block for each row, one function for the three ops that differ only in where the row comes from.

A row is walked three times: for its root mean square, for its largest magnitude after the norm, and to write the codes. It is
read again each time; after the first time it lies in the L1 cache, so memory sees one read. A row source is a struct with get(v,
k): W values from position k on, as floats.
*/
struct PlainRow {
  const floatX *x;
  template <int W>
  __device__ void get(float (&v)[W], int k) const {
    load<W>(v, x + k);
  }
};

// act(z), and act'(z). relu2: max(z,0)^2, 2 max(z,0). silu: z sig(z), sig(z) (1 + z (1 - sig(z))).
__device__ inline float gate_value(float z, int act) {
  float positive = z < 0 ? 0.0f : z;   // this way round NaN stays NaN
  return act == ACT_RELU2 ? positive * positive : z / (1.0f + expf(-z));
}

__device__ inline float gate_slope(float z, int act) {
  if (act == ACT_RELU2) return 2.0f * (z < 0 ? 0.0f : z);
  float sigmoid = 1.0f / (1.0f + expf(-z));
  return sigmoid * (1.0f + z * (1.0f - sigmoid));
}

// u = act(gate) * up
struct GluRow {
  const floatX *gate, *up;
  int act;
  template <int W>
  __device__ void get(float (&v)[W], int k) const {
    float u[W];
    load<W>(v, gate + k);
    load<W>(u, up + k);
    for (int w = 0; w < W; w++) v[w] = __fmul_rn(gate_value(v[w], act), u[w]);
  }
};

// 1 / sqrt(mean v^2 + eps) of a row of K values.
template <int W, class Row>
__device__ inline float row_rstd(const Row &row, int K, float eps) {
  float sum = 0;
  for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) {
    float v[W];
    row.template get<W>(v, k);
    for (int w = 0; w < W; w++) sum += v[w] * v[w];
  }
  return 1.0f / sqrtf(block_sum(sum) / (float)K + eps);
}

// v (=) gain * (row * s), or the row itself where gain is NULL.
template <int W, class Row>
__device__ inline void row_normed(float (&v)[W], const Row &row, const float *gain, float s, int k) {
  row.template get<W>(v, k);
  if (gain == NULL) return;
  float g[W];
  load<W>(g, gain + k);
  for (int w = 0; w < W; w++) v[w] = __fmul_rn(g[w], __fmul_rn(v[w], s));
}

/*
Writes row r of a QAct, after an RMSNorm where gain is given (then rstd[r] (=)). quant.h explains the quantiser. A value that is
not finite makes the row's largest magnitude infinite, which is turned into a NaN scale (or NaN values), so that the loss shows
it.
*/
template <int W, class Row>
__device__ inline void quantise_row(const QAct &out, float *rstd, size_t r, const Row &row, const float *gain, int K, float eps) {
  float s = 1.0f, v[W];
  if (gain) {
    s = row_rstd<W>(row, K, eps);
    if (threadIdx.x == 0) rstd[r] = s;
  }
  if (out.bits == 0) {
    for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) {
      row_normed<W>(v, row, gain, s, k);
      store<W>((floatX *)out.data + r * K + k, v);
    }
    return;
  }
  float top = 0;
  for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) {
    row_normed<W>(v, row, gain, s, k);
    for (int w = 0; w < W; w++) top = isfinite(v[w]) ? fmaxf(top, fabsf(v[w])) : INFINITY;
  }
  top = block_max(top);
  bool bad = !isfinite(top);
  float levels = act_levels(out.bits), inverse = act_inverse_scale(top, out.bits), scale = 1.0f / inverse;
  bool codes = out.lambda == 1.0f;
  if (codes && threadIdx.x == 0) out.s[r] = bad ? NAN : scale;
  for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) {
    row_normed<W>(v, row, gain, s, k);
    for (int w = 0; w < W; w++) {
      float q = act_round(v[w], inverse, levels);
      v[w] = codes ? (bad ? 0.0f : q) : bad ? NAN : lambda_mix(v[w], q * scale, out.lambda);
    }
    if (codes) store<W>((int8_t *)out.data + r * K + k, v);
    else store<W>((floatX *)out.data + r * K + k, v);
  }
}

template <int W>
__global__ void norm_quant_kernel(QAct out, float *rstd, const floatX *x, const float *gain, int K, float eps) {
  PlainRow row = {x + (size_t)blockIdx.x * K};
  quantise_row<W>(out, rstd, blockIdx.x, row, gain, K, eps);
}

template <int W>
__global__ void glu_quant_kernel(QAct out, float *rstd, const floatX *gate_up, const float *gain, int F, int act, float eps) {
  const floatX *gate = gate_up + (size_t)blockIdx.x * 2 * F;
  GluRow row = {gate, gate + F, act};
  quantise_row<W>(out, rstd, blockIdx.x, row, gain, F, eps);
}

void act_quant_forward(QAct *out, const floatX *x, int R, int K) {
  int width = width_of((size_t)K);
  LAUNCH_WIDTH(width, norm_quant_kernel, (unsigned)R, row_threads(K, width), 0, *out, NULL, x, NULL, K, 0.0f);
}

void rmsnorm_quant_forward(QAct *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps) {
  int width = width_of((size_t)C);
  LAUNCH_WIDTH(width, norm_quant_kernel, (unsigned)R, row_threads(C, width), 0, *out, rstd, x, gain, C, eps);
}

template <int W>
__global__ void rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *x, const float *gain, int C, float eps) {
  size_t r = blockIdx.x;
  PlainRow row = {x + r * C};
  float s = row_rstd<W>(row, C, eps);
  if (threadIdx.x == 0) rstd[r] = s;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    float v[W];
    row_normed<W>(v, row, gain, s, c);
    store<W>(out + r * C + c, v);
  }
}

void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps) {
  int width = width_of((size_t)C);
  LAUNCH_WIDTH(width, rmsnorm_forward_kernel, (unsigned)R, row_threads(C, width), 0, out, rstd, x, gain, C, eps);
}

/*
dx_c += r (dxh_c - xh_c mean_k(dxh_k xh_k)),  dgain_c += dy_c xh_c,   with xh = x r, dxh = gain dy (derived in train_bitnet.c).

A block takes a chunk of rows one after the other, and each thread always the same columns, so the sums for dgain over the chunk's
rows stay in shared memory [W][C/W] where only their own thread touches them; they go to partial [chunks, C] at the end.
*/
template <int W>
__global__ void rmsnorm_backward_kernel(floatX *dx, float *partial, const floatX *dout, const floatX *x, const float *gain,
                                        const float *rstd,
                                        int R, int C, int add, int rows) {
  SHARED_DYNAMIC(float, dgain);
  int vectors = C / W, r1 = min((int)(blockIdx.x + 1) * rows, R);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) dgain[w * vectors + i] = 0;
  }
  for (int r = blockIdx.x * rows; r < r1; r++) {
    size_t at = (size_t)r * C;
    float s = rstd[r], dot = 0, g[W], dy[W], v[W], d[W] = {0};
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      load<W>(g, gain + i * W);
      load<W>(dy, dout + at + i * W);
      load<W>(v, x + at + i * W);
      for (int w = 0; w < W; w++) dot += g[w] * dy[w] * (v[w] * s);
    }
    float mean = block_sum(dot) / (float)C;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      load<W>(g, gain + i * W);
      load<W>(dy, dout + at + i * W);
      load<W>(v, x + at + i * W);
      if (add) load<W>(d, dx + at + i * W);
      for (int w = 0; w < W; w++) {
        float xh = v[w] * s, before = add ? d[w] : 0.0f;
        dgain[w * vectors + i] += dy[w] * xh;
        d[w] = before + s * (g[w] * dy[w] - xh * mean);
      }
      store<W>(dx + at + i * W, d);
    }
  }
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) partial[(size_t)blockIdx.x * C + i * W + w] = dgain[w * vectors + i];
  }
}

void rmsnorm_backward(floatX *dx, float *dgain, const floatX *dout, const floatX *x, const float *gain, const float *rstd, int R,
                      int C, int add) {
  int rows = chunk_rows(R, MAX_CHUNKS), chunks = (R + rows - 1) / rows;
  int width = width_of((size_t)C);
  scratch_start();
  float *partial = (float *)scratch_take((size_t)chunks * C * sizeof(float));
  size_t shared = (size_t)C * sizeof(float);
  allow_shared(KERNEL_OF_WIDTH(width, rmsnorm_backward_kernel), shared);
  LAUNCH_WIDTH(width, rmsnorm_backward_kernel, (unsigned)chunks, row_threads(C, width), shared, dx, partial, dout, x, gain, rstd, R,
               C, add, rows);
  fold_chunks(dgain, partial, chunks, C, C);
}

/*
The norm over each head of q and k: one warp for each head of a row; v is copied.
*/
enum { HEAD_WARPS = 8 };

__global__ void headnorm_forward_kernel(floatX *out, float *rstd, const floatX *qkv, const float *qgain, const float *kgain,
                                        int R, int NH, int NKV, int HS, float eps) {
  size_t item = (size_t)blockIdx.x * HEAD_WARPS + threadIdx.x / WARP, heads = (size_t)(NH + 2 * NKV);
  if (item >= (size_t)R * heads) return;
  size_t r = item / heads;
  int h = (int)(item % heads), lane = threadIdx.x % WARP;
  const floatX *x = qkv + item * HS;
  floatX *y = out + item * HS;
  if (h >= NH + NKV) {
    for (int i = lane; i < HS; i += WARP) y[i] = x[i];
    return;
  }
  const float *gain = h < NH ? qgain : kgain;
  float sum = 0;
  for (int i = lane; i < HS; i += WARP) sum += to_float(x[i]) * to_float(x[i]);
  float s = 1.0f / sqrtf(warp_sum(sum) / (float)HS + eps);
  if (lane == 0) rstd[r * (NH + NKV) + h] = s;
  for (int i = lane; i < HS; i += WARP) from_float(&y[i], gain[i] * (to_float(x[i]) * s));
}

void headnorm_forward(floatX *out, float *rstd, const floatX *qkv, const float *qgain, const float *kgain,
                      int R, int NH, int NKV, int HS, float eps) {
  size_t items = (size_t)R * (NH + 2 * NKV);
  LAUNCH(headnorm_forward_kernel, blocks_for(items, HEAD_WARPS), HEAD_WARPS * WARP, 0, out, rstd, qkv, qgain, kgain, R, NH, NKV,
         HS, eps);
}

// A block takes a chunk of rows; its warps take the heads of these rows in turn, and each keeps its own sums for the two gains in
// shared memory [warps][2 HS]. partial [chunks, 2 HS].
__global__ void headnorm_backward_kernel(floatX *dqkv, float *partial, const floatX *qkv, const float *qgain, const float *kgain,
                                         const float *rstd,
                                         int R, int NH, int NKV, int HS, int rows) {
  SHARED_DYNAMIC(float, sums);
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, heads = NH + NKV;
  int r0 = blockIdx.x * rows, r1 = min(r0 + rows, R);
  float *mine = sums + warp * 2 * HS;
  for (int i = lane; i < HS; i += WARP) mine[i] = mine[HS + i] = 0;   // a lane always has the same columns
  for (int item = warp; item < (r1 - r0) * heads; item += HEAD_WARPS) {
    int r = r0 + item / heads, h = item % heads;
    size_t at = (size_t)r * (NH + 2 * NKV) * HS + (size_t)h * HS;
    const float *gain = h < NH ? qgain : kgain;
    float *dgain = h < NH ? mine : mine + HS, s = rstd[(size_t)r * heads + h], dot = 0;
    for (int i = lane; i < HS; i += WARP) dot += gain[i] * to_float(dqkv[at + i]) * (to_float(qkv[at + i]) * s);
    float mean = warp_sum(dot) / (float)HS;
    for (int i = lane; i < HS; i += WARP) {
      float xh = to_float(qkv[at + i]) * s, dy = to_float(dqkv[at + i]);
      dgain[i] += dy * xh;
      from_float(&dqkv[at + i], s * (gain[i] * dy - xh * mean));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * HS; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < HEAD_WARPS; w++) sum += sums[w * 2 * HS + i];
    partial[(size_t)blockIdx.x * 2 * HS + i] = sum;
  }
}

void headnorm_backward(floatX *dqkv, float *dqgain, float *dkgain, const floatX *qkv, const float *qgain, const float *kgain,
                       const float *rstd, int R, int NH, int NKV, int HS) {
  int rows = chunk_rows(R, MAX_CHUNKS), chunks = (R + rows - 1) / rows;
  size_t shared = (size_t)HEAD_WARPS * 2 * HS * sizeof(float);
  scratch_start();
  float *partial = (float *)scratch_take((size_t)chunks * 2 * HS * sizeof(float));
  allow_shared(headnorm_backward_kernel, shared);
  LAUNCH(headnorm_backward_kernel, (unsigned)chunks, HEAD_WARPS * WARP, shared, dqkv, partial, qkv, qgain, kgain, rstd, R, NH, NKV,
         HS, rows);
  fold_chunks(dqgain, partial, chunks, HS, 2 * HS);
  fold_chunks(dkgain, partial + HS, chunks, HS, 2 * HS);
}

// ---------------------------------------------------------------------------------------------------------
// Ternary weights, then products with them.

#include "weights.cuh"            // weight_quantize, weight_pack, codes
#include "products.cuh"           // cuBLASLt, tensor cores, bitlinear_forward, bitlinear_backward

// ---------------------------------------------------------------------------------------------------------
// Rotary position embedding: a thread rotates W neighbouring pairs (i, i + HS/2) of a head.

template <int W>
__global__ void rope_kernel(floatX *qkv, const int *pos, const float *cossin, size_t n, int NH, int NKV, int HS, int direction) {
  size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= n) return;
  int half = HS / 2, per_head = half / W, heads = NH + NKV;
  int i = (int)(item % per_head) * W, h = (int)(item / per_head % heads);
  size_t r = item / per_head / heads;
  floatX *x = qkv + r * (NH + 2 * NKV) * HS + (size_t)h * HS + i;
  const float *angle = cossin + (size_t)pos[r] * HS + i;
  float a[W], b[W], cosine[W], sine[W];
  load<W>(a, x);
  load<W>(b, x + half);
  load<W>(cosine, angle);
  load<W>(sine, angle + half);
  for (int w = 0; w < W; w++) {
    float s = sine[w] * (float)direction, y = a[w] * cosine[w] - b[w] * s;
    b[w] = b[w] * cosine[w] + a[w] * s;
    a[w] = y;
  }
  store<W>(x, a);
  store<W>(x + half, b);
}

void rope_apply(floatX *qkv, const int *pos, const float *cossin, int R, int NH, int NKV, int HS, int direction) {
  int width = width_of((size_t)HS / 2);
  size_t n = (size_t)R * (NH + NKV) * (HS / 2) / (size_t)width;
  LAUNCH_WIDTH(width, rope_kernel, blocks_for(n, 256), 256, 0, qkv, pos, cossin, n, NH, NKV, HS, direction);
}

// ---------------------------------------------------------------------------------------------------------
// Attention.

#include "attention.cuh"          // attention_forward, attention_backward, attention_cached

// ---------------------------------------------------------------------------------------------------------
// The gated feed-forward unit. The forward kernel stands with the other quantisers above.

void glu_quant_forward(QAct *out, float *rstd, const floatX *gate_up, const float *gain, int R, int F, int act, float eps) {
  int width = width_of((size_t)F);
  LAUNCH_WIDTH(width, glu_quant_kernel, (unsigned)R, row_threads(F, width), 0, *out, rstd, gate_up, gain, F, act, eps);
}

/*
u = act(gate) * up, y = rmsnorm(u) (or u):  du as in rmsnorm_backward, dup = du act(gate), dgate = du up act'(gate). Built like
rmsnorm_backward_kernel; u is computed again from gate_up.
*/
template <int W>
__global__ void glu_backward_kernel(floatX *dgate_up, float *partial, const floatX *dout, const floatX *gate_up, const float *gain,
                                    const float *rstd,
                                    int R, int F, int act, int rows) {
  SHARED_DYNAMIC(float, dgain);
  int vectors = F / W, r1 = min((int)(blockIdx.x + 1) * rows, R);
  for (int i = threadIdx.x; gain && i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) dgain[w * vectors + i] = 0;
  }
  for (int r = blockIdx.x * rows; r < r1; r++) {
    const floatX *gate = gate_up + (size_t)r * 2 * F, *up = gate + F, *dy = dout + (size_t)r * F;
    floatX *dgate = dgate_up + (size_t)r * 2 * F;
    float s = 1.0f, mean = 0, a[W], b[W], d[W], g[W];
    if (gain) {
      float dot = 0;
      s = rstd[r];
      for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        load<W>(a, gate + i * W);
        load<W>(b, up + i * W);
        load<W>(d, dy + i * W);
        load<W>(g, gain + i * W);
        for (int w = 0; w < W; w++) dot += g[w] * d[w] * (gate_value(a[w], act) * b[w] * s);
      }
      mean = block_sum(dot) / (float)F;
    }
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      load<W>(a, gate + i * W);
      load<W>(b, up + i * W);
      load<W>(d, dy + i * W);
      if (gain) load<W>(g, gain + i * W);
      for (int w = 0; w < W; w++) {
        float value = gate_value(a[w], act), du = d[w];
        if (gain) {
          float uh = value * b[w] * s;
          dgain[w * vectors + i] += d[w] * uh;
          du = s * (g[w] * d[w] - uh * mean);
        }
        a[w] = du * b[w] * gate_slope(a[w], act);
        b[w] = du * value;
      }
      store<W>(dgate + i * W, a);
      store<W>(dgate + F + i * W, b);
    }
  }
  for (int i = threadIdx.x; gain && i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) partial[(size_t)blockIdx.x * F + i * W + w] = dgain[w * vectors + i];
  }
}

void glu_backward(floatX *dgate_up, float *dgain, const floatX *dout, const floatX *gate_up, const float *gain, const float *rstd,
                  int R, int F, int act) {
  int rows = chunk_rows(R, MAX_CHUNKS), chunks = (R + rows - 1) / rows;
  int width = width_of((size_t)F);
  size_t shared = gain ? (size_t)F * sizeof(float) : 0;
  scratch_start();
  float *partial = gain ? (float *)scratch_take((size_t)chunks * F * sizeof(float)) : NULL;
  allow_shared(KERNEL_OF_WIDTH(width, glu_backward_kernel), shared);
  LAUNCH_WIDTH(width, glu_backward_kernel, (unsigned)chunks, row_threads(F, width), shared, dgate_up, partial, dout, gate_up, gain,
               rstd, R, F, act, rows);
  if (gain) fold_chunks(dgain, partial, chunks, F, F);
}

// A product ends in the GPU's memory, from where the next kernel fetches it, so there is nothing to be done in one.
void gated_forward(QAct *out, float *rstd, floatX *gate_up, const QAct *x, const BitWeight *w, const float *gain, int R, int act,
                   float eps) {
  bitlinear_forward(gate_up, x, w, NULL, R);
  glu_quant_forward(out, rstd, gate_up, gain, R, w->N / 2, act, eps);
}

void gated_backward(floatX *dgate_up, float *dgain, const floatX *dout, const QAct *x, const BitWeight *w, const float *gain,
                    const float *rstd, int R, int act) {
  bitlinear_forward(dgate_up, x, w, NULL, R);
  glu_backward(dgate_up, dgain, dout, dgate_up, gain, rstd, R, w->N / 2, act);
}

// ---------------------------------------------------------------------------------------------------------
// The classifier: a plain float matrix. The forward product reads the fp32 master weights and rounds them on the way.

void linear_forward(floatX *out, const floatX *x, const float *w, int R, int N, int K, int precision) {
  if (fp32_products(precision)) matmul_f32(out, x, w, (const float *)NULL, (const float *)NULL, (const floatX *)NULL, R, N, K);
  else matmul_bf16(out, x, w, (const float *)NULL, (const float *)NULL, (const floatX *)NULL, R, N, K);
}

void linear_backward(floatX *dx, float *dw, const floatX *dout, const floatX *x, const float *w, int R, int N, int K, int precision) {
  Operand xo = {x, sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F, NULL}, wo = {w, CUDA_R_32F, NULL};
  int whole[3] = {N, 0, 0};
  product_backward(dx, dw, dout, &xo, &wo, whole, NULL, R, N, K, precision);
}

// ---------------------------------------------------------------------------------------------------------
/*
The same table in a model that only runs: embedding, classifier, and the largest logit. There is no screen here: all logits are
computed, for up to DECODE_ROWS rows at a time, and the largest is picked from them on the device.
*/
size_t head_table_bytes(int V, int C, int half) {
  return (size_t)V * (size_t)C * (half ? sizeof(bf16) : sizeof(float));
}

size_t head_screen_bytes(int V, int C) {
  (void)V, (void)C;
  return 0;
}

// Logits of DECODE_ROWS rows.
size_t head_scratch_bytes(int V, int C) {
  (void)C;
  return rounded((size_t)DECODE_ROWS * (size_t)V * sizeof(floatX));
}

void head_rows(Head *h, const float *rows, int first, int n) {
  size_t at = (size_t)first * h->C;
  if (h->half) convert((bf16 *)h->table + at, rows, NULL, n, h->C);
  else dev_copy((float *)h->table + at, rows, (size_t)n * h->C * sizeof(float));
}

void head_screen(Head *h, int first, int n) {
  (void)h, (void)first, (void)n;
}

void head_embedding(floatX *out, const int *tokens, const Head *h, int R) {
  if (h->half) embed(out, tokens, (const bf16 *)h->table, R, h->C);
  else embed(out, tokens, (const float *)h->table, R, h->C);
}

template <class T>
static void classify(floatX *logits, const floatX *x, const T *table, const Head *h, int R) {
  const float *none = NULL;
  if (fp32_products(h->precision)) matmul_f32(logits, x, table, none, none, (const floatX *)NULL, R, h->V, h->C);
  else matmul_bf16(logits, x, table, none, none, (const floatX *)NULL, R, h->V, h->C);
}

void head_forward(floatX *logits, const floatX *x, const Head *h, int R) {
  if (h->half) classify(logits, x, (const bf16 *)h->table, h, R);
  else classify(logits, x, (const float *)h->table, h, R);
}

/*
A logit and its token as one number that is larger where the logit is, and among equal logits where the token is smaller: the bits
of a float ascend with its value, once negative ones are turned over. NaN as on the CPU, which starts from token 0 and moves on where a
logit is larger: nothing is larger than a NaN at token 0, and a NaN elsewhere is never chosen.
*/
__device__ inline unsigned long long logit_key(float logit, int token) {
  uint32_t bits;
  float value = logit + 0.0f;   // -0 equals 0
  memcpy(&bits, &value, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (isnan(logit)) bits = token == 0 ? 0xFFFFFFFFu : 0;
  return (unsigned long long)bits << 32 | (0xFFFFFFFFu - (uint32_t)token);
}

template <int W>
__global__ void argmax_kernel(int *best, const floatX *logits, int rowlen, int V) {
  const floatX *z = logits + (size_t)blockIdx.x * rowlen;
  unsigned long long key = 0;
  for (int i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    float v[W];
    load<W>(v, z + i);
    for (int w = 0; w < W; w++) {
      if (i + w < V) key = Max::of(key, logit_key(v[w], i + w));
    }
  }
  key = block_fold<Max>(key, 0ull);
  if (threadIdx.x == 0) best[blockIdx.x] = (int)(0xFFFFFFFFu - (uint32_t)key);
}

void head_argmax(int *best, const floatX *x, const Head *h, int R, int V) {
  int width = width_of((size_t)h->V);
  for (int r0 = 0; r0 < R; r0 += DECODE_ROWS) {
    int m = R - r0 < DECODE_ROWS ? R - r0 : (int)DECODE_ROWS;
    scratch_start();
    floatX *logits = (floatX *)scratch_take((size_t)m * h->V * sizeof(floatX));
    head_forward(logits, x + (size_t)r0 * h->C, h, m);
    LAUNCH_WIDTH(width, argmax_kernel, (unsigned)m, row_threads(V, width), 0, best + r0, logits, h->V, V);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Cross-entropy: one block for each row.

// One pass: each thread keeps the largest logit it has seen and its sum of exponentials relative to that; at the end all are
// brought to the largest of the block.
template <int W>
__global__ void cross_entropy_forward_kernel(float *losses, float *lse, const floatX *logits, const int *targets, int V) {
  size_t r = blockIdx.x;
  const floatX *z = logits + r * V;
  float top = -FLT_MAX, sum = 0, v[W];   // not -infinity, which minus itself is NaN
  for (int i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    load<W>(v, z + i);
    float old = top;
    for (int w = 0; w < W; w++) top = fmaxf(top, v[w]);
    sum *= expf(old - top);
    for (int w = 0; w < W; w++) sum += expf(v[w] - top);
  }
  float row_top = block_max(top), row_sum = block_sum(sum * expf(top - row_top));
  if (threadIdx.x > 0) return;
  lse[r] = row_top + logf(row_sum);
  losses[r] = targets[r] < 0 ? 0.0f : lse[r] - to_float(z[targets[r]]);
}

void cross_entropy_forward(float *losses, float *lse, const floatX *logits, const int *targets, int R, int V) {
  int width = width_of((size_t)V);
  LAUNCH_WIDTH(width, cross_entropy_forward_kernel, (unsigned)R, row_threads(V, width), 0, losses, lse, logits, targets, V);
}

template <int W>
__global__ void cross_entropy_backward_kernel(floatX *logits, const float *lse, const int *targets, const float *coef, int V) {
  size_t r = blockIdx.x;
  int target = targets[r];
  float c = coef[r], log_sum = lse[r], v[W];
  for (int i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    load<W>(v, logits + r * V + i);
    for (int w = 0; w < W; w++) v[w] = target < 0 ? 0.0f : c * (expf(v[w] - log_sum) - (i + w == target ? 1.0f : 0.0f));
    store<W>(logits + r * V + i, v);
  }
}

void cross_entropy_backward(floatX *logits, const float *lse, const int *targets, const float *coef, int R, int V) {
  int width = width_of((size_t)V);
  LAUNCH_WIDTH(width, cross_entropy_backward_kernel, (unsigned)R, row_threads(V, width), 0, logits, lse, targets, coef, V);
}

template <int W>
__global__ void policy_backward_kernel(float *kl, floatX *logits, const float *lse, const floatX *ref, const float *ref_lse,
                                       const int *targets, const float *coef, const float *kl_coef, int V) {
  size_t r = blockIdx.x;
  int target = targets[r];
  float c = coef[r], k = kl_coef[r], log_sum = lse[r], ref_sum = ref_lse[r], sum = 0, z[W], q[W];
  for (int i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    load<W>(z, logits + r * V + i);
    load<W>(q, ref + r * V + i);
    for (int w = 0; w < W; w++) sum += expf(z[w] - log_sum) * ((z[w] - log_sum) - (q[w] - ref_sum));
  }
  float row_kl = block_sum(sum);
  if (threadIdx.x == 0) kl[r] = target < 0 ? 0.0f : row_kl;
  for (int i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    load<W>(z, logits + r * V + i);
    load<W>(q, ref + r * V + i);
    for (int w = 0; w < W; w++) {
      float p = expf(z[w] - log_sum), g = (z[w] - log_sum) - (q[w] - ref_sum);
      z[w] = target < 0 ? 0.0f : p * (c + k * (g - row_kl)) - (i + w == target ? c : 0.0f);
    }
    store<W>(logits + r * V + i, z);
  }
}

void policy_backward(float *kl, floatX *logits, const float *lse, const floatX *ref, const float *ref_lse, const int *targets,
                     const float *coef, const float *kl_coef, int R, int V) {
  int width = width_of((size_t)V);
  LAUNCH_WIDTH(width, policy_backward_kernel, (unsigned)R, row_threads(V, width), 0, kl, logits, lse, ref, ref_lse, targets, coef,
               kl_coef, V);
}

// ---------------------------------------------------------------------------------------------------------
// The optimizer.

// Whether value i decays: the last segment that starts at or before i says it.
__device__ inline bool decays_at(const Segment *segments, int count, size_t i) {
  int low = 0, high = count;   // segments[low].first <= i, segments[high].first > i
  while (high - low > 1) {
    int mid = (low + high) / 2;
    if (segments[mid].first <= i) low = mid;
    else high = mid;
  }
  return count == 0 || segments[low].decays;
}

// All tensors of an arena in one launch.
template <int W>
__global__ void adamw_kernel(float *p, float *m, float *v, const float *g, size_t n, const Segment *segments, int count, float gscale,
                             float lr, float beta1, float beta2, float eps, float wd, float correct1, float correct2) {
  size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
  if (i >= n) return;
  float keep = decays_at(segments, count, i) ? 1.0f - lr * wd : 1.0f;
  float pi[W], mi[W], vi[W], gi[W];
  load<W>(pi, p + i);
  load<W>(mi, m + i);
  load<W>(vi, v + i);
  load<W>(gi, g + i);
  for (int w = 0; w < W; w++) {
    float d = gi[w] * gscale;
    mi[w] = beta1 * mi[w] + (1.0f - beta1) * d;
    vi[w] = beta2 * vi[w] + (1.0f - beta2) * d * d;
    pi[w] = pi[w] * keep - lr * (mi[w] * correct1) / (sqrtf(vi[w] * correct2) + eps);
  }
  store<W>(p + i, pi);
  store<W>(m + i, mi);
  store<W>(v + i, vi);
}

void adamw_update(float *p, float *m, float *v, const float *g, size_t n, const Segment *segments, int count, float gscale, float lr,
                  float beta1, float beta2, float eps, float wd, int t) {
  float correct1 = (float)(1.0 / (1.0 - pow((double)beta1, t))), correct2 = (float)(1.0 / (1.0 - pow((double)beta2, t)));
  int width = aligned16(p) && aligned16(m) && aligned16(v) && aligned16(g) ? width_of(n) : 1;
  LAUNCH_WIDTH(width, adamw_kernel, blocks_for(n / (size_t)width, 256), 256, 0, p, m, v, g, n, segments, count, gscale, lr, beta1,
               beta2, eps, wd, correct1, correct2);
}

// ---------------------------------------------------------------------------------------------------------
// What the device can do at best: square products by cuBLASLt, and one kernel that only reads. Sizes grow with the number of
// multiprocessors, so that all are busy; numbers are random, for a product of zeros runs cooler and faster.

__global__ void random_bytes_kernel(uint32_t *out, size_t words, uint32_t mask) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)i * 0x9E3779B9u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    out[i] = (x ^ x >> 13) & mask;   // the mask keeps exponents of floats small
  }
}

__global__ void read_kernel(uint32_t *out, const uint4 *in, size_t words) {
  uint32_t mix = 0;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x) {
    uint4 v = in[i];
    mix ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (mix == 0x12345678u) *out = mix;   // almost never; but the compiler does not know
}

void dev_read(const void *p, size_t bytes) {
  unsigned blocks = (unsigned)gpu_.prop.multiProcessorCount * 8;
  LAUNCH(read_kernel, blocks, 256, 0, (uint32_t *)gpu_.sums, (const uint4 *)p, bytes / 16);
  CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
}

int dev_reads_host(void) {
  return 0;
}

void host_parallel(int n, void (*work)(void *ctx, int i), void *ctx) {
  for (int i = 0; i < n; i++) work(ctx, i);
}

// The best of `runs` runs of n x n x n products, operations a second; 0 if the library has none or there is no memory.
static double peak_product(int format, int runs) {
  const cudaDataType_t types[][2] = {{CUDA_R_32F, CUDA_R_32F}, {CUDA_R_16BF, CUDA_R_16BF}, {CUDA_R_8I, CUDA_R_32I}};
  int n = gpu_.prop.multiProcessorCount * 64;
  if (format == PEAK_FP32) n = n / 128 * 64 + 64;
  size_t bytes = (size_t)n * n * 4;
  char *memory = (char *)dev_malloc(3 * bytes);
  double best = 0;
  Product p = {};
  p.M = p.N = p.K = n;
  p.in = types[format][0], p.out = types[format][1];
  p.lda = p.ldb = p.ldd = (size_t)n;
  p.A = memory, p.B = memory + bytes, p.D = memory + 2 * bytes;
  p.b_trans = true;
  if (memory) LAUNCH(random_bytes_kernel, blocks_for(2 * bytes / 4, 256 * 64), 256, 0, (uint32_t *)memory, 2 * bytes / 4, 0xBF7FBF7Fu);
  bool able = memory && blas_product(&p);   // this one also looks for the algorithm
  for (int run = 0; able && run < runs; run++) {
    CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
    double t0 = time_now();
    for (int k = 0; k < 4; k++) blas_product(&p);
    CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
    double rate = 4 * 2.0 * n * n * n / (time_now() - t0);
    best = rate > best ? rate : best;
  }
  dev_free(memory);
  return best;
}

double dev_peak(int format) {
  return peak_product(format, 1);
}

void dev_peaks(Peaks *p) {
  size_t bytes = (size_t)gpu_.prop.multiProcessorCount << 23;
  p->fp32 = peak_product(PEAK_FP32, 10);
  p->bf16 = peak_product(PEAK_BF16, 10);
  p->int8 = peak_product(PEAK_INT8, 10);
  p->read = 0;
  char *memory = (char *)dev_malloc(bytes);
  for (int run = 0; memory && run < 10; run++) {
    CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
    double t0 = time_now();
    dev_read(memory, bytes);
    double rate = (double)bytes / (time_now() - t0);
    if (run > 0 && rate > p->read) p->read = rate;
  }
  dev_free(memory);
}

// ---------------------------------------------------------------------------------------------------------
// The program. Tests include this file and bring their own main.

#ifndef TESTING
#include "modes/modes.h"          // the table of modes; everything above the ops

int main(int argc, char **argv) {
  return run_mode(argc, argv);
}
#endif
