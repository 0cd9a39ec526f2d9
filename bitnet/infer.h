/*
infer.h: running a model: sequences with a key/value cache, batched decoding, sampling.

What it is:  a Session holds the caches of several sequences side by side and feeds rows (token, sequence, position) through
             the same blocks that training runs; a prompt, a batch of prompts and one new token for each sequence are all just
             rows. Because a row's bits do not depend on the rows beside it, sampled log-probabilities equal the ones that
             training recomputes.
What not:    no chat templates and no files; no threads.
Read before: bitnet/model.h.
Defines:     Session, session_open, session_free, session_rows, session_logits, session_best, session_logp, session_forward;
             RunMemory, run_memory, session_bytes; Sampler, sample_token; Prompt, generate.
*/
#ifndef BITNET_INFER_H
#define BITNET_INFER_H

#include "model.h"

enum { GRAPH_ROWS = 64 };     // passes of up to so many rows are recorded and repeated as one

typedef struct {
  Model *m;
  int sequences, capacity;    // caches, and positions in each
  int cache_rows;             // capacity rounded up to whole blocks, which is what is allocated
  int max_rows;               // rows of one session_rows
  int logit_rows;             // rows whose logits exist at a time
  void *memory;
  void **kcache, **vcache;    // [L] of kv_cache_bytes for each sequence
  LayerActs acts;             // one block's buffers, shared by all
  floatX *x, *y;              // [max_rows,C] the residual stream, block by block in turns
  floatX *final;              // [max_rows,C] one of the two: after session_rows the classifier's input
  float *rstd;                // [max_rows]
  floatX *logits;             // [logit_rows,V]
  int *tokens, *seq, *pos;    // [max_rows] on the device
  int *best;                  // [max_rows]
  float *losses, *lse;        // [logit_rows] of sampled tokens whose log-probability is asked for
  float *host_logits;         // [logit_rows,V]
  Graph graphs[GRAPH_ROWS];   // the pass over n rows is graphs[n-1]
} Session;

// The caches.
static void session_cache_layout_(Arena *a, Session *s) {
  const Config *c = &s->m->c;
  size_t cache = (size_t)s->sequences * kv_cache_bytes(s->cache_rows, c->kv_heads, c->head_dim, s->m->precision);
  for (int l = 0; l < c->layers; l++) {
    s->kcache[l] = take_(a, cache);
    s->vcache[l] = take_(a, cache);
  }
}

// Everything else.
static void session_layout_(Arena *a, Session *s, int codes_only) {
  const Config *c = &s->m->c;
  size_t R = (size_t)s->max_rows, row = R * (size_t)c->dim * sizeof(floatX);
  layer_acts_layout(a, &s->acts, c, R, codes_only, NULL);
  s->x = (floatX *)take_(a, row);
  s->y = (floatX *)take_(a, row);
  s->rstd = (float *)take_(a, R * sizeof(float));
  s->logits = (floatX *)take_(a, (size_t)s->logit_rows * (size_t)c->vocab * sizeof(floatX));
  s->tokens = (int *)take_(a, R * sizeof(int));
  s->seq = (int *)take_(a, R * sizeof(int));
  s->pos = (int *)take_(a, R * sizeof(int));
  s->best = (int *)take_(a, R * sizeof(int));
  s->losses = (float *)take_(a, (size_t)s->logit_rows * sizeof(float));
  s->lse = (float *)take_(a, (size_t)s->logit_rows * sizeof(float));
}

// The sizes, and room for the pointers to the caches. Few logits exist at a time: 4 MiB, at least one row.
static void session_shape_(Session *s, Model *m, int sequences, int capacity, int max_rows) {
  size_t rows = ((size_t)4 << 20) / ((size_t)m->c.vocab * sizeof(float));
  memset(s, 0, sizeof *s);
  s->m = m;
  s->sequences = sequences;
  s->capacity = capacity;
  s->cache_rows = (capacity + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
  s->max_rows = max_rows;
  s->logit_rows = rows < 1 ? 1 : rows < (size_t)max_rows ? (int)rows : max_rows;
  s->kcache = (void **)xcalloc((size_t)m->c.layers, sizeof(void *));
  s->vcache = (void **)xcalloc((size_t)m->c.layers, sizeof(void *));
}

static size_t session_scratch_bytes_(const Session *s) {
  size_t rows = (size_t)s->max_rows;
  return s->m->frozen ? frozen_scratch_bytes(&s->m->c, rows) : scratch_bytes_(&s->m->c, rows);
}

// Room for `sequences` caches of `capacity` positions and max_rows rows a call. codes_only: the model stays at lambda = 1.
UNUSED static void session_open(Session *s, Model *m, int sequences, int capacity, int max_rows, int codes_only) {
  if (capacity > m->c.max_seq)
    die(EXIT_USAGE, "a context of %d positions is longer than the model's max_seq=%d", capacity, m->c.max_seq);
  session_shape_(s, m, sequences, capacity, max_rows);
  s->host_logits = (float *)xmalloc(size_mul(size_mul((size_t)s->logit_rows, (size_t)m->c.vocab), sizeof(float)));
  Arena count = {NULL, 0}, arena = {NULL, 0};
  session_cache_layout_(&count, s);
  session_layout_(&count, s, codes_only);
  s->memory = dev_malloc(count.used);
  if (s->memory == NULL) die(EXIT_FAILED, "out of memory: %.1f MB for %d sequences of %d positions; fewer or shorter ones need less",
                             (double)count.used / 1e6, sequences, capacity);
  arena.base = (char *)s->memory;
  session_cache_layout_(&arena, s);
  session_layout_(&arena, s, codes_only);
  reserve_scratch_bytes_(session_scratch_bytes_(s));
}

UNUSED static void session_free(Session *s) {
  for (int i = 0; i < GRAPH_ROWS; i++) dev_graph_free(&s->graphs[i]);
  dev_free(s->memory);
  free(s->kcache);
  free(s->vcache);
  free(s->host_logits);
  memset(s, 0, sizeof *s);
}

// Bytes by purpose of a frozen model and a session with it.
typedef struct {
  size_t weights;   // packed matrices with their scales
  size_t tables;    // embedding table, classifier, and its screen
  size_t cache;     // keys and values
  size_t rest;      // norms, rotation angles, activations, logits, scratch
  size_t total;
} RunMemory;

// What running this Config will take; embed, head: TABLE_*; a table in a file takes nothing. Nothing is allocated on the device.
UNUSED static RunMemory run_memory(const Config *c, int precision, int embed, int head, int sequences, int capacity, int max_rows) {
  Model m;
  Session s;
  RunMemory out;
  LayerWeights w;
  Arena weights = {NULL, 0}, tables = {NULL, 0}, cache = {NULL, 0}, rest = {NULL, 0};
  memset(&m, 0, sizeof m);
  m.c = *c;
  m.frozen = 1;
  m.precision = precision;
  build_table_(&m.table, c, 1);
  for (int l = 0; l < c->layers; l++) weights_layout_(&weights, &w, c, 1);
  heads_layout_(&tables, &m, embed, head);
  session_shape_(&s, &m, sequences, capacity, max_rows);
  session_cache_layout_(&cache, &s);
  session_layout_(&rest, &s, 1);
  out.weights = weights.used;
  out.tables = tables.used;
  out.cache = cache.used;
  out.rest = rest.used + m.table.floats * sizeof(float) + (size_t)c->max_seq * (size_t)c->head_dim * sizeof(float) +
             session_scratch_bytes_(&s) + (size_t)s.logit_rows * (size_t)c->vocab * sizeof(float);
  out.total = out.weights + out.tables + out.cache + out.rest;
  free(s.kcache);
  free(s.vcache);
  tensor_table_free(&m.table);
  return out;
}

// What session_open takes for a model that trains, without scratch. Nothing is allocated on the device.
UNUSED static size_t session_bytes(const Config *c, int precision, int sequences, int capacity, int max_rows, int codes_only) {
  Model m;
  Session s;
  Arena count = {NULL, 0};
  memset(&m, 0, sizeof m);
  m.c = *c;
  m.precision = precision;
  session_shape_(&s, &m, sequences, capacity, max_rows);
  session_cache_layout_(&count, &s);
  session_layout_(&count, &s, codes_only);
  free(s.kcache);
  free(s.vcache);
  return count.used + (size_t)s.logit_rows * (size_t)c->vocab * sizeof(float);
}

// The network, from s->tokens, s->seq, s->pos to s->final. What it does depends on n alone, not on the contents of device memory.
static void session_pass_(Session *s, int n) {
  Model *m = s->m;
  const Config *c = &m->c;
  floatX *x = s->x, *y = s->y;
  Context ctx;
  memset(&ctx, 0, sizeof ctx);
  ctx.R = n;
  ctx.pos = s->pos;
  ctx.seq = s->seq;
  ctx.capacity = s->cache_rows;
  model_embed(m, x, s->tokens, n);
  for (int l = 0; l < c->layers; l++) {
    ctx.kcache = s->kcache[l];
    ctx.vcache = s->vcache[l];
    layer_forward(m, l, &s->acts, y, x, &ctx);
    floatX *swap = x;
    x = y;
    y = swap;
  }
  rmsnorm_forward(y, s->rstd, x, m->params + m->table.final_norm, n, c->dim, c->norm_eps);
}

/*
Feeds n <= max_rows rows (host arrays): tokens[i] at position pos[i] of sequence seq[i]. Rows of one sequence must come in order of
position, without gaps. What may come next is then asked for with session_logits or session_best.

Short passes are repeated as a graph: at lambda = 1, where the arguments of all ops are those of the pass before.
*/
UNUSED static void session_rows(Session *s, const int *tokens, const int *seq, const int *pos, int n) {
  size_t bytes = (size_t)n * sizeof(int);
  if (n > s->max_rows) die(EXIT_FAILED, "bug: %d rows for a session of %d", n, s->max_rows);
  dev_copy_in(s->tokens, tokens, bytes);
  dev_copy_in(s->seq, seq, bytes);
  dev_copy_in(s->pos, pos, bytes);
  s->final = s->m->c.layers % 2 ? s->x : s->y;
  Graph *g = n <= GRAPH_ROWS && s->m->lambda == 1.0f ? &s->graphs[n - 1] : NULL;
  if (g == NULL) {
    session_pass_(s, n);
  } else if (dev_graph_begin(g)) {
    session_pass_(s, n);
    dev_graph_end(g);
  }
}

// The logits [n,V] of rows first .. first+n-1 of the last session_rows, n <= logit_rows, on the host, valid until the next call.
UNUSED static const float *session_logits(Session *s, int first, int n) {
  size_t V = (size_t)s->m->c.vocab;
  if (n > s->logit_rows) die(EXIT_FAILED, "bug: logits of %d rows asked for, there is room for %d", n, s->logit_rows);
  model_logits(s->m, s->logits, s->final + (size_t)first * (size_t)s->m->c.dim, n);
  dev_floatx_out(s->host_logits, s->logits, (size_t)n * V);
  return s->host_logits;
}

// best (=) [n] on the host: the most likely token below V for each of the rows first .. first+n-1. Frozen models only.
UNUSED static void session_best(Session *s, int first, int n, int V, int *best) {
  head_argmax(s->best, s->final + (size_t)first * (size_t)s->m->c.dim, &s->m->head, n, V);
  dev_copy_out(best, s->best, (size_t)n * sizeof(int));
}

/*
logp (=) [n] on the host: the log-probabilities of tokens[0..n) (host) under the logits of the last session_logits, whose first n rows
they belong to. It is the op that training computes its loss with, so these are the bits that training computes from the same weights.
*/
UNUSED static void session_logp(Session *s, const int *tokens, int n, float *logp) {
  dev_copy_in(s->best, tokens, (size_t)n * sizeof(int));
  cross_entropy_forward(s->losses, s->lse, s->logits, s->best, n, s->m->c.vocab);
  dev_copy_out(logp, s->losses, (size_t)n * sizeof(float));
  for (int i = 0; i < n; i++) logp[i] = -logp[i];
}

// Both in one: the logits [n,V] of n <= logit_rows rows.
UNUSED static const float *session_forward(Session *s, const int *tokens, const int *seq, const int *pos, int n) {
  session_rows(s, tokens, seq, pos, n);
  return session_logits(s, 0, n);
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
  float *logp;          // [max_new] or NULL: log-probabilities at temperature 1 of the n_out tokens, and behind them of the end token
  int shares;           // 1: the same ids as the prompt before it in the list; its cached does not count
} Prompt;

/*
Which prompts go through the network together. Prompts that share their ids have one cache for as long as their histories are equal,
and each distinct history is computed once: eight answers to a question cost one prompt, and then as many rows in each step as there
are different beginnings of an answer. A row's bits do not depend on the other rows, so nothing but the time depends on it.

When the prompts of cache c draw different tokens, those that go on like the first of them keep it; each other history takes a copy in
the cache that has the number of its first prompt. That one is free: a prompt in the cache of its own number is the first there for as
long as it goes on, and never leaves it.
*/
typedef struct {
  int *slot;    // [n] each prompt's cache; -1 once it has ended
  int *first;   // [n] the first prompt of each cache; -1: the cache is not in use
  int *at;      // [n] tokens in each cache
  int *draw;    // [n] the token that each prompt has drawn last
  int *known;   // [n] 1: its log-probability has been computed
} Branches_;

// The next prompt behind p in the same cache, or -1.
static int branch_next_(const Branches_ *b, const Prompt *prompts, int n, int p) {
  int c = b->slot[p];
  for (p++; p < n && prompts[p].shares; p++) {
    if (b->slot[p] == c) return p;
  }
  return -1;
}

// Gives the prompts of cache c the tokens that they have drawn; histories that differ from now on get caches of their own.
static void branch_take_(Branches_ *b, Session *s, Prompt *prompts, int n, int c, int eos,
                         void (*on_token)(void *ctx, int prompt, int token), void *ctx) {
  const Config *k = &s->m->c;
  size_t bytes = kv_cache_bytes(s->cache_rows, k->kv_heads, k->head_dim, s->m->precision);
  int kept = -1, next;
  for (int p = b->first[c]; p >= 0; p = next) {
    next = branch_next_(b, prompts, n, p);
    if (b->draw[p] == eos) {
      prompts[p].ended = 1;
      b->slot[p] = -1;
      continue;
    }
    if (kept < 0) kept = p;
    prompts[p].out[prompts[p].n_out++] = b->draw[p];
    if (on_token) on_token(ctx, p, b->draw[p]);
  }
  b->first[c] = kept;
  while (kept >= 0) {
    int other = branch_next_(b, prompts, n, kept);   // the first prompt that goes on differently
    while (other >= 0 && b->draw[other] == b->draw[kept]) other = branch_next_(b, prompts, n, other);
    if (other < 0) break;
    for (int l = 0; l < k->layers; l++) {
      dev_copy((char *)s->kcache[l] + (size_t)other * bytes, (char *)s->kcache[l] + (size_t)c * bytes, bytes);
      dev_copy((char *)s->vcache[l] + (size_t)other * bytes, (char *)s->vcache[l] + (size_t)c * bytes, bytes);
    }
    b->first[other] = other;
    b->at[other] = b->at[c];
    for (int p = other; p >= 0; p = next) {
      next = branch_next_(b, prompts, n, p);
      if (b->draw[p] == b->draw[other]) b->slot[p] = other;
    }
  }
}

/*
Log-probabilities of what the prompts of the caches seq[0..rows) have drawn from the last session_logits, a row for each cache. One
call of the op does a token of every row, so there are as many calls as some row has different tokens. pick, logp: [rows] of scratch.
*/
static void branch_logp_(Branches_ *b, Session *s, Prompt *prompts, int n, const int *seq, int rows, int *pick, float *logp) {
  for (int more = 1; more;) {
    more = 0;
    for (int r = 0; r < rows; r++) {
      int p = b->first[seq[r]];
      pick[r] = b->draw[p];
      while (p >= 0 && b->known[p]) p = branch_next_(b, prompts, n, p);
      if (p < 0) continue;
      pick[r] = b->draw[p];
      more = 1;
    }
    if (!more) break;
    session_logp(s, pick, rows, logp);
    for (int r = 0; r < rows; r++) {
      for (int p = b->first[seq[r]]; p >= 0; p = branch_next_(b, prompts, n, p)) {
        if (b->draw[p] != pick[r]) continue;
        prompts[p].logp[prompts[p].n_out] = logp[r];
        b->known[p] = 1;
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int p = b->first[seq[r]]; p >= 0; p = branch_next_(b, prompts, n, p)) b->known[p] = 0;
  }
}

/*
Continues n prompts at once, greedily or by sampling, by at most max_new tokens each, until the token eos (-1: never) or the end of
the cache. on_token (or NULL) is called for each new token; log-probabilities are for sampling only, and wanted by all prompts or by
none. All prompts go through the network together, in pieces of max_rows rows; then every step feeds one row for each history that
has not ended. n <= s->sequences. V: the tokenizer's vocabulary.
*/
UNUSED static void generate(Session *s, const Sampler *sampler, Prompt *prompts, int n, int max_new, int eos, int V,
                            void (*on_token)(void *ctx, int prompt, int token), void *ctx) {
  if (n > s->sequences || n > s->max_rows) die(EXIT_FAILED, "bug: %d prompts for %d sequences, %d rows", n, s->sequences, s->max_rows);
  size_t cap = (size_t)s->max_rows;
  int *tokens = (int *)xcalloc(cap * 4, sizeof(int)), *seq = tokens + cap, *pos = seq + cap, *next = pos + cap;
  int *places = (int *)xcalloc((size_t)n * 5, sizeof(int));
  Branches_ b = {places, places + n, places + 2 * n, places + 3 * n, places + 4 * n};
  float *probs = (float *)xcalloc((size_t)V, sizeof(float));
  float *logp = prompts[0].logp ? (float *)xcalloc(cap, sizeof(float)) : NULL;
  int greedy = s->m->frozen && sampler->temperature <= 0;
  for (int i = 0; i < n; i++) {
    int shares = i > 0 && prompts[i].shares;
    if (prompts[i].n_ids < 1) die(EXIT_USAGE, "an empty prompt: there is no token to continue from");
    if (prompts[i].n_ids > s->capacity)
      die(EXIT_USAGE, "the prompt has %d tokens, the context only %d", prompts[i].n_ids, s->capacity);
    prompts[i].n_out = prompts[i].ended = 0;
    b.slot[i] = shares ? b.slot[i - 1] : i;
    b.first[i] = shares ? -1 : i;
    b.at[i] = shares ? 0 : prompts[i].cached;
  }
  for (int started = 0;;) {
    // Rows of this pass: whole prompts as long as they last, then one row for each history.
    int rows = 0, prefill = 0;
    for (; started < n; started++) {
      Prompt *p = &prompts[started];
      if (b.slot[started] != started) continue;
      while (b.at[started] < p->n_ids && rows < s->max_rows) {
        tokens[rows] = p->ids[b.at[started]];
        seq[rows] = started;
        pos[rows++] = b.at[started]++;
        prefill = 1;
      }
      if (b.at[started] < p->n_ids) break;
    }
    if (!prefill) {
      for (int c = 0; c < n; c++) {
        int p = b.first[c];
        if (p < 0 || prompts[p].n_out >= max_new || b.at[c] >= s->capacity) continue;
        tokens[rows] = b.draw[p];
        seq[rows] = c;
        pos[rows++] = b.at[c]++;
      }
    }
    if (rows == 0) break;
    session_rows(s, tokens, seq, pos, rows);
    // Inside a prompt there is nothing to sample; the rows between such rows are sampled in pieces.
    for (int r = 0; r < rows;) {
      int end = r, most = greedy ? rows : s->logit_rows;
      while (end < rows && end - r < most && pos[end] + 1 >= prompts[b.first[seq[end]]].n_ids &&
             prompts[b.first[seq[end]]].n_out < max_new) end++;
      if (end == r) {
        r++;
        continue;
      }
      const float *logits = NULL;
      if (greedy) session_best(s, r, end - r, V, next + r);
      else logits = session_logits(s, r, end - r);
      for (int i = r; i < end; i++) {
        for (int p = b.first[seq[i]]; p >= 0; p = branch_next_(&b, prompts, n, p)) {
          b.draw[p] = greedy ? next[i] : sample_token(sampler, logits + (size_t)(i - r) * (size_t)s->m->c.vocab, V, prompts[p].number,
                                                      (uint64_t)pos[i], probs);
        }
      }
      if (logp) branch_logp_(&b, s, prompts, n, seq + r, end - r, next + r, logp + r);
      for (; r < end; r++) branch_take_(&b, s, prompts, n, seq[r], eos, on_token, ctx);
    }
  }
  free(tokens);
  free(places);
  free(probs);
  free(logp);
}

#endif
