"""A small DiT and a small PixArt with the arguments of one forward."""

import pytest

from support.fused_models import dit_inputs, pixart_inputs
from support.pipes import small_dit, small_pixart


@pytest.fixture(params=["dit", "pixart"])
def small(request):
    model = small_dit() if request.param == "dit" else small_pixart()
    return model, dit_inputs(model) if request.param == "dit" else pixart_inputs(model)
