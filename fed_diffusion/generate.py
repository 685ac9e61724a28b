"""A trained model, read back from its run directory, that samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.config import Config, ConfigError, build_config
from fed_diffusion.config.schema import LARGEST, EvaluationConfig
from fed_diffusion.data import to_uint8
from fed_diffusion.diffusion.process import Score, per_image, sigma
from fed_diffusion.diffusion.samplers import SAMPLERS, Solver
from fed_diffusion.masks.budget import MARGIN, memory_allowed
from fed_diffusion.store.origin import trained
from fed_diffusion.store.rundir import DEFAULT_ROOT, RunDir
from fed_diffusion.store.start import text_encoder_of

__all__ = ["DEFAULT_ROOT", "RunDir", "Sampler", "batches_at_once"]

Sampled = Callable[[float], None]
"""A function that is called with how many images are done; half a batch counts as half of it."""
FEW = 16
"""The number of images that are tried to see how much memory a whole batch will take."""


def batches_at_once(device: torch.device, count: int) -> ThreadPoolExecutor:
    """Yield threads that make whole batches, `count` at once, each with one torch thread.

    On a CPU that beats splitting every small operation over the cores, most of all on busy ones.
    """
    if device.type == "cpu":
        return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1)


def solver_of(evaluation: EvaluationConfig) -> Solver:
    """The sampler that evaluation.sampler names; `ConfigError` where there is none."""
    solver: Solver = resolve("evaluation.sampler", evaluation.sampler, SAMPLERS)
    return solver


def check_sampler(setup: Setup) -> None:
    """Refuse a sampler of the user's own that does not do what `Solver` says.

    It is tried on two images whose score is known, s(y, u) = -y, which costs no network.

    Raises
    ------
    ConfigError
        The message names evaluation.sampler and what went wrong.
    """
    evaluation = setup.config.evaluation
    name, solve = evaluation.sampler, solver_of(evaluation)
    if name in SAMPLERS:
        return
    noise = torch.Generator().manual_seed(0)
    y = torch.randn((2, *setup.shape), generator=noise)
    u, denoise, start = setup.sampling_times(), evaluation.denoise, y.clone()
    with blamed("evaluation.sampler", name):
        x = solve(lambda y, u: -y, y, u, generator=noise, denoise=denoise)
        if not isinstance(x, Tensor) or (x.shape, x.dtype) != (y.shape, y.dtype):
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"it returns {got} for a start of {y.dtype} {list(y.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("it returns values that are not finite where the score is -y")
        if not torch.equal(y, start):
            raise ValueError("it changes y, the start that it is given")


class Sampler:
    """A trained score network that generates images.

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.
    theta
        The trained parameters by name; copied.

    Examples
    --------
    >>> import fed_diffusion
    >>> images = fed_diffusion.load("runs/digits-20260101-120000").sample(16)  # doctest: +SKIP
    """

    def __init__(self, run: Config | Setup, theta: dict[str, Tensor]):
        self.setup = setup = Setup.of(run)
        self.config = setup.config
        self.device = setup.device
        network = setup.network_with(theta).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)
        self._evaluate = setup.evaluator(self.network)
        self.shape, self.pixels, self.classes = setup.shape, setup.pixels, setup.classes
        self._autoencoder = setup.autoencoder
        self._texts = _prompts(self.config, self.device)
        if self._texts is not None:  # labels are numbers of prompts, and the one behind is no text
            self.classes = len(self._texts) - 1

    @classmethod
    def from_run(
        cls, path: str | Path, *, ema: bool = True, prompts: Sequence[str] | None = None
    ) -> Sampler:
        """Return the model of a run directory; its moving average unless ema=False.

        Parameters
        ----------
        prompts
            Texts in place of evaluation.prompts, for a network of text (model.text).

        Raises
        ------
        ConfigError
            See `fed_diffusion.store.origin.trained`.
        """
        config, checkpoint = trained(RunDir.open(path))
        config = config if prompts is None else _with_prompts(config, prompts)
        return cls(config, checkpoint.tensors["ema" if ema else "theta"])

    def score(self, labels: Tensor | None = None, guidance: float = 0.0) -> Score:
        """Return s_theta(y, u) = -eps / sigma_u as a function of (y, u).

        eps is eps_theta(y, u, labels); with labels and a guidance w > 0 it is
        (1 + w) eps_theta(y, u, labels) - w eps_theta(y, u, no label), from one call of the network
        on both (classifier-free guidance, Ho & Salimans 2022).
        """

        def evaluate(y: Tensor, u: Tensor) -> Tensor:
            if guidance and labels is not None:
                both = torch.cat([labels, torch.full_like(labels, self.classes or 0)])
                doubled = self._evaluate(torch.cat([y, y]), torch.cat([u, u]), self._told(both))
                with_label, without = doubled.chunk(2)
                eps = (1 + guidance) * with_label - guidance * without
            else:
                eps = self._evaluate(y, u, self._told(labels))
            return -eps / per_image(sigma(u), y)

        return evaluate

    def _told(self, labels: Tensor | None) -> Tensor | None:
        """What the network is told: the labels themselves, or the embedded prompts."""
        return labels if labels is None or self._texts is None else self._texts[labels]

    def decoded(self, y: Tensor) -> Tensor:
        """Return what the network has made as images uint8 on the CPU."""
        images = y if self._autoencoder is None else self._autoencoder.decode(y)
        return to_uint8(images).cpu()

    def partition(self, steps: int | None = None) -> Tensor:
        """Return the sampler's partition; `steps` defaults to evaluation.steps, then diffusion.K.

        Raises
        ------
        ConfigError
            The partition cannot have so few steps.
        """
        return self.setup.sampling_times(steps)

    def _with(self, overrides: dict[str, Any]) -> Config:
        """Return the configuration with dotted keys replaced where a value is given, checked
        anew.
        """
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
        progress: Sampled | None = None,
    ) -> Tensor:
        """Generate images, by the exponential integrator (10) unless another sampler is named.

        Parameters
        ----------
        num
            How many images.
        seed
            The seed of the noise; by default the run's. The same seed gives the same images.
        steps
            Steps of the partition; default: evaluation.steps, then diffusion.K.
        labels
            int64 [num], for a conditional network; default: every class in turn. For a network of
            text they are numbers of evaluation.prompts.
        sampler, guidance
            The sampler and its guidance; by default evaluation.sampler and evaluation.guidance.
        partition
            As diffusion.partition, which is the default.
        progress
            A function that is told how many images are done, after each step of each batch.

        Returns
        -------
        Tensor
            uint8 [num, C, H, W] on the CPU.

        Raises
        ------
        ConfigError
            A setting does not exist, or this network was not trained for it.
        """
        config = self._with(
            {
                "evaluation.steps": steps,
                "evaluation.sampler": sampler,
                "evaluation.guidance": guidance,
                "diffusion.partition": partition,
            }
        )
        batch = batch or config.evaluation.batch
        seed = self.config.seed if seed is None else seed
        if not 0 <= seed < LARGEST:
            raise ConfigError(f"seed = {seed} is not allowed: give a number from 0, below 2^63.")
        if labels is not None:
            self._check_labels(labels, num)
        elif self.classes is not None:
            labels = torch.arange(num) % self.classes
        made = _Batches(self, config, batch, seed, purpose).made(num, labels, progress)
        return torch.cat([torch.empty((0, *self.pixels), dtype=torch.uint8), *made])

    def batches(
        self, num: int, *, purpose: Purpose = Purpose.SAMPLES, progress: Sampled | None = None
    ) -> Iterator[Tensor]:
        """Yield the images of `sample(num)` in parts, in order, each as soon as it is made."""
        labels = None if self.classes is None else torch.arange(num) % self.classes
        config = self.config
        batches = _Batches(self, config, config.evaluation.batch, config.seed, purpose)
        yield from batches.made(num, labels, progress)

    def evaluations(self, steps: int | None = None, guidance: float | None = None) -> int:
        """Return the network evaluations per image (NFE).

        There is one for every step of any sampler and one for evaluation.denoise; guidance doubles
        them, though its two halves go through in one call.
        """
        guided = self.config.evaluation.guidance if guidance is None else guidance
        once = self.calls(self.partition(steps))
        return once * (2 if guided and self.classes is not None else 1)

    def calls(self, u: Tensor) -> int:
        """Calls of the score behind a batch on the partition u."""
        return len(u) - 1 + int(self.config.evaluation.denoise)


def _prompts(config: Config, device: torch.device) -> Tensor | None:
    """The embedded prompts, and last that of an empty text; None for a network without text."""
    encoder = text_encoder_of(config.model, device)
    if encoder is None:
        return None
    texts = (*config.evaluation.prompts, "")
    with pinned_threads(config.worker.threads), kernels(config.worker, device):
        return torch.cat([encoder.encode([text]) for text in texts])


def _with_prompts(config: Config, prompts: Sequence[str]) -> Config:
    settings = config.to_dict()
    settings["evaluation"]["prompts"] = list(prompts)
    return build_config(settings)


@dataclass(frozen=True)
class _Batches:
    """How a sampler's images are made: in batches, several at once where the machine allows it."""

    sampler: Sampler
    config: Config
    batch: int
    seed: int
    purpose: Purpose

    def made(self, num: int, labels: Tensor | None, progress: Sampled | None) -> Iterator[Tensor]:
        """So many images with these labels, batch by batch, in order."""
        sampler, batch, evaluation = self.sampler, self.batch, self.config.evaluation
        solve, guidance = solver_of(evaluation), evaluation.guidance
        u = Setup.of(self.config).sampling_times()
        count = _Count(progress, sampler.calls(u))

        @torch.no_grad()
        def generate(start: int) -> Tensor:
            n = min(batch, num - start)
            # each batch has a stream of its own, so it does not matter which thread makes it
            place = start // batch
            noise = torch_generator(self.seed, self.purpose, round=place, device=sampler.device)
            y = torch.randn((n, *sampler.shape), generator=noise, device=sampler.device)
            chosen = None if labels is None else labels[start : start + n].to(sampler.device)
            score = count.counted(sampler.score(chosen, guidance), start, n)
            y = solve(score, y, u, generator=noise, denoise=evaluation.denoise)
            count.note(start, n)
            return sampler.decoded(y)

        starts = range(0, num, batch)
        if not starts:
            return
        few = min(batch, num, FEW)
        with kernels(sampler.config.worker, sampler.device):
            score = sampler.score(None if labels is None else labels[:few], guidance)
            at_once = self._at_once(score, few, len(starts))
            with batches_at_once(sampler.device, at_once) as pool:
                yield from pool.map(generate, starts)

    def _at_once(self, score: Score, few: int, batches: int) -> int:
        """How many batches the cores and the free memory allow at once; images depend on neither.

        Parameters
        ----------
        score
            The score of `few` images, which is asked once to see what memory it takes.
        """
        sampler = self.sampler
        cores = min(usable_cores(), batches)
        if sampler.device.type != "cpu" or cores <= 1:
            return 1
        y, u = torch.zeros((few, *sampler.shape)), torch.ones(few, dtype=torch.float64)
        with pinned_threads(1), torch.no_grad():
            score(y, u)  # the first call loads what later ones share
            with peak_memory(sampler.device) as peak:
                score(y, u)
                each = MARGIN * peak() * self.batch / few
        return max(1, min(cores, int(memory_allowed() / max(each, 1.0))))


class _Count:
    """How many images are done, from the calls of the score of batches that are made at once."""

    def __init__(self, tell: Sampled | None, calls: int):
        self._tell = tell
        self._calls = calls
        self._done: dict[int, float] = {}
        self._lock = threading.Lock()

    def counted(self, score: Score, start: int, n: int) -> Score:
        """Return the score of the batch at `start`, of n images, whose calls are counted."""
        if self._tell is None:
            return score
        asked = 0

        def count(y: Tensor, u: Tensor) -> Tensor:
            nonlocal asked
            found = score(y, u)
            asked += 1
            # a sampler of the user's own may ask more often than once a step
            self.note(start, n * min(asked / self._calls, 1.0))
            return found

        return count

    def note(self, start: int, done: float) -> None:
        if self._tell is None:
            return
        with self._lock:
            self._done[start] = done
            self._tell(sum(self._done.values()))
