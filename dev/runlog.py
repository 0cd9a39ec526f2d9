"""Reading run folders: what status.py, plot.py, follow.py and cost.py share.

RUN/config.json, manifest.json, log.jsonl, samples.txt, checkpoints/. The log may be growing while it is read: its last line can be
torn and is then left for later. Values that were not finite are null in it and None here.
"""
import difflib
import json
import os
import re
import sys


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_run(name, root="runs"):
    """The folder of a run: a path, or a name in runs/ (latest is a link to the newest)."""
    for path in (name, os.path.join(root, name)):
        if os.path.isfile(os.path.join(path, "log.jsonl")) or os.path.isfile(os.path.join(path, "config.json")) and os.path.isfile(os.path.join(path, "manifest.json")):
            return os.path.realpath(path).rstrip("/")
    folder = os.path.dirname(name.rstrip("/")) or root
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    there = [r for r in there if os.path.isdir(os.path.join(folder, r))]
    near = difflib.get_close_matches(os.path.basename(name.rstrip("/")), there, 5, 0.3) or there[-5:]
    fail(f"no run at {name}" + (f"; in {folder} there are: {', '.join(near)}" if near else f", and no runs in {folder}/"))


def read_json(path):
    """The object in a file, {} if there is none or it is being written."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def parse_lines(text):
    """(rows, bad) of the complete lines in text; bad counts lines that are no objects with a step."""
    rows, bad = [], 0
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError
            rows.append(row)
        except ValueError:
            bad += bool(line.strip())
    return rows, bad


def is_eval(row):
    return "val_loss" in row or "exact_match" in row


def read_log(run):
    """(training rows, evaluation rows), each in the order of steps with the last row of a step; and the number of damaged lines."""
    try:
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError:
        text = ""
    rows, bad = parse_lines(text)
    train, evals = {}, {}
    for row in rows:
        (evals if is_eval(row) else train)[row["step"]] = row
    return [train[s] for s in sorted(train)], [evals[s] for s in sorted(evals)], bad


def read_samples(run):
    """[(step, text)] of samples.txt."""
    try:
        with open(os.path.join(run, "samples.txt"), encoding="utf-8", errors="replace") as f:
            parts = re.split(r"^--- step (\d+) ---\n", f.read(), flags=re.M)
    except OSError:
        return []
    return [(int(parts[i]), parts[i + 1].rstrip("\n")) for i in range(1, len(parts) - 1, 2)]


def checkpoints(run):
    """(names of the complete ones, the name that `latest` holds or None)."""
    folder = os.path.join(run, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if re.fullmatch(r"step_\d+", n)) if os.path.isdir(folder) else []
    try:
        with open(os.path.join(folder, "latest")) as f:
            latest = f.read().strip()
    except OSError:
        latest = None
    return names, latest


def numbers(rows, key):
    """[(step, value)] where the value is a finite number."""
    return [(r["step"], float(r[key])) for r in rows if isinstance(r.get(key), (int, float)) and not isinstance(r.get(key), bool)]


def series(rows):
    """{name: [(step, value)]} of everything that rows hold; an object such as "zeros": {"q": 0.3} gives zeros.q."""
    out = {}
    for row in rows:
        flat = {}
        for key, value in row.items():
            if isinstance(value, dict):
                flat.update({f"{key}.{k}": v for k, v in value.items()})
            else:
                flat[key] = value
        for key, value in flat.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                out.setdefault(key, []).append((row["step"], float(value)))
    return out


def moving_average(values, window=100):
    """Each value's mean with up to window / 2 on either side. At the start, where losses fall steeply, no more behind than before."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    out, n = [], len(values)
    for i in range(n):
        first, end = max(0, i - window // 2), min(n, i + min(i, window // 2) + 1)
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def tokens_per_step(config):
    return (config.get("batch_size") or 0) * (config.get("seq_len") or 0) * (config.get("grad_accum") or 1)


def duration(seconds):
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60}:{s % 60:02d} min"
    if s < 86400:
        return f"{s // 3600}:{s // 60 % 60:02d} h"
    return f"{s // 86400} d {s // 3600 % 24} h"
