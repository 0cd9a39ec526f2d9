/*
test_options.h: tests of bitnet/options.h: the table, the command line, its errors, JSON.

Read before: check.h, bitnet/options.h.
Defines:     OPTIONS_TESTS, the rows for the table of tests.
*/
#ifndef TEST_OPTIONS_H
#define TEST_OPTIONS_H

#include "../../bitnet/options.h"
#include "check.h"

static void mode_nothing_(Options *o) { (void)o; }

static const Mode test_modes[] = {
    {"pretrain", "", "", GROUP_MODEL | GROUP_TRAINING | GROUP_DATA | GROUP_SHARED | GROUP_RUNNING | GROUP_COMMAND, 1, 0,
     mode_nothing_},
    {"generate", "DIR", "", GROUP_SHARED | GROUP_INFERENCE, 0, 1, mode_nothing_}};

// Parses a command line given as one string with blanks; a word cannot hold a blank.
static const Mode *parse_line_(Options *o, const char *line) {
  static char copy[2048];
  char *argv[32];
  int argc = 0;
  snprintf(copy, sizeof copy, "train_bitnet %s", line);
  for (char *w = strtok(copy, " "); w && argc < 32; w = strtok(NULL, " ")) argv[argc++] = w;
  return options_parse(o, argc, argv, test_modes, ARRAY_LEN(test_modes));
}

static void parse_and_drop_(void *line) {
  Options o;
  parse_line_(&o, (const char *)line);
  options_free(&o);
}

static void test_options_forms(void) {
  static const char *const same[] = {"lr=0.002 steps=7 recompute=1 data=x", "--lr=2e-3 --steps=7 --recompute --data x",
                                     "--lr 0.002 num_steps=7 --grad-checkpoint=true dataset=x",
                                     "learning_rate=2.0e-3 --num-steps 7 recompute=on --data=x"};
  uint64_t fingerprint = 0;
  for (size_t i = 0; i < ARRAY_LEN(same); i++) {
    Options o;
    const Mode *mode = parse_line_(&o, same[i]);
    CHECK(mode == &test_modes[0], "%s: mode", same[i]);
    CHECK(o.lr == 0.002 && o.steps == 7 && o.recompute == 1 && strcmp(o.data, "x") == 0, "%s: values", same[i]);
    CHECK(strcmp(o.preset, "arithmetic") == 0, "%s: the default preset, found '%s'", same[i], o.preset);
    CHECK(options_is_set(&o, "lr") == FROM_USER && options_is_set(&o, "layers") == FROM_PRESET &&
              options_is_set(&o, "beta1") == FROM_DEFAULT,
          "%s: sources", same[i]);
    uint64_t f = options_fingerprint(&o);
    CHECK(i == 0 || f == fingerprint, "%s: the form of a value must not change the fingerprint", same[i]);
    fingerprint = f;
    options_free(&o);
  }
  Options o;
  CHECK(parse_line_(&o, "generate some/dir n=5 --temperature 0.5") == &test_modes[1], "mode by name");
  CHECK(strcmp(o.dir, "some/dir") == 0 && o.n == 5 && o.temperature == 0.5 && o.preset[0] == 0, "generate");
  options_free(&o);
  parse_line_(&o, "resume=runs/x threads=3");
  CHECK(o.preset[0] == 0 && o.threads == 3, "a resumed run takes no default preset");
  options_free(&o);
  parse_line_(&o, "init=some/dir data=x");
  CHECK(strcmp(o.preset, "finetune") == 0 && o.weight_decay == 0 && options_is_set(&o, "lr") == FROM_DEFAULT, "the recipe for a model: %s",
        o.preset);
  options_free(&o);
  parse_line_(&o, "arithmetic init=some/dir");
  CHECK(strcmp(o.preset, "arithmetic") == 0, "a preset that is named counts: %s", o.preset);
  options_free(&o);
}

static void test_options_errors(void) {
  static const struct {
    const char *line, *words;
  } cases[] = {
      {"lamda_k=3", "unknown option 'lamda_k'|did you mean 'lambda_k'"},
      {"--stpes 5", "did you mean 'steps'"},
      {"lr=fast", "lr|expected a number, found 'fast'"},
      {"lr=1e-3x", "lr|expected a number"},
      {"lr=nan", "lr|expected 0 to 10"},
      {"steps=1.5", "steps|expected an integer, found '1.5'"},
      {"steps=99999999999999999999", "steps|expected"},
      {"steps=0", "steps|expected 1 to"},
      {"steps=", "steps|expected an integer"},
      {"lr_schedule=cosinus", "lr_schedule|cosine|two_stage|found 'cosinus'"},
      {"arithmatic", "unexpected word 'arithmatic'|did you mean 'arithmetic'"},
      {"arithmetic simple", "unexpected word 'simple'"},
      {"generat DIR", "did you mean 'generate'"},
      {"generate DIR steps=5", "mode generate does not use the option steps"},
      {"steps", "unexpected word 'steps'"},
      {"--steps", "--steps needs a value"},
      {"config=/nonexistent.json", "cannot read /nonexistent.json"},
  };
  for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
    char err[1024], list[256];
    int code = run_child(parse_and_drop_, (void *)cases[i].line, err, sizeof err);
    CHECK(code == EXIT_USAGE, "%s: exit code %d", cases[i].line, code);
    snprintf(list, sizeof list, "%s", cases[i].words);
    for (char *w = strtok(list, "|"); w; w = strtok(NULL, "|"))
      CHECK(strstr(err, w) != NULL, "%s: expected '%s' in: %s", cases[i].line, w, err);
  }
}

static void test_options_json(void) {
  char path[600], line[700], err[256];
  Options a, b;
  StrBuf json = {NULL, 0, 0};
  JsonDoc doc;
  parse_line_(&a, "simple lr=0.1 data=\"x\\ steps=5 lambda_schedule=cosine threads=2");
  options_put_json(&json, &a, STORED_GROUPS);
  CHECK(json_parse(&doc, json.data, json.len, err, sizeof err), "options as JSON: %s", err);
  options_defaults(&b);
  options_from_json(&b, doc.root, FROM_FILE, "test");
  CHECK(options_first_difference(&a, &b, STORED_GROUPS) == NULL, "round trip: %s differs",
        options_first_difference(&a, &b, STORED_GROUPS));
  CHECK(options_fingerprint(&a) == options_fingerprint(&b), "fingerprint after a round trip");
  CHECK(b.threads == 0, "threads are not stored");
  options_set(&b, "lr", "0.2", FROM_USER);
  CHECK(strcmp(options_first_difference(&a, &b, STORED_GROUPS), "lr") == 0 && options_fingerprint(&a) != options_fingerprint(&b),
        "another lr is seen");
  options_set(&b, "lr", "0.1", FROM_USER);
  options_set(&b, "eval_every", "3", FROM_USER);
  CHECK(options_fingerprint(&a) == options_fingerprint(&b), "how often to evaluate does not change the result");
  options_free(&b);
  json_free(&doc);

  // A file of options: between the preset and the command line.
  snprintf(path, sizeof path, "%s/o.json", test_dir());
  const char *text = "{\"preset\": \"simple\", \"lr\": 0.5, \"steps\": 9, \"recompute\": true, \"lr_schedule\": \"wsd\"}";
  CHECK(safe_write_file(path, text, strlen(text)) == 0, "write %s", path);
  snprintf(line, sizeof line, "steps=3 config=%s", path);
  parse_line_(&b, line);
  CHECK(b.steps == 3 && b.lr == 0.5 && b.recompute == 1 && b.lr_schedule == LR_WSD && b.batch_size == 64,
        "precedence of command line, file and preset");
  options_free(&b);
  text = "{\"lr\": 0.5, \"stesp\": 9}";
  CHECK(safe_write_file(path, text, strlen(text)) == 0, "write %s", path);
  char said[1024];
  CHECK(run_child(parse_and_drop_, line, said, sizeof said) == EXIT_USAGE && strstr(said, "o.json") && strstr(said, "'steps'"),
        "unknown key in a file: %s", said);
  strbuf_free(&json);
  options_free(&a);
}

// Every preset must parse, name real options, and differ from the others.
static void test_options_presets(void) {
  for (size_t i = 0; i < ARRAY_LEN(presets); i++) {
    Options o;
    parse_line_(&o, presets[i].name);
    CHECK(strcmp(o.preset, presets[i].name) == 0, "%s", presets[i].name);
    CHECK(o.heads > 0 && (o.head_dim || o.dim % o.heads == 0) && o.heads % (o.kv_heads ? o.kv_heads : o.heads) == 0, "%s: shape",
          presets[i].name);
    CHECK(o.activation != 0 || o.tie_embeddings, "%s: relu2 presets keep the head tied", presets[i].name);
    options_free(&o);
  }
}

#define OPTIONS_TESTS                                                                                  \
  {"options_forms", "all spellings of a command line, aliases, sources of values", test_options_forms}, \
  {"options_errors", "wrong input exits 2 and says what is right", test_options_errors},                \
  {"options_json", "options as JSON round trip, config files, fingerprint", test_options_json},         \
  {"options_presets", "every preset parses and has a sound shape", test_options_presets}

#endif
