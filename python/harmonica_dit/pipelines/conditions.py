"""The prompts of a pipeline that runs by its own loop: each is encoded once, by itself, and batches are put together.

A prompt is a text, or what the pipeline's call takes in its place: its embeddings and masks, for one image.
"""

import inspect
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica_dit.files import load_tensors, save_tensors

from .adapters.generic_cache import leaves

FORMAT = 2  # 1 named Python types, which reading it imported


class Conditions:
    """P prompts, numbered 0..P-1, as arguments of a pipeline's call.

    Args:
        prompts: texts, or mappings of the call's arguments for one image each: a text; a tensor whose first dimension
            is 1; a list with one entry; whatever else is the same for all.

    Raises:
        ValueError: a prompt is none of these; the message says which.
    """

    def __init__(self, prompts: Sequence[str | Mapping[str, Any]]):
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence) or not prompts:
            raise ValueError(f"prompts: got {prompts!r:.100}, expected a list of texts, or of dicts of the call's "
                             "arguments")
        self.prompts = [dict(prompt=one) if isinstance(one, str) else one for one in prompts]
        for i, one in enumerate(self.prompts):
            if not isinstance(one, Mapping) or not one or not str(one.get("prompt", "some")).strip():
                raise ValueError(f"prompts: number {i} is {one!r:.100}, expected a text, or a dict of the call's "
                                 "arguments")
        self.arguments(range(len(prompts)))  # raises now if they cannot be put together

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts as texts; "" for one given by its embeddings."""
        return tuple(str(one.get("prompt") or "") for one in self.prompts)

    @property
    def checksum(self) -> str:
        """Over texts, names, and first values of tensors."""
        parts = [f"{name}={_values(value)}" for one in self.prompts for name, value in sorted(one.items())]
        return f"{zlib.crc32(chr(0).join(parts).encode()):08x}"

    def arguments(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The call's arguments for the prompts of these numbers, one image each."""
        chosen = [{name: [value] if isinstance(value, str) else value for name, value in self.prompts[i].items()}
                  for i in numbers]
        if any(one.keys() != chosen[0].keys() for one in chosen):
            raise ValueError("prompts: are given by different arguments; give all by the same")
        joined = join(chosen)
        if joined is None:
            raise ValueError("prompts: their embeddings are of different lengths; give their masks too, tensors of "
                             "whole numbers [1, L]")
        return joined


def _form(value: Any, tensors: dict[str, Tensor]) -> dict:
    """Tuples, lists and dicts as JSON has them; their tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _form(one, tensors) for key, one in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_form(one, tensors) for one in value]}
    return {"value": value}


def _of_form(form: dict, tensors: Mapping[str, Tensor]) -> Any:
    """What `_form` was given; KeyError and other errors where it was not."""
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _of_form(one, tensors) for key, one in content.items()}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_of_form(one, tensors) for one in content)
    return content


class Encoder:
    """Stands in place of a pipeline's `encode_prompt`: each text is encoded once and by itself, and kept on the CPU.

    encode: the pipeline's own. It is called anew, for a batch as a whole, where texts have encodings of different
    lengths and no masks: `by_text` is False from then on.
    """

    def __init__(self, encode: Callable):
        self.encode, self.by_text, self.released = encode, True, False
        self._signature = inspect.signature(encode)
        self._known: dict[str, Any] = {}
        self._batch: tuple[str, Any] | None = None  # the latest one, as it was put together or encoded

    def save(self, path: str | os.PathLike, about: Mapping[str, Any]) -> None:
        """Writes what has been encoded as safetensors. about: what it was encoded by, as JSON gives it back."""
        tensors: dict[str, Tensor] = {}
        entries = {key: _form(value, tensors) for key, value in self._known.items()}
        save_tensors(path, tensors, dict(kind="encoded prompts", format=FORMAT, about=about, entries=entries))

    def load(self, path: str | os.PathLike, about: Mapping[str, Any]) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else, or prompts that were encoded by something else.
        """
        tensors, metadata = load_tensors(path)
        if (metadata.get("kind"), metadata.get("format")) != ("encoded prompts", FORMAT):
            raise ValueError(f"{path} is not a file of encoded prompts of format version {FORMAT}")
        theirs = metadata.get("about")
        for name, value in about.items() if isinstance(theirs, dict) else ():
            if theirs.get(name) != value:
                raise ValueError(f"{path}: holds prompts encoded with {name}={theirs.get(name)!r}, expected {value!r}; "
                                 "give another path or folder, or remove it")
        try:
            if not isinstance(theirs, dict):
                raise TypeError("it does not say what they were encoded by")
            self._known |= {key: _of_form(form, tensors) for key, form in metadata["entries"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole file of encoded prompts: {error}") from None
        self.release()

    def release(self) -> None:
        """From now on the texts that have been encoded are all there are."""
        self.released = True

    def __call__(self, *args, **kwargs):
        given = self._signature.bind(*args, **kwargs)
        texts = _texts(given.arguments)
        counts = {len(value) for value in texts.values()}
        if "prompt" not in texts or len(counts) > 1:  # embeddings are given
            return self._encode(given.arguments)
        whole = repr(given.arguments)
        if self._batch is not None and self._batch[0] == whole:
            return self._batch[1]
        found = []
        for i in range(*counts):
            arguments = given.arguments | {name: [value[i]] for name, value in texts.items()}
            key = repr(arguments)
            if key not in self._known:
                self._known[key] = moved(self._encode(arguments), "cpu")
            found.append(self._known[key])
        joined = join(found)
        if joined is None:
            self.by_text, joined = False, self._encode(given.arguments)
        self._batch = whole, moved(joined, given.arguments.get("device") or "cpu")
        return self._batch[1]

    @torch.no_grad()
    def _encode(self, arguments: Mapping[str, Any]):
        if self.released and _texts(arguments):
            raise ValueError("prompts: were encoded for a call with other arguments, and the text encoder has been let "
                             "go; say how the pipeline is called where it is loaded, as call=, guidance_scale too")
        bound = inspect.BoundArguments(self._signature, dict(arguments))
        return self.encode(*bound.args, **bound.kwargs)


def _texts(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """The arguments that are lists of prompts."""
    return {name: value for name, value in arguments.items() if "prompt" in name and isinstance(value, list)
            and value and all(isinstance(text, str) for text in value)}


def moved(value: Any, device: str | torch.device) -> Any:
    """The same with its tensors on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def join(parts: Sequence[Any]):
    """What several images' arguments are together; None if rows of different lengths are to be joined without masks.

    Tensors whose first dimension is 1 become rows of one tensor, shorter ones padded by zeros; lists are joined;
    what is the same for all stays as it is.

    Raises:
        ValueError: something else differs.
    """
    pad = any(isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point() for t in leaves(parts[0]))
    try:
        return _join(parts, pad)
    except _DifferentLengths:
        return None


class _DifferentLengths(Exception):
    pass


def _join(parts: Sequence[Any], pad: bool):
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _join([part[name] for part in parts], pad) for name in first}
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if isinstance(first, tuple):
        return tuple(_join(entries, pad) for entries in zip(*parts, strict=True))
    if isinstance(first, Tensor) and first.dim() and len(first) == 1:
        if any(part.shape != first.shape for part in parts):
            longest = max(part.shape[1] for part in parts)
            if not pad or first.dim() < 2 or any(part.shape[2:] != first.shape[2:] for part in parts):
                raise _DifferentLengths
            parts = [torch.cat([part, part.new_zeros(1, longest - part.shape[1], *part.shape[2:])], 1)
                     for part in parts]
        return torch.cat(list(parts))
    if isinstance(first, Tensor):
        same = all(isinstance(part, Tensor) and part.shape == first.shape and torch.equal(part, first)
                   for part in parts)
    else:
        same = all(type(part) is type(first) and part == first for part in parts)
    if not same:
        raise ValueError(f"prompts: got {first!r:.60} for one and something else for another, expected the same, or "
                         "tensors with a first dimension of 1")
    return first


def _values(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.flatten()[:64].tolist()}"
    if isinstance(value, (list, tuple)):
        return str([_values(part) for part in value])
    return repr(value)
