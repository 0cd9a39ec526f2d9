/*
test_shards.h: tests of what dataloader.h does with token shards beyond plain reading: loss masks, and mixtures of sources.

Read before: check.h, test_data.h (its helpers), dataloader.h.
Defines:     SHARD_TESTS, the rows for the table of tests.
*/
#ifndef TEST_SHARDS_H
#define TEST_SHARDS_H

#include "../../dataloader.h"
#include "check.h"
#include "test_data.h"

// ---------------------------------------------------------------------------------------------------------
// Loss masks.

static void test_shard_mask(void) {
  // Two conversations: question A B, answer C D E(nd); question F, answer G H E. The next one begins with a question.
  static const char text[] = "ABCDEFGHEA", trained[] = "0011101110", want[] = ".CDE.GHE.";
  int ids[10];
  unsigned char mask[10];
  size_t len;
  for (int i = 0; i < 10; i++) {
    ids[i] = text[i] - 'A';
    mask[i] = trained[i] == '1';
  }
  const char *dir = test_dir();
  path_join(shard_path_, sizeof shard_path_, dir, "m.bin");
  for (int wide = 0; wide < 2; wide++) {
    int vocab = wide ? 70000 : 50;
    shard_write_masked(shard_path_, ids, mask, 10, vocab, 5, 4);
    unsigned char *file = (unsigned char *)read_file(shard_path_, &len);
    CHECK(len == 1024 + (wide ? 40u : 20u) + 2 && file[32] == 1 && file[len - 2] == 0xDC && file[len - 1] == 1, "%zu bytes", len);
    free(file);
    DataLoader d;
    Batch b;
    loader_open_shards(&d, shard_path_, vocab, 4, 1, 0);
    batch_alloc(&b, 1, 9);
    loader_batch(&d, 0, &b);
    size_t n = 0;
    for (int t = 0; t < 9; t++) {
      int target = want[t] == '.' ? IGNORE : want[t] - 'A';
      CHECK(b.tokens[t] == ids[t] && b.targets[t] == target, "at %d: token %d, target %d, wanted %d", t, b.tokens[t], b.targets[t],
            target);
      n += target != IGNORE;
    }
    CHECK(b.n_targets == n && b.start[5] == 5 && b.pos[8] == 3, "n_targets %zu", b.n_targets);
    batch_free(&b);
    loader_free(&d);
  }

  // A mask of ones trains what no mask trains.
  int many[100];
  unsigned char ones[100];
  DataLoader d, e;
  Batch b, c;
  for (int i = 0; i < 100; i++) many[i] = i * 7 % 50;
  memset(ones, 1, sizeof ones);
  put_shard_(dir, "plain.bin", many, 100, 50, 9);
  loader_open_shards(&d, shard_path_, 50, 9, 1, 1);
  path_join(shard_path_, sizeof shard_path_, dir, "ones.bin");
  shard_write_masked(shard_path_, many, ones, 100, 50, 0, 9);
  loader_open_shards(&e, shard_path_, 50, 9, 1, 1);
  batch_alloc(&b, 3, 11);
  batch_alloc(&c, 3, 11);
  loader_batch(&d, 1, &b);
  loader_batch(&e, 1, &c);
  CHECK(same_batch_(&b, &c), "a mask of ones changes the batch");
  loader_free(&d);
  loader_free(&e);
  batch_free(&b);
  batch_free(&c);
}

static void test_shard_mask_refuses(void) {
  int ids[100];
  unsigned char mask[100];
  size_t len;
  char dir[512], path[4096];
  snprintf(dir, sizeof dir, "%s", test_dir());
  path_join(path, sizeof path, dir, "m.bin");
  for (int i = 0; i < 100; i++) {
    ids[i] = i % 50;
    mask[i] = i % 3 == 0;
  }
  shard_write_masked(path, ids, mask, 100, 50, 0, -1);
  unsigned char *good = (unsigned char *)read_file(path, &len);
  OpenArgs_ args = {path, 50, -1, 10};
  static const struct { const char *name; size_t offset; unsigned char value; size_t cut; const char *words; } cases[] = {
    {"kind of mask", 32, 2, 0, "word 8|expected 0 or 1, found 2"}, {"mask not announced", 32, 0, 0, "too long|1224 bytes"},
    {"mask cut off", 32, 1, 1, "cut off|1237"}, {"flipped bit in the mask", 1024 + 205, 0xFF, 0, "CRC-32"}};
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    unsigned char *bad = (unsigned char *)xmalloc(len);
    memcpy(bad, good, len);
    bad[cases[i].offset] = cases[i].value;
    put_file_(dir, "m.bin", (const char *)bad, len - cases[i].cut);
    CHECK(refused_(open_shards_, &args, EXIT_DAMAGED, cases[i].words), "%s", cases[i].name);
    free(bad);
  }
  // A plain shard that claims to have a mask.
  put_shard_(dir, "m.bin", ids, 100, 50, -1);
  unsigned char *plain = (unsigned char *)read_file(path, &len);
  plain[32] = 1;
  put_file_(dir, "m.bin", (const char *)plain, len);
  CHECK(refused_(open_shards_, &args, EXIT_DAMAGED, "cut off"), "a mask that is not there");
  free(plain);
  free(good);
}

static void open_all_(void *dir) {
  char pattern[4096];
  DataLoader d;
  path_join(pattern, sizeof pattern, (const char *)dir, "*.bin");
  loader_open_shards(&d, pattern, 50, -1, 1, 1);
}

// Which token ends a document: what the caller says, or else what the files say, which must agree.
static void test_shard_eot(void) {
  int ids[] = {1, 2, 3, 4};
  char dir[512];
  DataLoader d;
  snprintf(dir, sizeof dir, "%s", test_dir());
  put_shard_(dir, "a.bin", ids, 4, 50, -1);
  loader_open_shards(&d, shard_path_, 50, -1, 1, 1);
  CHECK(d.eot == -1, "unknown, not %d", d.eot);
  loader_free(&d);
  loader_open_shards(&d, shard_path_, 50, 3, 1, 1);
  CHECK(d.eot == 3, "3, not %d", d.eot);
  loader_free(&d);
  put_shard_(dir, "b.bin", ids, 4, 50, 0);
  loader_open_shards(&d, shard_path_, 50, -1, 1, 1);
  CHECK(d.eot == 0, "0, not %d", d.eot);
  loader_free(&d);
  char err[512];
  CHECK(run_child(open_all_, dir, err, sizeof err) == 0, "one that knows and one that does not: %s", err);
  put_shard_(dir, "c.bin", ids, 4, 50, 7);
  CHECK(refused_(open_all_, dir, EXIT_USAGE, "b.bin|token 0|c.bin|with 7"), "two that disagree");
}

// ---------------------------------------------------------------------------------------------------------
// Mixtures. Source s has blocks of 10 tokens that begin with 1000 s + 10 k, so a row tells where it is from.

enum { MIX_SOURCES = 3 };
static const int mix_sizes_[MIX_SOURCES] = {71, 301, 41};   // 7, 30 and 4 blocks

// Writes the sources a_*.bin (two files), b.bin and c.bin; returns their directory.
static const char *put_mixture_(void) {
  static char dir[512];
  static const char *const names[] = {"a_1.bin", "b.bin", "c.bin"};
  int ids[301];
  snprintf(dir, sizeof dir, "%s", test_dir());
  for (int s = 0; s < MIX_SOURCES; s++) {
    for (int i = 0; i < mix_sizes_[s]; i++) ids[i] = 1000 * s + i;
    put_shard_(dir, names[s], ids, (size_t)mix_sizes_[s], 4000, -1);
  }
  for (int i = 0; i < 51; i++) ids[i] = 500 + i;   // 5 blocks more for a
  put_shard_(dir, "a_2.bin", ids, 51, 4000, -1);
  return dir;
}

// Opens "dir/x" for each of the comma-separated x in list.
static void open_mixture_(DataLoader *d, const char *dir, const char *list, uint64_t seed) {
  StrBuf b = {NULL, 0, 0};
  char copy[256];
  snprintf(copy, sizeof copy, "%s", list);
  for (char *item = strtok(copy, ","); item; item = strtok(NULL, ",")) strbuf_printf(&b, "%s%s/%s", b.len ? "," : "", dir, item);
  loader_open_shards(d, b.data, 4000, -1, seed, 1);
  strbuf_free(&b);
}

// The first token of row `row` of the run, asked for in a batch of B.
static int first_of_row_(const DataLoader *d, uint64_t row, Batch *b) {
  loader_batch(d, row / (uint64_t)b->B, b);
  return b->tokens[(size_t)(row % (uint64_t)b->B) * (size_t)b->T];
}

static void test_mixture(void) {
  static const double want[MIX_SOURCES] = {0.5, 0.3, 0.2};
  static const int blocks[MIX_SOURCES] = {12, 30, 4};
  const char *dir = put_mixture_();
  DataLoader d, e;
  Batch b, one;
  batch_alloc(&b, 4, 10);
  batch_alloc(&one, 1, 10);
  open_mixture_(&d, dir, "a_*.bin:5,b.bin:3,c.bin:2", 3);
  CHECK(d.n_sources == 3 && d.n_shards == 4 && loader_blocks(&d, 10) == 46, "%zu sources, %zu files", d.n_sources, d.n_shards);
  // After every row each source is within two rows of its share, and its blocks come once an epoch, in a new order each time.
  int count[MIX_SOURCES] = {0, 0, 0}, seen[MIX_SOURCES][400], order[2][12];
  memset(seen, 0, sizeof seen);
  for (uint64_t row = 0; row < 4000; row++) {
    int first = first_of_row_(&d, row, &b), s = first / 1000;
    if (s < MIX_SOURCES) {
      int epoch = count[s] / blocks[s];
      if (s == 0 && epoch < 2) order[epoch][count[s] % 12] = first;
      if (count[s] % blocks[s] == 0) memset(seen[s], 0, sizeof seen[s]);
      CHECK(first % 10 == 0 && !seen[s][first % 1000 / 10]++, "row %d: block %d again in epoch %d", (int)row, first, epoch);
      count[s]++;
    }
    for (int i = 0; i < MIX_SOURCES; i++)
      CHECK(fabs(count[i] - (double)(row + 1) * want[i]) <= 2, "after row %d: %d of source %d", (int)row, count[i], i);
  }
  CHECK(memcmp(order[0], order[1], sizeof order[0]) != 0, "two epochs in one order");

  // A pure function of the row: another loader, another batch size, any order; far away; another seed.
  open_mixture_(&e, dir, "a_*.bin:0.5,b.bin:0.3,c.bin:0.2", 3);
  for (uint64_t k = 0; k < 200; k++) {
    uint64_t row = rng_below(1, RNG_TEST, k, 1ull << 40);
    CHECK(first_of_row_(&d, row, &b) == first_of_row_(&e, row, &one), "row %llu", (unsigned long long)row);
  }
  e.seed = 4;
  int differs = 0;
  for (uint64_t row = 0; row < 20; row++) differs |= first_of_row_(&d, row, &b) != first_of_row_(&e, row, &one);
  CHECK(differs, "the seed changes nothing");
  alloc_guard = 1;   // a batch asks for no memory
  loader_batch(&d, 7, &b);
  alloc_guard = 0;
  loader_free(&e);

  // The numbers far out, where a product of 64 bits would overflow.
  uint64_t index, r = 1ull << 50, sum = 0;
  for (uint64_t i = 0; i < 10; i++) {
    size_t s = loader_source_(&d, r + i, &index);
    CHECK(fabs((double)index - (double)(r + i) * want[s]) < 1e-9 * (double)r, "source %zu: %g", s, (double)index);
    sum += s == 0;
  }
  CHECK(sum == 5, "%d of 10 rows from the first source", (int)sum);
  loader_free(&d);

  // Two sources of equal size are shuffled apart.
  open_mixture_(&d, dir, "b.bin:1,b.bin:1", 3);
  int equal = 0;
  for (uint64_t row = 0; row < 60; row += 2) equal += first_of_row_(&d, row, &b) == first_of_row_(&d, row + 1, &b);
  CHECK(equal < 10, "%d of 30 blocks come together", equal);
  loader_free(&d);

  // Weight 0 is never drawn; a single source with a weight, and files without weights, are what they were.
  open_mixture_(&d, dir, "a_*.bin:0,b.bin:1,c.bin:0", 3);
  for (uint64_t row = 0; row < 100; row++) CHECK(first_of_row_(&d, row, &b) / 1000 == 1, "a source of weight 0");
  open_mixture_(&e, dir, "b.bin", 3);
  loader_free(&d);
  open_mixture_(&d, dir, "b.bin:0.1", 3);
  for (uint64_t row = 0; row < 100; row++) CHECK(first_of_row_(&d, row, &b) == first_of_row_(&e, row, &one), "one source, row %d",
                                                 (int)row);
  loader_free(&d);
  loader_free(&e);
  open_mixture_(&d, dir, "a_*.bin", 3);
  open_mixture_(&e, dir, "a_1.bin,a_2.bin", 3);
  for (uint64_t row = 0; row < 100; row++) CHECK(first_of_row_(&d, row, &b) == first_of_row_(&e, row, &one), "one set, row %d",
                                                 (int)row);
  loader_free(&d);
  loader_free(&e);
  batch_free(&b);
  batch_free(&one);
}

// New weights in the middle of a run: what came before stays, what comes after follows them, and no source repeats blocks.
static void test_mixture_reweight(void) {
  static const double after[MIX_SOURCES] = {1, 0, 9};
  const char *dir = put_mixture_();
  DataLoader d, e;
  Batch b;
  int count[MIX_SOURCES] = {0, 0, 0}, late[MIX_SOURCES] = {0, 0, 0};
  batch_alloc(&b, 2, 10);
  open_mixture_(&d, dir, "a_*.bin:5,b.bin:3,c.bin:2", 3);
  open_mixture_(&e, dir, "a_*.bin:5,b.bin:3,c.bin:2", 3);
  for (uint64_t row = 0; row < 102; row++) count[first_of_row_(&d, row, &b) / 1000]++;
  loader_reweight(&d, 102, after);
  for (int i = 0; i < MIX_SOURCES; i++) CHECK(d.sources[i].drawn == (uint64_t)count[i], "source %d gave %d rows", i, count[i]);
  // Source 2 goes on where it was: it gives the blocks that it would have given anyway, only sooner.
  int want[200], n = 0, got = 0;
  for (uint64_t row = 102; n < 200; row++) {
    int first = first_of_row_(&e, row, &b);
    if (first / 1000 == 2) want[n++] = first;
  }
  for (uint64_t row = 102; row < 302; row++) {
    int first = first_of_row_(&d, row, &b);
    late[first / 1000]++;
    if (first / 1000 == 2 && got < n) CHECK(first == want[got++], "row %d: block %d, wanted %d", (int)row, first, want[got - 1]);
  }
  CHECK(late[1] == 0 && abs(late[0] - 20) <= 1 && abs(late[2] - 180) <= 1, "%d %d %d rows", late[0], late[1], late[2]);

  // A run that resumes sets the same three things again.
  uint64_t drawn[MIX_SOURCES];
  for (int i = 0; i < MIX_SOURCES; i++) drawn[i] = d.sources[i].drawn;
  loader_free(&e);
  open_mixture_(&e, dir, "a_*.bin:1,b.bin:0,c.bin:9", 3);
  e.mixed_at = 102;
  for (int i = 0; i < MIX_SOURCES; i++) e.sources[i].drawn = drawn[i];
  for (uint64_t row = 102; row < 302; row++) {
    int first = first_of_row_(&d, row, &b);
    CHECK(first == first_of_row_(&e, row, &b), "row %d after a resume", (int)row);
  }
  // Weights may change again.
  loader_reweight(&d, 302, after);
  uint64_t sum = 0;
  for (int i = 0; i < MIX_SOURCES; i++) {
    CHECK(d.sources[i].drawn == drawn[i] + (uint64_t)late[i], "source %d gave %d rows", i, (int)d.sources[i].drawn);
    sum += d.sources[i].drawn;
  }
  CHECK(sum == 302, "%d rows", (int)sum);
  loader_free(&d);
  loader_free(&e);
  batch_free(&b);
}

static void open_pattern_arg_(void *arg) {
  DataLoader d;
  loader_open_shards(&d, (const char *)arg, 4000, -1, 1, 1);
  loader_blocks(&d, 50);
}

static void test_mixture_refuses(void) {
  const char *dir = put_mixture_();
  static const struct { const char *list[3]; int code; const char *words; } cases[] = {
    {{"a_*.bin:1", "b.bin", NULL}, EXIT_USAGE, "behind all of the 2 patterns or behind none, found 1 without"},
    {{"a_*.bin:0", "b.bin:0", NULL}, EXIT_USAGE, "all 2 weights are 0"},
    {{"a_*.bin:-1", "b.bin:1", NULL}, EXIT_USAGE, "0 or more, found -1"},
    {{"a_*.bin:nan", "b.bin:1", NULL}, EXIT_USAGE, "0 or more, found nan"},
    {{"a_*.bin:inf", "b.bin:1", NULL}, EXIT_USAGE, "0 or more, found inf"},
    {{"a_*.bin:0.5x", "b.bin:1", NULL}, EXIT_USAGE, "no file matches"},   // then it is a part of the name
    {{"a_*.bin:1", "x.bin:1", NULL}, EXIT_USAGE, "no file matches|x.bin"},
    {{"a_*.bin:1", "c.bin:1", NULL}, EXIT_USAGE, "needs 51 tokens|1 files|has 41"}};   // one source is too small, not all of them
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    char patterns[1200] = "";
    for (int k = 0; cases[i].list[k]; k++) snprintf(patterns + strlen(patterns), sizeof patterns - strlen(patterns), "%s%s/%s",
                                                    k ? "," : "", dir, cases[i].list[k]);
    CHECK(refused_(open_pattern_arg_, patterns, cases[i].code, cases[i].words), "%s", cases[i].list[0]);
  }
}

#define SHARD_TESTS                                                                                       \
  {"shard_mask", "loss masks of both widths; a mask of ones changes nothing", test_shard_mask},           \
  {"shard_mask_refuses", "damaged masks", test_shard_mask_refuses},                                       \
  {"shard_eot", "the end-of-text token of the caller and of the files", test_shard_eot},                  \
  {"mixture", "shares after every row, epochs of each source, any access order", test_mixture},           \
  {"mixture_reweight", "new weights in the middle of a run, and resuming after them", test_mixture_reweight},  \
  {"mixture_refuses", "weights that make no sense", test_mixture_refuses}

#endif
