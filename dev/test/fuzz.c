/*
fuzz.c: files that are nearly right, thrown at the readers of models.

What it is:  takes a small valid model (dev/test/fuzz/), breaks it in a place that means something (a length, a count, an offset, a
             type, a name, a whole record), and reads it as the program does: configuration, every number of every tensor, the
             tokenizer. Each try runs in a child process. Right is: it reads, or it exits with 2 or 3 and a message. Wrong is: a crash,
             another exit code, a hang, or memory out of proportion to the file. A wrong file is kept and its name printed.
What not:    no coverage feedback; the mutations know the formats instead.
Read before: bitnet/source.h.

    ./fuzz gguf|safetensors|llama2c [seconds=30] [seed=1]      exit code 0 if nothing went wrong
*/
#define TESTING
#include "../../bitnet/utils.h"

/*
Memory: what one allocation may ask for. Files of the seeds' size need far less; a reader that believes a length field asks for far
more. Macros do not replace themselves inside their own expansion, so the real functions are called.
*/
enum { FUZZ_MOST = 1 << 28 };
#include <glob.h>
#include <sys/mman.h>
static size_t fuzz_ask_(size_t a, size_t b) {
  size_t n = b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b;
  if (n > FUZZ_MOST) {
    fprintf(stderr, "fuzz: an allocation of %zu bytes\n", n);
    abort();
  }
  return n;
}
#define malloc(n) (fuzz_ask_(n, 1), malloc(n))
#define calloc(n, size) (fuzz_ask_(n, size), calloc(n, size))
#define realloc(p, n) (fuzz_ask_(n, 1), realloc(p, n))
#define aligned_alloc(align, n) (fuzz_ask_(n, 1), aligned_alloc(align, n))

#include "../../train_bitnet.c"
#include "../../bitnet/checkpoint.h"
#include "check.h"

// A process that ends at the first error frees nothing: leaks are no defect here.
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
  return "detect_leaks=0";
}

typedef struct {
  unsigned char *data;
  size_t n, cap;
} Bytes;

static uint64_t fuzz_seed, fuzz_count;

// The next random number below n >= 1.
static uint64_t below_(uint64_t n) {
  return rng_below(fuzz_seed, RNG_TEST, fuzz_count++, n);
}

// Replaces bytes [at, at+old) by `count` bytes.
static void splice_(Bytes *b, size_t at, size_t old, const void *with, size_t count) {
  size_t tail = b->n - at - old;
  if (b->n - old + count > b->cap) return;
  memmove(b->data + at + count, b->data + at + old, tail);
  memmove(b->data + at, with, count);
  b->n = at + count + tail;
}

// ---------------------------------------------------------------------------------------------------------
// Places that mean something.

typedef struct {
  size_t at, bytes;   // a field
} Place;

enum { MAX_PLACES = 20000 };
static Place places[MAX_PLACES];
static size_t n_places;

static void place_(size_t at, size_t bytes) {
  if (n_places == MAX_PLACES) return;
  places[n_places].at = at;
  places[n_places++].bytes = bytes;
}

// Fields of a valid GGUF file: counts, lengths, types, values, dimensions, offsets, and whole records.
static void gguf_places_(const char *path) {
  Gguf g;
  gguf_open(&g, path);
  place_(4, 4);
  place_(8, 8);
  place_(16, 8);
  size_t at = 24;
  for (size_t i = 0; i < g.n_keys; i++) {
    const GgufKey *k = &g.keys[i];
    size_t start = at, len, size = gguf_value_size_(k->element);
    place_(at, 8);
    place_(at + 8, strlen(k->name));
    place_(at + 8 + strlen(k->name), 4);
    at = k->at;
    if (k->type == GGUF_ARRAY) {
      place_(at - 12, 4);
      place_(at - 8, 8);
    }
    for (size_t j = 0; j < k->count; j++) {
      if (j < 8 || j + 2 > k->count) place_(at, size ? size : 8);
      if (size) at += size;
      else gguf_take_string_(&g, &at, &len, k->name);
    }
    place_(start, at - start);
  }
  for (size_t i = 0; i < g.n_tensors; i++) {
    const GgufTensor *t = &g.tensors[i];
    size_t start = at, name = strlen(t->name);
    place_(at, 8);
    place_(at + 8, name);
    place_(at + 8 + name, 4);
    for (int d = 0; d < t->ndim; d++) place_(at + 12 + name + 8 * (size_t)d, 8);
    at += 12 + name + 8 * (size_t)t->ndim;
    place_(at, 4);
    place_(at + 4, 8);
    at += 12;
    place_(start, at - start);
    place_(t->begin, t->bytes < 64 ? t->bytes : 64);
  }
  gguf_close(&g);
}

// The header's length, and each number, string and punctuation mark of its JSON; the beginning of the data.
static void safetensors_places_(const Bytes *b) {
  uint64_t len = 0;
  memcpy(&len, b->data, 8);
  place_(0, 8);
  for (size_t i = 8; i < 8 + len; i++) {
    size_t n = 1;
    if (isdigit(b->data[i])) {
      while (isdigit(b->data[i + n])) n++;
    } else if (b->data[i] == '"') {
      while (b->data[i + n] != '"') n++;
      n++;
    }
    place_(i, n);
    i += n - 1;
  }
  for (size_t i = 8 + (size_t)len; i < b->n; i += 7) place_(i, b->n - i < 4 ? b->n - i : 4);
}

static void llama2c_places_(const Bytes *b) {
  for (size_t i = 0; i < 40 && i < b->n; i += 4) place_(i, 4);
  place_(36, 1);
  for (size_t i = 256; i + 4 < b->n; i += 29) place_(i, 4);
}

// ---------------------------------------------------------------------------------------------------------
// Breaking.

// A number that readers trip over.
static uint64_t nasty_(const Bytes *b, uint64_t old) {
  switch (below_(12)) {
    case 0: return 0;
    case 1: return old + 1;
    case 2: return old - 1;
    case 3: return UINT64_MAX;
    case 4: return (uint64_t)1 << 63;
    case 5: return (uint64_t)1 << below_(64);
    case 6: return b->n;
    case 7: return b->n + below_(64);
    case 8: return old * 2;
    case 9: return UINT64_MAX / (1 + below_(512));
    case 10: return 0x7FFFFFFF;
    default: return below_(64);
  }
}

// One change of a field: a nasty number, random bytes, another field's bytes, nothing, or twice the same. json: numbers are text.
static void break_place_(Bytes *b, Place p, int json) {
  char text[64];
  unsigned char copy[4096];
  if (p.at + p.bytes > b->n) return;
  uint64_t old = 0;
  memcpy(&old, b->data + p.at, p.bytes < 8 ? p.bytes : 8);
  switch (below_(8)) {
    case 0: case 1: case 2: case 3:
      if (json && p.at >= 8 && isdigit(b->data[p.at])) {
        static const char *const odd[] = {"-1", "1e3",  "9223372036854775808", "00", "2.5", "null", "18446744073709551615",
                                          "[]", "\"1\""};
        int n = below_(2)
                    ? snprintf(text, sizeof text, "%s", odd[below_(ARRAY_LEN(odd))])
                    : snprintf(text, sizeof text, "%llu", (unsigned long long)nasty_(b, strtoull((char *)b->data + p.at, NULL, 10)));
        splice_(b, p.at, p.bytes, text, (size_t)n);
      } else {
        uint64_t v = nasty_(b, old);
        memcpy(b->data + p.at, &v, p.bytes < 8 ? p.bytes : 8);
      }
      return;
    case 4:
      for (size_t i = 0; i < p.bytes; i++) b->data[p.at + i] = (unsigned char)below_(256);
      return;
    case 5: {   // another field's bytes
      Place q = places[below_(n_places)];
      if (q.bytes > sizeof copy || q.at + q.bytes > b->n) return;
      memcpy(copy, b->data + q.at, q.bytes);
      splice_(b, p.at, p.bytes, copy, q.bytes);
      return;
    }
    case 6: splice_(b, p.at, p.bytes, "", 0); return;
    default:   // the record again behind itself
      if (p.bytes > sizeof copy) return;
      memcpy(copy, b->data + p.at, p.bytes);
      splice_(b, p.at, 0, copy, p.bytes);
  }
}

static void break_(Bytes *b, int json) {
  size_t times = 1 + below_(below_(4) ? 2 : 6);
  for (size_t i = 0; i < times; i++) {
    uint64_t how = below_(20);
    if (how == 0 && b->n > 1) b->n = below_(b->n);               // cut off
    else if (how == 1) splice_(b, b->n, 0, "trailing bytes", 1 + below_(13));
    else if (how == 2) b->data[below_(b->n)] ^= (unsigned char)(1u << below_(8));
    else break_place_(b, places[below_(n_places)], json);
    if (b->n == 0) return;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Trying.

static void read_all_(void *path) {
  ModelSource s;
  Tokenizer t;
  Model m;
  alarm(20);
  source_open(&s, (const char *)path);
  for (int i = 0; i < s.table.count; i++) {
    size_t n = s.table.tensors[i].n;
    float *x = (float *)xmalloc(size_mul(n, sizeof(float)));
    int8_t *codes = (int8_t *)xmalloc(n);
    if (s.tensors[i].ternary) source_master(&s, i, x, codes);
    else source_floats(&s, i, x, 0, n);
    free(x);
    free(codes);
  }
  source_close(&s);
  if (checkpoint_has_tokenizer((const char *)path)) {
    checkpoint_tokenizer(&t, (const char *)path);
    tokenizer_free(&t);
  }
  model_load_frozen(&m, (const char *)path, PRECISION_BF16, 1);
  model_free(&m);
}

static void load_(Bytes *b, const char *path) {
  size_t n;
  char *data = read_file(path, &n);
  if (data == NULL) die(EXIT_USAGE, "cannot read %s: %s; run this from the project's directory", path, strerror(errno));
  b->cap = n + (1 << 16);
  b->data = (unsigned char *)xmalloc(b->cap);
  memcpy(b->data, data, b->n = n);
  free(data);
}

int main(int argc, char **argv) {
  static const char *const gguf[] = {"tiny.gguf", NULL}, *const safetensors[] = {"packed/model.safetensors", NULL},
                    *const llama2c[] = {"legacy.bin", "version1.bin", "ternary.bin", NULL};
  const char *kind = argc > 1 ? argv[1] : "", *dir = test_dir();
  const char *const *seeds = strcmp(kind, "gguf") == 0          ? gguf
                             : strcmp(kind, "safetensors") == 0 ? safetensors
                             : strcmp(kind, "llama2c") == 0     ? llama2c
                                                                : NULL;
  if (seeds == NULL) die(EXIT_USAGE, "usage: ./fuzz gguf|safetensors|llama2c [seconds] [seed]");
  double seconds = argc > 2 ? atof(argv[2]) : 30, t0 = time_now();
  long tries = 0, read = 0, wrong = 0;
  char path[4096], model[4096], from[256], err[400];
  fuzz_seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
  dev_init(1);
  if (seeds == safetensors) {   // the rest of the directory stays as it is
    Bytes config;
    load_(&config, "dev/test/fuzz/packed/config.json");
    path_join(path, sizeof path, dir, "config.json");
    safe_write_file(path, (const char *)config.data, config.n);
    free(config.data);
  }
  for (int k = 0; wrong < 5 && time_now() - t0 < seconds; k = seeds[k + 1] ? k + 1 : 0) {
    Bytes b;
    snprintf(from, sizeof from, "dev/test/fuzz/%s", seeds[k]);
    load_(&b, from);
    n_places = 0;
    int is_st = seeds == safetensors;
    if (seeds == gguf) gguf_places_(from);
    else if (is_st) safetensors_places_(&b);
    else llama2c_places_(&b);
    path_join(path, sizeof path, dir, is_st ? "model.safetensors" : seeds[k]);
    snprintf(model, sizeof model, "%s", is_st ? dir : path);
    if (tries > 0) break_(&b, is_st);   // the first try is the seed itself
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, b.data, b.n) != (ssize_t)b.n) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(errno));
    close(fd);
    int code = run_child(read_all_, model, err, sizeof err);
    int ok =
        (code == 0 || code == EXIT_USAGE || code == EXIT_DAMAGED) && (code == 0 || strstr(err, "error: ")) && (tries > 0 || code == 0);
    read += code == 0;
    tries++;
    if (!ok) {
      char kept[4200];
      snprintf(kept, sizeof kept, "%s.wrong%ld", path, wrong++);
      safe_write_file(kept, (const char *)b.data, b.n);
      printf("WRONG: exit code %d, file %s: %.300s\n", code, kept, err);
    }
    free(b.data);
  }
  printf("%s: %ld broken files, %ld of them still read, %ld wrong\n", kind, tries, read, wrong);
  return wrong != 0 || tries < 2;
}
