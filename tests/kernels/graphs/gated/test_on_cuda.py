"""What is built for CUDA, on a stand-in that executes it: graphs are lists, kernels and memory are the CPU's."""

import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels import _info
from harmonica_kernels.graphs.gated import executor, on_cuda
from harmonica_kernels.ops._library import kernels
from support.graph_stand_in import Built, Recorder
from support.loops import Table, Trajectory

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")  # as the build finds it


@pytest.mark.parametrize("rule", ["scores", "change"])
def test_the_built_graph_equals_the_walk(monkeypatch, rule):
    for _ in range(20):
        T, K = random.randint(1, 5), random.randint(2, 6)
        trajectory = Trajectory(T, K)
        walked = hk.compile(Trajectory.run, mode="gated", rule=rule)
        with monkeypatch.context() as patch:
            built = Built(patch, rule).executor
            for i in range(6):
                table = Table(torch.rand(T, K), torch.randn(T, K) if i % 2 else None)
                noise, images = torch.randn(trajectory.shape), []
                for ex in (built, walked):
                    ex.load(table)
                    ex.threshold = 0.1 * i
                    with monkeypatch.context() as inner:
                        if ex is walked:
                            inner.setattr(executor, "builds_graphs", lambda device: False)
                        images.append(ex(trajectory, noise))
                assert torch.equal(*images)
                assert torch.equal(built.reused, walked.reused)
            assert Recorder.last.launches == 5, "one a trajectory; the first ran on a graph without forecasts"
            assert Recorder.last.recording == K + 3, "each part is recorded once"


def test_a_refused_node_is_named_and_nothing_is_left(monkeypatch):
    trajectory, built = Trajectory(3, 4), Built(monkeypatch).executor
    monkeypatch.setattr(Recorder, "refused", "branch 2")
    with pytest.raises(RuntimeError, match="branch 2, node 2 of 5: a host function"):
        built(trajectory, torch.randn(trajectory.shape))
    assert Recorder.last.closed and built.graphs == 0


def test_without_a_gpu_the_reason_is_said():
    with pytest.raises(RuntimeError, match='mode="gated" on cuda:0: (the extension|there is no|the driver)'):
        on_cuda.Recorder(torch.device("cuda:0"))


@pytest.mark.parametrize("build, reason", [
    (dict(runtime=0), "built without nvcc"),
    (dict(runtime=13000, needed=13000, driver=0), "no NVIDIA driver"),
    (dict(runtime=13000, needed=13000, driver=12080), "driver is too old: it serves CUDA 12.8, 13.0 is needed .* 13.0"),
    (dict(runtime=12040, needed=12040, driver=12030), "driver is too old: it serves CUDA 12.3, 12.4 is needed"),
    (dict(runtime=13000, needed=13000, driver=13000, devices=0, error="no CUDA-capable device"), "no CUDA-capable"),
    (dict(runtime=12040, needed=12040, driver=13000, devices=1, error=""), "^$"),
])
def test_info_says_what_is_missing(monkeypatch, build, reason):
    monkeypatch.setattr(_info, "kernels", SimpleNamespace(cuda_build=lambda: build))
    assert re.search(reason, _info.why_not_gated())


@pytest.mark.skipif(not kernels.cuda_build()["runtime"], reason="built without nvcc")
def test_the_build_says_what_it_is():
    build = kernels.cuda_build()
    assert "90" in build["architectures"].split() and build["runtime"] >= 12040
    assert build["needed"] == max(build["runtime"] // 1000 * 1000, 12040)


@pytest.mark.skipif(not kernels.cuda_build()["runtime"] or torch.cuda.is_available(), reason="needs nvcc and no GPU")
def test_a_cuda_error_is_an_exception():
    with pytest.raises(RuntimeError, match="asking for the current device: cudaError"):
        kernels.GatedGraph(0)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_smallest_graph_builds(tmp_path):
    """It needs a GPU to run, where a name that has changed would cost the first call."""
    command = [NVCC, "-std=c++17", "-O0", "-arch=sm_90", "-c", "tests/cuda/smallest.cu", "-o", tmp_path / "built.o"]
    built = subprocess.run(command, cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
