/*
test_infer.h: what must hold for packed weights, the screened classifier and frozen models: they are faster, and nothing else.

What it is:  equalities. Packed products have the integer sums and the bits of gemm_i8; the fast kernels those of their plain twins;
the classifier those of linear_forward; the screened argmax is that of all logits, on random tables and on ones made to mislead it; a
frozen model, loaded from a directory, does everything that the float model does, bit for bit. What not:    speed (./train_bitnet bench
decode). Read before: test_ops.h and test_model.h, whose helpers it uses; packed.h. Defines:     INFER_TESTS, the rows for the table of
tests.
*/
#ifndef TEST_INFER_H
#define TEST_INFER_H

#include "../../bitnet/checkpoint.h"
#include "../../bitnet/infer.h"
#include "../../bitnet/losses.h"
#include "check.h"
#include "test_model.h"
#include "test_ops.h"

// ---------------------------------------------------------------------------------------------------------
// Packed weights.

// A packed BitWeight of the same matrices as w, from master weights (device memory), packed from the last matrix to the first.
static BitWeight packed_weight_(const BitWeight *w, const float *master) {
  BitWeight p = *w;
  int first[3] = {0, w->parts[0], w->parts[0] + w->parts[1]};
  p.data = dev_memory_(bitweight_packed_bytes(w->N, w->K));
  p.gamma = dev_floats_(NULL, (size_t)w->N);
  for (int part = 2; part >= 0; part--) {
    if (w->parts[part] > 0) weight_pack(&p, part, master + (size_t)first[part] * (size_t)w->K);
  }
  return p;
}

// Up to three matrices of odd sizes, many and few rows: codes, scales and products of the packed form are those of the usual one.
static void test_packed_weights(void) {
  static const int shapes[][4] = {{1, 0, 0, 1},   {5, 3, 2, 3},   {16, 0, 0, 64},   {33, 17, 15, 95},
                                  {31, 0, 0, 96}, {40, 9, 0, 97}, {64, 64, 0, 192}, {130, 7, 1, 259}};
  static const int rows[] = {1, 2, 3, 4, 5, 6, 7, 13, 31, 32, 33, 97};
  for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
    const int *s = shapes[i];
    size_t N = (size_t)(s[0] + s[1] + s[2]), K = (size_t)s[3];
    float *master = dev_floats_(normals_(N * K, 0, 0.1), N * K), *bias = dev_floats_(normals_(N, 0, 1), N);
    reserve_scratch_bytes_(ops_scratch_bytes(97, N, K));
    BitWeight w = new_weight_(master, bias, s[0], s[1], s[2], s[3], 1, PRECISION_BF16), p = packed_weight_(&w, master);
    CHECK(same_bits_(weight_codes_(&p), weight_codes_(&w), N * K), "[%zu,%zu]: codes", N, K);
    CHECK(same_bits_(read_floats_(p.gamma, N), read_floats_(w.gamma, N), N * sizeof(float)), "[%zu,%zu]: scales", N, K);
    for (size_t k = 0; k < ARRAY_LEN(rows); k++) {
      size_t R = (size_t)rows[k];
      QAct q = new_qact_(k % 2 ? 4 : 8, 1, R, K);
      floatX *x = dev_acts_(normals_(R * K, 0, 2), R * K), *residual = dev_acts_(normals_(R * N, 0, 1), R * N),
             *y = dev_acts_(NULL, R * N), *z = dev_acts_(NULL, R * N);
      act_quant_forward(&q, x, (int)R, (int)K);
      for (int with = 0; with < 4; with++) {
        p.bias = w.bias = with & 1 ? bias : NULL;
        bitlinear_forward(y, &q, &w, with & 2 ? residual : NULL, (int)R);
        bitlinear_forward(z, &q, &p, with & 2 ? residual : NULL, (int)R);
        CHECK(same_bits_(read_acts_(z, R * N), read_acts_(y, R * N), R * N * sizeof(float)), "[%zu,%zu,%zu] with %d", R, N, K, with);
      }
    }
    end_test_();
  }
}

// The form from codes instead of master weights.
static void test_packed_codes(void) {
  enum { N = 21, K = 130 };
  int8_t codes[N * K];
  for (int i = 0; i < N * K; i++) codes[i] = (int8_t)(test_below_(3) - 1);
  BitWeight w;
  memset(&w, 0, sizeof w);
  w.N = N;
  w.K = K;
  w.parts[0] = 6;
  w.parts[1] = 15;
  w.data = dev_memory_(bitweight_packed_bytes(N, K));
  w.gamma = dev_floats_(NULL, N);
  int8_t *device = (int8_t *)dev_memory_(N * K);
  dev_copy_in(device, codes, N * K);
  reserve_scratch_bytes_(ops_scratch_bytes(1, N, K));
  weight_pack_codes(&w, 0, device, 0, 6, 0.5f);
  weight_pack_codes(&w, 1, device + 9 * K, 3, 12, 0.25f);
  weight_pack_codes(&w, 1, device + 6 * K, 0, 3, 0.25f);
  CHECK(same_bits_(weight_codes_(&w), codes, N * K), "codes");
  float *gamma = read_floats_(w.gamma, N);
  for (int n = 0; n < N; n++) CHECK(gamma[n] == (n < 6 ? 0.5f : 0.25f), "scale %d is %g", n, (double)gamma[n]);
  CHECK(w.packed == 1 && w.lambda == 1, "packed %d, lambda %g", w.packed, (double)w.lambda);
  end_test_();
}

// Packed products and whole frozen models do not depend on the number of threads.
static void test_packed_threads(void) {
  enum { N = 203, K = 310 };
  static const int rows[] = {1, 3, 40};
  float *master = normals_(N * K, 0, 1), *first[ARRAY_LEN(rows)] = {NULL, NULL, NULL}, *x = normals_(40 * K, 0, 1);
  for (int threads = 1; threads <= 3; threads++) {
    set_threads_(threads);
    float *device = dev_floats_(master, N * K);
    BitWeight w = new_weight_(device, NULL, N, 0, 0, K, 1, PRECISION_BF16), p = packed_weight_(&w, device);
    for (size_t k = 0; k < ARRAY_LEN(rows); k++) {
      size_t R = (size_t)rows[k];
      QAct q = new_qact_(8, 1, R, K);
      floatX *y = dev_acts_(NULL, R * N);
      act_quant_forward(&q, dev_acts_(x, R * K), (int)R, K);
      bitlinear_forward(y, &q, &p, NULL, (int)R);
      float *got = read_acts_(y, R * N);
      if (threads == 1) first[k] = got;
      CHECK(same_bits_(got, first[k], R * N * sizeof(float)), "%d threads, %zu rows", threads, R);
    }
  }
  set_threads_(0);
  end_test_();
}

#ifdef BITNET_MATMUL_H
// The kernels against their plain twins and against plain sums, every number of rows and panels, also where the sums of the fields
// must be folded in between.
static void test_packed_twin(void) {
  for (size_t K = 1; K <= 1 << 20; K += K < 40 ? 1 : K < 300 ? 61 : (1 << 18) + 77) {
    enum { N = 2 * I8_WIDTH };
    size_t units = packed_units(K), stride = units * UNIT_K, bytes = units * UNIT_BYTES;
    int8_t *codes = (int8_t *)host_memory_(N * K), *back = (int8_t *)host_memory_(K), *q = (int8_t *)host_memory_(FEW_ROWS * stride);
    uint8_t *packed = (uint8_t *)host_memory_(packed_bytes(N, K));
    for (size_t i = 0; i < N * K; i++) codes[i] = K < 1000 ? (int8_t)(test_below_(3) - 1) : (int8_t)1;   // the largest sums
    for (size_t r = 0; r < FEW_ROWS; r++) {
      for (size_t k = 0; k < K; k++) q[r * stride + k] = K < 1000 ? (int8_t)(test_below_(256) - 128) : (int8_t)(r % 2 ? 127 : -128);
    }
    for (size_t n = 0; n < N; n++) packed_set_rows(packed, n, 1, codes + n * K, K);
    for (size_t n = 0; n < N; n++) {
      packed_get_row(back, packed, n, K);
      CHECK(same_bits_(back, codes + n * K, K), "K = %zu: row %zu is not what was packed", K, n);
    }
    for (int rows = 1; rows <= FEW_ROWS; rows++) {
      for (int panels = 1; panels <= 2; panels++) {
        int32_t a[2 * FEW_ROWS * I8_WIDTH], b[2 * FEW_ROWS * I8_WIDTH];
        size_t n = (size_t)(rows * panels) * I8_WIDTH * sizeof(int32_t);
        packed_rows(a, q, stride, packed, bytes, units, rows, panels);
        packed_rows_scalar(b, q, stride, packed, bytes, units, rows, panels);
        CHECK(same_bits_(a, b, n), "K = %zu, %d rows, %d panels", K, rows, panels);
        for (size_t i = 0; i < n / sizeof(int32_t); i++) {
          const int8_t *t = codes + (i / ((size_t)rows * I8_WIDTH) * I8_WIDTH + i % I8_WIDTH) * K,
                       *x = q + i / I8_WIDTH % (size_t)rows * stride;
          int32_t want = 0;
          for (size_t k = 0; k < K; k++) want += (t[k] + 1) * x[k];
          CHECK(b[i] == want, "K = %zu: sum %zu is %d, wanted %d", K, i, b[i], want);
        }
      }
    }
    end_test_();
  }
}

// packed_i8's int32 sums are those of gemm_i8.
static void test_packed_sums(void) {
  for (size_t shape = 0; shape < ARRAY_LEN(product_shapes_); shape++) {
    size_t M = (size_t)product_shapes_[shape][0], N = (size_t)product_shapes_[shape][1], K = (size_t)product_shapes_[shape][2];
    int8_t *q = (int8_t *)host_memory_(M * K), *t = (int8_t *)host_memory_(N * K);
    for (size_t i = 0; i < M * K; i++) q[i] = (int8_t)(test_below_(256) - 128);
    for (size_t i = 0; i < N * K; i++) t[i] = (int8_t)(test_below_(3) - 1);
    uint8_t *panels = (uint8_t *)dev_memory_(ternary_panel_bytes(N, K)), *packed = (uint8_t *)dev_memory_(packed_bytes(N, K));
    ternary_pack_panels(panels, t, N, K);
    for (size_t n = 0; n < N; n++) packed_set_rows(packed, n, 1, t + n * K, K);
    uint8_t *whole = (uint8_t *)dev_memory_(packed_bytes(N, K));
    for (size_t n = 0; n < N; n += I8_WIDTH)
      packed_set_rows(whole, n, N - n < I8_WIDTH ? N - n : (size_t)I8_WIDTH, t + n * K, K);
    CHECK(same_bits_(packed, whole, packed_bytes(N, K)), "[%zu,%zu]: rows packed together", N, K);
    float *s = normals_(M, 1, 0.2), *gamma = normals_(N, 1, 0.2), *a = host_floats_(M * N), *b = host_floats_(M * N);
    int32_t *sums_a = (int32_t *)host_memory_(M * N * sizeof(int32_t)), *sums_b = (int32_t *)host_memory_(M * N * sizeof(int32_t));
    gemm_i8(a, sums_a, q, s, panels, gamma, NULL, NULL, M, N, K);
    packed_i8(b, sums_b, q, s, packed, gamma, NULL, NULL, M, N, K, dev_memory_(packed_scratch_bytes(M, K)));
    CHECK(same_bits_(sums_a, sums_b, M * N * sizeof(int32_t)), "[%zu,%zu,%zu]: sums", M, N, K);
    CHECK(same_bits_(a, b, M * N * sizeof(float)), "[%zu,%zu,%zu]: result", M, N, K);
    end_test_();
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// The classifier.

// A Head with the rows of `table` [V,C] (host), filled in pieces. half: they are bf16 numbers.
static Head new_head_(const float *table, int V, int C, int half, int precision, int screened) {
  Head h;
  memset(&h, 0, sizeof h);
  h.V = V;
  h.C = C;
  h.half = half;
  h.precision = precision;
  h.table = dev_memory_(head_table_bytes(V, C, half));
  h.screen = screened ? dev_memory_(head_screen_bytes(V, C)) : NULL;
  reserve_scratch_bytes_(head_scratch_bytes(V, C));
  float *device = dev_floats_(table, (size_t)V * (size_t)C);
  for (int v = 0; v < V; v += 100) head_rows(&h, device + (size_t)v * (size_t)C, v, V - v < 100 ? V - v : 100);
  return h;
}

static void round_to_bf16_(float *x, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] = (float)nearest_bf16_((double)x[i]);
}

// Embeddings and logits of a Head are those of embedding_forward and linear_forward, for few rows and for many.
static void test_head(void) {
  static const int shapes[][2] = {{1, 1}, {19, 27}, {61, 32}, {333, 64}, {1000, 257}, {40, 1100}};
  static const int rows[] = {1, 2, 7, 12, 13, 32, 33, 70};
  for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
    for (int form = 0; form < 4; form++) {
      int V = shapes[i][0], C = shapes[i][1], half = form & 1, precision = form & 2 ? PRECISION_FP32 : PRECISION_BF16;
      float *table = normals_((size_t)V * (size_t)C, 0, 0.3);
      if (half) round_to_bf16_(table, (size_t)V * (size_t)C);
      Head h = new_head_(table, V, C, half, precision, 0);
      reserve_scratch_bytes_(ops_scratch_bytes(70, (size_t)V, (size_t)C));
      float *wte = dev_floats_(table, (size_t)V * (size_t)C);
      for (size_t k = 0; k < ARRAY_LEN(rows); k++) {
        size_t R = (size_t)rows[k], nx = R * (size_t)C, ny = R * (size_t)V;
        int ids[70];
        for (size_t r = 0; r < R; r++) ids[r] = test_below_(V);
        int *tokens = dev_ints_(ids, R);
        floatX *x = dev_acts_(normals_(nx, 0, 1), nx), *a = dev_acts_(NULL, nx), *b = dev_acts_(NULL, nx), *y = dev_acts_(NULL, ny),
               *z = dev_acts_(NULL, ny);
        embedding_forward(a, tokens, wte, (int)R, C);
        head_embedding(b, tokens, &h, (int)R);
        CHECK(same_bits_(read_acts_(a, nx), read_acts_(b, nx), nx * sizeof(float)),
              "[%d,%d] form %d, %zu rows: embedding", V, C, form, R);
        linear_forward(y, x, wte, (int)R, V, C, precision);
        head_forward(z, x, &h, (int)R);
        CHECK(same_bits_(read_acts_(y, ny), read_acts_(z, ny), ny * sizeof(float)),
              "[%d,%d] form %d, %zu rows: logits", V, C, form, R);
      }
      end_test_();
    }
  }
}

/*
Tables and inputs that are easy, or made to mislead a screen. Fills table [V,C] and x [R,C] and returns a name, NULL behind the last.
*/
static const char *screen_case_(int number, float *table, float *x, int V, int C, int R) {
  size_t n = (size_t)V * (size_t)C, m = (size_t)R * (size_t)C;
  memcpy(table, normals_(n, 0, 0.02), n * sizeof(float));
  memcpy(x, normals_(m, 0, 1), m * sizeof(float));
  switch (number) {
    case 0: return "random";
    case 1:   // every row twice: the first of equals wins
      for (int v = V / 2; v < V; v++)
        memcpy(table + (size_t)v * (size_t)C, table + (size_t)(v - V / 2) * (size_t)C, (size_t)C * sizeof(float));
      return "pairs of equal rows";
    case 2:
      for (int v = 0; v < V; v++) memcpy(table + (size_t)v * (size_t)C, table, (size_t)C * sizeof(float));
      return "all rows equal";
    case 3: memset(table, 0, n * sizeof(float)); return "a table of zeros";
    case 4: memset(x, 0, m * sizeof(float)); return "an input of zeros";
    case 5:   // sizes from 1e-18 to 1e18, the signs as they come
      for (int v = 0; v < V; v++) {
        float size = powf(10.0f, (float)(test_below_(37) - 18));
        for (int c = 0; c < C; c++) table[(size_t)v * (size_t)C + (size_t)c] *= size;
      }
      return "rows of very different size";
    case 6:   // the best row by a hair: all rows are the input itself but for the last bit of one number
      for (int v = 0; v < V; v++) {
        float *w = table + (size_t)v * (size_t)C;
        for (int c = 0; c < C; c++) w[c] = (float)nearest_bf16_((double)x[c]);
        w[v % C] *= v == V - 2 ? 1.0078125f : 1.0f;
      }
      return "rows that differ in one last bit";
    case 7:   // a huge row that points away, and one that nearly does
      for (int c = 0; c < C; c++) {
        table[(size_t)(V / 3) * (size_t)C + (size_t)c] = -1e6f * x[c];
        table[(size_t)(V / 2) * (size_t)C + (size_t)c] = (c % 2 ? 1e6f : -1e6f) * x[c / 2 * 2];
      }
      return "huge rows that lose";
    case 8:   // one number of the input is far larger than the others
      for (int r = 0; r < R; r++) x[(size_t)r * (size_t)C + (size_t)(r % C)] = 3000;
      return "an outlier in the input";
    case 9:
      for (int v = 0; v < V; v++) table[(size_t)v * (size_t)C + (size_t)(v % C)] = 50;
      return "outliers in the rows";
    case 10:
      for (size_t i = 0; i < m; i++) x[i] *= 1e25f;
      for (size_t i = 0; i < n; i++) table[i] *= 1e12f;
      return "products at the end of the range";
    case 11:
      for (size_t i = 0; i < n; i++) table[i] *= 1e-30f;
      for (size_t i = 0; i < m; i++) x[i] *= 1e-9f;
      return "products that vanish";
    case 12: x[0] = NAN; return "NaN in the input";
    case 13: x[(R - 1) * C] = INFINITY; return "infinity in the input";
    case 14:
      for (size_t i = 0; i < n; i++) table[i] *= 1e-38f;
      return "subnormal rows";
    default: return NULL;
  }
}

// The argmax with a screen is the argmax of all logits, the first of equals, among the first ids of the table.
static void test_screen(void) {
  static const int shapes[][2] = {{1, 3}, {17, 27}, {200, 64}, {1003, 130}};
  enum { R = 5 };
  for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
    for (int form = 0; form < 4; form++) {
      int V = EMULATED && shapes[i][0] > 300 ? 300 : shapes[i][0], C = shapes[i][1];
      int half = form & 1, precision = form & 2 ? PRECISION_FP32 : PRECISION_BF16;
      for (int number = 0;; number++) {
        float *table = host_floats_((size_t)V * (size_t)C), *input = host_floats_((size_t)R * (size_t)C);
        const char *name = screen_case_(number, table, input, V, C, R);
        if (name == NULL) break;
        if (half) round_to_bf16_(table, (size_t)V * (size_t)C);
        Head h = new_head_(table, V, C, half, precision, 1), plain = h;
        plain.screen = NULL;
        floatX *x = dev_acts_(input, (size_t)R * (size_t)C), *y = dev_acts_(NULL, (size_t)R * (size_t)V);
        head_forward(y, x, &h, R);
        float *logits = read_acts_(y, (size_t)R * (size_t)V);
        int none[R] = {0}, *best = dev_ints_(none, R), got[R], unscreened[R];
        for (int known = V; known > 0; known -= V / 3 + 1) {
          head_argmax(best, x, &h, R, known);
          dev_copy_out(got, best, sizeof got);
          head_argmax(best, x, &plain, R, known);
          dev_copy_out(unscreened, best, sizeof unscreened);
          for (int r = 0; r < R; r++) {
            const float *z = logits + (size_t)r * (size_t)V;
            int want = 0;
            for (int v = 1; v < known; v++) want = z[v] > z[want] ? v : want;
            CHECK(got[r] == want, "[%d,%d] form %d, %s, row %d, %d ids: token %d, the largest logit has %d", V, C, form, name, r,
                  known, got[r], want);
            CHECK(unscreened[r] == want, "[%d,%d] form %d, %s, row %d, %d ids: token %d without a screen, wanted %d", V, C, form, name,
                  r, known, unscreened[r], want);
          }
        }
        end_test_();
      }
      end_test_();
    }
  }
}

#ifdef BITNET_MATMUL_H
/*
The bounds themselves: every exact logit lies below its upper bound, and in ordinary tables the bound is tight enough to rule nearly
all rows out. The kernel's sums are those of its plain twin.
*/
static void test_screen_bounds(void) {
  enum { V = 1024, C = 384, R = 4 };
  size_t units = screen_units(C), stride = units * SCREEN_K;
  for (int number = 0; number < 10; number++) {
    float *table = host_floats_(V * C), *input = host_floats_(R * C), *logits = host_floats_(R * V);
    const char *name = screen_case_(number, table, input, V, C, R);
    round_to_bf16_(table, V * C);
    Head h = new_head_(table, V, C, 1, PRECISION_BF16, 1);
    Screen s = screen_at(h.screen);
    head_forward(logits, input, &h, R);
    round_to_bf16_(input, R * C);
    for (size_t r = 0; r < R; r++) {
      ScreenRow d;
      int8_t *digits = (int8_t *)host_memory_(2 * stride);
      int left = 0;
      float top = -INFINITY;
      d.high = digits;
      d.low = digits + stride;
      screen_digits(&d, input + r * C, C, stride);
      for (size_t v = 0; v < V; v++) top = logits[r * V + v] > top ? logits[r * V + v] : top;
      for (size_t p = 0; p + 1 < V / I8_WIDTH; p++) {
        int32_t sums[4 * I8_WIDTH], twin[4 * I8_WIDTH];
        float upper[I8_WIDTH], value[I8_WIDTH];
        const uint8_t *panel = s.panels + p * screen_panel_bytes(C);
        screen_panels(sums, &d, panel + SCREEN_BYTES, screen_panel_bytes(C), units, 2);
        screen_panels_scalar(twin, &d, panel + SCREEN_BYTES, screen_panel_bytes(C), units, 2);
        CHECK(same_bits_(sums, twin, sizeof sums), "%s: panel %zu and the next", name, p);
        screen_panels(sums, &d, panel + SCREEN_BYTES, 0, units, 1);
        CHECK(same_bits_(sums, twin, sizeof sums / 2), "%s: panel %zu alone", name, p);
        screen_bound(upper, value, &d, panel, sums, I8_WIDTH);
        for (size_t i = 0; i < I8_WIDTH; i++) {
          float z = logits[r * V + p * I8_WIDTH + i];
          CHECK(z <= upper[i], "%s: logit %g above its bound %g", name, (double)z, (double)upper[i]);
          CHECK(z >= 2 * value[i] - upper[i], "%s: logit %g too far below its screened value %g", name, (double)z, (double)value[i]);
          left += upper[i] >= top;
        }
      }
      if (number == 0) CHECK(left > 0 && left < V / 16, "%s: %d of %d rows are left to be scored", name, left, V);
    }
    end_test_();
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Frozen models.

// A directory with the model m.
static const char *saved_model_(const Model *m) {
  const char *dir = test_dir();
  int err = save_files_(m, NULL, NULL, NULL, dir);
  if (err) die(EXIT_FAILED, "cannot save a model for a test: %s", strerror(err));
  return dir;
}

enum { FROZEN_FORMS_ = 8 };

// Form f: styles with quantised activations, tied or not, precision, tables that are bf16 or not.
static void frozen_form_(int f, Config *c, int *precision, int *half) {
  *c = small_config_(f & 1 ? ODD_STYLE : BITNET_STYLE);
  if (f >= FROZEN_FORMS_ / 2) {   // what a converted model brings along, but int8 activations
    c->qkv_bias = c->o_bias = c->qk_norm = 1;
    c->tie_embeddings = 0;
    c->activation = ACT_SILU;
  }
  *precision = f & 2 ? PRECISION_FP32 : PRECISION_BF16;
  *half = f & 1;
}

// A random model of form f in a directory; *half as it must be found there.
static const char *frozen_case_(int f, Config *c, int *precision, int *half) {
  Model m;
  frozen_form_(f, c, precision, half);
  open_model_(&m, c, *precision, 0, 0, 0, 1);
  for (int i = 0; i < m.table.count && *half; i++) {
    const Tensor *t = &m.table.tensors[i];
    if (!(t->flags & EMBED)) continue;
    float *x = read_floats_(m.params + t->offset, t->n);
    round_to_bf16_(x, t->n);
    dev_copy_in(m.params + t->offset, x, t->n * sizeof(float));
  }
  const char *dir = saved_model_(&m);
  model_free(&m);
  return dir;
}

// Loaded frozen, a model's logits, losses and texts are those of the same directory with float weights quantised at lambda = 1.
static void test_frozen(void) {
  enum { T = EMULATED ? 66 : 75, NEW = EMULATED ? 12 : 30 };
  static const Sampler samplers[] = {{0, 0, 1, 1}, {0.9, 8, 0.95, 2}};
  for (int f = 0; f < FROZEN_FORMS_; f++) {
    Config c;
    Model m[2];
    int precision, half, tokens[2 * T], seq[2 * T], pos[2 * T], out[2][2][NEW];
    const char *dir = frozen_case_(f, &c, &precision, &half);
    model_load(&m[0], dir, precision);
    model_quantize(&m[0], 1);
    model_load_frozen(&m[1], dir, precision, 1);
    model_quantize(&m[1], 1);
    CHECK(m[1].frozen && m[1].head.half == half && m[1].embed.half == half, "form %d: table is bf16: %d, should be %d", f,
          m[1].head.half, half);
    CHECK((m[1].embed.table == m[1].head.table) == c.tie_embeddings, "form %d: tables shared", f);
    float *logits[2][3], losses[2], coef[2 * 70];
    Batch b;
    random_batch_(&b, 2, 70, c.vocab, 1);
    for (int i = 0; i < 2 * T; i++) {   // two sequences, mixed
      seq[i] = i % 2;
      pos[i] = i / 2;
      tokens[i] = test_below_(c.vocab);
    }
    for (int k = 0; k < 2; k++) {
      Session s;
      size_t V = (size_t)c.vocab;
      session_open(&s, &m[k], 2, 150, 2 * T, 1);
      for (int i = 0; i < 3; i++) logits[k][i] = host_floats_(2 * T * V);
      memcpy(logits[k][0], session_forward(&s, tokens, seq, pos, 2 * T), 2 * T * V * sizeof(float));
      for (int i = 0; i < 2 * T; i += 6)
        memcpy(logits[k][1] + (size_t)i * V, session_forward(&s, tokens + i, seq + i, pos + i, 6), 6 * V * sizeof(float));
      for (int i = 0; i < 2 * T; i++)
        memcpy(logits[k][2] + (size_t)i * V, session_forward(&s, tokens + i, seq + i, pos + i, 1), V * sizeof(float));
      for (int i = 1; i < 3; i++)
        CHECK(same_bits_(logits[k][i], logits[k][0], 2 * T * V * sizeof(float)), "form %d, frozen %d: rows in pieces", f, k);
      session_free(&s);
      model_alloc_batch(&m[k], 2, 70, 1, 1);
      losses[k] = (float)batch_loss(&m[k], &b, 0, coef, 0);
      for (size_t i = 0; i < ARRAY_LEN(samplers); i++) {
        Prompt p[2] = {{tokens, 7, 0, 1, out[k][0], 0, 0, NULL, 0}, {tokens + 20, 40, 0, 2, out[k][1], 0, 0, NULL, 0}};
        session_open(&s, &m[k], 2, 150, i ? 16 : 64, 1);
        generate(&s, &samplers[i], p, 2, NEW, -1, c.vocab - 2, NULL, NULL);
        session_free(&s);
        CHECK(p[0].n_out == NEW && p[1].n_out == NEW, "form %d: %d and %d tokens", f, p[0].n_out, p[1].n_out);
        static int texts[ARRAY_LEN(samplers)][2][NEW];
        if (k == 0) memcpy(texts[i], out[0], sizeof texts[i]);
        else CHECK(same_bits_(texts[i], out[1], sizeof texts[i]), "form %d, sampler %zu: other texts", f, i);
      }
    }
    CHECK(same_bits_(logits[0][0], logits[1][0], 2 * T * (size_t)c.vocab * sizeof(float)), "form %d: logits", f);
    CHECK(losses[0] == losses[1], "form %d: losses %.9g and %.9g", f, (double)losses[0], (double)losses[1]);
    model_free(&m[0]);
    model_free(&m[1]);
    batch_free(&b);
    end_test_();
  }
}

// Decoding asks for no memory.
static void test_frozen_allocation(void) {
  Config c;
  Model m;
  Session s;
  int precision, half, token = 1, seq = 0, tokens[20], seqs[20] = {0}, pos[20];
  const char *dir = frozen_case_(1, &c, &precision, &half);
  model_load_frozen(&m, dir, precision, 1);
  session_open(&s, &m, 1, 64, 20, 1);
  for (int i = 0; i < 20; i++) {
    tokens[i] = i % c.vocab;
    pos[i] = i;
  }
  long before = test_allocations;
  alloc_guard = 1;
  session_rows(&s, tokens, seqs, pos, 20);
  session_best(&s, 0, 20, c.vocab, tokens);
  for (int p = 20; p < 30; p++) {
    session_rows(&s, &token, &seq, &p, 1);
    session_best(&s, 0, 1, c.vocab, &token);
    session_logits(&s, 0, 1);
  }
  alloc_guard = 0;
  CHECK(test_allocations == before, "%ld allocations", test_allocations - before);
  session_free(&s);
  model_free(&m);
  end_test_();
}

#ifdef BITNET_MATMUL_H
// run_memory is what a frozen model and its session take. Loading takes a chunk of the host's memory more, or one float matrix, but
// not at the same time as the session.
static void test_frozen_memory(void) {
  set_threads_(0);
  for (int f = 0; f < FROZEN_FORMS_; f++) {
    Config c;
    Model m;
    Session s;
    int precision, half;
    const char *dir = frozen_case_(f, &c, &precision, &half);
    reserve_scratch_bytes_((size_t)8 << 20);   // more than these models need: what is counted below is not scratch
    int form = half ? TABLE_HALF : dev_reads_host() ? TABLE_IN_FILE : 0;   // the file has floats
    RunMemory need = run_memory(&c, precision, form, form, 3, 90, 40);
    CHECK(need.total == need.weights + need.tables + need.cache + need.rest, "form %d: the parts do not add up", f);
    size_t before = test_device_bytes;
    model_load_frozen(&m, dir, precision, 1);
    session_open(&s, &m, 3, 90, 40, 1);
    size_t taken = test_device_bytes - before, host = (size_t)s.logit_rows * (size_t)c.vocab * sizeof(float);
    size_t want = need.total - session_scratch_bytes_(&s) - host;
    CHECK(taken >= want && taken <= want + 64 * 8, "form %d: %zu bytes taken, %zu forecast", f, taken, want);
    session_free(&s);
    model_free(&m);
    end_test_();
  }
}
#endif

static void load_float_acts_(void *dir) {
  Model m;
  model_load_frozen(&m, (const char *)dir, PRECISION_BF16, 1);
}

static void ask_fp32_(void *unused) {
  (void)unused;
  refuse_precision(PRECISION_BF16);
  refuse_precision(PRECISION_FP32);
}

// What a frozen model refuses, with an exit code and a message; and fp32 products, where activations are bf16.
static void test_frozen_refuses(void) {
  Config c = small_config_(CONVERTED_STYLE);
  Model m;
  char err[512];
  open_model_(&m, &c, PRECISION_BF16, 0, 0, 0, 1);
  const char *dir = saved_model_(&m);
  int code = run_child(load_float_acts_, (void *)dir, err, sizeof err);
  CHECK(code == EXIT_USAGE && strstr(err, "act_bits") != NULL, "float activations: exit %d, %s", code, err);
  int refused = sizeof(floatX) == sizeof(float) ? 0 : EXIT_USAGE;
  code = run_child(ask_fp32_, NULL, err, sizeof err);
  CHECK(code == refused && (strstr(err, "precision=fp32") != NULL) == (refused != 0), "fp32: exit %d, %s", code, err);
  // A tensor that is not finite is found by the frozen loader, too.
  float bad = NAN;
  c = small_config_(BITNET_STYLE);
  model_free(&m);
  open_model_(&m, &c, PRECISION_BF16, 0, 0, 0, 1);
  for (int i = 0; i < m.table.count; i += 5) {
    float old;
    dev_copy_out(&old, m.params + m.table.tensors[i].offset, sizeof old);
    dev_copy_in(m.params + m.table.tensors[i].offset, &bad, sizeof bad);
    dir = saved_model_(&m);
    code = run_child(load_float_acts_, (void *)dir, err, sizeof err);
    CHECK(code == EXIT_DAMAGED && strstr(err, m.table.tensors[i].name) != NULL, "NaN in %s: exit %d, %s", m.table.tensors[i].name,
          code, err);
    dev_copy_in(m.params + m.table.tensors[i].offset, &old, sizeof old);
  }
  model_free(&m);
  set_threads_(0);
  end_test_();
}

#ifdef BITNET_MATMUL_H
#define INFER_CPU_TESTS_                                                                         \
  {"packed_twin", "decoding kernels, their plain twins and plain sums", test_packed_twin},       \
  {"packed_sums", "packed products have the int32 sums of gemm_i8", test_packed_sums},           \
  {"screen_bounds", "every logit lies within its bounds", test_screen_bounds},                   \
  {"frozen_memory", "a frozen model takes what was forecast", test_frozen_memory},
#else
#define INFER_CPU_TESTS_
#endif

#define INFER_TESTS                                                                                          \
  INFER_CPU_TESTS_                                                                                           \
  {"packed_weights", "packed = unpacked: codes, scales, products, bit for bit", test_packed_weights},        \
  {"packed_codes", "weights packed from codes", test_packed_codes},                                          \
  {"packed_threads", "packed products with 1, 2, 3 threads", test_packed_threads},                           \
  {"head", "embedding and classifier of frozen models", test_head},                                          \
  {"screen", "the screened argmax is the argmax of all logits", test_screen},                                \
  {"frozen", "frozen models: the same logits, losses, texts", test_frozen},                                  \
  {"frozen_allocation", "decoding asks for no memory", test_frozen_allocation},                              \
  {"frozen_refuses", "float activations and damaged tensors", test_frozen_refuses}

#endif
