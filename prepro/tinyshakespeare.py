#!/usr/bin/env python3
"""Tiny Shakespeare: 1.1 MB of plays as one document; the last tenth is the validation set.

    python prepro/tinyshakespeare.py                          # downloads it
    python prepro/tinyshakespeare.py --from input.txt         # no network needed
"""
import os

import common

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main():
    p = common.arguments(__doc__, "tinyshakespeare", vocab=1024, val=0.1)
    p.add_argument("--from", dest="file", help="the text, if it is here already")
    args = p.parse_args()
    path = args.file or common.download(URL, os.path.join(os.path.dirname(args.out) or ".", "tinyshakespeare.txt"))
    train, val = common.cut_one(common.read_text(path), args.val)
    common.run(args, lambda: iter([train]), lambda: iter([val]), "tinyshakespeare")


if __name__ == "__main__":
    main()
