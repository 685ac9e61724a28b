"""The U-Net."""

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.diffusion.process import alpha, per_image, sigma
from fed_diffusion.models.unet import UNet


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def awake(network):
    """Zero-initialised layers given values, so that every path counts."""
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return network


@pytest.mark.parametrize("attention", [(), (8,), (4, 8)])
@pytest.mark.parametrize("classes", [None, 3])
def test_output_has_the_shape_of_the_input_and_every_parameter_a_gradient(attention, classes):
    network = awake(UNet(3, 8, (16, 32), blocks=2, attention=attention, head=8, classes=classes))
    x, u = torch.randn(2, 3, 8, 8), torch.tensor([0.01, 3.0], dtype=torch.float64)
    labels = torch.tensor([0, 2]) if classes else None
    out = network(x, u, labels)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_normalisation_groups_have_a_fixed_size():
    network = UNet(1, 8, (16, 48), group=8)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_channels // m.num_groups for m in norms} == {8}


def test_a_level_change_has_a_shortcut_of_its_own_even_at_equal_width():
    network = UNet(1, 8, (16, 16), blocks=2)
    kinds = [isinstance(s.block.shortcut, torch.nn.Conv2d) for s in network.down]
    assert kinds == [False, False, True, False]


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_v_and_x0_predictions_are_converted_to_the_same_noise(prediction):
    """A network that outputs the true v (or x0) must come out as the true eps."""
    torch.manual_seed(0)
    x0, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    u = torch.tensor([0.01, 0.1, 1.0, 4.0], dtype=torch.float64)
    a, s = per_image(alpha(u), x0), per_image(sigma(u), x0)
    target = a * eps - s * x0 if prediction == "v" else x0
    network = UNet(1, 8, (8,), prediction=prediction)
    network._network = lambda x, time: target
    torch.testing.assert_close(network(a * x0 + s * eps, u), eps, atol=2e-5, rtol=1e-4)


def test_a_missing_label_is_the_label_of_no_class():
    network = awake(UNet(1, 8, (8,), classes=3)).eval()
    x, u = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(network(x, u), network(x, u, torch.tensor([3, 3])))
    assert not torch.equal(network(x, u), network(x, u, torch.tensor([0, 1])))


def test_ddpms_layout_has_35_7_million_parameters():
    """Ho et al.: 35,746,307; our two extra 1x1 shortcuts at equal width add 131,584."""
    config = load_config("digits", {"data.name": "cifar10", **DDPM})
    with torch.device("meta"):
        network = build_network(config)
    assert parameters(network) == 35_746_307 + 131_584


DDPM = {
    "model.widths": [128, 256, 256, 256],
    "model.blocks": 2,
    "model.attention": [16],
    "model.head": 256,
    "model.conditional": False,
}


def test_the_same_seed_gives_the_same_initial_parameters_whatever_was_drawn_before():
    config = load_config("digits")
    first = parameters_of(build_network(config))
    torch.rand(7)
    second = parameters_of(build_network(config))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_many_levels_for_the_image_are_refused():
    with pytest.raises(ConfigError, match=r"model\.widths.*multiple of 16"):
        build_network(load_config("digits", {"model.widths": [8, 8, 8, 8, 8]}))


def test_a_network_of_ones_own_comes_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, model, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(channels))\n"
        "    def forward(self, x, u, labels=None):\n"
        "        return x * self.scale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = build_network(load_config("digits", {"model.name": "own_net:Net"}))
    assert parameters_of(network)["scale"].shape == (1,)


def test_a_network_that_cannot_be_imported_is_refused():
    with pytest.raises(ConfigError, match=r"model\.name = 'no_such:Net'"):
        build_network(load_config("digits", {"model.name": "no_such:Net"}))
