"""Figures, tables and distributions while training goes on: when they are made, where they hang."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lightning_lca.record import summary
from lightning_lca.record.eventfile import EventFile
from lightning_lca.record.findings import Finding
from lightning_lca.record.history import History
from lightning_lca.reporting.distributions import Distribution
from lightning_lca.reporting.loggers import file_writer, is_a
from lightning_lca.reporting.scalars import Scalars
from lightning_lca.runtime.lightnings import Trainer, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OCCASIONS = 10  # Per run; TensorBoard keeps ten images of each tag.
MOST_TIME = 0.05  # Of training, for drawing; what is drawn at the end comes on top.
_FIRST_GUESS = 2.0  # Seconds that a first drawing takes, matplotlib's import included.
_LINES = 8  # More in one chart of Custom Scalars are not read by anyone.


class Gallery:
    """Shows figures, the summary and distributions of credit about ten times per run.

    Figures go to every logger that can show them (TensorBoard, Weights & Biases, Comet, MLflow,
    LitLogger, and those with a method ``log_image(key, images, step)``), as
    ``lca_figures/heatmap`` and so on; where none can, they are PNG files in ``lca_figures`` in the
    log directory, renewed each time. The Markdown summary (``lca/summary``) and the distributions
    (``lca_layer_credit/00 name``: credit of single weights times the layer's number of weights, in
    loss units) go to TensorBoard. A second probe "val" has ``lca_val_figures`` and so on.

    Attributes:
        directory: Where PNG files are, if they are.
    """

    def __init__(self, trainer: Trainer, log_dir: Path | None, *, draws: bool) -> None:
        """Plans the occasions: ten, evenly spaced, or every doubling if no end is known.

        Args:
            trainer: The Trainer that runs.
            log_dir: Directory of the run; None where this process writes nothing.
            draws: Whether figures are made; the rest is cheap.
        """
        self._loggers = list(trainer.loggers) if log_dir is not None else []
        self._tensorboard = [x for x in self._loggers if is_a("TensorBoardLogger", x)]
        self._hooks = [hook for x in self._loggers if (hook := _hook(x)) is not None]
        self._draws = draws and log_dir is not None
        self.directory = None if self._hooks or log_dir is None else log_dir / "lca_figures"
        steps = length(trainer)
        self._marks = [round(steps * (i + 1) / OCCASIONS) for i in range(OCCASIONS)]
        self._next = self._marks[0] if steps else 16
        self._began = time.monotonic()
        self._spent = 0.0
        self._last = _FIRST_GUESS

    @property
    def shows_distributions(self) -> bool:
        """Whether a logger takes them: they cost some passes over the weights."""
        return bool(self._tensorboard)

    def due(self, step: int) -> bool:
        """Whether something should be shown after this step."""
        return bool(self._loggers or self._draws) and step >= self._next

    def show(
        self,
        probe: str,
        history: History,
        distributions: Mapping[str, Distribution],
        step: int,
        findings: Callable[[], Sequence[Finding]] | None = None,
    ) -> None:
        """Shows all there is but figures: the summary and the distributions.

        Args:
            probe: First part of the tags: "lca", or "lca_val" for a second probe.
            history: What was measured.
            distributions: Of the latest step, by layer.
            step: Where on the x axis.
            findings: Looks for those below the summary; by default the history's own.
        """
        if not len(history):
            return
        text = ""
        for logger in list(self._tensorboard):
            try:
                text = text or summary.markdown(history, (findings or history.findings)())
                logger.experiment.add_text(f"{probe}/summary", text, step)
                for label, d in distributions.items():
                    logger.experiment.add_histogram_raw(
                        f"{probe}_layer_credit/{label}",
                        min=d.low,
                        max=d.high,
                        num=int(d.counts.sum()),
                        sum=d.total,
                        sum_squares=d.squares,
                        bucket_limits=d.limits.tolist(),
                        bucket_counts=d.counts.tolist(),
                        global_step=step,
                    )
            except Exception as error:
                self._tensorboard.remove(logger)
                warn(
                    f"LCA: {type(error).__name__} while the summary was logged: {error}. "
                    "TensorBoard gets no more summaries and distributions."
                )

    def draw(
        self,
        histories: Mapping[str, History],
        step: int,
        *,
        last: bool,
        probes: Mapping[Any, History] = MappingProxyType({}),
    ) -> None:
        """Draws the figures, unless that would hold up training by more than a twentieth.

        Args:
            histories: By first part of the tags.
            step: Where on the x axis.
            last: Whether this is the end, where they are drawn in any case.
            probes: The same histories by the probes' names, for what they show together.
        """
        began = time.monotonic()
        allowed = self._spent + self._last <= MOST_TIME * (began - self._began)
        if not self._draws or not (last or allowed):
            return
        from lightning_lca import figures  # Matplotlib is not loaded before there is a need.

        drawn: list[tuple[str, str, Callable[[], Figure]]] = [
            (probe, name, partial(make, history))
            for probe, history in histories.items()
            if len(history)
            for name, make in figures.available(history).items()
        ]
        drawn += [("lca", name, make) for name, make in figures.between(probes).items()]
        for probe, name, make in drawn:
            try:
                self._hang(f"{probe}_figures/{name}", make(), step)
            except OSError as error:  # The disk is full: none of the others would do better.
                self._draws = False
                warn(
                    f"LCA: the figures could not be written: {error}. There will be no more. "
                    "Try `lightning-lca figures` on the record."
                )
                return
            except Exception as error:  # A picture is never worth a training.
                warn(
                    f"LCA: the figure {name} could not be made, {type(error).__name__}: "
                    f"{error}. Try `lightning-lca figures` on the record."
                )
        self._last = time.monotonic() - began
        self._spent += self._last

    def turn(self, step: int) -> None:
        """Looks forward to the next occasion."""
        self._next = self._after(step)

    def occasions(self, steps: Sequence[int]) -> list[int]:
        """Foretells after which of these steps, in their order, something will be shown."""
        found, coming = [], self._next
        for step in steps:
            if step >= coming:
                found.append(step)
                coming = self._after(step)
        return found

    def _after(self, step: int) -> int:
        later = [mark for mark in self._marks if mark > step]
        return later[0] if later else 2 * max(step, 1)

    def _hang(self, tag: str, figure: Figure, step: int) -> None:
        png = BytesIO()
        figure.savefig(png, format="png")
        for hook in list(self._hooks):
            try:
                hook(tag, figure, png.getvalue(), step)
            except Exception as error:  # A tracking server that is down must not end training.
                self._hooks.remove(hook)
                warn(
                    f"LCA: {type(error).__name__} while a figure was logged: {error}. "
                    "This logger gets no more figures."
                )
        if self.directory is not None:
            path = self.directory / f"{_file_name(tag)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png.getvalue())


def lay_out(scalars: Scalars, log_dir: Path) -> None:
    """Lays out the layers' curves in the Custom Scalars tab, eight to a chart.

    The layout is in a sub-run of its own, ``lca_layout``, so that the user's own layout stays.

    Args:
        scalars: Whose keys.
        log_dir: Directory of the record.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import custom_scalars

    labels, p = scalars.labels, scalars.prefix
    charts = {"LCA and residual since the last log": [f"{p}/total", f"{p}/residual"]}
    for kind, title in (("cum", "cumulative LCA"), ("help", "helping fraction")):
        for i in range(0, len(labels), _LINES):
            group = labels[i : i + _LINES]
            which = f", {group[0]} to {group[-1]}" if len(labels) > _LINES else ""
            charts[title + which] = [f"{p}_layer_{kind}/{label}" for label in group]
    layout = {t: ["Multiline", [f"^{re.escape(tag)}$" for tag in c]] for t, c in charts.items()}
    summary = custom_scalars({"LCA": layout})  # type: ignore[no-untyped-call]
    try:
        file = EventFile(log_dir / "lca_layout")
        file.write([Event(step=0, wall_time=time.time(), summary=summary)])
        file.close()
    except OSError as error:
        warn(f"LCA: Custom Scalars could not be laid out: {error}")


def length(trainer: Trainer) -> int:
    """Tells how many steps training will take; 0 if nobody knows."""
    lengths = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if (trainer.max_epochs or -1) > 0 and math.isfinite(batches):
        lengths.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(lengths, default=0)


Hook = Callable[[str, "Figure", bytes, int], None]


def _hook(logger: Any) -> Hook | None:
    """Finds the way in which a logger shows a figure."""
    hooks = {
        "TensorBoardLogger": _to_tensorboard,
        "CometLogger": _to_comet,
        "MLFlowLogger": _to_mlflow,
        "LitLogger": _to_lit,
    }
    # That of W&B, which loggers of others have, too.
    own = _by_log_image if callable(getattr(logger, "log_image", None)) else None
    hook = next((hook for name, hook in hooks.items() if is_a(name, logger)), own)
    return None if hook is None else partial(hook, logger)


def _to_tensorboard(logger: Any, tag: str, figure: Figure, png: bytes, step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = figure.canvas.get_width_height()
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    file_writer(logger).add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _by_log_image(logger: Any, tag: str, figure: Figure, png: bytes, step: int) -> None:
    from PIL import Image

    logger.log_image(key=tag, images=[Image.open(BytesIO(png))], step=step)


def _to_comet(logger: Any, tag: str, figure: Figure, png: bytes, step: int) -> None:
    logger.experiment.log_image(BytesIO(png), name=tag, step=step)


def _to_mlflow(logger: Any, tag: str, figure: Figure, png: bytes, step: int) -> None:
    logger.experiment.log_figure(
        logger.run_id, figure, f"{tag.partition('_')[0]}_figures/{_file_name(tag)}/{step:07d}.png"
    )


def _to_lit(logger: Any, tag: str, figure: Figure, png: bytes, step: int) -> None:
    from litlogger import Image as LitImage  # type: ignore[import-not-found]
    from PIL import Image

    logger.experiment[tag].append(LitImage(Image.open(BytesIO(png))), step=step)


def _file_name(tag: str) -> str:
    """Makes a relative path of a tag, from which no name of a layer or probe can escape."""
    prefix, _, name = tag.partition("_figures/")
    probe = prefix.partition("_")[2]
    return re.sub(r"[^\w.-]+", "_", f"{probe}_{name}" if probe else name)
