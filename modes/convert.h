/*
convert.h: models in, 1.58-bit models out.

What it is:  ./train_bitnet convert init=MODEL out=DIR                     float master weights, ready for pretrain init=DIR
             ./train_bitnet convert init=MODEL out=DIR format=packed       four codes a byte, as transformers loads them
             ./train_bitnet convert init=MODEL out=FILE.gguf format=gguf type=tq2_0   for llama.cpp (type=i2_s: bitnet.cpp)
             ./train_bitnet convert params=750M out=DIR                    a new model with random weights
             MODEL is whatever bitnet/source.h reads. Nothing is trained. attn_sub_norm=1 ffn_sub_norm=1 insert sub-norms into a model
             without them; the activation stays the model's own unless activation= is given. With file=TEXT the loss on that text is
             measured before packing, after it, and from the files that were written: the pack gap.
What not:    the forms themselves (bitnet/export.h).
Read before: bitnet/export.h, modes/generate.h.
Defines:     params_parse, params_shape; mode_convert.
*/
#ifndef MODE_CONVERT_H
#define MODE_CONVERT_H

#include "../bitnet/export.h"
#include "../bitnet/losses.h"
#include "generate.h"

enum { FORMAT_HF, FORMAT_PACKED, FORMAT_GGUF, FORMAT_TRITS, FORMAT_COMPRESS };
enum { TYPE_AUTO, TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_Q8_0, TYPE_TQ1_0, TYPE_TQ2_0, TYPE_I2_S };
enum { SCALE_AUTO, SCALE_MULTIPLY, SCALE_DIVIDE };
enum { CONVERT_ROWS = 4, CONVERT_WINDOW = 256 };   // windows of text that go through a model together, and their longest

// ---------------------------------------------------------------------------------------------------------
// A new model of a given size.

// "750M", "1.5B" or a whole number; 0 if it is neither.
UNUSED static double params_parse(const char *text) {
  char *end;
  double v = isdigit((unsigned char)text[0]) ? strtod(text, &end) : 0;
  if (!(v > 0)) return 0;
  size_t digits = strspn(text, "0123456789.");
  if (end != text + digits) return 0;   // no exponents, no hexadecimal
  if (strcmp(end, "M") == 0 || strcmp(end, "m") == 0) return v * 1e6;
  if (strcmp(end, "B") == 0 || strcmp(end, "b") == 0) return v * 1e9;
  return *end == 0 && strchr(text, '.') == NULL ? v : 0;
}

// Parameters of a model of width h, L layers and FFN width f, with heads of 64, without grouped heads.
static double params_count_(const Config *c, double h, double L, double f) {
  double norms = 2 * h + (c->attn_sub_norm ? h : 0) + (c->ffn_sub_norm ? f : 0);
  return (c->tie_embeddings ? 1 : 2) * c->vocab * h + L * (4 * h * h + 3 * h * f + norms) + h;
}

/*
The shape of about `target` parameters: width a multiple of 64, FFN four times as wide, at most 24, 48 or 128 layers, whichever comes
nearest; of equals the one whose width is nearest to 100 times its layers. If none is within 1 %, the FFN becomes any multiple of 64.
Fills dim, layers, heads, kv_heads, head_dim and ffn_dim; returns the true count, or 0 if there is no shape within 1 %.
*/
UNUSED static double params_shape(Config *c, double target) {
  int widest = target < 1e9 ? 2048 : target < 1e10 ? 4096 : 8192, deepest = target < 1e9 ? 24 : target < 1e10 ? 48 : 128;
  double best = INFINITY, found = 0;
  for (int relaxed = 0; relaxed < 2 && !(best <= 0.01 * target); relaxed++) {
    for (int h = 64; h <= widest; h += 64) {
      for (int L = 1; L <= deepest; L++) {
        int f = 4 * h;
        if (relaxed) {   // the parameters are linear in f: the nearest multiple of 64, within half and twice the usual
          double at0 = params_count_(c, h, L, 0), slope = params_count_(c, h, L, 1) - at0;
          double want = rint((target - at0) / slope / 64) * 64;
          if (!(want >= 2 * h && want <= 8 * h)) continue;
          f = (int)want;
        }
        double n = params_count_(c, h, L, f), off = fabs(n - target);
        int nearer = off == best && fabs((double)h / L - 100) < fabs((double)c->dim / c->layers - 100);
        if (!(off < best) && !nearer) continue;
        best = off;
        found = n;
        c->dim = h;
        c->layers = L;
        c->ffn_dim = f;
      }
    }
  }
  c->heads = c->kv_heads = c->dim / 64;
  c->head_dim = 64;
  return best <= 0.01 * target ? found : 0;
}

// What the writer asks for: random numbers, a function of the seed and the place, as model_init_random has them.
typedef struct {
  TensorTable table;
  const Config *c;
  uint64_t seed;
  float gamma;   // > 0: the embedding is ternary with this scale
} Blank_;

static void blank_source_(void *ctx, size_t entry, size_t first, size_t count, void *out) {
  const Blank_ *b = (const Blank_ *)ctx;
  const Tensor *t = &b->table.tensors[entry];
  float *x = (float *)out;
  for (size_t k = 0; k < count; k++) {
    if (t->flags & NORM) x[k] = 1;
    else if (t->flags & BIAS) x[k] = 0;
    else x[k] = b->c->init_std * (float)rng_normal(b->seed, RNG_INIT, (uint64_t)entry << 40 | (first + k));
    if (t->flags & EMBED && b->gamma > 0) x[k] = b->gamma * (float)ternary_code(x[k], 1.0f / b->gamma);
  }
}

// convert params=...: writes the directory number by number; the model is never in memory.
static void convert_blank_(const Options *o) {
  Config c;
  Blank_ b;
  WeightForm form;
  char path[4096];
  double target = params_parse(o->params);
  if (target <= 0) die(EXIT_USAGE, "params: expected a number such as 750M, 1.5B or 300000000, found '%s'", o->params);
  if (!o->any_size && !(target >= 300e6 && target <= 200e9))
    die(EXIT_USAGE, "params=%s: expected 300M to 200B; any_size=1 allows others", o->params);
  if (o->init[0] || o->dir[0]) die(EXIT_USAGE, "params= makes a new model, init= converts one; give one of them");
  if (o->format != FORMAT_HF)
    die(EXIT_USAGE, "params= writes float master weights, which can be trained; convert them with init= later");
  Options fixed = *o;
  fixed.dim = fixed.head_dim = 64;
  fixed.heads = fixed.kv_heads = 1;
  if (fixed.vocab == 0) fixed.vocab = 32000;
  if (fixed.max_seq == 0) fixed.max_seq = fixed.seq_len ? fixed.seq_len : 2048;
  if (!options_is_set(o, "tie_embeddings")) fixed.tie_embeddings = 0;
  config_from_options(&c, &fixed);
  double n = params_shape(&c, target);
  if (n == 0)
    die(EXIT_USAGE, "params=%s: no shape comes within 1 %% of it; the widest is 8192, the deepest has 128 layers", o->params);
  memset(&form, 0, sizeof form);
  memset(&b, 0, sizeof b);
  form.dtype = o->type == TYPE_BF16 ? ST_BF16 : o->type == TYPE_F16 ? ST_F16 : ST_F32;
  b.c = &c;
  b.seed = (uint64_t)o->seed;
  tensor_table(&b.table, &c);
  StEntry *entries = (StEntry *)xcalloc((size_t)b.table.count, sizeof *entries);
  double bytes[3] = {0, 0, 0};   // matrices as 1.58 bits, embeddings, others
  for (int i = 0; i < b.table.count; i++) {
    const Tensor *t = &b.table.tensors[i];
    entries[i].name = t->name;
    entries[i].dtype = form.dtype;
    entries[i].ndim = t->ndim;
    memcpy(entries[i].shape, t->shape, sizeof t->shape);
    if (t->flags & TERNARY || (t->flags & EMBED && o->ternary_embed)) bytes[0] += (double)t->n * 1.58 / 8 + 4 * t->ndim;
    else bytes[t->flags & EMBED ? 1 : 2] += (double)t->n * (double)st_dtype_size(form.dtype);
  }
  if (o->ternary_embed) {   // the mean of |x| that these numbers have, not the one that they should have
    double sum = 0;
    for (size_t k = 0; k < b.table.tensors[0].n; k++) sum += fabs((double)(c.init_std * (float)rng_normal(b.seed, RNG_INIT, k)));
    b.gamma = ternary_gamma((float)(sum / (double)b.table.tensors[0].n));
  }
  printf("requested %.0f parameters, made %.0f (%+.2f %%): dim %d, %d layers, %d heads, FFN %d, vocabulary %d%s\n", target, n,
         100 * (n - target) / target, c.dim, c.layers, c.heads, c.ffn_dim, c.vocab, c.tie_embeddings ? ", tied" : "");
  printf("packed it will take: ternary %.1f MB, embeddings %.1f MB, others %.1f MB\n", bytes[0] / 1e6, bytes[1] / 1e6, bytes[2] / 1e6);
  make_dirs(o->out);
  path_join(path, sizeof path, o->out, "model.safetensors");
  int err = st_write(path, entries, (size_t)b.table.count, NULL, 0, blank_source_, &b);
  if (!err) err = save_config_(&c, NULL, &form, o->out);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", o->out, strerror(err));
  tensor_table_free(&b.table);
  free(entries);
}

// ---------------------------------------------------------------------------------------------------------
// Measuring.

typedef struct {
  int *ids;
  size_t n;
  int T, batches;   // windows are T tokens, CONVERT_ROWS of them in a batch
} ConvertText_;

// The text of file= as windows of tokens; *text stays empty without one.
static void convert_text_(ConvertText_ *text, const Options *o, const Tokenizer *tok, const Config *c) {
  size_t len;
  memset(text, 0, sizeof *text);
  if (o->file[0] == 0) return;
  if (tok == NULL) die(EXIT_USAGE, "file=%s: the model has no tokenizer; give one with tokenizer=", o->file);
  char *bytes = read_file(o->file, &len);
  if (bytes == NULL) die(EXIT_USAGE, "cannot read %s: %s", o->file, strerror(errno));
  text->n = tokenizer_encode_marks(tok, bytes, len, NULL, 0);
  text->ids = (int *)xmalloc(size_mul(text->n + 1, sizeof(int)));
  tokenizer_encode_marks(tok, bytes, len, text->ids, text->n);
  free(bytes);
  text->T = o->seq_len > 0 ? o->seq_len : CONVERT_WINDOW;
  if (text->T > c->max_seq) text->T = c->max_seq;
  if (text->n < 2) die(EXIT_USAGE, "file=%s: expected a text of at least 2 tokens, found %zu", o->file, text->n);
  if ((size_t)text->T > text->n - 1) text->T = (int)(text->n - 1);
  size_t all = (text->n - 1 + (size_t)text->T * CONVERT_ROWS - 1) / ((size_t)text->T * CONVERT_ROWS);
  text->batches = all < (size_t)o->eval_batches ? (int)all : o->eval_batches;
}

// Batch number i; windows behind the end of the text have no targets.
static void convert_batch_(const ConvertText_ *text, int i, Batch *b) {
  b->n_targets = 0;
  for (int r = 0; r < CONVERT_ROWS * text->T; r++) {
    size_t at = (size_t)i * CONVERT_ROWS * (size_t)text->T + (size_t)r;
    int there = at + 1 < text->n;
    b->tokens[r] = there ? text->ids[at] : 0;
    b->targets[r] = there ? text->ids[at + 1] : IGNORE;
    b->start[r] = 0;
    b->pos[r] = r % text->T;
    b->n_targets += there;
  }
}

// Mean loss of m, which gets batch buffers here.
static double convert_loss_(Model *m, const ConvertText_ *text) {
  Batch b;
  double loss = 0, targets = 0;
  model_alloc_batch(m, CONVERT_ROWS, text->T, 1, m->frozen);
  batch_alloc(&b, CONVERT_ROWS, text->T);
  float *coef = (float *)xcalloc((size_t)m->R, sizeof(float));
  for (int i = 0; i < text->batches; i++) {
    convert_batch_(text, i, &b);
    loss += batch_loss(m, &b, 0, coef, 0);
    targets += (double)b.n_targets;
  }
  free(coef);
  batch_free(&b);
  return loss / targets;
}

// The model of an exporter with float master weights, at lambda.
static void convert_master_(Model *m, Exporter *e, int precision, float lambda) {
  model_open(m, &e->c, precision);
  float *host = (float *)xmalloc(largest_tensor_(&m->table) * sizeof(float));
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    exporter_floats(e, i, host, 0, t->n);
    dev_copy_in(m->params + t->offset, host, t->n * sizeof(float));
  }
  free(host);
  model_quantize(m, lambda);
}

// The same packed.
static void convert_packed_(Model *m, Exporter *e, int precision) {
  float gamma;
  int part;
  model_open_frozen(m, &e->c, precision, 0, 0);
  size_t most = largest_tensor_(&m->table);
  float *host = (float *)xmalloc(most * sizeof(float)), *device = (float *)device_memory_(most * sizeof(float), "a matrix");
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (t->flags & TERNARY) {
      dev_copy_in(device, exporter_codes(e, i, &gamma), t->n);
      BitWeight *w = frozen_weight(m, i, &part);
      weight_pack_codes(w, part, (const int8_t *)device, 0, (int)t->shape[0], gamma);
      continue;
    }
    exporter_floats(e, i, host, 0, t->n);
    dev_copy_in(t->flags & EMBED ? device : m->params + t->offset, host, t->n * sizeof(float));
    if (t->flags & EMBED) head_rows(i > 0 || e->c.tie_embeddings ? &m->head : &m->embed, device, 0, m->c.vocab);
  }
  dev_free(device);
  free(host);
}

/*
Gains for inserted sub-norms: the mean size of what goes into the projection, measured in the float network on some batches, so that
the norm changes as little as it can. Sets e->gain.
*/
static void convert_calibrate_(Exporter *e, const char *path, const ConvertText_ *text, int precision) {
  Model m;
  Batch b;
  const Config *c = &e->s->c;
  size_t widths[2] = {(size_t)c->heads * (size_t)c->head_dim, (size_t)c->ffn_dim},
         widest = widths[0] > widths[1] ? widths[0] : widths[1];
  int codes = model_load(&m, path, precision);
  if (codes > 0) die(EXIT_USAGE, "calibrate: %s has no float weights to measure with", path);
  model_quantize(&m, 0);
  model_alloc_batch(&m, CONVERT_ROWS, text->T, 0, 0);
  batch_alloc(&b, CONVERT_ROWS, text->T);
  float *coef = (float *)xcalloc((size_t)m.R, sizeof(float)), *x = (float *)xmalloc(widest * sizeof(float));
  double *sum = (double *)xcalloc(2 * (size_t)c->layers, sizeof(double)), rows = 0;
  for (int i = 0; i < text->batches; i++) {
    convert_batch_(text, i, &b);
    batch_loss(&m, &b, 0, coef, 0);
    for (int r = 0; r < m.R; r++) {
      if (b.targets[r] == IGNORE) continue;
      rows++;
      for (int k = 0; k < 2 * c->layers; k++) {
        const QAct *q = k % 2 ? &m.acts[k / 2].h4 : &m.acts[k / 2].h2;
        double squares = 0;
        dev_floatx_out(x, (const floatX *)q->data + (size_t)r * widths[k % 2], widths[k % 2]);
        for (size_t j = 0; j < widths[k % 2]; j++) squares += (double)x[j] * (double)x[j];
        sum[k] += sqrt(squares / (double)widths[k % 2]);
      }
    }
  }
  for (int i = 0; i < e->table.count; i++) {
    const char *rest;
    int layer = name_layer_(e->table.tensors[i].name, &rest);
    if (e->from[i] < 0) e->gain[i] = (float)(sum[2 * layer + (strncmp(rest, "mlp", 3) == 0)] / rows);
  }
  free(sum);
  free(x);
  free(coef);
  batch_free(&b);
  model_free(&m);
}

// ---------------------------------------------------------------------------------------------------------
// The mode.

// The Config to be written: the source's, with what the user asks for. Exit 2 where that is not a conversion.
static void convert_config_(Config *c, const Options *o) {
  struct { const char *name; int *field, value; } subs[] = {{"attn_sub_norm", &c->attn_sub_norm, o->attn_sub_norm},
                                                            {"ffn_sub_norm", &c->ffn_sub_norm, o->ffn_sub_norm}};
  static const char *const free_options[] = {"attn_sub_norm", "ffn_sub_norm", "activation", "max_seq", "act_bits"};
  for (size_t i = 0; i < ARRAY_LEN(subs); i++) {
    if (options_is_set(o, subs[i].name) != FROM_USER) continue;
    if (*subs[i].field && !subs[i].value)
      die(EXIT_USAGE, "%s=0: the model has this norm; taking it out would make another model", subs[i].name);
    *subs[i].field = subs[i].value;
  }
  if (options_is_set(o, "activation") == FROM_USER) c->activation = o->activation;
  if (options_is_set(o, "max_seq") == FROM_USER) c->max_seq = o->max_seq;
  if (options_is_set(o, "act_bits") == FROM_USER) c->act_bits = o->act_bits;
  for (int i = 0; i < OPTION_COUNT; i++) {
    int allowed = option_rows[i].group != GROUP_MODEL || o->from[i] != FROM_USER;
    for (size_t k = 0; k < ARRAY_LEN(free_options) && !allowed; k++) allowed = strcmp(free_options[k], option_rows[i].name) == 0;
    if (!allowed) die(EXIT_USAGE, "convert: %s is the model's own and cannot be changed", option_rows[i].name);
  }
  const char *why = config_check(c);
  if (why) die(EXIT_USAGE, "%s", why);
}

// The form of a directory from the options.
static void convert_form_(WeightForm *form, const Options *o, const Config *c) {
  int biased = c->qkv_bias || c->o_bias;
  memset(form, 0, sizeof *form);
  if (o->type > TYPE_F16)
    die(EXIT_USAGE, "type=%s is for format=gguf; here it is auto, f32, bf16 or f16", option_choice_name("type", o->type));
  if (o->lambda != 0 && o->lambda != 1)
    die(EXIT_USAGE, "lambda=%g: files are for 1 (ternary) or 0 (float); there is nothing in between", o->lambda);
  form->dtype = o->type == TYPE_BF16 ? ST_BF16 : o->type == TYPE_F16 ? ST_F16 : ST_F32;
  form->plain = o->lambda == 0;
  if (o->format == FORMAT_PACKED) {
    int divide = o->scale == SCALE_DIVIDE || (o->scale == SCALE_AUTO && biased);
    if (biased && !divide) die(EXIT_USAGE, "scale=multiply: transformers would multiply the biases, too; use scale=divide");
    form->packed = divide ? PACKED_DIVIDE : PACKED_MULTIPLY;
  }
  if (o->format == FORMAT_TRITS) form->packed = PACKED_TRITS;
  if (o->format == FORMAT_COMPRESS) form->packed = PACKED_RECORD;
  form->folded = (o->format == FORMAT_HF || o->format == FORMAT_PACKED) && !form->plain && (o->fold || export_must_fold(c));
}

// The type of matrices in a GGUF file.
static int convert_gguf_type_(const Options *o, const Config *c) {
  static const int types[] = {0, GGUF_F32, GGUF_BF16, GGUF_F16, GGUF_Q8_0, GGUF_TQ1_0, GGUF_TQ2_0, GGUF_I2_S};
  if (o->type != TYPE_AUTO) return types[o->type];
  if (o->lambda == 0) return GGUF_F16;
  return c->activation == ACT_RELU2 ? GGUF_I2_S : GGUF_TQ2_0;   // relu2 runs in bitnet.cpp only
}

static void convert_put_sizes_(const Exporter *e, const Sizes *s) {
  double n[3] = {0, 0, 0};
  for (int i = 0; i < e->table.count; i++) {
    const Tensor *t = &e->table.tensors[i];
    n[t->flags & TERNARY ? 0 : t->flags & EMBED ? 1 : 2] += (double)t->n;
  }
  const char *names[] = {"matrices", "embeddings", "norms, biases"};
  const size_t bytes[] = {s->matrices, s->embeddings, s->others};
  for (int i = 0; i < 3; i++)
    printf("%-14s %12.0f values %14zu bytes %7.3f bits each\n", names[i], n[i], bytes[i],
           n[i] > 0 ? 8.0 * (double)bytes[i] / n[i] : 0);
  printf("%-14s %19s %14zu bytes\n%-14s %19s %14zu bytes\n", "header", "", s->overhead, "file", "", s->file);
}

// Writes one of the five forms; place (=) what can be loaded again.
static void convert_write_(Exporter *e, const Options *o, const Tokenizer *tok, char *place, size_t cap) {
  static const int embed_types[] = {GGUF_F16, GGUF_F32, GGUF_BF16, GGUF_Q8_0};
  WeightForm form;
  Sizes sizes;
  const char *why;
  size_t n = strlen(o->out);
  if (o->format != FORMAT_GGUF) {
    convert_form_(&form, o, &e->c);
    if ((why = export_refusal(e, &form)) != NULL) die(EXIT_USAGE, "format=%s: %s", option_choice_name("format", o->format), why);
    make_dirs(o->out);
    snprintf(place, cap, "%s", o->out);
    export_directory(e, tok, &form, o->ternary_embed, o->out, &sizes);
  } else {
    int other, type = convert_gguf_type_(o, &e->c), file = n > 5 && strcmp(o->out + n - 5, ".gguf") == 0;
    const char *arch;
    if (o->lambda != 0 && o->lambda != 1) die(EXIT_USAGE, "lambda=%g: files are for 1 (ternary) or 0 (float)", o->lambda);
    if ((why = gguf_refusal(e, type, o->lambda == 1)) != NULL) die(EXIT_USAGE, "format=gguf: %s", why);
    if (file) {
      snprintf(place, cap, "%s", o->out);
    } else {
      make_dirs(o->out);
      path_join(place, cap, o->out, "model.gguf");
    }
    arch = gguf_architecture(&e->c, type, &why);
    export_gguf(e, tok, type, embed_types[o->embed_type], o->lambda == 1, place, o->name[0] ? o->name : "bitnet.c", &sizes, &other);
    printf("architecture %s, matrices %s\n", arch, gguf_type((uint32_t)type)->name);
    if (other)
      printf("note: %d matrices have rows that %s cannot hold; they are Q8_0 or F16\n", other, gguf_type((uint32_t)type)->name);
    if (tok == NULL || tok->kind == TOKENIZER_CHARACTERS) printf("note: no vocabulary in the file; it takes token ids only\n");
  }
  convert_put_sizes_(e, &sizes);
}

UNUSED static void mode_convert(Options *o) {
  ModelSource s;
  Exporter e;
  Config c;
  Tokenizer tok;
  ConvertText_ text;
  Model m;
  char from[4096], place[4096], real_from[PATH_MAX], real_out[PATH_MAX];
  if (o->out[0] == 0) die(EXIT_USAGE, "convert needs out=: where the model shall go");
  if (o->params[0]) {
    convert_blank_(o);
    return;
  }
  if ((o->init[0] != 0) == (o->dir[0] != 0)) die(EXIT_USAGE, "convert needs one model: init=MODEL, or params=750M for a new one");
  checkpoint_path(from, sizeof from, o->init[0] ? o->init : o->dir);
  if (realpath(from, real_from) && realpath(o->out, real_out) && strcmp(real_from, real_out) == 0)
    die(EXIT_USAGE, "out=%s is the model itself; choose another place", o->out);
  source_open(&s, from);
  int ternary = 0, has_tok = o->tokenizer[0] || checkpoint_has_tokenizer(from);
  for (int i = 0; i < s.table.count; i++) ternary += s.tensors[i].ternary;
  if (ternary && o->lambda == 0) die(EXIT_USAGE, "lambda=0: %s holds ternary codes, there are no float weights behind them", from);
  c = s.c;
  convert_config_(&c, o);
  if (o->tokenizer[0]) tokenizer_load(&tok, o->tokenizer);
  else if (has_tok) checkpoint_tokenizer(&tok, from);
  if (has_tok && tok.vocab_size > c.vocab) die(EXIT_USAGE, "the tokenizer has %d tokens, the model only %d", tok.vocab_size, c.vocab);
  exporter_open(&e, &s, &c);
  convert_text_(&text, o, has_tok ? &tok : NULL, &c);
  if (o->calibrate) {
    if (text.n == 0) die(EXIT_USAGE, "calibrate=%d needs a text: file=TEXT", o->calibrate);
    ConvertText_ some = text;
    if (o->calibrate < some.batches) some.batches = o->calibrate;
    convert_calibrate_(&e, from, &some, o->precision);
  }
  if (c.qkv_bias || c.o_bias) printf("note: biases stay float; they are added after the integer product\n");
  convert_write_(&e, o, has_tok ? &tok : NULL, place, sizeof place);
  if (text.n) {
    int packed = o->lambda == 1 && c.act_bits > 0;
    convert_master_(&m, &e, o->precision, (float)o->lambda);
    double loss[3] = {convert_loss_(&m, &text), NAN, NAN};
    model_free(&m);
    if (packed) {
      convert_packed_(&m, &e, o->precision);
      loss[1] = convert_loss_(&m, &text);
      model_free(&m);
    }
    load_to_run(&m, place, o->precision, (float)o->lambda, 0);
    loss[2] = convert_loss_(&m, &text);
    model_free(&m);
    printf("loss on %s: before %.6f", o->file, loss[0]);
    if (packed) printf(" packed %.6f", loss[1]);
    printf(" re-read %.6f gap %+.2e\n", loss[2], loss[2] - loss[0]);
  }
  printf("written: %s\n", place);
  free(text.ids);
  exporter_close(&e);
  source_close(&s);
  if (has_tok) tokenizer_free(&tok);
}

#endif
