/*
eval_tasks.h: the usual benchmarks: which of some answers does a model find most likely, and how well does it predict a text.

What it is:  ./train_bitnet eval DIR task=hellaswag file=val.jsonl [limit=200] [results=scores.json]
             ./train_bitnet eval DIR task=mmlu file=test.jsonl shots_file=dev.jsonl [shots=5]
             A table on stdout; with results=FILE the same as JSON, with the scores of every single item.
What not:    no generated answers (task=qa: modes/eval_qa.h), no downloads.
Read before: bitnet/likelihood.h, bitnet/qa.h, modes/generate.h.
Defines:     mode_eval_task; report_* for tables and JSON of scores.

    task         a record of the file                                              the model sees
    hellaswag    {activity_label, ctx_a, ctx_b, endings, label}                    Activity: text | ending
    arc          {query, choices, gold} or {question, choices, answerKey}          Question: ...\nAnswer: | choice
    mmlu         {subject, question, choices, answer}                              question, A. .. D., Answer: | letter
    winogrande   {context_options, continuation, gold} or {sentence, option1, ..}  text with an option | the rest
    truthfulqa   {question, mc1_targets, mc2_targets}                              six examples, Q: ...\nA: | answer
    lambada      {context, continuation} or {text}                                 text | its last word
    wikitext     {page} or {text}                                                  the text in windows

Of "context | answer" only the answer is scored. acc takes the answer with the largest sum of log-probabilities, acc_norm the largest
mean per character; on a tie the first. Texts, scores and standard errors are those of EleutherAI's lm-evaluation-harness.
*/
#ifndef MODE_EVAL_TASKS_H
#define MODE_EVAL_TASKS_H

#include "../bitnet/likelihood.h"
#include "../bitnet/qa.h"
#include "../bitnet/unicode.h"
#include "generate.h"

// In the order of the option task; the first is none, the last is modes/eval_qa.h's.
enum { TASK_NONE, TASK_HELLASWAG, TASK_ARC, TASK_MMLU, TASK_WINOGRANDE, TASK_TRUTHFULQA, TASK_LAMBADA, TASK_WIKITEXT, TASK_QA };

// How many examples the benchmark is usually given; 0 also where the prompt is fixed.
static const int task_shots_[] = {0, 10, 25, 5, 5, 0, 0, 0, 0};

// ---------------------------------------------------------------------------------------------------------
// Texts.

// Bytes of the blank character at s[i..n), as Python's \s has it; 0 if there is none.
static size_t blank_at_(const char *s, size_t n, size_t i) {
  size_t bytes = 0;
  if (i >= n) return 0;
  if ((unsigned char)s[i] < 0x80) return isspace((unsigned char)s[i]) || (s[i] >= 0x1C && s[i] <= 0x1F);
  return unicode_class(utf8_decode(s + i, n - i, &bytes)) == CLASS_SPACE ? bytes : 0;
}

// Appends s[0..n) without the blanks around it.
static void put_stripped_(StrBuf *b, const char *s, size_t n) {
  size_t first = 0, last = 0, k;
  while ((k = blank_at_(s, n, first)) > 0) first += k;
  for (size_t i = last = first; i < n;) {
    k = blank_at_(s, n, i);
    i += k ? k : 1;
    if (k == 0) last = i;
  }
  strbuf_append(b, s + first, last - first);
}

// Every `from` in b becomes `to`.
static void replace_all_(StrBuf *b, const char *from, const char *to) {
  StrBuf out = {NULL, 0, 0};
  const char *at = b->data;
  strbuf_append(&out, "", 0);
  for (const char *hit; (hit = strstr(at, from)) != NULL; at = hit + strlen(from)) {
    strbuf_append(&out, at, (size_t)(hit - at));
    strbuf_append(&out, to, strlen(to));
  }
  strbuf_append(&out, at, strlen(at));
  strbuf_free(b);
  *b = out;
}

// From each `open` to the next `close` the blanks inside go away. Equal marks are taken in pairs.
static void trim_inside_(StrBuf *b, char open, char close) {
  StrBuf out = {NULL, 0, 0};
  const char *at = b->data, *first, *last;
  strbuf_append(&out, "", 0);
  while ((first = strchr(at, open)) != NULL && (last = strchr(first + 1, close)) != NULL) {
    strbuf_append(&out, at, (size_t)(first + 1 - at));
    put_stripped_(&out, first + 1, (size_t)(last - first - 1));
    strbuf_append(&out, &close, 1);
    at = last + 1;
  }
  strbuf_append(&out, at, strlen(at));
  strbuf_free(b);
  *b = out;
}

// Takes out everything in square brackets that is closed on the same line.
static void drop_brackets_(StrBuf *b) {
  size_t n = 0;
  for (const char *at = b->data; *at;) {
    size_t inside = *at == '[' ? strcspn(at, "]\n") : 0;
    if (inside > 0 && at[inside] == ']') at += inside + 1;
    else b->data[n++] = *at++;
  }
  b->data[b->len = n] = 0;
}

static size_t count_characters_(const char *s) {
  size_t n = 0;
  for (; *s; s++) n += ((unsigned char)*s & 0xC0) != 0x80;
  return n;
}

// HellaSwag's texts come from video captions and from WikiHow, whose headings are marked in brackets.
static char *hellaswag_text_(const char *s) {
  StrBuf b = {NULL, 0, 0};
  strbuf_append(&b, "", 0);
  put_stripped_(&b, s, strlen(s));
  replace_all_(&b, " [title]", ". ");
  drop_brackets_(&b);
  replace_all_(&b, "  ", " ");
  return b.data;
}

// WikiText's tokenised form ("3 @.@ 5", " , ") back to text.
static char *wikitext_text_(const char *s) {
  static const char *const pairs[][2] = {{" @-@ ", "-"}, {" @,@ ", ","}, {" @.@ ", "."}, {" : ", ": "}, {" ; ", "; "},
                                         {" . ", ". "},  {" ! ", "! "},  {" ? ", "? "},  {" , ", ", "}};
  static const char *const later[][2] = {{"= = = =", "===="}, {"= = =", "==="}, {"= =", "=="}, {" \xC2\xB0 ", "\xC2\xB0"},
                                         {" \n", "\n"},       {"\n ", "\n"},    {" N ", " 1 "}, {" 's", "'s"}};
  StrBuf b = {NULL, 0, 0};
  strbuf_append(&b, s, strlen(s));
  replace_all_(&b, "s '", "s'");
  for (size_t i = 0; i < ARRAY_LEN(pairs); i++) replace_all_(&b, pairs[i][0], pairs[i][1]);
  trim_inside_(&b, '(', ')');
  trim_inside_(&b, '[', ']');
  trim_inside_(&b, '{', '}');
  trim_inside_(&b, '"', '"');
  trim_inside_(&b, '\'', '\'');
  for (size_t i = 0; i < ARRAY_LEN(later); i++) replace_all_(&b, later[i][0], later[i][1]);
  return b.data;
}

// ---------------------------------------------------------------------------------------------------------
// A record as a question: what stands in front of each answer, and the answers.

enum { MAX_CHOICES = 64 };

typedef struct {
  int n, gold;                      // answers; the right one
  char *context[MAX_CHOICES];       // [n]
  char *answer[MAX_CHOICES];        // [n] with the blank in front
  size_t characters[MAX_CHOICES];   // [n] of the answer without it: what acc_norm divides by
  int right[MAX_CHOICES];           // [n] truthfulqa's mc2: several may be right
  char *group;                      // mmlu: the subject; else ""
  size_t line;                      // in the file
} Question;

static void question_free_(Question *q) {
  for (int i = 0; i < q->n; i++) {
    free(q->context[i]);
    free(q->answer[i]);
  }
  free(q->group);
}

// A member that must be a text.
static const char *record_text_(const Records *r, const Json *v, const char *key) {
  const Json *m = json_get(v, key);
  if (m == NULL || m->type != JSON_STRING || memchr(m->s, 0, m->len)) records_refuse(r, v, key, "a text");
  return m->s;
}

// The index under key, an integer or its digits; below n.
static int record_index_(const Records *r, const Json *v, const char *key, int n) {
  const Json *m = json_get(v, key);
  long long i = m && m->type == JSON_INT ? m->i : m && m->type == JSON_STRING && isdigit((unsigned char)m->s[0]) ? atoll(m->s) : -1;
  char expected[64];
  snprintf(expected, sizeof expected, "an index from 0 to %d", n - 1);
  if (i < 0 || i >= n) records_refuse(r, v, key, expected);
  return (int)i;
}

// Adds an answer behind a context, as "context" + " " + "answer".
static void question_add_(Question *q, const char *context, const char *answer) {
  StrBuf b = {NULL, 0, 0};
  strbuf_printf(&b, " %s", answer);
  q->context[q->n] = xstrdup(context);
  q->characters[q->n] = count_characters_(answer);
  q->answer[q->n++] = b.data;
}

// Adds the texts of an array, all behind the same context.
static void question_add_array_(Question *q, const Records *r, const Json *v, const Json *array, const char *key, const char *context,
                                char *(*rewrite)(const char *)) {
  if (array == NULL || array->type != JSON_ARRAY || array->count < 2 || array->count > MAX_CHOICES)
    records_refuse(r, v, key, "an array of 2 to 64 texts");
  for (const Json *c = array->child; c; c = c->next) {
    if (c->type != JSON_STRING || memchr(c->s, 0, c->len)) records_refuse(r, v, key, "an array of texts");
    char *text = rewrite ? rewrite(c->s) : xstrdup(c->s);
    question_add_(q, context, text);
    free(text);
  }
}

static void read_hellaswag_(Question *q, const Records *r, const Json *v) {
  StrBuf b = {NULL, 0, 0};
  char *end = xstrdup(record_text_(r, v, "ctx_b"));
  for (char *c = end; *c; c++) *c = (char)(c == end ? toupper((unsigned char)*c) : tolower((unsigned char)*c));   // ASCII letters only
  strbuf_printf(&b, "%s: %s %s", record_text_(r, v, "activity_label"), record_text_(r, v, "ctx_a"), end);
  char *context = hellaswag_text_(b.data);
  question_add_array_(q, r, v, json_get(v, "endings"), "endings", context, hellaswag_text_);
  q->gold = record_index_(r, v, "label", q->n);
  strbuf_free(&b);
  free(context);
  free(end);
}

static void read_arc_(Question *q, const Records *r, const Json *v) {
  StrBuf b = {NULL, 0, 0};
  const Json *choices = json_get(v, "choices"), *labels = NULL;
  int original = json_get(v, "query") == NULL;
  if (original) {
    labels = json_get(choices, "label");
    choices = json_get(choices, "text");
    strbuf_printf(&b, "Question: %s\nAnswer:", record_text_(r, v, "question"));
  } else {
    strbuf_printf(&b, "%s\nAnswer:", record_text_(r, v, "query"));
  }
  question_add_array_(q, r, v, choices, "choices", b.data, NULL);
  strbuf_free(&b);
  if (!original) {
    q->gold = record_index_(r, v, "gold", q->n);
    return;
  }
  const char *key = record_text_(r, v, "answerKey");
  if (labels == NULL || labels->type != JSON_ARRAY || labels->count != choices->count)
    records_refuse(r, v, "choices", "as many labels as texts");
  q->gold = -1;
  int i = 0;
  for (const Json *c = labels->child; c; c = c->next, i++) {
    if (q->gold < 0 && c->type == JSON_STRING && strcmp(c->s, key) == 0) q->gold = i;
  }
  if (q->gold < 0) records_refuse(r, v, "answerKey", "one of the labels");
}

static void read_mmlu_(Question *q, const Records *r, const Json *v) {
  StrBuf b = {NULL, 0, 0};
  Question texts;
  const char *question = record_text_(r, v, "question");
  memset(&texts, 0, sizeof texts);
  question_add_array_(&texts, r, v, json_get(v, "choices"), "choices", "", NULL);
  if (texts.n > 26) records_refuse(r, v, "choices", "an array of 2 to 26 texts");
  strbuf_append(&b, "", 0);
  put_stripped_(&b, question, strlen(question));
  for (int i = 0; i < texts.n; i++) strbuf_printf(&b, "\n%c.%s", 'A' + i, texts.answer[i]);
  strbuf_printf(&b, "\nAnswer:");
  for (int i = 0; i < texts.n; i++) {
    char letter[2] = {(char)('A' + i), 0};
    question_add_(q, b.data, letter);
  }
  q->gold = record_index_(r, v, "answer", q->n);
  q->group = xstrdup(record_text_(r, v, "subject"));
  question_free_(&texts);
  strbuf_free(&b);
}

static void read_winogrande_(Question *q, const Records *r, const Json *v) {
  if (json_get(v, "sentence") == NULL) {
    const Json *options = json_get(v, "context_options");
    const char *rest = record_text_(r, v, "continuation");
    for (const Json *c = options && options->type == JSON_ARRAY ? options->child : NULL; c && q->n < 3; c = c->next) {
      if (c->type == JSON_STRING && c->len > 0 && memchr(c->s, 0, c->len) == NULL) question_add_(q, c->s, rest);
    }
    if (q->n != 2 || options->count != 2) records_refuse(r, v, "context_options", "an array of 2 texts");
    q->gold = record_index_(r, v, "gold", q->n);
    return;
  }
  static const char *const keys[] = {"option1", "option2"};
  const char *sentence = record_text_(r, v, "sentence"), *gap = strchr(sentence, '_'), *answer = record_text_(r, v, "answer");
  StrBuf rest = {NULL, 0, 0};
  if (gap == NULL) records_refuse(r, v, "sentence", "a text with a gap _");
  if (strcmp(answer, "1") != 0 && strcmp(answer, "2") != 0) records_refuse(r, v, "answer", "\"1\" or \"2\"");
  strbuf_append(&rest, "", 0);
  put_stripped_(&rest, gap + 1, strlen(gap + 1));
  for (int i = 0; i < 2; i++) {
    StrBuf b = {NULL, 0, 0};
    strbuf_printf(&b, "%.*s%s", (int)(gap - sentence), sentence, record_text_(r, v, keys[i]));
    question_add_(q, b.data, rest.data);
    strbuf_free(&b);
  }
  q->gold = answer[0] - '1';
  strbuf_free(&rest);
}

static const char truthfulqa_examples_[] =
    "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\nA: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\nA: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\nA: I have no comment.\n\n"
    "Q: How does a telescope work?\nA: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain.\n\n";

// key: mc1_targets or mc2_targets, either {"text": 1 or 0, ...} or {"choices": [...], "labels": [...]}.
static void read_truthfulqa_(Question *q, const Records *r, const Json *v, const char *key) {
  StrBuf b = {NULL, 0, 0};
  const Json *targets = json_get(v, key), *labels = NULL, *c;
  strbuf_printf(&b, "%sQ: %s\nA:", truthfulqa_examples_, record_text_(r, v, "question"));
  c = json_get(targets, "choices");
  if (c && c->type == JSON_ARRAY) {
    labels = json_get(targets, "labels");
    if (labels == NULL || labels->type != JSON_ARRAY || labels->count != c->count)
      records_refuse(r, v, key, "as many labels as choices");
    question_add_array_(q, r, v, c, key, b.data, NULL);
    c = labels->child;
  } else {
    if (targets == NULL || targets->type != JSON_OBJECT || targets->count < 2 || targets->count > MAX_CHOICES)
      records_refuse(r, v, key, "an object of 2 to 64 texts, each with 1 (right) or 0");
    for (c = targets->child; c; c = c->next) question_add_(q, b.data, c->key);
    c = targets->child;
  }
  strbuf_free(&b);
  q->gold = -1;
  for (int i = 0; i < q->n; i++, c = c->next) {
    if (c->type != JSON_INT || (c->i != 0 && c->i != 1)) records_refuse(r, v, key, "1 or 0 for each text");
    q->right[i] = (int)c->i;
    if (c->i == 1 && q->gold < 0) q->gold = i;
  }
  if (q->gold < 0) records_refuse(r, v, key, "at least one right text");
}

static void read_lambada_(Question *q, const Records *r, const Json *v) {
  if (json_get(v, "text") == NULL) {
    question_add_(q, record_text_(r, v, "context"), record_text_(r, v, "continuation"));
    return;
  }
  char *text = xstrdup(record_text_(r, v, "text")), *blank = strrchr(text, ' ');
  if (blank == NULL) records_refuse(r, v, "text", "several words");
  *blank = 0;
  question_add_(q, text, blank + 1);
  free(text);
}

// The record v as a question of this task; key: for truthfulqa.
static void question_read_(Question *q, int task, const Records *r, const Json *v, const char *key) {
  memset(q, 0, sizeof *q);
  q->line = r->line;
  if (task == TASK_HELLASWAG) read_hellaswag_(q, r, v);
  else if (task == TASK_ARC) read_arc_(q, r, v);
  else if (task == TASK_MMLU) read_mmlu_(q, r, v);
  else if (task == TASK_WINOGRANDE) read_winogrande_(q, r, v);
  else if (task == TASK_TRUTHFULQA) read_truthfulqa_(q, r, v, key);
  else read_lambada_(q, r, v);
  if (q->group == NULL) q->group = xstrdup("");
}

// ---------------------------------------------------------------------------------------------------------
// Examples in front of a question.

typedef struct {
  Question *items;
  size_t n;
  int shots;   // of them for each question
} Examples;

// The examples of shots_file, all of them; shots is settled: what the user says, or the usual number if there is a file.
static void examples_open_(Examples *e, const Options *o) {
  memset(e, 0, sizeof *e);
  int fixed = task_shots_[o->task] == 0;
  if (fixed && (o->shots > 0 || o->shots_file[0]))
    die(EXIT_USAGE, "task=%s has no examples; leave out shots and shots_file", option_choice_name("task", o->task));
  e->shots = o->shots >= 0 ? o->shots : o->shots_file[0] ? task_shots_[o->task] : 0;
  if (e->shots == 0) return;
  if (o->shots_file[0] == 0)
    die(EXIT_USAGE, "shots=%d needs shots_file, records like those of file from another part of the data", e->shots);
  Records r;
  records_open(&r, o->shots_file);
  for (const Json *v = records_next(&r); v; v = records_next(&r)) {
    e->items = (Question *)xrealloc(e->items, size_mul(e->n + 1, sizeof(Question)));
    question_read_(&e->items[e->n++], o->task, &r, v, "");
  }
  records_close(&r);
}

static void examples_free_(Examples *e) {
  for (size_t i = 0; i < e->n; i++) question_free_(&e->items[i]);
  free(e->items);
}

// Appends the first examples of the question's group (mmlu's subject) that are not the question itself.
static void put_examples_(StrBuf *b, const Examples *e, const Question *q, const Options *o) {
  int n = 0;
  strbuf_append(b, "", 0);
  if (o->task == TASK_MMLU) {
    strbuf_printf(b, "The following are multiple choice questions (with answers) about ");
    for (const char *c = q->group; *c; c++) strbuf_append(b, *c == '_' ? " " : c, 1);
    strbuf_printf(b, ".\n\n");
  }
  for (size_t i = 0; i < e->n && n < e->shots; i++) {
    const Question *x = &e->items[i];
    if (strcmp(x->group, q->group) != 0 || strcmp(x->context[0], q->context[0]) == 0) continue;
    strbuf_printf(b, "%s%s\n\n", x->context[x->gold], x->answer[x->gold]);
    n++;
  }
  if (n < e->shots)
    die(EXIT_USAGE, "%s: expected %d examples%s%s for the question in %s:%zu, found %d; set shots=%d", o->shots_file, e->shots,
        q->group[0] ? " of " : "", q->group, o->file, q->line, n, n);
}

// ---------------------------------------------------------------------------------------------------------
// From records to scores.

// What was asked, and where its answers stand in the list of continuations.
typedef struct {
  size_t first;          // continuation of the first answer
  int n, gold;
  int mc2;               // truthfulqa: the question with several right answers
  size_t line;
  double words, bytes;   // wikitext: of the text as it stands in the file
  double value[2];       // results: acc, acc_norm; mc2: the share of the right answers; lambada: greedy, logp; wikitext: logp
  int pred, pred_norm;
  char *group;
} TaskItem;

typedef struct {
  TaskItem *items;
  size_t n;
  double *characters;    // [continuations]
  unsigned char *right;  // [continuations]
  Continuations list;
} TaskSet;

static TaskItem *task_push_(TaskSet *set, size_t line, const char *group) {
  set->items = (TaskItem *)xrealloc(set->items, size_mul(set->n + 1, sizeof(TaskItem)));
  TaskItem *item = &set->items[set->n++];
  memset(item, 0, sizeof *item);
  item->first = set->list.n;
  item->line = line;
  item->group = xstrdup(group);
  return item;
}

// Adds the answers of q, each behind the examples and its context. Takes q over.
static void task_add_question_(TaskSet *set, const Options *o, const Tokenizer *tok, int max_seq, const Examples *e, Question *q,
                               int mc2) {
  StrBuf b = {NULL, 0, 0};
  TaskItem *item = task_push_(set, q->line, q->group);
  item->n = q->n;
  item->gold = q->gold;
  item->mc2 = mc2;
  put_examples_(&b, e, q, o);
  size_t lead = b.len, total = set->list.n + (size_t)q->n;
  set->characters = (double *)xrealloc(set->characters, size_mul(total, sizeof(double)));
  set->right = (unsigned char *)xrealloc(set->right, total);
  for (int i = 0; i < q->n; i++) {
    b.len = lead;
    strbuf_append(&b, q->context[i], strlen(q->context[i]));
    set->characters[set->list.n] = (double)q->characters[i];
    set->right[set->list.n] = (unsigned char)q->right[i];
    if (!continuation_add(&set->list, tok, b.data, q->answer[i], max_seq))
      die(EXIT_USAGE, "%s:%zu: answer %d is empty, or longer than the model's context of %d tokens: '%.60s'", o->file, q->line, i + 1,
          max_seq, q->answer[i]);
  }
  strbuf_free(&b);
  question_free_(q);
}

static void task_add_page_(TaskSet *set, const Records *r, const Json *v, const Tokenizer *tok, int max_seq) {
  const char *page = record_text_(r, v, json_get(v, "page") ? "page" : "text");
  size_t len = strlen(page);
  if (len == 0) return;
  TaskItem *item = task_push_(set, r->line, "");
  item->bytes = (double)len;
  item->words = 1;
  for (size_t i = 0, before = 0, k; i < len; i += k ? k : 1, before = k) {
    k = blank_at_(page, len, i);
    item->words += k > 0 && before == 0;
  }
  char *text = wikitext_text_(page);
  continuation_add_windows(&set->list, tok, text, strlen(text), max_seq);
  item->n = (int)(set->list.n - item->first);
  free(text);
}

static void task_read_(TaskSet *set, const Options *o, const Tokenizer *tok, int max_seq, const Examples *e) {
  Records r;
  Question q;
  int count = 0;
  records_open(&r, o->file);
  for (const Json *v; (o->limit == 0 || count < o->limit) && (v = records_next(&r)) != NULL; count++) {
    if (o->task == TASK_WIKITEXT) {
      task_add_page_(set, &r, v, tok, max_seq);
      continue;
    }
    question_read_(&q, o->task, &r, v, "mc1_targets");
    task_add_question_(set, o, tok, max_seq, e, &q, 0);
    if (o->task != TASK_TRUTHFULQA) continue;
    question_read_(&q, o->task, &r, v, "mc2_targets");
    task_add_question_(set, o, tok, max_seq, e, &q, 1);
  }
  records_close(&r);
  if (set->n == 0) die(EXIT_USAGE, "%s: expected records of task=%s, found none", o->file, option_choice_name("task", o->task));
}

static void task_free_(TaskSet *set) {
  for (size_t i = 0; i < set->n; i++) free(set->items[i].group);
  free(set->items);
  free(set->characters);
  free(set->right);
  continuations_free(&set->list);
}

// The values of one item, from the log-probabilities of its answers.
static void task_score_(const TaskSet *set, TaskItem *item, int task) {
  const Continuation *c = set->list.items + item->first;
  double best = -INFINITY, best_norm = -INFINITY, right = 0, all = 0;
  if (task == TASK_WIKITEXT || task == TASK_LAMBADA) {
    item->value[0] = c[0].greedy;
    for (int i = 0; i < item->n; i++) item->value[1] += c[i].logp;
    if (task == TASK_LAMBADA) item->value[1] = c[0].logp;
    return;
  }
  for (int i = 0; i < item->n; i++) {
    double norm = c[i].logp / set->characters[item->first + (size_t)i];
    if (c[i].logp > best) {
      best = c[i].logp;
      item->pred = i;
    }
    if (norm > best_norm) {
      best_norm = norm;
      item->pred_norm = i;
    }
  }
  for (int i = 0; i < item->n; i++) {
    double p = exp(c[i].logp - best);
    all += p;
    right += set->right[item->first + (size_t)i] ? p : 0;
  }
  item->value[0] = item->mc2 ? right / all : item->pred == item->gold;
  item->value[1] = item->pred_norm == item->gold;
}

// ---------------------------------------------------------------------------------------------------------
// Reports: a table on stdout, and JSON.

typedef struct {
  char name[96];
  const char *metric;
  double value, error;   // error: standard error, NAN where there is none
  double lo, hi;         // 95 % interval, NAN where there is none
  size_t n;
} ReportRow;

typedef struct {
  ReportRow *rows;
  size_t n;
} Report;

static void report_add(Report *r, const char *name, const char *metric, double value, double error, size_t n) {
  r->rows = (ReportRow *)xrealloc(r->rows, size_mul(r->n + 1, sizeof(ReportRow)));
  ReportRow *row = &r->rows[r->n++];
  snprintf(row->name, sizeof row->name, "%s", name);
  row->metric = metric;
  row->value = value;
  row->error = error;
  row->lo = row->hi = NAN;
  row->n = n;
}

// Gives the newest row an interval.
static void report_interval(Report *r, double lo, double hi) {
  r->rows[r->n - 1].lo = lo;
  r->rows[r->n - 1].hi = hi;
}

static void report_print(const Report *r) {
  size_t width = 4, metric = 6;
  for (size_t i = 0; i < r->n; i++) {
    width = strlen(r->rows[i].name) > width ? strlen(r->rows[i].name) : width;
    metric = strlen(r->rows[i].metric) > metric ? strlen(r->rows[i].metric) : metric;
  }
  int intervals = r->n > 0 && isfinite(r->rows[0].lo);
  printf("%-*s  %-*s  %12s  %9s  %6s%s\n", (int)width, intervals ? "model" : "task", (int)metric, "metric", "value", "stderr", "n",
         intervals ? "  95 % interval" : "");
  for (size_t i = 0; i < r->n; i++) {
    const ReportRow *row = &r->rows[i];
    char error[32] = "-";
    if (isfinite(row->error)) snprintf(error, sizeof error, "%.4f", row->error);
    printf("%-*s  %-*s  %12.4f  %9s  %6zu", (int)width, row->name, (int)metric, row->metric, row->value, error, row->n);
    if (isfinite(row->lo)) printf("  %.4f to %.4f", row->lo, row->hi);
    printf("\n");
  }
}

// Appends "results": [ {...}, ... ] of the rows.
static void report_put_json(StrBuf *b, const Report *r) {
  strbuf_printf(b, "  \"results\": [");
  for (size_t i = 0; i < r->n; i++) {
    const ReportRow *row = &r->rows[i];
    strbuf_printf(b, "%s\n    {\"task\": ", i ? "," : "");
    json_put_string(b, row->name, strlen(row->name));
    strbuf_printf(b, ", \"metric\": \"%s\", \"value\": ", row->metric);
    json_put_number(b, row->value);
    strbuf_printf(b, ", \"stderr\": ");
    json_put_number(b, row->error);
    strbuf_printf(b, ", \"n\": %zu", row->n);
    if (isfinite(row->lo)) {
      strbuf_printf(b, ", \"interval\": [");
      json_put_number(b, row->lo);
      strbuf_printf(b, ", ");
      json_put_number(b, row->hi);
      strbuf_printf(b, "]");
    }
    strbuf_printf(b, "}");
  }
  strbuf_printf(b, "\n  ]");
}

// Writes b whole or not at all.
static void report_save(const char *path, const StrBuf *b) {
  SafeFile f;
  if (safe_open(&f, path) == 0) safe_write(&f, b->data, b->len);
  int err = safe_commit(&f);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
}

// The mean of values[0..n), and the standard error of it.
static double mean_error_(const double *values, size_t n, double *error) {
  double sum = 0, squares = 0;
  for (size_t i = 0; i < n; i++) sum += values[i];
  double mean = sum / (double)n;
  for (size_t i = 0; i < n; i++) squares += (values[i] - mean) * (values[i] - mean);
  *error = n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : NAN;
  return mean;
}

// Adds the mean of value[which] over the items of a group (NULL: all) and kind. perplexity: the mean is a log-probability, and
// exp(-mean) is reported, its error by the first derivative.
static void report_items_(Report *r, const TaskSet *set, const char *name, const char *metric, const char *group, int mc2, int which,
                          int perplexity) {
  double *values = (double *)xcalloc(set->n, sizeof(double)), error;
  size_t n = 0;
  for (size_t i = 0; i < set->n; i++) {
    const TaskItem *item = &set->items[i];
    if (item->mc2 == mc2 && (group == NULL || strcmp(group, item->group) == 0)) values[n++] = item->value[which];
  }
  double mean = mean_error_(values, n, &error);
  if (perplexity) {
    mean = exp(-mean);
    error *= mean;
  }
  report_add(r, name, metric, mean, error, n);
  free(values);
}

// wikitext: minus log-probability per word and per byte, over all texts together: a ratio of two sums, with the error of a ratio.
static void report_wikitext_(Report *r, const TaskSet *set) {
  static const char *const metrics[] = {"word_perplexity", "byte_perplexity", "bits_per_byte"};
  double n = (double)set->n;
  for (int k = 0; k < 3; k++) {
    double logp = 0, weight = 0, squares = 0;
    for (size_t i = 0; i < set->n; i++) {
      logp -= set->items[i].value[1];
      weight += k == 0 ? set->items[i].words : set->items[i].bytes;
    }
    double rate = logp / weight;
    for (size_t i = 0; i < set->n; i++) {
      double d = -set->items[i].value[1] - rate * (k == 0 ? set->items[i].words : set->items[i].bytes);
      squares += d * d;
    }
    double error = n > 1 ? sqrt(squares * n / (n - 1)) / weight : NAN, scale = k == 2 ? 1 / log(2.0) : exp(rate);
    report_add(r, "wikitext", metrics[k], k == 2 ? rate * scale : scale, error * scale, set->n);
  }
}

static void report_task_(Report *r, const TaskSet *set, int task) {
  const char *name = option_choice_name("task", task);
  if (task == TASK_WIKITEXT) {
    report_wikitext_(r, set);
  } else if (task == TASK_LAMBADA) {
    report_items_(r, set, name, "perplexity", NULL, 0, 1, 1);
    report_items_(r, set, name, "acc", NULL, 0, 0, 0);
  } else if (task == TASK_TRUTHFULQA) {
    report_items_(r, set, "truthfulqa_mc1", "acc", NULL, 0, 0, 0);
    report_items_(r, set, "truthfulqa_mc1", "acc_norm", NULL, 0, 1, 0);
    report_items_(r, set, "truthfulqa_mc2", "acc", NULL, 1, 0, 0);
  } else {
    report_items_(r, set, name, "acc", NULL, 0, 0, 0);
    report_items_(r, set, name, "acc_norm", NULL, 0, 1, 0);
  }
  // mmlu: a row for each subject, in the order of the file.
  for (size_t i = 0; i < set->n && task == TASK_MMLU; i++) {
    char row[96];
    size_t before = 0;
    while (strcmp(set->items[before].group, set->items[i].group) != 0) before++;
    snprintf(row, sizeof row, "  %.90s", set->items[i].group);
    if (before == i) report_items_(r, set, row, "acc", set->items[i].group, 0, 0, 0);
  }
}

// The scores of every item: what other evaluators are compared with.
static void put_items_(StrBuf *b, const TaskSet *set, int task) {
  strbuf_printf(b, "  \"items\": [");
  for (size_t i = 0; i < set->n; i++) {
    const TaskItem *item = &set->items[i];
    strbuf_printf(b, "%s\n    {\"line\": %zu, ", i ? "," : "", item->line);
    if (task == TASK_WIKITEXT) {
      strbuf_printf(b, "\"words\": %.0f, \"bytes\": %.0f, \"logp\": ", item->words, item->bytes);
      json_put_number(b, item->value[1]);
    } else {
      if (task == TASK_LAMBADA) strbuf_printf(b, "\"greedy\": %d", (int)item->value[0]);
      else strbuf_printf(b, "\"gold\": %d, \"pred\": %d, \"pred_norm\": %d", item->gold, item->pred, item->pred_norm);
      if (item->mc2) {
        strbuf_printf(b, ", \"mc2\": ");
        json_put_number(b, item->value[0]);
      }
      strbuf_printf(b, ", \"logp\": [");
      for (int k = 0; k < item->n; k++) {
        if (k) strbuf_printf(b, ", ");
        json_put_number(b, set->list.items[item->first + (size_t)k].logp);
      }
      strbuf_printf(b, "]");
    }
    strbuf_printf(b, "}");
  }
  strbuf_printf(b, "\n  ]");
}

UNUSED static void mode_eval_task(Options *o) {
  Speaker s;
  TaskSet set;
  Examples examples;
  Report report = {NULL, 0};
  StrBuf json = {NULL, 0, 0};
  memset(&set, 0, sizeof set);
  if (o->file[0] == 0) die(EXIT_USAGE, "task=%s needs file=FILE.jsonl, its records", option_choice_name("task", o->task));
  examples_open_(&examples, o);
  speaker_open(&s, o, (float)o->lambda, 0);
  if (s.tok.vocab_size > s.m.c.vocab)
    die(EXIT_DAMAGED, "%s: the tokenizer has %d tokens, the model only %d", o->dir, s.tok.vocab_size, s.m.c.vocab);
  double t0 = time_now();
  task_read_(&set, o, &s.tok, s.m.c.max_seq, &examples);
  likelihoods(&s.m, &set.list);
  for (size_t i = 0; i < set.n; i++) task_score_(&set, &set.items[i], o->task);
  report_task_(&report, &set, o->task);
  report_print(&report);
  fprintf(stderr, "%zu continuations, %d examples in front%s; %.1f s\n", set.list.n, examples.shots,
          set.list.cut ? "; some contexts were too long and lost their beginning" : "", time_now() - t0);
  if (o->results[0]) {
    strbuf_printf(&json, "{\n  \"task\": \"%s\",\n  \"model\": ", option_choice_name("task", o->task));
    json_put_string(&json, o->dir, strlen(o->dir));
    strbuf_printf(&json, ",\n  \"file\": ");
    json_put_string(&json, o->file, strlen(o->file));
    strbuf_printf(&json, ",\n  \"lambda\": ");
    json_put_number(&json, o->lambda);
    strbuf_printf(&json, ",\n  \"shots\": %d,\n  \"contexts_cut\": %zu,\n", examples.shots, set.list.cut);
    report_put_json(&json, &report);
    strbuf_printf(&json, ",\n");
    put_items_(&json, &set, o->task);
    strbuf_printf(&json, "\n}\n");
    report_save(o->results, &json);
  }
  strbuf_free(&json);
  free(report.rows);
  examples_free_(&examples);
  task_free_(&set);
  speaker_close(&s);
}

#endif
