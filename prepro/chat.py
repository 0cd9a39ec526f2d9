#!/usr/bin/env python3
"""Instruction data: conversations of which only the answers are trained (a loss mask in the shard says so).

    python prepro/chat.py alpaca.json --tokenizer runs/latest/checkpoints/step_005000 --out data/alpaca
    python prepro/chat.py messages.jsonl --vocab 4096

Records, recognised by their keys: {messages: [{role, content}]}, {instruction, input, output}, {prompt, completion},
{query, answer}, {question, answer}, {text} (all of it trained). Templates:
    chatml   <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n
    llama3   <|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>
    alpaca   ### Instruction:\\n...\\n\\n### Response:\\n...          for tokenizers without tokens for turns
An answer is trained with the token that ends it. Questions and answers are encoded apart, so that the boundary is exact, and what
people wrote never becomes a special token. A conversation ends with the end-of-text token, which is trained where it ends an answer.
"""
import functools
import os

import common

TURN_MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "alpaca": ()}
PAIRS = [("instruction", "output"), ("prompt", "completion"), ("query", "answer"), ("question", "answer")]


def conversation(item, place):
    """[(role, text)] of a record."""
    if isinstance(item, dict):
        if isinstance(item.get("messages"), list):
            turns = [(m.get("role"), m.get("content")) for m in item["messages"] if isinstance(m, dict)]
            if turns and all(isinstance(r, str) and isinstance(c, str) for r, c in turns):
                return turns
        for question, answer in PAIRS:
            if isinstance(item.get(question), str) and isinstance(item.get(answer), str):
                extra = item.get("input") if question == "instruction" else None
                return [("user", item[question] + (f"\n\n{extra}" if extra else "")), ("assistant", item[answer])]
        if isinstance(item.get("text"), str):
            return [("assistant", item["text"])]
    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
    common.fail(f"{place}: expected messages, instruction and output, prompt and completion, query and answer, or text; found: {found}")


def read(files):
    for path in files:
        for place, item in common.records(path):
            yield conversation(item, place)


def pieces(template, turns):
    """[(text or special token, is token, trained)] of a conversation."""
    out = []
    for i, (role, text) in enumerate(turns):
        answer = role == "assistant"
        if template == "chatml":
            out += [("<|im_start|>", True, False), (f"{role}\n", False, False), (text, False, answer), ("<|im_end|>", True, answer), ("\n", False, False)]
        elif template == "llama3":
            out += [("<|start_header_id|>", True, False), (role, False, False), ("<|end_header_id|>", True, False), ("\n\n", False, False),
                    (text, False, answer), ("<|eot_id|>", True, answer)]
        else:
            name = {"user": "### Instruction:\n", "assistant": "### Response:\n"}.get(role, f"### {role.capitalize()}:\n")
            out += [(name if len(turns) > 1 else "", False, False), (text, False, answer), ("\n\n" if i + 1 < len(turns) else "", False, False)]
    return out


def encode(template, tok, eot, batch):
    """Ids and a byte for each: 1 = trained. A conversation without an answer gives nothing."""
    out = []
    for turns in batch:
        ids, trained = [], bytearray()
        for text, is_token, learn in pieces(template, turns):
            part = [tok.token_to_id(text)] if is_token else tok.encode(text, add_special_tokens=False).ids
            ids += part
            trained += bytes([learn]) * len(part)
        if ids and ids[-1] != eot:
            ids.append(eot)
            trained.append(template == "alpaca" and turns[-1][0] == "assistant")
        out.append((ids, bytes(trained)) if any(trained) else ([], b""))
    return out


def main():
    p = common.arguments(__doc__, "chat", vocab=4096, val=0.02)
    p.add_argument("files", nargs="+", help=".json or .jsonl, also .gz")
    p.add_argument("--template", choices=list(TURN_MARKS), help="default: the first one whose tokens the tokenizer has")
    args = p.parse_args()
    marks = (common.EOT, *TURN_MARKS[args.template or "chatml"])
    template = args.template or "chatml"
    if args.tokenizer:
        path = os.path.join(args.tokenizer, "tokenizer.json") if os.path.isdir(args.tokenizer) else args.tokenizer
        if not os.path.isfile(path):
            common.fail(f"no tokenizer at {path}; --tokenizer wants a tokenizer.json or its directory")
        have = {raw.decode(errors="replace") for raw, special in common.pieces(path) if special}
        fits = [t for t, tokens in TURN_MARKS.items() if all(x in have for x in tokens)]
        template = args.template or fits[0]
        if template not in fits:
            common.fail(f"--template {template} needs the tokens {' '.join(TURN_MARKS[template])}, which {path} lacks; it has those of: {', '.join(fits)}")
        # Turns must not end documents, or the loader would cut conversations apart.
        if args.eot is None and common.EOT in have and template == "chatml":
            args.eot = common.EOT
    print(f"template {template}")
    text = lambda turns: "\n".join(t for _, t in turns)
    common.run(args, lambda: read(args.files), None, f"chat {template} " + " ".join(args.files), functools.partial(encode, template), text, marks, masked=True)


if __name__ == "__main__":
    main()
