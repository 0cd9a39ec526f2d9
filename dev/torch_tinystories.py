#!/usr/bin/env python3
"""The peer: trains the model of a run in PyTorch, with the same data in the same order and the same initial weights.

    ./train_bitnet tinystories data='data/tinystories/train_*.bin' val_data='data/tinystories/val_*.bin' steps=500 eval_every=100
    python dev/torch_tinystories.py runs/latest                # the same run again; compares validation losses; exit 1 beyond 1 %
    python dev/torch_tinystories.py runs/latest --init runs/start/checkpoints/step_000001

It reads RUN/config.json (the resolved options), the shards that it names, and RUN/log.jsonl to compare with. The initial weights are computed as
model_init_random does, or read from a checkpoint (--init). Nothing here calls the C program: data order, initialisation, quantisers, model,
schedules and AdamW are written down again in plain PyTorch, so an error on either side shows as a difference. Text models only, with ternary
weights per matrix and int8 activations per token (act_bits 8, 4 or 0), on the CPU or, with --device cuda, on a GPU.
"""
import argparse
import glob
import json
import math
import os
import struct
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import runlog

U = np.uint64
RNG_INIT, RNG_DATA, IGNORE = 1, 2, -1


# ---- the counter-based random numbers of bitnet/utils.h ----------------------------------------------------

def rng_mix(z):
    z = z + U(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    return z ^ (z >> U(31))


def rng_u64(seed, stream, counter):
    """counter: a number or an array."""
    with np.errstate(over="ignore"):
        key = rng_mix(rng_mix(np.asarray([seed], dtype=U)) ^ U(stream))
        return rng_mix(key ^ np.asarray(counter, dtype=U))


def rng_normal(seed, counter):
    counter = np.asarray(counter, dtype=U)
    with np.errstate(over="ignore"):
        u, v = (((rng_u64(seed, RNG_INIT, U(2) * counter + U(k)) >> U(11)).astype(np.float64) * 2.0 ** -53) for k in (0, 1))
    return np.sqrt(-2.0 * np.log(1.0 - u)) * np.cos(6.283185307179586 * v)


# ---- data: dataloader.h ------------------------------------------------------------------------------------

def permute(x, n, key):
    """The Feistel shuffle."""
    h = 1
    while h < 32 and (n - 1) >> (2 * h):
        h += 1
    mask = (1 << h) - 1
    while True:
        left, right = x >> h, x & mask
        for r in range(6):
            left, right = right, left ^ (int(rng_u64(key, RNG_DATA, (r << 32) | right)[0]) & mask)
        x = left << h | right
        if x < n:
            return x


class Shards:
    """Files of patterns "a_*.bin", "a_*.bin,b_*.bin" or "a_*.bin:0.7,b_*.bin:0.3"."""

    def __init__(self, patterns, T, seed, shuffle):
        self.T, self.seed, self.shuffle, self.eot, self.sources = T, seed, shuffle, -1, []
        items = [p.rsplit(":", 1) if is_weighted(p) else (p, None) for p in patterns.split(",")]
        weights = [float(w) for _, w in items if w is not None]
        groups = [[self.open(f) for f in sorted(glob.glob(p)) or runlog.fail(f"no file matches {p}")] for p, _ in items]
        if not weights:
            groups, weights = [sum(groups, [])], [1.0]
        rest = [sum(weights[i:]) for i in range(len(weights))]
        self.splits = [int(w / r * 2 ** 32 + 0.5) if r > 0 else 0 for w, r in zip(weights, rest)]
        self.sources = groups
        self.blocks = [sum((len(t) - 1) // T for t, _ in g) for g in groups]

    def open(self, path):
        with open(path, "rb") as f:
            header = struct.unpack("<256I", f.read(1024))
        if header[0] not in (20240520, 20240801):
            runlog.fail(f"{path} is no token shard")
        kind = np.dtype("<u2" if header[0] == 20240520 else "<u4")
        tokens = np.memmap(path, kind, "r", 1024, (header[2],))
        bits = np.fromfile(path, np.uint8, offset=1024 + header[2] * kind.itemsize) if header[8] else None
        trained = np.unpackbits(bits, bitorder="little")[:header[2]].astype(bool) if header[8] else None
        if header[7]:
            self.eot = header[7] - 1
        return tokens, trained

    def row(self, row):
        """tokens, targets, start, pos of row `row` of the run."""
        r, i = row, 0
        while True:
            before, after = r * self.splits[i] >> 32, (r + 1) * self.splits[i] >> 32
            if i + 1 == len(self.splits) or after > before:
                break
            r, i = r - before, i + 1
        epoch, block = divmod(before, self.blocks[i])
        if self.shuffle:
            block = permute(block, self.blocks[i], int(rng_u64(self.seed, RNG_DATA, i << 48 | epoch)[0]))
        for tokens, trained in self.sources[i]:
            n = (len(tokens) - 1) // self.T
            if block < n:
                break
            block -= n
        at = block * self.T
        x = tokens[at:at + self.T + 1].astype(np.int64)
        targets = x[1:].copy()
        targets[x[:-1] == self.eot] = IGNORE
        if trained is not None:
            targets[~trained[at + 1:at + self.T + 1]] = IGNORE
        ends = np.flatnonzero(x[:-1] == self.eot) + 1
        start = np.zeros(self.T, np.int64)
        for e in ends[ends < self.T]:
            start[e:] = e
        return x[:-1], targets, start, np.arange(self.T) - start

    def batch(self, index, B):
        rows = [self.row(index * B + r) for r in range(B)]
        return [torch.from_numpy(np.stack(c)) for c in zip(*rows)]


def is_weighted(pattern):
    head, colon, tail = pattern.rpartition(":")
    try:
        return bool(colon) and float(tail) >= 0
    except ValueError:
        return False


# ---- the model: bitnet/model.h, quant.h --------------------------------------------------------------------

def tensor_table(c):
    """[(name, shape, kind)] in the order of the C program: its place is a part of the random counter."""
    dim, heads, kv, hd, ffn = c["dim"], c["heads"], c["kv_heads"], c["head_dim"], c["ffn_dim"]
    out = [("model.embed_tokens.weight", (c["vocab"], dim), "embed")]
    for i in range(c["layers"]):
        p = f"model.layers.{i}."
        out.append((p + "input_layernorm.weight", (dim,), "norm"))
        out += [(p + f"self_attn.{n}_proj.weight", (rows * hd, dim), "ternary") for n, rows in (("q", heads), ("k", kv), ("v", kv))]
        if c["attn_sub_norm"]:
            out.append((p + "self_attn.attn_sub_norm.weight", (heads * hd,), "norm"))
        out += [(p + "self_attn.o_proj.weight", (dim, heads * hd), "ternary"), (p + "post_attention_layernorm.weight", (dim,), "norm")]
        out += [(p + f"mlp.{n}_proj.weight", (ffn, dim), "ternary") for n in ("gate", "up")]
        if c["ffn_sub_norm"]:
            out.append((p + "mlp.ffn_sub_norm.weight", (ffn,), "norm"))
        out.append((p + "mlp.down_proj.weight", (dim, ffn), "ternary"))
    out.append(("model.norm.weight", (dim,), "norm"))
    if not c["tie_embeddings"]:
        out.append(("lm_head.weight", (c["vocab"], dim), "embed"))
    return out


def initial_weights(c):
    """model_init_random: matrices and embeddings ~ N(0, init_std), gains 1."""
    out = {}
    for i, (name, shape, kind) in enumerate(tensor_table(c)):
        if kind == "norm":
            out[name] = torch.ones(shape)
            continue
        n = int(np.prod(shape))
        values = np.empty(n, np.float32)
        for at in range(0, n, 1 << 20):
            k = np.arange(at, min(n, at + (1 << 20)), dtype=np.uint64)
            values[at:at + len(k)] = np.float32(c["init_std"]) * rng_normal(c["seed"], U(i << 40) | k).astype(np.float32)
        out[name] = torch.from_numpy(values.reshape(shape))
    return out


def weight_quant(w, lam):
    """Absmean ternary with the straight-through gradient."""
    gamma = w.abs().mean().clamp(min=1e-5)
    q = (w * (1.0 / gamma)).round().clamp(-1, 1) * gamma
    return w + (lam * (q - w)).detach()


def act_quant(x, lam, bits):
    """Absmax per token with the straight-through gradient."""
    if not bits:
        return x
    levels = 2 ** (bits - 1) - 1
    s = levels / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x * s).round().clamp(-levels - 1, levels) / s
    return x + (lam * (q - x)).detach()


def rmsnorm(x, gain, eps):
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class Model(torch.nn.Module):
    def __init__(self, c, weights):
        super().__init__()
        self.c = c
        self.names = [name for name, _, _ in tensor_table(c)]
        self.kinds = {name: kind for name, _, kind in tensor_table(c)}
        self.p = torch.nn.ParameterDict({n.replace(".", "/"): torch.nn.Parameter(weights[n].clone().float()) for n in self.names})
        half = c["head_dim"] // 2
        # In float32 as the C program: the frequencies, the angles, then sine and cosine of those.
        inv = (1.0 / torch.tensor(c["rope_theta"], dtype=torch.float32) ** (torch.arange(half, dtype=torch.float32) * 2 / c["head_dim"]))
        angle = torch.arange(c["seq_len"], dtype=torch.float32)[:, None] * inv[None]
        self.register_buffer("cos", angle.double().cos().float())
        self.register_buffer("sin", angle.double().sin().float())

    def w(self, name):
        return self.p[name.replace(".", "/")]

    def linear(self, x, name, lam):
        """BitLinear: x is already quantised."""
        return F.linear(x, weight_quant(self.w(name), lam))

    def rope(self, x, pos):
        cos, sin = self.cos[pos][:, None], self.sin[pos][:, None]      # [B,1,T,half]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, tokens, start, pos, lam):
        c, eps, bits = self.c, self.c["norm_eps"], self.c["act_bits"]
        B, T = tokens.shape
        t = torch.arange(T, device=tokens.device)
        # Position t sees start[t] .. t.
        mask = ((t[None, None, :] <= t[None, :, None]) & (t[None, None, :] >= start[:, :, None]))[:, None]
        x = F.embedding(tokens, self.w("model.embed_tokens.weight"))
        for i in range(c["layers"]):
            p = f"model.layers.{i}."
            h = act_quant(rmsnorm(x, self.w(p + "input_layernorm.weight"), eps), lam, bits)
            q, k, v = (self.linear(h, p + f"self_attn.{n}_proj.weight", lam).view(B, T, -1, c["head_dim"]).transpose(1, 2) for n in "qkv")
            q, k = self.rope(q, pos), self.rope(k, pos)
            group = c["heads"] // c["kv_heads"]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            att = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, -1)
            if c["attn_sub_norm"]:
                att = rmsnorm(att, self.w(p + "self_attn.attn_sub_norm.weight"), eps)
            x = x + self.linear(act_quant(att, lam, bits), p + "self_attn.o_proj.weight", lam)
            h = act_quant(rmsnorm(x, self.w(p + "post_attention_layernorm.weight"), eps), lam, bits)
            gate, up = (self.linear(h, p + f"mlp.{n}_proj.weight", lam) for n in ("gate", "up"))
            u = (F.relu(gate).square() if c["activation"] == "relu2" else F.silu(gate)) * up
            if c["ffn_sub_norm"]:
                u = rmsnorm(u, self.w(p + "mlp.ffn_sub_norm.weight"), eps)
            x = x + self.linear(act_quant(u, lam, bits), p + "mlp.down_proj.weight", lam)
        x = rmsnorm(x, self.w("model.norm.weight"), eps)
        return F.linear(x, self.w("model.embed_tokens.weight" if c["tie_embeddings"] else "lm_head.weight"))

    def loss_sum(self, batch, lam):
        """The sum of the losses of the valid targets, and how many there are."""
        tokens, targets, start, pos = batch
        logits = self(tokens, start, pos, lam)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORE, reduction="sum"), int((targets != IGNORE).sum())


# ---- schedules and the optimizer: bitnet/optim.h, quant.h --------------------------------------------------

def lr_at(c, t):
    T, kind, peak = c["steps"], c["lr_schedule"], c["lr"]
    W = min(c["warmup_steps"], T)
    low = c["min_lr"] if c["min_lr"] >= 0 else 0 if kind in ("faq", "wsd") else (0.01 if kind == "two_stage" else 0.1) * peak
    second = c["stage2_lr"] if c["stage2_lr"] >= 0 else peak * 2 / 3
    if t < W:
        return peak * (t + 1) / W
    p = min(1.0, (t - W) / max(1, T - W))
    if kind == "cosine":
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * p))
    if kind == "linear":
        return peak + (low - peak) * p
    if kind == "wsd":
        D = c["decay_ratio"] * T
        return peak if t < T - D or D <= 0 else peak + (low - peak) * min(1.0, (t - (T - D)) / D)
    if kind == "two_stage":
        half = 0.5 * T
        return peak + (second - peak) * ((t - W) / max(1.0, half - W)) if t < half else second + (low - second) * ((t - half) / max(1.0, half))
    if kind == "faq":
        return (peak if t < 0.5 * T else second) * (1 - p)
    return peak


def lambda_at(c, t):
    T, kind, k = c["steps"], c["lambda_schedule"], c["lambda_k"]
    W = c["lambda_warmup_steps"] if c["lambda_warmup_steps"] >= 0 else int(c["lambda_warmup_frac"] * T)
    u, ramp = min(1.0, t / T), t / W if t < W else 1.0
    if kind == "exponential":
        return 1 - (1 - u) ** (k if k > 0 else 8)
    if kind == "sigmoid":
        k = k if k > 0 else 100
        s = lambda x: 1 / (1 + math.exp(-k * x))
        return (s(u - 0.5) - s(-0.5)) / (s(0.5) - s(-0.5))
    return {"warmup": ramp, "linear": u, "accelerated": min(1.0, 2 * u), "cosine": 0.5 * (1 - math.cos(math.pi * ramp)),
            "step": 0.25 * (1 + min(3, int(4 * u)))}.get(kind, 1.0)


class AdamW:
    def __init__(self, model):
        self.items = [(model.w(n), torch.zeros_like(model.w(n)), torch.zeros_like(model.w(n)), model.kinds[n] != "norm") for n in model.names]

    @torch.no_grad()
    def step(self, t, scale, lr, wd, c):
        """t counts from 1. Matrices and embeddings decay, gains do not."""
        fix1, fix2 = 1 / (1 - c["beta1"] ** t), 1 / (1 - c["beta2"] ** t)
        for p, m, v, decays in self.items:
            g = p.grad * scale
            m.mul_(c["beta1"]).add_(g, alpha=1 - c["beta1"])
            v.mul_(c["beta2"]).addcmul_(g, g, value=1 - c["beta2"])
            p.mul_(1 - lr * (wd if decays else 0)).addcdiv_(m, (v * fix2).sqrt_().add_(c["eps"]), value=-lr * fix1)


# ---- the run -----------------------------------------------------------------------------------------------

def read_config(run):
    c = runlog.read_json(os.path.join(run, "config.json"))
    if not c.get("dim"):
        runlog.fail(f"{run}/config.json is no configuration of a training run")
    if c["data"] == "arithmetic":
        runlog.fail("this run trained arithmetic, which makes its own data; give a run on token shards")
    for key in ("qkv_bias", "o_bias", "qk_norm"):
        if c.get(key):
            runlog.fail(f"{key}=1 is not written down here; only models from scratch are compared")
    if c.get("rope_scaling", "none") != "none" or c.get("init"):
        runlog.fail("rope_scaling and init= are not written down here; only models from scratch are compared")
    c["kv_heads"] = c["kv_heads"] or c["heads"]
    c["head_dim"] = c["head_dim"] or c["dim"] // c["heads"]
    return c


def evaluate(model, val, c, B, device):
    """evaluation_run: the mean over the targets of eval_batches batches, at lambda = 1."""
    if val is None:
        return None
    n = max(1, min(c["eval_batches"], sum(val.blocks) // B))
    total = count = 0
    with torch.no_grad():
        for i in range(n):
            loss, k = model.loss_sum([x.to(device) for x in val.batch(i, B)], 1.0)
            total, count = total + float(loss), count + k
    return total / max(1, count)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="the run to repeat: a folder, or a name in runs/")
    p.add_argument("--init", help="a checkpoint directory with the initial weights (default: computed from the seed)")
    p.add_argument("--steps", type=int, help="stop after so many steps; schedules stay those of the whole run")
    p.add_argument("--eval-every", type=int, help="steps between evaluations (default: the run's eval_every)")
    p.add_argument("--tolerance", type=float, default=0.01, help="largest relative difference of a validation loss (default %(default)s)")
    p.add_argument("--threads", type=int, help="PyTorch's threads")
    p.add_argument("--device", default="cpu")
    p.add_argument("--autocast", action="store_true", help="bf16 products (faster; the C program's precision=bf16)")
    p.add_argument("--check-init", action="store_true", help="only compare --init with the weights that the seed gives")
    p.add_argument("--out", help="write the losses to this JSON file")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run = runlog.find_run(args.run)
    c = read_config(run)
    B, T, accum, device = c["batch_size"], c["seq_len"], c["grad_accum"], args.device
    weights = initial_weights(c)
    if args.init:
        from safetensors.torch import load_file
        loaded = load_file(os.path.join(args.init, "model.safetensors"))
        worst = max(float((loaded[n].float() - w).abs().max()) for n, w in weights.items())
        print(f"initial weights: {args.init} against the seed's: largest difference {worst:.3g}")
        if args.check_init:
            sys.exit(worst > 1e-7)
        weights = {n: loaded[n] for n in weights}
    model = Model(c, weights).to(device)
    print(f"{sum(x.numel() for x in model.parameters()) / 1e6:.2f} M parameters, {B} x {T} x {accum} tokens a step, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    train = Shards(c["data"], T, c["seed"], True)
    val = Shards(c["val_data"], T, c["seed"], False) if c.get("val_data") else None
    if val is not None and val.eot < 0:
        val.eot = train.eot
    optimizer, every = AdamW(model), args.eval_every or c["eval_every"]
    theirs = {r["step"]: r.get("val_loss") for r in runlog.read_log(run)[1]}
    their_loss = {r["step"]: r["loss"] for r in runlog.read_log(run)[0]}
    steps, worst, log, began = min(args.steps or c["steps"], c["steps"]), 0.0, [], time.time()
    for step in range(steps):
        lam, lr = lambda_at(c, step), lr_at(c, step)
        micro = [[x.to(device) for x in train.batch(step * accum + i, B)] for i in range(accum)]
        targets = sum(int((b[1] != IGNORE).sum()) for b in micro)
        model.zero_grad(set_to_none=False)
        total = 0.0
        for batch in micro:
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=args.autocast):
                loss, _ = model.loss_sum(batch, lam)
            (loss / max(1, targets)).backward()
            total += float(loss.detach())
        norm = math.sqrt(sum(float(x.grad.double().pow(2).sum()) for x in model.parameters()))
        loss = total / max(1, targets)
        scale = min(1.0, c["grad_clip"] / (norm + 1e-6)) if c["grad_clip"] > 0 else 1.0
        wd = c["weight_decay"] if step < c["wd_off_at"] * c["steps"] else 0.0
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step(step + 1, scale, lr, wd, c)
        done = step + 1
        mine = their_loss.get(done)
        log.append({"step": done, "loss": loss, "grad_norm": norm})
        if done <= 3 or done % 10 == 0 or done == steps:
            print(f"step {done:6}  loss {loss:.5f}" + (f"  C {mine:.5f}" if mine is not None else "") + f"  lambda {lam:.3f}  lr {lr:.2e}  norm {norm:.4f}  {done * B * T * accum / (time.time() - began):.0f} tok/s", flush=True)
        if (every and done % every == 0) or done == steps:
            v = evaluate(model, val, c, B, device)
            if v is None:
                continue
            log.append({"step": done, "val_loss": v})
            other = theirs.get(done)
            if other is not None:
                worst = max(worst, abs(other - v) / v)
            print(f"validation at step {done}: torch {v:.5f}" + (f", C {other:.5f}, difference {100 * (other - v) / v:+.3f} %" if other is not None else ""), flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump(log, f)
    compared = sum(1 for r in log if "val_loss" in r and theirs.get(r["step"]) is not None)
    print(f"{compared} validation losses compared, largest difference {100 * worst:.3f} % (allowed {100 * args.tolerance:.1f} %), {time.time() - began:.0f} s")
    sys.exit(1 if worst > args.tolerance else 0)


if __name__ == "__main__":
    main()
