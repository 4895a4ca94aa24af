"""The extension as a whole: instruction sets, threads, and what it says of itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harmonica_kernels
from harmonica_kernels._info import info
from harmonica_kernels.ops import residual_norm
from harmonica_kernels.ops._arguments import dtype_number
from harmonica_kernels.ops._library import kernels


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, text=True,
                          capture_output=True)


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_environment_chooses_the_instruction_set(isa):
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("harmonica_kernels._C", {kernels.__file__!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
print(kernels.isa())
"""
    assert python(code, HARMONICA_CPU=isa).stdout.strip() == isa


def test_unknown_instruction_set_is_an_error():
    result = python("from harmonica_kernels import info", HARMONICA_CPU="mmx")
    assert result.returncode and "no CPU kernels named 'mmx'" in result.stderr and "portable" in result.stderr


def test_missing_extension_says_what_to_do():
    code = "import sys; sys.modules['harmonica_kernels._C'] = None; from harmonica_kernels import info"
    assert "ImportError: harmonica_kernels' compiled kernels could not be loaded" in python(code).stderr


def test_missing_triton_says_what_to_do():
    code = "import sys; sys.modules['triton'] = None; import harmonica_kernels; import harmonica_kernels.triton_kernels"
    assert "ImportError: harmonica_kernels: CUDA tensors need Triton" in python(code).stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_are_torchs_own(threads):
    """No thread is added to those that torch has started, so no second pool competes with them."""
    threads(3)
    x = torch.randn(64, 64, 512)
    x.mul(2.0)
    before = set(os.listdir("/proc/self/task"))
    residual_norm(x, [], None, None)
    assert set(os.listdir("/proc/self/task")) <= before  # one that an earlier test has left may end meanwhile
    assert kernels.threading().startswith("OpenMP")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_that_cannot_start_are_done_without():
    """Where no OpenMP is in the process and its memory is short of 64 stacks, some threads do all of the work."""
    done = python(f"""
import ctypes, importlib.util, resource
spec = importlib.util.spec_from_file_location("harmonica_kernels._C", {kernels.__file__!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
size = 8 * 256 * 512
x, h = (ctypes.c_float * size)(*[2.0] * size), (ctypes.c_float * size)()
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (128 << 20),) * 2)
activation = lambda values: (ctypes.addressof(values), {dtype_number(torch.float32)}, 256 * 512, 512)
kernels.residual_norm((8, 256, 512), activation(x), None, activation(h), None, [], None, 0.0,
                      (None, None, False, 1e-5), 64)
print(kernels.threading(), set(h))
""")
    assert done.stdout == "std::thread (no OpenMP runtime in this process) {2.0}\n", done.stderr


def test_info_is_honest():
    facts = info()
    assert facts["isa"] in facts["isas"] and "portable" in facts["isas"]
    assert facts["cuda"] == (not facts["cuda_reason"])
    assert facts["ops"]["residual_norm"].startswith(f"CPU: C++ ({kernels.isa()})")
    assert all(("CUDA: Triton" in path) == facts["cuda"] for path in facts["ops"].values())
    printed = subprocess.run([sys.executable, "-m", "harmonica_kernels"], text=True, capture_output=True).stdout
    assert facts["threading"] in printed and facts["extension"] in printed


@pytest.mark.parametrize("installed", [True, False])
def test_a_source_folder_that_shadows_the_installed_package_is_named(tmp_path, installed):
    """In a line, as `python -m harmonica_kernels` says it in a clone after `pip install .`."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(Path(harmonica_kernels.__file__).parent, source / "harmonica_kernels",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "harmonica_kernels-9.9.dist-info").mkdir(parents=True)
    (site / "harmonica_kernels-9.9.dist-info" / "METADATA").write_text("Name: harmonica-kernels\nVersion: 9.9\n")
    (site / "harmonica_kernels").mkdir()
    if installed:
        (site / "harmonica_kernels" / "_C.so").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (source, site)))}
    code = "import runpy, sys; sys.modules['harmonica_kernels._C'] = None; " \
           "runpy.run_module('harmonica_kernels', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, cwd=tmp_path)
    said = f"This is the source folder {source}, which Python looks into before {site}, where the package is installed"
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and run.stderr.startswith("harmonica_kernels: ")
    assert (said in run.stderr) == installed and ("They are built by `pip install .`" in run.stderr) != installed
