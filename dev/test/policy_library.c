/*
policy_library.c: the policy's loss as a shared library, so that test_grpo.py can run it on the numbers that it gives to TRL.

What it is:  one function around head_policy. The classifier is the identity matrix, so the logits are whatever the caller wants.
Read before: bitnet/policy.h, dev/test/test_grpo.py.

    gcc -O2 -march=native -fopenmp -shared -fPIC dev/test/policy_library.c -lm -o policy.so
*/
#define TESTING
#include "../../train_bitnet.c"

#include "../../bitnet/policy.h"

/*
The loss of B answers with T places each, and its gradient. logits, ref_logits, dlogits (=): [B,T,V]; targets, old_logp, ref_logp:
[B,T], targets -1 where there is none; advantage [B]. longest: of reduction dr. kl (=): its mean over tokens.
*/
double policy_case(int B, int T, int V, const float *logits, const float *ref_logits, const int *targets, const float *old_logp,
                   const float *ref_logp, const float *advantage, double clip_low, double clip_high, double beta, int kl_kind,
                   int reduction, int longest, float *dlogits, double *kl) {
  Config c;
  Model models[2];
  PolicyLoss loss = {clip_low, clip_high, beta, kl_kind};
  PolicyStats stats;
  PolicyRows rows;
  size_t R = (size_t)B * (size_t)T, tokens = 0;
  dev_init(0);
  memset(&c, 0, sizeof c);
  memset(&stats, 0, sizeof stats);
  c.dim = c.vocab = V, c.layers = c.heads = c.kv_heads = 1, c.head_dim = 2, c.ffn_dim = 2, c.max_seq = T;
  c.norm_eps = 1e-5f;
  c.rope_theta = 10000;
  c.act_bits = 8;
  float *identity = (float *)xcalloc((size_t)V * (size_t)V, sizeof(float));
  for (int v = 0; v < V; v++) identity[(size_t)v * (size_t)V + (size_t)v] = 1;
  for (int i = 0; i < 2; i++) {
    model_open(&models[i], &c, PRECISION_FP32);
    model_alloc_training(&models[i], B, T, 0, 0);
    dev_copy_in(models[i].params + models[i].table.head, identity, (size_t)V * (size_t)V * sizeof(float));
    dev_floatx_in(models[i].final, i ? ref_logits : logits, R * (size_t)V);
    dev_copy_in(models[i].targets, targets, R * sizeof(int));
  }
  rows.weight = (float *)xcalloc(R, sizeof(float));
  rows.advantage = (float *)xcalloc(R, sizeof(float));
  rows.old_logp = (float *)xcalloc(R, sizeof(float));
  rows.ref_logp = (float *)xcalloc(R, sizeof(float));
  rows.copies = (float *)xcalloc(R, sizeof(float));
  float *coef = (float *)xcalloc(R, sizeof(float));
  memcpy(rows.old_logp, old_logp, R * sizeof(float));
  memcpy(rows.ref_logp, ref_logp, R * sizeof(float));
  for (size_t r = 0; r < R; r++) tokens += targets[r] >= 0;
  for (int b = 0; b < B; b++) {
    size_t length = 0, at = (size_t)b * (size_t)T;
    for (int t = 0; t < T; t++) length += targets[at + (size_t)t] >= 0;
    for (size_t r = at; r < at + (size_t)T; r++) {
      rows.advantage[r] = advantage[b];
      rows.copies[r] = 1;
      if (targets[r] >= 0) rows.weight[r] = (float)policy_weight(reduction, length, (size_t)B, tokens, (size_t)longest);
    }
  }
  head_policy(&models[0], &models[1], &loss, &rows, coef, &stats, 1);
  dev_floatx_out(dlogits, models[0].dfinal, R * (size_t)V);
  *kl = stats.tokens > 0 ? stats.kl / stats.tokens : 0;
  free(rows.weight);
  free(rows.advantage);
  free(rows.old_logp);
  free(rows.ref_logp);
  free(rows.copies);
  free(coef);
  free(identity);
  model_free(&models[0]);
  model_free(&models[1]);
  return stats.loss;
}

// Advantages of groups x G rewards; returns how many groups are all equal.
int policy_advantages(double *A, const double *r, int groups, int G, int kind) {
  return advantages(A, r, (size_t)groups, (size_t)G, kind);
}
