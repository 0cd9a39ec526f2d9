/*
qa.h: questions with their answers, from a file.

What it is:  the reader of {"query": ..., "answer": ...[, "reasoning": ...]} records, one a line (.jsonl) or as a list (.json).
What not:    other forms; prepro/qa.py turns GSM8K, SVAMP and others into this one.
Read before: bitnet/json.h.
Defines:     QaItem, QaSet, qa_load, qa_free; line_of, records_open, records_next, records_close for other files of records.
*/
#ifndef BITNET_QA_H
#define BITNET_QA_H

#include "json.h"

// ---------------------------------------------------------------------------------------------------------
// A file of JSON objects, one after the other.

typedef struct {
  char path[4096];
  char *text;
  size_t len, at;       // jsonl: where the next line begins
  int lines;            // .jsonl, as opposed to a .json list
  JsonDoc doc;          // of the whole list, or of the newest line
  const Json *next;     // of the list
  size_t line;          // of the newest object, from 1
  size_t counted;       // json: bytes of the text before which `line` counts the line ends
} Records;

// The line, from 1, in which text[offset] stands.
UNUSED static size_t line_of(const char *text, size_t offset) {
  size_t line = 1;
  for (size_t i = 0; i < offset; i++) line += text[i] == '\n';
  return line;
}

UNUSED static int ends_with_(const char *s, const char *end) {
  size_t n = strlen(s), k = strlen(end);
  return n >= k && strcmp(s + n - k, end) == 0;
}

// Opens a .json list or a .jsonl file; a byte-order mark is skipped. Exit 2 if it cannot be read, has another suffix or is no list.
UNUSED static void records_open(Records *r, const char *path) {
  char err[256];
  memset(r, 0, sizeof *r);
  if (snprintf(r->path, sizeof r->path, "%s", path) >= (int)sizeof r->path) die(EXIT_USAGE, "path too long: %s", path);
  r->lines = ends_with_(path, ".jsonl");
  if (!r->lines && !ends_with_(path, ".json"))
    die(EXIT_USAGE, "%s: unsupported format; expected a .jsonl file (an object a line) or a .json file (a list of objects)", path);
  r->text = read_file(path, &r->len);
  if (r->text == NULL) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  r->at = r->len >= 3 && memcmp(r->text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
  if (r->lines) return;
  size_t offset = 0;
  if (!json_parse(&r->doc, r->text + r->at, r->len - r->at, err, sizeof err)) {
    sscanf(err, "offset %zu", &offset);
    die(EXIT_USAGE, "%s:%zu: %s", path, line_of(r->text + r->at, offset), err);
  }
  if (r->doc.root->type != JSON_ARRAY) die(EXIT_USAGE, "%s: expected a list of objects; an object a line is .jsonl", path);
  r->next = r->doc.root->child;
}

// The next object, valid until the next call; NULL at the end. Blank lines are skipped; anything else that is no object exits 2.
UNUSED static const Json *records_next(Records *r) {
  char err[256];
  const Json *v = NULL;
  if (r->lines) {
    json_free(&r->doc);
    while (r->at < r->len && v == NULL) {
      char *line = r->text + r->at, *end = (char *)memchr(line, '\n', r->len - r->at);
      size_t n = end ? (size_t)(end - line) : r->len - r->at;
      r->at += n + 1;
      r->line++;
      if (strspn(line, " \t\r") >= n) continue;
      if (!json_parse(&r->doc, line, n, err, sizeof err)) die(EXIT_USAGE, "%s:%zu: %s", r->path, r->line, err);
      v = r->doc.root;
    }
  } else if (r->next) {
    v = r->next;
    r->next = v->next;
    r->line += line_of(r->text + r->counted, r->at + v->offset - r->counted) - (r->counted > 0);
    r->counted = r->at + v->offset;
  }
  if (v && v->type != JSON_OBJECT) die(EXIT_USAGE, "%s:%zu: expected an object in braces", r->path, r->line);
  return v;
}

UNUSED static void records_close(Records *r) {
  json_free(&r->doc);
  free(r->text);
  memset(r, 0, sizeof *r);
}

// Exit 2 with the place of the newest object and the names that it has.
__attribute__((noreturn)) UNUSED static void records_refuse(const Records *r, const Json *object, const char *key,
                                                            const char *expected) {
  char names[256] = "";
  for (const Json *m = object->child; m; m = m->next) {
    size_t used = strlen(names);
    snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", m->key);
  }
  die(EXIT_USAGE, "%s:%zu: %s: expected %s; the object has: %s", r->path, r->line, key, expected, names[0] ? names : "nothing");
}

// ---------------------------------------------------------------------------------------------------------
// Questions and answers.

typedef struct {
  char *query, *answer, *reasoning;   // reasoning: NULL where the record has none
  size_t line;                        // in the file
} QaItem;

typedef struct {
  QaItem *items;
  size_t n;
} QaSet;

// A member as text, a number as it would be printed. Exit 2 if it is missing (unless optional: NULL) or of another type.
UNUSED static char *qa_text_(const Records *r, const Json *object, const char *key, int optional) {
  const Json *v = json_get(object, key);
  StrBuf b = {NULL, 0, 0};
  if (optional && (v == NULL || v->type == JSON_NULL)) return NULL;
  if (v && v->type == JSON_STRING && memchr(v->s, 0, v->len) == NULL) return xstrdup(v->s);
  if (v == NULL || (v->type != JSON_INT && v->type != JSON_REAL))
    records_refuse(r, object, key, "a text without zero bytes, or a number");
  if (v->type == JSON_INT) strbuf_printf(&b, "%lld", (long long)v->i);
  else json_put_number(&b, v->d);
  return b.data;
}

// Reads all records of a file; never empty. Exit 2 with file and line. The caller frees with qa_free.
UNUSED static QaSet qa_load(const char *path) {
  QaSet set = {NULL, 0};
  Records r;
  size_t cap = 0;
  records_open(&r, path);
  for (const Json *v = records_next(&r); v; v = records_next(&r)) {
    if (set.n == cap) {
      cap = cap ? size_mul(cap, 2) : 64;
      set.items = (QaItem *)xrealloc(set.items, size_mul(cap, sizeof(QaItem)));
    }
    QaItem *item = &set.items[set.n++];
    item->query = qa_text_(&r, v, "query", 0);
    item->answer = qa_text_(&r, v, "answer", 0);
    item->reasoning = qa_text_(&r, v, "reasoning", 1);
    item->line = r.line;
  }
  records_close(&r);
  if (set.n == 0) die(EXIT_USAGE, "%s: expected records {\"query\": ..., \"answer\": ...}, found none", path);
  return set;
}

UNUSED static void qa_free(QaSet *set) {
  for (size_t i = 0; i < set->n; i++) {
    free(set->items[i].query);
    free(set->items[i].answer);
    free(set->items[i].reasoning);
  }
  free(set->items);
  set->items = NULL;
  set->n = 0;
}

#endif
