"""Numbers as text: each reads back as what it was."""

import csv
import io

import numpy as np
import pytest

from lightning_lca.record.decimals import WIDTH, singles
from lightning_lca.record.export import csv_header, csv_rows


def read(values):
    rows = singles(values).reshape(-1, WIDTH)
    texts = [row.tobytes().replace(b"\0", b"") for row in rows]
    assert all(text.startswith(b",") for text in texts)
    return np.array([np.float32(float(text[1:])) for text in texts], np.float32)


def test_float32_numbers_of_any_bits_read_back_exactly():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    values = bits.view(np.float32)
    assert np.isnan(values).any()
    assert np.array_equal(read(values), values, equal_nan=True)


def test_powers_of_ten_and_what_lies_next_to_them_read_back_exactly():
    powers = np.array([f"1e{i}" for i in range(-45, 39)], np.float32)
    ends = np.array([0, -0.0, np.inf, -np.inf, np.nan, 2**-149, 2**-126, 3.4028235e38], np.float32)
    near = [np.nextafter(powers, np.float32(end)) for end in (-np.inf, np.inf)]
    almost = np.array([9.99999999e8, 999999999, 99999999.5, 1e8, 16777217], np.float32)
    values = np.concatenate([ends, powers, -powers, *near, almost])
    assert np.array_equal(read(values), values, equal_nan=True)
    assert read(values[:0]).size == 0


def test_whatever_the_columns_are_csv_reads_back_what_they_hold():
    random = np.random.default_rng(0)
    names = np.array(
        ["plain", 'a "quoted" one', "with, comma", "line\nend", "naïve", "", "'"], object
    )
    columns = {
        "first": random.normal(size=7).astype(np.float32),
        "steps, done": np.arange(7),
        "layer": np.array(names, object),
        'the "second"': random.normal(size=7),
        "third": random.normal(size=7).astype(np.float32),
        "fourth": np.array([0, np.nan, np.inf, -np.inf, 1e-45, 1, -1], np.float32),
        "sure": random.random(7) < 0.5,
    }
    text = (csv_header(columns) + csv_rows(columns)).decode()
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert head == list(columns)
    for told, (name, column) in zip(zip(*rows), columns.items(), strict=True):
        if column.dtype == np.float32:
            back = np.array([np.float32(float(cell)) for cell in told])
            assert np.array_equal(back, column, equal_nan=True), name
        else:
            assert list(told) == [str(value) for value in column.tolist()], name


@pytest.mark.parametrize("size", [1, 7, 2**20, 2**22])
def test_a_fraction_in_float32_tells_how_many_weights_it_stands_for(size):
    counts = np.unique(
        np.concatenate([np.arange(min(size, 5000)), size - np.arange(min(size, 5000))])
    )
    told = read((counts / size).astype(np.float32))
    assert np.array_equal(np.rint(told.astype(float) * size), counts)
