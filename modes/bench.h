/*
bench.h: how fast is it, and where does the time go.

What it is:  ./train_bitnet bench            everything below
             ./train_bitnet bench peaks      what the machine can do, by short loops of our own
             ./train_bitnet bench products   each product of three models, as a share of the peak of its number format
             ./train_bitnet bench train      whole training steps of three models, tokens/s; train/124m_t1024/32 and
                                             train/1.3b_t1024/8 (the last number is the batch) are for GPUs, and run only when named
             ./train_bitnet bench ops        one training step of each model taken apart: ms per op and its share
             ./train_bitnet bench decode     prompts and decoding with a packed model of two billion weights; decode/64 decodes 64
                                             sequences at once (1 to 64) and leaves the rest out
             Rows of name, shape, value, unit. Times are medians. The same shapes run in dev/bench_torch.py.
What not:    no comparison; the scripts in dev/ put the rows of two programs side by side.
Read before: bitnet/ops.h, bitnet/model.h. Decoding is in bench_infer.h.
Defines:     mode_bench.
*/
#ifndef MODE_BENCH_H
#define MODE_BENCH_H

#include "../bitnet/losses.h"
#include "../bitnet/optim.h"
#include "../bitnet/options.h"
#include "bench_infer.h"
#include "bench_rows.h"

enum { BENCH_RUNS = 7 };

// The three models of dev/SPEED.md: parameters in the name, then the micro-batch.
typedef struct {
  const char *name;
  int B, T, dim, layers, heads, kv_heads, ffn, vocab;
} BenchModel;

static const BenchModel bench_models[] = {
    {"5.1m", 64, 64, 256, 6, 8, 8, 768, 128},
    {"12m", 16, 256, 384, 6, 8, 4, 1152, 2048},
    {"124m", 4, 256, 768, 12, 12, 12, 2048, 50257}};

// Shapes for GPUs, run only by name.
static const BenchModel bench_gpu_models[] = {
    {"124m_t1024", 32, 1024, 768, 12, 12, 12, 2048, 50257},
    {"1.3b_t1024", 8, 1024, 2048, 24, 32, 32, 5460, 32000}};

// One number to the host: waits until the device has finished what it was asked to do.
static void bench_wait_(const void *device) {
  char byte;
  dev_copy_out(&byte, device, 1);
}

static void bench_peaks_(void) {
  Peaks p;
  dev_peaks(&p);
  bench_row_("peak_fp32", "", p.fp32 / 1e9, "GFLOP/s");
  bench_row_("peak_bf16", "", p.bf16 / 1e9, "GFLOP/s");
  bench_row_("peak_int8", "", p.int8 / 1e9, "GOP/s");
  bench_row_("peak_read", "", p.read / 1e9, "GB/s");
}

// ---------------------------------------------------------------------------------------------------------
// A model with everything that a step needs, and random tokens.

typedef struct {
  Model m;
  Batch batch;
  float *coef;
  const BenchModel *b;
} Bench;

static void bench_open_(Bench *x, const BenchModel *b, float lambda, int dx_int8) {
  Config c;
  bench_config_(&c, b->dim, b->layers, b->heads, b->kv_heads, b->ffn, b->vocab, b->T);
  x->b = b;
  model_open(&x->m, &c, PRECISION_BF16);
  model_init_random(&x->m, 1);
  x->m.dx_int8 = dx_int8;
  model_alloc_training(&x->m, b->B, b->T, 0, lambda == 1.0f);
  batch_alloc(&x->batch, b->B, b->T);
  x->coef = (float *)xcalloc((size_t)x->m.R, sizeof(float));
  for (int r = 0; r < x->m.R; r++) {
    x->batch.tokens[r] = (int)rng_below(1, RNG_TEST, (uint64_t)r, (uint64_t)b->vocab);
    x->batch.targets[r] = (int)rng_below(2, RNG_TEST, (uint64_t)r, (uint64_t)b->vocab);
    x->batch.start[r] = 0;
    x->batch.pos[r] = r % b->T;
  }
  x->batch.n_targets = (size_t)x->m.R;
}

static void bench_close_(Bench *x) {
  model_free(&x->m);
  batch_free(&x->batch);
  free(x->coef);
}

static void bench_step_(Bench *x, float lambda, int t) {
  Model *m = &x->m;
  model_quantize(m, lambda);
  dev_zero(m->grads, m->table.floats * sizeof(float));
  batch_loss(m, &x->batch, 1.0f / (float)m->R, x->coef, 1);
  double norm = grad_norm(m);
  adamw_step(m, (float)clip_scale(norm, 1.0), 1e-4, 0.1, 0.9, 0.95, 1e-8, t);
  bench_wait_(m->params);
}

static void bench_train_model_(const BenchModel *b, int dx_int8) {
  const float lambdas[] = {1.0f, 0.5f};
  for (size_t l = 0; l < ARRAY_LEN(lambdas); l++) {
    Bench x;
    double times[BENCH_RUNS];
    char shape[64];
    bench_open_(&x, b, lambdas[l], dx_int8);
    for (int k = -1; k < BENCH_RUNS; k++) {
      double t0 = time_now();
      bench_step_(&x, lambdas[l], k + 2);
      if (k >= 0) times[k] = time_now() - t0;
    }
    snprintf(shape, sizeof shape, "%s B=%d T=%d lambda=%g", b->name, b->B, b->T, (double)lambdas[l]);
    bench_row_("train_step", shape, (double)x.m.R / bench_median_(times, BENCH_RUNS), "tokens/s");
    bench_close_(&x);
  }
}

// only: a name, and for the shapes of GPUs a batch behind a slash; empty: the three models.
static void bench_train_(const char *only, int dx_int8) {
  int known = 0;
  for (size_t i = 0; i < ARRAY_LEN(bench_models); i++) {
    if (only[0] && strcmp(only, bench_models[i].name) != 0) continue;
    bench_train_model_(&bench_models[i], dx_int8);
    known = 1;
  }
  for (size_t i = 0; i < ARRAY_LEN(bench_gpu_models); i++) {
    BenchModel b = bench_gpu_models[i];
    size_t len = strlen(b.name);
    if (strncmp(only, b.name, len) != 0 || (only[len] != 0 && only[len] != '/')) continue;
    if (only[len] == '/') {
      char *end;
      long batch = strtol(only + len + 1, &end, 10);
      if (batch < 1 || batch > 4096 || *end)
        die(EXIT_USAGE, "bench train/%s/BATCH: expected 1 to 4096, found '%s'", b.name, only + len + 1);
      b.B = (int)batch;
    }
    bench_train_model_(&b, dx_int8);
    known = 1;
  }
  if (!known) die(EXIT_USAGE, "bench train/%s: expected 5.1m, 12m, 124m, 124m_t1024[/BATCH] or 1.3b_t1024[/BATCH]", only);
}

// ---------------------------------------------------------------------------------------------------------
// One step taken apart: each op of a block on the buffers of the model, times the number of blocks.

enum {
  OP_QUANTIZE,
  OP_NORM,
  OP_QKV,
  OP_ROPE,
  OP_ATTENTION,
  OP_O,
  OP_GATED,
  OP_DOWN,
  OP_HEAD,
  OP_QKV_BACK,
  OP_ATTENTION_BACK,
  OP_O_BACK,
  OP_GATE_UP_BACK,
  OP_GATED_BACK,
  OP_DOWN_BACK,
  OP_NORM_BACK,
  OP_HEAD_BACK,
  OP_EMBEDDING,
  OP_UPDATE,
  OP_COUNT
};

static const char *const bench_op_names[OP_COUNT] = {"weight_quantize",
                                                     "rmsnorm_quant x2",
                                                     "qkv",
                                                     "rope",
                                                     "attention",
                                                     "o",
                                                     "gate_up + gated unit",
                                                     "down",
                                                     "classifier + loss",
                                                     "qkv backward",
                                                     "attention backward",
                                                     "o backward",
                                                     "gate_up backward",
                                                     "gate_up again + gated unit backward",
                                                     "down backward",
                                                     "rmsnorm backward x3",
                                                     "classifier backward",
                                                     "embedding",
                                                     "norm + adamw"};

// Rows of the feed-forward half of a block at a time.
static int bench_block_(const Model *m) {
  return m->R < ops_row_block() ? m->R : ops_row_block();
}

// How often a step calls an op.
static double bench_calls_(const Model *m, int op) {
  double layers = m->c.layers, blocks = layers * m->R / bench_block_(m);
  switch (op) {
    case OP_EMBEDDING:
    case OP_UPDATE: return 1;
    case OP_HEAD:
    case OP_HEAD_BACK: return (double)m->R / m->head_rows;
    case OP_GATED:
    case OP_DOWN:
    case OP_GATE_UP_BACK:
    case OP_GATED_BACK:
    case OP_DOWN_BACK: return blocks;
    default: return layers;
  }
}

static void bench_op_(Bench *x, int op) {
  Model *m = &x->m;
  const Config *c = &m->c;
  LayerActs *a = &m->acts[0];
  LayerWeights *w = &m->weights[0];
  const LayerSlots *s = &m->table.layers[0];
  float *p = m->params, *g = m->grads;
  int R = m->R, block = bench_block_(m), C = c->dim, NH = c->heads, NKV = c->kv_heads, HS = c->head_dim,
      n = m->head_rows;
  switch (op) {
    case OP_QUANTIZE:
      weight_quantize(&w->qkv, p + s->qkv, m->lambda);
      weight_quantize(&w->o, p + s->o, m->lambda);
      weight_quantize(&w->gate_up, p + s->gate_up, m->lambda);
      weight_quantize(&w->down, p + s->down, m->lambda);
      break;
    case OP_NORM:
      rmsnorm_quant_forward(&a->h1, a->rstd1, m->residual[0], p + s->norm1, R, C, c->norm_eps);
      rmsnorm_quant_forward(&a->h2, a->rstd2, a->att, p + s->sub1, R, NH * HS, c->norm_eps);
      rmsnorm_quant_forward(&a->h3, a->rstd3, a->mid, p + s->norm2, R, C, c->norm_eps);
      break;
    case OP_QKV: bitlinear_forward(a->qkv, &a->h1, &w->qkv, NULL, R); break;
    case OP_ROPE:
      rope_apply(a->qkv, m->pos, m->cossin, R, NH, NKV, HS, 1);
      rope_apply(m->dwide, m->pos, m->cossin, R, NH, NKV, HS, -1);
      break;
    case OP_ATTENTION: attention_forward(a->att, a->lse, a->qkv, m->start, m->B, m->T, NH, NKV, HS, m->precision); break;
    case OP_O: bitlinear_forward(a->mid, &a->h2, &w->o, m->residual[0], R); break;
    case OP_GATED:
      gated_forward(&a->h4, a->rstd4, a->gate_up, &a->h3, &w->gate_up, p + s->sub2, block, c->activation, c->norm_eps);
      break;
    case OP_DOWN: bitlinear_forward(m->residual[1], &a->h4, &w->down, a->mid, block); break;
    case OP_HEAD:
      linear_forward(m->logits, m->final, p + m->table.head, n, c->vocab, C, m->precision);
      cross_entropy_forward(m->losses, m->head_lse, m->logits, m->targets, n, c->vocab);
      break;
    case OP_HEAD_BACK:
      cross_entropy_backward(m->logits, m->head_lse, m->targets, m->coef, n, c->vocab);
      linear_backward(m->dfinal, g + m->table.head, m->logits, m->final, p + m->table.head, n, c->vocab, C, m->precision);
      break;
    case OP_QKV_BACK: bitlinear_backward(m->dh, g + s->qkv, NULL, m->dwide, &a->h1, &w->qkv, R); break;
    case OP_ATTENTION_BACK:
      attention_backward(m->dwide, m->datt, a->att, a->lse, a->qkv, m->start, m->B, m->T, NH, NKV, HS, m->precision);
      break;
    case OP_O_BACK: bitlinear_backward(m->dh, g + s->o, NULL, m->dres, &a->h2, &w->o, R); break;
    case OP_GATE_UP_BACK: bitlinear_backward(m->dh, g + s->gate_up, NULL, a->gate_up, &a->h3, &w->gate_up, block); break;
    case OP_GATED_BACK:
      gated_backward(a->gate_up, g + s->sub2, m->dh, &a->h3, &w->gate_up, p + s->sub2, a->rstd4, block, c->activation);
      break;
    case OP_DOWN_BACK: bitlinear_backward(m->dh, g + s->down, NULL, m->dres, &a->h4, &w->down, block); break;
    case OP_NORM_BACK:
      rmsnorm_backward(m->dres, g + s->norm1, m->dh, m->residual[0], p + s->norm1, a->rstd1, R, C, 1);
      rmsnorm_backward(m->datt, g + s->sub1, m->dh, a->att, p + s->sub1, a->rstd2, R, NH * HS, 0);
      rmsnorm_backward(m->dres, g + s->norm2, m->dh, a->mid, p + s->norm2, a->rstd3, R, C, 1);
      break;
    case OP_EMBEDDING:
      embedding_forward(m->residual[0], m->tokens, p + m->table.embed, R, C);
      embedding_backward(g + m->table.embed, m->dres, m->tokens, R, c->vocab, C);
      break;
    default:
      grad_norm(m);
      adamw_step(m, 1.0f, 0.0, 0.1, 0.9, 0.95, 1e-8, 2);
  }
}

static void bench_ops_(const char *only, int dx_int8) {
  for (size_t i = 0; i < ARRAY_LEN(bench_models); i++) {
    const BenchModel *b = &bench_models[i];
    double ms[OP_COUNT], sum = 0, whole[BENCH_RUNS];
    char shape[64];
    Bench x;
    if (only[0] && strcmp(only, b->name) != 0) continue;
    bench_open_(&x, b, 1.0f, dx_int8);
    for (int k = -1; k < BENCH_RUNS; k++) {
      double t0 = time_now();
      bench_step_(&x, 1.0f, k + 2);
      if (k >= 0) whole[k] = time_now() - t0;
    }
    for (int op = 0; op < OP_COUNT; op++) {
      double times[BENCH_RUNS];
      double each = bench_calls_(&x.m, op);
      for (int k = -1; k < BENCH_RUNS; k++) {
        double t0 = time_now();
        bench_op_(&x, op);
        bench_wait_(x.m.params);
        if (k >= 0) times[k] = time_now() - t0;
      }
      ms[op] = each * bench_median_(times, BENCH_RUNS) * 1e3;
      sum += ms[op];
    }
    for (int op = 0; op < OP_COUNT; op++) {
      snprintf(shape, sizeof shape, "%s %.1f %%", b->name, 100 * ms[op] / sum);
      bench_row_(bench_op_names[op], shape, ms[op], "ms");
    }
    snprintf(shape, sizeof shape, "%s, ops apart", b->name);
    bench_row_("sum", shape, sum, "ms");
    snprintf(shape, sizeof shape, "%s, whole step", b->name);
    bench_row_("step", shape, bench_median_(whole, BENCH_RUNS) * 1e3, "ms");
    bench_close_(&x);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Products alone: forward at lambda = 1 in int8, both backward products in bf16, the classifier in bf16 and fp32.

// Times of runs and, measured beside each of them, the peak of their number format; the medians of both are compared.
static void bench_product_row_(const char *name, int M, int N, int K, double operations, double *seconds, double *peaks) {
  char shape[64];
  snprintf(shape, sizeof shape, "%dx%dx%d", M, N, K);
  bench_row_(name, shape, 100 * operations / bench_median_(seconds, BENCH_RUNS) / bench_median_(peaks, BENCH_RUNS), "% of peak");
}

static void bench_products_(const char *only, int dx_int8) {
  for (size_t i = 0; i < ARRAY_LEN(bench_models); i++) {
    const BenchModel *b = &bench_models[i];
    double times[2][BENCH_RUNS], peaks[2][BENCH_RUNS];
    Bench x;
    if (only[0] && strcmp(only, b->name) != 0) continue;
    bench_open_(&x, b, 1.0f, dx_int8);
    bench_step_(&x, 1.0f, 1);
    Model *m = &x.m;
    BitWeight *w[4] = {&m->weights[0].qkv, &m->weights[0].o, &m->weights[0].gate_up, &m->weights[0].down};
    QAct *in[4] = {&m->acts[0].h1, &m->acts[0].h2, &m->acts[0].h3, &m->acts[0].h4};
    size_t grad[4] = {m->table.layers[0].qkv, m->table.layers[0].o, m->table.layers[0].gate_up, m->table.layers[0].down};
    for (int k = 0; k < 4; k++) {
      int rows = k < 2 ? m->R : bench_block_(m);
      double ops = 2.0 * rows * w[k]->N * w[k]->K;
      floatX *y = k == 2 ? m->acts[0].gate_up : m->dwide;
      for (int run = -1; run < BENCH_RUNS; run++) {
        double t0 = time_now();
        bitlinear_forward(y, in[k], w[k], NULL, rows);
        bench_wait_(y);
        double t1 = time_now(), peak_i8 = dev_peak(PEAK_INT8), t2 = time_now();
        bitlinear_backward(m->dh, m->grads + grad[k], NULL, y, in[k], w[k], rows);
        bench_wait_(m->dh);
        double t3 = time_now(), peak_bf16 = dev_peak(PEAK_BF16);
        if (run >= 0) {
          times[0][run] = t1 - t0;
          times[1][run] = t3 - t2;
          peaks[0][run] = peak_i8;
          peaks[1][run] = peak_bf16;
        }
      }
      bench_product_row_("bitlinear_forward int8", rows, w[k]->N, w[k]->K, ops, times[0], peaks[0]);
      bench_product_row_("bitlinear_backward bf16", rows, w[k]->N, w[k]->K, 2 * ops, times[1], peaks[1]);
    }
    int V = m->c.vocab, C = m->c.dim, n = m->head_rows;
    for (int precision = 0; precision < 2; precision++) {
      for (int run = -1; run < BENCH_RUNS; run++) {
        double t0 = time_now();
        linear_forward(m->logits, m->final, m->params + m->table.head, n, V, C, precision);
        bench_wait_(m->logits);
        double t1 = time_now(), peak = dev_peak(precision == PRECISION_BF16 ? PEAK_BF16 : PEAK_FP32);
        if (run >= 0) times[0][run] = t1 - t0, peaks[0][run] = peak;
      }
      bench_product_row_(precision == PRECISION_BF16 ? "linear_forward bf16" : "linear_forward fp32", n, V, C, 2.0 * n * V * C, times[0],
                         peaks[0]);
    }
    bench_close_(&x);
  }
}

// The word after the mode names a part, and after a slash one model: "train/12m".
UNUSED static void mode_bench(Options *o) {
  char part[64];
  snprintf(part, sizeof part, "%s", o->dir);
  char *slash = strchr(part, '/');
  const char *only = slash ? slash + 1 : "";
  if (slash) *slash = 0;
  int all = part[0] == 0, known = all;
  fprintf(stderr, "device  %s\n", dev_name());
  if (all || strcmp(part, "peaks") == 0) bench_peaks_(), known = 1;
  if (all || strcmp(part, "products") == 0) bench_products_(only, o->dx_int8), known = 1;
  if (all || strcmp(part, "train") == 0) bench_train_(only, o->dx_int8), known = 1;
  if (all || strcmp(part, "ops") == 0) bench_ops_(only, o->dx_int8), known = 1;
  if (all || strcmp(part, "decode") == 0) bench_decode_(only), known = 1;
  if (!known) die(EXIT_USAGE, "bench: expected peaks, products, train, ops (and /5.1m, /12m or /124m) or decode, found '%s'", o->dir);
}

#endif
