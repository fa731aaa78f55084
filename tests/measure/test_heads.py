"""Attention heads: element by element against formulas, and against what a head reads."""

import re

import pytest
import torch
from measure.test_groups import in_numpy, random_values
from torch import nn

from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.heads import head_rows


class Attention(nn.Module):
    """Projections by any names, and numbers by any names."""

    def __init__(self, numbers=None, config=None, **projections):
        super().__init__()
        vars(self).update(numbers or {})
        if config is not None:
            self.config = type("Config", (), config)()
        for name, projection in projections.items():
            self.add_module(name, projection)


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight [in, out]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        down, up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)
        self.lora_A = nn.ModuleDict({"default": down})
        self.lora_B = nn.ModuleDict({"default": up})


def separate(width=12, keys=12, **others):
    names = {"q_proj": width, "k_proj": keys, "v_proj": keys} | others
    return {name: nn.Linear(12, size) for name, size in names.items()}


class Zoo(nn.Module):
    """One attention of each kind."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(12, 3)
        self.other = nn.MultiheadAttention(12, 3, kdim=5, vdim=7, add_bias_kv=True)
        self.fused = Attention({"num_heads": 3}, qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12))
        self.gpt = Attention({"n_head": 3}, c_attn=Conv1D(36, 12), c_proj=Conv1D(12, 12))
        few = {"num_attention_heads": 3, "num_key_value_heads": 1}
        self.llama = Attention(config=few, **separate(keys=4), o_proj=nn.Linear(12, 12, False))
        self.phi = Attention(few, qkv_proj=nn.Linear(12, 20), o_proj=nn.Linear(12, 12))
        parts = {name: nn.Linear(12, 12) for name in ("query", "key", "value")}
        self.bert = Attention({"num_attention_heads": 3}, **parts)
        parts = {name: nn.Linear(12, 12) for name in ("to_q", "to_k", "to_v")}
        out = nn.Sequential(nn.Linear(12, 12), nn.Dropout())
        self.diffusers = Attention({"heads": 3}, **parts, to_out=out)
        self.tuned = Attention({"n_heads": 3}, **separate())
        self.tuned.q_proj = Adapted(self.tuned.q_proj)
        self.mlp = Attention(c_fc=nn.Linear(12, 12), c_proj=nn.Linear(12, 12))


WIDTH, HEADS = 4, 3


def head_of(name, index):
    """Names the head of one element, by the layout that each kind documents; else its layer."""
    module, _, rest = name.partition(".")
    leaf = name.rpartition(".")[2]
    fused = {"own": "in_proj_", "other": "in_proj_", "fused": "qkv.", "gpt": "c_attn."}
    fused["phi"] = "qkv_proj."
    if module in fused and rest.startswith(fused[module]):
        place = index[-1] if module == "gpt" else index[0]
        head = place // WIDTH
        if head < HEADS:
            return f"{module}/q/head {head}"
        few = 1 if module == "phi" else HEADS
        return f"{module}/{'k' if head < HEADS + few else 'v'}/head {(head - HEADS) % few}"
    projection = rest.partition(".")[0]
    outputs = () if module == "mlp" else ("out_proj", "proj", "c_proj", "o_proj", "to_out")
    if leaf == "weight" and projection in outputs:
        return f"{module}/out/head {index[0 if module == 'gpt' else 1] // WIDTH}"
    if "lora_" in name:
        return f"{module}.{projection}.lora"
    found = re.fullmatch(r"(?:to_)?([qkv])(?:_proj(?:_weight)?|uery|ey|alue)?", projection)
    if found:
        return f"{module}/{found[1]}/head {index[0] // WIDTH}"
    return name.rpartition(".")[0]


def test_heads_hold_the_weights_that_their_layout_says():
    module = Zoo()
    grouping, values = Grouping(module, "head"), random_values(module)
    expected = in_numpy(head_of, values)
    assert sorted(grouping.names) == sorted(expected)
    assert "gpt/v/head 2" in expected
    assert "other/k/head 1" in expected
    sums = grouping.sums(values)
    for g, name in enumerate(grouping.names):
        credit, helping, hurting, size = expected[name]
        assert sums.credit[g].item() == pytest.approx(credit, abs=1e-12)
        assert (sums.helping[g], sums.hurting[g], grouping.sizes[g]) == (helping, hurting, size)
    assert sum(grouping.sizes) == sum(p.numel() for p in module.parameters())


def test_a_heads_own_attention_reads_its_queries_and_keys_only():
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    _, weights = attention(x, x, x, average_attn_weights=False)
    grouping = Grouping(nn.ModuleDict({"a": attention}), "head")
    for head in range(3):
        gradients = torch.autograd.grad(
            weights[:, head].square().sum(),
            [attention.in_proj_weight],
            retain_graph=True,
        )
        sums = grouping.sums({"a.in_proj_weight": gradients[0].abs()}).credit
        moved = {n for n, s in zip(grouping.names, sums.tolist()) if s > 0}
        assert moved == {f"a/q/head {head}", f"a/k/head {head}"}


def test_what_a_head_gives_passes_through_its_columns_of_the_output():
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    rows = head_rows(nn.ModuleDict({"a": attention}))["a.out_proj.weight"]
    whole = attention(x, x, x)[0]
    with torch.no_grad():  # Take away the values of head 1 alone: its columns matter no more.
        attention.in_proj_weight[24 + 4 : 24 + 8] = 0
        attention.in_proj_bias[24 + 4 : 24 + 8] = 0
        without = attention(x, x, x)[0]
        attention.out_proj.weight[:, 4:8] += 1
        assert torch.allclose(attention(x, x, x)[0], without, atol=1e-6)
        assert not torch.allclose(without, whole)
    assert rows.labels[1] == "a/out/head 1"
    assert rows.dim == 1


def unknown(**numbers):
    return nn.ModuleDict({"a": Attention(numbers, **separate())})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (unknown(), r"finds no heads in a \(it has none of num_heads, .*num_heads, if that is"),
        (unknown(num_heads=5), r"no heads in a \(its weights do not divide into 5 heads\)"),
        (unknown(num_heads=3, num_kv_heads=2), "its weights do not divide into 3 heads"),
        (nn.ModuleDict({"a": Attention({"num_heads": 3}, qkv=nn.Linear(12, 35))}), "do not divide"),
        (
            nn.ModuleDict(
                {"a": Attention({"num_heads": 3}, in_proj=nn.Linear(12, 36), out=nn.Linear(24, 12))}
            ),
            "do not divide",
        ),
        (nn.Sequential(nn.Linear(2, 2)), "finds no attention in this model"),
    ],
)
def test_heads_that_cannot_be_told_apart_are_grouped_by_layer_with_one_warning(module, message):
    with pytest.warns(UserWarning, match=message) as told:
        grouping = Grouping(module, "head")
    assert len(told) == 1
    assert grouping.names == Grouping(module, "layer").names


def test_one_warning_names_one_of_many():
    module = nn.ModuleDict({f"a{i}": Attention(**separate()) for i in range(4)})
    with pytest.warns(UserWarning, match=r"in a0 \(.*\) and 3 more: their weights") as told:
        Grouping(module, "head")
    assert len(told) == 1


def test_a_state_space_model_is_no_attention():
    mamba = Attention(in_proj=nn.Linear(12, 36), out_proj=nn.Linear(12, 12))
    module = nn.ModuleDict({"mamba": mamba, "a": nn.MultiheadAttention(12, 3)})
    assert Grouping(module, "head").names[:2] == ["mamba.in_proj", "mamba.out_proj"]
