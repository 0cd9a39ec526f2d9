#!/usr/bin/env python3
"""What a training run will take: tokens, arithmetic, hours and money.

    python dev/cost.py tinystories --run runs/latest                    # with the tokens/s that this run measured
    python dev/cost.py 1.3b --tok-per-s 800000 --hardware lambda-8xh100 --tokens-per-param 20
    python dev/cost.py --params 3e9 --tokens 60e9 --tok-per-s 0.8e6 --rate 23.92
    python dev/cost.py 350m --mfu 0.4 --hardware aws-8xh100             # no measurement: a share of the peak

The model is a preset of the program (read from bitnet/options.h), a config.json, or a number of parameters. Operations: 6 for each
parameter of a matrix and token (2 forward, 4 backward), and 6 T (heads x head size) a layer for attention, half the square. Money =
hours x rate + storage + egress. Rates are in dev/cost_rates.json, with their date.
"""
import argparse
import json
import math
import os
import re

import runlog

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def presets():
    """{name: {option: value}} from the table in bitnet/options.h, of those that say a shape (finetune takes a model's)."""
    try:
        with open(os.path.join(ROOT, "bitnet", "options.h"), encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        runlog.fail(f"cannot read the presets: {e}")
    table = re.search(r"presets\[\] = \{(.*?)\n\s*\{?\}?;|presets\[\] = \{(.*?)\};", text, re.S)
    body = (table.group(1) or table.group(2)) if table else ""
    out = {}
    for entry in re.finditer(r"\{\s*\"([^\"]+)\",\s*((?:\"[^\"]*\"\s*)+),\s*((?:\"[^\"]*\"\s*)+)\}", body + "}"):
        settings = "".join(re.findall(r"\"([^\"]*)\"", entry.group(3)))
        values = {}
        for item in settings.split():
            key, _, value = item.partition("=")
            try:
                values[key] = float(value) if re.search(r"[.e]", value) else int(value)
            except ValueError:
                values[key] = value
        if "dim" in values:
            out[entry.group(1)] = values
    return out


def number(text):
    """1.3B, 750M, 20e9, 5000."""
    m = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*([kKmMbBtT]?)\s*", text)
    try:
        value = float(m.group(1)) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[m.group(2).lower()]
    except (AttributeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a number such as 1.3B, 750M or 20e9, found {text!r}")
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return value


def positive(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def not_negative(text):
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
    return value


def parameters(c, vocab):
    """[(part, parameters)] of a model with these options."""
    dim, layers, heads, ffn = c["dim"], c["layers"], c["heads"], c["ffn_dim"]
    kv, head = c.get("kv_heads") or heads, c.get("head_dim") or dim // heads
    norms = layers * 2 * dim + dim + layers * (heads * head * c.get("attn_sub_norm", 1) + ffn * c.get("ffn_sub_norm", 1))
    out = [("embedding", vocab * dim), ("attention matrices", layers * (2 * dim * heads * head + 2 * dim * kv * head)),
           ("feed-forward matrices", layers * 3 * dim * ffn), ("norms", norms)]
    if not c.get("tie_embeddings", 1):
        out.append(("head", vocab * dim))
    return out


def flops_per_token(c, parts, vocab, seq):
    """Forward and backward. The embedding is a look-up; the head is a product even where it shares its table."""
    parts = dict(parts)
    matrices = parts["attention matrices"] + parts["feed-forward matrices"] + vocab * c["dim"]
    head = c.get("head_dim") or c["dim"] // c["heads"]
    # Scores and weighted sum: 2 x 2 x seq x width, half of it behind the diagonal, three times for forward and backward.
    return 6 * matrices + 6 * c["layers"] * seq * c["heads"] * head


def measured(run):
    """The median of tokens/s that a run logged, and its options."""
    path = runlog.find_run(run)
    train, _, _ = runlog.read_log(path)
    speed = sorted(v for _, v in runlog.numbers(train, "tok_per_s"))
    if not speed:
        runlog.fail(f"{path} has not logged tokens/s yet")
    return speed[len(speed) // 2], runlog.read_json(os.path.join(path, "config.json"))


def estimate(args, rates):
    """All numbers, as a dictionary."""
    out, config, known = {}, {}, presets()
    speed = args.tok_per_s
    if args.run:
        speed, config = measured(args.run)
    if args.model and args.model.endswith(".json"):
        config = runlog.read_json(args.model) or runlog.fail(f"cannot read {args.model}")
    elif args.model:
        if args.model not in known:
            runlog.fail(f"no preset '{args.model}'; there are: {', '.join(known)}")
        config = {**config, **known[args.model]} if not args.run else {**known[args.model], **{k: config[k] for k in ("vocab",) if config.get(k)}}
    seq = args.seq or config.get("seq_len") or 0
    batch = args.batch or (config.get("batch_size") or 0) * (config.get("grad_accum") or 1)
    if config.get("dim"):
        vocab = int(args.vocab or config.get("vocab") or 32000)
        parts = parameters(config, vocab)
        out["parts"] = dict(parts)
        params = sum(n for _, n in parts)
        flops = flops_per_token(config, parts, vocab, seq or 256)
    elif args.params:
        params, flops = args.params, 6 * args.params
    else:
        runlog.fail("name a preset or a config.json, or give --params or --run")
    tokens = args.tokens or (args.tokens_per_param * params if args.tokens_per_param else None)
    if tokens is None and config.get("steps") and batch and seq:
        tokens = config["steps"] * batch * seq
    if tokens is None:
        tokens = 20 * params
    hardware = rates.get("hardware", {}).get(args.hardware) if args.hardware else None
    if args.hardware and hardware is None:
        runlog.fail(f"no hardware '{args.hardware}'; there are: {', '.join(rates['hardware'])}")
    peak = args.peak or (hardware or {}).get("tflops") or None
    if speed is None and peak and args.mfu:
        speed = args.mfu * peak * 1e12 / flops
    rate = args.rate if args.rate is not None else (hardware or {}).get("rate")
    out.update(parameters=params, tokens=tokens, tokens_per_param=tokens / params, flops_per_token=flops, flops=flops * tokens)
    if batch and seq:
        out["steps"] = math.ceil(tokens / (batch * seq))
        out["tokens_per_step"] = batch * seq
    if speed:
        hours = tokens / speed / 3600
        out.update(tok_per_s=speed, hours=hours, tflops=speed * flops / 1e12)
        if peak:
            out["share_of_peak"] = speed * flops / 1e12 / peak
        if rate is not None:
            out.update(rate=rate, compute_cost=hours * rate, storage=args.storage, egress=args.egress, total_cost=hours * rate + args.storage + args.egress,
                       spot_cost=[hours * rate * 0.3 + args.storage + args.egress, hours * rate * 0.5 + args.storage + args.egress])
    return out


def show(r, rates, hardware):
    def big(v):
        for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if v >= scale:
                return f"{v / scale:.4g} {unit}"
        return f"{v:.4g}"
    lines = [f"parameters      {big(r['parameters'])}"]
    lines += [f"  {part:22} {big(n):>9}  {100 * n / r['parameters']:5.1f} %" for part, n in r.get("parts", {}).items()]
    lines.append(f"tokens          {big(r['tokens'])}, {r['tokens_per_param']:.1f} for each parameter" + (f", {r['steps']} steps of {r['tokens_per_step']}" if "steps" in r else ""))
    lines.append(f"operations      {r['flops']:.3g}, {big(r['flops_per_token'])} for each token")
    if "hours" not in r:
        lines.append("time            unknown: give --run RUN, --tok-per-s N, or --mfu with --hardware or --peak")
        return "\n".join(lines)
    days = f" = {r['hours'] / 24:.1f} days" if r["hours"] > 48 else ""
    lines.append(f"time            {r['hours']:.2f} hours{days} at {r['tok_per_s']:.0f} tokens/s ({r['tflops']:.3g} TFLOP/s" + (f", {100 * r['share_of_peak']:.1f} % of the peak)" if "share_of_peak" in r else ")"))
    if "total_cost" in r:
        where = f" ({hardware}, prices of {rates['date']})" if hardware else ""
        lines.append(f"cost            {r['total_cost']:.2f} = {r['hours']:.2f} h x {r['rate']:.2f}{where} + storage {r['storage']:.2f} + egress {r['egress']:.2f}")
        if r["rate"]:
            lines.append(f"  as spot       {r['spot_cost'][0]:.2f} to {r['spot_cost'][1]:.2f}, at 50 to 70 % less an hour")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", help="a preset, or a config.json of a run")
    p.add_argument("--params", type=number, help="number of parameters instead of a model: 1.3B, 750M")
    p.add_argument("--vocab", type=number, help="vocabulary size (default: the run's, or 32000)")
    p.add_argument("--tokens", type=number, help="training tokens (default: steps x batch of the preset, or 20 for each parameter)")
    p.add_argument("--tokens-per-param", type=number, help="training tokens for each parameter: 20, 30, 40, 60")
    p.add_argument("--batch", type=int, help="rows of a step")
    p.add_argument("--seq", type=int, help="tokens of a row")
    p.add_argument("--run", help="take tokens/s from this run's log")
    p.add_argument("--tok-per-s", type=number, help="tokens/s, if you know it")
    p.add_argument("--mfu", type=positive, help="without a measurement: the share of the peak that is reached, e.g. 0.4")
    p.add_argument("--peak", type=positive, help="peak of the hardware, TFLOP/s")
    p.add_argument("--hardware", help="a row of dev/cost_rates.json")
    p.add_argument("--rate", type=not_negative, help="money an hour")
    p.add_argument("--storage", type=not_negative, default=1.0, help="money for storage (default %(default)s)")
    p.add_argument("--egress", type=not_negative, default=0.0, help="money for moving the model away (clouds: 10 to 20)")
    p.add_argument("--json", action="store_true", help="print JSON")
    args = p.parse_args()
    rates = runlog.read_json(os.path.join(ROOT, "dev", "cost_rates.json"))
    result = estimate(args, rates)
    print(json.dumps(result, indent=2) if args.json else show(result, rates, args.hardware))


if __name__ == "__main__":
    main()
