"""The layers of a recipe: the files it extends, the file itself, and the overrides of the command line."""

from pathlib import Path
from typing import Any

from kit.errors import UserError
from kit.recipe.models import Recipe
from kit.recipe.secrets import refuse_secret_override, refuse_secrets, refuse_secrets_in_text
from kit.recipe.tasks import recipe_model
from kit.recipe.words import describe_value, dotted, types_at
from kit.recipe.yaml import Document, Keys, Place, parse_yaml, read_text


def read_layers(path: str, naming: tuple[str, ...] = ()) -> Document:
    """Return the document of a file, merged over the file that it extends.

    Mappings are merged key by key; anything else, lists included, replaces what was inherited. Null replaces it too,
    and where a key does not take null, it drops what was inherited: an evaluation set, say, or a number.

    Args:
        path: the file.
        naming: the files whose `extends` led here, outermost first.

    Raises:
        UserError: a file is missing or is no recipe, holds a secret, or extends itself.
    """
    text = read_text(path)
    refuse_secrets_in_text(text, path)
    document = parse_yaml(text, path)
    if document is None or document.data is None:
        raise UserError(f"{path}:1: the file holds no recipe; expected a mapping with `task`, `model` and `data`")
    if not isinstance(document.data, dict):
        raise UserError(
            f"{document.places[()]}: found {describe_value(document.data)}; "
            "expected a mapping with `task`, `model` and `data`"
        )
    refuse_secrets(document)
    if "extends" not in document.data:
        return document
    place, base = document.places[("extends",)], _base_path(document, path)
    chain = (*naming, path)
    if (again := _position(base, chain)) is not None:
        raise UserError(f"{place}: extends: the files extend each other: {' -> '.join((*chain[again:], base))}")
    if not Path(base).is_file():
        raise UserError(f"{place}: extends: no such file: {Path(base).resolve()} (relative to the file that names it)")
    del document.data["extends"]
    return _merge(read_layers(base, chain), document)


def _base_path(document: Document, path: str) -> str:
    value, place = document.data["extends"], document.places[("extends",)]
    if not isinstance(value, str) or not value:
        hint = "; a file extends one other, which may extend a third" if isinstance(value, list) else ""
        raise UserError(f"{place}: extends: found {describe_value(value, place)}; expected the path of one file{hint}")
    return str(Path(path).parent / value)


def _position(path: str, chain: tuple[str, ...]) -> int | None:
    return next((i for i, other in enumerate(chain) if Path(other).resolve() == Path(path).resolve()), None)


def _merge(base: Document, child: Document) -> Document:
    root = recipe_model(child.data if isinstance(child.data, dict) and "task" in child.data else base.data)

    def merge(below: Any, above: Any, keys: Keys) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            _replace_places(base.places, keys, child.places)
            return above
        base.places[keys] = child.places[keys]
        for key, value in above.items():
            if value is None and key in below and not _takes_null((*keys, key), root):
                del below[key]
                _replace_places(base.places, (*keys, key), {})
            else:
                below[key] = merge(below.get(key), value, (*keys, key))
        return below

    return Document(merge(base.data, child.data, ()), base.places)


def _takes_null(keys: Keys, root: type[Recipe]) -> bool:
    types = types_at(keys, root)
    return not types or Any in types or type(None) in types  # no types: an unknown key, which is to be reported


def _replace_places(places: dict[Keys, Place], keys: Keys, new: dict[Keys, Place]) -> None:
    """Replace the places at and below `keys` by those of `new` at and below the same keys."""
    for old in [k for k in places if k[: len(keys)] == keys]:
        del places[old]
    places.update({k: place for k, place in new.items() if k[: len(keys)] == keys})


def apply_override(document: Document, override: str) -> None:
    """Set one value of the document from `section.key=value`; an entry of a list is named by its number, from 0.

    The value is YAML. An empty one is null.

    Raises:
        UserError: no `=`, no key, a value that is not YAML or holds a secret, or a key below a value that has none.
    """
    refuse_secret_override(override)
    shown = override if len(override) <= 100 else f"{override[:100]}…"
    source = f"command line: {' '.join(shown.split())}"
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{source}: expected section.key=value, such as training.learning_rate=2e-5")
    if keys == ["extends"]:
        raise UserError(f"{source}: `extends` is read from files only; give the other recipe, or override its keys")
    value = parse_yaml(text, source, with_lines=False)
    if value is None:
        if text.strip():
            raise UserError(f"{source}: YAML reads the value as a comment; put quotes around it: {name}='\"…\"'")
        value = Document(None, {(): Place(source)})
    _set(document, keys, value, source)


def _set(document: Document, keys: list[str], value: Document, source: str) -> None:
    around: Any = document.data
    path: Keys = ()
    for depth, name in enumerate(keys):
        last = depth == len(keys) - 1
        key: str | int = name
        if isinstance(around, list):
            key = _index(around, name, path, source)
        elif not isinstance(around, dict):
            found = describe_value(around, document.place(path))
            raise UserError(f"{source}: `{dotted(path)}` is not a section: it holds {found}")
        path = (*path, key)
        if last:
            around[key] = value.data
            _replace_places(document.places, path, {(*path, *k): place for k, place in value.places.items()})
            return
        if isinstance(around, dict) and around.get(key) is None:
            if keys[depth + 1].isdigit():
                raise UserError(f"{source}: the recipe has no list `{dotted(path)}`, so no entry {keys[depth + 1]}")
            around[key] = {}
            document.places[path] = Place(source)
        around = around[key]


def _index(entries: list[Any], name: str, path: Keys, source: str) -> int:
    if not name.isdecimal():
        raise UserError(f"{source}: `{dotted(path)}` is a list; expected the number of an entry, found `{name}`")
    if int(name) >= len(entries):
        numbers = f"numbers 0 to {len(entries) - 1}" if entries else "no entries"
        raise UserError(f"{source}: `{dotted(path)}` has {numbers}, found `{name}`")
    return int(name)
