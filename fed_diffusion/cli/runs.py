"""fed-diffusion run | resume | watch: these commands train a run, go on with it, or follow it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.arguments import add_dry_run, add_set
from fed_diffusion.cli.output import INTERRUPTED, say

if TYPE_CHECKING:
    from fed_diffusion.cli.progress import Display
    from fed_diffusion.config import Config
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.rundir import RunDir

Begin = Callable[[], "tuple[Experiment | RunDir, Config]"]
ENGINE = "local trains in this process, flower through Flower's simulation (default: local)"


def add_commands(commands: Any) -> None:
    """Add `run`, `resume` and `watch` to the sub-parsers of `fed-diffusion`."""
    run = commands.add_parser("run", help="train, sample and evaluate; prints the run directory")
    run.add_argument("preset", help="a name in conf/ or the path of a YAML file")
    run.add_argument("--engine", choices=("local", "flower"), default="local", help=ENGINE)
    add_set(run)
    run.add_argument("--out", type=Path, help="the run directory (default: runs/<preset>-<time>)")
    add_dry_run(run)
    run.set_defaults(command=run_command)

    resume = commands.add_parser(
        "resume", help="go on with a run that was stopped or killed, or train it for more rounds"
    )
    resume.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    resume.add_argument("--engine", choices=("local", "flower"), default="local", help=ENGINE)
    resume.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="end after round N, also if the run is finished; a cosine schedule then spans N",
    )
    add_set(
        resume,
        "settings to change from here on: evaluation.*, worker.*, flower.*, trackers, data.dir",
    )
    resume.add_argument(
        "--accept-changes",
        action="store_true",
        help="accept changes in RUN/config.yaml, to rounds and to what --set may change",
    )
    add_dry_run(resume)
    resume.set_defaults(command=resume_command)

    watch = commands.add_parser(
        "watch", help="follow a run from another terminal, without changing anything"
    )
    watch.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    watch.set_defaults(command=watch_command)


def run_command(arguments: argparse.Namespace) -> int:
    """Train a preset on the chosen engine; the last line of the output is the run directory."""
    from fed_diffusion.config import load_config, parse_pairs

    config = load_config(arguments.preset, parse_pairs(arguments.set))
    if arguments.dry_run:
        from fed_diffusion.cli.dry_run import print_run
        from fed_diffusion.store.rundir import RunDir

        if arguments.out is not None:
            RunDir(arguments.out).refuse_existing()
        return print_run(config, arguments.engine)
    from fed_diffusion.engines.either import ahead, begin
    from fed_diffusion.engines.signals import stop_signals_interrupt

    with stop_signals_interrupt(), ahead(config, arguments.engine):
        return _train(lambda: (begin(config, arguments.out, arguments.engine), config))


def resume_command(arguments: argparse.Namespace) -> int:
    """Go on from a run's last checkpoint; the run ends with the bits it would have ended with."""
    from fed_diffusion.config import parse_pairs, refuse_overlaps
    from fed_diffusion.engines.either import begin_again
    from fed_diffusion.store.rundir import RunDir

    run = RunDir.open(arguments.run)
    typed, accept = parse_pairs(arguments.set), arguments.accept_changes
    if arguments.rounds is not None:
        refuse_overlaps([*typed, "rounds"], "--rounds and --set")
        typed["rounds"] = arguments.rounds
    if arguments.dry_run:
        from fed_diffusion.checks import VERSIONS
        from fed_diffusion.cli.dry_run import print_run
        from fed_diffusion.store.origin import standing

        found = standing(run, VERSIONS, accept, typed)
        return print_run(found.config, arguments.engine, found.round)

    def begin() -> tuple[Experiment | RunDir, Config]:
        return begin_again(run.path, arguments.engine, accept, typed)

    return _train(begin, resumed=True, accept_changes=accept or bool(typed))


def _train(begin: Begin, *, resumed: bool = False, accept_changes: bool = False) -> int:
    """Run a new or stopped run to its end.

    Parameters
    ----------
    begin
        A function that checks everything, claims the run directory, and returns what is to run
        (an experiment in this process, or the run directory for the Flower engine), and its
        settings.
    """
    from fed_diffusion.cli.progress import Display, followed
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.config import ConfigError
    from fed_diffusion.engines.either import carry
    from fed_diffusion.engines.signals import stop_signals_interrupt
    from fed_diffusion.experiment import Experiment
    from fed_diffusion.store.origin import resume_command
    from fed_diffusion.store.rundir import RunDir

    path = made = None
    with stop_signals_interrupt():
        try:
            made, config = begin()
            path = made.run.path if isinstance(made, Experiment) else made.path
            tell(str(path), "run directory:" if not resumed else "goes on:")
            with Display(config) as shown, followed(RunDir(path), shown.live):
                carry(made, config, shown, resumed=resumed, accept_changes=accept_changes)
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
    print_results(path)
    say(path)
    return 0


def watch_command(arguments: argparse.Namespace) -> int:
    """Show how a run goes until it ends; the exit code is 0 if it has finished, else 1."""
    from fed_diffusion.cli.progress import LOOK_S, Display, look
    from fed_diffusion.engines.flower import MetricsTail
    from fed_diffusion.store.rundir import RunDir

    run = RunDir.open(arguments.run)
    lines = MetricsTail(run.metrics, whole=True)
    with Display(run.config()) as shown:
        for line in lines.new()[-1:]:
            _show(shown, line)
        seen = None
        while run.in_use():
            for line in lines.new():
                _show(shown, line)
            seen = look(run, shown.live, seen)
            time.sleep(LOOK_S)
        for line in lines.new():
            _show(shown, line)
    return _how_it_ended(run)


def _show(shown: Display, line: dict[str, Any]) -> None:
    with suppress(KeyError, TypeError):  # a damaged line is nothing to show
        shown(line)


def _how_it_ended(run: RunDir) -> int:
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.store.origin import resume_command

    status = run.status()
    if status.get("state") == "finished":
        print_results(run.path)
        say(run.path)
        return 0
    why = (
        status.get("reason")
        or "no process works on this run, and it is not finished: it was killed, or"
    )
    why += "" if status else f" it has not begun; go on with: {resume_command(run.path)}"
    tell(f"{run.path}: {why}", f"{status.get('state', 'stopped')}:")
    return 1


def print_results(path: Path) -> None:
    """Print a finished run in a few lines."""
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.store.rundir import RunDir

    results = RunDir(path).results()
    quality, seconds = results["quality"], results["seconds"]
    fid = _fid(quality, quality["samples"])
    tell(f"{results['method']}  loss {results['loss']:.4f}  Gamma* {results['gamma_star']}  {fid}")
    for name, found in quality["others"].items():
        tell(f"{name}: {_fid(found, quality['samples'])}")
    copied = (quality["memorisation"] or {}).get("copied")
    if copied:
        named = ", ".join(map(str, copied))
        tell("see report.html", f"the samples copy images of clients {named};")
    tell(f"train {seconds['train']:.0f} s, evaluate {seconds['evaluate']:.0f} s")


def _fid(found: dict[str, Any], samples: int) -> str:
    """Return a judge's FID with what it depends on, or why there is none."""
    if found["fid"] is None:
        return f"no quality figures: {found['why']}"
    return (
        f"FID {found['fid']:.2f} (floor {found['fid_floor']:.2f}, {found['extractor']}, "
        f"{samples} samples)"
    )
