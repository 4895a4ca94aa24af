"""Options that several commands have, and what they name."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from harmonica_dit.costs import Seconds
    from harmonica_dit.router import Router
    from harmonica_dit.schedule import Schedule

console = Console()  # of the commands that many processes run: one of these writes

Model = Annotated[str, typer.Option(help="The bundled fashion-dit, a DiT configuration such as DiT-XL/2, the folder or "
                                         "repository of a diffusers pipeline, of any class, or module:function, a "
                                         "function without arguments that makes a denoiser.")]
Checkpoint = Annotated[Path | None, typer.Option(help="File of the model's weights, .pt or .safetensors; fashion-dit "
                                                      "has its own.")]
Vae = Annotated[str | None, typer.Option(help="Folder or repository of the VAE that decodes a latent model's samples; "
                                              "a pipeline has its own.")]
Prompts = Annotated[Path | None, typer.Option(help="File of prompts for a text pipeline, one a line; the labels are "
                                                   "their numbers, from 0.")]
Call = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further argument of the call of a pipeline "
                                                "that is run by its own loop, such as max_sequence_length=64; may be "
                                                "repeated.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the model's weights: float32, bfloat16 or float16; training refuses "
                                         "float16.")]
Attention = Annotated[str, typer.Option(help="Back end of a DiT's attention: sdpa, where PyTorch chooses; flash, cudnn "
                                             "or xformers.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.", show_default="the model's own")]
Device = Annotated[str | None, typer.Option(help="Device to compute on, such as cpu or cuda:1.",
                                            show_default="cuda if there is one, else cpu")]
FILE = "File of a router or a schedule, or the name of a bundled router, such as fashion-dit-2.0x"
OwnGuidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.",
                                                   show_default="the file's, or the model's own")]
OwnScheduler = Annotated[str | None, typer.Option(help='"ddim", "iddpm", or the name of a diffusers scheduler.',
                                                  show_default="the file's, with its settings, or the model's own")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the starting noise.")]
Batch = Annotated[int, typer.Option(help="How many images to sample at a time.")]
SpeedupCosts = Annotated[str, typer.Option("--costs", help='What --speedup is in: "flops"; "time", which is measured '
                                           "on this device for --batch images at a time and kept; or a file of such "
                                           "costs, .json.")]
Threshold = Annotated[float | None, typer.Option(help="Compute a branch where the router's score is above this.",
                                                 show_default="the router's own threshold")]


def load(model: str, checkpoint: Path | None, prompts: Path | None, dtype: str, image_size: int | None,
         device: str | None, folder: Path | None = None, vae: str | None = None, attention: str = "sdpa",
         call: list[str] | None = None):
    """Loads the denoiser that the options name; `folder` keeps the encoded prompts."""
    import torch

    import harmonica_dit
    from harmonica_dit import ranks

    arguments = parse_call(call) if call else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks.world() > 1 and device != torch.device(device).type:
        raise ValueError(f"device: got {device}, but each of {ranks.world()} ranks has its own; leave the number out")
    if ":" in model and not Path(model).exists():
        given = dict(checkpoint=checkpoint, prompts=prompts, image_size=image_size, vae=vae, call=call or None)
        return denoiser_of(model, [name for name, value in given.items() if value is not None], dtype, device)
    texts = kept = None
    if prompts is not None:
        from harmonica_dit.pipelines.prompts import read_texts  # with all of diffusers' models, which take seconds

        texts, kept = read_texts(prompts), folder and folder / "prompts.safetensors"
    return ranks.main_first(lambda: harmonica_dit.load(
        model, checkpoint, image_size=image_size, vae=vae, dtype=dtype, prompts=texts, embeddings=kept, device=device,
        attention=attention, call=arguments))


def parse_call(call: list[str]) -> dict[str, Any]:
    """A pipeline's further arguments; values are JSON, and texts where they are none."""
    arguments = {}
    for text in call:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()) or name in arguments:
            raise ValueError(f"--call: got {text!r}, expected NAME=VALUE, each name once")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def denoiser_of(model: str, given: list[str], dtype: str, device: str):
    """The denoiser that a function makes, named as module:function; modules of the current folder are found too.

    given: other options of the model, which are refused.
    """
    from harmonica_dit.load import check_device, check_dtype
    from harmonica_dit.validate import check_denoiser

    dtype, device = check_dtype(dtype), check_device(device)
    if given:
        raise ValueError(f"{given[0]}: {model} makes its model itself and takes none")
    module, _, function = model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"name: {model} names no function in a module: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    net = make()
    check_denoiser(net)
    return net.eval().requires_grad_(False).to(device, dtype)


def read_costs(costs: str) -> "str | Seconds":
    """What --costs names: "flops", "time", or the table in a file; said before the model is loaded."""
    from harmonica_dit.costs import Seconds

    if costs not in ("flops", "time") and not costs.endswith(".json"):
        raise ValueError(f'--costs: got {costs!r}, expected "flops", "time" or a .json file')
    return Seconds.load(costs) if costs.endswith(".json") else costs


def table_of(costs: "str | Seconds", net, batch: int, guidance=None, scheduler=None) -> "Seconds | None":
    """The table that a speedup is in, by what `read_costs` found, measured now if need be; None is FLOPs."""
    import harmonica_dit
    from harmonica_dit import ranks

    if costs == "time":  # once, not by every rank
        return ranks.on_main(lambda: harmonica_dit.measure_costs(net, batch=batch, guidance=guidance,
                                                                 scheduler=scheduler))
    return None if costs == "flops" else costs


def option_value(option: str, given, found: list, default):
    """An option's value: the given one, else the one that what was `found` was made for, else `default`."""
    if given is not None:
        return given
    values = {getattr(one, option) for one in found if one is not None} - {None}
    if len(values) > 1:
        raise ValueError(f"--{option}: the files were made for {', '.join(sorted(map(str, values)))}; give one")
    return values.pop() if values else default


def scheduler_value(given: str | None, found: list, net):
    """The value of --scheduler: the given one, else that of what was `found`, with its settings, else the model's.

    A file that names a scheduler without settings, as a router's does, has those that the name has for this model.
    """
    from harmonica_dit.sample.schedulers import config_of, from_record, make_scheduler
    from harmonica_dit.validate import differing

    name = option_value("scheduler", given, found, net.scheduler)
    naming = [one for one in found if one is not None and one.scheduler is not None]
    records = [getattr(one, "scheduler_config", None) for one in naming]
    if given is not None or not any(records):
        return name
    unsaid = config_of(make_scheduler(name, naming[0].steps, net)) or {}
    records = [unsaid if config is None else config for config in records]
    if any(differing(config, other) for config in records for other in records):
        raise ValueError(f"--scheduler: the files were made for {name} of different settings; give one, or one file at "
                         "a time")
    return from_record(name, records[0])


def describe(schedule: "Schedule", path: Path, costs: "Seconds | None" = None,
             made: "Router | Schedule | None" = None) -> str:
    """A file's schedule in a line; `made` says more of a router."""
    from harmonica_dit.router import Router

    text = f"{path}: {schedule.steps} steps, CUR {schedule.cur:.1%}, FLOPs speedup {schedule.speedup:.2f}×"
    if costs:
        text += f", in time by what was measured {schedule.speedup_by(costs):.2f}×"
    if isinstance(made, Router):
        text += f", {made.soft_share:.0%} of the scores soft" + (f", recipe: {made.recipe}" if made.recipe else "")
    return text
