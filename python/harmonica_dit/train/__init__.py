"""SDT and IEPO: training a router along the whole trajectory."""

from .train import train_router

__all__ = ["train_router"]
