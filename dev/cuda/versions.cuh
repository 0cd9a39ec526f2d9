/*
versions.cuh: the frame of the numbered kernels in this folder.

What it is:  each file here takes one operation and writes it several times, from the obvious way to the one that the program uses; the
             last version is always the program's own op, so what is timed is what runs. Every version is checked against plain loops
             on the CPU. `make benchcu` builds and runs all files on a GPU and prints time and share of the machine's peak;
             dev/cuda_emu.h compiles and checks them without one (small sizes, no times).
What not:    no tests of edges and odd shapes: dev/test/test_cuda.cu.
Read before: bitnet/ops.h, memory.cuh, and the kernel of the same name in train_bitnet.cu or products.cuh.
Defines:     normals; bench_start, bench_version, bench_end.
*/
#define TESTING
#include "../../train_bitnet.cu"

#include <functional>

#include "memory.cuh"

#ifdef CUDA_EMU_H
static const bool EMULATED = true;
#else
static const bool EMULATED = false;
#endif

// n normal numbers.
UNUSED static Floats normals(size_t n, uint64_t stream) {
  Floats v(n);
  for (size_t i = 0; i < n; i++) v[i] = (float)rng_normal(stream, RNG_TEST, i);
  return v;
}

// What the activation type keeps of a float.
static float as_activation(float x) {
  floatX y;
  from_float(&y, x);
  return to_float(y);
}

// ---------------------------------------------------------------------------------------------------------

enum { LIMIT_READ, LIMIT_BF16 };   // which peak a kernel is measured against

static Peaks peaks_;
static int failures_;

static void bench_start(const char *title) {
  dev_init(0);
  if (!EMULATED) dev_peaks(&peaks_);
  printf("%s\n%s\n", title, dev_name());
}

/*
Runs a version, checks it (error returns how far it is off, bound how far it may be), times it and prints one row. work: the bytes
that it has to read and write at least, or its operations, by which limit counts. The time is the best of several runs of ten.
*/
static void bench_version(const char *name, double work, int limit, double bound, const std::function<void()> &run,
                          const std::function<double()> &error) {
  run();
  CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
  double off = error();
  bool ok = off <= bound;   // false for NaN
  failures_ += !ok;
  if (EMULATED) {
    printf("%s  %-36s off by %.3g, bound %.3g\n", ok ? "ok  " : "FAIL", name, off, bound);
    return;
  }
  double best = INFINITY, peak = limit == LIMIT_READ ? peaks_.read : peaks_.bf16;
  for (int k = 0; k < 7; k++) {
    double t0 = time_now();
    for (int i = 0; i < 10; i++) run();
    CUDA_CHECK(cudaStreamSynchronize(gpu_.stream));
    best = fmin(best, (time_now() - t0) / 10);
  }
  printf("%s  %-36s %10.1f us  %5.1f %% of peak %s  off by %.3g, bound %.3g\n", ok ? "ok  " : "FAIL", name, best * 1e6,
         100 * work / best / peak, limit == LIMIT_READ ? "read" : "bf16", off, bound);
}

// The exit code.
static int bench_end(void) {
  if (failures_) printf("%d versions are wrong\n", failures_);
  return failures_ != 0;
}
