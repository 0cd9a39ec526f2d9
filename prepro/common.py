"""What the data-preparation scripts share: documents in, a tokenizer and token shards out.

A script names its source and calls run(); everything else is here:
  reading     .txt (whole, or cut at <|endoftext|> or --doc-sep, or by line), .json, .jsonl (key `text`), each also .gz;
              or a data set of the Hugging Face hub through `datasets`, which resumes broken downloads
  tokenizer   --tokenizer tokenizer.json (or its directory), or a byte-level BPE of --vocab tokens trained on the text
  encoding    in many processes; a special token that is written out in a text stays text
  shards      DIR/train_000000.bin, DIR/val_000000.bin, ... exactly as dataloader.h reads them, each whole or not at all;
              tokenizer.json and tokenizer_config.json lie beside them. An interrupted run goes on where it stopped.
A document's side (training or validation) depends on its text alone, so that adding files moves no document across.
"""
import argparse
import array
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import zlib

try:
    from tqdm import tqdm
except ImportError:   # progress bars are a comfort
    class tqdm:
        def __init__(self, *_, **__): pass
        def update(self, n): pass
        def close(self): pass

EOT = "<|endoftext|>"
KNOWN_EOTS = [EOT, "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>"]
MASK64 = (1 << 64) - 1


def fail(message):
    """Ends the program as the C side does: exit code 2 for what the user can correct."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- hashes: the same numbers as bitnet/utils.h and tokenizer.h --------------------------------------------

def rng_mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def hash_bytes(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & MASK64
    return rng_mix(h)


def byte_alphabet():
    """GPT-2's character for each byte: {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def pieces(path):
    """[(bytes, special)] of a tokenizer.json in the order of ids, as tokenizer.h keeps them."""
    with open(path, encoding="utf-8") as f:
        data = json.load(f)
    model, alphabet = data["model"], byte_alphabet()
    sentencepiece, bytes_level = bool(model.get("byte_fallback")), data.get("pre_tokenizer") is not None
    out = {}
    for piece, i in model["vocab"].items():
        raw = piece.encode()
        if sentencepiece and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            raw = bytes([int(piece[3:5], 16)])
        elif sentencepiece:
            raw = piece.replace("\u2581", " ").encode()
        elif bytes_level and all(c in alphabet for c in piece):
            raw = bytes(alphabet[c] for c in piece)
        out[i] = (raw, False)
    for token in data.get("added_tokens") or []:
        out[token["id"]] = (token["content"].encode(), bool(token.get("special")))
    if sorted(out) != list(range(len(out))):
        fail(f"{path}: expected ids 0 to {len(out) - 1} without gaps")
    return [out[i] for i in range(len(out))]


def tokenizer_hash(path):
    """tokenizer_hash() of tokenizer.h for this tokenizer.json."""
    data = b"".join(len(raw).to_bytes(4, "little") + raw + bytes([special]) for raw, special in pieces(path))
    return hash_bytes(data) or 1


# ---- shards -----------------------------------------------------------------------------------------------

def write_whole(path, *parts):
    """A file that appears whole or not at all."""
    with open(path + ".tmp", "wb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_shard(path, ids, vocab, thash=0, eot=-1, trained=None):
    """The header of dataloader.h, the tokens, and for instruction data a bit for each token: 1 = it is trained."""
    wide = vocab > 65536
    tokens = array.array("I" if wide else "H", ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    payload = tokens.tobytes()
    if trained is not None:
        bits = bytearray((len(tokens) + 7) // 8)
        for i, t in enumerate(trained):
            if t:
                bits[i >> 3] |= 1 << (i & 7)
        payload += bytes(bits)
    words = [20240801 if wide else 20240520, 7 if wide else 1, len(tokens), vocab, thash & 0xFFFFFFFF, thash >> 32,
             zlib.crc32(payload), eot + 1, int(trained is not None)]
    header = array.array("I", words + [0] * (256 - len(words)))
    if sys.byteorder == "big":
        header.byteswap()
    write_whole(path, header.tobytes(), payload)


class Progress:
    """What is finished, in DIR/progress.json: for each split the shards, the tokens, and how many documents of the source are
    behind its last complete shard."""

    def __init__(self, out, settings):
        self.path = os.path.join(out, "progress.json")
        self.state = {"settings": settings, "complete": False,
                      "splits": {s: {"shards": 0, "tokens": 0, "trained": 0, "documents": 0, "read": 0} for s in ("train", "val")}}
        if os.path.exists(self.path):
            with open(self.path) as f:
                old = json.load(f)
            if old.get("settings") != settings:
                fail(f"{out} was prepared from something else or with other options; take another --out, or delete it (or pass --force)")
            self.state = old

    def save(self):
        write_whole(self.path, json.dumps(self.state, indent=1).encode())


class ShardWriter:
    """Collects documents of one split and writes a shard whenever enough tokens are there. Shards end with a document."""

    def __init__(self, out, split, progress, shard_tokens, vocab, thash, eot, masked):
        self.out, self.split, self.progress, self.limit = out, split, progress, shard_tokens
        self.vocab, self.thash, self.eot, self.masked = vocab, thash, eot, masked
        self.state = progress.state["splits"][split]
        self.ids, self.trained, self.documents = array.array("I"), bytearray(), 0

    def add(self, ids, trained, read):
        """read: documents of the source up to and with this one."""
        if read <= self.state["read"]:   # it is in a shard of the interrupted run
            return
        self.ids.extend(ids)
        if self.masked:
            self.trained.extend(trained)
        self.documents += 1
        if len(self.ids) >= self.limit:
            self.close(read)

    def close(self, read):
        if len(self.ids):
            path = os.path.join(self.out, f"{self.split}_{self.state['shards']:06d}.bin")
            write_shard(path, self.ids, self.vocab, self.thash, self.eot, self.trained if self.masked else None)
            self.state["shards"] += 1
            self.state["tokens"] += len(self.ids)
            self.state["trained"] += sum(self.trained) if self.masked else len(self.ids)
            self.state["documents"] += self.documents
        self.state["read"] = read
        self.progress.save()
        self.ids, self.trained, self.documents = array.array("I"), bytearray(), 0


# ---- reading documents ------------------------------------------------------------------------------------

class Counts:
    replaced = 0   # documents with bytes that are no UTF-8
    empty = 0      # documents without text
    dropped = 0    # chat records without a trained token


def read_text(path):
    """A file's text: UTF-8 with broken bytes replaced, no byte-order mark, LF line ends."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:
            raw = f.read()
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror or e}")
    text = raw.decode("utf-8", errors="replace")
    Counts.replaced += "\ufffd" in text and "\ufffd".encode() not in raw
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def records(path):
    """The objects of a .json list or of a .jsonl file, as (place, object)."""
    text = read_text(path)
    if path.removesuffix(".gz").endswith(".json"):
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            fail(f"{path}:{e.lineno}: column {e.colno}: {e.msg}")
        if not isinstance(data, list):
            fail(f"{path}: expected a list of objects, found {type(data).__name__}")
        for i, item in enumerate(data):
            yield f"{path}, entry {i}", item
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as e:
            fail(f"{path}:{number}: column {e.colno}: {e.msg}")


def documents(paths, key="text", doc_sep=None, lines=False):
    """The documents of files."""
    for path in paths:
        name = path.removesuffix(".gz")
        if name.endswith((".json", ".jsonl")):
            for place, item in records(path):
                if not isinstance(item, dict) or not isinstance(item.get(key), str):
                    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                    fail(f"{place}: expected a string under \"{key}\", found: {found}; name another key with --key")
                yield item[key]
            continue
        text = read_text(path)
        sep = doc_sep.encode().decode("unicode_escape") if doc_sep else EOT if EOT in text else None
        parts = text.split("\n") if lines else text.split(sep) if sep else [text]
        for part in parts:
            yield part.strip("\n") if len(parts) > 1 else part


def hub(repo, split, key="text", instead="--from FILE", **options):
    """The documents of a data set on the Hugging Face hub; with key None its whole rows. Downloads are cached and go on where they broke off.
    instead: the option that takes a local file, for messages."""
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0].split(":")[0]
    try:
        if "https_proxy" not in os.environ and "HTTPS_PROXY" not in os.environ:
            socket.create_connection((host, 443), timeout=10).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"   # then only the cache is asked, and at once
    try:
        import datasets
        data = datasets.load_dataset(repo, split=split, **options)
    except ImportError:
        fail(f"the data set {repo} needs the Python package `datasets` (pip install datasets) and a network; "
             f"without them, give a local file with {instead}")
    except Exception as e:   # the package raises whatever its network library does
        fail(f"cannot get the data set {repo} ({type(e).__name__}: {str(e).splitlines()[0][:200]}).\n"
             f"Is there a network? If not, give a local file with {instead}. What was downloaded is kept; "
             "the same command goes on with it.")
    rows = iter(data)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:
            fail(f"reading {repo} broke off ({type(e).__name__}: {str(e).splitlines()[0][:200]}); the same command goes on with it")
        yield row if key is None else row[key]


def download(url, path):
    """A file from the web, going on with a part of it that is there."""
    import urllib.error
    import urllib.request
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    have = os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as r, open(path + ".part", "ab" if have and r.status == 206 else "wb") as f:
            shutil.copyfileobj(r, f)
    except (urllib.error.URLError, OSError) as e:
        fail(f"cannot download {url}: {e}.\nIs there a network? If not, get the file elsewhere and give it with --from FILE")
    os.replace(path + ".part", path)
    return path


def is_val(text, fraction):
    """Which side a document is on: a hash of its text decides."""
    h = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
    return h / 2 ** 64 < fraction


def cut_one(text, fraction):
    """A text of one document: its last part is for validation, from a blank line or a line on."""
    at = len(text) - max(1, int(len(text) * fraction))
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, at)
        if found >= 0 and found + len(mark) < len(text):
            return text[:found + len(mark)], text[found + len(mark):]
    return text[:at], text[at:]


# ---- the tokenizer ----------------------------------------------------------------------------------------

def train_tokenizer(source, vocab, out, marks, digits, sample_bytes):
    """A byte-level BPE of exactly `vocab` tokens, if the text has as many words: marks first, then the 256 bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    if vocab < 256 + len(marks):
        fail(f"--vocab {vocab}: expected at least {256 + len(marks)}, the bytes and {len(marks)} special tokens")
    tok = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if digits else level
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty())

    def sample():
        seen = 0
        for text in source:
            yield text
            seen += len(text)
            if seen > sample_bytes:
                return
    tok.train_from_iterator(sample(), trainer)
    tok.save(os.path.join(out, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": marks[0], "clean_up_tokenization_spaces": False}
    write_whole(os.path.join(out, "tokenizer_config.json"), json.dumps(config, indent=2).encode())
    if tok.get_vocab_size() < vocab:
        print(f"note: the text has pairs for {tok.get_vocab_size()} tokens only, not for {vocab}", file=sys.stderr)


def take_tokenizer(path, out, eot):
    """Copies a tokenizer.json and its tokenizer_config.json, which is made if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    source = os.path.join(folder, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(source):
        fail(f"no tokenizer at {source}; --tokenizer wants a tokenizer.json or its directory")
    target = os.path.join(out, "tokenizer.json")
    if os.path.abspath(source) != os.path.abspath(target):
        shutil.copyfile(source, target)
    config_path, config = os.path.join(folder, "tokenizer_config.json"), {}
    if os.path.isfile(config_path):
        with open(config_path, encoding="utf-8") as f:
            config = json.load(f)
    if not config.get("eos_token"):
        have = {raw.decode(errors="replace") for raw, special in pieces(source) if special}
        found = [e for e in ([eot] if eot else KNOWN_EOTS) if e in have]
        if not found:
            fail(f"{source} does not say which token ends a document; name one with --eot (its special tokens: {', '.join(sorted(have)[:10])})")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config, "eos_token": found[0]}
    write_whole(os.path.join(out, "tokenizer_config.json"), json.dumps(config, indent=2, ensure_ascii=False).encode())


def eot_id(out, eot):
    """The id that ends documents: --eot, or the tokenizer's eos token."""
    with open(os.path.join(out, "tokenizer_config.json"), encoding="utf-8") as f:
        token = eot or json.load(f)["eos_token"]
    token = token["content"] if isinstance(token, dict) else token
    from tokenizers import Tokenizer
    tid = Tokenizer.from_file(os.path.join(out, "tokenizer.json")).token_to_id(token)
    if tid is None:
        fail(f"the tokenizer has no token {token!r}; name the one that ends documents with --eot")
    return tid


# ---- encoding in many processes ---------------------------------------------------------------------------

WORKER = {}


def worker_open(path, eot, encode):
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is the main process's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"   # the processes are the parallelism
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(path)
    tok.encode_special_tokens = True   # written out in a text they are text
    WORKER.update(tok=tok, eot=eot, encode=encode)


def encode_text(tok, eot, batch):
    """[(ids, None)] of texts, each with the end-of-text token behind it."""
    return [(e.ids + [eot], None) for e in tok.encode_batch(batch, add_special_tokens=False)]


def worker_encode(batch):
    """batch: [(number, split, item)]. The tokens come back as bytes, which cost less to send than lists."""
    encoded = WORKER["encode"](WORKER["tok"], WORKER["eot"], [item for _, _, item in batch])
    return [(number, split, array.array("I", ids).tobytes(), trained) for (number, split, _), (ids, trained) in zip(batch, encoded)]


def batches(items, limit=200_000):
    """Groups of documents with about `limit` characters."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += len(item[2]) if isinstance(item[2], str) else 1000
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


# ---- the whole way ----------------------------------------------------------------------------------------

def arguments(description, name, vocab, val=0.01, shard_tokens=100_000_000):
    """The options that all scripts have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default=os.path.join("data", name) if name else None, help="directory for the shards and the tokenizer" + (" (default %(default)s)" if name else ""))
    p.add_argument("--tokenizer", help="a tokenizer.json or its directory; without it one is trained on the text")
    p.add_argument("--vocab", type=int, default=vocab, help="tokens of the tokenizer that is trained (default %(default)s)")
    p.add_argument("--digits", action="store_true", help="the trained tokenizer keeps every digit apart (good for numbers)")
    p.add_argument("--eot", help="the special token that ends documents (default: the tokenizer's eos_token)")
    p.add_argument("--val", type=float, default=val, help="fraction of the documents for validation (default %(default)s)")
    p.add_argument("--shard-tokens", type=int, default=shard_tokens, help="tokens of a shard (default %(default)s)")
    p.add_argument("--sample-bytes", type=int, default=50_000_000, help="how much text the tokenizer is trained on (default %(default)s)")
    p.add_argument("--limit", type=int, help="stop after so many documents")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    p.add_argument("--force", action="store_true", help="delete what is in --out before")
    return p


def sides(train, val, fraction):
    """(number, split, document) of the sources; number counts from 1."""
    number = 0
    for text in train:
        number += 1
        if isinstance(text, str) and not text.strip():
            Counts.empty += 1
            continue
        key = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
        yield number, "val" if val is None and is_val(key, fraction) else "train", text
    for text in val or ():
        number += 1
        if isinstance(text, str) and not text.strip():
            Counts.empty += 1
            continue
        yield number, "val", text


def run(args, train, val=None, source="", encode=encode_text, plain=lambda x: x, marks=(EOT,), masked=False):
    """Prepares data. train, val: functions that return a new iterator over documents; without val a part of train is used.
    encode: from a batch of documents to [(ids, trained or None)]; plain: a document's text, for training the tokenizer."""
    if not 0 <= args.val < 1:
        fail(f"--val {args.val}: expected a fraction from 0 to below 1")
    if args.force and os.path.isdir(args.out):
        if os.listdir(args.out) and not os.path.exists(os.path.join(args.out, "progress.json")):
            fail(f"--force: {args.out} was not made by these scripts; delete it yourself if you mean it")
        shutil.rmtree(args.out)
    os.makedirs(args.out, exist_ok=True)
    settings = {"source": source, "tokenizer": args.tokenizer or f"vocab {args.vocab}" + (", digits" if args.digits else ""), "val": args.val,
                "eot": args.eot, "shard_tokens": args.shard_tokens, "limit": args.limit, "masked": masked}
    progress = Progress(args.out, settings)
    if progress.state["complete"]:
        print(f"{args.out} is complete already; --force prepares it again")
        return report(args, progress)
    limited = (lambda: itertools.islice(train(), args.limit)) if args.limit else train

    # 1. The tokenizer. If the run was interrupted later than this, it is there.
    path = os.path.join(args.out, "tokenizer.json")
    if not (os.path.exists(path) and os.path.exists(progress.path)):
        if args.tokenizer:
            take_tokenizer(args.tokenizer, args.out, args.eot)
        else:
            print(f"training a tokenizer of {args.vocab} tokens", file=sys.stderr)
            train_tokenizer((plain(x) for x in limited()), args.vocab, args.out, list(marks), args.digits, args.sample_bytes)
        progress.save()
    vocab, thash, eot = len(pieces(path)), tokenizer_hash(path), eot_id(args.out, args.eot)

    # 2. Encode and write, in the order of the documents. What complete shards already hold is skipped.
    writers = {s: ShardWriter(args.out, s, progress, args.shard_tokens, vocab, thash, eot, masked) for s in ("train", "val")}
    items = (x for x in sides(limited(), val() if val else None, args.val) if x[0] > writers[x[1]].state["read"])
    bar = tqdm(unit=" tokens", unit_scale=True, desc="encoding", file=sys.stderr)
    last = 0
    try:
        with multiprocessing.Pool(max(1, args.jobs), worker_open, (path, eot, encode)) as pool:
            for group in pool.imap(worker_encode, batches(items)):
                for number, split, data, trained in group:
                    ids = array.array("I", data)
                    last = number
                    if len(ids) == 0:
                        Counts.dropped += 1
                        continue
                    writers[split].add(ids, trained, number)
                    bar.update(len(ids))
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on behind {progress.state['splits']['train']['shards']} complete shards", file=sys.stderr)
        raise SystemExit(130)
    bar.close()
    for writer in writers.values():
        writer.close(last)
    progress.state["complete"] = True
    progress.save()
    report(args, progress)


def report(args, progress):
    splits = progress.state["splits"]
    for split, s in splits.items():
        trained = f", {s['trained']} of them trained" if s["trained"] != s["tokens"] else ""
        print(f"{split:5} {s['documents']} documents, {s['tokens']} tokens{trained} in {s['shards']} shards")
    notes = [(Counts.empty, "empty documents left out"), (Counts.dropped, "records without a trained token left out"),
             (Counts.replaced, "files with bytes that are no UTF-8 (replaced by U+FFFD)")]
    for n, what in notes:
        if n:
            print(f"note: {n} {what}")
    if splits["train"]["tokens"] == 0:
        fail("there is no training text")
    if splits["val"]["tokens"] == 0:
        print("note: no document fell to validation; raise --val")
    print(f"now: ./train_bitnet tinystories data='{args.out}/train_*.bin'" + (f" val_data='{args.out}/val_*.bin'" if splits["val"]["tokens"] else ""))
