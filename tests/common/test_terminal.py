"""What a user is told is what a user can copy."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from fed_diffusion.common.terminal import plain_console, tell
from fed_diffusion.store.origin import resume_command

HOSTILE = [
    "/x/:100:/:smile:",
    "[bold red]/x[/]",
    "[/]",
    r"\[x]",
    "http://a:8000:9",
    "a" * 500,
    "猫",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is(text, capsys):
    tell(text)
    tell(text, "failed:")
    assert capsys.readouterr().err == f"{text}\nfailed: {text}\n"


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_a_text_in_a_table_or_its_title_is_shown_as_it_is(text, capsys):
    table = Table(text, title=text)
    table.add_row(text)
    plain_console().print(table)
    assert capsys.readouterr().out.count(text) == 3


def test_a_name_with_an_escape_sequence_in_it_does_nothing_to_a_terminal(capsys):
    name = "\x1b]0;owned\x07\x1b[2J\u202ec\udce9"
    table = Table(name, title=name)
    table.add_row(name)
    plain_console().print(table, name)
    tell(name, "failed:")
    printed = capsys.readouterr()
    assert printed.out.count("?]0;owned??[2J?c?") == 4
    assert printed.err == "failed: ?]0;owned??[2J?c?\n"


@pytest.mark.parametrize(
    "name", ["run", "my run", "a'b", 'a"b', "$HOME", "a;b", ":100:", "猫", "-x"]
)
@pytest.mark.parametrize("engine", ["local", "flower"])
def test_the_command_that_resumes_a_run_is_one_word_for_its_path(name, engine, tmp_path):
    words = shlex.split(resume_command(tmp_path / name, engine=engine))
    assert words[:3] == ["fed-diffusion", "resume", str(tmp_path / name)]
    assert words[3:] == ([] if engine == "local" else ["--engine", engine])


def test_a_run_on_a_deployment_is_resumed_where_it_was_submitted(tmp_path):
    words = shlex.split(resume_command(tmp_path / "my run", engine="deployment"))
    path = str(tmp_path / "my run")
    assert words == ["fed-diffusion", "deploy", "run", "OPERATOR", "--resume", path]


SAYS = """
from fed_diffusion.common.terminal import tell
tell('one'); tell('two', 'failed:'); print('done')
"""


@pytest.mark.parametrize("how", ["nobody reads it", "its disk is full", "it is closed"])
def test_a_process_goes_on_where_its_standard_error_cannot_be_written(how):
    if how == "its disk is full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe, open(os.devnull) as null:
        if how == "its disk is full":
            pipe = open("/dev/full", "w")  # noqa: SIM115
        done = subprocess.run(
            [sys.executable, "-c", SAYS],
            stdout=subprocess.PIPE,
            stderr=null if how == "it is closed" else pipe,
            preexec_fn=(lambda: os.close(2)) if how == "it is closed" else None,
        )
        pipe.close()
    assert (done.returncode, done.stdout) == (0, b"done\n")
