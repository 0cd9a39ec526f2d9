/*
test_convert.h: models that come from other programs and go to them: what is written is read back as the same bits, what cannot be
written truthfully is refused, and broken files end with exit code 3 and words that name the place.

What it is:  the block formats against given bytes, every form of `convert` there and back, the files of dev/test/fuzz/ with one field
             broken at a time, new models by parameter count, and, where BITNET_DATA names a directory with models, their published
             losses.
What not:    other programs (dev/test/test_convert.py), random damage (dev/test/fuzz.c).
Read before: test_run.h (program_), test_infer.h (saved_model_), bitnet/export.h.
Defines:     CONVERT_TESTS, the rows for the table of tests.
*/
#ifndef TEST_CONVERT_H
#define TEST_CONVERT_H

#include "../../modes/convert.h"
#include "check.h"
#include "test_data.h"
#include "test_infer.h"
#include "test_run.h"

// ---------------------------------------------------------------------------------------------------------
// Blocks.

static void hex_(char *out, const uint8_t *p, size_t n) {
  for (size_t i = 0; i < n; i++) snprintf(out + 2 * i, 3, "%02x", p[i]);
}

// Known bytes of one block, the two constant blocks, and random ones there and back.
static void test_ternary_blocks(void) {
  static const char tq1[] =
      "12a3ba85b036e82d9012a3ba85b036e82d9012a3ba85b036e82d9012a3ba85b00ea8058eac84e42cf70ea8058eac84e4c85079460038";
  static const char tq2[] =
      "9029522542a44a94099029522542a44a94099029522542a44a94099029522542522542a44a94099029522542a44a94099029522542a44a94"
      "099029522542a44a0038";
  int8_t codes[256], back[256];
  uint8_t block[66];
  char text[200];
  for (int i = 0; i < 256; i++) codes[i] = (int8_t)((7 * i + i / 3) % 3 - 1);
  tq1_encode(block, codes, 0.5f);
  hex_(text, block, 54);
  CHECK(strcmp(text, tq1) == 0, "TQ1_0: %s", text);
  tq2_encode(block, codes, 0.5f);
  hex_(text, block, 66);
  CHECK(strcmp(text, tq2) == 0, "TQ2_0: %s", text);
  memset(codes, -1, sizeof codes);
  tq1_encode(block, codes, 1);
  for (int i = 0; i < 52; i++) CHECK(block[i] == 0, "all -1: byte %d is %d", i, block[i]);
  memset(codes, 1, sizeof codes);
  tq1_encode(block, codes, 1);
  for (int i = 0; i < 52; i++) CHECK(block[i] == (i < 48 ? 255 : 253), "all +1: byte %d is %d", i, block[i]);
  memset(codes, 0, sizeof codes);
  tq1_encode(block, codes, 1);
  CHECK(block[52] == 0 && block[53] == 0, "a block of zeros has the scale 0");
  for (int k = 0; k < 200; k++) {
    for (int i = 0; i < 256; i++) codes[i] = (int8_t)(test_below_(3) - 1);
    tq1_encode(block, codes, 0.5f);
    CHECK(ternary_block_(back, block, GGUF_TQ1_0) && memcmp(codes, back, 256) == 0, "TQ1_0 there and back");
    tq2_encode(block, codes, 0.5f);
    CHECK(ternary_block_(back, block, GGUF_TQ2_0) && memcmp(codes, back, 256) == 0, "TQ2_0 there and back");
  }
  int images = 0;
  for (unsigned byte = 0; byte < 256; byte++) images += tq1_value_(byte) >= 0;
  CHECK(images == 243, "%d of the 256 bytes stand for five digits", images);
  // I2_S: 128 values, the first 32 of them on top.
  memset(codes, 0, sizeof codes);
  codes[0] = 1;
  codes[33] = -1;
  codes[127] = 1;
  i2s_encode(block, codes);
  CHECK(block[0] == 0x95 && block[1] == 0x45 && block[31] == 0x56 && block[2] == 0x55, "I2_S: %02x %02x %02x", block[0], block[1],
        block[31]);
}

// ---------------------------------------------------------------------------------------------------------
// There and back.

// A Config whose rows suit every type, in one of three styles.
static Config convert_config_case_(int style) {
  Config c = small_config_(BITNET_STYLE);
  c.dim = c.ffn_dim = 256;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 64;
  c.tie_embeddings = 1;
  c.qkv_bias = c.o_bias = c.qk_norm = 0;
  c.attn_sub_norm = c.ffn_sub_norm = style != 2;
  c.activation = style == 0 ? ACT_RELU2 : ACT_SILU;
  c.act_bits = 8;
  return c;
}

// Checks that two models have the same codes, and scales within `bound`, and the same other values within it, tensor by tensor.
static void check_same_model_(const char *a, const char *b, const char *what, double bound) {
  ModelSource x, y;
  Exporter e, f;
  float g[2];
  source_open(&x, a);
  source_open(&y, b);
  CHECK(x.table.count == y.table.count, "%s: %d and %d tensors", what, x.table.count, y.table.count);
  exporter_open(&e, &x, &x.c);
  exporter_open(&f, &y, &y.c);
  for (int i = 0; i < x.table.count && x.table.count == y.table.count; i++) {
    const Tensor *t = &x.table.tensors[i];
    if (t->flags & TERNARY) {
      const int8_t *p = exporter_codes(&e, i, &g[0]), *q = exporter_codes(&f, i, &g[1]);
      CHECK(memcmp(p, q, t->n) == 0, "%s: %s: codes", what, t->name);
      CHECK(fabs((double)g[0] - (double)g[1]) <= bound * (double)g[0], "%s: %s: scales %.9g and %.9g", what, t->name, (double)g[0],
            (double)g[1]);
    } else {
      float *p = host_floats_(t->n), *q = host_floats_(t->n);
      exporter_floats(&e, i, p, 0, t->n);
      exporter_floats(&f, i, q, 0, t->n);
      CHECK_CLOSE(t->name, q, p, t->n, bound);
    }
  }
  exporter_close(&e);
  exporter_close(&f);
  source_close(&x);
  source_close(&y);
  end_test_();
}

// Each form of each style: read back it is the same model to the bit, and once more through another form; refused where it must be.
static void test_convert_round_trips(void) {
  static const struct { const char *args; double bound; int styles;
  } forms[] = {// bound 5e-4: a 16-bit scale; styles: bits
               {"format=hf", 0, 7},
               {"format=packed", 0, 7},
               {"format=packed scale=divide", 2e-7, 7},
               {"format=trits", 0, 7},
               {"format=compress", 0, 7},
               {"format=hf fold=1", 0, 3},
               {"format=packed fold=1", 0, 3},
               {"format=gguf type=f32 embed_type=f32", 0, 7},
               {"format=gguf type=i2_s embed_type=f32", 0, 7},
               {"format=gguf type=tq1_0 embed_type=f32", 5e-4, 6},
               {"format=gguf type=tq2_0 embed_type=f32", 5e-4, 6},
               {"format=gguf type=f16 embed_type=f32", 5e-4, 7},
               {"format=gguf type=bf16 embed_type=f32", 4e-3, 7}};
  for (int style = 0; style < 3; style++) {
    Config c = convert_config_case_(style);
    Model m;
    char out[600], again[600], place[700];
    open_model_(&m, &c, PRECISION_FP32, 0, 0, 0, 1);
    char dir[512];
    snprintf(dir, sizeof dir, "%s", saved_model_(&m));
    model_free(&m);
    for (size_t i = 0; i < ARRAY_LEN(forms); i++) {
      snprintf(out, sizeof out, "%s/out%zu", dir, i);
      snprintf(again, sizeof again, "%s/again%zu", dir, i);
      int gguf = strstr(forms[i].args, "gguf") != NULL, code = program_("", "convert init=%s out=%s %s", dir, out, forms[i].args);
      int may = forms[i].styles >> style & 1;
      CHECK(code == (may ? 0 : 2), "style %d, %s: exit code %d: %s", style, forms[i].args, code, run_err);
      if (!may)
        CHECK(!is_dir(out) && strstr(run_err, "error: "), "style %d, %s: refused, but something was written", style, forms[i].args);
      if (!may || code) continue;
      snprintf(place, sizeof place, "%s%s", out, gguf ? "/model.gguf" : "");
      check_same_model_(dir, place, forms[i].args, forms[i].bound);
      code = program_("", "convert init=%s out=%s format=trits", place, again);
      CHECK(code == 0, "style %d, %s, then trits: %s", style, forms[i].args, run_err);
      check_same_model_(place, again, "then trits", 0);
    }
  }
}

// Sub-norms are inserted with gain 1, keep the rest, and can be measured; what is no conversion is refused.
static void test_convert_options(void) {
  static const struct { const char *args, *words; } wrong[] = {
      {"attn_sub_norm=1 ffn_sub_norm=1 dim=128", "dim is the model's own"}, {"lambda=0.5", "nothing in between"},
      {"format=packed lambda=0", "cannot be packed"}, {"type=tq1_0", "is for format=gguf"}, {"calibrate=2", "needs a text"},
      {"format=packed act_bits=4", "8 bits, this model to 4"}, {"format=packed attn_sub_norm=1", "only one of the two sub-norms"},
      {"params=750M", "give one of them"}, {"file=/nowhere.txt", "no tokenizer"}};
  Config c = convert_config_case_(2);
  Model m;
  ModelSource s;
  char out[600];
  open_model_(&m, &c, PRECISION_FP32, 0, 0, 0, 1);
  char dir[512];
  snprintf(dir, sizeof dir, "%s", saved_model_(&m));
  model_free(&m);
  snprintf(out, sizeof out, "%s/sub", dir);
  CHECK(program_("", "convert init=%s out=%s attn_sub_norm=1 ffn_sub_norm=1", dir, out) == 0, "%s", run_err);
  source_open(&s, out);
  CHECK(s.c.attn_sub_norm && s.c.ffn_sub_norm && s.c.activation == ACT_SILU, "the Config of the converted model");
  for (int i = 0; i < s.table.count; i++) {
    const Tensor *t = &s.table.tensors[i];
    if (!strstr(t->name, "sub_norm")) continue;
    float *x = host_floats_(t->n);
    source_floats(&s, i, x, 0, t->n);
    for (size_t k = 0; k < t->n; k++) CHECK(x[k] == 1, "%s: gain %g", t->name, (double)x[k]);
  }
  source_close(&s);
  for (size_t i = 0; i < ARRAY_LEN(wrong); i++) {
    int code = program_("", "convert init=%s out=%s/no %s", dir, dir, wrong[i].args);
    CHECK(code == EXIT_USAGE && strstr(run_err, wrong[i].words), "%s: exit code %d: %s", wrong[i].args, code, run_err);
  }
  CHECK(program_("", "convert init=%s out=%s", dir, dir) == EXIT_USAGE && strstr(run_err, "is the model itself"), "onto itself: %s",
        run_err);
  CHECK(program_("", "convert init=%s", dir) == EXIT_USAGE && strstr(run_err, "needs out="), "without out: %s", run_err);
  snprintf(out, sizeof out, "%s/packed", dir);
  CHECK(program_("", "convert init=%s out=%s format=packed", dir, out) == 0, "%s", run_err);
  CHECK(program_("", "logits %s ids=1 lambda=0", out) == EXIT_USAGE && strstr(run_err, "only lambda=1"), "packed at lambda 0: %s",
        run_err);
  end_test_();
}

// ---------------------------------------------------------------------------------------------------------
// New models.

static void test_params_shape(void) {
  static const struct {
    const char *text;
    double value;
  } texts[] = {{"750M", 750e6}, {"1.5B", 1.5e9}, {"0.3b", 0.3e9}, {"300000000", 3e8}, {"12Q", 0}, {"", 0},
               {"-1M", 0},      {"1.5", 0},      {"1e9", 0},      {"M", 0},           {"0x1M", 0}};
  static const double targets[] = {750e6, 1.5e9, 0.3e9, 300000000, 3e9, 7e9, 100e9, 138e9, 5e6};
  char dir[600];
  ModelSource s;
  for (size_t i = 0; i < ARRAY_LEN(texts); i++)
    CHECK(params_parse(texts[i].text) == texts[i].value, "%s: %g", texts[i].text, params_parse(texts[i].text));
  for (size_t i = 0; i < ARRAY_LEN(targets); i++) {
    Config c = small_config_(BITNET_STYLE);
    TensorTable t;
    c.vocab = 32000;
    c.tie_embeddings = c.qkv_bias = c.o_bias = c.qk_norm = 0;
    double n = params_shape(&c, targets[i]);
    CHECK(fabs(n - targets[i]) <= 0.01 * targets[i] && c.dim % 64 == 0, "%g: %g parameters, dim %d", targets[i], n, c.dim);
    tensor_table(&t, &c);
    CHECK((double)tensor_table_params(&t) == n, "%g: %zu parameters, promised %g", targets[i], tensor_table_params(&t), n);
    tensor_table_free(&t);
  }
  snprintf(dir, sizeof dir, "%s/new", test_dir());
  CHECK(program_("", "convert params=2M any_size=1 vocab=100 out=%s ternary_embed=1", dir) == 0, "%s", run_err);
  source_open(&s, dir);
  float x[1000], top = 0;
  source_floats(&s, 0, x, 0, 1000);
  for (int k = 0; k < 1000; k++) top = fabsf(x[k]) > top ? fabsf(x[k]) : top;
  for (int k = 0; k < 1000; k++) CHECK(x[k] == 0 || fabsf(x[k]) == top, "ternary embedding: %g beside %g", (double)x[k], (double)top);
  CHECK(top > 0.01f && top < 0.02f, "its scale: %g, the mean of a Gaussian of 0.02 is 0.016", (double)top);
  source_close(&s);
  CHECK(program_("", "convert params=2M out=%s/x", dir) == EXIT_USAGE && strstr(run_err, "any_size=1"), "too small: %s", run_err);
  CHECK(program_("", "convert params=12Q out=%s/x", dir) == EXIT_USAGE && strstr(run_err, "expected a number"), "12Q: %s", run_err);
  CHECK(program_("", "convert params=300B any_size=1 out=%s/x", dir) == EXIT_USAGE && strstr(run_err, "no shape"), "300B: %s",
        run_err);
}

// ---------------------------------------------------------------------------------------------------------
// Broken files.

// In a child: reads everything that a model has. 43: nothing was wrong.
static void open_source_(void *path) {
  static float *x;        // static, so that leak checkers see that they are still held where reading ends the process
  static int8_t *codes;
  Config c;
  ModelSource s;
  Tokenizer t;
  config_read(&c, (const char *)path);
  source_open(&s, (const char *)path);
  for (int i = 0; i < s.table.count; i++) {
    size_t n = s.table.tensors[i].n;
    x = (float *)xrealloc(x, n * sizeof(float));
    codes = (int8_t *)xrealloc(codes, n);
    if (s.tensors[i].ternary) source_master(&s, i, x, codes);
    else source_floats(&s, i, x, 0, n);
  }
  source_close(&s);
  if (checkpoint_has_tokenizer((const char *)path)) checkpoint_tokenizer(&t, (const char *)path);
  _exit(43);
}

// Writes a file without waiting for the disk.
static void put_quickly_(const char *dir, const char *name, const char *data, size_t n) {
  char path[4096];
  path_join(path, sizeof path, dir, name);
  FILE *f = fopen(path, "wb");
  if (f == NULL || fwrite(data, 1, n, f) != n || fclose(f) != 0) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(errno));
}

// The place of the first `word` in data, n if there is none.
static size_t find_bytes_in_(const char *data, size_t n, const char *word) {
  size_t len = strlen(word);
  for (size_t i = 0; i + len <= n; i++) {
    if (memcmp(data + i, word, len) == 0) return i;
  }
  return n;
}

// A seed file with `bytes` bytes of v at `word` + `offset` (or at offset where word is NULL) must be refused with these words.
static void refuse_patched_(const char *seed, const char *word, long offset, uint64_t v, size_t bytes, const char *words) {
  char path[600], from[200];
  size_t n, at;
  snprintf(from, sizeof from, "dev/test/fuzz/%s", seed);
  char *data = read_file(from, &n);
  if (data == NULL) die(EXIT_USAGE, "cannot read %s; run the tests in the project's directory", from);
  at = (word ? find_bytes_in_(data, n, word) : 0) + (size_t)offset;
  if (at + bytes <= n) memcpy(data + at, &v, bytes);
  else CHECK(0, "%s: no place '%s'", seed, word ? word : "");
  const char *dir = test_dir();
  put_quickly_(dir, seed, data, n);
  path_join(path, sizeof path, dir, seed);
  CHECK(refused_(open_source_, path, EXIT_DAMAGED, words), "%s: %s %+ld = %llu", seed, word ? word : "", offset,
        (unsigned long long)v);
  free(data);
}

static void test_gguf_refuses(void) {
  static const struct { const char *word; long offset; uint64_t v; size_t bytes; const char *words;
  } cases[] = {{NULL, 4, 1, 4, "offset 4|version 2 or 3, found 1"},
               {NULL, 4, 0x03000000, 4, "big-endian"},
               {NULL, 8, 1ull << 63, 8, "number of tensors"},
               {NULL, 16, UINT64_MAX, 8, "number of keys"},
               {NULL, 16, 60000, 8, "number of keys"},
               {NULL, 24, 1ull << 62, 8, "name of a key|bytes that are left"},
               {"general.architecture", 20, 99, 4, "type of a value"},
               {"general.architecture", 0, ' ', 1, "visible ASCII"},
               {"qwen2.block_count", 21, 1000000, 4, "1000000 layers"},
               {"qwen2.block_count", 17, GGUF_FLOAT, 4, "whole number"},
               {"qwen2.context_length", 24, 0x00FFFFFF, 4, "context"},
               {"qwen2.embedding_length", 26, 128, 4, "expected shape"},
               {"qwen2.attention.head_count", 30, 0, 4, "head_count: expected at least 1"},
               {"tokenizer.ggml.tokens", 25, GGUF_ARRAY, 4, "arrays can have"},
               {"tokenizer.ggml.tokens", 29, 1ull << 60, 8, "fits into"},
               {"tokenizer.ggml.tokens", 37, 1ull << 61, 8, "bytes that are left"},
               {"tokenizer.ggml.token_type", 41, 99, 4, "type from 0 to 6"},
               {"tokenizer.ggml.eos_token_id", 31, 5000, 4, "one of 259 tokens"},
               {"blk.0.attn_q.weight", 0, 'x', 1, "blk.0.attn_q.weight is missing"},
               {"blk.0.attn_q.weight", 19, 9, 4, "1 to 4 dimensions"},
               {"blk.0.attn_q.weight", 23, 1ull << 63, 8, "memory can hold"},
               {"blk.0.attn_q.weight", 23, 255, 8, "multiple of 256"},
               {"blk.0.attn_q.weight", 31, 4, 8, "expected its data at"},
               {"blk.0.attn_q.weight", 39, 12, 4, "found number 12"},
               {"blk.0.attn_q.weight", 43, 7, 8, "expected its data at"},
               {"blk.0.attn_k.weight", 11, 'q', 1, "blk.0.attn_q.weight once"},
               {"tokenizer.ggml.pre", 6, 'X', 1, "tokenizer"}};
  for (size_t i = 0; i < ARRAY_LEN(cases) - 1; i++)
    refuse_patched_("tiny.gguf", cases[i].word, cases[i].offset, cases[i].v, cases[i].bytes, cases[i].words);
  // Data: bytes that are no codes, numbers that are none.
  Gguf g;
  gguf_open(&g, "dev/test/fuzz/tiny.gguf");
  size_t q = gguf_find(&g, "blk.0.attn_q.weight")->begin, k = gguf_find(&g, "blk.0.attn_k.weight")->begin,
         norm = gguf_find(&g, "output_norm.weight")->begin;
  size_t end = g.map_bytes;
  gguf_close(&g);
  refuse_patched_("tiny.gguf", NULL, (long)q, 1, 1, "blk.0.attn_q.weight|TQ1_0, found bytes");
  refuse_patched_("tiny.gguf", NULL, (long)k, 0xFF, 1, "blk.0.attn_k.weight|TQ2_0, found bytes");
  refuse_patched_("tiny.gguf", NULL, (long)norm, 0x7FC00000, 4, "model.norm.weight|finite number");
  // Every length short of the whole file, in steps, and one byte more than padding.
  char path[600], *data = read_file("dev/test/fuzz/tiny.gguf", &end);
  const char *dir = test_dir();
  path_join(path, sizeof path, dir, "cut.gguf");
  for (size_t n = 0; n < end; n += n < 100 ? 9 : 1499) {
    put_quickly_(dir, "cut.gguf", data, n);
    char err[400];
    int code = run_child(open_source_, path, err, sizeof err);
    CHECK(code == (n < 4 ? EXIT_USAGE : EXIT_DAMAGED), "cut to %zu bytes: exit code %d: %s", n, code, err);
  }
  free(data);
}

static void test_llama2c_refuses(void) {
  refuse_patched_("legacy.bin", NULL, 0, 0, 4, "dim in the header");
  refuse_patched_("legacy.bin", NULL, 8, 1 << 30, 4, "n_layers");
  refuse_patched_("legacy.bin", NULL, 12, 3, 4, "3 heads");
  refuse_patched_("legacy.bin", NULL, 20, 21, 4, "expected a file of");
  refuse_patched_("legacy.bin", NULL, 20, 0x80000000, 4, "vocab_size");
  refuse_patched_("version1.bin", NULL, 4, 2, 4, "version 1, found 2");
  refuse_patched_("version1.bin", NULL, 36, 7, 1, "shared classifier");
  refuse_patched_("version1.bin", NULL, 36, 0, 1, "expected a file of");
  refuse_patched_("ternary.bin", NULL, 256 + 4 * (8 + 160), 0xBF800000, 4, "scale of a matrix");
  refuse_patched_("ternary.bin", NULL, 256 + 4 * (8 + 160) + 4, 0x80, 1, "found 10");
}

static void test_packed_refuses(void) {
  static const struct { const char *from, *to, *words; } cases[] = {
      {"\"U8\"", "\"I8\"", "type U8"}, {"q_proj.weight_scale", "q_proj.weight_scalf", "weight_scale is missing"},
      {"[2,8]", "[8,2]", "expected shape"}, {"[1]", "[ ]", "expected shape"}};
  size_t n, m;
  char *config = read_file("dev/test/fuzz/packed/config.json", &m);
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    char *data = read_file("dev/test/fuzz/packed/model.safetensors", &n);
    size_t at = find_bytes_in_(data, n, cases[i].from);
    CHECK(at < n, "no %s", cases[i].from);
    if (at < n) memcpy(data + at, cases[i].to, strlen(cases[i].to));
    const char *dir = test_dir();
    put_quickly_(dir, "model.safetensors", data, n);
    put_quickly_(dir, "config.json", config, m);
    CHECK(refused_(open_source_, (void *)dir, EXIT_DAMAGED, cases[i].words), "%s", cases[i].from);
    free(data);
  }
  // Values: a code 3, a scale of 0.
  ModelSource s;
  source_open(&s, "dev/test/fuzz/packed");
  size_t code = s.tensors[2].file->data_at + s.tensors[2].st->begin, scale = s.tensors[2].file->data_at + s.tensors[2].scale->begin;
  source_close(&s);
  for (int i = 0; i < 2; i++) {
    char *data = read_file("dev/test/fuzz/packed/model.safetensors", &n);
    uint32_t v = i ? 0 : 3;
    memcpy(data + (i ? scale : code), &v, i ? 4 : 1);
    const char *dir = test_dir();
    put_quickly_(dir, "model.safetensors", data, n);
    put_quickly_(dir, "config.json", config, m);
    CHECK(refused_(open_source_, (void *)dir, EXIT_DAMAGED, i ? "weight_scale|positive" : "found a 3"), "value %d", i);
    free(data);
  }
  free(config);
}

// ---------------------------------------------------------------------------------------------------------
// Loaded to be run.

static void load_frozen_(void *path) {
  Model m;
  model_load_frozen(&m, (const char *)path, PRECISION_FP32, 1);
}

// A model loaded frozen has what the file holds: codes and scales of each matrix, numbers of the tables, and a screen that fits them.
static void check_frozen_form_(const char *place, const char *what, int half, int in_file) {
  ModelSource s;
  Exporter e;
  Model m;
  int part;
  float gamma;
  source_open(&s, place);
  exporter_open(&e, &s, &s.c);
  model_load_frozen(&m, place, PRECISION_FP32, 1);
  in_file = in_file && dev_reads_host();
  CHECK(m.head.half == half && m.embed.half == half && (m.head_file.map != NULL) == in_file, "%s: half %d, in the file %d", what,
        m.head.half, m.head_file.map != NULL);
  CHECK((m.embed.table == m.head.table) == s.c.tie_embeddings, "%s: tables shared", what);
  for (int i = 0; i < s.table.count; i++) {
    const Tensor *t = &s.table.tensors[i];
    size_t V = t->shape[0], K = t->shape[1];
    if (t->flags & TERNARY) {
      const int8_t *want = exporter_codes(&e, i, &gamma);
      BitWeight *w = frozen_weight(&m, i, &part);
      size_t first = part > 0 ? (size_t)w->parts[0] : 0;
      if (part > 1) first += (size_t)w->parts[1];
      CHECK(memcmp(weight_codes_(w) + first * K, want, t->n) == 0, "%s: %s: codes", what, t->name);
      float *g = read_floats_(w->gamma + first, V);
      for (size_t r = 0; r < V; r++) CHECK(g[r] == gamma, "%s: %s: scale %g of row %zu", what, t->name, (double)g[r], r);
    } else if (t->flags & EMBED) {
      int *ids = (int *)host_memory_(V * sizeof(int));
      for (size_t v = 0; v < V; v++) ids[v] = (int)v;
      float *want = host_floats_(t->n);
      floatX *got = dev_acts_(NULL, t->n), *rounded = dev_acts_(want, t->n);
      exporter_floats(&e, i, want, 0, t->n);
      dev_floatx_in(rounded, want, t->n);
      const Head *h = i > 0 || s.c.tie_embeddings ? &m.head : &m.embed;
      head_embedding(got, dev_ints_(ids, V), h, (int)V);
      CHECK(same_bits_(read_acts_(got, t->n), read_acts_(rounded, t->n), t->n * sizeof(float)), "%s: %s: table", what, t->name);
      if (h->screen == NULL) continue;
      Head copy = *h;
      copy.table = dev_memory_(head_table_bytes(h->V, h->C, h->half));
      copy.screen = dev_memory_(head_screen_bytes(h->V, h->C));
      head_rows(&copy, dev_floats_(want, t->n), 0, h->V);
      CHECK(same_bits_(copy.screen, h->screen, head_screen_bytes(h->V, h->C)), "%s: %s: screen", what, t->name);
    }
  }
  exporter_close(&e);
  source_close(&s);
  model_free(&m);
  end_test_();
}

/*
Each form of a file, read in pieces that are smaller than any matrix. A table that can be used where it lies is left in the file, and
a number in it that is not finite is found there, too.
*/
static void test_frozen_forms(void) {
  static const struct { const char *args; int half, in_file; } forms[] = {
      {"format=packed", 0, 1}, {"format=packed type=bf16", 1, 1}, {"format=hf type=bf16", 1, 1}, {"format=trits", 0, 1},
      {"format=compress", 0, 1}, {"format=gguf type=tq1_0 embed_type=f32", 0, 1}, {"format=gguf type=tq2_0 embed_type=bf16", 1, 1},
      {"format=gguf type=i2_s embed_type=f16", 0, 0}, {"format=gguf type=f32 embed_type=bf16", 1, 1}};
  size_t chunk = load_chunk;
  for (int tied = 0; tied < 2; tied++) {
    Config c = convert_config_case_(1);
    Model m;
    char out[600], place[700], dir[512];
    c.tie_embeddings = tied;
    open_model_(&m, &c, PRECISION_FP32, 0, 0, 0, 1);
    snprintf(dir, sizeof dir, "%s", saved_model_(&m));
    model_free(&m);
    for (size_t i = 0; i < ARRAY_LEN(forms); i++) {
      int gguf = strstr(forms[i].args, "gguf") != NULL;
      snprintf(out, sizeof out, "%s/frozen%zu", dir, i);
      snprintf(place, sizeof place, "%s%s", out, gguf ? "/model.gguf" : "");
      int code = program_("", "convert init=%s out=%s %s", dir, out, forms[i].args);
      if (code == EXIT_USAGE && !tied && gguf) continue;   // not every architecture of GGUF has a classifier of its own
      CHECK(code == 0, "%s: exit code %d: %s", forms[i].args, code, run_err);
      if (code) continue;
      for (int threads = 1; threads <= 3; threads += 2) {
        set_threads_(threads);
        load_chunk = 1500;   // 16 rows of codes, 5 of a table
        check_frozen_form_(place, forms[i].args, forms[i].half, forms[i].in_file);
        load_chunk = chunk;
      }
      if (!gguf || !forms[i].in_file) continue;
      Gguf g;
      size_t n;
      gguf_open(&g, place);
      size_t size = forms[i].half ? 2 : 4, at = gguf_find(&g, "token_embd.weight")->begin + gguf_find(&g, "token_embd.weight")->bytes;
      gguf_close(&g);
      char *data = read_file(place, &n), err[512];
      memset(data + at - size, 0xFF, size);   // the last number
      put_quickly_(out, "broken.gguf", data, n);
      free(data);
      snprintf(place, sizeof place, "%s/broken.gguf", out);
      load_chunk = 1500;
      code = run_child(load_frozen_, place, err, sizeof err);
      load_chunk = chunk;
      CHECK(code == EXIT_DAMAGED && strstr(err, "expected a finite number, found"),
            "%s: NaN in the table: exit %d, %s", forms[i].args, code, err);
    }
  }
  set_threads_(0);
}

// ---------------------------------------------------------------------------------------------------------
// Real models, where they are: BITNET_DATA has models/ with expected.json, text/ and tokenizers/; BITNET_SMOLLM2 is a GGUF file.

// The numbers of a JSON array into ids; how many.
static int expected_ids_(int *ids, int cap, const Json *list) {
  int n = 0;
  for (const Json *v = list ? list->child : NULL; v && n < cap; v = v->next) ids[n++] = (int)v->i;
  return n;
}

// Sum over the ids behind the first of -log p, in double. Some ids at a time: a session has room for a few rows of a large vocabulary.
static double expected_loss_(Model *m, const int *ids, int n) {
  Session s;
  double nll = 0;
  int seq[16] = {0}, pos[16];
  session_open(&s, m, 1, n, 16, m->frozen);
  for (int first = 0; first + 1 < n; first += 16) {
    int rows = n - first < 16 ? n - first : 16;
    for (int i = 0; i < rows; i++) pos[i] = first + i;
    const float *z = session_forward(&s, ids + first, seq, pos, rows);
    for (int i = 0; i < rows && first + i + 1 < n; i++, z += m->c.vocab) {
      double most = (double)z[0], sum = 0;
      for (int v = 1; v < m->c.vocab; v++) most = (double)z[v] > most ? (double)z[v] : most;
      for (int v = 0; v < m->c.vocab; v++) sum += exp((double)z[v] - most);
      nll += most + log(sum) - (double)z[ids[first + i + 1]];
    }
  }
  session_free(&s);
  return nll;
}

// The greedy ids behind a prompt.
static void expected_greedy_(Model *m, const Json *prompt, const Json *text, const char *what) {
  int ids[600], out[64], n = expected_ids_(ids, 600, prompt), want = (int)text->count;
  Session s;
  Prompt p;
  Sampler greedy;
  memset(&p, 0, sizeof p);
  memset(&greedy, 0, sizeof greedy);
  p.ids = ids;
  p.n_ids = n;
  p.out = out;
  CHECK(n > 0 && want > 0 && want <= 64, "%s: %d prompt ids, %d greedy ids", what, n, want);
  session_open(&s, m, 1, n + want, n, m->frozen);
  generate(&s, &greedy, &p, 1, want, -1, m->c.vocab, NULL, NULL);
  n = 0;
  for (const Json *v = text->child; v; v = v->next, n++)
    CHECK(out[n] == (int)v->i, "%s: greedy token %d is %d, expected %d", what, n, out[n], (int)v->i);
  session_free(&s);
}

/*
A model of llama2.c as expected.json has it, at lambda: the loss of each of the first ten stories of the text file, whose ids our
tokenizer finds, and the greedy ids. bound: relative, of a story's loss.
*/
static void check_expected_(const char *data, const Json *want, const char *file, float lambda, double bound) {
  char path[4096];
  Model m;
  Tokenizer tok;
  size_t len;
  int number = 0, ids[520], first[600];
  snprintf(path, sizeof path, "%s/tokenizers/tok512.bin", data);
  tokenizer_load(&tok, path);
  snprintf(path, sizeof path, "%s/text/tinystories.txt", data);
  char *text = read_file(path, &len), *at = text;
  CHECK(text, "%s", path);
  snprintf(path, sizeof path, "%s/models/%s", data, file);
  load_to_run(&m, path, PRECISION_FP32, lambda, 0);
  for (const Json *story = json_get(want, "stories")->child; story && at; story = story->next, number++) {
    char *end = strstr(at, "<|endoftext|>");
    while (end > at && isspace((unsigned char)end[-1])) end--;
    size_t all = tokenizer_encode(&tok, at, (size_t)(end - at), ids + 1, 519);
    int n = 1 + (int)(all < 511 ? all : 511);
    ids[0] = 1;   // <s>
    CHECK(n == (int)json_get_number(story, "tokens", 0), "%s: story %d has %d tokens", file, number, n);
    if (number == 0) {
      int m0 = expected_ids_(first, 600, json_get(want, "first_story_ids"));
      CHECK(m0 == n && memcmp(ids, first, (size_t)n * sizeof(int)) == 0, "%s: the ids of the first story", file);
    }
    double nll = expected_loss_(&m, ids, n), there = json_get_number(story, "nll_sum", 0);
    CHECK(fabs(nll - there) <= bound * there, "%s: loss of story %d is %.4f, expected %.4f", file, number, nll, there);
    at = strstr(end, "<|endoftext|>");
    at = at ? at + strlen("<|endoftext|>") : NULL;
    while (at && isspace((unsigned char)*at)) at++;
  }
  CHECK(number == 10, "%d stories", number);
  expected_greedy_(&m, json_get(want, "prompt_ids"), json_get(want, "greedy_ids"), file);
  free(text);
  tokenizer_free(&tok);
  model_free(&m);
}

/*
SmolLM2-135M-Instruct from a GGUF file, where BITNET_SMOLLM2 names it: ids of the prompts, greedy ids, the five largest logits behind
each prompt and the loss of the first story, all in float32 with the float weights that the file holds.
*/
static void check_smollm2_(const Json *want, const char *file) {
  Model m;
  Tokenizer tok;
  int ids[600], own[600];
  CHECK(want && json_get(want, "prompts"), "expected.json has no SmolLM2");
  load_to_run(&m, file, PRECISION_FP32, 0, 0);
  checkpoint_tokenizer(&tok, file);
  for (const Json *p = json_get(want, "prompts")->child; p; p = p->next) {
    const char *text = json_get_string(p, "prompt", "");
    int n = expected_ids_(ids, 600, json_get(p, "prompt_ids"));
    size_t all = tokenizer_encode(&tok, text, strlen(text), own, 600);
    CHECK((int)all == n && memcmp(ids, own, all * sizeof(int)) == 0, "%s: ids of a prompt", text);
    expected_greedy_(&m, json_get(p, "prompt_ids"), json_get(p, "greedy_ids"), text);
    Session s;
    int seq[600] = {0}, pos[600];
    for (int i = 0; i < n; i++) pos[i] = i;
    session_open(&s, &m, 1, n, n, m.frozen);
    const float *z = session_forward(&s, ids, seq, pos, n) + (size_t)(n - 1) * (size_t)m.c.vocab;
    for (const Json *top = json_get(p, "top5")->child; top; top = top->next) {
      const Json *number = top->child->next;
      double value = number->type == JSON_REAL ? number->d : (double)number->i, logit = (double)z[top->child->i];
      CHECK(fabs(logit - value) <= 1e-4 * fabs(value) + 5e-4, "%s: logit of %d is %.4f, expected %.3f", text, (int)top->child->i,
            logit, value);
    }
    session_free(&s);
  }
  int n = expected_ids_(ids, 600, json_get(want, "first_story_ids"));
  double nll = expected_loss_(&m, ids, n), there = json_get_number(want, "first_story_nll_sum", 0);
  CHECK(fabs(nll - there) <= 1e-5 * there, "%s: loss of the first story %.4f, expected %.4f", file, nll, there);
  tokenizer_free(&tok);
  model_free(&m);
}

static void test_real_models(void) {
  const char *data = getenv("BITNET_DATA");
  char path[4096], err[256];
  size_t n;
  JsonDoc doc;
  if (data == NULL) return;
  snprintf(path, sizeof path, "%s/models/expected.json", data);
  char *text = read_file(path, &n);
  CHECK(text && json_parse(&doc, text, n, err, sizeof err), "%s", path);
  if (text == NULL) return;
  check_expected_(data, json_get(doc.root, "stories260K.bin"), "stories260K.bin", 0, 1e-6);
  check_expected_(data, json_get(doc.root, "stories260K.bin"), "stories260K_v1.bin", 0, 1e-6);
  // Activation codes that lie on an edge in float32 fall on either side.
  check_expected_(data, json_get(doc.root, "bitllama_1M.bin"), "bitllama_1M.bin", 1, 1e-3);
  if (getenv("BITNET_SMOLLM2")) check_smollm2_(json_get(doc.root, "SmolLM2-135M-Instruct.Q4_1.gguf"), getenv("BITNET_SMOLLM2"));
  json_free(&doc);
  free(text);
}

#define CONVERT_TESTS                                                                                              \
  {"ternary_blocks", "TQ1_0, TQ2_0 and I2_S against known bytes, there and back", test_ternary_blocks},            \
  {"convert_round_trips", "every form of a model is read back as the same codes and scales", test_convert_round_trips}, \
  {"convert_options", "inserted sub-norms; what is no conversion is refused", test_convert_options},                \
  {"params_shape", "new models by parameter count", test_params_shape},                                            \
  {"gguf_refuses", "broken GGUF files, field by field", test_gguf_refuses},                                        \
  {"llama2c_refuses", "broken llama2.c files", test_llama2c_refuses},                                              \
  {"frozen_forms", "loaded to be run, every form has the codes and numbers of its file", test_frozen_forms},       \
  {"packed_refuses", "broken packed weights", test_packed_refuses},                                                \
  {"real_models", "losses and texts of published models, where BITNET_DATA and BITNET_SMOLLM2 have them", test_real_models}

#endif
