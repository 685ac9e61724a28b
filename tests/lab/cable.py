"""A long thin cable between two network namespaces, for kernels without netem.

    cable.py NAMESPACE INTERFACE NAMESPACE INTERFACE MBIT MS

Two taps with this process between them. A frame waits until those before it have gone out at MBIT
each way, then MS; what finds a full buffer is lost, as in a router.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
BUFFER_S = 0.5
"""What a router of the last mile holds."""


def tap(namespace, name):
    """The file of a new interface of that name in a namespace."""
    os.chdir("/")
    with open(f"/run/netns/{namespace}") as target:
        _setns(target.fileno())
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def _setns(descriptor):
    if hasattr(os, "setns"):  # Python 3.12
        os.setns(descriptor, 0)
        return
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "setns")


class Way:
    """One direction of the cable."""

    def __init__(self, source, target, bits_per_s, delay_s):
        self._source, self._target = source, target
        self._bits_per_s, self._delay_s = bits_per_s, delay_s
        self._free = 0.0  # when the last frame is out
        self._under_way = deque()

    def take(self):
        """Frames that have come in."""
        now = time.monotonic()
        while True:
            try:
                frame = os.read(self._source, 65536)
            except OSError:
                return  # no more, or the interface is down
            if self._free - now > BUFFER_S:
                continue
            self._free = max(self._free, now) + len(frame) * 8 / self._bits_per_s
            self._under_way.append((self._free + self._delay_s, frame))

    def deliver(self):
        """Frames whose time has come; seconds until the next, None without one."""
        while self._under_way:
            due, frame = self._under_way[0]
            if (left := due - time.monotonic()) > 0:
                return left
            self._under_way.popleft()
            try:
                os.write(self._target, frame)
            except OSError:
                continue  # the interface is down
        return None


def main():
    space_1, name_1, space_2, name_2, mbit, ms = sys.argv[1:]
    one, two = tap(space_1, name_1), tap(space_2, name_2)
    print("there", flush=True)
    pace = float(mbit) * 1e6, float(ms) / 1e3
    ways = {one: Way(one, two, *pace), two: Way(two, one, *pace)}
    while True:
        waits = [left for way in ways.values() if (left := way.deliver()) is not None]
        ready, _, _ = select.select(list(ways), [], [], min(waits, default=None))
        for source in ready:
            ways[source].take()


if __name__ == "__main__":
    main()
