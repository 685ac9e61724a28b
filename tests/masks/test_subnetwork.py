"""A sub-network of whole channel groups computes what the masked full network computes."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed_diffusion.masks import channels
from fed_diffusion.masks.spaces import layout_of
from fed_diffusion.masks.subnetwork import extract, resized, scatter
from fed_diffusion.models.unet import UNet

CHANNELS, SIZE, GROUP, HEAD = 2, 8, 4, 4


@st.composite
def networks(draw):
    """A U-Net of random widths and levels, no parameter at zero, not even where it starts so."""
    levels = draw(st.integers(1, 3))
    network = UNet(
        CHANNELS,
        SIZE,
        tuple(draw(st.lists(st.sampled_from((8, 12, 16)), min_size=levels, max_size=levels))),
        blocks=draw(st.integers(1, 2)),
        attention=draw(st.sampled_from(((), (8,), (4, 2)))),
        group=GROUP,
        head=HEAD,
        classes=draw(st.sampled_from((None, 3))),
        prediction=draw(st.sampled_from(("eps", "v", "x0"))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return network


@st.composite
def selections(draw):
    """A network and the groups that one of the four choices keeps of it."""
    network = draw(networks())
    layout = layout_of(network)
    least = layout.kept(dict.fromkeys(layout.spaces, 1)) / layout.parameters
    counts = layout.counts(draw(st.floats(min(least + 1e-9, 1), 1)))
    choice = draw(st.sampled_from(channels.CHOICES))
    round, client = draw(st.integers(1, 20)), draw(st.integers(0, 9))
    if choice == "ordered":
        kept = channels.ordered(layout, counts)
    elif choice == "rolling":
        kept = channels.rolling(layout, counts, round)
    elif choice == "random":
        kept = channels.random(layout, counts, 5, round, client)
    else:
        kept = channels.magnitude(layout, counts, dict(network.named_parameters()))
    return network, kept


def masked(network, kept):
    """The whole network with everything of the dropped groups at zero."""
    full = copy.deepcopy(network)
    blocks = layout_of(network).blocks(kept)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name in blocks:
                parameter *= blocks[name].dense()
    return full


def batch(network, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((3, CHANNELS, SIZE, SIZE), generator=generator, dtype=dtype)
    u = torch.rand(3, generator=generator, dtype=torch.float64) * 3 + 0.05
    return x, u, None if network.classes is None else torch.tensor([0, 2, 3])


def gradients(network, dtype):
    out = network(*batch(network, dtype))
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), list(network.parameters()), allow_unused=True)


def distance(a, b):
    """||a - b|| / ||b||, and 0 where both vanish."""
    norm = float(b.detach().norm())
    return float((a - b).detach().norm()) / (norm or 1.0)


EXACT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@given(selection=selections())
@EXACT
def test_the_small_network_computes_what_the_masked_one_does(dtype, within, selection):
    network, kept = selection
    network = network.to(dtype)
    full, small = masked(network, kept), extract(network, kept)
    assert distance(small(*batch(network, dtype)), full(*batch(network, dtype))) < within


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@given(selection=selections())
@EXACT
def test_every_kept_gradient_is_the_masked_networks(dtype, within, selection):
    network, kept = selection
    network = network.to(dtype)
    full, small = masked(network, kept), extract(network, kept)
    blocks = layout_of(network).blocks(kept)
    names = [name for name, _ in network.named_parameters()]
    whole = dict(zip(names, gradients(full, dtype), strict=True))
    norm = sum(float(g.norm()) ** 2 for g in whole.values() if g is not None) ** 0.5
    for name, gradient in zip(names, gradients(small, dtype), strict=True):
        if gradient is None:
            assert whole[name] is None
            continue
        expected = blocks[name].take(whole[name]) if name in blocks else whole[name]
        assert float((gradient - expected).norm()) < within * norm


@given(selection=selections())
@EXACT
def test_scattering_what_was_extracted_gives_theta_back_under_the_mask(selection):
    network, kept = selection
    values = dict(extract(network, kept).named_parameters())
    theta = {name: value.detach() for name, value in network.named_parameters()}
    zeros = {name: torch.zeros_like(value) for name, value in theta.items()}
    over_zeros = scatter(values, kept, zeros, network)
    over_theta = scatter(values, kept, theta, network)
    for name, value in masked(network, kept).named_parameters():
        assert torch.equal(over_zeros[name], value)
        assert torch.equal(over_theta[name], theta[name])


@given(selection=selections(), eta=st.floats(1e-3, 0.1))
@EXACT
def test_a_step_of_sgd_on_the_small_network_is_the_masked_step_on_the_whole(selection, eta):
    network, kept = selection
    network = network.double()
    blocks = layout_of(network).blocks(kept)
    full, small = masked(network, kept), extract(network, kept)
    stepped = {}
    with torch.no_grad():
        pairs = zip(small.named_parameters(), gradients_of(small), strict=True)
        for (name, value), gradient in pairs:
            stepped[name] = value - eta * gradient
        zeros = {n: torch.zeros_like(v) for n, v in network.named_parameters()}
        scattered = scatter(stepped, kept, zeros, network)
        for (name, value), gradient in zip(
            full.named_parameters(), gradients_of(full), strict=True
        ):
            mask = blocks[name].dense() if name in blocks else 1
            assert distance(scattered[name], value - eta * gradient * mask) < 1e-10


def gradients_of(network):
    with torch.enable_grad():
        found = gradients(network, torch.float64)
    pairs = zip(found, network.parameters(), strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


@given(network=networks(), ratios=st.lists(st.floats(0.3, 1.0), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_keep_ratio_is_a_part_of_the_parameters_never_exceeded_and_nested(network, ratios):
    layout = layout_of(network)
    assert layout.parameters == sum(p.numel() for p in network.parameters())
    fitting = [
        r
        for r in sorted(ratios)
        if layout.kept(dict.fromkeys(layout.spaces, 1)) <= r * layout.parameters
    ]
    counts = [layout.counts(ratio) for ratio in fitting]
    for ratio, count in zip(fitting, counts, strict=True):
        small = extract(network, channels.ordered(layout, count))
        actual = sum(p.numel() for p in small.parameters())
        assert actual == layout.kept(count) <= ratio * layout.parameters
        assert count == layout.counts(ratio)
    for smaller, larger in pairwise(counts):
        assert all(smaller[name] <= larger[name] for name in layout.spaces)
    assert layout.counts(1.0) == {name: space.groups for name, space in layout.spaces.items()}


def test_the_next_group_in_line_would_exceed_the_ratio():
    layout = layout_of(UNet(1, 8, (16, 32), group=4))
    for keep in (0.25, 0.5, 0.75):
        counts = layout.counts(keep)
        steps = sum(counts.values()) - len(counts)
        following = layout._growth[steps]
        assert layout.kept(counts | {following: counts[following] + 1}) > keep * layout.parameters


def test_a_ratio_below_the_smallest_sub_network_is_refused_with_what_it_would_take():
    layout = layout_of(UNet(1, 8, (8, 8), group=8))
    with pytest.raises(ValueError, match=r"keep = 0.01 is below the smallest.*model.group"):
        layout.counts(0.01)


def test_other_networks_have_no_known_channels():
    with pytest.raises(TypeError, match=r"built-in U-Net only, not from Linear"):
        layout_of(torch.nn.Linear(2, 2))


def test_a_resized_copy_of_a_network_without_memory_has_only_its_own_size():
    with torch.device("meta"):
        network = UNet(1, 8, (16, 32), group=4)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    fresh = resized(network, shapes)
    assert {name: tuple(v.shape) for name, v in fresh.named_parameters()} == shapes
    assert all(not value.is_meta for value in fresh.parameters())
    assert all(value.is_meta for value in network.parameters())
