/*
device.cuh: what every kernel of this program stands on.

What it is:  the first chapter of train_bitnet.cu in a file of its own. The device, its memory, copies and recorded stretches of work
             (the section "device" of bitnet/ops.h); how a kernel is launched; loads and stores of several values at once; sums and
             maxima over a warp and a block; scratch memory; sums over whole tensors and across rows in a fixed order.
What not:    any operation of the network, except sum_squares, which is a sum over a whole tensor. Peaks: the end of train_bitnet.cu.
Read before: bitnet/ops.h, the head of train_bitnet.cu.
Defines:     dev_*, ops_*, sum_squares of bitnet/ops.h; LAUNCH, load, store, block_sum, scratch_take, fold_chunks.
*/
#ifndef BITNET_DEVICE_CUH
#define BITNET_DEVICE_CUH

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

static void cuda_check_(cudaError_t e, const char *file, int line) {
  if (e != cudaSuccess) die(EXIT_FAILED, "%s:%d: CUDA: %s", file, line, cudaGetErrorString(e));
}

static void blas_check_(cublasStatus_t s, const char *file, int line) {
  if (s != CUBLAS_STATUS_SUCCESS) die(EXIT_FAILED, "%s:%d: cuBLASLt: status %d", file, line, (int)s);
}

#define CUDA_CHECK(call) cuda_check_(call, __FILE__, __LINE__)
#define BLAS_CHECK(call) blas_check_(call, __FILE__, __LINE__)

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

// Kernels along rows come in three widths: 8 or 4 values at a time where rows are a multiple of that long, else one by one.
#define LAUNCH_WIDTH(width, kernel, grid, block, shared_bytes, ...)                  \
  do {                                                                               \
    if ((width) == 8) LAUNCH(kernel<8>, grid, block, shared_bytes, __VA_ARGS__);     \
    else if ((width) == 4) LAUNCH(kernel<4>, grid, block, shared_bytes, __VA_ARGS__); \
    else LAUNCH(kernel<1>, grid, block, shared_bytes, __VA_ARGS__);                  \
  } while (0)
#define KERNEL_OF_WIDTH(width, kernel) ((width) == 8 ? kernel<8> : (width) == 4 ? kernel<4> : kernel<1>)

static int width_of(size_t n) {
  return n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : 1;
}

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
struct Word<4> {
  typedef uint32_t Type;
};
template <>
struct Word<8> {
  typedef uint2 Type;
};
template <>
struct Word<16> {
  typedef uint4 Type;
};

// v (=) W values from src as floats; src must be a multiple of W values from an aligned start.
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
static unsigned row_threads(int n, int width) {
  unsigned threads = blocks_for((size_t)(n / width), WARP) * WARP;
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

// Rows and columns of integer operands are filled up to multiples of 16: products.cuh, "Integer products", tells why.
__host__ __device__ inline size_t padded(size_t n) {
  return (n + 15) / 16 * 16;
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
  size_t Np = padded(N), Kp = padded(K), row = larger(Np * sizeof(int32_t) + Kp, Kp * sizeof(int32_t) + Np + sizeof(float));
  size_t integer = rounded(smaller(R * row, larger(sums_bytes, row))) + 3 * 256;
  size_t codes = rounded(smaller(Np * Kp, larger(operand_bytes, 16 * Kp)));
  size_t rows = smaller(R * (N + 2 * K) * sizeof(float), larger(operand_bytes, (N + 2 * K) * sizeof(float)));
  size_t weights = smaller(N * K * sizeof(float), larger(operand_bytes, K * sizeof(float)));
  size_t gains = smaller(R, MAX_CHUNKS) * 2 * K * sizeof(float), biases = smaller(R, BIAS_CHUNKS) * N * sizeof(float);
  size_t tokens = 2 * rounded(R * sizeof(int));
  size_t most = larger(larger(integer + codes, rows + weights + 256 * 4), larger(gains, biases));
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

#endif
