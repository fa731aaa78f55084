"""Processes that tests start: what they find around them, and how long they may take."""

import os
import socket
import sys
import time

import pytest

from support import ROOT, TESTS

# Seconds. It ends what hangs, and decides nothing: much longer than all takes on a slow machine.
PATIENCE = 1200


def environment(**more):
    """Makes the environment of a process that imports what tests do, on one thread."""
    places = [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, places))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def wait_for(condition, what, *, pause=0.05, process=None):
    """Asks again and again until there is something, which it returns; fails if nothing comes.

    Args:
        condition: Is asked.
        what: Is waited for, in words.
        pause: Seconds between two questions.
        process: Where it ends, nothing will come.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process is not None and process.poll() is not None:
            pytest.fail(f"The process ended with {process.returncode} before {what}.")
        time.sleep(pause)
    return pytest.fail(f"Waited {PATIENCE} s for {what}.")


def tensorboard(log_dir, *arguments, launch="from tensorboard.main import run_main; run_main()"):
    """Says how TensorBoard is started on a free port, looking for news every second.

    Returns:
        The command, and the port.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", launch, "--logdir", str(log_dir), "--port", str(port)]
    return [*command, "--reload_interval", "1", *arguments], port


def tell_around(connection, names):
    """Tells what a process finds in its environment."""
    connection.send([os.environ.get(name) for name in names])
    connection.close()
