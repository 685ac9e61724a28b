"""What travels: payloads as records and back, and an index that is not trusted."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord

from client_app.messages import VALUES, to_records, to_update
from fed_diffusion.protocol.codecs import unpack
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import Packed, Payload

VECTOR = torch.arange(3.0)
ARRAYS = {
    "bits": Packed("bits", (3,), b"\x05"),
    "a": Packed("float32", (3,), VECTOR.numpy().tobytes()),
    "none": Packed("float32", (0,), b""),
    "b.c": Packed("int8", (2, 1), b"\x00\x00\x80\x3f\x01\x02"),
}


def content():
    return to_records(Update(3, 7, Payload(dict(ARRAYS), {"loss": 0.5, "drawn": [1, 2]})))


def test_a_payload_comes_back_as_it_was_sent():
    update = to_update(content())
    assert (update.round, update.client) == (3, 7)
    assert update.payload.numbers == {"loss": 0.5, "drawn": [1, 2]}
    assert update.payload.arrays == ARRAYS
    assert update.payload.nbytes == Payload(ARRAYS, {"loss": 0.5, "drawn": [1, 2]}).nbytes
    values = unpack("a", update.payload.arrays["a"], "fp32", (3,), False)
    assert torch.equal(values, VECTOR)
    assert values.data_ptr() % 4 == 0  # where it lies, behind a single byte


def test_all_values_of_a_message_are_one_array_for_flower():
    assert list(content()["arrays"]) == [VALUES]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([["a", "float32", [3], 4]], "index is of 8 bytes, and 32 are sent"),
        ([["a", "float32", [3], 48], ["b", "float32", [3], -8]], "not a whole number"),
        ([["a", "float32", [3], 20], ["a", "float32", [3], 16]], "twice"),
        ([["a", "float32", [3], True]], "not a whole number"),
        ([["a", "float32", [3.0], 40]], "not a whole number"),
        ([["a", "float32", "3", 40]], "not of the form"),
        ([["a", "float32", 40]], "cannot be read"),
        ({"a": 40}, "cannot be read"),
        (40, "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_to_the_byte_is_refused(index, words):
    tampered = content()
    tampered["about"]["index"] = index if isinstance(index, str) else json.dumps(index)
    with pytest.raises(UpdateError, match=words):
        to_update(tampered)


@pytest.mark.parametrize("change", ["no index", "a number", "no values", "another stype"])
def test_what_is_no_message_of_this_app_is_refused(change):
    tampered = content()
    if change == "no index":
        del tampered["about"]["index"]
    elif change == "a number":
        tampered["about"]["index"] = 5
    elif change == "no values":
        tampered["arrays"] = ArrayRecord()
    else:
        array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=b"1")
        tampered["arrays"] = ArrayRecord({VALUES: array})
    with pytest.raises(UpdateError, match=r"not a message|stype"):
        to_update(tampered)
