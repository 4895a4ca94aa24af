"""What goes wrong in a command is a line with options as they are typed; what is a fault of ours stays a traceback."""

import csv
import errno
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import harmonica_dit
from harmonica_dit import files
from harmonica_dit.cli import app
from harmonica_dit.cli_errors import as_typed, without_writing_errors_of_threads
from harmonica_dit.memory import check_fits_memory, memory_of
from harmonica_kernels import _command

FULL = OSError(errno.ENOSPC, "No space left on device")


def harmonica(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("message, said", [
    ("name: got 'x'", "--model: got 'x'"),
    ("image_size: too small", "--image-size: too small"),
    ("target_speedup, beta: give one", "--target-speedup, --beta: give one"),
    ("steps of it: 3", "steps of it: 3"),
    ("load it with image_size= or name=3", "load it with --image-size= or --model=3"),
    ("/a/steps=3/file: no", "/a/steps=3/file: no"),
])
def test_messages_name_options_as_typed(message, said):
    options = dict(model="--model", image_size="--image-size", target_speedup="--target-speedup", beta="--beta",
                   steps="--steps")
    assert as_typed(message, options) == said


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes")])
def test_out_of_memory_is_a_line(tmp_path, monkeypatch, error):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(harmonica_dit, "sample", run_out)
    result = harmonica("sample", "--out", tmp_path / "x.png")
    assert (result.exit_code, result.stderr) == (2, "harmonica: out of memory: take a smaller --batch\n")


def test_a_fault_of_ours_is_a_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two tensors of other shapes")

    monkeypatch.setattr(harmonica_dit, "sample", fail)
    assert isinstance(harmonica("sample", "--out", tmp_path / "x.png").exception, RuntimeError)


def test_a_full_disk_is_a_line_with_the_file(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise FULL

    monkeypatch.setattr(files, "save", fill)
    out = tmp_path / "x.safetensors"
    result = harmonica("sample", "--labels", 0, "--steps", 1, "--out", out)
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert result.stderr.startswith(f"harmonica: cannot write {out}: ") and not list(tmp_path.iterdir())


def test_a_log_on_a_full_disk_names_its_file(tmp_path):
    from harmonica_dit.train.log import COLUMNS, Log

    with pytest.raises(OSError, match="cannot write .*/dev/full: No space left"), Log(tmp_path, 1, 0, False) as log:
        log._file.close()
        log._file = open("/dev/full", "w")
        log._csv = csv.DictWriter(log._file, COLUMNS)
        log.line(**dict.fromkeys(COLUMNS, 0.0))


@pytest.mark.parametrize("owner, moment", [("tensorboard.summary.writer.record_writer.RecordWriter", "write"),
                                           ("torch.utils.tensorboard.SummaryWriter", "add_scalar"),
                                           ("tensorboard.summary.writer.record_writer.RecordWriter", "close")])
def test_events_on_a_full_disk_name_their_folder(tmp_path, monkeypatch, capsys, owner, moment):
    """At the beginning and the end, in TensorBoard's thread; in a line, where that thread's errors are raised again."""
    def fill(*_):
        raise FULL

    monkeypatch.setattr(f"{owner}.{moment}", fill)
    result = harmonica("train", "--out", tmp_path, "--trajectories", 1, "--batch", 1, "--steps", 2, "--beta", 1e-6)
    assert result.exit_code == 2 and f"harmonica: cannot write {tmp_path}: No space" in result.stderr.splitlines()[-1]
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_of_threads_are_shown(monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with without_writing_errors_of_threads():
        for target in (lambda: int("three"), lambda: open("/no/such")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert [error.exc_type for error in seen] == [ValueError] and threading.excepthook == seen.append


def test_a_batch_that_fits_is_taken_and_one_that_cannot_is_not():
    net = harmonica_dit.load("fashion-dit")
    there = memory_of(torch.device("cpu"))
    row = net.tokens * net.width * 4  # bytes of a tensor [1, N, D]
    check_fits_memory(net, there // row // 3, 1.0)
    with pytest.raises(ValueError, match="batch: got .* at least; cpu has"):
        check_fits_memory(net, there // row // 3, 1.5)
    with pytest.raises(ValueError, match="batch: got"):
        check_fits_memory(net, there // row // 3, 1.0, kept=3)


def test_no_folder_is_left_by_what_fails(tmp_path):
    for command in ("train", "compare"):
        assert harmonica(command, "--model", "nowhere", "--out", tmp_path / "a" / "b").exit_code == 2
    assert harmonica("sample", "--model", "nowhere", "--out", tmp_path / "a" / "x.png").exit_code == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    files.check_folder(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    """And a warning is a line."""
    read, write = os.pipe()
    with open(write, "w", encoding="latin-1") as stream, open(read, encoding="latin-1") as said:
        with warnings.catch_warnings():
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "argv", ["harmonica", "sample", "--out", "β.gif"])
            with pytest.raises(SystemExit):
                _command.main()
            warnings.showwarning("schedule: 1.97× is\n  little", UserWarning, __file__, 1)
        stream.close()
        assert said.read() == ("harmonica: --out: got ?.gif, expected a .png or a .safetensors file\n"
                               "harmonica: schedule: 1.97× is little\n")


@pytest.mark.parametrize("error, said", [(ConnectionError("no network\nand more"), "no network"),
                                         (TimeoutError(), "TimeoutError")])
def test_a_repository_that_cannot_be_reached_is_said_once_asked(monkeypatch, error, said):
    import huggingface_hub

    from harmonica_dit import repository

    asked = []

    def ask(self, name, timeout):
        asked.append(name)
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(OSError, match=f"vae: there is no folder a/b, and .* cannot be reached: {said}$"):
        repository.check_reachable("vae", "a/b", "config.json")
    monkeypatch.setattr(repository, "try_to_load_from_cache", lambda source, file: f"/cache/{source}/{file}")
    repository.check_reachable("vae", "a/b", "config.json")
    repository.check_reachable("vae", Path(__file__).parent, "config.json")
    assert asked == ["a/b"]
