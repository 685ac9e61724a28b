"""The `train` part of gpu.py: five variants of a preset at equal images, as long as time lasts.

The variants take turns, some rounds each, with a constant step size and a moving average: whenever
the time ends, those that are furthest have a row at the same number of images. F comes first. Runs
are ordinary run directories in --work, and a later call on the same machine goes on with them, with
the same bits. What comes back from elsewhere must be small: --out holds, for every variant, its
moving average in bf16 in files below `PART_BYTES`, a grid and its record; where --work is empty, a
later call starts from those.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet, load_dataset
from fed_diffusion.engines.local import run_in_process
from fed_diffusion.evaluation import check_evaluation
from fed_diffusion.evaluation.generated import measure
from fed_diffusion.evaluation.trained import save_features, train_features
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir, Sampler
from fed_diffusion.report.grids import save_grid

if TYPE_CHECKING:
    from gpu_record import Record

PART_BYTES = 15_000_000
ROUNDS = 100_000
"""More than any time allows: the step size is constant, so a run has no end of its own."""
RECIPE: dict[str, Any] = {
    "rounds": ROUNDS,
    "local.schedule": "constant",
    "local.batch": 64,
    "round.checkpoint_every": 10,
    "evaluation.every": 0,
    "evaluation.batch": 1000,
    "theory.every": 0,
}
"""What a card and an open end change in a preset."""
VARIANTS: dict[str, dict[str, Any]] = {
    "F": {"method": "FedDM-F"},
    "T-S": {"method": "T-FedDM-S"},
    "R-S": {"method": "R-FedDM-S"},
    "C-S": {"method": "C-FedDM-S", "pruning.choice": "rolling"},
    "one client": {"clients": 1, "local.batch": 640},
}
TINY: dict[str, Any] = {
    "model.widths": [8, 16],
    "local.steps": 2,
    "local.batch": 4,
    "clients": 3,
    "diffusion.K": 20,
    "evaluation.steps": 10,
    "evaluation.batch": 100,
}


class Plan(NamedTuple):
    """What the command line says: the preset, its data and settings, who trains, who judges.

    A turn is `chunk` rounds of a variant, then `samples` images for its figures. The packages of
    the judges must be where this Python finds them; `resnet56` is the file of ResNet-56's weights.
    """

    preset: str
    data: Path | None
    given: dict[str, Any]
    variants: Sequence[str]
    judges: Sequence[str]
    resnet56: Path | None
    chunk: int
    samples: int
    tiny: bool

    def settings(self, name: str, device: torch.device, classifier: Path | None = None) -> Config:
        """Return the configuration of a variant, judged by what is there of the judges."""
        files = {"classifier": classifier, "resnet56_cifar10": self.resnet56}
        weights = {judge: str(path.absolute()) for judge, path in files.items() if path is not None}
        used = {judge: file for judge, file in weights.items() if judge in self.judges}
        judged = {"evaluation.extractor": list(self.judges), "evaluation.weights": used or None}
        given = RECIPE | VARIANTS[name] | judged | {"worker.device": device.type} | self.given
        if self.tiny:
            small = TINY | ({"clients": 1, "local.batch": 12} if name == "one client" else {})
            return load_config("digits", given | small)
        where = {"data.dir": str(self.data)} if self.data is not None else {}
        return load_config(self.preset, given | where)


class Turn(Exception):
    """A variant has had its rounds, or the time is over; its checkpoint is written."""


def train(record: Record, device: torch.device, plan: Plan, work: Path) -> None:
    began = time.monotonic()
    dataset = load_dataset(plan.settings(plan.variants[0], device).data)
    record.add("data", images=len(dataset), seconds=time.monotonic() - began)
    own = "classifier" in plan.judges and not plan.tiny
    extractor = trained_extractor(record, device, plan) if own else None
    for name in cycle(plan.variants):
        config = plan.settings(name, device, extractor)
        check_evaluation(config)
        record.add(name, **turn(record, name, config, dataset, work / slug(name), plan))
        if record.left() < 0:
            return


def slug(name: str) -> str:
    return name.replace(" ", "-")


def trained_extractor(record: Record, device: torch.device, plan: Plan) -> Path:
    """A classifier of the data's classes, trained once: its features are behind every row."""
    path = record.out / "extractor.safetensors"
    if not path.exists():
        began = time.monotonic()
        data = plan.settings(plan.variants[0], device).data
        network, header = train_features(data, 10, 0, device)
        save_features(path, network, header)
        seconds = time.monotonic() - began
        record.add("extractor", accuracy=header.accuracy, seconds=seconds)
    return path


def turn(
    record: Record,
    name: str,
    config: Config,
    dataset: ImageSet,
    run: Path,
    plan: Plan,
) -> dict[str, Any]:
    """Some more rounds of one variant, and what its model is worth after them."""
    kept = record.out / slug(name)
    experiment = opened(config, dataset, run, kept)
    first = experiment.coordinator.round
    began = time.monotonic()

    def progress(line: dict[str, Any]) -> None:
        if line["round"] >= first + plan.chunk or record.left() < 0:
            raise Turn

    with suppress(Turn):
        run_in_process(experiment, processes=1, progress=progress)
    seconds = time.monotonic() - began
    lines = experiment.history
    coordinator = experiment.coordinator
    images = sum(line.images for line in lines)
    row: dict[str, Any] = {
        "rounds": coordinator.round,
        "images": images,
        "images/s": sum(line.images for line in lines if line.round > first) / seconds,
        "loss": lines[-1].loss,
        "held-out loss": lines[-1].holdout_loss,
    }
    export(coordinator.ema, kept, {"round": coordinator.round, "name": name})
    shutil.copy(run / "metrics.jsonl", kept / "metrics.jsonl")
    sampler = Sampler(config, coordinator.ema)
    generated = sampler.sample(plan.samples)
    save_grid(generated[:64], kept / "grid.png")
    try:
        quality = measure(sampler, generated, dataset)
    except Exception as error:  # the training of the next variant is worth having
        return row | {"why": f"{type(error).__name__}: {error}"}
    row |= {key: quality[key] for key in ("fid", "fid_floor", "precision", "recall")}
    for judge, found in quality["others"].items():
        row |= {f"{key} {judge}": found[key] for key in ("fid", "fid_floor")}
        row |= {f"why {judge}": found["why"]} if found["why"] else {}
    return row


def opened(config: Config, dataset: ImageSet, run: Path, kept: Path) -> Experiment:
    """The variant's run where it was left; else from the exported weights; else from its start."""
    if (run / "config.yaml").exists():
        return Experiment.resume(run, dataset)
    experiment = Experiment(config, run, dataset)
    if (kept / "state.json").exists():
        theta, state = imported(kept)
        coordinator = experiment.coordinator
        for name, value in theta.items():
            coordinator.theta[name].copy_(value)
            coordinator.ema[name].copy_(value)
        coordinator.round = int(state["round"])
        experiment.record.history, _ = RunDir(kept).read_rounds(coordinator.round)
        experiment.run.begin_again(experiment.history)
    return experiment


def export(theta: dict[str, Tensor], folder: Path, state: dict[str, Any]) -> None:
    """Write weights as bf16 in files below `PART_BYTES`; the state is last, and names them all."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    room = PART_BYTES
    for name, value in theta.items():
        size = 2 * value.numel()
        if size > room and parts[-1]:
            parts.append({})
            room = PART_BYTES
        parts[-1][name] = value.to(torch.bfloat16).contiguous()
        room -= size
    files = [f"ema-{state['round']:06d}-{i}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file)
    beside = folder / ".state.json"
    beside.write_text(json.dumps(state | {"files": files}))
    beside.replace(folder / "state.json")
    for old in folder.glob("ema-*.safetensors"):
        if old.name not in files:
            old.unlink()


def imported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `export`, in fp32."""
    state = json.loads((folder / "state.json").read_text())
    theta: dict[str, Tensor] = {}
    for file in state["files"]:
        theta |= {name: value.float() for name, value in load_file(folder / file).items()}
    return theta, state
