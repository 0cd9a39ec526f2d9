/*
tokenizer.h: text to token ids and back.

What it is:  a vocabulary (id -> bytes, bytes -> id) and the two directions over it. Today every piece is one character;
             the same struct and the same calls carry byte-level BPE later (merges join the pieces that are found here).
             On disk it is Hugging Face's pair tokenizer.json + tokenizer_config.json, which `transformers` loads as it is.
What not:    no training of vocabularies (prepro/ does that), no chat templates, no adding of <s> or </s>: callers place
             special tokens by id. Special tokens that a user writes out in a text are plain text, never ids, so an
             untrusted text cannot end a turn.
Read before: bitnet/utils.h, bitnet/json.h.
Defines:     Tokenizer; tokenizer_arithmetic, tokenizer_encode, tokenizer_decode, tokenizer_piece, tokenizer_id,
             tokenizer_save, tokenizer_load, tokenizer_hash, tokenizer_free.
*/
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "bitnet/json.h"
#include "bitnet/utils.h"

typedef struct {
  int vocab_size;     // ids 0 .. vocab_size-1 have a piece
  int vocab_padded;   // rows of the model's embedding; ids from vocab_size on exist there but are never text
  int bos_id, eos_id, pad_id, unk_id;   // -1: the vocabulary has no such token

  // Piece i is bytes[offset[i]] .. bytes[offset[i+1]-1]: one pool instead of one allocation per piece.
  StrBuf bytes;
  size_t *offset;           // [vocab_size+1]
  unsigned char *special;   // [vocab_size] 1 = a mark like </s>: never found in a text, skipped by decode

  // bytes -> id: a hash table with open addressing; a power of two of slots, at least half of them empty (-1).
  int *slot;
  size_t n_slots;
} Tokenizer;

// ---------------------------------------------------------------------------------------------------------
// Building and looking up.

// The bytes of a piece (not zero-terminated; *len of them), or NULL and 0 for an id that has no piece: negative, or one
// of the model's padding rows.
UNUSED static const char *tokenizer_piece(const Tokenizer *t, int id, size_t *len) {
  *len = 0;
  if (id < 0 || id >= t->vocab_size) return NULL;
  *len = t->offset[id + 1] - t->offset[id];
  return t->bytes.data + t->offset[id];
}

// The slot that holds this piece, or the empty slot where it would go.
UNUSED static size_t tokenizer_slot_(const Tokenizer *t, const char *s, size_t len) {
  size_t at = (size_t)hash_bytes(s, len) & (t->n_slots - 1), n;
  for (; t->slot[at] >= 0; at = (at + 1) & (t->n_slots - 1)) {
    const char *piece = tokenizer_piece(t, t->slot[at], &n);
    if (n == len && memcmp(piece, s, len) == 0) break;
  }
  return at;
}

// The id of a piece given by its exact bytes, special or not; -1 if the vocabulary has no such piece.
UNUSED static int tokenizer_id(const Tokenizer *t, const char *s, size_t len) {
  return t->slot[tokenizer_slot_(t, s, len)];
}

// An empty vocabulary with room for n pieces.
UNUSED static void tokenizer_begin_(Tokenizer *t, size_t n) {
  memset(t, 0, sizeof *t);
  t->bos_id = t->eos_id = t->pad_id = t->unk_id = -1;
  t->offset = (size_t *)xcalloc(n + 1, sizeof *t->offset);
  t->special = (unsigned char *)xcalloc(n, 1);
  for (t->n_slots = 16; t->n_slots < 2 * n; t->n_slots *= 2) {}
  t->slot = (int *)xmalloc(size_mul(t->n_slots, sizeof *t->slot));
  for (size_t i = 0; i < t->n_slots; i++) t->slot[i] = -1;
}

// Appends the piece with the next id. Returns that id, or -1 if the same bytes are already a piece.
UNUSED static int tokenizer_add_(Tokenizer *t, const char *s, size_t len, int special) {
  size_t at = tokenizer_slot_(t, s, len);
  if (t->slot[at] >= 0) return -1;
  int id = t->vocab_size++;
  strbuf_append(&t->bytes, s, len);
  t->offset[id + 1] = t->bytes.len;
  t->special[id] = (unsigned char)special;
  t->slot[at] = id;
  t->vocab_padded = t->vocab_size;
  return id;
}

UNUSED static void tokenizer_free(Tokenizer *t) {
  strbuf_free(&t->bytes);
  free(t->offset);
  free(t->special);
  free(t->slot);
  memset(t, 0, sizeof *t);
}

// The 20 tokens of the arithmetic task. Ids 20 .. 31 are padding: 32 rows suit the matrix kernels better than 20.
UNUSED static void tokenizer_arithmetic(Tokenizer *t) {
  static const char *const characters = "0123456789+-*/= ";
  tokenizer_begin_(t, 20);
  for (const char *c = characters; *c; c++) tokenizer_add_(t, c, 1, 0);
  t->pad_id = tokenizer_add_(t, "<pad>", 5, 1);   // 16
  t->bos_id = tokenizer_add_(t, "<s>", 3, 1);     // 17
  t->eos_id = tokenizer_add_(t, "</s>", 4, 1);    // 18
  t->unk_id = tokenizer_add_(t, "<unk>", 5, 1);   // 19
  t->vocab_padded = 32;
}

// ---------------------------------------------------------------------------------------------------------
// Encode and decode.

// The ids of text[0..len). Returns how many the text needs, which may be more than cap; only the first cap are written
// (cap = 0 counts). A character without a piece, and every byte that is not UTF-8, becomes <unk>.
UNUSED static size_t tokenizer_encode(const Tokenizer *t, const char *text, size_t len, int *ids, size_t cap) {
  size_t n = 0;
  for (size_t at = 0; at < len; n++) {
    size_t bytes = utf8_char(text + at, len - at);
    int id = bytes ? tokenizer_id(t, text + at, bytes) : -1;
    if (id < 0 || t->special[id]) id = t->unk_id;
    if (n < cap) ids[n] = id;
    at += bytes ? bytes : 1;
  }
  return n;
}

// Appends the text of ids[0..n) to out. Special tokens and ids without a piece add nothing.
UNUSED static void tokenizer_decode(const Tokenizer *t, const int *ids, size_t n, StrBuf *out) {
  strbuf_append(out, "", 0);   // the text of no tokens is an empty string, not a NULL pointer
  for (size_t i = 0; i < n; i++) {
    size_t len;
    const char *piece = tokenizer_piece(t, ids[i], &len);
    if (piece && !t->special[ids[i]]) strbuf_append(out, piece, len);
  }
}

// A number for "made with this very vocabulary": every piece in the order of ids, as its length (uint32, little-endian),
// its bytes and its special mark, through hash_bytes. Written into shards and compared at load. Never 0, which there
// means unknown.
UNUSED static uint64_t tokenizer_hash(const Tokenizer *t) {
  StrBuf all = {NULL, 0, 0};
  for (int id = 0; id < t->vocab_size; id++) {
    size_t len;
    const char *piece = tokenizer_piece(t, id, &len);
    char head[4] = {(char)(len & 255), (char)(len >> 8 & 255), (char)(len >> 16 & 255), (char)(len >> 24 & 255)};
    char mark = (char)t->special[id];
    strbuf_append(&all, head, sizeof head);
    strbuf_append(&all, piece, len);
    strbuf_append(&all, &mark, 1);
  }
  uint64_t h = hash_bytes(all.data, all.len);
  strbuf_free(&all);
  return h ? h : 1;
}

// ---------------------------------------------------------------------------------------------------------
// Writing. A BPE model without merges never joins anything, so it encodes character by character; "Fuse" makes the
// decoder concatenate (with no decoder, Hugging Face puts blanks between the tokens).

// Appends `"key":"piece",` or nothing when there is no such token.
UNUSED static void tokenizer_put_role_(StrBuf *b, const Tokenizer *t, const char *key, int id) {
  size_t len;
  const char *piece = tokenizer_piece(t, id, &len);
  if (piece == NULL) return;
  strbuf_printf(b, "  \"%s\": ", key);
  json_put_string(b, piece, len);
  strbuf_printf(b, ",\n");
}

// Writes dir/tokenizer.json and dir/tokenizer_config.json, each of them whole or not at all. Returns 0 or the errno.
UNUSED static int tokenizer_save(const Tokenizer *t, const char *dir) {
  StrBuf b = {NULL, 0, 0};
  char path[4096];
  const char *piece;
  size_t len;

  strbuf_printf(&b, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [");
  const char *comma = "";
  for (int id = 0; id < t->vocab_size; id++) {
    if (!t->special[id]) continue;
    piece = tokenizer_piece(t, id, &len);
    strbuf_printf(&b, "%s\n    {\"id\": %d, \"content\": ", comma, id);
    json_put_string(&b, piece, len);
    strbuf_printf(&b, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}");
    comma = ",";
  }
  strbuf_printf(&b, "\n  ],\n  \"normalizer\": null,\n  \"pre_tokenizer\": null,\n  \"post_processor\": null,\n");
  strbuf_printf(&b, "  \"decoder\": {\"type\": \"Fuse\"},\n  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n");
  strbuf_printf(&b, "    \"unk_token\": ");
  piece = tokenizer_piece(t, t->unk_id, &len);
  if (piece) json_put_string(&b, piece, len);
  else strbuf_printf(&b, "null");
  strbuf_printf(&b, ",\n    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n");
  strbuf_printf(&b, "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n    \"vocab\": {");
  for (int id = 0; id < t->vocab_size; id++) {
    piece = tokenizer_piece(t, id, &len);
    strbuf_printf(&b, "%s\n      ", id ? "," : "");
    json_put_string(&b, piece, len);
    strbuf_printf(&b, ": %d", id);
  }
  strbuf_printf(&b, "\n    },\n    \"merges\": []\n  }\n}\n");
  path_join(path, sizeof path, dir, "tokenizer.json");
  int err = safe_write_file(path, b.data, b.len);
  strbuf_free(&b);
  if (err) return err;

  // The roles of the special tokens. Without clean_up_tokenization_spaces = false, old versions delete blanks on decode.
  strbuf_printf(&b, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n");
  tokenizer_put_role_(&b, t, "bos_token", t->bos_id);
  tokenizer_put_role_(&b, t, "eos_token", t->eos_id);
  tokenizer_put_role_(&b, t, "pad_token", t->pad_id);
  tokenizer_put_role_(&b, t, "unk_token", t->unk_id);
  strbuf_printf(&b, "  \"clean_up_tokenization_spaces\": false\n}\n");
  path_join(path, sizeof path, dir, "tokenizer_config.json");
  err = safe_write_file(path, b.data, b.len);
  strbuf_free(&b);
  return err;
}

// ---------------------------------------------------------------------------------------------------------
// Reading. A tokenizer that is understood by half encodes silently wrong, so whatever is not known here is refused by name.

// Parses a JSON file whose outermost value is an object. Returns its text; the caller frees it and doc.
// NULL if the file cannot be read (errno is set); exit 3 if it is not JSON.
UNUSED static char *tokenizer_parse_(const char *path, JsonDoc *doc) {
  char err[256];
  size_t len;
  char *text = read_file(path, &len);
  if (text == NULL) return NULL;
  if (!json_parse(doc, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s; copy the file again", path, err);
  if (doc->root->type != JSON_OBJECT) die(EXIT_DAMAGED, "%s: expected a JSON object; copy the file again", path);
  return text;
}

// Exits with 3 unless the member is absent, null, false or an empty string. An object is named by its "type".
UNUSED static void tokenizer_want_off_(const char *path, const Json *in, const char *key) {
  const Json *v = json_get(in, key);
  if (v == NULL || v->type == JSON_NULL) return;
  if (v->type == JSON_BOOL && v->i == 0) return;
  if (v->type == JSON_STRING && v->len == 0) return;
  const Json *type = v->type == JSON_OBJECT ? json_get(v, "type") : v;
  const char *found = type && type->type == JSON_STRING ? type->s : "a value";
  die(EXIT_DAMAGED, "%s: \"%s\" is set (found %s), but only character-level tokenizers without it are read", path, key, found);
}

// One entry of the vocabulary while it is being sorted by id.
typedef struct {
  const char *s;   // NULL = this id was not seen yet
  size_t len;
  int special;
} TokenizerEntry_;

// Files an entry under its id. n is the number of ids; exit 3 for an id outside of them or one given to two pieces.
UNUSED static TokenizerEntry_ *tokenizer_entry_(const char *path, TokenizerEntry_ *entry, size_t n, const Json *id,
                                                const char *s, size_t len) {
  if (id == NULL || id->type != JSON_INT || id->i < 0 || (uint64_t)id->i >= n)
    die(EXIT_DAMAGED, "%s: piece \"%.*s\": expected an id below %zu, the number of pieces, found %lld", path, (int)len, s, n,
        id && id->type == JSON_INT ? (long long)id->i : -1ll);
  TokenizerEntry_ *e = &entry[id->i];
  if (e->s != NULL && (e->len != len || memcmp(e->s, s, len) != 0))
    die(EXIT_DAMAGED, "%s: id %lld: expected one piece, found both \"%.*s\" and \"%.*s\"", path, (long long)id->i, (int)e->len,
        e->s, (int)len, s);
  e->s = s;
  e->len = len;
  return e;
}

// The id of the special token that config names under key (a string, or an object with "content"); -1 if it names none.
UNUSED static int tokenizer_role_(const Tokenizer *t, const char *path, const Json *config, const char *key) {
  const Json *v = json_get(config, key);
  if (v && v->type == JSON_OBJECT) v = json_get(v, "content");
  if (v == NULL || v->type == JSON_NULL) return -1;
  int id = v->type == JSON_STRING ? tokenizer_id(t, v->s, v->len) : -1;
  if (id < 0)
    die(EXIT_DAMAGED, "%s: %s: expected a token of tokenizer.json, found %.*s", path, key,
        v->type == JSON_STRING ? (int)v->len : 7, v->type == JSON_STRING ? v->s : "a value");
  return id;
}

// Reads dir/tokenizer.json (required) and the roles of its special tokens from dir/tokenizer_config.json (roles are -1
// without it). Only character-level files: BPE without merges, each piece one character. Exit 2 if there is no file, 3 if
// it is damaged or of another kind. vocab_padded becomes vocab_size; the model's config knows better.
UNUSED static void tokenizer_load(Tokenizer *t, const char *dir) {
  static const char *const wanted_off[] = {"normalizer", "pre_tokenizer", "post_processor"};
  static const char *const model_off[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                                          "byte_fallback"};
  char path[4096];
  JsonDoc doc;
  path_join(path, sizeof path, dir, "tokenizer.json");
  char *text = tokenizer_parse_(path, &doc);
  if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s; a model directory holds its tokenizer.json", path, strerror(errno));

  // 1. Is it the kind of tokenizer that we know?
  const Json *model = json_get(doc.root, "model");
  if (model == NULL || model->type != JSON_OBJECT) die(EXIT_DAMAGED, "%s: expected an object \"model\", found none", path);
  const Json *type = json_get(model, "type"), *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
  const Json *added = json_get(doc.root, "added_tokens"), *decoder = json_get(doc.root, "decoder");
  const char *found = type && type->type == JSON_STRING ? type->s : "none";
  if (strcmp(found, "BPE") != 0)
    die(EXIT_DAMAGED, "%s: model type: expected BPE, found %s; only character-level tokenizers are read so far", path, found);
  if (merges && merges->count > 0)
    die(EXIT_DAMAGED, "%s: model type BPE with %zu merges: only character-level tokenizers, which have none, are read so far",
        path, merges->count);
  for (size_t i = 0; i < ARRAY_LEN(wanted_off); i++) tokenizer_want_off_(path, doc.root, wanted_off[i]);
  for (size_t i = 0; i < ARRAY_LEN(model_off); i++) tokenizer_want_off_(path, model, model_off[i]);
  type = decoder && decoder->type == JSON_OBJECT ? json_get(decoder, "type") : NULL;
  found = type && type->type == JSON_STRING ? type->s : "none";
  if (strcmp(found, "Fuse") != 0) die(EXIT_DAMAGED, "%s: decoder: expected type Fuse, found %s", path, found);
  if (vocab == NULL || vocab->type != JSON_OBJECT || vocab->count == 0)
    die(EXIT_DAMAGED, "%s: expected an object \"vocab\" with at least one piece", path);
  if (added && added->type != JSON_ARRAY && added->type != JSON_NULL)
    die(EXIT_DAMAGED, "%s: expected \"added_tokens\" to be an array", path);

  // 2. Sort by id. An added token either repeats a piece of the vocabulary or comes after all of them.
  size_t n = vocab->count;
  const Json *list = added ? added->child : NULL, *c;
  for (c = list; c; c = c->next) {
    const Json *id = json_get(c, "id");
    if (id && id->type == JSON_INT && id->i >= (int64_t)vocab->count) n++;
  }
  if (n > 1u << 24) die(EXIT_DAMAGED, "%s: expected at most %u pieces, found %zu", path, 1u << 24, n);
  TokenizerEntry_ *entry = (TokenizerEntry_ *)xcalloc(n, sizeof *entry);
  for (c = vocab->child; c; c = c->next) tokenizer_entry_(path, entry, n, c, c->key, c->key_len);
  for (c = list; c; c = c->next) {
    const Json *content = json_get(c, "content"), *special = json_get(c, "special");
    if (content == NULL || content->type != JSON_STRING)
      die(EXIT_DAMAGED, "%s: an entry of \"added_tokens\" has no string \"content\"", path);
    if (special == NULL || special->type != JSON_BOOL || special->i == 0)
      die(EXIT_DAMAGED, "%s: added token \"%s\": expected special = true; other added tokens are not read", path, content->s);
    tokenizer_entry_(path, entry, n, json_get(c, "id"), content->s, content->len)->special = 1;
  }

  // 3. Build, checking each piece.
  tokenizer_begin_(t, n);
  for (size_t i = 0; i < n; i++) {
    const TokenizerEntry_ *e = &entry[i];
    if (e->s == NULL) die(EXIT_DAMAGED, "%s: expected ids 0 to %zu without gaps, found no piece with id %zu", path, n - 1, i);
    if (!e->special && (e->len == 0 || utf8_char(e->s, e->len) != e->len))
      die(EXIT_DAMAGED, "%s: id %zu: expected a single character, found \"%.*s\"; only character-level tokenizers are read so far",
          path, i, (int)e->len, e->s);
    if (tokenizer_add_(t, e->s, e->len, e->special) < 0)
      die(EXIT_DAMAGED, "%s: id %zu: expected a new piece, found \"%.*s\" again", path, i, (int)e->len, e->s);
  }
  t->unk_id = tokenizer_role_(t, path, model, "unk_token");
  if (t->unk_id < 0) die(EXIT_DAMAGED, "%s: expected an unk_token, found none: unknown characters would have no id", path);
  free(entry);
  json_free(&doc);
  free(text);

  // 4. The roles.
  path_join(path, sizeof path, dir, "tokenizer_config.json");
  text = tokenizer_parse_(path, &doc);
  if (text == NULL && errno == ENOENT) return;
  if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  t->bos_id = tokenizer_role_(t, path, doc.root, "bos_token");
  t->eos_id = tokenizer_role_(t, path, doc.root, "eos_token");
  t->pad_id = tokenizer_role_(t, path, doc.root, "pad_token");
  json_free(&doc);
  free(text);
}

#endif
