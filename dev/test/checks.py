"""
checks.py: the frame of the Python tests: check(ok, what) counts, finish() prints the closing line and ends the program.
"""

import sys

passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAIL", what, flush=True)


def failures():
    return failed


def finish():
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed != 0)
