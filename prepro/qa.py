#!/usr/bin/env python3
"""Question sets: GSM8K, SVAMP, MultiArith and others into the records that `eval task=qa` and reinforcement learning read.

    python prepro/qa.py gsm8k                                     # from the Hugging Face hub: data/gsm8k/train.jsonl, test.jsonl
    python prepro/qa.py gsm8k --path gsm8k_train.jsonl gsm8k_test.jsonl
    python prepro/qa.py svamp --path svamp.json --val 0.2
    python prepro/qa.py generic --path my.jsonl --query problem --answer solution --out data/mine

A record is {"query": question, "answer": what is right, "reasoning": the way there}; reasoning is left out where the source has none.
    gsm8k        {question, answer}: the text before "####" is the reasoning (without <<48/2=24>>), the number behind it the answer
    svamp        {Body, Question, Answer, Equation}, or {instruction, output, answer}
    multiarith   {question, final_ans}, {sQuestion, lSolutions}, or {instruction, output, answer}
    math         {problem, solution}: the answer is what the last \\boxed{...} holds
    solutions    what models wrote and whether it was right: {question, ground_truth, MODEL: {solution, is_correct}, ...}, from a file only;
                 records {query, answer, label} for ./train_bitnet reward
    generic      any; without --query and --answer the first pair that is there of query/answer, question/answer, problem/solution,
                 instruction/output, prompt/completion
--path takes .json (a list), .jsonl, both also .gz. A file whose name has "train", "test" or "val" in it goes to that split; of files
without such a word a part chosen by a hash of the question becomes test.jsonl.
"""
import argparse
import json
import os
import re

import common

# name: (data set on the hub, its configuration, {split of the hub: ours})
HUB = {"gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
       "svamp": ("ChilleD/SVAMP", None, {"train": "train", "test": "test"}),
       "multiarith": ("ChilleD/MultiArith", None, {"train": "train", "test": "test"}),
       "math": ("HuggingFaceH4/MATH-500", None, {"test": "test"})}
PAIRS = [("query", "answer"), ("question", "answer"), ("problem", "solution"), ("instruction", "output"), ("prompt", "completion")]


def number(value):
    """A number as people write it: 15.0 is 15. Other texts stay."""
    text = str(value).strip()
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def text_of(item, key):
    """A field that is a text or a number, as text; None if it is missing or something else."""
    value = item.get(key)
    if isinstance(value, list) and len(value) == 1:   # MultiArith's lSolutions
        value = value[0]
    return None if isinstance(value, bool) or not isinstance(value, (str, int, float)) else str(value)


def refuse(place, item, wanted):
    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
    common.fail(f"{place}: expected {wanted}; found: {found}")


def fields(item, place, *names):
    out = [text_of(item, n) if isinstance(item, dict) else None for n in names]
    if None in out:
        refuse(place, item, " and ".join(names))
    return out


def gsm8k(item, place, args):
    question, solution = fields(item, place, "question", "answer")
    reasoning, mark, answer = solution.rpartition("####")
    if not mark:
        common.fail(f"{place}: answer: expected a solution that ends in \"#### number\", found {solution[-40:]!r}")
    return question, answer.strip().replace(",", ""), re.sub(r"<<[^<>]*>>", "", reasoning)


def worked(item):
    """The form of instruction data: a question, a solution in words, the number."""
    return isinstance(item, dict) and "instruction" in item and "answer" in item


class Counts:
    contradicted = 0   # solutions that come to another number than the answer


def worked_record(item, place):
    """Such solutions were often written by a model: one that comes to another number than the answer is no reasoning to compare with."""
    question, solution, answer = fields(item, place, "instruction", "output", "answer")
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", solution))
    try:
        agrees = bool(numbers) and abs(float(numbers[-1]) - float(answer)) < 1e-9
    except ValueError:   # an answer in words
        agrees = answer.strip() in solution
    Counts.contradicted += not agrees
    return question, number(answer), re.sub(r"^\s*A:\s*", "", solution) if agrees else None


def svamp(item, place, args):
    if worked(item):
        return worked_record(item, place)
    body, question, answer = fields(item, place, "Body", "Question", "Answer")
    body = body.strip()
    return f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {question.strip()}", number(answer), text_of(item, "Equation")


def multiarith(item, place, args):
    if worked(item):
        return worked_record(item, place)
    if isinstance(item, dict) and "sQuestion" in item:
        question, answer = fields(item, place, "sQuestion", "lSolutions")
        equations = item.get("lEquations")
        return question, number(answer), equations[0] if isinstance(equations, list) and equations and isinstance(equations[0], str) else None
    question, answer = fields(item, place, "question", "final_ans")
    return question, number(answer), None


def boxed(text):
    """What the last \\boxed{...} with balanced braces holds, or None."""
    found = None
    for m in re.finditer(r"\\boxed\{", text):
        depth, at = 1, m.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth == 0:
            found = text[m.end():at - 1]
    return found


def math(item, place, args):
    question, solution = fields(item, place, "problem", "solution")
    answer = boxed(solution)
    if answer is None:
        common.fail(f"{place}: solution: expected an answer in \\boxed{{}}, found {solution[-40:]!r}")
    return question, answer, solution


def generic(item, place, args):
    if args.query or args.answer:
        query, answer = args.query or "query", args.answer or "answer"
    else:
        query, answer = next(((q, a) for q, a in PAIRS if isinstance(item, dict) and q in item and a in item), ("query", "answer"))
    question, right = fields(item, place, query, answer)
    key = args.reasoning or "reasoning"
    if args.reasoning and text_of(item, key) is None:
        refuse(place, item, key)
    return question, number(right), text_of(item, key)


def solutions(item, place, args):
    return (*fields(item, place, "question", "solution"), None)


def each_solution(item, place):
    """One object for each model in a record of GSM8K's example_model_solutions.jsonl."""
    found = [v for v in item.values() if isinstance(v, dict) and "solution" in v] if isinstance(item, dict) else []
    if not found or not all(isinstance(v.get("is_correct"), bool) for v in found):
        refuse(place, item, "question and models with solution and is_correct")
    return [{"question": item.get("question"), **v} for v in found]


LOADERS = {"gsm8k": gsm8k, "svamp": svamp, "multiarith": multiarith, "math": math, "solutions": solutions, "generic": generic}


def split_of_name(path):
    words = re.split(r"[^a-z]+", os.path.basename(path).lower())
    return next((split for word, split in (("train", "train"), ("test", "test"), ("val", "test"), ("valid", "test"), ("validation", "test"))
                 if word in words), None)


def sources(args):
    """(split or None, place, object) of all records."""
    if args.path:
        for path in args.path:
            if not path.removesuffix(".gz").endswith((".json", ".jsonl")):
                common.fail(f"{path}: unsupported format; expected a .json list or a .jsonl file (also .gz)")
            for place, item in common.records(path):
                for one in each_solution(item, place) if args.set == "solutions" else [item]:
                    yield split_of_name(path), place, one
        return
    if args.set not in HUB:
        common.fail(f"{args.set} has no data set of its own; give files with --path FILE")
    repo, config, splits = HUB[args.set]
    options = {"name": config} if config else {}
    for theirs, ours in splits.items():
        for i, item in enumerate(common.hub(repo, theirs, None, "--path FILE", **options)):
            yield ours, f"{repo} {theirs}, entry {i}", item


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("set", choices=list(LOADERS), help="which data set")
    p.add_argument("--path", nargs="+", help="local files instead of the hub")
    p.add_argument("--out", help="directory of train.jsonl and test.jsonl (default data/SET)")
    p.add_argument("--val", type=float, default=0.1, help="fraction for test.jsonl, of files that are for neither (default %(default)s)")
    p.add_argument("--limit", type=int, help="stop after so many records")
    for key in ("query", "answer", "reasoning"):
        p.add_argument("--" + key, help=f"generic: the field that holds the {key}")
    args = p.parse_args()
    if not 0 <= args.val <= 1:
        common.fail(f"--val {args.val}: expected a fraction from 0 to 1")
    out = args.out or os.path.join("data", args.set)
    splits = {"train": [], "test": []}
    for i, (split, place, item) in enumerate(sources(args)):
        if args.limit is not None and i >= args.limit:
            break
        query, answer, reasoning = LOADERS[args.set](item, place, args)
        record = {"query": query.strip(), "answer": answer.strip()}
        if args.set == "solutions":
            record["label"] = int(item["is_correct"])
        if not record["query"] or not record["answer"]:
            common.fail(f"{place}: {'query' if not record['query'] else 'answer'}: expected a text, found an empty one")
        if any("\0" in x for x in (query, answer, reasoning or "")):
            common.fail(f"{place}: expected texts without zero bytes")
        if reasoning and reasoning.strip():
            record["reasoning"] = reasoning.strip()
        splits[split or ("test" if common.is_val(record["query"], args.val) else "train")].append(record)
    if not any(splits.values()):
        common.fail("there are no records in " + (", ".join(args.path) if args.path else args.set))
    os.makedirs(out, exist_ok=True)
    for split, rows in splits.items():
        path = os.path.join(out, split + ".jsonl")
        if rows:
            common.write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("utf-8", "replace"))
            print(f"{path}: {len(rows)} questions, {sum('reasoning' in r for r in rows)} with reasoning")
    if Counts.contradicted:
        print(f"note: {Counts.contradicted} solutions do not end in the answer; their records have no reasoning")
    if args.set == "solutions":
        print(f"now: ./train_bitnet reward init=DIR data={os.path.join(out, 'train.jsonl')} val_data={os.path.join(out, 'test.jsonl')}")
        return
    print(f"now: ./train_bitnet eval DIR task=qa file={os.path.join(out, 'test.jsonl' if splits['test'] else 'train.jsonl')}")


if __name__ == "__main__":
    main()
