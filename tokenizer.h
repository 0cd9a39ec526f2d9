/*
tokenizer.h: text to token ids and back.

What it is:  a vocabulary (id -> bytes, bytes -> id) and the two directions over it, for three kinds of tokenizer:
             characters (the arithmetic task), byte-level BPE (GPT-2, Llama-3, Qwen2, SmolLM2 and those that prepro/ trains),
             and SentencePiece BPE (Llama-2, llama2.c). The ids are those of Hugging Face's `tokenizers`.
             On disk it is their pair tokenizer.json + tokenizer_config.json, which `transformers` loads as it is. What was
             read is written back byte for byte. llama2.c's tokenizer.bin is read, too.
What not:    no training of vocabularies (prepro/ does that), no chat templates, no adding of <s> or </s>: callers place
             special tokens by id (add_bos and add_eos say what the tokenizer's author would do).
Read before: bitnet/utils.h, bitnet/json.h, bitnet/bpe.h.
Defines:     Tokenizer; tokenizer_arithmetic, tokenizer_encode, tokenizer_encode_marks, tokenizer_decode,
             tokenizer_decode_text, tokenizer_piece, tokenizer_id, tokenizer_save, tokenizer_load, tokenizer_hash, tokenizer_free.

Special tokens that a user writes out in a text are plain text for tokenizer_encode, so an untrusted text cannot end a turn;
tokenizer_encode_marks makes them ids, for files in which they separate documents.
A Tokenizer remembers words: encode with one from one thread at a time.
*/
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "bitnet/bpe.h"
#include "bitnet/json.h"
#include "bitnet/utils.h"

enum { TOKENIZER_CHARACTERS, TOKENIZER_BYTES, TOKENIZER_SENTENCEPIECE };

// What SentencePiece puts in front of a text: nothing; a blank in front of each stretch between special tokens; the same unless
// a blank is there already; the latter at the very beginning only.
enum { PREFIX_NONE, PREFIX_EACH, PREFIX_MISSING, PREFIX_FIRST };

typedef struct {
  int vocab_size;     // ids 0 .. vocab_size-1 have a piece
  int vocab_padded;   // rows of the model's embedding; ids from vocab_size on exist there but are never text
  int bos_id, eos_id, pad_id, unk_id;   // -1: the vocabulary has no such token
  int add_bos, add_eos;                 // 1: made for texts with bos in front, eos behind

  // Piece i is bytes[offset[i]] .. bytes[offset[i+1]-1]: one pool instead of one allocation per piece. Pieces are what they
  // decode to: the aliases that files use for bytes and blanks are undone.
  StrBuf bytes;
  size_t *offset;           // [vocab_size+1]
  unsigned char *special;   // [vocab_size] 1 = a mark like </s>: never found in a text, skipped by decode

  // bytes -> id: a hash table with open addressing; a power of two of slots, at least half of them empty (-1).
  int *slot;
  size_t n_slots;

  // How a text is taken apart.
  int kind;                 // TOKENIZER_*
  int split;                // SPLIT_*: the pieces that merges stay inside of
  int digits;               // 1: every digit is a piece of its own
  int nfc;                  // 1: the text is brought into NFC first
  int whole_words;          // 1: a piece that is a token is not merged together but taken as it is
  int prefix;               // PREFIX_*
  int strip_blank;          // 1: decoding drops one blank at the beginning of the text
  int byte_id[256];         // the token of a single byte, or -1
  int *added, n_added;      // tokens that are cut out of a text before anything else, the longest first
  int n_plain;              // how many of those are no special tokens
  unsigned char added_first[256];   // 1: one of them begins with this byte
  Bpe *bpe;                 // merges and memory; NULL for characters

  StrBuf file, config;      // tokenizer.json and tokenizer_config.json as they were read; empty: they were not
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

// The id of a piece given by its exact bytes, special or not; -1 if the vocabulary has no such piece. (SentencePiece's 256
// tokens for single bytes are not found by this: they are no text.)
UNUSED static int tokenizer_id(const Tokenizer *t, const char *s, size_t len) {
  return t->slot[tokenizer_slot_(t, s, len)];
}

// An empty vocabulary with room for n pieces.
UNUSED static void tokenizer_begin_(Tokenizer *t, size_t n) {
  memset(t, 0, sizeof *t);
  t->bos_id = t->eos_id = t->pad_id = t->unk_id = -1;
  for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
  t->offset = (size_t *)xcalloc(n + 1, sizeof *t->offset);
  t->special = (unsigned char *)xcalloc(n, 1);
  for (t->n_slots = 16; t->n_slots < 2 * n; t->n_slots *= 2) {}
  t->slot = (int *)xmalloc(size_mul(t->n_slots, sizeof *t->slot));
  for (size_t i = 0; i < t->n_slots; i++) t->slot[i] = -1;
  strbuf_append(&t->bytes, "", 0);
}

// Appends a piece without making it known to tokenizer_id. Returns its id.
UNUSED static int tokenizer_append_(Tokenizer *t, const char *s, size_t len, int special) {
  int id = t->vocab_size++;
  strbuf_append(&t->bytes, s, len);
  t->offset[id + 1] = t->bytes.len;
  t->special[id] = (unsigned char)special;
  t->vocab_padded = t->vocab_size;
  return id;
}

// Appends the piece with the next id. Returns that id, or -1 if the same bytes are already a piece.
UNUSED static int tokenizer_add_(Tokenizer *t, const char *s, size_t len, int special) {
  size_t at = tokenizer_slot_(t, s, len);
  if (t->slot[at] >= 0) return -1;
  return t->slot[at] = tokenizer_append_(t, s, len, special);
}

UNUSED static void tokenizer_free(Tokenizer *t) {
  strbuf_free(&t->bytes);
  strbuf_free(&t->file);
  strbuf_free(&t->config);
  if (t->bpe) bpe_free(t->bpe);
  free(t->bpe);
  free(t->offset);
  free(t->special);
  free(t->slot);
  free(t->added);
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
// Encode.

// Where the ids go: all are counted, the first cap are written.
typedef struct {
  int *ids;
  size_t cap, n;
} TokenizerOut_;

static inline void put_ids_(TokenizerOut_ *out, const int *ids, size_t n) {
  for (size_t i = 0; i < n; i++, out->n++) {
    if (out->n < out->cap) out->ids[out->n] = ids[i];
  }
}

// One character after the other. One without a piece, and every byte that is not UTF-8, becomes <unk>.
UNUSED static void encode_characters_(const Tokenizer *t, const char *s, size_t len, TokenizerOut_ *out) {
  for (size_t at = 0; at < len;) {
    size_t bytes = utf8_char(s + at, len - at);
    int id = bytes ? tokenizer_id(t, s + at, bytes) : -1;
    if (id < 0 || t->special[id]) id = t->unk_id;
    put_ids_(out, &id, 1);
    at += bytes ? bytes : 1;
  }
}

// The symbols that merging starts from: single bytes, or characters with bytes in the place of those that are no piece.
// Returns how many; b->id has room for one for each byte. A byte without a token becomes <unk>, or nothing if there is none.
UNUSED static size_t bpe_symbols_(const Tokenizer *t, const char *s, size_t len) {
  Bpe *b = t->bpe;
  size_t n = 0;
  for (size_t at = 0; at < len;) {
    size_t bytes = t->kind == TOKENIZER_SENTENCEPIECE ? utf8_char(s + at, len - at) : 0;
    int id = bytes ? tokenizer_id(t, s + at, bytes) : -1;
    if (id >= 0 && !t->special[id]) {
      b->id[n++] = id;
      at += bytes;
      continue;
    }
    for (size_t end = at + (bytes ? bytes : 1); at < end; at++) {
      id = t->byte_id[(unsigned char)s[at]];
      if (id < 0) id = t->unk_id;
      if (id >= 0) b->id[n++] = id;
    }
  }
  return n;
}

// One piece, which merges stay inside of.
UNUSED static void encode_piece_(const Tokenizer *t, const char *s, size_t len, TokenizerOut_ *out) {
  Bpe *b = t->bpe;
  uint64_t hash = 0;
  size_t n;
  if (len <= BPE_WORD_MAX) {
    hash = hash_bytes(s, len);
    const int *known = bpe_cached(b, s, len, hash, &n);
    if (known) {
      put_ids_(out, known, n);
      return;
    }
  }
  bpe_room(b, len);
  int whole = t->whole_words ? tokenizer_id(t, s, len) : -1;
  if (whole >= 0 && !t->special[whole]) {
    b->id[0] = whole;
    n = 1;
  } else {
    n = bpe_merge(b, bpe_symbols_(t, s, len));
  }
  put_ids_(out, b->id, n);
  if (len <= BPE_WORD_MAX) bpe_remember(b, s, len, hash, b->id, n);
}

// A stretch of text: piece after piece.
UNUSED static void encode_pieces_(const Tokenizer *t, const char *s, size_t len, TokenizerOut_ *out) {
  for (size_t at = 0, end; at < len; at = end) {
    end = bpe_next(t->split, s, at, len);
    encode_piece_(t, s + at, end - at, out);
  }
}

// Each digit alone, and what lies between two of them as if it were a whole text.
UNUSED static void encode_digits_(const Tokenizer *t, const char *s, size_t len, TokenizerOut_ *out) {
  size_t begin = 0, bytes;
  for (size_t at = 0; at < len; at += bytes) {
    if (!unicode_is_digit(utf8_decode(s + at, len - at, &bytes))) continue;
    encode_pieces_(t, s + begin, at - begin, out);
    encode_piece_(t, s + at, bytes, out);
    begin = at + bytes;
  }
  encode_pieces_(t, s + begin, len - begin, out);
}

// SentencePiece writes blanks as U+2581 (and so takes that character for a blank); our pieces have blanks.
UNUSED static void encode_sentencepiece_(const Tokenizer *t, const char *s, size_t len, int at_start, TokenizerOut_ *out) {
  StrBuf text = {NULL, 0, 0};
  int prefix = t->prefix == PREFIX_EACH || t->prefix == PREFIX_MISSING || (t->prefix == PREFIX_FIRST && at_start);
  if (prefix) strbuf_append(&text, " ", 1);
  size_t head = text.len, done = 0;
  for (size_t at = 0; at + 2 < len; at++) {
    if (memcmp(s + at, "\xE2\x96\x81", 3) != 0) continue;
    strbuf_append(&text, s + done, at - done);
    strbuf_append(&text, " ", 1);
    done = at + 3;
    at += 2;
  }
  strbuf_append(&text, s + done, len - done);
  size_t skip = t->prefix != PREFIX_EACH && head && text.data[head] == ' ' ? head : 0;
  encode_pieces_(t, text.data + skip, text.len - skip, out);
  strbuf_free(&text);
}

// A stretch between tokens that were cut out, len >= 1. at_start: it is the beginning of the text.
UNUSED static void encode_stretch_(const Tokenizer *t, const char *s, size_t len, int at_start, TokenizerOut_ *out) {
  StrBuf composed = {NULL, 0, 0};
  if (t->nfc) {
    size_t ascii = 0;   // ASCII is its own NFC
    while (ascii < len && (unsigned char)s[ascii] < 0x80) ascii++;
    if (ascii < len) {
      unicode_nfc(s, len, &composed);
      s = composed.data;
      len = composed.len;
    }
  }
  if (t->kind == TOKENIZER_CHARACTERS) encode_characters_(t, s, len, out);
  else if (t->kind == TOKENIZER_SENTENCEPIECE) encode_sentencepiece_(t, s, len, at_start, out);
  else if (t->digits) encode_digits_(t, s, len, out);
  else encode_pieces_(t, s, len, out);
  strbuf_free(&composed);
}

// The added token that s[0..n) begins with, the longest if several do; -1 if none does. marks: special ones count, too.
UNUSED static int added_at_(const Tokenizer *t, const char *s, size_t n, int marks, size_t *len) {
  for (int i = 0; i < t->n_added; i++) {
    int id = t->added[i];
    const char *piece = tokenizer_piece(t, id, len);
    if ((marks || !t->special[id]) && *len <= n && memcmp(piece, s, *len) == 0) return id;
  }
  return -1;
}

UNUSED static size_t tokenizer_encode_(const Tokenizer *t, const char *text, size_t len, int *ids, size_t cap, int marks) {
  TokenizerOut_ out = {ids, cap, 0};
  size_t begin = 0, n;
  if (marks ? t->n_added : t->n_plain) {
    for (size_t at = 0; at < len;) {
      int id = t->added_first[(unsigned char)text[at]] ? added_at_(t, text + at, len - at, marks, &n) : -1;
      if (id < 0) {
        at++;
        continue;
      }
      if (at > begin) encode_stretch_(t, text + begin, at - begin, begin == 0, &out);
      put_ids_(&out, &id, 1);
      begin = at += n;
    }
  }
  if (len > begin) encode_stretch_(t, text + begin, len - begin, begin == 0, &out);
  return out.n;
}

// The ids of text[0..len), which may hold any bytes. Returns how many the text needs, which may be more than cap; only the first
// cap are written (cap = 0 counts). Special tokens written out in the text stay text.
UNUSED static size_t tokenizer_encode(const Tokenizer *t, const char *text, size_t len, int *ids, size_t cap) {
  return tokenizer_encode_(t, text, len, ids, cap, 0);
}

// The same with special tokens recognised, as Hugging Face's encode does by default. For trusted text.
UNUSED static size_t tokenizer_encode_marks(const Tokenizer *t, const char *text, size_t len, int *ids, size_t cap) {
  return tokenizer_encode_(t, text, len, ids, cap, 1);
}

// ---------------------------------------------------------------------------------------------------------
// Decode.

// Appends the text of ids[0..n) to out, as it goes on after what came before. Special tokens and ids without a piece add
// nothing. For byte-level models a single token may be a part of a character.
UNUSED static void tokenizer_decode(const Tokenizer *t, const int *ids, size_t n, StrBuf *out) {
  strbuf_append(out, "", 0);   // the text of no tokens is an empty string, not a NULL pointer
  for (size_t i = 0; i < n; i++) {
    size_t len;
    const char *piece = tokenizer_piece(t, ids[i], &len);
    if (piece && !t->special[ids[i]]) strbuf_append(out, piece, len);
  }
}

// The same for ids that begin a text: where SentencePiece put a blank in front of it, that is taken away again. This is the
// inverse of tokenizer_encode, byte for byte for a vocabulary with all 256 bytes.
UNUSED static void tokenizer_decode_text(const Tokenizer *t, const int *ids, size_t n, StrBuf *out) {
  size_t start = out->len;
  tokenizer_decode(t, ids, n, out);
  if (!t->strip_blank || out->len == start || out->data[start] != ' ') return;
  memmove(out->data + start, out->data + start + 1, out->len - start);   // with the closing zero
  out->len--;
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
// Writing.

// Appends a piece as tokenizer.json spells it: SentencePiece's blanks are U+2581 and its byte tokens <0x00> to <0xFF>.
UNUSED static void tokenizer_put_piece_(StrBuf *b, const Tokenizer *t, int id) {
  size_t len;
  const char *piece = tokenizer_piece(t, id, &len);
  if (t->kind != TOKENIZER_SENTENCEPIECE) {
    json_put_string(b, piece, len);
  } else if (len == 1 && t->byte_id[(unsigned char)piece[0]] == id) {
    strbuf_printf(b, "\"<0x%02X>\"", (unsigned char)piece[0]);
  } else {
    StrBuf alias = {NULL, 0, 0};
    for (size_t i = 0; i < len; i++) {
      if (piece[i] == ' ') strbuf_append(&alias, "\xE2\x96\x81", 3);
      else strbuf_append(&alias, piece + i, 1);
    }
    json_put_string(b, alias.data, alias.len);
    strbuf_free(&alias);
  }
}

// By rank; pairs that make the same token by their halves.
UNUSED static int compare_pairs_(const void *a, const void *b) {
  const BpePair *p = (const BpePair *)a, *q = (const BpePair *)b;
  if (p->rank != q->rank) return p->rank < q->rank ? -1 : 1;
  if (p->left != q->left) return p->left < q->left ? -1 : 1;
  return (p->right > q->right) - (p->right < q->right);
}

// Appends the list of merges.
UNUSED static void tokenizer_put_merges_(StrBuf *b, const Tokenizer *t) {
  size_t n = 0;
  if (t->bpe == NULL) {
    strbuf_printf(b, "[]");
    return;
  }
  BpePair *pairs = (BpePair *)xmalloc(size_mul(t->bpe->n_slots, sizeof *pairs));
  for (size_t i = 0; i < t->bpe->n_slots; i++) {
    if (t->bpe->pair[i].left >= 0) pairs[n++] = t->bpe->pair[i];
  }
  qsort(pairs, n, sizeof *pairs, compare_pairs_);
  strbuf_printf(b, "[");
  for (size_t i = 0; i < n; i++) {
    strbuf_printf(b, "%s\n      [", i ? "," : "");
    tokenizer_put_piece_(b, t, pairs[i].left);
    strbuf_printf(b, ", ");
    tokenizer_put_piece_(b, t, pairs[i].right);
    strbuf_printf(b, "]");
  }
  strbuf_printf(b, "\n    ]");
  free(pairs);
}

// Appends a tokenizer.json for a tokenizer that does not come from one. A BPE model without merges never joins anything, so it
// encodes character by character; "Fuse" makes the decoder concatenate (with no decoder, Hugging Face puts blanks between
// the tokens).
UNUSED static void tokenizer_put_file_(StrBuf *b, const Tokenizer *t) {
  int sp = t->kind == TOKENIZER_SENTENCEPIECE;
  strbuf_printf(b, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [");
  const char *comma = "";
  for (int id = 0; id < t->vocab_size; id++) {
    if (!t->special[id]) continue;
    strbuf_printf(b, "%s\n    {\"id\": %d, \"content\": ", comma, id);
    tokenizer_put_piece_(b, t, id);
    strbuf_printf(b, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}");
    comma = ",";
  }
  strbuf_printf(b, "\n  ],\n  \"normalizer\": ");
  if (sp) {
    strbuf_printf(b, "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"\xE2\x96\x81\"},"
                  " {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\xE2\x96\x81\"}]}");
  } else {
    strbuf_printf(b, "null");
  }
  strbuf_printf(b, ",\n  \"pre_tokenizer\": null,\n  \"post_processor\": null,\n  \"decoder\": ");
  if (sp) {
    strbuf_printf(b, "{\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": \"\xE2\x96\x81\"},"
                  " \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"},"
                  " {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]}");
  } else {
    strbuf_printf(b, "{\"type\": \"Fuse\"}");
  }
  strbuf_printf(b, ",\n  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": ");
  if (t->unk_id >= 0) tokenizer_put_piece_(b, t, t->unk_id);
  else strbuf_printf(b, "null");
  strbuf_printf(b, ",\n    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n");
  strbuf_printf(b, "    \"fuse_unk\": false,\n    \"byte_fallback\": %s,\n    \"ignore_merges\": false,\n    \"vocab\": {",
                sp ? "true" : "false");
  for (int id = 0; id < t->vocab_size; id++) {
    strbuf_printf(b, "%s\n      ", id ? "," : "");
    tokenizer_put_piece_(b, t, id);
    strbuf_printf(b, ": %d", id);
  }
  strbuf_printf(b, "\n    },\n    \"merges\": ");
  tokenizer_put_merges_(b, t);
  strbuf_printf(b, "\n  }\n}\n");
}

// Appends `"key": "piece",` or nothing when there is no such token.
UNUSED static void tokenizer_put_role_(StrBuf *b, const Tokenizer *t, const char *key, int id) {
  size_t len;
  const char *piece = tokenizer_piece(t, id, &len);
  if (piece == NULL) return;
  strbuf_printf(b, "  \"%s\": ", key);
  json_put_string(b, piece, len);
  strbuf_printf(b, ",\n");
}

// Appends a tokenizer_config.json with the roles of the special tokens. Without clean_up_tokenization_spaces = false, old
// versions of transformers delete blanks on decode.
UNUSED static void tokenizer_put_config_(StrBuf *b, const Tokenizer *t) {
  strbuf_printf(b, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n");
  tokenizer_put_role_(b, t, "bos_token", t->bos_id);
  tokenizer_put_role_(b, t, "eos_token", t->eos_id);
  tokenizer_put_role_(b, t, "pad_token", t->pad_id);
  tokenizer_put_role_(b, t, "unk_token", t->unk_id);
  strbuf_printf(b, "  \"clean_up_tokenization_spaces\": false\n}\n");
}

// Writes dir/tokenizer.json and dir/tokenizer_config.json, each of them whole or not at all: the bytes that were read, or
// new files where there were none. Returns 0 or the errno.
UNUSED static int tokenizer_save(const Tokenizer *t, const char *dir) {
  static const char *const names[] = {"tokenizer.json", "tokenizer_config.json"};
  int err = 0;
  for (int i = 0; i < 2 && !err; i++) {
    StrBuf made = {NULL, 0, 0};
    const StrBuf *b = i == 0 ? &t->file : &t->config;
    char path[4096];
    if (b->len == 0) {
      if (i == 0) tokenizer_put_file_(&made, t);
      else tokenizer_put_config_(&made, t);
      b = &made;
    }
    path_join(path, sizeof path, dir, names[i]);
    err = safe_write_file(path, b->data, b->len);
    strbuf_free(&made);
  }
  return err;
}

// ---------------------------------------------------------------------------------------------------------
// Reading tokenizer.json. A tokenizer that is understood by half encodes silently wrong, so whatever is not known here is
// refused by name.

// Parses a JSON file whose outermost value is an object, and keeps its bytes in text. Returns 0 if the file cannot be read
// (errno is set); exit 3 if it is not JSON.
UNUSED static int tokenizer_parse_(const char *path, StrBuf *text, JsonDoc *doc) {
  char err[256];
  text->data = read_file(path, &text->len);
  if (text->data == NULL) return 0;
  text->cap = text->len + 1;
  if (!json_parse(doc, text->data, text->len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s; copy the file again", path, err);
  if (doc->root->type != JSON_OBJECT) die(EXIT_DAMAGED, "%s: expected a JSON object; copy the file again", path);
  return 1;
}

// What a part of the pipeline is: its "type", or "none" if it is absent or null.
UNUSED static const char *type_of_(const Json *v) {
  if (v == NULL || v->type == JSON_NULL) return "none";
  return json_get_string(v, "type", "a value without a type");
}

UNUSED static int is_type_(const Json *v, const char *type) {
  return strcmp(type_of_(v), type) == 0;
}

// Exits with 3 unless the member is absent, null, false or an empty string. An object is named by its "type".
UNUSED static void tokenizer_want_off_(const char *path, const Json *in, const char *key) {
  const Json *v = json_get(in, key);
  if (v == NULL || v->type == JSON_NULL) return;
  if (v->type == JSON_BOOL && v->i == 0) return;
  if (v->type == JSON_STRING && v->len == 0) return;
  const char *found = v->type == JSON_STRING ? v->s : v->type == JSON_OBJECT ? type_of_(v) : "a value";
  die(EXIT_DAMAGED, "%s: \"%s\" is set (found %s), but only tokenizers of this kind without it are read", path, key, found);
}

// The patterns as the files spell them. The two newer ones differ in how many numbers stay together.
#define MODERN_PATTERN_(numbers)                                                           \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers                    \
  "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
static const struct { int split; const char *regex; } tokenizer_patterns[] = {
  {SPLIT_GPT2, "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"},
  {SPLIT_LLAMA3, MODERN_PATTERN_("\\p{N}{1,3}")},
  {SPLIT_QWEN2, MODERN_PATTERN_("\\p{N}")}};

// The pre-tokenizer and the normalizer of a byte-level file.
UNUSED static void read_bytes_pipeline_(Tokenizer *t, const char *path, const Json *root) {
  const Json *pre = json_get(root, "pre_tokenizer"), *bytes = pre, *first = NULL, *normalizer = json_get(root, "normalizer");
  if (is_type_(pre, "Sequence")) {
    const Json *list = json_get(pre, "pretokenizers");
    if (list == NULL || list->count != 2)
      die(EXIT_DAMAGED, "%s: pre_tokenizer: expected a Sequence of two, found %zu", path, list ? list->count : 0);
    first = list->child;
    bytes = first->next;
  }
  if (!is_type_(bytes, "ByteLevel"))
    die(EXIT_DAMAGED, "%s: pre_tokenizer: expected ByteLevel at its end, found %s", path, type_of_(bytes));
  if (json_get_bool(bytes, "add_prefix_space", 1))
    die(EXIT_DAMAGED, "%s: pre_tokenizer ByteLevel: expected add_prefix_space false, found true, which is not read", path);
  int regex = json_get_bool(bytes, "use_regex", 1);
  if (is_type_(first, "Digits") && regex) {
    if (!json_get_bool(first, "individual_digits", 0))
      die(EXIT_DAMAGED, "%s: pre_tokenizer Digits: expected individual_digits true, found false, which is not read", path);
    t->digits = 1;
    t->split = SPLIT_GPT2;
  } else if (is_type_(first, "Split") && !regex) {
    const char *pattern = json_get_string(json_get(first, "pattern"), "Regex", "none");
    const char *behavior = json_get_string(first, "behavior", "none");
    for (size_t i = 0; i < ARRAY_LEN(tokenizer_patterns); i++) {
      if (strcmp(pattern, tokenizer_patterns[i].regex) == 0) t->split = tokenizer_patterns[i].split;
    }
    if (t->split == SPLIT_NONE)
      die(EXIT_DAMAGED, "%s: pre_tokenizer Split: expected the pattern of GPT-2, Llama-3 or Qwen2, found %s", path, pattern);
    if (strcmp(behavior, "Isolated") != 0 || json_get_bool(first, "invert", 0))
      die(EXIT_DAMAGED, "%s: pre_tokenizer Split: expected behavior Isolated, not inverted, found %s", path, behavior);
  } else if (first == NULL && regex) {
    t->split = SPLIT_GPT2;
  } else {
    die(EXIT_DAMAGED, "%s: pre_tokenizer: expected ByteLevel with its own pattern, or Split or Digits in front of it, found %s", path,
        type_of_(first));
  }
  if (is_type_(normalizer, "NFC")) t->nfc = 1;
  else if (!is_type_(normalizer, "none"))
    die(EXIT_DAMAGED, "%s: normalizer: expected none or NFC, found %s", path, type_of_(normalizer));
  const Json *decoder = json_get(root, "decoder");
  if (!is_type_(decoder, "ByteLevel"))
    die(EXIT_DAMAGED, "%s: pre_tokenizer ByteLevel wants a decoder ByteLevel, found %s", path, type_of_(decoder));
}

// 1 for {"type": "Replace", "pattern": {"String": from}, "content": to}.
UNUSED static int is_replace_(const Json *v, const char *from, const char *to) {
  return is_type_(v, "Replace") && strcmp(json_get_string(json_get(v, "pattern"), "String", ""), from) == 0 &&
         strcmp(json_get_string(v, "content", ""), to) == 0;
}

// The normalizer, pre-tokenizer and decoder of a SentencePiece file: blanks become U+2581, and one is put in front.
UNUSED static void read_sentencepiece_pipeline_(Tokenizer *t, const char *path, const Json *root) {
  static const char block[] = "\xE2\x96\x81";
  const Json *normalizer = json_get(root, "normalizer"), *pre = json_get(root, "pre_tokenizer"), *decoder = json_get(root, "decoder");
  const Json *list = json_get(normalizer, "normalizers"), *c;
  if (is_type_(pre, "Metaspace") && is_type_(normalizer, "none")) {
    const char *scheme = json_get_string(pre, "prepend_scheme", json_get_bool(pre, "add_prefix_space", 1) ? "always" : "never");
    int always = strcmp(scheme, "always") == 0, only_first = strcmp(scheme, "first") == 0;
    if (strcmp(json_get_string(pre, "replacement", ""), block) != 0 || json_get_bool(pre, "split", 1) ||
        (!always && !only_first && strcmp(scheme, "never") != 0))
      die(EXIT_DAMAGED, "%s: pre_tokenizer Metaspace: expected replacement %s, split false and prepend_scheme always, first or never, "
          "found scheme %s", path, block, scheme);
    t->prefix = always ? PREFIX_MISSING : only_first ? PREFIX_FIRST : PREFIX_NONE;
  } else if (is_type_(pre, "none") && is_type_(normalizer, "Sequence") && list && list->count == 2 &&
             is_type_(list->child, "Prepend") && strcmp(json_get_string(list->child, "prepend", ""), block) == 0 &&
             is_replace_(list->child->next, " ", block)) {
    t->prefix = PREFIX_EACH;
  } else if (is_type_(pre, "none") && is_replace_(normalizer, " ", block)) {
    t->prefix = PREFIX_NONE;
  } else {
    die(EXIT_DAMAGED, "%s: byte_fallback wants a normalizer that writes blanks as %s or a pre_tokenizer Metaspace, found %s and %s",
        path, block, type_of_(normalizer), type_of_(pre));
  }
  list = json_get(decoder, "decoders");
  for (c = list ? list->child : NULL; c; c = c->next) {
    if (is_type_(c, "Strip") && strcmp(json_get_string(c, "content", ""), " ") == 0 && json_get_int(c, "start", 0) == 1 &&
        json_get_int(c, "stop", 0) == 0)
      t->strip_blank = 1;
    else if (is_type_(c, "Metaspace")) t->strip_blank = t->prefix != PREFIX_NONE;
    else if (!is_type_(c, "ByteFallback") && !is_type_(c, "Fuse") && !is_replace_(c, block, " "))
      die(EXIT_DAMAGED, "%s: decoder: expected Replace, ByteFallback, Fuse and Strip, found %s", path, type_of_(c));
  }
  if (!is_type_(decoder, "Sequence") && !is_type_(decoder, "Metaspace"))
    die(EXIT_DAMAGED, "%s: byte_fallback wants a decoder Sequence, found %s", path, type_of_(decoder));
}

// What the file's author puts around a text: only the fact is noted. Exit 3 for anything but templates.
UNUSED static void read_post_processor_(Tokenizer *t, const char *path, const Json *post) {
  const Json *list, *c;
  if (is_type_(post, "none") || is_type_(post, "ByteLevel")) return;
  if (is_type_(post, "Sequence")) {
    list = json_get(post, "processors");
    for (c = list ? list->child : NULL; c; c = c->next) read_post_processor_(t, path, c);
    return;
  }
  if (!is_type_(post, "TemplateProcessing"))
    die(EXIT_DAMAGED, "%s: post_processor: expected TemplateProcessing, found %s", path, type_of_(post));
  int behind = 0;
  list = json_get(post, "single");
  for (c = list ? list->child : NULL; c; c = c->next) {
    if (json_get(c, "Sequence")) behind = 1;
    else if (behind) t->add_eos = 1;
    else t->add_bos = 1;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Reading: the pieces.

// The byte that a character of GPT-2's alphabet stands for, or -1. Visible characters of Latin-1 stand for themselves, the
// other 68 bytes, in increasing order, are U+0100, U+0101, ...: a vocabulary then has no blanks and no control characters.
UNUSED static int alphabet_byte_(uint32_t c) {
  if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255)) return (int)c;
  if (c < 256 || c >= 256 + 68) return -1;
  uint32_t k = c - 256;
  return k < 33 ? (int)k : k < 67 ? (int)k - 33 + 127 : 173;
}

// Appends what a piece of the file decodes to. A byte-level piece with a character outside of the alphabet is left as it is.
UNUSED static void unalias_(int kind, const char *s, size_t len, StrBuf *out) {
  size_t start = out->len, bytes;
  for (size_t i = 0; i < len; i += bytes) {
    uint32_t c = utf8_decode(s + i, len - i, &bytes);
    if (kind == TOKENIZER_BYTES) {
      int byte = alphabet_byte_(c);
      char raw = (char)byte;
      if (byte < 0) {
        out->len = start;
        strbuf_append(out, s, len);
        return;
      }
      strbuf_append(out, &raw, 1);
    } else if (kind == TOKENIZER_SENTENCEPIECE && c == 0x2581) {
      strbuf_append(out, " ", 1);
    } else {
      strbuf_append(out, s + i, bytes);
    }
  }
}

// The byte of SentencePiece's token "<0x0A>", or -1.
UNUSED static int byte_token_(const char *s, size_t len) {
  static const char digits[] = "0123456789ABCDEF";
  if (len != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
  const char *high = (const char *)memchr(digits, s[3], 16), *low = (const char *)memchr(digits, s[4], 16);
  return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

// One entry of the vocabulary while it is being sorted by id.
typedef struct {
  size_t at, len;   // its bytes in a pool
  int seen, special, added;
} TokenizerEntry_;

// Files an entry under its id. n is the number of ids; exit 3 for an id outside of them or one given to two pieces.
UNUSED static TokenizerEntry_ *tokenizer_entry_(const char *path, TokenizerEntry_ *entry, size_t n, const Json *id, StrBuf *pool,
                                                size_t at) {
  const char *s = pool->data + at;
  size_t len = pool->len - at;
  if (id == NULL || id->type != JSON_INT || id->i < 0 || (uint64_t)id->i >= n)
    die(EXIT_DAMAGED, "%s: piece \"%.*s\": expected an id below %zu, the number of pieces, found %lld", path, (int)len, s, n,
        id && id->type == JSON_INT ? (long long)id->i : -1ll);
  TokenizerEntry_ *e = &entry[id->i];
  if (e->seen && (e->len != len || memcmp(pool->data + e->at, s, len) != 0))
    die(EXIT_DAMAGED, "%s: id %lld: expected one piece, found both \"%.*s\" and \"%.*s\"", path, (long long)id->i, (int)e->len,
        pool->data + e->at, (int)len, s);
  e->seen = 1;
  e->at = at;
  e->len = len;
  return e;
}

// Fills entry[0..n) from the vocabulary and the added tokens; the bytes go to pool.
UNUSED static void read_entries_(const Tokenizer *t, const char *path, const Json *vocab, const Json *added, TokenizerEntry_ *entry,
                                 size_t n, StrBuf *pool) {
  static const char *const off[] = {"single_word", "lstrip", "rstrip"};
  const Json *c;
  for (c = vocab->child; c; c = c->next) {
    size_t at = pool->len;
    unalias_(t->kind, c->key, c->key_len, pool);
    tokenizer_entry_(path, entry, n, c, pool, at);
  }
  for (c = added; c; c = c->next) {
    const Json *content = json_get(c, "content");
    int special = json_get_bool(c, "special", 0);
    if (content == NULL || content->type != JSON_STRING || content->len == 0)
      die(EXIT_DAMAGED, "%s: an entry of \"added_tokens\" has no string \"content\"", path);
    if (!special && t->kind == TOKENIZER_CHARACTERS)
      die(EXIT_DAMAGED, "%s: added token \"%s\": expected special = true; character tokenizers have no others", path, content->s);
    for (size_t i = 0; i < ARRAY_LEN(off); i++) {
      if (json_get_bool(c, off[i], 0))
        die(EXIT_DAMAGED, "%s: added token \"%s\": expected %s = false; true is not read", path, content->s, off[i]);
    }
    if (json_get_bool(c, "normalized", 0) && (t->nfc || (t->kind == TOKENIZER_SENTENCEPIECE && !special)))
      die(EXIT_DAMAGED, "%s: added token \"%s\": expected normalized = false; true is not read together with a normalizer", path,
          content->s);
    size_t at = pool->len;
    strbuf_append(pool, content->s, content->len);
    TokenizerEntry_ *e = tokenizer_entry_(path, entry, n, json_get(c, "id"), pool, at);
    e->special = special;
    e->added = 1;
  }
}

// Builds the table of pieces, checking each one.
UNUSED static void build_pieces_(Tokenizer *t, const char *path, const TokenizerEntry_ *entry, size_t n, const StrBuf *pool) {
  t->added = (int *)xcalloc(n, sizeof *t->added);
  for (size_t i = 0; i < n; i++) {
    const TokenizerEntry_ *e = &entry[i];
    const char *s = pool->data + e->at;
    if (!e->seen) die(EXIT_DAMAGED, "%s: expected ids 0 to %zu without gaps, found no piece with id %zu", path, n - 1, i);
    if (t->kind == TOKENIZER_CHARACTERS && !e->special && (e->len == 0 || utf8_char(s, e->len) != e->len))
      die(EXIT_DAMAGED, "%s: id %zu: expected a single character, found \"%.*s\": without a pre_tokenizer this is read as a "
          "character-level tokenizer", path, i, (int)e->len, s);
    int byte = t->kind == TOKENIZER_SENTENCEPIECE && !e->added ? byte_token_(s, e->len) : -1;
    if (byte >= 0) {
      char raw = (char)byte;
      t->byte_id[byte] = tokenizer_append_(t, &raw, 1, 0);
    } else if (tokenizer_add_(t, s, e->len, e->special) < 0) {
      die(EXIT_DAMAGED, "%s: id %zu: expected a new piece, found \"%.*s\" again", path, i, (int)e->len, s);
    }
    if (e->added) t->added[t->n_added++] = (int)i;
  }
}

// Orders the added tokens by length, so that the first that fits is the longest, and notes their first bytes. Insertion
// sort: there are a few hundred at most, mostly in order.
UNUSED static void sort_added_(Tokenizer *t) {
  size_t len, other;
  for (int i = 0; i < t->n_added; i++) {
    int id = t->added[i], k = i;
    const char *piece = tokenizer_piece(t, id, &len);
    t->added_first[(unsigned char)piece[0]] = 1;
    t->n_plain += !t->special[id];
    while (k > 0 && (tokenizer_piece(t, t->added[k - 1], &other), other < len)) {
      t->added[k] = t->added[k - 1];
      k--;
    }
    t->added[k] = id;
  }
}

// The bytes of a byte-level vocabulary. Some (SmolLM2) lack bytes that their training text did not have.
UNUSED static void find_bytes_(Tokenizer *t) {
  for (int byte = 0; byte < 256; byte++) {
    char raw = (char)byte;
    int id = tokenizer_id(t, &raw, 1);
    if (id >= 0 && !t->special[id]) t->byte_id[byte] = id;
  }
}

// SentencePiece models were trained on words, so that no piece has a blank behind something else. Then merges never cross
// such a place, and a text can be cut there: the ids are the same, and the words can be remembered.
UNUSED static void find_blanks_(Tokenizer *t) {
  t->split = SPLIT_BLANKS;
  for (int id = 0; id < t->vocab_size; id++) {
    size_t len;
    const char *piece = tokenizer_piece(t, id, &len);
    for (size_t i = 1; i < len && !t->special[id]; i++) {
      if (piece[i] == ' ' && piece[i - 1] != ' ') t->split = SPLIT_NONE;
    }
  }
}

// Exit 3 unless all 256 byte tokens of SentencePiece are there.
UNUSED static void check_byte_tokens_(const Tokenizer *t, const char *path) {
  for (int byte = 0; byte < 256; byte++) {
    if (t->byte_id[byte] < 0)
      die(EXIT_DAMAGED, "%s: byte_fallback: expected the pieces <0x00> to <0xFF>, found no <0x%02X>", path, byte);
  }
}

// The merges, each "left right" or ["left", "right"]; their place in the list is their rank.
UNUSED static void read_merges_(Tokenizer *t, const char *path, const Json *merges) {
  StrBuf both = {NULL, 0, 0};
  size_t i = 0;
  t->bpe = (Bpe *)xmalloc(sizeof *t->bpe);
  bpe_begin(t->bpe, merges ? merges->count : 0);
  for (const Json *m = merges ? merges->child : NULL; m; m = m->next, i++) {
    const char *left, *right;
    size_t left_len, right_len;
    if (m->type == JSON_ARRAY && m->count == 2 && m->child->type == JSON_STRING && m->child->next->type == JSON_STRING) {
      left = m->child->s;
      left_len = m->child->len;
      right = m->child->next->s;
      right_len = m->child->next->len;
    } else {
      const char *blank = m->type == JSON_STRING ? (const char *)memchr(m->s, ' ', m->len) : NULL;
      if (blank == NULL) die(EXIT_DAMAGED, "%s: merge %zu: expected \"left right\" or [\"left\", \"right\"]", path, i);
      left = m->s;
      left_len = (size_t)(blank - m->s);
      right = blank + 1;
      right_len = m->len - left_len - 1;
    }
    both.len = 0;
    unalias_(t->kind, left, left_len, &both);
    size_t cut = both.len;
    unalias_(t->kind, right, right_len, &both);
    int a = cut ? tokenizer_id(t, both.data, cut) : -1, b = both.len > cut ? tokenizer_id(t, both.data + cut, both.len - cut) : -1;
    int joined = a >= 0 && b >= 0 ? tokenizer_id(t, both.data, both.len) : -1;
    if (joined < 0)
      die(EXIT_DAMAGED, "%s: merge %zu: expected two pieces that make a third, found \"%.*s\" and \"%.*s\"", path, i,
          (int)left_len, left, (int)right_len, right);
    if (!bpe_add(t->bpe, a, b, joined, (uint32_t)i))
      die(EXIT_DAMAGED, "%s: merge %zu: expected a new pair, found \"%.*s\" and \"%.*s\" again", path, i, (int)left_len, left,
          (int)right_len, right);
  }
  strbuf_free(&both);
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

// tokenizer.json. The document's strings are needed until the end only.
UNUSED static void read_tokenizer_json_(Tokenizer *t, const char *path, const Json *root) {
  static const char *const model_off[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"};
  static const char *const character_off[] = {"normalizer", "pre_tokenizer", "post_processor"};
  const Json *model = json_get(root, "model");
  if (model == NULL || model->type != JSON_OBJECT) die(EXIT_DAMAGED, "%s: expected an object \"model\", found none", path);
  const Json *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
  const Json *added = json_get(root, "added_tokens"), *pre = json_get(root, "pre_tokenizer"), *c;

  // 1. Which kind is it, and is all of it known?
  const char *type = json_get_string(model, "type", merges && merges->count ? "BPE" : "none");
  if (strcmp(type, "BPE") != 0) die(EXIT_DAMAGED, "%s: model type: expected BPE, found %s", path, type);
  if (vocab == NULL || vocab->type != JSON_OBJECT || vocab->count == 0)
    die(EXIT_DAMAGED, "%s: expected an object \"vocab\" with at least one piece", path);
  if (added && added->type != JSON_ARRAY && added->type != JSON_NULL)
    die(EXIT_DAMAGED, "%s: expected \"added_tokens\" to be an array", path);
  if (merges && merges->type != JSON_ARRAY) die(EXIT_DAMAGED, "%s: expected \"merges\" to be an array", path);
  Tokenizer pipeline;
  memset(&pipeline, 0, sizeof pipeline);
  int sentencepiece = json_get_bool(model, "byte_fallback", 0);
  pipeline.kind = sentencepiece ? TOKENIZER_SENTENCEPIECE : is_type_(pre, "none") ? TOKENIZER_CHARACTERS : TOKENIZER_BYTES;
  for (size_t i = 0; i < ARRAY_LEN(model_off) - (size_t)sentencepiece; i++) tokenizer_want_off_(path, model, model_off[i]);
  if (pipeline.kind == TOKENIZER_CHARACTERS) {
    if (merges && merges->count > 0)
      die(EXIT_DAMAGED, "%s: model type BPE with %zu merges: expected a pre_tokenizer ByteLevel or byte_fallback, found neither",
          path, merges->count);
    for (size_t i = 0; i < ARRAY_LEN(character_off); i++) tokenizer_want_off_(path, root, character_off[i]);
    if (!is_type_(json_get(root, "decoder"), "Fuse"))
      die(EXIT_DAMAGED, "%s: decoder: expected type Fuse, found %s", path, type_of_(json_get(root, "decoder")));
  } else {
    if (sentencepiece) read_sentencepiece_pipeline_(&pipeline, path, root);
    else read_bytes_pipeline_(&pipeline, path, root);
    read_post_processor_(&pipeline, path, json_get(root, "post_processor"));
    pipeline.whole_words = json_get_bool(model, "ignore_merges", 0);
  }

  // 2. Sort by id. An added token either repeats a piece of the vocabulary or comes after all of them.
  size_t n = vocab->count;
  const Json *list = added ? added->child : NULL;
  for (c = list; c; c = c->next) n += json_get_int(c, "id", 0) >= (int64_t)vocab->count;
  if (n > 1u << 24) die(EXIT_DAMAGED, "%s: expected at most %u pieces, found %zu", path, 1u << 24, n);
  TokenizerEntry_ *entry = (TokenizerEntry_ *)xcalloc(n, sizeof *entry);
  StrBuf pool = {NULL, 0, 0};
  strbuf_append(&pool, "", 0);
  read_entries_(&pipeline, path, vocab, list, entry, n, &pool);

  // 3. Build.
  tokenizer_begin_(t, n);
  t->kind = pipeline.kind;
  t->split = pipeline.split;
  t->digits = pipeline.digits;
  t->nfc = pipeline.nfc;
  t->whole_words = pipeline.whole_words;
  t->prefix = pipeline.prefix;
  t->strip_blank = pipeline.strip_blank;
  t->add_bos = pipeline.add_bos;
  t->add_eos = pipeline.add_eos;
  build_pieces_(t, path, entry, n, &pool);
  sort_added_(t);
  t->unk_id = tokenizer_role_(t, path, model, "unk_token");
  if (t->kind == TOKENIZER_CHARACTERS && t->unk_id < 0)
    die(EXIT_DAMAGED, "%s: expected an unk_token, found none: unknown characters would have no id", path);
  if (t->kind == TOKENIZER_BYTES) find_bytes_(t);
  if (t->kind == TOKENIZER_SENTENCEPIECE) {
    check_byte_tokens_(t, path);
    find_blanks_(t);
  }
  if (t->kind != TOKENIZER_CHARACTERS) read_merges_(t, path, merges);
  free(entry);
  strbuf_free(&pool);
}

// ---------------------------------------------------------------------------------------------------------
// Reading llama2.c's tokenizer.bin: the length of the longest piece, then for each piece a score, a length and the bytes.
// The number of pieces is not stored. Blanks are plain blanks in it, and the merges are implied: any two pieces that make
// a third may be joined, those of the highest score first.

UNUSED static uint32_t bin_u32_(const char *p) {
  const unsigned char *u = (const unsigned char *)p;
  return (uint32_t)u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 | (uint32_t)u[3] << 24;
}

typedef struct {
  float score;
  int id;
} BinScore_;

UNUSED static int compare_scores_(const void *a, const void *b) {
  const BinScore_ *p = (const BinScore_ *)a, *q = (const BinScore_ *)b;
  if (p->score != q->score) return p->score > q->score ? -1 : 1;
  return (p->id > q->id) - (p->id < q->id);
}

// Tries every cut of every piece. With add = 0 only counts the pairs. rank [vocab_size]
UNUSED static size_t bin_pairs_(Tokenizer *t, const uint32_t *rank, int add) {
  size_t n = 0, len;
  for (int id = 0; id < t->vocab_size; id++) {
    const char *piece = tokenizer_piece(t, id, &len);
    for (size_t cut = 1; cut < len && !t->special[id]; cut++) {
      int a = tokenizer_id(t, piece, cut), b = a >= 0 ? tokenizer_id(t, piece + cut, len - cut) : -1;
      if (b < 0 || t->special[a] || t->special[b]) continue;
      if (add) bpe_add(t->bpe, a, b, id, rank[id]);
      n++;
    }
  }
  return n;
}

UNUSED static void read_tokenizer_bin_(Tokenizer *t, const char *path, const char *file, size_t size) {
  static const char *const marks[] = {"<unk>", "<s>", "</s>"};
  size_t n = 0, at = 4, len;

  // Count and check the records, then build.
  while (at < size) {
    if (size - at < 8 || (len = bin_u32_(file + at + 4)) > size - at - 8 || len > 1u << 16)
      die(EXIT_DAMAGED, "%s: offset %zu, piece %zu: expected a score, a length and as many bytes, found the end of the file; "
          "copy it again", path, at, n);
    at += 8 + len;
    n++;
  }
  if (n < 3 + 256 || n > 1u << 24) die(EXIT_DAMAGED, "%s: expected a llama2.c tokenizer of at least 259 pieces, found %zu", path, n);
  tokenizer_begin_(t, n);
  t->kind = TOKENIZER_SENTENCEPIECE;
  t->prefix = PREFIX_EACH;
  t->strip_blank = t->add_bos = 1;
  t->added = (int *)xcalloc(3, sizeof *t->added);
  BinScore_ *score = (BinScore_ *)xcalloc(n, sizeof *score);
  at = 4;
  for (size_t i = 0; i < n; i++, at += 8 + len) {
    const char *s = file + at + 8;
    uint32_t bits = bin_u32_(file + at);
    memcpy(&score[i].score, &bits, 4);
    score[i].id = (int)i;
    len = bin_u32_(file + at + 4);
    if (!isfinite(score[i].score)) die(EXIT_DAMAGED, "%s: offset %zu, piece %zu: expected a number as its score", path, at, i);
    int byte = byte_token_(s, len), ok;
    if (i < 3) {   // in the file they are "\n<s>\n" and so on
      ok = tokenizer_add_(t, marks[i], strlen(marks[i]), 1) >= 0;
      t->added[t->n_added++] = (int)i;
    } else if (byte >= 0) {
      char raw = (char)byte;
      ok = t->byte_id[byte] < 0;
      t->byte_id[byte] = tokenizer_append_(t, &raw, 1, 0);
    } else {
      ok = len > 0 && tokenizer_add_(t, s, len, 0) >= 0;
    }
    if (!ok) die(EXIT_DAMAGED, "%s: offset %zu, piece %zu: expected a new piece, found \"%.*s\"", path, at, i, (int)len, s);
  }
  t->unk_id = 0;
  t->bos_id = 1;
  t->eos_id = 2;
  sort_added_(t);
  check_byte_tokens_(t, path);
  find_blanks_(t);

  // Equal scores get equal ranks: among them the leftmost pair is joined first.
  uint32_t *rank = (uint32_t *)xcalloc(n, sizeof *rank), next = 0;
  qsort(score, n, sizeof *score, compare_scores_);
  for (size_t i = 0; i < n; i++) {
    if (i > 0 && score[i].score < score[i - 1].score) next++;
    rank[score[i].id] = next;
  }
  t->bpe = (Bpe *)xmalloc(sizeof *t->bpe);
  bpe_begin(t->bpe, bin_pairs_(t, rank, 0));
  bin_pairs_(t, rank, 1);
  free(rank);
  free(score);
}

// ---------------------------------------------------------------------------------------------------------
// Reading: the way in.

// Reads a tokenizer: path is a directory with tokenizer.json (or llama2.c's tokenizer.bin), or such a file itself. The roles
// of the special tokens are in tokenizer_config.json beside it (-1 without it). Exit 2 if there is no file, 3 if it is
// damaged or of a kind that is not known. vocab_padded becomes vocab_size; the model's config knows better.
UNUSED static void tokenizer_load(Tokenizer *t, const char *path) {
  char file[4096], dir[4096], config[4096];
  JsonDoc doc;
  StrBuf text = {NULL, 0, 0};
  snprintf(dir, sizeof dir, "%s", path);
  if (is_file(path)) {
    char *slash = strrchr(dir, '/');
    snprintf(file, sizeof file, "%s", path);
    if (slash) *slash = 0;
    else strcpy(dir, ".");
  } else {
    path_join(file, sizeof file, path, "tokenizer.bin");
    int bin = is_file(file);
    path_join(file, sizeof file, path, "tokenizer.json");
    if (bin && !is_file(file)) path_join(file, sizeof file, path, "tokenizer.bin");
  }
  size_t n = strlen(file);
  if (n > 4 && strcmp(file + n - 4, ".bin") == 0) {
    text.data = read_file(file, &text.len);
    if (text.data == NULL) die(EXIT_USAGE, "cannot read %s: %s", file, strerror(errno));
    read_tokenizer_bin_(t, file, text.data, text.len);
    strbuf_free(&text);
    return;
  }
  if (!tokenizer_parse_(file, &text, &doc))
    die(EXIT_USAGE, "cannot read %s: %s; a model directory holds its tokenizer.json", file, strerror(errno));
  read_tokenizer_json_(t, file, doc.root);
  json_free(&doc);
  t->file = text;

  path_join(config, sizeof config, dir, "tokenizer_config.json");
  memset(&text, 0, sizeof text);
  if (!tokenizer_parse_(config, &text, &doc)) {
    if (errno != ENOENT) die(EXIT_USAGE, "cannot read %s: %s", config, strerror(errno));
    return;
  }
  t->bos_id = tokenizer_role_(t, config, doc.root, "bos_token");
  t->eos_id = tokenizer_role_(t, config, doc.root, "eos_token");
  t->pad_id = tokenizer_role_(t, config, doc.root, "pad_token");
  json_free(&doc);
  t->config = text;
}

#endif
