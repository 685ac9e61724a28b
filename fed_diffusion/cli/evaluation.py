"""fed-diffusion evaluate | features train: the commands about quality figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.output import say
from fed_diffusion.config import ConfigError, build_config, read_value
from fed_diffusion.config.yaml import absolute
from fed_diffusion.store.files import check_writable

if TYPE_CHECKING:
    from fed_diffusion.store.rundir import RunDir


def add_commands(commands: Any) -> None:
    """Add them to the sub-parsers of `fed-diffusion`."""
    evaluate = commands.add_parser("evaluate", help="sample and measure a trained run again")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("--samples", type=int, metavar="N", help="how many images to generate")
    evaluate.add_argument("--reference", help="data, train, test or a folder of images")
    evaluate.add_argument(
        "--extractor",
        metavar="NAME",
        action="append",
        help="as evaluation.extractor; again for each further one",
    )
    evaluate.add_argument(
        "--weights",
        help="a file of the extractor's weights, or as evaluation.weights: {NAME: FILE, ...}",
    )
    evaluate.set_defaults(command=evaluate_command)

    features = commands.add_parser("features", help="extractors of one's own")
    actions = features.add_subparsers(required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train a classifier as an extractor, once")
    train.add_argument(
        "dataset",
        metavar="DATASET",
        help="cifar10, svhn, fashion_mnist, mnist, digits, image_folder or your_module:function",
    )
    train.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    train.add_argument("--data-dir", help="where its files are")
    train.add_argument("--size", type=int, help="for image_folder: the side in pixels")
    train.add_argument("--channels", type=int, help="for image_folder: 1 or 3")
    background = "for image_folder: what transparent pixels are laid over"
    train.add_argument("--background", choices=("white", "black"), help=background)
    train.add_argument("--flip", action="store_true", help="mirror images at random in training")
    train.add_argument("--epochs", type=int, default=10)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    train.set_defaults(command=features_train_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Measure quality again, write it to results.json and the report, and print it."""
    from fed_diffusion.generate import RunDir

    run = RunDir.open(arguments.run)
    with run.locked():
        quality = _measure_again(run, arguments)
    say(json.dumps(quality, indent=2))
    return 0


def _measure_again(run: RunDir, arguments: argparse.Namespace) -> dict[str, Any]:
    from fed_diffusion.data import content_hash, load_dataset, tell
    from fed_diffusion.evaluation.checks import OWN_DATA, check_evaluation
    from fed_diffusion.evaluation.generated import measure
    from fed_diffusion.generate import Sampler
    from fed_diffusion.report.html import write_report
    from fed_diffusion.store.origin import check_same_data, resume_command, trained

    results, (config, checkpoint) = run.results(), trained(run)
    done = checkpoint.state["round"]
    if results.get("rounds") not in (None, done):
        raise ConfigError(
            f"{run.path} cannot be measured: its results.json is of round {results['rounds']} and "
            f"its checkpoint of round {done}. Finish it first: {resume_command(run.path)}"
        )
    settings = config.to_dict()
    names = ("samples", "reference", "extractor", "weights")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "weights" in given:
        given["weights"] = read_value("evaluation.weights", given["weights"])
    if "extractor" in given:  # the weights of the run's own extractor go with it
        given.setdefault("weights", None)
    if given.get("reference", "none") not in (*OWN_DATA, "none", ""):
        given["reference"] = str(absolute(given["reference"], "--reference"))
    settings["evaluation"] |= given
    config = build_config(settings)
    check_evaluation(config)
    dataset = None
    if config.evaluation.reference in OWN_DATA and config.evaluation.samples:
        dataset = tell(load_dataset(config.data))
        check_same_data(run, config, checkpoint, content_hash(dataset))
    sampler = Sampler(config, checkpoint.tensors["ema"])
    quality = measure(sampler, sampler.sample(config.evaluation.samples), dataset)
    run.write_results(results | {"quality": quality})
    write_report(run.path)
    return quality


def features_train_command(arguments: argparse.Namespace) -> int:
    """Train a `ResNet` on a data set's labels and write it; prints what is in the file."""
    out: Path = arguments.out
    if arguments.epochs < 1:
        raise ConfigError(f"--epochs = {arguments.epochs} is not allowed; at least 1.")
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out = {out} is not a .safetensors file in a folder that exists.")
    check_writable(out, "--out")
    data = {
        "name": arguments.dataset,
        "dir": arguments.data_dir,
        "size": arguments.size,
        "channels": arguments.channels,
        "background": arguments.background,
        "flip": arguments.flip,
    }
    config = build_config(
        {"seed": arguments.seed, "data": data, "worker": {"device": arguments.device}}
    )
    from fed_diffusion.checks import check_device
    from fed_diffusion.common.compute import device_of
    from fed_diffusion.evaluation.trained import save_features, train_features

    check_device(config)
    network, header = train_features(config.data, arguments.epochs, config.seed, device_of(config))
    save_features(out, network, header)
    say(json.dumps(header.to_dict(), indent=2))
    say(out.resolve())
    return 0
