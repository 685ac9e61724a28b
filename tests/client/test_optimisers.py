"""Adam that goes on from a given state, by the torch optimiser it must agree with."""

import pytest
import torch
from torch import nn

from fed_diffusion.client.optimisers import SGD, Adam, CountedAdam, SharedAdam
from fed_diffusion.protocol.moments import FIRST, SECOND, STEPS

ETA = 0.01


def gradients(count, shape):
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw) * 10.0 ** -(k % 4) for k in range(count)]


def run(parameter, optimiser, found):
    for gradient in found:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("ours", "by_torch"),
    [
        (SGD, lambda parameters: torch.optim.SGD(parameters, lr=ETA)),
        (Adam, lambda parameters: torch.optim.Adam(parameters, lr=ETA, fused=True)),
    ],
)
def test_a_fresh_optimiser_is_torchs_own_to_the_bit_also_where_a_gradient_is_missing(
    ours, by_torch
):
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((2, 3, 5, 5), (7,), (4, 2))]
    start[0] = start[0].to(memory_format=torch.channels_last)
    mine, theirs = ([nn.Parameter(v.clone()) for v in start] for _ in range(2))
    optimiser, reference = ours(mine, ETA), by_torch(theirs)
    for k in range(5):
        optimiser.zero_grad()
        reference.zero_grad()
        for i, (one, two) in enumerate(zip(mine, theirs, strict=True)):
            if i != k:  # each goes without a gradient once
                one.grad = two.grad = torch.randn(one.shape, generator=draw)
        optimiser.step()
        reference.step()
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("ours", "by_torch"),
    [
        (SGD, lambda parameters: torch.optim.SGD(parameters, lr=ETA, weight_decay=0.3)),
        (Adam, lambda parameters: torch.optim.AdamW(parameters, lr=ETA, weight_decay=0.3)),
    ],
)
def test_a_decay_shrinks_what_is_trained_as_torchs_optimisers_do(ours, by_torch):
    mine, theirs = (nn.Parameter(torch.linspace(-2, 3, 7)) for _ in range(2))
    untrained = nn.Parameter(torch.ones(3))
    found = gradients(6, (7,))
    run(mine, ours([mine, untrained], ETA, 0.3), found)
    run(theirs, by_torch([theirs]), found)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(untrained, torch.ones(3))


def test_shared_moments_decay_values_alike_whether_or_not_coordinates_are_counted():
    found = gradients(5, (4,))
    values = torch.linspace(-2, 3, 4)
    zeros = {FIRST + "w": torch.zeros(4), SECOND + "w": torch.zeros(4)}
    reference = nn.Parameter(values.clone())
    run(reference, torch.optim.AdamW([reference], lr=ETA, weight_decay=0.3), found)
    for steps in (torch.zeros(()), torch.zeros(4)):
        whole = nn.Parameter(values.clone())
        run(whole, SharedAdam({"w": whole}, ETA, zeros | {STEPS + "w": steps}, 0.3), found)
        torch.testing.assert_close(whole, reference, rtol=1e-6, atol=1e-7)


def test_a_coordinate_with_t_steps_behind_it_moves_as_in_a_run_of_its_own():
    """Coordinates of one tensor were trained in different steps; each alone is torch's Adam."""
    found = gradients(9, (3,))
    whole = nn.Parameter(torch.ones(3))
    first, second, counts = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    alone = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    runs = [torch.optim.Adam([p], lr=ETA) for p in alone]
    for r, trained in enumerate(([0], [0, 1], [0, 1, 2])):  # three rounds of three steps
        state = {FIRST + "w": first, SECOND + "w": second, STEPS + "w": counts}
        start = whole.detach().clone()
        shared = SharedAdam({"w": whole}, ETA, state)
        run(whole, shared, found[3 * r : 3 * r + 3])
        keep = torch.tensor([i in trained for i in range(3)])
        moments = shared.moments()
        first = torch.where(keep, moments[FIRST + "w"], first)
        second = torch.where(keep, moments[SECOND + "w"], second)
        counts = counts + 3 * keep
        with torch.no_grad():
            whole.copy_(torch.where(keep, whole, start))
        for i in trained:
            run(alone[i], runs[i], [g[i : i + 1] for g in found[3 * r : 3 * r + 3]])
    assert counts.tolist() == [9, 6, 3]
    for i, parameter in enumerate(alone):
        kept = runs[i].state[parameter]
        torch.testing.assert_close(whole[i : i + 1], parameter, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first[i : i + 1], kept["exp_avg"], rtol=1e-6, atol=0)
        torch.testing.assert_close(second[i : i + 1], kept["exp_avg_sq"], rtol=1e-6, atol=0)


def test_equal_counts_are_torchs_own_adam_to_the_bit_and_only_others_are_not():
    found = gradients(4, (2, 3, 5, 5))
    like = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    plain, shared = nn.Parameter(like.clone()), nn.Parameter(like.clone())
    other = nn.Parameter(torch.ones(2))
    reference = torch.optim.Adam([plain], lr=ETA, fused=True)
    run(plain, reference, found[:2])
    state = {
        FIRST + "w": reference.state[plain]["exp_avg"].contiguous(),
        SECOND + "w": reference.state[plain]["exp_avg_sq"].contiguous(),
        STEPS + "w": torch.tensor(2.0),
        FIRST + "b": torch.zeros(2),
        SECOND + "b": torch.zeros(2),
        STEPS + "b": torch.tensor([0.0, 2.0]),
    }
    with torch.no_grad():
        shared.copy_(plain)
    optimiser = SharedAdam({"w": shared, "b": other}, ETA, state)
    kinds = [type(part) for part in optimiser._parts]
    assert kinds == [Adam, CountedAdam]
    run(plain, reference, found[2:])
    run(shared, optimiser, found[2:])
    assert torch.equal(plain, shared)
    moments = optimiser.moments()
    assert torch.equal(moments[FIRST + "w"], reference.state[plain]["exp_avg"])
    assert torch.equal(moments[SECOND + "w"], reference.state[plain]["exp_avg_sq"])


@pytest.mark.parametrize("count", [0.0, 1.0, 7.0, 5000.0, 2.0**24])
def test_bias_corrections_are_adams_however_many_steps_are_behind(count):
    gradient = torch.tensor([0.3, -2.0])
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    kept = {"exp_avg": torch.full((2,), 0.1), "exp_avg_sq": torch.full((2,), 0.2)}
    by_torch, ours = torch.optim.Adam([one], lr=ETA), CountedAdam([two], ETA)
    by_torch.state[one] = {n: v.clone() for n, v in kept.items()} | {"step": torch.tensor(count)}
    ours.state[two] = {n: v.clone() for n, v in kept.items()} | {"step": torch.full((2,), count)}
    torch.testing.assert_close(
        run(two, ours, [gradient]), run(one, by_torch, [gradient]), rtol=1e-6, atol=1e-8
    )
