"""Ranks for tests: processes that are forked from one that has imported everything, so that many cost little."""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for _name in ("cli", "demo", "models.dit", "evaluate.heat_maps", "evaluate.judging", "evaluate.report",
              "train.forecaster", "train.train"):
    importlib.import_module(f"harmonica_dit.{_name}")
importlib.import_module("torch.utils.tensorboard")

LIMIT = 120  # seconds, after which ranks are taken to hang
IMPORTED_IN = os.getpid()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(world: int, work, *arguments, join: bool = True) -> list:
    """What `work(*arguments)` returned in each of so many ranks; an exception where it raised one.

    join: whether the ranks are a group when the work begins, a program's own; else only what torchrun says is there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.ranked"])
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.12.8 the server lacks this process's sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [context.Process(target=_be, args=(rank, world, port, folder, join, work, arguments))
                 for rank in range(world)]
        for one in ranks:
            one.start()
        end = time.monotonic() + LIMIT
        for one in ranks:
            one.join(max(0, end - time.monotonic()))
        hanging = [rank for rank, one in enumerate(ranks) if one.is_alive()]
        for one in ranks:
            one.kill()
        assert not hanging, f"ranks {hanging} hang"
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world)]


def _be(rank: int, world: int, port: int, folder: str, join: bool, work, arguments) -> None:
    assert os.getpid() != IMPORTED_IN, "the server has not imported this module, so each rank took seconds to do so"
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    if join:
        dist.init_process_group("gloo")
    try:
        result = work(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, Path(folder) / str(rank))
    os._exit(0)  # as a rank ends that has failed: without a word to the others
