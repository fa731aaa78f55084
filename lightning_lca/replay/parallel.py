"""Segments dealt out to workers: each measures some, and one process writes them all, in order.

What one segment hands on to the next (the sample at its end, which way weights moved) a worker
makes anew where its block begins, at one gradient. What else passes from one to the next passes
seldom: that an early step was halved, that finer panels gain nothing, that the loss turned out to
depend on more than the weights. Then the worker that found it goes on with the next block, as one
process would, and what others measured there does not count. At every joint the loss and the length
of its gradient are compared.

So the record is, to the bit, the one that one process writes, where kernels add in a fixed order:
rows and finer sums come from the workers step by step, and pass through the same `Reporter`.
"""

from __future__ import annotations

import math
import queue
import re
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_lca.replay.checkpoints import Checkpoint, ReplayError
from lightning_lca.replay.player import Bar, ReplayCallback, set_step
from lightning_lca.replay.workers import Member, Message, Pool, from_plain, pack, unpack
from lightning_lca.runtime.lightnings import AnyTrainer, LightningModule
from lightning_lca.runtime.signals import defer_signals
from lightning_lca.training.training import Look, Training

_PARTS = "replay.parts"  # Blocks that are measured, and not yet in the saved state.
_LARGEST = 24  # Segments of a block: what a worker that is killed loses.
_SMALLEST = 2
_DEATHS = 3  # So often at one place, and it is given up.
_AHEAD = 6  # Blocks per worker that may be measured ahead of those that are written.
_PAUSE = 0.3  # Seconds after which signs of life, and wishes to stop, are looked for.
_NUMBER = re.compile(r"\d[\d.,e+-]*")
_NOISE = 1e-5  # Of a loss, where kernels add in no fixed order; a hundred times that of gradients.


@dataclass(frozen=True)
class Plan:
    """Which segments a replay has, and in which blocks they are measured.

    Attributes:
        cuts: Numbers of the checkpoints at which segments begin and end [segments + 1].
        blocks: Begin and end of every block, in segments; together they are all of them.
        kept: {block: what was found in it} by an earlier replay that was interrupted.
        shows: Steps after which distributions of credit are shown.
    """

    cuts: list[int]
    blocks: list[tuple[int, int]]
    kept: Mapping[int, Message]
    shows: Sequence[int]


def cuts_of(steps: Sequence[int], least: int, first: int = 1) -> list[int]:
    """Finds at which checkpoints segments begin and end: as soon as so many steps were taken.

    Args:
        steps: Of the checkpoints.
        least: Steps that a segment has at least; the last one has what is left.
        first: At which checkpoint the first segment can end.

    Example:
        >>> cuts_of([0, 2, 3, 4, 7, 8], least=3)
        [0, 2, 4, 5]
    """
    cuts = [0]
    for i in range(max(1, first), len(steps)):
        if steps[i] - steps[cuts[-1]] >= least:
            cuts.append(i)
    return cuts if cuts[-1] == len(steps) - 1 else [*cuts, len(steps) - 1]


def blocks_of(
    segments: int, workers: int, kept: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """Cuts segments into blocks, smaller ones towards the end, so that all workers end together.

    Args:
        segments: Their number.
        workers: Their number.
        kept: Blocks that there are already.

    Example:
        >>> blocks_of(20, 2)
        [(0, 4), (4, 7), (7, 10), (10, 12), (12, 14), (14, 16), (16, 18), (18, 20)]
        >>> blocks_of(9, 1, kept=[(3, 8)])
        [(0, 3), (3, 8), (8, 9)]
    """
    blocks: list[tuple[int, int]] = []
    left = segments - sum(end - begin for begin, end in kept)
    at = 0
    for begin, end in [*sorted(kept), (segments, segments)]:
        while at < begin:
            size = min(_LARGEST, max(_SMALLEST, math.ceil(left / (3 * workers))), begin - at)
            size += begin - at - size == 1  # No block of one segment is left over.
            blocks.append((at, at + size))
            at, left = at + size, left - size
        if begin < end:
            blocks.append((begin, end))
        at = max(at, end)
    return blocks


class Parts:
    """Blocks that were measured and are not yet in the saved state, as files beside the record."""

    def __init__(self, record: Path, terms: Mapping[str, Any]) -> None:
        """Takes where they are, and how they are measured: others do not count."""
        self._directory = record / _PARTS
        self._terms = dict(terms)

    def found(self, steps: Sequence[int]) -> Iterator[tuple[int, int, Message]]:
        """Reads those that fit: (first segment, segment after the last, what was found) each.

        Args:
            steps: At the begin and the end of every segment [segments + 1].
        """
        places = {step: i for i, step in enumerate(steps)}
        taken = 0
        for path in sorted(self._directory.glob("*.pt"), key=_span_of):
            try:
                part = unpack(path.read_bytes())
                found: Message = part["found"]
                if part["terms"] != self._terms:
                    continue
                measured = [step for step, _ in found["at"]]
                if steps[0] in measured[:-1]:  # A part of it is in the saved state.
                    found = _without(found, measured.index(steps[0]) + 1)
                    part["begin"], measured = steps[0], [step for step, _ in found["at"]]
                begin = places.get(part["begin"], len(steps))
                end = begin + len(measured)
                fits = begin >= taken and measured == list(steps[begin + 1 : end + 1])
            except Exception:  # It was cut off, or is none of ours.
                continue
            if fits:
                taken = end
                yield begin, end, found

    def add(self, begin: int, found: Message) -> None:
        """Keeps a block that begins after a step; where the disk is full, it is not kept."""
        path = self._directory / f"{begin}-{found['at'][-1][0]}.pt"
        fresh = path.with_suffix(".tmp")
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(pack({"terms": self._terms, "begin": begin, "found": found}))
            fresh.replace(path)

    def drop(self, step: float = math.inf) -> None:
        """Removes those that end up to a step, or all."""
        for path in list(self._directory.glob("*")):
            if _span_of(path)[1] <= step:
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            self._directory.rmdir()


def _span_of(path: Path) -> tuple[float, float]:
    """Reads from a file's name after which step a block begins, and at which it ends."""
    begin, _, end = path.stem.partition("-")
    return (int(begin), int(end)) if begin.isdigit() and end.isdigit() else (-1, -1)


def _without(found: Message, first: int) -> Message:
    """Leaves out the first segments of a block."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(v) for name, v in value.items()}
        return value[first:]

    return found | {name: cut(found[name]) for name in ("at", "warned", "probes")}


@dataclass(frozen=True)
class Looked:
    """The first worker has looked at the loss.

    Attributes:
        at: At which checkpoint it could; 0: at none.
        looks: What it found of every probe.
    """

    at: int
    looks: dict[str | None, Look]


@dataclass(frozen=True)
class Ticked:
    """So many segments are measured."""

    count: int


@dataclass(frozen=True)
class Block:
    """A block is measured, and all before it are: it can be written.

    Attributes:
        number: Of the block.
        found: What was found.
    """

    number: int
    found: Message


class Dealer:
    """Deals a run's blocks out to workers, and gives what they find, in order.

    It listens in a thread of its own, so that no worker waits while something is written.
    """

    def __init__(
        self, pool: Pool, run: Message, checkpoints: Sequence[Checkpoint], parts: Parts
    ) -> None:
        """Begins a run: workers set it up, and look at its loss for the first time.

        Args:
            pool: The workers.
            run: What they are told of it.
            checkpoints: Its checkpoints.
            parts: Where blocks are kept.
        """
        self._pool = pool
        self._checkpoints = checkpoints
        self._parts = parts
        pool.runs += 1
        self._run = run | {"run": pool.runs}
        self._plan: Plan | None = None
        self._todo: list[int] = []
        self._found: dict[tuple[int, int], Message] = {}  # By block, and that where it began.
        self._counts: dict[int, int] = {}
        self._ticked = 0
        self._next = 0  # The block that is to be written next.
        self._prior: Message | None = None  # What was found in the one before.
        self._through = False  # Whether one worker goes on to the end.
        self._taken = 0  # Blocks that were fetched from here.
        self._deaths: dict[int, int] = {}
        self._stillborn = 0
        self._has_looked = False
        self._said: set[str] = set()
        self._events: queue.Queue[Any] = queue.Queue()
        self._is_over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Dealer:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over = True
        self._thread.join()

    def deal(self, plan: Plan) -> None:
        """Begins to deal out, by a plan."""
        for number, found in plan.kept.items():
            self._found[number, number] = found | {"stretch": number, "block": number}
            self._count(number, len(found["at"]))
        self._todo = [k for k in range(len(plan.blocks)) if k not in plan.kept]
        self._plan = plan

    def events(self, pause: float = _PAUSE) -> Iterator[Looked | Ticked | Block | str | None]:
        """Gives what happens, until all blocks were given; a text is a warning, None a pause.

        Raises:
            ReplayError: Workers could not go on.
            RuntimeError: The user's code failed in one.
        """
        while self._plan is None or self._taken < len(self._plan.blocks):
            try:
                event = self._events.get(timeout=pause)
            except queue.Empty:
                event = None
            if isinstance(event, BaseException):
                raise event
            self._taken += isinstance(event, Block)
            yield event

    # -- in the thread ----------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while not self._is_over:
                self._call_up()
                self._deal()
                for member, message in self._pool.wait(_PAUSE / 3):
                    if message is None:
                        self._bury(member)
                    else:
                        self._hear(member, message)
                self._advance()
        except BaseException as error:
            self._events.put(error)

    def _call_up(self) -> None:
        """Tells members of the run; on other machines one first, which may have data to fetch."""
        busy = {m.host for m in self._pool.members if m.run == self._run["run"] and not m.is_ready}
        for member in list(self._pool.members):
            if not member.host or member.run == self._run["run"]:
                continue
            ready = any(m.host == member.host and m.is_ready for m in self._pool.members)
            if member.host in busy and not ready and member.host != socket.gethostname():
                continue
            busy.add(member.host)
            member.run, member.is_ready, member.stretch = self._run["run"], False, None
            member.send("run", **self._run)

    def _hear(self, member: Member, message: Message) -> None:
        kind = message["kind"]
        if kind == "hello":
            member.host = message["host"]
            return
        if message["run"] != self._run["run"]:
            return
        if kind == "error":
            text = message["text"]
            if "trace" not in message:
                raise ReplayError(text)
            raise RuntimeError(f"{text}\n\nIn a worker:\n{message['trace']}")
        if kind == "ready":
            self._greet(member, message)
        elif kind == "tick":
            self._count(message["block"], message["count"])
        elif kind == "idle":
            member.stretch = None
        elif kind == "block":
            self._take(message)

    def _greet(self, member: Member, message: Message) -> None:
        if not self._has_looked:
            self._has_looked = True
            looks = {
                name or None: Look(tuple(terms), tuple(shares), way, data)
                for name, (terms, shares, way, data) in message["looks"].items()
            }
            self._events.put(Looked(message["at"], looks))
        self._take_back(member.stretch)  # It was set up anew in place of measuring that.
        member.is_ready = True
        member.stretch = -1  # It does not know the plan.
        self._stillborn = 0

    def _take(self, message: Message) -> None:
        assert self._plan is not None
        number, stretch = message["block"], message["stretch"]
        self._found[number, stretch] = message
        self._count(number, len(message["at"]))
        if number == stretch and not message["carries"] and not self._through:
            begin = self._checkpoints[self._plan.cuts[self._plan.blocks[number][0]]].step
            self._parts.add(begin, message)

    def _count(self, block: int, count: int) -> None:
        self._counts[block] = max(self._counts.get(block, 0), count)
        total = sum(self._counts.values())
        if total > self._ticked:
            self._ticked = total
            self._events.put(Ticked(total))

    def _bury(self, member: Member) -> None:
        """Starts another worker in the place of one that has ended, unless that happens often."""
        how, stretch = member.how_it_ended, member.stretch
        if not member.is_ready:
            self._stillborn += 1
            if self._stillborn >= _DEATHS:
                raise ReplayError(
                    f"{_DEATHS} workers in a row {how.replace('ended', 'have ended', 1)} before "
                    "they could measure; what they said is above. A script that replays with "
                    'workers must do so under `if __name__ == "__main__":`, since they read it.'
                )
        plan = self._plan
        if stretch is not None and stretch >= 0 and plan is not None:
            begin, end = (self._checkpoints[plan.cuts[i]].step for i in plan.blocks[stretch])
            self._deaths[stretch] = self._deaths.get(stretch, 0) + 1
            if self._deaths[stretch] >= _DEATHS:
                raise ReplayError(
                    f"Workers that measured from step {begin} on ended {_DEATHS} times; the last "
                    f"one {how}. If memory ran out, ask for fewer workers (--workers). What was "
                    "measured is kept: run the same command again to go on."
                )
            self._say(
                f"LCA: a worker {how} while it measured steps {begin} to {end}: they are measured "
                "again."
            )
            self._take_back(stretch)
        self._pool.replace(member)
        if not self._pool.members:
            raise ReplayError("No worker is left. Run the same command again to go on.")

    def _take_back(self, stretch: int | None) -> None:
        """Deals a block out again that a member had, and that nobody has measured."""
        if stretch is None or stretch < self._next or (stretch, stretch) in self._found:
            return
        if stretch not in self._todo:
            self._todo.insert(0, stretch)

    def _deal(self) -> None:
        """Gives idle members something to do."""
        plan = self._plan
        if plan is None:
            return
        for member in self._pool.members:
            if member.run == self._run["run"] and member.is_ready and member.stretch == -1:
                cuts, blocks = torch.tensor(plan.cuts), torch.tensor(plan.blocks)
                member.send("plan", cuts=cuts, blocks=blocks, shows=list(plan.shows))
                member.stretch = None
        idle = [
            m
            for m in self._pool.members
            if m.is_ready and m.run == self._run["run"] and m.stretch is None
        ]
        if not idle:
            return
        prior = self._prior
        if prior is not None and self._next < len(plan.blocks):
            stretch = prior["stretch"]
            lacks = (self._next, stretch) not in self._found
            is_done = any(m.stretch == stretch for m in self._pool.members)
            if (prior["carries"] or self._through) and lacks and not is_done:
                self._give(idle.pop(), stretch)
        if self._through:
            return
        most = self._taken + _AHEAD * len(self._pool.members)
        while idle and self._todo and self._todo[0] < most:
            self._give(idle.pop(0), self._todo.pop(0))

    def _give(self, member: Member, stretch: int) -> None:
        member.stretch = stretch
        member.send("measure", block=stretch, through=self._through)

    def _advance(self) -> None:
        """Passes on what can be written: blocks that begin where the one before them left off."""
        plan, prior = self._plan, self._prior
        while plan is not None and self._next < len(plan.blocks):
            number = self._next
            follows = prior is None or not (prior["carries"] or self._through)
            stretch = number if follows or prior is None else prior["stretch"]
            found = self._found.get((number, stretch))
            if found is None:
                return
            if follows and prior is not None and not _joins(prior["last"], found["first"]):
                self._through = True
                self._say_why(number, "the loss depends on more than the weights")
                continue
            for key in [k for k in self._found if k[0] <= number]:
                del self._found[key]
            self._events.put(Block(number, found))
            self._next, self._prior = number + 1, found
            prior = found
            self._call_back(found["stretch"])
            is_long = not found["carries"].startswith("an early step")
            if found["carries"] and is_long and self._next < len(plan.blocks):
                self._say_why(self._next, found["carries"])

    def _call_back(self, stretch: int) -> None:
        """Tells members to stop that go on from a block in whose place another counts."""
        for member in self._pool.members:
            at = member.stretch
            if at is not None and 0 <= at < self._next and at != stretch:
                member.send("leave")

    def _say_why(self, block: int, why: str) -> None:
        assert self._plan is not None
        step = self._checkpoints[self._plan.cuts[self._plan.blocks[block][0]]].step
        if why not in self._said:
            self._said.add(why)
            self._say(f"LCA: from step {step} on one worker measures alone, in order: {why}.")

    def _say(self, text: str) -> None:
        self._events.put(text)


def _joins(last: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> bool:
    """Whether two workers found the same, of every probe, at the joint of their blocks."""
    return all(
        _alike(a[0], b[0], _NOISE) and (math.isnan(a[1]) or _alike(a[1], b[1], 100 * _NOISE))
        for a, b in zip(last, first, strict=True)
    )


def _alike(a: float, b: float, noise: float) -> bool:
    is_near = abs(a - b) <= noise * max(abs(a), 1e-3)
    return is_near or a == b or (math.isnan(a) and math.isnan(b))


class DealingCallback(ReplayCallback):
    """Has workers measure, and writes what they find as one process writes what it measures."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        record: Path,
        *,
        weights_only: bool,
        bar: Bar,
        arguments: Mapping[str, Any],
        pool: Pool,
    ) -> None:
        """Takes what `ReplayCallback` takes.

        Args:
            checkpoints: At least two, by step.
            record: Directory of the record.
            weights_only: As for `read`.
            bar: Wraps the loop over checkpoints.
            arguments: Of `LCACallback`.
            pool: The workers.
        """
        super().__init__(
            checkpoints, record, weights_only=weights_only, bar=bar, arguments=arguments
        )
        self._pool = pool
        self._told_by = checkpoints[0].path  # Also where a resume begins later.
        self._parts: Parts | None = None

    def _play(self, trainer: AnyTrainer, module: LightningModule) -> None:
        """Has all segments measured, and writes them as they come in order."""
        checkpoints, kept = self._checkpoints, self._kept
        self._parts = Parts(self._file.parent, self._terms)
        run = {
            "checkpoints": [(str(c.path.absolute()), c.step) for c in checkpoints],
            "before": self._before and (str(self._before.path.absolute()), self._before.step),
            "first": str(self._told_by.absolute()),
            "record": str(self._file.parent.absolute()),
            "kept": kept and _for_workers(kept),
        }
        training = self._begin(trainer, module)
        with Dealer(self._pool, run, checkpoints, self._parts) as dealer:
            plan: Plan | None = None
            ticks: Iterator[Any] = iter(())
            ticked = 0
            heard: set[str] = set()
            for event in dealer.events():
                if trainer.received_sigterm:
                    raise KeyboardInterrupt
                if isinstance(event, str):
                    warnings.warn(event, stacklevel=2)
                elif isinstance(event, Looked):
                    if not event.at:
                        break
                    training.take_looks(event.looks)
                    plan = self._planned(training, event.at)
                    ticks = iter(self._bar([checkpoints[i] for i in plan.cuts[1:]]))
                    next(ticks, None)
                    dealer.deal(plan)
                elif isinstance(event, Ticked):
                    for _ in range(event.count - ticked):
                        next(ticks, None)
                    ticked = event.count
                elif isinstance(event, Block):
                    assert plan is not None
                    self._write(trainer, training, plan, event, heard)
            for _ in ticks:
                pass
        super().on_train_end(trainer, module)
        self._save()
        self._parts.drop()

    def _planned(self, training: Training, first: int) -> Plan:
        """Plans who measures what.

        Args:
            training: What writes.
            first: At which checkpoint the first segment can end.
        """
        assert self._parts is not None
        steps = [checkpoint.step for checkpoint in self._checkpoints]
        cuts = cuts_of(steps, self._settings.every_n_steps, first)
        ends = [steps[i] for i in cuts]
        kept = {(begin, end): found for begin, end, found in self._parts.found(ends)}
        blocks = blocks_of(len(ends) - 1, self._pool.size, list(kept))
        found = {blocks.index(span): part for span, part in kept.items()}
        return Plan(cuts, blocks, found, training.reporter.occasions(ends[1:]))

    def _write(
        self,
        trainer: AnyTrainer,
        training: Training,
        plan: Plan,
        block: Block,
        heard: set[str],
    ) -> None:
        """Writes a block, segment by segment, as `ReplayCallback` does what it measures."""
        ways = block.found["ways"]
        training.take_looks(
            {name: replace(look, way=ways[name or ""]) for name, look in training.looks().items()}
        )
        rows = {name or None: from_plain(part) for name, part in block.found["probes"].items()}
        begin = plan.blocks[block.number][0]
        for i, (step, x) in enumerate(block.found["at"]):
            for text in block.found["warned"][i]:
                if (form := _NUMBER.sub("#", text)) not in heard:
                    heard.add(form)
                    warnings.warn(text, stacklevel=2)
            self._began_at = self._checkpoints[plan.cuts[begin + i]].step
            set_step(trainer, step, x)
            with defer_signals():
                found = {name: part[i] for name, part in rows.items()}
                rest = step - self._began_at < self._settings.every_n_steps
                training.take(trainer, found, rest=rest)
                self._save_at_window(trainer, training)

    def _save(self) -> None:
        """Writes where the replay is; blocks that are in that are not kept any longer."""
        super()._save()
        if self._parts is not None and self._training is not None:
            self._parts.drop(self._training.done)


def _for_workers(kept: Mapping[str, Any]) -> Message:
    """Leaves of a saved state what those need who keep no record."""
    probes = {
        name: {**state, "last_step": 0, "totals": None} for name, state in kept["probes"].items()
    }
    return {**kept, "record": None, "probes": probes}
