"""SDT and IEPO: training a router along the whole trajectory."""

from .train import check_arguments, train_router

__all__ = ["check_arguments", "train_router"]
