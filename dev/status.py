#!/usr/bin/env python3
"""Where a run stands: step, loss, speed, time left, checkpoints, anything odd.

    python dev/status.py runs/latest            # once
    python dev/status.py latest --watch         # again every 10 s until the run has ended
    python dev/status.py RUN --json             # for programs

Exit code 0, also for a run that failed; 2 if there is no such run.
"""
import argparse
import fcntl
import json
import os
import sys
import time

import runlog


def is_locked(run):
    """True if a process holds the run, False if none does, None if that cannot be known."""
    try:
        with open(os.path.join(run, ".lock")) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except OSError:
                return True
    except OSError:
        return None


def anomalies(train, config):
    """[(step, what)]: steps that were not finite, and losses of more than twice the mean of the 100 before. While the learning rate warms up
    or lambda rises the loss may jump: no alarm then."""
    out, before = [], []
    warmup = config.get("warmup_steps") or 0
    for i, row in enumerate(train):
        loss, step = row.get("loss"), row["step"]
        rising = i > 0 and (row.get("lambda") or 0) > (train[i - 1].get("lambda") or 0)
        if row.get("skipped") or loss is None or row.get("grad_norm") is None:
            out.append((step, "not finite, update skipped"))
            continue
        if len(before) >= 20 and step > warmup and not rising and loss > 2 * sum(before) / len(before):
            out.append((step, f"loss {loss:.3f}, twice the mean of the last {len(before)}"))
        before = (before + [loss])[-100:]
    return out


def status(run, now=None):
    """Everything that is shown, as a dictionary."""
    now = time.time() if now is None else now
    config = runlog.read_json(os.path.join(run, "config.json"))
    manifest = runlog.read_json(os.path.join(run, "manifest.json"))
    train, evals, bad = runlog.read_log(run)
    names, latest = runlog.checkpoints(run)
    steps = config.get("steps")
    last = train[-1] if train else {}
    step = max([last.get("step", 0)] + [e["step"] for e in evals[-1:]])
    ms = [v for _, v in runlog.numbers(train[-100:], "ms")]
    per_step = sum(ms) / len(ms) / 1000 if ms else None
    losses = [v for _, v in runlog.numbers(train, "loss")]
    log_path = os.path.join(run, "log.jsonl")
    silent = now - os.path.getmtime(log_path) if os.path.exists(log_path) else None

    # What the run says of itself, unless nobody is there any more.
    state, locked = manifest.get("status", "unknown"), is_locked(run)
    patience = max(10 * (per_step or 6) * (config.get("log_every") or 1), 10)
    if state == "running" and locked is False:
        state = "dead"
    elif state == "running" and silent is not None and silent > patience:
        state = "stale"
    left = (steps - step) * per_step if steps and per_step and state in ("running", "stale") else None
    return {
        "run": os.path.basename(run), "path": run, "state": state, "step": step, "steps": steps,
        "percent": 100 * step / steps if steps else None, "loss": losses[-1] if losses else None,
        "loss_mean_100": sum(losses[-100:]) / len(losses[-100:]) if losses else None, "losses": losses,
        "val_loss": next((e["val_loss"] for e in reversed(evals) if e.get("val_loss") is not None), None),
        "best_val_loss": min((v for _, v in runlog.numbers(evals, "val_loss")), default=None),
        "exact_match": next((e["exact_match"] for e in reversed(evals) if e.get("exact_match") is not None), None),
        "lambda": last.get("lambda"), "lr": last.get("lr"), "grad_norm": last.get("grad_norm"),
        "zeros": next((r["zeros"] for r in reversed(train) if "zeros" in r), None), "flips": next((r["flips"] for r in reversed(train) if "flips" in r), None), "ms": 1000 * per_step if per_step else None, "tok_per_s": last.get("tok_per_s"),
        "tokens": step * runlog.tokens_per_step(config), "eta_seconds": left, "silent_seconds": silent, "checkpoints": names, "latest": latest,
        "damaged_lines": bad, "anomalies": anomalies(train, config)}


def sparkline(values, width=60):
    """The values as a line of blocks, low to high."""
    if len(values) < 2:
        return ""
    n = min(width, len(values))
    means = [sum(part) / len(part) for part in (values[len(values) * i // n:len(values) * (i + 1) // n] for i in range(n))]
    lo, hi = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - lo) / (hi - lo) + 0.5) if hi > lo else 0] for v in means)


def show(s):
    def number(v, form):
        return "-" if v is None or isinstance(v, dict) else form % v
    what = {"dead": "dead: no process holds it", "stale": f"stale: nothing logged for {runlog.duration(s['silent_seconds'] or 0)}"}.get(s["state"], s["state"])
    lines = [f"run         {s['run']}  ({what})"]
    bar = "" if s["percent"] is None else "  [" + "#" * int(s["percent"] / 4) + "." * (25 - int(s["percent"] / 4)) + f"] {s['percent']:.1f} %"
    lines.append(f"step        {s['step']}" + (f" of {s['steps']}" if s["steps"] else "") + bar)
    lines.append(f"loss        {number(s['loss'], '%.4f')}, mean of the last 100 {number(s['loss_mean_100'], '%.4f')}")
    if s["losses"]:
        lines.append(f"            {sparkline(s['losses'])}  {max(s['losses']):.2f} to {min(s['losses']):.2f}")
    if s["val_loss"] is not None:
        lines.append(f"validation  {s['val_loss']:.4f}, best {s['best_val_loss']:.4f}" + (f", exact match {s['exact_match']:.4f}" if s["exact_match"] is not None else ""))
    lines.append(f"now         lambda {number(s['lambda'], '%.3f')}, lr {number(s['lr'], '%.2e')}, gradient norm {number(s['grad_norm'], '%.3f')}")
    if any(s[k] is not None for k in ("zeros", "flips")):
        lines.append(f"ternary     zeros {number(s['zeros'], '%.3f')}, codes flipped per step {number(s['flips'], '%.2e')}")
    lines.append(f"speed       {number(s['tok_per_s'], '%.0f')} tokens/s, {number(s['ms'], '%.0f')} ms a step, {s['tokens']} tokens so far")
    if s["eta_seconds"] is not None:
        lines.append(f"time left   {runlog.duration(s['eta_seconds'])}")
    lines.append(f"checkpoints {len(s['checkpoints'])}" + (f", latest {s['latest']}" if s["latest"] else ""))
    if s["state"] in ("dead", "interrupted", "failed") and s["latest"]:
        lines.append(f"go on with  ./train_bitnet resume={s['path']}")
    for step, text in s["anomalies"][-5:]:
        lines.append(f"odd         step {step}: {text}")
    if len(s["anomalies"]) > 5:
        lines.append(f"            and {len(s['anomalies']) - 5} more before")
    if s["damaged_lines"]:
        lines.append(f"note        {s['damaged_lines']} lines of log.jsonl could not be read")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", default="latest", help="a run folder, or a name in runs/ (default: latest)")
    p.add_argument("--watch", action="store_true", help="repeat until the run has ended")
    p.add_argument("--every", type=float, default=10, help="seconds between looks (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = p.parse_args()
    run = runlog.find_run(args.run)
    while True:
        s = status(run)
        if args.json:
            print(json.dumps({k: v for k, v in s.items() if k != "losses"}))
        else:
            if args.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(show(s), flush=True)
        if not args.watch or s["state"] not in ("running", "stale"):
            return
        time.sleep(args.every)
        if not args.json and not sys.stdout.isatty():
            print()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
