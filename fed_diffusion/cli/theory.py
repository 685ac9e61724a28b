"""fed-diffusion plan: Remark 4.12 and Theorem 4.11 for a preset, before it runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_diffusion.cli.output import say

if TYPE_CHECKING:
    from rich.table import Table

    from fed_diffusion.analysis.advisor import Plan, Row
    from fed_diffusion.analysis.probe import Probe
    from fed_diffusion.build import Setup
    from fed_diffusion.config import Config
    from fed_diffusion.theory.bound import Training

K_MAX = 1000
"""The most steps that a plan proposes, unless the preset has more."""
KEEPS = (1.0, 0.9, 0.75, 0.5, 0.25)
WORKERS = (2, 5, 10, 20, 50)
STEPS = (100, 300, 1000, 3000, 10000)


def add_commands(commands: Any) -> None:
    """Add `plan` to the sub-parsers of `fed-diffusion`."""
    plan = commands.add_parser(
        "plan", help="choose hyperparameters by Remark 4.12, and evaluate the bound"
    )
    plan.add_argument("preset", help="a name in conf/ or the path of a YAML file")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting to change, as in pruning.level=S; may be repeated",
    )
    plan.add_argument(
        "--target",
        type=float,
        default=1.0,
        metavar="NATS",
        help="what the discretisation and the prior may add to the bound (default: 1 nat)",
    )
    plan.add_argument(
        "--delta",
        type=float,
        metavar="D",
        help="the time at which sampling stops, diffusion.delta (default: the preset's)",
    )
    plan.add_argument(
        "--data-moment",
        type=float,
        metavar="M2",
        help="E ||X_0||^2 of the images, if you know it; then no images are read",
    )
    plan.add_argument("--apply", type=Path, metavar="FILE.yaml", help="write the plan as a preset")
    plan.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw how the bound changes with each argument",
    )
    plan.set_defaults(command=plan_command)


def plan_command(arguments: argparse.Namespace) -> int:
    """Probe the fresh network, print the plan beside the preset, and write what was asked for."""
    from fed_diffusion.common.terminal import plain_console
    from fed_diffusion.config import load_config, parse_pairs
    from fed_diffusion.store.files import check_writable

    _check(arguments)
    config = load_config(arguments.preset, parse_pairs(arguments.set))
    from fed_diffusion.analysis import advisor
    from fed_diffusion.analysis.probe import probe
    from fed_diffusion.build import Setup
    from fed_diffusion.checks import check_training

    setup = Setup.of(config)
    check_training(setup)
    for name in ("plot", "apply"):
        if (path := getattr(arguments, name)) is not None:
            check_writable(path, f"--{name}")
    probed = probe(setup, *_images(setup, arguments.data_moment))
    if arguments.data_moment is not None:  # exactly, not as the stand-in's bytes have it
        probed = replace(probed, data=replace(probed.data, M2=arguments.data_moment))

    def planned(training: Training) -> Plan:
        return advisor.plan(
            probed.data,
            training,
            eps2=arguments.target,
            delta=config.diffusion.delta if arguments.delta is None else arguments.delta,
            K_max=max(K_MAX, config.diffusion.K),
            settings=probed.settings,
        )

    plan = planned(probed.training)
    if plan.eta > 0:  # the drift goes with the step size
        plan = planned(probed.at(plan.eta))
    console = plain_console()
    for table in (_estimates(probed), _comparison(setup, probed, plan)):
        console.print(table)
    for note in (*plan.notes, *probed.notes):
        console.print(f"- {note}", soft_wrap=True)
    moves = _moves(probed, plan)
    for name, rows in moves.items():
        console.print(_moved(name, rows))
    if arguments.plot is not None:
        from fed_diffusion.report.theory import moves_figure  # matplotlib takes seconds to import

        moves_figure(moves).savefig(arguments.plot, dpi=150)
        say(arguments.plot.resolve())
    if arguments.apply is not None:
        _apply(config, probed, plan, arguments.apply)
        say(arguments.apply.resolve())
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from fed_diffusion.config import ConfigError

    if not 0 < arguments.target < math.inf:
        raise ConfigError(f"--target = {arguments.target} is not allowed; give nats above 0.")
    if arguments.delta is not None and not 0 < arguments.delta < 1:
        raise ConfigError(
            f"--delta = {arguments.delta} is not allowed; give a number above 0 and below 1."
        )
    for flag, suffixes in (("apply", (".yaml", ".yml")), ("plot", (".png", ".svg", ".pdf"))):
        path: Path | None = getattr(arguments, flag)
        if path is None:
            continue
        if path.suffix not in suffixes or not path.absolute().parent.is_dir():
            raise ConfigError(
                f"--{flag} = {path} is not a {' or '.join(suffixes)} file in a folder that exists."
            )
    if arguments.apply is not None and arguments.apply.exists():
        raise ConfigError(f"--apply {arguments.apply} exists already; give another name.")


def _images(setup: Setup, M2: float | None) -> tuple[Any, tuple[str, ...]]:
    """The run's images; where they cannot be downloaded, or M_2 is given, a stand-in for them."""
    from fed_diffusion.analysis.probe import stand_in
    from fed_diffusion.config import ConfigError
    from fed_diffusion.data import load_dataset
    from fed_diffusion.data.datasets import DOWNLOADED

    data = setup.config.data
    if M2 is None:
        try:
            return load_dataset(data), ()
        except ConfigError as error:
            if data.name not in DOWNLOADED:
                raise
            why = str(error).splitlines()[0]
    dataset, notes = stand_in(setup, M2)
    return dataset, notes if M2 is not None else (*notes, f"Why: {why}")


def _estimates(probed: Probe) -> Table:
    from rich.table import Table

    table = Table(title="measured at theta_0, on the scale of F (nats)", title_justify="left")
    for name in ("quantity", "value", "95 % interval, ±"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    scale = probed.Z * probed.data.d
    table.add_row("d", f"{probed.data.d:,}", "exact")
    table.add_row("M2, largest worker's", f"{probed.data.M2:.5g}", "exact")
    table.add_row("Z d", f"{scale:.5g}", "exact")
    names = {
        "F": "F(theta_0)",
        "Fn": "F_n(theta_0), largest worker's",
        "gradient": "||grad F(theta_0)||",
    }
    for key, found in probed.estimates.items():
        error = "" if found.error is None else f"{found.error * scale:.2g}"
        table.add_row(names.get(key, key), f"{found.value * scale:.4g}", error)
    table.add_row("w^2", f"{probed.training.w2:.4g}", "round 1")
    table.add_row("Gamma", f"{probed.training.gamma_star}", "round 1")
    return table


def _comparison(setup: Setup, probed: Probe, plan: Plan) -> Table:
    from rich.table import Table

    from fed_diffusion.theory.bound import Steps, theorem_4_11

    config, own = setup.config, setup.config.diffusion
    steps = Steps.of(setup.u)
    bound = theorem_4_11(probed.data, steps, probed.training, settings=probed.settings)
    table = Table(title=f"{config.preset} and its plan", title_justify="left")
    for name in ("", "preset", "plan"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("T", f"{own.T:.4g}", f"{plan.T:.4g}")
    table.add_row("delta", f"{own.delta:.4g}", f"{plan.delta:.4g}")
    table.add_row("K", f"{own.K:,}", f"{plan.K:,}")
    table.add_row("kappa", f"{steps.kappa:.4g}", f"{plan.kappa:.4g}")
    table.add_row("partition", own.partition, "kappa_minimal")
    eta = _eta(probed, plan)
    table.add_row(
        "eta, on the simple loss",
        f"{config.local.eta:.3g} ({config.local.optimizer})",
        f"<= {eta:.3g} (sgd)" if eta else "none",
    )
    table.add_row("eta, on F's scale", f"{probed.training.eta:.3g}", f"<= {plan.eta:.3g}")
    table.add_row("Theorem 4.11, nats", _nats(bound.total), _nats(plan.bound.total))
    discretisation = [sum(b.discretisation) + b.prior for b in (bound, plan.bound)]
    table.add_row("of it Lemmas 4.5 and 4.10", *map(_nats, discretisation))
    holds = ["yes" if b.covered else "no" for b in (bound, plan.bound)]
    table.add_row("all conditions hold", *holds)
    return table


def _eta(probed: Probe, plan: Plan) -> float:
    """Return the plan's largest step size as local.eta, for the simple loss of its partition."""
    from fed_diffusion.diffusion.loss import DSMLoss
    from fed_diffusion.theory.bound import eta_from_F_scale

    return eta_from_F_scale(plan.eta, DSMLoss(plan.u).Z, probed.data.d)


def _moves(probed: Probe, plan: Plan) -> dict[str, list[Row]]:
    """Return the bound for the plan, with one argument after another changed."""
    from fed_diffusion.analysis import advisor
    from fed_diffusion.theory.bound import Steps

    data, steps = probed.data, Steps.of(plan.u)
    training = probed.at(plan.eta) if plan.eta > 0 else probed.training
    fewest = math.ceil(math.log(1 / plan.delta))
    counts = [K for K in STEPS if fewest <= K]
    return {
        "keep ratio": advisor.by_keep(data, steps, training, probed.theta_norm2, KEEPS),
        "N": advisor.by_workers(data, steps, training, WORKERS),
        "Gamma*": advisor.by_gamma(data, steps, training, range(1, training.N + 1)),
        "K": advisor.by_steps(data, plan.T, plan.delta, training, counts),
    }


def _moved(name: str, rows: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(title=f"the bound by {name}, nats", title_justify="left")
    table.add_column(name)
    for row in rows:
        table.add_column(f"{row.value:g}", justify="right")
    table.add_row("total", *(_nats(row.bound.total) for row in rows))
    return table


def _nats(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "infinite"


def _apply(config: Config, probed: Probe, plan: Plan, path: Path) -> None:
    """The preset with the plan's diffusion, and its eta where the theorem covers the optimiser."""
    import yaml

    from fed_diffusion.build import Setup
    from fed_diffusion.config import build_config
    from fed_diffusion.store.files import write_atomic

    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
    settings["diffusion"] = {
        "T": plan.T,
        "delta": plan.delta,
        "K": plan.K,
        "partition": "kappa_minimal",
    }
    if config.local.optimizer == "sgd" and plan.eta > 0:
        settings["local"] = settings["local"] | {"eta": _eta(probed, plan)}
    Setup.of(
        build_config(settings)
    ).sampling_times()  # a plan that cannot be sampled from is not written
    header = f"# {config.preset}, planned by Remark 4.12 (fed-diffusion plan)."
    if config.local.optimizer != "sgd":
        header += " local.eta is the preset's:\n"
        header += f"# the theorem does not cover {config.local.optimizer}."
    write_atomic(path, f"{header}\n{yaml.safe_dump(settings, sort_keys=False)}")
