/*
test_reference.h: every op and whole models against the numbers of PyTorch and of Hugging Face transformers.

What it is:  readers of the dumps that prepro/reference.py has written (dev/test/ref/, or the directory that the environment variable
             BITNET_REF names), and comparisons tensor by tensor: ops one at a time, one layer at a time, whole models (logits, loss,
             all gradients), ten steps of AdamW, the schedules.
What not:    no formulas: a test only carries numbers from the file to an op and back. Properties that need no reference are in
             test_ops.h.
Read before: check.h, bitnet/ops.h, bitnet/model.h, prepro/reference.py.
Defines:     REFERENCE_TESTS, the rows for the table of tests.

Errors are relative to the largest element of the tensor (rel_error), and the bound stands beside the name. The dumps are exact
(float64), so the error is that of the code under test alone: a few float32 roundings, 6e-8 each. Integers must be equal; the
dumps keep every value that is rounded far from the edges of the steps. `added` tensors are the ones that an op adds to: they
start with a pattern instead of zeros, which must come out on top of the gradient. With the environment variable
BITNET_REF_ERRORS every error is printed beside its bound.
*/
#ifndef TEST_REFERENCE_H
#define TEST_REFERENCE_H

#include "../../bitnet/losses.h"
#include "../../bitnet/model.h"
#include "../../bitnet/optim.h"
#include "../../bitnet/safetensors.h"
#include "../../quant.h"
#include "check.h"

// ---------------------------------------------------------------------------------------------------------
// One dump is open at a time; what is read from it, and memory of the ops, lives until ref_close_.

static StFile ref_file_;
static void *ref_host_[1024], *ref_dev_[1024];
static size_t n_ref_host_, n_ref_dev_;

static void ref_open_(const char *name) {
  char path[4096], file[128];
  const char *dir = getenv("BITNET_REF");
  snprintf(file, sizeof file, "%s.safetensors", name);
  path_join(path, sizeof path, dir && *dir ? dir : "dev/test/ref", file);
  if (!is_file(path))
    die(EXIT_FAILED, "%s: no such file; run the tests in the repository's root or set BITNET_REF to the directory of the dumps", path);
  st_open(&ref_file_, path);
}

static void ref_close_(void) {
  while (n_ref_host_ > 0) free(ref_host_[--n_ref_host_]);
  while (n_ref_dev_ > 0) dev_free(ref_dev_[--n_ref_dev_]);
  st_close(&ref_file_);
}

static void *ref_host_memory_(size_t bytes) {
  if (n_ref_host_ == ARRAY_LEN(ref_host_)) die(EXIT_FAILED, "bug: a test reads too many tensors");
  return ref_host_[n_ref_host_++] = xcalloc(bytes, 1);
}

// Zeroed memory of the ops.
static void *ref_dev_memory_(size_t bytes) {
  void *p = dev_malloc(bytes);
  if (p == NULL || n_ref_dev_ == ARRAY_LEN(ref_dev_)) die(EXIT_FAILED, "no memory for a test: %zu bytes", bytes);
  return ref_dev_[n_ref_dev_++] = p;
}

// A name put together from pieces; eight of them may be in use at a time.
PRINTF_LIKE(1, 2) static const char *ref_name_(const char *fmt, ...) {
  static char names[8][160];
  static int next;
  char *s = names[next++ % 8];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(s, sizeof names[0], fmt, ap);
  va_end(ap);
  return s;
}

static const StTensor *ref_tensor_(const char *name) {
  const StTensor *t = st_find(&ref_file_, name);
  if (t == NULL) die(EXIT_FAILED, "%s: no tensor %s; write the dumps again: python prepro/reference.py", ref_file_.path, name);
  return t;
}

// The tensor as floats, or its raw elements (int32, int8), on the host; n (or NULL) is the number of elements.
static float *ref_floats_(const char *name, size_t *n) {
  const StTensor *t = ref_tensor_(name);
  float *x = (float *)ref_host_memory_(t->n * sizeof(float));
  st_read_f32(&ref_file_, t, x, 0, t->n);
  if (n) *n = t->n;
  return x;
}

static void *ref_integers_(const char *name, int dtype, size_t *n) {
  const StTensor *t = ref_tensor_(name);
  if (t->dtype != dtype) die(EXIT_FAILED, "%s: tensor %s is %s", ref_file_.path, name, st_dtype_name(t->dtype));
  void *x = ref_host_memory_(t->end - t->begin);
  memcpy(x, st_data(&ref_file_, t), t->end - t->begin);
  if (n) *n = t->n;
  return x;
}

static size_t ref_count_(const char *name) {
  return ref_tensor_(name)->n;
}

// The tensor in memory of the ops: parameters (float), activations (floatX), integers.
static float *ref_param_(const char *name) {
  size_t n;
  const float *x = ref_floats_(name, &n);
  float *p = (float *)ref_dev_memory_(n * sizeof(float));
  dev_copy_in(p, x, n * sizeof(float));
  return p;
}

static floatX *ref_act_(const char *name) {
  size_t n;
  const float *x = ref_floats_(name, &n);
  floatX *p = (floatX *)ref_dev_memory_(n * sizeof(floatX));
  dev_floatx_in(p, x, n);
  return p;
}

static int *ref_ints_(const char *name) {
  size_t n;
  const void *x = ref_integers_(name, ST_I32, &n);
  int *p = (int *)ref_dev_memory_(n * sizeof(int));
  dev_copy_in(p, x, n * sizeof(int));
  return p;
}

// Room for as many elements as the tensor has: the output of an op that will be compared with it.
static float *ref_param_room_(const char *name) {
  return (float *)ref_dev_memory_(ref_count_(name) * sizeof(float));
}

static floatX *ref_act_room_(const char *name) {
  return (floatX *)ref_dev_memory_(ref_count_(name) * sizeof(floatX));
}

// What an `added` tensor starts with: multiples of 1/8 in -1 .. 7/8.
static float ref_pattern_(size_t i) {
  return (float)(i * 7 % 16) / 8 - 1;
}

static float *ref_param_added_(const char *name) {
  size_t n = ref_count_(name);
  float *x = (float *)ref_host_memory_(n * sizeof(float)), *p = ref_param_room_(name);
  for (size_t i = 0; i < n; i++) x[i] = ref_pattern_(i);
  dev_copy_in(p, x, n * sizeof(float));
  return p;
}

static floatX *ref_act_added_(const char *name) {
  size_t n = ref_count_(name);
  float *x = (float *)ref_host_memory_(n * sizeof(float));
  floatX *p = ref_act_room_(name);
  for (size_t i = 0; i < n; i++) x[i] = ref_pattern_(i);
  dev_floatx_in(p, x, n);
  return p;
}

// ---------------------------------------------------------------------------------------------------------
// Comparisons. Each takes the name in the dump, where the ops have left the result, and the bound.

static void ref_compare_(const char *name, const float *got, double bound) {
  size_t n;
  const float *want = ref_floats_(name, &n);
  if (getenv("BITNET_REF_ERRORS")) printf("    %-60s %.2e  bound %.0e\n", name, rel_error(got, want, n), bound);
  CHECK_CLOSE(name, got, want, n, bound);
}

static void expect_param_(const char *name, const float *dev, double bound) {
  size_t n = ref_count_(name);
  float *got = (float *)ref_host_memory_(n * sizeof(float));
  dev_copy_out(got, dev, n * sizeof(float));
  ref_compare_(name, got, bound);
}

static void expect_act_(const char *name, const floatX *dev, double bound) {
  size_t n = ref_count_(name);
  float *got = (float *)ref_host_memory_(n * sizeof(float));
  dev_floatx_out(got, dev, n);
  ref_compare_(name, got, bound);
}

static void expect_param_added_(const char *name, const float *dev, double bound) {
  size_t n = ref_count_(name);
  float *got = (float *)ref_host_memory_(n * sizeof(float));
  dev_copy_out(got, dev, n * sizeof(float));
  for (size_t i = 0; i < n; i++) got[i] -= ref_pattern_(i);
  ref_compare_(name, got, bound);
}

static void expect_act_added_(const char *name, const floatX *dev, double bound) {
  size_t n = ref_count_(name);
  float *got = (float *)ref_host_memory_(n * sizeof(float));
  dev_floatx_out(got, dev, n);
  for (size_t i = 0; i < n; i++) got[i] -= ref_pattern_(i);
  ref_compare_(name, got, bound);
}

// int8 codes: all equal.
static void expect_codes_(const char *name, const void *dev) {
  size_t n, wrong = 0, first = 0;
  const int8_t *want = (const int8_t *)ref_integers_(name, ST_I8, &n);
  int8_t *got = (int8_t *)ref_host_memory_(n);
  dev_copy_out(got, dev, n);
  for (size_t i = n; i-- > 0;) {
    if (got[i] != want[i]) wrong++, first = i;
  }
  CHECK(wrong == 0, "%s: %zu of %zu codes differ, the first is number %zu: %d, wanted %d", name, wrong, n, first, got[first],
        want[first]);
}

// A QAct that op.b8 or op.b4 describes, for R rows.
static QAct ref_qact_(const char *codes, float lambda, int bits, int R) {
  QAct q;
  q.data = ref_dev_memory_(ref_count_(codes) * sizeof(floatX));
  q.s = (float *)ref_dev_memory_((size_t)R * sizeof(float));
  q.lambda = lambda;
  q.bits = bits;
  return q;
}

// Codes and scales at lambda = 1, floats elsewhere.
static void expect_qact_(const char *op, const QAct *q) {
  if (q->lambda == 1.0f) {
    expect_codes_(ref_name_("%s.codes", op), q->data);
    expect_param_(ref_name_("%s.scale", op), q->s, 1e-6);
  } else {
    expect_act_(ref_name_("%s.mixed", op), (const floatX *)q->data, 1e-6);
  }
}

// Scratch for every op of this file: 512 rows and 512 columns are more than any has.
static void ref_scratch_(void) {
  Config c;
  memset(&c, 0, sizeof c);
  c.dim = c.ffn_dim = c.vocab = 512;
  c.heads = c.kv_heads = c.head_dim = 8;
  model_reserve_scratch(&c, 512);
}

static void ref_open_ops_(void) {
  ref_open_("ops");
  ref_scratch_();
}

// ---------------------------------------------------------------------------------------------------------
// Ops, in the order of bitnet/ops.h.

static void test_ref_embedding(void) {
  ref_open_ops_();
  enum { R = 11, V = 9, C = 20 };
  floatX *out = ref_act_room_("embedding.out");
  float *dwte = ref_param_added_("embedding.dwte");
  int *tokens = ref_ints_("embedding.tokens");
  embedding_forward(out, tokens, ref_param_("embedding.wte"), R, C);
  embedding_backward(dwte, ref_act_("embedding.dout"), tokens, R, V, C);
  expect_act_("embedding.out", out, 0);
  expect_param_added_("embedding.dwte", dwte, 1e-6);
  ref_close_();
}

static void test_ref_rmsnorm(void) {
  ref_open_ops_();
  enum { R = 9, C = 37 };
  const float eps = 1e-5f;
  floatX *x = ref_act_("rmsnorm.x"), *out = ref_act_room_("rmsnorm.out"), *dx = ref_act_added_("rmsnorm.dx");
  float *gain = ref_param_("rmsnorm.gain"), *rstd = ref_param_room_("rmsnorm.rstd"), *dgain = ref_param_added_("rmsnorm.dgain");
  rmsnorm_forward(out, rstd, x, gain, R, C, eps);
  expect_act_("rmsnorm.out", out, 1e-6);
  expect_param_("rmsnorm.rstd", rstd, 1e-6);
  rmsnorm_backward(dx, dgain, ref_act_("rmsnorm.dout"), x, gain, rstd, R, C, 1);
  expect_act_added_("rmsnorm.dx", dx, 1e-6);
  expect_param_added_("rmsnorm.dgain", dgain, 1e-6);
  dx = ref_act_room_("rmsnorm.dx");   // the same gradient where nothing is to be added to
  rmsnorm_backward(dx, dgain, ref_act_("rmsnorm.dout"), x, gain, rstd, R, C, 0);
  expect_act_("rmsnorm.dx", dx, 1e-6);

  for (int bits = 4; bits <= 8; bits += 4) {   // the same norm and the quantiser in one pass
    for (int mixed = 0; mixed < 2; mixed++) {
      const char *op = bits == 8 ? "rmsnorm.b8" : "rmsnorm.b4";
      QAct q = ref_qact_(ref_name_("%s.codes", op), mixed ? 0.3f : 1.0f, bits, R);
      rmsnorm_quant_forward(&q, rstd, x, gain, R, C, eps);
      expect_qact_(op, &q);
      expect_param_("rmsnorm.rstd", rstd, 1e-6);
    }
  }
  QAct plain = ref_qact_("rmsnorm.b8.codes", 1.0f, 0, R);   // no quantisation of activations
  rmsnorm_quant_forward(&plain, rstd, x, gain, R, C, eps);
  expect_act_("rmsnorm.out", (const floatX *)plain.data, 1e-6);

  out = ref_act_room_("rmsnorm_tiny.out");   // values where eps counts
  rmsnorm_forward(out, rstd, ref_act_("rmsnorm_tiny.x"), gain, 3, C, eps);
  expect_act_("rmsnorm_tiny.out", out, 1e-6);
  ref_close_();
}

static void test_ref_act_quant(void) {
  ref_open_ops_();
  enum { R = 10, K = 45 };
  floatX *x = ref_act_("act_quant.x");
  for (int bits = 4; bits <= 8; bits += 4) {
    for (int mixed = 0; mixed < 2; mixed++) {
      const char *op = bits == 8 ? "act_quant.b8" : "act_quant.b4";
      QAct q = ref_qact_(ref_name_("%s.codes", op), mixed ? 0.3f : 1.0f, bits, R);
      act_quant_forward(&q, x, R, K);
      expect_qact_(op, &q);
    }
  }
  QAct edge = ref_qact_("act_quant_edge.codes", 1.0f, 8, 6);   // exact ties, zeros, tiny and huge values
  act_quant_forward(&edge, ref_act_("act_quant_edge.x"), 6, 12);
  expect_codes_("act_quant_edge.codes", edge.data);
  float scale[6];
  const float *want = ref_floats_("act_quant_edge.scale", NULL);
  dev_copy_out(scale, edge.s, sizeof scale);
  for (int r = 0; r < 6; r++) CHECK_CLOSE("act_quant_edge.scale", scale + r, want + r, 1, 1e-6);   // 1e-7 .. 1e28: row by row
  ref_close_();
}

static void test_ref_headnorm(void) {
  ref_open_ops_();
  enum { R = 7, NH = 4, NKV = 2, HS = 10 };
  floatX *qkv = ref_act_("headnorm.qkv"), *out = ref_act_room_("headnorm.out"), *dqkv = ref_act_("headnorm.dout");
  float *qgain = ref_param_("headnorm.qgain"), *kgain = ref_param_("headnorm.kgain"), *rstd = ref_param_room_("headnorm.rstd");
  float *dqgain = ref_param_added_("headnorm.dqgain"), *dkgain = ref_param_added_("headnorm.dkgain");
  headnorm_forward(out, rstd, qkv, qgain, kgain, R, NH, NKV, HS, 1e-6f);
  headnorm_backward(dqkv, dqgain, dkgain, qkv, qgain, kgain, rstd, R, NH, NKV, HS);
  expect_act_("headnorm.out", out, 1e-6);
  expect_param_("headnorm.rstd", rstd, 1e-6);
  expect_act_("headnorm.dqkv", dqkv, 1e-6);
  expect_param_added_("headnorm.dqgain", dqgain, 1e-6);
  expect_param_added_("headnorm.dkgain", dkgain, 1e-6);
  ref_close_();
}

// A BitWeight with room for N x K; parts that are not used are 0.
static BitWeight ref_bitweight_(int N, int K, int part0, int part1, int part2) {
  BitWeight w;
  memset(&w, 0, sizeof w);
  w.N = N;
  w.K = K;
  w.parts[0] = part0;
  w.parts[1] = part1;
  w.parts[2] = part2;
  w.precision = PRECISION_FP32;
  w.data = ref_dev_memory_(bitweight_bytes(N, K));
  w.gamma = (float *)ref_dev_memory_((size_t)N * sizeof(float));
  return w;
}

static void expect_weight_codes_(const char *name, const BitWeight *w) {
  int8_t *codes = (int8_t *)ref_dev_memory_((size_t)w->N * (size_t)w->K);
  bitweight_codes(codes, w);
  expect_codes_(name, codes);
}

// Exact ties (the mean magnitude is 1), weights below the floor of gamma, zeros, huge ones.
static void test_ref_weight_quantize(void) {
  static const struct { const char *name; int N, K; } cases[] = {
    {"weight_edge", 3, 4}, {"weight_small", 2, 4}, {"weight_zero", 2, 4}, {"weight_huge", 5, 12}};
  ref_open_ops_();
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    const char *name = cases[i].name;
    float gamma[8];
    const float *want = ref_floats_(ref_name_("%s.gamma", name), NULL);
    BitWeight w = ref_bitweight_(cases[i].N, cases[i].K, cases[i].N, 0, 0);
    weight_quantize(&w, ref_param_(ref_name_("%s.w", name)), 1.0f);
    expect_weight_codes_(ref_name_("%s.codes", name), &w);
    dev_copy_out(gamma, w.gamma, (size_t)w.N * sizeof(float));
    for (int n = 0; n < w.N; n++) CHECK_CLOSE(name, gamma + n, want, 1, 1e-7);
  }
  ref_close_();
}

typedef struct {
  const char *op;
  int R, K, parts[3];
} BitLinearCase;

/*
The int32 sums themselves: with all scales set to 1 and no bias the output of the integer product is the sum, exactly, for it is
below 2^24.
*/
static void expect_integer_sums_(const BitLinearCase *k, QAct *x, BitWeight *w) {
  size_t n;
  const int32_t *want = (const int32_t *)ref_integers_(ref_name_("%s.sums", k->op), ST_I32, &n);
  float *ones = (float *)ref_host_memory_((size_t)(k->R + w->N) * sizeof(float)), *got = (float *)ref_host_memory_(n * sizeof(float));
  floatX *out = (floatX *)ref_dev_memory_(n * sizeof(floatX));
  size_t wrong = 0;
  for (int i = 0; i < k->R + w->N; i++) ones[i] = 1;
  dev_copy_in(x->s, ones, (size_t)k->R * sizeof(float));
  dev_copy_in(w->gamma, ones, (size_t)w->N * sizeof(float));
  w->bias = NULL;
  bitlinear_forward(out, x, w, NULL, k->R);
  dev_floatx_out(got, out, n);
  for (size_t i = 0; i < n; i++) wrong += got[i] != (float)want[i];
  CHECK(wrong == 0, "%s.sums: %zu of %zu sums differ", k->op, wrong, n);
}

// One lambda, with activations quantised to `bits` (0: not at all). widen: how much larger the bounds are (bf16 operands).
static void check_bitlinear_(const BitLinearCase *k, const char *label, float lambda, int bits, int precision, double widen) {
  int N = k->parts[0] + k->parts[1] + k->parts[2];
  const char *op = ref_name_("%s.l%s.b%d", k->op, label, bits);
  char out_name[160], dx_name[160], dw_name[160], db_name[160];
  snprintf(out_name, sizeof out_name, "%s.out", op);
  snprintf(dx_name, sizeof dx_name, "%s.dx", op);
  snprintf(dw_name, sizeof dw_name, "%s.dw", op);
  snprintf(db_name, sizeof db_name, "%s.dbias", op);
  floatX *in = ref_act_(ref_name_("%s.x", k->op)), *dout = ref_act_(ref_name_("%s.dout", k->op));
  floatX *residual = ref_act_(ref_name_("%s.residual", k->op)), *out = ref_act_room_(out_name), *dx = ref_act_room_(dx_name);
  float *dw = ref_param_added_(dw_name), *dbias = ref_param_added_(db_name);
  QAct x = ref_qact_(ref_name_("%s.q", k->op), lambda, bits, k->R);
  BitWeight w = ref_bitweight_(N, k->K, k->parts[0], k->parts[1], k->parts[2]);
  w.precision = precision;
  w.bias = ref_param_(ref_name_("%s.bias", k->op));
  act_quant_forward(&x, in, k->R, k->K);
  weight_quantize(&w, ref_param_(ref_name_("%s.w", k->op)), lambda);
  expect_param_(ref_name_("%s.gamma", k->op), w.gamma, 1e-7);
  int integers = lambda == 1.0f && bits == 8;
  bitlinear_forward(out, &x, &w, NULL, k->R);
  expect_act_(out_name, out, integers ? 1e-6 : 1e-6 * widen);
  bitlinear_backward(dx, dw, dbias, dout, &x, &w, k->R);
  expect_act_(dx_name, dx, 1e-6 * widen);
  expect_param_added_(dw_name, dw, 1e-6 * widen);
  expect_param_added_(db_name, dbias, 1e-6);
  if (st_find(&ref_file_, ref_name_("%s.out_residual", op))) {
    bitlinear_forward(out, &x, &w, residual, k->R);
    expect_act_(ref_name_("%s.out_residual", op), out, integers ? 1e-6 : 1e-6 * widen);
  }
  if (st_find(&ref_file_, ref_name_("%s.out_plain", op))) {
    w.bias = NULL;
    bitlinear_forward(out, &x, &w, NULL, k->R);
    expect_act_(ref_name_("%s.out_plain", op), out, 1e-6 * widen);
  }
  if (integers) {
    expect_codes_(ref_name_("%s.q", k->op), x.data);
    expect_weight_codes_(ref_name_("%s.codes", k->op), &w);
    expect_integer_sums_(k, &x, &w);
  }
}

static const BitLinearCase bitlinear_small_ = {"bitlinear", 13, 50, {17, 9, 9}};
static const BitLinearCase bitlinear_wide_ = {"bitlinear_wide", 14, 300, {40, 0, 0}};   // more inputs than a block of the product has

static void test_ref_bitlinear(void) {
  static const char *const labels[] = {"0", "0.3", "1"};
  static const float lambdas[] = {0.0f, 0.3f, 1.0f};
  ref_open_ops_();
  for (int i = 0; i < 3; i++) {
    check_bitlinear_(&bitlinear_small_, labels[i], lambdas[i], 8, PRECISION_FP32, 1);
    check_bitlinear_(&bitlinear_small_, labels[i], lambdas[i], 0, PRECISION_FP32, 1);
  }
  check_bitlinear_(&bitlinear_wide_, "0", 0.0f, 8, PRECISION_FP32, 1);
  check_bitlinear_(&bitlinear_wide_, "1", 1.0f, 8, PRECISION_FP32, 1);
  ref_close_();
}

// With operands rounded to bf16 (8 bits) floats are off by half a percent at most; the integer product stays as exact as before.
static void test_ref_bitlinear_bf16(void) {
  ref_open_ops_();
  check_bitlinear_(&bitlinear_small_, "0.3", 0.3f, 8, PRECISION_BF16, 5000);
  check_bitlinear_(&bitlinear_small_, "1", 1.0f, 0, PRECISION_BF16, 5000);
  check_bitlinear_(&bitlinear_wide_, "1", 1.0f, 8, PRECISION_BF16, 5000);
  ref_close_();
}

static void test_ref_linear(void) {
  ref_open_ops_();
  enum { R = 7, N = 45, K = 30 };
  floatX *x = ref_act_("linear.x"), *out = ref_act_room_("linear.out"), *dx = ref_act_room_("linear.dx");
  float *w = ref_param_("linear.w"), *dw = ref_param_added_("linear.dw");
  linear_forward(out, x, w, R, N, K, PRECISION_FP32);
  linear_backward(dx, dw, ref_act_("linear.dout"), x, w, R, N, K, PRECISION_FP32);
  expect_act_("linear.out", out, 1e-6);
  expect_act_("linear.dx", dx, 1e-6);
  expect_param_added_("linear.dw", dw, 1e-6);
  linear_forward(out, x, w, R, N, K, PRECISION_BF16);
  expect_act_("linear.out", out, 5e-3);
  ref_close_();
}

static void test_ref_rope(void) {
  ref_open_ops_();
  enum { R = 9, NH = 4, NKV = 2, HS = 6 };
  floatX *qkv = ref_act_("rope.qkv"), *dqkv = ref_act_("rope.dout");
  int *pos = ref_ints_("rope.pos");
  float *cossin = ref_param_("rope.cossin");
  rope_apply(qkv, pos, cossin, R, NH, NKV, HS, 1);
  rope_apply(dqkv, pos, cossin, R, NH, NKV, HS, -1);
  expect_act_("rope.out", qkv, 1e-6);
  expect_act_("rope.dqkv", dqkv, 1e-6);
  ref_close_();
}

/*
The table of model.h against the rotary modules of transformers, every tenth of 200 positions. The two compute powers with different
libraries; the last bit of a frequency times position 190 is 1e-5 of an angle.
*/
static void test_ref_rope_table(void) {
  ref_open_ops_();
  enum { HS = 64, POSITIONS = 200, ROWS = 20 };
  float *table = (float *)ref_host_memory_(POSITIONS * HS * sizeof(float));
  float *rows = (float *)ref_host_memory_(ROWS * HS * sizeof(float));
  Config c;
  memset(&c, 0, sizeof c);
  c.head_dim = HS;
  c.max_seq = POSITIONS;
  for (int llama3 = 0; llama3 < 2; llama3++) {
    c.rope_theta = llama3 ? 500000.0 : 10000.0;
    c.rope_llama3 = llama3;
    c.rope_factor = 32;
    c.rope_low_freq = 1;
    c.rope_high_freq = 4;
    c.rope_original_max = 8192;
    rope_table(table, &c);
    for (int r = 0; r < ROWS; r++) memcpy(rows + r * HS, table + r * 10 * HS, HS * sizeof(float));
    ref_compare_(llama3 ? "rope_table.llama3" : "rope_table.default", rows, 2e-5);
  }
  ref_close_();
}

static void test_ref_attention(void) {
  ref_open_ops_();
  enum { B = 2, T = 70, NH = 4, NKV = 2, HS = 6 };
  floatX *qkv = ref_act_("attention.qkv"), *out = ref_act_room_("attention.out"), *dqkv = ref_act_room_("attention.dqkv");
  float *lse = ref_param_room_("attention.lse");
  int *start = ref_ints_("attention.start");
  attention_forward(out, lse, qkv, start, B, T, NH, NKV, HS, PRECISION_FP32);
  expect_act_("attention.out", out, 1e-6);
  expect_param_("attention.lse", lse, 1e-6);
  attention_backward(dqkv, ref_act_("attention.dout"), out, lse, qkv, start, B, T, NH, NKV, HS, PRECISION_FP32);
  expect_act_("attention.dqkv", dqkv, 1e-6);

  // The same rows against a cache: each document is a sequence of its own, position 0 is where it starts.
  int seq[B * T], pos[B * T], sequences = 0;
  const int *host_start = (const int *)ref_integers_("attention.start", ST_I32, NULL);
  for (int r = 0; r < B * T; r++) {
    pos[r] = r % T - host_start[r];
    if (pos[r] == 0) sequences++;
    seq[r] = sequences - 1;
  }
  int *dev_seq = (int *)ref_dev_memory_(sizeof seq), *dev_pos = (int *)ref_dev_memory_(sizeof pos);
  dev_copy_in(dev_seq, seq, sizeof seq);
  dev_copy_in(dev_pos, pos, sizeof pos);
  size_t cache = (size_t)sequences * kv_cache_bytes(2 * KV_BLOCK, NKV, HS, PRECISION_FP32);
  void *kcache = ref_dev_memory_(cache), *vcache = ref_dev_memory_(cache);
  dev_zero(out, ref_count_("attention.out") * sizeof(floatX));
  attention_cached(out, kcache, vcache, qkv, dev_seq, dev_pos, B * T, 2 * KV_BLOCK, NH, NKV, HS, PRECISION_FP32);
  expect_act_("attention.out", out, 1e-6);
  ref_close_();
}

static void test_ref_glu(void) {
  static const char *const acts[] = {"relu2", "silu"}, *const norms[] = {"plain", "norm"};
  ref_open_ops_();
  enum { R = 8, F = 37 };
  for (int i = 0; i < 4; i++) {
    int act = i < 2 ? ACT_RELU2 : ACT_SILU, norm = i % 2;
    char op[64];
    snprintf(op, sizeof op, "glu.%s.%s", acts[act == ACT_SILU], norms[norm]);
    floatX *gate_up = ref_act_(ref_name_("glu.%s.gate_up", acts[act == ACT_SILU]));
    floatX *dgate_up = ref_act_room_(ref_name_("%s.dgate_up", op));
    float *gain = norm ? ref_param_("glu.gain") : NULL, *dgain = norm ? ref_param_added_(ref_name_("%s.dgain", op)) : NULL;
    float *rstd = norm ? ref_param_room_(ref_name_("%s.rstd", op)) : NULL;
    const int forms[3] = {1, 2, 0};   // codes; the mix at lambda 0.3; not quantised
    for (int k = 0; k < 3; k++) {
      QAct q = ref_qact_(ref_name_("%s.codes", op), forms[k] == 2 ? 0.3f : 1.0f, forms[k] ? 8 : 0, R);
      glu_quant_forward(&q, rstd, gate_up, gain, R, F, act, 1e-5f);
      if (forms[k]) expect_qact_(op, &q);
      else expect_act_(ref_name_("%s.out", op), (const floatX *)q.data, 1e-6);
    }
    if (norm) expect_param_(ref_name_("%s.rstd", op), rstd, 1e-6);
    glu_backward(dgate_up, dgain, ref_act_("glu.dout"), gate_up, gain, rstd, R, F, act);
    expect_act_(ref_name_("%s.dgate_up", op), dgate_up, 1e-6);
    if (norm) expect_param_added_(ref_name_("%s.dgain", op), dgain, 1e-6);
    glu_backward(gate_up, dgain, ref_act_("glu.dout"), gate_up, gain, rstd, R, F, act);   // the gradient in place of gate_up
    expect_act_(ref_name_("%s.dgate_up", op), gate_up, 1e-6);
  }
  ref_close_();
}

static void test_ref_cross_entropy(void) {
  ref_open_ops_();
  enum { R = 9, V = 37 };
  floatX *logits = ref_act_("cross_entropy.logits");
  float *losses = ref_param_room_("cross_entropy.losses"), *lse = ref_param_room_("cross_entropy.lse");
  int *targets = ref_ints_("cross_entropy.targets");
  cross_entropy_forward(losses, lse, logits, targets, R, V);
  expect_param_("cross_entropy.losses", losses, 1e-6);
  expect_param_("cross_entropy.lse", lse, 1e-6);
  cross_entropy_backward(logits, lse, targets, ref_param_("cross_entropy.coef"), R, V);
  expect_act_("cross_entropy.dlogits", logits, 1e-6);
  ref_close_();
}

static void test_ref_optimizer(void) {
  ref_open_ops_();
  double *sum = (double *)ref_dev_memory_(sizeof(double)), got;
  sum_squares(sum, ref_param_("sum_squares.x"), ref_count_("sum_squares.x"));
  dev_copy_out(&got, sum, sizeof got);
  float rounded = (float)got;
  ref_compare_("sum_squares.out", &rounded, 1e-7);

  size_t n = ref_count_("adamw.p");
  const float *a = ref_floats_("adamw.args", NULL);   // gscale, lr, beta1, beta2, eps, weight decay
  float *p = ref_param_("adamw.p"), *g = ref_param_("adamw.g"), *m = ref_param_room_("adamw.p"), *v = ref_param_room_("adamw.p");
  for (int t = 1; t <= 3; t++) {
    adamw_update(p, m, v, g, n, NULL, 0, t < 3 ? a[0] : 0.5f * a[0], a[1], a[2], a[3], a[4], a[5], t);
    expect_param_(ref_name_("adamw.%d.p", t), p, 1e-6);
    expect_param_(ref_name_("adamw.%d.m", t), m, 1e-6);
    expect_param_(ref_name_("adamw.%d.v", t), v, 1e-6);
  }
  ref_close_();
}

// lambda, learning rate and weight decay of every update of a run.
static void test_ref_schedules(void) {
  static const struct { const char *name; int kind; } lambdas[] = {
    {"warmup", LAMBDA_WARMUP}, {"linear", LAMBDA_LINEAR}, {"accelerated", LAMBDA_ACCELERATED}, {"cosine", LAMBDA_COSINE},
    {"exponential", LAMBDA_EXPONENTIAL}, {"exponential4", LAMBDA_EXPONENTIAL}, {"sigmoid", LAMBDA_SIGMOID},
    {"sigmoid15", LAMBDA_SIGMOID}, {"step", LAMBDA_STEP}, {"none", LAMBDA_NONE}};
  static const struct { const char *name; int kind; } rates[] = {
    {"cosine", LR_COSINE}, {"linear", LR_LINEAR}, {"constant", LR_CONSTANT}, {"wsd", LR_WSD}, {"two_stage", LR_TWO_STAGE},
    {"faq", LR_FAQ}};
  float values[64], decays[64];
  ref_open_("ops");
  for (size_t i = 0; i < ARRAY_LEN(lambdas); i++) {
    const float *a = ref_floats_(ref_name_("lambda.%s.args", lambdas[i].name), NULL);   // T, W, k
    int T = (int)a[0];
    for (int t = 0; t < T; t++) values[t] = (float)lambda_at(lambdas[i].kind, t, T, (int64_t)a[1], a[2]);
    ref_compare_(ref_name_("lambda.%s", lambdas[i].name), values, 1e-6);
  }
  for (size_t i = 0; i < ARRAY_LEN(rates); i++) {
    const float *a = ref_floats_(ref_name_("lr.%s.args", rates[i].name), NULL);
    Schedule s = {rates[i].kind, (int64_t)a[0], (int64_t)a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
    for (int t = 0; t < (int)a[0]; t++) {
      values[t] = (float)lr_at(&s, t);
      decays[t] = (float)wd_at(&s, t);
    }
    ref_compare_(ref_name_("lr.%s", rates[i].name), values, 1e-6);
    ref_compare_(ref_name_("wd.%s", rates[i].name), decays, 1e-6);
  }
  ref_close_();
}

// ---------------------------------------------------------------------------------------------------------
// Whole models.

static double ref_setting_(const char *key) {
  const char *s = st_metadata(&ref_file_, key);
  if (s == NULL) die(EXIT_FAILED, "%s: no metadata %s", ref_file_.path, key);
  return atof(s);
}

static Config ref_config_(void) {
  Config c;
  memset(&c, 0, sizeof c);
  c.dim = (int)ref_setting_("dim");
  c.layers = (int)ref_setting_("layers");
  c.heads = (int)ref_setting_("heads");
  c.kv_heads = (int)ref_setting_("kv_heads");
  c.head_dim = (int)ref_setting_("head_dim");
  c.ffn_dim = (int)ref_setting_("ffn_dim");
  c.vocab = (int)ref_setting_("vocab");
  c.max_seq = (int)ref_setting_("max_seq");
  c.norm_eps = (float)ref_setting_("norm_eps");
  c.rope_theta = ref_setting_("rope_theta");
  c.rope_llama3 = (int)ref_setting_("rope_llama3");
  c.rope_factor = ref_setting_("rope_factor");
  c.rope_low_freq = ref_setting_("rope_low_freq");
  c.rope_high_freq = ref_setting_("rope_high_freq");
  c.rope_original_max = (int)ref_setting_("rope_original_max");
  c.activation = strcmp(st_metadata(&ref_file_, "activation"), "silu") == 0 ? ACT_SILU : ACT_RELU2;
  c.attn_sub_norm = (int)ref_setting_("attn_sub_norm");
  c.ffn_sub_norm = (int)ref_setting_("ffn_sub_norm");
  c.qkv_bias = (int)ref_setting_("qkv_bias");
  c.o_bias = (int)ref_setting_("o_bias");
  c.qk_norm = (int)ref_setting_("qk_norm");
  c.tie_embeddings = (int)ref_setting_("tie_embeddings");
  c.act_bits = (int)ref_setting_("act_bits");
  return c;
}

// Opens a dump and its model with the dump's parameters. The tensors of both must be the same ones.
static void ref_open_model_(Model *m, const char *name, int recompute, int codes_only) {
  int in_file = 0;
  ref_open_(name);
  Config c = ref_config_();
  const StTensor *tokens = ref_tensor_("tokens");
  model_open(m, &c, PRECISION_FP32);
  model_alloc_training(m, (int)tokens->shape[0], (int)tokens->shape[1], recompute, codes_only);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    size_t n;
    const float *x = ref_floats_(ref_name_("param.%s", t->name), &n);
    CHECK(n == t->n, "%s: %zu elements, wanted %zu", t->name, t->n, n);
    if (n == t->n) dev_copy_in(m->params + t->offset, x, n * sizeof(float));
  }
  for (size_t i = 0; i < ref_file_.n_tensors; i++) in_file += strncmp(ref_file_.tensors[i].name, "param.", 6) == 0;
  CHECK(in_file == m->table.count, "%s: %d tensors in the dump, %d in the table", name, in_file, m->table.count);
}

static void ref_close_model_(Model *m) {
  model_free(m);
  ref_close_();
}

// Batch number k of the four tensors prefix + tokens, targets, start, pos.
static Batch ref_batch_(const Model *m, const char *prefix, int k) {
  Batch b;
  size_t at = (size_t)k * (size_t)m->R;
  b.B = m->B;
  b.T = m->T;
  b.tokens = (int *)ref_integers_(ref_name_("%stokens", prefix), ST_I32, NULL) + at;
  b.targets = (int *)ref_integers_(ref_name_("%stargets", prefix), ST_I32, NULL) + at;
  b.start = (int *)ref_integers_(ref_name_("%sstart", prefix), ST_I32, NULL) + at;
  b.pos = (int *)ref_integers_(ref_name_("%spos", prefix), ST_I32, NULL) + at;
  b.n_targets = 0;
  for (int r = 0; r < m->R; r++) b.n_targets += b.targets[r] >= 0;
  return b;
}

typedef struct {
  const char *end;   // of a tensor's name
  double bound;
} RefBound;

// The bound of the first row that the name ends with.
static double ref_bound_(const RefBound *bounds, size_t n, const char *name) {
  size_t len = strlen(name);
  for (size_t i = 0; i < n; i++) {
    size_t k = strlen(bounds[i].end);
    if (len >= k && strcmp(name + len - k, bounds[i].end) == 0) return bounds[i].bound;
  }
  die(EXIT_FAILED, "bug: no bound for %s", name);
}

// Gradients are sums over all rows behind up to two layers of them, and the loss is a mean of logarithms of sums.
static const RefBound model_bounds_[] = {
  {"logits", 5e-6}, {"loss", 1e-6},
  {"embed_tokens.weight", 1e-5}, {"lm_head.weight", 5e-6}, {"q_proj.weight", 1e-5}, {"k_proj.weight", 1e-5}, {"v_proj.weight", 1e-5},
  {"o_proj.weight", 1e-5}, {"gate_proj.weight", 1e-5}, {"up_proj.weight", 1e-5}, {"down_proj.weight", 1e-5},
  {"norm.weight", 1e-5}, {"bias", 1e-5}};

// Logits, loss and all gradients at one lambda.
static void check_model_(const char *name, const char *label, float lambda, int recompute) {
  Model m;
  ref_open_model_(&m, name, recompute, lambda == 1.0f);
  Batch b = ref_batch_(&m, "", 0);
  float *coef = (float *)ref_host_memory_((size_t)m.R * sizeof(float));
  char what[32];
  snprintf(what, sizeof what, "l%s", label);

  model_quantize(&m, lambda);
  batch_to_device(&m, &b, 1.0f / (float)b.n_targets, coef);
  model_forward(&m);
  double sum = head_cross_entropy(&m, 0);   // without backward the logits stay where they are
  const char *logits = ref_name_("%s.logits", what);
  expect_act_(logits, m.logits, ref_bound_(model_bounds_, ARRAY_LEN(model_bounds_), logits));
  float loss = (float)(sum / (double)b.n_targets);
  ref_compare_(ref_name_("%s.loss", what), &loss, ref_bound_(model_bounds_, ARRAY_LEN(model_bounds_), "loss"));

  m.head_rows = 7;   // the classifier in four chunks
  sum = head_cross_entropy(&m, 1);
  loss = (float)(sum / (double)b.n_targets);
  ref_compare_(ref_name_("%s.loss", what), &loss, ref_bound_(model_bounds_, ARRAY_LEN(model_bounds_), "loss"));
  model_backward(&m);
  for (int i = 0; i < m.table.count; i++) {
    const Tensor *t = &m.table.tensors[i];
    double bound = ref_bound_(model_bounds_, ARRAY_LEN(model_bounds_), t->name);
    expect_param_(ref_name_("%s.grad.%s", what, t->name), m.grads + t->offset, bound);
  }
  ref_close_model_(&m);
}

static void test_ref_models(void) {
  static const char *const names[] = {"model_a", "model_b", "model_c"}, *const labels[] = {"0", "0.3", "1"};
  static const float lambdas[] = {0.0f, 0.3f, 1.0f};
  for (int i = 0; i < 3; i++) {
    for (int k = 0; k < 3; k++) {
      check_model_(names[i], labels[k], lambdas[k], 0);
      check_model_(names[i], labels[k], lambdas[k], 1);
    }
  }
}

static void test_ref_transformers(void) {
  check_model_("model_hf", "0", 0.0f, 0);
  check_model_("model_hf", "1", 1.0f, 0);
}

// Parameters move by about lr = 2e-3 in each of ten steps, and are of order 1e-1 to 1; norms are those before clipping.
static const RefBound step_bounds_[] = {{"losses10", 2e-6}, {"norms10", 2e-6}, {"weight", 5e-6}, {"bias", 5e-6}};

// Ten updates with clipping, weight decay and a rising lambda, each on its own batch.
static void check_steps_(const char *name) {
  Model m;
  float losses[10], norms[10];
  ref_open_model_(&m, name, 0, 0);
  const float *a = ref_floats_("steps.adamw", NULL), *lambda = ref_floats_("steps.lambda", NULL);
  float lr = a[0], beta1 = a[1], beta2 = a[2], eps = a[3], wd = a[4], clip = a[5];
  float *coef = (float *)ref_host_memory_((size_t)m.R * sizeof(float));
  for (int step = 0; step < 10; step++) {
    Batch b = ref_batch_(&m, "steps.", step);
    model_quantize(&m, lambda[step]);
    dev_zero(m.grads, m.table.floats * sizeof(float));
    losses[step] = (float)(batch_loss(&m, &b, 1.0f / (float)b.n_targets, coef, 1) / (double)b.n_targets);
    double norm = grad_norm(&m);
    norms[step] = (float)norm;
    adamw_step(&m, (float)clip_scale(norm, clip), lr, wd, beta1, beta2, eps, step + 1);
  }
  ref_compare_("losses10", losses, ref_bound_(step_bounds_, ARRAY_LEN(step_bounds_), "losses10"));
  ref_compare_("norms10", norms, ref_bound_(step_bounds_, ARRAY_LEN(step_bounds_), "norms10"));
  for (int i = 0; i < m.table.count; i++) {
    const Tensor *t = &m.table.tensors[i];
    expect_param_(ref_name_("after10.%s", t->name), m.params + t->offset, ref_bound_(step_bounds_, ARRAY_LEN(step_bounds_), t->name));
  }
  ref_close_model_(&m);
}

static void test_ref_ten_steps(void) {
  check_steps_("model_a");
  check_steps_("model_b");
  check_steps_("model_c");
  check_steps_("model_hf");
}

/*
Each layer of model_a by itself at lambda = 1, starting from the dump's own input and output gradient, so an error cannot hide in or
be blamed on another layer.
*/
static void test_ref_layers(void) {
  static const RefBound bounds[] = {{"qkv", 1e-6}, {"att", 1e-6}, {"mid", 1e-6}, {"gate_up", 1e-6}, {"out", 1e-6}, {"dx", 5e-6}};
  Model m;
  ref_open_model_(&m, "model_a", 0, 1);
  Batch b = ref_batch_(&m, "", 0);
  float *coef = (float *)ref_host_memory_((size_t)m.R * sizeof(float));
  batch_to_device(&m, &b, 1.0f, coef);
  model_quantize(&m, 1.0f);
  Context ctx = training_context_(&m);
  for (int l = 0; l < m.c.layers; l++) {
    LayerActs *a = &m.acts[l];
    char at[32];
    snprintf(at, sizeof at, "l1.layer%d", l);
    floatX *x = ref_act_(ref_name_("%s.x", at)), *out = ref_act_room_(ref_name_("%s.out", at));
    layer_forward(&m, l, a, out, x, &ctx);
    expect_qact_(ref_name_("%s.h1", at), &a->h1);
    expect_act_(ref_name_("%s.qkv", at), a->qkv, ref_bound_(bounds, ARRAY_LEN(bounds), "qkv"));
    expect_act_(ref_name_("%s.att", at), a->att, ref_bound_(bounds, ARRAY_LEN(bounds), "att"));
    expect_qact_(ref_name_("%s.h2", at), &a->h2);
    expect_act_(ref_name_("%s.mid", at), a->mid, ref_bound_(bounds, ARRAY_LEN(bounds), "mid"));
    expect_qact_(ref_name_("%s.h3", at), &a->h3);
    bitlinear_forward(a->gate_up, &a->h3, &m.weights[l].gate_up, NULL, m.R);   // the model keeps none
    expect_act_(ref_name_("%s.gate_up", at), a->gate_up, ref_bound_(bounds, ARRAY_LEN(bounds), "gate_up"));
    expect_qact_(ref_name_("%s.h4", at), &a->h4);
    expect_act_(ref_name_("%s.out", at), out, ref_bound_(bounds, ARRAY_LEN(bounds), "out"));
    size_t n = ref_count_(ref_name_("%s.dout", at));
    dev_floatx_in(m.dres, ref_floats_(ref_name_("%s.dout", at), NULL), n);
    layer_backward(&m, l, a, x, &ctx);
    expect_act_(ref_name_("%s.dx", at), m.dres, ref_bound_(bounds, ARRAY_LEN(bounds), "dx"));
  }
  ref_close_model_(&m);
}

#define REFERENCE_TESTS                                                                                            \
  {"ref_embedding", "embedding, both ways", test_ref_embedding},                                                   \
  {"ref_rmsnorm", "norm, norm with quantiser, gradient", test_ref_rmsnorm},                                        \
  {"ref_act_quant", "int8 and int4 codes, exact ties, tiny and huge rows", test_ref_act_quant},                    \
  {"ref_headnorm", "norm of each q and k head", test_ref_headnorm},                                                \
  {"ref_weight_quantize", "ternary codes and gamma, exact ties, tiny and huge weights", test_ref_weight_quantize},  \
  {"ref_bitlinear", "three lambdas, int8 and float inputs, int32 sums", test_ref_bitlinear},                       \
  {"ref_bitlinear_bf16", "the same with bf16 operands", test_ref_bitlinear_bf16},                                  \
  {"ref_linear", "the classifier's product", test_ref_linear},                                                     \
  {"ref_rope", "rotation and its inverse", test_ref_rope},                                                         \
  {"ref_rope_table", "angles against transformers, default and llama3", test_ref_rope_table},                      \
  {"ref_attention", "documents, grouped heads, cache, gradient", test_ref_attention},                              \
  {"ref_glu", "relu2 and silu, with and without sub-norm", test_ref_glu},                                          \
  {"ref_cross_entropy", "losses, ignored targets, coefficients", test_ref_cross_entropy},                          \
  {"ref_optimizer", "sum of squares, three AdamW updates", test_ref_optimizer},                                    \
  {"ref_schedules", "lambda, learning rate and weight decay of every step", test_ref_schedules},                   \
  {"ref_layers", "each layer of a model by itself", test_ref_layers},                                              \
  {"ref_models", "logits, loss and gradients of three models at three lambdas", test_ref_models},                  \
  {"ref_transformers", "the same from transformers' BitNetForCausalLM", test_ref_transformers},                    \
  {"ref_ten_steps", "ten AdamW steps of four models", test_ref_ten_steps}

#endif
