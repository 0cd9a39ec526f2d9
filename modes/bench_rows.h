/*
bench_rows.h: what the parts of `bench` share: a row of output, and medians.

Read before: bench.h.
Defines:     bench_row_, bench_median_.
*/
#ifndef MODE_BENCH_ROWS_H
#define MODE_BENCH_ROWS_H

#include "../bitnet/utils.h"

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

#endif
