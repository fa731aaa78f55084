"""What is planted is found, a sham of it is not, and noise has findings no more often than said."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.noise import SIZE, SPREAD, autoregressive, noisy
from support.records import command

import lightning_lca
from lightning_lca import History
from lightning_lca.record import summary
from lightning_lca.record.findings import KINDS, LEVEL, Finding, find, short
from lightning_lca.record.statistics import Mean, holm
from lightning_lca.record.tables import WindowTable

L = 6


def at(layer, size, layers=L):
    """What one layer gets more than the others do [L]."""
    return size * (np.arange(layers) == layer)


def kinds(findings):
    return {(finding.kind, finding.where) for finding in findings}


def drawn(seed, steps=200, layers=L):
    return SPREAD * autoregressive(np.random.default_rng(seed), steps, layers, 0.5)


# -- noise ----------------------------------------------------------------------------------------


def most(runs):
    """The level, and 2.33 standard errors of a count: of right tests one in a hundred has more."""
    return LEVEL * runs + 2.33 * np.sqrt(LEVEL * (1 - LEVEL) * runs)


@pytest.mark.parametrize("phi", [0, 0.5, 0.8])
def test_noise_has_a_finding_no_more_often_than_the_level(phi):
    runs = 200
    found = [noisy(seed, 200, phi).findings() for seed in range(runs)]
    assert all(finding.p <= LEVEL for findings in found for finding in findings)
    assert sum(bool(findings) for findings in found) <= most(runs)


@pytest.mark.slow
def test_noise_on_two_probes_with_breakdowns_keeps_to_the_level_too():
    runs, found = 200, 0
    for seed in range(runs):
        shares = ("signal", "momentum", "weight_decay", "noise", "other")
        part = {name: drawn(9000 + 7 * seed + k) for k, name in enumerate(shares)}
        both = {
            name: noisy(2 * seed + k, split={"part": part})
            for k, name in enumerate(("train", "val"))
        }
        found += bool(find(both))
    assert found <= most(runs)


def on_batches(seed, true=0.0, batches=8, apart=3.0, steps=200):
    """A run whose credit is that of some batches, drawn from data where its mean is `true`."""
    draws = np.random.default_rng(seed)
    # Each batch keeps its own slope through all steps, as the same examples do.
    own = true + apart * draws.standard_normal((batches, L))
    run = noisy(seed, steps, planted=own.mean(0))
    noise = run.allocated - SPREAD * own.mean(0)
    values = noise[:, :, None] + SPREAD * own.T[None]
    run.split_into({}, batches)
    run._parts = [replace(run.rows, shares={"batch": values})]
    return run


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_a_choice_of_data_has_a_finding_no_more_often_than_the_level(batches):
    """The steps alone would be sure of what a few batches have in common by chance."""
    runs = 200
    found = sum(bool(on_batches(seed, batches=batches).findings()) for seed in range(runs))
    assert found <= most(runs)
    without = [on_batches(seed, batches=batches) for seed in range(20)]
    for run in without:
        run.split_into({})
    assert sum(bool(run.findings()) for run in without) > 10


def test_what_holds_on_the_data_is_found_over_batches_and_said():
    findings = on_batches(0, true=2.0 * (np.arange(L) == 2), apart=0.3).findings()
    (hurts,) = [finding for finding in findings if finding.where == "layer2"]
    assert hurts.kind == "hurts"
    assert "covers the choice of the probe's data, from 8 batches" in hurts.statement
    steps_alone = on_batches(0, true=2.0 * (np.arange(L) == 2), apart=0.3)
    steps_alone.split_into({})
    (bare,) = [finding for finding in steps_alone.findings() if finding.where == "layer2"]
    assert np.ptp(hurts.interval) > np.ptp(bare.interval)
    assert "hurts on other data" in bare.statement


# -- what is planted ------------------------------------------------------------------------------


def test_a_layer_that_hurts_is_found_and_one_that_hurts_by_chance_is_not():
    run = noisy(planted=at(2, 0.8))
    (finding,) = run.findings()
    assert kinds([finding]) == {("hurts", "layer2")}
    mean = Mean.of(run.allocated)
    questions = 3  # hurts, helping, synchrony
    assert finding.p == pytest.approx(questions * holm(mean.above())[2])
    assert finding.effect == pytest.approx(run.allocated[:, 2].mean())
    low, high = (end[2] for end in mean.interval(LEVEL / (questions * L)))
    assert finding.interval == pytest.approx((low, high))
    assert 0 < low < finding.effect < high
    assert noisy().findings() == []
    # Much credit in few steps is no habit.
    once = np.zeros((200, L))
    once[100, 2] = 160
    assert noisy(planted=once).allocated[:, 2].sum() > 0.9 * run.allocated[:, 2].sum()
    assert noisy(planted=once).findings() == []


def test_an_interval_never_holds_what_its_p_excludes():
    found = [f for seed in range(40) for f in noisy(seed, planted=np.full(L, 0.5)).findings()]
    hurts = [f for f in found if f.kind == "hurts"]
    assert all(0 <= f.interval[0] < f.effect < f.interval[1] for f in hurts)
    assert any(f.interval[0] == 0 for f in hurts), "Holm's rule finds more than Bonferroni's"
    assert sum(f.interval[0] > 0 for f in hurts) > len(hurts) / 2


def test_a_layer_that_helps_is_no_finding():
    assert noisy(planted=at(2, -0.8)).findings() == []


def test_the_interval_respects_that_steps_depend_on_one_another():
    swinging, white = (noisy(3, phi=phi, planted=at(2, 1.5)).findings()[0] for phi in (0.8, 0))
    assert swinging.kind == white.kind == "hurts"
    assert np.ptp(swinging.interval) > 2 * np.ptp(white.interval)


def test_more_layers_make_it_harder():
    few, many = (noisy(phi=0, layers=n, planted=at(0, 0.6, n)).findings()[0] for n in (4, 40))
    assert few.where == many.where == "layer0"
    assert np.ptp(many.interval) / many.effect > 1.1 * np.ptp(few.interval) / few.effect


def overfitting(train, val, **more):
    return find({"train": noisy(1, planted=train), "val": noisy(2, planted=val)}, **more)


def test_a_layer_that_helps_train_and_hurts_val_overfits():
    found = overfitting(at(3, -1), at(3, 1))
    assert ("overfits", "layer3") in kinds(found)
    overfit = next(finding for finding in found if finding.kind == "overfits")
    assert overfit.effect == pytest.approx(noisy(2, planted=at(3, 1)).allocated[:, 3].mean())
    assert overfit == found[0]
    assert "on train it lowers the loss" in overfit.statement
    # Each half alone, both the same way, and two layers of which each does one.
    for train, val in [(-1, 0), (0, 1), (1, 1), (-1, -1), (1, -1)]:
        shams = kinds(overfitting(at(3, train), at(3, val)))
        assert "overfits" not in {kind for kind, _ in shams}
    assert "overfits" not in {kind for kind, _ in kinds(overfitting(at(3, -1), at(4, 1)))}


def test_overfitting_needs_the_two_probes_by_name_and_steps_of_both():
    train, val = noisy(1, planted=at(3, -1)), noisy(2, planted=at(3, 1))
    assert "overfits" not in {f.kind for f in find({"train": train, "other": val})}
    val.cut(49)
    assert find({"train": train, "val": val}) == []


def test_a_residual_that_may_turn_a_sign_on_either_probe_is_no_ground_for_overfitting():
    for doubted in ("train", "val"):
        both = {"train": noisy(1, planted=at(3, -1)), "val": noisy(2, planted=at(3, 1))}
        both[doubted].rows.raw_residual[:] = 3 * np.abs(both[doubted].allocated).sum(1)
        found = {finding.kind for finding in find(both)}
        assert "residual" in found
        assert "overfits" not in found


def test_what_compares_probes_is_told_beside_one_of_them():
    assert kinds(overfitting(at(3, -1), at(3, 1), about=())) == {("overfits", "layer3")}
    # That it hurts on val is said already; not so of another one.
    about_val = overfitting(at(3, -1), at(3, 1) + at(5, 2), about=("val",))
    assert kinds(about_val) == {("overfits", "layer3"), ("hurts", "layer5")}
    assert about_val[1].statement.startswith("Probe val: layer5 raises the loss")


@pytest.mark.parametrize(("share", "said"), [(0.52, "more"), (0.48, "less")])
def test_a_majority_of_weights_is_one_over_steps(share, said):
    (finding,) = noisy(share=share).findings()
    assert (finding.kind, finding.where) == ("helping", "network")
    assert finding.effect == pytest.approx(share - 0.5, abs=0.01)
    assert f"{said} than half" in finding.statement
    votes = noisy(share=share).rows
    mean = Mean.of((votes.helping / (votes.helping + votes.hurting)).mean(1, keepdims=True) - 0.5)
    assert finding.p == pytest.approx(3 * mean.apart()[0])
    ends = [end[0] for end in mean.interval(LEVEL / 3 / 2)]  # Of three questions, on either side.
    assert finding.interval == pytest.approx(ends)


def test_a_majority_of_weights_is_no_majority_of_coins():
    by_coins = found = 0
    for seed in range(40):
        run = noisy(seed)
        helped, hurt = (counts.sum() for counts in (run.rows.helping, run.rows.hurting))
        by_coins += abs(helped - hurt) > 1.96 * np.sqrt(helped + hurt)
        found += "helping" in {finding.kind for finding in run.findings()}
    assert by_coins > 20
    assert found <= 4


def test_moments_that_coincide_are_told_by_their_excess_over_chance():
    series = drawn(5, 400, 1) + 0.3 * drawn(6, 400)
    run = noisy(steps=400, allocated=series)
    found = {finding.kind: finding for finding in run.findings()}
    together = found["synchrony"]
    core = lightning_lca.record.synchrony.synchrony(run.allocated)
    assert together.effect == pytest.approx(core.pairs / core.null_pairs.mean() - 1)
    assert together.interval[0] > 0
    assert f"{together.effect:.0%} more often than by chance" in together.statement
    assert f"{core.pairs}" not in together.statement
    assert "synchrony" not in {finding.kind for finding in noisy(steps=400).findings()}


@pytest.mark.parametrize("part", ["momentum", "weight_decay"])
def test_harm_by_a_part_of_the_step_is_found_in_its_layer(part):
    shares = {name: drawn(k) for k, name in enumerate(("signal", "momentum", "weight_decay"))}

    def found(**changed):
        return kinds(noisy(split={"part": shares | changed}).findings())

    assert found() == set()
    assert found(**{part: shares[part] + SPREAD * at(4, 0.8)}) == {(part, "layer4")}
    # The signal's harm is none of the momentum's.
    assert found(signal=shares["signal"] + SPREAD * at(4, 0.8)) == set()


def test_curvature_beyond_half_of_the_gain_is_a_step_too_far():
    straight, bent = drawn(1) - SPREAD, drawn(2)

    def found(first_order, curvature):
        order = {"first_order": first_order, "curvature": curvature}
        return kinds(noisy(split={"order": order}).findings())

    # Half of the gain is lost at the lowest point of a parabola; a third is a careful step.
    assert found(straight, bent + SPREAD / 3) == set()
    too_far = bent + SPREAD * (1 / 3 + at(1, 1.2))
    assert found(straight, too_far) == {("curvature", "layer1")}
    # Curvature without a gain at first order is another matter.
    uphill = straight + SPREAD * at(1, 2.0)
    assert found(uphill, too_far) == {("against_gradient", "layer1")}


@pytest.mark.parametrize("cells", [1, 12, 400])
def test_findings_do_not_depend_on_how_many_steps_are_looked_at_at_once(monkeypatch, cells):
    random = np.random.default_rng(0)
    part = {"signal": drawn(1), "momentum": drawn(2) + SPREAD * at(4, 0.8)}
    runs = {
        "train": noisy(
            1, planted=at(3, -1), split={"part": part}, residual=random.normal(size=200)
        ),
        "val": noisy(2, planted=at(3, 1), converged=np.arange(200) > 5),
    }
    runs["val"].rows.allocated[[7, 100]] = np.nan
    told = find(runs)
    assert {finding.kind for finding in told} >= {"residual", "not_converged", "momentum"}
    monkeypatch.setattr("lightning_lca.record.findings._CELLS", cells)
    for again, before in zip(find(runs), told, strict=True):
        assert (again.kind, again.where) == (before.kind, before.where)
        assert again.effect == pytest.approx(before.effect, rel=1e-9)
        assert again.interval == (before.interval and pytest.approx(before.interval, rel=1e-9))


def test_layers_and_weights_that_never_move_are_told():
    run = noisy()
    run.rows.helping[:, 1] = run.rows.hurting[:, 1] = 0
    (finding,) = run.findings()
    assert (finding.kind, finding.where, finding.effect, finding.p) == (
        "never_moves",
        "layer1",
        1.0,
        None,
    )
    run.sizes[1] = 0  # What has no weights has none that could move.
    assert run.findings() == []
    run.sizes[1] = SIZE
    run.rows.helping[77, 1] = 1
    assert run.findings() == []
    credit = np.ones((2, 100))
    credit[:, :30] = 0
    names = [f"layer0.weight[{i}]" for i in range(100)]
    idle = WindowTable.none(names, sampled_from=1000)
    steps, each = np.array([100, 200]), np.array([100, 100])
    idle = WindowTable(tuple(names), steps, each, credit, np.ones((2, 100), int), sampled_from=1000)
    run.append_windows("weights", idle)
    (finding,) = run.findings()
    assert (finding.kind, finding.where, finding.effect) == ("never_moves", "network", 0.3)
    idle.allocated[0, 3:] = 1
    assert run.findings() == []


def test_many_layers_that_never_move_are_one_finding():
    run = noisy(layers=20)
    run.rows.helping[:, 5:] = run.rows.hurting[:, 5:] = 0
    (finding,) = run.findings()
    assert finding.where == "layer5, layer6, layer7 and 12 more"


def test_steps_that_did_not_converge_are_counted():
    converged = np.ones(200, bool)
    converged[:7] = False
    (finding,) = noisy(converged=converged).findings()
    assert (finding.kind, finding.effect) == ("not_converged", 7 / 200)
    assert finding.statement.startswith("7 of 200 steps did not reach the tolerance.")


def test_steps_that_are_not_finite_are_left_out_and_counted():
    run = noisy(planted=at(2, 0.8))
    run.rows.allocated[50:60] = np.nan
    run.rows.allocated[5, 3] = np.inf
    broken, hurts = run.findings()
    assert (broken.kind, broken.effect) == ("not_converged", 11 / 200)
    kept = np.delete(run.allocated, [5, *range(50, 60)], axis=0)
    assert hurts.effect == pytest.approx(kept[:, 2].mean())
    assert hurts.p == pytest.approx(3 * holm(Mean.of(kept).above())[2])


def test_steps_whose_loss_alone_is_not_finite_are_left_out_too():
    run = noisy(planted=at(2, 0.8), converged=np.ones(200, bool))
    run.rows.loss_after[30:40] = np.nan
    broken, hurts = run.findings()
    assert broken.effect == 10 / 200
    assert hurts.effect == pytest.approx(np.delete(run.allocated[:, 2], range(30, 40)).mean())


def test_no_sign_is_told_that_the_residual_may_turn():
    planted = at(2, 0.8)
    sure = noisy(planted=planted)
    size = np.abs(sure.allocated).sum(1)
    assert kinds(noisy(planted=planted, residual=0.2 * size).findings()) >= {("hurts", "layer2")}
    # Residuals of both signs cancel, and are none the smaller for that.
    residual = 2 * size * (-1) ** np.arange(200)
    run = noisy(planted=planted, residual=residual)
    (finding,) = run.findings()
    assert finding.kind == "residual"
    assert finding.where.endswith("and 3 more")
    share = np.abs(run.allocated).sum(0) * 2 / np.abs(run.allocated.sum(0))
    assert finding.effect == pytest.approx(share.max())
    assert (share >= 1).all()


# -- the list -------------------------------------------------------------------------------------


def test_fewer_than_fifty_finite_steps_are_no_ground_for_a_finding():
    run = noisy(steps=50, planted=at(2, 9))
    assert kinds(run.findings()) >= {("hurts", "layer2")}
    run.rows.allocated[7] = np.nan
    assert run.findings() == []
    assert "findings need at least 50 finite measured steps, here are 49" in run.summary()
    assert History(["a"], [1]).findings() == []


def test_a_range_of_steps_is_a_run_of_its_own():
    late = np.zeros((300, L))
    late[150:, 2] = 1
    run = noisy(steps=300, planted=late)
    alone = noisy(steps=300, planted=late)
    alone._parts = [alone.rows[150:]]
    assert find({"": run}, first=151) == alone.findings() != []
    assert find({"": run}, last=150) == []


def test_the_most_important_come_first_and_no_kind_crowds_out_the_others():
    planted = sum(at(layer, 1 + layer) for layer in range(5))
    found = noisy(planted=planted, share=0.53, converged=np.arange(200) > 3).findings()
    assert [f.kind for f in found] == ["not_converged", *["hurts"] * 5, "helping"]
    assert [f.where for f in found[1:6]] == [f"layer{i}" for i in (4, 3, 2, 1, 0)]
    assert [f.where for f in short(found)] == ["network", "layer4", "layer3", "layer2", "network"]
    assert short(found, 3) == found[:3]
    assert short(found[1:6]) == found[1:6]
    assert {f.kind for f in found} <= set(KINDS)


def test_every_statement_says_what_it_does_not_show():
    run = noisy(planted=at(2, 0.8), share=0.53, converged=np.arange(200) > 3)
    run.rows.helping[:, 1] = run.rows.hurting[:, 1] = 0
    found = [*run.findings(), *overfitting(at(3, -1), at(3, 1))]
    assert len({finding.kind for finding in found}) == 5
    for finding in found:
        last = finding.statement.split(". ")[-1]
        assert last.startswith("It does not show ")
        assert last.endswith(": one run, one seed, one probe batch.")
        assert finding.try_this.endswith(".")
    run.settings["probe_batches"] = 4
    assert "and 4 probe batches, whose spread is not tested" in run.findings()[0].statement


def test_a_finding_is_frozen_and_public():
    assert lightning_lca.Finding is Finding
    (finding,) = noisy(planted=at(2, 0.8)).findings()
    with pytest.raises(AttributeError):
        finding.p = 0.0


def test_neurons_are_tested_as_their_layers():
    wide = noisy(planted=at(2, 0.8) + at(3, 0.8))
    run = History([f"{name}/{i}" for name in "abc" for i in (0, 1)], wide.sizes, "neuron")
    run.append(wide.rows)
    assert kinds(run.findings()) == {("hurts", "b")}


# -- where they are shown -------------------------------------------------------------------------


def test_the_summary_ends_with_at_most_five_findings_and_what_to_try():
    planted = sum(at(layer, 1 + layer) for layer in range(5))
    run = noisy(planted=planted, share=0.53, converged=np.arange(200) > 3)
    plain, told = summary.text(run), run.summary()
    above, _, below = told.partition("\n\nHow sure")
    assert plain.startswith(f"{above}\n\nHow sure: nothing")
    lines = below.splitlines()
    assert lines[0] == " (findings, 5 of 7; level 5% over all tests):"
    shown = short(run.findings())
    assert lines[1:] == [
        line for f in shown for line in (f"- {f.statement}", f"  Try: {f.try_this}")
    ]
    assert "nothing here is beyond chance (level 5% over all tests)" in noisy().summary()


def test_what_two_probes_show_together_comes_last(monkeypatch, capsys):
    both = {"train": noisy(1, planted=at(3, -1)), "val": noisy(2, planted=at(3, 1))}
    told = summary.together(both)
    assert told.startswith("probes 'train' and 'val' together\nHow sure")
    assert "layer3 overfits" in told
    reader = SimpleNamespace(histories=both)
    monkeypatch.setattr("lightning_lca.cli.main._runs", lambda logdir: {"": reader})
    assert command(capsys, "summary", ".")[1].endswith(f"\n\n{told}\n")
    assert told not in command(capsys, "summary", ".", "--probe", "val")[1]
    assert summary.together({"train": both["train"], "val": both["train"]}) == ""


def test_names_are_text_in_the_terminal_and_in_markdown():
    run = noisy(planted=at(2, 0.8))
    evil = History(["a", "b", "\x1b[2J*<b>", "d", "e", "f"], run.sizes)
    evil.append(run.rows)
    assert "\x1b" not in evil.summary()
    text = summary.markdown(evil, evil.findings())
    item = next(line for line in text.splitlines() if line.startswith("- "))
    assert "\x1b" not in item
    assert r"\*\<b\>" in item


def test_findings_of_huge_credits_are_no_error():
    run = noisy(planted=at(2, 0.8))
    run.rows.allocated[:] *= 1e304 / SPREAD
    assert ("hurts", "layer2") in kinds(run.findings())
    assert run.summary()
