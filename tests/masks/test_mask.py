"""What a mask keeps of one tensor, whichever kind it is."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fed_diffusion
from fed_diffusion.masks.mask import (
    Block,
    Scattered,
    Whole,
    kept_fraction,
    kept_values,
    mask_of,
    pruning_error,
)


@st.composite
def masks(draw):
    """A mask of any kind with its bools, and a whole tensor for it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    kind = draw(st.sampled_from(("whole", "scattered", "block")))
    if kind == "whole":
        return Whole(shape), torch.ones(shape, dtype=torch.bool), whole
    if kind == "scattered":
        size = whole.numel()
        bools = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        return Scattered(bools.view(shape)), bools.view(shape), whole
    bools, runs = torch.ones(shape, dtype=torch.bool), []
    for dimension, size in enumerate(shape):
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        runs.append(((start, stop),))
        index = torch.arange(size).view([-1 if d == dimension else 1 for d in range(len(shape))])
        bools = bools & (start <= index) & (index < stop)
    return Block(shape, tuple(runs)), bools, whole


@given(made=masks())
def test_every_kind_takes_puts_adds_counts_and_drops_what_its_bools_say(made):
    mask, bools, whole = made
    zero = torch.zeros_like(whole)
    assert torch.equal(mask.dense(), bools)
    assert mask.shape == tuple(whole.shape)
    kept = mask.take(whole)
    assert tuple(kept.shape) == mask.kept
    assert kept.flatten().tolist() == whole[bools].tolist()
    assert mask.count() == kept.numel() == int(bools.sum())
    assert torch.equal(mask.put(kept, zero.clone()), whole * bools)
    assert torch.equal(mask.put(kept, whole.clone()), whole)
    assert torch.equal(mask.drop(whole), whole * ~bools)
    added = whole.clone()
    mask.add(kept, added)
    assert torch.equal(added, whole + whole * bools)
    for dtype, weight in ((torch.uint8, 1), (torch.uint8, 3), (torch.int32, 1), (torch.int64, 9)):
        counts = torch.ones(whole.shape, dtype=dtype)
        mask.add_to(counts, weight)
        assert torch.equal(counts, 1 + weight * bools.to(dtype))


@given(made=masks())
def test_what_a_worker_holds_is_small_or_has_zeros_where_the_mask_drops(made):
    mask, bools, whole = made
    held = mask.hold(mask.take(whole))
    assert torch.equal(held, mask.take(whole) if mask.shrinks else whole * bools)
    assert torch.equal(mask.release(held), mask.take(whole))
    assert mask.whole == isinstance(mask, Whole)
    assert mask.shrinks == isinstance(mask, Block)
    assert (mask.bools is not None) == isinstance(mask, Scattered)


@given(made=masks())
def test_taking_from_half_precision_takes_the_same_values(made):
    mask, bools, whole = made
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        assert mask.take(whole.to(dtype)).flatten().tolist() == whole.to(dtype)[bools].tolist()


def test_a_tensor_that_is_not_named_is_kept_whole():
    theta = {"a": torch.ones(3), "b": torch.full((2,), 2.0)}
    some = {"a": Scattered(torch.tensor([True, False, False]))}
    assert mask_of(some, "b", theta["b"]) == Whole((2,))
    assert {n: v.tolist() for n, v in kept_values(theta, some).items()} == {"a": [1], "b": [2, 2]}
    assert kept_fraction(some, theta) == pytest.approx(3 / 5)
    named = some | {"b": Whole((2,))}
    assert kept_fraction(named, theta) == kept_fraction(some, theta)
    assert pruning_error(named, theta) == pruning_error(some, theta) == pytest.approx(2)


def test_masks_are_equal_where_they_keep_the_same_in_the_same_way():
    one, other = torch.tensor([True, False]), torch.tensor([True, True])
    assert Scattered(one) == Scattered(one.clone())
    assert Scattered(one) != Scattered(other)
    assert Scattered(other) != Whole((2,)) != Block((2,), (((0, 2),),))
    assert Block((2,), (((0, 1),),)) == Block((2,), (((0, 1),),)) != Block((2,), (((1, 2),),))


def test_rows_are_those_that_are_kept_and_single_weights_leave_none():
    scales = torch.arange(4.0)
    assert Whole((4, 2)).rows(scales).tolist() == [0, 1, 2, 3]
    assert Block((4, 2), (((0, 1), (2, 4)), ((0, 1),))).rows(scales).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="use one scale"):
        Scattered(torch.ones(4, 2, dtype=torch.bool)).rows(scales)


def test_a_mask_of_single_weights_is_of_bools():
    with pytest.raises(TypeError, match=r"is a bool tensor, not torch\.float32"):
        Scattered(torch.ones(2))


def test_nothing_outside_the_room_of_masks_asks_which_kind_a_mask_is():
    package = Path(fed_diffusion.__file__).parent
    kinds = {"Mask", "Whole", "Scattered", "Block"}
    asking = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "masks"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("isinstance", "type")
        and kinds & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    ]
    assert asking == []
