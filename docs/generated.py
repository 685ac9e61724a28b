"""The pages that are made when the site is built: every setting, every command, the Python API.

MkDocs calls `on_files`. The pages are read off the code, so that they cannot differ from it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import fed_diffusion
from fed_diffusion.cli.main import parser
from fed_diffusion.config import Config
from fed_diffusion.config.section import Section

SETTINGS = """# Settings

A run is described by a preset and by what is changed in it. A preset is a YAML file: one of those
in `conf/`, or one of yours. `--set KEY=VALUE` changes a setting on the command line, a dictionary
does so in `load_config`, and `--run-config` in `flwr run`. The run directory's `config.yaml` has
every setting with the value that the run was made with. It is itself a preset, and repeats the run.

**How values are read.** The type of a setting decides how its value is read, in `--set`, in
presets, in sweeps and in Flower's run config alike. A setting that is text (`data.dir`, a name)
takes the text as it is typed, with `#`, blanks and digits. Numbers are decimal: `010` is 10 and
`1e-2` is 0.01. `null` means "no value". Lists are written `[1, 0.5]`. `round.quorum` tells a count
(`1`) from a part (`1.0`). Files are read as UTF-8, and a key that stands twice in a file is refused
with both of its lines.

A value that is not allowed, and two settings that contradict each other, are refused before
training starts; the message says what is allowed.
"""

CLI = """# Commands

Every command ends with exit code 0 when it has done its work, 1 when it failed on the way, 2 when
it refused what it was asked before it began, and 130 when it was interrupted by Ctrl-C.
"""

API = """# Python API

Everything on this page can be imported from `fed_diffusion`. The modules that are named here may
change between releases.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site (called by MkDocs)."""
    from mkdocs.structure.files import File

    pages = {"settings.md": settings_page(), "cli.md": cli_page(), "api.md": api_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def settings_page() -> str:
    """Return every key of `Config`: what it may be, its default and its meaning."""
    top = {n: f for n, f in Config.model_fields.items() if not is_section(f.annotation)}
    parts = [SETTINGS, "## The run", table(Config, "", top)]
    for name, field in Config.model_fields.items():
        if is_section(field.annotation):
            model = field.annotation
            intro = linked(inspect.cleandoc(model.__doc__ or ""))
            parts += [f"## {name}", intro, table(model, f"{name}.", model.model_fields)]
    return "\n\n".join(parts) + "\n"


def is_section(annotation: Any) -> bool:
    """Return whether a setting is a section, with settings of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def table(model: type[Section], prefix: str, fields: dict[str, Any]) -> str:
    """Return the settings of one section as a table, each key with an anchor."""
    meanings, schema = docstrings(model), model.model_json_schema()
    lines = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        shape = allowed(schema["properties"][name], schema.get("$defs", {}), field)
        default = field.get_default()
        words = default if isinstance(default, str) and default else json.dumps(default)
        key = f"`{prefix}{name}`{{ #{prefix}{name} }}"
        meaning = linked(" ".join(meanings[name].split()))
        lines.append("| " + " | ".join(map(cell, (key, shape, f"`{words}`", meaning))) + " |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def docstrings(model: type[Section]) -> dict[str, str]:
    """Return the text below each attribute of a class, which Python itself throws away."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for one, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[one.target.id] = inspect.cleandoc(text)
    return found


def allowed(shape: dict[str, Any], known: dict[str, Any], field: Any) -> str:
    """Return what a setting may be, in words, from its JSON schema and the built-in names."""
    words = [name for item in field.metadata for name in built_in(item)]
    if words:
        return ", ".join(f"`{word}`" for word in words) + " or `module:attribute`"
    return shape_in_words(shape, known)


def shape_in_words(shape: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in shape:
        return shape_in_words(known[shape["$ref"].rpartition("/")[2]], known)
    if "anyOf" in shape:
        kinds = [one for one in shape["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(shape_in_words(one, known) for one in kinds))
    if "enum" in shape:
        return ", ".join(f"`{one}`" for one in shape["enum"])
    if "const" in shape:
        return f"`{shape['const']}`"
    kind = shape.get("type")
    if kind == "array":
        return f"list: {shape_in_words(shape.get('items', {}), known)}"
    if kind == "object":
        return "names with values, as in `{name: value}`"
    plain = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    return " ".join([plain.get(str(kind), "text"), *limits(shape)])


def limits(shape: dict[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {shape[key]:g}" for key, sign in signs.items() if shape.get(key) is not None]
    if shape.get("exclusiveMaximum") == 2**63:
        found = [*found[:-1], "< 2^63"]
    if found:
        yield ", ".join(found)


def built_in(item: Any) -> tuple[str, ...]:
    """Return the words of `config.names.part`, where a piece of a setting's type is one."""
    check = getattr(item, "func", None)
    names = inspect.getclosurevars(check).nonlocals if inspect.isfunction(check) else {}
    return tuple(names.get("built_in", ()))


def linked(text: str) -> str:
    """Return a docstring in which the contracts of `fed_diffusion` link to their place in the
    API.
    """

    def link(found: re.Match[str]) -> str:
        name = found[1]
        public = name in fed_diffusion.__all__
        return f"[`fed_diffusion.{name}`](api.md#fed_diffusion.{name})" if public else found[0]

    return re.sub(r"`[\w.]+\.(\w+)`", link, text)


def cli_page() -> str:
    """Return every command with its arguments, as `--help` prints them."""
    parts = [CLI]
    for words, help_text, command in commands(parser()):
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=88)
        text = command.format_help().rstrip()
        parts += [f"## {' '.join(words)}", f"{help_text}.", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def commands(
    one: argparse.ArgumentParser, words: tuple[str, ...] = ("fed-diffusion",), about: str = ""
) -> Iterator[tuple[tuple[str, ...], str, argparse.ArgumentParser]]:
    """Yield every command that has no commands below it: its words, what it does, and its
    parser.
    """
    groups = [a for a in one._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield words, about[:1].upper() + about[1:], one
    for group in groups:
        said = {action.dest: action.help or "" for action in group._choices_actions}
        for name, below in group.choices.items():
            yield from commands(below, (*words, name), said.get(name, ""))


def api_page() -> str:
    """Return what `fed_diffusion.__all__` exports, each by mkdocstrings."""
    names = [name for name in fed_diffusion.__all__ if not name.startswith("__")]
    first = ("load_config", "run", "resume", "load")
    ordered = [*first, *(name for name in names if name not in first)]
    blocks = [f"::: fed_diffusion.{name}\n    options: {{toc_label: {name}}}" for name in ordered]
    return "\n\n".join([API, *blocks]) + "\n"
