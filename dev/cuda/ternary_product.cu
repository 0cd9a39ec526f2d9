/*
ternary_product.cu: y = q w' for a few rows of int8 activations and a ternary matrix, the operation of decoding, four times.

    1  a thread for each output     int8 codes, four products an instruction (dp4a); neighbouring threads read addresses a row apart
    2  a warp for each output       neighbouring lanes read neighbouring words; their sums meet in shuffles
    3  2 bits a code                the same with 16 codes a word: a quarter of the memory to read; a shift and a mask for four codes
    4  tensor cores                 the program's: packed in the order in which the lanes of a warp need operand a of mma, so that one
                                    unpacked word serves 8 rows of activations

The measure is the memory: each weight is read once, 1 byte in versions 1 and 2, a quarter of it in 3 and 4.
Read before: versions.cuh; ternary_forward_kernel in products.cuh.
*/
#include "versions.cuh"

static const int N = EMULATED ? 40 : 13824, K = EMULATED ? 384 : 2560;

__device__ inline void write_output(floatX *out, size_t at, int sum, float scale) {
  from_float(&out[at], finished((float)sum, scale, NULL, NULL));
}

// blockIdx.y is the row of activations.
__global__ void ternary_1(floatX *out, const int8_t *q, const float *s, const int8_t *codes, const float *gamma, int n_out, int n_in) {
  int n = blockIdx.x * blockDim.x + threadIdx.x, sum = 0;
  size_t r = blockIdx.y;
  if (n >= n_out) return;
  const int *x = (const int *)(q + r * n_in), *w = (const int *)(codes + (size_t)n * n_in);
  for (int i = 0; i < n_in / 4; i++) sum = __dp4a(x[i], w[i], sum);
  write_output(out, r * n_out + n, sum, __fmul_rn(s[r], gamma[n]));
}

__device__ inline int warp_sum_int(int v) {
  return warp_fold<Sum>(v);
}

__global__ void ternary_2(floatX *out, const int8_t *q, const float *s, const int8_t *codes, const float *gamma, int n_out, int n_in) {
  int n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, sum = 0;
  size_t r = blockIdx.y;
  if (n >= n_out) return;
  const int *x = (const int *)(q + r * n_in), *w = (const int *)(codes + (size_t)n * n_in);
  for (int i = lane; i < n_in / 4; i += WARP) sum = __dp4a(x[i], w[i], sum);
  sum = warp_sum_int(sum);
  if (lane == 0) write_output(out, r * n_out + n, sum, __fmul_rn(s[r], gamma[n]));
}

// Word i of a row holds codes + 1 of k = 16 i .. 16 i + 15: byte b, bits 2f and 2f+1 for k = 16 i + 4 f + b, so that a shift and a
// mask leave four neighbouring codes in the four bytes. The ones that were added come off at the end: they count each activation once.
__global__ void ternary_3(floatX *out, const int8_t *q, const float *s, const uint32_t *packed, const float *gamma, int n_out,
                          int n_in) {
  int n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, sum = 0, excess = 0;
  size_t r = blockIdx.y;
  if (n >= n_out) return;
  const int *x = (const int *)(q + r * n_in);
  const uint32_t *w = packed + (size_t)n * (n_in / 16);
  for (int i = lane; i < n_in / 16; i += WARP) {
    uint32_t word = w[i];
    for (int f = 0; f < 4; f++) {
      int four = x[4 * i + f];
      sum = __dp4a(four, (int)(word >> 2 * f & 0x03030303u), sum);
      excess = __dp4a(four, 0x01010101, excess);
    }
  }
  sum = warp_sum_int(sum - excess);
  if (lane == 0) write_output(out, r * n_out + n, sum, __fmul_rn(s[r], gamma[n]));
}

int main(void) {
  const int rows[] = {1, 8, 64};
  const float scale = 0.5f, weight_scale = 0.25f;
  size_t n_codes = (size_t)N * K;
  bench_start("int8 activations x ternary weights");
  std::vector<int8_t> codes(n_codes), q(64 * (size_t)K);
  std::vector<uint32_t> words(n_codes / 16);
  for (size_t i = 0; i < n_codes; i++) codes[i] = (int8_t)((int)rng_below(1, RNG_TEST, i, 3) - 1);
  for (size_t i = 0; i < q.size(); i++) q[i] = (int8_t)((int)rng_below(2, RNG_TEST, i, 256) - 128);
  for (size_t i = 0; i < n_codes; i++) words[i / 16] |= (uint32_t)(codes[i] + 1) << (8 * (i % 4) + 2 * (i / 4 % 4));
  Dev<int8_t> gcodes(codes), gq(q);
  Dev<uint32_t> gwords(words);
  Dev<float> s(Floats(64, scale)), gamma(Floats((size_t)N, weight_scale)), own_gamma((size_t)N);
  Dev<char> own(bitweight_packed_bytes(N, K)), scratch(ops_scratch_bytes(64, (size_t)N, (size_t)K));
  BitWeight w = {N, K, {N, 0, 0}, 1, PRECISION_BF16, 1, 0, 0, own.p, own_gamma.p, NULL};
  weight_pack_codes(&w, 0, gcodes.p, 0, N, weight_scale);
  ops_set_scratch(scratch.p, scratch.n);

  for (int R : rows) {
    Acts out((size_t)R * N);
    QAct x = {gq.p, s.p, 1, 8};
    char name[64];
    auto error = [&] {   // integers: how many outputs are not exactly what they should be
      Floats y = out.out();
      double wrong = 0;
      for (size_t r = 0; r < (size_t)R; r++) {
        for (size_t n = 0; n < (size_t)N; n += EMULATED ? 1 : 37) {
          int sum = 0;
          for (size_t k = 0; k < (size_t)K; k++) sum += codes[n * K + k] * q[r * K + k];
          wrong += y[r * N + n] != as_activation((float)sum * (scale * weight_scale));
        }
      }
      dev_zero(out.p, out.n * sizeof(floatX));
      return wrong;
    };
    double bytes = (double)n_codes;
    dim3 threads(blocks_for((size_t)N, 128), (unsigned)R), warps(blocks_for((size_t)N, 8), (unsigned)R);
    snprintf(name, sizeof name, "1 dp4a, %d rows", R);
    bench_version(name, bytes, LIMIT_READ, 0, [&] { LAUNCH(ternary_1, threads, 128, 0, out.p, gq.p, s.p, gcodes.p, gamma.p, N, K); },
                  error);
    snprintf(name, sizeof name, "2 a warp for each output, %d rows", R);
    bench_version(name, bytes, LIMIT_READ, 0, [&] { LAUNCH(ternary_2, warps, 256, 0, out.p, gq.p, s.p, gcodes.p, gamma.p, N, K); },
                  error);
    snprintf(name, sizeof name, "3 2 bits a code, %d rows", R);
    bench_version(name, bytes / 4, LIMIT_READ, 0,
                  [&] { LAUNCH(ternary_3, warps, 256, 0, out.p, gq.p, s.p, gwords.p, gamma.p, N, K); }, error);
    snprintf(name, sizeof name, "4 tensor cores, %d rows", R);
    bench_version(name, bytes / 4, LIMIT_READ, 0, [&] { bitlinear_forward(out.p, &x, &w, NULL, R); }, error);
  }
  return bench_end();
}
