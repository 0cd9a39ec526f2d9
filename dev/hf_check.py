"""
hf_check.py: does transformers load a checkpoint as it lies, and does it compute the same logits?

What it is:  opens a model directory with AutoTokenizer and AutoModelForCausalLM, without any code of ours, runs the same token ids
             through it and through `train_bitnet logits`, and compares the two at lambda = 1 (transformers' own online
             quantisation, or packed weights) and at lambda = 0 (the float master weights, quantisation taken out of the config).
What not:    no test of training; prepro/reference.py compares gradients.
Needs:       torch, transformers, accelerate (transformers asks for it when a config has a quantization_config).

    python dev/hf_check.py DIR [--binary ./train_bitnet] [--ids "1 2 3"] [--args "precision=fp32"]

Prints a table and exits with 1 if anything is out of bounds, with 2 if a program cannot be run.

The bounds. Errors are relative to the largest logit. At lambda = 0 both sides compute the same float32 network and differ by rounding
only: 1e-5. At lambda = 1 they usually do, too, but a value that lies on the edge between two int8 codes may fall on either side of
it, and one code more or less moves the logits by far more than rounding does; so the bound is 2e-2, with the same most likely
token at every position (unless transformers itself has two that are closer than 1e-3) and a mean Kullback-Leibler divergence of
at most 1e-3. In a deep network without sub-norms one code moves more than that. So where the bound is missed, the result says how far
transformers in float64 is from itself in float32: what differs by no more than that differs by rounding.
"""

import argparse
import os
import subprocess
import sys
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"   # transformers compiles its quantisers; plain functions give the same numbers at once

import numpy as np
import tokenizers
import torch
import transformers

warnings.filterwarnings("ignore", category=FutureWarning)   # about spellings that older versions of transformers need

FLOAT_BOUND, QUANTISED_BOUND, KL_BOUND, NEAR_TIE = 1e-5, 2e-2, 1e-3, 1e-3


def stop(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def our_logits(args, lam, ids, vocab):
    """[positions, vocab] as the binary prints them."""
    command = [args.binary, "logits", args.dir, "ids=" + " ".join(map(str, ids)), f"lambda={lam}", *args.args.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        stop(f"cannot run {args.binary}: {e}; build it with make, or name another one with --binary")
    if done.returncode != 0:
        stop(f"{' '.join(command)}\nended with exit code {done.returncode}: {done.stderr.strip()}")
    rows = [line.split() for line in done.stdout.splitlines()]
    if len(rows) != len(ids) or any(len(row) != vocab for row in rows):
        stop(f"expected {len(ids)} lines of {vocab} numbers, found {len(rows)} lines of {sorted({len(r) for r in rows})}")
    return np.array(rows, dtype=np.float64)


def their_model(path, config):
    """transformers' model in float32; every tensor of the file must be used and none may be missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[:8]}")
    return model.eval()


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def compare(ours, theirs, bound):
    """Columns of the table: relative error, positions with the same most likely token, mean divergence, verdict."""
    top = np.abs(theirs).max()
    error = np.abs(ours - theirs).max() / top
    a, b = ours.argmax(-1), theirs.argmax(-1)
    at = np.arange(len(b))
    same = (a == b) | (theirs[at, b] - theirs[at, a] < NEAR_TIE * top)
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    ok = bool(error <= bound and same.all() and kl <= KL_BOUND)   # False for NaN
    return [f"{error:.2e}", f"{bound:.0e}", f"{(a == b).sum()}/{len(b)}", f"{kl:.1e}"], ok


def check_model(args, lam):
    """One row of the table."""
    config = transformers.AutoConfig.from_pretrained(args.dir)
    quant = getattr(config, "quantization_config", None)
    if quant is not None and not isinstance(quant, dict):
        quant = quant.to_dict()
    if lam == 1 and quant is None:
        return ["-", "-", "-", "-"], True, "no quantization_config: transformers runs it as a float model"
    if lam == 0 and quant is not None and quant.get("quantization_mode", "offline") == "offline":
        return ["-", "-", "-", "-"], True, "packed weights: there are no float weights to compare"
    if lam == 0 and quant is not None:
        del config.quantization_config
    model = their_model(args.dir, config)
    ids = args.ids or [(7 * i + 3) % config.vocab_size for i in range(min(24, config.max_position_embeddings))]
    if len(ids) > config.max_position_embeddings or not all(0 <= i < config.vocab_size for i in ids):
        stop(f"--ids: expected at most {config.max_position_embeddings} ids from 0 to {config.vocab_size - 1}, found {ids}")
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].double().numpy()
    ours = our_logits(args, lam, ids, theirs.shape[1])
    columns, ok = compare(ours, theirs, QUANTISED_BOUND if lam == 1 else FLOAT_BOUND)
    note = f"{type(model).__name__}, {len(ids)} ids"
    if lam == 1 and not ok:
        with torch.no_grad():
            (error, _, same, _), _ = compare(model.double()(torch.tensor([ids])).logits[0].numpy(), theirs, QUANTISED_BOUND)
        note += f"; transformers in float64 differs from itself in float32 by {error}, argmax {same}"
    return columns, ok, note


def check_tokenizer(args):
    """AutoTokenizer must cut texts as tokenizer.json itself says: for some model types it puts another pre-tokenizer in its place."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.dir)
    config = transformers.AutoConfig.from_pretrained(args.dir)
    own = tokenizers.Tokenizer.from_file(os.path.join(args.dir, "tokenizer.json"))
    texts = ("12+34=46", "  It's 2024,  don't\n\n\tpanic!!", "na\u00efve \u20ac5 \u4f60\u597d \U0001F600", "x1234567y  ", "I'LL we've")
    different = [t for t in texts
                 if tokenizer(t, add_special_tokens=False)["input_ids"] != own.encode(t, add_special_tokens=False).ids]
    note = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, the model has {config.vocab_size}"
    if different:
        note += f"; {len(different)} of {len(texts)} texts are not cut as tokenizer.json says, such as {different[0]!r}"
    return ["-", "-", "-", "-"], 0 < len(tokenizer) <= config.vocab_size and not different, note


def main():
    parser = argparse.ArgumentParser(description="compares a checkpoint's logits with transformers")
    parser.add_argument("dir", help="a model directory, or a run: then its newest checkpoint")
    parser.add_argument("--binary", default="./train_bitnet")
    parser.add_argument("--ids", help='token ids, as in "1 2 3" (default: some of the whole vocabulary)')
    parser.add_argument("--args", default="precision=fp32", help="more arguments for the binary")
    args = parser.parse_args()
    latest = os.path.join(args.dir, "checkpoints", "latest")
    if os.path.isfile(latest):   # a run: its newest checkpoint
        args.dir = os.path.join(args.dir, "checkpoints", open(latest).read().strip())
    if not os.path.isfile(os.path.join(args.dir, "config.json")):
        stop(f"{args.dir}: no config.json; expected a checkpoint directory such as RUN/checkpoints/step_000100")
    try:
        args.ids = [int(x) for x in args.ids.replace(",", " ").split()] if args.ids else None
    except ValueError:
        stop(f"--ids: expected numbers such as \"1 2 3\", found {args.ids!r}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"{'check':<12}{'error':>10}{'bound':>8}{'argmax':>9}{'KL':>10}  result")
    failed = 0
    rows = (("tokenizer", check_tokenizer), ("lambda = 1", lambda a: check_model(a, 1)), ("lambda = 0", lambda a: check_model(a, 0)))
    for name, check in rows:
        try:
            columns, ok, note = check(args)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
            columns, ok, note = ["-", "-", "-", "-"], False, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        failed += not ok
        print(f"{name:<12}{columns[0]:>10}{columns[1]:>8}{columns[2]:>9}{columns[3]:>10}  {'ok' if ok else 'FAILED'}: {note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
