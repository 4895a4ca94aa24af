"""The command `harmonica train`."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harmonica_dit.train.recipes import RECIPES

from .cli_options import (
    Attention,
    Call,
    Checkpoint,
    Device,
    Dtype,
    ImageSize,
    Model,
    Prompts,
    Seed,
    Vae,
    console,
    describe,
    load,
    read_costs,
    table_of,
)

if TYPE_CHECKING:
    from harmonica_dit.costs import Seconds
    from harmonica_dit.router import Router

ON_IMAGES = "learning-to-cache"  # the recipe of another training, which is on images
ROUTERS_OWN = ("recipe", "target_cur", "checkpointing", *(RECIPES["paper"].keys() - {"batch", "lr", "costs"}))
OF_IMAGES = ("images", "vae")
SDTS_OWN = ("forecast", "checkpointing", "guidance", "scheduler",  # of the others than the one on images
            *(RECIPES["paper"].keys() - {"beta", "batch", "lr", "threshold"}))


def of_recipe(name: str, help: str, *flags: str):
    """An option of `train`, a setting of `train_router` that is the recipe's unless it is given."""
    recommended, papers = (RECIPES[recipe][name] for recipe in ("recommended", "paper"))
    return typer.Option(*flags, help=help, rich_help_panel="What a router's recipe sets",
                        show_default=f"{recommended}" if recommended == papers else f"{recommended}, paper: {papers}")


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the router, its picture, the log and the checkpoint. After "
                                           "Ctrl-C the same command goes on from the checkpoint.")],
    forecast: Annotated[str | None, typer.Option(
        help='Train a forecaster of the trunk in place of a router: whole steps, learned forecasts between them. '
             'Towards the "accurate" images (a better solution from the same noise) or the "uncached" ones.')] = None,
    model: Model = "fashion-dit",
    checkpoint: Checkpoint = None,
    vae: Vae = None,
    prompts: Prompts = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    image_size: ImageSize = None,
    call: Call = None,
    device: Device = None,
    steps: Annotated[int, typer.Option(help="Number of steps of a trajectory, T.")] = 20,
    recipe: Annotated[str, typer.Option(help='Settings of a router: "recommended"; "paper", HarmoniCa as published; '
                                             'or "learning-to-cache", which is trained on --images.')]
    = "recommended",
    images: Annotated[Path | None, typer.Option(
        help="Training images for Learning-to-Cache: a folder with a folder for each class, named by the labels' "
             "numbers or sorted as they are; for fashion-dit Fashion-MNIST's four files.",
        show_default="fashion-dit: where Debian's package puts them")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Speedup to reach; 1.6 unless --target-cur, --beta "
                                                              "or the recipe's beta is there, 2.7 for a forecaster.")]
    = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilization ratio to reach, from 0 to 1.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Number of iterations to train a forecaster for, or "
                                                   "Learning-to-Cache.", show_default="600, or 20,000")] = None,
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
    """Train a router, which decides which branches to compute at which step, or a forecaster. No images are needed,
    but for Learning-to-Cache's own training.

    More --trajectories than before, with the same --out, extend a training. The exit status is 1 if the router's
    schedule is further than 2 % from its target.
    """
    from harmonica_dit import ranks
    from harmonica_dit.costs import Seconds
    from harmonica_dit.files import check_folder
    from harmonica_dit.methods import trunk_forecast
    from harmonica_dit.train import check_arguments, train_forecaster, train_learning_to_cache, train_router
    from harmonica_dit.train.budget import TargetMissed
    from harmonica_dit.train.learning_to_cache import check_settings
    from harmonica_dit.train.settings import check_weights
    from harmonica_dit.train.training_images import read_training_images, training_files

    if recipe not in (*RECIPES, ON_IMAGES):
        raise ValueError(f"--recipe: got {recipe!r}, expected one of {', '.join([*RECIPES, ON_IMAGES])}")
    ranks.on_main(check_folder, out)
    if recipe == ON_IMAGES:
        refuse(context, SDTS_OWN, "is another training's; Learning-to-Cache's (--recipe learning-to-cache) has none")
        settings = dict(steps=steps, target_speedup=target_speedup, target_cur=target_cur, beta=beta, batch=batch,
                        lr=lr, iterations=iterations, threshold=threshold, seed=seed)
        settings = {name: value for name, value in settings.items() if value is not None}
        check_settings(**settings)
        check_weights(dtype)
        files = training_files(model, images)
        net = load(model, checkpoint, prompts, dtype, image_size, device, out, vae, attention, call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TargetMissed)  # it is said below
            router = train_learning_to_cache(net, *read_training_images(net, files), **settings, out=out)
        return report(router, out, None, target_speedup, target_cur)
    refuse(context, OF_IMAGES, "is for --recipe learning-to-cache; other trainings need no images")
    if forecast is not None:
        refuse(context, ROUTERS_OWN, "is a router's; a forecaster (--forecast) has none")
        wanted = read_costs(costs or "flops")
        net = load(model, checkpoint, prompts, dtype, image_size, device, out, attention=attention, call=call)
        batch = 10 if batch is None else batch
        table = table_of(wanted, net, batch, guidance, scheduler)
        whole = trunk_forecast(net, steps, speedup=2.7 if target_speedup is None else target_speedup, costs=table)
        schedule = train_forecaster(net, whole, target=forecast, steps=steps,
                                    iterations=600 if iterations is None else iterations, batch=batch,
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
    report(router, out, table, target_speedup, target_cur)


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuses options of other trainings."""
    for name in names:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def report(router: "Router", out: Path, table: "Seconds | None", target_speedup: float | None,
           target_cur: float | None) -> None:
    """Says what was trained; the exit status is 1 if its schedule is far from its target."""
    from harmonica_dit import ranks
    from harmonica_dit.train.budget import how_missed

    schedule = router.schedule()
    console.print(describe(schedule, out / "router.safetensors", table, router), soft_wrap=True)
    missed = how_missed(schedule, table or router.flops, target_speedup, target_cur)
    if missed:
        if ranks.is_main():
            typer.echo(f"harmonica: --{missed.replace('_', '-', 1)}", err=True)
        raise typer.Exit(1)


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, expected learned or a number") from None
