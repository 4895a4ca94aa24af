"""Files: safetensors and JSON, never pickle. A file is replaced whole or not at all."""

import errno
import glob
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

TOKEN = 4  # random bytes in a temporary file's name


@contextmanager
def replacement(path: str | os.PathLike):
    """Yields a temporary path beside `path`; its file replaces `path` when the block ends without an error.

    An interruption at any moment leaves the old file whole.

    Raises:
        OSError: the folder does not exist and cannot be made, or cannot be written to, or the disk is full; the message
            names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(TOKEN)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x") as made:  # tempfile would ignore the umask: only the owner could read its files
            mode = os.fstat(made.fileno()).st_mode
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into the folder of {path}: {error.strerror}") from None
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, mode)  # some writers replace the file by one of their own
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left in a folder of `replacement`s, of all files or of the named one; only where no
    other process writes them.
    """
    for temporary in folder.glob(f".{'*' if name is None else glob.escape(name)}.{'[0-9a-f]' * 2 * TOKEN}.*"):
        replaced = temporary.name[1 : -len(temporary.suffix) - 2 * TOKEN - 1]
        if Path(replaced).suffix == temporary.suffix:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike):
    """Gives errors of writing a message that names the file: the system's "No space left on device" does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"cannot write {path}: {error.strerror or error}") from None


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping) -> None:
    """Writes `tensors` as safetensors; each metadata value is stored as JSON."""
    with replacement(path) as temporary:
        # Not save_file, which writes into a temporary file of its own: a process killed meanwhile would leave that.
        temporary.write_bytes(save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
                                   {name: json.dumps(value) for name, value in metadata.items()}))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what `save_tensors` wrote: (tensors on the CPU, metadata).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not safetensors, or its metadata is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = {name: json.loads(value) for name, value in (opened.metadata() or {}).items()}
        json.dumps(metadata, ensure_ascii=False).encode()  # JSON can hold halves of characters, which nothing can print
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError, too
        raise ValueError(f"{path}: its metadata is not JSON: {error}") from None
    except (SafetensorError, TypeError, RuntimeError) as error:  # the latter two of shapes beyond 64 bits
        if "allocate memory" in str(error):  # the file may well be whole
            raise
        raise ValueError(f"{path} is not a whole safetensors file: {error!s:.300}") from None
    return tensors, metadata


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as named tensors, `optimizer.<parameter's index>.<name>`."""
    return {f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave; the optimiser's own settings stay as they are."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_folder(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, before the work begins. One that was not there is not left.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"cannot write into {folder}: {error.strerror}") from None
    finally:
        for one in made:
            if one.is_dir():
                one.rmdir()


def check_file(path: Path) -> None:
    check_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
