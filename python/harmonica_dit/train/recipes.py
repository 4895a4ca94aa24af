"""Recipes: what the settings of a router's training are where they are not given."""

GOALS = ("target_speedup", "target_cur", "beta")

# "paper": HarmoniCa as published; where the paper and the published code disagree, the paper, and where the paper says
# nothing, the code. "recommended": what gave the bundled model's best routers (docs/comparison.md).
# docs/design.md, "What differs from the reference", sets them side by side.
RECIPES = {
    "recommended": dict(
        beta=None, trajectories=120, batch=8, lr=0.1, eps=1e-16, threshold=0.5, importance="paper",
        importance_rows="soft", importance_scale="normalised", refresh=500, reseed=False, extrapolation=1.0,
        costs="flops", compare="all", halves="one"),
    "paper": dict(
        beta=7e-8, trajectories=2000, batch=32, lr=0.01, eps=1e-8, threshold=0.1, importance="paper",
        importance_rows="soft", importance_scale="raw", refresh=500, reseed=True, extrapolation=0.0,
        costs="ones", compare="all", halves="both"),
}


def complete(recipe: str, given: dict) -> tuple[dict, str]:
    """The settings in `given`, those that are None by the recipe; and what to say of them.

    A recipe's β is for trainings to which no goal is given. What is said is the recipe's name and what differs from it:
    'paper, but batch=8 (not 32)'.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}, expected {' or '.join(map(repr, RECIPES))}")
    own, chosen = dict(RECIPES[recipe]), {name: value for name, value in given.items() if value is not None}
    changed = [f"{name}={_text(chosen[name])} (not {value})" for name, value in own.items()
               if value is not None and chosen.get(name, value) != value]
    if chosen.keys() & set(GOALS):
        beta = own.pop("beta")
        changed += [f"{name}={chosen[name]} (not beta={beta})" for name in GOALS[:2] if name in chosen and beta]
    return given | own | chosen, f"{recipe}, but {', '.join(changed)}" if changed else recipe


def _text(value) -> str:
    return f"{value}" if isinstance(value, str | float | int) else f"measured {type(value).__name__}"
