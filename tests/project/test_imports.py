"""Who imports whom: one way only, from the top rooms of docs/design.md down; and no file is too long to read."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import harmonica_dit

ROOT = Path(__file__).parents[2]
PACKAGES = {"harmonica_kernels": ROOT / "harmonica_kernels", "harmonica_dit": ROOT / "python" / "harmonica_dit"}

# From the top down (docs/design.md, section 4): a room, a file or folder of the package, imports those below it. Rooms
# of one line may import each other. Each package's __init__.py stands below all that imports the package as a whole.
ORDER = {
    "harmonica_kernels": (("__main__", "_command"), ("__init__",), ("graphs",), ("forward",), ("checks",),
                          ("cache", "trunk"), ("ops", "_info"), ("triton_kernels", "_lazy")),
    "harmonica_dit": (("cli",), ("cli_compare", "cli_schedule", "cli_train"), ("cli_errors", "cli_options"), ("demo",),
                      ("__init__",), ("published_routers",), ("load",), ("train",), ("evaluate",), ("pipelines",),
                      ("methods",), ("sample",), ("router",), ("adaptive", "schedule"), ("resample",),
                      ("fashion",), ("forecaster",), ("validate",), ("models",), ("flops",), ("costs",),
                      ("files", "launcher", "memory", "progress", "ranks", "repository", "timing")),
}
COMPILED = {"harmonica_kernels._C"}  # has no Python file
LINES = 350


def modules_of(package: str, folder: Path) -> dict[str, Path]:
    """The package's modules by dotted name; that of a folder stands for its __init__.py."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def names_in(module: str, path: Path) -> set[str]:
    """Dotted names of all that the file imports, wherever the import stands in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names - COMPILED


def imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """For every module those of `modules` that it imports: where a name is no module, the one that holds it."""
    found = {}
    for module, path in modules.items():
        names = names_in(module, path)
        found[module] = {next((of for of in (name, name.rpartition(".")[0]) if of in modules), None) for name in names}
        found[module] -= {None, module}
    return found


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn; none: []."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def level(module: str, order: tuple[tuple[str, ...], ...]) -> int:
    room = (*module.split(".")[1:], "__init__")[0]
    (number,) = [i for i, rooms in enumerate(order) if room in rooms] or [None]
    assert number is not None, f"{module}: give its room {room!r} a place in ORDER and in docs/design.md"
    return number


def upward(found: dict[str, set[str]], order: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports of a room above the importing one."""
    return sorted(f"{module} imports {other}" for module, others in found.items() for other in others
                  if level(other, order) < level(module, order))


def importers(modules: dict[str, Path], package: str) -> set[str]:
    return {module for module, path in modules.items()
            if any(name.split(".")[0] == package for name in names_in(module, path))}


def long_files(*folders: Path) -> list[str]:
    """Files of code (data may be of any size) above the limit."""
    return [f"{path}: {count} lines" for folder in folders for path in sorted(folder.rglob("*"))
            if path.suffix in (".py", ".sh", ".cpp", ".cu", ".h")
            and (count := len(path.read_text().splitlines())) > LINES]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other(package):
    found = imports(modules_of(package, PACKAGES[package]))
    assert sum(map(len, found.values())) > len(found) / 2  # imports are seen at all
    assert not circle(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_those_below_them(package):
    assert not upward(imports(modules_of(package, PACKAGES[package])), ORDER[package])


def test_the_kernels_know_nothing_of_harmonica_dit_but_its_command():
    modules = modules_of("harmonica_kernels", PACKAGES["harmonica_kernels"])
    assert importers(modules, "harmonica_dit") == {"harmonica_kernels._command"}


def test_no_file_is_longer_than_a_reader_takes():
    assert not long_files(*PACKAGES.values(), ROOT / "bench", ROOT / "tests")


def test_what_is_wrong_is_found(tmp_path):
    """In a package made for it: imports inside functions, for types alone, relative, absolute and by a folder."""
    files = {"__init__.py": "from .top import run\n",
             "top.py": "def run():\n    from .room import inner\n",
             "room/__init__.py": "",
             "room/inner.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..low import Low\n",
             "low.py": f"import made.top\nfrom elsewhere import thing\n{'#' * 3}\n" * LINES}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = modules_of("made", tmp_path)
    found = imports(modules)
    assert found == {"made": {"made.top"}, "made.top": {"made.room.inner"}, "made.room": set(),
                     "made.room.inner": {"made.low"}, "made.low": {"made.top"}}
    assert set(circle(found)) == {"made.top", "made.room.inner", "made.low"}
    assert upward(found, (("__init__",), ("top",), ("room",), ("low",))) == ["made.low imports made.top"]
    with pytest.raises(AssertionError, match="give its room 'low' a place"):
        upward(found, (("__init__",), ("top",), ("room",)))
    assert importers(modules, "elsewhere") == {"made.low"}
    assert long_files(tmp_path) == [f"{tmp_path / 'low.py'}: {3 * LINES} lines"]


HEAVY = {"torch", "numpy", "diffusers", "transformers", "torchmetrics", "sklearn", "matplotlib"}


@pytest.mark.parametrize("statement", [
    "import harmonica_dit",
    "import harmonica_kernels",
    *(f"import harmonica_kernels._command as c; sys.argv = ['harmonica', {words}]; raises(c.main)"
      for words in ("'--help'", "'train', '--help'", "'compare', '--help'")),
])
def test_nothing_heavy_is_imported_before_it_is_used(statement):
    """So help comes at once."""
    command = f"""import sys
def raises(main):
    try:
        main()
    except SystemExit as end:
        assert not end.code
{statement}
print(*sys.modules, file=sys.stderr)"""
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.returncode == 0 and not HEAVY & set(run.stderr.split()), run.stderr


def test_sampling_does_not_import_all_of_diffusers_models():
    """Which takes seconds, and warns of packages that are not there."""
    command = "import sys, harmonica_dit; harmonica_dit.sample; print('diffusers.models.autoencoders' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("package", ["harmonica_kernels", "harmonica_dit", *(
    f"harmonica_dit.{room}" for room in ("train", "evaluate", "methods"))])
def test_what_a_package_offers_is_there(package):
    """Of that name, whichever of its submodules was imported first: some have the name of a function."""
    module = importlib.import_module(package)
    for name in module._homes:
        importlib.import_module(f"{package}.{module._homes[name]}")
        found = getattr(module, name)  # RECIPES is a dict, and has no name
        assert getattr(found, "__name__", name) == name and name in dir(module)
    assert module._homes.keys() == set(module.__all__) - {"__version__"}
    absent = "nothing"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute '{absent}'"):
        getattr(module, absent)


def test_submodules_are_attributes():
    assert harmonica_dit.flops is importlib.import_module("harmonica_dit.flops")
