/*
modes.h: the table of modes, and the first lines of main.

What it is:  one row for each thing that the program can do. A new mode is a header in this directory and a row here.
Read before: bitnet/options.h.
Defines:     run_mode.
*/
#ifndef MODES_H
#define MODES_H

#include "bench.h"
#include "chat.h"
#include "convert.h"
#include "eval.h"
#include "generate.h"
#include "grpo.h"
#include "logits.h"
#include "perplexity.h"
#include "pretrain.h"
#include "reward.h"
#include "tokenize.h"

// The first is the default. Columns: name, arguments, what it does, groups of options, list of presets, takes a directory
// (2: may be left out), function.
static const Mode modes[] = {
    {"pretrain", "[PRESET] [key=value]...", "train a model from random weights, or from init=DIR; go on with resume=RUN",
     GROUP_MODEL | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_COMMAND, 1, 0, mode_pretrain},
    {"chat", "DIR", "talk to a model: type a prompt, read its answer", GROUP_SHARED | GROUP_INFERENCE, 0, 1, mode_chat},
    {"generate", "DIR prompt=TEXT", "continue a text; the text alone goes to stdout", GROUP_SHARED | GROUP_INFERENCE, 0, 1, mode_generate},
    {"eval", "DIR [data=GLOB | task=NAME file=FILE]", "loss and exact match on held-out data; benchmarks; answers to questions",
     GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_INFERENCE | GROUP_QA, 0, 1, mode_eval},
    {"grpo", "[PRESET] init=DIR [data=FILE]", "improve a model by rewards: its own answers, good ones made more likely; go on with resume=RUN",
     GROUP_GRPO | GROUP_QA | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_COMMAND, 2, 0, mode_grpo},
    {"reward", "[PRESET] [data=FILE] [init=DIR]", "train a reward model: which of two answers is better; go on with resume=RUN",
     GROUP_REWARD | GROUP_QA | GROUP_MODEL | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_COMMAND, 3, 0, mode_reward},
    {"logits", "DIR ids=\"1 2 3\"", "one line per position with all logits, for checking against a reference", GROUP_SHARED | GROUP_INFERENCE, 0, 1, mode_logits},
    {"perplexity", "DIR file=TEXT | data=GLOB", "how well a model predicts a text, per token and per byte", GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_INFERENCE, 0, 1, mode_perplexity},
    {"convert", "init=MODEL out=DIR | params=750M out=DIR", "write a model in another form, or make a new one",
     GROUP_MODEL | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_INFERENCE | GROUP_CONVERT, 0, 2, mode_convert},
    {"tokenize", "DIR", "text on stdin, token ids on stdout, line by line; decode=1: the other way", GROUP_INFERENCE, 0, 1, mode_tokenize},
    {"bench", "[peaks|products|train|ops|decode]", "what the machine can do, and how much of it we use", GROUP_SHARED | GROUP_TRAINING, 0, 2, mode_bench}};

// Everything main does. Returns the exit code.
static int run_mode(int argc, char **argv) {
  Options o;
  const Mode *mode = options_parse(&o, argc, argv, modes, ARRAY_LEN(modes));
  if (mode->dir == 1 && o.dir[0] == 0) die(EXIT_USAGE, "%s needs a model directory: ./train_bitnet %s %s", mode->name, mode->name, mode->args);
  dev_init(o.threads);
  if (options_is_set(&o, "precision")) refuse_precision(o.precision);
  mode->run(&o);
  options_free(&o);
  return 0;
}

#endif
