"""fed-diffusion presets | settings | config show | completion: what there is to choose from."""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from typing import Any

from fed_diffusion.cli.arguments import add_set
from fed_diffusion.cli.output import say

SHELLS = ("bash", "zsh", "tcsh")


def add_commands(commands: Any) -> None:
    """Add `presets`, `settings`, `config` and `completion` to the sub-parsers."""
    listed = commands.add_parser("presets", help="list the presets, with a sentence on each")
    listed.set_defaults(command=presets_command)

    settings = commands.add_parser(
        "settings", help="list every setting with its values, default and meaning"
    )
    settings.add_argument(
        "search",
        nargs="?",
        default="",
        metavar="SEARCH",
        help="list only settings in which this text occurs",
    )
    settings.set_defaults(command=settings_command)

    config = commands.add_parser("config", help="show what a preset and --set come to")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print all settings as YAML, and what they come to")
    show.add_argument("preset", help="a name in conf/ or the path of a YAML file")
    add_set(show)
    show.set_defaults(command=show_command)

    completion = commands.add_parser(
        "completion", help="print a script for a shell that completes words of this command"
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell to make the script for")
    completion.set_defaults(command=completion_command)


def presets_command(arguments: argparse.Namespace) -> int:
    """Print each preset with the first sentence of its comment."""
    from fed_diffusion.config import presets

    names = presets()
    width = max(map(len, names))
    for name in names:
        say(f"{name:<{width}}  {_first_sentence(name)}")
    return 0


def _first_sentence(preset: str) -> str:
    from fed_diffusion.config import conf_dir

    lines = (conf_dir() / f"{preset}.yaml").read_text("utf-8").splitlines()
    words: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        words.append(line.strip("# "))
    return re.split(r"(?<=[.:])\s", " ".join(words) + " ")[0].rstrip(":")


def settings_command(arguments: argparse.Namespace) -> int:
    """Print the settings whose name, values or meaning hold the text that was searched for."""
    from fed_diffusion.config import ConfigError
    from fed_diffusion.config.describe import all_settings

    text = arguments.search.lower()
    found = [
        one
        for one in all_settings()
        if text in one.key.lower() or text in one.meaning.lower() or text in one.values.lower()
    ]
    if not found:
        raise ConfigError(
            f"no setting holds {arguments.search!r} in its name, values or meaning; fed-diffusion "
            "settings lists them all."
        )
    for one in found:
        say(f"{one.key} = {one.default}  ({one.values})")
        if one.meaning:
            say(f"    {one.meaning}")
    return 0


def show_command(arguments: argparse.Namespace) -> int:
    """Print all settings as a preset, and what they come to as comments."""
    from fed_diffusion.cli.dry_run import facts
    from fed_diffusion.config import load_config, parse_pairs

    config = load_config(arguments.preset, parse_pairs(arguments.set))

    say(config.to_yaml().rstrip())
    for name, text in facts(config):
        say(f"# {name}: {text}")
    return 0


def completion_command(arguments: argparse.Namespace) -> int:
    """Print a completion script for a shell, made by shtab."""
    from fed_diffusion.config import ConfigError

    if find_spec("shtab") is None:
        raise ConfigError(
            "completion needs the package shtab: pip install 'fed-diffusion[completion]'."
        )
    import shtab

    say(shtab.complete(arguments.parser, shell=arguments.shell))
    return 0
