/*
source.h: where the numbers of a model come from, whatever program wrote them.

What it is:  one way to open a model (a Hugging Face directory with float or packed weights, a GGUF file, a llama2.c file), to learn
             its Config, and to read each tensor of our table from it: as floats, or as ternary codes and their scale where the file
             holds those. Names, row orders and scale conventions of the formats end here.
What not:    no memory of a model and no device (checkpoint.h fills those); the formats themselves are in safetensors.h, gguf.h,
             llama2c.h.
Read before: bitnet/model.h (the tensor table), bitnet/safetensors.h, bitnet/gguf.h, bitnet/llama2c.h.
Defines:     config_read; gguf_name, rope_factors; ModelSource, SourceTensor, source_open, source_close, source_floats, source_codes,
             source_rows_apart, source_master, source_is_half, source_in_file, source_map, source_check_finite, source_release.

What differs between the formats:

    Rotary positions. Ours, like Hugging Face's, turn number i of a head together with number i + head_dim/2; llama2.c and GGUF's
    architecture "llama" turn neighbours. The same network results when the rows of q and k are in another order.
    Scales. Packed weights of Hugging Face come with weight_scale, which is to be multiplied with or divided by: only linear_class
    tells.
    Ternary floats. GGUF knows no master weights, so that a matrix there with only the values -g, 0 and g is taken as codes and the
    scale g, whatever type it is stored as. Quantising it again would give another scale: the mean of |W| counts the zeros.
*/
#ifndef BITNET_SOURCE_H
#define BITNET_SOURCE_H

#include "gguf.h"
#include "llama2c.h"
#include "../quant.h"
#include "model.h"
#include <limits.h>

#define CONFIG_CRC_ "\"crc32\": \""   // in config.json: the CRC-32 of the file with these eight digits set to 0

/*
How a directory holds its matrices: as float master weights; as four codes a byte with a weight_scale that is multiplied or divided
with; as five codes a byte (TRITS) or four (RECORD) in one row, with their own scale, shape and, for the latter, threshold.
*/
enum { PACKED_NONE, PACKED_MULTIPLY, PACKED_DIVIDE, PACKED_TRITS, PACKED_RECORD };

// What a config.json says about the form of the weights.
typedef struct {
  int packed;   // PACKED_*
  int folded;   // 1: every matrix has a norm of its own in front (use_rms_norm)
  int plain;    // for writing: 1 = a float network, without quantization_config
  int dtype;    // for writing: StDtype of the floats
} WeightForm;

// ---------------------------------------------------------------------------------------------------------
// Reading config.json.

// What is missing in a config.json has a meaning that depends on the class.
typedef struct {
  const char *type;
  int sub_norms, qkv_bias, qk_norm, max_seq, head_dim;   // head_dim 0 = hidden_size / heads
  double eps, theta;
} ModelClass_;

static const ModelClass_ model_classes_[] = {
    {"bitnet", 1, 0, 0, 2048, 0, 1e-5, 500000},      {"llama", 0, 0, 0, 2048, 0, 1e-6, 10000},
    {"mistral", 0, 0, 0, 4096 * 32, 0, 1e-6, 10000}, {"qwen2", 0, 1, 0, 32768, 0, 1e-6, 10000},
    {"qwen3", 0, 0, 1, 32768, 128, 1e-6, 10000},     {"bitnet_c", 0, 0, 0, 2048, 0, 1e-5, 10000}};

// A whole number of config.json; exit 3 if it has another type. fallback INT_MIN: the field is required.
static int config_int_(const char *path, const Json *object, const char *key, int fallback) {
  const Json *v = json_get(object, key);
  if (v == NULL || v->type == JSON_NULL) {
    if (fallback == INT_MIN) die(EXIT_DAMAGED, "%s: the field %s is missing", path, key);
    return fallback;
  }
  if (v->type == JSON_BOOL) return (int)v->i;
  if (v->type != JSON_INT || v->i < INT_MIN || v->i > INT_MAX)
    die(EXIT_DAMAGED, "%s: offset %zu: %s: expected an integer", path, v->offset, key);
  return (int)v->i;
}

static double config_number_(const char *path, const Json *object, const char *key, double fallback) {
  const Json *v = json_get(object, key);
  if (v == NULL || v->type == JSON_NULL) return fallback;
  if (v->type != JSON_INT && v->type != JSON_REAL) die(EXIT_DAMAGED, "%s: offset %zu: %s: expected a number", path, v->offset, key);
  return v->d;
}

static const char *config_text_(const char *path, const Json *object, const char *key, const char *fallback) {
  const Json *v = json_get(object, key);
  if (v == NULL || v->type == JSON_NULL) return fallback;
  if (v->type != JSON_STRING) die(EXIT_DAMAGED, "%s: offset %zu: %s: expected a string", path, v->offset, key);
  return v->s;
}

// rope_theta + rope_scaling (old), or rope_parameters (new).
static void config_read_rope_(const char *path, const Json *root, Config *c, double theta) {
  const Json *scaling = json_get(root, "rope_parameters");
  c->rope_theta = config_number_(path, root, "rope_theta", theta);
  if (scaling && scaling->type == JSON_OBJECT) c->rope_theta = config_number_(path, scaling, "rope_theta", c->rope_theta);
  else scaling = json_get(root, "rope_scaling");
  c->rope_factor = 8;
  c->rope_low_freq = 1;
  c->rope_high_freq = 4;
  c->rope_original_max = 8192;
  if (scaling == NULL || scaling->type != JSON_OBJECT) return;
  const char *type = config_text_(path, scaling, "rope_type", config_text_(path, scaling, "type", "default"));
  if (strcmp(type, "default") == 0) return;
  if (strcmp(type, "llama3") != 0) die(EXIT_USAGE, "%s: rope scaling '%s' is not supported; default and llama3 are", path, type);
  c->rope_llama3 = 1;
  c->rope_factor = config_number_(path, scaling, "factor", 8);
  c->rope_low_freq = config_number_(path, scaling, "low_freq_factor", 1);
  c->rope_high_freq = config_number_(path, scaling, "high_freq_factor", 4);
  c->rope_original_max = config_int_(path, scaling, "original_max_position_embeddings", 8192);
  if (!(c->rope_factor > 0) || !(c->rope_high_freq > c->rope_low_freq))
    die(EXIT_DAMAGED, "%s: the numbers of rope_scaling make no sense", path);
}

// Checks the CRC that config_put_form left in the text; a file of another program has none.
static void config_check_crc_(const char *path, char *text, size_t len) {
  char *at = strstr(text, CONFIG_CRC_), digits[16];
  if (at == NULL) return;
  at += strlen(CONFIG_CRC_);
  char found[16] = "";
  strncat(found, at, 8);
  if (strlen(found) == 8) memcpy(at, "00000000", 8);
  snprintf(digits, sizeof digits, "%08x", crc32_bytes(0, text, len));
  if (strcmp(digits, found) != 0)
    die(EXIT_DAMAGED,
        "%s: offset %zu: crc32: expected %s, found \"%s\"; the file is damaged (if you edited it, delete the crc32 entry)", path,
        (size_t)(at - text), digits, found);
}

/*
A window of attention: some positions see only the last `window` ones. Up to that length the network is the usual one, so the context
is cut there. In Mistral's class an absent key means 4096, in Qwen's a switch must be on.
*/
static void config_read_window_(const char *path, const Json *root, Config *c, const char *type) {
  const Json *v = json_get(root, "sliding_window");
  int mistral = strcmp(type, "mistral") == 0;
  if (!mistral && !config_int_(path, root, "use_sliding_window", 0)) return;
  if (v && v->type == JSON_NULL) return;
  int window = config_int_(path, root, "sliding_window", 4096);
  if (window < 1) die(EXIT_DAMAGED, "%s: sliding_window: expected at least 1, found %d", path, window);
  if (window < c->max_seq) c->max_seq = window;
}

// Exits with 2 for what the supported classes can have, but we do not run.
static void config_refuse_(const char *path, const Json *root) {
  static const char *const keys[] = {"num_experts", "num_local_experts", "n_routed_experts", "vision_config"};
  const Json *names = json_get(root, "architectures");
  const char *name =
      names && names->type == JSON_ARRAY && names->child && names->child->type == JSON_STRING ? names->child->s : "the model";
  for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
    const Json *v = json_get(root, keys[i]);
    if (v && v->type != JSON_NULL) die(EXIT_USAGE, "%s: %s with %s is not supported", path, name, keys[i]);
  }
  if (config_number_(path, root, "partial_rotary_factor", 1) != 1) die(EXIT_USAGE, "%s: partial_rotary_factor is not supported", path);
}

// The form of the weights, from quantization_config.
static void config_read_form_(const char *path, const Json *quant, Config *c, WeightForm *form) {
  if (quant == NULL || quant->type != JSON_OBJECT) return;
  const char *mode = config_text_(path, quant, "quantization_mode", "offline"),
             *method = config_text_(path, quant, "quant_method", "none"),
             *linear = config_text_(path, quant, "linear_class", "bitlinear");
  if (strcmp(method, "bitnet_c") == 0 && (strcmp(mode, "trits") == 0 || strcmp(mode, "record") == 0)) {
    form->packed = mode[0] == 't' ? PACKED_TRITS : PACKED_RECORD;
    return;
  }
  if (strcmp(method, "bitnet") != 0) die(EXIT_USAGE, "%s: weights quantised by %s cannot be read; those of bitnet can", path, method);
  int automatic = strcmp(linear, "autobitlinear") == 0, offline = strcmp(mode, "offline") == 0;
  if ((!automatic && strcmp(linear, "bitlinear") != 0) || (!offline && strcmp(mode, "online") != 0))
    die(EXIT_USAGE, "%s: linear_class %s with quantization_mode %s is not known", path, linear, mode);
  form->packed = !offline ? PACKED_NONE : automatic ? PACKED_MULTIPLY : PACKED_DIVIDE;
  form->folded = config_int_(path, quant, "use_rms_norm", 0);
  if (!form->folded) return;
  double eps = config_number_(path, quant, "rms_norm_eps", 1e-6);
  if (!(fabs(eps - (double)c->norm_eps) <= 1e-6 * eps))
    die(EXIT_USAGE, "%s: use_rms_norm with rms_norm_eps %g, but the model has %g; one epsilon for all norms is supported", path, eps,
        (double)c->norm_eps);
  c->attn_sub_norm = c->ffn_sub_norm = 1;
}

// Reads dir/config.json of any supported class. Exit 2 if it is missing or of a kind that we cannot run, 3 if it is damaged.
UNUSED static void config_read_json_(Config *c, WeightForm *form, const char *dir) {
  char path[4096], err[256];
  size_t len;
  JsonDoc doc;
  path_join(path, sizeof path, dir, "config.json");
  char *text = read_file(path, &len);
  if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  config_check_crc_(path, text, len);
  if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s", path, err);
  const Json *root = doc.root, *own = json_get(root, "bitnet_c"), *quant = json_get(root, "quantization_config");
  if (root->type != JSON_OBJECT) die(EXIT_DAMAGED, "%s: expected a JSON object", path);
  const char *type = config_text_(path, root, "model_type", "none");
  const ModelClass_ *k = NULL;
  for (size_t i = 0; i < ARRAY_LEN(model_classes_); i++) {
    if (strcmp(model_classes_[i].type, type) == 0) k = &model_classes_[i];
  }
  if (k == NULL) die(EXIT_USAGE, "%s: model_type '%s' is not supported; bitnet, llama, mistral, qwen2 and qwen3 are", path, type);
  memset(c, 0, sizeof *c);
  c->vocab = config_int_(path, root, "vocab_size", INT_MIN);
  c->dim = config_int_(path, root, "hidden_size", INT_MIN);
  c->ffn_dim = config_int_(path, root, "intermediate_size", INT_MIN);
  c->layers = config_int_(path, root, "num_hidden_layers", INT_MIN);
  c->heads = config_int_(path, root, "num_attention_heads", INT_MIN);
  c->kv_heads = config_int_(path, root, "num_key_value_heads", c->heads);
  if (c->heads < 1) die(EXIT_DAMAGED, "%s: num_attention_heads: expected at least 1, found %d", path, c->heads);
  c->head_dim = config_int_(path, root, "head_dim", k->head_dim ? k->head_dim : c->dim / c->heads);
  c->max_seq = config_int_(path, root, "max_position_embeddings", k->max_seq);
  c->norm_eps = (float)config_number_(path, root, "rms_norm_eps", k->eps);
  c->init_std = (float)config_number_(path, root, "initializer_range", 0.02);
  c->tie_embeddings = config_int_(path, root, "tie_word_embeddings", 0);
  config_read_rope_(path, root, c, k->theta);
  const char *act = config_text_(path, root, "hidden_act", strcmp(type, "bitnet") == 0 ? "relu2" : "silu");
  if (strcmp(act, "relu2") != 0 && strcmp(act, "silu") != 0)
    die(EXIT_USAGE, "%s: hidden_act '%s' is not supported; relu2 and silu are", path, act);
  c->activation = strcmp(act, "relu2") == 0 ? ACT_RELU2 : ACT_SILU;
  if (config_int_(path, root, "mlp_bias", 0)) die(EXIT_USAGE, "%s: mlp_bias is not supported", path);
  c->o_bias = config_int_(path, root, "attention_bias", 0);
  c->qkv_bias = c->o_bias || k->qkv_bias;
  c->qk_norm = k->qk_norm;
  c->attn_sub_norm = c->ffn_sub_norm = k->sub_norms;
  c->act_bits = 8;
  if (own && own->type == JSON_OBJECT) {
    c->attn_sub_norm = config_int_(path, own, "attn_sub_norm", c->attn_sub_norm);
    c->ffn_sub_norm = config_int_(path, own, "ffn_sub_norm", c->ffn_sub_norm);
    c->qkv_bias = config_int_(path, own, "qkv_bias", c->qkv_bias);
    c->o_bias = config_int_(path, own, "o_bias", c->o_bias);
    c->qk_norm = config_int_(path, own, "qk_norm", c->qk_norm);
    c->act_bits = config_int_(path, own, "act_bits", 8);
    c->value_head = config_int_(path, own, "value_head", 0) != 0;
  }
  memset(form, 0, sizeof *form);
  config_read_form_(path, quant, c, form);
  config_read_window_(path, root, c, type);
  config_refuse_(path, root);
  const char *why = config_check(c);
  if (why) die(EXIT_DAMAGED, "%s: %s", path, why);
  json_free(&doc);
  free(text);
}

// ---------------------------------------------------------------------------------------------------------
// Names.

/*
Takes a name of our table apart: the layer, or -1, and what comes behind it. "model.layers.3.mlp.up_proj.weight" is layer 3 and
"mlp.up_proj.weight".
*/
UNUSED static int name_layer_(const char *name, const char **rest) {
  static const char front[] = "model.layers.";
  *rest = name;
  if (strncmp(name, front, strlen(front)) != 0) return -1;
  char *end;
  long layer = strtol(name + strlen(front), &end, 10);
  *rest = end + 1;
  return (int)layer;
}

static const char *const gguf_names[][2] = {{"model.embed_tokens.weight", "token_embd.weight"},
                                            {"model.norm.weight", "output_norm.weight"},
                                            {"lm_head.weight", "output.weight"},
                                            {"input_layernorm.weight", "attn_norm.weight"},
                                            {"post_attention_layernorm.weight", "ffn_norm.weight"},
                                            {"self_attn.q_proj.weight", "attn_q.weight"},
                                            {"self_attn.k_proj.weight", "attn_k.weight"},
                                            {"self_attn.v_proj.weight", "attn_v.weight"},
                                            {"self_attn.o_proj.weight", "attn_output.weight"},
                                            {"self_attn.q_proj.bias", "attn_q.bias"},
                                            {"self_attn.k_proj.bias", "attn_k.bias"},
                                            {"self_attn.v_proj.bias", "attn_v.bias"},
                                            {"self_attn.o_proj.bias", "attn_output.bias"},
                                            {"self_attn.q_norm.weight", "attn_q_norm.weight"},
                                            {"self_attn.k_norm.weight", "attn_k_norm.weight"},
                                            {"self_attn.attn_sub_norm.weight", "attn_sub_norm.weight"},
                                            {"mlp.ffn_sub_norm.weight", "ffn_sub_norm.weight"},
                                            {"mlp.gate_proj.weight", "ffn_gate.weight"},
                                            {"mlp.up_proj.weight", "ffn_up.weight"},
                                            {"mlp.down_proj.weight", "ffn_down.weight"}};

// GGUF's name of a tensor of our table.
UNUSED static void gguf_name(char out[GGUF_NAME_CAP], const char *name) {
  const char *rest;
  int layer = name_layer_(name, &rest);
  for (size_t i = 0; i < ARRAY_LEN(gguf_names); i++) {
    if (strcmp(gguf_names[i][0], rest) != 0) continue;
    if (layer < 0) snprintf(out, GGUF_NAME_CAP, "%s", gguf_names[i][1]);
    else snprintf(out, GGUF_NAME_CAP, "blk.%d.%s", layer, gguf_names[i][1]);
    return;
  }
  die(EXIT_FAILED, "bug: tensor %s has no name in GGUF", name);
}

// The heads of a matrix whose rows are in another order where neighbours are rotated, or 0.
UNUSED static int rotated_heads_(const Config *c, const char *name) {
  const char *rest;
  name_layer_(name, &rest);
  if (strncmp(rest, "self_attn.q_proj.", 17) == 0) return c->heads;
  return strncmp(rest, "self_attn.k_proj.", 17) == 0 ? c->kv_heads : 0;
}

// The row of a file with neighbouring pairs that is our row r, for heads of width hs.
UNUSED static size_t paired_row_(size_t r, size_t hs) {
  size_t i = r % hs;
  return r - i + (i < hs / 2 ? 2 * i : 2 * (i - hs / 2) + 1);
}

// ---------------------------------------------------------------------------------------------------------
// GGUF: the Config.

// factors (=) [head_dim/2]: plain frequency over scaled one, what GGUF keeps as rope_freqs.weight.
UNUSED static void rope_factors(float *factors, const Config *c) {
  Config plain = *c;
  plain.rope_llama3 = 0;
  for (int i = 0; i < c->head_dim / 2; i++) factors[i] = rope_frequency(&plain, i) / rope_frequency(c, i);
}

/*
The llama3 scaling that has these factors. They do not name it: the largest is its factor, the two borders are always 1 and 4, and
of the original context lengths the one is taken that gives all factors again. Exit 2 if none does.
*/
static void source_find_scaling_(const Gguf *g, const GgufTensor *t, Config *c) {
  float want[HEAD_MAX / 2], found[HEAD_MAX / 2], top = 0;
  int half = c->head_dim / 2;
  if (t->ndim != 1 || t->n != (size_t)half) gguf_bad_(g, t->begin, "tensor %s: expected %d values, found %zu", t->name, half, t->n);
  gguf_read(g, t, want, 0, (size_t)half);
  for (int i = 0; i < half; i++) top = want[i] > top ? want[i] : top;
  c->rope_llama3 = 1;
  c->rope_factor = (double)top;
  c->rope_low_freq = 1;
  c->rope_high_freq = 4;
  for (c->rope_original_max = 1024; c->rope_original_max <= 1 << 20; c->rope_original_max *= 2) {
    int same = top > 0;
    rope_factors(found, c);
    for (int i = 0; i < half; i++) same &= fabsf(found[i] - want[i]) <= 1e-5f * found[i];
    if (same) return;
  }
  die(EXIT_USAGE, "%s: tensor %s: expected the frequencies of a llama3 scaling, found others", g->path, t->name);
}

// A number of the architecture; fallback UINT64_MAX: it must be there.
static int source_gguf_int_(const Gguf *g, const char *arch, const char *key, uint64_t fallback) {
  char name[160];
  snprintf(name, sizeof name, "%s.%s", arch, key);
  uint64_t v = gguf_u64(g, name, fallback, (uint64_t)1 << 24);
  if (v == UINT64_MAX) die(EXIT_DAMAGED, "%s: the key %s is missing", g->path, name);
  return (int)v;
}

// What the file's architecture and its tensors say about the network. paired: neighbouring numbers of a head are rotated.
static void source_gguf_config_(const Gguf *g, Config *c, int *paired) {
  static const char *const known[] = {"llama", "qwen2", "qwen3", "bitnet", "bitnet-b1.58", "bitnet-25"};
  char arch[64], name[160], scaling[32];
  int ok = 0;
  gguf_text(g, "general.architecture", arch, sizeof arch, "none");
  for (size_t i = 0; i < ARRAY_LEN(known); i++) ok |= strcmp(known[i], arch) == 0;
  if (!ok)
    die(EXIT_USAGE, "%s: the architecture '%s' is not supported; llama, qwen2, qwen3, bitnet and bitnet-b1.58 are", g->path, arch);
  *paired = strcmp(arch, "llama") == 0;
  memset(c, 0, sizeof *c);
  const GgufTensor *embed = gguf_find(g, "token_embd.weight");
  if (embed == NULL) die(EXIT_DAMAGED, "%s: tensor token_embd.weight is missing", g->path);
  c->dim = source_gguf_int_(g, arch, "embedding_length", UINT64_MAX);
  c->layers = source_gguf_int_(g, arch, "block_count", UINT64_MAX);
  c->ffn_dim = source_gguf_int_(g, arch, "feed_forward_length", UINT64_MAX);
  c->heads = source_gguf_int_(g, arch, "attention.head_count", UINT64_MAX);
  c->kv_heads = source_gguf_int_(g, arch, "attention.head_count_kv", (uint64_t)c->heads);
  c->max_seq = source_gguf_int_(g, arch, "context_length", 2048);
  if (c->heads < 1) die(EXIT_DAMAGED, "%s: %s.attention.head_count: expected at least 1, found %d", g->path, arch, c->heads);
  c->head_dim = source_gguf_int_(g, arch, "attention.key_length", (uint64_t)(c->dim / c->heads));
  if (source_gguf_int_(g, arch, "attention.value_length", (uint64_t)c->head_dim) != c->head_dim)
    die(EXIT_USAGE, "%s: values of another width than keys are not supported", g->path);
  if (source_gguf_int_(g, arch, "rope.dimension_count", (uint64_t)c->head_dim) != c->head_dim)
    die(EXIT_USAGE, "%s: rotary positions on a part of the head are not supported", g->path);
  if (source_gguf_int_(g, arch, "expert_count", 0) > 0) die(EXIT_USAGE, "%s: a mixture of experts is not supported", g->path);
  int window = source_gguf_int_(g, arch, "attention.sliding_window", 0);
  if (window > 0 && window < c->max_seq) c->max_seq = window;   // up to there the network is the usual one
  c->vocab = embed->dims[1] <= 1u << 24 ? (int)embed->dims[1] : 0;
  snprintf(name, sizeof name, "%s.attention.layer_norm_rms_epsilon", arch);
  c->norm_eps = (float)gguf_f32(g, name, 1e-5);
  snprintf(name, sizeof name, "%s.rope.freq_base", arch);
  c->rope_theta = gguf_f32(g, name, 10000);
  snprintf(name, sizeof name, "%s.rope.scaling.type", arch);
  gguf_text(g, name, scaling, sizeof scaling, "none");
  if (strcmp(scaling, "none") != 0)
    die(EXIT_USAGE, "%s: rope scaling '%s' is not supported; llama3 (rope_freqs.weight) is", g->path, scaling);
  c->rope_factor = 8;
  c->rope_low_freq = 1;
  c->rope_high_freq = 4;
  c->rope_original_max = 8192;
  c->init_std = 0.02f;
  c->act_bits = 8;
  c->activation = strncmp(arch, "bitnet-", 7) == 0 ? ACT_RELU2 : ACT_SILU;
  c->attn_sub_norm = gguf_find(g, "blk.0.attn_sub_norm.weight") != NULL;
  c->ffn_sub_norm = gguf_find(g, "blk.0.ffn_sub_norm.weight") != NULL;
  c->qkv_bias = gguf_find(g, "blk.0.attn_q.bias") != NULL;
  c->o_bias = gguf_find(g, "blk.0.attn_output.bias") != NULL;
  c->qk_norm = gguf_find(g, "blk.0.attn_q_norm.weight") != NULL;
  // bitnet.cpp has an untied classifier only by mistake: it always uses the embedding.
  c->tie_embeddings = gguf_find(g, "output.weight") == NULL || strncmp(arch, "bitnet-", 7) == 0;
  const char *why = config_check(c);
  if (why) die(EXIT_DAMAGED, "%s: %s", g->path, why);
  const GgufTensor *freqs = gguf_find(g, "rope_freqs.weight");
  if (freqs) source_find_scaling_(g, freqs, c);
}

static void source_llama2c_config_(const Llama2c *f, Config *c) {
  memset(c, 0, sizeof *c);
  c->dim = f->dim;
  c->layers = f->layers;
  c->heads = f->heads;
  c->kv_heads = f->kv_heads;
  c->head_dim = f->dim / f->heads;
  c->ffn_dim = f->hidden;
  c->vocab = f->vocab;
  c->max_seq = f->context;
  // The norms in front of the ternary form's matrices have none, and their inputs are so small that 1e-12 would show; its final norm's
  // 1e-5 moves the loss by 3e-5 of it.
  c->norm_eps = f->form == LLAMA2C_TERNARY ? 1e-30f : 1e-5f;
  c->rope_theta = 10000;
  c->rope_factor = 8;
  c->rope_low_freq = 1;
  c->rope_high_freq = 4;
  c->rope_original_max = 8192;
  c->activation = ACT_SILU;
  c->attn_sub_norm = c->ffn_sub_norm = f->form == LLAMA2C_TERNARY;   // its BitLinear normalises its input
  c->tie_embeddings = f->tied;
  c->act_bits = 8;
  c->init_std = 0.02f;
  const char *why = config_check(c);
  if (why) die(EXIT_DAMAGED, "%s: %s", f->path, why);
}

// ---------------------------------------------------------------------------------------------------------
// Opening.

enum { SOURCE_HF, SOURCE_GGUF, SOURCE_LLAMA2C };

// One tensor of our table as the file has it.
typedef struct {
  const Tensor *t;
  int ternary;                        // 1: codes and one scale; source_codes reads them
  int paired;                         // 1: rows of each head are in the other order
  const StFile *file;                 // Hugging Face
  const StTensor *st, *scale;
  int row;                            // 1: codes in one row, 4 or 5 a byte
  const GgufTensor *gguf;
  float gamma;                        // GGUF: the scale of a ternary matrix
  float factor;                       // GGUF: what all values are multiplied by, from "<name>.scale"
  int part, layer;                    // llama2c; part -1: all values are `constant`
  float constant;
} SourceTensor;

typedef struct {
  int kind;                 // SOURCE_*
  char *path;
  Config c;
  WeightForm form;          // Hugging Face
  StSet set;
  Gguf gguf;
  Llama2c bin;
  int paired;               // neighbouring numbers of a head are rotated
  TensorTable table;
  SourceTensor *tensors;    // [table.count]
} ModelSource;

// 1 if path is a file that begins with these letters.
static int source_begins_(const char *path, const char *letters) {
  char head[4] = {0};
  int fd = open(path, O_RDONLY);
  if (fd < 0) return 0;
  ssize_t n = read(fd, head, 4);
  close(fd);
  return n == 4 && memcmp(head, letters, 4) == 0;
}

// Finds out what path is and reads the Config; no weights yet.
static void source_open_config_(ModelSource *s, const char *path) {
  memset(s, 0, sizeof *s);
  s->path = xstrdup(path);
  if (!is_file(path)) {
    s->kind = SOURCE_HF;
    config_read_json_(&s->c, &s->form, path);
    return;
  }
  size_t n = strlen(path);
  if (source_begins_(path, "GGUF")) {
    s->kind = SOURCE_GGUF;
    gguf_open(&s->gguf, path);
    source_gguf_config_(&s->gguf, &s->c, &s->paired);
  } else if (n > 4 && strcmp(path + n - 4, ".bin") == 0) {
    s->kind = SOURCE_LLAMA2C;
    s->paired = 1;
    llama2c_open(&s->bin, path);
    source_llama2c_config_(&s->bin, &s->c);
  } else {
    die(EXIT_USAGE, "%s is no model that is known: expected the directory of one, a GGUF file, or a llama2.c file *.bin", path);
  }
}

UNUSED static void source_close(ModelSource *s) {
  if (s->kind == SOURCE_HF) st_set_close(&s->set);
  if (s->kind == SOURCE_GGUF) gguf_close(&s->gguf);
  if (s->kind == SOURCE_LLAMA2C) llama2c_close(&s->bin);
  tensor_table_free(&s->table);
  free(s->tensors);
  free(s->path);
  memset(s, 0, sizeof *s);
}

// The Config of a model directory or file. Exit 2 if there is none or it is of a kind that we cannot run, 3 if it is damaged.
UNUSED static void config_read(Config *c, const char *path) {
  ModelSource s;
  source_open_config_(&s, path);
  *c = s.c;
  source_close(&s);
}

// Exits with 3 unless the shape of a tensor is the one that is asked for. found: sizes, the slowest first.
static void source_check_shape_(const char *path, const char *name, size_t at, int ndim, const size_t *found, int want_ndim,
                                const size_t *want) {
  int same = ndim == want_ndim;
  for (int i = 0; i < want_ndim && same; i++) same = found[i] == want[i];
  if (same) return;
  StrBuf shape = {NULL, 0, 0};
  for (int i = 0; i < ndim; i++) strbuf_printf(&shape, "%s%zu", i ? "," : "", found[i]);
  die(EXIT_DAMAGED, "%s: tensor %s at offset %zu: expected shape [%zu%s%.0zu], found [%s]", path, name, at, want[0],
      want_ndim > 1 ? "," : "", want_ndim > 1 ? want[1] : 0, shape.data ? shape.data : "");
}

// The tensor of a directory by its name; exit 3 if it is missing or has another shape.
static const StTensor *source_find_st_(const ModelSource *s, const char *name, int ndim, const size_t *shape, const StFile **file) {
  const StTensor *x = st_set_find(&s->set, name, file);
  if (x == NULL) die(EXIT_DAMAGED, "%s: tensor %s is missing; config.json asks for it", s->path, name);
  source_check_shape_((*file)->path, name, (*file)->data_at + x->begin, x->ndim, x->shape, ndim, shape);
  return x;
}

// name without its end "weight", and another one instead.
static void source_sibling_(char *out, size_t cap, const char *name, const char *end) {
  snprintf(out, cap, "%.*s%s", (int)(strlen(name) - strlen("weight")), name, end);
}

// Exits with 2 unless two gains are the same, or all values of one are 1 where b is NULL: other folded models are not of our kind.
static void source_same_gain_(const StFile *f, const StTensor *a, const StFile *g, const StTensor *b) {
  float x, y = 1;
  for (size_t i = 0; i < a->n; i++) {
    st_read_f32(f, a, &x, i, 1);
    if (b) st_read_f32(g, b, &y, i, 1);
    if (x != y)
      die(EXIT_USAGE,
          "%s: tensor %s, element %zu: expected %g, found %g; a norm in front of each matrix is supported only where it is one "
          "of the block's norms",
          f->path, a->name, i, (double)y, (double)x);
  }
}

/*
use_rms_norm: the norms of a block stand in front of its matrices instead. The file's own norm1 and norm2 are all ones, q, k and v have
the real norm1, gate and up norm2, o and down the sub-norms.
*/
static void source_unfold_(const ModelSource *s, SourceTensor *x) {
  static const char *const places[][4] = {   // of our table, then the tensors in the file that have the gain
      {"input_layernorm.weight", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
      {"post_attention_layernorm.weight", "mlp.gate_proj", "mlp.up_proj", NULL},
      {"self_attn.attn_sub_norm.weight", "self_attn.o_proj", NULL, NULL},
      {"mlp.ffn_sub_norm.weight", "mlp.down_proj", NULL, NULL}};
  const char *rest;
  char name[160];
  int layer = name_layer_(x->t->name, &rest);
  for (size_t i = 0; i < ARRAY_LEN(places); i++) {
    if (layer < 0 || strcmp(places[i][0], rest) != 0) continue;
    for (int k = 1; k < 4 && places[i][k]; k++) {
      const StFile *f;
      snprintf(name, sizeof name, "model.layers.%d.%s.rms_norm.weight", layer, places[i][k]);
      const StTensor *gain = source_find_st_(s, name, 1, x->t->shape, &f);
      if (k == 1) {
        x->st = gain;
        x->file = f;
      } else {
        source_same_gain_(f, gain, x->file, x->st);
      }
    }
    if (i < 2) {
      const StFile *f;
      const StTensor *ones = source_find_st_(s, x->t->name, 1, x->t->shape, &f);
      source_same_gain_(f, ones, NULL, NULL);
    }
  }
}

/*
A tensor of the TRITS and RECORD forms: codes in one row with "<name>.shape" and "<name>.scale", or floats. The writer that the former
comes from stored no scale; then it is 1.
*/
static void source_resolve_row_(const ModelSource *s, SourceTensor *x) {
  const Tensor *t = x->t;
  char name[160], other[176];
  const StFile *f;
  size_t per = s->form.packed == PACKED_TRITS ? 5 : 4, n = (t->n + per - 1) / per, ndim = (size_t)t->ndim, one = 1;
  snprintf(name, sizeof name, "%s%s", s->form.packed == PACKED_TRITS ? "model." : "", t->name);
  x->st = st_set_find(&s->set, name, &x->file);
  if (x->st == NULL) die(EXIT_DAMAGED, "%s: tensor %s is missing; config.json asks for it", s->path, name);
  if (x->st->dtype != ST_U8) {
    if (t->flags & TERNARY)
      die(EXIT_DAMAGED, "%s: tensor %s: expected codes of type U8, found %s", x->file->path, name, st_dtype_name(x->st->dtype));
    source_find_st_(s, name, t->ndim, t->shape, &x->file);
    return;
  }
  source_find_st_(s, name, 1, &n, &x->file);
  x->row = 1;
  x->ternary = (t->flags & TERNARY) != 0;
  x->gamma = 1;
  snprintf(other, sizeof other, "%s.shape", name);
  const StTensor *shape = source_find_st_(s, other, 1, &ndim, &f);
  if (shape->dtype != ST_I32)
    die(EXIT_DAMAGED, "%s: tensor %s: expected the type I32, found %s", f->path, other, st_dtype_name(shape->dtype));
  for (int i = 0; i < t->ndim; i++) {
    int32_t d;
    memcpy(&d, st_data(f, shape) + 4 * i, 4);
    if (d < 0 || (size_t)d != t->shape[i])
      die(EXIT_DAMAGED, "%s: tensor %s: expected %zu in place %d, found %d", f->path, other, t->shape[i], i, d);
  }
  snprintf(other, sizeof other, "%s.scale", name);
  x->scale = st_set_find(&s->set, other, &f);
  if (x->scale == NULL) {
    fprintf(stderr, "warning: %s: tensor %s has no scale; 1 is taken\n", x->file->path, name);
    return;
  }
  source_find_st_(s, other, 1, &one, &f);
  st_read_f32(f, x->scale, &x->gamma, 0, 1);
  if (!(x->gamma > 0) || !isfinite(x->gamma))
    die(EXIT_DAMAGED, "%s: tensor %s: expected a positive number, found %g", f->path, other, (double)x->gamma);
}

static void source_resolve_hf_(const ModelSource *s, SourceTensor *x) {
  const Tensor *t = x->t;
  char name[160];
  if (s->form.packed >= PACKED_TRITS) {
    source_resolve_row_(s, x);
    return;
  }
  if (s->form.folded) source_unfold_(s, x);
  if (x->st) return;
  if (!(t->flags & TERNARY) || s->form.packed == PACKED_NONE) {
    x->st = source_find_st_(s, t->name, t->ndim, t->shape, &x->file);
  } else {
    const StFile *f;
    size_t shape[2] = {t->shape[0] / 4, t->shape[1]}, one = 1;
    if (t->shape[0] % 4 != 0) die(EXIT_USAGE, "%s: tensor %s: %zu rows cannot be packed by fours", s->path, t->name, t->shape[0]);
    x->st = source_find_st_(s, t->name, 2, shape, &x->file);
    if (x->st->dtype != ST_U8)
      die(EXIT_DAMAGED, "%s: tensor %s: expected packed weights of type U8, as config.json says, found %s", x->file->path, t->name,
          st_dtype_name(x->st->dtype));
    source_sibling_(name, sizeof name, t->name, "weight_scale");
    x->scale = source_find_st_(s, name, 1, &one, &f);
    st_read_f32(f, x->scale, &x->gamma, 0, 1);
    if (!(x->gamma > 0) || !isfinite(x->gamma))
      die(EXIT_DAMAGED, "%s: tensor %s: expected a positive number, found %g", f->path, name, (double)x->gamma);
    if (s->form.packed == PACKED_DIVIDE) x->gamma = 1.0f / x->gamma;
    x->ternary = 1;
  }
  // The packed form of autobitlinear multiplies the bias by the scale, too.
  size_t len = strlen(t->name);
  if (s->form.packed == PACKED_MULTIPLY && t->flags & BIAS) {
    const StFile *f;
    snprintf(name, sizeof name, "%.*sweight_scale", (int)(len - strlen("bias")), t->name);
    size_t one = 1;
    x->scale = source_find_st_(s, name, 1, &one, &f);
    st_read_f32(f, x->scale, &x->factor, 0, 1);
  }
}

// Exits with 3 if the files have a tensor that the model has no place for.
static void source_refuse_surplus_(const ModelSource *s) {
  for (size_t k = 0; k < s->set.n_files; k++) {
    const StFile *f = &s->set.files[k];
    for (size_t i = 0; i < f->n_tensors; i++) {
      const char *name = f->tensors[i].name;
      size_t len = strlen(name);
      // Old files keep angles; a tied model may repeat its embedding; the last two belong to the form of the weights, and were found.
      int known = strstr(name, "rotary_emb.inv_freq") != NULL || strstr(name, "attention.masked_bias") != NULL ||
                  (s->c.tie_embeddings && strcmp(name, "lm_head.weight") == 0);
      int row = s->form.packed >= PACKED_TRITS;
      if (s->form.packed == PACKED_TRITS && strncmp(name, "model.", 6) == 0) {
        name += 6;
        len -= 6;
      }
      for (int n = 0; n < s->table.count && !known; n++) {
        const Tensor *t = &s->table.tensors[n];
        size_t whole = strlen(t->name);
        known = strcmp(t->name, name) == 0;
        if (row && !known && strncmp(t->name, name, whole) == 0)
          known =
              strcmp(name + whole, ".shape") == 0 || strcmp(name + whole, ".scale") == 0 || strcmp(name + whole, ".threshold") == 0;
        if (row || known || !(t->flags & TERNARY)) continue;
        size_t front = strlen(t->name) - strlen("weight");
        if (len <= front || strncmp(t->name, name, front) != 0) continue;
        known = (s->form.packed != PACKED_NONE && strcmp(name + front, "weight_scale") == 0) ||
                (s->form.folded && strcmp(name + front, "rms_norm.weight") == 0);
      }
      if (!known) die(EXIT_DAMAGED, "%s: tensor %s does not belong to a model of this config.json", f->path, name);
    }
  }
}

#define SOURCE_CHUNK_ ((size_t)4096)   // values that are looked at together

// 1 if a matrix has only the values -g, 0 and g; *g becomes it. Real float matrices end the search within a few values.
static int source_is_ternary_(const Gguf *g, const GgufTensor *t, float *gamma) {
  float x[SOURCE_CHUNK_], top = 0;
  if (gguf_is_codes(t)) return gguf_one_scale(g, t, gamma);
  for (size_t first = 0; first < t->n; first += SOURCE_CHUNK_) {
    size_t n = t->n - first < SOURCE_CHUNK_ ? t->n - first : SOURCE_CHUNK_;
    gguf_read(g, t, x, first, n);
    for (size_t i = 0; i < n; i++) {
      float a = fabsf(x[i]);
      if (a == 0) continue;
      if (top == 0) top = a;
      if (a != top || !isfinite(a)) return 0;
    }
  }
  *gamma = top;
  return 1;
}

static void source_resolve_gguf_(const ModelSource *s, SourceTensor *x, unsigned char *used) {
  const Tensor *t = x->t;
  const Gguf *g = &s->gguf;
  char name[GGUF_NAME_CAP], scale[GGUF_NAME_CAP + 8];
  gguf_name(name, t->name);
  x->gguf = gguf_find(g, name);
  if (x->gguf == NULL) die(EXIT_DAMAGED, "%s: tensor %s is missing", g->path, name);
  size_t found[GGUF_MAX_DIMS];
  for (int i = 0; i < x->gguf->ndim; i++) found[i] = x->gguf->dims[x->gguf->ndim - 1 - i];
  source_check_shape_(g->path, name, x->gguf->begin, x->gguf->ndim, found, t->ndim, t->shape);
  used[x->gguf - g->tensors] = 1;
  x->factor = 1;
  if (!(t->flags & TERNARY)) return;
  source_sibling_(scale, sizeof scale, name, "scale");
  const GgufTensor *one = gguf_find(g, scale);
  if (one) {
    if (one->n != 1) gguf_bad_(g, one->begin, "tensor %s: expected one value, found %zu", scale, one->n);
    gguf_read(g, one, &x->factor, 0, 1);
    used[one - g->tensors] = 1;
  }
}

// The rest of it for matrix i of the table: whether it is ternary. It reads all of a ternary matrix.
static void source_resolve_codes_(void *source, int i) {
  const ModelSource *s = (const ModelSource *)source;
  SourceTensor *x = &s->tensors[i];
  if (!(x->t->flags & TERNARY)) return;
  x->ternary = source_is_ternary_(&s->gguf, x->gguf, &x->gamma);
  x->gamma *= x->factor;
  gguf_release(&s->gguf, x->gguf);
}

static void source_resolve_llama2c_(const ModelSource *s, SourceTensor *x) {
  static const struct { const char *name; int part; } parts[] = {
      {"model.embed_tokens.weight", LLAMA2C_EMBED}, {"model.norm.weight", LLAMA2C_FINAL}, {"lm_head.weight", LLAMA2C_HEAD},
      {"input_layernorm.weight", LLAMA2C_NORM1}, {"post_attention_layernorm.weight", LLAMA2C_NORM2},
      {"self_attn.q_proj.weight", LLAMA2C_Q}, {"self_attn.k_proj.weight", LLAMA2C_K}, {"self_attn.v_proj.weight", LLAMA2C_V},
      {"self_attn.o_proj.weight", LLAMA2C_O}, {"mlp.gate_proj.weight", LLAMA2C_W1}, {"mlp.down_proj.weight", LLAMA2C_W2},
      {"mlp.up_proj.weight", LLAMA2C_W3}, {"self_attn.attn_sub_norm.weight", -1}, {"mlp.ffn_sub_norm.weight", -1}};
  const char *rest;
  x->part = -2;
  x->layer = name_layer_(x->t->name, &rest);
  if (x->layer < 0) x->layer = 0;
  for (size_t i = 0; i < ARRAY_LEN(parts); i++) {
    if (strcmp(parts[i].name, rest) == 0) x->part = parts[i].part;
  }
  if (x->part == -2) die(EXIT_FAILED, "bug: tensor %s has no place in a llama2.c file", x->t->name);
  if (s->bin.form != LLAMA2C_TERNARY) return;
  x->ternary = (x->t->flags & TERNARY) != 0;
  // Its norms have no gains, and divide by the width as well.
  if (x->part == LLAMA2C_NORM1 || x->part == LLAMA2C_NORM2) x->part = -1;
  x->constant = 1.0f / (float)x->t->n;
}

enum { SOURCE_MAX_CONTEXT = 1 << 20 };

// Exits with 3 where the Config would make us allocate much more than the file has: every layer has nine tensors at least, and the
// context decides the size of the table of angles.
static void source_check_size_(const ModelSource *s) {
  size_t n = s->gguf.n_tensors;
  for (size_t i = 0; i < s->set.n_files; i++) n += s->set.files[i].n_tensors;
  if (s->kind != SOURCE_LLAMA2C && (size_t)s->c.layers > n / 9)
    die(EXIT_DAMAGED, "%s: expected the tensors of %d layers, found only %zu tensors", s->path, s->c.layers, n);
  if (s->c.max_seq > SOURCE_MAX_CONTEXT)
    die(EXIT_DAMAGED, "%s: expected a context of at most %d, found %d", s->path, SOURCE_MAX_CONTEXT, s->c.max_seq);
}

/*
Opens a model: its Config, and for each tensor of the table where it lies. Every tensor must be there with the right shape, and none
may be left over. Exit 2 for a model that cannot be run, 3 for one that is damaged.
*/
UNUSED static void source_open(ModelSource *s, const char *path) {
  source_open_config_(s, path);
  if (s->kind == SOURCE_HF) {
    st_set_open(&s->set, path);
    st_set_verify(&s->set);
  }
  source_check_size_(s);
  tensor_table(&s->table, &s->c);
  s->tensors = (SourceTensor *)xcalloc((size_t)s->table.count, sizeof *s->tensors);
  unsigned char *used = (unsigned char *)xcalloc(s->gguf.n_tensors, 1);
  for (int i = 0; i < s->table.count; i++) {
    SourceTensor *x = &s->tensors[i];
    x->t = &s->table.tensors[i];
    x->factor = 1;
    x->paired = s->paired && rotated_heads_(&s->c, x->t->name) > 0;
    if (s->kind == SOURCE_HF) source_resolve_hf_(s, x);
    else if (s->kind == SOURCE_GGUF) source_resolve_gguf_(s, x, used);
    else source_resolve_llama2c_(s, x);
  }
  if (s->kind == SOURCE_HF) source_refuse_surplus_(s);
  if (s->kind == SOURCE_GGUF) host_parallel(s->table.count, source_resolve_codes_, s);
  for (size_t i = 0; i < s->gguf.n_tensors; i++) {
    const char *name = s->gguf.tensors[i].name;
    int spare = strcmp(name, "rope_freqs.weight") == 0 || (s->c.tie_embeddings && strcmp(name, "output.weight") == 0);
    if (!used[i] && !spare) die(EXIT_DAMAGED, "%s: tensor %s does not belong to a model of this architecture", path, name);
  }
  free(used);
}

// ---------------------------------------------------------------------------------------------------------
// Reading.

// Codes first .. first+n-1 of a tensor that holds them in one row. Returns n, or how many came before a byte or bits that stand for
// none.
static size_t source_row_codes_(const ModelSource *s, const SourceTensor *x, int8_t *codes, size_t first, size_t n) {
  static const int powers[5] = {1, 3, 9, 27, 81};
  const unsigned char *p = st_data(x->file, x->st);
  for (size_t k = 0; k < n; k++) {
    size_t at = first + k;
    int trits = s->form.packed == PACKED_TRITS, byte = p[at / (trits ? 5 : 4)];
    int code = trits ? byte / powers[at % 5] % 3 - 1 : (byte >> (6 - 2 * (at % 4)) & 3) - 1;
    if (trits ? byte > 242 : code == 2) return k;
    codes[k] = (int8_t)code;
  }
  return n;
}

// Exits with 3 for value `at` of a tensor that source_row_codes_ stopped at.
static void source_bad_row_(const ModelSource *s, const SourceTensor *x, size_t at) {
  size_t place = at / (s->form.packed == PACKED_TRITS ? 5 : 4);
  die(EXIT_DAMAGED, "%s: tensor %s at offset %zu: expected codes, found the byte %d", x->file->path, x->st->name,
      x->file->data_at + x->st->begin + place, st_data(x->file, x->st)[place]);
}

// Floats as they lie in the file, before rows are reordered.
static void source_raw_(const ModelSource *s, const SourceTensor *x, float *out, size_t first, size_t n) {
  int8_t code;
  for (size_t i = 0; i < n && x->row; i++) {
    if (!source_row_codes_(s, x, &code, first + i, 1)) source_bad_row_(s, x, first + i);
    out[i] = x->gamma * (float)code;
  }
  if (x->row) return;
  if (x->st) st_read_f32(x->file, x->st, out, first, n);
  else if (x->gguf) gguf_read(&s->gguf, x->gguf, out, first, n);
  else if (x->part >= 0) llama2c_read(&s->bin, x->part, x->layer, out, first, n);
  for (size_t i = 0; i < n && x->factor != 1; i++) out[i] *= x->factor;
  for (size_t i = 0; i < n && x->part < 0; i++) out[i] = x->constant;
}

// Where a tensor of a source begins, for messages.
static size_t source_offset_(const ModelSource *s, const SourceTensor *x) {
  if (x->st) return x->file->data_at + x->st->begin;
  return x->gguf ? x->gguf->begin : x->part >= 0 ? llama2c_place(&s->bin, x->part, x->layer) : 0;
}

// The first of n numbers that is not finite, or n. Numbers are looked at together until some are not: that is much faster.
static size_t source_infinite_(const float *x, size_t n) {
  enum { TOGETHER = 1024 };
  for (size_t first = 0; first < n; first += TOGETHER) {
    size_t end = n - first < TOGETHER ? n : first + TOGETHER;
    uint32_t most = 0;
    for (size_t k = first; k < end; k++) {
      uint32_t bits;
      memcpy(&bits, &x[k], 4);
      bits &= 0x7F800000u;
      most = bits > most ? bits : most;
    }
    for (size_t k = first; k < end && most == 0x7F800000u; k++) {
      if (!isfinite(x[k])) return k;
    }
  }
  return n;
}

// Work on a tensor in pieces of equal size; each counts what it finds wrong.
typedef struct {
  const ModelSource *s;
  const SourceTensor *x;
  void *out;             // of what begins at `first`: floats, or codes
  const void *in;
  size_t first, n, piece;
  int found[64];         // [pieces]
} SourceJob_;

// Runs a job in pieces of at least `least`. Returns 1 if no piece has found anything.
static int source_work_(SourceJob_ *job, size_t least, void (*work)(void *ctx, int i)) {
  size_t most = ARRAY_LEN(job->found), units = (job->n + least - 1) / least;
  job->piece = (units + most - 1) / most * least;
  int pieces = job->piece ? (int)((job->n + job->piece - 1) / job->piece) : 0, found = 0;
  memset(job->found, 0, sizeof job->found);
  host_parallel(pieces, work, job);
  for (int i = 0; i < pieces; i++) found |= job->found[i];
  return !found;
}

// Piece i of a job: its first element behind `first`, and how many it has.
static size_t source_piece_(const SourceJob_ *job, int i, size_t *n) {
  size_t at = (size_t)i * job->piece;
  *n = job->n - at < job->piece ? job->n - at : job->piece;
  return at;
}

static void source_floats_piece_(void *ctx, int i) {
  SourceJob_ *job = (SourceJob_ *)ctx;
  const SourceTensor *x = job->x;
  size_t n, at = source_piece_(job, i, &n), cols = x->t->shape[1], hs = (size_t)job->s->c.head_dim;
  float *out = (float *)job->out + at;
  if (!x->paired) source_raw_(job->s, x, out, job->first + at, n);
  for (size_t k = 0; k < n && x->paired;) {
    size_t row = (job->first + at + k) / cols, skip = (job->first + at + k) % cols, take = cols - skip < n - k ? cols - skip : n - k;
    source_raw_(job->s, x, out + k, paired_row_(row, hs) * cols + skip, take);
    k += take;
  }
  job->found[i] = source_infinite_(out, n) < n;
}

// Exits with 3: element k of a tensor is not finite.
static void source_not_finite_(const ModelSource *s, const SourceTensor *x, size_t k, float value) {
  die(EXIT_DAMAGED, "%s: tensor %s at offset %zu: element %zu: expected a finite number, found %g", s->path, x->t->name,
      source_offset_(s, x), k, (double)value);
}

enum { SOURCE_PIECE_ = 1 << 15 };   // values that a thread should get at least

// Elements first .. first+n-1 of tensor i of the table as floats, for one that is not ternary. Exit 3 for a value that is not finite.
UNUSED static void source_floats(const ModelSource *s, int i, float *out, size_t first, size_t n) {
  SourceJob_ job = {s, &s->tensors[i], out, NULL, first, n, 0, {0}};
  // Readers that stop at damage say so at once: one thread, one message.
  int alone = job.x->row || s->kind == SOURCE_LLAMA2C || (job.x->gguf && gguf_is_codes(job.x->gguf));
  if (!source_work_(&job, alone && n > 0 ? n : (size_t)SOURCE_PIECE_, source_floats_piece_)) {
    size_t k = source_infinite_(out, n);
    source_not_finite_(s, job.x, first + k, out[k]);
  }
}

// codes (=) of one row of a ternary tensor. Returns 1, or 0 if the file holds something else there.
static int source_code_row_(const ModelSource *s, const SourceTensor *x, int8_t *codes, size_t r) {
  size_t cols = x->t->shape[1], from = (x->paired ? paired_row_(r, (size_t)s->c.head_dim) : r) * cols;
  float values[SOURCE_CHUNK_];
  if (x->row) return source_row_codes_(s, x, codes, r * cols, cols) == cols;
  if (x->st) return unpack4_row(codes, st_data(x->file, x->st), x->t->shape[0], cols, r);
  if (gguf_is_codes(x->gguf)) return gguf_codes(&s->gguf, x->gguf, codes, from, cols);
  for (size_t k = 0; k < cols; k += SOURCE_CHUNK_) {
    size_t n = cols - k < SOURCE_CHUNK_ ? cols - k : SOURCE_CHUNK_;
    gguf_read(&s->gguf, x->gguf, values, from + k, n);
    for (size_t j = 0; j < n; j++) codes[k + j] = (int8_t)((values[j] > 0) - (values[j] < 0));
  }
  return 1;
}

static void source_codes_piece_(void *ctx, int i) {
  SourceJob_ *job = (SourceJob_ *)ctx;
  size_t n, at = source_piece_(job, i, &n), cols = job->x->t->shape[1];
  for (size_t r = at; r < at + n; r++) {
    job->found[i] |= !source_code_row_(job->s, job->x, (int8_t *)job->out + r * cols, job->first + r);
  }
}

// Exits with 3: some of the rows hold what stands for no codes. codes: [cols] of scratch.
static void source_bad_codes_(const ModelSource *s, const SourceTensor *x, int8_t *codes, size_t first, size_t rows) {
  size_t cols = x->t->shape[1];
  float values[SOURCE_CHUNK_];
  for (size_t k = first * cols; k < (first + rows) * cols && x->row; k++) {
    if (!source_row_codes_(s, x, codes, k, 1)) source_bad_row_(s, x, k);
  }
  for (size_t r = first; r < first + rows && x->gguf; r++) {   // its reader names the block
    size_t from = (x->paired ? paired_row_(r, (size_t)s->c.head_dim) : r) * cols;
    for (size_t k = 0; k < cols; k += SOURCE_CHUNK_)
      gguf_read(&s->gguf, x->gguf, values, from + k, cols - k < SOURCE_CHUNK_ ? cols - k : SOURCE_CHUNK_);
  }
  die(EXIT_DAMAGED, "%s: tensor %s at offset %zu: expected the codes 0, 1 and 2, found a 3", x->file->path, x->t->name,
      source_offset_(s, x));
}

// How far apart rows of tensor i lie that share bytes of the file; the number of rows if none do. Reading them one after the other
// reads memory once.
UNUSED static size_t source_rows_apart(const ModelSource *s, int i) {
  const SourceTensor *x = &s->tensors[i];
  return x->t->shape[0] / (x->st && x->ternary && !x->row ? 4 : 1);
}

// Codes of rows first .. first+rows-1 of ternary tensor i: codes (=) [rows,cols]. Returns the scale that they are multiplied with.
UNUSED static float source_codes(const ModelSource *s, int i, int8_t *codes, size_t first, size_t rows) {
  const SourceTensor *x = &s->tensors[i];
  size_t cols = x->t->shape[1], hs = (size_t)s->c.head_dim;
  SourceJob_ job = {s, x, codes, NULL, first, rows, 0, {0}};
  float gamma = x->gamma;
  if (s->kind != SOURCE_LLAMA2C && !source_work_(&job, 16, source_codes_piece_)) source_bad_codes_(s, x, codes, first, rows);
  for (size_t r = 0; r < rows && s->kind == SOURCE_LLAMA2C; r++) {
    size_t from = (x->paired ? paired_row_(first + r, hs) : first + r) * cols;
    gamma = llama2c_codes(&s->bin, x->part, x->layer, codes + r * cols, from, cols);
  }
  return gamma;
}

/*
Master weights for a matrix that the file holds as codes, from which the quantiser makes the same codes and the same scale again: with
a share p of codes that are not 0, the mean of |W| is p times their size, so they must be gamma / p. out (=) [n]; codes: [n] of
scratch.
*/
UNUSED static void source_master(const ModelSource *s, int i, float *out, int8_t *codes) {
  size_t n = s->tensors[i].t->n, ones = 0;
  float gamma = source_codes(s, i, codes, 0, s->tensors[i].t->shape[0]);
  for (size_t k = 0; k < n; k++) ones += codes[k] != 0;
  float size = ones ? (float)((double)gamma * (double)n / (double)ones) : 0;
  for (size_t k = 0; k < n; k++) out[k] = size * (float)codes[k];
}

// 1 if every value of tensor i is a bf16 number, so that keeping it in bf16 loses nothing. scratch: [cap] floats.
UNUSED static int source_is_half(const ModelSource *s, int i, float *scratch, size_t cap) {
  const SourceTensor *x = &s->tensors[i];
  if ((x->st && x->st->dtype == ST_BF16) || (x->gguf && x->gguf->type->id == GGUF_BF16)) return 1;
  for (size_t first = 0; first < x->t->n; first += cap) {
    size_t n = x->t->n - first < cap ? x->t->n - first : cap;
    uint32_t lost = 0;   // what bf16 has no room for
    source_floats(s, i, scratch, first, n);
    for (size_t k = 0; k < n; k++) {
      uint32_t bits;
      memcpy(&bits, &scratch[k], 4);
      lost |= bits & 0xFFFFu;
    }
    if (lost) return 0;
  }
  return 1;
}

// 1 if tensor i lies in the file as `size` bytes a value (2: bf16, 4: float) that can be used there.
UNUSED static int source_in_file(const ModelSource *s, int i, size_t size) {
  const SourceTensor *x = &s->tensors[i];
  int half = size == sizeof(uint16_t), known = 0;
  if (x->st) known = !x->row && x->st->dtype == (half ? ST_BF16 : ST_F32);
  else if (x->gguf) known = x->gguf->type->id == (half ? GGUF_BF16 : GGUF_F32) && x->factor == 1;
  return known && !x->paired && source_offset_(s, x) % size == 0;
}

// Maps such a tensor; part stays valid when the source is closed.
UNUSED static void source_map(const ModelSource *s, int i, FilePart *part) {
  const SourceTensor *x = &s->tensors[i];
  if (x->st) file_part_open(part, x->file->path, x->file->map_bytes, source_offset_(s, x), x->st->end - x->st->begin);
  else file_part_open(part, s->gguf.path, s->gguf.map_bytes, source_offset_(s, x), x->gguf->bytes);
}

static void source_finite_piece_(void *ctx, int i) {
  SourceJob_ *job = (SourceJob_ *)ctx;
  size_t n, at = source_piece_(job, i, &n);
  const uint16_t *half = (const uint16_t *)job->in + job->first + at;
  uint16_t most = 0;
  for (size_t k = 0; k < n; k++) {
    uint16_t bits = half[k] & 0x7F80;
    most = bits > most ? bits : most;
  }
  job->found[i] = most == 0x7F80;
}

static void source_finite_floats_(void *ctx, int i) {
  SourceJob_ *job = (SourceJob_ *)ctx;
  size_t n, at = source_piece_(job, i, &n);
  job->found[i] = source_infinite_((const float *)job->in + job->first + at, n) < n;
}

// Exits with 3 unless elements first .. first+n-1 of a mapped tensor, `size` bytes each, are finite.
UNUSED static void source_check_finite(const ModelSource *s, int i, const FilePart *part, size_t size, size_t first, size_t n) {
  SourceJob_ job = {s, &s->tensors[i], NULL, part->data, first, n, 0, {0}};
  int half = size == sizeof(uint16_t);
  if (source_work_(&job, SOURCE_PIECE_, half ? source_finite_piece_ : source_finite_floats_)) return;
  for (size_t k = first; k < first + n; k++) {
    float value = half ? f32_from_bf16(((const uint16_t *)part->data)[k]) : ((const float *)part->data)[k];
    if (!isfinite(value)) source_not_finite_(s, job.x, k, value);
  }
}

// Gives the memory back that reading a tensor has filled.
UNUSED static void source_release(const ModelSource *s, int i) {
  const SourceTensor *x = &s->tensors[i];
  if (x->st) st_release(x->file, x->st);
  if (x->gguf) gguf_release(&s->gguf, x->gguf);
}

#endif
