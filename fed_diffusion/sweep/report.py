"""What came out of a sweep: tables as Markdown and CSV beside the paper's, with how they were made.

Means and standard deviations are over seeds. Only finished runs count; the text says how many there
are.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_diffusion.config import ConfigError
from fed_diffusion.report.figures import FIGURES, Figure, columns_of
from fed_diffusion.report.records import Record, read_record
from fed_diffusion.store.files import MEND, write_atomic
from fed_diffusion.store.locks import FileLock, wait_for
from fed_diffusion.sweep.figures import save_loss_figure, save_samples_figure
from fed_diffusion.sweep.grid import MACHINES, Run
from fed_diffusion.sweep.paper import TABLE_2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A method on a preset: each figure's mean and standard deviation over the finished seeds."""

    preset: str
    dataset: str
    method: str
    seeds: tuple[int, ...]
    figures: dict[str, tuple[float, float] | None]
    columns: tuple[Figure, ...] = FIGURES


def finished(runs: Iterable[Run]) -> list[tuple[Run, Record]]:
    """Return the finished runs; one whose files are damaged is left out, with a warning."""
    done = []
    for run in runs:
        try:
            if run.finished():
                _check_figures(run)
                done.append((run, read_record(run.path)))
        except ConfigError as error:
            logger.warning("%s is left out of the tables: %s", run.name, error)
    return done


def _check_figures(run: Run) -> None:
    """Raise `ConfigError` for results that lack what the tables show."""
    results = run.results()
    try:
        _evaluation_of(results["quality"])
        columns = columns_of([results])
        values = [results["parameters"], *(figure.value(results) for figure in columns)]
        odd = [v for v in values if v is not None and not isinstance(v, int | float)]
        problem = f"{odd[0]!r} is not a number" if odd else None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        problem = repr(error)
    if problem is not None:
        raise ConfigError(f"{run.path / 'results.json'} is damaged: {problem}. {MEND}")


def rows_of(done: Sequence[tuple[Run, Record]]) -> list[Row]:
    """Return one row per preset and method, in the order in which the sweep names them."""
    groups: dict[tuple[str, str], list[tuple[Run, Record]]] = {}
    for run, record in done:
        groups.setdefault((run.config.preset, run.method), []).append((run, record))
    presets = dict.fromkeys(run.config.preset for run, _ in done)
    rows = []
    for preset in presets:
        columns = columns_of([r.results for run, r in done if run.config.preset == preset])
        for (of, method), group in groups.items():
            if of == preset:
                first = group[0][0].config
                figures = {f.key: _over_seeds(f, [r.results for _, r in group]) for f in columns}
                seeds = tuple(run.config.seed for run, _ in group)
                rows.append(Row(preset, first.data.name, method, seeds, figures, columns))
    return rows


def _over_seeds(figure: Figure, results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the mean and standard deviation; None if a run lacks the figure, 0 for a single
    run.
    """
    values = [figure.value(result) for result in results]
    if any(v is None or not math.isfinite(v) for v in values):
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def write_outputs(
    runs: Sequence[Run], out: Path, command: str, report: Path | None = None
) -> str | None:
    """Write tables and figures into the sweep's directory, and where asked into another.

    Parameters
    ----------
    runs
        The whole grid; what is not finished is left out.
    out
        The sweep's directory.
    command
        What the user typed.
    report
        A Markdown file, as docs/results/table2-digits.md; its images and table go beside it.

    Returns
    -------
    The tables in Markdown; None where no run is finished yet, and nothing is written.
    """
    lock = FileLock(out / "locks", "outputs")
    wait_for(lock)  # of several processes that end together, the last one writes all there is
    try:
        done = finished(runs)
        if not done:
            return None
        rows = rows_of(done)
        write_atomic(out / "runs.csv", runs_csv(done))
        for path in filter(None, (out / "table.md", report)):
            stem = f"{path.stem}-" if path == report else ""
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path.with_suffix(".csv"), table_csv(rows))
            images = [(save_loss_figure(done, path.with_name(f"{stem}loss.png")), LOSS)]
            samples = save_samples_figure(done, path.with_name(f"{stem}samples.png"))
            images += [(samples, SAMPLES)] if samples else []
            write_atomic(path, markdown(runs, done, rows, images, command))
        return "\n".join(tables(rows))
    finally:
        lock.release()


LOSS = (
    "Mean training loss per dimension by round; the line is the mean over seeds, the band its "
    "standard deviation. One panel per family of masks, level F in all (the paper's Figures 2 and "
    "3)."
)
SAMPLES = "The first images that each method generates from the same noise (Figures 4 to 6)."


def markdown(
    runs: Sequence[Run],
    done: Sequence[tuple[Run, Record]],
    rows: Sequence[Row],
    images: Sequence[tuple[Path, str]],
    command: str,
) -> str:
    lines = [f"# {', '.join(dict.fromkeys(row.preset for row in rows))}: methods compared", ""]
    lines += [f"    {command}", "", *tables(rows)]
    for path, caption in images:
        lines += [f"![{path.stem}]({path.name})", "", caption, ""]
    return "\n".join([*lines, *protocol(runs, done)])


def tables(rows: Sequence[Row]) -> list[str]:
    """Return one table per preset, beside the paper's Table 2 where that has the data set."""
    lines: list[str] = []
    for preset in dict.fromkeys(row.preset for row in rows):
        mine = [row for row in rows if row.preset == preset]
        paper = TABLE_2.get(mine[0].dataset)
        columns = mine[0].columns
        titles = ["method", *(f.title.replace("*", r"\*") for f in columns)]  # no emphasis
        titles += ["paper IS", "paper FID"] if paper else []
        lines += [f"**{preset}**", "", _line(titles), _line(["---"] * len(titles))]
        for row in mine:
            cells = [row.method, *(_cell(f, row) for f in columns)]
            if paper:
                known = paper.get(row.method)
                cells += [f"{value:.2f}" for value in known] if known else ["–", "–"]
            lines.append(_line(cells))
        lines.append("")
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: Figure, row: Row) -> str:
    found = row.figures[figure.key]
    if found is None:
        return "–"
    mean, deviation = map(figure.written, found)
    same = len(row.seeds) == 1 or (figure.digits == 0 and found[1] == 0)
    return mean if same else f"{mean} ± {deviation}"


def protocol(runs: Sequence[Run], done: Sequence[tuple[Run, Record]]) -> list[str]:
    """Return how the figures were made, as the runs themselves say."""
    seeds = sorted({run.config.seed for run, _ in done})
    lines = ["## How these were made", ""]
    lines.append(
        f"{len(done)} of {len(runs)} runs are finished. Mean ± standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}; the loss is the last round's."
    )
    for preset in dict.fromkeys(run.config.preset for run, _ in done):
        mine = [(run, record) for run, record in done if run.config.preset == preset]
        lines += ["", f"**{preset}**: {_training(mine)} {_evaluation(mine)}"]
    if any(run.config.data.name in TABLE_2 for run, _ in done):
        lines += ["", PAPER]
    machines = dict.fromkeys(
        line
        for run, _ in done
        if (run.path / MACHINES).is_file()
        for line in (run.path / MACHINES).read_text("utf-8").splitlines()
    )
    lines += [
        "",
        f"Machine: {'; '.join(machines)}. Seconds are the wall clock of training.",
        "",
    ]
    return lines


PAPER = (
    "The paper does not say how many samples, which split and which weights are behind its Table "
    "2: its columns show the order of the methods, and say nothing about how large a FID should be."
)


def _training(done: Sequence[tuple[Run, Record]]) -> str:
    config, record = done[0][0].config, done[0][1]
    local = config.local
    work = f"{local.steps} local steps" if local.steps else f"{local.epochs} local epochs"
    return (
        f"{config.data.name}, {config.clients} clients ({config.data.partition}), {config.rounds} "
        f"rounds of {work} at batch {local.batch}, {local.optimizer} with eta = {local.eta:g}, "
        f"a network of {record.results['parameters']:,} parameters, sampled from "
        + (f"the moving average (decay {config.ema.decay:g})." if config.ema.decay else "theta_R.")
    )


def _evaluation(done: Sequence[tuple[Run, Record]]) -> str:
    quality = done[0][1].results["quality"]
    missing = {
        r.results["quality"].get("why") for _, r in done if r.results["quality"]["fid"] is None
    }
    if missing:
        return f"Without quality figures, since {'; '.join(str(why) for why in missing)}."
    return _evaluation_of(quality) + _judges(done)


def _judges(done: Sequence[tuple[Run, Record]]) -> str:
    """Return the further judges, and a warning where one column is by several judges."""
    found = [record.results["quality"] for _, record in done]
    text = ""
    for name, judge in (found[0].get("others") or {}).items():
        why = f": no figures, since {judge['why']}" if judge["why"] else ""
        text += f" Also by {name}, extractor {judge['extractor']}{why}."
    first = dict.fromkeys(str(quality["extractor"]) for quality in found)
    if len(first) > 1:
        text += (
            f" NOT ALL RUNS HAVE THE SAME JUDGE: {'; '.join(first)}. Their figures do not compare; "
            "fed-diffusion evaluate RUN --extractor NAME measures a run again."
        )
    return text


def _evaluation_of(quality: Mapping[str, Any]) -> str:
    return (
        f"{quality['samples']} generated images of {quality['nfe']} network evaluations against "
        f"{quality['reference']}, extractor {quality['extractor']}, of the run's seed; uint8 "
        "images. The FID floor is real against real at the same size."
    )


def table_csv(rows: Sequence[Row]) -> str:
    columns = list({f.key: f for row in rows for f in row.columns}.values())
    titles = [f"{f.key}_{part}" for f in columns for part in ("mean", "std")]
    lines: list[list[Any]] = [["preset", "method", "seeds", *titles, "paper_is", "paper_fid"]]
    for row in rows:
        numbers = [value for f in columns for value in row.figures.get(f.key) or ("", "")]
        paper = TABLE_2.get(row.dataset, {}).get(row.method, ("", ""))
        lines.append([row.preset, row.method, " ".join(map(str, row.seeds)), *numbers, *paper])
    return _csv(lines)


def runs_csv(done: Sequence[tuple[Run, Record]]) -> str:
    columns = columns_of([record.results for _, record in done])
    lines: list[list[Any]] = [["run", "preset", "method", "seed", *(f.key for f in columns)]]
    for run, record in done:
        numbers = [f.value(record.results) for f in columns]
        lines.append([run.name, run.config.preset, run.method, run.config.seed, *numbers])
    return _csv(lines)


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()
