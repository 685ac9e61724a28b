"""fed-diffusion evaluate | features train: the commands about quality figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.arguments import add_dry_run, add_set
from fed_diffusion.cli.output import say

if TYPE_CHECKING:
    from fed_diffusion.store.rundir import RunDir


def add_commands(commands: Any) -> None:
    """Add `evaluate` and `features` to the sub-parsers of `fed-diffusion`."""
    evaluate = commands.add_parser(
        "evaluate", help="sample and measure a trained run again; earlier figures are kept"
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    evaluate.add_argument("--samples", type=int, metavar="N", help="how many images to generate")
    evaluate.add_argument(
        "--reference", help="the images to compare with: data, train, test or a folder of images"
    )
    evaluate.add_argument(
        "--extractor",
        metavar="NAME",
        action="append",
        help="the judge, as in evaluation.extractor; may be repeated for several judges",
    )
    evaluate.add_argument(
        "--weights",
        help="the file of the judge's weights, or {NAME: FILE, ...} for several judges",
    )
    add_set(evaluate, "settings of evaluation.* to change, as in evaluation.sampler=second_order")
    add_dry_run(evaluate)
    evaluate.set_defaults(command=evaluate_command)

    features = commands.add_parser("features", help="make a judge from your own labelled images")
    actions = features.add_subparsers(required=True, metavar="ACTION")
    train = actions.add_parser(
        "train", help="train a classifier on a data set, for evaluation.weights"
    )
    train.add_argument(
        "dataset",
        metavar="DATASET",
        help="cifar10, svhn, fashion_mnist, mnist, digits, image_folder or your_module:function",
    )
    train.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    train.add_argument("--data-dir", help="the folder with the data set's files")
    train.add_argument(
        "--size", type=int, help="for image_folder: the side of the images in pixels"
    )
    train.add_argument("--channels", type=int, help="for image_folder: 1 (grey) or 3 (colour)")
    background = "for image_folder: the colour behind transparent pixels"
    train.add_argument("--background", choices=("white", "black"), help=background)
    train.add_argument("--flip", action="store_true", help="mirror images at random in training")
    train.add_argument(
        "--epochs", type=int, default=10, help="passes over the images (default: 10)"
    )
    train.add_argument("--seed", type=int, default=0, help="the seed of the training (default: 0)")
    train.add_argument(
        "--device", default="auto", help="where to train: auto, cpu, cuda or cuda:1 (default: auto)"
    )
    train.set_defaults(command=features_train_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Measure quality again, keep it in evaluations.jsonl, and print it."""
    from fed_diffusion.generate import RunDir

    run = RunDir.open(arguments.run)
    typed = _typed(arguments)
    if arguments.dry_run:
        from fed_diffusion.cli.dry_run import print_evaluation
        from fed_diffusion.config import with_overrides
        from fed_diffusion.store.origin import trained

        return print_evaluation(with_overrides(trained(run)[0], typed))
    with run.locked():
        quality = _measure_again(run, typed)
    say(json.dumps(quality, indent=2))
    return 0


def _typed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the dotted settings that are to differ from the run's."""
    from fed_diffusion.config import ConfigError, parse_pairs, read_value, refuse_overlaps

    pairs = parse_pairs(arguments.set)
    if other := [key for key in pairs if not key.startswith("evaluation.")]:
        raise ConfigError(
            f"--set {other[0]}: evaluate changes only settings of evaluation.*; the network and "
            "the data belong to the run."
        )
    names = ("samples", "reference", "extractor", "weights")
    given = {
        f"evaluation.{name}": value
        for name in names
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.weights is not None:
        given["evaluation.weights"] = read_value("evaluation.weights", arguments.weights)
    refuse_overlaps([*given, *pairs], "the options of evaluate and --set")
    typed = pairs | given
    if "evaluation.extractor" in typed:  # the weights of the run's own extractor go with it
        typed.setdefault("evaluation.weights", None)
    return typed


def _measure_again(run: RunDir, typed: dict[str, Any]) -> dict[str, Any]:
    from fed_diffusion.build import Setup
    from fed_diffusion.checks import data_hash
    from fed_diffusion.cli.progress import Display, followed
    from fed_diffusion.config import ConfigError, with_overrides
    from fed_diffusion.data import load_dataset, tell
    from fed_diffusion.evaluation.checks import OWN_DATA, check_evaluation
    from fed_diffusion.evaluation.generated import evaluate, evaluation_entry
    from fed_diffusion.generate import Sampler, check_sampler
    from fed_diffusion.report.html import write_report
    from fed_diffusion.store.live import Live
    from fed_diffusion.store.origin import check_same_data, resume_command, trained

    results, (own, checkpoint) = run.results(), trained(run)
    done = checkpoint.state["round"]
    if results.get("rounds") not in (None, done):
        raise ConfigError(
            f"{run.path} cannot be measured: its results.json is of round {results['rounds']} and "
            f"its checkpoint of round {done}. Finish it first: {resume_command(run.path)}"
        )
    config = with_overrides(own, typed)
    setup = Setup.of(config)
    check_evaluation(setup)
    check_sampler(setup)
    sampler = Sampler(setup, checkpoint.tensors["ema"])
    sampler.partition()  # refuses too few steps
    dataset = None
    if config.evaluation.reference in OWN_DATA and config.evaluation.samples:
        dataset = tell(load_dataset(config.data))
        check_same_data(run, config.data, checkpoint, data_hash(config, dataset))
    live = Live(run, config.rounds)
    try:
        with Display(config) as shown, followed(run, shown.live):
            quality = evaluate(sampler, dataset, told=live.step)
    finally:
        live.end()
    number = run.append_evaluation(evaluation_entry(config.evaluation, done, quality))
    if config.evaluation == own.evaluation and _has_none(results):
        run.write_results(results | {"quality": quality, "evaluation": number})
    write_report(run.path)
    return quality


def _has_none(results: dict[str, Any]) -> bool:
    """Return whether a run's own evaluation did not come to its end."""
    from fed_diffusion.evaluation.generated import UNFINISHED

    return bool(results["quality"]["why"] == UNFINISHED)


def features_train_command(arguments: argparse.Namespace) -> int:
    """Train a `ResNet` on a data set's labels, write it, and print what is in the file."""
    from fed_diffusion.config import ConfigError, build_config
    from fed_diffusion.store.files import check_writable

    out: Path = arguments.out
    if arguments.epochs < 1:
        raise ConfigError(f"--epochs = {arguments.epochs} is not allowed; give at least 1.")
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out = {out} is not a .safetensors file in a folder that exists; name such a file."
        )
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

    check_device(config.worker.device)
    device = device_of(config.worker)
    network, header = train_features(config.data, arguments.epochs, config.seed, device)
    save_features(out, network, header)
    say(json.dumps(header.to_dict(), indent=2))
    say(out.resolve())
    return 0
