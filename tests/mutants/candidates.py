"""Single-line changes of a Python file: cosmic-ray's operators, and a draw among them."""

import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

# An operator is replaced by one of its own kind only; most others would raise an error at once, which any test notices.
KINDS = ({"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
         {"Is", "IsNot"})


class Mutant(NamedTuple):
    """One changed line. what: its name where it has one. file: from the tree's root. text: the whole changed file."""

    part: str
    what: str
    file: str
    line: int
    old: str
    new: str
    text: str


def _operators() -> dict:
    wanted = {}
    for name in operator_names():
        _, *swap = name.split("_")
        operator = get_operator(name)
        if not operator.arguments() and (not swap or swap[0] == "Delete" or any(set(swap) <= kind for kind in KINDS)):
            wanted[name] = operator()
    return wanted


OPERATORS = _operators()


def places(text: str) -> dict[int, dict[int, list[tuple[str, int]]]]:
    """By line and column, the changes that can be made there, as operator and occurrence for `mutate_code`."""
    nodes = list(ast_nodes(get_ast(text)))
    found: dict = defaultdict(lambda: defaultdict(list))
    for name, operator in OPERATORS.items():
        occurrence = 0
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                if not _is_words(node):
                    found[line][column].append((name, occurrence))
                occurrence += 1
    return found


def _is_words(node) -> bool:
    """Whether a node is only part of a message, of an annotation, or of an import for type checkers."""
    while node.parent is not None:
        parent = node.parent
        if node.type in ("fstring", "raise_stmt"):
            return True
        if node.type == "atom_expr" and node.get_code().lstrip().startswith("warnings.warn("):
            return True
        if parent.type == "tfpdef" or parent.type == "funcdef" and node is parent.annotation:
            return True
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "if_stmt" and parent.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        node = parent
    return False


def changed(part: str, what: str, file: str, before: str, after: str) -> Mutant | None:
    """The mutant that makes `before` into `after`; None where it is not one line that differs, or no Python."""
    lines, new = before.splitlines(), after.splitlines()
    differing = [i for i, (a, b) in enumerate(zip(lines, new)) if a != b]
    if len(lines) != len(new) or len(differing) != 1:
        return None
    try:
        compile(after, file, "exec")
    except SyntaxError:
        return None
    (i,) = differing
    return Mutant(part, what, file, i + 1, lines[i].strip(), new[i].strip(), after)


def draw(root: Path, part: str, files, count: int, seed: int) -> list[Mutant]:
    """`count` changes of the files, on as many lines: every line with something to change has the same chance, then
    every place on it, then every change there. The same seed and files give the same draw."""
    texts = {file: (root / file).read_text() for file in files}
    found = {file: places(text) for file, text in texts.items()}
    lines = [(file, line) for file in sorted(found) for line in sorted(found[file])]
    generator = random.Random(f"{seed} {part}")
    generator.shuffle(lines)
    mutants: list[Mutant] = []
    for file, line in lines:
        if len(mutants) == count:
            break
        columns = found[file][line]
        name, occurrence = generator.choice(columns[generator.choice(sorted(columns))])
        try:
            after = mutate_code(texts[file], OPERATORS[name], occurrence)
        except AttributeError:  # cosmic-ray knows no exceptions whose names have a dot
            continue
        mutants += filter(None, [changed(part, "", file, texts[file], after)])
    return mutants


def named(root: Path, what: str, part: str, file: str, old: str, new: str) -> Mutant:
    """The change of the one line `old` of a file into `new`.

    Raises:
        ValueError: the file has no such line, or several.
    """
    text = (root / file).read_text()
    lines = text.splitlines(keepends=True)
    same = [i for i, line in enumerate(lines) if line.strip() == old]
    mutant = None
    if len(same) == 1:
        lines[same[0]] = lines[same[0]].replace(old, new)
        mutant = changed(part, what, file, text, "".join(lines))
    if mutant is None:
        raise ValueError(f"{what}: {file} has {len(same)} lines {old!r}, and exactly one is to become {new!r}")
    return mutant
