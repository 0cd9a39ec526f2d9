/*
test_model.h: what must hold for whole models, decoding and sampling whatever the weights are. No PyTorch needed.

What it is:  equalities: a training step with any number of threads, with recompute, in micro-batches, with packed documents,
             without lambda; decoding with a cache against training's forward pass; frequencies of the sampler.
What not:    single ops (test_ops.h), comparisons with PyTorch (test_reference.h), derivatives (test_float64.c).
Read before: test_ops.h, whose helpers it uses; bitnet/model.h, bitnet/losses.h, bitnet/infer.h.
Defines:     MODEL_TESTS, the rows for the table of tests.
*/
#ifndef TEST_MODEL_H
#define TEST_MODEL_H

#include "../../bitnet/infer.h"
#include "../../bitnet/losses.h"
#include "../../bitnet/optim.h"
#include "check.h"
#include "test_ops.h"

// ---------------------------------------------------------------------------------------------------------
// Whole models.

enum { BITNET_STYLE, CONVERTED_STYLE, ODD_STYLE, N_STYLES };

// Small models: as we train them; with everything that converted models bring along; with odd sizes and 4 bits.
static Config small_config_(int style) {
  Config c;
  memset(&c, 0, sizeof c);
  c.dim = 32, c.layers = 2, c.heads = 4, c.kv_heads = 2, c.head_dim = 8, c.ffn_dim = 48, c.vocab = 61, c.max_seq = 160;
  c.norm_eps = 1e-5f;
  c.rope_theta = 10000;
  c.activation = ACT_RELU2;
  c.attn_sub_norm = c.ffn_sub_norm = c.tie_embeddings = 1;
  c.act_bits = 8;
  c.init_std = 0.2f;
  if (style == CONVERTED_STYLE) {
    c.activation = ACT_SILU;
    c.attn_sub_norm = c.ffn_sub_norm = c.tie_embeddings = 0;
    c.qkv_bias = c.o_bias = c.qk_norm = 1;
    c.act_bits = 0;
    c.rope_llama3 = 1;
    c.rope_factor = 8, c.rope_low_freq = 1, c.rope_high_freq = 4, c.rope_original_max = 64;
  } else if (style == ODD_STYLE) {
    c.dim = 27, c.layers = 3, c.heads = 3, c.kv_heads = 1, c.head_dim = 10, c.ffn_dim = 37, c.vocab = 19;
    c.ffn_sub_norm = 0;
    c.act_bits = 4;
  }
  return c;
}

// A model with random weights, gains around 1 and biases around 0. T = 0: not for training.
static void open_model_(Model *m, const Config *c, int precision, int B, int T, int recompute, int codes_only) {
  model_open(m, c, precision);
  model_init_random(m, 3);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (!(t->flags & (NORM | BIAS))) continue;
    float *x = (float *)xmalloc(t->n * sizeof(float));
    double mean = t->flags & NORM ? 1 : 0;
    for (size_t k = 0; k < t->n; k++) x[k] = (float)(mean + 0.2 * rng_normal(4, RNG_TEST, (uint64_t)i << 32 | k));
    dev_copy_in(m->params + t->offset, x, t->n * sizeof(float));
    free(x);
  }
  if (T > 0) model_alloc_training(m, B, T, recompute, codes_only);
}

// Random tokens in random documents (or one document a row), a tenth of the targets ignored.
static void random_batch_(Batch *b, int B, int T, int V, int documents) {
  batch_alloc(b, B, T);
  random_documents_(b->start, b->pos, B, T);
  b->n_targets = 0;
  for (int i = 0; i < B * T; i++) {
    if (!documents) {
      b->start[i] = 0;
      b->pos[i] = i % T;
    }
    b->tokens[i] = test_below_(V);
    b->targets[i] = test_below_(10) == 0 ? -1 : test_below_(V);
    b->n_targets += b->targets[i] >= 0;
  }
}

// Rows b0 .. b0+B-1 of a batch as a batch that shares its memory.
static Batch batch_rows_(const Batch *b, int b0, int B) {
  Batch part = *b;
  size_t at = (size_t)b0 * (size_t)b->T;
  part.B = B;
  part.tokens += at;
  part.targets += at;
  part.start += at;
  part.pos += at;
  return part;
}

// Loss and gradients (from zero) of a batch at m's lambda; m->losses, m->grads and the buffers keep the rest.
static double gradients_(Model *m, const Batch *b, float coef) {
  float *host_coef = (float *)xmalloc((size_t)m->R * sizeof(float));
  dev_zero(m->grads, m->table.floats * sizeof(float));
  double loss = batch_loss(m, b, coef, host_coef, 1);
  free(host_coef);
  return loss;
}

static float *read_grads_(const Model *m) {
  return read_floats_(m->grads, m->table.floats);
}

// Checks two arenas tensor by tensor; bound 0 = the same bits. Gains and biases get twice the bound: they have few elements, and
// each is one sum over all rows (and heads) in which most of the terms cancel.
static void check_arenas_(const char *what, const Model *m, const float *got, const float *want, double bound) {
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    double error = rel_error(got + t->offset, want + t->offset, t->n), limit = t->flags & (NORM | BIAS) ? 2 * bound : bound;
    int same = same_bits_(got + t->offset, want + t->offset, t->n * sizeof(float));
    CHECK(bound == 0 ? same : error <= limit, "%s: %s: relative error %.3g, bound %.3g", what, t->name, error, limit);
  }
}

// The forms in which whole models are compared.
typedef struct {
  int style;
  float lambda;
  int precision;
  const char *name;
} ModelForm_;

static const ModelForm_ model_forms_[] = {
  {BITNET_STYLE, 1, PRECISION_BF16, "bitnet, lambda 1, bf16"}, {BITNET_STYLE, 1, PRECISION_FP32, "bitnet, lambda 1, fp32"},
  {BITNET_STYLE, 0.3f, PRECISION_BF16, "bitnet, lambda 0.3, bf16"},
  {CONVERTED_STYLE, 1, PRECISION_FP32, "converted, lambda 1, fp32"},
  {CONVERTED_STYLE, 0, PRECISION_BF16, "converted, lambda 0, bf16"},
  {ODD_STYLE, 1, PRECISION_BF16, "odd, lambda 1, bf16"}, {ODD_STYLE, 0.3f, PRECISION_FP32, "odd, lambda 0.3, fp32"}};

// Two whole steps with 1, 2 and 3 threads: losses, gradients, norm and parameters have the same bits.
static void test_threads_model(void) {
  const int runs = EMULATED ? 2 : 3, T = EMULATED ? 90 : 150;   // on a GPU: the same twice
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    Batch b;
    random_batch_(&b, 3, T, c.vocab, 1);
    float *params[3], *grads[3];
    double loss[3], norm[3];
    for (int i = 0; i < runs; i++) {
      Model m;
      set_threads_(i + 1);
      open_model_(&m, &c, form->precision, 3, T, 0, 0);
      for (int t = 1; t <= 2; t++) {
        model_quantize(&m, form->lambda);
        loss[i] = gradients_(&m, &b, 1.0f / (float)b.n_targets);
        norm[i] = grad_norm(&m);
        adamw_step(&m, 0.5f, 0.01, 0.1, 0.9, 0.95, 1e-8, t);
      }
      params[i] = read_floats_(m.params, m.table.floats);
      grads[i] = read_grads_(&m);
      CHECK(isfinite(loss[i]) && norm[i] > 0, "%s: loss %g, norm %g", form->name, loss[i], norm[i]);
      CHECK(loss[i] == loss[0] && norm[i] == norm[0], "%s: loss %.17g, %.17g with one thread", form->name, loss[i], loss[0]);
      check_arenas_(form->name, &m, grads[i], grads[0], 0);
      check_arenas_(form->name, &m, params[i], params[0], 0);
      model_free(&m);
    }
    batch_free(&b);
    end_test_();
  }
  set_threads_(0);
}

static void test_recompute(void) {
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    Batch b;
    float *grads[2];
    double loss[2];
    random_batch_(&b, 2, 35, c.vocab, 1);
    for (int recompute = 0; recompute < 2; recompute++) {
      Model m;
      open_model_(&m, &c, form->precision, 2, 35, recompute, form->lambda == 1);
      model_quantize(&m, form->lambda);
      loss[recompute] = gradients_(&m, &b, 0.01f);
      grads[recompute] = read_grads_(&m);
      if (recompute) check_arenas_(form->name, &m, grads[1], grads[0], 0);
      for (int i = 0; i < m.table.count; i++) {   // every tensor takes part
        const Tensor *t = &m.table.tensors[i];
        double sum = 0;
        for (size_t k = 0; k < t->n; k++) sum += fabs((double)grads[recompute][t->offset + k]);
        CHECK(isfinite(sum) && sum > 0, "%s: the gradient of %s is %g", form->name, t->name, sum);
      }
      model_free(&m);
    }
    CHECK(loss[0] == loss[1], "%s: loss %.17g, %.17g with recompute", form->name, loss[0], loss[1]);
    batch_free(&b);
    end_test_();
  }
}

static void test_micro_batches(void) {
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    Model whole, half;
    Batch b;
    float coef, host_coef[2 * 35];
    random_batch_(&b, 4, 35, c.vocab, 1);
    coef = 1.0f / (float)b.n_targets;
    open_model_(&whole, &c, form->precision, 4, 35, 0, 0);
    open_model_(&half, &c, form->precision, 2, 35, 0, 0);
    model_quantize(&whole, form->lambda);
    model_quantize(&half, form->lambda);
    double loss = gradients_(&whole, &b, coef);
    Batch first = batch_rows_(&b, 0, 2), second = batch_rows_(&b, 2, 2);
    double loss1 = gradients_(&half, &first, coef), loss2 = batch_loss(&half, &second, coef, host_coef, 1);
    CHECK(fabs(loss1 + loss2 - loss) <= 1e-14 * loss, "%s: losses %.17g, in one batch %.17g", form->name, loss1 + loss2, loss);
    check_arenas_(form->name, &half, read_grads_(&half), read_grads_(&whole), 1e-6);
    model_free(&whole);
    model_free(&half);
    batch_free(&b);
    end_test_();
  }
}

// The classifier in chunks of 7 rows and in one piece: the same losses and gradient of the last hidden state.
static void test_head_chunks(void) {
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    Model m;
    Batch b;
    random_batch_(&b, 2, 35, c.vocab, 0);
    open_model_(&m, &c, form->precision, 2, 35, 0, 0);
    model_quantize(&m, form->lambda);
    size_t n = (size_t)m.R * (size_t)c.dim;
    CHECK(m.head_rows == m.R, "%d rows of logits at a time for %d rows", m.head_rows, m.R);
    double loss = gradients_(&m, &b, 0.01f);
    float *grads = read_grads_(&m), *losses = read_floats_(m.losses, (size_t)m.R), *dfinal[2];
    for (int chunked = 0; chunked < 2; chunked++) {   // the heads alone: model_backward may use dfinal for something else
      m.head_rows = chunked ? 7 : m.R;
      head_cross_entropy(&m, 1);
      dfinal[chunked] = read_acts_(m.dfinal, n);
    }
    CHECK(same_bits_(dfinal[0], dfinal[1], n * sizeof(float)), "%s: dfinal differs", form->name);
    CHECK(gradients_(&m, &b, 0.01f) == loss, "%s: loss differs", form->name);
    CHECK(same_bits_(losses, read_floats_(m.losses, (size_t)m.R), (size_t)m.R * sizeof(float)), "%s: losses differ",
          form->name);
    check_arenas_(form->name, &m, read_grads_(&m), grads, 1e-6);
    model_free(&m);
    batch_free(&b);
    end_test_();
  }
  // A large vocabulary really is cut: as many logits as the ops ask for.
  Config c = small_config_(BITNET_STYLE);
  c.vocab = 1 << 16;
  size_t rows = ops_logits_bytes() / sizeof(floatX) / (size_t)c.vocab;
  CHECK(head_rows_(&c, 5000) == (int)rows && rows < 5000 && head_rows_(&c, 10) == 10, "%d rows of %zu", head_rows_(&c, 5000), rows);
}

// Documents in one row of a batch give the bits that they give alone.
static void test_packed_documents(void) {
  static const int lengths[] = {13, 1, 70, 6};
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    size_t C = (size_t)c.dim;
    Model packed;
    Batch b;
    int T = 90, t0 = 0;
    random_batch_(&b, 1, T, c.vocab, 0);
    for (size_t d = 0; d < ARRAY_LEN(lengths); t0 += lengths[d++]) {
      for (int t = 0; t < lengths[d]; t++) {
        b.start[t0 + t] = t0;
        b.pos[t0 + t] = t;
      }
    }
    open_model_(&packed, &c, form->precision, 1, T, 0, 0);
    model_quantize(&packed, form->lambda);
    gradients_(&packed, &b, 0.01f);
    float *final = read_acts_(packed.final, (size_t)T * C), *losses = read_floats_(packed.losses, (size_t)T);
    float *want = read_grads_(&packed), *sum = host_floats_(packed.table.floats);
    t0 = 0;
    for (size_t d = 0; d < ARRAY_LEN(lengths); t0 += lengths[d++]) {
      Model alone;
      Batch part;
      int n = lengths[d];
      random_batch_(&part, 1, n, c.vocab, 0);
      memcpy(part.tokens, b.tokens + t0, (size_t)n * sizeof(int));
      memcpy(part.targets, b.targets + t0, (size_t)n * sizeof(int));
      open_model_(&alone, &c, form->precision, 1, n, 0, 0);
      model_quantize(&alone, form->lambda);
      gradients_(&alone, &part, 0.01f);
      float *alone_final = read_acts_(alone.final, (size_t)n * C), *alone_losses = read_floats_(alone.losses, (size_t)n);
      float *g = read_grads_(&alone);
      CHECK(same_bits_(alone_final, final + (size_t)t0 * C, (size_t)n * C * sizeof(float)), "%s: document %zu", form->name, d);
      CHECK(same_bits_(alone_losses, losses + t0, (size_t)n * sizeof(float)), "%s: losses of document %zu", form->name, d);
      for (size_t i = 0; i < alone.table.floats; i++) sum[i] += g[i];
      model_free(&alone);
      batch_free(&part);
    }
    check_arenas_(form->name, &packed, sum, want, 1e-6);
    model_free(&packed);
    batch_free(&b);
    end_test_();
  }
}

// At lambda = 0 quantisers are exactly not there: act_bits = 8 and act_bits = 0 give the same bits.
static void test_lambda_zero(void) {
  for (int style = 0; style < N_STYLES; style++) {
    Config c = small_config_(style);
    float *grads[2];
    double loss[2];
    Batch b;
    random_batch_(&b, 2, 35, c.vocab, 1);
    for (int i = 0; i < 2; i++) {
      Model m;
      c.act_bits = i ? 8 : 0;
      open_model_(&m, &c, PRECISION_FP32, 2, 35, 0, 0);
      model_quantize(&m, 0);
      loss[i] = gradients_(&m, &b, 0.01f);
      grads[i] = read_grads_(&m);
      if (i) check_arenas_("act_bits 8 and 0", &m, grads[1], grads[0], 0);
      model_quantize(&m, 1);   // and the quantisers are there at lambda = 1
      CHECK(gradients_(&m, &b, 0.01f) != loss[i], "style %d: lambda changes nothing", style);
      model_free(&m);
    }
    CHECK(loss[0] == loss[1], "style %d: loss %.17g, %.17g with act_bits = 8", style, loss[0], loss[1]);
    batch_free(&b);
    end_test_();
  }
}

// One weight that is NaN or infinite, in any tensor, shows in the loss and in the gradient norm.
static void test_nan_visible(void) {
  for (int style = 0; style < N_STYLES; style++) {
    for (int form = 0; form < 4; form++) {
      Config c = small_config_(style);
      Model m;
      Batch b;
      const float bad = form % 2 ? INFINITY : NAN, lambda = form / 2 ? 1.0f : 0.3f;
      const int T = EMULATED ? 6 : 20;
      random_batch_(&b, 1, T, c.vocab, 0);
      open_model_(&m, &c, PRECISION_BF16, 1, T, 0, 0);
      for (int i = 0; i < m.table.count; i++) {
        const Tensor *t = &m.table.tensors[i];
        float old;
        size_t at = t->offset + (t->flags & EMBED ? (size_t)b.tokens[3] * (size_t)c.dim : 0);   // a row of the table that is used
        dev_copy_out(&old, m.params + at, sizeof old);
        dev_copy_in(m.params + at, &bad, sizeof bad);
        model_quantize(&m, lambda);
        double loss = gradients_(&m, &b, 0.01f), norm = grad_norm(&m);
        CHECK(!isfinite(loss) && !isfinite(norm), "style %d, lambda %g: %s holds %g; loss %g, norm %g", style, (double)lambda,
              t->name, (double)bad, loss, norm);
        dev_copy_in(m.params + at, &old, sizeof old);
      }
      model_free(&m);
      batch_free(&b);
      end_test_();
    }
  }
}

// The optimizer over the table: the norm takes all gradients, weight decay only matrices and embeddings.
static void test_optimizer_table(void) {
  for (int style = 0; style < N_STYLES; style++) {
    Config c = small_config_(style);
    Model m;
    open_model_(&m, &c, PRECISION_FP32, 1, 4, 0, 0);
    float *before = read_floats_(m.params, m.table.floats), *grads = host_floats_(m.table.floats);
    adamw_step(&m, 1, 0.5, 0.25, 0.9, 0.95, 1e-8, 1);   // gradients are 0: what is left is decay by 1 - 0.5 * 0.25
    float *after = read_floats_(m.params, m.table.floats);
    double sum = 0;
    for (int i = 0; i < m.table.count; i++) {
      const Tensor *t = &m.table.tensors[i];
      float keep = t->flags & (NORM | BIAS) ? 1.0f : 0.875f;
      for (size_t k = t->offset; k < t->offset + t->n; k++) {
        CHECK(after[k] == before[k] * keep, "%s: %.9g became %.9g", t->name, (double)before[k], (double)after[k]);
        grads[k] = (float)(i + 1);
        sum += (double)(i + 1) * (i + 1);
      }
    }
    dev_copy_in(m.grads, grads, m.table.floats * sizeof(float));
    CHECK(fabs(grad_norm(&m) / sqrt(sum) - 1) < 1e-14, "style %d: norm %.15g, wanted %.15g", style, grad_norm(&m), sqrt(sum));
    model_free(&m);
    end_test_();
  }
}

/*
A whole optimizer step asks for no memory. alloc_guard stops every xmalloc and dev_malloc; test_allocations, counted by
test_bitnet.c, sees calls that go around them.
*/
static void test_no_allocation(void) {
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    for (int recompute = 0; recompute < 2; recompute++) {
      Config c = small_config_(form->style);
      Model m;
      Batch b;
      float coef[2 * 35];
      random_batch_(&b, 2, 35, c.vocab, 1);
      open_model_(&m, &c, form->precision, 2, 35, recompute, 0);
      long before = test_allocations;
      alloc_guard = 1;
      model_quantize(&m, form->lambda);
      batch_loss(&m, &b, 0.01f, coef, 1);
      batch_loss(&m, &b, 0.01f, coef, 1);
      double norm = grad_norm(&m);
      adamw_step(&m, 1, 1e-3, 0.1, 0.9, 0.95, 1e-8, 1);
      alloc_guard = 0;
      CHECK(test_allocations == before, "%s: %ld allocations inside a step", form->name, test_allocations - before);
      CHECK(norm > 0, "norm %g", norm);
      model_free(&m);
      batch_free(&b);
    }
  }
#ifdef BITNET_MATMUL_H
  long before = test_allocations;   // the counter counts (on the CPU, where device memory is host memory)
  free(xmalloc(1));
  dev_free(dev_malloc(1));
  CHECK(test_allocations > before, "test_allocations does not count");
#endif
  end_test_();
}

#ifdef BITNET_MATMUL_H
// The table of memory that is printed before a run is what the run then takes.
static void test_memory_forecast(void) {
  reserve_scratch_();   // more than these models need: what is counted below is not scratch
  for (int style = 0; style < N_STYLES; style++) {
    for (int form = 0; form < 4; form++) {
      Config c = small_config_(style);
      Model m;
      int recompute = form % 2, codes_only = form / 2;
      Memory forecast = model_memory(&c, 2, 35, recompute, codes_only);
      size_t before = test_device_bytes;
      model_open(&m, &c, PRECISION_FP32);
      model_alloc_training(&m, 2, 35, recompute, codes_only);
      size_t taken = test_device_bytes - before, want = forecast.total - forecast.scratch;
      CHECK(taken >= want && taken <= want + 64 * 8, "style %d, form %d: %zu bytes taken, %zu forecast", style, form, taken, want);
      model_free(&m);
    }
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Decoding with a cache.

// The logits [T,V] of training's forward pass over the tokens of a batch of one row.
static float *training_logits_(Model *m, const Batch *b) {
  size_t n = (size_t)m->R * (size_t)m->c.vocab;
  floatX *logits = dev_acts_(NULL, n);
  gradients_(m, b, 0.01f);
  model_forward(m);
  linear_forward(logits, m->final, m->params + m->table.head, m->R, m->c.vocab, m->c.dim, m->precision);
  return read_acts_(logits, n);
}

/*
Two sequences in one cache. A prompt in one call, in pieces of 37 tokens, token by token, and both sequences mixed: every position's
logits have the bits of training's forward pass.
*/
static void test_decode(void) {
  enum { T = EMULATED ? 70 : 150 };
  static const int pieces[] = {T, 37, 1};
  for (size_t f = 0; f < ARRAY_LEN(model_forms_); f++) {
    const ModelForm_ *form = &model_forms_[f];
    Config c = small_config_(form->style);
    size_t row = (size_t)c.vocab * sizeof(float);
    Model m;
    Batch b, rows[2];
    float *want[2];
    int codes_only = form->lambda == 1, seq[2 * T], pos[2 * T], tokens[2 * T];
    random_batch_(&b, 2, T, c.vocab, 0);
    open_model_(&m, &c, form->precision, 1, T, 0, 0);
    model_quantize(&m, form->lambda);
    for (int i = 0; i < 2; i++) {
      rows[i] = batch_rows_(&b, i, 1);
      want[i] = training_logits_(&m, &rows[i]);
    }
    Session s;
    session_open(&s, &m, 3, T + 5, 2 * T, codes_only);
    for (size_t k = 0; k < ARRAY_LEN(pieces); k++) {
      for (int t0 = 0; t0 < T; t0 += pieces[k]) {
        int n = T - t0 < pieces[k] ? T - t0 : pieces[k];
        for (int t = 0; t < n; t++) {
          seq[t] = 2;   // what an earlier round has left in this cache is overwritten
          pos[t] = t0 + t;
        }
        const float *logits = session_forward(&s, rows[k & 1].tokens + t0, seq, pos, n);
        int same = same_bits_(logits, want[k & 1] + (size_t)t0 * (size_t)c.vocab, (size_t)n * row);
        CHECK(same, "%s: pieces of %d, position %d on", form->name, pieces[k], t0);
      }
    }
    int n = 0;
    for (int t = 0; t < T; t++) {
      for (int i = 0; i < 2; i++, n++) {
        seq[n] = i;
        pos[n] = t;
        tokens[n] = rows[i].tokens[t];
      }
    }
    const float *logits = session_forward(&s, tokens, seq, pos, n);
    for (int i = 0; i < n; i++) {
      int same = same_bits_(logits + i * c.vocab, want[seq[i]] + pos[i] * c.vocab, row);
      CHECK(same, "%s: two sequences, row %d", form->name, i);
    }
    session_free(&s);
    model_free(&m);
    batch_free(&b);
    end_test_();
  }
}

static int tokens_seen_;   // by count_token_

static void count_token_(void *ctx, int prompt, int token) {
  const Prompt *prompts = (const Prompt *)ctx;
  tokens_seen_++;
  CHECK(prompts[prompt].out[prompts[prompt].n_out - 1] == token, "on_token came before its token");
}

static Prompt new_prompt_(const int *ids, int n, uint64_t number, int *out) {
  Prompt p;
  memset(&p, 0, sizeof p);
  p.ids = ids;
  p.n_ids = n;
  p.number = number;
  p.out = out;
  p.n_out = p.ended = -1;   // generate starts from its own
  return p;
}

// Prompts of different lengths continued together, in small pieces, and one at a time: the same tokens.
static void test_generate(void) {
  enum { N = 5, MAX_NEW = 40, LONGEST = 61 };
  static const int lengths[N] = {1, 30, LONGEST, 7, 12};
  static const Sampler samplers[] = {{0, 0, 1, 1}, {1, 0, 1, 2}, {0.7, 10, 1, 3}, {1.3, 0, 0.8, 4}};
  Config c = small_config_(BITNET_STYLE);
  Model m;
  int ids[N][LONGEST], out[3][N][MAX_NEW], eos_came = 0, no_eos = 0;
  open_model_(&m, &c, PRECISION_BF16, 0, 0, 0, 1);
  model_quantize(&m, 1);
  for (int i = 0; i < N; i++) {
    for (int t = 0; t < lengths[i]; t++) ids[i][t] = test_below_(c.vocab);
  }
  for (size_t k = 0; k < ARRAY_LEN(samplers); k++) {
    Prompt prompts[3][N];
    int eos = samplers[k].temperature > 0 ? 5 : -1, V = c.vocab - 3;   // the last three ids only pad the table
    for (int way = 0; way < 3; way++) {   // together; together in pieces of 8 rows; one at a time
      Session s;
      tokens_seen_ = 0;
      for (int i = 0; i < N; i++) {
        prompts[way][i] = new_prompt_(ids[i], lengths[i], (uint64_t)(100 + i), out[way][i]);
      }
      session_open(&s, &m, way == 2 ? 1 : N, 90, way == 0 ? 128 : way == 1 ? 8 : 70, 1);
      int at_once = way == 2 ? 1 : N;
      for (Prompt *p = prompts[way]; p < prompts[way] + N; p += at_once) {
        generate(&s, &samplers[k], p, at_once, MAX_NEW, eos, V, count_token_, p);
      }
      session_free(&s);
      int total = 0;
      for (int i = 0; i < N; i++) {
        const Prompt *p = &prompts[way][i], *first = &prompts[0][i];
        int room = 90 - lengths[i] + 1 < MAX_NEW ? 90 - lengths[i] + 1 : MAX_NEW;   // the newest token need not be in the cache
        int same = p->n_out == first->n_out && p->ended == first->ended;
        same = same && same_bits_(p->out, first->out, (size_t)p->n_out * sizeof(int));
        CHECK(same, "sampler %zu, way %d: prompt %d got other tokens than together with the others", k, way, i);
        CHECK(p->ended ? p->n_out <= room : p->n_out == room, "way %d, prompt %d: %d tokens, room for %d", way, i, p->n_out, room);
        for (int t = 0; t < p->n_out; t++) CHECK(p->out[t] >= 0 && p->out[t] < V && p->out[t] != eos, "token %d", p->out[t]);
        total += p->n_out;
        if (p->ended) eos_came = 1;
        else no_eos = 1;
      }
      CHECK(tokens_seen_ == total, "on_token was called %d times for %d tokens", tokens_seen_, total);
    }
  }
  CHECK(eos_came && no_eos, "the end token never came, or always");

  // Greedy decoding is the argmax of training's forward pass over prompt and answer.
  Model trained;
  Batch b;
  Prompt p = new_prompt_(ids[3], 7, 0, out[0][0]);
  Session s;
  session_open(&s, &m, 1, 90, 70, 1);
  generate(&s, &samplers[0], &p, 1, MAX_NEW, -1, c.vocab, NULL, NULL);
  random_batch_(&b, 1, 7 + MAX_NEW, c.vocab, 0);
  memcpy(b.tokens, ids[3], 7 * sizeof(int));
  memcpy(b.tokens + 7, p.out, MAX_NEW * sizeof(int));
  open_model_(&trained, &c, PRECISION_BF16, 1, 7 + MAX_NEW, 0, 1);
  model_quantize(&trained, 1);
  float *logits = training_logits_(&trained, &b);
  for (int t = 0; t < MAX_NEW; t++) {
    const float *z = logits + (6 + t) * c.vocab;
    int best = 0;
    for (int v = 1; v < c.vocab; v++) best = z[v] > z[best] ? v : best;
    CHECK(p.out[t] == best, "new token %d is %d, the most likely one is %d", t, p.out[t], best);
  }

  // The next turn of a chat: all that was in the cache, a part of it, or nothing need not be fed again.
  int turn[7 + MAX_NEW + 3], answers[3][MAX_NEW];
  static const int cached[3] = {6 + MAX_NEW, 11, 0};   // the newest token of an answer is not in the cache
  memcpy(turn, b.tokens, (7 + MAX_NEW) * sizeof(int));
  memcpy(turn + 7 + MAX_NEW, ids[1], 3 * sizeof(int));
  for (int i = 0; i < 3; i++) {
    Prompt next = new_prompt_(turn, 7 + MAX_NEW + 3, 0, answers[i]);
    next.cached = cached[i];
    generate(&s, &samplers[0], &next, 1, MAX_NEW, -1, c.vocab, NULL, NULL);
    int same = next.n_out == MAX_NEW && same_bits_(answers[i], answers[0], sizeof answers[0]);
    CHECK(same, "with %d tokens in the cache another answer, of %d tokens", cached[i], next.n_out);
  }

  // Nothing asked for, nothing done.
  generate(&s, &samplers[0], &p, 1, 0, -1, c.vocab, NULL, NULL);
  CHECK(p.n_out == 0 && p.ended == 0, "%d tokens for max_new = 0", p.n_out);
  session_free(&s);
  model_free(&trained);
  model_free(&m);
  batch_free(&b);
  end_test_();
}

/*
Several answers to the same prompt: with shares, which computes equal histories once, they have the tokens and the log-probabilities of
answers that are sampled each for itself. Groups of 7, 1 and 7, the whole in one pass and in pieces of 16 rows; the temperature is low
enough that answers begin alike and part later.
*/
static void test_generate_shared(void) {
  enum { N = 15, MAX_NEW = 12, LONGEST = 21 };
  static const int group[N] = {0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2}, lengths[3] = {9, 3, LONGEST};
  static const Sampler samplers[] = {{0, 0, 1, 1}, {0.25, 0, 1, 2}, {1, 0, 1, 3}};
  Config c = small_config_(BITNET_STYLE);
  Model m;
  int ids[3][LONGEST], out[3][N][MAX_NEW], end = -1, ended = 0, together = 0, apart = 0;
  float logp[3][N][MAX_NEW + 1];
  open_model_(&m, &c, PRECISION_BF16, 0, 0, 0, 1);
  model_quantize(&m, 1);
  for (int i = 0; i < 3; i++) {
    for (int t = 0; t < lengths[i]; t++) ids[i][t] = test_below_(c.vocab);
  }
  for (size_t k = 0; k < ARRAY_LEN(samplers); k++) {
    Prompt prompts[3][N];
    int eos = end;
    memset(logp, 0, sizeof logp);
    for (int way = 0; way < 3; way++) {   // each for itself; shared; shared in pieces
      Session s;
      for (int i = 0; i < N; i++) {
        Prompt *p = &prompts[way][i];
        *p = new_prompt_(ids[group[i]], lengths[group[i]], (uint64_t)(50 + i), out[way][i]);
        p->logp = k > 0 ? logp[way][i] : NULL;
        p->shares = way > 0 && i > 0 && group[i] == group[i - 1];
      }
      session_open(&s, &m, N, 32, way == 2 ? 16 : 128, 1);
      generate(&s, &samplers[k], prompts[way], N, MAX_NEW, eos, c.vocab, NULL, NULL);
      session_free(&s);
    }
    for (int i = 0; i < N; i++) {
      const Prompt *p = &prompts[0][i];
      size_t n = (size_t)p->n_out;
      ended += p->ended;
      if (i > 0 && group[i] == group[i - 1] && k > 0) {
        together += out[0][i][0] == out[0][i - 1][0];
        apart += memcmp(out[0][i], out[0][i - 1], sizeof out[0][i]) != 0;
      }
      for (int way = 1; way < 3; way++) {
        const Prompt *q = &prompts[way][i];
        CHECK(q->n_out == p->n_out && q->ended == p->ended && same_bits_(q->out, p->out, n * sizeof(int)),
              "sampler %zu, way %d: answer %d has other tokens than by itself", k, way, i);
        CHECK(k == 0 || same_bits_(q->logp, p->logp, (n + (size_t)p->ended) * sizeof(float)),
              "sampler %zu, way %d: log-probabilities", k, way);
      }
    }
    if (k == 0) end = out[0][0][3];   // a token that comes: it ends the answers of the other samplers
  }
  CHECK(ended > 0 && together > 3 && apart > 3, "%d ended, %d began together, %d parted: all are needed", ended, together, apart);
  model_free(&m);
  end_test_();
}

enum { SAMPLE_V_ = 12, SAMPLE_DRAWS_ = 30000 };

/*
Chi-square of SAMPLE_DRAWS_ draws against probabilities p (0: must never come). Its mean is the number of possible tokens - 1 and its
standard deviation the root of twice that; five of them is the bound. The seed is fixed, so the verdict is always the same.
*/
static void check_frequencies_(const char *name, const Sampler *s, const float *logits, const double *p) {
  int counts[SAMPLE_V_] = {0}, possible = 0;
  double chi2 = 0;
  float probs[SAMPLE_V_];
  for (uint64_t i = 0; i < SAMPLE_DRAWS_; i++) counts[sample_token(s, logits, SAMPLE_V_, i / 100, i % 100, probs)]++;
  for (int v = 0; v < SAMPLE_V_; v++) {
    double want = p[v] * SAMPLE_DRAWS_;
    if (p[v] == 0) CHECK(counts[v] == 0, "%s: token %d came %d times and was cut off", name, v, counts[v]);
    else chi2 += (counts[v] - want) * (counts[v] - want) / want;
    possible += p[v] > 0;
  }
  double limit = possible - 1 + 5 * sqrt(2.0 * (possible - 1)) + 1e-9;
  CHECK(chi2 < limit, "%s: chi-square %.1f with %d possible tokens, bound %.1f", name, chi2, possible, limit);
}

static void test_sampler(void) {
  float logits[SAMPLE_V_], probs[SAMPLE_V_];
  double p[SAMPLE_V_];
  // Token v has rank 5v mod 12 and a probability proportional to e^(-rank/3).
  int order[SAMPLE_V_];
  for (int v = 0; v < SAMPLE_V_; v++) {
    logits[v] = 4.0f - (float)(5 * v % SAMPLE_V_) / 3.0f;
    order[5 * v % SAMPLE_V_] = v;
  }
  static const struct { const char *name; double temperature; int top_k; double top_p; int kept; } cases[] = {
    {"all", 1, 0, 1, 12}, {"hot", 2, 0, 1, 12}, {"cold", 0.5, 0, 1, 12},
    {"top_k 4", 1, 4, 1, 4}, {"top_k 1", 1, 1, 1, 1}, {"top_k 12", 1, 12, 1, 12}, {"top_k 100", 1, 100, 1, 12},
    {"top_p 0.5", 1, 0, 0.5, 3}, {"top_p 0.9", 1, 0, 0.9, 7}, {"top_p tiny", 1, 0, 1e-9, 1}, {"top_p of a hot one", 2, 0, 0.5, 4},
    {"both, k cuts", 1, 2, 0.9, 2}, {"both, p cuts", 1, 9, 0.5, 3}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    Sampler s = {cases[i].temperature, cases[i].top_k, cases[i].top_p, 77};
    double weight[SAMPLE_V_], kept = 0, mass = 0, all = 0;
    for (int rank = 0; rank < SAMPLE_V_; rank++) {
      weight[rank] = exp(-rank / 3.0 / cases[i].temperature);
      all += weight[rank];
      if (rank < cases[i].kept) kept += weight[rank];
    }
    for (int rank = 0; rank < SAMPLE_V_; rank++) p[order[rank]] = rank < cases[i].kept ? weight[rank] / kept : 0;
    // What the table of cases says about top_p follows from its definition.
    if (cases[i].top_p < 1 && cases[i].top_k == 0) {
      int need = 0;
      while (mass < cases[i].top_p) mass += weight[need++] / all;
      CHECK(need == cases[i].kept, "%s keeps %d", cases[i].name, need);
    }
    check_frequencies_(cases[i].name, &s, logits, p);
  }

  // Ties at the threshold all stay: three equal logits, top_k = 2.
  for (int v = 0; v < SAMPLE_V_; v++) {
    p[v] = v == 2 || v == 5 || v == 11 ? 1.0 / 3 : 0;
    logits[v] = p[v] > 0 ? 1.0f : -1.0f;
  }
  Sampler tie = {1, 2, 1, 5}, greedy = {0, 5, 0.5, 1}, a = {1, 0, 1, 5}, b = {1, 0, 1, 6};
  check_frequencies_("tie", &tie, logits, p);

  // Temperature 0 is the argmax, the first of several; huge logits do not overflow.
  CHECK(sample_token(&greedy, logits, SAMPLE_V_, 0, 0, probs) == 2, "the first of the best");
  logits[7] = 1e30f;
  CHECK(sample_token(&greedy, logits, SAMPLE_V_, 1, 9, probs) == 7 && sample_token(&a, logits, SAMPLE_V_, 1, 9, probs) == 7,
        "argmax");
  CHECK(sample_token(&a, logits, 7, 1, 9, probs) < 7, "an id outside of the vocabulary");

  // A draw is a function of (seed, sequence, position), and each of them matters.
  int differs[3] = {0, 0, 0};
  for (int v = 0; v < SAMPLE_V_; v++) logits[v] = 0;
  for (uint64_t i = 0; i < 50; i++) {
    int x = sample_token(&a, logits, SAMPLE_V_, 3, i, probs);
    CHECK(x == sample_token(&a, logits, SAMPLE_V_, 3, i, probs), "two draws of one number");
    differs[0] += x != sample_token(&b, logits, SAMPLE_V_, 3, i, probs);
    differs[1] += x != sample_token(&a, logits, SAMPLE_V_, 4, i, probs);
    differs[2] += x != sample_token(&a, logits, SAMPLE_V_, 3, i + 50, probs);
  }
  for (int i = 0; i < 3; i++) CHECK(differs[i] > 30, "seed, sequence and position: only %d of 50 draws differ", differs[i]);
}

#ifdef BITNET_MATMUL_H
#define FORECAST_TEST_                                                                 \
  {"memory_forecast", "the memory table is what is allocated", test_memory_forecast},
#else
#define FORECAST_TEST_
#endif

#define MODEL_TESTS                                                                               \
  FORECAST_TEST_                                                                                  \
  {"threads_model", "two whole steps: the same bits with 1, 2, 3 threads", test_threads_model},   \
  {"recompute", "the same gradients with and without stored activations", test_recompute},        \
  {"micro_batches", "two micro-batches are one batch", test_micro_batches},                       \
  {"head_chunks", "the classifier in pieces of 7 rows", test_head_chunks},                        \
  {"packed_documents", "documents in one row are documents alone", test_packed_documents},        \
  {"lambda_zero", "without lambda there are no quantisers", test_lambda_zero},                    \
  {"nan_visible", "a damaged weight reaches the loss and the norm", test_nan_visible},            \
  {"optimizer_table", "which tensors decay; the norm over all gradients", test_optimizer_table},  \
  {"no_allocation", "a step asks for no memory", test_no_allocation},                             \
  {"decode", "cached decoding has the bits of training's forward pass", test_decode},             \
  {"generate", "prompts together, in pieces, one at a time", test_generate},                      \
  {"generate_shared", "answers to one prompt, computed once", test_generate_shared},              \
  {"sampler", "temperature, top_k, top_p against exact probabilities", test_sampler}

#endif
