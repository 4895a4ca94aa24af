"""Text conditions: a pipeline's own text encoder encodes the prompts once, and a file keeps them."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from harmonica_dit.files import load_tensors, save_tensors

FORMAT = 1
BATCH = 16  # the text encoder encodes so many prompts at once


@dataclass(frozen=True)
class Prompts:
    """P encoded prompts, numbered 0..P-1; number P is the empty prompt, for guidance.

    Args:
        texts: the P prompts. model: name of the pipeline that encoded them.
        embeddings: [P + 1, L, D]. mask: [P + 1, L], 1 for tokens and 0 for padding.
    """

    texts: tuple[str, ...]
    model: str
    embeddings: Tensor
    mask: Tensor

    @property
    def checksum(self) -> str:
        return f"{zlib.crc32(chr(0).join(self.texts).encode()):08x}"

    def conditions(self, numbers: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A transformer's arguments for the prompts of these numbers [B], on the numbers' device."""
        at = numbers.to(self.mask.device)
        return dict(encoder_hidden_states=self.embeddings[at].to(numbers.device, dtype),
                    encoder_attention_mask=self.mask[at].to(numbers.device))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        save_tensors(path, dict(embeddings=self.embeddings, mask=self.mask),
                     dict(kind="prompts", format=FORMAT, model=self.model, texts=self.texts))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Prompts":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is not a whole file of this kind.
        """
        tensors, metadata = load_tensors(path)
        if (metadata.get("kind"), metadata.get("format")) != ("prompts", FORMAT):
            raise ValueError(f"{path} is not a file of prompts of format version {FORMAT}")
        try:
            texts, model = tuple(metadata["texts"]), metadata["model"]
            embeddings, mask = tensors["embeddings"], tensors["mask"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole file of prompts: {error}") from None
        if not all(isinstance(text, str) for text in (model, *texts)):
            raise ValueError(f"{path} is not a whole file of prompts: a text or the model's name is no text")
        if embeddings.dim() != 3 or mask.shape != embeddings.shape[:2] or len(mask) != len(texts) + 1:
            raise ValueError(f"{path}: expected {len(texts) + 1} embeddings [L, D] with masks [L], got "
                             f"{tuple(embeddings.shape)} and {tuple(mask.shape)}")
        return cls(texts, model, embeddings, mask)


def prepare(name: str, cls: type[DiffusionPipeline], source: str | DiffusionPipeline, texts: Sequence[str],
            dtype: torch.dtype, device: str | torch.device, path: str | os.PathLike | None) -> Prompts:
    """Reads the encoded prompts from the file at `path`; if there is none yet, encodes them and writes it.

    Args:
        name, cls, source: the pipeline's name, its class, and its folder or repository, or itself.
        texts: at least one. dtype, device: of the text encoder, which is freed afterwards.
        path: None keeps nothing.

    Raises:
        ValueError: there are no prompts, or the file's prompts, model or dtype are others; the message says what to do.
    """
    texts = check_texts(texts)
    if path is not None and Path(path).exists():
        found = Prompts.load(path)
        for what, theirs, wanted in (("model", found.model, name), ("dtype", found.embeddings.dtype, dtype)):
            if theirs != wanted:
                raise ValueError(f"{path}: holds prompts encoded with {what} {theirs}, expected {wanted}; give another "
                                 "path or folder, or remove it")
        if found.texts != texts:
            raise ValueError(f"{path}: holds {len(found.texts)} other prompts than the {len(texts)} given; give "
                             "another path or folder, or remove it")
        return found
    found = encode(name, cls, source, texts, dtype, device)
    if path is not None:
        found.save(path)
    return found


@torch.no_grad()
def encode(name: str, cls: type[DiffusionPipeline], source: str | DiffusionPipeline, texts: tuple[str, ...],
           dtype: torch.dtype, device: str | torch.device) -> Prompts:
    """Encodes the prompts and the empty prompt as the pipeline's call does; see `prepare`."""
    pipe = source
    if isinstance(source, str):
        pipe = cls.from_pretrained(source, transformer=None, vae=None, dtype=dtype).to(device)
    wanted, embeddings, masks = [*texts, ""], [], []
    for first in range(0, len(wanted), BATCH):
        embedding, mask, *_ = pipe.encode_prompt(wanted[first : first + BATCH], do_classifier_free_guidance=False,
                                                 clean_caption=True)  # the default of the pipeline's call
        embeddings.append(embedding.cpu())
        masks.append(mask.cpu())
    return Prompts(texts, name, torch.cat(embeddings), torch.cat(masks))


def read_texts(path: str | os.PathLike) -> tuple[str, ...]:
    """Prompts from a text file in UTF-8, one a line; empty lines do not count.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not UTF-8 or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file at {path}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8: {error}") from None
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise ValueError(f"prompts: {path} holds none; expected one a line")
    return texts


def check_texts(texts) -> tuple[str, ...]:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts \
            or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"prompts: got {texts!r:.100}, expected a list of texts, none of them empty")
    return tuple(texts)
