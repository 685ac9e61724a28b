"""Files and paths that a user names: text, YAML, and ``~``.

YAML 1.1 makes numbers, dates and truth values of whatever looks like one: 010 is 8, 12:30 is 750,
`on` is true, and 1e-2 is a string. Here a scalar stays the text that stands in the file, and the
type of the setting decides what the text means (see `fed_diffusion.config.schema`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fed_diffusion.config.schema import ConfigError

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "timestamp", "value", "merge")}
_NULL = _TAG + "null"


def expanded(path: str | Path, key: str) -> Path:
    """Return the path with ``~`` resolved.

    Raises
    ------
    ConfigError
        There is no home directory; the message names `key`, which the path was given as.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} = {str(path)!r} is not allowed: this system knows no home directory for "
            f"{Path(path).parts[0]}. Give an absolute path, or set HOME."
        ) from error


def absolute(path: str | Path, key: str) -> Path:
    """Return the path with ``~`` and links resolved, as seen from the current directory.

    Raises
    ------
    ConfigError
        There is no such path; the message names `key`, which the path was given as.
    """
    try:
        return expanded(path, key).resolve()
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a NUL
        raise ConfigError(f"{key} = {str(path)!r} is not a path: {error}.") from error


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises
    ------
    ConfigError
        The file cannot be read, or is in another encoding. `what` says what kind of file it is.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        found = "it looks like UTF-16 or binary data"
    else:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            found = f"byte 0x{content[error.start]:02x} in line {line} is not"
    raise ConfigError(f"{what} {path} is not text in UTF-8: {found}. Save it as UTF-8.")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file. Scalars are their text, except null, which is None.

    Raises
    ------
    ConfigError
        The file cannot be read, is empty, is not a mapping, or has a key twice.
    """
    found = parse_yaml(read_text(path, what), f"{what} {path}", str(path))
    if found is None:
        raise ConfigError(f"{what} {path} is empty; it must be a mapping of keys to values.")
    if not isinstance(found, dict):
        raise ConfigError(f"{what} {path} must be a mapping of keys to values.")
    return found


def parse_yaml(text: str, what: str, name: str = "the text") -> Any:
    """Return a YAML document as dicts, lists, None and the text of every other scalar.

    Parameters
    ----------
    what
        What the text is, to be shown in messages.
    name
        The name of the text in YAML's own messages.

    Raises
    ------
    ConfigError
        The text is not a YAML document, or a mapping has a key twice.
    """
    try:
        loader = yaml.SafeLoader(text)
        loader.name = name
        node = loader.get_single_node()
        return None if node is None else _Reader(loader, what).read(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is not valid: it is nested too deeply.") from error


class _Reader:
    """Makes plain values of a document's nodes; an alias gives the same value again."""

    def __init__(self, loader: yaml.SafeLoader, what: str):
        self._loader = loader
        self._what = what
        self._made: dict[int, Any] = {}
        self._open: set[int] = set()
        self._checked: set[int] = set()

    def read(self, node: yaml.Node, key: str = "") -> Any:
        if id(node) in self._open:
            raise self._problem(node, f"{key or 'it'} contains itself")
        if id(node) not in self._made:
            self._open.add(id(node))
            self._made[id(node)] = self._read(node, key)
            self._open.remove(id(node))
        return self._made[id(node)]

    def _read(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
            return None
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return node.value
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, key)
        raise self._problem(node, f"{key or 'it'} has the tag {node.tag}, which means nothing here")

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        self._refuse_duplicates(node, prefix)
        self._loader.flatten_mapping(node)  # merge keys; what the mapping says itself comes last
        found = {}
        for key, value in node.value:
            found[key.value] = self.read(value, _joined(prefix, key.value))
        return found

    def _refuse_duplicates(self, node: yaml.MappingNode, prefix: str) -> None:
        if id(node) in self._checked:  # a merge has added to it since
            return
        self._checked.add(id(node))
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._problem(key, f"{prefix or 'it'} has a key that is not a word")
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{self._what}: {_joined(prefix, key.value)} stands twice, in line "
                    f"{lines[key.value]} and in line {line}; leave one of the two."
                )
            lines[key.value] = line
            if key.tag == _TAG + "merge":
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for one in merged:
                    if isinstance(one, yaml.MappingNode):
                        self._refuse_duplicates(one, prefix)

    def _problem(self, node: yaml.Node, what: str) -> ConfigError:
        return ConfigError(f"{self._what}: {what} (line {node.start_mark.line + 1}).")


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
