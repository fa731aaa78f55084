"""Records that are damaged, or made to harm: a clear error or partial data, soon and in little."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.hostile import BOMB, CHUNKS, DESCRIPTIONS, STEMS, window
from support.marks import matrix
from support.records import bounded, chunk, command, description, good, packed, write

from lightning_lca import History
from lightning_lca.record import eventfile
from lightning_lca.record.reader import Reader


@pytest.mark.slow
@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_cannot_be_used_is_told(tmp_path, case):
    data, why = DESCRIPTIONS[case]
    write(tmp_path, {eventfile.META: data}, chunk())
    with bounded(), pytest.raises(FileNotFoundError) as error:
        History.load(tmp_path)
    assert why in str(error.value)
    assert "Give the run's log directory" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_later_session_that_cannot_be_read_leaves_the_first(tmp_path, case):
    write(
        tmp_path, {eventfile.META: description()}, chunk(), {eventfile.META: DESCRIPTIONS[case][0]}
    )
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), history.lost) == (8, 1)


def test_a_later_format_hides_its_own_chunks_alone(tmp_path):
    later = {eventfile.META: description(version=7, first_step=8)}
    again = {eventfile.META: description(first_step=8)}
    write(
        tmp_path, {eventfile.META: description()}, chunk(), later, chunk(9), again, chunk(9, rows=2)
    )
    history = History.load(tmp_path)
    assert (len(history), history.lost) == (10, 1)


def test_settings_that_are_no_numbers_become_none(tmp_path):
    settings = {"tolerance": float("inf"), "seed": float("nan"), "every_n_steps": 1}
    write(tmp_path, {eventfile.META: description(settings=settings)}, chunk())
    history = History.load(tmp_path)
    assert history.settings == {"tolerance": None, "seed": None, "every_n_steps": 1}
    assert len(history) == 8


@pytest.mark.parametrize("case", CHUNKS)
def test_a_chunk_that_cannot_be_read_costs_its_own_steps(tmp_path, case):
    said = {eventfile.META: description()}
    write(tmp_path, said, chunk(1), chunk(9, **CHUNKS[case]), chunk(17))
    with bounded():
        history = History.load(tmp_path)
    assert history.steps.tolist() == [*range(1, 9), *range(17, 25)]
    assert history.lost == 1
    reader = Reader.of(tmp_path)
    assert "lca/chunk/000000009/" in reader.problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps", "allocated", "helping", "idle", "scalars"])
def test_every_bit_of_a_header_may_be_flipped(tmp_path, part):
    said, tags = {eventfile.META: description()}, chunk(9)
    tag = f"lca/chunk/000000009/{part}"
    whole = tags[tag]
    for bit in range(8 * (whole.index(b"\n") + 1)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        reader = Reader()
        for key, data in (said | chunk(1) | tags | {tag: bytes(flipped)} | chunk(17)).items():
            reader.feed(key, data)
        history = reader.histories[""]
        # A blank may become another one, and a comma's neighbour too.
        if json_of(bytes(flipped)) == json_of(whole):
            assert len(history) == 24
        else:
            assert (len(history), reader.lost) == (16, 1), (bit, bytes(flipped)[:50])


def json_of(data):
    try:
        header, newline, _ = data.partition(b"\n")
        return json.loads(header), newline
    except ValueError:
        return None


def test_parts_of_a_later_version_are_passed_over(tmp_path):
    more = {"lca/chunk/000000001/norms": eventfile.pack(np.zeros(8)), "lca/chunk/000000001/x": b"?"}
    write(tmp_path, {eventfile.META: description()}, chunk(1) | more, {"lca/spectrum/1": b"?"})
    history = History.load(tmp_path)
    assert (len(history), history.lost) == (8, 0)


def test_tables_that_are_never_complete_do_not_fill_the_memory(tmp_path):
    one = eventfile.pack(np.zeros((2**12, 64), np.float32))
    groups = [f"{i}" for i in range(64)]
    said = {eventfile.META: description(groups=groups, sizes=[1] * 64)}
    parts = [{f"lca/chunk/{i:09d}/allocated": one} for i in range(1, 200)]
    write(tmp_path, said, *parts)
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), history.lost) == (0, 199)


# -- windows --------------------------------------------------------------------------------------


def test_names_of_many_neurons_are_not_made_before_there_are_rows(tmp_path):
    wide = packed("<f4", [1, 10**9], BOMB)
    said = {eventfile.META: description(windows=STEMS)}
    write(tmp_path, said, chunk(), window(allocated=wide), window(first=9))
    with bounded():
        history = History.load(tmp_path)
        assert (len(history), history.lost) == (8, 2)
        assert len(history.neurons) == 0
        assert history.summary()
    write(tmp_path, {eventfile.META: description(windows=STEMS, first_step=4)})
    with bounded():
        assert len(History.load(tmp_path)) == 4, "a second session measures like the first"


def test_zeros_that_unpack_to_very_many_neurons_are_refused(tmp_path):
    few = 8_000_000
    said = {eventfile.META: description(windows={"neurons": {"stems": [["conv", few]]}})}
    wide = packed("<f4", [1, few], zlib.compress(bytes(4 * few), 9))
    write(tmp_path, said, chunk(), *(window(first=i, allocated=wide) for i in range(8, 20)))
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), len(history.neurons), history.lost) == (8, 0, 12)


@pytest.mark.parametrize(
    "changed",
    [
        {"span": np.array([[8.0, 8.0]])},
        {"span": np.array([[8, -1]])},
        {"span": np.array([[-8, 8]])},
        {"span": np.array([8, 8])},
        {"span": np.array([[8, 8, 8]])},
        {"span": np.array([[9, 1], [8, 1]]), "allocated": np.ones((2, 4), np.float32)},
        {"span": np.array([[7, 4], [8, 4]])},
        {"allocated": np.ones((1, 3), np.float32)},
        {"allocated": np.ones((1, 4), np.int64)},
        {"allocated": np.array(1.0)},
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_lost_alone(tmp_path, changed):
    said = {eventfile.META: description(windows={"neurons": {"stems": [["conv", 4]]}})}
    late = {"span": np.array([[16, 8]])}
    write(tmp_path, said, chunk(), window(**changed), window(first=16, **late))
    history = History.load(tmp_path)
    assert (len(history), history.lost, history.neurons.steps.tolist()) == (8, 1, [16])


def test_what_does_not_fit_is_told_in_words(tmp_path):
    said = {eventfile.META: description(windows={"neurons": {"stems": [["conv", 4]]}})}
    write(tmp_path, said, chunk(), window(span=np.array([[7, 4], [8, 4]])))
    (told,) = Reader.of(tmp_path).problems
    assert told.startswith("lca/neurons/")
    assert told.endswith("Windows of 4 things do not fit together.")


def test_a_chunk_of_more_numbers_than_are_written_is_refused(tmp_path):
    """Of many groups a chunk has few rows: more would take memory that nobody needs."""
    groups = [f"{i}" for i in range(2**15)]
    said = {eventfile.META: description(groups=groups, sizes=[1] * len(groups))}
    wide = eventfile.pack(np.zeros((16, len(groups)), np.float32))
    write(tmp_path, said, {"lca/chunk/000000001/allocated": wide})
    with bounded():
        (told,) = Reader.of(tmp_path).problems
    assert told.endswith("It has 524,288 numbers; a chunk has at most 262,144.")


# -- files ----------------------------------------------------------------------------------------


def frame(length, data=b"", checksum=True):
    head = struct.pack("<Q", length)
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return head + struct.pack("<I", masked_crc32c(head) if checksum else 0) + data


@pytest.mark.parametrize("length", [2**30, 2**40, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_ends_it(tmp_path, length):
    path = good(tmp_path)
    with path.open("ab") as file:
        file.write(frame(length, b"some"))
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), history.lost) == (16, 1)


def test_a_file_that_only_pretends_to_be_long_is_not_read(tmp_path):
    path = good(tmp_path)
    with path.open("ab") as file:
        file.write(frame(2**36))
        file.truncate(2**37)
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), history.lost) == (16, 1)


def test_what_is_no_regular_file_is_passed_over(tmp_path):
    good(tmp_path)
    os.mkfifo(tmp_path / "events.out.tfevents.1.pipe")
    (tmp_path / "events.out.tfevents.2.directory").mkdir()
    with bounded():
        history = History.load(tmp_path)
    assert (len(history), history.lost) == (16, 0)


def test_links_that_lead_nowhere_are_counted(tmp_path):
    good(tmp_path)
    loop = tmp_path / "events.out.tfevents.3.loop"
    loop.symlink_to(loop)
    (tmp_path / "events.out.tfevents.4.gone").symlink_to(tmp_path / "gone")
    history = History.load(tmp_path)
    assert (len(history), history.lost) == (16, 2)


def test_a_file_that_must_not_be_read_is_counted(tmp_path, monkeypatch):
    good(tmp_path)
    other = good(tmp_path)
    opened = Path.open

    def deny(path, *args, **kwargs):
        if path == other:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", deny)
    reader = Reader.of(tmp_path)
    assert (len(reader.histories[""]), reader.lost) == (16, 1)
    assert "Permission denied" in reader.problems[0]


@pytest.mark.parametrize("what", ["pipe", "directory", "file", "nothing"])
def test_a_path_without_a_record_is_named(tmp_path, what):
    path = tmp_path / "x"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "file":
        path.write_text("x")
    with bounded(), pytest.raises(FileNotFoundError, match="Give the run's log directory"):
        History.load(path)


def test_pictures_of_others_are_not_taken_apart(tmp_path):
    path = good(tmp_path)
    with path.open("ab") as file:
        file.write(frame(10, bytes(14)))  # No event at all.
    assert History.load(tmp_path).lost == 0


# -- sessions -------------------------------------------------------------------------------------


def test_another_callback_does_not_go_on_with_a_history(tmp_path):
    def session(first_step, **more):
        return {eventfile.META: description(first_step=first_step, **more)}

    write(tmp_path, session(0, callback="a"), chunk(1), session(8, callback="a"), chunk(9))
    assert len(History.load(tmp_path)) == 16
    write(tmp_path, session(16), chunk(17))
    assert len(History.load(tmp_path)) == 24, "one that does not say goes on"
    write(tmp_path, session(24, callback="b"), chunk(25))
    history = History.load(tmp_path)
    assert (history.steps.tolist(), history.lost) == ([*range(25, 33)], 0)


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    """A run that is well, beside many that are not."""
    root = tmp_path / "logs"
    good(root / "good")
    for i, (data, _) in enumerate(DESCRIPTIONS.values()):
        if len(data) < 2**20:
            write(root / f"described {i}", {eventfile.META: data}, chunk())
    said = {eventfile.META: description()}
    for i, changed in enumerate(CHUNKS.values()):
        write(root / f"chunk {i}", said, chunk(1), chunk(9, **changed))
    os.mkfifo(root / "events.out.tfevents.1.pipe")
    (root / "x.tfevents.y").mkdir()
    (root / "around").symlink_to(root)
    (root / "events.out.tfevents.2.loop").symlink_to(root / "events.out.tfevents.2.loop")
    return root


def test_the_summary_of_many_tells_what_each_lost(logs, capsys):
    with bounded():
        status, out, err = command(capsys, "summary", logs)
    assert status == 0
    assert out.count("true loss change") == 1 + len(CHUNKS)
    assert err.count("1 piece of the record could not be read") == len(CHUNKS)
    assert err.count("holds no LCA record that can be read") >= len(DESCRIPTIONS) - 2


@pytest.mark.parametrize("kind", ["summary", "figures", "export"])
def test_a_run_that_lost_a_piece_is_drawn_and_exported(tmp_path, capsys, kind):
    said = {eventfile.META: description()}
    write(tmp_path / "run", said, chunk(1), chunk(9, **CHUNKS["dtype <"]))
    rest = {
        "summary": [],
        "figures": ["--out", tmp_path / "out", "--dpi", "30"],
        "export": ["--to", tmp_path / "out.csv"],
    }[kind]
    status, _, err = command(capsys, kind, tmp_path / "run", *rest)
    assert status == 0
    assert "1 piece of the record could not be read" in err
    assert "dtype is '8i8'" in err


@pytest.mark.parametrize("kind", ["summary", "figures", "export"])
def test_a_run_that_cannot_be_read_is_one_line(tmp_path, capsys, kind):
    write(tmp_path / "run", {eventfile.META: description(version=2)}, chunk(1))
    rest = {"figures": ["--out", tmp_path / "out"], "export": ["--to", tmp_path / "o.csv"]}
    status, out, err = command(capsys, kind, tmp_path / "run", *rest.get(kind, []))
    assert (status, out) == (2, "")
    assert "Update lightning_lca" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_name_of_a_probe_leads_nowhere(tmp_path, capsys):
    names = ["../../up", str(tmp_path / "absolute"), "..", "fine"]
    tags = chunk(1)
    chunks = [{t.replace("1/", f"1/{name}/"): data for t, data in tags.items()} for name in names]
    write(tmp_path / "run", {eventfile.META: description(probes=names)}, *chunks)
    out = tmp_path / "deep" / "er" / "out"
    status, _, _ = command(capsys, "figures", tmp_path / "run", "--out", out, "--dpi", "30")
    assert status == 0
    assert len(list(out.iterdir())) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"run", "deep"}


def test_names_do_not_move_the_terminals_cursor(tmp_path, capsys):
    groups = ["\x1b[2Jconv\n", "head" * 1000]
    write(tmp_path, {eventfile.META: description(groups=groups)}, chunk(1))
    _, out, _ = command(capsys, "summary", tmp_path)
    assert "\\x1b[2Jconv\\n" in out
    assert len(out) < 10_000


def test_numbers_that_cannot_be_drawn_cost_their_figure_alone(tmp_path, capsys):
    near = np.array([[1e308, -1e308]] * 4 + [[np.nan, 1e-300]] * 4)
    write(tmp_path / "run", {eventfile.META: description()}, chunk(1, allocated=near))
    out = tmp_path / "out"
    status, _, err = command(capsys, "figures", tmp_path / "run", "--out", out, "--dpi", "30")
    assert status == 0
    assert "ledger.png" in {path.name for path in out.iterdir()}
    assert all("cannot be drawn: " in line for line in err.splitlines()[:-1])


# -- whatever else --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", matrix({str(seed): seed for seed in range(8)}, quick="0"))
def test_any_bytes_flipped_and_any_end_cut_off_are_read_or_told(tmp_path, seed):
    random = np.random.default_rng(seed)
    whole = next((Path(__file__).parent.parent / "data/recorded_by_d28cd56").glob("*tfevents*"))
    data = bytearray(whole.read_bytes())
    for trial in range(25):
        some = bytearray(data)
        for _ in range(random.integers(1, 6)):
            some[random.integers(len(some))] ^= int(random.integers(1, 256))
        if trial % 3 == 0:
            del some[random.integers(len(some)) :]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / whole.name).write_bytes(some)
        with bounded():
            told = None
            for probe in ("train", "val"):
                try:
                    history = History.load(tmp_path / "run", probe)
                except (FileNotFoundError, ValueError) as error:
                    told = str(error)
                else:
                    assert len(history) <= 40
                    assert history.summary()
                    assert all(len(table) <= 4 for table in history.windows.values())
        assert told is None or "LCA record" in told or "No probe" in told
