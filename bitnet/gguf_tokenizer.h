/*
gguf_tokenizer.h: the vocabulary inside a GGUF file, to a Tokenizer and back.

What it is:  GGUF keeps tokens, merges or scores, and the name of the pre-tokeniser as metadata. They are put into the form that
             tokenizer.h reads (a tokenizer.json, or llama2.c's tokenizer.bin), so that there is one reader with one set of checks.
What not:    vocabularies of other kinds than byte-level BPE ("gpt2") and SentencePiece BPE ("llama").
Read before: tokenizer.h, bitnet/gguf.h.
Defines:     gguf_tokenizer, gguf_put_tokenizer.
*/
#ifndef BITNET_GGUF_TOKENIZER_H
#define BITNET_GGUF_TOKENIZER_H

#include "../tokenizer.h"
#include "gguf.h"

enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN = 2, TOKEN_CONTROL = 3, TOKEN_USER = 4, TOKEN_UNUSED = 5, TOKEN_BYTE = 6 };

// The name of a pre-tokeniser in GGUF, and what it is here. The first of several names is the one that is written.
static const struct { const char *name; int split, digits, nfc, whole_words; } gguf_splits[] = {
    {"gpt-2", SPLIT_GPT2, 0, 0, 0},     {"llama-bpe", SPLIT_LLAMA3, 0, 0, 1}, {"qwen2", SPLIT_QWEN2, 0, 1, 0},
    {"smollm", SPLIT_GPT2, 1, 0, 0},    {"starcoder", SPLIT_GPT2, 1, 0, 0},   {"gpt2", SPLIT_GPT2, 0, 0, 0},
    {"llama3", SPLIT_LLAMA3, 0, 0, 1},  {"llama-v3", SPLIT_LLAMA3, 0, 0, 1}};

// An array of the metadata, with this type of elements and n of them (any number if n is SIZE_MAX); exit 3 otherwise.
static const GgufKey *gguf_array_(const Gguf *g, const char *name, int element, size_t n) {
  const GgufKey *k = gguf_key(g, name);
  if (k == NULL) die(EXIT_DAMAGED, "%s: the key %s is missing", g->path, name);
  if (k->type != GGUF_ARRAY || k->element != element || (n != SIZE_MAX && k->count != n))
    gguf_bad_(g, k->at, "key %s: expected an array with an entry of the right type for each token", name);
  return k;
}

// Types of the tokens: out (=) [n], all normal where the file does not say.
static void gguf_token_types_(const Gguf *g, uint8_t *out, size_t n) {
  memset(out, TOKEN_NORMAL, n);
  if (gguf_key(g, "tokenizer.ggml.token_type") == NULL) return;
  const GgufKey *k = gguf_array_(g, "tokenizer.ggml.token_type", GGUF_I32, n);
  for (size_t i = 0; i < n; i++) {
    int32_t type;
    memcpy(&type, g->map + k->at + 4 * i, 4);
    if (type < 0 || type > TOKEN_BYTE) gguf_bad_(g, k->at + 4 * i, "token %zu: expected a type from 0 to 6, found %d", i, type);
    out[i] = (uint8_t)type;
  }
}

// Appends "pre_tokenizer", "normalizer" and "decoder" of a byte-level tokenizer.json.
static void gguf_put_pipeline_(StrBuf *b, const Gguf *g) {
  char pre[64], arch[64];
  size_t i = 0;
  gguf_text(g, "tokenizer.ggml.pre", pre, sizeof pre, "");
  gguf_text(g, "general.architecture", arch, sizeof arch, "");
  // The official BitNet file has Llama 3's vocabulary and does not say so.
  if (pre[0] == 0 && strncmp(arch, "bitnet", 6) == 0) snprintf(pre, sizeof pre, "llama-bpe");
  while (i < ARRAY_LEN(gguf_splits) && strcmp(gguf_splits[i].name, pre) != 0) i++;
  if (i == ARRAY_LEN(gguf_splits))
    die(EXIT_USAGE, "%s: tokenizer.ggml.pre '%s' is not supported; gpt-2, llama-bpe, qwen2, smollm and starcoder are", g->path, pre);
  strbuf_printf(b, "  \"normalizer\": %s,\n  \"pre_tokenizer\": ", gguf_splits[i].nfc ? "{\"type\": \"NFC\"}" : "null");
  const char *bytes = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": ";
  if (gguf_splits[i].digits) {
    strbuf_printf(b, "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\", \"individual_digits\": true}, %strue}]}",
                  bytes);
  } else if (gguf_splits[i].split == SPLIT_GPT2) {
    strbuf_printf(b, "%strue}", bytes);
  } else {
    strbuf_printf(b, "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": ");
    for (size_t k = 0; k < ARRAY_LEN(tokenizer_patterns); k++) {
      if (tokenizer_patterns[k].split == gguf_splits[i].split)
        json_put_string(b, tokenizer_patterns[k].regex, strlen(tokenizer_patterns[k].regex));
    }
    strbuf_printf(b, "}, \"behavior\": \"Isolated\", \"invert\": false}, %sfalse}]}", bytes);
  }
  strbuf_printf(
      b, ",\n  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, \"use_regex\": true},\n");
  strbuf_printf(
      b,
      "  \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, \"continuing_subword_prefix\": null,\n"
      "    \"end_of_word_suffix\": null, \"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": %s,\n    \"vocab\": {",
      gguf_splits[i].whole_words ? "true" : "false");
}

// A tokenizer.json from byte-level metadata; n tokens of these types.
static void gguf_put_json_(StrBuf *b, const Gguf *g, const GgufKey *tokens, size_t n, const uint8_t *types) {
  size_t at = tokens->at, len;
  const char *comma = "";
  strbuf_printf(b, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [");
  for (size_t i = 0; i < n; i++) {
    const char *s = gguf_array_text(g, tokens, &at, &len);
    if (types[i] == TOKEN_NORMAL || types[i] == TOKEN_BYTE) continue;
    strbuf_printf(b, "%s\n    {\"id\": %zu, \"content\": ", comma, i);
    json_put_string(b, s, len);
    strbuf_printf(b, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": %s}",
                  types[i] == TOKEN_USER ? "false" : "true");
    comma = ",";
  }
  strbuf_printf(b, "\n  ],\n  \"post_processor\": null,\n");
  gguf_put_pipeline_(b, g);
  at = tokens->at;
  for (size_t i = 0; i < n; i++) {
    const char *s = gguf_array_text(g, tokens, &at, &len);
    strbuf_printf(b, "%s\n      ", i ? "," : "");
    json_put_string(b, s, len);
    strbuf_printf(b, ": %zu", i);
  }
  strbuf_printf(b, "\n    },\n    \"merges\": [");
  const GgufKey *merges = gguf_array_(g, "tokenizer.ggml.merges", GGUF_STRING, SIZE_MAX);
  at = merges->at;
  for (size_t i = 0; i < merges->count; i++) {
    const char *s = gguf_array_text(g, merges, &at, &len);
    strbuf_printf(b, "%s\n      ", i ? "," : "");
    json_put_string(b, s, len);
  }
  strbuf_printf(b, "\n    ]\n  }\n}\n");
}

// The bytes of a tokenizer.bin from SentencePiece metadata.
static void gguf_put_bin_(StrBuf *b, const Gguf *g, const GgufKey *tokens, size_t n, const uint8_t *types) {
  static const char *const marks[] = {"<unk>", "<s>", "</s>"};
  const GgufKey *scores = gguf_array_(g, "tokenizer.ggml.scores", GGUF_FLOAT, tokens->count);
  size_t at = tokens->at, len;
  uint32_t longest = 0;
  gguf_append_(b, &longest, 4);
  for (size_t i = 0; i < n; i++) {
    const char *s = gguf_array_text(g, tokens, &at, &len);
    int mark = i < 3 && len == strlen(marks[i]) && memcmp(s, marks[i], len) == 0;
    if (i < 3 ? !mark : types[i] != TOKEN_NORMAL && types[i] != TOKEN_BYTE)
      die(EXIT_USAGE, "%s: token %zu: SentencePiece vocabularies with special tokens other than <unk>, <s> and </s> are not supported",
          g->path, i);
    StrBuf piece = {NULL, 0, 0};
    strbuf_append(&piece, "", 0);
    for (size_t k = 0; k < len; k++) {
      int block = k + 2 < len && memcmp(s + k, "\xE2\x96\x81", 3) == 0;   // what a blank is written as
      strbuf_append(&piece, block ? " " : s + k, 1);
      if (block) k += 2;
    }
    uint32_t bytes = (uint32_t)piece.len;
    gguf_append_(b, g->map + scores->at + 4 * i, 4);
    gguf_append_(b, &bytes, 4);
    strbuf_append(b, piece.data, piece.len);
    strbuf_free(&piece);
  }
}

// The id under a key, or -1.
static int gguf_token_(const Gguf *g, const Tokenizer *t, const char *key) {
  if (gguf_key(g, key) == NULL) return -1;
  uint64_t id = gguf_u64(g, key, 0, UINT32_MAX);
  if (id == UINT32_MAX) return -1;   // how some writers say "none"
  if (id >= (uint64_t)t->vocab_size)
    gguf_bad_(g, gguf_key(g, key)->at, "key %s: expected one of %d tokens, found %llu", key, t->vocab_size, (unsigned long long)id);
  return (int)id;
}

// The tokenizer of an open file. Exit 2 if its kind is not known, 3 if it is damaged or missing.
UNUSED static void gguf_tokenizer(Tokenizer *t, const Gguf *g) {
  char model[32], err[256];
  StrBuf b = {NULL, 0, 0};
  gguf_text(g, "tokenizer.ggml.model", model, sizeof model, "none");
  if (strcmp(model, "gpt2") != 0 && strcmp(model, "llama") != 0)
    die(EXIT_USAGE, "%s: tokenizer.ggml.model '%s' is not supported; gpt2 and llama are", g->path, model);
  const GgufKey *tokens = gguf_array_(g, "tokenizer.ggml.tokens", GGUF_STRING, SIZE_MAX);
  size_t n = tokens->count;
  if (n == 0 || n > 1u << 24) gguf_bad_(g, tokens->at, "expected 1 to %u tokens, found %zu", 1u << 24, n);
  uint8_t *types = (uint8_t *)xmalloc(n);
  gguf_token_types_(g, types, n);
  while (n > 1 && types[n - 1] == TOKEN_UNUSED) n--;   // rows that only fill the embedding up
  if (strcmp(model, "gpt2") == 0) {
    JsonDoc doc;
    gguf_put_json_(&b, g, tokens, n, types);
    if (!json_parse(&doc, b.data, b.len, err, sizeof err)) die(EXIT_DAMAGED, "%s: its vocabulary as JSON: %s", g->path, err);
    read_tokenizer_json_(t, g->path, doc.root);
    json_free(&doc);
    t->file = b;
  } else {
    gguf_put_bin_(&b, g, tokens, n, types);
    read_tokenizer_bin_(t, g->path, b.data, b.len);
    strbuf_free(&b);
    if (!gguf_bool(g, "tokenizer.ggml.add_space_prefix", 1)) {
      t->prefix = PREFIX_NONE;
      t->strip_blank = 0;
    }
  }
  free(types);
  t->bos_id = gguf_token_(g, t, "tokenizer.ggml.bos_token_id");
  t->eos_id = gguf_token_(g, t, "tokenizer.ggml.eos_token_id");
  t->pad_id = gguf_token_(g, t, "tokenizer.ggml.padding_token_id");
  t->add_bos = gguf_bool(g, "tokenizer.ggml.add_bos_token", t->add_bos);
  t->add_eos = gguf_bool(g, "tokenizer.ggml.add_eos_token", t->add_eos);
}

// ---------------------------------------------------------------------------------------------------------
// Writing.

// Appends a piece as GGUF spells it: in GPT-2's alphabet, or with U+2581 for blanks; special tokens and bytes by their names.
static void gguf_spell_(StrBuf *b, const Tokenizer *t, int id) {
  size_t len;
  const char *s = tokenizer_piece(t, id, &len);
  char c[4];
  if (t->kind == TOKENIZER_SENTENCEPIECE && len == 1 && t->byte_id[(unsigned char)s[0]] == id) {
    strbuf_printf(b, "<0x%02X>", (unsigned char)s[0]);
    return;
  }
  int added = t->special[id];
  for (int i = 0; i < t->n_added && !added; i++) added = t->added[i] == id;
  for (size_t i = 0; i < len; i++) {
    unsigned char byte = (unsigned char)s[i];
    unsigned code = byte;
    if (added) {
      strbuf_append(b, s + i, 1);
      continue;
    }
    if (t->kind == TOKENIZER_SENTENCEPIECE) {
      strbuf_append(b, byte == ' ' ? "\xE2\x96\x81" : s + i, byte == ' ' ? 3 : 1);
      continue;
    }
    if (alphabet_byte_(code) != (int)byte) {
      for (code = 256; alphabet_byte_(code) != (int)byte; code++) {}
    }
    strbuf_append(b, c, utf8_put_(c, code));
  }
}

// Appends a piece as an element of an array of strings.
static void gguf_append_piece_(StrBuf *b, const Tokenizer *t, int id) {
  StrBuf piece = {NULL, 0, 0};
  strbuf_append(&piece, "", 0);
  gguf_spell_(&piece, t, id);
  gguf_append_string_(b, piece.data, piece.len);
  strbuf_free(&piece);
}

// All pairs that may be joined, by rank. Caller frees; *n of them.
static BpePair *gguf_pairs_(const Tokenizer *t, size_t *n) {
  BpePair *pairs = (BpePair *)xmalloc(size_mul(t->bpe->n_slots + 1, sizeof *pairs));
  *n = 0;
  for (size_t i = 0; i < t->bpe->n_slots; i++) {
    if (t->bpe->pair[i].left >= 0) pairs[(*n)++] = t->bpe->pair[i];
  }
  qsort(pairs, *n, sizeof *pairs, compare_pairs_);
  return pairs;
}

// SentencePiece joins what gives the piece of the highest score: minus the rank of the first merge that makes the piece.
static void gguf_put_scores_(GgufOut *o, const Tokenizer *t, int vocab) {
  size_t n;
  float *score = (float *)xcalloc((size_t)vocab, sizeof *score);
  BpePair *pairs = gguf_pairs_(t, &n);
  for (int id = 0; id < vocab; id++) score[id] = id < t->vocab_size && !t->special[id] ? -1e9f : 0;
  for (size_t i = n; i-- > 0;) score[pairs[i].joined] = -(float)pairs[i].rank;
  gguf_put_array(o, "tokenizer.ggml.scores", GGUF_FLOAT, (uint64_t)vocab);
  gguf_append_(&o->keys, score, (size_t)vocab * 4);
  free(pairs);
  free(score);
}

static void gguf_put_merges_(GgufOut *o, const Tokenizer *t) {
  size_t n;
  BpePair *pairs = gguf_pairs_(t, &n);
  gguf_put_array(o, "tokenizer.ggml.merges", GGUF_STRING, n);
  for (size_t i = 0; i < n; i++) {
    StrBuf merge = {NULL, 0, 0};
    gguf_spell_(&merge, t, pairs[i].left);
    strbuf_append(&merge, " ", 1);
    gguf_spell_(&merge, t, pairs[i].right);
    gguf_append_string_(&o->keys, merge.data, merge.len);
    strbuf_free(&merge);
  }
  free(pairs);
}

// The type of a token.
static int32_t gguf_token_type_(const Tokenizer *t, int id) {
  size_t len;
  if (id >= t->vocab_size) return TOKEN_UNUSED;
  const char *s = tokenizer_piece(t, id, &len);
  if (id == t->unk_id && t->kind == TOKENIZER_SENTENCEPIECE) return TOKEN_UNKNOWN;
  if (t->special[id]) return TOKEN_CONTROL;
  if (t->kind == TOKENIZER_SENTENCEPIECE && len == 1 && t->byte_id[(unsigned char)s[0]] == id) return TOKEN_BYTE;
  for (int i = 0; i < t->n_added; i++) {
    if (t->added[i] == id) return TOKEN_USER;
  }
  return TOKEN_NORMAL;
}

/*
The metadata of a tokenizer for a model of vocab rows; t may be NULL. A character tokenizer has no form in GGUF: such a file, like one
without a tokenizer, says "none", can be loaded, and takes token ids only. Returns 0 then.
*/
UNUSED static int gguf_put_tokenizer(GgufOut *o, const Tokenizer *t, int vocab) {
  if (t == NULL || t->kind == TOKENIZER_CHARACTERS) {
    gguf_put_text(o, "tokenizer.ggml.model", "none");
    return 0;
  }
  int bytes = t->kind == TOKENIZER_BYTES;
  gguf_put_text(o, "tokenizer.ggml.model", bytes ? "gpt2" : "llama");
  for (size_t i = 0; i < ARRAY_LEN(gguf_splits) && bytes; i++) {
    if (gguf_splits[i].split != t->split || gguf_splits[i].digits != t->digits) continue;
    gguf_put_text(o, "tokenizer.ggml.pre", gguf_splits[i].name);
    break;
  }
  gguf_put_array(o, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)vocab);
  for (int id = 0; id < vocab; id++) {
    char pad[32];
    snprintf(pad, sizeof pad, "[PAD%d]", id);
    if (id < t->vocab_size) gguf_append_piece_(&o->keys, t, id);
    else gguf_append_string_(&o->keys, pad, strlen(pad));
  }
  gguf_put_array(o, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)vocab);
  for (int id = 0; id < vocab; id++) {
    int32_t type = gguf_token_type_(t, id);
    gguf_append_(&o->keys, &type, 4);
  }
  if (bytes) {
    gguf_put_merges_(o, t);
  } else {
    gguf_put_scores_(o, t, vocab);
    gguf_put_bool(o, "tokenizer.ggml.add_space_prefix", t->prefix != PREFIX_NONE);
  }
  if (t->bos_id >= 0) gguf_put_u32(o, "tokenizer.ggml.bos_token_id", (uint32_t)t->bos_id);
  if (t->eos_id >= 0) gguf_put_u32(o, "tokenizer.ggml.eos_token_id", (uint32_t)t->eos_id);
  if (t->unk_id >= 0) gguf_put_u32(o, "tokenizer.ggml.unknown_token_id", (uint32_t)t->unk_id);
  if (t->pad_id >= 0) gguf_put_u32(o, "tokenizer.ggml.padding_token_id", (uint32_t)t->pad_id);
  gguf_put_bool(o, "tokenizer.ggml.add_bos_token", t->add_bos);
  gguf_put_bool(o, "tokenizer.ggml.add_eos_token", t->add_eos);
  return 1;
}

#endif
