"""A part of the user's own that does not keep to its contract is refused before any compute."""

import pytest

from fed_diffusion.aggregation.named import AGGREGATORS
from fed_diffusion.build import time_grid
from fed_diffusion.checks import check, check_training
from fed_diffusion.config import ConfigError, load_config, parse_pairs
from fed_diffusion.config.names import is_own, names_own_parts
from fed_diffusion.data import partition
from fed_diffusion.data.partition import splits
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.evaluation.judge import BUILT_IN
from fed_diffusion.report.trackers import TRACKERS
from fed_diffusion.server.optimizers import NONE, OPTIMIZERS
from tests.tiny import TINY

SOURCE = """
import numpy as np, torch
from fed_diffusion import Coverage

def shrunk(score, y, u, *, generator=None, denoise=False, callback=None):
    return y[:, :, :-1]
def exploding(score, y, u, *, generator=None, denoise=False, callback=None):
    return y / 0
def careless(score, y, u, *, generator=None, denoise=False, callback=None):
    return y.mul_(0.5)
def forgetful(score, y, u):
    return y

def short(T, delta, K):
    return torch.linspace(T, delta, K, dtype=torch.float64)
def single(T, delta, K):
    return torch.linspace(T, delta, K + 1)
def rising(T, delta, K):
    return torch.linspace(delta, T, K + 1, dtype=torch.float64)
def listed(T, delta, K):
    return [T, delta]
def fussy(T, delta, K):
    raise ValueError("K must be a prime")
def broken(*_):
    return 1 / 0

def all_to_each(dataset, clients, draw):
    return [np.arange(len(dataset))] * clients
def to_one(dataset, clients, draw):
    return [np.arange(len(dataset)), *[np.array([], int)] * (clients - 1)]
def to_few(dataset, clients, draw):
    return [np.arange(len(dataset))]
def beyond(dataset, clients, draw):
    return np.split(np.arange(clients) + len(dataset), clients)
def masks(dataset, clients, draw):
    return [np.ones(len(dataset), bool)] * clients

class Flat(torch.nn.Module):
    def __init__(self, model, channels, size, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, u, labels=None):
        return (x * self.weight).flatten(1)
class Empty(torch.nn.Module):
    def __init__(self, model, channels, size, classes):
        super().__init__()
    def forward(self, x, u, labels=None):
        return x

class Uncounted:
    def __init__(self, theta, workers, settings):
        self.theta, self.coverage = theta, Coverage(theta, workers)
    def add(self, values, masks=None, weight=1.0): pass
    def result(self): return self.theta
class Counting(Uncounted):
    def add(self, values, masks=None, weight=1.0): self.coverage.add(masks or {})
class Double(Counting):
    def result(self): return {n: v.double() for n, v in self.theta.items()}
class Sum(Counting):
    def result(self): return {n: v + 1 for n, v in self.theta.items()}
class Exploding(Counting):
    def result(self): return {n: v / 0 for n, v in self.theta.items()}

class Nameless:
    sha256 = "0"
    def __init__(self, config, device): pass
class Blind(Nameless):
    name = "blind"
    def __call__(self, images): return None
class Summing(Blind):
    def __call__(self, images): return images.float().mean((1, 2)), images.sum()[None, None]

class Waits:
    overlapping = False
    def __init__(self, config): pass
    def target(self, eligible): return 2 * eligible
    def quorum(self, eligible): return 1
    def ask(self, round, free, eligible): return free
    def weight(self, staleness): return 1.0
class Asks(Waits):
    def target(self, eligible): return 1
    def ask(self, round, free, eligible): return [0, eligible]
class Sleeps(Asks):
    def ask(self, round, free, eligible): return []
class Demands(Asks):
    def quorum(self, eligible): return 2
class Amplifies(Asks):
    overlapping = True
    def ask(self, round, free, eligible): return free
    def weight(self, staleness): return 1.0 + staleness
class Overlaps(Amplifies):
    def weight(self, staleness): return 1.0

class Still:
    start = {"m": 0.0}
    def __init__(self, settings): self.eta = settings.eta
    def step(self, delta, state): return delta, {"m": state["m"]}
class Single(Still):
    def step(self, delta, state): return delta.float(), dict(state)
class Explodes(Still):
    def step(self, delta, state): return delta / 0, dict(state)
class Forgets(Still):
    def step(self, delta, state): return delta, {}
class Writes(Still):
    def step(self, delta, state): return delta, {"m": state["m"].add_(delta)}
class Shrinks(Still):
    def step(self, delta, state): return delta, {"m": state["m"].sum()}
class Hides(Still):
    steps = 0
    def step(self, delta, state):
        self.steps += 1
        return delta / self.steps, dict(state)
class Dotted(Still):
    start = {"m.n": 0.0}
class Fussy(Still):
    def __init__(self, settings): raise ValueError("give server.eta")

MODULE = 3
"""
REFUSED = {
    "a sampler of other shapes": (
        "evaluation.sampler",
        "shrunk",
        r"returns torch.float32 \[2, 1, 7",
    ),
    "a sampler that explodes": ("evaluation.sampler", "exploding", "not finite"),
    "a sampler that writes": ("evaluation.sampler", "careless", "changes y, the start"),
    "a sampler without options": ("evaluation.sampler", "forgetful", "unexpected keyword"),
    "a sampler that is no function": ("evaluation.sampler", "MODULE", "not callable"),
    "times too few": ("diffusion.partition", "short", r"float64 \[21\]"),
    "times in single precision": ("diffusion.partition", "single", r"float32 \[21\], not"),
    "times that rise": ("diffusion.partition", "rising", "do not fall strictly from T = 4.13"),
    "times in a list": ("diffusion.partition", "listed", "returns list"),
    "times that cannot be": ("diffusion.partition", "fussy", ": K must be a prime"),
    "times that fail": ("diffusion.partition", "broken", "failed with ZeroDivisionError"),
    "images held by all": ("data.partition", "all_to_each", "image 0 is given out more than once"),
    "clients without images": ("data.partition", "to_one", r"client 1 is int64 \[0\]"),
    "too few parts": ("data.partition", "to_few", "1 parts for clients = 5"),
    "images that are not there": ("data.partition", "beyond", "there are images 0 to 1796"),
    "parts that are masks": ("data.partition", "masks", "client 0 is bool"),
    "a split that fails": ("data.partition", "broken", "failed with ZeroDivisionError"),
    "a network of other shapes": (
        "model.name",
        "Flat",
        r"returns \[2, 64\] for images of \[2, 1, 8",
    ),
    "a network without parameters": ("model.name", "Empty", "nothing to train"),
    "a network that is none": ("model.name", "dict", "no attribute 'dict'"),
    "a judge without a name": ("evaluation.extractor", "Nameless", "its name is None"),
    "a judge that sees nothing": ("evaluation.extractor", "Blind", "returns a NoneType"),
    "a judge of whole batches": ("evaluation.extractor", "Summing", r"its logits of 2 images"),
    "an aggregator that is not there": ("round.aggregation", "Nobody", "no attribute 'Nobody'"),
    "an aggregator that counts nobody": ("round.aggregation", "Uncounted", "its coverage does not"),
    "an aggregator in double precision": ("round.aggregation", "Double", "float64.*as theta does"),
    "an aggregator that moves alone": ("round.aggregation", "Sum", "without any update"),
    "an aggregator that divides by 0": ("round.aggregation", "Exploding", "is not finite"),
    "an aggregator that is none": ("round.aggregation", "MODULE", "not callable"),
    "a server step in single precision": (
        "server.optimizer",
        "Single",
        r"its step is torch.float32",
    ),
    "a server step that explodes": ("server.optimizer", "Explodes", "its step is not finite"),
    "a server step that forgets": ("server.optimizer", "Forgets", r"its state has the names \[\]"),
    "a server step that writes": ("server.optimizer", "Writes", "it changes its arguments"),
    "a server state of other shapes": (
        "server.optimizer",
        "Shrinks",
        r"its m is torch.float64 \[\]",
    ),
    "a server step that hides state": ("server.optimizer", "Hides", "must be in `state` alone"),
    "a server state with a dot": ("server.optimizer", "Dotted", "must map names of variables"),
    "a server step that refuses": ("server.optimizer", "Fussy", "ValueError: give server.eta"),
    "a server step that is none": ("server.optimizer", "MODULE", "not callable"),
    "a server step that is not there": ("server.optimizer", "Nobody", "no attribute 'Nobody'"),
    "a policy that waits for ever": ("round.mode", "Waits", r"target\(5\) is 10, not a whole"),
    "a policy that asks a stranger": ("round.mode", "Asks", r"asks clients \[5\], which are not"),
    "a policy that asks nobody": ("round.mode", "Sleeps", "names no client"),
    "a policy that demands too much": ("round.mode", "Demands", r"quorum\(5\) is 2, .* 1 to 1"),
    "a policy that amplifies": ("round.mode", "Amplifies", r"weight\(1\) is 2.0"),
    "a policy without differences": ("round.mode", "Overlaps", "set wire.differences to true"),
    "a policy that is not there": ("round.mode", "Nobody", "no attribute 'Nobody'"),
    "a tracker that is not there": ("trackers", "Nobody", "no attribute 'Nobody'"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda key, name, **more: load_config(
        "digits", TINY | {"evaluation.samples": 20, key: f"own_parts:{name}"} | more
    )


@pytest.mark.parametrize("case", REFUSED)
def test_a_part_that_breaks_its_contract_is_refused_with_its_setting(case, own, digits):
    key, name, says = REFUSED[case]
    with pytest.raises(ConfigError, match=says) as caught:
        check(own(key, name), digits)
    assert str(caught.value).startswith(f"{key} = 'own_parts:{name}'")


def test_times_of_ones_own_are_the_samplers_too(own, tmp_path):
    (tmp_path / "own_times.py").write_text(
        "import torch\n"
        "def cubic(T, delta, K):\n"
        "    u = torch.linspace(T ** (1 / 3), delta ** (1 / 3), K + 1, dtype=torch.float64) ** 3\n"
        "    u[0], u[-1] = T, delta\n"
        "    return u\n"
    )
    config = load_config("digits", TINY | {"diffusion.partition": "own_times:cubic"})
    check_training(config)
    assert (len(time_grid(config.diffusion)), len(time_grid(config.diffusion, 7))) == (21, 8)
    assert time_grid(config.diffusion, 7).tolist() == pytest.approx(
        [((1 - k / 7) * 4.13 ** (1 / 3) + k / 7 * 0.1) ** 3 for k in range(8)]
    )


def test_a_split_of_ones_own_may_leave_images_out(own, tmp_path, digits):
    (tmp_path / "own_few.py").write_text(
        "def few(dataset, clients, draw): return [[9, 2], [5], [3], [1], [0]]\n"
    )
    config = load_config("digits", TINY | {"data.partition": "own_few:few"})
    parts = partition(digits, config.data, config.clients, config.seed)
    assert [part.tolist() for part in parts] == [[2, 9], [5], [3], [1], [0]]


WORDS = {
    "data.partition": lambda: splits(load_config("digits").data),
    "diffusion.partition": lambda: PARTITIONS,
    "evaluation.extractor": lambda: BUILT_IN,
    "trackers": lambda: TRACKERS,
    "round.aggregation": lambda: AGGREGATORS,
    "server.optimizer": lambda: {NONE: None, **OPTIMIZERS},
}


@pytest.mark.parametrize("key", WORDS)
def test_a_setting_knows_the_words_that_are_built_in_and_no_others(key):
    built_in = WORDS[key]()
    for word in built_in:
        load_config("digits", {"local.state": "fresh", key: word})
    nearly = next(iter(built_in))[:-1]
    allowed = f"Allowed: {', '.join(built_in)}, or module:attribute for one of your own."
    with pytest.raises(ConfigError) as caught:
        load_config("digits", {key: nearly})
    hint = f"Did you mean {next(iter(built_in))!r}? "
    assert str(caught.value) == f"{key} = {nearly!r} is unknown. {hint}{allowed}"


@pytest.mark.parametrize(
    ("name", "so"),
    [
        ("a:b", True),
        ("a.b.c:D.e", True),
        ("_a1:b_2", True),
        ("a", False),
        ("a:", False),
        (":b", False),
        ("a:b:c", False),
        ("a b:c", False),
        ("cuda:1", False),
        ("localhost:6379", False),
        ("/data/a:b", False),
        ("a..b:c", False),
    ],
)
def test_a_name_of_ones_own_is_module_colon_attribute(name, so):
    assert is_own(name) == so


@pytest.mark.parametrize(
    "own",
    [
        {"data.partition": "mine:split"},
        {"diffusion.partition": "mine:times"},
        {"evaluation.extractor": "mine:Judge"},
        {"evaluation.sampler": "mine:heun"},
        {"model.name": "mine:Net"},
        {"data.name": "mine:load"},
        {"trackers": ["csv", "mine:Diary"]},
        {"round.aggregation": "mine:Mean", "local.state": "fresh"},
        {"server.optimizer": "mine:Lion"},
    ],
)
def test_the_flower_engine_is_told_of_modules_whichever_setting_names_them(own):
    assert names_own_parts(load_config("digits", own))
    plain = {"worker.device": "cuda:1", "flower.ray_address": "localhost:6379", "data.dir": "a:b"}
    assert not names_own_parts(load_config("digits", plain))


def test_a_list_of_texts_is_typed_in_brackets_and_one_alone_without():
    def typed(*pairs):
        return load_config("digits", parse_pairs(pairs))

    assert typed("trackers=[csv, mine:Diary]").trackers == ("csv", "mine:Diary")
    assert typed("trackers=csv").trackers == ("csv",)
    assert typed("trackers=[]").trackers == ()
    assert typed("data.class_names=[no, 010]").data.class_names == ("no", "010")
    with pytest.raises(ConfigError, match=r"trackers = \['csv', 'csv'\].*'csv' is given twice"):
        typed("trackers=[csv, csv]")
