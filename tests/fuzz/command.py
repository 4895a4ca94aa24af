"""The command line, up to where its work begins."""

import importlib
import re
from functools import cache
from unittest.mock import patch

import typer.main
from hypothesis import strategies as st
from typer.testing import CliRunner

import harmonica_dit
from harmonica_dit import cli, cli_compare, cli_schedule, demo
from harmonica_dit.evaluate import heat_maps

from .campaign import Outcome
from .mutate import NUMBERS, TEXTS

importlib.import_module("harmonica_dit.pipelines.prompts")  # with packages that print when they are imported


class Begins(BaseException):
    """The work would begin here."""


def begin(*args, **kwargs):
    raise Begins


@cache
def command():
    return typer.main.get_command(cli.app)


USUAL = {"--out": ("out.safetensors", "out.png", "out"), "--method": ("fora", "smoothcache", "uncached"),
         "--model": ("fashion-dit", "DiT-S/2", "os:nothing", "none:none", ":", "a:b:c"), "--dtype": ("float32",),
         "--forecast": ("1", "accurate", "uncached"), "--recipe": ("paper", "recommended"),
         "--schedule": ("fashion-dit-2.0x", "none.safetensors", "hostile.safetensors", "."),
         "--costs": ("flops", "time", "none.json", "hostile.json"), "--prompts": ("none.txt", "hostile.txt", "."),
         "--labels": ("1,2", "dress"), "--steps": ("10", "20"), "--importance": ("paper", "gain"),
         "--speedup": ("2", "1.5"), "--every": ("2",)}
TEXT = st.sampled_from((*(str(number) for number in NUMBERS), *(text for text in TEXTS if "/" not in text))) | st.text(
    max_size=8).filter(lambda text: "/" not in text and ".." not in text and ":" not in text)  # nothing elsewhere


def options(name: str):
    """Words for the parameters of a command: most are usual, some are anything."""
    pairs, flags = [], ["--nothing", "-x", "--", "--help"]
    for parameter in command().commands[name].params:
        option = max(parameter.opts, key=len)
        if not option.startswith("-"):
            pairs.append(st.tuples(st.sampled_from(USUAL["--schedule"]) | TEXT))
        elif getattr(parameter, "is_flag", False):
            flags.append(option)
        else:
            usual = USUAL.get(option, USUAL["--schedule"] if option == "--router" else ("1", "20"))
            value = st.sampled_from(usual)
            pairs.append(st.tuples(st.just(option), st.one_of(*[value] * 7, TEXT)))
    start = {"show": [["fashion-dit-2.0x"]], "demo": [[]]}.get(name, [["--out", out] for out in USUAL["--out"]])
    return st.builds(lambda first, more: [name, *first, *(word for part in more for word in part)],
                     st.sampled_from(start * 5 + [[]]),
                     st.lists(st.one_of(*pairs, *pairs, st.tuples(st.sampled_from(flags))), max_size=4))


words = st.one_of(*(options(name) for name in command().commands), *(options(name) for name in command().commands),
                  st.lists(TEXT, max_size=3))


def run_command(given: list[str]) -> Outcome:
    """Either the work begins, or the command says in a line what is wrong: exit status 2."""
    with patch.object(harmonica_dit, "load", begin), patch.object(demo, "run", begin), \
            patch.object(heat_maps, "plot", begin), patch.object(cli_compare, "load", begin), \
            patch.object(cli_schedule, "load", begin), \
            patch("typer.testing._get_command", lambda app: command()):  # which otherwise is built each time
        try:
            result = CliRunner().invoke(cli.app, given)
        except Begins:
            return Outcome(True, None)
    if result.exit_code == 0 or not given:
        return Outcome(True, None)  # help, or the version
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = result.stderr.strip()
    if result.exit_code == 2 and said.startswith("Usage: "):
        return Outcome(False, ValueError("what stands before the command"))
    assert result.exit_code == 2 and said.count("\n") == 0 and said.startswith("harmonica: "), said[-300:]
    parsing = r"harmonica: (No such|Missing|Invalid value|Got unexpected|Option|Error|.*requires an argument)"
    return Outcome(not re.match(parsing, said), ValueError(said))
