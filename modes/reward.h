/*
reward.h: training reward models: which of two answers is better.

What it is:  ./train_bitnet reward data=FILE.jsonl init=DIR       pairs, labelled answers or right answers (bitnet/preferences.h)
             ./train_bitnet reward arithmetic [init=DIR]          right results and wrong ones that are made up
             ./train_bitnet reward linear data=FILE.jsonl         the smallest one, in a moment: linear.json in the run folder
             ./train_bitnet reward resume=RUN                     goes on with the same bits
             The network is the usual one with a head of one number; batches, loss and evaluation are hooks of the common trainer.
What not:    the head and its losses (bitnet/value.h), texts to tokens (modes/scorer.h).
Read before: bitnet/preferences.h, bitnet/value.h, modes/scorer.h, bitnet/trainer.h, modes/pretrain.h.
Defines:     mode_reward.

A micro-batch has batch_size pairs, each as two rows (or batch_size labelled answers, one row each):

    <user>12+34=</user><assistant> 46 </s>      value 2.1      loss  - log sigmoid(2.1 - (-0.7))
    <user>12+34=</user><assistant> 56 </s>      value -0.7

A model that starts from init= learns faster, because it has read before. The classifier of tokens is not used any more: it is left
out.
*/
#ifndef MODE_REWARD_H
#define MODE_REWARD_H

#include "pretrain.h"
#include "scorer.h"

typedef struct {
  const Options *o;
  const Tokenizer *tok;
  int arithmetic, pairs;
  DataLoader loader;           // arithmetic
  uint64_t *problems;          // [n_held] of arithmetic
  PreferenceSet set, held;     // files
  size_t n_held;
  ValueHead head;
  Ids *rows;                   // [B*grad_accum] the texts of a step
  int *labels;                 // [B*grad_accum] of labelled answers
  double *values, *slopes;     // [B]
  int at;                      // first row of the newest micro-batch
  float *host_coef;            // [B*T]
  Batch batch;                 // evaluation
  size_t cut;                  // texts that were too long
  // Of the step's pairs: share in the right order, and mean of good - bad; of labelled answers: share on the right side of 0.
  double right, margin;
} Reward;

// A question with its answers. Of arithmetic they lie in text, otherwise in the set; a labelled answer lacks the other one.
typedef struct {
  const char *query, *good, *bad;
  char text[3][ARITH_TEXT_CAP];
} RewardItem;

static void reward_problem_(const Reward *w, RewardItem *x, uint64_t problem, uint64_t seed, uint64_t number) {
  preference_arithmetic(&w->loader.arith, problem, seed, number, x->text[0], x->text[1], x->text[2]);
  x->query = x->text[0];
  x->good = x->text[1];
  x->bad = x->text[2];
}

static void reward_record_(RewardItem *x, const Preference *p) {
  x->query = p->query;
  x->good = p->good;
  x->bad = p->bad;
}

// Item `index` of the run. Those of a file come in a new random order each time that all have been seen.
static void reward_item_(const Reward *w, RewardItem *x, uint64_t index) {
  uint64_t seed = (uint64_t)w->o->seed;
  if (w->arithmetic) {
    reward_problem_(w, x, arith_draw_(&w->loader, index), seed, index);
  } else {
    uint64_t n = w->set.n;
    reward_record_(x, &w->set.items[permute(index % n, n, rng_u64(seed, RNG_DATA, index / n))]);
  }
}

// Held-out item i; its wrong answer is the same in every evaluation.
static void reward_held_(const Reward *w, RewardItem *x, size_t i) {
  if (w->arithmetic) reward_problem_(w, x, w->problems[i], 0, (uint64_t)i);
  else reward_record_(x, &w->held.items[i]);
}

// Tokenises an item as row, or two rows. Labelled answers: *label (=) 1 or 0.
static void reward_rows_(Reward *w, const RewardItem *x, Ids *rows, int *label, int T) {
  int form = w->o->qa_template;
  if (w->pairs) {
    w->cut += (size_t)scored_ids(&rows[0], w->tok, form, x->query, x->good, T);
    w->cut += (size_t)scored_ids(&rows[1], w->tok, form, x->query, x->bad, T);
  } else {
    *label = x->good != NULL;
    w->cut += (size_t)scored_ids(&rows[0], w->tok, form, x->query, x->good ? x->good : x->bad, T);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Hooks of the trainer.

// The texts of a step, tokenised: only here memory may be asked for.
static int reward_collect_(void *ctx, Model *m, int64_t step, int phase, Work *work) {
  Reward *w = (Reward *)ctx;
  const Options *o = w->o;
  int per_item = w->pairs ? 2 : 1, items = o->batch_size * o->grad_accum;
  if (phase > 0) return 0;
  for (int i = 0; i < items; i++) {
    RewardItem x;
    reward_item_(w, &x, (uint64_t)step * (uint64_t)items + (uint64_t)i);
    reward_rows_(w, &x, &w->rows[i * per_item], &w->labels[i], m->T);
  }
  w->right = w->margin = 0;
  work->updates = 1;
  work->batches = o->grad_accum;
  return 1;
}

static void reward_fill_(Reward *w, const Ids *rows, int n, Batch *b) {
  int pad = w->tok->pad_id >= 0 ? w->tok->pad_id : 0;
  for (int r = 0; r < b->B; r++) value_row(&w->head, b, r, r < n ? rows[r].ids : NULL, r < n ? (int)rows[r].n : 0, pad);
  b->n_targets = 0;
}

static void reward_batch_(void *ctx, uint64_t index, Batch *b) {
  Reward *w = (Reward *)ctx;
  w->at = (int)index * b->B;
  reward_fill_(w, w->rows + w->at, b->B, b);
}

// The sum of the losses of n rows whose values are there, and their slopes times `weight`. right and margin as in Reward, summed up.
static double reward_losses_(Reward *w, const int *labels, int n, double weight, double *right, double *margin) {
  double loss = 0;
  for (int r = 0; r < n; r += w->pairs ? 2 : 1) {
    double slope;
    if (w->pairs) {
      double d = w->values[r] - w->values[r + 1];
      loss += loss_pair(w->values[r], w->values[r + 1], &slope);
      w->slopes[r + 1] = -weight * slope;
      *right += d > 0 ? 1 : d == 0 ? 0.5 : 0;
      *margin += d;
    } else {
      loss += loss_label(w->values[r], labels[r], &slope);
      *right += (w->values[r] > 0) == labels[r];
      *margin += labels[r] ? w->values[r] : -w->values[r];
    }
    w->slopes[r] = weight * slope;
  }
  return loss;
}

// Forward and backward of the micro-batch that reward_batch_ has filled. Returns its part of the mean loss of the step.
static double reward_loss_(void *ctx, Model *m, const Batch *b, float coef, float *host_coef) {
  Reward *w = (Reward *)ctx;
  double items = (double)w->o->batch_size * (double)w->o->grad_accum, right = 0, margin = 0;
  batch_to_device(m, b, coef, host_coef);
  model_forward(m);
  value_forward(&w->head, m, b->B, w->values);
  double loss = reward_losses_(w, w->labels + w->at, b->B, 1 / items, &right, &margin);
  value_backward(&w->head, m, b->B, w->slopes);
  model_backward(m);
  w->right += right / items;
  w->margin += margin / items;
  return loss / items;
}

static void reward_report_(void *ctx, StrBuf *b) {
  const Reward *w = (const Reward *)ctx;
  strbuf_printf(b, ", \"accuracy\": ");
  json_put_number(b, w->right);
  strbuf_printf(b, ", \"margin\": ");
  json_put_number(b, w->margin);
}

static void reward_progress_(void *ctx, StrBuf *b) {
  strbuf_printf(b, " right %.3f  ", ((const Reward *)ctx)->right);
}

// Of all pairs of a right and a wrong answer, the share in which the right one has the higher value; NAN if there is none.
static double labelled_accuracy_(const double *values, const int *labels, size_t n) {
  double right = 0, pairs = 0;
  for (size_t i = 0; i < n; i++) {
    for (size_t k = 0; k < n && labels[i]; k++) {
      if (labels[k]) continue;
      pairs++;
      right += values[i] > values[k] ? 1 : values[i] == values[k] ? 0.5 : 0;
    }
  }
  return pairs > 0 ? right / pairs : NAN;
}

// The held-out items. samples: NULL, or where the first of them go with their values.
static void reward_measure_(Reward *w, Model *m, Metrics *out, StrBuf *samples) {
  int per_item = w->pairs ? 2 : 1, per_batch = m->B / per_item;
  size_t n = samples && w->n_held > EVAL_SAMPLES ? (size_t)EVAL_SAMPLES : w->n_held, cut = w->cut;
  double loss = 0, right = 0, margin = 0;
  double *values = (double *)xcalloc(n, sizeof(double));
  int *labels = (int *)xcalloc(n, sizeof(int));
  for (size_t first = 0; first < n; first += (size_t)per_batch) {
    int count = (int)(n - first < (size_t)per_batch ? n - first : (size_t)per_batch);
    RewardItem x;
    for (int i = 0; i < count; i++) {
      reward_held_(w, &x, first + (size_t)i);
      reward_rows_(w, &x, &w->rows[i * per_item], &labels[first + (size_t)i], m->T);
    }
    reward_fill_(w, w->rows, count * per_item, &w->batch);
    batch_to_device(m, &w->batch, 0, w->host_coef);
    model_forward(m);
    value_forward(&w->head, m, count * per_item, w->values);
    loss += reward_losses_(w, labels + first, count * per_item, 0, &right, &margin);
    for (int i = 0; i < count; i++) {
      if (!w->pairs) values[first + (size_t)i] = w->values[i];
      if (samples == NULL) continue;
      reward_held_(w, &x, first + (size_t)i);
      strbuf_printf(samples, "%.200s", x.query);
      if (x.good) strbuf_printf(samples, "\n  + %7.3f  %.200s", w->values[i * per_item], x.good);
      if (x.bad) strbuf_printf(samples, "\n  - %7.3f  %.200s", w->values[i * per_item + (w->pairs ? 1 : 0)], x.bad);
      strbuf_printf(samples, "\n");
    }
  }
  w->cut = cut;   // counted where they are trained on
  if (out) {
    out->val_loss = n ? loss / (double)n : NAN;
    out->pair_accuracy = n == 0 ? NAN : w->pairs ? right / (double)n : labelled_accuracy_(values, labels, n);
  }
  free(values);
  free(labels);
}

static void reward_evaluate_(void *ctx, Model *m, Metrics *out) {
  reward_measure_((Reward *)ctx, m, out, NULL);
}

static void reward_sample_(void *ctx, Model *m, StrBuf *b) {
  reward_measure_((Reward *)ctx, m, NULL, b);
}

static void reward_describe_(void *ctx, StrBuf *b) {
  const Reward *w = (const Reward *)ctx;
  strbuf_printf(b, ",\n\"data\": {\"%s\": %llu, \"held_out\": %zu}", w->pairs ? "pairs" : "labelled",
                (unsigned long long)(w->arithmetic ? w->loader.arith.n_problems : w->set.n), w->n_held);
}

// ---------------------------------------------------------------------------------------------------------
// Opening.

// The records of data=, and the held-out ones: those of val_data=, or a part of the same.
static void reward_read_(Reward *w, const Options *o) {
  uint64_t seed = (uint64_t)o->seed;
  if (o->data[0] == 0) die(EXIT_USAGE, "reward needs answers: data=FILE.jsonl with pairs or labels, or the preset arithmetic");
  w->set = preferences_load(o->data, seed);
  if (o->val_data[0]) w->held = preferences_load(o->val_data, seed);
  else preferences_split(&w->set, &w->held, o->holdout);
  w->pairs = w->set.pairs;
  if (w->set.n == 0)
    die(EXIT_USAGE, "%s: all records are held out; use a smaller holdout (%g), or val_data=FILE", o->data, o->holdout);
  if (w->held.n > 0 && w->held.pairs != w->pairs)
    die(EXIT_USAGE, "%s has %s, %s %s; both must have the same kind", o->data, w->pairs ? "pairs" : "labels", o->val_data,
        w->pairs ? "labels" : "pairs");
  w->n_held = w->held.n < (size_t)o->eval_problems ? w->held.n : (size_t)o->eval_problems;
}

// The same for arithmetic problems.
static void reward_problems_(Reward *w, const Options *o, const Tokenizer *tok) {
  Arithmetic a;
  arithmetic_from_options(&a, o);
  loader_open_arithmetic(&w->loader, &a, tok, (uint64_t)o->seed);
  w->problems = (uint64_t *)xcalloc((size_t)o->eval_problems, sizeof(uint64_t));
  w->n_held = arith_heldout(&a, w->problems, (size_t)o->eval_problems);
  w->pairs = 1;
}

// The length of a row: seq_len, or what the longest text needs, at most `most`.
static int reward_length_(Reward *w, const Options *o, int most) {
  Ids x = {NULL, 0, 0};
  size_t longest = 1;
  if (o->seq_len > 0) return o->seq_len;
  size_t n = w->arithmetic ? (size_t)w->loader.arith.n_problems : w->set.n;
  for (size_t i = 0; i < n; i++) {
    RewardItem item;
    if (w->arithmetic) reward_problem_(w, &item, i, 0, i);
    else reward_record_(&item, &w->set.items[i]);
    for (int k = 0; k < 2; k++) {
      const char *answer = k ? item.bad : item.good;
      if (answer == NULL) continue;
      scored_text_(&x, w->tok, o->qa_template, item.query, answer);
      longest = x.n > longest ? x.n : longest;
    }
  }
  free(x.ids);
  longest += w->arithmetic;   // a wrong result may have one digit more
  return longest < (size_t)most ? (int)longest : most;
}

// A model of this Config with all tensors that the model in directory `from` also has; the others are random.
static void reward_start_(Model *m, const Config *c, const char *from, const Options *o) {
  Model old;
  model_open(m, c, o->precision);
  model_init_random(m, (uint64_t)o->seed);
  if (from[0] == 0) return;
  model_load(&old, from, o->precision);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    for (int k = 0; k < old.table.count; k++) {
      const Tensor *x = &old.table.tensors[k];
      if (strcmp(x->name, t->name) == 0) dev_copy(m->params + t->offset, old.params + x->offset, t->n * sizeof(float));
    }
  }
  model_free(&old);
}

static void reward_introduce_(const Reward *w, const Model *m, const char *run) {
  const Options *o = w->o;
  fprintf(stderr, "device  %s\n", dev_name());
  fprintf(stderr, "model   reward model, %.2fM parameters, from %s; rows of %d tokens\n", (double)tensor_table_params(&m->table) / 1e6,
          o->init[0] ? o->init : "random weights", m->T);
  if (w->arithmetic) fprintf(stderr, "data    arithmetic: right and wrong results; %zu held-out problems\n", w->n_held);
  else fprintf(stderr, "data    %s: %zu %s; held out: %zu\n", o->data, w->set.n, w->pairs ? "pairs" : "labelled answers", w->n_held);
  fprintf(stderr, "run     %s\n", run);
}

// ---------------------------------------------------------------------------------------------------------
// The linear scorer: no network and no checkpoints, it is trained in a moment.

// pair_accuracy and loss of the held-out records.
static void linear_measure_(const LinearScorer *s, const Reward *w, Metrics *out) {
  size_t n = w->n_held;
  double loss = 0, right = 0, slope, *values = (double *)xcalloc(n, sizeof(double));
  int *labels = (int *)xcalloc(n, sizeof(int));
  for (size_t i = 0; i < n; i++) {
    const Preference *p = &w->held.items[i];
    double good = p->good ? linear_score(s, p->query, p->good) : 0, bad = p->bad ? linear_score(s, p->query, p->bad) : 0;
    labels[i] = p->good != NULL;
    values[i] = p->good ? good : bad;
    right += good > bad ? 1 : good == bad ? 0.5 : 0;
    if (w->pairs) loss += (loss_label(good, 1, &slope) + loss_label(bad, 0, &slope)) / 2;
    else loss += loss_label(values[i], labels[i], &slope);
  }
  out->val_loss = n ? loss / (double)n : NAN;
  out->pair_accuracy = n == 0 ? NAN : w->pairs ? right / (double)n : labelled_accuracy_(values, labels, n);
  free(values);
  free(labels);
}

static void reward_linear_(Reward *w, const Options *o) {
  LinearScorer s;
  Trainer t;
  StrBuf b = {NULL, 0, 0};
  if (o->resume[0]) die(EXIT_USAGE, "scorer=linear is trained in a moment: there is nothing to resume");
  if (is_arithmetic(o)) die(EXIT_USAGE, "scorer=linear knows words, no numbers: it needs data=FILE.jsonl");
  reward_read_(w, o);
  if (o->dry_run) {
    options_put_json(&b, o, STORED_GROUPS);
    printf("%s", b.data);
    strbuf_free(&b);
    return;
  }
  double t0 = time_now(), *losses = (double *)xcalloc((size_t)o->steps, sizeof(double));
  linear_train(&s, &w->set, o->steps, o->lr, (uint64_t)o->seed, losses);
  memset(&t, 0, sizeof t);
  t.o = o;
  linear_measure_(&s, w, &t.last);
  run_create_(&t);
  options_put_json(&b, o, STORED_GROUPS);
  run_file_(&t, "config.json", &b);
  b.len = 0;
  for (int i = 0; i < o->steps; i++) strbuf_printf(&b, "{\"step\": %d, \"loss\": %.9g}\n", i + 1, losses[i]);
  if (w->n_held > 0) {
    strbuf_printf(&b, "{\"step\": %d, \"val_loss\": %.9g, \"pair_accuracy\": ", o->steps, t.last.val_loss);
    json_put_number(&b, t.last.pair_accuracy);
    strbuf_printf(&b, "}\n");
  }
  run_file_(&t, "log.jsonl", &b);
  b.len = 0;
  linear_write(&s, &b);
  run_file_(&t, "linear.json", &b);
  printf("done: steps %d val_loss %.4f", o->steps, t.last.val_loss);
  if (!isnan(t.last.pair_accuracy)) printf(" pair_accuracy %.4f", t.last.pair_accuracy);
  printf(" seconds %.1f run %s\n", time_now() - t0, t.run);
  strbuf_free(&b);
  free(losses);
  linear_free(&s);
}

// ---------------------------------------------------------------------------------------------------------

static void reward_free_(Reward *w, int rows) {
  if (w->arithmetic) loader_free(&w->loader);
  else preferences_free(&w->set);
  if (w->held.items) preferences_free(&w->held);
  for (int i = 0; i < rows; i++) free(w->rows[i].ids);
  if (rows > 0) {
    value_free(&w->head);
    batch_free(&w->batch);
  }
  free(w->problems);
  free(w->rows);
  free(w->labels);
  free(w->values);
  free(w->slopes);
  free(w->host_coef);
}

// The network: everything from the options to the closing line. from: the directory whose parameters it starts with, or "".
static void reward_network_(Reward *w, Options *o, const Tokenizer *tok, Config *c, const char *from) {
  Model m;
  Trainer t;
  Hooks hooks;
  int rows = (w->pairs ? 2 : 1) * o->batch_size;
  int codes_only = c->act_bits > 0 && o->lambda_schedule == LAMBDA_NONE;
  if (o->dry_run) {
    StrBuf b = {NULL, 0, 0};
    Memory need = model_memory(c, rows, o->seq_len, o->recompute, codes_only);
    options_put_json(&b, o, STORED_GROUPS);
    printf("%s", b.data);
    pretrain_put_memory_(stdout, &need);
    strbuf_free(&b);
    reward_free_(w, 0);
    return;
  }
  if (o->resume[0]) model_load(&m, from, o->precision);
  else reward_start_(&m, c, from, o);
  m.dx_int8 = o->dx_int8 && o->precision == PRECISION_BF16;
  model_alloc_training(&m, rows, o->seq_len, o->recompute, codes_only);
  value_open(&w->head, &m, rows);
  batch_alloc(&w->batch, rows, o->seq_len);
  w->rows = (Ids *)xcalloc(size_mul((size_t)rows, (size_t)o->grad_accum), sizeof(Ids));
  w->labels = (int *)xcalloc(size_mul((size_t)rows, (size_t)o->grad_accum), sizeof(int));
  w->values = (double *)xcalloc((size_t)rows, sizeof(double));
  w->slopes = (double *)xcalloc((size_t)rows, sizeof(double));
  w->host_coef = (float *)xcalloc((size_t)m.R, sizeof(float));
  memset(&hooks, 0, sizeof hooks);
  hooks.ctx = w;
  hooks.collect = reward_collect_;
  hooks.batch = reward_batch_;
  hooks.loss = reward_loss_;
  hooks.report = reward_report_;
  hooks.progress = reward_progress_;
  hooks.evaluate = w->n_held > 0 ? reward_evaluate_ : NULL;
  hooks.sample = w->n_held > 0 ? reward_sample_ : NULL;
  hooks.describe = reward_describe_;
  trainer_open(&t, o, &hooks, &m, tok);
  reward_introduce_(w, &m, t.run);
  trainer_train(&t);
  if (w->cut) fprintf(stderr, "note: %zu texts were longer than %d tokens and lost their beginning\n", w->cut, m.T);
  trainer_close(&t);
  reward_free_(w, rows * o->grad_accum);
  model_free(&m);
}

UNUSED static void mode_reward(Options *o) {
  static Reward w;
  Tokenizer tok;
  Config c;
  char from[4096], full[PATH_MAX];
  memset(&w, 0, sizeof w);
  w.o = o;
  if (o->resume[0] == 0 && o->scorer == SCORER_LINEAR) {
    reward_linear_(&w, o);
    reward_free_(&w, 0);
    return;
  }
  run_start(o, from, sizeof from);
  if (o->init[0] && !o->resume[0]) {
    if (realpath(from, full) == NULL) die(EXIT_USAGE, "init: cannot read %s: %s", from, strerror(errno));
    if (is_arithmetic(o)) checkpoint_options(o, from);   // the problems held out then are held out now
    if (!is_arithmetic(o) && strcmp(o->preset, "arithmetic") == 0)
      die(EXIT_USAGE, "%s was not trained on arithmetic; give data=FILE.jsonl instead of the preset arithmetic", from);
  }
  w.arithmetic = is_arithmetic(o);
  if (!w.arithmetic) reward_read_(&w, o);
  if (!pretrain_tokenizer_(&tok, o, from))
    die(EXIT_USAGE, from[0] ? "%s brings no tokenizer" : "reward needs a tokenizer: tokenizer=DIR, or init=DIR, a model with its own%s",
        from);
  w.tok = &tok;
  if (w.arithmetic) reward_problems_(&w, o, &tok);
  if (o->qa_template == QA_CHATML && end_token(&tok, QA_CHATML) < 0)
    die(EXIT_USAGE, "qa_template=chatml: the tokenizer has no <|im_end|>");
  if (from[0]) {
    config_read(&c, from);
    if (!o->resume[0]) config_to_options(o, &c);
  }
  o->seq_len = reward_length_(&w, o, from[0] ? c.max_seq : 256);
  if (!from[0]) {
    if (o->vocab == 0) o->vocab = tok.vocab_padded;
    if (o->vocab < tok.vocab_size) die(EXIT_USAGE, "vocab=%d is smaller than the tokenizer's %d tokens", o->vocab, tok.vocab_size);
    config_from_options(&c, o);
  }
  if (o->seq_len > c.max_seq) die(EXIT_USAGE, "seq_len=%d is longer than the model's context of %d", o->seq_len, c.max_seq);
  c.value_head = c.tie_embeddings = 1;
  o->tie_embeddings = 1;
  reward_network_(&w, o, &tok, &c, from);
  tokenizer_free(&tok);
}

#endif
