from fractions import Fraction

import numpy as np
import pytest

from lightning_lca.measure.quadrature import RULES, SIMPSON, Quadrature, as_quadrature


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_is_exact_up_to_its_degree_and_not_beyond(rule):
    def error(power):
        exact = Fraction(1, power + 1)
        return abs(sum(w * s**power for s, w in zip(rule.nodes, rule.weights)) - exact)

    assert max(error(j) for j in range(rule.degree + 1)) < 1e-15
    assert error(rule.degree + 1) > 1e-4, "the degree is understated"


@pytest.mark.parametrize("name", ["trapezoid", "simpson", "boole"])
@pytest.mark.parametrize("panels", [1, 3, 8])
def test_composite_rules_agree_with_the_textbook_formula(name, panels):
    scipy_integrate = pytest.importorskip("scipy.integrate")
    rule = RULES[name].composite(panels)
    nodes = np.array(rule.nodes)
    assert np.allclose(np.diff(nodes), nodes[1] - nodes[0], atol=1e-15), "shared nodes are merged"
    values = np.exp(nodes)
    if name == "boole":
        reference = sum(
            scipy_integrate.newton_cotes(4)[0] @ values[4 * p : 4 * p + 5] * (nodes[1] - nodes[0])
            for p in range(panels)
        )
    else:
        reference = getattr(scipy_integrate, name)(values, x=nodes)
    assert np.dot(rule.weights, values) == pytest.approx(reference, rel=1e-14)


@pytest.mark.parametrize(
    ("nodes", "weights", "degree", "message"),
    [
        ((0.0, 1.0), (0.5, 0.4), 0, r"integrates s\^0 to 0.9 instead of 1"),
        ((0.0, 1.0), (0.5, 0.5), 2, r"integrates s\^2 to 0.5 instead of 0.333333"),
        ((0.0, 1.0), (1.0,), 0, "2 nodes and 1 weights"),
        ((), (), 0, "0 nodes"),
        ((1.0, 0.0), (0.5, 0.5), 1, "increasing nodes"),
        ((0.0, 1.5), (0.5, 0.5), 0, r"nodes in \[0, 1\]"),
        ((0.5,), (float("nan"),), 0, "to nan instead of 1"),
        ((0.5,), (1.0,), -1, "degree of at least 0"),
    ],
)
def test_a_wrong_rule_cannot_be_built(nodes, weights, degree, message):
    with pytest.raises(ValueError, match=message):
        Quadrature("mine", nodes, weights, degree)


@pytest.mark.parametrize("told", [{"closes": True}, {"adapts": True}])
def test_only_the_trapezoid_closes(told):
    with pytest.raises(ValueError, match=r"needs nodes=\(0.0, 1.0\)"):
        Quadrature("mine", SIMPSON.nodes, SIMPSON.weights, 3, **told)
    with pytest.raises(ValueError, match="got nodes"):
        Quadrature("mine", (0.0, 1.0), (0.5, 0.5), 1, adapts=True)


def test_a_composite_rule_has_panels():
    with pytest.raises(ValueError, match="A composite rule needs at least 1 panel, got 0"):
        RULES["simpson"].composite(0)


def test_gradients_per_step_count_what_a_chain_of_segments_pays():
    per_step = {name: rule.gradients_per_step for name, rule in RULES.items()}
    assert per_step == {
        "euler": 1,
        "midpoint": 1,
        "trapezoid": 1,
        "closed_trapezoid": 1,
        "adaptive": 1,  # And one more where the middle is taken.
        "simpson": 2,
        "boole": 4,
        "gauss2": 2,
        "gauss3": 3,
    }


def test_rules_are_found_by_name():
    assert as_quadrature("simpson") is SIMPSON
    assert as_quadrature(SIMPSON) is SIMPSON
    with pytest.raises(
        ValueError, match=r"Unknown quadrature 'simson'\. Choose one of euler, midpoint"
    ):
        as_quadrature("simson")
    with pytest.raises(TypeError, match="must be a name or a Quadrature, got int"):
        as_quadrature(4)
