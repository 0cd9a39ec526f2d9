/*
rewards.h: how good is an answer. Pure functions over strings, used by `eval task=qa` and as rewards in reinforcement learning.

What it is:  exact match, token F1, the final answer of a worked solution and its number, an arithmetic checker, and two measures
             of written reasoning. Every score lies in [0,1]; 1 is best.
What not:    no tokens and no models: texts are compared as people read them, whatever tokenizer wrote them.
Read before: bitnet/utils.h, bitnet/stem.h.
Defines:     reward_exact, reward_f1, reward_f1_unicode; answer_final, answer_number, reward_numeric, reward_accuracy;
             arithmetic_result, reward_arithmetic; answer_text, reasoning_text, reward_reasoning_f1, step_correctness.

An empty answer is never right unless the right answer is empty, too.
*/
#ifndef BITNET_REWARDS_H
#define BITNET_REWARDS_H

#include "stem.h"
#include "utils.h"

// ---------------------------------------------------------------------------------------------------------
// A stretch of a text.

typedef struct {
  const char *s;
  size_t n;
} Span;

UNUSED static Span span_trim_(const char *s, size_t n) {
  Span t = {s, n};
  while (t.n > 0 && isspace((unsigned char)t.s[0])) t.s++, t.n--;
  while (t.n > 0 && isspace((unsigned char)t.s[t.n - 1])) t.n--;
  return t;
}

UNUSED static int span_equal_(Span a, Span b) {
  return a.n == b.n && memcmp(a.s, b.s, a.n) == 0;
}

// 1 if both texts are the same but for blanks around them.
UNUSED static double reward_exact(const char *answer, const char *gold) {
  return span_equal_(span_trim_(answer, strlen(answer)), span_trim_(gold, strlen(gold)));
}

// ---------------------------------------------------------------------------------------------------------
// Token F1: the harmonic mean of precision and recall over the sets of word stems of both texts.

// Lower-case letters and digits stay, every other byte becomes a blank; with unicode, bytes from 0x80 on stay, too. n bytes.
UNUSED static void text_plain_(char *out, const char *s, size_t n, int unicode) {
  for (size_t i = 0; i < n; i++) {
    unsigned char c = (unsigned char)s[i];
    if (c >= 'A' && c <= 'Z') c = (unsigned char)(c - 'A' + 'a');
    out[i] = (char)((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (unicode && c >= 0x80) ? c : ' ');
  }
}

typedef struct {
  char *text;   // what the words point into
  Span *word;   // sorted, each once
  size_t n;
} StemSet_;

UNUSED static int compare_spans_(const void *a, const void *b) {
  const Span *p = (const Span *)a, *q = (const Span *)b;
  int c = memcmp(p->s, q->s, p->n < q->n ? p->n : q->n);
  return c != 0 ? c : (p->n > q->n) - (p->n < q->n);
}

UNUSED static StemSet_ stem_set_(const char *text, int unicode) {
  StemSet_ set;
  size_t len = strlen(text), n = 0;
  set.text = (char *)xmalloc(len + 1);
  set.word = (Span *)xcalloc(len / 2 + 1, sizeof(Span));
  set.n = 0;
  text_plain_(set.text, text, len, unicode);
  for (size_t i = 0; i < len;) {
    size_t first = i;
    while (i < len && set.text[i] != ' ') i++;
    if (i > first) {
      set.word[n].s = set.text + first;
      set.word[n++].n = stem_word(set.text + first, i - first);
    }
    i += i < len;
  }
  qsort(set.word, n, sizeof(Span), compare_spans_);
  for (size_t i = 0; i < n; i++) {
    if (set.n == 0 || !span_equal_(set.word[i], set.word[set.n - 1])) set.word[set.n++] = set.word[i];
  }
  return set;
}

UNUSED static double stem_f1_(const char *answer, const char *gold, int unicode) {
  StemSet_ a = stem_set_(answer, unicode), g = stem_set_(gold, unicode);
  size_t common = 0;
  for (size_t i = 0, k = 0; i < a.n && k < g.n;) {
    int c = compare_spans_(&a.word[i], &g.word[k]);
    common += c == 0;
    i += c <= 0;
    k += c >= 0;
  }
  double f1 = a.n == 0 && g.n == 0 ? 1 : 2.0 * (double)common / (double)(a.n + g.n);   // = 2 p r / (p + r)
  free(a.text);
  free(a.word);
  free(g.text);
  free(g.word);
  return f1;
}

// F1 over stems of ASCII words. Texts without any such word are equal to each other and unlike all others.
UNUSED static double reward_f1(const char *answer, const char *gold) {
  return stem_f1_(answer, gold, 0);
}

// The same, and letters beyond ASCII belong to words: for Czech or Chinese.
UNUSED static double reward_f1_unicode(const char *answer, const char *gold) {
  return stem_f1_(answer, gold, 1);
}

// ---------------------------------------------------------------------------------------------------------
// Numbers in a text.

typedef struct {
  double value;
  size_t start, end;   // s[start..end) is the number with its sign
} NumberAt_;

enum { NUMBER_DIGITS = 60 };   // what is longer is no number

UNUSED static int is_digit_(const char *s, size_t n, size_t i) {
  return i < n && s[i] >= '0' && s[i] <= '9';
}

// The digits at s[i..n) into text (commas between groups of three left out). Returns the place behind them; i if there are none, or
// too many.
UNUSED static size_t number_digits_(const char *s, size_t n, size_t i, char *text) {
  size_t k = 0, at = i;
  while (is_digit_(s, n, at) && k < NUMBER_DIGITS) text[k++] = s[at++];
  if (at - i <= 3 && at > i) {
    while (at + 3 < n && s[at] == ',' && is_digit_(s, n, at + 1) && is_digit_(s, n, at + 2) && is_digit_(s, n, at + 3) &&
           !is_digit_(s, n, at + 4) && k + 3 <= NUMBER_DIGITS) {
      memcpy(text + k, s + at + 1, 3);
      k += 3;
      at += 4;
    }
  }
  if (at < n && s[at] == '.' && is_digit_(s, n, at + 1) && (k > 0 || i == 0 || !isalnum((unsigned char)s[i - 1]))) {
    text[k++] = '.';
    for (at++; is_digit_(s, n, at) && k < 2 * NUMBER_DIGITS; at++) text[k++] = s[at];
  }
  text[k] = 0;
  return is_digit_(s, n, at) ? i : at;
}

// The minus at s[i]: its length, '-' or U+2212, or 0. Behind a letter, a digit or a bracket it is an operator or a hyphen.
UNUSED static size_t minus_at_(const char *s, size_t n, size_t i) {
  size_t len = s[i] == '-' ? 1 : n - i >= 3 && memcmp(s + i, "\xE2\x88\x92", 3) == 0 ? 3 : 0;
  return len > 0 && (i == 0 || !(isalnum((unsigned char)s[i - 1]) || s[i - 1] == ')')) ? len : 0;
}

/*
The next number in s[from..n): -?digits, with thousands separators and a fraction part, a $ behind the sign, or two of them as a
quotient "3/4" or "\frac{3}{4}". Returns 0 if there is none.
*/
UNUSED static int number_next_(const char *s, size_t n, size_t from, NumberAt_ *out) {
  char text[2 * NUMBER_DIGITS + 8];
  for (size_t i = from; i < n; i++) {
    size_t minus = minus_at_(s, n, i), at = i + minus, frac = 0;
    if (at < n && s[at] == '$') at++;
    if (at < n && s[at] == '\\') {   // \frac{3}{4}, \dfrac, \tfrac
      size_t d = at + 1 + (size_t)(at + 1 < n && strchr("dt", s[at + 1]) != NULL && s[at + 1] != 0);
      if (n - d >= 5 && memcmp(s + d, "frac{", 5) == 0) at = frac = d + 5;
    }
    size_t end = number_digits_(s, n, at, text);
    if (end == at) {
      while (is_digit_(s, n, i)) i++;   // too long a number: none of its ends is one
      continue;
    }
    out->value = strtod(text, NULL);
    out->start = i;
    out->end = end;
    size_t second = frac ? (n - end >= 2 && s[end] == '}' && s[end + 1] == '{' ? end + 2 : 0)
                         : (end < n && s[end] == '/' && (i == 0 || s[i - 1] != '/') ? end + 1 : 0);
    size_t stop = second ? number_digits_(s, n, second, text) : 0;
    if (frac && (stop == second || stop >= n || s[stop] != '}')) {   // half a fraction is no number
      i = end - 1;
      continue;
    }
    double by = stop > second ? strtod(text, NULL) : 0;
    if (by != 0 && (frac || stop >= n || s[stop] != '/')) {   // 1/2/2024 is a date
      out->value /= by;
      out->end = stop + (frac > 0);
    }
    if (minus) out->value = -out->value;
    return 1;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------------------
// The final answer of a worked solution.

// What stands in the last \boxed{...} whose braces balance.
UNUSED static int find_boxed_(const char *text, Span *out) {
  int found = 0;
  for (const char *p = strstr(text, "\\boxed{"); p; p = strstr(p + 1, "\\boxed{")) {
    const char *first = p + 7, *q = first;
    int depth = 1;
    for (; *q && depth > 0; q++) depth += (*q == '{') - (*q == '}');
    if (depth > 0) continue;
    out->s = first;
    out->n = (size_t)(q - 1 - first);
    found = 1;
  }
  return found;
}

// The rest of the line behind p, or the next line that is not blank; 0 if nothing follows.
UNUSED static int rest_of_line_(const char *p, Span *out) {
  while (isspace((unsigned char)*p)) p++;
  if (*p != 0) *out = span_trim_(p, strcspn(p, "\n"));
  return *p != 0;
}

// The line behind the last "####".
UNUSED static int find_hashes_(const char *text, Span *out) {
  int found = 0;
  for (const char *p = strstr(text, "####"); p; p = strstr(p, "####")) {
    p += strspn(p, "#");
    found |= rest_of_line_(p, out);
  }
  return found;
}

// The line behind the last "answer:" or "answer =".
UNUSED static int find_answer_word_(const char *text, Span *out) {
  int found = 0;
  for (const char *p = strstr(text, "nswer"); p; p = strstr(p, "nswer")) {
    int word = p > text && (p[-1] == 'a' || p[-1] == 'A');
    p += 5;
    const char *mark = p + strspn(p, " \t\n");
    if (word && (*mark == ':' || *mark == '=')) found |= rest_of_line_(mark + 1, out);
  }
  return found;
}

/*
What a text states as its answer, in this order: the last \boxed{...}; behind the last "####"; behind the last "answer:" or "answer =";
the last number; all of it. Blanks and dots at the ends are left out. *stated is 0 for the last two, where the text only happens to end
like that.
*/
UNUSED static Span answer_final(const char *text, int *stated) {
  Span out = {text, strlen(text)};
  NumberAt_ number;
  *stated = find_boxed_(text, &out) || find_hashes_(text, &out) || find_answer_word_(text, &out);
  if (!*stated) {
    size_t len = out.n;
    for (size_t at = 0; number_next_(text, len, at, &number); at = number.end) {
      out.s = text + number.start;
      out.n = number.end - number.start;
    }
  }
  out = span_trim_(out.s, out.n);
  while (out.n > 0 && out.s[out.n - 1] == '.') out = span_trim_(out.s, out.n - 1);
  return out;
}

/*
The number that a text gives as its answer ("#### 1,080", "so it costs $3.50."): 1 and *value, or 0 and 0 if there is none. Behind an
explicit mark must stand one number only, or one behind the last "=": several are no answer, however many of them are right.
*/
UNUSED static int answer_number(const char *text, double *value) {
  int stated, found = 0;
  NumberAt_ number;
  Span a = answer_final(text, &stated);
  for (size_t i = a.n; i > 0; i--) {
    if (a.s[i - 1] != '=') continue;
    a.s += i;
    a.n -= i;
    break;
  }
  *value = 0;
  for (size_t at = 0; number_next_(a.s, a.n, at, &number); at = number.end) {
    *value = number.value;
    found++;
  }
  return found == 1;
}

// 1 if both texts give a number as their answer, and the same one: 7, 007 and 7.00 are equal.
UNUSED static double reward_numeric(const char *answer, const char *gold) {
  double a = 0, g = 0;
  return answer_number(answer, &a) && answer_number(gold, &g) && a == g;
}

// 1 if the final answers are the same number, or the same text without $, % and thousands separators.
UNUSED static double reward_accuracy(const char *answer, const char *gold) {
  StrBuf text[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
  const char *from[2] = {answer, gold};
  double value[2];
  int numbers = 0;
  for (int i = 0; i < 2; i++) {
    int stated;
    Span a = answer_final(from[i], &stated);
    strbuf_append(&text[i], "", 0);
    for (size_t k = 0; k < a.n; k++) {
      int comma = a.s[k] == ',' && k > 0 && is_digit_(a.s, a.n, k - 1) && is_digit_(a.s, a.n, k + 1);
      if (!comma && a.s[k] != '$' && a.s[k] != '%') strbuf_append(&text[i], a.s + k, 1);
    }
    Span clean = span_trim_(text[i].data, text[i].len);
    NumberAt_ number;
    if (number_next_(clean.s, clean.n, 0, &number) && number.start == 0 && number.end == clean.n) {   // nothing but a number
      value[i] = number.value;
      numbers++;
    }
  }
  int equal = numbers == 2 ? value[0] == value[1] : (int)reward_exact(text[0].data, text[1].data);
  strbuf_free(&text[0]);
  strbuf_free(&text[1]);
  return equal;
}

// ---------------------------------------------------------------------------------------------------------
// Arithmetic: prompts that can be checked without a reference.

typedef struct {
  const char *p;
  int depth, bad;   // bad: something that is not arithmetic, does not fit in 64 bits, or does not divide
} Formula_;

UNUSED static long long formula_sum_(Formula_ *f);

UNUSED static char formula_peek_(Formula_ *f) {
  while (isspace((unsigned char)*f->p)) f->p++;
  return *f->p;
}

// A number, a bracket, or either with minus signs before it.
UNUSED static long long formula_factor_(Formula_ *f) {
  long long v = 0;
  int minus = 0;
  for (; formula_peek_(f) == '-'; f->p++) minus = !minus;
  if (*f->p == '(') {
    f->p++;
    if (++f->depth > 64) f->bad = 1;
    if (!f->bad) v = formula_sum_(f);
    f->depth--;
    if (formula_peek_(f) == ')') f->p++;
    else f->bad = 1;
  } else {
    if (!isdigit((unsigned char)*f->p)) f->bad = 1;
    for (; isdigit((unsigned char)*f->p); f->p++)
      f->bad |= __builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, *f->p - '0', &v);
  }
  if (minus) f->bad |= __builtin_sub_overflow(0, v, &v);
  return v;
}

UNUSED static long long formula_product_(Formula_ *f) {
  long long v = formula_factor_(f);
  while (!f->bad && (formula_peek_(f) == '*' || *f->p == '/')) {
    char op = *f->p++;
    long long w = formula_factor_(f);
    if (op == '*' || w == -1) {   // the smallest number has no opposite: x / -1 is x * -1 with its check
      f->bad |= __builtin_mul_overflow(v, w, &v);
    } else {
      f->bad |= w == 0 || v % w != 0;
      if (!f->bad) v /= w;
    }
  }
  return v;
}

UNUSED static long long formula_sum_(Formula_ *f) {
  long long v = formula_product_(f);
  while (!f->bad && (formula_peek_(f) == '+' || *f->p == '-')) {
    char op = *f->p++;
    long long w = formula_product_(f);
    f->bad |= op == '+' ? __builtin_add_overflow(v, w, &v) : __builtin_sub_overflow(v, w, &v);
  }
  return v;
}

// The value of a prompt like "12+34=" or "(7-2) * 3 = ?": integers, + - * / and brackets; divisions must come out even. Returns 0
// if it is not such a prompt.
UNUSED static int arithmetic_result(const char *prompt, long long *value) {
  Formula_ f = {prompt, 0, 0};
  *value = formula_sum_(&f);
  if (f.bad || formula_peek_(&f) != '=') return 0;
  f.p++;
  if (formula_peek_(&f) == '?') f.p++;
  return formula_peek_(&f) == 0;
}

// 1 if the answer is the value of the prompt, digit by digit and nothing else; 0 for prompts that are not arithmetic.
UNUSED static double reward_arithmetic(const char *prompt, const char *answer) {
  long long value;
  char right[32];
  if (!arithmetic_result(prompt, &value)) return 0;
  snprintf(right, sizeof right, "%lld", value);
  return reward_exact(answer, right);
}

// ---------------------------------------------------------------------------------------------------------
// Written reasoning: <think>...</think>answer.

// The part of a generated text that is the answer: behind the last </think>, or all of it.
UNUSED static const char *answer_text(const char *text) {
  for (const char *p = strstr(text, "</think>"); p; p = strstr(text, "</think>")) text = p + 8;
  return text;
}

/*
The part that is reasoning: between the first <think> and the </think> behind it. One of them alone is enough: a prompt may end with an
opened <think>, and a text may be cut off before it is closed. Without both, what stands before the first digit.
*/
UNUSED static Span reasoning_text(const char *text) {
  const char *open = strstr(text, "<think>"), *first = open ? open + 7 : text, *close = strstr(first, "</think>");
  if (close) return span_trim_(first, (size_t)(close - first));
  return span_trim_(first, open ? strlen(first) : strcspn(first, "0123456789"));
}

// Token F1 of the reasoning in a generated text and the right one.
UNUSED static double reward_reasoning_f1(const char *text, const char *reasoning) {
  Span r = reasoning_text(text);
  char *copy = (char *)xmalloc(r.n + 1);
  memcpy(copy, r.s, r.n);
  copy[r.n] = 0;
  double f1 = reward_f1(copy, reasoning);
  free(copy);
  return f1;
}

/*
The next step of s[*at..n), into out as plain words with single blanks between them; its length, 0 at the end. Steps end with a dot
that is not a decimal point, a semicolon or a line end; steps without words are skipped.
*/
UNUSED static size_t step_next_(const char *s, size_t n, size_t *at, char *out) {
  size_t len = 0;
  while (*at < n && len == 0) {
    size_t first = *at;
    for (; *at < n; ++*at) {
      int point = s[*at] == '.' && *at > 0 && is_digit_(s, n, *at - 1) && is_digit_(s, n, *at + 1);
      if (strchr(".;\n", s[*at]) && !point) break;
    }
    text_plain_(out, s + first, *at - first, 0);
    for (size_t i = 0; i < *at - first; i++) {
      if (out[i] != ' ' || (len > 0 && out[len - 1] != ' ')) out[len++] = out[i];
    }
    len -= len > 0 && out[len - 1] == ' ';
    *at += *at < n;
  }
  return len;
}

// The part of the right reasoning's steps that stand in the generated reasoning at the same place, word by word.
UNUSED static double step_correctness(const char *text, const char *reasoning) {
  Span r = reasoning_text(text);
  size_t n = strlen(reasoning), at = 0, r_at = 0, right = 0, steps = 0, extra, len;
  char *want = (char *)xmalloc(n + 1), *got = (char *)xmalloc(r.n + 1);
  while ((len = step_next_(reasoning, n, &at, want)) > 0) {
    size_t have = step_next_(r.s, r.n, &r_at, got);
    right += have == len && memcmp(want, got, len) == 0;
    steps++;
  }
  extra = steps == 0 ? step_next_(r.s, r.n, &r_at, got) : 0;
  free(want);
  free(got);
  return steps ? (double)right / (double)steps : extra == 0;
}

#endif
