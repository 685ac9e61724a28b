"""What the site and the README say is so: their code runs, their links lead somewhere."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from docs.generated import built_in, is_section
from fed_diffusion.cli.arguments import spread
from fed_diffusion.cli.main import main, parser
from fed_diffusion.config import Config, load_config, parse_pairs
from fed_diffusion.engines import local
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
SMALL = TINY | {"rounds": 1, "local.steps": 2, "evaluation.every": 0, "evaluation.grid": 2}
SMALL["model.group"] = 8
del SMALL["model.conditional"]  # so that samples may have labels
IN_RESULTS = {"theory.estimates", "theory.covered", "data.notes"}
"""Names in results.json that look like settings."""


class Block(NamedTuple):
    """A fenced block of a page."""

    why_not: str | None
    """The reason in the comment <!-- not run: ... --> above it, where there is one."""
    language: str
    text: str

    @property
    def commands(self):
        """The commands of bash, each as its words; comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(name):
    found = re.finditer(
        r"^(?:<!-- not run: (.+?) -->\n)?```(.*)\n((?:.*\n)*?)```$", PAGES[name], re.MULTILINE
    )
    return [Block(*match.groups()) for match in found]


def commands(name):
    """The fed-diffusion commands of a page, each as its arguments, whether they are run or not."""
    bash = [block for block in blocks(name) if block.language == "bash"]
    every = [words for block in bash for words in block.commands]
    return [words[1:] for words in every if words[0] == "fed-diffusion"]


def to_run(name):
    """The blocks that this file runs: an example has its own test, by the same command."""
    mine = [block for block in blocks(name) if block.why_not is None and "--8<--" not in block.text]
    return [] if example_of(name) else [b for b in mine if b.language in ("bash", "python")]


def example_of(name):
    """The module of the example that a page shows, if it shows one."""
    found = re.findall(r'--8<-- "examples/(own_\w+)\.py"', PAGES[name])
    return found[0] if found else None


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_language_and_whole_fences(name):
    assert PAGES[name].count("\n```") == 2 * len(blocks(name))
    assert {block.language for block in blocks(name)} <= {"bash", "python", "text"}


@pytest.mark.parametrize("name", [name for name in PAGES if to_run(name)])
def test_the_code_of_a_page_runs_from_its_first_line_to_its_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local, "usable_cores", lambda: 1)  # in this process
    made_of_the_reader(tmp_path)
    variables = {}
    for block in to_run(name):
        if block.language == "python":
            exec(compile(block.text, name, "exec"), variables)
            continue
        for words in block.commands:
            if words == [".", ".venv/bin/activate"]:
                continue  # the tests run in an environment
            assert words[0] == "fed-diffusion", f"say why {words} is not run"
            assert main(reduced(words[1:])) == 0


def made_of_the_reader(folder):
    """What a page takes for granted: a folder of images."""
    from PIL import Image

    for n in range(12):
        place = folder / "photos" / f"class{n % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * n, 255 - 20 * n, 128)).save(place / f"{n}.png")


def reduced(words):
    """A command's arguments with less work; a setting that is typed on the page stays."""
    command, given = words[0], {pair.partition("=")[0] for pair in words}
    small = dict(SMALL) | {"clients": 3}
    if "digits-unequal" in words:  # its keep has a ratio for each client, down to an eighth
        del small["clients"], small["model.widths"]
    more = [word for key, value in small.items() if key not in given for word in pair(key, value)]
    if command in ("run", "sweep", "plan"):
        words = [*words, *more]
    if command in ("sample", "evaluate"):
        for option in {"--num", "--samples", "--steps"} & set(words):
            words[words.index(option) + 1] = "10"
    less = {
        "sweep": ["--only", "FedDM-F-seed0"],
        "plan": ["--data-moment", "20"],
        "features": ["--epochs", "1"],
    }
    return [*words, *less.get(command, [])]


def pair(key, value):
    return "--set", f"{key}={value}"


@pytest.mark.parametrize("name", [name for name in PAGES if commands(name)])
def test_every_command_of_a_page_is_one_that_the_command_line_takes(name):
    for words in commands(name):
        typed = parser().parse_args(spread(words))
        if words[0] == "run":
            load_config(typed.preset, parse_pairs(typed.set))


@pytest.mark.parametrize("name", [name for name in PAGES if example_of(name)])
def test_an_extensions_page_shows_an_example_that_is_tested_by_the_pages_command(name):
    example = example_of(name)
    text = importlib.import_module(f"examples.{example}").__doc__.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    fed-diffusion")]
    assert [shlex.split(line)[1:] for line in lines] == commands(name)
    tested = [path for path in (ROOT / "tests").rglob("test_*.py") if example in path.read_text()]
    assert [path for path in tested if path.name != Path(__file__).name]


def settings(model=Config, prefix=""):
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


SECTIONS = [name for name, field in Config.model_fields.items() if is_section(field.annotation)]


def test_every_part_that_a_setting_can_name_has_a_page_and_an_example():
    table = re.findall(r"\| `([\w.]+)` \| `fed_diffusion\.\w+` \| \[.*\]\((\w+\.md)\) \|", EXTEND)
    assert {f"docs/extend/{page}" for _, page in table} == {n for n in PAGES if example_of(n)}
    named = {key for key, field in settings() if any(map(built_in, field.metadata))}
    assert {key for key, _ in table} >= named | {"data.name", "model.name", "trackers"}


EXTEND = PAGES["docs/extend/index.md"]


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_that_a_page_names_is_one(name):
    spans = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.\w+)", PAGES[name])
    unknown = set(spans) - {key for key, _ in settings()} - IN_RESULTS
    assert not {span for span in unknown if not span.endswith((".py", ".json", ".jsonl", ".onnx"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it; a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_is_built_without_a_warning_and_takes_nothing_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loads = re.compile(r"<(?:link|script|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:)?//")
    assert [page.name for page in pages if loads.search(page.read_text("utf-8"))] == []


def test_the_settings_page_has_every_key_with_its_default_and_its_meaning(site):
    page = (site / "settings.html").read_text("utf-8")
    for key, field in settings():
        row = re.search(rf'<tr>\s*<td><code id="{re.escape(key)}">(?:.|\n)*?</tr>', page)
        assert row, key
        cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td>(.*)</td>", row[0])]
        assert cells[0] == key
        assert all(cells)
        assert cells[3].rstrip().endswith(".")
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert float(cells[2]) == field.default


def leaves(one, words=("fed-diffusion",)):
    """Every command with its words, and the options that it takes."""
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from leaves(below, (*words, name))
            return
    yield " ".join(words), [o for action in one._actions for o in action.option_strings]


def test_the_commands_page_has_every_command_with_every_option(site):
    page = (site / "cli.html").read_text("utf-8")
    parts = dict(re.findall(r"<h2 id=[^>]*>(.*?)<a (?:.|\n)*?<code>((?:.|\n)*?)</code>", page))
    found = dict(leaves(parser()))
    assert parts.keys() == found.keys()
    for words, options in found.items():
        assert [option for option in options if option not in parts[words]] == []


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", PAGES["README.md"])
    here = [link for link in links if not link.startswith("https://")]
    assert here
    assert [link for link in here if not (ROOT / link).exists()] == []


def test_the_readme_is_at_most_150_lines_long():
    assert len(PAGES["README.md"].splitlines()) <= 150


def without_help(one, words=("fed-diffusion",)):
    """The arguments and commands of a parser, and of those below it, that say nothing."""
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest for choice in action._choices_actions if choice.help}
            for name, below in action.choices.items():
                yield from without_help(below, (*words, name))
                if name not in said:
                    yield " ".join((*words, name))
        elif not action.help:
            yield " ".join((*words, "/".join(action.option_strings) or action.dest))


def test_every_command_and_every_argument_has_a_help_text():
    assert list(without_help(parser())) == []
