import multiprocessing

from support.processes import tell_around

from lightning_lca.runtime.nursery import Nursery


def test_a_process_has_the_environment_of_the_moment_and_ends_by_itself(monkeypatch):
    nursery = Nursery()
    for value in ("one", None, "two"):  # The process that forks has begun before.
        if value is None:
            monkeypatch.delenv("LCA_TRIED", raising=False)
        else:
            monkeypatch.setenv("LCA_TRIED", value)
        here, there = nursery.pipe()
        process = nursery.start(tell_around, there, ["LCA_TRIED"])
        there.close()
        assert here.recv() == [value]
        process.join(30)
        assert process.exitcode == 0
    assert not process.daemon, "it may start processes of its own"
    assert multiprocessing.parent_process() is None
