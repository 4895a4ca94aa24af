"""Random changes of files that keep most of them whole: what is inside is wrong, not the container."""

import argparse
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch

CODE_HAS_RUN = "fuzz-code-has-run"  # the file that a malicious checkpoint would make
LARGEST = 1 << 16  # bytes of a file

NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 10**400,
           float("nan"), float("inf"), -float("inf"))
TEXTS = ("", " ", "0", "nan", "a" * 300, "\0", "\n", "\ud800", "ä", "kind", "[]", "../../x", "%s{0}", "\x1b[2J")
VALUES = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"": None}, [0] * 100, {"order": 3}, {"order": []})
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U64": 8, "C64": 8}
WORDS = {"F32": (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0), "F64": (0x7FF8 << 48, 0x7FF0 << 48, 1, 0)}


def change_json(value: Any, random: Random) -> Any:
    """One change somewhere in a JSON value: an entry replaced, left out, doubled or moved."""
    if isinstance(value, (list, dict)) and value and random.random() < 0.75:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, made = random.choice(list(keys)), value.copy()
        way = random.random()
        if way < 0.7:
            made[key] = change_json(value[key], random)
        elif way < 0.85:
            del made[key]
        elif isinstance(made, list):
            made.insert(random.randrange(len(made) + 1), random.choice((*made, random.choice(VALUES))))
        else:
            made[random.choice((*made, *TEXTS))] = random.choice((*made.values(), random.choice(VALUES)))
        return made
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        try:
            return random.choice((value + 1, value - 1, -value, value * 2, value / 2, float(value), str(value)))
        except OverflowError:
            return 0
    return random.choice(VALUES)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Some bytes replaced, left out, doubled or put in."""
    for _ in range(random.choice((1, 1, 2, 8))):
        at, way = random.randrange(len(data) + 1), random.random()
        some = data[at : at + random.choice((1, 2, 4, 8, 64))]
        if way < 0.5:
            data = data[:at] + random.randbytes(len(some)) + data[at + len(some):]
        elif way < 0.7:
            data = data[:at] + data[at + len(some):]
        elif way < 0.9:
            data = data[:at] + some + data[at:]
        else:
            data = data[:at]
    return data


class Tensors:
    """The content of a safetensors file: name -> [dtype, shape, bytes], and metadata, decoded where it is JSON."""

    def __init__(self, data: bytes):
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        self.metadata = {name: json.loads(text) for name, text in header.pop("__metadata__", {}).items()}
        self.tensors = {name: [one["dtype"], one["shape"], data[8 + size + one["data_offsets"][0]:
                                                                8 + size + one["data_offsets"][1]]]
                        for name, one in header.items()}

    def pack(self, lie: Callable[[dict], Any] = lambda header: header) -> bytes:
        """The file. lie: may change its header."""
        header, parts, at = {}, [], 0
        if self.metadata:
            header["__metadata__"] = {name: json.dumps(value) for name, value in self.metadata.items()}
        for name, (dtype, shape, values) in self.tensors.items():
            header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + len(values)])
            parts.append(values)
            at += len(values)
        text = json.dumps(lie(header)).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(parts)

    def change(self, random: Random) -> None:
        """One change that leaves the file whole."""
        if self.metadata and (not self.tensors or random.random() < 0.6):
            way, name = random.random(), random.choice(list(self.metadata))
            if way < 0.85:
                self.metadata[name] = change_json(self.metadata[name], random)
            elif way < 0.95:
                del self.metadata[name]
            else:
                self.metadata[random.choice(TEXTS)] = random.choice(VALUES)
            return
        if not self.tensors:
            return
        name = random.choice(list(self.tensors))
        dtype, shape, values = one = self.tensors[name]
        way = random.random()
        if way < 0.35 and values:  # other values
            size = DTYPES[dtype]
            words = [(word & (1 << 8 * size) - 1).to_bytes(size, "little")
                     for word in (*WORDS.get(dtype, ()), 0, 1, random.getrandbits(8 * size))]
            at = random.randrange(len(values) // size) * size
            one[2] = values[:at] + random.choice(words) + values[at + size:]
        elif way < 0.7:  # another shape, with as many bytes as it needs
            shape = list(shape)
            axis = random.randrange(len(shape) + 1)
            if axis == len(shape):
                shape.insert(random.randrange(axis + 1), random.choice((0, 1, 2)))
            elif random.random() < 0.2:
                del shape[axis]
            else:
                shape[axis] = random.choice((0, 1, 2, 3, 5, 300, shape[axis] + 1, max(shape[axis] - 1, 0)))
            self.resize(one, dtype, shape)
        elif way < 0.8:
            self.resize(one, random.choice(list(DTYPES)), shape)
        elif way < 0.9:
            del self.tensors[name]
        else:
            other = random.choice((*self.tensors, "extrapolation", "forecaster.states", "forecaster.own", *TEXTS[:-6]))
            self.tensors[other] = list(one)

    @staticmethod
    def resize(one: list, dtype: str, shape: list[int]) -> None:
        size = DTYPES[dtype]
        for length in shape:
            size *= length
        if size <= LARGEST // 2:
            one[:] = dtype, shape, (one[2] * (size // max(len(one[2]), 1) + 1) + bytes(size))[:size]


def change_safetensors(data: bytes, random: Random) -> bytes:
    way = random.random()
    if way < 0.08:
        return change_bytes(data, random)
    try:
        content = Tensors(data)
        if way < 0.16:
            return content.pack(lambda header: change_json(header, random))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            content.change(random)
        return content.pack()
    except Exception:  # what was changed before may be anything
        return change_bytes(data, random)


def change_json_file(data: bytes, random: Random) -> bytes:
    way = random.random()
    try:
        if way > 0.1:
            return json.dumps(change_json(json.loads(data), random)).encode()
    except Exception:  # what was changed before may be anything
        pass
    if way < 0.01:
        return b"[" * random.choice((10, 10_000)) + data
    return change_bytes(data, random)


def change_text(data: bytes, random: Random) -> bytes:
    """A line or a field replaced, left out or doubled."""
    if random.random() < 0.1:
        return change_bytes(data, random)
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    way = random.random()
    if way < 0.2:
        del lines[at]
    elif way < 0.4:
        lines.insert(at, random.choice(lines))
    else:
        fields = lines[at].split(b",")
        value = random.choice(TEXTS + tuple(str(number) for number in NUMBERS))
        fields[random.randrange(len(fields))] = value.encode("utf-8", "surrogatepass")
        lines[at] = b",".join(fields)
    return b"\n".join(lines)


def change_pt(data: bytes, random: Random) -> bytes:
    """A checkpoint of torch.save: another tree of tensors and values, or another pickle or record in its archive."""
    way = random.random()
    if way < 0.1:
        return change_bytes(data, random)
    try:
        if way < 0.25:
            return change_archive(data, random)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(data), weights_only=True)
        made = io.BytesIO()
        torch.save(change_tree(content, random), made)
        return made.getvalue()
    except Exception:  # what was changed before may be anything
        return change_bytes(data, random)


def change_tree(value: Any, random: Random) -> Any:
    """One change somewhere in dicts, lists, namespaces and tensors."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key, made, way = random.choice(list(value)), dict(value), random.random()
        if way < 0.7:
            made[key] = change_tree(value[key], random)
        elif way < 0.85:
            del made[key]
        else:
            made[random.choice((*TEXTS, "args", "routers", "ema", "5.prob", "image_size", 3))] = value[key]
        return made
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        made = type(value)()
        vars(made).update(change_tree(vars(value), random))
        return made
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        other = random.choice((value.double(), value.half(), value.int(), value[:-1] if value.dim() else value,
                               value[None], value * float("nan"), value.expand(3, *value.shape), value.to("meta"),
                               value.to_sparse() if value.layout == torch.strided else value, torch.zeros(4),
                               torch.zeros(0), torch.zeros(1).expand(1 << 20), torch.nn.Parameter(value.float())))
        return other
    return random.choice((*VALUES[:-4], torch.ones(4), torch.Size([1]), torch.float16, torch.device("cpu"),
                          bytearray(3), {1}, 1j))


def change_archive(data: bytes, random: Random) -> bytes:
    made, archive = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    kept = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(made, "w", kept) as to:
        for name in archive.namelist():
            content, way = archive.read(name), random.random()
            if way < 0.25:
                content = change_pickle(content, random) if name.endswith(".pkl") else change_bytes(content, random)
            elif way < 0.3:
                continue
            elif way < 0.32:
                content += bytes(1 << 20)
            to.writestr(name, content)
    return made.getvalue()


class Payload:
    """What runs when it is unpickled: `fuzz.files` sees it."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        import os

        return (os.system, (f": > {CODE_HAS_RUN}",)) if self.name == "os" else (bytearray, (1 << 40,))


def change_pickle(content: bytes, random: Random) -> bytes:
    way = random.random()
    if way < 0.2:
        return pickle.dumps({"routers": Payload("os")}, 2)
    if way < 0.3:
        return pickle.dumps({"routers": Payload("bytearray")}, 2)
    return change_bytes(content, random)
