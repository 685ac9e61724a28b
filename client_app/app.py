"""The Flower ClientApp. A node hosts clients: each message says for which client it is."""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.messages import to_records, to_task
from fed_diffusion.config import build_config
from fed_diffusion.federation.worker import Worker

app = ClientApp()

_resident: tuple[str, Worker] | None = None


def _worker(message: Message) -> Worker:
    """The worker for this run; the model and the data stay in memory between messages."""
    global _resident
    about = message.content["about"]
    assert isinstance(about, ConfigRecord)
    settings = str(about["config"])
    if _resident is None or _resident[0] != settings:
        _resident = (settings, Worker(build_config(json.loads(settings))))
    return _resident[1]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one task of one client."""
    update = _worker(message).run(to_task(message.content))
    return Message(to_records(update), reply_to=message)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Load everything; say which partition this node is and what it can carry."""
    worker = _worker(message)
    numbers: dict[str, int | float] = {
        "partition-id": int(str(context.node_config.get("partition-id", 0))),
        "num-partitions": int(str(context.node_config.get("num-partitions", 0))),
    }
    if worker.config.pruning.budget == "node":
        numbers["keep"] = float(str(context.node_config.get("keep", 1.0)))
    elif worker.config.pruning.budget == "auto":
        numbers |= worker.budget().to_metrics()
    return Message(RecordDict({"metrics": MetricRecord(dict(numbers))}), reply_to=message)
