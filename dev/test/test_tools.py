#!/usr/bin/env python3
"""Tests of dev/status.py, plot.py, follow.py, cost.py and lambda_sweep.py on run folders made here, and of what bench_torch_cuda.py does without a GPU.

    python dev/test/test_tools.py           # matplotlib, tensorboard and wandb are used where they are installed

Presets are compared with ./train_bitnet --dry-run, and a small sweep is run, where that program is built.
"""
import fcntl
import html.parser
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "dev"))
import cost  # noqa: E402
import follow  # noqa: E402
import runlog  # noqa: E402
import status  # noqa: E402
from checks import check, finish  # noqa: E402


def tool(name, *args, code=0, words=(), limit=120):
    p = subprocess.run([sys.executable, os.path.join(ROOT, "dev", name + ".py"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    check(p.returncode == code and all(w in p.stdout for w in words), f"{name} {args}: exit {p.returncode}, wanted {code} with {words}\n{p.stdout[-500:]}")
    check("Traceback" not in p.stdout, f"{name} {args}: a traceback\n{p.stdout[-800:]}")
    return p.stdout


def has(module):
    return importlib.util.find_spec(module) is not None


def row(step, loss=2.0, **more):
    return {"step": step, "loss": loss, "lambda": 1, "lr": 0.001, "grad_norm": 0.5, "ms": 100.0, "tok_per_s": 1000.0, **more}


def make_run(folder, rows, state="running", torn="", samples="", **config):
    os.makedirs(f"{folder}/checkpoints/step_000050", exist_ok=True)
    with open(f"{folder}/checkpoints/latest", "w") as f:
        f.write("step_000050\n")
    with open(f"{folder}/config.json", "w") as f:
        json.dump({"steps": 200, "batch_size": 4, "seq_len": 8, "grad_accum": 2, "warmup_steps": 10, "log_every": 1, "lr": 0.001, **config}, f)
    with open(f"{folder}/manifest.json", "w") as f:
        json.dump({"status": state, "parameters": 1000}, f)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.write("".join(json.dumps(r) + "\n" for r in rows) + torn)
    with open(f"{folder}/samples.txt", "w") as f:
        f.write(samples)
    open(f"{folder}/.lock", "w").close()
    return folder


def test_status(tmp):
    rows = [row(i, 4 - i / 50, **({"zeros": 0.31, "flips": 2e-3} if i == 91 else {})) for i in range(1, 101)] + [{"step": 100, "val_loss": 2.5, "exact_match": 0.25}]
    run = make_run(f"{tmp}/a_run", rows, torn='{"step": 101, "lo')
    lock = open(f"{run}/.lock")
    fcntl.flock(lock, fcntl.LOCK_EX)
    s = status.status(run)
    check(s["state"] == "running" and s["step"] == 100 and s["percent"] == 50 and s["damaged_lines"] == 0, f"running: {s['state']} {s['step']}")
    check(abs(s["eta_seconds"] - 10) < 1e-9 and s["tokens"] == 6400, f"time left {s['eta_seconds']}")
    check(s["loss"] == 2.0 and abs(s["loss_mean_100"] - 2.99) < 1e-9 and s["val_loss"] == 2.5 and s["exact_match"] == 0.25, "losses")
    check(s["checkpoints"] == ["step_000050"] and s["latest"] == "step_000050" and not s["anomalies"], "checkpoints")
    check(status.status(run, time.time() + 60)["state"] == "stale", "no line for a minute")
    tool("status", run, words=["step        100 of 200", "50.0 %", "exact match 0.2500", "zeros 0.310, codes flipped per step 2.00e-03", "time left   10 s"])
    fcntl.flock(lock, fcntl.LOCK_UN)
    check(status.status(run)["state"] == "dead", "nobody holds it")
    tool("status", run, "--watch", words=["dead", "go on with  ./train_bitnet resume="])   # ends by itself
    check(json.loads(tool("status", run, "--json"))["step"] == 100, "JSON")
    make_run(run, rows, "completed")
    tool("status", run, "--watch", words=["completed"])
    tool("status", f"{tmp}/a_rum", code=2, words=["no run at", "a_run"])
    tool("status", f"{tmp}/nowhere/x", code=2, words=["no run at"])

    # Watching a run until it ends.
    make_run(run, rows)
    lock = open(f"{run}/.lock")
    fcntl.flock(lock, fcntl.LOCK_EX)
    p = subprocess.Popen([sys.executable, f"{ROOT}/dev/status.py", run, "--watch", "--every", "0.1"], stdout=subprocess.PIPE, text=True)
    time.sleep(0.7)
    make_run(run, rows + [row(200, 1.0)], "completed")
    out = p.communicate(timeout=20)[0]
    check(p.returncode == 0 and out.count("running") >= 2 and "step        200 of 200" in out, "watch")

    # Nothing logged yet, a damaged line, rows that were logged twice.
    empty = make_run(f"{tmp}/empty", [])
    tool("status", empty, words=["step        0 of 200", "loss        -"])
    os.remove(f"{empty}/log.jsonl")
    tool("status", empty, words=["step        0 of 200"])
    s = status.status(make_run(f"{tmp}/torn", [row(1, 5.0), row(2), row(1, 3.0)], torn="}{\n[1]\nnull\n"))
    check(s["step"] == 2 and s["losses"] == [3.0, 2.0] and s["damaged_lines"] == 3, f"damaged lines {s['damaged_lines']} {s['losses']}")


def test_anomalies():
    config = {"warmup_steps": 10}
    quiet = [row(i) for i in range(1, 60)]
    check(status.anomalies(quiet, config) == [], "a quiet run")
    check([a[0] for a in status.anomalies(quiet + [row(60, 4.1), row(61)], config)] == [60], "a loss of more than twice the mean")
    check(status.anomalies(quiet + [row(60, 3.9)], config) == [], "less than twice")
    check([a[0] for a in status.anomalies(quiet + [row(60, None), row(61, 2.0, grad_norm=None), row(62, skipped=True)], config)] == [60, 61, 62], "not finite")
    check(status.anomalies([row(i, 9.0 if i == 40 else 2.0) for i in range(1, 60)], {"warmup_steps": 50}) == [], "learning-rate warm-up")
    rising = [{**row(i, 9.0 if i == 40 else 2.0), "lambda": i / 100} for i in range(1, 60)]
    check(status.anomalies(rising, config) == [], "lambda rises")
    check(status.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█" and status.sparkline([3.0]) == "" and status.sparkline([2, 2]) == "▁▁", "sparkline")


class Page(html.parser.HTMLParser):
    """Checks that a page is closed properly and asks for nothing from outside."""
    def __init__(self, text):
        super().__init__()
        self.open, self.bad, self.scripts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.bad += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)
        self.inside = tag

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(f"</{tag}>")
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)


def test_plot(tmp):
    check(runlog.moving_average([4, 3, 2, 1, 1, 1], 4) == [4, 3, 2.2, 1.6, 1.25, 1] and runlog.moving_average([], 4) == [], "moving average")
    text = "--- step 50 ---\nA </script><b> & story.\nTwo lines.\n--- step 100 ---\nThe end\n"
    rows = [row(i, 4 - i / 50, zeros={"q": 0.3, "down": 0.4}, flips=1e-4) for i in range(1, 4001)] + [{"step": i, "val_loss": 2.5} for i in (100, 2000)]
    a, b = make_run(f"{tmp}/a", rows, "completed", samples=text), make_run(f"{tmp}/b", [row(1, None), row(2, 3.0)], lr=0.5)
    check(runlog.read_samples(a) == [(50, "A </script><b> & story.\nTwo lines."), (100, "The end")], "samples")
    tool("plot", a, "--html-only", words=["report.html"])
    page = Page(open(f"{a}/report.html").read())
    check(page.open == [] and page.bad == [], f"open {page.open}, bad {page.bad}")
    data = json.loads(page.scripts[0])
    series = data["runs"][0]["panels"]
    check(set(series) == {"loss", "lambda", "lr", "grad_norm", "tok_per_s", "zeros.q", "zeros.down", "flips", "val_loss"}, f"{sorted(series)}")
    check(len(series["loss"]) == 1500 and series["loss"][-1][0] == 4000 and len(series["val_loss"]) == 2, "thinned")
    check(data["runs"][0]["samples"][0][1].startswith("A </script><b>"), "a sample that looks like HTML")
    tool("plot", a, b, "--out", f"{tmp}/both.html", "--html-only", words=["both.html"])
    text = open(f"{tmp}/both.html").read()
    check(Page(text).bad == [] and "Options that differ" in text and "<td>lr</td><td>0.001</td><td>0.5</td>" in text, "two runs")
    tool("plot", make_run(f"{tmp}/empty", []), code=2, words=["nothing was logged"])
    tool("plot", a, "--panels", "loss,lose", code=2, words=["unknown name lose"])
    tool("plot", a, "--panels", "loss,val_loss", "--out", f"{tmp}/few", "--html-only", words=["few.html"])
    few = json.loads(Page(open(f"{tmp}/few.html").read()).scripts[0])["runs"][0]["panels"]
    check(set(few) == {"loss", "val_loss"}, f"panels {sorted(few)}")
    if has("matplotlib"):
        tool("plot", a, b, "--out", f"{tmp}/both", "--png-only", words=["both.png"])
        check(open(f"{tmp}/both.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n" and os.path.getsize(f"{tmp}/both.png") > 20000, "PNG")
    else:
        tool("plot", a, "--png-only", code=2, words=["needs matplotlib"])


def test_follow(tmp):
    run = make_run(f"{tmp}/r", [row(1), row(2), {"step": 2, "val_loss": 2.0}], torn='{"step": 3,')
    tail = follow.Tail(f"{run}/log.jsonl")
    check([r["step"] for r in tail.rows()] == [1, 2, 2] and tail.rows() == [], "first look")
    with open(f"{run}/log.jsonl", "a") as f:
        f.write(' "loss": 1.5}\n' + json.dumps(row(4)) + "\n")
    check([r["step"] for r in tail.rows()] == [3, 4], "the torn line was completed")
    # Resumed from step 2: the file is written anew, steps 3 and 4 come again, then a new one.
    with open(f"{run}/new", "w") as f:
        f.write("".join(json.dumps(r) + "\n" for r in [row(1), row(2), {"step": 2, "val_loss": 2.0}, row(3), row(4), row(5)]))
    os.replace(f"{run}/new", f"{run}/log.jsonl")
    check([r["step"] for r in tail.rows()] == [5], "after a resume")
    check(follow.Tail(f"{tmp}/nothing").rows() == [], "no log yet")

    tool("follow", run, code=2, words=["--tensorboard and --wandb"])
    if has("tensorboard"):
        tool("follow", run, "--tensorboard", "--once", words=["6 rows"])
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(f"{run}/tensorboard").Reload()
        names = events.Tags()["tensors"] or events.Tags()["scalars"]
        check({"loss", "lambda", "lr", "grad_norm", "ms", "tok_per_s", "val_loss"} <= set(names), f"{names}")
        check([e.step for e in (events.Tensors("loss") if events.Tags()["tensors"] else events.Scalars("loss"))] == [1, 2, 3, 4, 5], "steps of the loss")
    elif not has("tensorboardX"):
        tool("follow", run, "--tensorboard", "--once", code=2, words=["needs the package tensorboard"])
    if has("wandb"):
        tool("follow", run, "--wandb", "offline", "--once", words=["6 rows"])
        folders = [d for d in os.listdir(f"{run}/wandb") if d.startswith("offline-run-")]
        check(len(folders) == 1 and any(f.endswith(".wandb") for f in os.listdir(f"{run}/wandb/{folders[0]}")), f"{folders}")
    else:
        tool("follow", run, "--wandb", "offline", "--once", code=2, words=["needs the package wandb"])


def test_cost(tmp):
    def numbers(*args):
        return json.loads(tool("cost", *args, "--json"))
    # Three checks of an earlier document: hours, and dollars at 23.92 an hour.
    for params, tokens, speed, hours, dollars in [("1e9", "20e9", "1.2e6", 4.63, 111), ("3e9", "60e9", "0.8e6", 20.83, 498), ("7e9", "140e9", "0.55e6", 70.71, 1691)]:
        r = numbers("--params", params, "--tokens", tokens, "--tok-per-s", speed, "--rate", 23.92, "--storage", 0)
        check(abs(r["hours"] - hours) < 0.005 and abs(r["total_cost"] - dollars) < 1, f"{params}: {r['hours']:.3f} h, {r['total_cost']:.1f}")
    r = numbers("--params", "7B", "--tokens-per-param", 60, "--tok-per-s", 1e5)
    check(r["tokens"] == 420e9 and r["flops"] == 6 * 7e9 * 420e9, "7B with 60 tokens for each parameter")
    check(numbers("--params", "1B", "--tokens", "2B", "--tok-per-s", 2000)["hours"] == numbers("--params", "1B", "--tokens", "1B", "--tok-per-s", 1000)["hours"], "proportional")
    r = numbers("--params", "1B", "--tokens", "1B", "--mfu", 0.5, "--peak", 100)
    check(abs(r["tok_per_s"] - 0.5e14 / 6e9) < 1e-6 and abs(r["share_of_peak"] - 0.5) < 1e-12, "a share of the peak")
    # 95,354,880 parameters in matrices and the embedding, 13,056 in the plain norms, and our sub-norms.
    r = numbers("baseline")
    check(r["parameters"] == 95367936 + 8 * (768 + 3072) and r["steps"] == 400000 and r["tokens"] == 400000 * 8192, f"baseline: {r['parameters']}")
    run = make_run(f"{tmp}/r", [row(i, tok_per_s=float(i)) for i in range(1, 102)], preset="tinystories", vocab=2048)
    r = numbers("tinystories", "--run", run, "--rate", 1)
    check(r["tok_per_s"] == 51 and abs(r["total_cost"] - (r["tokens"] / 51 / 3600 + 1)) < 1e-9, "a run's own speed")
    tool("cost", "tinystory", code=2, words=["no preset 'tinystory'", "tinystories"])
    tool("cost", "--params", "12Q", code=2, words=["12Q"])
    tool("cost", "--params", "1B", "--tok-per-s", "0", code=2, words=["positive"])
    tool("cost", "--params", "1B", "--rate", "-1", code=2, words=["0 or more"])
    tool("cost", "--params", "1B", "--hardware", "abacus", code=2, words=["abacus", "lambda-8xh100"])
    tool("cost", code=2, words=["name a preset"])
    tool("cost", "--params", "1B", words=["unknown: give --run"])
    program = os.path.join(ROOT, "train_bitnet")
    if not os.path.exists(program):
        print("note: ./train_bitnet is not built; presets were not compared with it")
        return
    for preset in cost.presets():
        if preset in ("arithmetic", "simple"):
            continue
        p = subprocess.run([program, preset, "vocab=32000", "dry_run=1", "data=x.bin"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        found = re.search(r"parameters: (\d+)", p.stdout)
        check(found and int(found.group(1)) == numbers(preset, "--vocab", 32000)["parameters"], f"{preset}: the program says {found and found.group(1)} {p.stderr}")


def test_bench_torch_cuda():
    if not has("torch"):
        print("note: torch is not installed; bench_torch_cuda.py was not tried")
        return
    import bench_torch_cuda as bench

    rows = "peak  1 2\ntrain_step    x B=8 T=1024 lambda=1    1.234e+05 tokens/s\ntrain_step    x B=8 T=1024 lambda=0.5   98760 tokens/s\n"
    check(bench.parse_rows(rows) == {"1": 123400.0, "0.5": 98760.0}, f"{bench.parse_rows(rows)}")
    try:
        bench.parse_rows(rows.replace("lambda=0.5", "lambda=0.4"))
        check(False, "rows of another lambda are accepted")
    except RuntimeError as e:
        check("something else" in str(e), f"{e}")
    check(bench.largest_batch(lambda n: n * 2 if n <= 12 else None) == (8, 16), "the largest batch of 12 is 8")
    check(bench.largest_batch(lambda n: None) == (0, None), "no batch fits")
    matrices = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 50257 * 768
    check(bench.operations_per_token("124m_t1024") == 6 * matrices + 6 * 1024 * 768 * 12, "operations of a token")
    text = open(os.path.join(ROOT, "modes", "bench.h")).read()
    for name, shape in bench.MODELS.items():   # the two programs run the same shapes
        found = re.search(r'{"%s", \d+, 1024, ([\d, ]+)}' % re.escape(name), text)
        check(found and tuple(map(int, found[1].split(","))) == shape, f"{name}: bench.h has {found and found[1]}")
    if not bench.torch.cuda.is_available():
        tool("bench_torch_cuda", code=2, words=["no GPU"])

def test_lambda_sweep(tmp):
    program, out = os.path.join(ROOT, "train_bitnet"), f"{tmp}/sweep"
    tool("lambda_sweep", "--binary", f"{tmp}/none", "--quick", code=2, words=["no program", "--binary"])
    if not os.path.exists(program):
        print("note: ./train_bitnet is not built; no sweep was run")
        return
    tool("lambda_sweep", "--binary", program, code=2, words=["--quick"])
    tool("lambda_sweep", "lr=1", "--binary", program, code=2, words=["model directory", "lr=1"])
    tool("lambda_sweep", "--quick", "m", "seed=3", "--binary", program, code=2, words=["seed=3", "itself"])
    tool("lambda_sweep", f"{tmp}/nowhere", "--binary", program, "--out", f"{tmp}/x", code=2, words=["ended with 2", "nowhere"])
    said = tool("lambda_sweep", "--quick", "--binary", program, "--out", out, "--seeds", 2, "--schedules", "none", "sigmoid", words=["ternary at once", "lowest", "after sigmoid"],
                limit=900)   # ten seconds of work; on a busy machine they may take minutes
    with open(f"{out}/sweep.json") as f:
        sweep = json.load(f)
    loss = sweep["held_out_loss"]
    check(list(loss) == ["float, before", "ternary at once", "none", "sigmoid"] and [len(v) for v in loss.values()] == [1, 1, 2, 2], f"rows {loss}")
    configs = []
    for name in ("none", "sigmoid"):
        for seed, run in enumerate(sweep["runs"][name], 1):
            _, evals, _ = runlog.read_log(run)
            logged = runlog.numbers(evals, "val_loss")
            check(abs(logged[-1][1] - loss[name][seed - 1]) < 5e-5 and [s for s, _ in logged] == [10, 20, 30], f"{name}: {logged} and {loss[name]}")
            check([tuple(x) for x in sweep["curves"][name][seed - 1]] == [(0, loss["ternary at once"][0])] + logged, f"{name}: the curve")
            config = runlog.read_json(f"{run}/config.json")
            check(config["lambda_schedule"] == name and config["seed"] == seed, f"{name}: options of the run")
            configs.append({k: v for k, v in config.items() if k not in ("lambda_schedule", "seed", "name")})
    check(all(c == configs[0] for c in configs), "the runs differ in more than the schedule")
    check(min(sum(v) / 2 for v in (loss["none"], loss["sigmoid"])) == sum(loss[sweep["lowest"]]) / 2, "the lowest")
    with open(f"{out}/samples.txt") as f:
        samples = f.read()
    check(all(f"--- {n} ---\n12+34=" in samples for n in ("float, before", "ternary at once", "after none", "after sigmoid")), "samples")
    check(said.startswith("lambda") or "lambda  " in said, "the table")
    check(os.path.exists(f"{out}/curves.png") == has("matplotlib"), "curves.png")
    tool("lambda_sweep", "--quick", "--binary", program, "--out", out, code=2, words=["another sweep"])
    tool("lambda_sweep", "--quick", "--binary", program, "--out", f"{tmp}/bad", "--schedules", "liner", code=2, words=["lambda_schedule", "liner"], limit=900)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        for test in (test_status, test_anomalies, test_plot, test_follow, test_cost, test_lambda_sweep, test_bench_torch_cuda):
            folder = f"{tmp}/{test.__name__}"
            os.makedirs(folder)
            test(folder) if test.__code__.co_argcount else test()
            print(test.__name__, flush=True)
    finish()


if __name__ == "__main__":
    main()
