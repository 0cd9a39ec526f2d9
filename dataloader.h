/*
dataloader.h: where training batches come from.

What it is:  batches of token ids from one of two sources: arithmetic problems made up on the fly, or token shards (llm.c's
             .bin files) mapped into memory and cut into blocks in a shuffled order.
What not:    no text (prepro/ turns text into shards) and no threads. There is no read position either: batch k is a pure
             function of the settings, the seed and k, so a run resumes by going on at k.
Read before: bitnet/utils.h, tokenizer.h.
Defines:     Batch, batch_alloc, batch_free; Arithmetic, arith_init, arith_problem, arith_text, arith_is_heldout,
             arith_heldout, arith_max_tokens; DataLoader, loader_open_shards, loader_open_arithmetic,
             loader_check_tokenizer, loader_blocks, loader_batch, arith_fill_heldout, loader_free; shard_write; permute.
*/
#ifndef DATALOADER_H
#define DATALOADER_H

#include "bitnet/utils.h"
#include "tokenizer.h"
#include <glob.h>
#include <sys/mman.h>

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

// ---------------------------------------------------------------------------------------------------------
/*
Shards: 256 int32 of header, then the tokens, everything little-endian. Words 0 to 2 are llm.c's; llm.c leaves the others 0,
and we put there what lets a mistake be noticed.

  word 0, 1   20240520, 1 = uint16 tokens        20240801, 7 = uint32 tokens
  word 2      number of tokens
  word 3      vocabulary size                    0 = unknown
  word 4, 5   tokenizer_hash, low and high half  0 = unknown
  word 6      CRC-32 of the tokens' bytes        0 = absent
  word 7      id of the end-of-text token + 1    0 = unknown
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

// Writes ids[0..n) as a shard: uint16 if the vocabulary allows it. tokenizer_hash 0 and eot -1 mean unknown. The file
// appears whole or not at all; exit 1 if it cannot be written, 2 if an id is outside of the vocabulary.
UNUSED static void shard_write(const char *path, const int *ids, size_t n, int vocab, uint64_t tokenizer_hash, int eot) {
  if (n > INT32_MAX) die(EXIT_USAGE, "%s: a shard holds at most %d tokens, found %zu; write several", path, INT32_MAX, n);
  size_t width = vocab <= 65536 ? 2 : 4, bytes = n * width;
  unsigned char *file = (unsigned char *)xcalloc(SHARD_HEADER + bytes, 1), *payload = file + SHARD_HEADER;
  for (size_t i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= vocab)
      die(EXIT_USAGE, "%s: token %zu: expected an id below the vocabulary size %d, found %d", path, i, vocab, ids[i]);
    for (size_t k = 0; k < width; k++) payload[i * width + k] = (unsigned char)((unsigned)ids[i] >> (8 * k));
  }
  put_u32_(file, width == 2 ? SHARD_MAGIC16 : SHARD_MAGIC32);
  put_u32_(file + 4, width == 2 ? SHARD_VERSION16 : SHARD_VERSION32);
  put_u32_(file + 8, (uint32_t)n);
  put_u32_(file + 12, (uint32_t)vocab);
  put_u32_(file + 16, (uint32_t)tokenizer_hash);
  put_u32_(file + 20, (uint32_t)(tokenizer_hash >> 32));
  put_u32_(file + 24, crc32_bytes(0, payload, bytes));
  put_u32_(file + 28, (uint32_t)(eot + 1));
  int err = safe_write_file(path, (const char *)file, SHARD_HEADER + bytes);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
  free(file);
}

// Maps a file and checks all of it: header, size, CRC, every id. Exit 2 if it cannot be read or was made for a larger
// vocabulary or another end-of-text id, 3 if it is damaged or no shard.
UNUSED static void shard_open_(Shard *s, const char *path, int vocab, int eot) {
  struct stat st;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &st) != 0) die(EXIT_USAGE, "cannot read shard %s: %s", path, strerror(errno));
  if (!S_ISREG(st.st_mode)) die(EXIT_USAGE, "cannot read shard %s: it is not a file", path);
  if (st.st_size < SHARD_HEADER)
    die(EXIT_DAMAGED, "%s: expected a header of %d bytes, found a file of %lld; is it a token shard?", path, SHARD_HEADER,
        (long long)st.st_size);
  s->path = xstrdup(path);
  s->map_bytes = (size_t)st.st_size;
  void *map = mmap(NULL, s->map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) die(EXIT_FAILED, "cannot map %s: %s", path, strerror(errno));
  close(fd);   // the mapping stays
  s->map = (const unsigned char *)map;

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
  uint64_t payload = (uint64_t)count * (uint64_t)s->width;
  if (s->map_bytes != SHARD_HEADER + payload)
    die(EXIT_DAMAGED, "%s: expected %llu bytes for the %u tokens of its header, found %zu; the file is %s, copy it again", path,
        (unsigned long long)(SHARD_HEADER + payload), count, s->map_bytes,
        s->map_bytes < SHARD_HEADER + payload ? "cut off" : "too long");

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

typedef struct {
  uint64_t seed;

  // Token shards.
  Shard *shards;
  size_t n_shards;
  uint64_t n_tokens;         // in all of them
  uint64_t tokenizer_hash;   // that they were made with; 0 = unknown
  int eot;                   // the token that ends a document, -1 = a block is one document
  int shuffle;               // 1: a new order of the blocks in each epoch; 0: in the order of the files

  // Arithmetic, if tok is set.
  Arithmetic arith;
  const Tokenizer *tok;      // must outlive the loader
} DataLoader;

// Opens the files that match a pattern such as "data/train_*.bin", in the order of their names. vocab is the number of ids
// that the model knows. Exit 2 if nothing matches or files do not belong together, 3 if one is damaged.
UNUSED static void loader_open_shards(DataLoader *d, const char *pattern, int vocab, int eot, uint64_t seed, int shuffle) {
  glob_t found;
  memset(d, 0, sizeof *d);
  d->seed = seed;
  d->eot = eot;
  d->shuffle = shuffle;
  int err = glob(pattern, 0, NULL, &found);
  if (err == GLOB_NOMATCH) die(EXIT_USAGE, "no file matches %s; prepare the data first (see prepro/) or correct the path", pattern);
  if (err) die(EXIT_FAILED, "cannot list %s: glob failed with code %d", pattern, err);
  d->n_shards = found.gl_pathc;
  d->shards = (Shard *)xcalloc(d->n_shards, sizeof *d->shards);
  const char *hashed = NULL;   // the first file that knows its tokenizer
  for (size_t i = 0; i < d->n_shards; i++) {
    Shard *s = &d->shards[i];
    shard_open_(s, found.gl_pathv[i], vocab, eot);
    d->n_tokens += s->n_tokens;
    uint64_t hash = (uint64_t)shard_word_(s, 5) << 32 | shard_word_(s, 4);
    if (hash != 0 && hashed != NULL && hash != d->tokenizer_hash)
      die(EXIT_USAGE, "%s and %s were made with different tokenizers; one pattern must match data of one tokenizer", hashed, s->path);
    if (hash != 0) {
      d->tokenizer_hash = hash;
      hashed = s->path;
    }
  }
  globfree(&found);
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

// Blocks in one epoch, at least one: exit 2 if no shard is long enough for T. For shards only.
UNUSED static uint64_t loader_blocks(const DataLoader *d, int T) {
  uint64_t n = 0, longest = 0;
  for (size_t i = 0; i < d->n_shards; i++) {
    n += shard_blocks_(&d->shards[i], T);
    if (d->shards[i].n_tokens > longest) longest = d->shards[i].n_tokens;
  }
  if (n == 0)
    die(EXIT_USAGE, "not enough data: a block of seq_len=%d needs %llu tokens in one file, the longest of the %zu files (%s, ...) has "
        "%llu; add data or lower seq_len", T, (unsigned long long)T + 1, d->n_shards, d->shards[0].path, (unsigned long long)longest);
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

A block that begins inside a document counts from 0 there.
*/
UNUSED static void shard_row_(const Shard *s, uint64_t at, int eot, int T, int *tokens, int *targets, int *start, int *pos) {
  int begin = 0;
  for (int t = 0; t < T; t++) {
    tokens[t] = (int)shard_token_(s, at + (uint64_t)t);
    targets[t] = tokens[t] == eot ? IGNORE : (int)shard_token_(s, at + (uint64_t)t + 1);
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

/*
Problem i as a row of T: prompt, answer, </s>, then padding. Only the answer and its </s> are targets, since the operands
are random and nothing can be learned from them:

  tokens    1 2 + 3 =  1  5  </s> <pad>
  targets   . . . . 1  5 </s>  .    .
*/
UNUSED static void arith_row_(const DataLoader *d, uint64_t i, int T, int *tokens, int *targets, int *start, int *pos) {
  // Prompt and answer are encoded apart, so the boundary between them is one between tokens for any tokenizer.
  char prompt[ARITH_TEXT_CAP], answer[ARITH_TEXT_CAP];
  int ids[2 * ARITH_TEXT_CAP];
  arith_text(&d->arith, i, prompt, answer);
  int n_prompt = (int)tokenizer_encode(d->tok, prompt, strlen(prompt), ids, ARITH_TEXT_CAP);
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

// Exit 2 unless the longest problem fits into a row of T.
UNUSED static void arith_check_row_(const DataLoader *d, int T) {
  int needed = arith_max_tokens(&d->arith) - 1;
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
      arith_row_(d, problems[first + (size_t)r], T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
    else
      pad_row_(d->tok->pad_id, 0, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
  }
  batch_count_targets_(b);
}

// Fills b, of shape b->B x b->T, with batch `index` of the run. Nothing is remembered between calls: any batch can be asked
// for in any order. Exit 2 if T is too short for the problems, or too long for the shards.
UNUSED static void loader_batch(const DataLoader *d, uint64_t index, Batch *b) {
  int T = b->T;
  uint64_t n_blocks = 0;
  if (d->tok == NULL) n_blocks = loader_blocks(d, T);
  else arith_check_row_(d, T);
  for (int r = 0; r < b->B; r++) {
    uint64_t row = index * (uint64_t)b->B + (uint64_t)r;
    size_t o = (size_t)r * (size_t)T;
    if (d->tok != NULL) {
      arith_row_(d, arith_draw_(d, row), T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
      continue;
    }
    uint64_t epoch = row / n_blocks, block = row % n_blocks;
    if (d->shuffle) block = permute(block, n_blocks, rng_u64(d->seed, RNG_DATA, epoch));
    const Shard *s = d->shards;
    for (; block >= shard_blocks_(s, T); s++) block -= shard_blocks_(s, T);
    shard_row_(s, block * (uint64_t)T, d->eot, T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
  }
  batch_count_targets_(b);
}

#endif
