"""Whether trainings draw: some seconds at the end, which most tests do not look at."""

from contextlib import contextmanager

import pytest

from lightning_lca.reporting.figures import Gallery

_draw = Gallery.draw


@contextmanager
def not_drawn():
    """Within it no training draws figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gallery, "draw", lambda *args, **kwargs: None)
        yield


@contextmanager
def drawn():
    """Within it they draw, as they do for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gallery, "draw", _draw)
        yield
