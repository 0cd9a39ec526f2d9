"""
bench_torch.py: a training step of ours and of PyTorch, side by side in one run.

What it is:  the three models of `./train_bitnet bench train`, written in plain PyTorch the way people write them, in three forms:
               eager      fp32, fake quantisation, no compiler
               quant      the same under torch.compile and bf16 autocast: the best that quantisation-aware training gives
               float      no quantisation at all, torch.compile and bf16 autocast: the best plain float model
             Rounds alternate between the programs, because the machine's speed drifts; what counts is the ratio of medians.
Needs:       torch (CPU build), a C compiler for torch.compile.

    python dev/bench_torch.py [--models 5.1m 12m 124m] [--rounds 5] [--forms eager quant float] [--threads 2]
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

#        B    T   dim layers heads kv  ffn  vocab
MODELS = {"5.1m": (64, 64, 256, 6, 8, 8, 768, 128), "12m": (16, 256, 384, 6, 8, 4, 1152, 2048), "124m": (4, 256, 768, 12, 12, 12, 2048, 50257)}


class BitLinear(nn.Linear):
    """Fake quantisation with straight-through gradients, or a plain layer."""

    def __init__(self, n_in, n_out, quantised):
        super().__init__(n_in, n_out, bias=False)
        self.quantised = quantised
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        w = self.weight
        if self.quantised:
            s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = x + ((x * s).round().clamp(-128, 127) / s - x).detach()
            g = 1 / w.abs().mean().clamp(min=1e-5)
            w = w + ((w * g).round().clamp(-1, 1) / g - w).detach()
        return F.linear(x, w)


class RMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, heads, kv, ffn, q):
        super().__init__()
        self.h, self.kv, self.hs = heads, kv, dim // heads
        self.q, self.k = BitLinear(dim, dim, q), BitLinear(dim, kv * self.hs, q)
        self.v, self.o = BitLinear(dim, kv * self.hs, q), BitLinear(dim, dim, q)
        self.gate, self.up, self.down = BitLinear(dim, ffn, q), BitLinear(dim, ffn, q), BitLinear(ffn, dim, q)
        self.n1, self.n2, self.sub1, self.sub2 = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim), RMSNorm(ffn)

    def rope(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        h = self.n1(x)
        q = self.rope(self.q(h).view(B, T, self.h, self.hs).transpose(1, 2), cos, sin)
        k = self.rope(self.k(h).view(B, T, self.kv, self.hs).transpose(1, 2), cos, sin)
        v = self.v(h).view(B, T, self.kv, self.hs).transpose(1, 2)
        a = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=self.kv != self.h)
        x = x + self.o(self.sub1(a.transpose(1, 2).reshape(B, T, C)))
        h = self.n2(x)
        return x + self.down(self.sub2(F.relu(self.gate(h)).square() * self.up(h)))


class Net(nn.Module):
    def __init__(self, shape, quantised):
        super().__init__()
        _, T, dim, layers, heads, kv, ffn, vocab = shape
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, kv, ffn, quantised) for _ in range(layers))
        self.norm = RMSNorm(dim)
        angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, dim // heads, 2) / (dim // heads))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, targets):
        x = self.embed(ids)
        for b in self.blocks:
            x = b(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Torch:
    """One form of one model; step() trains on a random batch and returns seconds."""

    def __init__(self, name, form):
        B, T, *_, vocab = shape = MODELS[name]
        self.net, self.form = Net(shape, form != "float"), form
        self.run = self.net if form == "eager" else torch.compile(self.net)
        decay = [p for p in self.net.parameters() if p.ndim == 2]
        rest = [p for p in self.net.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}], lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ids, self.targets = torch.randint(vocab, (B, T)), torch.randint(vocab, (B, T))

    def step(self):
        t0 = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.form != "eager"):
            loss = self.run(self.ids, self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - t0


def ours(binary, name, threads):
    """{lambda: tokens/s} of our program. It looks at its start whether others compute; PyTorch's threads spin for a while after a step."""
    time.sleep(1)
    out = subprocess.run([binary, "bench", f"train/{name}", f"threads={threads}"], capture_output=True, text=True, check=True).stdout
    return {line.split("lambda=")[1].split()[0]: float(line.split()[-2]) for line in out.splitlines()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=["eager", "quant", "float"], choices=["eager", "quant", "float"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", default="./train_bitnet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'model':6} {'program':22} {'tokens/s':>10}   ours (lambda = 1) is")
    for name in args.models:
        B, T, *_ = MODELS[name]
        peers = {form: Torch(name, form) for form in args.forms}
        for peer in peers.values():   # compiles
            peer.step()
            peer.step()
        speed = {form: [] for form in args.forms} | {"1": [], "0.5": []}
        for _ in range(args.rounds):
            for form, peer in peers.items():
                speed[form].append(B * T / statistics.median(peer.step() for _ in range(3)))
            for lam, value in ours(args.binary, name, args.threads).items():
                speed[lam].append(value)
        median = {k: statistics.median(v) for k, v in speed.items()}
        for key, label in [("1", "ours, lambda = 1"), ("0.5", "ours, lambda < 1")] + [(f, f"PyTorch {f}") for f in args.forms]:
            ratio = "" if key == "1" else f"{median['1'] / median[key]:6.2f} x as fast"
            print(f"{name:6} {label:22} {median[key]:10.0f}   {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
