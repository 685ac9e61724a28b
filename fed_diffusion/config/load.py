"""The configuration of a run: a YAML preset plus overrides, checked before any compute.

The configuration in a run directory is enough to repeat the run. An error names the key, the value
and what is allowed.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from fed_diffusion.config.images import DataConfig
from fed_diffusion.config.methods import method_name, method_settings
from fed_diffusion.config.names import UNKNOWN
from fed_diffusion.config.pairs import field_of, parse_pairs, read_value, refuse_overlaps
from fed_diffusion.config.schema import Config, ConfigError, Section, by_type
from fed_diffusion.config.section import HUB, complaint, is_mapping
from fed_diffusion.config.training import ModelConfig
from fed_diffusion.config.yaml import absolute, expanded, read_yaml

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
    "read_value",
    "refuse_overlaps",
    "with_overrides",
]

RECORDED = {"data", "model", "diffusion", "local", "round", "worker", "evaluation"}
"""Sections that the config.yaml of a run has; its key `preset` says what the run was started as."""


def conf_dir() -> Path:
    """Return the folder of the presets: inside an installed wheel, else beside the package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets() -> list[str]:
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset (a name in conf/) or of a YAML file (a path).

    `extends: digits`, or the path of another file as seen from this one, takes the settings of that
    preset, and those that stand beside it change them as typed ones would.
    """
    return _load_preset(name, Path(), ())


def _load_preset(name: str, folder: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    is_path = name.endswith((".yaml", ".yml"))
    path = folder / expanded(name, "preset") if is_path else conf_dir() / f"{name}.yaml"
    if not is_path and name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        where = f" ({extending[-1]} extends it)" if extending else ""
        raise ConfigError(
            f"preset = {name!r} does not exist{where}.{hint} There are: {', '.join(presets())}; "
            "or give the path of a YAML file."
        )
    if path.resolve() in extending:
        chain = " extends ".join(map(str, [*extending, path]))
        raise ConfigError(f"preset {path} extends itself: {chain}. Leave out one of them.")
    found = read_yaml(path, "preset")
    base = found.pop("extends", None)
    if "preset" in found and RECORDED - found.keys():
        raise ConfigError(
            f"preset {path}: preset = {found['preset']!r} has no effect in this file. To take the "
            f"settings of {found['preset']!r} and change some, write extends: {found['preset']}; "
            "else leave the key out."
        )
    if base is None:
        return {"preset": path.stem, **found}
    if not isinstance(base, str):
        raise ConfigError(f"preset {path}: extends = {base!r} is not allowed; give one preset.")
    settings = _load_preset(base, path.parent, (*extending, path.resolve()))
    refuse_overlaps(dict(_flat(found)), f"preset {path}")
    _change(settings, dict(_flat(found)))
    return {**settings, "preset": path.stem}


def load_config(preset: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return a preset with dotted overrides, the method's name resolved and everything checked.

    Raises
    ------
    ConfigError
        The message names the key, the given value and what is allowed.
    """
    flat = dict(overrides or {})
    if "preset" in flat:
        raise ConfigError(
            f"preset = {flat['preset']!r} has no effect among the settings; name the preset in its "
            f"place, which has {preset!r}."
        )
    settings = load_preset(preset)
    _change(settings, flat)
    config = build_config(settings)
    keep, level = config.pruning.keep, config.pruning.level
    if keep is not None and level != "F":  # here, so that runs that have it are still read
        raise ConfigError(
            f"pruning.keep: {keep} stands in place of a level, and pruning.level = {level} says "
            "other ratios; leave one of them out."
        )
    return _absolute(config)


def _change(settings: dict[str, Any], flat: Mapping[str, Any]) -> None:
    """Put dotted settings on top, with what follows from them for the settings that they meet."""
    given = dict(_flat(flat))
    if not given.get("method"):  # a method that is typed replaces the preset's
        _resolve_method(settings, dict(_flat(settings)))
    if any(key.startswith("pruning.") for key in given):
        settings["method"] = None  # what is typed now outranks the preset's method
    for key, value in flat.items():
        _assign(settings, key, value)
    replaced = "pruning.kind" in given or given.get("method")
    if replaced and not any(key.startswith("pruning.options") for key in [*flat, *given]):
        _assign(settings, "pruning.options", {})
    if "pruning.kind" in given:  # what belongs to the preset's kind goes with it
        for key, default in (("pruning.choice", "ordered"), ("pruning.unit", "weights")):
            if key not in given:
                _assign(settings, key, default)
    if "local.epochs" in given and "local.steps" not in given:
        _assign(settings, "local.steps", None)
    if "local.steps" in given and "local.epochs" not in given:
        _assign(settings, "local.epochs", None)
    _resolve_method(settings, given)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a configuration with dotted settings replaced, checked as a whole.

    Raises
    ------
    ConfigError
        The message names the key, the given value and what is allowed.
    """
    settings = config.to_dict()
    for key, value in overrides.items():
        _assign(settings, key, value)
    return _absolute(build_config(settings))


def _absolute(config: Config) -> Config:
    """Return paths as seen from the user's folder, since the engines' processes run elsewhere."""

    def resolve(path: str | None, key: str) -> str | None:
        return str(absolute(path, key)) if path else path

    evaluation = config.evaluation
    weights: Any = evaluation.weights
    if isinstance(weights, dict):
        weights = {name: resolve(file, "evaluation.weights") for name, file in weights.items()}
    else:
        weights = resolve(weights, "evaluation.weights")
    reference = evaluation.reference
    if reference not in ("data", "train", "test", "none"):
        reference = str(resolve(reference, "evaluation.reference"))
    return config.model_copy(
        update={
            "data": _absolute_data(config.data),
            "model": _absolute_model(config.model),
            "evaluation": evaluation.model_copy(
                update={
                    "reference": reference,
                    "weights": weights,
                }
            ),
        }
    )


def _absolute_data(data: DataConfig) -> DataConfig:
    """hf:NAME in data.name is a name on the Hub unless it is here, or looks like a path."""
    name, source = data.name, data.name.removeprefix(HUB)
    if source != name and (source[:1] in ("~", ".", "/") or expanded(source, "data.name").exists()):
        name = f"{HUB}{absolute(source, 'data.name')}"
    return data.model_copy(
        update={"name": name, "dir": data.dir and str(absolute(data.dir, "data.dir"))}
    )


def _absolute_model(model: ModelConfig) -> ModelConfig:
    """model.pretrained, vae and text name what is on the Hub, unless it is here or seems a path."""
    files = {key: getattr(model, key) for key in ("config", "scheduler", "start")}
    for key in ("pretrained", "vae", "text"):
        named = getattr(model, key)
        if named and (named[0] in "~./" or expanded(named, f"model.{key}").exists()):
            files[key] = named
    found = {k: str(absolute(file, f"model.{k}")) for k, file in files.items() if file}
    return model.model_copy(update=found)


def build_config(settings: Mapping[str, Any]) -> Config:
    """Check nested settings; pydantic's complaints become one `ConfigError` in our words."""
    try:
        return Config.model_validate(dict(settings))
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in _telling(error.errors())]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _resolve_method(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace a method's name by its settings; refuse a key that contradicts the name."""
    method = settings.get("method")
    if not method:
        settings["method"] = None
        return
    for key, value in method_settings(str(method)).items():
        if key in given and (beside := _as_read(key, given[key])) != value:
            raise ConfigError(
                f"{key} = {beside!r} contradicts method = {method!r}, which means "
                f"{key} = {value!r}. Give one of the two."
            )
        _assign(settings, key, value)


def _assign(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    model: Any = Config
    node = settings
    for depth, section in enumerate(sections):
        known = model.model_fields.get(section)
        if known is not None and is_mapping(known.annotation) and depth == len(sections) - 1:
            node[section] = {**node.get(section, {}), last: value}
            return
        if known is None or not _is_section(model, section):
            here = ".".join(sections[: depth + 1])
            raise ConfigError(_unknown(here, model, sections[:depth], whole=key))
        model = model.model_fields[section].annotation
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(sections)} must be a section with keys of its own.")
        node[section] = dict(child)
        node = node[section]
    if last not in model.model_fields:
        raise ConfigError(_unknown(key, model, sections))
    node[last] = value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_read(key: str, value: Any) -> Any:
    """A value as its setting reads it, so that values can be compared; else as it is."""
    field = field_of(key)
    if field is None:
        return value
    try:
        reads: Any = Annotated[field.annotation, field]
        return TypeAdapter(reads).validate_python(by_type(field.annotation, value))
    except ValueError:  # the check of the whole says what is wrong with it
        return value


def _is_section(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _unknown(key: str, model: type[BaseModel], sections: list[str], whole: str = "") -> str:
    """Return what to say of a key that is not a setting, or not a section.

    Parameters
    ----------
    whole
        The key as it was typed, where it goes on behind `key`.
    """
    prefix = "".join(f"{s}." for s in sections)
    what = "a setting"
    if whole and whole != key:
        name = key.rsplit(".", 1)[-1]
        what = "a section: it is a setting itself" if name in model.model_fields else "a section"
    close = _nearest(whole or key)
    hint = f" Did you mean {close}?" if close else ""
    names = ", ".join(prefix + name for name in model.model_fields)
    return f"{key} is not {what}.{hint} Allowed: {names}."


def _nearest(key: str) -> str | None:
    """Return the setting or section that is most likely meant by an unknown key."""
    known = setting_names()
    *sections, last = key.split(".")
    same = [name for name in known if name.split(".")[-1] == last]
    if close := difflib.get_close_matches(key, same, n=1, cutoff=0.0):
        return close[0]  # the right name in the wrong section
    within = [name for name in known if name.split(".")[:-1] == sections]
    names = {name.split(".")[-1]: name for name in within}
    if close := difflib.get_close_matches(last, names, n=1):
        return names[close[0]]
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def setting_names() -> list[str]:
    """Return every dotted setting and every section."""

    def of(model: Any, prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            if _is_section(model, name):
                yield from of(field.annotation, f"{prefix}{name}.")

    return list(of(Config, ""))


SHAPES = ("tuple_type", "list_type", "float_type", "int_type", "string_type")
"""Complaints of pydantic that a value is of another shape than one of a setting's alternatives."""


def _telling(items: Sequence[Any]) -> list[Any]:
    """Leave out what a setting's other alternatives say, where one had the value's shape."""

    def same(one: Any, other: Any) -> bool:
        return one["loc"][:2] == other["loc"][:2] and other["type"] not in SHAPES

    return [
        item
        for item in items
        if item["type"] not in SHAPES or not any(same(item, other) for other in items)
    ]


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
    if item["type"] == UNKNOWN:
        name = item["ctx"].get("name", item["input"])  # of a list, the one that is unknown
        return f"{key} = {name!r} is unknown. {item['msg']}."
    return f"{key} = {item['input']!r} is not allowed: {complaint(item)}{_allowed(key)}."


def _allowed(key: str) -> str:
    """Return what a Literal field takes, for messages that do not say it themselves."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
        model = model.model_fields[part].annotation if part in model.model_fields else None
    members = get_args(model) if isinstance(model, types.UnionType) else (model,)
    names = [type_.__name__ for type_ in members if type_ in (bool, int, float, str)]
    return f" (a {' or '.join(names)})" if names else ""
