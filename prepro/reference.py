"""
reference.py: every operation of a BitNet b1.58 model a second time, in PyTorch, as the yardstick of the C code.

What it is:  a readable model whose gradients come from autograd, and a writer of small named-tensor dumps (safetensors) that
             `make test` compares with: ops (one operation at a time), model_a, model_b, model_c (whole models: logits, loss,
             gradients, ten steps of AdamW) and model_hf (the same from transformers' own BitNetForCausalLM).
What not:    no training, no files of the user, and no speed. Nothing here is read by the C programs.
Needs:       torch, transformers, accelerate, safetensors, numpy.

    python prepro/reference.py            writes dev/test/ref/*.safetensors and prints what is in them
    python prepro/reference.py --check    computes everything again and compares with the files; exit 1 on a difference

Numbers. Everything is computed in float64 and stored as float32, so what a test measures is the error of the code under test and
not the rounding of two programs, and a rerun on another CPU gives the same bits. Parameters and inputs are float32 numbers from the
start. Only the angles of RoPE are float32, because they are float32 in transformers.

Rounding. A quantiser is a staircase: when a value lies on the edge of a step, the last bit of a float decides which code it gets,
and one code changes the logits by far more than any error bound. So the inputs are chosen: tokens and seeds are drawn until no
value that is rounded lies close to an edge (k + 1/2 for activations, 1/2 for weights). TIE_ACT and TIE_WEIGHT are the distances
that are enforced, in units of a code; float32 noise in these models stays below a tenth of them. The distances found are printed.
"""

import argparse
import math
import os
import sys
import tempfile

os.environ["TORCHDYNAMO_DISABLE"] = "1"   # transformers compiles its quantisers; plain functions give the same numbers at once

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

TIE_ACT = 2e-3
TIE_WEIGHT = 5e-5
FILES = ("ops", "model_a", "model_b", "model_c", "model_hf")
LAMBDAS = (0.0, 0.3, 1.0)
RAMP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)   # lambda in the ten steps
# eps is large so that the direction of an update does not hang on the sign of a gradient that is 0 but for noise.
ADAMW = {"lr": 2e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1, "clip": 1.0}
IGNORE = -1   # in targets: nothing to predict here


# ---------------------------------------------------------------------------------------------------------
# The quantisers.

def ternary(w):
    """codes in {-1,0,1} and the scale gamma of a matrix; how close the nearest value comes to a threshold."""
    gamma = w.abs().mean().clamp(min=1e-5)
    v = w * (1.0 / gamma)
    tie = (v.abs() - 0.5).abs().min().item()
    return v.round().clamp(-1, 1), gamma, tie


def act_codes(x, bits):
    """Integer codes, the scale of each row (value = code * scale), and each row's distance to the nearest rounding edge."""
    levels = 2 ** (bits - 1) - 1
    inverse = levels / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    v = x * inverse
    tie = (0.5 - (v - v.round()).abs()).amin(-1)
    return v.round().clamp(-levels - 1, levels), 1.0 / inverse, tie


def mix(v, quantised, lam):
    """v + lam (Q(v) - v) with the straight-through gradient: the difference is a constant."""
    return v + (lam * (quantised - v)).detach()


def quantised_input(x, bits, lam):
    if bits == 0 or lam == 0:
        return x
    codes, scale, _ = act_codes(x, bits)
    return mix(x, codes * scale, lam)


def quantised_weight(w, lam):
    if lam == 0:
        return w
    codes, gamma, _ = ternary(w)
    return mix(w, codes * gamma, lam)


def rmsnorm(x, gain, eps):
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def gate(z, activation):
    return z.clamp(min=0) ** 2 if activation == "relu2" else z * torch.sigmoid(z)


# ---------------------------------------------------------------------------------------------------------
# Position and attention.

def rope_angles(c, positions):
    """[positions, HS/2] angles in float32, step by step as transformers computes them."""
    half = torch.arange(0, c["head_dim"], 2, dtype=torch.float32)
    inv = 1.0 / (float(c["rope_theta"]) ** (half / c["head_dim"]))
    if c["rope_llama3"]:
        wavelength = 2 * math.pi / inv
        low, high, original = c["rope_low_freq"], c["rope_high_freq"], c["rope_original_max"]
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * inv / c["rope_factor"] + smooth * inv
        inv = torch.where(wavelength > original / low, inv / c["rope_factor"], torch.where(wavelength < original / high, inv, blended))
    return torch.arange(positions, dtype=torch.float32)[:, None] * inv[None, :]


def rope(x, angle, direction=1):
    """Rotates the pairs (i, i + HS/2) of x [..., heads, HS] by angle [..., HS/2]."""
    half = x.shape[-1] // 2
    cos, sin = angle.double().cos().unsqueeze(-2), direction * angle.double().sin().unsqueeze(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(q, k, v, start):
    """
    q [B,T,NH,HS], k, v [B,T,NKV,HS]; position t sees start[b,t] .. t. Returns the output [B,T,NH*HS] and the log of the softmax's
    denominators [B,T,NH].
    """
    B, T, NH, HS = q.shape
    k, v = (z.repeat_interleave(NH // z.shape[2], 2) for z in (k, v))
    scores = torch.einsum("bthi,bshi->bhts", q, k) / math.sqrt(HS)
    at = torch.arange(T)
    visible = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= start[:, :, None])
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    out = torch.einsum("bhts,bshi->bthi", scores.softmax(-1), v)
    return out.reshape(B, T, NH * HS), scores.logsumexp(-1).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------
# The model. Tensors carry the names that they have in a Hugging Face checkpoint.

BASE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab": 40, "max_seq": 16, "norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_llama3": 0, "rope_factor": 8.0, "rope_low_freq": 1.0, "rope_high_freq": 4.0,
        "rope_original_max": 64, "activation": "relu2", "attn_sub_norm": 1, "ffn_sub_norm": 1, "qkv_bias": 0, "o_bias": 0,
        "qk_norm": 0, "tie_embeddings": 1, "act_bits": 8}
CONFIGS = {
    "model_a": BASE,
    "model_b": {**BASE, "dim": 24, "head_dim": 10, "ffn_dim": 40, "vocab": 37, "activation": "silu", "attn_sub_norm": 0,
                "ffn_sub_norm": 0, "qkv_bias": 1, "o_bias": 1, "qk_norm": 1, "tie_embeddings": 0, "rope_llama3": 1,
                "norm_eps": 1e-6},
    "model_c": {**BASE, "dim": 24, "heads": 3, "kv_heads": 3, "ffn_dim": 44, "ffn_sub_norm": 0, "tie_embeddings": 0, "act_bits": 0},
    "model_hf": {**BASE, "rope_theta": 500000.0},
}


def param_shapes(c):
    C, V, ffn, HS = c["dim"], c["vocab"], c["ffn_dim"], c["head_dim"]
    Q, KV = c["heads"] * HS, c["kv_heads"] * HS
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not c["tie_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    for i in range(c["layers"]):
        layer = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
                 "self_attn.q_proj.weight": (Q, C), "self_attn.k_proj.weight": (KV, C), "self_attn.v_proj.weight": (KV, C),
                 "self_attn.o_proj.weight": (C, Q),
                 "mlp.gate_proj.weight": (ffn, C), "mlp.up_proj.weight": (ffn, C), "mlp.down_proj.weight": (C, ffn)}
        if c["qkv_bias"]:
            layer |= {"self_attn.q_proj.bias": (Q,), "self_attn.k_proj.bias": (KV,), "self_attn.v_proj.bias": (KV,)}
        if c["o_bias"]:
            layer |= {"self_attn.o_proj.bias": (C,)}
        if c["qk_norm"]:
            layer |= {"self_attn.q_norm.weight": (HS,), "self_attn.k_norm.weight": (HS,)}
        if c["attn_sub_norm"]:
            layer |= {"self_attn.attn_sub_norm.weight": (Q,)}
        if c["ffn_sub_norm"]:
            layer |= {"mlp.ffn_sub_norm.weight": (ffn,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def is_ternary(name):
    return name.endswith("_proj.weight")


def random_params(c, seed):
    """float32 numbers as float64 leaves; matrices scaled so that every activation is of order one; no weight near a threshold."""
    for attempt in range(1000):
        rng = np.random.RandomState(seed * 1000 + attempt)
        params = {}
        for name, shape in param_shapes(c).items():
            x = rng.standard_normal(shape)
            if name.endswith("norm.weight"):
                x = 1 + 0.2 * x
            elif name.endswith("bias"):
                x = 0.2 * x
            else:
                x = x * (0.5 if "embed" in name else shape[1] ** -0.5)
            params[name] = torch.tensor(x.astype(np.float32)).double().requires_grad_()
        if weight_tie(params) >= TIE_WEIGHT:
            return params
    raise SystemExit("no seed keeps the weights away from the threshold")


def weight_tie(params):
    return min(ternary(p.detach())[2] for name, p in params.items() if is_ternary(name))


class Model:
    """The network as functions of c (the shape) and params (name -> tensor)."""

    def __init__(self, c, params):
        self.c, self.params = c, params
        self.angles = rope_angles(c, c["max_seq"])
        self.taps = None   # a dict that collects intermediate tensors, if wanted

    def tap(self, name, x):
        if self.taps is not None:
            if x.requires_grad:
                x.retain_grad()
            self.taps[name] = x
        return x

    def bitlinear(self, x, names, lam, tap):
        """Products of one quantised input with several matrices. Remembers how close x came to a rounding edge."""
        p, bits = self.params, self.c["act_bits"]
        if bits and lam > 0:
            codes, scale, tie = act_codes(x.detach(), bits)
            self.tie = torch.minimum(self.tie, tie)
            if self.taps is not None:
                self.taps[tap + ".codes"], self.taps[tap + ".scale"] = codes.to(torch.int8), scale
        x = quantised_input(x, bits, lam)
        return [F.linear(x, quantised_weight(p[n + ".weight"], lam), p.get(n + ".bias")) for n in names]

    def layer(self, i, x, start, pos, lam):
        c, p, name = self.c, self.params, f"model.layers.{i}."
        B, T = pos.shape
        HS, eps = c["head_dim"], c["norm_eps"]
        att, mlp, tap = name + "self_attn.", name + "mlp.", f"layer{i}."
        self.tap(tap + "x", x)
        h = rmsnorm(x, p[name + "input_layernorm.weight"], eps)
        q, k, v = (y.view(B, T, -1, HS) for y in self.bitlinear(h, [att + "q_proj", att + "k_proj", att + "v_proj"], lam, tap + "h1"))
        if c["qk_norm"]:
            q, k = rmsnorm(q, p[att + "q_norm.weight"], eps), rmsnorm(k, p[att + "k_norm.weight"], eps)
        q, k = rope(q, self.angles[pos]), rope(k, self.angles[pos])
        self.tap(tap + "qkv", torch.cat([y.reshape(B, T, -1) for y in (q, k, v)], -1))
        a, _ = attention(q, k, v, start)
        a = self.tap(tap + "att", a)
        if c["attn_sub_norm"]:
            a = rmsnorm(a, p[att + "attn_sub_norm.weight"], eps)
        mid = self.tap(tap + "mid", x + self.bitlinear(a, [att + "o_proj"], lam, tap + "h2")[0])
        h = rmsnorm(mid, p[name + "post_attention_layernorm.weight"], eps)
        g, u = self.bitlinear(h, [mlp + "gate_proj", mlp + "up_proj"], lam, tap + "h3")
        self.tap(tap + "gate_up", torch.cat((g, u), -1))
        f = gate(g, c["activation"]) * u
        if c["ffn_sub_norm"]:
            f = rmsnorm(f, p[mlp + "ffn_sub_norm.weight"], eps)
        return self.tap(tap + "out", mid + self.bitlinear(f, [mlp + "down_proj"], lam, tap + "h4")[0])

    def forward(self, tokens, start, pos, lam):
        """[B,T] int64 each -> logits [B,T,V]. self.tie [B,T]: the distance of every row to its nearest rounding edge."""
        self.tie = torch.full(tokens.shape, math.inf, dtype=torch.float64)
        x = self.params["model.embed_tokens.weight"][tokens]
        for i in range(self.c["layers"]):
            x = self.layer(i, x, start, pos, lam)
        x = self.tap("final", rmsnorm(x, self.params["model.norm.weight"], self.c["norm_eps"]))
        head = "model.embed_tokens.weight" if self.c["tie_embeddings"] else "lm_head.weight"
        return x @ self.params[head].T


def mean_loss(logits, targets):
    """Cross-entropy, averaged over the positions that have a target."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


# ---------------------------------------------------------------------------------------------------------
# Batches: documents side by side, tokens away from the rounding edges.

def documents(rows):
    """start and pos [B,T] for rows given as lists of document lengths."""
    start = [[s for s, n in zip(np.cumsum([0] + row), row) for _ in range(n)] for row in rows]
    pos = [[t - s for t, s in enumerate(row)] for row in start]
    return torch.tensor(np.array(start)), torch.tensor(pos)


def draw_batch(model, rows, lams, rng, ignored=()):
    """
    A batch whose rows keep TIE_ACT at every lambda of lams. Position t only depends on the tokens up to t, so tokens are
    chosen one after another: the first one in random order that keeps the distance. Documents end without a target, and so do
    the (row, position) pairs in ignored.
    """
    start, pos = documents(rows)
    (B, T), V = pos.shape, model.c["vocab"]
    tokens = torch.zeros(B, T, dtype=torch.int64)
    with torch.no_grad():
        for b in range(B):
            t = 0
            while t < T:
                order = torch.tensor(rng.permutation(V))
                tries = tokens[b, : t + 1].repeat(V, 1)
                tries[:, t] = order
                ok = torch.ones(V, dtype=torch.bool)
                for lam in lams:
                    model.forward(tries, start[b, : t + 1].expand(V, -1), pos[b, : t + 1].expand(V, -1), lam)
                    ok &= model.tie[:, t] >= TIE_ACT
                if ok.any():
                    tokens[b, t] = order[ok.nonzero()[0, 0]]
                    t += 1
                else:   # a dead end: begin this row again
                    t = 0
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    targets[:, :-1][pos[:, 1:] == 0] = IGNORE
    for b, t in ignored:
        targets[b, t] = IGNORE
    return {"tokens": tokens, "targets": targets, "start": start, "pos": pos}


# ---------------------------------------------------------------------------------------------------------
# Dumps of whole models.

class Dump(dict):
    """name -> numpy array. float64 becomes float32, int64 becomes int32."""

    def put(self, name, x):
        x = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        kinds = {"f": np.float32, "i": np.int8 if x.dtype == np.int8 else np.int32}
        if name in self:
            raise SystemExit(f"two tensors are named {name}")
        self[name] = np.ascontiguousarray(x, dtype=kinds[x.dtype.kind])


def put_gradients(dump, prefix, params):
    for name, p in params.items():
        dump.put(f"{prefix}.grad.{name}", p.grad)
        p.grad = None


def optimizer_for(params):
    """AdamW of torch itself. Weight decay is for matrices and embeddings, not for norms and biases."""
    groups = [{"params": [p for p in params if p.ndim == 2], "weight_decay": ADAMW["weight_decay"]},
              {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"])


def ten_steps(dump, params, loss_of, draw, ramp):
    """
    Ten updates of params (name -> leaf), each on its own batch. loss_of(batch, lam) is the loss, draw(lam) draws a batch that keeps
    TIE_ACT. A batch whose update would leave a weight within TIE_WEIGHT of a threshold is replaced by another one.
    """
    values = list(params.values())
    opt = optimizer_for(values)
    batches, losses, norms, nearest = [], [], [], math.inf
    for step, lam in enumerate(ramp):
        saved = [p.detach().clone() for p in values]
        moments = [{k: s.clone() for k, s in opt.state[p].items()} for p in values] if step else None
        for _ in range(200):
            batch = draw(lam)
            opt.zero_grad(set_to_none=True)
            loss = loss_of(batch, lam)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(values, ADAMW["clip"])   # scales by min(1, clip / (norm + 1e-6))
            opt.step()
            tie = weight_tie(params)
            if tie >= TIE_WEIGHT:
                break
            with torch.no_grad():
                for i, p in enumerate(values):
                    p.copy_(saved[i])
                    opt.state[p] = {k: s.clone() for k, s in moments[i].items()} if step else {}
        else:
            raise SystemExit("no batch keeps the weights away from the threshold")
        nearest = min(nearest, tie)
        batches.append(batch)
        losses.append(loss.item())
        norms.append(norm.item())
    for key in batches[0]:
        dump.put("steps." + key, torch.stack([b[key] for b in batches]))
    dump.put("steps.lambda", np.array(ramp))
    dump.put("steps.adamw", np.array([ADAMW[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay", "clip")]))
    dump.put("losses10", np.array(losses))
    dump.put("norms10", np.array(norms))
    for name, p in params.items():
        dump.put("after10." + name, p)
    return nearest


def put_intermediates(dump, model, batch, lam):
    """Every intermediate tensor of every layer, and the gradients at both ends of the layer."""
    model.taps = {}
    mean_loss(model.forward(batch["tokens"], batch["start"], batch["pos"], lam), batch["targets"]).backward()
    for name, x in model.taps.items():
        dump.put(f"l{lam:g}.{name}", x)
        if name.endswith((".x", ".out")):
            dump.put(f"l{lam:g}.{name[:name.index('.')]}.{'dx' if name.endswith('.x') else 'dout'}", x.grad)
    model.taps = None
    for p in model.params.values():
        p.grad = None


def dump_model(name):
    """model_a, model_b, model_c: our own model."""
    c, dump = CONFIGS[name], Dump()
    seed = FILES.index(name)
    rows = {"model_a": [[5, 7], [8, 4]], "model_b": [[12], [12]], "model_c": [[12], [3, 9]]}[name]
    ignored = [(0, 2), (1, 5)] if name == "model_a" else []
    params = random_params(c, seed)
    rng = np.random.RandomState(seed + 100)
    model = Model(c, params)
    batch = draw_batch(model, rows, [lam for lam in LAMBDAS if lam], rng, ignored)
    for key, x in batch.items():
        dump.put(key, x)
    for key, p in params.items():
        dump.put("param." + key, p)
    tie = math.inf
    for lam in LAMBDAS:
        logits = model.forward(batch["tokens"], batch["start"], batch["pos"], lam)
        loss = mean_loss(logits, batch["targets"])
        loss.backward()
        tie = min(tie, model.tie.min().item())
        dump.put(f"l{lam:g}.logits", logits)
        dump.put(f"l{lam:g}.loss", [loss.item()])
        put_gradients(dump, f"l{lam:g}", params)
    if name == "model_a":
        put_intermediates(dump, model, batch, 1.0)
    near = [weight_tie(params)]

    def loss_of(b, lam):
        loss = mean_loss(model.forward(b["tokens"], b["start"], b["pos"], lam), b["targets"])
        near.append(model.tie.min().item())
        return loss

    w = ten_steps(dump, params, loss_of, lambda lam: draw_batch(model, rows, [lam] if lam else [], rng, ignored), RAMP)
    print(f"{name}: distance to the nearest rounding edge: activations {min([tie] + near[1:]):.1e}, weights {min(near[0], w):.1e}")
    return dump, {k: str(v) for k, v in c.items()}


# ---------------------------------------------------------------------------------------------------------
# transformers' own models.

def transformers_config(c, family):
    """(config class, model class) of transformers for this shape, as the C code's checkpoints describe it."""
    import transformers
    common = {"vocab_size": c["vocab"], "hidden_size": c["dim"], "intermediate_size": c["ffn_dim"], "num_hidden_layers": c["layers"],
              "num_attention_heads": c["heads"], "num_key_value_heads": c["kv_heads"], "head_dim": c["head_dim"],
              "hidden_act": c["activation"], "max_position_embeddings": c["max_seq"], "rms_norm_eps": c["norm_eps"],
              "tie_word_embeddings": bool(c["tie_embeddings"]), "attention_bias": bool(c["qkv_bias"]), "bos_token_id": 0,
              "eos_token_id": 1, "pad_token_id": None, "rope_theta": c["rope_theta"]}
    if c["rope_llama3"]:
        common["rope_scaling"] = {"rope_type": "llama3", "factor": c["rope_factor"], "low_freq_factor": c["rope_low_freq"],
                                  "high_freq_factor": c["rope_high_freq"], "original_max_position_embeddings": c["rope_original_max"]}
    return getattr(transformers, family + "Config")(**common), getattr(transformers, family + "ForCausalLM")


def transformers_model(c, family, params, quantised):
    """
    The model of transformers in float64, loaded from a directory with config.json and model.safetensors as a user would do.
    quantised: with transformers' online ternary quantisation (lambda = 1), else the plain float model (lambda = 0). Its norms and
    quantisers compute in float32 whatever the type of the model.
    """
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, cls = transformers_config(c, family)
    if quantised:
        config.quantization_config = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    with tempfile.TemporaryDirectory() as d:
        config.save_pretrained(d)
        save_file({k: p.detach().numpy().astype(np.float32) for k, p in params.items()}, d + "/model.safetensors", {"format": "pt"})
        model = cls.from_pretrained(d, dtype=torch.float64)
    return model.train()


def check_against_transformers():
    """Our model and the ones of transformers must agree before ours may judge anybody: BitNet, and Qwen3 with biases for model_b."""
    for name, family in (("model_a", "BitNet"), ("model_b", "Qwen3")):
        c = CONFIGS[name]
        params = random_params(c, 7)
        model = Model(c, params)
        batch = draw_batch(model, [[12], [12]], [1.0], np.random.RandomState(7))
        for lam in (0.0, 1.0):
            ours = model.forward(batch["tokens"], batch["start"], batch["pos"], lam)
            theirs = transformers_model(c, family, params, lam == 1).forward(batch["tokens"]).logits
            error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            print(f"{name} against transformers' {family}ForCausalLM, lambda {lam:g}: relative error of the logits {error:.1e}")
            if not error < 1e-6:
                raise SystemExit("the reference model and transformers disagree")


def dump_transformers():
    """model_hf: every number comes from transformers' BitNetForCausalLM, autograd and torch's AdamW; ours only chooses the tokens."""
    name, dump = "model_hf", Dump()
    c = CONFIGS[name]
    rows, rng = [[12], [12]], np.random.RandomState(104)
    ours = Model(c, random_params(c, 4))
    batch = draw_batch(ours, rows, [1.0], rng)
    for key, x in batch.items():
        dump.put(key, x)
    for key, p in ours.params.items():
        dump.put("param." + key, p)
    for lam in (0.0, 1.0):
        model = transformers_model(c, "BitNet", ours.params, lam == 1)
        params = dict(model.named_parameters())
        if set(params) != set(ours.params):
            raise SystemExit(f"transformers has other tensors: {set(params) ^ set(ours.params)}")
        logits = model(batch["tokens"]).logits
        loss = mean_loss(logits, batch["targets"])
        loss.backward()
        dump.put(f"l{lam:g}.logits", logits)
        dump.put(f"l{lam:g}.loss", [loss.item()])
        put_gradients(dump, f"l{lam:g}", params)
    near = [weight_tie(params)]

    def draw(lam):
        ours.params = {k: p.detach() for k, p in params.items()}
        b = draw_batch(ours, rows, [lam], rng)
        ours.forward(b["tokens"], b["start"], b["pos"], lam)
        near.append(ours.tie.min().item())
        return b

    w = ten_steps(dump, params, lambda b, lam: mean_loss(model(b["tokens"]).logits, b["targets"]), draw, (1.0,) * 10)
    print(f"{name}: distance to the nearest rounding edge: activations {min(near[1:]):.1e}, weights {min(near[0], w):.1e}")
    return dump, {k: str(v) for k, v in c.items()}


# ---------------------------------------------------------------------------------------------------------
# Dumps of single operations. Letters as in bitnet/ops.h.

class OpDump(Dump):
    """Draws inputs, dumps them under the name of the operation, and remembers the nearest rounding edges."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.RandomState(1)
        self.act_tie = self.weight_tie = math.inf

    def normal(self, *shape, scale=1.0):
        return torch.tensor((scale * self.rng.standard_normal(shape)).astype(np.float32)).double().requires_grad_()

    def gain(self, n):
        return torch.tensor((1 + 0.3 * self.rng.standard_normal(n)).astype(np.float32)).double().requires_grad_()

    def clear_rows(self, R, K, quantised=lambda x: x, bits=(8, 4), scale=1.0):
        """R rows of K normal values, drawn row by row until quantised(row) keeps TIE_ACT at every number of bits."""
        rows = []
        for _ in range(10000):
            x = self.normal(1, K, scale=scale).detach()
            tie = min(act_codes(quantised(x).detach(), b)[2].min().item() for b in bits)
            if tie >= TIE_ACT:
                self.act_tie = min(self.act_tie, tie)
                rows.append(x)
            if len(rows) == R:
                return torch.cat(rows).requires_grad_()
        raise SystemExit("no draw keeps the activations away from the rounding edges")

    def clear_matrix(self, rows, cols):
        for _ in range(10000):
            w = self.normal(rows, cols, scale=cols ** -0.5)
            tie = ternary(w.detach())[2]
            if tie >= TIE_WEIGHT:
                self.weight_tie = min(self.weight_tie, tie)
                return w
        raise SystemExit("no draw keeps the weights away from the threshold")

    def put_all(self, op, **tensors):
        for name, x in tensors.items():
            self.put(f"{op}.{name}", x)

    def put_quantised(self, op, x):
        """The three forms that a QAct can hold: codes and scales at 8 and 4 bits, and the mix at lambda = 0.3."""
        for bits in (8, 4):
            codes, scale, _ = act_codes(x.detach(), bits)
            self.put_all(f"{op}.b{bits}", codes=codes.to(torch.int8), scale=scale.squeeze(-1), mixed=quantised_input(x, bits, 0.3))


def gradients(y, dy, *inputs):
    return torch.autograd.grad(y, inputs, dy, retain_graph=True)


def op_embedding(d):
    R, V, C = 11, 9, 20
    wte, dout = d.normal(V, C), d.normal(R, C)
    tokens = torch.tensor(d.rng.randint(0, V - 1, R))   # repeated ones; the last row of the table is never used
    out = wte[tokens]
    d.put_all("embedding", wte=wte, tokens=tokens, out=out, dout=dout, dwte=gradients(out, dout, wte)[0])


def op_rmsnorm(d):
    R, C, eps = 9, 37, 1e-5
    gain, dout = d.gain(C), d.normal(R, C)
    x = d.clear_rows(R, C, lambda x: rmsnorm(x, gain, eps), scale=2.0)
    out = rmsnorm(x, gain, eps)
    dx, dgain = gradients(out, dout, x, gain)
    d.put_all("rmsnorm", x=x, gain=gain, out=out, rstd=torch.rsqrt(x.pow(2).mean(-1) + eps), dout=dout, dx=dx, dgain=dgain)
    d.put_quantised("rmsnorm", out)
    tiny = d.normal(3, C, scale=1e-4)   # eps counts here
    d.put_all("rmsnorm_tiny", x=tiny, out=rmsnorm(tiny, gain, eps))


def op_act_quant(d):
    R, K = 10, 45
    x = d.clear_rows(R, K)
    d.put("act_quant.x", x)
    d.put_quantised("act_quant", x)
    # Exact ties, zeros, tiny and huge values. A row whose largest value is 127 is multiplied by exactly 1.
    edge = torch.zeros(6, 12, dtype=torch.float64)
    edge[0] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.5, 0.49, -0.51])
    edge[1, 3] = -127.0
    edge[1, :3] = torch.tensor([63.5, 64.5, -64.5])
    edge[3] = 1e-7 * torch.arange(12)                   # below the floor of 1e-5: scaled by 127/1e-5
    edge[4] = 1e30 * torch.arange(-7, 5)
    edge[5, 0] = 7.0
    edge = edge.float().double()
    codes, scale, _ = act_codes(edge, 8)
    d.put_all("act_quant_edge", x=edge, codes=codes.to(torch.int8), scale=scale.squeeze(-1))


def op_headnorm(d):
    R, NH, NKV, HS, eps = 7, 4, 2, 10, 1e-6
    qkv, qgain, kgain = d.normal(R, NH + 2 * NKV, HS), d.gain(HS), d.gain(HS)
    dout = d.normal(R, NH + 2 * NKV, HS)
    q, k, v = qkv.split((NH, NKV, NKV), 1)
    out = torch.cat((rmsnorm(q, qgain, eps), rmsnorm(k, kgain, eps), v), 1)
    dqkv, dqgain, dkgain = gradients(out, dout, qkv, qgain, kgain)
    rstd = torch.rsqrt(qkv[:, : NH + NKV].pow(2).mean(-1) + eps)
    d.put_all("headnorm", qkv=qkv, qgain=qgain, kgain=kgain, out=out, rstd=rstd, dout=dout, dqkv=dqkv, dqgain=dqgain, dkgain=dkgain)


def op_weight_quantize(d):
    # Exact ties: the mean magnitude is 1, so 0.5 rounds to 0 and 1.5 to 2, which is clamped.
    rows = [[0.5, -0.5, 1.5, -1.5], [1.0, -1.0, 0.0, 2.0], [0.5000001, -0.5000001, 2.9999998, 0.0]]
    edge = torch.tensor(rows, dtype=torch.float32).double()
    edge[2, 3] = 12 - edge.abs().sum()
    small = torch.full((2, 4), 1e-9, dtype=torch.float64)
    huge = 1e10 * d.clear_matrix(5, 12).detach()
    for name, w in (("weight_edge", edge), ("weight_small", small), ("weight_zero", 0 * small), ("weight_huge", huge)):
        w = w.float().double()
        codes, gamma, _ = ternary(w)
        d.put_all(name, w=w, codes=codes.to(torch.int8), gamma=[gamma.item()])


def op_bitlinear(d, op, R, K, parts, cases):
    """Up to three logical matrices side by side, each with its own gamma; every lambda with and without quantised activations."""
    N = sum(parts)
    x = d.clear_rows(R, K, bits=(8,))
    ws = [d.clear_matrix(n, K) for n in parts]
    bias, residual, dout = d.normal(N), d.normal(R, N), d.normal(R, N)
    codes = torch.cat([ternary(w.detach())[0] for w in ws])
    gamma = torch.cat([ternary(w.detach())[1].expand(n) for w, n in zip(ws, parts)])
    q, scale, _ = act_codes(x.detach(), 8)
    d.put_all(op, x=x, w=torch.cat(ws), bias=bias, residual=residual, dout=dout, codes=codes.to(torch.int8), gamma=gamma,
              q=q.to(torch.int8), s=scale.squeeze(-1), sums=(q @ codes.T).round().to(torch.int64))
    for lam, bits in cases:
        y = F.linear(quantised_input(x, bits, lam), torch.cat([quantised_weight(w, lam) for w in ws]), bias)
        dx, dbias, *dws = gradients(y, dout, x, bias, *ws)
        d.put_all(f"{op}.l{lam:g}.b{bits}", out=y, dx=dx, dw=torch.cat(dws), dbias=dbias)
    y = F.linear(quantised_input(x, 8, 1.0), torch.cat([quantised_weight(w, 1.0) for w in ws]), bias)
    d.put(f"{op}.l1.b8.out_residual", y + residual)
    if (0.3, 8) in cases:
        y = F.linear(quantised_input(x, 8, 0.3), torch.cat([quantised_weight(w, 0.3) for w in ws]))
        d.put_all(f"{op}.l0.3.b8", out_plain=y, out_residual=y + bias + residual)


def op_linear(d):
    R, N, K = 7, 45, 30
    x, w, dout = d.normal(R, K), d.normal(N, K, scale=0.3), d.normal(R, N)
    out = F.linear(x, w)
    dx, dw = gradients(out, dout, x, w)
    d.put_all("linear", x=x, w=w, dout=dout, out=out, dx=dx, dw=dw)


def op_rope(d):
    c = {"head_dim": 6, "rope_theta": 10000.0, "rope_llama3": 0}
    R, NH, NKV, HS = 9, 4, 2, 6
    qkv, dout = d.normal(R, NH + 2 * NKV, HS), d.normal(R, NH + 2 * NKV, HS)
    pos, angles = torch.tensor(d.rng.permutation(16)[:R]), rope_angles(c, 16)
    out = torch.cat((rope(qkv[:, : NH + NKV], angles[pos]), qkv[:, NH + NKV :]), 1)
    d.put_all("rope", qkv=qkv, pos=pos, cossin=torch.cat((angles.double().cos(), angles.double().sin()), -1), out=out, dout=dout,
              dqkv=gradients(out, dout, qkv)[0])


def rope_tables(d):
    """Sine and cosine as the rotary modules of transformers return them, default and llama3-scaled."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    scaling = {"rope_llama3": 1, "rope_factor": 32.0, "rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original_max": 8192}
    for name, extra in (("default", {"rope_theta": 10000.0}), ("llama3", {"rope_theta": 500000.0, **scaling})):
        c = {**BASE, "dim": 128, "heads": 2, "kv_heads": 2, "head_dim": 64, "max_seq": 200, **extra}
        module = LlamaRotaryEmbedding(transformers_config(c, "Llama")[0])
        cos, sin = module(torch.zeros(1), torch.arange(200)[None])
        table = torch.cat((cos[0, :, :32], sin[0, :, :32]), -1)
        if (table[:, :32] - rope_angles(c, 200).cos()).abs().max() > 1e-5:
            raise SystemExit("the reference angles and transformers disagree")
        d.put(f"rope_table.{name}", table[::10].double())   # every tenth position


def op_attention(d):
    B, T, NH, NKV, HS = 2, 70, 4, 2, 6   # more keys than one block of the running softmax holds
    qkv = d.normal(B, T, (NH + 2 * NKV) * HS)
    with torch.no_grad():
        qkv[:, 64:, NH * HS : (NH + NKV) * HS] *= 3   # and the largest score comes after it
    dout = d.normal(B, T, NH * HS)
    start, _ = documents([[70], [20, 1, 49]])
    q, k, v = (z.view(B, T, -1, HS) for z in qkv.split((NH * HS, NKV * HS, NKV * HS), -1))
    out, lse = attention(q, k, v, start)
    d.put_all("attention", qkv=qkv, start=start, out=out, lse=lse, dout=dout, dqkv=gradients(out, dout, qkv)[0])


def op_glu(d):
    R, ffn, eps = 8, 37, 1e-5
    dout, gain = d.normal(R, ffn), d.gain(ffn)
    d.put_all("glu", gain=gain, dout=dout)
    for act in ("relu2", "silu"):
        def unit(gate_up):
            return gate(gate_up[:, :ffn], act) * gate_up[:, ffn:]
        gate_up = d.clear_rows(R, 2 * ffn, lambda x: torch.cat((unit(x), rmsnorm(unit(x), gain, eps))), bits=(8,))
        d.put(f"glu.{act}.gate_up", gate_up)
        u = unit(gate_up)
        for name, y in (("plain", u), ("norm", rmsnorm(u, gain, eps))):
            codes, scale, _ = act_codes(y.detach(), 8)
            d.put_all(f"glu.{act}.{name}", out=y, mixed=quantised_input(y, 8, 0.3), codes=codes.to(torch.int8),
                      scale=scale.squeeze(-1), dgate_up=gradients(y, dout, gate_up)[0])
        d.put_all(f"glu.{act}.norm", rstd=torch.rsqrt(u.pow(2).mean(-1) + eps), dgain=gradients(y, dout, gain)[0])


def op_cross_entropy(d):
    R, V = 9, 37
    logits = d.normal(R, V, scale=3.0)
    targets = torch.tensor(d.rng.randint(0, V, R))
    targets[2] = targets[8] = IGNORE
    coef = d.normal(R).detach()   # any sign: weights, advantages
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    d.put_all("cross_entropy", logits=logits, targets=targets, coef=coef, losses=losses, lse=logits.logsumexp(-1),
              dlogits=gradients(losses, coef, logits)[0])


def op_optimizer(d):
    n = 301
    x = d.normal(5000)
    x.data[17] = 1000.0
    d.put_all("sum_squares", x=x, out=[x.pow(2).sum().item()])
    p, g = d.normal(n).detach(), d.normal(n, scale=0.1).detach()
    g[5:9] = 0
    gscale, lr, b1, b2, eps, wd = 0.5, 1e-2, 0.9, 0.95, 1e-8, 0.1
    d.put_all("adamw", p=p, g=g, args=np.array([gscale, lr, b1, b2, eps, wd]))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 4):   # the same gradient three times, then halved
        gs = g * gscale * (1.0 if t < 3 else 0.5)
        m, v = b1 * m + (1 - b1) * gs, b2 * v + (1 - b2) * gs * gs
        p = p - lr * ((m / (1 - b1 ** t)) / ((v / (1 - b2 ** t)).sqrt() + eps) + wd * p)
        d.put_all(f"adamw.{t}", p=p, m=m, v=v)


def put_schedules(d):
    """lambda(t), lr(t) and weight decay(t) for every update of short runs; args is what the C function is called with."""
    T, W = 40, 12

    def ramp(t):
        return min(t / W, 1.0)

    def sigma(x, k):
        return 1 / (1 + math.exp(-k * (x - 0.5)))

    lambdas = {
        "warmup": (0, ramp), "linear": (0, lambda t: t / T), "accelerated": (0, lambda t: min(2 * t / T, 1.0)),
        "cosine": (0, lambda t: (1 - math.cos(math.pi * ramp(t))) / 2), "exponential": (8, lambda t: 1 - (1 - t / T) ** 8),
        "exponential4": (4, lambda t: 1 - (1 - t / T) ** 4),
        "sigmoid": (100, lambda t: (sigma(t / T, 100) - sigma(0, 100)) / (sigma(1, 100) - sigma(0, 100))),
        "sigmoid15": (15, lambda t: (sigma(t / T, 15) - sigma(0, 15)) / (sigma(1, 15) - sigma(0, 15))),
        "step": (0, lambda t: [0.25, 0.5, 0.75, 1.0][4 * t // T]), "none": (0, lambda t: 1.0),
    }
    for name, (k, f) in lambdas.items():
        d.put(f"lambda.{name}.args", np.array([T, W, k], dtype=np.float64))
        d.put(f"lambda.{name}", np.array([f(t) for t in range(T)]))

    peak, low, stage2, decay, wd = 1e-3, 1e-4, 6e-4, 0.2, 0.1
    W = 5

    def p(t):
        return (t - W) / (T - W)

    def two_stage(t):
        half = T / 2
        if t < half:
            return np.interp(t, [W, half], [peak, stage2])
        return np.interp(t, [half, T], [stage2, low])

    rates = {
        "cosine": lambda t: low + (peak - low) * (1 + math.cos(math.pi * p(t))) / 2,
        "linear": lambda t: peak * (1 - p(t)) + low * p(t),
        "constant": lambda t: peak, "wsd": lambda t: np.interp(t, [T - decay * T, T], [peak, low]), "two_stage": two_stage,
        "faq": lambda t: (peak if t < T / 2 else stage2) * (1 - p(t)),
    }
    for name, f in rates.items():
        d.put(f"lr.{name}.args", np.array([T, W, peak, low, stage2, decay, wd, 0.5]))
        d.put(f"lr.{name}", np.array([peak * (t + 1) / W if t < W else f(t) for t in range(T)]))
        d.put(f"wd.{name}", np.array([wd if t < T / 2 else 0.0 for t in range(T)]))


def dump_ops():
    d = OpDump()
    for op in (op_embedding, op_rmsnorm, op_act_quant, op_headnorm, op_weight_quantize, op_linear, op_rope, rope_tables, op_attention,
               op_glu, op_cross_entropy, op_optimizer, put_schedules):
        op(d)
    every = [(lam, bits) for lam in LAMBDAS for bits in (8, 0)]
    op_bitlinear(d, "bitlinear", 13, 50, (17, 9, 9), every)
    op_bitlinear(d, "bitlinear_wide", 14, 300, (40,), [(0.0, 8), (1.0, 8)])   # longer than one block of the products
    print(f"ops: distance to the nearest rounding edge: activations {d.act_tie:.1e}, weights {d.weight_tie:.1e}")
    return d, {}


# ---------------------------------------------------------------------------------------------------------
# Writing and comparing.

def compute(name):
    if name == "ops":
        return dump_ops()
    return dump_transformers() if name == "model_hf" else dump_model(name)


def differences(got, want):
    """Lines that say what differs: integers must be equal, floats within 1e-6 of the tensor's largest value."""
    lines = [f"{name}: only in the {'new' if name in got else 'committed'} file" for name in sorted(set(got) ^ set(want))]
    for name in sorted(set(got) & set(want)):
        a, b = got[name], want[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype}{list(a.shape)}, committed {b.dtype}{list(b.shape)}")
        elif a.dtype != np.float32:
            if (a != b).any():
                lines.append(f"{name}: {(a != b).sum()} of {a.size} integers differ")
        elif a.size and not np.abs(a - b).max() <= 1e-6 * np.abs(b).max():
            lines.append(f"{name}: relative difference {np.abs(a - b).max() / np.abs(b).max():.2e}")
    return lines


def main():
    parser = argparse.ArgumentParser(description="writes or checks the reference dumps of the tests")
    home = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "dev", "test", "ref"))
    parser.add_argument("--out", default=home, help="directory of the dumps")
    parser.add_argument("--check", action="store_true", help="compute again and compare with the files in --out")
    parser.add_argument("--only", choices=FILES, action="append", help="only this file (may be repeated)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_against_transformers()
    os.makedirs(args.out, exist_ok=True)
    total, bad = 0, 0
    for name in args.only or FILES:
        path = os.path.join(args.out, name + ".safetensors")
        dump, metadata = compute(name)
        if args.check:
            with tempfile.TemporaryDirectory() as d:   # through a file, so that both sides were written and read the same way
                save_file(dump, d + "/new.safetensors", metadata)
                lines = differences(load_file(d + "/new.safetensors"), load_file(path)) if os.path.exists(path) else ["no such file"]
            print(f"{path}: {len(dump)} tensors, {len(lines)} differences")
            print("".join(f"  {line}\n" for line in lines[:20]), end="")
            bad += len(lines)
        else:
            save_file(dump, path, {"format": "pt", **metadata})
            total += os.path.getsize(path)
            print(f"{path}: {len(dump)} tensors, {os.path.getsize(path)} bytes")
    if not args.check:
        print(f"{total} bytes in all")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
