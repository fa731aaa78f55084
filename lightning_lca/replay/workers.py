"""Processes that measure parts of a replay: how they start, what they are told, what they answer.

A worker sets the run up as one process does, and looks at the loss for the first time where one
process does, at the run's first segment. Then it stands wherever it is told to, as if it had
measured all segments up to there (`Meter.begin_at`), and measures a block of them. What it finds
goes to the process that deals the blocks out; nothing is written here.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lightning_lca.replay.checkpoints import Checkpoint, ReplayError
from lightning_lca.replay.player import ReplayCallback
from lightning_lca.replay.recipe import Recipe
from lightning_lca.reporting.distributions import Distribution
from lightning_lca.reporting.reporter import x_axis
from lightning_lca.runtime.lightnings import AnyTrainer, LightningModule
from lightning_lca.runtime.nursery import Nursery
from lightning_lca.runtime.signals import defer_signals
from lightning_lca.training.meter import Measurement
from lightning_lca.training.training import Training

Message = dict[str, Any]
_TICK = 0.25  # Seconds between two words on how far a block is.
_GRACE = 10.0  # Seconds that a worker may take to end when all is done.
_ELASTIC = "TORCHELASTIC_"  # What torchrun tells begins so, or is one of these.
_TOLD = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)


# -- messages -------------------------------------------------------------------------------------


def pack(message: Mapping[str, Any]) -> bytes:
    """Turns plain values and tensors into bytes."""
    buffer = io.BytesIO()
    torch.save(dict(message), buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> Message:
    """Reads what `pack` gave; nothing in it can run code."""
    message: Message = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return message


class Line:
    """A worker's end of its connection."""

    def __init__(self, ends_at: Any, parent: BaseProcess | None) -> None:
        """Takes the connection, and the process that started this one, where one did."""
        self._connection = ends_at
        self._parent = parent
        self._back: list[Message] = []

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message."""
        self._connection.send_bytes(pack({"kind": kind, **content}))

    def take(self) -> Message:
        """Waits for the next message.

        Raises:
            EOFError: Nobody is at the other end any more.
        """
        if self._back:
            return self._back.pop()
        while not self._connection.poll(1.0):
            self.check()
        return unpack(self._connection.recv_bytes())

    def put_back(self, message: Message) -> None:
        """Leaves a message for the next to take."""
        self._back.append(message)

    @property
    def is_waiting(self) -> bool:
        """Whether a message is there."""
        return bool(self._back) or self._connection.poll()

    def check(self) -> None:
        """Looks whether the process that deals is there.

        Others that it started may hold its end of the connection for some seconds longer.

        Raises:
            EOFError: It is not.
        """
        if self._parent is not None and not self._parent.is_alive():
            raise EOFError("The process that deals segments out has ended.")


# -- measurements as plain values -----------------------------------------------------------------

_PLAIN = ("step", "splits", "converged", "trained", "seconds", "panels", "trusts")


def to_plain(found: Sequence[Measurement]) -> Message:
    """Turns the measurements of a block into plain values and few tensors."""
    plain: Message = {name: [getattr(m, name) for m in found] for name in _PLAIN}
    plain["row"] = _stacked([m.row for m in found])
    plain["fine"] = {name: _stacked([m.fine[name] for m in found]) for name in found[0].fine}
    plain["look"] = [m.look for m in found]
    plain["spread"] = [
        {
            label: (
                *map(torch.from_numpy, (d.limits, d.counts)),
                *(d.low, d.high, d.total, d.squares),
            )
            for label, d in m.spread.items()
        }
        for m in found
    ]
    return plain


def from_plain(plain: Message) -> list[Measurement]:
    """Reads what `to_plain` gave."""
    return [
        Measurement(
            **{name: plain[name][i] for name in _PLAIN},
            row=plain["row"][i],
            # Sums begin with these, and are added to in place.
            fine={name: values[i].clone() for name, values in plain["fine"].items()},
            look=plain["look"][i],
            spread={
                label: Distribution(limits.numpy(), counts.numpy(), *rest)
                for label, (limits, counts, *rest) in plain["spread"][i].items()
            },
        )
        for i in range(len(plain["step"]))
    ]


def _stacked(tensors: list[Tensor]) -> Any:
    """Makes one tensor of many, where all have one shape."""
    return torch.stack(tensors) if len({t.shape for t in tensors}) == 1 else tensors


def _on_host(found: Measurement) -> Measurement:
    """Copies a measurement to the host."""
    return Measurement(
        **{name: getattr(found, name) for name in _PLAIN},
        row=found.row.cpu(),
        fine={name: values.cpu() for name, values in found.fine.items()},
        look=None if found.look is None else found.look.cpu(),
        spread=found.spread,
    )


# -- in a worker ----------------------------------------------------------------------------------


class MeasuringCallback(ReplayCallback):
    """Measures the blocks that it is told to, and hands over what it finds.

    Attributes:
        is_spoiled: Whether the loss was found to be another function in the meantime, so that the
            run must be set up anew before another block is measured.
    """

    _writes = False

    def __init__(self, line: Line, run: Message, heard: list[str], recipe: Recipe) -> None:
        """Takes what is to be played.

        Args:
            line: Where messages come from, and go.
            run: The message that tells of the run.
            heard: Where warnings of this process are collected.
            recipe: How it is set up.
        """
        super().__init__(
            [Checkpoint(Path(path), step) for path, step in run["checkpoints"]],
            Path(run["record"]),
            weights_only=recipe.weights_only,
            bar=iter,
            arguments=recipe.lca,
        )
        self.load_state_dict(run["kept"] or {})
        self._before = run["before"] and Checkpoint(Path(run["before"][0]), run["before"][1])
        self.is_spoiled = False
        self._line, self._number, self._heard = line, run["run"], heard
        self._found: dict[str | None, Measurement] = {}
        self._stream: Iterator[Any] = iter(())
        self._cuts: list[int] = []
        self._blocks: list[list[int]] = []
        self._stands_at: int | None = None

    def _play(self, trainer: AnyTrainer, module: LightningModule) -> None:
        """Measures what it is told to, until there is word of something else than this run."""
        training = self._begin(trainer, module)
        for name, meter in training.meters.items():
            meter.sink = partial(self._found.__setitem__, name)
            meter.totals = None  # Nobody here keeps them.
        self._stream = self._batches(trainer, module)
        self._heard.clear()  # The process that deals has set the run up, too, and heard the same.
        self._look(trainer, module, training)
        while True:
            message = self._line.take()
            if message["kind"] == "plan":
                self._cuts, self._blocks = message["cuts"].tolist(), message["blocks"].tolist()
                training.reporter.shown_elsewhere = frozenset(message["shows"])
            elif message["kind"] == "measure":
                if not all(meter.holds for meter in training.meters.values()):
                    self.is_spoiled = True  # It is dealt out again, once all is set up anew.
                    return
                self._measure(trainer, module, training, message["block"], message["through"])
                self._send("idle")
            elif message["kind"] != "leave":
                self._line.put_back(message)
                return

    def _send(self, kind: str, **content: Any) -> None:
        self._line.send(kind, run=self._number, **content)

    def _look(self, trainer: AnyTrainer, module: LightningModule, training: Training) -> None:
        """Looks at the loss for the first time, where one process would; tells what it found."""
        prepared_at = 0  # Never.
        for at, checkpoint in enumerate(self._checkpoints[1:], 1):
            self._depart(trainer, module, self._stream)
            self._load(trainer, module, checkpoint)
            with defer_signals():
                if training.prepare(trainer):
                    prepared_at = at
                    break
        looks = training.looks(data=True) if prepared_at else {}
        plain = {
            name or "": (list(look.terms), list(look.shares), look.way, look.data)
            for name, look in looks.items()
        }
        self._send("ready", at=prepared_at, looks=plain)

    def _measure(
        self,
        trainer: AnyTrainer,
        module: LightningModule,
        training: Training,
        block: int,
        through: bool,
    ) -> None:
        """Measures a block; goes on with the next ones while they depend on what was found.

        Args:
            trainer: The Trainer.
            module: Its LightningModule.
            training: What measures.
            block: Number of the block.
            through: Goes on to the end in any case.
        """
        begin = self._blocks[block][0]
        if self._stands_at != begin or training.carries:
            self._go_to(trainer, module, begin)
        first = training.ends if begin else []
        stretch = block
        while True:
            found = self._measure_block(trainer, module, training, block)
            self._send("block", block=block, stretch=stretch, first=first, **found)
            block, first = block + 1, []
            goes_on = bool(through or training.carries) and block < len(self._blocks)
            if not goes_on or self._line.is_waiting:
                return

    def _measure_block(
        self, trainer: AnyTrainer, module: LightningModule, training: Training, block: int
    ) -> Message:
        """Measures the segments of a block; gives all that is to be known of them."""
        found: dict[str | None, list[Measurement]] = {name: [] for name in training.meters}
        at: list[tuple[int, int]] = []
        warned: list[list[str]] = []
        told = time.monotonic()
        begin, end = self._blocks[block]
        for segment in range(begin, end):
            self._line.check()
            if trainer.received_sigterm:
                raise EOFError("This process was asked to end.")
            self._measure_segment(trainer, module, training, segment)
            for name, rows in found.items():
                rows.append(_on_host(self._found.pop(name)))
            at.append((int(trainer.global_step), x_axis(trainer)))
            warned.append([*self._heard])
            self._heard.clear()
            if time.monotonic() - told > _TICK:
                told = time.monotonic()
                self._send("tick", block=block, count=len(at))
        return {
            "at": at,
            "warned": warned,
            "last": training.ends,
            "carries": training.carries,
            "ways": {name or "": look.way for name, look in training.looks().items()},
            "probes": {name or "": to_plain(rows) for name, rows in found.items()},
        }

    def _measure_segment(
        self, trainer: AnyTrainer, module: LightningModule, training: Training, segment: int
    ) -> None:
        start, stop = self._cuts[segment : segment + 2]
        checkpoints = self._checkpoints
        is_rest = checkpoints[stop].step - checkpoints[start].step < self._settings.every_n_steps
        for at in range(start + 1, stop + 1):
            self._depart(trainer, module, self._stream)
            self._load(trainer, module, checkpoints[at])
            if at == stop and is_rest:  # As at the end of training.
                with defer_signals():
                    for meter in training.meters.values():
                        meter.rest()
                    training.close(trainer, module, last=True)
            else:
                self.on_train_batch_end(trainer, module, None, None, 0)
        self._stands_at = segment + 1

    def _go_to(self, trainer: AnyTrainer, module: LightningModule, segment: int) -> None:
        """Stands at the start of a segment as if all before it had been measured."""
        here = self._checkpoints[self._cuts[segment]]
        before = self._checkpoints[self._cuts[segment - 1]] if segment else self._before
        self._stand_at(trainer, module, segment, before, here)


def serve(line: Line, recipe: Recipe, threads: int | None, device: int) -> bool:
    """Measures what it is told to, run after run; says whether it was told that all is done.

    Args:
        line: Where messages come from, and go.
        recipe: How runs are set up.
        threads: Of torch; None: as it is.
        device: Which GPU, where there are several.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    heard: list[str] = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: heard.append(str(message))
        try:
            line.send("hello", host=socket.gethostname())
            while (message := line.take())["kind"] != "end":
                if message["kind"] == "run":  # What is left of a run that is over is passed by.
                    _serve_run(line, message, recipe, heard, device)
        except (EOFError, ConnectionError):
            return False
    return True


def _serve_run(line: Line, run: Message, recipe: Recipe, heard: list[str], device: int) -> None:
    is_spoiled = True
    while is_spoiled:
        player = MeasuringCallback(line, run, heard, recipe)
        try:
            recipe.play(player, Path(run["first"]), Path(run["record"]), device=device)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            told = {} if isinstance(error, ReplayError) else {"trace": traceback.format_exc()}
            text = str(error) if not told else f"{type(error).__name__}: {error}"
            line.send("error", run=run["run"], text=text, **told)
            return
        is_spoiled = player.is_spoiled


def start(ends_at: Any, recipe: bytes, threads: int | None, device: int) -> None:
    """The body of a process that was started for this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Whoever started it ends it.
    line = Line(ends_at, multiprocessing.parent_process())
    serve(line, pickle.loads(recipe), threads, device)


# -- where they are dealt with --------------------------------------------------------------------


class Member:
    """A worker, as it is seen by the process that deals.

    Attributes:
        number: Its place among the workers.
        connection: The way to it.
        process: It, where it was started here.
        host: Name of its machine; "" before it has said so.
        run: Number of the run that it was told of.
        is_ready: Whether it has looked at that run's loss.
        stretch: The block that it was told to measure, and to go on from if need be; None: idle.
    """

    def __init__(self, number: int, ends_at: Any, process: BaseProcess | None = None) -> None:
        """Knows nothing of it yet."""
        self.number = number
        self.connection = ends_at
        self.process = process
        self.host = ""
        self.run = 0
        self.is_ready = False
        self.stretch: int | None = None

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message; one that is gone will be noticed when it is listened to."""
        with suppress(OSError):
            self.connection.send_bytes(pack({"kind": kind, **content}))

    @property
    def how_it_ended(self) -> str:
        """Tells how its process ended, in words."""
        if self.process is None:
            return "lost its connection"
        self.process.join(1.0)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


class Pool:
    """The workers of a replay: processes started here, and those of a group that join.

    Attributes:
        members: Those that are there.
        size: How many there are when all have come.
        runs: How many runs they were told of.
    """

    def __init__(
        self, recipe: Recipe, workers: int, threads: int | None, group: Group | None = None
    ) -> None:
        """Starts processes, each with its own GPU where there are several.

        Args:
            recipe: How runs are set up.
            workers: How many are started here.
            threads: Of torch, in each.
            group: Whose other processes join.

        Raises:
            ReplayError: Something in the recipe cannot be handed to another process.
        """
        self.members: list[Member] = []
        self.size = workers + (0 if group is None else group.world - 1)
        self.runs = 0
        self._recipe = _pickled(recipe)
        self._threads = threads
        self._first = group.local_rank if group is not None else 0
        self._gate = None if group is None else _Gate(group.meeting, self.members)
        self._nursery = Nursery()
        for number in range(workers):
            self._start(number)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._gate is not None:
            self._gate.close(all_done=kind is None)
        if kind is None:
            for member in self.members:
                member.send("end")
        deadline = time.monotonic() + _GRACE
        for member in self.members:
            if member.process is not None:
                if kind is None:
                    member.process.join(max(0.0, deadline - time.monotonic()))
                member.process.kill()
                member.process.join()
            member.connection.close()

    def wait(self, seconds: float) -> list[tuple[Member, Message | None]]:
        """Waits for messages; None is that of a member that has ended."""
        of = {member.connection: member for member in list(self.members)}
        if not of:
            time.sleep(seconds)
        heard: list[tuple[Member, Message | None]] = []
        for ends_at in connection.wait(list(of), seconds) if of else ():
            member = of[ends_at]
            try:
                heard.append((member, unpack(member.connection.recv_bytes())))
            except (EOFError, OSError):
                heard.append((member, None))
        if not heard:
            # A process that it started may hold its end of the connection.
            heard += [
                (member, None)
                for member in of.values()
                if member.process is not None and member.process.exitcode is not None
            ]
        return heard

    def replace(self, member: Member) -> None:
        """Starts another in the place of one that has ended, if it was started here."""
        self.members.remove(member)
        member.connection.close()
        if member.process is not None:
            member.process.kill()
            member.process.join()
            self._start(member.number)

    def _start(self, number: int) -> None:
        here, there = self._nursery.pipe()
        device = self._first + number
        process = self._nursery.start(start, there, self._recipe, self._threads, device)
        there.close()
        self.members.append(Member(number, here, process))


def _pickled(recipe: Recipe) -> bytes:
    """Pickles a recipe by value; tensors too, so that no memory is shared."""
    for name in ("model", "data", "model_arguments", "data_arguments", "lca"):
        value = getattr(recipe, name)
        parts = value.items() if name == "lca" else [(name, value)]
        for argument, part in parts:
            try:
                pickle.dumps(part)
            except Exception as error:
                raise ReplayError(
                    f"{argument} cannot be handed to other processes: {error}. They need classes "
                    "and functions of a module, no lambdas or local ones, and data that can be "
                    "pickled. Or leave workers out: one process needs none of that."
                ) from error
    return pickle.dumps(recipe)


# -- processes that were started together, by torchrun --------------------------------------------


@dataclass(frozen=True)
class Group:
    """Processes on one machine or several that torchrun has started, each with the same command.

    Attributes:
        rank: The number of this one; 0 deals and writes.
        world: How many there are.
        local_rank: Its number on its machine.
        meeting: Where they find each other.
    """

    rank: int
    world: int
    local_rank: int
    meeting: Meeting

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Group | None]:
        """Joins the group that the environment tells of; None where this process is alone.

        To Lightning and the user's code the group is hidden meanwhile: each process plays alone.
        """
        around = os.environ
        if any(name not in around for name in _TOLD[:4]) or int(around["WORLD_SIZE"]) < 2:
            yield None
            return
        rank = int(around["RANK"])
        world, local_rank = int(around["WORLD_SIZE"]), int(around.get("LOCAL_RANK", rank))
        group = cls(rank, world, local_rank, Meeting(around["MASTER_ADDR"]))
        told = [name for name in around if name.startswith(_ELASTIC) or name in _TOLD]
        taken = {name: around.pop(name) for name in told}
        try:
            yield group
        finally:
            around.update(taken)

    def serve(self, recipe: Recipe, threads: int | None) -> None:
        """Measures what the first process of the group deals out, until all is done.

        Raises:
            ReplayError: The first process has ended before.
        """
        meeting = self.meeting
        address, port, key = meeting.ask("gate").split()
        is_done = False
        with suppress(OSError, EOFError):
            ends_at = connection.Client((address, int(port)), authkey=bytes.fromhex(key))
            is_done = serve(Line(ends_at, None), recipe, threads, self.local_rank)
        if not (is_done or meeting.knows("over")):
            raise ReplayError(
                "The first process of the group (rank 0) has ended, or cannot be reached: what it "
                "said tells why. Run the same command again to go on."
            )


class Meeting:
    """Where the processes of a group find each other: a few words in torch's own store.

    Attributes:
        address: Of the first process's machine.
    """

    _count = 0

    def __init__(self, address: str) -> None:
        """Opens the store; every process must call this as often as the others."""
        Meeting._count += 1
        self.address = address
        self._prefix = f"lca_replay/{Meeting._count}/"
        self._store: Any = next(rendezvous("env://"))[0]

    def tell(self, key: str, value: str) -> None:
        """Leaves a word."""
        self._store.set(self._prefix + key, value)

    def ask(self, key: str) -> str:
        """Waits for a word."""
        return str(self._store.get(self._prefix + key).decode())

    def knows(self, key: str) -> bool:
        """Whether a word was left."""
        return bool(self._store.check([self._prefix + key]))


class _Gate:
    """Where workers of a group come in."""

    def __init__(self, meeting: Meeting, members: list[Member]) -> None:
        self._meeting = meeting
        self._key = secrets.token_bytes(32)  # Who does not know it is not listened to.
        is_local = socket.gethostbyname(meeting.address).startswith("127.")
        host = "127.0.0.1" if is_local else "0.0.0.0"
        self._listener = connection.Listener((host, 0), backlog=64, authkey=self._key)
        self._port = int(self._listener.address[1])
        self._is_open = True
        meeting.tell("gate", f"{meeting.address} {self._port} {self._key.hex()}")
        self._thread = threading.Thread(target=self._let_in, args=(members,), daemon=True)
        self._thread.start()

    def _let_in(self, members: list[Member]) -> None:
        number = len(members)
        while self._is_open:
            try:
                ends_at = self._listener.accept()
            except (OSError, EOFError, multiprocessing.AuthenticationError):
                continue
            if self._is_open:
                number += 1
                members.append(Member(-number, ends_at))
            else:
                ends_at.close()

    def close(self, *, all_done: bool) -> None:
        if all_done:
            self._meeting.tell("over", "yes")
        self._is_open = False
        with suppress(OSError, EOFError):  # It waits for someone to come.
            connection.Client(("127.0.0.1", self._port), authkey=self._key).close()
        self._thread.join(_GRACE)
        self._listener.close()
