/*
question.h: how a question becomes a prompt.

What it is:  the option qa_template: the ids of a question for a model that answers it, and of a second pass over its first answer.
             Evaluation and reinforcement learning ask in the same words.
What not:    no conversations; chat.h has those.
Read before: chat.h.
Defines:     question_prompt.
*/
#ifndef MODE_QUESTION_H
#define MODE_QUESTION_H

#include "chat.h"

// A text of the template itself: words that the tokenizer knows as special tokens become those.
static void put_template_(Ids *x, const Tokenizer *t, const char *text) {
  size_t len = strlen(text), n = tokenizer_encode_marks(t, text, len, NULL, 0);
  int *ids = (int *)xmalloc((n + 1) * sizeof(int));
  tokenizer_encode_marks(t, text, len, ids, n);
  for (size_t i = 0; i < n; i++) ids_put_(x, ids[i]);
  free(ids);
}

/*
The ids of a prompt into x. first = NULL: the question alone; otherwise the second pass, with the first answer and what to do with it.
    plain      query                                  query first guide
    seed003    <user>query</user><assistant>          <user>query<think>first</think>guide</user><assistant>
    chatml     the user's turn                        and an assistant's turn with the first answer, a line end and guide
*/
UNUSED static void question_prompt(Ids *x, const Tokenizer *t, int form, const char *query, const char *first, const char *guide) {
  x->n = 0;
  if (t->add_bos && t->bos_id >= 0) ids_put_(x, t->bos_id);
  if (form == QA_CHATML) {
    put_turn_(x, t, TEMPLATE_CHATML, "user", query);
    if (first) {
      StrBuf both = {NULL, 0, 0};
      strbuf_printf(&both, "%s\n%s", first, guide);
      put_turn_(x, t, TEMPLATE_CHATML, "assistant", both.data);
      strbuf_free(&both);
    }
    put_turn_mark_(x, t, TEMPLATE_CHATML, "assistant", 1);
    return;
  }
  int marks = form == QA_SEED003;
  if (marks) put_template_(x, t, "<user>");
  ids_put_text_(x, t, query);
  if (first) {
    if (marks) put_template_(x, t, "<think>");
    ids_put_text_(x, t, first);
    if (marks) put_template_(x, t, "</think>");
    ids_put_text_(x, t, guide);
  }
  if (marks) put_template_(x, t, "</user><assistant>");
}

#endif
