#!/usr/bin/env python3
"""Sends a run's log to Weights & Biases or TensorBoard while it grows, with their own packages.

    python dev/follow.py runs/latest --tensorboard            # event files in RUN/tensorboard; tensorboard --logdir runs
    python dev/follow.py runs/latest --wandb offline          # RUN/wandb; later: wandb sync RUN/wandb/offline-run-*
    python dev/follow.py runs/old --tensorboard --once        # what is there, then stop

It reads RUN/log.jsonl and nothing else of the training process, which does not know about it. When the run has ended it stops. A run
that was resumed logs some steps again; they are sent once.
"""
import argparse
import os
import re
import time

import runlog


class TensorBoard:
    def __init__(self, run, config, args):
        folder = args.dir or os.path.join(run, "tensorboard")
        try:
            from tensorboard.summary import Writer
            self.writer = Writer(folder)
        except ImportError:
            try:
                from tensorboardX import SummaryWriter
                self.writer = SummaryWriter(folder)
            except ImportError:
                runlog.fail("--tensorboard needs the package tensorboard or tensorboardX (pip install tensorboard)")
        self.place = folder

    def send(self, step, values):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    def __init__(self, run, config, args):
        try:
            import wandb
        except ImportError:
            runlog.fail("--wandb needs the package wandb (pip install wandb)")
        self.place = args.dir or os.path.join(run, "wandb")
        folder = args.dir or run
        settings = wandb.Settings(x_disable_stats=True, disable_git=True, save_code=False, console="off", silent=True)
        name = os.path.basename(run)
        self.run = wandb.init(project=args.project, name=name, id=re.sub(r"[^A-Za-z0-9_-]", "-", name), config=config, tags=args.tag, mode=args.wandb,
                              dir=folder, resume="allow" if args.wandb == "online" else None, settings=settings)
        self.run.define_metric("*", step_metric="step")

    def send(self, step, values):
        self.run.log({"step": step, **values}, step=step)

    def flush(self):
        pass

    def close(self):
        self.run.finish()


class Tail:
    """The new rows of a log. When the file was written anew (a run was resumed: steps behind its checkpoint are cut) it is read
    from the start, and rows that were seen are left out."""

    def __init__(self, path):
        self.path, self.inode, self.at, self.rest = path, None, 0, ""
        self.seen = {True: 0, False: 0}   # last step of evaluations and of training rows

    def rows(self):
        try:
            with open(self.path, encoding="utf-8", errors="replace") as f:
                inode, size = os.fstat(f.fileno()).st_ino, os.fstat(f.fileno()).st_size
                if inode != self.inode or size < self.at:
                    self.inode, self.at, self.rest = inode, 0, ""
                f.seek(self.at)
                text = self.rest + f.read()
                self.at = f.tell()
        except FileNotFoundError:
            return []
        whole = text.rfind("\n") + 1
        self.rest = text[whole:]
        out = []
        for row in runlog.parse_lines(text[:whole])[0]:
            kind = runlog.is_eval(row)
            if row["step"] > self.seen[kind]:
                self.seen[kind] = row["step"]
                out.append(row)
        return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", default="latest", help="a run folder, or a name in runs/ (default: latest)")
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard event files")
    p.add_argument("--wandb", choices=["offline", "online"], help="write a Weights & Biases run")
    p.add_argument("--project", default="bitnet.c", help="wandb: project (default %(default)s)")
    p.add_argument("--tag", action="append", help="wandb: tags")
    p.add_argument("--dir", help="where to write (default: in the run folder)")
    p.add_argument("--once", action="store_true", help="send what is there and stop")
    p.add_argument("--every", type=float, default=2, help="seconds between looks (default %(default)s)")
    args = p.parse_args()
    if bool(args.tensorboard) == bool(args.wandb):
        runlog.fail("give one of --tensorboard and --wandb")
    run = runlog.find_run(args.run)
    config = runlog.read_json(os.path.join(run, "config.json"))
    tail = Tail(os.path.join(run, "log.jsonl"))
    sink = (TensorBoard if args.tensorboard else Wandb)(run, config, args)
    sent = 0
    try:
        while True:
            ended = runlog.read_json(os.path.join(run, "manifest.json")).get("status") not in ("running", None)
            for row in tail.rows():
                values = {key: points[0][1] for key, points in runlog.series([row]).items()}
                sink.send(row["step"], values)
                sent += 1
            sink.flush()
            if args.once or ended:
                break
            time.sleep(args.every)
    except KeyboardInterrupt:
        pass
    sink.close()
    print(f"{sent} rows to {sink.place}")


if __name__ == "__main__":
    main()
