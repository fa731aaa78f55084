"""Acts on what is measured: a layer that has hurt for sure is frozen, or slowed down."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lca.measure.naming import layer_of
from lightning_lca.measure.parameters import named_parameters
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.statistics import LEAST, Mean, holm
from lightning_lca.runtime.lightnings import (
    AnyTrainer,
    LightningCallback,
    LightningModule,
    MisconfigurationException,
    tell,
)
from lightning_lca.training.callback import LCACallback


class LCAFreeze(LightningCallback):
    """Freezes a layer, or scales its learning rate, once it has hurt with a stated confidence.

    Every ``window`` measured steps the LCA of each layer in that window is tested for a mean above
    zero (EWC t-test, Holm over layers). The k-th look takes ``level`` / (k (k + 1)), so that in
    a whole run whose layers neither help nor hurt, chance acts with a probability of at most
    ``level``. One line says what was done; `acted` keeps it, and a checkpoint does.

    Frozen (``scale=0``, one process): ``requires_grad`` is False, the gradient None, and what the
    optimizer kept of these weights (momentum, second moments) is dropped, so that a layer that
    somebody thaws starts afresh. Buffers, such as running statistics, go on. With several
    processes, or another scale, the layer's gradients go on and the optimizer steps as ever; then
    only that share of its step is kept, weight decay included, so that schedules and optimizer
    state are left alone.

    One layer at least stays as it is. What the test does not show: that training without the layer
    ends better. See ``examples/freeze_or_slow.py``.

    Args:
        scale: Of the layer's steps, in [0, 1); 0 freezes.
        level: Chance that noise acts at all in a run, in (0, 1).
        window: Measured steps between two looks, at least 50.
        layers: Patterns of names of layers that may be acted on, e.g. "encoder.*"; None: all.
        probe: Name of the probe that is looked at; None: the first.

    Attributes:
        acted: {layer: optimizer steps done by then}.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> freeze = LCAFreeze(window=100)
        >>> # pl.Trainer(callbacks=[LCACallback(), freeze]).fit(model, loader); freeze.acted
    """

    def __init__(
        self,
        scale: float = 0.0,
        level: float = 0.05,
        window: int = 200,
        layers: str | Sequence[str] | None = None,
        probe: str | None = None,
    ) -> None:
        """Checks the arguments."""
        super().__init__()
        for name, value, least, most in (("scale", scale, 0.0, 1.0), ("level", level, 0.0, 1.0)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value < most or (name == "level" and value == 0):
                raise ValueError(
                    f"{name} must be a number from {least:g} to below {most:g}"
                    f"{', above 0' if name == 'level' else ''}; got {value!r}."
                )
        if isinstance(window, bool) or not isinstance(window, int) or window < LEAST:
            raise ValueError(
                f"window must be a whole number of at least {LEAST}: with fewer steps noise that "
                f"swings slowly would be taken for harm; got {window!r}."
            )
        self.acted: dict[str, int] = {}
        self._scale = float(scale)
        self._level = float(level)
        self._window = window
        self._patterns = [layers] if isinstance(layers, str) else layers and list(layers)
        self._probe = probe
        self._looks = 0
        self._looked_at = 0  # The last step of the last window.
        self._next = 0  # Not before so many steps is there a window.
        self._lca: LCACallback | None = None
        self._slow: dict[int, Tensor] = {}  # Where slowed weights were before a step, by id.
        self._handles: list[Any] = []

    # -- hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Finds the callback that measures, and acts again on what a checkpoint says."""
        measuring = [c for c in trainer.callbacks if isinstance(c, LCACallback)]
        if not measuring:
            raise MisconfigurationException(
                "LCAFreeze acts on what LCACallback measures, and the Trainer has none. Add one: "
                "Trainer(callbacks=[LCACallback(), LCAFreeze()])."
            )
        self._lca = measuring[0]
        self._slow = {}
        for layer in self.acted:
            self._act(layer, trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: AnyTrainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Looks at a window once it is complete."""
        done = int(trainer.global_step)
        if self._lca is None or done < self._next:
            return
        history = self._history(self._lca)
        if history is None:
            return
        rows = np.flatnonzero(history.finite & (history.steps > self._looked_at))
        if len(rows) < self._window:
            every = self._lca.every_n_steps or 1
            self._next = done + max(1, (self._window - len(rows)) * every)
            return
        self._looks += 1
        self._looked_at, self._next = int(history.steps[rows[-1]]), done + 1
        names = self._candidates(history, pl_module)
        layers = Layers.of(history.layers)
        places = [layers.names.index(name) for name in names]
        credit = layers.sums(history.allocated[rows])[:, places]
        level = self._level / (self._looks * (self._looks + 1))
        for i in self._chosen(credit, level, len(self._trained(pl_module)) - 1):
            self._act(names[i], trainer, pl_module)
            self.acted[names[i]] = done
            done_to = "frozen" if not self._scale else f"slowed to {self._scale:g} of its steps"
            tell(
                trainer,
                f"LCA: {names[i]} is {done_to} from step {done} on: it hurt by "
                f"{credit[:, i].sum():.3g} in {len(rows)} measured steps, more than chance would "
                f"have it (level {level:.2g} at look {self._looks}).",
            )

    def on_train_end(self, trainer: AnyTrainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizers."""
        self._leave()

    def on_exception(
        self, trainer: AnyTrainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the optimizers."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Returns what was done, for a checkpoint."""
        return {"acted": dict(self.acted), "looks": self._looks, "looked_at": self._looked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.acted = dict(state_dict["acted"])
        self._looks, self._looked_at = state_dict["looks"], state_dict["looked_at"]

    # -- what is looked at ------------------------------------------------------------------------

    def _history(self, lca: LCACallback) -> History | None:
        """Finds the history of the probe; None if nothing is measured yet."""
        histories = lca.histories
        if not histories:
            return None
        if self._probe is None:
            return next(iter(histories.values()))
        if self._probe not in histories:
            raise MisconfigurationException(
                f"LCAFreeze(probe={self._probe!r}): there is no such probe. LCACallback has "
                f"{', '.join(map(repr, histories))}."
            )
        return histories[self._probe]

    def _candidates(self, history: History, module: LightningModule) -> list[str]:
        """Lists layers that may be acted on, and were not yet, in network order."""
        trained = self._trained(module)
        names = [name for name in dict.fromkeys(history.layers) if name in trained]
        if not names:
            raise MisconfigurationException(
                f"LCAFreeze acts on layers, and group_by={history.group_by!r} has none that is "
                f"trained: {', '.join(list(dict.fromkeys(history.layers))[:3])}. Train with "
                'LCACallback(group_by="layer").'
            )
        patterns = self._patterns
        names = [n for n in names if n not in self.acted]
        return [n for n in names if patterns is None or any(fnmatchcase(n, p) for p in patterns)]

    def _trained(self, module: LightningModule) -> set[str]:
        """Names the layers that are trained as they are."""
        parameters = named_parameters(module).items()
        return {layer_of(n) for n, p in parameters if p.requires_grad} - self.acted.keys()

    def _chosen(self, credit: np.ndarray[Any, Any], level: float, most: int) -> list[int]:
        """Chooses the columns of credit [T, L] that hurt for sure, at most so many, worst first."""
        if not credit.shape[1]:
            return []
        p = holm(Mean.of(credit).above())
        hurt = [int(i) for i in np.flatnonzero(p <= level)]
        return sorted(hurt, key=lambda i: -credit[:, i].sum())[: max(0, most)]

    # -- what is done -----------------------------------------------------------------------------

    def _act(self, layer: str, trainer: AnyTrainer, module: LightningModule) -> None:
        """Freezes a layer, or has its steps scaled from now on."""
        weights = [p for n, p in named_parameters(module).items() if layer_of(n) == layer]
        optimizers = [o for o in trainer.optimizers if isinstance(o, Optimizer)]
        if not self._scale and trainer.world_size == 1:
            for weight in weights:
                _freeze(weight, optimizers)
            return
        for weight in weights:
            self._slow[id(weight)] = torch.empty_like(weight)
        if not self._handles:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._before))
                self._handles.append(optimizer.register_step_post_hook(self._after))

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight, before in self._slowed(optimizer):
            before.copy_(weight)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight, before in self._slowed(optimizer):
            if self._scale:
                weight.copy_(torch.lerp(before, weight, self._scale))
            else:
                weight.copy_(before)

    def _slowed(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        return [(p, self._slow[id(p)]) for p in weights if id(p) in self._slow]

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._slow = [], {}


def _freeze(weight: nn.Parameter | Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Stops a weight where it is: no gradient, and no momentum that would move it on."""
    weight.requires_grad_(False)
    weight.grad = None
    for optimizer in optimizers:
        optimizer.state.pop(weight, None)
