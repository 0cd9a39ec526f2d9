/*
test_float64.c: every backward pass against finite differences, in double.

What it is:  the CPU's ops and the model compiled once more with float replaced by double. Then a derivative is known to eleven digits
             from values of the function alone, and each handwritten gradient must agree with it.
What not:    float32 rounding, quantised values (test_ops.h), PyTorch (test_reference.h).
Read before: check.h, bitnet/ops.h, train_bitnet.c.

    gcc -O2 -fopenmp dev/test/test_float64.c -lm -o test_float64 && ./test_float64

Quantisation is a staircase; its derivative says nothing. "Straight-through" claims something else: take the rounding errors Q(v) - v
as constants; of that function the backward pass is the exact gradient. So for lambda > 0 the rounding errors of one
forward pass are recorded, and the function that is differentiated adds them back to unrounded values.
*/
#define BITNET_FLOAT64   // for the few lines that look at the bits of a float
#define TESTING

// The system's headers, while float still means float.
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#define float double
#define cosf cos
#define expf exp
#define fabsf fabs
#define fmaxf fmax
#define logf log
#define powf pow
#define rintf rint
#define sinf sin
#define sqrtf sqrt

#include "../../train_bitnet.c"   // all ops

// ---------------------------------------------------------------------------------------------------------
// The quantising ops with rounding errors that can be recorded and put back. bitnet/model.h, included below, calls
// these instead of the ops themselves.

enum { PLAIN, RECORD, REPLAY, MAX_RECORDS = 16 };
static int rounding_mode;             // PLAIN: the op itself
static int n_rounding;                // quantisers that this forward pass has met so far
static double *rounding[MAX_RECORDS];
static size_t rounding_size[MAX_RECORDS];

// The values [R,K] that a QAct stands for.
static void qact_values(double *out, const QAct *q, size_t R, size_t K) {
  for (size_t i = 0; i < R * K; i++) out[i] = has_codes(q) ? ((const int8_t *)q->data)[i] * q->s[i / K] : ((const double *)q->data)[i];
}

// out holds quantised values and exact [R,K] unrounded ones. Records the difference, or puts exact + recorded into out.
static void exchange_rounding(QAct *out, double *exact, size_t R, size_t K) {
  int k = n_rounding++;
  if (k >= MAX_RECORDS) die(EXIT_FAILED, "bug: more than %d quantisers", MAX_RECORDS);
  if (rounding_mode == RECORD) {
    rounding[k] = (double *)xrealloc(rounding[k], R * K * sizeof(double));
    rounding_size[k] = R * K;
    qact_values(rounding[k], out, R, K);
    for (size_t i = 0; i < R * K; i++) rounding[k][i] -= exact[i];
  } else {
    if (rounding_size[k] != R * K) die(EXIT_FAILED, "bug: quantiser %d has another size now", k);
    for (size_t i = 0; i < R * K; i++) ((double *)out->data)[i] = exact[i] + rounding[k][i];
  }
}

// A QAct without quantisation beside out.
static QAct unrounded(const QAct *out, size_t R, size_t K) {
  QAct q = *out;
  q.bits = 0;
  q.data = xmalloc(R * K * sizeof(double));
  return q;
}

static void act_quant_recorded(QAct *out, const double *x, int R, int K) {
  act_quant_forward(out, x, R, K);
  if (rounding_mode == PLAIN) return;
  QAct exact = unrounded(out, (size_t)R, (size_t)K);
  act_quant_forward(&exact, x, R, K);
  exchange_rounding(out, (double *)exact.data, (size_t)R, (size_t)K);
  free(exact.data);
}

static void rmsnorm_quant_recorded(QAct *out, double *rstd, const double *x, const double *gain, int R, int C, double eps) {
  rmsnorm_quant_forward(out, rstd, x, gain, R, C, eps);
  if (rounding_mode == PLAIN) return;
  QAct exact = unrounded(out, (size_t)R, (size_t)C);
  rmsnorm_quant_forward(&exact, rstd, x, gain, R, C, eps);
  exchange_rounding(out, (double *)exact.data, (size_t)R, (size_t)C);
  free(exact.data);
}

static void glu_quant_recorded(QAct *out, double *rstd, const double *gate_up, const double *gain, int R, int F, int act,
                               double eps) {
  glu_quant_forward(out, rstd, gate_up, gain, R, F, act, eps);
  if (rounding_mode == PLAIN) return;
  QAct exact = unrounded(out, (size_t)R, (size_t)F);
  glu_quant_forward(&exact, rstd, gate_up, gain, R, F, act, eps);
  exchange_rounding(out, (double *)exact.data, (size_t)R, (size_t)F);
  free(exact.data);
}

static void gated_recorded(QAct *out, double *rstd, double *gate_up, const QAct *x, const BitWeight *w, const double *gain, int R, int act,
                           double eps) {
  bitlinear_forward(gate_up, x, w, NULL, R);
  glu_quant_recorded(out, rstd, gate_up, gain, R, w->N / 2, act, eps);
}

#define act_quant_forward act_quant_recorded
#define rmsnorm_quant_forward rmsnorm_quant_recorded
#define gated_forward gated_recorded
#include "../../bitnet/policy.h"   // and bitnet/losses.h, bitnet/model.h
#include "../../bitnet/value.h"
#undef act_quant_forward
#undef rmsnorm_quant_forward
#undef gated_forward
#include "check.h"

// ---------------------------------------------------------------------------------------------------------
// Finite differences.

static const double OP_BOUND = 1e-9;      // relative to the largest element of a gradient
static const double MODEL_BOUND = 1e-7;   // its steps are smaller, see check_model

static uint64_t draws;

static double *normals(size_t n, double mean, double scale) {
  double *x = (double *)xmalloc(n * sizeof(double));
  for (size_t i = 0; i < n; i++) x[i] = mean + scale * rng_normal(21, RNG_TEST, draws++);
  return x;
}

static double *filled(size_t n, double value) {
  double *x = (double *)xmalloc(n * sizeof(double));
  for (size_t i = 0; i < n; i++) x[i] = value;
  return x;
}

static double dot(const double *a, const double *b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/*
Checks grad[0..n) against the derivative of f with respect to x[0..n). Central differences with steps h and 2h, combined so that
their errors of order h^2 cancel; what remains is of order h^4 and rounding, 1e-16 f / h. A NaN in grad fails.
*/
static void check_gradient(const char *name, double *x, const double *grad, size_t n, double (*f)(void *), void *arg, double h,
                           double bound) {
  double *want = filled(n, 0), top = 0;
  for (size_t i = 0; i < n; i++) {
    double old = x[i], at[4];
    static const int steps[4] = {1, -1, 2, -2};
    for (int k = 0; k < 4; k++) {
      x[i] = old + steps[k] * h;
      at[k] = f(arg);
    }
    x[i] = old;
    want[i] = (8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * h);
    top = fmax(top, fabs(want[i]));
  }
  CHECK(top > 1e-6, "%s: all derivatives are %g; the test sees nothing", name, top);
  CHECK_CLOSE(name, grad, want, n, bound);
  free(want);
}

/*
One op under test. in: its inputs; weight: what each output counts in the scalar that is differentiated, f = sum weight * out,
so weight is the gradient "dout" that the backward pass starts from.
*/
typedef struct {
  double *in[4], *out, *aux, *weight;
  size_t n_out;
  int *ints, *ints2;
  int R, C, form;
  BitWeight w;
} Op;

enum {
  R_ = 7, C_ = 11, V_ = 13,
  B_ = 2, T_ = 6, BT_ = B_ * T_,
  NH_ = 4, NKV_ = 2, HS_ = 6, QKV_ = (NH_ + 2 * NKV_) * HS_, ATT_ = NH_ * HS_
};
static const double EPS = 1e-2;   // of norms; large, so that it is seen

static void free_op(Op *o) {
  for (size_t i = 0; i < ARRAY_LEN(o->in); i++) free(o->in[i]);
  free(o->out);
  free(o->aux);
  free(o->weight);
  free(o->ints);
  free(o->ints2);
}

// Gradients that an op adds to start from these values; the test takes them off again.
static double *added_to(size_t n) {
  return normals(n, 5, 1);
}

static void take_off(double *grad, const double *start, size_t n) {
  for (size_t i = 0; i < n; i++) grad[i] -= start[i];
}

static double *copy_of(const double *x, size_t n) {
  return (double *)memcpy(xmalloc(n * sizeof(double)), x, n * sizeof(double));
}

// An op's (+=) gradient: start values in g and in start.
#define NEW_ADDED(g, n) double *g##_start = added_to(n), *g = copy_of(g##_start, n)
#define CHECK_ADDED(name, x, g, n, f, op)                              \
  do {                                                                 \
    take_off(g, g##_start, n);                                         \
    check_gradient(name, x, g, n, f, op, 1e-3, OP_BOUND);              \
    free(g);                                                           \
    free(g##_start);                                                   \
  } while (0)

// Embedding: tokens repeat.
static double f_embedding(void *arg) {
  Op *o = (Op *)arg;
  embedding_forward(o->out, o->ints, o->in[0], R_, C_);
  return dot(o->out, o->weight, R_ * C_);
}

static void test_embedding(void) {
  static const int tokens[R_] = {3, 0, 12, 3, 3, 5, 0};
  Op o;
  memset(&o, 0, sizeof o);
  o.in[0] = normals(V_ * C_, 0, 1);
  o.out = filled(R_ * C_, NAN);
  o.weight = normals(R_ * C_, 0, 1);
  o.ints = (int *)memcpy(xmalloc(sizeof tokens), tokens, sizeof tokens);
  NEW_ADDED(dwte, V_ * C_);
  embedding_backward(dwte, o.weight, o.ints, R_, V_, C_);
  CHECK_ADDED("dwte", o.in[0], dwte, V_ * C_, f_embedding, &o);
  free_op(&o);
}

// RMSNorm over more rows than one chunk of the sum for the gain holds.
static double f_rmsnorm(void *arg) {
  Op *o = (Op *)arg;
  rmsnorm_forward(o->out, o->aux, o->in[0], o->in[1], o->R, C_, EPS);
  return dot(o->out, o->weight, (size_t)o->R * C_);
}

static void test_rmsnorm(void) {
  Op o;
  memset(&o, 0, sizeof o);
  o.R = 2 * ROWS_PER_CHUNK + 3;
  size_t n = (size_t)o.R * C_, few = 5 * C_;
  o.in[0] = normals(n, 0, 1);
  o.in[1] = normals(C_, 1, 0.3);
  o.out = filled(n, NAN);
  o.aux = filled((size_t)o.R, NAN);
  o.weight = normals(n, 0, 1);
  NEW_ADDED(dx, n);
  NEW_ADDED(dgain, C_);
  f_rmsnorm(&o);
  rmsnorm_backward(dx, dgain, o.weight, o.in[0], o.in[1], o.aux, o.R, C_, 1);
  CHECK_ADDED("dgain", o.in[1], dgain, C_, f_rmsnorm, &o);
  o.R = 5;   // rows do not know each other: a few of them show dx
  CHECK_ADDED("dx", o.in[0], dx, few, f_rmsnorm, &o);
  free_op(&o);
}

static double f_headnorm(void *arg) {
  Op *o = (Op *)arg;
  headnorm_forward(o->out, o->aux, o->in[0], o->in[1], o->in[2], o->R, NH_, NKV_, HS_, EPS);
  return dot(o->out, o->weight, (size_t)o->R * QKV_);
}

static void test_headnorm(void) {
  Op o;
  memset(&o, 0, sizeof o);
  o.R = ROWS_PER_CHUNK + 2;
  size_t n = (size_t)o.R * QKV_;
  o.in[0] = normals(n, 0, 1);
  o.in[1] = normals(HS_, 1, 0.3);
  o.in[2] = normals(HS_, 1, 0.3);
  o.out = filled(n, NAN);
  o.aux = filled((size_t)o.R * (NH_ + NKV_), NAN);
  o.weight = normals(n, 0, 1);
  double *dqkv = copy_of(o.weight, n);   // replaced in place
  NEW_ADDED(dq, HS_);
  NEW_ADDED(dk, HS_);
  f_headnorm(&o);
  headnorm_backward(dqkv, dq, dk, o.in[0], o.in[1], o.in[2], o.aux, o.R, NH_, NKV_, HS_);
  CHECK_ADDED("dqgain", o.in[1], dq, HS_, f_headnorm, &o);
  CHECK_ADDED("dkgain", o.in[2], dk, HS_, f_headnorm, &o);
  o.R = 2;
  check_gradient("dqkv", o.in[0], dqkv, 2 * QKV_, f_headnorm, &o, 1e-3, OP_BOUND);
  free(dqkv);
  free_op(&o);
}

/*
BitLinear at lambda = 0, 0.3, 1 and with float activations. in[0], in[1]: the effective values of x and w, which are the
variables of the straight-through gradient; in[2]: bias; in[3]: residual.
*/
static double f_bitlinear(void *arg) {
  Op *o = (Op *)arg;
  QAct x = {o->in[0], NULL, 0, 0};
  weight_quantize(&o->w, o->in[1], 0);
  bitlinear_forward(o->out, &x, &o->w, o->in[3], R_);
  return dot(o->out, o->weight, o->n_out);
}

static void test_bitlinear(void) {
  static const struct { int bits; double lambda; const char *name; } forms[] = {
    {8, 0, "lambda 0: "}, {8, 0.3, "lambda 0.3: "}, {8, 1, "lambda 1: "}, {4, 1, "4 bits: "}, {0, 1, "weights only: "}};
  enum { N = 9 };
  for (size_t f = 0; f < ARRAY_LEN(forms); f++) {
    Op o;
    char name[64];
    memset(&o, 0, sizeof o);
    double *x = normals(R_ * C_, 0, 1), *master = normals(N * C_, 0, 0.5), *gamma = filled(N, 0), *s = filled(R_, 0);
    o.in[0] = filled(R_ * C_, 0);
    o.in[1] = copy_of(master, N * C_);
    o.in[2] = normals(N, 0, 1);
    o.in[3] = normals(R_ * N, 0, 1);
    o.n_out = R_ * N;
    o.out = filled(o.n_out, NAN);
    o.weight = normals(o.n_out, 0, 1);
    o.w.N = N, o.w.K = C_, o.w.parts[0] = 4, o.w.parts[1] = 3, o.w.parts[2] = 2;
    o.w.data = dev_malloc(bitweight_bytes(N, C_));
    o.w.gamma = gamma;
    o.w.bias = o.in[2];
    QAct q = {xmalloc(R_ * C_ * sizeof(double)), s, forms[f].lambda, forms[f].bits};
    act_quant_forward(&q, x, R_, C_);
    weight_quantize(&o.w, master, forms[f].lambda);
    NEW_ADDED(dw, N * C_);
    NEW_ADDED(dbias, N);
    double *dx = filled(R_ * C_, NAN);
    bitlinear_backward(dx, dw, dbias, o.weight, &q, &o.w, R_);
    qact_values(o.in[0], &q, R_, C_);
    for (int i = 0; i < N * C_; i++) {
      o.in[1][i] = forms[f].lambda == 1 ? ((const int8_t *)o.w.data)[i] * gamma[i / C_] : ((const double *)o.w.data)[i];
    }
    snprintf(name, sizeof name, "%sdx", forms[f].name);
    check_gradient(name, o.in[0], dx, R_ * C_, f_bitlinear, &o, 1e-3, OP_BOUND);
    snprintf(name, sizeof name, "%sdw", forms[f].name);
    CHECK_ADDED(name, o.in[1], dw, N * C_, f_bitlinear, &o);
    snprintf(name, sizeof name, "%sdbias", forms[f].name);
    CHECK_ADDED(name, o.in[2], dbias, N, f_bitlinear, &o);
    free(dx);
    free(x);
    free(master);
    free(gamma);
    free(s);
    free(q.data);
    dev_free(o.w.data);
    free_op(&o);
  }
}

static double f_linear(void *arg) {
  Op *o = (Op *)arg;
  linear_forward(o->out, o->in[0], o->in[1], R_, V_, C_, PRECISION_FP32);
  return dot(o->out, o->weight, R_ * V_);
}

static void test_linear(void) {
  Op o;
  memset(&o, 0, sizeof o);
  o.in[0] = normals(R_ * C_, 0, 1);
  o.in[1] = normals(V_ * C_, 0, 1);
  o.out = filled(R_ * V_, NAN);
  o.weight = normals(R_ * V_, 0, 1);
  double *dx = filled(R_ * C_, NAN);
  NEW_ADDED(dw, V_ * C_);
  linear_backward(dx, dw, o.weight, o.in[0], o.in[1], R_, V_, C_, PRECISION_FP32);
  check_gradient("dx", o.in[0], dx, R_ * C_, f_linear, &o, 1e-3, OP_BOUND);
  CHECK_ADDED("dw", o.in[1], dw, V_ * C_, f_linear, &o);
  free(dx);
  free_op(&o);
}

// RoPE works in place; direction -1 must be the gradient of direction +1.
static double f_rope(void *arg) {
  Op *o = (Op *)arg;
  memcpy(o->out, o->in[0], R_ * QKV_ * sizeof(double));
  rope_apply(o->out, o->ints, o->in[1], R_, NH_, NKV_, HS_, 1);
  return dot(o->out, o->weight, R_ * QKV_);
}

static void test_rope(void) {
  static const int pos[R_] = {0, 1, 2, 9, 0, 4, 4};
  Op o;
  Config c;
  memset(&o, 0, sizeof o);
  memset(&c, 0, sizeof c);
  c.head_dim = HS_, c.max_seq = 10, c.rope_theta = 20;
  o.in[0] = normals(R_ * QKV_, 0, 1);
  o.in[1] = filled(10 * HS_, 0);
  rope_table(o.in[1], &c);
  o.out = filled(R_ * QKV_, NAN);
  o.weight = normals(R_ * QKV_, 0, 1);
  o.ints = (int *)memcpy(xmalloc(sizeof pos), pos, sizeof pos);
  double *dqkv = copy_of(o.weight, R_ * QKV_);
  rope_apply(dqkv, o.ints, o.in[1], R_, NH_, NKV_, HS_, -1);
  check_gradient("dqkv", o.in[0], dqkv, R_ * QKV_, f_rope, &o, 1e-3, OP_BOUND);
  free(dqkv);
  free_op(&o);
}

// Attention inside documents, two query heads on each key/value head.
static double f_attention(void *arg) {
  Op *o = (Op *)arg;
  attention_forward(o->out, o->aux, o->in[0], o->ints, B_, T_, NH_, NKV_, HS_, PRECISION_FP32);
  return dot(o->out, o->weight, BT_ * ATT_);
}

static void test_attention(void) {
  static const int start[BT_] = {0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 3, 3};
  Op o;
  memset(&o, 0, sizeof o);
  o.in[0] = normals(BT_ * QKV_, 0, 1);
  o.out = filled(BT_ * ATT_, NAN);
  o.aux = filled(BT_ * NH_, NAN);
  o.weight = normals(BT_ * ATT_, 0, 1);
  o.ints = (int *)memcpy(xmalloc(sizeof start), start, sizeof start);
  double *dqkv = filled(BT_ * QKV_, NAN);
  f_attention(&o);
  attention_backward(dqkv, o.weight, o.out, o.aux, o.in[0], o.ints, B_, T_, NH_, NKV_, HS_, PRECISION_FP32);
  check_gradient("dqkv", o.in[0], dqkv, BT_ * QKV_, f_attention, &o, 1e-3, OP_BOUND);
  free(dqkv);
  free_op(&o);
}

// One long document: the running softmax over several blocks of keys. A part of the inputs is enough.
static double f_long_attention(void *arg) {
  Op *o = (Op *)arg;
  attention_forward(o->out, o->aux, o->in[0], o->ints, 1, o->R, 1, 1, 2, PRECISION_FP32);
  return dot(o->out, o->weight, (size_t)o->R * 2);
}

static void test_long_attention(void) {
  Op o;
  memset(&o, 0, sizeof o);
  o.R = 2 * KV_BLOCK + 5;
  size_t n = (size_t)o.R * 6;
  o.in[0] = normals(n, 0, 2);
  o.out = filled((size_t)o.R * 2, NAN);
  o.aux = filled((size_t)o.R, NAN);
  o.weight = normals((size_t)o.R * 2, 0, 1);
  o.ints = (int *)xcalloc((size_t)o.R, sizeof(int));
  double *dqkv = filled(n, NAN);
  f_long_attention(&o);
  attention_backward(dqkv, o.weight, o.out, o.aux, o.in[0], o.ints, 1, o.R, 1, 1, 2, PRECISION_FP32);
  check_gradient("dqkv", o.in[0], dqkv, n, f_long_attention, &o, 1e-3, OP_BOUND);
  free(dqkv);
  free_op(&o);
}

// The gated unit, without quantiser. form: bit 0 = silu, bit 1 = norm.
static double f_glu(void *arg) {
  Op *o = (Op *)arg;
  QAct out = {o->out, NULL, 0, 0};
  glu_quant_forward(&out, o->aux, o->in[0], o->form & 2 ? o->in[1] : NULL, R_, C_, o->form & 1 ? ACT_SILU : ACT_RELU2, EPS);
  return dot(o->out, o->weight, R_ * C_);
}

static void test_glu(void) {
  static const char *const names[] = {"relu2", "silu", "relu2 and norm", "silu and norm"};
  for (int form = 0; form < 4; form++) {
    Op o;
    char name[64];
    memset(&o, 0, sizeof o);
    o.form = form;
    o.in[0] = normals(R_ * 2 * C_, 0, 1);
    for (int i = 0; i < R_ * 2 * C_; i++) {   // relu2 has a bend in its slope at 0: no step may cross it
      if (fabs(o.in[0][i]) < 0.01) o.in[0][i] += 0.1;
    }
    o.in[1] = normals(C_, 1, 0.3);
    o.out = filled(R_ * C_, NAN);
    o.aux = filled(R_, NAN);
    o.weight = normals(R_ * C_, 0, 1);
    double *dgate_up = filled(R_ * 2 * C_, NAN), *dout = copy_of(o.weight, R_ * C_);
    NEW_ADDED(dgain, C_);
    f_glu(&o);
    glu_backward(dgate_up, form & 2 ? dgain : NULL, dout, o.in[0], form & 2 ? o.in[1] : NULL, o.aux, R_, C_,
                 form & 1 ? ACT_SILU : ACT_RELU2);
    snprintf(name, sizeof name, "%s: dgate_up", names[form]);
    check_gradient(name, o.in[0], dgate_up, R_ * 2 * C_, f_glu, &o, 1e-3, OP_BOUND);
    if (form & 2) {
      snprintf(name, sizeof name, "%s: dgain", names[form]);
      CHECK_ADDED(name, o.in[1], dgain, C_, f_glu, &o);
    } else {
      free(dgain);
      free(dgain_start);
    }
    free(dgate_up);
    free(dout);
    free_op(&o);
  }
}

// weight: the coefficients of the rows.
static double f_cross_entropy(void *arg) {
  Op *o = (Op *)arg;
  cross_entropy_forward(o->out, o->aux, o->in[0], o->ints, R_, V_);
  return dot(o->out, o->weight, R_);
}

static void test_cross_entropy(void) {
  static const int targets[R_] = {0, 12, -1, 4, 4, -100, 7};
  Op o;
  memset(&o, 0, sizeof o);
  o.in[0] = normals(R_ * V_, 0, 2);
  o.out = filled(R_, NAN);
  o.aux = filled(R_, NAN);
  o.weight = normals(R_, 0, 1);
  o.ints = (int *)memcpy(xmalloc(sizeof targets), targets, sizeof targets);
  f_cross_entropy(&o);
  double *dlogits = copy_of(o.in[0], R_ * V_);
  cross_entropy_backward(dlogits, o.aux, o.ints, o.weight, R_, V_);
  check_gradient("dlogits", o.in[0], dlogits, R_ * V_, f_cross_entropy, &o, 1e-3, OP_BOUND);
  free(dlogits);
  free_op(&o);
}

// ---------------------------------------------------------------------------------------------------------
// The whole model.

enum { BITNET_STYLE, CONVERTED_STYLE, ODD_STYLE };

static Config tiny_config(int style) {
  Config c;
  memset(&c, 0, sizeof c);
  c.dim = 8, c.layers = 2, c.heads = 2, c.kv_heads = 1, c.head_dim = 4, c.ffn_dim = 12, c.vocab = V_, c.max_seq = 16;
  c.norm_eps = 1e-3;
  c.rope_theta = 50;
  c.attn_sub_norm = c.ffn_sub_norm = c.tie_embeddings = 1;
  c.act_bits = 8;
  c.init_std = 0.4;
  if (style == CONVERTED_STYLE) {
    c.activation = ACT_SILU;
    c.attn_sub_norm = c.ffn_sub_norm = c.tie_embeddings = 0;
    c.qkv_bias = c.o_bias = c.qk_norm = 1;
  } else if (style == ODD_STYLE) {
    c.dim = 7, c.heads = 3, c.head_dim = 2, c.ffn_dim = 5;
    c.act_bits = 4;
    c.activation = ACT_SILU;   // sums of a few 4-bit codes are often exactly 0, where the slope of relu2 has its bend
    c.attn_sub_norm = 0;
  }
  return c;
}

// A model whose gains and biases are not all the same, and a batch with documents and ignored targets.
static void open_tiny(Model *m, const Config *c, int recompute) {
  static const int start[BT_] = {0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 3, 3}, pos[BT_] = {0, 1, 2, 3, 4, 5, 0, 1, 0, 0, 1, 2};
  model_open(m, c, PRECISION_FP32);
  model_init_random(m, 5);
  model_alloc_training(m, B_, T_, recompute, 0);
  m->head_rows = 5;   // the classifier in three pieces
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (!(t->flags & (NORM | BIAS))) continue;
    for (size_t k = 0; k < t->n; k++) m->params[t->offset + k] += 0.3 * rng_normal(6, RNG_TEST, (uint64_t)i << 32 | k);
  }
  for (int i = 0; i < BT_; i++) {
    m->tokens[i] = (int)rng_below(7, RNG_TEST, (uint64_t)i, V_);
    m->targets[i] = i % 5 == 3 ? -1 : (int)rng_below(8, RNG_TEST, (uint64_t)i, V_);
    m->coef[i] = 0.1 + 0.01 * i;
    m->start[i] = start[i];
    m->pos[i] = pos[i];
  }
}

// The weighted loss after model_quantize at lambda = 0 of m's parameters; in REPLAY mode with recorded rounding errors.
static double f_model(void *arg) {
  Model *m = (Model *)arg;
  n_rounding = 0;
  model_quantize(m, 0);
  model_forward(m);
  head_cross_entropy(m, 0);
  return dot(m->losses, m->coef, BT_);
}

/*
Gradients of all parameters at lambda. The function that is differentiated is a second model, smooth: it runs at lambda = 0, its
ternary tensors hold the effective weights w + lambda (Q(w) - w), and its quantisers add the recorded rounding errors. The slope of
relu2 has a bend at 0, so no gate may lie there and the steps are small, 1e-5; rounding then leaves eight digits.
*/
static void check_model(int style, double lambda, int recompute) {
  Config c = tiny_config(style);
  Model m, smooth;
  open_tiny(&m, &c, recompute);
  open_tiny(&smooth, &c, 0);
  rounding_mode = RECORD;
  n_rounding = 0;
  model_quantize(&m, lambda);
  model_forward(&m);
  rounding_mode = PLAIN;
  CHECK(n_rounding == 4 * c.layers, "%d quantisers in %d layers", n_rounding, c.layers);
  for (int l = 0; l < (recompute ? 0 : c.layers) && c.activation == ACT_RELU2; l++) {
    for (int i = 0; i < BT_ * c.ffn_dim; i++) {
      double gate = m.acts[l].gate_up[i / c.ffn_dim * 2 * c.ffn_dim + i % c.ffn_dim];
      CHECK(fabs(gate) > 1e-3, "a gate of layer %d is %g: too near to the bend of relu2 to be differentiated", l, gate);
    }
  }
  head_cross_entropy(&m, 1);
  double loss = dot(m.losses, m.coef, BT_), rounded = 0;
  model_backward(&m);

  for (int l = 0; l < c.layers; l++) {
    const LayerSlots *s = &m.table.layers[l];
    const BitWeight *w[4] = {&m.weights[l].qkv, &m.weights[l].o, &m.weights[l].gate_up, &m.weights[l].down};
    const size_t at[4] = {s->qkv, s->o, s->gate_up, s->down};
    for (int k = 0; k < 4; k++) {
      for (size_t i = 0; i < (size_t)w[k]->N * (size_t)w[k]->K; i++) {
        double gamma = w[k]->gamma[i / (size_t)w[k]->K];
        double value = lambda == 1 ? ((const int8_t *)w[k]->data)[i] * gamma : ((const double *)w[k]->data)[i];
        rounded += fabs(value - m.params[at[k] + i]);
        smooth.params[at[k] + i] = value;
      }
    }
  }
  CHECK(lambda == 0 ? rounded == 0 : rounded > 1, "lambda %g: weights moved by %g in all", lambda, rounded);
  rounding_mode = REPLAY;
  double again = f_model(&smooth);
  CHECK(fabs(again - loss) < 1e-12, "style %d, lambda %g: loss %.15g, of the smooth function %.15g", style, lambda, loss, again);
  for (int i = 0; i < m.table.count; i++) {
    const Tensor *t = &m.table.tensors[i];
    char name[160];
    snprintf(name, sizeof name, "style %d, lambda %g, recompute %d: %s", style, lambda, recompute, t->name);
    check_gradient(name, smooth.params + t->offset, m.grads + t->offset, t->n, f_model, &smooth, 1e-5, MODEL_BOUND);
  }
  rounding_mode = PLAIN;
  for (int k = 0; k < MAX_RECORDS; k++) {
    free(rounding[k]);
    rounding[k] = NULL;
  }
  model_free(&m);
  model_free(&smooth);
}

static void test_model_float(void) {
  for (int style = BITNET_STYLE; style <= ODD_STYLE; style++) check_model(style, 0, 0);
}

static void test_model_straight_through(void) {
  for (int style = BITNET_STYLE; style <= ODD_STYLE; style++) {
    check_model(style, 1, 0);
    check_model(style, 0.3, 0);
  }
}

static void test_model_recompute(void) {
  check_model(BITNET_STYLE, 1, 1);
  check_model(CONVERTED_STYLE, 0, 1);
}

// ---------------------------------------------------------------------------------------------------------
// The policy's loss, from the classifier's input on.

// in[0]: logits, in[1]: the reference's; weight: coefficients of the token's loss, kl_weight: of the penalty.
typedef struct {
  Op o;
  double *ref_lse, *kl, *kl_weight;
} PolicyOp;

static double f_policy(void *arg) {
  PolicyOp *p = (PolicyOp *)arg;
  Op *o = &p->o;
  static const double zeros[R_];
  double *scratch = copy_of(o->in[0], R_ * V_);
  cross_entropy_forward(o->out, o->aux, scratch, o->ints, R_, V_);
  policy_backward(p->kl, scratch, o->aux, o->in[1], p->ref_lse, o->ints, zeros, zeros, R_, V_);
  free(scratch);
  return dot(o->out, o->weight, R_) + dot(p->kl, p->kl_weight, R_);
}

static void test_policy_op(void) {
  static const int targets[R_] = {0, 12, -1, 4, 4, -100, 7};
  PolicyOp p;
  Op *o = &p.o;
  memset(&p, 0, sizeof p);
  o->in[0] = normals(R_ * V_, 0, 2);
  o->in[1] = normals(R_ * V_, 0, 2);
  o->out = filled(R_, NAN);
  o->aux = filled(R_, NAN);
  o->weight = normals(R_, 0, 1);
  o->ints = (int *)memcpy(xmalloc(sizeof targets), targets, sizeof targets);
  p.ref_lse = filled(R_, NAN);
  p.kl = filled(R_, NAN);
  p.kl_weight = normals(R_, 0, 1);
  cross_entropy_forward(o->out, p.ref_lse, o->in[1], o->ints, R_, V_);
  f_policy(&p);
  for (int r = 0; r < R_; r++) CHECK(targets[r] < 0 ? p.kl[r] == 0 : p.kl[r] > 0, "KL of row %d: %g", r, p.kl[r]);
  double *dlogits = copy_of(o->in[0], R_ * V_);
  policy_backward(p.kl, dlogits, o->aux, o->in[1], p.ref_lse, o->ints, o->weight, p.kl_weight, R_, V_);
  check_gradient("dlogits", o->in[0], dlogits, R_ * V_, f_policy, &p, 1e-3, OP_BOUND);
  free(dlogits);
  free(p.ref_lse);
  free(p.kl);
  free(p.kl_weight);
  free_op(o);
}

typedef struct {
  Model *m, *ref;
  PolicyLoss loss;
  PolicyRows rows;
  double *coef;
  PolicyStats stats;
} PolicyCase;

static double f_head_policy(void *arg) {
  PolicyCase *p = (PolicyCase *)arg;
  memset(&p->stats, 0, sizeof p->stats);
  head_policy(p->m, p->ref, &p->loss, &p->rows, p->coef, &p->stats, 0);
  return p->stats.loss;
}

/*
Every estimate of the penalty under every reduction, with tokens on both sides of the clipping range and advantages of both signs. The
loss has a bend at each end of the range; the fixed seed puts no token there.
*/
static void test_policy_head(void) {
  static const size_t lengths[3] = {5, 3, 2};   // of three answers
  Config c = tiny_config(BITNET_STYLE);
  Model m, ref;
  PolicyCase p;
  open_tiny(&m, &c, 0);
  open_tiny(&ref, &c, 0);
  for (size_t i = 0; i < ref.table.floats; i++) ref.params[i] += 0.2 * rng_normal(9, RNG_TEST, i);
  model_quantize(&m, 0);
  model_forward(&m);
  model_quantize(&ref, 0);
  model_forward(&ref);
  memset(&p, 0, sizeof p);
  p.m = &m;
  p.ref = &ref;
  p.coef = filled(BT_, 0);
  double *logp = filled(BT_, 0);
  p.rows.weight = filled(BT_, 0);
  p.rows.advantage = normals(BT_, 0, 1);
  p.rows.old_logp = normals(BT_, 0, 0.3);
  p.rows.ref_logp = filled(BT_, 0);
  p.rows.copies = filled(BT_, 1);
  policy_logp(&ref, p.rows.ref_logp);
  policy_logp(&m, logp);
  for (int i = 0; i < BT_; i++) p.rows.old_logp[i] += logp[i];
  for (int reduction = REDUCE_SEQ; reduction <= REDUCE_DR; reduction++) {
    for (int kl = KL_FULL; kl <= KL_SEED; kl++) {
      char name[64];
      snprintf(name, sizeof name, "dfinal, reduction %d, penalty %d", reduction, kl);
      p.loss.clip_low = 0.2;
      p.loss.clip_high = 0.28;
      p.loss.beta = 0.7;
      p.loss.kl = kl;
      for (int i = 0, answer = 0, at = 0; i < BT_; i++) {
        p.rows.weight[i] = m.targets[i] < 0 ? 0 : policy_weight(reduction, lengths[answer], 3, 10, 7);
        if (m.targets[i] >= 0 && ++at == (int)lengths[answer]) answer++, at = 0;
      }
      memset(&p.stats, 0, sizeof p.stats);
      head_policy(&m, &ref, &p.loss, &p.rows, p.coef, &p.stats, 1);
      CHECK(p.stats.tokens == 10 && p.stats.clipped >= 2 && p.stats.clipped <= 8, "%g tokens, %g of them clipped", p.stats.tokens,
            p.stats.clipped);
      double *dfinal = copy_of(m.dfinal, BT_ * (size_t)c.dim);
      check_gradient(name, m.final, dfinal, BT_ * (size_t)c.dim, f_head_policy, &p, 1e-4, 1e-8);
      free(dfinal);
    }
  }
  free(logp);
  free(p.coef);
  free(p.rows.weight);
  free(p.rows.advantage);
  free(p.rows.old_logp);
  free(p.rows.ref_logp);
  free(p.rows.copies);
  model_free(&m);
  model_free(&ref);
}

// ---------------------------------------------------------------------------------------------------------
// Reward models: a pair and a labelled answer, from their losses down to the embedding.

typedef struct {
  Model *m;
  ValueHead head;
  double values[3], slopes[3];
} ValueCase;

static double f_value(void *arg) {
  ValueCase *v = (ValueCase *)arg;
  double slope;
  model_quantize(v->m, 0);
  model_forward(v->m);
  value_forward(&v->head, v->m, 3, v->values);
  double loss = loss_pair(v->values[0], v->values[1], &v->slopes[0]);
  v->slopes[1] = -v->slopes[0];
  loss += 0.7 * loss_label(v->values[2], 1, &slope);
  v->slopes[2] = 0.7 * slope;
  return loss;
}

static void test_value_head(void) {
  static const int ends[3] = {3, 6, BT_ - 1};   // in three documents, not always their last token
  Config c = tiny_config(BITNET_STYLE);
  Model m;
  ValueCase v;
  c.value_head = 1;
  open_tiny(&m, &c, 0);
  memset(&v, 0, sizeof v);
  v.m = &m;
  value_open(&v.head, &m, 3);
  memcpy(v.head.end, ends, sizeof ends);
  f_value(&v);
  double *start = added_to(m.table.floats);
  memcpy(m.grads, start, m.table.floats * sizeof(double));
  value_backward(&v.head, &m, 3, v.slopes);
  model_backward(&m);
  take_off(m.grads, start, m.table.floats);
  for (int i = 0; i < m.table.count; i++) {
    const Tensor *t = &m.table.tensors[i];
    char name[160];
    snprintf(name, sizeof name, "value head: %s", t->name);
    check_gradient(name, m.params + t->offset, m.grads + t->offset, t->n, f_value, &v, 1e-5, MODEL_BOUND);
  }
  // Values far from 0: no overflow, and the slope of the losing side stays.
  double slope;
  CHECK(fabs(loss_pair(-900, 900, &slope) - 1800) < 1e-9 && slope == -1, "a pair far off: slope %g", slope);
  CHECK(loss_pair(900, -900, &slope) == 0 && slope == 0, "a pair far apart: slope %g", slope);
  CHECK(fabs(loss_label(-900, 1, &slope) - 900) < 1e-9 && slope == -1, "a label far off: slope %g", slope);
  value_free(&v.head);
  free(start);
  model_free(&m);
}

static const Test tests[] = {
  {"embedding", "dwte", test_embedding},
  {"rmsnorm", "dx, dgain", test_rmsnorm},
  {"headnorm", "dqkv, dqgain, dkgain", test_headnorm},
  {"bitlinear", "dx, dw, dbias at every lambda, straight-through", test_bitlinear},
  {"linear", "dx, dw", test_linear},
  {"rope", "the inverse rotation is the gradient", test_rope},
  {"attention", "dqkv with documents and grouped heads", test_attention},
  {"long_attention", "dqkv over several blocks of keys", test_long_attention},
  {"glu", "dgate_up, dgain: relu2, silu, with and without norm", test_glu},
  {"cross_entropy", "dlogits with coefficients and ignored targets", test_cross_entropy},
  {"policy_op", "dlogits of a policy near a reference", test_policy_op},
  {"policy_head", "the clipped objective: every penalty, every reduction", test_policy_head},
  {"value_head", "reward models: losses of pairs and labels, all parameters", test_value_head},
  {"model_float", "all parameters of three models at lambda = 0", test_model_float},
  {"model_straight_through", "all parameters at lambda = 1 and 0.3, rounding errors held", test_model_straight_through},
  {"model_recompute", "the same with recomputed activations", test_model_recompute},
};

int main(int argc, char **argv) {
  wait_briefly(argv);
  const char *filter = argc > 1 ? argv[1] : NULL;
  Config c = tiny_config(BITNET_STYLE);
  dev_init(0);
  model_reserve_scratch(&c, 4 * ROWS_PER_CHUNK);
  printf("%s, in double\n", dev_name());
  if (filter && strcmp(filter, "--list") == 0) {
    for (size_t i = 0; i < ARRAY_LEN(tests); i++) printf("%-28s %s\n", tests[i].name, tests[i].about);
    return 0;
  }
  return run_tests(tests, ARRAY_LEN(tests), filter);
}
