/*
llama2c.h: the model files of llama2.c and of its ternary sibling bitllama2.c.

What it is:  a reader of three forms of .bin files: legacy (seven numbers, then floats), version 1 (a header of 256 bytes with a magic
             number), and the ternary form, which has the header of version 1 and four codes a byte. The files have no names and no
             checksums: the header says how large the file must be, to the byte, and that is what tells the forms apart.
What not:    no 8-bit files (version 2); no tokenizer (tokenizer.h reads the tokenizer.bin beside the model).
Read before: bitnet/safetensors.h.
Defines:     Llama2c, llama2c_open, llama2c_close, llama2c_place, llama2c_read, llama2c_codes.

    legacy      dim, hidden, layers, heads, kv_heads, vocab (negative: the classifier is a matrix of its own), context: int32 each
                embedding; norm1 of all layers; q, k, v, o, each of all layers; norm2; w1, w2, w3; final norm; two rope tables;
                classifier
    version 1   "ak42", 1, the seven numbers, one byte: shared classifier; zeros up to byte 256
                norm1, norm2 of all layers; final norm; embedding; q, k, v, o, w1, w2, w3, each of all layers; classifier
    ternary     the same header; final norm; embedding; q, k, v, o, w1, w2, w3, each of all layers: a float scale, then rows*cols/4
                bytes, the first code in the highest two bits: 00 = 0, 01 = +1, 11 = -1

w1 is our gate, w3 our up, w2 our down. Rotary positions turn neighbouring numbers; source.h reorders the rows.
*/
#ifndef BITNET_LLAMA2C_H
#define BITNET_LLAMA2C_H

#include "safetensors.h"

enum { LLAMA2C_LEGACY, LLAMA2C_V1, LLAMA2C_TERNARY };
enum { LLAMA2C_EMBED, LLAMA2C_NORM1, LLAMA2C_NORM2, LLAMA2C_FINAL, LLAMA2C_Q, LLAMA2C_K, LLAMA2C_V, LLAMA2C_O, LLAMA2C_W1, LLAMA2C_W2,
       LLAMA2C_W3, LLAMA2C_HEAD, LLAMA2C_PARTS };

typedef struct {
  char *path;
  const unsigned char *map;
  size_t map_bytes;
  int form;                                                          // LLAMA2C_*
  int dim, hidden, layers, heads, kv_heads, vocab, context, tied;
  size_t at[LLAMA2C_PARTS];                                          // file offset of the part in layer 0; 0 = the file has none
  size_t values[LLAMA2C_PARTS];                                      // of the part in one layer
} Llama2c;

static const uint32_t llama2c_magic = 0x616B3432;

UNUSED static int llama2c_is_matrix_(int part) {
  return part >= LLAMA2C_Q && part <= LLAMA2C_W3;
}

// Bytes of a part in one layer.
UNUSED static size_t llama2c_bytes_(const Llama2c *f, int part) {
  return f->form == LLAMA2C_TERNARY && llama2c_is_matrix_(part) ? 4 + f->values[part] / 4 : 4 * f->values[part];
}

// Lays the parts out for this form. Returns the size that the file must have.
UNUSED static size_t llama2c_layout_(Llama2c *f, int form) {
  static const int orders[3][LLAMA2C_PARTS] = {
      {LLAMA2C_EMBED, LLAMA2C_NORM1, LLAMA2C_Q, LLAMA2C_K, LLAMA2C_V, LLAMA2C_O, LLAMA2C_NORM2, LLAMA2C_W1, LLAMA2C_W2, LLAMA2C_W3,
       LLAMA2C_FINAL, LLAMA2C_HEAD},
      {LLAMA2C_NORM1, LLAMA2C_NORM2, LLAMA2C_FINAL, LLAMA2C_EMBED, LLAMA2C_Q, LLAMA2C_K, LLAMA2C_V, LLAMA2C_O, LLAMA2C_W1, LLAMA2C_W2,
       LLAMA2C_W3, LLAMA2C_HEAD},
      {LLAMA2C_FINAL, LLAMA2C_EMBED, LLAMA2C_Q, LLAMA2C_K, LLAMA2C_V, LLAMA2C_O, LLAMA2C_W1, LLAMA2C_W2, LLAMA2C_W3, -1, -1, -1}};
  size_t at = form == LLAMA2C_LEGACY ? 28 : 256;
  f->form = form;
  memset(f->at, 0, sizeof f->at);
  for (int i = 0; i < LLAMA2C_PARTS; i++) {
    int part = orders[form][i];
    if (part < 0 || (part == LLAMA2C_HEAD && f->tied)) continue;
    // Legacy files keep two tables of angles, which we compute, in front of the classifier.
    if (part == LLAMA2C_HEAD && form == LLAMA2C_LEGACY) at += 4 * (size_t)f->context * (size_t)(f->dim / f->heads);
    f->at[part] = at;
    at += llama2c_bytes_(f, part) * (size_t)(part == LLAMA2C_EMBED || part == LLAMA2C_FINAL || part == LLAMA2C_HEAD ? 1 : f->layers);
  }
  if (form == LLAMA2C_LEGACY && f->tied) at += 4 * (size_t)f->context * (size_t)(f->dim / f->heads);
  return at;
}

// Exits with 3 unless the seven numbers make sense; fills f->values.
UNUSED static void llama2c_check_(Llama2c *f) {
  static const char *const names[] = {"dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"};
  static const int most[] = {1 << 20, 1 << 20, 1 << 12, 1 << 20, 1 << 20, 1 << 24, 1 << 24};   // no product of these overflows
  const int v[] = {f->dim, f->hidden, f->layers, f->heads, f->kv_heads, f->vocab, f->context};
  for (size_t i = 0; i < ARRAY_LEN(v); i++) {
    if (v[i] < 1 || v[i] > most[i])
      die(EXIT_DAMAGED, "%s: %s in the header: expected 1 to %d, found %d; is it a llama2.c model?", f->path, names[i], most[i], v[i]);
  }
  if (f->dim % f->heads != 0 || f->heads % f->kv_heads != 0 || f->dim / f->heads % 2 != 0)
    die(EXIT_DAMAGED, "%s: header: expected %d heads of an even width that fill dim=%d, and a divisor of them as n_kv_heads, found %d",
        f->path, f->heads, f->dim, f->kv_heads);
  size_t C = (size_t)f->dim, F = (size_t)f->hidden, KV = (size_t)(f->dim / f->heads) * (size_t)f->kv_heads, V = (size_t)f->vocab;
  const size_t values[LLAMA2C_PARTS] = {V * C, C, C, C, C * C, KV * C, KV * C, C * C, F * C, C * F, F * C, V * C};
  memcpy(f->values, values, sizeof values);
}

// Maps a file and finds out its form. Exit 2 if it cannot be read, 3 if it is none of the three.
UNUSED static void llama2c_open(Llama2c *f, const char *path) {
  int32_t head[10] = {0};
  memset(f, 0, sizeof *f);
  f->map = map_file(path, &f->map_bytes, 256, "a llama2.c model");
  f->path = xstrdup(path);
  st_not_impostor_(path, (const char *)f->map, f->map_bytes);
  memcpy(head, f->map, sizeof head);

  int legacy = (uint32_t)head[0] != llama2c_magic;
  if (!legacy && head[1] != 1)
    die(EXIT_DAMAGED, "%s: offset 4: expected llama2.c version 1, found %d; 8-bit files (version 2) are not read, export version 1",
        path, head[1]);
  const int32_t *h = legacy ? head : head + 2;
  f->dim = h[0];
  f->hidden = h[1];
  f->layers = h[2];
  f->heads = h[3];
  f->kv_heads = h[4];
  f->vocab = legacy && h[5] < 0 && h[5] > INT32_MIN ? -h[5] : h[5];
  f->context = h[6];
  f->tied = legacy ? h[5] > 0 : f->map[36] == 1;
  if (!legacy && f->map[36] > 1) die(EXIT_DAMAGED, "%s: offset 36: shared classifier: expected 0 or 1, found %d", path, f->map[36]);
  llama2c_check_(f);
  size_t want = llama2c_layout_(f, legacy ? LLAMA2C_LEGACY : LLAMA2C_V1), ternary = 0;
  if (f->map_bytes == want) return;
  if (!legacy && f->tied && f->values[LLAMA2C_Q] % 4 == 0 && f->values[LLAMA2C_K] % 4 == 0 && f->values[LLAMA2C_W1] % 4 == 0) {
    ternary = llama2c_layout_(f, LLAMA2C_TERNARY);
    if (f->map_bytes == ternary) return;
  }
  die(EXIT_DAMAGED,
      "%s: expected a file of %zu bytes for the shape in its header%s, found %zu; is it cut off, or not a llama2.c model?", path, want,
      ternary ? " (less if it is ternary)" : "", f->map_bytes);
}

UNUSED static void llama2c_close(Llama2c *f) {
  if (f->map) munmap((void *)f->map, f->map_bytes);
  free(f->path);
  memset(f, 0, sizeof *f);
}

// Where a part of a layer begins in the file.
UNUSED static size_t llama2c_place(const Llama2c *f, int part, int layer) {
  return f->at[part] + (size_t)layer * llama2c_bytes_(f, part);
}

// Floats first .. first+count-1 of a part that lies as floats.
UNUSED static void llama2c_read(const Llama2c *f, int part, int layer, float *out, size_t first, size_t count) {
  if (first > f->values[part] || count > f->values[part] - first) die(EXIT_FAILED, "bug: %s: part %d is shorter", f->path, part);
  if (count > 0) memcpy(out, f->map + llama2c_place(f, part, layer) + 4 * first, 4 * count);
}

// Codes first .. first+count-1 of a matrix of a ternary file. Returns its scale; exit 3 for the bits 10.
UNUSED static float llama2c_codes(const Llama2c *f, int part, int layer, int8_t *codes, size_t first, size_t count) {
  size_t place = llama2c_place(f, part, layer);
  const unsigned char *p = f->map + place;
  float scale;
  memcpy(&scale, p, 4);
  if (!(scale >= 0) || !isfinite(scale))
    die(EXIT_DAMAGED, "%s: offset %zu: expected the scale of a matrix, found %g", f->path, place, (double)scale);
  for (size_t i = 0; i < count; i++) {
    int bits = p[4 + (first + i) / 4] >> (6 - 2 * ((first + i) % 4)) & 3;
    if (bits == 2)
      die(EXIT_DAMAGED, "%s: offset %zu: expected the codes 00, 01 or 11, found 10", f->path, place + 4 + (first + i) / 4);
    codes[i] = (int8_t)(bits == 3 ? -1 : bits);
  }
  return scale;
}

#endif
