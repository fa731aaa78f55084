"""The record's format: packed chunks of arrays in TensorBoard event files.

A run writes one ``lca/meta`` event (JSON: groups, sizes, settings) per session, and then chunks,
each of some hundred measured steps, as ``lca/chunk/{first_step:09d}/{part}``; a named probe adds
its name, ``lca/chunk/{first_step:09d}/{probe}/{part}``. One tag per chunk cannot be sampled away by
TensorBoard.

Every part is one string tensor: a line of JSON (dtype, shape), then the zlib-compressed bytes of
the array, all first bytes of its elements first. Nothing here needs torch, so that TensorBoard can
load it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

PLUGIN = "lca"
META = "lca/meta"
_CHUNK = re.compile(r"lca/chunk/(\d{9,})/(?:(?P<probe>.+)/)?(?P<part>[a-z_]+)")

Array = npt.NDArray[Any]


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
    """Unpacks what `pack` made.

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


def chunk_tags(first_step: int, probe: str | None, parts: Mapping[str, Array]) -> dict[str, bytes]:
    """Packs the parts of one chunk under their tags."""
    name = f"{probe}/" if probe else ""
    return {f"lca/chunk/{first_step:09d}/{name}{part}": pack(a) for part, a in parts.items()}


def read_chunks(log_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the sessions of a log directory in the order in which they were written.

    Yields:
        ("meta", the JSON) at the start of every session, and ("chunk", {"probe": name or "", part:
        array}) for every chunk whose parts are all there. A file cut off in mid-write is read up to
        the cut.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(log_dir.glob("*tfevents*")):
        chunks: dict[tuple[str, str], dict[str, Any]] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name not in ("", PLUGIN):
                    continue
                if value.tag == META:
                    yield from (("chunk", chunk) for chunk in chunks.values())
                    chunks = {}
                    yield "meta", json.loads(value.tensor.string_val[0])
                elif match := _CHUNK.fullmatch(value.tag):
                    key = (match[1], match["probe"] or "")
                    chunk = chunks.setdefault(key, {"probe": key[1]})
                    chunk[match["part"]] = unpack(value.tensor.string_val[0])
        yield from (("chunk", chunk) for chunk in chunks.values())
