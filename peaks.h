/*
peaks.h: what the machine can do, measured: the numbers that `bench` compares products and decoding with.

What it is:  the innermost instruction of each kernel of matmul.h and matmul_i8.h in a loop that touches no memory, a loop that does
             nothing but read memory, and dev_peak and dev_peaks of bitnet/ops.h, which time them on all threads.
What not:    no product; those are matmul.h's and matmul_i8.h's.
Read before: matmul_i8.h.
Defines:     dev_peak, dev_peaks.
*/
#ifndef BITNET_PEAKS_H
#define BITNET_PEAKS_H

#include "matmul_i8.h"

/*
What the machine can do: the innermost instruction of each kernel in a loop that touches no memory. Each returns the operations of one
call of `steps` steps; the caller times it on all threads at once. *sink keeps the compiler from dropping the work, PEAK_KEEP from seeing
that all of it is the same.
*/
#ifdef __aarch64__
#define PEAK_KEEP(vector) __asm__ volatile("" : "+w"(vector))
#else
#define PEAK_KEEP(vector) __asm__ volatile("" : "+v"(vector))
#endif

static double peak_loop_f32(size_t steps, float *sink) {
  vfloat acc[MR][2], x = {0}, y = {0};
  x += *sink;
  y += *sink + 0.5f;
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = x + (float)i;
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      acc[i][0] = acc[i][0] * y + x;
      acc[i][1] = acc[i][1] * x + y;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) *sink += (acc[i][0] + acc[i][1])[0];
  return 2.0 * (double)steps * MR * 2 * VL;
}

static double peak_loop_bf16(size_t steps, float *sink) {
#ifdef BITNET_AMX
  if (amx_ready()) {
    _tile_zero(4);
    _tile_zero(5);
    for (size_t s = 0; s < steps; s++) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
    (void)sink;
    return 2.0 * (double)steps * 4 * 16 * 16 * 32;
  }
#endif
#ifdef BITNET_BFMMLA
  float32x4_t acc[16];
  bfloat16x8_t x = vreinterpretq_bf16_f32(vdupq_n_f32(*sink));
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    float32x4_t zero = vdupq_n_f32(0);
    PEAK_KEEP(zero);
    acc[i] = zero;
  }
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      acc[i] = vbfmmlaq_f32(acc[i], x, x);
      PEAK_KEEP(x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) *sink += vaddvq_f32(acc[i]);
  return 2.0 * (double)steps * 16 * 16;
#elif defined(BITNET_BF16)
  __m512 acc[16];
  __m512i x = _mm512_set1_epi32((int)*sink);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    __m512 zero = _mm512_setzero_ps();
    PEAK_KEEP(zero);
    acc[i] = zero;
  }
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)x, (__m512bh)x);
      PEAK_KEEP(x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) *sink += _mm512_reduce_add_ps(acc[i]);
  return 2.0 * (double)steps * 16 * 32;
#else
  return peak_loop_f32(steps, sink);
#endif
}

static double peak_loop_i8(size_t steps, float *sink) {
#ifdef BITNET_AMX
  if (amx_ready()) {
    _tile_zero(4);
    _tile_zero(5);
    for (size_t s = 0; s < steps; s++) {
      _tile_dpbsud(0, 4, 5);
      _tile_dpbsud(1, 4, 5);
      _tile_dpbsud(2, 4, 5);
      _tile_dpbsud(3, 4, 5);
    }
    (void)sink;
    return 2.0 * (double)steps * 4 * 16 * 16 * 64;
  }
#endif
#ifdef IVEC
  enum { SUMS = TERNARY_STEPS < 64 ? 8 : 12 };   // enough to hide the latency of one sum
  int8_t seed[IVEC];
  memset(seed, (int)*sink, sizeof seed);
  ivec acc[SUMS], x = ivec_load(seed);
  ifour y = ivec_four(seed);
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) {
    ivec zero = ivec_zero();
    PEAK_KEEP(zero);
    acc[i] = zero;
  }
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
      acc[i] = ivec_ternary(acc[i], x, y);
      PEAK_KEEP(x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) {
    int32_t lanes[IVEC / 4];
    ivec_store(lanes, acc[i]);
    *sink += (float)lanes[0];
  }
  return 2.0 * (double)steps * SUMS * IVEC;
#else
  return peak_loop_f32(steps, sink);
#endif
}

double dev_peak(int format) {
  double (*const loops[])(size_t, float *) = {peak_loop_f32, peak_loop_bf16, peak_loop_i8};
  double operations = 0, t0 = time_now();
#pragma omp parallel reduction(+ : operations)
  {
    float sink = 0;
    if (amx_ready()) amx_begin();
    operations += loops[format](1 << 18, &sink);
    if (amx_ready()) amx_end();
    if (sink != 0) operations += 1;   // never; but the compiler does not know
  }
  return operations / (time_now() - t0);
}

static double best_peak(int format) {
  double best = 0;
  for (int run = 0; run < 10; run++) best = fmax(best, dev_peak(format));
  return best;
}

void dev_peaks(Peaks *p) {
  size_t bytes = (size_t)256 << 20;   // larger than the caches of most machines
  float *x = (float *)dev_malloc(bytes);
  p->fp32 = best_peak(PEAK_FP32);
  p->bf16 = best_peak(PEAK_BF16);
  p->int8 = best_peak(PEAK_INT8);
  p->read = 0;
  for (int run = 0; run < 5 && x; run++) {
    double t0 = time_now(), sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size_t k = 0; k < bytes / 4096; k++) {
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (size_t i = 0; i < 1024; i++) part += x[k * 1024 + i];
      sum += (double)part;
    }
    double rate = (double)bytes / (time_now() - t0);
    if (sum == 0 && rate > p->read) p->read = rate;   // the memory is zeroed, so the sum is 0
  }
  dev_free(x);
}

#endif
