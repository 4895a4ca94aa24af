"""The loop of a router's training: log, checkpoints, interruption, and the end that meets the target."""

from collections.abc import Callable
from pathlib import Path

from harmonica_dit.files import remove_leftovers
from harmonica_dit.router import Router, warn_if_soft

from .budget import Budget
from .checkpoint import Training
from .log import Log


def run_training(training: Training, total: int, advance: Callable[[], dict[str, float]], *, out: Path | None,
                 record: dict, budget: Budget | None, progress: bool, of: str = "trajectories") -> Router:
    """Calls `advance` until `total` trajectories, or what the training counts in their place, are done.

    Args:
        training: at its start; it goes on from the checkpoint in `out`, if there is one.
        advance: runs the next one, counts it in `training.trajectory` and returns the values to log.
        out, progress: as in `train_router`. record: the settings that a checkpoint must have; it may have counted to
            another total, so a training can be extended.
        budget: of the target, for which the router's threshold is chosen at the end; None leaves the threshold.
        of: what is counted: the setting that says how many.

    Returns:
        The router, which is also in `out/router.safetensors`.
    """
    if out is not None:
        checkpoint = out / "checkpoint.safetensors"
        remove_leftovers(out)
        if checkpoint.exists():
            training.restore(checkpoint, {name: value for name, value in record.items() if name != of})
            if training.trajectory > total:
                raise ValueError(f"{of}: got {total}, but {checkpoint} has run {training.trajectory} of them already")
        training.save(checkpoint, record)  # if the folder cannot be written, this fails before the work begins
    with Log(out, total, training.trajectory, progress) as log:
        try:
            while training.trajectory < total:
                log.line(**advance())
                if out is not None:
                    training.save(checkpoint, record)
        except KeyboardInterrupt:
            where = "nothing is kept without out=" if out is None else f"the same call goes on from {checkpoint}"
            raise KeyboardInterrupt(f"stopped after {training.trajectory} of {total} {of}; {where}") from None
    router = training.router
    router.beta = training.beta
    if budget is not None:
        budget.set_threshold(router)
        budget.check(router)
    warn_if_soft(router)
    if out is not None:
        from harmonica_dit.evaluate.heat_maps import plot  # not at the top: matplotlib takes a second to import

        router.save(out / "router.safetensors")
        plot(router, out / "router.png")
    return router
