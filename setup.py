"""What pyproject.toml cannot say: the recipes, which lie beside the package, belong into it when it is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")


class BuildWithRecipes(build_py):
    """Copies `recipes/` to `kit/recipes/` of the build; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the package and put the recipes into it."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "kit" / RECIPES
            shutil.rmtree(target, ignore_errors=True)  # an earlier build's may hold recipes that are no more
            shutil.copytree(RECIPES, target)

    def get_source_files(self) -> list[str]:
        """Return the files of a source distribution, the recipes among them."""
        return [*super().get_source_files(), *(str(path) for path in sorted(RECIPES.rglob("*")) if path.is_file())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that the build writes, the recipes among them."""
        recipes = [str(Path(self.build_lib) / "kit" / path) for path in sorted(RECIPES.rglob("*")) if path.is_file()]
        return [*super().get_outputs(include_bytecode), *recipes]


setup(cmdclass={"build_py": BuildWithRecipes})
