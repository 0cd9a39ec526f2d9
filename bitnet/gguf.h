/*
gguf.h: the files of llama.cpp and bitnet.cpp: metadata and tensors in one file, weights often in blocks of a few bits.

What it is:  a reader that maps a file into memory and believes nothing in it, the block formats (float, 8-bit, 4-bit, ternary) in
             both directions where we write them, and a writer whose files appear whole or not at all.
What not:    nothing here knows which tensors or keys a model has; source.h and modes/convert.h do. Versions 2 and 3, little-endian.
Read before: bitnet/utils.h, bitnet/safetensors.h (16-bit floats).
Defines:     GgufType, gguf_type_name; GgufKey, GgufTensor, Gguf, gguf_open, gguf_close, gguf_key, gguf_u64, gguf_f32, gguf_bool,
             gguf_text, gguf_array_text, gguf_find, gguf_read, gguf_is_codes, gguf_codes, gguf_one_scale,
             gguf_release; tq1_encode, tq2_encode, i2s_encode, q8_encode; GgufOut,
             gguf_put_*, gguf_write.

A file:

    "GGUF", version (u32), number of tensors (u64), number of keys (u64)
    for each key:     name (string), type (u32), value
    for each tensor:  name (string), dimensions (u32, then a u64 each, the fastest first), type (u32), offset in the data (u64)
    zeros up to a multiple of the alignment (32, or the key general.alignment), then the data, each tensor padded in the same way

A string is its length (u64) and its bytes. A matrix [out, in] has the dimensions (in, out), and its bytes are rows of `in` values.
*/
#ifndef BITNET_GGUF_H
#define BITNET_GGUF_H

#include "../quant.h"
#include "safetensors.h"

// ---------------------------------------------------------------------------------------------------------
// Types of tensors. Values come in blocks along a row; a block has its own scale.

enum {
  GGUF_F32 = 0, GGUF_F16 = 1, GGUF_Q4_0 = 2, GGUF_Q4_1 = 3, GGUF_Q8_0 = 8, GGUF_BF16 = 30, GGUF_TQ1_0 = 34, GGUF_TQ2_0 = 35,
  GGUF_I2_S = 36   // bitnet.cpp only: one scale for the matrix, in 32 bytes behind its codes
};

typedef struct {
  int id;
  const char *name;
  size_t block, bytes;   // values in a block, and its bytes
} GgufType;

static const GgufType gguf_types[] = {{GGUF_F32, "F32", 1, 4},        {GGUF_F16, "F16", 1, 2},        {GGUF_BF16, "BF16", 1, 2},
                                      {GGUF_Q4_0, "Q4_0", 32, 18},    {GGUF_Q4_1, "Q4_1", 32, 20},    {GGUF_Q8_0, "Q8_0", 32, 34},
                                      {GGUF_TQ1_0, "TQ1_0", 256, 54}, {GGUF_TQ2_0, "TQ2_0", 256, 66}, {GGUF_I2_S, "I2_S", 128, 32}};

enum { GGUF_MAX_BLOCK = 256, I2S_TAIL = 32 };

UNUSED static const GgufType *gguf_type(uint32_t id) {
  for (size_t i = 0; i < ARRAY_LEN(gguf_types); i++) {
    if ((uint32_t)gguf_types[i].id == id) return &gguf_types[i];
  }
  return NULL;
}

// Bytes of n values of a type; n is a multiple of its block.
UNUSED static size_t gguf_bytes(const GgufType *t, size_t n) {
  return n / t->block * t->bytes + (t->id == GGUF_I2_S ? I2S_TAIL : 0);
}

// ---------------------------------------------------------------------------------------------------------
// An open file.

enum {   // types of metadata values
  GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_FLOAT, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64,
  GGUF_DOUBLE, GGUF_VALUE_TYPES
};

enum { GGUF_MAX_TENSORS = 1 << 20, GGUF_MAX_KEYS = 1 << 16, GGUF_MAX_DIMS = 4, GGUF_NAME_CAP = 64, GGUF_ALIGNMENT = 32 };

typedef struct {
  char *name;           // zero-terminated copy
  int type, element;    // GGUF_STRING ...; of an array the type of its elements
  size_t count;         // elements of an array, else 1
  size_t at;            // file offset of the value, of an array: of its first element
} GgufKey;

typedef struct {
  char name[GGUF_NAME_CAP];
  const GgufType *type;
  int ndim;
  size_t dims[GGUF_MAX_DIMS];   // the fastest first; 1 beyond ndim
  size_t n, begin, bytes;       // values; file offset; bytes without padding
} GgufTensor;

typedef struct {
  char *path;
  const unsigned char *map;
  size_t map_bytes, n_keys, n_tensors;
  GgufKey *keys;                 // [n_keys] in the order of the file
  GgufTensor *tensors;           // [n_tensors] in the order of the file
  const GgufTensor **by_name;    // [n_tensors] sorted
} Gguf;

__attribute__((noreturn)) PRINTF_LIKE(3, 4) static void gguf_bad_(const Gguf *g, size_t at, const char *fmt, ...) {
  char what[512];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(what, sizeof what, fmt, ap);
  va_end(ap);
  die(EXIT_DAMAGED, "%s: offset %zu: %s; copy or download the file again", g->path, at, what);
}

// A whole number of 1 to 8 bytes at *at, which moves on.
UNUSED static uint64_t gguf_take_(const Gguf *g, size_t *at, size_t bytes, const char *what) {
  uint64_t v = 0;
  if (bytes > g->map_bytes - *at) gguf_bad_(g, *at, "expected %s, found the end of the file", what);
  memcpy(&v, g->map + *at, bytes);
  *at += bytes;
  return v;
}

// A string at *at, which moves on: its bytes and *len.
UNUSED static const char *gguf_take_string_(const Gguf *g, size_t *at, size_t *len, const char *what) {
  size_t where = *at;
  uint64_t n = gguf_take_(g, at, 8, what);
  if (n > g->map_bytes - *at)
    gguf_bad_(g, where, "%s: expected at most the %zu bytes that are left, found a length of %llu", what, g->map_bytes - *at,
              (unsigned long long)n);
  const char *s = (const char *)g->map + *at;
  *len = (size_t)n;
  *at += (size_t)n;
  return s;
}

// Bytes of a metadata value of fixed size, 0 for strings and arrays.
UNUSED static size_t gguf_value_size_(int type) {
  static const unsigned char sizes[GGUF_VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return sizes[type];
}

// Skips one value of a simple type.
UNUSED static void gguf_skip_(const Gguf *g, size_t *at, int type, const char *what) {
  size_t len;
  if (type == GGUF_STRING) gguf_take_string_(g, at, &len, what);
  else if (type == GGUF_BOOL && gguf_take_(g, at, 1, what) > 1) gguf_bad_(g, *at - 1, "%s: expected 0 or 1 for a boolean", what);
  else if (type != GGUF_BOOL) gguf_take_(g, at, gguf_value_size_(type), what);
}

// Reads the type of a value; nested arrays do not exist.
UNUSED static int gguf_take_type_(const Gguf *g, size_t *at, const char *key, int in_array) {
  uint64_t type = gguf_take_(g, at, 4, "the type of a value");
  if (type >= GGUF_VALUE_TYPES || (in_array && type == GGUF_ARRAY))
    gguf_bad_(g, *at - 4, "key %.80s: expected the type of a value%s, found %llu", key, in_array ? " that arrays can have" : "",
              (unsigned long long)type);
  return (int)type;
}

UNUSED static int gguf_by_key_(const void *a, const void *b) {
  return strcmp((*(const GgufKey *const *)a)->name, (*(const GgufKey *const *)b)->name);
}

UNUSED static int gguf_by_name_(const void *a, const void *b) {
  return strcmp((*(const GgufTensor *const *)a)->name, (*(const GgufTensor *const *)b)->name);
}

UNUSED static void gguf_open_key_(const Gguf *g, GgufKey *k, size_t *at) {
  size_t len, where = *at;
  const char *name = gguf_take_string_(g, at, &len, "the name of a key");
  int clean = len > 0 && len < 256;
  for (size_t i = 0; i < len && clean; i++) clean = name[i] > ' ' && name[i] < 127;
  if (!clean) gguf_bad_(g, where, "expected the name of a key, 1 to 255 visible ASCII characters");
  k->name = (char *)xmalloc(len + 1);
  memcpy(k->name, name, len);
  k->name[len] = 0;
  k->type = gguf_take_type_(g, at, k->name, 0);
  k->element = k->type;
  k->count = 1;
  k->at = *at;
  if (k->type != GGUF_ARRAY) {
    gguf_skip_(g, at, k->type, k->name);
    return;
  }
  k->element = gguf_take_type_(g, at, k->name, 1);
  uint64_t count = gguf_take_(g, at, 8, "the length of an array");
  size_t size = gguf_value_size_(k->element), least = size ? size : 8;
  if (count > (g->map_bytes - *at) / least)
    gguf_bad_(g, *at - 8, "key %.80s: expected an array that fits into the %zu bytes that are left, found %llu elements", k->name,
              g->map_bytes - *at, (unsigned long long)count);
  k->count = (size_t)count;
  k->at = *at;
  if (k->element == GGUF_STRING || k->element == GGUF_BOOL) {
    for (size_t i = 0; i < k->count; i++) gguf_skip_(g, at, k->element, k->name);
  } else {
    *at += k->count * size;
  }
}

// One tensor; its offset is checked when all are known. *offset: what the file says.
UNUSED static void gguf_open_tensor_(const Gguf *g, GgufTensor *t, size_t *at, uint64_t *offset) {
  size_t len, where = *at;
  const char *name = gguf_take_string_(g, at, &len, "the name of a tensor");
  int clean = len > 0 && len < GGUF_NAME_CAP;
  for (size_t i = 0; i < len && clean; i++) clean = name[i] > ' ' && name[i] < 127;
  if (!clean) gguf_bad_(g, where, "expected the name of a tensor, 1 to %d visible ASCII characters", GGUF_NAME_CAP - 1);
  memcpy(t->name, name, len);
  uint64_t ndim = gguf_take_(g, at, 4, "a number of dimensions");
  if (ndim < 1 || ndim > GGUF_MAX_DIMS)
    gguf_bad_(g, *at - 4, "tensor %s: expected 1 to %d dimensions, found %llu", t->name, GGUF_MAX_DIMS, (unsigned long long)ndim);
  t->ndim = (int)ndim;
  t->n = 1;
  for (int i = 0; i < GGUF_MAX_DIMS; i++) {
    uint64_t d = i < t->ndim ? gguf_take_(g, at, 8, "a dimension") : 1;
    if (d == 0 || d > SIZE_MAX / 16 / t->n)
      gguf_bad_(g, *at - 8, "tensor %s: expected a size that memory can hold, found the dimension %llu", t->name,
                (unsigned long long)d);
    t->dims[i] = (size_t)d;
    t->n *= (size_t)d;
  }
  uint64_t type = gguf_take_(g, at, 4, "the type of a tensor");
  t->type = gguf_type((uint32_t)type);
  if (t->type == NULL)
    gguf_bad_(g, *at - 4, "tensor %s: expected the type F32, F16, BF16, Q8_0, Q4_0, Q4_1, TQ1_0, TQ2_0 or I2_S, found number %llu",
              t->name, (unsigned long long)type);
  if (t->dims[0] % t->type->block != 0)
    gguf_bad_(g, where, "tensor %s: expected rows of a multiple of %zu values, as %s wants, found %zu", t->name, t->type->block,
              t->type->name, t->dims[0]);
  t->bytes = gguf_bytes(t->type, t->n);
  *offset = gguf_take_(g, at, 8, "the offset of a tensor");
}

// The key of this name, or NULL.
UNUSED static const GgufKey *gguf_key(const Gguf *g, const char *name) {
  for (size_t i = 0; i < g->n_keys; i++) {
    if (strcmp(g->keys[i].name, name) == 0) return &g->keys[i];
  }
  return NULL;
}

// The tensor of this name, or NULL.
UNUSED static const GgufTensor *gguf_find(const Gguf *g, const char *name) {
  size_t lo = 0, hi = g->n_tensors;
  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;
    int order = strcmp(name, g->by_name[mid]->name);
    if (order == 0) return g->by_name[mid];
    if (order < 0) hi = mid;
    else lo = mid + 1;
  }
  return NULL;
}

/*
A whole number under a key; fallback where there is none. Exit 3 if it is of another type, negative, or above `most`. Signed and
unsigned types of any width are taken, as writers differ.
*/
UNUSED static uint64_t gguf_u64(const Gguf *g, const char *name, uint64_t fallback, uint64_t most) {
  const GgufKey *k = gguf_key(g, name);
  if (k == NULL) return fallback;
  size_t at = k->at, size = k->type == GGUF_ARRAY || k->type == GGUF_STRING ? 0 : gguf_value_size_(k->type);
  if (size == 0 || k->type == GGUF_FLOAT || k->type == GGUF_DOUBLE || k->type == GGUF_BOOL)
    gguf_bad_(g, k->at, "key %s: expected a whole number, found another type", name);
  uint64_t v = gguf_take_(g, &at, size, name);
  int is_signed = k->type == GGUF_I8 || k->type == GGUF_I16 || k->type == GGUF_I32 || k->type == GGUF_I64;
  if (v > most || (is_signed && v >> (8 * size - 1)))
    gguf_bad_(g, k->at, "key %s: expected a number from 0 to %llu, found %s%llu", name, (unsigned long long)most,
              is_signed && v >> (8 * size - 1) ? "a negative one, " : "", (unsigned long long)v);
  return v;
}

UNUSED static double gguf_f32(const Gguf *g, const char *name, double fallback) {
  const GgufKey *k = gguf_key(g, name);
  float x;
  if (k == NULL) return fallback;
  if (k->type != GGUF_FLOAT) gguf_bad_(g, k->at, "key %s: expected a 32-bit float, found another type", name);
  memcpy(&x, g->map + k->at, 4);
  if (!isfinite(x)) gguf_bad_(g, k->at, "key %s: expected a finite number, found %g", name, (double)x);
  return (double)x;
}

UNUSED static int gguf_bool(const Gguf *g, const char *name, int fallback) {
  const GgufKey *k = gguf_key(g, name);
  if (k == NULL) return fallback;
  if (k->type != GGUF_BOOL) gguf_bad_(g, k->at, "key %s: expected a boolean, found another type", name);
  return g->map[k->at];
}

// A short text under a key into out; fallback where there is none.
UNUSED static void gguf_text(const Gguf *g, const char *name, char *out, size_t cap, const char *fallback) {
  const GgufKey *k = gguf_key(g, name);
  snprintf(out, cap, "%s", fallback);
  if (k == NULL) return;
  if (k->type != GGUF_STRING) gguf_bad_(g, k->at, "key %s: expected a string, found another type", name);
  size_t at = k->at, len;
  const char *s = gguf_take_string_(g, &at, &len, name);
  if (len >= cap || memchr(s, 0, len))
    gguf_bad_(g, k->at, "key %s: expected a text of less than %zu bytes, found %zu", name, cap, len);
  memcpy(out, s, len);
  out[len] = 0;
}

// The next string of an array of strings; *at starts as the key's `at`.
UNUSED static const char *gguf_array_text(const Gguf *g, const GgufKey *k, size_t *at, size_t *len) {
  return gguf_take_string_(g, at, len, k->name);
}

// Two of the same name, of keys and of tensors, are an error: two readers could take different ones.
UNUSED static void gguf_check_names_(Gguf *g) {
  const GgufKey **keys = (const GgufKey **)xcalloc(g->n_keys, sizeof *keys);
  for (size_t i = 0; i < g->n_keys; i++) keys[i] = &g->keys[i];
  qsort(keys, g->n_keys, sizeof *keys, gguf_by_key_);
  for (size_t i = 1; i < g->n_keys; i++) {
    if (strcmp(keys[i]->name, keys[i - 1]->name) == 0)
      gguf_bad_(g, keys[i]->at, "expected key %.80s once, found it twice", keys[i]->name);
  }
  free(keys);
  for (size_t i = 0; i < g->n_tensors; i++) g->by_name[i] = &g->tensors[i];
  qsort(g->by_name, g->n_tensors, sizeof *g->by_name, gguf_by_name_);
  for (size_t i = 1; i < g->n_tensors; i++) {
    if (strcmp(g->by_name[i]->name, g->by_name[i - 1]->name) == 0)
      gguf_bad_(g, g->by_name[i]->begin, "expected tensor %s once, found it twice", g->by_name[i]->name);
  }
}

// Maps a file and checks all of its header; blocks are looked at when they are read. Exit 2 if the file cannot be read, 3 if it is
// damaged.
UNUSED static void gguf_open(Gguf *g, const char *path) {
  memset(g, 0, sizeof *g);
  g->map = map_file(path, &g->map_bytes, 24, "a GGUF header");
  g->path = xstrdup(path);
  st_not_impostor_(path, (const char *)g->map, g->map_bytes);
  if (memcmp(g->map, "GGUF", 4) != 0) gguf_bad_(g, 0, "expected the letters GGUF, found other bytes; is it a GGUF file?");

  // 1. The counts. Each key takes at least 13 bytes and each tensor 33, so that a count is never larger than the file.
  size_t at = 4;
  uint64_t version = gguf_take_(g, &at, 4, "a version"), tensors = gguf_take_(g, &at, 8, "a count"),
           keys = gguf_take_(g, &at, 8, "a count");
  if (version == 0x02000000 || version == 0x03000000) gguf_bad_(g, 4, "expected a little-endian file, found a big-endian one");
  if (version != 2 && version != 3)
    die(EXIT_DAMAGED, "%s: offset 4: expected GGUF version 2 or 3, found %llu; convert the model anew", path,
        (unsigned long long)version);
  if (tensors > GGUF_MAX_TENSORS || tensors > g->map_bytes / 33)
    gguf_bad_(g, 8, "expected a number of tensors that fits the file, found %llu", (unsigned long long)tensors);
  if (keys > GGUF_MAX_KEYS || keys > g->map_bytes / 13)
    gguf_bad_(g, 16, "expected a number of keys that fits the file, found %llu", (unsigned long long)keys);

  // 2. Keys, then tensors.
  g->keys = (GgufKey *)xcalloc((size_t)keys, sizeof *g->keys);
  for (; g->n_keys < keys; g->n_keys++) gguf_open_key_(g, &g->keys[g->n_keys], &at);
  uint64_t align = gguf_u64(g, "general.alignment", GGUF_ALIGNMENT, 1 << 20);
  if (align == 0 || (align & (align - 1)) != 0)
    gguf_bad_(g, gguf_key(g, "general.alignment")->at, "general.alignment: expected a power of two, found %llu",
              (unsigned long long)align);
  g->tensors = (GgufTensor *)xcalloc((size_t)tensors, sizeof *g->tensors);
  g->by_name = (const GgufTensor **)xcalloc((size_t)tensors, sizeof *g->by_name);
  uint64_t *offset = (uint64_t *)xcalloc((size_t)tensors, sizeof *offset);
  for (; g->n_tensors < tensors; g->n_tensors++) gguf_open_tensor_(g, &g->tensors[g->n_tensors], &at, &offset[g->n_tensors]);

  // 3. The data lie end to end, each tensor on a multiple of the alignment, up to the end of the file.
  size_t data = (at + (size_t)align - 1) / (size_t)align * (size_t)align, place = 0, end = 0;
  if (data > g->map_bytes && g->n_tensors > 0) gguf_bad_(g, at, "expected data, found the end of the file");
  for (size_t i = 0; i < g->n_tensors; i++) {
    GgufTensor *t = &g->tensors[i];
    if (offset[i] != place)
      gguf_bad_(g, at, "tensor %s: expected its data at %zu, behind the one before, found %llu", t->name, place,
                (unsigned long long)offset[i]);
    if (t->bytes > g->map_bytes - data - place)
      gguf_bad_(g, data + place, "tensor %s: expected %zu bytes, found the end of the file after %zu; it is cut off", t->name,
                t->bytes, g->map_bytes - data - place);
    t->begin = data + place;
    end = place + t->bytes;
    place = (end + (size_t)align - 1) / (size_t)align * (size_t)align;
    if (i + 1 < g->n_tensors && place > g->map_bytes - data)
      gguf_bad_(g, data + end, "expected padding and more tensors, found the end");
  }
  free(offset);
  if (g->n_tensors > 0 && g->map_bytes != data + place && g->map_bytes != data + end)
    gguf_bad_(g, data + end, "expected the file to end with its last tensor, found %zu bytes more", g->map_bytes - data - end);
  gguf_check_names_(g);
}

UNUSED static void gguf_close(Gguf *g) {
  if (g->map) munmap((void *)g->map, g->map_bytes);
  for (size_t i = 0; i < g->n_keys; i++) free(g->keys[i].name);
  free(g->keys);
  free(g->tensors);
  free(g->by_name);
  free(g->path);
  memset(g, 0, sizeof *g);
}

// ---------------------------------------------------------------------------------------------------------
/*
Ternary blocks. Codes are stored plus one: c = 0, 1, 2.

TQ2_0: two halves of 128 values: byte 32h + m holds values 128h + m, + 32, + 64, + 96 from the lowest two bits up; then
the scale as f16. TQ1_0: base 3, five values to a byte, the first most significant. A value v of 0 .. 242 is stored as the byte
ceil(256 v / 243), so that a decoder gets a digit by a multiplication instead of a division:
    bytes 0..31   values m, m+32, m+64, m+96, m+128             bytes 32..47   values 160+m, +16, +32, +48, +64
    bytes 48..51  values 240+m, +4, +8, +12, and a zero digit   bytes 52, 53   the scale
*/

// First value, distance between the digits, and number of digits of byte b of a TQ1_0 block.
UNUSED static void tq1_place_(size_t b, size_t *first, size_t *step, size_t *digits) {
  *first = b < 32 ? b : b < 48 ? 160 + b - 32 : 240 + b - 48;
  *step = b < 32 ? 32 : b < 48 ? 16 : 4;
  *digits = b < 48 ? 5 : 4;
}

// The number 0 .. 242 that a byte stands for, or -1.
UNUSED static int tq1_value_(unsigned byte) {
  unsigned v = byte * 243 / 256;   // the only candidate besides its successor, by rounding
  for (; v < 243 && (256 * v + 242) / 243 <= byte; v++) {
    if ((256 * v + 242) / 243 == byte) return (int)v;
  }
  return -1;
}

// codes (=) [type->block] of a block of TQ1_0, TQ2_0 or I2_S. Returns 1, or 0 if a byte is none that an encoder writes.
UNUSED static int ternary_block_(int8_t *codes, const unsigned char *p, int type) {
  int ok = 1;
  for (size_t i = 0; i < 256 && type == GGUF_TQ2_0; i += 32) {
    ok &= codes_from_bits(codes + i, p + i / 128 * 32, 32, (int)(i % 128 / 16));
  }
  for (size_t i = 0; i < 128 && type == GGUF_I2_S; i += 32) ok &= codes_from_bits(codes + i, p, 32, (int)(6 - i / 16));
  for (size_t b = 0; b < 52 && type == GGUF_TQ1_0; b++) {
    size_t first, step, digits;
    int v = tq1_value_(p[b]), power = 81;
    tq1_place_(b, &first, &step, &digits);
    if (v < 0 || (digits == 4 && v % 3 != 0)) return 0;
    for (size_t d = 0; d < digits; d++, power /= 3) codes[first + d * step] = (int8_t)(v / power % 3 - 1);
  }
  return ok;
}

// The scale behind the codes. A block of zeros gets 0, as llama.cpp does it.
UNUSED static void tq_put_scale_(uint8_t *out, const int8_t *codes, float gamma) {
  int any = 0;
  for (int i = 0; i < 256; i++) any |= codes[i];
  uint16_t h = any ? f16_from_f32(gamma) : 0;
  memcpy(out, &h, 2);
}

// One block (=) from 256 codes in {-1,0,1} and their scale: 54 bytes.
UNUSED static void tq1_encode(uint8_t *out, const int8_t *codes, float gamma) {
  for (size_t b = 0; b < 52; b++) {
    size_t first, step, digits;
    unsigned v = 0;
    tq1_place_(b, &first, &step, &digits);
    for (size_t d = 0; d < 5; d++) v = 3 * v + (d < digits ? (unsigned)(codes[first + d * step] + 1) : 0);
    out[b] = (uint8_t)((256 * v + 242) / 243);
  }
  tq_put_scale_(out + 52, codes, gamma);
}

// The same in 66 bytes.
UNUSED static void tq2_encode(uint8_t *out, const int8_t *codes, float gamma) {
  memset(out, 0, 64);
  for (size_t i = 0; i < 256; i++) out[i / 128 * 32 + i % 32] |= (uint8_t)((unsigned)(codes[i] + 1) << (2 * (i % 128 / 32)));
  tq_put_scale_(out + 64, codes, gamma);
}

// 128 codes in 32 bytes, the form of bitnet.cpp on x86: value j in byte j mod 32, the first 32 in the highest two bits.
UNUSED static void i2s_encode(uint8_t *out, const int8_t *codes) {
  memset(out, 0, 32);
  for (size_t j = 0; j < 128; j++) out[j % 32] |= (uint8_t)((unsigned)(codes[j] + 1) << (6 - 2 * (j / 32)));
}

// 32 floats in 34 bytes: a scale and int8, rounded half away from zero.
UNUSED static void q8_encode(uint8_t *out, const float *x) {
  float most = 0;
  for (int i = 0; i < 32; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
  float d = most / 127, inverse = d > 0 ? 1.0f / d : 0;
  uint16_t h = f16_from_f32(d);
  memcpy(out, &h, 2);
  for (int i = 0; i < 32; i++) out[2 + i] = (uint8_t)(int8_t)roundf(x[i] * inverse);
}

// ---------------------------------------------------------------------------------------------------------
// Reading values.

UNUSED static float gguf_half_(const unsigned char *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return f32_from_f16(h);
}

// 1 for the types whose blocks hold ternary codes and a scale.
UNUSED static int gguf_is_codes(const GgufTensor *t) {
  return t->type->id == GGUF_TQ1_0 || t->type->id == GGUF_TQ2_0 || t->type->id == GGUF_I2_S;
}

// The scale of block b of such a tensor; I2_S has one for all, behind them.
UNUSED static float gguf_block_scale_(const Gguf *g, const GgufTensor *t, size_t b) {
  float d;
  if (t->type->id != GGUF_I2_S) return gguf_half_(g->map + t->begin + (b + 1) * t->type->bytes - 2);
  memcpy(&d, g->map + t->begin + t->n / 4, 4);
  return d;
}

// Block number b of a tensor: out (=) [block] floats.
UNUSED static void gguf_read_block_(const Gguf *g, const GgufTensor *t, size_t b, float *out) {
  const unsigned char *p = g->map + t->begin + b * t->type->bytes;
  int8_t codes[GGUF_MAX_BLOCK];
  float d, low;
  uint16_t h;
  int ok = 1;
  switch (t->type->id) {
    case GGUF_F32: memcpy(out, p, 4); break;
    case GGUF_F16: out[0] = gguf_half_(p); break;
    case GGUF_BF16: memcpy(&h, p, 2); out[0] = f32_from_bf16(h); break;
    case GGUF_Q8_0:
      d = gguf_half_(p);
      for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)p[2 + i];
      break;
    case GGUF_Q4_0:
      d = gguf_half_(p);
      for (int i = 0; i < 32; i++) out[i] = d * (float)((p[2 + i % 16] >> (i / 16 * 4) & 15) - 8);
      break;
    case GGUF_Q4_1:
      d = gguf_half_(p);
      low = gguf_half_(p + 2);
      for (int i = 0; i < 32; i++) out[i] = d * (float)(p[4 + i % 16] >> (i / 16 * 4) & 15) + low;
      break;
    default:
      d = gguf_block_scale_(g, t, b);
      ok = ternary_block_(codes, p, t->type->id);
      for (size_t i = 0; i < t->type->block && ok; i++) out[i] = d * (float)codes[i];
  }
  if (!ok)
    gguf_bad_(g, t->begin + b * t->type->bytes, "tensor %s: expected a block of %s, found bytes that no encoder writes", t->name,
              t->type->name);
}

// Values first .. first+count-1 as floats, whatever their type. Infinities and NaN are passed on.
UNUSED static void gguf_read(const Gguf *g, const GgufTensor *t, float *out, size_t first, size_t count) {
  float block[GGUF_MAX_BLOCK];
  size_t size = t->type->block;
  if (first > t->n || count > t->n - first)
    die(EXIT_FAILED, "bug: values %zu to %zu asked of tensor %s of %s, which has %zu", first, first + count, t->name, g->path, t->n);
  if (t->type->id == GGUF_F32) {
    if (count > 0) memcpy(out, g->map + t->begin + 4 * first, 4 * count);
    return;
  }
  for (size_t i = 0; i < count;) {
    size_t b = (first + i) / size, skip = (first + i) % size, take = size - skip < count - i ? size - skip : count - i;
    gguf_read_block_(g, t, b, block);
    memcpy(out + i, block + skip, take * sizeof(float));
    i += take;
  }
}

/*
codes (=) [count]: the signs of values first .. first+count-1, whole blocks, of a tensor for which gguf_is_codes. Returns 1, or 0 if a
block holds bytes that no encoder writes.
*/
UNUSED static int gguf_codes(const Gguf *g, const GgufTensor *t, int8_t *codes, size_t first, size_t count) {
  size_t size = t->type->block;
  int ok = 1;
  for (size_t at = 0; at < count; at += size) {
    size_t b = (first + at) / size;
    float d = gguf_block_scale_(g, t, b);
    ok &= ternary_block_(codes + at, g->map + t->begin + b * t->type->bytes, t->type->id);
    for (size_t i = 0; i < size && !(d > 0); i++) codes[at + i] = (int8_t)(d < 0 ? -codes[at + i] : 0);
  }
  return ok;
}

/*
1 if all values of such a tensor are -g, 0 or g; *gamma (=) g, 0 for zeros only. Scales decide it: those of blocks of zeros may be any
number. Blocks that no encoder writes are left to whoever reads them.
*/
UNUSED static int gguf_one_scale(const Gguf *g, const GgufTensor *t, float *gamma) {
  float top = 0;
  for (size_t b = 0; b < t->n / t->type->block; b++) {
    int8_t codes[GGUF_MAX_BLOCK];
    float a = fabsf(gguf_block_scale_(g, t, b));
    int any = 0;
    if (!isfinite(a)) return 0;
    if (a == top || a == 0) continue;
    if (!ternary_block_(codes, g->map + t->begin + b * t->type->bytes, t->type->id)) continue;
    for (size_t i = 0; i < t->type->block; i++) any |= codes[i];
    if (any && top != 0) return 0;
    if (any) top = a;
  }
  *gamma = top;
  return 1;
}

// Gives the memory back that reading a tensor has filled.
UNUSED static void gguf_release(const Gguf *g, const GgufTensor *t) {
  map_release(g->map + t->begin, g->map + t->begin + t->bytes);
}

// ---------------------------------------------------------------------------------------------------------
// Writing: keys and tensors are collected, then the file is written in one go.

typedef struct {
  StrBuf keys, tensors;
  uint64_t n_keys, n_tensors;
  uint64_t end;   // of the data so far, padded
} GgufOut;

// Writes exactly the bytes of tensor number i, in the order in which they were announced.
typedef void (*GgufWriter)(void *ctx, size_t i, SafeFile *f);

UNUSED static void gguf_append_(StrBuf *b, const void *p, size_t n) {
  strbuf_append(b, (const char *)p, n);
}

UNUSED static void gguf_append_string_(StrBuf *b, const char *s, size_t len) {
  uint64_t n = len;
  gguf_append_(b, &n, 8);
  gguf_append_(b, s, len);
}

// Key and type; the value follows.
UNUSED static void gguf_put_key_(GgufOut *o, const char *name, uint32_t type) {
  gguf_append_string_(&o->keys, name, strlen(name));
  gguf_append_(&o->keys, &type, 4);
  o->n_keys++;
}

UNUSED static void gguf_put_u32(GgufOut *o, const char *name, uint32_t v) {
  gguf_put_key_(o, name, GGUF_U32);
  gguf_append_(&o->keys, &v, 4);
}

UNUSED static void gguf_put_f32(GgufOut *o, const char *name, float v) {
  gguf_put_key_(o, name, GGUF_FLOAT);
  gguf_append_(&o->keys, &v, 4);
}

UNUSED static void gguf_put_bool(GgufOut *o, const char *name, int v) {
  char c = v != 0;
  gguf_put_key_(o, name, GGUF_BOOL);
  gguf_append_(&o->keys, &c, 1);
}

UNUSED static void gguf_put_text(GgufOut *o, const char *name, const char *text) {
  gguf_put_key_(o, name, GGUF_STRING);
  gguf_append_string_(&o->keys, text, strlen(text));
}

// The head of an array of count elements, which the caller appends to o->keys.
UNUSED static void gguf_put_array(GgufOut *o, const char *name, uint32_t element, uint64_t count) {
  gguf_put_key_(o, name, GGUF_ARRAY);
  gguf_append_(&o->keys, &element, 4);
  gguf_append_(&o->keys, &count, 8);
}

// Announces a tensor of shape [rows, cols], or [cols] where rows is 0.
UNUSED static void gguf_put_tensor(GgufOut *o, const char *name, int type, size_t rows, size_t cols) {
  uint32_t ndim = rows ? 2 : 1, id = (uint32_t)type;
  uint64_t dims[2] = {cols, rows};
  gguf_append_string_(&o->tensors, name, strlen(name));
  gguf_append_(&o->tensors, &ndim, 4);
  gguf_append_(&o->tensors, dims, 8 * ndim);
  gguf_append_(&o->tensors, &id, 4);
  gguf_append_(&o->tensors, &o->end, 8);
  o->end += gguf_bytes(gguf_type(id), size_mul(rows ? rows : 1, cols));
  o->end = (o->end + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT;
  o->n_tensors++;
}

// Writes the file and empties o. sizes: [n_tensors] bytes of each tensor. Returns 0 or the errno of what failed.
UNUSED static int gguf_write(GgufOut *o, const char *path, const size_t *sizes, GgufWriter writer, void *ctx) {
  static const char zeros[GGUF_ALIGNMENT] = {0};
  SafeFile f;
  StrBuf head = {NULL, 0, 0};
  uint32_t version = 3;
  strbuf_append(&head, "GGUF", 4);
  gguf_append_(&head, &version, 4);
  gguf_append_(&head, &o->n_tensors, 8);
  gguf_append_(&head, &o->n_keys, 8);
  gguf_append_(&head, o->keys.data, o->keys.len);
  gguf_append_(&head, o->tensors.data, o->tensors.len);
  while (head.len % GGUF_ALIGNMENT) strbuf_append(&head, "", 1);
  if (safe_open(&f, path) == 0) safe_write(&f, head.data, head.len);
  for (size_t i = 0; i < o->n_tensors && !f.failed; i++) {
    writer(ctx, i, &f);
    safe_write(&f, zeros, (GGUF_ALIGNMENT - sizes[i] % GGUF_ALIGNMENT) % GGUF_ALIGNMENT);
  }
  strbuf_free(&head);
  strbuf_free(&o->keys);
  strbuf_free(&o->tensors);
  memset(o, 0, sizeof *o);
  return safe_commit(&f);
}

#endif
