import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.naming import layer_of as layer_told
from lightning_lca.measure.naming import stem_of
from lightning_lca.measure.sums import in_few_kernels, in_the_cache, pieces_of
from lightning_lca.measure.tensors import Flat, bundles


class Zoo(nn.Module):
    """One of each kind of layer that keeps its units somewhere else."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, (2, 3), groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.normed = weight_norm(nn.Linear(5, 3))
        self.spectral = spectral_norm(nn.Linear(5, 2))
        self.lstm = nn.LSTM(3, 2, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight  # Tied.
        self.scale = nn.Parameter(torch.ones(()))
        self.token = nn.Parameter(torch.ones(1, 1, 4))


def random_values(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}
    for value in values.values():
        value[torch.rand(value.shape, generator=generator) < 0.2] = 0.0  # Idle weights.
    return values


def in_numpy(groups_of, values):
    """Sums element by element: groups_of(name, index) -> label."""
    table = {}
    for name, value in values.items():
        array = value.double().numpy()
        for index in np.ndindex(array.shape):
            credit, helping, hurting, size = table.get(groups_of(name, index), (0.0, 0, 0, 0))
            a = array[index]
            table[groups_of(name, index)] = (
                credit + a,
                helping + (a < 0),
                hurting + (a > 0),
                size + 1,
            )
    return table


LAYER = {"parametrizations.weight.original0": "", "parametrizations.weight.original1": ""}


def layer_of(name):
    if name in ("scale", "token"):
        return name
    return (
        name.split(".parametrizations")[0]
        if "parametrizations" in name
        else name.rpartition(".")[0]
    )


def neuron_of(name, index):
    layer = layer_of(name)
    if layer == "lstm":
        return f"lstm.{name.split('h_', 1)[1]}/{index[0]}"
    if (
        name == "up.weight"
    ):  # [in, out / groups, ...]: input channels 0, 1 belong to the first group.
        return f"up/{index[0] // 2 * 3 + index[1]}"
    return f"{layer}/{index[0] if index else 0}"


@pytest.mark.parametrize(
    ("by", "label"),
    [
        ("parameter", lambda name, index: name),
        ("layer", lambda name, index: layer_of(name)),
        ("neuron", neuron_of),
    ],
)
def test_groups_hold_the_weights_that_numpy_puts_there(by, label):
    module = Zoo()
    grouping, values = Grouping(module, by), random_values(module)
    expected = in_numpy(label, values)
    assert grouping.names == list(expected), "network order, tied weights once"
    sums = grouping.sums(values)
    columns = [np.array(column) for column in zip(*expected.values())]
    assert np.allclose(sums.credit.numpy(), columns[0], atol=1e-12)
    assert sums.helping.tolist() == columns[1].tolist()
    assert sums.hurting.tolist() == columns[2].tolist()
    assert grouping.sizes == columns[3].tolist()


def on_a_gpu(rows):
    return in_few_kernels(rows, [(b, *pieces_of(rows[b])) for b in bundles(rows)])


@pytest.mark.parametrize("shape", [(1, 3_000_000), (70_000, 9), (300, 5000), (5, 0), (0, 1)])
def test_the_accelerator_path_gives_the_same_sums_as_the_cache_path(shape):
    rows = [torch.randn(shape), torch.randn(3, 4097)]
    rows[0][:, ::3] = 0.0
    (credit, *counts), (few_credit, *few_counts) = in_the_cache(rows), on_a_gpu(rows)
    # Pieces of up to 4096 are summed in float32: n · 2⁻²⁴ · Σ|x| bounds the rounding.
    bound = torch.cat([min(r.shape[1], 4096) * 2**-24 * r.double().abs().sum(1) for r in rows])
    assert ((credit - few_credit).abs() <= bound).all()
    assert all(torch.equal(a, b) for a, b in zip(counts, few_counts))
    credit, balance, hurting = in_the_cache(rows)
    joined = [r.double().numpy() for r in rows]
    assert np.allclose(credit, np.concatenate([j.sum(1) for j in joined]), atol=1e-8)
    assert balance.tolist() == np.concatenate([np.sign(j).sum(1) for j in joined]).tolist()
    assert hurting.tolist() == np.concatenate([(j > 0).sum(1) for j in joined]).tolist()


def test_groups_without_values_are_zero_and_nan_counts_as_neither():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    grouping = Grouping(module, "layer")
    sums = grouping.sums({"1.weight": torch.tensor([[float("nan"), -1.0]])})
    assert sums.credit[0] == 0
    assert sums.credit[1].isnan()
    assert (sums.helping.tolist(), sums.hurting.tolist()) == ([0, 1], [0, 0])


def test_an_unknown_grouping_is_refused():
    with pytest.raises(
        ValueError,
        match=r"must be one of 'parameter', 'layer', 'neuron', 'head'; .* Got 'unit'",
    ):
        Grouping(nn.Linear(1, 1), "unit")


@pytest.mark.parametrize("flat", [False, True], ids=["one by one", "side by side"])
def test_a_layer_that_grew_keeps_its_credit_and_counts_no_weight(flat):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    by_layer, by_neuron = Grouping(net, "layer"), Grouping(net, "neuron")
    net[1] = nn.Linear(4, 5)
    values = {n: torch.full_like(p, -1.0).detach() for n, p in net.named_parameters()}
    if flat:
        values = Flat(values)
        for value in values.values():
            value.fill_(-1.0)
    with pytest.warns(UserWarning, match=r"1\.weight has another size .* credit still counts"):
        sums = by_layer.sums(values)
    assert sums.credit.tolist() == [-16.0, -25.0]
    assert (sums.helping.tolist(), sums.hurting.tolist()) == ([16, 0], [0, 0])
    assert not by_layer.leaves_out
    with pytest.warns(UserWarning, match=r"1\.weight has another size .* shows as residual"):
        sums = by_neuron.sums(values)
    assert sums.credit.tolist() == [-4.0] * 4 + [0.0] * 2
    assert by_neuron.leaves_out


def test_a_function_names_the_groups_in_network_order():
    module = Zoo()

    def by_size(name, parameter):
        return "scalars" if parameter.dim() == 0 else f"{parameter.dim()} dimensions"

    grouping, values = Grouping(module, by_size), random_values(module)
    expected = in_numpy(lambda name, _: by_size(name, values[name]), values)
    assert grouping.names == grouping.layers == list(expected)
    assert grouping.by == "custom"
    credit = [column[0] for column in expected.values()]
    assert np.allclose(grouping.sums(values).credit.numpy(), credit, atol=1e-12)
    assert grouping.sizes == [column[3] for column in expected.values()]


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (None, TypeError, r"group_by gave None for 0\.bias, a NoneType. Return the name of its"),
        (3, TypeError, r"group_by gave 3 for 0\.bias, a int"),
        (" ", ValueError, r"group_by gave an empty text for 0\.bias"),
    ],
)
def test_a_label_that_is_no_text_is_an_error_that_names_the_parameter(label, error, message):
    with pytest.raises(error, match=message):
        Grouping(nn.Sequential(nn.Linear(1, 1)), lambda n, p: label if "bias" in n else "w")


def test_modules_are_grouped_to_a_depth():
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    module = nn.ModuleDict(
        {"enc": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "out": nn.Linear(4, 1)}
    )
    values = {n: torch.full_like(p, -1.0).detach() for n, p in module.named_parameters()}
    for depth in (1, 2, 3, 9):
        grouping = Grouping(module, f"module:{depth}")

        def owner(name, _, depth=depth):
            return ".".join(name.split(".")[:-1][:depth])

        expected = in_numpy(owner, values)
        assert grouping.names == list(expected)
        assert grouping.sums(values).credit.tolist() == [c for c, *_ in expected.values()]


def test_parameters_that_are_left_out_are_in_no_group():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    grouping = Grouping(module, "layer", only={"0.bias", "1.weight"})
    assert (grouping.names, grouping.sizes) == (["0", "1"], [3, 3])
    assert grouping.parameters == ["0.bias", "1.weight"]


@pytest.mark.parametrize(
    ("name", "layer", "neurons"),
    [
        ("base_model.model.fc.lora_A.default.weight", "fc.lora", "fc.lora_A"),
        ("net.base_model.model.fc.lora_B.default.weight", "net.fc.lora", "net.fc.lora_B"),
        ("net.base_model.model.fc.lora_B.other.weight", "net.fc.lora.other", "net.fc.lora_B.other"),
        ("net.base_model.model.emb.lora_embedding_A.default", "net.emb.lora", None),
        ("net.base_model.model.fc.base_layer.weight", "net.fc", "net.fc"),
        ("net.fc.lora_A", "net.fc.lora", "net.fc.lora_A"),
        ("net.base_layer.weight", "net.base_layer", "net.base_layer"),
        ("base_model.model.weight", "weight", "weight"),
    ],
)
def test_adapters_have_a_readable_name_for_both_matrices(name, layer, neurons):
    assert layer_told(name) == layer
    assert neurons is None or stem_of(name) == neurons
