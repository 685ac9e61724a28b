"""Attacks to be tried on real deployments: by a listed node that lies, by a stranger who knocks.

As a module of a staged app (`stage`) it is the ClientApp of every node: one whose node config has
`attack=1` does another of `FORMS` in each round, the others are honest. From this machine's side
`knock` is a stranger without a key.
"""

import json
import os
import socket
import ssl
import threading
import time
from pathlib import Path

MB = 1 << 20
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\nINFO : round 9/9 "


def raises(reply, message):
    raise RuntimeError("x" * (MB // 2) + EVIL)


def raises_megabytes(reply, message):
    raise RuntimeError(EVIL + "x" * (5 * MB))


def long_key(reply, message):
    reply["metrics"][EVIL + "k" * (MB // 2)] = [0.5]
    return reply


def heavy(reply, message):
    reply["arrays"] = _record({"values": os.urandom(300 * MB)})  # no part is like another
    return reply


def many_objects(reply, message):
    reply["arrays"] = _record({f"values-{i}": bytes([i]) for i in range(120)})
    return reply


def long_index(reply, message):
    reply["about"]["index"] = json.dumps([[f"n{i}", "float32", [0], 0] for i in range(25_000)])
    return reply


def for_another(reply, message):
    reply["about"]["client"] = 0
    return reply


def huge(reply, message):
    import numpy as np
    from flwr.app import Array, ArrayRecord

    array = reply["arrays"]["values"]
    values = np.frombuffer(array.data, np.float32) + np.float32(1.6e6)
    data = values.tobytes()
    array = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)
    reply["arrays"] = ArrayRecord({"values": array})
    return reply


def dead_actor(reply, message):
    raise RuntimeError("ray.exceptions.ActorDiedError")


def nothing(reply, message):
    from flwr.app import RecordDict

    return RecordDict()


FORMS = {
    raises: "INFO : round 9/9",
    raises_megabytes: "has more than the",
    long_key: "is not a list of whole numbers",
    heavy: "objects, and at most",
    many_objects: "objects, and at most",
    long_index: "its index has",
    for_another: "the reply is for client 0",
    huge: "its difference is",
    dead_actor: "ActorDiedError",
    nothing: "not a message of this app",
}
"""What the attacking node does in round 1, 2, ... -> what the record says of it."""


def _record(values):
    from flwr.app import Array, ArrayRecord

    return ArrayRecord(
        {
            name: Array(dtype="uint8", shape=(len(data),), stype="fed-diffusion.raw", data=data)
            for name, data in values.items()
        }
    )


def client_app():
    """The ClientApp of honest and of attacking nodes."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    from client_app import honest, work

    app = ClientApp()

    @app.query()
    def hello(message, context):
        reply = honest.hello(message, context)
        if context.node_config.get("attack") == "everybody":
            for key, value in {"partition-id": 0, "num-partitions": 1, "own-data": 0}.items():
                reply.content["metrics"][key] = value
        return reply

    @app.train()
    def train(message, context):
        if not context.node_config.get("attack"):
            return honest.train(message, context)
        reply = work.train(message.content, context.node_config)
        form = list(FORMS)[message.content["about"]["round"] - 1]
        return Message(form(reply, message), reply_to=message)

    return app


def stage(app):
    """Put this in the place of a staged app's ClientApp."""
    client = Path(app) / "client_app"
    (client / "app.py").rename(client / "honest.py")
    (client / "attacks.py").write_text(Path(__file__).read_text("utf-8"), "utf-8")
    (client / "app.py").write_text(
        "from client_app.attacks import client_app\n\napp = client_app()\n"
    )


class Watched:
    """The most memory that processes had while this lasted, in MB, by a word of their command."""

    def __init__(self, processes, *words):
        self._processes, self._words = processes, words
        self.first, self.most = {}, {}
        self._over = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        import psutil

        while not self._over.wait(0.2):
            for word in self._words:
                for process in self._processes(word):
                    try:
                        now = process.memory_info().rss / MB
                    except psutil.Error:  # it has just ended
                        continue
                    self.first.setdefault(word, now)
                    self.most[word] = max(now, self.most.get(word, 0))


def knock(port, connections, nbytes, path="/v1/fleet/push-object"):
    """Announce bodies of so many bytes on so many connections, send what is taken, never end.

    Returns
    -------
    A function that ends it, and says how many bytes were taken of each.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sent, opened, over = [0] * connections, [], threading.Event()

    def push(number):
        connection = opened[number]
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {nbytes}\r\n\r\n".encode()
        try:
            connection.sendall(head)
            while not over.is_set() and sent[number] < nbytes - MB:
                sent[number] += connection.send(bytes(64 << 10))
        except OSError:
            return  # it was turned away

    for _ in range(connections):
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        opened.append(context.wrap_socket(raw))
    threads = [threading.Thread(target=push, args=(n,), daemon=True) for n in range(connections)]
    for thread in threads:
        thread.start()

    def end():
        over.set()
        for connection in opened:
            connection.close()
        for thread in threads:
            thread.join(30)
        return sent

    time.sleep(10)
    return end
