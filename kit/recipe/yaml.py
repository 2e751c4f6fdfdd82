"""YAML text as plain data that remembers where every value was written, and how.

PyYAML composes the text into nodes; the nodes are turned into data here, because its own constructor forgets lines,
lets a repeated key win silently and expands aliases without end. Numbers are read as YAML 1.2 reads them: `1e-5` is
a number, while `010` (8 in YAML 1.1), `1:30` (90 in YAML 1.1) and dates stay the text that was written. Booleans stay
those of YAML 1.1 (`no`, `on`, …), the reading of most tools, so that an error can explain them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kit.errors import UserError, nearest

Keys = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists."""

MOST_VALUES = 100_000  # far above any recipe, far below what a few nested aliases can expand to


@dataclass(frozen=True)
class Place:
    """Where a value was written, and how: the `text` of a scalar, and whether it was `plain`, without quotes."""

    source: str
    line: int | None = None
    text: str | None = None
    plain: bool = False

    def __str__(self) -> str:
        """Return `file:line`, or the source alone for what stands in no file."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Document:
    """Plain data and the place of every value in it."""

    data: Any
    places: dict[Keys, Place]

    def place(self, keys: Keys) -> Place:
        """Return the place of the value, or of the nearest section around it that was written."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]


_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, {f"{_TAG}int": _INT, f"{_TAG}float": _FLOAT}.get(tag, pattern))
        for tag, pattern in resolvers
        if tag not in (f"{_TAG}timestamp", f"{_TAG}value")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text that would come back as a number of YAML 1.2, such as `1e-5`."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out each time: anchors help no reader."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds the line break NEL into a space unless the text is in double quotes.
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def write_yaml(data: Any) -> str:
    """Return `data` as YAML that `parse_yaml` reads back as equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def read_text(path: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        folder = Path(path).parent
        siblings = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        near = nearest(Path(path).name, siblings)
        raise UserError(f"{path}: no such file" + (f"; did you mean `{folder / near}`?" if near else "")) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a recipe file (.yaml)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None


def parse_yaml(text: str, source: str, *, with_lines: bool = True) -> Document | None:
    """Return the text as data with places, or None when it holds no value at all.

    Args:
        text: YAML.
        source: name of the file, or of whatever else holds the text, for messages.
        with_lines: whether a line number says anything about a place in the source.

    Raises:
        UserError: a mistake in the YAML, or a part of YAML that recipes do without.
    """
    build = _Build(source, with_lines)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        build.loader = loader
        data = _value(build, node, (), build.place(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{build.place(mark)}: not valid YAML: {error.problem}{_syntax_hint(error)}") from None
    except yaml.reader.ReaderError as error:
        place = Place(source, text[: error.position].count("\n") + 1 if with_lines else None)
        raise UserError(f"{place}: the character #x{error.character:04x} is not allowed in YAML") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(data, build.places)


@dataclass
class _Build:
    """What is known while nodes become data."""

    source: str
    with_lines: bool
    loader: _Loader | None = None
    places: dict[Keys, Place] = field(default_factory=dict)
    open_nodes: set[int] = field(default_factory=set)  # ids of the collections around the present node

    def place(self, where: yaml.Node | yaml.Mark, value: yaml.Node | None = None) -> Place:
        """Return the place of a node or mark; with `value`, the place of a key and the text of its value."""
        mark = where.start_mark if isinstance(where, yaml.Node) else where
        scalar = value or where
        line = mark.line + 1 if self.with_lines else None
        if not isinstance(scalar, yaml.ScalarNode):
            return Place(self.source, line)
        return Place(self.source, line, scalar.value, plain=scalar.style is None)


def _syntax_hint(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if "\\t" in problem or "\t" in problem:
        return "; indent with spaces, not with tabs"
    if "alias" in context or "alias" in problem or "anchor" in context:
        return "; text that begins with `*` or `&` needs quotes"
    if "cannot start any token" in problem:
        return "; text that begins with this character needs quotes"
    if "mapping values" in problem:
        return "; text with `: ` in it needs quotes, and the keys of one section need the same indentation"
    if "block end" in problem or "expected ':'" in problem:
        return "; the keys of one section need the same indentation, and `: ` after each"
    if "single document" in context:
        return "; a recipe is one document: remove the second `---`"
    return ""


def _value(build: _Build, node: yaml.Node, keys: Keys, place: Place) -> Any:
    """Return the data of a node, noting the place of everything in it."""
    if len(build.places) >= MOST_VALUES:
        raise UserError(f"{place}: more than {MOST_VALUES:,} values; do aliases repeat each other?")
    build.places[keys] = place
    if isinstance(node, yaml.ScalarNode):
        return _scalar(build, node, place)
    kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
    if node.tag != _TAG + kind:
        raise _tag_error(node, place)
    if id(node) in build.open_nodes:
        raise UserError(f"{place}: an alias (`*name`) stands inside the value that it names")
    build.open_nodes.add(id(node))
    if kind == "seq":
        data = [_value(build, n, (*keys, i), build.place(n)) for i, n in enumerate(node.value)]
    else:
        data = _mapping(build, node, keys)
    build.open_nodes.remove(id(node))
    return data


def _mapping(build: _Build, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
    data: dict[str, Any] = {}
    lines: dict[str, Place] = {}
    for key_node, value_node in node.value:
        place = build.place(key_node)
        key = _key(key_node, place)
        if key in data:
            raise UserError(f"{place}: `{key}` is given twice in one section, first at {lines[key]}; keep one")
        lines[key] = place
        data[key] = _value(build, value_node, (*keys, key), build.place(key_node, value_node))
    return data


def _key(node: yaml.Node, place: Place) -> str:
    if node.tag == f"{_TAG}merge":
        raise UserError(f"{place}: merge keys (`<<`) are not part of recipes; inherit from a file with `extends:`")
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{place}: a key is a single word, but this one is a list or a mapping")
    if node.tag != f"{_TAG}str":
        kind = node.tag.removeprefix(_TAG)
        meaning = {"bool": "a boolean", "null": "null", "int": "a number", "float": "a number"}.get(kind, f"`{kind}`")
        quoted = f'write "{node.value}" in quotes'
        raise UserError(f"{place}: a key is text, but YAML reads `{node.value}` as {meaning}; {quoted}")
    return node.value


def _scalar(build: _Build, node: yaml.ScalarNode, place: Place) -> Any:
    tag = node.tag.removeprefix(_TAG)
    constructors = {
        "null": build.loader.construct_yaml_null,
        "bool": build.loader.construct_yaml_bool,
        "int": build.loader.construct_yaml_int,
        "float": build.loader.construct_yaml_float,
    }
    if tag in ("str", "merge"):  # a plain `<<` is only special as a key
        return node.value
    if tag not in constructors:
        raise _tag_error(node, place)
    try:
        return constructors[tag](node)
    except (ValueError, KeyError):  # an explicit tag that does not fit, such as `!!int ten`
        raise UserError(f"{place}: this value cannot be read as `!!{tag}`") from None


def _tag_error(node: yaml.Node, place: Place) -> UserError:
    tag = node.tag.replace(_TAG, "!!")
    kinds = "text, numbers, booleans, lists and mappings"
    return UserError(f"{place}: the tag `{tag}` is not allowed; a recipe holds {kinds}")
