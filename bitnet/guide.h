/*
guide.h: the second layer of reinforcement learning: a model corrects its own answers.

What it is:  the guiding prompts ("check that again") and which of them a correction gets, what counts as an improvement, and the ring
             of successful corrections that are trained again.
What not:    no model (modes/grpo.h asks, samples and trains).
Read before: bitnet/rollout.h, bitnet/rewards.h.
Defines:     Guides, guides_open, guides_choose, guides_free; VERIFIER_*, correction_improved; SuccessRing, ring_open, ring_put,
             ring_take, ring_write, ring_read, ring_free.
*/
#ifndef BITNET_GUIDE_H
#define BITNET_GUIDE_H

#include "json.h"
#include "rewards.h"
#include "rollout.h"

// ---------------------------------------------------------------------------------------------------------
// Guiding prompts.

typedef struct {
  char **texts;
  int n;
  double *share;       // [n] cumulated probabilities, the last is 1
  int *schedule;       // [n_schedule] indices of texts, used in turn; n_schedule 0: drawn at random
  int n_schedule;
} Guides;

static void guides_add_(Guides *g, const char *text, size_t len) {
  g->texts = (char **)xrealloc(g->texts, (size_t)(g->n + 1) * sizeof(char *));
  g->texts[g->n] = (char *)xmalloc(len + 1);
  memcpy(g->texts[g->n], text, len);
  g->texts[g->n++][len] = 0;
}

// The texts of a file: a JSON list of texts (or one text), or one a line.
static void guides_read_(Guides *g, const char *path) {
  size_t len, n = strlen(path);
  char err[256], *text = read_file(path, &len);
  if (text == NULL) die(EXIT_USAGE, "guiding_prompt: cannot read %s: %s", path, strerror(errno));
  if (n > 5 && strcmp(path + n - 5, ".json") == 0) {
    JsonDoc doc;
    if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_USAGE, "%s: %s", path, err);
    const Json *list = doc.root, *first = list->type == JSON_ARRAY ? list->child : list;
    for (const Json *v = first; v; v = list->type == JSON_ARRAY ? v->next : NULL) {
      if (v->type != JSON_STRING) die(EXIT_USAGE, "%s: offset %zu: expected a list of texts", path, v->offset);
      guides_add_(g, v->s, v->len);
    }
    json_free(&doc);
  } else {
    for (char *line = text; *line;) {
      size_t k = strcspn(line, "\r\n");
      if (k > 0) guides_add_(g, line, k);
      line += k + strspn(line + k, "\r\n");
    }
  }
  free(text);
  if (g->n == 0) die(EXIT_USAGE, "guiding_prompt: %s holds no prompt", path);
}

// The numbers of a list: separated by blanks or commas, as a JSON list, or either in a file. Exit 2 for anything else.
static double *numbers_read_(const char *option, const char *value, int *count) {
  size_t len;
  char *text = is_file(value) ? read_file(value, &len) : xstrdup(value);
  double *out = NULL;
  if (text == NULL) die(EXIT_USAGE, "%s: cannot read %s: %s", option, value, strerror(errno));
  *count = 0;
  for (char *p = text; *p;) {
    char *end;
    size_t skip = strspn(p, " \t\r\n,[]");
    p += skip;
    if (*p == 0) break;
    double v = strtod(p, &end);
    if (end == p || !isfinite(v)) die(EXIT_USAGE, "%s: expected numbers, found '%.20s'", option, p);
    out = (double *)xrealloc(out, (size_t)(*count + 1) * sizeof(double));
    out[(*count)++] = v;
    p = end;
  }
  if (*count == 0) die(EXIT_USAGE, "%s: expected numbers, found '%s'", option, value);
  free(text);
  return out;
}

/*
prompt: a text, or the name of a file of texts. probabilities: one for each text, in any unit; "" = all alike. schedule: indices of
texts, from 0; "" = at random. Exit 2 if the numbers do not match the texts.
*/
UNUSED static void guides_open(Guides *g, const char *prompt, const char *probabilities, const char *schedule) {
  memset(g, 0, sizeof *g);
  if (is_file(prompt)) guides_read_(g, prompt);
  else guides_add_(g, prompt, strlen(prompt));
  int count = g->n;
  double sum = 0;
  g->share = probabilities[0] ? numbers_read_("guiding_probabilities", probabilities, &count)
                              : (double *)xcalloc((size_t)g->n, sizeof(double));
  if (count != g->n)
    die(EXIT_USAGE, "guiding_probabilities: expected one for each of the %d guiding prompts, found %d", g->n, count);
  for (int i = 0; i < g->n; i++) {
    if (g->share[i] < 0) die(EXIT_USAGE, "guiding_probabilities: expected numbers of at least 0, found %g", g->share[i]);
    g->share[i] = sum += probabilities[0] ? g->share[i] : 1;
  }
  if (!(sum > 0)) die(EXIT_USAGE, "guiding_probabilities: all of them are 0");
  for (int i = 0; i < g->n; i++) g->share[i] /= sum;
  if (schedule[0]) {
    double *s = numbers_read_("guiding_schedule", schedule, &g->n_schedule);
    g->schedule = (int *)xcalloc((size_t)g->n_schedule, sizeof(int));
    for (int i = 0; i < g->n_schedule; i++) {
      if (s[i] < 0 || s[i] >= g->n || s[i] != floor(s[i]))
        die(EXIT_USAGE, "guiding_schedule: expected indices from 0 to %d, found %g", g->n - 1, s[i]);
      g->schedule[i] = (int)s[i];
    }
    free(s);
  }
}

UNUSED static void guides_free(Guides *g) {
  for (int i = 0; i < g->n; i++) free(g->texts[i]);
  free(g->texts);
  free(g->share);
  free(g->schedule);
  memset(g, 0, sizeof *g);
}

// The prompt of correction `number` of the run (turn: its place in the schedule): a function of the seed and these numbers.
UNUSED static int guides_choose(const Guides *g, uint64_t seed, uint64_t number, uint64_t turn) {
  if (g->n_schedule > 0) return g->schedule[turn % (uint64_t)g->n_schedule];
  double u = rng_uniform(seed, RNG_GUIDE, number);
  int i = 0;
  while (i < g->n - 1 && u >= g->share[i]) i++;
  return i;
}

// ---------------------------------------------------------------------------------------------------------
// Improvements.

// The choices of the option verifier_mode.
enum { VERIFIER_SIMPLE, VERIFIER_DYNAMIC, VERIFIER_NONE, VERIFIER_STRICT };

/*
Whether a correction with reward `second` improves on a first answer with reward `first`:

    simple   its final answer is the reference's, or the reward rises by more than the threshold
    dynamic  it is the reference, word for word; only where there is no text to compare, the rise decides
    none     the reward rises (and corrections that do not improve are trained as well)
    strict   the reward rises
*/
UNUSED static int correction_improved(int verifier, double threshold, double first, double second, const char *text,
                                      const char *gold) {
  double rise = second - first;
  if (verifier == VERIFIER_SIMPLE) return reward_accuracy(text, gold) > 0.5 || rise > threshold;
  if (verifier == VERIFIER_DYNAMIC) return text[0] && gold[0] ? reward_exact(text, gold) > 0.5 : rise > threshold;
  return rise > 0;
}

// ---------------------------------------------------------------------------------------------------------
// The success buffer: the newest `cap` corrections that improved. They are trained again with the log-probabilities that they had when
// they were sampled, so the clipped ratio knows how far the model has moved since.

typedef struct {
  SampleSet set;       // items[0..set.n); a new one takes the place of the oldest
  int64_t *step;       // [cap] when each was sampled
  int next;            // the place of the next one
} SuccessRing;

UNUSED static void ring_open(SuccessRing *r, int cap, int T) {
  samples_open(&r->set, cap, T);
  r->step = (int64_t *)xcalloc((size_t)cap, sizeof(int64_t));
  r->next = 0;
}

UNUSED static void ring_free(SuccessRing *r) {
  samples_free(&r->set);
  free(r->step);
}

// Copies what training needs of a sample; the advantage carries the rise of the reward.
UNUSED static void sample_copy(Sample *to, const Sample *from, int T) {
  size_t width = (size_t)T + 1;
  memcpy(to->ids, from->ids, width * sizeof(int));
  memcpy(to->logp, from->logp, width * sizeof(float));
  to->n_prompt = from->n_prompt;
  to->n_answer = from->n_answer;
  to->ended = from->ended;
  to->number = from->number;
  to->reward = from->reward;
  to->advantage = from->advantage;
  to->copies = 1;
}

UNUSED static void ring_put(SuccessRing *r, const Sample *x, int64_t step) {
  if (r->set.cap == 0) return;
  sample_copy(&r->set.items[r->next], x, r->set.T);
  r->step[r->next] = step;
  r->next = (r->next + 1) % r->set.cap;
  if (r->set.n < r->set.cap) r->set.n++;
}

// Appends the entries that are at most `age` steps old (0: all) to out, as far as there is room. Returns how many.
UNUSED static int ring_take(const SuccessRing *r, SampleSet *out, int64_t step, int age) {
  int taken = 0;
  for (int i = 0; i < r->set.n && out->n < out->cap; i++) {
    if (age > 0 && step - r->step[i] > age) continue;
    sample_copy(&out->items[out->n++], &r->set.items[i], r->set.T);
    taken++;
  }
  return taken;
}

// The ring as JSON, for checkpoints. Floats are written so that they read back with the same bits.
UNUSED static void ring_write(const SuccessRing *r, StrBuf *b) {
  strbuf_printf(b, "{\"next\": %d, \"entries\": [", r->next);
  for (int i = 0; i < r->set.n; i++) {
    const Sample *x = &r->set.items[i];
    strbuf_printf(b, "%s\n{\"step\": %lld, \"prompt\": %d, \"ended\": %d, \"rise\": %.17g, \"ids\": [", i ? "," : "",
                  (long long)r->step[i], x->n_prompt, x->ended, x->advantage);
    for (int t = 0; t < x->n_prompt + x->n_answer; t++) strbuf_printf(b, "%s%d", t ? ", " : "", x->ids[t]);
    strbuf_printf(b, "], \"logp\": [");
    for (int t = 0; t < x->n_answer; t++) strbuf_printf(b, "%s%.9g", t ? ", " : "", (double)x->logp[t]);
    strbuf_printf(b, "]}");
  }
  strbuf_printf(b, "\n]}\n");
}

static double ring_number_(const Json *v, const char *path) {
  if (v && v->type == JSON_INT) return (double)v->i;
  if (v && v->type == JSON_REAL) return v->d;
  die(EXIT_DAMAGED, "%s: success buffer: expected numbers", path);
}

// Reads what ring_write wrote; exit 3 if it does not fit the ring.
UNUSED static void ring_read(SuccessRing *r, const char *text, size_t len, int vocab, const char *path) {
  JsonDoc doc;
  char err[256];
  if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s", path, err);
  const Json *entries = json_get(doc.root, "entries");
  double next = ring_number_(json_get(doc.root, "next"), path);
  if (entries == NULL || entries->type != JSON_ARRAY || next < 0 || next >= r->set.cap + 1)
    die(EXIT_DAMAGED, "%s: expected a success buffer of %d entries", path, r->set.cap);
  r->set.n = 0;
  for (const Json *e = entries->child; e; e = e->next, r->set.n++) {
    if (r->set.n == r->set.cap) die(EXIT_DAMAGED, "%s: more than the %d entries of the success buffer", path, r->set.cap);
    Sample *x = &r->set.items[r->set.n];
    const Json *ids = json_get(e, "ids"), *logp = json_get(e, "logp");
    int n = 0, k = 0;
    if (ids == NULL || logp == NULL || ids->type != JSON_ARRAY || logp->type != JSON_ARRAY)
      die(EXIT_DAMAGED, "%s: entry %d of the success buffer has no ids or logp", path, r->set.n);
    for (const Json *v = ids->child; v; v = v->next) {
      double id = ring_number_(v, path);
      if (n > r->set.T || id < 0 || id >= vocab) die(EXIT_DAMAGED, "%s: entry %d of the success buffer: bad ids", path, r->set.n);
      x->ids[n++] = (int)id;
    }
    for (const Json *v = logp->child; v; v = v->next) {
      if (k > r->set.T) die(EXIT_DAMAGED, "%s: entry %d of the success buffer: too long", path, r->set.n);
      x->logp[k++] = (float)ring_number_(v, path);
    }
    x->n_prompt = (int)ring_number_(json_get(e, "prompt"), path);
    x->ended = ring_number_(json_get(e, "ended"), path) != 0;
    x->advantage = ring_number_(json_get(e, "rise"), path);
    x->n_answer = k;
    x->copies = 1;
    if (x->n_prompt < 1 || x->n_prompt + k != n || n - 1 > r->set.T)
      die(EXIT_DAMAGED, "%s: entry %d of the success buffer: lengths do not match", path, r->set.n);
    r->step[r->set.n] = (int64_t)ring_number_(json_get(e, "step"), path);
  }
  r->next = r->set.cap ? (int)next % r->set.cap : 0;
  json_free(&doc);
}

#endif
