"""Which clients each admitted node may host: the list that `fed-diffusion deploy init` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from fed_diffusion.config import ConfigError
from fed_diffusion.store.files import read_object

LIST = "FED_DIFFUSION_NODES"
"""The environment variable with the path of the list; superexec.sh sets it."""
FORM = (
    'it must be of the form {"NAME": {"key": "ecdsa-sha2-nistp384 AAAA...", "partition-id": 0, '
    '"num-partitions": 3}, ...}'
)


class Admitted:
    """What the server knows of its nodes by their keys, so that no node can take another's place.

    Parameters
    ----------
    places
        A node's public key -> its name, and the partition that it is of how many.
    """

    def __init__(self, path: Path, places: Mapping[bytes, tuple[str, int, int]]):
        self._path = path
        self._places = places

    @classmethod
    def of_environment(cls) -> Admitted | None:
        """Return the list that the environment names; None if it names none, as in a simulation.

        Raises
        ------
        ConfigError
            There is no such list, or it cannot be read.
        """
        given = os.environ.get(LIST)
        if not given:
            return None
        path = Path(given)
        try:
            listed = read_object(path).items()
            places = {_normal(str(it["key"]).encode()): _place(name, it) for name, it in listed}
        except FileNotFoundError:
            raise ConfigError(f"{LIST}: there is no file {path}.") from None
        except (KeyError, TypeError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{path} cannot be read as a list of nodes ({error!r}): {FORM}."
            ) from error
        if len(places) != len(listed):
            raise ConfigError(f"{path} lists a key twice; each node has its own.")
        return cls(path, places)

    def check(self, key: bytes, partition: int, of: int) -> None:
        """Refuse a node that says it is another node.

        Raises
        ------
        ValueError
            The node's key is not listed, or is listed with another partition.
        """
        place = self._places.get(_normal(key))
        if place is None:
            raise ValueError(f"its key is not in the server's {self._path.name}: add it there")
        name, *listed = place
        if listed != [partition, of]:
            raise ValueError(
                f"it says partition-id={partition} num-partitions={of}, and the server's "
                f"{self._path.name} has partition-id={listed[0]} num-partitions={listed[1]} for "
                f"{name}, whose key it has: mend its node.toml, or that list"
            )


def _place(name: str, listed: Mapping[str, object]) -> tuple[str, int, int]:
    numbers = [listed["partition-id"], listed["num-partitions"]]
    partition, of = (number for number in numbers if type(number) is int)
    if not 0 <= partition < max(of, 1):
        raise ValueError(f"{name}: partition-id is {partition} of {of}")
    return name, partition, of


def _normal(key: bytes) -> bytes:
    """Return a key in the same bytes, however it was written; other texts stay as they are."""
    for load in (load_ssh_public_key, load_pem_public_key):
        try:
            found = load(key)
        except (ValueError, UnsupportedAlgorithm):
            continue
        return found.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return key
