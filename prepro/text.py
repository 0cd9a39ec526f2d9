#!/usr/bin/env python3
"""Your own text: a tokenizer and token shards from .txt, .json and .jsonl files (also .gz).

    python prepro/text.py mybook.txt --vocab 2048 && ./train_bitnet tinystories data='data/mybook/train_*.bin'
    python prepro/text.py corpus/*.jsonl --key text --tokenizer gpt2/tokenizer.json --out data/corpus

A .txt file is one document, or several if it holds <|endoftext|>, or as --doc-sep or --lines say. Of a text that is one
document the last part becomes the validation set; of several, a fraction chosen by a hash of each one's text.
"""
import os

import common


def main():
    p = common.arguments(__doc__, None, vocab=4096, val=0.05)
    p.add_argument("files", nargs="+")
    p.add_argument("--key", default="text", help="the key that holds the text in .json and .jsonl files (default %(default)s)")
    p.add_argument("--doc-sep", help=r"cut .txt files here; \n and \t are understood, e.g. --doc-sep '\n\n\n'")
    p.add_argument("--lines", action="store_true", help="each line of a .txt file is a document")
    args = p.parse_args()
    if args.out is None:
        args.out = os.path.join("data", os.path.basename(args.files[0]).split(".")[0])
    read = lambda: common.documents(args.files, args.key, args.doc_sep, args.lines)
    source = "files " + " ".join(args.files)
    first = list(zip(range(2), read()))
    if len(first) == 1 and args.val > 0:
        train, val = common.cut_one(first[0][1], args.val)
        common.run(args, lambda: iter([train]), lambda: iter([val]), source)
    else:
        common.run(args, read, None, source)


if __name__ == "__main__":
    main()
