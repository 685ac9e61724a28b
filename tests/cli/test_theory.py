"""fed-diffusion plan: what it proposes, what it writes, what it refuses."""

import pytest
import yaml
from PIL import Image

from fed_diffusion.cli.main import main
from fed_diffusion.config import load_config
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS, kappa
from tests.cli.test_main import pairs
from tests.tiny import TINY

SMALL = pairs(clients=2, local__batch=4)


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    sgd = ["--set", "local.optimizer=sgd"]
    written = ["--apply", str(folder / "planned.yaml"), "--plot", str(folder / "moves.png")]
    assert main(["plan", "digits", *SMALL, *sgd, "--delta", "0.02", *written]) == 0
    return folder


def test_an_applied_plan_loads_and_keeps_its_own_constraint(planned):
    config = load_config(str(planned / "planned.yaml"))
    diffusion = config.diffusion
    u = PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K)
    gamma = u[:-1] - u[1:]
    assert (gamma <= kappa(u) * u[1:].clamp(max=1.0) * (1 + 1e-9)).all()
    assert diffusion.T >= 1
    assert diffusion.delta == 0.02
    assert diffusion.K == 1000
    assert diffusion.partition == "kappa_minimal"
    assert config.preset == "planned"


def test_an_applied_plan_is_otherwise_the_preset(planned):
    given = load_config("digits", dict(yaml_pairs(SMALL)) | {"local.optimizer": "sgd"})
    config = load_config(str(planned / "planned.yaml"))
    same = {"preset": None, "diffusion": None, "local": None}
    assert config.model_copy(update=same) == given.model_copy(update=same)
    assert 0 < config.local.eta != given.local.eta
    assert config.local.model_copy(update={"eta": 1.0}) == given.local.model_copy(
        update={"eta": 1.0}
    )
    # Lemma 4.6 allows at most 1 on the scale of F
    u = PARTITIONS["kappa_minimal"](config.diffusion.T, 0.02, 1000)
    assert config.local.eta <= DSMLoss(u).Z * 64


def yaml_pairs(arguments):
    for pair in arguments[1::2]:
        key, _, value = pair.partition("=")
        yield key, yaml.safe_load(value)


def test_the_plot_is_an_image(planned):
    with Image.open(planned / "moves.png") as image:
        assert min(image.size) > 100


def test_without_images_the_assumptions_are_named(tmp_path, capsys):
    out = tmp_path / "adam.yaml"
    arguments = ["--data-moment", "16", "--target", "4", "--apply", str(out)]
    assert main(["plan", "digits", *SMALL, "--set", "pruning.kind=random", *arguments]) == 0
    text = said(capsys)
    assert "No images were read: M2 = 16 is given" in text
    assert "is negative" in text  # the remark's T, explained
    assert "adam is not covered" in text
    assert "are of theta_0 alone, and the theorem's are the largest anywhere" in text
    for name in ("keep ratio", "N", "Gamma*", "K"):
        assert f"the bound by {name}" in text
    config = load_config(str(out))
    assert pytest.approx(1.498, abs=1e-3) == config.diffusion.T  # 1/2 log((64 + 16) / 4)
    assert config.local.eta == TINY["local.eta"]  # no eta for Adam


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "0"], "--target = 0.0"),
        (["--target", "nan"], "--target = nan"),
        (["--delta", "1"], "--delta = 1.0"),
        (["--data-moment", "65"], "--data-moment = 65"),
        (["--data-moment", "nan"], "--data-moment = nan"),
        (["--apply", "plan.txt"], "--apply = plan.txt"),
        (["--apply", "pyproject.yaml/plan.yaml"], "--apply = pyproject.yaml/plan.yaml"),
        (["--plot", "moves.gif"], "--plot = moves.gif"),
        (["--set", "diffusion.K=2"], "diffusion.K"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(arguments, says, capsys):
    assert main(["plan", "digits", *SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("seed: 1\n")
    assert main(["plan", "digits", "--apply", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "seed: 1\n"
