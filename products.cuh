/*
products.cuh: matrix products on the GPU, where nearly all of the time goes.

What it is:  a chapter of train_bitnet.cu in a file of its own: cuBLASLt and what we ask of it; the tensor core instructions and our
             own kernels for int8 x 2 bits (decoding) and for bf16 (classifier, few rows); BitLinear forward and backward.
What not:    the derivation of the backward products: train_bitnet.c. Numbered versions of the kernels: dev/cuda/.
Read before: device.cuh, weights.cuh.
Defines:     bitlinear_forward, bitlinear_backward of bitnet/ops.h; product, matmul_bf16, matmul_f32, product_backward.
*/
#ifndef BITNET_PRODUCTS_CUH
#define BITNET_PRODUCTS_CUH

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
/*
Integer products. What the library asks of int8 x int8 -> int32 in ordinary row or column order (its manual, cublasLtMatmul, "IMMA
kernels"): the index that is summed over runs along memory in both operands; its length, the number of outputs, the distances of rows
and all addresses are multiples of 4. Multiples of 16 are faster, and they are what we give it whatever the shape: weights are stored
padded, int32 sums come padded, and activations whose rows are no multiple of 16 long (an FFN of 5,460) are copied to padded rows
first. Zeros change no sum, so the bits are those of the unpadded product.
*/

// The one way in which a sum becomes an output; every path must round alike, so nothing here may be fused by the compiler.
__device__ inline float finished(float sum, float scale, const float *bias, const floatX *residual) {
  float v = __fmul_rn(sum, scale);
  if (bias) v = __fadd_rn(v, *bias);
  if (residual) v = __fadd_rn(v, to_float(*residual));
  return v;
}

// `cols` columns of out [R,N] from the int32 sums of cuBLASLt, `stride` in a row; all pointers start at the first of them. gamma, bias
// and residual may be NULL. One block walks along a row.
template <int W>
__global__ void finish_kernel(floatX *out, const int32_t *sums, const float *s, const float *gamma, const float *bias,
                              const floatX *residual, int N, int cols, int stride) {
  size_t r = blockIdx.x;
  float scale = s[r];
  for (int n = threadIdx.x * W; n < cols; n += blockDim.x * W) {
    size_t at = r * N + n;
    float v[W], g[W];
    load<W>(v, sums + r * stride + n);
    if (gamma) load<W>(g, gamma + n);
    for (int w = 0; w < W; w++) {
      v[w] = finished(v[w], gamma ? __fmul_rn(scale, g[w]) : scale, bias ? bias + n + w : NULL, residual ? residual + at + w : NULL);
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

// out (=) [rows,stride] = in [rows,K], zeros behind each row; T is one code or four.
template <class T>
__global__ void pad_rows_kernel(T *out, const T *in, int K, int stride) {
  size_t r = blockIdx.x;
  for (int k = threadIdx.x; k < stride; k += blockDim.x) out[r * stride + k] = k < K ? in[r * K + k] : 0;
}

static void pad_rows(int8_t *out, const int8_t *in, int rows, int K, int stride) {
  if (K % 4 == 0) LAUNCH(pad_rows_kernel<uint32_t>, (unsigned)rows, 256, 0, (uint32_t *)out, (const uint32_t *)in, K / 4, stride / 4);
  else LAUNCH(pad_rows_kernel<int8_t>, (unsigned)rows, 256, 0, out, in, K, stride);
}

// sums (=) [M,N] = a b' for codes a [M,K] and b [N,K]; N and K are padded. Returns false if the library has no kernel for that.
static bool integer_sums(int32_t *sums, const int8_t *a, const int8_t *b, int M, int N, int K) {
  Product p = {};
  p.M = M, p.N = N, p.K = K;
  p.in = CUDA_R_8I, p.out = CUDA_R_32I;
  p.A = a, p.lda = (size_t)K;
  p.B = b, p.ldb = (size_t)K, p.b_trans = true;
  p.D = sums, p.ldd = (size_t)N;
  return blas_product(&p);
}

/*
Many rows, through cuBLASLt: int32 sums of a bounded number of rows and outputs at a time, then scales. Packed weights are unpacked to
int8 for that, a bounded number of outputs at a time. Returns false if the library has no kernel, against its manual; our own kernel
then computes the same bits, slower.
*/
static bool blas_integer_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  int N = w->N, K = w->K, Np = (int)padded((size_t)N), Kp = (int)padded((size_t)K), cols = Np;
  int rows = rows_at_a_time(sums_bytes, (size_t)Np * sizeof(int32_t) + (size_t)Kp, R);
  scratch_start();
  int32_t *sums = (int32_t *)scratch_take((size_t)rows * Np * sizeof(int32_t));
  int8_t *codes = K < Kp ? (int8_t *)scratch_take((size_t)rows * Kp) : NULL, *unpacked = NULL;
  if (w->packed) {
    size_t most = operand_bytes / (size_t)Kp / TILE_N * TILE_N;   // whole tiles
    cols = (int)smaller((size_t)Np, larger(most, TILE_N));
    unpacked = (int8_t *)scratch_take((size_t)cols * Kp);
  }
  for (int n0 = 0; n0 < N; n0 += cols) {
    int n = N - n0 < cols ? N - n0 : cols, np = (int)padded((size_t)n);
    if (w->packed) unpack_rows(unpacked, w, n0, np, Kp);
    for (int r0 = 0; r0 < R; r0 += rows) {
      int m = R - r0 < rows ? R - r0 : rows;
      size_t at = (size_t)r0 * N + n0;
      const int8_t *q = (const int8_t *)x->data + (size_t)r0 * K;
      if (codes) pad_rows(codes, q, m, K, Kp);
      if (!integer_sums(sums, codes ? codes : q, w->packed ? unpacked : weight_codes(w), m, np, Kp)) return false;
      int width = width_of((size_t)(N | n));
      LAUNCH_WIDTH(width, finish_kernel, (unsigned)m, row_threads(n, width), 0, out + at, sums, x->s + r0, w->gamma + n0,
                   w->bias ? w->bias + n0 : NULL, residual ? residual + at : NULL, N, n, np);
    }
  }
  return true;
}

static void integer_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R) {
  int N = w->N, K = w->K;
  if (R > DECODE_ROWS && blas_integer_forward(out, x, w, residual, R)) return;
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
    if (fp32) matmul_f32(out, values, weight_bf16_codes(w), w->gamma, w->bias, residual, R, N, K);
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
  int width = aligned16(in) ? width_of((size_t)K) : 1;
  unsigned threads = row_threads(K, width);
  if (width == 8) LAUNCH((convert_kernel<8, To, From>), (unsigned)rows, threads, 0, out, in, s, K);
  else if (width == 4) LAUNCH((convert_kernel<4, To, From>), (unsigned)rows, threads, 0, out, in, s, K);
  else LAUNCH((convert_kernel<1, To, From>), (unsigned)rows, threads, 0, out, in, s, K);
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
  if (want == CUDA_R_32F && o->type == CUDA_R_16BF) convert((float *)copy, (const bf16 *)from, scale, rows, K);
  else if (want == CUDA_R_32F) convert((float *)copy, (const int8_t *)from, scale, rows, K);
  else if (o->type == CUDA_R_8I) convert((bf16 *)copy, (const int8_t *)from, scale, rows, K);
  else convert((bf16 *)copy, (const float *)from, scale, rows, K);
  return copy;
}

/*
dx (=) [R,K] = dy w,  dw (+=) [N,K] = dy' x,  for dy [R,N], x [R,K], w [N,K] (rows n of w times gamma[n], if given, which is the
same for all rows of a part). dx may be NULL: dw alone.

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
  bool sums = dx && block < N && own == CUDA_R_16BF;   // the pieces of a huge w are added in fp32 before they are rounded
  size_t row_bytes = (own == in ? 0 : (size_t)N * type_size(in)) + (x->type == in && x->scale == NULL ? 0 : (size_t)K * type_size(in));
  int rows = rows_at_a_time(operand_bytes, row_bytes + (sums ? (size_t)K * sizeof(float) : 0), R);
  for (int r0 = 0; r0 < R; r0 += rows) {
    int m = R - r0 < rows ? R - r0 : rows, n0 = 0;
    scratch_start();
    const char *dy_rows = (const char *)operand_rows(&dy, r0, m, N, in);
    const void *x_rows = operand_rows(x, r0, m, K, in);
    floatX *dx_rows = dx ? dx + (size_t)r0 * K : NULL;
    float *sum = sums ? (float *)scratch_take((size_t)m * K * sizeof(float)) : NULL;
    size_t mark = scratch_.used;
    for (int part = 0, part_end = 0; dx && part < 3 && parts[part] > 0; part++) {
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

// A block rounds row row0 + r of dy gamma, at random, to codes q (=) [rows,stride] with the scale s (=) [rows]; quant.h explains it,
// and the random number of a place is the CPU's. A row that is not finite gets a NaN scale. Zeros from N on.
template <int W>
__global__ void round_rows_kernel(int8_t *q, float *s, const floatX *dout, const float *gamma, int N, int stride, uint32_t key,
                                  int row0) {
  size_t r = blockIdx.x;
  const floatX *dy = dout + r * N;
  float top = 0, v[W], g[W];
  for (int n = threadIdx.x * W; n < N; n += blockDim.x * W) {
    load<W>(v, dy + n);
    load<W>(g, gamma + n);
    for (int w = 0; w < W; w++) {
      float a = fabsf(__fmul_rn(v[w], g[w]));
      top = isfinite(a) ? fmaxf(top, a) : INFINITY;
    }
  }
  top = block_max(top);
  bool bad = !isfinite(top);
  float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
  if (threadIdx.x == 0) s[r] = bad ? NAN : top / 127.0f;
  for (int n = threadIdx.x * W; n < N; n += blockDim.x * W) {
    load<W>(v, dy + n);
    load<W>(g, gamma + n);
    for (int w = 0; w < W; w++) {
      float a = bad ? 0.0f : fmaxf(-127.0f, fminf(127.0f, __fmul_rn(__fmul_rn(v[w], g[w]), inverse)));
      v[w] = (float)noisy_code(a, noise_at(key, (uint32_t)(row0 + (int)r), (uint32_t)(n + w), (uint32_t)N));
    }
    store<W>(q + r * stride + n, v);
  }
  for (int n = N + threadIdx.x; n < stride; n += blockDim.x) q[r * stride + n] = 0;
}

// dx (=) [R,K] = dy w at lambda = 1 as an integer product, dy gamma rounded to int8; a bounded number of rows at a time.
static void integer_input_gradient(floatX *dx, const floatX *dout, const BitWeight *w, int R) {
  int N = w->N, K = w->K, Np = (int)padded((size_t)N), Kp = (int)padded((size_t)K);
  int rows = rows_at_a_time(sums_bytes, (size_t)Kp * sizeof(int32_t) + (size_t)Np + sizeof(float), R);
  uint32_t key = (uint32_t)(w->noise ^ w->noise >> 32);
  int width = width_of((size_t)N), width_out = width_of((size_t)K);
  scratch_start();
  int32_t *sums = (int32_t *)scratch_take((size_t)rows * Kp * sizeof(int32_t));
  int8_t *q = (int8_t *)scratch_take((size_t)rows * Np);
  float *s = (float *)scratch_take((size_t)rows * sizeof(float));
  for (int r0 = 0; r0 < R; r0 += rows) {
    int m = R - r0 < rows ? R - r0 : rows;
    LAUNCH_WIDTH(width, round_rows_kernel, (unsigned)m, row_threads(N, width), 0, q, s, dout + (size_t)r0 * N, w->gamma, N, Np, key,
                 r0);
    if (!integer_sums(sums, q, weight_turned_codes(w), m, Kp, Np)) {
      die(EXIT_FAILED, "cuBLASLt has no int8 kernel for a product of %d x %d x %d on %s; say dx_int8=0", m, Kp, Np, gpu_.prop.name);
    }
    LAUNCH_WIDTH(width_out, finish_kernel, (unsigned)m, row_threads(K, width_out), 0, dx + (size_t)r0 * K, sums, s, NULL, NULL, NULL,
                 K, K, Kp);
  }
}

// Straight-through, as above; where dx_int8 is on, dx is an integer product like the forward one.
void bitlinear_backward(floatX *dx, float *dw, float *dbias, const floatX *dout, const QAct *x, const BitWeight *w, int R) {
  bool ternary = w->lambda == 1.0f, rounded_dx = ternary && w->dx_int8, codes = x->lambda == 1.0f && x->bits > 0;
  cudaDataType_t own = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
  Operand xo = {x->data, codes ? CUDA_R_8I : own, codes ? x->s : NULL};
  Operand wo = {w->data, own, NULL};
  int whole[3] = {w->N, 0, 0};
  if (ternary) wo = {weight_bf16_codes(w), CUDA_R_16BF, NULL};
  if (rounded_dx) integer_input_gradient(dx, dout, w, R);
  product_backward(rounded_dx ? NULL : dx, dw, dout, &xo, &wo, ternary ? w->parts : whole, ternary ? w->gamma : NULL, R, w->N, w->K,
                   w->precision);
  if (dbias) add_column_sums(dbias, dout, R, w->N);
}

#endif
