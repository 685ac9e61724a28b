"""Methods are names for settings: R-FedDM-S, FedDM-S-exclusive, C-FedDM-M-quant."""

from __future__ import annotations

import re
from typing import Any

from fed_diffusion.config.schema import Config, ConfigError

FAMILIES = {"F": "full", "R": "random", "T": "topk", "C": "channels", "B": "balanced"}
OPTIONS: dict[str, dict[str, Any]] = {
    "prox": {"local.prox": 0.01},
    "quant": {"wire.down": "int8", "wire.up": "int8", "wire.differences": True},
    "literal": {
        "pruning.scope": "all",
        "local.optimizer": "sgd",
        "local.state": "fresh",
        "ema.decay": 0.0,
    },
}
"""The settings of a method's last words.

They are FedProx's proximal term, quantised exchange, and the paper's letter (masks over every
coordinate, equation (7)'s plain SGD, no moving average).
"""


def method_name(config: Config) -> str:
    """Return the name of these settings, as in R-FedDM-S or FedDM-S-exclusive-quant.

    Masks over ranks have a word in place of a letter: ranks-FedDM-S. For keep ratios of the user's
    own, and for ratios that nodes say, the name has `own`, `node` or `auto` in place of the level.
    """
    pruning = config.pruning
    level: str = pruning.level
    if pruning.budget != "level":
        level = pruning.budget
    elif pruning.keep is not None:
        level = "own"
    words = ["FedDM", level]
    if pruning.baseline is not None:
        words.append(pruning.baseline)
    elif level != "F":
        letters = {kind: letter for letter, kind in FAMILIES.items()}
        own = pruning.kind.partition(":")[2]  # a family of the user's own is called as it is
        words.insert(0, own or letters.get(pruning.kind, pruning.kind))
    if config.local.prox:
        words.append("prox")
    if "int8" in (config.wire.down, config.wire.up):
        words.append("quant")
    if (config.pruning.scope, config.local.optimizer, config.ema.decay) == ("all", "sgd", 0):
        words.append("literal")
    return "-".join(words)


_METHOD = re.compile(
    r"(?:(?P<family>[RTCB])-)?FedDM(?:-(?P<level>[FLMS]))?"
    r"(?:-(?P<baseline>exclusive|small))?(?P<options>(?:-(?:prox|quant|literal))*)"
)
METHODS = "[R-|T-|C-|B-]FedDM[-F|-L|-M|-S][-exclusive|-small][-prox][-quant][-literal]"


def method_settings(method: str) -> dict[str, Any]:
    """Return the settings that a method's name stands for."""
    match = _METHOD.fullmatch(method)
    options = match["options"].split("-")[1:] if match else []
    if match is None or len(set(options)) < len(options):
        raise ConfigError(
            f"method = {method!r} is unknown. Allowed: {METHODS}, as in R-FedDM-S, "
            "FedDM-S-exclusive or C-FedDM-M-quant."
        )
    family, level, baseline = match["family"], match["level"], match["baseline"]
    if family and level in (None, "F"):
        raise ConfigError(f"method = {method!r}: {family} goes with a level: {family}-FedDM-S.")
    if baseline and (family or level == "F"):
        raise ConfigError(
            f"method = {method!r}: {baseline} drops no weights, so it has no family; its level "
            f"says who is weak: FedDM-S-{baseline}, or FedDM-{baseline} with pruning.keep."
        )
    implied: dict[str, Any] = {"pruning.baseline": baseline}
    if level is not None or not baseline:
        kind = FAMILIES[family or "F"] if not baseline else "random"
        implied |= {"pruning.kind": kind, "pruning.level": level or "F", "pruning.keep": None}
    if implied.get("pruning.kind", "channels") != "channels":
        implied["pruning.choice"] = "ordered"
    if implied.get("pruning.kind", "balanced") != "balanced":
        implied["pruning.unit"] = "weights"
    for option in options:
        implied |= OPTIONS[option]
    return implied
