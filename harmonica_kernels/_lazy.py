"""Packages that import what they offer when it is first used, so that importing them takes no time."""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package whose public names are imported when they are first used. Submodules, too, are attributes."""

    _homes: dict[str, str]  # public name -> the submodule that it is in

    def __getattr__(self, name: str) -> Any:
        if name in self._homes:
            value = getattr(import_module(f"{self.__name__}.{self._homes[name]}"), name)
            setattr(self, name, value)  # from now on an ordinary attribute
            return value
        if not name.startswith("_") and find_spec(f"{self.__name__}.{name}"):
            return import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Python binds an imported submodule to its name; a public function of that name, such as `load`, stays."""
        if not (isinstance(value, ModuleType) and name in self._homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def import_when_used(package: str) -> None:
    """Makes a package lazy: what it imports from its submodules under `if TYPE_CHECKING:` is imported when used."""
    module = sys.modules[package]
    tree = ast.parse(module.__spec__.loader.get_source(package))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    module._homes = {alias.name: line.module for block in blocks for line in block.body for alias in line.names}
    module.__class__ = LazyPackage
