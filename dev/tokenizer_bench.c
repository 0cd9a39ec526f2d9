/*
tokenizer_bench.c: encodes a file and says how fast.

    gcc -O3 -I. dev/tokenizer_bench.c -o tokenizer_bench -lm
    ./tokenizer_bench TOKENIZER FILE [repeat] [marks]       ids as little-endian int32 on stdout, one line on stderr

TOKENIZER is what tokenizer_load takes. Each repetition starts with a tokenizer that has seen nothing; the line gives the
fastest. dev/tokenizer_check.py compares the ids and the time with other programs'.
*/
#include "../tokenizer.h"

int main(int argc, char **argv) {
  size_t len, n = 0;
  double best = 1e9, load = 1e9;
  if (argc < 3) die(EXIT_USAGE, "usage: tokenizer_bench TOKENIZER FILE [repeat] [marks]");
  int repeat = argc > 3 ? atoi(argv[3]) : 1, marks = argc > 4 && atoi(argv[4]);
  char *text = read_file(argv[2], &len);
  if (text == NULL) die(EXIT_USAGE, "cannot read %s: %s", argv[2], strerror(errno));
  int *ids = (int *)xmalloc(size_mul(len + 1, sizeof *ids));
  for (int r = 0; r < repeat; r++) {
    Tokenizer t;
    double t0 = time_now();
    tokenizer_load(&t, argv[1]);
    double t1 = time_now();
    n = tokenizer_encode_(&t, text, len, ids, len + 1, marks);
    double t2 = time_now();
    if (t1 - t0 < load) load = t1 - t0;
    if (t2 - t1 < best) best = t2 - t1;

    // A byte-level tokenizer must give back what it was given.
    StrBuf back = {NULL, 0, 0};
    tokenizer_decode_text(&t, ids, n, &back);
    int same = back.len == len && memcmp(back.data, text, len) == 0;
    if (r == 0) fprintf(stderr, "round_trip %d hash %016llx ", same, (unsigned long long)tokenizer_hash(&t));
    strbuf_free(&back);
    tokenizer_free(&t);
  }
  fprintf(stderr, "bytes %zu tokens %zu load_ms %.1f encode_ms %.3f MB_per_s %.2f\n", len, n, load * 1e3, best * 1e3,
          (double)len / best / 1e6);
  fwrite(ids, sizeof *ids, n, stdout);
  free(ids);
  free(text);
  return 0;
}
