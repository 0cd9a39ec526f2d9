/*
preferences.h: answers that are better than others: what reward models learn from.

What it is:  the reader of files with pairs of answers, with labelled answers, or with right answers alone (then wrong ones are
             taken from other questions), and the wrong answers that are made up for arithmetic problems.
What not:    no tokens and no models.
Read before: bitnet/qa.h, dataloader.h.
Defines:     Preference, PreferenceSet, preferences_load, preferences_split, preferences_free; preference_arithmetic.

One object a line (.jsonl), or a list (.json); one kind of record in a file:

    {"query": ..., "positive": ..., "negative": ...}   a pair; also chosen and rejected, and conversations instead of query
    {"query": ..., "answer": ..., "label": 1}          an answer with its label, 1 or 0 (or true, false); also is_correct
    {"query": ..., "answer": ...}                      a right answer; the wrong one is another record's

A query may also be called question or prompt. A text may be the last message of a conversation: {"from": ..., "value": ...} or
{"role": ..., "content": ...}.
*/
#ifndef BITNET_PREFERENCES_H
#define BITNET_PREFERENCES_H

#include "../dataloader.h"
#include "qa.h"

// A pair has both answers; of a labelled answer the other one is NULL.
typedef struct {
  char *query, *good, *bad;
  size_t line;
} Preference;

typedef struct {
  Preference *items;
  size_t n;
  int pairs;   // 1: all are pairs, 0: all are labelled answers
} PreferenceSet;

// ---------------------------------------------------------------------------------------------------------
// Records.

// The first of these members that an object has, NULL if it has none; *key (=) its name.
static const Json *preference_member_(const Json *object, const char *const *names, size_t n, const char **key) {
  for (size_t i = 0; i < n; i++) {
    const Json *v = json_get(object, names[i]);
    *key = names[i];
    if (v && v->type != JSON_NULL) return v;
  }
  *key = names[0];
  return NULL;
}

// A text, a number, or the text of a message. Exit 2 with file and line for anything else.
static char *preference_text_(const Records *r, const Json *object, const Json *v, const char *key) {
  StrBuf b = {NULL, 0, 0};
  if (v && v->type == JSON_OBJECT) {
    const Json *text = json_get(v, "value");
    v = text ? text : json_get(v, "content");
  }
  if (v && v->type == JSON_STRING && memchr(v->s, 0, v->len) == NULL) return xstrdup(v->s);
  if (v == NULL || (v->type != JSON_INT && v->type != JSON_REAL))
    records_refuse(r, object, key, "a text without zero bytes, a number, or a message with value or content");
  if (v->type == JSON_INT) strbuf_printf(&b, "%lld", (long long)v->i);
  else json_put_number(&b, v->d);
  return b.data;
}

// The question of a record: its text, or the messages of a conversation with blank lines between them.
static char *preference_query_(const Records *r, const Json *object) {
  static const char *const names[] = {"query", "question", "prompt", "conversations"};
  const char *key;
  const Json *v = preference_member_(object, names, ARRAY_LEN(names), &key);
  if (v == NULL || v->type != JSON_ARRAY) return preference_text_(r, object, v, key);
  StrBuf b = {NULL, 0, 0};
  for (const Json *m = v->child; m; m = m->next) {
    char *text = preference_text_(r, object, m, key);
    strbuf_printf(&b, "%s%s", m == v->child ? "" : "\n\n", text);
    free(text);
  }
  if (b.data == NULL) records_refuse(r, object, key, "at least one message");
  return b.data;
}

enum { PREFERENCE_PAIR_, PREFERENCE_LABEL_, PREFERENCE_RIGHT_ };

// Fills x from one object; returns what kind of record it is.
static int preference_read_(const Records *r, const Json *object, Preference *x) {
  static const char *const good[] = {"positive", "chosen"}, *const bad[] = {"negative", "rejected"},
                    *const answer[] = {"answer", "solution", "response"}, *const label[] = {"label", "is_correct"};
  const char *key;
  const Json *v = preference_member_(object, good, ARRAY_LEN(good), &key);
  memset(x, 0, sizeof *x);
  x->line = r->line;
  x->query = preference_query_(r, object);
  if (v) {
    x->good = preference_text_(r, object, v, key);
    v = preference_member_(object, bad, ARRAY_LEN(bad), &key);
    x->bad = preference_text_(r, object, v, key);
    return PREFERENCE_PAIR_;
  }
  v = preference_member_(object, answer, ARRAY_LEN(answer), &key);
  x->good = preference_text_(r, object, v, key);
  v = preference_member_(object, label, ARRAY_LEN(label), &key);
  if (v == NULL) return PREFERENCE_RIGHT_;
  int whole = v->type == JSON_BOOL || v->type == JSON_INT;
  if (!whole || v->i < 0 || v->i > 1) records_refuse(r, object, key, "1 or true for a right answer, 0 or false for a wrong one");
  if (!v->i) {
    x->bad = x->good;
    x->good = NULL;
  }
  return PREFERENCE_LABEL_;
}

/*
Gives each right answer that stands alone the answer of another record, drawn at random, as the wrong one. The next ones follow
until the text differs; exit 2 if all records have the same answer.
*/
static void preferences_pair_(PreferenceSet *set, const char *path, uint64_t seed) {
  for (size_t i = 0; i < set->n; i++) {
    size_t first = (size_t)rng_below(seed, RNG_DATA, (uint64_t)i, set->n), k = 0;
    while (k < set->n && strcmp(set->items[(first + k) % set->n].good, set->items[i].good) == 0) k++;
    if (k == set->n)
      die(EXIT_USAGE, "%s: all %zu records have the same answer; wrong ones are taken from other records, or given as negative", path,
          set->n);
    set->items[i].bad = xstrdup(set->items[(first + k) % set->n].good);
  }
}

// Reads all records of a file; never empty. seed: of the draws of wrong answers. Exit 2 with file and line.
UNUSED static PreferenceSet preferences_load(const char *path, uint64_t seed) {
  static const char *const kinds[] = {"a pair", "an answer with a label", "a right answer"};
  PreferenceSet set = {NULL, 0, 1};
  Records r;
  size_t cap = 0;
  int kind = -1;
  records_open(&r, path);
  for (const Json *v = records_next(&r); v; v = records_next(&r)) {
    if (set.n == cap) {
      cap = cap ? size_mul(cap, 2) : 64;
      set.items = (Preference *)xrealloc(set.items, size_mul(cap, sizeof(Preference)));
    }
    int is = preference_read_(&r, v, &set.items[set.n++]);
    if (kind >= 0 && is != kind)
      die(EXIT_USAGE, "%s:%zu: expected %s like the records before it, found %s", path, r.line, kinds[kind], kinds[is]);
    kind = is;
  }
  records_close(&r);
  if (set.n == 0) die(EXIT_USAGE, "%s: expected records {\"query\": ..., \"positive\": ..., \"negative\": ...}, found none", path);
  if (kind == PREFERENCE_RIGHT_) preferences_pair_(&set, path, seed);
  set.pairs = kind != PREFERENCE_LABEL_;
  return set;
}

UNUSED static void preferences_free(PreferenceSet *set) {
  for (size_t i = 0; i < set->n; i++) {
    free(set->items[i].query);
    free(set->items[i].good);
    free(set->items[i].bad);
  }
  free(set->items);
  memset(set, 0, sizeof *set);
}

/*
Moves about this fraction of the records to *held, which is empty before. A hash of the question decides, so answers to the same
question are on the same side.
*/
UNUSED static void preferences_split(PreferenceSet *set, PreferenceSet *held, double fraction) {
  size_t kept = 0;
  held->items = (Preference *)xcalloc(set->n, sizeof(Preference));
  held->n = 0;
  held->pairs = set->pairs;
  for (size_t i = 0; i < set->n; i++) {
    const char *query = set->items[i].query;
    int out = (double)(hash_bytes(query, strlen(query)) >> 11) * 0x1.0p-53 < fraction;
    if (out) held->items[held->n++] = set->items[i];
    else set->items[kept++] = set->items[i];
  }
  set->n = kept;
}

// ---------------------------------------------------------------------------------------------------------
// Arithmetic.

/*
The query, the right answer and a wrong one of problem i, each of ARITH_TEXT_CAP bytes. The wrong one is a function of seed and
number: in turns near (1 or 10 off), with one digit replaced, and the result of another problem.
*/
UNUSED static void preference_arithmetic(const Arithmetic *a, uint64_t i, uint64_t seed, uint64_t number, char *query, char *good,
                                         char *bad) {
  static const int steps[] = {1, -1, 10, -10};
  char other[ARITH_TEXT_CAP];
  uint64_t draw = rng_u64(seed, RNG_DATA, ~number);
  arith_text(a, i, query, good);
  long value = strtol(good, NULL, 10);
  size_t len = strlen(good), digits = len - (good[0] == '-');
  snprintf(bad, ARITH_TEXT_CAP, "%ld", value + steps[draw / 3 % 4]);
  if (draw % 3 == 1) {
    size_t at = len - digits + (size_t)(draw / 12 % digits);
    memcpy(bad, good, len + 1);
    bad[at] = (char)('0' + (bad[at] - '0' + 1 + (int)(draw / 1000 % 9)) % 10);
  } else if (draw % 3 == 2) {
    arith_text(a, draw / 12 % a->n_problems, other, bad);
    if (strcmp(good, bad) == 0) snprintf(bad, ARITH_TEXT_CAP, "%ld", value + 1);
  }
}

#endif
