/*
check.h: the frame that all tests of this project stand in.

A test is a function without arguments; test_bitnet.c lists them in one table. CHECK counts a failure and goes on, so one
run shows everything that is wrong. Code that is meant to exit (bad input) runs in a child process through run_child, which
returns its exit code and what it printed to stderr.
Read before: bitnet/utils.h.
*/
#ifndef TEST_CHECK_H
#define TEST_CHECK_H

#include "../../bitnet/utils.h"
#include <dirent.h>
#include <sys/wait.h>

typedef struct {
  const char *name, *about;
  void (*fn)(void);
} Test;

// 1 where dev/cuda_emu.h plays the GPU, slowly: there tests take sizes that still cross every tile and chunk, but not much more.
#ifdef CUDA_EMU_H
enum { EMULATED = 1 };
#else
enum { EMULATED = 0 };
#endif

static int check_failures;   // of the test that is running
UNUSED static void (*before_test)(void);   // if set, called before each test, so that none depends on the one before it
UNUSED static void (*in_child)(void);      // if set, called first in each child process

// CHECK(condition, "format", values...): on failure prints where, the condition and the message.
#define CHECK(cond, ...)                                                        \
  do {                                                                          \
    if (!(cond)) {                                                              \
      check_failures++;                                                         \
      if (check_failures <= 10) {                                               \
        printf("    %s:%d: CHECK(%s) failed: ", __FILE__, __LINE__, #cond);     \
        printf(__VA_ARGS__);                                                    \
        printf("\n");                                                           \
      }                                                                         \
    }                                                                           \
  } while (0)

/*
Relative error of a tensor: max |a - b| / max |b|. The largest element sets the scale, because an element that is small by
cancellation carries the rounding errors of the large ones. NaN anywhere gives infinity.
*/
UNUSED static double rel_error(const float *a, const float *b, size_t n) {
  double diff = 0, top = 0;
  for (size_t i = 0; i < n; i++) {
    double d = fabs((double)a[i] - (double)b[i]);
    if (!(d <= 1e300)) return INFINITY;
    if (d > diff) diff = d;
    if (fabs((double)b[i]) > top) top = fabs((double)b[i]);
  }
  return diff == 0 ? 0 : diff / (top > 0 ? top : 1e-30);
}

// Checks a whole tensor against its reference within a relative bound.
#define CHECK_CLOSE(name, got, want, n, bound)                                                             \
  do {                                                                                                     \
    double rel_error_ = rel_error(got, want, n);                                                           \
    CHECK(rel_error_ <= (bound), "%s: relative error %.3g, bound %.3g", name, rel_error_, (double)(bound)); \
  } while (0)

// Runs fn(arg) in a child process. Returns its exit code (0 if fn returns, 128 + n if signal n killed it); the first
// cap-1 bytes that it wrote to stderr are in err.
UNUSED static int run_child(void (*fn)(void *), void *arg, char *err, size_t cap) {
  int fd[2], status = 0;
  fflush(NULL);
  if (pipe(fd) != 0) die(EXIT_FAILED, "pipe: %s", strerror(errno));
  pid_t pid = fork();
  if (pid < 0) die(EXIT_FAILED, "fork: %s", strerror(errno));
  if (pid == 0) {
    dup2(fd[1], 2);
    close(fd[0]);
    close(fd[1]);
    if (in_child) in_child();
    fn(arg);
    fflush(NULL);
    _exit(0);
  }
  close(fd[1]);
  size_t len = 0;
  char drop[256];
  for (;;) {
    char *to = len + 1 < cap ? err + len : drop;
    ssize_t n = read(fd[0], to, len + 1 < cap ? cap - 1 - len : sizeof drop);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    if (to != drop) len += (size_t)n;
  }
  if (cap) err[len] = 0;
  close(fd[0]);
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// A fresh directory for a test's files, below $TMPDIR or /tmp. run_tests removes it at the end, since one test may read what another
// wrote, and only if none failed.
static struct TestDir { char path[512]; struct TestDir *older; } *test_dirs;

UNUSED static const char *test_dir(void) {
  struct TestDir *d = (struct TestDir *)xcalloc(1, sizeof *d);
  const char *base = getenv("TMPDIR");
  snprintf(d->path, sizeof d->path, "%s/bitnet_test_XXXXXX", base && *base ? base : "/tmp");
  if (mkdtemp(d->path) == NULL) die(EXIT_FAILED, "mkdtemp %s: %s", d->path, strerror(errno));
  d->older = test_dirs;
  return (test_dirs = d)->path;
}

// The one directory that the helpers of all tests share, made when first asked for.
UNUSED static const char *test_files_dir(void) {
  static const char *dir;
  if (dir == NULL) dir = test_dir();
  return dir;
}

// Removes a file, or a directory with all in it; links are removed, not followed.
static void remove_all_(const char *path) {
  char entry[1024];
  if (remove(path) == 0) return;
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    if ((size_t)snprintf(entry, sizeof entry, "%s/%s", path, e->d_name) < sizeof entry) remove_all_(entry);
  }
  if (d) closedir(d);
  if (remove(path) != 0) printf("cannot remove %s: %s\n", path, strerror(errno));
}

static void end_test_dirs_(int keep) {
  if (keep && test_dirs) printf("the tests' files are kept: %.*s*\n", (int)strlen(test_dirs->path) - 6, test_dirs->path);
  for (struct TestDir *d = test_dirs, *older; d; d = older) {
    older = d->older;
    if (!keep) remove_all_(d->path);
    free(d);
  }
  test_dirs = NULL;
}

// Runs the tests whose name contains filter (NULL = all; "1/3": the first of three parts of all) and prints the closing line. Returns
// the exit code.
UNUSED static int run_tests(const Test *tests, size_t n, const char *filter) {
  int passed = 0, failed = 0;
  size_t part = 0, parts = 0;
  StrBuf names = {NULL, 0, 0};   // of those that failed
  int in_parts = filter && sscanf(filter, "%zu/%zu", &part, &parts) == 2 && parts > 0;
  for (size_t i = 0; i < n; i++) {
    if (in_parts ? i % parts + 1 != part : filter && strstr(tests[i].name, filter) == NULL) continue;
    check_failures = 0;
    if (before_test) before_test();
    double t0 = time_now();
    tests[i].fn();
    printf("%s  %-28s %6.2f s  %s\n", check_failures ? "FAIL" : "ok  ", tests[i].name, time_now() - t0, tests[i].about);
    fflush(stdout);
    passed += check_failures == 0;
    failed += check_failures != 0;
    if (check_failures) strbuf_printf(&names, " %s", tests[i].name);
  }
  if (failed) printf("failed:%s\n", names.data);
  strbuf_free(&names);
  end_test_dirs_(failed != 0);
  if (passed + failed == 0) printf("no test is named like '%s'\n", filter);
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0 || passed == 0;
}

#endif
