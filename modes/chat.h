/*
chat.h: a prompt loop on the terminal.

What it is:  ./train_bitnet chat DIR. Each line that you type is continued by the model, token by token as it comes; an arithmetic
             model wants "12+34=". /quit or the end of the input ends it.
Read before: modes/generate.h.
Defines:     mode_chat.
*/
#ifndef MODE_CHAT_H
#define MODE_CHAT_H

#include "generate.h"

// Prints a token as soon as it is there.
static void chat_token_(void *ctx, int prompt, int token) {
  StrBuf text = {NULL, 0, 0};
  (void)prompt;
  tokenizer_decode((const Tokenizer *)ctx, &token, 1, &text);
  fputs(text.data, stdout);
  fflush(stdout);
  strbuf_free(&text);
}

UNUSED static void mode_chat(Options *o) {
  Speaker s;
  Session session;
  char *line = NULL;
  size_t line_cap = 0;
  ssize_t len;
  uint64_t turn = 0;
  int tty = isatty(0);
  speaker_open(&s, o, (float)o->lambda);
  session_open(&session, &s.m, 1, s.m.c.max_seq, s.m.c.max_seq < 256 ? s.m.c.max_seq : 256, s.m.frozen);
  int *out = (int *)xcalloc((size_t)o->n, sizeof(int));
  fprintf(stderr, "%zu parameters, context of %d tokens. Type a prompt, for an arithmetic model like 12+34= ; /quit ends.\n",
          tensor_table_params(&s.m.table), s.m.c.max_seq);
  for (;;) {
    if (tty) fputs("> ", stderr);
    len = getline(&line, &line_cap, stdin);
    if (len < 0) break;
    while (len > 0 && (line[len - 1] == '\n' || line[len - 1] == '\r')) line[--len] = 0;
    if (len == 0) continue;
    if (strcmp(line, "/quit") == 0) break;
    Prompt p;
    memset(&p, 0, sizeof p);
    int n_ids, *ids = prompt_ids(&s.tok, line, &n_ids);
    if (n_ids >= s.m.c.max_seq) {
      fprintf(stderr, "that is %d tokens, the model reads at most %d\n", n_ids, s.m.c.max_seq - 1);
    } else {
      p.ids = ids;
      p.n_ids = n_ids;
      p.number = turn++;
      p.out = out;
      generate(&session, &s.sampler, &p, 1, o->n, s.tok.eos_id, s.tok.vocab_size, chat_token_, &s.tok);
      fputc('\n', stdout);
      fflush(stdout);
    }
    free(ids);
  }
  if (tty) fputc('\n', stderr);
  free(line);
  free(out);
  session_free(&session);
  speaker_close(&s);
}

#endif
