"""The trainings that the guide shows, each with everything recorded.

Made once and kept in ``.runs``; remove a folder in there to train anew. Nets, data and seeds are
those of the examples, so that the first two have the numbers that these print.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History, LCACallback

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / ".runs"
IMAGES = ROOT / "lightning_lca" / "docs" / "images"
LARGEST = 150_000  # Bytes of a picture.


def example(name: str) -> ModuleType:
    """Imports a file of ``examples``."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def quiet() -> None:
    """Silences what is no news here, and takes one thread."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def fit(
    name: str | None, module: pl.LightningModule, loaders: Any, lca: list[LCACallback], epochs: int
) -> None:
    """Trains; with a name into ``.runs``."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(lca),
        logger=TensorBoardLogger(RUNS, name="", version=name) if name else False,
        default_root_dir=RUNS / "other",
        log_every_n_steps=5,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, *loaders)


EVERYTHING: dict[str, Any] = {
    "probe_batches": 4,
    "neurons": True,
    "track_parameters": True,
    "breakdown": True,
    "oscillation": True,
    "figures": False,
}


def digits(name: str, **options: Any) -> None:
    """Trains as ``examples/digits.py`` does."""
    module = example("digits")
    torch.manual_seed(0)
    loaders = module.loaders()
    fit(name, module.DigitsNet(), loaders, [LCACallback(**EVERYTHING | options)], 10)


def too_much_momentum(name: str, seed: int = 0) -> None:
    """Trains as the baseline of ``examples/freeze_or_slow.py`` does, so that a layer hurts."""
    module = example("freeze_or_slow")
    pl.seed_everything(seed, verbose=False)
    train, val = module.data()
    net = module.Net(0.95, lambda layer: 1.0)
    loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=64)
    fit(name, net, loaders[:1], [LCACallback(**EVERYTHING)], 10)


def terms(name: str) -> None:
    """Trains the net of ``examples/digits.py`` on cross-entropy and a penalty on its weights."""
    module = example("digits")

    def loss(net: Any, batch: Any) -> dict[str, torch.Tensor]:
        penalty = sum(layer.weight.abs().sum() for layer in (net.conv2, net.hidden))
        return {"cross_entropy": F.cross_entropy(net(batch[0]), batch[1]), "l1": 1e-4 * penalty}

    class Penalised(module.DigitsNet):  # type: ignore[name-defined, misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return sum(loss(self, batch).values())

    torch.manual_seed(0)
    loaders = module.loaders()
    lca = LCACallback(loss_fn=loss, probe_batches=4, breakdown="term", figures=False)
    fit(name, Penalised(), loaders, [lca], 10)


def few_images(name: str) -> None:
    """Trains on 128 images, a fifth of them with labels drawn at random: it overfits."""
    module = example("digits")
    torch.manual_seed(0)
    train, val = module.loaders()
    x, y = (torch.stack(part) for part in zip(*(train.dataset[i] for i in range(128)), strict=True))
    wrong = torch.rand(len(y)) < 0.2
    y[wrong] = torch.randint(10, (int(wrong.sum()),))
    loaders = DataLoader(TensorDataset(x, y), 64, shuffle=True), val
    lca = LCACallback(probe={"train": "train", "val": "val"}, probe_batches=4, figures=False)
    fit(name, module.DigitsNet(), loaders, [lca], 100)


def unshuffled(name: str) -> None:
    """Trains on digits in the order of their classes, ten batches an epoch."""
    module = example("freeze_or_slow")
    pl.seed_everything(0, verbose=False)
    train, _ = module.data()
    order = train.tensors[1].argsort(stable=True)
    data = TensorDataset(*(part[order] for part in train.tensors))
    net = module.Net(0.5, lambda layer: 0.7)
    lca = LCACallback(probe_batches=4, oscillation=True, figures=False)
    fit(name, net, [DataLoader(data, 140)], [lca], 20)


MADE: dict[str, Callable[[str], None]] = {
    "digits": lambda name: digits(name, probe={"train": "train", "val": "val"}),
    "too_much_momentum": too_much_momentum,
    "chords": lambda name: digits(name, every_n_steps=50, breakdown=False, oscillation=False),
    "terms": terms,
    "few_images": few_images,
    "unshuffled": unshuffled,
}


def run(name: str, probe: str | None = None) -> History:
    """Reads a run, and makes it first if need be."""
    quiet()
    if not (RUNS / name).is_dir():
        print(f"trains {name}", flush=True)
        MADE[name](name)
    return History.load(RUNS / name, probe)


def save(figure: Any, name: str) -> None:
    """Writes a picture, in few colours, so that it is small."""
    from io import BytesIO

    from PIL import Image

    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    shrink(Image.open(data), name)


def shrink(image: Any, name: str) -> None:
    """Writes an image in 128 colours."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    image.convert("RGB").quantize(128, dither=0).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size:,} bytes", flush=True)
    assert size < LARGEST, path


if __name__ == "__main__":
    for made in MADE:
        run(made)
