"""What the table does with each small pipeline: several calls, compared with the plain pipeline's."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from torch import Tensor, nn

import harmonica_dit
from bench.record import installed_version
from harmonica_dit.pipelines.adapters.find_branches import find_blocks
from harmonica_dit.pipelines.adapters.generic_cache import leaves
from support import lora
from support.small_pipe import SmallPipe

STEPS, OTHER_STEPS = 8, 11
SPEEDUP = 1.8
FUSED = 1e-4  # a fused forward rounds otherwise; so much of the largest value is still called close

Call = Callable[[SmallPipe, DiffusionPipeline], Tensor | None]


class Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Check:
    """calls: one after the other, on one pipeline; None is what a call gives that is not to be compared.

    prepare: done with the pipeline before. lacks: why a pipeline cannot be called so, or "".
    """

    calls: tuple[Call, ...]
    prepare: Callable[[SmallPipe, DiffusionPipeline], None] = lambda entry, pipe: None
    lacks: Callable[[SmallPipe], str] = lambda entry: ""


def call(**changes) -> Call:
    return lambda entry, pipe: entry.call(pipe, **dict(steps=STEPS) | changes)


def interrupted(inside: bool) -> Call:
    """A call that an error ends: before the transformer's third step, or inside the second one that is computed."""
    def run(entry: SmallPipe, pipe: DiffusionPipeline) -> None:
        begun, modules = [], transformers(entry, pipe)
        if inside:
            modules = [linears(transformer)[-1] for transformer in modules]

        def stop(*_) -> None:
            begun.append(1)
            if len(begun) == (1 if inside else 2) * entry.calls + 1:
                raise Interrupted

        handles = [module.register_forward_pre_hook(stop) for module in modules]
        try:
            entry.call(pipe, steps=STEPS)
        except Interrupted:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError("the call was not interrupted")
    return run


def scaled(scale: float) -> Call:
    """A call at another scale of the LoRA."""
    def run(entry: SmallPipe, pipe: DiffusionPipeline) -> Tensor:
        for transformer in transformers(entry, pipe):
            lora.set_scale(transformer, scale)
        return entry.call(pipe, steps=STEPS)
    return run


def put_lora(entry: SmallPipe, pipe: DiffusionPipeline) -> None:
    """A LoRA in the linears of attention."""
    for transformer in transformers(entry, pipe):
        names = [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
        lora.inject(transformer, "|".join(re.escape(name) for name in names if re.search("attn|attention", name)))


class Graphs:
    """A back end of torch.compile that runs graphs as they are, and counts them."""

    run = 0

    def __call__(self, module, inputs):
        def counted(*arguments):
            Graphs.run += 1
            return module.forward(*arguments)
        return counted


def compile_blocks(entry: SmallPipe, pipe: DiffusionPipeline) -> None:
    """diffusers' `compile_repeated_blocks`, or the same by hand for a model that does not name them."""
    for transformer in transformers(entry, pipe):
        if transformer._repeated_blocks:
            transformer.compile_repeated_blocks(backend=Graphs())
        else:
            for name in find_blocks(transformer):
                transformer.get_submodule(name).compile(backend=Graphs())


def compiled(entry: SmallPipe, pipe: DiffusionPipeline) -> Tensor:
    before = Graphs.run
    output = entry.call(pipe, steps=STEPS)
    if Graphs.run == before:
        raise AssertionError("no compiled block was run")
    return output


def quantize(entry: SmallPipe, pipe: DiffusionPipeline) -> None:
    """The blocks' linears, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for transformer in transformers(entry, pipe):
        for part in linears(transformer):
            quantize_(part, Int8WeightOnlyConfig())
            if type(part.weight) is nn.Parameter:
                raise AssertionError("torchao left a weight as it was")


def linears(transformer: nn.Module) -> list[nn.Linear]:
    """Those of its blocks, in order of definition."""
    blocks = [transformer.get_submodule(name) for name in find_blocks(transformer)]
    return [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]


def transformers(entry: SmallPipe, pipe: DiffusionPipeline) -> list[nn.Module]:
    return [getattr(pipe, name) for name in entry.transformers]


CHECKS: dict[str, Check] = {
    "call": Check((call(), call())),
    "batch of 2": Check((call(), call(batch=2), call()),
                        lacks=lambda entry: "" if entry.batches else "takes one prompt"),
    "other steps": Check((call(), call(steps=OTHER_STEPS), call())),
    "after an interruption": Check((call(), interrupted(inside=False), call(), interrupted(inside=True), call())),
    "LoRA": Check((scaled(1.0), scaled(0.5)), put_lora),
    "compiled blocks": Check((compiled, compiled), compile_blocks),
    "int8": Check((call(), call()), quantize,
                  lacks=lambda entry: "" if installed_version("torchao") else "torchao is not installed"),
}


def judge(entry: SmallPipe, check: Check) -> dict:
    """What became of it; `result` in a word.

    "equal": at speedup 1 each call gives the plain pipeline's output to the bit, and at SPEEDUP, where a cache keeps
    them, the first step's forwards give the plain ones'; "close": up to FUSED of the largest value; "differs"; "fails",
    with the words; "plain fails": without a cache, too; "lacks".

    repeats: whether with a cache at SPEEDUP each call, whatever came before it, gives to the bit what it gives as the
    first one after `enable_cache`.
    """
    if lacking := check.lacks(entry):
        return dict(result="lacks", words=lacking)
    try:
        pipe = entry.pipe()
        try:
            check.prepare(entry, pipe)
            plain = [watch(entry, pipe, run) for run in check.calls]
        except Exception as error:  # whatever it is stands in the table, and `table.holds` is false
            return dict(result="plain fails", words=words(error))
        try:
            return compare(entry, check, pipe, plain)
        except Exception as error:  # likewise
            return dict(result="fails", words=words(error))
    finally:
        torch.compiler.reset()  # else the graphs of one model count towards the limit of the next


def watch(entry: SmallPipe, pipe: DiffusionPipeline, run: Call) -> tuple[Tensor | None, list[Tensor]]:
    """What a call gives, and what the transformers return in its first step."""
    first: list[list[Tensor]] = []

    def keep(module, args, output) -> None:
        if len(first) < entry.calls:
            first.append([leaf.clone() for leaf in leaves(output)])

    handles = [transformer.register_forward_hook(keep) for transformer in transformers(entry, pipe)]
    try:
        return run(entry, pipe), [t for tensors in first for t in tensors]
    finally:
        for handle in handles:
            handle.remove()


def compare(entry: SmallPipe, check: Check, pipe: DiffusionPipeline,
            watched: list[tuple[Tensor | None, list[Tensor]]]) -> dict:
    """watched: what `watch` saw of the calls without a cache."""
    plain = [output for output, _ in watched]
    harmonica_dit.enable_cache(pipe, 1.0)
    found = [run(entry, pipe) for run in check.calls]
    pairs = [(a, b) for a, b in zip(found, plain) if b is not None]
    alone = []
    for run, (_, first) in zip(check.calls, watched):
        harmonica_dit.enable_cache(pipe, SPEEDUP)
        output, computed = watch(entry, pipe, run)
        alone.append(output)
        if output is not None:  # else it was interrupted, with the cache perhaps in its first step
            pairs += zip(computed, first, strict=True)
    difference = max(relative_difference(a, b) for a, b in pairs)
    result = "equal" if all(torch.equal(a, b) for a, b in pairs) else "close" if difference <= FUSED else "differs"
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    cached = [run(entry, pipe) for run in check.calls]
    summary = harmonica_dit.summary(pipe)
    felt = not any(torch.equal(a, b) for a, b in zip(cached, plain) if b is not None)
    return dict(result=result, difference=difference, felt=felt, path=summary.path, unit=summary.unit,
                speedup=summary.speedup, nbytes=summary.nbytes,
                repeats=all(torch.equal(a, b) for a, b in zip(cached, alone) if b is not None))


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def compile_in_place(pipe: DiffusionPipeline) -> None:
    pipe.transformer.compile(backend="eager")


def compile_whole(pipe: DiffusionPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def offload_groups(pipe: DiffusionPipeline) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def put_another_cache(pipe: DiffusionPipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


REFUSED: dict[str, Callable[[DiffusionPipeline], None]] = {
    "transformer.compile()": compile_in_place, "torch.compile(transformer)": compile_whole,
    "group offload": offload_groups, "diffusers' own cache": put_another_cache}


def refusal(entry: SmallPipe, prepare: Callable[[DiffusionPipeline], None]) -> str | None:
    """With which words `enable_cache` refuses a pipeline that was prepared so; "" if it does not, None if diffusers
    does not let it be prepared so."""
    pipe = entry.pipe()
    try:
        prepare(pipe)
    except (AttributeError, ValueError):
        return None
    try:
        harmonica_dit.enable_cache(pipe, SPEEDUP)
    except (TypeError, ValueError) as error:
        return words(error)
    finally:
        torch.compiler.reset()
    return ""
