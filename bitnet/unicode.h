/*
unicode.h: which kind of character this is, and NFC.

What it is:  the two questions that a tokenizer asks about Unicode. First, is a character a letter, a number, white space or
             none of these? Pre-tokenisers cut texts by that. Second, what is the composed form (NFC) of a text? Qwen's
             tokenizer brings every text into it first, so that e + accent and the single character get the same ids.
What not:    no case, no scripts, no other normal forms; no library. The tables are generated (unicode_tables.h).
Read before: bitnet/json.h (utf8_char).
Defines:     CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE; utf8_decode, unicode_class, unicode_is_digit,
             unicode_nfc.

Bytes that are no UTF-8 count as characters of one byte and class OTHER, and pass through NFC unchanged.
*/
#ifndef BITNET_UNICODE_H
#define BITNET_UNICODE_H

#include "json.h"
#include "unicode_tables.h"

enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };
enum { BAD_BYTE = 0x110000 };   // stands for a byte that is not UTF-8: no code point is as large

// The code point at s[0..n), n >= 1, and its number of bytes; BAD_BYTE and 1 where there is no UTF-8.
UNUSED static uint32_t utf8_decode(const char *s, size_t n, size_t *bytes) {
  const unsigned char *p = (const unsigned char *)s;
  *bytes = 1;
  if (p[0] < 0x80) return p[0];
  size_t len = utf8_char(s, n);
  if (len == 0) return BAD_BYTE;
  uint32_t c = p[0] & (0x7Fu >> len);
  for (size_t i = 1; i < len; i++) c = c << 6 | (p[i] & 0x3Fu);
  *bytes = len;
  return c;
}

// ---------------------------------------------------------------------------------------------------------
// Classes.

// 1 if one of the sorted ranges contains c.
UNUSED static int unicode_in_(const UnicodeRange *r, size_t n, uint32_t c) {
  size_t lo = 0, hi = n;   // the ranges before lo end below c, those from hi on begin above c
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (r[mid].last < c) lo = mid + 1;
    else if (r[mid].first > c) hi = mid;
    else return 1;
  }
  return 0;
}

// The classes of the first 128 characters, which are most of all text.
static const unsigned char unicode_ascii[128] = {
  0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 0, 0,
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
  3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
  2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0,
  0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0,
  0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0};

// The class of a code point: \p{L}, \p{N}, \s, or none of them.
UNUSED static int unicode_class(uint32_t c) {
  if (c < 0x80) return unicode_ascii[c];
  if (unicode_in_(unicode_letters, ARRAY_LEN(unicode_letters), c)) return CLASS_LETTER;
  if (unicode_in_(unicode_numbers, ARRAY_LEN(unicode_numbers), c)) return CLASS_NUMBER;
  if (c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
      c == 0x205F || c == 0x3000)
    return CLASS_SPACE;
  return CLASS_OTHER;
}

// 1 for what the pre-tokeniser "Digits" cuts out: all numbers, and a few characters that its library already counts as such.
UNUSED static int unicode_is_digit(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return unicode_in_(unicode_numbers, ARRAY_LEN(unicode_numbers), c) ||
         unicode_in_(unicode_more_digits, ARRAY_LEN(unicode_more_digits), c);
}

// ---------------------------------------------------------------------------------------------------------
/*
NFC: take every character apart into base and marks, sort the marks behind a base by their combining class, and join what can
be joined. Most characters cannot be changed by what stands around them ("stable"): a text is cut in front of each of
those, and only cuts with more than one character need the three steps.
*/

// Hangul: a syllable is computed from its two or three letters, L + V (+ T), of which there are 19, 21 and 27.
enum { HANGUL_S = 0xAC00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11A7, HANGUL_VS = 21, HANGUL_TS = 28,
       HANGUL_N = 19 * HANGUL_VS * HANGUL_TS };

UNUSED static uint32_t unicode_combining_(uint32_t c) {
  size_t lo = 0, hi = ARRAY_LEN(unicode_marks);
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (unicode_marks[mid].last < c) lo = mid + 1;
    else if (unicode_marks[mid].first > c) hi = mid;
    else return unicode_marks[mid].combining;
  }
  return 0;
}

// The entry that takes c apart, or NULL.
UNUSED static const UnicodeParts *unicode_parts_(uint32_t c) {
  size_t lo = 0, hi = ARRAY_LEN(unicode_parts);
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (unicode_parts[mid].point < c) lo = mid + 1;
    else if (unicode_parts[mid].point > c) hi = mid;
    else return &unicode_parts[mid];
  }
  return NULL;
}

// The character that a and b join to, or 0.
UNUSED static uint32_t unicode_join_(uint32_t a, uint32_t b) {
  if (a >= HANGUL_L && a < HANGUL_L + 19 && b >= HANGUL_V && b < HANGUL_V + HANGUL_VS)
    return HANGUL_S + ((a - HANGUL_L) * HANGUL_VS + (b - HANGUL_V)) * HANGUL_TS;
  if (a >= HANGUL_S && a < HANGUL_S + HANGUL_N && (a - HANGUL_S) % HANGUL_TS == 0 && b > HANGUL_T && b < HANGUL_T + HANGUL_TS)
    return a + (b - HANGUL_T);
  size_t lo = 0, hi = ARRAY_LEN(unicode_pairs);
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    const UnicodeParts *p = &unicode_parts[unicode_pairs[mid]];
    if (p->first < a || (p->first == a && p->second < b)) lo = mid + 1;
    else if (p->first > a || p->second > b) hi = mid;
    else return p->point;
  }
  return 0;
}

// 1 if NFC leaves c as it is whatever stands before it.
UNUSED static int unicode_stable_(uint32_t c) {
  if (c < 0x300 || c >= BAD_BYTE) return 1;
  if ((c >= 0x3100 && c < 0xA66F) || (c >= HANGUL_S && c < HANGUL_S + HANGUL_N)) return 1;   // most of East Asia
  if ((c >= HANGUL_V && c < HANGUL_V + HANGUL_VS) || (c > HANGUL_T && c < HANGUL_T + HANGUL_TS)) return 0;
  if (unicode_combining_(c) || unicode_in_(unicode_joining, ARRAY_LEN(unicode_joining), c)) return 0;
  const UnicodeParts *p = unicode_parts_(c);
  return p == NULL || (p->second && unicode_join_(p->first, p->second) == c);
}

// Code points with their combining classes: class << 56 | place << 24 | code point, so that sorting them as numbers sorts
// marks by class and keeps the order of equal ones.
typedef struct {
  uint64_t *p;
  size_t n, cap;
} UnicodeSegment_;

UNUSED static void segment_push_(UnicodeSegment_ *g, uint32_t c) {
  if (g->n == g->cap) {
    g->cap = g->cap ? 2 * g->cap : 64;
    g->p = (uint64_t *)xrealloc(g->p, size_mul(g->cap, sizeof *g->p));
  }
  g->p[g->n] = (uint64_t)unicode_combining_(c) << 56 | (uint64_t)(g->n & 0xFFFFFFFF) << 24 | c;
  g->n++;
}

// Appends c taken apart as far as it goes. The second part of an entry never has parts of its own.
UNUSED static void segment_decompose_(UnicodeSegment_ *g, uint32_t c) {
  const UnicodeParts *p = unicode_parts_(c);
  if (c >= HANGUL_S && c < HANGUL_S + HANGUL_N) {
    uint32_t s = c - HANGUL_S;
    segment_push_(g, HANGUL_L + s / (HANGUL_VS * HANGUL_TS));
    segment_push_(g, HANGUL_V + s / HANGUL_TS % HANGUL_VS);
    if (s % HANGUL_TS) segment_push_(g, HANGUL_T + s % HANGUL_TS);
  } else if (p) {
    segment_decompose_(g, p->first);
    if (p->second) segment_decompose_(g, p->second);
  } else {
    segment_push_(g, c);
  }
}

UNUSED static int compare_u64_(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return (x > y) - (x < y);
}

// Sorts the marks behind each base, joins, and appends the result as UTF-8.
UNUSED static void segment_compose_(UnicodeSegment_ *g, StrBuf *out) {
  for (size_t i = 0, end; i < g->n; i = end) {
    for (end = i + 1; end < g->n && g->p[end] >> 56 != 0; end++) {}
    size_t first = g->p[i] >> 56 ? i : i + 1;   // marks at the very beginning have no base
    qsort(g->p + first, end - first, sizeof *g->p, compare_u64_);
  }
  // A mark joins the last base unless a mark of the same class, or a base, stands between them.
  size_t kept = 0, base = 0;
  int have_base = 0;
  for (size_t i = 0; i < g->n; i++) {
    uint32_t c = (uint32_t)(g->p[i] & 0xFFFFFF), joined = 0;
    uint64_t combining = g->p[i] >> 56;
    if (have_base) {
      int adjacent = kept == base + 1;
      uint64_t before = g->p[kept - 1] >> 56;
      if (adjacent || (before != 0 && before < combining)) joined = unicode_join_((uint32_t)(g->p[base] & 0xFFFFFF), c);
    }
    if (joined) {
      g->p[base] = joined;
      continue;
    }
    if (combining == 0) {
      base = kept;
      have_base = 1;
    }
    g->p[kept++] = combining << 56 | c;
  }
  for (size_t i = 0; i < kept; i++) {
    char utf8[4];
    strbuf_append(out, utf8, utf8_put_(utf8, (unsigned)(g->p[i] & 0xFFFFFF)));
  }
}

// Appends the NFC of s[0..n).
UNUSED static void unicode_nfc(const char *s, size_t n, StrBuf *out) {
  UnicodeSegment_ g = {NULL, 0, 0};
  size_t done = 0, at = 0, bytes;   // what lies before done is written
  while (at < n) {
    // One cut: a character and the unstable ones behind it.
    size_t begin = at;
    uint32_t c = utf8_decode(s + at, n - at, &bytes);
    int change = !unicode_stable_(c);
    at += bytes;
    if (c == BAD_BYTE) begin = at;
    for (; at < n && !unicode_stable_(utf8_decode(s + at, n - at, &bytes)); at += bytes) change = 1;
    if (!change) continue;
    if (begin > done) strbuf_append(out, s + done, begin - done);
    g.n = 0;
    for (size_t i = begin; i < at; i += bytes) segment_decompose_(&g, utf8_decode(s + i, at - i, &bytes));
    segment_compose_(&g, out);
    done = at;
  }
  if (n > done) strbuf_append(out, s + done, n - done);
  free(g.p);
}

#endif
