"""The Flower ClientApp. A node hosts clients: each message says for which client it is.

A node whose node config names `data-dir` or `dataset` is one client, on images of its own.
"""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.messages import to_records, to_task
from fed_diffusion.config import ConfigError, build_config
from fed_diffusion.data import load_own
from fed_diffusion.federation.worker import Worker

app = ClientApp()

_resident: tuple[tuple[str | None, ...], Worker] | None = None


def _worker(message: Message, context: Context) -> Worker:
    """The worker for this run; the model and the data stay in memory between messages."""
    global _resident
    about = message.content["about"]
    assert isinstance(about, ConfigRecord)
    settings = str(about["config"])
    key = (settings, *_own(context))
    if _resident is None or _resident[0] != key:
        config = build_config(json.loads(settings))
        own = load_own(config, *_own(context)) if any(_own(context)) else None
        _resident = (key, Worker(config, own, own=own is not None))
    return _resident[1]


def _own(context: Context) -> tuple[str | None, str | None]:
    """The folder and the data set that the node config names."""
    folder, name = (context.node_config.get(key) for key in ("data-dir", "dataset"))
    return str(folder) if folder else None, str(name) if name else None


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one task of one client."""
    update = _worker(message, context).run(to_task(message.content))
    return Message(to_records(update), reply_to=message)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Load and check everything; say which partition this node is and what it can carry.

    Data that do not fit are no crash: the answer says what is wrong with them.
    """
    numbers: dict[str, int | float] = {
        "partition-id": int(str(context.node_config.get("partition-id", 0))),
        "num-partitions": int(str(context.node_config.get("num-partitions", 0))),
        "own-data": int(any(_own(context))),
    }
    try:
        worker = _worker(message, context)
    except ConfigError as error:
        refused = ConfigRecord({"refused": str(error)})
        content = RecordDict({"metrics": MetricRecord(dict(numbers)), "about": refused})
        return Message(content, reply_to=message)
    numbers["images"] = len(worker.dataset)
    if worker.config.pruning.budget == "node":
        numbers["keep"] = float(str(context.node_config.get("keep", 1.0)))
    elif worker.config.pruning.budget == "auto":
        numbers |= worker.budget().to_metrics()
    return Message(RecordDict({"metrics": MetricRecord(dict(numbers))}), reply_to=message)
