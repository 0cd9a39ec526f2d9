/*
rmsnorm_quant.cu: y = Q(rmsnorm(x)), the operation in front of every BitLinear, three times.

    1  one thread for each row      neighbouring threads read addresses a whole row apart: 32 transactions for 32 values
    2  one warp for each row        neighbouring lanes read neighbouring values; the three sums and maxima go through shuffles
    3  one block for each row       the program's: eight values in one access, enough threads to have the whole row on its way at once

Nothing is computed that costs time; the measure is the memory: x is read once (2 bytes a value), codes are written once (1 byte).
Read before: versions.cuh, quant.h.
*/
#include "versions.cuh"

static const int R = EMULATED ? 37 : 16384, C = EMULATED ? 200 : 2560;
static const float EPS = 1e-5f;

__global__ void rmsnorm_quant_1(int8_t *q, float *scale, const floatX *x, const float *gain, int rows, int cols, float eps) {
  int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  const floatX *row = x + (size_t)r * cols;
  float squares = 0, top = 0;
  for (int c = 0; c < cols; c++) squares += to_float(row[c]) * to_float(row[c]);
  float rstd = 1.0f / sqrtf(squares / (float)cols + eps);
  for (int c = 0; c < cols; c++) top = fmaxf(top, fabsf(gain[c] * (to_float(row[c]) * rstd)));
  float inverse = act_inverse_scale(top, 8);
  for (int c = 0; c < cols; c++) {
    q[(size_t)r * cols + c] = (int8_t)act_round(gain[c] * (to_float(row[c]) * rstd), inverse, act_levels(8));
  }
  scale[r] = 1.0f / inverse;
}

enum { ROWS_OF_A_BLOCK = 8 };   // version 2: one warp each

__global__ void rmsnorm_quant_2(int8_t *q, float *scale, const floatX *x, const float *gain, int rows, int cols, float eps) {
  int lane = threadIdx.x % WARP, r = blockIdx.x * ROWS_OF_A_BLOCK + threadIdx.x / WARP;
  if (r >= rows) return;        // whole warps leave
  const floatX *row = x + (size_t)r * cols;
  float squares = 0, top = 0;
  for (int c = lane; c < cols; c += WARP) squares += to_float(row[c]) * to_float(row[c]);
  float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)cols + eps);
  for (int c = lane; c < cols; c += WARP) top = fmaxf(top, fabsf(gain[c] * (to_float(row[c]) * rstd)));
  float inverse = act_inverse_scale(warp_max(top), 8);
  for (int c = lane; c < cols; c += WARP) {
    q[(size_t)r * cols + c] = (int8_t)act_round(gain[c] * (to_float(row[c]) * rstd), inverse, act_levels(8));
  }
  if (lane == 0) scale[r] = 1.0f / inverse;
}

// Codes may differ by one where a value lies at a tie, in one place of a thousand; scales by a rounding. Returns the largest relative
// error of a scale, or infinity.
static double error_of(const std::vector<int8_t> &q, const Floats &scale, const Floats &x, const Floats &gain) {
  size_t differ = 0, checked = 0;
  double worst = 0;
  for (size_t r = 0; r < (size_t)R; r += EMULATED ? 1 : 251) {
    double squares = 0, top = 0;
    for (size_t c = 0; c < (size_t)C; c++) squares += (double)x[r * C + c] * x[r * C + c];
    double rstd = 1 / sqrt(squares / C + EPS);
    for (size_t c = 0; c < (size_t)C; c++) top = fmax(top, fabs(gain[c] * (x[r * C + c] * rstd)));
    worst = fmax(worst, fabs(scale[r] * 127 / top - 1));
    for (size_t c = 0; c < (size_t)C; c++, checked++) {
      int off = abs(q[r * C + c] - (int)rint(gain[c] * (x[r * C + c] * rstd) * 127 / top));
      if (off > 1) return INFINITY;
      differ += off != 0;
    }
  }
  return differ * 1000 > checked ? INFINITY : worst;
}

int main(void) {
  bench_start("rmsnorm + quantisation to int8");
  Floats x = normals((size_t)R * C, 1), gain = normals((size_t)C, 2);
  for (float &v : x) v = as_activation(v);
  Acts gx(x);
  Dev<float> ggain(gain), scale((size_t)R), rstd((size_t)R);
  Dev<int8_t> q((size_t)R * C);
  QAct out = {q.p, scale.p, 1, 8};
  double bytes = (double)R * C * (sizeof(floatX) + 1);
  auto error = [&] {
    double e = error_of(q.out(), scale.out(), x, gain);
    dev_zero(q.p, q.n);   // the next version must write its own
    return e;
  };
  unsigned threads = blocks_for((size_t)R, 128), warps = blocks_for((size_t)R, ROWS_OF_A_BLOCK);
  bench_version("1 one thread a row", bytes, LIMIT_READ, 1e-5,
                [&] { LAUNCH(rmsnorm_quant_1, threads, 128, 0, q.p, scale.p, gx.p, ggain.p, R, C, EPS); }, error);
  bench_version("2 one warp a row", bytes, LIMIT_READ, 1e-5,
                [&] { LAUNCH(rmsnorm_quant_2, warps, ROWS_OF_A_BLOCK * WARP, 0, q.p, scale.p, gx.p, ggain.p, R, C, EPS); }, error);
  bench_version("3 one block a row, 8 values at once", bytes, LIMIT_READ, 1e-5,
                [&] { rmsnorm_quant_forward(&out, rstd.p, gx.p, ggain.p, R, C, EPS); }, error);
  return bench_end();
}
