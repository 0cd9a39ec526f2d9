/*
test_eval.h: tests of answers and their scores, of question files, and of the evaluation modes that use them.

What it is:  pairs of texts with the score that they must get, worked out by hand or by NLTK's stemmer.
What not:    the comparison with other evaluators: dev/test/test_eval.py.
Read before: check.h, bitnet/rewards.h, bitnet/qa.h.
Defines:     EVAL_TESTS, the rows for the table of tests.
*/
#ifndef TEST_EVAL_H
#define TEST_EVAL_H

#include "../../bitnet/qa.h"
#include "../../bitnet/rewards.h"
#include "check.h"

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
  static char dir[600];
  if (dir[0] == 0) snprintf(dir, sizeof dir, "%s", test_dir());
  snprintf(path, sizeof path, "%s/%s", dir, name);
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

#define EVAL_TESTS                                                                                      \
  {"eval_stem", "English word stems as NLTK's", test_stem},                                             \
  {"eval_f1", "token F1 and exact match", test_reward_f1},                                              \
  {"eval_final", "what a worked solution states as its answer", test_answer_final},                     \
  {"eval_number", "the number of an answer", test_answer_number},                                       \
  {"eval_arithmetic", "the checker of 12+34=", test_reward_arithmetic},                                 \
  {"eval_reasoning", "<think>, and steps compared", test_reward_reasoning},                             \
  {"eval_qa_load", "question files, .json and .jsonl", test_qa_load},                                   \
  {"eval_qa_refuses", "bad question files exit 2 with file and line", test_qa_refuses}

#endif
