#!/usr/bin/env python3
"""Group sampling side by side: ./train_bitnet grpo and transformers' generate, with one arithmetic checkpoint.

    pip install torch transformers accelerate
    ./train_bitnet arithmetic stop_at=330
    python dev/bench_rollout.py runs/latest            # 5 rounds, 2 threads, 8 answers to each question

Both sample at temperature 1, without top-k and top-p, at most 4 new tokens, and count the tokens of all answers with their end tokens.
Ours: what log.jsonl says of steps at learning rate 0, which leave the model as it is (sampled_tok_per_s: sampling alone, log-probabilities
included, decoded texts too). Theirs: generate() with its KV cache and num_return_sequences, prompts padded on the left, no log-probabilities,
in batches of 32 and of 128 questions, of which the faster one counts. Each round runs both, one after the other, so that both see the
same weather on a shared machine; the table shows medians over the rounds.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["TORCHDYNAMO_DISABLE"] = "1"   # transformers compiles its quantisers; for such small matrices plain functions are faster

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEW, QUESTIONS = 4, 256


def checkpoint_of(path):
    """A run's newest checkpoint, or the directory itself."""
    latest = os.path.join(path, "checkpoints", "latest")
    return os.path.join(path, "checkpoints", open(latest).read().strip()) if os.path.exists(latest) else path


def ours(args):
    """Median tokens/s over the steps of one run of our program."""
    with tempfile.TemporaryDirectory() as runs:
        command = [args.binary, "grpo", "arithmetic", f"init={args.dir}", f"run_dir={runs}", "lr=0", "steps=6", "warmup_steps=0", "eval_every=0",
                   "kl_every=0", f"group_size={args.group}", f"batch_size={QUESTIONS // 8}", "grad_accum=8", f"max_new={NEW}",
                   f"threads={args.threads}", "log_every=1", "eval_problems=10"]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        rows = [json.loads(line) for line in open(os.path.join(runs, "latest", "log.jsonl"))]
        return statistics.median(row["sampled_tok_per_s"] for row in rows[1:] if "sampled_tok_per_s" in row)


def theirs(model, tokenizer, batch, group):
    """Tokens/s of generate() over QUESTIONS questions."""
    questions = [f"{random.randint(0, 99)}{random.choice('+-')}{random.randint(0, 99)}=" for _ in range(QUESTIONS)]
    tokens, seconds = 0, 0.0
    for i in range(0, QUESTIONS, batch):
        ids = [tokenizer(q, add_special_tokens=False).input_ids for q in questions[i:i + batch]]
        width = max(map(len, ids))
        pad = model.config.pad_token_id
        inputs = torch.tensor([[pad] * (width - len(x)) + x for x in ids])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids])
        t0 = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=inputs, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
                                 num_return_sequences=group, use_cache=True)
        seconds += time.perf_counter() - t0
        new = out[:, width:]
        tokens += int((new != pad).sum())
    return tokens / seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", help="a run or checkpoint of ./train_bitnet arithmetic")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--group", type=int, default=8, help="answers to each question")
    p.add_argument("--binary", default=os.path.join(ROOT, "train_bitnet"))
    args = p.parse_args()
    args.dir = checkpoint_of(args.dir)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    random.seed(1)
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.dir, dtype=torch.float32).eval()
    theirs(model, tokenizer, 32, args.group)   # the first call prepares things
    found = {"ours": [], "transformers, 32 questions at a time": [], "transformers, 128": []}
    for k in range(args.rounds):
        found["ours"].append(ours(args))
        found["transformers, 32 questions at a time"].append(theirs(model, tokenizer, 32, args.group))
        found["transformers, 128"].append(theirs(model, tokenizer, 128, args.group))
        print(f"round {k + 1} of {args.rounds}", {n: round(v[-1]) for n, v in found.items()}, file=sys.stderr)
    median = {name: statistics.median(values) for name, values in found.items()}
    for name, value in median.items():
        print(f"{name:40}{value:12.0f} tokens/s")
    print(f"{'ours / the faster one':40}{median['ours'] / max(v for n, v in median.items() if n != 'ours'):12.2f}")


if __name__ == "__main__":
    main()
