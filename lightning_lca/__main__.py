"""Runs the command line: ``python -m lightning_lca``."""

import sys

from lightning_lca.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
