/*
checkpoint.h: models on disk. A checkpoint IS a Hugging Face model directory, plus one file with the training state.

What it is:  Config to config.json, parameters from any model file and to model.safetensors, the optimizer's moments and the step in
             training_state.safetensors, and the order of writing that leaves a loadable checkpoint whatever happens.
What not:    the formats that models are read from (source.h); packed weights and GGUF are written by modes/convert.h.
Read before: bitnet/model.h, bitnet/source.h, bitnet/options.h, tokenizer.h.
Defines:     config_from_options, config_to_options, config_put_form; checkpoint_path, checkpoint_run, checkpoint_options,
             checkpoint_resume_options, checkpoint_save; model_load, model_load_frozen, checkpoint_tokenizer, checkpoint_has_tokenizer;
             State, state_load.

    RUN/checkpoints/step_000400/     config.json  generation_config.json  model.safetensors (float32 master weights)
                                     tokenizer.json  tokenizer_config.json  training_state.safetensors
    RUN/checkpoints/latest           the name of the newest complete one: "step_000400"

Saving writes everything into step_000400.tmp, each file flushed to the disk, renames the directory, and rewrites `latest` last. A
crash before the rename leaves a .tmp that nobody reads; a crash after it leaves a complete directory. Either way `latest` names
a complete checkpoint.
*/
#ifndef BITNET_CHECKPOINT_H
#define BITNET_CHECKPOINT_H

#include "gguf_tokenizer.h"
#include "options.h"
#include "source.h"
#include <dirent.h>

// ---------------------------------------------------------------------------------------------------------
// Config and options.

// The shape that the options describe; vocab and seq_len are resolved before.
UNUSED static void config_from_options(Config *c, const Options *o) {
  memset(c, 0, sizeof *c);
  c->dim = o->dim;
  c->layers = o->layers;
  c->heads = o->heads;
  c->kv_heads = o->kv_heads ? o->kv_heads : o->heads;
  if (o->head_dim == 0 && o->dim % o->heads != 0)
    die(EXIT_USAGE, "dim=%d is not a multiple of heads=%d; set head_dim, or change one of them", o->dim, o->heads);
  c->head_dim = o->head_dim ? o->head_dim : o->dim / o->heads;
  c->ffn_dim = o->ffn_dim;
  c->vocab = o->vocab;
  c->max_seq = o->max_seq ? o->max_seq : o->seq_len;
  c->norm_eps = (float)o->norm_eps;
  c->rope_theta = o->rope_theta;
  c->rope_llama3 = o->rope_scaling;
  c->rope_factor = o->rope_factor;
  c->rope_low_freq = o->rope_low_freq;
  c->rope_high_freq = o->rope_high_freq;
  c->rope_original_max = o->rope_original_max;
  c->activation = o->activation;
  c->attn_sub_norm = o->attn_sub_norm;
  c->ffn_sub_norm = o->ffn_sub_norm;
  c->qkv_bias = o->qkv_bias;
  c->o_bias = o->o_bias;
  c->qk_norm = o->qk_norm;
  c->tie_embeddings = o->tie_embeddings;
  c->act_bits = o->act_bits;
  c->init_std = (float)o->init_std;
  const char *why = config_check(c);
  if (why) die(EXIT_USAGE, "%s", why);
}

/*
The other way round, for a run that starts from a model directory: the options show what the model is. A model option that the user set
must agree, except max_seq and act_bits, which may be chosen anew; then c is changed.
*/
UNUSED static void config_to_options(Options *o, Config *c) {
  Options had = *o;
  if (options_is_set(o, "max_seq") == FROM_USER) c->max_seq = o->max_seq;
  if (options_is_set(o, "act_bits") == FROM_USER) c->act_bits = o->act_bits;
  o->dim = c->dim;
  o->layers = c->layers;
  o->heads = c->heads;
  o->kv_heads = c->kv_heads;
  o->head_dim = c->head_dim;
  o->ffn_dim = c->ffn_dim;
  o->vocab = c->vocab;
  o->max_seq = c->max_seq;
  o->norm_eps = (double)c->norm_eps;
  o->rope_theta = c->rope_theta;
  o->rope_scaling = c->rope_llama3;
  o->rope_factor = c->rope_factor;
  o->rope_low_freq = c->rope_low_freq;
  o->rope_high_freq = c->rope_high_freq;
  o->rope_original_max = c->rope_original_max;
  o->activation = c->activation;
  o->attn_sub_norm = c->attn_sub_norm;
  o->ffn_sub_norm = c->ffn_sub_norm;
  o->qkv_bias = c->qkv_bias;
  o->o_bias = c->o_bias;
  o->qk_norm = c->qk_norm;
  o->tie_embeddings = c->tie_embeddings;
  o->act_bits = c->act_bits;
  o->init_std = (double)c->init_std;
  for (int i = 0; i < OPTION_COUNT; i++) {
    const OptionRow *r = &option_rows[i];
    size_t size = r->type == OPTION_REAL ? sizeof(double) : sizeof(int);
    if (r->group == GROUP_MODEL && had.from[i] == FROM_USER && memcmp((char *)o + r->offset, (char *)&had + r->offset, size) != 0)
      die(EXIT_USAGE, "%s differs from the model in init=%s, whose shape is fixed; leave the option out", r->name, o->init);
  }
}

// The Hugging Face class that can express this Config, or "bitnet_c" where none can. Its architecture goes to *architecture.
UNUSED static const char *config_model_type(const Config *c, const char **architecture) {
  int plain = !c->qkv_bias && !c->o_bias && !c->qk_norm, quantised = c->act_bits == 8;
  *architecture = "BitnetCForSequenceScore";
  if (c->value_head) return "bitnet_c";
  *architecture = "BitNetForCausalLM";
  if (quantised && c->attn_sub_norm && c->ffn_sub_norm && !c->qk_norm && c->qkv_bias == c->o_bias && c->heads * c->head_dim == c->dim)
    return "bitnet";
  *architecture = "LlamaForCausalLM";
  if (quantised && !c->attn_sub_norm && !c->ffn_sub_norm) {
    if (plain || (c->qkv_bias && c->o_bias && !c->qk_norm)) return "llama";
    *architecture = "Qwen2ForCausalLM";
    if (c->qkv_bias && !c->o_bias && !c->qk_norm && c->heads * c->head_dim == c->dim) return "qwen2";
    *architecture = "Qwen3ForCausalLM";
    if (c->qk_norm && !c->qkv_bias && !c->o_bias) return "qwen3";
  }
  *architecture = "BitnetCForCausalLM";
  return "bitnet_c";
}

static void put_member_(StrBuf *b, const char *key, double value) {
  strbuf_printf(b, "  \"%s\": ", key);
  json_put_number(b, value);
  strbuf_printf(b, ",\n");
}

/*
Appends config.json. All fields are written, because the defaults differ between classes and versions. The old spelling rope_theta +
rope_scaling is understood by old and new releases of transformers. The object "bitnet_c" holds what other programs do not know. t may
be NULL.
*/
UNUSED static void config_put_form(StrBuf *b, const Config *c, const Tokenizer *t, const WeightForm *form) {
  static const char *const dtypes[] = {"float32", "bfloat16", "float16"};
  Config bare = *c;
  if (form->folded) bare.attn_sub_norm = bare.ffn_sub_norm = 0;
  const char *architecture, *type = config_model_type(&bare, &architecture);
  size_t start = b->len;
  strbuf_printf(b, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n", architecture, type);
  put_member_(b, "vocab_size", c->vocab);
  put_member_(b, "hidden_size", c->dim);
  put_member_(b, "intermediate_size", c->ffn_dim);
  put_member_(b, "num_hidden_layers", c->layers);
  put_member_(b, "num_attention_heads", c->heads);
  put_member_(b, "num_key_value_heads", c->kv_heads);
  put_member_(b, "head_dim", c->head_dim);
  put_member_(b, "max_position_embeddings", c->max_seq);
  put_member_(b, "rms_norm_eps", (double)c->norm_eps);
  put_member_(b, "initializer_range", (double)c->init_std);
  strbuf_printf(b, "  \"hidden_act\": \"%s\",\n", c->activation == ACT_RELU2 ? "relu2" : "silu");
  strbuf_printf(b, "  \"attention_bias\": %s,\n  \"mlp_bias\": false,\n  \"attention_dropout\": 0.0,\n", c->o_bias ? "true" : "false");
  strbuf_printf(b, "  \"tie_word_embeddings\": %s,\n  \"use_cache\": true,\n", c->tie_embeddings ? "true" : "false");
  put_member_(b, "rope_theta", c->rope_theta);
  strbuf_printf(b, "  \"rope_scaling\": ");
  if (c->rope_llama3) {
    strbuf_printf(b, "{\"rope_type\": \"llama3\", \"factor\": ");
    json_put_number(b, c->rope_factor);
    strbuf_printf(b, ", \"low_freq_factor\": ");
    json_put_number(b, c->rope_low_freq);
    strbuf_printf(b, ", \"high_freq_factor\": ");
    json_put_number(b, c->rope_high_freq);
    strbuf_printf(b, ", \"original_max_position_embeddings\": %d},\n", c->rope_original_max);
  } else {
    strbuf_printf(b, "null,\n");
  }
  const char *names[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
  int ids[] = {t ? t->bos_id : -1, t ? t->eos_id : -1, t ? t->pad_id : -1};
  for (int i = 0; i < 3; i++) {
    if (ids[i] >= 0) strbuf_printf(b, "  \"%s\": %d,\n", names[i], ids[i]);
    else strbuf_printf(b, "  \"%s\": null,\n", names[i]);
  }
  strbuf_printf(b, "  \"torch_dtype\": \"%s\",\n", dtypes[form->dtype]);
  if (form->packed >= PACKED_TRITS) {
    strbuf_printf(b, "  \"quantization_config\": {\"quant_method\": \"bitnet_c\", \"quantization_mode\": \"%s\"},\n",
                  form->packed == PACKED_TRITS ? "trits" : "record");
  } else if (!form->plain) {
    strbuf_printf(b, "  \"quantization_config\": {\"quant_method\": \"bitnet\", \"linear_class\": \"%s\", "
                     "\"quantization_mode\": \"%s\", \"use_rms_norm\": %s, ",
                  form->packed == PACKED_DIVIDE ? "bitlinear" : "autobitlinear", form->packed ? "offline" : "online",
                  form->folded ? "true" : "false");
    if (form->folded) {
      strbuf_printf(b, "\"rms_norm_eps\": ");
      json_put_number(b, (double)c->norm_eps);
      strbuf_printf(b, ", ");
    }
    strbuf_printf(b, "\"modules_to_not_convert\": null},\n");
  }
  strbuf_printf(b,
                "  \"bitnet_c\": {\"attn_sub_norm\": %d, \"ffn_sub_norm\": %d, \"qkv_bias\": %d, \"o_bias\": %d, \"qk_norm\": %d, "
                "\"act_bits\": %d, ",
                c->attn_sub_norm, c->ffn_sub_norm, c->qkv_bias, c->o_bias, c->qk_norm, c->act_bits);
  if (c->value_head) strbuf_printf(b, "\"value_head\": 1, ");
  if (t) strbuf_printf(b, "\"tokenizer_hash\": \"%016llx\", ", (unsigned long long)tokenizer_hash(t));
  strbuf_printf(b, CONFIG_CRC_ "00000000\"}\n}\n");
  char digits[16];
  snprintf(digits, sizeof digits, "%08x", crc32_bytes(0, b->data + start, b->len - start));
  memcpy(strstr(b->data + start, CONFIG_CRC_) + strlen(CONFIG_CRC_), digits, 8);
}

// ---------------------------------------------------------------------------------------------------------
// Which directory is meant.

// dir may be a run (then its newest checkpoint is meant), a model directory, or a file with a model. Exit 2 if it is none.
UNUSED static void checkpoint_path(char *out, size_t cap, const char *dir) {
  char path[4096], index[4096];
  size_t len;
  path_join(path, sizeof path, dir, "checkpoints/latest");
  char *name = read_file(path, &len);
  if (name) {
    char inside[4096];
    while (len > 0 && (name[len - 1] == '\n' || name[len - 1] == ' ')) name[--len] = 0;
    if (len == 0 || strlen(name) != len || strchr(name, '/') || strcmp(name, "..") == 0)
      die(EXIT_DAMAGED, "%s: expected the name of a checkpoint, found '%.40s'", path, name);
    path_join(inside, sizeof inside, dir, "checkpoints");
    path_join(out, cap, inside, name);
    free(name);
    if (!is_dir(out)) die(EXIT_DAMAGED, "%s names %s, which does not exist", path, out);
    return;
  }
  path_join(path, sizeof path, dir, "model.safetensors");
  path_join(index, sizeof index, dir, "model.safetensors.index.json");
  if (!is_file(path) && !is_file(index) && !is_file(dir)) {
    if (!is_dir(dir)) die(EXIT_USAGE, "there is no file and no directory %s", dir);
    die(EXIT_USAGE, "%s is neither a run (it has no checkpoints/latest) nor a model directory (it has no model.safetensors)", dir);
  }
  int n = snprintf(out, cap, "%s", dir);
  if (n < 0 || (size_t)n >= cap) die(EXIT_USAGE, "path too long: %s", dir);
  for (n--; n > 0 && out[n] == '/'; n--) out[n] = 0;
}

/*
The run that a checkpoint belongs to: RUN of RUN/checkpoints/step_NNNNNN. Exit 2 if the checkpoint does not lie in a run, or is not its
newest: going on from an older one would overwrite the ones after it.
*/
UNUSED static void checkpoint_run(char *run, size_t cap, const char *checkpoint) {
  static const char middle[] = "/checkpoints/";
  const char *slash = strrchr(checkpoint, '/');
  size_t m = strlen(middle), head = slash ? (size_t)(slash + 1 - checkpoint) : 0;
  if (head < m || strncmp(checkpoint + head - m, middle, m) != 0 || head - m >= cap)
    die(EXIT_USAGE, "%s is not the checkpoint of a run; start a new run from it with init=%s", checkpoint, checkpoint);
  memcpy(run, checkpoint, head - m);
  run[head - m] = 0;
  char newest[4096];
  checkpoint_path(newest, sizeof newest, run);
  if (strcmp(strrchr(newest, '/'), slash) != 0)
    die(EXIT_USAGE, "%s is not the newest checkpoint of its run (%s is); go on with resume=%s, or start a new run with init=%s",
        checkpoint, newest, run, checkpoint);
}

// ---------------------------------------------------------------------------------------------------------
// Parameters.

// Copies one tensor of the training state to the device after checking its shape and every value.
static void load_tensor_(float *device, const StFile *f, const StTensor *s, const Tensor *t, float *host) {
  source_check_shape_(f->path, s->name, f->data_at + s->begin, s->ndim, s->shape, t->ndim, t->shape);
  st_read_f32(f, s, host, 0, t->n);
  for (size_t i = 0; i < t->n; i++) {
    if (!isfinite(host[i]))
      die(EXIT_DAMAGED, "%s: tensor %s at offset %zu: element %zu: expected a finite number, found %g", f->path, s->name,
          f->data_at + s->begin, i, (double)host[i]);
  }
  dev_copy_in(device, host, t->n * sizeof(float));
}

// The largest tensor of a table, in elements.
static size_t largest_tensor_(const TensorTable *t) {
  size_t n = 0;
  for (int i = 0; i < t->count; i++) n = t->tensors[i].n > n ? t->tensors[i].n : n;
  return n;
}

/*
Builds the model of a directory or file: its Config and its parameters, whatever program wrote them. Matrices that the file holds as
ternary codes get master weights which quantise to the same codes and scale; their number is returned. Exits as source_open does.
*/
UNUSED static int model_load(Model *m, const char *path, int precision) {
  ModelSource s;
  int codes_only = 0;
  source_open(&s, path);
  model_open(m, &s.c, precision);
  size_t most = largest_tensor_(&m->table);
  float *host = (float *)xmalloc(size_mul(most, sizeof(float)));
  int8_t *codes = (int8_t *)xmalloc(most);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    if (s.tensors[i].ternary) source_master(&s, i, host, codes);
    else source_floats(&s, i, host, 0, t->n);
    codes_only += s.tensors[i].ternary;
    dev_copy_in(m->params + t->offset, host, t->n * sizeof(float));
    source_release(&s, i);
  }
  free(codes);
  free(host);
  source_close(&s);
  return codes_only;
}

static size_t load_chunk = (size_t)1 << 20;   // floats, or fours of codes, that a frozen model is read by; tests make it small

/*
What a frozen model is read through. Where ops read memory of the host, both are the same; otherwise everything is copied to the device
before an op gets it.
*/
typedef struct {
  float *host, *device;
} Stage_;

static Stage_ stage_open_(size_t floats) {
  Stage_ st;
  st.host = (float *)xmalloc(size_mul(floats, sizeof(float)));
  st.device = dev_reads_host() ? st.host : (float *)dev_malloc(floats * sizeof(float));
  if (st.device == NULL) die(EXIT_FAILED, "out of memory: %.1f MB to read a matrix", (double)(floats * sizeof(float)) / 1e6);
  return st;
}

static void stage_close_(Stage_ *st) {
  if (st->device != st->host) dev_free(st->device);
  free(st->host);
}

// The first `bytes` of the stage, for an op.
static const void *staged_(const Stage_ *st, size_t bytes) {
  if (st->device != st->host) dev_copy_in(st->device, st->host, bytes);
  return st->device;
}

// A table of embeddings in memory of its own, some rows at a time.
static void load_rows_(Head *h, const ModelSource *s, int i, const Stage_ *st) {
  size_t C = (size_t)h->C, V = (size_t)h->V, step = load_chunk / C > 0 ? load_chunk / C : 1;
  for (size_t v = 0; v < V; v += step) {
    size_t n = V - v < step ? V - v : step;
    source_floats(s, i, st->host, v * C, n * C);
    head_rows(h, (const float *)staged_(st, n * C * sizeof(float)), (int)v, (int)n);
    source_release(s, i);   // so that table and file are never both in memory
  }
}

// A table that stays in its file. Once it has been checked and read for the screen, its memory is given back: a screened search reads
// few rows of it.
static void load_in_file_(Head *h, FilePart *part, const ModelSource *s, int i) {
  size_t C = (size_t)h->C, V = (size_t)h->V, step = load_chunk / C > 0 ? load_chunk / C : 1;
  size_t size = h->half ? sizeof(uint16_t) : sizeof(float);
  source_map(s, i, part);
  h->table = (void *)part->data;
  for (size_t v = 0; v < V; v += step) {
    size_t n = V - v < step ? V - v : step;
    source_check_finite(s, i, part, size, v * C, n * C);
    head_screen(h, (int)v, (int)n);
    map_release(part->data + v * C * size, part->data + (v + n) * C * size);
  }
}

// Matrix i, which the file holds as codes, some rows at a time. Rows that share bytes of the file follow each other.
static void load_codes_(Model *m, const ModelSource *s, int i, const Stage_ *st) {
  int part;
  BitWeight *w = frozen_weight(m, i, &part);
  size_t K = (size_t)w->K, rows = (size_t)w->parts[part], step = 4 * load_chunk / K / 16 * 16;
  if (step == 0) step = 16;
  size_t apart = source_rows_apart(s, i);
  for (size_t r = 0; r < apart; r += step) {
    for (size_t first = r; first < rows; first += apart) {
      size_t n = apart - r < step ? apart - r : step;
      float gamma = source_codes(s, i, (int8_t *)st->host, first, n);
      weight_pack_codes(w, part, (const int8_t *)staged_(st, n * K), (int)first, (int)n, gamma);
    }
  }
}

/*
The same in the form that only runs, at lambda = 1: the bits of model_load and model_quantize in about a sixteenth of the memory, and
codes that a file holds go in as they are. Besides the model itself there is never more than one matrix in float, and a table whose
numbers lie in the file as they are used is not copied. screened: the model will be asked for most likely tokens, not for logits. Exits
as source_open does.
*/
UNUSED static void model_load_frozen(Model *m, const char *path, int precision, int screened) {
  ModelSource s;
  size_t most = load_chunk;
  int forms[2] = {TABLE_HALF, TABLE_HALF};   // embedding, head
  source_open(&s, path);
  float *host = (float *)xmalloc(load_chunk * sizeof(float));
  for (int i = 0; i < s.table.count; i++) {
    const Tensor *t = &s.table.tensors[i];
    size_t floats = !(t->flags & TERNARY) ? (t->flags & EMBED ? t->shape[1] : t->n) : s.tensors[i].ternary ? 4 * t->shape[1] : t->n;
    most = floats > most ? floats : most;
    if (!(t->flags & EMBED)) continue;
    int half = source_is_half(&s, i, host, load_chunk), in_file = dev_reads_host() && source_in_file(&s, i, half ? 2 : 4);
    forms[i > 0] = (half ? TABLE_HALF : 0) | (in_file ? TABLE_IN_FILE : 0);
    source_release(&s, i);
  }
  free(host);
  if (s.c.tie_embeddings) forms[1] = forms[0];
  model_open_frozen(m, &s.c, precision, forms[0], forms[1] | (screened ? 0 : TABLE_UNSCREENED));
  Stage_ st = stage_open_(most);
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    int part, is_head = i > 0 || s.c.tie_embeddings;
    if (t->flags & EMBED && forms[is_head] & TABLE_IN_FILE) {
      load_in_file_(is_head ? &m->head : &m->embed, is_head ? &m->head_file : &m->embed_file, &s, i);
    } else if (t->flags & EMBED) {
      load_rows_(is_head ? &m->head : &m->embed, &s, i, &st);
    } else if (s.tensors[i].ternary) {
      load_codes_(m, &s, i, &st);
    } else {
      source_floats(&s, i, st.host, 0, t->n);
      if (t->flags & TERNARY) {
        BitWeight *w = frozen_weight(m, i, &part);
        weight_pack(w, part, (const float *)staged_(&st, t->n * sizeof(float)));
      } else {
        dev_copy_in(m->params + t->offset, st.host, t->n * sizeof(float));
      }
    }
    source_release(&s, i);
  }
  if (s.c.tie_embeddings) m->embed = m->head;
  stage_close_(&st);
  source_close(&s);
}

/*
The tokenizer of a model directory. If we wrote the directory, config.json knows the hash of the vocabulary and the special ids, and a
tokenizer that differs is refused: it would encode silently wrong.
*/
static void directory_tokenizer_(Tokenizer *t, const char *dir) {
  char path[4096], err[256], hash[32];
  size_t len;
  JsonDoc doc;
  tokenizer_load(t, dir);
  path_join(path, sizeof path, dir, "config.json");
  char *text = read_file(path, &len);
  if (text == NULL) return;
  if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s", path, err);
  const Json *own = json_get(doc.root, "bitnet_c");
  const char *expected = own ? json_get_string(own, "tokenizer_hash", "") : "";
  if (expected[0]) {
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)tokenizer_hash(t));
    if (strcmp(hash, expected) != 0)
      die(EXIT_DAMAGED,
          "%s/tokenizer.json: expected the vocabulary with hash %s that config.json names, found %s; the file is damaged or of "
          "another model",
          dir, expected, hash);
    const char *names[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    int ids[] = {t->bos_id, t->eos_id, t->pad_id};
    for (int i = 0; i < 3; i++) {
      int want = config_int_(path, doc.root, names[i], -1);
      if (want != ids[i])
        die(EXIT_DAMAGED, "%s/tokenizer_config.json: %s: expected %d as config.json says, found %d", dir, names[i], want, ids[i]);
    }
  }
  int vocab = config_int_(path, doc.root, "vocab_size", INT_MAX);
  if (t->vocab_size > vocab) die(EXIT_DAMAGED, "%s: tokenizer.json has %d tokens, the model only %d", dir, t->vocab_size, vocab);
  t->vocab_padded = vocab;
  json_free(&doc);
  free(text);
}

/*
The tokenizer that lies in a GGUF file, or beside a llama2.c file: tokenizer.bin, or tok512.bin for a vocabulary of 512. found (=) the
place of the latter. Returns 0 if there is none.
*/
static int file_tokenizer_(char *found, size_t cap, const char *path) {
  Config c;
  char dir[4096], name[64];
  if (source_begins_(path, "GGUF")) {
    Gguf g;
    char model[32];
    gguf_open(&g, path);
    gguf_text(&g, "tokenizer.ggml.model", model, sizeof model, "none");
    gguf_close(&g);
    return strcmp(model, "none") != 0;
  }
  config_read(&c, path);
  snprintf(dir, sizeof dir, "%s", path);
  char *slash = strrchr(dir, '/');
  if (slash) *slash = 0;
  else strcpy(dir, ".");
  snprintf(name, sizeof name, "tok%d.bin", c.vocab);
  path_join(found, cap, dir, "tokenizer.bin");
  if (is_file(found)) return 1;
  path_join(found, cap, dir, name);
  return is_file(found);
}

// 1 if a model directory or file brings a tokenizer.
UNUSED static int checkpoint_has_tokenizer(const char *path) {
  char file[4096];
  if (is_file(path)) return file_tokenizer_(file, sizeof file, path);
  path_join(file, sizeof file, path, "tokenizer.json");
  return is_file(file);
}

// The tokenizer of a model directory or file. Exit 2 if there is none, 3 if it is damaged or of another model.
UNUSED static void checkpoint_tokenizer(Tokenizer *t, const char *path) {
  char file[4096];
  Config c;
  if (!is_file(path)) {
    directory_tokenizer_(t, path);
    return;
  }
  config_read(&c, path);
  if (source_begins_(path, "GGUF")) {
    Gguf g;
    gguf_open(&g, path);
    gguf_tokenizer(t, &g);
    gguf_close(&g);
  } else if (file_tokenizer_(file, sizeof file, path)) {
    tokenizer_load(t, file);
  } else {
    die(EXIT_USAGE,
        "%s: there is no tokenizer.bin beside it; copy it there, or make a directory with convert init=%s tokenizer=FILE out=DIR",
        path, path);
  }
  if (t->vocab_size > c.vocab) die(EXIT_DAMAGED, "%s: the tokenizer has %d tokens, the model only %d", path, t->vocab_size, c.vocab);
  t->vocab_padded = c.vocab;
}

// ---------------------------------------------------------------------------------------------------------
// Training state.

typedef struct {
  int64_t step;      // finished steps; the next one has this number
  int64_t updates;   // of them applied: the t of AdamW
  const char *kept;  // for saving: text of the mode (Hooks.keep), or NULL; it is read back with state_kept
} State;

// Opens the training state of a checkpoint; exit 2 if there is none.
static void state_open_(StFile *f, const char *checkpoint) {
  char path[4096];
  path_join(path, sizeof path, checkpoint, "training_state.safetensors");
  if (!is_file(path)) die(EXIT_USAGE, "%s has no training_state.safetensors: it can be used with init=, not with resume=", checkpoint);
  st_open(f, path);
  if (!st_verify(f)) die(EXIT_DAMAGED, "%s: expected checksums in its metadata, found none", path);
}

// A whole number of the metadata.
static int64_t state_number_(const StFile *f, const char *key) {
  const char *text = st_metadata(f, key);
  char *end = NULL;
  long long v = text ? strtoll(text, &end, 10) : -1;
  if (text == NULL || *text == 0 || *end || v < 0 || v > INT_MAX)
    die(EXIT_DAMAGED, "%s: metadata %s: expected a count, found %s", f->path, key, text ? text : "nothing");
  return v;
}

// The moments into m (which has them allocated), the counters into s.
UNUSED static void state_load(State *s, Model *m, const char *checkpoint) {
  StFile f;
  char name[160];
  state_open_(&f, checkpoint);
  s->step = state_number_(&f, "step");
  s->updates = state_number_(&f, "updates");
  float *host = (float *)xmalloc(largest_tensor_(&m->table) * sizeof(float));
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    for (int k = 0; k < 2; k++) {
      snprintf(name, sizeof name, "%s.%s", k ? "v" : "m", t->name);
      const StTensor *x = st_find(&f, name);
      if (x == NULL) die(EXIT_DAMAGED, "%s: tensor %s is missing", f.path, name);
      load_tensor_((k ? m->v : m->m) + t->offset, &f, x, t, host);
    }
  }
  free(host);
  st_close(&f);
}

// The text that the mode has kept in a checkpoint; NULL if there is none. The caller frees it.
UNUSED static char *state_kept(const char *checkpoint) {
  StFile f;
  state_open_(&f, checkpoint);
  const char *text = st_metadata(&f, "kept");
  char *copy = text ? xstrdup(text) : NULL;
  st_close(&f);
  return copy;
}

// Reads the options that a checkpoint was trained with. Returns 0 if it has no training state.
static int checkpoint_stored_options_(Options *out, const char *checkpoint) {
  StFile f;
  JsonDoc doc;
  char path[4096], err[256];
  path_join(path, sizeof path, checkpoint, "training_state.safetensors");
  if (!is_file(path)) return 0;
  state_open_(&f, checkpoint);
  const char *text = st_metadata(&f, "options");
  if (text == NULL || !json_parse(&doc, text, strlen(text), err, sizeof err))
    die(EXIT_DAMAGED, "%s: metadata options: expected JSON", path);
  options_defaults(out);
  options_from_json(out, doc.root, FROM_FILE, path);
  const Preset *p = preset_find_(json_get_string(doc.root, "preset", ""));
  out->preset = p ? p->name : "";
  json_free(&doc);
  st_close(&f);
  return 1;
}

// Copies the options of these groups from a stored set, except those that the user has set.
static void options_adopt_(Options *o, const Options *stored, int groups) {
  for (int i = 0; i < OPTION_COUNT; i++) {
    const OptionRow *r = &option_rows[i];
    if (!(r->group & groups) || o->from[i] == FROM_USER) continue;
    if (r->type == OPTION_TEXT) option_set_text_(o, i, *option_text_(stored, i));
    else memcpy((char *)o + r->offset, (const char *)stored + r->offset, r->type == OPTION_REAL ? sizeof(double) : sizeof(int));
    o->from[i] = FROM_FILE;
  }
}

// For measuring: data options are those of the training run, where the user says nothing else.
UNUSED static void checkpoint_options(Options *o, const char *checkpoint) {
  Options stored;
  if (!checkpoint_stored_options_(&stored, checkpoint)) return;
  options_adopt_(o, &stored, GROUP_DATA);
  if (options_is_set(o, "seed") != FROM_USER) o->seed = stored.seed;
  if (o->val_data[0] == 0) options_set(o, "val_data", stored.val_data, FROM_FILE);
  options_free(&stored);
}

/*
For going on with a run: all options are those of the run. The user may change what does not change the trained bits (how often to
log, evaluate and save); another value for anything else is an error, because the result would be neither the one nor the other run.
*/
UNUSED static void checkpoint_resume_options(Options *o, const char *checkpoint) {
  Options stored, wanted;
  if (!checkpoint_stored_options_(&stored, checkpoint))
    die(EXIT_USAGE, "%s has no training_state.safetensors: start a new run from it with init=", checkpoint);
  if (o->preset[0] && strcmp(o->preset, stored.preset) != 0)
    die(EXIT_USAGE, "resume=%s: the run has the preset '%s', the command line says '%s'; leave the preset out", o->resume,
        stored.preset, o->preset);
  for (int i = 0; i < OPTION_COUNT; i++) {
    const OptionRow *r = &option_rows[i];
    if (!(r->group & RESULT_GROUPS) || o->from[i] != FROM_USER) continue;
    wanted = *o;
    StrBuf a = {NULL, 0, 0}, b = {NULL, 0, 0};
    option_put_value_(&a, &stored, i);
    option_put_value_(&b, &wanted, i);
    if (strcmp(a.data, b.data) != 0)
      die(EXIT_USAGE, "resume=%s: the run has %s=%s, the command line says %s; what changes the result is fixed. A new run from this "
          "model: init=%s", o->resume, r->name, a.data, b.data, checkpoint);
    strbuf_free(&a);
    strbuf_free(&b);
  }
  options_adopt_(o, &stored, STORED_GROUPS);
  o->preset = stored.preset;
  options_free(&stored);
}

// ---------------------------------------------------------------------------------------------------------
// Saving.

// What the writer asks for: floats of an arena by tensor. Entry i of the state is m of tensor i/2 or v of it.
typedef struct {
  const Model *m;
  int state;   // 0: parameters, 1: moments
} SaveSource_;

static void save_source_(void *ctx, size_t entry, size_t first, size_t count, void *out) {
  const SaveSource_ *s = (const SaveSource_ *)ctx;
  const Tensor *t = &s->m->table.tensors[s->state ? entry / 2 : entry];
  const float *arena = !s->state ? s->m->params : entry % 2 ? s->m->v : s->m->m;
  dev_copy_out(out, arena + t->offset + first, count * sizeof(float));
}

// model.safetensors into dir, as float32. 0 or errno.
static int save_parameters_(const Model *m, const char *dir) {
  char path[4096];
  SaveSource_ source = {m, 0};
  size_t n = (size_t)m->table.count;
  StEntry *entries = (StEntry *)xcalloc(n, sizeof *entries);
  for (size_t i = 0; i < n; i++) {
    const Tensor *t = &m->table.tensors[i];
    entries[i].name = t->name;
    entries[i].dtype = ST_F32;
    entries[i].ndim = t->ndim;
    memcpy(entries[i].shape, t->shape, sizeof t->shape);
  }
  path_join(path, sizeof path, dir, "model.safetensors");
  int err = st_write(path, entries, n, NULL, 0, save_source_, &source);
  free(entries);
  return err;
}

// training_state.safetensors into dir. 0 or errno.
static int save_state_(const Model *m, const Options *o, const State *s, const char *dir) {
  char path[4096], step[32], updates[32];
  SaveSource_ source = {m, 1};
  size_t n = 2 * (size_t)m->table.count;
  StrBuf options = {NULL, 0, 0};
  StEntry *entries = (StEntry *)xcalloc(n, sizeof *entries);
  char *names = (char *)xcalloc(n, 160);
  for (size_t i = 0; i < n; i++) {
    const Tensor *t = &m->table.tensors[i / 2];
    snprintf(names + i * 160, 160, "%s.%s", i % 2 ? "v" : "m", t->name);
    entries[i].name = names + i * 160;
    entries[i].dtype = ST_F32;
    entries[i].ndim = t->ndim;
    memcpy(entries[i].shape, t->shape, sizeof t->shape);
  }
  snprintf(step, sizeof step, "%lld", (long long)s->step);
  snprintf(updates, sizeof updates, "%lld", (long long)s->updates);
  options_put_json(&options, o, STORED_GROUPS);
  StMeta metadata[4] = {{"step", step}, {"updates", updates}, {"options", options.data}, {"kept", s->kept}};
  path_join(path, sizeof path, dir, "training_state.safetensors");
  int err = st_write(path, entries, n, metadata, s->kept ? 4 : 3, save_source_, &source);
  strbuf_free(&options);
  free(names);
  free(entries);
  return err;
}

// A text file into dir. 0 or errno.
static int save_text_(const char *dir, const char *name, const StrBuf *b) {
  char path[4096];
  path_join(path, sizeof path, dir, name);
  return safe_write_file(path, b->data, b->len);
}

// Removes a directory of plain files; what is missing is fine.
static void remove_dir_(const char *dir) {
  char path[4096];
  DIR *d = opendir(dir);
  if (d == NULL) return;
  for (struct dirent *e = readdir(d); e; e = readdir(d)) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    path_join(path, sizeof path, dir, e->d_name);
    unlink(path);
  }
  closedir(d);
  rmdir(dir);
}

// The small files of a model directory into dir (which exists): everything but the weights. 0 or errno.
static int save_config_(const Config *c, const Tokenizer *t, const WeightForm *form, const char *dir) {
  StrBuf config = {NULL, 0, 0}, generation = {NULL, 0, 0};
  config_put_form(&config, c, t, form);
  strbuf_printf(&generation, "{");
  if (t && t->bos_id >= 0) strbuf_printf(&generation, "\"bos_token_id\": %d, ", t->bos_id);
  if (t && t->eos_id >= 0) strbuf_printf(&generation, "\"eos_token_id\": %d, ", t->eos_id);
  if (t && t->pad_id >= 0) strbuf_printf(&generation, "\"pad_token_id\": %d, ", t->pad_id);
  strbuf_printf(&generation, "\"do_sample\": false}\n");
  int err = save_text_(dir, "config.json", &config);
  if (!err) err = save_text_(dir, "generation_config.json", &generation);
  if (!err && t) err = tokenizer_save(t, dir);
  strbuf_free(&config);
  strbuf_free(&generation);
  return err;
}

// The files of a model directory into dir (which exists); with s also the training state. 0 or errno.
static int save_files_(const Model *m, const Tokenizer *t, const Options *o, const State *s, const char *dir) {
  WeightForm form;
  memset(&form, 0, sizeof form);
  int err = save_config_(&m->c, t, &form, dir);
  if (!err) err = save_parameters_(m, dir);
  if (!err && s) err = save_state_(m, o, s, dir);
  return err;
}

// Removes all but the newest `keep` checkpoints, and what crashes have left behind.
static void drop_old_(const char *checkpoints, int64_t newest, int keep) {
  char path[4096];
  DIR *d = opendir(checkpoints);
  if (d == NULL) return;
  for (struct dirent *e = readdir(d); e; e = readdir(d)) {
    long long step;
    int end = 0, younger = 0;
    if (sscanf(e->d_name, "step_%lld%n", &step, &end) != 1) continue;
    path_join(path, sizeof path, checkpoints, e->d_name);
    if (strcmp(e->d_name + end, ".tmp") == 0 || strcmp(e->d_name + end, ".old") == 0) remove_dir_(path);
    if (e->d_name[end] != 0 || keep == 0 || step >= newest) continue;
    DIR *again = opendir(checkpoints);   // few entries: counting the younger ones anew is simple and fast enough
    for (struct dirent *x = again ? readdir(again) : NULL; x; x = readdir(again)) {
      long long other;
      int stop = 0;
      younger += sscanf(x->d_name, "step_%lld%n", &other, &stop) == 1 && x->d_name[stop] == 0 && other > step;
    }
    if (again) closedir(again);
    if (younger >= keep) remove_dir_(path);
  }
  closedir(d);
}

/*
Saves RUN/checkpoints/step_NNNNNN and points `latest` at it; o->keep of them stay. t may be NULL. If anything fails (a full disk), what
was saved before stays as it was, the half-written directory is removed, and the program exits with 1.
*/
UNUSED static void checkpoint_save(const Model *m, const Tokenizer *t, const Options *o, const State *s, const char *run) {
  char dir[4000], leaf[64], final[4096], tmp[4104], old[4104], latest[4096];
  path_join(dir, sizeof dir, run, "checkpoints");
  make_dirs(dir);
  snprintf(leaf, sizeof leaf, "step_%06lld", (long long)s->step);
  path_join(final, sizeof final, dir, leaf);
  snprintf(tmp, sizeof tmp, "%s.tmp", final);
  snprintf(old, sizeof old, "%s.old", final);
  path_join(latest, sizeof latest, dir, "latest");
  remove_dir_(tmp);
  remove_dir_(old);
  int err = mkdir(tmp, 0777) != 0 ? errno : save_files_(m, t, o, s, tmp);
  // A directory of this name can only be left from a crash between the rename and `latest`; it makes room.
  if (!err && is_dir(final) && rename(final, old) != 0) err = errno;
  if (!err && (io_fault_() || rename(tmp, final) != 0)) err = errno;
  if (!err) err = sync_parent_(final);
  if (!err) {
    strcat(leaf, "\n");
    err = safe_write_file(latest, leaf, strlen(leaf));
  }
  if (err) {
    remove_dir_(tmp);
    die(EXIT_FAILED, "cannot save %s: %s; the checkpoint before it is intact. Make room and go on with resume=%s", final,
        strerror(err), run);
  }
  remove_dir_(old);
  drop_old_(dir, s->step, o->keep);
}

#endif
