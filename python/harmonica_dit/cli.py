"""The command `harmonica`.

A command imports what it needs when it runs: none of its help waits for PyTorch.
"""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harmonica_dit import __version__
from harmonica_dit.fashion import find
from harmonica_dit.train.recipes import RECIPES

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
    describe,
    load,
    option_value,
    read_costs,
    scheduler_value,
    table_of,
)
from .cli_schedule import schedule
from .launcher import started

console = Console()

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Learned feature caching for diffusion transformers (HarmoniCa, ICML 2025).")

RANKED = ("train", "sample", "compare")  # which torchrun may start in many processes
ROUTERS_OWN = ("recipe", "target_cur", "checkpointing", *(RECIPES["paper"].keys() - {"batch", "lr", "costs"}))


def of_recipe(name: str, help: str, *flags: str):
    """An option of `train`, a setting of `train_router` that is the recipe's unless it is given."""
    recommended, papers = (RECIPES[recipe][name] for recipe in ("recommended", "paper"))
    return typer.Option(*flags, help=help, rich_help_panel="What a router's recipe sets",
                        show_default=f"{recommended}" if recommended == papers else f"{recommended}, paper: {papers}")


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


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the router, its picture, the log and the checkpoint. After "
                                           "Ctrl-C the same command goes on from the checkpoint.")],
    forecast: Annotated[str | None, typer.Option(
        help='Train a forecaster of the trunk in place of a router: whole steps, learned forecasts between them. '
             'Towards the "accurate" images (a better solution from the same noise) or the "uncached" ones.')] = None,
    model: Model = "fashion-dit",
    checkpoint: Checkpoint = None,
    prompts: Prompts = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    image_size: ImageSize = None,
    call: Call = None,
    device: Device = None,
    steps: Annotated[int, typer.Option(help="Number of steps of a trajectory, T.")] = 20,
    recipe: Annotated[str, typer.Option(help='Settings of a router: "recommended", or "paper", HarmoniCa as '
                                             'published.')] = "recommended",
    target_speedup: Annotated[float | None, typer.Option(help="Speedup to reach; 1.6 unless --target-cur, --beta "
                                                              "or the recipe's beta is there, 2.7 for a forecaster.")]
    = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilization ratio to reach, from 0 to 1.")] = None,
    iterations: Annotated[int, typer.Option(help="Number of iterations to train a forecaster for.")] = 600,
    beta: Annotated[float | None, of_recipe("beta", "Weight of the cost in the loss, instead of a target.")] = None,
    trajectories: Annotated[int | None, of_recipe("trajectories", "Number of trajectories.")] = None,
    batch: Annotated[int | None, of_recipe("batch", "Images per trajectory; a forecaster's: 10.")] = None,
    lr: Annotated[float | None, of_recipe("lr", "The optimiser's learning rate; a forecaster's: 0.004.")] = None,
    eps: Annotated[float | None, of_recipe("eps", "AdamW's eps; gradients can be as small as beta.")] = None,
    threshold: Annotated[float | None, of_recipe(
        "threshold", "Threshold during training: a branch whose score is above it counts as computed. With a target, "
        "the finished router gets the threshold that meets it.")] = None,
    importance: Annotated[str | None, of_recipe(
        "importance", 'How to measure what reuse at a step costs the image: "paper", "reference" (the published code), '
        '"gain" or "none", all steps alike.')] = None,
    importance_rows: Annotated[str | None, of_recipe(
        "importance_rows", 'Measure the importance with "soft" or "hard" rows.')] = None,
    importance_scale: Annotated[str | None, of_recipe(
        "importance_scale", 'Leave the importance as measured, "raw", or "normalised" to mean 1.')] = None,
    refresh: Annotated[int | None, of_recipe(
        "refresh", "Measure the importance again every so many denoising steps.")] = None,
    reseed: Annotated[bool | None, of_recipe(
        "reseed", "Begin noise and labels anew whenever the importance is measured.", "--reseed/--no-reseed")] = None,
    extrapolation: Annotated[str | None, of_recipe(
        "extrapolation", 'What a reused branch returns: 0 repeats its latest output, another number forecasts with '
        'this coefficient (1: first-order Taylor), "learned" learns the coefficients.')] = None,
    costs: Annotated[str | None, of_recipe(
        "costs", 'What a branch costs, and what the speedup is in: "flops"; "time", which is measured on this device '
        'for --batch images at a time; or a file of such costs, .json. "ones": all branches alike, the speedup in '
        "FLOPs.")] = None,
    compare: Annotated[str | None, of_recipe(
        "compare", 'Output channels in the loss: "all", the learned variance too, or "noise" alone.')] = None,
    halves: Annotated[str | None, of_recipe(
        "halves", 'What loss and importance are averaged over: "one" half of the guided batch, or "both".')] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.",
                                                   show_default="the model's own")] = None,
    scheduler: Annotated[str | None, typer.Option(help='"ddim", "iddpm", or the name of a diffusers scheduler.',
                                                  show_default="the model's own")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass: "
                                                "less memory, more time.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a router, which decides which branches to compute at which step, or a forecaster. No images are needed.

    More --trajectories than before, with the same --out, extend a training. The exit status is 1 if the router's
    schedule is further than 2 % from its target.
    """
    from harmonica_dit import ranks
    from harmonica_dit.costs import Seconds
    from harmonica_dit.files import check_folder
    from harmonica_dit.methods import trunk_forecast
    from harmonica_dit.train import check_arguments, train_forecaster, train_router
    from harmonica_dit.train.budget import TargetMissed, how_missed

    ranks.on_main(check_folder, out)
    if forecast is not None:
        given = [name for name in ROUTERS_OWN if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: is a router's; a forecaster (--forecast) has none")
        wanted = read_costs(costs or "flops")
        net = load(model, checkpoint, prompts, dtype, image_size, device, out, attention=attention, call=call)
        batch = 10 if batch is None else batch
        table = table_of(wanted, net, batch, guidance, scheduler)
        whole = trunk_forecast(net, steps, speedup=2.7 if target_speedup is None else target_speedup, costs=table)
        schedule = train_forecaster(net, whole, target=forecast, steps=steps, iterations=iterations, batch=batch,
                                    lr=4e-3 if lr is None else lr, guidance=guidance, scheduler=scheduler, seed=seed,
                                    out=out)
        console.print(describe(schedule, out / "forecast.safetensors", table), soft_wrap=True)
        return
    table = Seconds.load(costs) if costs and costs.endswith(".json") else None
    if recipe == "recommended" and target_speedup is None and target_cur is None and beta is None:
        target_speedup = 1.6
    settings = {name: context.params[name] for name in RECIPES["paper"]}
    if extrapolation not in (None, "learned"):
        settings["extrapolation"] = number("--extrapolation", extrapolation)
    settings["costs"] = table or costs
    options = settings | dict(recipe=recipe, steps=steps, target_speedup=target_speedup, target_cur=target_cur,
                              guidance=guidance, scheduler=scheduler, seed=seed)
    console.print(f"recipe: {check_arguments(**options, dtype=dtype)}", soft_wrap=True)
    net = load(model, checkpoint, prompts, dtype, image_size, device, out, attention=attention, call=call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetMissed)  # it is said below
        router = train_router(net, **options, checkpointing=checkpointing, out=out)
    if costs == "time":
        table = Seconds.load(out / "costs.json")
    schedule = router.schedule()
    console.print(describe(schedule, out / "router.safetensors", table, router), soft_wrap=True)
    missed = how_missed(schedule, table or router.flops, target_speedup, target_cur)
    if missed:
        if ranks.is_main():
            typer.echo(f"harmonica: --{missed.replace('_', '-', 1)}", err=True)
        raise typer.Exit(1)


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


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected learned or a number") from None
