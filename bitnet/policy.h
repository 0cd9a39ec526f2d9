/*
policy.h: the loss of reinforcement learning: from sampled answers and their rewards to gradient seeds.

What it is:  advantages of a group of answers, the clipped objective with its penalty for leaving the reference model, and the head
             that runs them over blocks of logits. A sampled token's gradient is advantage * (onehot - softmax), which is the gradient
             of cross-entropy with another coefficient; only the exact penalty (KL_FULL) needs an op of its own.
What not:    no sampling and no rewards (modes/grpo.h), no layers.
Read before: bitnet/losses.h.
Defines:     PolicyLoss, policy_needs_logits, advantages, policy_token, policy_weight, PolicyRows, PolicyStats, policy_logp,
             head_policy.

GRPO ("group relative policy optimization") asks a model the same question G times and compares the answers with each other:

    A_i = (r_i - mean of the group) / (std of the group)           r_i: the reward of answer i
    rho = exp(logp - old_logp)                                     logp: of one token, now; old: when it was sampled
    loss of a token = - min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta KL(policy || reference)

No second network estimates how good a state is: the group's mean is the yardstick. The minimum stops the gradient where a token has
already become so much more (or less) likely than when it was sampled that the sample says nothing about it any more.
*/
#ifndef BITNET_POLICY_H
#define BITNET_POLICY_H

#include "losses.h"

// The choices of the options advantage, loss_type and kl, in the order of their names. KL_FORWARD is another name of KL_FULL.
enum { ADVANTAGE_GROUP, ADVANTAGE_BATCH, ADVANTAGE_NONE, ADVANTAGE_SEED003, ADVANTAGE_MEAN };
enum { REDUCE_SEQ, REDUCE_TOKEN, REDUCE_DR };
enum { KL_FULL, KL_K3, KL_K2, KL_K1, KL_SEED, KL_FORWARD };

typedef struct {
  double clip_low, clip_high;   // rho may go from 1 - clip_low to 1 + clip_high
  double beta;                  // weight of the penalty; 0: there is no reference model
  int kl;                       // KL_*
} PolicyLoss;

// 1 if the penalty is computed from all logits of both models, not from the probabilities of the sampled tokens.
UNUSED static int policy_needs_logits(const PolicyLoss *s) {
  return s->beta > 0 && (s->kl == KL_FULL || s->kl == KL_FORWARD);
}

// ---------------------------------------------------------------------------------------------------------
// Advantages.

static double mean_of_(const double *x, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += x[i];
  return sum / (double)n;
}

// The standard deviation with n - 1 in the denominator; 0 for a single value.
static double deviation_of_(const double *x, size_t n) {
  double mean = mean_of_(x, n), sum = 0;
  for (size_t i = 0; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
  return n > 1 ? sqrt(sum / (double)(n - 1)) : 0;
}

/*
A (=) [groups,G] from rewards r [groups,G]. Returns how many groups have equal rewards: nothing can be learned from those, and their
advantages are exactly 0 (not the rounding error of a mean divided by a tiny deviation). G = 1 is refused by the caller, because a
group of one never has a signal.

    group     (r - mean) / (deviation of the group + 1e-4)        batch   the same with the deviation of all rewards
    none      r - mean                                            seed003 d = r - mean; (d - mean of all d) / (deviation of d + 1e-8)
    mean      (r - mean) / (mean + 1e-4), for rewards of 0 and 1

Dividing by the group's deviation gives a question that is nearly always (or never) answered right more weight. Dividing by the mean
gives the hard ones the most: with p the probability of a right answer, the gradient of a question is on average that of p with none,
of asin(sqrt p) with group, and of log p with mean, which is what learning from given answers would follow.
*/
UNUSED static int advantages(double *A, const double *r, size_t groups, size_t G, int kind) {
  size_t n = groups * G;
  int equal = 0;
  double all = deviation_of_(r, n);
  for (size_t g = 0; g < groups; g++) {
    const double *x = r + g * G;
    double mean = mean_of_(x, G), deviation = deviation_of_(x, G);
    int same = 1;
    for (size_t i = 1; i < G; i++) same = same && x[i] == x[0];
    equal += same;
    for (size_t i = 0; i < G; i++) {
      double d = same ? 0 : x[i] - mean;
      A[g * G + i] = kind == ADVANTAGE_GROUP   ? d / (deviation + 1e-4)
                     : kind == ADVANTAGE_BATCH ? d / (all + 1e-4)
                     : kind == ADVANTAGE_MEAN  ? d / (fabs(mean) + 1e-4)
                                               : d;
    }
  }
  if (kind == ADVANTAGE_SEED003) {
    double mean = mean_of_(A, n), deviation = deviation_of_(A, n);
    for (size_t i = 0; i < n; i++) A[i] = (A[i] - mean) / (deviation + 1e-8);
  }
  return equal;
}

// ---------------------------------------------------------------------------------------------------------
// One token.

typedef struct {
  double loss;      // -min(...) + beta k; without the penalty where it is KL_FULL, which needs all logits
  double dlogp;     // d loss / d logp
  double ratio;     // rho
  double kl;        // the estimate k; 0 with KL_FULL and with beta = 0
  int clipped;      // 1: the clipped branch is the smaller one, the token has no gradient
} PolicyToken;

/*
The loss of one sampled token and its slope. A tie of both branches counts as unclipped: inside the range both are the same function.

The estimates of the penalty look at one number, the token's log-probability under the reference, r = ref_logp - logp:

    k3    e^r - r - 1       never negative, right on average; slope 1 - e^r
    k2    r^2 / 2           slope logp - ref_logp
    k1    -r                right on average, but its slope, 1, is 0 on average: for looking at only
    seed  p (logp - ref)    p = e^logp: a term of the exact sum; weighted by p although sampling has done so already
*/
UNUSED static PolicyToken policy_token(const PolicyLoss *s, double logp, double old_logp, double ref_logp, double A) {
  PolicyToken t;
  double rho = exp(logp - old_logp), bounded = rho, r = ref_logp - logp, slope = 0;
  if (bounded < 1 - s->clip_low) bounded = 1 - s->clip_low;
  if (bounded > 1 + s->clip_high) bounded = 1 + s->clip_high;
  t.ratio = rho;
  t.clipped = bounded * A < rho * A;
  t.loss = -(t.clipped ? bounded : rho) * A;
  t.dlogp = t.clipped ? 0 : -rho * A;
  t.kl = 0;
  if (s->beta == 0 || s->kl == KL_FULL || s->kl == KL_FORWARD) return t;
  switch (s->kl) {
    case KL_K3:
      if (r > 20) r = 20;   // e^20 is half a billion: beyond it the estimate is only large
      if (r < -20) r = -20;
      t.kl = exp(r) - r - 1;
      slope = 1 - exp(r);
      break;
    case KL_K2:
      t.kl = 0.5 * r * r;
      slope = -r;
      break;
    case KL_K1:
      t.kl = -r;
      slope = 1;
      break;
    default:
      t.kl = -exp(logp) * r;
      slope = exp(logp) * (1 - r);
  }
  t.loss += s->beta * t.kl;
  t.dlogp += s->beta * slope;
  return t;
}

/*
The weight of each token of one answer of `length` tokens, so that the loss of an update is the sum of weight * loss over its tokens.
sequences, tokens: of the whole update (all micro-batches), answers without a token included.

    seq    mean over answers of the mean over their tokens: every answer counts the same, a token of a long one less
    token  mean over all tokens: every token counts the same, a long answer more
    dr     sum / (answers * longest): as token, but an update with short answers is a smaller one
*/
UNUSED static double policy_weight(int reduction, size_t length, size_t sequences, size_t tokens, size_t longest) {
  if (length == 0) return 0;
  return reduction == REDUCE_SEQ ? 1.0 / ((double)sequences * (double)length)
         : reduction == REDUCE_TOKEN ? 1.0 / (double)tokens
                                     : 1.0 / ((double)sequences * (double)longest);
}

// ---------------------------------------------------------------------------------------------------------
// All tokens of a micro-batch.

// What belongs to the rows of a batch, on the host, [R] each; rows without a target are ignored.
typedef struct {
  float *weight, *advantage, *old_logp, *ref_logp;
  float *copies;   // how many equal tokens of equal answers the row stands for; weight is that of all of them
} PolicyRows;

// Sums over the tokens of an update, for the log; zeroed by the caller.
typedef struct {
  double loss;                  // sum of weight * loss: the loss itself
  double kl, entropy, clipped;  // sums: penalty, -logp, tokens without a gradient
  double ratio, ratio_min, ratio_max;   // sum; smallest and largest (only where tokens > 0)
  double tokens;                // copies counted
} PolicyStats;

// logp (=) [R] on the host: the log-probability of each target under m, which has run model_forward; 0 where there is none.
UNUSED static void policy_logp(Model *m, float *logp) {
  head_cross_entropy(m, 0);
  for (int r = 0; r < m->R; r++) logp[r] = -m->host_losses[r];
}

/*
The loss over m->final and m->targets, added to *stats. With backward, m->dfinal (=) and the classifier's gradient (+=) are written.
With KL_FULL and beta > 0, ref is the reference model after model_forward on the same batch; otherwise it is not used. host_coef: [R]
floats of the caller's.

As in head_cross_entropy, the logits of head_rows rows exist at a time, those of the reference beside them. They become
log-probabilities of the targets, the host turns these into a slope for each row, and the logits become their own gradient in place:

    d loss / dz_j = w dlogp ([j = target] - p_j) + w beta p_j ((log p_j - log q_j) - KL)        w: the row's weight
*/
UNUSED static void head_policy(Model *m, Model *ref, const PolicyLoss *s, const PolicyRows *rows, float *host_coef, PolicyStats *stats,
                               int backward) {
  int C = m->c.dim, V = m->c.vocab, full = policy_needs_logits(s);
  for (int r0 = 0; r0 < m->R; r0 += m->head_rows) {
    int n = m->R - r0 < m->head_rows ? m->R - r0 : m->head_rows;
    const floatX *x = m->final + (size_t)r0 * (size_t)C;
    const int *targets = m->targets + r0;
    model_logits(m, m->logits, x, n);
    cross_entropy_forward(m->losses + r0, m->head_lse, m->logits, targets, n, V);
    dev_copy_out(m->host_losses + r0, m->losses + r0, (size_t)n * sizeof(float));
    for (int r = r0; r < r0 + n; r++) {
      host_coef[r] = 0;
      if (rows->weight[r] == 0) continue;
      PolicyToken t = policy_token(s, -(double)m->host_losses[r], (double)rows->old_logp[r], (double)rows->ref_logp[r],
                                   (double)rows->advantage[r]);
      host_coef[r] = (float)(-(double)rows->weight[r] * t.dlogp);
      stats->loss += (double)rows->weight[r] * t.loss;
      double copies = (double)rows->copies[r];
      stats->kl += copies * t.kl;
      stats->entropy += copies * (double)m->host_losses[r];
      stats->clipped += copies * t.clipped;
      stats->ratio += copies * t.ratio;
      if (stats->tokens == 0 || t.ratio < stats->ratio_min) stats->ratio_min = t.ratio;
      if (stats->tokens == 0 || t.ratio > stats->ratio_max) stats->ratio_max = t.ratio;
      stats->tokens += copies;
    }
    if (!backward && !full) continue;
    dev_copy_in(m->coef + r0, host_coef + r0, (size_t)n * sizeof(float));
    if (full) {
      for (int r = r0; r < r0 + n; r++) host_coef[r] = (float)(s->beta * (double)rows->weight[r]);
      dev_copy_in(ref->coef + r0, host_coef + r0, (size_t)n * sizeof(float));
      model_logits(ref, ref->logits, ref->final + (size_t)r0 * (size_t)ref->c.dim, n);
      cross_entropy_forward(ref->losses + r0, ref->head_lse, ref->logits, targets, n, V);
      policy_backward(ref->losses + r0, m->logits, m->head_lse, ref->logits, ref->head_lse, targets, m->coef + r0, ref->coef + r0, n,
                      V);
      dev_copy_out(ref->host_losses + r0, ref->losses + r0, (size_t)n * sizeof(float));
      for (int r = r0; r < r0 + n; r++) {
        if (rows->weight[r] == 0) continue;
        stats->kl += (double)rows->copies[r] * (double)ref->host_losses[r];
        stats->loss += (double)host_coef[r] * (double)ref->host_losses[r];
      }
    } else {
      cross_entropy_backward(m->logits, m->head_lse, targets, m->coef + r0, n, V);
    }
    if (backward)
      linear_backward(m->dfinal + (size_t)r0 * (size_t)C, m->grads + m->table.head, m->logits, x, m->params + m->table.head, n, V, C,
                      m->precision);
  }
}

#endif
