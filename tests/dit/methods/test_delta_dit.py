"""Δ-DiT: which blocks are left out at which step, and that their offset stands in for them."""

import pytest
import torch

from harmonica_dit.methods import delta_dit
from harmonica_dit.models import DiT
from harmonica_dit.sample import image_noise, sample
from support.plain_blocks import denoise_by_blocks, four_blocks

# The paper's stages at 8 steps, every second whole, one of four blocks left out, detail from step 5 on: in each row
# the four blocks.
TABLE = ["1111", "1110", "1111", "1110", "1111", "0111", "1111", "0111"]


@pytest.fixture(scope="module")
def net():
    return four_blocks()


def test_rear_blocks_are_left_out_first_and_then_the_front_ones(net):
    made = delta_dit(net, 8, 1, boundary=5)
    assert ["".join(str(int(c)) for c in row[::2]) for row in made.compute.tolist()] == TABLE
    assert made.compute[:, ::2].equal(made.compute[:, 1::2]) and made.runs == (2, 4, 2)
    assert delta_dit(net, 8, 3).runs == (2, 4, 2) and delta_dit(net, 8, 2).runs == (4, 4)
    assert delta_dit(net, 8, 3).compute[1, ::2].tolist() == [True, False, False, False]
    assert delta_dit(net, 8, 3).compute[5, ::2].tolist() == [False, False, False, True]  # from half the steps on
    assert made.origin == "Δ-DiT, 1 of 4 blocks left out, every 2 computed whole, front ones from step 5"


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_offset_of_the_last_whole_step_is_added_again(net, blocks):
    """Also where front and rear overlap, so that each is two runs."""
    labels, steps, every, boundary = torch.tensor([0, 2, 3]), 9, 3, 6
    noise, kept = image_noise(0, 0, 3, net.sample_shape), {}

    def walk(s, every_block, x, c):
        states = [x]
        front, rear = (0, blocks), (4 - blocks, 4)
        left_out = None if s % every == 0 else rear if s < boundary else front
        while len(states) <= 4:
            i = len(states) - 1
            if left_out is not None and i == left_out[0]:
                states += [None] * (blocks - 1) + [states[-1] + kept[left_out]]
            else:
                states.append(every_block[i](states[-1], c))
        if left_out is None:
            kept.update({(a, b): states[b] - states[a] for a, b in (front, rear)})
        return states[4]

    expected = denoise_by_blocks(net, labels, noise, steps, 1.5, walk)
    schedule = delta_dit(net, steps, blocks, every=every, boundary=boundary)
    found = sample(net, labels, schedule=schedule, guidance=1.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - sample(net, labels, steps=steps, guidance=1.5)).abs().max() > 0.01


def test_a_speedup_leaves_out_no_more_than_it_takes(net):
    made = delta_dit(net, 8, speedup=1.2)
    left_out = int((~made.compute[1, ::2]).sum())
    assert made.speedup >= 1.2 and (left_out == 1 or delta_dit(net, 8, left_out - 1).speedup < 1.2)
    most = delta_dit(net, 9, 3, every=2).speedup
    longer = delta_dit(net, 9, speedup=most + 0.01)
    assert longer.compute.all(1).nonzero().flatten().tolist() == [0, 3, 6] and longer.speedup > most
    with pytest.raises(ValueError, match=f"expected at most {most:.4g}, which is that of 3 of 4 blocks"):
        delta_dit(net, 9, speedup=most + 0.01, every=2)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "blocks, speedup: give exactly one"), (dict(blocks=1, speedup=2), "blocks, speedup: give exactly one"),
    (dict(blocks=4), "blocks: got 4, expected at most 3 of the 4"), (dict(blocks=0), "blocks: got 0"),
    (dict(blocks=1, every=1), "every: got 1"), (dict(blocks=1, boundary=9), "boundary: got 9, expected at most 8"),
    (dict(speedup=0.5), "speedup: got 0.5"), (dict(blocks=1, steps=0), "steps: got 0")])
def test_what_is_out_of_range_is_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_dit(net, **dict(steps=8) | arguments)


def test_one_block_has_no_rear_and_front():
    with pytest.raises(ValueError, match="net: has 1 block"):
        delta_dit(DiT(8, 4, 1, 16, 1, 2, num_classes=4), 8, 1)
