"""fed-diffusion report | compare: these commands write pages about runs, at any time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.output import say
from fed_diffusion.common.text import shown

if TYPE_CHECKING:
    from rich.table import Table


def add_commands(commands: Any) -> None:
    """Add `report` and `compare` to the sub-parsers of `fed-diffusion`."""
    report = commands.add_parser(
        "report", help="write RUN/report.html; the run need not be finished"
    )
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.set_defaults(command=report_command)

    compare = commands.add_parser(
        "compare", help="print a table of several runs, and write a page of their curves"
    )
    compare.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the run directories, two at least"
    )
    compare.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="the page to write (default: compare.html here, with a number if it exists)",
    )
    compare.set_defaults(command=compare_command)


def report_command(arguments: argparse.Namespace) -> int:
    """Write a run's page as far as the run has come, and print the path of the page."""
    from fed_diffusion.report.html import write_report  # matplotlib takes seconds to import

    say(write_report(arguments.run).resolve())
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    """Print a table of the runs' figures and write the page; the last line is the page's path."""
    from fed_diffusion.common.terminal import plain_console
    from fed_diffusion.config import ConfigError
    from fed_diffusion.report.comparison import SHOWN, compare, free_name, page_of
    from fed_diffusion.store.files import check_writable, write_atomic

    out: Path | None = arguments.out
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out = {out} is not a .html file; name one.")
    target = out or free_name(Path("compare.html"))
    check_writable(target, "--out")
    comparison = compare(arguments.runs)
    names = [record.name for record in comparison.records]
    console = plain_console()
    rows = {figure.title: comparison.cells[figure.key] for figure in SHOWN}
    for title, cells in (("figure", rows), ("setting that differs", comparison.differing)):
        if cells:
            console.print(_table(title, names, cells))
    write_atomic(target, page_of(comparison))
    say(target.resolve())
    return 0


def _table(title: str, names: list[str], rows: dict[str, list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(Text(shown(name)), justify="right", overflow="fold")
    for key, cells in rows.items():
        table.add_row(key, *map(Text, cells))
    return table
