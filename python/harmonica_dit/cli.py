"""The command `harmonica`.

A command imports what it needs when it runs: none of its help waits for PyTorch.
"""

from pathlib import Path
from typing import Annotated

import typer

from harmonica_dit import __version__
from harmonica_dit.fashion import find

from .cli_compare import compare
from .cli_errors import Commands
from .cli_options import (
    FILE,
    Attention,
    Batch,
    Call,
    Checkpoint,
    Device,
    Dtype,
    ImageSize,
    Model,
    OwnGuidance,
    OwnScheduler,
    Prompts,
    Seed,
    Threshold,
    Vae,
    console,
    describe,
    load,
    option_value,
    scheduler_value,
)
from .cli_schedule import schedule
from .cli_train import train
from .launcher import started

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Learned feature caching for diffusion transformers (HarmoniCa, ICML 2025).")

RANKED = ("train", "sample", "compare")  # which torchrun may start in many processes


def say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"harmonica {__version__}")
        raise typer.Exit


@app.callback()
def main(context: typer.Context,
         version: Annotated[bool, typer.Option("--version", callback=say_version, is_eager=True,
                                               help="Say the version and exit.")] = False) -> None:
    if started() > 1:
        from harmonica_dit import ranks

        if context.invoked_subcommand not in RANKED:
            raise ValueError(f"{context.invoked_subcommand} runs in one process; {', '.join(RANKED)} run in many")
        console.quiet = not ranks.is_main()


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for pictures and figures.")] = Path("demo")) -> None:
    """Train forecasts on the bundled model, sample with them and compare them: a few minutes on a CPU."""
    from harmonica_dit import demo as demonstration
    from harmonica_dit.files import check_folder

    check_folder(out)
    demonstration.run(out, console)


app.command()(train)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="File to write: .png for a picture, .safetensors for the values themselves "
                                           "(such as latents).")],
    labels: Annotated[str | None, typer.Option(help="Labels, separated by commas: numbers or, for fashion-dit, class "
                                                    "names, such as dress,bag,3.", show_default="the first ten")]
    = None,
    schedule: Annotated[Path | None, typer.Option("--schedule", "--router", help=f"{FILE}; without one, everything is "
                                                  "computed.")] = None,
    threshold: Threshold = None,
    model: Model = "fashion-dit",
    checkpoint: Checkpoint = None,
    vae: Vae = None,
    prompts: Prompts = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    image_size: ImageSize = None,
    call: Call = None,
    device: Device = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.", show_default="the schedule's, or 20")] = None,
    guidance: OwnGuidance = None,
    scheduler: OwnScheduler = None,
    seed: Seed = 0,
    batch: Batch = 64,
) -> None:
    """Sample images, one for each label."""
    import harmonica_dit
    from harmonica_dit import ranks
    from harmonica_dit.files import check_file, save_tensors
    from harmonica_dit.models import CONFIGS
    from harmonica_dit.progress import progress_bar
    from harmonica_dit.router import read, schedule_of
    from harmonica_dit.sample.decoding import makes_images
    from harmonica_dit.sample.schedulers import steps_of

    if out.suffix not in (".png", ".safetensors"):
        raise ValueError(f"--out: got {out}, expected a .png or a .safetensors file")
    if threshold is not None and schedule is None:
        raise ValueError("--threshold: only a router has one; give a router with --router")
    ranks.on_main(check_file, out)
    latents = (f"--out: {model} makes latents, not images; give the VAE that decodes them (--vae), or write a "
               ".safetensors file")
    if out.suffix == ".png" and model in CONFIGS and vae is None:  # said before the weights are read
        raise ValueError(latents)
    net = load(model, checkpoint, prompts, dtype, image_size, device, vae=vae, attention=attention, call=call)
    if out.suffix == ".png" and not makes_images(net):
        raise ValueError(latents)
    found = None if schedule is None else read(schedule, net)
    used = None if found is None else schedule_of(found, threshold)
    scheduler = scheduler_value(scheduler, [found], net)
    if steps is None:
        steps = 20 if used is None else steps_of(used.steps, scheduler, net)
    guidance = option_value("guidance", guidance, [found], net.guidance)
    wanted = parse_labels(labels, net)
    mine = ranks.split(len(wanted)) or range(len(wanted) - 1, len(wanted))
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=len(mine))
        images = harmonica_dit.sample(net, [wanted[i] for i in mine], steps=steps, schedule=used, guidance=guidance,
                                      scheduler=scheduler, seed=seed, first=mine.start, batch=batch,
                                      latents=out.suffix != ".png",
                                      progress=lambda done: bar.update(task, completed=done))
    images = ranks.gather(images.cpu(), len(wanted))
    if images is None:
        return
    if out.suffix == ".png":
        from harmonica_dit.evaluate.pictures import image_sheet

        image_sheet(images, out)
    else:
        save_tensors(out, {"samples": images}, {"model": net.name, "seed": seed})
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    console.print(f"{count} in {out}" + (f", {used.speedup:.2f}× fewer FLOPs" if used else ""), soft_wrap=True)


app.command()(schedule)
app.command()(compare)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help=f"{FILE}; or a .pt file from published code.")],
    out: Annotated[Path | None, typer.Option(help="The picture, a .png.", show_default="beside the file")] = None,
    threshold: Threshold = None,
    kind: Annotated[str, typer.Option(help="Which published code wrote a .pt file: learning-to-cache or "
                                           "harmonica.")] = "learning-to-cache",
) -> None:
    """Draw a router or a schedule, and say what it saves."""
    from harmonica_dit.evaluate.heat_maps import plot
    from harmonica_dit.files import check_file
    from harmonica_dit.published_routers import load_published_router
    from harmonica_dit.router import Router, read, schedule_of, warn_if_soft

    out = out or file.parent / find(file).with_suffix(".png").name  # of a bundled router: in the current folder
    check_file(out)
    found = load_published_router(file, kind) if file.suffix == ".pt" else read(file)
    schedule = schedule_of(found, threshold)
    plot(found, out, threshold=threshold)
    console.print(describe(schedule, out, made=found), soft_wrap=True)
    if isinstance(found, Router):
        warn_if_soft(found)


def parse_labels(text: str | None, net) -> list[int]:
    """Labels from numbers and, for the bundled model, class names, separated by commas; None is the first ten."""
    if text is None:
        return list(range(min(10, net.num_classes)))
    from harmonica_dit.fashion.data import CLASSES

    names = {name.lower(): i for i, name in enumerate(CLASSES)} if net.name == "fashion-dit" else {}
    labels = []
    for word in (word.strip().lower() for word in text.split(",")):
        if word not in names and not word.isdecimal():
            known = f"one of {', '.join(CLASSES)}, or a number" if names else "a number"
            raise ValueError(f"--labels: got {word!r}, expected {known}")
        labels.append(names[word] if word in names else int(word))
    return labels
