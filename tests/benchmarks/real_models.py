"""Real models of well-known packages, trained with and without the callback: same bits, what cost?

    python tests/benchmarks/real_models.py [--steps N] [--only NAME ...]

Needs transformers, peft, timm, diffusers, torchvision and torch_geometric; a model whose package is
missing is told and left out. Nothing is downloaded: weights start at random, from the packages' own
code at their real depth, narrow enough to train on a processor; data are made here, with the shapes
and the paddings of real ones.

Each model is trained three times from the same seeds, in one process: plainly, with the callback,
and with both the callback and two bare gradients of the loss after every step, which are timed
beside each other: on one thread, in time of the processor, so that others on the machine count for
little.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import random
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_lca import LCACallback
from lightning_lca.probe.loss import set_mode

WARM = 3  # Steps that are not timed: the first two record the loss, and look at it again.
# Every step is measured; loggers get sums as often as by default, while the models log every step.
OPTIONS: dict[str, Any] = {"figures": False, "log_every_n_steps": 50}


# -- how they are trained -------------------------------------------------------------------------


class Module(pl.LightningModule):
    """AdamW, a warm-up and a cosine, as in most training scripts."""

    def __init__(self, net: nn.Module, lr: float = 3e-4) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class FromTransformers(Module):
    """The model computes its own loss from the labels."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.net(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss


class Pictures(Module):
    """Classifies pictures, with mixup and label smoothing."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        share, order = float(np.random.beta(0.8, 0.8)), torch.randperm(len(x))
        logits = self.net(share * x + (1 - share) * x[order])
        loss = share * F.cross_entropy(logits, y, label_smoothing=0.1)
        loss = loss + (1 - share) * F.cross_entropy(logits, y[order], label_smoothing=0.1)
        self.accuracy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss


class Denoiser(Module):
    """Learns the noise that was added, at a random time."""

    def __init__(self, net: nn.Module, scheduler: Any) -> None:
        super().__init__(net)
        self.scheduler = scheduler

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise = torch.randn_like(batch)
        steps = self.scheduler.config.num_train_timesteps
        times = torch.randint(0, steps, (len(batch),), device=self.device)
        noisy = self.scheduler.add_noise(batch, noise, times)
        loss = F.mse_loss(self.net(noisy, times).sample, noise)
        self.log("train_loss", loss, prog_bar=True)
        return loss


class Detector(Module):
    """Takes lists of images and boxes, and adds up what the detector gives."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.net(list(images), [dict(t) for t in targets])
        self.log_dict({f"train_{name}": value for name, value in losses.items()})
        loss = torch.stack(list(losses.values())).sum()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss


class Graphs(Module):
    """Classifies graphs: message passing, a mean over the nodes of each, a head."""

    def __init__(self, net: nn.Module, pool: Callable[..., Tensor], width: int) -> None:
        super().__init__(net, 3e-3)
        self.pool = pool
        self.head = nn.Linear(width, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes = self.net(batch.x, batch.edge_index)
        pooled = F.dropout(self.pool(nodes, batch.batch), 0.2, self.training)
        logits = self.head(pooled)
        loss = F.cross_entropy(logits, batch.y)
        accuracy = (logits.argmax(-1) == batch.y).float().mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.num_graphs)
        self.log("train_accuracy", accuracy, batch_size=batch.num_graphs)
        return loss


class Sequences(Module):
    """Classifies sequences of varying lengths with a packed, bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__(
            nn.LSTM(64, 96, 3, batch_first=True, dropout=0.2, bidirectional=True), 1e-3
        )
        self.embedding = nn.Embedding(500, 64, padding_idx=0)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * 96, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, lengths, y = batch
        inputs = self.dropout(self.embedding(tokens))
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.net(packed)
        loss = F.cross_entropy(self.head(self.dropout(torch.cat([last[-2], last[-1]], 1))), y)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(y))
        return loss


# -- models and data ------------------------------------------------------------------------------

Case = tuple[pl.LightningModule, Any]  # What is trained, and a loader of so many batches.


def sentences(batch: int, steps: int, vocabulary: int, length: int) -> list[dict[str, Tensor]]:
    """Makes sentences of varying lengths, padded; labels are -100 where there is no loss."""
    made = []
    for _ in range(batch * steps):
        n = random.randint(length // 2, length)
        tokens = torch.zeros(length, dtype=torch.long)
        tokens[:n] = torch.randint(5, vocabulary, (n,))
        mask = (torch.arange(length) < n).long()
        labels = tokens.masked_fill(mask == 0, -100)
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return made


def pictures(n: int, size: int) -> list[tuple[Tensor, int]]:
    return [(torch.randn(3, size, size), random.randrange(10)) for _ in range(n)]


def bert(steps: int) -> Case:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2000,
        hidden_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    data = sentences(8, steps, 2000, 64)
    for one in data:
        masked = (torch.rand(64) < 0.15) & (one["attention_mask"] == 1)
        one["labels"] = one["labels"].masked_fill(~masked, -100)
        one["input_ids"] = one["input_ids"].masked_fill(masked, 4)
    return FromTransformers(BertForMaskedLM(config)), DataLoader(data, 8, shuffle=True)


def gpt2_with_lora(steps: int) -> Case:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2000,
        n_positions=64,
        n_embd=128,
        n_layer=12,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    net = get_peft_model(GPT2LMHeadModel(config), lora)
    return FromTransformers(net, 1e-3), DataLoader(sentences(8, steps, 2000, 64), 8, shuffle=True)


def t5(steps: int) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=2000,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=6,
        num_heads=4,
        decoder_start_token_id=0,
    )
    data = sentences(8, steps, 2000, 48)
    for one in data:
        one["labels"] = one["labels"][:32]
    net = T5ForConditionalGeneration(config)
    return FromTransformers(net), DataLoader(data, 8, shuffle=True)


def vit(steps: int) -> Case:
    import timm

    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        num_classes=10,
        drop_rate=0.1,
        drop_path_rate=0.1,
    )
    return Pictures(net), DataLoader(pictures(8 * steps, 64), 8, shuffle=True)


def efficientnet(steps: int) -> Case:
    import timm

    net = timm.create_model("efficientnet_b0", num_classes=10, drop_rate=0.2, drop_path_rate=0.2)
    return Pictures(net), DataLoader(pictures(16 * steps, 64), 16, shuffle=True)


def unet(steps: int) -> Case:
    from diffusers import DDPMScheduler, UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        dropout=0.1,
    )
    data = [torch.randn(3, 32, 32) for _ in range(4 * steps)]
    return Denoiser(net, DDPMScheduler(1000)), DataLoader(data, 4, shuffle=True)


def scenes(n: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Makes images of varying sizes with some boxes each."""
    made = []
    for _ in range(n):
        height, width = random.randint(96, 128), random.randint(96, 128)
        corners = torch.rand(random.randint(1, 4), 2) * torch.tensor([width - 48, height - 48])
        boxes = torch.cat([corners, corners + 16 + 32 * torch.rand_like(corners)], 1)
        labels = torch.randint(1, 5, (len(boxes),))
        made.append((torch.rand(3, height, width), {"boxes": boxes, "labels": labels}))
    return made


def as_lists(items: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*items, strict=True))


def detector(name: str, **options: Any) -> Callable[[int], Case]:
    def make(steps: int) -> Case:
        from torchvision.models import detection

        net = getattr(detection, name)(
            weights=None,
            weights_backbone=None,
            num_classes=5,
            min_size=96,
            max_size=128,
            **options,
        )
        loader = DataLoader(scenes(2 * steps), 2, shuffle=True, collate_fn=as_lists)
        return Detector(net, 1e-4), loader

    return make


def graphs(name: str, **options: Any) -> Callable[[int], Case]:
    def make(steps: int) -> Case:
        from torch_geometric import nn as geometric
        from torch_geometric.data import Data
        from torch_geometric.loader import DataLoader as GraphLoader

        data = []
        for _ in range(32 * steps):
            n = random.randint(10, 30)
            edges = torch.randint(0, n, (2, 3 * n))
            y = torch.randint(0, 5, (1,))
            data.append(Data(x=torch.randn(n, 16), edge_index=edges, y=y))
        net = getattr(geometric, name)(16, 64, 4, dropout=0.1, norm="batch_norm", **options)
        return Graphs(net, geometric.global_mean_pool, 64), GraphLoader(data, 32, shuffle=True)

    return make


def lstm(steps: int) -> Case:
    def collate(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = [tokens for tokens, _ in items]
        lengths = torch.tensor([len(t) for t in tokens])
        return pad_sequence(tokens, batch_first=True), lengths, torch.tensor([y for _, y in items])

    data = [
        (torch.randint(1, 500, (random.randint(5, 40),)), random.randrange(5))
        for _ in range(16 * steps)
    ]
    return Sequences(), DataLoader(data, 16, shuffle=True, collate_fn=collate)


FEWER = {"rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}  # Proposals.
MODELS: dict[str, tuple[tuple[str, ...], Callable[[int], Case]]] = {
    "BERT, 12 layers": (("transformers",), bert),
    "GPT-2, 12 layers, LoRA": (("transformers", "peft"), gpt2_with_lora),
    "T5, 6 + 6 layers": (("transformers",), t5),
    "ViT, 12 layers": (("timm",), vit),
    "EfficientNet-B0": (("timm",), efficientnet),
    "U-Net, diffusion": (("diffusers",), unet),
    "RetinaNet": (("torchvision",), detector("retinanet_resnet50_fpn")),
    "Faster R-CNN": (("torchvision",), detector("fasterrcnn_resnet50_fpn", **FEWER)),
    "GCN": (("torch_geometric",), graphs("GCN")),
    "GAT": (("torch_geometric",), graphs("GAT", heads=4)),
    "LSTM, packed": ((), lstm),
}


# -- one training ---------------------------------------------------------------------------------


class Notes(Logger):
    """Keeps what is logged, the callback's own keys apart."""

    name, version, save_dir = "notes", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        foreign = {k: v for k, v in metrics.items() if not k.startswith("lca")}
        if foreign:
            self.rows.append((step, foreign))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Clock(pl.Callback):
    """Times every step, from the begin of one batch to that of the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)]


class Timed(LCACallback):
    """Times what the callback does in every step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        began = time.process_time()
        super().on_train_batch_start(*args)
        self.seconds.append(time.process_time() - began)

    def on_before_optimizer_step(self, *args: Any) -> None:
        began = time.process_time()
        super().on_before_optimizer_step(*args)
        self.seconds[-1] += time.process_time() - began

    def on_train_batch_end(self, *args: Any) -> None:
        began = time.process_time()
        super().on_train_batch_end(*args)
        self.seconds[-1] += time.process_time() - began


class Floor(pl.Callback):
    """Takes and times two bare gradients of the loss after every step, as the probe has it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        began = time.process_time()
        weights = [p for p in module.parameters() if p.requires_grad]
        with bare(module):
            for _ in range(2):
                loss = module.training_step(batch, batch_idx)
                torch.autograd.grad(loss, weights, allow_unused=True)
        self.seconds.append(time.process_time() - began)


@contextmanager
def bare(module: Any) -> Iterator[None]:
    """Runs the body as the probe has the module, and without logging."""
    names = ("training", "dropout")
    saved = [(vars(m), {n: vars(m)[n] for n in names if n in vars(m)}) for m in module.modules()]
    set_mode(module, "no_dropout")
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        del module.log, module.log_dict
        for attributes, before in saved:
            attributes.update(before)


class Run(NamedTuple):
    module: pl.LightningModule
    left: dict[str, Any]  # Behind, by training.


def train(make: Callable[[int], Case], steps: int, *callbacks: pl.Callback) -> Run:
    pl.seed_everything(0, verbose=False)
    module, loader = make(steps)
    notes = Notes()
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            default_root_dir=root,
            callbacks=list(callbacks),
            logger=notes,
            log_every_n_steps=1,
            max_epochs=1,
            gradient_clip_val=1.0,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    assert trainer.global_step == steps
    left = {
        "weights": dict(module.named_parameters()),
        "gradients": [p.grad for p in module.parameters()],
        "buffers": dict(module.named_buffers()),
        "training flags": [m.training for m in module.modules()],
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "scheduler": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "logged metrics": notes.rows,
        "last metrics": dict(trainer.callback_metrics),
        "torch's random stream": torch.random.get_rng_state(),
        "numpy's random stream": np.random.get_state(),
        "python's random stream": random.getstate(),
    }
    return Run(module, left)


def same(a: Any, b: Any) -> bool:
    """Whether two nests of containers hold the same bits."""
    old, new = tree_leaves(a), tree_leaves(b)
    return len(old) == len(new) and all(map(same_leaf, old, new))


def same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_leaf(a.detach().numpy(), b.detach().numpy())
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return type(a) is type(b) and repr(a) == repr(b)  # A NaN is itself.


# -- the table ------------------------------------------------------------------------------------

HEADER = (
    "model",
    "weights, trained",
    "bitwise the same",
    "evaluated",
    "residual",
    "plain step, ms",
    "adds, of two gradients",
    "training takes",
)


def row(name: str, steps: int) -> list[str]:
    """Trains a model three times, and tells what came of it."""
    needs, make = MODELS[name]
    missing = [package for package in needs if not is_there(package)]
    if missing:
        return [name, f"not run: {' and '.join(missing)} missing"]
    plain = train(make, steps)
    lca = LCACallback(**OPTIONS)
    try:
        measured = train(make, steps, lca)
    except Exception as error:
        traceback.print_exc()
        return [name, f"not measured: {type(error).__name__}: {error}"]
    differ = [what for what in plain.left if not same(plain.left[what], measured.left[what])]
    parameters = list(plain.module.parameters())
    everything = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    history = lca.history
    assert len(history) == steps
    share = abs(history.residual).sum() / abs(history.allocated).sum()
    step, floor, adds = times(make, steps)
    return [
        name,
        f"{everything / 1e6:.2f} M, {100 * trained / everything:.3g} %",
        f"no: {', '.join(differ)}" if differ else "yes",
        str(history.settings["evaluated"]),
        f"{100 * share:.2g} %",
        f"{1e3 * step:.0f}",
        f"{adds / floor:.2f}",
        f"{1 + adds / step:.1f}x",
    ]


def times(make: Callable[[int], Case], steps: int) -> tuple[float, float, float]:
    """Gives the medians of a plain step, of two bare gradients, and of what the callback adds."""
    clock, lca, floor = Clock(), Timed(**OPTIONS), Floor()
    train(make, steps, clock, lca, floor)
    parts = zip(clock.seconds, lca.seconds, floor.seconds, strict=False)  # The last one is open.
    plain = [whole - added - bare for whole, added, bare in parts]
    step, two, more = (statistics.median(s[WARM:]) for s in (plain, floor.seconds, lca.seconds))
    return step, two, more


def is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def versions() -> str:
    packages = sorted({p for needs, _ in MODELS.values() for p in needs if is_there(p)})
    named = ["torch", "pytorch_lightning", *packages]
    return ", ".join(f"{p} {importlib.import_module(p).__version__}" for p in named)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help=f"of the optimizer, over {WARM + 1}")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{versions()}; {options.steps} steps, one thread\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for name in options.only:
        print(f"| {' | '.join(row(name, options.steps))} |", flush=True)


if __name__ == "__main__":
    main()
