"""fed-diffusion deploy | doctor: the commands for an operator of several machines."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.output import INTERRUPTED, say

if TYPE_CHECKING:
    from fed_diffusion.deploy.submit import Operator


def add_deploy_commands(commands: Any) -> None:
    """Add `deploy` and `doctor` to the command line's parser."""
    deploy = commands.add_parser("deploy", help="set up several machines, and run on them")
    parts = deploy.add_subparsers(required=True, metavar="COMMAND")
    init = parts.add_parser("init", help="write a folder with a bundle for each machine")
    init.add_argument(
        "directory", type=Path, metavar="DIR", help="the folder to make; it must not exist yet"
    )
    init.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="HOST",
        help="a name or address that nodes connect to; repeat it for other names of the same host",
    )
    init.add_argument(
        "--nodes", type=int, default=3, metavar="N", help="how many nodes there are (default: 3)"
    )
    init.add_argument(
        "--port", type=int, default=8443, help="the port of the proxy (default: 8443)"
    )
    init.add_argument(
        "--operator",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="an address or network, other than the server, that may submit runs; may be repeated",
    )
    init.add_argument(
        "--control", metavar="HOST:PORT", help="the address that the operator's flwr connects to"
    )
    init.add_argument(
        "--data-dir",
        default=None,
        help="the folder of images that each node's config names at first",
    )
    init.add_argument(
        "--days", type=int, default=365, help="days until the certificates expire (default: 365)"
    )
    init.set_defaults(command=init_command)

    run = parts.add_parser("run", help="submit a run and wait until it has finished")
    run.add_argument("operator", type=Path, metavar="OPERATOR", help="the operator's bundle")
    run.add_argument("preset", nargs="?", help="a name in conf/ or the path of a YAML file")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting to change, as in pruning.level=S; may be repeated",
    )
    run.add_argument("--out", type=Path, help="the run directory, an absolute path on the server")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="a run directory on the server, to go on with"
    )
    run.add_argument(
        "--nodes", type=int, default=1, help="wait until this many nodes are online (default: 1)"
    )
    run.set_defaults(command=run_command)
    for name, what, does in (
        (
            "attach",
            attach_command,
            "show the log of a run that is going on, and wait until it ends",
        ),
        ("stop", stop_command, "end a run"),
    ):
        known = parts.add_parser(name, help=does)
        known.add_argument("operator", type=Path, metavar="OPERATOR", help="the operator's bundle")
        known.add_argument("run", metavar="NUMBER", help="the number that Flower gave the run")
        known.set_defaults(command=what)

    doctor = commands.add_parser(
        "doctor", help="check whether this machine is ready; exit code 0 means that it is"
    )
    doctor.add_argument(
        "bundle", type=Path, nargs="?", help="the folder that deploy init wrote for this machine"
    )
    doctor.add_argument(
        "--server", metavar="HOST:PORT", help="the server to reach (default: the bundle's)"
    )
    doctor.add_argument(
        "--root-certificates",
        type=Path,
        metavar="CA.CRT",
        help="the CA's certificate that the server's is checked with (default: the bundle's)",
    )
    doctor.add_argument("--data-dir", help="a folder of images to check (default: the bundle's)")
    doctor.add_argument("--preset", help="a preset whose run the images must fit")
    doctor.set_defaults(command=doctor_command)


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print a line for each finding; the exit code is 1 where something has to be done."""
    from rich.text import Text

    from fed_diffusion.common.terminal import plain_console
    from fed_diffusion.common.text import shown
    from fed_diffusion.config import load_config
    from fed_diffusion.deploy.doctor import Machine, examine

    given = {
        "server": arguments.server,
        "root_certificates": arguments.root_certificates,
        "data": arguments.data_dir,
        "config": load_config(arguments.preset) if arguments.preset else None,
    }
    machine = Machine.of_bundle(arguments.bundle) if arguments.bundle else Machine()
    machine = replace(machine, **{key: value for key, value in given.items() if value is not None})
    console, wrong = plain_console(), 0
    for finding in examine(machine):
        mark = Text("ok  ", "green") if finding.ok else Text("do  ", "bold red")
        console.print(mark + Text(shown(f"{finding.name}: {finding.text}")), soft_wrap=True)
        wrong += not finding.ok
    return 1 if wrong else 0


def run_command(arguments: argparse.Namespace) -> int:
    """Submit a run; the last line of the output is the run's directory on the server."""
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.config import ConfigError, load_config, parse_pairs
    from fed_diffusion.deploy.submit import Operator, submit
    from fed_diffusion.engines.superlink import EngineError

    out, resumed = arguments.out, arguments.resume
    if (out is None) == (resumed is None) or (resumed is None) != bool(arguments.preset):
        raise ConfigError(
            "give a preset and --out for a new run, or only --resume RUN to go on with one."
        )
    if resumed is not None and arguments.set:
        raise ConfigError("--set cannot be given with --resume: a run keeps its settings.")
    path = out or resumed
    if not path.is_absolute():
        option = "--out" if resumed is None else "--resume"
        raise ConfigError(f"{option} {path}: give an absolute path, on the server.")
    config = load_config(arguments.preset, parse_pairs(arguments.set)) if out else None
    operator = Operator(arguments.operator)
    try:
        run = submit(operator, config, path, arguments.nodes)
    except EngineError as error:
        tell(str(error), "failed:")
        return 1
    tell(f"run {run} was accepted")
    code = _attach(operator, run)
    if code == 0:
        say(path)
    return code


def attach_command(arguments: argparse.Namespace) -> int:
    """Show a run's log until the run ends; exit code 0 means that it has finished."""
    from fed_diffusion.deploy.submit import Operator

    return _attach(Operator(arguments.operator), _number(arguments.run))


def stop_command(arguments: argparse.Namespace) -> int:
    """Ask Flower to end a run; exit code 0 means that Flower ends it."""
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.deploy.submit import Operator, stop
    from fed_diffusion.engines.superlink import EngineError

    run = _number(arguments.run)
    try:
        stop(Operator(arguments.operator), run)
    except EngineError as error:
        tell(str(error), "failed:")
        return 1
    tell(f"run {run} is stopped; deploy run --resume goes on with it")
    return 0


def _number(given: str) -> str:
    """Return the number of a run; another text would reach Flower's command line."""
    from fed_diffusion.config import ConfigError

    if not (given.isascii() and given.isdecimal()):
        raise ConfigError(
            f"{given!r} is not the number of a run: give the one that deploy run said."
        )
    return given


def _attach(operator: Operator, run: str) -> int:
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.deploy.submit import attach, how_to_go_on
    from fed_diffusion.engines.superlink import EngineError

    try:
        attach(operator, run)
    except EngineError as error:
        tell(str(error), "failed:")
        return 1
    except KeyboardInterrupt:
        tell(how_to_go_on(operator, run), "interrupted:")
        return INTERRUPTED
    return 0


def init_command(arguments: argparse.Namespace) -> int:
    """Write the deployment's folder and print its commands; the last line is its path."""
    from fed_diffusion.common.terminal import tell
    from fed_diffusion.deploy.bundle import Deployment, init

    wanted = Deployment(
        server=tuple(arguments.server),
        nodes=arguments.nodes,
        port=arguments.port,
        operators=tuple(arguments.operator),
        control=arguments.control,
        days=arguments.days,
        **({"data": arguments.data_dir} if arguments.data_dir else {}),
    )
    made = init(arguments.directory, wanted)
    text = (made / "COMMANDS.md").read_text("utf-8")
    tell(text)
    say(made)
    return 0
