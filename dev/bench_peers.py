#!/usr/bin/env python3
"""Inference side by side: ./train_bitnet bench decode and llama.cpp on one random model of the BitNet b1.58 2B4T shape.

    pip install llama-cpp-python gguf numpy          # compiles llama.cpp, about ten minutes
    make train_bitnet
    python dev/bench_peers.py                        # 5 rounds, 2 threads; models are made once in --dir

llama.cpp reads GGUF files with random ternary weights, written here block by block without a detour over floats: TQ2_0 (2.06
bits a weight) and TQ1_0 (1.69), each with the embedding table, which is also the head, in F16 and in Q6_K. Our program makes its
random weights in memory. Each round runs every program once, one after the other, so that all see the same weather on a
shared machine; the table shows medians over the rounds and the ratio to the fastest peer.
"""
import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time

import numpy as np

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 30, 2560, 20, 5, 128, 6912, 128256
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- random models -----------------------------------------------------------------------------------------

def ternary_blocks(rng, rows, cols, kind):
    """Random codes in {-1, 0, 1} as ggml blocks of 256: bytes [rows, bytes of a row]."""
    blocks = rows * cols // 256
    scale = np.array([0.02], np.float16).view(np.uint8)
    if kind == "TQ2_0":     # four codes a byte, each 0..2
        codes = rng.integers(0, 81, (blocks, 64), dtype=np.uint8)
        table = np.array([v % 3 | v // 3 % 3 << 2 | v // 9 % 3 << 4 | v // 27 << 6 for v in range(81)], np.uint8)
        body = table[codes]
    else:                   # five codes a byte in base 3, stored as ceil(256 v / 243)
        body = ((rng.integers(0, 243, (blocks, 52)).astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)
        body[:, 48:] = (((rng.integers(0, 81, (blocks, 4)).astype(np.uint32) * 3) * 256 + 242) // 243).astype(np.uint8)
    out = np.empty((blocks, body.shape[1] + 2), np.uint8)
    out[:, :-2], out[:, -2:] = body, scale
    return out.reshape(rows, -1)


def head_blocks(rng, kind):
    """The embedding table [VOCAB, DIM] ~ N(0, 0.02) in F16, or random Q6_K blocks of about that size."""
    if kind == "F16":
        out = np.empty((VOCAB, DIM), np.float16)
        for at in range(0, VOCAB, 8192):
            n = min(8192, VOCAB - at)
            out[at:at + n] = rng.standard_normal((n, DIM), dtype=np.float32) * 0.02
        return out
    blocks = VOCAB * DIM // 256     # 128 low + 64 high bytes, 16 scales, one half
    out = rng.integers(0, 256, (blocks, 210), dtype=np.uint8)
    out[:, 192:208] = rng.integers(20, 60, (blocks, 16), dtype=np.uint8)
    out[:, 208:] = np.array([3e-5], np.float16).view(np.uint8)
    return out.reshape(VOCAB, -1)


def write_model(path, weights, head):
    import gguf
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path + ".tmp", "bitnet")
    w.add_block_count(LAYERS)
    w.add_context_length(4096)
    w.add_embedding_length(DIM)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(500000.0)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    types = gguf.GGMLQuantizationType
    w.add_tensor("token_embd.weight", head_blocks(rng, head), raw_dtype=types[head])
    w.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    shapes = {"attn_q": (DIM, DIM), "attn_k": (KV_HEADS * HEAD_DIM, DIM), "attn_v": (KV_HEADS * HEAD_DIM, DIM), "attn_output": (DIM, DIM),
              "ffn_gate": (FFN, DIM), "ffn_up": (FFN, DIM), "ffn_down": (DIM, FFN)}
    for layer in range(LAYERS):
        for name, n in (("attn_norm", DIM), ("attn_sub_norm", DIM), ("ffn_norm", DIM), ("ffn_sub_norm", FFN)):
            w.add_tensor(f"blk.{layer}.{name}.weight", np.ones(n, np.float32))
        for name, (rows, cols) in shapes.items():
            w.add_tensor(f"blk.{layer}.{name}.weight", ternary_blocks(rng, rows, cols, weights), raw_dtype=types[weights])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.rename(path + ".tmp", path)


# ---- one run of each program -------------------------------------------------------------------------------

def run_llama(path, threads, prompt, new):
    """In a process of its own: tokens/s of a prompt, and of the greedy tokens after it."""
    import llama_cpp as ll
    import ctypes
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    model = ll.llama_model_load_from_file(path.encode(), params)
    cp = ll.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_threads, cp.n_threads_batch = prompt[-1] + new + 64, 512, 512, threads, threads
    cp.no_perf = True
    ctx = ll.llama_init_from_model(model, cp)
    memory = ll.llama_get_memory(ctx)
    out = {}

    def decode(tokens):
        array = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(ctx, ll.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, -1), (VOCAB,))

    decode([1, 2, 3])       # touches all weights
    for n in prompt:
        ll.llama_memory_clear(memory, True)
        ids = [(7 * i + 1) % VOCAB for i in range(n)]
        t0 = time.perf_counter()
        logits = decode(ids)
        out[f"prefill {n}"] = n / (time.perf_counter() - t0)
        if n == prompt[0]:
            t0 = time.perf_counter()
            for _ in range(new):
                logits = decode([int(np.argmax(logits))])
            out["decode"] = new / (time.perf_counter() - t0)
    print(json.dumps(out))


def child(args, path):
    command = [sys.executable, os.path.abspath(__file__), "--child", path, "--threads", str(args.threads), "--new", str(args.new),
               "--prompt", *map(str, args.prompt)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def ours(binary, threads):
    """{row: value} of one run of our program: tokens/s, the share of the reading limit, memory."""
    out = subprocess.run([binary, "bench", "decode", f"threads={threads}"], check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = {}
    for line in out.splitlines():
        name, rest = line.split(None, 1)
        shape = re.sub(r"\s{2,}.*", "", rest)
        rows[f"{name} {shape}"] = float(rest[len(shape):].split()[0])
    short = {"prefill 128": "prefill 2b4t T=128", "prefill 512": "prefill 2b4t T=512", "decode": "decode 2b4t B=1 at 128"}
    return {k: rows[v] for k, v in short.items()}, rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dir", default="/tmp/bitnet_peers", help="where the random models are kept (4 GB)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--new", type=int, default=32, help="tokens that a peer decodes")
    p.add_argument("--prompt", type=int, nargs="+", default=[128, 512])
    p.add_argument("--binary", default=os.path.join(ROOT, "train_bitnet"))
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        run_llama(args.child, args.threads, args.prompt, args.new)
        return
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} has no module {' and no module '.join(missing)}; pip install llama-cpp-python gguf")
    os.makedirs(args.dir, exist_ok=True)
    peers = {}
    for weights in ("TQ2_0", "TQ1_0"):
        for head in ("F16", "Q6_K"):
            path = peers[f"llama.cpp {weights}, {head} head"] = os.path.join(args.dir, f"{weights}_{head}.gguf")
            if not os.path.exists(path):
                print("writing", path, file=sys.stderr)
                write_model(path, weights, head)
    columns = ["prefill 128", "prefill 512", "decode"]
    found = {name: {} for name in ["ours", *peers]}
    rows = {}
    for k in range(args.rounds):
        for name in found:
            result, more = ours(args.binary, args.threads) if name == "ours" else (child(args, peers[name]), {})
            print(f"round {k + 1} of {args.rounds}: {name:28}" + "".join(f"{result[c]:10.1f}" for c in columns), file=sys.stderr)
            for key, value in result.items():
                found[name].setdefault(key, []).append(value)
            for key, value in more.items():
                rows.setdefault(key, []).append(value)
    median = {name: {c: statistics.median(v[c]) for c in columns} for name, v in found.items()}
    print(f"{'tokens/s':32}" + "".join(f"{c:>14}" for c in columns))
    for name, values in median.items():
        print(f"{name:32}" + "".join(f"{values[c]:14.1f}" for c in columns))
    print(f"{'ours / fastest peer':32}" + "".join(f"{median['ours'][c] / max(median[n][c] for n in peers):14.2f}" for c in columns))
    tq2 = [n for n in peers if "TQ2_0" in n]
    print(f"{'ours / fastest TQ2_0':32}" + "".join(f"{median['ours'][c] / max(median[n][c] for n in tq2):14.2f}" for c in columns))
    for key, values in rows.items():
        if not key.startswith(("prefill", "decode 2b4t B=1 at 128")):
            print(f"{key:32}{statistics.median(values):14.1f}")


if __name__ == "__main__":
    main()
