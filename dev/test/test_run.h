/*
test_run.h: tests of whole runs: what a user starts, stops, kills, resumes and damages.

What it is:  most tests start the program itself (./train_bitnet, or the one that BITNET_BINARY names) on tiny models; those that break
             a single write operation call checkpoint_save in a child process.
Read before: check.h, bitnet/trainer.h, bitnet/checkpoint.h.
Defines:     RUN_TESTS, the rows for the table of tests.
*/
#ifndef TEST_RUN_H
#define TEST_RUN_H

#include "../../modes/pretrain.h"
#include "check.h"

// ---------------------------------------------------------------------------------------------------------
// Helpers.

static char run_out[1 << 16], run_err[1 << 16];   // what the last program wrote

static const char *binary_(void) {
  const char *b = getenv("BITNET_BINARY");
#ifdef __CUDACC__
  return b && *b ? b : "./train_bitnetcu";
#else
  return b && *b ? b : "./train_bitnet";
#endif
}

// Reads what a program wrote into a buffer and deletes the file.
static void take_output_(const char *path, char *out, size_t cap) {
  size_t len;
  char *text = read_file(path, &len);
  snprintf(out, cap, "%s", text ? text : "");
  free(text);
  unlink(path);
}

// Runs the program with these arguments (a format; the shell splits them), stdin from `input`. Returns its exit code.
PRINTF_LIKE(2, 3) static int program_(const char *input, const char *fmt, ...) {
  static char args[8192], line[10000], out[600], err[600];
  const char *dir = test_files_dir();
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(args, sizeof args, fmt, ap);
  va_end(ap);
  snprintf(out, sizeof out, "%s/out", dir);
  snprintf(err, sizeof err, "%s/err", dir);
  fflush(NULL);
  snprintf(line, sizeof line, "printf '%s' | %s %s >%s 2>%s", input, binary_(), args, out, err);
  int status = system(line);
  take_output_(out, run_out, sizeof run_out);
  take_output_(err, run_err, sizeof run_err);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

// A model so small that a run takes a moment.
#define TINY "simple dim=32 layers=2 heads=4 kv_heads=2 ffn_dim=48 batch_size=8 arith_max=9 lr=1e-2 eval_problems=50 "

// The run folder that the last program named in its closing line, in static storage.
static const char *last_run_(void) {
  static char run[4096];
  const char *at = strstr(run_out, " run ");
  snprintf(run, sizeof run, "%s", at ? at + 5 : "");
  run[strcspn(run, "\n")] = 0;
  return run;
}

// 1 if two files hold the same bytes.
static int same_file_(const char *a, const char *b) {
  size_t n, m;
  char *x = read_file(a, &n), *y = read_file(b, &m);
  int same = x && y && n == m && memcmp(x, y, n) == 0;
  free(x);
  free(y);
  return same;
}

// 1 if file `name` of the newest checkpoint of run a equals that of run b.
static int same_in_runs_(const char *a, const char *b, const char *name) {
  char x[4200], y[4200], px[4300], py[4300];
  checkpoint_path(x, sizeof x, a);
  checkpoint_path(y, sizeof y, b);
  path_join(px, sizeof px, x, name);
  path_join(py, sizeof py, y, name);
  return same_file_(px, py);
}

// 1 if the first `steps` lines in the logs of two runs agree in all but the times.
static int same_log_(const char *a, const char *b, int steps) {
  char pa[4200], pb[4200];
  size_t n, m;
  path_join(pa, sizeof pa, a, "log.jsonl");
  path_join(pb, sizeof pb, b, "log.jsonl");
  char *x = read_file(pa, &n), *y = read_file(pb, &m), *p = x, *q = y;
  int same = x && y;
  for (int i = 0; same && i < steps; i++) {
    char *px = strstr(p, ", \"ms\""), *qx = strstr(q, ", \"ms\"");
    same = px && qx && px - p == qx - q && memcmp(p, q, (size_t)(px - p)) == 0;
    if (!same) break;
    p = strchr(px, '\n');
    q = strchr(qx, '\n');
    same = p && q;
    if (same) p++, q++;
  }
  free(x);
  free(y);
  return same;
}

static int contains_(const char *path, const char *word) {
  size_t len;
  char *text = read_file(path, &len);
  int found = text && strstr(text, word) != NULL;
  free(text);
  return found;
}

// ---------------------------------------------------------------------------------------------------------
// A run and what it leaves behind.

static void test_run_folder(void) {
  char base[600], run[4096], path[4200], line[4096];
  snprintf(base, sizeof base, "%s", test_dir());
  int code = program_("", TINY "run_dir=%s steps=12 eval_every=5 save_every=4 keep=2 sample_every=6 name=first", base);
  CHECK(code == 0, "exit code %d: %s", code, run_err);
  snprintf(run, sizeof run, "%s", last_run_());
  int steps = 0;
  double loss = 0, exact = -1, seconds = 0;
  const char *done = strstr(run_out, "done:");
  CHECK(done && sscanf(done, "done: steps %d val_loss %lf exact_match %lf seconds %lf run %4095s", &steps, &loss, &exact, &seconds,
                       line) == 5,
        "closing line: %s", run_out);
  CHECK(steps == 12 && loss > 0 && exact >= 0 && strncmp(run, base, strlen(base)) == 0 && strstr(run, "first_"), "closing line: %s",
        run_out);
  CHECK(run_out[strlen(run_out) - 1] == '\n' && strstr(done, "\n") == run_out + strlen(run_out) - 1,
        "the closing line is the last: %s", run_out);

  // log.jsonl: rows 1..12 once each and in order, evaluations at 5, 10 and 12, all of it JSON.
  size_t len;
  int next = 1, evaluations = 0;
  path_join(path, sizeof path, run, "log.jsonl");
  char *log = read_file(path, &len), err[256];
  for (char *at = log, *end; at && (end = strchr(at, '\n')) != NULL; at = end + 1) {
    JsonDoc doc;
    CHECK(json_parse(&doc, at, (size_t)(end - at), err, sizeof err), "log row: %s", err);
    if (json_get(doc.root, "val_loss")) {
      evaluations++;
      CHECK(json_get(doc.root, "exact_match") != NULL, "arithmetic evaluations have exact_match");
    } else {
      static const char *const keys[] = {"step", "loss", "lambda", "lr", "grad_norm", "ms", "tok_per_s"};
      for (size_t i = 0; i < ARRAY_LEN(keys); i++) CHECK(json_get(doc.root, keys[i]) != NULL, "row %d has no %s", next, keys[i]);
      CHECK(json_get_int(doc.root, "step", -1) == next, "expected step %d", next);
      next++;
    }
    json_free(&doc);
  }
  free(log);
  CHECK(next == 13 && evaluations == 3, "%d rows and %d evaluations", next - 1, evaluations);

  // Two checkpoints are kept, `latest` names the newer, the link points at the run.
  path_join(path, sizeof path, run, "checkpoints/step_000004");
  CHECK(!is_dir(path), "keep=2: step 4 is gone");
  path_join(path, sizeof path, run, "checkpoints/step_000008");
  CHECK(is_dir(path), "keep=2: step 8 stays");
  path_join(path, sizeof path, run, "checkpoints/latest");
  CHECK(contains_(path, "step_000012"), "latest");
  path_join(path, sizeof path, base, "latest/manifest.json");
  CHECK(contains_(path, "\"status\": \"completed\"") && contains_(path, "\"git_commit\"") && contains_(path, "\"final_lambda\": 1") &&
            contains_(path, "\"fingerprint\""),
        "manifest");
  path_join(path, sizeof path, run, "samples.txt");
  CHECK(contains_(path, "--- step 6 ---") && contains_(path, "--- step 12 ---"), "samples");
  path_join(path, sizeof path, run, "config.json");
  CHECK(contains_(path, "\"steps\": 12"), "config.json");

  // Every mode takes the run or the checkpoint.
  CHECK(program_("", "eval %s", run) == 0 && strstr(run_out, "exact_match"), "eval: %s%s", run_out, run_err);
  double evaluated = -1;
  const char *m = strstr(run_out, "exact_match");
  CHECK(m && sscanf(m, "exact_match %lf", &evaluated) == 1, "eval: %s", run_out);
  CHECK(program_("", "generate %s/checkpoints/step_000012 prompt=1+2= n=4 count=2", run) == 0 && strncmp(run_out, "1+2=", 4) == 0,
        "generate: %s%s", run_out, run_err);
  CHECK(program_("1+2=\n\n/quit\n", "chat %s", run) == 0 && strchr(run_out, '\n') != NULL, "chat: %s%s", run_out, run_err);
  CHECK(program_("", "logits %s ids=\"1 10,2\"", run) == 0, "logits: %s", run_err);
  int lines = 0, numbers = 1;
  for (const char *c = run_out; *c; c++) {
    lines += *c == '\n';
    numbers += lines == 0 && *c == ' ';
  }
  CHECK(lines == 3 && numbers == 32, "logits: %d lines of %d numbers", lines, numbers);
}

// The trained bits depend on the options of the result alone.
static void test_run_same_bits(void) {
  static const char *const variants[] = {"threads=1", "threads=2", "threads=3", "recompute=1",
                                         "eval_every=3 sample_every=2 save_every=1 log_every=2"};
  static const char *const lambdas[] = {"lambda_schedule=linear precision=fp32", "lambda_schedule=none"};
  char base[600], first[4096];
  snprintf(base, sizeof base, "%s", test_dir());
  for (size_t l = 0; l < ARRAY_LEN(lambdas); l++) {
    for (size_t i = 0; i < ARRAY_LEN(variants); i++) {
      CHECK(program_("", TINY "run_dir=%s steps=6 %s %s", base, lambdas[l], variants[i]) == 0, "%s", run_err);
      if (i == 0) snprintf(first, sizeof first, "%s", last_run_());
      CHECK(same_in_runs_(first, last_run_(), "model.safetensors"), "%s %s: other parameters than threads=1", lambdas[l], variants[i]);
    }
  }
}

// Stopping after any step and going on gives the same bits as not stopping, in parameters, moments and the log's losses.
static void test_run_resume(void) {
  enum { STEPS = 8 };
  char base[600], whole[4096], part[4096], a[4200];
  snprintf(base, sizeof base, "%s", test_dir());
  CHECK(program_("", TINY "run_dir=%s steps=%d", base, STEPS) == 0, "%s", run_err);
  snprintf(whole, sizeof whole, "%s", last_run_());
  for (int stop = 1; stop < STEPS; stop++) {
    CHECK(program_("", TINY "run_dir=%s steps=%d stop_at=%d", base, STEPS, stop) == 0, "%s", run_err);
    snprintf(part, sizeof part, "%s", last_run_());
    path_join(a, sizeof a, part, "manifest.json");
    CHECK(contains_(a, "\"status\": \"interrupted\""), "status after stop_at");
    // What a killed process may have logged behind its last checkpoint: later rows and half a row.
    path_join(a, sizeof a, part, "log.jsonl");
    FILE *f = fopen(a, "a");
    if (f) {
      fprintf(f, "{\"step\": %d, \"loss\": 9}\n{\"step\": 77, \"lo", stop + 1);
      fclose(f);
    }
    CHECK(program_("", "resume=%s", part) == 0, "resume after %d: %s", stop, run_err);
    CHECK(strcmp(part, last_run_()) == 0, "the run goes on in its folder");
    CHECK(same_in_runs_(whole, part, "model.safetensors") && same_in_runs_(whole, part, "training_state.safetensors"),
          "stopped at %d: other bits", stop);
    CHECK(same_log_(whole, part, STEPS), "stopped at %d: another log", stop);
  }
  CHECK(program_("", "resume=%s", whole) == 0 && strstr(run_out, "done: steps 8"), "resuming a finished run reports it: %s%s", run_out,
        run_err);
  CHECK(program_("", "resume=%s lr=0.5", whole) == EXIT_USAGE && strstr(run_err, "lr") && strstr(run_err, "init="), "another lr: %s",
        run_err);
  CHECK(program_("", "resume=%s seed=1", whole) == EXIT_USAGE && strstr(run_err, "seed"), "another seed: %s", run_err);
  CHECK(program_("", "resume=%s tinystories", whole) == EXIT_USAGE, "another preset: %s", run_err);
  CHECK(program_("", "resume=%s threads=1 save_every=3", whole) == 0, "what does not change the result may change: %s", run_err);
  CHECK(program_("", "resume=%s/nothing", whole) == EXIT_USAGE, "no such run: %s", run_err);
  CHECK(program_("", "init=%s run_dir=%s steps=2 dim=64", whole, base) == EXIT_USAGE && strstr(run_err, "dim"),
        "init fixes the shape: %s", run_err);
  CHECK(program_("", "init=%s run_dir=%s steps=2 eval_problems=20 arith_max=9", whole, base) == 0, "a new run from a model: %s",
        run_err);
  // Its learning rate follows the size of the weights.
  ModelSource s;
  char path[4200], err[256];
  size_t len;
  JsonDoc doc;
  double sum = 0, count = 0;
  checkpoint_path(path, sizeof path, whole);
  source_open(&s, path);
  for (int i = 0; i < s.table.count; i++) {
    const Tensor *t = &s.table.tensors[i];
    if (!(t->flags & TERNARY)) continue;
    float *x = host_floats_(t->n);
    source_floats(&s, i, x, 0, t->n);
    for (size_t k = 0; k < t->n; k++) sum += fabs((double)x[k]);
    count += (double)t->n;
  }
  source_close(&s);
  path_join(path, sizeof path, last_run_(), "config.json");
  char *text = read_file(path, &len);
  CHECK(text && json_parse(&doc, text, len, err, sizeof err), "%s", path);
  double lr = json_get_number(doc.root, "lr", 0), want = FINETUNE_STEP * sum / count / sqrt(32.0);   // dim=32 of TINY
  CHECK(fabs(lr - want) <= 0.05 * want, "the learning rate is %g, the weights ask for %g", lr, want);
  json_free(&doc);
  free(text);
  end_test_();
}

/*
The same on token shards: two interruptions, in the middle of an epoch, and each part on another number of threads. The data are a
mixture of two sources: documents in two files (attention ends at their ends), and one file with a loss mask. With 16 tokens a row
they have 20 and 5 rows in an epoch; 12 steps of 8 rows take 67 and 29 of them.
*/
static void test_run_resume_shards(void) {
  enum { STEPS = 12, VOCAB = 64, END = 0 };
  static const struct { const char *name; int n, masked; } files[] = {{"a_0.bin", 200, 0}, {"a_1.bin", 135, 0}, {"b_0.bin", 83, 1}};
  static const int stops[][2] = {{1, 2}, {3, 8}, {4, 11}};
  char base[600], args[3000], whole[4096], other[4096], path[4200];
  snprintf(base, sizeof base, "%s", test_dir());
  for (size_t f = 0; f < ARRAY_LEN(files); f++) {
    int ids[200];
    unsigned char trained[200];
    for (int i = 0; i < files[f].n; i++) {
      uint64_t draw = rng_u64(5, RNG_TEST, f << 32 | (uint64_t)i);
      ids[i] = draw % 9 == 0 ? END : 1 + (int)(draw / 16 % (VOCAB - 1));   // documents of 9 tokens on average
      trained[i] = (unsigned char)(draw / 4096 % 3 != 0);
    }
    path_join(path, sizeof path, base, files[f].name);
    shard_write_masked(path, ids, files[f].masked ? trained : NULL, (size_t)files[f].n, VOCAB, 0, END);
  }
  snprintf(args, sizeof args, "simple data='%s/a_*.bin:0.7,%s/b_*.bin:0.3' val_data='%s/a_1.bin' vocab=%d run_dir=%s dim=32 layers=2 "
           "heads=4 kv_heads=2 ffn_dim=48 seq_len=16 batch_size=4 grad_accum=2 steps=%d lambda_warmup_frac=0.4 lr=1e-2",
           base, base, base, VOCAB, base, STEPS);
  CHECK(program_("", "%s threads=2", args) == 0, "%s", run_err);
  snprintf(whole, sizeof whole, "%s", last_run_());
  for (size_t i = 0; i < ARRAY_LEN(stops); i++) {
    CHECK(program_("", "%s threads=1 stop_at=%d", args, stops[i][0]) == 0, "%s", run_err);
    snprintf(other, sizeof other, "%s", last_run_());
    CHECK(!same_in_runs_(whole, other, "model.safetensors"), "stopped at %d, it has the parameters of the end", stops[i][0]);
    CHECK(program_("", "resume=%s threads=3 stop_at=%d eval_every=2", other, stops[i][1]) == 0, "%s", run_err);
    CHECK(program_("", "resume=%s threads=2 eval_every=0", other) == 0, "%s", run_err);
    CHECK(strcmp(other, last_run_()) == 0, "the run goes on in its folder");
    CHECK(same_in_runs_(whole, other, "model.safetensors") && same_in_runs_(whole, other, "training_state.safetensors"),
          "stopped at %d and %d: other bits", stops[i][0], stops[i][1]);
  }
}

// Perplexity of shards: a document is predicted as if it stood alone, and nothing is predicted behind its end.
static void test_run_perplexity(void) {
  Tokenizer tok;
  char base[600], run[4096], path[4200];
  int ids[18], tokens[3];
  double loss[3];
  tokenizer_arithmetic(&tok);
  snprintf(base, sizeof base, "%s", test_dir());
  CHECK(program_("", TINY "run_dir=%s steps=3 seq_len=24", base) == 0, "%s", run_err);
  snprintf(run, sizeof run, "%s", last_run_());
  for (int i = 0; i < 18; i++) ids[i] = i == 7 || i == 17 ? tok.eos_id : 1 + i * 5 % 10;
  for (int k = 0; k < 3; k++) {   // the first document, the second, both
    path_join(path, sizeof path, base, "x.bin");
    shard_write(path, ids + (k == 1 ? 8 : 0), k == 0 ? 8 : k == 1 ? 10 : 18, tok.vocab_padded, 0, tok.eos_id);
    CHECK(program_("", "perplexity %s data=%s", run, path) == 0, "%s", run_err);
    const char *at = strstr(run_out, " loss ");
    CHECK(at && sscanf(run_out, "tokens %d", &tokens[k]) == 1 && sscanf(at, " loss %lf", &loss[k]) == 1, "%s", run_out);
  }
  CHECK(tokens[0] == 7 && tokens[1] == 9 && tokens[2] == 16, "%d, %d, together %d tokens", tokens[0], tokens[1], tokens[2]);
  CHECK(fabs(16 * loss[2] - 7 * loss[0] - 9 * loss[1]) < 2e-5, "%g and %g, together %g", loss[0], loss[1], loss[2]);
  CHECK(fabs(loss[0] - loss[1]) > 1e-3, "both documents cost %g", loss[0]);
  tokenizer_free(&tok);
}

// The first signal stops the run after the step and saves; it goes on afterwards.
static void test_run_signal(void) {
  char base[600], run[4096], line[6000], path[4200];
  snprintf(base, sizeof base, "%s", test_dir());
  snprintf(
      line, sizeof line,
      "%s " TINY
      "run_dir=%s steps=100000 >%s/out 2>%s/err & p=$!; "
      "while kill -0 $p && ! grep -qs 'step *3' %s/err; do sleep 0.05; done; kill -TERM $p; wait $p",
      binary_(), base, base, base, base);
  fflush(NULL);
  int status = system(line);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "exit code after SIGTERM: %d", status);
  path_join(path, sizeof path, base, "out");
  take_output_(path, run_out, sizeof run_out);
  CHECK(strstr(run_out, "done: steps ") != NULL, "closing line: %s", run_out);
  snprintf(run, sizeof run, "%s", last_run_());
  int steps = 0;
  CHECK(sscanf(strstr(run_out, "done:") ? strstr(run_out, "done:") : "", "done: steps %d", &steps) == 1 && steps >= 3, "steps %d",
        steps);
  CHECK(program_("", "resume=%s stop_at=%d", run, steps + 2) == 0, "%s", run_err);
  char want[64];
  snprintf(want, sizeof want, "done: steps %d ", steps + 2);
  CHECK(strstr(run_out, want) != NULL, "goes on at %d: %s", steps, run_out);
}

// A run whose numbers explode stops by itself, says why, and leaves its last good checkpoint.
static void test_run_not_finite(void) {
  char base[600], path[4200];
  snprintf(base, sizeof base, "%s", test_dir());
  int code = program_("",
                      TINY "run_dir=%s steps=50 lr=10 warmup_steps=0 grad_clip=0 init_std=10 norm_eps=1e-12 lambda_schedule=linear "
                           "weight_decay=10 beta2=0 eps=0 save_every=1",
                      base);
  CHECK(code == EXIT_FAILED, "exit code %d", code);
  CHECK(strstr(run_err, "not finite") && strstr(run_err, "3 updates in a row"), "message: %s",
        run_err + (strlen(run_err) > 400 ? strlen(run_err) - 400 : 0));
  path_join(path, sizeof path, base, "latest/manifest.json");
  CHECK(contains_(path, "\"status\": \"failed\""), "manifest");
}

// ---------------------------------------------------------------------------------------------------------
// Broken writes.

// A small model on the host side of a save; the same parameters for the same step.
typedef struct {
  Model m;
  Tokenizer tok;
  Options o;
  State state;
  char run[600];
  int operation, kill;   // which write operation fails, and whether the process dies there
} Saver;

static void saver_open_(Saver *s) {
  Config c;
  memset(s, 0, sizeof *s);
  options_defaults(&s->o);
  s->o.dim = 16, s->o.layers = 1, s->o.heads = 2, s->o.ffn_dim = 16, s->o.vocab = 32, s->o.seq_len = 8, s->o.keep = 2;
  config_from_options(&c, &s->o);
  tokenizer_arithmetic(&s->tok);
  model_open(&s->m, &c, PRECISION_FP32);
  model_alloc_training(&s->m, 1, 8, 0, 0);
  snprintf(s->run, sizeof s->run, "%s", test_dir());
}

static void saver_close_(Saver *s) {
  model_free(&s->m);
  tokenizer_free(&s->tok);
  options_free(&s->o);
}

static void saver_save_(void *ctx) {
  Saver *s = (Saver *)ctx;
  model_init_random(&s->m, (uint64_t)s->state.step);
  io_countdown = s->operation;
  io_kill = s->kill;
  checkpoint_save(&s->m, &s->tok, &s->o, &s->state, s->run);
}

// Loads the newest checkpoint of the run as resume does; a damaged one ends the process.
static void saver_load_(void *ctx) {
  Saver *s = (Saver *)ctx;
  char dir[4096];
  Model m;
  Tokenizer tok;
  State state;
  checkpoint_path(dir, sizeof dir, s->run);
  model_load(&m, dir, PRECISION_FP32);
  model_alloc_training(&m, 1, 8, 0, 0);
  state_load(&state, &m, dir);
  checkpoint_tokenizer(&tok, dir);
  // The parameters must be those of the step that the state names: a mixture of two saves is damage, too.
  Model want;
  model_open(&want, &m.c, PRECISION_FP32);
  model_init_random(&want, (uint64_t)state.step);
  size_t bytes = m.table.floats * sizeof(float);
  float *a = (float *)xmalloc(bytes), *b = (float *)xmalloc(bytes);
  dev_copy_out(a, m.params, bytes);
  dev_copy_out(b, want.params, bytes);
  if (memcmp(a, b, bytes) != 0) die(EXIT_FAILED, "the parameters are not those of step %d", (int)state.step);
  free(a);
  free(b);
  model_free(&want);
  model_free(&m);
  tokenizer_free(&tok);
  _exit(40 + (int)state.step);   // tells the test which one it was
}

// Each single write, flush or rename of a save fails (a full disk) or is the last thing the process does (kill -9, power cut).
static void test_save_faults(void) {
  for (int kill = 0; kill <= 1; kill++) {
    Saver s;
    char err[2048];
    saver_open_(&s);
    s.state.step = 1;
    CHECK(run_child(saver_save_, &s, err, sizeof err) == 0, "first save: %s", err);
    int operation, saved = 0, survived = 0;
    s.kill = kill;
    for (operation = 1; operation < 500 && !saved; operation++) {
      s.state.step = 2;
      s.operation = operation;
      int code = run_child(saver_save_, &s, err, sizeof err);
      saved = code == 0;
      if (!saved && !kill)
        CHECK(code == EXIT_FAILED && strstr(err, "cannot save") && strstr(err, "No space left"), "operation %d: exit %d, %s",
              operation, code, err);
      if (!saved && kill) CHECK(code == 99, "operation %d: exit %d", operation, code);
      code = run_child(saver_load_, &s, err, sizeof err);
      CHECK(code == 41 || code == 42, "after a fault in operation %d the checkpoint does not load: exit %d, %s", operation, code, err);
      if (code == 41) survived++;
      if (saved) CHECK(code == 42, "a save without a fault is the newest");
    }
    CHECK(saved && operation > 20 && survived > 15, "%d operations were broken, %d times the old checkpoint was the newest",
          operation - 1, survived);
    saver_close_(&s);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Damaged files.

// Writes text[0..n) over a file.
static void overwrite_(const char *path, const char *data, size_t n) {
  int err = safe_write_file(path, data, n);
  if (err) die(EXIT_FAILED, "%s: %s", path, strerror(err));
}

static void test_damaged_files(void) {
  static const char *const names[] = {"config.json", "model.safetensors", "training_state.safetensors", "tokenizer.json",
                                      "tokenizer_config.json"};
  Saver s;
  char err[2048], dir[4096], path[4200];
  saver_open_(&s);
  s.state.step = 3;
  CHECK(run_child(saver_save_, &s, err, sizeof err) == 0, "save: %s", err);
  checkpoint_path(dir, sizeof dir, s.run);
  CHECK(run_child(saver_load_, &s, err, sizeof err) == 43, "load: %s", err);
  for (size_t f = 0; f < ARRAY_LEN(names); f++) {
    size_t len, tries = 60;
    path_join(path, sizeof path, dir, names[f]);
    char *whole = read_file(path, &len), *bad = (char *)xmalloc(len + 1);
    // One flipped bit, at places all over the file.
    for (size_t k = 0; k < tries; k++) {
      size_t at = k < 20 ? k * len / 400 : (size_t)rng_below(7, RNG_TEST, f << 32 | k, len);
      int bit = (int)rng_below(8, RNG_TEST, f << 40 | k, 8);
      memcpy(bad, whole, len);
      bad[at] = (char)(bad[at] ^ (1 << bit));
      overwrite_(path, bad, len);
      int code = run_child(saver_load_, &s, err, sizeof err);
      // Blanks and the names of fields that nobody reads carry no meaning: there a flip may load with equal content.
      int harmless = code == 43 && (strcmp(names[f], "tokenizer_config.json") == 0 || strcmp(names[f], "tokenizer.json") == 0);
      CHECK(code == EXIT_DAMAGED || harmless, "%s: bit %d of byte %zu of %zu flipped: exit %d, %s", names[f], bit, at, len, code, err);
      if (code == EXIT_DAMAGED)
        CHECK(strstr(err, names[f]) || strstr(err, "config.json"), "%s: byte %zu: the message names no file: %s", names[f], at, err);
    }
    // Cut off anywhere.
    for (size_t k = 0; k < 20; k++) {
      size_t cut = k == 0 ? 0 : k == 1 ? len - 1 : (size_t)rng_below(8, RNG_TEST, f << 32 | k, len);
      overwrite_(path, whole, cut);
      int code = run_child(saver_load_, &s, err, sizeof err);
      int harmless = code == 43 && cut == len - 1 && strstr(names[f], "tokenizer");   // only the last newline is missing
      CHECK(code == EXIT_DAMAGED || harmless, "%s: cut to %zu of %zu bytes: exit %d, %s", names[f], cut, len, code, err);
      if (code == EXIT_DAMAGED)
        CHECK(strstr(err, names[f]) && (strstr(err, "expected") || strstr(err, "offset")), "%s: %s", names[f], err);
    }
    overwrite_(path, whole, len);
    free(whole);
    free(bad);
    // Gone.
    char away[4300];
    snprintf(away, sizeof away, "%s.away", path);
    CHECK(rename(path, away) == 0, "rename");
    int code = run_child(saver_load_, &s, err, sizeof err);
    CHECK(code == EXIT_USAGE || code == EXIT_DAMAGED, "%s is missing: exit %d, %s", names[f], code, err);
    CHECK(rename(away, path) == 0, "rename");
  }
  CHECK(run_child(saver_load_, &s, err, sizeof err) == 43, "whole again: %s", err);
  path_join(path, sizeof path, s.run, "checkpoints/latest");
  overwrite_(path, "../..", 5);
  CHECK(run_child(saver_load_, &s, err, sizeof err) == EXIT_DAMAGED, "latest that leads outside: %s", err);
  saver_close_(&s);
}

// The total of the memory table that a dry run with this batch prints, MB; run_out holds all of it.
static double dry_total_(int batch, const char *options) {
  double mb = -1;
  int code = program_("", TINY "seq_len=4096 dry_run=1 batch_size=%d %s", batch, options);
  const char *at = strstr(run_out, "  total ");
  CHECK(code == 0 && at && sscanf(at, " total %lf", &mb) == 1, "dry run: exit code %d, %s%s", code, run_out, run_err);
  return mb;
}

// The largest batches that a dry run names: each fits into the memory that is said to be free, and one row more does not.
static void test_dry_run(void) {
  int batch[2] = {0, 0};
  double there = 0;
  dry_total_(1, "");
  const char *at = strstr(run_out, "largest");
  int n = at ? sscanf(at, "largest batch_size %d, with recompute=1 %d: %lf", &batch[0], &batch[1], &there) : 0;
  CHECK(n == 3 && batch[0] > 0 && batch[1] > batch[0], "%s", run_out);
  for (int r = 0; r < 2 && n == 3; r++) {
    const char *option = r ? "recompute=1" : "";
    double fits = dry_total_(batch[r], option), fails = dry_total_(batch[r] + 1, option);
    CHECK(fits <= there + 0.1 && fails >= there - 0.1, "batch %d takes %.1f MB, one more %.1f, free %.1f", batch[r], fits, fails,
          there);
  }
}

// Wrong command lines of the real program: exit code and message.
static void test_run_errors(void) {
  static const struct {
    int code;
    const char *args, *words;
  } cases[] = {
      {2, "lamda_k=3", "lambda_k"},
      {2, "simple data=/nonexistent/x_*.bin", "tokenizer"},
      {2, "simple data=/nonexistent/x_*.bin vocab=64", "/nonexistent/x_*.bin"},
      {2, "tinystories", "needs data"},
      {2, "simple heads=3", "dim=128 is not a multiple of heads=3"},
      {2, "simple kv_heads=3", "kv_heads=3"},
      {2, "simple seq_len=3", "seq_len=3"},
      {2, "simple act_bits=5", "act_bits=5"},
      {2, "simple lr_schedule=wsd warmup_steps=90 decay_ratio=0.5", "do not fit"},
      {2, "generate", "needs a model directory"},
      {2, "generate /nonexistent", "no directory /nonexistent"},
      {2, "generate /tmp", "neither a run"},
      {2, "resume=/nonexistent", "/nonexistent"},
      {2, "init=/nonexistent", "/nonexistent"},
      {2, "init=/a resume=/b", "give one of them"},
      {0, "--help", "lambda_warmup_frac=0.4"},
      {0, "simple --dry-run", "activations"},
  };
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    int code = program_("", "%s", cases[i].args);
    CHECK(code == cases[i].code, "%s: exit code %d, %s", cases[i].args, code, run_err);
    CHECK(strstr(code ? run_err : run_out, cases[i].words) != NULL, "%s: expected '%s' in: %s", cases[i].args, cases[i].words,
          code ? run_err : run_out);
    if (code)
      CHECK(strncmp(run_err, "error: ", 7) == 0 && run_out[0] == 0, "%s: an error goes to stderr alone: %s", cases[i].args, run_out);
  }
}

#define RUN_TESTS                                                                                             \
  {"run_folder", "a run's folder, log, manifest, samples, checkpoints; every mode reads it", test_run_folder}, \
  {"run_same_bits", "threads, recompute and how often to evaluate do not change a bit", test_run_same_bits},   \
  {"run_resume", "stopped at any step and resumed = never stopped", test_run_resume},                          \
  {"run_resume_shards", "the same on shards: twice in an epoch, packing, masks, mixtures, other threads", test_run_resume_shards}, \
  {"run_perplexity", "documents of shards are predicted as if they stood alone", test_run_perplexity}, \
  {"run_signal", "SIGTERM saves, the run goes on", test_run_signal},                                           \
  {"run_not_finite", "exploding numbers stop the run with a message", test_run_not_finite},                    \
  {"dry_run", "the largest batch that fits", test_dry_run},                                                    \
  {"run_errors", "wrong input: exit code and message of the program", test_run_errors},                        \
  {"save_faults", "any failing or last write of a save leaves a loadable checkpoint", test_save_faults},       \
  {"damaged_files", "flipped bits, cut and missing files are refused", test_damaged_files}

#endif
