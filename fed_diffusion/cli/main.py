"""fed-diffusion COMMAND: the parser of all commands, and the commands that are short."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fed_diffusion.cli import compare as cli_compare
from fed_diffusion.cli import evaluation as cli_evaluation
from fed_diffusion.cli import export as cli_export
from fed_diffusion.cli import runs as cli_runs
from fed_diffusion.cli import settings as cli_settings
from fed_diffusion.cli import theory as cli_theory
from fed_diffusion.cli.arguments import add_dry_run, add_set, spread
from fed_diffusion.cli.deploy import add_deploy_commands
from fed_diffusion.cli.output import INTERRUPTED, OutputError, make_printable, say

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The code is 0 if the work is done, 1 if it failed, 2 if it was refused before it began, and 130
    if it was interrupted.
    """
    make_printable()
    arguments = parser().parse_args(spread(sys.argv[1:] if argv is None else argv))
    # from here on: help and a wrong word need none of it
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.config import ConfigError
    from fed_diffusion.store.files import in_words
    from fed_diffusion.store.locks import LockLost

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
    top.set_defaults(parser=top)
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and the commit")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    cli_runs.add_commands(commands)
    cli_settings.add_commands(commands)

    sample = commands.add_parser("sample", help="generate images from a trained run")
    sample.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    sample.add_argument(
        "--num", type=int, default=64, metavar="N", help="how many images (default: 64)"
    )
    sample.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    sample.add_argument(
        "--seed", type=int, help="the seed of the noise that images start from (default: the run's)"
    )
    sample.add_argument("--steps", type=int, help="how many steps the sampler takes")
    sample.add_argument("--sampler", metavar="NAME", help="the sampler, as in evaluation.sampler")
    sample.add_argument(
        "--guidance", type=float, metavar="W", help="strength of guidance towards the label"
    )
    sample.add_argument("--labels", metavar="0,1,2", help="classes to draw, in turn (default: all)")
    sample.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to draw, for a network of text; give it again for several, which are drawn in "
        "turn (default: evaluation.prompts)",
    )
    sample.set_defaults(command=sample_command)

    cli_evaluation.add_commands(commands)
    cli_theory.add_commands(commands)
    cli_compare.add_commands(commands)
    cli_export.add_commands(commands)

    sweep = commands.add_parser(
        "sweep", help="run a grid of presets x methods x seeds, and make its table"
    )
    sweep.add_argument("file", metavar="FILE", help="a name in conf/sweeps/ or a YAML file")
    sweep.add_argument(
        "--out", type=Path, help="the sweep's directory (default: runs/sweeps/<name>)"
    )
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="go on with a sweep, also beside other processes that work on it",
    )
    sweep.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only the runs whose names fit, as in T-FedDM or '*-seed0'",
    )
    add_set(sweep)
    add_dry_run(sweep)
    sweep.add_argument(
        "--processes", type=int, help="how many clients train at once (default: cores; 1 on a GPU)"
    )
    sweep.add_argument(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="write the tables and figures to this file too",
    )
    sweep.set_defaults(command=sweep_command)

    add_deploy_commands(commands)
    return top


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        from fed_diffusion import __version__
        from fed_diffusion.store.provenance import commit

        say(f"fed-diffusion {__version__}" + (f" ({known})" if (known := commit()) else ""))
        parser.exit()


def sample_command(arguments: argparse.Namespace) -> int:
    """Write a grid of generated images."""
    from fed_diffusion.config import ConfigError
    from fed_diffusion.generate import Sampler
    from fed_diffusion.report.grids import save_grid
    from fed_diffusion.store.files import check_writable

    if arguments.num < 1:
        raise ConfigError(f"--num = {arguments.num} is not allowed; give at least 1.")
    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps = {arguments.steps} is not allowed; give at least 1.")
    check_writable(arguments.out, "--out")
    sampler = Sampler.from_run(arguments.run, prompts=arguments.prompt)
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
    """Return the labels of `num` images: those of a list such as 0,1,2 in turn."""
    if text is None:
        return None
    import torch  # takes seconds

    from fed_diffusion.config import ConfigError

    try:
        chosen = torch.tensor([int(part) for part in text.split(",")])
    except (ValueError, RuntimeError):  # no number; one beyond 64 bits
        raise ConfigError(
            f"--labels = {text!r} is not allowed; give class numbers, as in 0,1,2."
        ) from None
    return chosen[torch.arange(num) % len(chosen)]


def sweep_command(arguments: argparse.Namespace) -> int:
    """Do what is left of a sweep; the last line of the output is its directory."""
    from fed_diffusion.cli.dry_run import print_sweep
    from fed_diffusion.cli.progress import Display
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.config import ConfigError, parse_pairs
    from fed_diffusion.engines.signals import stop_signals_interrupt
    from fed_diffusion.sweep import grid as sweeping
    from fed_diffusion.sweep.report import write_outputs

    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes = {arguments.processes} is not allowed; give at least 1.")
    sweep = sweeping.load_sweep(arguments.file)
    out = (arguments.out or sweeping.default_out(sweep)).resolve()
    runs = sweeping.grid(sweep, out, parse_pairs(arguments.set))
    todo = sweeping.chosen(runs, arguments.only)
    if not arguments.resume:
        sweeping.refuse_existing(out)
    datasets = sweeping.check_runs(todo)
    if arguments.dry_run:
        return print_sweep([run for run in todo if not run.finished()], datasets)
    sweeping.start(out, resume=arguments.resume)
    command = sweeping.command_line(arguments)
    try:
        with stop_signals_interrupt():
            outcome = sweeping.run_sweep(
                todo,
                out,
                datasets,
                processes=arguments.processes,
                progress=Display,
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
        tell(f"another process has {name}: {who}")
    say(out)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
