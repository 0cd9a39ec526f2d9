/*
export.h: models in the forms of other programs.

What it is:  an Exporter gives the tensors of a model one at a time, as floats or as ternary codes with their scale, and writers put
             them into a Hugging Face directory (float master weights, or packed by four or five) or a GGUF file. What a form cannot
             express truthfully is refused with the reason, before anything is written.
What not:    no options and no measuring; modes/convert.h does that. A model never lies in memory as a whole.
Read before: bitnet/source.h, bitnet/checkpoint.h, bitnet/gguf.h.
Defines:     Exporter, exporter_open, exporter_close, exporter_floats, exporter_codes; Sizes; export_refusal, export_directory;
             gguf_refusal, export_gguf.
*/
#ifndef BITNET_EXPORT_H
#define BITNET_EXPORT_H

#include "checkpoint.h"

// ---------------------------------------------------------------------------------------------------------
// The tensors of a model to be written.

typedef struct {
  const ModelSource *s;
  Config c;              // of what is written; it may have sub-norms that the source has not
  TensorTable table;
  int *from;             // [table.count] the tensor of the source, or -1 for an inserted norm
  float *gain;           // [table.count] all values of an inserted norm
  // The matrix at hand.
  int at_codes, at_master;
  float gamma, *host;
  int8_t *codes;
  float *device, *device_gamma;
  int8_t *device_codes;
  void *data;
} Exporter;

// Prepares to write s with the Config c: that of s, but for sub-norms that are inserted with gain 1, the activation, and max_seq.
UNUSED static void exporter_open(Exporter *e, const ModelSource *s, const Config *c) {
  memset(e, 0, sizeof *e);
  e->s = s;
  e->c = *c;
  tensor_table(&e->table, c);
  e->from = (int *)xcalloc((size_t)e->table.count, sizeof *e->from);
  e->gain = (float *)xcalloc((size_t)e->table.count, sizeof *e->gain);
  e->at_codes = e->at_master = -1;
  size_t most = largest_tensor_(&e->table), bytes = 0;
  int rows = 0;
  for (int i = 0, k = 0; i < e->table.count; i++) {   // both tables have the same order
    const Tensor *t = &e->table.tensors[i];
    int same = k < s->table.count && strcmp(s->table.tensors[k].name, t->name) == 0;
    e->from[i] = same ? k++ : -1;
    e->gain[i] = 1;
    if (!same && !(t->flags & NORM)) die(EXIT_FAILED, "bug: tensor %s has no source", t->name);
    if (!(t->flags & (TERNARY | EMBED))) continue;
    size_t need = bitweight_bytes((int)t->shape[0], (int)t->shape[1]);
    bytes = need > bytes ? need : bytes;
    rows = (int)t->shape[0] > rows ? (int)t->shape[0] : rows;
  }
  e->host = (float *)xmalloc(size_mul(most, sizeof(float)));
  e->codes = (int8_t *)xmalloc(most);
  e->device = (float *)device_memory_(most * sizeof(float), "a matrix");
  e->device_codes = (int8_t *)device_memory_(most, "its codes");
  e->device_gamma = (float *)device_memory_((size_t)rows * sizeof(float), "its scale");
  e->data = device_memory_(bytes, "its quantised form");
  model_reserve_scratch(c, 1);
}

UNUSED static void exporter_close(Exporter *e) {
  dev_free(e->device);
  dev_free(e->device_codes);
  dev_free(e->device_gamma);
  dev_free(e->data);
  tensor_table_free(&e->table);
  free(e->from);
  free(e->gain);
  free(e->host);
  free(e->codes);
  memset(e, 0, sizeof *e);
}

// Elements first .. first+n-1 of tensor i as floats: master weights of a matrix.
UNUSED static void exporter_floats(Exporter *e, int i, float *out, size_t first, size_t n) {
  int from = e->from[i];
  if (from < 0) {
    for (size_t k = 0; k < n; k++) out[k] = e->gain[i];
  } else if (e->s->tensors[from].ternary) {
    if (e->at_master != i) source_master(e->s, from, e->host, e->codes);
    e->at_master = i;
    e->at_codes = -1;
    memcpy(out, e->host + first, n * sizeof(float));
  } else {
    source_floats(e->s, from, out, first, n);
  }
}

// All codes of matrix i, which stay valid until the next call for another tensor, and *gamma: those that the model runs with at lambda
// = 1.
UNUSED static const int8_t *exporter_codes(Exporter *e, int i, float *gamma) {
  const Tensor *t = &e->table.tensors[i];
  if (e->at_codes != i && e->s->tensors[e->from[i]].ternary) {
    e->gamma = source_codes(e->s, e->from[i], e->codes, 0, t->shape[0]);
  } else if (e->at_codes != i) {
    BitWeight w;
    memset(&w, 0, sizeof w);
    w.N = w.parts[0] = (int)t->shape[0];
    w.K = (int)t->shape[1];
    w.precision = PRECISION_FP32;
    w.data = e->data;
    w.gamma = e->device_gamma;
    source_floats(e->s, e->from[i], e->host, 0, t->n);
    dev_copy_in(e->device, e->host, t->n * sizeof(float));
    weight_quantize(&w, e->device, 1.0f);
    bitweight_codes(e->device_codes, &w);
    dev_copy_out(e->codes, e->device_codes, t->n);
    dev_copy_out(&e->gamma, e->device_gamma, sizeof(float));
  }
  e->at_codes = i;
  e->at_master = -1;
  *gamma = e->gamma;
  return e->codes;
}

// Bytes of what was written, by part.
typedef struct {
  size_t matrices, embeddings, others, overhead, file;
} Sizes;

UNUSED static void sizes_add_(Sizes *s, const Tensor *t, size_t bytes) {
  *(t->flags & TERNARY ? &s->matrices : t->flags & EMBED ? &s->embeddings : &s->others) += bytes;
}

// ---------------------------------------------------------------------------------------------------------
/*
Hugging Face directories.

Sub-norms in a class that has none, such as Qwen3: transformers' use_rms_norm puts a norm in front of every matrix. With the block's
own norms all ones, norm1 in front of q, k, v, norm2 in front of gate and up, and the sub-norms in front of o and down, the network is
the same: the second norm of a vector that is normalised already changes it by about eps / 2.
*/

// 1 if transformers has no class for this Config, but has one with the norms folded into the matrices.
UNUSED static int export_must_fold(const Config *c) {
  const char *architecture;
  Config bare = *c;
  bare.attn_sub_norm = bare.ffn_sub_norm = 0;
  return c->attn_sub_norm && c->ffn_sub_norm && strcmp(config_model_type(c, &architecture), "bitnet_c") == 0 &&
         strcmp(config_model_type(&bare, &architecture), "bitnet_c") != 0;
}

// NULL if a directory of this form says the truth about the model, else why not.
UNUSED static const char *export_refusal(const Exporter *e, const WeightForm *form) {
  const Config *c = &e->c;
  const char *architecture;
  Config bare = *c;
  if (c->value_head && form->packed != PACKED_NONE && form->packed < PACKED_TRITS) return "transformers has no class for this reward model";
  if (form->plain && form->packed != PACKED_NONE) return "packed weights are ternary; lambda=0 cannot be packed";
  if (form->plain && form->folded) return "folded norms exist only in quantised models; lambda=0 has no place for them";
  if (form->packed >= PACKED_TRITS) return NULL;
  if (form->folded && !(c->attn_sub_norm && c->ffn_sub_norm)) return "only a model with both sub-norms can be folded";
  if (form->folded) bare.attn_sub_norm = bare.ffn_sub_norm = 0;
  if (form->packed == PACKED_NONE && !form->folded) return NULL;   // our own class bitnet_c takes what the others cannot
  if (c->act_bits == 0) return "transformers quantises activations to 8 bits, this model has float activations (act_bits=0)";
  if (c->act_bits != 8) return "transformers quantises activations to 8 bits, this model to 4 (act_bits=4)";
  if (strcmp(config_model_type(&bare, &architecture), "bitnet_c") == 0)
    return c->attn_sub_norm != c->ffn_sub_norm ? "transformers has no class with only one of the two sub-norms"
                                               : "transformers has no class with this combination of biases and norms";
  for (int i = 0; i < e->table.count && form->packed; i++) {
    const Tensor *t = &e->table.tensors[i];
    if (t->flags & TERNARY && t->shape[0] % 4 != 0) return "transformers packs four rows into a byte, and a matrix has other rows";
  }
  return NULL;
}

enum { PIECE_FLOATS, PIECE_GAIN, PIECE_ONES, PIECE_PACKED, PIECE_SCALE, PIECE_ROW, PIECE_SHAPE, PIECE_THRESHOLD };

// One tensor of the file: a piece of tensor i of the table.
typedef struct {
  int what, i;
  char name[176];
} Piece_;

typedef struct {
  Exporter *e;
  WeightForm form;
  StEntry *entries;
  Piece_ *pieces;
  size_t n, cap;
} Pieces_;

// Announces a tensor of the file. rows 0: one dimension.
static void piece_add_(Pieces_ *p, int what, int i, int dtype, size_t rows, size_t cols, const char *name, const char *end) {
  if (p->n == p->cap) {
    p->cap = 2 * p->cap + 64;
    p->entries = (StEntry *)xrealloc(p->entries, size_mul(p->cap, sizeof *p->entries));
    p->pieces = (Piece_ *)xrealloc(p->pieces, size_mul(p->cap, sizeof *p->pieces));
  }
  Piece_ *x = &p->pieces[p->n];
  StEntry *entry = &p->entries[p->n++];
  memset(entry, 0, sizeof *entry);
  x->what = what;
  x->i = i;
  snprintf(x->name, sizeof x->name, "%s%s", name, end);
  entry->dtype = dtype;
  entry->ndim = rows ? 2 : 1;
  entry->shape[0] = rows ? rows : cols;
  entry->shape[1] = cols;
}

// Where the folded form keeps a norm: the matrices of this layer that it stands in front of, up to three; NULL: no norm of a block.
static const char *const *export_fold_(const char *rest) {
  static const char *const places[][4] = {{"input_layernorm.weight", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                                          {"post_attention_layernorm.weight", "mlp.gate_proj", "mlp.up_proj", NULL},
                                          {"self_attn.attn_sub_norm.weight", "self_attn.o_proj", NULL, NULL},
                                          {"mlp.ffn_sub_norm.weight", "mlp.down_proj", NULL, NULL}};
  for (size_t i = 0; i < ARRAY_LEN(places); i++) {
    if (strcmp(places[i][0], rest) == 0) return places[i];
  }
  return NULL;
}

// What tensor i becomes. ternary_embed: embeddings are codes, too, in the TRITS and RECORD forms.
static void export_pieces_(Pieces_ *p, int i, int ternary_embed) {
  const Tensor *t = &p->e->table.tensors[i];
  const WeightForm *form = &p->form;
  char name[160];
  const char *rest;
  size_t rows = t->ndim > 1 ? t->shape[0] : 0, cols = t->ndim > 1 ? t->shape[1] : t->shape[0];
  if (form->packed >= PACKED_TRITS) {
    size_t per = form->packed == PACKED_TRITS ? 5 : 4;
    snprintf(name, sizeof name, "%s%s", per == 5 ? "model." : "", t->name);
    if (!(t->flags & TERNARY) && !(t->flags & EMBED && ternary_embed)) {
      piece_add_(p, PIECE_FLOATS, i, form->dtype, rows, cols, name, "");
      return;
    }
    piece_add_(p, PIECE_ROW, i, ST_U8, 0, (t->n + per - 1) / per, name, "");
    piece_add_(p, PIECE_SHAPE, i, ST_I32, 0, (size_t)t->ndim, name, ".shape");
    piece_add_(p, PIECE_SCALE, i, ST_F32, 0, 1, name, ".scale");
    if (per == 4) piece_add_(p, PIECE_THRESHOLD, i, ST_F32, 0, 1, name, ".threshold");
    return;
  }
  int layer = name_layer_(t->name, &rest);
  const char *const *fold = form->folded && layer >= 0 ? export_fold_(rest) : NULL;
  for (int k = 1; fold && k < 4 && fold[k]; k++) {
    snprintf(name, sizeof name, "model.layers.%d.%s", layer, fold[k]);
    piece_add_(p, PIECE_FLOATS, i, form->dtype, rows, cols, name, ".rms_norm.weight");
  }
  if (fold) {
    if (strstr(rest, "layernorm")) piece_add_(p, PIECE_ONES, i, form->dtype, rows, cols, t->name, "");
    return;
  }
  if (!(t->flags & TERNARY) || form->packed == PACKED_NONE) {
    piece_add_(p, PIECE_FLOATS, i, form->dtype, rows, cols, t->name, "");
    return;
  }
  piece_add_(p, PIECE_PACKED, i, ST_U8, rows / 4, cols, t->name, "");
  source_sibling_(name, sizeof name, t->name, "weight_scale");
  piece_add_(p, PIECE_SCALE, i, ST_F32, 0, 1, name, "");
}

// Bytes first .. first+n-1 of codes packed by four rows.
static void export_pack_(uint8_t *out, const int8_t *codes, size_t rows, size_t cols, size_t first, size_t n) {
  size_t R = rows / 4;
  for (size_t k = 0; k < n; k++) {
    size_t r = (first + k) / cols, c = (first + k) % cols;
    unsigned byte = 0;
    for (size_t i = 0; i < 4; i++) byte |= (unsigned)(codes[(i * R + r) * cols + c] + 1) << (2 * i);
    out[k] = (uint8_t)byte;
  }
}

// Bytes first .. first+n-1 of a row of `count` codes: five digits of base 3, the first the least, filled up with digit 0; or four of
// two bits, the first on top, filled up with the code of zero.
static void export_row_(uint8_t *out, const int8_t *codes, size_t count, int trits, size_t first, size_t n) {
  for (size_t k = 0; k < n; k++) {
    size_t at = (first + k) * (trits ? 5 : 4);
    unsigned byte = 0;
    for (size_t i = trits ? 5 : 0; trits && i-- > 0;) byte = 3 * byte + (at + i < count ? (unsigned)(codes[at + i] + 1) : 0);
    for (size_t i = 0; i < 4 && !trits; i++) byte |= (at + i < count ? (unsigned)(codes[at + i] + 1) : 1) << (6 - 2 * i);
    out[k] = (uint8_t)byte;
  }
}

// The writer's source; see StSource.
static void export_source_(void *ctx, size_t entry, size_t first, size_t count, void *out) {
  const Pieces_ *p = (const Pieces_ *)ctx;
  const Piece_ *x = &p->pieces[entry];
  const Tensor *t = &p->e->table.tensors[x->i];
  float gamma, *floats = (float *)out;
  if (x->what == PIECE_FLOATS) {
    exporter_floats(p->e, x->i, floats, first, count);
    return;
  }
  if (x->what == PIECE_ONES || x->what == PIECE_THRESHOLD) {
    for (size_t k = 0; k < count; k++) floats[k] = x->what == PIECE_ONES ? 1.0f : 0.5f;
    return;
  }
  if (x->what == PIECE_SHAPE) {
    for (size_t k = 0; k < count; k++) ((int32_t *)out)[k] = (int32_t)t->shape[first + k];
    return;
  }
  const int8_t *codes = exporter_codes(p->e, x->i, &gamma);
  if (x->what == PIECE_SCALE) floats[0] = p->form.packed == PACKED_DIVIDE ? 1.0f / gamma : gamma;
  else if (x->what == PIECE_PACKED) export_pack_((uint8_t *)out, codes, t->shape[0], t->shape[1], first, count);
  else export_row_((uint8_t *)out, codes, t->n, p->form.packed == PACKED_TRITS, first, count);
}

/*
The index that seed programs of the TRITS form write. total_size counts 1.58 bits for each code and four bytes for each dimension,
which is less than the file has; file_bytes is the true number. 0 or errno.
*/
static int export_index_(const Pieces_ *p, const char *dir) {
  StrBuf b = {NULL, 0, 0};
  char path[4096];
  struct stat st;
  double total = 0;
  for (size_t i = 0; i < p->n; i++) {
    const Tensor *t = &p->e->table.tensors[p->pieces[i].i];
    if (p->pieces[i].what == PIECE_ROW) total += ceil((double)t->n * 1.58 / 8) + 4.0 * t->ndim;
  }
  path_join(path, sizeof path, dir, "model.safetensors");
  if (stat(path, &st) != 0) return errno;
  strbuf_printf(&b, "{\"metadata\": {\"total_size\": %.0f, \"file_bytes\": %lld},\n \"weight_map\": {", total, (long long)st.st_size);
  for (size_t i = 0; i < p->n; i++) strbuf_printf(&b, "%s\n  \"%s\": \"model.safetensors\"", i ? "," : "", p->pieces[i].name);
  strbuf_printf(&b, "\n}}\n");
  int err = save_text_(dir, "model.safetensors.index.json", &b);
  strbuf_free(&b);
  return err;
}

/*
Writes a directory that exists. t may be NULL. ternary_embed: see export_pieces_. The config is written last, so that a directory of
which only a part was written is no model. Exit 1 if the disk fails.
*/
UNUSED static void export_directory(Exporter *e, const Tokenizer *t, const WeightForm *form, int ternary_embed, const char *dir,
                                    Sizes *sizes) {
  Pieces_ p;
  char path[4096];
  struct stat st;
  memset(&p, 0, sizeof p);
  memset(sizes, 0, sizeof *sizes);
  p.e = e;
  p.form = *form;
  for (int i = 0; i < e->table.count; i++) export_pieces_(&p, i, ternary_embed);
  for (size_t i = 0; i < p.n; i++) {
    const StEntry *x = &p.entries[i];
    p.entries[i].name = p.pieces[i].name;
    sizes_add_(sizes, &e->table.tensors[p.pieces[i].i], st_dtype_size(x->dtype) * x->shape[0] * (x->ndim > 1 ? x->shape[1] : 1));
  }
  path_join(path, sizeof path, dir, "config.json");
  unlink(path);
  path_join(path, sizeof path, dir, "model.safetensors.index.json");
  unlink(path);
  path_join(path, sizeof path, dir, "model.safetensors");
  int err = st_write(path, p.entries, p.n, NULL, 0, export_source_, &p);
  if (!err && form->packed == PACKED_TRITS) err = export_index_(&p, dir);
  if (!err) err = save_config_(&e->c, t, form, dir);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", dir, strerror(err));
  if (stat(path, &st) == 0) sizes->file = (size_t)st.st_size;
  sizes->overhead = sizes->file - sizes->matrices - sizes->embeddings - sizes->others;
  free(p.entries);
  free(p.pieces);
}

// ---------------------------------------------------------------------------------------------------------
/*
GGUF. The architecture decides what a program computes, so that each of our networks has one, or none:

    no sub-norms, silu                        llama (q and k rows reordered), qwen2 with biases on q, k, v, qwen3 with q/k norms
    both sub-norms, silu, tied, no biases     bitnet
    both sub-norms, relu2, tied, no biases    bitnet-b1.58, which only bitnet.cpp runs

Everything else is refused: llama.cpp loads a file with the wrong activation without a word, and talks nonsense.
*/

// The architecture of a Config for matrices of this type, or NULL and in *why the reason why there is none.
UNUSED static const char *gguf_architecture(const Config *c, int type, const char **why) {
  int plain = !c->qkv_bias && !c->o_bias && !c->qk_norm, subs = c->attn_sub_norm + c->ffn_sub_norm;
  const char *name = NULL;
  *why = "llama.cpp and bitnet.cpp have no reward models of this kind";
  if (c->value_head) return NULL;
  *why = "no architecture of llama.cpp or bitnet.cpp has this combination of norms and biases";
  if (subs == 1) {
    *why = "llama.cpp and bitnet.cpp have both sub-norms or none";
  } else if (c->act_bits == 4) {
    *why = "llama.cpp and bitnet.cpp quantise activations to 8 bits, this model to 4";
  } else if (subs == 2) {
    *why = "sub-norms together with biases or q/k norms have no architecture in llama.cpp or bitnet.cpp";
    if (plain)
      *why =
          "with sub-norms, llama.cpp and bitnet.cpp always use the embedding as the classifier; this model's is a matrix of its own";
    if (plain && c->tie_embeddings) {
      *why = "the architecture bitnet has norms as wide as the model, but heads x head_dim is not dim";
      if (c->heads * c->head_dim == c->dim) name = c->activation == ACT_RELU2 ? "bitnet-b1.58" : "bitnet";
    }
    if (name && c->activation == ACT_RELU2 && (type == GGUF_TQ1_0 || type == GGUF_TQ2_0)) {
      *why = "llama.cpp would run silu where this model has relu2; bitnet.cpp runs it: write type=i2_s";
      return NULL;
    }
  } else if (c->activation == ACT_RELU2) {
    *why = "without sub-norms llama.cpp and bitnet.cpp only have silu, this model has relu2";
  } else if (plain || (c->qkv_bias && c->o_bias && !c->qk_norm)) {
    name = "llama";
  } else if (c->qkv_bias && !c->o_bias && !c->qk_norm) {
    name = "qwen2";
  } else if (c->qk_norm && !c->qkv_bias && !c->o_bias) {
    name = "qwen3";
  }
  if (name && c->rope_llama3 && strcmp(name, "llama") != 0 && strcmp(name, "bitnet-b1.58") != 0) {
    *why = "its architecture has no llama3 scaling of the rotary frequencies there";
    return NULL;
  }
  return name;
}

typedef struct {
  Exporter *e;
  int paired, lambda;      // lambda 0: the float weights
  int n_tensors, *what;    // [n_tensors] tensors of the table in the order of the file; -1: rope_freqs
  int *types;              // [n_tensors]
  size_t *sizes;           // [n_tensors]
} GgufExport_;

// The type of matrix i: the one that was asked for, or what its rows allow.
static int gguf_type_for_(const Tensor *t, int type) {
  if (!(t->flags & TERNARY)) return GGUF_F32;
  if (t->shape[1] % gguf_type((uint32_t)type)->block == 0) return type;
  return t->shape[1] % 32 == 0 ? GGUF_Q8_0 : GGUF_F16;
}

// NULL if a GGUF file with matrices of this type says the truth about the model, else why not.
UNUSED static const char *gguf_refusal(const Exporter *e, int type, int lambda) {
  const char *why;
  if (gguf_architecture(&e->c, type, &why) == NULL) return why;
  if (lambda == 0 && (type == GGUF_TQ1_0 || type == GGUF_TQ2_0 || type == GGUF_I2_S))
    return "float weights (lambda=0) do not fit a ternary type; write f32, f16, bf16 or q8_0";
  for (int i = 0; i < e->table.count && type == GGUF_I2_S; i++) {
    const Tensor *t = &e->table.tensors[i];
    if (t->flags & TERNARY && t->shape[1] % 128 != 0)
      return "i2_s needs rows of a multiple of 128 values, this model has others; bitnet.cpp would be wrong silently";
  }
  return NULL;
}

// Rows of tensor i as floats, in the file's order.
static void gguf_row_(const GgufExport_ *x, int i, size_t row, float *out) {
  const Tensor *t = &x->e->table.tensors[i];
  size_t cols = t->ndim > 1 ? t->shape[1] : 1, hs = (size_t)x->e->c.head_dim, from = row;
  // The inverse of paired_row_: number 2i of a head is our i, 2i+1 our i + half.
  if (x->paired && rotated_heads_(&x->e->c, t->name)) {
    size_t k = row % hs;
    from = row - k + (k % 2 ? hs / 2 + k / 2 : k / 2);
  }
  if (!(t->flags & TERNARY) || !x->lambda) {
    exporter_floats(x->e, i, out, from * cols, cols);
    return;
  }
  float gamma;
  const int8_t *codes = exporter_codes(x->e, i, &gamma) + from * cols;
  for (size_t k = 0; k < cols; k++) out[k] = gamma * (float)codes[k];
}

// A row of n floats in a type: its bytes go to out. Exit 2 for a number that F16 cannot hold.
static void gguf_encode_(uint8_t *out, const float *x, size_t n, int type, const char *name) {
  int8_t codes[GGUF_MAX_BLOCK];
  const GgufType *t = gguf_type((uint32_t)type);
  for (size_t b = 0; b < n; b += t->block, out += t->bytes) {
    uint16_t h;
    float gamma = 0;
    for (size_t k = 0; k < t->block && t->block > 32; k++) {
      codes[k] = (int8_t)((x[b + k] > 0) - (x[b + k] < 0));
      if (codes[k]) gamma = fabsf(x[b + k]);
    }
    if (type != GGUF_F32 && type != GGUF_BF16 && type != GGUF_I2_S) {
      float most = gamma;
      for (size_t k = 0; k < t->block && t->block <= 32; k++) most = fabsf(x[b + k]) > most ? fabsf(x[b + k]) : most;
      if (!(most <= 65504))
        die(EXIT_USAGE, "tensor %s: expected at most 65504 for 16-bit floats, found %g; write bf16 or f32", name, (double)most);
    }
    switch (type) {
      case GGUF_F32: memcpy(out, x + b, 4); break;
      case GGUF_F16: h = f16_from_f32(x[b]); memcpy(out, &h, 2); break;
      case GGUF_BF16: h = bf16_from_f32(x[b]); memcpy(out, &h, 2); break;
      case GGUF_Q8_0: q8_encode(out, x + b); break;
      case GGUF_TQ1_0: tq1_encode(out, codes, gamma); break;
      case GGUF_TQ2_0: tq2_encode(out, codes, gamma); break;
      default: i2s_encode(out, codes);
    }
  }
}

#define GGUF_CHUNK_ ((size_t)1 << 16)   // bytes that are written at once

// The writer's source; see GgufWriter.
static void gguf_source_(void *ctx, size_t k, SafeFile *f) {
  GgufExport_ *x = (GgufExport_ *)ctx;
  if (x->what[k] < 0) {
    float factors[HEAD_MAX / 2];
    rope_factors(factors, &x->e->c);
    safe_write(f, factors, (size_t)(x->e->c.head_dim / 2) * sizeof(float));
    return;
  }
  const Tensor *t = &x->e->table.tensors[x->what[k]];
  size_t cols = t->ndim > 1 ? t->shape[1] : 1, rows = t->shape[0];
  const GgufType *type = gguf_type((uint32_t)x->types[k]);
  size_t bytes = cols / type->block * type->bytes, step = GGUF_CHUNK_ / bytes > 0 ? GGUF_CHUNK_ / bytes : 1;
  float *row = (float *)xmalloc(cols * sizeof(float));
  uint8_t *out = (uint8_t *)xmalloc(size_mul(step, bytes));
  for (size_t r = 0; r < rows && !f->failed; r += step) {
    size_t n = rows - r < step ? rows - r : step;
    for (size_t j = 0; j < n; j++) {
      gguf_row_(x, x->what[k], r + j, row);
      gguf_encode_(out + j * bytes, row, cols, type->id, t->name);
    }
    safe_write(f, out, n * bytes);
  }
  if (type->id == GGUF_I2_S) {
    float tail[I2S_TAIL / 4] = {0};
    exporter_codes(x->e, x->what[k], &tail[0]);
    safe_write(f, tail, sizeof tail);
  }
  free(row);
  free(out);
}

// The metadata of the network; file_type is a label for people.
static void gguf_put_config_(GgufOut *o, const Config *c, const char *arch, int type, const char *title) {
  static const int labels[][2] = {{GGUF_F32, 0},    {GGUF_F16, 1},    {GGUF_Q8_0, 7}, {GGUF_BF16, 32},
                                  {GGUF_TQ1_0, 36}, {GGUF_TQ2_0, 37}, {GGUF_I2_S, 40}};
  const struct { const char *key; int value; } numbers[] = {
      {"block_count", c->layers}, {"context_length", c->max_seq}, {"embedding_length", c->dim}, {"feed_forward_length", c->ffn_dim},
      {"attention.head_count", c->heads}, {"attention.head_count_kv", c->kv_heads}, {"attention.key_length", c->head_dim},
      {"attention.value_length", c->head_dim}, {"rope.dimension_count", c->head_dim}, {"vocab_size", c->vocab}};
  char key[160];
  gguf_put_text(o, "general.architecture", arch);
  gguf_put_text(o, "general.name", title);
  for (size_t i = 0; i < ARRAY_LEN(labels); i++) {
    if (labels[i][0] == type) gguf_put_u32(o, "general.file_type", (uint32_t)labels[i][1]);
  }
  gguf_put_u32(o, "general.quantization_version", 2);
  if (type == GGUF_I2_S)
    gguf_put_text(o, "general.description", "I2_S in the layout of bitnet.cpp for x86: blocks of 128 values in 32 bytes");
  for (size_t i = 0; i < ARRAY_LEN(numbers); i++) {
    snprintf(key, sizeof key, "%s.%s", arch, numbers[i].key);
    gguf_put_u32(o, key, (uint32_t)numbers[i].value);
  }
  snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", arch);
  gguf_put_f32(o, key, c->norm_eps);
  snprintf(key, sizeof key, "%s.rope.freq_base", arch);
  gguf_put_f32(o, key, (float)c->rope_theta);
}

/*
Writes a GGUF file: matrices in this type where their rows allow it (otherwise Q8_0 or F16: *other counts those), ternary at lambda = 1
and as they are at lambda = 0; embeddings in embed_type; norms and biases in F32. Must not be refused by gguf_refusal. t may be NULL.
*/
UNUSED static void export_gguf(Exporter *e, const Tokenizer *t, int type, int embed_type, int lambda, const char *path,
                               const char *title, Sizes *sizes, int *other) {
  const char *why, *arch = gguf_architecture(&e->c, type, &why);
  GgufOut out;
  GgufExport_ x;
  struct stat st;
  char name[GGUF_NAME_CAP];
  size_t cap = (size_t)e->table.count + 1;
  memset(&out, 0, sizeof out);
  memset(sizes, 0, sizeof *sizes);
  x.e = e;
  x.lambda = lambda;
  x.paired = strcmp(arch, "llama") == 0;
  x.n_tensors = *other = 0;
  x.what = (int *)xcalloc(cap, sizeof(int));
  x.types = (int *)xcalloc(cap, sizeof(int));
  x.sizes = (size_t *)xcalloc(cap, sizeof(size_t));
  gguf_put_config_(&out, &e->c, arch, type, title);
  gguf_put_tokenizer(&out, t, e->c.vocab);
  if (e->c.rope_llama3) {
    x.what[x.n_tensors] = -1;
    x.sizes[x.n_tensors] = (size_t)(e->c.head_dim / 2) * sizeof(float);
    sizes->others += x.sizes[x.n_tensors++];
    gguf_put_tensor(&out, "rope_freqs.weight", GGUF_F32, 0, (size_t)(e->c.head_dim / 2));
  }
  for (int i = 0; i < e->table.count; i++) {
    const Tensor *w = &e->table.tensors[i];
    int as = gguf_type_for_(w, type);
    if (w->flags & EMBED) as = w->shape[1] % gguf_type((uint32_t)embed_type)->block == 0 ? embed_type : GGUF_F16;
    else if (w->flags & TERNARY) *other += as != type;
    gguf_name(name, w->name);
    gguf_put_tensor(&out, name, as, w->ndim > 1 ? w->shape[0] : 0, w->ndim > 1 ? w->shape[1] : w->shape[0]);
    x.what[x.n_tensors] = i;
    x.types[x.n_tensors] = as;
    x.sizes[x.n_tensors] = gguf_bytes(gguf_type((uint32_t)as), w->n);
    sizes_add_(sizes, w, x.sizes[x.n_tensors++]);
  }
  int err = gguf_write(&out, path, x.sizes, gguf_source_, &x);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
  if (stat(path, &st) == 0) sizes->file = (size_t)st.st_size;
  sizes->overhead = sizes->file - sizes->matrices - sizes->embeddings - sizes->others;
  free(x.what);
  free(x.types);
  free(x.sizes);
}

#endif
