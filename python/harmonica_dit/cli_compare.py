"""The command `harmonica compare`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harmonica_dit.evaluate.catalogue import CATALOGUE, RIVALS, WEIGHTS, make_methods, quantizer, split_weights

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
    SpeedupCosts,
    Vae,
    load,
    option_value,
    read_costs,
    scheduler_value,
    table_of,
)


def pruned(net, steps: int, speedup: float, options: dict):
    """A method for the catalogue: a narrower copy, not retrained."""
    from harmonica_dit.evaluate.named_methods import with_net
    from harmonica_dit.train import prune

    if options["costs"]:
        raise ValueError("costs: what a narrower copy takes is in no table; leave them out, for a speedup in FLOPs")
    return with_net("pruned", "pruned, not retrained", steps, net, prune(net, speedup, progress=False))


METHODS = CATALOGUE | {"pruned": pruned}


def compare(
    out: Annotated[Path, typer.Option(help="Folder for rows.json, table.csv, table.md and pictures; its folder samples "
                                           "keeps what is sampled, so the same command goes on after Ctrl-C.")],
    schedule: Annotated[list[Path] | None, typer.Option("--schedule", "--router", help=f"{FILE}; may be given "
                                                        "again.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"What else to compare, at each --speedup: "
                                                     f"{', '.join(METHODS)}; or the model with quantized weights: "
                                                     f"{', '.join(WEIGHTS)}, alone or before any of these and any "
                                                     "--schedule, as in int8+fora; may be given again.",
                                                     show_default=", ".join(RIVALS))] = None,
    speedup: Annotated[list[float] | None, typer.Option(help="Speedup of these; may be given again.",
                                                        show_default="1.9 and 2.7, half and a third of the "
                                                        "steps")] = None,
    costs: SpeedupCosts = "flops",
    accurate: Annotated[bool, typer.Option("--accurate", help="Also measure errors against a more accurate solution: "
                                           "40 steps of DPM-Solver++ from the same noise.")] = False,
    samples: Annotated[int, typer.Option(help="Images per method; the Fréchet distance needs 2,000.")] = 200,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="How often to make the comparison, with --seed and the seeds after "
                                            "it.")] = 1,
    processes: Annotated[int, typer.Option(help="Sample in so many processes at once; more than one are not "
                                                "timed.")] = 1,
    inception: Annotated[Path | None, typer.Option(help="File of Inception's weights, for the inception score and, "
                                                   "with --real, FID, sFID, precision and recall; fashion-dit has a "
                                                   "classifier of its own.")] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images. What Inception sees in them is kept in "
                                              "--out.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP, for the CLIP score of a model with "
                                              "prompts.")] = None,
    model: Model = "fashion-dit",
    checkpoint: Checkpoint = None,
    vae: Vae = None,
    prompts: Prompts = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    image_size: ImageSize = None,
    call: Call = None,
    device: Device = None,
    steps: Annotated[int, typer.Option(help="Number of steps of the uncached trajectory and of --method; a schedule "
                                            "from a file has its own.")] = 20,
    guidance: OwnGuidance = None,
    scheduler: OwnScheduler = None,
    batch: Batch = 64,
) -> None:
    """Compare ways to skip work on the same noise: error, label accuracy, Fréchet distance, speedup, pictures."""
    import torch

    from harmonica_dit import ranks
    from harmonica_dit.demo import ACCURATE
    from harmonica_dit.evaluate.judging import judge_of, judged_floor
    from harmonica_dit.evaluate.named_methods import name_after, on_weights
    from harmonica_dit.evaluate.report import compare_with_bar, print_table, write
    from harmonica_dit.files import check_folder, remove_leftovers
    from harmonica_dit.router import read

    for name, value in (("--samples", samples), ("--seeds", seeds), ("--processes", processes)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    wanted = read_costs(costs)
    ranks.on_main(check_folder, out)
    ranks.on_main(remove_leftovers, out)
    make = partial(load, model, checkpoint, prompts, dtype, image_size, device, out, vae, attention, call)
    net = make()
    kinds = [split_weights(str(path)) for path in schedule or ()]
    found = [read(path or kind, net) for kind, path in kinds]
    guidance = option_value("guidance", guidance, found, net.guidance)
    scheduler = scheduler_value(scheduler, found, net)
    quantized = quantizer(net)
    methods = [on_weights(name_after(path, one), kind, quantized(kind)) for (kind, path), one in zip(kinds, found)]
    options = dict(steps=steps, guidance=guidance, scheduler=scheduler)
    for one in methods:
        if one.steps != steps:
            typer.echo(f"harmonica: {one.name} is for {one.steps} steps; it is compared with {steps} uncached steps "
                       "(--steps)", err=True)
    # once, not by every rank: what some of them sample to calibrate may differ in rounding
    methods += ranks.on_main(partial(make_methods, net, method or RIVALS, speedup or (1.9, 2.7), **options,
                                      catalogue=METHODS, quantized=quantized,
                                      costs=table_of(wanted, net, batch, guidance, scheduler)))
    labels = torch.arange(samples) % net.num_classes
    judge = judge_of(net, inception=inception, real=real, clip=clip,
                     kept=out / "real-images.safetensors") if ranks.is_main() else None
    rows = compare_with_bar(net, methods, labels, **options, seeds=range(seed, seed + seeds), batch=batch,
                            processes=processes, accurate=ACCURATE if accurate else None, folder=out / "samples",
                            load=make, judge=judge)
    if not ranks.is_main():
        return
    title, floor = f"{net.name}, {steps} steps, {samples:,} images a method and seed", judged_floor(judge)
    write(out, net, methods, labels, rows, title, batch=batch, floor=floor, **options)
    print_table(Console(), rows, title, floor)
