/*
options.h: the one table of everything that a user can set, and how a command line becomes a filled struct.

What it is:  the option table (name, type, default, range, help), presets, aliases, the parser with its errors, --help, and the
             options as JSON for the run folder. A new option is one line in the table.
What not:    what an option means; the code that reads o->name knows that.
Read before: bitnet/utils.h, bitnet/json.h.
Defines:     Options, Mode; options_defaults, options_parse, options_set, options_is_set, options_put_json, options_from_json,
             options_fingerprint, options_first_difference, options_help, options_free; the LR_* and LAMBDA_* names.

Values come from four places, each overruling the ones before: the table's default, the preset, a JSON file (config=FILE), the
command line. Each value remembers its place, so a message can tell where it came from.
*/
#ifndef BITNET_OPTIONS_H
#define BITNET_OPTIONS_H

#include "json.h"
#include "utils.h"
#include <limits.h>

// The choices of the options below, in the order of their names in the table.
enum { LR_COSINE, LR_TWO_STAGE, LR_FAQ, LR_WSD, LR_LINEAR, LR_CONSTANT };
enum { QA_PLAIN, QA_SEED003, QA_CHATML };
enum { UNIT_CORRECTION, UNIT_BATCH };
enum { SECOND_DELTA, SECOND_GROUP };
enum { SCORER_TRANSFORMER, SCORER_LINEAR };
enum {
  LAMBDA_WARMUP, LAMBDA_LINEAR, LAMBDA_ACCELERATED, LAMBDA_COSINE, LAMBDA_EXPONENTIAL, LAMBDA_SIGMOID, LAMBDA_STEP, LAMBDA_NONE
};

// Groups. A mode names the groups it reads; an option of another group is an error there, not silently ignored. Groups
// in RESULT_GROUPS change the trained bits: a resumed run must not change them.
enum {
  GROUP_MODEL = 1, GROUP_TRAINING = 2, GROUP_DATA = 4, GROUP_SHARED = 8, GROUP_RUNNING = 16, GROUP_INFERENCE = 32, GROUP_GENERAL = 64,
  GROUP_COMMAND = 128,   // about this one call of the program: never stored
  GROUP_CONVERT = 256, GROUP_GRPO = 512, GROUP_QA = 1024, GROUP_REWARD = 2048,
  RESULT_GROUPS = GROUP_MODEL | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_GRPO | GROUP_QA | GROUP_REWARD,
  STORED_GROUPS = RESULT_GROUPS | GROUP_RUNNING   // what a run folder and a checkpoint remember
};

/*
The table. INT and REAL: group, name, default, smallest, largest, help. TEXT: group, name, default, help. CHOICE: group, name,
default, names separated by |, help; its value is the index of the name. A switch is an INT from 0 to 1.
*/
#define OPTION_TABLE(INT, REAL, TEXT, CHOICE)                                                                                       \
  INT(MODEL, dim, 128, 2, 65536, "width of the residual stream")                                                                    \
  INT(MODEL, layers, 3, 1, 1000, "number of blocks")                                                                                \
  INT(MODEL, heads, 4, 1, 1024, "query heads")                                                                                      \
  INT(MODEL, kv_heads, 0, 0, 1024, "key/value heads; 0 = heads")                                                                    \
  INT(MODEL, head_dim, 0, 0, 65536, "width of a head; 0 = dim / heads")                                                             \
  INT(MODEL, ffn_dim, 384, 1, 1 << 20, "width of the feed-forward unit")                                                            \
  INT(MODEL, vocab, 0, 0, 1 << 24, "rows of the embedding; 0 = what the tokenizer needs")                                           \
  INT(MODEL, max_seq, 0, 0, 1 << 24, "longest context; 0 = seq_len")                                                                \
  REAL(MODEL, norm_eps, 1e-5, 1e-30, 1, "epsilon of all norms")                                                                     \
  REAL(MODEL, rope_theta, 10000, 1, 1e12, "base of the rotary embedding")                                                           \
  CHOICE(MODEL, rope_scaling, 0, "none|llama3", "frequency scaling of the rotary embedding")                                        \
  REAL(MODEL, rope_factor, 8, 1, 1e6, "llama3 scaling: factor")                                                                     \
  REAL(MODEL, rope_low_freq, 1, 0, 1e6, "llama3 scaling: low frequency factor")                                                     \
  REAL(MODEL, rope_high_freq, 4, 0, 1e6, "llama3 scaling: high frequency factor")                                                   \
  INT(MODEL, rope_original_max, 8192, 1, 1 << 24, "llama3 scaling: context length before scaling")                                  \
  CHOICE(MODEL, activation, 0, "relu2|silu", "gate of the feed-forward unit")                                                       \
  INT(MODEL, attn_sub_norm, 1, 0, 1, "RMSNorm in front of the o projection")                                                        \
  INT(MODEL, ffn_sub_norm, 1, 0, 1, "RMSNorm in front of the down projection")                                                      \
  INT(MODEL, qkv_bias, 0, 0, 1, "biases on q, k, v (Qwen2 has them)")                                                               \
  INT(MODEL, o_bias, 0, 0, 1, "bias on o")                                                                                          \
  INT(MODEL, qk_norm, 0, 0, 1, "RMSNorm on each head of q and k (Qwen3 has it)")                                                    \
  INT(MODEL, tie_embeddings, 1, 0, 1, "the classifier is the embedding table")                                                      \
  INT(MODEL, act_bits, 8, 0, 8, "bits of activations: 8, 4, or 0 for float")                                                        \
  REAL(MODEL, init_std, 0.02, 1e-6, 10, "standard deviation of random weights")                                                     \
                                                                                                                                    \
  INT(TRAINING, steps, 1000, 1, INT_MAX, "optimizer updates of the whole run")                                                      \
  INT(TRAINING, batch_size, 128, 1, 1 << 20, "rows of a micro-batch")                                                               \
  INT(TRAINING, seq_len, 0, 0, 1 << 24, "tokens of a row; 0 = what the arithmetic problems need, or 256")                           \
  INT(TRAINING, grad_accum, 1, 1, 1 << 20, "micro-batches of an update")                                                            \
  REAL(TRAINING, lr, 1.5e-3, 0, 10, "peak learning rate")                                                                           \
  REAL(TRAINING, min_lr, -1, -1, 10, "learning rate at the end; -1 = lr / 10 (faq, wsd: 0)")                                        \
  CHOICE(TRAINING, lr_schedule, LR_COSINE, "cosine|two_stage|faq|wsd|linear|constant", "how the learning rate goes on after warm-up") \
  REAL(TRAINING, stage2_lr, -1, -1, 10, "faq, two_stage: the rate of the second half; -1 = 2/3 lr")                                 \
  INT(TRAINING, warmup_steps, 100, 0, INT_MAX, "steps of linear learning-rate warm-up")                                             \
  REAL(TRAINING, decay_ratio, 0.2, 0, 1, "wsd: the part of the run that decays")                                                    \
  REAL(TRAINING, weight_decay, 0.1, 0, 10, "decay of matrices and embeddings")                                                      \
  REAL(TRAINING, wd_off_at, 0.5, 0, 1, "fraction of the run after which weight decay is 0")                                         \
  REAL(TRAINING, beta1, 0.9, 0, 0.99999, "AdamW: decay of the mean of the gradient")                                                \
  REAL(TRAINING, beta2, 0.95, 0, 0.9999999, "AdamW: decay of the mean of its square")                                               \
  REAL(TRAINING, eps, 1e-8, 0, 1, "AdamW: added to the root")                                                                       \
  REAL(TRAINING, grad_clip, 1.0, 0, 1e9, "largest global gradient norm; 0 = no clipping")                                           \
  CHOICE(TRAINING, lambda_schedule, LAMBDA_WARMUP, "warmup|linear|accelerated|cosine|exponential|sigmoid|step|none",                \
         "how lambda goes from float (0) to ternary (1)")                                                                           \
  REAL(TRAINING, lambda_warmup_frac, 0.4, 0, 1, "warmup, cosine: the part of the run in which lambda rises")                        \
  INT(TRAINING, lambda_warmup_steps, -1, -1, INT_MAX, "the same in steps; -1 = by fraction")                                        \
  REAL(TRAINING, lambda_k, -1, -1, 1e6, "steepness of exponential (default 8) and sigmoid (default 100)")                           \
  INT(TRAINING, recompute, 0, 0, 1, "recompute activations in the backward pass: less memory, a third more work")                   \
  INT(TRAINING, dx_int8, 1, 0, 1, "bf16, lambda = 1: gradients of inputs as int8 products, rounded at random; 0 = exact") \
  INT(TRAINING, max_skips, 3, 1, INT_MAX, "stop after so many updates in a row that were skipped as not finite")                    \
  TEXT(TRAINING, init, "", "start from this model, a directory or file, instead of random weights")                                 \
                                                                                                                                    \
  TEXT(DATA, data, "arithmetic", "training data: arithmetic, or token shards: data/train_*.bin, or a_*.bin:0.7,b_*.bin:0.3")       \
  TEXT(DATA, tokenizer, "", "tokenizer of the shards, a file or its directory; empty: beside the shards")                           \
  TEXT(DATA, arith_ops, "+-", "arithmetic: operations, out of + - *")                                                               \
  INT(DATA, arith_min, 0, 0, 99999, "arithmetic: smallest operand of + and -")                                                      \
  INT(DATA, arith_max, 99, 0, 99999, "arithmetic: largest operand of + and -")                                                      \
  INT(DATA, arith_mul_max, 9, 0, 99999, "arithmetic: largest operand of *")                                                         \
  REAL(DATA, arith_holdout, 0.1, 0.001, 0.9, "arithmetic: fraction of the problems that is never trained on")                       \
  REAL(DATA, arith_drafts, 0, 0, 1, "arithmetic: fraction of the rows that show a draft of the answer first, half of them wrong")    \
  CHOICE(QA, qa_template, QA_SEED003, "plain|seed003|chatml", "questions: how one becomes a prompt (also: template)")               \
                                                                                                                                    \
  INT(GRPO, group_size, 2, 1, 65536, "answers that are sampled for each question and compared with each other")                     \
  INT(GRPO, max_new, 20, 1, 1 << 20, "most tokens of an answer, its end included (also: max_length)")                               \
  INT(GRPO, num_iterations, 1, 1, 1000, "updates on each set of answers")                                                           \
  CHOICE(GRPO, advantage, 0, "group|batch|none|seed003|mean", "what a reward is compared with and divided by")                           \
  REAL(GRPO, negative_weight, 1, 0, 1e6, "weight of answers below the mean of their group; 0 (with beta=0): they are left out")     \
  CHOICE(GRPO, loss_type, 0, "seq|token|dr", "mean over answers, mean over tokens, or a constant length")                           \
  REAL(GRPO, clip_eps, 0.2, 0, 1e9, "a token's probability counts up to 1 +- this times what it was when sampled")                  \
  REAL(GRPO, clip_eps_high, -1, -1, 1e9, "the same upwards; -1 = clip_eps")                                                         \
  REAL(GRPO, beta, 0.01, 0, 1e6, "weight of the distance from the model at the start; 0 = no such penalty")                         \
  CHOICE(GRPO, kl, 0, "full|k3|k2|k1|seed|forward", "how that distance is computed: exactly (full, forward), or one of the estimates")\
  INT(GRPO, kl_every, 0, 0, INT_MAX, "beta=0: steps between measurements of that distance, by the estimate k3; 0 = never")          \
  TEXT(GRPO, reward, "", "exact, f1, numeric, accuracy, arithmetic, or a weighted sum: f1:0.7,exact:0.3; empty: arithmetic or f1")  \
  TEXT(GRPO, reward_model, "", "reward models that score answers: DIR or DIR:weight, separated by commas (also: reward_models)")    \
  TEXT(GRPO, reward_weights, "", "their weights as a list of its own")                                                              \
  REAL(GRPO, rule_weight, -1, -1, 1, "share of the rules beside reward models; -1 = 0, or 0.5 where reward= is given")              \
  INT(GRPO, reward_raw, 0, 0, 1, "reward models: the raw value instead of its sigmoid, which is between 0 and 1 like the rules")    \
  INT(GRPO, two_layer, 0, 0, 1, "the model also corrects its answers and learns from the rise of the reward")                       \
  REAL(GRPO, first_weight, 1, 0, 1e6, "two_layer: weight of the first answers' rewards; 0: only corrections are rewarded")          \
  REAL(GRPO, first_beta, -1, -1, 1e6, "two_layer: beta of the first answers, which stay near the start with it; -1 = beta")          \
  TEXT(GRPO, guiding_prompt, "Review and correct the answer:",                                                                       \
    "two_layer: what asks for the correction: a text, or a file of texts (.json or lines)")                                          \
  TEXT(GRPO, guiding_probabilities, "", "two_layer: how likely each of these texts is, a list or a file; empty: all alike")         \
  TEXT(GRPO, guiding_schedule, "", "two_layer: indices of the texts that are used in turn, a list or a file; empty: at random")     \
  CHOICE(GRPO, guiding_schedule_unit, 0, "correction|batch", "two_layer: the schedule goes on with each correction or each step")   \
  INT(GRPO, augmentation_size, 1, 1, 4096, "two_layer: corrections of each answer")                                                 \
  INT(GRPO, second_max_length, 20, 1, 1 << 20, "two_layer: most tokens of a correction")                                            \
  CHOICE(GRPO, second_advantage, 0, "delta|group",                                                                                   \
    "two_layer: the rise of the reward, or as the first layer among the corrections of an answer")                                   \
  CHOICE(GRPO, verifier_mode, 0, "simple|dynamic|none|strict",                                                                       \
    "two_layer: which corrections count as improved; none: all are trained")                                                         \
  REAL(GRPO, improvement_threshold, 0.05, -1e9, 1e9, "two_layer: simple, dynamic: the reward must rise by more than this")          \
  INT(GRPO, buffer_size, 256, 0, 65536, "two_layer: improved corrections that are kept and trained again")                          \
  INT(GRPO, buffer_age, 50, 0, INT_MAX, "two_layer: for so many steps; 0 = as long as there is room")                               \
  TEXT(GRPO, csv_log, "", "append a row for every step to this CSV file")                                                           \
                                                                                                                                    \
  CHOICE(REWARD, scorer, 0, "transformer|linear", "a network that reads question and answer, or a number for each word")            \
  REAL(REWARD, holdout, 0.1, 0, 0.9, "files: part of the questions that is only for evaluation; not used with val_data")            \
                                                                                                                                    \
  INT(SHARED, seed, 1337, 0, INT_MAX, "number that all random choices depend on")                                                   \
  CHOICE(SHARED, precision, 0, "bf16|fp32", "operands of float products; sums are fp32 always")                                     \
                                                                                                                                    \
  TEXT(RUNNING, val_data, "", "validation shards, as in data; empty: none (arithmetic has its held-out problems)")                  \
  TEXT(COMMAND, resume, "", "go on with this run or checkpoint, with its own options")                                              \
  INT(COMMAND, stop_at, 0, 0, INT_MAX, "stop after this step as an interruption would: saved, schedules unchanged; 0 = at the end") \
  INT(RUNNING, eval_every, 0, 0, INT_MAX, "steps between evaluations; 0 = only at the end")                                         \
  INT(RUNNING, eval_batches, 20, 1, INT_MAX, "validation batches of an evaluation")                                                 \
  INT(RUNNING, eval_problems, 1000, 1, INT_MAX, "arithmetic: held-out problems of an evaluation")                                   \
  INT(RUNNING, save_every, 0, 0, INT_MAX, "steps between checkpoints; 0 = only at the end")                                         \
  INT(RUNNING, keep, 3, 0, INT_MAX, "newest checkpoints that are kept; 0 = all")                                                    \
  INT(RUNNING, sample_every, 0, 0, INT_MAX, "steps between samples; 0 = only at the end")                                           \
  TEXT(RUNNING, sample_prompt, "Once upon a time", "samples continue this text; several texts are separated by |")                  \
  INT(RUNNING, health_every, 10, 0, INT_MAX, "steps between measurements of the codes (zeros, flips) in log.jsonl; 0 = never")      \
  INT(RUNNING, log_every, 1, 1, INT_MAX, "steps between lines of log.jsonl")                                                        \
  TEXT(RUNNING, run_dir, "runs", "where run folders are made")                                                                      \
  TEXT(RUNNING, name, "", "name of the run folder; empty: preset and time")                                                         \
  INT(COMMAND, dry_run, 0, 0, 1, "print the configuration and the memory table, then stop")                                         \
                                                                                                                                    \
  TEXT(INFERENCE, prompt, "", "text to continue")                                                                                   \
  INT(INFERENCE, n, 64, 1, 1 << 20, "most new tokens")                                                                              \
  REAL(INFERENCE, temperature, 0, 0, 100, "sampling temperature; 0 = always the most likely token")                                 \
  INT(INFERENCE, top_k, 0, 0, 1 << 24, "sample from the k most likely tokens; 0 = all")                                             \
  REAL(INFERENCE, top_p, 1, 0, 1, "sample from the most likely tokens that together have this probability")                         \
  INT(INFERENCE, count, 1, 1, 4096, "texts to generate at once")                                                                    \
  CHOICE(INFERENCE, chat_template, 0, "auto|none|chatml|llama3|alpaca",                                                              \
    "chat: how turns are marked; auto: what the tokenizer has marks for")                                                            \
  TEXT(INFERENCE, system, "", "chat: what the model is told before the first turn")                                                 \
  INT(INFERENCE, decode, 0, 0, 1, "tokenize: ids to text instead of text to ids")                                                   \
  TEXT(INFERENCE, file, "", "perplexity, convert: a text file; eval: the records of a task, or arithmetic")                        \
  CHOICE(INFERENCE, task, 0, "none|hellaswag|arc|mmlu|winogrande|truthfulqa|lambada|wikitext|qa",  \
         "eval: a benchmark, with file=")  \
  INT(INFERENCE, shots, -1, -1, 1000, "eval: examples before a question; -1 = the usual number, 0 without shots_file")              \
  TEXT(INFERENCE, shots_file, "", "eval: records that the examples are taken from, the first ones")                                 \
  INT(INFERENCE, limit, 0, 0, INT_MAX, "eval: only the first records of the file; 0 = all")                                         \
  TEXT(INFERENCE, results, "", "eval: write all scores as JSON to this file")                                                       \
  TEXT(INFERENCE, vs, "", "eval task=qa: a second model that answers the same questions")                                           \
  INT(INFERENCE, second_pass, 0, 0, 1, "eval task=qa: each model sees its answer and second_prompt, and answers again")             \
  TEXT(INFERENCE, second_prompt, "Review and correct the answer:", "eval task=qa: a text, or a file that holds it")                 \
  INT(INFERENCE, overlap, 0, 0, 1 << 24, "perplexity: tokens of a window that are only context")                                    \
  TEXT(INFERENCE, ids, "", "token ids, separated by blanks or commas")                                                              \
  REAL(INFERENCE, lambda, 1, 0, 1, "1 = the ternary model, 0 = its float master weights")                                           \
                                                                                                                                    \
  TEXT(CONVERT, out, "", "where the converted model goes: a directory; for format=gguf also a file")                                \
  CHOICE(CONVERT, format, 0, "hf|packed|gguf|trits|compress", "hf: float master weights; the others: ternary codes")                \
  CHOICE(CONVERT, type, 0, "auto|f32|bf16|f16|q8_0|tq1_0|tq2_0|i2_s", "type of the matrices in a GGUF file, of the floats elsewhere") \
  CHOICE(CONVERT, embed_type, 0, "f16|f32|bf16|q8_0", "type of the embedding in a GGUF file")                                       \
  CHOICE(CONVERT, scale, 0, "auto|multiply|divide", "packed: what readers do with weight_scale; auto: divide where there are biases") \
  INT(CONVERT, fold, 0, 0, 1, "keep the norms in front of the matrices, also where transformers has a class without it")            \
  INT(CONVERT, calibrate, 0, 0, 10000, "batches of file= that the gains of inserted sub-norms are measured on; 0 = gain 1")         \
  TEXT(CONVERT, params, "", "make a new model of about this many parameters, such as 750M or 1.5B")                                 \
  INT(CONVERT, any_size, 0, 0, 1, "params: also below 300M and above 200B")                                                         \
  INT(CONVERT, ternary_embed, 0, 0, 1, "params, trits, compress: the embedding is ternary, too (experimental)")                     \
                                                                                                                                    \
  INT(GENERAL, threads, 0, 0, 1024, "CPU threads; 0 = one for each core. Does not change results")                                  \
  TEXT(GENERAL, config, "", "JSON file with values for options; the command line overrules it")                                     \
  INT(GENERAL, help, 0, 0, 1, "print this list")

enum { OPTION_INT, OPTION_REAL, OPTION_TEXT, OPTION_CHOICE };
enum { FROM_DEFAULT, FROM_PRESET, FROM_FILE, FROM_USER };

// The table as rows, for everything that goes over all options.
typedef struct {
  const char *name, *choices, *help;
  int type, group;
  size_t offset;   // of the value in Options
  double lo, hi;
} OptionRow;

// The table as numbers of rows.
#define INT_(group, name, def, lo, hi, help) OPTION_##name,
#define TEXT_(group, name, def, help) OPTION_##name,
#define CHOICE_(group, name, def, names, help) OPTION_##name,
enum { OPTION_TABLE(INT_, INT_, TEXT_, CHOICE_) OPTION_COUNT };
#undef INT_
#undef TEXT_
#undef CHOICE_

// The table as fields: o->steps, o->lr, o->data, ...
#define INT_(group, name, def, lo, hi, help) int name;
#define REAL_(group, name, def, lo, hi, help) double name;
#define TEXT_(group, name, def, help) char *name;
#define CHOICE_(group, name, def, names, help) int name;
typedef struct {
  OPTION_TABLE(INT_, REAL_, TEXT_, CHOICE_)
  unsigned char from[OPTION_COUNT];   // FROM_*
  const char *mode, *preset;          // names; preset is "" where none was given
  char *dir;                          // the bare argument of modes that take a directory; "" if absent
} Options;
#undef INT_
#undef REAL_
#undef TEXT_
#undef CHOICE_

#define INT_(group, name, def, lo, hi, help) \
  {#name, NULL, help, OPTION_INT, GROUP_##group, offsetof(Options, name), (double)(lo), (double)(hi)},
#define REAL_(group, name, def, lo, hi, help) {#name, NULL, help, OPTION_REAL, GROUP_##group, offsetof(Options, name), lo, hi},
#define TEXT_(group, name, def, help) {#name, NULL, help, OPTION_TEXT, GROUP_##group, offsetof(Options, name), 0, 0},
#define CHOICE_(group, name, def, names, help) {#name, names, help, OPTION_CHOICE, GROUP_##group, offsetof(Options, name), 0, 0},
static const OptionRow option_rows[] = {OPTION_TABLE(INT_, REAL_, TEXT_, CHOICE_)};
#undef INT_
#undef REAL_
#undef TEXT_
#undef CHOICE_

// What a mode tells the parser about itself; modes/modes.h has the list.
typedef struct {
  const char *name, *args, *help;   // args: what follows the name on the command line, for --help
  int groups;                       // GROUP_* that it reads
  int presets, dir;                 // which list of presets it takes, whether it takes a directory (2: one that may be left out)
  void (*run)(Options *o);
} Mode;

// Names that users of earlier implementations know.
static const char *const option_aliases[][2] = {
    {"num_steps", "steps"}, {"iters", "steps"}, {"max_steps", "steps"}, {"bsz", "batch_size"}, {"max_length", "seq_len"},
    {"max_len", "seq_len"}, {"learning_rate", "lr"}, {"grad_accum_steps", "grad_accum"}, {"grad_checkpoint", "recompute"},
    {"rmsnorm_post_attn", "attn_sub_norm"}, {"base_model", "init"}, {"model_path", "init"}, {"dataset", "data"},
    {"output_dir", "run_dir"}, {"out_dir", "run_dir"}, {"run_id", "name"},
    {"save_interval", "save_every"}, {"steps_per_eval", "eval_every"}, {"steps_per_report", "log_every"}, {"max_new_tokens", "n"},
    {"log_interval", "log_every"}, {"template", "qa_template"}, {"reward_models", "reward_model"}, {"loss_reduction", "loss_type"}, {"num_layers", "layers"}, {"hidden_size", "dim"}, {"intermediate_size", "ffn_dim"}, {"vocab_size", "vocab"}};

// The same where a name means something else in one mode.
static const char *const option_mode_aliases[][3] = {{"grpo", "max_length", "max_new"}, {"grpo", "max_completion_length", "max_new"}};

/*
Presets. The recipes arithmetic and finetune were chosen by measurement (dev/LOG.md). The sizes from 125m up follow the published shapes; learning
rates and warm-up of 125m .. 7b are the usual ones for such models, the batch in tokens is reached with grad_accum.
*/
typedef struct {
  const char *name, *about, *settings;
} Preset;

static const Preset presets[] = {
    {"arithmetic", "two-digit sums and differences; learns to calculate in a minute or two",
     "dim=128 layers=3 heads=4 ffn_dim=384 steps=1200 batch_size=256 lr=4e-3 warmup_steps=60 lambda_warmup_frac=0.2 min_lr=0 "
     "init_std=0.1 save_every=400"},
    {"simple", "100 steps of arithmetic with a small batch: does everything work here?",
     "dim=128 layers=3 heads=4 ffn_dim=384 steps=100 batch_size=64 lr=4e-3 warmup_steps=10 lambda_warmup_frac=0.2 min_lr=0 init_std=0.1"},
    {"finetune", "makes a pretrained model ternary: init=MODEL data=; the default with init=. lr: see modes/pretrain.h",
     "steps=1000 batch_size=16 warmup_steps=50 weight_decay=0 lambda_schedule=exponential save_every=500 eval_every=100"},
    {"tinystories", "12M parameters for TinyStories or a text of your own; give data=",
     "dim=384 layers=6 heads=8 kv_heads=4 ffn_dim=1152 seq_len=256 steps=5000 batch_size=16 grad_accum=2 lr=1.5e-3 "
     "lr_schedule=two_stage warmup_steps=250 "
     "lambda_schedule=none save_every=1000 eval_every=250 sample_every=500 data="},
    {"baseline", "95M parameters for web text (FineWeb-Edu form); give data=",
     "dim=768 layers=8 heads=12 kv_heads=6 ffn_dim=3072 seq_len=256 steps=400000 batch_size=16 grad_accum=2 lr=1.5e-3 "
     "lr_schedule=two_stage warmup_steps=1000 "
     "lambda_schedule=none save_every=10000 eval_every=1000 sample_every=5000 data="},
    {"125m", "GPT-2 small size",
     "dim=768 layers=12 heads=12 ffn_dim=2048 seq_len=1024 steps=20000 batch_size=8 grad_accum=64 lr=3e-4 warmup_steps=1000 "
     "rope_theta=500000 data="},
    {"350m", "GPT-2 medium size",
     "dim=1024 layers=24 heads=16 ffn_dim=2816 seq_len=1024 steps=20000 batch_size=8 grad_accum=128 lr=2e-4 warmup_steps=1500 "
     "rope_theta=500000 data="},
    {"1.3b", "BitNet b1.58 1.3B with the authors' recipe",
     "dim=2048 layers=24 heads=32 ffn_dim=5460 seq_len=2048 steps=100000 batch_size=4 grad_accum=122 lr=1.2e-3 lr_schedule=faq "
     "stage2_lr=8e-4 warmup_steps=375 "
     "lambda_schedule=none rope_theta=500000 data="},
    {"3b", "BitNet b1.58 3B with the authors' recipe",
     "dim=3200 layers=26 heads=32 ffn_dim=8640 seq_len=2048 steps=100000 batch_size=2 grad_accum=244 lr=1.2e-3 lr_schedule=faq "
     "stage2_lr=8e-4 warmup_steps=375 "
     "lambda_schedule=none rope_theta=500000 data="},
    {"7b", "LLaMA 7B shape",
     "dim=4096 layers=32 heads=32 ffn_dim=11008 seq_len=2048 steps=100000 batch_size=1 grad_accum=1953 lr=1e-4 warmup_steps=2000 "
     "rope_theta=500000 data="}};

// Presets of the mode grpo, which starts from a model: no shapes.
static const Preset grpo_presets[] = {
    {"questions", "questions with answers from a file: data=FILE.jsonl",
     "data= steps=100 batch_size=1 lr=1e-5 warmup_steps=0 lr_schedule=constant lambda_schedule=none"},
    {"corrections", "sums and differences: a model that has seen drafts (arith_drafts) learns to correct its answers",
     "data=arithmetic steps=60 batch_size=128 group_size=2 augmentation_size=8 two_layer=1 first_weight=0 first_beta=1 beta=0 "
     "second_advantage=group advantage=mean negative_weight=0 lr=7e-4 warmup_steps=10 min_lr=0 weight_decay=0 lambda_schedule=none "
     "qa_template=plain guiding_prompt== second_max_length=5 eval_every=30"},
    {"arithmetic", "sums and differences: a model that was stopped early practises on, by reward alone",
     "data=arithmetic steps=600 batch_size=8 group_size=32 grad_accum=32 beta=0 negative_weight=0 advantage=mean lr=2e-3 "
     "warmup_steps=20 min_lr=0 weight_decay=0 lambda_schedule=none qa_template=plain guiding_prompt== second_max_length=5 "
     "eval_every=100 kl_every=100"}};

// Presets of the mode reward. With init= the shape is the model's.
static const Preset reward_presets[] = {
    {"pairs", "better and worse answers from a file: data=FILE.jsonl; the network starts from init=MODEL, or from random weights",
     "data= dim=512 layers=6 heads=8 ffn_dim=2048 steps=200 batch_size=8 lr=1e-4 warmup_steps=10 min_lr=0 lambda_schedule=none"},
    {"arithmetic", "right and wrong results of sums and differences",
     "dim=128 layers=3 heads=4 ffn_dim=384 steps=600 batch_size=128 lr=2e-3 warmup_steps=20 min_lr=0 init_std=0.1 lambda_schedule=none qa_template=plain"},
    {"linear", "the smallest one, from a file: which words good answers use", "scorer=linear data= steps=100 lr=0.1"}};

// By the number that a mode has in its column "presets"; 0: it takes none.
static const struct {
  const Preset *list;
  size_t n;
} preset_lists[] = {{NULL, 0}, {presets, ARRAY_LEN(presets)}, {grpo_presets, ARRAY_LEN(grpo_presets)}, {reward_presets, ARRAY_LEN(reward_presets)}};


// ---------------------------------------------------------------------------------------------------------
// Values.

static char **option_text_(const Options *o, int row) {
  return (char **)((char *)o + option_rows[row].offset);
}

static void option_set_text_(Options *o, int row, const char *value) {
  char **field = option_text_(o, row);
  char *old = *field;
  *field = xstrdup(value);
  free(old);
}

// Every option at its default. The struct must be zeroed or freed before.
UNUSED static void options_defaults(Options *o) {
  memset(o, 0, sizeof *o);
#define INT_(group, name, def, lo, hi, help) o->name = def;
#define TEXT_(group, name, def, help) o->name = xstrdup(def);
#define CHOICE_(group, name, def, names, help) o->name = def;
  OPTION_TABLE(INT_, INT_, TEXT_, CHOICE_)
#undef INT_
#undef TEXT_
#undef CHOICE_
  o->mode = o->preset = "";
  o->dir = xstrdup("");
}

UNUSED static void options_free(Options *o) {
  for (int i = 0; i < OPTION_COUNT; i++) {
    if (option_rows[i].type == OPTION_TEXT) free(*option_text_(o, i));
  }
  free(o->dir);
  memset(o, 0, sizeof *o);
}

static const char *option_mode_ = "";   // the mode whose command line is read, for option_mode_aliases

// The row of a name as users may write it (dashes for underscores, an alias), or -1.
UNUSED static int option_find_(const char *name, size_t len) {
  char key[64];
  if (len == 0 || len >= sizeof key) return -1;
  for (size_t i = 0; i < len; i++) key[i] = name[i] == '-' ? '_' : name[i];
  key[len] = 0;
  const char *real = key;
  for (size_t i = 0; i < ARRAY_LEN(option_aliases); i++) {
    if (strcmp(option_aliases[i][0], key) == 0) real = option_aliases[i][1];
  }
  for (size_t i = 0; i < ARRAY_LEN(option_mode_aliases); i++) {
    if (strcmp(option_mode_aliases[i][0], option_mode_) == 0 && strcmp(option_mode_aliases[i][1], key) == 0)
      real = option_mode_aliases[i][2];
  }
  for (int i = 0; i < OPTION_COUNT; i++) {
    if (strcmp(option_rows[i].name, real) == 0) return i;
  }
  return -1;
}

// Exit 2 for a name that is not in the table, with the nearest one that is.
__attribute__((noreturn)) static void option_unknown_(const char *name, const char *where) {
  const char *names[OPTION_COUNT + ARRAY_LEN(option_aliases)];
  size_t n = 0;
  for (int i = 0; i < OPTION_COUNT; i++) names[n++] = option_rows[i].name;
  for (size_t i = 0; i < ARRAY_LEN(option_aliases); i++) names[n++] = option_aliases[i][0];
  const char *near = nearest_name(name, names, n);
  if (near) die(EXIT_USAGE, "%s: unknown option '%s'; did you mean '%s'? --help lists all", where, name, near);
  die(EXIT_USAGE, "%s: unknown option '%s'; --help lists all", where, name);
}

// Index of word in "a|b|c", or -1.
static int choice_index_(const char *choices, const char *word) {
  size_t len = strlen(word);
  for (int i = 0;; i++) {
    const char *end = strchr(choices, '|');
    size_t n = end ? (size_t)(end - choices) : strlen(choices);
    if (n == len && memcmp(choices, word, n) == 0) return i;
    if (end == NULL) return -1;
    choices = end + 1;
  }
}

// The name of choice i of row, into a static buffer.
UNUSED static const char *option_choice_name(const char *option, int i) {
  static char name[32];
  const char *c = option_rows[option_find_(option, strlen(option))].choices;
  for (; i > 0; i--) c = strchr(c, '|') + 1;
  snprintf(name, sizeof name, "%.*s", (int)strcspn(c, "|"), c);
  return name;
}

// Parses value into a row's field; exit 2 with the option's name, what was found and what is expected.
static void option_assign_(Options *o, int row, const char *value, int from, const char *where) {
  const OptionRow *r = &option_rows[row];
  char *field = (char *)o + r->offset, *end;
  o->from[row] = (unsigned char)from;
  errno = 0;
  if (r->type == OPTION_TEXT) {
    option_set_text_(o, row, value);
  } else if (r->type == OPTION_CHOICE) {
    int i = choice_index_(r->choices, value);
    if (i < 0) die(EXIT_USAGE, "%s: %s: expected one of %s, found '%s'", where, r->name, r->choices, value);
    memcpy(field, &i, sizeof i);
  } else if (r->type == OPTION_INT) {
    int is_switch = r->lo == 0 && r->hi == 1;
    long long v = strtoll(value, &end, 10);
    if (is_switch && (strcmp(value, "true") == 0 || strcmp(value, "on") == 0)) v = 1;
    else if (is_switch && (strcmp(value, "false") == 0 || strcmp(value, "off") == 0)) v = 0;
    else if (end == value || *end != 0 || errno == ERANGE)
      die(EXIT_USAGE, "%s: %s: expected an integer, found '%s'", where, r->name, value);
    if ((double)v < r->lo || (double)v > r->hi)
      die(EXIT_USAGE, "%s: %s: expected %.0f to %.0f, found %s", where, r->name, r->lo, r->hi, value);
    int i = (int)v;
    memcpy(field, &i, sizeof i);
  } else {
    double v = strtod(value, &end);
    if (end == value || *end != 0) die(EXIT_USAGE, "%s: %s: expected a number, found '%s'", where, r->name, value);
    if (!(v >= r->lo && v <= r->hi)) die(EXIT_USAGE, "%s: %s: expected %g to %g, found %s", where, r->name, r->lo, r->hi, value);
    memcpy(field, &v, sizeof v);
  }
}

// For modes and tests: sets one option by name.
UNUSED static void options_set(Options *o, const char *name, const char *value, int from) {
  int row = option_find_(name, strlen(name));
  if (row < 0) option_unknown_(name, "options_set");
  option_assign_(o, row, value, from, "options_set");
}

// Where the value of an option came from: FROM_*; 0 = nobody has set it.
UNUSED static int options_is_set(const Options *o, const char *name) {
  int row = option_find_(name, strlen(name));
  return row < 0 ? 0 : o->from[row];
}

// ---------------------------------------------------------------------------------------------------------
// JSON: one object with a member for each option of the groups asked for.

static void option_put_value_(StrBuf *b, const Options *o, int row) {
  const OptionRow *r = &option_rows[row];
  const char *field = (const char *)o + r->offset;
  int i;
  double d;
  if (r->type == OPTION_TEXT) {
    const char *s = *option_text_(o, row);
    json_put_string(b, s, strlen(s));
  } else if (r->type == OPTION_REAL) {
    memcpy(&d, field, sizeof d);
    json_put_number(b, d);
  } else {
    memcpy(&i, field, sizeof i);
    if (r->type == OPTION_INT) strbuf_printf(b, "%d", i);
    else strbuf_printf(b, "\"%s\"", option_choice_name(r->name, i));
  }
}

// Appends {"mode": ..., "preset": ..., "dim": ..., ...} with a line for each option of these groups.
UNUSED static void options_put_json(StrBuf *b, const Options *o, int groups) {
  strbuf_printf(b, "{\n  \"mode\": \"%s\",\n  \"preset\": \"%s\"", o->mode, o->preset);
  for (int i = 0; i < OPTION_COUNT; i++) {
    if (!(option_rows[i].group & groups)) continue;
    strbuf_printf(b, ",\n  \"%s\": ", option_rows[i].name);
    option_put_value_(b, o, i);
  }
  strbuf_printf(b, "\n}\n");
}

/*
Takes values from a JSON object of options; where names it in messages ("run.json"). Members "mode" and "preset" are skipped. Options
that the user has set on the command line stay. Unknown names exit 2.
*/
UNUSED static void options_from_json(Options *o, const Json *object, int from, const char *where) {
  if (object == NULL || object->type != JSON_OBJECT) die(EXIT_USAGE, "%s: expected a JSON object of options", where);
  for (const Json *m = object->child; m; m = m->next) {
    char number[64];
    const char *value = number;
    if (strcmp(m->key, "mode") == 0 || strcmp(m->key, "preset") == 0) continue;
    int row = option_find_(m->key, m->key_len);
    if (row < 0) option_unknown_(m->key, where);
    if (o->from[row] > from) continue;
    if (m->type == JSON_STRING) value = m->s;
    else if (m->type == JSON_INT || m->type == JSON_BOOL) snprintf(number, sizeof number, "%lld", (long long)m->i);
    else if (m->type == JSON_REAL) snprintf(number, sizeof number, "%.17g", m->d);
    else die(EXIT_USAGE, "%s: offset %zu: %s: expected a number, true, false or a string", where, m->offset, m->key);
    option_assign_(o, row, value, from, where);
  }
}

// A number for everything that changes the trained bits: equal options, equal number, whatever order or form they were given in.
UNUSED static uint64_t options_fingerprint(const Options *o) {
  StrBuf b = {NULL, 0, 0};
  for (int i = 0; i < OPTION_COUNT; i++) {
    if (!(option_rows[i].group & RESULT_GROUPS)) continue;
    strbuf_printf(&b, "%s=", option_rows[i].name);
    option_put_value_(&b, o, i);
    strbuf_append(&b, "\n", 1);
  }
  uint64_t h = hash_bytes(b.data, b.len);
  strbuf_free(&b);
  return h;
}

// The first option of these groups in which a and b differ, or NULL.
UNUSED static const char *options_first_difference(const Options *a, const Options *b, int groups) {
  StrBuf x = {NULL, 0, 0}, y = {NULL, 0, 0};
  const char *name = NULL;
  for (int i = 0; i < OPTION_COUNT && name == NULL; i++) {
    if (!(option_rows[i].group & groups)) continue;
    x.len = y.len = 0;
    option_put_value_(&x, a, i);
    option_put_value_(&y, b, i);
    if (strcmp(x.data, y.data) != 0) name = option_rows[i].name;
  }
  strbuf_free(&x);
  strbuf_free(&y);
  return name;
}

// ---------------------------------------------------------------------------------------------------------
// The command line.

// The preset of this name in one list, or NULL.
static const Preset *preset_in_(int list, const char *name) {
  for (size_t i = 0; i < preset_lists[list].n; i++) {
    if (strcmp(preset_lists[list].list[i].name, name) == 0) return &preset_lists[list].list[i];
  }
  return NULL;
}

// The same in all lists.
UNUSED static const Preset *preset_find_(const char *name) {
  const Preset *p = NULL;
  for (size_t k = 0; k < ARRAY_LEN(preset_lists) && p == NULL; k++) p = preset_in_((int)k, name);
  return p;
}

// Applies "key=value key=value ..." of a preset; what a stronger source has set stays.
static void preset_apply_(Options *o, const Preset *p) {
  char *copy = xstrdup(p->settings), *save = NULL;
  o->preset = p->name;
  for (char *word = strtok_r(copy, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
    char *eq = strchr(word, '=');
    int row = option_find_(word, (size_t)(eq - word));
    if (row < 0) die(EXIT_FAILED, "bug: preset %s: %s", p->name, word);
    if (o->from[row] < FROM_PRESET) option_assign_(o, row, eq + 1, FROM_PRESET, p->name);
  }
  free(copy);
}

// Prints the table (all of it, or the groups of one mode) to stdout.
UNUSED static void options_help(const Mode *modes, size_t n_modes, const Mode *mode) {
  static const char *const titles[] = {"Model", "Training", "Data", "Seed and precision", "Running", "Inference", "General", "This call", "Convert",
                                       "Reinforcement", "Questions", "Reward model"};
  Options o;
  options_defaults(&o);
  printf("usage: ./train_bitnet [MODE] [PRESET | DIR] [key=value | --key=value | --key value]...\n\n");
  if (mode) printf("%s %s\n  %s\n", mode->name, mode->args, mode->help);
  else {
    printf("Modes (without one: pretrain arithmetic)\n");
    for (size_t i = 0; i < n_modes; i++) printf("  %-10s %-36s %s\n", modes[i].name, modes[i].args, modes[i].help);
  }
  for (size_t k = 1; k < ARRAY_LEN(preset_lists); k++) {
    if (mode && mode->presets != (int)k) continue;
    printf("\nPresets%s\n", k == 1 ? "" : k == 2 ? " of the mode grpo" : " of the mode reward");
    for (size_t i = 0; i < preset_lists[k].n; i++) printf("  %-12s %s\n", preset_lists[k].list[i].name, preset_lists[k].list[i].about);
  }
  for (int g = 0; g < (int)ARRAY_LEN(titles); g++) {
    if (mode && !((mode->groups | GROUP_GENERAL) & (1 << g))) continue;
    printf("\n%s options\n", titles[g]);
    for (int i = 0; i < OPTION_COUNT; i++) {
      const OptionRow *r = &option_rows[i];
      if (r->group != 1 << g) continue;
      StrBuf value = {NULL, 0, 0};
      option_put_value_(&value, &o, i);
      char left[96];
      snprintf(left, sizeof left, "%s=%s", r->name, value.data);
      printf("  %-28s %s%s%s%s\n", left, r->help, r->choices ? " (" : "", r->choices ? r->choices : "", r->choices ? ")" : "");
      strbuf_free(&value);
    }
  }
  printf("\nExit codes: 0 done or stopped and saved, 1 failed, 2 wrong input, 3 damaged file\n");
  options_free(&o);
}

/*
Reads the command line into o and returns the mode. Bare words are, in this order: a mode (first word only), a preset, a directory. The
default mode is modes[0]; a mode with presets and none named takes its first (pretrain with init=: finetune), unless resume= or config=
was given. Errors exit 2, --help prints and exits 0.
*/
UNUSED static const Mode *options_parse(Options *o, int argc, char **argv, const Mode *modes, size_t n_modes) {
  const Mode *mode = &modes[0];
  const Preset *preset = NULL;
  option_mode_ = mode->name;
  options_defaults(o);
  for (int i = 1; i < argc; i++) {
    const char *arg = argv[i], *key = arg, *eq = strchr(arg, '=');
    if (key[0] == '-' && key[1] == '-') key += 2;
    if (key == arg && eq == NULL) {   // a bare word
      const Mode *named = NULL;
      for (size_t k = 0; k < n_modes && i == 1; k++) {
        if (strcmp(modes[k].name, arg) == 0) named = &modes[k];
      }
      if (named) {
        mode = named;
        option_mode_ = mode->name;
      } else if (strcmp(arg, "-h") == 0) {
        o->help = 1;
      } else if (mode->presets && preset == NULL && preset_in_(mode->presets, arg)) {
        preset = preset_in_(mode->presets, arg);
      } else if (mode->dir && o->dir[0] == 0) {
        free(o->dir);
        o->dir = xstrdup(arg);
      } else {
        const char *names[ARRAY_LEN(presets) + ARRAY_LEN(grpo_presets) + ARRAY_LEN(reward_presets) + 64];
        size_t n = 0;
        for (size_t k = 0; k < n_modes && k < 64 && i == 1; k++) names[n++] = modes[k].name;
        for (size_t k = 0; k < preset_lists[mode->presets].n; k++) names[n++] = preset_lists[mode->presets].list[k].name;
        const char *near = nearest_name(arg, names, n);
        die(EXIT_USAGE, "command line: unexpected word '%s'%s%s%s; options are written key=value, --help lists them", arg,
            near ? "; did you mean '" : "", near ? near : "", near ? "'" : "");
      }
      continue;
    }
    size_t len = eq ? (size_t)(eq - key) : strlen(key);
    int row = option_find_(key, len);
    if (row < 0) {
      char name[64];
      snprintf(name, sizeof name, "%.*s", (int)(len < 60 ? len : 60), key);
      option_unknown_(name, "command line");
    }
    const OptionRow *r = &option_rows[row];
    const char *value = eq ? eq + 1 : NULL;
    if (value == NULL) {   // --key value; a switch may stand alone
      int is_switch = r->type == OPTION_INT && r->lo == 0 && r->hi == 1;
      int next_is_value = i + 1 < argc && strchr(argv[i + 1], '=') == NULL && strncmp(argv[i + 1], "--", 2) != 0;
      if (is_switch && !(next_is_value && (strcmp(argv[i + 1], "0") == 0 || strcmp(argv[i + 1], "1") == 0))) value = "1";
      else if (i + 1 < argc) value = argv[++i];
      else die(EXIT_USAGE, "command line: --%s needs a value", r->name);
    }
    option_assign_(o, row, value, FROM_USER, "command line");
  }
  o->mode = mode->name;
  if (o->help) {
    options_help(modes, n_modes, argc > 1 && strcmp(argv[1], mode->name) == 0 ? mode : NULL);
    exit(0);
  }
  for (int i = 0; i < OPTION_COUNT; i++) {
    if (o->from[i] == FROM_USER && !(option_rows[i].group & (mode->groups | GROUP_GENERAL)))
      die(EXIT_USAGE, "command line: mode %s does not use the option %s; --help lists what it uses", mode->name, option_rows[i].name);
  }
  if (o->config[0]) {
    size_t len;
    char err[256], *text = read_file(o->config, &len);
    JsonDoc doc;
    if (text == NULL) die(EXIT_USAGE, "config: cannot read %s: %s", o->config, strerror(errno));
    if (!json_parse(&doc, text, len, err, sizeof err)) die(EXIT_USAGE, "%s: %s", o->config, err);
    options_from_json(o, doc.root, FROM_FILE, o->config);
    const char *named = json_get_string(doc.root, "preset", "");
    if (preset == NULL && mode->presets && named[0]) {
      preset = preset_in_(mode->presets, named);
      if (preset == NULL) die(EXIT_USAGE, "%s: preset: unknown name '%s'; --help lists them", o->config, named);
    }
    json_free(&doc);
    free(text);
  }
  if (preset == NULL && mode->presets && o->resume[0] == 0 && o->config[0] == 0) {
    if (o->init[0]) preset = preset_in_(mode->presets, "finetune");
    if (preset == NULL) preset = preset_lists[mode->presets].list;
  }
  if (preset) preset_apply_(o, preset);
  return mode;
}

#endif
