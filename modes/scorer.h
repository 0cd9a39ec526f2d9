/*
scorer.h: reward models at work: texts in, scores out.

What it is:  a Scorer reads a question and an answer with the tokenizer and in the template that it was trained with, and gives the
             answer a value; a list of them, Transformers and linear ones, with weights, is what reinforcement learning asks.
What not:    no training (modes/reward.h); no rules (bitnet/rewards.h).
Read before: bitnet/value.h, bitnet/linear_scorer.h, modes/question.h.
Defines:     scored_ids, end_token; Scorer, scorer_open, scorer_values, scorer_free; RewardModels, reward_models_resolve,
             reward_models_open, reward_models_score, reward_models_free.

Texts go from the policy to a scorer, never ids: their tokenizers may differ. The score of an answer is sigmoid(value), between 0
and 1 as those of the rules; reward_raw=1 leaves the value as it is.
*/
#ifndef MODE_SCORER_H
#define MODE_SCORER_H

#include "../bitnet/checkpoint.h"
#include "../bitnet/guide.h"
#include "../bitnet/linear_scorer.h"
#include "../bitnet/value.h"
#include "question.h"

// ---------------------------------------------------------------------------------------------------------
// Texts to tokens.

// The token that ends an answer in this template; -1 if the tokenizer has none.
UNUSED static int end_token(const Tokenizer *t, int form) {
  return form == QA_CHATML ? tokenizer_id(t, "<|im_end|>", 10) : t->eos_id;
}

// The question's prompt, the answer and its end into x.
static void scored_text_(Ids *x, const Tokenizer *t, int form, const char *query, const char *answer) {
  question_prompt(x, t, form, query, NULL, NULL);
  ids_put_text_(x, t, answer);
  int end = end_token(t, form);
  if (end >= 0) ids_put_(x, end);
}

/*
A question and its answer as 1 to `most` ids into x. If that is too little, the question loses its beginning, then the answer: what
is judged stays as long as possible. Returns 1 if something was cut.
*/
UNUSED static int scored_ids(Ids *x, const Tokenizer *t, int form, const char *query, const char *answer, int most) {
  int cut = 0;
  scored_text_(x, t, form, query, answer);
  while (x->n > (size_t)most && *query) {
    size_t over = x->n - (size_t)most, len = strlen(query);
    query += over < len ? over : len;   // a token has at least about a byte
    while (((unsigned char)*query & 0xC0) == 0x80) query++;
    scored_text_(x, t, form, query, answer);
    cut = 1;
  }
  if (x->n > (size_t)most) {
    memmove(x->ids, x->ids + (x->n - (size_t)most), (size_t)most * sizeof(int));
    x->n = (size_t)most;
    cut = 1;
  }
  if (x->n == 0) ids_put_(x, t->pad_id >= 0 ? t->pad_id : 0);   // an empty text without marks
  return cut;
}

// ---------------------------------------------------------------------------------------------------------
// A Transformer scorer.

enum { SCORER_TOKENS = 4096 };   // of a forward pass, and at least one sequence

typedef struct {
  Model m;
  Tokenizer tok;
  int form;           // QA_*: the template that it was trained with
  int rows;           // the model has room for rows tokens
  ValueHead head;
  Batch batch;
  float *host_coef;   // [rows]
  Ids *ids;           // [head.cap]
  size_t cut;         // texts that were too long
} Scorer;

// Loads the reward model of a run to be asked. Exit 2 if the directory holds none.
UNUSED static void scorer_open(Scorer *s, const char *dir, int precision) {
  char path[4096];
  Config c;
  Options stored;
  memset(s, 0, sizeof *s);
  checkpoint_path(path, sizeof path, dir);
  config_read(&c, path);
  if (!c.value_head) die(EXIT_USAGE, "%s is no reward model: it has no value head; ./train_bitnet reward makes one", dir);
  if (!checkpoint_stored_options_(&stored, path))
    die(EXIT_USAGE, "%s has no training_state.safetensors, which tells the template of its questions", path);
  s->form = stored.qa_template;
  int T = stored.seq_len;
  options_free(&stored);
  load_to_run(&s->m, path, precision, 1, 0);
  checkpoint_tokenizer(&s->tok, path);
  if (T < 1 || T > c.max_seq) T = c.max_seq;
  int n = SCORER_TOKENS / T > 1 ? SCORER_TOKENS / T : 1;
  s->rows = n * T;
  model_alloc_batch(&s->m, n, T, 1, c.act_bits > 0);
  value_open(&s->head, &s->m, s->rows);
  batch_alloc(&s->batch, n, T);
  s->host_coef = (float *)xcalloc((size_t)s->rows, sizeof(float));
  s->ids = (Ids *)xcalloc((size_t)s->rows, sizeof(Ids));
}

UNUSED static void scorer_free(Scorer *s) {
  for (int i = 0; i < s->rows; i++) free(s->ids[i].ids);
  free(s->ids);
  free(s->host_coef);
  batch_free(&s->batch);
  value_free(&s->head);
  model_free(&s->m);
  tokenizer_free(&s->tok);
  memset(s, 0, sizeof *s);
}

// values (=) [n] of answers to queries, some at a time: as many as fit when all are as long as the longest of them.
UNUSED static void scorer_values(Scorer *s, const char *const *queries, const char *const *answers, int n, double *values) {
  int pad = s->tok.pad_id >= 0 ? s->tok.pad_id : 0;
  for (int first = 0, next; first < n; first = next) {
    int T = 1;
    for (next = first; next < n; next++) {
      Ids *x = &s->ids[next - first];
      s->cut += (size_t)scored_ids(x, &s->tok, s->form, queries[next], answers[next], s->batch.T);
      int longer = (int)x->n > T ? (int)x->n : T;
      if (longer * (next - first + 1) > s->rows) break;
      T = longer;
    }
    int count = next - first;
    Batch b = s->batch;   // the same memory in another shape
    b.B = s->m.B = count;
    b.T = s->m.T = T;
    s->m.R = count * T;
    for (int i = 0; i < count; i++) value_row(&s->head, &b, i, s->ids[i].ids, (int)s->ids[i].n, pad);
    batch_to_device(&s->m, &b, 0, s->host_coef);
    model_forward(&s->m);
    value_forward(&s->head, &s->m, count, values + first);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Several of them.

typedef struct {
  char *dir;
  double weight;       // all sum to 1
  int linear;
  LinearScorer words;  // linear
  Scorer net;          // otherwise
  double mean;         // of the newest scores
} RewardModel;

typedef struct {
  RewardModel *list;
  int n, raw;          // raw: values instead of sigmoid(value)
  double *values;      // [cap]
  int cap;
} RewardModels;

/*
Reads "DIR:0.7,DIR2:0.3" (weights optional, 1 each), or the weights from a list of their own, and makes the weights sum to 1. No
model is loaded. Exit 2 for weights that do not match or make no sense.
*/
static void reward_models_parse_(RewardModels *r, const char *text, const char *weights) {
  char *copy = xstrdup(text), *save = NULL;
  double sum = 0;
  int named = 0, count = 0;
  memset(r, 0, sizeof *r);
  for (char *word = strtok_r(copy, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
    char *colon = strrchr(word, ':'), *end = NULL;
    double weight = colon && colon[1] ? strtod(colon + 1, &end) : 1;
    if (end && *end == 0) {   // otherwise the colon is a part of the name
      *colon = 0;
      named = 1;
    } else {
      weight = 1;
    }
    r->list = (RewardModel *)xrealloc(r->list, size_mul((size_t)r->n + 1, sizeof(RewardModel)));
    RewardModel *m = &r->list[r->n++];
    memset(m, 0, sizeof *m);
    m->dir = xstrdup(word);
    m->weight = weight;
  }
  free(copy);
  if (r->n == 0) die(EXIT_USAGE, "reward_model: expected directories, found '%s'", text);
  if (weights[0]) {
    if (named) die(EXIT_USAGE, "reward_weights: reward_model=%s has weights already; give them once", text);
    double *w = numbers_read_("reward_weights", weights, &count);
    for (int i = 0; i < r->n && i < count; i++) r->list[i].weight = w[i];
    free(w);
    if (count != r->n) die(EXIT_USAGE, "reward_weights: expected one for each of the %d reward models, found %d", r->n, count);
  }
  for (int i = 0; i < r->n; i++) {
    if (!(r->list[i].weight >= 0 && r->list[i].weight <= 1e9))
      die(EXIT_USAGE, "reward_model: %s: expected a weight of at least 0, found %g", r->list[i].dir, r->list[i].weight);
    sum += r->list[i].weight;
  }
  if (!(sum > 0)) die(EXIT_USAGE, "reward_model: all weights are 0");
  for (int i = 0; i < r->n; i++) r->list[i].weight /= sum;
}

UNUSED static void reward_models_free(RewardModels *r) {
  for (int i = 0; i < r->n; i++) {
    free(r->list[i].dir);
    if (r->list[i].linear) linear_free(&r->list[i].words);
    else if (r->list[i].net.rows) scorer_free(&r->list[i].net);
  }
  free(r->list);
  free(r->values);
  memset(r, 0, sizeof *r);
}

/*
Replaces the names in o->reward_model by the very checkpoints that they mean now, so that a resumed run asks the same ones wherever
it is started. Exit 2 if one is not there.
*/
UNUSED static void reward_models_resolve(Options *o) {
  RewardModels r;
  StrBuf b = {NULL, 0, 0};
  char path[4096], full[PATH_MAX];
  reward_models_parse_(&r, o->reward_model, o->reward_weights);
  for (int i = 0; i < r.n; i++) {
    path_join(path, sizeof path, r.list[i].dir, "linear.json");
    if (is_file(path)) snprintf(path, sizeof path, "%s", r.list[i].dir);
    else checkpoint_path(path, sizeof path, r.list[i].dir);
    if (realpath(path, full) == NULL) die(EXIT_USAGE, "reward_model: cannot read %s: %s", path, strerror(errno));
    strbuf_printf(&b, "%s%s:%.17g", i ? "," : "", full, r.list[i].weight);
  }
  options_set(o, "reward_model", b.data, FROM_USER);
  options_set(o, "reward_weights", "", FROM_USER);
  strbuf_free(&b);
  reward_models_free(&r);
}

// Loads all models of o->reward_model.
UNUSED static void reward_models_open(RewardModels *r, const Options *o) {
  char path[4096];
  reward_models_parse_(r, o->reward_model, o->reward_weights);
  r->raw = o->reward_raw;
  for (int i = 0; i < r->n; i++) {
    RewardModel *m = &r->list[i];
    path_join(path, sizeof path, m->dir, "linear.json");
    m->linear = is_file(path);
    if (m->linear) linear_read(&m->words, path);
    else scorer_open(&m->net, m->dir, o->precision);
  }
}

// scores (=) [n]: the weighted mean of what the models say about n answers. Each model's own mean goes to its `mean`.
UNUSED static void reward_models_score(RewardModels *r, const char *const *queries, const char *const *answers, int n,
                                       double *scores) {
  if (n > r->cap) {
    r->values = (double *)xrealloc(r->values, size_mul((size_t)n, sizeof(double)));
    r->cap = n;
  }
  for (int i = 0; i < n; i++) scores[i] = 0;
  for (int k = 0; k < r->n; k++) {
    RewardModel *m = &r->list[k];
    for (int i = 0; i < n && m->linear; i++) r->values[i] = linear_score(&m->words, queries[i], answers[i]);
    if (!m->linear) scorer_values(&m->net, queries, answers, n, r->values);
    m->mean = 0;
    for (int i = 0; i < n; i++) {
      double score = r->raw ? r->values[i] : sigmoid(r->values[i]);
      scores[i] += m->weight * score;
      m->mean += score / n;
    }
  }
}

#endif
