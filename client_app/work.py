"""What a node does for a message: records come in, a worker does the task, records go out.

This module imports torch. The ClientApp's own process does not: it hands over to this module
through warm.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from client_app.memory import memory_of, put_memory
from client_app.messages import to_records, to_task
from fed_diffusion.client import secure
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.text import clean
from fed_diffusion.config import Config, ConfigError, build_config
from fed_diffusion.config.schema import as_numbers
from fed_diffusion.data import load_own
from fed_diffusion.masks.budget import BudgetError

NodeConfig = Mapping[str, object]

_resident: tuple[tuple[str | None, ...], Worker] | None = None


def worker_of(content: RecordDict, node: NodeConfig) -> Worker:
    """Return the worker for this run; the model and the data stay in memory between messages."""
    global _resident
    about = content["about"]
    assert isinstance(about, ConfigRecord)
    settings = str(about["config"])
    key = (settings, *_own(node), *(_path(node, name) for name in ("base", "vae", "text")))
    if _resident is None or _resident[0] != key:
        config = _with_copies(build_config(json.loads(settings)), node)
        data, conditional = config.data, config.model.conditional
        own = load_own(data, conditional, *_own(node)) if any(_own(node)) else None
        _resident = (key, Worker(config, own, own=own is not None))
    return _resident[1]


def _own(node: NodeConfig) -> tuple[str | None, str | None]:
    """Return the folder and the data set that the node config names."""
    folder, name = (node.get(key) for key in ("data-dir", "dataset"))
    return str(folder) if folder else None, str(name) if name else None


def _path(node: NodeConfig, key: str) -> str | None:
    """Return a path that the node config names."""
    path = node.get(key)
    return str(Path(str(path)).expanduser().absolute()) if path else None


def _with_copies(config: Config, node: NodeConfig) -> Config:
    """Return the configuration with this machine's copies of the network beside an adapter, the
    autoencoder and the text encoder; their hashes must be the run's.
    """
    used = {"start": ("base", config.lora.rank), "vae": ("vae", config.model.vae)}
    used["text"] = ("text", config.model.text)
    found = {key: _path(node, name) for key, (name, needed) in used.items() if needed is not None}
    copies = {key: path for key, path in found.items() if path is not None}
    return config.model_copy(update={"model": config.model.model_copy(update=copies)})


def _number(node: NodeConfig, key: str, default: float) -> float:
    """Return a number of the node config, given as a number or as text."""
    value = node.get(key, default)
    read = as_numbers(value)
    number = isinstance(read, int | float) and not isinstance(read, bool)
    if not number or not math.isfinite(read):
        raise ConfigError(f"{key} = {value!r} in the node config is not a number.")
    return float(read)


def train(content: RecordDict, node: NodeConfig) -> RecordDict:
    """Run one task of one client."""
    worker, task = worker_of(content, node), to_task(content)
    if not worker.config.secure.aggregation:
        return to_records(worker.run(task))
    update, memory = secure.answer(worker, task, memory_of(content))
    reply = to_records(update)
    put_memory(reply, memory)
    return reply


def hello(content: RecordDict, node: NodeConfig) -> RecordDict:
    """Load and check everything; answer which partition this node is and what it can carry.

    Data that do not fit, or a machine that is too small, are no crash: the answer says what is
    wrong.
    """
    numbers: dict[str, int | float] = {"partition-id": 0, "num-partitions": 0}
    numbers["own-data"] = int(any(_own(node)))
    try:
        for key in ("partition-id", "num-partitions"):
            numbers[key] = int(_number(node, key, 0))
        worker = worker_of(content, node)
        if worker.config.secure.losses != "summed":  # then no number of images travels
            numbers["images"] = len(worker.dataset)
        if worker.config.pruning.budget == "node":
            numbers["keep"] = _number(node, "keep", 1.0)
        elif worker.config.pruning.budget == "auto":
            numbers |= worker.budget().to_metrics()
    except (ConfigError, BudgetError, OSError) as error:  # OSError: a folder that is out of reach
        refused = ConfigRecord({"refused": clean(error)})
        return RecordDict({"metrics": MetricRecord(dict(numbers)), "about": refused})
    return RecordDict({"metrics": MetricRecord(dict(numbers))})


KINDS: dict[str, Callable[[RecordDict, NodeConfig], RecordDict]] = {"train": train, "hello": hello}
