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

import errno
import itertools
import json
import os
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

PLUGIN = "lca"
META = "lca/meta"
WINDOWS = ("parameters", "neurons", "weights")
_TAG = re.compile(
    rf"lca/(?P<table>chunk|{'|'.join(WINDOWS)})/(?P<first>\d{{9,}})/"
    r"(?:(?P<probe>.+)/)?(?P<part>[a-z_]+)"
)

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


def unpack(data: bytes) -> Array:
    """Unpacks what `pack` made; zlib's checksum tells damaged bytes.

    Raises:
        ValueError: The bytes are not a packed array.
    """
    try:
        header, _, body = data.partition(b"\n")
        described = json.loads(header)
        dtype = np.dtype(described["dtype"])
        planes = np.frombuffer(zlib.decompress(body), np.uint8)
        flat = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
        array: Array = flat.reshape(described["shape"])
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"Not a packed array of an LCA record: {error}") from error
    return array


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


def read(log_dir: Path) -> Iterator[tuple[str | None, bytes]]:
    """Reads the record's tags and their data from a log directory, in the order of writing.

    Yields:
        (tag, data), and (None, b"") for every stretch of a file that is cut off or damaged.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(log_dir.glob("*tfevents*")):
        for frame in _frames(path):
            try:
                event = Event.FromString(frame[:-4]) if frame is not None else None
            except DecodeError:
                event = None
            if frame is None or event is None:
                yield None, b""
                continue
            for value in event.summary.value:
                ours = value.metadata.plugin_data.plugin_name in ("", PLUGIN)
                if ours and value.tag.startswith("lca/") and value.tensor.string_val:
                    # The parts have checksums of their own.
                    whole = value.tag != META or _sound(frame[:-4], frame[-4:])
                    yield (value.tag, value.tensor.string_val[0]) if whole else (None, b"")


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
        # Files are read in the order of their names.
        who = f"{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        name = f"events.out.tfevents.{time.time():017.6f}.{who}.lca"
        self._file = open(directory / name, "xb", buffering=0)  # noqa: SIM115
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


def _frame(data: bytes) -> bytes:
    """Frames one event, as `_frames` walks them."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


def _frames(path: Path) -> Iterator[bytes | None]:
    """Walks the frames of an event file: u64 length, its checksum, the bytes, their checksum.

    TensorBoard's own reader stops at the first damaged event, and takes a second for every 8 MB to
    check sums in Python. Here only the lengths are checked.

    Yields:
        The bytes with their checksum; None at the end of a file that is cut off or damaged.
    """
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12 or not _sound(head[:8], head[8:]):
                yield None  # Without a length nobody knows where the next frame begins.
                return
            (length,) = struct.unpack("<Q", head[:8])
            frame = file.read(length + 4)
            if len(frame) < length + 4:
                yield None
                return
            yield frame


def _sound(data: bytes, checksum: bytes) -> bool:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    (expected,) = struct.unpack("<I", checksum)
    return bool(masked_crc32c(data) == expected)
