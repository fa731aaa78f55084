"""A table that grows: what np.concatenate gives, what was handed out stays, few copies."""

import copy
import pickle

import numpy as np
from support.noise import noisy

from lightning_lca import History
from lightning_lca.record.growth import GrowingTable
from lightning_lca.record.tables import StepTable


def same(a, b):
    return a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True) for name in a.arrays
    )


def pieces(count=120, seed=0):
    rows = noisy(steps=400, layers=3).rows
    cuts = np.sort(np.random.default_rng(seed).integers(0, 401, count - 1))
    return rows, [rows[a:b] for a, b in zip([0, *cuts], [*cuts, 400])]


def test_rows_are_those_appended_and_what_was_handed_out_stays():
    rows, parts = pieces()
    history = History("abc", [1000] * 3)
    given = []
    for part in parts:
        history.append(part)
        given.append((history.rows, copy.deepcopy(history.rows)))
    assert same(history.rows, rows)
    assert all(same(now, then) for now, then in given)
    history.cut(200)
    history.append(rows[300:])
    assert same(history.rows, StepTable.join([rows[:200], rows[300:]]))
    assert same(given[-1][0], rows), "a cut leaves what was handed out"


def test_two_histories_of_the_same_rows_do_not_write_into_one_another():
    rows, _ = pieces()
    history = History("abc", [1000] * 3)
    history.append(rows[:100])
    history.append(rows[100:200])
    twins = [history.as_it_is(), copy.copy(history), pickle.loads(pickle.dumps(history))]
    _ = [twin.rows for twin in twins]
    for i, twin in enumerate([history, *twins]):
        twin.append(rows[200 + 40 * i : 240 + 40 * i])
        _ = twin.rows
    for i, twin in enumerate([history, *twins]):
        assert same(twin.rows, StepTable.join([rows[:200], rows[200 + 40 * i : 240 + 40 * i]]))


def test_a_pickle_holds_the_rows_and_no_room_for_more():
    rows, parts = pieces()
    history, once = History("abc", [1000] * 3), History("abc", [1000] * 3)
    for part in parts:
        history.append(part)
        _ = history.rows
    once.append(rows)
    assert len(pickle.dumps(history)) < 1.05 * len(pickle.dumps(once))


def test_columns_widen_where_later_rows_need_it():
    rows, _ = pieces()
    narrow = StepTable.of_arrays(
        rows[:150].arrays | {"allocated": rows.allocated[:150].astype(np.float32)}
    )
    for order in ([narrow, rows[150:]], [rows[150:], narrow]):
        history = History("abc", [1000] * 3)
        for part in order:
            history.append(part)
            _ = history.rows
        assert same(history.rows, StepTable.join(order))
        assert history.rows.allocated.dtype == np.float64


def test_a_row_is_copied_a_few_times_however_often_rows_are_added():
    rows, parts = pieces()
    made = []

    def allocate(shape, dtype):
        made.append(shape[0])
        return np.empty(shape, dtype)

    growing, table = GrowingTable(allocate), parts[0]
    for part in parts[1:]:
        table = growing.join([table, part])
    assert same(table, rows)
    columns = len(rows.arrays)
    assert sum(made) / columns < 5 * len(rows)
    assert len(made) / columns < 20 < len(parts)
