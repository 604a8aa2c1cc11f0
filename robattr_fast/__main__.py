"""``python -m robattr_fast``: the command line."""

from robattr_fast.cli import main

main()
