/*
test_reward.h: tests of reward models: data, the linear scorer, the network with its head, and their use in reinforcement learning.

What not:    derivatives of the network (test_float64.c: value_head).
Read before: test_grpo.h, whose helpers it uses; modes/reward.h.
Defines:     REWARD_TESTS, the rows for the table of tests.
*/
#ifndef TEST_REWARD_H
#define TEST_REWARD_H

#include "../../modes/reward.h"
#include "check.h"
#include "test_grpo.h"

// ---------------------------------------------------------------------------------------------------------
// Data.

static const char *write_(const char *name, const char *text) {
  static char path[700];
  path_join(path, sizeof path, test_files_dir(), name);
  safe_write_file(path, text, strlen(text));
  return path;
}

static void child_preferences_(void *arg) { preferences_load((const char *)arg, 1); }

static void test_preferences(void) {
  char err[600];
  PreferenceSet set = preferences_load(write_("a.jsonl", "{\"query\": \"q\", \"positive\": \"g\", \"negative\": 7}\n\n"
      "{\"prompt\": \"p\", \"chosen\": {\"role\": \"assistant\", \"content\": \"c\"}, \"rejected\": \"r\"}\n"
      "{\"conversations\": [{\"from\": \"human\", \"value\": \"one\"}, {\"from\": \"gpt\", \"value\": \"two\"}], "
      "\"chosen\": {\"from\": \"gpt\", \"value\": \"x\"}, \"rejected\": {\"from\": \"gpt\", \"value\": \"y\"}}\n"), 1);
  CHECK(set.n == 3 && set.pairs, "%zu records", set.n);
  CHECK(strcmp(set.items[0].bad, "7") == 0 && set.items[1].line == 3 && strcmp(set.items[1].good, "c") == 0, "the second: %s",
        set.items[1].good);
  CHECK(strcmp(set.items[2].query, "one\n\ntwo") == 0 && strcmp(set.items[2].bad, "y") == 0, "a conversation: %s", set.items[2].query);
  preferences_free(&set);
  set = preferences_load(write_("b.json", "[{\"question\": \"q\", \"answer\": \"a\", \"label\": 0},\n"
                                          " {\"query\": \"q\", \"answer\": \"b\", \"is_correct\": true}]"), 1);
  CHECK(set.n == 2 && !set.pairs && set.items[0].good == NULL && strcmp(set.items[1].good, "b") == 0 && set.items[1].bad == NULL,
        "labels");
  preferences_free(&set);
  // Right answers alone: the wrong one is another record's, and another text.
  set = preferences_load(write_("c.jsonl",
      "{\"query\": \"1\", \"answer\": 5}\n{\"query\": \"2\", \"answer\": 5}\n{\"query\": \"3\", \"answer\": 6}\n"), 1);
  CHECK(set.n == 3 && set.pairs && strcmp(set.items[0].bad, "6") == 0 && strcmp(set.items[1].bad, "6") == 0 &&
            strcmp(set.items[2].bad, "5") == 0, "made pairs");
  preferences_free(&set);
  // Held out by question.
  StrBuf b = {NULL, 0, 0};
  PreferenceSet held;
  for (int i = 0; i < 400; i++) strbuf_printf(&b, "{\"query\": \"q%d\", \"positive\": \"g%d\", \"negative\": \"n\"}\n", i / 2, i);
  set = preferences_load(write_("d.jsonl", b.data), 1);
  preferences_split(&set, &held, 0.25);
  CHECK(set.n + held.n == 400 && held.n > 60 && held.n < 140, "%zu of 400 held out", held.n);
  for (size_t i = 0; i < held.n; i++) {
    for (size_t k = 0; k < set.n; k++) CHECK(strcmp(set.items[k].query, held.items[i].query) != 0, "%s is on both sides",
          set.items[k].query);
  }
  preferences_free(&set);
  preferences_free(&held);
  strbuf_free(&b);
  static const struct { const char *text, *said; } bad[] = {
    {"", "found none"},
    {"{\"query\": \"q\", \"positive\": \"g\"}\n", "x.jsonl:1: negative"},
    {"\n{\"positive\": \"g\", \"negative\": \"n\"}\n", "x.jsonl:2: query"},
    {"{\"query\": \"q\", \"answer\": \"g\", \"label\": 2}\n", "x.jsonl:1: label"},
    {"{\"query\": \"q\", \"answer\": \"g\", \"label\": \"yes\"}\n", "x.jsonl:1: label"},
    {"{\"query\": \"q\", \"answer\": \"g\", \"label\": 1}\n{\"query\": \"q\", \"positive\": \"g\", \"negative\": \"n\"}\n",
        "x.jsonl:2: expected an answer"},
    {"{\"query\": \"q\", \"answer\": \"g\"}\n{\"query\": \"r\", \"answer\": \"g\"}\n", "the same answer"},
    {"{\"query\": \"q\", \"answer\": [1]}\n", "x.jsonl:1: answer"},
    {"{\"query\": \"q\", \"chosen\": {\"text\": \"g\"}, \"rejected\": \"n\"}\n", "x.jsonl:1: chosen"},
    {"{\"query\": \"q\", \n", "x.jsonl:1"}};
  for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
    const char *path = write_("x.jsonl", bad[i].text);
    int code = run_child(child_preferences_, (void *)(uintptr_t)path, err, sizeof err);
    CHECK(code == EXIT_USAGE && strstr(err, bad[i].said), "%s: exit %d, %s", bad[i].said, code, err);
  }
  // Arithmetic: never the right result, each kind of wrong one, a function of its number.
  Arithmetic a;
  char q[ARITH_TEXT_CAP], good[ARITH_TEXT_CAP], wrong[ARITH_TEXT_CAP], again[ARITH_TEXT_CAP];
  int near = 0;
  arith_init(&a, "+-", 0, 9, 9, 0.1);
  for (uint64_t i = 0; i < 2000; i++) {
    preference_arithmetic(&a, i % a.n_problems, 3, i, q, good, wrong);
    CHECK(reward_arithmetic(q, good) == 1 && reward_arithmetic(q, wrong) == 0, "%s%s, wrong: %s", q, good, wrong);
    long off = labs(strtol(good, NULL, 10) - strtol(wrong, NULL, 10));
    near += off == 1 || off == 10;
    preference_arithmetic(&a, i % a.n_problems, 3, i, q, good, again);
    CHECK(strcmp(wrong, again) == 0, "number %d gives two wrong answers", (int)i);
  }
  CHECK(near > 600 && near < 1400, "%d of 2000 are 1 or 10 off", near);
}

// ---------------------------------------------------------------------------------------------------------
// The linear scorer.

static void child_linear_(void *arg) {
  static LinearScorer s;
  linear_read(&s, (const char *)arg);
}

static void test_linear_scorer(void) {
  static const char *const good[] = {"yes certainly", "Yes of course", "yes it is", "that is right yes"};
  static const char *const bad[] = {"no never", "No it is not", "nothing of that", "no that is wrong"};
  LinearScorer s, copy;
  StrBuf b = {NULL, 0, 0};
  double losses[100], before;
  char err[600];
  for (int i = 0; i < 4; i++) strbuf_printf(&b, "{\"query\": \"is it so %d\", \"positive\": \"%s\", \"negative\": \"%s\"}\n", i,
      good[i], bad[i]);
  PreferenceSet set = preferences_load(write_("l.jsonl", b.data), 1);
  linear_train(&s, &set, 1, 0, 7, losses);   // lr 0: as it starts
  before = linear_score(&s, "is it so 1", "YES course") - linear_score(&s, "is it so 1", "no never");
  // The gradient against differences; in one place each of a word, of w and b.
  size_t n, size = linear_size_(&s);
  double *grad = (double *)xcalloc(2 * size, sizeof(double)), top = 0, diff = 0;
  LinearCase_ *cases = linear_cases_(&s, &set, &n);
  linear_gradient_(&s, cases, n, grad);
  for (size_t k = 0; k < size; k++) {
    double old = s.params[k], at[2];
    for (int side = 0; side < 2; side++) {
      s.params[k] = old + (side ? 1e-5 : -1e-5);
      at[side] = linear_gradient_(&s, cases, n, grad + size);
    }
    s.params[k] = old;
    double want = (at[1] - at[0]) / 2e-5;
    top = fmax(top, fabs(want));
    diff = fmax(diff, fabs(want - grad[k]));
  }
  CHECK(n == 8 && top > 1e-3 && diff < 1e-8 * top, "%zu cases, gradient off by %g of %g", n, diff, top);
  linear_cases_free_(cases, n);
  free(grad);
  linear_free(&s);
  linear_train(&s, &set, 100, 0.1, 7, losses);
  double after = linear_score(&s, "is it so 1", "YES course") - linear_score(&s, "is it so 1", "no never");
  CHECK(losses[99] < 0.1 * losses[0] && after > 2 && after > before, "loss %g to %g, margin %g to %g", losses[0], losses[99],
        before, after);
  CHECK(linear_score(&s, "", "") == s.params[size - 1] && linear_score(&s, "zebra", "gnu") == s.params[size - 1],
        "unknown words count nothing");
  StrBuf text = {NULL, 0, 0}, again = {NULL, 0, 0};
  linear_write(&s, &text);
  const char *path = write_("linear.json", text.data);
  linear_read(&copy, path);
  linear_write(&copy, &again);
  CHECK(strcmp(text.data, again.data) == 0 && linear_score(&copy, "is it", "yes no") == linear_score(&s, "is it", "yes no"),
        "read back");
  static const char *const broken[] = {"{", "{}", "{\"words\": [\"a\"], \"params\": [1, 2]}", "{\"words\": [3], \"params\": []}"};
  for (size_t i = 0; i < ARRAY_LEN(broken); i++) {
    int code = run_child(child_linear_, (void *)(uintptr_t)write_("broken.json", broken[i]), err, sizeof err);
    CHECK(code == EXIT_DAMAGED && strstr(err, "broken.json"), "%s: exit %d, %s", broken[i], code, err);
  }
  strbuf_free(&b);
  strbuf_free(&text);
  strbuf_free(&again);
  preferences_free(&set);
  linear_free(&s);
  linear_free(&copy);
}

// ---------------------------------------------------------------------------------------------------------
// The network.

/*
A value depends on its text alone: not on the texts beside it, its row, the length of rows, or the number of threads. Backward: rows
without a slope change nothing.
*/
static void test_value_padding(void) {
  enum { N = 5, T = 24, LONGER = 37 };
  Config c = small_config_(BITNET_STYLE);
  double first[N], values[N + 3];
  int ids[N][T];
  c.value_head = 1;
  for (int i = 0; i < N; i++)
    for (int t = 0; t < T; t++) ids[i][t] = test_below_(c.vocab);
  for (int form = 0; form < 4; form++) {   // as is; longer rows; other rows, padding between them; three threads
    int B = form == 2 ? N + 3 : N, length = form == 1 ? LONGER : T, shift = form == 2 ? 3 : 0;
    Model m;
    Batch b;
    ValueHead head;
    float *coef = (float *)xcalloc((size_t)(B * length), sizeof(float));
    dev_init(form == 3 ? 3 : 1);
    open_model_(&m, &c, PRECISION_BF16, B, length, 0, 1);
    model_quantize(&m, 1);
    value_open(&head, &m, B);
    batch_alloc(&b, B, length);
    for (int r = 0; r < B; r++) {
      int i = r - shift;
      value_row(&head, &b, r, i >= 0 ? ids[i] : NULL, i >= 0 ? 3 + 5 * i : 0, 1);
    }
    batch_to_device(&m, &b, 0, coef);
    model_forward(&m);
    value_forward(&head, &m, B, values);
    if (form == 0) memcpy(first, values, sizeof first);
    for (int i = 0; i < N; i++) CHECK(values[shift + i] == first[i], "form %d, text %d: %.17g, alone %.17g", form, i,
          values[shift + i], first[i]);
    double slopes[N + 3] = {0};
    dev_zero(m.grads, m.table.floats * sizeof(float));
    value_backward(&head, &m, B, slopes);
    model_backward(&m);
    CHECK(grad_norm(&m) == 0, "slopes of 0 have a gradient");
    slopes[B - 1] = 1;
    value_backward(&head, &m, B, slopes);
    model_backward(&m);
    CHECK(grad_norm(&m) > 0, "no gradient");
    free(coef);
    batch_free(&b);
    value_free(&head);
    model_free(&m);
    end_test_();
  }
  CHECK(first[0] != first[1] && first[1] != first[2], "all values are the same; the test sees nothing");
  dev_init(0);
}

#define REWARD_TINY \
  "reward arithmetic dim=32 layers=2 heads=4 kv_heads=2 ffn_dim=48 batch_size=8 arith_max=9 lr=1e-2 eval_problems=20 steps=6 "

// A tiny reward model; its run folder, in static storage.
static const char *reward_base_(void) {
  static char run[4096];
  if (run[0]) return run;
  CHECK(program_("", REWARD_TINY "run_dir=%s", test_dir()) == 0, "%s", run_err);
  snprintf(run, sizeof run, "%s", last_run_());
  return run;
}

// What makes no difference to the trained bits; stopping and going on; and the loss of the log.
static void test_reward_same_bits(void) {
  static const char *const variants[] = {"threads=1", "threads=2", "threads=3", "recompute=1",
      "eval_every=2 save_every=1 sample_every=3"};
  char base[600], first[4096];
  snprintf(base, sizeof base, "%s", test_dir());
  for (size_t i = 0; i < ARRAY_LEN(variants); i++) {
    CHECK(program_("", REWARD_TINY "run_dir=%s %s", base, variants[i]) == 0, "%s", run_err);
    if (i == 0) snprintf(first, sizeof first, "%s", last_run_());
    CHECK(same_in_runs_(first, last_run_(), "model.safetensors"), "%s: other parameters than threads=1", variants[i]);
  }
  CHECK(program_("", REWARD_TINY "run_dir=%s stop_at=3", base) == 0 && program_("", "reward resume=%s", last_run_()) == 0, "%s",
        run_err);
  CHECK(same_in_runs_(first, last_run_(), "model.safetensors"), "resumed: other parameters");
  for (int step = 1; step <= 6; step++)
    CHECK(logged_(first, step, "loss") == logged_(last_run_(), step, "loss") &&
              logged_(first, step, "margin") == logged_(last_run_(), step, "margin"),
          "the logs differ at step %d", step);
  // Two micro-batches of four pairs are one of eight, up to rounding.
  CHECK(program_("", REWARD_TINY "run_dir=%s batch_size=4 grad_accum=2 precision=fp32", base) == 0, "%s", run_err);
  snprintf(first, sizeof first, "%s", last_run_());
  CHECK(program_("", REWARD_TINY "run_dir=%s precision=fp32", base) == 0, "%s", run_err);
  CHECK(fabs(logged_(first, 1, "loss") - logged_(last_run_(), 1, "loss")) < 1e-6 &&
            fabs(logged_(first, 1, "grad_norm") - logged_(last_run_(), 1, "grad_norm")) < 1e-5 * logged_(first, 1, "grad_norm"),
        "two micro-batches: loss %.9g, %.9g", logged_(first, 1, "loss"), logged_(last_run_(), 1, "loss"));
}

/*
A scorer gives the values that its model had in training, whatever stands beside a text. Texts that are too long lose the beginning of
the question.
*/
static void test_scorer(void) {
  char path[4200], config[4300];
  static Scorer s;
  Tokenizer tok;
  Ids x = {NULL, 0, 0};
  static const char *const queries[] = {"1+2=", "7-9=", "1+2=", "8+8="}, *const answers[] = {"3", "-2", "4", ""};
  double together[4], alone;
  scorer_open(&s, reward_base_(), PRECISION_BF16);
  CHECK(s.form == QA_PLAIN && s.m.c.value_head == 1 && s.m.frozen, "the template, the head");
  scorer_values(&s, queries, answers, 4, together);
  for (int i = 0; i < 4; i++) {
    scorer_values(&s, queries + i, answers + i, 1, &alone);
    CHECK(alone == together[i], "%s%s: %.17g alone, %.17g beside others", queries[i], answers[i], alone, together[i]);
  }
  CHECK(together[0] != together[2], "right and wrong have the same value");
  // The same model with its float weights, quantised at lambda = 1.
  Model m;
  ValueHead head;
  Batch b;
  checkpoint_path(path, sizeof path, reward_base_());
  model_load(&m, path, PRECISION_BF16);
  model_quantize(&m, 1);
  model_alloc_batch(&m, 1, 8, 0, 0);
  value_open(&head, &m, 1);
  batch_alloc(&b, 1, 8);
  float coef[8];
  checkpoint_tokenizer(&tok, path);
  scored_ids(&x, &tok, QA_PLAIN, "7-9=", "-2", 8);
  CHECK(x.n == 7 && x.ids[6] == tok.eos_id, "%zu ids", x.n);
  value_row(&head, &b, 0, x.ids, (int)x.n, tok.pad_id);
  batch_to_device(&m, &b, 0, coef);
  model_forward(&m);
  value_forward(&head, &m, 1, &alone);
  CHECK(alone == together[1], "in training %.17g, packed %.17g", alone, together[1]);
  // Too long.
  CHECK(scored_ids(&x, &tok, QA_PLAIN, "12345+2=", "77", 6) == 1 && x.n == 6, "%zu ids", x.n);
  StrBuf text = {NULL, 0, 0};
  tokenizer_decode(&tok, x.ids, 5, &text);
  CHECK(strcmp(text.data, "+2=77") == 0, "the question is cut: %s", text.data);
  CHECK(scored_ids(&x, &tok, QA_PLAIN, "1=", "98765", 4) == 1 && x.n == 4 && x.ids[3] == tok.eos_id, "the answer is cut");
  strbuf_free(&text);
  free(x.ids);
  batch_free(&b);
  value_free(&head);
  model_free(&m);
  tokenizer_free(&tok);
  scorer_free(&s);
  // The directory is one that says what it is; other formats refuse it.
  path_join(config, sizeof config, path, "config.json");
  CHECK(contains_(config, "\"value_head\": 1") && contains_(config, "BitnetCForSequenceScore"), "config.json");
  CHECK(program_("", "convert init=%s out=%s/m.gguf format=gguf", path, test_dir()) == EXIT_USAGE && strstr(run_err,
        "reward model"), "%s", run_err);
  CHECK(program_("", "reward init=%s data=%s qa_template=plain steps=1 batch_size=1 holdout=0 run_dir=%s", reward_base_(),
                 write_("p.jsonl", "{\"query\": \"1+1=\", \"positive\": 2, \"negative\": 3}\n"), test_dir()) == 0,
                     "from a reward model: %s", run_err);
}

// Sums that it has not seen: a network from random weights learns that the result is better than one that is off by 10 or more.
UNUSED static void test_reward_learns(void) {
  char base[600], path[700], tok[4200];
  StrBuf b = {NULL, 0, 0};
  snprintf(base, sizeof base, "%s", test_dir());
  checkpoint_path(tok, sizeof tok, grpo_base_());
  for (uint64_t i = 0; i < 3000; i++) {
    int x = (int)rng_below(1, RNG_TEST, 3 * i, 50), y = (int)rng_below(1, RNG_TEST, 3 * i + 1, 50), right = x + y;
    int off = 10 + (int)rng_below(1, RNG_TEST, 3 * i + 2, 40), wrong = right >= off ? right - off : right + off;
    strbuf_printf(&b, "{\"query\": \"%d+%d=\", \"positive\": %d, \"negative\": %d}\n", x, y, right, wrong);
  }
  snprintf(path, sizeof path, "%s", write_("sums.jsonl", b.data));
  CHECK(program_("", "reward data=%s tokenizer=%s qa_template=plain dim=64 layers=2 heads=4 ffn_dim=192 init_std=0.1 batch_size=64 steps=300 "
                     "lr=1e-2 run_dir=%s", path, tok, base) == 0, "%s", run_err);
  double accuracy = 0;
  const char *at = strstr(run_out, "pair_accuracy ");
  // Of 290 pairs; without anything learned half of them are in order, and 0.9 is fourteen deviations from that.
  CHECK(at && sscanf(at, "pair_accuracy %lf", &accuracy) == 1 && accuracy > 0.9, "held-out pairs in the right order: %.3f", accuracy);
  strbuf_free(&b);
}

// ---------------------------------------------------------------------------------------------------------
// In reinforcement learning.

static void test_grpo_reward_models(void) {
  char base[600], linear[4096], csv[700], first[4096], models[9000];
  const char *from = grpo_base_(), *net = reward_base_();
  snprintf(base, sizeof base, "%s", test_dir());
  path_join(csv, sizeof csv, base, "log.csv");
  CHECK(program_("", "reward linear run_dir=%s data=%s holdout=0", base,
                 write_("w.jsonl", "{\"query\": \"1+1=\", \"positive\": \"2\", \"negative\": \"3\"}\n")) == 0, "%s", run_err);
  snprintf(linear, sizeof linear, "%s", last_run_());
  snprintf(models, sizeof models, "%s:3,%s:1", net, linear);
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s steps=4 reward_models=%s rule_weight=0.2 csv_log=%s", from, base, models,
        csv) == 0, "%s", run_err);
  snprintf(first, sizeof first, "%s", last_run_());
  for (int step = 1; step <= 4; step++) {
    double rule = logged_(first, step, "rule_reward"), m1 = logged_(first, step, "model_1"), m2 = logged_(first, step, "model_2");
    CHECK(m1 > 0 && m1 < 1 && m2 > 0 && m2 < 1, "step %d: scores %g, %g", step, m1, m2);
    CHECK(fabs(logged_(first, step, "reward") - (0.2 * rule + 0.8 * (0.75 * m1 + 0.25 * m2))) < 1e-12, "step %d: the sum", step);
  }
  CHECK(contains_(csv, "step,loss,mean_reward,kl,rule_reward,model_1,model_2\n"), "the CSV header");
  // Stopped and resumed, and with other threads: the same bits.
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s steps=4 reward_models=%s rule_weight=0.2 stop_at=2 threads=2", from, base,
        models) == 0 &&
            program_("", "grpo resume=%s threads=1", last_run_()) == 0, "%s", run_err);
  CHECK(same_in_runs_(first, last_run_(), "model.safetensors"), "resumed: other parameters");
  // The weights in a list of their own; models alone; the second layer.
  snprintf(models, sizeof models, "%s,%s", net, linear);
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s steps=4 reward_model=%s reward_weights=3,1 rule_weight=0.2", from, base,
        models) == 0 &&
            same_in_runs_(first, last_run_(), "model.safetensors"), "weights as a list: %s", run_err);
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s steps=2 reward_model=%s two_layer=1 reward_raw=1", from, base, models) == 0,
        "%s", run_err);
  CHECK(fabs(logged_(last_run_(), 2, "reward") - (logged_(last_run_(), 2, "model_1") + logged_(last_run_(), 2,
        "model_2")) / 2) < 1e-12, "equal weights");
  static const struct { const char *models, *options, *said; } bad[] = {
    {"%s", "reward_weights=1,2", "reward_weights"}, {"%s:1", "reward_weights=1", "once"}, {"%s:-1", "", "weight"},
    {"%s:0", "", "weights are 0"}, {"%s/nothing", "", "nothing"}, {",", "", "reward_model"}};
  for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
    size_t n = strcspn(bad[i].models, "%");
    int named = bad[i].models[n] != 0;
    snprintf(models, sizeof models, "%s%s", named ? net : bad[i].models, named ? bad[i].models + 2 : "");
    int code = program_("", GRPO_TINY "init=%s run_dir=%s/none reward_model=%s %s", from, base, models, bad[i].options);
    CHECK(code == EXIT_USAGE && strstr(run_err, bad[i].said), "%s: exit %d, %s", bad[i].said, code, run_err);
  }
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s/none reward_model=%s", from, base, from) == EXIT_USAGE && strstr(run_err,
        "value head"), "%s", run_err);
  CHECK(program_("", GRPO_TINY "init=%s run_dir=%s/none rule_weight=0.5", from, base) == EXIT_USAGE && strstr(run_err,
        "reward_model"), "%s", run_err);
  CHECK(program_("", "reward run_dir=%s/none", base) == EXIT_USAGE && strstr(run_err, "data="), "%s", run_err);
  CHECK(program_("", "reward linear data=arithmetic run_dir=%s/none", base) == EXIT_USAGE && strstr(run_err, "words"), "%s", run_err);
  CHECK(program_("", "reward run_dir=%s/none data=%s", base, write_("w.jsonl", "{\"query\": 1}\n")) == EXIT_USAGE && strstr(run_err,
        "w.jsonl:1"), "%s",
        run_err);
  path_join(csv, sizeof csv, base, "none");
  CHECK(!is_dir(csv), "a run folder was made");
}

// Minutes of training on an emulated GPU say nothing about its ops; the other tests compare those.
#ifdef CUDA_EMU_H
#define REWARD_LEARNS_
#else
#define REWARD_LEARNS_ {"reward_learns", "right from wrong results of sums that were not seen", test_reward_learns},
#endif

#define REWARD_TESTS                                                                                            \
  {"preferences", "pairs, labels, right answers alone; bad files", test_preferences},                          \
  {"linear_scorer", "gradient, learning, as JSON and back", test_linear_scorer},                               \
  {"value_padding", "a value depends on its text alone; no slope, no gradient", test_value_padding},           \
  {"reward_same_bits", "threads, recompute, resumes: the same parameters", test_reward_same_bits},             \
  {"reward_scorer", "a scorer has the values of its model in training; cut texts", test_scorer},               \
  REWARD_LEARNS_                                                                                               \
  {"grpo_reward_models", "weights, logs, bits, bad input", test_grpo_reward_models}

#endif
