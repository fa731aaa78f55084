"""How far it is from the hook to the user's own code, and that one thing is held in one place."""

import ast
import inspect
from pathlib import Path

import pytest
from support.models import Classifier, unrecorded
from support.training import fit

import lightning_lca
from lightning_lca import LCACallback

HOME = Path(lightning_lca.__file__).parent
MOST = 7
SEEN = pytest.frames_seen = []  # Kept at another's module: what this one has is put back.


class Deep(Classifier):
    """Notes the package's own frames above each call of ``training_step``, the outermost first.

    Its loss cannot be recorded, so that it is called at every evaluation.

    They are kept apart from it, since what it holds is put back after each evaluation.
    """

    def training_step(self, batch, batch_idx):
        frame, names = inspect.currentframe(), []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(HOME):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        if names:
            pytest.frames_seen.append(tuple(names[::-1]))
        return unrecorded(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("arguments", [{}, {"tolerance": 1e-3}, {"every_n_steps": 3}])
def test_from_the_hook_to_training_step_it_is_seven_frames_at_most(tmp_path, arguments):
    SEEN.clear()
    fit(tmp_path, LCACallback(figures=False, **arguments), model=Deep, steps=9)
    measured = [names for names in SEEN if names[0] == "on_train_batch_end"]
    # An audit, one measured step in fifty, goes through what decides on reuse; the first look at
    # the loss, through what prepares it.
    usual = [names for names in measured if not {"start", "_prepare"}.intersection(names)]
    assert len(usual) > 4
    assert max(map(len, usual)) <= MOST, max(usual, key=len)


def test_whether_a_segment_continues_is_in_no_signature_but_its_own():
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert "continues" not in {a.arg for a in arguments}, f"{path}: {node.name}"
