#!/usr/bin/env python3
"""Tests of prepro/: what the scripts write is what dataloader.h and tokenizer.h read.

    python dev/test/test_prepro.py          # needs gcc and the Python package `tokenizers`

A small C program reads the shards with the project's own headers; texts are made here.
"""
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "prepro"))
import common  # noqa: E402
from checks import check, finish  # noqa: E402

READER = r"""
#include "dataloader.h"
// reader TOKENIZER PATTERN: checks the shards against the tokenizer, then prints each token as "id trained".
int main(int argc, char **argv) {
  Tokenizer t;
  DataLoader d;
  tokenizer_load(&t, argv[1]);
  printf("hash %016llx eos %d vocab %d\n", (unsigned long long)tokenizer_hash(&t), t.eos_id, t.vocab_size);
  if (argc < 3) return 0;
  loader_open_shards(&d, argv[2], t.vocab_padded, t.eos_id, 1, 0);
  loader_check_tokenizer(&d, &t);
  for (size_t i = 0; i < d.n_shards; i++)
    for (uint64_t k = 0; k < d.shards[i].n_tokens; k++) printf("%u %d\n", shard_token_(&d.shards[i], k), shard_trained_(&d.shards[i], k));
  return 0;
}
"""
reader = ""


def script(name, *args, code=0, words=(), env=None):
    """Runs a script; its exit code and words in its output are checked."""
    p = subprocess.run([sys.executable, os.path.join(ROOT, "prepro", name + ".py"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, env={**os.environ, **(env or {})})
    check(p.returncode == code and all(w in p.stdout for w in words), f"{name} {args}: exit {p.returncode}, wanted {code} with {words}\n{p.stdout[-600:]}")
    check("Traceback" not in p.stdout, f"{name} {args}: a traceback\n{p.stdout[-800:]}")
    return p.stdout


def read(out, pattern):
    """(hash, ids, trained) as the C side reads them."""
    p = subprocess.run([reader, out] + ([os.path.join(out, pattern)] if pattern else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if p.returncode:
        check(False, f"the C reader refuses {out}/{pattern}: {p.stderr}")
        return None, [], []
    lines = p.stdout.split("\n")
    rows = [x.split() for x in lines[1:] if x]
    return lines[0].split()[1], [int(r[0]) for r in rows], [int(r[1]) for r in rows]


def write(path, text):
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def stories(n, seed=1):
    rng = random.Random(seed)
    words = "the a cat dog saw ran to home and then little big tree under over it was very happy sad day one said".split()
    return [" ".join(rng.choice(words) for _ in range(rng.randint(5, 60))).capitalize() + ".\n\nThe end of number %d." % i for i in range(n)]


def documents_of(out, pattern, ids):
    """The texts between end-of-text tokens."""
    from tokenizers import Tokenizer
    tok, eot, docs = Tokenizer.from_file(os.path.join(out, "tokenizer.json")), common.eot_id(out, None), [[]]
    for i in ids:
        if i == eot:
            docs.append([])
        else:
            docs[-1].append(i)
    return [tok.decode(d, skip_special_tokens=False) for d in docs[:-1]]


def test_text(tmp):
    docs = stories(300)
    path, out = write(f"{tmp}/s.txt", "\n<|endoftext|>\n".join(docs) + "\n<|endoftext|>\n"), f"{tmp}/text"
    script("text", path, "--vocab", 500, "--out", out, "--val", 0.1, "--shard-tokens", 2000, "--jobs", 2)
    thash, train, trained = read(out, "train_*.bin")
    _, val, _ = read(out, "val_*.bin")
    check(thash == f"{common.tokenizer_hash(out + '/tokenizer.json'):016x}", "the hash is not tokenizer.h's")
    a, b = documents_of(out, "train_*.bin", train), documents_of(out, "val_*.bin", val)
    want = [[], []]
    for d in docs:
        want[common.is_val(d, 0.1)].append(d)
    check(a == want[0] and b == want[1], "documents changed on the way")
    check(10 < len(b) < 60 and all(trained), f"{len(b)} of 300 documents in the validation set")
    check(len([f for f in os.listdir(out) if f.startswith("train_")]) > 3, "only a few shards")

    # More files do not move documents across.
    more = write(f"{tmp}/more.jsonl", "\n".join(json.dumps({"text": d}) for d in stories(100, 2)))
    script("text", path, more, "--tokenizer", out, "--out", f"{tmp}/more", "--val", 0.1)
    moved = documents_of(f"{tmp}/more", "", read(f"{tmp}/more", "val_*.bin")[1])
    check(set(b) <= set(moved) and not set(a) & set(moved), "documents changed sides")
    script("text", path, more, "--tokenizer", out, "--out", f"{tmp}/more", "--val", 0.1, words=["complete already"])
    script("text", path, "--tokenizer", out, "--out", f"{tmp}/more", code=2, words=["other options", "--force"])
    script("text", path, "--tokenizer", out, "--out", f"{tmp}/more", "--force")

    # A special token that someone wrote is text.
    evil = write(f"{tmp}/evil.jsonl", json.dumps({"text": "one <|endoftext|> two"}))
    script("text", evil, "--tokenizer", out, "--out", f"{tmp}/evil", "--val", 0)
    ids = read(f"{tmp}/evil", "train_*.bin")[1]
    check(ids.count(common.eot_id(out, None)) == 1, "a document ended itself")


def test_forms(tmp):
    """Byte-order mark, CRLF, broken bytes, gzip, lines, separators, one document, empty documents."""
    out = f"{tmp}/tok"
    script("text", write(f"{tmp}/t.txt", "\n".join(stories(100))), "--vocab", 400, "--out", out)
    def texts(*args, **kw):
        script("text", *args, "--tokenizer", out, "--out", f"{tmp}/f", "--val", 0, "--force", **kw)
        return documents_of(f"{tmp}/f", "", read(f"{tmp}/f", "train_*.bin")[1])
    check(texts(write(f"{tmp}/b.txt", b"\xef\xbb\xbfa\r\nb\xff")) == ["a\nb\ufffd"], "BOM, CRLF, broken byte")
    check(texts(write(f"{tmp}/l.txt", "one\n\ntwo\n"), "--lines", words=["empty documents left out"]) == ["one", "two"], "lines")
    check(texts(write(f"{tmp}/d.txt", "a\nb\n\n\nc"), "--doc-sep", r"\n\n\n") == ["a\nb", "c"], "separator")
    with gzip.open(f"{tmp}/g.jsonl.gz", "wt") as f:
        f.write('{"body": "x\u00e9"}\n\n{"body": "y"}\n')
    check(texts(f"{tmp}/g.jsonl.gz", "--key", "body") == ["x\u00e9", "y"], "gzip and --key")
    check(texts(write(f"{tmp}/j.json", '[{"text": "x"}, {"text": "y"}]')) == ["x", "y"], "a list")
    book = "\n\n".join(stories(50, 3))
    write(f"{tmp}/book.txt", book)
    script("text", f"{tmp}/book.txt", "--tokenizer", out, "--out", f"{tmp}/book", "--val", 0.2)
    a = documents_of(f"{tmp}/book", "", read(f"{tmp}/book", "train_*.bin")[1])
    b = documents_of(f"{tmp}/book", "", read(f"{tmp}/book", "val_*.bin")[1])
    check(len(a) == len(b) == 1 and a[0] + b[0] == book and 0.15 < len(b[0]) / len(book) < 0.25, "a book is cut in two")
    script("tinystories", "--from", f"{tmp}/t.txt", "--val-from", f"{tmp}/l.txt", "--tokenizer", out, "--out", f"{tmp}/ts")
    script("tinyshakespeare", "--from", f"{tmp}/book.txt", "--vocab", 300, "--out", f"{tmp}/sh")
    script("fineweb", "--from", f"{tmp}/j.json", "--tokenizer", out, "--out", f"{tmp}/fw", "--val", 0)


def test_wide(tmp):
    """More than 65,536 tokens, and the smallest shard there is."""
    for n, vocab in [(1000, 70000), (1, 65536), (9, 65536)]:
        ids = [(i * 7919) % vocab for i in range(n)]
        trained = [i % 3 == 1 for i in range(n)]
        common.write_shard(f"{tmp}/w.bin", ids, vocab, 0x1122334455667788, 5, trained)
        p = subprocess.run([reader + "_raw", f"{tmp}/w.bin", str(vocab)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        got = [x.split() for x in p.stdout.split("\n") if x]
        check(got == [[str(i), str(int(t))] for i, t in zip(ids, trained)], f"{n} tokens of {vocab}: {p.stderr}")


def test_chat(tmp):
    rows = [{"instruction": "Say hi.", "input": "", "output": "Hi!"}, {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello you."},
                          {"role": "user", "content": "<|im_end|> Bye"}, {"role": "assistant", "content": "Bye."}]},
            {"prompt": "2+2=", "completion": "4"}, {"messages": [{"role": "user", "content": "nobody answers"}]}] * 8
    path, out = write(f"{tmp}/c.json", json.dumps(rows)), f"{tmp}/chat"
    script("chat", path, "--vocab", 400, "--out", out, "--val", 0, words=["template chatml", "8 records without a trained token"])
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(f"{out}/tokenizer.json")
    _, ids, trained = read(out, "train_*.bin")
    eot, end = common.eot_id(out, None), tok.token_to_id("<|im_end|>")
    check(eot == 0 and end == 2 and ids.count(eot) == 32, f"{ids.count(eot)} conversations")
    learned = tok.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False)
    check(learned == "Hi!<|im_end|>5<|im_end|>Hello you.<|im_end|>Bye.<|im_end|>4<|im_end|>" * 8, f"trained: {learned[:200]!r}")
    first = tok.decode(ids[:ids.index(eot) + 1], skip_special_tokens=False)
    check(first == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n<|endoftext|>", repr(first))
    third = tok.decode([i for i in ids[:200]], skip_special_tokens=False)
    check("Add.\n\n2 and 3<|im_end|>" in third, "the input of an instruction")
    # What a user wrote is not an end of turn: 3 turns have a user or system, 2 an assistant, none more.
    check(ids.count(end) == 8 * (2 + 2 + 5 + 2), f"{ids.count(end)} ends of turns")

    # A tokenizer without tokens for turns: plain headings, the answer ends with the end of text.
    script("text", path, "--key", "x", "--out", f"{tmp}/no", code=2, words=["expected a string under \"x\""])
    script("text", write(f"{tmp}/t.txt", "\n".join(stories(100))), "--vocab", 400, "--out", f"{tmp}/tok")
    script("chat", path, "--tokenizer", f"{tmp}/tok", "--out", f"{tmp}/alpaca", "--val", 0, words=["template alpaca"])
    tok = Tokenizer.from_file(f"{tmp}/tok/tokenizer.json")
    _, ids, trained = read(f"{tmp}/alpaca", "train_*.bin")
    text = tok.decode(ids[:ids.index(0) + 1], skip_special_tokens=False)
    learned = tok.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False)
    check(text == "### Instruction:\nSay hi.\n\n### Response:\nHi!<|endoftext|>", repr(text))
    check(learned.startswith("Hi!<|endoftext|>5<|endoftext|>Hello you.Bye.<|endoftext|>4<|endoftext|>"), repr(learned[:100]))
    script("chat", path, "--tokenizer", f"{tmp}/tok", "--template", "llama3", "--out", f"{tmp}/x", code=2, words=["<|eot_id|>", "alpaca"])


def test_interrupted(tmp):
    """Killed at a random moment and started again: the same files as without."""
    docs = stories(3000, 5)
    path = write(f"{tmp}/s.jsonl", "\n".join(json.dumps({"text": d}) for d in docs))
    script("text", path, "--vocab", 400, "--out", f"{tmp}/a", "--val", 0.2, "--shard-tokens", 5000, "--jobs", 1)
    want = {f: open(f"{tmp}/a/{f}", "rb").read() for f in sorted(os.listdir(f"{tmp}/a"))}
    command = [sys.executable, f"{ROOT}/prepro/text.py", path, "--tokenizer", f"{tmp}/a", "--out", f"{tmp}/b", "--val", "0.2", "--shard-tokens", "5000", "--jobs", "1"]
    kills = 0
    for attempt in range(4):
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        before = len(os.listdir(f"{tmp}/b")) if os.path.isdir(f"{tmp}/b") else 0
        while p.poll() is None:
            if os.path.isdir(f"{tmp}/b") and len(os.listdir(f"{tmp}/b")) > max(before, 3) + 1:
                os.killpg(p.pid, signal.SIGKILL)   # our own group: the script and its workers
                kills += 1
                break
            time.sleep(0.001)
        p.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    got = {f: open(f"{tmp}/b/{f}", "rb").read() for f in sorted(os.listdir(f"{tmp}/b")) if not f.endswith(".tmp")}
    shards = [f for f in want if f.endswith(".bin")]
    check(kills > 0, "the script was too fast to be interrupted")
    check(len(shards) > 10 and [f for f in got if f.endswith(".bin")] == shards, f"{len(got)} files instead of {len(want)}")
    check(all(got.get(f) == want[f] for f in shards), f"shards differ after {kills} interruptions")


def test_qa(tmp):
    """Question sets in their several forms."""
    def rows(*args, out="o", **kw):
        said = script("qa", *args, "--out", f"{tmp}/{out}", **kw)
        found = {}
        for split in ("train", "test"):
            path = f"{tmp}/{out}/{split}.jsonl"
            if os.path.exists(path):
                with open(path, encoding="utf-8") as f:
                    found[split] = [json.loads(line) for line in f]
                os.remove(path)
        return found, said
    lines = lambda *items: "\ufeff" + "\n".join(json.dumps(x, ensure_ascii=False) for x in items) + "\n\n"
    gsm = {"question": " How many\u2019s? ", "answer": "She has 48/2 = <<48/2=24>>24.\nThen $1,<<x>>000.\n#### 1,080"}
    want = {"query": "How many\u2019s?", "answer": "1080", "reasoning": "She has 48/2 = 24.\nThen $1,000."}
    found, _ = rows("gsm8k", "--path", write(f"{tmp}/gsm_train.jsonl", lines(gsm)), write(f"{tmp}/my-test-1.jsonl", lines(gsm, gsm)))
    check(found == {"train": [want], "test": [want] * 2}, f"gsm8k: {found}")
    with gzip.open(f"{tmp}/s_test.json.gz", "wt") as f:
        json.dump([{"Body": "Tom had 5 apples", "Question": "How many? ", "Answer": 5.0, "Equation": "( 5.0 )"}, {"Body": "A.", "Question": "B?", "Answer": "2.5"},
                   {"instruction": "Q?", "input": "", "output": "\nA: It is 1,234. The answer is 1,234.", "answer": "1234.0"},
                   {"instruction": "Q?", "input": "", "output": "\nA: It is 32.", "answer": "8.0"}], f)
    found, said = rows("svamp", "--path", f"{tmp}/s_test.json.gz", words=["1 solutions do not end in the answer"])
    check(found == {"test": [{"query": "Tom had 5 apples. How many?", "answer": "5", "reasoning": "( 5.0 )"}, {"query": "A. B?", "answer": "2.5"},
                             {"query": "Q?", "answer": "1234", "reasoning": "It is 1,234. The answer is 1,234."}, {"query": "Q?", "answer": "8"}]}, f"svamp: {found}")
    found, _ = rows("multiarith", "--path", write(f"{tmp}/m_train.json", json.dumps([{"question": "a?", "final_ans": "7"}, {"sQuestion": "b?", "lSolutions": [20.0], "lEquations": ["X=4*5"]}])))
    check(found == {"train": [{"query": "a?", "answer": "7"}, {"query": "b?", "answer": "20", "reasoning": "X=4*5"}]}, f"multiarith: {found}")
    found, _ = rows("math", "--path", write(f"{tmp}/math_test.jsonl", lines({"problem": "p", "solution": "so \\boxed{1} or \\boxed{\\frac{1}{2}}."})))
    check(found["test"][0]["answer"] == "\\frac{1}{2}", f"math: {found}")
    wrote = {"question": "q", "ground_truth": "2", "small": {"is_correct": False, "solution": "3"}, "large": {"is_correct": True, "solution": "2"}}
    found, _ = rows("solutions", "--path", write(f"{tmp}/s_train.jsonl", lines(wrote)), words=["reward init=DIR"])
    check(found == {"train": [{"query": "q", "answer": "3", "label": 0}, {"query": "q", "answer": "2", "label": 1}]}, f"solutions: {found}")
    found, _ = rows("generic", "--path", write(f"{tmp}/g.jsonl", lines(*({"prompt": f"q{i}", "completion": i, "why": f"w{i}"} for i in range(200)))), "--val", 0.25, "--reasoning", "why")
    sides = {r["query"]: split for split, part in found.items() for r in part}
    check(len(sides) == 200 and 25 < len(found["test"]) < 80 and all(common.is_val(q, 0.25) == (s == "test") for q, s in sides.items()), "split by hash")
    check({"query": "q7", "answer": "7", "reasoning": "w7"} in found["train"] + found["test"], "a generic record")
    found, _ = rows("generic", "--path", f"{tmp}/g.jsonl", "--query", "why", "--answer", "prompt", "--limit", 3, "--val", 0)
    check(found == {"train": [{"query": f"w{i}", "answer": f"q{i}"} for i in range(3)]}, f"named fields: {found}")

    script("qa", "gsm8k", "--path", write(f"{tmp}/e.jsonl", lines(gsm, {"question": "q", "answer": "no mark 5"})), "--out", f"{tmp}/e", code=2, words=["e.jsonl:2", "####"])
    script("qa", "svamp", "--path", write(f"{tmp}/e2.jsonl", lines({"x": 1})), "--out", f"{tmp}/e", code=2, words=["e2.jsonl:1", "Body and Question and Answer", "found: x"])
    script("qa", "generic", "--path", write(f"{tmp}/e3.jsonl", lines({"query": "  ", "answer": "a"})), "--out", f"{tmp}/e", code=2, words=["e3.jsonl:1", "query", "empty"])
    script("qa", "generic", "--path", write(f"{tmp}/e4.jsonl", "[1]\n"), "--out", f"{tmp}/e", code=2, words=["e4.jsonl:1", "list"])
    script("qa", "generic", "--path", write(f"{tmp}/e5.csv", "a,b"), "--out", f"{tmp}/e", code=2, words=["e5.csv", ".jsonl"])
    script("qa", "generic", "--path", write(f"{tmp}/e6.jsonl", "\n"), "--out", f"{tmp}/e", code=2, words=["no records"])
    script("qa", "generic", "--out", f"{tmp}/e", code=2, words=["--path FILE"])
    script("qa", "solutions", "--path", write(f"{tmp}/e7.jsonl", lines({"question": "q"})), "--out", f"{tmp}/e", code=2, words=["e7.jsonl:1", "is_correct"])
    script("qa", "gsm8k", "--path", f"{tmp}/missing.jsonl", "--out", f"{tmp}/e", code=2, words=["cannot read", "missing.jsonl"])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    script("qa", "gsm8k", "--out", f"{tmp}/e", code=2, words=["openai/gsm8k", "--path FILE"], env=offline)
    check(not os.path.exists(f"{tmp}/e"), "a failed run leaves nothing")


def test_errors(tmp):
    good = write(f"{tmp}/g.txt", "\n".join(stories(50)))
    script("text", f"{tmp}/missing.txt", "--out", f"{tmp}/o", code=2, words=["cannot read", "missing.txt"])
    script("text", write(f"{tmp}/b.jsonl", '{"text": "a"}\n{"text": }\n'), "--out", f"{tmp}/o", code=2, words=["b.jsonl:2", "column 10"])
    script("text", write(f"{tmp}/b.json", '[{"text": "a"},\n {"text" 1}]'), "--out", f"{tmp}/o", code=2, words=["b.json:2", "column"])
    script("text", write(f"{tmp}/k.jsonl", '{"body": "a", "id": 1}\n'), "--out", f"{tmp}/o", code=2, words=["k.jsonl:1", "body, id", "--key"])
    script("text", good, "--vocab", 100, "--out", f"{tmp}/o", "--force", code=2, words=["--vocab 100", "257"])
    script("text", good, "--tokenizer", f"{tmp}/nowhere", "--out", f"{tmp}/o2", code=2, words=["no tokenizer at"])
    script("text", write(f"{tmp}/e.jsonl", ""), "--out", f"{tmp}/o3", "--vocab", 300, code=2, words=["no training text"])
    script("text", good, "--val", 2, "--out", f"{tmp}/o4", code=2, words=["--val 2"])
    script("chat", write(f"{tmp}/c.jsonl", '{"foo": 1}'), "--out", f"{tmp}/o5", code=2, words=["c.jsonl:1", "foo", "messages"])
    os.makedirs(f"{tmp}/mine")
    write(f"{tmp}/mine/thesis.txt", "x")
    script("text", good, "--out", f"{tmp}/mine", "--force", code=2, words=["not made by these scripts"])
    check(os.path.exists(f"{tmp}/mine/thesis.txt"), "--force deleted what was not ours")
    # Offline, or without the package: what to do instead.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    script("tinystories", "--out", f"{tmp}/o6", code=2, words=["--from FILE"], env=offline)
    script("fineweb", "--out", f"{tmp}/o7", code=2, words=["--from FILE"], env=offline)
    script("tinyshakespeare", "--out", f"{tmp}/o8", code=2, words=["--from FILE"], env=offline)


def main():
    global reader
    with tempfile.TemporaryDirectory() as tmp:
        reader = f"{tmp}/reader"
        write(f"{tmp}/reader.c", READER)
        raw = READER.replace("tokenizer_load(&t, argv[1]);", "memset(&t, 0, sizeof t); t.vocab_padded = atoi(argv[2]); t.eos_id = -1;").replace("loader_check_tokenizer(&d, &t);", "")
        raw = raw.replace('printf("hash %016llx eos %d vocab %d\\n", (unsigned long long)tokenizer_hash(&t), t.eos_id, t.vocab_size);', "").replace("argv[2], t.", "argv[1], t.")
        write(f"{tmp}/reader_raw.c", raw)
        for name in ("reader", "reader_raw"):
            subprocess.run(["gcc", "-std=gnu11", "-O2", "-I", ROOT, f"{tmp}/{name}.c", "-o", f"{tmp}/{name}", "-lm"], check=True)
        for test in (test_text, test_forms, test_wide, test_chat, test_interrupted, test_qa, test_errors):
            folder = f"{tmp}/{test.__name__}"
            os.makedirs(folder)
            t0 = time.time()
            test(folder)
            print(f"{test.__name__:20} {time.time() - t0:6.1f} s", flush=True)
    finish()


if __name__ == "__main__":
    main()
