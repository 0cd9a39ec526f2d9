/*
value.h: one number for a text: the head of a reward model.

What it is:  the value of a sequence is  w . h + b , where h is the final norm's output at its last token, the first that has seen
             all of it. w and b are the tensors score.weight and score.bias of a model with value_head=1; everything below h is the
             usual network. Both directions, and two losses of values: of pairs (Bradley and Terry) and of single labelled texts.
What not:    no texts (modes/scorer.h), no layers.
Read before: bitnet/losses.h.
Defines:     ValueHead, value_open, value_free, value_row, value_forward, value_backward; loss_pair, loss_label.

A value is one sum of C products for a whole sequence, so it is computed on the host, in double: its bits depend on the sequence alone.
*/
#ifndef BITNET_VALUE_H
#define BITNET_VALUE_H

#include "losses.h"

typedef struct {
  int cap;          // sequences of a batch
  int *end;         // [cap] the row of the batch, 0 .. R-1, that holds the last token of each sequence
  float *h;         // [cap,C] the final norm's output there
  float *w;         // [C] and b behind it
  float *row;       // [C]
} ValueHead;

UNUSED static void value_open(ValueHead *v, const Model *m, int cap) {
  size_t C = (size_t)m->c.dim, n = (size_t)cap;
  if (!m->c.value_head) die(EXIT_FAILED, "bug: a model without a value head");
  memset(v, 0, sizeof *v);
  v->cap = cap;
  v->end = (int *)xcalloc(n, sizeof(int));
  v->h = (float *)xcalloc(size_mul(n, C), sizeof(float));
  v->w = (float *)xcalloc(2 * C + 1, sizeof(float));
  v->row = v->w + C + 1;
}

UNUSED static void value_free(ValueHead *v) {
  free(v->end);
  free(v->h);
  free(v->w);
  memset(v, 0, sizeof *v);
}

// Lays a sequence of 1 <= n <= b->T tokens out as row r of b, which has no targets, and notes where it ends. n = 0: a row of padding.
UNUSED static void value_row(ValueHead *v, Batch *b, int r, const int *ids, int n, int pad) {
  size_t o = (size_t)r * (size_t)b->T;
  for (int t = 0; t < n; t++) {
    b->tokens[o + (size_t)t] = ids[t];
    b->targets[o + (size_t)t] = IGNORE;
    b->start[o + (size_t)t] = 0;
    b->pos[o + (size_t)t] = t;
  }
  pad_row_(pad, n, b->T, b->tokens + o, b->targets + o, b->start + o, b->pos + o);
  v->end[r] = r * b->T + (n > 0 ? n - 1 : 0);
}

// values (=) [n] of the sequences 0 .. n-1, after model_forward.
UNUSED static void value_forward(ValueHead *v, const Model *m, int n, double *values) {
  size_t C = (size_t)m->c.dim;
  dev_copy_out(v->w, m->params + m->table.value, C * sizeof(float));
  dev_copy_out(v->w + C, m->params + m->table.value_bias, sizeof(float));
  for (int i = 0; i < n; i++) {
    float *h = v->h + (size_t)i * C;
    double sum = (double)v->w[C];
    dev_floatx_out(h, m->final + (size_t)v->end[i] * C, C);
    for (size_t k = 0; k < C; k++) sum += (double)v->w[k] * (double)h[k];
    values[i] = sum;
  }
}

/*
From the slopes of the loss in the values [n] to m->dfinal (=) and the gradients of w and b (+=), after value_forward. Only the last
token of a sequence has a gradient of its own:

    dh = slope w      dw += slope h      db += slope
*/
UNUSED static void value_backward(ValueHead *v, Model *m, int n, const double *slopes) {
  size_t C = (size_t)m->c.dim;
  float *dw = m->grads + m->table.value, *db = m->grads + m->table.value_bias, bias;
  double sum = 0;
  dev_zero(m->dfinal, (size_t)m->R * C * sizeof(floatX));
  for (int i = 0; i < n; i++) {
    if (slopes[i] == 0) continue;
    for (size_t k = 0; k < C; k++) v->row[k] = (float)(slopes[i] * (double)v->w[k]);
    dev_floatx_in(m->dfinal + (size_t)v->end[i] * C, v->row, C);
    sum += slopes[i];
  }
  dev_copy_out(v->row, dw, C * sizeof(float));
  for (size_t k = 0; k < C; k++) {
    double d = (double)v->row[k];
    for (int i = 0; i < n; i++) d += slopes[i] * (double)v->h[(size_t)i * C + k];
    v->row[k] = (float)d;
  }
  dev_copy_in(dw, v->row, C * sizeof(float));
  dev_copy_out(&bias, db, sizeof bias);
  bias = (float)((double)bias + sum);
  dev_copy_in(db, &bias, sizeof bias);
}

// ---------------------------------------------------------------------------------------------------------
// Losses. sigmoid(x) = 1 / (1 + e^-x); softplus(x) = log(1 + e^x) = - log sigmoid(-x), both without overflow.

UNUSED static double sigmoid(double x) {
  double e = exp(-fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}

UNUSED static double softplus(double x) {
  return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
}

/*
Of two answers to one question the first is better: with the model of Bradley and Terry, that has the probability sigmoid(good -
bad), and the loss is its negative logarithm. *slope (=) its derivative in `good`; in `bad` it is the opposite.
*/
UNUSED static double loss_pair(double good, double bad, double *slope) {
  *slope = -sigmoid(bad - good);
  return softplus(bad - good);
}

// An answer alone, right (label 1) or wrong (0): cross-entropy of sigmoid(value). *slope (=) the derivative.
UNUSED static double loss_label(double value, int label, double *slope) {
  *slope = sigmoid(value) - label;
  return softplus(value) - (label ? value : 0);
}

#endif
