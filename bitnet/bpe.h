/*
bpe.h: byte-pair encoding, the part that needs no files.

What it is:  the three steps that turn a text into tokens once a vocabulary is known. bpe_next cuts the text into pieces
             (roughly words) as the published pre-tokenisers do, bpe_merge joins the symbols of a piece to tokens, and a
             cache remembers the pieces that were seen: most words of a text were there before.
What not:    no vocabulary and no JSON (tokenizer.h), no training of merges (prepro/).
Read before: bitnet/unicode.h.
Defines:     SPLIT_*, bpe_next; Bpe, BpePair, bpe_begin, bpe_add, bpe_find, bpe_merge, bpe_cached, bpe_remember, bpe_free.

The time is n log n in the length of a piece and linear in the number of pieces, whatever the text is: a megabyte of "a" is a
single piece, and a loop over all pairs for every merge would take hours for it.
*/
#ifndef BITNET_BPE_H
#define BITNET_BPE_H

#include "unicode.h"

// ---------------------------------------------------------------------------------------------------------
/*
Cutting. The published patterns are regular expressions; the first alternative that matches wins. L letter, N number:

  GPT-2     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  Llama-3   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
  Qwen2     as Llama-3 with \p{N} instead of \p{N}{1,3}

They are written out as code below: that is faster than a regular-expression library, needs none, and cannot backtrack.
SPLIT_BLANKS cuts in front of blanks that follow something else, for SentencePiece models none of whose pieces cross such
a place; SPLIT_NONE does not cut.
*/
enum { SPLIT_NONE, SPLIT_BLANKS, SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2 };

// The class of the character at s[at], at < n, and its length.
static inline int class_at_(const char *s, size_t at, size_t n, size_t *bytes) {
  unsigned char c = (unsigned char)s[at];
  *bytes = 1;
  return c < 0x80 ? unicode_ascii[c] : unicode_class(utf8_decode(s + at, n - at, bytes));
}

// The end of the run of characters of one class that begins at `at`; `at` itself if there is none.
static inline size_t run_end_(const char *s, size_t at, size_t n, int class_) {
  size_t bytes;
  while (at < n && class_at_(s, at, n, &bytes) == class_) at += bytes;
  return at;
}

// The length of 's, 't, 'm, 'd, 're, 've or 'll at s[0..n), s[0] = ', or 0. any_case: capitals too, and the long s (U+017F),
// whose capital is S.
UNUSED static size_t contraction_(const char *s, size_t n, int any_case) {
  if (n < 2) return 0;
  char a = s[1], b = n > 2 ? s[2] : 0;
  if (any_case && n > 2 && (unsigned char)a == 0xC5 && (unsigned char)b == 0xBF) return 3;
  if (any_case) {
    if (a >= 'A' && a <= 'Z') a |= 32;
    if (b >= 'A' && b <= 'Z') b |= 32;
  }
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// White space from `at` on. All of it at the end of the text, or if it is a single character; otherwise all but the last
// character, which goes to what follows. modern: up to the last line break if there is one.
UNUSED static size_t white_end_(const char *s, size_t at, size_t n, int modern) {
  size_t end = at, last = at, line = 0, bytes;
  while (end < n && class_at_(s, end, n, &bytes) == CLASS_SPACE) {
    last = end;
    end += bytes;
    if (s[last] == '\n' || s[last] == '\r') line = end;
  }
  if (modern && line) return line;
  return end == n || last == at ? end : last;
}

// GPT-2's pattern at `at` < n: where the piece ends.
UNUSED static size_t next_gpt2_(const char *s, size_t at, size_t n) {
  size_t bytes, i = at, k;
  if (s[at] == '\'' && (k = contraction_(s + at, n - at, 0)) != 0) return at + k;
  if (s[at] == ' ' && at + 1 < n) i++;
  int class_ = class_at_(s, i, n, &bytes);
  return class_ == CLASS_SPACE ? white_end_(s, at, n, 0) : run_end_(s, i + bytes, n, class_);
}

// The newer pattern; up to `digits` numbers stay together.
UNUSED static size_t next_modern_(const char *s, size_t at, size_t n, int digits) {
  size_t bytes, more, i, k;
  if (s[at] == '\'' && (k = contraction_(s + at, n - at, 1)) != 0) return at + k;
  int class_ = class_at_(s, at, n, &bytes);
  i = at + bytes;
  if (class_ == CLASS_LETTER) return run_end_(s, i, n, CLASS_LETTER);
  if (class_ == CLASS_NUMBER) {
    for (k = 1; (int)k < digits && i < n && class_at_(s, i, n, &more) == CLASS_NUMBER; k++) i += more;
    return i;
  }
  // One character that is no line break may stand in front of letters, and a blank in front of other signs.
  if (s[at] != '\r' && s[at] != '\n' && i < n && class_at_(s, i, n, &more) == CLASS_LETTER) return run_end_(s, i + more, n,
                                                                                                            CLASS_LETTER);
  if (class_ == CLASS_OTHER || (s[at] == ' ' && i < n && class_at_(s, i, n, &more) == CLASS_OTHER)) {
    i = run_end_(s, i, n, CLASS_OTHER);
    while (i < n && (s[i] == '\r' || s[i] == '\n')) i++;
    return i;
  }
  return white_end_(s, at, n, 1);
}

// The end of the piece of s[0..n) that begins at `at` < n. What follows n does not exist for the pattern.
UNUSED static size_t bpe_next(int split, const char *s, size_t at, size_t n) {
  if (split == SPLIT_GPT2) return next_gpt2_(s, at, n);
  if (split == SPLIT_LLAMA3) return next_modern_(s, at, n, 3);
  if (split == SPLIT_QWEN2) return next_modern_(s, at, n, 1);
  if (split == SPLIT_NONE) return n;
  while (at < n && s[at] == ' ') at++;
  while (at < n && s[at] != ' ') at++;
  return at;
}

// ---------------------------------------------------------------------------------------------------------
// Pairs, the cache, and the memory that merging needs.

typedef struct {
  int left, right;   // tokens that may be joined; left = -1: an empty slot
  int joined;        // to this one
  uint32_t rank;     // lower ranks are joined first
} BpePair;

// A place where two neighbours could be joined.
typedef struct {
  uint64_t order;            // rank << 32 | place: the lowest rank first, the leftmost among equals
  int left, right, joined;   // if one of the two has changed since, the candidate is out of date
} BpeCandidate_;

// A piece that was seen and its tokens.
typedef struct {
  uint64_t hash;
  uint32_t text, ids;   // where they begin in the pools
  uint16_t len, n;      // bytes; tokens. len = 0: an empty slot
} BpeWord_;

enum {
  BPE_WORD_MAX = 64,         // bytes of the longest piece that is remembered
  BPE_CACHE_SLOTS = 1 << 17,
  BPE_CACHE_TEXT = 1 << 20   // bytes of text, and number of tokens, that the cache holds
};

typedef struct {
  BpePair *pair;     // hash table with open addressing
  size_t n_slots;    // a power of two, at least half as large again as the number of pairs

  // Symbols of the piece being merged: a doubly linked list in arrays, -1 at its ends.
  int *id, *prev, *next;
  BpeCandidate_ *heap;
  size_t cap, heap_len;

  // The cache is emptied when it is full: common words are back soon.
  BpeWord_ *word;
  char *text;
  int *ids;
  size_t n_words, text_used, ids_used;
} Bpe;

static inline size_t bpe_hash_(int left, int right) {
  uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  key *= 0x9E3779B97F4A7C15ull;
  return (size_t)(key ^ key >> 29);
}

// Room for n pairs.
UNUSED static void bpe_begin(Bpe *b, size_t n) {
  memset(b, 0, sizeof *b);
  for (b->n_slots = 16; b->n_slots < n + n / 2; b->n_slots *= 2) {}
  b->pair = (BpePair *)xmalloc(size_mul(b->n_slots, sizeof *b->pair));
  for (size_t i = 0; i < b->n_slots; i++) b->pair[i].left = -1;
  b->word = (BpeWord_ *)xcalloc(BPE_CACHE_SLOTS, sizeof *b->word);
  b->text = (char *)xmalloc(BPE_CACHE_TEXT);
  b->ids = (int *)xmalloc(BPE_CACHE_TEXT * sizeof *b->ids);
}

UNUSED static void bpe_free(Bpe *b) {
  free(b->pair);
  free(b->id);
  free(b->prev);
  free(b->next);
  free(b->heap);
  free(b->word);
  free(b->text);
  free(b->ids);
  memset(b, 0, sizeof *b);
}

// The slot of a pair: its own, or the empty one where it would go.
static inline BpePair *bpe_slot_(const Bpe *b, int left, int right) {
  size_t at = bpe_hash_(left, right) & (b->n_slots - 1);
  while (b->pair[at].left >= 0 && (b->pair[at].left != left || b->pair[at].right != right)) at = (at + 1) & (b->n_slots - 1);
  return &b->pair[at];
}

// Adds a pair; 0 if it is there already.
UNUSED static int bpe_add(Bpe *b, int left, int right, int joined, uint32_t rank) {
  BpePair *p = bpe_slot_(b, left, right);
  if (p->left >= 0) return 0;
  p->left = left;
  p->right = right;
  p->joined = joined;
  p->rank = rank;
  return 1;
}

// The pair, or NULL if these two are never joined.
UNUSED static const BpePair *bpe_find(const Bpe *b, int left, int right) {
  const BpePair *p = bpe_slot_(b, left, right);
  return p->left >= 0 ? p : NULL;
}

// ---------------------------------------------------------------------------------------------------------
// Merging.

// Room for a piece of n symbols; the caller then fills b->id[0..n).
UNUSED static void bpe_room(Bpe *b, size_t n) {
  if (n <= b->cap) return;
  if (n > INT32_MAX) die(EXIT_USAGE, "a word of %zu characters is too long to be encoded; break the text into lines", n);
  b->cap = n < 256 ? 256 : n + n / 2;
  free(b->id);
  free(b->prev);
  free(b->next);
  free(b->heap);
  b->id = (int *)xmalloc(size_mul(b->cap, sizeof(int)));
  b->prev = (int *)xmalloc(size_mul(b->cap, sizeof(int)));
  b->next = (int *)xmalloc(size_mul(b->cap, sizeof(int)));
  b->heap = (BpeCandidate_ *)xmalloc(size_mul(size_mul(b->cap, 3), sizeof *b->heap));   // n at the start, two more for each merge
}

// Puts the pair that begins at symbol `at` on the heap, if it may be joined.
UNUSED static void bpe_push_(Bpe *b, int at) {
  int to = at >= 0 ? b->next[at] : -1;
  const BpePair *p = to >= 0 ? bpe_find(b, b->id[at], b->id[to]) : NULL;
  if (p == NULL) return;
  BpeCandidate_ c = {(uint64_t)p->rank << 32 | (uint32_t)at, p->left, p->right, p->joined};
  size_t i = b->heap_len++;
  for (; i > 0 && b->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2) b->heap[i] = b->heap[(i - 1) / 2];
  b->heap[i] = c;
}

// Takes the first candidate from the heap, which is not empty.
UNUSED static BpeCandidate_ bpe_pop_(Bpe *b) {
  BpeCandidate_ *h = b->heap, top = h[0], last = h[--b->heap_len];
  size_t i = 0, n = b->heap_len;
  for (size_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && h[child + 1].order < h[child].order) child++;
    if (last.order <= h[child].order) break;
    h[i] = h[child];
  }
  h[i] = last;
  return top;
}

/*
Joins the symbols b->id[0..n) until no pair is left that may be joined, always the pair of the lowest rank, the leftmost one
among equals. Returns the number of tokens, which then lie in b->id[0..).

A merge makes two new pairs, with the neighbour on either side, which are put on the heap. The pairs that it destroys stay
there and are dropped when their turn comes, because the symbols at their place are no longer theirs.
*/
UNUSED static size_t bpe_merge(Bpe *b, size_t n) {
  b->heap_len = 0;
  for (size_t i = 0; i < n; i++) {
    b->prev[i] = (int)i - 1;
    b->next[i] = i + 1 < n ? (int)i + 1 : -1;
  }
  for (size_t i = 0; i + 1 < n; i++) bpe_push_(b, (int)i);
  while (b->heap_len > 0) {
    BpeCandidate_ c = bpe_pop_(b);
    int at = (int)(uint32_t)c.order, gone = b->next[at];
    if (b->id[at] != c.left || gone < 0 || b->id[gone] != c.right) continue;
    b->id[at] = c.joined;
    b->id[gone] = -1;
    b->next[at] = b->next[gone];
    if (b->next[at] >= 0) b->prev[b->next[at]] = at;
    bpe_push_(b, b->prev[at]);
    bpe_push_(b, at);
  }
  size_t out = 0;
  for (int i = n > 0 ? 0 : -1; i >= 0; i = b->next[i]) b->id[out++] = b->id[i];
  return out;
}

// ---------------------------------------------------------------------------------------------------------
// The cache.

// The slot of a piece of len bytes, 1 to BPE_WORD_MAX: its own, or the empty one where it would go.
static inline BpeWord_ *bpe_word_(const Bpe *b, const char *s, size_t len, uint64_t hash) {
  size_t at = (size_t)hash & (BPE_CACHE_SLOTS - 1);
  for (;; at = (at + 1) & (BPE_CACHE_SLOTS - 1)) {
    BpeWord_ *w = &b->word[at];
    if (w->len == 0 || (w->hash == hash && w->len == len && memcmp(b->text + w->text, s, len) == 0)) return w;
  }
}

// The tokens of a piece that is remembered, *n of them; NULL otherwise. hash is hash_bytes of the piece.
UNUSED static const int *bpe_cached(const Bpe *b, const char *s, size_t len, uint64_t hash, size_t *n) {
  const BpeWord_ *w = bpe_word_(b, s, len, hash);
  *n = w->n;
  return w->len ? b->ids + w->ids : NULL;
}

// Remembers the n tokens of a piece that is not there yet; n is at most len <= BPE_WORD_MAX.
UNUSED static void bpe_remember(Bpe *b, const char *s, size_t len, uint64_t hash, const int *ids, size_t n) {
  if (b->n_words >= BPE_CACHE_SLOTS / 2 || b->text_used + len > BPE_CACHE_TEXT || b->ids_used + n > BPE_CACHE_TEXT) {
    memset(b->word, 0, BPE_CACHE_SLOTS * sizeof *b->word);
    b->n_words = b->text_used = b->ids_used = 0;
  }
  BpeWord_ *w = bpe_word_(b, s, len, hash);
  w->hash = hash;
  w->text = (uint32_t)b->text_used;
  w->ids = (uint32_t)b->ids_used;
  w->len = (uint16_t)len;
  w->n = (uint16_t)n;
  memcpy(b->text + b->text_used, s, len);
  memcpy(b->ids + b->ids_used, ids, n * sizeof *ids);
  b->text_used += len;
  b->ids_used += n;
  b->n_words++;
}

#endif
