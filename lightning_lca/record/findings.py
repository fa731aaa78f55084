"""What a run shows beyond chance, most important first, and what to do about it.

Chance is that of a run's own steps: does the mean over its steps differ from 0, given that steps
resemble those before (`statistics.Mean`)? Every kind of finding is a question. Within a question
the p-values of the layers are corrected by Holm's rule, and then multiplied by the number of
questions (Bonferroni), so that a run of pure noise has a finding with a p in about 5 % of cases (up
to 10 % with 50 steps that keep 0.8 of the step before; ``tests/benchmarks/findings.py``).
Intervals are corrected for as many tests, so that they hold for all layers at once. They are those
of Bonferroni's rule; where Holm's finds more than that, they end at the 0 that it excludes
(Strassburger and Bretz 2008, "Compatible simultaneous lower confidence bounds for the Holm
procedure and other Bonferroni-based closed tests").

Another run or another seed are other questions, which the steps of one run cannot answer; every
statement ends with what it does not show. So are other data, unless the probe has two batches or
more: then intervals of credit cover how far its batches lie apart (Student's t over the batches, so
that two of them tell next to nothing). Steps that are not finite are left out. Of more than 16,384
steps, means of neighbours stand for them in tests of a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.statistics import LEAST, Floats, Mean, holm
from lightning_lca.record.synchrony import Dips, Synchrony

if TYPE_CHECKING:
    from lightning_lca.record.history import History

_Take = Callable[[slice], Any]  # Reads a column of the groups in some rows [n, G].

LEVEL = 0.05  # Of a whole list: the chance that noise has a finding with a p.
NETWORK = "network"
KINDS = (  # Most important first: first what casts doubt on the rest.
    "residual",
    "not_converged",
    "overfits",
    "hurts",
    "curvature",
    "against_gradient",
    "momentum",
    "weight_decay",
    "never_moves",
    "synchrony",
    "helping",
)
_CELLS = 2**20  # Numbers that are looked at at once.
_IDLE = 0.1  # Share of sampled weights without any credit that is worth a finding.
_LAYERS = 4  # Fewer cannot be told apart from shifted ones: no p is below 5 %.
_PAIRED = 2000  # Most layers of which every pair is compared.
_DRAWS = 6_000_000  # Moments times draws: with more of the one, less of the other.
_NAMED = 3  # Layers that are named where one finding is about many.
_OF_A_KIND = 2  # Findings of a kind in a list that is cut short.


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows beyond chance, or that a reader of its credits must know.

    ``effect`` and ``interval`` are in the same unit:

    ==================  =========================================================================
    kind                effect
    ==================  =========================================================================
    hurts               the layer's credit per measured step, in loss units; positive = it hurt
    overfits            its credit per step on the probe "val"; on "train" it helps
    momentum            credit per step of the momentum's part of its motion
    weight_decay        credit per step of the decay's part
    curvature           credit per step of curvature plus half of that at first order: above 0 the
                        steps go past the lowest point
    against_gradient    credit per step at first order: above 0 the layer moves up the gradient
    synchrony           coincident moments of learning over those by chance, minus 1
    helping             share of the moving weights that help, minus one half
    never_moves         share of weights without credit in any step
    not_converged       share of steps that missed the tolerance, or are not finite
    residual            residual that may be the layer's, over its credit
    ==================  =========================================================================

    Attributes:
        kind: One of the above.
        where: The layer's name, "network", or the first of several layers and how many more.
        statement: What was found, with numbers, and in a last sentence what it does not show.
        effect: How large it is.
        interval: 95% interval of the effect, which respects that steps depend on one another and
            that many layers are tested, and where the probe has several batches (of credit) the
            choice of its data; of synchrony, the effect against the range of chance. None
            where nothing was tested.
        p: Corrected for all tests of the list, at most 0.05; None where nothing was tested.
        try_this: One thing to do.
    """

    kind: str
    where: str
    statement: str
    effect: float
    interval: tuple[float, float] | None
    p: float | None
    try_this: str


def find(
    histories: Mapping[str, History] | Mapping[str | None, History],
    about: Collection[str | None] | None = None,
    first: int | None = None,
    last: int | None = None,
) -> list[Finding]:
    """Lists what the probes of a run show, most important first; [] where there is nothing.

    Of fewer than 50 finite steps nothing is said. What the probes "train" and "val" show together
    (layers that overfit) is found where both are there, over the steps that both have measured.

    Args:
        histories: Of the probes, by name.
        about: Which probes to ask about by themselves; None: all of them.
        first: First optimizer step; None: of the run.
        last: Last optimizer step; None: of the run.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # Sums of large numbers may be infinite.
        return _find(histories, about, first, last)


def _find(
    histories: Mapping[str, History] | Mapping[str | None, History],
    about: Collection[str | None] | None,
    first: int | None,
    last: int | None,
) -> list[Finding]:
    runs = {
        name: _Run(history, first, last, "" if len(histories) == 1 else name or "")
        for name, history in histories.items()
    }
    asked = [run for name, run in runs.items() if about is None or name in about]
    asked = [run for run in asked if len(run) >= LEAST]
    questions = [question for run in asked for question in run.questions()]
    if "train" in runs and "val" in runs:
        questions += _overfits(runs["train"], runs["val"])
    found = [fact for run in asked for fact in run.facts()] + list(_answers(questions))
    doubted = {(run.probe, layer) for run in runs.values() for layer in run.doubted}
    order = {kind: place for place, kind in enumerate(KINDS)}
    # Of a layer that overfits it is known already that it hurts on val.
    told = {("val", finding.where) for _, finding in found if finding.kind == "overfits"}
    kept = [finding for probe, finding in found if _stands(finding, probe, doubted, told)]
    return sorted(kept, key=lambda finding: (order[finding.kind], -abs(finding.effect)))


def short(findings: Sequence[Finding], most: int = 5) -> list[Finding]:
    """Picks the most important ones, at most two of a kind while others wait."""
    first = [
        finding
        for i, finding in enumerate(findings)
        if sum(earlier.kind == finding.kind for earlier in findings[:i]) < _OF_A_KIND
    ]
    more = [finding for finding in findings if finding not in first]
    chosen = (first + more)[:most]
    return [finding for finding in findings if finding in chosen]


# -- questions: what has a p ----------------------------------------------------------------------

_Told = tuple[str, Finding]  # The probe, "" for the only one, and what was found on it.


@dataclass(frozen=True)
class _Question:
    """Some tests of one kind.

    Attributes:
        probe: Which probe is asked.
        p: Of each test, uncorrected [L].
        tell: Makes the finding of a test, from its place, its corrected p, and the chance with
            which its interval may miss on either side.
    """

    probe: str
    p: Floats
    tell: Callable[[int, float, float], Finding]


def _answers(questions: Sequence[_Question]) -> Iterator[_Told]:
    """Corrects for all tests, and tells what is significant."""
    for question in questions:
        corrected = np.minimum(holm(question.p) * len(questions), 1)
        tail = LEVEL / (len(questions) * max(1, len(corrected)))
        for place in np.flatnonzero(corrected <= LEVEL).tolist():
            yield question.probe, question.tell(place, float(corrected[place]), tail)


def _above(mean: Mean, place: int, tail: float) -> tuple[float, float]:
    """Returns the interval of a mean that was found to lie above 0."""
    low, high = (float(end[place]) for end in mean.interval(tail))
    return max(low, 0.0), high


def _stands(
    finding: Finding,
    probe: str,
    doubted: Collection[tuple[str, str]],
    told: Collection[tuple[str, str]],
) -> bool:
    """Whether the residual leaves the sign that a finding rests on, and no other one tells it."""
    place = probe, finding.where
    if finding.kind == "overfits":
        return place not in doubted and ("train", finding.where) not in doubted
    return finding.kind != "hurts" or (place not in doubted and place not in told)


class _Run:
    """The finite rows of one probe's history within a range of steps.

    They are looked at in pieces, so that a long run takes no more memory than a short one.

    Attributes:
        history: All of it.
        rows: Those within the range [T].
        keep: Which of them are finite [T].
        layers: What is tested, as figures and the tab show it.
        probe: The probe's name, where there are several.
    """

    def __init__(self, history: History, first: int | None, last: int | None, probe: str) -> None:
        self.history, self.probe = history, probe
        rows = history.rows
        start = 0 if first is None else int(np.searchsorted(rows.steps, first))
        stop = None if last is None else int(np.searchsorted(rows.steps, last, side="right"))
        self.rows = rows[start:stop]
        self.layers = history.shown
        self.keep = self.rows.finite
        sums = [np.isfinite(piece).all(1) for piece in self.pieces(self._credit)]
        self.keep[self.keep] = np.concatenate(sums) if sums else False

    def __len__(self) -> int:
        return int(self.keep.sum())

    def pieces(self, take: _Take, keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Floats]:
        """Reads a column of every layer, of rows that are kept, piece by piece [n, L]."""
        for part, kept in self._parts(self.keep if keep is None else keep):
            yield self.layers.sums(take(part)[kept].astype(np.float64, copy=False))

    def _parts(self, keep: npt.NDArray[np.bool_]) -> Iterator[tuple[slice, Any]]:
        """Cuts the rows into parts, and tells which rows of each are kept."""
        step = max(1, _CELLS // max(1, len(self.history.groups)))
        for first in range(0, len(keep), step):
            part = slice(first, first + step)
            yield part, slice(None) if keep[part].all() else keep[part]

    def _credit(self, part: slice) -> Any:
        return self.rows.allocated[part]

    @cached_property
    def doubted(self) -> dict[str, float]:
        """Layers whose sign the residual may turn: residual that may be theirs over their credit.

        A step's residual is shared out as its credit is, by size, and none of it cancels over
        steps. Where that reaches the layer's whole credit, its sign is open.
        """
        missed, net = np.zeros(len(self.layers)), np.zeros(len(self.layers))
        residual, first = np.abs(self.rows.raw_residual[self.keep]), 0
        for credit in self.pieces(self._credit):
            size = np.abs(credit)
            all_of_it = size.sum(1)
            per_credit = np.divide(
                residual[first : first + len(credit)],
                all_of_it,
                out=np.zeros(len(credit)),
                where=all_of_it > 0,
            )
            missed, net, first = (
                missed + per_credit @ size,
                net + credit.sum(0),
                first + len(credit),
            )
        net = np.abs(net)
        return {
            name: float(missed[i] / net[i]) if net[i] else np.inf
            for i, name in enumerate(self.layers.names)
            if missed[i] > 0 and missed[i] >= net[i]
        }

    @cached_property
    def batches(self) -> Floats | None:
        """Mean credit of every layer on each batch of the probe [K, L]; None: it is not known."""
        from lightning_lca.record.history import BATCH  # Which imports this module.

        values = self.rows.shares.get(BATCH)
        if values is None or not len(self):
            return None
        sums = sum(
            values[part][kept].sum(0, dtype=np.float64) for part, kept in self._parts(self.keep)
        )
        means = self.layers.sums(np.asarray(sums).T / len(self))
        return means if np.isfinite(means).all() else None

    # -- what is tested

    def questions(self) -> Iterator[_Question]:
        """Asks what one probe can answer."""
        yield self._mean("hurts", self._credit, _hurts, self.batches)
        yield from self._helping()
        yield from self._synchrony()
        part, moves = self._breakdown("part")
        for name, tell in (("momentum", _momentum), ("weight_decay", _weight_decay)):
            if name in part and moves[name]:
                yield self._mean(name, part[name], tell)
        order, _ = self._breakdown("order")
        if {"first_order", "curvature"} <= order.keys():
            straight, bent = order["first_order"], order["curvature"]
            yield self._mean("against_gradient", straight, _against_gradient)
            past = self._mean("curvature", lambda rows: bent(rows) + straight(rows) / 2, _curvature)
            # Both must hold, so the larger p counts.
            yield replace(past, p=np.maximum(past.p, self.mean(straight).below()))

    def mean(self, take: _Take) -> Mean:
        """Estimates the mean of a column of every layer [L]."""
        return Mean.of_pieces(self.pieces(take), len(self))

    def _mean(
        self,
        kind: str,
        take: _Take,
        words: Callable[..., tuple[str, str]],
        batches: Floats | None = None,
    ) -> _Question:
        """Asks in which layers a column lies above 0; on all data like batches [K, L]."""
        mean = self.mean(take)
        mean = mean if batches is None else mean.over(batches)

        def tell(place: int, p: float, tail: float) -> Finding:
            layer = self.layers.names[place]
            low, high = _above(mean, place, tail)
            effect = float(mean.mean[place])
            numbers = f"{effect:+.2g} a step (95% interval {low:+.2g} to {high:+.2g}, {_p(p)})"
            said, advice = words(_name(layer), numbers, effect * len(self), self)
            return Finding(kind, layer, self._on(said), effect, (low, high), p, advice)

        return _Question(self.probe, mean.above(), tell)

    def _helping(self) -> Iterator[_Question]:
        helped, hurt = (
            np.concatenate(
                [counts[part][kept].sum(1, dtype=np.int64) for part, kept in self._parts(self.keep)]
            )
            for counts in (self.rows.helping, self.rows.hurting)
        )
        moved = helped + hurt
        if (moved > 0).sum() < LEAST:
            return
        share = helped[moved > 0] / moved[moved > 0]
        mean = Mean.of_pieces([share[:, None] - 0.5], len(share))

        def tell(place: int, p: float, tail: float) -> Finding:
            low, high = (float(end[place]) for end in mean.interval(tail / 2))
            effect = float(mean.mean[place])
            statement = (
                f"Of the weights that move the loss, {0.5 + effect:.1%} help in a step on average: "
                f"{'more' if effect > 0 else 'less'} than half (95% interval {0.5 + low:.1%} to "
                f"{0.5 + high:.1%}, {_p(p)}). "
                f"{self.limits('that each layer does so, or that it holds on other data')}"
            )
            advice = (
                "Look for layers on the other side of one half: figures.helping(history)."
                if effect > 0
                else "Halve the learning rate, and see whether most weights help then."
            )
            return Finding("helping", NETWORK, self._on(statement), effect, (low, high), p, advice)

        yield _Question(self.probe, mean.apart(), tell)

    def _synchrony(self) -> Iterator[_Question]:
        layers = len(self.layers)
        if not _LAYERS <= layers <= _PAIRED:
            return
        credit = self.rows.allocated
        if layers != len(self.history.groups):
            credit = self.layers.sums(credit.astype(np.float64))
        draws = int(np.clip(_DRAWS // (20 * layers), 100, 1000))
        # Rows that are not finite stay in place, so that no layer's neighbours change.
        found = Synchrony.of(Dips.of(credit, 20, self.keep), len(credit), draws)
        if found.excess is None:
            return
        effect = found.excess
        low, high = found.excess_range

        def tell(place: int, p: float, tail: float) -> Finding:
            limits = self.limits("a cause, and that another run or other data would show it")
            statement = (
                "Layers have their moments of learning together "
                f"{effect:.0%} more often than by chance (by chance, 95% of draws lie within "
                f"{low:+.0%} to {high:+.0%}; {_p(p)}). {limits}"
            )
            chance = effect - high, effect - low
            advice = (
                "Halve the learning rate: if the excess goes, the layers swing together rather "
                "than learn together."
            )
            return Finding("synchrony", NETWORK, self._on(statement), effect, chance, p, advice)

        yield _Question(self.probe, np.array([found.p_pairs]), tell)

    def _breakdown(self, name: str) -> tuple[dict[str, _Take], dict[str, bool]]:
        """Finds the shares of a breakdown, and whether they are not 0 throughout; {}: none."""
        shares, values = self.history.shares.get(name, ()), self.rows.shares.get(name)
        if values is None:
            return {}, {}
        moves = np.zeros(len(shares), bool)
        for part, kept in self._parts(self.keep):
            some = values[part][kept]
            if not np.isfinite(some).all():
                return {}, {}
            moves |= some.any((0, 1))

        def taking(k: int) -> _Take:
            return lambda part: values[part][:, :, k].astype(np.float64)

        takes = {share: taking(k) for k, share in enumerate(shares)}
        return takes, dict(zip(shares, moves.tolist(), strict=True))

    # -- what is counted

    def facts(self) -> Iterator[_Told]:
        """Tells what needs no test."""
        for fact in (*self._residual(), *self._not_converged(), *self._never_moves()):
            yield self.probe, replace(fact, statement=self._on(fact.statement))

    def _residual(self) -> Iterator[Finding]:
        if self.doubted:
            names = sorted(self.doubted, key=lambda name: -self.doubted[name])
            worst = self.doubted[names[0]]
            limits = self.limits("that the sign is wrong")
            yield Finding(
                "residual",
                _some(names),
                f"The residual may turn the sign of {_some(names)}: it comes to "
                f"{_times(worst)} the layer's credit. {limits}",
                worst,
                None,
                None,
                "Set a tolerance, e.g. LCACallback(tolerance=1e-3), before you trust the sign.",
            )

    def _not_converged(self) -> Iterator[Finding]:
        steps, limits = len(self.rows), self.limits("which credits are wrong")
        missed = int((~self.rows.converged & self.keep).sum())
        broken = steps - len(self)
        if missed:
            yield Finding(
                "not_converged",
                NETWORK,
                f"{missed:,} of {steps:,} steps did not reach the tolerance. {limits}",
                missed / steps,
                None,
                None,
                "Double max_splits, or choose a larger tolerance.",
            )
        if broken:
            yield Finding(
                "not_converged",
                NETWORK,
                f"In {broken:,} of {steps:,} steps loss or credit was not finite; they are left "
                f"out. {self.limits('what these steps did')}",
                broken / steps,
                None,
                None,
                "Halve the learning rate, or clip the gradient.",
            )

    def _never_moves(self) -> Iterator[Finding]:
        credited = np.zeros(len(self.history.groups), bool)
        for part, kept in self._parts(self.keep):
            for counts in (self.rows.helping, self.rows.hurting):
                credited |= counts[part][kept].any(0)
        still = self.layers.sums(np.where(credited, 0, 1)) == self.layers.sums(
            np.ones(len(self.history.groups), np.int64)
        )
        still &= self.layers.sums(self.history.sizes) > 0
        names = [name for name, at_rest in zip(self.layers.names, still, strict=True) if at_rest]
        limits = self.limits("that they would rest on other data")
        if names:
            yield Finding(
                "never_moves",
                _some(names),
                f"{_some(names)}: no weight gets credit in any step. It does not move, or the loss "
                f"does not depend on it. {limits}",
                1.0,
                None,
                None,
                "Check requires_grad, and that the optimizer has these parameters.",
            )
        weights = self.history.weights
        if weights is None or not int(weights.measured.sum()) >= LEAST:
            return
        idle = (weights.allocated == 0).all(0)
        if (share := float(idle.mean())) >= _IDLE and not all(still):
            yield Finding(
                "never_moves",
                NETWORK,
                f"{share:.0%} of {len(idle):,} sampled weights get no credit in any step of the "
                f"run. {limits}",
                share,
                None,
                None,
                "Look for dead units, and for inputs that are always 0.",
            )

    # -- words

    def limits(self, what: str, elsewhere: str = "") -> str:
        """Says what a finding does not show; ``elsewhere``: unless it is tested over batches."""
        if elsewhere and self.batches is not None:
            return (
                f"The interval covers the choice of the probe's data, from {len(self.batches)} "
                f"batches. It does not show {what}: one run, one seed."
            )
        what = f"{elsewhere} or {what}" if elsewhere else what
        return f"It does not show {what}: one run, one seed, {self._probe_batches}."

    @property
    def _probe_batches(self) -> str:
        """How many batches the probe has."""
        known = self.batches
        batches = self.history.settings.get("probe_batches") if known is None else len(known)
        if isinstance(batches, int) and batches > 1:
            return f"and {batches} probe batches, whose spread is not tested here"
        return "one probe batch"

    def _on(self, statement: str) -> str:
        """Names the probe, where there are several."""
        return f"Probe {_name(self.probe)}: {statement}" if self.probe else statement


def _overfits(train: _Run, val: _Run) -> Iterator[_Question]:
    """Asks which layers help on one probe and hurt on the other."""
    theirs = {name: place for place, name in enumerate(val.layers.names)}
    ours = {name: place for place, name in enumerate(train.layers.names) if name in theirs}
    both = list(ours)
    both_have = np.intersect1d(
        train.rows.steps[train.keep], val.rows.steps[val.keep], assume_unique=True
    )
    if not both or len(both_have) < LEAST:
        return

    def mean(run: _Run, places: list[int]) -> Mean:
        keep = run.keep & np.isin(run.rows.steps, both_have, assume_unique=True)
        pieces = (piece[:, places] for piece in run.pieces(run._credit, keep))
        found = Mean.of_pieces(pieces, len(both_have))
        return found if run.batches is None else found.over(run.batches[:, places])

    on_train = mean(train, list(ours.values()))
    on_val = mean(val, [theirs[name] for name in both])

    def tell(place: int, p: float, tail: float) -> Finding:
        layer, effect = both[place], float(on_val.mean[place])
        low, high = _above(on_val, place, tail)
        limits = val.limits("that it overfits in another run", "that it does on other data")
        statement = (
            f"{_name(layer)} overfits: on train it lowers the loss ({on_train.mean[place]:+.2g} a "
            f"step), on val it raises it ({effect:+.2g} a step, 95% interval {low:+.2g} to "
            f"{high:+.2g}, {_p(p)}). {limits}"
        )
        advice = f"Give {_name(layer)} more weight decay, and see whether it still hurts on val."
        return Finding("overfits", layer, statement, effect, (low, high), p, advice)

    # Both must hold, so the larger p counts.
    yield _Question(val.probe, np.maximum(on_train.below(), on_val.above()), tell)


def _hurts(layer: str, numbers: str, total: float, run: _Run) -> tuple[str, str]:
    limits = run.limits("that it hurts in another run", "that it hurts on other data")
    return (
        f"{layer} raises the loss: {numbers}, {total:+.2g} in all. {limits}",
        f"Train with {layer} frozen, or with a tenth of its learning rate, and compare the "
        "validation loss.",
    )


def _momentum(layer: str, numbers: str, total: float, run: _Run) -> tuple[str, str]:
    limits = run.limits("that training with less momentum ends at a lower loss")
    return (
        f"{layer}: momentum raises the loss, {numbers}. {limits}",
        f"Halve the momentum of {layer}, in a parameter group of its own.",
    )


def _weight_decay(layer: str, numbers: str, total: float, run: _Run) -> tuple[str, str]:
    limits = run.limits("that the decay does not pay on validation data")
    return (
        f"{layer}: weight decay raises the loss, {numbers}. {limits}",
        f"Halve the weight decay of {layer}, and compare the validation loss.",
    )


def _curvature(layer: str, numbers: str, total: float, run: _Run) -> tuple[str, str]:
    limits = run.limits("that a smaller learning rate ends at a lower loss")
    return (
        f"{layer} steps too far: curvature takes back more than half of what its steps gain at "
        f"first order, by {numbers}. {limits}",
        f"Halve the learning rate of {layer}.",
    )


def _against_gradient(layer: str, numbers: str, total: float, run: _Run) -> tuple[str, str]:
    limits = run.limits("what moves it so")
    return (
        f"{layer} moves against the probe's gradient: at first order {numbers}. {limits}",
        f'Look at the breakdown "part" of {layer}: momentum, decay and noise are told apart there.',
    )


def _name(layer: str) -> str:
    """Shows characters that would move a terminal's cursor as what they are."""
    return layer if layer.isprintable() else layer.encode("unicode_escape").decode()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(_name(name) for name in names[:_NAMED]) + more


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if np.isfinite(ratio) else "many times"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
