"""
bench_torch_cuda.py: training on a GPU, ours and PyTorch's, side by side in one run.

What it is:  two models at T = 1024, 124M and 1.3B parameters, each with the largest batch (a power of two) that fits, in three programs:
               ours     ./train_bitnetcu bench train/MODEL/BATCH: lambda = 1 and lambda < 1
               float    no quantisation, torch.compile, bf16 autocast: the best plain float model
               quant    fake quantisation, torch.compile, bf16 autocast: the best that quantisation-aware training gives
             All do the same step: forward, backward, clipping by the global norm, AdamW with fp32 master weights. Each program finds its
             own batch; rounds alternate between the programs, and what counts is the ratio of medians. "Share of peak" counts 6
             operations for each matrix weight and token and 6 T dim layers for attention, against the bf16 peak that `bench peaks`
             measures; it may exceed 100 % at lambda = 1, where the forward products are int8.
             Everything that is printed, with date, device and versions, is saved under dev/results/.
Needs:       a GPU, torch with CUDA, make train_bitnetcu. Where one of them is missing it says so and exits with 2.
Read before: bench_torch.py, whose model this is.

    python dev/bench_torch_cuda.py [--models 124m_t1024 1.3b_t1024] [--rounds 5] [--forms float quant]
"""

import argparse
import datetime
import gc
import os
import re
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from bench_torch import Net

HERE = os.path.dirname(os.path.abspath(__file__))
T = 1024
#                     dim   layers heads kv  ffn  vocab; as in modes/bench.h
MODELS = {"124m_t1024": (768, 12, 12, 12, 2048, 50257), "1.3b_t1024": (2048, 24, 32, 32, 5460, 32000)}
LARGEST_BATCH = 256


def refuse(why):
    print(f"bench_torch_cuda.py: {why}", file=sys.stderr)
    sys.exit(2)


def operations_per_token(model):
    dim, layers, heads, kv, ffn, vocab = MODELS[model]
    matrices = layers * (dim * dim * 2 + 2 * dim * dim * kv // heads + 3 * dim * ffn) + vocab * dim
    return 6 * matrices + 6 * T * dim * layers   # causal attention: half of 12 T dim


class Torch:
    """One form of one model at one batch size; step() trains on a random batch."""

    def __init__(self, model, form, batch, device="cuda"):
        dim, layers, heads, kv, ffn, vocab = MODELS[model]
        with torch.device(device):
            self.net = Net((batch, T, dim, layers, heads, kv, ffn, vocab), form == "quant")
            self.ids, self.targets = torch.randint(vocab, (batch, T)), torch.randint(vocab, (batch, T))
        self.device, self.run = device, torch.compile(self.net)
        decay = [p for p in self.net.parameters() if p.ndim == 2]
        rest = [p for p in self.net.parameters() if p.ndim != 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self):
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.run(self.ids, self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tokens_per_second(self, steps=7):
        """The median of some steps, each waited for."""
        times = []
        for _ in range(steps):
            torch.cuda.synchronize()
            t0 = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - t0)
        return self.ids.numel() / statistics.median(times)


def torch_round(model, form, batch):
    """Builds, warms up, measures and frees; None if it does not fit."""
    peer = None
    try:
        peer = Torch(model, form, batch)
        for _ in range(3):   # compiles
            peer.step()
        return peer.tokens_per_second()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        del peer
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def ours_round(binary, model, batch):
    """{"1": tokens/s, "0.5": tokens/s} by lambda; None if it does not fit."""
    run = subprocess.run([binary, "bench", f"train/{model}/{batch}"], capture_output=True, text=True)
    if run.returncode != 0:
        if "out of memory" in run.stderr:
            return None
        raise RuntimeError(f"{' '.join(run.args)}: exit {run.returncode}: {run.stderr}")
    return parse_rows(run.stdout)


def parse_rows(text):
    rows = {m[1]: float(m[2]) for m in re.finditer(r"^train_step .*lambda=(\S+)\s+(\S+) tokens/s$", text, re.M)}
    if set(rows) != {"1", "0.5"}:
        raise RuntimeError(f"bench train printed something else: {text!r}")
    return rows


def largest_batch(measure):
    """The largest power of two that fits, and what was measured there."""
    batch = LARGEST_BATCH
    while batch >= 1:
        result = measure(batch)
        if result is not None:
            return batch, result
        batch //= 2
    return 0, None


def bf16_peak(binary):
    out = subprocess.run([binary, "bench", "peaks"], capture_output=True, text=True, check=True).stdout
    return float(re.search(r"^peak_bf16\s+(\S+) GFLOP/s$", out, re.M)[1]) * 1e9


def compare(model, args, say):
    """Prints the table of one model."""
    peak, cost = bf16_peak(args.binary), operations_per_token(model)
    measures = {"ours": lambda b: ours_round(args.binary, model, b)}
    for form in args.forms:
        measures[form] = lambda b, form=form: torch_round(model, form, b)
    batch, speed = {}, {}
    for name, measure in measures.items():
        batch[name], first = largest_batch(measure)
        if first is None:
            say(f"{model}: {name} does not fit even with a batch of 1")
            return
        say(f"  {model} {name}: batch {batch[name]}: {first}")
        for key, value in (first if name == "ours" else {name: first}).items():
            speed[key] = [value]
    for _ in range(args.rounds - 1):
        for name, measure in measures.items():
            result = measure(batch[name])
            if result is None:
                raise RuntimeError(f"{model} {name}: batch {batch[name]} fitted before and does not now; is the GPU shared?")
            say(f"  {model} {name}: {result}")
            for key, value in (result if name == "ours" else {name: result}).items():
                speed[key].append(value)
    median = {key: statistics.median(values) for key, values in speed.items()}
    say(f"{'model':11} {'program':28} {'batch':>5} {'tokens/s':>10} {'of peak':>8}   ours (lambda = 1) is")
    labels = [("1", "ours", "ours, lambda = 1"), ("0.5", "ours", "ours, lambda < 1")]
    labels += [(form, form, f"PyTorch {form}, compiled") for form in args.forms]
    for key, name, label in labels:
        ratio = "" if key == "1" else f"{median['1'] / median[key]:6.2f} x as fast"
        say(f"{model:11} {label:28} {batch[name]:5} {median[key]:10.0f} {100 * median[key] * cost / peak:6.1f} %   {ratio}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=["float", "quant"], choices=["float", "quant"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--binary", default="./train_bitnetcu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        refuse("no GPU that torch can use; on a CPU run dev/bench_torch.py")
    if not os.access(args.binary, os.X_OK):
        refuse(f"{args.binary} is missing; build it with: make train_bitnetcu")
    torch.set_float32_matmul_precision("high")
    device, now = torch.cuda.get_device_name(), datetime.datetime.now()
    path = os.path.join(HERE, "results", f"bench_torch_cuda_{now:%Y%m%d_%H%M%S}_{re.sub(r'[^A-Za-z0-9]+', '-', device)}.txt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as out:
        def say(line):
            print(line, flush=True)
            out.write(line + "\n")
            out.flush()
        commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
        say(f"{now:%Y-%m-%d %H:%M} {device}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit or 'unknown'}")
        say(f"command: {' '.join(sys.argv)}")
        for model in args.models:
            compare(model, args, say)
    print(f"saved: {path}")


if __name__ == "__main__":
    sys.exit(main())
