/*
test_data.h: tests of tokenizer.h and dataloader.h. Everything here is integers, so every comparison is exact.

Read before: check.h, tokenizer.h, dataloader.h.
Defines:     DATA_TESTS, the rows for the table of tests.
*/
#ifndef TEST_DATA_H
#define TEST_DATA_H

#include "../../dataloader.h"
#include "../../tokenizer.h"
#include "check.h"

// ---------------------------------------------------------------------------------------------------------
// Helpers.

// Writes a text file, or stops.
UNUSED static void put_file_(const char *dir, const char *name, const char *data, size_t n) {
  char path[4096];
  path_join(path, sizeof path, dir, name);
  int err = safe_write_file(path, data, n);
  if (err) die(EXIT_FAILED, "%s: %s", path, strerror(err));
}

// 1 if the child ends with this exit code and says every one of the words (separated by |).
UNUSED static int refused_(void (*fn)(void *), void *arg, int code, const char *words) {
  char err[1024], list[256];
  int got = run_child(fn, arg, err, sizeof err), ok = got == code;
  snprintf(list, sizeof list, "%s", words);
  for (char *w = strtok(list, "|"); w; w = strtok(NULL, "|")) ok = ok && strstr(err, w) != NULL;
  if (!ok) printf("    exit code %d, wanted %d with \"%s\"; said: %s\n", got, code, words, err);
  return ok;
}

// 1 if both batches hold the same.
UNUSED static int same_batch_(const Batch *a, const Batch *b) {
  size_t bytes = (size_t)a->B * (size_t)a->T * sizeof(int);
  return a->n_targets == b->n_targets && memcmp(a->tokens, b->tokens, bytes) == 0 && memcmp(a->targets, b->targets, bytes) == 0 &&
         memcmp(a->start, b->start, bytes) == 0 && memcmp(a->pos, b->pos, bytes) == 0;
}

// 1 if encode and decode of text give ids[0..n) and back text itself.
UNUSED static int round_trip_(const Tokenizer *t, const char *text, const int *ids, size_t n) {
  int got[64];
  StrBuf back = {NULL, 0, 0};
  size_t m = tokenizer_encode(t, text, strlen(text), got, 64);
  int ok = m == n && memcmp(got, ids, n * sizeof(int)) == 0;
  tokenizer_decode(t, got, m, &back);
  ok = ok && strcmp(back.data, text) == 0;
  strbuf_free(&back);
  return ok;
}

// ---------------------------------------------------------------------------------------------------------
// Tokenizer.

static void test_tokenizer_arithmetic(void) {
  static const int ids1[] = {1, 2, 10, 3, 4, 14}, ids2[] = {5, 15, 11, 15, 9, 14, 11, 4}, ids3[] = {12, 13};
  Tokenizer t;
  size_t len;
  int ids[8];
  tokenizer_arithmetic(&t);
  CHECK(t.vocab_size == 20 && t.vocab_padded == 32, "%d %d", t.vocab_size, t.vocab_padded);
  CHECK(t.pad_id == 16 && t.bos_id == 17 && t.eos_id == 18 && t.unk_id == 19, "%d %d %d %d", t.pad_id, t.bos_id, t.eos_id, t.unk_id);
  CHECK(round_trip_(&t, "12+34=", ids1, 6), "12+34=");
  CHECK(round_trip_(&t, "5 - 9=-4", ids2, 8), "5 - 9=-4");
  CHECK(round_trip_(&t, "*/", ids3, 2), "*/");
  CHECK(round_trip_(&t, "", ids3, 0), "empty text");

  // Only cap ids are written, all are counted.
  for (int i = 0; i < 8; i++) ids[i] = -7;
  CHECK(tokenizer_encode(&t, "123", 3, ids, 2) == 3 && ids[1] == 2 && ids[2] == -7, "wrote past cap");
  CHECK(tokenizer_encode(&t, "123", 3, NULL, 0) == 3, "counting");

  // An unknown character is one <unk> however long it is; each byte that is no UTF-8 is one, too. Marks are plain text.
  CHECK(tokenizer_encode(&t, "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 10, ids, 8) == 4 && ids[0] == 19 && ids[3] == 19, "unknown");
  CHECK(tokenizer_encode(&t, "\xFF\xC3(\xE2\x82", 5, ids, 8) == 5 && ids[4] == 19, "broken UTF-8");
  CHECK(tokenizer_encode(&t, "</s>", 4, ids, 8) == 4 && ids[0] == 19 && ids[1] == 13, "a mark in a text became an id");

  // Special tokens, padding rows and nonsense decode to nothing.
  static const int mixed[] = {17, 4, 16, 20, 31, -1, 1000, 6, 19, 18};
  StrBuf out = {NULL, 0, 0};
  tokenizer_decode(&t, mixed, 10, &out);
  CHECK(strcmp(out.data, "46") == 0, "decoded to '%s'", out.data);
  strbuf_free(&out);
  const char *piece = tokenizer_piece(&t, 18, &len);
  CHECK(piece && len == 4 && memcmp(piece, "</s>", 4) == 0, "piece 18");
  CHECK(tokenizer_piece(&t, 20, &len) == NULL && len == 0 && tokenizer_piece(&t, -1, &len) == NULL, "piece outside");
  CHECK(tokenizer_id(&t, "<s>", 3) == 17 && tokenizer_id(&t, "<s", 2) == -1, "id of a piece");
  tokenizer_free(&t);
}

// The well-formed and the ill-formed edges of the Unicode standard's table of UTF-8 byte sequences.
static void test_tokenizer_utf8(void) {
  static const struct { const char *s; size_t n, want; } cases[] = {
    {"", 0, 0}, {"\x7F", 1, 1}, {"\x80", 1, 0}, {"\xC1\xBF", 2, 0}, {"\xC2\x80", 2, 2}, {"\xC2", 1, 0}, {"\xDF\xBF", 2, 2},
    {"\xE0\x9F\xBF", 3, 0}, {"\xE0\xA0\x80", 3, 3}, {"\xED\x9F\xBF", 3, 3}, {"\xED\xA0\x80", 3, 0}, {"\xEF\xBF\xBF", 3, 3},
    {"\xEF\xBF\x41", 3, 0}, {"\xF0\x8F\xBF\xBF", 4, 0}, {"\xF0\x90\x80\x80", 4, 4}, {"\xF4\x8F\xBF\xBF", 4, 4},
    {"\xF4\x90\x80\x80", 4, 0}, {"\xF5\x80\x80\x80", 4, 0}, {"\xF0\x90\x80", 3, 0}, {"\xC2\x41", 2, 0}, {"A\x80", 2, 1}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    size_t got = utf8_char(cases[i].s, cases[i].n);
    CHECK(got == cases[i].want, "case %zu: %zu bytes, wanted %zu", i, got, cases[i].want);
  }
}

static void test_tokenizer_files(void) {
  const char *dir = test_dir();
  Tokenizer a, b;
  tokenizer_arithmetic(&a);
  CHECK(tokenizer_save(&a, dir) == 0, "save");
  tokenizer_load(&b, dir);
  CHECK(b.vocab_size == 20 && b.vocab_padded == 20, "%d %d", b.vocab_size, b.vocab_padded);
  CHECK(b.pad_id == 16 && b.bos_id == 17 && b.eos_id == 18 && b.unk_id == 19, "%d %d %d %d", b.pad_id, b.bos_id, b.eos_id, b.unk_id);
  CHECK(tokenizer_hash(&a) == tokenizer_hash(&b), "hash changed on the way");
  for (int id = 0; id < 20; id++) {
    size_t n, m;
    const char *p = tokenizer_piece(&a, id, &n), *q = tokenizer_piece(&b, id, &m);
    CHECK(n == m && memcmp(p, q, n) == 0 && a.special[id] == b.special[id], "piece %d", id);
  }
  tokenizer_free(&b);
  CHECK(tokenizer_save(&a, "/nonexistent/dir") == ENOENT, "saving into a missing directory");

  // Characters that JSON must escape or that take several bytes; ids out of order; an added token after the vocabulary and
  // one that repeats a piece of it; roles given as objects; roles missing.
  static const char
      *const json = "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":7,\"content\":\"<end>\",\"special\":true},{\"id\":0,\"content\":"
                    "\"?!\",\"special\":true}],"
                    "\"normalizer\":null,\"decoder\":{\"type\":\"Fuse\"},\"model\":{\"type\":\"BPE\",\"unk_token\":\"?!\",\"fuse_"
                    "unk\":false,\"vocab\":"
                    "{\"\\u00e9\":3,\"?!\":0,\"\\\"\":1,\"\\\\\":2,\"\\ud83d\\ude00\":5,\"\\u20ac\":4,\"\\n\":6},\"merges\":[]}}";
  static const char *const config = "{\"eos_token\":{\"content\":\"<end>\",\"lstrip\":false},\"pad_token\":null}";
  static const int ids[] = {5, 2, 3, 6, 4, 1, 3};
  const char *other = test_dir();
  put_file_(other, "tokenizer.json", json, strlen(json));
  put_file_(other, "tokenizer_config.json", config, strlen(config));
  tokenizer_load(&b, other);
  CHECK(b.vocab_size == 8 && b.eos_id == 7 && b.unk_id == 0 && b.pad_id == -1 && b.bos_id == -1, "roles %d %d", b.eos_id, b.unk_id);
  CHECK(round_trip_(&b, "\xF0\x9F\x98\x80\\\xC3\xA9\n\xE2\x82\xAC\"\xC3\xA9", ids, 7), "multi-byte text");
  CHECK(tokenizer_hash(&a) != tokenizer_hash(&b), "two vocabularies, one hash");

  // What was read can be written and read again.
  Tokenizer c;
  CHECK(tokenizer_save(&b, other) == 0, "save");
  tokenizer_load(&c, other);
  CHECK(tokenizer_hash(&b) == tokenizer_hash(&c) && c.eos_id == 7, "second round");
  tokenizer_free(&c);
  tokenizer_free(&b);

  // Without tokenizer_config.json there are no roles.
  other = test_dir();
  put_file_(other, "tokenizer.json", json, strlen(json));
  tokenizer_load(&b, other);
  CHECK(b.eos_id == -1 && b.unk_id == 0, "roles %d %d", b.eos_id, b.unk_id);
  tokenizer_free(&b);
  tokenizer_free(&a);
}

static void load_tokenizer_(void *dir) {
  Tokenizer t;
  tokenizer_load(&t, (const char *)dir);
}

// A tokenizer.json with these top-level members and this model must be refused with exit 3 and these words.
#define CHECK_REFUSED_TOKENIZER(members, model, words)                                                      \
  do {                                                                                                      \
    const char *json_ = "{" members "\"decoder\":{\"type\":\"Fuse\"},\"model\":{" model "}}";               \
    char dir_[512];                                                                                         \
    snprintf(dir_, sizeof dir_, "%s", test_dir());                                                          \
    put_file_(dir_, "tokenizer.json", json_, strlen(json_));                                                \
    CHECK(refused_(load_tokenizer_, dir_, EXIT_DAMAGED, "tokenizer.json|" words), "%s", json_);              \
  } while (0)

#define CHAR_MODEL_(vocab) "\"type\":\"BPE\",\"unk_token\":\"?\",\"merges\":[],\"vocab\":{" vocab "}"

static void test_tokenizer_refuses(void) {
  CHECK_REFUSED_TOKENIZER("", "\"type\":\"Unigram\",\"vocab\":[]", "expected BPE, found Unigram");
  CHECK_REFUSED_TOKENIZER("", "\"vocab\":{\"a\":0}", "expected BPE, found none");
  CHECK_REFUSED_TOKENIZER("", "\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]", "BPE with 1 merges");
  CHECK_REFUSED_TOKENIZER("\"pre_tokenizer\":{\"type\":\"ByteLevel\"},", CHAR_MODEL_("\"?\":0"), "pre_tokenizer|ByteLevel");
  CHECK_REFUSED_TOKENIZER("\"normalizer\":{\"type\":\"NFC\"},", CHAR_MODEL_("\"?\":0"), "normalizer|NFC");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0") ",\"byte_fallback\":true", "byte_fallback");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"b\":2"), "below 2|found 2");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"b\":-1"), "found -1");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"b\":\"x\""), "piece \"b\"");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"b\":0"), "id 0|both");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"bc\":1"), "single character|bc");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"?\":0,\"\":1"), "single character");
  CHECK_REFUSED_TOKENIZER("", CHAR_MODEL_("\"a\":0"), "unk_token");
  CHECK_REFUSED_TOKENIZER("", "\"type\":\"BPE\",\"merges\":[],\"vocab\":{\"a\":0}", "unk_token, found none");
  CHECK_REFUSED_TOKENIZER("", "\"type\":\"BPE\",\"vocab\":[]", "vocab");
  CHECK_REFUSED_TOKENIZER("\"added_tokens\":[{\"id\":3,\"content\":\"<e>\",\"special\":true}],", CHAR_MODEL_("\"?\":0"),
                          "below 2|found 3");
  CHECK_REFUSED_TOKENIZER("\"added_tokens\":[{\"id\":1,\"content\":\"?\",\"special\":true}],", CHAR_MODEL_("\"?\":0"), "again");
  CHECK_REFUSED_TOKENIZER("\"added_tokens\":[{\"id\":1,\"content\":\"cat\",\"special\":false}],", CHAR_MODEL_("\"?\":0"), "cat");
  CHECK_REFUSED_TOKENIZER("\"added_tokens\":[{\"id\":1}],", CHAR_MODEL_("\"?\":0"), "content");

  static const char *const no_fuse = "{\"model\":{" CHAR_MODEL_("\"?\":0") "}}", *const cut = "{\"model\":{\"type\":\"BP";
  static const char *const good = "{\"decoder\":{\"type\":\"Fuse\"},\"model\":{" CHAR_MODEL_("\"?\":0") "}}";
  static const char *const bad_role = "{\"eos_token\":\"<eos>\"}";
  char dir[512];
  snprintf(dir, sizeof dir, "%s", test_dir());
  CHECK(refused_(load_tokenizer_, dir, EXIT_USAGE, "tokenizer.json"), "missing file");
  put_file_(dir, "tokenizer.json", no_fuse, strlen(no_fuse));
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "Fuse, found none"), "no decoder");
  put_file_(dir, "tokenizer.json", cut, strlen(cut));
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "tokenizer.json"), "truncated JSON");
  put_file_(dir, "tokenizer.json", "[]", 2);
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "object"), "an array");
  put_file_(dir, "tokenizer.json", good, strlen(good));
  put_file_(dir, "tokenizer_config.json", bad_role, strlen(bad_role));
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "tokenizer_config.json|eos_token|<eos>"), "unknown role");
}

// ---------------------------------------------------------------------------------------------------------
// Permutation and arithmetic.

static void test_permute(void) {
  static const uint64_t sizes[] = {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097};
  unsigned char seen[4097];
  for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
    uint64_t n = sizes[i], fixed = 0, hits = 0;
    memset(seen, 0, sizeof seen);
    for (uint64_t x = 0; x < n; x++) {
      uint64_t y = permute(x, n, 42);
      CHECK(y < n, "n %d: image %d", (int)n, (int)y);
      if (y < n && !seen[y]++) hits++;
      fixed += y == x;
    }
    CHECK(hits == n, "n %d: only %d different images", (int)n, (int)hits);
    CHECK(n < 1000 || fixed < 10, "n %d: %d fixed points", (int)n, (int)fixed);
  }
  CHECK(permute(5, 1ull << 63, 1) < 1ull << 63 && permute(UINT64_MAX - 1, UINT64_MAX, 1) < UINT64_MAX, "large domain");
}

static void test_arithmetic_problems(void) {
  static const struct { const char *ops; int min, max, mul_max; uint64_t n; } sets[] = {
    {"+", 0, 99, 0, 10000}, {"-", 5, 12, 0, 64}, {"+-", 0, 100, 0, 20402}, {"*", 0, 0, 9, 100}, {"*-+", 7, 30, 12, 169 + 2 * 576},
    {"-", 0, 1000, 0, 1002001}, {"-", 3, 3, 0, 1}, {"+-*", 9, 11, 10, 9 + 9 + 121}};
  for (size_t k = 0; k < ARRAY_LEN(sets); k++) {
    Arithmetic a;
    int longest = 0;
    uint64_t held = 0;
    arith_init(&a, sets[k].ops, sets[k].min, sets[k].max, sets[k].mul_max, sets[k].n > 50 ? 0.1 : 0);
    CHECK(a.n_problems == sets[k].n, "set %zu: %d problems", k, (int)a.n_problems);
    for (uint64_t i = 0; i < a.n_problems; i++) {
      int x, y;
      char op, prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP], want[2 * ARITH_TEXT_CAP], got[2 * ARITH_TEXT_CAP];
      long r;
      arith_problem(&a, i, &x, &op, &y, &r);
      int lo = op == '*' ? 0 : a.min, hi = op == '*' ? a.mul_max : a.max;
      CHECK(x >= lo && x <= hi && y >= lo && y <= hi && strchr(sets[k].ops, op), "problem %d: %d %c %d", (int)i, x, op, y);
      CHECK(r == (op == '+' ? x + y : op == '-' ? x - y : x * y), "%d %c %d = %ld", x, op, y, r);
      arith_text(&a, i, prompt, answer);
      snprintf(want, sizeof want, "%d%c%d=%ld", x, op, y, r);
      snprintf(got, sizeof got, "%s%s", prompt, answer);
      CHECK(strcmp(got, want) == 0, "'%s', wanted '%s'", got, want);
      CHECK(prompt[strlen(prompt) - 1] == '=', "prompt '%s'", prompt);
      if ((int)strlen(want) + 1 > longest) longest = (int)strlen(want) + 1;
      held += (uint64_t)arith_is_heldout(&a, i);
    }
    CHECK(arith_max_tokens(&a) == longest, "set %zu: longest %d, measured %d", k, arith_max_tokens(&a), longest);

    // About the fraction asked for: five standard deviations. x+y and y+x share a coin, so there may be only n / 2 coins that
    // count double, whose variance is twice that of n single ones.
    double n = (double)a.n_problems, mean = n * a.holdout, five = 5 * sqrt(2 * n * a.holdout * (1 - a.holdout));
    CHECK(fabs((double)held - mean) <= five, "set %zu: %d of %g held out", k, (int)held, n);

    // The list is exactly those, each once, and a shorter list is its beginning.
    uint64_t *list = (uint64_t *)xcalloc(a.n_problems + 1, sizeof *list), *head = (uint64_t *)xcalloc(7, sizeof *head);
    unsigned char *seen = (unsigned char *)xcalloc(a.n_problems, 1);
    size_t got = arith_heldout(&a, list, a.n_problems + 1), few = arith_heldout(&a, head, 7);
    CHECK(got == held && few == (got < 7 ? got : 7), "set %zu: %zu and %zu listed", k, got, few);
    for (size_t i = 0; i < got; i++) CHECK(arith_is_heldout(&a, list[i]) && !seen[list[i]]++, "entry %zu", i);
    CHECK(memcmp(list, head, few * sizeof *list) == 0, "set %zu: order depends on the length", k);
    free(list);
    free(head);
    free(seen);
  }
  // The largest operands: nothing overflows, nothing is cut.
  Arithmetic a;
  char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  arith_init(&a, "+-*", 0, ARITH_MAX, ARITH_MAX, 0);
  CHECK(a.n_problems == 30000000000ull, "%g", (double)a.n_problems);
  arith_text(&a, a.n_problems - 1, prompt, answer);
  CHECK(strcmp(prompt, "99999*99999=") == 0 && strcmp(answer, "9999800001") == 0, "%s%s", prompt, answer);
  CHECK(arith_max_tokens(&a) == 23, "%d", arith_max_tokens(&a));
}

// The side of a problem depends on its text alone.
static void test_arithmetic_holdout(void) {
  Arithmetic a, b, c;
  arith_init(&a, "+-*", 0, 50, 9, 0.2);
  arith_init(&b, "*-", 10, 99, 30, 0.2);
  arith_init(&c, "+-*", 0, 50, 9, 0.4);
  int shared = 0;
  for (uint64_t i = 0; i < a.n_problems; i++) {
    int x, y;
    char op;
    long r;
    arith_problem(&a, i, &x, &op, &y, &r);
    CHECK(!arith_is_heldout(&a, i) || arith_is_heldout(&c, i), "%d %c %d: a larger holdout lost it", x, op, y);
    if (op == '+' || (op == '-' && (x < 10 || y < 10))) continue;
    uint64_t j = op == '*' ? (uint64_t)(x * 31 + y) : 961 + (uint64_t)((x - 10) * 90 + y - 10);
    CHECK(arith_is_heldout(&a, i) == arith_is_heldout(&b, j), "%d %c %d changes sides", x, op, y);
    shared++;
  }
  CHECK(shared == 100 + 41 * 41, "%d problems compared", shared);

  // The twin of a held-out sum or product is held out, too; a difference and its negative are two problems.
  int twins[2] = {0, 0}, parted = 0;
  for (uint64_t i = 0; i < a.n_problems; i++) {
    int x, y;
    char op;
    long r;
    arith_problem(&a, i, &x, &op, &y, &r);
    uint64_t width = op == '*' ? 10 : 51, base = op == '+' ? 0 : op == '-' ? 51 * 51 : 2 * 51 * 51;
    uint64_t twin = base + (uint64_t)y * width + (uint64_t)x;
    int same = arith_is_heldout(&a, i) == arith_is_heldout(&a, twin);
    CHECK(op == '-' || same, "%d %c %d and its twin are on different sides", x, op, y);
    if (op != '-') twins[op == '*'] += x != y && arith_is_heldout(&a, i);
    else parted += !same;
  }
  CHECK(twins[0] > 100 && twins[1] > 4 && parted > 100, "%d sums, %d products, %d differences", twins[0], twins[1], parted);

  // The evaluation set of a default-like run, pinned: if this changes, results of older runs can no longer be compared.
  static const char *const pinned[] = {"9-7=2", "24+91=115", "53-51=2", "67+56=123"};
  uint64_t list[4];
  arith_init(&a, "+-*", 0, 99, 12, 0.1);
  CHECK(arith_heldout(&a, list, 4) == 4, "fewer than 4 problems held out");
  for (int i = 0; i < 4; i++) {
    char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP], text[2 * ARITH_TEXT_CAP];
    arith_text(&a, list[i], prompt, answer);
    snprintf(text, sizeof text, "%s%s", prompt, answer);
    CHECK(strcmp(text, pinned[i]) == 0, "held-out problem %d is %s, was %s", i, text, pinned[i]);
  }
}

// Whether row r is the same in both batches.
static int same_row_(const Batch *a, const Batch *b, int r) {
  size_t at = (size_t)r * (size_t)a->T, bytes = (size_t)a->T * sizeof(int);
  return memcmp(a->tokens + at, b->tokens + at, bytes) == 0 && memcmp(a->targets + at, b->targets + at, bytes) == 0;
}

static void test_arithmetic_batches(void) {
  Arithmetic a;
  Tokenizer t;
  DataLoader d, e;
  Batch b, c;
  int counts[3] = {0, 0, 0};
  tokenizer_arithmetic(&t);
  arith_init(&a, "+-*", 0, 20, 5, 0.3);
  loader_open_arithmetic(&d, &a, &t, 7);
  int T = arith_max_tokens(&a) + 2;
  batch_alloc(&b, 50, T);
  batch_alloc(&c, 50, T);
  for (uint64_t k = 0; k < 60; k++) {
    loader_batch(&d, k, &b);
    size_t targets = 0;
    for (int r = 0; r < b.B; r++) {
      const int *tok = b.tokens + r * T, *tgt = b.targets + r * T, *start = b.start + r * T, *pos = b.pos + r * T;
      int x, y, n = 0, first = 0, used = 0;
      char op, text[64];
      // Read the row back: text up to </s>, then padding only.
      while (n < T && tok[n] != t.eos_id) n++;
      StrBuf out = {NULL, 0, 0};
      tokenizer_decode(&t, tok, (size_t)n, &out);
      CHECK((int)out.len == n, "row '%s' has special tokens inside", out.data);
      CHECK(sscanf(out.data, "%d%c%d=%n", &x, &op, &y, &first) == 3 && first > 0, "row '%s'", out.data);
      snprintf(text, sizeof text, "%d", op == '+' ? x + y : op == '-' ? x - y : x * y);
      CHECK(strcmp(out.data + first, text) == 0, "row '%s', answer %s", out.data, text);
      CHECK(strchr("+-*", op) != NULL, "row '%s'", out.data);
      counts[op == '+' ? 0 : op == '-' ? 1 : 2]++;
      uint64_t i = op == '*' ? 882 + (uint64_t)(x * 6 + y) : (op == '-' ? 441 : 0) + (uint64_t)(x * 21 + y);
      CHECK(!arith_is_heldout(&a, i), "held out: %s", out.data);
      // Targets: the answer and </s>, shifted by one; nothing else. Padding stands alone.
      for (int p = 0; p < T; p++) {
        int want = p + 1 >= first && p + 1 <= n ? tok[p + 1] : IGNORE;
        CHECK(tgt[p] == want, "%s: target %d is %d, wanted %d", out.data, p, tgt[p], want);
        CHECK(p <= n || tok[p] == t.pad_id, "%s: token %d is %d", out.data, p, tok[p]);
        CHECK(start[p] == (p <= n ? 0 : p) && pos[p] == (p <= n ? p : 0), "%s: start %d pos %d at %d", out.data, start[p], pos[p], p);
        used += tgt[p] != IGNORE;
      }
      CHECK(used == (int)strlen(text) + 1, "%s: %d targets", out.data, used);
      targets += (size_t)used;
      strbuf_free(&out);
    }
    CHECK(b.n_targets == targets, "n_targets %zu, counted %zu", b.n_targets, targets);
  }
  // Operations in equal shares although * has few problems: 3000 draws, five standard deviations.
  for (int i = 0; i < 3; i++) CHECK(abs(counts[i] - 1000) < 130, "operation %d drawn %d times", i, counts[i]);

  // A pure function of seed and row: asked again, from another loader, or in batches of another size.
  loader_open_arithmetic(&e, &a, &t, 7);
  loader_batch(&e, 59, &c);
  CHECK(same_batch_(&b, &c), "batch 59 asked for alone differs");
  loader_batch(&e, 58, &c);
  CHECK(!same_batch_(&b, &c), "batches 58 and 59 are equal");
  e.seed = 8;
  loader_batch(&e, 59, &c);
  CHECK(!same_batch_(&b, &c), "the seed changes nothing");
  Batch half;
  batch_alloc(&half, 25, T);
  loader_batch(&d, 119, &half);
  CHECK(memcmp(half.tokens, b.tokens + 25 * T, 25 * (size_t)T * sizeof(int)) == 0, "rows depend on the batch size");
  batch_free(&half);

  // The shortest T that is allowed: the last </s> is a target and no token, and no answer loses a character.
  Batch tight;
  batch_alloc(&tight, 200, arith_max_tokens(&a) - 1);
  size_t ends = 0;
  loader_batch(&d, 3, &tight);
  for (size_t i = 0; i < (size_t)tight.B * (size_t)tight.T; i++) ends += tight.targets[i] == t.eos_id;
  CHECK(ends == 200, "%zu of 200 rows end with </s>", ends);
  alloc_guard = 1;   // a batch asks for no memory
  loader_batch(&d, 4, &tight);
  alloc_guard = 0;
  batch_free(&tight);
  batch_free(&b);
  batch_free(&c);
  loader_free(&d);
  loader_free(&e);
  tokenizer_free(&t);
}

// Rows with a draft: "12+34=56=46". How many there are, what is wrong with the drafts, what is trained, and the width that they need.
static void test_arithmetic_drafts(void) {
  static const struct { const char *ops; int min, max, mul_max; } sets[] = {
      {"+-*", 0, 20, 5}, {"+", 0, 9, 0}, {"-", 0, 9, 0}, {"*", 0, 0, 9}, {"-", 90, 110, 0}, {"+", 100, 999, 0}, {"*", 0, 0, 110}};
  Tokenizer t;
  tokenizer_arithmetic(&t);
  for (size_t k = 0; k < ARRAY_LEN(sets); k++) {
    Arithmetic a;
    DataLoader d, plain;
    Batch b, c;
    arith_init(&a, sets[k].ops, sets[k].min, sets[k].max, sets[k].mul_max, 0.1);
    loader_open_arithmetic(&d, &a, &t, 7);
    loader_open_arithmetic(&plain, &a, &t, 7);
    d.drafts = 0.4;
    int T = arith_row_tokens(&a, 1), drafts = 0, right = 0, up = 0, rows = 3000;
    CHECK(arith_row_tokens(&a, 0) == arith_max_tokens(&a) - 1 && T > arith_row_tokens(&a, 0), "set %zu: width %d", k, T);
    batch_alloc(&b, rows, T);
    batch_alloc(&c, rows, T);
    loader_batch(&d, 1, &b);
    loader_batch(&plain, 1, &c);
    for (int r = 0; r < rows; r++) {
      const int *tok = b.tokens + r * T, *tgt = b.targets + r * T;
      int n = 0, ends = 0, x, y, first = 0, second = 0, used = 0;
      long draft, answer;
      char op;
      StrBuf out = {NULL, 0, 0};
      while (n < T && tok[n] != t.eos_id && tok[n] != t.pad_id) n++;
      tokenizer_decode(&t, tok, (size_t)n, &out);
      for (int i = 0; i < T; i++) ends += tgt[i] == t.eos_id;
      CHECK(ends == 1, "set %zu: row '%s' has no end: too narrow", k, out.data);
      CHECK(sscanf(out.data, "%d%c%d=%n", &x, &op, &y, &first) == 3, "row '%s'", out.data);
      long want = op == '+' ? x + y : op == '-' ? x - y : x * y;
      if (strchr(out.data + first, '=') == NULL) {
        CHECK(atol(out.data + first) == want && same_row_(&b, &c, r), "row '%s' without a draft", out.data);
      } else {
        drafts++;
        CHECK(sscanf(out.data + first, "%ld=%n%ld", &draft, &second, &answer) == 2 && answer == want, "row '%s'", out.data);
        long by = labs(draft - want), power = 1;
        while (power < by) power *= 10;
        right += by == 0;
        up += draft > want;
        CHECK(by == 0 || (by == power && power <= (labs(want) > 9 ? 10 * labs(want) : 10)), "row '%s': off by %ld", out.data, by);
        for (int i = 0; i < T; i++) used += tgt[i] != IGNORE;
        CHECK(used == n - first - second + 1, "row '%s': %d targets", out.data, used);
      }
      strbuf_free(&out);
    }
    // 3000 and about 1200 and 600 draws: five standard deviations.
    CHECK(abs(drafts - 1200) < 135, "set %zu: %d drafts of 1200", k, drafts);
    CHECK(abs(2 * right - drafts) < 175 && abs(2 * up - (drafts - right)) < 125, "set %zu: %d of %d drafts right, %d too large", k,
          right, drafts, up);
    batch_free(&b);
    batch_free(&c);
    loader_free(&d);
    loader_free(&plain);
  }
  tokenizer_free(&t);
}

// The batches of an evaluation: each held-out problem once, in the order of the list, and padding to fill the last batch.
static void test_arithmetic_heldout_batches(void) {
  Arithmetic a;
  Tokenizer t;
  DataLoader d;
  Batch b;
  uint64_t list[40];
  tokenizer_arithmetic(&t);
  arith_init(&a, "+-*", 0, 20, 5, 0.3);
  loader_open_arithmetic(&d, &a, &t, 7);
  size_t n = arith_heldout(&a, list, 40), rows = 0;
  int T = arith_max_tokens(&a) - 1;
  batch_alloc(&b, 16, T);
  CHECK(n == 40, "%zu held out", n);
  for (size_t first = 0; first < 64; first += 16) {
    size_t targets = 0;
    memset(b.tokens, 77, 16 * (size_t)T * sizeof(int));   // whatever the batch before left
    memset(b.targets, 77, 16 * (size_t)T * sizeof(int));
    memset(b.start, 77, 16 * (size_t)T * sizeof(int));
    memset(b.pos, 77, 16 * (size_t)T * sizeof(int));
    alloc_guard = 1;
    arith_fill_heldout(&d, list, first, n, &b);
    alloc_guard = 0;
    for (size_t r = 0; r < 16; r++) {
      const int *tok = b.tokens + r * (size_t)T, *tgt = b.targets + r * (size_t)T;
      const int *start = b.start + r * (size_t)T, *pos = b.pos + r * (size_t)T;
      char prompt[ARITH_TEXT_CAP] = "", answer[ARITH_TEXT_CAP] = "";
      int here = first + r < n, ids[2 * ARITH_TEXT_CAP], len = 0, from = T;
      if (here) {
        arith_text(&a, list[first + r], prompt, answer);
        from = (int)tokenizer_encode(&t, prompt, strlen(prompt), ids, ARITH_TEXT_CAP);
        len = from + (int)tokenizer_encode(&t, answer, strlen(answer), ids + from, ARITH_TEXT_CAP);
        ids[len++] = t.eos_id;
        rows++;
      }
      for (int p = 0; p < T; p++) {
        int want = p + 1 >= from && p + 1 < len ? ids[p + 1] : IGNORE;
        CHECK(tok[p] == (p < len ? ids[p] : t.pad_id), "row %zu: token %d is %d", first + r, p, tok[p]);
        CHECK(tgt[p] == want, "row %zu: target %d is %d, wanted %d", first + r, p, tgt[p], want);
        CHECK(start[p] == (p < len ? 0 : p) && pos[p] == (p < len ? p : 0), "row %zu: start %d pos %d", first + r, start[p], pos[p]);
        targets += want != IGNORE;
      }
    }
    CHECK(b.n_targets == targets && (targets == 0) == (first >= n), "n_targets %zu, counted %zu", b.n_targets, targets);
  }
  CHECK(rows == n, "%zu rows for %zu problems", rows, n);
  batch_free(&b);
  loader_free(&d);
  tokenizer_free(&t);
}

typedef struct {
  const char *ops;
  int min, max, mul_max;
  double holdout;
} ArithArgs_;

static void init_arith_(void *arg) {
  const ArithArgs_ *p = (const ArithArgs_ *)arg;
  Arithmetic a;
  arith_init(&a, p->ops, p->min, p->max, p->mul_max, p->holdout);
}

static void short_arith_batch_(void *arg) {
  Arithmetic a;
  Tokenizer t;
  DataLoader d;
  Batch b;
  tokenizer_arithmetic(&t);
  arith_init(&a, "+", 0, 99, 0, 0.1);
  loader_open_arithmetic(&d, &a, &t, 1);
  batch_alloc(&b, 1, 8);
  uint64_t first = 0;
  if (arg) arith_fill_heldout(&d, &first, 0, 1, &b);
  else loader_batch(&d, 0, &b);
}

// A character tokenizer that has no '*' cannot write products.
static void poor_tokenizer_(void *arg) {
  Arithmetic a;
  Tokenizer t;
  DataLoader d;
  tokenizer_arithmetic(&t);
  if (arg) t.eos_id = -1;
  else t.special[tokenizer_id(&t, "*", 1)] = 1;
  arith_init(&a, "+", 0, 99, 0, 0.1);
  loader_open_arithmetic(&d, &a, &t, 1);
}

static void test_arithmetic_refuses(void) {
  static const struct { ArithArgs_ args; const char *words; } cases[] = {
    {{"", 0, 9, 9, 0}, "+-*|none"}, {{"+/", 0, 9, 9, 0}, "+-*|+/"}, {{"++", 0, 9, 9, 0}, "once"}, {{"+", -1, 9, 9, 0}, "min -1"},
    {{"+", 5, 4, 9, 0}, "max 4"}, {{"+", 0, 100000, 9, 0}, "99999"}, {{"*", 0, 9, -1, 0}, "found -1"}, {{"+", 0, 9, 9, 1.0}, "0.9"},
    {{"+", 0, 9, 9, -0.1}, "-0.1"}, {{"+", 0, 9, 9, NAN}, "nan"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    ArithArgs_ args = cases[i].args;
    CHECK(refused_(init_arith_, &args, EXIT_USAGE, cases[i].words), "case %zu", i);
  }
  // One problem that is held out leaves nothing to train on. Some single sum is, at 0.9.
  int refused = 0;
  for (int v = 0; v < 20 && !refused; v++) {
    ArithArgs_ args = {"+", v, v, 0, 0.9};
    char err[256];
    refused = run_child(init_arith_, &args, err, sizeof err) == EXIT_USAGE && strstr(err, "held out") != NULL;
  }
  CHECK(refused, "an empty training set was accepted");
  CHECK(refused_(short_arith_batch_, NULL, EXIT_USAGE, "seq_len=8|at least 9"), "99+99=198 and </s> need 9 positions");
  int flag = 1;
  CHECK(refused_(short_arith_batch_, &flag, EXIT_USAGE, "seq_len=8|at least 9"), "the same for held-out problems");
  CHECK(refused_(poor_tokenizer_, NULL, EXIT_USAGE, "'*'"), "no *");
  CHECK(refused_(poor_tokenizer_, &flag, EXIT_USAGE, "end token"), "no </s>");
}

// ---------------------------------------------------------------------------------------------------------
// Shards.

static char shard_path_[4096];   // of the shard that a test wrote last

// A shard named name in a fresh or the given directory; its path goes to shard_path_.
static void put_shard_(const char *dir, const char *name, const int *ids, size_t n, int vocab, int eot) {
  path_join(shard_path_, sizeof shard_path_, dir, name);
  shard_write(shard_path_, ids, n, vocab, 0x1122334455667788ull, eot);
}

static void test_shard_round_trip(void) {
  int ids[101];
  for (int wide = 0; wide < 2; wide++) {
    int vocab = wide ? 128256 : 65536;
    for (int i = 0; i < 101; i++) ids[i] = (int)rng_below(1, RNG_TEST, (uint64_t)i, (uint64_t)vocab);
    ids[3] = vocab - 1;
    put_shard_(test_dir(), "a.bin", ids, 101, vocab, 5);
    DataLoader d;
    Batch b;
    batch_alloc(&b, 2, 10);
    loader_open_shards(&d, shard_path_, vocab, 5, 1, 0);
    CHECK(d.n_tokens == 101 && d.n_shards == 1 && d.tokenizer_hash == 0x1122334455667788ull, "%d tokens", (int)d.n_tokens);
    CHECK(d.shards[0].width == (wide ? 4 : 2) && d.shards[0].map_bytes == 1024 + 101u * (wide ? 4 : 2), "width %d", d.shards[0].width);
    CHECK(loader_blocks(&d, 10) == 10 && loader_blocks(&d, 11) == 9 && loader_blocks(&d, 100) == 1, "blocks");
    for (uint64_t k = 0; k < 5; k++) {
      loader_batch(&d, k, &b);
      for (int i = 0; i < 20; i++) {
        int at = (int)k * 20 + i;
        CHECK(b.tokens[i] == ids[at], "token %d: %d, wanted %d", at, b.tokens[i], ids[at]);
        CHECK(b.targets[i] == (ids[at] == 5 ? IGNORE : ids[at + 1]), "target %d: %d", at, b.targets[i]);
      }
    }
    loader_free(&d);
    batch_free(&b);
  }

  // The bytes of a small shard, and the same file as llm.c writes it: three words and zeros.
  static const int three[] = {1, 258, 65535};
  static const unsigned char want[] = {1, 0, 2, 1, 255, 255};
  size_t len;
  const char *dir = test_dir();
  put_shard_(dir, "b.bin", three, 3, 65536, -1);
  char *file = read_file(shard_path_, &len);
  CHECK(len == 1030 && memcmp(file + 1024, want, 6) == 0, "payload of %zu bytes", len);
  CHECK(get_u32_((unsigned char *)file) == 20240520 && file[4] == 1 && file[8] == 3, "header");
  CHECK(get_u32_((unsigned char *)file + 24) == crc32_bytes(0, want, 6) && get_u32_((unsigned char *)file + 28) == 0, "our words");
  memset(file + 12, 0, 1024 - 12);
  put_file_(dir, "c.bin", file, len);
  path_join(shard_path_, sizeof shard_path_, dir, "c.bin");
  DataLoader d;
  Batch b;
  batch_alloc(&b, 1, 2);
  loader_open_shards(&d, shard_path_, 65536, -1, 1, 1);
  loader_batch(&d, 0, &b);
  CHECK(b.tokens[0] == 1 && b.tokens[1] == 258 && b.targets[1] == 65535 && d.tokenizer_hash == 0, "llm.c's file");
  batch_free(&b);
  loader_free(&d);
  free(file);
}

// One block of T tokens and the wanted positions, written as digits; E is token 9.
static void check_packing_(const char *text, int eot, const char *pos, const char *start, const char *targets) {
  int ids[32], T = (int)strlen(text) - 1;
  DataLoader d;
  Batch b;
  for (int i = 0; i <= T; i++) ids[i] = text[i] == 'E' ? 9 : text[i] - 'A' + 10;
  put_shard_(test_dir(), "p.bin", ids, (size_t)T + 1, 50, eot);
  loader_open_shards(&d, shard_path_, 50, eot, 1, 1);
  batch_alloc(&b, 1, T);
  loader_batch(&d, 0, &b);
  size_t n = 0;
  for (int i = 0; i < T; i++) {
    int want = targets[i] == '.' ? IGNORE : targets[i] == 'E' ? 9 : targets[i] - 'A' + 10;
    CHECK(b.tokens[i] == ids[i], "%s: token %d is %d", text, i, b.tokens[i]);
    CHECK(b.pos[i] == pos[i] - '0' && b.start[i] == start[i] - '0', "%s: at %d pos %d start %d", text, i, b.pos[i], b.start[i]);
    CHECK(b.targets[i] == want, "%s: target %d is %d, wanted %d", text, i, b.targets[i], want);
    n += want != IGNORE;
  }
  CHECK(b.n_targets == n, "%s: n_targets %zu", text, b.n_targets);
  batch_free(&b);
  loader_free(&d);
}

// The table of specs/data_pipeline.md, section 2; the last letter is only a target.
static void test_shard_packing(void) {
  check_packing_("ABCEDFEG", 9, "0123012", "0000444", "BCE.FE.");
  check_packing_("EEEA", 9, "000", "012", "...");
  check_packing_("EEEEEE", 9, "00000", "01234", ".....");
  check_packing_("ABCDF", 9, "0123", "0000", "BCDF");
  check_packing_("EABC", 9, "001", "011", ".BC");
  check_packing_("ABE", 9, "01", "00", "BE");        // E just behind the block: still a target
  check_packing_("ABEC", 9, "012", "000", "BE.");    // E last in the block: its target is masked
  check_packing_("AB", 9, "0", "0", "B");
  check_packing_("EA", 9, "0", "0", ".");
  check_packing_("ABCEDFEG", -1, "0123456", "0000000", "BCEDFEG");   // no end-of-text token is known: one document
}

// Three files: two full, one too short for a block. Token values are unique, so a block is known by its first token.
static void test_shard_order(void) {
  static const int sizes[] = {101, 9, 61};
  const char *dir = test_dir();
  int ids[101], next = 0;
  char pattern[4096];
  for (int f = 0; f < 3; f++) {
    char name[32];
    snprintf(name, sizeof name, "s_%d.bin", f);
    for (int i = 0; i < sizes[f]; i++) ids[i] = next++;
    put_shard_(dir, name, ids, (size_t)sizes[f], 200, -1);
  }
  path_join(pattern, sizeof pattern, dir, "s_*.bin");
  DataLoader d, plain;
  Batch b, c;
  loader_open_shards(&d, pattern, 200, -1, 11, 1);
  loader_open_shards(&plain, pattern, 200, -1, 11, 0);
  CHECK(d.n_shards == 3 && d.n_tokens == 171 && loader_blocks(&d, 10) == 16, "%d shards", (int)d.n_shards);
  // A batch of 3 rows: 16 blocks do not divide by it, so batches cross epochs.
  int B = 3, order[4][16];
  batch_alloc(&b, B, 10);
  batch_alloc(&c, B, 10);
  for (uint64_t row = 0; row < 64; row++) {
    loader_batch(&d, row / 3, &b);
    order[row / 16][row % 16] = b.tokens[row % 3 * 10];
    for (int t = 0; t < 10; t++) {
      int *at = b.tokens + row % 3 * 10;
      CHECK(at[t] == at[0] + t && b.targets[row % 3 * 10 + (size_t)t] == at[0] + t + 1, "a block is not contiguous");
    }
  }
  for (int e = 0; e < 4; e++) {
    int seen[16] = {0}, hits = 0;
    for (int i = 0; i < 16; i++) {
      int first = order[e][i], block = first < 101 ? first / 10 : 10 + (first - 110) / 10;
      CHECK(first < 101 ? first % 10 == 0 && first < 100 : first >= 110 && first % 10 == 0 && first < 170, "a block starts at %d",
            first);
      if (block >= 0 && block < 16 && !seen[block]++) hits++;
    }
    CHECK(hits == 16, "epoch %d: %d of 16 blocks", e, hits);
    for (int f = 0; f < e; f++) CHECK(memcmp(order[e], order[f], sizeof order[e]) != 0, "epochs %d and %d have one order", e, f);
  }
  // Without shuffling: the order of the files, each epoch.
  for (uint64_t row = 0; row < 33; row++) {
    loader_batch(&plain, row / 3, &b);
    int block = (int)(row % 16), want = block < 10 ? block * 10 : 110 + (block - 10) * 10;
    CHECK(b.tokens[row % 3 * 10] == want, "block %d starts at %d", block, b.tokens[row % 3 * 10]);
  }
  // Any order of access, and a loader that never saw the others, give the same.
  DataLoader e;
  loader_open_shards(&e, pattern, 200, -1, 11, 1);
  loader_batch(&d, 1000000007, &b);
  loader_batch(&d, 5, &b);
  alloc_guard = 1;   // a batch asks for no memory
  loader_batch(&e, 5, &c);
  alloc_guard = 0;
  CHECK(same_batch_(&b, &c), "batch 5 depends on what was asked before");
  e.seed = 12;
  int differs = 0;
  for (uint64_t k = 0; k < 5; k++) {
    loader_batch(&d, k, &b);
    loader_batch(&e, k, &c);
    differs |= !same_batch_(&b, &c);
  }
  CHECK(differs, "the seed changes nothing");
  batch_free(&b);
  batch_free(&c);
  loader_free(&d);
  loader_free(&e);
  loader_free(&plain);
}

// What a child opens and reads.
typedef struct {
  const char *pattern;
  int vocab, eot, T;
} OpenArgs_;

static void open_shards_(void *arg) {
  const OpenArgs_ *p = (const OpenArgs_ *)arg;
  DataLoader d;
  Batch b;
  loader_open_shards(&d, p->pattern, p->vocab, p->eot, 1, 1);
  batch_alloc(&b, 1, p->T);
  loader_batch(&d, 0, &b);
}

static void check_tokenizer_(void *arg) {
  DataLoader d;
  Tokenizer t;
  tokenizer_arithmetic(&t);
  loader_open_shards(&d, (const char *)arg, 50, 9, 1, 1);
  loader_check_tokenizer(&d, &t);
}

static void write_bad_id_(void *arg) {
  static const int ids[] = {1, 2, 50};
  shard_write((const char *)arg, ids, 3, 50, 0, -1);
}

static void test_shard_refuses(void) {
  int ids[100];
  size_t len;
  char dir[512], path[4096];
  snprintf(dir, sizeof dir, "%s", test_dir());
  for (int i = 0; i < 100; i++) ids[i] = i % 50;
  put_shard_(dir, "good.bin", ids, 100, 50, 9);
  char *good = read_file(shard_path_, &len), *bad = (char *)xmalloc(len + 2);
  path_join(path, sizeof path, dir, "bad.bin");
  OpenArgs_ args = {path, 50, 9, 10};

  // One change each: a 32-bit word of the file at an offset; without the CRC where the CRC would speak first.
  static const struct { const char *name; size_t offset; uint32_t value; int keep_crc; size_t cut; const char *words; } cases[] = {
    {"magic", 0, 123, 1, 0, "bad.bin|word 0|20240520|found 123"},
    {"version", 4, 2, 1, 0, "word 1|expected 1, found 2"},
    {"version of the other width", 0, 20240801, 1, 0, "word 1|expected 7, found 1"},
    {"count too large", 8, 101, 1, 0, "cut off|1226|1224"},
    {"count too small", 8, 99, 1, 0, "too long|1222"},
    {"count negative", 8, 0xFFFFFFFFu, 1, 0, "word 2|4294967295"},
    {"truncated by a byte", 0, 20240520, 1, 1, "cut off|1223"},
    {"truncated to the header", 0, 20240520, 1, 200, "cut off|1024"},
    {"truncated inside the header", 0, 20240520, 1, 201, "header|1023"},
    {"a changed token", 1024, 7, 1, 0, "CRC-32"},
    {"id outside of the vocabulary", 1024 + 20, 50u << 16 | 3, 0, 0, "offset 1046, token 11|50, found 50"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    memcpy(bad, good, len);
    put_u32_((unsigned char *)bad + cases[i].offset, cases[i].value);
    if (!cases[i].keep_crc) put_u32_((unsigned char *)bad + 24, 0);
    put_file_(dir, "bad.bin", bad, len - cases[i].cut);
    CHECK(refused_(open_shards_, &args, EXIT_DAMAGED, cases[i].words), "%s", cases[i].name);
  }
  memcpy(bad, good, len);
  memset(bad + len, 0, 2);
  put_file_(dir, "bad.bin", bad, len + 2);
  CHECK(refused_(open_shards_, &args, EXIT_DAMAGED, "too long"), "two bytes more");
  put_file_(dir, "bad.bin", bad, 0);
  CHECK(refused_(open_shards_, &args, EXIT_DAMAGED, "1024"), "empty file");

  // The user's mistakes: exit 2.
  put_file_(dir, "bad.bin", good, len);
  char err[256];
  CHECK(run_child(open_shards_, &args, err, sizeof err) == 0, "the good file is refused: %s", err);
  args.vocab = 49;
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "vocabulary of 50|49"), "smaller model vocabulary");
  args.vocab = 64;
  CHECK(run_child(open_shards_, &args, err, sizeof err) == 0, "padded vocabulary refused: %s", err);
  args.eot = 8;
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "token 9|8"), "other end-of-text token");
  args.eot = 9;
  args.T = 100;
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "needs 101 tokens|has 100"), "too little data");
  args.T = 99;
  CHECK(run_child(open_shards_, &args, err, sizeof err) == 0, "exactly one block: %s", err);
  args.pattern = "/nonexistent/*.bin";
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "/nonexistent/*.bin"), "no match");
  args.pattern = dir;
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "not a file"), "a directory");
  CHECK(refused_(check_tokenizer_, path, EXIT_USAGE, "tokenizer hash|1122334455667788"), "other tokenizer");
  path_join(path, sizeof path, dir, "new.bin");
  CHECK(refused_(write_bad_id_, path, EXIT_USAGE, "token 2|50") && !is_file(path), "wrote an id outside of the vocabulary");
  // Two files of different tokenizers.
  put_shard_(dir, "t_1.bin", ids, 100, 50, 9);
  path_join(path, sizeof path, dir, "t_2.bin");
  shard_write(path, ids, 100, 50, 77, 9);
  path_join(path, sizeof path, dir, "t_?.bin");
  args.pattern = path;
  args.T = 10;
  CHECK(refused_(open_shards_, &args, EXIT_USAGE, "t_1.bin|t_2.bin|different tokenizers"), "mixed tokenizers");
  free(good);
  free(bad);
}

#define DATA_TESTS                                                                                                 \
  {"tokenizer_arithmetic", "character vocabulary: ids, round trips, unknown characters", test_tokenizer_arithmetic},  \
  {"tokenizer_utf8", "edges of well-formed UTF-8", test_tokenizer_utf8},                                           \
  {"tokenizer_files", "tokenizer.json written and read, escapes, roles", test_tokenizer_files},                    \
  {"tokenizer_refuses", "damaged and foreign tokenizer files", test_tokenizer_refuses},                            \
  {"permute", "a permutation at every size", test_permute},                                                        \
  {"arithmetic_problems", "enumeration, texts, longest row, held-out list", test_arithmetic_problems},             \
  {"arithmetic_holdout", "a problem's side depends on its text alone", test_arithmetic_holdout},                   \
  {"arithmetic_batches", "rows, targets, train set without held-out, pure function", test_arithmetic_batches},     \
  {"arithmetic_drafts", "rows with a draft: how many, how wrong, which width", test_arithmetic_drafts},            \
  {"arithmetic_heldout_batches", "held-out problems as batches, the last one filled with padding",                   \
   test_arithmetic_heldout_batches},                                                                               \
  {"arithmetic_refuses", "options that make no sense", test_arithmetic_refuses},                                   \
  {"shard_round_trip", "uint16 and uint32, llm.c's header", test_shard_round_trip},                                \
  {"shard_packing", "document starts, positions, masked boundary targets", test_shard_packing},                    \
  {"shard_order", "every block once an epoch, any access order", test_shard_order},                                \
  {"shard_refuses", "damaged files exit 3, mistakes exit 2", test_shard_refuses}

#endif
