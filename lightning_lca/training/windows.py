"""What is finer than the groups, summed over windows of steps: parameters, neurons, single weights.

Every step of every neuron would be gigabytes; a window per log interval is what a picture shows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_lca.measure.allocation import Weights
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.naming import layer_of
from lightning_lca.measure.parameters import live_weights, named_parameters
from lightning_lca.record.tables import WindowTable, window_tables

SAMPLE = 10_000  # Single weights that are followed; a random sample of larger networks.


class FineSums:
    """Sums credit per parameter, and on demand per neuron and of a sample of single weights.

    Those on demand stay on the device until a window is taken.

    Attributes:
        tables: {"parameters", "neurons" or "weights": a table without rows}, for what is summed.
        metadata: What a reader of the record must know of them, as JSON.
    """

    def __init__(
        self,
        module: nn.Module,
        grouping: Grouping,
        *,
        neurons: bool = False,
        weights: bool = False,
        seed: int = 0,
        process: int = 0,
    ) -> None:
        """Chooses what is summed.

        Args:
            module: Whose parameters.
            grouping: The groups whose sums `of` gets.
            neurons: Sums per neuron, at one more pass over the credits, unless the groups are.
            weights: Follows single weights.
            seed: Draws the sample of weights.
            process: Number of this process, where parameters are cut over several.
        """
        finer = neurons and grouping.by != "neuron"
        names = grouping.parameters
        self._neurons = Grouping(module, "neuron", process, names) if finer else None
        self._sample = _draw(module, seed, names) if weights else {}
        self.metadata = self._describe(module, grouping)
        shapes = {n: p.shape for n, p in named_parameters(module).items()}
        self.tables = window_tables(self.metadata, shapes)
        self._sums: dict[str, Tensor] = {}
        self._parameters = np.zeros(len(names))
        self._steps = self._measured = 0  # In this window; of them, those that are finite.

    @property
    def is_asked(self) -> bool:
        """Whether sums of what is finer than parameters are asked for."""
        return self._neurons is not None or bool(self._sample)

    def neurons(self, values: Weights) -> Tensor | None:
        """Sums credits {name: [*shape]} per neuron: [neurons] float64; None if nobody asked."""
        return None if self._neurons is None else self._neurons.sums(values).credit

    def of(self, values: Weights, neurons: Tensor | None, finite: Tensor) -> dict[str, Tensor]:
        """Returns what one measured step adds to each finer sum; zeros where it is not finite.

        Args:
            values: Credits {name: [*shape]}.
            neurons: What `neurons` makes of them, summed over processes.
            finite: Whether loss and all credits are finite [] bool; no sum counts a step otherwise.
        """
        found = {} if neurons is None else {"neurons": neurons}
        if self._sample:
            found["weights"] = credit = self._gather(values)
            found["helping"] = (credit < 0).long()
        return {n: torch.where(finite.to(v.device), v, 0) for n, v in found.items()}

    def add(self, step: Mapping[str, Tensor]) -> None:
        """Adds what `of` gave of a step; tensors that are new here become the sums."""
        for name, values in step.items():
            if name in self._sums:
                self._sums[name] += values
            else:
                self._sums[name] = values

    def add_parameters(
        self, credit: npt.NDArray[np.float64], finite: npt.NDArray[np.bool_]
    ) -> None:
        """Adds credit per parameter [steps, parameters] of the steps that are finite [steps]."""
        for row in credit[finite]:  # One by one, so that it is the same however many come at once.
            self._parameters += row
        self._steps, self._measured = self._steps + len(finite), self._measured + int(finite.sum())

    def take(self, step: int) -> dict[str, WindowTable]:
        """Copies the window that ends at this step to the host, and starts the next.

        Gives nothing if no step was measured in it.
        """
        if not self._steps:
            return {}
        host = {name: total.cpu().numpy()[None] for name, total in self._sums.items()}
        host["parameters"] = self._parameters[None]
        ends = np.array([step]), np.array([self._measured])
        self._sums, self._parameters = {}, np.zeros_like(self._parameters)
        self._steps = self._measured = 0
        return {
            name: WindowTable(
                table.names,
                *ends,
                host[name].astype(float),
                None if table.helping is None else host["helping"],
                table.kinds,
                table.sampled_from,
                table.layers,
            )
            for name, table in self.tables.items()
        }

    def _describe(self, module: nn.Module, grouping: Grouping) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "parameters": {
                "names": grouping.parameters,
                "kinds": grouping.kinds,
                "layers": [layer_of(name) for name in grouping.parameters],
            }
        }
        if self._neurons is not None:
            stems = self._neurons.stems
            metadata["neurons"] = {
                "stems": [(stem, count) for stem, count, _ in stems],
                "layers": [layer for *_, layer in stems],
            }
        if self._sample:
            indices = {n: i.tolist() for n, i in self._sample.items()}
            metadata["weights"] = {
                "indices": indices,
                "of": grouping.count(live_weights(module)),
            }
        return metadata

    def _gather(self, values: Weights) -> Tensor:
        """Picks the sampled weights' credits: {name: [*shape]} -> [sample] float64 if possible."""
        device = next(iter(values.values())).device
        picked = []
        for name, indices in self._sample.items():
            if indices.device != device:
                indices = self._sample[name] = indices.to(device)
            value = values.get(name)
            picked.append(
                value.reshape(-1)[indices].double()
                if value is not None
                else torch.zeros(len(indices), dtype=torch.float64, device=device)
            )
        return torch.cat(picked)


def _draw(module: nn.Module, seed: int, names: Collection[str]) -> dict[str, Tensor]:
    """Draws single weights evenly from those that train: {parameter: flat indices, ascending}."""
    parameters = [(n, p) for n, p in live_weights(module).items() if n in names]
    ends = np.cumsum([p.numel() for _, p in parameters])
    count = min(SAMPLE, int(ends[-1]))
    drawn = np.sort(np.random.default_rng(seed).choice(int(ends[-1]), count, replace=False))
    pieces = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    starts = ends - [p.numel() for _, p in parameters]
    return {
        name: torch.from_numpy(piece - start)
        for (name, _), piece, start in zip(parameters, pieces, starts, strict=True)
        if len(piece)
    }
