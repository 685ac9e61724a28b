"""The end of an attempt: secrets are put together of their shares, and all masks come off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.masks.mask import Masks
from fed_diffusion.secure.keys import SIZE, KeyPair, digest
from fed_diffusion.secure.masking import Openings, pair_key
from fed_diffusion.secure.plan import Plan
from fed_diffusion.secure.shamir import join
from fed_diffusion.secure.words import NUMBERS, Word, tensor_of


class Unopened(RuntimeError):
    """The sum of an attempt cannot be opened; the message says why."""


@dataclass
class Fault:
    """A member that did not keep to the protocol, and whether that is surely its own doing."""

    client: int
    reason: str
    surely: bool


@dataclass
class Sealed:
    """What a client has sent of its secrets.

    Attributes
    ----------
    packets
        Holder -> its shares, which nobody else can read.
    seeds
        Level -> the hash of the client's seed.
    hashes
        Holder -> the hash of each of its shares.
    """

    packets: dict[int, bytes]
    seeds: list[bytes]
    hashes: dict[int, bytes]


@dataclass
class Opening:
    """What the server has of an attempt when the last shares have come.

    Attributes
    ----------
    masks_of
        The masks of a client.
    sealed
        Those who shared masks -> what they have sent of their secrets.
    weights
        The clients whose vector is in the sums, with their weights.
    shares
        Holder -> owner -> the share that the holder gave, of what was asked of it.
    complaints
        Owner -> the holders that could not open what it has sealed for them, or found it wrong.
    sums
        The sums of all vectors by word, still masked.
    opened
        The level from which on own masks are opened.
    faults
        Who did not keep to the protocol; it is added to.
    numbers
        The sums of what the clients have measured, once they are opened, where they are summed.
    """

    plan: Plan
    openings: Openings
    masks_of: Callable[[int], Masks]
    sealed: Mapping[int, Sealed]
    weights: Mapping[int, int]
    shares: Mapping[int, Mapping[int, bytes]]
    complaints: Mapping[int, set[int]]
    sums: Mapping[Word, Tensor]
    opened: int
    faults: list[Fault]
    numbers: Tensor | None = None
    _wrong: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Holder -> owners whose share it has not given as it was made."""
    _problems: list[str] = field(default_factory=list)

    def into(
        self,
        mean: MaskedMean | PrivateMean,
        known: Callable[[int, Masks], None] = lambda client, masks: None,
    ) -> int:
        """Take all masks off the sums, and put these into an empty mean; it counts who is in it.

        Parameters
        ----------
        known
            A function that adds to the mean what the server knows of a client by itself, under the
            client's masks without what stays hidden.

        Returns
        -------
        int
            How many coordinates that somebody has trained stay hidden, and keep theta_r.

        Raises
        ------
        Unopened
            Some secret cannot be put together; nothing has been put into the mean.
        """
        seeds = {client: self._seed(client) for client in sorted(self.weights)}
        lost = sorted(self.sealed.keys() - self.weights.keys())
        pairs = {client: self._pair(client) for client in lost}
        named = {fault.client for fault in self.faults}
        for holder in self._wrong.keys() - named:
            owners = self._wrong[holder][:5]
            reason = f"its shares of the secrets of clients {owners} are not those it was given"
            self.faults.append(Fault(holder, reason, surely=True))
        if self._problems:
            raise Unopened(self._problems[0])
        trained = Coverage(self.openings.theta, len(self.plan.members))
        hidden = self.openings.hidden(self.opened)
        for client, seed in seeds.items():
            masks = self.unmask(client, seed, pairs)
            trained.add(masks)
            masks = self.openings.without(masks, hidden)
            mean.coverage.add(masks, self.weights[client])
            known(client, masks)
        for word, sums in self.sums.items():
            if (cover := hidden.get(tensor_of(word))) is not None:
                sums[cover] = 0
            if word[0] == NUMBERS:
                self.numbers = sums
            else:
                mean.fill(word[0], sums, word[1])
        if not hidden:
            return 0
        counts = trained.counts()
        return sum(int((counts[name][cover] > 0).sum()) for name, cover in hidden.items())

    def unmask(self, client: int, seed: bytes, pairs: Mapping[int, KeyPair]) -> Masks:
        """Take off the sums what hid one client's vector; return the client's masks.

        Parameters
        ----------
        seed
            Of its own mask, at level `opened`.
        pairs
            Lost client -> its key pair.
        """
        plan, masks = self.plan, self.masks_of(client)
        part = self.openings.of(masks)
        vector = part.blank()
        part.add_own(vector, seed, self.opened, minus=True)
        for gone in set(plan.neighbours[client]) & pairs.keys():
            key = pair_key(pairs[gone], plan.by_client[client].pair, plan, client, gone)
            # the client has added it where the lost one's number is higher
            part.add_pair(vector, self.masks_of(gone), key, minus=gone > client)
        part.scatter(vector, self.sums)
        return masks

    def _seed(self, client: int) -> bytes:
        expected = self.sealed[client].seeds[self.opened]
        return self._secret(client, 1 + self.opened, lambda it: digest(it) == expected)

    def _pair(self, client: int) -> KeyPair:
        public = self.plan.by_client[client].pair
        return KeyPair.of(self._secret(client, 0, lambda it: KeyPair.of(it).public == public))

    def _secret(self, owner: int, place: int, fits: Callable[[bytes], bool]) -> bytes:
        """Return a secret of a client, of the shares whose hash the client has sent.

        Where it cannot be put together, the reason is noted, and zeros are returned.
        """
        plan, sealed, complaints = self.plan, self.sealed[owner], self.complaints.get(owner, set())
        holders, needed, right = plan.holders(owner), plan.needed(owner), {}
        given = [holder for holder in holders if owner in self.shares.get(holder, {})]
        for holder in given:
            share = self.shares[holder][owner]
            if digest(share) == sealed.hashes[holder][SIZE * place :][:SIZE]:
                right[1 + holders.index(holder)] = share
            elif holder not in complaints:  # it has said that it was right
                self._wrong[holder].append(owner)
        if len(right) >= needed:
            secret = join(right, needed)
            if secret is not None and fits(secret):
                return secret
            reason = "the shares that it made of its secrets do not give them"
            self.faults.append(Fault(owner, reason, surely=True))
        elif complaints:
            what = "shares of no use"
            self.faults += disputed(owner, complaints, len(holders) - 1, what)
        self._problems.append(
            f"{needed} shares of client {owner}'s secrets are needed, and of {len(holders)} "
            f"holders {len(given)} have given theirs, {len(right)} of them as they were made "
            "(secure.threshold)"
        )
        return bytes(SIZE)


def disputed(owner: int, complaints: set[int], others: int, what: str) -> list[Fault]:
    """Name a client that its neighbours complain of, and where it may be otherwise, them as well.

    Of two that say the opposite nobody knows who is right; most of the neighbours are believed.

    Parameters
    ----------
    complaints
        Those who complain, of so many `others`.
    what
        What each of them says that it got.
    """
    surely = len(complaints) >= 2 and 2 * len(complaints) > others
    who = sorted(complaints)
    found = [Fault(owner, f"clients {who[:5]} say that they got {what} from it", surely)]
    if not surely:
        found += [Fault(one, f"it says that it got {what} from {owner}", False) for one in who]
    return found
