/*
infer.h: running a model: sequences with a key/value cache, batched decoding, sampling.

What it is:  a Session holds the caches of several sequences side by side and feeds rows (token, sequence, position) through
             the same blocks that training runs; a prompt, a batch of prompts and one new token for each sequence are all just
             rows. Because a row's bits do not depend on the rows beside it, sampled log-probabilities equal the ones that
             training recomputes.
What not:    no chat templates and no files; no threads.
Read before: bitnet/model.h.
Defines:     Session, session_open, session_free, session_forward; Sampler, sample_token; Prompt, generate.
*/
#ifndef BITNET_INFER_H
#define BITNET_INFER_H

#include "model.h"

typedef struct {
  Model *m;
  int sequences, capacity;    // caches, and positions in each
  int cache_rows;             // capacity rounded up to whole blocks, which is what is allocated
  int max_rows;               // rows of one session_forward
  void *memory;
  floatX **kcache, **vcache;  // [L] of sequences * cache_rows * NKV*HS numbers
  LayerActs acts;             // one block's buffers, shared by all
  floatX *x, *y;              // [max_rows,C] the residual stream, block by block
  float *rstd;                // [max_rows]
  floatX *logits;             // [max_rows,V]
  int *tokens, *seq, *pos;    // [max_rows] on the device
  float *host_logits;         // [max_rows,V]
} Session;

static void session_layout_(Arena *a, Session *s, int codes_only) {
  const Config *c = &s->m->c;
  size_t R = (size_t)s->max_rows, row = R * (size_t)c->dim * sizeof(floatX);
  size_t cache = (size_t)s->sequences * (size_t)s->cache_rows * (size_t)(c->kv_heads * c->head_dim) * sizeof(floatX);
  for (int l = 0; l < c->layers; l++) {
    s->kcache[l] = (floatX *)take_(a, cache);
    s->vcache[l] = (floatX *)take_(a, cache);
  }
  layer_acts_layout(a, &s->acts, c, R, codes_only);
  s->x = (floatX *)take_(a, row);
  s->y = (floatX *)take_(a, row);
  s->rstd = (float *)take_(a, R * sizeof(float));
  s->logits = (floatX *)take_(a, R * (size_t)c->vocab * sizeof(floatX));
  s->tokens = (int *)take_(a, R * sizeof(int));
  s->seq = (int *)take_(a, R * sizeof(int));
  s->pos = (int *)take_(a, R * sizeof(int));
}

// Room for `sequences` caches of `capacity` positions and max_rows rows a call. codes_only: the model stays at lambda = 1.
UNUSED static void session_open(Session *s, Model *m, int sequences, int capacity, int max_rows, int codes_only) {
  if (capacity > m->c.max_seq)
    die(EXIT_USAGE, "a context of %d positions is longer than the model's max_seq=%d", capacity, m->c.max_seq);
  memset(s, 0, sizeof *s);
  s->m = m;
  s->sequences = sequences;
  s->capacity = capacity;
  s->cache_rows = (capacity + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
  s->max_rows = max_rows;
  s->kcache = (floatX **)xcalloc((size_t)m->c.layers, sizeof(floatX *));
  s->vcache = (floatX **)xcalloc((size_t)m->c.layers, sizeof(floatX *));
  s->host_logits = (float *)xmalloc(size_mul(size_mul((size_t)max_rows, (size_t)m->c.vocab), sizeof(float)));
  Arena count = {NULL, 0}, arena = {NULL, 0};
  session_layout_(&count, s, codes_only);
  s->memory = dev_malloc(count.used);
  if (s->memory == NULL) die(EXIT_FAILED, "out of memory: %.1f MB for %d sequences of %d positions; fewer or shorter ones need less",
                             (double)count.used / 1e6, sequences, capacity);
  arena.base = (char *)s->memory;
  session_layout_(&arena, s, codes_only);
  model_reserve_scratch(&m->c, (size_t)max_rows);
}

UNUSED static void session_free(Session *s) {
  dev_free(s->memory);
  free(s->kcache);
  free(s->vcache);
  free(s->host_logits);
  memset(s, 0, sizeof *s);
}

/*
Feeds n <= max_rows rows (host arrays): tokens[i] at position pos[i] of sequence seq[i]. Rows of one sequence must come in order of
position, without gaps. Returns the logits [n,V] on the host, valid until the next call.
*/
UNUSED static const float *session_forward(Session *s, const int *tokens, const int *seq, const int *pos, int n) {
  Model *m = s->m;
  const Config *c = &m->c;
  size_t bytes = (size_t)n * sizeof(int);
  Context ctx;
  memset(&ctx, 0, sizeof ctx);
  dev_copy_in(s->tokens, tokens, bytes);
  dev_copy_in(s->seq, seq, bytes);
  dev_copy_in(s->pos, pos, bytes);
  ctx.R = n;
  ctx.pos = s->pos;
  ctx.seq = s->seq;
  ctx.capacity = s->cache_rows;
  embedding_forward(s->x, s->tokens, m->params + m->table.embed, n, c->dim);
  for (int l = 0; l < c->layers; l++) {
    ctx.kcache = s->kcache[l];
    ctx.vcache = s->vcache[l];
    layer_forward(m, l, &s->acts, s->y, s->x, &ctx);
    floatX *swap = s->x;
    s->x = s->y;
    s->y = swap;
  }
  rmsnorm_forward(s->y, s->rstd, s->x, m->params + m->table.final_norm, n, c->dim, c->norm_eps);
  linear_forward(s->logits, s->y, m->params + m->table.head, n, c->vocab, c->dim, m->precision);
  dev_floatx_out(s->host_logits, s->logits, (size_t)n * (size_t)c->vocab);
  return s->host_logits;
}

// ---------------------------------------------------------------------------------------------------------
// Sampling.

typedef struct {
  double temperature;   // 0: the most likely token
  int top_k;            // only the k most likely; 0: all
  double top_p;         // only the most likely ones that together reach probability p; 1: all
  uint64_t seed;
} Sampler;

/*
Draws a token from logits[0..V), V being the tokenizer's vocabulary: ids that only pad the embedding are never sampled. (sequence,
position) number the draw, so a text does not depend on what is sampled beside it. probs: [V] floats of scratch.

top_k and top_p cut the distribution at a threshold probability: the k-th largest, or the one where the largest together reach p.
The threshold is found by bisection on the probabilities, which needs no sorting; ties at the threshold all stay.
*/
UNUSED static int sample_token(const Sampler *s, const float *logits, int V, uint64_t sequence, uint64_t position, float *probs) {
  int best = 0;
  for (int v = 1; v < V; v++) {
    if (logits[v] > logits[best]) best = v;
  }
  if (s->temperature <= 0 || V == 1) return best;
  double sum = 0, u = rng_uniform(s->seed, RNG_SAMPLE, sequence << 32 | position);
  for (int v = 0; v < V; v++) sum += probs[v] = (float)exp(((double)logits[v] - (double)logits[best]) / s->temperature);
  float floor_ = 0;   // tokens below this are out; the best has probs = 1 and always stays
  if ((s->top_k > 0 && s->top_k < V) || s->top_p < 1) {
    float low = 0, high = 1;   // low keeps too many or just enough, high too few
    for (int step = 0; step < 60; step++) {
      float mid = 0.5f * (low + high);
      int count = 0;
      double mass = 0;
      for (int v = 0; v < V; v++) {
        if (probs[v] >= mid) {
          count++;
          mass += probs[v];
        }
      }
      int enough = (s->top_k > 0 && s->top_k < V && count >= s->top_k) || (s->top_p < 1 && mass >= s->top_p * sum);
      if (enough) low = mid;
      else high = mid;
    }
    floor_ = low;
  }
  double mass = 0, run = 0;
  for (int v = 0; v < V; v++) mass += probs[v] >= floor_ ? probs[v] : 0;
  for (int v = 0; v < V; v++) {
    if (probs[v] < floor_) continue;
    run += probs[v];
    if (u * mass < run) return v;
  }
  return best;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding.

// One sequence to be continued, and what came of it.
typedef struct {
  const int *ids;       // the prompt
  int n_ids;            // at least 1
  int cached;           // the first so many are in sequence i's cache already (i: the prompt's index); fewer than n_ids
  uint64_t number;      // numbers the random draws
  int *out;             // [max_new] the new tokens, without the end token
  int n_out;            // how many
  int ended;            // 1 if the end token came
} Prompt;

/*
Continues n prompts at once, greedily or by sampling, by at most max_new tokens each, until the token eos (-1: never) or the end of
the cache. on_token (or NULL) is called for each new token. All prompts go through the network together, in pieces of max_rows rows;
then every step feeds one row for each sequence that has not ended. n <= s->sequences. V: the tokenizer's vocabulary.
*/
UNUSED static void generate(Session *s, const Sampler *sampler, Prompt *prompts, int n, int max_new, int eos, int V,
                            void (*on_token)(void *ctx, int prompt, int token), void *ctx) {
  if (n > s->sequences || n > s->max_rows) die(EXIT_FAILED, "bug: %d prompts for %d sequences, %d rows", n, s->sequences, s->max_rows);
  size_t cap = (size_t)s->max_rows;
  int *tokens = (int *)xcalloc(cap * 3, sizeof(int)), *seq = tokens + cap, *pos = seq + cap;
  int *last = (int *)xcalloc((size_t)n, sizeof(int));   // the newest token of each sequence
  int *at = (int *)xcalloc((size_t)n, sizeof(int));     // tokens in its cache
  float *probs = (float *)xcalloc((size_t)V, sizeof(float));
  for (int i = 0; i < n; i++) {
    if (prompts[i].n_ids < 1) die(EXIT_USAGE, "an empty prompt: there is no token to continue from");
    if (prompts[i].n_ids > s->capacity) die(EXIT_USAGE, "the prompt has %d tokens, the context only %d", prompts[i].n_ids, s->capacity);
    prompts[i].n_out = prompts[i].ended = 0;
    at[i] = prompts[i].cached;
  }
  for (int started = 0;;) {
    // Rows of this pass: whole prompts as long as they last, then one row for each unfinished sequence.
    int rows = 0, prefill = 0;
    for (; started < n; started++) {
      Prompt *p = &prompts[started];
      while (at[started] < p->n_ids && rows < s->max_rows) {
        tokens[rows] = p->ids[at[started]];
        seq[rows] = started;
        pos[rows++] = at[started]++;
        prefill = 1;
      }
      if (at[started] < p->n_ids) break;
    }
    if (!prefill) {
      for (int i = 0; i < n; i++) {
        if (prompts[i].ended || prompts[i].n_out >= max_new || at[i] >= s->capacity) continue;
        tokens[rows] = last[i];
        seq[rows] = i;
        pos[rows++] = at[i]++;
      }
    }
    if (rows == 0) break;
    const float *logits = session_forward(s, tokens, seq, pos, rows);
    for (int r = 0; r < rows; r++) {
      Prompt *p = &prompts[seq[r]];
      if (pos[r] + 1 < p->n_ids || p->n_out >= max_new) continue;   // inside a prompt there is nothing to sample
      int token = sample_token(sampler, logits + (size_t)r * (size_t)s->m->c.vocab, V, p->number, (uint64_t)pos[r], probs);
      if (token == eos) {
        p->ended = 1;
        continue;
      }
      p->out[p->n_out++] = last[seq[r]] = token;
      if (on_token) on_token(ctx, seq[r], token);
    }
  }
  free(tokens);
  free(last);
  free(at);
  free(probs);
}

#endif
