"""One worker process per node that outlives the messages: torch, data and model stay loaded.

Flower's deployment engine starts a ClientApp process for every message. That process stays thin:
it hands the message over a Unix-domain socket to a process of the same user, which it starts where
there is none. What travels are lengths and Flower's own protobuf records; nothing is unpickled.

The worker ends when it was idle for `warm-seconds` of the node config (0: no worker at all), when
its SuperNode ends, when the ClientApp that waits for it is killed, and after a task that raised.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Context, RecordDict

IDLE_S = 600.0
"""The seconds that a worker waits for its next message before it ends and frees its memory."""
ROOT = Path(__file__).resolve().parents[1]
"""The folder of this code; Flower puts an app's hash into the path, so it marks a version too."""
TAKEN, STALE, DONE, RAISED = b"taken", b"stale", b"done", b"raised"
_LENGTH = struct.Struct("!Q")


def answer(kind: str, content: RecordDict, context: Context) -> RecordDict:
    """Return what work.py answers to a message; in a deployment the node's warm worker answers.

    In a simulation, the process that calls this is kept by Ray, and is itself the worker.
    """
    given = context.node_config.get("warm-seconds", IDLE_S)
    try:
        seconds = float(str(given))
    except ValueError:
        raise ValueError(f"warm-seconds = {given!r} in the node config is not a number") from None
    deployed = Path(sys.argv[0]).name == "flwr-clientapp" and hasattr(socket, "SO_PEERCRED")
    if deployed and seconds > 0:
        return hand_over(kind, content, context.node_id, context.node_config, seconds)
    from client_app import work

    return work.KINDS[kind](content, context.node_config)


# --- the thin side ------------------------------------------------------------------------------


def hand_over(
    kind: str,
    content: RecordDict,
    node_id: int,
    node_config: Mapping[str, object],
    seconds: float = IDLE_S,
) -> RecordDict:
    """Return the worker's answer; a worker for other code, another run or node config is replaced.

    Raises
    ------
    RuntimeError
        The task raised in the worker (with its traceback), or the worker died in it.
    """
    node = json.dumps(dict(node_config), sort_keys=True)
    about = content["about"]
    what = [str(ROOT), sys.executable, node, str(about["config"]), seconds]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest().encode()
    for _ in range(3):  # a stale one, one that ends as we call, and a new one
        with _connected(node_id, key, seconds) as connection:
            try:
                _send(connection, key)
                (taken,) = _receive(connection, 1)
            except OSError:
                continue
            if taken != TAKEN:
                _until_gone(connection)  # its memory is free then
                continue
            try:
                _send(connection, kind.encode(), node.encode(), _to_bytes(content))
                status, body = _receive(connection, 2)
            except OSError as error:
                raise RuntimeError(
                    "the node's worker process died in this task: was it killed, or is the "
                    "machine out of memory? The next task gets a new one."
                ) from error
            if status == RAISED:
                raise RuntimeError(body.decode(errors="replace"))
            return _from_bytes(body)
    raise RuntimeError(
        "the node's worker process does not start; the SuperNode's output says why. "
        "warm-seconds=0 in the node config does without it."
    )


@contextmanager
def _connected(node_id: int, key: bytes, seconds: float) -> Iterator[socket.socket]:
    """Return a connection to the node's worker, which is started where there is none."""
    with _private_folder() as folder, socket.socket(socket.AF_UNIX) as connection:
        path = f"/proc/self/fd/{folder}/{node_id}"  # as short as the system's limit wants it
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            _start(path, key, seconds)
            connection.connect(path)
        fcntl.flock(folder, fcntl.LOCK_UN)
        _check_peer(connection)
        yield connection


@contextmanager
def _private_folder() -> Iterator[int]:
    """Yield this user's folder of sockets, locked; other users cannot open the folder."""
    path = Path(tempfile.gettempdir()) / f"fed-diffusion-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise RuntimeError(f"{path} must be this user's and closed to others: remove it.")
        fcntl.flock(folder, fcntl.LOCK_EX)  # one at a time looks for a worker and starts it
        yield folder
    finally:
        os.close(folder)


def _start(path: str, key: bytes, seconds: float) -> None:
    """Start a worker on a socket that listens already: a connection waits until it is ready."""
    if os.path.lexists(path):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # of this code and not of what lies in the current folder (-P)
        command = [sys.executable, "-P", "-m", "client_app.warm"]
        command += [str(listener.fileno()), key.decode(), str(seconds), str(os.getppid())]
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def _until_gone(connection: socket.socket) -> None:
    while connection.recv(1):
        pass


# --- the worker ---------------------------------------------------------------------------------


def serve(listener: socket.socket, key: bytes, seconds: float, parent: int) -> None:
    """Answer one message after another until idle, orphaned or asked for by another key."""
    from client_app import work

    while True:
        ready, _, _ = select.select([listener.fileno(), parent], [], [], seconds)
        if parent in ready or not ready:
            return
        connection, _ = listener.accept()
        with connection:
            try:
                _check_peer(connection)
                if _receive(connection, 1) != [key]:
                    listener.close()
                    _send(connection, STALE)
                    os._exit(0)  # closes the connection last: nothing is held then
                _send(connection, TAKEN)
                kind, node, content = _receive(connection, 3)
            except OSError:
                continue  # it is gone already
            done = threading.Event()
            threading.Thread(target=_watch, args=(connection, done), daemon=True).start()
            try:
                reply = work.KINDS[kind.decode()](_from_bytes(content), json.loads(node))
                status, body = DONE, _to_bytes(reply)
            except Exception:  # whatever it is, it is the task's, and the ClientApp raises it
                status, body = RAISED, traceback.format_exc().encode()
            done.set()
            try:
                _send(connection, status, body)
            except OSError:
                continue
            if status == RAISED:
                return  # what state it has left here is not known


def _watch(connection: socket.socket, done: threading.Event) -> None:
    """End the task if its ClientApp was killed, as nobody waits for the task then."""
    try:
        while connection.recv(1):
            pass
    except OSError:
        pass
    if not done.is_set():
        os._exit(1)


def _check_peer(connection: socket.socket) -> None:
    """Raise unless the other end is a process of the same user."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise PermissionError(f"user {user} is at the other end of this node's socket")


def _send(connection: socket.socket, *parts: bytes) -> None:
    for part in parts:
        connection.sendall(_LENGTH.pack(len(part)))
        connection.sendall(part)


def _receive(connection: socket.socket, count: int) -> list[bytes]:
    """Return so many parts; raise `ConnectionError` if the other end is gone before their end."""
    parts = []
    for _ in range(count):
        (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
        parts.append(_exactly(connection, length))
    return parts


def _exactly(connection: socket.socket, length: int) -> bytes:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        if not (count := connection.recv_into(view)):
            raise ConnectionError("the other end is gone")
        view = view[count:]
    return bytes(buffer)


def _to_bytes(content: RecordDict) -> bytes:
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(content).SerializeToString()


def _from_bytes(data: bytes) -> RecordDict:
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    return recorddict_from_proto(Proto.FromString(data))


if __name__ == "__main__":
    _, _fd, _key, _seconds, _parent = sys.argv
    try:
        _boss = os.pidfd_open(int(_parent))
    except ProcessLookupError:
        sys.exit(0)
    serve(socket.socket(fileno=int(_fd)), _key.encode(), float(_seconds), _boss)
