/*
safetensors.h: files of named tensors, the format of Hugging Face models.

What it is:  a reader that maps a file into memory and believes nothing in it, a writer whose files appear whole or not at
             all, and sets of files (shards with an index). Our own files carry a CRC-32 of each tensor in their metadata,
             so that a flipped bit is found; other readers ignore it.
What not:    nothing here knows which tensors a model has: the model checks names, shapes and dtypes. No sub-byte dtypes.
Read before: bitnet/utils.h, bitnet/json.h.
Defines:     StDtype, st_dtype_name, st_dtype_size; StTensor, StFile, st_open, st_close, st_find, st_metadata, st_data,
             st_read_f32, st_release, st_verify; StSet, st_set_open, st_set_close, st_set_find, st_set_verify; StEntry, StMeta,
             StSource, st_write; bf16_from_f32, f32_from_bf16, f16_from_f32, f32_from_f16.

A file:

    bytes 0..7          N, the length of the header, as a 64-bit little-endian number
    bytes 8..8+N-1      the header, one JSON object:
                        {"__metadata__": {"format": "pt", ..}, "a.weight": {"dtype": "F32", "shape": [2,3],
                        "data_offsets": [0,24]}, ..}
    bytes 8+N..         the data, row-major and little-endian; data_offsets count from here

The tensors must cover the data exactly, without holes, overlaps or a rest. Files of other writers may have an odd N or a
float at an odd offset, so numbers are copied out with memcpy and never read through a cast pointer.
*/
#ifndef BITNET_SAFETENSORS_H
#define BITNET_SAFETENSORS_H

#include "json.h"
#include "utils.h"
#include <strings.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors.h copies little-endian numbers as they are; this machine is big-endian"
#endif

#ifdef __CUDACC__
#define ST_FN __host__ __device__ static inline
#else
#define ST_FN UNUSED static inline
#endif

// ---------------------------------------------------------------------------------------------------------
// 16-bit floats. bf16 is the upper half of a float: the same range, 8 bits of precision. f16 has 11 bits of precision and
// ends at 65504. Rounding is to nearest, ties to even.

ST_FN uint32_t st_float_bits_(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

ST_FN float st_bits_float_(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

ST_FN float f32_from_bf16(uint16_t h) {
  return st_bits_float_((uint32_t)h << 16);
}

// Adding just under half of the last kept place, and one more if that place is odd, carries exactly when rounding up is
// right. A NaN must not carry into infinity: its lower bits are dropped and the quiet bit keeps it a NaN.
ST_FN uint16_t bf16_from_f32(float x) {
  uint32_t u = st_float_bits_(x);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

ST_FN float f32_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
  if (exponent == 0) {   // zero and subnormals: mantissa * 2^-24, exact in a float
    float x = (float)mantissa * 0x1p-24f;
    return sign ? -x : x;
  }
  if (exponent == 31) return st_bits_float_(sign | 0x7F800000 | mantissa << 13);
  return st_bits_float_(sign | (exponent + 112) << 23 | mantissa << 13);
}

// From 65520 on the result is infinity.
ST_FN uint16_t f16_from_f32(float x) {
  uint32_t u = st_float_bits_(x), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (a >> 13 & 0x3FF));   // NaN
  if (a >= 0x47800000) return (uint16_t)(sign | 0x7C00);                      // 65536 and more
  if (a >= 0x38800000) return (uint16_t)(sign | ((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13));
  // Below 2^-14, a subnormal: how many units of 2^-24, the mantissa with its hidden bit shifted right and rounded.
  uint32_t shift = 126 - (a >> 23), mantissa = (a & 0x7FFFFF) | 0x800000;
  if (shift > 24) return (uint16_t)sign;   // less than half a unit
  uint32_t units = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  return (uint16_t)(sign | (units + (rest > half || (rest == half && (units & 1)))));
}

// ---------------------------------------------------------------------------------------------------------
// Types.

// Only the first three can be read as numbers; U8 holds packed codes; the others can be named, sized and skipped.
typedef enum {
  ST_F32, ST_BF16, ST_F16, ST_U8, ST_I8, ST_BOOL, ST_F8_E4M3, ST_F8_E5M2, ST_I16, ST_U16, ST_I32, ST_U32, ST_I64, ST_U64, ST_F64,
  ST_DTYPES
} StDtype;

UNUSED static const char *st_dtype_name(int dtype) {
  static const char *const names[ST_DTYPES] = {"F32", "BF16", "F16", "U8",  "I8",  "BOOL", "F8_E4M3", "F8_E5M2",
                                               "I16", "U16",  "I32", "U32", "I64", "U64",  "F64"};
  return names[dtype];
}

// Bytes of one element.
UNUSED static size_t st_dtype_size(int dtype) {
  static const unsigned char sizes[ST_DTYPES] = {4, 2, 2, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 8};
  return sizes[dtype];
}

enum {
  ST_MAX_DIMS = 8,
  ST_MAX_NAME = 512,            // bytes of a tensor's name
  ST_MAX_TENSORS = 1000000,
  ST_MAX_HEADER = 100000000,    // bytes, as in the reference implementation
  ST_MAX_JSON_DEPTH = 8
};

typedef struct {
  const char *name;           // without control characters, 1 to ST_MAX_NAME bytes
  int dtype;                  // StDtype
  int ndim;                   // 0 = a single number
  size_t shape[ST_MAX_DIMS];
  size_t n;                   // number of elements, the product of shape
  size_t begin, end;          // its bytes, counted from the start of the data
} StTensor;

typedef struct {
  char *path;
  const unsigned char *map;     // the whole file
  size_t map_bytes, data_at;    // file offset of the data: 8 + N
  size_t n_tensors;
  StTensor *tensors;            // [n_tensors] in the order of their data
  const StTensor **by_name;     // [n_tensors] sorted
  JsonDoc header;               // owns the names
  const Json *metadata;         // object of strings, or NULL
} StFile;

// ---------------------------------------------------------------------------------------------------------
// Opening: every claim of the header is checked before anything is allocated or read by it.

// Exits with 3 if the file is one of the two usual impostors: what Git leaves when LFS is not installed, or a web page.
UNUSED static void st_not_impostor_(const char *path, const char *data, size_t n) {
  static const char *const pages[] = {"<!doctype", "<html", "<?xml"};
  static const char lfs[] = "version https://git-lfs";
  if (n >= strlen(lfs) && memcmp(data, lfs, strlen(lfs)) == 0)
    die(EXIT_DAMAGED, "%s: expected data, found a Git LFS pointer; fetch the real file with `git lfs pull`", path);
  size_t at = 0;
  while (at < n && at < 64 && isspace((unsigned char)data[at])) at++;
  for (size_t i = 0; i < ARRAY_LEN(pages); i++) {
    if (n - at >= strlen(pages[i]) && strncasecmp(data + at, pages[i], strlen(pages[i])) == 0)
      die(EXIT_DAMAGED, "%s: expected data, found an HTML page; the download gave an error page, download the file again", path);
  }
}

// What a message says about a value that should not be there.
UNUSED static const char *st_found_(const Json *v, char out[64]) {
  static const char *const kinds[] = {"null", "a boolean", "", "", "", "an array", "an object"};
  if (v == NULL) snprintf(out, 64, "nothing");
  else if (v->type == JSON_INT) snprintf(out, 64, signbit(v->d) && v->i == 0 ? "-0" : "%lld", (long long)v->i);
  else if (v->type == JSON_REAL) snprintf(out, 64, "the real number %g", v->d);
  else if (v->type == JSON_STRING) snprintf(out, 64, "\"%.40s\"", v->s);
  else snprintf(out, 64, "%s", kinds[v->type]);
  for (char *c = out; *c; c++) {
    if (iscntrl((unsigned char)*c)) *c = '?';
  }
  return out;
}

// Exits with 3. field: what is wrong with the tensor; v: the value found there, or NULL; at: file offset.
UNUSED __attribute__((noreturn)) static void st_bad_(const StFile *f, const char *tensor, const char *field, size_t at,
                                                     const char *expected, const Json *v) {
  char found[64];
  die(EXIT_DAMAGED, "%s: tensor %s, %s at offset %zu: expected %s, found %s; copy or download the file again", f->path, tensor,
      field, at, expected, st_found_(v, found));
}

// An integer that is a size or an offset. 8e0, 2.0 and -0 are none.
UNUSED static size_t st_size_(const StFile *f, const char *tensor, const char *field, const Json *v) {
  if (v->type != JSON_INT || signbit(v->d) || (uint64_t)v->i > SIZE_MAX)
    st_bad_(f, tensor, field, 8 + v->offset, "a non-negative integer", v);
  return (size_t)v->i;
}

// One entry of the header. data_bytes: what the file has behind the header.
UNUSED static void st_entry_(const StFile *f, StTensor *t, const Json *e, size_t data_bytes) {
  size_t at = 8 + e->key_offset;
  int clean = e->key_len > 0 && e->key_len <= ST_MAX_NAME;
  for (size_t i = 0; i < e->key_len && clean; i++) clean = !iscntrl((unsigned char)e->key[i]);
  if (!clean)
    die(EXIT_DAMAGED, "%s: name of a tensor at offset %zu: expected 1 to %d bytes without control characters, found %s; "
        "copy or download the file again", f->path, at, ST_MAX_NAME,
        e->key_len == 0 ? "an empty name" : e->key_len > ST_MAX_NAME ? "a longer one" : "a control character");
  t->name = e->key;
  if (e->type != JSON_OBJECT) st_bad_(f, t->name, "entry", 8 + e->offset, "an object", e);

  const Json *dtype = json_get(e, "dtype"), *shape = json_get(e, "shape"), *span = json_get(e, "data_offsets");
  if (dtype == NULL || dtype->type != JSON_STRING) st_bad_(f, t->name, "dtype", dtype ? 8 + dtype->offset : at, "a string", dtype);
  for (t->dtype = 0; t->dtype < ST_DTYPES; t->dtype++) {
    const char *name = st_dtype_name(t->dtype);
    if (strlen(name) == dtype->len && memcmp(name, dtype->s, dtype->len) == 0) break;
  }
  char found[64];
  if (t->dtype == ST_DTYPES)
    die(EXIT_DAMAGED, "%s: dtype %s of tensor %s at offset %zu is not supported; expected F32, BF16, F16 or U8", f->path,
        st_found_(dtype, found), t->name, 8 + dtype->offset);

  if (shape == NULL || shape->type != JSON_ARRAY) st_bad_(f, t->name, "shape", shape ? 8 + shape->offset : at, "an array", shape);
  if (shape->count > ST_MAX_DIMS)
    die(EXIT_DAMAGED, "%s: tensor %s, shape at offset %zu: expected at most %d dimensions, found %zu", f->path, t->name,
        8 + shape->offset, ST_MAX_DIMS, shape->count);
  size_t bytes = st_dtype_size(t->dtype);
  t->n = 1;
  int zero = 0, fits = 1;
  for (const Json *d = shape->child; d; d = d->next) {
    size_t dim = st_size_(f, t->name, "shape", d);
    t->shape[t->ndim++] = dim;
    zero |= dim == 0;
    if (dim != 0 && t->n > SIZE_MAX / bytes / dim) fits = 0;
    if (fits && dim != 0) t->n *= dim;
  }
  if (!fits)
    die(EXIT_DAMAGED, "%s: tensor %s, shape at offset %zu: expected a size that memory can hold, found an overflow; copy or "
        "download the file again", f->path, t->name, 8 + shape->offset);
  if (zero) t->n = 0;

  if (span == NULL || span->type != JSON_ARRAY || span->count != 2)
    st_bad_(f, t->name, "data_offsets", span ? 8 + span->offset : at, "an array of two numbers", span);
  t->begin = st_size_(f, t->name, "data_offsets", span->child);
  t->end = st_size_(f, t->name, "data_offsets", span->child->next);
  if (t->begin > t->end)
    die(EXIT_DAMAGED, "%s: tensor %s, data_offsets at offset %zu: expected begin <= end, found [%zu,%zu]; copy or download the "
        "file again", f->path, t->name, 8 + span->offset, t->begin, t->end);
  if (t->end > data_bytes)
    die(EXIT_DAMAGED, "%s: tensor %s, data_offsets at offset %zu: expected at most the %zu bytes of data that the file has, found "
        "%zu; the file is cut off, copy or download it again", f->path, t->name, 8 + span->offset, data_bytes, t->end);
  if (t->end - t->begin != t->n * bytes)
    die(EXIT_DAMAGED, "%s: tensor %s, data_offsets at offset %zu: expected %zu bytes for its shape in %s, found %zu; copy or "
        "download the file again", f->path, t->name, 8 + span->offset, t->n * bytes, st_dtype_name(t->dtype), t->end - t->begin);
}

// By place in the data; empty tensors before the one that begins where they lie.
UNUSED static int st_by_place_(const void *a, const void *b) {
  const StTensor *x = (const StTensor *)a, *y = (const StTensor *)b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return (x->end > y->end) - (x->end < y->end);
}

UNUSED static int st_by_name_(const void *a, const void *b) {
  return strcmp((*(const StTensor *const *)a)->name, (*(const StTensor *const *)b)->name);
}

// The tensors must lie end to end over all of the data.
UNUSED static void st_check_cover_(const StFile *f, size_t data_bytes) {
  size_t at = 0;
  for (size_t i = 0; i < f->n_tensors; i++) {
    const StTensor *t = &f->tensors[i];
    if (t->begin != at)
      die(EXIT_DAMAGED, "%s: tensor %s, data_offsets: expected to begin where the one before ends, at %zu (file offset %zu), found "
          "%zu, %s; copy or download the file again", f->path, t->name, at, f->data_at + at, t->begin,
          t->begin > at ? "a hole" : "an overlap");
    at = t->end;
  }
  if (at != data_bytes)
    die(EXIT_DAMAGED, "%s: expected the data to end with its last tensor at offset %zu, found %zu bytes more; copy or download the "
        "file again", f->path, f->data_at + at, data_bytes - at);
}

// Maps a file and checks its header; the data itself is not looked at (see st_verify). Exit 2 if the file cannot be read,
// 3 if it is damaged.
UNUSED static void st_open(StFile *f, const char *path) {
  memset(f, 0, sizeof *f);
  f->map = map_file(path, &f->map_bytes, 8, "the header's length");
  f->path = xstrdup(path);

  // 1. The header's length, then the header as JSON.
  const char *text = (const char *)f->map + 8;
  uint64_t len = 0;
  st_not_impostor_(path, (const char *)f->map, f->map_bytes);
  memcpy(&len, f->map, 8);
  if (len == 0 || len > ST_MAX_HEADER)
    die(EXIT_DAMAGED, "%s: offset 0: expected a header of 1 to %d bytes, found a length of %llu; is it a safetensors file?", path,
        ST_MAX_HEADER, (unsigned long long)len);
  if (len > f->map_bytes - 8)
    die(EXIT_DAMAGED, "%s: offset 0: expected a header of %llu bytes, found only %zu behind its length; the file is cut off, copy or "
        "download it again", path, (unsigned long long)len, f->map_bytes - 8);
  if (text[0] != '{') die(EXIT_DAMAGED, "%s: offset 8: expected '{', found byte 0x%02X; is it a safetensors file?", path, f->map[8]);
  char err[256];
  if (!json_parse(&f->header, text, (size_t)len, err, sizeof err))
    die(EXIT_DAMAGED, "%s: in the header, which begins at byte 8 of the file: %s; copy or download it again", path, err);
  if (f->header.depth > ST_MAX_JSON_DEPTH)
    die(EXIT_DAMAGED, "%s: header at offset 8: expected at most %d levels of JSON, found %d", path, ST_MAX_JSON_DEPTH,
        f->header.depth);

  // 2. The metadata: strings only.
  char found[64];
  const Json *root = f->header.root, *meta = json_get(root, "__metadata__");
  if (meta && meta->type != JSON_NULL) {
    if (meta->type != JSON_OBJECT) st_bad_(f, "__metadata__", "entry", 8 + meta->offset, "an object of strings", meta);
    for (const Json *m = meta->child; m; m = m->next) {
      if (m->type != JSON_STRING)
        die(EXIT_DAMAGED, "%s: __metadata__ at offset %zu: expected a string, found %s; copy or download the file again", path,
            8 + m->offset, st_found_(m, found));
    }
    f->metadata = meta;
  }

  // 3. The tensors.
  size_t n = root->count - (meta != NULL), i = 0, data_bytes;
  if (n > ST_MAX_TENSORS) die(EXIT_DAMAGED, "%s: expected at most %d tensors, found %zu", path, ST_MAX_TENSORS, n);
  f->data_at = 8 + (size_t)len;
  data_bytes = f->map_bytes - f->data_at;
  f->tensors = (StTensor *)xcalloc(n, sizeof *f->tensors);
  f->by_name = (const StTensor **)xcalloc(n, sizeof *f->by_name);
  f->n_tensors = n;
  for (const Json *e = root->child; e; e = e->next) {
    if (e != meta) st_entry_(f, &f->tensors[i++], e, data_bytes);
  }
  qsort(f->tensors, n, sizeof *f->tensors, st_by_place_);
  st_check_cover_(f, data_bytes);
  for (i = 0; i < n; i++) f->by_name[i] = &f->tensors[i];
  qsort(f->by_name, n, sizeof *f->by_name, st_by_name_);
}

UNUSED static void st_close(StFile *f) {
  if (f->map) munmap((void *)f->map, f->map_bytes);
  json_free(&f->header);
  free(f->tensors);
  free(f->by_name);
  free(f->path);
  memset(f, 0, sizeof *f);
}

// ---------------------------------------------------------------------------------------------------------
// Reading.

// The tensor with this name, or NULL.
UNUSED static const StTensor *st_find(const StFile *f, const char *name) {
  size_t lo = 0, hi = f->n_tensors;
  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;
    int order = strcmp(name, f->by_name[mid]->name);
    if (order == 0) return f->by_name[mid];
    if (order < 0) hi = mid;
    else lo = mid + 1;
  }
  return NULL;
}

// The metadata's text under this key, or NULL.
UNUSED static const char *st_metadata(const StFile *f, const char *key) {
  return json_get_string(f->metadata, key, NULL);
}

// The tensor's bytes, end - begin of them, at any alignment; valid until st_close.
UNUSED static const unsigned char *st_data(const StFile *f, const StTensor *t) {
  return f->map + f->data_at + t->begin;
}

// Elements first .. first+count-1 of an F32, BF16 or F16 tensor as floats. Exit 3 for another dtype.
UNUSED static void st_read_f32(const StFile *f, const StTensor *t, float *out, size_t first, size_t count) {
  const unsigned char *p = st_data(f, t);
  if (first > t->n || count > t->n - first)
    die(EXIT_FAILED, "bug: elements %zu to %zu asked of tensor %s of %s, which has %zu", first, first + count, t->name, f->path, t->n);
  if (t->dtype == ST_F32) {
    if (count > 0) memcpy(out, p + 4 * first, 4 * count);
    return;
  }
  if (t->dtype != ST_BF16 && t->dtype != ST_F16)
    die(EXIT_DAMAGED, "%s: dtype %s of tensor %s is not supported here; expected F32, BF16 or F16 numbers", f->path,
        st_dtype_name(t->dtype), t->name);
  p += 2 * first;
  for (size_t i = 0; i < count; i++) {
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    out[i] = t->dtype == ST_BF16 ? f32_from_bf16(h) : f32_from_f16(h);
  }
}

// Gives the memory back that reading a tensor has filled; it can be read again, from the file.
UNUSED static void st_release(const StFile *f, const StTensor *t) {
  map_release(st_data(f, t), st_data(f, t) + (t->end - t->begin));
}

// ---------------------------------------------------------------------------------------------------------
/*
Checksums. The metadata entry "crc32.NAME" holds the CRC-32 of tensor NAME's bytes as eight hexadecimal digits, and
"crc32.__metadata__" (no tensor can have that name) the sum modulo 2^32 of one CRC for each other metadata entry and for each
tensor's name, dtype and shape. A sum, because writers may store the entries in any order.
*/
#define ST_CRC_ "crc32."

// CRC of one metadata entry: key, zero, value, zero.
UNUSED static uint32_t st_crc_entry_(const char *key, size_t key_len, const char *value, size_t len) {
  uint32_t crc = crc32_bytes(crc32_bytes(0, key, key_len), "", 1);
  return crc32_bytes(crc32_bytes(crc, value, len), "", 1);
}

// CRC of what the header says about a tensor: its name with the zero, then the text "F32 2 3".
UNUSED static uint32_t st_crc_tensor_(const char *name, int dtype, int ndim, const size_t *shape) {
  char text[32 + ST_MAX_DIMS * 24];
  int len = snprintf(text, sizeof text, "%s", st_dtype_name(dtype));
  for (int i = 0; i < ndim; i++) len += snprintf(text + len, sizeof text - (size_t)len, " %zu", shape[i]);
  return crc32_bytes(crc32_bytes(0, name, strlen(name) + 1), text, (size_t)len);
}

// Exits with 3 unless the eight digits of a metadata entry are this CRC. what, at: what was summed and where it lies.
UNUSED static void st_crc_compare_(const StFile *f, const Json *m, uint32_t crc, const char *what, size_t at) {
  char want[16], found[64];
  snprintf(want, sizeof want, "%08x", crc);
  if (m->len != 8 || strcmp(m->s, want) != 0)
    die(EXIT_DAMAGED, "%s: %s at offset %zu: CRC-32: expected %s as the header says, found %s; the file is damaged, copy it again "
        "(a file that was changed on purpose must lose its %s entries)", f->path, what, at, st_found_(m, found), want, ST_CRC_);
}

// Compares all data with the checksums of the metadata. Returns 1, or 0 if the file carries none (it is not ours); exit 3 if
// one differs, if one names no tensor, or if some tensors have one and others do not.
UNUSED static int st_verify(const StFile *f) {
  size_t prefix = strlen(ST_CRC_), n = 0;
  const Json *own = NULL;
  uint32_t sum = 0;
  for (const Json *m = f->metadata ? f->metadata->child : NULL; m; m = m->next) {
    if (m->key_len < prefix || memcmp(m->key, ST_CRC_, prefix) != 0) {
      sum += st_crc_entry_(m->key, m->key_len, m->s, m->len);
      continue;
    }
    const char *name = m->key + prefix;
    if (strcmp(name, "__metadata__") == 0) {
      own = m;
      continue;
    }
    const StTensor *t = strlen(name) == m->key_len - prefix ? st_find(f, name) : NULL;
    if (t == NULL)
      die(EXIT_DAMAGED, "%s: __metadata__ at offset %zu: expected the checksum of a tensor, found one whose tensor is missing; the "
          "file is damaged, copy it again", f->path, 8 + m->key_offset);
    char what[ST_MAX_NAME + 16];
    snprintf(what, sizeof what, "tensor %s", t->name);
    st_crc_compare_(f, m, crc32_bytes(0, st_data(f, t), t->end - t->begin), what, f->data_at + t->begin);
    st_release(f, t);
    n++;
  }
  if (own == NULL && n == 0) return 0;
  char key[ST_MAX_NAME + 16];
  for (size_t i = 0; i < f->n_tensors; i++) {
    const StTensor *t = &f->tensors[i];
    sum += st_crc_tensor_(t->name, t->dtype, t->ndim, t->shape);
    snprintf(key, sizeof key, "%s%s", ST_CRC_, t->name);
    if (n < f->n_tensors && st_metadata(f, key) == NULL)
      die(EXIT_DAMAGED, "%s: tensor %s: expected a checksum in the metadata as the other tensors have, found none; the file is "
          "damaged, copy it again", f->path, t->name);
  }
  if (own) st_crc_compare_(f, own, sum, "the header", 8);
  return 1;
}

// ---------------------------------------------------------------------------------------------------------
// Sets: the weights of a model directory, in one file or in shards.

typedef struct {
  size_t n_files;
  StFile *files;      // [n_files], sorted by name if there is an index
  JsonDoc index;      // of model.safetensors.index.json; index.root is NULL for a single file
  const Json *map;    // its weight_map: tensor -> name of a file
} StSet;

// The name of a file without its directory.
UNUSED static const char *st_base_name_(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// The file of the set with this name, or NULL.
UNUSED static const StFile *st_set_file_(const StSet *s, const char *name) {
  size_t lo = 0, hi = s->n_files;
  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;
    int order = strcmp(name, st_base_name_(s->files[mid].path));
    if (order == 0) return &s->files[mid];
    if (order < 0) hi = mid;
    else lo = mid + 1;
  }
  return NULL;
}

// The tensor with this name, or NULL; *file becomes the file that holds it.
UNUSED static const StTensor *st_set_find(const StSet *s, const char *name, const StFile **file) {
  *file = s->map ? NULL : s->files;
  const char *shard = json_get_string(s->map, name, NULL);
  if (shard) *file = st_set_file_(s, shard);
  return *file ? st_find(*file, name) : NULL;
}

UNUSED static int st_by_text_(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// Exits with 3 unless a file name of the index is a plain name: no way out of the directory.
UNUSED static void st_check_shard_name_(const char *path, const Json *m) {
  char found[64];
  int plain = m->type == JSON_STRING && m->len > 0 && strstr(m->s, "..") == NULL && strpbrk(m->s, "/\\") == NULL;
  for (size_t i = 0; plain && i < m->len; i++) plain = !iscntrl((unsigned char)m->s[i]);
  if (!plain)
    die(EXIT_DAMAGED, "%s: weight_map at offset %zu: expected the plain name of a file in the same directory, found %s", path,
        m->offset, st_found_(m, found));
}

// Opens the shards of an index and checks that index and shards name the same tensors.
UNUSED static void st_set_open_index_(StSet *s, const char *dir, const char *path, const char *text, size_t len) {
  char err[256], shard[4096];
  st_not_impostor_(path, text, len);
  if (!json_parse(&s->index, text, len, err, sizeof err)) die(EXIT_DAMAGED, "%s: %s; copy or download the file again", path, err);
  s->map = json_get(s->index.root, "weight_map");
  if (s->map == NULL || s->map->type != JSON_OBJECT || s->map->count == 0)
    die(EXIT_DAMAGED, "%s: weight_map: expected an object that names at least one tensor, found %s; copy or download the file again",
        path, st_found_(s->map, err));

  // 1. The different file names. total_size is not looked at: it is wrong in some files.
  const char **names = (const char **)xcalloc(s->map->count, sizeof *names);
  size_t n = 0, in_files = 0;
  const Json *m;
  for (m = s->map->child; m; m = m->next) {
    st_check_shard_name_(path, m);
    names[n++] = m->s;
  }
  qsort(names, n, sizeof *names, st_by_text_);
  for (size_t i = 0; i < n; i++) {
    if (i == 0 || strcmp(names[i], names[s->n_files - 1]) != 0) names[s->n_files++] = names[i];
  }

  // 2. Open them all.
  s->files = (StFile *)xcalloc(s->n_files, sizeof *s->files);
  for (size_t i = 0; i < s->n_files; i++) {
    path_join(shard, sizeof shard, dir, names[i]);
    if (!is_file(shard)) die(EXIT_USAGE, "%s names the file %s, which is missing; download it, too", path, shard);
    st_open(&s->files[i], shard);
    in_files += s->files[i].n_tensors;
  }
  free(names);

  // 3. Each tensor of the map is in its file; then, if the files hold more, one of theirs is not in the map or is twice there.
  for (m = s->map->child; m; m = m->next) {
    const StFile *f = st_set_file_(s, m->s);
    if (strlen(m->key) != m->key_len || st_find(f, m->key) == NULL)
      die(EXIT_DAMAGED, "%s: weight_map at offset %zu: expected tensor %.*s in %s, found none there; copy or download both files "
          "again", path, m->offset, ST_MAX_NAME, m->key, f->path);
  }
  for (size_t i = 0; i < s->n_files && in_files != s->map->count; i++) {
    for (size_t k = 0; k < s->files[i].n_tensors; k++) {
      const char *name = s->files[i].tensors[k].name, *home = json_get_string(s->map, name, NULL);
      if (home == NULL)
        die(EXIT_DAMAGED, "%s: tensor %s: expected it in the weight_map of %s, found none; copy or download both files again",
            s->files[i].path, name, path);
      if (strcmp(home, st_base_name_(s->files[i].path)) != 0)
        die(EXIT_DAMAGED, "%s: tensor %s: expected it only in %s as %s says, found it in both files; download them again",
            s->files[i].path, name, home, path);
    }
  }
}

// Opens the weights of a model directory: the shards of model.safetensors.index.json if there is one, otherwise
// model.safetensors. Exit 2 if a file is missing, 3 if one is damaged or they do not fit together.
UNUSED static void st_set_open(StSet *s, const char *dir) {
  char path[4096];
  size_t len;
  memset(s, 0, sizeof *s);
  path_join(path, sizeof path, dir, "model.safetensors.index.json");
  char *text = read_file(path, &len);
  if (text) {
    st_set_open_index_(s, dir, path, text, len);
    free(text);
    return;
  }
  if (errno != ENOENT && errno != ENOTDIR) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  path_join(path, sizeof path, dir, "model.safetensors");
  if (!is_file(path))
    die(EXIT_USAGE, "%s holds neither model.safetensors nor model.safetensors.index.json; is it a model directory?", dir);
  s->files = (StFile *)xcalloc(1, sizeof *s->files);
  s->n_files = 1;
  st_open(s->files, path);
}

UNUSED static void st_set_close(StSet *s) {
  for (size_t i = 0; i < s->n_files; i++) st_close(&s->files[i]);
  free(s->files);
  json_free(&s->index);
  memset(s, 0, sizeof *s);
}

// st_verify for each file. Returns how many of them carry checksums.
UNUSED static size_t st_set_verify(const StSet *s) {
  size_t n = 0;
  for (size_t i = 0; i < s->n_files; i++) n += (size_t)st_verify(&s->files[i]);
  return n;
}

// ---------------------------------------------------------------------------------------------------------
// Writing.

typedef struct {
  const char *name;
  int dtype;                    // ST_F32, ST_BF16, ST_F16, ST_U8 or ST_I32
  int ndim;
  size_t shape[ST_MAX_DIMS];
} StEntry;

typedef struct {
  const char *key, *value;   // "format" and keys that begin with "crc32." are the writer's own
} StMeta;

// Gives elements first .. first+count-1 of entries[entry]: count floats, or count bytes for ST_U8, int32 for ST_I32. Called twice for
// each element, first for the checksum, then for the file; both times it must give the same.
typedef void (*StSource)(void *ctx, size_t entry, size_t first, size_t count, void *out);

#define ST_CHUNK_ ((size_t)1 << 16)   // elements that the writer asks for at once

// One tensor on its way into the file.
typedef struct {
  const StEntry *e;
  size_t entry, n, begin, bytes;
  uint32_t crc;
} StPlan_;

UNUSED static int st_by_entry_name_(const void *a, const void *b) {
  return strcmp(((const StPlan_ *)a)->e->name, ((const StPlan_ *)b)->e->name);
}

// Larger elements first, so that with a header padded to 8 bytes every tensor is aligned; then by name.
UNUSED static int st_by_plan_(const void *a, const void *b) {
  const StPlan_ *x = (const StPlan_ *)a, *y = (const StPlan_ *)b;
  size_t sx = st_dtype_size(x->e->dtype), sy = st_dtype_size(y->e->dtype);
  return sx != sy ? (sx < sy ? 1 : -1) : st_by_entry_name_(a, b);
}

// 1 if all of s is UTF-8.
UNUSED static int st_is_utf8_(const char *s) {
  size_t len = strlen(s), at = 0, n = 1;
  for (; at < len && n > 0; at += n) n = utf8_char(s + at, len - at);
  return n > 0;
}

// Checks and sorts the entries. Our own code made them, so a mistake is a bug.
UNUSED static void st_plan_(const char *path, StPlan_ *plan, const StEntry *entries, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const StEntry *e = &entries[i];
    size_t len = strlen(e->name);
    int clean = len > 0 && len <= ST_MAX_NAME && strcmp(e->name, "__metadata__") != 0 && st_is_utf8_(e->name);
    for (size_t k = 0; k < len; k++) clean = clean && !iscntrl((unsigned char)e->name[k]);
    if (!clean) die(EXIT_FAILED, "bug: %s: tensor %zu has a name that cannot be written", path, i);
    if (e->dtype != ST_F32 && e->dtype != ST_BF16 && e->dtype != ST_F16 && e->dtype != ST_U8 && e->dtype != ST_I32)
      die(EXIT_FAILED, "bug: %s: tensor %s: dtype %d cannot be written", path, e->name, e->dtype);
    if (e->ndim < 0 || e->ndim > ST_MAX_DIMS) die(EXIT_FAILED, "bug: %s: tensor %s has %d dimensions", path, e->name, e->ndim);
    plan[i].e = e;
    plan[i].entry = i;
    plan[i].n = 1;
    for (int k = 0; k < e->ndim; k++) plan[i].n = size_mul(plan[i].n, e->shape[k]);
    plan[i].bytes = size_mul(plan[i].n, st_dtype_size(e->dtype));
  }
  qsort(plan, n, sizeof *plan, st_by_entry_name_);
  for (size_t i = 1; i < n; i++) {
    if (strcmp(plan[i].e->name, plan[i - 1].e->name) == 0)
      die(EXIT_FAILED, "bug: %s: tensor %s is written twice", path, plan[i].e->name);
  }
  qsort(plan, n, sizeof *plan, st_by_plan_);
  size_t at = 0;
  for (size_t i = 0; i < n; i++) {
    plan[i].begin = at;
    if (plan[i].bytes > SIZE_MAX - at) die(EXIT_USAGE, "%s: size overflow", path);
    at += plan[i].bytes;
  }
}

// Converts one tensor and returns its CRC; into the file, too, unless out is NULL. Exit 2 for a number that F16 cannot hold.
UNUSED static uint32_t st_convert_(const char *path, const StPlan_ *p, StSource source, void *ctx, float *values, uint16_t *halves,
                                   SafeFile *out) {
  size_t size = st_dtype_size(p->e->dtype);
  uint32_t crc = 0;
  for (size_t first = 0; first < p->n && !(out && out->failed); first += ST_CHUNK_) {
    size_t count = p->n - first < ST_CHUNK_ ? p->n - first : ST_CHUNK_;
    source(ctx, p->entry, first, count, values);
    const void *bytes = size == 2 ? (const void *)halves : (const void *)values;
    for (size_t i = 0; i < count && p->e->dtype == ST_BF16; i++) halves[i] = bf16_from_f32(values[i]);
    for (size_t i = 0; i < count && p->e->dtype == ST_F16; i++) {
      halves[i] = f16_from_f32(values[i]);
      if ((halves[i] & 0x7FFF) == 0x7C00 && isfinite(values[i]))
        die(EXIT_USAGE, "%s: tensor %s, element %zu: expected a magnitude of at most 65504 for F16, found %g; write BF16 or F32", path,
            p->e->name, first + i, values[i]);
    }
    crc = crc32_bytes(crc, bytes, count * size);
    if (out) safe_write(out, bytes, count * size);
  }
  return crc;
}

// The header with its length in front, padded with blanks to a multiple of 8 bytes.
UNUSED static void st_put_header_(StrBuf *b, const char *path, const StPlan_ *plan, size_t n, const StMeta *metadata, size_t n_meta) {
  static const char no_length[8] = {0};
  char key[ST_MAX_NAME + 16];
  uint32_t sum = st_crc_entry_("format", 6, "pt", 2);
  strbuf_append(b, no_length, 8);
  strbuf_printf(b, "{\"__metadata__\":{\"format\":\"pt\"");
  for (size_t i = 0; i < n_meta; i++) {
    const char *k = metadata[i].key, *v = metadata[i].value;
    int ok = strcmp(k, "format") != 0 && strncmp(k, ST_CRC_, strlen(ST_CRC_)) != 0 && st_is_utf8_(k) && st_is_utf8_(v);
    for (size_t j = 0; j < i; j++) ok = ok && strcmp(k, metadata[j].key) != 0;
    if (!ok) die(EXIT_FAILED, "bug: %s: metadata entry %zu cannot be written", path, i);
    strbuf_printf(b, ",");
    json_put_string(b, k, strlen(k));
    strbuf_printf(b, ":");
    json_put_string(b, v, strlen(v));
    sum += st_crc_entry_(k, strlen(k), v, strlen(v));
  }
  for (size_t i = 0; i < n; i++) {
    snprintf(key, sizeof key, "%s%s", ST_CRC_, plan[i].e->name);
    strbuf_printf(b, ",");
    json_put_string(b, key, strlen(key));
    strbuf_printf(b, ":\"%08x\"", plan[i].crc);
    sum += st_crc_tensor_(plan[i].e->name, plan[i].e->dtype, plan[i].e->ndim, plan[i].e->shape);
  }
  strbuf_printf(b, ",\"%s__metadata__\":\"%08x\"}", ST_CRC_, sum);
  for (size_t i = 0; i < n; i++) {
    const StEntry *e = plan[i].e;
    strbuf_printf(b, ",");
    json_put_string(b, e->name, strlen(e->name));
    strbuf_printf(b, ":{\"dtype\":\"%s\",\"shape\":[", st_dtype_name(e->dtype));
    for (int k = 0; k < e->ndim; k++) strbuf_printf(b, k ? ",%zu" : "%zu", e->shape[k]);
    strbuf_printf(b, "],\"data_offsets\":[%zu,%zu]}", plan[i].begin, plan[i].begin + plan[i].bytes);
  }
  strbuf_printf(b, "}");
  while (b->len % 8) strbuf_append(b, " ", 1);
  uint64_t len = b->len - 8;
  if (len > ST_MAX_HEADER) die(EXIT_USAGE, "%s: a header of %llu bytes is too long", path, (unsigned long long)len);
  memcpy(b->data, &len, 8);
}

// Writes a file of n tensors, whose values source gives, and n_meta metadata entries besides {"format":"pt"} and the
// checksums. Returns 0 or the errno of what failed; then the file that was there before is untouched. EIO also stands for a
// source that gave different values the second time.
UNUSED static int st_write(const char *path, const StEntry *entries, size_t n, const StMeta *metadata, size_t n_meta,
                           StSource source, void *ctx) {
  StPlan_ *plan = (StPlan_ *)xcalloc(n, sizeof *plan);
  float *values = (float *)xmalloc(ST_CHUNK_ * sizeof *values);
  uint16_t *halves = (uint16_t *)xmalloc(ST_CHUNK_ * sizeof *halves);
  StrBuf header = {NULL, 0, 0};
  SafeFile f;
  st_plan_(path, plan, entries, n);
  for (size_t i = 0; i < n; i++) plan[i].crc = st_convert_(path, &plan[i], source, ctx, values, halves, NULL);
  st_put_header_(&header, path, plan, n, metadata, n_meta);

  if (safe_open(&f, path) == 0) safe_write(&f, header.data, header.len);
  for (size_t i = 0; i < n && !f.failed; i++) {
    uint32_t crc = st_convert_(path, &plan[i], source, ctx, values, halves, &f);
    if (crc != plan[i].crc && !f.failed) f.failed = EIO;
  }
  strbuf_free(&header);
  free(plan);
  free(values);
  free(halves);
  return safe_commit(&f);
}

#endif
