/*
rollout.h: answers that a model gives to prompts while it learns, and what belongs to them.

What it is:  a Sample is a prompt, a sampled answer, the log-probability of each of its tokens when it was sampled, its reward and
             its advantage. Sets of them are sampled through a Session over the very model that is being trained, and laid out as
             training batches.
What not:    no templates, no rewards (modes/grpo.h), no loss (policy.h).
Read before: bitnet/infer.h, bitnet/policy.h, dataloader.h.
Defines:     Sample, SampleSet, samples_open, samples_free, samples_draw, samples_text, samples_merge, samples_fill, samples_rows.

A row of a batch holds prompt and answer; the targets are the answer's tokens, its end included:

  tokens    1 2 + 3 =  1  5  <pad>
  targets   . . . . 1  5 </s>  .          "." = IGNORE
*/
#ifndef BITNET_ROLLOUT_H
#define BITNET_ROLLOUT_H

#include "infer.h"
#include "policy.h"

typedef struct {
  int *ids;              // [T+1] prompt, answer, and the end token if it came
  int n_prompt;          // at least 1
  int n_answer;          // tokens behind the prompt, the end token included: what is trained
  int ended;             // 1: the end token came
  float *logp;           // [T+1] of the n_answer tokens, when they were sampled
  float *ref_logp;       // [T+1] the same under the reference model; 0 where it is not asked for
  uint64_t number;       // numbers the random draws
  double reward, advantage;
  int copies;            // equal answers to the same prompt that it stands for
  StrBuf text;           // the answer, decoded
} Sample;

typedef struct {
  Sample *items;
  int n, cap, T;
  int *ids;
  float *numbers;
} SampleSet;

// Room for cap samples of which prompt and answer (without the end token) fit into T places.
UNUSED static void samples_open(SampleSet *s, int cap, int T) {
  size_t n = (size_t)cap, width = (size_t)T + 1;
  memset(s, 0, sizeof *s);
  s->cap = cap;
  s->T = T;
  s->items = (Sample *)xcalloc(n, sizeof(Sample));
  s->ids = (int *)xcalloc(size_mul(n, width), sizeof(int));
  s->numbers = (float *)xcalloc(size_mul(n, 2 * width), sizeof(float));
  for (size_t i = 0; i < n; i++) {
    s->items[i].ids = s->ids + i * width;
    s->items[i].logp = s->numbers + i * 2 * width;
    s->items[i].ref_logp = s->items[i].logp + width;
  }
}

UNUSED static void samples_free(SampleSet *s) {
  for (int i = 0; i < s->cap; i++) strbuf_free(&s->items[i].text);
  free(s->items);
  free(s->ids);
  free(s->numbers);
  memset(s, 0, sizeof *s);
}

/*
Decodes an answer. Special tokens and ids without a piece appear as U+FFFD: left out, as in text for people, they would let an answer
pass as right that has something in it which nobody asked for.
*/
UNUSED static void samples_text(Sample *s, const Tokenizer *tok) {
  int n = s->n_answer - s->ended;
  s->text.len = 0;
  strbuf_append(&s->text, "", 0);
  for (int i = 0; i < n; i++) {
    int id = s->ids[s->n_prompt + i];
    size_t before = s->text.len;
    tokenizer_decode(tok, &id, 1, &s->text);
    if (s->text.len == before) strbuf_append(&s->text, "\xEF\xBF\xBD", 3);
  }
  if (tok->strip_blank && s->text.len > 0 && s->text.data[0] == ' ') {
    memmove(s->text.data, s->text.data + 1, s->text.len);   // with the closing zero
    s->text.len--;
  }
}

/*
Samples answers of at most max_new tokens (the end token included) to the prompts of samples first .. first+n-1, which have ids,
n_prompt and number set; n <= session's sequences. The distribution is the model's own, temperature 1, over all V ids of the embedding,
also those that only pad it: the loss takes the softmax over the same V, and a ratio of two different distributions means nothing.
greedy: for measuring, the most likely tokens instead.
*/
UNUSED static void samples_draw(SampleSet *s, int first, int n, Session *session, uint64_t seed, int greedy, int max_new, int end,
                                const Tokenizer *tok) {
  Sampler sampler = {greedy ? 0.0 : 1.0, 0, 1, seed};
  Prompt *prompts = (Prompt *)xcalloc((size_t)n, sizeof(Prompt));
  for (int i = 0; i < n; i++) {
    Sample *x = &s->items[first + i];
    prompts[i].ids = x->ids;
    prompts[i].n_ids = x->n_prompt;
    prompts[i].number = x->number;
    prompts[i].out = x->ids + x->n_prompt;
    prompts[i].logp = x->logp;
    prompts[i].shares = i > 0 && x->n_prompt == x[-1].n_prompt &&
                        memcmp(x->ids, x[-1].ids, (size_t)x->n_prompt * sizeof(int)) == 0;
  }
  generate(session, &sampler, prompts, n, max_new, end, session->m->c.vocab, NULL, NULL);
  for (int i = 0; i < n; i++) {
    Sample *x = &s->items[first + i];
    x->ended = prompts[i].ended;
    x->n_answer = prompts[i].n_out + x->ended;
    x->copies = 1;
    if (x->ended) x->ids[x->n_prompt + prompts[i].n_out] = end;
    samples_text(x, tok);
  }
  free(prompts);
}

/*
Leaves out what need not be computed: equal answers inside a group of G have the same gradient, so one of them stands for all; and
with without_zeros, answers with advantage 0, which have none. Samples that stay come first, in their order, and set->n is their
number.
*/
UNUSED static void samples_merge(SampleSet *s, int G, int without_zeros) {
  int kept = 0;
  for (int i = 0, group = 0; i < s->n; i++) {   // group: where the samples of i's group that stay begin
    Sample *x = &s->items[i];
    int equal = -1;
    if (i % G == 0) group = kept;
    if (without_zeros && x->advantage == 0) continue;
    for (int k = group; k < kept && equal < 0; k++) {
      const Sample *y = &s->items[k];
      if (y->n_prompt == x->n_prompt && y->n_answer == x->n_answer && y->advantage == x->advantage &&
          memcmp(y->ids, x->ids, (size_t)(x->n_prompt + x->n_answer) * sizeof(int)) == 0) equal = k;
    }
    if (equal >= 0) {
      s->items[equal].copies += x->copies;
      continue;
    }
    Sample swap = s->items[kept];   // they keep their memory: exchanged, not copied
    s->items[kept++] = *x;
    *x = swap;
  }
  s->n = kept;
}

// Lays samples first, first+1, ... out as the rows of b; rows behind the last sample are padding without targets.
UNUSED static void samples_fill(const SampleSet *s, int first, int pad, Batch *b) {
  for (int r = 0; r < b->B; r++) {
    size_t o = (size_t)r * (size_t)b->T;
    int *tokens = b->tokens + o, *targets = b->targets + o, *start = b->start + o, *pos = b->pos + o, used = 0;
    if (first + r < s->n) {
      const Sample *x = &s->items[first + r];
      used = x->n_prompt + x->n_answer - 1;
      for (int t = 0; t < used; t++) {
        tokens[t] = x->ids[t];
        targets[t] = t + 1 >= x->n_prompt ? x->ids[t + 1] : IGNORE;
        start[t] = 0;
        pos[t] = t;
      }
    }
    pad_row_(pad, used, b->T, tokens, targets, start, pos);
  }
  batch_count_targets_(b);
}

// What the loss needs to know about the same rows, [B,T] each. reduction, sequences, tokens, longest: as in policy_weight.
UNUSED static void samples_rows(const SampleSet *s, int first, const Batch *b, int reduction, size_t sequences, size_t tokens,
                                size_t longest, PolicyRows *rows) {
  size_t R = (size_t)b->B * (size_t)b->T;
  memset(rows->weight, 0, R * sizeof(float));
  for (int r = 0; r < b->B && first + r < s->n; r++) {
    const Sample *x = &s->items[first + r];
    double weight = policy_weight(reduction, (size_t)x->n_answer, sequences, tokens, longest);
    for (int i = 0; i < x->n_answer; i++) {
      size_t at = (size_t)r * (size_t)b->T + (size_t)(x->n_prompt - 1 + i);
      rows->weight[at] = (float)(weight * x->copies);
      rows->copies[at] = (float)x->copies;
      rows->advantage[at] = (float)x->advantage;
      rows->old_logp[at] = x->logp[i];
      rows->ref_logp[at] = x->ref_logp[i];
    }
  }
}

#endif
