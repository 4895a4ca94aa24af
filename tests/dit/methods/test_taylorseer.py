"""TaylorSeer: which outputs a forecast is made of, and with which weights."""

from fractions import Fraction as F

import pytest

from harmonica_dit.methods import fora, taylorseer
from harmonica_dit.models import DiT

# Every third of 11 steps, the forecasts one and two steps after a computed one, at u = 1/3 and 2/3 of the way to the
# next: Newton's c + Σ_i Δⁱc·u(u + 1)…(u + i - 1)/i!, Δ the differences of computed outputs, sorted by outputs, the
# newest first. Up to step 3 there is one output, up to step 6 there are two; what is not in a table is as three or six
# steps before.
TABLE = {
    1: {4: (F(4, 3), F(-1, 3)), 5: (F(5, 3), F(-2, 3))},
    2: {4: (F(4, 3), F(-1, 3)), 5: (F(5, 3), F(-2, 3)),
        7: (F(14, 9), F(-7, 9), F(2, 9)), 8: (F(20, 9), F(-16, 9), F(5, 9))},
    3: {4: (F(4, 3), F(-1, 3)), 5: (F(5, 3), F(-2, 3)),
        7: (F(14, 9), F(-7, 9), F(2, 9)), 8: (F(20, 9), F(-16, 9), F(5, 9)),
        10: (F(140, 81), F(-35, 27), F(20, 27), F(-14, 81))},
}


@pytest.fixture(scope="module")
def net():
    return DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=4)


@pytest.mark.parametrize("order", TABLE)
def test_forecasts_continue_the_polynomial_through_the_last_outputs(net, order):
    schedule = taylorseer(net, 11, 3, order)
    assert [all(row) for row in schedule.rows] == [s % 3 == 0 for s in range(11)]
    assert [any(row) for row in schedule.rows] == [s % 3 == 0 for s in range(11)]
    assert schedule.history == order + 1
    for s, weights in enumerate(schedule.forecast_weights):
        expected = TABLE[order].get(s) or TABLE[order].get(s - 3) or TABLE[order].get(s - 6)
        if s % 3 == 0 or s < 3:
            assert weights is None  # computed, or one output, which is repeated
        elif order == 1:  # e in (1 + e)·newest - e·the one before
            assert weights == pytest.approx([-float(expected[1])] * 2)
        else:
            assert [list(w) for w in weights] == [pytest.approx([float(e) for e in expected])] * 2


def test_the_order_is_the_first_unless_it_is_given_and_order_0_is_fora(net):
    assert taylorseer(net, 11, 3).origin == "TaylorSeer of order 1, every 3"
    for order in (0, 2):
        made, same = taylorseer(net, 11, 3, order), fora(net, 11, 3, order)
        assert (made.origin, made.forecast_weights) == (same.origin, same.forecast_weights)
    assert fora(net, 11, 3).origin == "FORA, every 3" and not any(fora(net, 11, 3).forecast_weights)
