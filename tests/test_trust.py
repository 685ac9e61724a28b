"""What came over the network is never trusted: no pickle on any path, no torch.load of objects."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fed_diffusion", "server_app", "client_app")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def offences(source):
    """Imports of pickle's kin, and torch.load or numpy.load that would unpickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in PICKLES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield str(node.module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load" and given.get("weights_only") != "True":
                yield called
            if called in ("np.load", "numpy.load") and given.get("allow_pickle") == "True":
                yield called


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_unpickle(path):
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_what_would_unpickle_is_found(bad):
    assert list(offences(bad))
