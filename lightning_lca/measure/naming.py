"""Readable names: the layer that a parameter belongs to, told from the parameter's own name."""

from __future__ import annotations

_LORA = frozenset(
    ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
)


def layer_of(name: str) -> str:
    """Names the layer that a parameter belongs to: its module, or itself where that is the root.

    The two matrices of an adapter (LoRA) are one layer, and what PEFT puts around a model is left
    out of the name.

    Example:
        >>> layer_of("body.conv.weight"), layer_of("conv.parametrizations.weight.original")
        ('body.conv', 'conv')
        >>> layer_of("net.base_model.model.fc.lora_A.default.weight")
        'net.fc.lora'
        >>> layer_of("net.base_model.model.fc.base_layer.weight")
        'net.fc'
    """
    parts = name.split(".")
    if place := _adapter(parts):
        which = _of_adapter(parts[place:])  # "default" is what nobody named.
        return plain_path([*parts[: place - 1], "lora", *which])
    return plain_path(module_of(name).split(".")) or parts[-1]


def _adapter(parts: list[str]) -> int:
    """Finds what of a name comes after the matrix of an adapter; 0: it is none."""
    return next((i + 1 for i, part in enumerate(parts) if part in _LORA), 0)


def _of_adapter(parts: list[str]) -> list[str]:
    return [part for part in parts if part not in ("default", "weight", "bias")]


def plain_path(parts: list[str]) -> str:
    """Names a module without what PEFT puts around it."""
    for i in range(len(parts) - 1):
        if parts[i : i + 2] == ["base_model", "model"]:
            parts = parts[:i] + [part for part in parts[i + 2 :] if part != "base_layer"]
            break
    return ".".join(parts)


def stem_of(name: str) -> str:
    """Names what a parameter's neurons are numbered in: its layer; of adapters each matrix."""
    parts = name.split(".")
    if place := _adapter(parts):
        return plain_path([*parts[:place], *_of_adapter(parts[place:])])
    return layer_of(name)


def module_of(name: str) -> str:
    """Finds the module that a parameter belongs to; "" is the root."""
    # A parametrized weight lives at conv.parametrizations.weight.original, and belongs to conv.
    return name.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".")
