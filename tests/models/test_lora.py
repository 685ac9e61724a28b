"""An adapter beside a frozen network: exact under masks over its ranks, and only it travels."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fed_diffusion.build import Setup, build_network, new_network, parameters_of
from fed_diffusion.checks import check_training
from fed_diffusion.client.networks import Networks
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.export.folder import export
from fed_diffusion.generate import Sampler
from fed_diffusion.masks.channels import CHOICES
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.mask import kept_values, mask_of
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.models import lora
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.store.files import save_tensors
from fed_diffusion.store.rundir import RunDir
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.models.pipelines import save_pipeline
from tests.models.test_from_diffusers import models
from tests.test_engines import same_bits
from tests.tiny import TINY

ADAPTED = TINY | {"model.attention": [4], "model.head": 8, "lora.rank": 8, "lora.alpha": 24}
KEEP = [1, 1, 0.5, 0.25, 0.125]
UNEQUAL = {"pruning__kind": "ranks", "pruning__keep": KEEP}


def random_values(network, seed=0):
    """Values of a network in training: not even what starts at 0 is 0."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=noise) * 0.2 + ("norm" in name)
        for name, value in parameters_of(network).items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = load_config("digits", TINY | {"model.attention": [4], "model.head": 8})
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_tensors(path, random_values(new_network(config)), {"format": "pt"})
    return str(path)


def adapted(base, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("digits", ADAPTED | {"model.start": base} | dotted)


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def batch():
    noise = torch.Generator().manual_seed(1)
    x = torch.randn((3, 1, 8, 8), generator=noise)
    return x, torch.rand(3, generator=noise, dtype=torch.float64) * 3 + 0.05


def output_and_gradients(network):
    network.eval()
    out = network(*batch())
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    found = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad()
    return out.detach(), found


def test_a_new_adapter_changes_nothing_and_theta_is_the_adapter_alone(base):
    network = build_network(adapted(base))
    plain = build_network(adapted(base, lora__rank=None, lora__alpha=None))
    assert torch.equal(network(*batch()), plain(*batch()))
    theta = parameters_of(network)
    assert {name.rpartition(".")[2] for name in theta} == {"lora_A", "lora_B"}
    layers = [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(theta) == 2 * len(layers)
    assert theta["enter.lora_A"].shape == (8, 1, 3, 3)
    assert theta["enter.lora_B"].shape == (8, 8, 1, 1)
    again = parameters_of(build_network(adapted(base)))
    assert all(torch.equal(theta[name], again[name]) for name in theta)
    other = parameters_of(build_network(adapted(base, seed=1)))
    assert not torch.equal(theta["enter.lora_A"], other["enter.lora_A"])
    bound = 9**-0.5
    assert 0.8 * bound < float(theta["enter.lora_A"].abs().max()) <= bound


def test_a_layer_computes_with_w_plus_alpha_over_r_times_b_a(base):
    network = build_network(adapted(base, lora__targets=["conv1", "query", "time.0"]))
    plain = build_network(adapted(base, lora__rank=None, lora__alpha=None))
    theta = parameters_of(network)
    for name, value in random_values(network).items():
        theta[name].copy_(value)
    layers = {name.rpartition(".")[0] for name in theta}
    assert {name.rpartition(".")[2] for name in layers} == {"conv1", "query", "0"}
    for name in layers:
        weight = plain.get_submodule(name).weight.detach()
        a, b = (theta[f"{name}.lora_{factor}"].double().flatten(1) for factor in "AB")
        weight += (24 / 8 * b @ a).view_as(weight)
    torch.testing.assert_close(network(*batch()), plain(*batch()), atol=1e-4, rtol=1e-4)
    names = dict(plain.named_parameters())
    found = lora.merged(network, names)
    assert found.keys() == names.keys()
    for name, value in names.items():
        torch.testing.assert_close(found[name], value)


@pytest.fixture(scope="module")
def resident(base):
    """lora.train -> a client's networks and a network of the whole adapter."""

    def made(train):
        setup = Setup.of(adapted(base, pruning__kind="ranks", lora__train=train))
        return setup, Networks(setup), setup.network()

    return {train: made(train) for train in ("AB", "B")}


@given(
    train=st.sampled_from(["AB", "B"]),
    choice=st.sampled_from(CHOICES),
    ranks=st.integers(1, 7),
    round=st.integers(1, 20),
    client=st.integers(0, 9),
    seed=st.integers(0, 100),
)
@settings(max_examples=30)
def test_the_small_adapter_is_the_masked_one_in_outputs_and_gradients(
    resident, train, choice, ranks, round, client, seed
):
    setup, networks, whole = resident[train]
    pruning = setup.config.pruning.model_copy(update={"choice": choice})
    family = type(setup.family)(pruning, seed)
    theta = random_values(whole, seed)
    keeps = {client: ranks / 8}
    (recipe,) = plan_round(family, "ranks", round, keeps, theta, setup.layout).values()
    masks = derive(family, recipe, theta, setup.layout)
    masked = {n: v - mask_of(masks, n, v).drop(v) for n, v in theta.items()}
    for name, value in parameters_of(whole).items():
        value.copy_(masked[name])
    small, _, _ = networks.holding(kept_values(theta, masks), masks)
    assert all(v.shape[0 if n.endswith("A") else 1] == ranks for n, v in small.named_parameters())
    (out, gradients), (expected, whole_gradients) = map(output_and_gradients, (small, whole))
    torch.testing.assert_close(out, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-6)
    norm = sum(float(g.norm()) ** 2 for g in whole_gradients.values()) ** 0.5
    for name, gradient in gradients.items():
        kept = mask_of(masks, name, theta[name]).take(whole_gradients[name])
        assert float((gradient - kept).norm()) < 1e-6 * norm


def test_a_ratio_keeps_so_many_ranks_of_every_layer(base):
    layout = Setup.of(adapted(base, pruning__kind="ranks", lora__rank=10)).layout
    for keep, ranks in ((0.1, 1), (0.3, 3), (0.7, 7), (0.05, 1), (1.0, 10)):
        assert set(layout.counts(keep).values()) == {ranks}
    with pytest.raises(ConfigError, match=r"leaves none of the adapter's ranks \(lora\.rank = 8"):
        check_training(adapted(base, pruning__kind="ranks", pruning__keep=0.01))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapted") / "run"
    simulate(adapted(base, **UNEQUAL), path, processes=1)
    return path


def test_only_kept_ranks_travel_and_a_client_sends_the_bytes_of_its_ranks(run):
    (line, *_) = lines_of(run)
    sent = {client["client"]: client for client in line["clients"]}
    values = sum(value.numel() for value in RunDir.open(run).load_theta(ema=False).values())
    for client, keep in enumerate(KEEP):
        assert sent[client]["keep"] == pytest.approx(keep)
        assert abs(sent[client]["bytes_up"] - 4 * values * keep) < 400
    assert line["gamma"] == 2  # the last ranks have two trainers
    assert line["coverage"] == {
        "2": values // 2,
        "3": values // 4,
        "4": values // 8,
        "5": values // 8,
    }


def test_a_run_of_an_adapter_is_the_same_bits_through_flowers_messages(base, run, tmp_path):
    """A node that names its own copy of the base takes that one."""
    copied = shutil.copy(base, tmp_path / "copy.safetensors")
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    nodes[1]["base"] = str(copied)
    experiment = Experiment(adapted(base, **UNEQUAL), tmp_path / "run")
    FedDiffusion(experiment).run(LocalGrid(nodes))
    assert same_bits(run, tmp_path / "run")
    gaps = [[line["adapter_gap"] for line in lines_of(path)] for path in (run, tmp_path / "run")]
    assert gaps[0] == gaps[1]


def test_an_adapter_has_the_same_bits_where_the_server_learns_sums_alone(base, run, tmp_path):
    secret = adapted(base, **UNEQUAL, secure__aggregation=True, secure__least=2)
    simulate(secret, tmp_path / "run", processes=1)
    assert same_bits(run, tmp_path / "run")
    assert [line["withheld"] for line in lines_of(tmp_path / "run")] == [0, 0]


def test_a_node_whose_base_is_another_one_is_refused_with_both_hashes(base, tmp_path):
    other = tmp_path / "other.safetensors"
    save_tensors(other, {n: v + 1 for n, v in load_file(base).items()}, {"format": "pt"})
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    nodes[1]["base"] = str(other)
    experiment = Experiment(adapted(base, **UNEQUAL), tmp_path / "run")
    ((_, _, reason), *_) = FedDiffusion(experiment)._meet(LocalGrid(nodes)).refusals(range(2))
    experiment.close()
    assert "holds other values than model.start_hash" in reason


def test_a_resumed_run_ends_with_the_same_bits(base, run, tmp_path, digits):
    experiment = Experiment(adapted(base, **UNEQUAL), tmp_path / "run")
    worker = Worker(experiment.setup, digits)
    for task in experiment.tasks(1):
        experiment.receive(worker.run(task))
    experiment.close_round()
    experiment.close()
    run_in_process(Experiment.resume(tmp_path / "run"), processes=1)
    assert same_bits(run, tmp_path / "run")


def test_the_gap_in_the_record_is_that_of_the_updates(base, digits):
    """Recomputed from dense products of what each worker sent."""
    config = adapted(base, **UNEQUAL)
    setup = Setup.of(config)
    worker, coordinator = Worker(setup, digits), Coordinator(setup, setup.theta())
    names = [name.removesuffix(".lora_A") for name in coordinator.theta if name.endswith("lora_A")]
    products, counts, factors = {}, {}, {}
    for task in coordinator.tasks(1):
        update = worker.run(task)
        ranks = int(8 * KEEP[task.client])
        sent = update.payload.arrays
        for name in names:
            shapes = [coordinator.theta[f"{name}.lora_{f}"].shape for f in "AB"]
            a = (
                torch.frombuffer(bytearray(sent[f"{name}.lora_A"].data), dtype=torch.float32)
                .view(ranks, -1)
                .double()
            )
            b = (
                torch.frombuffer(bytearray(sent[f"{name}.lora_B"].data), dtype=torch.float32)
                .view(-1, ranks)
                .double()
            )
            stack = products.setdefault(name, torch.zeros(8, shapes[1][0], a.shape[1]).double())
            stack[:ranks] += b.T[:, :, None] * a[:, None, :]
            mean = factors.setdefault(
                name, [torch.zeros(8, a.shape[1]).double(), torch.zeros(shapes[1][0], 8).double()]
            )
            mean[0][:ranks] += a
            mean[1][:, :ranks] += b
            counts.setdefault(name, torch.zeros(8).double())[:ranks] += 1
        coordinator.receive(update)
    found = coordinator.close_round().adapter_gap
    gap = norm = 0.0
    for name in names:
        n = counts[name]
        product = (products[name] / n[:, None, None]).sum(0)
        apart = product - (factors[name][1] / n) @ (factors[name][0] / n[:, None])
        gap, norm = gap + float(apart.square().sum()), norm + float(product.square().sum())
    assert found["absolute"] == pytest.approx(24 / 8 * gap**0.5, rel=1e-9)
    assert found["relative"] == pytest.approx((gap / norm) ** 0.5, rel=1e-9)
    assert found["relative"] > 0


def test_with_a_frozen_the_average_is_exact_and_a_does_not_travel(base, tmp_path):
    config = adapted(base, lora__train="B", pruning__choice="rolling", **UNEQUAL)
    results = simulate(config, tmp_path / "run", processes=1)
    run = RunDir.open(tmp_path / "run")
    assert all(name.endswith("lora_B") for name in run.load_theta(ema=False))
    assert all(line["adapter_gap"] is None for line in lines_of(run.path))
    assert results["loss"] > 0
    one, two = (Setup.of(config).network(started=False) for _ in range(2))
    rows = [dict(one.named_buffers()), dict(two.named_buffers())]
    assert torch.equal(rows[0]["enter.lora_A"], rows[1]["enter.lora_A"])


def test_an_export_has_the_adapter_in_it_and_starts_a_run(base, run, tmp_path):
    folder = export(RunDir.open(run), tmp_path / "out", weights="theta")
    theta = RunDir.open(run).load_theta(ema=False)
    merged = load_config(
        "digits",
        TINY
        | {"model.attention": [4], "model.head": 8}
        | {"model.start": str(folder / "model.safetensors")},
    )
    check_training(merged)
    with_adapter = Sampler(adapted(base), theta).network
    torch.testing.assert_close(
        build_network(merged).eval()(*batch()), with_adapter(*batch()), atol=1e-5, rtol=1e-5
    )
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.enter.lora_B.weight"], theta["enter.lora_B"])
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (8, 24)
    assert "LoRA of rank 8" in (folder / "README.md").read_text()


def test_a_run_whose_base_is_another_one_by_now_is_refused(base, run, tmp_path):
    config = RunDir.open(run).config()
    other = tmp_path / "other.safetensors"
    save_tensors(other, {n: v + 1 for n, v in load_file(base).items()}, {"format": "pt"})
    model = config.model.model_copy(update={"start": str(other)})
    with pytest.raises(ConfigError, match=r"other values than model\.start_hash"):
        Worker(config.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__rank": None}, r"lora\.alpha: it describes an adapter"),
        ({"lora__rank": 0}, r"lora\.rank = 0"),
        ({"model__start": None}, r"name it in model\.start or model\.pretrained"),
        ({"pruning__kind": "channels", "pruning__keep": 0.5}, r"use ranks"),
        (
            {"pruning__kind": "balanced", "pruning__unit": "channels", "pruning__keep": 0.5},
            r"use ranks",
        ),
        (
            {"pruning__kind": "ranks", "pruning__level": "S", "pruning__baseline": "small"},
            r"set a smaller lora\.rank",
        ),
        ({"pruning__kind": "ranks", "pruning__budget": "auto"}, r"budget: auto needs masks"),
        (
            {"lora__rank": None, "lora__alpha": None, "pruning__kind": "ranks"},
            r"give its lora\.rank",
        ),
        ({"lora__targets": ["conv9"]}, r"'conv9' is no linear layer.*conv1, conv2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_training(adapted(base, **changes))


def test_an_adapter_is_no_start_for_a_network(run):
    with pytest.raises(ConfigError, match=r"trained an adapter \(lora\.rank\)\. Export it"):
        check_training(
            load_config(
                "digits",
                TINY | {"model.attention": [4], "model.head": 8, "model.start": str(run)},
            )
        )


@models
def test_an_adapter_beside_a_network_of_diffusers_goes_out_as_pipeline_and_as_pefts_adapter(
    tmp_path,
):
    """What peft makes of the base and the adapter is the exported pipeline."""
    peft = pytest.importorskip("peft")
    import diffusers

    folder = save_pipeline(tmp_path / "in")
    settings = {"model.name": "diffusers", "model.pretrained": str(folder)}
    settings |= {"lora.rank": 4, "lora.alpha": 2, "pruning.kind": "ranks"}
    settings |= {
        "lora.targets": ["to_q", "to_out.0", "conv1"],
        "pruning.keep": [1, 1, 0.5, 0.5, 0.25],
    }
    config = load_config("digits", TINY | settings)
    simulate(config, tmp_path / "run", processes=1)
    run = RunDir.open(tmp_path / "run")
    out = export(run, tmp_path / "out")
    merged = diffusers.DiffusionPipeline.from_pretrained(out).unet
    base = diffusers.DiffusionPipeline.from_pretrained(folder).unet
    x, j = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    before = base(x, j).sample
    with_adapter = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    with torch.no_grad():
        expected = merged(x, j).sample
        torch.testing.assert_close(with_adapter(x, j).sample, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, expected)
    ours = Sampler.from_run(tmp_path / "run").network
    u = ours.levels[j]
    torch.testing.assert_close(ours(x, u), expected, atol=1e-4, rtol=1e-4)
