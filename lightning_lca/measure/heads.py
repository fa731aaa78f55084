"""Attention heads: which rows of which weights belong to which.

Heads are found in `nn.MultiheadAttention`, and in any module that has children by the usual names:
one that projects to queries, keys and values at once, one after the other (``qkv``, ``c_attn``,
...), or one for each (``q_proj``, ``query``, ...). How many heads there are is read from the module
or its ``config``; how wide they are follows from the weights, so that keys and values may have
fewer heads than queries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lca.measure.naming import plain_path
from lightning_lca.measure.parameters import named_modules, named_parameters

_NAMES = {
    "q": ("q_proj", "query", "query_proj", "q", "q_lin", "to_q", "wq"),
    "k": ("k_proj", "key", "key_proj", "k", "k_lin", "to_k", "wk"),
    "v": ("v_proj", "value", "value_proj", "v", "v_lin", "to_v", "wv"),
    "qkv": ("qkv", "c_attn", "in_proj", "qkv_proj", "to_qkv"),
    "out": (
        *("out_proj", "o_proj", "out", "o", "out_lin", "to_out", "wo", "c_proj", "proj"),
        *("output_proj", "dense"),
    ),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_OWN = {  # What nn.MultiheadAttention holds itself.
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    **{f"{role}_proj_weight": role for role in "qkv"},
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
# Within a projection: itself, its first step, or what an adapter is wrapped around.
_INSIDE = ("", "0.", "base_layer.")


@dataclass(frozen=True)
class HeadRows:
    """How one weight splits into heads.

    Attributes:
        labels: The head of every row [rows], as "path of the module/q/head 3"; rows are equally
            large, and follow one another along a dimension.
        dim: That dimension.
    """

    labels: list[str]
    dim: int


@dataclass(frozen=True)
class _Part:
    """A weight or bias of a projection."""

    name: str
    role: str
    dim: int  # Along which heads follow one another.
    length: int


def head_rows(module: nn.Module) -> dict[str, HeadRows]:
    """Finds the heads of a module's attentions: {parameter: its rows}.

    Parameters that belong to no head, such as the bias of an output, have no entry. Where heads
    cannot be told apart there is one warning for all, and none of the attention has an entry.

    Example:
        >>> rows = head_rows(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))
        >>> rows["attn.in_proj_bias"].labels[:3]
        ['attn/q/head 0', 'attn/q/head 1', 'attn/k/head 0']
        >>> rows["attn.out_proj.weight"]
        HeadRows(labels=['attn/out/head 0', 'attn/out/head 1'], dim=1)
    """
    parameters = named_parameters(module)
    found: dict[str, HeadRows] = {}
    odd: list[str] = []
    seen = False
    for path, attention in named_modules(module).items():
        if not _attends(attention):
            continue
        seen = True
        parts = _parts(path, attention, parameters)
        heads, key_heads = _number(attention, _HEADS), _number(attention, _KEY_HEADS)
        if heads is None:
            odd.append(f"{path} (it has none of {', '.join(_HEADS[:4])})")
        elif (rows := _split(path, parts, heads, key_heads)) is None:
            odd.append(f"{path} (its weights do not divide into {heads} heads)")
        else:
            found |= rows
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warnings.warn(
            f'LCA: group_by="head" finds no heads in {odd[0]}{more}: their weights are grouped by '
            "layer. Give the module an attribute num_heads, if that is what it lacks, or pass a "
            "function (name, parameter) -> text as group_by.",
            stacklevel=2,
        )
    elif not seen:
        warnings.warn(
            'LCA: group_by="head" finds no attention in this model, so that all of it is grouped '
            "by layer: neither nn.MultiheadAttention, nor modules with children such as q_proj, "
            "k_proj and v_proj, or qkv.",
            stacklevel=2,
        )
    return found


def _attends(module: nn.Module) -> bool:
    """Whether a module has the parts of an attention."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    children = {name for name, _ in module.named_children()}
    roles = {_ROLES.get(name) for name in children}
    if "in_proj" in children and _number(module, _HEADS) is None:
        return False  # State-space models have one, too.
    return "qkv" in roles or {"q", "k", "v"} <= roles


def _parts(path: str, attention: nn.Module, parameters: dict[str, nn.Parameter]) -> list[_Part]:
    """Lists what of an attention's parameters is made of heads."""
    prefix = f"{path}." if path else ""
    parts = []
    if isinstance(attention, nn.MultiheadAttention):
        for leaf, role in _OWN.items():
            if (own := parameters.get(prefix + leaf)) is not None:
                parts.append(_part(prefix + leaf, role, 0, own))
    for child, projection in attention.named_children():
        if child not in _ROLES:
            continue
        role = _ROLES[child]
        # GPT-2's Conv1D is a linear layer with its weight transposed, [in, out].
        is_transposed = any(type(m).__name__ == "Conv1D" for m in projection.modules())
        for inside in _INSIDE:
            name = f"{prefix}{child}.{inside}"
            weight, bias = (parameters.get(f"{name}{leaf}") for leaf in ("weight", "bias"))
            if weight is not None and weight.dim() > 1:
                dim = int((role == "out") != is_transposed)
                parts.append(_part(f"{name}weight", role, dim, weight))
            if bias is not None and role != "out":
                parts.append(_part(f"{name}bias", role, 0, bias))
    return parts


def _part(name: str, role: str, dim: int, parameter: Tensor) -> _Part:
    return _Part(name, role, dim, parameter.shape[dim])


def _split(
    path: str, parts: list[_Part], heads: int, key_heads: int | None
) -> dict[str, HeadRows] | None:
    """Cuts the parts of one attention into heads of one width; None: they do not fit together."""
    both = heads + 2 * (key_heads or heads)
    wholes = {"qkv": both, "q": heads}
    widths = {part.length / wholes[part.role] for part in parts if part.role in wholes}
    width = min(widths, default=0.0)
    if len(widths) != 1 or not width or width % 1:
        return None
    found = {}
    shown = plain_path(path.split("."))
    for part in parts:
        count = part.length / width
        fits = key_heads is None or part.role not in "kv" or count == key_heads
        if count % 1 or not fits or (part.role == "out" and count != heads):
            return None
        numbers = {part.role: int(count)}
        if part.role == "qkv":
            numbers = {"q": heads, "k": (both - heads) // 2, "v": (both - heads) // 2}
        labels = [
            "/".join([*([shown] if shown else []), role, f"head {i}"])
            for role, number in numbers.items()
            for i in range(number)
        ]
        found[part.name] = HeadRows(labels, part.dim)
    return found


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Reads a number from a module, or from the configuration that it was built by."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None
