/*
bench_rows.h: what the parts of `bench` share: a row of output, medians, a model's shape.

Read before: bench.h.
Defines:     bench_row_, bench_median_, bench_config_.
*/
#ifndef MODE_BENCH_ROWS_H
#define MODE_BENCH_ROWS_H

#include "../bitnet/model.h"

static void bench_row_(const char *name, const char *shape, double value, const char *unit) {
  printf("%-28s %-26s %12.4g %s\n", name, shape, value, unit);
  fflush(stdout);
}

static int by_value_(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

// The median of n times (sorts them).
static double bench_median_(double *times, int n) {
  qsort(times, (size_t)n, sizeof(double), by_value_);
  return n % 2 ? times[n / 2] : 0.5 * (times[n / 2 - 1] + times[n / 2]);
}

// BitNet b1.58 in these sizes.
static void bench_config_(Config *c, int dim, int layers, int heads, int kv_heads, int ffn, int vocab, int max_seq) {
  memset(c, 0, sizeof *c);
  c->dim = dim, c->layers = layers, c->heads = heads, c->kv_heads = kv_heads, c->head_dim = dim / heads;
  c->ffn_dim = ffn, c->vocab = vocab, c->max_seq = max_seq;
  c->norm_eps = 1e-5f;
  c->rope_theta = 500000;
  c->activation = ACT_RELU2;
  c->attn_sub_norm = c->ffn_sub_norm = c->tie_embeddings = 1;
  c->act_bits = 8;
  c->init_std = 0.02f;
}

#endif
