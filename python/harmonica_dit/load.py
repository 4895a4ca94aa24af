"""`load`: a denoiser by its name."""

import argparse
import io
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harmonica_dit.fashion import FASHION, FASHION_WEIGHTS
from harmonica_dit.models import CONFIGS, DiT, latent_side
from harmonica_dit.sample.decoding import load_vae

DAMAGED = "it is damaged, or something else"


def load(name, checkpoint: str | os.PathLike | None = None, *, image_size: int | None = None,
         prompts: Sequence[str | Mapping[str, Any]] | None = None, call: Mapping[str, Any] | None = None,
         embeddings: str | os.PathLike | None = None,
         vae: str | os.PathLike | None = None, dtype: str | torch.dtype = torch.float32,
         device: str | torch.device = "cpu", attention: str = "sdpa"):
    """Loads a denoiser, in evaluation mode and without gradients for its weights.

    A denoiser is a module `net(x, t, y, row=, forecast_weights=, cache=, threshold=)` with `name`, `sample_shape`,
    `num_classes`, `branches` (a list or tuple), `branch_names`, `tokens` (N) and `width` (D). Its `guidance`,
    `guidance_channels` and `scheduler` are the defaults of trajectories. Labels are classes, or the numbers of a text
    model's prompts; the label `num_classes` stands for none. What it looks up on the host by its labels, as text, no
    recorded graph would look up again: it is what `conditions(labels)` returns, a dict of tensors that a trajectory
    asks for once and gives each forward by these names.

    A pipeline with another transformer than DiT's or PixArt's becomes a denoiser without `branches`, which is run by a
    `Trajectory` alone: the pipeline's own loop makes the guided output of each step, see `pipelines/own_loop.py`. It
    has to have one transformer, and to evaluate it once a step for the same guidance at all steps.

    Args:
        name: "fashion-dit", the bundled model; a configuration of facebookresearch/DiT such as "DiT-XL/2"; the folder
            or repository of a diffusers pipeline; or a pipeline in memory, which keeps its dtype and device, and stays
            as it is.
        checkpoint: a DiT's weights, facebookresearch's `.pt` or safetensors; required for a configuration.
        image_size: in pixels; the latent's side is an eighth of it. None is 256 for a configuration, and a pipeline's
            own size.
        prompts: of a text pipeline. They are encoded once; then the text encoder is freed. A pipeline that is run by
            its own loop also takes dicts of its call's arguments for an image each, such as embeddings [1, L, D].
        call: further arguments of such a pipeline's call, such as dict(height=512, width=512, guidance_scale=3.5).
        embeddings: file for the encoded prompts; if it exists, they are read from it.
        vae: folder or repository of the AutoencoderKL that decodes a latent model's samples; a pipeline has its own.
            None for a configuration leaves latents. It stays in float32.
        dtype: of the weights: float32, bfloat16 or float16. device: of the weights, such as "cuda".
        attention: back end of a DiT, "sdpa" (PyTorch chooses between flash attention, cuDNN and its own) or "xformers",
            for CUDA alone. A pipeline keeps its own processors.

    Raises:
        ValueError: the name, dtype, back end or device is not known, or the image size, the checkpoint, the prompts,
            the call or the file of embeddings or the VAE do not fit the model; or the pipeline cannot be trained on.
        ImportError: xformers is asked for and not installed.
        FileNotFoundError: there is no such checkpoint. OSError: there is no such VAE.
    """
    dtype, device = check_dtype(dtype), check_device(device)
    if attention == "xformers" and device.type != "cuda":
        raise ValueError(f"attention: xformers needs a CUDA device, got {device}; leave the default, sdpa")
    if not isinstance(name, str) or name not in ("fashion-dit", *CONFIGS) and (
            os.path.isdir(name) or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        from harmonica_dit.pipelines.denoiser import load_pipeline

        if attention != "sdpa":
            raise ValueError(f"attention: {name} is a pipeline, which keeps its own processors")
        if checkpoint is not None:
            raise ValueError(f"checkpoint: {name} is a pipeline, which has its own weights")
        return load_pipeline(name, prompts=prompts, call=call, embeddings=embeddings, image_size=image_size, vae=vae,
                             dtype=dtype, device=device)
    if call is not None:
        raise ValueError(f"call: {name} is no pipeline and takes none")
    if prompts is not None or embeddings is not None:
        raise ValueError(f"prompts: {name} is conditioned on classes and takes none")
    if name == "fashion-dit":
        if vae is not None:
            raise ValueError("vae: fashion-dit makes images, not latents")
        if image_size is not None:
            raise ValueError(f"image_size: got {image_size!r}; fashion-dit makes 28 × 28 pixels, nothing else")
        net, checkpoint = DiT(**FASHION, name=name, attention=attention), checkpoint or FASHION_WEIGHTS
    elif name in CONFIGS:
        if checkpoint is None:
            raise ValueError(f"checkpoint: {name} needs its weights, such as DiT-XL-2-256x256.pt from "
                             "facebookresearch/DiT")
        side = latent_side(256 if image_size is None else image_size, CONFIGS[name]["patch_size"])
        with torch.device("meta"):
            net = DiT(**CONFIGS[name], input_size=side, name=name, attention=attention)
        net.to_empty(device="cpu")
    else:
        raise ValueError(f'name: got {name!r}, expected "fashion-dit", one of {", ".join(CONFIGS)}, or the folder or '
                         "repository of a diffusers pipeline")
    if attention != "sdpa":
        _check_attention(net, attention, dtype, device)
    try:
        net.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit {name}: {error}") from None
    net = net.eval().requires_grad_(False).to(device, dtype)
    if vae is not None:
        net.vae = load_vae(vae, net.sample_shape[0]).to(device)
    return net


def _check_attention(net: DiT, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a back end that has no kernel here. xformers can be installed without any, built for another PyTorch."""
    attention = net.blocks[0].attn
    width = attention.qkv.in_features // attention.heads
    q = torch.zeros(1, 8, attention.heads, width, dtype=dtype, device=device)
    try:
        attention.back_end(q, q, q)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        reason = str(error).splitlines()[0]
        raise ValueError(f"attention: {name} cannot run {dtype} on {device} with PyTorch {torch.__version__}: {reason};"
                         " leave the default, sdpa") from None


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known and dtype not in known.values():
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(known)}")
    return known.get(dtype, dtype)


def check_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # for torch.device() takes any number, and what this PyTorch lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {str(device)!r}, which PyTorch {torch.__version__} cannot use here: {reason}") \
            from None
    return found


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads a state dict from a safetensors or `.pt` file. No code in the file is run."""
    state = read_checkpoint(path)
    if isinstance(state, dict) and "ema" in state:
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return state


def read_checkpoint(path: str | os.PathLike):
    """Reads a safetensors or `.pt` file of tensors in plain containers. No code in the file is run.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # facebookresearch/DiT's checkpoints hold one
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # the file may well be whole
        raise
    except pickle.UnpicklingError as error:  # whose message goes on to advise reading the file all the same
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = DAMAGED if found is None else (
            f"it holds {found[1]}, and reading that could run code of whoever made the file")
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {why}") from None
    except Exception as error:  # a damaged file makes torch's readers fail in any way: KeyError, EOFError, struct.error
        if "allocate memory" in str(error):  # torch's RuntimeError
            raise
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {DAMAGED} ({type(error).__name__}: {error})"
                         ) from None


def check_archive(path: Path) -> None:
    """Refuses what torch's safe reader would take and allocate memory for that the file says nothing of.

    That are compressed records, a bytearray of any size, and the storages of the format before torch 1.6.

    Raises:
        pickle.UnpicklingError, as torch raises it: it is a pickle of code. Others: it is damaged.
    """
    if not zipfile.is_zipfile(path):
        with WithinFile(io.FileIO(path)) as opened:
            for operation, argument, _ in pickletools.genops(opened):
                if operation.name == "GLOBAL":
                    raise pickle.UnpicklingError(f"GLOBAL {argument.replace(' ', '.')}")
        raise ValueError("no archive, as torch.save writes it since version 1.6")
    with WithinFile(io.FileIO(path)) as opened, zipfile.ZipFile(opened) as archive:
        records, size = archive.infolist(), path.stat().st_size
        if sum(record.file_size for record in records) > size or not all(0 <= r.header_offset < size for r in records):
            raise ValueError("its records are larger than the file")
        if any(b"bytearray" in archive.read(r) for r in records if r.filename.endswith(".pkl")):
            raise ValueError("it holds a bytearray")


class WithinFile(io.BufferedReader):
    """Allocates for what is left of the file, however much is asked for."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return super().read()
        return super().read(min(size, os.fstat(self.fileno()).st_size - self.tell()))
