"""The loop of a router's training: log, checkpoints, interruption, and the end that meets the target."""

from collections.abc import Callable
from pathlib import Path

from harmonica_dit import ranks
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
    checkpoint = None if out is None else out / "checkpoint.safetensors"
    main = ranks.is_main()
    try:
        if checkpoint is not None:
            if ranks.on_main(is_there, checkpoint):
                training.restore(checkpoint, {name: value for name, value in record.items() if name != of})
                if training.trajectory > total:
                    raise ValueError(f"{of}: got {total}, but {checkpoint} has run {training.trajectory} of them "
                                     "already")
            # if the folder cannot be written, this fails before the work begins
            ranks.on_main(training.save, checkpoint, record)
        with Log(out if main else None, total, training.trajectory, progress) as log:
            while training.trajectory < total:
                log.line(**advance())
                if checkpoint is not None:
                    ranks.on_main(training.save, checkpoint, record)
    except (KeyboardInterrupt, ConnectionError) as error:
        where = "nothing is kept without out=" if out is None else f"the same call goes on from {checkpoint}"
        raise type(error)(f"{str(error) or 'stopped'} after {training.trajectory} of {total} {of}; {where}") from None
    router = training.router
    router.beta = training.beta
    if budget is not None:
        budget.set_threshold(router)
    if main:
        if budget is not None:
            budget.check(router)
        warn_if_soft(router)
    if out is not None:
        ranks.on_main(_write, router, out)
    return router


def is_there(checkpoint: Path) -> bool:
    """Whether there is one to go on from; what a killed training left beside it is removed."""
    remove_leftovers(checkpoint.parent)
    return checkpoint.exists()


def _write(router: Router, out: Path) -> None:
    from harmonica_dit.evaluate.heat_maps import plot  # not at the top: matplotlib takes a second to import

    router.save(out / "router.safetensors")
    plot(router, out / "router.png")
