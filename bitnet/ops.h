/*
ops.h: the contract between the model and the machine. THE ONLY SEAM of this project.

Every prototype below is implemented twice: by train_bitnet.c (CPU, OpenMP) and by train_bitnet.cu (CUDA).
Everything above it (bitnet/, modes/) is written once and sees only these functions.

The rules on both sides:
  Below the line  an op knows pointers, sizes and numbers. It does not allocate, print, or know Config, and it
                  decides nothing: no schedules, no defaults, no "if training".
  Above the line  nobody dereferences a device pointer and nobody mentions OpenMP or CUDA. Memory that ops work on
                  comes from dev_malloc and is filled and read with dev_copy_in / dev_copy_out.

How to read a prototype: outputs first, then inputs, then sizes. `(=)` an output is overwritten, `(+=)` it is added to:
parameter gradients accumulate over micro-batches, activation gradients are overwritten unless marked.
Shapes are row-major. Letters:
  B batch rows   T positions   R = B*T rows of tokens   C = dim   V vocabulary   L layers
  NH query heads   NKV key/value heads   HS head size   F FFN width   N, K = outputs, inputs of a matrix product
  QKV = (NH + 2 NKV) HS: the columns of q, k and v stored side by side.
Prefix d = gradient of the loss with respect to; q = integer codes; s = scale (value = code * scale).

The promise that makes sampling, training and export agree: THE BITS OF A ROW DEPEND ON THAT ROW ALONE (and on the
weights), never on how many rows stand beside it, on their position in the batch, or on the number of threads.
*/
#ifndef BITNET_OPS_H
#define BITNET_OPS_H

#include <stddef.h>
#include <stdint.h>

// The type of activations and their gradients. The CPU works in float; the CUDA file defines its own before it
// includes this one. Parameters, their gradients and the optimizer state are always float.
#ifndef BITNET_FLOATX
#define BITNET_FLOATX
typedef float floatX;
#endif

enum { PRECISION_BF16 = 0, PRECISION_FP32 = 1 };   // what the operands of float products are rounded to
enum { ACT_RELU2 = 0, ACT_SILU = 1 };              // the gate of the FFN: max(z,0)^2 or z * sigmoid(z)
enum { KV_BLOCK = 64, HEAD_MAX = 256 };            // caches grow in blocks of positions; the widest head

/*
Quantised activations, the input of a BitLinear: R rows of K values in the form that the current lambda asks for.
  lambda = 1, bits > 0: data = int8 codes [R,K] and s[r] with  value = code * s[r]
  otherwise:            data = floatX [R,K] = x + lambda (Q(x) - x)   (the value itself where bits = 0)
Allocate R*K*sizeof(floatX) bytes, or R*K where lambda stays 1.
*/
typedef struct {
  void *data;
  float *s;       // [R]
  float lambda;
  int bits;       // 8 or 4; 0 = activations are not quantised
} QAct;

/*
A BitLinear weight made ready for products by weight_quantize, once per optimizer step.
Up to three logical matrices may lie side by side (q,k,v or gate,up): N counts all their rows, and each keeps its own
scale; gamma therefore is stored per output row.
  lambda = 1: ternary codes, weight = code * gamma[n].  lambda < 1: floats w + lambda (Q(w) - w).
*/
typedef struct {
  int N, K;            // outputs, inputs
  int parts[3];        // rows of each logical matrix; the rest 0; they sum to N
  float lambda;        // of the last weight_quantize
  int precision;       // PRECISION_*: of products with float operands
  int packed;          // 1: for inference only, written by weight_pack
  int dx_int8;         // 1: at lambda = 1 the gradient of the input is an integer product, too; set before weight_quantize
  uint64_t noise;      // dx_int8: key of the random numbers with which a backward pass rounds
  void *data;          // bitweight_bytes(N, K), or bitweight_packed_bytes(N, K), in whatever layout the backend likes
  float *gamma;        // [N]
  const float *bias;   // [N], or NULL
} BitWeight;

/*
The embedding table and classifier of a model that only runs. The table is exact: float, or bf16 where that loses nothing. The screen
is a small lossy copy of it, with which head_argmax finds the largest logit without reading all of the table.
*/
typedef struct {
  int V, C;
  int half;            // 1: the table is bf16, 0: float
  int precision;       // PRECISION_*: what both operands of the classifier are rounded to
  void *table;         // [V,C], head_table_bytes(V, C, half) bytes; where dev_reads_host() is 1, also memory of the host
  void *screen;        // head_screen_bytes(V, C) bytes, zeroed; or NULL: head_argmax computes all logits
} Head;

// ---- device -----------------------------------------------------------------------------------------------

// threads: 0 = one per physical core. Returns the number in use. Call before everything else.
int dev_init(int threads);
// One line for people: "CPU, 2 threads, AVX-512 VNNI" (static storage).
const char *dev_name(void);
// Zeroed, 64-byte aligned memory that ops can use; NULL when there is not enough.
void *dev_malloc(size_t bytes);
void dev_free(void *p);
// Free memory of the device in bytes, 0 if unknown.
size_t dev_memory_free(void);
void dev_zero(void *dst, size_t bytes);
void dev_copy(void *dst, const void *src, size_t bytes);       // device -> device, no overlap
void dev_copy_in(void *dst, const void *src, size_t bytes);    // host -> device
void dev_copy_out(void *dst, const void *src, size_t bytes);   // device -> host; waits for all work before it
// Reads all of this memory once, as fast as it can be read, and returns when it is done: the yardstick of decoding.
void dev_read(const void *p, size_t bytes);
// 1 where ops can read memory of the host, such as a file that is mapped into memory, so that it need not be copied.
int dev_reads_host(void);
// Work of the host that needs no op (reading files): calls work(ctx, i) for 0 <= i < n on all cores, in any order.
void host_parallel(int n, void (*work)(void *ctx, int i), void *ctx);
// floatX on the device <-> float on the host, n elements. For tests, dumps and the sampler.
void dev_floatx_in(floatX *dst, const float *src, size_t n);
void dev_floatx_out(float *dst, const floatX *src, size_t n);
// What the device can do at best, measured by short loops: operations a second (a multiplication and an addition are two) in
// products of each number format, and bytes a second read from memory. Takes about a second.
typedef struct {
  double fp32, bf16, int8, read;
} Peaks;
void dev_peaks(Peaks *p);
// One such measurement, of some milliseconds, operations a second: machines change their speed, so what is compared with it is timed beside it.
enum { PEAK_FP32, PEAK_BF16, PEAK_INT8 };
double dev_peak(int format);
// Whether float products at this precision are what the name says: 0 for PRECISION_FP32 where activations are bf16.
int ops_honours_precision(int precision);
// Bytes of logits that should exist at a time: so many that reading the classifier anew for each chunk of rows does not show.
size_t ops_logits_bytes(void);
/*
A stretch of ops that is repeated with the same arguments, while only what the pointers point to changes (decoding), can be recorded
and then be started as one. *g starts as zeros.
    if (dev_graph_begin(g)) { ops; dev_graph_end(g); }
begin returns 0 when g was recorded before, and has started it. Allowed in between: ops, dev_copy, dev_zero. The CPU records nothing.
*/
typedef struct {
  void *recorded;
  int calls, version;
} Graph;
int dev_graph_begin(Graph *g);
void dev_graph_end(Graph *g);
void dev_graph_free(Graph *g);
// Scratch of the backend (packed operands, partial sums). Reserve once, before the first step; ops die on a shortage.
size_t ops_scratch_bytes(size_t max_rows, size_t max_n, size_t max_k);
size_t attention_scratch_bytes(int T, int HS);
// Rows that the feed-forward half of a block goes through at a time, so that its wide activations stay in a cache; a constant.
int ops_row_block(void);
void ops_set_scratch(void *scratch, size_t bytes);

// ---- embedding --------------------------------------------------------------------------------------------

// out (=) [R,C] = wte[tokens[r]];  wte [V,C]
void embedding_forward(floatX *out, const int *tokens, const float *wte, int R, int C);
// dwte (+=) [V,C]
void embedding_backward(float *dwte, const floatX *dout, const int *tokens, int R, int V, int C);

// ---- norms and quantisation of activations ----------------------------------------------------------------

// out (=) [R,C] = gain * x * rstd,  rstd (=) [R] = 1 / sqrt(mean x^2 + eps)
void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps);
// dx [R,C], (+=) where add is 1, else (=); dgain (+=) [C]
void rmsnorm_backward(floatX *dx, float *dgain, const floatX *dout, const floatX *x, const float *gain, const float *rstd, int R,
                      int C, int add);
// out (=) = Q(x) in the form that out->lambda and out->bits ask for
void act_quant_forward(QAct *out, const floatX *x, int R, int K);
// The two above in one pass over the row: out (=) = Q(rmsnorm(x)), rstd (=)
void rmsnorm_quant_forward(QAct *out, float *rstd, const floatX *x, const float *gain, int R, int C, float eps);
// Per-head norm of q and k (Qwen3): out (=) [R,QKV] with v copied, rstd (=) [R, NH+NKV]; gains [HS] each
void headnorm_forward(floatX *out, float *rstd, const floatX *qkv, const float *qgain, const float *kgain,
                      int R, int NH, int NKV, int HS, float eps);
// dqkv in place: gradient of the output in, of the input out. dqgain, dkgain (+=) [HS]
void headnorm_backward(floatX *dqkv, float *dqgain, float *dkgain, const floatX *qkv, const float *qgain, const float *kgain,
                       const float *rstd, int R, int NH, int NKV, int HS);

// ---- matrix products --------------------------------------------------------------------------------------

// Bytes of BitWeight.data.
size_t bitweight_bytes(int N, int K);
// w.data, w.gamma, w.lambda (=) from the master weights [N,K]
void weight_quantize(BitWeight *w, const float *master, float lambda);
// The form for inference: about 2 bits a weight, lambda = 1 for good. Products give the bits of weight_quantize at lambda = 1.
size_t bitweight_packed_bytes(int N, int K);
// Logical matrix `part` of w (zeroed memory) from its master weights [parts[part],K], or its rows first .. first+rows-1 from codes
// [rows,K] and the scale of the matrix. Any order, each once.
void weight_pack(BitWeight *w, int part, const float *master);
void weight_pack_codes(BitWeight *w, int part, const int8_t *codes, int first, int rows, float gamma);
// codes (=) [N,K] int8 in {-1,0,1}, device memory, of a BitWeight at lambda = 1: for export, statistics and tests
void bitweight_codes(int8_t *codes, const BitWeight *w);
// How training moves the codes: codes [rows,K] (int8, device memory) hold those of an earlier moment and become (=) those of
// one logical matrix now. counts (=) [2], device memory: zeros now, codes that changed.
void weight_changes(int64_t *counts, int8_t *codes, const float *master, int rows, int K);
// out (=) [R,N] = x w' + bias + residual;  residual [R,N] or NULL; it must not be out
void bitlinear_forward(floatX *out, const QAct *x, const BitWeight *w, const floatX *residual, int R);
// Straight-through: dx (=) [R,K] = dout w_eff, dw (+=) [N,K] = dout' x_eff, dbias (+=) [N] or NULL
void bitlinear_backward(floatX *dx, float *dw, float *dbias, const floatX *dout, const QAct *x, const BitWeight *w, int R);
// A plain float matrix w [N,K] without bias (the classifier): out (=) [R,N]
void linear_forward(floatX *out, const floatX *x, const float *w, int R, int N, int K, int precision);
// dx (=) [R,K], dw (+=) [N,K]
void linear_backward(floatX *dx, float *dw, const floatX *dout, const floatX *x, const float *w, int R, int N, int K, int precision);

// ---- embedding and classifier of a model that only runs ---------------------------------------------------

size_t head_table_bytes(int V, int C, int half);
size_t head_screen_bytes(int V, int C);
// Scratch that head_argmax needs.
size_t head_scratch_bytes(int V, int C);
// Rows first .. first+n-1 of the table and its screen (=) from floats [n,C]. Where half is 1 they must be bf16 numbers.
void head_rows(Head *h, const float *rows, int first, int n);
// Their screen (=) alone, if there is one, from a table that is complete.
void head_screen(Head *h, int first, int n);
// out (=) [R,C]
void head_embedding(floatX *out, const int *tokens, const Head *h, int R);
// logits (=) [R,V]: what linear_forward computes from the same table at this precision
void head_forward(floatX *logits, const floatX *x, const Head *h, int R);
// best (=) [R]: the token below V <= h->V with the largest of those logits, the first of equals
void head_argmax(int *best, const floatX *x, const Head *h, int R, int V);

// ---- attention --------------------------------------------------------------------------------------------

// Rotates q and k of qkv [R,QKV] in place by the angle of position pos[r]. cossin [positions, HS]: HS/2 cosines, then HS/2
// sines. direction +1 = forward, -1 = backward (the inverse rotation is the transpose).
void rope_apply(floatX *qkv, const int *pos, const float *cossin, int R, int NH, int NKV, int HS, int direction);
// Causal attention inside documents: position t sees start[b,t] .. t. out (=) [B,T,NH*HS]; lse (=) [B,T,NH] is the log of
// each softmax's denominator, which the backward pass needs. precision: what the operands of the products are rounded to.
void attention_forward(floatX *out, float *lse, const floatX *qkv, const int *start, int B, int T, int NH, int NKV, int HS,
                       int precision);
// dqkv (=) [B,T,QKV]
void attention_backward(floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv, const int *start,
                        int B, int T, int NH, int NKV, int HS, int precision);
// Attention against a cache. Row r belongs to sequence seq[r] at position pos[r]; its k and v are stored first, for all rows,
// then it sees positions 0 .. pos[r] of its sequence. out (=) [R,NH*HS]: the bits of attention_forward. kcache, vcache: kv_cache_bytes
// for each sequence, in whatever layout the backend likes, zeroed before the first use; capacity is a multiple of KV_BLOCK.
size_t kv_cache_bytes(int capacity, int NKV, int HS, int precision);
void attention_cached(floatX *out, void *kcache, void *vcache, const floatX *qkv, const int *seq, const int *pos,
                      int R, int capacity, int NH, int NKV, int HS, int precision);

// ---- feed-forward -----------------------------------------------------------------------------------------

// gate_up [R,2F]: gate in columns 0..F-1, up in F..2F-1.  u = act(gate) * up;  out (=) = Q(rmsnorm(u)), or Q(u) where gain is
// NULL; rstd (=) [R] where gain is given.
void glu_quant_forward(QAct *out, float *rstd, const floatX *gate_up, const float *gain, int R, int F, int act, float eps);
// The product before it and the gated unit in one: gate_up [R,2F] (=) x w', out and rstd as above. At lambda = 1 with int8 activations
// gate_up is work space: what it holds afterwards is not said. w has 2F outputs.
void gated_forward(QAct *out, float *rstd, floatX *gate_up, const QAct *x, const BitWeight *w, const float *gain, int R, int act,
                   float eps);
// dgate_up (=) [R,2F], which may be gate_up; dgain (+=) [F] where gain is given
void glu_backward(floatX *dgate_up, float *dgain, const floatX *dout, const floatX *gate_up, const float *gain, const float *rstd,
                  int R, int F, int act);
// The same from x and w, which gate_up is computed from again.
void gated_backward(floatX *dgate_up, float *dgain, const floatX *dout, const QAct *x, const BitWeight *w, const float *gain,
                    const float *rstd, int R, int act);

// ---- loss -------------------------------------------------------------------------------------------------

// losses (=) [R] = logsumexp(logits[r]) - logits[r, target], 0 where target < 0 (ignored); lse (=) [R]
void cross_entropy_forward(float *losses, float *lse, const floatX *logits, const int *targets, int R, int V);
// logits in place -> dlogits (=) [R,V] = coef[r] * (softmax(logits[r]) - onehot(target)), 0 where target < 0
void cross_entropy_backward(floatX *logits, const float *lse, const int *targets, const float *coef, int R, int V);
// The same for a policy p = softmax(logits) that is also held near a reference q = softmax(ref): kl (=) [R] = KL(p || q) of each row,
// and logits in place -> dlogits (=) coef[r] (p - onehot(target)) + kl_coef[r] dKL/dlogits; all 0 where target < 0. lse as above
void policy_backward(float *kl, floatX *logits, const float *lse, const floatX *ref, const float *ref_lse, const int *targets,
                     const float *coef, const float *kl_coef, int R, int V);

// ---- optimizer --------------------------------------------------------------------------------------------

// *out (=) = sum of x[i]^2 in double, folded in an order that depends on n only. out is device memory.
void sum_squares(double *out, const float *x, size_t n);
// Values from `first` on, up to the next segment, are subject to weight decay or not. The first segment starts at 0, the others at
// multiples of 8.
typedef struct {
  size_t first;
  int decays;
} Segment;
// AdamW on n values, step t counted from 1: g' = gscale * g; m, v moments; p -= lr (mhat / (sqrt(vhat) + eps) + wd p), with wd = 0
// where the segment says so. segments [count] in device memory, in order; count = 0: decay everywhere.
void adamw_update(float *p, float *m, float *v, const float *g, size_t n, const Segment *segments, int count, float gscale, float lr,
                  float beta1, float beta2, float eps, float wd, int t);

#endif
