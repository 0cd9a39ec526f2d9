/*
dataloader.h: where training batches come from.

What it is:  batches of token ids, either arithmetic problems made up on the fly, or token shards (llm.c's .bin files) mapped
             into memory and cut into blocks in a shuffled order; several sets of shards can be mixed by weights, and a shard
             can say which of its tokens are trained (instruction data).
What not:    no text (prepro/ turns text into shards) and no threads. There is no read position either: batch k is a pure
             function of the settings, the seed and k, so a run resumes by going on at k.
Read before: bitnet/utils.h, tokenizer.h.
Defines:     Batch, batch_alloc, batch_free; Arithmetic, arith_init, arith_problem, arith_text, arith_is_heldout,
             arith_heldout, arith_max_tokens, arith_row_tokens; DataLoader, loader_open_shards, loader_reweight,
             loader_open_arithmetic, loader_check_tokenizer, loader_blocks, loader_batch, arith_fill_heldout, loader_free; shard_write,
             shard_write_masked; permute.
*/
#ifndef DATALOADER_H
#define DATALOADER_H

#include "bitnet/utils.h"
#include "tokenizer.h"
#include <glob.h>

enum { IGNORE = -1 };   // in targets: this position has no target and adds nothing to the loss

typedef struct {
  int B, T;
  int *tokens;        // [B,T]
  int *targets;       // [B,T] the token after each token, or IGNORE
  int *start;         // [B,T] column of the first token of the same document: attention of position t sees start .. t
  int *pos;           // [B,T] position inside the document, for RoPE
  size_t n_targets;   // how many targets are not IGNORE
} Batch;

// Room for B rows of T tokens.
UNUSED static void batch_alloc(Batch *b, int B, int T) {
  if (B < 1 || T < 1) die(EXIT_USAGE, "batch_size and seq_len must be at least 1, found %d and %d", B, T);
  size_t bytes = size_mul(size_mul((size_t)B, (size_t)T), sizeof(int));
  memset(b, 0, sizeof *b);
  b->B = B;
  b->T = T;
  b->tokens = (int *)xmalloc(bytes);
  b->targets = (int *)xmalloc(bytes);
  b->start = (int *)xmalloc(bytes);
  b->pos = (int *)xmalloc(bytes);
}

UNUSED static void batch_free(Batch *b) {
  free(b->tokens);
  free(b->targets);
  free(b->start);
  free(b->pos);
  memset(b, 0, sizeof *b);
}

// ---------------------------------------------------------------------------------------------------------
// A shuffle without an array.

/*
The image of x under a pseudo-random permutation of 0 .. n-1 (x < n) that key selects. Memory: none.

A Feistel network permutes the numbers of 2h bits whatever its round function is: (left, right) -> (right, left ^ f(right))
can be undone. h is the smallest with 4^h >= n. An image outside of 0 .. n-1 is put through again until one is inside: going
along a cycle of a permutation from a point inside always meets an inside point, and different points meet different ones.
As 4^h < 4 n, that takes fewer than four rounds of the network on average.
*/
UNUSED static uint64_t permute(uint64_t x, uint64_t n, uint64_t key) {
  unsigned h = 1;
  while (h < 32 && (n - 1) >> (2 * h) != 0) h++;
  uint64_t mask = (1ull << h) - 1;
  do {
    uint64_t left = x >> h, right = x & mask;
    for (uint64_t round = 0; round < 6; round++) {
      uint64_t next = left ^ (rng_u64(key, RNG_DATA, round << 32 | right) & mask);
      left = right;
      right = next;
    }
    x = left << h | right;
  } while (x >= n);
  return x;
}

// ---------------------------------------------------------------------------------------------------------
// Arithmetic: "12+34=46". The problems of each operation are numbered, and the operations follow each other in the order
// in which the user named them. A part is held out for evaluation; training never shows it.

enum {
  ARITH_MAX = 99999,     // largest operand
  ARITH_TEXT_CAP = 32,   // bytes for a prompt or an answer, zero included: "99999*99999=" and "9999800001" fit
  ARITH_OPS = 3
};

typedef struct {
  char ops[8];                 // some of "+-*", each at most once
  int min, max;                // operands of + and -
  int mul_max;                 // operands of * are 0 .. mul_max
  double holdout;              // fraction kept for evaluation
  uint64_t n_problems;
  uint64_t count[ARITH_OPS];   // problems of ops[i]; their sum is n_problems
} Arithmetic;

// Problem i < n_problems: its operands, operation and result.
UNUSED static void arith_problem(const Arithmetic *a, uint64_t i, int *x, char *op, int *y, long *result) {
  int k = 0;
  while (i >= a->count[k]) i -= a->count[k++];
  int lo = a->ops[k] == '*' ? 0 : a->min;
  uint64_t width = (uint64_t)((a->ops[k] == '*' ? a->mul_max : a->max) - lo) + 1;
  *x = lo + (int)(i / width);
  *y = lo + (int)(i % width);
  *op = a->ops[k];
  *result = *op == '+' ? (long)*x + *y : *op == '-' ? (long)*x - *y : (long)*x * *y;
}

// The two halves of problem i as text, "12+34=" and "46", each into ARITH_TEXT_CAP bytes.
UNUSED static void arith_text(const Arithmetic *a, uint64_t i, char *prompt, char *answer) {
  int x, y;
  char op;
  long result;
  arith_problem(a, i, &x, &op, &y, &result);
  snprintf(prompt, ARITH_TEXT_CAP, "%d%c%d=", x, op, y);
  snprintf(answer, ARITH_TEXT_CAP, "%ld", result);
}

// 1 if problem i is kept for evaluation. A hash of its text decides, so the same problem stays on the same side whatever
// the ranges, the operations and the seed of a run are, and a larger fraction holds out a superset. Of + and * the smaller
// operand is hashed first: 3+5 and 5+3 are on the same side, because a model that was shown one need not compute the other.
UNUSED static int arith_is_heldout(const Arithmetic *a, uint64_t i) {
  int x, y;
  char op, text[ARITH_TEXT_CAP];
  long result;
  arith_problem(a, i, &x, &op, &y, &result);
  int swap = op != '-' && x > y;
  int len = snprintf(text, sizeof text, "%d %c %d", swap ? y : x, op, swap ? x : y);
  return (double)(hash_bytes(text, (size_t)len) >> 11) * 0x1.0p-53 < a->holdout;
}

// The first cap held-out problems in a pseudo-random order that depends on the problem set alone, so every evaluation of
// n problems takes the same n. Returns how many were written: cap, or all of them if there are fewer.
UNUSED static size_t arith_heldout(const Arithmetic *a, uint64_t *out, size_t cap) {
  size_t n = 0;
  for (uint64_t i = 0; i < a->n_problems && n < cap; i++) {
    uint64_t problem = permute(i, a->n_problems, 0);
    if (arith_is_heldout(a, problem)) out[n++] = problem;
  }
  return n;
}

// Sets up the problems; exit 2 if the options make no sense or leave an operation without a problem to train on.
UNUSED static void arith_init(Arithmetic *a, const char *ops, int min, int max, int mul_max, double holdout) {
  memset(a, 0, sizeof *a);
  size_t n_ops = strlen(ops);
  for (size_t k = 0; k < n_ops; k++) {
    if (strchr("+-*", ops[k]) == NULL || strchr(ops + k + 1, ops[k]) != NULL)
      die(EXIT_USAGE, "arithmetic operations: expected some of +-*, each once, found \"%s\"", ops);
  }
  if (n_ops == 0) die(EXIT_USAGE, "arithmetic operations: expected some of +-*, found none");
  if (min < 0 || max < min || max > ARITH_MAX)
    die(EXIT_USAGE, "arithmetic operands: expected 0 <= min <= max <= %d, found min %d and max %d", ARITH_MAX, min, max);
  if (mul_max < 0 || mul_max > ARITH_MAX)
    die(EXIT_USAGE, "arithmetic operands of *: expected a maximum of 0 to %d, found %d", ARITH_MAX, mul_max);
  if (!(holdout >= 0 && holdout <= 0.9)) die(EXIT_USAGE, "arithmetic holdout: expected 0 to 0.9, found %g", holdout);
  memcpy(a->ops, ops, n_ops);
  a->min = min;
  a->max = max;
  a->mul_max = mul_max;
  a->holdout = holdout;
  for (size_t k = 0; k < n_ops; k++) {
    uint64_t width = ops[k] == '*' ? (uint64_t)mul_max + 1 : (uint64_t)(max - min) + 1;
    a->count[k] = width * width;
    uint64_t first = a->n_problems, i = 0;
    a->n_problems += a->count[k];
    while (i < a->count[k] && arith_is_heldout(a, first + i)) i++;
    if (i == a->count[k])
      die(EXIT_USAGE, "arithmetic: every problem of '%c' is held out; use a larger range or a smaller holdout (%g)", ops[k], holdout);
  }
}

// The largest number of tokens that a problem takes, with its </s>, one token a character. A row of a batch needs one less,
// because the last </s> is only a target.
UNUSED static int arith_max_tokens(const Arithmetic *a) {
  int longest = 0;
  for (const char *op = a->ops; *op; op++) {
    // The longest sum and product are those of the largest operands. A difference is longest when it is negative, so y is
    // the largest operand, and x is the smallest of its number of digits: 100-1000=-900 beats 0-1000 and 999-1000.
    long y = *op == '*' ? a->mul_max : a->max, x = *op == '-' ? a->min : y;
    while (x <= y) {
      long result = *op == '+' ? x + y : *op == '-' ? x - y : x * y;
      int n = snprintf(NULL, 0, "%ld%c%ld=%ld", x, *op, y, result) + 1;
      if (n > longest) longest = n;
      long power = 10;   // the next candidate for x: the smallest number with one digit more
      while (power <= x) power *= 10;
      x = power;
    }
  }
  return longest;
}

// The columns that rows of these problems need; drafts: with a draft and its "=" in front of the answer. A draft has at most a digit
// more than the longest answer, and that is shorter than half of its problem.
UNUSED static int arith_row_tokens(const Arithmetic *a, int drafts) {
  int n = arith_max_tokens(a);
  return n - 1 + (drafts ? n / 2 + 1 : 0);
}

// ---------------------------------------------------------------------------------------------------------
/*
Shards: 256 int32 of header, then the tokens, everything little-endian. Words 0 to 2 are llm.c's; llm.c leaves the others 0,
and we put there what lets a mistake be noticed.

  word 0, 1   20240520, 1 = uint16 tokens        20240801, 7 = uint32 tokens
  word 2      number of tokens
  word 3      vocabulary size                    0 = unknown
  word 4, 5   tokenizer_hash, low and high half  0 = unknown
  word 6      CRC-32 of all behind the header    0 = absent
  word 7      id of the end-of-text token + 1    0 = unknown
  word 8      1 = a loss mask follows            0 = every token is trained

The loss mask has one bit for each token, the lowest bit of a byte first: 1 = the model is trained to predict this token. In
instruction data those are the answers. A program that does not know masks finds the file too long and refuses it, which is
right: it would train on the questions.
*/
enum {
  SHARD_HEADER = 256 * 4,
  SHARD_MAGIC16 = 20240520, SHARD_VERSION16 = 1,
  SHARD_MAGIC32 = 20240801, SHARD_VERSION32 = 7
};

typedef struct {
  char *path;
  const unsigned char *map;   // the whole file
  size_t map_bytes;
  int width;                  // bytes of a token: 2 or 4
  uint64_t n_tokens;
  const unsigned char *mask;  // a bit for each token, or NULL
} Shard;

// Little-endian numbers, byte by byte: right on any machine at any address.
UNUSED static uint32_t get_u32_(const unsigned char *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

UNUSED static void put_u32_(unsigned char *p, uint32_t v) {
  for (int i = 0; i < 4; i++) p[i] = (unsigned char)(v >> (8 * i));
}

// Word w of the header.
UNUSED static uint32_t shard_word_(const Shard *s, int w) { return get_u32_(s->map + 4 * w); }

// Token i < n_tokens.
UNUSED static uint32_t shard_token_(const Shard *s, uint64_t i) {
  const unsigned char *p = s->map + SHARD_HEADER + i * (uint64_t)s->width;
  return s->width == 2 ? (uint32_t)p[0] | (uint32_t)p[1] << 8 : get_u32_(p);
}

// 1 if the model is trained to predict token i < n_tokens.
UNUSED static int shard_trained_(const Shard *s, uint64_t i) { return s->mask == NULL || (s->mask[i / 8] >> (i % 8) & 1); }

// Writes ids[0..n) as a shard: uint16 if the vocabulary allows it. trained [n] is the loss mask, a byte for each token, or NULL.
// tokenizer_hash 0 and eot -1 mean unknown. The file appears whole or not at all; exit 1 if it cannot be written, 2 if an id
// is outside of the vocabulary.
UNUSED static void shard_write_masked(const char *path, const int *ids, const unsigned char *trained, size_t n, int vocab,
                                      uint64_t tokenizer_hash, int eot) {
  if (n > INT32_MAX) die(EXIT_USAGE, "%s: a shard holds at most %d tokens, found %zu; write several", path, INT32_MAX, n);
  size_t width = vocab <= 65536 ? 2 : 4, tokens = n * width, bytes = tokens + (trained ? (n + 7) / 8 : 0);
  unsigned char *file = (unsigned char *)xcalloc(SHARD_HEADER + bytes, 1), *payload = file + SHARD_HEADER;
  for (size_t i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= vocab)
      die(EXIT_USAGE, "%s: token %zu: expected an id below the vocabulary size %d, found %d", path, i, vocab, ids[i]);
    for (size_t k = 0; k < width; k++) payload[i * width + k] = (unsigned char)((unsigned)ids[i] >> (8 * k));
    if (trained && trained[i]) payload[tokens + i / 8] |= (unsigned char)(1u << (i % 8));
  }
  put_u32_(file, width == 2 ? SHARD_MAGIC16 : SHARD_MAGIC32);
  put_u32_(file + 4, width == 2 ? SHARD_VERSION16 : SHARD_VERSION32);
  put_u32_(file + 8, (uint32_t)n);
  put_u32_(file + 12, (uint32_t)vocab);
  put_u32_(file + 16, (uint32_t)tokenizer_hash);
  put_u32_(file + 20, (uint32_t)(tokenizer_hash >> 32));
  put_u32_(file + 24, crc32_bytes(0, payload, bytes));
  put_u32_(file + 28, (uint32_t)(eot + 1));
  put_u32_(file + 32, trained != NULL);
  int err = safe_write_file(path, (const char *)file, SHARD_HEADER + bytes);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
  free(file);
}

UNUSED static void shard_write(const char *path, const int *ids, size_t n, int vocab, uint64_t tokenizer_hash, int eot) {
  shard_write_masked(path, ids, NULL, n, vocab, tokenizer_hash, eot);
}

// Maps a file and checks all of it: header, size, CRC, every id. Exit 2 if it cannot be read or was made for a larger
// vocabulary or another end-of-text id, 3 if it is damaged or no shard.
UNUSED static void shard_open_(Shard *s, const char *path, int vocab, int eot) {
  s->map = map_file(path, &s->map_bytes, SHARD_HEADER, "a token shard's header");
  s->path = xstrdup(path);

  uint32_t magic = shard_word_(s, 0), version = shard_word_(s, 1), count = shard_word_(s, 2);
  if (magic != SHARD_MAGIC16 && magic != SHARD_MAGIC32)
    die(EXIT_DAMAGED, "%s: header word 0 (magic): expected %d or %d, found %u; is it a token shard?", path, SHARD_MAGIC16,
        SHARD_MAGIC32, magic);
  s->width = magic == SHARD_MAGIC16 ? 2 : 4;
  uint32_t known = magic == SHARD_MAGIC16 ? SHARD_VERSION16 : SHARD_VERSION32;
  if (version != known)
    die(EXIT_DAMAGED, "%s: header word 1 (version): expected %u, found %u; prepare the data again", path, known, version);
  if (count > INT32_MAX)
    die(EXIT_DAMAGED, "%s: header word 2 (tokens): expected at most %d, found %u; copy the file again", path, INT32_MAX, count);
  s->n_tokens = count;
  if (shard_word_(s, 8) > 1)
    die(EXIT_DAMAGED, "%s: header word 8 (loss mask): expected 0 or 1, found %u; prepare the data again", path, shard_word_(s, 8));
  uint64_t tokens = (uint64_t)count * (uint64_t)s->width, payload = tokens + (shard_word_(s, 8) ? ((uint64_t)count + 7) / 8 : 0);
  if (s->map_bytes != SHARD_HEADER + payload)
    die(EXIT_DAMAGED, "%s: expected %llu bytes for the %u tokens of its header, found %zu; the file is %s, copy it again", path,
        (unsigned long long)(SHARD_HEADER + payload), count, s->map_bytes,
        s->map_bytes < SHARD_HEADER + payload ? "cut off" : "too long");
  s->mask = payload > tokens ? s->map + SHARD_HEADER + tokens : NULL;

  // The CRC before the ids: a flipped bit is then called a flipped bit and not a wrong tokenizer.
  uint32_t crc = shard_word_(s, 6);
  uint32_t actual = crc ? crc32_bytes(0, s->map + SHARD_HEADER, (size_t)payload) : 0;
  if (crc != actual)
    die(EXIT_DAMAGED, "%s: CRC-32 of the tokens: expected %08x, found %08x; copy the file again", path, crc, actual);
  if (shard_word_(s, 3) > (uint32_t)vocab)
    die(EXIT_USAGE, "%s was made for a vocabulary of %u, the model has %d; use data of the model's tokenizer", path,
        shard_word_(s, 3), vocab);
  if (eot >= 0 && shard_word_(s, 7) != 0 && shard_word_(s, 7) != (uint32_t)eot + 1)
    die(EXIT_USAGE, "%s ends its documents with token %u, the model's tokenizer with %d; use data of the model's tokenizer", path,
        shard_word_(s, 7) - 1, eot);
  for (uint64_t i = 0; i < s->n_tokens; i++) {
    if (shard_token_(s, i) >= (uint32_t)vocab)
      die(EXIT_DAMAGED, "%s: offset %llu, token %llu: expected an id below the vocabulary size %d, found %u; is it data of this "
          "model's tokenizer?", path, (unsigned long long)(SHARD_HEADER + i * (uint64_t)s->width), (unsigned long long)i, vocab,
          shard_token_(s, i));
  }
}

// ---------------------------------------------------------------------------------------------------------
// The loader: settings and mapped files, nothing that changes after opening.

// One of the sets of shards that are mixed.
typedef struct {
  size_t first, n;   // its shards
  uint64_t split;    // the part of the rows left over by the sources before it that it gets, in units of 2^-32
  uint64_t drawn;    // rows that it gave before row `mixed_at`
} Source;

typedef struct {
  uint64_t seed;

  // Token shards.
  Shard *shards;
  size_t n_shards;
  Source *sources;
  size_t n_sources;
  uint64_t mixed_at;         // the row of the run from which on the present weights hold
  uint64_t n_tokens;         // in all of them
  uint64_t tokenizer_hash;   // that they were made with; 0 = unknown
  int eot;                   // the token that ends a document, -1 = a block is one document
  int shuffle;               // 1: a new order of the blocks in each epoch; 0: in the order of the files

  // Arithmetic, if tok is set.
  Arithmetic arith;
  double drafts;             // fraction of the rows that show a draft of the answer first
  const Tokenizer *tok;      // must outlive the loader
} DataLoader;

// floor(r * f / 2^32) for f <= 2^32, without overflow.
UNUSED static uint64_t share_(uint64_t r, uint64_t f) {
  return (r >> 32) * f + ((r & 0xFFFFFFFF) * f >> 32);
}

// Sets the parts that sources get from their weights, which need not sum to 1. Exit 2 unless they are >= 0 and not all 0.
UNUSED static void loader_split_(DataLoader *d, const double *weights) {
  double rest = 0;
  for (size_t i = d->n_sources; i-- > 0;) {
    rest += weights[i];
    if (!(weights[i] >= 0) || !isfinite(rest))
      die(EXIT_USAGE, "data: expected weights of 0 or more, found %g for %s", weights[i], d->shards[d->sources[i].first].path);
    // The last source with a weight gets all that is left, exactly.
    d->sources[i].split = rest > 0 ? (uint64_t)(weights[i] / rest * 4294967296.0 + 0.5) : 0;
  }
  if (!(rest > 0)) die(EXIT_USAGE, "data: all %zu weights are 0; give one of the sources a weight", d->n_sources);
}

/*
Which source row `row` of the run comes from, and how many rows that source gave before.

Not drawn at random but dealt out: of the first r rows, the first source has had exactly floor(r w), and the next ones share what
it left in the same way. So every batch has its proportions (to within a row for each source), each source goes through its
own blocks one after the other, and both numbers are a formula in row: nothing has to be remembered.
*/
UNUSED static size_t loader_source_(const DataLoader *d, uint64_t row, uint64_t *index) {
  uint64_t r = row - d->mixed_at;
  size_t i = 0;
  for (;; i++) {
    const Source *s = &d->sources[i];
    uint64_t before = share_(r, s->split);
    *index = s->drawn + before;
    if (i + 1 == d->n_sources || share_(r + 1, s->split) > before) return i;
    r -= before;
  }
}

// Changes the weights [n_sources] from row `row` (= batch * batch size) on. Earlier rows can no longer be asked for. mixed_at
// and the sources' drawn belong into the checkpoints of a run that does this.
UNUSED static void loader_reweight(DataLoader *d, uint64_t row, const double *weights) {
  uint64_t r = row - d->mixed_at;
  for (size_t i = 0; i < d->n_sources; i++) {
    uint64_t before = share_(r, d->sources[i].split);
    d->sources[i].drawn += before;
    r -= before;
  }
  d->mixed_at = row;
  loader_split_(d, weights);
}

// Opens the files that match one pattern, in the order of their names, behind those that are open.
UNUSED static void loader_open_pattern_(DataLoader *d, const char *pattern, int vocab, int eot) {
  glob_t found;
  int err = glob(pattern, 0, NULL, &found);
  if (err == GLOB_NOMATCH) die(EXIT_USAGE, "no file matches %s; prepare the data first (see prepro/) or correct the path", pattern);
  if (err) die(EXIT_FAILED, "cannot list %s: glob failed with code %d", pattern, err);
  d->shards = (Shard *)xrealloc(d->shards, size_mul(d->n_shards + found.gl_pathc, sizeof *d->shards));
  for (size_t i = 0; i < found.gl_pathc; i++) {
    Shard *s = &d->shards[d->n_shards++];
    memset(s, 0, sizeof *s);
    shard_open_(s, found.gl_pathv[i], vocab, eot);
    d->n_tokens += s->n_tokens;
  }
  globfree(&found);
}

// Takes ":0.7" off the end of a pattern; -1 if it has no weight.
UNUSED static double pattern_weight_(char *pattern) {
  char *colon = strrchr(pattern, ':'), *end;
  if (colon == NULL || colon[1] == 0) return -1;
  double w = strtod(colon + 1, &end);
  if (*end != 0) return -1;
  if (!(w >= 0)) die(EXIT_USAGE, "data: expected a weight of 0 or more, found %s", colon + 1);
  *colon = 0;
  return w;
}

/*
Opens token shards. patterns is one pattern such as "data/train_*.bin", or several separated by commas: "a_*.bin,b_*.bin" is
one set of files; "a_*.bin:0.7,b_*.bin:0.3" mixes two sources, of which the first gives 7 of 10 rows however large it is.
vocab is the number of ids that the model knows; eot is the token that ends a document, -1 = as the files say. Exit 2 if nothing
matches or files do not belong together, 3 if one is damaged.
*/
UNUSED static void loader_open_shards(DataLoader *d, const char *patterns, int vocab, int eot, uint64_t seed, int shuffle) {
  memset(d, 0, sizeof *d);
  d->seed = seed;
  d->eot = eot;
  d->shuffle = shuffle;
  size_t n = 1, unweighted = 0;
  for (const char *c = patterns; *c; c++) n += *c == ',';
  char *copy = xstrdup(patterns), *at = copy;
  double *weights = (double *)xcalloc(n, sizeof *weights);
  d->sources = (Source *)xcalloc(n, sizeof *d->sources);
  for (size_t i = 0; i < n; i++) {
    size_t len = strcspn(at, ",");
    at[len] = 0;
    weights[i] = pattern_weight_(at);
    unweighted += weights[i] < 0;
    d->sources[i].first = d->n_shards;
    loader_open_pattern_(d, at, vocab, eot);
    d->sources[i].n = d->n_shards - d->sources[i].first;
    at += len + 1;
  }
  if (unweighted != 0 && unweighted != n)
    die(EXIT_USAGE, "data=%s: expected a weight (\":0.5\") behind all of the %zu patterns or behind none, found %zu without",
        patterns, n, unweighted);
  d->n_sources = unweighted ? 1 : n;
  if (unweighted) {   // one set of files
    weights[0] = 1;
    d->sources[0].n = d->n_shards;
  }
  loader_split_(d, weights);
  free(weights);
  free(copy);

  const Shard *hashed = NULL, *ended = NULL;   // the first file that knows its tokenizer, its end-of-text token
  for (size_t i = 0; i < d->n_shards; i++) {
    const Shard *s = &d->shards[i];
    uint32_t end = shard_word_(s, 7);
    if (end != 0 && ended != NULL && end != shard_word_(ended, 7))
      die(EXIT_USAGE, "%s ends its documents with token %u, %s with %u; prepare them alike", ended->path, shard_word_(ended, 7) - 1,
          s->path, end - 1);
    if (end != 0 && ended == NULL) ended = s;
    if (end != 0 && d->eot < 0) d->eot = (int)end - 1;
    uint64_t hash = (uint64_t)shard_word_(s, 5) << 32 | shard_word_(s, 4);
    if (hash != 0 && hashed != NULL && hash != d->tokenizer_hash)
      die(EXIT_USAGE, "%s and %s were made with different tokenizers; all data of a run must be of one tokenizer", hashed->path,
          s->path);
    if (hash == 0 || hashed != NULL) continue;
    d->tokenizer_hash = hash;
    hashed = s;
  }
}

// Endless arithmetic problems, never a held-out one. Exit 2 if the tokenizer cannot write them.
UNUSED static void loader_open_arithmetic(DataLoader *d, const Arithmetic *a, const Tokenizer *t, uint64_t seed) {
  memset(d, 0, sizeof *d);
  d->seed = seed;
  d->eot = t->eos_id;
  d->arith = *a;
  d->tok = t;
  if (t->eos_id < 0 || t->pad_id < 0)
    die(EXIT_USAGE, "arithmetic needs a tokenizer with an end token and a padding token; ids found: %d and %d", t->eos_id, t->pad_id);
  for (const char *c = "0123456789+-*="; *c; c++) {
    int id = -1;
    if (tokenizer_encode(t, c, 1, &id, 1) != 1 || id == t->unk_id)
      die(EXIT_USAGE, "arithmetic needs a tokenizer with a token for '%c', and this one has none", *c);
  }
}

UNUSED static void loader_free(DataLoader *d) {
  for (size_t i = 0; i < d->n_shards; i++) {
    munmap((void *)d->shards[i].map, d->shards[i].map_bytes);
    free(d->shards[i].path);
  }
  free(d->shards);
  free(d->sources);
  memset(d, 0, sizeof *d);
}

// Exit 2 if the shards say that they were made with another tokenizer than t.
UNUSED static void loader_check_tokenizer(const DataLoader *d, const Tokenizer *t) {
  uint64_t hash = tokenizer_hash(t);
  if (d->tokenizer_hash != 0 && d->tokenizer_hash != hash)
    die(EXIT_USAGE, "%s: tokenizer hash: expected the model's %016llx, found %016llx; prepare the data with the model's tokenizer",
        d->shards[0].path, (unsigned long long)hash, (unsigned long long)d->tokenizer_hash);
}

// Blocks of T tokens that shard s yields: each needs one token more, which the next block starts with.
UNUSED static uint64_t shard_blocks_(const Shard *s, int T) { return s->n_tokens ? (s->n_tokens - 1) / (uint64_t)T : 0; }

// Blocks in one epoch of a source, at least one: exit 2 if none of its shards is long enough for T.
UNUSED static uint64_t source_blocks_(const DataLoader *d, const Source *s, int T) {
  uint64_t n = 0, longest = 0;
  for (size_t i = s->first; i < s->first + s->n; i++) {
    n += shard_blocks_(&d->shards[i], T);
    if (d->shards[i].n_tokens > longest) longest = d->shards[i].n_tokens;
  }
  if (n == 0)
    die(EXIT_USAGE, "not enough data: a block of seq_len=%d needs %llu tokens in one file, the longest of the %zu files (%s, ...) has "
        "%llu; add data or lower seq_len", T, (unsigned long long)T + 1, s->n, d->shards[s->first].path, (unsigned long long)longest);
  return n;
}

// Blocks of all sources together. For shards only.
UNUSED static uint64_t loader_blocks(const DataLoader *d, int T) {
  uint64_t n = 0;
  for (size_t i = 0; i < d->n_sources; i++) n += source_blocks_(d, &d->sources[i], T);
  return n;
}

/*
One block as a row of T: tokens [at, at+T) of shard s with their successors as targets.

Documents lie one after the other, each closed by an end-of-text token E, which still belongs to its document. Positions
count from the document's start, and attention must not look before it:

  tokens    A B C E D F E
  start     0 0 0 0 4 4 4
  pos       0 1 2 3 0 1 2
  targets   B C E . F E .      "." = IGNORE: what follows E is the first token of a document that has nothing to do with it

A block that begins inside a document counts from 0 there. Tokens that the shard's mask leaves out are no targets, either.
*/
UNUSED static void shard_row_(const Shard *s, uint64_t at, int eot, int T, int *tokens, int *targets, int *start, int *pos) {
  int begin = 0;
  for (int t = 0; t < T; t++) {
    tokens[t] = (int)shard_token_(s, at + (uint64_t)t);
    int trained = tokens[t] != eot && shard_trained_(s, at + (uint64_t)t + 1);
    targets[t] = trained ? (int)shard_token_(s, at + (uint64_t)t + 1) : IGNORE;
    start[t] = begin;
    pos[t] = t - begin;
    if (tokens[t] == eot) begin = t + 1;
  }
}

// The problem of a row, numbered over the whole run. The operation is drawn first, so that a small multiplication table is
// seen as often as a large set of sums; then its problems, until one is not held out.
UNUSED static uint64_t arith_draw_(const DataLoader *d, uint64_t row) {
  const Arithmetic *a = &d->arith;
  uint64_t key = rng_u64(d->seed, RNG_DATA, row), draw = 0, first = 0, i;
  size_t op = rng_below(key, RNG_DATA, draw++, strlen(a->ops));
  for (size_t k = 0; k < op; k++) first += a->count[k];
  do i = first + rng_below(key, RNG_DATA, draw++, a->count[op]);
  while (arith_is_heldout(a, i));
  return i;
}

// A row of T of padding from column `from` on: no targets, and each position sees itself only, which costs attention the
// least.
UNUSED static void pad_row_(int pad_id, int from, int T, int *tokens, int *targets, int *start, int *pos) {
  for (int t = from; t < T; t++) {
    tokens[t] = pad_id;
    targets[t] = IGNORE;
    start[t] = t;
    pos[t] = 0;
  }
}

enum { RNG_DRAFT = 60, RNG_DRAFT_ERROR = 61 };   // streams of the drafts, counter = row: whether it has one, and which

// The draft of row `row` of the run, with its "=", into ARITH_TEXT_CAP bytes; "" for rows without. One in two is the answer; the other
// is off by one, up or down, in one digit.
UNUSED static void arith_draft_(const DataLoader *d, uint64_t row, const char *answer, char *out) {
  *out = 0;
  if (d->drafts == 0 || rng_uniform(d->seed, RNG_DRAFT, row) >= d->drafts) return;
  uint64_t r = rng_u64(d->seed, RNG_DRAFT_ERROR, row);
  long by = r % 2 ? 0 : 1;
  for (int k = (int)((r >> 8) % strlen(answer)); k > 0; k--) by *= 10;
  snprintf(out, ARITH_TEXT_CAP, "%ld=", atol(answer) + (r >> 1 & 1 ? by : -by));
}

/*
Problem i as a row of T: prompt, answer, </s>, then padding. Only the answer and its </s> are targets, since the operands
are random and nothing can be learned from them:

  tokens    1 2 + 3 =  1  5  </s> <pad>
  targets   . . . . 1  5 </s>  .    .

row: with the draft of that row, "12+3=16=15"; NO_DRAFT: without.
*/
#define NO_DRAFT UINT64_MAX
UNUSED static void arith_row_(const DataLoader *d, uint64_t i, uint64_t row, int T, int *tokens, int *targets, int *start, int *pos) {
  // Prompt and answer are encoded apart, so the boundary between them is one between tokens for any tokenizer.
  char prompt[2 * ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  int ids[3 * ARITH_TEXT_CAP];
  arith_text(&d->arith, i, prompt, answer);
  if (row != NO_DRAFT) arith_draft_(d, row, answer, prompt + strlen(prompt));
  int n_prompt = (int)tokenizer_encode(d->tok, prompt, strlen(prompt), ids, 2 * ARITH_TEXT_CAP);
  int n = n_prompt + (int)tokenizer_encode(d->tok, answer, strlen(answer), ids + n_prompt, ARITH_TEXT_CAP);
  ids[n++] = d->tok->eos_id;
  for (int t = 0; t < n && t < T; t++) {
    tokens[t] = ids[t];
    targets[t] = t + 1 >= n_prompt && t + 1 < n ? ids[t + 1] : IGNORE;
    start[t] = 0;
    pos[t] = t;
  }
  pad_row_(d->tok->pad_id, n, T, tokens, targets, start, pos);
}

// Exit 2 unless the longest problem fits into a row of T, with its draft if rows have some.
UNUSED static void arith_check_row_(const DataLoader *d, int T) {
  int needed = arith_row_tokens(&d->arith, d->drafts > 0);
  if (T < needed) die(EXIT_USAGE, "seq_len=%d is too short for these arithmetic problems: at least %d is needed", T, needed);
}

UNUSED static void batch_count_targets_(Batch *b) {
  b->n_targets = 0;
  for (size_t i = 0; i < (size_t)b->B * (size_t)b->T; i++) b->n_targets += b->targets[i] != IGNORE;
}

// Fills b with problems[first], problems[first+1], .. of n, one a row as in training; rows beyond the n-th are padding without
// targets. Meant for the loss on held-out problems (arith_heldout), which loader_batch never gives. Exit 2 if T is too short.
UNUSED static void arith_fill_heldout(const DataLoader *d, const uint64_t *problems, size_t first, size_t n, Batch *b) {
  int T = b->T;
  arith_check_row_(d, T);
  for (int r = 0; r < b->B; r++) {
    size_t o = (size_t)r * (size_t)T;
    if (first < n && (size_t)r < n - first)
      arith_row_(d, problems[first + (size_t)r], NO_DRAFT, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
    else
      pad_row_(d->tok->pad_id, 0, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
  }
  batch_count_targets_(b);
}

// Fills b, of shape b->B x b->T, with batch `index` of the run. Nothing is remembered between calls: any batch can be asked
// for in any order. Exit 2 if T is too short for the problems, or too long for the shards.
UNUSED static void loader_batch(const DataLoader *d, uint64_t index, Batch *b) {
  int T = b->T;
  if (d->tok != NULL) arith_check_row_(d, T);
  for (int r = 0; r < b->B; r++) {
    uint64_t row = index * (uint64_t)b->B + (uint64_t)r;
    size_t o = (size_t)r * (size_t)T;
    if (d->tok != NULL) {
      arith_row_(d, arith_draw_(d, row), row, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
      continue;
    }
    uint64_t place;
    size_t i = loader_source_(d, row, &place);
    const Source *source = &d->sources[i];
    uint64_t n_blocks = source_blocks_(d, source, T), epoch = place / n_blocks, block = place % n_blocks;
    if (d->shuffle) block = permute(block, n_blocks, rng_u64(d->seed, RNG_DATA, (uint64_t)i << 48 | epoch));
    const Shard *s = d->shards + source->first;
    for (; block >= shard_blocks_(s, T); s++) block -= shard_blocks_(s, T);
    shard_row_(s, block * (uint64_t)T, d->eot, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
  }
  batch_count_targets_(b);
}

#endif
