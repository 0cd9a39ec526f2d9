/*
packed.h: the products of inference, where reading the weights from memory is most of the work.

What it is:  ternary weights packed into 2 bits or less, multiplied without being unpacked into memory where there are few rows of
             activations (decoding), and unpacked a few panels at a time for the kernels of matmul.h where there are many (a prompt);
             the classifier for few rows; and its screen, a 6-bit copy that finds the largest logit while nearly all of the exact
             table stays unread.
What not:    nothing of training, and no choice of what is packed; train_bitnet.c decides that.
Read before: bitnet/ops.h, vectors.h, matmul_i8.h.
Defines:     packed_bytes, packed_set_rows, packed_get_row, packed_i8, packed_scratch_bytes; gemm_few, gemm_few_scratch_bytes;
             Screen, screen_bytes, screen_at, screen_set_row, screen_argmax, screen_scratch_bytes.

Decoding one token multiplies every weight once, so the machine waits for its memory: 2 bits a weight instead of 8 is four times the
speed, provided that unpacking keeps up. Two tricks make it cheap. Codes are stored plus one, so that they are unsigned, as the byte
dot product wants one of its operands; and the codes of a byte are masked but not shifted down: (v & 0x0C) is four times a code, and
the sum over each position is divided by 1, 4, 16 or 64 at the end, exactly.
*/
#ifndef BITNET_PACKED_H
#define BITNET_PACKED_H

#include "matmul_i8.h"

// ---------------------------------------------------------------------------------------------------------
/*
The layout of packed weights. As in matmul_i8.h a panel is 16 outputs wide, and the 64 bytes of a vector belong to 16 outputs x 4
neighbouring k. A panel is a row of units; a unit holds UNIT_K values of k:

    2 bits     1 vector of 64 bytes: four codes a byte, for k, k+4, k+8, k+12 from the lowest bits up                16 k
    1.67 bits  5 vectors: an index of 5 bits stands for three codes, since 3^3 = 27 <= 32, and is looked up in a
               table; 8 indices of 5 bits share 5 bytes                                                              96 k

Looking 64 indices up at once takes an instruction of its own (VBMI); machines that have it use the second form, which is 1/6 less to
read. After the look-up both forms are the same: bytes with FIELDS codes.
*/
#if defined(BITNET_VNNI) && defined(__AVX512VBMI__)
#define BITNET_THIRDS 1
enum { UNIT_VECTORS = 5, UNIT_INDICES = 8, FIELDS = 3 };
#else
enum { UNIT_VECTORS = 1, UNIT_INDICES = 1, FIELDS = 4 };
#endif
enum { UNIT_BYTES = 64 * UNIT_VECTORS, UNIT_K = 4 * UNIT_INDICES * FIELDS };

static size_t packed_units(size_t K) {
  return (K + UNIT_K - 1) / UNIT_K;
}

static size_t packed_bytes(size_t N, size_t K) {
  return (N + I8_WIDTH - 1) / I8_WIDTH * packed_units(K) * UNIT_BYTES;
}

/*
One byte of each vector of a unit: fields (=) [UNIT_INDICES] bytes of FIELDS codes (0, 1, 2), two bits each. Of the eight
indices 0..4 are the low five bits of bytes 0..4; the fifteen bits above hold the other three:
        byte 0       byte 1       byte 2       byte 3                        byte 4
        5: bits 0-2  6: bits 0-2  7: bits 0-2  5: bits 3-4, then 7: bit 3    6: bits 3-4, then 7: bit 4
*/
static void unit_get(uint8_t *fields, const uint8_t *unit) {
#ifdef BITNET_THIRDS
  unsigned b[5], index[8];
  for (int i = 0; i < 5; i++) {
    b[i] = unit[64 * i];
    index[i] = b[i] & 31;
  }
  index[5] = b[0] >> 5 | (b[3] >> 5 & 3) << 3;
  index[6] = b[1] >> 5 | (b[4] >> 5 & 3) << 3;
  index[7] = b[2] >> 5 | b[3] >> 7 << 3 | b[4] >> 7 << 4;
  for (int i = 0; i < 8; i++) fields[i] = (uint8_t)(index[i] % 3 | index[i] / 3 % 3 << 2 | index[i] / 9 % 3 << 4);
#else
  fields[0] = unit[0];
#endif
}

#ifdef BITNET_THIRDS
// Every byte of x shifted down by n; what comes in from the byte above is cut off.
UNUSED static uint32_t bytes_down(uint32_t x, int n) {
  return x >> n & (0xffu >> n) * 0x01010101u;
}
#endif

/*
What some rows of a panel have in one unit: four neighbouring bytes of each vector for every row, from its codes [UNIT_K], which lie
`apart` bytes behind those of the row before. Four codes are worked on at once, as the bytes of a word: no byte ever exceeds 255, so
none reaches into the next. With rows known to the compiler, the loops over rows become vectors.
*/
static inline __attribute__((always_inline)) void unit_set(uint8_t *unit, const int8_t *codes, size_t apart, const int rows) {
  uint32_t bytes[UNIT_INDICES][I8_WIDTH], c[FIELDS][I8_WIDTH];
  for (int i = 0; i < UNIT_INDICES; i++) {
    for (int f = 0; f < FIELDS; f++) {
      for (int n = 0; n < rows; n++) memcpy(&c[f][n], codes + (size_t)n * apart + 4 * (i * FIELDS + f), 4);
    }
    for (int n = 0; n < rows; n++) bytes[i][n] = 0;
    for (int f = FIELDS - 1; f >= 0; f--) {
      for (int n = 0; n < rows; n++) {
        uint32_t four = ((c[f][n] & 0x03030303u) + 0x01010101u) & 0x03030303u;   // -1, 0, 1 to 0, 1, 2
#ifdef BITNET_THIRDS
        bytes[i][n] = 3 * bytes[i][n] + four;
#else
        bytes[i][n] = bytes[i][n] << 2 | four;
#endif
      }
    }
  }
#ifdef BITNET_THIRDS
  const uint32_t three = 0x07070707u, one = 0x01010101u;
  for (int n = 0; n < rows; n++) {
    uint32_t x5 = bytes[5][n], x6 = bytes[6][n], x7 = bytes[7][n];
    bytes[0][n] |= (x5 & three) << 5;
    bytes[1][n] |= (x6 & three) << 5;
    bytes[2][n] |= (x7 & three) << 5;
    bytes[3][n] |= (bytes_down(x5, 3) | (bytes_down(x7, 3) & one) << 2) << 5;
    bytes[4][n] |= (bytes_down(x6, 3) | bytes_down(x7, 4) << 2) << 5;
  }
#endif
  for (int i = 0; i < UNIT_VECTORS; i++) memcpy(unit + 64 * i, bytes[i], (size_t)rows * 4);
}

// Rows n .. n+rows-1 of packed (=), all of one panel, from their codes [rows,K] in {-1,0,1}. Rows share no bytes.
static void packed_set_rows(uint8_t *packed, size_t n, size_t rows, const int8_t *codes, size_t K) {
  size_t units = packed_units(K);
  uint8_t *out = packed + n / I8_WIDTH * units * UNIT_BYTES + n % I8_WIDTH * 4;
  int8_t last[I8_WIDTH * UNIT_K];
  for (size_t k = 0; k < K; k += UNIT_K, out += UNIT_BYTES) {
    const int8_t *from = codes + k;
    size_t apart = K;
    if (K - k < UNIT_K) {   // behind the end: whatever, it meets activations of 0
      memset(last, -1, sizeof last);
      for (size_t r = 0; r < rows; r++) memcpy(last + r * UNIT_K, from + r * K, K - k);
      from = last;
      apart = UNIT_K;
    }
    if (rows == I8_WIDTH) unit_set(out, from, apart, I8_WIDTH);
    else for (size_t r = 0; r < rows; r++) unit_set(out + 4 * r, from + r * apart, apart, 1);
  }
}

// codes (=) [K] of row n.
static void packed_get_row(int8_t *codes, const uint8_t *packed, size_t n, size_t K) {
  size_t units = packed_units(K);
  const uint8_t *in = packed + n / I8_WIDTH * units * UNIT_BYTES + n % I8_WIDTH * 4;
  for (size_t u = 0; u < units; u++, in += UNIT_BYTES) {
    for (size_t j = 0; j < 4; j++) {
      uint8_t fields[UNIT_INDICES];
      unit_get(fields, in + j);
      for (size_t i = 0; i < UNIT_INDICES * FIELDS; i++) {
        size_t k = u * UNIT_K + 4 * i + j;
        if (k < K) codes[k] = (int8_t)((fields[i / FIELDS] >> (2 * (i % FIELDS)) & 3) - 1);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Few rows of activations: the kernel of decoding.

enum {
  FEW_ROWS = 4,                  // rows that meet a packed panel together
  AHEAD = 2048,                  // bytes that are asked for ahead of the load: the memory's latency times its speed
  SUM_UNITS = (1 << 18) / UNIT_K // units after which the sums of the fields, up to 64 times a sum of codes, are folded: no overflow
};

#ifdef IVEC
// The bytes with codes of part p (IVEC of the 64 bytes) of a unit: v (=) [UNIT_INDICES].
static inline __attribute__((always_inline)) void unit_fields(ivec *v, const uint8_t *unit, size_t p) {
#ifdef BITNET_THIRDS
  static const uint8_t table[64] __attribute__((aligned(64))) = {
#define T_(i) (i) % 3 | (i) / 3 % 3 << 2 | (i) / 9 % 3 << 4
#define T8_(i) T_(i), T_(i + 1), T_(i + 2), T_(i + 3), T_(i + 4), T_(i + 5), T_(i + 6), T_(i + 7)
      // twice: the look-up takes six bits, the sixth is not ours
      T8_(0), T8_(8), T8_(16), T8_(24), T8_(0), T8_(8), T8_(16), T8_(24)};
#undef T8_
#undef T_
  const __m512i low3 = _mm512_set1_epi8(7), bit3 = _mm512_set1_epi8(8), codes = _mm512_load_si512(table);
  enum { CHOOSE = 0xCA };   // ternary logic: first ? second : third, bit by bit
  (void)p;
  for (int i = 0; i < 5; i++) v[i] = _mm512_loadu_si512(unit + 64 * i);
  // Shifts of 16-bit words: what they bring in from the neighbouring byte is masked away or not looked at.
  v[5] = _mm512_ternarylogic_epi64(low3, _mm512_srli_epi16(v[0], 5), _mm512_srli_epi16(v[3], 2), CHOOSE);
  v[6] = _mm512_ternarylogic_epi64(low3, _mm512_srli_epi16(v[1], 5), _mm512_srli_epi16(v[4], 2), CHOOSE);
  v[7] = _mm512_ternarylogic_epi64(bit3, _mm512_srli_epi16(v[3], 4), _mm512_srli_epi16(v[4], 3), CHOOSE);
  v[7] = _mm512_ternarylogic_epi64(low3, _mm512_srli_epi16(v[2], 5), v[7], CHOOSE);
  for (int i = 0; i < UNIT_INDICES; i++) v[i] = _mm512_permutexvar_epi8(v[i], codes);
#else
  v[0] = ivec_load(unit + p * IVEC);
#endif
}

// One field of such bytes, times 4^f; the fourth times 2^TOP_BITS.
static inline __attribute__((always_inline)) ivec field_of(ivec v, int f) {
  return f == 3 ? ivec_top(v) : ivec_and(v, 3 << (2 * f));
}
#endif

/*
sums (=) [panels][rows][16]: the raw sums of (code + 1) * q of one or two panels, `apart` bytes from each other, against `rows` rows of
activations, `stride` apart and padded with zeros to whole units. Two streams through memory are read faster than one, if they are not
too close together. The plain twin is all there is on machines without byte dot products.
*/
UNUSED static void packed_rows_scalar(int32_t *sums, const int8_t *q, size_t stride, const uint8_t *panel, size_t apart, size_t units,
                                      int rows, int panels) {
  memset(sums, 0, (size_t)(panels * rows) * I8_WIDTH * sizeof *sums);
  for (size_t at = 0; at < (size_t)panels * units * 64; at++) {
    size_t p = at / (units * 64), u = at / 64 % units, byte = at % 64;
    uint8_t fields[UNIT_INDICES];
    unit_get(fields, panel + p * apart + u * UNIT_BYTES + byte);
    for (size_t i = 0; i < UNIT_INDICES * FIELDS; i++) {
      int code = fields[i / FIELDS] >> (2 * (i % FIELDS)) & 3;
      for (size_t r = 0; r < (size_t)rows; r++) {
        sums[(p * (size_t)rows + r) * I8_WIDTH + byte / 4] += code * q[r * stride + u * UNIT_K + 4 * i + byte % 4];
      }
    }
  }
}

#ifdef IVEC
static inline __attribute__((always_inline)) void packed_rows_fixed(int32_t *sums, const int8_t *q, size_t stride,
                                                                    const uint8_t *panel, size_t apart, size_t units, const int rows,
                                                                    const int panels) {
  for (size_t part = 0; part < 64 / IVEC; part++) {
    for (size_t first = 0; first < units; first += SUM_UNITS) {
      size_t end = units - first < SUM_UNITS ? units : first + SUM_UNITS;
      ivec acc[2][FEW_ROWS][FIELDS];
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
          for (int f = 0; f < FIELDS; f++) acc[p][r][f] = ivec_zero();
        }
      }
      for (size_t u = first; u < end; u++) {
        const int8_t *x = q + u * UNIT_K;
        ivec v[2][UNIT_INDICES];
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
          const uint8_t *unit = panel + (size_t)p * apart + u * UNIT_BYTES;
#pragma GCC unroll 5
          for (int i = 0; i < UNIT_VECTORS; i++) __builtin_prefetch(unit + AHEAD + 64 * i);
          unit_fields(v[p], unit, part);
        }
#pragma GCC unroll 8
        for (int i = 0; i < UNIT_INDICES; i++) {
#pragma GCC unroll 4
          for (int f = 0; f < FIELDS; f++) {
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
              ifour four = ivec_four(x + (size_t)r * stride + 4 * (i * FIELDS + f));
#pragma GCC unroll 2
              for (int p = 0; p < panels; p++) acc[p][r][f] = ivec_dot(acc[p][r][f], field_of(v[p][i], f), four);
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          int32_t *out = sums + (p * rows + r) * I8_WIDTH + part * (IVEC / 4);
          ivec sum = first > 0 ? ivec_load(out) : ivec_zero();
          sum = ivec_add(sum, ivec_add(acc[p][r][0], ivec_add(ivec_down(acc[p][r][1], 2), ivec_down(acc[p][r][2], 4))));
          if (FIELDS == 4) sum = ivec_add(sum, ivec_down(acc[p][r][FIELDS - 1], TOP_BITS));
          ivec_store(out, sum);
        }
      }
    }
  }
}

// Each number of rows and panels is a kernel of its own; more than two rows fill the registers with one panel.
static void packed_rows(int32_t *sums, const int8_t *q, size_t stride, const uint8_t *panel, size_t apart, size_t units, int rows,
                        int panels) {
  switch (rows * 2 + panels) {
    case 3: packed_rows_fixed(sums, q, stride, panel, apart, units, 1, 1); break;
    case 4: packed_rows_fixed(sums, q, stride, panel, apart, units, 1, 2); break;
    case 5: packed_rows_fixed(sums, q, stride, panel, apart, units, 2, 1); break;
    case 6: packed_rows_fixed(sums, q, stride, panel, apart, units, 2, 2); break;
    case 7: packed_rows_fixed(sums, q, stride, panel, apart, units, 3, 1); break;
    case 8: packed_rows_fixed(sums, q, stride, panel, apart, units, 3, 2); break;
    case 9: packed_rows_fixed(sums, q, stride, panel, apart, units, 4, 1); break;
    default: packed_rows_fixed(sums, q, stride, panel, apart, units, 4, 2); break;
  }
}
#else
#define packed_rows packed_rows_scalar
#endif

// ---------------------------------------------------------------------------------------------------------
// Many rows: a few panels are unpacked into the layout of ternary_pack_panels and then multiplied as in training.

enum { UNPACKED = 4 };   // panels that a thread has unpacked at a time

// panels (=) `count` neighbouring panels as bytes code + 1. What lies beyond K is arbitrary: it meets zeros. The last panel may need
// the room of a unit more than it has.
static void packed_unpack(uint8_t *panels, const uint8_t *packed, size_t count, size_t K) {
  size_t units = packed_units(K);
  for (size_t panel = 0; panel < count; panel++) {
    uint8_t *out = panels + panel * ternary_groups(K) * I8_WIDTH * 4;
    const uint8_t *in = packed + panel * units * UNIT_BYTES;
    for (size_t u = 0; u < units; u++, in += UNIT_BYTES) {
      uint8_t fields[UNIT_INDICES][64] __attribute__((aligned(64)));
#ifdef IVEC
      for (size_t p = 0; p < 64 / IVEC; p++) {
        ivec v[UNIT_INDICES];
        unit_fields(v, in, p);
#pragma GCC unroll 8
        for (int i = 0; i < UNIT_INDICES; i++) ivec_store(fields[i] + p * IVEC, v[i]);
      }
#else
      memcpy(fields, in, sizeof fields);
#endif
      for (int i = 0; i < UNIT_INDICES; i++) {
        for (int f = 0; f < FIELDS; f++, out += 64) {
          for (int byte = 0; byte < 64; byte++) out[byte] = fields[i][byte] >> (2 * f) & 3;
        }
      }
    }
  }
}

// Rows that are multiplied with a panel while both stay in the L2 cache.
static size_t packed_block_rows(size_t K) {
  size_t rows = ((size_t)1 << 20) / K / 32 * 32;
  return rows < 32 ? 32 : rows;
}

// Bytes of scratch of packed_i8: padded activations, or excess sums and unpacked panels for each thread.
static size_t packed_scratch_bytes(size_t max_rows, size_t K) {
  size_t few = FEW_ROWS * packed_units(K) * UNIT_K + 64;
  size_t panels = (UNPACKED * ternary_groups(K) * I8_WIDTH * 4 + 2 * UNIT_K * I8_WIDTH + 63) / 64 * 64;
  size_t many = (max_rows * sizeof(int32_t) + 63) / 64 * 64 + (size_t)thread_count() * panels;
  return few > many ? few : many;
}

/*
What gemm_i8 computes, from packed weights: out (=) [M,N], the same bits. exact: NULL, or the int32 sums [M,N] for tests.
Threads share the outputs out, each reads its own part of the weights once.
*/
static void packed_i8(float *out, int32_t *exact, const int8_t *q, const float *s, const uint8_t *packed, const float *gamma,
                      const float *bias, const float *residual, size_t M, size_t N, size_t K, void *scratch) {
  const I8Result result = {out, exact, s, gamma, bias, residual, N, 0};
  size_t n_panels = (N + I8_WIDTH - 1) / I8_WIDTH, units = packed_units(K), bytes = units * UNIT_BYTES;
  if (M <= FEW_ROWS) {
    int8_t *x = (int8_t *)scratch;
    size_t stride = units * UNIT_K;
    int32_t excess[FEW_ROWS];
    for (size_t r = 0; r < M; r++) {
      memcpy(x + r * stride, q + r * K, K);
      memset(x + r * stride + K, 0, stride - K);
      excess[r] = codes_sum(q + r * K, K);
    }
#pragma omp parallel
    {
      // This thread's panels, in two halves that are read side by side.
      size_t threads = (size_t)threads_here(), t = (size_t)thread_index();
      size_t begin = n_panels * t / threads, end = n_panels * (t + 1) / threads, apart = (end - begin + 1) / 2;
      for (size_t p = begin; p < begin + apart; p++) {
        int32_t sums[2 * FEW_ROWS * I8_WIDTH];
        int panels = p + apart < end ? 2 : 1;
        packed_rows(sums, x, stride, packed + p * bytes, apart * bytes, units, (int)M, panels);
        for (size_t i = 0; i < (size_t)panels; i++) {
          size_t n0 = (p + i * apart) * I8_WIDTH, cols = N - n0 < I8_WIDTH ? N - n0 : (size_t)I8_WIDTH;
          __builtin_prefetch(gamma + n0 + I8_WIDTH);   // for the next panel
          for (size_t r = 0; r < M; r++) i8_store(&result, sums + (i * M + r) * I8_WIDTH, excess[r], r, n0, cols);
        }
      }
    }
    return;
  }
  int32_t *excess = (int32_t *)scratch;
  char *buffers = (char *)scratch + (M * sizeof(int32_t) + 63) / 64 * 64;
  size_t buffer = (UNPACKED * ternary_groups(K) * I8_WIDTH * 4 + 2 * UNIT_K * I8_WIDTH + 63) / 64 * 64;
  size_t block = packed_block_rows(K), groups = (n_panels + UNPACKED - 1) / UNPACKED, blocks = (M + block - 1) / block;
#pragma omp parallel
  {
    uint8_t *panels = (uint8_t *)buffers + (size_t)thread_index() * buffer;
    if (amx_ready()) amx_begin();
#pragma omp for schedule(static)
    for (size_t m = 0; m < M; m++) excess[m] = codes_sum(q + m * K, K);
#pragma omp for schedule(static)
    for (size_t task = 0; task < blocks * groups; task++) {
      size_t m0 = task / groups * block, rows = M - m0 < block ? M - m0 : block;
      size_t p0 = task % groups * UNPACKED, p1 = p0 + UNPACKED < n_panels ? p0 + UNPACKED : n_panels;
      packed_unpack(panels, packed + p0 * bytes, p1 - p0, K);
      i8_block(&result, q, panels, excess + m0, m0, rows, p0, p1, K);
    }
    if (amx_ready()) amx_end();
  }
}

// ---------------------------------------------------------------------------------------------------------
/*
The classifier for few rows. gemm packs as many panels of B as a core's cache holds, for many rows to meet; with few rows a panel is best
packed, used and forgotten. The kernels and the order of the sums are those of gemm: the same bits.
*/
static int gemm_is_few(const Product *g) {
  return g->M <= gemm_kernel(g)->mr && !g->accumulate && !g->bias && !g->residual;
}

static size_t gemm_few_scratch_bytes(size_t K) {
  return ((K + KC_MAX) * MR_MAX + (size_t)thread_count() * KC_MAX * NR_MAX) * sizeof(float);
}

// g for which gemm_is_few; scratch aligned to 64.
static void gemm_few(const Product *g, void *scratch) {
  const Kernel *k = gemm_kernel(g);
  char *a = (char *)scratch, *b_panels = a + (g->K + KC_MAX) * MR_MAX * sizeof(float);
  size_t a_block = k->kc * k->mr * k->bytes;   // bytes of A's panel for kc values of k
  for (size_t p0 = 0; p0 < g->K; p0 += k->kc) k->pack_a(a + p0 / k->kc * a_block, g, 0, p0, g->K - p0 < k->kc ? g->K - p0 : k->kc);
#pragma omp parallel
  {
    char *b = b_panels + (size_t)thread_index() * KC_MAX * NR_MAX * sizeof(float);
    float c[MR_MAX * NR_MAX] __attribute__((aligned(64)));
    Next next = {c, NULL, 0};
    if (k->amx) amx_begin();
#pragma omp for schedule(static)
    for (size_t j0 = 0; j0 < g->N; j0 += k->nr) {
      for (size_t p0 = 0; p0 < g->K; p0 += k->kc) {
        size_t kc = g->K - p0 < k->kc ? g->K - p0 : k->kc;
        k->pack_b(b, g, j0, p0, kc);
        k->tile(c, k->nr, p0 > 0, a + p0 / k->kc * a_block, b, kc, &next);
      }
      size_t cols = g->N - j0 < k->nr ? g->N - j0 : k->nr;
      for (size_t i = 0; i < g->M; i++) memcpy(g->C + i * g->N + j0, c + i * k->nr, cols * sizeof(float));
    }
    if (k->amx) amx_end();
  }
}

// ---------------------------------------------------------------------------------------------------------
/*
The screen of a classifier: which of V logits y_n = x.w_n is the largest, without reading all of the table.

Each row w_n is kept a second time in 6 bits, w~_n = scale_n c_n with |c| <= 31, and x is rounded to 16 bits, x~ = s_x (256 h + l)
with bytes h, l. The product of the rounded ones is exact in integers, and by Cauchy-Schwarz

    |x.w_n - x~.w~_n|  <=  |x| |w_n - w~_n| + |x - x~| |w~_n|

where the norms of the rows are computed once. The logit that the exact kernel returns differs from x.w_n by the rounding of its sums,
at most K 2^-24 |x| |w_n| and a little more where numbers are tiny; twice that is taken. So every logit lies below upper_n = x~.w~_n +
bound_n. The row that looks best is scored by the exact kernel; rows with upper_n below its logit are out, and the rest, usually a few
hundred of a hundred thousand, are scored exactly, too. The result is the argmax of the exact logits, always: where the
bound is of no use (rows of very different size, ties, all equal), more rows are scored, at worst all of them.

Layout: panels of 16 rows. A panel begins with the 16 scales, the 16 errors (a bound of |w - w~|, and of the kernel's rounding, per
|x|) and the 16 norms (a bound of |w~|) of its rows. Behind them units of 3 x 64 bytes hold 16 rows x 16 values of k each: byte 4 i + j
of vector u has in its low six bits the code + 32 of row i, k = 4 u + j; the codes of k = 12 + j lie in the high two bits of the three
vectors, highest bits first.
*/
// RESCORED: rows that are scored exactly at a time
enum { SCREEN_K = 16, SCREEN_BYTES = 192, SCREEN_K_MAX = 1 << 18, RESCORED = 256 };
#define TINY_ 0x1p-126   // the bf16 instructions take smaller numbers for zeros

typedef struct {
  float *norm_max;   // [1] the largest norm of a row
  uint8_t *panels;
} Screen;

static size_t screen_units(size_t K) {
  return (K + SCREEN_K - 1) / SCREEN_K;
}

static size_t screen_panel_bytes(size_t K) {
  return (1 + screen_units(K)) * SCREEN_BYTES;
}

// 0: no screen for a matrix of this size; its integer sums could overflow.
static size_t screen_bytes(size_t V, size_t K) {
  return K > SCREEN_K_MAX ? 0 : 64 + (V + I8_WIDTH - 1) / I8_WIDTH * screen_panel_bytes(K);
}

static Screen screen_at(void *memory) {
  Screen s = {(float *)memory, (uint8_t *)memory + 64};
  return s;
}

/*
Row n (=) from the K values of the exact table. Rows share only *norm_max, which the caller raises to the returned norm of the row.

All is computed in units of the scale: y = w / scale, in float, is off by at most 2^-22 |y|, and y - c is exact, so that
|w - w~| <= scale (|y - c| + 2^-22 |y|). Sums of K squares in float are off by at most K 2^-23 of themselves.
*/
static float screen_set_row(const Screen *s, size_t n, const float *RESTRICT w, size_t K) {
  enum { PIECE = 32 * SCREEN_K };
  const float round = 0x1.8p23f;   // added and taken off again, it leaves the nearest integer
  uint8_t *panel = s->panels + n / I8_WIDTH * screen_panel_bytes(K), *out = panel + SCREEN_BYTES + n % I8_WIDTH * 4;
  float top = 0, error2 = 0, norm2 = 0;
#pragma omp simd reduction(max : top)
  for (size_t k = 0; k < K; k++) top = fabsf(w[k]) > top ? fabsf(w[k]) : top;
  float scale = top / 31.0f;
  int tiny = !(scale >= TINY_);   // its inverse could be infinite: all codes are 0
  float inverse = tiny ? 0.0f : 1.0f / scale;
  for (size_t first = 0; first < K; first += PIECE) {
    uint8_t codes[PIECE];
    size_t count = K - first < PIECE ? K - first : (size_t)PIECE, padded = (count + SCREEN_K - 1) / SCREEN_K * SCREEN_K;
    const float *RESTRICT x = w + first;
#pragma omp simd reduction(+ : error2, norm2)
    for (size_t k = 0; k < count; k++) {
      float y = x[k] * inverse, c = (y + round) - round;
      c = c > 31 ? 31 : c < -31 ? -31 : c;
      error2 += (y - c) * (y - c);
      norm2 += y * y;
      codes[k] = (uint8_t)((int)c + 32);
    }
    memset(codes + count, 32, padded - count);
    for (size_t u = 0; u < padded; u += SCREEN_K, out += SCREEN_BYTES) {
      uint32_t four[4];
      memcpy(four, codes + u, sizeof four);
      for (int v = 0; v < 3; v++) {
        uint32_t bytes = four[v] | (four[3] >> (4 - 2 * v) & 0x03030303u) << 6;
        memcpy(out + 64 * v, &bytes, 4);
      }
    }
  }
  double slack = 1 + (double)(K + 64) * 0x1p-23, norm = (double)scale * sqrt((double)norm2 * slack) * (1 + 0x1p-22);
  double error = (double)scale * (sqrt((double)error2 * slack) + 0x1p-22 * sqrt((double)norm2 * slack));
  if (tiny) error = norm = (double)top * sqrt((double)K);
  float *numbers = (float *)panel + n % I8_WIDTH;
  numbers[0] = tiny ? 0 : scale;
  numbers[I8_WIDTH] = (float)((error + (double)(K + 64) * 0x1p-23 * norm + TINY_ * sqrt((double)K)) * (1 + 1e-6));
  return numbers[2 * I8_WIDTH] = (float)((norm + error) * (1 + 1e-6));
}

// x as two digits, padded with zeros to `stride`, and what the bounds need.
typedef struct {
  int8_t *high, *low;
  int32_t excess_high, excess_low;   // 32 times the sums of the digits: what storing code + 32 adds
  float scale, norm, error;          // s_x, |x|, |x - x~|, the latter two rounded up
} ScreenRow;

static void screen_digits(ScreenRow *d, const float *x, size_t K, size_t stride) {
  float top = 0;
  double error = 0, norm = 0;
  for (size_t k = 0; k < K; k++) {
    top = fabsf(x[k]) > top ? fabsf(x[k]) : top;
    norm += (double)x[k] * (double)x[k];
  }
  d->scale = top / 32512.0f;
  float inverse = d->scale > 0 ? 1.0f / d->scale : 0.0f;
  memset(d->high, 0, stride);
  memset(d->low, 0, stride);
  d->excess_high = d->excess_low = 0;
  for (size_t k = 0; k < K; k++) {
    float r = rintf(x[k] * inverse);
    int v = r >= -32512 && r <= 32512 ? (int)r : 0, high = (v + 32768 + 128) / 256 - 128, low = v - 256 * high;
    double e = (double)x[k] - (double)d->scale * v;
    error += e * e;
    d->high[k] = (int8_t)high;
    d->low[k] = (int8_t)low;
    d->excess_high += 32 * high;
    d->excess_low += 32 * low;
  }
  d->norm = (float)(sqrt(norm) * (1 + 1e-6));
  d->error = (float)((sqrt(error) + TINY_ * sqrt((double)K)) * (1 + 1e-6));
}

// sums (=) [panels][2][16]: the raw sums with the high and the low digits of one or two panels, `apart` bytes from each other, from
// the first unit on.
UNUSED static void screen_panels_scalar(int32_t *sums, const ScreenRow *d, const uint8_t *panel, size_t apart, size_t units,
                                        int panels) {
  memset(sums, 0, (size_t)panels * 2 * I8_WIDTH * sizeof *sums);
  for (size_t at = 0; at < (size_t)panels * units * 64; at++) {
    size_t p = at / (units * 64), u = at / 64 % units, byte = at % 64;
    const uint8_t *in = panel + p * apart + u * SCREEN_BYTES + byte;
    int codes[4] = {in[0] & 63, in[64] & 63, in[128] & 63, in[0] >> 6 << 4 | in[64] >> 6 << 2 | in[128] >> 6};
    for (size_t i = 0; i < 4; i++) {
      sums[p * 2 * I8_WIDTH + byte / 4] += codes[i] * d->high[u * SCREEN_K + 4 * i + byte % 4];
      sums[(p * 2 + 1) * I8_WIDTH + byte / 4] += codes[i] * d->low[u * SCREEN_K + 4 * i + byte % 4];
    }
  }
}

#ifdef IVEC
static inline __attribute__((always_inline)) void screen_panels_fixed(int32_t *sums, const ScreenRow *d, const uint8_t *panel,
                                                                      size_t apart, size_t units, const int panels) {
  const int8_t *x[2] = {d->high, d->low};
  for (size_t part = 0; part < 64 / IVEC; part++) {
    ivec low[2][2], top[2][2][3];   // panel, digit, vector
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) low[i / 2][i % 2] = top[i / 2][i % 2][0] = top[i / 2][i % 2][1] = top[i / 2][i % 2][2] = ivec_zero();
    for (size_t u = 0; u < units; u++) {
#pragma GCC unroll 3
      for (int v = 0; v < 3; v++) {
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
          const uint8_t *in = panel + (size_t)p * apart + u * SCREEN_BYTES + part * IVEC + 64 * v;
          __builtin_prefetch(in + AHEAD);
          ivec bytes = ivec_load(in), six = ivec_and(bytes, 63), two = ivec_top(bytes);
#pragma GCC unroll 2
          for (int digit = 0; digit < 2; digit++) {
            low[p][digit] = ivec_dot(low[p][digit], six, ivec_four(x[digit] + u * SCREEN_K + 4 * v));
            top[p][digit][v] = ivec_dot(top[p][digit][v], two, ivec_four(x[digit] + u * SCREEN_K + 12));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * panels; i++) {
      ivec *t = top[i / 2][i % 2], sum = low[i / 2][i % 2];
      sum = ivec_add(sum, ivec_up(ivec_down(t[0], TOP_BITS), 4));
      sum = ivec_add(sum, ivec_up(ivec_down(t[1], TOP_BITS), 2));
      ivec_store(sums + i * I8_WIDTH + part * (IVEC / 4), ivec_add(sum, ivec_down(t[2], TOP_BITS)));
    }
  }
}

static void screen_panels(int32_t *sums, const ScreenRow *d, const uint8_t *panel, size_t apart, size_t units, int panels) {
  if (panels == 2) screen_panels_fixed(sums, d, panel, apart, units, 2);
  else screen_panels_fixed(sums, d, panel, apart, units, 1);
}
#else
#define screen_panels screen_panels_scalar
#endif

// upper (=) [16], an upper bound of each logit of one panel, and value (=) [16], the screened logits; -infinity behind the first
// `rows` of them.
static void screen_bound(float *RESTRICT upper, float *RESTRICT value, const ScreenRow *d, const uint8_t *panel,
                         const int32_t *RESTRICT sums, size_t rows) {
  const float *RESTRICT scale = (const float *)panel, *RESTRICT error = scale + I8_WIDTH, *RESTRICT norm = error + I8_WIDTH;
  float x_scale = d->scale, x_norm = d->norm, x_error = d->error;
  int32_t high = d->excess_high, low = d->excess_low;
  for (int i = 0; i < I8_WIDTH; i++) {
    float sum = 256.0f * (float)(sums[i] - high) + (float)(sums[I8_WIDTH + i] - low);
    value[i] = sum * (x_scale * scale[i]);
    upper[i] = value[i] + (x_norm * error[i] + x_error * norm[i] + 1e-6f * fabsf(value[i])) * 1.00001f + 1e-30f;
  }
  for (size_t i = rows; i < I8_WIDTH; i++) upper[i] = value[i] = -INFINITY;
}

// The largest of 16 numbers.
static float largest16(const float *RESTRICT x) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int i = 0; i < I8_WIDTH; i++) top = x[i] > top ? x[i] : top;
  return top;
}

static size_t screen_scratch_bytes(size_t V, size_t K) {
  size_t panels = (V + I8_WIDTH - 1) / I8_WIDTH, digits = screen_units(K) * SCREEN_K;
  size_t upper = FEW_ROWS * panels * (I8_WIDTH + 1) * sizeof(float), gathered = RESCORED * (K + 1) * sizeof(float);
  return upper + gathered + 2 * FEW_ROWS * digits + gemm_few_scratch_bytes(K) + 5 * 64;
}

// Scores rows[0..n) of g's table exactly for row r of A; scores (=) [n]. gathered: n rows.
static void screen_rescore(float *scores, const Product *g, size_t r, const int *rows, size_t n, void *gathered, void *scratch) {
  Product few = *g;
  size_t bytes = g->K * (g->B_half ? sizeof(uint16_t) : sizeof(float));
  const char *table = g->B_half ? (const char *)g->B_half : (const char *)g->B;
#pragma omp parallel for schedule(static) if (n > 16)
  for (size_t i = 0; i < n; i++) memcpy((char *)gathered + i * bytes, table + (size_t)rows[i] * bytes, bytes);
  few.M = 1, few.N = n;
  few.A = g->A + r * g->a_row;
  few.B = g->B_half ? NULL : (const float *)gathered;
  few.B_half = g->B_half ? (const uint16_t *)gathered : NULL;
  few.C = scores;
  gemm_few(&few, scratch);
}

/*
best (=) [M]: for each row of A the argmax over n < V of what gemm would compute, the first of equals. g: A [M,K] with a_row = K; B or
B_half row by row [N,K]; C is not used. Rows of A for which no bound holds (infinite or NaN, or products near the end of the range) get
-1: the caller computes all logits.
*/
static void screen_argmax(int *best, const Product *g, const Screen *s, size_t V, void *scratch) {
  size_t K = g->K, units = screen_units(K), stride = units * SCREEN_K, panels = (V + I8_WIDTH - 1) / I8_WIDTH;
  char *at = (char *)scratch;
  float *upper = (float *)at;                                        // [FEW_ROWS][panels][16]
  float *highest = upper + FEW_ROWS * panels * I8_WIDTH;             // [FEW_ROWS][panels] the largest of each panel
  at += (FEW_ROWS * panels * (I8_WIDTH + 1) * sizeof(float) + 63) / 64 * 64;
  float *rounded = (float *)at;                                      // [K], then the gathered rows
  at += (RESCORED * (K + 1) * sizeof(float) + 63) / 64 * 64;
  int8_t *digits = (int8_t *)at;
  at += (2 * FEW_ROWS * stride + 63) / 64 * 64;
  for (size_t r0 = 0; r0 < g->M; r0 += FEW_ROWS) {
    size_t rows = g->M - r0 < FEW_ROWS ? g->M - r0 : (size_t)FEW_ROWS;
    ScreenRow d[FEW_ROWS];
    int first[FEW_ROWS];
    float first_value[FEW_ROWS];
    for (size_t r = 0; r < rows; r++) {
      const float *x = g->A + (r0 + r) * g->a_row;
      for (size_t k = 0; k < K; k++) rounded[k] = g->precision == PRECISION_BF16 ? round_bf16(x[k]) : x[k];
      d[r].high = digits + 2 * r * stride;
      d[r].low = d[r].high + stride;
      screen_digits(&d[r], rounded, K, stride);
      first[r] = 0;
      first_value[r] = -INFINITY;
    }
#pragma omp parallel
    {
      int my_first[FEW_ROWS] = {0};
      float my_value[FEW_ROWS];
      for (size_t r = 0; r < rows; r++) my_value[r] = -INFINITY;
      size_t threads = (size_t)threads_here(), t = (size_t)thread_index();
      size_t begin = panels * t / threads, end = panels * (t + 1) / threads, apart = (end - begin + 1) / 2;
      for (size_t pair = begin; pair < begin + apart; pair++) {
        for (size_t r = 0; r < rows; r++) {
          int32_t sums[4 * I8_WIDTH];
          const uint8_t *panel = s->panels + pair * screen_panel_bytes(K);
          screen_panels(sums, &d[r], panel + SCREEN_BYTES, apart * screen_panel_bytes(K), units, pair + apart < end ? 2 : 1);
          for (size_t p = pair; p < end && p <= pair + apart; p += apart) {
            float value[I8_WIDTH], *u = upper + (r * panels + p) * I8_WIDTH;
            size_t n0 = p * I8_WIDTH;
            screen_bound(u, value, &d[r], panel, sums + (p - pair) / apart * 2 * I8_WIDTH,
                         V - n0 < I8_WIDTH ? V - n0 : (size_t)I8_WIDTH);
            panel += apart * screen_panel_bytes(K);
            highest[r * panels + p] = largest16(u);
            float top = largest16(value);
            if (top <= my_value[r]) continue;
            my_value[r] = top;
            for (size_t i = 0; i < I8_WIDTH; i++) my_first[r] = value[i] == top ? (int)(n0 + i) : my_first[r];
          }
        }
      }
#pragma omp critical
      for (size_t r = 0; r < rows; r++) {
        if (my_value[r] > first_value[r]) {
          first_value[r] = my_value[r];
          first[r] = my_first[r];
        }
      }
    }
    for (size_t r = 0; r < rows; r++) {
      int candidates[RESCORED];
      float scores[RESCORED], limit;
      size_t n = 0;
      best[r0 + r] = -1;
      if (!(d[r].norm * *s->norm_max < 1e36f)) continue;
      screen_rescore(&limit, g, r0 + r, &first[r], 1, rounded, at);
      float best_score = -INFINITY;
      for (size_t p = 0; p <= panels; p++) {
        if (n > RESCORED - I8_WIDTH || p == panels) {
          screen_rescore(scores, g, r0 + r, candidates, n, rounded, at);
          for (size_t i = 0; i < n; i++) {
            if (scores[i] > best_score) {
              best_score = scores[i];
              best[r0 + r] = candidates[i];
            }
          }
          limit = best_score > limit ? best_score : limit;
          n = 0;
        }
        if (p == panels || highest[r * panels + p] < limit) continue;
        for (size_t i = 0; i < I8_WIDTH; i++) {
          if (upper[(r * panels + p) * I8_WIDTH + i] >= limit) candidates[n++] = (int)(p * I8_WIDTH + i);
        }
      }
    }
  }
}

#endif
