"""Training checkpoints: written after every trajectory, so that an interrupted training goes on with the same bits.

They hold no random state: the noise and labels of trajectory n depend on the seed and n alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from harmonica_dit.router import Router
from harmonica_dit.validate import check_threshold, check_whole, describe, is_number

from .budget import Steering

FORMAT = 1


@dataclass
class Training:
    """The state of a training, which changes from trajectory to trajectory."""

    router: Router
    optimizer: torch.optim.Optimizer
    importance: Tensor  # λ [T] as it was measured
    steering: Steering | None
    beta: float | None
    trajectory: int = 0  # how many are done

    def save(self, path: Path, record: dict) -> None:
        tensors = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer) | {"importance": self.importance}
        if self.steering is not None:
            tensors["steering"] = self.steering.values
        save_tensors(path, tensors, dict(kind="router training", format=FORMAT, settings=record, beta=self.beta,
                                         threshold=self.router.threshold, trajectory=self.trajectory,
                                         seen=self.steering.seen if self.steering else 0))

    def restore(self, path: Path, record: dict) -> None:
        """Takes over the state in a checkpoint, which rank 0 reads.

        Raises:
            ValueError: the file is not a whole checkpoint, or is of a training with other settings; the message names
                them.
        """
        tensors, metadata = ranks.on_main(load_tensors, path)
        theirs = metadata.get("settings")
        kind = metadata.get("kind"), metadata.get("format")
        if kind != ("router training", FORMAT) or not isinstance(theirs, dict):
            raise ValueError(f"{path} is not a whole training checkpoint of format version {FORMAT}")
        check_same_settings(path, theirs, record)
        try:
            self._take(tensors, metadata)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole training checkpoint: {error}") from None

    def _take(self, tensors: dict[str, Tensor], metadata: dict) -> None:
        self.router.load_state_dict({name: check_like(f"router.{name}", tensors[f"router.{name}"], value)
                                     for name, value in self.router.state_dict().items()})
        restore_optimizer(self.optimizer, tensors)
        check_adam(self.optimizer)
        self.importance = check_like("importance", tensors["importance"], self.importance)
        if self.steering is not None:
            self.steering.values = check_like("steering", tensors["steering"], self.steering.values)
            self.steering.seen = check_whole("seen", metadata["seen"], 0)
        self.beta, self.router.threshold = metadata["beta"], check_threshold(metadata["threshold"])
        if self.beta is not None and not is_number(self.beta):
            raise ValueError(f"beta is {self.beta!r}")
        self.trajectory = check_whole("trajectory", metadata["trajectory"], 0)


def check_same_settings(path: Path, theirs: dict, ours: dict) -> None:
    """Raises ValueError, which names the first difference, if a checkpoint is of a training with other settings."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(f"{path} is of a training with {name}={theirs.get(name)!r}, this one has "
                             f"{name}={value!r}; give another folder, or remove it to start again")


def check_adam(optimizer: torch.optim.Optimizer) -> None:
    """Raises KeyError or ValueError unless an AdamW's state, if it has any, is one that it can go on with."""
    for parameter, state in optimizer.state.items():
        step = state["step"]
        if step.numel() != 1 or not step.is_floating_point() or not step >= 1:
            raise ValueError(f"optimizer: step is {step}")
        for name in ("exp_avg", "exp_avg_sq"):
            check_like(f"optimizer: {name}", state[name], parameter)


def check_like(name: str, tensor: Tensor, expected: Tensor) -> Tensor:
    """`tensor` on `expected`'s device. It must be finite and have `expected`'s shape and dtype."""
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype) or not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite {describe(expected)}, got {describe(tensor)}")
    return tensor.to(expected.device)
