import pytest
import torch

from lightning_lca.probe.fingerprint import fingerprint

CPU = torch.device("cpu")
SHAPES = {
    "scalar": (),
    "odd": (3, 5, 7),
    "small": (4000,),
    "large": (300, 333),
    "huge": (3, 2**20 + 5),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def sample(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_single_change_is_seen_and_none_is_imagined(shape, dtype):
    tensor = sample(shape, dtype)
    before = fingerprint([tensor, torch.ones(3)], CPU)
    assert torch.equal(before, fingerprint([tensor.clone(), torch.ones(3)], CPU))
    flat = tensor.reshape(-1).clone()
    for place in {0, len(flat) // 2, len(flat) - 1}:
        changed = flat.clone()
        changed[place] = changed[place].logical_not() if dtype == torch.bool else changed[place] + 1
        assert not torch.equal(before, fingerprint([changed.view(shape), torch.ones(3)], CPU))


def test_a_change_in_any_of_many_tensors_is_seen():
    tensors = [sample((n,), torch.float32) for n in (3, 70_000, 5, 1, 90_000, 2)]
    hashes = set()
    for changed in (None, *tensors):
        versions = [t + 1 if t is changed else t for t in tensors]
        hashes.add(tuple(fingerprint(versions, CPU).tolist()))
    assert len(hashes) == 1 + len(tensors)


@pytest.mark.parametrize("size", [10, 5000, 300_000])
def test_a_shuffle_a_shift_and_a_change_of_sign_are_seen(size):
    tensor = sample((size,), torch.float32)
    swapped = tensor.clone()
    swapped[[0, -1]] = swapped[[-1, 0]]
    signs = tensor.clone()
    plus, minus = (tensor > 0).nonzero()[0], (tensor < 0).nonzero()[0]
    signs[plus], signs[minus] = -signs[plus], -signs[minus]
    versions = [tensor, swapped, signs, tensor.roll(1), tensor.flip(0)]
    versions += [tensor.roll(n) for n in (2, 1024, 2048, 4096) if n < size]
    hashes = [tuple(fingerprint([v], CPU).tolist()) for v in versions]
    assert len(set(hashes)) == len(hashes)


def test_views_sparse_and_empty_tensors_are_hashed_by_their_values():
    base = sample((9, 9), torch.float32)
    for view in (base[1:, 1:], base.T, base[::2], base.reshape(-1)[1:]):
        assert torch.equal(fingerprint([view], CPU), fingerprint([view.clone()], CPU))
    sparse = torch.eye(4).to_sparse()
    assert torch.equal(fingerprint([sparse], CPU), fingerprint([torch.eye(4)], CPU))
    assert fingerprint([], CPU).shape == (0,)
    assert fingerprint([torch.zeros(0)], CPU).shape == (1,)
