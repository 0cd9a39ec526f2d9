/*
test_tokenizer.h: tests of the tokenizers for text: unicode.h, bpe.h, and the byte-level and SentencePiece parts of tokenizer.h.

The small tokenizers are made here, with ids worked out by hand. The released vocabularies are not ours to ship: where the
folder $BITNET_DATA (or ../shared/data) has them, their published test vectors are checked, too.
Read before: check.h, test_data.h (its helpers), tokenizer.h.
Defines:     TOKENIZER_TESTS, the rows for the table of tests.
*/
#ifndef TEST_TOKENIZER_H
#define TEST_TOKENIZER_H

#include "../../tokenizer.h"
#include "check.h"
#include "test_data.h"

// ---------------------------------------------------------------------------------------------------------
// Characters.

static void test_unicode_classes(void) {
  enum { O = CLASS_OTHER, L = CLASS_LETTER, N = CLASS_NUMBER, S = CLASS_SPACE };
  static const struct { uint32_t c; int class_;
  } cases[] = {{'a', L},     {'Z', L},     {'@', O},      {'[', O},     {'0', N},    {'9', N},    {'/', O},     {':', O},
               {'\t', S},    {0x0D, S},    {0x0E, O},     {0x1C, O},    {0x1F, O},   {0x85, S},   {0xA0, S},    {0xAA, L},
               {0xB2, N},    {0xD7, O},    {0x300, O},    {0x416, L},   {0x663, N},  {0x1680, S}, {0x180E, O},  {0x200B, O},
               {0x2028, S},  {0x2167, N},  {0x3000, S},   {0x4E2D, L},  {0xE000, O}, {0xFEFF, O}, {0x105C0, L}, {0x1D7CE, N},
               {0x1F600, O}, {0x323AF, L}, {0x10FFFF, O}, {BAD_BYTE, O}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int got = unicode_class(cases[i].c);
    CHECK(got == cases[i].class_, "U+%04X: class %d, wanted %d", cases[i].c, got, cases[i].class_);
  }
  // Unicode 16's totals, without the surrogates. Digits counts 13 characters more than \p{N}.
  size_t count[4] = {0, 0, 0, 0}, digits = 0;
  for (uint32_t c = 0; c < BAD_BYTE; c++) {
    if (c >= 0xD800 && c < 0xE000) continue;
    count[unicode_class(c)]++;
    digits += (size_t)unicode_is_digit(c);
  }
  CHECK(count[CLASS_LETTER] == 141028 && count[CLASS_NUMBER] == 1911 && count[CLASS_SPACE] == 25,
        "%zu letters, %zu numbers, %zu spaces",
        count[CLASS_LETTER], count[CLASS_NUMBER], count[CLASS_SPACE]);
  CHECK(digits == 1911 + 13, "%zu digits", digits);
}

// 1 if the composed form of a is b.
static int composes_(const char *a, size_t n, const char *b, size_t m) {
  StrBuf out = {NULL, 0, 0};
  strbuf_append(&out, "", 0);
  unicode_nfc(a, n, &out);
  int ok = out.len == m && memcmp(out.data, b, m) == 0;
  strbuf_free(&out);
  return ok;
}

static void test_unicode_nfc(void) {
  static const struct { const char *from, *to; } cases[] = {
    {"", ""}, {"plain", "plain"}, {"\xC3\xA9", "\xC3\xA9"}, {"e\xCC\x81", "\xC3\xA9"},   // e + acute
    {"xe\xCC\x81y", "x\xC3\xA9y"}, {"\xCC\x81" "e", "\xCC\x81" "e"},   // a mark without a base
    {"\xE2\x84\xAB", "\xC3\x85"},   // the sign for Angstrom
    {"u\xCC\x88\xCC\x84", "\xC7\x96"}, {"\xC3\xBC\xCC\x84", "\xC7\x96"},   // u + dots + bar, in two steps
    {"u\xCC\x84\xCC\x88", "\xE1\xB9\xBB"},                      // the other order is another character
    {"a\xCC\x81\xCC\xA3", "\xE1\xBA\xA1\xCC\x81"},              // a dot below goes before an accent above
    {"a\xCC\xA3\xCC\x81", "\xE1\xBA\xA1\xCC\x81"},
    {"a\xCC\x80\xCC\x81", "\xC3\xA0\xCC\x81"},                  // two marks of one class: only the first joins
    {"a\xCC\x85\xCC\x81", "a\xCC\x85\xCC\x81"},                   // and none if the first one stays
    {"a\xD6\xAE\xCC\x81", "\xC3\xA1\xD6\xAE"},                  // a mark of another class does not block
    {"\xE0\xA5\x98", "\xE0\xA4\x95\xE0\xA4\xBC"},   // taken apart and never joined
    {"\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", "\xEA\xB0\x81"}, {"\xEA\xB0\x80\xE1\x86\xA8", "\xEA\xB0\x81"},   // Hangul
    {"\xE0\xA7\x87\xE0\xA6\xBE", "\xE0\xA7\x8B"},   // joins although its class is 0
    {"\xFF" "e\xCC\x81\xC3", "\xFF\xC3\xA9\xC3"}, {"\xFF\xCC\x81", "\xFF\xCC\x81"}};   // broken bytes stay
  for (size_t i = 0; i < ARRAY_LEN(cases); i++)
    CHECK(composes_(cases[i].from, strlen(cases[i].from), cases[i].to, strlen(cases[i].to)), "case %zu", i);

  // A long run of marks is sorted in n log n: accents and dots below take turns, and come out apart.
  size_t half = 300000, at = 0;
  char *many = (char *)xmalloc(1 + 4 * half), *sorted = (char *)xmalloc(4 * half + 3);
  many[at++] = 'q';
  for (size_t i = 0; i < half; i++, at += 4) memcpy(many + at, "\xCC\x81\xCC\xA3", 4);
  sorted[0] = 'q';
  for (size_t i = 0; i < half; i++) memcpy(sorted + 1 + 2 * i, "\xCC\xA3", 2);
  for (size_t i = 0; i < half; i++) memcpy(sorted + 1 + 2 * half + 2 * i, "\xCC\x81", 2);
  CHECK(composes_(many, at, sorted, at), "a long run of marks");
  free(many);
  free(sorted);
}

// ---------------------------------------------------------------------------------------------------------
// Cutting and merging.

// The pieces of text, joined with "|".
static int splits_(int split, const char *text, const char *want) {
  char got[256] = "";
  size_t n = strlen(text);
  for (size_t at = 0, end; at < n; at = end) {
    end = bpe_next(split, text, at, n);
    snprintf(got + strlen(got), sizeof got - strlen(got), "%s%.*s", at ? "|" : "", (int)(end - at), text + at);
  }
  if (strcmp(got, want) != 0) printf("    '%s'\n    '%s' wanted\n", got, want);
  return strcmp(got, want) == 0;
}

static void test_bpe_split(void) {
  static const struct { const char *text, *gpt2, *llama3; } cases[] = {
    {"Hello world", "Hello| world", "Hello| world"},
    {"I'll don't 'Tis x's", "I|'ll| don|'t| '|Tis| x|'s", "I|'ll| don|'t| '|Tis| x|'s"},
    {"'Tis", "'|Tis", "'T|is"},
    {"WE'RE", "WE|'|RE", "WE|'RE"},
    {"it'\xC5\xBF", "it|'|\xC5\xBF", "it|'\xC5\xBF"},                    // the long s
    {"a1234b", "a|1234|b", "a|123|4|b"},
    {" 12 3", " 12| 3", " |12| |3"},
    {"x  y", "x| | y", "x| | y"},
    {"x   ", "x|   ", "x|   "},
    {"x \n y", "x| \n| y", "x| \n| y"},
    {"x\n\n  y", "x|\n\n | y", "x|\n\n| | y"},
    {"x\r\n\ty", "x|\r\n|\t|y", "x|\r\n|\ty"},
    {"(word", "(|word", "(word"},
    {" (word)\n\nnext", " (|word|)|\n|\n|next", " (|word|)\n\n|next"},
    {"!!\n", "!!|\n", "!!\n"},
    {"\xC3\xA9t\xC3\xA9 \xD0\xB6", "\xC3\xA9t\xC3\xA9| \xD0\xB6", "\xC3\xA9t\xC3\xA9| \xD0\xB6"},
    {"e\xCC\x81x", "e|\xCC\x81|x", "e|\xCC\x81x"},                       // a combining mark is none of the classes
    {"\xFF\xFE" "a", "\xFF\xFE|a", "\xFF\xFE|a"},                        // nor is a broken byte
    {"\xC2\xA0x", "\xC2\xA0|x", "\xC2\xA0x"},
    {"a\xE3\x80\x80 b", "a|\xE3\x80\x80| b", "a|\xE3\x80\x80| b"},
    {"'", "'", "'"}, {" ", " ", " "}, {" '", " '", " '"}, {"'r", "'|r", "'r"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    CHECK(splits_(SPLIT_GPT2, cases[i].text, cases[i].gpt2), "GPT-2, case %zu", i);
    CHECK(splits_(SPLIT_LLAMA3, cases[i].text, cases[i].llama3), "Llama-3, case %zu", i);
  }
  CHECK(splits_(SPLIT_QWEN2, "a1234\xD9\xA3", "a|1|2|3|4|\xD9\xA3"), "Qwen2: single numbers");
  CHECK(splits_(SPLIT_BLANKS, " a  b c ", " a|  b| c| "), "blanks");
  CHECK(splits_(SPLIT_NONE, " a  b", " a  b"), "no cuts");
}

// The definition: look at all pairs, join the best, start again.
static size_t merge_slowly_(const Bpe *b, int *id, size_t n) {
  for (;;) {
    const BpePair *best = NULL;
    size_t at = 0;
    for (size_t i = 0; i + 1 < n; i++) {
      const BpePair *p = bpe_find(b, id[i], id[i + 1]);
      if (p && (best == NULL || p->rank < best->rank)) {
        best = p;
        at = i;
      }
    }
    if (best == NULL) return n;
    id[at] = best->joined;
    memmove(id + at + 1, id + at + 2, (n - at - 2) * sizeof *id);
    n--;
  }
}

static void test_bpe_merge(void) {
  Bpe b;
  int want[200];
  // Random merges over 4 letters, some with equal ranks; results may be joined again.
  bpe_begin(&b, 60);
  for (int i = 0; i < 60; i++) {
    int left = (int)rng_below(1, RNG_TEST, (uint64_t)i * 3, (uint64_t)(4 + i)), right = (int)rng_below(1, RNG_TEST,
                                                                                                       (uint64_t)i * 3 + 1,
                                                                                                         (uint64_t)(4 + i));
    bpe_add(&b, left, right, 4 + i, (uint32_t)rng_below(1, RNG_TEST, (uint64_t)i * 3 + 2, 40));
  }
  CHECK(bpe_find(&b, 0, 70) == NULL, "a pair that was never added");
  size_t shorter = 0;
  for (uint64_t k = 0; k < 3000; k++) {
    size_t n = (size_t)rng_below(2, RNG_TEST, k, 200);
    bpe_room(&b, n);
    for (size_t i = 0; i < n; i++) b.id[i] = want[i] = (int)rng_below(3, RNG_TEST, k << 8 | i, 4);
    size_t wanted = merge_slowly_(&b, want, n), got = bpe_merge(&b, n);
    CHECK(got == wanted && memcmp(b.id, want, got * sizeof(int)) == 0, "text %d: %zu tokens, wanted %zu", (int)k, got, wanted);
    shorter += got < n;
  }
  CHECK(shorter > 2000, "only %zu texts had anything to join", shorter);
  bpe_free(&b);

  // A word of four million letters: a loop over all pairs for each merge would take days. 2^22 letters join to 2^22 / 2^10.
  size_t n = (size_t)1 << 22;
  bpe_begin(&b, 10);
  for (int i = 0; i < 10; i++) bpe_add(&b, i, i, i + 1, (uint32_t)i);
  bpe_room(&b, n);
  memset(b.id, 0, n * sizeof(int));
  double t0 = time_now();
  size_t got = bpe_merge(&b, n);
  CHECK(got == n >> 10 && b.id[0] == 10 && b.id[got - 1] == 10, "%zu tokens", got);
  CHECK(time_now() - t0 < 60, "%.1f s for a long word", time_now() - t0);
  bpe_free(&b);
}

// The cache is emptied when it is full, and never gives one word's tokens to another.
static void test_bpe_cache(void) {
  Bpe b;
  size_t n, found = 0;
  char word[32];
  bpe_begin(&b, 1);
  for (int i = 0; i < 3 * BPE_CACHE_SLOTS; i++) {
    int ids[2] = {i, -i};
    size_t len = (size_t)snprintf(word, sizeof word, "w%d", i);
    uint64_t hash = hash_bytes(word, len);
    CHECK(bpe_cached(&b, word, len, hash, &n) == NULL, "%s was never remembered", word);
    bpe_remember(&b, word, len, hash, ids, 1 + (size_t)(i & 1));
    CHECK(b.n_words <= BPE_CACHE_SLOTS / 2 && b.text_used <= BPE_CACHE_TEXT && b.ids_used <= BPE_CACHE_TEXT, "overfull");
  }
  for (int i = 0; i < 3 * BPE_CACHE_SLOTS; i++) {
    size_t len = (size_t)snprintf(word, sizeof word, "w%d", i);
    const int *ids = bpe_cached(&b, word, len, hash_bytes(word, len), &n);
    CHECK(ids == NULL || (n == 1 + (size_t)(i & 1) && ids[0] == i && (n == 1 || ids[1] == -i)), "%s", word);
    found += ids != NULL;
  }
  CHECK(found == b.n_words && found > 0, "%zu found, %zu there", found, b.n_words);
  // Equal hashes are told apart by their bytes.
  int one[] = {1};
  bpe_remember(&b, "ab", 2, 77, one, 1);
  CHECK(bpe_cached(&b, "cd", 2, 77, &n) == NULL && bpe_cached(&b, "ab", 2, 77, &n) != NULL, "equal hashes");
  bpe_free(&b);
}

// ---------------------------------------------------------------------------------------------------------
// Byte-level tokenizers.

#define BYTE_LEVEL_ "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"
#define SPLIT_JSON_(regex)                                                                                  \
  "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex           \
  "\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]}"
#define LLAMA3_REGEX_                                                                                       \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}|"                     \
  " ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

// GPT-2's character for a byte.
static void put_alias_(StrBuf *b, int byte) {
  char utf8[4];
  for (uint32_t c = 33; c < 256 + 68; c++) {
    if (alphabet_byte_(c) == byte) strbuf_append(b, utf8, utf8_put_(utf8, c));
  }
}

/*
A byte-level tokenizer.json of 256 bytes (id = byte) and the results of these merges, "left right" in the alphabet of the file,
separated by ";". added, normalizer, pre and model are JSON; NULL or "" for the usual ones.
*/
static void put_byte_level_(const char *dir, const char *merges, const char *added, const char *normalizer, const char *pre,
                            const char *model) {
  StrBuf b = {NULL, 0, 0}, list = {NULL, 0, 0};
  char copy[512];
  strbuf_append(&list, "", 0);
  snprintf(copy, sizeof copy, "%s", merges);
  strbuf_printf(&b, "{\"version\":\"1.0\",\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,"
                "\"post_processor\":null,\"decoder\":{\"type\":"
                "\"ByteLevel\"},\"model\":{\"type\":\"BPE\",%s\"vocab\":{", added ? added : "", normalizer ? normalizer : "null",
                  pre ? pre : BYTE_LEVEL_,
                model ? model : "");
  for (int byte = 0; byte < 256; byte++) {
    StrBuf alias = {NULL, 0, 0};
    put_alias_(&alias, byte);
    strbuf_printf(&b, "%s", byte ? "," : "");
    json_put_string(&b, alias.data, alias.len);
    strbuf_printf(&b, ":%d", byte);
    strbuf_free(&alias);
  }
  int id = 256;
  for (char *m = strtok(copy, ";"); m; m = strtok(NULL, ";"), id++) {
    char *blank = strchr(m, ' ');
    strbuf_printf(&list, "%s\"%s\"", id > 256 ? "," : "", m);
    strbuf_printf(&b, ",\"%.*s%s\":%d", (int)(blank - m), m, blank + 1, id);
  }
  strbuf_printf(&b, "},\"merges\":[%s]}}", list.data);
  put_file_(dir, "tokenizer.json", b.data, b.len);
  strbuf_free(&b);
  strbuf_free(&list);
}

#define ADDED_(id, content, special)                                                                        \
  "{\"id\":" #id ",\"content\":\"" content "\",\"single_word\":false,\"lstrip\":false,"                   \
  "\"rstrip\":false,\"normalized\":false,\"special\":" special "}"

// 256 he, 257 ll, 258 hell, 259 hello, 260 " w", 261 " wo", 262 ab; the special <end> and <end>>, and the plain <tool>.
#define SMALL_MERGES_ "h e;l l;he ll;hell o;\xC4\xA0 w;\xC4\xA0w o;a b"
#define SMALL_ADDED_ ADDED_(263, "<end>", "true") "," ADDED_(264, "<end>>", "true") "," ADDED_(265, "<tool>", "false")

// 1 if text encodes to the ids that are written out in want, "1 2 3".
static int encodes_(const Tokenizer *t, const char *text, size_t len, int marks, const char *want) {
  int ids[512];
  StrBuf got = {NULL, 0, 0};
  strbuf_append(&got, "", 0);
  size_t n = marks ? tokenizer_encode_marks(t, text, len, ids, 512) : tokenizer_encode(t, text, len, ids, 512);
  for (size_t i = 0; i < n && i < 512; i++) strbuf_printf(&got, "%s%d", i ? " " : "", ids[i]);
  int ok = strcmp(got.data, want) == 0;
  if (!ok) printf("    got    %s\n    wanted %s\n", got.data, want);
  strbuf_free(&got);
  return ok;
}

// 1 if decode(encode(text)) is text, with and without special tokens as ids (which decode to nothing).
static int comes_back_(const Tokenizer *t, const char *text, size_t len) {
  int *ids = (int *)xmalloc((len + 2) * sizeof(int));
  StrBuf out = {NULL, 0, 0};
  size_t n = tokenizer_encode(t, text, len, ids, len + 2);
  tokenizer_decode_text(t, ids, n, &out);
  int ok = out.len == len && memcmp(out.data, text, len) == 0;
  strbuf_free(&out);
  free(ids);
  return ok;
}

static void test_tokenizer_bytes(void) {
  const char *dir = test_dir();
  Tokenizer t;
  put_byte_level_(dir, SMALL_MERGES_, SMALL_ADDED_, NULL, NULL, NULL);
  tokenizer_load(&t, dir);
  CHECK(t.kind == TOKENIZER_BYTES && t.split == SPLIT_GPT2 && t.vocab_size == 266 && t.unk_id == -1 && t.n_added == 3 &&
        t.n_plain == 1, "loaded");
  CHECK(encodes_(&t, "hello world", 11, 0, "259 261 114 108 100"), "words");
  CHECK(encodes_(&t, "hhell", 5, 0, "104 258"), "ranks");
  CHECK(encodes_(&t, " \n\xC3\xA9\xFF", 5, 0, "32 10 195 169 255"), "bytes");
  CHECK(encodes_(&t, "", 0, 1, ""), "empty");
  CHECK(tokenizer_id(&t, " wo", 3) == 261, "pieces are kept as their bytes");

  // Special tokens are text unless asked for, the longest wins; other added tokens are always found; nothing merges across.
  CHECK(encodes_(&t, "a<end>b", 7, 0, "97 60 101 110 100 62 98"), "special token as text");
  CHECK(encodes_(&t, "a<end>b", 7, 1, "97 263 98"), "special token as id");
  CHECK(encodes_(&t, "<end>><end><end", 15, 1, "264 263 60 101 110 100"), "longest first, unfinished at the end");
  CHECK(encodes_(&t, "a<tool>b", 8, 0, "97 265 98") && encodes_(&t, "ab", 2, 0, "262"), "added token");
  static const int mixed[] = {263, 259, 265, -1, 5000, 261, 264};
  StrBuf out = {NULL, 0, 0};
  tokenizer_decode(&t, mixed, 7, &out);
  CHECK(strcmp(out.data, "hello<tool> wo") == 0, "decoded to '%s'", out.data);
  strbuf_free(&out);

  // Only cap ids are written, in the middle of a word, too.
  int ids[4] = {-7, -7, -7, -7};
  CHECK(tokenizer_encode(&t, "hello world", 11, ids, 3) == 5 && ids[2] == 114 && ids[3] == -7, "cap");
  CHECK(tokenizer_encode(&t, "hello world", 11, NULL, 0) == 5, "counting");
  for (uint64_t k = 0; k < 300; k++) {
    char junk[300];
    size_t n = (size_t)rng_below(5, RNG_TEST, k, sizeof junk);
    for (size_t i = 0; i < n; i++) junk[i] = (char)rng_below(6, RNG_TEST, k << 10 | i, k % 2 ? 256 : 128);
    CHECK(comes_back_(&t, junk, n), "random bytes %d", (int)k);
  }
  // A megabyte without a blank is one word.
  char *word = (char *)xmalloc(1 << 20);
  memset(word, 'l', 1 << 20);
  double t0 = time_now();
  CHECK(comes_back_(&t, word, 1 << 20) && tokenizer_encode(&t, word, 1 << 20, NULL, 0) == 1 << 19, "a long word");
  CHECK(time_now() - t0 < 60, "%.1f s", time_now() - t0);
  free(word);

  // What was read is written back byte for byte, and a file made of nothing is not.
  size_t n, m;
  char path[4096];
  const char *config = "{\"eos_token\": {\"content\": \"<end>\"}, \"chat_template\": \"{{ x }}\"}";
  put_file_(dir, "tokenizer_config.json", config, strlen(config));
  tokenizer_free(&t);
  tokenizer_load(&t, dir);
  char *original = (path_join(path, sizeof path, dir, "tokenizer.json"), read_file(path, &n)), copy_dir[512];
  snprintf(copy_dir, sizeof copy_dir, "%s", test_dir());
  CHECK(t.eos_id == 263 && tokenizer_save(&t, copy_dir) == 0, "save");
  char *copy = (path_join(path, sizeof path, copy_dir, "tokenizer.json"), read_file(path, &m));
  CHECK(copy && n == m && memcmp(original, copy, n) == 0, "tokenizer.json changed on the way");
  free(copy);
  copy = (path_join(path, sizeof path, copy_dir, "tokenizer_config.json"), read_file(path, &m));
  CHECK(copy && m == strlen(config) && memcmp(config, copy, m) == 0, "tokenizer_config.json changed on the way");
  free(copy);
  Tokenizer u;
  path_join(path, sizeof path, copy_dir, "tokenizer.json");
  tokenizer_load(&u, path);   // a file instead of its directory
  CHECK(tokenizer_hash(&t) == tokenizer_hash(&u) && u.eos_id == 263, "the copy is another tokenizer");
  tokenizer_free(&u);
  free(original);
  tokenizer_free(&t);
}

// The other pipelines.
static void test_tokenizer_pipelines(void) {
  Tokenizer t;
  const char *dir = test_dir();
  put_byte_level_(dir, "1 2;12 3;\xC4\xA0 (", NULL, NULL, SPLIT_JSON_(LLAMA3_REGEX_), NULL);
  tokenizer_load(&t, dir);
  CHECK(t.split == SPLIT_LLAMA3, "split %d", t.split);
  CHECK(encodes_(&t, "12312 (", 7, 0, "257 256 258"), "three numbers a piece");
  tokenizer_free(&t);

  put_byte_level_(dir, "1 2;\xC4\xA0 1;\xC4\xA0 \xC4\xA0", NULL, NULL,
                  "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true}," BYTE_LEVEL_ "]}",
                    NULL);
  tokenizer_load(&t, dir);
  CHECK(t.digits && t.split == SPLIT_GPT2, "split %d", t.split);
  CHECK(encodes_(&t, "12  1", 5, 0, "49 50 258 49"), "single digits; blanks before one end a text");
  CHECK(encodes_(&t, "x\xD9\xA3", 3, 0, "120 217 163"), "other scripts' digits");
  tokenizer_free(&t);

  // The whole word is in the vocabulary, but merging does not lead to it: "abc" = ab + c has no merge of its own.
  const char *whole = "\"ignore_merges\":true,";
  put_byte_level_(dir, "b c;a bc", NULL, NULL, NULL, whole);
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "abc abc", 7, 0, "257 32 257"), "by merges");
  tokenizer_free(&t);
  put_byte_level_(dir, "a b;b c;a bc", NULL, NULL, NULL, NULL);
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "abc", 3, 0, "256 99"), "ab comes first");
  tokenizer_free(&t);
  put_byte_level_(dir, "a b;b c;a bc", NULL, NULL, NULL, whole);
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "abc", 3, 0, "258"), "ignore_merges");
  tokenizer_free(&t);

  put_byte_level_(dir, "\xC3\x83 \xC2\xA9", NULL, "{\"type\":\"NFC\"}", NULL, NULL);
  tokenizer_load(&t, dir);
  CHECK(t.nfc && encodes_(&t, "e\xCC\x81", 3, 0, "256") && encodes_(&t, "\xC3\xA9", 2, 0, "256") && encodes_(&t, "e", 1, 0, "101"),
        "NFC");
  tokenizer_free(&t);

  // Merges as pairs; a template that puts a token in front; no "type".
  const char *dir2 = test_dir();
  const char *json = "{\"added_tokens\":[" ADDED_(3, "<s>",
                                                  "true") "],\"pre_tokenizer\":" BYTE_LEVEL_ ",\"decoder\":{\"type\":\"ByteLevel\"},"
    "\"post_processor\":{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},{\"type\":\"TemplateProcessing\","
    "\"single\":[{\"SpecialToken\":"
    "{\"id\":\"<s>\"}},{\"Sequence\":{\"id\":\"A\"}}]}]},\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[[\"a\",\"b\"]]}}";
  put_file_(dir2, "tokenizer.json", json, strlen(json));
  tokenizer_load(&t, dir2);
  CHECK(t.add_bos && !t.add_eos && encodes_(&t, "abba", 4, 0, "2 1 0"), "pairs");
  CHECK(encodes_(&t, "axb a b", 7, 0, "2 0 1"), "bytes that the vocabulary lacks are dropped, as the library drops them");
  tokenizer_free(&t);
}

// ---------------------------------------------------------------------------------------------------------
// SentencePiece.

#define BLOCK_ "\xE2\x96\x81"
#define SP_NORMALIZER_                                                                                      \
  "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"" BLOCK_ "\"},"              \
  "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"" BLOCK_ "\"}]}"
#define SP_DECODER_                                                                                         \
  "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"" BLOCK_            \
  "\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},"                                 \
  "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}"
#define METASPACE_(scheme) "{\"type\":\"Metaspace\",\"replacement\":\"" BLOCK_ "\",\"prepend_scheme\":\"" scheme "\",\"split\":false}"

// Ids 0 to 2 are marks, byte b is 3 + b, then 259 blank, 260 a, 261 b, 262 c, 263 ab, 264 blank a, 265 blank ab, 266 three
// blanks, 267 two blanks, 268 e with acute.
static void put_sentencepiece_(const char *dir, const char *normalizer, const char *pre, const char *more) {
  StrBuf b = {NULL, 0, 0};
  strbuf_printf(&b, "{\"added_tokens\":[" ADDED_(0, "<unk>", "true") "," ADDED_(1, "<s>", "true") "," ADDED_(2, "</s>", "true")
                "],\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":" SP_DECODER_ ",\"model\":{\"type\":\"BPE\","
                "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,\"vocab\":{\"<unk>\":0,\"<s>\":1,\"</s>\":2",
                normalizer, pre);
  for (int byte = 0; byte < 256; byte++) strbuf_printf(&b, ",\"<0x%02X>\":%d", byte, byte + 3);
  strbuf_printf(&b, ",\"" BLOCK_ "\":259,\"a\":260,\"b\":261,\"c\":262,\"ab\":263,\"" BLOCK_ "a\":264,\"" BLOCK_ "ab\":265,\""
                BLOCK_ BLOCK_ BLOCK_ "\":266,\"" BLOCK_ BLOCK_ "\":267,\"\xC3\xA9\":268%s},\"merges\":[\"a b\",\"" BLOCK_ " a\",\""
                BLOCK_ " ab\",\"" BLOCK_ "a b\",\"" BLOCK_ " " BLOCK_ "\",\"" BLOCK_ BLOCK_ " " BLOCK_ "\"]}}", more);
  put_file_(dir, "tokenizer.json", b.data, b.len);
  strbuf_free(&b);
}

static void test_tokenizer_sentencepiece(void) {
  const char *dir = test_dir();
  Tokenizer t;
  put_sentencepiece_(dir, SP_NORMALIZER_, "null", "");
  tokenizer_load(&t, dir);
  CHECK(t.kind == TOKENIZER_SENTENCEPIECE && t.split == SPLIT_BLANKS && t.vocab_size == 269 && t.unk_id == 0, "loaded");
  CHECK(encodes_(&t, "ab", 2, 0, "265") && encodes_(&t, "", 0, 0, ""), "a blank in front");
  CHECK(encodes_(&t, "ab ac", 5, 0, "265 264 262"), "words");
  CHECK(encodes_(&t, "  ab", 4, 0, "267 265"), "three blanks: the last one joins ab before the others join each other");
  CHECK(encodes_(&t, "   c", 4, 0, "267 267 262") && encodes_(&t, "  c", 3, 0, "266 262"), "lower ranks first, then leftmost");
  CHECK(encodes_(&t, "c\xC3\xA9\xE2\x82\xAC\n", 7, 0, "259 262 268 229 133 175 13"), "bytes of characters that are no piece");
  CHECK(encodes_(&t, "<0x41>", 6, 0, "259 63 51 123 55 52 65"), "the name of a byte token is plain text");
  CHECK(encodes_(&t, "a" BLOCK_ "a", 5, 0, "264 264"), "U+2581 is a blank");
  CHECK(encodes_(&t, "ab</s>ab", 8, 1, "265 2 265") && encodes_(&t, "</s>", 4, 0, "259 63 50 118 65"),
        "marks; each stretch gets its blank");
  CHECK(tokenizer_id(&t, "\n", 1) == -1, "byte tokens are no text");

  static const int ids[] = {1, 265, 264, 262, 13, 2};
  StrBuf out = {NULL, 0, 0};
  tokenizer_decode(&t, ids, 6, &out);
  CHECK(strcmp(out.data, " ab ac\n") == 0, "'%s'", out.data);
  out.len = 0;
  strbuf_append(&out, ">", 1);
  tokenizer_decode_text(&t, ids, 6, &out);
  CHECK(strcmp(out.data, ">ab ac\n") == 0 && out.len == 7, "'%s'", out.data);
  strbuf_free(&out);
  for (uint64_t k = 0; k < 200; k++) {
    char junk[100];
    size_t n = (size_t)rng_below(7, RNG_TEST, k, sizeof junk);
    for (size_t i = 0; i < n; i++) junk[i] = k % 2 ? (char)rng_below(8, RNG_TEST, k << 10 | i, 256) : "ab c"[rng_below(8, RNG_TEST,
                                                                                                                       k << 10 | i,
                                                                                                                         4)];
    CHECK(comes_back_(&t, junk, n), "random bytes %d", (int)k);
  }
  uint64_t hash = tokenizer_hash(&t);
  tokenizer_free(&t);

  // Metaspace: no second blank where there is one, and with "first" only at the beginning of the text.
  put_sentencepiece_(dir, "null", METASPACE_("first"), "");
  tokenizer_load(&t, dir);
  CHECK(tokenizer_hash(&t) == hash, "the same pieces, another hash");
  CHECK(encodes_(&t, "ab", 2, 0, "265") && encodes_(&t, " ab", 3, 0, "265") && encodes_(&t, "ab</s>ab", 8, 1, "265 2 263"), "first");
  CHECK(encodes_(&t, "</s>ab", 6, 1, "2 263"), "not at the beginning");
  tokenizer_free(&t);
  put_sentencepiece_(dir, "null", METASPACE_("always"), "");
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "ab</s>ab</s> ab", 15, 1, "265 2 265 2 265"), "always");
  tokenizer_free(&t);
  put_sentencepiece_(dir, "null", METASPACE_("never"), "");
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "ab ab", 5, 0, "263 265"), "never");
  tokenizer_free(&t);

  // A piece that crosses from a word into a blank forbids cutting there.
  put_sentencepiece_(dir, SP_NORMALIZER_, "null", ",\"b" BLOCK_ "\":269");
  tokenizer_load(&t, dir);
  CHECK(t.split == SPLIT_NONE && encodes_(&t, "ab ac", 5, 0, "265 264 262"), "split %d", t.split);
  tokenizer_free(&t);
}

// Appends a record of llama2.c's tokenizer.bin.
static void put_record_(StrBuf *b, float score, const char *piece) {
  char head[8];
  size_t len = strlen(piece);
  memcpy(head, &score, 4);
  for (int i = 0; i < 4; i++) head[4 + i] = (char)(len >> (8 * i) & 255);
  strbuf_append(b, head, 8);
  strbuf_append(b, piece, len);
}

// The same small tokenizer as a tokenizer.bin.
static void put_bin_(StrBuf *b) {
  static const char *const pieces[] = {"ab", " a", " ab", "  ", "   ", " ", "a", "b", "c", "\xC3\xA9"};
  strbuf_append(b, "\x06\0\0\0", 4);
  put_record_(b, 0, "<unk>");
  put_record_(b, 0, "\n<s>\n");
  put_record_(b, 0, "\n</s>\n");
  for (int byte = 0; byte < 256; byte++) {
    char name[8];
    snprintf(name, sizeof name, "<0x%02X>", byte);
    put_record_(b, 0, name);
  }
  for (size_t i = 0; i < ARRAY_LEN(pieces); i++) put_record_(b, -(float)i, pieces[i]);   // ids from 259 on
}

static void test_tokenizer_bin(void) {
  StrBuf b = {NULL, 0, 0};
  char dir[512], path[4096];
  Tokenizer t, u;
  put_bin_(&b);
  snprintf(dir, sizeof dir, "%s", test_dir());
  put_file_(dir, "tokenizer.bin", b.data, b.len);
  tokenizer_load(&t, dir);
  CHECK(t.vocab_size == 269 && t.unk_id == 0 && t.bos_id == 1 && t.eos_id == 2 && t.add_bos && t.split == SPLIT_BLANKS, "loaded");
  CHECK(encodes_(&t, "ab ac", 5, 0, "261 260 267") && encodes_(&t, "    c", 5, 0, "262 263 267"), "scores");
  CHECK(encodes_(&t, "\xC3\xA9\xFF", 3, 0, "264 268 258"), "bytes");
  path_join(path, sizeof path, dir, "tokenizer.bin");
  tokenizer_load(&u, path);
  CHECK(tokenizer_hash(&t) == tokenizer_hash(&u), "a file and its directory");
  tokenizer_free(&u);

  // Written as a tokenizer.json it is the same tokenizer; that file then comes before the .bin.
  CHECK(tokenizer_save(&t, dir) == 0, "save");
  tokenizer_load(&u, dir);
  CHECK(u.file.len > 0 && tokenizer_hash(&t) == tokenizer_hash(&u) && u.bos_id == 1 && u.eos_id == 2, "as JSON");
  for (uint64_t k = 0; k < 500; k++) {
    char text[60];
    int x[70], y[70];
    size_t n = (size_t)rng_below(9, RNG_TEST, k, sizeof text);
    for (size_t i = 0; i < n; i++) text[i] = "ab c\xC3\xA9"[rng_below(10, RNG_TEST, k << 10 | i, 6)];
    size_t p = tokenizer_encode(&t, text, n, x, 70), q = tokenizer_encode(&u, text, n, y, 70);
    CHECK(p == q && memcmp(x, y, p * sizeof(int)) == 0, "text %d", (int)k);
  }
  tokenizer_free(&t);
  tokenizer_free(&u);

  // Among equal scores the leftmost pair is joined first, whichever piece has the lower id.
  put_record_(&b, -20, "ca");
  put_record_(&b, -20, "bc");
  snprintf(dir, sizeof dir, "%s", test_dir());
  put_file_(dir, "tokenizer.bin", b.data, b.len);
  tokenizer_load(&t, dir);
  CHECK(encodes_(&t, "bca", 3, 0, "264 270 265"), "equal scores");
  tokenizer_free(&t);
  strbuf_free(&b);
}

// ---------------------------------------------------------------------------------------------------------
// Refusals.

// A byte-level tokenizer.json made of these parts must be refused with exit 3 and these words.
static int refuses_bytes_(const char *merges, const char *added, const char *normalizer, const char *pre, const char *model,
                          const char *words) {
  char dir[512];
  snprintf(dir, sizeof dir, "%s", test_dir());
  put_byte_level_(dir, merges, added, normalizer, pre, model);
  return refused_(load_tokenizer_, dir, EXIT_DAMAGED, words);
}

static int refuses_sentencepiece_(const char *normalizer, const char *pre, const char *more, const char *words) {
  char dir[512];
  snprintf(dir, sizeof dir, "%s", test_dir());
  put_sentencepiece_(dir, normalizer, pre, more);
  return refused_(load_tokenizer_, dir, EXIT_DAMAGED, words);
}

static void test_tokenizer_refuses_more(void) {
  static const char *const lstrip = "{\"id\":257,\"content\":\"<x>\",\"lstrip\":true,\"normalized\":false,\"special\":true}";
  static const char *const normalized = "{\"id\":257,\"content\":\"<x>\",\"normalized\":true,\"special\":true}";
  CHECK(refuses_bytes_("a b", NULL, "{\"type\":\"Lowercase\"}", NULL, NULL, "normalizer|Lowercase"), "normalizer");
  CHECK(refuses_bytes_("a b", NULL, NULL, "{\"type\":\"Whitespace\"}", NULL, "pre_tokenizer|Whitespace"), "pre-tokenizer");
  CHECK(refuses_bytes_("a b", NULL, NULL, "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", NULL, "add_prefix_space"), "prefix");
  CHECK(refuses_bytes_("a b", NULL, NULL, "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}", NULL, "pattern"),
        "no pattern");
  CHECK(refuses_bytes_("a b", NULL, NULL, SPLIT_JSON_("\\\\w+"), NULL, "pattern|\\w+"), "unknown pattern");
  CHECK(refuses_bytes_("a b", NULL, NULL, "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL_ "]}", NULL,
                       "Sequence of two, found 1"), "sequence");
  CHECK(refuses_bytes_("a b", NULL, NULL, NULL, "\"dropout\":0.1,", "dropout"), "dropout");
  CHECK(refuses_bytes_("a b", NULL, NULL, NULL, "\"end_of_word_suffix\":\"</w>\",", "end_of_word_suffix|</w>"), "suffix");
  CHECK(refuses_bytes_("a b;a b", NULL, NULL, NULL, NULL, "different keys"), "a merge twice");
  CHECK(refuses_bytes_("a b", lstrip, NULL, NULL, NULL, "<x>|lstrip"), "lstrip");
  CHECK(refuses_bytes_("a b", normalized, "{\"type\":\"NFC\"}", NULL, NULL, "<x>|normalized"), "normalized");
  CHECK(refuses_bytes_("a b", ADDED_(99, "<x>", "true"), NULL, NULL, NULL, "id 99|both"), "an id for two pieces");
  CHECK(refuses_sentencepiece_("null", "null", "", "byte_fallback|none and none"), "no normalizer");
  CHECK(refuses_sentencepiece_(SP_NORMALIZER_, METASPACE_("always"), "", "Sequence and Metaspace"), "both");
  CHECK(refuses_sentencepiece_("null", METASPACE_("sometimes"), "", "scheme sometimes"), "scheme");
  CHECK(refuses_sentencepiece_(SP_NORMALIZER_, "null", ",\"x\":270", "below 270|found 270"), "a gap");

  // Whole files: merges of unknown pieces, of another form, twice; a template that is none; another decoder.
  static const struct { const char *post, *decoder, *merges, *words; } files[] = {
    {"null", "ByteLevel", "[\"a x\"]", "merge 0|\"x\""}, {"null", "ByteLevel", "[\"a b\",\"b a\"]", "merge 1|\"b\" and \"a\""},
      {"null", "ByteLevel", "[\"ab\"]", "merge 0"},
    {"null", "ByteLevel", "[[\"a\",\"b\",\"a\"]]", "merge 0"}, {"null", "ByteLevel", "[\"a b\",[\"a\",\"b\"]]", "merge 1|again"},
      {"null", "ByteLevel", "{}", "array"},
    {"{\"type\":\"BertProcessing\"}", "ByteLevel", "[]", "post_processor|BertProcessing"}, {"null", "WordPiece", "[]", "WordPiece"}};
  for (size_t i = 0; i < ARRAY_LEN(files); i++) {
    char dir[512], json[1024];
    snprintf(dir, sizeof dir, "%s", test_dir());
    snprintf(json, sizeof json,
             "{\"pre_tokenizer\":%s,\"post_processor\":%s,\"decoder\":{\"type\":\"%s\"},\"model\":{\"type\":\"BPE\","
             "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},"
             "\"merges\":%s}}", BYTE_LEVEL_, files[i].post, files[i].decoder, files[i].merges);
    put_file_(dir, "tokenizer.json", json, strlen(json));
    CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, files[i].words), "file %zu", i);
  }

  // tokenizer.bin: cut anywhere, with a byte missing, with a piece twice, with a score that is no number.
  StrBuf b = {NULL, 0, 0};
  char dir[512];
  put_bin_(&b);
  snprintf(dir, sizeof dir, "%s", test_dir());
  static const size_t cuts[] = {1, 3, 8, 9, 500};
  for (size_t i = 0; i < ARRAY_LEN(cuts); i++) {
    put_file_(dir, "tokenizer.bin", b.data, b.len - cuts[i]);
    CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, i == 3 ? "tokenizer.bin|offset" : "tokenizer.bin"), "cut by %zu", cuts[i]);
  }
  put_file_(dir, "tokenizer.bin", b.data, 0);
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "259 pieces, found 0"), "empty");
  put_record_(&b, 1, "ab");
  put_file_(dir, "tokenizer.bin", b.data, b.len);
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "piece 269|\"ab\""), "twice");
  b.len -= 10;
  put_record_(&b, NAN, "abc");
  put_file_(dir, "tokenizer.bin", b.data, b.len);
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "piece 269|score"), "score");
  b.data[4 + 13 + 13 + 14 + 14 * 7 + 11] = 'X';   // the name of a byte token
  b.len -= 11;
  put_file_(dir, "tokenizer.bin", b.data, b.len);
  CHECK(refused_(load_tokenizer_, dir, EXIT_DAMAGED, "byte_fallback|<0x"), "a byte is missing");
  strbuf_free(&b);
}

// ---------------------------------------------------------------------------------------------------------
// The released vocabularies, where they are at hand.

// The file data/tokenizers/name; NULL if it is not there.
static char *released_(const char *name, size_t *len) {
  const char *data = getenv("BITNET_DATA");
  char path[4096];
  snprintf(path, sizeof path, "%s/tokenizers/%s", data && *data ? data : "../shared/data", name);
  return read_file(path, len);
}

// GPT-2's two files as a tokenizer.json.
static int released_gpt2_(Tokenizer *t) {
  size_t n, m;
  char *vocab = released_("gpt2_encoder.json", &n), *merges = released_("gpt2_vocab.bpe", &m);
  int there = vocab && merges;
  if (there) {
    StrBuf b = {NULL, 0, 0};
    const char *comma = "";
    strbuf_printf(&b, "{\"added_tokens\":[" ADDED_(50256, "<|endoftext|>",
                                                   "true") "],\"pre_tokenizer\":" BYTE_LEVEL_ ",\"decoder\":{\"type\":\"ByteLevel\"},"
                  "\"model\":{\"type\":\"BPE\",\"vocab\":");
    strbuf_append(&b, vocab, n);
    strbuf_printf(&b, ",\"merges\":[");
    strtok(merges, "\n");   // the version
    for (char *line = strtok(NULL, "\n"); line; line = strtok(NULL, "\n"), comma = ",") {
      strbuf_printf(&b, "%s", comma);
      json_put_string(&b, line, strlen(line));
    }
    strbuf_printf(&b, "]}}");
    const char *dir = test_dir();
    put_file_(dir, "tokenizer.json", b.data, b.len);
    tokenizer_load(t, dir);
    strbuf_free(&b);
  }
  free(vocab);
  free(merges);
  return there;
}

// tiktoken's file: base64 of the bytes, a blank, the rank, which is the id. Any two tokens that make a third may be joined.
static int released_tiktoken_(Tokenizer *t, const char *name, int split, int nfc, int whole_words) {
  static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  size_t n;
  char *text = released_(name, &n);
  if (text == NULL) return 0;
  tokenizer_begin_(t, n / 4);
  for (char *line = text; line < text + n; line = strchr(line, '\n') + 1) {
    StrBuf piece = {NULL, 0, 0};
    unsigned bits = 0, have = 0;
    for (; *line != ' '; line++) {
      const char *letter = strchr(letters, *line);
      if (*line == '=') continue;
      bits = bits << 6 | (unsigned)(letter - letters);
      have += 6;
      if (have < 8) continue;
      have -= 8;
      char byte = (char)(bits >> have & 255);
      strbuf_append(&piece, &byte, 1);
    }
    tokenizer_add_(t, piece.data, piece.len, 0);
    strbuf_free(&piece);
  }
  uint32_t *rank = (uint32_t *)xmalloc((size_t)t->vocab_size * sizeof *rank);
  for (int i = 0; i < t->vocab_size; i++) rank[i] = (uint32_t)i;
  t->kind = TOKENIZER_BYTES;
  t->split = split;
  t->nfc = nfc;
  t->whole_words = whole_words;
  find_bytes_(t);
  t->bpe = (Bpe *)xmalloc(sizeof *t->bpe);
  bpe_begin(t->bpe, bin_pairs_(t, rank, 0));
  bin_pairs_(t, rank, 1);
  free(rank);
  free(text);
  return 1;
}

// llama.cpp's vectors: texts separated by a line, and their ids, one text a line. Returns how many agree.
static int check_vectors_(const Tokenizer *t, const char *name) {
  static const char mark[] = "\n__ggml_vocab_test__\n";
  char file[64];
  size_t n, m;
  int good = 0, all = 0;
  char *texts = (snprintf(file, sizeof file, "vectors/%s.inp", name), released_(file, &n));
  char *wanted = (snprintf(file, sizeof file, "vectors/%s.out", name), released_(file, &m));
  CHECK(texts && wanted, "%s: vectors are missing", name);
  char *text = texts, *line = wanted, *end;
  for (; texts && wanted && line < wanted + m; text = end + strlen(mark), line = strchr(line, '\n') + 1) {
    int ids[512], ok = 1;
    end = strstr(text, mark);
    if (end == NULL) break;
    size_t count = tokenizer_encode(t, text, (size_t)(end - text), ids, 512), i = 0;
    for (char *at = line; *at != '\n'; i++) {
      long id = strtol(at, &at, 10);
      ok = ok && i < count && ids[i] == id;
      while (*at == ' ') at++;
    }
    ok = ok && i == count;
    CHECK(ok, "%s: text %d, '%.*s': %zu tokens, wanted %zu", name, all, (int)(end - text), text, count, i);
    good += ok;
    all++;
  }
  CHECK(all >= 46, "%s: only %d texts", name, all);
  free(texts);
  free(wanted);
  return good;
}

// The vectors made with Hugging Face's library; those with special tokens in the text only where t has them.
static void check_hf_vectors_(const Tokenizer *t, const char *key) {
  size_t n;
  char err[200];
  int all = 0;
  JsonDoc doc;
  char *text = released_("vectors/hf_vectors.json", &n);
  if (text == NULL) return;
  CHECK(json_parse(&doc, text, n, err, sizeof err), "%s", err);
  for (const Json *v = json_get(doc.root, "vectors")->child; v; v = v->next) {
    const Json *s = json_get(v, "text"), *want = json_get(v, key);
    int ids[4096], ok = 1;
    if (strstr(s->s, "<|") && t->n_added == 0) continue;
    if (strstr(s->s, "<s>") && t->kind == TOKENIZER_SENTENCEPIECE) continue;   // sentencepiece itself does not know marks in a text
    size_t count = tokenizer_encode_marks(t, s->s, s->len, ids, 4096), i = 0;
    for (const Json *id = want->child; id; id = id->next, i++) ok = ok && i < count && ids[i] == id->i;
    CHECK(ok && i == count, "%s: '%s': %zu tokens, wanted %zu", key, json_get_string(v, "name", ""), count, i);
    all++;
  }
  CHECK(all >= 38, "%s: only %d of Hugging Face's vectors", key, all);
  json_free(&doc);
  free(text);
}

static void test_tokenizer_released(void) {
  Tokenizer t;
  size_t n;
  int known = 0;
  if (released_gpt2_(&t)) {
    known += check_vectors_(&t, "gpt-2");
    check_hf_vectors_(&t, "gpt2");
    tokenizer_free(&t);
  }
  if (released_tiktoken_(&t, "llama3_tokenizer.model", SPLIT_LLAMA3, 0, 1)) {
    known += check_vectors_(&t, "llama-bpe");
    check_hf_vectors_(&t, "llama3");
    tokenizer_free(&t);
  }
  if (released_tiktoken_(&t, "qwen.tiktoken", SPLIT_QWEN2, 1, 0)) {
    known += check_vectors_(&t, "qwen2");
    check_hf_vectors_(&t, "qwen2");
    tokenizer_free(&t);
  }
  char *bin = released_("llama2_tokenizer.bin", &n);
  if (bin) {
    read_tokenizer_bin_(&t, "llama2_tokenizer.bin", bin, n);
    known += check_vectors_(&t, "llama-spm");
    check_hf_vectors_(&t, "llama2_sp");
    tokenizer_free(&t);
  }
  free(bin);
  if (known == 0) printf("    note: no released vocabularies in $BITNET_DATA/tokenizers, only our own small ones were tested\n");
  else CHECK(known >= 4 * 46, "%d texts agree", known);
}

#define TOKENIZER_TESTS                                                                                            \
  {"unicode_classes", "letters, numbers, white space of all code points", test_unicode_classes},                    \
  {"unicode_nfc", "composing, order of marks, Hangul, broken bytes, long runs", test_unicode_nfc},                  \
  {"bpe_split", "GPT-2's, Llama-3's and Qwen2's patterns", test_bpe_split},                                        \
  {"bpe_merge", "the heap against the definition; a word of four million letters", test_bpe_merge},                \
  {"bpe_cache", "words are remembered, the cache is emptied when full", test_bpe_cache},                           \
  {"tokenizer_bytes", "byte-level BPE, added tokens, random bytes, files copied", test_tokenizer_bytes},           \
  {"tokenizer_pipelines", "the other pre-tokenizers, NFC, ignore_merges, forms of merges", test_tokenizer_pipelines},  \
  {"tokenizer_sentencepiece", "blanks, byte fallback, Metaspace, decoding", test_tokenizer_sentencepiece},         \
  {"tokenizer_bin", "llama2.c's tokenizer.bin, and its way to tokenizer.json", test_tokenizer_bin},                \
  {"tokenizer_refuses_more", "pipelines and files that are not understood", test_tokenizer_refuses_more},          \
  {"tokenizer_released", "published vectors of GPT-2, Llama-3, Qwen2, Llama-2", test_tokenizer_released}

#endif
