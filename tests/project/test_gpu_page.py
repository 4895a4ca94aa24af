"""docs/gpu.md shows what was measured on a GPU, and nothing else."""

from bench.gpu.page import PAGE, TABLE, TABLES, table, write_tables


def test_its_tables_are_those_of_the_files():
    page = PAGE.read_text()
    assert {kind for _, kind in TABLE.findall(page)} == set(TABLES) and write_tables(page) == page


def test_what_falls_short_is_marked():
    """A table of numbers of which some are short and some are not, both ways round."""
    [(file, _)] = {(file, kind) for file, kind in TABLE.findall(PAGE.read_text()) if kind == "ratios"}
    for line in table(file, "ratios").splitlines()[2:]:
        _, reached, to_reach = line.strip("| ").rsplit(" | ", 2)
        value, (sign, goal) = float(reached.strip("*").removesuffix(", short")), to_reach.split()
        assert ("short" in reached) == (value > float(goal) if sign == "≤" else value < float(goal)), line
