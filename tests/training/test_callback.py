"""What a user types, sees and reads: arguments, errors, scalars, messages."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from support.models import Classifier, Validated, mlp, pl, toy_data, toy_loader
from support.training import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lca import History, LCACallback
from lightning_lca.record.findings import find
from lightning_lca.reporting.scalars import panels_of
from lightning_lca.training.budget import cost_line

CSVLogger, TensorBoardLogger = pl.loggers.CSVLogger, pl.loggers.TensorBoardLogger
Logger, rank_zero_experiment = pl.loggers.logger.Logger, pl.loggers.logger.rank_zero_experiment
MisconfigurationException = pl.utilities.exceptions.MisconfigurationException


# -- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quadrature": "simson"}, ValueError, "Unknown quadrature 'simson'. Choose one of euler"),
        (
            {"probe_mode": "test"},
            ValueError,
            "probe_mode must be one of 'no_dropout', 'eval', 'train'",
        ),
        (
            {"group_by": "unit"},
            ValueError,
            "group_by must be one of 'parameter', 'layer', 'neuron', 'head'; 'module:2' for.* Got",
        ),
        ({"group_by": "module:0"}, ValueError, "'module:2' for modules to that depth, from 1"),
        ({"group_by": 2}, ValueError, "or a function .name, parameter. -> text. Got 2"),
        ({"include": 3}, TypeError, "include must be a pattern of names or a list.*; got int"),
        ({"exclude": {"a"}}, TypeError, "exclude must be a pattern of names or a list.*got set"),
        ({"include": ["a", 3]}, TypeError, "include holds 3, which is no text"),
        ({"include": ""}, ValueError, "include holds an empty pattern. Write, for example, incl"),
        ({"exclude": []}, ValueError, r"exclude is empty: got no pattern. Leave it out"),
        ({"probe": "test"}, ValueError, "probe must be one of 'train', 'val'; got 'test'"),
        (
            {"probe": 3},
            TypeError,
            'probe must be "train", "val", a DataLoader or a list of batches',
        ),
        (
            {"probe": torch.zeros(3)},
            TypeError,
            r"got Tensor. One batch is a list of one: probe=\[batch\]",
        ),
        ({"probe": ["train", "val"]}, TypeError, "A list as probe holds batches, got text"),
        ({"probe": {}}, ValueError, "The probe is empty: got {}"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": 2.5}, TypeError, "every_n_steps must be a whole number, got 2.5"),
        ({"probe_batches": 0}, ValueError, "probe_batches must be at least 1"),
        ({"log_every_n_steps": -1}, ValueError, "log_every_n_steps must be at least 1"),
        ({"max_splits": 0}, ValueError, "max_splits must be at least 1"),
        ({"max_splits": 3}, ValueError, "max_splits must be a power of two.*Choose 2 or 4"),
        ({"neurons": "no"}, TypeError, "neurons must be True or False, got 'no'"),
        ({"track_parameters": "false"}, TypeError, "track_parameters must be True or False"),
        ({"figures": None}, TypeError, "figures must be True or False, got None"),
        ({"custom_scalars": 1}, TypeError, "custom_scalars must be True or False, got 1"),
        ({"live": "yes"}, TypeError, "live must be True or False, got 'yes'"),
        ({"tolerance": True}, TypeError, "tolerance must be a number in loss units"),
        (
            {"tolerance": "1e-3"},
            TypeError,
            "tolerance must be a number in loss units, e.g. 1e-3; got '1e-3'",
        ),
        ({"tolerance": float("inf")}, ValueError, "tolerance must be a positive number"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be a positive number"),
        ({"max_overhead": 10}, ValueError, "11 times as long. It is a share, at most 1"),
        ({"seed": "a"}, TypeError, "seed must be a whole number, got 'a'"),
        ({"seed": None}, TypeError, "seed must be a whole number, got None"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**70}, ValueError, "seed must be at most 4294967295"),
        ({"probe": (torch.ones(2), torch.ones(2))}, TypeError, r"probe=\[\(x, y\)\]"),
        ({"probe": {1: "train"}}, TypeError, "Probes go by names, which are text; got 1"),
        ({"probe": {"": "train"}}, TypeError, "Probes go by names, which are text; got ''"),
        ({"probe": []}, ValueError, "The probe is empty: got 0 batches"),
        ({"probe": {"a": iter(())}}, ValueError, "The probe 'a' is empty"),
        ({"probe_mode": ["eval"]}, ValueError, "probe_mode must be one of"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a positive number in loss units"),
        (
            {"tolerance": 1e-3, "quadrature": "boole"},
            ValueError,
            "A tolerance refines Simpson's rule",
        ),
        ({"loss_fn": "mse"}, TypeError, r"loss_fn must be a function \(module, batch\) -> scalar"),
    ],
)
def test_a_wrong_argument_is_refused_when_typed(arguments, error, message):
    with pytest.raises(error, match=message):
        LCACallback(**arguments)


# -- set-ups that cannot be measured --------------------------------------------------------------


class Returns(Classifier):
    """Returns whatever it is told in place of a loss."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def training_step(self, batch, batch_idx):
        return self.make(super().training_step(batch, batch_idx))


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Stream(IterableDataset):
    def __iter__(self):
        return iter(toy_data(32))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Manual, {}, "Tell which loss is meant: LCACallback\\(loss_fn="),
        (Classifier, {"probe": DataLoader([])}, "The probe is empty: got 0 batches"),
        (Classifier, {"loss_fn": lambda m, b: None}, r"loss_fn returned no loss .* \(None\)"),
        (Classifier, {"loss_fn": lambda m, b: 3.0}, "loss_fn returned float on the probe"),
        (Classifier, {"loss_fn": lambda m, b: m.net(b[0])}, r"loss_fn returned \(16, 4\)"),
        (Classifier, {"loss_fn": lambda m, b: m.net(b[0]).sum().detach()}, "has no gradient"),
        (Classifier, {"loss_fn": lambda m, b: m.net(b[0]).sum() / 0}, "loss is (inf|-inf) at the"),
        (Classifier, {"loss_fn": lambda m, b: m.net(b[0]).sum() * torch.nan}, "is nan at the"),
        (Classifier, {"probe": "val"}, 'probe="val" found no validation data'),
    ],
)
def test_a_setup_that_cannot_be_measured_is_refused_at_the_first_step(
    tmp_path, model, arguments, message
):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, model=model, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"probe": list(toy_loader())[:1]}])
def test_a_stream_is_measured_on_the_first_batch_that_passes_or_on_ones_own(tmp_path, arguments):
    lca = fit(tmp_path, data=DataLoader(Stream(), batch_size=8), **arguments).lca
    assert len(lca.history) == 12


def test_half_precision_weights_are_warned_of(tmp_path):
    loader = toy_loader(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="548 weights are bfloat16"):
        lca = fit(tmp_path, data=loader, trainer={"precision": "bf16-true"}).lca
    assert np.isfinite(lca.history.allocated).all()


def test_results_before_training_and_untracked_ones_say_what_to_do():
    lca = LCACallback()
    with pytest.raises(RuntimeError, match="history is there once training has started"):
        lca.history  # noqa: B018
    assert lca.summary() == "LCA: training has not started."


def test_totals_and_last_need_tracking(tmp_path):
    lca = fit(tmp_path).lca
    for name in ("totals", "last"):
        with pytest.raises(
            RuntimeError, match=rf"{name} needs LCACallback\(track_parameters=True\)"
        ):
            getattr(lca, name)


def test_two_callbacks_measure_side_by_side(tmp_path):
    other = LCACallback(probe_mode="eval", every_n_steps=3)
    lca = fit(tmp_path, LCACallback(), other).lca
    assert (len(lca.history), len(other.history)) == (12, 4)
    assert lca.log_dir != other.log_dir


# -- the probe's sources --------------------------------------------------------------------------


def test_probe_batches_are_seeded_distinct_samples_of_the_loaders_dataset(tmp_path):
    seen = {}
    for seed in (0, 0, 1):
        probe = fit(tmp_path, probe_batches=3, seed=seed).lca._training.meters[None].probe
        xs = torch.cat([x for x, _ in probe._batches.values()])
        assert xs.shape == (48, 12)
        assert len(xs.unique(dim=0)) == 48
        seen.setdefault(seed, []).append(xs)
    assert torch.equal(*seen[0])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_val_is_drawn_from_validation_data_also_when_not_loaded_yet(tmp_path):
    val = toy_loader(samples=40, batch_size=40, shuffle=False)
    data, late = (toy_loader(), val), {"num_sanity_val_steps": 0}
    lca = fit(tmp_path, model=Validated, data=data, probe="val", trainer=late).lca
    ((x, _),) = lca._training.meters[None].probe._batches.values()
    assert torch.equal(x.sort(0).values, val.dataset.tensors[0].sort(0).values)


def test_several_training_loaders_give_structured_probe_batches(tmp_path):
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + super().training_step(
                batch["b"], 0
            )

    data = {"a": toy_loader(16), "b": toy_loader(8)}
    lca = fit(tmp_path, model=Two, data=data, probe_batches=2).lca
    batches = list(lca._training.meters[None].probe._batches.values())
    assert [(len(b["a"][0]), len(b["b"][0])) for b in batches] == [(16, 8), (16, 8)]


def test_loss_fn_replaces_training_step_and_terms_are_summed(tmp_path):
    def loss(module, batch):
        return nn.functional.mse_loss(module.net(batch[0]), torch.ones(16, 4))

    def terms(module, batch):
        return {"a": 0.25 * loss(module, batch), "b": 0.75 * loss(module, batch)}

    one, two = (fit(tmp_path, loss_fn=f).lca.history for f in (loss, terms))
    assert one.allocated == pytest.approx(two.allocated, rel=1e-4, abs=1e-7)
    assert one.loss_before[0] == pytest.approx(two.loss_before[0], rel=1e-6)
    assert one.loss_before[0] != pytest.approx(fit(tmp_path).lca.history.loss_before[0], rel=1e-2)


def test_an_iterator_of_batches_serves_two_fits(tmp_path):
    lca = LCACallback(probe=iter([next(iter(toy_loader()))]))
    for _ in range(2):
        fit(tmp_path, lca)
        assert len(lca.history) == 12


# -- scalars --------------------------------------------------------------------------------------

NETWORK = {"lca/total", "lca/residual", "lca/total_cum", "lca/loss", "lca/help", "lca/hurt"}
NETWORK |= {"lca/not_finite"}
LAYERS = {
    f"lca_layer_{what}/{i:02d} net.{2 * i}" for what in ("cum", "help", "hurt") for i in range(3)
}


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "memory", 0

    @property
    @rank_zero_experiment
    def experiment(self):
        return None

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_scalars_have_one_key_set_and_the_x_axis_of_the_training_loss(tmp_path):
    memory = Memory()
    options = {"logger": memory, "max_steps": 14, "accumulate_grad_batches": 2, "max_epochs": 6}
    lca = fit(tmp_path, trainer=options).lca
    ours = [(step, row) for step, row in memory.rows if "lca/total" in row]
    theirs = [step for step, row in memory.rows if "train_loss" in row]
    assert [step for step, _ in ours] == [*theirs, 13], "the same x; the rest at the end"
    assert {frozenset(row) for _, row in ours} == {frozenset(NETWORK | LAYERS)}
    history = lca.history
    window = slice(4, 8)
    row = ours[1][1]
    assert row["lca/total"] == pytest.approx(history.allocated[window].sum())
    assert row["lca/residual"] == pytest.approx(history.residual[window].sum())
    assert row["lca/total_cum"] == pytest.approx(history.allocated[:8].sum())
    assert row["lca/loss"] == history.loss_after[7]
    share = history.sizes / history.sizes.sum()
    assert row["lca/help"] == pytest.approx((history.helping[window] @ share).mean())
    assert row["lca/hurt"] == pytest.approx((history.hurting[window] @ share).mean())
    for i in range(3):
        assert row[f"lca_layer_cum/{i:02d} net.{2 * i}"] == pytest.approx(
            history.allocated[:8, i].sum()
        )
        assert row[f"lca_layer_help/{i:02d} net.{2 * i}"] == pytest.approx(
            history.helping[window, i].mean()
        )
        assert row[f"lca_layer_hurt/{i:02d} net.{2 * i}"] == pytest.approx(
            history.hurting[window, i].mean()
        )


def test_tensorboard_and_csv_get_the_same_numbers(tmp_path):
    loggers = [
        TensorBoardLogger(tmp_path, prefix="mine"),
        TensorBoardLogger(tmp_path),
        CSVLogger(tmp_path),
    ]
    lca = fit(tmp_path, trainer={"logger": loggers}).lca
    prefixed, plain = (EventAccumulator(x.log_dir).Reload() for x in loggers[:2])
    table = np.genfromtxt(
        f"{loggers[2].log_dir}/metrics.csv", delimiter=",", names=True, deletechars=""
    )
    for key in NETWORK | LAYERS:
        a = [(e.step, e.value) for e in plain.Scalars(key)]
        b = [(e.step, e.value) for e in prefixed.Scalars(f"mine-{key}")]
        column = table[key.replace(" ", "_")]
        c = [(s, np.float32(v)) for s, v in zip(table["step"], column) if not np.isnan(v)]
        assert a == b == c, key
    assert [e.step for e in plain.Scalars("lca/total")] == [3, 7, 11]
    assert sum(e.value for e in plain.Scalars("lca/total")) == pytest.approx(
        lca.history.allocated.sum()
    )
    assert len(History.load(loggers[0].log_dir)) == 12


def test_a_second_probe_has_its_own_section(tmp_path):
    memory = Memory()
    fit(
        tmp_path,
        model=Validated,
        data=(toy_loader(), toy_loader(shuffle=False)),
        probe={"train": "train", "val": "val"},
        trainer={"logger": memory},
    )
    keys = set().union(*(row for _, row in memory.rows))
    assert keys >= NETWORK | {k.replace("lca", "lca_val", 1) for k in NETWORK | LAYERS}


def test_network_fractions_are_of_the_weights_that_are_trained(tmp_path):
    net = mlp()
    net[2].requires_grad_(False)
    memory = Memory()
    fit(tmp_path, model=Classifier(net), trainer={"logger": memory, "log_every_n_steps": 1})
    rows = [row for _, row in memory.rows if "lca/help" in row]
    assert all(row["lca/help"] + row["lca/hurt"] == pytest.approx(1, abs=0.01) for row in rows)


def test_many_layers_are_drawn_as_coarser_modules():
    blocks = [
        f"body.{b}.{part}" for b in range(9) for part in ("a.conv", "a.norm", "b.conv", "b.norm")
    ]
    names = ["stem", *blocks, "head"]
    assert panels_of(names[:30]) == names[:30]
    assert list(dict.fromkeys(panels_of(names))) == [
        "stem",
        *(f"body.{b}.{part}" for b in range(9) for part in "ab"),
        "head",
    ]
    assert set(panels_of([f"conv/{i}" for i in range(100)])) == {"conv"}


def test_fast_dev_run_writes_nothing(tmp_path):
    lca = fit(tmp_path, trainer={"fast_dev_run": True}).lca
    assert len(lca.history) == 1
    assert not list(tmp_path.rglob("*tfevents*"))


# -- what is told ---------------------------------------------------------------------------------


def test_the_cost_is_told_once_with_measured_numbers(tmp_path, caplog):
    lca = fit(tmp_path, steps=40).lca
    way, line = [r.getMessage() for r in caplog.records if r.getMessage().startswith("LCA:")]
    assert "evaluated from a recording of its operations" in way
    pattern = (
        r"LCA: 3 probe gradients first, then 2 per measured step; "
        r"training steps take (\d+\.\d)x as long\."
        r"( every_n_steps=(2|5|10) would make it about \d\.\dx, with less .* residual\.)?"
    )
    factor = float(re.fullmatch(pattern, line)[1])
    assert 1 < factor < 50
    assert (lca.history.seconds > 0).all()


@pytest.mark.parametrize(
    ("plain", "measuring", "every", "refines", "line"),
    [
        (
            0.01,
            0.019,
            1,
            False,
            "take 2.9x as long. every_n_steps=10 would make it about 1.2x, with",
        ),
        (0.01, 0.001, 1, False, "take 1.1x as long."),
        (0.01, 0.1, 5, False, "take 3.0x as long. every_n_steps=10 would make it about 2.0x, with"),
        (0.01, 0.1, 10, False, "take 2.0x as long."),
        (0.01, 0.1, 1, True, "take 11.0x as long."),
    ],
)
def test_the_cost_line_suggests_a_chord_only_where_that_is_good_advice(
    plain, measuring, every, refines, line
):
    told = cost_line(3, 2, plain, measuring, every, refines=refines)
    assert line in told
    assert told.endswith("a larger residual." if line.endswith("with") else line)


def test_the_summary_says_what_to_do_about_a_large_residual(tmp_path):
    rough = fit(tmp_path, quadrature="euler", steps=40).lca
    assert 'large. Choose quadrature="simpson", at a second gradient' in rough.summary()
    swings = partial(Classifier, optimizer=partial(torch.optim.SGD, lr=0.8, momentum=0.9))
    shared = fit(tmp_path, quadrature="closed_trapezoid", steps=40, model=swings).lca
    assert "The residual that is shared out is large. Choose" in shared.summary()
    rough = fit(tmp_path, every_n_steps=20, steps=40).lca
    assert "A chord of 20 steps cuts across the bends of the path" in rough.summary()
    assert "The residual is large" not in fit(tmp_path, steps=40).lca.summary()


def test_findings_are_over_all_probes(tmp_path):
    assert LCACallback().findings() == []
    still = partial(Validated, optimizer=partial(torch.optim.SGD, lr=0.0))
    val = DataLoader(toy_data(), batch_size=16)
    data, probe = (toy_loader(), val), {"train": "train", "val": "val"}
    lca = fit(tmp_path, steps=60, model=still, data=data, probe=probe).lca
    assert {f.statement.split(":")[0] for f in lca.findings()} == {"Probe train", "Probe val"}
    assert {f.kind for f in lca.findings()} == {"never_moves"}
    assert lca.findings() == find(lca.histories)
    kept = History.load(lca.log_dir, "val").findings()
    assert kept == lca.histories["val"].findings()
    (told,) = kept
    assert f"- {told.statement}\n  Try: {told.try_this}" in lca.summary()


def test_the_summary_shows_every_layer_and_the_ledger(tmp_path):
    lca = fit(tmp_path).lca
    history = lca.history
    text = lca.summary()
    change = history.loss_after[-1] - history.loss_before[0]
    total = history.allocated.sum(0)
    for g, name in enumerate(history.groups):
        (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        cells = row.split()
        assert cells[1] == f"{history.sizes[g]:,}"
        assert float(cells[3].rstrip("%")) == pytest.approx(100 * total[g] / change, abs=0.06)
        assert float(cells[4].rstrip("%")) == pytest.approx(
            100 * history.helping[:, g].mean(), abs=0.06
        )
        assert int(cells[-1]) == 1 + (total < total[g]).sum()
    for label, value in (
        ("true loss change", change),
        ("allocated", total.sum()),
        ("residual", history.residual.sum()),
        ("drift", 0.0),
    ):
        assert f"{value:+.6f}" in next(x for x in text.splitlines() if x.strip().startswith(label))
    assert "unconverged      0 of 12 steps" in text


def test_steps_beyond_the_tolerance_are_flagged(tmp_path):
    lca = fit(tmp_path, tolerance=1e-12, max_splits=2).lca
    history = lca.history
    assert not history.converged.any()
    assert (history.splits == 2).all()
    assert "unconverged      12 of 12 steps (beyond the tolerance" in lca.summary()
