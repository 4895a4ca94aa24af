"""cuBLASLt by its C interface, in the library that PyTorch has loaded and asked as PyTorch asks it.

So the candidates are those that PyTorch could have taken, of the same version. The numbers are cublasLt.h's, which
tests/benches/test_gpu_gemm.py compares where there is a header. Nothing is destroyed: the process is short.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUMBERS = dict(
    CUDA_R_32F=0, CUDA_R_16BF=14, CUBLAS_COMPUTE_32F=68, CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLASLT_EPILOGUE_BIAS=4,
    CUBLASLT_EPILOGUE_GELU_BIAS=36, CUBLASLT_MATMUL_DESC_TRANSA=3, CUBLASLT_MATMUL_DESC_TRANSB=4,
    CUBLASLT_MATMUL_DESC_EPILOGUE=7, CUBLASLT_MATMUL_DESC_BIAS_POINTER=8, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES=1,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES=5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES=6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES=7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES=8)
# What tells one candidate from another: its number, and what it is read into.
CONFIG = dict(ID=(0, c_int32), TILE_ID=(1, c_uint32), SPLITK_NUM=(2, c_int32), REDUCTION_SCHEME=(3, c_uint32),
              CTA_SWIZZLING=(4, c_uint32), CUSTOM_OPTION=(5, c_uint32), STAGES_ID=(6, c_uint32),
              INNER_SHAPE_ID=(7, ctypes.c_uint16), CLUSTER_SHAPE_ID=(8, ctypes.c_uint16))
ARGUMENTS = dict(
    cublasLtMatmulDescCreate=[POINTER(c_void_p), c_int, c_int],
    cublasLtMatmulDescSetAttribute=[c_void_p, c_int, c_void_p, c_size_t],
    cublasLtMatrixLayoutCreate=[POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64],
    cublasLtMatmulPreferenceCreate=[POINTER(c_void_p)],
    cublasLtMatmulPreferenceSetAttribute=[c_void_p, c_int, c_void_p, c_size_t],
    cublasLtMatmulAlgoGetHeuristic=[c_void_p] * 7 + [c_int, c_void_p, POINTER(c_int)],
    cublasLtMatmulAlgoConfigGetAttribute=[c_void_p, c_int, c_void_p, c_size_t, POINTER(c_size_t)],
    cublasLtMatmul=[c_void_p] * 14 + [c_size_t, c_void_p])  # alpha, beta: addresses on the host


class Found(Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (("algo", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float),
                ("reserved", c_int * 4))


class Candidate(NamedTuple):
    facts: dict[str, Any]
    run: Callable[[Tensor, Tensor, Tensor], None]  # of h, weight and out


def loaded() -> ctypes.CDLL:
    """The library that PyTorch has loaded: the linker knows it by this name."""
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")


def workspace_of_pytorch() -> int:
    """Bytes that it allows cuBLASLt: 1 or 32 MiB on Hopper, by version and environment."""
    ask = ctypes.CDLL("libtorch_cuda.so")._ZN2at4cuda26getCUDABlasLtWorkspaceSizeEv  # at::cuda::, in ATen's header
    ask.restype = c_size_t
    return ask()


class CuBlasLt:
    """handle: a cuBLAS one is a cuBLASLt one, and PyTorch uses its own so. stream: asked for at each product."""

    def __init__(self, library: Any, handle: int, stream: Callable[[], int]):
        self.library, self.handle, self.stream = library, c_void_p(handle), stream
        for name, types in ARGUMENTS.items():
            getattr(library, name).argtypes = types

    def call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name}: status {status}")

    def new(self, name: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        self.call(f"cublasLt{name}Create", byref(made), *arguments)
        return made

    def set(self, of: str, to: c_void_p, attribute: str, value: Any) -> None:
        number = NUMBERS[f"CUBLASLT_MATMUL_{attribute}"]
        self.call(f"cublasLt{of}SetAttribute", to, number, byref(value), ctypes.sizeof(value))

    def candidates(self, h: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gelu: bool, workspace: Tensor,
                   allowed: int, most: int) -> list[Candidate]:
        """At most so many, the heuristic's best first, for out = h weightᵀ + bias, or GELU of it, in bfloat16.

        allowed: bytes of the workspace that they may need. h [rows, inner], weight [outer, inner]: matrices are in
        columns for cuBLAS, so it is asked for outᵀ = weight hᵀ, where the weight is the one that is transposed.
        """
        (rows, inner), outer = h.shape, len(weight)
        product = self.new("MatmulDesc", NUMBERS["CUBLAS_COMPUTE_32F"], NUMBERS["CUDA_R_32F"])
        epilogue = NUMBERS["CUBLASLT_EPILOGUE_GELU_BIAS" if gelu else "CUBLASLT_EPILOGUE_BIAS"]
        for attribute, number in (("TRANSA", NUMBERS["CUBLAS_OP_T"]), ("TRANSB", NUMBERS["CUBLAS_OP_N"]),
                                  ("EPILOGUE", epilogue)):
            self.set("MatmulDesc", product, f"DESC_{attribute}", c_int32(number))
        self.set("MatmulDesc", product, "DESC_BIAS_POINTER", c_void_p(bias.data_ptr()))
        a, b, c = (self.new("MatrixLayout", NUMBERS["CUDA_R_16BF"], *shape, shape[0])
                   for shape in ((inner, outer), (inner, rows), (outer, rows)))
        wishes = self.new("MatmulPreference")
        self.set("MatmulPreference", wishes, "PREF_MAX_WORKSPACE_BYTES", c_size_t(allowed))
        for matrix, tensor in zip("ABCD", (weight, h, out, bias)):  # of the bias in D's place, as PyTorch does
            self.set("MatmulPreference", wishes, f"PREF_MIN_ALIGNMENT_{matrix}_BYTES", c_uint32(alignment(tensor)))
        found, count = (Found * most)(), c_int()
        self.call("cublasLtMatmulAlgoGetHeuristic", self.handle, product, a, b, c, c, wishes, most, found, byref(count))
        one, zero = c_float(1), c_float(0)

        def runner(its: Found) -> Callable[[Tensor, Tensor, Tensor], None]:
            def run(h: Tensor, weight: Tensor, out: Tensor) -> None:
                self.call("cublasLtMatmul", self.handle, product, ctypes.addressof(one), weight.data_ptr(), a,
                          h.data_ptr(), b, ctypes.addressof(zero), out.data_ptr(), c, out.data_ptr(), c,
                          ctypes.addressof(its.algo), workspace.data_ptr(), workspace.numel(), self.stream())
            return run

        return [Candidate(self.facts(its), runner(its)) for its in found[: count.value] if its.state == 0]

    def facts(self, its: Found) -> dict[str, Any]:
        facts = {}
        for name, (number, kind) in CONFIG.items():  # None where it has no such attribute
            value, written = kind(), c_size_t()
            refused = self.library.cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.addressof(its.algo), number, byref(value), ctypes.sizeof(value), byref(written))
            facts[name] = None if refused else value.value
        return facts | dict(workspace=its.workspace, waves=its.waves)


def alignment(tensor: Tensor) -> int:
    """Bytes, at most 256, that its address is a multiple of."""
    address = tensor.data_ptr()
    return min(256, address & -address)
