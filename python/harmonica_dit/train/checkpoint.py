"""Training checkpoints: written after every trajectory, so that an interrupted training goes on with the same bits.

There is no random state in them: the noise and labels of trajectory n depend on the seed and n alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harmonica_dit.files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from harmonica_dit.router import Router

from .budget import Steering

FORMAT = 1


@dataclass
class Training:
    """What changes from trajectory to trajectory."""

    router: Router
    optimizer: torch.optim.Optimizer
    importance: Tensor  # λ [T], normalised
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
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is no such checkpoint, or is of a training with other settings; the message names them.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "router training" or metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a training checkpoint of format version {FORMAT}")
        theirs = metadata["settings"]
        for name, value in record.items():
            if theirs.get(name) != value:
                raise ValueError(f"{path} is of a training with {name}={theirs.get(name)!r}, this one has "
                                 f"{name}={value!r}; give another folder, or remove it to start again")
        device = self.importance.device
        self.router.load_state_dict({name.removeprefix("router."): value for name, value in tensors.items()
                                     if name.startswith("router.")})
        restore_optimizer(self.optimizer, tensors)
        self.importance = tensors["importance"].to(device)
        if self.steering is not None:
            self.steering.values, self.steering.seen = tensors["steering"].to(device), metadata["seen"]
        self.beta, self.router.threshold = metadata["beta"], metadata["threshold"]
        self.trajectory = metadata["trajectory"]
