/*
chat.h: a conversation on the terminal.

What it is:  ./train_bitnet chat DIR. The answer appears token by token. A model with marks for turns in its tokenizer (<|im_start|>,
             or <|start_header_id|>) is given the conversation so far in its template; a base model continues each line on its own (an
             arithmetic model wants "12+34="). /reset forgets the conversation, /quit or the end of the input ends it.
             When the context is full, the oldest turns are forgotten, never the system text.
Read before: modes/generate.h. The templates are those of prepro/chat.py.
Defines:     mode_chat.
*/
#ifndef MODE_CHAT_H
#define MODE_CHAT_H

#include "generate.h"

enum { TEMPLATE_AUTO, TEMPLATE_NONE, TEMPLATE_CHATML, TEMPLATE_LLAMA3, TEMPLATE_ALPACA };   // the choices of the option

// Token ids that grow.
typedef struct {
  int *ids;
  size_t n, cap;
} Ids;

static void ids_put_(Ids *x, int id) {
  if (x->n == x->cap) {
    x->cap = x->cap * 2 + 64;
    x->ids = (int *)xrealloc(x->ids, x->cap * sizeof(int));
  }
  x->ids[x->n++] = id;
}

// What people write is plain text: a special token in it stays text.
static void ids_put_text_(Ids *x, const Tokenizer *t, const char *text) {
  size_t n = tokenizer_encode(t, text, strlen(text), NULL, 0);
  int *ids = (int *)xmalloc((n + 1) * sizeof(int));
  tokenizer_encode(t, text, strlen(text), ids, n);
  for (size_t i = 0; i < n; i++) ids_put_(x, ids[i]);
  free(ids);
}

static int mark_id_(const Tokenizer *t, const char *mark) {
  return tokenizer_id(t, mark, strlen(mark));
}

// The template that the tokenizer has marks for.
static int template_of_(const Tokenizer *t) {
  if (mark_id_(t, "<|im_start|>") >= 0 && mark_id_(t, "<|im_end|>") >= 0) return TEMPLATE_CHATML;
  if (mark_id_(t, "<|start_header_id|>") >= 0 && mark_id_(t, "<|eot_id|>") >= 0) return TEMPLATE_LLAMA3;
  return TEMPLATE_NONE;
}

// The token that ends a turn of the model.
static int template_end_(const Tokenizer *t, int template_) {
  if (template_ == TEMPLATE_CHATML) return mark_id_(t, "<|im_end|>");
  return template_ == TEMPLATE_LLAMA3 ? mark_id_(t, "<|eot_id|>") : t->eos_id;
}

// Appends what stands before a turn's text (open) or behind it.
static void put_turn_mark_(Ids *x, const Tokenizer *t, int template_, const char *role, int open) {
  char header[64];
  if (template_ == TEMPLATE_CHATML) {
    ids_put_(x, mark_id_(t, open ? "<|im_start|>" : "<|im_end|>"));
    snprintf(header, sizeof header, "%s\n", open ? role : "");
    ids_put_text_(x, t, header);
  } else if (template_ == TEMPLATE_LLAMA3 && open) {
    ids_put_(x, mark_id_(t, "<|start_header_id|>"));
    ids_put_text_(x, t, role);
    ids_put_(x, mark_id_(t, "<|end_header_id|>"));
    ids_put_text_(x, t, "\n\n");
  } else if (template_ == TEMPLATE_LLAMA3) {
    ids_put_(x, mark_id_(t, "<|eot_id|>"));
  } else if (template_ == TEMPLATE_ALPACA) {
    if (open)
      ids_put_text_(x, t,
                    strcmp(role, "user") == 0        ? "### Instruction:\n"
                    : strcmp(role, "assistant") == 0 ? "### Response:\n"
                                                     : "### System:\n");
    else ids_put_text_(x, t, "\n\n");
  }
}

static void put_turn_(Ids *x, const Tokenizer *t, int template_, const char *role, const char *text) {
  put_turn_mark_(x, t, template_, role, 1);
  ids_put_text_(x, t, text);
  put_turn_mark_(x, t, template_, role, 0);
}

// Prints a token as soon as it is there.
static void chat_token_(void *ctx, int prompt, int token) {
  StrBuf text = {NULL, 0, 0};
  (void)prompt;
  tokenizer_decode((const Tokenizer *)ctx, &token, 1, &text);
  fwrite(text.data, 1, text.len, stdout);
  fflush(stdout);
  strbuf_free(&text);
}

typedef struct {
  Speaker speaker;
  Session session;
  Ids history;              // all tokens of the conversation
  size_t cached;            // of them in the cache
  size_t head;              // of them the beginning that is never forgotten: <s> and the system text
  size_t turns[1024];       // where each exchange begins in history
  int n_turns, template_, n_new;
  uint64_t number;          // of the turn, for the random draws
  int *out;                 // [n_new]
} Chat;

static void chat_reset_(Chat *c, const char *system) {
  const Tokenizer *t = &c->speaker.tok;
  c->history.n = c->cached = 0;
  c->n_turns = 0;
  if (c->template_ != TEMPLATE_NONE) {
    if (t->bos_id >= 0 && (t->add_bos || c->template_ == TEMPLATE_LLAMA3)) ids_put_(&c->history, t->bos_id);
    if (system[0]) put_turn_(&c->history, t, c->template_, "system", system);
  }
  c->head = c->history.n;
}

// Forgets the oldest exchanges until `need` more tokens fit into the context. Returns 0 if they cannot.
static int chat_make_room_(Chat *c, size_t need) {
  size_t room = (size_t)c->speaker.m.c.max_seq;
  while (c->history.n + need > room && (c->n_turns > 1 || (c->n_turns == ARRAY_LEN(c->turns)))) {
    size_t from = c->turns[1], gone = from - c->head;
    memmove(c->history.ids + c->head, c->history.ids + from, (c->history.n - from) * sizeof(int));
    c->history.n -= gone;
    for (int i = 1; i < c->n_turns; i++) c->turns[i - 1] = c->turns[i] - gone;
    c->n_turns--;
    c->cached = c->head < c->cached ? c->head : c->cached;   // positions have moved: the rest is computed anew
  }
  return c->history.n + need <= room;
}

// One line of the user and the model's answer to it.
static void chat_turn_(Chat *c, const char *line) {
  const Tokenizer *t = &c->speaker.tok;
  Prompt p;
  if (c->template_ == TEMPLATE_NONE) chat_reset_(c, "");
  if (c->n_turns == ARRAY_LEN(c->turns)) c->n_turns--;
  c->turns[c->n_turns++] = c->history.n;
  if (c->template_ == TEMPLATE_NONE) {
    int n, *ids = prompt_ids(t, line, &n);
    for (int i = 0; i < n; i++) ids_put_(&c->history, ids[i]);
    free(ids);
  } else {
    put_turn_(&c->history, t, c->template_, "user", line);
    put_turn_mark_(&c->history, t, c->template_, "assistant", 1);
  }
  if (!chat_make_room_(c, 1)) {
    fprintf(stderr, "that is too long: with the marks of the turn %zu tokens, and the model reads at most %d\n", c->history.n,
            c->speaker.m.c.max_seq - 1);
    c->history.n = c->turns[--c->n_turns];
    return;
  }
  memset(&p, 0, sizeof p);
  p.ids = c->history.ids;
  p.n_ids = (int)c->history.n;
  p.cached = (int)c->cached;
  p.number = c->number++;
  p.out = c->out;
  generate(&c->session, &c->speaker.sampler, &p, 1, c->n_new, template_end_(t, c->template_), t->vocab_size, chat_token_,
           &c->speaker.tok);
  fputc('\n', stdout);
  fflush(stdout);
  c->cached = c->history.n;
  for (int i = 0; i < p.n_out; i++) ids_put_(&c->history, p.out[i]);
  if (c->template_ != TEMPLATE_NONE) put_turn_mark_(&c->history, t, c->template_, "assistant", 0);
}

UNUSED static void mode_chat(Options *o) {
  static Chat c;
  char *line = NULL;
  size_t line_cap = 0;
  ssize_t len;
  int tty = isatty(0);
  memset(&c, 0, sizeof c);
  speaker_open(&c.speaker, o, (float)o->lambda, o->temperature <= 0);
  int max_seq = c.speaker.m.c.max_seq;
  session_open(&c.session, &c.speaker.m, 1, max_seq, max_seq < 256 ? max_seq : 256, c.speaker.m.frozen);
  c.template_ = o->chat_template == TEMPLATE_AUTO ? template_of_(&c.speaker.tok) : o->chat_template;
  if ((o->chat_template == TEMPLATE_CHATML && template_of_(&c.speaker.tok) != TEMPLATE_CHATML) ||
      (o->chat_template == TEMPLATE_LLAMA3 && mark_id_(&c.speaker.tok, "<|eot_id|>") < 0))
    die(EXIT_USAGE, "chat_template: the tokenizer of %s has no tokens for these marks; chat_template=alpaca needs none", o->dir);
  c.n_new = o->n;
  c.out = (int *)xcalloc((size_t)o->n, sizeof(int));
  chat_reset_(&c, o->system);
  fprintf(stderr, "%zu parameters, context of %d tokens. %s /reset forgets, /quit ends.\n", tensor_table_params(&c.speaker.m.table),
          max_seq,
          c.template_ == TEMPLATE_NONE ? "Type a text to continue, for an arithmetic model like 12+34= ;" : "Type a message;");
  for (;;) {
    if (tty) fputs("> ", stderr);
    len = getline(&line, &line_cap, stdin);
    if (len < 0) break;
    while (len > 0 && (line[len - 1] == '\n' || line[len - 1] == '\r')) line[--len] = 0;
    if (len == 0) continue;
    if (strcmp(line, "/quit") == 0) break;
    if (strcmp(line, "/reset") == 0) chat_reset_(&c, o->system);
    else chat_turn_(&c, line);
  }
  if (tty) fputc('\n', stderr);
  free(line);
  free(c.out);
  free(c.history.ids);
  session_free(&c.session);
  speaker_close(&c.speaker);
}

#endif
