/*
losses.h: what turns the last hidden state into a loss and into the gradient that model_backward starts from.

What it is:  heads. A head reads m->final [R,C], runs the classifier in chunks of rows, and writes m->dfinal and the
             classifier's gradient. Everything that is trained on tokens (next-token loss, masked fine-tuning, weighted data, policy
             gradients) is one head with different coefficients: dlogits = coef * (softmax - onehot).
What not:    no layers; no backward pass of its own.
Read before: bitnet/ops.h, bitnet/model.h.
Defines:     batch_to_device, head_cross_entropy, batch_loss.
*/
#ifndef BITNET_LOSSES_H
#define BITNET_LOSSES_H

#include "../dataloader.h"
#include "model.h"

/*
Copies a batch of m->B x m->T tokens to the device. Every position with a target gets the coefficient `coef`: 1 / (number of
targets in the whole optimizer step) makes the loss a mean over valid targets, however the step is cut into micro-batches.
host_coef: [R] floats of the caller's.
*/
UNUSED static void batch_to_device(Model *m, const Batch *b, float coef, float *host_coef) {
  size_t bytes = (size_t)m->R * sizeof(int);
  if (b->B != m->B || b->T != m->T) die(EXIT_FAILED, "bug: a batch of %d x %d for a model of %d x %d", b->B, b->T, m->B, m->T);
  for (int r = 0; r < m->R; r++) host_coef[r] = b->targets[r] < 0 ? 0.0f : coef;
  dev_copy_in(m->tokens, b->tokens, bytes);
  dev_copy_in(m->targets, b->targets, bytes);
  dev_copy_in(m->start, b->start, bytes);
  dev_copy_in(m->pos, b->pos, bytes);
  dev_copy_in(m->coef, host_coef, (size_t)m->R * sizeof(float));
}

/*
Next-token cross-entropy over m->final and m->targets. Returns the sum of the losses of all valid targets, folded in order; m->losses
holds them one by one. With backward, m->dfinal (=) and the classifier's gradient (+=) are written, weighted by m->coef.

The logits of head_rows rows exist at a time: they are computed, turned into losses, turned in place into their own gradient,
multiplied back into dfinal and the classifier, and overwritten by the next chunk. B x T x V never exists.
*/
UNUSED static double head_cross_entropy(Model *m, int backward) {
  int C = m->c.dim, V = m->c.vocab;
  for (int r0 = 0; r0 < m->R; r0 += m->head_rows) {
    int n = m->R - r0 < m->head_rows ? m->R - r0 : m->head_rows;
    const floatX *x = m->final + (size_t)r0 * (size_t)C;
    model_logits(m, m->logits, x, n);
    cross_entropy_forward(m->losses + r0, m->head_lse, m->logits, m->targets + r0, n, V);
    if (!backward) continue;
    cross_entropy_backward(m->logits, m->head_lse, m->targets + r0, m->coef + r0, n, V);
    linear_backward(m->dfinal + (size_t)r0 * (size_t)C, m->grads + m->table.head, m->logits, x, m->params + m->table.head, n, V, C,
                    m->precision);
  }
  double sum = 0;
  dev_copy_out(m->host_losses, m->losses, (size_t)m->R * sizeof(float));
  for (int r = 0; r < m->R; r++) sum += (double)m->host_losses[r];
  return sum;
}

// Forward (and backward) of one micro-batch: the sum of its losses.
UNUSED static double batch_loss(Model *m, const Batch *b, float coef, float *host_coef, int backward) {
  batch_to_device(m, b, coef, host_coef);
  model_forward(m);
  double sum = head_cross_entropy(m, backward);
  if (backward) model_backward(m);
  return sum;
}

#endif
