"""What a pretrained start and an adapter are worth: digits 5 to 9 over ten unequal clients.

    python benchmarks/pretrained.py [--seeds 3] [--out runs/pretrained] [--rounds 10]

A small UNet2DModel is trained centrally on the digits 0 to 4 with the training loop of diffusers'
own documentation (DDPMScheduler.add_noise, mean squared error, AdamW). Then ten clients with the
keep ratios of `digits-unequal` train on the digits 5 to 9, from that network and from drawn values,
and FD is measured after some of the rounds. Then they train an adapter beside the same network, of
ranks 16, 16, 8, 8, 4, 4, 2, 2, 1 and 1, and of all 16, all 1, and with only the two of rank 16.
At last they train such adapters beside the network of a text-to-image pipeline with drawn weights,
on the latents of all digits and captions of their names; --only-text does this alone. Needs the
extras `diffusers` and `text`. Everything runs in one process; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # data.name below names this file as a module

from benchmarks.made import made  # noqa: E402
from fed_diffusion.build import Setup  # noqa: E402
from fed_diffusion.client.images import ClientImages  # noqa: E402
from fed_diffusion.config import Config, load_config  # noqa: E402
from fed_diffusion.config.schema import DataConfig  # noqa: E402
from fed_diffusion.data import ImageSet, load_dataset, to_unit  # noqa: E402
from fed_diffusion.evaluation.features import train_classifier  # noqa: E402
from fed_diffusion.evaluation.figures import frechet_distance  # noqa: E402
from fed_diffusion.generate import RunDir, Sampler  # noqa: E402
from tests.models.pipelines import save_text_pipeline  # noqa: E402

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SAMPLES, LOOKS = 500, (1, 2, 5, 10)
STEPS, BATCH, ETA = 2000, 32, 2e-3
"""Of the central training."""
BASE: dict[str, Any] = {
    "data.name": "benchmarks.pretrained:second_half",
    "data.size": 8,
    "data.channels": 1,
    "data.classes": 5,
    "model.conditional": False,
    "model.name": "diffusers",
    "pruning.kind": "random",
    "local.steps": 10,
    "local.state": "fresh",
    "wire.state": "fp32",
    "evaluation.samples": 0,
    "evaluation.sampler": "second_order_sde",
    "evaluation.steps": 19,
    "theory.every": 0,
}
KEEPS = [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]
RANKS: dict[str, dict[str, Any]] = {
    "16, 16, 8, 8, 4, 4, 2, 2, 1, 1": {"pruning.keep": KEEPS},
    "all 16": {"pruning.keep": 1.0},
    "all 1": {"pruning.keep": 1.0, "lora.rank": 1},
    "only the two 16s": {"pruning.keep": KEEPS, "pruning.baseline": "exclusive"},
}


def half(first: int) -> ImageSet:
    """The digits first to first + 4, with labels from 0."""
    whole = load_dataset(load_config("digits").data)
    assert whole.labels is not None
    chosen = torch.nonzero((whole.labels >= first) & (whole.labels < first + 5)).flatten()
    names = tuple(str(first + i) for i in range(5))
    return ImageSet(whole.images[chosen], whole.labels[chosen] - first, class_names=names)


def second_half(config: DataConfig) -> ImageSet:
    """The images of the federation, as data.name names them."""
    return half(5)


def pretrain(folder: Path) -> float:
    """Write a pipeline that was trained on the first half; return the last losses' mean."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**UNET)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=ETA)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    images, losses = to_unit(half(0).images), []
    for _ in range(STEPS):
        clean = images[torch.randint(len(images), (BATCH,))]
        noise = torch.randn_like(clean)
        levels = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        noisy = scheduler.add_noise(clean, noise, levels)
        wanted = scheduler.get_velocity(clean, noise, levels)
        loss = torch.nn.functional.mse_loss(unet(noisy, levels).sample, wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return statistics.mean(losses[-200:])


def run(config: Config, path: Path, look: Callable[[int], None] | None = None) -> None:
    """Train, as far as it is not done; `look` is called after each round."""
    began = time.process_time()
    made(config, path, processes=1, progress=lambda line: look and look(line["round"]))
    print(f"{path.name}: {time.process_time() - began:.0f} s of CPU", flush=True)


def distances(config: Config, path: Path, features: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """FD of the moving average after each round of LOOKS, which is kept beside the run."""
    kept = path.with_suffix(".json")
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    real = features(half(5).images)

    def look(round: int) -> None:
        if round in LOOKS:
            sampler = Sampler(RunDir(path).config(), RunDir(path).load_theta(ema=True))
            found[str(round)] = frechet_distance(features(sampler.sample(SAMPLES)), real)
            kept.write_text(json.dumps(found))

    run(config, path, look)
    return found


def held_out(path: Path) -> float:
    """The loss of a run's moving average on held-out images; see `loss_of`."""
    return loss_of(Setup.of(RunDir(path).config()), RunDir(path).load_theta(ema=True))


@torch.no_grad()
def loss_of(setup: Setup, theta: dict[str, torch.Tensor]) -> float:
    """The loss on the held-out images of all ten clients, with the same noise for every run."""
    images = ClientImages(setup, None, own=False)
    assert images.shares is not None
    index = torch.tensor([i for share in images.shares for i in share.held.tolist()]).repeat(20)
    x0, told = images.plain(index)
    return float(setup.loss(setup.network_with(theta), x0, torch.Generator().manual_seed(0), told))


def spread(values: list[float], digits: int) -> str:
    """The mean of the seeds and, in brackets, the least and the greatest."""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def starts(pipeline: Path, seeds: int, rounds: int, out: Path) -> None:
    """Print FD by round, from the pretrained network and from scratch."""
    every = load_dataset(load_config("digits").data)
    judge = train_classifier(every, 0)

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return judge.features(to_unit(images)).double()

    parts = pipeline / "unet" / "config.json", pipeline / "scheduler" / "scheduler_config.json"
    ways = {
        "pretrained": {"model.pretrained": str(pipeline)},
        "from scratch": {"model.config": str(parts[0]), "model.scheduler": str(parts[1])},
    }
    looks = [str(round) for round in LOOKS if round <= rounds]
    print("| start | " + " | ".join(f"round {r}" for r in looks) + " | held-out loss |")
    print("|---" * (len(looks) + 2) + "|", flush=True)
    for name, way in ways.items():
        found, losses = [], []
        for seed in range(seeds):
            more = {"seed": seed, "rounds": rounds}
            config = load_config("digits-unequal", BASE | way | more)
            path = out / f"{name.replace(' ', '-')}-seed{seed}"
            found.append(distances(config, path, features))
            losses.append(held_out(path))
        cells = [spread([one[r] for one in found], 2) for r in looks] + [spread(losses, 4)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    first, second = (features(half(start).images) for start in (0, 5))
    apart = frechet_distance(first, second)
    print(f"\nFD of the real images 0 to 4 to those of 5 to 9: {apart:.2f}")
    base = Setup.of(load_config("digits-unequal", BASE | ways["pretrained"]))
    print(f"Held-out loss of the pretrained network: {loss_of(base, base.theta()):.4f}")
    order = torch.randperm(len(second), generator=torch.Generator().manual_seed(0))
    one, two = second[order].chunk(2)
    floor = frechet_distance(one, two)
    print(f"FD of one half of the real images 5 to 9 to the other: {floor:.2f}", flush=True)


def text_of(folder: Path) -> dict[str, Any]:
    """Settings of a run of captions, beside a pipeline with drawn weights that is written here."""
    if not folder.exists():
        save_text_pipeline(folder)
    return {
        "data.name": "digits",
        "data.classes": None,
        "data.caption": "the digit {}",
        "evaluation.prompts": ["the digit 3"],
        "model.text": str(folder),
        "model.vae": str(folder),
    }


def adapters(
    pipeline: Path, seeds: int, rounds: int, out: Path, more: dict[str, Any] | None = None
) -> None:
    """Print held-out loss, bytes and the gap of adapters of several ranks."""
    base, label = BASE | (more or {}), "text-ranks" if more else "ranks"
    half_way = f"in round {rounds // 2}"
    print(f"\n| ranks | held-out loss | MB, both ways | gap in round 1 | {half_way} |")
    print("|---|---|---|---|---|", flush=True)
    for name, ranks in RANKS.items():
        losses, moved, gaps = [], 0.0, []
        for seed in range(seeds):
            own = {"seed": seed, "rounds": rounds, "model.pretrained": str(pipeline)}
            own |= {"lora.rank": 16, "pruning.kind": "ranks", "pruning.choice": "ordered"}
            path = out / f"{label}-{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            run(load_config("digits-unequal", base | own | ranks), path)
            losses.append(held_out(path))
            lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
            gaps.append([line["adapter_gap"]["relative"] for line in lines])
            moved = sum(line["bytes_up"] + line["bytes_down"] for line in lines) / 1e6
        first, last = ([gap[at] for gap in gaps] for at in (0, rounds // 2 - 1))
        cells = [spread(losses, 4), f"{moved:.1f}", spread(first, 3), spread(last, 3)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only-text", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seeds, rounds, base, drawn = arguments.seeds, arguments.rounds, out / "base", out / "drawn"
    if not arguments.only_text:
        if not base.exists():
            print(f"pretrained: loss {pretrain(base):.4f}", flush=True)
        starts(base, seeds, rounds, out)
        adapters(base, seeds, rounds, out)
    adapters(drawn, seeds, rounds, out, text_of(drawn))
    print(f"\n{time.process_time():.0f} s of CPU, torch {torch.__version__}")


if __name__ == "__main__":
    main()
