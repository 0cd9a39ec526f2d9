/*
test_bitnet.c: all tests of the machine it runs on, in one table.

What it is:  the frame of the C tests. It includes the program itself (train_bitnet.c, or train_bitnet.cu under nvcc) without its
             main, then the headers with the tests, and runs those whose name contains the first argument.
What not:    the tests: dev/test/test_*.h, each with the rows for its part of the table. Derivatives: dev/test/test_float64.c.
Read before: dev/test/check.h.

    ./test_bitnet            all tests; exit code 0 if all pass
    ./test_bitnet gemm       only the tests with "gemm" in their name
    ./test_bitnet 1/3        every third test, from the first on
    ./test_bitnet --list     names and what they are about
*/
#define TESTING
#include "bitnet/utils.h"

/*
Counts what the code below asks for, also where it goes around xmalloc. A macro does not replace itself inside its own expansion, so
the real function is called; the system's headers must have been read before.
*/
#include <glob.h>
#include <sys/mman.h>
static long test_allocations;      // calls that may ask for memory
UNUSED static size_t test_device_bytes;   // that the CPU's dev_malloc has asked for
#define malloc(n) (test_allocations++, malloc(n))
#define calloc(n, size) (test_allocations++, calloc(n, size))
#define realloc(p, n) (test_allocations++, realloc(p, n))
#define aligned_alloc(align, n) (test_allocations++, test_device_bytes += (n), aligned_alloc(align, n))
#define fopen(path, mode) (test_allocations++, fopen(path, mode))

#ifdef __CUDACC__
#include "train_bitnet.cu"
#else
#include "train_bitnet.c"
#endif

#include "dev/test/check.h"            // Test, CHECK, run_tests
#include "dev/test/test_convert.h"     // CONVERT_TESTS
#include "dev/test/test_data.h"        // DATA_TESTS
#include "dev/test/test_eval.h"        // EVAL_TESTS
#include "dev/test/test_files.h"       // FILES_TESTS
#include "dev/test/test_grpo.h"        // GRPO_TESTS
#include "dev/test/test_infer.h"       // INFER_TESTS
#include "dev/test/test_model.h"       // MODEL_TESTS
#include "dev/test/test_ops.h"         // OPS_TESTS
#include "dev/test/test_options.h"     // OPTIONS_TESTS
#include "dev/test/test_reference.h"   // REFERENCE_TESTS
#include "dev/test/test_reward.h"      // REWARD_TESTS
#include "dev/test/test_run.h"         // RUN_TESTS
#include "dev/test/test_shards.h"      // SHARD_TESTS
#include "dev/test/test_tokenizer.h"   // TOKENIZER_TESTS

static const Test tests[] = {
  OPS_TESTS,
  MODEL_TESTS,
  INFER_TESTS,
  REFERENCE_TESTS,
  DATA_TESTS,
  SHARD_TESTS,
  TOKENIZER_TESTS,
  FILES_TESTS,
  OPTIONS_TESTS,
  EVAL_TESTS,
  RUN_TESTS,
  CONVERT_TESTS,
  GRPO_TESTS,
  REWARD_TESTS,
};

#ifdef BITNET_MATMUL_H
// A forked process has no threads but its own, and would wait for the others for ever.
static void one_thread_(void) { dev_init(1); }
#endif

int main(int argc, char **argv) {
  const char *filter = argc > 1 ? argv[1] : NULL;
#ifdef BITNET_MATMUL_H
  wait_briefly(argv);
  in_child = one_thread_;
#endif
  dev_init(0);
  before_test = end_test_;
  printf("%s\n", dev_name());
  if (filter && strcmp(filter, "--list") == 0) {
    for (size_t i = 0; i < ARRAY_LEN(tests); i++) printf("%-28s %s\n", tests[i].name, tests[i].about);
    return 0;
  }
  return run_tests(tests, ARRAY_LEN(tests), filter);
}
