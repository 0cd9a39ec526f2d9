/*
utils.h: the small things that every other file leans on.

What it is:  error exits, checked memory, the counter-based random numbers, time, files that are written
             crash-safe, hashes. Plain C that gcc (C11), g++ and nvcc (C++17) all accept.
What not:    nothing here knows about models, tensors or devices.
Read before: nothing; this is the bottom of the house.
Defines:     die, die_at, EXIT_USAGE, EXIT_DAMAGED; xmalloc, xcalloc, xrealloc, xstrdup, alloc_guard;
             rng_u64, rng_uniform, rng_normal, rng_below; time_now; StrBuf; read_file, map_file, FilePart, map_release,
             make_dirs, SafeFile (temporary name -> fsync -> rename), hash_bytes, crc32_bytes, nearest_name.
*/
#ifndef BITNET_UTILS_H
#define BITNET_UTILS_H

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
#define RESTRICT __restrict__
#else
#define RESTRICT restrict
#endif
// A header's functions are static and not every program uses all of them.
#define UNUSED __attribute__((unused))
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

// ---------------------------------------------------------------------------------------------------------
// Errors. Training programs stop at the first error: a message that says what was found, what was expected
// and what to do next, and an exit code that scripts can test.

enum {
  EXIT_FAILED = 1,   // something broke on our side or in the system (disk full, no memory)
  EXIT_USAGE = 2,    // the user's input: unknown option, malformed value, missing file
  EXIT_DAMAGED = 3   // a file that exists but is truncated, corrupt or of the wrong kind
};

// Prints "error: ..." to stderr and exits with the given code.
UNUSED __attribute__((noreturn)) PRINTF_LIKE(2, 3) static void die(int code, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  fflush(stdout);
  fputs("error: ", stderr);
  vfprintf(stderr, fmt, ap);
  fputc('\n', stderr);
  va_end(ap);
  exit(code);
}

// ---------------------------------------------------------------------------------------------------------
// Host memory. Every allocation of the project goes through these, so that a training step can forbid them:
// while alloc_guard is set, asking for memory is a bug and stops the program.

static int alloc_guard = 0;

UNUSED static void *xcheck_(void *p, size_t bytes) {
  if (p == NULL && bytes != 0) die(EXIT_FAILED, "out of memory: could not allocate %zu bytes", bytes);
  return p;
}

UNUSED static void *xmalloc(size_t bytes) {
  if (alloc_guard) die(EXIT_FAILED, "bug: %zu bytes allocated inside a training step", bytes);
  return xcheck_(malloc(bytes ? bytes : 1), bytes);
}

// count * size zeroed bytes; the product is checked for overflow.
UNUSED static void *xcalloc(size_t count, size_t size) {
  if (alloc_guard) die(EXIT_FAILED, "bug: %zu x %zu bytes allocated inside a training step", count, size);
  return xcheck_(calloc(count ? count : 1, size ? size : 1), count * size);
}

UNUSED static void *xrealloc(void *p, size_t bytes) {
  if (alloc_guard) die(EXIT_FAILED, "bug: %zu bytes allocated inside a training step", bytes);
  return xcheck_(realloc(p, bytes ? bytes : 1), bytes);
}

UNUSED static char *xstrdup(const char *s) {
  size_t n = strlen(s) + 1;
  return (char *)memcpy(xmalloc(n), s, n);
}

// a * b, or die: sizes that come from files or users are multiplied with this.
UNUSED static size_t size_mul(size_t a, size_t b) {
  if (b != 0 && a > SIZE_MAX / b) die(EXIT_USAGE, "size overflow: %zu x %zu", a, b);
  return a * b;
}

// ---------------------------------------------------------------------------------------------------------
// Text that grows. Used by the JSON writer, the tokenizer and the samples.

typedef struct {
  char *data;   // always zero-terminated once something was appended
  size_t len, cap;
} StrBuf;

UNUSED static void strbuf_append(StrBuf *b, const char *s, size_t n) {
  if (b->len + n + 1 > b->cap) {
    b->cap = (b->len + n + 1) * 2;
    b->data = (char *)xrealloc(b->data, b->cap);
  }
  memcpy(b->data + b->len, s, n);
  b->len += n;
  b->data[b->len] = 0;
}

UNUSED PRINTF_LIKE(2, 3) static void strbuf_printf(StrBuf *b, const char *fmt, ...) {
  char small[256];
  va_list ap;
  va_start(ap, fmt);
  int n = vsnprintf(small, sizeof small, fmt, ap);
  va_end(ap);
  if (n < (int)sizeof small) {
    strbuf_append(b, small, (size_t)n);
    return;
  }
  char *big = (char *)xmalloc((size_t)n + 1);
  va_start(ap, fmt);
  vsnprintf(big, (size_t)n + 1, fmt, ap);
  va_end(ap);
  strbuf_append(b, big, (size_t)n);
  free(big);
}

UNUSED static void strbuf_free(StrBuf *b) {
  free(b->data);
  b->data = NULL;
  b->len = b->cap = 0;
}

// ---------------------------------------------------------------------------------------------------------
// Random numbers. There is no generator state: a number is a function of (seed, stream, counter), so any
// step, row or position can be computed alone, by any thread, before or after a resume. The mixing function
// is splitmix64's finaliser applied once per key word. Streams keep independent uses apart.

enum {
  RNG_INIT = 1,     // parameter initialisation: counter = tensor id << 40 | element
  RNG_DATA = 2,     // training problems and shard order
  RNG_SAMPLE = 3,   // text sampling: counter = sequence << 32 | position
  RNG_ROUND = 4,    // stochastic rounding
  RNG_TEST = 5,
  RNG_GUIDE = 6     // which guiding prompt a correction gets: counter = its number
};

UNUSED static uint64_t rng_mix_(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

UNUSED static uint64_t rng_u64(uint64_t seed, uint64_t stream, uint64_t counter) {
  return rng_mix_(rng_mix_(rng_mix_(seed) ^ stream) ^ counter);
}

// Uniform in [0, 1), 53 bits.
UNUSED static double rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
  return (double)(rng_u64(seed, stream, counter) >> 11) * 0x1.0p-53;
}

// Uniform integer in [0, n), n >= 1; the bias of the modulo is below n / 2^64.
UNUSED static uint64_t rng_below(uint64_t seed, uint64_t stream, uint64_t counter, uint64_t n) {
  return rng_u64(seed, stream, counter) % n;
}

// Standard normal by Box-Muller; one pair of uniforms for each number keeps it a pure function.
UNUSED static double rng_normal(uint64_t seed, uint64_t stream, uint64_t counter) {
  double u = rng_uniform(seed, stream, 2 * counter), v = rng_uniform(seed, stream, 2 * counter + 1);
  return sqrt(-2.0 * log(1.0 - u)) * cos(6.283185307179586 * v);
}

// ---------------------------------------------------------------------------------------------------------
// Hashes: FNV-1a with a final mix for "is this the same thing", CRC-32 (zlib's polynomial) for damage.

UNUSED static uint64_t hash_bytes(const void *data, size_t n) {
  const unsigned char *p = (const unsigned char *)data;
  uint64_t h = 0xCBF29CE484222325ull;
  for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001B3ull;
  return rng_mix_(h);
}

/*
CRC-32 of n bytes, continuing from crc (0 at the start), eight bytes at a time.

A CRC is linear: what a byte does to the result depends only on its value and on how many bytes follow it. table[k][v] is what
the value v does when k more bytes follow, so eight look-ups that do not wait for each other take eight bytes. The tables are
made by the first call, which must not come from two threads at once.
*/
UNUSED static uint32_t crc32_bytes(uint32_t crc, const void *data, size_t n) {
  static uint32_t table[8][256];
  static int ready = 0;
  if (!ready) {
    for (uint32_t v = 0; v < 256; v++) {
      table[0][v] = v;
      for (int bit = 0; bit < 8; bit++) table[0][v] = table[0][v] >> 1 ^ (table[0][v] & 1 ? 0xEDB88320u : 0);
    }
    for (int k = 1; k < 8; k++) {
      for (int v = 0; v < 256; v++) table[k][v] = table[k - 1][v] >> 8 ^ table[0][table[k - 1][v] & 255];
    }
    ready = 1;
  }
  const unsigned char *p = (const unsigned char *)data;
  crc = ~crc;
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t lo = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    crc = table[7][lo & 255] ^ table[6][lo >> 8 & 255] ^ table[5][lo >> 16 & 255] ^ table[4][lo >> 24] ^ table[3][p[4]] ^
          table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
  }
  for (; n > 0; n--) crc = crc >> 8 ^ table[0][(crc ^ *p++) & 255];
  return ~crc;
}

// ---------------------------------------------------------------------------------------------------------
// Time.

// Seconds on a clock that only goes forward.
UNUSED static double time_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---------------------------------------------------------------------------------------------------------
// Files.

UNUSED static int is_dir(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

UNUSED static int is_file(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

// dir/name into a fixed buffer; too long a path is an error, never a cut one.
UNUSED static void path_join(char *out, size_t cap, const char *dir, const char *name) {
  int n = snprintf(out, cap, "%s/%s", dir, name);
  if (n < 0 || (size_t)n >= cap) die(EXIT_USAGE, "path too long: %s/%s", dir, name);
}

// mkdir -p
UNUSED static void make_dirs(const char *path) {
  char *copy = xstrdup(path);
  for (char *p = copy + 1;; p++) {
    if (*p != '/' && *p != 0) continue;
    char c = *p;
    *p = 0;
    if (mkdir(copy, 0777) != 0 && errno != EEXIST) die(EXIT_FAILED, "cannot create directory %s: %s", copy, strerror(errno));
    *p = c;
    if (c == 0) break;
  }
  free(copy);
}

// The whole file in memory, zero-terminated; NULL (with errno set) if it cannot be read. Caller frees.
UNUSED static char *read_file(const char *path, size_t *len) {
  int fd = open(path, O_RDONLY);
  struct stat st;
  if (fd < 0) return NULL;
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    close(fd);
    errno = EISDIR;
    return NULL;
  }
  size_t size = (size_t)st.st_size, got = 0;
  char *data = (char *)xmalloc(size + 1);
  while (got < size) {
    ssize_t n = read(fd, data + got, size - got);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    got += (size_t)n;
  }
  close(fd);
  data[got] = 0;
  *len = got;
  return data;
}

// Maps a whole file for reading; the caller unmaps *bytes (=) bytes. Exit 2 if it cannot be read, 3 if it is shorter than `least` bytes,
// which are called `what`.
UNUSED static const unsigned char *map_file(const char *path, size_t *bytes, size_t least, const char *what) {
  struct stat st;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &st) != 0) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  if (!S_ISREG(st.st_mode)) die(EXIT_USAGE, "cannot read %s: it is not a file", path);
  if ((uint64_t)st.st_size > SIZE_MAX) die(EXIT_USAGE, "%s: a file of %lld bytes does not fit", path, (long long)st.st_size);
  *bytes = (size_t)st.st_size;
  if (*bytes < least) {
    die(EXIT_DAMAGED, "%s: expected at least the %zu bytes of %s, found a file of %zu; copy or download it again", path, least, what,
        *bytes);
  }
  void *map = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) die(EXIT_FAILED, "cannot map %s: %s", path, strerror(errno));
  close(fd);   // the mapping stays
  return (const unsigned char *)map;
}

// Some bytes of a file in memory, for as long as they are used in place of a copy of them.
typedef struct {
  const unsigned char *data;
  size_t bytes;
  void *map;          // whole pages
  size_t map_bytes;
} FilePart;

// Maps bytes at .. at+bytes-1 of a file that had file_bytes when it was opened before. Exit 3 if it has not any more.
UNUSED static void file_part_open(FilePart *p, const char *path, size_t file_bytes, size_t at, size_t bytes) {
  struct stat st;
  size_t page = (size_t)sysconf(_SC_PAGESIZE), begin = at / page * page;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &st) != 0) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
  if ((uint64_t)st.st_size != file_bytes)
    die(EXIT_DAMAGED, "%s: expected %zu bytes as before, found %lld; it was changed while it was read", path, file_bytes,
        (long long)st.st_size);
  p->map_bytes = at - begin + bytes;
  p->map = mmap(NULL, p->map_bytes, PROT_READ, MAP_PRIVATE, fd, (off_t)begin);
  if (p->map == MAP_FAILED) die(EXIT_FAILED, "cannot map %s: %s", path, strerror(errno));
  close(fd);
  p->data = (const unsigned char *)p->map + (at - begin);
  p->bytes = bytes;
}

UNUSED static void file_part_close(FilePart *p) {
  if (p->map) munmap(p->map, p->map_bytes);
  memset(p, 0, sizeof *p);
}

// Gives back the memory of the pages that lie in bytes [begin, end) of a mapping; they can be read again, from the file.
UNUSED static void map_release(const unsigned char *begin, const unsigned char *end) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)begin + page - 1) / page * page;
  uintptr_t last = (uintptr_t)end / page * page;
  if (first < last) madvise((void *)first, last - first, MADV_DONTNEED);
}

/*
SafeFile: a file that appears whole or not at all. Writing goes to "<path>.tmp"; commit flushes it to the
disk, renames it over the final name and flushes the directory entry. A crash or a full disk at any moment
leaves the old file as it was. Errors are remembered and returned by commit, so callers check once.

io_countdown lets the tests break any single operation: when it is positive it counts down with each
write, fsync and rename, and at zero that operation fails (or kills the process if io_kill is set).
*/
static int io_countdown = 0, io_kill = 0;

UNUSED static int io_fault_(void) {
  if (io_countdown <= 0 || --io_countdown != 0) return 0;
  if (io_kill) _exit(99);
  errno = ENOSPC;
  return 1;
}

typedef struct {
  int fd, failed;    // failed: errno of the first error, 0 so far
  char path[4096];   // the final name
  char tmp[4096];
} SafeFile;

// 0, or the errno of what went wrong.
UNUSED static int safe_open(SafeFile *f, const char *path) {
  int n = snprintf(f->path, sizeof f->path, "%s", path);
  int k = snprintf(f->tmp, sizeof f->tmp, "%s.tmp", path);
  f->failed = 0;
  f->fd = -1;
  if (n < 0 || k < 0 || (size_t)k >= sizeof f->tmp) return f->failed = ENAMETOOLONG;
  f->fd = open(f->tmp, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (f->fd < 0) f->failed = errno;
  return f->failed;
}

UNUSED static void safe_write(SafeFile *f, const void *data, size_t n) {
  const char *p = (const char *)data;
  while (n > 0 && !f->failed) {
    ssize_t k = io_fault_() ? -1 : write(f->fd, p, n < (1u << 24) ? n : (1u << 24));
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) {
      f->failed = errno;
      return;
    }
    p += k;
    n -= (size_t)k;
  }
}

// Flushes a directory so that a rename inside it survives a power cut. 0 or errno.
UNUSED static int sync_parent_(const char *path) {
  char dir[4096];
  snprintf(dir, sizeof dir, "%s", path);
  char *slash = strrchr(dir, '/');
  if (slash == dir) slash[1] = 0;
  else if (slash) *slash = 0;
  else strcpy(dir, ".");
  int fd = open(dir, O_RDONLY);
  if (fd < 0) return errno;
  int err = io_fault_() || fsync(fd) != 0 ? errno : 0;
  close(fd);
  return err;
}

// 0, or the errno of the first failure; then the temporary file is gone and the old one untouched (except where only the very last
// step, flushing the directory, failed: then the new file is in place).
UNUSED static int safe_commit(SafeFile *f) {
  if (f->fd >= 0) {
    if (!f->failed && (io_fault_() || fsync(f->fd) != 0)) f->failed = errno;
    if (close(f->fd) != 0 && !f->failed) f->failed = errno;
  }
  if (!f->failed && (io_fault_() || rename(f->tmp, f->path) != 0)) f->failed = errno;
  if (f->failed) unlink(f->tmp);
  else f->failed = sync_parent_(f->path);
  f->fd = -1;
  return f->failed;
}

// A small file in one go: 0 or errno.
UNUSED static int safe_write_file(const char *path, const char *data, size_t n) {
  SafeFile f;
  if (safe_open(&f, path) == 0) safe_write(&f, data, n);
  return safe_commit(&f);
}

// ---------------------------------------------------------------------------------------------------------
// "Did you mean": edit distance (insert, delete, replace, swap of neighbours), for names of up to 63 letters.

UNUSED static int edit_distance_(const char *a, const char *b) {
  int row[3][65];
  size_t n = strlen(a), m = strlen(b);
  if (n > 63 || m > 63) return 1000;
  for (size_t j = 0; j <= m; j++) row[0][j] = (int)j;
  for (size_t i = 1; i <= n; i++) {
    int *cur = row[i % 3], *prev = row[(i + 2) % 3], *prev2 = row[(i + 1) % 3];
    cur[0] = (int)i;
    for (size_t j = 1; j <= m; j++) {
      int best = prev[j - 1] + (a[i - 1] != b[j - 1]);
      if (prev[j] + 1 < best) best = prev[j] + 1;
      if (cur[j - 1] + 1 < best) best = cur[j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && prev2[j - 2] + 1 < best) best = prev2[j - 2] + 1;
      cur[j] = best;
    }
  }
  return row[n % 3][m];
}

// The name out of names[0..n) that is closest to word, or NULL when none is close enough to suggest.
UNUSED static const char *nearest_name(const char *word, const char *const *names, size_t n) {
  const char *best = NULL;
  int best_distance = 1000;
  for (size_t i = 0; i < n; i++) {
    int d = edit_distance_(word, names[i]);
    if (d < best_distance) {
      best_distance = d;
      best = names[i];
    }
  }
  int limit = (int)strlen(word) / 2 + 1;
  return best_distance <= limit ? best : NULL;
}

#endif
