"""Training: routers (SDT and IEPO; Learning-to-Cache), a forecaster by the gradient of the final image, pruning."""

from typing import TYPE_CHECKING

from harmonica_kernels._lazy import import_when_used

if TYPE_CHECKING:
    from .forecaster import train_forecaster
    from .learning_to_cache import train_learning_to_cache
    from .pruning import prune
    from .recipes import RECIPES
    from .train import check_arguments, train_router

__all__ = ["RECIPES", "check_arguments", "prune", "train_forecaster", "train_learning_to_cache", "train_router"]

import_when_used(__name__)
