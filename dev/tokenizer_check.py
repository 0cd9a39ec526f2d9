#!/usr/bin/env python3
"""Compares tokenizer.h with Hugging Face `tokenizers`, tiktoken and sentencepiece: the same ids, and how fast.

Needs a folder with the released vocabularies and some texts (default ../shared/data, or $BITNET_DATA, or --data):
    tokenizers/gpt2_encoder.json + gpt2_vocab.bpe, llama3_tokenizer.model, qwen.tiktoken, smollm2_tokens.json +
    smollm2_merges.txt, llama2_tokenizer.bin + .model, tok512.bin + .model;  text/*.txt
From these it writes tokenizer.json files into a temporary folder (--keep DIR keeps them), as transformers' converters do.

    python dev/tokenizer_check.py                    # everything, about two minutes
    python dev/tokenizer_check.py --only gpt2 --bytes 200000
Libraries that are not installed are skipped and named. Exit code 1 if any id differs.
"""
import argparse
import base64
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"   # one thread against one thread
os.environ["RAYON_NUM_THREADS"] = "1"
from tokenizers import Tokenizer  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3_MARKS = (["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{i}|>" for i in range(4)] +
                ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"] +
                [f"<|reserved_special_token_{i}|>" for i in range(5, 251)])
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# ---- writing tokenizer.json -------------------------------------------------------------------------------

def byte_alphabet():
    """GPT-2's characters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def ranks_of(path):
    """tiktoken's file: base64 of the bytes, a blank, the rank."""
    lines = open(path, "rb").read().split(b"\n")
    return {base64.b64decode(x.split()[0]): int(x.split()[1]) for x in lines if x.strip()}


def merges_of(vocab, ranks=None):
    """All ways to make a piece of two others, in the order of the results' ranks (transformers' converters do the same)."""
    out = []
    for piece, rank in sorted((ranks or vocab).items(), key=lambda x: x[1]):
        local = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        out += sorted(local, key=lambda x: (vocab[x[0]], vocab[x[1]]))
    return out


def write_json(folder, vocab, merges, marks, pre, decoder, normalizer=None, config=None, **model):
    os.makedirs(folder, exist_ok=True)
    added = [{"id": i, "content": m, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for m, i in marks.items()]
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre, "post_processor": None, "decoder": decoder,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges, **model}}
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        json.dump(data, f, ensure_ascii=False)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}, f)


def split(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False}]}


def make_gpt2(data, folder):
    vocab = json.load(open(f"{data}/gpt2_encoder.json"))
    merges = [x for x in open(f"{data}/gpt2_vocab.bpe", encoding="utf-8").read().split("\n")[1:] if x]
    write_json(folder, vocab, merges, {"<|endoftext|>": 50256}, BYTE_LEVEL, BYTE_LEVEL, config={"eos_token": "<|endoftext|>"})


def make_tiktoken(path, folder, marks, pattern, normalizer, **model):
    ranks = ranks_of(path)
    letter = byte_alphabet()
    alias = {b: "".join(letter[x] for x in b) for b in ranks}
    vocab = {alias[b]: r for b, r in ranks.items()}
    merges = [[alias[a], alias[b]] for a, b in merges_of(ranks)]
    write_json(folder, vocab, merges, {m: len(ranks) + i for i, m in enumerate(marks)}, split(pattern), BYTE_LEVEL, normalizer, **model)


def make_smollm2(data, folder):
    tokens = json.load(open(f"{data}/smollm2_tokens.json"))
    merges = [x for x in open(f"{data}/smollm2_merges.txt", encoding="utf-8").read().split("\n") if x and not x.startswith("#version")]
    marks = {t: i for i, t in enumerate(tokens[:17])}
    pre = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
    write_json(folder, {t: i for i, t in enumerate(tokens)}, merges, marks, pre, BYTE_LEVEL, config={"eos_token": "<|im_end|>"})


def read_bin(path):
    """llama2.c's pieces and scores."""
    data, at, out = open(path, "rb").read(), 4, []
    while at < len(data):
        score, n = struct.unpack_from("<fI", data, at)
        out.append((data[at + 8:at + 8 + n].decode(), score))
        at += 8 + n
    return out


def make_sentencepiece(path, folder):
    pieces = read_bin(path)
    names = [p.strip("\n") if i < 3 else p.replace(" ", "\u2581") for i, (p, _) in enumerate(pieces)]
    vocab = {p: i for i, p in enumerate(names)}
    ranks = {p: -pieces[i][1] for i, p in enumerate(names) if i >= 259}
    scored = {p: i for p, i in vocab.items() if i >= 259}
    write_json(folder, vocab, [list(m) for m in merges_of(scored, ranks)], {p: i for i, p in enumerate(names[:3])}, None,
               {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                 {"type": "ByteFallback"}, {"type": "Fuse"},
                                                 {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
               {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
               {"bos_token": "<s>", "eos_token": "</s>"}, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def make_all(data, out, only):
    """{name: (folder or file for tokenizer.h, folder with tokenizer.json, separator)}"""
    made = {}
    for name, mark, make in [
            ("gpt2", "<|endoftext|>", lambda f: make_gpt2(data, f)),
            ("llama3", "<|end_of_text|>", lambda f: make_tiktoken(f"{data}/llama3_tokenizer.model", f, LLAMA3_MARKS, MODERN % "{1,3}", None, ignore_merges=True)),
            ("qwen2", "<|endoftext|>", lambda f: make_tiktoken(f"{data}/qwen.tiktoken", f, QWEN_MARKS, MODERN % "", {"type": "NFC"})),
            ("smollm2", "<|endoftext|>", lambda f: make_smollm2(data, f)),
            ("llama2", "</s>", lambda f: make_sentencepiece(f"{data}/llama2_tokenizer.bin", f)),
            ("llama2.bin", "</s>", lambda f: make_sentencepiece(f"{data}/llama2_tokenizer.bin", f)),
            ("tok512.bin", "</s>", lambda f: make_sentencepiece(f"{data}/tok512.bin", f))]:
        if only and name not in only:
            continue
        folder = os.path.join(out, name)
        make(folder)
        source = f"{data}/llama2_tokenizer.bin" if name == "llama2.bin" else f"{data}/tok512.bin" if name == "tok512.bin" else folder
        made[name] = (source, folder, mark)
    return made


# ---- the others -------------------------------------------------------------------------------------------

def other_library(name, data):
    """(library, function from text to ids with special tokens as text) or None."""
    try:
        if name in ("gpt2", "llama3", "qwen2"):
            import tiktoken
            if name == "gpt2":
                vocab = json.load(open(f"{data}/gpt2_encoder.json"))
                letter = {c: b for b, c in byte_alphabet().items()}
                ranks = {bytes(letter[c] for c in t): i for t, i in vocab.items() if i != 50256}
                pattern = GPT2
            else:
                ranks = ranks_of(f"{data}/llama3_tokenizer.model" if name == "llama3" else f"{data}/qwen.tiktoken")
                pattern = MODERN % ("{1,3}" if name == "llama3" else "")
            enc = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            return "tiktoken", enc.encode_ordinary
        if name in ("llama2", "llama2.bin", "tok512.bin"):
            import sentencepiece
            sp = sentencepiece.SentencePieceProcessor(model_file=f"{data}/{'tok512' if name == 'tok512.bin' else 'llama2_tokenizer'}.model")
            return "sentencepiece", sp.encode
    except ImportError as e:
        return f"no {e.name}", None
    return "-", None


def ours(program, source, text, folder, repeat=1, marks=0):
    """Ids, and the numbers of the line that tokenizer_bench prints."""
    path = os.path.join(folder, "text")
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    p = subprocess.run([program, source, path, str(repeat), str(marks)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode:
        sys.exit(f"tokenizer_bench {source}: {p.stderr.decode()}")
    words = p.stderr.decode().split()
    return list(struct.unpack(f"<{len(p.stdout) // 4}i", p.stdout)), dict(zip(words[::2], words[1::2]))


def fastest(fn, repeat):
    best = 1e9
    for _ in range(repeat):
        t0 = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - t0)
    return best


def random_strings(n):
    """Strings in which everything meets everything: classes, marks, line breaks, contractions, scripts."""
    rng = random.Random(1)
    parts = ["'s", "'S", "'ll", "'Re", "'\u017f", "\u2019s", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", "\x85", "\x1c", "a", "Z",
             "the", " the", "ing", "\u00e9", "e\u0301", "\u0300", "\u0415\u0436", "\u4e2d\u6587", "\u1100\u1161", "\uac00\u11a8", "0", "12", "345", "\u0663", "\u00b2", "\u2167",
             "!", "...", " #", "\u20ac", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u2581", "\x00", "\x7f", "\ufeff", "\ue000", "\U00010d4a", "\U000105c0", "\u09be", "\u0f71\u0f72",
             "\U0001d7ce", "<0x0A>", "<s", "|>", "_", "'", '"', "/", "\\"]
    out = []
    for _ in range(n):
        s = "".join(rng.choice(parts) if rng.random() < 0.9 else chr(rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0xE000, 0x30000)]))
                    for _ in range(rng.randint(1, 12)))
        out.append(s)
    return out


def between(ids, mark):
    """Lists of ids, cut at the id mark."""
    out = [[]]
    for i in ids:
        if i == mark:
            out.append([])
        else:
            out[-1].append(i)
    return out


def show_difference(a, b, hf, text):
    k = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    lo = max(0, k - 3)
    print(f"    first difference at token {k}: ours {a[lo:k + 4]}, theirs {b[lo:k + 4]}; theirs reads {hf.decode(b[lo:k + 4])!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("BITNET_DATA", os.path.join(ROOT, "..", "shared", "data")), help="folder with tokenizers/ and text/")
    parser.add_argument("--only", nargs="*", help="names of tokenizers: gpt2 llama3 qwen2 smollm2 llama2 llama2.bin tok512.bin")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="how much of each text")
    parser.add_argument("--strings", type=int, default=20_000, help="random strings for each tokenizer")
    parser.add_argument("--repeat", type=int, default=3, help="timings; the fastest counts")
    parser.add_argument("--keep", help="write the tokenizer.json files here and keep them")
    args = parser.parse_args()
    tokenizers_dir = os.path.join(args.data, "tokenizers")
    if not os.path.isdir(tokenizers_dir):
        sys.exit(f"error: no folder {tokenizers_dir}; give --data or set BITNET_DATA")
    texts = {}
    for name, file in [("TinyStories", "tinystories.txt"), ("WikiText", "wikitext2_train_part.txt"), ("Wikipedia", "wiki_demo.txt")]:
        texts[name] = open(f"{args.data}/text/{file}", "rb").read()[:args.bytes].decode(errors="ignore")

    failed, ratios = 0, []
    with tempfile.TemporaryDirectory() as tmp:
        program = os.path.join(tmp, "tokenizer_bench")
        subprocess.run(["gcc", "-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", f"{HERE}/tokenizer_bench.c", "-o", program, "-lm"], check=True)
        made = make_all(tokenizers_dir, args.keep or tmp, args.only)
        print(f"{'tokenizer':11} {'text':12} {'tokens':>8} {'ids':>6}  {'MB/s':>7} {'hf':>6} {'ratio':>6}   other library")
        for name, (source, folder, mark) in made.items():
            hf = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
            other_name, other = other_library(name, tokenizers_dir)
            for text_name, text in texts.items():
                got, info = ours(program, source, text, tmp, args.repeat, 1)
                want = hf.encode(text, add_special_tokens=False).ids
                # The fastest of the library's own ways: one call, or a batch of documents or lines.
                lines = text.split("<|endoftext|>") if "<|endoftext|>" in text else text.split("\n")
                seconds = min(fastest(lambda: hf.encode(text, add_special_tokens=False), args.repeat),
                              fastest(lambda: hf.encode_batch_fast(lines, add_special_tokens=False), args.repeat))
                speed, theirs = float(info["MB_per_s"]), len(text.encode()) / seconds / 1e6
                ok = got == want
                plain, back = ours(program, source, text, tmp)
                exact = back["round_trip"] == "1" or name == "qwen2"   # NFC may change a text
                note = ""
                if other:
                    if name == "tok512.bin":   # its .model also removes extra blanks, which the .bin does not say
                        text = re.sub(" +", " ", text).strip(" ").replace("\n ", "\n").replace(" \n", "\n")
                        plain, _ = ours(program, source, text, tmp)
                    same = plain == list(other(text))
                    t = fastest(lambda: other(text), args.repeat)
                    note = f"{other_name} {'equal' if same else 'DIFFERENT'}, {speed * t / len(text.encode()) * 1e6:.1f}x"
                    failed += not same
                elif other_name != "-":
                    note = f"({other_name})"
                failed += not ok or not exact
                ratios.append(speed / theirs)
                print(f"{name:11} {text_name:12} {len(got):8} {'equal' if ok else 'DIFFER':>6}  {speed:7.1f} {theirs:6.2f} {speed / theirs:6.1f}   {note}"
                      f"{'' if exact else '  NO ROUND TRIP'}", flush=True)
                if not ok:
                    show_difference(got, want, hf, text)
            # Random strings in one file, cut apart by a special token; each must be what the library makes of it alone.
            strings = random_strings(args.strings)
            got, _ = ours(program, source, mark.join(strings), tmp, 1, 1)
            parts, bad = between(got, hf.token_to_id(mark)), 0
            want = [e.ids for e in hf.encode_batch_fast(strings, add_special_tokens=False)]
            for s, a, b in zip(strings, parts, want):
                if a != b:
                    bad += 1
                    if bad <= 3:
                        print(f"    {s!r}: ours {a}, theirs {b}")
            failed += bad + (len(parts) != len(want))
            # Bytes that are no UTF-8 come back as they were.
            junk = random.Random(2).randbytes(100_000)
            _, info = ours(program, source, junk, tmp)
            lossless = info["round_trip"] == "1"
            failed += not lossless and name not in ("smollm2", "qwen2")
            print(f"{name:11} {'random':12} {len(got):8} {'equal' if not bad else 'DIFFER':>6}  {bad} of {len(strings)} strings differ; "
                  f"random bytes {'come back' if lossless else 'do not come back (the vocabulary lacks bytes, or NFC)'}; load {info['load_ms']} ms", flush=True)
    print(f"ratio to the tokenizers library: lowest {min(ratios):.1f}, median {sorted(ratios)[len(ratios) // 2]:.1f}")
    print("all ids equal" if not failed else f"{failed} differences")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
