"""Training along the whole trajectory: a router by SDT and IEPO, a forecaster by the gradient of the final image."""

from .forecaster import train_forecaster
from .learning_to_cache import train_learning_to_cache
from .train import check_arguments, train_router

__all__ = ["check_arguments", "train_forecaster", "train_learning_to_cache", "train_router"]
