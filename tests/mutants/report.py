"""The table of docs/testing.md, and the mutants that change nothing."""

import subprocess
from collections import Counter
from pathlib import Path

from candidates import Mutant

PAGE = "docs/testing.md"
BEGIN, END = "<!-- written by `make mutants` -->", "<!-- end -->"
EQUIVALENT = Path(__file__).with_name("equivalent.txt")


def read_equivalents(root: Path) -> dict[tuple[str, str, str], str]:
    """Why a change (file, old line, new line) changes nothing, from equivalent.txt: four lines for each.

    Paragraphs that begin with # are comments.

    Raises:
        ValueError: an entry is not of four lines, or its file no longer has its old line.
    """
    why = {}
    for entry in EQUIVALENT.read_text().strip().split("\n\n"):
        if entry.startswith("#"):
            continue
        file, old, new, reason = entry.split("\n")
        if old[:2] != "- " or new[:2] != "+ ":
            raise ValueError(f"{EQUIVALENT.name}: expected a file, '- old line', '+ new line' and the reason: {entry}")
        if old[2:] not in map(str.strip, (root / file).read_text().splitlines()):
            raise ValueError(f"{EQUIVALENT.name}: {file} no longer has the line {old[2:]!r}")
        why[file, old[2:], new[2:]] = reason
    return why


def write(root: Path, results: list[tuple[Mutant, str]], equivalents: dict, seed: int) -> str | None:
    """Puts the table into the page. Returns what is left to do, None where every mutant has been noticed."""
    counts: dict[str, Counter] = {}
    survivors, equal, wrong = [], [], []
    for mutant, outcome in results:
        why = equivalents.get((mutant.file, mutant.old, mutant.new))
        change = f"{mutant.file}:{mutant.line} `{mutant.old}` → `{mutant.new}`"
        if outcome != "survived":
            wrong += [change] if why else []
        elif why:
            outcome = "equivalent"
            equal.append(f"- {change}: {why}")
        else:
            survivors.append(f"- {change}{f' ({mutant.what})' if mutant.what else ''}")
        part = f"{mutant.part}, named" if mutant.what else mutant.part
        counts.setdefault(part, Counter())[outcome] += 1
    counts["all"] = sum(counts.values(), Counter())
    lines = ["| part | made | killed | equivalent | survived |", "|---|---|---|---|---|"]
    lines += [f"| {part} | {count.total()} | {count['killed'] + count['timed out']} | {count['equivalent']} | "
              f"{count['survived']} |" for part, count in counts.items()]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True).stdout
    lines += ["", f"`make mutants`, seed {seed}, commit {commit.strip() or 'unknown'}; {counts['all']['timed out']} of "
              "the killed ran out of time."]
    lines += ["", "Survived:", "", *survivors] if survivors else []
    lines += ["", "Equivalent, for they change nothing that a caller could see:", "", *equal] if equal else []
    before, _, rest = (root / PAGE).read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    (root / PAGE).write_text("\n".join([before + BEGIN, *lines, END + after]))
    print(*lines, sep="\n")
    if wrong:
        return "called equivalent in equivalent.txt, but a test notices:\n" + "\n".join(wrong)
    return f"{len(survivors)} survived" if survivors else None
