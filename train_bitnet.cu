/*
train_bitnet.cu: the operations of a BitNet b1.58 language model on an NVIDIA GPU, in the order in which a token meets them.

What it is:  the CUDA side of bitnet/ops.h, kernels and launchers, and the same main of a few lines.
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
    bf16 x bf16 -> fp32         the classifier, and the forward pass where activations stay float: our own kernel
    bf16 x bf16 -> fp32         both products of the backward pass, and the forward pass of large batches at lambda < 1: cuBLASLt
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

// ---------------------------------------------------------------------------------------------------------
// The device.

enum { WARP = 32, STAGE = 1 << 18, SUM_CHUNKS = 1024, WORKSPACE_BYTES = 32 << 20 };
#define FULL 0xFFFFFFFFu          // a mask of all lanes

static struct {
  cudaStream_t stream;            // the only one: everything happens in the order of the calls
  cublasLtHandle_t blas;
  cudaDeviceProp prop;
  floatX *stage;                  // [STAGE] page-locked host memory, for conversions on the way in and out
  float *constants;               // 0 and 1 in device memory
  double *sums;                   // [3, SUM_CHUNKS] in device memory: partial sums of whole tensors
  void *workspace;                // [WORKSPACE_BYTES] for cuBLASLt
} gpu_;

static void cuda_check_(cudaError_t e, int line) {
  if (e != cudaSuccess) die(EXIT_FAILED, "train_bitnet.cu:%d: CUDA: %s", line, cudaGetErrorString(e));
}

static void blas_check_(cublasStatus_t s, int line) {
  if (s != CUBLAS_STATUS_SUCCESS) die(EXIT_FAILED, "train_bitnet.cu:%d: cuBLASLt: status %d", line, (int)s);
}

#define CUDA_CHECK(call) cuda_check_(call, __LINE__)
#define BLAS_CHECK(call) blas_check_(call, __LINE__)

#ifndef CUDA_EMU_H
// All kernels start through this macro. A kernel with several template arguments goes in parentheses.
#define LAUNCH(kernel, grid, block, shared_bytes, ...)                            \
  do {                                                                            \
    kernel<<<(grid), (block), (shared_bytes), gpu_.stream>>>(__VA_ARGS__);        \
    CUDA_CHECK(cudaGetLastError());                                               \
  } while (0)
// The block's dynamic shared memory under a name and a type.
#define SHARED_DYNAMIC(Type, name)                        \
  extern __shared__ __align__(16) unsigned char shared_[]; \
  Type *name = (Type *)shared_
#endif

// Kernels along rows come in two widths: 8 values at a time where rows are a multiple of 8 long, else one by one.
#define LAUNCH_WIDTH(wide, kernel, grid, block, shared_bytes, ...)         \
  do {                                                                     \
    if (wide) LAUNCH(kernel<8>, grid, block, shared_bytes, __VA_ARGS__);   \
    else LAUNCH(kernel<1>, grid, block, shared_bytes, __VA_ARGS__);        \
  } while (0)

// threads has no meaning here; returns the number of multiprocessors.
int dev_init(int threads) {
  (void)threads;
  int count = 0;
  if (gpu_.stage) return gpu_.prop.multiProcessorCount;
  cudaError_t e = cudaGetDeviceCount(&count);
  if (e != cudaSuccess || count == 0) {
    const char *why = e == cudaSuccess ? "none found" : cudaGetErrorString(e);
    die(EXIT_FAILED, "no usable GPU (%s); train_bitnet runs everything on the CPU", why);
  }
  CUDA_CHECK(cudaSetDevice(0));
  CUDA_CHECK(cudaGetDeviceProperties(&gpu_.prop, 0));
  if (gpu_.prop.major < 8) {
    die(EXIT_FAILED, "%s has compute capability %d.%d; bf16 tensor cores need 8.0 or newer", gpu_.prop.name, gpu_.prop.major,
        gpu_.prop.minor);
  }
  CUDA_CHECK(cudaStreamCreate(&gpu_.stream));
  BLAS_CHECK(cublasLtCreate(&gpu_.blas));
  CUDA_CHECK(cudaMallocHost(&gpu_.stage, STAGE * sizeof(floatX)));
  const float constants[2] = {0.0f, 1.0f};
  CUDA_CHECK(cudaMalloc(&gpu_.constants, sizeof constants));
  dev_copy_in(gpu_.constants, constants, sizeof constants);
  CUDA_CHECK(cudaMalloc(&gpu_.sums, 3 * SUM_CHUNKS * sizeof(double)));
  CUDA_CHECK(cudaMalloc(&gpu_.workspace, WORKSPACE_BYTES));
  return gpu_.prop.multiProcessorCount;
}

const char *dev_name(void) {
  static char name[400];
  snprintf(name, sizeof name, "%s, compute capability %d.%d, %d multiprocessors, %s activations", gpu_.prop.name, gpu_.prop.major,
           gpu_.prop.minor,
           gpu_.prop.multiProcessorCount, sizeof(floatX) == 2 ? "bf16" : "fp32");
  return name;
}

void *dev_malloc(size_t bytes) {
  void *p = NULL;
  if (alloc_guard) die(EXIT_FAILED, "bug: %zu bytes of device memory allocated inside a training step", bytes);
  cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();   // forget the error: the caller deals with it
    return NULL;
  }
  CUDA_CHECK(e);
  dev_zero(p, bytes);
  return p;
}

void dev_free(void *p) {
  CUDA_CHECK(cudaFree(p));   // waits for work that uses it
}

size_t dev_memory_free(void) {
  size_t free_bytes = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
  return free_bytes;
}

void dev_zero(void *dst, size_t bytes) {
  CUDA_CHECK(cudaMemsetAsync(dst, 0, bytes, gpu_.stream));
}

void dev_copy(void *dst, const void *src, size_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, gpu_.stream));
}

// From ordinary host memory the call returns when the source has been read, so the caller may reuse it at once.
void dev_copy_in(void *dst, const void *src, size_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, gpu_.stream));
}

void dev_copy_out(void *dst, const void *src, size_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, gpu_.stream));
  CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
}

int ops_honours_precision(int precision) {
  return precision != PRECISION_FP32 || sizeof(floatX) == sizeof(float);
}

size_t ops_logits_bytes(void) {
  return (size_t)512 << 20;
}

// ---------------------------------------------------------------------------------------------------------
/*
Graphs. A decoding step is some hundred kernels of a few microseconds each, and starting one costs about as much; a graph is recorded
once and started by one call. Kernels keep the arguments that they were recorded with, among them pointers into the scratch memory:
when that moves, graph_version_ tells. A graph is recorded at its second use: the first loads the kernels, and most stretches that run
once (a prompt) never come back.
*/
static int graph_version_;

int dev_graph_begin(Graph *g) {
  if (g->recorded && g->version == graph_version_) {
    CUDA_CHECK(cudaGraphLaunch((cudaGraphExec_t)g->recorded, gpu_.stream));
    return 0;
  }
  if (g->recorded) {
    dev_graph_free(g);
    g->calls = 1;   // so that it is recorded again at once
  }
  if (g->calls++ > 0) CUDA_CHECK(cudaStreamBeginCapture(gpu_.stream, cudaStreamCaptureModeThreadLocal));
  return 1;
}

void dev_graph_end(Graph *g) {
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  if (g->calls < 2) return;
  CUDA_CHECK(cudaStreamEndCapture(gpu_.stream, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&recorded, graph, 0));
  CUDA_CHECK(cudaGraphDestroy(graph));
  CUDA_CHECK(cudaGraphLaunch(recorded, gpu_.stream));
  g->recorded = recorded;
  g->version = graph_version_;
}

void dev_graph_free(Graph *g) {
  if (g->recorded) CUDA_CHECK(cudaGraphExecDestroy((cudaGraphExec_t)g->recorded));
  memset(g, 0, sizeof *g);
}

// ---------------------------------------------------------------------------------------------------------
// Single values, and loads of several at once.

__host__ __device__ inline float to_float(float x) {
  return x;
}

__host__ __device__ inline float to_float(bf16 x) {
  return __bfloat162float(x);
}

__host__ __device__ inline float to_float(int8_t x) {
  return (float)x;
}

__host__ __device__ inline float to_float(int32_t x) {
  return (float)x;
}

__host__ __device__ inline void from_float(float *dst, float v) {
  *dst = v;
}

__host__ __device__ inline void from_float(bf16 *dst, float v) {
  *dst = __float2bfloat16(v);
}

void dev_floatx_in(floatX *dst, const float *src, size_t n) {
  for (size_t i = 0; i < n; i += STAGE) {
    size_t m = n - i < STAGE ? n - i : (size_t)STAGE;
    for (size_t k = 0; k < m; k++) from_float(&gpu_.stage[k], src[i + k]);
    dev_copy_in(dst + i, gpu_.stage, m * sizeof(floatX));
    CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));   // page-locked memory is read later than the call returns
  }
}

void dev_floatx_out(float *dst, const floatX *src, size_t n) {
  for (size_t i = 0; i < n; i += STAGE) {
    size_t m = n - i < STAGE ? n - i : (size_t)STAGE;
    dev_copy_out(gpu_.stage, src + i, m * sizeof(floatX));
    for (size_t k = 0; k < m; k++) dst[i + k] = to_float(gpu_.stage[k]);
  }
}

// A memory access is widest at 16 bytes a thread; these are the words of the possible widths.
template <int BYTES>
struct Word;
template <>
struct Word<8> {
  typedef uint2 Type;
};
template <>
struct Word<16> {
  typedef uint4 Type;
};

// v (=) W values from src as floats; for W = 8 src must be a multiple of 8 values from an aligned start.
template <int W, class T>
__device__ inline void load(float (&v)[W], const T *src) {
  if constexpr (W == 1) {
    v[0] = to_float(*src);
  } else {
    constexpr int N = W * sizeof(T) > 16 ? 16 / sizeof(T) : W;   // values in one access
#pragma unroll
    for (int i = 0; i < W; i += N) {
      typename Word<N * sizeof(T)>::Type word = *(const typename Word<N * sizeof(T)>::Type *)(src + i);
      T part[N];
      memcpy(part, &word, sizeof word);
#pragma unroll
      for (int n = 0; n < N; n++) v[i + n] = to_float(part[n]);
    }
  }
}

// The same the other way; int8 takes values that are integers already.
template <int W, class T>
__device__ inline void store(T *dst, const float (&v)[W]) {
  constexpr int N = W == 1 ? 1 : W * sizeof(T) > 16 ? 16 / sizeof(T) : W;
#pragma unroll
  for (int i = 0; i < W; i += N) {
    T part[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      if constexpr (std::is_same<T, int8_t>::value) part[n] = (int8_t)v[i + n];
      else from_float(&part[n], v[i + n]);
    }
    if constexpr (W == 1) {
      dst[0] = part[0];
    } else {
      typename Word<N * sizeof(T)>::Type word;
      memcpy(&word, part, sizeof word);
      *(typename Word<N * sizeof(T)>::Type *)(dst + i) = word;
    }
  }
}

// Sums and maxima over a warp or a block; every thread gets the result. The order depends on the number of threads only.
struct Sum {
  template <class T>
  static __device__ T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  static __device__ float of(float a, float b) {
    return fmaxf(a, b);
  }
  static __device__ unsigned long long of(unsigned long long a, unsigned long long b) {
    return a > b ? a : b;
  }
};

template <class Op, class T>
__device__ inline T warp_fold(T v) {
  for (int m = WARP / 2; m > 0; m /= 2) v = Op::of(v, __shfl_xor_sync(FULL, v, m));
  return v;
}

// All threads of the block must come here, and the block must consist of whole warps. none: what changes no result.
template <class Op, class T>
__device__ inline T block_fold(T v, T none) {
  __shared__ T part[WARP];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  v = warp_fold<Op>(v);
  __syncthreads();   // nobody still reads the parts of an earlier call
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_fold<Op>(lane < warps ? part[lane] : none);
}

__device__ inline float warp_sum(float v) {
  return warp_fold<Sum>(v);
}

__device__ inline float warp_max(float v) {
  return warp_fold<Max>(v);
}

template <class T>
__device__ inline T block_sum(T v) {
  return block_fold<Sum>(v, (T)0);
}

__device__ inline float block_max(float v) {
  return block_fold<Max>(v, -INFINITY);
}

static unsigned blocks_for(size_t work, size_t per_block) {
  return (unsigned)((work + per_block - 1) / per_block);
}

static bool aligned16(const void *p) {
  return (uintptr_t)p % 16 == 0;
}

// Threads for one row of n values, `width` at a time: whole warps, 32 to 512.
static unsigned row_threads(int n, bool wide) {
  unsigned threads = blocks_for((size_t)(wide ? n / 8 : n), WARP) * WARP;
  return threads < 32 ? 32 : threads > 512 ? 512 : threads;
}

// Kernels that keep a row in shared memory may need more than the 48 KiB that every kernel gets.
template <class Kernel>
static void allow_shared(Kernel *kernel, size_t bytes) {
  if (bytes <= 48 << 10) return;
  if (bytes > gpu_.prop.sharedMemPerBlockOptin) {
    die(EXIT_FAILED, "a row of %zu bytes does not fit the %zu bytes of shared memory of %s", bytes,
        gpu_.prop.sharedMemPerBlockOptin, gpu_.prop.name);
  }
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// ---------------------------------------------------------------------------------------------------------
// Scratch: what the op that is running needs. Large temporaries are made for a bounded number of rows at a time; the bounds are
// constants, so that they do not change any sum.

static size_t sums_bytes = 32 << 20, operand_bytes = 128 << 20;   // variables only for the tests
enum { ROWS_PER_CHUNK = 32, MAX_CHUNKS = 1024, BIAS_CHUNKS = 64, SUM_SIZE = 8192 };

static struct {
  char *data;
  size_t bytes, used;
} scratch_;

static size_t rounded(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

static size_t smaller(size_t a, size_t b) {
  return a < b ? a : b;
}

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

// The whole batch at once: a GPU has no use for smaller pieces.
int ops_row_block(void) {
  return 1 << 30;
}

size_t ops_scratch_bytes(size_t R, size_t N, size_t K) {
  size_t sums = smaller(R * N * sizeof(float), larger(sums_bytes, N * sizeof(float)));
  size_t codes = smaller(N * K, larger(operand_bytes, 16 * K));
  size_t forward = rounded(sums) + rounded(codes);
  size_t rows = smaller(R * (N + 2 * K) * sizeof(float), larger(operand_bytes, (N + 2 * K) * sizeof(float)));
  size_t weights = smaller(N * K * sizeof(float), larger(operand_bytes, K * sizeof(float)));
  size_t gains = smaller(R, MAX_CHUNKS) * 2 * K * sizeof(float), biases = smaller(R, BIAS_CHUNKS) * N * sizeof(float);
  size_t tokens = 2 * rounded(R * sizeof(int));
  size_t most = larger(larger(forward, rows + weights + 256 * 4), larger(gains, biases));
  return rounded(larger(most, tokens)) + 256;
}

void ops_set_scratch(void *scratch, size_t bytes) {
  scratch_.data = (char *)scratch;
  scratch_.bytes = bytes;
  graph_version_++;
}

// An op that needs scratch calls scratch_start once, then takes pieces.
static void scratch_start(void) {
  scratch_.used = 0;
}

static void *scratch_take(size_t bytes) {
  void *p = scratch_.data + scratch_.used;
  scratch_.used += rounded(bytes);
  if (scratch_.used > scratch_.bytes) die(EXIT_FAILED, "bug: an op needs %zu bytes of scratch, %zu reserved", scratch_.used,
                                          scratch_.bytes);
  return p;
}

// How many rows of `bytes_per_row` bytes are made at a time within a bound.
static int rows_at_a_time(size_t bound, size_t bytes_per_row, int R) {
  size_t rows = bytes_per_row ? bound / bytes_per_row : (size_t)R;
  if (rows >= (size_t)R) return R;
  return rows >= 256 ? (int)(rows / 256 * 256) : rows > 0 ? (int)rows : 1;
}

// ---------------------------------------------------------------------------------------------------------
// Sums over whole tensors and across rows, in an order that only depends on the shape.

// out[c] += sum over chunks of partial[chunk * stride + c], c < C. 8 groups of threads take every eighth chunk; then the groups
// are added in order.
__global__ void fold_chunks_kernel(float *out, const float *partial, int chunks, int C, int stride) {
  __shared__ float group[8][WARP + 1];
  int c = blockIdx.x * WARP + threadIdx.x;
  float sum = 0;
  if (c < C) {
    for (int k = threadIdx.y; k < chunks; k += 8) sum += partial[(size_t)k * stride + c];
  }
  group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < C) {
    float total = 0;
    for (int g = 0; g < 8; g++) total += group[g][threadIdx.x];
    out[c] += total;
  }
}

static void fold_chunks(float *out, const float *partial, int chunks, int C, int stride) {
  LAUNCH(fold_chunks_kernel, blocks_for((size_t)C, WARP), dim3(WARP, 8), 0, out, partial, chunks, C, stride);
}

// Rows of one chunk when R rows make at most max_chunks chunks of at least ROWS_PER_CHUNK rows.
static int chunk_rows(int R, int max_chunks) {
  int rows = (R + max_chunks - 1) / max_chunks;
  return rows > ROWS_PER_CHUNK ? rows : ROWS_PER_CHUNK;
}

// partial[chunk, n] = sum of x[r,n] over the rows of the chunk.
__global__ void column_sums_kernel(float *partial, const floatX *x, int R, int N, int rows) {
  int n = blockIdx.x * blockDim.x + threadIdx.x, r0 = blockIdx.y * rows, r1 = min(r0 + rows, R);
  if (n >= N) return;
  float sum = 0;
  for (int r = r0; r < r1; r++) sum += to_float(x[(size_t)r * N + n]);
  partial[(size_t)blockIdx.y * N + n] = sum;
}

// out[n] += sum_r x[r,n]: the gradient of a bias.
static void add_column_sums(float *out, const floatX *x, int R, int N) {
  int rows = chunk_rows(R, BIAS_CHUNKS), chunks = (R + rows - 1) / rows;
  scratch_start();
  float *partial = (float *)scratch_take((size_t)chunks * N * sizeof(float));
  LAUNCH(column_sums_kernel, dim3(blocks_for((size_t)N, 128), (unsigned)chunks), 128, 0, partial, x, R, N, rows);
  fold_chunks(out, partial, chunks, N, N);
}

// The block's share of sum |x| or sum x^2 over n values cut into `chunks` equal pieces, in double.
__device__ inline double chunk_sum(const float *x, size_t n, int chunk, int chunks, bool squares) {
  size_t size = (n + chunks - 1) / chunks, end = min((size_t)(chunk + 1) * size, n);
  double sum = 0;
  for (size_t i = (size_t)chunk * size + threadIdx.x; i < end; i += blockDim.x) {
    double v = (double)x[i];
    sum += squares ? v * v : fabs(v);
  }
  return block_sum(sum);
}

__device__ inline double fold_sum(const double *partial, int chunks) {
  double sum = 0;
  for (int k = threadIdx.x; k < chunks; k += blockDim.x) sum += partial[k];
  return block_sum(sum);
}

__global__ void chunk_sums_kernel(double *partial, const float *x, size_t n, bool squares) {
  double sum = chunk_sum(x, n, blockIdx.x, gridDim.x, squares);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void fold_sum_kernel(double *out, const double *partial, int chunks) {
  double sum = fold_sum(partial, chunks);
  if (threadIdx.x == 0) *out = sum;
}

// Into how many pieces the sum over n values is cut.
__host__ __device__ inline int sum_chunks(size_t n) {
  size_t chunks = (n + SUM_SIZE - 1) / SUM_SIZE;
  return chunks < 1 ? 1 : chunks < SUM_CHUNKS ? (int)chunks : SUM_CHUNKS;
}

void sum_squares(double *out, const float *x, size_t n) {
  int chunks = sum_chunks(n);
  LAUNCH(chunk_sums_kernel, (unsigned)chunks, 256, 0, gpu_.sums, x, n, true);
  LAUNCH(fold_sum_kernel, 1, 256, 0, out, gpu_.sums, chunks);
}

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
  if (C % 8 == 0) LAUNCH((embedding_forward_kernel<8, T>), (unsigned)R, row_threads(C, true), 0, out, tokens, wte, C);
  else LAUNCH((embedding_forward_kernel<1, T>), (unsigned)R, row_threads(C, false), 0, out, tokens, wte, C);
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
  bool wide = C % 8 == 0;
  scratch_start();
  int *order = (int *)scratch_take((size_t)R * sizeof(int)), *other = (int *)scratch_take((size_t)R * sizeof(int));
  LAUNCH(sort_tokens_kernel, 1, SORT_THREADS, 0, order, other, tokens, R, V);
  LAUNCH_WIDTH(wide, embedding_backward_kernel, (unsigned)R, row_threads(C, wide), 0, dwte, dout, tokens, order, R, C);
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
  bool wide = K % 8 == 0;
  LAUNCH_WIDTH(wide, norm_quant_kernel, (unsigned)R, row_threads(K, wide), 0, *out, NULL, x, NULL, K, 0.0f);
}

void rmsnorm_quant_forward(QAct *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps) {
  bool wide = C % 8 == 0;
  LAUNCH_WIDTH(wide, norm_quant_kernel, (unsigned)R, row_threads(C, wide), 0, *out, rstd, x, gain, C, eps);
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
  bool wide = C % 8 == 0;
  LAUNCH_WIDTH(wide, rmsnorm_forward_kernel, (unsigned)R, row_threads(C, wide), 0, out, rstd, x, gain, C, eps);
}

/*
dx_c += r (dxh_c - xh_c mean_k(dxh_k xh_k)),  dgain_c += dy_c xh_c,   with xh = x r, dxh = gain dy (derived in train_bitnet.c).

A block takes a chunk of rows one after the other, and each thread always the same columns, so the sums for dgain over the chunk's
rows stay in shared memory [W][C/W] where only their own thread touches them; they go to partial [chunks, C] at the end.
*/
template <int W>
__global__ void rmsnorm_backward_kernel(floatX *dx, float *partial, const floatX *dout, const floatX *x, const float *gain,
                                        const float *rstd,
                                        int R, int C, int rows) {
  SHARED_DYNAMIC(float, dgain);
  int vectors = C / W, r1 = min((int)(blockIdx.x + 1) * rows, R);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) dgain[w * vectors + i] = 0;
  }
  for (int r = blockIdx.x * rows; r < r1; r++) {
    size_t at = (size_t)r * C;
    float s = rstd[r], dot = 0, g[W], dy[W], v[W], d[W];
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
      load<W>(d, dx + at + i * W);
      for (int w = 0; w < W; w++) {
        float xh = v[w] * s;
        dgain[w * vectors + i] += dy[w] * xh;
        d[w] += s * (g[w] * dy[w] - xh * mean);
      }
      store<W>(dx + at + i * W, d);
    }
  }
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    for (int w = 0; w < W; w++) partial[(size_t)blockIdx.x * C + i * W + w] = dgain[w * vectors + i];
  }
}

void rmsnorm_backward(floatX *dx, float *dgain, const floatX *dout, const floatX *x, const float *gain, const float *rstd, int R,
                      int C) {
  int rows = chunk_rows(R, MAX_CHUNKS), chunks = (R + rows - 1) / rows;
  bool wide = C % 8 == 0;
  scratch_start();
  float *partial = (float *)scratch_take((size_t)chunks * C * sizeof(float));
  size_t shared = (size_t)C * sizeof(float);
  allow_shared(wide ? rmsnorm_backward_kernel<8> : rmsnorm_backward_kernel<1>, shared);
  LAUNCH_WIDTH(wide, rmsnorm_backward_kernel, (unsigned)chunks, row_threads(C, wide), shared, dx, partial, dout, x, gain, rstd, R,
               C, rows);
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
/*
BitLinear. What weight_quantize leaves in BitWeight.data:
    lambda = 1    codes [N,K] int8      for cuBLASLt's integer product
                  codes [N,K] bf16      for the backward pass; exact
                  packed                2 bits a code, for our own integer kernel: see ternary_forward_kernel
    lambda < 1    values [N,K] floatX
weight_pack leaves the 2-bit form only.
*/
enum { TILE_N = 16, TILE_K = 128 };   // outputs and inputs of one packed tile: 128 words of 16 codes

static bool fp32_products(int precision) {
  return precision == PRECISION_FP32 && sizeof(floatX) == sizeof(float);
}

static size_t packed_bytes(int N, int K) {
  return (size_t)blocks_for((size_t)N, TILE_N) * blocks_for((size_t)K, TILE_K) * TILE_N * TILE_K / 4;
}

static int8_t *weight_codes(const BitWeight *w) {
  return (int8_t *)w->data;
}

static bf16 *weight_bf16_codes(const BitWeight *w) {
  return (bf16 *)((char *)w->data + rounded((size_t)w->N * w->K));
}

// The 2-bit form: behind the others, or all there is.
static uint4 *weight_packed(const BitWeight *w) {
  if (w->packed) return (uint4 *)w->data;
  return (uint4 *)((char *)weight_bf16_codes(w) + rounded((size_t)w->N * w->K * sizeof(bf16)));
}

size_t bitweight_bytes(int N, int K) {
  size_t n = (size_t)N * (size_t)K;
  return larger(n * sizeof(float), rounded(n) + rounded(n * sizeof(bf16)) + packed_bytes(N, K));
}

// The first row of a part and its number of rows.
__host__ __device__ inline int part_start(const BitWeight &w, int part) {
  return part == 0 ? 0 : part == 1 ? w.parts[0] : w.parts[0] + w.parts[1];
}

// partial (=) [3, SUM_CHUNKS] sums of |w| of each part; blockIdx.y is the part. A part is cut into pieces by its own size, so that its
// gamma does not depend on what lies beside it.
__global__ void weight_sums_kernel(double *partial, BitWeight w, const float *master) {
  int part = blockIdx.y;
  size_t n = (size_t)w.parts[part] * w.K;
  int chunks = sum_chunks(n);
  if ((int)blockIdx.x >= chunks) return;
  double sum = chunk_sum(master + (size_t)part_start(w, part) * w.K, n, blockIdx.x, chunks, false);
  if (threadIdx.x == 0) partial[part * SUM_CHUNKS + blockIdx.x] = sum;
}

// gamma[n] (=) of each part; a NaN among the weights stays visible.
__global__ void weight_gamma_kernel(const double *partial, BitWeight w) {
  int part = blockIdx.x, first = part_start(w, part);
  size_t n = (size_t)w.parts[part] * w.K;
  float mean = (float)(fold_sum(partial + part * SUM_CHUNKS, sum_chunks(n)) / (double)n);
  float gamma = mean == mean ? ternary_gamma(mean) : mean;
  for (int i = threadIdx.x; i < w.parts[part]; i += blockDim.x) w.gamma[first + i] = gamma;
}

/*
Where the 2-bit codes of a tile of 16 outputs x 128 inputs lie. Word `step` of lane l holds 16 codes: field i of byte b, its bits
8 b + 2 i and the next, is the code + 1 of the output and input below, counted within the tile. ternary_forward_kernel tells why.
*/
__host__ __device__ inline int field_output(int lane, int i) {
  return lane / 4 + i % 2 * 8;
}

__host__ __device__ inline int field_input(int lane, int step, int i, int b) {
  return step * 32 + i / 2 * 16 + lane % 4 * 4 + b;
}

__host__ __device__ inline size_t word_at(size_t tile, int lane, int step) {
  return (tile * WARP + lane) * 4 + step;
}

// A block quantises a tile of 16 outputs x 128 inputs, one thread for each column; at lambda = 1 the tile meets in shared memory
// and each thread packs one word of it. codes, wide, packed: the three forms of codes; values: [N,K] at lambda < 1.
__global__ void __launch_bounds__(TILE_K) weight_codes_kernel(BitWeight w, int8_t *codes, bf16 *wide, uint32_t *packed,
                                                              floatX *values, const float *master) {
  __shared__ int8_t tile[TILE_N][TILE_K];
  int k = blockIdx.x * TILE_K + threadIdx.x, n0 = blockIdx.y * TILE_N;
  bool ternary = w.lambda == 1.0f;
  for (int i = 0; i < TILE_N; i++) {
    int n = n0 + i, code = 0;
    if (n < w.N && k < w.K) {
      size_t at = (size_t)n * w.K + k;
      float m = master[at], gamma = w.gamma[n];
      code = ternary_code(m, 1.0f / gamma);
      if (ternary) {
        codes[at] = (int8_t)code;
        from_float(&wide[at], (float)code);
      } else {
        from_float(&values[at], lambda_mix(m, (float)code * gamma, w.lambda));
      }
    }
    tile[i][threadIdx.x] = (int8_t)code;
  }
  if (!ternary) return;
  __syncthreads();
  int lane = threadIdx.x % WARP, step = threadIdx.x / WARP;
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) {
    for (int b = 0; b < 4; b++) {
      int code = tile[field_output(lane, i)][field_input(lane, step, i, b)];
      word |= (uint32_t)(code + 1) << (8 * b + 2 * i);
    }
  }
  packed[word_at((size_t)blockIdx.y * gridDim.x + blockIdx.x, lane, step)] = word;
}

// gamma of all parts from the master weights.
static void weight_gammas(const BitWeight *w, const float *master) {
  int parts = w->parts[2] > 0 ? 3 : w->parts[1] > 0 ? 2 : 1, most = 0;
  for (int part = 0; part < parts; part++) most = w->parts[part] > most ? w->parts[part] : most;
  unsigned chunks = (unsigned)sum_chunks((size_t)most * (size_t)w->K);
  LAUNCH(weight_sums_kernel, dim3(chunks, (unsigned)parts), 256, 0, gpu_.sums, *w, master);
  LAUNCH(weight_gamma_kernel, (unsigned)parts, 256, 0, gpu_.sums, *w);
}

void weight_quantize(BitWeight *w, const float *master, float lambda) {
  dim3 tiles(blocks_for((size_t)w->K, TILE_K), blocks_for((size_t)w->N, TILE_N));
  w->lambda = lambda;
  w->packed = 0;
  weight_gammas(w, master);
  int8_t *codes = weight_codes(w);
  bf16 *wide = weight_bf16_codes(w);
  uint32_t *packed = (uint32_t *)weight_packed(w);
  LAUNCH(weight_codes_kernel, tiles, TILE_K, 0, *w, codes, wide, packed, (floatX *)w->data, master);
}

size_t bitweight_packed_bytes(int N, int K) {
  return packed_bytes(N, K);
}

__device__ inline int code_of(float master, float inverse_gamma) {
  return ternary_code(master, inverse_gamma);
}

__device__ inline int code_of(int8_t code, float inverse_gamma) {
  (void)inverse_gamma;
  return code;
}

// Rows first .. first+rows-1 of packed from the values [rows,K] of one part; a block writes a tile, a thread a word. Parts may share
// words: zeroed memory and one part at a time make "or" enough.
template <class T>
__global__ void __launch_bounds__(TILE_K)
weight_pack_kernel(uint32_t *packed, const float *gamma, const T *values, int first, int rows, int K) {
  int lane = threadIdx.x % WARP, step = threadIdx.x / WARP, tile_row = first / TILE_N + blockIdx.y;
  float inverse = 1.0f / gamma[first];
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) {
    for (int b = 0; b < 4; b++) {
      int n = tile_row * TILE_N + field_output(lane, i) - first, k = blockIdx.x * TILE_K + field_input(lane, step, i, b);
      if (n >= 0 && n < rows && k < K) word |= (uint32_t)(code_of(values[(size_t)n * K + k], inverse) + 1) << (8 * b + 2 * i);
    }
  }
  packed[word_at((size_t)tile_row * gridDim.x + blockIdx.x, lane, step)] |= word;
}

__global__ void fill_kernel(float *out, float value, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = value;
}

// Part `part` of w from values [parts[part],K], when its gamma is there.
template <class T>
static void pack_part(const BitWeight *w, int part, const T *values) {
  int first = part_start(*w, part), rows = w->parts[part];
  unsigned tile_rows = (unsigned)((first + rows - 1) / TILE_N - first / TILE_N + 1);
  LAUNCH(weight_pack_kernel<T>, dim3(blocks_for((size_t)w->K, TILE_K), tile_rows), TILE_K, 0, (uint32_t *)w->data, w->gamma, values,
         first, rows, w->K);
}

void weight_pack(BitWeight *w, int part, const float *master) {
  BitWeight alone = *w;   // the part as a matrix of its own
  alone.gamma = w->gamma + part_start(*w, part);
  alone.parts[0] = w->parts[part];
  alone.parts[1] = alone.parts[2] = 0;
  w->lambda = 1;
  w->packed = 1;
  weight_gammas(&alone, master);
  pack_part(w, part, master);
}

void weight_pack_codes(BitWeight *w, int part, const int8_t *codes, float gamma) {
  int rows = w->parts[part];
  w->lambda = 1;
  w->packed = 1;
  LAUNCH(fill_kernel, blocks_for((size_t)rows, 256), 256, 0, w->gamma + part_start(*w, part), gamma, rows);
  pack_part(w, part, codes);
}

// codes (=) [rows,K] of the outputs from n0 on, n0 a multiple of TILE_N. A block takes a tile, which lies in shared memory in between,
// so that packed is read and codes are written along their rows.
__global__ void __launch_bounds__(TILE_K) weight_unpack_kernel(int8_t *codes, const uint32_t *packed, int n0, int rows, int K) {
  __shared__ int8_t tile[TILE_N][TILE_K];
  int lane = threadIdx.x % WARP, step = threadIdx.x / WARP, k = blockIdx.x * TILE_K + threadIdx.x;
  uint32_t word = packed[word_at((size_t)(n0 / TILE_N + blockIdx.y) * gridDim.x + blockIdx.x, lane, step)];
  for (int i = 0; i < 4; i++) {
    for (int b = 0; b < 4; b++) {
      tile[field_output(lane, i)][field_input(lane, step, i, b)] = (int8_t)((int)(word >> (8 * b + 2 * i) & 3) - 1);
    }
  }
  __syncthreads();
  for (int i = 0; i < TILE_N; i++) {
    int n = blockIdx.y * TILE_N + i;
    if (n < rows && k < K) codes[(size_t)n * K + k] = tile[i][threadIdx.x];
  }
}

static void unpack_rows(int8_t *codes, const BitWeight *w, int n0, int rows) {
  dim3 tiles(blocks_for((size_t)w->K, TILE_K), blocks_for((size_t)rows, TILE_N));
  LAUNCH(weight_unpack_kernel, tiles, TILE_K, 0, codes, (const uint32_t *)weight_packed(w), n0, rows, w->K);
}

void bitweight_codes(int8_t *codes, const BitWeight *w) {
  if (w->packed) unpack_rows(codes, w, 0, w->N);
  else dev_copy(codes, weight_codes(w), (size_t)w->N * (size_t)w->K);
}

// Every block folds the partial sums of |w| to gamma by itself, then compares its share of the codes. Integers may be added
// atomically: their sum does not depend on the order.
__global__ void weight_changes_kernel(unsigned long long *counts, int8_t *codes, const float *master, size_t n, const double *partial,
                                      int chunks) {
  float inverse = 1.0f / ternary_gamma((float)(fold_sum(partial, chunks) / (double)n));
  int zeros = 0, changed = 0;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    int8_t code = (int8_t)ternary_code(master[i], inverse);
    zeros += code == 0;
    changed += code != codes[i];
    codes[i] = code;
  }
  zeros = block_sum(zeros);
  changed = block_sum(changed);
  if (threadIdx.x > 0) return;
  atomicAdd(&counts[0], (unsigned long long)zeros);
  atomicAdd(&counts[1], (unsigned long long)changed);
}

void weight_changes(int64_t *counts, int8_t *codes, const float *master, int rows, int K) {
  size_t n = (size_t)rows * (size_t)K;
  int chunks = sum_chunks(n);
  dev_zero(counts, 2 * sizeof *counts);
  LAUNCH(chunk_sums_kernel, (unsigned)chunks, 256, 0, gpu_.sums, master, n, false);
  LAUNCH(weight_changes_kernel, (unsigned)chunks, 256, 0, (unsigned long long *)counts, codes, master, n, gpu_.sums, chunks);
}

// ---------------------------------------------------------------------------------------------------------
/*
Products by cuBLASLt. The library thinks in columns: a row-major matrix is its transpose to it. So D = A B in rows is asked for as
D' = B' A'.
*/
typedef struct {
  int M, N, K;                   // D [M,N] = alpha A B (+ C)
  cudaDataType_t in, out;        // of A and B; of C and D
  const void *A, *B;
  size_t lda, ldb, ldd;          // distances of rows in memory; C has D's
  bool a_trans, b_trans;         // A(i,k) = A[i*lda + k], or A[k*lda + i] if transposed; B(k,j) = B[k*ldb + j], or B[j*ldb + k]
  void *D;
  const void *C;                 // added, or NULL; may be D
  const float *alpha;            // in device memory; NULL = 1
} Product;

// The library's search for an algorithm takes longer than a small product, so each is done once and its answer kept; when the table is
// full the oldest goes.
enum { KEY_WORDS = 13, MAX_PLANS = 256 };
typedef struct {
  long key[KEY_WORDS];
  cublasLtMatmulAlgo_t algo;
  bool found;
} Plan;

static struct {
  Plan plan[MAX_PLANS];
  int count, next;
} plans_;

static uint32_t alignment_of(const void *p) {
  uint32_t a = 1;
  while (a < 256 && (uintptr_t)p % (2 * a) == 0) a *= 2;
  return a;
}

static void layout_init(cublasLtMatrixLayoutOpaque_t *l, cudaDataType_t type, bool trans, int rows, int cols, size_t ld) {
  BLAS_CHECK(cublasLtMatrixLayoutInit(l, type, (uint64_t)(trans ? rows : cols), (uint64_t)(trans ? cols : rows), (int64_t)ld));
}

// Returns false if the library has no kernel for such a product.
static bool blas_product(const Product *p) {
  const void *C = p->C ? p->C : p->D;
  bool integer = p->in == CUDA_R_8I;
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t a, b, d;   // cuBLASLt's first operand is our B, its columns are our rows
  int32_t ta = p->b_trans ? CUBLAS_OP_T : CUBLAS_OP_N, tb = p->a_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
  int32_t mode = p->alpha ? CUBLASLT_POINTER_MODE_DEVICE : CUBLASLT_POINTER_MODE_HOST;
  BLAS_CHECK(cublasLtMatmulDescInit(&desc, integer ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F, integer ? CUDA_R_32I : CUDA_R_32F));
  BLAS_CHECK(cublasLtMatmulDescSetAttribute(&desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
  BLAS_CHECK(cublasLtMatmulDescSetAttribute(&desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
  BLAS_CHECK(cublasLtMatmulDescSetAttribute(&desc, CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode, sizeof mode));
  layout_init(&b, p->in, p->b_trans, p->K, p->N, p->ldb);
  layout_init(&a, p->in, p->a_trans, p->M, p->K, p->lda);
  layout_init(&d, p->out, false, p->M, p->N, p->ldd);

  uint32_t alignment[4] = {alignment_of(p->B), alignment_of(p->A), alignment_of(C), alignment_of(p->D)};
  long key[KEY_WORDS] = {p->M, p->N, p->K, (long)p->in, (long)p->out, p->a_trans, p->b_trans,
                         (p->C != NULL) + 2 * (mode == CUBLASLT_POINTER_MODE_DEVICE),
                         (long)p->lda, (long)p->ldb, (long)p->ldd,
                         alignment[0] * 1000 + alignment[1], alignment[2] * 1000 + alignment[3]};
  Plan *plan = NULL;
  for (int i = 0; i < plans_.count && plan == NULL; i++) {
    if (memcmp(plans_.plan[i].key, key, sizeof key) == 0) plan = &plans_.plan[i];
  }
  if (plan == NULL) {
    cublasLtMatmulPreferenceOpaque_t prefer;
    cublasLtMatmulHeuristicResult_t result;
    size_t workspace = WORKSPACE_BYTES;
    int found = 0;
    plan = &plans_.plan[plans_.next];
    plans_.next = (plans_.next + 1) % MAX_PLANS;
    if (plans_.count < MAX_PLANS) plans_.count++;
    BLAS_CHECK(cublasLtMatmulPreferenceInit(&prefer));
    BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&prefer, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    const int first = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;   // B, C and D follow
    for (int i = 0; i < 4; i++) {
      BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&prefer, (cublasLtMatmulPreferenceAttributes_t)(first + i), &alignment[i],
                                                      sizeof alignment[i]));
    }
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(gpu_.blas, &desc, &b, &a, &d, &d, &prefer, 1, &result, &found);
    memcpy(plan->key, key, sizeof key);
    plan->found = status == CUBLAS_STATUS_SUCCESS && found > 0;
    plan->algo = result.algo;
  }
  if (!plan->found) return false;
  // alpha and beta: integers, or floats in host memory, or both in device memory.
  static const float floats[2] = {0.0f, 1.0f};
  static const int32_t integers[2] = {0, 1};
  int add = p->C != NULL;
  const void *alpha = &floats[1], *beta = &floats[add];
  if (integer) alpha = &integers[1], beta = &integers[0];
  else if (p->alpha) alpha = p->alpha, beta = gpu_.constants + add;
  BLAS_CHECK(cublasLtMatmul(gpu_.blas, &desc, alpha, p->B, &b, p->A, &a, beta, C, &d, p->D, &d, &plan->algo, gpu_.workspace,
                            WORKSPACE_BYTES, gpu_.stream));
  return true;
}

// A product that no GPU should lack.
static void product(const Product *p) {
  if (!blas_product(p)) die(EXIT_FAILED, "cuBLASLt has no kernel for a product of %d x %d x %d on %s", p->M, p->N, p->K,
                            gpu_.prop.name);
}

// ---------------------------------------------------------------------------------------------------------
// Integer products.

// The one way in which a sum becomes an output; every path must round alike, so nothing here may be fused by the compiler.
__device__ inline float finished(float sum, float scale, const float *bias, const floatX *residual) {
  float v = __fmul_rn(sum, scale);
  if (bias) v = __fadd_rn(v, *bias);
  if (residual) v = __fadd_rn(v, to_float(*residual));
  return v;
}

// `cols` columns of out [R,N] from the int32 sums [R,cols] of cuBLASLt; all pointers start at the first of them. One block walks along
// a row.
template <int W>
__global__ void finish_forward_kernel(floatX *out, const int32_t *sums, const float *s, const float *gamma, const float *bias,
                                      const floatX *residual, int N, int cols) {
  size_t r = blockIdx.x;
  float scale = s[r];
  for (int n = threadIdx.x * W; n < cols; n += blockDim.x * W) {
    size_t at = r * N + n;
    float v[W], g[W];
    load<W>(v, sums + r * cols + n);
    load<W>(g, gamma + n);
    for (int w = 0; w < W; w++) {
      v[w] = finished(v[w], __fmul_rn(scale, g[w]), bias ? bias + n + w : NULL, residual ? residual + at + w : NULL);
    }
    store<W>(out + at, v);
  }
}

#ifndef CUDA_EMU_H
/*
Tensor core instructions. A warp together holds three small matrices in its registers; with g = lane / 4 and t = lane % 4 a lane has
    c [16,8]     rows g, g+8; columns 2t, 2t+1:                          c[0..1], c[2..3]
    a [16,16]    bf16: rows g, g+8; k = 2t, 2t+1 and the same + 8        a[0] row g, a[1] row g+8, a[2] and a[3] the same at k+8
    b [16,8]     bf16: k = 2t, 2t+1 and the same + 8; column g           b[0], b[1]
and for int8 four neighbouring k take the place of two. ldmatrix brings a and b from shared memory in that form.
*/
__device__ inline void mma_bf16(float *c, const uint32_t *a, const uint32_t *b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_i8(int *c, const uint32_t *a, const uint32_t *b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit values; lane 8i+r brings the address of row r of matrix i.
__device__ inline void ldmatrix_x4(uint32_t *r, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t *r, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}

// 16 bytes from device memory to shared memory without passing through registers, or 16 zero bytes.
__device__ inline void cp_async16(void *dst, const void *src, bool valid) {
  uint32_t to = (uint32_t)__cvta_generic_to_shared(dst);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(src), "r"(valid ? 16 : 0) : "memory");
}

__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N committed groups of this thread are under way.
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// Four activations from k on as one word; zeros beyond the matrix.
__device__ inline uint32_t four_codes(const int8_t *q, int r, int R, int k, int K) {
  uint32_t word = 0;
  if (r >= R || k >= K) return 0;
  const int8_t *p = q + (size_t)r * K + k;
  if (K % 4 == 0) return *(const uint32_t *)p;
  for (int b = 0; b < 4 && k + b < K; b++) word |= (uint32_t)(uint8_t)p[b] << 8 * b;
  return word;
}

/*
y = q w' straight from the packed weights: decoding, where reading the weights is all the cost, and shapes that cuBLASLt does not take.

The weights lie in the order in which the lanes of a warp need them as operand a of mma_i8: a tile is 16 outputs x 128 inputs,
four steps of 32 inputs; lane l reads 16 bytes, one word for each step, whose bits 2i of the four bytes are the codes + 1 of
register i. Unpacking is a shift and a mask for four codes. Codes + 1 make each sum too large by the sum of the row's activations,
which is collected on the way.

A block computes 16 outputs for 8*NB rows; its 8 warps share the tiles along k out and add their sums at the end. Integer sums do not
depend on that.
*/
enum { TERNARY_WARPS = 8 };

template <int NB>
__global__ void __launch_bounds__(TERNARY_WARPS * WARP)
ternary_forward_kernel(floatX *out, const int8_t *q, const float *s, const uint4 *packed, const float *gamma, const float *bias,
                       const floatX *residual,
                       int R, int N, int K) {
  __shared__ int sums[TERNARY_WARPS][NB * 8][TILE_N], excess[TERNARY_WARPS][NB * 8];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int row0 = blockIdx.y * NB * 8, tiles = (K + TILE_K - 1) / TILE_K;
  int acc[NB][4] = {}, total[NB] = {};
  for (int tile = warp; tile < tiles; tile += TERNARY_WARPS) {
    uint4 four = packed[((size_t)blockIdx.x * tiles + tile) * WARP + lane];
    uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      uint32_t a[4], b[2];
      int k = tile * TILE_K + step * 32 + t * 4;
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = words[step] >> 2 * i & 0x03030303u;
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        b[0] = four_codes(q, row0 + nb * 8 + g, R, k, K);
        b[1] = four_codes(q, row0 + nb * 8 + g, R, k + 16, K);
        mma_i8(acc[nb], a, b);
        total[nb] = __dp4a((int)b[1], 0x01010101, __dp4a((int)b[0], 0x01010101, total[nb]));
      }
    }
  }
#pragma unroll
  for (int nb = 0; nb < NB; nb++) {
    total[nb] += __shfl_xor_sync(FULL, total[nb], 1);   // the four lanes of row g have each seen a quarter of k
    total[nb] += __shfl_xor_sync(FULL, total[nb], 2);
    if (t == 0) excess[warp][nb * 8 + g] = total[nb];
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][nb * 8 + 2 * t + i % 2][g + i / 2 * 8] = acc[nb][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < NB * 8 * TILE_N; i += blockDim.x) {
    int m = i / TILE_N, n = blockIdx.x * TILE_N + i % TILE_N, r = row0 + m, sum = 0;
    if (r >= R || n >= N) continue;
    for (int w = 0; w < TERNARY_WARPS; w++) sum += sums[w][m][i % TILE_N] - excess[w][m];
    size_t at = (size_t)r * N + n;
    float scale = __fmul_rn(s[r], gamma[n]);
    from_float(&out[at], finished((float)sum, scale, bias ? bias + n : NULL, residual ? residual + at : NULL));
  }
}

enum { DECODE_ROWS = 64, BLAS_ROWS = 1024 };

/*
Many rows, through cuBLASLt: int32 sums of a bounded number of rows and outputs at a time, then scales. Packed weights are unpacked to
int8 for that, a bounded number of outputs at a time. Returns false if the library has no kernel for such a product.
*/
static bool blas_integer_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  int N = w->N, K = w->K, rows = rows_at_a_time(sums_bytes, (size_t)N * sizeof(int32_t), R), cols = N;
  scratch_start();
  int32_t *sums = (int32_t *)scratch_take((size_t)rows * N * sizeof(int32_t));
  int8_t *unpacked = NULL;
  if (w->packed) {
    size_t most = operand_bytes / (size_t)K / TILE_N * TILE_N;   // whole tiles
    cols = (int)smaller((size_t)N, larger(most, TILE_N));
    unpacked = (int8_t *)scratch_take((size_t)cols * K);
  }
  for (int n0 = 0; n0 < N; n0 += cols) {
    int n = N - n0 < cols ? N - n0 : cols;
    if (w->packed) unpack_rows(unpacked, w, n0, n);
    for (int r0 = 0; r0 < R; r0 += rows) {
      int m = R - r0 < rows ? R - r0 : rows;
      size_t at = (size_t)r0 * N + n0;
      Product p = {};
      p.M = m, p.N = n, p.K = K;
      p.in = CUDA_R_8I, p.out = CUDA_R_32I;
      p.A = (const int8_t *)x->data + (size_t)r0 * K, p.lda = (size_t)K;
      p.B = w->packed ? unpacked : weight_codes(w), p.ldb = (size_t)K, p.b_trans = true;
      p.D = sums, p.ldd = (size_t)n;
      if (!blas_product(&p)) return false;
      bool wide = N % 8 == 0 && n % 8 == 0;
      LAUNCH_WIDTH(wide, finish_forward_kernel, (unsigned)m, row_threads(n, wide), 0, out + at, sums, x->s + r0, w->gamma + n0,
                   w->bias ? w->bias + n0 : NULL, residual ? residual + at : NULL, N, n);
    }
  }
  return true;
}

static void integer_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  int N = w->N, K = w->K;
  if (R > DECODE_ROWS && N % 4 == 0 && K % 4 == 0 && blas_integer_forward(out, x, w, residual, R)) return;
  unsigned cols = blocks_for((size_t)N, TILE_N), threads = TERNARY_WARPS * WARP;
  dim3 one(cols, blocks_for((size_t)R, 8)), four(cols, blocks_for((size_t)R, 32)), eight(cols, blocks_for((size_t)R, 64));
  const int8_t *q = (const int8_t *)x->data;
  const uint4 *packed = weight_packed(w);
  if (R <= 8) LAUNCH(ternary_forward_kernel<1>, one, threads, 0, out, q, x->s, packed, w->gamma, w->bias, residual, R, N, K);
  else if (R <= 32) LAUNCH(ternary_forward_kernel<4>, four, threads, 0, out, q, x->s, packed, w->gamma, w->bias, residual, R, N, K);
  else LAUNCH(ternary_forward_kernel<8>, eight, threads, 0, out, q, x->s, packed, w->gamma, w->bias, residual, R, N, K);
}

// ---------------------------------------------------------------------------------------------------------
/*
Float products of the forward pass, y = x w' (gamma, bias, residual), with tensor cores: out [R,N], x [R,K], w [N,K].

A block computes a tile of BM rows x 128 outputs. 32 values of k at a time are copied to shared memory, rounded to bf16 on the way
(so the classifier reads the float master weights directly); while the tensor cores work on one copy the next is on its way in
registers, and goes to the other of two buffers. BM = 16 for decoding, 128 for the rest.

Each output is one accumulator that takes k in ascending steps of 16, whatever BM is: the bits of a row do not depend on other rows.
*/
enum { MM_N = 128, MM_K = 32, MM_STRIDE = MM_K + 8, MM_THREADS = 256 };   // 8 more values a row keep ldmatrix free of bank conflicts

__device__ inline uint32_t pack_bf16(float low, float high) {
  bf16 pair[2];
  uint32_t word;
  from_float(&pair[0], low);
  from_float(&pair[1], high);
  memcpy(&word, pair, sizeof word);
  return word;
}

// Operand a: the 16 x 16 values at (row0, k0) of a tile in shared memory.
__device__ inline void fragment_a(uint32_t *a, const bf16 *tile, int stride, int row0, int k0) {
  int lane = threadIdx.x % WARP;
  ldmatrix_x4(a, tile + (row0 + lane % 16) * stride + k0 + lane / 16 * 8);
}

// Operands b of two neighbouring groups of 8 columns: B(k, n) = tile[n0 + n][k0 + k].
__device__ inline void fragment_b(uint32_t *b, const bf16 *tile, int stride, int n0, int k0) {
  int lane = threadIdx.x % WARP;
  ldmatrix_x4(b, tile + (n0 + lane % 8 + lane / 16 * 8) * stride + k0 + lane / 8 % 2 * 8);
}

// The same from a tile that lies the other way: B(k, n) = tile[k0 + k][n0 + n].
__device__ inline void fragment_b_trans(uint32_t *b, const bf16 *tile, int stride, int k0, int n0) {
  int lane = threadIdx.x % WARP;
  ldmatrix_x4_trans(b, tile + (k0 + lane % 16) * stride + n0 + lane / 16 * 8);
}

// Eight values of row r from k on as bf16; zeros beyond the matrix. W = 8 where K is a multiple of 8.
template <int W, class T>
__device__ inline uint4 fetch8(const T *x, int r, int R, int k, int K) {
  float v[8] = {0};
  if (r < R) {
    const T *p = x + (size_t)r * K;
    if constexpr (W == 8) {
      if (k < K) load<8>(v, p + k);
    } else {
      for (int i = 0; i < 8 && k + i < K; i++) v[i] = to_float(p[k + i]);
    }
  }
  return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

template <int W, int BM, class TX, class TW>
__global__ void __launch_bounds__(MM_THREADS)
matmul_bf16_kernel(floatX *out, const TX *x, const TW *w, const float *gamma, const float *bias, const floatX *residual, int R,
                   int N, int K) {
  constexpr int WARPS_M = BM == 128 ? 2 : 1, WARPS_N = 8 / WARPS_M;          // how the 8 warps share the tile
  constexpr int MT = BM / 16 / WARPS_M, NT = MM_N / 8 / WARPS_N;             // 16 x 8 tiles of one warp
  constexpr int X8 = (BM * MM_K / 8 + MM_THREADS - 1) / MM_THREADS, W8 = MM_N * MM_K / 8 / MM_THREADS;   // fetches of one thread
  __shared__ __align__(16) bf16 xs[2][BM * MM_STRIDE];
  __shared__ __align__(16) bf16 ws[2][MM_N * MM_STRIDE];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int row0 = blockIdx.y * BM, n0 = blockIdx.x * MM_N, warp_row = warp / WARPS_N * MT * 16, warp_col = warp % WARPS_N * NT * 8;
  float acc[MT][NT][4] = {};
  uint4 xr[X8], wr[W8];
  for (int k0 = 0, buffer = 0; k0 < K + MM_K; k0 += MM_K, buffer ^= 1) {
    if (k0 < K) {                                            // the next piece on its way
#pragma unroll
      for (int i = 0; i < X8; i++) {
        int piece = threadIdx.x + i * MM_THREADS;
        if (piece < BM * MM_K / 8) xr[i] = fetch8<W>(x, row0 + piece / 4, R, k0 + piece % 4 * 8, K);
      }
#pragma unroll
      for (int i = 0; i < W8; i++) {
        int piece = threadIdx.x + i * MM_THREADS;
        wr[i] = fetch8<W>(w, n0 + piece / 4, N, k0 + piece % 4 * 8, K);
      }
    }
    if (k0 > 0) {                                            // the piece that arrived in the round before
#pragma unroll
      for (int step = 0; step < MM_K; step += 16) {
        uint32_t a[MT][4], b[4];
#pragma unroll
        for (int m = 0; m < MT; m++) fragment_a(a[m], xs[buffer ^ 1], MM_STRIDE, warp_row + m * 16, step);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          fragment_b(b, ws[buffer ^ 1], MM_STRIDE, warp_col + n * 8, step);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            mma_bf16(acc[m][n], a[m], b);
            mma_bf16(acc[m][n + 1], a[m], b + 2);
          }
        }
      }
    }
    if (k0 < K) {
#pragma unroll
      for (int i = 0; i < X8; i++) {
        int piece = threadIdx.x + i * MM_THREADS;
        if (piece < BM * MM_K / 8) *(uint4 *)&xs[buffer][piece / 4 * MM_STRIDE + piece % 4 * 8] = xr[i];
      }
#pragma unroll
      for (int i = 0; i < W8; i++) {
        int piece = threadIdx.x + i * MM_THREADS;
        *(uint4 *)&ws[buffer][piece / 4 * MM_STRIDE + piece % 4 * 8] = wr[i];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = row0 + warp_row + m * 16 + g + i / 2 * 8, col = n0 + warp_col + n * 8 + 2 * t + i % 2;
        if (r >= R || col >= N) continue;
        size_t at = (size_t)r * N + col;
        float scale = gamma ? gamma[col] : 1.0f;
        from_float(&out[at], finished(acc[m][n][i], scale, bias ? bias + col : NULL, residual ? residual + at : NULL));
      }
    }
  }
}

// The same in fp32 without tensor cores, for tests: a block computes 64 x 64 outputs, a thread 4 x 4 of them, k in order.
template <class TW>
__global__ void __launch_bounds__(256)
matmul_f32_kernel(floatX *out, const floatX *x, const TW *w, const float *gamma, const float *bias, const floatX *residual, int R,
                  int N, int K) {
  __shared__ float xs[64][17], ws[64][17];
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  float acc[4][4] = {};
  for (int k0 = 0; k0 < K; k0 += 16) {
    for (int i = ty; i < 64; i += 16) {
      xs[i][tx] = row0 + i < R && k0 + tx < K ? to_float(x[(size_t)(row0 + i) * K + k0 + tx]) : 0.0f;
      ws[i][tx] = n0 + i < N && k0 + tx < K ? to_float(w[(size_t)(n0 + i) * K + k0 + tx]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < 16; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] += xs[ty + 16 * i][k] * ws[tx + 16 * j][k];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) {
      int r = row0 + ty + 16 * i, n = n0 + tx + 16 * j;
      if (r >= R || n >= N) continue;
      size_t at = (size_t)r * N + n;
      from_float(&out[at], finished(acc[i][j], gamma ? gamma[n] : 1.0f, bias ? bias + n : NULL, residual ? residual + at : NULL));
    }
  }
}

template <class TW>
static void matmul_bf16(floatX *out, const floatX *x, const TW *w, const float *gamma, const float *bias, const floatX *residual,
                        int R, int N, int K) {
  unsigned cols = blocks_for((size_t)N, MM_N);
  dim3 small(cols, blocks_for((size_t)R, 16)), big(cols, blocks_for((size_t)R, 128));
  bool wide = K % 8 == 0 && aligned16(x) && aligned16(w);
  if (!wide) LAUNCH((matmul_bf16_kernel<1, 128, floatX, TW>), big, MM_THREADS, 0, out, x, w, gamma, bias, residual, R, N, K);
  else if (R <= 16) LAUNCH((matmul_bf16_kernel<8, 16, floatX, TW>), small, MM_THREADS, 0, out, x, w, gamma, bias, residual, R, N, K);
  else LAUNCH((matmul_bf16_kernel<8, 128, floatX, TW>), big, MM_THREADS, 0, out, x, w, gamma, bias, residual, R, N, K);
}

template <class TW>
static void matmul_f32(floatX *out, const floatX *x, const TW *w, const float *gamma, const float *bias, const floatX *residual,
                       int R, int N, int K) {
  dim3 grid(blocks_for((size_t)N, 64), blocks_for((size_t)R, 64));
  LAUNCH(matmul_f32_kernel<TW>, grid, 256, 0, out, x, w, gamma, bias, residual, R, N, K);
}

/*
y = x_eff w_eff' (+ bias) (+ residual). At lambda = 1 both are integers times a scale,

    y[r,n] = s[r] gamma[n] * sum_k q[r,k] t[n,k]

and the sum runs in int32, exactly. Where activations stay float (bits = 0) the weights are still codes and gamma comes last.
*/
void bitlinear_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  bool ternary = w->lambda == 1.0f, fp32 = fp32_products(w->precision);
  const floatX *values = (const floatX *)x->data;
  int N = w->N, K = w->K;
  if (ternary && x->lambda == 1.0f && x->bits > 0) {
    integer_forward(out, x, w, residual, R);
  } else if (w->packed) {
    die(EXIT_FAILED, "bug: packed weights multiply int8 activations only");
  } else if (ternary) {
    if (fp32) matmul_f32(out, values, weight_codes(w), w->gamma, w->bias, residual, R, N, K);
    else matmul_bf16(out, values, weight_bf16_codes(w), w->gamma, w->bias, residual, R, N, K);
  } else if (fp32) {
    matmul_f32(out, values, (const floatX *)w->data, (const float *)NULL, w->bias, residual, R, N, K);
  } else if (R >= BLAS_ROWS && w->bias == NULL && sizeof(floatX) == sizeof(bf16)) {
    Product p = {};
    p.M = R, p.N = N, p.K = K;
    p.in = p.out = CUDA_R_16BF;
    p.A = values, p.lda = (size_t)K;
    p.B = w->data, p.ldb = (size_t)K, p.b_trans = true;
    p.D = out, p.ldd = (size_t)N, p.C = residual;
    product(&p);
  } else {
    matmul_bf16(out, values, (const floatX *)w->data, (const float *)NULL, w->bias, residual, R, N, K);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The backward products.

// out (=) in * s[row] for `rows` rows of K values; s may be NULL.
template <int W, class To, class From>
__global__ void convert_kernel(To *out, const From *in, const float *s, int K) {
  size_t r = blockIdx.x;
  float scale = s ? s[r] : 1.0f;
  for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) {
    float v[W];
    load<W>(v, in + r * K + k);
    for (int w = 0; w < W; w++) v[w] *= scale;
    store<W>(out + r * K + k, v);
  }
}

template <class To, class From>
static void convert(To *out, const From *in, const float *s, int rows, int K) {
  bool wide = K % 8 == 0 && aligned16(in);
  if (wide) LAUNCH((convert_kernel<8, To, From>), (unsigned)rows, row_threads(K, true), 0, out, in, s, K);
  else LAUNCH((convert_kernel<1, To, From>), (unsigned)rows, row_threads(K, false), 0, out, in, s, K);
}

// A matrix with K columns in one of the formats that meet here; value = data * scale[row].
typedef struct {
  const void *data;
  cudaDataType_t type;   // CUDA_R_32F, CUDA_R_16BF or CUDA_R_8I
  const float *scale;    // or NULL
} Operand;

static size_t type_size(cudaDataType_t t) {
  return t == CUDA_R_32F ? 4 : t == CUDA_R_16BF ? 2 : 1;
}

// Rows r0 .. r0+rows-1 in the wanted format: the matrix itself, or a converted copy in scratch.
static const void *operand_rows(const Operand *o, int r0, int rows, int K, cudaDataType_t want) {
  const char *from = (const char *)o->data + (size_t)r0 * K * type_size(o->type);
  const float *scale = o->scale ? o->scale + r0 : NULL;
  if (o->type == want && scale == NULL) return from;
  void *copy = scratch_take((size_t)rows * K * type_size(want));
  if (want == CUDA_R_32F) convert((float *)copy, (const int8_t *)from, scale, rows, K);
  else if (o->type == CUDA_R_8I) convert((bf16 *)copy, (const int8_t *)from, scale, rows, K);
  else convert((bf16 *)copy, (const float *)from, scale, rows, K);
  return copy;
}

/*
dx (=) [R,K] = dy w,  dw (+=) [N,K] = dy' x,  for dy [R,N], x [R,K], w [N,K] (rows n of w times gamma[n], if given, which is the
same for all rows of a part).

Straight-through: at lambda = 1 w are codes and x are codes with a scale for each row. gamma is taken as the factor alpha of the
product of its part, so no copy of dy is scaled and the codes stay exact; the scale s[r] belongs to the index that is summed over
in dw and is multiplied into x while its codes are widened to bf16. Operands that must be converted are made for a bounded number
of rows at a time.
*/
static void product_backward(floatX *dx, float *dw, const floatX *dout, const Operand *x, const Operand *w, const int *parts,
                             const float *gamma,
                             int R, int N, int K, int precision) {
  cudaDataType_t in = fp32_products(precision) ? CUDA_R_32F : CUDA_R_16BF, own = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
  Operand dy = {dout, own, NULL};
  int block = rows_at_a_time(operand_bytes, w->type == in ? 0 : (size_t)K * type_size(in), N);
  bool sums = block < N && own == CUDA_R_16BF;   // the pieces of a huge w are added in fp32 before they are rounded
  size_t row_bytes = (own == in ? 0 : (size_t)N * type_size(in)) + (x->type == in && x->scale == NULL ? 0 : (size_t)K * type_size(in));
  int rows = rows_at_a_time(operand_bytes, row_bytes + (sums ? (size_t)K * sizeof(float) : 0), R);
  for (int r0 = 0; r0 < R; r0 += rows) {
    int m = R - r0 < rows ? R - r0 : rows, n0 = 0;
    scratch_start();
    const char *dy_rows = (const char *)operand_rows(&dy, r0, m, N, in);
    const void *x_rows = operand_rows(x, r0, m, K, in);
    floatX *dx_rows = dx + (size_t)r0 * K;
    float *sum = sums ? (float *)scratch_take((size_t)m * K * sizeof(float)) : NULL;
    size_t mark = scratch_.used;
    for (int part = 0, part_end = 0; part < 3 && parts[part] > 0; part++) {
      part_end += parts[part];
      for (int n; n0 < part_end; n0 += n) {
        n = part_end - n0 < block ? part_end - n0 : block;
        scratch_.used = mark;
        Product p = {};
        p.M = m, p.N = K, p.K = n;
        p.in = in, p.out = sums ? CUDA_R_32F : own;
        p.A = dy_rows + (size_t)n0 * type_size(in), p.lda = (size_t)N;
        p.B = operand_rows(w, n0, n, K, in), p.ldb = (size_t)K;
        p.D = sums ? (void *)sum : (void *)dx_rows, p.ldd = (size_t)K;
        p.C = n0 > 0 ? p.D : NULL;
        p.alpha = gamma ? gamma + n0 : NULL;
        product(&p);
      }
    }
    if (sums) convert(dx_rows, (const float *)sum, NULL, m, K);
    Product p = {};
    p.M = N, p.N = K, p.K = m;
    p.in = in, p.out = CUDA_R_32F;
    p.A = dy_rows, p.lda = (size_t)N, p.a_trans = true;
    p.B = x_rows, p.ldb = (size_t)K;
    p.D = dw, p.C = dw, p.ldd = (size_t)K;
    product(&p);
  }
}

void bitlinear_backward(floatX *dx, float *dw, float *dbias, const floatX *dout, const QAct *x, const BitWeight *w, int R) {
  bool ternary = w->lambda == 1.0f, codes = x->lambda == 1.0f && x->bits > 0, fp32 = fp32_products(w->precision);
  cudaDataType_t own = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
  Operand xo = {x->data, codes ? CUDA_R_8I : own, codes ? x->s : NULL};
  Operand wo = {w->data, own, NULL};
  int whole[3] = {w->N, 0, 0};
  if (ternary && fp32) wo.type = CUDA_R_8I;
  else if (ternary) wo = {weight_bf16_codes(w), CUDA_R_16BF, NULL};
  product_backward(dx, dw, dout, &xo, &wo, ternary ? w->parts : whole, ternary ? w->gamma : NULL, R, w->N, w->K, w->precision);
  if (dbias) add_column_sums(dbias, dout, R, w->N);
}

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
  bool wide = HS % 16 == 0;
  size_t n = (size_t)R * (NH + NKV) * (HS / 2) / (wide ? 8 : 1);
  LAUNCH_WIDTH(wide, rope_kernel, blocks_for(n, 256), 256, 0, qkv, pos, cossin, n, NH, NKV, HS, direction);
}

// ---------------------------------------------------------------------------------------------------------
// Attention.

#include "attention.cuh"          // attention_forward, attention_backward, attention_cached

// ---------------------------------------------------------------------------------------------------------
// The gated feed-forward unit. The forward kernel stands with the other quantisers above.

void glu_quant_forward(QAct *out, float *rstd, const floatX *gate_up, const float *gain, int R, int F, int act, float eps) {
  bool wide = F % 8 == 0;
  LAUNCH_WIDTH(wide, glu_quant_kernel, (unsigned)R, row_threads(F, wide), 0, *out, rstd, gate_up, gain, F, act, eps);
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

void glu_backward(floatX *dgate_up, float *dgain, floatX *dout, const floatX *gate_up, const float *gain, const float *rstd,
                  int R, int F, int act) {
  int rows = chunk_rows(R, MAX_CHUNKS), chunks = (R + rows - 1) / rows;
  bool wide = F % 8 == 0;
  size_t shared = gain ? (size_t)F * sizeof(float) : 0;
  scratch_start();
  float *partial = gain ? (float *)scratch_take((size_t)chunks * F * sizeof(float)) : NULL;
  allow_shared(wide ? glu_backward_kernel<8> : glu_backward_kernel<1>, shared);
  LAUNCH_WIDTH(wide, glu_backward_kernel, (unsigned)chunks, row_threads(F, wide), shared, dgate_up, partial, dout, gate_up, gain,
               rstd, R, F, act, rows);
  if (gain) fold_chunks(dgain, partial, chunks, F, F);
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
  bool wide = h->V % 8 == 0;
  for (int r0 = 0; r0 < R; r0 += DECODE_ROWS) {
    int m = R - r0 < DECODE_ROWS ? R - r0 : (int)DECODE_ROWS;
    scratch_start();
    floatX *logits = (floatX *)scratch_take((size_t)m * h->V * sizeof(floatX));
    head_forward(logits, x + (size_t)r0 * h->C, h, m);
    LAUNCH_WIDTH(wide, argmax_kernel, (unsigned)m, row_threads(V, wide), 0, best + r0, logits, h->V, V);
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
  bool wide = V % 8 == 0;
  LAUNCH_WIDTH(wide, cross_entropy_forward_kernel, (unsigned)R, row_threads(V, wide), 0, losses, lse, logits, targets, V);
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
  bool wide = V % 8 == 0;
  LAUNCH_WIDTH(wide, cross_entropy_backward_kernel, (unsigned)R, row_threads(V, wide), 0, logits, lse, targets, coef, V);
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
  bool wide = V % 8 == 0;
  LAUNCH_WIDTH(wide, policy_backward_kernel, (unsigned)R, row_threads(V, wide), 0, kl, logits, lse, ref, ref_lse, targets, coef, kl_coef,
               V);
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
  bool wide = n % 8 == 0 && aligned16(p) && aligned16(m) && aligned16(v) && aligned16(g);
  LAUNCH_WIDTH(wide, adamw_kernel, blocks_for(wide ? n / 8 : n, 256), 256, 0, p, m, v, g, n, segments, count, gscale, lr, beta1, beta2,
               eps, wd, correct1, correct2);
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

// The best of several runs of n x n x n products, operations a second; 0 if the library has none or there is no memory.
static double peak_product(cudaDataType_t in, cudaDataType_t out, int n) {
  size_t bytes = (size_t)n * n * 4;
  char *memory = (char *)dev_malloc(3 * bytes);
  double best = 0;
  Product p = {};
  p.M = p.N = p.K = n;
  p.in = in, p.out = out;
  p.lda = p.ldb = p.ldd = (size_t)n;
  p.A = memory, p.B = memory + bytes, p.D = memory + 2 * bytes;
  p.b_trans = true;
  if (memory) LAUNCH(random_bytes_kernel, blocks_for(2 * bytes / 4, 256 * 64), 256, 0, (uint32_t *)memory, 2 * bytes / 4, 0xBF7FBF7Fu);
  bool able = memory && blas_product(&p);   // this one also looks for the algorithm
  for (int run = 0; able && run < 10; run++) {
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

void dev_peaks(Peaks *p) {
  int n = gpu_.prop.multiProcessorCount * 64;
  size_t bytes = (size_t)gpu_.prop.multiProcessorCount << 23;
  p->fp32 = peak_product(CUDA_R_32F, CUDA_R_32F, n / 128 * 64 + 64);
  p->bf16 = peak_product(CUDA_R_16BF, CUDA_R_16BF, n);
  p->int8 = peak_product(CUDA_R_8I, CUDA_R_32I, n);
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
