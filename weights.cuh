/*
weights.cuh: ternary weights on the GPU: from float master weights to codes, in the layouts that the products want, and back.

What it is:  a chapter of train_bitnet.cu in a file of its own. gamma of each logical matrix, then the codes; packing to 2 bits for a
             model that only runs; codes for export; how many codes an update moved.
What not:    the quantiser itself: quant.h. The products: products.cuh, the next chapter.
Read before: quant.h, device.cuh.
Defines:     bitweight_*, weight_* of bitnet/ops.h.
*/
#ifndef BITNET_WEIGHTS_CUH
#define BITNET_WEIGHTS_CUH

// ---------------------------------------------------------------------------------------------------------
/*
BitLinear. What weight_quantize leaves in BitWeight.data:
    lambda = 1    codes [N,K] int8      for cuBLASLt's integer product; N and K padded with zeros to multiples of 16
                  codes [K,N] int8      the same turned over, padded alike, where dx_int8: the gradient of the input sums over N
                  codes [N,K] bf16      for float products; exact
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

static size_t padded_bytes(int N, int K) {
  return rounded(padded((size_t)N) * padded((size_t)K));
}

static int8_t *weight_turned_codes(const BitWeight *w) {
  return (int8_t *)w->data + padded_bytes(w->N, w->K);
}

static bf16 *weight_bf16_codes(const BitWeight *w) {
  return (bf16 *)((char *)w->data + 2 * padded_bytes(w->N, w->K));
}

// The 2-bit form: behind the others, or all there is.
static uint4 *weight_packed(const BitWeight *w) {
  if (w->packed) return (uint4 *)w->data;
  return (uint4 *)((char *)weight_bf16_codes(w) + rounded((size_t)w->N * w->K * sizeof(bf16)));
}

size_t bitweight_bytes(int N, int K) {
  size_t n = (size_t)N * (size_t)K;
  return larger(n * sizeof(floatX), 2 * padded_bytes(N, K) + rounded(n * sizeof(bf16)) + packed_bytes(N, K));
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
// and each thread packs one word of it. codes, turned (or NULL), wide, packed: the forms of codes; values: [N,K] at lambda < 1.
__global__ void __launch_bounds__(TILE_K) weight_codes_kernel(BitWeight w, int8_t *codes, int8_t *turned, bf16 *wide, uint32_t *packed,
                                                              floatX *values, const float *master) {
  __shared__ int8_t tile[TILE_N][TILE_K];
  int k = blockIdx.x * TILE_K + threadIdx.x, n0 = blockIdx.y * TILE_N;
  size_t rows = padded((size_t)w.N), cols = padded((size_t)w.K);
  bool ternary = w.lambda == 1.0f;
  int8_t column[TILE_N];
#pragma unroll
  for (int i = 0; i < TILE_N; i++) {
    int n = n0 + i, code = 0;
    if (n < w.N && k < w.K) {
      size_t at = (size_t)n * w.K + k;
      float m = master[at], gamma = w.gamma[n];
      code = ternary_code(m, 1.0f / gamma);
      if (ternary) from_float(&wide[at], (float)code);
      else from_float(&values[at], lambda_mix(m, (float)code * gamma, w.lambda));
    }
    tile[i][threadIdx.x] = column[i] = (int8_t)code;
    if (ternary && (size_t)k < cols) codes[(size_t)n * cols + k] = (int8_t)code;
  }
  if (!ternary) return;
  if (turned && (size_t)k < cols) {
    uint4 word;
    memcpy(&word, column, sizeof word);
    *(uint4 *)(turned + (size_t)k * rows + n0) = word;
  }
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
  int8_t *codes = weight_codes(w), *turned = w->dx_int8 ? weight_turned_codes(w) : NULL;
  bf16 *wide = weight_bf16_codes(w);
  uint32_t *packed = (uint32_t *)weight_packed(w);
  LAUNCH(weight_codes_kernel, tiles, TILE_K, 0, *w, codes, turned, wide, packed, (floatX *)w->data, master);
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

// Rows first .. first+rows-1 of packed from the values [rows,K] of one part; a block writes a tile, a thread a word. Calls may share
// words: zeroed memory and one call at a time make "or" enough.
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

// Rows first .. first+rows-1 of w from values [rows,K], when their gamma is there.
template <class T>
static void pack_rows(const BitWeight *w, int first, int rows, const T *values) {
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
  pack_rows(w, part_start(*w, part), w->parts[part], master);
}

void weight_pack_codes(BitWeight *w, int part, const int8_t *codes, int first, int rows, float gamma) {
  first += part_start(*w, part);
  w->lambda = 1;
  w->packed = 1;
  LAUNCH(fill_kernel, blocks_for((size_t)rows, 256), 256, 0, w->gamma + first, gamma, rows);
  pack_rows(w, first, rows, codes);
}

// codes (=) [rows,stride] of the outputs from n0 on, n0 a multiple of TILE_N; K <= stride <= padded(K), zeros from K on. A block takes
// a tile, which lies in shared memory in between, so that packed is read and codes are written along their rows.
__global__ void __launch_bounds__(TILE_K) weight_unpack_kernel(int8_t *codes, const uint32_t *packed, int n0, int rows, int K,
                                                               int stride) {
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
    if (n < rows && k < stride) codes[(size_t)n * stride + k] = k < K ? tile[i][threadIdx.x] : 0;
  }
}

static void unpack_rows(int8_t *codes, const BitWeight *w, int n0, int rows, int stride) {
  dim3 tiles(blocks_for((size_t)w->K, TILE_K), blocks_for((size_t)rows, TILE_N));
  LAUNCH(weight_unpack_kernel, tiles, TILE_K, 0, codes, (const uint32_t *)weight_packed(w), n0, rows, w->K, stride);
}

void bitweight_codes(int8_t *codes, const BitWeight *w) {
  unpack_rows(codes, w, 0, w->N, w->K);
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

#endif
