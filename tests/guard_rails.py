"""Guard rails: what tiny runs of every kind end with, recorded before a change and compared after.

    python tests/guard_rails.py record before.json    # with --ray also through Flower's processes
    python tests/guard_rails.py compare before.json   # runs it all again; exit code 1 if it differs
    python tests/guard_rails.py bytes before.json     # updates the byte counts the suite expects

A row is a method family under a mode through an engine. It holds the SHA-256 of theta and of the
moving average, which clients counted in each round, and the ledger's bytes. A combination that the
configuration check refuses is recorded as refused.

The hashes depend on the processor and on the build of PyTorch, so a record is compared on the
machine that made it; byte counts hold anywhere. The engine `flower` is the real ServerApp,
strategy and ClientApp on a grid in this process (tests/localgrid.py), which takes a second where
the engine `ray`, with all of Flower's processes, takes half a minute. The report's figures are
left blank: drawing them takes a third of such a run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import platform
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of tests/; this checkout, whatever is installed

import torch  # noqa: E402
from flwr.app import Context, RecordDict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# All that the guard rails know of the package. Whoever moves a module mends these lines alone.
from fed_diffusion.config import Config, ConfigError, load_config  # noqa: E402
from fed_diffusion.engines.flower import run_on_flower  # noqa: E402
from fed_diffusion.engines.local import simulate  # noqa: E402
from server_app.app import app as server_app  # noqa: E402
from tests.localgrid import LocalGrid  # noqa: E402

PACKAGES = ("fed_diffusion", "server_app", "client_app")
THETA, EMA = "checkpoint/theta.safetensors", "checkpoint/ema.safetensors"
METRICS, RESULTS = "metrics.jsonl", "results.json"

BYTES = Path(__file__).with_name("guard_rails_bytes.json")
PRESET = "digits"
BASE: dict[str, Any] = {
    "rounds": 2,
    "ema.decay": 0.5,
    "clients": 4,
    "model.widths": [8, 16],
    "model.group": 4,
    "model.attention": [4],
    "model.head": 4,
    "model.dropout": 0.1,
    "model.conditional": True,
    "diffusion.T": 2.3,
    "diffusion.delta": 0.05,
    "diffusion.K": 6,
    "data.holdout": 0.02,
    "local.state": "fresh",
    "wire.state": "fp32",
    "local.eta": 1e-3,
    "local.steps": 2,
    "local.batch": 4,
    "theory.every": 0,
    "worker.device": "cpu",
    "worker.precision": "fp32",
    "flower.supernodes": 2,
    "evaluation.samples": 0,
    "evaluation.steps": 3,
    "evaluation.every": 0,
    "evaluation.grid": 1,
    "evaluation.denoise": False,
    "evaluation.reference": "none",
}

KEEP = {"pruning.keep": [0.75, 0.5, 1, 1]}  # who is weak is asked again in buffered rounds
FAMILIES: dict[str, dict[str, Any]] = {
    "FedDM-F": {"method": "FedDM-F"},
    "random": KEEP | {"pruning.kind": "random"},
    "top-k": KEEP | {"pruning.kind": "topk"},
    "channels, ordered": KEEP | {"pruning.kind": "channels"},
    "channels, rolling": KEEP | {"pruning.kind": "channels", "pruning.choice": "rolling"},
    "channels, random": KEEP | {"pruning.kind": "channels", "pruning.choice": "random"},
    "channels, magnitude": KEEP | {"pruning.kind": "channels", "pruning.choice": "magnitude"},
    "balanced weights": KEEP | {"pruning.kind": "balanced"},
    "balanced channels": KEEP | {"pruning.kind": "balanced", "pruning.unit": "channels"},
    "exclusive": KEEP | {"pruning.kind": "channels", "pruning.baseline": "exclusive"},
    "small": KEEP | {"pruning.kind": "channels", "pruning.baseline": "small"},
}

INT8 = {"wire.down": "int8", "wire.up": "int8", "wire.differences": True}
PRIVACY = {"privacy.clip": 0.05, "wire.differences": True}
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"theory.every": None},  # the first and the last round are diagnostic ones
    "buffered": {"round.mode": "buffered", "round.buffer": 3, "wire.differences": True},
    "private": PRIVACY,
    "private, sampled": PRIVACY | {"round.fraction": 0.6},
    "int8 differences": INT8 | {"round.weighting": "examples"},
    "trimmed mean": {
        "round.aggregation": "trimmed_mean",
        "round.trim": 0.34,
        "wire.down": "bf16",
        "wire.up": "fp16",
        "local.optimizer": "sgd",
    },
}
RAY_MODES = ("synchronous", "int8 differences", "trimmed mean")
"""Their result does not depend on the order of arrival, nor on noise that only one process has."""
LOCAL, FLOWER, RAY = "in process", "flower", "ray"

Row = dict[str, Any]
Key = tuple[str, str, str]
"""Family, mode, engine."""


# --- one run ------------------------------------------------------------------------------------


def run_on_grid(config: Config, path: Path) -> None:
    """The run by the ServerApp and the ClientApp, their messages handed over in this process."""
    preset = path.with_suffix(".yaml")
    preset.write_text(config.to_yaml(), "utf-8")
    nodes = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    given = {"preset": str(preset), "run-dir": str(path)}
    with contextlib.redirect_stdout(io.StringIO()):
        server_app(LocalGrid(nodes), Context(1, 1, {}, RecordDict(), given))


ENGINES: dict[str, Callable[[Config, Path], object]] = {
    LOCAL: lambda config, path: simulate(config, path, processes=1),
    FLOWER: run_on_grid,
    RAY: run_on_flower,
}


def config_of(family: str, mode: str) -> Config:
    """The configuration of a combination; `ConfigError` where it is refused."""
    return load_config(PRESET, BASE | FAMILIES[family] | MODES[mode])


def row_of(family: str, mode: str, engine: str, path: Path) -> Row:
    """Run one combination in a directory that does not exist yet; what it ended with.

    A run that raises is a row too, so that one fault leaves the others to be compared.
    """
    # Ray's processes have entropy of their own; the report's figures say nothing of theta
    noise = contextlib.nullcontext() if engine == RAY else fixed_noise()
    try:
        with noise, mock.patch("matplotlib.figure.Figure.draw"):
            ENGINES[engine](config_of(family, mode), path)
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    return outcome(path)


def outcome(path: Path) -> Row:
    """What a run directory says of a finished run."""
    lines = [json.loads(line) for line in (path / METRICS).read_text("utf-8").splitlines()]
    results = json.loads((path / RESULTS).read_text("utf-8"))
    return {
        "theta": digest(load_file(path / THETA)),
        "ema": digest(load_file(path / EMA)),
        "counted": [[client["client"] for client in line["clients"]] for line in lines],
        "bytes down": [line["bytes_down"] for line in lines],
        "bytes up": [line["bytes_up"] for line in lines],
        "sum down": results["bytes_down"],
        "sum up": results["bytes_up"],
    }


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def fixed_noise() -> Iterator[None]:
    """Seed the operating system's entropy, as the package reads it; others get the real one.

    Privacy's noise and its draw of clients come from os.urandom, the latter through
    random.SystemRandom. Each function that asks has a stream to itself, because NumPy asks too, on
    behalf of whoever makes a generator, and not equally often in both engines.
    """
    real = os.urandom
    streams: dict[object, random.Random] = collections.defaultdict(lambda: random.Random(0))

    def urandom(size: int) -> bytes:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals["__name__"] in ("random", "secrets"):
            frame = frame.f_back
        asks = str(frame.f_globals["__name__"]).partition(".")[0]
        return streams[frame.f_code].randbytes(size) if asks in PACKAGES else real(size)

    with mock.patch("os.urandom", urandom), mock.patch("random._urandom", urandom):
        yield


# --- the table ----------------------------------------------------------------------------------


def combinations(ray: bool) -> list[Key]:
    """All of them; through Ray each family under one mode."""
    rows = [(f, m, e) for f in FAMILIES for m in MODES for e in (LOCAL, FLOWER)]
    if ray:
        rows += [(f, m, RAY) for f, m in zip(FAMILIES, itertools.cycle(RAY_MODES), strict=False)]
    return rows


def rows_of(keys: list[Key]) -> dict[Key, Row]:
    """Run these combinations, one after another."""
    rows = {}
    for number, key in enumerate(keys, 1):
        if sys.stderr.isatty():
            print(f"\r{number}/{len(keys)}  {', '.join(key):50}", end="", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rows[key] = row_of(*key, Path(folder) / "run")
    return rows


def disagreements(rows: Mapping[Key, Row]) -> list[tuple[str, ...]]:
    """Where an engine ends differently from the run in process: lines of a table."""
    found = []
    for (family, mode, engine), row in rows.items():
        local = rows.get((family, mode, LOCAL))
        if engine != LOCAL and local is not None:
            found += [(family, mode, engine, *it) for it in changed(local, row)]
    return found


def differences(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> list[tuple[str, ...]]:
    """What has changed from one record to another: lines of a table."""
    return [
        (*key, *it)
        for key in dict.fromkeys([*before, *after])
        for it in changed(before.get(key, {}), after.get(key, {}))
    ]


def changed(before: Row, after: Row) -> list[tuple[str, str, str]]:
    """(what, before, after) of two rows' fields that differ; a refusal's wording may change."""
    if "refused" in before and "refused" in after:
        return []
    fields = dict.fromkeys([*before, *after])
    return [
        (field, short(before.get(field)), short(after.get(field)))
        for field in fields
        if before.get(field) != after.get(field)
    ]


def short(value: object) -> str:
    """A value as it stands in a table: of a hash the beginning tells enough."""
    text = "-" if value is None else str(value).replace("\n", " ")
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text[:60]


def table(heading: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (heading, *lines)
    )


def machine() -> dict[str, str]:
    """What the hashes depend on beside the code."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": f"{platform.machine()} {cpu}"}


# --- files --------------------------------------------------------------------------------------


def write(path: Path, rows: Mapping[Key, Row]) -> None:
    listed = [dict(zip(("family", "mode", "engine"), key, strict=True)) | rows[key] for key in rows]
    record = {"machine": machine(), "rows": listed}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def read(path: Path) -> tuple[dict[str, str], dict[Key, Row]]:
    """The machine and the rows of a record."""
    record = json.loads(path.read_text("utf-8"))
    rows = {(row.pop("family"), row.pop("mode"), row.pop("engine")): row for row in record["rows"]}
    return record["machine"], rows


def byte_counts(rows: Mapping[Key, Row]) -> dict[str, dict[str, Any]]:
    """Family -> mode -> bytes of each round in process, or that the combination is refused."""
    counts: dict[str, dict[str, Any]] = {}
    for (family, mode, engine), row in rows.items():
        if engine == LOCAL:
            counts.setdefault(family, {})[mode] = count_of(row)
    return counts


def count_of(row: Row) -> dict[str, list[int]] | str:
    return "refused" if "refused" in row else {"down": row["bytes down"], "up": row["bytes up"]}


# --- commands -----------------------------------------------------------------------------------


def record(path: Path, ray: bool) -> int:
    """Write the record; 1 where a run failed or an engine ends differently from the others."""
    rows = rows_of(combinations(ray))
    write(path, rows)
    refused = sum("refused" in row for row in rows.values())
    failed = sum("failed" in row for row in rows.values())
    print(f"{len(rows)} rows, {refused} of them refused, {failed} failed: {path}")
    wrong = disagreements(rows)
    if wrong:
        print(table(("family", "mode", "engine", "what", "in process", "here"), wrong))
    return int(bool(wrong or failed))


def compare(path: Path, ray: bool) -> int:
    """Run everything again and print what differs; 1 where anything does."""
    there, before = read(path)
    if there != machine():
        print(f"The record is of {there}, and this is {machine()}: its hashes may not hold here.")
    if not ray:
        before = {key: row for key, row in before.items() if key[2] != RAY}
    after = rows_of(combinations(ray))
    found = differences(before, after)
    if found:
        print(table(("family", "mode", "engine", "what", "before", "after"), found))
    print(f"{len(after)} rows, {len({line[:3] for line in found})} of them differ from {path}")
    return int(bool(found))


def write_bytes(path: Path) -> int:
    """Take a record's byte counts as those that the suite compares with."""
    _, rows = read(path)
    lines = [
        f" {json.dumps(family)}: {{\n"
        + ",\n".join(f"  {json.dumps(mode)}: {json.dumps(it)}" for mode, it in modes.items())
        + "\n }"
        for family, modes in byte_counts(rows).items()
    ]
    BYTES.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Record what tiny runs end with, and compare.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("record", "write"), ("compare", "compare with"), ("bytes", "take from")):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path, help=f"the record to {what}")
        if name != "bytes":
            command.add_argument("--ray", action="store_true", help="with the real Ray engine too")
    given = parser.parse_args()
    for chatty in ("flwr", "absl"):  # every node and round, and every order of the accountant
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if given.command == "bytes":
        return write_bytes(given.file)
    return (record if given.command == "record" else compare)(given.file, given.ray)


if __name__ == "__main__":
    sys.exit(main())
