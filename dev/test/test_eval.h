/*
test_eval.h: tests of answers and their scores, of question files, and of the evaluation modes that use them.

What it is:  pairs of texts with the score that they must get, worked out by hand or by NLTK's stemmer; log-probabilities with the
             cache against ones without; runs of the program on a tiny model.
What not:    the comparison with other evaluators: dev/test/test_eval.py.
Read before: test_model.h and test_run.h, whose helpers it uses; bitnet/rewards.h, bitnet/qa.h, modes/eval_tasks.h.
Defines:     EVAL_TESTS, the rows for the table of tests.
*/
#ifndef TEST_EVAL_H
#define TEST_EVAL_H

#include "../../bitnet/qa.h"
#include "../../bitnet/rewards.h"
#include "../../modes/eval_qa.h"
#include "../../modes/eval_tasks.h"
#include "check.h"
#include "test_model.h"
#include "test_run.h"

// ---------------------------------------------------------------------------------------------------------
// Stems and token F1.

// Word and stem; what is in the second column was printed by NLTK's PorterStemmer.
static const char *const stem_pairs_[][2] = {
    {"dies", "die"},         {"flies", "fli"},         {"sky", "sky"},           {"skies", "sky"},       {"running", "run"},
    {"relational", "relat"}, {"happiness", "happi"},   {"caresses", "caress"},   {"ponies", "poni"},     {"ties", "tie"},
    {"cats", "cat"},         {"feed", "feed"},         {"agreed", "agre"},       {"bled", "bled"},       {"sing", "sing"},
    {"conflated", "conflat"}, {"troubled", "troubl"},  {"sized", "size"},        {"hopping", "hop"},     {"falling", "fall"},
    {"hissing", "hiss"},     {"fizzed", "fizz"},       {"filing", "file"},       {"toy", "toy"},         {"enjoy", "enjoy"},
    {"happy", "happi"},      {"say", "say"},           {"by", "by"},             {"tied", "tie"},        {"tried", "tri"},
    {"conformably", "conform"}, {"radically", "radic"}, {"vilely", "vile"},      {"analogously", "analog"}, {"operator", "oper"},
    {"vietnamization", "vietnam"}, {"formality", "formal"}, {"sensibility", "sensibl"}, {"hopefully", "hope"}, {"geology", "geolog"},
    {"electrical", "electr"}, {"goodness", "good"},    {"replacement", "replac"}, {"adoption", "adopt"}, {"adjustment", "adjust"},
    {"communism", "commun"}, {"bowdlerize", "bowdler"}, {"probate", "probat"},   {"rate", "rate"},       {"cease", "ceas"},
    {"controlling", "control"}, {"roll", "roll"},      {"dying", "die"},         {"innings", "inning"},  {"news", "news"},
    {"is", "is"},            {"as", "as"},             {"ing", "ing"},           {"1960s", "1960"},      {"yyy", "yyy"},
    {"generalizations", "gener"}, {"oscillators", "oscil"}, {"nationally", "nation"}, {"apologies", "apolog"}, {"aed", "a"}};

static void test_stem(void) {
  for (size_t i = 0; i < ARRAY_LEN(stem_pairs_); i++) {
    char word[64];
    snprintf(word, sizeof word, "%s", stem_pairs_[i][0]);
    word[stem_word(word, strlen(word))] = 0;
    CHECK(strcmp(word, stem_pairs_[i][1]) == 0, "%s became %s instead of %s", stem_pairs_[i][0], word, stem_pairs_[i][1]);
  }
  // Never longer than the word, whatever it is made of.
  for (uint64_t i = 0; i < 20000; i++) {
    char word[16];
    size_t n = 1 + (size_t)rng_below(1, RNG_TEST, 16 * i, 12);
    for (size_t k = 0; k < n; k++) word[k] = "aeiouybcdlstzinge"[rng_below(1, RNG_TEST, 16 * i + k + 1, 17)];
    CHECK(stem_word(word, n) <= n, "a word grew");
  }
}

static void test_reward_f1(void) {
  static const struct { const char *a, *g; double f1; } cases[] = {
      {"Paris", "paris.", 1},
      {"the cat is running", "The cat run", 2.0 * 3 / (4 + 3)},   // the, cat, run of the, cat, is, run and the, cat, run
      {"cat cat cat", "cat", 1},                                  // sets
      {"dog", "cat", 0},
      {"", "", 1},
      {"!?", "...", 1},
      {"", "cat", 0},
      {"cat", "", 0},
      {"B-52s, 12%", "12 b 52", 1},                               // "52s" has the stem "52"
      {"a b c d", "d e", 2.0 * 1 / (4 + 2)},
      {"\xC4\x8D", "", 1}};                                       // a letter beyond ASCII vanishes
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    double want = cases[i].f1, got = reward_f1(cases[i].a, cases[i].g), turned = reward_f1(cases[i].g, cases[i].a);
    CHECK(fabs(got - want) < 1e-15 && got == turned, "f1(%s, %s) = %.17g and %.17g, wanted %.17g", cases[i].a, cases[i].g,
          got, turned, want);
  }
  CHECK(reward_f1("\xC4\x8D\xC3\xA1p", "p") == 1, "ASCII: only p is left");
  CHECK(reward_f1_unicode("\xC4\x8D\xC3\xA1p", "p") == 0 && reward_f1_unicode("\xC4\x8D\xC3\xA1p!", "\xC4\x8D\xC3\xA1p") == 1,
        "unicode");
  CHECK(reward_exact(" 46\n", "46") == 1 && reward_exact("46", "4 6") == 0 && reward_exact("", "x") == 0 && reward_exact(" ", "") == 1,
        "exact");
}

// ---------------------------------------------------------------------------------------------------------
// Final answers.

static void test_answer_final(void) {
  static const struct { const char *text, *want; int stated; } cases[] = {
      {"so \\boxed{42}.", "42", 1},
      {"\\boxed{1} no, \\boxed{\\frac{1}{2}} yes", "\\frac{1}{2}", 1},   // balanced braces, the last one
      {"\\boxed{7} and \\boxed{8", "7", 1},                                // the second never closes
      {"\\boxed{5} #### 6", "5", 1},
      {"3 + 4 = 7\n#### 7\n", "7", 1},
      {"#### 1\n#### 1,080.", "1,080", 1},
      {"####\n18", "18", 1},
      {"answer: 6 #### ", "6 ####", 1},
      {"The answer = blue. \nMore", "blue", 1},
      {"Answer: 5\nAnswer : 9 . ", "9", 1},
      {"The answer is 15.", "15", 0},
      {"from 10-3 to -7 degrees", "-7", 0},
      {"10-3", "3", 0},
      {"no number ... ", "no number", 0},
      {"", "", 0}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int stated;
    Span s = answer_final(cases[i].text, &stated);
    CHECK(s.n == strlen(cases[i].want) && memcmp(s.s, cases[i].want, s.n) == 0 && stated == cases[i].stated, "'%s' gives '%.*s' (%d)",
          cases[i].text, (int)s.n, s.s, stated);
  }
}

static void test_answer_number(void) {
  static const struct { const char *text; double want; } cases[] = {   // NAN: no number
      {"#### 18", 18},           {"#### $1,234.50", 1234.5}, {"#### -7", -7},        {"#### \xE2\x88\x92" "7", -7}, {"#### 50%", 50},
      {"#### -$5", -5},          {"#### 3 apples", 3},       {"#### 3 or 4", NAN},   {"#### 5 5 5 5", NAN},     {"#### 2 + 3 = 5", 5},
      {"#### x", NAN},           {"####", NAN},              {"", NAN},              {"nothing", NAN},          {"it is 12.", 12},
      {"1, 2 and 3", 3},         {"1,2,3", 3},               {"12,345,678 left", 12345678}, {"1,2345", 2345},  {"007", 7},
      {"costs .5", 0.5},         {"pages 3-5", 5},           {"answer: 3/4", 0.75},  {"\\boxed{\\frac{3}{4}}", 0.75},
      {"\\boxed{-\\dfrac{1}{2}}", -0.5}, {"on 1/2/2024", 2024}, {"3/0", 0},          {"\\boxed{\\frac{3}{x}}", NAN}, {"-0", 0},
      {"2. 5", 5},               {"5.", 5},                  {"v1.5", 1.5},
      {"1234567890123456789012345678901234567890123456789012345678901234567890", NAN}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    double v = 1e99;
    int found = answer_number(cases[i].text, &v);
    CHECK(isnan(cases[i].want) ? !found : found && v == cases[i].want, "'%s' gives %d, %g; wanted %g", cases[i].text, found,
          v, cases[i].want);
  }
  CHECK(reward_numeric("so 1.0", "#### 1") == 1 && reward_numeric("007", "7") == 1 && reward_numeric("-0", "0") == 1, "equal numbers");
  CHECK(reward_numeric("#### 1/3", "#### 2/3") == 0 && reward_numeric("", "") == 0 && reward_numeric("x", "x") == 0,
        "unequal, or none");
  CHECK(reward_numeric("The answer is 1,080 dollars.", "... <<27*40=1080>>1080\n#### 1080") == 1, "GSM8K");
  CHECK(reward_accuracy("answer: 50%", "#### 50") == 1 && reward_accuracy("\\boxed{x+1}", "answer: x+1.") == 1, "accuracy");
  CHECK(reward_accuracy("", "5") == 0 && reward_accuracy("", "") == 1 && reward_accuracy("a 5", "b 5") == 1, "accuracy of nothing");
  CHECK(reward_accuracy("answer: blue", "answer: red") == 0 && reward_accuracy("answer: 3 or 4", "4") == 0,
        "accuracy of other answers");
}

static void test_reward_arithmetic(void) {
  static const struct { const char *prompt, *answer; double want; } cases[] = {
      {"12+34=", "46", 1},      {"12+34=", " 46\n", 1},   {"12+34=", "046", 0},    {"12+34=", "47", 0},   {"12+34=", "", 0},
      {"5-77=", "-72", 1},      {"2+3*4=", "14", 1},      {"(2+3)*4 = ?", "20", 1}, {"-(-3)=", "3", 1},    {"8/2/2=", "2", 1},
      {"7/2=", "3", 0},         {"7/0=", "0", 0},         {"1-2-3=", "-4", 1},     {"what?", "46", 0},    {"12+34", "46", 0},
      {"12+=", "12", 0},        {"12+34=5", "46", 0},     {"(1=", "1", 0},         {"=", "0", 0},         {"", "", 0},
      {"9223372036854775807+1=", "-9223372036854775808", 0}, {"9223372036854775807=", "9223372036854775807", 1},
      {"(-9223372036854775807-1)/-1=", "9223372036854775807", 0}, {"-(-9223372036854775807-1)=", "9223372036854775807", 0},
      {"(-9223372036854775807-1)*-1=", "0", 0}, {"6/-1=", "-6", 1}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    double got = reward_arithmetic(cases[i].prompt, cases[i].answer);
    CHECK(got == cases[i].want, "'%s' '%s' gives %g", cases[i].prompt, cases[i].answer, got);
  }
  char deep[4000];
  memset(deep, '(', sizeof deep - 1);
  deep[sizeof deep - 1] = 0;
  long long v;
  CHECK(!arithmetic_result(deep, &v), "brackets without end");
}

// ---------------------------------------------------------------------------------------------------------
// Reasoning.

static void test_reward_reasoning(void) {
  static const struct { const char *text, *want, *answer; } cases[] = {
      {"<think> a b\nc </think>d", "a b\nc", "d"},
      {"a b</think> d", "a b", " d"},                       // the prompt has opened it
      {"x <think>a b", "a b", "x <think>a b"},              // cut off
      {"so it is 5 or 6", "so it is", "so it is 5 or 6"},   // no tags: up to the first digit
      {"<think>a</think>b<think>c</think>d", "a", "d"},
      {"", "", ""}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    Span r = reasoning_text(cases[i].text);
    CHECK(r.n == strlen(cases[i].want) && memcmp(r.s, cases[i].want, r.n) == 0, "'%s': reasoning '%.*s'", cases[i].text,
          (int)r.n, r.s);
    CHECK(strcmp(answer_text(cases[i].text), cases[i].answer) == 0, "'%s': answer '%s'", cases[i].text, answer_text(cases[i].text));
  }
  CHECK(reward_reasoning_f1("<think>count two numbers</think>5", "Counting the two") == 2.0 * 2 / 6, "reasoning F1");
  static const struct { const char *text, *ref; double want; } steps[] = {
      {"<think>Add 2. Then take 3; done</think>", "add 2.\nThen take 3.\nDone.", 1},
      {"<think>Add 2. Done</think>", "Add 2. Then take 3. Done", 1.0 / 3},   // aligned from the start
      {"<think>Then. Add</think>", "Add. Then.", 0},
      {"<think>it is 3.5 m. ok</think>", "It is 3.5 m.; Ok", 1},             // a decimal point ends no step
      {"<think>it is 3. 5 m. ok</think>", "It is 3.5 m.; Ok", 0},
      {"<think></think>", "", 1},
      {"<think>. ; \n</think>", " . ", 1},
      {"<think>something</think>", "", 0},
      {"", "Add.", 0}};
  for (size_t i = 0; i < ARRAY_LEN(steps); i++) {
    double got = step_correctness(steps[i].text, steps[i].ref);
    CHECK(got == steps[i].want, "'%s' against '%s': %g", steps[i].text, steps[i].ref, got);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Question files.

static const char *eval_file_(const char *name, const char *text) {
  static char path[700];
  snprintf(path, sizeof path, "%s/%s", test_files_dir(), name);
  FILE *f = fopen(path, "wb");
  if (f == NULL || fwrite(text, 1, strlen(text), f) != strlen(text) || fclose(f) != 0) die(EXIT_FAILED, "cannot write %s", path);
  return path;
}

static void test_qa_load(void) {
  static const char lines[] = "\xEF\xBB\xBF{\"query\": \"2+2?\", \"answer\": 4}\r\n\n  \n"
                              "{\"query\": \"q\", \"answer\": \"a\", \"reasoning\": \"r\", \"more\": [1]}";
  static const char list[] = "[{\"query\": \"2+2?\", \"answer\": 4.5},\n\n"
                             "{\"query\": \"q\",\n\"answer\": \"a\", \"reasoning\": null}, "
                             "{\"query\": 1, \"answer\": \"\"}]\n";
  QaSet s = qa_load(eval_file_("a.jsonl", lines));
  CHECK(s.n == 2 && strcmp(s.items[0].query, "2+2?") == 0 && strcmp(s.items[0].answer, "4") == 0 && s.items[0].reasoning == NULL &&
            s.items[0].line == 1, "first record");
  CHECK(strcmp(s.items[1].answer, "a") == 0 && strcmp(s.items[1].reasoning, "r") == 0 && s.items[1].line == 4, "second record");
  qa_free(&s);
  s = qa_load(eval_file_("a.json", list));
  CHECK(s.n == 3 && strcmp(s.items[0].answer, "4.5") == 0 && s.items[1].reasoning == NULL && strcmp(s.items[2].query, "1") == 0,
        "list");
  CHECK(s.items[0].line == 1 && s.items[1].line == 3 && s.items[2].line == 4, "lines %zu %zu %zu", s.items[0].line, s.items[1].line,
        s.items[2].line);
  qa_free(&s);
}

static void load_qa_(void *path) {
  QaSet s = qa_load((const char *)path);
  qa_free(&s);
}

static void test_qa_refuses(void) {
  static const struct { const char *name, *text, *words[3]; } cases[] = {
      {"b.txt", "x", {"b.txt", "unsupported format", ".jsonl"}},
      {"c.jsonl", "{\"query\": \"q\", \"answer\": \"a\"}\n\n{\"query\": \"q\"}\n", {"c.jsonl:3", "answer", "query"}},
      {"d.jsonl", "{\"query\": \"q\", \"answer\": \"a\"}\n{\"query\" \"q\"}\n", {"d.jsonl:2", "offset 9", "':'"}},
      {"e.jsonl", "[1]\n", {"e.jsonl:1", "object", "braces"}},
      {"f.jsonl", "{\"query\": \"q\", \"answer\": [1]}\n", {"f.jsonl:1", "answer", "number"}},
      {"g.jsonl", "{\"query\": \"a\\u0000b\", \"answer\": 1}\n", {"g.jsonl:1", "query", "zero"}},
      {"h.jsonl", "\n \n", {"h.jsonl", "found none", "query"}},
      {"i.json", "[{\"query\": \"q\",\n \"answer\": }]", {"i.json:2", "a value", "'}'"}},
      {"j.json", "{\"query\": \"q\", \"answer\": 1}", {"j.json", "list", ".jsonl"}},
      {"k.json", "[{\"query\": \"q\", \"answer\": 1},\n\n 7]", {"k.json:3", "object", "braces"}},
      {"l.json", "[]", {"l.json", "found none", "answer"}},
      {"m.json", "", {"m.json:1", "a value", "end"}}};
  char err[600];
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int code = run_child(load_qa_, (void *)eval_file_(cases[i].name, cases[i].text), err, sizeof err);
    CHECK(code == EXIT_USAGE, "%s: exit code %d: %s", cases[i].name, code, err);
    for (int k = 0; k < 3; k++) CHECK(strstr(err, cases[i].words[k]), "%s: no '%s' in: %s", cases[i].name, cases[i].words[k], err);
  }
  char missing[] = "/nowhere/x.jsonl";
  CHECK(run_child(load_qa_, missing, err, sizeof err) == EXIT_USAGE && strstr(err, "/nowhere/x.jsonl"), "missing: %s", err);
}

// ---------------------------------------------------------------------------------------------------------
// Log-probabilities.

// The same by the plainest way: a session of one sequence for this item alone, all its rows at once.
static double plain_logp_(Model *m, const Continuation *c, int *greedy) {
  Session s;
  int seq[256] = {0}, pos[256], V = m->c.vocab;
  double logp = 0;
  session_open(&s, m, 1, c->n - 1, c->n - 1, 0);
  for (int i = 0; i < c->n - 1; i++) pos[i] = i;
  session_rows(&s, c->ids, seq, pos, c->n - 1);
  *greedy = 1;
  for (int i = c->n_context - 1; i < c->n - 1; i++) {
    const float *z = session_logits(&s, i, 1);
    double sum = 0;
    int target = c->ids[i + 1], rank = 0;
    for (int v = 0; v < V; v++) sum += exp((double)z[v] - (double)z[target]);
    for (int v = 0; v < V; v++) rank += z[v] > z[target] || (z[v] == z[target] && v < target);
    *greedy &= rank == 0;
    logp -= log(sum);
  }
  session_free(&s);
  return logp;
}

// Many items with common beginnings, more than there are sequences and rows: nothing of an item's result depends on the others.
static void test_likelihoods(void) {
  for (int style = 0; style < N_STYLES; style++) {
    Config c = small_config_(style);
    Model m;
    Continuations list;
    memset(&list, 0, sizeof list);
    open_model_(&m, &c, PRECISION_FP32, 1, 0, 0, 0);
    model_quantize(&m, c.act_bits ? 1.0f : 0.0f);
    int before[256];
    for (int i = 0; i < (EMULATED ? 50 : 150); i++) {
      int n = i % 20 == 7 ? 2 : 3 + test_below_(i % 10 == 3 ? 150 : 40), keep = i % 4 ? test_below_(n) : 0;
      int *ids = (int *)xmalloc((size_t)n * sizeof(int));
      for (int k = 0; k < n; k++) before[k] = ids[k] = i > 0 && k < keep ? before[k] : test_below_(c.vocab);
      continuation_push_(&list, ids, n, 1 + test_below_(n - 1));
      if (i % 5 == 0) {   // the whole text again, and another cut between context and continuation
        int *same = (int *)xmalloc((size_t)n * sizeof(int));
        memcpy(same, ids, (size_t)n * sizeof(int));
        continuation_push_(&list, same, n, 1 + test_below_(n - 1));
      }
    }
    // Some continuations are what the model would say.
    for (size_t i = 0; i < list.n; i += 3) {
      Continuation *x = &list.items[i];
      for (int v = 0, yes = 0; v < c.vocab && !yes && x->n_context == x->n - 1; v++) {
        x->ids[x->n - 1] = v;
        plain_logp_(&m, x, &yes);
      }
    }
    likelihoods(&m, &list);
    int said = 0, wrong = 0;
    double worst = 0;
    for (size_t i = 0; i < list.n; i++) {
      const Continuation *x = &list.items[i];
      int greedy;
      double want = plain_logp_(&m, x, &greedy), d = fabs(x->logp - want) / fmax(1, fabs(want));
      worst = d > worst || isnan(d) ? d : worst;
      wrong += greedy != x->greedy;
      said += greedy;
    }
    CHECK(worst <= 1e-12, "style %d: relative error %.3g", style, worst);
    CHECK(wrong == 0 && said >= 3 && said < (int)list.n, "style %d: %d of %zu greedy, %d wrong", style, said, list.n, wrong);
    continuations_free(&list);
    model_free(&m);
    end_test_();
  }
}

// Which tokens are context and which are scored.
static void test_continuations(void) {
  Tokenizer t;
  Continuations list;
  tokenizer_arithmetic(&t);
  memset(&list, 0, sizeof list);
  int one[2], two[2];
  CHECK(tokenizer_encode(&t, "1", 1, one, 2) == 1 && tokenizer_encode(&t, "2", 1, two, 2) == 1, "digits are tokens");
  CHECK(continuation_add(&list, &t, "1+1=", "22", 8) == 1 && list.items[0].n == 6 && list.items[0].n_context == 4, "plain");
  CHECK(list.items[0].ids[0] == one[0] && list.items[0].ids[5] == two[0], "ids");
  CHECK(continuation_add(&list, &t, "1+1=", "22", 5) == 1 && list.items[1].n == 6 && list.cut == 0,
        "fits exactly: the last id is no input");
  CHECK(continuation_add(&list, &t, "1+1=", "22", 3) == 1 && list.items[2].n == 4 && list.items[2].n_context == 2 && list.cut == 1,
        "cut");
  CHECK(continuation_add(&list, &t, "1+1=", "22", 2) == 1 && list.items[3].n == 3 && list.items[3].n_context == 1,
        "one id of context");
  CHECK(continuation_add(&list, &t, "1+1=", "22", 1) == 0 && list.n == 4, "too long an answer");
  CHECK(continuation_add(&list, &t, "", "22", 8) == 1 && list.items[4].n == 3 && list.items[4].n_context == 1, "no context");
  CHECK(list.items[4].ids[0] == first_token_(&t) && list.items[4].ids[1] == two[0], "no context: the first token");
  CHECK(continuation_add(&list, &t, "", "", 8) == 0, "nothing at all");
  CHECK(continuation_add(&list, &t, "1 ", "2", 8) == 1 && list.items[5].n_context == 1 && list.items[5].n == 3,
        "the blank is the answer's");
  continuations_free(&list);

  // Windows: every token once, each behind the one before it.
  static const int lengths[] = {1, 4, 5, 6, 10, 11, 23};
  for (size_t k = 0; k < ARRAY_LEN(lengths); k++) {
    enum { MAX = 5 };
    char text[64] = "";
    int ids[64], n = lengths[k], next = 0;
    for (int i = 0; i < n; i++) text[i] = (char)('0' + i * 7 % 10);
    tokenizer_encode(&t, text, (size_t)n, ids, 64);
    continuation_add_windows(&list, &t, text, (size_t)n, MAX);
    for (size_t i = 0; i < list.n; i++) {
      const Continuation *c = &list.items[i];
      CHECK(c->n <= MAX + 1 && c->n_context >= 1 && c->n_context < c->n, "window %zu of %d tokens: %d, %d", i, n, c->n, c->n_context);
      CHECK(i == 0 || c->n == MAX + 1, "window %zu of %d tokens is filled up", i, n);
      for (int j = 0; j < c->n; j++) {
        int at = next - c->n_context + j;
        CHECK(c->ids[j] == (at < 0 ? first_token_(&t) : ids[at]), "window %zu of %d tokens: id %d", i, n, j);
      }
      next += c->n - c->n_context;
    }
    CHECK(next == n, "%d of %d tokens are predicted", next, n);
    continuations_free(&list);
  }
  tokenizer_free(&t);
}

// The expected texts were printed by the harness's own functions.
static void test_task_texts(void) {
  static const char page[] =
      " = A = \n \n = = B C = = \n the boys ' 3 @.@ 5 , 1 @,@ 000 - ( x y ) [ \xC2\xA0z ] \" q r \" ; N ' s t ' "
      "5 \xC2\xB0 C @-@ d ? ! the cat 's ( open";
  static const char want[] =
      " = A =\n\n== B C ==\nthe boys'3.5, 1,000 - (x y) [z] \"q r\"; N' s t '5\xC2\xB0"
      "C-d ?! the cat's ( open";
  static const char *const pairs[][2] = {{"  a [title] b [step]  c   d [x ", "a. b  c  d [x"},
                                         {"[header] go [sub\nstep] on", " go [sub\nstep] on"},
                                         {"[a\nb [c] d", "[a\nb d"},
                                         {"", ""}};
  char *got = wikitext_text_(page);
  CHECK(strcmp(got, want) == 0, "wikitext: %s", got);
  free(got);
  for (size_t i = 0; i < ARRAY_LEN(pairs); i++) {
    got = hellaswag_text_(pairs[i][0]);
    CHECK(strcmp(got, pairs[i][1]) == 0, "hellaswag: '%s'", got);
    free(got);
  }
  CHECK(count_characters_("\xC3\xA9t\xC3\xA9") == 3, "characters");
}

// ---------------------------------------------------------------------------------------------------------
// The program on a tiny model.

// A run folder made once for the tests below.
static const char *eval_run_(void) {
  static char run[4096];
  if (run[0] == 0) {
    CHECK(program_("", TINY "run_dir=%s steps=30", test_dir()) == 0, "%s", run_err);
    snprintf(run, sizeof run, "%s", last_run_());
  }
  return run;
}

// The JSON file that the program wrote, in static storage until the next call.
static const Json *eval_json_(const char *path) {
  static JsonDoc doc;
  char err[256] = "cannot be read";
  size_t len;
  json_free(&doc);
  char *text = read_file(path, &len);
  int ok = text && json_parse(&doc, text, len, err, sizeof err);
  CHECK(ok, "%s: %s", path, err);
  free(text);
  return doc.root;
}

static void test_task_run(void) {
  static const char arc[] =
      "{\"query\": \"1+2\", \"choices\": [\"3\", \"44\"], \"gold\": 0}\n\n"
      "{\"query\": \"2+5\", \"choices\": [\"1\", \"7\", \"2\"], \"gold\": 1}\n"
      "{\"question\": \"2+6\", \"choices\": {\"text\": [\"8\", \"9\"], \"label\": [\"A\", \"B\"]}, \"answerKey\": \"B\"}\n";
  char path[700], out[710];
  snprintf(path, sizeof path, "%s", eval_file_("arc.jsonl", arc));
  snprintf(out, sizeof out, "%s.out", path);
  CHECK(program_("", "eval %s task=arc file=%s results=%s", eval_run_(), path, out) == 0, "%s", run_err);
  CHECK(strstr(run_out, "arc ") && strstr(run_out, "acc_norm"), "table: %s", run_out);
  const Json *root = eval_json_(out), *items = json_get(root, "items"), *results = json_get(root, "results");
  CHECK(items && items->count == 3 && results && results->count == 2, "items and results");
  double right = 0, acc = -1, error = -1;
  static const int lines[] = {1, 3, 4}, golds[] = {0, 1, 1};
  int i = 0;
  for (const Json *v = items ? items->child : NULL; v; v = v->next, i++) {
    const Json *logp = json_get(v, "logp");
    int best = 0, k = 0;
    double top = -INFINITY;
    for (const Json *x = logp->child; x; x = x->next, k++) {
      CHECK(x->d < 0, "log-probability %g", x->d);
      if (x->d > top) {
        top = x->d;
        best = k;
      }
    }
    CHECK(json_get_int(v, "line", 0) == lines[i] && json_get_int(v, "gold", -1) == golds[i] && json_get_int(v, "pred", -1) == best,
          "item %d", i);
    right += best == golds[i];
  }
  if (results && results->child) {
    acc = json_get_number(results->child, "value", -1);
    error = json_get_number(results->child, "stderr", -1);
  }
  CHECK(fabs(acc - right / 3) < 1e-12 && fabs(error - sqrt(acc * (1 - acc) / 2)) < 1e-12, "acc %g, standard error %g", acc, error);

  // limit; a text in windows; the same numbers whatever the number of threads.
  CHECK(program_("", "eval %s task=arc file=%s limit=2 threads=1", eval_run_(), path) == 0 && strstr(run_out, "     2\n"), "limit: %s",
        run_out);
  snprintf(path, sizeof path, "%s", eval_file_("w.jsonl", "{\"page\": \"1+2=3 4+5=9 1+1=2 7-6=1\"}\n{\"text\": \"9-9=0\"}\n"));
  static char first[sizeof run_out];
  CHECK(program_("", "eval %s task=wikitext file=%s threads=1", eval_run_(), path) == 0 && strstr(run_out, "bits_per_byte"), "%s",
        run_err);
  snprintf(first, sizeof first, "%s", run_out);
  CHECK(program_("", "eval %s task=wikitext file=%s threads=3", eval_run_(), path) == 0 && strcmp(first, run_out) == 0, "threads: %s",
        run_out);
  end_test_();
}

static void test_task_refuses(void) {
  static const struct { const char *task, *more, *text, *words[2];
  } cases[] = {
      {"arc",
       "",
       "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 0}\n{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 2}\n",
       {"r.jsonl:2: gold", "0 to 1"}},
      {"arc", "", "{\"query\": \"q\", \"choices\": [\"a\"], \"gold\": 0}\n", {"r.jsonl:1: choices", "query, choices, gold"}},
      {"arc", "", "{\"query\": \"q\", \"choices\": [\"a\", 1], \"gold\": 0}\n", {"r.jsonl:1: choices", "texts"}},
      {"arc",
       "",
       "{\"question\": \"q\", \"choices\": {\"text\": [\"a\", \"b\"], \"label\": [\"A\", \"B\"]}, \"answerKey\": \"C\"}\n",
       {"r.jsonl:1: answerKey", "labels"}},
      {"arc",
       "",
       "{\"query\": \"1234567890\", \"choices\": [\"1234567890\", \"1\"], \"gold\": 0}\n",
       {"r.jsonl:1: answer 1", "context"}},
      {"hellaswag",
       "",
       "{\"activity_label\": \"x\", \"ctx_a\": \"a\", \"endings\": []}\n",
       {"r.jsonl:1: ctx_b", "activity_label, ctx_a"}},
      {"mmlu", "", "{\"subject\": \"s\", \"question\": 1}\n", {"r.jsonl:1: question", "a text"}},
      {"mmlu", "shots=2", "", {"shots_file", "shots=2"}},
      {"winogrande",
       "",
       "{\"context_options\": [\"a\"], \"continuation\": \"c\", \"gold\": 0}\n",
       {"r.jsonl:1: context_options", "2 texts"}},
      {"winogrande", "", "{\"sentence\": \"no gap\", \"answer\": \"1\"}\n", {"r.jsonl:1: sentence", "gap"}},
      {"truthfulqa", "", "{\"question\": \"q\", \"mc1_targets\": {\"a\": 0, \"b\": 0}}\n", {"r.jsonl:1: mc1_targets", "right"}},
      {"truthfulqa", "shots=3", "", {"task=truthfulqa", "no examples"}},
      {"lambada", "", "{\"text\": \"word\"}\n", {"r.jsonl:1: text", "several words"}},
      {"wikitext", "", "{\"pages\": \"x\"}\n", {"r.jsonl:1: text", "pages"}},
      {"wikitext", "", "\n\n", {"r.jsonl", "found none"}},
      {"arc", "", "[\n", {"r.jsonl:1", "offset"}},
      {"hellasweg", "", "", {"task: expected one of", "hellaswag"}}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int code =
        program_("", "eval %s task=%s file=%s %s", eval_run_(), cases[i].task, eval_file_("r.jsonl", cases[i].text), cases[i].more);
    CHECK(code == EXIT_USAGE, "case %zu: exit code %d: %s", i, code, run_err);
    for (int k = 0; k < 2; k++) CHECK(strstr(run_err, cases[i].words[k]), "case %zu: no '%s' in: %s", i, cases[i].words[k], run_err);
  }
  CHECK(program_("", "eval %s task=arc", eval_run_()) == EXIT_USAGE && strstr(run_err, "file="), "no file: %s", run_err);
}

// ---------------------------------------------------------------------------------------------------------
// Answers to questions.

static void test_qa_statistics(void) {
  static const struct { double share; size_t n; double lo, hi;
  } cases[] = {// Wilson's intervals, by a second program
               {0.8, 10, 0.4901624715366, 0.9433178485456},
               {0, 20, 0, 0.1611251580528},
               {1, 20, 0.8388748419472, 1},
               {0.5, 4, 0.1500389891522, 0.8499610108478}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    double lo, hi;
    wilson_(cases[i].share, cases[i].n, &lo, &hi);
    CHECK(fabs(lo - cases[i].lo) < 1e-12 && fabs(hi - cases[i].hi) < 1e-12, "%g of %zu: %.12f to %.12f", cases[i].share, cases[i].n,
          lo, hi);
  }
  // Differences: half of 400 records gain 1. The bootstrap's interval is close to the normal one; records without a value stay out.
  enum { N = 400 };
  static QaScore a[N], b[N];
  for (int i = 0; i < N; i++) {
    for (int k = 0; k < QA_METRICS; k++) a[i].value[k] = b[i].value[k] = NAN;
    a[i].value[QA_F1] = 0.25;
    b[i].value[QA_F1] = i % 2 ? 1.25 : 0.25;
    a[i].value[QA_EXACT] = b[i].value[QA_EXACT] = i % 3 == 0;
    if (i < 10) a[i].value[QA_STEPS] = 0, b[i].value[QA_STEPS] = 1;
  }
  Report r = {NULL, 0};
  qa_report_difference_(&r, a, b, N, 1);
  CHECK(r.n == 3 && r.rows[2].n == 10 && r.rows[2].value == 1 && r.rows[2].lo == 1 && r.rows[2].hi == 1, "%zu rows", r.n);
  double half = 1.96 * sqrt(0.25 / (N - 1));
  CHECK(r.rows[0].value == 0.5 && fabs(r.rows[0].lo - (0.5 - half)) < 0.01 && fabs(r.rows[0].hi - (0.5 + half)) < 0.01, "%g to %g",
        r.rows[0].lo, r.rows[0].hi);
  CHECK(r.rows[1].value == 0 && r.rows[1].lo == 0 && r.rows[1].hi == 0, "no difference");
  free(r.rows);
}

// The value of a model's metric in results, NAN if it has none.
static double qa_result_(const Json *root, const char *model, const char *metric, const char *field) {
  const Json *results = json_get(root, "results");
  for (const Json *v = results ? results->child : NULL; v; v = v->next) {
    if (strcmp(json_get_string(v, "task", ""), model) == 0 && strcmp(json_get_string(v, "metric", ""), metric) == 0)
      return json_get_number(v, field, NAN);
  }
  return NAN;
}

// Answers that are right because they are what the model says, and one that is wrong.
static void test_qa_run(void) {
  static const char *const queries[] = {"1+2=", "7-3=", "4+4="};
  StrBuf file = {NULL, 0, 0};
  char answers[3][64], path[700], out[710];
  for (int i = 0; i < 3; i++) {
    CHECK(program_("", "generate %s prompt=%s n=3", eval_run_(), queries[i]) == 0, "%s", run_err);
    snprintf(answers[i], sizeof answers[i], "%.60s", run_out + strlen(queries[i]));
    answers[i][strcspn(answers[i], "\n")] = 0;
    strbuf_printf(&file, "{\"query\": \"%s\", \"answer\": \"%s%s\"%s}\n", queries[i], answers[i], i == 2 ? "1" : "",
                  i == 1 ? ", \"reasoning\": \"a. b\"" : "");
  }
  snprintf(path, sizeof path, "%s", eval_file_("qa.jsonl", file.data));
  snprintf(out, sizeof out, "%s.out", path);
  CHECK(program_("", "eval %s task=qa file=%s qa_template=plain n=3 vs=%s second_pass=1 second_prompt=+ results=%s", eval_run_(), path,
                 eval_run_(), out) == 0,
        "%s", run_err);
  CHECK(strstr(run_out, "difference") && strstr(run_out, "95 % interval"), "table: %s", run_out);
  const Json *root = eval_json_(out), *items = json_get(root, "items");
  const char *run = eval_run_();
  CHECK(fabs(qa_result_(root, run, "exact_match", "value") - 2.0 / 3) < 1e-12, "exact match %g",
        qa_result_(root, run, "exact_match", "value"));
  CHECK(qa_result_(root, run, "step_correctness", "n") == 1 && qa_result_(root, run, "f1", "n") == 3, "records with reasoning");
  CHECK(fabs(qa_result_(root, run, "accuracy_2", "value") - qa_result_(root, run, "accuracy", "value") -
             (qa_result_(root, run, "i2c", "value") - qa_result_(root, run, "c2i", "value"))) < 1e-12,
        "second minus first = i2c - c2i");
  double i2c = qa_result_(root, run, "i2c", "value"), c2i = qa_result_(root, run, "c2i", "value");
  CHECK(fabs(qa_result_(root, run, "rise", "value") - (i2c - c2i)) < 1e-12, "rise %g", qa_result_(root, run, "rise", "value"));
  CHECK(qa_result_(root, "difference", "f1", "value") == 0 && qa_result_(root, "difference", "accuracy_2", "n") == 3,
        "a model against itself");
  int i = 0;
  for (const Json *v = items ? items->child : NULL; v; v = v->next, i++) {
    const Json *both = json_get(v, "models"), *first = both->child;
    CHECK(both->count == 2 && strcmp(json_get_string(first, "answer", "?"), answers[i]) == 0, "answer %d: %s", i,
          json_get_string(first, "answer", "?"));
    CHECK(json_get_string(first, "second", NULL) != NULL, "a second answer");
  }
  CHECK(i == 3, "%d items", i);
  strbuf_free(&file);

  // limit and what is refused.
  CHECK(program_("", "eval %s task=qa file=%s qa_template=plain n=3 limit=2", eval_run_(), path) == 0 && strstr(run_out, "     2  "),
        "%s", run_out);
  CHECK(strstr(run_out, "exact_match") && strstr(run_out, "1.0000"), "limit=2 has only right answers: %s", run_out);
  CHECK(program_("", "eval %s task=qa", eval_run_()) == EXIT_USAGE && strstr(run_err, "file="), "%s", run_err);

  // The run's own held-out problems: as right as the evaluation of arithmetic finds them.
  char own[4096];
  double exact = NAN, problems = NAN;
  CHECK(program_("", TINY "run_dir=%s steps=300 lambda_schedule=none arith_ops=+", test_dir()) == 0, "%s", run_err);
  snprintf(own, sizeof own, "%s", last_run_());
  CHECK(program_("", "eval %s", own) == 0, "%s", run_err);
  CHECK(sscanf(run_out, "problems %lf val_loss %*f exact_match %lf", &problems, &exact) == 2, "%s", run_out);
  CHECK(exact > 0, "this model must know something: %s", run_out);
  CHECK(program_("", "eval %s task=qa file=arithmetic results=%s", own, out) == 0, "%s", run_err);
  root = eval_json_(out);
  CHECK(qa_result_(root, own, "exact_match", "n") == problems && fabs(qa_result_(root, own, "exact_match", "value") - exact) < 1e-4,
        "exact match %g of %g problems, expected %g of %g", qa_result_(root, own, "exact_match", "value"),
        qa_result_(root, own, "exact_match", "n"), exact, problems);
  CHECK(program_("", "eval %s task=qa file=arithmetic data=/x.bin", own) == EXIT_USAGE &&
            strstr(run_err, "file=arithmetic"), "not a run on arithmetic: %s", run_err);
  CHECK(program_("", "eval %s task=qa file=%s vs=/nowhere", eval_run_(), path) == EXIT_USAGE, "a second model that is not there: %s",
        run_err);
  CHECK(program_("", "eval %s task=qa file=%s qa_template=chatml", eval_run_(), path) == EXIT_USAGE && strstr(run_err, "im_start"),
        "%s", run_err);
  snprintf(path, sizeof path, "%s", eval_file_("long.jsonl", "\n{\"query\": \"1234567890123456\", \"answer\": 1}\n"));
  CHECK(program_("", "eval %s task=qa file=%s qa_template=plain", eval_run_(), path) == EXIT_USAGE &&
            strstr(run_err, "long.jsonl:2: query"),
        "too long a question: %s", run_err);
}

#define EVAL_TESTS                                                                                      \
  {"eval_stem", "English word stems as NLTK's", test_stem},                                             \
  {"eval_f1", "token F1 and exact match", test_reward_f1},                                              \
  {"eval_final", "what a worked solution states as its answer", test_answer_final},                     \
  {"eval_number", "the number of an answer", test_answer_number},                                       \
  {"eval_arithmetic", "the checker of 12+34=", test_reward_arithmetic},                                 \
  {"eval_reasoning", "<think>, and steps compared", test_reward_reasoning},                             \
  {"eval_qa_load", "question files, .json and .jsonl", test_qa_load},                                   \
  {"eval_qa_refuses", "bad question files exit 2 with file and line", test_qa_refuses},                    \
  {"eval_likelihoods", "cached and side by side = one by one", test_likelihoods},                       \
  {"eval_continuations", "context and continuation, windows of a text", test_continuations},            \
  {"eval_texts", "texts of HellaSwag and WikiText", test_task_texts},                                   \
  {"eval_task_run", "a benchmark on a tiny model: table, JSON, threads", test_task_run},                \
  {"eval_task_refuses", "bad records and options exit 2 with file and line", test_task_refuses},                \
  {"eval_qa_statistics", "intervals of shares and of differences", test_qa_statistics},                 \
  {"eval_qa_run", "generated answers, second pass, two models", test_qa_run}

#endif
