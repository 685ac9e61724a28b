"""The run directory: what is written where, and how a trained model is read back.

config.yaml          the resolved configuration: enough to repeat the run
metrics.jsonl        one line per round
checkpoint/          theta.safetensors, ema.safetensors, state.json; checkpoint-previous/ is the one
                     before it
samples/             round-0005.png ..., final.png
results.json         the figures of a finished run
report.html          all of it on one page
privacy.jsonl        under privacy one line for each round that was opened, again or not
budgets.json         what each client's node can carry, where nodes say it (pruning.budget)
status.json          how the run ended: finished, or stopped or failed and why
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.checkpoint import (
    NEWEST,
    PREVIOUS,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    sync,
)
from fed_diffusion.compute import device_of, kernels, pinned_threads
from fed_diffusion.config import Config, ConfigError, build_config
from fed_diffusion.data import class_count, image_shape, to_uint8
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.diffusion.process import Score, per_image, sigma
from fed_diffusion.diffusion.samplers import SAMPLERS
from fed_diffusion.federation.probe import peak_memory
from fed_diffusion.federation.records import RoundSummary
from fed_diffusion.federation.worker import evaluator, network_with
from fed_diffusion.files import read_yaml
from fed_diffusion.hardware import usable_cores
from fed_diffusion.masks.budget import MARGIN, memory_allowed
from fed_diffusion.rng import Purpose, torch_generator
from fed_diffusion.schema import LARGEST

DEFAULT_ROOT = "runs"
FEW = 16
"""Images that are tried to see how much memory a whole batch will take."""


def new_run_path(config: Config, root: str | Path = DEFAULT_ROOT) -> Path:
    """runs/<preset>-<time>, with a number behind it where that exists already."""
    stem = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (
        Path(root) / (stem + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100)))
    )
    return next(path for path in candidates if not path.exists()).resolve()


def resume_command(path: Path, engine: str = "local") -> str:
    """What to type to go on with a run, quoted for a shell.

    Parameters
    ----------
    engine
        local, flower, or deployment: a SuperLink that the run was submitted to.
    """
    if engine == "deployment":
        return f"flwr run ... --run-config {shlex.quote(f'resume={json.dumps(str(path))}')}"
    words = ["fed-diffusion", "resume", str(path)]
    return shlex.join([*words, "--engine", engine] if engine != "local" else words)


class RunDir:
    """The files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunDir:
        """Make the directory and write config.yaml.

        Raises
        ------
        ConfigError
            The directory holds a run already: nothing is ever overwritten.
        """
        run = cls(path)
        if run.metrics.exists():
            raise ConfigError(f"{run.path} holds a run already; give another directory (--out).")
        (run.path / "samples").mkdir(parents=True, exist_ok=True)
        write_atomic(run.path / "config.yaml", config.to_yaml())
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run; `ConfigError` where there is none."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise ConfigError(f"{run.path} is no run directory: it has no config.yaml.")
        return run

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def config(self) -> Config:
        path = self.path / "config.yaml"
        settings = read_yaml(path, "configuration")
        try:
            return build_config(settings)
        except ConfigError as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        _append(self.metrics, line)

    def note_opened(self, round: int) -> None:
        """Bring to disk that a round is about to be sent to clients: privacy counts each time."""
        _append(self.path / "privacy.jsonl", {"round": round})

    def opened(self, finished: int) -> int:
        """How many rounds were opened, repeated ones each time; at least once all up to a last one.

        A line that cannot be read counts as well: it errs on the safe side.
        """
        path, named = self.path / "privacy.jsonl", set()
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                named.add(json.loads(line)["round"])
        return len(lines) + len(set(range(1, finished + 1)) - named)

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_atomic(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        path = self.path / "results.json"
        if not path.is_file():
            raise ConfigError(f"{self.path} has no results.json: the run did not finish.")
        loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return loaded

    def write_budgets(self, budgets: Mapping[int, Mapping[str, float]]) -> None:
        write_atomic(self.path / "budgets.json", json.dumps(budgets, indent=2) + "\n")

    def write_status(self, state: str, reason: str | None = None) -> None:
        """The last thing a server writes: finished, or failed with the reason."""
        write_atomic(self.path / "status.json", json.dumps({"state": state, "reason": reason}))

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        path = self.path / "status.json"
        return path.is_file() and json.loads(path.read_text("utf-8"))["state"] == "finished"

    def budgets(self) -> dict[int, dict[str, float]]:
        """What write_budgets wrote; empty where it wrote nothing."""
        path = self.path / "budgets.json"
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return {int(client): budget for client, budget in found.items()}

    def has_checkpoint(self) -> bool:
        return any((self.path / folder).exists() for folder in (NEWEST, PREVIOUS))

    def save_checkpoint(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Write checkpoint/; see `fed_diffusion.checkpoint`."""
        save_checkpoint(self.path, tensors, state)

    def load_checkpoint(self) -> Checkpoint:
        """The newest whole checkpoint; `ConfigError` where there is none."""
        try:
            return load_checkpoint(self.path)
        except CheckpointError as error:
            raise ConfigError(f"{self.path} cannot be read as a trained run: {error}.") from error

    def load_theta(self, *, ema: bool) -> dict[str, Tensor]:
        return self.load_checkpoint().tensors["ema" if ema else "theta"]

    def read_rounds(self, last: int) -> list[RoundSummary]:
        """The lines of metrics.jsonl up to round `last`; of a repeated round the last one."""
        rounds: dict[int, RoundSummary] = {}
        for line in self.metrics.read_text("utf-8").splitlines() if self.metrics.exists() else ():
            try:
                summary = RoundSummary.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue  # cut off in the middle of a line
            if summary.round <= last:
                rounds[summary.round] = summary
        return [rounds[number] for number in sorted(rounds)]

    def rewrite_metrics(self, rounds: Iterable[RoundSummary]) -> None:
        """Leave only these rounds in metrics.jsonl: what came after the checkpoint comes again."""
        write_atomic(self.metrics, "".join(json.dumps(r.to_dict()) + "\n" for r in rounds))


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file; it is on disk when this returns."""
    fresh = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        sync(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)


def batches_at_once(device: torch.device, count: int) -> ThreadPoolExecutor:
    """Threads that make whole batches, `count` at once, each with one torch thread of its own.

    On a CPU that beats splitting every small operation over the cores, most of all on busy ones.
    """
    if device.type == "cpu":
        return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1)


def sampler_partition(config: Config, steps: int | None = None) -> Tensor:
    """The partition that samples are made on; `ConfigError` where it cannot be so short."""
    diffusion = config.diffusion
    if steps is None:
        steps = config.evaluation.steps or diffusion.K
    try:
        return PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, steps)
    except ValueError as error:
        raise ConfigError(
            f"evaluation.steps = {steps} cannot be used with diffusion.partition = "
            f"{diffusion.partition!r}: {error}"
        ) from error


class Sampler:
    """A trained score network that generates images.

    Examples
    --------
    >>> import fed_diffusion
    >>> images = fed_diffusion.load("runs/digits-20260101-120000").sample(16)  # doctest: +SKIP
    """

    def __init__(self, config: Config, theta: dict[str, Tensor]):
        self.config = config
        self.device = device_of(config)
        network = network_with(config, theta).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)
        self._evaluate = evaluator(self.network, config, self.device)
        self.shape = image_shape(config.data)
        self.classes = class_count(config.data) if config.model.conditional else None

    @classmethod
    def from_run(cls, path: str | Path, *, ema: bool = True) -> Sampler:
        """The model of a run directory; its moving average unless ema=False."""
        run = RunDir.open(path)
        return cls(run.config(), run.load_theta(ema=ema))

    def score(self, labels: Tensor | None = None, guidance: float = 0.0) -> Score:
        """s_theta(y, u) = -eps / sigma_u as a function of (y, u).

        eps is eps_theta(y, u, labels); with labels and a guidance w > 0 it is
        (1 + w) eps_theta(y, u, labels) - w eps_theta(y, u, no label), from one call of the network
        on both (classifier-free guidance, Ho & Salimans 2022).
        """

        def evaluate(y: Tensor, u: Tensor) -> Tensor:
            if guidance and labels is not None:
                both = torch.cat([labels, torch.full_like(labels, self.classes or 0)])
                doubled = self._evaluate(torch.cat([y, y]), torch.cat([u, u]), both)
                with_label, without = doubled.chunk(2)
                eps = (1 + guidance) * with_label - guidance * without
            else:
                eps = self._evaluate(y, u, labels)
            return -eps / per_image(sigma(u), y)

        return evaluate

    def partition(self, steps: int | None = None) -> Tensor:
        """The sampler's partition of time; `steps` defaults to evaluation.steps, then diffusion.K.

        Raises
        ------
        ConfigError
            Fewer steps than the partition can have.
        """
        return sampler_partition(self.config, steps)

    def _with(self, overrides: dict[str, Any]) -> Config:
        """The configuration with dotted keys replaced where a value is given, checked anew."""
        settings = self.config.to_dict()
        for key, value in overrides.items():
            if value is not None:
                section, name = key.split(".")
                settings[section][name] = value
        return build_config(settings)

    def _check_labels(self, labels: Tensor, num: int) -> None:
        if self.classes is None:
            raise ConfigError(
                "labels are given, and model.conditional = False: the network knows none. Leave "
                "them out."
            )
        if len(labels) != num:
            raise ConfigError(f"labels: {len(labels)} for {num} images; give one for each.")
        unknown = labels[(labels < 0) | (labels >= self.classes)]
        if len(unknown):
            raise ConfigError(
                f"labels = {unknown.unique().tolist()} are not allowed: the classes are 0 to "
                f"{self.classes - 1}."
            )

    @torch.no_grad()
    def sample(
        self,
        num: int,
        *,
        seed: int | None = None,
        steps: int | None = None,
        batch: int | None = None,
        labels: Tensor | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        partition: str | None = None,
        purpose: Purpose = Purpose.SAMPLES,
    ) -> Tensor:
        """Generate images, by the exponential integrator (10) unless another sampler is named.

        Parameters
        ----------
        num
            How many.
        seed
            Default: the run's seed. The same seed gives the same images.
        steps
            Steps of the partition; default: evaluation.steps, then diffusion.K.
        labels
            int64 [num], for a conditional network; default: every class in turn.
        sampler, guidance
            Default: evaluation.sampler, evaluation.guidance.
        partition
            A name in PARTITIONS; default: diffusion.partition.

        Returns
        -------
        Tensor
            uint8 [num, C, H, W] on the CPU.

        Raises
        ------
        ConfigError
            A setting that does not exist or that this network was not trained for.
        """
        config = self._with(
            {
                "evaluation.steps": steps,
                "evaluation.sampler": sampler,
                "evaluation.guidance": guidance,
                "diffusion.partition": partition,
            }
        )
        u = sampler_partition(config)
        solve = SAMPLERS[config.evaluation.sampler]
        batch = batch or config.evaluation.batch
        seed = self.config.seed if seed is None else seed
        if not 0 <= seed < LARGEST:
            raise ConfigError(f"seed = {seed} is not allowed: from 0, and below 2^63.")
        if labels is not None:
            self._check_labels(labels, num)
        elif self.classes is not None:
            labels = torch.arange(num) % self.classes

        def generate(start: int) -> Tensor:
            n = min(batch, num - start)
            # each batch has a stream of its own, so it does not matter which thread makes it
            noise = torch_generator(seed, purpose, round=start // batch, device=self.device)
            y = torch.randn((n, *self.shape), generator=noise, device=self.device)
            chosen = None if labels is None else labels[start : start + n].to(self.device)
            score = self.score(chosen, config.evaluation.guidance)
            y = solve(score, y, u, generator=noise, denoise=config.evaluation.denoise)
            return to_uint8(y).cpu()

        images = [torch.empty((0, *self.shape), dtype=torch.uint8)]
        starts = range(0, num, batch)
        few = min(batch, num, FEW)
        score = self.score(None if labels is None else labels[:few], config.evaluation.guidance)
        with kernels(self.config, self.device):
            at_once = self._at_once(score, few, batch, len(starts))
            with batches_at_once(self.device, at_once) as pool:
                images += pool.map(torch.no_grad()(generate), starts)
        return torch.cat(images)

    def _at_once(self, score: Score, few: int, batch: int, batches: int) -> int:
        """How many batches the cores and the free memory allow at once; images depend on neither.

        Parameters
        ----------
        score
            The score of `few` images, which is asked once to see what memory it takes.
        """
        cores = min(usable_cores(), batches)
        if self.device.type != "cpu" or cores <= 1:
            return 1
        y, u = torch.zeros((few, *self.shape)), torch.ones(few, dtype=torch.float64)
        with pinned_threads(1):
            score(y, u)  # the first call loads what later ones share
            with peak_memory(self.device) as peak:
                score(y, u)
                each = MARGIN * peak() * batch / few
        return max(1, min(cores, int(memory_allowed() / max(each, 1.0))))

    def evaluations(self, steps: int | None = None, guidance: float | None = None) -> int:
        """Network evaluations per image (NFE): images that go through the network for one image.

        One for every step of any sampler and one for evaluation.denoise; guidance doubles them,
        though its two halves go through in one call.
        """
        guided = self.config.evaluation.guidance if guidance is None else guidance
        once = len(self.partition(steps)) - 1 + int(self.config.evaluation.denoise)
        return once * (2 if guided and self.classes is not None else 1)
