/*
test_files.h: tests of json.h and safetensors.h, the readers that meet files from outside.

What is refused matters as much as what is read: most tables here list inputs with the words that the refusal must say.
Files that may end the program are opened in a child process.
Read before: check.h, test_data.h (put_file_, refused_), bitnet/json.h, bitnet/safetensors.h.
Defines:     FILES_TESTS, the rows for the table of tests.
*/
#ifndef TEST_FILES_H
#define TEST_FILES_H

#include "../../bitnet/json.h"
#include "../../bitnet/safetensors.h"
#include "check.h"
#include "test_data.h"

// ---------------------------------------------------------------------------------------------------------
// JSON.

// One line that shows everything that the reader found: n t f, i and r with the number, s with length and bytes.
static void dump_json_(StrBuf *b, const Json *v) {
  static const char *const kinds[] = {"n", "", "i", "r", "s", "[", "{"};
  strbuf_printf(b, "%s", v->type == JSON_BOOL ? (v->i ? "t" : "f") : kinds[v->type]);
  if (v->type == JSON_INT) strbuf_printf(b, "%lld", (long long)v->i);
  if (v->type == JSON_REAL) strbuf_printf(b, "%.17g", v->d);
  if (v->type == JSON_STRING) {
    strbuf_printf(b, "%zu:", v->len);
    for (size_t i = 0; i < v->len; i++) {
      unsigned char c = (unsigned char)v->s[i];
      strbuf_printf(b, c > 0x20 && c < 0x7F ? "%c" : "<%02x>", c);
    }
  }
  size_t count = 0;
  for (const Json *c = v->child; c; c = c->next, count++) {
    if (count) strbuf_printf(b, " ");
    if (v->type == JSON_OBJECT) strbuf_printf(b, "%s=", c->key);
    dump_json_(b, c);
  }
  CHECK(count == v->count, "%zu children, count %zu", count, v->count);
  if (v->type == JSON_ARRAY) strbuf_printf(b, "]");
  if (v->type == JSON_OBJECT) strbuf_printf(b, "}");
}

// Parses a copy of exactly n bytes, so that reading behind them is an error that sanitizers see.
static int parse_exact_(JsonDoc *doc, const char *text, size_t n, char *err, size_t cap) {
  char *copy = (char *)xmalloc(n);
  memcpy(copy, text, n);
  int ok = json_parse(doc, copy, n, err, cap);
  free(copy);   // the tree must not need it any more
  return ok;
}

static void test_json_accepts(void) {
  static const struct { const char *text, *want; } cases[] = {
    {"null", "n"}, {" \t\r\ntrue\n ", "t"}, {"false", "f"}, {"[]", "[]"}, {"{}", "{}"}, {"[ ]", "[]"}, {"{ }", "{}"},
    {"0", "i0"}, {"-0", "i0"}, {"7", "i7"}, {"-12", "i-12"}, {"9007199254740993", "i9007199254740993"},
    {"9223372036854775807", "i9223372036854775807"}, {"-9223372036854775808", "i-9223372036854775808"},
    {"8e0", "r8"}, {"2.0", "r2"}, {"-0.0", "r-0"}, {"0.1", "r0.10000000000000001"}, {"1E+2", "r100"}, {"1e-2", "r0.01"},
    {"0e5", "r0"}, {"5e-324", "r4.9406564584124654e-324"}, {"1e-999", "r0"},
    {"18446744073709551616.0", "r1.8446744073709552e+19"},
    {"\"\"", "s0:"}, {"\"abc\"", "s3:abc"}, {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "s8:\"\\/<08><0c><0a><0d><09>"},
    {"\"\\u0041\\u00e9\\u20ac\\ud83d\\uDE00\"", "s10:A<c3><a9><e2><82><ac><f0><9f><98><80>"}, {"\"a\\u0000b\"", "s3:a<00>b"},
    {"\"\xC3\xA9\xF0\x9F\x98\x80\x7F\"", "s7:<c3><a9><f0><9f><98><80><7f>"}, {"\"\\uffff\"", "s3:<ef><bf><bf>"},
    {"[1,[2,[]],{\"a\":null}]", "[i1 [i2 []] {a=n}]"}, {"{\"a\" : 1 , \"\" : [ ] }", "{a=i1 =[]}"},
    {"{\"a\":{\"a\":{\"a\":true}}}", "{a={a={a=t}}}"}, {"{\"\\u0061b\":1,\"a\":2}", "{ab=i1 a=i2}"},
    {"[0,1,2,3,4,5,6,7,8,9]", "[i0 i1 i2 i3 i4 i5 i6 i7 i8 i9]"},
    {"{\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":4,\"f\":5,\"g\":6,\"h\":7,\"i\":8}", "{a=i0 b=i1 c=i2 d=i3 e=i4 f=i5 g=i6 h=i7 i=i8}"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    JsonDoc doc;
    StrBuf b = {NULL, 0, 0};
    char err[200];
    if (!parse_exact_(&doc, cases[i].text, strlen(cases[i].text), err, sizeof err)) {
      CHECK(0, "%s refused: %s", cases[i].text, err);
      continue;
    }
    dump_json_(&b, doc.root);
    CHECK(strcmp(b.data, cases[i].want) == 0, "%s read as %s, wanted %s", cases[i].text, b.data, cases[i].want);
    strbuf_free(&b);
    json_free(&doc);
  }
}

static void test_json_refuses(void) {
  static const struct { const char *text, *words; } cases[] = {
    {"", "offset 0: expected a value, found the end of the text"}, {"  ", "offset 2: expected a value"},
    {"nul", "offset 0"}, {"True", "offset 0: expected a value, found 'T'"}, {"NaN", "offset 0"}, {"Infinity", "offset 0"},
    {"-Infinity", "offset 1: expected a digit, found 'I'"}, {"truex", "offset 4: expected nothing after the value, found 'x'"},
    {"1 2", "offset 2: expected nothing"}, {"[1]]", "offset 3"}, {"{}{}", "offset 2"}, {"'a'", "offset 0"},
    {"// c\n1", "offset 0"},
    {"\xEF\xBB\xBF{}", "offset 0: expected a value, found byte 0xEF"}, {"\x0B" "1", "offset 0|0x0B"},
    // Numbers.
    {"01", "offset 0: expected a number without leading zeros"}, {"-01", "offset 1|leading"}, {"00", "offset 0"},
    {"+1", "offset 0"},
    {".5", "offset 0"}, {"-", "offset 1: expected a digit, found the end"}, {"1.", "offset 2|digit"}, {"1.e3", "offset 2"},
    {"1e", "offset 2"}, {"1e+", "offset 3"}, {"0x10", "offset 1"}, {"1_000", "offset 1"}, {"--1", "offset 1"},
    {"9223372036854775808", "offset 0: expected an integer of at most 64 bits, found 9223372036854775808"},
    {"-9223372036854775809", "64 bits"}, {"[123456789012345678901234567890]", "offset 1|123456789012345678901234..."},
    {"1e999", "offset 0|double|1e999"}, {"-1e999", "double"},
    // Arrays and objects.
    {"[", "offset 1: expected a value, found the end"}, {"[1", "offset 2: expected ',' or ']'"}, {"[1,", "offset 3"},
    {"[1,]", "offset 3"},
    {"[,1]", "offset 1"}, {"[1 2]", "offset 3: expected ',' or ']', found '2'"}, {"[1}", "offset 2"},
    {"{", "offset 1: expected a key"},
    {"{\"a\"", "offset 4: expected ':'"}, {"{\"a\":", "offset 5"}, {"{\"a\":1", "offset 6: expected ',' or '}'"},
    {"{\"a\":1,", "offset 7"},
    {"{\"a\":1,}", "offset 7: expected a key in quotes, found '}'"}, {"{,}", "offset 1"}, {"{a:1}", "offset 1"},
    {"{1:2}", "offset 1"},
    {"{\"a\" 1}", "offset 5: expected ':'"}, {"{\"a\":1 \"b\":2}", "offset 7"}, {"{\"a\":1]", "offset 6"},
    {"{\"a\"}", "offset 4"},
    {"{\"a\":1,\"a\":2}", "offset 7: expected different keys in an object, found \"a\" again"},
    {"{\"a\":1,\"b\":2,\"\\u0061\":3}", "offset 13|\"a\" again"}, {"[{\"\":1,\"\":2}]", "offset 7"},
    {"{\"\\n\":1,\"\\n\":1}", "\"?\" again"},
    {"{\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":4,\"f\":5,\"g\":6,\"h\":7,\"i\":8,\"e\":9}", "offset 55|\"e\" again"},
    // Strings.
    {"\"", "offset 0: expected a closing quote"}, {"\"abc", "offset 0: expected a closing quote"}, {"\"\\", "offset 2"},
    {"\"\\\"", "offset 0"},
    {"\"\\x41\"", "offset 2|'x'"}, {"\"\\U0041\"", "offset 2"}, {"\"\\u\"", "offset 3"},
    {"\"\\u12\"", "offset 5: expected four hex"},
    {"\"\\u12G4\"", "offset 5"}, {"\"\\u-123\"", "offset 3"}, {"\"\t\"", "offset 1|control character|0x09"},
    {"\"a\nb\"", "offset 2"},
    {"\"\x1F\"", "offset 1"}, {"\"\\ud800\"", "offset 1: expected a surrogate pair, found only its first half"},
    {"\"\\ud800", "offset 1"}, {"\"\\ud800\\", "offset 1"}, {"\"\\ud800\\u", "offset 9"},
    {"\"\\ud800x\"", "offset 1"}, {"\"\\ud800\\n\"", "offset 1"}, {"\"\\ud800\\ud800\"", "offset 1"},
    {"\"\\uDBFF\\u0041\"", "offset 1"},
    {"\"\\ud800\\u\"", "offset 9"}, {"\"\\udc00\"", "offset 1|second half"}, {"\"\\udfff\\ud800\"", "offset 1|second half"},
    {"\"\x80\"", "offset 1: expected UTF-8, found byte 0x80"}, {"\"a\xC0\x80\"", "offset 2|0xC0"}, {"\"\xC3\"", "offset 1"},
    {"\"\xE0\x9F\xBF\"", "offset 1"}, {"\"\xED\xA0\x80\"", "offset 1"}, {"\"\xF4\x90\x80\x80\"", "offset 1"},
    {"\"\xF8\x88\x80\x80\x80\"", "offset 1"},
    {"\"\xF0\x9F\x98", "offset 1"}, {"{\"\xFF\":1}", "offset 2"}};
  char err[200], list[200];
  JsonDoc doc;
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int ok = parse_exact_(&doc, cases[i].text, strlen(cases[i].text), err, sizeof err);
    CHECK(!ok && doc.root == NULL, "%s accepted", cases[i].text);
    if (ok) json_free(&doc);
    snprintf(list, sizeof list, "%s", cases[i].words);
    for (char *w = strtok(list, "|"); w; w = strtok(NULL, "|"))
      CHECK(strstr(err, w) && strstr(err, ": expected ") && strstr(err, ", found "), "%s: no '%s' in '%s'", cases[i].text, w, err);
  }
  CHECK(!parse_exact_(&doc, "1\0", 2, err, sizeof err) && strstr(err, "offset 1|") == NULL, "a zero byte behind the value");
  CHECK(!parse_exact_(&doc, "\"a\0\"", 4, err, sizeof err) && strstr(err, "0x00"), "a zero byte in a string: %s", err);

  // Messages are cut to the buffer; no buffer is fine, too.
  memset(err, 'x', sizeof err);
  CHECK(!json_parse(&doc, "[1 2]", 5, err, 10) && strcmp(err, "offset 3:") == 0 && err[10] == 'x', "'%.12s'", err);
  CHECK(!json_parse(&doc, "[1 2]", 5, NULL, 0), "no buffer");
}

// Nesting: 64 levels and not one more, whatever they are made of.
static void test_json_depth(void) {
  char text[1000], err[200];
  for (int object = 0; object < 2; object++) {
    for (int levels = 63; levels <= 66; levels++) {
      size_t n = 0;
      JsonDoc doc;
      for (int i = 0; i < levels; i++) n += (size_t)snprintf(text + n, sizeof text - n, object ? "{\"a\":" : "[");
      text[n++] = '1';
      for (int i = 0; i < levels; i++) text[n++] = object ? '}' : ']';
      int ok = parse_exact_(&doc, text, n, err, sizeof err);
      CHECK(ok == (levels <= 64), "%d levels: %d", levels, ok);
      CHECK(ok || strstr(err, object ? "offset 320: expected at most 64 levels" : "offset 64: expected at most 64 levels"), "%s", err);
      if (ok) CHECK(doc.depth == levels, "depth %d, wanted %d", doc.depth, levels);
      if (ok) json_free(&doc);
    }
  }
  // A bomb of brackets ends at level 65; closed brackets do not count.
  JsonDoc doc;
  size_t n = 1000000;
  char *bomb = (char *)xmalloc(n);
  memset(bomb, '[', n);
  CHECK(!json_parse(&doc, bomb, n, err, sizeof err) && strstr(err, "64 levels"), "%s", err);
  for (size_t i = 0; i + 2 < n; i += 3) memcpy(bomb + i, "[],", 3);
  bomb[0] = ' ';
  memcpy(bomb, "[[]", 3);
  memcpy(bomb + 3, ",", 1);
  memset(bomb + 4, ' ', 2);
  memcpy(bomb + n - 4, "[]] ", 4);
  CHECK(json_parse(&doc, bomb, n, err, sizeof err) && doc.depth == 2, "%s", err);
  json_free(&doc);
  free(bomb);
}

static void test_json_lookup(void) {
  static const char text[] = "{\"s\":\"x\",\"i\":5,\"r\":2.5,\"t\":true,\"f\":false,\"n\":null,\"a\":[1],\"o\":{\"in\":9},"
                             "\"k\\u0000y\":1,\"last\":3}";
  for (int big = 0; big < 2; big++) {
    // The second time without the long tail, below the size that gets a hash table.
    char copy[sizeof text];
    JsonDoc doc;
    memcpy(copy, text, sizeof text);
    if (big == 0) strcpy(strstr(copy, ",\"k\\u0000y\""), "}");
    CHECK(json_parse(&doc, copy, strlen(copy), NULL, 0), "refused");
    const Json *o = doc.root;
    CHECK((o->slot != NULL) == (big == 1), "hash table for %zu members", o->count);
    CHECK(strcmp(json_get_string(o, "s", "-"), "x") == 0 && json_get_int(o, "i", -1) == 5, "values");
    CHECK(json_get_number(o, "r", -1) == 2.5 && json_get_number(o, "i", -1) == 5.0, "numbers");
    CHECK(json_get_bool(o, "t", -1) == 1 && json_get_bool(o, "f", -1) == 0, "booleans");
    CHECK(json_get_int(json_get(o, "o"), "in", -1) == 9, "inner object");
    CHECK(json_get(o, "o")->offset == (size_t)(strstr(copy, "{\"in") - copy), "offset %zu", json_get(o, "o")->offset);
    CHECK(json_get(o, "i")->key_offset == 9 && json_get(o, "i")->offset == 13, "offsets");
    // Absent, of another type, or asked of something that is no object: the fallback.
    CHECK(json_get(o, "x") == NULL && json_get(o, "") == NULL && json_get(o, "k") == NULL, "found what is not there");
    CHECK(json_get_int(o, "r", -7) == -7 && json_get_int(o, "s", -7) == -7 && json_get_int(o, "t", -7) == -7, "not an integer");
    CHECK(json_get_number(o, "n", -7) == -7 && json_get_bool(o, "i", -7) == -7 && json_get_string(o, "i", NULL) == NULL, "types");
    CHECK(json_get(NULL, "s") == NULL && json_get(json_get(o, "a"), "s") == NULL && json_get_int(NULL, "s", 3) == 3, "no object");
    json_free(&doc);
    json_free(&doc);   // harmless
  }
}

// What is written reads back as the same, in the expected form.
static void test_json_writes(void) {
  static const struct { const char *s; size_t n; const char *want; } strings[] = {
    {"", 0, "\"\""}, {"abc", 3, "\"abc\""}, {"\"\\/", 3, "\"\\\"\\\\/\""}, {"\b\f\n\r\t", 5, "\"\\b\\f\\n\\r\\t\""},
    {"a\0\x01\x1F\x7F", 5, "\"a\\u0000\\u0001\\u001f\x7F\""}, {"\xC3\xA9\xF0\x9F\x98\x80", 6, "\"\xC3\xA9\xF0\x9F\x98\x80\""},
    {"a\xFF" "b\xC3", 4, "\"a\xEF\xBF\xBD" "b\xEF\xBF\xBD\""}, {"\xED\xA0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""}};
  static const struct { double v; const char *want; } numbers[] = {
    {0, "0"}, {-0.0, "-0"}, {1, "1"}, {-17, "-17"}, {9007199254740991.0, "9007199254740991"}, {1e15, "1000000000000000"},
    {0.1, "0.1"},
    {1.5, "1.5"}, {1e-7, "1e-07"}, {1e300, "1e+300"}, {1.0 / 3, "0.3333333333333333"}, {2.0 / 3, "0.6666666666666666"},
    {5e-324, "5e-324"}, {1.7976931348623157e308, "1.7976931348623157e+308"}, {0.1 + 0.2, "0.30000000000000004"}, {NAN, "null"},
    {INFINITY, "null"}, {-INFINITY, "null"}, {3e-4, "0.0003"}, {4503599627370495.5, "4503599627370495.5"}};
  StrBuf b = {NULL, 0, 0};
  JsonDoc doc;
  for (size_t i = 0; i < ARRAY_LEN(strings); i++) {
    b.len = 0;
    json_put_string(&b, strings[i].s, strings[i].n);
    CHECK(strcmp(b.data, strings[i].want) == 0, "string %zu written as %s", i, b.data);
    CHECK(json_parse(&doc, b.data, b.len, NULL, 0), "string %zu cannot be read back", i);
    if (i < 6) CHECK(doc.root->len == strings[i].n && memcmp(doc.root->s, strings[i].s, strings[i].n) == 0, "string %zu changed", i);
    json_free(&doc);
  }
  for (size_t i = 0; i < ARRAY_LEN(numbers); i++) {
    b.len = 0;
    json_put_number(&b, numbers[i].v);
    CHECK(strcmp(b.data, numbers[i].want) == 0, "%.17g written as %s, wanted %s", numbers[i].v, b.data, numbers[i].want);
  }
  // Any bits that are a finite number come back exactly, and so does every float.
  for (uint64_t i = 0; i < 4000; i++) {
    uint64_t bits = rng_u64(3, RNG_TEST, i);
    double v;
    memcpy(&v, &bits, sizeof v);
    if (i & 1) v = (double)(float)rng_normal(3, RNG_TEST, i);
    if (!isfinite(v)) continue;
    b.len = 0;
    json_put_number(&b, v);
    int ok = json_parse(&doc, b.data, b.len, NULL, 0);
    CHECK(ok && doc.root->d == v, "%.17g written as %s", v, b.data);
    if (ok) json_free(&doc);
  }
  strbuf_free(&b);
}

// A large vocabulary, and the same with one key twice: far from quadratic, which would take minutes.
static void test_json_large(void) {
  enum { N = 150000 };
  StrBuf b = {NULL, 0, 0};
  JsonDoc doc;
  char key[32], err[200];
  strbuf_printf(&b, "{\"vocab\":{");
  for (int i = 0; i < N; i++) strbuf_printf(&b, "%s\"\\u0120tok%d\": %d", i ? ", " : "", i, i);
  strbuf_printf(&b, "}}");
  double t0 = time_now();
  int ok = json_parse(&doc, b.data, b.len, err, sizeof err), missing = 0, blocks = 0;
  CHECK(ok, "%s", err);
  if (!ok) return;
  const Json *vocab = json_get(doc.root, "vocab");
  for (int i = 0; i < N; i++) {
    snprintf(key, sizeof key, "\xC4\xA0tok%d", i);
    missing += json_get_int(vocab, key, -1) != i;
  }
  double seconds = time_now() - t0;
  for (const JsonBlock_ *block = doc.blocks; block; block = block->next) blocks++;
  CHECK(vocab->count == N && missing == 0, "%d keys not found again", missing);
  CHECK(seconds < 1, "%.2f s to parse %zu bytes and look up %d keys", seconds, b.len, N);
  CHECK(blocks < 20, "%d blocks of memory", blocks);
  json_free(&doc);

  b.len -= 2;
  strbuf_printf(&b, ",\"\\u0120tok77777\":1}}");
  t0 = time_now();
  CHECK(!json_parse(&doc, b.data, b.len, err, sizeof err) && strstr(err, "tok77777\" again"), "%s", err);
  CHECK(time_now() - t0 < 1, "%.2f s to find a duplicate key", time_now() - t0);

  // One string of two million bytes, and a number of as many digits.
  b.len = 0;
  strbuf_printf(&b, "[\"");
  for (int i = 0; i < 200000; i++) strbuf_printf(&b, "\xE2\x82\xAC\\u20ac\\n");
  strbuf_printf(&b, "\",0.");
  for (int i = 0; i < 200000; i++) strbuf_printf(&b, "1234567890");
  strbuf_printf(&b, "]");
  t0 = time_now();
  ok = json_parse(&doc, b.data, b.len, err, sizeof err);
  CHECK(ok && doc.root->child->len == 1400000 && fabs(doc.root->child->next->d - 0.1234567890) < 1e-9, "%s", err);
  CHECK(time_now() - t0 < 1, "%.2f s", time_now() - t0);
  if (ok) json_free(&doc);
  strbuf_free(&b);
}

// Every beginning of a text and many damaged copies of it: an answer, no crash. What is accepted can be walked.
static void test_json_damage(void) {
  static const char text[] = "{\"a\":[1,-2.5e3,true,false,null],\"\\u00e9\\ud83d\\ude00\":\"x\\n\xC3\xA9\",\"b\":{\"c\":[[],{}]},"
                             "\"d\":1,\"e\":2,\"f\":3,\"g\":4,\"h\":5,\"i\":6}";
  size_t n = sizeof text - 1, accepted = 0;
  char copy[sizeof text], err[200];
  JsonDoc doc;
  CHECK(parse_exact_(&doc, text, n, err, sizeof err), "%s", err);
  json_free(&doc);
  for (size_t len = 0; len < n; len++) CHECK(!parse_exact_(&doc, text, len, err, sizeof err), "the first %zu bytes accepted", len);
  for (uint64_t i = 0; i < 20000; i++) {
    memcpy(copy, text, n);
    for (uint64_t k = 0; k <= i % 3; k++) {
      uint64_t r = rng_u64(4, RNG_TEST, i * 4 + k);
      copy[r % n] = i & 1 ? (char)(copy[r % n] ^ (1 << (r >> 32 & 7))) : text[(r >> 32) % n];
    }
    if (!parse_exact_(&doc, copy, n, err, sizeof err)) continue;
    StrBuf b = {NULL, 0, 0};
    dump_json_(&b, doc.root);
    strbuf_free(&b);
    json_free(&doc);
    accepted++;
  }
  CHECK(accepted > 100 && accepted < 15000, "%zu of 20000 damaged texts accepted", accepted);
}

// ---------------------------------------------------------------------------------------------------------
// 16-bit floats.

// x rounded to a multiple of 2^unit, ties to even, in double: the definition, free of bit tricks.
static double round_to_(double x, int unit) {
  return ldexp(nearbyint(ldexp(x, -unit)), unit);
}

static void test_half_floats(void) {
  for (uint32_t h = 0; h < 65536; h++) {
    // Each f16 by the definition of the format; back again gives the same bits.
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double want = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) want = mantissa ? NAN : INFINITY;
    if (h & 0x8000) want = -want;
    float x = f32_from_f16((uint16_t)h);
    int same = isnan(want) ? isnan(x) : (double)x == want && !signbit(x) == !(h & 0x8000);
    CHECK(same, "f16 %04x is %g, wanted %g", h, x, want);
    CHECK(isnan(want) ? isnan(f32_from_f16(f16_from_f32(x))) : f16_from_f32(x) == h, "f16 %04x becomes %04x", h, f16_from_f32(x));
    float y = f32_from_bf16((uint16_t)h);
    CHECK(isnan(y) ? isnan(f32_from_bf16(bf16_from_f32(y))) : bf16_from_f32(y) == h, "bf16 %04x becomes %04x", h, bf16_from_f32(y));
  }
  // Rounding against the definition: random bits, and the neighbourhood of every tie between two f16.
  for (uint64_t i = 0; i < 400000; i++) {
    uint32_t bits = (uint32_t)rng_u64(5, RNG_TEST, i);
    if (i < 65536 * 3) bits = st_float_bits_(f32_from_f16((uint16_t)(i / 3))) + 0x1000 + (uint32_t)(i % 3) - 1;
    else if (i & 1) bits = (bits & 0xFFFF0000u) + 0x7FFF + (uint32_t)(i >> 1) % 3;   // ties of bf16
    float x = st_bits_float_(bits);
    if (isnan(x)) {
      CHECK(isnan(f32_from_f16(f16_from_f32(x))) && isnan(f32_from_bf16(bf16_from_f32(x))), "NaN %08x became a number", bits);
      continue;
    }
    int exponent;
    frexp(x, &exponent);
    double want = isinf(x) ? x : round_to_(x, (exponent < -13 ? -13 : exponent) - 11);
    if (fabs(want) > 65504) want = want > 0 ? INFINITY : -INFINITY;
    float got = f32_from_f16(f16_from_f32(x));
    CHECK((double)got == want && signbit(got) == signbit(x), "%.9g (%08x) as f16 is %.9g, wanted %.9g", x, bits, got, want);
    want = isinf(x) ? x : round_to_(x, (exponent < -125 ? -125 : exponent) - 8);
    if (fabs(want) > 3.4e38) want = want > 0 ? INFINITY : -INFINITY;
    got = f32_from_bf16(bf16_from_f32(x));
    CHECK((double)got == want && signbit(got) == signbit(x), "%.9g (%08x) as bf16 is %.9g, wanted %.9g", x, bits, got, want);
  }
}

// ---------------------------------------------------------------------------------------------------------
// safetensors: helpers.

// Writes a file at once, without the care (and the fsync) of put_file_: some tests here write thousands.
static void put_raw_(const char *path, const char *data, size_t n) {
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(data, 1, n, file) != n || fclose(file) != 0) die(EXIT_FAILED, "%s: %s", path, strerror(errno));
}

// Writes dir/name: the length, header[0..n), and data bytes 0, 1, 2, ... JSON in C strings would drown in backslashes, so a
// single quote in header stands for a double quote; put_index_ does the same for a whole file.
static void put_st_(const char *dir, const char *name, const char *header, size_t n, size_t data) {
  char path[4096], *file = (char *)xmalloc(8 + n + data);
  uint64_t len = n;
  memcpy(file, &len, 8);
  for (size_t i = 0; i < n; i++) file[8 + i] = header[i] == '\'' ? '"' : header[i];
  for (size_t i = 0; i < data; i++) file[8 + n + i] = (char)i;
  path_join(path, sizeof path, dir, name);
  put_raw_(path, file, 8 + n + data);
  free(file);
}

static void put_index_(const char *dir, const char *text) {
  char path[4096], copy[1000];
  size_t n = (size_t)snprintf(copy, sizeof copy, "%s", text);
  for (size_t i = 0; i < n; i++) copy[i] = copy[i] == '\'' ? '"' : copy[i];
  path_join(path, sizeof path, dir, "model.safetensors.index.json");
  put_raw_(path, copy, n);
}

// AddressSanitizer asks this before it looks for leaks at exit, which takes longer than everything else that a child does
// here; some tests have thousands of children, and a program that dies of a damaged file need not free.
static int in_child_ = 0;
#ifdef __cplusplus
extern "C"
#endif
int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void) { return in_child_; }

// In a child: opens, verifies and reads everything, within ten seconds.
static void read_st_(void *path) {
  StFile f;
  unsigned sum = 0;
  in_child_ = 1;
  alarm(10);
  st_open(&f, (const char *)path);
  st_verify(&f);
  for (size_t i = 0; i < f.n_tensors; i++) {
    const StTensor *t = &f.tensors[i];
    for (size_t k = 0; k < t->end - t->begin; k++) sum += st_data(&f, t)[k];
    if (t->dtype > ST_F16) continue;
    float *values = (float *)xmalloc(t->n * sizeof *values);
    st_read_f32(&f, t, values, 0, t->n);
    free(values);
  }
  st_close(&f);
  if (sum == 0xFFFFFFFFu) printf("\n");   // so that no compiler leaves out the reading
}

// Values for the writer's tests: element i of tensor `entry`, all of them exact in F16 and BF16.
static float st_value_(size_t entry, size_t i, int salt) {
  return (float)((int)(rng_u64((uint64_t)salt, RNG_TEST, (uint64_t)entry << 32 | i) % 255) - 127) / 16;
}

typedef struct {
  const StEntry *entries;
  int salt;
  size_t calls, change_at;   // from call change_at on (0 = never) other values come
  float add;                 // added to element 2 of entry 0
} StTestSource_;

static void st_test_source_(void *ctx, size_t entry, size_t first, size_t count, void *out) {
  StTestSource_ *s = (StTestSource_ *)ctx;
  int salt = s->change_at && ++s->calls >= s->change_at ? s->salt + 1000 : s->salt;
  for (size_t i = 0; i < count; i++) {
    if (s->entries[entry].dtype == ST_U8) ((unsigned char *)out)[i] = (unsigned char)rng_u64((uint64_t)salt, entry, first + i);
    else ((float *)out)[i] = st_value_(entry, first + i, salt) + (entry == 0 && first + i == 2 ? s->add : 0);
  }
}

// The tensors of the tests: each dtype, a scalar, an empty one, one of more than a chunk, and names that need escapes.
static const StEntry st_entries_[] = {
  {"w.bf16", ST_BF16, 2, {3, 5, 0, 0, 0, 0, 0, 0}}, {"codes", ST_U8, 3, {2, 3, 7, 0, 0, 0, 0, 0}},
  {"w.f32", ST_F32, 2, {4, 3, 0, 0, 0, 0, 0, 0}}, {"scale", ST_F32, 0, {0, 0, 0, 0, 0, 0, 0, 0}},
  {"empty", ST_F16, 2, {0, 4, 0, 0, 0, 0, 0, 0}}, {"w.f16", ST_F16, 1, {9, 0, 0, 0, 0, 0, 0, 0}},
  {"large", ST_BF16, 2, {70000, 2, 0, 0, 0, 0, 0, 0}}, {"\"\xC3\xA9\\", ST_F32, 8, {1, 1, 2, 1, 1, 1, 1, 1}}};
static const StEntry st_small_[] = {
  {"a.weight", ST_BF16, 2, {4, 3, 0, 0, 0, 0, 0, 0}}, {"b", ST_F32, 1, {5, 0, 0, 0, 0, 0, 0, 0}},
  {"c", ST_U8, 1, {7, 0, 0, 0, 0, 0, 0, 0}}};
static const StMeta st_meta_[] = {{"step", "1200"}, {"note", "a \"b\" \xC3\xA9\n"}};

// Writes the three small tensors.
static int write_small_(const char *path, int salt) {
  StTestSource_ s = {st_small_, salt, 0, 0, 0};
  return st_write(path, st_small_, ARRAY_LEN(st_small_), st_meta_, 1, st_test_source_, &s);
}

// In a child: exits with 0 if path holds the small tensors of salt 1, 1 if those of salt 2; dies if it is damaged.
static void which_small_(void *path) {
  StFile f;
  float got[5];
  st_open(&f, (const char *)path);
  if (!st_verify(&f)) die(EXIT_DAMAGED, "no checksums");
  st_read_f32(&f, st_find(&f, "b"), got, 0, 5);
  for (int salt = 1; salt <= 2; salt++) {
    int same = 1;
    for (size_t i = 0; i < 5; i++) same = same && got[i] == st_value_(1, i, salt);
    if (same) exit(salt - 1);
  }
  die(EXIT_DAMAGED, "other values");
}

// ---------------------------------------------------------------------------------------------------------
// safetensors: reading.

static void test_st_accepts(void) {
  // Blanks behind the header make N odd or even: the float lies at odd and at even addresses.
  static const char *const pads[] = {"", " ", "\n", "  \t\r\n"};
  static const char header[] = "{'x':{'shape':[2],'dtype':'F32','data_offsets':[5,13],'extra':[{'a':null}]},"
    "'\\u0061b':{'dtype':'U8','shape':[5,1],'data_offsets':[0,5]},'h':{'dtype':'BF16','shape':[],'data_offsets':[13,15]},"
    "'none':{'dtype':'F32','shape':[3,0],'data_offsets':[5,5]},'tail':{'dtype':'I64','shape':[0],'data_offsets':[15,15]}}";
  char path[4096];
  for (size_t i = 0; i < ARRAY_LEN(pads); i++) {
    char text[sizeof header + 8];
    const char *dir = test_dir();
    snprintf(text, sizeof text, "%s%s", header, pads[i]);
    put_st_(dir, "a.safetensors", text, strlen(text), 15);
    path_join(path, sizeof path, dir, "a.safetensors");
    StFile f;
    st_open(&f, path);
    const StTensor *x = st_find(&f, "x"), *ab = st_find(&f, "ab"), *h = st_find(&f, "h"), *none = st_find(&f, "none");
    CHECK(f.n_tensors == 5 && x && ab && h && none && st_find(&f, "tail"), "%zu tensors", f.n_tensors);
    CHECK(st_find(&f, "") == NULL && st_find(&f, "xx") == NULL && st_find(&f, "__metadata__") == NULL, "found too much");
    if (!x || !ab || !h || !none) continue;
    unsigned char bytes[8];
    float want[2], got[2] = {0, 0};
    for (int k = 0; k < 8; k++) bytes[k] = (unsigned char)(5 + k);
    memcpy(want, bytes, 8);
    st_read_f32(&f, x, got, 0, 2);
    CHECK(memcmp(want, got, 8) == 0, "the bytes of x at %zu", f.data_at + x->begin);
    st_read_f32(&f, x, got, 1, 1);
    CHECK(got[0] == want[1], "x[1]");
    st_read_f32(&f, h, got, 0, 1);
    CHECK(got[0] == f32_from_bf16(0x0E0D), "h is %g", got[0]);
    st_read_f32(&f, none, NULL, 0, 0);
    CHECK(h->ndim == 0 && h->n == 1 && none->n == 0 && none->ndim == 2 && x->n == 2 && x->shape[0] == 2, "shapes");
    CHECK(st_data(&f, ab)[3] == 3 && ab->end == 5, "codes");
    CHECK(st_metadata(&f, "format") == NULL && f.metadata == NULL && st_verify(&f) == 0, "metadata from nowhere");
    st_close(&f);
  }
  // Every dtype that can be named; metadata null or present; no tensors at all.
  for (int dtype = 0; dtype < ST_DTYPES; dtype++) {
    char text[200];
    const char *dir = test_dir();
    size_t bytes = 3 * st_dtype_size(dtype);
    snprintf(text, sizeof text, "{'__metadata__':{'format':'pt'},'t':{'dtype':'%s','shape':[3],'data_offsets':[0,%zu]}}",
             st_dtype_name(dtype), bytes);
    put_st_(dir, "a.safetensors", text, strlen(text), bytes);
    path_join(path, sizeof path, dir, "a.safetensors");
    StFile f;
    st_open(&f, path);
    const char *format = st_metadata(&f, "format");
    CHECK(f.n_tensors == 1 && f.tensors[0].dtype == dtype && format && strcmp(format, "pt") == 0, "%s", st_dtype_name(dtype));
    st_close(&f);
  }
  static const char *const empty[] = {"{}", "{'__metadata__':null}", "{'__metadata__':{}}"};
  for (size_t i = 0; i < ARRAY_LEN(empty); i++) {
    const char *dir = test_dir();
    put_st_(dir, "a.safetensors", empty[i], strlen(empty[i]), 0);
    path_join(path, sizeof path, dir, "a.safetensors");
    StFile f;
    st_open(&f, path);
    CHECK(f.n_tensors == 0 && st_find(&f, "a") == NULL && st_verify(&f) == 0, "%s", empty[i]);
    st_close(&f);
  }
}

// Headers that are wrong in one thing each; 16 bytes of data follow unless said otherwise.
#define U8_(extra) "{'a':{'dtype':'U8','shape':[16],'data_offsets':[0,16]}" extra "}"
#define ONE_(dtype, shape, span) "{'a':{'dtype':" dtype ",'shape':" shape ",'data_offsets':" span "}}"
#define TWO_(span1, n1, span2, n2)                                                                                            \
  "{'a':{'dtype':'U8','shape':[" n1 "],'data_offsets':" span1 "},'b':{'dtype':'U8','shape':[" n2 "],'data_offsets':" span2 "}}"

static void test_st_refuses(void) {
  static const struct { const char *header; size_t data; const char *words; } cases[] = {
    // Coverage of the data.
    {TWO_("[0,8]", "8", "[9,16]", "7"), 16, "tensor b|at 8|found 9, a hole"},
    {TWO_("[0,8]", "8", "[7,16]", "9"), 16, "tensor b|an overlap"},
    {TWO_("[1,8]", "7", "[8,16]", "8"), 16, "tensor a|at 0|found 1, a hole"},
    {TWO_("[0,16]", "16", "[0,16]", "16"), 16, "an overlap"},
    {TWO_("[0,16]", "16", "[8,8]", "0"), 16, "tensor b|an overlap"}, {U8_(""), 17, "offset 79|1 bytes more"},
    {U8_(""), 15, "tensor a|15 bytes|found 16|cut off"},
    {"{}", 1, "offset 10|1 bytes more"}, {ONE_("'U8'", "[16]", "[16,0]"), 16, "begin <= end|[16,0]"},
    // Shape against bytes.
    {ONE_("'U8'", "[15]", "[0,16]"), 16, "tensor a, data_offsets|expected 15 bytes for its shape in U8, found 16"},
    {ONE_("'F32'", "[16]", "[0,16]"), 16, "expected 64 bytes"}, {ONE_("'F32'", "[]", "[0,16]"), 16, "expected 4 bytes"},
    {ONE_("'U8'", "[16,0]", "[0,16]"), 16, "expected 0 bytes"},
    {ONE_("'F32'", "[4611686018427387904]", "[0,0]"), 0, "tensor a, shape|overflow"},
    {ONE_("'U8'", "[4294967296,4294967296]", "[0,0]"), 0, "overflow"},
    {ONE_("'U8'", "[4294967296,4294967297]", "[0,16]"), 16, "overflow"},
    {ONE_("'U8'", "[4294967296,4294967296,0]", "[0,0]"), 0, "overflow"},
    {ONE_("'U8'", "[1,1,1,1,1,1,1,1,16]", "[0,16]"), 16, "8 dimensions, found 9"},
    // Numbers that are no sizes.
    {ONE_("'U8'", "[-16]", "[0,16]"), 16, "shape at offset 36|non-negative integer, found -16"},
    {ONE_("'U8'", "[16.0]", "[0,16]"), 16, "shape|real number 16"},
    {ONE_("'U8'", "[1.6e1]", "[0,16]"), 16, "shape|real number"}, {ONE_("'U8'", "[\"16\"]", "[0,16]"), 16, "shape|\"16\""},
    {ONE_("'U8'", "[16]", "[0,16.0]"), 16, "data_offsets|real number"},
    {ONE_("'U8'", "[16]", "[-0,16]"), 16, "data_offsets|-0"},
    {ONE_("'U8'", "[16]", "[0,2e0]"), 16, "data_offsets|real"}, {ONE_("'U8'", "[16]", "[-1,15]"), 16, "data_offsets|-1"},
    {ONE_("'U8'", "[16]", "[0,18446744073709551616]"), 16, "64 bits"},
    {ONE_("'U8'", "[16]", "[0,9223372036854775807]"), 16, "cut off"},
    {ONE_("'U8'", "[16]", "[9223372036854775807,9223372036854775807]"), 16, "cut off"},
    {ONE_("'U8'", "[null]", "[0,16]"), 16, "null"},
    {ONE_("'U8'", "[true]", "[0,16]"), 16, "a boolean"}, {ONE_("'U8'", "[[16]]", "[0,16]"), 16, "an array"},
    // Fields.
    {ONE_("'Q4'", "[16]", "[0,16]"), 16, "dtype \"Q4\" of tensor a|not supported"},
    {ONE_("'u8'", "[16]", "[0,16]"), 16, "dtype \"u8\""},
    {ONE_("'F4'", "[32]", "[0,16]"), 16, "dtype \"F4\""}, {ONE_("'U8\\u0000'", "[16]", "[0,16]"), 16, "dtype"},
    {ONE_("8", "[16]", "[0,16]"), 16, "dtype|a string, found 8"},
    {ONE_("null", "[16]", "[0,16]"), 16, "a string, found null"},
    {"{'a':{'shape':[16],'data_offsets':[0,16]}}", 16, "tensor a, dtype at offset 9|found nothing"},
    {"{'a':{'dtype':'U8','data_offsets':[0,16]}}", 16, "shape|found nothing"},
    {"{'a':{'dtype':'U8','shape':[16]}}", 16, "data_offsets|found nothing"},
    {ONE_("'U8'", "16", "[0,16]"), 16, "shape|an array, found 16"},
    {ONE_("'U8'", "[16]", "16"), 16, "data_offsets|two numbers, found 16"},
    {ONE_("'U8'", "[16]", "[16]"), 16, "data_offsets|two numbers"},
    {ONE_("'U8'", "[16]", "[0,16,16]"), 16, "two numbers"}, {"{'a':[]}", 0, "tensor a, entry|an object, found an array"},
    {"{'a':{'dtype':'U8','dtype':'U8','shape':[16],'data_offsets':[0,16]}}", 16, "different keys|\"dtype\" again"},
    // Names.
    {U8_(",'a':{'dtype':'U8','shape':[0],'data_offsets':[16,16]}"), 16, "different keys|\"a\" again"},
    {"{'':{'dtype':'U8','shape':[16],'data_offsets':[0,16]}}", 16, "offset 9|an empty name"},
    {"{'a\\u0000':{'dtype':'U8','shape':[16],'data_offsets':[0,16]}}", 16, "a control character"},
    {"{'a\\u007f':{'dtype':'U8','shape':[16],'data_offsets':[0,16]}}", 16, "a control character"},
    // Metadata.
    {U8_(",'__metadata__':{'a':1}"), 16, "__metadata__|a string, found 1"},
    {U8_(",'__metadata__':{'a':null}"), 16, "a string, found null"},
    {U8_(",'__metadata__':[]"), 16, "__metadata__|an object"},
    {U8_(",'__metadata__':{'a':'b','a':'b'}"), 16, "\"a\" again"},
    // JSON.
    {" " U8_(""), 16, "offset 8: expected '{'"}, {"[]", 0, "offset 8: expected '{'"},
    {U8_("") "x", 16, "nothing after the value"}, {U8_("") "{}", 16, "nothing after"},
    {"{'\xFF':1}", 0, "UTF-8"}, {"{'\\ud800':1}", 0, "surrogate"}, {"{", 0, "begins at byte 8|offset 1"},
    {"{'a':{'x':[[[[[[[[1]]]]]]]]}}", 0, "8 levels of JSON, found 10"},
    {"{'a':{'x':[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1", 0, "64 levels"}};
  char path[4096], dir[512];
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "bad.safetensors");
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    char words[220];
    put_st_(dir, "bad.safetensors", cases[i].header, strlen(cases[i].header), cases[i].data);
    snprintf(words, sizeof words, "bad.safetensors|%s", cases[i].words);
    CHECK(refused_(read_st_, path, EXIT_DAMAGED, words), "%s", cases[i].header);
  }
  // A zero byte as padding; a name of 513 bytes, while 512 are fine.
  char text[700], name[ST_MAX_NAME + 2], err[256];
  put_st_(dir, "bad.safetensors", U8_("") "\0", strlen(U8_("")) + 1, 16);
  CHECK(refused_(read_st_, path, EXIT_DAMAGED, "nothing after the value, found byte 0x00"), "padding with zero");
  memset(name, 'n', sizeof name);
  for (int extra = 0; extra < 2; extra++) {
    name[ST_MAX_NAME + extra] = 0;
    int n = snprintf(text, sizeof text, "{'%s':{'dtype':'U8','shape':[1],'data_offsets':[0,1]}}", name);
    put_st_(dir, "bad.safetensors", text, (size_t)n, 1);
    if (extra) CHECK(refused_(read_st_, path, EXIT_DAMAGED, "512 bytes|a longer one"), "name of 513 bytes");
    else CHECK(run_child(read_st_, path, err, sizeof err) == 0, "name of 512 bytes: %s", err);
    name[ST_MAX_NAME] = 'n';
  }
  // Lengths of the header that nobody may believe.
  static const struct { uint64_t n; size_t file; const char *words; } lengths[] = {
    {0, 100, "offset 0|found a length of 0"}, {100000001, 100, "found a length of 100000001"},
    {1ull << 63, 100, "9223372036854775808"},
    {UINT64_MAX, 100, "18446744073709551615"}, {UINT64_MAX - 7, 100, "18446744073709551608"},
    {93, 100, "93 bytes, found only 92|cut off"},
    {2, 8, "found only 0"}, {2, 7, "8 bytes of the header's length, found a file of 7"}, {2, 0, "a file of 0"}};
  for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
    char raw[100];
    memset(raw, ' ', sizeof raw);
    memcpy(raw, &lengths[i].n, 8);
    put_file_(dir, "bad.safetensors", raw, lengths[i].file);
    CHECK(refused_(read_st_, path, EXIT_DAMAGED, lengths[i].words), "a length of %llu", (unsigned long long)lengths[i].n);
  }
  // What downloads leave instead of data. A missing file is the user's mistake.
  static const char lfs[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
  static const char page[] = "\n<!DOCTYPE html><html>Not found</html>";
  put_file_(dir, "bad.safetensors", lfs, strlen(lfs));
  CHECK(refused_(read_st_, path, EXIT_DAMAGED, "Git LFS pointer|git lfs pull"), "LFS pointer");
  put_file_(dir, "bad.safetensors", page, strlen(page));
  CHECK(refused_(read_st_, path, EXIT_DAMAGED, "HTML page"), "HTML page");
  CHECK(refused_(read_st_, dir, EXIT_USAGE, "not a file"), "a directory");
  path_join(path, sizeof path, dir, "none.safetensors");
  CHECK(refused_(read_st_, path, EXIT_USAGE, "none.safetensors|No such file"), "missing file");
}

// In a child: asks for what cannot be given.
static void read_codes_as_floats_(void *path) {
  StFile f;
  float out[2];
  st_open(&f, (const char *)path);
  st_read_f32(&f, st_find(&f, "t"), out, 0, 2);
}

static void read_past_end_(void *path) {
  StFile f;
  float out[2];
  st_open(&f, (const char *)path);
  st_read_f32(&f, st_find(&f, "b"), out, 4, 2);
}

static void test_st_dtypes_refused(void) {
  char text[200], path[4096], dir[512], words[64];
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "t.safetensors");
  for (int dtype = ST_U8; dtype < ST_DTYPES; dtype++) {
    size_t bytes = 2 * st_dtype_size(dtype);
    snprintf(text, sizeof text, "{'t':{'dtype':'%s','shape':[2],'data_offsets':[0,%zu]}}", st_dtype_name(dtype), bytes);
    put_st_(dir, "t.safetensors", text, strlen(text), bytes);
    snprintf(words, sizeof words, "t.safetensors|dtype %s of tensor t|not supported", st_dtype_name(dtype));
    CHECK(refused_(read_codes_as_floats_, path, EXIT_DAMAGED, words), "%s", st_dtype_name(dtype));
  }
  CHECK(write_small_(path, 1) == 0, "write");
  CHECK(refused_(read_past_end_, path, EXIT_FAILED, "bug|tensor b|has 5"), "read past the end");
}

// ---------------------------------------------------------------------------------------------------------
// safetensors: writing.

static void test_st_round_trip(void) {
  char path[4096];
  StFile f;
  StTestSource_ s = {st_entries_, 1, 0, 0, 0};
  size_t n = ARRAY_LEN(st_entries_);
  path_join(path, sizeof path, test_dir(), "a.safetensors");
  CHECK(st_write(path, st_entries_, n, st_meta_, 2, st_test_source_, &s) == 0, "write");
  st_open(&f, path);
  CHECK(f.n_tensors == n && f.data_at % 8 == 0, "%zu tensors, data at %zu", f.n_tensors, f.data_at);
  CHECK(st_verify(&f) == 1, "no checksums");
  CHECK(strcmp(st_metadata(&f, "format"), "pt") == 0 && strcmp(st_metadata(&f, "step"), "1200") == 0, "metadata");
  CHECK(strcmp(st_metadata(&f, "note"), st_meta_[1].value) == 0 && st_metadata(&f, "nothing") == NULL, "metadata");
  float *got = (float *)xmalloc(140000 * sizeof *got);
  for (size_t e = 0; e < n; e++) {
    const StEntry *want = &st_entries_[e];
    const StTensor *t = st_find(&f, want->name);
    CHECK(t != NULL, "tensor %s is missing", want->name);
    if (t == NULL) continue;
    CHECK(t->dtype == want->dtype && t->ndim == want->ndim, "tensor %s: dtype %d", t->name, t->dtype);
    for (int k = 0; k < t->ndim; k++) CHECK(t->shape[k] == want->shape[k], "tensor %s: dimension %d is %zu", t->name, k, t->shape[k]);
    CHECK((f.data_at + t->begin) % st_dtype_size(t->dtype) == 0, "tensor %s is not aligned", t->name);
    size_t wrong = 0;
    if (t->dtype == ST_U8) {
      for (size_t i = 0; i < t->n; i++) wrong += st_data(&f, t)[i] != (unsigned char)rng_u64(1, e, i);
    } else {
      st_read_f32(&f, t, got, 0, t->n);
      for (size_t i = 0; i < t->n; i++) wrong += got[i] != st_value_(e, i, 1);
      if (t->n > 6) {   // a piece from the middle
        st_read_f32(&f, t, got, t->n / 2, 3);
        for (size_t i = 0; i < 3; i++) wrong += got[i] != st_value_(e, t->n / 2 + i, 1);
      }
    }
    CHECK(wrong == 0, "tensor %s: %zu wrong elements", t->name, wrong);
  }
  // Larger elements first, then names.
  for (size_t i = 1; i < n; i++) {
    const StTensor *a = &f.tensors[i - 1], *b = &f.tensors[i];
    size_t sa = st_dtype_size(a->dtype), sb = st_dtype_size(b->dtype);
    if (a->n > 0 && b->n > 0) CHECK(sa > sb || (sa == sb && strcmp(a->name, b->name) < 0), "%s before %s", a->name, b->name);
  }
  st_close(&f);

  // The same content gives the same bytes, whatever the order of the entries; nothing else is left in the directory.
  size_t len, len2;
  StEntry reversed[ARRAY_LEN(st_small_)];
  char *one, *two;
  CHECK(write_small_(path, 1) == 0, "write");
  one = read_file(path, &len);
  for (size_t i = 0; i < 3; i++) reversed[i] = st_small_[2 - i];
  CHECK(write_small_(path, 1) == 0, "write");
  two = read_file(path, &len2);
  CHECK(len == len2 && memcmp(one, two, len) == 0, "the same content, other bytes");
  free(two);
  StTestSource_ back = {reversed, 1, 0, 0, 0};
  CHECK(st_write(path, reversed, 3, st_meta_, 1, st_test_source_, &back) == 0, "write");
  two = read_file(path, &len2);
  CHECK(len == len2, "the order of the entries changes the file");
  free(one);
  free(two);
  CHECK(st_write(path, NULL, 0, NULL, 0, st_test_source_, NULL) == 0, "write");
  st_open(&f, path);
  CHECK(f.n_tensors == 0 && strcmp(st_metadata(&f, "format"), "pt") == 0 && st_verify(&f) == 1, "a file without tensors");
  st_close(&f);
  free(got);
}

// In a child: writes what must not be written. which: the mistake.
typedef struct {
  const char *path;
  int which;
} BadWrite_;

static void bad_write_(void *arg) {
  const BadWrite_ *b = (const BadWrite_ *)arg;
  static const StMeta bad_meta[] = {{"format", "np"}, {"crc32.b", "0"}, {"x", "\xFF"}, {"a", "1"}, {"a", "2"}};
  StEntry e[3];
  StTestSource_ s = {e, 1, 0, 0, 0};
  size_t n_meta = b->which == 5 || b->which == 6 || b->which == 7 ? 1 : b->which == 8 ? 2 : 0;
  memcpy(e, st_small_, sizeof e);
  if (b->which == 0) e[0].dtype = ST_F16, s.add = 65540.0f;   // element 2 becomes too large
  if (b->which == 1) e[2].name = "a.weight";
  if (b->which == 2) e[1].name = "";
  if (b->which == 3) e[1].name = "a\nb";
  if (b->which == 4) e[1].dtype = ST_I64;
  if (b->which == 9) e[1].ndim = 9;
  if (b->which == 10) e[1].name = "__metadata__";
  if (b->which == 11) e[1].name = "\xC3";
  st_write(b->path, e, 3, b->which >= 5 && b->which <= 8 ? bad_meta + b->which - 5 : NULL, n_meta, st_test_source_, &s);
}

static void test_st_write_refuses(void) {
  char path[4096], tmp[4096 + 8], dir[512];
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "a.safetensors");
  snprintf(tmp, sizeof tmp, "%s.tmp", path);
  for (int which = 0; which < 12; which++) {
    BadWrite_ b = {path, which};
    if (which == 0) CHECK(refused_(bad_write_, &b, EXIT_USAGE, "tensor a.weight, element 2|65504|F16"), "overflow of F16");
    else CHECK(refused_(bad_write_, &b, EXIT_FAILED, "bug: |a.safetensors"), "mistake %d", which);
    CHECK(!is_file(path) && !is_file(tmp), "mistake %d left a file", which);
  }
  // A source that changes its mind between the two passes (three tensors, so call 4 begins the second).
  StTestSource_ s = {st_small_, 1, 0, 6, 0};
  CHECK(st_write(path, st_small_, 3, NULL, 0, st_test_source_, &s) == EIO, "a changing source was accepted");
  CHECK(!is_file(path) && !is_file(tmp), "a changing source left a file");
  CHECK(write_small_("/nonexistent/dir/a.safetensors", 1) == ENOENT, "missing directory");
}

// Each write, fsync and rename fails once; then the process is killed at each: the old file or the whole new one remains.
typedef struct {
  const char *path;
  int countdown;
} Killed_;

static void killed_write_(void *arg) {
  const Killed_ *k = (const Killed_ *)arg;
  io_kill = 1;
  io_countdown = k->countdown;
  write_small_(k->path, 2);
}

static void test_st_faults(void) {
  char path[4096], tmp[4096 + 8], err[256], dir[512];
  int failures = 0, kept_new = 0;
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "a.safetensors");
  snprintf(tmp, sizeof tmp, "%s.tmp", path);
  for (int at = 1; at < 100; at++) {
    CHECK(write_small_(path, 1) == 0, "write");
    io_countdown = at;
    int result = write_small_(path, 2);
    io_countdown = 0;
    int which = run_child(which_small_, path, err, sizeof err);
    if (result == 0) {
      CHECK(which == 1, "operation %d: success, but the file is not the new one: %s", at, err);
      break;
    }
    failures++;
    CHECK(result == ENOSPC && (which == 0 || which == 1), "operation %d: errno %d, file %d %s", at, result, which, err);
    CHECK(!is_file(tmp), "operation %d left %s", at, tmp);
    kept_new += which == 1;
  }
  // Header, three tensors, fsync, rename, fsync of the directory. Only after the rename the new file is there.
  CHECK(failures == 7 && kept_new == 1, "%d operations failed, %d times the new file was there", failures, kept_new);

  for (int at = 1; at <= failures + 1; at++) {
    Killed_ k = {path, at};
    CHECK(write_small_(path, 1) == 0, "write over what the killed process left");
    int code = run_child(killed_write_, &k, err, sizeof err), which = run_child(which_small_, path, err, sizeof err);
    CHECK(code == (at <= failures ? 99 : 0), "operation %d: exit code %d", at, code);
    CHECK(which == (at < failures ? 0 : 1), "killed at operation %d: file %d %s", at, which, err);
  }
}

// ---------------------------------------------------------------------------------------------------------
// safetensors: damage.

static void test_st_damage(void) {
  char path[4096], err[512], dir[512];
  size_t len;
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "a.safetensors");
  CHECK(write_small_(path, 1) == 0, "write");
  char *good = read_file(path, &len), *bad = (char *)xmalloc(len);
  StFile f;
  st_open(&f, path);
  const StTensor *t = st_find(&f, "a.weight");
  size_t data_at = f.data_at, at = data_at + t->begin + 5;
  st_close(&f);

  // A flipped bit of the data: the tensor, its place, both checksums.
  char words[128];
  memcpy(bad, good, len);
  bad[at] = (char)(bad[at] ^ 0x10);
  put_file_(dir, "a.safetensors", bad, len);
  snprintf(words, sizeof words, "a.safetensors|tensor a.weight at offset %zu|CRC-32|found", at - 5);
  CHECK(refused_(read_st_, path, EXIT_DAMAGED, words), "a flipped bit of the data");

  // One flipped bit in each byte of the file, and the file cut off at each length. A damaged name of the header's own checksum
  // only switches that one off: everything that it protects is then undamaged.
  static const char sum_name[] = "crc32.__metadata__";
  const char *sum_at = strstr(good + 8, sum_name);
  size_t name_at = sum_at ? (size_t)(sum_at - good) : len;
  CHECK(sum_at != NULL, "no checksum of the header");
  for (size_t i = 0; i < len; i++) {
    memcpy(bad, good, len);
    bad[i] = (char)(bad[i] ^ (1 << (i * 5 % 8)));
    put_raw_(path, bad, len);
    int code = run_child(read_st_, path, err, sizeof err);
    if (i >= name_at && i < name_at + strlen(sum_name)) CHECK(code == 0 || code == EXIT_DAMAGED, "byte %zu: exit code %d", i, code);
    else CHECK(code == EXIT_DAMAGED && strstr(err, path), "byte %zu, bit %zu: exit code %d: %s", i, i * 5 % 8, code, err);
    put_raw_(path, good, i);
    code = run_child(read_st_, path, err, sizeof err);
    CHECK(code == EXIT_DAMAGED && strstr(err, path), "cut to %zu bytes: exit code %d: %s", i, code, err);
  }

  // Files without checksums are read; a checksum that is missing, superfluous or malformed is damage.
  static const struct { const char *meta, *words; } sums[] = {
    {"'crc32.a':'cecee288'", "tensor b|found none"},
    {"'crc32.a':'cecee288','crc32.b':'00000000','crc32.c':'00000000'", "tensor is missing"},
    {"'crc32.a':'CECEE288','crc32.b':'00000000'", "tensor a|CECEE288|cecee288"},
    {"'crc32.a':'cecee28','crc32.b':'00000000'", "tensor a"},
    {"'crc32.a':'cecee288','crc32.b':'00000001'", "tensor b"},
    {"'crc32.a':'cecee288','crc32.b':'00000000','crc32.__metadata__':'00000000'", "the header"},
    {"'crc32.a':'cecee288','crc32.b':'00000000','crc32.a\\u0000':'00000000'", "missing"},
    {"'crc32.a':'cecee288','crc32.b':'00000000'", NULL}, {"", NULL}};
  for (size_t i = 0; i < ARRAY_LEN(sums); i++) {
    char text[400];
    int n = snprintf(text, sizeof text, "{'__metadata__':{%s},'a':{'dtype':'U8','shape':[16],'data_offsets':[0,16]},"
                     "'b':{'dtype':'U8','shape':[0],'data_offsets':[0,0]}}", sums[i].meta);
    put_st_(dir, "a.safetensors", text, (size_t)n, 16);
    if (sums[i].words) CHECK(refused_(read_st_, path, EXIT_DAMAGED, sums[i].words), "%s", sums[i].meta);
    else CHECK(run_child(read_st_, path, err, sizeof err) == 0, "%s: %s", sums[i].meta, err);
  }
  free(good);
  free(bad);
}

// Deterministic damage to files without checksums, where the header alone must protect: read or refused, never a crash.
static void test_st_fuzz(void) {
  static const char header[] = "{'__metadata__':{'k':'v'},'a':{'dtype':'F32','shape':[2,2],'data_offsets':[0,16]},'b':{'dtype':'BF16',"
    "'shape':[3],'data_offsets':[16,22]},'c':{'dtype':'U8','shape':[1,2,1],'data_offsets':[22,24]}}  ";
  static const char pool[] = "0123456789[]{},:\"\\-.eE u\x80\xFF";
  char path[4096], dir[512], err[512];
  size_t n = sizeof header - 1, len, read = 0, refused = 0;
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "a.safetensors");
  put_st_(dir, "a.safetensors", header, n, 24);
  CHECK(run_child(read_st_, path, err, sizeof err) == 0, "%s", err);
  char *good = read_file(path, &len), *bad = (char *)xmalloc(len);
  for (uint64_t i = 0; i < 600; i++) {
    memcpy(bad, good, len);
    for (uint64_t k = 0; k <= i % 3; k++) {
      uint64_t r = rng_u64(6, RNG_TEST, i * 4 + k);
      size_t at = i % 5 == 0 ? r % 10 : r % len;   // a fifth of them in the length
      if (i & 1) bad[at] = (char)(bad[at] ^ (1 << (r >> 32 & 7)));
      else bad[at] = pool[(r >> 32) % (sizeof pool - 1)];
    }
    put_raw_(path, bad, len);
    int code = run_child(read_st_, path, err, sizeof err);
    CHECK(code == 0 || code == EXIT_DAMAGED, "damage %d: exit code %d: %s", (int)i, code, err);
    CHECK(code == 0 || (strncmp(err, "error: ", 7) == 0 && strstr(err, path)), "damage %d: says '%s'", (int)i, err);
    if (code == 0) read++;
    else refused++;
  }
  CHECK(read > 10 && refused > 300, "%zu read, %zu refused", read, refused);
  free(good);
  free(bad);
}

// ---------------------------------------------------------------------------------------------------------
// safetensors: sets.

static void open_set_(void *dir) {
  StSet s;
  alarm(10);
  st_set_open(&s, (const char *)dir);
  st_set_verify(&s);
  st_set_close(&s);
}

// Writes entries[0..n) of the small tensors as one shard.
static void put_shard_file_(const char *dir, const char *name, size_t first, size_t n) {
  char path[4096];
  StTestSource_ s = {st_small_ + first, 1, 0, 0, 0};
  path_join(path, sizeof path, dir, name);
  int err = st_write(path, st_small_ + first, n, NULL, 0, st_test_source_, &s);
  if (err) die(EXIT_FAILED, "%s: %s", path, strerror(err));
}

#define S1_ "model-00001-of-00002.safetensors"
#define S2_ "model-00002-of-00002.safetensors"

static void test_st_sets(void) {
  static const char index[] = "{'metadata':{'total_size':1e30},'weight_map':{'c':'" S2_ "','a.weight':'" S1_ "','b':'" S2_ "'}}";
  char dir[512], path[4096], err[512];
  StSet s;
  const StFile *f, *g;
  float x[5];
  snprintf(dir, sizeof dir, "%s", test_dir());
  CHECK(refused_(open_set_, dir, EXIT_USAGE, "neither model.safetensors nor model.safetensors.index.json"), "empty directory");
  path_join(path, sizeof path, dir, "nonexistent");
  CHECK(refused_(open_set_, path, EXIT_USAGE, "nonexistent|neither"), "missing directory");

  // One file; then an index beside it, which wins.
  put_shard_file_(dir, "model.safetensors", 1, 2);
  st_set_open(&s, dir);
  CHECK(s.n_files == 1 && st_set_find(&s, "b", &f) && f == s.files && !st_set_find(&s, "a.weight", &f), "one file");
  CHECK(st_set_verify(&s) == 1, "checksums");
  st_set_close(&s);
  put_shard_file_(dir, S1_, 0, 1);
  put_shard_file_(dir, S2_, 1, 2);
  put_index_(dir, index);
  st_set_open(&s, dir);
  const StTensor *a = st_set_find(&s, "a.weight", &f), *b = st_set_find(&s, "b", &g);
  CHECK(s.n_files == 2 && a && b && f != g && st_set_find(&s, "c", &g), "two shards");
  CHECK(a && f == &s.files[0] && a->dtype == ST_BF16 && a->n == 12, "a.weight");
  if (b) {
    st_set_find(&s, "b", &g);
    st_read_f32(g, b, x, 0, 5);
    CHECK(x[4] == st_value_(0, 4, 1), "b[4] is %g", x[4]);
  }
  CHECK(st_set_find(&s, "d", &f) == NULL && f == NULL && st_set_verify(&s) == 2, "a tensor from nowhere");
  st_set_close(&s);

  static const struct { const char *map; int code; const char *words; } cases[] = {
    {"'a.weight':'" S1_ "','b':'" S2_ "'", 3, S2_ "|tensor c|weight_map of|found none"},
    {"'a.weight':'" S1_ "','b':'" S1_ "','c':'" S2_ "'", 3, "index.json|tensor b in|" S1_ "|found none"},
    {"'a.weight':'" S1_ "','b':'" S2_ "','c':'" S2_ "','d':'" S2_ "'", 3, "tensor d in"},
    {"'a.weight':'" S1_ "','b':'" S2_ "','c':'" S2_ "','b\\u0000':'" S2_ "'", 3, "tensor b"},
    {"'a.weight':'model-3.safetensors','b':'" S2_ "','c':'" S2_ "'",
     2, "index.json names the file|model-3.safetensors|missing"},
    {"'a.weight':'../" S1_ "'", 3, "weight_map at offset 26|plain name"},
    {"'a.weight':'/etc/passwd'", 3, "plain name|/etc/passwd"},
    {"'a.weight':'x\\\\y'", 3, "plain name"}, {"'a.weight':'..'", 3, "plain name"},
    {"'a.weight':''", 3, "plain name"},
    {"'a.weight':'" S1_ "\\u0000x'", 3, "plain name"}, {"'a.weight':1", 3, "plain name|found 1"},
    {"", 3, "at least one tensor"},
    {"'a.weight':'" S1_ "','a.weight':'" S1_ "'", 3, "\"a.weight\" again"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    char text[1000];
    snprintf(text, sizeof text, "{'weight_map':{%s}}", cases[i].map);
    put_index_(dir, text);
    CHECK(refused_(open_set_, dir, cases[i].code, cases[i].words), "%s", cases[i].map);
  }
  static const char *const bad[][2] = {{"{}", "weight_map"}, {"{'weight_map':[]}", "weight_map|an array"},
                                       {"[]", "weight_map"}, {"{'weight_map':", "offset 14"}, {"<html>", "HTML page"},
                                       {"version https://git-lfs.github.com", "Git LFS"}, {"", "index.json|offset 0"}};
  for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
    put_index_(dir, bad[i][0]);
    CHECK(refused_(open_set_, dir, EXIT_DAMAGED, bad[i][1]), "%s", bad[i][0]);
  }
  // A tensor in both shards; a damaged shard.
  put_index_(dir, index);
  put_shard_file_(dir, S1_, 0, 2);
  CHECK(refused_(open_set_, dir, EXIT_DAMAGED, S1_ "|tensor b|only in " S2_ "|both"), "a tensor in two shards");
  put_shard_file_(dir, S1_, 0, 1);
  CHECK(run_child(open_set_, dir, err, sizeof err) == 0, "%s", err);
  size_t len;
  path_join(path, sizeof path, dir, S2_);
  char *file = read_file(path, &len);
  file[len - 1] = (char)(file[len - 1] ^ 1);
  put_file_(dir, S2_, file, len);
  CHECK(refused_(open_set_, dir, EXIT_DAMAGED, S2_ "|tensor c|CRC-32"), "a damaged shard");
  free(file);
}

// The checksum itself: the known value, any cut into pieces, and a flip of any bit.
static void test_crc32(void) {
  unsigned char data[300];
  for (size_t i = 0; i < sizeof data; i++) data[i] = (unsigned char)rng_u64(8, RNG_TEST, i);
  CHECK(crc32_bytes(0, "123456789", 9) == 0xCBF43926u && crc32_bytes(0, "", 0) == 0, "%08x", crc32_bytes(0, "123456789", 9));
  uint32_t whole = crc32_bytes(0, data, sizeof data), bitwise = 0xFFFFFFFFu;
  for (size_t i = 0; i < sizeof data * 8; i++) {
    uint32_t bit = (bitwise ^ (uint32_t)(data[i / 8] >> (i % 8))) & 1;
    bitwise = bitwise >> 1 ^ (bit ? 0xEDB88320u : 0);
  }
  CHECK(whole == ~bitwise, "%08x, bit by bit %08x", whole, ~bitwise);
  for (size_t cut = 0; cut <= 40; cut++) {
    uint32_t crc = crc32_bytes(crc32_bytes(0, data, cut), data + cut, sizeof data - cut);
    CHECK(crc == whole, "cut at %zu: %08x, whole %08x", cut, crc, whole);
  }
  for (size_t i = 0; i < sizeof data * 8; i++) {
    data[i / 8] = (unsigned char)(data[i / 8] ^ (1 << (i % 8)));
    CHECK(crc32_bytes(0, data, sizeof data) != whole, "bit %zu is not noticed", i);
    data[i / 8] = (unsigned char)(data[i / 8] ^ (1 << (i % 8)));
  }
}

#define FILES_TESTS                                                                                                \
  {"json_accepts", "values of every kind, read exactly", test_json_accepts},                                       \
  {"json_refuses", "what RFC 8259 forbids and two readers could read differently", test_json_refuses},             \
  {"json_depth", "64 levels and not one more", test_json_depth},                                                   \
  {"json_lookup", "members, offsets, fallbacks", test_json_lookup},                                                \
  {"json_writes", "strings and shortest numbers round trip", test_json_writes},                                    \
  {"json_large", "150,000 keys, long strings: no quadratic time", test_json_large},                                \
  {"json_damage", "cut at every length, 20,000 damaged copies", test_json_damage},                                 \
  {"half_floats", "bf16 and f16: all values, rounding by the definition", test_half_floats},                       \
  {"crc32", "known value, pieces, every bit", test_crc32},                                                         \
  {"st_accepts", "odd headers, unaligned data, scalars, empty tensors", test_st_accepts},                          \
  {"st_refuses", "every wrong header, length and impostor", test_st_refuses},                                      \
  {"st_dtypes_refused", "dtypes that are no floats", test_st_dtypes_refused},                                      \
  {"st_round_trip", "all dtypes written and read, order and alignment", test_st_round_trip},                       \
  {"st_write_refuses", "overflow of F16 and mistakes of callers", test_st_write_refuses},                          \
  {"st_faults", "each write, fsync and rename fails or kills", test_st_faults},                                    \
  {"st_damage", "a flipped bit in each byte, every length, odd checksums", test_st_damage},                        \
  {"st_fuzz", "600 damaged headers: read or refused, never a crash", test_st_fuzz},                                \
  {"st_sets", "shards and index, all their disagreements", test_st_sets}

#endif
