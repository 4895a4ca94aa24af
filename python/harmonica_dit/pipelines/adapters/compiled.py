"""Compiled code around what is computed or reused: what a step computes cannot be decided inside it."""

from torch import nn

from .find_branches import find_blocks, find_branches
from .replace_forwards import entries_of


def undo_compile(module: nn.Module) -> str | None:
    """How to undo the module's compilation; None if it is not compiled."""
    if "_orig_mod" in module._modules:
        return "take its ._orig_mod"
    if module._compiled_call_impl is not None:
        return "set its ._compiled_call_impl to None"
    if any(hasattr(forward, "_torchdynamo_orig_callable") for forward in entries_of(module)):
        return "delete its .forward"
    return None


def refuse_compiled(name: str, module: nn.Module, transformer: nn.Module, unit: str) -> None:
    """Raises ValueError if the module, which has this name in the transformer, is compiled.

    unit: what is reused, "branch" or "trunk"; the message says what to compile instead.
    """
    undo = undo_compile(module)
    if undo is not None:
        raise ValueError(f"{name or 'transformer'}: has been compiled{'' if name else ' as a whole'}, and what a step "
                         f"computes is decided inside it; {undo} and compile {_instead(transformer, unit)}")


def _instead(transformer: nn.Module, unit: str) -> str:
    inside = transformer._modules.get("_orig_mod", transformer)
    if hasattr(type(inside), "get_base_model"):  # a PeftModel, which passes its model's attributes on
        inside = inside.get_base_model()
    found = next(iter(find_blocks(inside) if unit == "trunk" else find_branches(inside)), None)
    if found is None:
        return "smaller parts of it"
    if unit == "branch":
        return f"its branches, for example {_code(found)}.compile()"
    # some models do not say which blocks this would compile, and refuse it
    all_at_once = ", or all by compile_repeated_blocks()" if getattr(inside, "_repeated_blocks", None) else ""
    return f"its blocks, for example {_code(found)}.compile(){all_at_once}"


def _code(name: str) -> str:
    """A submodule's name as Python writes it: blocks.0.ff is blocks[0].ff."""
    first, *parts = name.replace("._orig_mod", "").split(".")
    return first + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)
