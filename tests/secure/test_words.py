"""The whole numbers that a client sends in the place of its update and of what it has measured."""

import pytest
import torch

from fed_diffusion.aggregation.stateful import LEVELS, parts_of
from fed_diffusion.protocol.errors import DivergedError, UpdateError
from fed_diffusion.secure.words import means_of, summed_numbers, tensor_of, words_of

SAID = {"loss": 0.75, "holdout_loss": 0.5, "images": 300, "examples": 9, "seconds": 1.5}


def test_the_parts_of_a_value_hold_all_of_its_bits_however_small_it_is():
    values = torch.tensor([1.0, -3e-13, 2.0**-100 * 1.7, 2.0**-126, 2.0**-149, 0.0, 63.9])
    parts = parts_of(values)
    assert len(parts) == LEVELS
    total = sum(part.double() / 2.0 ** (46 * level) for level, part in enumerate(parts))
    assert torch.equal(total.float(), values)
    fixed = [part.double() * 2**40 for part in parts]
    assert all(torch.equal(whole, whole.round()) for whole in fixed)


def test_shared_state_has_all_parts_of_every_value_side_by_side():
    theta = {"a": torch.zeros(2), "b": torch.zeros(3)}
    words = words_of(theta, shared=True)
    assert len(set(words)) == len(words) == 2 * 3 * LEVELS
    assert [tensor_of(word) for word in words] == ["a"] * 12 + ["b"] * 12
    assert words_of(theta, shared=False) == [("a", 0), ("b", 0)]


def test_what_clients_have_measured_comes_out_as_means_and_held_out_losses_where_all_keep_all():
    others = {**SAID, "loss": 0.25, "images": 100, "seconds": 2.5}
    sums = torch.from_numpy(summed_numbers(SAID, True, 2) + summed_numbers(others, True, 2))
    assert means_of(sums, 2) == (0.5, 0.5, 400, 2.0)
    hidden = torch.from_numpy(summed_numbers(SAID, False, 2))
    assert means_of(hidden, 1) == (0.75, None, 300, 1.5)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("loss", float("nan"), DivergedError),
        ("loss", 2.0**22, DivergedError),
        ("images", -1, UpdateError),
        ("seconds", float("inf"), UpdateError),
    ],
)
def test_a_measurement_beyond_its_share_is_refused(key, value, kind):
    with pytest.raises(kind):
        summed_numbers({**SAID, key: value}, True, 2)
