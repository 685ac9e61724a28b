"""The configuration of a run: a YAML preset plus overrides, checked as a whole before any compute.

The one that a run directory holds is enough to repeat the run. An error names the key, the value
and what is allowed.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fed_diffusion.methods import method_name, method_settings
from fed_diffusion.schema import Config, ConfigError, Section

__all__ = [
    "Config",
    "ConfigError",
    "build_config",
    "conf_dir",
    "load_config",
    "load_preset",
    "method_name",
    "parse_pairs",
    "presets",
]


def conf_dir() -> Path:
    """Where the presets are: inside an installed wheel, else beside the package."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets() -> list[str]:
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The settings of a preset (a name in conf/) or of a YAML file (a path)."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else conf_dir() / f"{name}.yaml"
    if not path.is_file() or not (is_path or name in presets()):
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"preset = {name!r} does not exist.{hint} There are: {', '.join(presets())}; "
            "or give the path of a YAML file."
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"preset {path} must be a mapping of keys to values.")
    return {"preset": path.stem, **settings}


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["pruning.level=S", "rounds=20"]` as a flat mapping; values are read as YAML."""
    flat: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"set: {pair!r} is not of the form key=value, as in rounds=20.")
        try:
            flat[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"set: the value in {pair!r} cannot be read: {error}") from error
    return flat


def load_config(preset: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """A preset with dotted overrides on top, the method's name resolved, everything checked.

    Raises
    ------
    ConfigError
        Names the key, the value given and what is allowed.
    """
    flat = dict(overrides or {})
    settings = load_preset(preset)
    _resolve_method(settings, {})
    if any(key.startswith("pruning.") for key in flat):
        settings["method"] = None  # what is typed now outranks the preset's method
    for key, value in flat.items():
        _assign(settings, key, value)
    if "pruning.kind" in flat:  # what belongs to the preset's kind goes with it
        for key, default in (("pruning.choice", "ordered"), ("pruning.unit", "weights")):
            if key not in flat:
                _assign(settings, key, default)
    if "local.epochs" in flat and "local.steps" not in flat:
        settings["local"]["steps"] = None
    if "local.steps" in flat and "local.epochs" not in flat:
        settings["local"]["epochs"] = None
    _resolve_method(settings, flat)
    return _absolute(build_config(settings))


def _absolute(config: Config) -> Config:
    """Paths as seen from where the user stands: the engine's processes stand elsewhere."""

    def resolve(path: str | None) -> str | None:
        return str(Path(path).expanduser().resolve()) if path else path

    evaluation = config.evaluation
    reference = evaluation.reference
    if reference not in ("data", "train", "test", "none"):
        reference = str(resolve(reference))
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"dir": resolve(config.data.dir)}),
            "evaluation": evaluation.model_copy(
                update={"reference": reference, "weights": resolve(evaluation.weights)}
            ),
        }
    )


def build_config(settings: Mapping[str, Any]) -> Config:
    """Check nested settings; pydantic's complaints become one `ConfigError` in our words."""
    try:
        return Config.model_validate(dict(settings))
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _resolve_method(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """A method is a name for settings; one that contradicts a key given beside it is an error."""
    method = settings.get("method")
    if not method:
        settings["method"] = None
        return
    for key, value in method_settings(str(method)).items():
        if key in given and given[key] != value:
            raise ConfigError(
                f"{key} = {given[key]!r} contradicts method = {method!r}, which means "
                f"{key} = {value!r}. Give one of the two."
            )
        _assign(settings, key, value)


def _assign(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    model: Any = Config
    node = settings
    for depth, section in enumerate(sections):
        if section not in model.model_fields or not _is_section(model, section):
            raise ConfigError(_unknown(".".join(sections[: depth + 1]), model, sections[:depth]))
        model = model.model_fields[section].annotation
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(sections)} must be a section with keys of its own.")
        node[section] = dict(child)
        node = node[section]
    if last not in model.model_fields:
        raise ConfigError(_unknown(key, model, sections))
    node[last] = value


def _is_section(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _unknown(key: str, model: type[BaseModel], sections: list[str]) -> str:
    names = list(model.model_fields)
    close = difflib.get_close_matches(key.split(".")[-1], names, n=1)
    prefix = "".join(f"{s}." for s in sections)
    hint = f" Did you mean {prefix}{close[0]}?" if close else ""
    return f"{key} is not a setting.{hint} Allowed: {', '.join(prefix + n for n in names)}."


def _explain(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    # pydantic appends the member of a union it tried; ours are no part of the key
    keys: list[str] = []
    model: Any = Config
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        keys.append(part)
        field = model.model_fields.get(part)
        model = field.annotation if field else None
    key = ".".join(keys)
    if item["type"] == "extra_forbidden":
        parent: Any = Config
        for part in keys[:-1]:
            parent = parent.model_fields[part].annotation
        return _unknown(key, parent, keys[:-1])
    if item["type"] == "value_error":
        prefix = f"{key}." if key else ""
        return f"{prefix}{item['ctx']['error']}."
    return f"{key} = {item['input']!r} is not allowed: {item['msg']}{_allowed(key)}."


def _allowed(key: str) -> str:
    """What a Literal field takes, for messages that do not say it themselves."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
        model = model.model_fields[part].annotation if part in model.model_fields else None
    members = get_args(model) if isinstance(model, types.UnionType) else (model,)
    names = [type_.__name__ for type_ in members if isinstance(type_, type)]
    return f" (a {' or '.join(names)})" if names else ""
