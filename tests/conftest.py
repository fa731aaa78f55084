import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models run faster on one thread, and the same on every machine."""
    torch.set_num_threads(1)
