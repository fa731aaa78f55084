import signal

import pytest
import torch

pytest.register_assert_rewrite("support")  # So that its assertions tell values, too.
from support.figures import drawn, not_drawn  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models run faster on one thread, and the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard():
    """A shell that starts the tests in the background has them ignore it, and their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_drawn():
    """Neither in tests nor in what they share."""
    with not_drawn():
        yield


@pytest.fixture(autouse=True)
def _but_where_it_is_looked_at(request):
    if request.node.get_closest_marker("figures") is None:
        yield
    else:
        with drawn():
            yield
