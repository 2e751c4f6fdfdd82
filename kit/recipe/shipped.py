"""The recipes that come with the kit: to list, to read and to copy as a start for one's own."""

import os
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from kit.errors import UserError, did_you_mean
from kit.files import write_text

SCHEMA = "recipe.schema.json"
_SCHEMA_LINE = re.compile(r"^# yaml-language-server: \$schema=.*$", re.MULTILINE)
_EXTENDS_LINE = re.compile(r"^extends:[ \t]*(?P<path>\S+)", re.MULTILINE)
_ADDED_ARGUMENTS = re.compile(r'^(?P<before># Override: add )ARGS="(?P<arguments>.*)"$', re.MULTILINE)


class ShippedRecipe(NamedTuple):
    """One recipe of the kit.

    Attributes:
        name: folder and stem, such as `text/lm_gpt2_full`.
        path: the file.
        purpose: the first sentence of its header.
        needs: what its header says that it needs.
    """

    name: str
    path: Path
    purpose: str
    needs: str


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed package, beside `kit/` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    # The build puts them into the package (setup.py); an editable install is the checkout.
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the shipped recipes, sorted by name.

    Raises:
        UserError: the installation has none.
    """
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise UserError(f"{folder}: holds no recipes; this installation of the kit is not complete")
    return [_read(path, path.relative_to(folder).with_suffix("").as_posix()) for path in paths]


def find_recipe(name: str) -> ShippedRecipe:
    """Return a shipped recipe by its name, or by its stem alone where no other has it.

    Raises:
        UserError: there is no such recipe, or there are several.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    wanted = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    if wanted in recipes:
        return recipes[wanted]
    same_stem = [full for full in recipes if Path(full).name == wanted]
    if len(same_stem) > 1:
        raise UserError(f"`{name}`: several recipes have this name: {', '.join(same_stem)}")
    if not same_stem:
        # Whoever gives a stem alone is told a stem, which resembles it more than a full name does.
        names = list(recipes) if "/" in wanted else [Path(full).name for full in recipes]
        raise UserError(f"`{name}`: no such recipe{did_you_mean(wanted, names)} (`kit recipes` lists them)")
    return recipes[same_stem[0]]


def list_recipes() -> str:
    """Return a listing of the shipped recipes: name, purpose and needs of each."""
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    recipes = shipped_recipes()
    blocks = []
    for recipe in recipes:
        lines = [recipe.name]
        for label, text in (("", recipe.purpose), ("needs: ", recipe.needs)):
            lines += textwrap.wrap(
                label + text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
        blocks.append("\n".join(lines))
    example = f"`kit recipes {recipes[-1].name}` prints one, `--copy my_recipe.yaml` copies it to start from."
    return "\n\n".join([*blocks, example]) + "\n"


def show_recipes(name: str | None, destination: str | None) -> str:
    """Return what `kit recipes` prints: the list, one recipe, or what was copied and the command to type next.

    Raises:
        UserError: there is no such recipe, or it cannot be copied there.
    """
    if name is None and destination is not None:
        raise UserError("--copy: which recipe? `kit recipes` lists them; `kit recipes NAME --copy FILE` copies one")
    if name is None:
        return list_recipes()
    recipe = find_recipe(name)
    if destination is None:
        return recipe.path.read_text(encoding="utf-8")
    files = copy_recipe(recipe, destination)
    own, *bases = [shlex.quote(str(file)) for file in files]
    lines = [f"wrote {own}" + (f" and what it extends: {', '.join(bases)}" if bases else "")]
    if recipe.needs:
        lines.append(f"needs: {recipe.needs}")
    return "\n".join([*lines, f"next:  kit check {own}"]) + "\n"


def copy_recipe(recipe: ShippedRecipe, destination: str) -> list[Path]:
    """Copy a recipe and, beside it, what it extends, each adapted to where it lies; return the files, its own first.

    What a run computes then depends on the copies alone. The comment that shows editors the schema leads to the
    installed kit's, which knows the keys that this kit takes. A base that lies there unchanged is used as it is.

    Args:
        recipe: the recipe.
        destination: a file to write, ending in `.yaml`, or a folder.

    Raises:
        UserError: a file is there already, or the destination is no place for a recipe.
    """
    target = _target(destination, recipe)
    chain = _chain(recipe.path)
    targets = [target, *(target.with_name(path.name) for path in chain[1:])]
    if len(set(targets)) < len(targets):
        raise UserError(f"--copy: `{target.name}` is the name of a recipe that {recipe.name} extends; choose another")
    texts = {to: _relocated(path, to) for path, to in zip(chain, targets, strict=True)}
    for to, text in texts.items():
        if to.exists() and (to == target or not _holds(to, text)):
            what = "exists" if to == target else f"exists, and is not the one that {recipe.name} extends"
            raise UserError(f"--copy: {to}: {what}; nothing is overwritten, choose another name or folder")
    for to, text in reversed(texts.items()):
        try:
            if not to.exists():
                write_text(to, text)
        except OSError as error:
            raise UserError(f"--copy: {to}: cannot be written: {error.strerror}") from error
    return targets


def _read(path: Path, name: str) -> ShippedRecipe:
    header = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    purpose = " ".join(header[: header.index("")] if "" in header else header)
    needs: list[str] = []
    for line in header:
        if line.startswith("Needs:"):
            needs = [line.removeprefix("Needs:").strip()]
        elif needs and (not line or re.match(r"[A-Z][a-z&]*:", line)):
            break
        elif needs:
            needs.append(line)
    return ShippedRecipe(name, path, purpose, " ".join(needs))


def _target(destination: str, recipe: ShippedRecipe) -> Path:
    path = Path(destination)
    if destination.endswith("/") or (destination and path.is_dir()):
        path = path / recipe.path.name
    elif path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--copy: `{destination}`: expected a file that ends in .yaml, or a folder that exists")
    around = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.exists())
    if not around.is_dir():
        raise UserError(f"--copy: `{destination}`: {around} is no folder")
    return path


def _chain(path: Path) -> list[Path]:
    """Return a recipe's file and those that it extends, directly and through others."""
    chain = [path]
    while match := _EXTENDS_LINE.search(chain[-1].read_text(encoding="utf-8")):
        chain.append((chain[-1].parent / match["path"]).resolve())
    return chain


def _relocated(path: Path, to: Path) -> str:
    """Return the text of a recipe as it reads at its new place."""
    text = path.read_text(encoding="utf-8")
    schema = os.path.relpath(recipes_folder() / SCHEMA, to.absolute().parent.resolve())
    text = _SCHEMA_LINE.sub(lambda _: f"# yaml-language-server: $schema={Path(schema).as_posix()}", text)
    text = _EXTENDS_LINE.sub(lambda match: f"extends: {Path(match['path']).name}", text)
    # The header's command should start the copy, not the recipe that it was copied from. It names the file without its
    # folder: a base that two recipes extend is then the same text, from wherever they were copied.
    original = f"recipes/{path.relative_to(recipes_folder()).as_posix()}"
    text = text.replace(f"make train RECIPE={original}", f"kit train {shlex.quote(to.name)}")
    text = text.replace(f"kit merge runs/{path.stem} ", f"kit merge {shlex.quote(f'runs/{to.stem}')} ")
    return _ADDED_ARGUMENTS.sub(r"\g<before>\g<arguments>", text)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text
