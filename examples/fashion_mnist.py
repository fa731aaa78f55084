"""Measures a fully connected net or LeNet on Fashion-MNIST: which layers learn, which weights help?

    python examples/fashion_mnist.py --model fc --optimizer sgd --lr 0.05
    python examples/fashion_mnist.py --model lenet --optimizer adam --lr 0.001

Printed are the summary, a row per layer (negative LCA helped), and helping / (helping + hurting):
of the weights whose motion changed the probe's loss, the fraction that lowered it. Expect little
more than one half: at any step, nearly as many weights hurt as help; ``--out FILE`` draws that. The
data are Debian's package dataset-fashion-mnist, the four files in ``--data DIR``, or fetched by
``--download``.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import urllib.request
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback, figures

PLACES = [Path("/usr/share/datasets/fashion-mnist"), Path.home() / ".cache" / "fashion-mnist"]
SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = [f"{p}-{k}-ubyte" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]


def read(name: str, places: list[Path], download: bool) -> Tensor:
    """Reads a file of the data set: images [N, 1, 28, 28] or labels [N], uint8."""
    candidates = [place / f"{name}{end}" for place in places for end in (".gz", "")]
    path = next((c for c in candidates if c.is_file()), candidates[-1])
    if download and not path.is_file():
        data = gzip.decompress(urllib.request.urlopen(f"{SOURCE}{name}.gz", timeout=30).read())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header, size, *shape = (16, 784, 1, 28, 28) if "images" in name else (8, 1)
    if int.from_bytes(data[4:8], "big") * size != len(data) - header:
        raise ValueError(f"{path} is damaged or not in the IDX format")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(-1, *shape)


class Classifier(pl.LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, sizes = args, (784, 100, 50, 10)
        if args.model == "lenet":  # LeNet-5, with ReLU and max pooling.
            self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
            sizes = (400, 120, 84, 10)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(a, b) for a, b in pairwise(sizes))
        for weight in self.parameters():  # He initialisation.
            nn.init.kaiming_normal_(weight) if weight.dim() > 1 else nn.init.zeros_(weight)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        for conv in (self.conv1, self.conv2) if self.args.model == "lenet" else ():
            x = F.max_pool2d(F.relu(conv(x)), 2)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        return F.cross_entropy(self.fc3(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.args.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), self.args.lr)
        return torch.optim.SGD(self.parameters(), self.args.lr, self.args.momentum)


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA of a small net on Fashion-MNIST.")
    parser.add_argument("--model", choices=("fc", "lenet"), default="fc")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--lr", type=float, default=0.05, help="0.001 suits adam")
    parser.add_argument("--momentum", type=float, default=0.0, help="of sgd")
    parser.add_argument("--steps", type=int, default=240, help="240 are an epoch")
    parser.add_argument("--tolerance", type=float, help="largest |residual| of a step, e.g. 1e-3")
    parser.add_argument("--probe", choices=("train", "test"), default="train", help="measured on")
    parser.add_argument("--data", type=Path, nargs="+", default=PLACES, help="where the files are")
    parser.add_argument("--download", action="store_true", help="fetch files that are missing")
    parser.add_argument("--out", type=Path, help="draws the share of weights that help there")
    args = parser.parse_args()
    try:
        x, y, test_x, test_y = (read(name, args.data, args.download) for name in FILES)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SystemExit(
            f"Fashion-MNIST cannot be read: {error}.\nLooked for {', '.join(FILES)} (or .gz)\n"
            f"in {' and '.join(map(str, args.data))}.\nInstall Debian's dataset-fashion-mnist, or "
            f"name a directory by --data DIR, or fetch 30 MB from\n{SOURCE} by --download."
        ) from None

    # Of no use here: workers for data in memory, a deprecation within Lightning, tips.
    warnings.filterwarnings("ignore", ".*(does not have many workers|treespec, LeafSpec)")
    rank_zero = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    rank_zero.addFilter(lambda e: e.levelno > logging.INFO or e.getMessage().startswith("LCA"))

    torch.manual_seed(0)
    train, test = TensorDataset(x / 255, y.long()), TensorDataset(test_x / 255, test_y.long())
    measured = train if args.probe == "train" else test
    chosen = torch.randperm(len(measured))[:5000].split(500)  # Fixed for the whole run.
    lca = LCACallback(probe=[measured[part] for part in chosen], tolerance=args.tolerance)
    quiet = {f"enable_{x}": False for x in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(
        max_steps=args.steps, callbacks=[lca], log_every_n_steps=10, devices=1, **quiet
    )
    trainer.fit(Classifier(args), DataLoader(train, batch_size=250, shuffle=True))

    print(lca.summary())
    helping, hurting = (f @ lca.history.sizes for f in (lca.history.helping, lca.history.hurting))
    print(f"\nhelping / (helping + hurting): {(helping / (helping + hurting)).mean():.3f}")
    if args.out:
        figures.helping(lca.history).savefig(args.out)
    print("tensorboard --logdir lightning_logs")


if __name__ == "__main__":
    main()
