/*
model.h: the network, written once for every backend and every mode.

What it is:  Config (the shape of a model), the one table of its tensors, the layout of its memory, and the forward and backward
             passes as lists of operations. A frozen model only runs: packed ternary matrices, the embedding table as it was
             stored, norms; no master weights. Its forward pass is the same list and has the same bits as at lambda = 1.
What not:    no arithmetic (that is below bitnet/ops.h), no losses (losses.h writes the gradient that model_backward starts
             from), no optimizer, no files.
Read before: bitnet/ops.h; train_bitnet.c for what each operation computes.
Defines:     Config, config_check; Tensor, Model, model_open, model_alloc_batch, model_alloc_training, model_free, model_quantize,
             TABLE_*, model_open_frozen, frozen_weight, model_embed, model_logits, Context, layer_forward, layer_backward,
             model_forward, model_backward; Memory, model_memory.

One block, with the names of the buffers (DESIGN of BitNet b1.58 with sub-norms):

    x --> rmsnorm --> [h1] --> BitLinear qkv --> qkv_raw -(q/k norm)-> rope --> qkv --> attention --> att
          --> sub-norm --> [h2] --> BitLinear o (+ x) --> mid
    mid -> rmsnorm --> [h3] --> BitLinear gate,up --> gate_up --> act(gate) * up --> sub-norm --> [h4]
          --> BitLinear down (+ mid) --> the next block's x

[h] are quantised activations; everything between two brackets is kept for the backward pass.
*/
#ifndef BITNET_MODEL_H
#define BITNET_MODEL_H

#include "ops.h"
#include "utils.h"

// ---------------------------------------------------------------------------------------------------------
// The shape of a model.

typedef struct {
  int dim, layers, heads, kv_heads, head_dim, ffn_dim, vocab, max_seq;
  float norm_eps;
  double rope_theta;
  int rope_llama3;                  // llama3 frequency scaling with the four numbers below
  double rope_factor, rope_low_freq, rope_high_freq;
  int rope_original_max;
  int activation;                   // ACT_*
  int attn_sub_norm, ffn_sub_norm;  // RMSNorm in front of the o and the down projection
  int qkv_bias, o_bias, qk_norm;    // what converted models bring along
  int tie_embeddings;               // the classifier is the embedding table
  int act_bits;                     // 8 or 4; 0 = only weights are quantised
  int value_head;                   // 1: a reward model, which gives each text one number (bitnet/value.h)
  float init_std;
} Config;

// NULL if the shape makes sense, else what is wrong with it (static storage).
UNUSED static const char *config_check(const Config *c) {
  static char why[200];
  const char *names[] = {"dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab", "max_seq"};
  int values[] = {c->dim, c->layers, c->heads, c->kv_heads, c->head_dim, c->ffn_dim, c->vocab, c->max_seq};
  for (size_t i = 0; i < ARRAY_LEN(values); i++) {
    if (values[i] < 1 || values[i] > 1 << 24) {
      snprintf(why, sizeof why, "%s=%d: expected 1 to %d", names[i], values[i], 1 << 24);
      return why;
    }
  }
  why[0] = 0;
  if (c->heads % c->kv_heads != 0) snprintf(why, sizeof why, "heads=%d is not a multiple of kv_heads=%d", c->heads, c->kv_heads);
  else if (c->head_dim % 2 != 0) snprintf(why, sizeof why, "head_dim=%d is odd; RoPE rotates pairs", c->head_dim);
  else if (c->head_dim > HEAD_MAX) snprintf(why, sizeof why, "head_dim=%d: expected at most %d", c->head_dim, HEAD_MAX);
  else if (c->act_bits != 0 && c->act_bits != 4 && c->act_bits != 8)
    snprintf(why, sizeof why, "act_bits=%d: expected 8, 4 or 0", c->act_bits);
  else if ((long)c->heads * c->head_dim > 1 << 24)
    snprintf(why, sizeof why, "heads=%d x head_dim=%d is too wide", c->heads, c->head_dim);
  else if (!(c->norm_eps > 0) || !(c->rope_theta > 0)) snprintf(why, sizeof why, "norm_eps and rope_theta must be positive");
  return why[0] ? why : NULL;
}

// Columns of q, k and v side by side.
UNUSED static int config_qkv(const Config *c) {
  return (c->heads + 2 * c->kv_heads) * c->head_dim;
}

// ---------------------------------------------------------------------------------------------------------
// The tensor table. Parameters, gradients and both moments of the optimizer are arenas with the same offsets; checkpoints,
// weight decay, initialisation and the tests read this table and nothing else.

enum { TERNARY = 1, DECAY = 2, NORM = 4, EMBED = 8, BIAS = 16, JOINED = 32 };   // JOINED: lies directly behind the tensor before it

typedef struct {
  char name[96];      // the Hugging Face name
  int ndim;
  size_t shape[2];
  size_t offset, n;   // in floats
  int flags;
} Tensor;

// Offsets of one layer's tensors; NONE where the Config has no such tensor.
#define NONE ((size_t)-1)
typedef struct {
  size_t norm1, qkv, qkv_bias, q_norm, k_norm, sub1, o, o_bias, norm2, gate_up, sub2, down;
} LayerSlots;

typedef struct {
  Tensor *tensors;
  int count;
  LayerSlots *layers;
  size_t embed, final_norm, head;   // head == embed when tied
  size_t value, value_bias;         // of a reward model, otherwise NONE
  size_t floats;                    // size of an arena
  int frozen;                       // matrices and embeddings have no place in the arena: their offsets are NONE
} TensorTable;

// Appends a tensor of shape [rows, cols], or [rows] where cols is 0; returns its offset. Groups start on 64 bytes.
static size_t add_tensor_(TensorTable *t, int flags, size_t rows, size_t cols, const char *fmt, int layer) {
  Tensor *x = &t->tensors[t->count++];
  snprintf(x->name, sizeof x->name, fmt, layer);
  x->flags = flags;
  x->ndim = cols ? 2 : 1;
  x->shape[0] = rows;
  x->shape[1] = cols ? cols : 1;
  x->n = size_mul(rows, x->shape[1]);
  if (t->frozen && (flags & (TERNARY | EMBED))) return x->offset = NONE;
  x->offset = flags & JOINED ? t->floats : (t->floats + 15) / 16 * 16;
  t->floats = x->offset + x->n;
  return x->offset;
}

// Every tensor of the model, one line each, in the order of the network.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
static void build_table_(TensorTable *t, const Config *c, int frozen) {
  size_t C = (size_t)c->dim, V = (size_t)c->vocab, F = (size_t)c->ffn_dim, HS = (size_t)c->head_dim;
  size_t Q = (size_t)c->heads * HS, KV = (size_t)c->kv_heads * HS;
  const int matrix = TERNARY | DECAY;
  memset(t, 0, sizeof *t);
  t->frozen = frozen;
  t->tensors = (Tensor *)xcalloc((size_t)c->layers * 17 + 5, sizeof(Tensor));
  t->layers = (LayerSlots *)xcalloc((size_t)c->layers, sizeof(LayerSlots));
  t->embed = add_tensor_(t, EMBED | DECAY, V, C, "model.embed_tokens.weight", 0);
  for (int l = 0; l < c->layers; l++) {
    LayerSlots *s = &t->layers[l];
    memset(s, 0xFF, sizeof *s);   // all NONE
    s->norm1 = add_tensor_(t, NORM, C, 0, "model.layers.%d.input_layernorm.weight", l);
    s->qkv = add_tensor_(t, matrix, Q, C, "model.layers.%d.self_attn.q_proj.weight", l);
    add_tensor_(t, matrix | JOINED, KV, C, "model.layers.%d.self_attn.k_proj.weight", l);
    add_tensor_(t, matrix | JOINED, KV, C, "model.layers.%d.self_attn.v_proj.weight", l);
    if (c->qkv_bias) {
      s->qkv_bias = add_tensor_(t, BIAS, Q, 0, "model.layers.%d.self_attn.q_proj.bias", l);
      add_tensor_(t, BIAS | JOINED, KV, 0, "model.layers.%d.self_attn.k_proj.bias", l);
      add_tensor_(t, BIAS | JOINED, KV, 0, "model.layers.%d.self_attn.v_proj.bias", l);
    }
    if (c->qk_norm) {
      s->q_norm = add_tensor_(t, NORM, HS, 0, "model.layers.%d.self_attn.q_norm.weight", l);
      s->k_norm = add_tensor_(t, NORM, HS, 0, "model.layers.%d.self_attn.k_norm.weight", l);
    }
    if (c->attn_sub_norm) s->sub1 = add_tensor_(t, NORM, Q, 0, "model.layers.%d.self_attn.attn_sub_norm.weight", l);
    s->o = add_tensor_(t, matrix, C, Q, "model.layers.%d.self_attn.o_proj.weight", l);
    if (c->o_bias) s->o_bias = add_tensor_(t, BIAS, C, 0, "model.layers.%d.self_attn.o_proj.bias", l);
    s->norm2 = add_tensor_(t, NORM, C, 0, "model.layers.%d.post_attention_layernorm.weight", l);
    s->gate_up = add_tensor_(t, matrix, F, C, "model.layers.%d.mlp.gate_proj.weight", l);
    add_tensor_(t, matrix | JOINED, F, C, "model.layers.%d.mlp.up_proj.weight", l);
    if (c->ffn_sub_norm) s->sub2 = add_tensor_(t, NORM, F, 0, "model.layers.%d.mlp.ffn_sub_norm.weight", l);
    s->down = add_tensor_(t, matrix, C, F, "model.layers.%d.mlp.down_proj.weight", l);
  }
  t->final_norm = add_tensor_(t, NORM, C, 0, "model.norm.weight", 0);
  t->head = c->tie_embeddings ? t->embed : add_tensor_(t, EMBED | DECAY, V, C, "lm_head.weight", 0);
  t->value = c->value_head ? add_tensor_(t, DECAY, 1, C, "score.weight", 0) : NONE;
  t->value_bias = c->value_head ? add_tensor_(t, BIAS, 1, 0, "score.bias", 0) : NONE;
  t->floats = (t->floats + 15) / 16 * 16;
}
#pragma GCC diagnostic pop

UNUSED static void tensor_table(TensorTable *t, const Config *c) {
  build_table_(t, c, 0);
}

// Number of parameters (the arena also holds some padding).
UNUSED static size_t tensor_table_params(const TensorTable *t) {
  size_t n = 0;
  for (int i = 0; i < t->count; i++) n += t->tensors[i].n;
  return n;
}

UNUSED static void tensor_table_free(TensorTable *t) {
  free(t->tensors);
  free(t->layers);
  memset(t, 0, sizeof *t);
}

// ---------------------------------------------------------------------------------------------------------
// Memory. A layout function walks over its buffers once; with base NULL it only counts, with memory it hands out
// pointers. So the forecast and the allocation cannot disagree.

typedef struct {
  char *base;
  size_t used;
} Arena;

static void *take_(Arena *a, size_t bytes) {
  void *p = a->base ? a->base + a->used : NULL;
  a->used += (bytes + 63) / 64 * 64;
  return p;
}

// What one block keeps for its backward pass. R = B*T rows.
typedef struct {
  QAct h1;             // [R,C]     quantised input of q, k, v
  float *rstd1;        // [R]
  floatX *qkv_raw;     // [R,QKV]   before the q/k norm; only with qk_norm
  float *rstd_qk;      // [R,NH+NKV]
  floatX *qkv;         // [R,QKV]   after rope
  floatX *att;         // [R,NH*HS]
  float *lse;          // [R,NH]
  QAct h2;             // [R,NH*HS] quantised input of o
  float *rstd2;        // [R]
  floatX *mid;         // [R,C]     residual stream between attention and feed-forward
  QAct h3;             // [R,C]     quantised input of gate, up
  float *rstd3;        // [R]
  floatX *gate_up;     // [R,2F], or room for a row block at lambda = 1: computing it again from codes costs less than keeping it
  QAct h4;             // [R,F]     quantised input of down
  float *rstd4;        // [R]
} LayerActs;

// codes_only: lambda stays 1 in every forward pass, so a byte for each value is enough.
static void take_qact_(Arena *a, QAct *q, const Config *c, size_t R, size_t K, int codes_only) {
  q->bits = c->act_bits;
  q->data = take_(a, R * K * (codes_only && c->act_bits ? 1 : sizeof(floatX)));
  q->s = (float *)take_(a, R * sizeof(float));
}

static size_t row_block_(size_t R) {
  return R < (size_t)ops_row_block() ? R : (size_t)ops_row_block();
}

// before: the block before this one, with which it shares gate_up if codes_only; NULL for the first.
UNUSED static void layer_acts_layout(Arena *a, LayerActs *x, const Config *c, size_t R, int codes_only, const LayerActs *before) {
  size_t C = (size_t)c->dim, F = (size_t)c->ffn_dim, NH = (size_t)c->heads, QKV = (size_t)config_qkv(c), Q = NH * (size_t)c->head_dim;
  take_qact_(a, &x->h1, c, R, C, codes_only);
  x->rstd1 = (float *)take_(a, R * sizeof(float));
  x->qkv_raw = c->qk_norm ? (floatX *)take_(a, R * QKV * sizeof(floatX)) : NULL;
  x->rstd_qk = c->qk_norm ? (float *)take_(a, R * (size_t)(c->heads + c->kv_heads) * sizeof(float)) : NULL;
  x->qkv = (floatX *)take_(a, R * QKV * sizeof(floatX));
  x->att = (floatX *)take_(a, R * Q * sizeof(floatX));
  x->lse = (float *)take_(a, R * NH * sizeof(float));
  take_qact_(a, &x->h2, c, R, Q, codes_only);
  x->rstd2 = (float *)take_(a, R * sizeof(float));
  x->mid = (floatX *)take_(a, R * C * sizeof(floatX));
  take_qact_(a, &x->h3, c, R, C, codes_only);
  x->rstd3 = (float *)take_(a, R * sizeof(float));
  codes_only = codes_only && c->act_bits > 0;
  if (codes_only && before) x->gate_up = before->gate_up;
  else x->gate_up = (floatX *)take_(a, (codes_only ? row_block_(R) : R) * 2 * F * sizeof(floatX));
  take_qact_(a, &x->h4, c, R, F, codes_only);
  x->rstd4 = (float *)take_(a, R * sizeof(float));
}

// The weights of one block as the products want them.
typedef struct {
  BitWeight qkv, o, gate_up, down;
} LayerWeights;

// ---------------------------------------------------------------------------------------------------------
// The model.

typedef struct {
  Config c;
  TensorTable table;
  float lambda;              // of the last model_quantize; -1 before the first
  int precision;             // PRECISION_*
  int dx_int8;               // 1: gradients of BitLinear inputs are integer products while lambda = 1; set before model_quantize
  uint64_t noise;            // dx_int8: key of the next backward pass's random rounding
  int frozen;                // 1: only runs; see model_open_frozen
  Head embed, head;          // of a frozen model: embedding table and classifier, the same table when tied
  void *head_memory;
  FilePart embed_file, head_file;   // of a frozen model: where its tables are those of its file
  // arenas, in device memory
  float *params;             // float master weights; of a frozen model norms and biases only
  float *grads, *m, *v;      // training only
  Segment *segments;         // training only: which parts of the arena decay, in device memory
  int n_segments;
  void *weights_memory;      // quantised weights
  LayerWeights *weights;     // [L]
  float *cossin;             // [max_seq, HS]
  // training buffers for one micro-batch of B rows of T tokens; R = B*T
  int B, T, R, recompute;
  void *acts_memory;
  floatX **residual;         // [L+1] of [R,C]: the input of each block, and the output of the last
  LayerActs *acts;           // [L], or one that all blocks share when recompute is on
  float *rstd_final;         // [R]
  floatX *final;             // [R,C] input of the classifier
  floatX *dfinal;            // [R,C] its gradient, written by the losses
  floatX *dres;              // [R,C] gradient of the residual stream
  floatX *dh;                // gradient of a quantised input: [R, max(C,NH*HS)], or a row block of [R,F]
  floatX *datt;              // [R,NH*HS]
  floatX *dwide;             // dqkv [R,QKV], or a row block of dgate_up [R,2F] where gate_up is kept; else that takes gate_up's place
  int head_rows;             // rows of logits that exist at a time
  floatX *logits;            // [head_rows, V]
  float *head_lse;           // [head_rows]
  float *losses, *coef;      // [R]
  int *tokens, *targets, *start, *pos;   // [R] the batch on the device
  double *norm2;             // [1]
  float *host_losses;        // [R] on the host
} Model;

// Bytes by purpose, for the table that is printed before anything is allocated.
typedef struct {
  size_t parameters, gradients, optimizer, weights, activations, scratch, total;
} Memory;

static void weights_layout_(Arena *a, LayerWeights *w, const Config *c, int packed) {
  int Q = c->heads * c->head_dim, KV = c->kv_heads * c->head_dim;
  const int shapes[4][5] = {{config_qkv(c), c->dim, Q, KV, KV}, {c->dim, Q, c->dim, 0, 0},
                            {2 * c->ffn_dim, c->dim, c->ffn_dim, c->ffn_dim, 0}, {c->dim, c->ffn_dim, c->dim, 0, 0}};
  BitWeight *all[4] = {&w->qkv, &w->o, &w->gate_up, &w->down};
  for (int i = 0; i < 4; i++) {
    all[i]->N = shapes[i][0];
    all[i]->K = shapes[i][1];
    memcpy(all[i]->parts, shapes[i] + 2, sizeof all[i]->parts);
    all[i]->data = take_(a, packed ? bitweight_packed_bytes(all[i]->N, all[i]->K) : bitweight_bytes(all[i]->N, all[i]->K));
    all[i]->gamma = (float *)take_(a, (size_t)all[i]->N * sizeof(float));
  }
}

// What a table of a frozen model is: in bf16 or float, in memory of its own or left in its file; and whether it has a screen.
enum { TABLE_HALF = 1, TABLE_IN_FILE = 2, TABLE_UNSCREENED = 4 };

// Tables and screen of a frozen model; embed, head: TABLE_*.
static void heads_layout_(Arena *a, Model *m, int embed, int head) {
  const Config *c = &m->c;
  m->embed.V = m->head.V = c->vocab;
  m->embed.C = m->head.C = c->dim;
  m->embed.precision = m->head.precision = m->precision;
  m->head.half = (head & TABLE_HALF) != 0;
  m->head.table = head & TABLE_IN_FILE ? NULL : take_(a, head_table_bytes(c->vocab, c->dim, m->head.half));
  size_t screen = head & TABLE_UNSCREENED ? 0 : head_screen_bytes(c->vocab, c->dim);
  m->head.screen = screen ? take_(a, screen) : NULL;
  if (c->tie_embeddings) {
    m->embed = m->head;
    return;
  }
  m->embed.half = (embed & TABLE_HALF) != 0;
  m->embed.table = embed & TABLE_IN_FILE ? NULL : take_(a, head_table_bytes(c->vocab, c->dim, m->embed.half));
}

static size_t larger_(size_t a, size_t b) {
  return a > b ? a : b;
}

// The buffers of training that are not one layer's own.
static void training_layout_(Arena *a, Model *m, int codes_only) {
  const Config *c = &m->c;
  size_t R = (size_t)m->R, C = (size_t)c->dim, Q = (size_t)c->heads * (size_t)c->head_dim, F = (size_t)c->ffn_dim,
         QKV = (size_t)config_qkv(c);
  size_t block = row_block_(R), row = R * C * sizeof(floatX);
  size_t narrow = larger_(R * larger_(C, Q), block * F), wide = larger_(R * QKV, codes_only && c->act_bits > 0 ? 0 : block * 2 * F);
  for (int l = 0; l <= c->layers; l++) m->residual[l] = (floatX *)take_(a, row);
  for (int l = 0; l < (m->recompute ? 1 : c->layers); l++) {
    layer_acts_layout(a, &m->acts[l], c, R, codes_only, l > 0 ? &m->acts[l - 1] : NULL);
  }
  m->rstd_final = (float *)take_(a, R * sizeof(float));
  m->final = (floatX *)take_(a, row);
  m->dfinal = (floatX *)take_(a, row);
  m->dres = (floatX *)take_(a, row);
  m->dh = (floatX *)take_(a, narrow * sizeof(floatX));
  m->datt = (floatX *)take_(a, R * Q * sizeof(floatX));
  m->dwide = (floatX *)take_(a, wide * sizeof(floatX));
  m->logits = (floatX *)take_(a, (size_t)m->head_rows * (size_t)c->vocab * sizeof(floatX));
  m->head_lse = (float *)take_(a, (size_t)m->head_rows * sizeof(float));
  m->losses = (float *)take_(a, R * sizeof(float));
  m->coef = (float *)take_(a, R * sizeof(float));
  m->tokens = (int *)take_(a, R * sizeof(int));
  m->targets = (int *)take_(a, R * sizeof(int));
  m->start = (int *)take_(a, R * sizeof(int));
  m->pos = (int *)take_(a, R * sizeof(int));
  m->norm2 = (double *)take_(a, sizeof(double));
}

// The classifier's rows at a time: as many as the ops ask for, a multiple of 64. B x T x V of a large batch never exists at once.
static int head_rows_(const Config *c, int R) {
  size_t rows = ops_logits_bytes() / ((size_t)c->vocab * sizeof(floatX)) / 64 * 64;
  if (rows < 64) rows = 64;
  return rows < (size_t)R ? (int)rows : R;
}

// Scratch is shared by all models of the process and only grows; R rows at most, and this Config's widest product.
static size_t scratch_bytes_(const Config *c, size_t R) {
  int n = config_qkv(c), k = c->dim;
  if (2 * c->ffn_dim > n) n = 2 * c->ffn_dim;
  if (c->vocab > n) n = c->vocab;
  if (c->ffn_dim > k) k = c->ffn_dim;
  if (c->heads * c->head_dim > k) k = c->heads * c->head_dim;
  size_t products = ops_scratch_bytes(R, (size_t)n, (size_t)k);
  size_t attention = attention_scratch_bytes(R < (size_t)c->max_seq ? (int)R : c->max_seq, c->head_dim);
  return products > attention ? products : attention;
}

static void reserve_scratch_bytes_(size_t need) {
  static void *scratch;
  static size_t size;
  if (need <= size) return;
  dev_free(scratch);
  scratch = dev_malloc(need);
  if (scratch == NULL) die(EXIT_FAILED, "out of memory: %zu bytes of scratch", need);
  size = need;
  ops_set_scratch(scratch, size);
}

UNUSED static void model_reserve_scratch(const Config *c, size_t R) {
  reserve_scratch_bytes_(scratch_bytes_(c, R));
}

// The same for a frozen model, which also looks for the largest logit.
UNUSED static size_t frozen_scratch_bytes(const Config *c, size_t R) {
  size_t argmax = head_scratch_bytes(c->vocab, c->dim), products = scratch_bytes_(c, R);
  return argmax > products ? argmax : products;
}

static void set_batch_size_(Model *m, int B, int T, int recompute) {
  m->B = B;
  m->T = T;
  m->R = B * T;
  m->recompute = recompute;
  m->head_rows = head_rows_(&m->c, m->R);
}

// What training this Config with B x T micro-batches will take. Nothing is allocated on the device.
UNUSED static Memory model_memory(const Config *c, int B, int T, int recompute, int codes_only) {
  Model m;
  Memory out;
  Arena weights = {NULL, 0}, acts = {NULL, 0};
  memset(&m, 0, sizeof m);
  memset(&out, 0, sizeof out);
  m.c = *c;
  tensor_table(&m.table, c);
  set_batch_size_(&m, B, T, recompute);
  m.residual = (floatX **)xcalloc((size_t)c->layers + 1, sizeof(floatX *));
  m.acts = (LayerActs *)xcalloc((size_t)c->layers, sizeof(LayerActs));
  LayerWeights w;
  for (int l = 0; l < c->layers; l++) weights_layout_(&weights, &w, c, 0);
  training_layout_(&acts, &m, codes_only);
  out.parameters = m.table.floats * sizeof(float) + (size_t)c->max_seq * (size_t)c->head_dim * sizeof(float);
  out.gradients = m.table.floats * sizeof(float);
  out.optimizer = 2 * m.table.floats * sizeof(float);
  out.weights = weights.used;
  out.activations = acts.used;
  out.scratch = scratch_bytes_(c, (size_t)m.R);
  out.total = out.parameters + out.gradients + out.optimizer + out.weights + out.activations + out.scratch;
  free(m.residual);
  free(m.acts);
  tensor_table_free(&m.table);
  return out;
}

static void *device_memory_(size_t bytes, const char *what) {
  void *p = dev_malloc(bytes);
  if (p == NULL)
    die(EXIT_FAILED, "out of memory: %.1f MB for %s; a smaller batch_size or recompute=1 needs less", (double)bytes / 1e6, what);
  return p;
}

/*
The rotation angles, computed as transformers computes them: frequencies and angles in float32 (a double would differ in the third
digit at position 4096), sine and cosine of that float. llama3 scaling slows the low frequencies down by `factor`,
keeps the high ones, and blends in between. Pair i of a head turns by this much from one position to the next.
*/
UNUSED static float rope_frequency(const Config *c, int i) {
  float inv = 1.0f / powf((float)c->rope_theta, (float)(2 * i) / (float)c->head_dim);
  if (!c->rope_llama3) return inv;
  double wavelength = 6.283185307179586 / (double)inv, original = (double)c->rope_original_max;
  double low = original / c->rope_low_freq, high = original / c->rope_high_freq;
  double smooth = (original / wavelength - c->rope_low_freq) / (c->rope_high_freq - c->rope_low_freq);
  if (wavelength > low) return (float)((double)inv / c->rope_factor);
  if (wavelength < high) return inv;
  return (float)((1 - smooth) * (double)inv / c->rope_factor + smooth * (double)inv);
}

// cossin (=) [max_seq, head_dim]: for each position the cosines of all pairs, then their sines.
UNUSED static void rope_table(float *cossin, const Config *c) {
  int half = c->head_dim / 2;
  for (int i = 0; i < half; i++) {
    float inv = rope_frequency(c, i);
    for (int p = 0; p < c->max_seq; p++) {
      float angle = (float)p * inv;
      cossin[(size_t)p * (size_t)c->head_dim + (size_t)i] = (float)cos((double)angle);
      cossin[(size_t)p * (size_t)c->head_dim + (size_t)(half + i)] = (float)sin((double)angle);
    }
  }
}

// Table, parameter arena, room for quantised weights, rope; zero parameters. Dies on a bad Config.
static void open_model_parts_(Model *m, const Config *c, int precision, int frozen) {
  const char *why = config_check(c);
  if (why) die(EXIT_USAGE, "%s", why);
  memset(m, 0, sizeof *m);
  m->c = *c;
  m->lambda = -1;
  m->precision = precision;
  m->frozen = frozen;
  build_table_(&m->table, c, frozen);
  m->params = (float *)device_memory_(m->table.floats * sizeof(float), "parameters");
  size_t rope_bytes = (size_t)c->max_seq * (size_t)c->head_dim * sizeof(float);
  float *host = (float *)xmalloc(rope_bytes);
  rope_table(host, c);
  m->cossin = (float *)device_memory_(rope_bytes, "the rope table");
  dev_copy_in(m->cossin, host, rope_bytes);
  free(host);
  m->weights = (LayerWeights *)xcalloc((size_t)c->layers, sizeof(LayerWeights));
  Arena count = {NULL, 0}, weights = {NULL, 0};
  for (int l = 0; l < c->layers; l++) weights_layout_(&count, &m->weights[l], c, frozen);
  m->weights_memory = device_memory_(count.used, "quantised weights");
  weights.base = (char *)m->weights_memory;
  for (int l = 0; l < c->layers; l++) {
    LayerWeights *w = &m->weights[l];
    const LayerSlots *s = &m->table.layers[l];
    weights_layout_(&weights, w, c, frozen);
    w->qkv.precision = w->o.precision = w->gate_up.precision = w->down.precision = precision;
    w->qkv.bias = s->qkv_bias == NONE ? NULL : m->params + s->qkv_bias;
    w->o.bias = s->o_bias == NONE ? NULL : m->params + s->o_bias;
  }
}

// Builds a model with zero parameters, to be trained or to be run at any lambda.
UNUSED static void model_open(Model *m, const Config *c, int precision) {
  open_model_parts_(m, c, precision, 0);
}

/*
Builds a model that only runs, at lambda = 1, in about a sixteenth of the memory; act_bits must not be 0. Its matrices are still to be
packed (frozen_weight tells where), its tables filled with head_rows, its norms and biases copied to params. embed, head: TABLE_*; bf16
is for models whose values are bf16 numbers, a table in a file still has to be set, and a tied table is the head's. A frozen model
takes part in model_forward, but it has no gradients.
*/
UNUSED static void model_open_frozen(Model *m, const Config *c, int precision, int embed, int head) {
  if (c->act_bits == 0)
    die(EXIT_USAGE, "a model with act_bits=0 has float activations; only int8 and int4 ones run on packed weights");
  open_model_parts_(m, c, precision, 1);
  Arena count = {NULL, 0}, arena = {NULL, 0};
  heads_layout_(&count, m, embed, head);
  m->head_memory = device_memory_(count.used, "the embedding table");
  arena.base = (char *)m->head_memory;
  heads_layout_(&arena, m, embed, head);
  model_reserve_scratch(c, 1);
  m->lambda = 1;
}

// Where matrix i of the tensor table (flag TERNARY) of a frozen model is packed; *part: as which of its logical matrices.
UNUSED static BitWeight *frozen_weight(Model *m, int i, int *part) {
  int matrix = 0;   // how many matrices come before it
  for (int k = 0; k < i; k++) matrix += (m->table.tensors[k].flags & TERNARY) != 0;
  LayerWeights *w = &m->weights[matrix / 7];   // in each layer q k v, o, gate up, down
  static const int parts[7] = {0, 1, 2, 0, 0, 1, 0};
  BitWeight *of[7] = {&w->qkv, &w->qkv, &w->qkv, &w->o, &w->gate_up, &w->gate_up, &w->down};
  *part = parts[matrix % 7];
  return of[matrix % 7];
}

// Adds buffers for forward and backward passes over batches of B x T. codes_only: every forward pass will run at lambda = 1.
UNUSED static void model_alloc_batch(Model *m, int B, int T, int recompute, int codes_only) {
  if (T > m->c.max_seq) die(EXIT_USAGE, "seq_len=%d is longer than max_seq=%d", T, m->c.max_seq);
  set_batch_size_(m, B, T, recompute);
  m->residual = (floatX **)xcalloc((size_t)m->c.layers + 1, sizeof(floatX *));
  m->acts = (LayerActs *)xcalloc((size_t)m->c.layers, sizeof(LayerActs));
  m->host_losses = (float *)xcalloc((size_t)m->R, sizeof(float));
  Arena count = {NULL, 0}, acts = {NULL, 0};
  training_layout_(&count, m, codes_only);
  m->acts_memory = device_memory_(count.used, "activations");
  acts.base = (char *)m->acts_memory;
  training_layout_(&acts, m, codes_only);
  model_reserve_scratch(&m->c, (size_t)m->R);
}

// m->segments, from the table: neighbours that decay alike are one.
static void alloc_segments_(Model *m) {
  Segment *host = (Segment *)xcalloc((size_t)m->table.count, sizeof(Segment));
  m->n_segments = 0;
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    int decays = (t->flags & DECAY) != 0;
    if (m->n_segments > 0 && host[m->n_segments - 1].decays == decays) continue;
    host[m->n_segments].first = t->offset;
    host[m->n_segments++].decays = decays;
  }
  m->segments = (Segment *)device_memory_((size_t)m->n_segments * sizeof(Segment), "the optimizer");
  dev_copy_in(m->segments, host, (size_t)m->n_segments * sizeof(Segment));
  free(host);
}

// Dies where the ops would round to bf16 although fp32 was asked for.
UNUSED static void refuse_precision(int precision) {
  if (ops_honours_precision(precision)) return;
  die(EXIT_USAGE, "precision=fp32: this program keeps activations in bf16 (%s); leave precision=bf16, use train_bitnet on the CPU, or "
      "build one with make -B train_bitnetcu FP32=1", dev_name());
}

// Everything that training needs: the above, gradients, and the optimizer's moments.
UNUSED static void model_alloc_training(Model *m, int B, int T, int recompute, int codes_only) {
  size_t bytes = m->table.floats * sizeof(float);
  refuse_precision(m->precision);
  alloc_segments_(m);
  m->grads = (float *)device_memory_(bytes, "gradients");
  m->m = (float *)device_memory_(bytes, "the optimizer");
  m->v = (float *)device_memory_(bytes, "the optimizer");
  model_alloc_batch(m, B, T, recompute, codes_only);
}

UNUSED static void model_free(Model *m) {
  dev_free(m->params);
  dev_free(m->grads);
  dev_free(m->m);
  dev_free(m->v);
  dev_free(m->segments);
  dev_free(m->weights_memory);
  dev_free(m->head_memory);
  file_part_close(&m->embed_file);
  file_part_close(&m->head_file);
  dev_free(m->cossin);
  dev_free(m->acts_memory);
  free(m->weights);
  free(m->residual);
  free(m->acts);
  free(m->host_losses);
  tensor_table_free(&m->table);
  memset(m, 0, sizeof *m);
}

// Matrices and embeddings ~ N(0, init_std), gains 1, biases 0: a function of the seed and each element's place.
UNUSED static void model_init_random(Model *m, uint64_t seed) {
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *t = &m->table.tensors[i];
    float *host = (float *)xmalloc(t->n * sizeof(float));
    for (size_t k = 0; k < t->n; k++) {
      if (t->flags & NORM) host[k] = 1.0f;
      else if (t->flags & BIAS) host[k] = 0.0f;
      else host[k] = m->c.init_std * (float)rng_normal(seed, RNG_INIT, (uint64_t)i << 40 | k);
    }
    dev_copy_in(m->params + t->offset, host, t->n * sizeof(float));
    free(host);
  }
}

// Quantises all weights at this lambda: once per optimizer step, and before evaluation at lambda = 1. A frozen model is so already.
UNUSED static void model_quantize(Model *m, float lambda) {
  if (m->frozen && lambda != 1.0f) die(EXIT_FAILED, "bug: a frozen model at lambda %g", (double)lambda);
  if (m->frozen) return;
  for (int l = 0; l < m->c.layers; l++) {
    LayerWeights *w = &m->weights[l];
    const LayerSlots *s = &m->table.layers[l];
    w->qkv.dx_int8 = w->o.dx_int8 = w->gate_up.dx_int8 = w->down.dx_int8 = m->dx_int8;
    weight_quantize(&w->qkv, m->params + s->qkv, lambda);
    weight_quantize(&w->o, m->params + s->o, lambda);
    weight_quantize(&w->gate_up, m->params + s->gate_up, lambda);
    weight_quantize(&w->down, m->params + s->down, lambda);
  }
  m->lambda = lambda;
}

// ---------------------------------------------------------------------------------------------------------
// Forward and backward.

// Where the rows of a forward pass stand: in training B x T with document starts, in decoding anywhere against a cache.
typedef struct {
  int R;
  const int *pos;              // [R]
  int B, T;                    // training: R = B*T
  const int *start;            // [R]
  void *kcache, *vcache;       // decoding (NULL in training): this layer's caches
  const int *seq;              // [R]
  int capacity;
} Context;

// out = Q(rmsnorm(x)), or Q(x) where the model has no norm at this place.
static void maybe_norm_quant_(QAct *out, float *rstd, const floatX *x, const float *gain, int R, int K, float eps) {
  if (gain) rmsnorm_quant_forward(out, rstd, x, gain, R, K, eps);
  else act_quant_forward(out, x, R, K);
}

static float *slot_(float *base, size_t offset) {
  return offset == NONE ? NULL : base + offset;
}

// The rows from r0 on of activations with K values a row.
static QAct rows_of_(const QAct *q, int r0, int K) {
  QAct rows = *q;
  size_t bytes = q->lambda == 1.0f && q->bits > 0 ? 1 : sizeof(floatX);
  rows.data = (char *)q->data + (size_t)r0 * (size_t)K * bytes;
  rows.s = q->s + r0;
  return rows;
}

// 1 if gate_up holds a row block at a time and is computed again by the backward pass.
static int gate_up_is_block_(const Model *m) {
  return m->lambda == 1.0f && m->c.act_bits > 0;
}

static floatX *gate_up_rows_(const Model *m, const LayerActs *a, int r0) {
  return a->gate_up + (gate_up_is_block_(m) ? 0 : (size_t)r0 * 2 * (size_t)m->c.ffn_dim);
}

// One block: out [R,C] from x [R,C]; a keeps what the backward pass needs.
UNUSED static void layer_forward(const Model *m, int l, LayerActs *a, floatX *out, const floatX *x, const Context *ctx) {
  const Config *c = &m->c;
  const LayerSlots *s = &m->table.layers[l];
  const LayerWeights *w = &m->weights[l];
  float *p = m->params;
  int R = ctx->R, C = c->dim, F = c->ffn_dim, NH = c->heads, NKV = c->kv_heads, HS = c->head_dim;
  a->h1.lambda = a->h2.lambda = a->h3.lambda = a->h4.lambda = m->lambda;

  rmsnorm_quant_forward(&a->h1, a->rstd1, x, p + s->norm1, R, C, c->norm_eps);
  bitlinear_forward(c->qk_norm ? a->qkv_raw : a->qkv, &a->h1, &w->qkv, NULL, R);
  if (c->qk_norm) headnorm_forward(a->qkv, a->rstd_qk, a->qkv_raw, p + s->q_norm, p + s->k_norm, R, NH, NKV, HS, c->norm_eps);
  rope_apply(a->qkv, ctx->pos, m->cossin, R, NH, NKV, HS, 1);
  if (ctx->kcache)
    attention_cached(a->att, ctx->kcache, ctx->vcache, a->qkv, ctx->seq, ctx->pos, R, ctx->capacity, NH, NKV, HS, m->precision);
  else attention_forward(a->att, a->lse, a->qkv, ctx->start, ctx->B, ctx->T, NH, NKV, HS, m->precision);
  maybe_norm_quant_(&a->h2, a->rstd2, a->att, slot_(p, s->sub1), R, NH * HS, c->norm_eps);
  bitlinear_forward(a->mid, &a->h2, &w->o, x, R);

  for (int r0 = 0; r0 < R; r0 += ops_row_block()) {
    int n = R - r0 < ops_row_block() ? R - r0 : ops_row_block();
    QAct h3 = rows_of_(&a->h3, r0, C), h4 = rows_of_(&a->h4, r0, F);
    floatX *gate_up = gate_up_rows_(m, a, r0);
    rmsnorm_quant_forward(&h3, a->rstd3 + r0, a->mid + (size_t)r0 * C, p + s->norm2, n, C, c->norm_eps);
    gated_forward(&h4, a->rstd4 + r0, gate_up, &h3, &w->gate_up, slot_(p, s->sub2), n, c->activation, c->norm_eps);
    bitlinear_forward(out + (size_t)r0 * C, &h4, &w->down, a->mid + (size_t)r0 * C, n);
  }
}

// A weight with the random numbers of its own for the backward pass of rows r0 and on of block l.
static BitWeight noisy_(const BitWeight *w, const Model *m, int l, int which, int r0) {
  BitWeight noisy = *w;
  noisy.noise = m->dx_int8 ? rng_u64(m->noise, RNG_ROUND, (uint64_t)l << 34 | (uint64_t)which << 32 | (uint64_t)r0) : 0;
  return noisy;
}

/*
The same list from the end. m->dres holds the gradient of the block's output when it starts and of its input when it ends: the
residual stream passes the gradient through unchanged (out = mid + ..., mid = x + ...), and each branch adds its part.
*/
UNUSED static void layer_backward(Model *m, int l, const LayerActs *a, const floatX *x, const Context *ctx) {
  const Config *c = &m->c;
  const LayerSlots *s = &m->table.layers[l];
  const LayerWeights *w = &m->weights[l];
  float *p = m->params, *g = m->grads;
  int R = ctx->R, C = c->dim, F = c->ffn_dim, NH = c->heads, NKV = c->kv_heads, HS = c->head_dim;
  floatX *datt = m->datt;

  for (int r0 = 0; r0 < R; r0 += ops_row_block()) {
    int n = R - r0 < ops_row_block() ? R - r0 : ops_row_block();
    QAct h3 = rows_of_(&a->h3, r0, C), h4 = rows_of_(&a->h4, r0, F);
    floatX *gate_up = gate_up_rows_(m, a, r0), *dres = m->dres + (size_t)r0 * C;
    floatX *dgate_up = gate_up_is_block_(m) ? gate_up : m->dwide;
    BitWeight down = noisy_(&w->down, m, l, 3, r0), gate_up_weight = noisy_(&w->gate_up, m, l, 2, r0);
    bitlinear_backward(m->dh, g + s->down, NULL, dres, &h4, &down, n);
    if (gate_up_is_block_(m))
      gated_backward(dgate_up, slot_(g, s->sub2), m->dh, &h3, &w->gate_up, slot_(p, s->sub2), a->rstd4 + r0, n, c->activation);
    else glu_backward(dgate_up, slot_(g, s->sub2), m->dh, gate_up, slot_(p, s->sub2), a->rstd4 + r0, n, F, c->activation);
    bitlinear_backward(m->dh, g + s->gate_up, NULL, dgate_up, &h3, &gate_up_weight, n);
    rmsnorm_backward(dres, g + s->norm2, m->dh, a->mid + (size_t)r0 * C, p + s->norm2, a->rstd3 + r0, n, C, 1);
  }

  BitWeight o = noisy_(&w->o, m, l, 1, 0), qkv = noisy_(&w->qkv, m, l, 0, 0);
  if (c->attn_sub_norm) {
    bitlinear_backward(m->dh, g + s->o, slot_(g, s->o_bias), m->dres, &a->h2, &o, R);
    rmsnorm_backward(datt, g + s->sub1, m->dh, a->att, p + s->sub1, a->rstd2, R, NH * HS, 0);
  } else {
    bitlinear_backward(datt, g + s->o, slot_(g, s->o_bias), m->dres, &a->h2, &o, R);
  }
  attention_backward(m->dwide, datt, a->att, a->lse, a->qkv, ctx->start, ctx->B, ctx->T, NH, NKV, HS, m->precision);
  rope_apply(m->dwide, ctx->pos, m->cossin, R, NH, NKV, HS, -1);
  if (c->qk_norm)
    headnorm_backward(m->dwide, g + s->q_norm, g + s->k_norm, a->qkv_raw, p + s->q_norm, p + s->k_norm, a->rstd_qk, R, NH, NKV, HS);
  bitlinear_backward(m->dh, g + s->qkv, slot_(g, s->qkv_bias), m->dwide, &a->h1, &qkv, R);
  rmsnorm_backward(m->dres, g + s->norm1, m->dh, x, p + s->norm1, a->rstd1, R, C, 1);
}

static Context training_context_(const Model *m) {
  Context ctx;
  memset(&ctx, 0, sizeof ctx);
  ctx.R = m->R;
  ctx.pos = m->pos;
  ctx.B = m->B;
  ctx.T = m->T;
  ctx.start = m->start;
  return ctx;
}

// x (=) [R,C], the embeddings of R tokens.
UNUSED static void model_embed(const Model *m, floatX *x, const int *tokens, int R) {
  if (m->frozen) head_embedding(x, tokens, &m->embed, R);
  else embedding_forward(x, tokens, m->params + m->table.embed, R, m->c.dim);
}

// logits (=) [R,V] of R rows of the classifier's input.
UNUSED static void model_logits(const Model *m, floatX *logits, const floatX *x, int R) {
  if (m->frozen) head_forward(logits, x, &m->head, R);
  else linear_forward(logits, x, m->params + m->table.head, R, m->c.vocab, m->c.dim, m->precision);
}

// From m->tokens, m->start, m->pos (on the device) to m->final, the input of the classifier.
UNUSED static void model_forward(Model *m) {
  Context ctx = training_context_(m);
  int L = m->c.layers;
  model_embed(m, m->residual[0], m->tokens, m->R);
  for (int l = 0; l < L; l++) layer_forward(m, l, &m->acts[m->recompute ? 0 : l], m->residual[l + 1], m->residual[l], &ctx);
  rmsnorm_forward(m->final, m->rstd_final, m->residual[L], m->params + m->table.final_norm, m->R, m->c.dim, m->c.norm_eps);
}

/*
From m->dfinal, which a loss has written, to the gradients of all parameters (added to m->grads). With recompute the blocks share one
set of buffers: each block's forward pass is run again from its stored input just before its backward pass, which trades a
third more work for L times less memory. The output goes to dfinal, which is no longer needed then.
*/
UNUSED static void model_backward(Model *m) {
  Context ctx = training_context_(m);
  int L = m->c.layers;
  rmsnorm_backward(m->dres, m->grads + m->table.final_norm, m->dfinal, m->residual[L], m->params + m->table.final_norm, m->rstd_final,
                   m->R, m->c.dim, 0);
  for (int l = L - 1; l >= 0; l--) {
    LayerActs *a = &m->acts[m->recompute ? 0 : l];
    if (m->recompute) layer_forward(m, l, a, m->dfinal, m->residual[l], &ctx);
    layer_backward(m, l, a, m->residual[l], &ctx);
  }
  embedding_backward(m->grads + m->table.embed, m->dres, m->tokens, m->R, m->c.vocab, m->c.dim);
}

#endif
