/*
trainer.h: the one training loop.

What it is:  accumulate gradients over micro-batches, clip, update, follow the schedules, evaluate, sample, save, log, show progress,
             obey signals; and the run folder in which all of that leaves its traces.
What not:    no data and no losses: a mode brings them as Hooks. No arithmetic.
Read before: bitnet/model.h, bitnet/losses.h, bitnet/optim.h, bitnet/checkpoint.h.
Defines:     Metrics, Work, Hooks, Trainer, run_start, trainer_open, trainer_train, trainer_close; run_open, run_log.

The run folder RUN = run_dir/<name>_<time>/:
    config.json    the resolved options           log.jsonl    one object per step, and one per evaluation
    manifest.json  what produced this run         samples.txt  texts of the model while it learns
    checkpoints/   step_NNNNNN/ and latest        run_dir/latest is a link to the newest run

Update number t (from 0) uses learning rate, lambda and weight decay of t and the batches t * grad_accum, ...; nothing else
changes from step to step but the parameters and the two moments. So a checkpoint holds those and t, and a run that goes on
from it ends with the same bits as a run that never stopped.
*/
#ifndef BITNET_TRAINER_H
#define BITNET_TRAINER_H

#include "../quant.h"
#include "checkpoint.h"
#include "losses.h"
#include "optim.h"
#include <signal.h>
#include <sys/file.h>

#ifndef BITNET_COMMIT
#define BITNET_COMMIT "unknown"   // the Makefile records the commit that the binary was built from
#endif

// What an evaluation finds; NAN where there is nothing to measure.
typedef struct {
  double val_loss, exact_match;
  double second_match;   // grpo with two_layer: the score of corrections
  double pair_accuracy;  // reward models: how often the better of two answers has the higher value
} Metrics;

// The work of one phase of a step.
typedef struct {
  int updates;      // how often the optimizer goes over the batches; 0: there is nothing to train
  int batches;      // micro-batches of an update
} Work;

// What a mode brings along. ctx is handed back to every function.
typedef struct {
  void *ctx;
  // Fills micro-batch number `index` of the run: a pure function of the options and index. With collect: `index` of the phase.
  void (*batch)(void *ctx, uint64_t index, Batch *b);
  // Forward and backward of one micro-batch; loss gradients are weighted by coef. Returns the sum of the losses. NULL: cross-entropy.
  double (*loss)(void *ctx, Model *m, const Batch *b, float coef, float *host_coef);
  // For modes that make their own data: collects what phase 0, 1, ... of a step learns from, with the model as it is now, quantised
  // at the step's lambda. Returns 0 if the step has no such phase. NULL: a step is one update with the next grad_accum micro-batches.
  // A function of step and model alone, so that a resumed run goes on with the same bits. Only here may a step ask for memory.
  int (*collect)(void *ctx, Model *m, int64_t step, int phase, Work *work);
  // Appends "key": value members to the step's row in the log, each with a leading comma. NULL: none.
  void (*report)(void *ctx, StrBuf *json);
  // Appends a few words to the step's line on the terminal. NULL: none.
  void (*progress)(void *ctx, StrBuf *text);
  // Appends text that the mode needs to go on after the finished step; it goes into the checkpoint (state_kept). NULL: nothing.
  void (*keep)(void *ctx, StrBuf *text);
  // After each finished step. NULL: nothing.
  void (*finish)(void *ctx, int64_t step);
  // Measures the model, which is quantised at lambda = 1. NULL: never.
  void (*evaluate)(void *ctx, Model *m, Metrics *out);
  // Appends sample texts; the model is quantised at lambda = 1. NULL: never.
  void (*sample)(void *ctx, Model *m, StrBuf *out);
  // Appends "key": value members about the data to the manifest, each with a leading comma. NULL: none.
  void (*describe)(void *ctx, StrBuf *json);
} Hooks;

enum { SPARK = 12 };   // characters of the little curve on the terminal

typedef struct {
  const Options *o;
  const Hooks *hooks;
  Model *m;
  const Tokenizer *tok;          // goes into the checkpoints; NULL: none
  Schedule schedule;
  int64_t lambda_ramp;           // W of lambda_at, in steps
  Batch *batches;                // [grad_accum]
  float *host_coef;              // [B*T]
  State state;                   // finished steps, applied updates
  char run[3072];                // the run folder
  int lock;                      // file descriptor that holds the run
  FILE *log;
  int skips;                     // updates skipped in a row
  Metrics last;                  // of the last evaluation
  double began, shown;           // time_now, of the last line of progress
  double pace;                   // seconds a step, with the evaluations between steps; what is long ago counts less
  int paces;                     // steps in it
  int8_t *codes;                 // all ternary codes when they were last measured (device); NULL before
  int64_t *code_counts;          // [2] on the device
  int64_t measured;              // step of that measurement, -1 before
  double spark[SPARK];           // the loss over the run so far, for the terminal
  int line_open;                 // the cursor stands behind a progress line that will be redrawn
} Trainer;

// ---------------------------------------------------------------------------------------------------------
// Signals: the first asks the loop to stop after the step and save, the second ends the program at once.

static volatile sig_atomic_t stop_requested = 0;

UNUSED static void on_signal_(int sig) {
  if (stop_requested) _exit(128 + sig);
  stop_requested = 1;
}

UNUSED static void catch_signals_(void) {
  struct sigaction sa;
  memset(&sa, 0, sizeof sa);
  sa.sa_handler = on_signal_;
  sa.sa_flags = SA_RESTART;
  sigaction(SIGINT, &sa, NULL);
  sigaction(SIGTERM, &sa, NULL);
}

// ---------------------------------------------------------------------------------------------------------
// The run folder.

// "20260131_142501", and the same moment as ISO 8601 in UTC.
static void time_strings_(char *stamp, size_t stamp_cap, char *iso, size_t iso_cap) {
  time_t now = time(NULL);
  struct tm local, utc;
  localtime_r(&now, &local);
  gmtime_r(&now, &utc);
  strftime(stamp, stamp_cap, "%Y%m%d_%H%M%S", &local);
  strftime(iso, iso_cap, "%Y-%m-%dT%H:%M:%SZ", &utc);
}

// Writes dir/name whole or dies.
static void run_file_(const Trainer *t, const char *name, const StrBuf *b) {
  char path[4096];
  path_join(path, sizeof path, t->run, name);
  int err = safe_write_file(path, b->data, b->len);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
}

// manifest.json: everything that somebody needs to know how this run came about.
static void run_manifest_(const Trainer *t, const char *status) {
  StrBuf b = {NULL, 0, 0};
  char stamp[32], iso[32];
  time_strings_(stamp, sizeof stamp, iso, sizeof iso);
  const char *dirty = strstr(BITNET_COMMIT, "-dirty");
  strbuf_printf(&b, "{\n\"status\": \"%s\",\n\"updated\": \"%s\",\n\"step\": %lld,\n", status, iso, (long long)t->state.step);
  strbuf_printf(&b, "\"git_commit\": \"%.*s\",\n\"git_dirty\": %s,\n",
                (int)(dirty ? (size_t)(dirty - BITNET_COMMIT) : strlen(BITNET_COMMIT)), BITNET_COMMIT, dirty ? "true" : "false");
  strbuf_printf(&b, "\"device\": \"%s\",\n\"parameters\": %zu,\n", dev_name(), tensor_table_params(&t->m->table));
  strbuf_printf(&b, "\"fingerprint\": \"%016llx\",\n", (unsigned long long)options_fingerprint(t->o));
  int64_t at = t->state.step > 0 ? t->state.step - 1 : 0;
  strbuf_printf(&b, "\"final_lambda\": ");
  json_put_number(&b, lambda_at(t->o->lambda_schedule, at, t->o->steps, t->lambda_ramp, t->o->lambda_k));
  strbuf_printf(&b, ",\n\"val_loss\": ");
  json_put_number(&b, t->last.val_loss);
  strbuf_printf(&b, ",\n\"exact_match\": ");
  json_put_number(&b, t->last.exact_match);
  if (t->hooks->describe) t->hooks->describe(t->hooks->ctx, &b);
  strbuf_printf(&b, ",\n\"options\": ");
  options_put_json(&b, t->o, STORED_GROUPS);
  strbuf_printf(&b, "}\n");
  run_file_(t, "manifest.json", &b);
  strbuf_free(&b);
}

// Takes the run for this process; a second process on the same run would mix their checkpoints.
static void run_lock_(Trainer *t) {
  char path[4096];
  path_join(path, sizeof path, t->run, ".lock");
  t->lock = open(path, O_RDWR | O_CREAT, 0666);
  if (t->lock < 0) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(errno));
  if (flock(t->lock, LOCK_EX | LOCK_NB) != 0)
    die(EXIT_USAGE, "another process is training the run %s; wait for it or stop it", t->run);
}

// Makes a new run folder and points run_dir/latest at it.
static void run_create_(Trainer *t) {
  const Options *o = t->o;
  char stamp[32], iso[32], leaf[512], link[4096], fresh[4096];
  const char *name = o->name[0] ? o->name : o->preset[0] ? o->preset : o->mode;
  if (strchr(name, '/')) die(EXIT_USAGE, "name: expected a name without '/', found '%s'; the place is set by run_dir", name);
  time_strings_(stamp, sizeof stamp, iso, sizeof iso);
  make_dirs(o->run_dir);
  for (int i = 1;; i++) {
    if (i == 1) snprintf(leaf, sizeof leaf, "%s_%s", name, stamp);
    else snprintf(leaf, sizeof leaf, "%s_%s_%d", name, stamp, i);
    path_join(t->run, sizeof t->run, o->run_dir, leaf);
    if (mkdir(t->run, 0777) == 0) break;
    if (errno != EEXIST) die(EXIT_FAILED, "cannot create %s: %s", t->run, strerror(errno));
  }
  path_join(link, sizeof link, o->run_dir, "latest");
  path_join(fresh, sizeof fresh, o->run_dir, ".latest.tmp");
  unlink(fresh);
  if (symlink(leaf, fresh) != 0 || rename(fresh, link) != 0)
    fprintf(stderr, "note: could not point %s at the run: %s\n", link, strerror(errno));
}

/*
Cuts what a stopped run wrote after its last checkpoint: the lines of log.jsonl with a later step, and a torn last line. Steps that are
run again are then logged once.
*/
static void run_cut_log_(const char *path, int64_t step) {
  size_t len;
  char *text = read_file(path, &len);
  StrBuf kept = {NULL, 0, 0};
  if (text == NULL) return;
  for (char *line = text; line < text + len;) {
    char *end = (char *)memchr(line, '\n', (size_t)(text + len - line));
    long long at;
    if (end == NULL) break;
    if (sscanf(line, "{\"step\": %lld", &at) == 1 && at <= step) strbuf_append(&kept, line, (size_t)(end + 1 - line));
    line = end + 1;
  }
  int err = safe_write_file(path, kept.data ? kept.data : "", kept.len);
  if (err) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(err));
  strbuf_free(&kept);
  free(text);
}

// Exit 2 if the run of this checkpoint was made by another mode, which alone knows how to go on with it.
static void run_check_mode_(const Options *o, const char *checkpoint) {
  char run[3072], path[4096], err[200];
  size_t len;
  JsonDoc doc;
  checkpoint_run(run, sizeof run, checkpoint);
  path_join(path, sizeof path, run, "config.json");
  char *text = read_file(path, &len);
  if (text && json_parse(&doc, text, len, err, sizeof err)) {
    const char *mode = json_get_string(doc.root, "mode", o->mode);
    if (strcmp(mode, o->mode) != 0)
      die(EXIT_USAGE, "%s is a run of the mode %s: go on with ./train_bitnet %s resume=%s", run, mode, mode, o->resume);
    json_free(&doc);
  }
  free(text);
}

// from (=) [cap]: the directory whose parameters a run starts with: that of resume=, with whose options it goes on, that of init=, or "".
UNUSED static void run_start(Options *o, char *from, size_t cap) {
  if (o->resume[0] && o->init[0]) die(EXIT_USAGE, "resume= goes on with a run, init= starts a new one from a model; give one of them");
  from[0] = 0;
  if (o->resume[0] || o->init[0]) checkpoint_path(from, cap, o->resume[0] ? o->resume : o->init);
  if (o->resume[0] == 0) return;
  run_check_mode_(o, from);
  checkpoint_resume_options(o, from);
}

// Appends one line to log.jsonl. A full disk must not end a training run here; saving a checkpoint will report it.
static void run_log_(Trainer *t, const StrBuf *line) {
  fwrite(line->data, 1, line->len, t->log);
  fflush(t->log);
}

// ---------------------------------------------------------------------------------------------------------
// Opening.

// The number of steps in which lambda rises.
UNUSED static int64_t lambda_ramp_steps(const Options *o) {
  if (o->lambda_warmup_steps >= 0) return o->lambda_warmup_steps;
  return (int64_t)(o->lambda_warmup_frac * (double)o->steps);
}

UNUSED static Schedule schedule_from_options(const Options *o) {
  Schedule s;
  int to_zero = o->lr_schedule == LR_FAQ || o->lr_schedule == LR_WSD;
  memset(&s, 0, sizeof s);
  s.kind = o->lr_schedule;
  s.steps = o->steps;
  s.warmup = o->warmup_steps < o->steps ? o->warmup_steps : o->steps;
  s.peak = o->lr;
  s.min = o->min_lr >= 0 ? o->min_lr : to_zero ? 0 : o->lr_schedule == LR_TWO_STAGE ? 0.01 * o->lr : 0.1 * o->lr;
  s.stage2 = o->stage2_lr >= 0 ? o->stage2_lr : o->lr * 2 / 3;
  s.decay_ratio = o->decay_ratio;
  s.wd = o->weight_decay;
  s.wd_off_at = o->wd_off_at;
  if (o->lr_schedule == LR_WSD && (double)s.warmup + s.decay_ratio * (double)s.steps > (double)s.steps)
    die(EXIT_USAGE, "wsd: warmup_steps=%d and a decay of %.0f steps do not fit into steps=%d", o->warmup_steps,
        s.decay_ratio * o->steps, o->steps);
  return s;
}

// Opens the run folder: a new one, or with resume the one that holds the checkpoint (state is filled then).
static void run_open_(Trainer *t) {
  const Options *o = t->o;
  char path[4096];
  StrBuf b = {NULL, 0, 0};
  if (o->resume[0]) {
    char checkpoint[4096];
    checkpoint_path(checkpoint, sizeof checkpoint, o->resume);
    checkpoint_run(t->run, sizeof t->run, checkpoint);
    run_lock_(t);
    state_load(&t->state, t->m, checkpoint);
    path_join(path, sizeof path, t->run, "log.jsonl");
    run_cut_log_(path, t->state.step);
  } else {
    run_create_(t);
    run_lock_(t);
    options_put_json(&b, o, STORED_GROUPS);
    run_file_(t, "config.json", &b);
    strbuf_free(&b);
  }
  path_join(path, sizeof path, t->run, "log.jsonl");
  t->log = fopen(path, "a");
  if (t->log == NULL) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(errno));
}

/*
Makes everything ready for the first step. m: a model with parameters and training buffers; tok may be NULL. With o->resume the
parameters and moments are replaced by the checkpoint's. Everything that a step needs is allocated here.
*/
UNUSED static void trainer_open(Trainer *t, const Options *o, const Hooks *hooks, Model *m, const Tokenizer *tok) {
  memset(t, 0, sizeof *t);
  t->o = o;
  t->hooks = hooks;
  t->m = m;
  t->tok = tok;
  t->schedule = schedule_from_options(o);
  t->lambda_ramp = lambda_ramp_steps(o);
  t->last.val_loss = t->last.exact_match = t->last.second_match = t->last.pair_accuracy = NAN;
  t->batches = (Batch *)xcalloc((size_t)o->grad_accum, sizeof(Batch));
  for (int i = 0; i < o->grad_accum; i++) batch_alloc(&t->batches[i], m->B, m->T);
  t->host_coef = (float *)xcalloc((size_t)m->R, sizeof(float));
  t->measured = -1;
  if (o->health_every > 0) {
    size_t n = 0;
    for (int i = 0; i < m->table.count; i++) n += m->table.tensors[i].flags & TERNARY ? m->table.tensors[i].n : 0;
    t->codes = (int8_t *)device_memory_(n, "the ternary codes");
    t->code_counts = (int64_t *)device_memory_(2 * sizeof(int64_t), "the ternary codes");
  }
  for (int i = 0; i < SPARK; i++) t->spark[i] = NAN;
  run_open_(t);
  run_manifest_(t, "running");
  catch_signals_();
}

UNUSED static void trainer_close(Trainer *t) {
  for (int i = 0; i < t->o->grad_accum; i++) batch_free(&t->batches[i]);
  free(t->batches);
  free(t->host_coef);
  dev_free(t->codes);
  dev_free(t->code_counts);
  fclose(t->log);
  close(t->lock);
}

// ---------------------------------------------------------------------------------------------------------
// The loop.

// What one step reports.
typedef struct {
  double loss, lambda, lr, grad_norm, seconds;
  size_t tokens;
  int updates, skipped;
} StepReport;

/*
One update from `batches` micro-batches. All are drawn first, because the loss is the mean over the valid targets of the whole window:
gradients are weighted by 1 / (number of targets) from the start, and two half batches give what one whole batch gives. Batches that a
mode has collected lie ready in the mode, which knows their number of targets; they pass through one buffer.
A gradient that is not finite is not applied: one bad update must not destroy the parameters.
*/
static void update_(Trainer *t, StepReport *r, int batches, int collected) {
  const Options *o = t->o;
  Model *m = t->m;
  int64_t step = t->state.step;
  size_t targets = 0;
  double loss = 0;
  for (int i = 0; i < batches && !collected; i++) {
    t->hooks->batch(t->hooks->ctx, (uint64_t)step * (uint64_t)o->grad_accum + (uint64_t)i, &t->batches[i]);
    targets += t->batches[i].n_targets;
  }
  float coef = targets ? (float)(1.0 / (double)targets) : 0.0f;
  model_quantize(m, (float)r->lambda);
  dev_zero(m->grads, m->table.floats * sizeof(float));
  for (int i = 0; i < batches; i++) {
    Batch *b = &t->batches[collected ? 0 : i];
    if (collected) t->hooks->batch(t->hooks->ctx, (uint64_t)i, b);
    m->noise = rng_u64((uint64_t)o->seed, RNG_ROUND, (uint64_t)t->state.updates << 24 | (uint64_t)i);
    if (t->hooks->loss) loss += t->hooks->loss(t->hooks->ctx, m, b, coef, t->host_coef);
    else loss += batch_loss(m, b, coef, t->host_coef, 1);
  }
  if (!collected) loss = targets ? loss / (double)targets : 0.0;
  double norm = grad_norm(m);
  if (!isfinite(loss) || !isfinite(norm)) {
    r->skipped = 1;
  } else {
    t->state.updates++;
    adamw_step(m, (float)clip_scale(norm, o->grad_clip), r->lr, wd_at(&t->schedule, step), o->beta1, o->beta2, o->eps,
               t->state.updates);
  }
  r->tokens += (size_t)batches * (size_t)m->R;
  // Of several updates the first one's loss and the largest norm are shown; a number that is not finite stays.
  if (r->updates++ == 0) r->loss = loss;
  else if (r->skipped && !isfinite(loss)) r->loss = loss;
  if (!(norm <= r->grad_norm)) r->grad_norm = norm;
}

// One step: one update, or what the mode collects. Within an update no memory is asked for.
static StepReport train_step_(Trainer *t) {
  const Options *o = t->o;
  const Hooks *h = t->hooks;
  StepReport r;
  double t0 = time_now();
  memset(&r, 0, sizeof r);
  r.lambda = lambda_at(o->lambda_schedule, t->state.step, o->steps, t->lambda_ramp, o->lambda_k);
  r.lr = lr_at(&t->schedule, t->state.step);
  if (h->collect == NULL) {
    alloc_guard = 1;
    update_(t, &r, o->grad_accum, 0);
    alloc_guard = 0;
  } else {
    for (int phase = 0;; phase++) {
      Work work = {0, 0};
      model_quantize(t->m, (float)r.lambda);
      if (!h->collect(h->ctx, t->m, t->state.step, phase, &work)) break;
      alloc_guard = 1;
      for (int i = 0; i < work.updates && !r.skipped; i++) update_(t, &r, work.batches, 1);
      alloc_guard = 0;
    }
  }
  t->state.step++;
  r.seconds = time_now() - t0;
  return r;
}

/*
The health of a ternary model: which share of its codes is zero (about 0.31 for Gaussian weights), and which share changes from one
step to the next: many while the model learns, few when it settles. flips is NAN at the first measurement.
*/
static void measure_codes_(Trainer *t, double *zeros, double *flips) {
  const Model *m = t->m;
  int64_t total = 0, zero = 0, changed = 0, counts[2];
  for (int i = 0; i < m->table.count; i++) {
    const Tensor *x = &m->table.tensors[i];
    if (!(x->flags & TERNARY)) continue;
    weight_changes(t->code_counts, t->codes + total, m->params + x->offset, (int)x->shape[0], (int)x->shape[1]);
    dev_copy_out(counts, t->code_counts, sizeof counts);
    zero += counts[0];
    changed += counts[1];
    total += (int64_t)x->n;
  }
  *zeros = (double)zero / (double)total;
  *flips = t->measured < 0 ? NAN : (double)changed / (double)total / (double)(t->state.step - t->measured);
  t->measured = t->state.step;
}

// "1:02:03", or "45 s".
static void put_duration_(char *out, size_t cap, double seconds) {
  long s = seconds > 0 && seconds < 1e9 ? (long)(seconds + 0.5) : 0;
  if (s < 60) snprintf(out, cap, "%ld s", s);
  else if (s < 3600) snprintf(out, cap, "%ld:%02ld", s / 60, s % 60);
  else snprintf(out, cap, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
}

// Ends a progress line, so that what comes next stands below it.
static void end_line_(Trainer *t) {
  if (t->line_open) fputc('\n', stderr);
  t->line_open = 0;
}

// The loss so far as a row of bars, each for an equal part of the run. out: at least 4 * SPARK bytes.
static void put_spark_(char *out, const double *spark) {
  static const char *const bars[] = {"\u2581", "\u2582", "\u2583", "\u2584", "\u2585", "\u2586", "\u2587", "\u2588"};
  double low = INFINITY, high = -INFINITY;
  for (int i = 0; i < SPARK; i++) {
    low = spark[i] < low ? spark[i] : low;
    high = spark[i] > high ? spark[i] : high;
  }
  out[0] = 0;
  for (int i = 0; i < SPARK; i++) {
    double height = high > low ? (spark[i] - low) / (high - low) : 0;
    strcat(out, isfinite(spark[i]) ? bars[(int)(7.999 * height)] : " ");
  }
}

// One aligned line a step; on a terminal it is drawn over the one before.
static void show_progress_(Trainer *t, const StepReport *r) {
  int tty = isatty(2);
  char eta[32], curve[4 * SPARK + 1] = "";
  StrBuf more = {NULL, 0, 0};
  double *bar = &t->spark[(t->state.step - 1) * SPARK / t->o->steps];
  *bar = isnan(*bar) || !isfinite(r->loss) ? r->loss : 0.9 * *bar + 0.1 * r->loss;
  if (tty) put_spark_(curve, t->spark);
  if (t->hooks->progress) t->hooks->progress(t->hooks->ctx, &more);
  double now = time_now();
  t->paces += t->paces < 50;   // the mean of 50 steps, then one that forgets
  t->pace += (now - t->shown - t->pace) / t->paces;
  t->shown = now;
  put_duration_(eta, sizeof eta, t->pace * (double)(t->o->steps - t->state.step));
  fprintf(stderr, "%sstep %*lld/%d  loss %8.4f  lambda %.3f  lr %.2e  norm %7.3f  %6.0f ms  %7.0f tok/s  ETA %-8s%s%s%s%s",
          tty ? "\r" : "", snprintf(NULL, 0, "%d", t->o->steps), (long long)t->state.step, t->o->steps, r->loss, r->lambda, r->lr,
          r->grad_norm, r->seconds * 1e3, (double)r->tokens / r->seconds, eta, more.data ? more.data : "", curve,
          r->skipped ? "  SKIPPED: not finite" : "", tty ? "" : "\n");
  strbuf_free(&more);
  t->line_open = tty;
}

static void log_step_(Trainer *t, const StepReport *r) {
  StrBuf b = {NULL, 0, 0};
  double zeros, flips;
  strbuf_printf(&b, "{\"step\": %lld, \"loss\": ", (long long)t->state.step);
  json_put_number(&b, r->loss);
  strbuf_printf(&b, ", \"lambda\": ");
  json_put_number(&b, r->lambda);
  strbuf_printf(&b, ", \"lr\": ");
  json_put_number(&b, r->lr);
  strbuf_printf(&b, ", \"grad_norm\": ");
  json_put_number(&b, r->grad_norm);
  strbuf_printf(&b, ", \"ms\": %.3f, \"tok_per_s\": %.1f", r->seconds * 1e3, (double)r->tokens / r->seconds);
  if (t->o->health_every > 0 && t->state.step % t->o->health_every == 0) {
    measure_codes_(t, &zeros, &flips);
    strbuf_printf(&b, ", \"zeros\": ");
    json_put_number(&b, zeros);
    if (!isnan(flips)) {
      strbuf_printf(&b, ", \"flips\": ");
      json_put_number(&b, flips);
    }
  }
  if (t->hooks->report) t->hooks->report(t->hooks->ctx, &b);
  strbuf_printf(&b, "%s}\n", r->skipped ? ", \"skipped\": true" : "");
  run_log_(t, &b);
  strbuf_free(&b);
}

// Measures at lambda = 1, the model that will be served. Returns 0 if the mode has nothing to measure.
static int evaluate_(Trainer *t) {
  if (t->hooks->evaluate == NULL) return 0;
  model_quantize(t->m, 1.0f);
  t->last.val_loss = t->last.exact_match = t->last.second_match = t->last.pair_accuracy = NAN;
  t->hooks->evaluate(t->hooks->ctx, t->m, &t->last);
  return !isnan(t->last.val_loss) || !isnan(t->last.exact_match);
}

static void evaluate_and_log_(Trainer *t) {
  StrBuf b = {NULL, 0, 0};
  if (!evaluate_(t)) return;
  strbuf_printf(&b, "{\"step\": %lld", (long long)t->state.step);
  if (!isnan(t->last.val_loss)) {
    strbuf_printf(&b, ", \"val_loss\": ");
    json_put_number(&b, t->last.val_loss);
  }
  if (!isnan(t->last.exact_match)) {
    strbuf_printf(&b, ", \"exact_match\": ");
    json_put_number(&b, t->last.exact_match);
  }
  if (!isnan(t->last.second_match)) {
    strbuf_printf(&b, ", \"second_match\": ");
    json_put_number(&b, t->last.second_match);
  }
  if (!isnan(t->last.pair_accuracy)) {
    strbuf_printf(&b, ", \"pair_accuracy\": ");
    json_put_number(&b, t->last.pair_accuracy);
  }
  strbuf_printf(&b, "}\n");
  run_log_(t, &b);
  end_line_(t);
  fprintf(stderr, "evaluation at step %lld, lambda = 1: val_loss %.4f", (long long)t->state.step, t->last.val_loss);
  if (!isnan(t->last.exact_match)) fprintf(stderr, ", exact_match %.4f", t->last.exact_match);
  if (!isnan(t->last.second_match)) fprintf(stderr, ", corrected %.4f", t->last.second_match);
  if (!isnan(t->last.pair_accuracy)) fprintf(stderr, ", pair_accuracy %.4f", t->last.pair_accuracy);
  fprintf(stderr, "\n");
  strbuf_free(&b);
}

static void sample_(Trainer *t) {
  StrBuf b = {NULL, 0, 0};
  char path[4096];
  if (t->hooks->sample == NULL) return;
  model_quantize(t->m, 1.0f);
  strbuf_printf(&b, "--- step %lld ---\n", (long long)t->state.step);
  size_t head = b.len;
  t->hooks->sample(t->hooks->ctx, t->m, &b);
  if (b.len > head) {
    path_join(path, sizeof path, t->run, "samples.txt");
    FILE *f = fopen(path, "a");
    if (f == NULL) die(EXIT_FAILED, "cannot write %s: %s", path, strerror(errno));
    fwrite(b.data, 1, b.len, f);
    fclose(f);
  }
  strbuf_free(&b);
}

// A checkpoint of the state after the last finished step.
static void save_(Trainer *t) {
  StrBuf kept = {NULL, 0, 0};
  if (t->hooks->keep) t->hooks->keep(t->hooks->ctx, &kept);
  t->state.kept = kept.data;
  checkpoint_save(t->m, t->tok, t->o, &t->state, t->run);
  t->state.kept = NULL;
  strbuf_free(&kept);
}

static int due_(int every, int64_t step) {
  return every > 0 && step % every == 0;
}

/*
Trains until the last step, stop_at, or a signal; saves; prints the closing line. Returns when the run is safe on disk; dies (with what
was saved before intact) if max_skips updates in a row were not finite or a checkpoint cannot be written.
*/
UNUSED static void trainer_train(Trainer *t) {
  const Options *o = t->o;
  int64_t saved = o->resume[0] ? t->state.step : -1, evaluated = -1;
  int64_t end = o->stop_at > 0 && o->stop_at < o->steps ? o->stop_at : o->steps;
  t->began = t->shown = time_now();
  while (t->state.step < end && !stop_requested) {
    StepReport r = train_step_(t);
    int64_t step = t->state.step;
    if (t->hooks->finish) t->hooks->finish(t->hooks->ctx, step);
    show_progress_(t, &r);
    if (r.skipped || step % o->log_every == 0 || step == o->steps) log_step_(t, &r);
    t->skips = r.skipped ? t->skips + 1 : 0;
    if (t->skips >= o->max_skips) {
      end_line_(t);
      run_manifest_(t, "failed");
      die(EXIT_FAILED,
          "step %lld: %d updates in a row were not finite (loss %g, gradient norm %g, lr %g); a lower lr or smaller grad_clip "
          "usually helps; the last checkpoint is intact in %s",
          (long long)step, t->skips, r.loss, r.grad_norm, r.lr, t->run);
    }
    if (due_(o->eval_every, step)) {
      evaluate_and_log_(t);
      evaluated = step;
    }
    if (due_(o->sample_every, step)) sample_(t);
    if (due_(o->save_every, step) && step < end) {
      save_(t);
      saved = step;
    }
  }
  int finished = t->state.step >= o->steps, interrupted = stop_requested;
  end_line_(t);
  if (t->state.step < end) fprintf(stderr, "stopping after step %lld\n", (long long)t->state.step);
  if (saved != t->state.step) save_(t);
  if (finished && !interrupted) {
    if (evaluated != t->state.step) evaluate_and_log_(t);
    if (!due_(o->sample_every, t->state.step)) sample_(t);
  } else if (!interrupted && evaluated != t->state.step) {
    evaluate_(t);   // for the closing line only: the log of a stopped run stays that of a run that never stopped
  }
  run_manifest_(t, finished ? "completed" : "interrupted");
  if (!finished) fprintf(stderr, "saved; go on with: resume=%s\n", t->run);
  printf("done: steps %lld val_loss %.4f", (long long)t->state.step, t->last.val_loss);
  if (!isnan(t->last.exact_match)) printf(" exact_match %.4f", t->last.exact_match);
  if (!isnan(t->last.pair_accuracy)) printf(" pair_accuracy %.4f", t->last.pair_accuracy);
  printf(" seconds %.1f run %s\n", time_now() - t->began, t->run);
  fflush(stdout);
}

#endif
