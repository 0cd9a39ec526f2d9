#!/usr/bin/env python3
"""Tests of reading and writing models against programs that share no code with us: transformers, the gguf package, and llama.cpp.

    python dev/test/test_convert.py [--binary ./train_bitnet] [--only float packed ...]

Needs torch, transformers, accelerate, safetensors and gguf; llama.cpp is used where the package xllamacpp (it
has binary wheels; the version that CI names) is installed. bitnet.cpp has no package: its reader of I2_S is written down here in numpy. Where
BITNET_DATA names a directory with tokenizers/, vocabularies in GGUF files are tested with llama.cpp's own vectors.
All models are tiny and random. Errors are relative to the largest logit. Bounds: 1e-5 for the same float network (for llama.cpp, too, which
sums in another order); 2e-2 with the same most likely token where 8-bit activations are involved, because a value on the edge between two
codes may fall on either side (near ties of less than 1e-3 apart). llama.cpp quantises activations by blocks, we by tokens, and GGUF rounds the
scales of the matrices: there nine of ten positions must have the same most likely token.
"""
import argparse
import ctypes
import glob
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from checks import check, failures, finish

warnings.filterwarnings("ignore", category=FutureWarning)
FLOAT_BOUND, QUANTISED_BOUND, EMBED_BOUND, NEAR_TIE = 1e-5, 2e-2, 1e-1, 1e-3   # EMBED: the embedding itself has only 8 bits
AGREEMENT = 0.9
BINARY = "./train_bitnet"
llama = None   # the library


def run(*args, code=0):
    p = subprocess.run([BINARY, *map(str, args)], capture_output=True, text=True, timeout=300)
    check(p.returncode == code, f"{' '.join(map(str, args))}: exit code {p.returncode}, wanted {code}\n{p.stderr[-600:]}")
    return p


def logits(path, ids, *args):
    out = run("logits", path, "ids=" + " ".join(map(str, ids)), "precision=fp32", *args).stdout
    return np.array([line.split() for line in out.splitlines()], dtype=np.float64)


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max() if a.shape == b.shape and a.size else np.inf


def same_argmax(a, b):
    x, y, at = a.argmax(-1), b.argmax(-1), np.arange(len(b))
    return bool(((x == y) | (b[at, y] - b[at, x] < NEAR_TIE * np.abs(b).max())).all())


def agreement(a, b):
    return (a.argmax(-1) == b.argmax(-1)).mean()


# ---------------------------------------------------------------------------------------------------------
# The peers.

def theirs(path, ids):
    """transformers' logits in float32; every tensor of the file must be used and none may be missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    check(not problems, f"{path}: transformers: {problems}")
    with torch.no_grad():
        out = model.eval()(torch.tensor(ids)).logits.double().numpy()
    return out if np.ndim(ids) > 1 else out


class Params(ctypes.Structure):
    """llama.cpp's parameter structs, passed by value: room for all of them, with the few numbers that we set by their place."""
    _fields_ = [("word", ctypes.c_int32 * 256)]


def open_llama():
    """The C interface of the library inside the package xllamacpp, or None where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        return None
    lib = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(spec.origin), "xllamacpp*.so"))[0])
    for name in ("llama_model_default_params", "llama_context_default_params", "llama_batch_get_one"):
        getattr(lib, name).restype = Params
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    lib.keep = silent
    c = lib.llama_context_default_params().word
    check(c[:3] == [512, 2048, 512] and c[13] == -1 and c[26:28] == [1, 1], f"another version of xllamacpp: its parameters are {c[:40]}")
    return lib


def llama_logits(path, ids):
    """llama.cpp's logits at every position, one token after the other, with float32 caches."""
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    check(model, f"{path}: llama.cpp refuses it")
    if not model:
        return np.zeros(0)
    c = llama.llama_context_default_params()
    c.word[0:3] = [64, 64, 64]   # context, batch, micro-batch
    c.word[7:9] = [1, 1]         # threads
    c.word[13] = 0               # no flash attention
    c.word[26:28] = [0, 0]       # caches in float32
    model = ctypes.c_void_p(model)
    context = ctypes.c_void_p(llama.llama_init_from_model(model, c))
    vocab = llama.llama_vocab_n_tokens(ctypes.c_void_p(llama.llama_model_get_vocab(model)))
    rows = []
    for token in ids:
        one = (ctypes.c_int32 * 1)(token)
        check(llama.llama_decode(context, llama.llama_batch_get_one(one, 1)) == 0, f"{path}: llama_decode")
        rows.append(np.array(llama.llama_get_logits_ith(context, -1)[:vocab], dtype=np.float64))
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(rows)


# ---------------------------------------------------------------------------------------------------------
# Tiny models.

COMMON = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
              max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
IDS = [(7 * i + 3) % 96 for i in range(20)]


def make(name, path, cls, dtype=torch.float32, shards=False, **changes):
    """A random model of a class in a directory; gains and biases are random, too, so that one that is left out shows. The embedding is large
    beside what the layers add, as in trained models: where the layers drown it, one 8-bit code more or less moves the logits by 5e-2."""
    torch.manual_seed(len(name))
    config = getattr(transformers, cls + "Config")(**{**COMMON, **changes})
    model = getattr(transformers, cls + "ForCausalLM")(config)
    with torch.no_grad():
        for key, w in model.named_parameters():
            if w.ndim == 1:
                w.copy_((0.0 if key.endswith("bias") else 1.0) + 0.2 * torch.randn_like(w))
            else:
                w.copy_(torch.randn_like(w) * (0.5 if "embed" in key or "lm_head" in key else 0.04))
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size="500KB" if shards else "5GB")
    return path


MODELS = {
    "llama": dict(cls="Llama", tie_word_embeddings=False),
    "llama_tied_bf16": dict(cls="Llama", tie_word_embeddings=True, dtype=torch.bfloat16),
    "llama_head48": dict(cls="Llama", head_dim=48, tie_word_embeddings=True),
    "llama_llama3": dict(cls="Llama", rope_parameters={**LLAMA3, "rope_theta": 500000.0}, tie_word_embeddings=True),
    "llama_biased_f16": dict(cls="Llama", attention_bias=True, dtype=torch.float16),
    "mistral_shards": dict(cls="Mistral", sliding_window=None, shards=True),
    "qwen2": dict(cls="Qwen2", tie_word_embeddings=True),
    "qwen3": dict(cls="Qwen3", head_dim=96, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "bitnet": dict(cls="BitNet", tie_word_embeddings=True),
    "bitnet_silu": dict(cls="BitNet", tie_word_embeddings=True, hidden_act="silu"),
    "bitnet_untied": dict(cls="BitNet", tie_word_embeddings=False, hidden_act="silu"),
}


def old_spelling(path):
    """The same config in version 4's words: rope_theta and rope_scaling."""
    name = os.path.join(path, "config.json")
    config = json.load(open(name))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    json.dump(config, open(name, "w"))


# ---------------------------------------------------------------------------------------------------------
# The tests.

def test_float(tmp):
    """Every class as it is, at lambda = 0; then as GGUF, read by us and by llama.cpp, where an architecture exists."""
    archs = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "bitnet_silu": "bitnet"}
    for name, how in MODELS.items():
        path = make(name, os.path.join(tmp, name), **how)
        if how.get("shards"):
            check(os.path.exists(os.path.join(path, "model.safetensors.index.json")), f"{name}: shards")
        want = theirs(path, [IDS])[0]
        e = error(logits(path, IDS, "lambda=0"), want)
        check(e <= FLOAT_BOUND, f"{name}: lambda = 0: {e:.2e}")
        if "llama3" in name:
            old_spelling(path)
            e = error(logits(path, IDS, "lambda=0"), want)
            check(e <= FLOAT_BOUND, f"{name}: old spelling: {e:.2e}")
        out = os.path.join(tmp, name + ".gguf")
        arch = next((a for k, a in archs.items() if name.startswith(k)), None)
        p = run("convert", f"init={path}", f"out={out}", "format=gguf", "type=f32", "embed_type=f32", "lambda=0", code=0 if arch or name == "bitnet" else 2)
        if p.returncode:
            check("error: format=gguf: with sub-norms" in p.stderr, f"{name}: {p.stderr}")
            continue
        check(f"architecture {arch or 'bitnet-b1.58'}" in p.stdout, f"{name}: {p.stdout}")
        e = error(logits(out, IDS, "lambda=0"), want)
        check(e <= FLOAT_BOUND, f"{name}: back from GGUF: {e:.2e}")
        if llama and arch:
            e = error(llama_logits(out, IDS), want)
            check(e <= FLOAT_BOUND, f"{name}: llama.cpp with float weights: {e:.2e}")


def test_ternary_gguf(tmp):
    """Ternary files: bytes as the gguf package writes them, values and texts as llama.cpp has them."""
    for name in ("llama", "llama_head48", "qwen2", "qwen3", "bitnet_silu"):
        path = os.path.join(tmp, name)
        ours = logits(path, IDS)
        run("convert", f"init={path}", f"out={tmp}/t.gguf", "format=gguf", "type=f32", "embed_type=f32")
        reference = {t.name: t.data for t in gguf.GGUFReader(f"{tmp}/t.gguf").tensors}
        check(error(logits(f"{tmp}/t.gguf", IDS), ours) <= QUANTISED_BOUND, f"{name}: ternary floats read back")
        if llama:   # float activations on both sides
            run("convert", f"init={path}", f"out={tmp}/a0", "act_bits=0")
            e = error(llama_logits(f"{tmp}/t.gguf", IDS), logits(f"{tmp}/a0", IDS))
            check(e <= FLOAT_BOUND, f"{name}: llama.cpp with ternary floats: {e:.2e}")
        for kind in ("tq1_0", "tq2_0", "q8_0", "f16", "bf16"):
            out = f"{tmp}/{name}.{kind}.gguf"
            p = run("convert", f"init={path}", f"out={out}", "format=gguf", f"type={kind}", "embed_type=" + ("q8_0" if kind == "q8_0" else "f32"))
            fallback = 0
            for t in gguf.GGUFReader(out).tensors:
                if t.tensor_type.name == "F32":
                    check(np.array_equal(t.data, reference[t.name]), f"{out}: {t.name}: values")
                    continue
                want = gguf.quantize(reference[t.name], t.tensor_type)
                check(t.data.tobytes() == want.tobytes(), f"{out}: {t.name}: bytes differ from the gguf package's")
                fallback += t.tensor_type.name.lower() != kind and "blk" in t.name
            check((fallback > 0) == ("they are Q8_0 or F16" in p.stdout), f"{out}: {fallback} fall back, {p.stdout}")
            back = logits(out, IDS)
            e = error(back, ours)
            bound = EMBED_BOUND if kind == "q8_0" else QUANTISED_BOUND
            check(e <= bound and (kind == "q8_0" or agreement(back, ours) >= AGREEMENT), f"{out}: read back {e:.2e}")
            if llama and kind.startswith("tq"):
                peer = llama_logits(out, IDS)
                e = error(peer, ours)
                check(e <= QUANTISED_BOUND and agreement(peer, ours) >= AGREEMENT, f"{out}: llama.cpp {e:.2e}")
    # What has no truthful form is refused.
    for name, args, words in (("bitnet", ("type=tq2_0",), "write type=i2_s"), ("bitnet_untied", ("type=f16",), "a matrix of its own"),
                              ("llama", ("activation=relu2",), "only have silu"), ("qwen2", ("attn_sub_norm=1", "ffn_sub_norm=1"), "biases"),
                              ("llama", ("attn_sub_norm=1",), "both sub-norms or none"), ("llama", ("lambda=0", "type=tq1_0"), "float weights"),
                              ("llama_head48", ("type=i2_s",), "multiple of 128")):
        p = run("convert", f"init={tmp}/{name}", f"out={tmp}/no.gguf", "format=gguf", *args, code=2)
        check(words in p.stderr and not os.path.exists(f"{tmp}/no.gguf"), f"{name} {args}: {p.stderr}")


def read_gguf(path):
    """(metadata, {name: (dims, type, offset)}, where the data begin, the bytes): the gguf package does not know the type I2_S."""
    data = open(path, "rb").read()
    at = 8
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form):
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, at - struct.calcsize(form))[0]

    def text():
        nonlocal at
        n = number("<Q")
        at += n
        return data[at - n:at].decode()

    def value(kind):
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            element, count = number("<I"), number("<Q")
            return [value(element) for _ in range(count)]
        at += sizes[kind]
        return data[at - sizes[kind]:at]
    check(data[:8] == b"GGUF\3\0\0\0", f"{path}: GGUF version 3")
    n_tensors, n_keys = number("<Q"), number("<Q")
    keys = {text(): value(number("<I")) for _ in range(n_keys)}
    tensors = {}
    for _ in range(n_tensors):
        name = text()
        dims = [number("<Q") for _ in range(number("<I"))]
        tensors[name] = (dims, number("<I"), number("<Q"))
    return keys, tensors, (at + 31) // 32 * 32, data


def read_i2s(path):
    """
    The tensors of a file as bitnet.cpp (built for x86, as it comes) takes them: floats, or (codes, scale). Its quantize_i2_s in
    src/ggml-bitnet-mad.cpp puts value j of 128 into byte j % 32, bits 6 - 2 (j / 32), as code + 1; the scale follows behind n / 4 bytes,
    in 32 bytes of its own.
    """
    keys, tensors, begin, data = read_gguf(path)
    check("x86" in keys["general.description"], f"{path}: says which layout it has")
    out, end = {}, begin
    for name, (dims, kind, offset) in tensors.items():
        n, at = int(np.prod(dims)), begin + offset
        check(at == end, f"{path}: {name} begins at {at}, the tensor before ends at {end}")
        if kind == 36:
            body = np.frombuffer(data, np.uint8, n // 4, at).reshape(-1, 1, 32)
            codes = (body >> np.array([6, 4, 2, 0], np.uint8)[None, :, None] & 3).reshape(dims[1], dims[0]).astype(np.int32) - 1
            check(codes.max() == 1 and codes.min() == -1 and not any(data[at + n // 4 + 4:at + n // 4 + 32]), f"{path}: {name}: codes, tail")
            out[name] = codes, np.frombuffer(data, np.float32, 1, at + n // 4)[0]
            end = at + n // 4 + 32
        else:
            check(kind == 0, f"{path}: {name} has type {kind}")
            out[name] = np.frombuffer(data, np.float32, n, at).reshape(dims[::-1])
            end = at + 4 * n
    check(end == len(data), f"{path}: {len(data)} bytes, the tensors end at {end}")
    return keys, out


def bitnet_cpp_logits(path, ids):
    """The graphs "llama", "bitnet" and "bitnet-b1.58" of bitnet.cpp, all positions at once."""
    keys, w = read_i2s(path)
    arch = keys["general.architecture"]
    u32 = lambda name: struct.unpack("<I", keys[f"{arch}.{name}"])[0]
    f32 = lambda name: np.frombuffer(keys[f"{arch}.{name}"], np.float32)[0]
    heads, kv, eps, T = u32("attention.head_count"), u32("attention.head_count_kv"), f32("attention.layer_norm_rms_epsilon"), len(ids)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"]

    def product(x, name):
        codes, scale = w[name + ".weight"]
        s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
        q = np.clip(np.rint(x * s), -128, 127).astype(np.int32)
        return (q @ codes.T).astype(np.float32) / s * scale

    def rope(x):   # [T, heads, width]; "llama" turns neighbours, the others halves
        half = x.shape[-1] // 2
        t = np.arange(T)[:, None] * f32("rope.freq_base") ** (-np.arange(half) / half)
        c, s = np.cos(t)[:, None].astype(np.float32), np.sin(t)[:, None].astype(np.float32)
        a, b = (x[..., 0::2], x[..., 1::2]) if arch == "llama" else (x[..., :half], x[..., half:])
        y = np.empty_like(x)
        (y[..., 0::2] if arch == "llama" else y[..., :half])[...] = a * c - b * s
        (y[..., 1::2] if arch == "llama" else y[..., half:])[...] = b * c + a * s
        return y
    x = w["token_embd.weight"][ids]
    for layer in range(u32("block_count")):
        p = f"blk.{layer}."
        h = norm(x, p + "attn_norm")
        q, k, v = (product(h, p + f"attn_{n}").reshape(T, n_heads, -1) for n, n_heads in (("q", heads), ("k", kv), ("v", kv)))
        q, k, v = rope(q), np.repeat(rope(k), heads // kv, 1), np.repeat(v, heads // kv, 1)
        score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        score = np.where(np.tri(T, dtype=bool), score, -np.inf)
        e = np.exp(score - score.max(-1, keepdims=True))
        h = np.einsum("hqk,khd->qhd", e / e.sum(-1, keepdims=True), v).reshape(T, -1).astype(np.float32)
        x = x + product(h if arch == "llama" else norm(h, p + "attn_sub_norm"), p + "attn_output")
        h = norm(x, p + "ffn_norm")
        gate, up = product(h, p + "ffn_gate"), product(h, p + "ffn_up")
        h = (np.maximum(gate, 0) ** 2 if arch == "bitnet-b1.58" else gate / (1 + np.exp(-gate))) * up
        x = x + product(h if arch == "llama" else norm(h, p + "ffn_sub_norm"), p + "ffn_down")
    x = norm(x, "output_norm")
    return (x @ w.get("output.weight", w["token_embd.weight"]).T).astype(np.float64)


def test_i2s(tmp):
    """I2_S files read and run as bitnet.cpp does: the codes and scales of the float file, our logits."""
    for name, arch in (("llama", "llama"), ("llama_tied_bf16", "llama"), ("bitnet_silu", "bitnet"), ("bitnet", "bitnet-b1.58")):
        path, out = os.path.join(tmp, name), f"{tmp}/{name}.i2s.gguf"
        run("convert", f"init={path}", f"out={out}", "format=gguf", "type=i2_s", "embed_type=f32")
        keys, tensors = read_i2s(out)
        check(keys["general.architecture"] == arch, f"{out}: {keys['general.architecture']}")
        ours = logits(path, IDS)
        peer = bitnet_cpp_logits(out, IDS)
        e = error(ours, peer)
        check(e <= QUANTISED_BOUND and same_argmax(ours, peer), f"{out}: as bitnet.cpp runs it {e:.2e}")
        check(error(logits(out, IDS), ours) <= FLOAT_BOUND, f"{out}: read back")
        packed = f"{tmp}/{name}_for_i2s"   # the same codes and scales through another form
        run("convert", f"init={path}", f"out={packed}", "format=packed")
        other = load_file(f"{packed}/model.safetensors")
        for theirs_, mine in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
            bytes_ = other[f"model.layers.1.{theirs_}.weight"].numpy()
            codes = np.concatenate([(bytes_ >> 2 * i & 3).astype(np.int32) - 1 for i in range(4)])
            check(np.array_equal(tensors[f"blk.1.{mine}.weight"][0], codes), f"{out}: {mine}: codes")
            scale = other[f"model.layers.1.{theirs_}.weight_scale"].float().item()
            check(abs(tensors[f"blk.1.{mine}.weight"][1] - scale) <= 1e-6 * scale, f"{out}: {mine}: scale")


def test_calibrate(tmp):
    """Gains of inserted sub-norms: the mean size of what reaches the projection, as transformers' own network has it on the same windows."""
    import tokenizers
    text = open(__file__, encoding="utf-8").read()[:6000]
    tok = tokenizers.ByteLevelBPETokenizer()
    tok.train_from_iterator([text], vocab_size=300, min_frequency=2, show_progress=False)
    path = make("calibrated", f"{tmp}/calibrate", "Llama", tie_word_embeddings=True, vocab_size=320)
    tok.save(f"{path}/tokenizer.json")
    open(f"{tmp}/text.txt", "w", encoding="utf-8").write(text)
    args = [f"init={path}", f"file={tmp}/text.txt", "attn_sub_norm=1", "ffn_sub_norm=1", "lambda=0", "precision=fp32"]
    far = []
    for calibrate in (0, 2):
        run("convert", *args, f"out={tmp}/gains{calibrate}", f"calibrate={calibrate}")
        far.append(error(logits(f"{tmp}/gains{calibrate}", IDS, "lambda=0"), logits(path, IDS, "lambda=0")))
    check(far[1] < far[0] / 2, f"logits differ from the model's by {far[0]:.2e} with gain 1, by {far[1]:.2e} with measured gains")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rms = {}
    for i, layer in enumerate(model.model.layers):
        for name, module in ((f"{i}.self_attn.attn_sub_norm", layer.self_attn.o_proj), (f"{i}.mlp.ffn_sub_norm", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, x, name=name: rms.setdefault(name, []).append(x[0].pow(2).mean(-1).sqrt().flatten()))
    ids = tok.encode(text).ids
    T, rows = 128, 4
    check(len(ids) > 2 * rows * T, f"{len(ids)} tokens are too few")
    with torch.no_grad():
        model(torch.tensor(ids[:2 * rows * T]).view(-1, T))
    gains = load_file(f"{tmp}/gains2/model.safetensors")
    for name, parts in rms.items():
        want, got = torch.cat(parts).mean().item(), gains[f"model.layers.{name}.weight"]
        check((got == got[0]).all() and abs(got[0].item() - want) <= FLOAT_BOUND * want, f"{name}: gain {got[0].item()}, measured {want}")
    check(len(rms) == 4, "all four norms")


VOCABULARIES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2", "llama2": "llama-spm", "smollm2": None}   # None: Hugging Face's ids


def llama_ids(path, texts):
    """llama.cpp's ids of texts with the vocabulary of a file."""
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    check(model, f"{path}: llama.cpp refuses it")
    if not model:
        return []
    vocab, out = ctypes.c_void_p(llama.llama_model_get_vocab(ctypes.c_void_p(model))), []
    room = (ctypes.c_int32 * 4096)()
    for text in texts:
        data = text.encode()
        n = llama.llama_tokenize(vocab, data, len(data), room, 4096, ctypes.c_bool(False), ctypes.c_bool(False))
        out.append(list(room[:max(n, 0)]))
    llama.llama_model_free(ctypes.c_void_p(model))
    return out


def test_vocabularies(tmp):
    """Vocabularies that we write into GGUF files: llama.cpp finds its own published ids with them."""
    data = os.environ.get("BITNET_DATA")
    if not llama or not data:
        print("note: vocabularies in GGUF need llama.cpp and BITNET_DATA; left out")
        return
    import tokenizers
    import tokenizer_check
    root = f"{data}/tokenizers"
    for name, (source, folder, _) in tokenizer_check.make_all(root, f"{tmp}/vocabularies", VOCABULARIES).items():
        theirs_ = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        size = (theirs_.get_vocab_size() + 63) // 64 * 64
        path, out = f"{tmp}/vocabulary_model", f"{tmp}/{name}.gguf"
        config = transformers.LlamaConfig(**{**COMMON, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
                                             "num_key_value_heads": 1, "vocab_size": size, "tie_word_embeddings": True})
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        run("convert", f"init={path}", f"tokenizer={source}", f"out={out}", "format=gguf", "type=f16", "lambda=0")
        inputs = VOCABULARIES[name] or "gpt-2"
        texts = open(f"{root}/vectors/{inputs}.inp", newline="").read().split("\n__ggml_vocab_test__\n")
        if VOCABULARIES[name]:
            want = [[int(i) for i in line.split()] for line in open(f"{root}/vectors/{inputs}.out").read().split("\n")[:len(texts)]]
        else:
            want = [theirs_.encode(t, add_special_tokens=False).ids for t in texts]
        got = llama_ids(out, texts)
        bad = [(t, g, w) for t, g, w in zip(texts, got, want) if g != w]
        check(len(got) == len(texts) == len(want) > 40 and not bad, f"{name}: {len(bad)} of {len(texts)} texts, first {bad[:1]}")


def test_types(tmp):
    """Files of the gguf package in every type: we read the numbers that it reads."""
    rng = np.random.default_rng(5)
    D, F, V = 256, 256, 64
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "TQ1_0", "TQ2_0"):
        path, out = f"{tmp}/types.gguf", f"{tmp}/types_{kind}"
        w = gguf.GGUFWriter(path, "qwen3")
        w.add_block_count(1)
        w.add_context_length(64)
        w.add_embedding_length(D)
        w.add_feed_forward_length(F)
        w.add_head_count(4)
        w.add_head_count_kv(2)
        w.add_layer_norm_rms_eps(1e-6)
        w.add_rope_freq_base(10000.0)
        w.add_tokenizer_model("none")
        w.add_vocab_size(V)
        want = {}
        shapes = {"self_attn.q_proj": ("attn_q", D), "self_attn.k_proj": ("attn_k", D // 2), "self_attn.v_proj": ("attn_v", D // 2),
                  "self_attn.o_proj": ("attn_output", D), "mlp.gate_proj": ("ffn_gate", F), "mlp.up_proj": ("ffn_up", F), "mlp.down_proj": ("ffn_down", D)}
        for ours, (name, rows) in shapes.items():
            x = rng.standard_normal((rows, D)).astype(np.float32)
            q = gguf.quantize(x, getattr(gguf.GGMLQuantizationType, kind))
            want[f"model.layers.0.{ours}.weight"] = gguf.dequantize(q, getattr(gguf.GGMLQuantizationType, kind))
            w.add_tensor(f"blk.0.{name}.weight", q, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
        for ours, name, n in (("model.layers.0.input_layernorm", "blk.0.attn_norm", D), ("model.layers.0.post_attention_layernorm", "blk.0.ffn_norm", D),
                              ("model.norm", "output_norm", D), ("model.layers.0.self_attn.q_norm", "blk.0.attn_q_norm", 64),
                              ("model.layers.0.self_attn.k_norm", "blk.0.attn_k_norm", 64)):
            want[ours + ".weight"] = rng.standard_normal(n).astype(np.float32)
            w.add_tensor(name + ".weight", want[ours + ".weight"])
        want["model.embed_tokens.weight"] = rng.standard_normal((V, D)).astype(np.float32)
        w.add_tensor("token_embd.weight", want["model.embed_tokens.weight"])
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        run("convert", f"init={path}", f"out={out}", "lambda=0")
        got = load_file(f"{out}/model.safetensors")
        check(got.keys() == want.keys(), f"{kind}: tensors {sorted(got.keys() ^ want.keys())}")
        for name, x in want.items():
            check(np.array_equal(got[name].numpy(), x), f"{kind}: {name}")


def prompts():
    rng = np.random.default_rng(7)
    return rng.integers(3, 96, size=(100, 6)).tolist()


def test_packed(tmp):
    """Packed weights in transformers: the same most likely token after 100 prompts; both scale conventions read by us; folded norms."""
    cases = {"llama": (), "bitnet": (), "qwen2": (), "llama_biased_f16": (), "qwen3": ("attn_sub_norm=1", "ffn_sub_norm=1"), "llama_head48": ("attn_sub_norm=1", "ffn_sub_norm=1"), "bitnet_untied": ("fold=1",)}
    for name, args in cases.items():
        path = os.path.join(tmp, name)
        packed, master = f"{tmp}/{name}_packed", f"{tmp}/{name}_hf"
        run("convert", f"init={path}", f"out={packed}", "format=packed", *args)
        run("convert", f"init={path}", f"out={master}", "format=hf", *args)
        quant = json.load(open(f"{packed}/config.json"))["quantization_config"]
        folded = name in ("qwen3", "llama_head48", "bitnet_untied")
        check(quant["use_rms_norm"] == folded and quant["linear_class"] == ("bitlinear" if name in ("qwen2", "llama_biased_f16") else "autobitlinear"),
              f"{name}: {quant}")
        ours = logits(packed, IDS)
        for where in (packed, master):
            e = error(logits(where, IDS), ours)
            check(e <= 1e-4 or where == master and e <= QUANTISED_BOUND, f"{where}: {e:.2e} from the packed form")
            peer = theirs(where, [IDS])[0]
            e = error(ours, peer)
            check(e <= QUANTISED_BOUND and same_argmax(ours, peer), f"{where}: transformers {e:.2e}")
        if name == "bitnet":   # the form that most people have
            many = prompts()
            peer = theirs(packed, many)
            check(all(same_argmax(logits(packed, ids)[-1:], p[-1:]) for ids, p in zip(many, peer)), "100 prompts: the most likely tokens")
        # The other convention: the scale inverted, and the class that reads it so.
        tensors = load_file(f"{packed}/model.safetensors")
        other = f"{tmp}/{name}_other"
        shutil.copytree(packed, other, dirs_exist_ok=True)
        biased = {k for k in tensors if k.endswith(".bias")}
        for k in list(tensors):
            if k.endswith("weight_scale"):
                tensors[k] = 1 / tensors[k]
        divides = quant["linear_class"] == "bitlinear"
        for k in biased:   # multiplying readers multiply the bias, too
            tensors[k] = tensors[k] / tensors[k.replace(".bias", ".weight_scale")] if divides else tensors[k]
        save_file(tensors, f"{other}/model.safetensors", metadata={"format": "pt"})
        config = json.load(open(f"{other}/config.json"))
        config["quantization_config"]["linear_class"] = "autobitlinear" if divides else "bitlinear"
        del config["bitnet_c"]["crc32"]
        json.dump(config, open(f"{other}/config.json", "w"))
        e = error(logits(other, IDS), ours)
        check(e <= QUANTISED_BOUND and same_argmax(logits(other, IDS), ours), f"{other}: the other convention: {e:.2e}")
        e = error(theirs(other, [IDS])[0], ours)
        check(e <= QUANTISED_BOUND, f"{other}: transformers reads the other convention as we do: {e:.2e}")


def main():
    global BINARY, llama
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=BINARY)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these tests; `float` makes the models of most of the others")
    args = parser.parse_args()
    BINARY = args.binary
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    llama = open_llama()
    if llama is None:
        print("note: llama.cpp is not installed (pip install xllamacpp); its part is left out")
    with tempfile.TemporaryDirectory() as tmp:
        for test in (test_float, test_ternary_gguf, test_i2s, test_calibrate, test_types, test_packed, test_vocabularies):
            if args.only and test.__name__.removeprefix("test_") not in args.only:
                continue
            before = failures()
            test(tmp)
            print(f"{'ok  ' if failures() == before else 'FAIL'}  {test.__name__}", flush=True)
    finish()


if __name__ == "__main__":
    main()
