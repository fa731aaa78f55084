"""Which trainings can be measured: what cannot be is refused at the start, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_lca.measure.parameters import (
    any_cut,
    is_cut,
    is_even,
    live_weights,
    named_parameters,
)
from lightning_lca.runtime.lightnings import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    warn,
)
from lightning_lca.training.settings import Settings

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_TRY = 'Train with strategy="ddp" or on one device, or remove the callback.'
_REFUSED = {
    "FSDPStrategy": "the first version of FSDP flattens the weights of a layer into one long "
    "tensor and cuts that, so that no weight can be followed. Its second version does not: use "
    "ModelParallelStrategy and call torch.distributed.fsdp.fully_shard in configure_model.",
    "DeepSpeedStrategy": "DeepSpeed's engine keeps the weights and steps them out of sight. Use "
    'ModelParallelStrategy with fully_shard (FSDP2), or strategy="ddp".',
    "XLAStrategy": "it has not been tried on TPUs. " + _TRY,
    "SingleDeviceXLAStrategy": "it has not been tried on TPUs. " + _TRY,
}


def check_trainer(trainer: Trainer, module: LightningModule, settings: Settings) -> None:
    """Refuses what cannot be measured, and warns of what old versions of torch disturb.

    Raises:
        MisconfigurationException: Manual optimization without loss_fn, lazy modules that have seen
            no batch, patterns of names that leave nothing to measure, a strategy that hides the
            weights, or weights that are cut in a way that cannot be followed.
    """
    if not module.automatic_optimization and settings.loss_fn is None:
        raise MisconfigurationException(
            "With manual optimization (automatic_optimization=False) training_step steps the "
            "optimizers, so it cannot be run to measure the loss. Tell which loss is meant: "
            "LCACallback(loss_fn=lambda module, batch: ...), which returns a scalar tensor."
        )
    lazy = [n for n, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise MisconfigurationException(
            f"{len(lazy)} parameters have no shape yet, {lazy[0]} the first: they belong to lazy "
            "modules that have seen no batch. Pass one through them before training, e.g. in "
            "setup or configure_model: with torch.no_grad(): self.net(example)."
        )
    _check_selection(module, settings)
    live = live_weights(module, settings.selection)
    odd = [f"{n} ({p.dtype})" for n, p in live.items() if p.is_complex()]
    if odd:
        raise MisconfigurationException(
            f"{len(odd)} parameters are complex, {odd[0]} the first, and credits are real numbers "
            "of real weights. Keep real and imaginary parts as one real parameter of shape "
            "[..., 2], and call torch.view_as_complex on it in forward."
        )
    compiled = [module, *module.modules()]
    if not hasattr(torch.compiler, "set_stance") and any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiler_ctx", None) for m in compiled
    ):
        warn(
            "LCA: the model is compiled, and only torch 2.6 and later can evaluate a compiled "
            "model as if it were not: here a probe of other shapes than the training batches makes "
            "torch.compile add graphs, and training may differ in its last bits from one without "
            "LCACallback. Give the probe batches of the training's shape, or update torch."
        )
    _check_strategy(trainer.strategy)
    if any_cut(module):
        _check_cut(trainer, module, settings)


def distinct_key(mine: Settings, others: Sequence[Settings]) -> str:
    """Names one callback's state in a checkpoint, apart from those of its Trainer's others.

    Raises:
        MisconfigurationException: Another one measures the same.
    """
    if all(mine.key() != other.key() for other in others):
        return mine.key()
    key = mine.key(whole=True)
    if any(key == other.key(whole=True) for other in others):
        raise MisconfigurationException(
            f"Two callbacks of this Trainer measure the same: {key}. Their results could not be "
            "told apart in a checkpoint. Remove one; or, if their probes are different data, name "
            'these: LCACallback(probe={"a": ...}) and LCACallback(probe={"b": ...}), or one '
            'LCACallback(probe={"a": ..., "b": ...}).'
        )
    return key


def _check_selection(module: LightningModule, settings: Settings) -> None:
    """Looks for patterns that match nothing, and for those that leave out all that is trained."""
    selection, names = settings.selection, list(named_parameters(module))
    if selection.is_everything or not names:
        return
    if complaint := selection.complaint(names):
        raise MisconfigurationException(complaint)
    if live_weights(module, selection) or not live_weights(module):
        return
    left = [n for n in names if n in selection]
    found = f"the {len(left)} parameters that are left have requires_grad=False, {left[:1]} first"
    if not left:
        found = f"nothing is left of {len(names)} parameters"
    given = ", ".join(
        f"{argument}={list(patterns)}"
        for argument, patterns in (("include", selection.include), ("exclude", selection.exclude))
        if patterns
    )
    raise MisconfigurationException(
        f"{given} leaves no trained weight to measure: {found}. Include some that are trained "
        f"when training starts, such as {next(iter(live_weights(module)))!r}."
    )


def _check_strategy(strategy: Any) -> None:
    bases = [cls.__name__ for cls in type(strategy).__mro__]
    for base in bases:
        if base in _REFUSED:
            raise MisconfigurationException(
                f"LCACallback cannot measure under {bases[0]}: {_REFUSED[base]}"
            )
    if not set(bases).intersection(_SUPPORTED):
        raise MisconfigurationException(
            f"LCACallback cannot measure under {bases[0]}: it does not know how this strategy "
            f"keeps the weights. {_TRY}"
        )


def _check_cut(trainer: Trainer, module: LightningModule, settings: Settings) -> None:
    """Looks at weights that are cut over processes (DTensors)."""
    if settings.track_parameters:
        raise MisconfigurationException(
            "track_parameters=True keeps a number for every weight, but the weights are cut over "
            "processes and no process holds them all. Use track_parameters=False; neurons=True "
            "resolves every output channel."
        )
    if settings.splits:
        raise MisconfigurationException(
            f"{', '.join(settings.splits)} (breakdown, oscillation) needs whole weights, and these "
            'are cut over processes. Leave it out here, or train with strategy="ddp".'
        )
    if settings.group_by == "head":
        raise MisconfigurationException(
            'group_by="head" needs whole weights, and these are cut over processes, also within '
            'heads. Use group_by="layer", or "neuron", which resolves every output channel.'
        )
    whole = [n for n, p in module.named_parameters() if p.requires_grad and not is_cut(p)]
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1)
    if whole and shares > 1:
        raise MisconfigurationException(
            f"{len(whole)} trained weights are not sharded beside others that are (the first is "
            f"{whole[0]!r}): nothing averages their gradients over processes, so that they differ "
            "from process to process. Call fully_shard on the module that owns them, too."
        )
    odd = [
        f"{name} ({placement})"
        for name, p in module.named_parameters()
        for placement in getattr(p, "placements", ())
        if not is_even(placement)
    ]
    if odd and (settings.neurons or settings.group_by == "neuron"):
        raise MisconfigurationException(
            f"Neurons cannot be followed in weights that are cut twice along one dimension: "
            f"{odd[0]}. Use group_by='layer' and neurons=False."
        )
