#!/usr/bin/env python3
"""Second opinions on evaluation: EleutherAI's lm-evaluation-harness on the same items and models, NLTK on word stems.

    python dev/test/test_eval.py            # needs gcc, ./train_bitnet, torch, transformers, tokenizers, lm-eval, nltk
    BITNET_DATA=DIR python dev/test/test_eval.py --items 200      # also the records in DIR/qa/*.jsonl, the pages of DIR/text
    python dev/test/test_eval.py --model MODEL_DIR --lambda 0     # a model directory of your own, on DIR alone where that is given

The models are made here: a random LLaMA, run as it is at lambda = 0, and a ternary one that trains for seconds, run at lambda = 1. The
harness's own task definitions are used, with local files in the place of its downloads.
"""
import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from checks import check, finish

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_EVALUATE_OFFLINE="1",
                  TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", LMEVAL_LOG_LEVEL="ERROR")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("BITNET_BINARY", os.path.join(ROOT, "train_bitnet"))
SAME_PREDICTIONS = 0.99   # at least this share of the items
# Relative difference of a log-probability. Float: sums in another order. Ternary: an activation beside a rounding boundary may become
# another integer, which moves a logit by far more than a rounding error does.
LOGP_BOUND = {"float": 5e-6, "ternary": 1e-3, "given": 1e-3}


def run(*args):
    p = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if p.returncode:
        check(False, f"{args}: exit {p.returncode}\n{p.stderr[-1000:]}")
    return p.stdout


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def write_records(path, rows):
    return write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


# ---- stems and token F1 ------------------------------------------------------------------------------------

SCORER = r"""
#include "bitnet/rewards.h"
// Each line of stdin: "word", printed as its stem, or "text TAB text", printed as their token F1.
int main(void) {
  char line[1 << 16];
  while (fgets(line, sizeof line, stdin)) {
    size_t n = strcspn(line, "\n");
    line[n] = 0;
    char *tab = strchr(line, '\t');
    if (tab) *tab = 0, printf("%.17g\n", reward_f1(line, tab + 1));
    else printf("%.*s\n", (int)stem_word(line, n), line);
  }
  return 0;
}
"""
ENDINGS = ("s es ies ied ed eed ing ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti iviti "
           "biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize e ll y ally").split()


def test_stems(tmp, text):
    from nltk.stem.porter import PorterStemmer
    stemmer, rng = PorterStemmer(), random.Random(1)
    roots = sorted(set(re.findall(r"[a-z0-9]+", text.lower())))
    words = set(roots)
    for _ in range(20000):
        words.add(rng.choice(roots)[:rng.randint(1, 8)] + rng.choice(ENDINGS) + (rng.choice(ENDINGS) if rng.random() < 0.3 else ""))
        words.add("".join(rng.choice("aeiouybcdlstz") for _ in range(rng.randint(1, 9))))
    words = sorted(words)
    write(f"{tmp}/scorer.c", SCORER)
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-I", ROOT, f"{tmp}/scorer.c", "-o", f"{tmp}/scorer", "-lm"], check=True)
    ask = lambda lines: subprocess.run([f"{tmp}/scorer"], input="\n".join(lines) + "\n", stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")[:-1]
    ours, theirs = ask(words), [stemmer.stem(w) for w in words]
    bad = [(w, a, b) for w, a, b in zip(words, ours, theirs) if a != b]
    check(len(ours) == len(words) and not bad, f"{len(bad)} of {len(words)} stems differ from NLTK's: {bad[:5]}")

    def stems(s):
        return {stemmer.stem(w) for w in re.sub(r"[^a-z0-9\s]", " ", s.lower()).split()}

    def f1(a, b):
        p, r = stems(a), stems(b)
        common = len(p & r)
        if not p or not r:
            return float(not p and not r)
        return 2 * (common / len(p)) * (common / len(r)) / (common / len(p) + common / len(r)) if common else 0.0
    lines = [x.replace("\t", " ") for x in text.split("\n")[:600]]
    pairs = [(a, b) for a in lines[:300] for b in (rng.choice(lines), a[:len(a) // 2])]
    got = [float(x) for x in ask([f"{a}\t{b}" for a, b in pairs])]
    worst = max(abs(g - f1(a, b)) for g, (a, b) in zip(got, pairs))
    check(len(got) == len(pairs) and worst < 1e-14, f"token F1 differs by {worst}")
    print(f"  {len(words)} stems and {len(pairs)} token F1 compared with NLTK")


# ---- items -------------------------------------------------------------------------------------------------

def made_items(text, n):
    """Records of every task in the form of the original data sets, from the words of a text."""
    rng = random.Random(2)
    words = [w for w in re.findall(r"[A-Za-z']+|[.,;:]", text) if len(w) < 12]

    def say(lo, hi):
        at = rng.randrange(len(words) - hi)
        return " ".join(words[at:at + rng.randint(lo, hi)])
    items = {t: [] for t in ("hellaswag", "arc", "mmlu", "winogrande", "truthfulqa", "lambada", "wikitext")}
    for i in range(n):
        mark = rng.choice(["", " [title]", " [step] x  y", " [substeps]", " [open", " [over\nlines] [x]"])
        items["hellaswag"].append({"activity_label": say(1, 3), "ctx_a": say(5, 20) + mark, "ctx_b": say(1, 3), "label": str(rng.randrange(4)),
                                   "endings": [say(3, 15) + rng.choice(["", mark + " " + say(1, 3)]) for _ in range(4)]})
        k = rng.randint(3, 5)
        items["arc"].append({"question": say(6, 25) + "?", "choices": {"text": [say(1, 8) for _ in range(k)], "label": list("ABCDE"[:k] if i % 2 else "12345"[:k])},
                             "answerKey": ("ABCDE" if i % 2 else "12345")[rng.randrange(k)]})
        items["mmlu"].append({"subject": "dark_arts", "question": " " + say(6, 25) + rng.choice(["?", "\n", ""]), "choices": [say(1, 5) for _ in range(4)], "answer": rng.randrange(4)})
        a, b = say(1, 2), say(1, 2)
        items["winogrande"].append({"sentence": f"{say(5, 12)} _ {say(3, 9)}.", "option1": a, "option2": b, "answer": str(rng.randint(1, 2))})
        texts = list(dict.fromkeys(say(2, 9) for _ in range(6)))
        items["truthfulqa"].append({"question": say(4, 9) + "?", "mc1_targets": {"choices": texts[:4], "labels": [1, 0, 0, 0]},
                                    "mc2_targets": {"choices": texts, "labels": [1, 1] + [0] * (len(texts) - 2)}})
        items["lambada"].append({"text": say(10, 60)})
    for i in range(max(4, n // 10)):
        items["wikitext"].append({"page": f" = {say(1, 3)} = \n \n {say(100, 600)} ( {say(2, 4)} ) 3 @.@ 5 , 1 @,@ 000 ; \" {say(2, 4)} \" the cat 's N \u00b0 C\u00a0x [ a ] \n = = {say(1, 2)} = = \n"})
    return items


def shared_start(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def read_items(folder, n):
    """Records of local files: what our program reads, and the same in the form of the original data sets."""
    def rows(name):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return [json.loads(line) for line in f]
    out = {"hellaswag": rows("hellaswag_val_a.jsonl")[:n], "mmlu": rows("mmlu_test_a.jsonl")[:n], "lambada": rows("lambada_openai_a.jsonl")[:n]}
    files = {k: list(v) for k, v in out.items()}
    out["lambada"] = [{"text": f"{r['context']} {r['continuation']}"} for r in out["lambada"]]
    files["arc"] = rows("arc_challenge_test_a.jsonl")[:n]
    out["arc"] = [{"question": r["query"].removeprefix("Question: "), "choices": {"text": r["choices"], "label": list("ABCDEFG"[:len(r["choices"])])},
                   "answerKey": "ABCDEFG"[r["gold"]]} for r in files["arc"]]
    files["winogrande"], out["winogrande"] = rows("winogrande_val_a.jsonl")[:n], []
    for r in files["winogrande"]:
        a, b = r["context_options"]
        k = shared_start(a, b)
        out["winogrande"].append({"sentence": f"{a[:k]}_ {r['continuation']}", "option1": a[k:], "option2": b[k:], "answer": str(r["gold"] + 1)})
    files["truthfulqa"] = rows("truthfulqa_mc_a.jsonl")[:n]
    both = lambda t: {"choices": list(t), "labels": list(t.values())}
    out["truthfulqa"] = [{"question": r["question"], "mc1_targets": both(r["mc1_targets"]), "mc2_targets": both(r["mc2_targets"])} for r in files["truthfulqa"]]
    with open(os.path.join(folder, "..", "text", "wikitext2_valid.tokens.txt"), encoding="utf-8") as f:
        pages = re.split(r"(?m)^(?= = [^=\n].*[^=] = $)", f.read())
    out["wikitext"] = files["wikitext"] = [{"page": page} for page in pages if page.strip()][:n]
    return out, files, rows("mmlu_dev.jsonl")


# ---- the harness -------------------------------------------------------------------------------------------

def harness_tasks(tmp, name, rows, dev):
    """lm-eval's own definition of a task, with a local file for its data. For mmlu one task for each subject."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    base = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
    files = {"hellaswag": ["hellaswag/hellaswag.yaml"], "arc": ["arc/arc_challenge.yaml"], "winogrande": ["winogrande/default.yaml"],
             "truthfulqa": ["truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/truthfulqa_mc2.yaml"], "lambada": ["lambada/lambada_openai.yaml"],
             "wikitext": ["wikitext/wikitext.yaml"], "mmlu": ["mmlu/default/mmlu_abstract_algebra.yaml"]}[name]
    groups = list(dict.fromkeys(r["subject"] for r in rows)) if name == "mmlu" else [None]
    out = []
    for group in groups:
        path = write_records(f"{tmp}/harness_{name}_{group}.jsonl", [r for r in rows if group is None or r["subject"] == group])
        for file in files:
            cfg = load_yaml(os.path.join(base, file))
            split = cfg.get("test_split") or cfg["validation_split"]
            data = {split: path}
            cfg.update(dataset_path="json", dataset_name=None, training_split=None, test_split=None, validation_split=None)
            cfg["test_split" if split == "test" else "validation_split"] = split
            if group is not None:
                cfg.update(task=f"mmlu_{group}", description=f"The following are multiple choice questions (with answers) about {group.replace('_', ' ')}.\n\n",
                           num_fewshot=5)
                data["dev"] = write_records(f"{tmp}/harness_dev_{group}.jsonl", [r for r in dev if r["subject"] == group])
            cfg["dataset_kwargs"] = {"data_files": data}
            cfg.pop("tag", None)
            out.append(cfg)
    return out


def harness(lm, tasks, cache):
    """[(result, samples in order)] of the tasks. cache: a file that need not exist; mc1 and mc2 of truthfulqa ask for the same answers."""
    import lm_eval
    out = []
    for cfg in tasks:
        with contextlib.redirect_stderr(io.StringIO()):   # progress bars
            r = lm_eval.simple_evaluate(model=lm, tasks=[cfg], use_cache=cache, bootstrap_iters=10, log_samples=True)
        name = next(iter(r["samples"]))
        out.append((r["results"][name], sorted(r["samples"][name], key=lambda s: s["doc_id"])))
    return out


def first_best(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


def relative(a, b):
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b)) if len(a) == len(b) else math.inf


def compare(label, name, ours, theirs, bound):
    """One task on one model: log-probabilities, predictions, totals."""
    table = {(r["task"], r["metric"]): r for r in ours["results"]}
    items = ours["items"]
    samples = [s for _, rows in theirs for s in rows]
    if name == "truthfulqa":   # ours: mc1 and mc2 of a record in turn
        half = len(samples) // 2
        samples = [s for pair in zip(samples[:half], samples[half:]) for s in pair]
    if len(items) != len(samples):
        return check(False, f"{label} {name}: {len(items)} items, lm-eval has {len(samples)}")
    worst, same, total = 0.0, 0, 0
    for mine, sample in zip(items, samples):
        if name == "wikitext":
            worst = max(worst, relative([mine["logp"]], [sample["resps"][0][0]]))
            check((mine["words"], mine["bytes"]) == (sample["word_perplexity"][1], sample["byte_perplexity"][1]), f"{label} {name}: words or bytes")
            continue
        logp = [float(r[0][0]) for r in sample["resps"]]
        worst = max(worst, relative(mine["logp"], logp))
        total += 1
        if name == "lambada":
            same += mine["greedy"] == int(sample["acc"])
        elif "mc2" in mine:
            same += abs(mine["mc2"] - sample["acc"]) < 20 * bound
        else:
            norm = True
            if "acc_norm" in sample:
                norm = (mine["pred_norm"] == mine["gold"]) == bool(sample["acc_norm"])
            same += mine["pred"] == first_best(logp) and norm and (mine["pred"] == mine["gold"]) == bool(sample["acc"])
    check(worst <= bound, f"{label} {name}: log-probabilities differ by {worst:.2e}, bound {bound:.0e}")
    check(total == 0 or same >= SAME_PREDICTIONS * total, f"{label} {name}: {same} of {total} items are the same")
    note = ""
    if name in ("hellaswag", "arc", "winogrande"):
        for metric in ("acc", "acc_norm") if name != "winogrande" else ("acc",):
            a, b = table[(name, metric)], theirs[0][0]
            n = a["n"]
            exact = same == total
            check(abs(a["value"] - b[f"{metric},none"]) <= (1e-12 if exact else (1 - SAME_PREDICTIONS)), f"{label} {name} {metric}: {a['value']} and {b[f'{metric},none']}")
            check(not exact or abs(a["stderr"] - b[f"{metric}_stderr,none"]) < 1e-12, f"{label} {name}: standard error {a['stderr']}, {n} items")
    elif name == "mmlu":
        subjects = [k for k in table if k[0].startswith("  ")]
        check(len(subjects) == len(theirs), f"{label} mmlu: {len(subjects)} subjects, lm-eval has {len(theirs)}")
        for key, (b, _) in zip(subjects, theirs):
            check(same < total or abs(table[key]["value"] - b["acc,none"]) < 1e-12, f"{label} {key}: {table[key]['value']} and {b['acc,none']}")
        note = f", {len(subjects)} subjects"
    elif name == "wikitext":
        for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            a, b = table[(name, metric)]["value"], theirs[0][0][f"{metric},none"]
            check(abs(math.log(a / b)) < 20 * bound, f"{label} {metric}: {a} and {b}")
        total, same = len(items), len(items)
    elif name == "lambada":
        a, b = table[(name, "perplexity")]["value"], theirs[0][0]["perplexity,none"]
        check(abs(math.log(a / b)) < 20 * bound, f"{label} lambada perplexity: {a} and {b}")
    print(f"  {label:8} {name:11} {same:4}/{total:<4} the same, log-probabilities within {worst:.1e}{note}", flush=True)


def test_harness(tmp, args, text):
    import torch
    import transformers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    models = [("given", args.model, args.lam)] if args.model else made_models(tmp, text)
    dev = [{"subject": "light_arts", "question": "not this one", "choices": ["a", "b", "c", "d"], "answer": 0}] + made_items(text[::-1], 6)["mmlu"]
    sets = [("made", made_items(text, 60), None, dev)]
    if args.data:
        out, files, real_dev = read_items(os.path.join(args.data, "qa"), args.items)
        sets = sets * (not args.model) + [("read", out, files, real_dev)]   # a large model: the real records are enough
    sets = [(source, {k: v for k, v in items.items() if not args.tasks or k in args.tasks}, files, examples) for source, items, files, examples in sets]
    for label, path, lam in models:
        compare_model(tmp, label, path, lam, sets)


def made_models(tmp, text):
    """A tokenizer and two models with it: [(label, directory, lambda)]."""
    import torch
    import transformers
    write(f"{tmp}/text.txt", text)
    run(sys.executable, "prepro/text.py", f"{tmp}/text.txt", "--vocab", 600, "--out", f"{tmp}/data", "--jobs", 1)
    run(BINARY, "pretrain", "tinystories", "dim=64", "layers=2", "heads=4", "kv_heads=2", "ffn_dim=128", "seq_len=64", "max_seq=256", "batch_size=8",
        "grad_accum=1", "steps=80", "warmup_steps=10", "save_every=0", "eval_every=0", "sample_every=0", f"data={tmp}/data/train_*.bin", f"run_dir={tmp}/runs", "name=tiny")
    latest = f"{tmp}/runs/latest/checkpoints"
    ternary = f"{latest}/{open(f'{latest}/latest').read().strip()}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=256, initializer_range=0.15, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(f"{tmp}/llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tmp}/data/{name}", f"{tmp}/llama/{name}")
    return [("float", f"{tmp}/llama", 0), ("ternary", ternary, 1)]


def compare_model(tmp, label, path, lam, sets):
    """All tasks on one model."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    # The logits of 8 windows of a large model do not fit into memory.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1 if label == "given" else 8, device="cpu")
    for source, items, files, examples in sets:
        for name, rows in items.items():
            file = write_records(f"{tmp}/{source}_{name}.jsonl", files[name] if files else rows)
            command = [BINARY, "eval", path, f"task={name}", f"file={file}", f"lambda={lam}", "precision=fp32", f"results={tmp}/results.json"]
            if name == "mmlu":
                command.append("shots_file=" + write_records(f"{tmp}/{source}_dev.jsonl", examples))
            run(*command)
            with open(f"{tmp}/results.json") as f:
                ours = json.load(f)
            compare(label, name, ours, harness(lm, harness_tasks(tmp, name, rows, examples), f"{tmp}/cache_{label}_{source}_{name}"), LOGP_BOUND[label])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=os.environ.get("BITNET_DATA"), help="a directory with qa/*.jsonl (default: $BITNET_DATA)")
    p.add_argument("--items", type=int, default=200, help="records of each file (default %(default)s)")
    p.add_argument("--tasks", nargs="+", help="only these, of hellaswag arc mmlu winogrande truthfulqa lambada wikitext")
    p.add_argument("--model", help="compare this model directory instead of the two that are made")
    p.add_argument("--lambda", dest="lam", type=float, default=0, help="with --model: 0 runs its float weights, 1 the ternary ones (default 0)")
    args = p.parse_args()
    text = "\n\n".join(open(os.path.join(ROOT, f), encoding="utf-8").read() for f in ("README.md", "bitnet/model.h", "bitnet/infer.h", "dataloader.h"))
    with tempfile.TemporaryDirectory() as tmp:
        for test in [lambda: test_stems(tmp, text)] * (not args.model) + [lambda: test_harness(tmp, args, text)]:
            t0 = time.time()
            test()
            print(f"{time.time() - t0:6.1f} s", flush=True)
    finish()


if __name__ == "__main__":
    main()
