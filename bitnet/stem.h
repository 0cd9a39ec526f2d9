/*
stem.h: English words down to their stems, so that "running" and "runs" count as the same word.

What it is:  Porter's algorithm (1980) with the extensions of NLTK, because scores computed elsewhere use that version: a short list
             of irregular words, and a few rules that read y, -ies, -ied and -logi differently.
What not:    no other language and no dictionary; a byte that is not a-z counts as a consonant.
Read before: bitnet/utils.h.
Defines:     stem_word.

The algorithm sees a word as C?(VC)^m V?, where C and V are runs of consonants and vowels. m, the "measure", says how much of a word
would be left without an ending: endings are only taken away where enough is left.
*/
#ifndef BITNET_STEM_H
#define BITNET_STEM_H

#include "utils.h"

// 1 if w[i] is a consonant. y is one at the start of a word and behind a vowel ("toy"), and a vowel behind a consonant ("sky").
UNUSED static int stem_consonant_(const char *w, size_t i) {
  size_t first = i;
  if (w[i] != 'y') return strchr("aeiou", w[i]) == NULL;
  while (first > 0 && w[first - 1] == 'y') first--;   // a run of y alternates, beginning with what stands before it
  int consonant = first == 0 || strchr("aeiou", w[first - 1]) != NULL;
  return consonant ^ (int)((i - first) & 1);
}

// The measure m of w[0..n): how often a vowel is followed by a consonant.
UNUSED static int stem_measure_(const char *w, size_t n) {
  int m = 0;
  for (size_t i = 1; i < n; i++) m += !stem_consonant_(w, i - 1) && stem_consonant_(w, i);
  return m;
}

UNUSED static int stem_has_vowel_(const char *w, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (!stem_consonant_(w, i)) return 1;
  }
  return 0;
}

// 1 if w[0..n) ends like "hop", consonant-vowel-consonant, the last not w, x or y; or is like "at". Such a stem had an e behind it.
UNUSED static int stem_wants_e_(const char *w, size_t n) {
  if (n == 2) return !stem_consonant_(w, 0) && stem_consonant_(w, 1);
  return n >= 3 && stem_consonant_(w, n - 3) && !stem_consonant_(w, n - 2) && stem_consonant_(w, n - 1) && !strchr("wxy", w[n - 1]);
}

UNUSED static int stem_ends_(const char *w, size_t n, const char *end) {
  size_t k = strlen(end);
  return n >= k && memcmp(w + n - k, end, k) == 0;
}

typedef struct {
  const char *end, *with;
} StemRule_;

// Looks for the first ending in the list; replaces it if what stands before it has at least this measure. Returns the new length.
UNUSED static size_t stem_rules_(char *w, size_t n, const StemRule_ *rules, size_t count, int measure) {
  for (size_t i = 0; i < count; i++) {
    if (!stem_ends_(w, n, rules[i].end)) continue;
    size_t left = n - strlen(rules[i].end), k = strlen(rules[i].with);
    if (stem_measure_(w, left) < measure) return n;
    memcpy(w + left, rules[i].with, k);
    return left + k;
  }
  return n;
}

// Steps 1b: -eed, -ed, -ing, and what the stem needs afterwards ("hoping" -> "hop" -> "hope", "hopping" -> "hopp" -> "hop").
UNUSED static size_t stem_past_(char *w, size_t n) {
  static const StemRule_ e_again[] = {{"at", "ate"}, {"bl", "ble"}, {"iz", "ize"}};
  if (stem_ends_(w, n, "ied")) return n == 4 ? n - 1 : n - 2;
  if (stem_ends_(w, n, "eed")) return stem_measure_(w, n - 3) > 0 ? n - 1 : n;
  size_t left = stem_ends_(w, n, "ed") ? n - 2 : stem_ends_(w, n, "ing") ? n - 3 : 0;
  if (left == 0 || !stem_has_vowel_(w, left)) return n;
  n = stem_rules_(w, left, e_again, ARRAY_LEN(e_again), 0);
  if (n != left) return n;
  if (n >= 2 && w[n - 1] == w[n - 2] && stem_consonant_(w, n - 1)) return strchr("lsz", w[n - 1]) ? n : n - 1;
  if (stem_measure_(w, n) == 1 && stem_wants_e_(w, n)) w[n++] = 'e';
  return n;
}

// Steps 2 to 4: the endings that make nouns, adjectives and adverbs of other words, one behind the other.
UNUSED static size_t stem_suffixes_(char *w, size_t n) {
  static const StemRule_ two[] = {{"ational", "ate"}, {"tional", "tion"}, {"enci", "ence"},   {"anci", "ance"},   {"izer", "ize"},
                                  {"bli", "ble"},     {"alli", "al"},     {"entli", "ent"},   {"eli", "e"},       {"ousli", "ous"},
                                  {"ization", "ize"}, {"ation", "ate"},   {"ator", "ate"},    {"alism", "al"},    {"iveness", "ive"},
                                  {"fulness", "ful"}, {"ousness", "ous"}, {"aliti", "al"},    {"iviti", "ive"},   {"biliti", "ble"},
                                  {"fulli", "ful"}};
  static const StemRule_ three[] = {{"icate", "ic"}, {"ative", ""}, {"alize", "al"}, {"iciti", "ic"}, {"ical", "ic"}, {"ful", ""},
                                    {"ness", ""}};
  static const char *const four[] = {"al",  "ance", "ence", "er", "ic",  "able", "ible", "ant", "ement", "ment",
                                     "ent", "ion",  "ou",   "ism", "ate", "iti",  "ous",  "ive", "ize"};
  if (stem_ends_(w, n, "alli") && stem_measure_(w, n - 4) > 0) n -= 2;   // "-ally" was "-al", and that may be the end of "-ational"
  if (stem_ends_(w, n, "logi")) n -= stem_measure_(w, n - 3) > 0;
  else n = stem_rules_(w, n, two, ARRAY_LEN(two), 1);
  n = stem_rules_(w, n, three, ARRAY_LEN(three), 1);
  for (size_t i = 0; i < ARRAY_LEN(four); i++) {
    if (!stem_ends_(w, n, four[i])) continue;
    size_t left = n - strlen(four[i]);
    int fits = strcmp(four[i], "ion") != 0 || (left > 0 && (w[left - 1] == 's' || w[left - 1] == 't'));
    return fits && stem_measure_(w, left) > 1 ? left : n;
  }
  return n;
}

/*
Stems the word w[0..n) in place: lower-case letters and other bytes, no blanks. A stem is never longer than its word; returns its
length and writes no zero behind it.
*/
UNUSED static size_t stem_word(char *w, size_t n) {
  static const StemRule_ irregular[] = {{"skies", "sky"},     {"sky", "sky"},         {"dying", "die"},       {"lying", "lie"},
                                        {"tying", "tie"},     {"news", "news"},       {"innings", "inning"},  {"inning", "inning"},
                                        {"outings", "outing"}, {"outing", "outing"},  {"cannings", "canning"}, {"canning", "canning"},
                                        {"howe", "howe"},     {"proceed", "proceed"}, {"exceed", "exceed"},   {"succeed", "succeed"}};
  static const StemRule_ plural[] = {{"sses", "ss"}, {"ies", "i"}, {"ss", "ss"}, {"s", ""}};
  for (size_t i = 0; i < ARRAY_LEN(irregular); i++) {
    if (strlen(irregular[i].end) != n || memcmp(irregular[i].end, w, n) != 0) continue;
    size_t k = strlen(irregular[i].with);
    memcpy(w, irregular[i].with, k);
    return k;
  }
  if (n <= 2) return n;
  // 1a: plurals. 1b: past and -ing. 1c: a final y behind a consonant.
  n = n == 4 && stem_ends_(w, n, "ies") ? 3 : stem_rules_(w, n, plural, ARRAY_LEN(plural), 0);
  n = stem_past_(w, n);
  if (n > 2 && w[n - 1] == 'y' && stem_consonant_(w, n - 2)) w[n - 1] = 'i';
  n = stem_suffixes_(w, n);
  // 5: a final e, and the second l of -ll.
  if (n > 0 && w[n - 1] == 'e') {
    int m = stem_measure_(w, n - 1);
    if (m > 1 || (m == 1 && !stem_wants_e_(w, n - 1))) n--;
  }
  if (stem_ends_(w, n, "ll") && stem_measure_(w, n - 1) > 1) n--;
  return n;
}

#endif
