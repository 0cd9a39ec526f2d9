#!/usr/bin/env python3
"""How should lambda go from 0 to 1? Makes one model ternary with each schedule and compares the held-out perplexities.

    python dev/lambda_sweep.py runs/latest data='data/x/train_*.bin' val_data='data/x/val_*.bin' steps=500 lr=5e-4
    python dev/lambda_sweep.py MODEL_DIR --seeds 3 --schedules linear exponential data=... val_data=... steps=1000
    python dev/lambda_sweep.py --quick --out /tmp/sweep      # makes a small arithmetic model itself; under a minute

Every run starts from the same model, sees the same data in the same order (for a seed) and differs in lambda_schedule alone; `none` is
lambda = 1 from the first step, `warmup` a linear rise over lambda_warmup_frac of the run and 1 afterwards. Perplexities are those at
lambda = 1, which is what would be served. Two rows need no training: the float model (lambda = 0), and the same weights made ternary at
once. Samples are continued before and after.

Written to --out: table.txt, sweep.json, samples.txt, curves.png (with matplotlib), and the run folders. The same command again goes on with
a sweep that was interrupted.
"""
import argparse
import glob
import json
import math
import os
import re
import shlex
import subprocess
import sys

import runlog

SCHEDULES = ["none", "linear", "accelerated", "exponential", "sigmoid", "warmup"]
DONE = re.compile(r"^done: steps (\d+) val_loss (\S+)(?: exact_match (\S+))? seconds (\S+) run (.+)$", re.M)
QUICK = ["simple", "steps=30", "eval_every=10", "eval_problems=200", "lr=2e-3"]


def call(args, *command):
    """The program's stdout. Its error, if it fails, is ours."""
    p = subprocess.run([args.binary, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if p.returncode:
        runlog.fail(f"{shlex.join([args.binary, *command])} ended with {p.returncode}:\n{p.stderr.strip()[-500:]}")
    return p.stdout


def setting(options, key, default=""):
    """The value of key=value in the options."""
    return next((o.split("=", 1)[1] for o in reversed(options) if o.startswith(key + "=")), default)


def untrained(args, lam):
    """Held-out loss of the model as it is, on the batches that the runs are evaluated on."""
    data, run = [o for o in args.options if o.startswith("arith_")], args.run
    if v := run["val_data"]:
        data = [f"data={v}", f"seq_len={run['seq_len']}", f"batch_size={run['batch_size']}", f"eval_batches={run['eval_batches']}"]
    keep = [o for o in args.options if o.split("=")[0] in ("eval_problems", "precision", "threads")]
    out = call(args, "eval", args.model, f"lambda={lam}", *data, *keep)
    loss = re.search(r"val_loss (\S+)", out)
    if loss is None:
        runlog.fail(f"eval {args.model} says nothing of a loss: {out.strip()}; is val_data= missing?")
    return float(loss.group(1))


def train(args, schedule, seed):
    """(held-out loss, [(step, loss)], run folder). A run that an interrupted sweep has finished is not done again."""
    for run in glob.glob(f"{args.out}/runs/{schedule}_{seed}_*"):
        steps, evals, _ = runlog.read_log(run)
        if evals and evals[-1]["step"] == args.steps:
            curve = runlog.numbers(evals, "val_loss")
            return curve[-1][1], curve, run
    out = call(args, "pretrain", *args.options, f"init={args.model}", f"lambda_schedule={schedule}", f"seed={seed}", f"run_dir={args.out}/runs",
               f"name={schedule}_{seed}")
    m = DONE.search(out)
    if m is None or not math.isfinite(loss := float(m.group(2))):
        runlog.fail(f"{schedule}, seed {seed}: no held-out loss in: {out.strip()[-200:]}; give val_data=")
    _, evals, _ = runlog.read_log(m.group(5))
    return loss, runlog.numbers(evals, "val_loss"), m.group(5)


def sample(args, model, lam):
    """One continuation of each prompt."""
    return [call(args, "generate", model, f"prompt={p}", f"n={args.tokens}", f"lambda={lam}").rstrip("\n") for p in args.prompt]


def mean_spread(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else float("nan")


def exp(x):
    return math.exp(min(x, 700))


def plot(path, curves, float_loss):
    """Held-out perplexity over the steps, one line for each schedule (the mean over seeds)."""
    try:
        import matplotlib
    except ImportError:
        print("note: no curves.png; it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 5))
    for name, runs in curves.items():
        steps = sorted(set.intersection(*(set(s for s, _ in r) for r in runs)))
        ax.plot(steps, [exp(sum(dict(r)[s] for r in runs) / len(runs)) for s in steps], marker=".", label=name)
    ax.axhline(exp(float_loss), color="grey", linestyle=":", label="float, before")
    ax.set(xlabel="step", ylabel="held-out perplexity at lambda = 1", yscale="log")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def quick_model(args):
    """A small model that has begun to calculate, halfway between float and ternary."""
    out = call(args, "pretrain", "simple", "steps=120", "stop_at=60", "lambda_schedule=linear", f"run_dir={args.out}/base", "name=base")
    return DONE.search(out).group(5)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", help="a run or a model directory")
    p.add_argument("options", nargs="*", help="a preset and key=value options of `pretrain`, the same for all runs")
    p.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME", help="default: " + " ".join(SCHEDULES))
    p.add_argument("--seeds", type=int, default=1, help="runs of each schedule (default %(default)s)")
    p.add_argument("--prompt", action="append", help="a text to continue before and after; may be repeated")
    p.add_argument("--tokens", type=int, default=48, help="of a continuation (default %(default)s)")
    p.add_argument("--out", default="sweep", help="directory of the results (default %(default)s)")
    p.add_argument("--binary", default="./train_bitnet")
    p.add_argument("--quick", action="store_true", help="a small model of its own, few steps: does everything work here?")
    args = p.parse_intermixed_args()
    if args.seeds < 1:
        runlog.fail(f"--seeds {args.seeds}: expected at least 1")
    if args.model and "=" in args.model:
        runlog.fail(f"the first word must be a model directory, found {args.model}")
    if not args.quick and not args.model:
        runlog.fail("name a model directory to start from, or pass --quick")
    taken = [o for o in args.options if o.split("=")[0].lstrip("-") in ("init", "lambda_schedule", "seed", "run_dir", "name", "resume")]
    if taken:
        runlog.fail(f"{taken[0]}: the sweep sets this option itself")
    if not os.path.isfile(args.binary):
        runlog.fail(f"there is no program {args.binary}; build it with make train_bitnet, or name it with --binary")
    os.makedirs(args.out, exist_ok=True)
    if args.quick:
        args.model, args.options = args.model or quick_model(args), QUICK + args.options
        args.tokens = min(args.tokens, 4)
    # What the runs will have in common, written out; an interrupted sweep can go on only with the same.
    said = call(args, "pretrain", *args.options, f"init={args.model}", "dry_run=1")
    args.run = json.JSONDecoder().raw_decode(said)[0]
    args.steps, mine = args.run["steps"], f"{args.out}/options.json"
    common = {k: v for k, v in args.run.items() if k not in ("eval_every", "log_every", "run_dir", "name")}
    if glob.glob(f"{args.out}/runs/*") and (not os.path.isfile(mine) or json.load(open(mine)) != common):
        runlog.fail(f"{args.out} holds the runs of another sweep; take another --out, or delete it")
    with open(mine, "w") as f:
        json.dump(common, f, indent=1)
    arithmetic = setting(args.options, "data", "arithmetic") == "arithmetic"
    args.prompt = args.prompt or (["12+34=", "60-7="] if arithmetic else ["Once upon a time"])

    before, at_once = untrained(args, 0), untrained(args, 1)
    texts = [("float, before", sample(args, args.model, 0)), ("ternary at once", sample(args, args.model, 1))]
    rows, curves, runs = [("float, before", [before]), ("ternary at once", [at_once])], {}, {}
    losses = {schedule: [] for schedule in args.schedules}
    for seed in range(1, args.seeds + 1):   # one seed of every schedule first: what an interrupted sweep has can be compared
        for schedule in args.schedules:
            loss, curve, run = train(args, schedule, seed)
            losses[schedule].append(loss)
            curves.setdefault(schedule, []).append([(0, at_once)] + curve)
            runs.setdefault(schedule, []).append(run)
            print(f"{schedule}, seed {seed}: held-out perplexity {exp(loss):.3f}", file=sys.stderr, flush=True)
    rows += losses.items()
    for schedule in args.schedules:
        texts.append((f"after {schedule}", sample(args, runs[schedule][0], 1)))

    trained = {name: sum(v) / len(v) for name, v in rows[2:]}
    order = sorted(trained, key=trained.get)
    table = [f"{'lambda':<16} {'loss':>8} {'+-':>8} {'perplexity':>11}  seeds"]
    for name, losses in rows:
        mean, spread = mean_spread(losses)
        table.append(f"{name:<16} {mean:8.4f} {f'{spread:.4f}' if len(losses) > 1 else '-':>8} {exp(mean):11.3f}  {len(losses) if name in trained else '-'}"
                     + ("  lowest" if name == order[0] else ""))
    spreads = [mean_spread(losses)[1] for name, losses in rows if name in trained]
    if args.seeds == 1:
        table.append("one seed: small differences may be chance; --seeds 3 shows how large chance is")
    elif len(order) > 1 and trained[order[1]] - trained[order[0]] < max(spreads):
        close = [n for n in order if trained[n] - trained[order[0]] < max(spreads)]
        table.append(f"within the spread over seeds of each other: {', '.join(close)}")
    report = "\n".join(table) + "\n"
    samples = "".join(f"--- {name} ---\n" + "\n".join(lines) + "\n\n" for name, lines in texts)
    with open(f"{args.out}/table.txt", "w") as f:
        f.write(report)
    with open(f"{args.out}/samples.txt", "w") as f:
        f.write(samples)
    with open(f"{args.out}/sweep.json", "w") as f:
        json.dump({"model": args.model, "options": args.options, "held_out_loss": dict(rows), "curves": curves, "runs": runs, "lowest": order[0]}, f, indent=1)
    plot(f"{args.out}/curves.png", curves, before)
    print(report + "\n" + samples, end="")


if __name__ == "__main__":
    main()
