/*
linear_scorer.h: the smallest reward model: which words stand in a question and in its answer.

What it is:  every word has 16 numbers; e(text) is their mean, and the score of an answer  w . [e(question); e(answer)] + b .
             Trained with Adam on labelled answers, all of them in every step. Words are what stands between blanks, in lower case;
             those that training did not see count as nothing.
What not:    it cannot express which answer belongs to which question (a sum has no products of both), only which words good answers
             use. A scorer that reads is in modes/scorer.h.
Read before: bitnet/preferences.h, bitnet/value.h (losses).
Defines:     LinearScorer, linear_train, linear_score, linear_write, linear_read, linear_free.
*/
#ifndef BITNET_LINEAR_SCORER_H
#define BITNET_LINEAR_SCORER_H

#include "preferences.h"
#include "value.h"

enum { LINEAR_DIM = 16 };

typedef struct {
  char **words;      // [n] sorted
  size_t n;
  double *params;    // [n,LINEAR_DIM] of the words, then w [2*LINEAR_DIM], then b
} LinearScorer;

static size_t linear_size_(const LinearScorer *s) {
  return s->n * LINEAR_DIM + 2 * LINEAR_DIM + 1;
}

UNUSED static void linear_free(LinearScorer *s) {
  for (size_t i = 0; i < s->n; i++) free(s->words[i]);
  free(s->words);
  free(s->params);
  memset(s, 0, sizeof *s);
}

// ---------------------------------------------------------------------------------------------------------
// Words.

// The next word of a text in lower case, at most cap-1 bytes of it; 0 at the end.
static int linear_word_(const char **text, char *word, size_t cap) {
  const char *p = *text;
  size_t n = 0;
  while (isspace((unsigned char)*p)) p++;
  for (; *p && !isspace((unsigned char)*p); p++) {
    if (n + 1 < cap) word[n++] = (char)(*p >= 'A' && *p <= 'Z' ? *p - 'A' + 'a' : *p);
  }
  word[n] = 0;
  *text = p;
  return n > 0;
}

enum { LINEAR_WORD_CAP = 128 };

static int linear_compare_(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

// The index of a word, or n where it is unknown.
static size_t linear_find_(const LinearScorer *s, const char *word) {
  size_t lo = 0, hi = s->n;
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    int c = strcmp(s->words[mid], word);
    if (c == 0) return mid;
    if (c < 0) lo = mid + 1;
    else hi = mid;
  }
  return s->n;
}

// Adds the words of a text to a list that grows.
static void linear_add_words_(LinearScorer *s, size_t *cap, const char *text) {
  char word[LINEAR_WORD_CAP];
  while (linear_word_(&text, word, sizeof word)) {
    if (s->n == *cap) {
      *cap = *cap ? size_mul(*cap, 2) : 256;
      s->words = (char **)xrealloc(s->words, size_mul(*cap, sizeof(char *)));
    }
    s->words[s->n++] = xstrdup(word);
  }
}

// Sorts the list and leaves each word once.
static void linear_sort_words_(LinearScorer *s) {
  size_t kept = 0;
  qsort(s->words, s->n, sizeof(char *), linear_compare_);
  for (size_t i = 0; i < s->n; i++) {
    if (kept > 0 && strcmp(s->words[kept - 1], s->words[i]) == 0) free(s->words[i]);
    else s->words[kept++] = s->words[i];
  }
  s->n = kept;
}

// A text as indices of words (s->n: unknown). Caller frees; *n (=) how many.
static size_t *linear_indices_(const LinearScorer *s, const char *text, size_t *n) {
  char word[LINEAR_WORD_CAP];
  size_t *out = (size_t *)xmalloc((strlen(text) / 2 + 1) * sizeof(size_t));
  *n = 0;
  while (linear_word_(&text, word, sizeof word)) out[(*n)++] = linear_find_(s, word);
  return out;
}

// ---------------------------------------------------------------------------------------------------------
// Scores and gradients.

// e (=) [LINEAR_DIM], the mean over n words; 0 for no words.
static void linear_mean_(const LinearScorer *s, double *e, const size_t *words, size_t n) {
  memset(e, 0, LINEAR_DIM * sizeof(double));
  for (size_t i = 0; i < n; i++) {
    for (int k = 0; k < LINEAR_DIM && words[i] < s->n; k++) e[k] += s->params[words[i] * LINEAR_DIM + (size_t)k] / (double)n;
  }
}

// An answer that is trained on.
typedef struct {
  size_t *words[2], n[2];   // of the question, of the answer
  int label;
} LinearCase_;

static double linear_value_(const LinearScorer *s, const LinearCase_ *c, double e[2][LINEAR_DIM]) {
  const double *w = s->params + s->n * LINEAR_DIM;
  double z = w[2 * LINEAR_DIM];
  for (int side = 0; side < 2; side++) {
    linear_mean_(s, e[side], c->words[side], c->n[side]);
    for (int k = 0; k < LINEAR_DIM; k++) z += w[side * LINEAR_DIM + k] * e[side][k];
  }
  return z;
}

// The raw score of an answer, before the sigmoid.
UNUSED static double linear_score(const LinearScorer *s, const char *query, const char *answer) {
  LinearCase_ c;
  double e[2][LINEAR_DIM];
  const char *texts[2] = {query, answer};
  for (int side = 0; side < 2; side++) c.words[side] = linear_indices_(s, texts[side], &c.n[side]);
  double z = linear_value_(s, &c, e);
  free(c.words[0]);
  free(c.words[1]);
  return z;
}

/*
The mean loss over n cases, and its gradient (=) in all parameters: with z = w . [e_q; e_a] + b and dz = (sigmoid(z) - label) / n

    dw = dz [e_q; e_a]      db = dz      d word = dz w_side / (words of the text)   for each time that it stands there
*/
static double linear_gradient_(const LinearScorer *s, const LinearCase_ *cases, size_t n, double *grad) {
  const double *w = s->params + s->n * LINEAR_DIM;
  double *dw = grad + s->n * LINEAR_DIM, e[2][LINEAR_DIM], loss = 0;
  memset(grad, 0, linear_size_(s) * sizeof(double));
  for (size_t i = 0; i < n; i++) {
    const LinearCase_ *c = &cases[i];
    double slope;
    loss += loss_label(linear_value_(s, c, e), c->label, &slope) / (double)n;
    slope /= (double)n;
    dw[2 * LINEAR_DIM] += slope;
    for (int side = 0; side < 2; side++) {
      for (int k = 0; k < LINEAR_DIM; k++) dw[side * LINEAR_DIM + k] += slope * e[side][k];
      for (size_t t = 0; t < c->n[side]; t++) {
        double *d = grad + c->words[side][t] * LINEAR_DIM;
        for (int k = 0; k < LINEAR_DIM && c->words[side][t] < s->n; k++)
          d[k] += slope * w[side * LINEAR_DIM + k] / (double)c->n[side];
      }
    }
  }
  return loss;
}

// Cases of all answers of a set: two of a pair, one of a labelled answer. Caller frees with linear_cases_free_.
static LinearCase_ *linear_cases_(const LinearScorer *s, const PreferenceSet *set, size_t *n) {
  LinearCase_ *cases = (LinearCase_ *)xcalloc(size_mul(set->n, 2), sizeof(LinearCase_));
  *n = 0;
  for (size_t i = 0; i < set->n; i++) {
    for (int label = 0; label < 2; label++) {
      const char *answer = label ? set->items[i].good : set->items[i].bad;
      if (answer == NULL) continue;
      LinearCase_ *c = &cases[(*n)++];
      c->words[0] = linear_indices_(s, set->items[i].query, &c->n[0]);
      c->words[1] = linear_indices_(s, answer, &c->n[1]);
      c->label = label;
    }
  }
  return cases;
}

static void linear_cases_free_(LinearCase_ *cases, size_t n) {
  for (size_t i = 0; i < n; i++) {
    free(cases[i].words[0]);
    free(cases[i].words[1]);
  }
  free(cases);
}

/*
Makes *s from a set: its words, random numbers N(0, 0.1) for them and for w, then `steps` steps of Adam (0.9, 0.999, no decay).
losses (=) [steps], before each step.
*/
UNUSED static void linear_train(LinearScorer *s, const PreferenceSet *set, int steps, double lr, uint64_t seed, double *losses) {
  size_t cap = 0, n;
  memset(s, 0, sizeof *s);
  for (size_t i = 0; i < set->n; i++) {
    linear_add_words_(s, &cap, set->items[i].query);
    if (set->items[i].good) linear_add_words_(s, &cap, set->items[i].good);
    if (set->items[i].bad) linear_add_words_(s, &cap, set->items[i].bad);
  }
  linear_sort_words_(s);
  size_t size = linear_size_(s);
  s->params = (double *)xcalloc(size, sizeof(double));
  double *memory = (double *)xcalloc(size_mul(size, 3), sizeof(double)), *grad = memory, *m = memory + size, *v = m + size;
  LinearCase_ *cases = linear_cases_(s, set, &n);
  for (size_t k = 0; k + 1 < size; k++) s->params[k] = 0.1 * rng_normal(seed, RNG_INIT, k);
  for (int t = 1; t <= steps; t++) {
    losses[t - 1] = linear_gradient_(s, cases, n, grad);
    for (size_t k = 0; k < size; k++) {
      m[k] = 0.9 * m[k] + 0.1 * grad[k];
      v[k] = 0.999 * v[k] + 0.001 * grad[k] * grad[k];
      s->params[k] -= lr * m[k] / (1 - pow(0.9, t)) / (sqrt(v[k] / (1 - pow(0.999, t))) + 1e-8);
    }
  }
  linear_cases_free_(cases, n);
  free(memory);
}

// ---------------------------------------------------------------------------------------------------------
// As a file: JSON, numbers written so that they read back with the same bits.

UNUSED static void linear_write(const LinearScorer *s, StrBuf *b) {
  strbuf_printf(b, "{\"scorer\": \"linear\", \"words\": [");
  for (size_t i = 0; i < s->n; i++) {
    strbuf_printf(b, "%s", i ? ", " : "");
    json_put_string(b, s->words[i], strlen(s->words[i]));
  }
  strbuf_printf(b, "],\n\"params\": [");
  for (size_t k = 0; k < linear_size_(s); k++) strbuf_printf(b, "%s%.17g", k ? ", " : "", s->params[k]);
  strbuf_printf(b, "]}\n");
}

// Reads what linear_write wrote; exit 2 if there is no such file, 3 if it is damaged.
UNUSED static void linear_read(LinearScorer *s, const char *path) {
  JsonDoc doc;
  char err[256];
  size_t len, i = 0;
  char *text = read_file(path, &len);
  memset(s, 0, sizeof *s);
  if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s", path, err);
  const Json *words = json_get(doc.root, "words"), *params = json_get(doc.root, "params");
  if (words == NULL || params == NULL || words->type != JSON_ARRAY || params->type != JSON_ARRAY)
    die(EXIT_DAMAGED, "%s: expected the lists words and params", path);
  if (params->count != words->count * LINEAR_DIM + 2 * LINEAR_DIM + 1)
    die(EXIT_DAMAGED, "%s: offset %zu: params: expected %zu numbers for %zu words, found %zu", path, params->offset,
        words->count * LINEAR_DIM + 2 * LINEAR_DIM + 1, words->count, params->count);
  s->words = (char **)xcalloc(words->count, sizeof(char *));
  for (const Json *v = words->child; v; v = v->next) {
    if (v->type != JSON_STRING || (s->n > 0 && strcmp(s->words[s->n - 1], v->s) >= 0))
      die(EXIT_DAMAGED, "%s: offset %zu: words: expected texts in rising order", path, v->offset);
    s->words[s->n++] = xstrdup(v->s);
  }
  s->params = (double *)xcalloc(params->count, sizeof(double));
  for (const Json *v = params->child; v; v = v->next) {
    if (v->type != JSON_INT && v->type != JSON_REAL) die(EXIT_DAMAGED, "%s: offset %zu: params: expected numbers", path, v->offset);
    s->params[i++] = v->type == JSON_INT ? (double)v->i : v->d;
  }
  json_free(&doc);
  free(text);
}

#endif
