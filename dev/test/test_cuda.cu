/*
test_cuda.cu: every operation of train_bitnet.cu against the same operation of train_bitnet.c, on random inputs at odd shapes.

What it is:  one program in which both sides of bitnet/ops.h live: the CUDA ops are included here, the CPU ops are linked from a C
             object (their names differ: C++ mangles, C does not). Runs on a GPU, or under dev/cuda_emu.h on any machine; there it
             also shows that the emulator notices the mistakes it is for.
What not:    no model and no reference from outside; that is test_bitnet.c.
Bounds:      integers equal. Floats: max |a-b| / max |b| with fp32 activations, and for what is computed in fp32 in either build;
             where bf16 is involved, the relative norm |a-b| / |b| and 1 - cosine. Both sides start from the same bf16 values.
*/
#define TESTING
#include "../../train_bitnet.cu"

#include "../cuda/memory.cuh"
#include "check.h"

// The CPU ops, declared once more with float activations and C linkage.
#undef BITNET_OPS_H
#undef BITNET_FLOATX
namespace cpu {
extern "C" {
#include "../../bitnet/ops.h"
}
}

typedef std::vector<int> Ints;

static const bool BF16 = sizeof(floatX) == 2;

// ---------------------------------------------------------------------------------------------------------
// Inputs, device copies and comparisons.

static uint64_t draws;

// n normal numbers times scale.
static Floats randoms(size_t n, float scale) {
  Floats v(n);
  for (size_t i = 0; i < n; i++) v[i] = scale * (float)rng_normal(7, RNG_TEST, draws++);
  return v;
}

// The same, already rounded as activations are, so that both sides read equal values.
static Floats activations(size_t n, float scale) {
  Floats v = randoms(n, scale);
  for (float &x : v) {
    floatX y;
    from_float(&y, x);
    x = to_float(y);
  }
  return v;
}

static Ints integers(size_t n, int below) {
  Ints v(n);
  for (size_t i = 0; i < n; i++) v[i] = (int)rng_below(7, RNG_TEST, draws++, (uint64_t)below);
  return v;
}

static double norm_error(const Floats &a, const Floats &b) {
  double d = 0, n = 0;
  for (size_t i = 0; i < a.size(); i++) {
    d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    n += (double)b[i] * b[i];
  }
  return d == 0 ? 0 : d == d ? sqrt(d / (n > 0 ? n : 1e-60)) : INFINITY;
}

static double cosine(const Floats &a, const Floats &b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); i++) {
    ab += (double)a[i] * b[i];
    aa += (double)a[i] * a[i];
    bb += (double)b[i] * b[i];
  }
  return aa == 0 && bb == 0 ? 1 : ab / sqrt(aa * bb);
}

// A tensor that is computed in fp32 in every build.
static void close_f32(const char *name, const Floats &got, const Floats &want, double bound = 1e-5) {
  CHECK(got.size() == want.size(), "%s: %zu values, expected %zu", name, got.size(), want.size());
  CHECK_CLOSE(name, got.data(), want.data(), want.size(), bound);
}

// A tensor of activations, or one that bf16 products made: exact in the fp32 build, by norm and direction in the other.
static void close_act(const char *name, const Floats &got, const Floats &want, double bf16_norm = 4e-3, double bound = 1e-5) {
  if (!BF16) return close_f32(name, got, want, bound);
  double e = norm_error(got, want), c = cosine(got, want);
  CHECK(e <= bf16_norm, "%s: relative norm of the error %.3g, bound %.3g", name, e, bf16_norm);
  CHECK(1 - c <= bf16_norm * bf16_norm, "%s: 1 - cosine %.3g, bound %.3g", name, 1 - c, bf16_norm * bf16_norm);
}

// Scratch of exactly the size that the contract promises for these numbers; the memory itself only grows.
static void reserve_scratch(size_t rows, size_t n, size_t k) {
  static void *gpu_memory, *cpu_memory;
  static size_t gpu_size, cpu_size;
  size_t a = ops_scratch_bytes(rows, n, k), b = cpu::ops_scratch_bytes(rows, n, k);
  if (a > gpu_size) {
    dev_free(gpu_memory);
    gpu_memory = dev_malloc(gpu_size = a);
  }
  if (b > cpu_size) {
    cpu::dev_free(cpu_memory);
    cpu_memory = cpu::dev_malloc(cpu_size = b);
  }
  ops_set_scratch(gpu_memory, a);
  cpu::ops_set_scratch(cpu_memory, b);
}

// ---------------------------------------------------------------------------------------------------------
// The tests.

static void test_device(void) {
  Floats v = activations(STAGE + 77, 1);
  Acts a(v);
  CHECK(a.out() == v, "activations do not come back as they went in");
  Dev<float> z(5), from(Floats{1, 2, 3, 4, 5});
  CHECK(z.out() == Floats(5), "dev_malloc does not return zeros");
  dev_copy(z.p, from.p, 3 * sizeof(float));
  CHECK(z.out() == Floats({1, 2, 3, 0, 0}), "dev_copy");
  dev_zero(z.p + 1, sizeof(float));
  CHECK(z.out() == Floats({1, 0, 3, 0, 0}), "dev_zero");
  CHECK(dev_memory_free() > 0, "no free memory");
  dev_read(a.p, a.n * sizeof(floatX));
  Peaks p;
  dev_peaks(&p);
  CHECK(p.fp32 > 0 && p.bf16 > 0 && p.int8 > 0 && p.read > 0, "peaks %g %g %g %g", p.fp32, p.bf16, p.int8, p.read);
}

static void test_embedding(void) {
  const int shapes[][3] = {{70, 23, 24}, {70, 5000, 37}, {1, 1, 8}, {9, 7, 12}, {600, 40, 16}};   // R, V, C
  for (const int *s : shapes) {
    int R = s[0], V = s[1], C = s[2];
    Floats wte = randoms((size_t)V * C, 1), dout = activations((size_t)R * C, 1), grad = randoms((size_t)V * C, 1),
        want((size_t)R * C), want_grad = grad;
    Ints tokens = integers((size_t)R, V);
    Dev<float> w(wte), g(grad);
    Dev<int> t(tokens);
    Acts out((size_t)R * C), d(dout);
    reserve_scratch((size_t)R, (size_t)V, (size_t)C);
    cpu::embedding_forward(want.data(), tokens.data(), wte.data(), R, C);
    cpu::embedding_backward(want_grad.data(), dout.data(), tokens.data(), R, V, C);
    embedding_forward(out.p, t.p, w.p, R, C);
    embedding_backward(g.p, d.p, t.p, R, V, C);
    close_act("out", out.out(), want);
    close_f32("dwte", g.out(), want_grad);
  }
}

static void test_rmsnorm(void) {
  const int shapes[][2] = {{70, 24}, {3, 37}, {5, 44}, {33, 1000}, {1, 5000}};   // R, C
  for (const int *s : shapes) {
    int R = s[0], C = s[1];
    size_t n = (size_t)R * C;
    Floats x = activations(n, 2), gain = randoms((size_t)C, 1), dout = activations(n, 1), dx = activations(n, 1),
        dgain = randoms((size_t)C, 1);
    Floats want(n), want_rstd((size_t)R), want_dx = dx, want_dgain = dgain;
    Acts gx(x), gout(n), gdout(dout), gdx(dx);
    Dev<float> ggain(gain), rstd((size_t)R), gdgain(dgain);
    reserve_scratch((size_t)R, (size_t)C, (size_t)C);
    cpu::rmsnorm_forward(want.data(), want_rstd.data(), x.data(), gain.data(), R, C, 1e-5f);
    cpu::rmsnorm_backward(want_dx.data(), want_dgain.data(), dout.data(), x.data(), gain.data(), want_rstd.data(), R, C, 1);
    rmsnorm_forward(gout.p, rstd.p, gx.p, ggain.p, R, C, 1e-5f);
    rmsnorm_backward(gdx.p, gdgain.p, gdout.p, gx.p, ggain.p, rstd.p, R, C, 1);
    close_act("out", gout.out(), want);
    close_f32("rstd", rstd.out(), want_rstd);
    close_act("dx", gdx.out(), want_dx);
    close_f32("dgain", gdgain.out(), want_dgain);
  }
}

static void test_headnorm(void) {
  const int shapes[][4] = {{70, 4, 2, 64}, {5, 3, 1, 6}, {1, 2, 2, 128}};   // R, NH, NKV, HS
  for (const int *s : shapes) {
    int R = s[0], NH = s[1], NKV = s[2], HS = s[3];
    size_t n = (size_t)R * (NH + 2 * NKV) * HS, stats = (size_t)R * (NH + NKV), h = (size_t)HS;
    Floats x = activations(n, 2), qg = randoms(h, 1), kg = randoms(h, 1), d = activations(n, 1), dqg = randoms(h, 1),
        dkg = randoms(h, 1);
    Floats want(n), want_rstd(stats), want_d = d, want_dqg = dqg, want_dkg = dkg;
    Acts gx(x), gout(n), gd(d);
    Dev<float> gqg(qg), gkg(kg), rstd(stats), gdqg(dqg), gdkg(dkg);
    reserve_scratch((size_t)R, (size_t)(NH + 2 * NKV) * HS, (size_t)NH * HS);
    cpu::headnorm_forward(want.data(), want_rstd.data(), x.data(), qg.data(), kg.data(), R, NH, NKV, HS, 1e-6f);
    cpu::headnorm_backward(want_d.data(), want_dqg.data(), want_dkg.data(), x.data(), qg.data(), kg.data(), want_rstd.data(), R,
                           NH, NKV, HS);
    headnorm_forward(gout.p, rstd.p, gx.p, gqg.p, gkg.p, R, NH, NKV, HS, 1e-6f);
    headnorm_backward(gd.p, gdqg.p, gdkg.p, gx.p, gqg.p, gkg.p, rstd.p, R, NH, NKV, HS);
    close_act("out", gout.out(), want);
    close_f32("rstd", rstd.out(), want_rstd);
    close_act("dqkv", gd.out(), want_d);
    close_f32("dqgain", gdqg.out(), want_dqg);
    close_f32("dkgain", gdkg.out(), want_dkg);
  }
}

// A QAct on either side, with room for floats.
struct GpuQ {
  Dev<float> memory, s;
  QAct q;
  GpuQ(size_t R, size_t K, float lambda, int bits) : memory(R * K), s(R) { q = {memory.p, s.p, lambda, bits}; }
  std::vector<int8_t> codes(size_t n) const {
    std::vector<int8_t> v(n);
    dev_copy_out(v.data(), q.data, n);
    return v;
  }
  Floats values(size_t n) const {
    Floats v(n);
    dev_floatx_out(v.data(), (const floatX *)q.data, n);
    return v;
  }
};

struct CpuQ {
  Floats memory, s;
  cpu::QAct q;
  CpuQ(size_t R, size_t K, float lambda, int bits) : memory(R * K), s(R) { q = {memory.data(), s.data(), lambda, bits}; }
  const int8_t *codes() const { return (const int8_t *)memory.data(); }
};

// The same rows quantised on both sides.
struct BothQ {
  GpuQ gpu;
  CpuQ host;
  BothQ(const Floats &x, int R, int K, float lambda, int bits)
      : gpu((size_t)R, (size_t)K, lambda, bits), host((size_t)R, (size_t)K, lambda, bits) {
    Acts gx(x);
    act_quant_forward(&gpu.q, gx.p, R, K);
    cpu::act_quant_forward(&host.q, x.data(), R, K);
  }
};

// Codes may differ only where the value before rounding lies within 1e-5 of a tie; few of those may be.
static void same_codes(const char *name, const GpuQ &got, const CpuQ &want, size_t n, int allowed) {
  std::vector<int8_t> codes = got.codes(n);
  int differ = 0, far = 0;
  for (size_t i = 0; i < n; i++) {
    int d = codes[i] - want.codes()[i];
    differ += d != 0;
    far += d > 1 || d < -1;
  }
  CHECK(differ <= allowed && far == 0, "%s: %d of %zu codes differ (%d by more than 1), allowed %d", name, differ, n, far, allowed);
}

static void test_act_quant(void) {
  const float lambdas[] = {0, 0.3f, 1};
  const int bits[] = {8, 4, 0}, shapes[][2] = {{9, 40}, {3, 37}, {4, 44}, {1, 5003}};
  for (const int *shape : shapes) {
    for (float lambda : lambdas) {
      for (int b : bits) {
        int R = shape[0], K = shape[1];
        size_t n = (size_t)R * K;
        Floats x = activations(n, 3);
        for (int k = 0; k < K && R > 1; k++) x[(size_t)K + k] = 0;   // a row of zeros
        if (R > 2) x[2 * (size_t)K + 5] = 8192;                       // and one with an outlier
        Acts gx(x);
        GpuQ got((size_t)R, (size_t)K, lambda, b);
        CpuQ want((size_t)R, (size_t)K, lambda, b);
        act_quant_forward(&got.q, gx.p, R, K);
        cpu::act_quant_forward(&want.q, x.data(), R, K);
        if (lambda == 1 && b > 0) {
          same_codes("codes", got, want, n, 0);
          CHECK(got.s.out() == want.s, "scales differ");
        } else {
          close_act("values", got.values(n), want.memory);
        }
      }
    }
  }
  // A row with a NaN or an infinity must be seen; its neighbours must not notice.
  Floats x = activations(4 * 16, 1);
  x[16 + 3] = NAN;
  x[2 * 16 + 7] = -INFINITY;
  Acts gx(x);
  GpuQ codes(4, 16, 1, 8), values(4, 16, 0.5f, 8);
  act_quant_forward(&codes.q, gx.p, 4, 16);
  act_quant_forward(&values.q, gx.p, 4, 16);
  Floats s = codes.s.out(), v = values.values(4 * 16);
  CHECK(isfinite(s[0]) && isnan(s[1]) && isnan(s[2]) && isfinite(s[3]), "scales %g %g %g %g", s[0], s[1], s[2], s[3]);
  CHECK(isfinite(v[0]) && isnan(v[16]) && isnan(v[32]) && isfinite(v[48]), "values %g %g %g %g", v[0], v[16], v[32], v[48]);
}

static void test_norm_quant(void) {
  const float lambdas[] = {0, 0.3f, 1};
  const int shapes[][2] = {{20, 128}, {3, 37}, {4, 52}, {2, 2500}};
  for (const int *shape : shapes) {
    for (float lambda : lambdas) {
      int R = shape[0], C = shape[1];
      size_t n = (size_t)R * C;
      Floats x = activations(n, 3), gain = randoms((size_t)C, 1), want_rstd((size_t)R);
      Acts gx(x);
      Dev<float> ggain(gain), rstd((size_t)R);
      GpuQ got((size_t)R, (size_t)C, lambda, 8);
      CpuQ want((size_t)R, (size_t)C, lambda, 8);
      reserve_scratch((size_t)R, (size_t)C, (size_t)C);
      rmsnorm_quant_forward(&got.q, rstd.p, gx.p, ggain.p, R, C, 1e-5f);
      cpu::rmsnorm_quant_forward(&want.q, want_rstd.data(), x.data(), gain.data(), R, C, 1e-5f);
      close_f32("rstd", rstd.out(), want_rstd);
      if (lambda == 1) {
        same_codes("codes", got, want, n, 1 + (int)(n / 2000));
        close_f32("scales", got.s.out(), want.s);
      } else {
        // a code at a tie moves a value by lambda / 127
        close_act("values", got.values(n), want.memory, 4e-3, lambda > 0 ? 1e-2 : 1e-5);
      }
    }
  }
}

// A BitWeight on both sides from the same master weights.
struct Weight {
  Floats master, bias;
  Dev<float> gmaster, gbias, gdata, ggamma;
  Floats cdata, cgamma;
  BitWeight g;
  cpu::BitWeight c;
  Weight(int a, int b, int d, int K, int precision, bool with_bias)
      : master(randoms((size_t)(a + b + d) * K, 0.02f)), bias(randoms((size_t)(a + b + d), 1)), gmaster(master), gbias(bias),
        gdata((bitweight_bytes(a + b + d, K) + 3) / 4), ggamma((size_t)(a + b + d)), cdata((cpu::bitweight_bytes(a + b + d,
            K) + 3) / 4),
        cgamma((size_t)(a + b + d)) {
    g = {a + b + d, K, {a, b, d}, -1, precision, 0, 0, 0, gdata.p, ggamma.p, with_bias ? gbias.p : NULL};
    c = {a + b + d, K, {a, b, d}, -1, precision, 0, 0, 0, cdata.data(), cgamma.data(), with_bias ? bias.data() : NULL};
  }
  void quantize(float lambda) {
    reserve_scratch(1, (size_t)g.N, (size_t)g.K);
    weight_quantize(&g, gmaster.p, lambda);
    cpu::weight_quantize(&c, master.data(), lambda);
  }
};

static void test_weight_quantize(void) {
  const int shapes[][4] = {{40, 0, 0, 48}, {17, 9, 5, 37}, {16, 16, 0, 300}, {200, 0, 0, 130}};
  for (const int *s : shapes) {
    Weight w(s[0], s[1], s[2], s[3], PRECISION_FP32, false);
    size_t n = (size_t)w.g.N * w.g.K;
    w.quantize(1);
    Dev<int8_t> codes(n);
    bitweight_codes(codes.p, &w.g);
    std::vector<int8_t> want(n);
    cpu::bitweight_codes(want.data(), &w.c);
    CHECK(codes.out() == want, "codes differ at %d+%d+%d x %d", s[0], s[1], s[2], s[3]);
    CHECK(w.ggamma.out() == w.cgamma, "gamma differs");
    w.quantize(0.3f);
    Floats values(n);
    dev_floatx_out(values.data(), (const floatX *)w.g.data, n);
    close_act("values", values, Floats(w.cdata.begin(), w.cdata.begin() + (long)n));
  }
  for (size_t n : {(size_t)3 * 7, (size_t)90 * 300}) {   // codes before and after some weights have moved
    int rows = n == 21 ? 3 : 90, K = (int)n / rows;
    Floats master = randoms(n, 1);
    std::vector<int8_t> codes(n);
    Dev<float> gmaster(master);
    Dev<int8_t> gcodes(codes);
    Dev<int64_t> counts(2);
    int64_t want[2];
    for (int round = 0; round < 2; round++) {
      for (size_t i = 0; i < n; i += 5) master[i] += 0.7f;
      dev_copy_in(gmaster.p, master.data(), n * sizeof(float));
      weight_changes(counts.p, gcodes.p, gmaster.p, rows, K);
      cpu::weight_changes(want, codes.data(), master.data(), rows, K);
      std::vector<int64_t> got = counts.out();
      CHECK(got[0] == want[0] && got[1] == want[1], "zeros %ld, changes %ld, expected %ld, %ld", (long)got[0], (long)got[1],
            (long)want[0], (long)want[1]);
      CHECK(gcodes.out() == codes, "codes differ");
    }
  }
  Weight w(8, 8, 0, 16, PRECISION_BF16, false);
  w.master[8 * 16 + 3] = NAN;
  dev_copy_in(w.gmaster.p, w.master.data(), w.master.size() * sizeof(float));
  w.quantize(1);
  Floats gamma = w.ggamma.out();
  CHECK(isfinite(gamma[0]) && isnan(gamma[8]), "gamma of the parts: %g %g, the second has a NaN among its weights", gamma[0],
        gamma[8]);
}

// Relative norm of one bf16 product with fp32 sums against the CPU's, which rounds the same operands.
static const double PRODUCT = 6e-3;

static void test_bitlinear_forward(void) {
  // R, parts, K
  const int shapes[][5] = {{1, 40, 0, 0, 48},    {9, 17, 9, 6, 37},   {20, 16, 16, 0, 136},
                           {70, 130, 0, 0, 264}, {130, 24, 8, 8, 40}, {67, 9, 8, 4, 37}, {66, 12, 8, 0, 20}};
  for (const int *s : shapes) {
    for (int variant = 0; variant < 12; variant++) {
      int R = s[0], K = s[4], precision = variant % 2, bits = variant / 2 % 3 == 2 ? 0 : 8;
      float lambda = variant / 2 % 3 == 1 ? 0.3f : 1.0f;
      bool bias = variant >= 6;
      Weight w(s[1], s[2], s[3], K, precision, bias);
      size_t n = (size_t)R * w.g.N;
      Floats x = activations((size_t)R * K, 1), residual = activations(n, 1), want(n);
      Acts gres(residual), out(n);
      BothQ q(x, R, K, lambda, bits);
      w.quantize(lambda);
      reserve_scratch((size_t)R, (size_t)w.g.N, (size_t)K);
      bitlinear_forward(out.p, &q.gpu.q, &w.g, bias ? NULL : gres.p, R);
      cpu::bitlinear_forward(want.data(), &q.host.q, &w.c, bias ? NULL : residual.data(), R);
      if (lambda == 1 && bits > 0) {   // integers: the same bits, after the same rounding to activations
        Acts rounded_want(want);
        CHECK(out.same_bits(rounded_want), "integer product differs: R %d N %d K %d", R, w.g.N, K);
        Acts blas(n);   // the library's path takes every shape
        CHECK(blas_integer_forward(blas.p, &q.gpu.q, &w.g, bias ? NULL : gres.p, R) && blas.same_bits(out),
              "R %d N %d K %d by the library", R, w.g.N, K);
      } else {
        // A mix that differs in its last fp32 bit (a fused multiply-add) may be rounded to the other bf16 neighbour.
        double bound = precision == PRECISION_FP32 ? 1e-5 : lambda < 1 ? 1e-3 : 2e-5;
        close_act("out", out.out(), want, PRODUCT, bound);
      }
    }
  }
}

// The packed form on both sides: codes, scales, products; from master weights and from codes; few rows, many, and unpacked in pieces.
static void test_packed(void) {
  const int shapes[][4] = {{40, 0, 0, 48}, {17, 9, 6, 37}, {6, 3, 7, 300}, {130, 30, 40, 264}};   // parts, K
  const int rows[] = {1, 8, 9, 33, 64, 65, 130};
  for (const int *s : shapes) {
    for (int variant = 0; variant < 4; variant++) {
      int K = s[3], first = 0;
      size_t kept[2] = {operand_bytes, sums_bytes};
      Weight w(s[0], s[1], s[2], K, PRECISION_BF16, variant % 2);
      size_t N = (size_t)w.g.N, n = N * K;
      w.quantize(1);
      if (variant >= 2) operand_bytes = sums_bytes = 20 * (size_t)K;   // unpacked 16 outputs at a time
      Dev<char> packed(bitweight_packed_bytes((int)N, K));
      std::vector<char> cpu_packed(cpu::bitweight_packed_bytes((int)N, K));
      Dev<float> gamma(N);
      Floats cpu_gamma(N);
      BitWeight g = w.g;
      cpu::BitWeight c = w.c;
      g.data = packed.p, g.gamma = gamma.p;
      c.data = cpu_packed.data(), c.gamma = cpu_gamma.data();
      for (int part = 0; part < 3; part++, first += s[part - 1]) {
        if (s[part] == 0) continue;
        size_t at = (size_t)first * K, size = (size_t)s[part] * K;
        cpu::weight_pack(&c, part, w.master.data() + at);
        if (variant % 2) {
          std::vector<int8_t> codes((size_t)N * K);
          cpu::bitweight_codes(codes.data(), &w.c);
          Dev<int8_t> gcodes(std::vector<int8_t>(codes.begin() + (long)at, codes.begin() + (long)(at + size)));
          int half = s[part] / 2;   // in two calls
          weight_pack_codes(&g, part, gcodes.p + (size_t)half * K, half, s[part] - half, w.cgamma[(size_t)first]);
          if (half > 0) weight_pack_codes(&g, part, gcodes.p, 0, half, w.cgamma[(size_t)first]);
        } else {
          weight_pack(&g, part, w.gmaster.p + at);
        }
      }
      Dev<int8_t> codes(n);
      bitweight_codes(codes.p, &g);
      std::vector<int8_t> want(n);
      cpu::bitweight_codes(want.data(), &c);
      CHECK(codes.out() == want, "codes differ at %d+%d+%d x %d", s[0], s[1], s[2], K);
      CHECK(gamma.out() == cpu_gamma, "gamma differs at %d+%d+%d x %d", s[0], s[1], s[2], K);
      for (int R : rows) {
        Floats x = activations((size_t)R * K, 1), residual = activations((size_t)R * N, 1), y((size_t)R * N);
        Acts gres(residual), out((size_t)R * N);
        BothQ q(x, R, K, 1, 8);
        reserve_scratch((size_t)R, N, (size_t)K);
        bitlinear_forward(out.p, &q.gpu.q, &g, gres.p, R);
        cpu::bitlinear_forward(y.data(), &q.host.q, &c, residual.data(), R);
        Acts rounded_want(y);
        CHECK(out.same_bits(rounded_want), "packed product differs: R %d N %zu K %d variant %d", R, N, K, variant);
      }
      operand_bytes = kept[0], sums_bytes = kept[1];
    }
  }
}

static void test_bitlinear_backward(void) {
  const int shapes[][5] = {{5, 40, 0, 0, 48}, {70, 17, 9, 6, 37}, {40, 16, 16, 0, 136}, {9, 12, 8, 0, 20}};
  for (const int *s : shapes) {
    for (int variant = 0; variant < 12; variant++) {
      int R = s[0], K = s[4], precision = variant % 2, bits = variant / 2 % 3 == 2 ? 0 : 8;
      float lambda = variant / 2 % 3 == 1 ? 0.3f : 1.0f;
      bool bias = variant >= 6;
      size_t bounds[2] = {operand_bytes, sums_bytes};
      if (bias) operand_bytes = 2000;   // forces conversion in several pieces
      Weight w(s[1], s[2], s[3], K, precision, bias);
      size_t n = (size_t)R * w.g.N, nw = (size_t)w.g.N * K;
      Floats x = activations((size_t)R * K, 1), dout = activations(n, 1), dw = randoms(nw, 1), db = randoms((size_t)w.g.N, 1);
      Floats want_dx((size_t)R * K), want_dw = dw, want_db = db;
      Acts gdout(dout), dx((size_t)R * K);
      Dev<float> gdw(dw), gdb(db);
      BothQ q(x, R, K, lambda, bits);
      w.quantize(lambda);
      reserve_scratch((size_t)R, (size_t)w.g.N, (size_t)K);
      bitlinear_backward(dx.p, gdw.p, bias ? gdb.p : NULL, gdout.p, &q.gpu.q, &w.g, R);
      cpu::bitlinear_backward(want_dx.data(), want_dw.data(), bias ? want_db.data() : NULL, dout.data(), &q.host.q, &w.c, R);
      bool fp32 = precision == PRECISION_FP32;   // in the fp32 build; bf16 operands are rounded at different places on the two sides
      close_act("dx", dx.out(), want_dx, PRODUCT, fp32 ? 1e-5 : 6e-3);
      close_act("dw", gdw.out(), want_dw, PRODUCT, fp32 ? 1e-5 : 6e-3);
      close_f32("dbias", gdb.out(), want_db);
      operand_bytes = bounds[0];
    }
  }
}

/*
dx_int8: the codes of the rounded gradient, and so dx, are the CPU's bit for bit, in one piece and in several; dw is what it is
without; another key gives another dx; a row that is not finite is seen, and only there.
*/
static void test_dx_int8(void) {
  const int shapes[][5] = {{5, 40, 0, 0, 48}, {70, 17, 9, 6, 37}, {40, 16, 16, 0, 136}, {9, 12, 8, 0, 20}, {3, 5, 0, 0, 5}};
  for (const int *s : shapes) {
    for (int pieces = 0; pieces < 2; pieces++) {
      int R = s[0], K = s[4];
      size_t kept = sums_bytes;
      if (pieces) sums_bytes = 2000;
      Weight w(s[1], s[2], s[3], K, PRECISION_BF16, false), exact(s[1], s[2], s[3], K, PRECISION_BF16, false);
      size_t N = (size_t)w.g.N, n = (size_t)R * N;
      w.g.dx_int8 = w.c.dx_int8 = 1;
      w.g.noise = w.c.noise = 0x123456789ABCDEFull;
      dev_copy(exact.gmaster.p, w.gmaster.p, N * (size_t)K * sizeof(float));
      Floats x = activations((size_t)R * K, 1), dout = activations(n, 1), dw(N * K), want((size_t)R * K), want_dw = dw;
      for (size_t k = 0; k < N; k++) dout[N + k] = 0;                  // a row without gradient
      Acts gdout(dout), dx((size_t)R * K), other((size_t)R * K);
      Dev<float> gdw(dw), gdw_exact(dw);
      BothQ q(x, R, K, 1, 8);
      w.quantize(1);
      reserve_scratch((size_t)R, N, (size_t)K);
      weight_quantize(&exact.g, exact.gmaster.p, 1);
      bitlinear_backward(other.p, gdw_exact.p, NULL, gdout.p, &q.gpu.q, &exact.g, R);
      bitlinear_backward(dx.p, gdw.p, NULL, gdout.p, &q.gpu.q, &w.g, R);
      cpu::bitlinear_backward(want.data(), want_dw.data(), NULL, dout.data(), &q.host.q, &w.c, R);
      Acts rounded_want(want);
      CHECK(dx.same_bits(rounded_want), "dx differs from the CPU's: R %d N %zu K %d pieces %d", R, N, K, pieces);
      CHECK(norm_error(dx.out(), other.out()) < 0.02, "dx is %.3g off the exact one", norm_error(dx.out(), other.out()));
      CHECK(gdw.out() == gdw_exact.out(), "dw depends on dx_int8");
      w.g.noise++;
      bitlinear_backward(other.p, gdw.p, NULL, gdout.p, &q.gpu.q, &w.g, R);
      CHECK(!other.same_bits(dx), "another key gives the same dx");
      dout[2 * N + 3] = pieces ? NAN : INFINITY;
      Acts bad(dout);
      bitlinear_backward(dx.p, gdw.p, NULL, bad.p, &q.gpu.q, &w.g, R);
      Floats got = dx.out();
      CHECK(isnan(got[2 * (size_t)K]) && isfinite(got[0]) && got[(size_t)K] == 0, "rows 0, 1, 2: %g %g %g", got[0], got[(size_t)K],
            got[2 * (size_t)K]);
      sums_bytes = kept;
    }
  }
}

static void test_linear(void) {
  const int shapes[][3] = {{1, 70, 40}, {16, 300, 64}, {17, 130, 37}, {140, 33, 72}};   // R, N, K
  for (const int *s : shapes) {
    for (int variant = 0; variant < 4; variant++) {
      int R = s[0], N = s[1], K = s[2], precision = variant % 2;
      size_t kept = operand_bytes;
      if (variant >= 2) operand_bytes = 3000;
      Floats x = activations((size_t)R * K, 1), w = randoms((size_t)N * K, 0.1f), dout = activations((size_t)R * N, 1),
          dw = randoms((size_t)N * K, 1);
      Floats want((size_t)R * N), want_dx((size_t)R * K), want_dw = dw;
      Acts gx(x), gdout(dout), out((size_t)R * N), dx((size_t)R * K);
      Dev<float> gw(w), gdw(dw);
      reserve_scratch((size_t)R, (size_t)N, (size_t)K);
      linear_forward(out.p, gx.p, gw.p, R, N, K, precision);
      linear_backward(dx.p, gdw.p, gdout.p, gx.p, gw.p, R, N, K, precision);
      cpu::linear_forward(want.data(), x.data(), w.data(), R, N, K, precision);
      cpu::linear_backward(want_dx.data(), want_dw.data(), dout.data(), x.data(), w.data(), R, N, K, precision);
      close_act("out", out.out(), want, PRODUCT, 2e-5);
      close_act("dx", dx.out(), want_dx, PRODUCT, 2e-5);
      close_act("dw", gdw.out(), want_dw, PRODUCT, 2e-5);
      operand_bytes = kept;
    }
  }
}

// Embedding, logits and the largest logit of a model that only runs; tables in both formats.
static void test_head(void) {
  const int shapes[][3] = {{1, 70, 40}, {17, 300, 64}, {70, 133, 37}};   // R, V, C
  for (const int *s : shapes) {
    for (int variant = 0; variant < 4; variant++) {
      int R = s[0], V = s[1], C = s[2], half = variant % 2, precision = variant / 2;
      Floats x = activations((size_t)R * C, 1), w = randoms((size_t)V * C, 0.1f), want((size_t)R * V), want_rows((size_t)R * C);
      if (half) for (float &v : w) v = to_float(__float2bfloat16(v));
      for (int c = 0; c < C; c++) w[(size_t)(V - 1) * C + c] = w[(size_t)(V / 2) * C + c];   // two equal logits in every row
      Ints tokens = integers((size_t)R, V);
      Acts gx(x), logits((size_t)R * V), rows((size_t)R * C);
      Dev<float> gw(w);
      Dev<int> gt(tokens), best((size_t)R);
      Dev<char> table(head_table_bytes(V, C, half));
      std::vector<char> memory(cpu::head_table_bytes(V, C, half));
      Head h = {V, C, half, precision, table.p, NULL};
      cpu::Head ch = {V, C, half, precision, memory.data(), NULL};
      reserve_scratch((size_t)R, (size_t)V, (size_t)C);
      for (int v = 0; v < V; v += 50) {
        int n = V - v < 50 ? V - v : 50;
        head_rows(&h, gw.p + (size_t)v * C, v, n);
        cpu::head_rows(&ch, w.data() + (size_t)v * C, v, n);
      }
      head_embedding(rows.p, gt.p, &h, R);
      cpu::head_embedding(want_rows.data(), tokens.data(), &ch, R);
      Acts rounded_rows(want_rows);
      CHECK(rows.same_bits(rounded_rows), "embeddings differ");
      head_forward(logits.p, gx.p, &h, R);
      cpu::head_forward(want.data(), x.data(), &ch, R);
      close_act("logits", logits.out(), want, PRODUCT, 2e-5);
      Dev<char> scratch(head_scratch_bytes(V, C));
      ops_set_scratch(scratch.p, scratch.n);
      head_argmax(best.p, gx.p, &h, R, V);
      Floats z = logits.out();
      Ints got = best.out();
      for (int r = 0; r < R; r++) {
        int top = 0;
        for (int v = 1; v < V; v++) top = z[(size_t)r * V + v] > z[(size_t)r * V + top] ? v : top;
        CHECK(got[(size_t)r] == top, "row %d of %d: token %d, the largest logit has %d", r, R, got[(size_t)r], top);
      }
    }
  }
  // What comparisons of floats do at their edges; V = 10 of 16 columns, the others would win.
  const float inf = INFINITY, nan = NAN;
  const struct { float z[10]; int best; } edges[] = {
      {{-3, -1, -2, -1, -5, -9, -9, -9, -9, -9}, 1}, {{-0.0f, 0, 0, -0.0f, -1, -1, -1, -1, -1, -1}, 0},
      {{-inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf}, 0}, {{-inf, nan, -inf, -1e30f, nan, 0, 0, 0, 0, nan}, 5},
      {{nan, 5, inf, 5, 5, 5, 5, 5, 5, 5}, 0}, {{1, nan, inf, nan, inf, 5, 5, 5, 5, 5}, 2}, {{0, 0, 0, 0, 0, 0, 0, 0, 0, 1e-30f}, 9}};
  for (const auto &e : edges) {
    for (int columns = 15; columns <= 16; columns++) {
      Floats z(2 * 16, inf);
      for (int r = 0; r < 2; r++) std::copy(e.z, e.z + 10, z.begin() + (long)r * columns);
      Acts gz(z);
      Dev<int> best(2);
      int width = width_of((size_t)columns);
      LAUNCH_WIDTH(width, argmax_kernel, 2, 32, 0, best.p, gz.p, columns, 10);
      Ints got = best.out();
      CHECK(got[0] == e.best && got[1] == e.best, "tokens %d and %d, expected %d", got[0], got[1], e.best);
    }
  }
}

static void test_rope(void) {
  const int shapes[][4] = {{30, 3, 1, 64}, {7, 2, 2, 6}, {5, 2, 1, 8}};
  for (const int *s : shapes) {
    int R = s[0], NH = s[1], NKV = s[2], HS = s[3], positions = 40;
    size_t n = (size_t)R * (NH + 2 * NKV) * HS;
    Floats x = activations(n, 1), angles((size_t)positions * HS), want = x;
    Ints pos = integers((size_t)R, positions);
    for (int p = 0; p < positions; p++) {
      for (int i = 0; i < HS / 2; i++) {
        angles[(size_t)p * HS + i] = cosf((float)p / (float)(i + 1));
        angles[(size_t)p * HS + HS / 2 + i] = sinf((float)p / (float)(i + 1));
      }
    }
    Acts gx(x);
    Dev<int> gpos(pos);
    Dev<float> gangles(angles);
    rope_apply(gx.p, gpos.p, gangles.p, R, NH, NKV, HS, 1);
    cpu::rope_apply(want.data(), pos.data(), angles.data(), R, NH, NKV, HS, 1);
    close_act("forward", gx.out(), want);
    rope_apply(gx.p, gpos.p, gangles.p, R, NH, NKV, HS, -1);
    close_act("there and back", gx.out(), x, 6e-3);
  }
}

// Document starts: new documents begin at some positions of each row.
static Ints document_starts(int B, int T, int documents) {
  Ints start((size_t)B * T);
  for (int b = 0; b < B; b++) {
    int s = 0;
    for (int t = 0; t < T; t++) {
      if (documents && t > 0 && rng_below(7, RNG_TEST, draws++, 29) == 0) s = t;
      start[(size_t)b * T + t] = s;
    }
  }
  return start;
}

static void test_attention(void) {
  const int shapes[][6] = {   // B, T, NH, NKV, HS, documents
      {2, 20, 4, 2, 6, 1},   {1, 1, 2, 1, 64, 0},   {2, 70, 2, 1, 64, 1}, {1, 200, 2, 2, 64, 1}, {1, 130, 2, 1, 128, 1},
      {1, 64, 1, 1, 128, 0}, {1, 40, 2, 1, 34, 1}, {1, 200, 1, 1, 64, 0}, {1, 200, 1, 1, 128, 0}};
  for (const int *s : shapes) {
    int B = s[0], T = s[1], NH = s[2], NKV = s[3], HS = s[4];
    size_t rows = (size_t)B * T, n = rows * (NH + 2 * NKV) * HS, no = rows * NH * HS;
    Floats qkv = activations(n, 1), dout = activations(no, 1), want(no), want_lse(rows * NH), want_d(n);
    Ints start = document_starts(B, T, s[5]);
    Acts gqkv(qkv), gdout(dout), out(no), d(n);
    Dev<float> lse(rows * NH);
    Dev<int> gstart(start);
    reserve_scratch(rows, (size_t)(NH + 2 * NKV) * HS, (size_t)NH * HS);
    attention_forward(out.p, lse.p, gqkv.p, gstart.p, B, T, NH, NKV, HS, PRECISION_FP32);
    cpu::attention_forward(want.data(), want_lse.data(), qkv.data(), start.data(), B, T, NH, NKV, HS, PRECISION_FP32);
    close_act("out", out.out(), want);
    close_f32("lse", lse.out(), want_lse);
    attention_backward(d.p, gdout.p, out.p, lse.p, gqkv.p, gstart.p, B, T, NH, NKV, HS, PRECISION_FP32);
    cpu::attention_backward(want_d.data(), dout.data(), want.data(), want_lse.data(), qkv.data(), start.data(), B, T, NH, NKV, HS,
                            PRECISION_FP32);
    close_act("dqkv", d.out(), want_d, 8e-3, 2e-5);
  }
}

/*
Two sequences in one cache, a prompt in one call and then position by position. Against the CPU, and, because sequences start at
position 0, bit for bit against the training kernel.
*/
static void test_attention_cached(void) {
  const int shapes[][4] = {{2, 1, 64, 140}, {3, 3, 6, 20}, {20, 1, 64, 10}, {4, 2, 128, 67}, {2, 1, 12, 30}};   // NH, NKV, HS, length
  for (const int *s : shapes) {
    int NH = s[0], NKV = s[1], HS = s[2], T = s[3], capacity = (T / KV_BLOCK + 1) * KV_BLOCK, sequences = 2;
    int prompt = T < 100 ? T - 2 : 3;
    size_t QKV = (size_t)(NH + 2 * NKV) * HS, O = (size_t)NH * HS, cache = (size_t)sequences * capacity * NKV * HS;
    Floats qkv = activations((size_t)sequences * T * QKV, 1), want_all((size_t)sequences * T * O), lse((size_t)sequences * T * NH);
    Ints start((size_t)sequences * T);
    Acts gqkv(qkv), training((size_t)sequences * T * O), kc(cache), vc(cache);
    Dev<float> glse((size_t)sequences * T * NH);
    Dev<int> gstart(start);
    attention_forward(training.p, glse.p, gqkv.p, gstart.p, sequences, T, NH, NKV, HS, PRECISION_FP32);
    cpu::attention_forward(want_all.data(), lse.data(), qkv.data(), start.data(), sequences, T, NH, NKV, HS, PRECISION_FP32);
    Floats train = training.out();
    for (int done = 0; done < T; done += done == 0 ? prompt : 1) {
      int rows_each = done == 0 ? prompt : 1, R = rows_each * sequences;
      Ints seq, pos;
      Floats in, want, from_training;
      for (int b = sequences - 1; b >= 0; b--) {   // the order of sequences in a call is free
        for (int t = done; t < done + rows_each; t++) {
          size_t bt = (size_t)b * T + t;
          seq.push_back(b);
          pos.push_back(t);
          in.insert(in.end(), qkv.begin() + (long)(bt * QKV), qkv.begin() + (long)((bt + 1) * QKV));
          want.insert(want.end(), want_all.begin() + (long)(bt * O), want_all.begin() + (long)((bt + 1) * O));
          from_training.insert(from_training.end(), train.begin() + (long)(bt * O), train.begin() + (long)((bt + 1) * O));
        }
      }
      Acts gin(in), out((size_t)R * O);
      Dev<int> gseq(seq), gpos(pos);
      attention_cached(out.p, kc.p, vc.p, gin.p, gseq.p, gpos.p, R, capacity, NH, NKV, HS, PRECISION_FP32);
      close_act("out", out.out(), want);
      CHECK(out.out() == from_training, "NH %d HS %d: the cache gives other bits than training, positions %d..%d", NH, HS, done,
            done + rows_each - 1);
    }
  }
}

static void test_glu(void) {
  const int shapes[][2] = {{40, 48}, {3, 37}, {4, 36}, {2, 3000}};
  for (const int *s : shapes) {
    for (int variant = 0; variant < 8; variant++) {
      int R = s[0], F = s[1], act = variant % 2 ? ACT_SILU : ACT_RELU2;
      bool normed = variant / 2 % 2;
      float lambda = variant / 4 ? 0.3f : 1;
      size_t n = (size_t)R * F;
      Floats x = activations(2 * n, 1), gain = randoms((size_t)F, 1), dout = activations(n, 1), dgain = randoms((size_t)F, 1);
      Floats want_rstd((size_t)R), want_d(2 * n), want_dgain = dgain, dout_copy = dout;
      Acts gx(x), gdout(dout), d(2 * n);
      Dev<float> ggain(gain), gdgain(dgain), rstd((size_t)R);
      GpuQ got((size_t)R, (size_t)F, lambda, 8);
      CpuQ want((size_t)R, (size_t)F, lambda, 8);
      reserve_scratch((size_t)R, (size_t)2 * F, (size_t)F);
      glu_quant_forward(&got.q, rstd.p, gx.p, normed ? ggain.p : NULL, R, F, act, 1e-5f);
      cpu::glu_quant_forward(&want.q, want_rstd.data(), x.data(), normed ? gain.data() : NULL, R, F, act, 1e-5f);
      close_f32("rstd", rstd.out(), want_rstd);
      if (lambda == 1) {
        same_codes("codes", got, want, n, 1 + (int)(n / 1000));
        close_f32("scales", got.s.out(), want.s);
      } else {
        close_act("values", got.values(n), want.memory, 4e-3, 1e-2);
      }
      glu_backward(d.p, normed ? gdgain.p : NULL, gdout.p, gx.p, normed ? ggain.p : NULL, rstd.p, R, F, act);
      cpu::glu_backward(want_d.data(), normed ? want_dgain.data() : NULL, dout_copy.data(), x.data(), normed ? gain.data() : NULL,
                        want_rstd.data(), R, F, act);
      close_act("dgate_up", d.out(), want_d);
      close_f32("dgain", gdgain.out(), want_dgain);
    }
  }
}

static void test_cross_entropy(void) {
  const int shapes[][2] = {{7, 40}, {3, 37}, {3, 44}, {2, 9001}, {2, 9000}};
  for (const int *s : shapes) {
    int R = s[0], V = s[1];
    Floats logits = activations((size_t)R * V, 4), coef = randoms((size_t)R, 1), want_losses((size_t)R), want_lse((size_t)R),
        want = logits;
    Ints targets = integers((size_t)R, V);
    targets[1] = -1;
    Acts g(logits);
    Dev<int> gt(targets);
    Dev<float> gc(coef), losses((size_t)R), lse((size_t)R);
    cross_entropy_forward(losses.p, lse.p, g.p, gt.p, R, V);
    cross_entropy_backward(g.p, lse.p, gt.p, gc.p, R, V);
    cpu::cross_entropy_forward(want_losses.data(), want_lse.data(), logits.data(), targets.data(), R, V);
    cpu::cross_entropy_backward(want.data(), want_lse.data(), targets.data(), coef.data(), R, V);
    close_f32("losses", losses.out(), want_losses);
    close_f32("lse", lse.out(), want_lse);
    Floats got = g.out();
    got.insert(got.end(), coef.begin(), coef.end());   // p - 1 may cancel; errors are relative to the coefficient
    want.insert(want.end(), coef.begin(), coef.end());
    close_act("dlogits", got, want);
  }
  // A single -infinity among the logits is a probability of 0, not a NaN.
  Floats logits = {1, -INFINITY, 2};
  Acts g(logits);
  Dev<int> gt(Ints{0});
  Dev<float> losses(1), lse(1);
  cross_entropy_forward(losses.p, lse.p, g.p, gt.p, 1, 3);
  CHECK(fabsf(losses.out()[0] - 1.3132617f) < 1e-5f, "loss %g", losses.out()[0]);
}

static void test_policy(void) {
  const int shapes[][2] = {{7, 40}, {3, 37}, {3, 44}, {2, 9001}, {2, 9000}};
  for (const int *s : shapes) {
    int R = s[0], V = s[1];
    Floats logits = activations((size_t)R * V, 2), ref = activations((size_t)R * V, 2), coef = randoms((size_t)R, 1),
           kl_coef = randoms((size_t)R, 1), losses((size_t)R), lse((size_t)R), ref_lse((size_t)R), want_kl((size_t)R), want = logits;
    Ints targets = integers((size_t)R, V);
    targets[1] = -1;
    cpu::cross_entropy_forward(losses.data(), lse.data(), logits.data(), targets.data(), R, V);
    cpu::cross_entropy_forward(losses.data(), ref_lse.data(), ref.data(), targets.data(), R, V);
    Acts g(logits), q(ref);
    Dev<int> gt(targets);
    Dev<float> gc(coef), gk(kl_coef), gl(lse), gr(ref_lse), kl((size_t)R);
    policy_backward(kl.p, g.p, gl.p, q.p, gr.p, gt.p, gc.p, gk.p, R, V);
    cpu::policy_backward(want_kl.data(), want.data(), lse.data(), ref.data(), ref_lse.data(), targets.data(), coef.data(),
                         kl_coef.data(), R, V);
    close_f32("kl", kl.out(), want_kl);
    Floats got = g.out();
    got.insert(got.end(), coef.begin(), coef.end());   // errors are relative to the coefficients
    want.insert(want.end(), coef.begin(), coef.end());
    close_act("dlogits", got, want);
  }
}

static void test_optimizer(void) {
  const size_t sizes[] = {1, 37, 44, 4096, 20001};
  for (size_t n : sizes) {
    Floats p = randoms(n, 1), m = randoms(n, 0.1f), v = randoms(n, 0.1f), g = randoms(n, 1);
    for (float &x : v) x *= x;
    Dev<float> gp(p), gm(m), gv(v), gg(g);
    Dev<double> norm(1);
    double want_norm;
    reserve_scratch(1, 1, 1);
    sum_squares(norm.p, gg.p, n);
    cpu::sum_squares(&want_norm, g.data(), n);
    CHECK(fabs(norm.out()[0] - want_norm) <= 1e-12 * want_norm, "sum of squares %.15g, expected %.15g", norm.out()[0], want_norm);
    Floats before = p;
    std::vector<Segment> segments;
    std::vector<cpu::Segment> cpu_segments;   // every second one decays; sizes 8, 16, 24, ...
    for (size_t first = 0, k = 1; first < n; first += 8 * k++) {
      segments.push_back({first, (int)(k % 2)});
      cpu_segments.push_back({first, (int)(k % 2)});
    }
    Dev<Segment> gs(segments);
    for (int t = 3; t < 5; t++) {   // once without segments
      int count = t == 3 ? (int)segments.size() : 0;
      adamw_update(gp.p, gm.p, gv.p, gg.p, n, gs.p, count, 0.7f, 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, t);
      cpu::adamw_update(p.data(), m.data(), v.data(), g.data(), n, cpu_segments.data(), count, 0.7f, 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f,
                        t);
      close_f32("p", gp.out(), p);
      close_f32("m", gm.out(), m);
      close_f32("v", gv.out(), v);
    }
  }
  // Where the gradient is 0 what is left is decay.
  const size_t n = 100;
  Dev<float> p(Floats(n, 1.0f)), m(n), v(n), g(n);
  Dev<Segment> segments(std::vector<Segment>({{0, 0}, {24, 1}, {40, 0}, {88, 1}}));
  adamw_update(p.p, m.p, v.p, g.p, n, segments.p, 4, 1, 0.5f, 0.9f, 0.95f, 1e-8f, 0.5f, 1);
  Floats got = p.out();
  for (size_t i = 0; i < n; i++) CHECK(got[i] == ((i >= 24 && i < 40) || i >= 88 ? 0.75f : 1.0f), "p[%zu] = %g", i, got[i]);
}

/*
A recorded stretch does with new contents of memory what its ops do, also when the scratch memory has moved in between. The old scratch
memory is freed, so a graph that still used it would be noticed.
*/
static void test_graph(void) {
  const int R = 3, C = 40, N = 24;
  Weight w(N, 0, 0, C, PRECISION_BF16, false);
  w.quantize(1);
  Acts x((size_t)R * C), copy((size_t)R * C), plain((size_t)R * N), replayed((size_t)R * N);
  GpuQ q((size_t)R, (size_t)C, 1, 8);
  Dev<float> sum((size_t)N);
  Graph graph = {NULL, 0, 0};
  void *scratch = NULL;
  int recorded = 0;
  for (int run = 0; run < 8; run++) {
    if (run % 4 == 0) {
      dev_free(scratch);
      scratch = dev_malloc(ops_scratch_bytes((size_t)R, (size_t)N, (size_t)C));
      ops_set_scratch(scratch, ops_scratch_bytes((size_t)R, (size_t)N, (size_t)C));
    }
    Floats in = activations((size_t)R * C, 1), want((size_t)N), start = randoms((size_t)N, 1);
    dev_floatx_in(x.p, in.data(), in.size());
    dev_copy_in(sum.p, start.data(), start.size() * sizeof(float));
    if (dev_graph_begin(&graph)) {
      dev_copy(copy.p, x.p, (size_t)R * C * sizeof(floatX));
      act_quant_forward(&q.q, copy.p, R, C);
      bitlinear_forward(replayed.p, &q.q, &w.g, NULL, R);
      add_column_sums(sum.p, replayed.p, R, N);   // needs scratch
      dev_graph_end(&graph);
    } else {
      recorded++;
    }
    act_quant_forward(&q.q, x.p, R, C);
    bitlinear_forward(plain.p, &q.q, &w.g, NULL, R);
    CHECK(plain.same_bits(replayed), "run %d: other bits than the same ops alone", run);
    Floats y = plain.out();
    for (int n = 0; n < N; n++) {
      want[(size_t)n] = start[(size_t)n];
      float column = 0;
      for (int r = 0; r < R; r++) column += y[(size_t)r * N + n];
      want[(size_t)n] += column;
    }
    close_f32("sum", sum.out(), want);
  }
  CHECK(recorded == 5, "%d of 8 runs were replayed, expected 5: not the first two, and not the one after the move", recorded);
  dev_graph_free(&graph);
  dev_free(scratch);
}

/*
The bits of a row depend on that row alone: the same row 0 alone, among 17 and among 140 rows, through different kernels and tile
sizes.
*/
static void test_rows_alone(void) {
  const int counts[] = {1, 17, 140};
  const int C = 72, F = 40, V = 70;
  Floats x = activations(140 * (size_t)C, 1), gate_up = activations(140 * 2 * (size_t)F, 1), gain = randoms((size_t)C, 1),
      head = randoms((size_t)V * C, 0.1f);
  Weight w(30, 10, 8, C, PRECISION_BF16, true), v(48, 0, 0, C, PRECISION_BF16, false);
  w.quantize(1);
  v.quantize(0.3f);
  Acts gx(x), ggu(gate_up);
  Dev<float> ggain(gain), ghead(head), rstd(140);
  std::vector<Floats> first;
  for (int R : counts) {
    GpuQ codes(140, C, 1, 8), values(140, C, 0.3f, 8), floats(140, C, 1, 0), u(140, F, 1, 8);
    Acts normed(140 * (size_t)C), a(140 * 48), b(140 * 48), c(140 * 48), logits(140 * (size_t)V);
    reserve_scratch((size_t)R, 100, 100);
    rmsnorm_forward(normed.p, rstd.p, gx.p, ggain.p, R, C, 1e-5f);
    rmsnorm_quant_forward(&codes.q, rstd.p, gx.p, ggain.p, R, C, 1e-5f);
    act_quant_forward(&values.q, gx.p, R, C);
    act_quant_forward(&floats.q, gx.p, R, C);
    glu_quant_forward(&u.q, NULL, ggu.p, NULL, R, F, ACT_SILU, 1e-5f);
    bitlinear_forward(a.p, &codes.q, &w.g, NULL, R);
    bitlinear_forward(b.p, &floats.q, &w.g, NULL, R);
    bitlinear_forward(c.p, &values.q, &v.g, NULL, R);
    linear_forward(logits.p, gx.p, ghead.p, R, V, C, PRECISION_BF16);
    std::vector<Floats> row = {normed.out(), a.out(), b.out(), c.out(), logits.out(), codes.s.out(), u.s.out()};
    const size_t widths[] = {(size_t)C, 48, 48, 48, (size_t)V, 1, 1};
    for (size_t i = 0; i < row.size(); i++) {
      row[i].resize(widths[i]);
      if (first.size() > i) CHECK(row[i] == first[i], "output %zu of row 0 differs among %d rows", i, R);
      else first.push_back(row[i]);
    }
  }
}

// Documents packed into one row give the bits that each has alone.
static void test_packed_documents(void) {
  const int lengths[] = {5, 90, 64, 41}, T = 200, NH = 2, NKV = 1, HS = 64, QKV = (NH + 2 * NKV) * HS, O = NH * HS;
  Floats qkv = activations((size_t)T * QKV, 1);
  Ints start((size_t)T);
  for (int i = 0, t = 0; i < 4; i++) {
    for (int end = t + lengths[i], s = t; t < end; t++) start[(size_t)t] = s;
  }
  Acts gqkv(qkv), out((size_t)T * O);
  Dev<float> lse((size_t)T * NH);
  Dev<int> gstart(start);
  attention_forward(out.p, lse.p, gqkv.p, gstart.p, 1, T, NH, NKV, HS, PRECISION_FP32);
  Floats packed = out.out();
  for (int i = 0, t = 0; i < 4; t += lengths[i++]) {
    size_t n = (size_t)lengths[i];
    Acts alone(Floats(qkv.begin() + (long)t * QKV, qkv.begin() + (long)(t + lengths[i]) * QKV)), result(n * O);
    Dev<float> log_sums(n * NH);
    Dev<int> zeros(Ints(n, 0));
    attention_forward(result.p, log_sums.p, alone.p, zeros.p, 1, lengths[i], NH, NKV, HS, PRECISION_FP32);
    CHECK(result.out() == Floats(packed.begin() + (long)t * O, packed.begin() + (long)(t + lengths[i]) * O), "document %d differs", i);
  }
}

// The same calls twice: equal bits. (On the CPU this is trivial; on a GPU it is not.)
static void test_repeatable(void) {
  const int B = 1, T = 130, NH = 2, NKV = 1, HS = 64, R = B * T, C = 128, V = 40;
  size_t n = (size_t)R * (NH + 2 * NKV) * HS;
  Floats qkv = activations(n, 1), dout = activations((size_t)R * NH * HS, 1);
  Ints start = document_starts(B, T, 1), tokens = integers((size_t)R, V);
  std::vector<Floats> first;
  for (int run = 0; run < 2; run++) {
    Acts gqkv(qkv), gdout(dout), out((size_t)R * NH * HS), d(n);
    Dev<float> lse((size_t)R * NH), dwte((size_t)V * C), dgain(C), gain(randoms(C, 0)), rstd((size_t)R);
    Dev<int> gstart(start), gtokens(tokens);
    reserve_scratch((size_t)R, 300, 300);
    attention_forward(out.p, lse.p, gqkv.p, gstart.p, B, T, NH, NKV, HS, PRECISION_FP32);
    attention_backward(d.p, gdout.p, out.p, lse.p, gqkv.p, gstart.p, B, T, NH, NKV, HS, PRECISION_FP32);
    embedding_backward(dwte.p, gdout.p, gtokens.p, R, V, C);
    rmsnorm_backward(out.p, dgain.p, gdout.p, out.p, gain.p, rstd.p, R, C, 1);
    std::vector<Floats> all = {d.out(), dwte.out(), dgain.out(), lse.out()};
    for (size_t i = 0; i < all.size(); i++) {
      if (run) CHECK(all[i] == first[i], "result %zu differs in the second run", i);
      else first.push_back(all[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// The emulator must notice the mistakes it is for.

#ifdef CUDA_EMU_H
__global__ void reverse_kernel(int *out, bool barrier) {
  __shared__ int v[64];
  v[threadIdx.x] = (int)threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = v[63 - threadIdx.x];
}

__global__ void uninitialised_kernel(float *out) {
  SHARED_DYNAMIC(float, v);
  out[threadIdx.x] = v[threadIdx.x];
}

__global__ void async_kernel(float *out, const float *in, bool wait) {
  SHARED_DYNAMIC(float, v);
  cp_async16(v + threadIdx.x * 4, in + threadIdx.x * 4, true);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  out[threadIdx.x] = v[threadIdx.x * 4 + 3];
  cp_async_wait<0>();
}

__global__ void divergent_kernel(int n) {
  if ((int)threadIdx.x < n) __syncthreads();
}

__global__ void lonely_shuffle_kernel(int *out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(FULL, 1, 1);
}

static void run_copy_while_recording(void *arg) {
  float x = 0;
  Graph g = {NULL, 1, 0};
  if (dev_graph_begin(&g)) dev_copy_in(arg, &x, sizeof x);
}

static void run_divergent(void *arg) {
  (void)arg;
  LAUNCH(divergent_kernel, 1, 64, 0, 63);
}

static void run_lonely_shuffle(void *arg) {
  LAUNCH(lonely_shuffle_kernel, 1, 32, 0, (int *)arg);
}

static void run_too_much_shared(void *arg) {
  LAUNCH(uninitialised_kernel, 1, 32, 60000, (float *)arg);
}

static void test_emulator(void) {
  char err[1000];
  int kept = emu_order, wrong[2] = {0, 0};
  Dev<int> out(64);
  for (int barrier = 0; barrier < 2; barrier++) {
    for (emu_order = 0; emu_order < 2; emu_order++) {
      LAUNCH(reverse_kernel, 1, 64, 0, out.p, barrier != 0);
      Ints v = out.out();
      for (int i = 0; i < 64; i++) wrong[barrier] += v[(size_t)i] != 63 - i;
    }
  }
  emu_order = kept;
  CHECK(wrong[0] > 0 && wrong[1] == 0, "a missing barrier gave %d wrong values, a barrier %d", wrong[0], wrong[1]);
  emu_order = 0;   // here copies happen as late as they may
  Dev<float> f(32), in(Floats(128, 5.0f));
  LAUNCH(uninitialised_kernel, 1, 32, 128, f.p);
  CHECK(isnan(f.out()[0]), "shared memory that nobody wrote reads %g", f.out()[0]);
  for (int wait = 0; wait < 2; wait++) {
    LAUNCH(async_kernel, 1, 32, 512, f.p, in.p, wait != 0);
    CHECK(wait ? f.out()[7] == 5.0f : isnan(f.out()[7]), "an asynchronous copy %s reads %g", wait ? "waited for"
          : "not waited for", f.out()[7]);
  }
  emu_order = kept;
  CHECK(run_child(run_divergent, NULL, err, sizeof err) != 0 && strstr(err, "deadlock"), "a barrier that one thread misses: %s", err);
  CHECK(run_child(run_lonely_shuffle, out.p, err, sizeof err) != 0 && strstr(err, "deadlock"), "a shuffle of half a warp: %s", err);
  CHECK(run_child(run_copy_while_recording, f.p, err, sizeof err) != 0 && strstr(err, "inside a recording"), "a copy in a graph: %s",
        err);
  CHECK(run_child(run_too_much_shared, f.p, err, sizeof err) != 0 && strstr(err, "shared memory"), "60 KB of shared memory: %s", err);
}
#endif

static const Test TESTS[] = {
#ifdef CUDA_EMU_H
    {"emulator", "a missing barrier, wait, thread or initialisation is noticed", test_emulator},
#endif
    {"device", "memory, copies, conversions", test_device},
    {"embedding", "forward, backward with repeated tokens", test_embedding},
    {"rmsnorm", "forward, backward, several chunks of rows", test_rmsnorm},
    {"headnorm", "forward, backward", test_headnorm},
    {"act_quant", "codes, mixes, 4 bits, NaN", test_act_quant},
    {"norm_quant", "norm and codes in one pass", test_norm_quant},
    {"weight_quantize", "codes, gamma of the parts, mixes, NaN", test_weight_quantize},
    {"bitlinear_forward", "integers equal; mixes; float activations; bias, residual", test_bitlinear_forward},
    {"packed_weights", "2-bit weights: codes, scales, products", test_packed},
    {"bitlinear_backward", "dx, dw, dbias; conversion in pieces", test_bitlinear_backward},
    {"dx_int8", "the gradient of the input as an integer product", test_dx_int8},
    {"linear", "the classifier, both ways, in pieces", test_linear},
    {"head", "tables of a model that only runs; the largest logit", test_head},
    {"rope", "there and back", test_rope},
    {"attention", "forward, backward; GQA, documents, three head sizes", test_attention},
    {"attention_cached", "against the CPU, and the bits of training", test_attention_cached},
    {"glu", "both gates, with and without norm", test_glu},
    {"cross_entropy", "losses, gradients, ignored rows", test_cross_entropy},
    {"policy", "penalty and gradient of a policy near a reference", test_policy},
    {"optimizer", "sum of squares, AdamW", test_optimizer},
    {"graph", "recorded ops, new contents, moved scratch", test_graph},
    {"rows_alone", "a row's bits do not depend on the rows beside it", test_rows_alone},
    {"packed_documents", "attention of a document does not notice its neighbours", test_packed_documents},
    {"repeatable", "the same bits twice", test_repeatable},
};

int main(int argc, char **argv) {
  cpu::dev_init(1);
  dev_init(0);
  printf("%s\n", dev_name());
  return run_tests(TESTS, ARRAY_LEN(TESTS), argc > 1 ? argv[1] : NULL);
}
