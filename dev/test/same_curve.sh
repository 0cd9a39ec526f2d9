#!/bin/sh
# same_curve.sh A B: two programs train the same 50 steps of arithmetic; their losses may differ by 1 % at most, at every step.
# Prints "1 passed, 0 failed" or what differed.
a=$1 b=$2 dir=$(mktemp -d)
options="simple steps=50 batch_size=32 lr=5e-4 precision=fp32 eval_problems=20 run_dir=$dir"
"$a" $options name=a >/dev/null 2>"$dir/a.err" || { cat "$dir/a.err"; echo "0 passed, 1 failed"; exit 1; }
"$b" $options name=b >/dev/null 2>"$dir/b.err" || { cat "$dir/b.err"; echo "0 passed, 1 failed"; exit 1; }
losses() { sed -n 's/^{"step": \([0-9]*\), "loss": \([0-9.e+-]*\),.*/\1 \2/p' "$dir/$1"_*/log.jsonl; }
losses a >"$dir/a.txt"
losses b | paste "$dir/a.txt" - | awk '
  { d = $4 / $2 - 1; if (d < 0) d = -d; if (d > worst) { worst = d; at = $1 } n++ }
  END {
    printf "same curve: %d steps, largest difference of a loss %.3f %% at step %d\n", n, 100 * worst, at
    ok = n == 50 && worst <= 0.01
    print ok ? "1 passed, 0 failed" : "0 passed, 1 failed"
    exit !ok
  }'
rc=$?
rm -rf "$dir"
exit $rc
