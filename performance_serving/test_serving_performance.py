"""Load test of a server that streams tokens, this project's or another's.

    python test_serving_performance.py --task 1 -X 0.625 -T 2400
    python test_serving_performance.py compare before.json after.json

Everything lies in load_test/; docs/benchmarking.md says what the figures mean.
"""

from __future__ import annotations

import sys

from load_test.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
