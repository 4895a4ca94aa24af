"""The command `harmonica schedule`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harmonica_dit.evaluate.catalogue import CATALOGUE, Scheduled

from .cli_options import (
    Attention,
    Batch,
    Call,
    Checkpoint,
    Device,
    Dtype,
    ImageSize,
    Model,
    Prompts,
    SpeedupCosts,
    describe,
    load,
    read_costs,
    table_of,
)

METHODS = {name: one for name, one in CATALOGUE.items() if isinstance(one, Scheduled) and one.kept}
SPACED = ", ".join(name for name, one in METHODS.items() if one.whole_steps)
ORDERED = ", ".join(name for name, one in METHODS.items() if one.whole_steps and "order" not in one.settings)


def schedule(
    out: Annotated[Path, typer.Option(help="File to write, .safetensors; sample, compare, show and enable_cache take "
                                           "it.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}. step-search and smoothcache sample a few "
                                             "images to calibrate.")] = "fora",
    every: Annotated[int | None, typer.Option(help=f"Compute every n-th step: {SPACED}.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Speedup to reach, in place of --every.")] = None,
    costs: SpeedupCosts = "flops",
    batch: Batch = 64,
    forecast: Annotated[int | None, typer.Option(help=f"Order of what is forecast, 0 to 3, where 0 repeats: {ORDERED}.",
                                                 show_default="fora: 0, the others: 1")] = None,
    steps: Annotated[int, typer.Option(help="Number of steps of a trajectory, T.")] = 20,
    model: Model = "fashion-dit",
    checkpoint: Checkpoint = None,
    prompts: Prompts = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    image_size: ImageSize = None,
    call: Call = None,
    device: Device = None,
) -> None:
    """Make a schedule without training, such as FORA's: every n-th step is computed."""
    from harmonica_dit.files import check_file

    if out.suffix != ".safetensors":
        raise ValueError(f"--out: got {out}, expected a .safetensors file")
    if method not in METHODS:
        raise ValueError(f"--method: got {method!r}, expected one of {', '.join(METHODS)}")
    if (every is None) == (speedup is None):
        raise ValueError("--every, --speedup: give exactly one of them")
    for name, value, those in (("--every", every, SPACED), ("--forecast", forecast, ORDERED)):
        if value is not None and method not in those.split(", "):
            raise ValueError(f"{name}: {method} has none, these have: {those}")
    if every is not None and costs != "flops":
        raise ValueError("--costs: is what --speedup is in; --every has none")
    table = read_costs(costs)
    check_file(out)
    net = load(model, checkpoint, prompts, dtype, image_size, device, attention=attention, call=call)
    table = table_of(table, net, batch)
    wanted = dict(every=every, order=forecast, speedup=speedup, costs=table)
    made = METHODS[method].make(net, steps, **{name: value for name, value in wanted.items() if value is not None})
    made.save(out)
    Console().print(describe(made, out, table), soft_wrap=True)
