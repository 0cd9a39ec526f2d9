/*
pretrain.h: training on next tokens, from random weights or from a model directory. The default mode.

What it is:  turns options into a model, data and hooks, and hands them to the loop.
Read before: bitnet/options.h, bitnet/trainer.h, dataloader.h, modes/eval.h.
Defines:     mode_pretrain.

The learning rate of the preset finetune. A ternary matrix is blind to the scale of its master weights, so what counts is the step
relative to their size: models come with a mean |W| from 0.01 (large ones) to 0.15, and a fixed rate would be too much for one and
nothing for the other. A wide matrix adds up more flipped codes in each of its sums, by chance as the root of the width. Without lr= the rate
is FINETUNE_STEP times the mean |W| of the matrices, divided by sqrt(dim).
*/
#ifndef MODE_PRETRAIN_H
#define MODE_PRETRAIN_H

#include "../bitnet/trainer.h"
#include "eval.h"

#define FINETUNE_STEP 0.4   // dev/LOG.md: half and twice as much lose more

typedef struct {
  DataLoader loader;
  Evaluation eval;
  const Options *o;
} Pretrain;

static void pretrain_batch_(void *ctx, uint64_t index, Batch *b) {
  loader_batch(&((const Pretrain *)ctx)->loader, index, b);
}

static void pretrain_evaluate_(void *ctx, Model *m, Metrics *out) {
  evaluation_run(&((Pretrain *)ctx)->eval, m, out);
}

static void pretrain_sample_(void *ctx, Model *m, StrBuf *out) {
  evaluation_samples(&((Pretrain *)ctx)->eval, m, out);
}

// What the run was trained on, for the manifest.
static void pretrain_describe_(void *ctx, StrBuf *b) {
  const Pretrain *p = (const Pretrain *)ctx;
  if (is_arithmetic(p->o)) {
    strbuf_printf(b, ",\n\"data\": {\"problems\": %llu, \"heldout_evaluated\": %zu}", (unsigned long long)p->loader.arith.n_problems,
                  p->eval.n_problems);
    return;
  }
  strbuf_printf(b, ",\n\"data\": [");
  for (size_t i = 0; i < p->loader.n_shards; i++) {
    const Shard *s = &p->loader.shards[i];
    strbuf_printf(b, "%s\n  {\"path\": ", i ? "," : "");
    json_put_string(b, s->path, strlen(s->path));
    strbuf_printf(b, ", \"tokens\": %llu, \"crc32\": \"%08x\"}", (unsigned long long)s->n_tokens, shard_word_(s, 6));
  }
  strbuf_printf(b, "\n]");
}

/*
The tokenizer of the run. A run that starts from a model (from, or "") uses the model's, if it has one; arithmetic brings its own;
shards have it in the directory tokenizer=, or beside them. Returns 0 if there is none: then vocab= must be given, and there are no
samples.
*/
static int pretrain_tokenizer_(Tokenizer *tok, const Options *o, const char *from) {
  char dir[4096], path[4096];
  if (from[0] && checkpoint_has_tokenizer(from)) {
    checkpoint_tokenizer(tok, from);
    return 1;
  }
  if (from[0] && !o->tokenizer[0]) return 0;
  if (o->tokenizer[0]) snprintf(dir, sizeof dir, "%s", o->tokenizer);
  else if (is_arithmetic(o)) {
    tokenizer_arithmetic(tok);
    return 1;
  } else {
    // Of several patterns the first one counts.
    size_t n = strcspn(o->data, ",");
    while (n > 0 && o->data[n - 1] != '/') n--;
    snprintf(dir, sizeof dir, "%.*s", n > 1 ? (int)n - 1 : 1, n > 1 ? o->data : n == 1 ? "/" : ".");
  }
  path_join(path, sizeof path, dir, "tokenizer.json");
  if (!is_file(path) && !o->tokenizer[0]) return 0;
  tokenizer_load(tok, dir);
  return 1;
}

// Fills in the options whose default depends on others, so that the run folder shows what was used.
static void pretrain_resolve_(Options *o, const Tokenizer *tok) {
  if (is_arithmetic(o)) {
    Arithmetic a;
    arithmetic_from_options(&a, o);
    if (o->seq_len == 0) o->seq_len = arith_row_tokens(&a, o->arith_drafts > 0);
  } else if (o->data[0] == 0) {
    die(EXIT_USAGE, "preset %s needs data: data=arithmetic, or token shards such as data=data/train_*.bin (see prepro/)", o->preset);
  }
  if (o->seq_len == 0) o->seq_len = 256;
  if (o->vocab == 0) {
    if (tok == NULL)
      die(EXIT_USAGE, "no tokenizer.json beside %s; give its directory with tokenizer=DIR, or the size with vocab=N", o->data);
    o->vocab = tok->vocab_padded;
  }
  if (tok && o->vocab < tok->vocab_size)
    die(EXIT_USAGE, "vocab=%d is smaller than the tokenizer's %d tokens", o->vocab, tok->vocab_size);
}

static void pretrain_put_memory_(FILE *f, const Memory *m) {
  const char *names[] = {"parameters", "gradients", "optimizer", "weights", "activations", "scratch", "total"};
  const size_t bytes[] = {m->parameters, m->gradients, m->optimizer, m->weights, m->activations, m->scratch, m->total};
  fprintf(f, "memory, MB\n");
  for (size_t i = 0; i < ARRAY_LEN(names); i++) fprintf(f, "  %-12s %10.1f\n", names[i], (double)bytes[i] / 1e6);
}

/*
Says, before anything large is allocated, whether the run fits and if not, what would make it fit. fatal: exit if it does not.
*/
static void pretrain_check_memory_(const Options *o, const Config *c, int codes_only, int fatal) {
  Memory need = model_memory(c, o->batch_size, o->seq_len, o->recompute, codes_only);
  size_t there = dev_memory_free();
  char hint[256] = "a smaller model is needed";
  if (there == 0 || need.total <= there) return;
  if (!o->recompute && model_memory(c, o->batch_size, o->seq_len, 1, codes_only).total <= there) {
    snprintf(hint, sizeof hint, "recompute=1 makes it fit");
  } else {
    for (int rows = o->batch_size / 2, accum = 2 * o->grad_accum; rows >= 1; rows /= 2, accum *= 2) {
      if (model_memory(c, rows, o->seq_len, 1, codes_only).total > there) continue;
      snprintf(hint, sizeof hint, "recompute=1 batch_size=%d grad_accum=%d makes it fit", rows, accum);
      break;
    }
  }
  if (fatal) die(EXIT_FAILED, "the run needs %.1f MB, %.1f MB are free; %s", (double)need.total / 1e6, (double)there / 1e6, hint);
  printf("does not fit: %.1f MB are free; %s\n", (double)there / 1e6, hint);
}

// The largest batch_size whose memory is at most `bytes`, 0 if not even one row fits: memory grows with the rows.
static int pretrain_largest_batch_(const Options *o, const Config *c, int recompute, int codes_only, size_t bytes) {
  int fits = 0, fails = (1 << 20) + 1;
  if (fails > INT_MAX / o->seq_len) fails = INT_MAX / o->seq_len;
  while (fails - fits > 1) {
    int middle = fits + (fails - fits) / 2;
    if (model_memory(c, middle, o->seq_len, recompute, codes_only).total <= bytes) fits = middle;
    else fails = middle;
  }
  return fits;
}

static void pretrain_dry_run_(const Options *o, const Config *c, int codes_only) {
  StrBuf b = {NULL, 0, 0};
  Memory need = model_memory(c, o->batch_size, o->seq_len, o->recompute, codes_only);
  TensorTable table;
  tensor_table(&table, c);
  options_put_json(&b, o, STORED_GROUPS);
  printf("%s", b.data);
  printf("parameters: %zu in %d tensors\n", tensor_table_params(&table), table.count);
  printf("tokens: %lld per update, %lld in the whole run\n", (long long)o->batch_size * o->seq_len * o->grad_accum,
         (long long)o->batch_size * o->seq_len * o->grad_accum * o->steps);
  pretrain_put_memory_(stdout, &need);
  size_t there = dev_memory_free();
  if (there > 0) {
    printf("largest batch_size %d, with recompute=1 %d: %.1f MB are free\n", pretrain_largest_batch_(o, c, 0, codes_only, there),
           pretrain_largest_batch_(o, c, 1, codes_only, there), (double)there / 1e6);
  }
  pretrain_check_memory_(o, c, codes_only, 0);
  tensor_table_free(&table);
  strbuf_free(&b);
}

// The rate for a model whose matrices are to become ternary, with two digits.
static double pretrain_finetune_lr_(const Model *m) {
  double sum = 0, count = 0;
  char digits[32];
  float *host = (float *)xmalloc(largest_tensor_(&m->table) * sizeof(float));
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (!(t->flags & TERNARY)) continue;
    dev_copy_out(host, m->params + t->offset, t->n * sizeof(float));
    for (size_t k = 0; k < t->n; k++) sum += fabs((double)host[k]);
    count += (double)t->n;
  }
  free(host);
  snprintf(digits, sizeof digits, "%.1e", FINETUNE_STEP * sum / count / sqrt((double)m->c.dim));
  return strtod(digits, NULL);
}

// The head of the progress output: what is trained on what.
static void pretrain_introduce_(const Pretrain *p, const Model *m, const char *run) {
  const Config *c = &m->c;
  const Options *o = p->o;
  fprintf(stderr, "device  %s\n", dev_name());
  fprintf(stderr, "model   %.2fM parameters: dim %d, %d layers, %d heads (%d key/value), FFN %d, vocabulary %d, context %d\n",
          (double)tensor_table_params(&m->table) / 1e6, c->dim, c->layers, c->heads, c->kv_heads, c->ffn_dim, c->vocab, c->max_seq);
  if (is_arithmetic(o)) {
    const Arithmetic *a = &p->loader.arith;
    fprintf(stderr, "data    arithmetic: operations %s, operands %d to %d", a->ops, a->min, a->max);
    if (strchr(a->ops, '*')) fprintf(stderr, " (of * 0 to %d)", a->mul_max);
    fprintf(stderr, "; %llu problems, %.0f%% of them held out, %zu of those evaluated\n", (unsigned long long)a->n_problems,
            100 * a->holdout, p->eval.n_problems);
  } else {
    fprintf(stderr, "data    %s: %zu files, %.2fM tokens\n", o->data, p->loader.n_shards, (double)p->loader.n_tokens / 1e6);
  }
  fprintf(stderr, "batch   %d x %d tokens x %d, %d steps\n", o->batch_size, o->seq_len, o->grad_accum, o->steps);
  fprintf(stderr, "run     %s\n", run);
}

UNUSED static void mode_pretrain(Options *o) {
  Model m;
  Tokenizer tok;
  Pretrain p;
  Trainer t;
  Hooks hooks;
  Config c;
  char from[4096];
  run_start(o, from, sizeof from);
  int has_tok = pretrain_tokenizer_(&tok, o, from);
  if (from[0]) {
    config_read(&c, from);
    if (!o->resume[0]) config_to_options(o, &c);
  }
  pretrain_resolve_(o, has_tok ? &tok : NULL);
  if (!from[0]) config_from_options(&c, o);
  // Activations are stored as codes when every forward pass, those of evaluation included, runs at lambda = 1.
  int codes_only = c.act_bits > 0 &&
                   (o->lambda_schedule == LAMBDA_NONE || (o->lambda_schedule == LAMBDA_WARMUP && lambda_ramp_steps(o) == 0));
  if (o->dry_run) {
    pretrain_dry_run_(o, &c, codes_only);
  } else {
    pretrain_check_memory_(o, &c, codes_only, 1);
    if (from[0]) {
      model_load(&m, from, o->precision);
      if (!o->resume[0] && strcmp(o->preset, "finetune") == 0 && !options_is_set(o, "lr")) o->lr = pretrain_finetune_lr_(&m);
    } else {
      model_open(&m, &c, o->precision);
      model_init_random(&m, (uint64_t)o->seed);
    }
    m.dx_int8 = o->dx_int8 && o->precision == PRECISION_BF16;
    model_alloc_training(&m, o->batch_size, o->seq_len, o->recompute, codes_only);
    memset(&p, 0, sizeof p);
    p.o = o;
    if (is_arithmetic(o)) {
      Arithmetic a;
      arithmetic_from_options(&a, o);
      loader_open_arithmetic(&p.loader, &a, &tok, (uint64_t)o->seed);
      p.loader.drafts = o->arith_drafts;
    } else {
      loader_open_shards(&p.loader, o->data, c.vocab, -1, (uint64_t)o->seed, 1);
      if (has_tok && p.loader.eot < 0) p.loader.eot = tok.eos_id;   // the files do not say it: llm.c's
      if (has_tok) loader_check_tokenizer(&p.loader, &tok);
      loader_blocks(&p.loader, o->seq_len);
    }
    evaluation_open(&p.eval, o, &m, has_tok ? &tok : NULL, o->val_data, codes_only);
    loader_batch(&p.loader, 0, &p.eval.batch);   // finds what does not fit before there is a run folder
    memset(&hooks, 0, sizeof hooks);
    hooks.ctx = &p;
    hooks.batch = pretrain_batch_;
    hooks.evaluate = pretrain_evaluate_;
    hooks.sample = pretrain_sample_;
    hooks.describe = pretrain_describe_;
    trainer_open(&t, o, &hooks, &m, has_tok ? &tok : NULL);
    pretrain_introduce_(&p, &m, t.run);
    trainer_train(&t);
    trainer_close(&t);
    evaluation_close(&p.eval);
    loader_free(&p.loader);
    model_free(&m);
  }
  if (has_tok) tokenizer_free(&tok);
}

#endif
