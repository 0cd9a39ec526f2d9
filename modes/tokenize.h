/*
tokenize.h: text to token ids and back, by hand or in a pipe.

What it is:  ./train_bitnet tokenize DIR            text on stdin, ids on stdout, one line for each line
             ./train_bitnet tokenize DIR decode=1   ids on stdin, text on stdout
             DIR is a run, a model directory, or anything that tokenizer_load reads.
Read before: tokenizer.h.
Defines:     mode_tokenize.
*/
#ifndef MODE_TOKENIZE_H
#define MODE_TOKENIZE_H

#include "../bitnet/checkpoint.h"

// Where the tokenizer of DIR lies: in the newest checkpoint of a run, else DIR itself.
static void tokenizer_place_(char *out, size_t cap, const char *dir) {
  char path[4096];
  path_join(path, sizeof path, dir, "checkpoints/latest");
  if (is_file(path)) {
    checkpoint_path(out, cap, dir);
  } else {
    int n = snprintf(out, cap, "%s", dir);
    if (n < 0 || (size_t)n >= cap) die(EXIT_USAGE, "path too long: %s", dir);
  }
}

UNUSED static void mode_tokenize(Options *o) {
  Tokenizer tok;
  char dir[4096], *line = NULL;
  size_t line_cap = 0, n_line = 0, ids_cap = 0;
  int *ids = NULL;
  ssize_t len;
  tokenizer_place_(dir, sizeof dir, o->dir);
  if (is_file(dir) && source_begins_(dir, "GGUF")) checkpoint_tokenizer(&tok, dir);
  else tokenizer_load(&tok, dir);
  while ((len = getline(&line, &line_cap, stdin)) >= 0) {
    n_line++;
    if (len > 0 && line[len - 1] == '\n') line[--len] = 0;
    if ((size_t)len + 1 > ids_cap) {   // a text never has more tokens than bytes, but for one that a prefix may add
      ids_cap = (size_t)len * 2 + 16;
      ids = (int *)xrealloc(ids, ids_cap * sizeof(int));
    }
    size_t n = 0;
    if (!o->decode) {
      n = tokenizer_encode(&tok, line, (size_t)len, ids, ids_cap);
      for (size_t i = 0; i < n; i++) printf("%s%d", i ? " " : "", ids[i]);
      printf("\n");
      continue;
    }
    for (char *p = line, *end; *p; p = end) {
      long v = strtol(p, &end, 10);
      if (end == p && strspn(p, " ,\t\r") == strlen(p)) break;
      if (end == p || v < 0 || v >= tok.vocab_size)
        die(EXIT_USAGE, "stdin, line %zu, column %zu: expected an id from 0 to %d, found '%.20s'", n_line, (size_t)(p - line) + 1,
            tok.vocab_size - 1, p);
      ids[n++] = (int)v;
      while (*end == ',' || *end == ' ') end++;
    }
    StrBuf text = {NULL, 0, 0};
    tokenizer_decode_text(&tok, ids, n, &text);
    fwrite(text.data, 1, text.len, stdout);
    printf("\n");
    strbuf_free(&text);
  }
  free(line);
  free(ids);
  tokenizer_free(&tok);
}

#endif
