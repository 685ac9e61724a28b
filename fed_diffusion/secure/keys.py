"""Keys, sealed messages and pseudorandom streams; all of it by the package `cryptography`.

Every secret begins in the operating system's entropy, and none follows from the run's seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SIZE = 32
"""Bytes of every key, seed and digest."""
NONCE, TAG = 12, 16
SEALED = NONCE + TAG
"""Bytes that a sealed message has more than what is in it."""
WORDS = 1 << 15
"""Words of a stream that are made at once: 256 KiB stay in cache."""
_ZEROS = bytes(8 * WORDS)


class SealBroken(ValueError):
    """A sealed message was not made with this key for this purpose, or it was changed."""


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair.

    Attributes
    ----------
    private, public
        Raw bytes, 32 each.
    """

    private: bytes
    public: bytes

    @classmethod
    def new(cls) -> KeyPair:
        """A fresh pair, from the operating system's entropy."""
        return cls.of(fresh())

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        """The pair that a private key belongs to."""
        key = X25519PrivateKey.from_private_bytes(private)
        return cls(private, key.public_key().public_bytes_raw())

    def agree(self, public: bytes, about: bytes) -> bytes:
        """The key that this pair and another one share, for one purpose.

        Raises
        ------
        ValueError
            The public key is none, or of small order, so that nothing would be shared.
        """
        key = X25519PrivateKey.from_private_bytes(self.private)
        return derived(key.exchange(X25519PublicKey.from_public_bytes(public)), about)


def fresh() -> bytes:
    """A secret of 32 bytes from the operating system's entropy."""
    return os.urandom(SIZE)


def digest(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def derived(key: bytes, about: bytes) -> bytes:
    """Another key, for one purpose: HKDF with SHA-256; it tells nothing of the first."""
    return HKDF(algorithm=SHA256(), length=SIZE, salt=None, info=about).derive(key)


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate by AES-256-GCM, under a fresh nonce that stands in front."""
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The inverse of `seal`; raises `SealBroken`."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except (InvalidTag, ValueError) as error:
        raise SealBroken("a sealed message cannot be opened") from error


class Stream:
    """ChaCha20 as numbers of Z_2^64, which follow from a key that is used for nothing else.

    One stream has one key, so that its nonce can be constant.
    """

    def __init__(self, key: bytes):
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._buffer = bytearray(8 * WORDS)

    def words(self, count: int) -> np.ndarray:
        """Return the next numbers, uint64, at most `WORDS` of them; the next call overwrites them.

        Their memory is taken once: that is a sixth of the time of a stream.
        """
        self._encryptor.update_into(memoryview(_ZEROS)[: 8 * count], self._buffer)
        return np.frombuffer(self._buffer, "<u8", count)

    def add_to(
        self, vector: np.ndarray, where: np.ndarray | None = None, minus: bool = False
    ) -> None:
        """Add the next numbers to a vector, or subtract them.

        Parameters
        ----------
        vector
            uint64, contiguous, of one dimension; changed in place, modulo 2^64.
        where
            Bools of its length: only these places get a number. None means all.
        minus
            Whether to subtract.
        """
        operation = np.subtract if minus else np.add
        for start in range(0, len(vector), WORDS):
            part = vector[start : start + WORDS]
            if where is None:
                operation(part, self.words(len(part)), out=part)
                continue
            places = np.flatnonzero(where[start : start + WORDS])
            part[places] = operation(part[places], self.words(len(places)))

    def add_to_each(
        self, vectors: Iterable[np.ndarray], where: np.ndarray | None, minus: bool
    ) -> None:
        """Add the next numbers to one vector after another; see `add_to`."""
        for vector in vectors:
            self.add_to(vector, where, minus)
