/*
logits.h: the logits of given token ids, the hand tool for comparing this program with any other.

What it is:  ./train_bitnet logits DIR ids="1 2 3" [lambda=1]
             prints one line per position: vocab numbers as %.9g, which reads back as the same float. Products run in fp32 unless
             precision=bf16 is asked for.
Read before: modes/generate.h.
Defines:     mode_logits.
*/
#ifndef MODE_LOGITS_H
#define MODE_LOGITS_H

#include "generate.h"

// Numbers separated by blanks or commas, each in 0 .. vocab-1. Returns how many; caller frees *ids.
static int parse_ids_(const char *text, int vocab, int **ids) {
  int n = 0;
  *ids = (int *)xmalloc((strlen(text) + 1) * sizeof(int));
  for (const char *p = text; *p;) {
    char *end;
    if (*p == ' ' || *p == ',' || *p == '\n' || *p == '\t') {
      p++;
      continue;
    }
    long v = strtol(p, &end, 10);
    if (end == p || (*end && !strchr(" ,\n\t", *end)))
      die(EXIT_USAGE, "ids: offset %zu: expected token ids such as \"1 2 3\", found '%.10s'", (size_t)(p - text), p);
    if (v < 0 || v >= vocab)
      die(EXIT_USAGE, "ids: offset %zu: expected an id from 0 to %d, found %ld", (size_t)(p - text), vocab - 1, v);
    (*ids)[n++] = (int)v;
    p = end;
  }
  if (n == 0) die(EXIT_USAGE, "ids: expected token ids such as ids=\"1 2 3\", found none");
  return n;
}

UNUSED static void mode_logits(Options *o) {
  Model m;
  Session session;
  char dir[4096];
  int *ids, seq = 0;
  checkpoint_path(dir, sizeof dir, o->dir);
  load_to_run(&m, dir, options_is_set(o, "precision") ? o->precision : PRECISION_FP32, (float)o->lambda, 0);
  int n = parse_ids_(o->ids, m.c.vocab, &ids);
  if (n > m.c.max_seq) die(EXIT_USAGE, "ids: %d tokens, the model's context has max_seq=%d", n, m.c.max_seq);
  session_open(&session, &m, 1, n, 1, m.frozen);
  for (int i = 0; i < n; i++) {
    const float *logits = session_forward(&session, ids + i, &seq, &i, 1);
    for (int v = 0; v < m.c.vocab; v++) printf("%s%.9g", v ? " " : "", (double)logits[v]);
    printf("\n");
  }
  free(ids);
  session_free(&session);
  model_free(&m);
}

#endif
