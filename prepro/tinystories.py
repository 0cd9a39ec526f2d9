#!/usr/bin/env python3
"""TinyStories (Eldan and Li, 2023): short stories in the words of small children; enough to learn to tell some in hours.

    python prepro/tinystories.py                              # from the Hugging Face hub, 2.1 million stories
    python prepro/tinystories.py --from stories.txt           # local: stories with <|endoftext|> between them
    python prepro/tinystories.py --from train.txt --val-from valid.txt
"""
import common


def main():
    p = common.arguments(__doc__, "tinystories", vocab=2048)
    p.add_argument("--from", dest="files", nargs="+", help="local files instead of the hub: .txt, .json, .jsonl, also .gz")
    p.add_argument("--val-from", nargs="+", help="local files with the validation stories")
    args = p.parse_args()
    if args.files:
        val = (lambda: common.documents(args.val_from)) if args.val_from else None
        common.run(args, lambda: common.documents(args.files), val, "files " + " ".join(args.files + (args.val_from or [])))
    else:
        common.run(args, lambda: common.hub("roneneldan/TinyStories", "train"), lambda: common.hub("roneneldan/TinyStories", "validation"), "TinyStories")


if __name__ == "__main__":
    main()
