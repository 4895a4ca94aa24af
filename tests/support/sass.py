"""What ptxas made of a kernel, read from its machine code (SASS)."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;", re.MULTILINE)
WIDTHS = {".64": 2, ".128": 4}  # registers that a load fills


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: all of them spills."""
    text = _run("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return dict(registers=int(registers), stack=int(stack))


def instructions(cubin: bytes) -> dict[str, int]:
    """Instructions of a warp, in the order of the code; its loads, and how many stand before the first use of one.

    Of a kernel that waits for the one before it: also how many loads and stores stand before that wait.
    """
    found = INSTRUCTION.findall(_run("nvdisasm", "-c", cubin))
    while found[-1][0] == "NOP":
        found.pop()
    loaded, early = set(), None
    for i, (operation, operands) in enumerate(found):
        target, _, sources = operands.partition(",")
        if operation.startswith("LDG"):
            if loaded.isdisjoint(_registers(sources)):
                first, = _registers(target)
                loaded |= {first + n for n in range(next((n for end, n in WIDTHS.items() if end in operation), 1))}
                continue
        elif loaded.isdisjoint(_registers(operands if operation.startswith("ST") else sources)):
            continue
        early = i
        break
    count = lambda part: sum(operation.startswith("LDG") for operation, _ in part)
    waits = [i for i, (operation, _) in enumerate(found) if operation == "ACQBULK"]
    unordered = sum(operation.startswith(("LDG", "STG")) for operation, _ in found[: waits[0]]) if waits else None
    return dict(instructions=len(found), loads=count(found), early=count(found[:early]), before_wait=unordered)


def _registers(operands: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], check=True, text=True, capture_output=True).stdout
