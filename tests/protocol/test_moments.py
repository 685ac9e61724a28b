"""The state of Adam on the wire."""

import pytest
import torch

from fed_diffusion.masks.mask import Scattered, Whole
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.moments import Counts, unpack_counts


@pytest.mark.parametrize(
    ("values", "size"),
    [
        (torch.full((6, 50), 40.0), 4),
        (torch.arange(300.0).view(6, 50) % 3, 3 * 4 + 300),
        (torch.arange(300.0).view(6, 50) / 7, 4 * 300),
        (torch.zeros(0), 4),
    ],
)
def test_step_counts_arrive_as_they_were_in_as_few_bytes_as_they_need(values, size):
    packed = Counts(values).pack()
    assert len(packed.data) == size
    found = unpack_counts("steps:w", packed, tuple(values.shape))
    assert torch.equal(found.expand(values.shape), values)
    assert found.dim() == (0 if size == 4 else 2)


def test_of_step_counts_only_those_that_the_mask_keeps_are_sent():
    values = torch.tensor([[0.0, 10.0], [10.0, 20.0]])
    keep = Scattered(torch.tensor([[False, True], [True, False]]))
    assert len(Counts(values).take(keep).pack().data) == 4
    assert Counts(values).take(Whole((2, 2))).pack().shape == (2, 2)


@pytest.mark.parametrize(
    "packed",
    [
        Packed("float32", (), bytes(8)),
        Packed("float32", (3,), bytes(8)),
        Packed("float32", (2,), b"\0\0\xc0\x7f" * 2),
        Packed("float32", (), b"\0\0\x80\xbf"),
        Packed("counts", (2,), bytes(4) + b"\0\1"),
        Packed("counts", (2,), bytes(2)),
        Packed("counts", (2,), bytes(4 * 257) + bytes(2)),
        Packed("int8", (2,), bytes(6)),
    ],
)
def test_counts_that_no_server_sends_are_refused(packed):
    with pytest.raises(UpdateError, match="steps:w"):
        unpack_counts("steps:w", packed, (2,))
