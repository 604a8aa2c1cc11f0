"""The command line, ``robattr-fast`` or ``python -m robattr_fast``: one file per command."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Entry point. Exit status: 0; 1 where something failed on the way; 2 for a command that cannot be carried out."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}: pip install 'robattr-fast[cli]'", file=sys.stderr
        )
        sys.exit(2)
    from robattr_fast.cli.app import app

    app(prog_name="robattr-fast")
