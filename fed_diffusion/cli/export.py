"""fed-diffusion export: a trained run as files that other tools read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fed_diffusion.cli.output import say


def add_commands(commands: Any) -> None:
    """Add it to the sub-parsers of `fed-diffusion`."""
    export = commands.add_parser(
        "export", help="write a trained run as a pipeline of diffusers, as ONNX, or as safetensors"
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--format",
        choices=("diffusers", "onnx", "safetensors"),
        help="default: diffusers for a run with model.name=diffusers, else safetensors",
    )
    export.add_argument(
        "--weights",
        choices=("ema", "theta"),
        default="ema",
        help="the moving average, or the parameters themselves (default: ema)",
    )
    export.set_defaults(command=export_command)


def export_command(arguments: argparse.Namespace) -> int:
    """Write the folder; its path is the output."""
    from fed_diffusion.export.folder import export
    from fed_diffusion.store.rundir import RunDir

    run = RunDir.open(arguments.run)
    say(export(run, arguments.folder, arguments.format, arguments.weights).resolve())
    return 0
