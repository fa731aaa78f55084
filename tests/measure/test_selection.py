import pytest

from lightning_lca.measure.selection import Selection

NAMES = ["encoder.fc.weight", "encoder.fc.bias", "encoder.norm.weight", "head.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ((), (), NAMES),
        (("encoder",), (), NAMES[:3]),
        (("encoder.*",), ("*.bias",), [NAMES[0], NAMES[2]]),
        ((), ("*.fc",), NAMES[2:]),
        (("*.norm", "head.weight"), (), NAMES[2:]),
        (("enc",), (), []),
        (("*",), ("*",), []),
    ],
)
def test_patterns_name_parameters_and_modules(include, exclude, left):
    selection = Selection(include, exclude)
    assert [name for name in NAMES if name in selection] == left


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(("encodr.*",)), "include='encodr.*' matches no parameter. Did you mean 'enc"),
        (Selection((), ("*.bias", "heads")), "exclude='heads' matches no parameter. Did you mean"),
        (Selection(("zzz",)), "Patterns match full names, as 'encoder.fc.weight'; those here"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_what_may_be_meant(selection, message):
    assert message in selection.complaint(NAMES)
    assert Selection(("encoder",), ("*.bias",)).complaint(NAMES) is None
