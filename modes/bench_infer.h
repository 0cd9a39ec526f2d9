/*
bench_infer.h: how fast a packed model runs, and how much of the memory's speed that is.

What it is:  `./train_bitnet bench decode`: a model of the shape of BitNet b1.58 2B4T with random weights, made in memory. Rows of
             name, shape, value, unit: tokens/s of decoding for 1 and 8 sequences (or decode/N: for N of them, up to 64, and no more)
             and of prompts of 128 and 512 tokens; the speed of
             reading memory, measured between the decoding steps; the share of the limit that it sets; peak memory.
What not:    no comparison with other programs; dev/bench_peers.py runs them side by side.
Read before: bitnet/infer.h, bench.h.
Defines:     bench_decode_.

The limit: a token cannot come sooner than the bytes that every token needs have been read, the packed weights and the screen of
the classifier. Reading speed changes from one minute to the next on shared machines, so after every decoded token the same
bytes are read by a plain loop, and medians of both are compared.
*/
#ifndef MODE_BENCH_INFER_H
#define MODE_BENCH_INFER_H

#include "../bitnet/infer.h"
#include "bench_rows.h"

enum { BI_PROMPT = 128, BI_LONG = 512, BI_TOKENS = 24, BI_BATCH = 8, BI_MOST = 64, BI_RUNS = 3 };

// Random codes for every matrix; a table of bf16 numbers with standard deviation init_std, each the sum of four uniform ones; gains 1.
static void bi_fill_(Model *m, uint64_t seed) {
  const Config *c = &m->c;
  size_t largest = 1 << 20, C = (size_t)c->dim, step = largest / C;
  for (int i = 0; i < m->table.count; i++) {
    if (m->table.tensors[i].flags & TERNARY && m->table.tensors[i].n > largest) largest = m->table.tensors[i].n;
  }
  int8_t *host = (int8_t *)xmalloc(largest * sizeof(float)), *device = (int8_t *)dev_malloc(largest);
  float *host_rows = (float *)host, *rows = (float *)dev_malloc(step * C * sizeof(float));
  if (device == NULL || rows == NULL) die(EXIT_FAILED, "out of memory: a matrix of %zu weights", largest);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (t->flags & TERNARY) {
      int part;
      BitWeight *w = frozen_weight(m, i, &part);
      for (size_t k = 0; k < t->n; k += 20) {   // 3^20 < 2^32
        uint64_t draw = rng_u64(seed, RNG_INIT, (uint64_t)i << 40 | k) >> 32;
        for (size_t j = k; j < k + 20 && j < t->n; j++, draw /= 3) host[j] = (int8_t)((int)(draw % 3) - 1);
      }
      dev_copy_in(device, host, t->n);
      weight_pack_codes(w, part, device, 0, (int)t->shape[0], 0.02f);
    } else if (t->flags & EMBED) {
      float unit = c->init_std / 32768.0f / 1.1547f;
      for (size_t v = 0; v < (size_t)c->vocab; v += step) {
        size_t n = (size_t)c->vocab - v < step ? (size_t)c->vocab - v : step;
        for (size_t k = 0; k < n * C; k++) {
          uint64_t u = rng_u64(seed, RNG_INIT, (uint64_t)i << 40 | (v * C + k));
          int sum = (int)(u & 65535) + (int)(u >> 16 & 65535) + (int)(u >> 32 & 65535) + (int)(u >> 48) - 2 * 65535;
          float x = (float)sum * unit;
          uint32_t bits;
          memcpy(&bits, &x, 4);
          bits &= 0xFFFF0000u;
          memcpy(&host_rows[k], &bits, 4);
        }
        dev_copy_in(rows, host_rows, n * C * sizeof(float));
        head_rows(t->offset == m->table.embed && !c->tie_embeddings && i == 0 ? &m->embed : &m->head, rows, (int)v, (int)n);
      }
    } else {
      for (size_t k = 0; k < t->n; k++) host_rows[k] = t->flags & NORM ? 1.0f : 0.0f;
      dev_copy_in(m->params + t->offset, host_rows, t->n * sizeof(float));
    }
  }
  free(host);
  dev_free(device);
  dev_free(rows);
}

// Feeds a prompt of n random tokens to one sequence; returns the most likely next token.
static int bi_prompt_(Session *s, int sequence, int n) {
  int tokens[BI_LONG], seq[BI_LONG], pos[BI_LONG], next;
  for (int i = 0; i < n; i++) {
    tokens[i] = (int)rng_below(9, RNG_TEST, (uint64_t)(sequence * 4096 + i), (uint64_t)s->m->c.vocab);
    seq[i] = sequence;
    pos[i] = i;
  }
  session_rows(s, tokens, seq, pos, n);
  session_best(s, n - 1, 1, s->m->c.vocab, &next);
  return next;
}

// What every token reads: packed matrices, and the screen of the classifier or, without one, the classifier.
static size_t bi_head_bytes_(const Model *m) {
  return m->head.screen ? head_screen_bytes(m->c.vocab, m->c.dim) : head_table_bytes(m->c.vocab, m->c.dim, m->head.half);
}

static size_t bi_bytes_(const Model *m) {
  return run_memory(&m->c, PRECISION_BF16, 1, 1, 1, KV_BLOCK, 1).weights + bi_head_bytes_(m);
}

static void bi_read_(const Model *m) {
  dev_read(m->weights_memory, run_memory(&m->c, PRECISION_BF16, 1, 1, 1, KV_BLOCK, 1).weights);
  dev_read(m->head.screen ? m->head.screen : m->head.table, bi_head_bytes_(m));
}

/*
Decodes BI_TOKENS tokens greedily for n sequences that have `at` tokens each, reading memory in between. check: every token is compared
with the argmax of all logits.
*/
static void bi_decode_(Session *s, int *next, int n, int at, int check) {
  const Model *m = s->m;
  int seq[BI_MOST], pos[BI_MOST], equal = 0, V = m->c.vocab;
  double token[BI_TOKENS], reading[BI_TOKENS];
  char shape[64];
  for (int k = 0; k < BI_TOKENS; k++) {
    for (int i = 0; i < n; i++) {
      seq[i] = i;
      pos[i] = at + k;
    }
    double t0 = time_now();
    session_rows(s, next, seq, pos, n);
    session_best(s, 0, n, V, next);
    token[k] = time_now() - t0;
    t0 = time_now();
    bi_read_(m);
    reading[k] = time_now() - t0;
    for (int i = 0; i < n && check; i++) {
      const float *logits = session_logits(s, i, 1);
      int best = 0;
      for (int v = 1; v < V; v++) best = logits[v] > logits[best] ? v : best;
      equal += best == next[i];
    }
  }
  double t = bench_median_(token, BI_TOKENS), r = bench_median_(reading, BI_TOKENS);
  snprintf(shape, sizeof shape, "2b4t B=%d at %d", n, at);
  bench_row_("decode", shape, n / t, "tokens/s");
  bench_row_("read", shape, (double)bi_bytes_(m) / r / 1e9, "GB/s");
  bench_row_("decode_of_limit", shape, 100 * r / t, "%");
  if (check) bench_row_("decode_equals_unscreened", shape, 100.0 * equal / (BI_TOKENS * n), "%");
}

// The most memory that this process has had, bytes.
static size_t bi_peak_(void) {
  size_t kib = 0;
  char line[256];
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f)) {
    if (sscanf(line, "VmHWM: %zu kB", &kib) == 1) break;
  }
  if (f) fclose(f);
  return kib * 1024;
}

// n sequences with prompts of BI_PROMPT tokens, then decoding; every token is checked where `check` is 1.
static void bi_decode_batch_(Model *m, int n, int check) {
  Session s;
  int next[BI_MOST];
  session_open(&s, m, n, BI_PROMPT + BI_TOKENS, BI_PROMPT, 1);
  for (int i = 0; i < n; i++) next[i] = bi_prompt_(&s, i, BI_PROMPT);
  bi_decode_(&s, next, n, BI_PROMPT, check);
  session_free(&s);
}

// Prompts and decoding of one sequence, and what memory that takes. need: the forecast.
static void bi_single_(Model *m, const RunMemory *need) {
  Session s;
  char shape[64];
  session_open(&s, m, 1, BI_LONG + BI_TOKENS, BI_LONG, 1);
  for (int prompt = BI_PROMPT; prompt <= BI_LONG; prompt += BI_LONG - BI_PROMPT) {
    double t[BI_RUNS];
    int next = bi_prompt_(&s, 0, prompt);
    for (int k = 0; k < BI_RUNS; k++) {
      double t0 = time_now();
      next = bi_prompt_(&s, 0, prompt);
      t[k] = time_now() - t0;
    }
    snprintf(shape, sizeof shape, "2b4t T=%d", prompt);
    bench_row_("prefill", shape, prompt / bench_median_(t, BI_RUNS), "tokens/s");
    bi_decode_(&s, &next, 1, prompt, prompt == BI_PROMPT);
  }
  size_t held = need->weights + need->tables + need->cache;
  bench_row_("weights_tables_cache", "2b4t", (double)held / 1e6, "MB");
  bench_row_("peak_memory", "2b4t", (double)bi_peak_() / 1e6, "MB");
  bench_row_("peak_of_held", "2b4t", 100.0 * (double)bi_peak_() / (double)held, "%");
  session_free(&s);
}

// batch: the number of sequences to decode, as text; empty: one and BI_BATCH, and prompts.
static void bench_decode_(const char *batch) {
  Config c;
  Model m;
  char *end;
  long n = strtol(batch, &end, 10);
  if (batch[0] && (*end || n < 1 || n > BI_MOST)) die(EXIT_USAGE, "bench decode/%s: expected 1 to %d sequences", batch, (int)BI_MOST);
  bench_config_(&c, 2560, 30, 20, 5, 6912, 128256, 4096);
  RunMemory need = run_memory(&c, PRECISION_BF16, 1, 1, 1, BI_LONG + BI_TOKENS, BI_LONG);
  if (batch[0]) need = run_memory(&c, PRECISION_BF16, 1, 1, (int)n, BI_PROMPT + BI_TOKENS, BI_PROMPT);
  if (dev_memory_free() != 0 && need.total > dev_memory_free())
    die(EXIT_FAILED, "the model needs %.1f MB, %.1f MB are free", (double)need.total / 1e6, (double)dev_memory_free() / 1e6);
  model_open_frozen(&m, &c, PRECISION_BF16, 1, 1);
  bi_fill_(&m, 1);
  bench_row_("packed_weights", "2b4t", (double)need.weights / 1e6, "MB");
  bench_row_("tables", "2b4t", (double)need.tables / 1e6, "MB");
  if (batch[0]) {
    bi_decode_batch_(&m, (int)n, 0);
  } else {
    bi_single_(&m, &need);
    bi_decode_batch_(&m, BI_BATCH, 1);
  }
  model_free(&m);
}

#endif
