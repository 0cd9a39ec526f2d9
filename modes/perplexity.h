/*
perplexity.h: how well does a model predict a text.

What it is:  ./train_bitnet perplexity DIR file=book.txt [overlap=128]     a text file
             ./train_bitnet perplexity DIR data='data/val_*.bin'           token shards
             The tokens are cut into windows of seq_len (default: the model's context). The first `overlap` tokens of a window are only
             context for the others; without overlap every window starts blind. The documents of shards are read as in training: each
             begins anew behind the end-of-text token. Prints the loss and perplexity per token, and per byte of
             text, which is the one to compare between models with different tokenizers.
Read before: modes/generate.h, bitnet/losses.h.
Defines:     mode_perplexity.
*/
#ifndef MODE_PERPLEXITY_H
#define MODE_PERPLEXITY_H

#include "../bitnet/losses.h"
#include "generate.h"

enum { PERPLEXITY_ROWS = 8 };   // windows that go through the model together

// All tokens of the text file or of the shards, in order. Caller frees. *eot: the token that ends a document, -1 for a text file.
static int *perplexity_tokens_(const Options *o, const Tokenizer *tok, int vocab, size_t *n, int *eot) {
  *eot = -1;
  if (o->file[0]) {
    size_t len;
    char *text = read_file(o->file, &len);
    if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s", o->file, strerror(errno));
    *n = tokenizer_encode_marks(tok, text, len, NULL, 0);
    int *ids = (int *)xmalloc(size_mul(*n + 1, sizeof(int)));
    tokenizer_encode_marks(tok, text, len, ids, *n);
    free(text);
    return ids;
  }
  DataLoader d;
  loader_open_shards(&d, o->data, vocab, -1, 0, 0);
  loader_check_tokenizer(&d, tok);
  *eot = d.eot >= 0 ? d.eot : tok->eos_id;
  size_t at = 0;
  int *ids = (int *)xmalloc(size_mul((size_t)d.n_tokens + 1, sizeof(int)));
  for (size_t i = 0; i < d.n_shards; i++) {
    for (uint64_t k = 0; k < d.shards[i].n_tokens; k++) ids[at++] = (int)shard_token_(&d.shards[i], k);
  }
  loader_free(&d);
  *n = at;
  return ids;
}

UNUSED static void mode_perplexity(Options *o) {
  Speaker s;
  Batch b;
  size_t n;
  int eot;
  if ((o->file[0] != 0) == (options_is_set(o, "data") == FROM_USER))
    die(EXIT_USAGE, "perplexity needs one of file=TEXT and data=GLOB");
  speaker_open(&s, o, (float)o->lambda, 0);
  int *ids = perplexity_tokens_(o, &s.tok, s.m.c.vocab, &n, &eot);
  int T = o->seq_len > 0 && o->seq_len < s.m.c.max_seq ? o->seq_len : s.m.c.max_seq;
  if (n < 2) die(EXIT_USAGE, "perplexity: expected a text of at least 2 tokens, found %zu", n);
  if (o->overlap >= T) die(EXIT_USAGE, "overlap=%d leaves nothing to predict in a window of %d tokens", o->overlap, T);
  if ((size_t)T > n - 1) T = (int)(n - 1);
  int overlap = o->overlap < T ? o->overlap : T - 1;
  model_alloc_batch(&s.m, PERPLEXITY_ROWS, T, 1, s.m.frozen);
  batch_alloc(&b, PERPLEXITY_ROWS, T);
  float *coef = (float *)xcalloc((size_t)s.m.R, sizeof(float));
  double loss = 0, bytes = 0;
  size_t targets = 0, next = 0, step = (size_t)(T - overlap), windows = (n - 1 - (size_t)overlap + step - 1) / step;
  while (next < windows) {
    for (int r = 0; r < PERPLEXITY_ROWS; r++, next++) {
      size_t first = next * step, o0 = (size_t)r * (size_t)T;
      int begin = 0;   // of the document
      for (int t = 0; t < T; t++) {
        size_t at = first + (size_t)t;
        int there = next < windows && at + 1 < n;
        b.tokens[o0 + (size_t)t] = there ? ids[at] : 0;
        int ends = there && eot >= 0 && ids[at] == eot;
        b.targets[o0 + (size_t)t] = there && !ends && (t >= overlap || next == 0) ? ids[at + 1] : IGNORE;
        b.start[o0 + (size_t)t] = begin;
        b.pos[o0 + (size_t)t] = t - begin;
        if (ends) begin = t + 1;
        if (b.targets[o0 + (size_t)t] != IGNORE) {
          size_t len;
          tokenizer_piece(&s.tok, ids[at + 1], &len);
          if (ids[at + 1] < s.tok.vocab_size && !s.tok.special[ids[at + 1]]) bytes += (double)len;
          targets++;
        }
      }
    }
    loss += batch_loss(&s.m, &b, 0, coef, 0);
    if (isatty(2))
      fprintf(stderr, "\r%zu of %zu windows, perplexity %.4f ", next < windows ? next : windows, windows, exp(loss / (double)targets));
  }
  if (isatty(2)) fputc('\n', stderr);
  printf("tokens %zu bytes %.0f window %d overlap %d loss %.6f perplexity %.4f bits_per_byte %.5f\n", targets, bytes, T, overlap,
         loss / (double)targets, exp(loss / (double)targets), bytes > 0 ? loss / bytes / 0.6931471805599453 : NAN);
  free(coef);
  free(ids);
  batch_free(&b);
  speaker_close(&s);
}

#endif
