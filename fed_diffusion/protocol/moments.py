"""Adam's state between rounds (local.state: shared): its names, and what travels of it.

The state of a run is a mapping like theta. Of every tensor of theta it holds the first moment, the
second moment and the number of steps behind them, each shaped like the tensor: under masks
coordinates differ in how often they were trained. The moments travel both ways. The counts travel
towards the client alone, as the server knows how many steps a client takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox
from fed_diffusion.config.schema import LocalConfig
from fed_diffusion.masks.mask import Mask, Masks, mask_of
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.moment_codecs import Moment, bounded, unpack_moment

FIRST, SECOND, STEPS = "moment1:", "moment2:", "steps:"
PREFIXES = (FIRST, SECOND, STEPS)
MOST_STEPS = 2.0**24
"""Above this float32 no longer counts by ones; both bias corrections are 1 long before."""
TABLE = 256
"""The number of different counts of a tensor up to which each count is sent as one byte."""


def is_shared(local: LocalConfig) -> bool:
    """Whether the optimiser's state outlives the round."""
    return local.state == "shared"


def blank(theta: Mapping[str, Tensor], local: LocalConfig) -> dict[str, Tensor]:
    """The state before the first round; nothing where every round begins with a fresh one."""
    if not is_shared(local):
        return {}
    return {p + n: torch.zeros(v.shape) for p in PREFIXES for n, v in theta.items()}


def parameter_of(name: str) -> str:
    """Return the tensor of theta that a tensor of the state belongs to; theta's own name stays."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def spread(masks: Masks, names: Mapping[str, Tensor]) -> dict[str, Mask]:
    """Return masks of theta, with the same masks under the names of the state."""
    return {n: masks[parameter_of(n)] for n in names if parameter_of(n) in masks}


def group(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return one kind of state, by theta's names."""
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def parted(whole: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return theta and the state of a mapping that holds both."""
    state = {n: v for n, v in whole.items() if n.startswith(PREFIXES)}
    return {n: v for n, v in whole.items() if n not in state}, state


def grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the state as a checkpoint holds it: a file of each kind."""
    return {p.removesuffix(":"): group(state, p) for p in PREFIXES} if state else {}


def ungrouped(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Undo `grouped`, for all that a checkpoint holds."""
    return {p + n: v for p in PREFIXES for n, v in files.get(p.removesuffix(":"), {}).items()}


# --- towards the client -------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Step counts as they travel: one for all that is kept, or a table and a byte for each.

    Attributes
    ----------
    codes
        The counts, float32.
    """

    codes: Tensor

    def take(self, mask: Mask) -> Counts:
        """Return only what a mask keeps."""
        return Counts(mask.take(self.codes))

    def pack(self) -> Packed:
        """Return the bytes that travel."""
        values = self.codes.contiguous().numpy()
        if not values.size or values.min() == values.max():
            return Packed("float32", (), values.ravel()[:1].tobytes() or bytes(4))
        table, places = np.unique(values, return_inverse=True)
        if len(table) > TABLE:
            return Packed("float32", values.shape, values.tobytes())
        return Packed("counts", values.shape, table.tobytes() + places.astype(np.uint8).tobytes())


def unpack_counts(name: str, packed: Packed, expected: tuple[int, ...]) -> Tensor:
    """Return step counts, of no dimension where one count holds for all of the tensor.

    Raises
    ------
    UpdateError
        The bytes do not have the form of `Counts`.
    """
    size, length = math.prod(expected), len(packed.data)
    if packed.shape == () and packed.dtype == "float32" and length == 4:
        found = np.frombuffer(packed.data, np.float32).reshape(())
    elif packed.shape == expected and packed.dtype == "float32" and length == 4 * size:
        found = np.frombuffer(packed.data, np.float32).reshape(expected)
    elif packed.shape == expected and packed.dtype == "counts" and (length - size) in _TABLES:
        table = np.frombuffer(packed.data[: length - size], np.float32)
        places = np.frombuffer(packed.data[length - size :], np.uint8)
        if int(places.max()) >= len(table):
            raise UpdateError(f"{name} has counts beyond its table")
        found = table[places].reshape(expected)
    else:
        raise UpdateError(
            f"{name} is sent as {packed.dtype} {packed.shape} of {length} bytes: not counts of "
            f"{expected}"
        )
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise UpdateError(f"{name} has counts that are negative or not finite")
    return torch.from_numpy(found.copy())


_TABLES = range(4, 4 * TABLE + 1, 4)


@dataclass(frozen=True)
class Outgoing:
    """One moment of a tensor on its way to clients; clients that keep the same get the same bits.

    Attributes
    ----------
    key
        The key of the stream that the rounding is drawn from.
    """

    moment: Moment
    key: tuple[int, Purpose, int, int]

    @property
    def codes(self) -> Tensor:
        """The values of the moment, shaped like the tensor."""
        return self.moment.codes

    def take(self, mask: Mask) -> Outgoing:
        """Return only what a mask keeps."""
        return Outgoing(self.moment.take(mask), self.key)

    def pack(self) -> Packed:
        """Return the bytes that travel."""
        return self.moment.pack(philox(*self.key))


def cast_state(
    state: Mapping[str, Tensor], dtype: str, seed: int, round: int
) -> dict[str, Outgoing | Counts]:
    """Return the state as it travels to clients, made once a round for all of them.

    Parameters
    ----------
    dtype
        The format of the moments, as in wire.state.
    seed
        The run's seed, which the rounding starts from.
    """
    found: dict[str, Outgoing | Counts] = {}
    for place, (name, value) in enumerate(state.items()):
        if name.startswith(STEPS):
            found[name] = Counts(value)
        else:
            key = seed, Purpose.ROUNDING_STATE_DOWN, round, place
            found[name] = Outgoing(_moment(name, value, value.dim() > 1, dtype), key)
    return found


def _moment(name: str, values: Tensor, wide: bool, dtype: str) -> Moment:
    return Moment(values, dtype, name.startswith(SECOND), wide)


def decode_state(
    arrays: Mapping[str, Packed],
    theta: Mapping[str, Tensor],
    masks: Masks,
    local: LocalConfig,
    dtype: str,
) -> dict[str, Tensor]:
    """Return the state that a client was sent, as it holds theta; counts may have no dimension.

    Raises
    ------
    UpdateError
        Names, types, shapes or values are such as no server sends.
    """
    if not is_shared(local):
        return {}
    held = {
        name: mask_of(masks, parameter_of(name), theta[parameter_of(name)]).hold(kept)
        for name, kept in decode_moments(arrays, theta, masks, dtype).items()
    }
    for name, whole in theta.items():
        mask, key = mask_of(masks, name, whole), STEPS + name
        if key not in arrays:
            raise UpdateError(f"{key} is missing")
        counts = unpack_counts(key, arrays[key], mask.kept)
        held[key] = mask.hold(counts) if counts.dim() else counts
    return held


# --- towards the server -------------------------------------------------------------------------


def encode_moments(
    moments: Mapping[str, Tensor], masks: Masks, dtype: str, seed: int, round: int, client: int
) -> dict[str, Packed]:
    """Return what training made of the kept moments, in a format as in wire.state."""
    stream = philox(seed, Purpose.ROUNDING_STATE, round, client)
    packed = {}
    for name, value in moments.items():
        held = value.detach().to("cpu", torch.float32)
        kept = mask_of(masks, parameter_of(name), held).release(held)
        packed[name] = _moment(name, kept, held.dim() > 1, dtype).pack(stream)
    return packed


def decode_moments(
    arrays: Mapping[str, Packed], theta: Mapping[str, Tensor], masks: Masks, dtype: str
) -> dict[str, Tensor]:
    """Return both moments of every tensor, as far as its mask keeps them.

    Raises
    ------
    UpdateError
        A name, type, shape or length that the recipe does not imply, or a second moment that is
        negative or not a number.
    """
    found = {}
    for name, whole in theta.items():
        kept = mask_of(masks, name, whole).kept
        for prefix in (FIRST, SECOND):
            key = prefix + name
            if key not in arrays:
                raise UpdateError(f"{key} is missing, and local.state is shared")
            second, wide = prefix == SECOND, whole.dim() > 1
            found[key] = unpack_moment(key, arrays[key], dtype, second, wide, kept)
        if dtype != "fp32":
            found[FIRST + name] = bounded(found[FIRST + name], found[SECOND + name])
    return found
