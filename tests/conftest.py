import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models run faster on one thread, and the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard():
    """A shell that starts the tests in the background has them ignore it, and their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _figures_only_where_they_are_looked_at(request, monkeypatch):
    """Every training ends with some seconds of drawing, which most tests do not look at."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(
            "lightning_lca.reporting.figures.Gallery.draw", lambda *args, **kwargs: None
        )
