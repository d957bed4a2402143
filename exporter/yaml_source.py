"""YAML that remembers its lines, so that a bad option is named with the place to mend it."""

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")
Hook = Callable[[type, Any], Any] | None

_MAX_CHARACTERS = 1 << 18  # takes PyYAML a second
_MAX_VALUES = 50_000  # aliases make much of little
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>(?:key in )?\$[^`]*)`)?$", re.DOTALL)
_UNQUOTED = re.compile(r"Expected `str`, got `(int|float)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


class ConfigError(Exception):
    """An option can't be used; the sentence names file, line, option and remedy."""


class Source:
    """One YAML file as plain values, and the line of each."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._lines: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self._count = 0
        if len(text) > _MAX_CHARACTERS:
            raise ConfigError(f"{name} is larger than 256 KiB; that is no configuration")
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self._seen: set[int] = set()
            self.value: Any = {} if node is None else self._plain(node, "$")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise ConfigError(
                f"{name}:{line}: not YAML: {error.problem or error.context}"
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(f"{name}: not YAML: {why}") from None

    def _plain(self, node: yaml.Node, path: str) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        self._count += 1
        if self._count > _MAX_VALUES:
            raise self.error(path, f"more than {_MAX_VALUES} values; write fewer aliases")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.error(path, f"the tag {node.tag!r} has no meaning here; remove it")
        if id(node) in self._seen:
            raise self.error(path, "an alias may not contain itself")
        self._seen.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self._plain(item, f"{path}[{i}]") for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._seen.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        loader = yaml.SafeLoader("")
        try:
            str(node.value).encode()  # no half of a character pair, as an escape may write one
            value = loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):
            # Some of PyYAML's constructors trust that the value fits a tag that was written out.
            kind = node.tag.rpartition(":")[2]
            raise self.error(path, f"{node.value[:50]!r} can't be read as {kind}") from None
        finally:
            loader.dispose()
        return str(value) if isinstance(value, datetime) else value

    def _mapping(self, node: yaml.Node, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{self.name}:{line}: a key must be a plain word")
            if key in result:
                raise ConfigError(f"{self.name}:{line}: {key!r} is there twice; remove one")
            below = f"{path}.{key}"
            self._keys[below] = line
            result[key] = self._plain(value_node, below)
        return result

    def line(self, path: str) -> int:
        """The line of a value, or of the nearest thing that holds it."""
        while path and path not in self._lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._keys.get(path, self._lines.get(path, 1))

    def error(self, path: str, message: str) -> ConfigError:
        """A `ConfigError` with file, line and the option's path."""
        option = path.removeprefix("$").removeprefix(".")
        where = f"{option}: " if option else ""
        return ConfigError(f"{self.name}:{self.line(path)}: {where}{message}")

    def convert(self, value: Any, type_: type[T], path: str, hook: Hook = None) -> T:
        """`value`, found at `path`, as a strictly checked struct; `ConfigError` with its line."""
        try:
            return msgspec.convert(value, type_, dec_hook=hook)
        except msgspec.ValidationError as error:
            found = _PATH.match(str(error))
            what = found["what"] if found else str(error)
            below = (found and found["path"]) or "$"
            full = path + below.removeprefix("key in ").removeprefix("$").split("[...]", 1)[0]
            if _UNQUOTED.match(what):  # such as 22:00, which is a number to YAML
                what += "; write it in quotes"
            if unknown := _UNKNOWN.search(what):
                known = sorted(_fields(type_, below))
                hint = f"; known here: {', '.join(known)}" if known else ""
                full, what = f"{full}.{unknown[1]}", f"no such option{hint}"
                self._lines.setdefault(full, self._keys.get(full, self.line(full)))
            raise self.error(full, what) from None


def _fields(type_: Any, below: str) -> list[str]:
    """The options of the struct at `below` under `type_`, for the hint; empty if it's unclear."""
    for part in re.findall(r"\.([^.\[]+)|(\[)", below):
        if part[0]:
            field = next(
                (f for f in msgspec.structs.fields(type_) if f.encode_name == part[0]), None
            )
            type_ = field.type if field else None
        else:
            type_ = next(iter(getattr(type_, "__args__", ())), None)
        if isinstance(type_, UnionType):  # a section that may be left out
            type_ = type_.__args__[0]
        if type_ is None:
            return []
    if not (isinstance(type_, type) and issubclass(type_, msgspec.Struct)):
        return []
    return [field.encode_name for field in msgspec.structs.fields(type_)]


def read_source(path: Path) -> Source:
    """Read a YAML file; `ConfigError` where it can't be read."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    return Source(text, str(path))
