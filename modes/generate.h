/*
generate.h: the mode that continues a text, and what the modes that only run a model share.

What it is:  ./train_bitnet generate DIR prompt="12+34=" n=64 temperature=0.8 count=3
             The text goes to stdout, everything else to stderr; count texts are sampled side by side.
Read before: bitnet/infer.h, bitnet/checkpoint.h.
Defines:     load_to_run; Speaker (a model with its tokenizer, ready to continue texts), speaker_open, speaker_close; mode_generate.
*/
#ifndef MODE_GENERATE_H
#define MODE_GENERATE_H

#include "../bitnet/checkpoint.h"
#include "../bitnet/infer.h"

typedef struct {
  Model m;
  Tokenizer tok;
  Sampler sampler;
} Speaker;

UNUSED static Sampler sampler_from_options(const Options *o) {
  Sampler s;
  s.temperature = o->temperature;
  s.top_k = o->top_k;
  s.top_p = o->top_p;
  s.seed = (uint64_t)o->seed;
  return s;
}

// Loads a model to be run at lambda: packed where it is the ternary one, else with its float weights. screened: see model_load_frozen.
UNUSED static void load_to_run(Model *m, const char *dir, int precision, float lambda, int screened) {
  Config c;
  config_read(&c, dir);
  if (lambda == 1.0f && c.act_bits > 0) {
    model_load_frozen(m, dir, precision, screened);
  } else {
    int codes = model_load(m, dir, precision);
    if (codes > 0 && lambda != 1.0f)
      die(EXIT_USAGE, "lambda=%g: %s holds ternary codes; there are no float master weights behind them, only lambda=1 can be run",
          (double)lambda, dir);
    model_quantize(m, lambda);
  }
}

// Loads o->dir with its tokenizer, to be run at lambda. screened: see model_load_frozen.
UNUSED static void speaker_open(Speaker *s, const Options *o, float lambda, int screened) {
  char dir[4096];
  checkpoint_path(dir, sizeof dir, o->dir);
  checkpoint_tokenizer(&s->tok, dir);   // first: reading it takes memory for a moment
  load_to_run(&s->m, dir, o->precision, lambda, screened);
  s->sampler = sampler_from_options(o);
}

UNUSED static void speaker_close(Speaker *s) {
  model_free(&s->m);
  tokenizer_free(&s->tok);
}

// The ids of a text as a prompt: a text of no tokens starts with <s> if there is one. Caller frees; *n >= 1.
UNUSED static int *prompt_ids(const Tokenizer *t, const char *text, int *n) {
  size_t count = tokenizer_encode(t, text, strlen(text), NULL, 0);
  int *ids = (int *)xmalloc((count + 1) * sizeof(int));
  tokenizer_encode(t, text, strlen(text), ids, count);
  if (count == 0) {
    if (t->bos_id < 0 && t->eos_id < 0) die(EXIT_USAGE, "an empty prompt, and the tokenizer has no token to start from");
    ids[count++] = t->bos_id >= 0 ? t->bos_id : t->eos_id;
  }
  *n = (int)count;
  return ids;
}

UNUSED static void mode_generate(Options *o) {
  Speaker s;
  Session session;
  int n_ids, count = o->count;
  speaker_open(&s, o, (float)o->lambda, o->temperature <= 0);
  int *ids = prompt_ids(&s.tok, o->prompt, &n_ids);
  if (n_ids >= s.m.c.max_seq) die(EXIT_USAGE, "the prompt has %d tokens, the model's context only max_seq=%d", n_ids, s.m.c.max_seq);
  int capacity = n_ids + o->n < s.m.c.max_seq ? n_ids + o->n : s.m.c.max_seq;
  session_open(&session, &s.m, count, capacity, count > 256 ? count : 256, s.m.frozen);
  Prompt *prompts = (Prompt *)xcalloc((size_t)count, sizeof(Prompt));
  for (int i = 0; i < count; i++) {
    prompts[i].ids = ids;
    prompts[i].n_ids = n_ids;
    prompts[i].number = (uint64_t)i;
    prompts[i].shares = i > 0;
    prompts[i].out = (int *)xcalloc((size_t)o->n, sizeof(int));
  }
  double t0 = time_now();
  generate(&session, &s.sampler, prompts, count, o->n, s.tok.eos_id, s.tok.vocab_size, NULL, NULL);
  double seconds = time_now() - t0;
  size_t tokens = 0;
  for (int i = 0; i < count; i++) {
    StrBuf text = {NULL, 0, 0};
    tokenizer_decode(&s.tok, prompts[i].out, (size_t)prompts[i].n_out, &text);
    printf("%s%s\n", o->prompt, text.data);
    tokens += (size_t)prompts[i].n_out;
    strbuf_free(&text);
    free(prompts[i].out);
  }
  fprintf(stderr, "%zu tokens in %.3f s, %.0f tok/s\n", tokens, seconds, (double)tokens / seconds);
  free(prompts);
  free(ids);
  session_free(&session);
  speaker_close(&s);
}

#endif
