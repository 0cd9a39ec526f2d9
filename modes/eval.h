/*
eval.h: measuring a model on data that it was not trained on.

What it is:  ./train_bitnet eval DIR                      arithmetic: loss and exact match on held-out problems
             ./train_bitnet eval DIR data=data/val_*.bin  token shards: loss (the data of a run: its seq_len=, batch_size=, eval_batches=)
             ./train_bitnet eval DIR task=NAME file=FILE  benchmarks and question sets: eval_tasks.h, eval_qa.h
             and the Evaluation that pretraining runs every eval_every steps, which is the same code.
What not:    no text-file perplexity (perplexity.h).
Read before: bitnet/losses.h, bitnet/infer.h, modes/generate.h.
Defines:     Evaluation, evaluation_open, evaluation_run, evaluation_samples, evaluation_close; arithmetic_from_options; mode_eval.

Exact match: the model continues "12+34=" greedily until its end token, batched, with the key/value cache, at lambda = 1; right
is an answer that equals the true one character by character.
*/
#ifndef MODE_EVAL_H
#define MODE_EVAL_H

#include "../bitnet/losses.h"
#include "../bitnet/trainer.h"
#include "eval_qa.h"
#include "eval_tasks.h"
#include "generate.h"

enum { EVAL_SEQUENCES = 256, EVAL_SAMPLES = 8 };

typedef struct {
  const Tokenizer *tok;
  DataLoader loader;       // arithmetic, or validation shards
  int arithmetic, batches; // batches: of shards, 0 = there is no validation data
  uint64_t *problems;      // [n_problems] held-out problems
  size_t n_problems;
  Batch batch;             // of the model's shape
  float *host_coef;        // [B*T]
  Session session;         // arithmetic only
  Prompt *prompts;         // [EVAL_SEQUENCES]
  int *prompt_memory;      // prompt ids and output ids of all of them
  int width;               // ids that a prompt or an answer can have
  const char *sample_prompt;
  uint64_t seed;
} Evaluation;

UNUSED static int is_arithmetic(const Options *o) {
  return strcmp(o->data, "arithmetic") == 0;
}

UNUSED static void arithmetic_from_options(Arithmetic *a, const Options *o) {
  arith_init(a, o->arith_ops, o->arith_min, o->arith_max, o->arith_mul_max, o->arith_holdout);
}

/*
Prepares to measure m, which has batch buffers. pattern: validation shards, "" for none; ignored with arithmetic data. tok may be NULL
for shards without a tokenizer. codes_only: m stays at lambda = 1.
*/
UNUSED static void evaluation_open(Evaluation *e, const Options *o, Model *m, const Tokenizer *tok, const char *pattern,
                                   int codes_only) {
  memset(e, 0, sizeof *e);
  e->tok = tok;
  e->arithmetic = is_arithmetic(o);
  e->sample_prompt = o->sample_prompt;
  e->seed = (uint64_t)o->seed;
  batch_alloc(&e->batch, m->B, m->T);
  e->host_coef = (float *)xcalloc((size_t)m->R, sizeof(float));
  if (e->arithmetic) {
    Arithmetic a;
    arithmetic_from_options(&a, o);
    loader_open_arithmetic(&e->loader, &a, tok, (uint64_t)o->seed);
    e->problems = (uint64_t *)xcalloc((size_t)o->eval_problems, sizeof(uint64_t));
    e->n_problems = arith_heldout(&a, e->problems, (size_t)o->eval_problems);
    if (e->n_problems == 0)
      die(EXIT_USAGE, "no arithmetic problem is held out for evaluation; use a larger arith_holdout (%g)", o->arith_holdout);
    e->width = arith_max_tokens(&a);
    e->prompts = (Prompt *)xcalloc(EVAL_SEQUENCES, sizeof(Prompt));
    e->prompt_memory = (int *)xcalloc((size_t)EVAL_SEQUENCES * 2 * (size_t)e->width, sizeof(int));
    session_open(&e->session, m, EVAL_SEQUENCES, m->c.max_seq < e->width ? m->c.max_seq : e->width, EVAL_SEQUENCES, codes_only);
  } else if (pattern[0]) {
    loader_open_shards(&e->loader, pattern, m->c.vocab, -1, (uint64_t)o->seed, 0);
    if (tok && e->loader.eot < 0) e->loader.eot = tok->eos_id;
    if (tok) loader_check_tokenizer(&e->loader, tok);
    uint64_t there = loader_blocks(&e->loader, m->T) / (uint64_t)m->B;
    e->batches = there < (uint64_t)o->eval_batches ? (int)there : o->eval_batches;
    if (e->batches == 0) e->batches = 1;   // fewer blocks than rows: the batch repeats some
  }
}

UNUSED static void evaluation_close(Evaluation *e) {
  if (e->arithmetic) session_free(&e->session);
  if (e->arithmetic || e->batches) loader_free(&e->loader);
  batch_free(&e->batch);
  free(e->problems);
  free(e->prompts);
  free(e->prompt_memory);
  free(e->host_coef);
}

// Continues the prompts of problems first .. first+n-1 greedily; n <= EVAL_SEQUENCES.
static void evaluation_answer_(Evaluation *e, size_t first, size_t n) {
  Sampler greedy;
  char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  memset(&greedy, 0, sizeof greedy);
  for (size_t i = 0; i < n; i++) {
    Prompt *p = &e->prompts[i];
    int *ids = e->prompt_memory + i * 2 * (size_t)e->width;
    arith_text(&e->loader.arith, e->problems[first + i], prompt, answer);
    p->ids = ids;
    p->n_ids = (int)tokenizer_encode(e->tok, prompt, strlen(prompt), ids, (size_t)e->width);
    p->out = ids + e->width;
  }
  generate(&e->session, &greedy, e->prompts, (int)n, e->width, e->tok->eos_id, e->tok->vocab_size, NULL, NULL);
}

// 1 if answer i of the last evaluation_answer_ is the true one, and nothing more.
static int evaluation_right_(const Evaluation *e, size_t first, size_t i) {
  char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  int ids[ARITH_TEXT_CAP];
  const Prompt *p = &e->prompts[i];
  arith_text(&e->loader.arith, e->problems[first + i], prompt, answer);
  int n = (int)tokenizer_encode(e->tok, answer, strlen(answer), ids, ARITH_TEXT_CAP);
  return p->ended && p->n_out == n && memcmp(p->out, ids, (size_t)n * sizeof(int)) == 0;
}

// Measures m, which is quantised at lambda = 1. The form of a Hook.
UNUSED static void evaluation_run(void *ctx, Model *m, Metrics *out) {
  Evaluation *e = (Evaluation *)ctx;
  double loss = 0, targets = 0;
  size_t rows = (size_t)m->B, right = 0;
  if (e->arithmetic) {
    for (size_t i = 0; i < e->n_problems; i += rows) {
      arith_fill_heldout(&e->loader, e->problems, i, e->n_problems, &e->batch);
      loss += batch_loss(m, &e->batch, 0, e->host_coef, 0);
      targets += (double)e->batch.n_targets;
    }
    for (size_t i = 0; i < e->n_problems; i += EVAL_SEQUENCES) {
      size_t n = e->n_problems - i < EVAL_SEQUENCES ? e->n_problems - i : (size_t)EVAL_SEQUENCES;
      evaluation_answer_(e, i, n);
      for (size_t k = 0; k < n; k++) right += (size_t)evaluation_right_(e, i, k);
    }
    out->exact_match = (double)right / (double)e->n_problems;
  }
  for (int i = 0; i < e->batches; i++) {
    loader_batch(&e->loader, (uint64_t)i, &e->batch);
    loss += batch_loss(m, &e->batch, 0, e->host_coef, 0);
    targets += (double)e->batch.n_targets;
  }
  if (targets > 0) out->val_loss = loss / targets;
}

// One sampled continuation of up to 128 tokens for each text between |.
static void evaluation_texts_(Evaluation *e, Model *m, StrBuf *b) {
  Session session;
  Sampler sampler = {0.8, 0, 0.95, e->seed};
  int n_new = m->c.max_seq < 128 ? m->c.max_seq : 128;
  int *out = (int *)xcalloc((size_t)n_new, sizeof(int));
  session_open(&session, m, 1, m->c.max_seq, m->c.max_seq < 256 ? m->c.max_seq : 256, 0);
  char *copy = xstrdup(e->sample_prompt);
  uint64_t number = 0;
  for (char *text = copy; text;) {
    char *next = strchr(text, '|');
    if (next) *next++ = 0;
    Prompt p;
    int n_ids, *ids = prompt_ids(e->tok, text, &n_ids);
    memset(&p, 0, sizeof p);
    p.ids = ids;
    p.n_ids = n_ids;
    p.number = number++;
    p.out = out;
    if (n_ids < m->c.max_seq) generate(&session, &sampler, &p, 1, n_new, e->tok->eos_id, e->tok->vocab_size, NULL, NULL);
    strbuf_printf(b, "%s", text);
    tokenizer_decode(e->tok, out, (size_t)p.n_out, b);
    strbuf_printf(b, "\n\n");
    free(ids);
    text = next;
  }
  free(copy);
  free(out);
  session_free(&session);
}

// Appends sample texts: some held-out problems with the model's answers, or continuations of sample_prompt. The form of a Hook.
UNUSED static void evaluation_samples(void *ctx, Model *m, StrBuf *b) {
  Evaluation *e = (Evaluation *)ctx;
  char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  if (!e->arithmetic) {
    if (e->tok) evaluation_texts_(e, m, b);
    return;
  }
  size_t n = e->n_problems < EVAL_SAMPLES ? e->n_problems : (size_t)EVAL_SAMPLES;
  evaluation_answer_(e, 0, n);
  for (size_t i = 0; i < n; i++) {
    arith_text(&e->loader.arith, e->problems[i], prompt, answer);
    strbuf_printf(b, "%s", prompt);
    tokenizer_decode(e->tok, e->prompts[i].out, (size_t)e->prompts[i].n_out, b);
    if (evaluation_right_(e, 0, i)) strbuf_printf(b, "  right\n");
    else strbuf_printf(b, "  wrong, %s\n", answer);
  }
}

UNUSED static void mode_eval(Options *o) {
  if (o->task != TASK_NONE) {
    if (o->task == TASK_QA) mode_eval_qa(o);
    else mode_eval_task(o);
    return;
  }
  char dir[4096];
  Model m;
  Tokenizer tok;
  Evaluation e;
  Metrics found = {NAN, NAN, NAN, NAN};
  StrBuf samples = {NULL, 0, 0};
  checkpoint_path(dir, sizeof dir, o->dir);
  checkpoint_options(o, dir);
  load_to_run(&m, dir, o->precision, (float)o->lambda, 0);
  checkpoint_tokenizer(&tok, dir);
  int T = o->seq_len > 0 && o->seq_len < m.c.max_seq ? o->seq_len : m.c.max_seq;
  int rows = options_is_set(o, "batch_size") == FROM_USER ? o->batch_size : is_arithmetic(o) ? 128 : 8;
  model_alloc_batch(&m, rows, T, 1, m.frozen);
  evaluation_open(&e, o, &m, &tok,
                  is_arithmetic(o)                                                ? ""
                  : options_is_set(o, "data") == FROM_USER || o->val_data[0] == 0 ? o->data
                                                                                  : o->val_data,
                  m.frozen);
  evaluation_run(&e, &m, &found);
  if (e.arithmetic) {
    evaluation_samples(&e, &m, &samples);
    fprintf(stderr, "%s", samples.data);
    printf("problems %zu val_loss %.4f exact_match %.4f\n", e.n_problems, found.val_loss, found.exact_match);
  } else {
    printf("batches %d val_loss %.4f perplexity %.4f\n", e.batches, found.val_loss, exp(found.val_loss));
  }
  strbuf_free(&samples);
  evaluation_close(&e);
  tokenizer_free(&tok);
  model_free(&m);
}

#endif
