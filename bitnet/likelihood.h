/*
likelihood.h: how likely does a model find a given continuation of a given text.

What it is:  texts into Continuations (context ids and continuation ids), a long text into windows, and the sum of the
             log-probabilities of each continuation's tokens. The conventions are those of EleutherAI's lm-evaluation-harness, so that
             numbers compare.
What not:    no tasks and no files: modes/eval_tasks.h.
Read before: bitnet/infer.h, tokenizer.h.
Defines:     Continuation, Continuations, continuation_add, continuation_add_windows, continuations_free; likelihoods.

The choices of a question share its text, and questions share the examples before them. Each sequence of the session therefore keeps
what it computed for the request before, and only feeds what comes behind the common beginning. A row's bits do not depend on the
rows beside it, so this changes no result.
*/
#ifndef BITNET_LIKELIHOOD_H
#define BITNET_LIKELIHOOD_H

#include "../tokenizer.h"
#include "infer.h"
#include <limits.h>

typedef struct {
  int *ids;             // [n] the context, then the continuation
  int n, n_context;     // 1 <= n_context < n
  double logp;          // result: sum of the log-probabilities of the continuation's tokens, natural logarithm
  int greedy;           // result: 1 if each of them was the most likely token at its place
} Continuation;

// A list of them that grows.
typedef struct {
  Continuation *items;
  size_t n, cap;
  size_t cut;           // contexts that did not fit and lost their beginning
} Continuations;

UNUSED static void continuations_free(Continuations *list) {
  for (size_t i = 0; i < list->n; i++) free(list->items[i].ids);
  free(list->items);
  memset(list, 0, sizeof *list);
}

// The ids of a text as the tokenizer's author would feed it: with <s> in front where that is usual and not written out. Caller frees.
UNUSED static int *ids_of_text_(const Tokenizer *t, const char *text, size_t len, int with_bos, int *n) {
  size_t bos_len = 0, count = tokenizer_encode_marks(t, text, len, NULL, 0);
  const char *bos = tokenizer_piece(t, t->bos_id, &bos_len);
  int lead = with_bos && t->add_bos && bos && !(len >= bos_len && memcmp(text, bos, bos_len) == 0);
  if (count > INT_MAX / 2) die(EXIT_USAGE, "a text of %zu tokens is too long", count);
  int *ids = (int *)xmalloc(size_mul(count + 1, sizeof(int)));
  if (lead) ids[0] = t->bos_id;
  tokenizer_encode_marks(t, text, len, ids + lead, count);
  *n = (int)count + lead;
  return ids;
}

// What stands in front of a text without a context.
UNUSED static int first_token_(const Tokenizer *t) {
  int id = t->bos_id >= 0 ? t->bos_id : t->eos_id;
  if (id < 0) die(EXIT_USAGE, "the tokenizer has no token to start a text from: neither <s> nor an end of text");
  return id;
}

// Takes over ids.
UNUSED static void continuation_push_(Continuations *list, int *ids, int n, int n_context) {
  if (list->n == list->cap) {
    list->cap = list->cap ? size_mul(list->cap, 2) : 256;
    list->items = (Continuation *)xrealloc(list->items, size_mul(list->cap, sizeof(Continuation)));
  }
  Continuation *c = &list->items[list->n++];
  c->ids = ids;
  c->n = n;
  c->n_context = n_context;
  c->logp = 0;
  c->greedy = 1;
}

/*
Adds `answer` behind `context`. Blanks at the end of the context go to the answer, since tokens begin with their blank. Both are
encoded together; the answer's tokens are those behind as many as the context alone has, at least one. What does not fit into max_seq
inputs is cut off in front. Returns 0 if the answer has no tokens, or if not even it fits; then nothing is added.
*/
UNUSED static int continuation_add(Continuations *list, const Tokenizer *t, const char *context, const char *answer, int max_seq) {
  StrBuf both = {NULL, 0, 0};
  size_t len = strlen(context);
  int n, n_context, *ids;
  strbuf_append(&both, context, len);
  strbuf_append(&both, answer, strlen(answer));
  while (len > 0 && isspace((unsigned char)context[len - 1])) len--;
  if (context[0] == 0) {
    int *rest = ids_of_text_(t, answer, strlen(answer), 0, &n);
    ids = (int *)xmalloc(((size_t)n + 1) * sizeof(int));
    int lead = n < 2 || rest[0] != first_token_(t);   // an answer that brings the first token along needs no second one
    ids[0] = first_token_(t);
    memcpy(ids + lead, rest, (size_t)n * sizeof(int));
    n += lead;
    n_context = 1;
    free(rest);
  } else {
    free(ids_of_text_(t, both.data, len, 1, &n_context));
    ids = ids_of_text_(t, both.data, both.len, 1, &n);
    if (n_context >= n) n_context = n - 1;
    if (n_context < 1) n_context = 1;
  }
  strbuf_free(&both);
  int cut = n - (max_seq + 1);
  if (n - n_context > max_seq || n < 2) {
    free(ids);
    return 0;
  }
  if (cut > 0) {
    memmove(ids, ids + cut, (size_t)(n - cut) * sizeof(int));
    n -= cut;
    n_context -= cut;
    list->cut++;
  }
  continuation_push_(list, ids, n, n_context);
  return 1;
}

/*
Adds all tokens of a text, each predicted once: windows of max_seq tokens, the first behind the token that starts a text, each later
one behind the last token of the one before. The last window is filled up with context from before it.
*/
UNUSED static void continuation_add_windows(Continuations *list, const Tokenizer *t, const char *text, size_t len, int max_seq) {
  int n, *ids = ids_of_text_(t, text, len, 1, &n);
  for (int done = 0, end; done < n; done = end) {
    end = n - done < max_seq ? n : done + max_seq;
    int first = done == 0 ? -1 : end - max_seq - 1, count = end - first;   // the window's tokens are ids[first .. end)
    int *window = (int *)xmalloc((size_t)count * sizeof(int));
    for (int i = 0; i < count; i++) window[i] = first + i < 0 ? first_token_(t) : ids[first + i];
    continuation_push_(list, window, count, done - first);
  }
  free(ids);
}

// ---------------------------------------------------------------------------------------------------------
// Scoring.

// log softmax(z)[target] over V logits; *greedy is cleared unless the target is the first of the largest.
UNUSED static double row_logp_(const float *z, int V, int target, int *greedy) {
  int best = 0;
  double sum = 0;
  for (int v = 1; v < V; v++) best = z[v] > z[best] ? v : best;
  for (int v = 0; v < V; v++) sum += exp((double)z[v] - (double)z[best]);
  if (best != target) *greedy = 0;
  return (double)z[target] - (double)z[best] - log(sum);
}

// One sequence of the session and the stretch of requests that it works off in order.
typedef struct {
  size_t first, next, end;
  int at;   // the next row of request `next` to be fed; -1: it has not begun
} LikelihoodSlot_;

enum {
  LIKELIHOOD_SLOTS = 32,          // sequences side by side
  LIKELIHOOD_ROWS = 256,          // rows of a pass
  LIKELIHOOD_CACHE = 512 << 20    // bytes that all caches may have together; one is always there
};

// How many of the request's first rows the cache holds already, from the request before it in the same slot.
UNUSED static int cached_rows_(const Continuation *items, const LikelihoodSlot_ *slot) {
  const Continuation *c = &items[slot->next], *before = c - 1;
  int n = 0;
  if (slot->next == slot->first) return 0;
  while (n < c->n_context - 1 && n < before->n - 1 && c->ids[n] == before->ids[n]) n++;
  return n;
}

// Adds the log-probabilities that rows 0 .. rows-1 of the last session_rows predict; owner[r] is row r's request.
UNUSED static void add_rows_(Session *s, Continuation *items, const size_t *owner, const int *pos, int rows) {
  int V = s->m->c.vocab;
  for (int r = 0; r < rows;) {
    int end = r;
    while (end < rows && end - r < s->logit_rows && pos[end] >= items[owner[end]].n_context - 1) end++;
    if (end == r) {   // inside a context there is nothing to predict
      r++;
      continue;
    }
    const float *z = session_logits(s, r, end - r);
    for (; r < end; r++, z += V) {
      Continuation *c = &items[owner[r]];
      c->logp += row_logp_(z, V, c->ids[pos[r] + 1], &c->greedy);
    }
  }
}

// Fills logp and greedy of all items. Ids must be below the model's vocabulary, and no item may have more than max_seq inputs.
UNUSED static void likelihoods(Model *m, Continuations *list) {
  Session s;
  LikelihoodSlot_ slot[LIKELIHOOD_SLOTS];
  int tokens[LIKELIHOOD_ROWS], seq[LIKELIHOOD_ROWS], pos[LIKELIHOOD_ROWS], capacity = 1, rows;
  size_t owner[LIKELIHOOD_ROWS], n = list->n, done = 0;
  double shown = time_now();
  for (size_t i = 0; i < n; i++) capacity = list->items[i].n - 1 > capacity ? list->items[i].n - 1 : capacity;
  size_t bytes = (size_t)m->c.layers * 2 * (size_t)(m->c.kv_heads * m->c.head_dim) * sizeof(floatX) * (size_t)(capacity + KV_BLOCK);
  size_t slots = LIKELIHOOD_CACHE / bytes;
  slots = slots > LIKELIHOOD_SLOTS ? (size_t)LIKELIHOOD_SLOTS : slots;
  slots = slots > n ? n : slots;
  slots = slots < 1 ? 1 : slots;
  session_open(&s, m, (int)slots, capacity, LIKELIHOOD_ROWS, m->frozen);
  for (size_t k = 0; k < slots; k++) {
    slot[k].first = slot[k].next = n * k / slots;
    slot[k].end = n * (k + 1) / slots;
    slot[k].at = -1;
  }
  do {
    rows = 0;
    for (size_t k = 0; k < slots; k++) {
      if (slot[k].next == slot[k].end) continue;
      const Continuation *c = &list->items[slot[k].next];
      if (slot[k].at < 0) slot[k].at = cached_rows_(list->items, &slot[k]);
      for (; slot[k].at < c->n - 1 && rows < LIKELIHOOD_ROWS; slot[k].at++) {
        tokens[rows] = c->ids[slot[k].at];
        seq[rows] = (int)k;
        pos[rows] = slot[k].at;
        owner[rows++] = slot[k].next;
      }
    }
    if (rows > 0) {
      session_rows(&s, tokens, seq, pos, rows);
      add_rows_(&s, list->items, owner, pos, rows);
    }
    for (size_t k = 0; k < slots; k++) {
      if (slot[k].next == slot[k].end || slot[k].at < list->items[slot[k].next].n - 1) continue;
      slot[k].next++;
      slot[k].at = -1;
      done++;
    }
    if (isatty(2) && (time_now() - shown > 0.5 || rows == 0)) {
      fprintf(stderr, "\r%zu of %zu continuations%s", done, n, rows == 0 ? "\n" : " ");
      shown = time_now();
    }
  } while (rows > 0);
  session_free(&s);
}

#endif
