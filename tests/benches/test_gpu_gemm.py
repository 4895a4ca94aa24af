"""bench/gpu/gemm.py and cublaslt.py, with a stand-in for the library that multiplies what is at the given addresses."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import cublaslt, gemm
from bench.gpu.cublaslt import CONFIG, NUMBERS
from bench.gpu.record import Record

NVCC = shutil.which("nvcc")
TYPES = {4: ctypes.c_int32, 8: ctypes.c_uint64}


class Library:
    """The functions of cublasLt.h that are called, with its arguments in its order. Candidate n takes n MiB."""

    def __init__(self, wrong: tuple[int, ...] = ()):
        self.made, self.asked, self.streams, self.wrong = [], [], [], wrong
        for name in cublaslt.ARGUMENTS:
            setattr(self, name, Function(getattr(self, f"_{name.removeprefix('cublasLt')}")))

    def _new(self, made, thing):
        self.made.append(thing)
        made._obj.value = len(self.made)

    def _MatmulDescCreate(self, made, compute, scale):
        assert (compute, scale) == (NUMBERS["CUBLAS_COMPUTE_32F"], NUMBERS["CUDA_R_32F"])
        self._new(made, {})

    def _MatrixLayoutCreate(self, made, kind, rows, columns, leading):
        assert kind == NUMBERS["CUDA_R_16BF"]
        self._new(made, (rows, columns, leading))

    def _MatmulPreferenceCreate(self, made):
        self._new(made, {})

    def _set(self, of, attribute, value, size):
        self.made[of.value - 1][attribute] = TYPES[size].from_address(ctypes.addressof(value._obj)).value

    _MatmulDescSetAttribute = _MatmulPreferenceSetAttribute = _set

    def _MatmulAlgoGetHeuristic(self, handle, product, a, b, c, d, wishes, most, found, count):
        assert handle.value == 7
        allowed = self.made[wishes.value - 1][NUMBERS["CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES"]]
        self.asked.append((self.made[wishes.value - 1], most))
        sizes = [n for n in (1, 0, 2, 3) if n << 20 <= allowed][:most]
        for its, n in zip(found, sizes):
            its.algo[0], its.workspace = n, n << 20
        count._obj.value = len(sizes)

    def _MatmulAlgoConfigGetAttribute(self, algo, attribute, value, size, written):
        assert ctypes.sizeof(value._obj) == size
        value._obj.value = ctypes.c_uint64.from_address(algo).value if attribute == CONFIG["ID"][0] else 0

    def _Matmul(self, handle, product, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algo, workspace,
                bytes, stream):
        assert [ctypes.c_float.from_address(one).value for one in (alpha, beta)] == [1, 0]
        assert (c, bytes) == (d, 4 << 20)
        wanted, self.streams = self.made[product.value - 1], [*self.streams, stream]
        a, b, d = (matrix(one, self.made[layout.value - 1])
                   for one, layout in ((a, a_layout), (b, b_layout), (d, d_layout)))
        a, b = (one.T if wanted[NUMBERS[f"CUBLASLT_MATMUL_DESC_TRANS{name}"]] else one
                for one, name in ((a, "A"), (b, "B")))
        bias = matrix(wanted[NUMBERS["CUBLASLT_MATMUL_DESC_BIAS_POINTER"]], (len(a), 1, len(a)))
        found = a.float() @ b.float() + bias.float()
        if wanted[NUMBERS["CUBLASLT_MATMUL_DESC_EPILOGUE"]] == NUMBERS["CUBLASLT_EPILOGUE_GELU_BIAS"]:
            found = F.gelu(found, approximate="tanh")
        d.copy_(found * (1.1 if ctypes.c_uint64.from_address(algo).value in self.wrong else 1))


class Function:
    def __init__(self, call):
        self.call = call

    def __call__(self, *arguments):
        assert len(arguments) == len(self.argtypes)
        return self.call(*arguments) or 0


def matrix(address: int, layout: tuple[int, int, int]) -> torch.Tensor:
    """bfloat16 in columns."""
    rows, columns, leading = layout
    memory = (ctypes.c_uint16 * (columns * leading)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(columns, leading)[:, :rows].T


@pytest.fixture
def library(monkeypatch):
    """gemm.py not in a dry run, on the CPU, where PyTorch allows 1 MiB; its record's row and candidates."""
    def use(*wrong):
        its = Library(wrong)
        monkeypatch.setattr(gemm, "loaded", lambda: its)
        monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 7)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), dict(cuda_stream=5)))
        return its
    return use


def measure(tmp_path, monkeypatch, gelu):
    """One product whose candidates take, in the order of the heuristic, 4, 3, 2 and 1 µs."""
    def time(self, group, graphs, *_, **__):
        for graph in graphs.values():
            graph()
        return {name: 5e-6 if name == "PyTorch" else (4 - int(name)) * 1e-6 for name in graphs}

    monkeypatch.setattr(Record, "time", time)
    with Record("gemm", tmp_path, tiny=True) as record, record.attempt("a product"):
        buffers = gemm.Buffers(record, 6, 24, 16)
        gain = gemm.measure(record, "a product", buffers, gelu, torch.empty(4 << 20, dtype=torch.uint8), 1 << 20)
    return record, gain


@pytest.mark.parametrize("gelu", [False, True])
def test_every_candidate_multiplies_and_the_best_is_named(tmp_path, monkeypatch, library, gelu):
    its = library()
    if gelu:  # PyTorch's on the CPU is not the tanh form
        monkeypatch.setattr(torch, "_addmm_activation", lambda bias, h, w, use_gelu, out: out.copy_(
            F.gelu(h.float() @ w.float() + bias.float(), approximate="tanh")))
    record, gain = measure(tmp_path, monkeypatch, gelu)
    assert not record.failed, record.failed
    [row] = record.content["rows"]
    assert row["candidates"] == 4 and row["best"] == 3 and row["ID"] == 3 and row["workspace"] == 3 << 20
    assert row["best within PyTorch's workspace, µs"] == pytest.approx(3), "1 and 0 MiB, and these alone"
    assert row["first / best"] == pytest.approx(4) and gain == pytest.approx(3e-6)
    assert [most for _, most in its.asked] == [1, 32, 32] and {*its.streams} == {5}
    for wishes, _ in its.asked:
        assert all(wishes[NUMBERS[f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{matrix}_BYTES"]] >= 2 for matrix in "ABCD")


def test_the_best_and_the_first_are_timed_again_and_that_decides(tmp_path, monkeypatch, library):
    """Candidate 4 is the fastest at first, and slower than the first one where only weights come from memory."""
    library()
    monkeypatch.setattr(gemm, "candidates", lambda *a: [
        cublaslt.Candidate(dict(ID=n, workspace=0), a[-1]) for n in range(6)])
    first = dict(PyTorch=7, **{"0": 6}, **{str(n): 6 - n for n in range(1, 5)}, **{"5": 9})
    again = {"PyTorch": 7, "0": 6, "2": 5.5, "3": 5, "4": 8}
    timed = []

    def time(self, group, graphs, *_, **__):
        timed.append({*graphs})
        return {name: (again if group.endswith("again") else first)[name] * 1e-6 for name in graphs}

    monkeypatch.setattr(Record, "time", time)
    with Record("gemm", tmp_path, tiny=True) as record:
        gain = gemm.measure(record, "a product", gemm.Buffers(record, 6, 24, 16), False, None, 0)
    [row] = record.content["rows"]
    assert timed == [{*first}, {*again}] and row["best"] == 3 and gain == pytest.approx(1e-6)
    assert row["first / best, cold"] == pytest.approx(3)


def test_again_the_weights_alone_rotate(tmp_path):
    with Record("gemm", tmp_path, tiny=True) as record:
        buffers = gemm.Buffers(record, 6, 24, 16)
    buffers.sets *= 1 if len(buffers.sets) > 1 else 2
    buffers.sets[1] = tuple(one.clone() for one in buffers.sets[0])
    for alone, different in ((True, (1, 2, 1)), (False, (2, 2, 2))):
        seen: list[list[int]] = []
        buffers.all(lambda *three, seen=seen: seen.append([one.data_ptr() for one in three]), alone)()
        assert len(seen) == buffers.launches and tuple(map(len, map(set, zip(*seen)))) == different


def test_a_candidate_that_is_wrong_is_not_timed(tmp_path, monkeypatch, library):
    library(3)
    record, gain = measure(tmp_path, monkeypatch, False)
    assert list(record.failed) == ["a product: candidate 3 beside the first"]
    assert record.content["rows"][0]["best"] == 2 and gain == pytest.approx(2e-6)


def test_what_a_step_could_gain(tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "measure", lambda *_: 1e-6)
    with Record("gemm", tmp_path, tiny=True) as record:
        gemm.run(record)
    assert [row["a step could gain, µs"] for row in record.content["rows"]] == [pytest.approx(28 * 4)] * 2


def test_an_attribute_that_a_candidate_lacks_is_left_open(tmp_path, monkeypatch, library):
    its = library()
    ask, lacking = its.cublasLtMatmulAlgoConfigGetAttribute.call, CONFIG["CLUSTER_SHAPE_ID"][0]
    its.cublasLtMatmulAlgoConfigGetAttribute.call = lambda algo, number, *rest: (
        7 if number == lacking else ask(algo, number, *rest))
    record, _ = measure(tmp_path, monkeypatch, gelu=False)
    [row] = record.content["rows"]
    assert not record.failed and row["CLUSTER_SHAPE_ID"] is None and row["ID"] == 3


def test_an_alignment():
    whole = torch.empty(1024, dtype=torch.bfloat16)
    start = -whole.data_ptr() % 256 // 2
    assert [cublaslt.alignment(whole[start + i :]) for i in (0, 1, 8, 128)] == [256, 2, 16, 256]


@pytest.mark.gpu
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_numbers_are_the_header_s():
    """Marked gpu, so that it runs where the numbers are used: there CUDA is whole, elsewhere it may lack cuBLAS."""
    said = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    headers = Path(re.search(r"TOP=(.*)", said)[1]) / "include"
    if not (headers / "cublasLt.h").exists():
        pytest.skip(f"nvcc's toolkit has no cublasLt.h in {headers}")
    text = "".join((headers / f"{name}.h").read_text() for name in ("cublasLt", "cublas_api", "library_types"))
    numbers = NUMBERS | {f"CUBLASLT_ALGO_CONFIG_{name}": number for name, (number, _) in CONFIG.items()}
    numbers |= dict(CUBLASLT_EPILOGUE_GELU=32)
    assert NUMBERS["CUBLASLT_EPILOGUE_GELU_BIAS"] == 32 | NUMBERS["CUBLASLT_EPILOGUE_BIAS"]
    for name in numbers.keys() - {"CUBLASLT_EPILOGUE_GELU_BIAS"}:
        assert re.search(rf"\b{name}\s*=\s*(\d+),", text)[1] == str(numbers[name]), name
    for name, types in cublaslt.ARGUMENTS.items():
        declared = re.search(rf"\b{name}\(([^;]*)\);", text)[1]
        assert len(re.sub(r"/\*.*?\*/", "", declared).split(",")) == len(types), name
