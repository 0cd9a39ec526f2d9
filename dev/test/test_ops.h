/*
test_ops.h: what must hold for single ops whatever the numbers are. No PyTorch needed.

What it is:  hand-computed cases of the quantisers, ops against plain loops in double, and two promises of bitnet/ops.h: every
             op gives the same bits for any number of threads, and to a row that stands alone.
What not:    models (test_model.h), comparisons with PyTorch (test_reference.h), derivatives (test_float64.c).
Read before: check.h, bitnet/ops.h, quant.h.
Defines:     OPS_TESTS, the rows for the table of tests; helpers for device memory and random numbers.

Bounds: "same" and "equal" mean the same bits. A bound of 1e-6 is the rounding of a few hundred float32 additions, relative to
the largest element of the tensor. Memory of the ops is device memory: it is filled and read through the helpers below only.
*/
#ifndef TEST_OPS_H
#define TEST_OPS_H

#include "../../bitnet/model.h"
#include "../../bitnet/optim.h"
#include "../../quant.h"
#include "check.h"

// ---------------------------------------------------------------------------------------------------------
// Helpers: memory that lives until the end of a test, random numbers, scratch.

static void *host_pool_[4096], *dev_pool_[4096];
static size_t n_host_pool_, n_dev_pool_;
static uint64_t test_draws_;   // random numbers used up by the running test

static void *host_memory_(size_t bytes) {
  if (n_host_pool_ == ARRAY_LEN(host_pool_)) die(EXIT_FAILED, "bug: a test allocates too often");
  return host_pool_[n_host_pool_++] = xcalloc(bytes, 1);
}

static void *dev_memory_(size_t bytes) {
  void *p = dev_malloc(bytes);
  if (p == NULL || n_dev_pool_ == ARRAY_LEN(dev_pool_)) die(EXIT_FAILED, "no memory for a test: %zu bytes", bytes);
  return dev_pool_[n_dev_pool_++] = p;
}

// Every test that uses the helpers ends with this.
static void end_test_(void) {
  while (n_host_pool_ > 0) free(host_pool_[--n_host_pool_]);
  while (n_dev_pool_ > 0) dev_free(dev_pool_[--n_dev_pool_]);
  test_draws_ = 0;
}

static float *host_floats_(size_t n) {
  return (float *)host_memory_(n * sizeof(float));
}

// n numbers ~ mean + scale N(0,1) on the host.
static float *normals_(size_t n, double mean, double scale) {
  float *x = host_floats_(n);
  for (size_t i = 0; i < n; i++) x[i] = (float)(mean + scale * rng_normal(11, RNG_TEST, test_draws_++));
  return x;
}

static int test_below_(int n) {
  return (int)rng_below(12, RNG_TEST, test_draws_++, (uint64_t)n);
}

// Copies to the device: parameters, activations, integers; zeros where host is NULL.
static float *dev_floats_(const float *host, size_t n) {
  float *p = (float *)dev_memory_(n * sizeof(float));
  if (host) dev_copy_in(p, host, n * sizeof(float));
  return p;
}

static floatX *dev_acts_(const float *host, size_t n) {
  floatX *p = (floatX *)dev_memory_(n * sizeof(floatX));
  if (host) dev_floatx_in(p, host, n);
  return p;
}

static int *dev_ints_(const int *host, size_t n) {
  int *p = (int *)dev_memory_(n * sizeof(int));
  dev_copy_in(p, host, n * sizeof(int));
  return p;
}

// And back.
static float *read_floats_(const float *dev, size_t n) {
  float *p = host_floats_(n);
  dev_copy_out(p, dev, n * sizeof(float));
  return p;
}

static float *read_acts_(const floatX *dev, size_t n) {
  float *p = host_floats_(n);
  dev_floatx_out(p, dev, n);
  return p;
}

static int8_t *read_codes_(const void *dev, size_t n) {
  int8_t *p = (int8_t *)host_memory_(n);
  dev_copy_out(p, dev, n);
  return p;
}

// Scratch for every shape in this file at the current number of threads.
static void reserve_scratch_(void) {
  Config c;
  memset(&c, 0, sizeof c);
  c.dim = c.ffn_dim = c.heads = c.kv_heads = c.head_dim = 1;
  c.dim = c.vocab = 1024;
  model_reserve_scratch(&c, 1024);
}

static void set_threads_(int threads) {
  dev_init(threads);
  reserve_scratch_();
}

static QAct new_qact_(int bits, float lambda, size_t R, size_t K) {
  QAct q;
  q.data = dev_memory_(R * K * sizeof(floatX));
  q.s = dev_floats_(NULL, R);
  q.lambda = lambda;
  q.bits = bits;
  return q;
}

// A BitWeight of up to three matrices, quantised from master (device memory). bias: device memory or NULL.
static BitWeight new_weight_(const float *master, const float *bias, int rows0, int rows1, int rows2, int K, float lambda,
                             int precision) {
  BitWeight w;
  memset(&w, 0, sizeof w);
  w.N = rows0 + rows1 + rows2;
  w.K = K;
  w.parts[0] = rows0;
  w.parts[1] = rows1;
  w.parts[2] = rows2;
  w.precision = precision;
  w.data = dev_memory_(bitweight_bytes(w.N, K));
  w.gamma = dev_floats_(NULL, (size_t)w.N);
  w.bias = bias;
  weight_quantize(&w, master, lambda);
  return w;
}

// The weights [N,K] that products see, whatever layout the backend keeps them in, at lambda < 1: the product with an identity.
static float *effective_weights_(const BitWeight *w) {
  size_t N = (size_t)w->N, K = (size_t)w->K;
  BitWeight plain = *w;
  QAct identity = new_qact_(0, w->lambda, K, K);
  float *one = host_floats_(K * K), *out = host_floats_(N * K), *y;
  for (size_t k = 0; k < K; k++) one[k * K + k] = 1;
  dev_floatx_in((floatX *)identity.data, one, K * K);
  plain.bias = NULL;
  plain.precision = PRECISION_FP32;
  floatX *dev_y = dev_acts_(NULL, K * N);
  bitlinear_forward(dev_y, &identity, &plain, NULL, w->K);
  y = read_acts_(dev_y, K * N);
  for (size_t n = 0; n < N; n++) {
    for (size_t k = 0; k < K; k++) out[n * K + k] = y[k * N + n];
  }
  return out;
}

// The codes [N,K] of a BitWeight at lambda = 1.
static int8_t *weight_codes_(const BitWeight *w) {
  int8_t *device = (int8_t *)dev_memory_((size_t)w->N * (size_t)w->K);
  bitweight_codes(device, w);
  return read_codes_(device, (size_t)w->N * (size_t)w->K);
}

static float *floats_of_(const int8_t *codes, size_t n) {
  float *x = host_floats_(n);
  for (size_t i = 0; i < n; i++) x[i] = codes[i];
  return x;
}

// float rounded to 8 bits of mantissa, ties to even, by arithmetic instead of bit tricks.
static double nearest_bf16_(double x) {
  int e;
  if (x == 0) return 0;
  frexp(x, &e);
  return ldexp(rint(ldexp(x, 8 - e)), e - 8);
}

// The operand of a float product as its precision asks for.
static double operand_(float x, int precision) {
  return precision == PRECISION_BF16 ? nearest_bf16_((double)x) : (double)x;
}

// 1 if both arrays hold the same bits.
static int same_bits_(const void *a, const void *b, size_t bytes) {
  return memcmp(a, b, bytes) == 0;
}

// ---------------------------------------------------------------------------------------------------------
// Quantisers.

static void test_quant_weights(void) {
  // mean |W| = 2, so codes change at |w| = 1: a tie goes to the even number 0, the next float above it to 1.
  static const float tie[8] = {4, -4, 1, -1, 0, 1.0000001f, -1.0000001f, 3.9999998f};
  static const int8_t want[8] = {1, -1, 0, 0, 0, 1, -1, 1};
  static const float tiny[8] = {1e-6f, -4e-6f, 5.1e-6f, 0, 0, 0, -6e-6f, 1e-9f};   // mean below 1e-5: gamma is 1e-5
  static const int8_t want_tiny[8] = {0, 0, 1, 0, 0, 0, -1, 0};
  float *master = host_floats_(24);
  memcpy(master, tie, sizeof tie);
  memcpy(master + 8, tiny, sizeof tiny);   // and eight zeros
  float *device = dev_floats_(master, 24);
  // Three matrices side by side, [2,4] each: a scale of its own for each of them.
  reserve_scratch_();
  BitWeight w = new_weight_(device, NULL, 2, 2, 2, 4, 1, PRECISION_FP32);
  int8_t *got = weight_codes_(&w);
  float *gamma = read_floats_(w.gamma, 6);
  for (int i = 0; i < 8; i++) {
    CHECK(got[i] == want[i], "code of %.8g is %d, wanted %d", (double)tie[i], got[i], want[i]);
    CHECK(got[8 + i] == want_tiny[i], "code of %.8g is %d, wanted %d", (double)tiny[i], got[8 + i], want_tiny[i]);
    CHECK(got[16 + i] == 0, "code of 0 is %d", got[16 + i]);
  }
  CHECK(gamma[0] == 2 && gamma[1] == 2, "gamma %.9g", (double)gamma[0]);
  for (int i = 2; i < 6; i++) CHECK(gamma[i] == 1e-5f, "gamma %.9g of a matrix below the floor", (double)gamma[i]);

  // lambda = 0 is the master itself, 1/2 the middle.
  weight_quantize(&w, device, 0);
  CHECK(same_bits_(effective_weights_(&w), master, 24 * sizeof(float)), "lambda = 0 changed the weights");
  weight_quantize(&w, device, 0.5f);
  float *half = effective_weights_(&w);
  CHECK(half[0] == 3 && half[2] == 0.5f && half[3] == -0.5f && half[7] == 0.5f * (3.9999998f + 2), "lambda = 1/2: %g %g",
        (double)half[0], (double)half[2]);

  // Damaged weights: the scale of their matrix is NaN, so every output is; the neighbours keep theirs.
  static const float bad[3] = {NAN, INFINITY, -INFINITY};
  floatX *x = dev_acts_(normals_(4, 0, 1), 4), *y = dev_acts_(NULL, 6);
  QAct q = new_qact_(8, 1, 1, 4);
  act_quant_forward(&q, x, 1, 4);
  for (int i = 0; i < 3; i++) {
    master[9] = bad[i];
    dev_copy_in(device, master, 24 * sizeof(float));
    weight_quantize(&w, device, 1);
    bitlinear_forward(y, &q, &w, NULL, 1);
    float *out = read_acts_(y, 6);
    CHECK(!isfinite(out[2]) && !isfinite(out[3]), "a weight of %g gives the output %g", (double)bad[i], (double)out[2]);
    CHECK(isfinite(out[0]) && isfinite(out[1]) && isfinite(out[4]), "a weight of %g spoils other matrices", (double)bad[i]);
  }
  end_test_();

  // A large matrix against a plain loop.
  size_t N = 67, K = 301;
  float *big = normals_(N * K, 0.01, 0.3);
  w = new_weight_(dev_floats_(big, N * K), NULL, 40, 27, 0, (int)K, 1, PRECISION_FP32);
  got = weight_codes_(&w);
  gamma = read_floats_(w.gamma, N);
  for (int part = 0; part < 2; part++) {
    size_t first = part ? 40 : 0, end = part ? N : 40;
    double sum = 0;
    for (size_t i = first * K; i < end * K; i++) sum += fabs((double)big[i]);
    double mean = sum / (double)((end - first) * K);
    for (size_t n = first; n < end; n++) {
      CHECK(fabs((double)gamma[n] / mean - 1) < 1e-7, "gamma[%zu] = %.9g, wanted %.9g", n, (double)gamma[n], mean);
    }
    float inverse = 1.0f / gamma[first];
    for (size_t i = first * K; i < end * K; i++) {
      float scaled = big[i] * inverse;
      int code = scaled > 0.5f ? 1 : scaled < -0.5f ? -1 : 0;   // ties go to 0, the even number
      CHECK(got[i] == code, "code %zu is %d, wanted %d", i, got[i], code);
    }
  }
  end_test_();
}

// One row through act_quant_forward at lambda = 1: its codes must be want, its scale s.
static void check_act_codes_(const char *name, int bits, const float *x, const int *want, int K, float s) {
  QAct q = new_qact_(bits, 1, 1, (size_t)K);
  act_quant_forward(&q, dev_acts_(x, (size_t)K), 1, K);
  int8_t *codes = read_codes_(q.data, (size_t)K);
  float got = read_floats_(q.s, 1)[0];
  for (int k = 0; k < K; k++) {
    CHECK(codes[k] == want[k], "%s: the code of %.8g is %d, wanted %d", name, (double)x[k], codes[k], want[k]);
  }
  CHECK(fabsf(got - s) <= 1e-7f * s, "%s: scale %.9g, wanted %.9g", name, (double)got, (double)s);
}

static void test_quant_activations(void) {
  // Halves go to the even neighbour.
  static const float halves[9] = {127, 63.5f, 64.5f, 0.5f, -0.5f, 1.5f, -1.5f, 2.5f, -127};
  static const int halves_want[9] = {127, 64, 64, 0, 0, 2, -2, 2, -127};
  static const float four[7] = {7, 3.5f, 2.5f, -6.5f, -5.5f, 0.5f, -7};
  static const int four_want[7] = {7, 4, 2, -6, -6, 0, -7};
  static const float tiny[3] = {1e-6f, -1e-7f, 0};   // largest below 1e-5: it counts as 1e-5
  static const int tiny_want[3] = {13, -1, 0};
  static const float zero[3] = {0, 0, 0};
  static const int zero_want[3] = {0, 0, 0};
  static const float huge[3] = {3.0e38f, -3.0e38f, 1.5e38f};
  static const int huge_want[3] = {127, -127, 64};
  check_act_codes_("halves", 8, halves, halves_want, 9, 1);
  check_act_codes_("four bits", 4, four, four_want, 7, 1);
  check_act_codes_("tiny", 8, tiny, tiny_want, 3, 1e-5f / 127);
  check_act_codes_("zeros", 8, zero, zero_want, 3, 1e-5f / 127);
  check_act_codes_("huge", 8, huge, huge_want, 3, 3.0e38f / 127);
  CHECK(act_round(1e30f, 1, 127) == 127 && act_round(-1e30f, 1, 127) == -128 && act_round(-1e30f, 1, 7) == -8, "clamping");

  // Random rows against the formula; at other lambdas the value is mixed with its quantised form.
  enum { R = 5, K = 67 };
  static const float lambdas[3] = {0, 0.3f, 1};
  float *x = normals_((size_t)R * K, 0, 2);
  floatX *device = dev_acts_(x, (size_t)R * K);
  for (int bits = 4; bits <= 8; bits += 4) {
    for (int i = 0; i < 3; i++) {
      float lambda = lambdas[i], levels = bits == 8 ? 127.0f : 7.0f;
      QAct q = new_qact_(bits, lambda, R, K);
      act_quant_forward(&q, device, R, K);
      int8_t *codes = read_codes_(q.data, (size_t)R * K);
      float *s = read_floats_(q.s, R), *eff = lambda < 1 ? read_acts_((const floatX *)q.data, (size_t)R * K) : NULL;
      for (int r = 0; r < R; r++) {
        float top = 0, *row = x + r * K;
        for (int k = 0; k < K; k++) top = fmaxf(top, fabsf(row[k]));
        float inverse = levels / top;
        for (int k = 0; k < K; k++) {
          double code = rint((double)(row[k] * inverse)), mixed = row[k] + (double)lambda * (code / (double)inverse - (double)row[k]);
          if (lambda == 1) {
            CHECK(codes[r * K + k] == (int)code, "bits %d: code %d is %d, wanted %g", bits, k, codes[r * K + k], code);
          } else {
            double got = (double)eff[r * K + k];
            CHECK(fabs(got - mixed) <= 2e-7 * (double)top, "bits %d, lambda %g: %g, wanted %g", bits, (double)lambda, got, mixed);
          }
        }
        if (lambda == 1) CHECK(fabsf(s[r] * inverse - 1) <= 2e-7f, "bits %d: scale %g", bits, (double)s[r]);
      }
      if (lambda == 0) CHECK(same_bits_(eff, x, (size_t)R * K * sizeof(float)), "bits %d: lambda = 0 changed the values", bits);
    }
  }

  // Values that are not finite are seen in all of their row and nowhere else.
  static const float bad[3] = {NAN, INFINITY, -INFINITY};
  for (int i = 0; i < 3; i++) {
    x[K + 40] = bad[i];
    dev_floatx_in(device, x, (size_t)R * K);
    QAct q = new_qact_(8, 1, R, K), mixed = new_qact_(8, 0.3f, R, K);
    act_quant_forward(&q, device, R, K);
    act_quant_forward(&mixed, device, R, K);
    float *s = read_floats_(q.s, R), *eff = read_acts_((const floatX *)mixed.data, (size_t)R * K);
    CHECK(isnan(s[1]) && isfinite(s[0]) && isfinite(s[2]), "%g in row 1: scales %g %g %g", (double)bad[i], (double)s[0],
          (double)s[1], (double)s[2]);
    for (int k = 0; k < K; k++) {
      int seen = isnan(eff[K + k]) && isfinite(eff[k]) && isfinite(eff[2 * K + k]);
      CHECK(seen, "%g in row 1: value %d of rows 0 to 2 is %g %g %g", (double)bad[i], k, (double)eff[k], (double)eff[K + k],
            (double)eff[2 * K + k]);
    }
  }
  end_test_();
}

// rmsnorm + quantiser and gate + norm + quantiser in one pass give the bits of the passes one by one.
static void test_fused(void) {
  enum { R = 7, K = 83 };
  static const struct { int bits; float lambda; } forms[] = {{8, 1}, {4, 1}, {8, 0.3f}, {8, 0}, {0, 1}};
  float *gain = dev_floats_(normals_(K, 1, 0.3), K), *rstd = dev_floats_(NULL, R), *rstd2 = dev_floats_(NULL, R);
  float *gate_up = normals_((size_t)R * 2 * K, 0, 1), *u = host_floats_((size_t)R * K);
  floatX *x = dev_acts_(normals_((size_t)R * K, 0, 1), (size_t)R * K), *normed = dev_acts_(NULL, (size_t)R * K);
  floatX *dev_gate_up = dev_acts_(gate_up, (size_t)R * 2 * K);
  reserve_scratch_();
  for (size_t i = 0; i < ARRAY_LEN(forms); i++) {
    size_t bytes = (size_t)R * K * (forms[i].bits && forms[i].lambda == 1 ? 1 : sizeof(floatX));
    QAct a = new_qact_(forms[i].bits, forms[i].lambda, R, K), b = new_qact_(forms[i].bits, forms[i].lambda, R, K);
    rmsnorm_forward(normed, rstd, x, gain, R, K, 1e-5f);
    act_quant_forward(&a, normed, R, K);
    rmsnorm_quant_forward(&b, rstd2, x, gain, R, K, 1e-5f);
    CHECK(same_bits_(read_codes_(a.data, bytes), read_codes_(b.data, bytes), bytes), "norm: bits %d, lambda %g", forms[i].bits,
          (double)forms[i].lambda);
    CHECK(same_bits_(read_floats_(a.s, R), read_floats_(b.s, R), R * sizeof(float)), "norm: scales");
    CHECK(same_bits_(read_floats_(rstd, R), read_floats_(rstd2, R), R * sizeof(float)), "norm: rstd");
    for (int form = 0; form < 3; form++) {   // relu2 with norm, relu2 without, silu with norm
      int act = form == 2 ? ACT_SILU : ACT_RELU2;
      glu_quant_forward(&b, rstd2, dev_gate_up, form == 1 ? NULL : gain, R, K, act, 1e-5f);
      for (int k = 0; k < R * K; k++) {
        float gate = gate_up[k / K * 2 * K + k % K], up = gate_up[k / K * 2 * K + K + k % K], positive = gate > 0 ? gate : 0;
        u[k] = act == ACT_RELU2 ? positive * positive * up : (float)((double)gate / (1 + exp(-(double)gate)) * (double)up);
      }
      floatX *dev_u = dev_acts_(u, (size_t)R * K);
      if (form != 1) rmsnorm_forward(normed, rstd, dev_u, gain, R, K, 1e-5f);
      act_quant_forward(&a, form == 1 ? dev_u : normed, R, K);
      if (act == ACT_RELU2) {
        CHECK(same_bits_(read_codes_(a.data, bytes), read_codes_(b.data, bytes), bytes), "gate %d: bits %d, lambda %g", form,
              forms[i].bits, (double)forms[i].lambda);
        CHECK(same_bits_(read_floats_(a.s, R), read_floats_(b.s, R), R * sizeof(float)), "gate %d: scales", form);
      } else if (forms[i].bits == 0) {   // silu here uses the library's exp: equal to rounding, so codes may differ
        float *got = read_acts_((const floatX *)b.data, (size_t)R * K), *want = read_acts_((const floatX *)a.data, (size_t)R * K);
        CHECK_CLOSE("silu gate", got, want, (size_t)R * K, 1e-6);
      }
      if (form != 1) CHECK_CLOSE("rstd of the gate", read_floats_(rstd2, R), read_floats_(rstd, R), R, 1e-6);
    }
  }
  end_test_();
}

// The product and the gated unit in one, a slice of rows at a time on the CPU, give the bits of one after the other.
static void test_gated(void) {
  enum { R = 601, K = 70, F = 45 };
  static const struct { int bits; float lambda; int rows; } forms[] = {{8, 1, R}, {4, 1, R}, {8, 1, 64}, {8, 1, 3}, {8, 0.3f, 70}, {0, 1, 70}};
  for (size_t i = 0; i < ARRAY_LEN(forms); i++) {
    float *master = dev_floats_(normals_((size_t)2 * F * K, 0, 0.2), (size_t)2 * F * K), *gain = dev_floats_(normals_(F, 1, 0.3), F);
    floatX *x = dev_acts_(normals_((size_t)R * K, 0, 1), (size_t)R * K), *dout = dev_acts_(normals_((size_t)R * F, 0, 1), (size_t)R * F);
    reserve_scratch_();
    size_t rows = (size_t)forms[i].rows, bytes = rows * F * (forms[i].bits && forms[i].lambda == 1 ? 1 : sizeof(floatX));
    QAct h = new_qact_(forms[i].bits, forms[i].lambda, R, K);
    BitWeight w = new_weight_(master, NULL, F, F, 0, K, forms[i].lambda, PRECISION_BF16);
    act_quant_forward(&h, x, forms[i].rows, K);
    for (int form = 0; form < 3; form++) {   // relu2 with norm, relu2 without, silu with norm
      int act = form == 2 ? ACT_SILU : ACT_RELU2;
      const float *g = form == 1 ? NULL : gain;
      QAct a = new_qact_(forms[i].bits, forms[i].lambda, R, F), b = new_qact_(forms[i].bits, forms[i].lambda, R, F);
      float *rstd_a = dev_floats_(NULL, R), *rstd_b = dev_floats_(NULL, R), *dgain_a = dev_floats_(NULL, F), *dgain_b = dev_floats_(NULL, F);
      floatX *gate_up = dev_acts_(NULL, rows * 2 * F), *room = dev_acts_(NULL, rows * 2 * F);
      gated_forward(&b, rstd_b, room, &h, &w, g, forms[i].rows, act, 1e-5f);
      bitlinear_forward(gate_up, &h, &w, NULL, forms[i].rows);
      glu_quant_forward(&a, rstd_a, gate_up, g, forms[i].rows, F, act, 1e-5f);
      CHECK(same_bits_(read_codes_(a.data, bytes), read_codes_(b.data, bytes), bytes), "case %zu, form %d: values", i, form);
      CHECK(same_bits_(read_floats_(a.s, rows), read_floats_(b.s, rows), rows * sizeof(float)), "case %zu, form %d: scales", i, form);
      CHECK(same_bits_(read_floats_(rstd_a, R), read_floats_(rstd_b, R), R * sizeof(float)), "case %zu, form %d: rstd", i, form);
      gated_backward(room, g ? dgain_b : NULL, dout, &h, &w, g, rstd_a, forms[i].rows, act);
      glu_backward(gate_up, g ? dgain_a : NULL, dout, gate_up, g, rstd_a, forms[i].rows, F, act);
      CHECK(same_bits_(read_acts_(room, rows * 2 * F), read_acts_(gate_up, rows * 2 * F), rows * 2 * F * sizeof(float)),
            "case %zu, form %d: dgate_up", i, form);
      CHECK(same_bits_(read_floats_(dgain_a, F), read_floats_(dgain_b, F), F * sizeof(float)), "case %zu, form %d: dgain", i, form);
    }
    end_test_();
  }
}

static void test_pack4(void) {
  // Rows 0 .. 3 of one column: codes 1, 0, -1, 1 -> fields 2, 1, 0, 2 from the low bits up.
  static const int8_t column[4] = {1, 0, -1, 1};
  uint8_t byte;
  int8_t back[4];
  pack4(&byte, column, 4, 1);
  CHECK(byte == (2 | 1 << 2 | 0 << 4 | 2 << 6), "packed byte %d", byte);
  for (size_t r = 0; r < 4; r++)
    CHECK(unpack4_row(back + r, &byte, 4, 1, r) == 1 && back[r] == column[r], "row %zu unpacked: %d", r, back[r]);
  for (int field = 0; field < 4; field++) {   // the code 3 in any place is damage
    uint8_t damaged = (uint8_t)(byte | 3 << (2 * field));
    CHECK(unpack4_row(back, &damaged, 4, 1, (size_t)field) == 0, "code 3 in field %d was accepted", field);
  }
  // Rows that share a byte lie out/4 apart.
  enum { OUT = 12, IN = 5 };
  int8_t codes[OUT * IN], again[OUT * IN];
  uint8_t packed[OUT / 4 * IN];
  for (int i = 0; i < OUT * IN; i++) codes[i] = (int8_t)(test_below_(3) - 1);
  pack4(packed, codes, OUT, IN);
  for (int n = 0; n < OUT; n++) {
    for (int k = 0; k < IN; k++) {
      int got = (packed[n % 3 * IN + k] >> (2 * (n / 3)) & 3) - 1;
      CHECK(got == codes[n * IN + k], "row %d column %d: %d, wanted %d", n, k, got, codes[n * IN + k]);
    }
  }
  for (size_t r = 0; r < OUT; r++) CHECK(unpack4_row(again + r * IN, packed, OUT, IN, r) == 1, "row %zu: refused", r);
  CHECK(same_bits_(again, codes, sizeof codes), "round trip");
  end_test_();
}

// The schedules of lambda and of the learning rate at points that can be worked out by hand.
static void test_schedules(void) {
  static const struct { int kind; int64_t t; double want; } lambdas[] = {   // T = 1000, W = 400
    {LAMBDA_WARMUP, 0, 0}, {LAMBDA_WARMUP, 100, 0.25}, {LAMBDA_WARMUP, 400, 1}, {LAMBDA_WARMUP, 999, 1},
    {LAMBDA_LINEAR, 250, 0.25}, {LAMBDA_ACCELERATED, 250, 0.5}, {LAMBDA_ACCELERATED, 500, 1}, {LAMBDA_ACCELERATED, 900, 1},
    {LAMBDA_COSINE, 0, 0}, {LAMBDA_COSINE, 200, 0.5}, {LAMBDA_COSINE, 400, 1}, {LAMBDA_COSINE, 700, 1},
    {LAMBDA_EXPONENTIAL, 0, 0}, {LAMBDA_EXPONENTIAL, 500, 1 - 1.0 / 256}, {LAMBDA_SIGMOID, 0, 0}, {LAMBDA_SIGMOID, 500, 0.5},
    {LAMBDA_SIGMOID, 1000, 1}, {LAMBDA_STEP, 0, 0.25}, {LAMBDA_STEP, 250, 0.5}, {LAMBDA_STEP, 749, 0.75}, {LAMBDA_STEP, 750, 1},
    {LAMBDA_NONE, 0, 1}};
  for (size_t i = 0; i < ARRAY_LEN(lambdas); i++) {
    double got = lambda_at(lambdas[i].kind, lambdas[i].t, 1000, 400, 0);
    CHECK(fabs(got - lambdas[i].want) < 1e-12, "schedule %d: lambda(%d) = %.15g, wanted %.15g", lambdas[i].kind,
          (int)lambdas[i].t, got, lambdas[i].want);
  }
  CHECK(lambda_at(LAMBDA_WARMUP, 0, 1000, 0, 0) == 1, "no ramp");
  for (int kind = LAMBDA_WARMUP; kind <= LAMBDA_NONE; kind++) {
    for (int64_t t = 0; t < 1000; t++) {
      double a = lambda_at(kind, t, 1000, 400, 0), b = lambda_at(kind, t + 1, 1000, 400, 0);
      CHECK(a >= 0 && b >= a && b <= 1, "schedule %d leaves [0,1] or falls at %d: %g %g", kind, (int)t, a, b);
    }
  }

  // T = 110, W = 10: 100 updates after the warm-up.
  static const struct { int kind; int64_t t; double want; } rates[] = {
    {LR_COSINE, 0, 0.1}, {LR_COSINE, 9, 1}, {LR_COSINE, 10, 1}, {LR_COSINE, 60, 0.6}, {LR_COSINE, 110, 0.2},
    {LR_LINEAR, 60, 0.6}, {LR_LINEAR, 110, 0.2}, {LR_CONSTANT, 10, 1}, {LR_CONSTANT, 109, 1},
    {LR_WSD, 87, 1}, {LR_WSD, 88, 1}, {LR_WSD, 99, 0.6}, {LR_WSD, 110, 0.2},
    {LR_TWO_STAGE, 10, 1}, {LR_TWO_STAGE, 55, 0.5}, {LR_TWO_STAGE, 110, 0.2},
    {LR_FAQ, 10, 1}, {LR_FAQ, 35, 0.75}, {LR_FAQ, 60, 0.25}, {LR_FAQ, 110, 0}};
  Schedule s = {0, 110, 10, 1, 0.2, 0.5, 0.2, 0.1, 0.5};
  for (size_t i = 0; i < ARRAY_LEN(rates); i++) {
    s.kind = rates[i].kind;
    double got = lr_at(&s, rates[i].t);
    CHECK(fabs(got - rates[i].want) < 1e-12, "schedule %d: lr(%d) = %.15g, wanted %.15g", s.kind, (int)rates[i].t, got,
          rates[i].want);
  }
  CHECK(wd_at(&s, 0) == 0.1 && wd_at(&s, 54) == 0.1 && wd_at(&s, 55) == 0, "weight decay %g %g", wd_at(&s, 54), wd_at(&s, 55));
}

// What an integer gradient is: want (=) [R,K] from dy [R,N] times gamma [N], each row rounded at random with the numbers of `key`, and codes t [N,K].
static void rounded_gradient_(float *want, const float *dy, const float *gamma, const int8_t *t, size_t R, size_t N, size_t K, uint32_t key) {
  for (size_t r = 0; r < R; r++) {
    float top = 0;
    for (size_t n = 0; n < N; n++) top = fabsf(dy[r * N + n] * gamma[n]) > top ? fabsf(dy[r * N + n] * gamma[n]) : top;
    for (size_t c = 0; c < K; c++) {
      int32_t sum = 0;
      for (size_t n = 0; n < N && top > 0; n++)
        sum += noisy_code(dy[r * N + n] * gamma[n] * (127.0f / top), noise_at(key, (uint32_t)r, (uint32_t)n, (uint32_t)N)) * t[n * K + c];
      want[r * K + c] = (float)sum * (top / 127.0f);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Products of the CPU.

#ifdef BITNET_MATMUL_H

// Relative error of the fast exponential, and its ends.
static void test_exp_fast(void) {
  double worst = 0;
  for (int i = 0; i <= 400000; i++) {
    float x = -87.0f + (float)i * (175.0f / 400000.0f);
    if (x > 88.0f) x = 88.0f;
    worst = fmax(worst, fabs((double)exp_fast(x) / exp((double)x) - 1));
  }
  CHECK(worst < 2e-7, "relative error %.3g", worst);
  CHECK(exp_fast(0) == 1, "e^0 = %.9g", (double)exp_fast(0));
  CHECK(exp_fast(-INFINITY) > 0 && exp_fast(-INFINITY) < 1.7e-38f && exp_fast(-1e30f) == exp_fast(-87), "lower end %g",
        (double)exp_fast(-INFINITY));
  CHECK(exp_fast(INFINITY) == exp_fast(88) && isfinite(exp_fast(88)), "upper end %g", (double)exp_fast(INFINITY));
  CHECK(isnan(exp_fast(NAN)), "NaN became %g", (double)exp_fast(NAN));
}

static const int product_shapes_[][3] = {   // M, N, K
  {1, 1, 1}, {1, 16, 4}, {2, 17, 3}, {3, 5, 5}, {5, 33, 7}, {6, 64, 8}, {7, 65, 9}, {12, 32, 256}, {13, 31, 257}, {6, 128, 63},
  {25, 70, 64}, {97, 47, 513}, {1, 83, 300}, {40, 2100, 5}, {64, 33, 64}, {35, 65, 130}, {32, 32, 1100}};

// int8 x ternary: exact sums, then scales, bias and residual; against plain loops.
static void test_gemm_i8(void) {
  for (size_t shape = 0; shape < ARRAY_LEN(product_shapes_); shape++) {
    size_t M = (size_t)product_shapes_[shape][0], N = (size_t)product_shapes_[shape][1], K = (size_t)product_shapes_[shape][2];
    // The last activation ends where its memory ends, so that the sanitizer sees a read beyond it.
    int8_t *q = (int8_t *)host_memory_(M * K), *t = (int8_t *)host_memory_(N * K);
    for (size_t i = 0; i < M * K; i++) q[i] = (int8_t)(test_below_(256) - 128);
    for (size_t i = 0; i < N * K; i++) t[i] = (int8_t)(test_below_(3) - 1);
    if (shape == 7) {   // the largest possible sums
      memset(q, -128, M * K);
      memset(t, 1, N * K);
    }
    uint8_t *panels = (uint8_t *)dev_memory_(ternary_panel_bytes(N, K));
    ternary_pack_panels(panels, t, N, K);
    float *s = normals_(M, 1, 0.2), *gamma = normals_(N, 1, 0.2), *bias = normals_(N, 0, 100), *residual = normals_(M * N, 0, 100);
    float *out = host_floats_(M * N + 1), *want = host_floats_(M * N);
    int32_t *sums = (int32_t *)host_memory_(M * N * sizeof(int32_t));
    for (int with = 0; with < 5; with++) {   // bit 0: bias, bit 1: residual; 0 with the exact sums, 4 without
      for (size_t i = 0; i <= M * N; i++) out[i] = 12345;
      gemm_i8(out, with == 0 ? sums : NULL, q, s, panels, gamma, with & 1 ? bias : NULL, with & 2 ? residual : NULL, M, N, K);
      for (size_t m = 0; m < M; m++) {
        for (size_t n = 0; n < N; n++) {
          int sum = 0;
          for (size_t k = 0; k < K; k++) sum += (int)q[m * K + k] * t[n * K + k];
          CHECK(sums[m * N + n] == sum, "[%zu,%zu,%zu]: sum at %zu,%zu is %d, wanted %d", M, N, K, m, n, sums[m * N + n], sum);
          double y = (double)sum * (double)s[m] * (double)gamma[n];
          if (with & 1) y += (double)bias[n];
          if (with & 2) y += (double)residual[m * N + n];
          want[m * N + n] = (float)y;
        }
      }
      char name[64];
      snprintf(name, sizeof name, "[%zu,%zu,%zu] with %d", M, N, K, with);
      CHECK_CLOSE(name, out, want, M * N, 3e-7);
      CHECK(out[M * N] == 12345, "%s: wrote beyond its end", name);
    }
    end_test_();
  }
}

// Sizes at which results pass the caches by, with whole groups of four and without, and at which panels are too many for a core's: whole
// numbers, so every result is exact.
static void test_gemm_i8_large(void) {
  static const size_t shapes[][3] = {{2112, 1664, 65}, {2112, 1664, 64}, {70, 1650, 1000}};
  for (size_t shape = 0; shape < ARRAY_LEN(shapes); shape++) {
    size_t M = shapes[shape][0], N = shapes[shape][1], K = shapes[shape][2], wrong[2] = {0, 0};
    int8_t *q = (int8_t *)host_memory_(M * K), *t = (int8_t *)host_memory_(N * K);
    for (size_t i = 0; i < M * K; i++) q[i] = (int8_t)(test_below_(256) - 128);
    for (size_t i = 0; i < N * K; i++) t[i] = (int8_t)(test_below_(3) - 1);
    uint8_t *panels = (uint8_t *)dev_memory_(ternary_panel_bytes(N, K));
    ternary_pack_panels(panels, t, N, K);
    float *ones = host_floats_(M > N ? M : N), *residual = host_floats_(M * N);
    float *out[2] = {dev_floats_(NULL, M * N), dev_floats_(NULL, M * N)};
    for (size_t i = 0; i < M || i < N; i++) ones[i] = 1;
    for (size_t i = 0; i < M * N; i++) residual[i] = (float)(test_below_(2001) - 1000);
    for (int with = 0; with < 2; with++) gemm_i8(out[with], NULL, q, ones, panels, ones, NULL, with ? residual : NULL, M, N, K);
    for (size_t m = 0; m < M; m++) {
      for (size_t n = 0; n < N; n++) {
        int sum = 0;
        for (size_t k = 0; k < K; k++) sum += (int)q[m * K + k] * t[n * K + k];
        wrong[0] += out[0][m * N + n] != (float)sum;
        wrong[1] += out[1][m * N + n] != (float)sum + residual[m * N + n];
      }
    }
    CHECK(wrong[0] == 0 && wrong[1] == 0, "[%zu,%zu,%zu]: %zu wrong, with a residual %zu", M, N, K, wrong[0], wrong[1]);
    end_test_();
  }
}

// A gradient so wide that the room for codes holds a few rows only: every row as its definition says, for any number of threads.
static void test_gemm_i8_rounded(void) {
  enum { M = 70, N = 40000, K = 4 };
  float *dy = normals_((size_t)M * N, 0, 1), *gamma = host_floats_(N), *want = host_floats_(M * K), *got = host_floats_(M * K);
  int8_t *t = (int8_t *)host_memory_((size_t)N * K);
  uint8_t *panels = (uint8_t *)dev_memory_(ternary_panel_bytes(K, N));
  for (size_t n = 0; n < N; n++) gamma[n] = n % 2 ? 0.5f : 1.0f;
  for (size_t i = 0; i < (size_t)N * K; i++) t[i] = (int8_t)(test_below_(3) - 1);
  ternary_pack_transposed(panels, t, N, K);
  rounded_gradient_(want, dy, gamma, t, M, N, K, 5);
  for (int threads = 1; threads <= 3; threads++) {
    set_threads_(threads);
    memset(got, 0, M * K * sizeof(float));
    gemm_i8_rounded(got, dy, gamma, panels, M, N, K, 5, dev_memory_(gemm_i8_rounded_bytes(N, K)));
    CHECK_CLOSE("dx of wide rows", got, want, M * K, 1e-6);
  }
  set_threads_(0);
  end_test_();
}

// Rows rounded at random by this machine's code against its twin in plain C: codes, their sum and the scale, to the last bit.
static void test_round_row_twin(void) {
  for (size_t N = 1; N <= 700; N += N < 40 ? 1 : 37) {
    for (int form = 0; form < 4; form++) {   // ordinary numbers; zeros; one that is not a number; an infinite one
      float *dy = normals_(N, 0, form == 1 ? 0 : 1e-3), *gamma = normals_(N, 1, 0.2);
      int8_t *a = (int8_t *)host_memory_(N + 1), *b = (int8_t *)host_memory_(N + 1);
      int32_t sum_a, sum_b;
      a[N] = b[N] = 77;
      if (form >= 2) dy[N / 2] = form == 2 ? NAN : INFINITY;
      float scale_a = round_row(a, &sum_a, dy, gamma, N, 12345, 6), scale_b = round_row_scalar(b, &sum_b, dy, gamma, N, 12345, 6);
      if (form >= 2) {   // the scale alone says it
        CHECK(scale_a != scale_a && scale_b != scale_b, "N = %zu, form %d: scales %g, %g", N, form, (double)scale_a, (double)scale_b);
      } else {
        CHECK(same_bits_(a, b, N) && sum_a == sum_b, "N = %zu, form %d: sums %d, %d", N, form, sum_a, sum_b);
        CHECK(same_bits_(&scale_a, &scale_b, sizeof scale_a), "N = %zu, form %d: scales %g, %g", N, form, (double)scale_a, (double)scale_b);
      }
      CHECK(a[N] == 77 && b[N] == 77, "N = %zu: wrote beyond its end", N);
    }
    end_test_();
  }
}

// The kernel of this machine against its twin in plain C, in both forms in which gemm_i8 calls it.
static void test_gemm_i8_twin(void) {
  for (size_t K = 1; K <= 1200; K += K < 20 ? 1 : K < 200 ? 11 : 126) {
    size_t N = 4 * I8_WIDTH - 3;
    int8_t *q = (int8_t *)host_memory_(I8_ROWS * K), *t = (int8_t *)host_memory_(N * K);
    for (size_t i = 0; i < I8_ROWS * K; i++) q[i] = (int8_t)(test_below_(256) - 128);
    for (size_t i = 0; i < N * K; i++) t[i] = (int8_t)(test_below_(3) - 1);
    memset(q, -128, K);   // row 0 with the first output: the largest sums, in 16 bits as well
    memset(q + K, 127, K);
    memset(t, 1, K);
    uint8_t *panels = (uint8_t *)dev_memory_(ternary_panel_bytes(N, K));
    ternary_pack_panels(panels, t, N, K);
    int32_t a[I8_ROWS * 4 * I8_WIDTH], b[I8_ROWS * 4 * I8_WIDTH];
    tile_i8(a, q, panels, K, I8_ROWS, 4);
    tile_i8_scalar(b, q, panels, K, I8_ROWS, 4);
    CHECK(same_bits_(a, b, sizeof a), "6 x 4 panels, K = %zu", K);
    for (size_t i = 0; i < I8_ROWS; i++) {
      for (size_t j = 0; j < 4; j++) {
        tile_i8(a, q + i * K, panels + j * ternary_groups(K) * I8_WIDTH * 4, K, 1, 1);
        CHECK(same_bits_(a, b + (i * 4 + j) * I8_WIDTH, I8_WIDTH * sizeof(int32_t)), "row %zu, panel %zu, K = %zu", i, j, K);
      }
    }
#ifdef BITNET_AMX
    if (amx_ready()) {   // 32 rows against two panels
      int8_t *rows = (int8_t *)host_memory_(32 * K);
      int32_t fast[32 * 2 * I8_WIDTH], plain[32 * 2 * I8_WIDTH];
      for (size_t i = 0; i < 32 * K; i++) rows[i] = (int8_t)(test_below_(256) - 128);
      amx_begin();
      tile_i8_amx(fast, rows, panels, K);
      amx_end();
      tile_i8_scalar(plain, rows, panels, K, 32, 2);
      CHECK(same_bits_(fast, plain, sizeof fast), "AMX, K = %zu", K);
    }
#endif
    end_test_();
  }
}

/*
gemm in every form: A and B with contiguous rows, contiguous columns, or neither; B as floats or codes; scale, bias, residual,
accumulation; both precisions. Gaps between rows hold NaN, so reading one is seen.
*/
static void check_gemm_(const int *shape, int form) {
  size_t M = (size_t)shape[0], N = (size_t)shape[1], K = (size_t)shape[2];
  int a_form = form % 3, b_form = form / 3 % 3, codes = form / 9 % 2, precision = form / 18 % 2;
  int scaled = test_below_(2), bias = test_below_(2), residual = test_below_(2), accumulate = test_below_(2);
  Product g;
  memset(&g, 0, sizeof g);
  g.M = M, g.N = N, g.K = K;
  g.a_row = a_form == 0 ? K + 3 : a_form == 1 ? 1 : 2 * K + 1;
  g.a_col = a_form == 0 ? 1 : a_form == 1 ? M + 2 : 2;
  g.b_row = b_form == 0 ? N + 5 : b_form == 1 ? 1 : 2;
  g.b_col = b_form == 0 ? 1 : b_form == 1 ? K + 1 : 2 * K + 1;
  size_t a_size = (M - 1) * g.a_row + (K - 1) * g.a_col + 1, b_size = (K - 1) * g.b_row + (N - 1) * g.b_col + 1;
  float *A = host_floats_(a_size), *B = host_floats_(b_size), *C = host_floats_(M * N + 1), *want = host_floats_(M * N);
  int8_t *Q = (int8_t *)host_memory_(b_size);
  float *a = normals_(M * K, 0, 1), *b = normals_(K * N, 0, 1), *s = normals_(K, 1, 0.3), *old = normals_(M * N, 0, 3);
  for (size_t i = 0; i < a_size; i++) A[i] = NAN;
  for (size_t i = 0; i < b_size; i++) B[i] = NAN;
  for (size_t i = 0; i < M; i++) {
    for (size_t p = 0; p < K; p++) A[i * g.a_row + p * g.a_col] = a[i * K + p];
  }
  for (size_t p = 0; p < K; p++) {
    for (size_t j = 0; j < N; j++) {
      int8_t code = (int8_t)(test_below_(256) - 128);
      B[p * g.b_row + j * g.b_col] = b[p * N + j];
      Q[p * g.b_row + j * g.b_col] = code;
      if (codes) b[p * N + j] = code;
    }
  }
  g.A = A;
  if (scaled) g.a_scale = s;
  if (codes) g.B_codes = Q;
  else g.B = B;
  g.C = C;
  g.accumulate = accumulate;
  if (bias) g.bias = normals_(N, 0, 3);
  if (residual) g.residual = normals_(M * N, 0, 3);
  g.precision = precision;
  double *row = (double *)host_memory_(N * sizeof(double));
  for (size_t i = 0; i < M; i++) {
    for (size_t j = 0; j < N; j++) {
      row[j] = accumulate ? (double)old[i * N + j] : 0;
      if (bias) row[j] += (double)g.bias[j];
      if (residual) row[j] += (double)g.residual[i * N + j];
    }
    for (size_t p = 0; p < K; p++) {
      double x = operand_(scaled ? a[i * K + p] * s[p] : a[i * K + p], precision);
      for (size_t j = 0; j < N; j++) row[j] += x * operand_(b[p * N + j], precision);
    }
    for (size_t j = 0; j < N; j++) want[i * N + j] = (float)row[j];
  }
  // By the kernel that this machine would take, by the plain one, and by the one that machines without AMX take.
  const Kernel *kernels[3] = {gemm_kernel(&g), &kernel_f32, &kernel_f32};
#ifdef BITNET_BF16
  if (kernels[0] != &kernel_f32) kernels[2] = &kernel_bf16;
#endif
  void *scratch = dev_memory_(gemm_scratch_bytes(M, N, K));
  for (int k = 0; k < 3; k++) {
    char name[160];
    snprintf(name, sizeof name, "[%zu,%zu,%zu] A %d B %d codes %d precision %d scale %d bias %d residual %d accumulate %d kernel %d",
             M, N, K, a_form, b_form, codes, precision, scaled, bias, residual, accumulate, k);
    for (size_t i = 0; i < M * N; i++) C[i] = accumulate ? old[i] : NAN;
    C[M * N] = 12345;
    gemm_by(kernels[k], &g, scratch);
    // A rounding for each addition to a sum that itself grows like sqrt(K): their sum grows like K, relative to the sum like sqrt(K).
    CHECK_CLOSE(name, C, want, M * N, 5e-7 + 5e-8 * sqrt((double)K));
    CHECK(C[M * N] == 12345, "%s: wrote beyond its end", name);
  }
}

static void test_gemm_float(void) {
  for (size_t shape = 0; shape < ARRAY_LEN(product_shapes_); shape++) {
    for (int form = 0; form < 36; form++) {
      uint64_t draws = test_draws_;
      check_gemm_(product_shapes_[shape], form);
      end_test_();
      test_draws_ = draws + 1000003;   // other numbers and other additions in the next form
    }
  }
  end_test_();
}

/*
gemm where it is cut everywhere: several blocks of rows, of k, groups of columns; one to four threads, above and beside each other. Small
integers, so that sums are exact: every thread count and either precision has to find the same.
*/
static void test_gemm_large(void) {
  static const size_t shapes[][3] = {{2301, 230, 1100}, {230, 2301, 1100}, {1100, 1101, 70}};
  for (size_t shape = 0; shape < ARRAY_LEN(shapes); shape++) {
    size_t M = shapes[shape][0], N = shapes[shape][1], K = shapes[shape][2];
    float *a = host_floats_(M * K), *C = host_floats_(M * N), *bias = host_floats_(N), *old = host_floats_(M * N);
    int8_t *b = (int8_t *)host_memory_(K * N);
    int *want = (int *)host_memory_(M * N * sizeof(int));
    for (size_t i = 0; i < M * K; i++) a[i] = (float)(test_below_(17) - 8);
    for (size_t i = 0; i < K * N; i++) b[i] = (int8_t)(test_below_(17) - 8);
    for (size_t i = 0; i < N; i++) bias[i] = (float)(test_below_(201) - 100);
    for (size_t i = 0; i < M * N; i++) old[i] = (float)(test_below_(201) - 100);
    int along = shape < 2;   // a column of A lies along memory, or a row
    for (size_t i = 0; i < M; i++) {
      int *row = want + i * N;
      for (size_t j = 0; j < N; j++) row[j] = (int)bias[j] + (int)old[i * N + j];
      for (size_t p = 0; p < K; p++) {
        int x = (int)(along ? a[p * M + i] : a[i * K + p]);
        for (size_t j = 0; j < N; j++) row[j] += x * b[p * N + j];
      }
    }
    for (int threads = 1; threads <= 4; threads++) {
      for (int precision = 0; precision < 2; precision++) {
        set_threads_(threads);
        Product g;
        memset(&g, 0, sizeof g);
        g.M = M, g.N = N, g.K = K, g.A = a, g.B_codes = b, g.b_row = N, g.b_col = 1, g.C = C, g.bias = bias;
        g.a_row = along ? 1 : K, g.a_col = along ? M : 1;
        g.precision = precision, g.accumulate = threads % 2;
        if (!g.accumulate) g.residual = old;   // either way it is part of the sum
        for (size_t i = 0; i < M * N; i++) C[i] = g.accumulate ? old[i] : NAN;
        gemm(&g, dev_memory_(gemm_scratch_bytes(M, N, K)));
        size_t wrong = 0;
        for (size_t i = 0; i < M * N; i++) wrong += C[i] != (float)want[i];
        CHECK(wrong == 0, "[%zu,%zu,%zu] %d threads, precision %d: %zu wrong", M, N, K, threads, precision, wrong);
      }
    }
    end_test_();
  }
  set_threads_(0);
}

/*
Attention's products: every kernel, either operand lying either way, a left operand that was packed with more columns than are
used; values against double. Every row and column has the bits that it has alone, and one element put into a packed operand is as
good as the whole of it.
*/
static void test_block_product(void) {
  // M, N, K
  static const int shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {64, 32, 48}, {5, 33, 64}, {9, 20, 10}, {33, 13, 32}, {6, 64, 33}};
  const Kernel *kernels[3] = {fastest_kernel(PRECISION_BF16), &kernel_f32, &kernel_f32};
#ifdef BITNET_BF16
  kernels[2] = &kernel_bf16;
#endif
  for (size_t shape = 0; shape < ARRAY_LEN(shapes); shape++) {
    for (int form = 0; form < 24; form++) {   // kernel, then bit 0: left transposed, bit 1: right transposed, bit 2: added to c
      const Kernel *k = kernels[form / 8];
      int precision = k == &kernel_f32 ? form / 8 - 1 : PRECISION_BF16;
      size_t M = (size_t)shapes[shape][0], N = (size_t)shapes[shape][1], K = (size_t)shapes[shape][2];
      size_t more = K + 32 * (size_t)(form % 2);
      size_t rows = padded_to(M, k->mr), ldc = padded_to(N, k->nr);
      float *a = normals_(M * more, 0, 1), *b = normals_(K * N, 0, 1), *old = normals_(rows * ldc, 0, 1);
      float *c = host_floats_(rows * ldc);
      float *want = host_floats_(M * N), *got = host_floats_(M * N), *alone = host_floats_(k->mr * ldc);
      size_t a_row = form & 1 ? 1 : more, a_col = form & 1 ? M : 1, b_row = form & 2 ? 1 : N, b_col = form & 2 ? K : 1;
      void *left = dev_memory_(left_bytes(k, M, more)), *put = dev_memory_(left_bytes(k, M, more));
      void *right = dev_memory_(right_bytes(k, K, N));
      void *one = dev_memory_(left_bytes(k, 1, more));
      kernel_begin(k);
      pack_left(k, left, a, a_row, a_col, M, more, precision);
      pack_right(k, right, b, b_row, b_col, K, N, precision);
      for (size_t i = 0; i < M; i++) {
        for (size_t p = 0; p < more; p++) left_put(k, put, more, i, p, a[i * a_row + p * a_col], precision);
      }
      CHECK(same_bits_(left, put, left_bytes(k, M, more)), "[%zu,%zu,%zu] form %d: one by one", M, N, K, form);
      memcpy(c, old, rows * ldc * sizeof(float));
      block_product(k, c, ldc, form & 4, left, right, M, N, K, more);
      for (size_t i = 0; i < M; i++) {
        memcpy(alone, old + i * ldc, ldc * sizeof(float));
        pack_left(k, one, a + i * a_row, a_row, a_col, 1, more, precision);
        block_product(k, alone, ldc, form & 4, one, right, 1, N, K, more);
        for (size_t j = 0; j < N; j++) {
          double sum = form & 4 ? (double)old[i * ldc + j] : 0;
          for (size_t p = 0; p < K; p++) {
            double x = (double)a[i * a_row + p * a_col], y = (double)b[p * b_row + j * b_col];
            sum += precision == PRECISION_BF16 ? nearest_bf16_(x) * nearest_bf16_(y) : x * y;
          }
          want[i * N + j] = (float)sum;
          got[i * N + j] = c[i * ldc + j];
        }
        CHECK(same_bits_(alone, c + i * ldc, N * sizeof(float)), "[%zu,%zu,%zu] form %d: row %zu alone", M, N, K, form, i);
      }
      kernel_end(k);
      CHECK_CLOSE("values", got, want, M * N, 1e-6);
      end_test_();
    }
  }
}

#endif

// ---------------------------------------------------------------------------------------------------------
// BitLinear against its definition in double.

/*
dx_int8: dx is the exact product of the weights with codes that the scalar formulas give; another key gives other codes; the mean over
many keys is the exact gradient; dw is untouched; a NaN is seen.
*/
static void test_dx_int8(void) {
  enum { R = 37, N = 45, K = 70, KEYS_ = 400 };
  reserve_scratch_();
  float *x = normals_(R * K, 0, 1), *dy = normals_(R * N, 0, 1), *mean = host_floats_(R * K), *want = host_floats_(R * K);
  for (int n = 0; n < N; n++) dy[5 * N + n] = 0;   // a row without gradient
  float *master = dev_floats_(normals_(N * K, 0, 0.4), N * K);
  BitWeight exact = new_weight_(master, NULL, 20, 25, 0, K, 1, PRECISION_FP32), w = exact;
  w.data = dev_memory_(bitweight_bytes(N, K));
  w.gamma = dev_floats_(NULL, N);
  w.dx_int8 = 1;
  weight_quantize(&w, master, 1);
  QAct q = new_qact_(8, 1, R, K);
  floatX *dev_dy = dev_acts_(dy, R * N), *dx = dev_acts_(NULL, R * K);
  float *dw = dev_floats_(NULL, N * K), *dw_exact = dev_floats_(NULL, N * K), *first = NULL;
  act_quant_forward(&q, dev_acts_(x, R * K), R, K);
  bitlinear_backward(dx, dw_exact, NULL, dev_dy, &q, &exact, R);
  float *dx_exact = read_acts_(dx, R * K), *gamma = read_floats_(w.gamma, N);
  int8_t *t = weight_codes_(&w);
  for (int k = 0; k < KEYS_; k++) {
    w.noise = 77 + (uint64_t)k;
    dev_zero(dw, N * K * sizeof(float));
    bitlinear_backward(dx, dw, NULL, dev_dy, &q, &w, R);
    float *got = read_acts_(dx, R * K);
    if (k == 0) {
      rounded_gradient_(want, dy, gamma, t, R, N, K, 77);
      CHECK_CLOSE("dx from the codes", got, want, R * K, 1e-6);
      first = got;
    }
    if (k == 1) CHECK(!same_bits_(got, first, R * K * sizeof(float)), "another key gives the same gradient");
    CHECK(same_bits_(read_floats_(dw, N * K), read_floats_(dw_exact, N * K), N * K * sizeof(float)), "dw depends on dx_int8");
    for (size_t i = 0; i < R * K; i++) mean[i] += got[i] / KEYS_;
  }
  // A code is off by at most 1 of 127: 0.3 % of dx, a twentieth of it on average.
  CHECK_CLOSE("mean of dx", mean, dx_exact, R * K, 2e-3);
#ifdef BITNET_MATMUL_H
  for (int threads = 1; threads <= 3; threads++) {
    set_threads_(threads);
    w.noise = 77;
    bitlinear_backward(dx, dw, NULL, dev_dy, &q, &w, R);
    CHECK(same_bits_(read_acts_(dx, R * K), first, R * K * sizeof(float)), "%d threads", threads);
  }
  set_threads_(0);
#endif
  dy[7] = NAN;
  bitlinear_backward(dx, dw, NULL, dev_acts_(dy, R * N), &q, &w, R);
  float *bad = read_acts_(dx, R * K);
  CHECK(isnan(bad[0]) && isfinite(bad[K]), "a NaN in row 0 gives %g there and %g in row 1", (double)bad[0], (double)bad[K]);
  end_test_();
}

static void test_packed_vs_fake(void) {
  enum { R = 11, N = 37, K = 301 };
  reserve_scratch_();
  float *master = normals_((size_t)N * K, 0, 0.4), *bias = normals_(N, 0, 3);
  float *x = normals_((size_t)R * K, 0, 2), *dy = normals_((size_t)R * N, 0, 1);
  float *residual = normals_((size_t)R * N, 0, 3), *dw_old = normals_((size_t)N * K, 0, 1), *db_old = normals_(N, 0, 1);
  floatX *dev_x = dev_acts_(x, (size_t)R * K), *dev_dy = dev_acts_(dy, (size_t)R * N);
  floatX *dev_residual = dev_acts_(residual, (size_t)R * N);
  static const struct { int bits; float lambda; int precision; } forms[] = {
    {8, 1, PRECISION_FP32}, {4, 1, PRECISION_FP32}, {8, 1, PRECISION_BF16}, {0, 1, PRECISION_FP32}, {0, 1, PRECISION_BF16},
    {8, 0.3f, PRECISION_FP32}, {8, 0.3f, PRECISION_BF16}, {0, 0, PRECISION_FP32}};
  for (size_t form = 0; form < ARRAY_LEN(forms); form++) {
    float lambda = forms[form].lambda;
    int bits = forms[form].bits, precision = forms[form].precision, codes = lambda == 1 && bits > 0, ternary = lambda == 1;
    QAct q = new_qact_(bits, lambda, R, K);
    BitWeight w = new_weight_(dev_floats_(master, (size_t)N * K), dev_floats_(bias, N), 20, 10, 7, K, lambda, precision);
    floatX *y = dev_acts_(NULL, (size_t)R * N), *dx = dev_acts_(NULL, (size_t)R * K);
    float *dw = dev_floats_(dw_old, (size_t)N * K), *db = dev_floats_(db_old, N);
    act_quant_forward(&q, dev_x, R, K);
    bitlinear_forward(y, &q, &w, dev_residual, R);
    bitlinear_backward(dx, dw, db, dev_dy, &q, &w, R);
    // The operands that the products are made of: values, or codes with their scales.
    float *s = read_floats_(q.s, R), *gamma = read_floats_(w.gamma, N);
    float *xv = codes ? floats_of_(read_codes_(q.data, (size_t)R * K), (size_t)R * K)
                      : read_acts_((const floatX *)q.data, (size_t)R * K);
    float *wv = ternary ? floats_of_(weight_codes_(&w), (size_t)N * K) : effective_weights_(&w);
    float *want_y = host_floats_((size_t)R * N), *want_dx = host_floats_((size_t)R * K);
    float *want_dw = host_floats_((size_t)N * K), *want_db = host_floats_(N);
    for (int r = 0; r < R; r++) {
      for (int n = 0; n < N; n++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += operand_(xv[r * K + k], precision) * operand_(wv[n * K + k], precision);
        if (codes) sum *= (double)s[r];
        if (ternary) sum *= (double)gamma[n];
        want_y[r * N + n] = (float)(sum + (double)bias[n] + (double)residual[r * N + n]);
      }
      for (int k = 0; k < K; k++) {   // the scale belongs to dy, which is rounded together with it
        double sum = 0;
        for (int n = 0; n < N; n++) {
          float scaled = ternary ? dy[r * N + n] * gamma[n] : dy[r * N + n];
          sum += operand_(scaled, precision) * operand_(wv[n * K + k], precision);
        }
        want_dx[r * K + k] = (float)sum;
      }
    }
    for (int n = 0; n < N; n++) {
      double db_sum = db_old[n];
      for (int r = 0; r < R; r++) db_sum += (double)dy[r * N + n];
      want_db[n] = (float)db_sum;
      for (int k = 0; k < K; k++) {
        double sum = dw_old[n * K + k];
        for (int r = 0; r < R; r++) {
          float scaled = codes ? dy[r * N + n] * s[r] : dy[r * N + n];
          sum += operand_(scaled, precision) * operand_(xv[r * K + k], precision);
        }
        want_dw[n * K + k] = (float)sum;
      }
    }
    char name[96];
    snprintf(name, sizeof name, "bits %d, lambda %g, precision %d: ", bits, (double)lambda, precision);
    size_t end = strlen(name);
    strcpy(name + end, "y");
    CHECK_CLOSE(name, read_acts_(y, (size_t)R * N), want_y, (size_t)R * N, 1e-6);
    // The CPU multiplies the scales into dy before it is rounded to bf16, as above; another backend may do it after.
#ifdef BITNET_MATMUL_H
    double bound = 1e-6;
#else
    double bound = precision == PRECISION_BF16 ? 6e-3 : 1e-6;
#endif
    strcpy(name + end, "dx");
    CHECK_CLOSE(name, read_acts_(dx, (size_t)R * K), want_dx, (size_t)R * K, bound);
    strcpy(name + end, "dw");
    CHECK_CLOSE(name, read_floats_(dw, (size_t)N * K), want_dw, (size_t)N * K, bound);
    strcpy(name + end, "dbias");
    CHECK_CLOSE(name, read_floats_(db, N), want_db, N, 1e-6);
  }

  // The integer path against floats that are almost wholly quantised (the last float below 1).
  QAct q = new_qact_(8, 1, R, K), fake = new_qact_(8, 0.99999994f, R, K);
  BitWeight w = new_weight_(dev_floats_(master, (size_t)N * K), NULL, 20, 10, 7, K, 1, PRECISION_FP32);
  BitWeight fw = new_weight_(dev_floats_(master, (size_t)N * K), NULL, 20, 10, 7, K, 0.99999994f, PRECISION_FP32);
  floatX *y = dev_acts_(NULL, (size_t)R * N), *fy = dev_acts_(NULL, (size_t)R * N);
  act_quant_forward(&q, dev_x, R, K);
  act_quant_forward(&fake, dev_x, R, K);
  bitlinear_forward(y, &q, &w, NULL, R);
  bitlinear_forward(fy, &fake, &fw, NULL, R);
  CHECK_CLOSE("packed against fake", read_acts_(y, (size_t)R * N), read_acts_(fy, (size_t)R * N), (size_t)R * N, 1e-6);
  end_test_();
}

// ---------------------------------------------------------------------------------------------------------
// Loss, attention, optimizer: plain loops in double.

static void test_cross_entropy(void) {
  enum { R = 6, V = 83 };
  int targets[R] = {0, V - 1, -1, 40, 7, 7};
  float *logits = normals_((size_t)R * V, 0, 3), *coef = normals_(R, 0, 1);
  for (int v = 0; v < V; v++) logits[4 * V + v] = 1e4f - 1e3f * (float)(v % 5);   // nothing may overflow
  logits[4 * V + 7] = 1.2e4f;
  floatX *z = dev_acts_(logits, (size_t)R * V);
  float *losses = dev_floats_(NULL, R), *lse = dev_floats_(NULL, R);
  float *want = host_floats_(R), *want_dz = host_floats_((size_t)R * V);
  int *dev_targets = dev_ints_(targets, R);
  cross_entropy_forward(losses, lse, z, dev_targets, R, V);
  cross_entropy_backward(z, lse, dev_targets, dev_floats_(coef, R), R, V);
  for (int r = 0; r < R; r++) {
    double top = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) top = (double)logits[r * V + v] > top ? (double)logits[r * V + v] : top;   // gcc 12 breaks at fmax here
    for (int v = 0; v < V; v++) sum += exp((double)logits[r * V + v] - top);
    if (targets[r] < 0) continue;   // loss and gradient 0
    want[r] = (float)(top + log(sum) - (double)logits[r * V + targets[r]]);
    for (int v = 0; v < V; v++) {
      double p = exp((double)logits[r * V + v] - top) / sum;
      want_dz[r * V + v] = (float)((double)coef[r] * (p - (v == targets[r])));
    }
  }
  CHECK_CLOSE("losses", read_floats_(losses, R), want, R, 1e-6);
  CHECK_CLOSE("dlogits", read_acts_(z, (size_t)R * V), want_dz, (size_t)R * V, 1e-6);
  CHECK(read_floats_(losses, R)[2] == 0, "loss of an ignored target");
  for (int v = 0; v < V; v++) CHECK(read_acts_(z, (size_t)R * V)[2 * V + v] == 0, "gradient of an ignored target");
  logits[3 * V + 5] = NAN;
  dev_floatx_in(z, logits, (size_t)R * V);
  cross_entropy_forward(losses, lse, z, dev_targets, R, V);
  CHECK(isnan(read_floats_(losses, R)[3]) && isfinite(read_floats_(losses, R)[1]), "a logit that is NaN");
  end_test_();
}

// Documents of random lengths: start [B,T] and the position inside the document pos [B,T], on the host.
static void random_documents_(int *start, int *pos, int B, int T) {
  for (int b = 0; b < B; b++) {
    for (int t = 0, first = 0; t < T; t++) {
      if (t > 0 && test_below_(9) == 0) first = t;
      start[b * T + t] = first;
      pos[b * T + t] = t - first;
    }
  }
}

// Scores, softmax and weighted sum as the formula says; long enough for several blocks of keys; grouped heads; documents.
static void test_attention(void) {
  enum { B = 2, T = 150, NH = 6, NKV = 2, HS = 10, QKV = (NH + 2 * NKV) * HS };
  float *qkv = normals_((size_t)B * T * QKV, 0, 1.5);
  float *want = host_floats_((size_t)B * T * NH * HS), *want_lse = host_floats_((size_t)B * T * NH);
  int *start = (int *)host_memory_(B * T * sizeof(int)), *pos = (int *)host_memory_(B * T * sizeof(int));
  reserve_scratch_();
  random_documents_(start + T, pos + T, 1, T);   // the first row of the batch is one document
  floatX *out = dev_acts_(NULL, (size_t)B * T * NH * HS);
  float *lse = dev_floats_(NULL, (size_t)B * T * NH);
  attention_forward(out, lse, dev_acts_(qkv, (size_t)B * T * QKV), dev_ints_(start, B * T), B, T, NH, NKV, HS, PRECISION_FP32);
  for (int bt = 0; bt < B * T; bt++) {
    for (int h = 0; h < NH; h++) {
      double p[T], sum = 0;
      const float *q = qkv + bt * QKV + h * HS;
      int n = bt % T - start[bt] + 1, kvh = h / (NH / NKV);
      for (int j = 0; j < n; j++) {
        const float *k = qkv + (bt - n + 1 + j) * QKV + (NH + kvh) * HS;
        p[j] = 0;
        for (int i = 0; i < HS; i++) p[j] += (double)q[i] * (double)k[i] / sqrt((double)HS);
        p[j] = exp(p[j]);
        sum += p[j];
      }
      want_lse[bt * NH + h] = (float)log(sum);
      for (int i = 0; i < HS; i++) {
        double o = 0;
        for (int j = 0; j < n; j++) o += p[j] / sum * (double)qkv[(bt - n + 1 + j) * QKV + (NH + NKV + kvh) * HS + i];
        want[(bt * NH + h) * HS + i] = (float)o;
      }
    }
  }
  CHECK_CLOSE("out", read_acts_(out, (size_t)B * T * NH * HS), want, (size_t)B * T * NH * HS, 1e-6);
  CHECK_CLOSE("lse", read_floats_(lse, (size_t)B * T * NH), want_lse, (size_t)B * T * NH, 1e-6);
  end_test_();
}

static void test_adamw(void) {
  enum { N = 1003, STEPS = 5 };
  const float lr = 1e-2f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, wd = 0.1f, gscale = 0.25f;
  float *p0 = normals_(N, 0, 1), *want = host_floats_(N), *g = host_floats_(N);
  float *p = dev_floats_(p0, N), *m = dev_floats_(NULL, N), *v = dev_floats_(NULL, N), *dev_g = dev_floats_(NULL, N);
  double *dp = (double *)host_memory_(3 * N * sizeof(double)), *dm = dp + N, *dv = dm + N;
  for (int i = 0; i < N; i++) dp[i] = p0[i];
  for (int t = 1; t <= STEPS; t++) {
    for (int i = 0; i < N; i++) {   // of very different sizes, and 0
      double size = i % 17 == 0 ? 0 : pow(10, i % 7 - 3);
      g[i] = (float)(size * rng_normal(5, RNG_TEST, (uint64_t)(t * N + i)));
    }
    dev_copy_in(dev_g, g, N * sizeof(float));
    adamw_update(p, m, v, dev_g, N, NULL, 0, gscale, lr, beta1, beta2, eps, wd, t);
    for (int i = 0; i < N; i++) {
      double gi = (double)g[i] * (double)gscale;
      dm[i] = (double)beta1 * dm[i] + (1 - (double)beta1) * gi;
      dv[i] = (double)beta2 * dv[i] + (1 - (double)beta2) * gi * gi;
      double mhat = dm[i] / (1 - pow((double)beta1, t)), vhat = dv[i] / (1 - pow((double)beta2, t));
      dp[i] -= (double)lr * (mhat / (sqrt(vhat) + (double)eps) + (double)wd * dp[i]);
    }
  }
  for (int i = 0; i < N; i++) want[i] = (float)dp[i];
  CHECK_CLOSE("p", read_floats_(p, N), want, N, 1e-6);
  for (int i = 0; i < N; i++) want[i] = (float)dm[i];
  CHECK_CLOSE("m", read_floats_(m, N), want, N, 1e-6);
  for (int i = 0; i < N; i++) want[i] = (float)dv[i];
  CHECK_CLOSE("v", read_floats_(v, N), want, N, 1e-6);
  // The update itself: a step of about lr, whatever the size of the gradient, is small beside p.
  float *got = read_floats_(p, N), *moved = host_floats_(N);
  for (int i = 0; i < N; i++) {
    moved[i] = got[i] - p0[i];
    want[i] = (float)(dp[i] - (double)p0[i]);
  }
  CHECK_CLOSE("p - p0", moved, want, N, 2e-5);   // p is near 1 and known to 6e-8, the step near 0.05
  end_test_();
}

static void test_sum_squares(void) {
  static const size_t sizes[] = {0, 1, 2, 1023, 1024, 1025, 4097, 100003};
  float *x = normals_(100003, 0.1, 1);
  float *dev_x = dev_floats_(x, 100003);
  double *out = (double *)dev_memory_(sizeof(double)), got;
  for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
    double want = 0;
    for (size_t k = 0; k < sizes[i]; k++) want += (double)x[k] * (double)x[k];
    sum_squares(out, dev_x, sizes[i]);
    dev_copy_out(&got, out, sizeof got);
    CHECK(fabs(got - want) <= 1e-13 * want, "n = %zu: %.17g, wanted %.17g", sizes[i], got, want);
  }
  x[77777] = NAN;
  dev_copy_in(dev_x, x, 100003 * sizeof(float));
  sum_squares(out, dev_x, 100003);
  dev_copy_out(&got, out, sizeof got);
  CHECK(isnan(got), "NaN was lost: %g", got);
  end_test_();
}

// ---------------------------------------------------------------------------------------------------------
// Every op on rows r0 .. r0+n-1 of one fixed set of inputs. The results are kept by name, so that two runs can be compared.

enum {
  OR_ = 600, OT_ = 20,            // rows: three chunks of the sums over rows; T of attention
  OC_ = 300, OF_ = 51, OV_ = 83,  // odd rows: neighbours start at different alignments; OC_ > one block of k
  ONH_ = 6, ONKV_ = 2, OHS_ = 14, OQKV_ = (ONH_ + 2 * ONKV_) * OHS_, OATT_ = ONH_ * OHS_,
  ON_ = 37
};

typedef struct {
  char name[64];
  size_t row_bytes;       // of results that belong to rows; 0: sums over rows
  size_t bytes;
  unsigned char *data;    // on the host
} OpResult_;

typedef struct {
  OpResult_ list[256];
  int count;
} OpResults_;

// Inputs on the host, all OR_ rows.
typedef struct {
  int *tokens, *targets, *pos, *start, *seq;
  float *x, *dc, *gate_up, *df, *qkv, *dqkv, *datt, *logits, *dn, *coef;   // [OR_, C C 2F F QKV QKV ATT V N -]
  float *wte, *gain_c, *gain_f, *gain_h, *master, *bias, *cossin;
} OpInputs_;

static void op_inputs_(OpInputs_ *in) {
  in->tokens = (int *)host_memory_(OR_ * sizeof(int));
  in->targets = (int *)host_memory_(OR_ * sizeof(int));
  in->pos = (int *)host_memory_(OR_ * sizeof(int));
  in->start = (int *)host_memory_(OR_ * sizeof(int));
  in->seq = (int *)host_memory_(OR_ * sizeof(int));
  random_documents_(in->start, in->pos, OR_ / OT_, OT_);
  for (int r = 0; r < OR_; r++) {
    in->tokens[r] = test_below_(OV_);
    in->targets[r] = test_below_(OV_ + 9) - 9;
    in->seq[r] = r / OT_;
  }
  in->x = normals_(OR_ * OC_, 0, 1);
  in->dc = normals_(OR_ * OC_, 0, 1);
  in->gate_up = normals_(OR_ * 2 * OF_, 0, 1);
  in->df = normals_(OR_ * OF_, 0, 1);
  in->qkv = normals_(OR_ * OQKV_, 0, 1);
  in->dqkv = normals_(OR_ * OQKV_, 0, 1);
  in->datt = normals_(OR_ * OATT_, 0, 1);
  in->logits = normals_(OR_ * OV_, 0, 3);
  in->dn = normals_(OR_ * ON_, 0, 1);
  in->coef = normals_(OR_, 0, 1);
  in->wte = normals_(OV_ * OC_, 0, 0.3);
  in->gain_c = normals_(OC_, 1, 0.3);
  in->gain_f = normals_(OF_, 1, 0.3);
  in->gain_h = normals_(2 * OHS_, 1, 0.3);
  in->master = normals_(ON_ * OC_, 0, 0.3);
  in->bias = normals_(ON_, 0, 1);
  in->cossin = normals_(OT_ * OHS_, 0, 1);
}

// Keeps `bytes` of device memory under a name.
static void keep_(OpResults_ *o, const char *variant, const char *name, const void *dev, size_t row_bytes, size_t bytes) {
  if (o->count == (int)ARRAY_LEN(o->list)) die(EXIT_FAILED, "bug: too many results");
  OpResult_ *x = &o->list[o->count++];
  snprintf(x->name, sizeof x->name, "%s%s", variant, name);
  x->row_bytes = row_bytes;
  x->bytes = bytes;
  x->data = (unsigned char *)host_memory_(bytes);
  dev_copy_out(x->data, dev, bytes);
}

// Rows of activations, rows of floats, and sums over rows.
#define KEEP_ROWS_(name, p, row_bytes) keep_(o, variant, name, p, row_bytes, (size_t)n * (row_bytes))
#define KEEP_ACTS(name, p, width) KEEP_ROWS_(name, p, (size_t)(width) * sizeof(floatX))
#define KEEP_FLOATS(name, p, width) KEEP_ROWS_(name, p, (size_t)(width) * sizeof(float))
#define KEEP_SUM(name, p, count) keep_(o, variant, name, p, 0, (size_t)(count) * sizeof(float))
// Rows r0 .. r0+n-1 of an input, on the device.
#define ROWS(x, width) dev_acts_((x) + (size_t)r0 * (size_t)(width), (size_t)n * (size_t)(width))
#define NEW_ACTS(width) dev_acts_(NULL, (size_t)n * (size_t)(width))

static void keep_qact_(OpResults_ *o, const char *variant, const char *name, const QAct *q, int n, size_t width) {
  char full[64];
  int codes = q->lambda == 1 && q->bits > 0;
  size_t row = width * (codes ? 1 : sizeof(floatX));
  keep_(o, variant, name, q->data, row, row * (size_t)n);
  snprintf(full, sizeof full, "%s scales", name);
  if (codes) keep_(o, variant, full, q->s, sizeof(float), (size_t)n * sizeof(float));
}

static void run_row_ops_(OpResults_ *o, const OpInputs_ *in, int r0, int n) {
  const char *variant = "";
  int *tokens = dev_ints_(in->tokens + r0, (size_t)n), *targets = dev_ints_(in->targets + r0, (size_t)n);
  int *pos = dev_ints_(in->pos + r0, (size_t)n);
  float *wte = dev_floats_(in->wte, OV_ * OC_), *dwte = dev_floats_(NULL, OV_ * OC_);
  float *rstd = dev_floats_(NULL, (size_t)n * (ONH_ + ONKV_));
  float *gain_c = dev_floats_(in->gain_c, OC_), *gain_f = dev_floats_(in->gain_f, OF_), *gain_h = dev_floats_(in->gain_h, 2 * OHS_);
  float *dgain = dev_floats_(NULL, OC_), *losses = dev_floats_(NULL, (size_t)n), *lse = dev_floats_(NULL, (size_t)n * ONH_);
  floatX *x = ROWS(in->x, OC_), *dc = ROWS(in->dc, OC_), *qkv = ROWS(in->qkv, OQKV_), *gate_up = ROWS(in->gate_up, 2 * OF_);
  floatX *y = NEW_ACTS(OC_);

  embedding_forward(y, tokens, wte, n, OC_);
  KEEP_ACTS("embedding", y, OC_);
  embedding_backward(dwte, dc, tokens, n, OV_, OC_);
  KEEP_SUM("embedding dwte", dwte, OV_ * OC_);

  rmsnorm_forward(y, rstd, x, gain_c, n, OC_, 1e-5f);
  KEEP_ACTS("rmsnorm", y, OC_);
  KEEP_FLOATS("rmsnorm rstd", rstd, 1);
  y = ROWS(in->x, OC_);   // the gradient is added to what is there
  rmsnorm_backward(y, dgain, dc, x, gain_c, rstd, n, OC_, 1);
  KEEP_ACTS("rmsnorm dx", y, OC_);
  KEEP_SUM("rmsnorm dgain", dgain, OC_);

  floatX *heads = NEW_ACTS(OQKV_);
  headnorm_forward(heads, rstd, qkv, gain_h, gain_h + OHS_, n, ONH_, ONKV_, OHS_, 1e-5f);
  KEEP_ACTS("headnorm", heads, OQKV_);
  KEEP_FLOATS("headnorm rstd", rstd, ONH_ + ONKV_);
  heads = ROWS(in->dqkv, OQKV_);
  dgain = dev_floats_(NULL, 2 * OHS_);
  headnorm_backward(heads, dgain, dgain + OHS_, qkv, gain_h, gain_h + OHS_, rstd, n, ONH_, ONKV_, OHS_);
  KEEP_ACTS("headnorm dqkv", heads, OQKV_);
  KEEP_SUM("headnorm dgain", dgain, 2 * OHS_);

  heads = ROWS(in->qkv, OQKV_);
  rope_apply(heads, pos, dev_floats_(in->cossin, OT_ * OHS_), n, ONH_, ONKV_, OHS_, 1);
  KEEP_ACTS("rope", heads, OQKV_);

  for (int precision = PRECISION_BF16; precision <= PRECISION_FP32 && r0 % OT_ == 0 && n % OT_ == 0; precision++) {
    variant = precision == PRECISION_BF16 ? "bf16 " : "fp32 ";   // whole sequences only: attention mixes their rows
    int *start = dev_ints_(in->start + r0, (size_t)n), *seq = dev_ints_(in->seq, (size_t)n);
    int *at = (int *)host_memory_((size_t)n * sizeof(int));
    for (int r = 0; r < n; r++) at[r] = r % OT_;
    floatX *att = NEW_ACTS(OATT_), *dqkv = NEW_ACTS(OQKV_);
    attention_forward(att, lse, qkv, start, n / OT_, OT_, ONH_, ONKV_, OHS_, precision);
    KEEP_ACTS("attention", att, OATT_);
    KEEP_FLOATS("attention lse", lse, ONH_);
    attention_backward(dqkv, ROWS(in->datt, OATT_), att, lse, qkv, start, n / OT_, OT_, ONH_, ONKV_, OHS_, precision);
    KEEP_ACTS("attention dqkv", dqkv, OQKV_);
    size_t cache = (size_t)(n / OT_) * kv_cache_bytes(KV_BLOCK, ONKV_, OHS_, precision);
    attention_cached(att, dev_memory_(cache), dev_memory_(cache), qkv, seq, dev_ints_(at, (size_t)n), n, KV_BLOCK, ONH_, ONKV_, OHS_,
                     precision);
    KEEP_ACTS("attention_cached", att, OATT_);
  }
  variant = "";

  for (int act = ACT_RELU2; act <= ACT_SILU; act++) {
    variant = act == ACT_RELU2 ? "relu2 " : "silu ";
    for (int norm = 0; norm < 2; norm++) {
      QAct u = new_qact_(8, 1, (size_t)n, OF_);
      floatX *dgate_up = NEW_ACTS(2 * OF_);
      dgain = dev_floats_(NULL, OF_);
      glu_quant_forward(&u, rstd, gate_up, norm ? gain_f : NULL, n, OF_, act, 1e-5f);
      keep_qact_(o, variant, norm ? "glu" : "glu without norm", &u, n, OF_);
      glu_backward(dgate_up, norm ? dgain : NULL, ROWS(in->df, OF_), gate_up, norm ? gain_f : NULL, rstd, n, OF_, act);
      KEEP_ACTS(norm ? "dgate_up" : "dgate_up without norm", dgate_up, 2 * OF_);
      KEEP_SUM(norm ? "glu dgain" : "nothing", dgain, OF_);
    }
  }

  floatX *z = ROWS(in->logits, OV_);
  variant = "";
  cross_entropy_forward(losses, lse, z, targets, n, OV_);
  KEEP_FLOATS("losses", losses, 1);
  KEEP_FLOATS("cross-entropy lse", lse, 1);
  cross_entropy_backward(z, lse, targets, dev_floats_(in->coef + r0, (size_t)n), n, OV_);
  KEEP_ACTS("dlogits", z, OV_);

  for (int precision = PRECISION_BF16; precision <= PRECISION_FP32; precision++) {
    variant = precision == PRECISION_BF16 ? "bf16 " : "fp32 ";
    floatX *logits = NEW_ACTS(OV_), *dx = NEW_ACTS(OC_);
    float *dw = dev_floats_(in->wte, OV_ * OC_);
    linear_forward(logits, x, wte, n, OV_, OC_, precision);
    KEEP_ACTS("linear", logits, OV_);
    linear_backward(dx, dw, ROWS(in->logits, OV_), x, wte, n, OV_, OC_, precision);
    KEEP_ACTS("linear dx", dx, OC_);
    KEEP_SUM("linear dw", dw, OV_ * OC_);
  }
}

static void run_bitlinear_(OpResults_ *o, const OpInputs_ *in, int r0, int n) {
  static const struct { int bits; float lambda; int precision; const char *name; } forms[] = {
    {8, 1, PRECISION_BF16, "8 bits, bf16: "}, {8, 1, PRECISION_FP32, "8 bits: "}, {4, 1, PRECISION_FP32, "4 bits: "},
    {8, 0.3f, PRECISION_BF16, "lambda 0.3, bf16: "}, {8, 0.3f, PRECISION_FP32, "lambda 0.3: "},
    {0, 1, PRECISION_BF16, "weights only, bf16: "}, {0, 1, PRECISION_FP32, "weights only: "}};
  float *gain_c = dev_floats_(in->gain_c, OC_), *rstd = dev_floats_(NULL, (size_t)n), *bias = dev_floats_(in->bias, ON_);
  float *master = dev_floats_(in->master, ON_ * OC_);
  floatX *x = ROWS(in->x, OC_), *dn = ROWS(in->dn, ON_);
  for (size_t i = 0; i < ARRAY_LEN(forms); i++) {
    const char *variant = forms[i].name;
    QAct q = new_qact_(forms[i].bits, forms[i].lambda, (size_t)n, OC_);
    BitWeight w = new_weight_(master, bias, 20, 10, 7, OC_, forms[i].lambda, forms[i].precision);
    floatX *y = NEW_ACTS(ON_), *dx = NEW_ACTS(OC_);
    float *dw = dev_floats_(in->master, ON_ * OC_), *dbias = dev_floats_(in->bias, ON_);
    rmsnorm_quant_forward(&q, rstd, x, gain_c, n, OC_, 1e-5f);
    keep_qact_(o, variant, "norm and quantise", &q, n, OC_);
    act_quant_forward(&q, x, n, OC_);
    keep_qact_(o, variant, "quantise", &q, n, OC_);
    KEEP_SUM("gamma", w.gamma, ON_);
    if (forms[i].lambda == 1) keep_(o, variant, "codes", weight_codes_(&w), 0, ON_ * OC_);
    bitlinear_forward(y, &q, &w, ROWS(in->dn, ON_), n);
    KEEP_ACTS("y", y, ON_);
    bitlinear_backward(dx, dw, dbias, dn, &q, &w, n);
    KEEP_ACTS("dx", dx, OC_);
    KEEP_SUM("dw", dw, ON_ * OC_);
    KEEP_SUM("dbias", dbias, ON_);
  }
}

static void run_optimizer_(OpResults_ *o, const OpInputs_ *in) {
  const char *variant = "";
  size_t count = OR_ * OC_;
  float *p = dev_floats_(in->x, count), *m = dev_floats_(NULL, count), *v = dev_floats_(NULL, count);
  float *g = dev_floats_(in->dc, count);
  double *sum = (double *)dev_memory_(sizeof(double));
  for (int t = 1; t <= 3; t++) adamw_update(p, m, v, g, count, NULL, 0, 0.7f, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, t);
  sum_squares(sum, p, count);
  KEEP_SUM("adamw p", p, count);
  KEEP_SUM("adamw m", m, count);
  KEEP_SUM("adamw v", v, count);
  keep_(o, variant, "sum_squares", sum, 0, sizeof(double));
}

static OpResults_ *run_ops_(const OpInputs_ *in, int r0, int n) {
  OpResults_ *o = (OpResults_ *)host_memory_(sizeof *o);
  run_row_ops_(o, in, r0, n);
  run_bitlinear_(o, in, r0, n);
  if (n == OR_) run_optimizer_(o, in);
  return o;
}

// Frees what a run has used since the marks were taken.
static void drop_memory_(size_t host_mark, size_t dev_mark) {
  while (n_host_pool_ > host_mark) free(host_pool_[--n_host_pool_]);
  while (n_dev_pool_ > dev_mark) dev_free(dev_pool_[--n_dev_pool_]);
}

static void test_threads_ops(void) {
  OpInputs_ in;
  op_inputs_(&in);
  set_threads_(1);
  OpResults_ *one = run_ops_(&in, 0, OR_);
  for (int threads = 2; threads <= (EMULATED ? 2 : 3); threads++) {   // on a GPU: the same once more
    size_t host_mark = n_host_pool_, dev_mark = n_dev_pool_;
    set_threads_(threads);
    OpResults_ *more = run_ops_(&in, 0, OR_);
    CHECK(more->count == one->count, "%d results, %d", more->count, one->count);
    for (int i = 0; i < one->count; i++) {
      const OpResult_ *a = &one->list[i], *b = &more->list[i];
      CHECK(a->bytes == b->bytes && same_bits_(a->data, b->data, a->bytes), "%s: %d threads give other bits than one", a->name,
            threads);
    }
    drop_memory_(host_mark, dev_mark);
  }
  end_test_();
  set_threads_(0);
}

// The rows that any op gives for some rows alone are the rows that it gives for all of them.
static void test_rows_alone(void) {
  static const int subsets[][2] = {{0, 1}, {1, 1}, {7, 1}, {599, 1}, {3, 2}, {11, 5}, {250, 13}, {20, 20}, {40, 60}, {17, 300},
                                   {1, 599}};
  OpInputs_ in;
  op_inputs_(&in);
  reserve_scratch_();
  OpResults_ *all = run_ops_(&in, 0, OR_);
  for (size_t k = 0; k < ARRAY_LEN(subsets); k++) {
    int r0 = subsets[k][0], n = subsets[k][1], compared = 0;
    size_t host_mark = n_host_pool_, dev_mark = n_dev_pool_;
    OpResults_ *some = run_ops_(&in, r0, n);
    for (int i = 0, j = 0; i < some->count; i++) {
      const OpResult_ *a = &some->list[i], *b;
      while (strcmp(all->list[j].name, a->name) != 0) j++;   // the same order; some are missing in a subset
      b = &all->list[j];
      if (a->row_bytes == 0) continue;
      compared++;
      for (int r = 0; r < n; r++) {
        const unsigned char *alone = a->data + (size_t)r * a->row_bytes, *beside = b->data + (size_t)(r0 + r) * a->row_bytes;
        CHECK(same_bits_(alone, beside, a->row_bytes), "%s: row %d has other bits among %d rows than among %d", a->name, r0 + r,
              n, OR_);
      }
    }
    CHECK(compared >= 40, "only %d results were compared", compared);
    drop_memory_(host_mark, dev_mark);
  }
  end_test_();
}

#ifdef BITNET_MATMUL_H
#define CPU_TESTS_                                                                       \
  {"exp_fast", "error of the fast exponential", test_exp_fast},                          \
  {"gemm_i8", "int8 x ternary at odd shapes, exact sums", test_gemm_i8},                 \
  {"gemm_i8_large", "int8 x ternary beyond the caches", test_gemm_i8_large},             \
  {"gemm_i8_twin", "the fast integer kernels and their plain twin", test_gemm_i8_twin},  \
  {"round_row_twin", "gradients rounded to int8: this machine's code and plain C", test_round_row_twin}, \
  {"gemm_i8_rounded", "integer gradients of rows too wide for the room for codes", test_gemm_i8_rounded}, \
  {"gemm_float", "float products in every form at odd shapes", test_gemm_float},             \
  {"gemm_large", "float products beyond every block, any number of threads", test_gemm_large},             \
  {"block_product", "the products of attention at odd shapes", test_block_product},
#else
#define CPU_TESTS_
#endif

#define OPS_TESTS                                                                                             \
  CPU_TESTS_                                                                                                  \
  {"quant_weights", "absmean codes: ties, floor, NaN, scale of each matrix", test_quant_weights},             \
  {"quant_activations", "absmax codes: ties, clamping, floor, 4 bits, lambda, NaN", test_quant_activations},  \
  {"pack4", "four codes in a byte, damaged code 3", test_pack4},                                              \
  {"schedules", "lambda, learning rate, weight decay", test_schedules},                                       \
  {"fused", "norm + quantise and gate + norm + quantise in one pass", test_fused},                            \
  {"gated", "product + gated unit in one, forward and backward", test_gated},                                 \
  {"packed_vs_fake", "BitLinear forward and backward against double", test_packed_vs_fake},                   \
  {"dx_int8", "gradients of inputs as integer products", test_dx_int8},                                       \
  {"cross_entropy", "losses and gradients against double, ignored targets, NaN", test_cross_entropy},         \
  {"attention", "softmax over documents and grouped heads against double", test_attention},                   \
  {"adamw", "five updates against double", test_adamw},                                                       \
  {"sum_squares", "against a plain sum, any length", test_sum_squares},                                       \
  {"threads_ops", "every op: the same bits with 1, 2, 3 threads", test_threads_ops},                          \
  {"rows_alone", "every op: a row has the same bits alone", test_rows_alone}

#endif
