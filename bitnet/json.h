/*
json.h: JSON texts into a tree, and strings and numbers into JSON.

What it is:  a strict reader of RFC 8259 for the files that come with models (configs, tokenizers, the headers of weights,
             requests of a client). What two readers could understand differently is refused: duplicate keys, broken UTF-8,
             halves of surrogate pairs, integers that do not fit. Integers stay exact; 8e0 and 2.0 are reals.
What not:    no comments, no trailing commas, no NaN; no tree writer: callers print their own braces and let json_put_string
             and json_put_number do what can go wrong.
Read before: bitnet/utils.h.
Defines:     Json, JsonDoc, JsonType; json_parse, json_free, json_get, json_get_string, json_get_int, json_get_number,
             json_get_bool; json_put_string, json_put_number; utf8_char.
*/
#ifndef BITNET_JSON_H
#define BITNET_JSON_H

#include "utils.h"

typedef enum { JSON_NULL, JSON_BOOL, JSON_INT, JSON_REAL, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

enum { JSON_MAX_DEPTH = 64 };   // arrays and objects inside each other; the reader is recursive

// One value. Members of an object and elements of an array are a list: for (c = v->child; c; c = c->next).
typedef struct Json Json;
struct Json {
  JsonType type;
  const char *key;      // member of an object: its unescaped, zero-terminated name; otherwise NULL
  size_t key_len;
  size_t key_offset;    // where the quote of the key stands in the text
  Json *child, *next;
  size_t count;         // array and object: number of children
  int64_t i;            // JSON_INT; JSON_BOOL: 0 or 1
  double d;             // JSON_REAL; also set for JSON_INT (rounded beyond 2^53)
  const char *s;        // JSON_STRING: unescaped, zero-terminated; \u0000 puts a zero inside, so len decides
  size_t len;
  size_t offset;        // of the value's first byte in the text
  Json **slot;          // objects with many members: hash table over the keys, open addressing; otherwise NULL
  size_t n_slots;       // a power of two, at least twice count
};

typedef struct JsonBlock_ JsonBlock_;
struct JsonBlock_ {
  JsonBlock_ *next;
  size_t used, cap;   // bytes behind this head
};

// A parsed text. It holds copies of all strings: the text itself may go away.
typedef struct {
  Json *root;
  int depth;             // the deepest nesting found: a lone number has 0, [] has 1
  JsonBlock_ *blocks;    // values and hash tables; each block is twice as large as the one before
  char *strings;         // all strings one behind the other
} JsonDoc;

// ---------------------------------------------------------------------------------------------------------
// UTF-8.

// The number of bytes (1 to 4) of the well-formed character at s[0..n), or 0 if there is none: a stray or missing
// continuation byte, an overlong form, a surrogate, a code point above U+10FFFF, or n = 0.
UNUSED static size_t utf8_char(const char *s, size_t n) {
  const unsigned char *p = (const unsigned char *)s;
  if (n == 0) return 0;
  if (p[0] < 0x80) return 1;
  size_t len = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
  if (p[0] < 0xC2 || p[0] > 0xF4 || n < len) return 0;
  // The second byte's range depends on the first: this is where overlong forms and surrogates are excluded.
  unsigned lo = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
  unsigned hi = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
  if (p[1] < lo || p[1] > hi) return 0;
  for (size_t i = 2; i < len; i++) {
    if ((p[i] & 0xC0) != 0x80) return 0;
  }
  return len;
}

// Writes a code point that is no surrogate as UTF-8. Returns the number of bytes, 1 to 4.
UNUSED static size_t utf8_put_(char *out, unsigned c) {
  if (c < 0x80) {
    out[0] = (char)c;
    return 1;
  }
  size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
  out[0] = (char)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c);
  return n;
}

// ---------------------------------------------------------------------------------------------------------
// Memory: a few blocks that only grow, freed together.

UNUSED static void json_free(JsonDoc *doc) {
  for (JsonBlock_ *b = doc->blocks, *next; b; b = next) {
    next = b->next;
    free(b);
  }
  free(doc->strings);
  memset(doc, 0, sizeof *doc);
}

// Zeroed bytes (a multiple of 8) that live as long as the document.
UNUSED static void *json_alloc_(JsonDoc *doc, size_t bytes) {
  JsonBlock_ *b = doc->blocks;
  if (b == NULL || b->cap - b->used < bytes) {
    size_t cap = b ? size_mul(b->cap, 2) : 4096;
    while (cap < bytes) cap = size_mul(cap, 2);
    b = (JsonBlock_ *)xmalloc(sizeof *b + cap);
    b->next = doc->blocks;
    b->used = 0;
    b->cap = cap;
    doc->blocks = b;
  }
  void *p = (char *)(b + 1) + b->used;
  b->used += bytes;
  return memset(p, 0, bytes);
}

// ---------------------------------------------------------------------------------------------------------
// Reading. Each function leaves `at` behind what it has read; after an error it returns 0 and everything stops.

typedef struct {
  const char *s;      // the text
  size_t len, at;
  int depth;          // open arrays and objects
  JsonDoc *doc;
  size_t used;        // bytes of doc->strings
  char *err;
  size_t errcap;
} JsonReader_;

// The byte that comes next, or -1 at the end.
UNUSED static int json_peek_(const JsonReader_ *r) {
  return r->at < r->len ? (unsigned char)r->s[r->at] : -1;
}

UNUSED static void json_blanks_(JsonReader_ *r) {
  for (; r->at < r->len; r->at++) {
    char c = r->s[r->at];
    if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
  }
}

// Notes the error and returns 0. found = NULL names the byte at the offset.
UNUSED static int json_fail_(JsonReader_ *r, size_t offset, const char *expected, const char *found) {
  char byte[32];
  if (found == NULL) {
    unsigned c = offset < r->len ? (unsigned char)r->s[offset] : 0;
    if (offset >= r->len) snprintf(byte, sizeof byte, "the end of the text");
    else if (c > 0x20 && c < 0x7F) snprintf(byte, sizeof byte, "'%c'", (char)c);
    else snprintf(byte, sizeof byte, "byte 0x%02X", c);
    found = byte;
  }
  if (r->errcap > 0) snprintf(r->err, r->errcap, "offset %zu: expected %s, found %s", offset, expected, found);
  return 0;
}

// The four digits of a \u escape at `at`, or -1.
UNUSED static long json_hex4_(JsonReader_ *r) {
  long v = 0;
  for (int i = 0; i < 4; i++, r->at++) {
    int c = json_peek_(r);
    if (c < 0 || !isxdigit(c)) return json_fail_(r, r->at, "four hexadecimal digits after \\u", NULL) - 1;
    v = v * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
  }
  return v;
}

// An escape whose backslash was read: appends what it stands for.
UNUSED static int json_escape_(JsonReader_ *r) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  char *out = r->doc->strings;
  size_t start = r->at - 1;
  int c = json_peek_(r);
  const char *found = c > 0 ? strchr(from, c) : NULL;
  if (found) {
    r->at++;
    out[r->used++] = to[found - from];
    return 1;
  }
  if (c != 'u') return json_fail_(r, r->at, "one of \" \\ / b f n r t u after a backslash", NULL);
  r->at++;
  long v = json_hex4_(r);
  if (v < 0) return 0;
  if (v >= 0xDC00 && v <= 0xDFFF) return json_fail_(r, start, "a character", "the second half of a surrogate pair");
  if (v >= 0xD800 && v <= 0xDBFF) {
    if (r->len - r->at < 2 || r->s[r->at] != '\\' || r->s[r->at + 1] != 'u')
      return json_fail_(r, start, "a surrogate pair", "only its first half");
    r->at += 2;
    long low = json_hex4_(r);
    if (low < 0) return 0;
    if (low < 0xDC00 || low > 0xDFFF) return json_fail_(r, start, "a surrogate pair", "only its first half");
    v = 0x10000 + ((v - 0xD800) << 10) + (low - 0xDC00);
  }
  r->used += utf8_put_(out + r->used, (unsigned)v);
  return 1;
}

// The string whose opening quote is next; NULL after an error. It fits: unescaped it is at most as long as in the text, and
// its zero takes less than the two quotes.
UNUSED static const char *json_string_(JsonReader_ *r, size_t *len) {
  char *out = r->doc->strings;
  size_t start = r->used, open = r->at++;
  for (;;) {
    int c = json_peek_(r);
    if (c < 0) {
      json_fail_(r, open, "a closing quote for this string", "the end of the text");
      return NULL;
    }
    if (c < 0x20) {
      json_fail_(r, r->at, "an escape instead of a control character", NULL);
      return NULL;
    }
    r->at++;
    if (c == '"') break;
    if (c == '\\') {
      if (!json_escape_(r)) return NULL;
      continue;
    }
    size_t n = c < 0x80 ? 1 : utf8_char(r->s + r->at - 1, r->len - r->at + 1);
    if (n == 0) {
      json_fail_(r, r->at - 1, "UTF-8", NULL);
      return NULL;
    }
    out[r->used++] = (char)c;
    for (; n > 1; n--) out[r->used++] = r->s[r->at++];
  }
  *len = r->used - start;
  out[r->used++] = 0;
  return out + start;
}

// Skips digits; 0 if there is none.
UNUSED static int json_digits_(JsonReader_ *r) {
  size_t start = r->at;
  while (r->at < r->len && r->s[r->at] >= '0' && r->s[r->at] <= '9') r->at++;
  return r->at > start || json_fail_(r, r->at, "a digit", NULL);
}

// A number: an integer unless it has a fraction or an exponent.
UNUSED static int json_number_(JsonReader_ *r, Json *v) {
  size_t start = r->at;
  v->type = JSON_INT;
  if (json_peek_(r) == '-') r->at++;
  size_t first = r->at;
  if (!json_digits_(r)) return 0;
  if (r->s[first] == '0' && r->at > first + 1) return json_fail_(r, first, "a number without leading zeros", NULL);
  if (json_peek_(r) == '.') {
    v->type = JSON_REAL;
    r->at++;
    if (!json_digits_(r)) return 0;
  }
  if (json_peek_(r) == 'e' || json_peek_(r) == 'E') {
    v->type = JSON_REAL;
    r->at++;
    if (json_peek_(r) == '+' || json_peek_(r) == '-') r->at++;
    if (!json_digits_(r)) return 0;
  }
  // The C functions want a zero behind the digits: the free end of the strings lends the space.
  char *copy = r->doc->strings + r->used, shown[32];
  memcpy(copy, r->s + start, r->at - start);
  copy[r->at - start] = 0;
  snprintf(shown, sizeof shown, "%.24s%s", copy, r->at - start > 24 ? "..." : "");
  errno = 0;
  if (v->type == JSON_INT) v->i = strtoll(copy, NULL, 10);
  if (errno == ERANGE) return json_fail_(r, start, "an integer of at most 64 bits", shown);
  v->d = strtod(copy, NULL);
  return isfinite(v->d) || json_fail_(r, start, "a number that a double can hold", shown);
}

// 1 if the member has this name.
UNUSED static int json_key_is_(const Json *v, const char *key, size_t len) {
  return v->key_len == len && memcmp(v->key, key, len) == 0;
}

// The slot of this key in an object's table: the member's, or the empty one where it would go.
UNUSED static Json **json_slot_(const Json *obj, const char *key, size_t len) {
  size_t at = (size_t)hash_bytes(key, len) & (obj->n_slots - 1);
  while (obj->slot[at] && !json_key_is_(obj->slot[at], key, len)) at = (at + 1) & (obj->n_slots - 1);
  return &obj->slot[at];
}

// Looks for duplicate keys in a complete object: the few members of a small one pair by pair, those of a large one through
// a hash table, which stays and serves json_get.
UNUSED static int json_unique_(JsonReader_ *r, Json *obj) {
  const Json *twin = NULL;
  if (obj->count > 8) {
    for (obj->n_slots = 16; obj->n_slots < 2 * obj->count; obj->n_slots *= 2) {}
    obj->slot = (Json **)json_alloc_(r->doc, size_mul(obj->n_slots, sizeof *obj->slot));
  }
  for (Json *v = obj->child; v && !twin; v = v->next) {
    if (obj->slot) {
      Json **slot = json_slot_(obj, v->key, v->key_len);
      if (*slot) twin = v;
      else *slot = v;
      continue;
    }
    for (const Json *w = obj->child; w != v; w = w->next) {
      if (json_key_is_(w, v->key, v->key_len)) twin = v;
    }
  }
  if (twin == NULL) return 1;
  char shown[64];
  snprintf(shown, sizeof shown, "\"%.40s\" again", twin->key);
  for (char *c = shown; *c; c++) {
    if ((unsigned char)*c < 0x20) *c = '?';   // a key may hold anything; a message may not
  }
  return json_fail_(r, twin->key_offset, "different keys in an object", shown);
}

UNUSED static Json *json_value_(JsonReader_ *r);

// The children of an array or object whose opening bracket is next, up to the closing one.
UNUSED static int json_children_(JsonReader_ *r, Json *v) {
  int object = v->type == JSON_OBJECT, close = object ? '}' : ']';
  Json **tail = &v->child;
  if (++r->depth > JSON_MAX_DEPTH) return json_fail_(r, r->at, "at most 64 levels of arrays and objects", "one more");
  if (r->depth > r->doc->depth) r->doc->depth = r->depth;
  r->at++;
  json_blanks_(r);
  for (int more = json_peek_(r) != close; more;) {
    const char *key = NULL;
    size_t key_len = 0, key_offset = 0;
    if (object) {
      json_blanks_(r);
      key_offset = r->at;
      if (json_peek_(r) != '"') return json_fail_(r, r->at, "a key in quotes", NULL);
      if ((key = json_string_(r, &key_len)) == NULL) return 0;
      json_blanks_(r);
      if (json_peek_(r) != ':') return json_fail_(r, r->at, "':' after a key", NULL);
      r->at++;
    }
    Json *c = json_value_(r);
    if (c == NULL) return 0;
    c->key = key;
    c->key_len = key_len;
    c->key_offset = key_offset;
    *tail = c;
    tail = &c->next;
    v->count++;
    json_blanks_(r);
    more = json_peek_(r) == ',';
    if (more) r->at++;
    else if (json_peek_(r) != close) return json_fail_(r, r->at, object ? "',' or '}'" : "',' or ']'", NULL);
  }
  r->at++;   // the closing bracket
  r->depth--;
  return !object || json_unique_(r, v);
}

// true, false or null.
UNUSED static int json_literal_(JsonReader_ *r, Json *v) {
  static const struct { const char *word; JsonType type; int i; } words[] = {
    {"true", JSON_BOOL, 1}, {"false", JSON_BOOL, 0}, {"null", JSON_NULL, 0}};
  for (size_t k = 0; k < ARRAY_LEN(words); k++) {
    size_t n = strlen(words[k].word);
    if (r->len - r->at < n || memcmp(r->s + r->at, words[k].word, n) != 0) continue;
    v->type = words[k].type;
    v->i = words[k].i;
    r->at += n;
    return 1;
  }
  return json_fail_(r, r->at, "a value", NULL);
}

// Any value with the blanks before it; NULL after an error.
UNUSED static Json *json_value_(JsonReader_ *r) {
  json_blanks_(r);
  Json *v = (Json *)json_alloc_(r->doc, sizeof *v);
  int c = json_peek_(r), ok;
  v->offset = r->at;
  if (c == '{' || c == '[') {
    v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
    ok = json_children_(r, v);
  } else if (c == '"') {
    v->type = JSON_STRING;
    v->s = json_string_(r, &v->len);
    ok = v->s != NULL;
  } else if (c == '-' || (c >= '0' && c <= '9')) {
    ok = json_number_(r, v);
  } else {
    ok = json_literal_(r, v);
  }
  return ok ? v : NULL;
}

// Parses text[0..len), which needs no zero at its end. Returns 1; the caller frees doc with json_free. Or returns 0 with
// "offset N: expected .., found .." in err (cut to errcap bytes); then there is nothing to free.
UNUSED static int json_parse(JsonDoc *doc, const char *text, size_t len, char *err, size_t errcap) {
  JsonReader_ r = {text, len, 0, 0, doc, 0, err, errcap};
  memset(doc, 0, sizeof *doc);
  if (errcap > 0) err[0] = 0;
  doc->strings = (char *)xmalloc(len + 1);
  doc->root = json_value_(&r);
  json_blanks_(&r);
  if (doc->root && r.at == len) return 1;
  if (doc->root) json_fail_(&r, r.at, "nothing after the value", NULL);
  json_free(doc);
  return 0;
}

// ---------------------------------------------------------------------------------------------------------
// Looking up.

// The member of obj with this name; NULL if it has none, or if obj is NULL or not an object.
UNUSED static const Json *json_get(const Json *obj, const char *key) {
  size_t len = strlen(key);
  if (obj == NULL || obj->type != JSON_OBJECT) return NULL;
  if (obj->slot) return *json_slot_(obj, key, len);
  const Json *v = obj->child;
  while (v && !json_key_is_(v, key, len)) v = v->next;
  return v;
}

// The four below give the fallback when the member is absent and also when it has another type. Where a wrong type must be
// an error (it usually must, in a file), ask json_get for the member first and look at its type.
UNUSED static const char *json_get_string(const Json *obj, const char *key, const char *fallback) {
  const Json *v = json_get(obj, key);
  return v && v->type == JSON_STRING ? v->s : fallback;
}

UNUSED static int64_t json_get_int(const Json *obj, const char *key, int64_t fallback) {
  const Json *v = json_get(obj, key);
  return v && v->type == JSON_INT ? v->i : fallback;
}

// An integer is a number, too.
UNUSED static double json_get_number(const Json *obj, const char *key, double fallback) {
  const Json *v = json_get(obj, key);
  return v && (v->type == JSON_INT || v->type == JSON_REAL) ? v->d : fallback;
}

UNUSED static int json_get_bool(const Json *obj, const char *key, int fallback) {
  const Json *v = json_get(obj, key);
  return v && v->type == JSON_BOOL ? (int)v->i : fallback;
}

// ---------------------------------------------------------------------------------------------------------
// Writing.

// Appends s[0..len) in quotes. Each byte that is not UTF-8 becomes U+FFFD, so that the result is always valid JSON.
UNUSED static void json_put_string(StrBuf *b, const char *s, size_t len) {
  static const char plain[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
  size_t done = 0, at = 0;   // bytes up to done are written; those from done to at are copied as they are
  strbuf_append(b, "\"", 1);
  while (at < len) {
    unsigned char c = (unsigned char)s[at];
    size_t n = utf8_char(s + at, len - at);
    if (n > 0 && c >= 0x20 && c != '"' && c != '\\') {
      at += n;
      continue;
    }
    if (at > done) strbuf_append(b, s + done, at - done);
    const char *short_form = c ? strchr(plain, c) : NULL;
    if (n == 0) strbuf_append(b, "\xEF\xBF\xBD", 3);
    else if (short_form) strbuf_printf(b, "\\%c", letter[short_form - plain]);
    else strbuf_printf(b, "\\u%04x", c);
    done = ++at;
  }
  if (at > done) strbuf_append(b, s + done, at - done);
  strbuf_append(b, "\"", 1);
}

// Appends a number with as few digits as read back to the same double; whole numbers below 2^53 without exponent. JSON has
// no NaN and no infinity: null.
UNUSED static void json_put_number(StrBuf *b, double v) {
  char text[40];
  if (!isfinite(v)) snprintf(text, sizeof text, "null");
  else if (v == floor(v) && fabs(v) < 0x1p53) snprintf(text, sizeof text, "%.0f", v);
  else {
    for (int digits = 1; digits <= 17; digits++) {
      snprintf(text, sizeof text, "%.*g", digits, v);
      if (strtod(text, NULL) == v) break;
    }
  }
  strbuf_append(b, text, strlen(text));
}

#endif
