/*
eval_qa.h: questions that a model answers in its own words, and how good the answers are.

What it is:  ./train_bitnet eval DIR task=qa file=test.jsonl n=200 [vs=DIR2] [second_pass=1] [results=scores.json]
             Answers are generated (greedily, unless temperature is set) and scored by bitnet/rewards.h. With vs= both models answer
             the same questions, and the table shows the difference with an interval. With second_pass=1 each model sees its
             first answer and second_prompt, and answers again. file=arithmetic: the problems that DIR's run has held out.
What not:    no training with these scores, no reward models.
Read before: bitnet/rewards.h, bitnet/qa.h, modes/chat.h, modes/eval_tasks.h (reports).
Defines:     mode_eval_qa.

    metric             of the text behind </think>, if there is one; over all records
    f1                 token F1 with the right answer (reward_f1)
    exact_match        equal but for blanks around it (reward_exact)
    accuracy           the same final answer: \boxed{}, ####, "answer:", or the last number (reward_accuracy)
    reasoning_f1       token F1 of what stands inside <think>; over the records with `reasoning`
    step_correctness   share of its steps that stand at the same place; over the same records
    f1_2 ...           the same of the second answer; i2c, c2i: shares that went from incorrect to correct and the other way
    rise               accuracy_2 - accuracy = i2c - c2i; its error is that of the differences record by record
*/
#ifndef MODE_EVAL_QA_H
#define MODE_EVAL_QA_H

#include "../bitnet/rewards.h"
#include "../dataloader.h"
#include "chat.h"
#include "eval_tasks.h"
#include "question.h"

enum { QA_SEQUENCES = 32, QA_ROWS = 256, QA_RESAMPLES = 5000 };
enum { RNG_RESAMPLE = 64 };   // stream of the bootstrap: counter = resample << 32 | item

enum {
  QA_F1, QA_EXACT, QA_ACCURACY, QA_REASONING_F1, QA_STEPS, QA_F1_2, QA_EXACT_2, QA_ACCURACY_2, QA_I2C, QA_C2I, QA_RISE,
  QA_METRICS
};
static const char *const qa_metrics_[QA_METRICS] = {"f1",   "exact_match",   "accuracy",   "reasoning_f1", "step_correctness",
                                                    "f1_2", "exact_match_2", "accuracy_2", "i2c",          "c2i",
                                                    "rise"};
// 1 for metrics that are 0 or 1 for each record: their interval is Wilson's.
static const int qa_is_share_[QA_METRICS] = {0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0};

// What one model did with one record; NAN where a metric does not apply.
typedef struct {
  double value[QA_METRICS];
  char *first, *second;   // the answers; second is NULL without a second pass
} QaScore;

// ---------------------------------------------------------------------------------------------------------
// Answers.

typedef struct {
  Speaker *speaker;
  const Options *o;
  const QaSet *set;
  size_t n;
  char *guide;     // of the second pass
  size_t cut;      // first answers that had to lose their beginning
} QaRun;

// The prompt of record i, with room for at least one new token. A question that is too long exits 2; a first answer that is too long
// loses its beginning.
static void qa_fit_(QaRun *r, Ids *x, size_t i, const char *first) {
  const QaItem *item = &r->set->items[i];
  const Tokenizer *t = &r->speaker->tok;
  int most = r->speaker->m.c.max_seq, new_tokens = r->o->n < most / 2 ? r->o->n : most / 2, cut = 0;
  question_prompt(x, t, r->o->qa_template, item->query, first, r->guide);
  while (first && *first && x->n + (size_t)new_tokens > (size_t)most) {
    size_t over = x->n + (size_t)new_tokens - (size_t)most, len = strlen(first);   // a token has at least about a byte
    first += over < len ? over : len;
    while (((unsigned char)*first & 0xC0) == 0x80) first++;
    question_prompt(x, t, r->o->qa_template, item->query, first, r->guide);
    cut = 1;
  }
  r->cut += (size_t)cut;
  if (x->n == 0) die(EXIT_USAGE, "%s:%zu: query: the question has no tokens", r->o->file, item->line);
  if (x->n >= (size_t)most)
    die(EXIT_USAGE, "%s:%zu: query: the prompt has %zu tokens, the model's context only %d", r->o->file, item->line, x->n, most);
}

// Generates the answers of all records; second: from the first answers in scores.
static void qa_answers_(QaRun *r, QaScore *scores, int second) {
  Speaker *s = r->speaker;
  Session session;
  int capacity = 0, end = r->o->qa_template == QA_CHATML ? mark_id_(&s->tok, "<|im_end|>") : s->tok.eos_id;
  Ids *x = (Ids *)xcalloc(r->n, sizeof(Ids));
  for (size_t i = 0; i < r->n; i++) {
    qa_fit_(r, &x[i], i, second ? scores[i].first : NULL);
    int want = (int)x[i].n + r->o->n < s->m.c.max_seq ? (int)x[i].n + r->o->n : s->m.c.max_seq;
    capacity = want > capacity ? want : capacity;
  }
  size_t at_once = r->n < QA_SEQUENCES ? r->n : (size_t)QA_SEQUENCES;
  session_open(&session, &s->m, (int)at_once, capacity, QA_ROWS, s->m.frozen);
  Prompt prompts[QA_SEQUENCES];
  int *out = (int *)xmalloc(size_mul(at_once * sizeof(int), (size_t)r->o->n));
  for (size_t done = 0; done < r->n; done += at_once) {
    int n = (int)(r->n - done < at_once ? r->n - done : at_once);
    memset(prompts, 0, sizeof prompts);
    for (int k = 0; k < n; k++) {
      prompts[k].ids = x[done + (size_t)k].ids;
      prompts[k].n_ids = (int)x[done + (size_t)k].n;
      prompts[k].number = 2 * (done + (size_t)k) + (uint64_t)second;
      prompts[k].out = out + (size_t)k * (size_t)r->o->n;
    }
    generate(&session, &s->sampler, prompts, n, r->o->n, end, s->tok.vocab_size, NULL, NULL);
    for (int k = 0; k < n; k++) {
      StrBuf text = {NULL, 0, 0};
      tokenizer_decode(&s->tok, prompts[k].out, (size_t)prompts[k].n_out, &text);
      *(second ? &scores[done + (size_t)k].second : &scores[done + (size_t)k].first) = text.data;
    }
    if (isatty(2)) fprintf(stderr, "\r%s: %zu of %zu answers ", r->o->dir, done + (size_t)n, r->n);
  }
  if (isatty(2)) fputc('\n', stderr);
  for (size_t i = 0; i < r->n; i++) free(x[i].ids);
  free(x);
  free(out);
  session_free(&session);
}

static void qa_score_(QaScore *s, const QaItem *item) {
  const char *answer = answer_text(s->first), *second = s->second ? answer_text(s->second) : NULL;
  for (int k = 0; k < QA_METRICS; k++) s->value[k] = NAN;
  s->value[QA_F1] = reward_f1(answer, item->answer);
  s->value[QA_EXACT] = reward_exact(answer, item->answer);
  s->value[QA_ACCURACY] = reward_accuracy(answer, item->answer);
  if (item->reasoning) {
    s->value[QA_REASONING_F1] = reward_reasoning_f1(s->first, item->reasoning);
    s->value[QA_STEPS] = step_correctness(s->first, item->reasoning);
  }
  if (second == NULL) return;
  s->value[QA_F1_2] = reward_f1(second, item->answer);
  s->value[QA_EXACT_2] = reward_exact(second, item->answer);
  s->value[QA_ACCURACY_2] = reward_accuracy(second, item->answer);
  s->value[QA_I2C] = s->value[QA_ACCURACY] == 0 && s->value[QA_ACCURACY_2] == 1;
  s->value[QA_C2I] = s->value[QA_ACCURACY] == 1 && s->value[QA_ACCURACY_2] == 0;
  s->value[QA_RISE] = s->value[QA_ACCURACY_2] - s->value[QA_ACCURACY];
}

// What the model in directory dir makes of the first n records. Caller frees each answer and the array.
static QaScore *qa_model_(const Options *o, char *dir, const QaSet *set, size_t n) {
  Options copy = *o;
  Speaker speaker;
  QaRun r = {&speaker, &copy, set, n, o->second_prompt, 0};
  QaScore *scores = (QaScore *)xcalloc(n, sizeof(QaScore));
  size_t len = 0;
  copy.dir = dir;
  speaker_open(&speaker, &copy, (float)o->lambda, o->temperature <= 0);
  if (o->qa_template == QA_CHATML && template_of_(&speaker.tok) != TEMPLATE_CHATML)
    die(EXIT_USAGE, "qa_template=chatml: the tokenizer of %s has no <|im_start|> and <|im_end|>", dir);
  if (is_file(o->second_prompt)) {
    r.guide = read_file(o->second_prompt, &len);
    if (r.guide == NULL) die(EXIT_USAGE, "second_prompt: cannot read %s: %s", o->second_prompt, strerror(errno));
    while (len > 0 && isspace((unsigned char)r.guide[len - 1])) r.guide[--len] = 0;
  }
  qa_answers_(&r, scores, 0);
  if (o->second_pass) qa_answers_(&r, scores, 1);
  for (size_t i = 0; i < n; i++) qa_score_(&scores[i], &set->items[i]);
  if (r.cut) fprintf(stderr, "%s: %zu first answers were too long for the second pass and lost their beginning\n", dir, r.cut);
  if (r.guide != o->second_prompt) free(r.guide);
  speaker_close(&speaker);
  return scores;
}

// ---------------------------------------------------------------------------------------------------------
// Statistics.

// Wilson's 95 % interval of a share of n.
static void wilson_(double share, size_t n, double *lo, double *hi) {
  double z = 1.959963984540054, z2 = z * z / (double)n;
  double middle = (share + z2 / 2) / (1 + z2), half = z / (1 + z2) * sqrt(share * (1 - share) / (double)n + z2 / (4 * (double)n));
  *lo = share == 0 ? 0 : middle - half;
  *hi = share == 1 ? 1 : middle + half;
}

static int compare_doubles_(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

// Adds a row for each metric that at least one record has.
static void qa_report_model_(Report *report, const char *name, const QaScore *scores, size_t n) {
  double *values = (double *)xcalloc(n, sizeof(double)), error, lo, hi;
  for (int k = 0; k < QA_METRICS; k++) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
      if (!isnan(scores[i].value[k])) values[count++] = scores[i].value[k];
    }
    if (count == 0) continue;
    double mean = mean_error_(values, count, &error);
    lo = mean - 1.959963984540054 * error;
    hi = mean + 1.959963984540054 * error;
    if (qa_is_share_[k]) wilson_(mean, count, &lo, &hi);
    report_add(report, name, qa_metrics_[k], mean, error, count);
    report_interval(report, lo, hi);
  }
  free(values);
}

/*
The difference of both models, second minus first, record by record, and its 95 % interval by the paired bootstrap: as many records as
there are, drawn with replacement, QA_RESAMPLES times. What both models find easy or hard cancels, so the interval is narrower than
those of the models alone suggest.
*/
static void qa_report_difference_(Report *report, const QaScore *a, const QaScore *b, size_t n, uint64_t seed) {
  double *d = (double *)xcalloc(n, sizeof(double)), *means = (double *)xcalloc(QA_RESAMPLES, sizeof(double)), error;
  for (int k = 0; k < QA_METRICS; k++) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
      if (!isnan(a[i].value[k])) d[count++] = b[i].value[k] - a[i].value[k];
    }
    if (count == 0) continue;
    double mean = mean_error_(d, count, &error);
    for (uint64_t r = 0; r < QA_RESAMPLES; r++) {
      double sum = 0;
      for (uint64_t i = 0; i < count; i++) sum += d[rng_below(seed, RNG_RESAMPLE, r << 32 | i, count)];
      means[r] = sum / (double)count;
    }
    qsort(means, QA_RESAMPLES, sizeof(double), compare_doubles_);
    report_add(report, "difference", qa_metrics_[k], mean, error, count);
    report_interval(report, means[(int)(0.025 * QA_RESAMPLES)], means[(int)(0.975 * QA_RESAMPLES)]);
  }
  free(d);
  free(means);
}

// ---------------------------------------------------------------------------------------------------------
// The mode.

static void qa_put_items_(StrBuf *b, const QaSet *set, QaScore *const *models, int n_models, size_t n) {
  strbuf_printf(b, "  \"items\": [");
  for (size_t i = 0; i < n; i++) {
    strbuf_printf(b, "%s\n    {\"line\": %zu, \"models\": [", i ? "," : "", set->items[i].line);
    for (int m = 0; m < n_models; m++) {
      const QaScore *s = &models[m][i];
      strbuf_printf(b, "%s{\"answer\": ", m ? ", " : "");
      json_put_string(b, s->first, strlen(s->first));
      if (s->second) {
        strbuf_printf(b, ", \"second\": ");
        json_put_string(b, s->second, strlen(s->second));
      }
      for (int k = 0; k < QA_METRICS; k++) {
        if (isnan(s->value[k])) continue;
        strbuf_printf(b, ", \"%s\": ", qa_metrics_[k]);
        json_put_number(b, s->value[k]);
      }
      strbuf_printf(b, "}");
    }
    strbuf_printf(b, "]}");
  }
  strbuf_printf(b, "\n  ]");
}

// Held-out problems of the run that o->dir belongs to, in the order of its evaluations: `limit` of them, or eval_problems. Unless the
// user says otherwise they are asked as they were trained, and answers have room for a digit too many. Exit 2 if that run was not
// trained on arithmetic.
static QaSet qa_arithmetic_(Options *o) {
  char dir[4096], query[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  Arithmetic a;
  QaSet set = {NULL, 0};
  size_t most = (size_t)(o->limit > 0 ? o->limit : o->eval_problems), longest = 0;
  checkpoint_path(dir, sizeof dir, o->dir);
  checkpoint_options(o, dir);
  if (strcmp(o->data, "arithmetic") != 0)
    die(EXIT_USAGE, "file=arithmetic: %s was trained on %s; give a file of questions", dir, o->data);
  arith_init(&a, o->arith_ops, o->arith_min, o->arith_max, o->arith_mul_max, o->arith_holdout);
  uint64_t *problems = (uint64_t *)xcalloc(most, sizeof(uint64_t));
  set.n = arith_heldout(&a, problems, most);
  if (set.n == 0) die(EXIT_USAGE, "no arithmetic problem is held out; train with a larger arith_holdout (%g)", o->arith_holdout);
  set.items = (QaItem *)xcalloc(set.n, sizeof(QaItem));
  for (size_t i = 0; i < set.n; i++) {
    arith_text(&a, problems[i], query, answer);
    set.items[i].query = xstrdup(query);
    set.items[i].answer = xstrdup(answer);
    set.items[i].line = i + 1;
    if (strlen(answer) > longest) longest = strlen(answer);
  }
  if (options_is_set(o, "n") != FROM_USER) o->n = (int)longest + 2;
  if (options_is_set(o, "qa_template") != FROM_USER) o->qa_template = QA_PLAIN;
  free(problems);
  return set;
}

UNUSED static void mode_eval_qa(Options *o) {
  Report report = {NULL, 0};
  StrBuf json = {NULL, 0, 0};
  QaScore *models[2] = {NULL, NULL};
  char *dirs[2] = {o->dir, o->vs};
  int n_models = o->vs[0] ? 2 : 1;
  if (o->file[0] == 0)
    die(EXIT_USAGE, "task=qa needs file=FILE.jsonl or .json, records {query, answer[, reasoning]}, or file=arithmetic");
  QaSet set = strcmp(o->file, "arithmetic") == 0 ? qa_arithmetic_(o) : qa_load(o->file);
  size_t n = o->limit > 0 && (size_t)o->limit < set.n ? (size_t)o->limit : set.n;
  double t0 = time_now();
  for (int m = 0; m < n_models; m++) {
    models[m] = qa_model_(o, dirs[m], &set, n);
    qa_report_model_(&report, dirs[m], models[m], n);
  }
  if (n_models == 2) qa_report_difference_(&report, models[0], models[1], n, (uint64_t)o->seed);
  report_print(&report);
  fprintf(stderr, "%zu questions, template %s; %.1f s\n", n, option_choice_name("qa_template", o->qa_template), time_now() - t0);
  if (o->results[0]) {
    strbuf_printf(&json, "{\n  \"task\": \"qa\",\n  \"models\": [");
    for (int m = 0; m < n_models; m++) {
      if (m) strbuf_printf(&json, ", ");
      json_put_string(&json, dirs[m], strlen(dirs[m]));
    }
    strbuf_printf(&json, "],\n  \"file\": ");
    json_put_string(&json, o->file, strlen(o->file));
    strbuf_printf(&json, ",\n  \"template\": \"%s\",\n", option_choice_name("qa_template", o->qa_template));
    report_put_json(&json, &report);
    strbuf_printf(&json, ",\n");
    qa_put_items_(&json, &set, models, n_models, n);
    strbuf_printf(&json, "\n}\n");
    report_save(o->results, &json);
  }
  for (int m = 0; m < n_models; m++) {
    for (size_t i = 0; i < n; i++) {
      free(models[m][i].first);
      free(models[m][i].second);
    }
    free(models[m]);
  }
  strbuf_free(&json);
  free(report.rows);
  qa_free(&set);
}

#endif
