"""Where processes of ours are started from.

Importing torch and Lightning takes seconds. On Linux a process that has done so, and nothing else,
forks one after the other, which share its memory; elsewhere each imports anew.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

_IMPORTS = "lightning_lca.replay.workers"  # And with it all that workers need.


class Nursery:
    """Starts processes."""

    def __init__(self) -> None:
        """Begins to import what they need, in a process of its own, if that was not done before."""
        self._context: Any = multiprocessing.get_context("spawn")
        if sys.platform == "linux":
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([_IMPORTS])
            from multiprocessing import forkserver

            forkserver.ensure_running()

    def pipe(self) -> tuple[Any, Any]:
        """Makes both ends of a connection."""
        ends: tuple[Any, Any] = self._context.Pipe()
        return ends

    def start(self, body: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Starts a process that may start others; it has this one's environment as it is now."""
        process: BaseProcess = self._context.Process(
            target=_begin, args=(dict(os.environ), body, arguments), daemon=False
        )
        process.start()
        return process


def _begin(around: Mapping[str, str], body: Callable[..., None], arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(around)
    body(*arguments)
