"""The record's format: packed tables of arrays in TensorBoard event files.

A run writes one ``lca/meta`` event (JSON: groups, sizes, settings) per session, and then chunks,
each of some hundred measured steps, as ``lca/chunk/{first_step:09d}/{part}``; a named probe adds
its name, ``lca/chunk/{first_step:09d}/{probe}/{part}``. Sums over windows of steps have the same
tags with ``parameters``, ``neurons`` or ``weights`` in place of ``chunk``. One tag per chunk cannot
be sampled away by TensorBoard.

Every part is one string tensor: a line of JSON (dtype, shape), then the zlib-compressed bytes of
the array, all first bytes of its elements first. Nothing here needs torch, so that TensorBoard can
load it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import socket
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

PLUGIN = "lca"
META = "lca/meta"
WINDOWS = ("parameters", "neurons", "weights")
_TAG = re.compile(
    rf"lca/(?P<table>chunk|{'|'.join(WINDOWS)})/(?P<first>[0-9]{{9,16}})/"
    r"(?:(?P<probe>.+)/)?(?P<part>[a-z_]+)"
)
_DTYPES = {"|b1", "|i1", "|u1"} | {f"<{kind}{n}" for kind in "iuf" for n in (2, 4, 8)}
_LONGEST_HEADER = 512  # Bytes of a part's first line.
# What a part may unpack to: a writer's own are below 256 kB, and numbers that were measured hardly
# shrink; only what is made to harm unpacks to a hundred times its size.
_LARGEST_PART = 2**25
_LARGEST_RATIO = 8
_LARGEST_DESCRIPTION = 2**27  # Bytes of memory, once it is read.
_LARGEST_FRAME = 2**28  # Bytes; TensorBoard reads no more at once.
_CHECKED_FRAME = 2**24  # From here on it is checked that a sparse file does not pretend.
_LATEST = 10.0**10  # Seconds: where the names of event files end to sort.
_HEAD = 4096  # The first bytes of an event tell whether it is ours.
_PREFIX = "events.out.tfevents."
_NAME = re.compile(r"tfevents\.([0-9]{1,10}(?:\.[0-9]{1,9})?)(?=\.|$)")

Array = npt.NDArray[Any]


class Tag(NamedTuple):
    """What a tag says: table "chunk", "parameters", "neurons" or "weights"; probe "" if unnamed."""

    table: str
    first_step: int
    probe: str
    part: str

    @classmethod
    def parse(cls, tag: str) -> Tag | None:
        """Reads a tag; None if it is none of the record's tables.

        Example:
            >>> Tag.parse("lca/chunk/000000513/val/steps")
            Tag(table='chunk', first_step=513, probe='val', part='steps')
        """
        match = _TAG.fullmatch(tag)
        if match is None:
            return None
        return cls(match["table"], int(match["first"]), match["probe"] or "", match["part"])

    def __str__(self) -> str:
        probe = f"{self.probe}/" if self.probe else ""
        return f"lca/{self.table}/{self.first_step:09d}/{probe}{self.part}"


def pack(array: Array) -> bytes:
    """Packs an array of any shape and plain dtype into bytes.

    Example:
        >>> unpack(pack(np.arange(6, dtype=np.int64).reshape(2, 3))).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    # Neighbouring exponents and high bytes are alike: side by side they compress far better.
    planes = array.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
    header = json.dumps({"dtype": array.dtype.str, "shape": array.shape}).encode()
    return header + b"\n" + zlib.compress(planes, 1)


def unpack(data: bytes, columns: tuple[int, ...] | None = None) -> Array:
    """Unpacks what `pack` made; zlib's checksum tells damaged bytes.

    What the header declares is checked before memory is reserved for it.

    Args:
        data: The packed array.
        columns: The shape of every row, where it is known: the array is [rows, *columns].

    Raises:
        ValueError: The bytes are not a packed array, or not of these columns.
    """
    header, _, body = data.partition(b"\n")
    try:
        dtype, shape = _described(header)
        if columns is not None and (not shape or shape[1:] != columns):
            wanted = ", ".join(["rows", *map(str, columns)])
            raise ValueError(f"its shape is {list(shape)}, expected [{wanted}]")
        size = math.prod(shape) * dtype.itemsize
        if size > max(_LARGEST_PART, _LARGEST_RATIO * len(body)):
            raise ValueError(f"it declares {size:,} bytes and holds {len(body):,}, compressed")
        planes = np.frombuffer(_inflate(body, size), np.uint8)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"Not a packed array of an LCA record: {error}.") from error
    array: Array = np.empty(shape, dtype)
    # Plane by plane: three times as fast as a transposition.
    numbers = array.reshape(-1).view(np.uint8).reshape(-1, dtype.itemsize)
    for place, plane in enumerate(planes.reshape(dtype.itemsize, -1)):
        numbers[:, place] = plane
    return array


def _described(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Reads a part's first line: plain numbers in a table of a few dimensions, or ValueError."""
    if len(header) > _LONGEST_HEADER:
        raise ValueError(f"its first line has more than {_LONGEST_HEADER} bytes")
    try:
        described = json.loads(header)
    except RecursionError as error:
        raise ValueError("its first line is nested too deep") from error
    if not isinstance(described, dict) or not {"dtype", "shape"} <= described.keys():
        raise ValueError("its first line does not tell dtype and shape")
    dtype, shape = described["dtype"], described["shape"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"its dtype is {dtype!r}, expected plain numbers, e.g. '<f4'")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_length, shape)):
        raise ValueError(f"its shape is {shape!r}, expected a few lengths")
    return np.dtype(dtype), tuple(shape)


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40


def _inflate(body: bytes, size: int) -> bytes:
    """Decompresses exactly so many bytes, and never more; ValueError if there are others."""
    inflater = zlib.decompressobj()
    # One byte more, so that the end of the stream, with its checksum, is reached.
    data = inflater.decompress(body, size + 1)
    if len(data) != size or not inflater.eof or inflater.unused_data:
        there = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"it declares {size:,} bytes and holds {there}")
    return data


def is_too_large(description: bytes) -> bool:
    """Whether reading JSON would take more memory than any description does.

    Values take more than their text, lists and objects most.
    """
    inside = description.count(b"[") + description.count(b"{")
    taken = 3 * len(description) + 64 * description.count(b",") + 80 * inside
    return taken > _LARGEST_DESCRIPTION


def counts_dtype(sizes: Iterable[int]) -> npt.DTypeLike:
    """Chooses the narrowest unsigned integer that holds a count of up to the largest size."""
    return np.min_scalar_type(max(sizes, default=0))


def summarize(values: Mapping[str, bytes]) -> Summary:
    """Wraps tagged bytes as a TensorBoard summary of the plugin's string tensors."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN), data_class=DATA_CLASS_TENSOR
    )
    return Summary(
        value=[
            Summary.Value(
                tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[data])
            )
            for tag, data in values.items()
        ]
    )


def tagged(
    table: str, first_step: int, probe: str | None, parts: Mapping[str, Array]
) -> dict[str, bytes]:
    """Packs the parts of a table under their tags."""
    return {str(Tag(table, first_step, probe or "", p)): pack(a) for p, a in parts.items()}


def size(log_dir: Path) -> int:
    """Counts the bytes of a directory's event files."""
    return sum(path.stat().st_size for path in _event_files(log_dir)[0])


def read(
    log_dir: Path, seen: Callable[[int], Any] = lambda count: None
) -> Iterator[tuple[str | None, bytes]]:
    """Reads the record's tags and their data from a log directory, in the order of writing.

    Args:
        log_dir: The directory.
        seen: Is told how many bytes were read since the last time.

    Yields:
        (tag, data), and (None, why) for every stretch of a file, or file, that cannot be read.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    paths, unreadable = _event_files(log_dir)
    for why in unreadable:
        yield None, why.encode(errors="replace")
    for path in paths:
        for frame in _frames(path):
            if isinstance(frame, str):
                yield None, f"{path.name}: {frame}".encode(errors="replace")
                continue
            seen(len(frame))
            # What is not ours, pictures for example, need not be taken apart.
            if b"lca/" not in frame:
                continue
            try:
                event = Event.FromString(frame[:-4])
            except DecodeError:
                yield None, f"{path.name}: an event is damaged".encode(errors="replace")
                continue
            for value in event.summary.value:
                ours = value.metadata.plugin_data.plugin_name in ("", PLUGIN)
                if ours and value.tag.startswith("lca/") and value.tensor.string_val:
                    # The parts have checksums of their own. Sums of much data take seconds.
                    data = value.tensor.string_val[0]
                    if value.tag != META or is_too_large(data) or _sound(frame[:-4], frame[-4:]):
                        yield value.tag, data
                    else:
                        yield None, f"{path.name}: the description {META} is damaged".encode()


def _event_files(log_dir: Path) -> tuple[list[Path], list[str]]:
    """Lists a directory's event files in the order of writing, and why others cannot be read.

    Only regular files count: a pipe of such a name would never end.
    """
    files, unreadable = [], []
    try:
        paths = [path for path in log_dir.iterdir() if "tfevents" in path.name]
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as error:
        return [], [f"{log_dir} cannot be read: {error.strerror or error}"]
    for path in paths:
        try:
            if stat.S_ISREG(path.stat().st_mode):
                files.append(path)
        except OSError as error:
            unreadable.append(f"{path.name} cannot be read: {error.strerror or error}")
    # Of files that loggers opened within one second, the times of their first events tell.
    order = {p: (math.floor(_opened_at(p.name)), _first_time(p), p.name) for p in files}
    return sorted(files, key=order.__getitem__), unreadable


def _first_time(path: Path) -> float:
    """Reads the wall time of a file's first event, in seconds; 0 if there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return next(_times(file), 0.0)
    return 0.0


def _times(file: BinaryIO) -> Iterator[float]:
    """Reads the wall times of all events, in seconds, and nothing else."""
    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(21)) == 21:
        # An event begins with its time: a byte, and eight of a float.
        length, _, field, seconds = struct.unpack("<QIcd", head)
        if field == b"\t" and 0 < seconds < _LATEST:
            yield seconds
        if length + 16 > size:
            return
        file.seek(length + 4 - 9, os.SEEK_CUR)


def _opened_at(name: str) -> float:
    """Reads from its name when an event file was opened, in seconds; 0 if it does not say."""
    found = _NAME.search(name)
    return float(found[1]) if found else 0.0


def newest(log_dir: Path) -> float:
    """Tells when the newest event file of a directory was opened, by its name; 0 if none."""
    return max((_opened_at(path.name) for path in _event_files(log_dir)[0]), default=0.0)


def last_time(log_dir: Path) -> float:
    """Finds the latest wall time of all events in a directory, in seconds; 0 if there are none.

    The clock may have been set back since; so neither the names of files nor their own times tell.
    """
    latest = 0.0
    for path in _event_files(log_dir)[0]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            latest = max([latest, *_times(file)])
    return latest


class EventFile:
    """An event file that is appended to, so that what was written stays whole.

    TensorBoard's own writer works in a thread, where an error is noticed late, and its file ends in
    half an event when the disk is full.
    """

    _numbers = itertools.count()

    def __init__(self, directory: Path) -> None:
        """Makes a fresh file, and the directory if need be.

        Raises:
            OSError: It cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event

        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(directory / self._name(directory), "xb", buffering=0)  # noqa: SIM115
        try:
            self.write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        except OSError:
            self.close()
            os.unlink(self._file.name)
            raise

    def write(self, events: Iterable[Event]) -> None:
        """Appends all events, or none.

        Raises:
            OSError: They cannot be written, or the file was deleted.
        """
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was deleted", self._file.name)
        data = memoryview(b"".join(_frame(event.SerializeToString()) for event in events))
        before = self._file.tell()
        try:
            while len(data):
                data = data[self._file.write(data) :]
        except OSError:
            self._file.seek(before)
            self._file.truncate()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @classmethod
    def _name(cls, directory: Path) -> str:
        """Makes a name that sorts after all that are there, whatever the clock did: as it is read.

        Other writers tell whole seconds, and "10.host" sorts after "10.5.host".
        """
        who = f"{socket.gethostname()}.{os.getpid()}.{next(cls._numbers)}.lca"
        name = f"{_PREFIX}{time.time():017.6f}.{who}"
        there = [path.name for path in _event_files(directory)[0]]
        if any(other.startswith(_PREFIX) and other > name for other in there):
            later = min(math.floor(max(map(_opened_at, there))) + 1, int(_LATEST) - 1)
            name = f"{_PREFIX}{later:017.6f}.{who}"
        return name


def _frame(data: bytes) -> bytes:
    """Frames one event, as `_frames` walks them."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


def _frames(path: Path) -> Iterator[bytes | str]:
    """Walks the frames of an event file: u64 length, its checksum, the bytes, their checksum.

    TensorBoard's own reader stops at the first damaged event, and takes a second for every 8 MB to
    check sums in Python. Here only the lengths are checked, also against what the file holds.

    Yields:
        The bytes with their checksum; what is wrong at the end of a file that is cut off or
        damaged, or with an event of ours that is too large.
    """
    try:
        with path.open("rb") as file:
            while head := file.read(12):
                if len(head) < 12 or not _sound(head[:8], head[8:]):
                    # Without a length nobody knows where the next frame begins.
                    yield "it is cut off or damaged, and cannot be read from there on"
                    return
                (length,) = struct.unpack("<Q", head[:8])
                start, there = file.tell(), os.fstat(file.fileno())
                on_disk = getattr(there, "st_blocks", math.inf) * 512
                if length + 4 > there.st_size - start or (
                    length > _CHECKED_FRAME and length > on_disk
                ):
                    yield "it is cut off or damaged, and cannot be read from there on"
                    return
                if length <= _LARGEST_FRAME:
                    frame = file.read(length + 4)
                    if len(frame) < length + 4:
                        yield "it was cut off while it was read"
                        return
                    yield frame
                    continue
                if b"lca/" in file.read(_HEAD):
                    yield f"an event has {length:,} bytes"
                file.seek(start + length + 4)
    except OSError as error:
        yield f"it cannot be read: {error.strerror or error}"


def _sound(data: bytes, checksum: bytes) -> bool:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    (expected,) = struct.unpack("<I", checksum)
    return bool(masked_crc32c(data) == expected)
