"""The state of Adam on the wire."""

import numpy as np
import pytest
import torch

from fed_diffusion.masks.mask import Scattered, Whole
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.moment_codecs import Moment, bounded, unpack_moment
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


def moments(count, seed=0):
    """A first and a second moment as Adam would have them, of very unequal magnitudes."""
    draw = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.empty(-(-count // 100)).uniform_(-9, -2, generator=draw)
    scale = scale.repeat_interleave(100)[:count]
    first = torch.randn(count, generator=draw) * scale
    return first, torch.rand(count, generator=draw) * scale.square()


def there_and_back(values, form, second, wide, stream=None):
    packed = Moment(values, form, second, wide).pack(stream or np.random.Philox(1))
    found = unpack_moment("moment:w", packed, form, second, wide, tuple(values.shape))
    return found, len(packed.data)


@pytest.mark.parametrize("count", [0, 1, 31, 64, 65, 3000])
@pytest.mark.parametrize("second", [False, True])
def test_moments_in_fp32_arrive_as_they_were(count, second):
    values = moments(count)[int(second)]
    found, size = there_and_back(values, "fp32", second, True)
    assert torch.equal(found, values)
    assert size == 4 * count


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 3000])
def test_a_first_moment_in_few_bits_is_rounded_to_a_neighbour_and_right_on_average(
    count,
):
    values = moments(count)[0]
    stream = np.random.Philox(2)
    found = torch.stack(
        [there_and_back(values, "int4", False, True, stream)[0] for _ in range(400)]
    )
    size = there_and_back(values, "int4", False, True)[1]
    assert size == 2 * -(-count // 64) + -(-count // 2)
    for start in range(0, count, 64):
        part = slice(start, start + 64)
        step = float(values[part].abs().max()) / 7 * 1.01  # scales are rounded up to bf16
        assert float((found[:, part] - values[part]).abs().max()) <= step
        mean = found[:, part].double().mean(0)
        assert float((mean - values[part]).abs().max()) <= 5 * step / 2 / 400**0.5


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 3000])
def test_a_second_moment_in_few_bits_is_the_mean_of_its_block_and_of_biases_its_own(count):
    values = moments(count)[1]
    found, size = there_and_back(values, "int4", True, True)
    assert size == 2 * -(-count // 8)
    for start in range(0, count, 8):
        part = slice(start, start + 8)
        expected = values[part].double().mean()
        torch.testing.assert_close(
            found[part].double(), expected.expand(found[part].shape), rtol=2**-8, atol=0
        )
    single, size = there_and_back(values, "int4", True, False)
    assert size == 2 * count
    torch.testing.assert_close(single, values, rtol=2**-8, atol=0)


def test_rounding_leaves_no_first_moment_over_a_second_of_nothing():
    first, second = torch.tensor([1.0, -1.0, 1e-9, 3.0]), torch.tensor([0.0, 1e-4, 1.0, 1.0])
    found = bounded(first, second)
    torch.testing.assert_close(found, torch.tensor([0.0, -0.073, 1e-9, 3.0]))


def test_moments_that_are_not_of_the_agreed_form_are_refused():
    form = "int4"
    values = torch.linspace(0.1, 1, 40)
    first = Moment(values, form, False, True).pack(np.random.Philox(1))
    second = Moment(values, form, True, True).pack(np.random.Philox(1))
    minus, infinite = (np.float32([x]).tobytes()[2:] for x in (-1, np.inf))
    for packed, is_second, reason in (
        (Packed(first.dtype, (40,), first.data[:-1]), False, "bytes"),
        (Packed("float32", (40,), values.numpy().tobytes()), False, "sent as float32"),
        (Packed(first.dtype, (40,), minus + first.data[2:]), False, "scales that are negative"),
        (Packed(second.dtype, (40,), infinite + second.data[2:]), True, "not finite"),
        (Packed(second.dtype, (40,), minus + second.data[2:]), True, "values that are negative"),
        (Packed(second.dtype, (8, 5), second.data), True, "not bfloat16"),
    ):
        with pytest.raises(UpdateError, match=reason):
            unpack_moment("moment:w", packed, form, is_second, True, (40,))
