/*
grpo.h: reinforcement learning. A model answers questions, is told how good each answer was, and makes good ones more likely.

What it is:  ./train_bitnet grpo arithmetic init=RUN               sums and differences; the reward is being right
             ./train_bitnet grpo init=DIR data=FILE.jsonl          questions with answers from a file
             ./train_bitnet grpo corrections init=RUN              sums and differences; the reward is a better second answer
             ./train_bitnet grpo resume=RUN                        goes on with the same bits
             the data of each step (questions, sampled answers, rewards, advantages) as hooks of the common trainer.
What not:    the loss (bitnet/policy.h), the sampling (bitnet/rollout.h), the scores of answers (bitnet/rewards.h).
Read before: bitnet/policy.h, bitnet/rollout.h, bitnet/guide.h, bitnet/trainer.h, modes/pretrain.h.
Defines:     mode_grpo.

A step: grad_accum * batch_size questions, group_size answers to each, one reward for each answer; then num_iterations updates on them.
Sampling runs on the model that is trained, with the weights that the last update left, quantised at lambda = 1; so do the updates.
Both run the same ops, and the first update finds every token exactly as likely as it was when it was sampled: ratio 1, to the last
bit.

With two_layer=1 the step goes on: the model, as these updates left it, sees each of its answers with a guiding prompt ("check that")
and samples augmentation_size corrections. How much the reward rises is the correction's advantage, and a second round of updates
follows.

Both rounds train the same weights, and a model that learns both at once finds that copying a first answer is as good as improving it.
With first_weight=0 first answers earn nothing, and first_beta > 0 holds them near those of the start; what is learned then goes into
the corrections.
*/
#ifndef MODE_GRPO_H
#define MODE_GRPO_H

#include "../bitnet/guide.h"
#include "../bitnet/qa.h"
#include "../bitnet/trainer.h"
#include "chat.h"
#include "pretrain.h"
#include "question.h"
#include "scorer.h"

// ---------------------------------------------------------------------------------------------------------
// Rewards: a weighted mean of rules.

enum { RULE_EXACT, RULE_F1, RULE_NUMERIC, RULE_ACCURACY, RULE_ARITHMETIC, RULES };
static const char *const rule_names[RULES] = {"exact", "f1", "numeric", "accuracy", "arithmetic"};

typedef struct {
  double weight[RULES];   // they sum to 1
} RewardRules;

// Reads "f1" or "f1:0.7,exact:0.3"; weights are divided by their sum. Exit 2 for an unknown rule or weights that do not make sense.
static RewardRules rules_parse_(const char *text) {
  RewardRules r;
  double sum = 0;
  char *copy = xstrdup(text), *save = NULL;
  memset(&r, 0, sizeof r);
  for (char *word = strtok_r(copy, ", ", &save); word; word = strtok_r(NULL, ", ", &save)) {
    char *colon = strchr(word, ':'), *end = NULL;
    double weight = colon ? strtod(colon + 1, &end) : 1;
    int k = 0;
    if (colon) *colon = 0;
    while (k < RULES && strcmp(rule_names[k], word) != 0) k++;
    if (k == RULES) {
      const char *near = nearest_name(word, rule_names, RULES);
      die(EXIT_USAGE, "reward: unknown rule '%s'%s%s%s; there are exact, f1, numeric, accuracy, arithmetic", word,
          near ? "; did you mean '" : "", near ? near : "", near ? "'" : "");
    }
    if (colon && (end == colon + 1 || *end != 0 || !(weight >= 0 && weight <= 1e9)))
      die(EXIT_USAGE, "reward: %s: expected a weight of at least 0, found '%s'", word, colon + 1);
    r.weight[k] += weight;
    sum += weight;
  }
  if (!(sum > 0)) die(EXIT_USAGE, "reward: expected rules with positive weights, found '%s'", text);
  for (int k = 0; k < RULES; k++) r.weight[k] /= sum;
  free(copy);
  return r;
}

// The reward of an answer, 0 to 1. ended: its end token came; an unfinished number is no number.
static double rules_score_(const RewardRules *r, const char *query, const char *gold, const char *text, int ended) {
  const char *answer = answer_text(text);
  double score = 0;
  for (int k = 0; k < RULES; k++) {
    if (r->weight[k] == 0) continue;
    score += r->weight[k] * (k == RULE_EXACT      ? reward_exact(answer, gold)
                             : k == RULE_F1       ? reward_f1(answer, gold)
                             : k == RULE_NUMERIC  ? reward_numeric(answer, gold)
                             : k == RULE_ACCURACY ? reward_accuracy(answer, gold)
                             : ended              ? reward_arithmetic(query, answer)
                                                  : 0);
  }
  return score;
}

// ---------------------------------------------------------------------------------------------------------
// The mode's state.

enum { CSV_TEXTS = 3 };

typedef struct {
  const Options *o;
  const Tokenizer *tok;
  Model *m, *ref;             // ref: the model as it was at the start; NULL unless needs_reference_
  int end, pad;               // the token that ends an answer, and the one that fills rows
  PolicyLoss loss[2];         // of the first answers, of the corrections
  RewardRules rules;
  RewardModels models;        // none: n = 0
  double rule_weight;         // share of the rules in a reward
  Guides guides;
  // questions
  int arithmetic;
  DataLoader loader;          // arithmetic
  QaSet questions, held;      // of data=, of val_data=
  Evaluation eval;            // arithmetic
  Ids prompt;
  char query[ARITH_TEXT_CAP], gold[ARITH_TEXT_CAP];   // of the newest arithmetic question
  // answers
  Session session;
  SampleSet first;            // answers of the step
  SampleSet second;           // their corrections; behind those that train, some of earlier steps
  SampleSet *set;             // of the two, the one that is trained
  SuccessRing ring;
  StrBuf *first_text;         // [first.cap] of two_layer: the answers and rewards of the first layer, in the order of the questions
  double *first_reward, *first_rule;
  double *rewards, *A;        // [first.cap or second.cap]
  double *rule;               // [the same] what the rules alone give
  double *corrected;          // [second.cap] 1: the correction improved
  size_t sequences, tokens;   // of the update, with those that samples_merge has left out
  int at;                     // sample of the first row of the newest micro-batch
  int batches, batch;         // micro-batches of an update, and how many of them are done
  Batch host;                 // for the reference's pass
  float *host_coef;           // [B*T]
  PolicyRows rows;
  // for the log
  PolicyStats stats;          // over the updates of the first layer
  PolicyStats stats2;         // of the second
  double loss1, loss2;        // of the first update of each
  int updates;                // finished ones of the phase
  double reward, length, advantage;
  double rule_reward, *model_rewards;   // of the first layer: means of the rules and of each reward model
  double kl;                  // the distance from the reference where it is no part of the first answers' loss; NAN: not measured
  int measure_kl;             // 1: to be measured next
  double sampled, sampling;   // tokens of all answers and corrections of the step, and the seconds that it took to sample them
  double improvement, right_after_wrong, wrong_after_right, reward2;   // of the corrections
  int equal_groups, corrections, replayed, cut, trained2;
  FILE *csv;
  StrBuf corrected_text[CSV_TEXTS];   // the first corrections of the step that improved
  int corrected_texts;
} Grpo;

// The weight of the distance from the start in the loss of the first answers (second = 0) or of the corrections (1).
static double grpo_beta_(const Options *o, int second) {
  return !second && o->two_layer && o->first_beta >= 0 ? o->first_beta : o->beta;
}

// 1 if the model of the start is needed: for a loss, or to measure the distance from it.
static int needs_reference_(const Options *o) { return grpo_beta_(o, 0) > 0 || grpo_beta_(o, 1) > 0 || o->kl_every > 0; }

// The loss of the answers that are trained now.
static const PolicyLoss *loss_of_(const Grpo *g) { return &g->loss[g->set == &g->second]; }

// Question number `index` of the run. Questions of a file come in a new random order each time that all have been asked.
static void question_at_(Grpo *g, uint64_t index, const char **query, const char **gold) {
  if (g->arithmetic) {
    arith_text(&g->loader.arith, arith_draw_(&g->loader, index), g->query, g->gold);
    *query = g->query;
    *gold = g->gold;
    return;
  }
  uint64_t n = g->questions.n, epoch = index / n;
  const QaItem *q = &g->questions.items[permute(index % n, n, rng_u64((uint64_t)g->o->seed, RNG_DATA, epoch))];
  *query = q->query;
  *gold = q->answer;
}

// The question that sample i of the step answers; groups: questions of a step.
static void question_of_(Grpo *g, int64_t step, int i, const char **query, const char **gold) {
  uint64_t groups = (uint64_t)(g->o->batch_size * g->o->grad_accum);
  question_at_(g, (uint64_t)step * groups + (uint64_t)(i / g->o->group_size), query, gold);
}

static void sample_prompt_(Grpo *g, Sample *x) {
  x->n_prompt = (int)g->prompt.n;
  memcpy(x->ids, g->prompt.ids, g->prompt.n * sizeof(int));
}

/*
The prompt of a second pass into g->prompt. An answer that is too long loses its beginning, so that `room` new tokens fit into rows of
T. Returns 1 if it did. That the rest fits was checked when the questions were read.
*/
static int second_prompt_(Grpo *g, const char *query, const char *answer, const char *guide, int room) {
  const Tokenizer *t = g->tok;
  int T = g->first.T, cut = 0;
  for (;;) {
    question_prompt(&g->prompt, t, g->o->qa_template, query, answer, guide);
    int over = (int)g->prompt.n + room - 1 - T;
    if (over <= 0 || *answer == 0) return cut;
    // At least as many bytes as tokens are too many; then on to the beginning of a character.
    size_t drop = (size_t)over < strlen(answer) ? (size_t)over : strlen(answer);
    answer += drop;
    while (((unsigned char)*answer & 0xC0) == 0x80) answer++;
    cut = 1;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Collecting: hooks of the trainer.

// Log-probabilities of all answers in g->set under the reference model.
static void collect_reference_(Grpo *g) {
  float *logp = g->rows.ref_logp;
  for (int first = 0; first < g->set->n; first += g->m->B) {
    samples_fill(g->set, first, g->pad, &g->host);
    batch_to_device(g->ref, &g->host, 0, g->host_coef);
    model_forward(g->ref);
    policy_logp(g->ref, logp);
    for (int r = 0; r < g->host.B && first + r < g->set->n; r++) {
      Sample *x = &g->set->items[first + r];
      for (int i = 0; i < x->n_answer; i++) x->ref_logp[i] = logp[(size_t)r * (size_t)g->host.T + (size_t)(x->n_prompt - 1 + i)];
    }
  }
}

// The distance from the reference by the estimate k3, the mean over all tokens in g->set: measured, where it is no part of the loss.
static double measure_reference_(Grpo *g) {
  PolicyLoss k3 = {0, 0, 1, KL_K3};
  double sum = 0, tokens = 0;
  collect_reference_(g);
  for (int i = 0; i < g->set->n; i++) {
    const Sample *x = &g->set->items[i];
    tokens += x->n_answer;
    for (int t = 0; t < x->n_answer; t++)
      sum += policy_token(&k3, (double)x->logp[t], (double)x->logp[t], (double)x->ref_logp[t], 0).kl;
  }
  return tokens > 0 ? sum / tokens : 0;
}

// What is the same for both layers once set holds answers with advantages; G: those to the same prompt, which lie side by side.
static void collect_end_(Grpo *g, SampleSet *set, int G, Work *work) {
  g->set = set;
  g->sequences = (size_t)set->n;
  g->tokens = 0;
  for (int i = 0; i < set->n; i++) g->tokens += (size_t)set->items[i].n_answer;
  if (g->measure_kl) g->kl = measure_reference_(g);
  g->measure_kl = 0;
  const PolicyLoss *loss = loss_of_(g);
  if (G > 1) samples_merge(set, G, loss->beta == 0);
  g->batches = (set->n + g->m->B - 1) / g->m->B;
  g->updates = g->batch = 0;
  if (loss->beta > 0 && !policy_needs_logits(loss)) collect_reference_(g);
  work->updates = set->n > 0 ? g->o->num_iterations : 0;
  work->batches = g->batches;
}

// Samples answers to the prompts of all of set, and takes the time.
static void collect_answers_(Grpo *g, SampleSet *set, uint64_t seed, int max_new) {
  double began = time_now();
  for (int first = 0, n; first < set->n; first += n) {
    n = set->n - first < g->session.sequences ? set->n - first : g->session.sequences;
    samples_draw(set, first, n, &g->session, seed, 0, max_new, g->end, g->tok);
    for (int i = first; i < first + n; i++) g->sampled += set->items[i].n_answer;
  }
  g->sampling += time_now() - began;
}

// The rewards of all answers in set, `each` of them to one of the first layer's: what the rules say, and with reward models a weighted
// mean of both.
static void collect_rewards_(Grpo *g, SampleSet *set, int64_t step, int each) {
  const char *query, *gold;
  int n = set->n, models = g->models.n > 0;
  char **queries = (char **)xcalloc((size_t)n, sizeof(char *));
  const char **texts = (const char **)xcalloc((size_t)n, sizeof(char *));
  double *scores = (double *)xcalloc((size_t)n, sizeof(double));
  for (int i = 0; i < n; i++) {
    Sample *x = &set->items[i];
    question_of_(g, step, i / each, &query, &gold);
    x->reward = g->rule[i] = rules_score_(&g->rules, query, gold, x->text.data, x->ended);
    queries[i] = models ? xstrdup(query) : NULL;
    texts[i] = x->text.data;
  }
  if (models) reward_models_score(&g->models, (const char *const *)queries, texts, n, scores);
  for (int i = 0; i < n && models; i++)
    set->items[i].reward = g->rule_weight * g->rule[i] + (1 - g->rule_weight) * scores[i];
  for (int i = 0; i < n; i++) free(queries[i]);
  free(queries);
  free(texts);
  free(scores);
}

// Remembers what the second layer needs of the first, whose samples are exchanged and left out next.
static void keep_first_(Grpo *g) {
  for (int i = 0; i < g->first.n; i++) {
    const Sample *x = &g->first.items[i];
    g->first_reward[i] = x->reward;
    g->first_rule[i] = g->rule[i];
    g->first_text[i].len = 0;
    strbuf_append(&g->first_text[i], x->text.data, x->text.len);
  }
}

// The first layer: questions, answers, rewards, advantages.
static void collect_first_(Grpo *g, int64_t step, Work *work) {
  const Options *o = g->o;
  const char *query, *gold;
  int G = o->group_size, groups = o->batch_size * o->grad_accum;
  SampleSet *set = &g->first;
  set->n = groups * G;
  for (int i = 0; i < set->n; i++) {
    if (i % G == 0) {
      question_of_(g, step, i, &query, &gold);
      question_prompt(&g->prompt, g->tok, o->qa_template, query, NULL, NULL);
    }
    sample_prompt_(g, &set->items[i]);
    set->items[i].number = (uint64_t)step * (uint64_t)set->n + (uint64_t)i;
  }
  g->sampled = g->sampling = 0;
  collect_answers_(g, set, (uint64_t)o->seed, o->max_new);
  collect_rewards_(g, set, step, 1);
  g->reward = g->rule_reward = g->length = g->advantage = 0;
  for (int k = 0; k < g->models.n; k++) g->model_rewards[k] = g->models.list[k].mean;
  for (int i = 0; i < set->n; i++) {
    Sample *x = &set->items[i];
    g->rewards[i] = x->reward;
    g->reward += x->reward / set->n;
    g->rule_reward += g->rule[i] / set->n;
    g->length += (double)x->n_answer / set->n;
  }
  g->equal_groups = advantages(g->A, g->rewards, (size_t)groups, (size_t)G, o->advantage);
  for (int i = 0; i < set->n; i++) g->A[i] *= (g->A[i] < 0 ? o->negative_weight : 1) * o->first_weight;
  for (int i = 0; i < set->n; i++) {
    set->items[i].advantage = g->A[i];
    g->advantage += fabs(g->A[i]) / set->n;
  }
  memset(&g->stats, 0, sizeof g->stats);
  memset(&g->stats2, 0, sizeof g->stats2);
  g->loss1 = g->loss2 = 0;
  g->kl = NAN;
  g->measure_kl = g->loss[0].beta == 0 && due_(o->kl_every, step + 1);
  if (o->two_layer) keep_first_(g);
  collect_end_(g, set, G, work);
}

/*
The advantages of the corrections in set, which carry their rise. delta: the rise, divided by the root of the mean square of all, and
not centred: what made an answer better is reinforced even where others gained more. group: as in the first layer, with the same
`advantage` and negative_weight, among the corrections of one answer.
*/
static void second_advantages_(Grpo *g, SampleSet *set) {
  const Options *o = g->o;
  int H = o->augmentation_size;
  if (o->second_advantage == SECOND_GROUP) {
    for (int i = 0; i < set->n; i++) g->rewards[i] = set->items[i].reward;
    advantages(g->A, g->rewards, (size_t)(set->n / H), (size_t)H, o->advantage);
    for (int i = 0; i < set->n; i++) set->items[i].advantage = g->A[i] * (g->A[i] < 0 ? o->negative_weight : 1);
    return;
  }
  double square = 0;
  for (int i = 0; i < set->n; i++) square += set->items[i].advantage * set->items[i].advantage / set->n;
  for (int i = 0; i < set->n; i++) set->items[i].advantage /= sqrt(square) + 1e-8;
}

// The second layer: each answer of the first with a guiding prompt, its corrections, and how much better they are.
static void collect_second_(Grpo *g, int64_t step, Work *work) {
  const Options *o = g->o;
  const char *query, *gold;
  int H = o->augmentation_size, kept = 0;
  SampleSet *set = &g->second;
  set->n = g->first.cap * H;
  g->cut = 0;
  for (int i = 0; i < set->n; i++) {
    Sample *x = &set->items[i];
    x->number = (uint64_t)step * (uint64_t)set->n + (uint64_t)i;
    uint64_t turn = o->guiding_schedule_unit == UNIT_BATCH ? (uint64_t)step : x->number;
    int guide = guides_choose(&g->guides, (uint64_t)o->seed, x->number, turn);
    question_of_(g, step, i / H, &query, &gold);
    g->cut += second_prompt_(g, query, g->first_text[i / H].data, g->guides.texts[guide], o->second_max_length);
    sample_prompt_(g, x);
  }
  collect_answers_(g, set, rng_u64((uint64_t)o->seed, RNG_SAMPLE, 2), o->second_max_length);
  g->improvement = g->right_after_wrong = g->wrong_after_right = g->reward2 = 0;
  g->corrections = set->n;
  collect_rewards_(g, set, step, H);
  for (int i = 0; i < set->n; i++) {
    Sample *x = &set->items[i];
    double first = g->first_reward[i / H], first_rule = g->first_rule[i / H];
    question_of_(g, step, i / H, &query, &gold);
    x->advantage = x->reward - first;
    g->corrected[i] = correction_improved(o->verifier_mode, o->improvement_threshold, first, x->reward, x->text.data, gold);
    g->improvement += g->corrected[i] / set->n;
    g->reward2 += x->reward / set->n;
    g->right_after_wrong += (first_rule < 1 && g->rule[i] >= 1) / (double)set->n;
    g->wrong_after_right += (first_rule >= 1 && g->rule[i] < 1) / (double)set->n;
  }
  g->corrected_texts = 0;
  for (int i = 0; i < set->n && g->corrected_texts < CSV_TEXTS; i++) {
    StrBuf *b = &g->corrected_text[g->corrected_texts];
    if (!g->corrected[i]) continue;
    b->len = 0;
    strbuf_append(b, set->items[i].text.data, set->items[i].text.len);
    g->corrected_texts++;
  }
  // With a verifier only improvements are trained. The group's advantages compare all corrections, so all stay.
  if (o->verifier_mode != VERIFIER_NONE && o->second_advantage == SECOND_DELTA) {
    for (int i = 0; i < set->n; i++) {
      if (!g->corrected[i]) continue;
      Sample swap = set->items[kept];   // the items keep their memory: they are exchanged, not copied
      set->items[kept] = set->items[i];
      set->items[i] = swap;
      g->corrected[kept++] = 1;
    }
    set->n = kept;
  }
  g->trained2 = set->n;
  g->replayed = o->second_advantage == SECOND_DELTA ? ring_take(&g->ring, set, step, o->buffer_age) : 0;
  for (int i = 0; i < set->n; i++) g->rewards[i] = set->items[i].advantage;   // the rises, which the ring keeps
  double *rises = g->corrected + set->cap;
  memcpy(rises, g->rewards, (size_t)set->n * sizeof(double));
  second_advantages_(g, set);
  collect_end_(g, set, o->second_advantage == SECOND_GROUP ? H : 1, work);
}

// After the updates of the second layer its successes enter the ring, unless they are compared with each other and not with the first
// answer.
static void collect_successes_(Grpo *g, int64_t step) {
  const double *rises = g->corrected + g->second.cap;
  if (g->o->second_advantage == SECOND_GROUP) return;
  for (int i = 0; i < g->trained2; i++) {
    if (!g->corrected[i]) continue;
    g->second.items[i].advantage = rises[i];
    ring_put(&g->ring, &g->second.items[i], step);
  }
}

static int grpo_collect_(void *ctx, Model *m, int64_t step, int phase, Work *work) {
  Grpo *g = (Grpo *)ctx;
  (void)m;
  if (phase == 0) collect_first_(g, step, work);
  else if (phase == 1 && g->o->two_layer) collect_second_(g, step, work);
  else {
    if (g->o->two_layer) collect_successes_(g, step);
    return 0;
  }
  return 1;
}

// ---------------------------------------------------------------------------------------------------------
// Training: hooks of the trainer.

static void grpo_batch_(void *ctx, uint64_t index, Batch *b) {
  Grpo *g = (Grpo *)ctx;
  g->at = (int)index * b->B;
  samples_fill(g->set, g->at, g->pad, b);
}

// Forward and backward of the micro-batch that grpo_batch_ has filled. Returns its part of the loss.
static double grpo_loss_(void *ctx, Model *m, const Batch *b, float coef, float *host_coef) {
  Grpo *g = (Grpo *)ctx;
  const Options *o = g->o;
  int second = g->set == &g->second;
  PolicyStats *stats = second ? &g->stats2 : &g->stats;
  double before = stats->loss;
  samples_rows(g->set, g->at, b, o->loss_type, g->sequences, g->tokens, (size_t)(second ? o->second_max_length : o->max_new),
               &g->rows);
  batch_to_device(m, b, coef, host_coef);
  model_forward(m);
  if (policy_needs_logits(loss_of_(g))) {
    batch_to_device(g->ref, b, coef, host_coef);
    model_forward(g->ref);
  }
  head_policy(m, g->ref, loss_of_(g), &g->rows, host_coef, stats, 1);
  model_backward(m);
  if (g->updates == 0) *(second ? &g->loss2 : &g->loss1) = stats->loss;
  if (++g->batch == g->batches) {
    g->batch = 0;
    g->updates++;
  }
  return stats->loss - before;
}

// The mean distance from the reference over the tokens of the first layer's updates; NAN where nobody has computed it.
static double step_kl_(const Grpo *g) {
  return g->loss[0].beta == 0 ? g->kl : g->stats.tokens > 0 ? g->stats.kl / g->stats.tokens : 0;
}

static void put_number_(StrBuf *b, const char *key, double value) {
  strbuf_printf(b, ", \"%s\": ", key);
  json_put_number(b, value);
}

// The step's numbers for log.jsonl.
static void grpo_report_(void *ctx, StrBuf *b) {
  const Grpo *g = (const Grpo *)ctx;
  const PolicyStats *s = &g->stats;
  double n = s->tokens > 0 ? s->tokens : 1;
  put_number_(b, "reward", g->reward);
  if (g->models.n > 0) put_number_(b, "rule_reward", g->rule_reward);
  for (int k = 0; k < g->models.n; k++) {
    char key[32];
    snprintf(key, sizeof key, "model_%d", k + 1);
    put_number_(b, key, g->model_rewards[k]);
  }
  put_number_(b, "sampled_tok_per_s", g->sampling > 0 ? g->sampled / g->sampling : 0);
  put_number_(b, "kl", step_kl_(g));
  put_number_(b, "ratio", s->ratio / n);
  put_number_(b, "ratio_min", s->ratio_min);
  put_number_(b, "ratio_max", s->ratio_max);
  put_number_(b, "clipped", s->clipped / n);
  put_number_(b, "entropy", s->entropy / n);
  put_number_(b, "completion_length", g->length);
  put_number_(b, "abs_advantage", g->advantage);
  put_number_(b, "frac_zero_std", (double)g->equal_groups / (double)(g->o->batch_size * g->o->grad_accum));
  if (!g->o->two_layer) return;
  double n2 = g->stats2.tokens > 0 ? g->stats2.tokens : 1;
  put_number_(b, "loss2", g->loss2);
  put_number_(b, "reward2", g->reward2);
  put_number_(b, "ratio2", g->stats2.ratio / n2);
  put_number_(b, "kl2", g->stats2.kl / n2);
  put_number_(b, "improvement_rate", g->improvement);
  put_number_(b, "wrong_to_right", g->right_after_wrong);
  put_number_(b, "right_to_wrong", g->wrong_after_right);
  strbuf_printf(b, ", \"corrections\": %d, \"trained\": %d, \"replayed\": %d, \"cut\": %d", g->corrections, g->trained2, g->replayed,
                g->cut);
}

static void grpo_progress_(void *ctx, StrBuf *b) {
  const Grpo *g = (const Grpo *)ctx;
  strbuf_printf(b, " reward %.3f", g->reward);
  if (!isnan(step_kl_(g))) strbuf_printf(b, "  kl %.4f", step_kl_(g));
  if (g->o->two_layer) strbuf_printf(b, "  corrected %.3f", g->reward2);
}

// ---------------------------------------------------------------------------------------------------------
// The CSV log: a row for each step, texts quoted as RFC 4180 says.

// The header's line, in static storage.
static const char *csv_header_(const Options *o) {
  static char header[4096];
  int n = snprintf(header, sizeof header, "step,loss,mean_reward,kl%s%s",
                   o->two_layer ? ",improvement_rate,corrected_1,corrected_2,corrected_3" : "",
                   o->reward_model[0] ? ",rule_reward" : "");
  int models = o->reward_model[0] != 0;
  for (const char *p = o->reward_model; *p; p++) models += *p == ',';
  for (int k = 1; k <= models && n < 4000; k++) n += snprintf(header + n, sizeof header - (size_t)n, ",model_%d", k);
  snprintf(header + n, sizeof header - (size_t)n, "\n");
  return header;
}

// Where the record that begins at p ends: behind a line end that is not inside quotes.
static const char *csv_record_end_(const char *p) {
  for (int quoted = 0; *p; p++) {
    if (*p == '"') quoted = !quoted;
    else if (*p == '\n' && !quoted) return p + 1;
  }
  return p;
}

// Exit 2 if the file cannot be written or has something else in it: rows of two forms in one table help nobody. The header's length, 0
// for an empty file.
static size_t csv_check_(const Options *o) {
  size_t len = 0;
  FILE *f = fopen(o->csv_log, "a");
  if (f == NULL) die(EXIT_USAGE, "csv_log: cannot write %s: %s", o->csv_log, strerror(errno));
  fclose(f);
  char *text = read_file(o->csv_log, &len);
  const char *header = csv_header_(o);
  if (text && len > 0 && strncmp(text, header, strlen(header)) != 0)
    die(EXIT_USAGE, "csv_log: %s begins with '%.*s'; expected the header '%.*s', or an empty file", o->csv_log,
        (int)(strcspn(text, "\n") < 100 ? strcspn(text, "\n") : 100), text, (int)strlen(header) - 1, header);
  free(text);
  return len > 0 ? strlen(header) : 0;
}

// Opens the file for appending. A resumed run first cuts the rows of the steps that it runs again.
static void csv_open_(Grpo *g, int64_t step) {
  const Options *o = g->o;
  size_t len, header = csv_check_(o);
  if (header && o->resume[0]) {
    StrBuf kept = {NULL, 0, 0};
    char *text = read_file(o->csv_log, &len);
    for (const char *p = text ? text : "", *end; *p; p = end) {
      end = csv_record_end_(p);
      if (p == text || atoll(p) <= step) strbuf_append(&kept, p, (size_t)(end - p));
    }
    int err = kept.data ? safe_write_file(o->csv_log, kept.data, kept.len) : 0;
    if (err) die(EXIT_FAILED, "cannot write %s: %s", o->csv_log, strerror(err));
    strbuf_free(&kept);
    free(text);
  }
  g->csv = fopen(o->csv_log, "a");
  if (g->csv == NULL) die(EXIT_USAGE, "csv_log: cannot write %s: %s", o->csv_log, strerror(errno));
  if (!header) fputs(csv_header_(o), g->csv);
}

static void csv_put_text_(FILE *f, const char *text) {
  fputs(",\"", f);
  for (; *text; text++) {
    if (*text == '"') fputc('"', f);
    fputc(*text, f);
  }
  fputc('"', f);
}

static void grpo_finish_(void *ctx, int64_t step) {
  Grpo *g = (Grpo *)ctx;
  if (g->csv == NULL) return;
  fprintf(g->csv, "%lld,%.9g,%.9g,", (long long)step, g->loss1 + g->loss2, g->reward);
  if (!isnan(step_kl_(g))) fprintf(g->csv, "%.9g", step_kl_(g));
  if (g->o->two_layer) {
    fprintf(g->csv, ",%.9g", g->improvement);
    for (int i = 0; i < CSV_TEXTS; i++) {
      if (i < g->corrected_texts) csv_put_text_(g->csv, g->corrected_text[i].data);
      else fputc(',', g->csv);
    }
  }
  if (g->models.n > 0) fprintf(g->csv, ",%.9g", g->rule_reward);
  for (int k = 0; k < g->models.n; k++) fprintf(g->csv, ",%.9g", g->model_rewards[k]);
  fputc('\n', g->csv);
  fflush(g->csv);
}

// ---------------------------------------------------------------------------------------------------------
// Measuring.

// Held-out question i, or NULL behind the last.
static const char *held_question_(Grpo *g, size_t i, const char **gold) {
  if (g->arithmetic) {
    if (i >= g->eval.n_problems) return NULL;
    arith_text(&g->loader.arith, g->eval.problems[i], g->query, g->gold);
    *gold = g->gold;
    return g->query;
  }
  if (i >= g->held.n) return NULL;
  *gold = g->held.items[i].answer;
  return g->held.items[i].query;
}

/*
The mean score of greedy answers to the held-out questions, and with second, of greedy corrections of them with the first guiding
prompt. texts (or NULL): the first few answers are appended. most: questions at most.
*/
static void measure_(Grpo *g, size_t most, double *first, double *second, StrBuf *texts) {
  SampleSet *set = &g->first;
  const char *query, *gold;
  size_t n = 0;
  double sum = 0, sum2 = 0;
  while (n < most && held_question_(g, n, &gold)) {
    int k = 0;
    for (; k < g->m->B && n + (size_t)k < most && (query = held_question_(g, n + (size_t)k, &gold)) != NULL; k++) {
      question_prompt(&g->prompt, g->tok, g->o->qa_template, query, NULL, NULL);
      sample_prompt_(g, &set->items[k]);
    }
    samples_draw(set, 0, k, &g->session, 0, 1, g->o->max_new, g->end, g->tok);
    for (int i = 0; i < k; i++) {
      Sample *x = &set->items[i];
      query = held_question_(g, n + (size_t)i, &gold);
      double score = rules_score_(&g->rules, query, gold, x->text.data, x->ended);
      sum += score;
      if (texts && n + (size_t)i < EVAL_SAMPLES) strbuf_printf(texts, "%s -> %s   (%s, %.3f)\n", query, x->text.data, gold, score);
      if (second == NULL) continue;
      second_prompt_(g, query, x->text.data, g->guides.texts[0], g->o->second_max_length);
      sample_prompt_(g, x);
    }
    if (second) samples_draw(set, 0, k, &g->session, 0, 1, g->o->second_max_length, g->end, g->tok);
    for (int i = 0; i < k && second; i++) {
      query = held_question_(g, n + (size_t)i, &gold);
      sum2 += rules_score_(&g->rules, query, gold, set->items[i].text.data, set->items[i].ended);
    }
    n += (size_t)k;
  }
  *first = n ? sum / (double)n : NAN;
  if (second) *second = n ? sum2 / (double)n : NAN;
}

static void grpo_evaluate_(void *ctx, Model *m, Metrics *out) {
  Grpo *g = (Grpo *)ctx;
  double first, second;
  if (g->arithmetic) evaluation_run(&g->eval, m, out);
  if (g->arithmetic && !g->o->two_layer) return;
  measure_(g, (size_t)-1, &first, g->o->two_layer ? &second : NULL, NULL);
  if (!g->arithmetic) out->exact_match = first;
  if (g->o->two_layer) out->second_match = second;
}

static void grpo_sample_(void *ctx, Model *m, StrBuf *b) {
  Grpo *g = (Grpo *)ctx;
  double first;
  (void)m;
  measure_(g, EVAL_SAMPLES, &first, NULL, b);
}

static void grpo_describe_(void *ctx, StrBuf *b) {
  const Grpo *g = (const Grpo *)ctx;
  strbuf_printf(b, ",\n\"data\": {\"questions\": %llu, \"held_out\": %zu}",
                (unsigned long long)(g->arithmetic ? g->loader.arith.n_problems : g->questions.n),
                g->arithmetic ? g->eval.n_problems : g->held.n);
}

static void grpo_keep_(void *ctx, StrBuf *b) {
  const Grpo *g = (const Grpo *)ctx;
  if (g->o->two_layer) ring_write(&g->ring, b);
}

// ---------------------------------------------------------------------------------------------------------
// Opening.

// Tokens of the longest prompt of a set of questions, and which record that is.
static size_t longest_prompt_(Grpo *g, const QaSet *set, const QaItem **which) {
  size_t longest = 0;
  for (size_t i = 0; i < set->n; i++) {
    question_prompt(&g->prompt, g->tok, g->o->qa_template, set->items[i].query, NULL, NULL);
    if (g->prompt.n <= longest) continue;
    longest = g->prompt.n;
    *which = &set->items[i];
  }
  return longest;
}

// Tokens of the longest prompt of the second pass over an empty answer.
static size_t longest_second_(Grpo *g, const char *query) {
  size_t longest = 0;
  for (int i = 0; i < g->guides.n; i++) {
    question_prompt(&g->prompt, g->tok, g->o->qa_template, query, "", g->guides.texts[i]);
    if (g->prompt.n > longest) longest = g->prompt.n;
  }
  return longest;
}

/*
The length of a row: o->seq_len, or what the longest question with its answers (and corrections) needs, at most the model's context.
Exit 2 with file and line if a prompt does not fit.
*/
static void resolve_length_(Grpo *g, Options *o, const Config *c) {
  const QaItem *which = NULL, *which_held = NULL;
  const char *file = o->data, *query;
  size_t longest, second = 0, line = 0;
  char problem[ARITH_TEXT_CAP] = "", gold[ARITH_TEXT_CAP];
  if (g->arithmetic) {
    for (uint64_t i = 0; i < g->loader.arith.n_problems; i++) {   // the longest text
      char text[ARITH_TEXT_CAP];
      arith_text(&g->loader.arith, i, text, gold);
      if (strlen(text) > strlen(problem)) memcpy(problem, text, sizeof problem);
    }
    query = problem;
    question_prompt(&g->prompt, g->tok, o->qa_template, query, NULL, NULL);
    longest = g->prompt.n;
    if (o->max_new > arith_max_tokens(&g->loader.arith)) o->max_new = arith_max_tokens(&g->loader.arith);
  } else {
    longest = longest_prompt_(g, &g->questions, &which);
    if (g->held.n > 0 && longest_prompt_(g, &g->held, &which_held) > longest) {
      longest = longest_prompt_(g, &g->held, &which);
      file = o->val_data;
    }
    query = which->query;
    line = which->line;
  }
  if (o->two_layer) second = longest_second_(g, query);
  if (o->seq_len == 0) {
    size_t need = longest + (size_t)o->max_new - 1;
    size_t need2 = o->two_layer ? second + (size_t)o->max_new + (size_t)o->second_max_length - 2 : 0;
    if (need2 > need) need = need2;
    if (g->arithmetic && !o->two_layer) need = (size_t)arith_max_tokens(&g->loader.arith) - 1;
    o->seq_len = need < (size_t)c->max_seq ? (int)need : c->max_seq;
  }
  if (o->seq_len > c->max_seq) die(EXIT_USAGE, "seq_len=%d is longer than the model's context of %d", o->seq_len, c->max_seq);
  if (longest > (size_t)o->seq_len) {
    if (g->arithmetic) die(EXIT_USAGE, "the prompt %s has %zu tokens, a row only %d", query, longest, o->seq_len);
    die(EXIT_USAGE, "%s:%zu: the prompt has %zu tokens, the context only %d; leave the question out or use a model with a longer "
        "context", file, line, longest, o->seq_len);
  }
  if (o->two_layer && second + (size_t)o->second_max_length - 1 > (size_t)o->seq_len)
    die(EXIT_USAGE, "%s:%zu: the prompt of the second pass has %zu tokens without the first answer; with second_max_length=%d the "
        "context of %d is too short", g->arithmetic ? query : file, line, second, o->second_max_length, o->seq_len);
}

enum { SAMPLING_CACHES = 128 << 20, SAMPLE_TEXT_BYTES = 64 };   // bytes: caches that sampling may have; the text of an answer, about

/*
How many answers are sampled at a time: whole micro-batches of `rows`, as many as a step has or as SAMPLING_CACHES allows, at least
one. Equal beginnings are computed once, so the passes over one micro-batch would be short.
*/
static int sampled_together_(const Options *o, const Config *c, int rows) {
  int n = 1;
  while (n < o->grad_accum && run_memory(c, o->precision, 0, 0, (n + 1) * rows, o->seq_len, 256).cache <= SAMPLING_CACHES) n++;
  return n * rows;
}

// Bytes of what comes on top of training: the reference model, and what sampling and evaluation need.
typedef struct {
  size_t reference, sampling;
} GrpoMemory;

static GrpoMemory grpo_memory_(const Options *o, const Config *c, int rows) {
  GrpoMemory out = {0, 0};
  size_t T = (size_t)o->seq_len, answers = (size_t)rows * (size_t)o->grad_accum;
  if (needs_reference_(o)) {
    Memory whole = model_memory(c, rows, o->seq_len, 1, 1);
    RunMemory packed = run_memory(c, o->precision, 0, 0, 1, 1, 1);
    int has_packed = c->act_bits > 0;
    out.reference = whole.activations + (has_packed ? packed.weights + packed.tables : whole.parameters + whole.weights);
  }
  int together = sampled_together_(o, c, rows);
  out.sampling = session_bytes(c, o->precision, together, o->seq_len, together > 256 ? together : 256, 1);
  if (is_arithmetic(o)) out.sampling += session_bytes(c, o->precision, EVAL_SEQUENCES, o->seq_len, EVAL_SEQUENCES, 1);
  if (o->two_layer) answers += answers * (size_t)o->augmentation_size + 2 * (size_t)o->buffer_size;
  out.sampling += answers * (sizeof(Sample) + 3 * (T + 1) * sizeof(int) + SAMPLE_TEXT_BYTES);
  return out;
}

static void grpo_dry_run_(const Options *o, const Config *c, int rows) {
  StrBuf b = {NULL, 0, 0};
  Memory need = model_memory(c, rows, o->seq_len, o->recompute, 1);
  GrpoMemory more = grpo_memory_(o, c, rows);
  options_put_json(&b, o, STORED_GROUPS);
  printf("%s", b.data);
  printf("answers: %d per step in rows of %d tokens\n", rows * o->grad_accum, o->seq_len);
  need.total += more.reference + more.sampling;
  pretrain_put_memory_(stdout, &need);
  printf("  of them the reference model %.1f, sampling and evaluation %.1f\n", (double)more.reference / 1e6,
         (double)more.sampling / 1e6);
  strbuf_free(&b);
}

static void grpo_introduce_(const Grpo *g, const char *run) {
  const Config *c = &g->m->c;
  const Options *o = g->o;
  fprintf(stderr, "device  %s\n", dev_name());
  fprintf(stderr, "model   %s, %.2fM parameters, vocabulary %d, context %d\n", o->init,
          (double)tensor_table_params(&g->m->table) / 1e6, c->vocab, c->max_seq);
  if (g->arithmetic) fprintf(stderr, "data    arithmetic: %zu held-out problems evaluated\n", g->eval.n_problems);
  else fprintf(stderr, "data    %s: %zu questions; held out: %zu\n", o->data, g->questions.n, g->held.n);
  fprintf(stderr, "step    %d questions x %d answers, rows of %d tokens%s\n", o->batch_size * o->grad_accum, o->group_size, o->seq_len,
          o->two_layer ? "; each answer is corrected" : "");
  fprintf(stderr, "run     %s\n", run);
}

// Options that make no sense together.
static void grpo_check_options_(const Options *o) {
  if (o->lambda_schedule != LAMBDA_NONE)
    die(EXIT_USAGE, "lambda_schedule=%s: sampling and training must be the same network, lambda = 1; leave it at none",
        option_choice_name("lambda_schedule", o->lambda_schedule));
  if (o->group_size < 2)
    die(EXIT_USAGE, "group_size=1: an answer is compared with the others of its group; a group of 1 has no signal");
  if (o->reward_model[0] == 0 && (o->reward_weights[0] || o->rule_weight >= 0 || o->reward_raw))
    die(EXIT_USAGE, "reward_weights, rule_weight and reward_raw say how reward models count; give them with reward_model=DIR");
  if (!o->two_layer && (o->first_weight != 1 || o->first_beta >= 0))
    die(EXIT_USAGE, "first_weight and first_beta say how first answers are trained beside corrections; give them with two_layer=1");
  if (o->two_layer && o->second_advantage == SECOND_GROUP && o->augmentation_size < 2)
    die(EXIT_USAGE, "second_advantage=group compares the corrections of an answer; augmentation_size must be at least 2");
  if ((long long)o->batch_size * o->group_size > 1 << 20)
    die(EXIT_USAGE, "batch_size=%d x group_size=%d is more than %d rows; use grad_accum for larger steps", o->batch_size,
        o->group_size, 1 << 20);
}

// What is read before anything is written: questions, guides, rules.
static void grpo_read_(Grpo *g, Options *o, const Config *c) {
  g->arithmetic = is_arithmetic(o);
  if (o->data[0] == 0)
    die(EXIT_USAGE, "grpo needs questions: data=FILE.jsonl with {\"query\": ..., \"answer\": ...}, or the preset arithmetic");
  if (g->arithmetic) {
    Arithmetic a;
    arithmetic_from_options(&a, o);
    loader_open_arithmetic(&g->loader, &a, g->tok, (uint64_t)o->seed);
  } else {
    g->questions = qa_load(o->data);
    if (o->val_data[0]) g->held = qa_load(o->val_data);
  }
  g->rules = rules_parse_(o->reward[0] ? o->reward : g->arithmetic ? "arithmetic" : "f1");
  const char *guide = o->guiding_prompt;
  if (o->two_layer) guides_open(&g->guides, guide, o->guiding_probabilities, o->guiding_schedule);
  if (o->csv_log[0]) csv_check_(o);
  g->end = end_token(g->tok, o->qa_template);
  if (g->end < 0)
    die(EXIT_USAGE, "the tokenizer has no token that ends an answer (%s)", o->qa_template == QA_CHATML ? "<|im_end|>" : "</s>");
  g->pad = g->tok->pad_id >= 0 ? g->tok->pad_id : 0;
  resolve_length_(g, o, c);
}

// Everything that a step needs, with the sizes known.
static void grpo_alloc_(Grpo *g, Model *m) {
  const Options *o = g->o;
  int rows = m->B, T = m->T, n = rows * o->grad_accum;
  size_t R = (size_t)m->R, cap = (size_t)n;
  g->m = m;
  int together = sampled_together_(o, &m->c, rows);
  session_open(&g->session, m, together, T, together > 256 ? together : 256, 1);
  samples_open(&g->first, n, T);
  if (o->two_layer) {
    int most = (int)size_mul((size_t)n, (size_t)o->augmentation_size) + o->buffer_size;
    samples_open(&g->second, most, T);
    ring_open(&g->ring, o->buffer_size, T);
    if ((size_t)most > cap) cap = (size_t)most;
    g->corrected = (double *)xcalloc(2 * (size_t)most, sizeof(double));
    g->first_text = (StrBuf *)xcalloc((size_t)n, sizeof(StrBuf));
    g->first_reward = (double *)xcalloc(2 * (size_t)n, sizeof(double));
    g->first_rule = g->first_reward + n;
  }
  g->rewards = (double *)xcalloc(2 * cap, sizeof(double));
  g->rule = g->rewards + cap;
  g->A = (double *)xcalloc(cap, sizeof(double));
  g->host_coef = (float *)xcalloc(R, sizeof(float));
  g->rows.weight = (float *)xcalloc(5 * R, sizeof(float));
  g->rows.advantage = g->rows.weight + R;
  g->rows.old_logp = g->rows.advantage + R;
  g->rows.ref_logp = g->rows.old_logp + R;
  g->rows.copies = g->rows.ref_logp + R;
  batch_alloc(&g->host, rows, T);
}

static void grpo_free_(Grpo *g) {
  const Options *o = g->o;
  session_free(&g->session);
  samples_free(&g->first);
  if (o->two_layer) {
    for (int i = 0; i < o->batch_size * o->group_size * o->grad_accum; i++) strbuf_free(&g->first_text[i]);
    free(g->first_text);
    free(g->first_reward);
    samples_free(&g->second);
    ring_free(&g->ring);
    guides_free(&g->guides);
  }
  if (g->arithmetic) {
    evaluation_close(&g->eval);
    loader_free(&g->loader);
  } else {
    qa_free(&g->questions);
    qa_free(&g->held);
  }
  for (int i = 0; i < CSV_TEXTS; i++) strbuf_free(&g->corrected_text[i]);
  if (g->csv) fclose(g->csv);
  if (g->models.n > 0) reward_models_free(&g->models);
  free(g->model_rewards);
  free(g->corrected);
  free(g->rewards);
  free(g->A);
  free(g->host_coef);
  free(g->rows.weight);
  free(g->prompt.ids);
  batch_free(&g->host);
}

UNUSED static void mode_grpo(Options *o) {
  static Grpo g;
  Model m, ref;
  Tokenizer tok;
  Trainer t;
  Hooks hooks;
  Config c;
  char from[4096], start[4096], full[PATH_MAX];
  if (!o->resume[0] && !o->init[0]) die(EXIT_USAGE, "grpo starts from a model: init=DIR, a run or a checkpoint");
  run_start(o, from, sizeof from);
  if (o->resume[0]) {
    if (!is_dir(o->init))
      die(EXIT_USAGE, "the run %s started from %s, which is needed as the reference and is not there", o->resume, o->init);
  } else {
    if (is_arithmetic(o)) {   // the problems that the model was trained on are those that it practises
      checkpoint_options(o, from);
      if (!is_arithmetic(o))
        die(EXIT_USAGE, "%s was not trained on arithmetic; give data=FILE.jsonl instead of the preset arithmetic", from);
    }
    // The reference is this very checkpoint, also when the run is resumed from another directory.
    if (realpath(from, full) == NULL) die(EXIT_USAGE, "init: cannot read %s: %s", from, strerror(errno));
    options_set(o, "init", full, FROM_USER);
    if (o->reward_model[0]) reward_models_resolve(o);
  }
  grpo_check_options_(o);
  snprintf(start, sizeof start, "%s", o->init);
  config_read(&c, from);
  if (!o->resume[0]) config_to_options(o, &c);
  checkpoint_tokenizer(&tok, from);
  memset(&g, 0, sizeof g);
  g.o = o;
  g.tok = &tok;
  for (int k = 0; k < 2; k++) {
    g.loss[k].clip_low = o->clip_eps;
    g.loss[k].clip_high = o->clip_eps_high >= 0 ? o->clip_eps_high : o->clip_eps;
    g.loss[k].beta = grpo_beta_(o, k);
    g.loss[k].kl = o->kl;
  }
  grpo_read_(&g, o, &c);
  int rows = o->batch_size * o->group_size;
  if (o->dry_run) {
    grpo_dry_run_(o, &c, rows);
    return;
  }
  g.rule_weight = 1;
  if (o->reward_model[0]) {
    reward_models_open(&g.models, o);
    g.model_rewards = (double *)xcalloc((size_t)g.models.n, sizeof(double));
    g.rule_weight = o->rule_weight >= 0 ? o->rule_weight : o->reward[0] ? 0.5 : 0;
  }
  model_load(&m, from, o->precision);
  m.dx_int8 = o->dx_int8 && o->precision == PRECISION_BF16;
  model_alloc_training(&m, rows, o->seq_len, o->recompute, 1);
  if (needs_reference_(o)) {
    load_to_run(&ref, start, o->precision, 1, 0);
    if (ref.c.vocab != m.c.vocab) die(EXIT_USAGE, "%s: the reference has %d ids, the model %d", start, ref.c.vocab, m.c.vocab);
    model_alloc_batch(&ref, rows, o->seq_len, 1, 1);
    g.ref = &ref;
  }
  grpo_alloc_(&g, &m);
  if (g.arithmetic) evaluation_open(&g.eval, o, &m, &tok, "", 1);
  memset(&hooks, 0, sizeof hooks);
  hooks.ctx = &g;
  hooks.collect = grpo_collect_;
  hooks.batch = grpo_batch_;
  hooks.loss = grpo_loss_;
  hooks.report = grpo_report_;
  hooks.progress = grpo_progress_;
  hooks.finish = grpo_finish_;
  hooks.evaluate = g.arithmetic || g.held.n > 0 ? grpo_evaluate_ : NULL;
  hooks.sample = hooks.evaluate ? grpo_sample_ : NULL;
  hooks.describe = grpo_describe_;
  hooks.keep = grpo_keep_;
  trainer_open(&t, o, &hooks, &m, &tok);
  if (o->resume[0] && o->two_layer) {
    char *kept = state_kept(from);
    if (kept) ring_read(&g.ring, kept, strlen(kept), c.vocab, from);
    free(kept);
  }
  if (o->csv_log[0]) csv_open_(&g, t.state.step);
  grpo_introduce_(&g, t.run);
  trainer_train(&t);
  trainer_close(&t);
  grpo_free_(&g);
  if (g.ref) model_free(&ref);
  model_free(&m);
  tokenizer_free(&tok);
}

#endif
