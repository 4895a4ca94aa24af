"""bench/gpu.sh runs through on a machine without a GPU, at tiny sizes: no Python error is left for the GPU to find."""

import json
import os
import re
import subprocess
import sys
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch

import harmonica_dit
from bench import RESULTS, ROOT
from bench.gpu import commands, gated, models, needs
from bench.gpu.__main__ import PARTS, run
from bench.gpu.commands import call, findings
from bench.gpu.merge import merge
from bench.gpu.record import Record
from bench.gpu.reference_way import ReferenceWay
from bench.problems import Plain
from harmonica_dit.sample import denoise
from harmonica_dit.timing import interleave

MEASURED = ("kernels", "trajectory", "compiled2", "attention", "gemm", "sdt", "pixart")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """All parts in one process, where of all that the project may use only what `needs` looks for is installed."""
    folder, parts = tmp_path_factory.mktemp("dry-run"), [*MEASURED, "gated"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hidden = {*(name.replace("-", "_") for name in pinned), *needs.DISTRIBUTIONS} - {*needs.EVERY}
    assert {"peft", "transformers"} <= hidden and not any(needs.NEEDS[part] for part in parts)
    done = python(f"""
        import sys
        sys.modules |= dict.fromkeys({sorted(hidden)})
        from pathlib import Path
        from bench.gpu.__main__ import run
        for part in {parts}:
            run(part, Path({str(folder)!r}), tiny=True)""")
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda part: json.loads((folder / f"{part}.json").read_text())


@pytest.mark.parametrize("part", MEASURED)
def test_dry_run(part, dry_run):
    found = dry_run(part)
    assert not found["failed"] and found["finished"] and found["machine"]["dry_run"]
    assert found["rows"] and found["samples"]
    assert all(sample["median"] > 0 and sample["count"] > 0 for sample in found["samples"].values())
    assert found["checks"], "results are compared before they are timed"
    assert part != "trajectory" or sum("skipped / computed" in row for row in found["rows"]) == 2
    assert part != "pixart" or sum("gated / captured" in row for row in found["rows"]) == 2


def test_the_gated_part_can_be_called(dry_run):
    """Without a GPU it measures nothing."""
    found = dry_run("gated")
    assert not found["failed"] and found["notes"] and all(note["output"] for note in found["notes"].values())


def test_the_reference_way_gives_the_same_images():
    cpu = torch.device("cpu")
    net = models.model(True, cpu, "sdpa").float()
    noise, steps = models.noise(net, 2, cpu), 4
    for schedule in models.schedules(net, steps).values():
        ours = models.trajectory(net, 2, cpu, steps)
        way = ReferenceWay(Plain(net, torch.float32, models.TINY), schedule, ours.timesteps)
        with torch.inference_mode():
            theirs = denoise(models.trajectory(way, 2, cpu, steps), noise)
            torch.testing.assert_close(theirs, denoise(ours, noise, schedule), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(theirs, denoise(ours, noise), rtol=1e-3, atol=1e-3), "nothing was reused"


def test_the_schedules_at_full_size():
    """Learning-to-Cache's, by its own rule, and the other one's."""
    net = models.DiT(**models.TINY | dict(depth=28))
    ltc, random = models.schedules(net, 20).values()
    assert ltc.compute.shape == (20, 56) and round(100 * ltc.cur, 1) == 22.1 and random.cur == 0.375


@pytest.mark.parametrize("part", ["build", "tests", "sanitizer"])
def test_commands_can_be_called(part, tmp_path):
    assert run(part, tmp_path, tiny=True), json.loads((tmp_path / f"{part}.json").read_text())["failed"]
    notes = json.loads((tmp_path / f"{part}.json").read_text())["notes"]
    assert notes and all(note["output"] for note in notes.values())


def test_the_build_needs_nothing_that_it_builds(tmp_path):
    """The tree comes to a GPU without the extension: what it lacks would end every part, the first one too."""
    done = python(f"""
        import sys
        sys.modules["harmonica_kernels._C"] = None
        from pathlib import Path
        from bench.gpu import commands, merge, needs
        from bench.gpu.__main__ import run
        commands.compile_extension = lambda record, *args, **options: record.row(compiled=True) or True
        commands.call = lambda record, steps, **options: record.row(**steps)
        commands.find_spec = lambda name: None
        sys.exit(not run("build", Path({str(tmp_path)!r}), tiny=True))""")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "build.json").read_text())["rows"]
    assert rows[0] == dict(compiled=True) and "info" in rows[1]


def test_without_cuda_where_the_build_fails_with_it(tmp_path, monkeypatch):
    called = []

    def call(record, steps, **_):
        [(step, command)] = steps.items()
        called.append((step, "-DCMAKE_CUDA_COMPILER=" in command))
        return step != "compile"

    monkeypatch.setattr(commands, "call", call)
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=str))  # builds here have their own
    with Record("build", tmp_path, tiny=True) as record:
        record.tiny = False
        commands.build(record)
    assert called == [("configure", False), ("compile", False), ("configure, without CUDA", True),
                      ("compile, without CUDA", False), ("install, without CUDA", False), ("info", False)]
    assert "WITHOUT CUDA" in record.content["rows"][0]["warning"]


def test_a_command_that_hangs_is_ended(tmp_path):
    with Record("build", tmp_path, tiny=True) as record:
        assert not call(record, {"hangs": [sys.executable, "-c", "import time; time.sleep(60)"]}, limit=0.5)
        assert call(record, {"works": [sys.executable, "-c", ""]}, limit=60)
    assert list(record.failed) == ["hangs"]


def test_the_tests_of_a_gpu_are_found():
    found = commands.gpu_tests()
    graphs = "tests/kernels/graphs"
    assert {f"{graphs}/test_captured_gpu.py", f"{graphs}/gated/test_gated_gpu.py", commands.TRITON} <= {*found}
    assert "tests/dit/test_schedule.py" not in found and all((ROOT / path).exists() for path in found)


@pytest.fixture
def reported(monkeypatch):
    """bench/gpu/gated.py on the CPU, with a tiny model and one round; a list of what it reports."""
    model, found = models.model, []
    monkeypatch.setattr(models, "model", lambda tiny, device, attention: model(True, device, attention))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    monkeypatch.setattr(gated, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gated, "TRAJECTORIES", 102)
    monkeypatch.setattr(gated, "interleave", lambda candidates, rounds, **how: interleave(candidates, 1))
    monkeypatch.setattr(gated, "report", lambda **facts: found.append(facts))
    return found


@pytest.mark.parametrize("step", ["dit", "bodies", "change", "memory"])
def test_the_steps_of_the_gated_benchmark(reported, step):
    getattr(gated, step)()
    assert reported and all(facts["step"] == step for facts in reported)
    ratios = [facts["rows"] for facts in reported if "gated_by_captured" in facts]
    assert ratios == ([2, 16] if step == "dit" else [])
    assert any("clocks" in facts for facts in reported) == (step in ("dit", "cublas", "change"))


def test_a_gated_trajectory_that_is_wrong_has_no_ratio(reported, monkeypatch):
    agree = gated.agree
    monkeypatch.setattr(gated, "agree", lambda found, *args, **facts: agree(found * 1.1, *args, **facts))
    for name in ("switch", "calls"):
        monkeypatch.setattr(gated, name, lambda *_: None)
    with pytest.raises(AssertionError):
        gated.dit()
    assert not any("gated_by_captured" in facts for facts in reported)
    assert [facts["valid"] for facts in reported if "captured" in facts] == [False, False]
    assert {facts["rows"] for facts in reported if "difference" in facts} == {2, 16}
    nan = torch.tensor([1.0, float("nan")])
    assert not agree(nan, torch.ones(2), 0.02) and not agree(torch.ones(2), nan, 0.02)


def test_a_step_that_hangs_or_fails_is_ended(monkeypatch, capfd):
    """And the next one runs."""
    steps = dict(hangs="time.sleep(60)", fails="1 / 0", works="gated.report(found=1)", waits="input()")
    programs = {step: f"import time; from bench.gpu import gated; gated.LIMITS = dict({step}=60); "
                      f"gated.{step} = lambda: {does}; gated.run({step!r})" for step, does in steps.items()}
    popen = gated.subprocess.Popen

    def begin(command, **options):
        [program] = [text for step, text in programs.items() if step in command[-1]]
        return popen([*command[:-1], program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, **options)

    monkeypatch.setattr(gated, "LIMITS", dict(hangs=3, fails=60, works=60, waits=60))
    monkeypatch.setattr(gated.subprocess, "Popen", begin)
    monkeypatch.setattr(sys, "argv", ["gated"])
    with pytest.raises(SystemExit) as ended:
        gated.main()
    out, err = capfd.readouterr()
    assert [(f.get("step"), f.get("ended")) for f in findings(out.splitlines())] == [
        ("hangs", "no end within 3 s"), ("fails", 1), (None, None), ("works", 0), ("waits", 1)]
    assert ended.value.code and "ZeroDivisionError" in err


def test_a_part_that_is_stopped_has_time_to_say_so(tmp_path):
    """It gets its signal twice, from `timeout`, which also signals its group."""
    done = python(f"""
        import os, signal, sys, time
        from bench.gpu import __main__ as gpu, commands

        def tests(record):
            record.stage("waiting")
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                record.note("farewell", "said")

        commands.tests = tests
        sys.argv = ["gpu", "--tiny", "tests", {str(tmp_path)!r}]
        gpu.main()
    """)
    found = json.loads((tmp_path / "tests.json").read_text())
    assert done.returncode == 1 and " in tests\n" in done.stderr, "where it was"
    assert not found["finished"] and "waiting" in found["failed"] and found["notes"]["farewell"] == "said"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_command_that_fails_is_a_failure(tmp_path):
    with Record("tests", tmp_path, tiny=True) as record:
        call(record, {"bad": [sys.executable, "-c", "raise SystemExit('what went wrong')"]})
    assert "what went wrong" in record.failed["bad"]


def test_findings_are_lines_of_json():
    assert findings(['{"step": "dit", "rows": 2}', "warning: x", "12", "{"]) == [{"step": "dit", "rows": 2}]


def test_the_command(tmp_path):
    results = set((ROOT / "bench/results").iterdir())
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", "--tiny", "attention"], capture_output=True,
                          text=True, env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== attention (at most 25 s)" in done.stdout and "no measurement" in done.stdout
    merged = json.loads((tmp_path / "dry-run.json").read_text())
    assert merged["dry_run"] and merged["parts"]["attention"]["finished"]
    assert "attention" in (tmp_path / "gpu.log").read_text()
    assert set((ROOT / "bench/results").iterdir()) == results


def test_an_unknown_part_is_refused():
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", "--tiny", "kernel"], capture_output=True, text=True)
    assert done.returncode == 2 and "there are: build attention" in done.stderr


def test_the_limits_name_the_parts():
    table = (ROOT / "bench/gpu.sh").read_text().split('parts="')[1].split('"')[0]
    assert {line.split()[0] for line in table.strip().splitlines()} == set(PARTS)


def test_a_stopped_part_leaves_what_it_had(tmp_path):
    with pytest.raises(KeyboardInterrupt), Record("kernels", tmp_path, tiny=True) as record:
        record.row(case="first")
        with record.attempt("second"):
            raise ValueError("wrong")
        record.stage("third")
        assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [{"case": "first"}]
        raise KeyboardInterrupt
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert not found["finished"] and found["stage"] == "third" and "wrong" in found["failed"]["second"]


def test_a_sample_is_of_one_launch(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu.record.interleave", lambda *_, **how: {"ours": [10.0, 30.0, 20.0]})
    with Record("kernels", tmp_path, tiny=True) as record:
        assert record.time("gelu", {"ours": print}, 3, launches=10) == {"ours": 2}
    assert record.content["samples"] == {"gelu: ours": dict(median=2, quartiles=[1.5, 2, 2.5], least=1, most=3, count=3,
                                                            unit="s")}


def test_no_folder_of_the_machine_is_kept(tmp_path):
    """Neither the project's nor Python's, which stand in every traceback."""
    with Record("kernels", tmp_path, tiny=True) as record:
        with record.attempt("fails"):
            json.loads("{")
        record.note("relative", f"{os.path.relpath(os.path.dirname(pytest.__file__), ROOT)}/__init__.py: warning")
        record.note("python", sys.executable)
    text = (tmp_path / "kernels.json").read_text()
    assert 'File \\"bench/gpu/record.py\\"' in text and 'File \\"json/__init__.py\\"' in text
    assert '"pytest/__init__.py: warning"' in text
    for folder in (ROOT, os.path.dirname(sys.executable), sys.prefix, sys.base_prefix):
        assert str(folder) not in text


def test_no_result_names_a_folder_of_a_machine():
    for path in RESULTS.glob("*.json"):
        found = re.findall(r"(?<![\w.])/(?:work|opt|usr|home|root|tmp|mnt)/[^\s\"\\]*", path.read_text())
        assert not found, (path.name, found[:3])


def test_what_is_missing_is_said_before_anything_is_built(monkeypatch, capsys):
    """With the command that fetches it, in the version that the tests run with."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "transformers" else name)
    monkeypatch.setattr(needs.shutil, "which", lambda name, path=None: None if name == "nvcc" else name)
    for parts, ends in ((["kernels"], False), (["gated"], False), (["sanitizer"], True), ([], True)):
        monkeypatch.setattr(sys, "argv", ["needs", *parts])
        with pytest.raises(SystemExit) as ended:
            needs.main()
        out = capsys.readouterr().out
        assert ended.value.code is ends and ("--dest .whl transformers==" in out) == ends
        assert ("environment: nvcc" in out) == (parts != ["kernels"])
    assert set(needs.NEEDS) == set(PARTS) and {*harmonica_dit.NEEDED} <= {*needs.EVERY}


def test_the_newest_version_is_fetched():
    assert "diffusers==0.42" in needs.wheels(["diffusers"]) and "pillow==13" in needs.wheels(["PIL"])


def test_the_fastest_back_end_is_used(tmp_path):
    assert models.attention(tmp_path) == "sdpa"
    assert run("attention", tmp_path, tiny=True)
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["notes"]["fastest"] == "sdpa" == models.attention(tmp_path)
    (tmp_path / "attention.json").write_text(json.dumps(dict(notes=dict(fastest="cudnn"))))
    assert models.attention(tmp_path) == "cudnn"


def test_merging_keeps_the_parts_that_were_not_run_again(tmp_path, capsys):
    for part in ("kernels", "attention"):
        with Record(part, tmp_path, tiny=True) as record:
            record.ratio("speed", 0.9, 1.0)
        merge(tmp_path, tmp_path / "results", tiny=True)
        (tmp_path / f"{part}.json").unlink()
    [path] = (tmp_path / "results").glob("*.json")
    assert json.loads(path.read_text())["parts"].keys() == {"kernels", "attention"}
    assert "SHORT" in capsys.readouterr().out


def test_a_dry_run_is_never_merged_into_results(tmp_path):
    with Record("kernels", tmp_path, tiny=True):
        pass
    assert merge(tmp_path, tmp_path / "results", tiny=False) == [] and not (tmp_path / "results").exists()
