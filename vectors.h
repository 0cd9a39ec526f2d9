/*
vectors.h: the integer vectors of every machine under one set of names, for the products of ternary weights.

What it is:  loads, masks and byte dot products in the widest integer registers that the program is compiled for: AVX-512 with or
             without VNNI, AVX-VNNI, AVX2, NEON with or without its dot product. matmul.h and packed.h write their kernels once, in these
             names, and beneath each kernel stands a twin in plain C: for machines without such registers, and for the tests.
What not:    floats (vectors of the compiler are enough for those), and what one machine alone can do: AMX and bf16 in matmul.h.
Read before: nothing.
Defines:     IVEC, ivec, ifour, ivec_zero, ivec_load, ivec_store, ivec_and, ivec_top, TOP_BITS, ivec_four, ivec_dot, ivec_add, ivec_down, ivec_up;
             ivec_ternary, ivec_ternary_sum, TERNARY_STEPS, TILE_VECTORS. Without vectors IVEC is not defined.

    ivec_four(p)             the four bytes at p, repeated, as an ifour: in the form in which ivec_dot and ivec_ternary want s
    ivec_dot(acc, u, s)      acc[i] += sum of u[4i+j] * s[4i+j], j < 4: u unsigned, at most 127 except where TOP_BITS is 6; s signed
    ivec_top(v)              the two highest bits of each byte, times 2^TOP_BITS
    ivec_ternary(acc, u, s)  the same product for u of 0, 1 and 2, into sums of the machine's choice; at most TERNARY_STEPS times, then
    ivec_ternary_sum(t, acc) t[i] += what acc has collected for lane i

Exactness. The byte product of AVX2 adds two products in 16 bits, saturating, and its first operand is unsigned. Two products of a
byte up to 127 and one of -128 .. 127 are at most 2 * 127 * 128 = 32,512 < 2^15: nothing saturates. With u <= 2 they are at most 512, so
63 of them still fit 16 bits, and the widening to 32 bits is needed only every 63 steps. There is no product of two int8 numbers anywhere:
one factor is always a weight, also where gradients were rounded to int8 (gemm_i8_rounded), and weights are stored as code + 1.
*/
#ifndef BITNET_VECTORS_H
#define BITNET_VECTORS_H

#include "bitnet/utils.h"

// BITNET_SCALAR compiles the plain kernels only; BITNET_FLOAT64 is the build for finite differences.
#if !defined(BITNET_SCALAR) && !defined(BITNET_FLOAT64)
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
#define IVEC 64
#elif defined(__AVX2__)
#define IVEC 32
#elif defined(__aarch64__)
#define IVEC 16
#endif

// Products of x86 into 32 bits at once, where there is an instruction for it.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define IVEC_DPBUSD _mm512_dpbusd_epi32
#elif !defined(__AVX512BW__) && defined(__AVXVNNI__)
#define IVEC_DPBUSD _mm256_dpbusd_avx_epi32
#endif
#endif

#if IVEC == 64
typedef __m512i ivec, ifour;
static inline ivec ivec_zero(void) { return _mm512_setzero_si512(); }
static inline ivec ivec_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void ivec_store(void *p, ivec v) { _mm512_storeu_si512(p, v); }
static inline ivec ivec_and(ivec v, int byte) { return _mm512_and_si512(v, _mm512_set1_epi8((char)byte)); }
static inline ifour ivec_four(const int8_t *p) { int32_t w; memcpy(&w, p, 4); return _mm512_set1_epi32(w); }
static inline ivec ivec_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
#define ivec_down(v, bits) _mm512_srai_epi32(v, bits)
#define ivec_up(v, bits) _mm512_slli_epi32(v, bits)
#define ivec_down16_ _mm512_srli_epi16
#define ivec_pairs_ _mm512_maddubs_epi16
#define ivec_add16_ _mm512_add_epi16
#define ivec_widen_(v) _mm512_madd_epi16(v, _mm512_set1_epi16(1))
#elif IVEC == 32
typedef __m256i ivec, ifour;
static inline ivec ivec_zero(void) { return _mm256_setzero_si256(); }
static inline ivec ivec_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void ivec_store(void *p, ivec v) { _mm256_storeu_si256((__m256i *)p, v); }
static inline ivec ivec_and(ivec v, int byte) { return _mm256_and_si256(v, _mm256_set1_epi8((char)byte)); }
static inline ifour ivec_four(const int8_t *p) { int32_t w; memcpy(&w, p, 4); return _mm256_set1_epi32(w); }
static inline ivec ivec_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
#define ivec_down(v, bits) _mm256_srai_epi32(v, bits)
#define ivec_up(v, bits) _mm256_slli_epi32(v, bits)
#define ivec_down16_ _mm256_srli_epi16
#define ivec_pairs_ _mm256_maddubs_epi16
#define ivec_add16_ _mm256_add_epi16
#define ivec_widen_(v) _mm256_madd_epi16(v, _mm256_set1_epi16(1))
#elif IVEC == 16
typedef int32x4_t ivec;   // typed as the sums: gcc copies sums that it must see as bytes between two products
static inline uint8x16_t ivec_bytes_(ivec v) { return vreinterpretq_u8_s32(v); }
static inline ivec ivec_zero(void) { return vdupq_n_s32(0); }
static inline ivec ivec_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p)); }
static inline void ivec_store(void *p, ivec v) { vst1q_u8((uint8_t *)p, ivec_bytes_(v)); }
static inline ivec ivec_and(ivec v, int byte) { return vreinterpretq_s32_u8(vandq_u8(ivec_bytes_(v), vdupq_n_u8((uint8_t)byte))); }
static inline ivec ivec_top(ivec v) { return vreinterpretq_s32_u8(vshrq_n_u8(ivec_bytes_(v), 6)); }
static inline ivec ivec_add(ivec a, ivec b) { return vaddq_s32(a, b); }
#define ivec_down(v, bits) ((bits) ? vshrq_n_s32(v, (bits) ? (bits) : 1) : (v))
#define ivec_up(v, bits) vshlq_n_s32(v, bits)
#ifdef __ARM_FEATURE_DOTPROD   // the instruction repeats the four bytes itself
typedef int8x8_t ifour;
static inline ifour ivec_four(const int8_t *p) { uint32_t w; memcpy(&w, p, 4); return vcreate_s8(w); }
static inline ivec ivec_dot(ivec acc, ivec u, ifour s) { return vdotq_lane_s32(acc, vreinterpretq_s8_s32(u), s, 0); }
#else                          // sums of two products in 16 bits, which they fit, then of two such sums in 32
typedef int8x16_t ifour;
static inline ifour ivec_four(const int8_t *p) { int32_t w; memcpy(&w, p, 4); return vreinterpretq_s8_s32(vdupq_n_s32(w)); }
static inline ivec ivec_dot(ivec acc, ivec u, ifour s) {
  int8x16_t a = vreinterpretq_s8_s32(u);
  return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(s)), vmull_high_s8(a, s)));
}
#endif
#endif

#if defined(IVEC_DPBUSD)
static inline ivec ivec_dot(ivec acc, ivec u, ifour s) { return IVEC_DPBUSD(acc, u, s); }
static inline ivec ivec_top(ivec v) { return ivec_and(v, 0xC0); }
enum { TOP_BITS = 6 };
#elif defined(ivec_pairs_)
static inline ivec ivec_dot(ivec acc, ivec u, ifour s) { return ivec_add(acc, ivec_widen_(ivec_pairs_(u, s))); }
static inline ivec ivec_top(ivec v) { return ivec_and(ivec_down16_(v, 6), 3); }
#endif
#if defined(IVEC) && !defined(IVEC_DPBUSD)
enum { TOP_BITS = 0 };
#endif

// TILE_VECTORS: how many vectors of weights meet six rows of activations in registers.
#if defined(ivec_pairs_) && !defined(IVEC_DPBUSD)
enum { TERNARY_STEPS = 63, TILE_VECTORS = IVEC / 16 };
static inline ivec ivec_ternary(ivec acc, ivec u, ifour s) { return ivec_add16_(acc, ivec_pairs_(u, s)); }
static inline ivec ivec_ternary_sum(ivec t, ivec acc) { return ivec_add(t, ivec_widen_(acc)); }
#elif defined(IVEC)
enum { TERNARY_STEPS = 1 << 30, TILE_VECTORS = IVEC == 64 ? 4 : 2 };
static inline ivec ivec_ternary(ivec acc, ivec u, ifour s) { return ivec_dot(acc, u, s); }
static inline ivec ivec_ternary_sum(ivec t, ivec acc) { return ivec_add(t, acc); }
#endif

#endif
