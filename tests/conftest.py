import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models run faster on one thread, and the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _figures_only_where_they_are_looked_at(request, monkeypatch):
    """Every training ends with some seconds of drawing, which most tests do not look at."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr("lightning_lca.gallery.Gallery.draw", lambda *args, **kwargs: None)
