#!/usr/bin/env python3
"""FineWeb-Edu: web pages chosen for what they teach. The preset `baseline` is made for it.

    python prepro/fineweb.py --tokenizer gpt2/tokenizer.json                 # sample-10BT from the hub: 27 GB of text
    python prepro/fineweb.py --name sample-100BT --classic --limit 1000000   # FineWeb itself; the first million pages
    python prepro/fineweb.py --from pages/*.jsonl.gz                         # local files, key `text`

Interrupted, the same command goes on with the shard that was being made.
"""
import common


def main():
    p = common.arguments(__doc__, "fineweb", vocab=32000, val=0.001)
    p.add_argument("--from", dest="files", nargs="+", help="local files instead of the hub: .txt, .json, .jsonl, also .gz")
    p.add_argument("--name", default="sample-10BT", help="which sample of the hub's data set (default %(default)s)")
    p.add_argument("--classic", action="store_true", help="FineWeb instead of FineWeb-Edu")
    args = p.parse_args()
    repo = "HuggingFaceFW/" + ("fineweb" if args.classic else "fineweb-edu")
    if args.files:
        common.run(args, lambda: common.documents(args.files), None, "files " + " ".join(args.files))
    else:
        common.run(args, lambda: common.hub(repo, "train", name=args.name, streaming=True), None, f"{repo} {args.name}")


if __name__ == "__main__":
    main()
