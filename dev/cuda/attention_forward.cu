/*
attention_forward.cu: causal attention of a batch, out = softmax(q k' / sqrt(HS)) v, three times.

    1  a thread for each query      the scores never exist as a matrix ("online softmax": sums so far are scaled down when a larger
                                    score comes), but every thread reads all keys and values by itself
    2  a warp for each query        lanes share the head's dimensions out, so reads are wide; a shuffle sum for each key
    3  tensor cores                 the program's: 64 queries of a block meet 64 keys in shared memory, products by mma

The measure is the bf16 peak of the tensor cores: 4 HS operations for each pair of a query and a key that it sees.
Read before: versions.cuh, attention.cuh.
*/
#include "versions.cuh"

enum { HS = 64 };
static const int B = EMULATED ? 1 : 8, T = EMULATED ? 70 : 1024, NH = EMULATED ? 2 : 12, NKV = EMULATED ? 1 : 12;
static const int QKV = (NH + 2 * NKV) * HS;

// Where head h of row r has its query; the keys and values of its group, row 0 of the sequence.
struct Place {
  const floatX *q, *k, *v;
};

__device__ inline Place place_of(const floatX *qkv, size_t row, int h, int length, int heads, int kv_heads) {
  size_t width = (size_t)(heads + 2 * kv_heads) * HS, first = row / length * length;
  const floatX *k = qkv + first * width + (size_t)(heads + h / (heads / kv_heads)) * HS;
  return {qkv + row * width + (size_t)h * HS, k, k + (size_t)kv_heads * HS};
}

__global__ void attention_1(floatX *out, const floatX *qkv, int rows, int length, int heads, int kv_heads) {
  int item = blockIdx.x * blockDim.x + threadIdx.x, h = item % heads, row = item / heads;
  if (row >= rows) return;
  Place at = place_of(qkv, (size_t)row, h, length, heads, kv_heads);
  size_t width = (size_t)(heads + 2 * kv_heads) * HS;
  float sums[HS] = {0}, top = -FLT_MAX, total = 0;
  for (int j = 0; j <= row % length; j++) {
    float score = 0;
    for (int i = 0; i < HS; i++) score += to_float(at.q[i]) * to_float(at.k[j * width + i]);
    score *= 1.0f / sqrtf((float)HS);
    float high = fmaxf(top, score), shrink = expf(top - high), p = expf(score - high);
    for (int i = 0; i < HS; i++) sums[i] = sums[i] * shrink + p * to_float(at.v[j * width + i]);
    total = total * shrink + p;
    top = high;
  }
  for (int i = 0; i < HS; i++) from_float(&out[(size_t)item * HS + i], sums[i] / total);
}

__global__ void attention_2(floatX *out, const floatX *qkv, int rows, int length, int heads, int kv_heads) {
  int item = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, h = item % heads, row = item / heads;
  if (row >= rows) return;
  Place at = place_of(qkv, (size_t)row, h, length, heads, kv_heads);
  size_t width = (size_t)(heads + 2 * kv_heads) * HS;
  const int PER_LANE = HS / WARP;
  float q[PER_LANE], sums[PER_LANE] = {0}, top = -FLT_MAX, total = 0;
  for (int i = 0; i < PER_LANE; i++) q[i] = to_float(at.q[lane * PER_LANE + i]) * (1.0f / sqrtf((float)HS));
  for (int j = 0; j <= row % length; j++) {
    float part = 0;
    for (int i = 0; i < PER_LANE; i++) part += q[i] * to_float(at.k[j * width + lane * PER_LANE + i]);
    float score = warp_sum(part), high = fmaxf(top, score), shrink = expf(top - high), p = expf(score - high);
    for (int i = 0; i < PER_LANE; i++) sums[i] = sums[i] * shrink + p * to_float(at.v[j * width + lane * PER_LANE + i]);
    total = total * shrink + p;
    top = high;
  }
  for (int i = 0; i < PER_LANE; i++) from_float(&out[(size_t)item * HS + lane * PER_LANE + i], sums[i] / total);
}

// The relative norm of the error over some queries.
static double error_of(const Floats &out, const Floats &qkv) {
  double off = 0, norm = 0;
  std::vector<double> p((size_t)T);
  for (size_t row = 0; row < (size_t)B * T; row += EMULATED ? 1 : 67) {
    for (int h = 0; h < NH; h++) {
      size_t t = row % T, first = row - t, kv = (size_t)(NH + h / (NH / NKV)) * HS;
      double top = -INFINITY, total = 0;
      for (size_t j = 0; j <= t; j++) {
        p[j] = 0;
        for (int i = 0; i < HS; i++) p[j] += (double)qkv[row * QKV + (size_t)h * HS + i] * qkv[(first + j) * QKV + kv + i];
        p[j] /= sqrt((double)HS);
        top = fmax(top, p[j]);
      }
      for (size_t j = 0; j <= t; j++) total += p[j] = exp(p[j] - top);
      for (int i = 0; i < HS; i++) {
        double want = 0;
        for (size_t j = 0; j <= t; j++) want += p[j] / total * qkv[(first + j) * QKV + kv + (size_t)NKV * HS + i];
        double d = out[(row * NH + h) * HS + i] - want;
        off += d * d;
        norm += want * want;
      }
    }
  }
  return sqrt(off / norm);
}

int main(void) {
  bench_start("causal attention, forward");
  size_t rows = (size_t)B * T, items = rows * NH;
  Floats qkv = normals(rows * QKV, 1);
  for (float &v : qkv) v = as_activation(v);
  Acts in(qkv), out(items * HS);
  Dev<float> lse(items);
  Dev<int> start(std::vector<int>(rows, 0));
  double operations = 4.0 * HS * NH * B * T * (T + 1) / 2, bound = sizeof(floatX) == 2 ? 4e-3 : 1e-5;
  auto error = [&] {
    double e = error_of(out.out(), qkv);
    dev_zero(out.p, out.n * sizeof(floatX));
    return e;
  };
  bench_version("1 a thread for each query", operations, LIMIT_BF16, bound,
                [&] { LAUNCH(attention_1, blocks_for(items, 64), 64, 0, out.p, in.p, (int)rows, T, NH, NKV); }, error);
  bench_version("2 a warp for each query", operations, LIMIT_BF16, bound,
                [&] { LAUNCH(attention_2, blocks_for(items, 8), 256, 0, out.p, in.p, (int)rows, T, NH, NKV); }, error);
  bench_version("3 tensor cores", operations, LIMIT_BF16, bound,
                [&] { attention_forward(out.p, lse.p, in.p, start.p, B, T, NH, NKV, HS, PRECISION_BF16); }, error);
  return bench_end();
}
