"""`robattr-fast bench` from a checkout: ``python -m benchmarks``.

``python -m benchmarks render`` writes tables and plot of the documents.
"""

import sys

from benchmarks.render import main as render
from robattr_fast.cli.app import app

if __name__ == "__main__":
    if sys.argv[1:2] == ["render"]:
        sys.exit(render(sys.argv[2:]))
    app(["bench", *sys.argv[1:]], prog_name="python -m benchmarks")
