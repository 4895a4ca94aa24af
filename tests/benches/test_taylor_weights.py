"""bench/taylor_weights.py: TaylorSeer's weights as published."""

import pytest
import torch

from bench.taylor_weights import Published, differences
from harmonica_dit.forecaster import BranchForecaster


@pytest.mark.parametrize("computed, s, weights", [
    ([0], 1, [1]), ([0, 2], 3, [1.5, -0.5]),
    ([0, 2, 4], 5, [1 + 1 / 2 + 1 / 8, -1 / 2 - 2 / 8, 1 / 8]),  # u = 1/2
    ([0, 3, 6, 9], 11, [1 + 2 / 3 + 2 / 9 + 4 / 81, -2 / 3 - 4 / 9 - 4 / 27, 2 / 9 + 4 / 27, -4 / 81]),  # u = 2/3
    ([0, 1, 3], 4, [1 + 1 / 2 + 1 / 8, -1 / 2 - 1 / 8 - 1 / 4, 1 / 4])])  # second: ((c - b)/2 - (b - a)/1)/2
def test_differences_are_weighed_by_powers(computed, s, weights):
    assert differences(computed, s) == pytest.approx(weights)


def test_only_the_weights_are_others():
    """In the same places; at the first order and before, the same ones."""
    compute = torch.tensor([s % 3 == 0 for s in range(11)])[:, None].expand(-1, 2)
    ours, published = (kind(2).weights(compute) for kind in (BranchForecaster, Published))
    assert [row is None for row in ours] == [row is None for row in published]
    for s in range(3, 6):
        assert (ours[s] is None and published[s] is None) or published[s][0] == pytest.approx(list(ours[s][0]))
    assert published[8][1] == pytest.approx([1 + 2 / 3 + 2 / 9, -2 / 3 - 4 / 9, 2 / 9])
