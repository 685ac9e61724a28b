"""What travels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.build import Setup, skeleton
from fed_diffusion.config import load_config
from fed_diffusion.masks import channels
from fed_diffusion.masks.families.weights import SCOPES
from fed_diffusion.masks.mask import Block, mask_of
from fed_diffusion.masks.recipe import RecipeError
from fed_diffusion.protocol.codecs import DTYPES, Packed, cast, unpack
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.wire import (
    Payload,
    cast_theta,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
)
from tests.masks.recipes import masks_of, recipe_of
from tests.tiny import wire_of

THETA = {
    "w": torch.linspace(-1, 1, 35).reshape(5, 7),
    "b": torch.linspace(1, 2, 5),
    "scalar": torch.tensor(3.0),
}
PLAIN = load_config("digits", {"pruning.kind": "random", "pruning.keep": 0.5})
TOPK = load_config("digits", {"pruning.kind": "topk", "pruning.keep": 0.5})
CHANNELS = load_config("digits", {"model.widths": [16, 24], "pruning.kind": "channels"})
LAYOUT = Setup.of(CHANNELS).layout
UNET = {
    name: torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    for i, (name, value) in enumerate(skeleton(CHANNELS).named_parameters())
}
# the largest error that rounding may make, as a part of the largest value
WITHIN = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 127}


def wired(config, **settings):
    wire = config.wire.model_copy(update=settings)
    return config.model_copy(update={"wire": wire})


def sent(recipe, theta, config, layout=None):
    masks = masks_of(recipe, theta, layout)
    payload = encode_task(cast_theta(theta, wire_of(config), recipe.round), recipe, masks)
    blank = {name: torch.empty(value.shape, device="meta") for name, value in theta.items()}
    if not recipe.whole():
        pruning = config.pruning.model_copy(update={"kind": recipe.kind})
        config = config.model_copy(update={"pruning": pruning})
    return payload, decode_task(payload, blank, layout, wire_of(config))


@given(
    kind=st.sampled_from(("full", "random", "topk", "balanced")),
    keep=st.floats(0.05, 1.0),
    scope=st.sampled_from(SCOPES),
    client=st.integers(0, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
)
@settings(max_examples=60)
def test_a_task_decodes_to_theta_under_the_mask(kind, keep, scope, client, dtype):
    recipe = recipe_of(kind, keep, scope=scope, client=client, end=2**31)
    masks = masks_of(recipe, THETA)
    _, (got_recipe, got_masks, values) = sent(recipe, THETA, wired(PLAIN, down=dtype))
    assert got_recipe == recipe
    assert got_masks == masks
    for name, value in THETA.items():
        dense = mask_of(masks, name, value).dense()
        kept = value * dense
        assert float((values[name] - kept).abs().max()) <= WITHIN[dtype] * float(value.abs().max())
        assert bool((values[name][~dense] == 0).all())


@given(
    choice=st.sampled_from(channels.CHOICES[:3]),
    keep=st.floats(0.3, 1.0),
    client=st.integers(0, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
    scale=st.sampled_from(("tensor", "channel")),
)
@settings(max_examples=40)
def test_a_task_with_channels_decodes_to_the_small_network(choice, keep, client, dtype, scale):
    recipe = recipe_of("channels", keep, choice=choice, client=client, round=1)
    config = wired(CHANNELS, down=dtype, scale=scale)
    payload, (_, masks, values) = sent(recipe, UNET, config, LAYOUT)
    for name, value in UNET.items():
        block = masks.get(name)
        # independently: the rows and columns, by indexing
        small = value
        for dimension, runs in enumerate(block.runs if block else ()):
            index = [i for start, stop in runs for i in range(start, stop)]
            small = small.index_select(dimension, torch.tensor(index))
        assert values[name].shape == small.shape
        assert payload.arrays[name].shape == small.shape
        largest = float((values[name] - small).abs().max())
        assert largest <= WITHIN[dtype] * float(value.abs().max())


@given(
    kind=st.sampled_from(("full", "random", "channels")),
    dtype=st.sampled_from(sorted(DTYPES)),
    differences=st.booleans(),
)
@settings(max_examples=40)
def test_an_update_decodes_to_what_training_made_of_theta(kind, dtype, differences):
    recipe = recipe_of(kind, 0.6, round=1, client=2)
    config = CHANNELS if kind == "channels" else PLAIN
    config = wired(config, up=dtype, differences=differences)
    _, (_, masks, start) = sent(recipe, UNET, config, LAYOUT)
    end = {name: value * 1.5 for name, value in start.items()}
    arrays = encode_update(end, start, masks, wire_of(config), 1, 2)
    decoded = decode_update(arrays, UNET, masks, wire_of(config))
    for name, value in end.items():
        got = decoded[name]
        if kind == "random" and name in masks:
            value = value[masks[name].dense()]
        # a difference is a third of the value, and so is its rounding error
        largest = float(value.abs().max()) * (1 / 3 if differences else 1)
        assert float((got - value).abs().max()) <= (WITHIN[dtype] + 1e-6) * largest + 1e-7


@given(seed=st.integers(0, 1000), per_row=st.booleans())
@settings(max_examples=20)
def test_int8_rounding_is_right_on_average(seed, per_row):
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    stream = np.random.Philox(seed)
    drawn = torch.stack(
        [
            unpack("w", cast(values, "int8", per_row, stream).pack(), "int8", (3, 7), per_row)
            for _ in range(2000)
        ]
    )
    scale = values.abs().max() / 127
    # a rounding error has variance of at most scale^2 / 4: five of its standard errors
    assert float((drawn.mean(0) - values).abs().max()) < 5 * float(scale) / 2 / 2000**0.5


def test_int8_has_a_scale_for_every_row_or_one_for_all():
    values = torch.tensor([[1.0, -1.0], [100.0, 50.0], [0.0, 0.0]])
    rows = cast(values, "int8", True, np.random.Philox(0))
    assert rows.scales.tolist() == [float(np.float32(v / 127)) for v in (1, 100, 0)]
    assert len(rows.pack().data) == 3 * 4 + 6
    one = cast(values, "int8", False, np.random.Philox(0))
    assert (len(one.scales), len(one.pack().data)) == (1, 4 + 6)


def test_the_same_round_rounds_alike_for_every_client_and_no_two_rounds_alike():
    config = wired(PLAIN, down="int8")
    first, again, other = (cast_theta(UNET, wire_of(config), round) for round in (1, 1, 2))
    name = "enter.weight"
    assert torch.equal(first[name].codes, again[name].codes)
    assert not torch.equal(first[name].codes, other[name].codes)


def test_only_kept_values_cost_bytes_and_derivable_masks_none():
    random = recipe_of("random", 0.5)
    masks = masks_of(random, THETA)
    kept = int(masks["w"].dense().sum()) + 6
    # seven parts of every recipe, of which one is a name, and a name that random masks have
    keys = ["version", "kind", "keep", "seed", "round", "client", "needs_bits", "scope"]
    numbers = sum(len(f"recipe.{key}") for key in keys) + 6 * 8 + len("random") + len("weights")
    assert sent(random, THETA, PLAIN)[0].nbytes == 4 * kept + numbers
    assert sent(random, THETA, wired(PLAIN, down="bf16"))[0].nbytes == 2 * kept + numbers
    scales = 3 * 4
    assert sent(random, THETA, wired(PLAIN, down="int8"))[0].nbytes == kept + scales + numbers
    topk = recipe_of("topk", 0.4)
    numbers += len("topk") - len("random") + len("recipe.per") + len("tensor")
    bits = (35 + 7) // 8
    assert sent(topk, THETA, PLAIN)[0].nbytes == 4 * (14 + 6) + bits + numbers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe.kind": "topk"}, "kind = 'topk', and the run's is 'random'"),
        ({"recipe.kind": "os:getcwd"}, "kind = 'os:getcwd', and the run's is 'random'"),
        ({"recipe.needs_bits": 1}, "needs_bits = True is not random's"),
    ],
)
def test_a_recipe_of_another_family_than_the_configured_one_is_refused(change, says):
    payload, _ = sent(recipe_of("random", 0.5), THETA, PLAIN)
    with pytest.raises(RecipeError, match=says):
        decode_task(Payload(payload.arrays, payload.numbers | change), THETA, None, wire_of(PLAIN))


def test_a_list_of_groups_costs_eight_bytes_for_each():
    payload = Payload({}, {"recipe.groups": [1, 2, 3], "loss": 0.5})
    assert payload.nbytes == 8 * 3 + len("recipe.groups") + 8 + len("loss")


BAD = {
    "dtype": lambda a: a.update(w=Packed("float64", a["w"].shape, a["w"].data)),
    "bytes": lambda a: a.update(w=Packed("float32", a["w"].shape, a["w"].data[:-4])),
    "shape": lambda a: a.update(w=Packed("float32", (7, 5), a["w"].data)),
    "names differ": lambda a: a.pop("b"),
    "model's": lambda a: a.update(other=a["b"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_payload_that_does_not_fit_is_refused(case):
    arrays = encode_update(THETA, THETA, {}, wire_of(PLAIN), 1, 0)
    BAD[case](arrays)
    with pytest.raises(UpdateError, match=r"float32|not \(|differ"):
        decode_update(arrays, THETA, {}, wire_of(PLAIN))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_scale_is_refused(scale):
    config = wired(PLAIN, up="int8")
    arrays = encode_update(THETA, THETA, {}, wire_of(config), 1, 0)
    data = np.float32(scale).tobytes() + arrays["w"].data[4:]
    arrays["w"] = Packed("int8", arrays["w"].shape, data)
    with pytest.raises(UpdateError, match="w has scales"):
        decode_update(arrays, THETA, {}, wire_of(config))


def test_mask_bits_of_the_wrong_length_are_refused():
    recipe = recipe_of("topk", 0.5)
    payload, _ = sent(recipe, THETA, PLAIN)
    bits = payload.arrays["mask:w"]
    bad = payload.arrays | {"mask:w": Packed("bits", bits.shape, bits.data + b"\0")}
    with pytest.raises(UpdateError, match="mask bits for w"):
        decode_task(Payload(bad, payload.numbers), THETA, None, wire_of(TOPK))


def test_bits_that_disagree_with_the_recipe_are_refused():
    payload, _ = sent(recipe_of("topk", 0.5), THETA, TOPK)
    for keep, bits in ((0.5, b"\xff" * 5), (0.25, payload.arrays["mask:w"].data)):
        numbers = recipe_of("topk", keep).to_metrics()
        arrays = payload.arrays | {"mask:w": Packed("bits", (5, 7), bits)}
        with pytest.raises(RecipeError, match=r"the bits keep \d+ of 35 in w"):
            decode_task(Payload(arrays, numbers), THETA, None, wire_of(TOPK))
    without = {name: array for name, array in payload.arrays.items() if name != "mask:w"}
    with pytest.raises(RecipeError, match=r"not for the tensors that it masks.*\['w'\]"):
        decode_task(Payload(without, payload.numbers), THETA, None, wire_of(TOPK))


@given(data=st.data())
def test_a_block_takes_and_puts_back_what_indexing_would(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    kept = [sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))) for size in shape]
    runs = tuple(tuple((i, i + 1) for i in indices) for indices in kept)
    block = Block(tuple(shape), runs)
    whole = torch.randn(shape)
    expected = whole.numpy()[np.ix_(*kept)]
    np.testing.assert_array_equal(block.take(whole).numpy(), expected)
    assert block.count() == expected.size
    dense = np.zeros(shape, bool)
    dense[np.ix_(*kept)] = True
    np.testing.assert_array_equal(block.dense().numpy(), dense)
    back = block.put(torch.from_numpy(expected), torch.zeros(shape))
    np.testing.assert_array_equal(back.numpy(), np.where(dense, whole.numpy(), 0))
