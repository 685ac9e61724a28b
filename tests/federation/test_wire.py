"""What travels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.federation.aggregate import UpdateError
from fed_diffusion.federation.wire import (
    Packed,
    Payload,
    decode_task,
    decode_values,
    encode_task,
    encode_values,
)
from fed_diffusion.masks.recipes import KINDS, SCOPES, Recipe

THETA = {
    "w": torch.linspace(-1, 1, 35).reshape(5, 7),
    "b": torch.linspace(1, 2, 5),
    "scalar": torch.tensor(3.0),
}


@given(
    kind=st.sampled_from(KINDS),
    keep=st.floats(0.05, 1.0),
    scope=st.sampled_from(SCOPES),
    client=st.integers(0, 9),
)
@settings(max_examples=60)
def test_a_task_decodes_to_theta_under_the_mask(kind, keep, scope, client):
    recipe = Recipe(kind=kind, keep=keep, scope=scope, client=client)
    masks = recipe.mask(THETA)
    blank = {name: torch.empty_like(value) for name, value in THETA.items()}
    got_recipe, got_masks, values = decode_task(encode_task(THETA, recipe, masks), blank)
    assert got_recipe == recipe
    assert all(torch.equal(got_masks[name], masks[name]) for name in masks)
    for name, value in THETA.items():
        assert torch.equal(values[name], value * masks[name] if name in masks else value)


def test_only_kept_values_cost_bytes_and_derivable_masks_none():
    random = Recipe(kind="random", keep=0.5)
    masks = random.mask(THETA)
    kept = int(masks["w"].sum()) + 6
    numbers = sum(8 + len(key) for key in random.to_metrics())
    assert encode_task(THETA, random, masks).nbytes == 4 * kept + numbers
    topk = Recipe(kind="topk", keep=0.4)
    bits = (35 + 7) // 8
    assert encode_task(THETA, topk, topk.mask(THETA)).nbytes == 4 * (14 + 6) + bits + numbers


BAD = {
    "dtype": lambda a: a.update(w=Packed("float64", a["w"].shape, a["w"].data)),
    "bytes": lambda a: a.update(w=Packed("float32", a["w"].shape, a["w"].data[:-4])),
    "shape": lambda a: a.update(w=Packed("float32", (7, 5), a["w"].data)),
    "names differ": lambda a: a.pop("b"),
    "model's": lambda a: a.update(other=a["b"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_payload_that_does_not_fit_is_refused(case):
    arrays = encode_values(THETA, {})
    BAD[case](arrays)
    with pytest.raises(UpdateError, match=r"float32|not \(|differ"):
        decode_values(arrays, {n: v.shape for n, v in THETA.items()}, {})


def test_mask_bits_of_the_wrong_length_are_refused():
    recipe = Recipe(kind="topk", keep=0.5)
    payload = encode_task(THETA, recipe, recipe.mask(THETA))
    bits = payload.arrays["mask:w"]
    bad = payload.arrays | {"mask:w": Packed("bits", bits.shape, bits.data + b"\0")}
    with pytest.raises(UpdateError, match="mask bits for w"):
        decode_task(Payload(bad, payload.numbers), THETA)
