"""fed-diffusion run | resume | sample | evaluate | features | plan | sweep | deploy | doctor."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fed_diffusion.cli import evaluation as cli_evaluation
from fed_diffusion.cli import theory as cli_theory
from fed_diffusion.cli.deploy import add_deploy_commands
from fed_diffusion.cli.output import INTERRUPTED, OutputError, make_printable, say
from fed_diffusion.common.terminal import console, tell
from fed_diffusion.config import Config, ConfigError, load_config, parse_pairs
from fed_diffusion.store.files import check_writable, in_words
from fed_diffusion.store.locks import LockLost

if TYPE_CHECKING:
    from torch import Tensor

    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.rundir import RunDir


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: the run failed; 2: refused before it began; 130: interrupted."""
    make_printable()
    arguments = parser().parse_args(argv)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for parts that settings name as module:attribute
    try:
        code: int = arguments.command(arguments)
        return code
    except ConfigError as error:
        tell(str(error), "refused:")
        return 2
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except (OutputError, LockLost) as error:
        problem = str(error)
    except OSError as error:  # a full disk, no permission
        problem = in_words(error)
    tell(problem, "failed:")
    return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fed-diffusion", description="Federated training of diffusion models."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, sample, evaluate; prints the run directory")
    run.add_argument("preset", help="a name in conf/ or the path of a YAML file")
    run.add_argument("--engine", choices=("local", "flower"), default="local")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as in pruning.level=S"
    )
    run.add_argument("--out", type=Path, help="the run directory (default: runs/<preset>-<time>)")
    run.set_defaults(command=run_command)

    resume = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    resume.add_argument("run", type=Path, metavar="RUN")
    resume.add_argument("--engine", choices=("local", "flower"), default="local")
    resume.add_argument(
        "--accept-changes",
        action="store_true",
        help="let through rounds, evaluation.*, worker.* that were changed in RUN/config.yaml",
    )
    resume.set_defaults(command=resume_command)

    sample = commands.add_parser("sample", help="generate images from a trained run")
    sample.add_argument("run", type=Path, metavar="RUN")
    sample.add_argument("--num", type=int, default=64)
    sample.add_argument("--out", type=Path, required=True, help="a PNG file")
    sample.add_argument("--seed", type=int)
    sample.add_argument("--steps", type=int, help="steps of the sampler")
    sample.add_argument("--sampler", metavar="NAME", help="as evaluation.sampler")
    sample.add_argument("--guidance", type=float, metavar="W", help="as evaluation.guidance")
    sample.add_argument("--labels", metavar="0,1,2", help="classes, in turn (default: all)")
    sample.set_defaults(command=sample_command)

    cli_evaluation.add_commands(commands)
    cli_theory.add_commands(commands)

    sweep = commands.add_parser("sweep", help="a grid of presets x methods x seeds, and its table")
    sweep.add_argument("file", metavar="FILE", help="a name in conf/sweeps/ or a YAML file")
    sweep.add_argument("--out", type=Path, help="its directory (default: runs/sweeps/<name>)")
    sweep.add_argument(
        "--resume", action="store_true", help="go on with it, or join others who work on it"
    )
    sweep.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="as in T-FedDM or '*-seed0'"
    )
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    sweep.add_argument("--processes", type=int, help="clients at once (default: cores; 1 on a GPU)")
    sweep.add_argument(
        "--report", type=Path, metavar="FILE.md", help="the tables and figures once more, there"
    )
    sweep.set_defaults(command=sweep_command)

    add_deploy_commands(commands)
    return top


def run_command(arguments: argparse.Namespace) -> int:
    """Train a preset on the chosen engine; the run directory is the last line of the output."""
    from fed_diffusion.engines.either import begin
    from fed_diffusion.store.rundir import RunDir

    config = load_config(arguments.preset, parse_pairs(arguments.set))
    if arguments.out is not None:
        RunDir(arguments.out).refuse_existing()  # before a bar is shown
    return _train(config, lambda: begin(config, arguments.out, arguments.engine))


def resume_command(arguments: argparse.Namespace) -> int:
    """Go on from a run's last checkpoint; it ends with the bits it would have ended with."""
    from fed_diffusion.engines.either import begin_again
    from fed_diffusion.store.rundir import RunDir

    run = RunDir.open(arguments.run)
    accept = arguments.accept_changes

    def begin() -> Experiment | RunDir:
        return begin_again(run.path, arguments.engine, accept)[0]

    return _train(run.config(), begin, resumed=True, accept_changes=accept)


def _train(
    config: Config,
    begin: Callable[[], Experiment | RunDir],
    *,
    resumed: bool = False,
    accept_changes: bool = False,
) -> int:
    """Run a new or stopped run to its end.

    Parameters
    ----------
    begin
        Claims the run directory: returns the experiment, for this process, or for the Flower
        engine the directory.
    """
    from fed_diffusion.engines.either import carry
    from fed_diffusion.engines.signals import stop_signals_interrupt
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.origin import resume_command

    path = made = None
    with _live_progress(config) as report, stop_signals_interrupt():
        try:
            made = begin()
            path = made.run.path if isinstance(made, Experiment) else made.path
            carry(made, config, report, resumed=resumed, accept_changes=accept_changes)
        except ConfigError:
            raise
        except RuntimeError as error:  # below quorum; a worker died; no disk
            tell(str(error), "failed:")
            return 1
        except KeyboardInterrupt:
            engine = "local" if isinstance(made, Experiment) else "flower"
            how = f"; go on with: {resume_command(path, engine=engine)}" if path else ""
            tell(f"interrupted{how}")
            return INTERRUPTED
    _print_results(path)
    say(path)
    return 0


def sample_command(arguments: argparse.Namespace) -> int:
    """Write a grid of generated images."""
    from fed_diffusion.generate import Sampler
    from fed_diffusion.report.grids import save_grid

    if arguments.num < 1:
        raise ConfigError(f"--num = {arguments.num} is not allowed; at least 1.")
    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps = {arguments.steps} is not allowed; at least 1.")
    check_writable(arguments.out, "--out")
    sampler = Sampler.from_run(arguments.run)
    images = sampler.sample(
        arguments.num,
        seed=arguments.seed,
        steps=arguments.steps,
        labels=_labels(arguments.labels, arguments.num),
        sampler=arguments.sampler,
        guidance=arguments.guidance,
    )
    save_grid(images, arguments.out)
    say(arguments.out.resolve())
    return 0


def _labels(text: str | None, num: int) -> Tensor | None:
    """The labels of `num` images: those of a list such as 0,1,2 in turn."""
    if text is None:
        return None
    import torch  # takes seconds

    try:
        chosen = torch.tensor([int(part) for part in text.split(",")])
    except (ValueError, RuntimeError):  # no number; one beyond 64 bits
        raise ConfigError(
            f"--labels = {text!r} is not allowed; give class numbers, as in 0,1,2."
        ) from None
    return chosen[torch.arange(num) % len(chosen)]


def sweep_command(arguments: argparse.Namespace) -> int:
    """Do what is left of a sweep; its directory is the last line of the output."""
    from fed_diffusion.engines.signals import stop_signals_interrupt
    from fed_diffusion.sweep import grid as sweeping
    from fed_diffusion.sweep.report import write_outputs

    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes = {arguments.processes} is not allowed; at least 1.")
    sweep = sweeping.load_sweep(arguments.file)
    out = (arguments.out or sweeping.default_out(sweep)).resolve()
    runs = sweeping.grid(sweep, out, parse_pairs(arguments.set))
    todo = sweeping.chosen(runs, arguments.only)
    if not arguments.resume:
        sweeping.refuse_existing(out)
    datasets = sweeping.check_runs(todo)
    sweeping.start(out, resume=arguments.resume)
    command = sweeping.command_line(arguments)
    try:
        with stop_signals_interrupt():
            outcome = sweeping.run_sweep(
                todo,
                out,
                datasets,
                processes=arguments.processes,
                progress=_live_progress,
                say=tell,
            )
    except KeyboardInterrupt:
        again = shlex.join(["--resume", *(["--only", *arguments.only] if arguments.only else [])])
        tell(f"interrupted; go on with: {command} {again}")
        return INTERRUPTED
    table = write_outputs(runs, out, command, arguments.report)
    say(table or "No run is finished yet.")
    for name, why in outcome.failed.items():
        tell(f"{name}: {why}", "failed:")
    for name, who in outcome.elsewhere.items():
        tell(f"left to others: {name}: {who}")
    say(out)
    return 1 if outcome.failed else 0


class _live_progress:
    """A bar with round, loss, images/s and time left; plain lines without a terminal."""

    def __init__(self, config: Config):
        self._rounds = config.rounds
        self._bar = Progress(
            TextColumn("round", style="bold", markup=False),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=config.rounds)

    def __enter__(self) -> _live_progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        speed = line["images"] / max(line["seconds"], 1e-9)
        text = f"loss {line['loss']:.4f}  {speed:.0f} images/s"
        if line["rejected"]:
            text += f"  rejected {len(line['rejected'])}"
        self._bar.update(self._task, completed=line["round"], description=text)
        if line["round"] == self._rounds:
            self._bar.update(self._task, description=f"{text}  sampling and evaluating")
        if not console.is_terminal:
            tell(f"round {line['round']}/{self._rounds}  {text}")


def _print_results(path: Path) -> None:
    from fed_diffusion.store.rundir import RunDir

    results = RunDir(path).results()
    quality, seconds = results["quality"], results["seconds"]
    fid = (
        f"FID {quality['fid']:.2f} (floor {quality['fid_floor']:.2f}, {quality['extractor']}, "
        f"{quality['samples']} samples)"
        if quality["fid"] is not None
        else f"no quality figures: {quality['why']}"
    )
    tell(f"{results['method']}  loss {results['loss']:.4f}  Gamma* {results['gamma_star']}  {fid}")
    copied = (quality["memorisation"] or {}).get("copied")
    if copied:
        named = ", ".join(map(str, copied))
        tell("see report.html", f"the samples copy images of clients {named};")
    tell(f"train {seconds['train']:.0f} s, evaluate {seconds['evaluate']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
