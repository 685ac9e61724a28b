"""Files of settings: what is read, and what is refused with the file and the line."""

import os
import subprocess
import sys

import pytest

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.config.yaml import absolute, expanded, parse_yaml, read_yaml
from fed_diffusion.sweep.grid import load_sweep


def written(folder, content):
    path = folder / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


REFUSED = {
    "UTF-16": ("rounds: 3\n".encode("utf-16"), "not text in UTF-8: it looks like UTF-16"),
    "UTF-16 without a mark": ("rounds: 3\n".encode("utf-16-le"), "it looks like UTF-16"),
    "UTF-32": ("rounds: 3\n".encode("utf-32"), "it looks like UTF-16"),
    "Latin-1": ("rounds: 3\n# caf\xe9\n".encode("latin-1"), "byte 0xe9 in line 2 is not"),
    "nothing": ("", "is empty"),
    "comments only": ("# rounds: 3\n", "is empty"),
    "a list": ("[rounds]", "must be a mapping"),
    "a word": ("rounds", "must be a mapping"),
    "false": ("false", "must be a mapping"),
    "two documents": ("rounds: 3\n---\nrounds: 4\n", "not valid YAML"),
    "half a list": ("model: {widths: [8,", "not valid YAML"),
    "a control character": ("preset: \x07", "not valid YAML"),
    "brackets without end": ("[" * 1000, "nested too deeply"),
    "a key twice": (
        "rounds: 3\nseed: 1\nrounds: 4\n",
        "rounds stands twice, in line 1 and in line 3",
    ),
    "a key twice in a section": (
        "rounds: 3\nlocal:\n  steps: 1\n  eta: 1\n  steps: 2\n",
        r"local\.steps stands twice, in line 3 and in line 5",
    ),
    "a section twice": (
        "local: {eta: 1}\nlocal: {steps: 2}\n",
        "local stands twice, in line 1",
    ),
    "a quoted key twice": ("rounds: 3\n'rounds': 4\n", "rounds stands twice"),
    "a key twice in what is merged": (
        "local: {<<: {steps: 1, steps: 2}}\n",
        r"local\.steps stands twice",
    ),
    "a value in itself": ("local: &a\n  steps: *a\n", r"local\.steps contains itself \(line 1\)"),
    "code": ("preset: !!python/object:os.system {}", "has the tag .*python"),
    "a tag": ("rounds: !mine 3", r"rounds has the tag !mine.*line 1"),
    "a list as a key": ("? [a]\n: b\n", "a key that is not a word"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_preset_that_cannot_be_meant_is_refused_with_its_name_and_what_is_wrong(case, tmp_path):
    content, message = REFUSED[case]
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_sweep_is_read_with_the_same_rules_as_a_preset(case, tmp_path):
    content, message = REFUSED[case]
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_sweep(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_a_folder_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, why in (("folder.yaml", "Is a directory"), ("none.yaml", "No such file")):
        for load in (load_config, load_sweep):
            with pytest.raises(ConfigError, match=rf"{name} cannot be read: {why}"):
                load(str(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = written(tmp_path, "rounds: 3")
    path.chmod(0)
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read: Permission denied"):
        load_config(str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_or_without_a_byte_order_mark(encoding, tmp_path):
    path = written(tmp_path, "rounds: 3\ndata: {dir: /x/猫}\n".encode(encoding))
    config = load_config(str(path))
    assert (config.rounds, config.data.dir) == (3, "/x/猫")


def test_anchors_and_merge_keys_work_and_what_a_mapping_says_itself_counts(tmp_path):
    text = """
    local: &base {eta: 1e-2, steps: 5, batch: 8}
    ema: &other {decay: 0.5}
    model: {<<: [*base, *other], eta: 1e-3, widths: &w [8, 16]}
    data: {<<: *base, steps: 7}
    wire: *w
    """
    found = parse_yaml(text, "the text")
    assert found["model"] == {
        "eta": "1e-3", "steps": "5", "batch": "8", "decay": "0.5", "widths": ["8", "16"]
    }  # fmt: skip
    assert found["data"] == {"eta": "1e-2", "steps": "7", "batch": "8"}
    assert found["local"] == {"eta": "1e-2", "steps": "5", "batch": "8"}
    assert found["wire"] == ["8", "16"]


def test_scalars_are_the_text_that_stands_there_and_null_is_none(tmp_path):
    text = "on: on\na: 010\nb: 12:30\nc: 2024-01-02\nd: 1_0\ne: ~\nf:\ng: 'null'\nh: \"a #b\"\n"
    expected = {"on": "on", "a": "010", "b": "12:30", "c": "2024-01-02", "d": "1_0"}
    expected |= {"e": None, "f": None, "g": "null", "h": "a #b"}
    assert read_yaml(written(tmp_path, text), "file") == expected


def test_a_home_that_nobody_has_is_refused_with_the_key():
    for resolve in (expanded, absolute):
        with pytest.raises(ConfigError, match=r"data\.dir = '~nobody-here/x'.*absolute path"):
            resolve("~nobody-here/x", "data.dir")
    with pytest.raises(ConfigError, match=r"data\.dir = '~nobody-here/x'"):
        load_config("digits", {"data.dir": "~nobody-here/x"})


def test_a_path_that_is_none_is_refused_with_the_key():
    with pytest.raises(ConfigError, match=r"data\.dir = 'a\\x00b' is not a path"):
        load_config("digits", {"data.dir": "a\0b"})


NO_HOME = """
import os, sys
os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
os.environ.pop("FED_DIFFUSION_CACHE", None)
import pwd
def unknown(user):
    raise KeyError(user)
pwd.getpwuid = unknown  # as in a container whose user has no entry
import torch
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data.datasets import data_dir
from fed_diffusion.evaluation.cache import cached
print(load_config("digits", {"data.dir": "/x"}).data.dir)
print(cached("key", 2, lambda: torch.ones(2, 3)).sum().item())
for refused in (
    lambda: load_config("digits", {"data.dir": "~/x"}),
    lambda: data_dir(load_config("cifar10").data),
):
    try:
        refused()
    except ConfigError as error:
        print(error)
"""


def test_without_a_home_only_what_needs_one_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME], capture_output=True, text=True, check=True
    )
    first, features, typed, downloads = done.stdout.splitlines()
    assert (first, features) == ("/x", "6.0")
    assert "data.dir = '~/x' is not allowed" in typed
    assert "set HOME" in downloads
    assert "features are not cached" in done.stderr
