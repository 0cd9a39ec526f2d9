/*
optim.h: what happens to the parameters once the gradients are there.

What it is:  the learning-rate and weight-decay schedules, the global gradient norm, and AdamW over the tensor table.
What not:    the arithmetic of the update (adamw_update in the ops); the loop (trainer.h).
Read before: bitnet/model.h. The schedule of lambda is in quant.h.
Defines:     Schedule, lr_at, wd_at; grad_norm, clip_scale, adamw_step.
*/
#ifndef BITNET_OPTIM_H
#define BITNET_OPTIM_H

#include "model.h"
#include "options.h"   // the names of the schedules

typedef struct {
  int kind;              // LR_*
  int64_t steps, warmup; // T and W
  double peak, min;      // learning rate after the warm-up, and at the end
  double stage2;         // faq: the peak of the second half; two_stage: the rate at T/2
  double decay_ratio;    // wsd: the last part of the run that decays
  double wd, wd_off_at;  // weight decay, and the fraction of the run after which it is 0
} Schedule;

/*
The learning rate of update t = 0 .. T-1. All schedules start with W steps of linear warm-up, peak (t+1)/W; then, with p = (t-W)/(T-W):

    cosine     min + (peak - min) (1 + cos(pi p)) / 2
    linear     peak + (min - peak) p
    constant   peak
    wsd        peak, and over the last decay_ratio T steps linearly to min
    two_stage  linearly from peak to stage2 at T/2, then linearly from there to min
    faq        P (1 - p), P = peak in the first half and stage2 in the second: the authors' recipe, with a jump at T/2

Ternary models like a higher rate than float models, and the drop in the second half (together with weight decay 0) lets the
codes settle: a weight that no longer crosses a rounding threshold has stopped flipping.
*/
UNUSED static double lr_at(const Schedule *s, int64_t t) {
  int64_t T = s->steps, W = s->warmup;
  if (t < W) return s->peak * (double)(t + 1) / (double)W;
  double span = (double)(T - W > 1 ? T - W : 1), p = (double)(t - W) / span;
  if (p > 1) p = 1;
  switch (s->kind) {
    case LR_COSINE: return s->min + 0.5 * (s->peak - s->min) * (1 + cos(3.14159265358979323846 * p));
    case LR_LINEAR: return s->peak + (s->min - s->peak) * p;
    case LR_WSD: {
      double D = s->decay_ratio * (double)T, begin = (double)T - D;
      if ((double)t < begin || D <= 0) return s->peak;
      double q = ((double)t - begin) / D;
      return s->peak + (s->min - s->peak) * (q < 1 ? q : 1);
    }
    case LR_TWO_STAGE: {
      double half = 0.5 * (double)T, a = half - (double)W;
      if ((double)t < half) return s->peak + (s->stage2 - s->peak) * ((double)(t - W) / (a > 1 ? a : 1));
      return s->stage2 + (s->min - s->stage2) * (((double)t - half) / (half > 1 ? half : 1));
    }
    case LR_FAQ: return ((double)t < 0.5 * (double)T ? s->peak : s->stage2) * (1 - p);
    default: return s->peak;
  }
}

// Weight decay acts on the float master weights: it pulls them towards the rounding threshold and so makes codes flip.
UNUSED static double wd_at(const Schedule *s, int64_t t) {
  return (double)t < s->wd_off_at * (double)s->steps ? s->wd : 0.0;
}

// The L2 norm over all gradients (the padding of the arena is zero).
UNUSED static double grad_norm(Model *m) {
  double sum;
  sum_squares(m->norm2, m->grads, m->table.floats);
  dev_copy_out(&sum, m->norm2, sizeof sum);
  return sqrt(sum);
}

// What gradients of this norm are multiplied by, so that their norm is at most clip; clip 0: never clipped. PyTorch's form.
UNUSED static double clip_scale(double norm, double clip) {
  double scale = clip > 0 ? clip / (norm + 1e-6) : 1.0;
  return scale < 1 ? scale : 1.0;
}

// One AdamW update, number t counted from 1, with gradients scaled by gscale (the clipping factor). Weight decay goes to
// the tensors that the table marks DECAY: matrices and embeddings, never norms or biases. The padding of the arena stays zero.
UNUSED static void adamw_step(Model *m, float gscale, double lr, double wd, double beta1, double beta2, double eps, int64_t t) {
  adamw_update(m->params, m->m, m->v, m->grads, m->table.floats, m->segments, m->n_segments, gscale, (float)lr, (float)beta1,
               (float)beta2, (float)eps, (float)wd, (int)t);
}

#endif
