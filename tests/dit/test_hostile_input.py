"""Files and arguments from outside are refused by name: some of the campaigns of tests/fuzz, and what they found."""

import argparse
import json
import pickle
import re
import zipfile
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fuzz import arguments, files
from fuzz.__main__ import read, table
from fuzz.mutate import Payload, Tensors
from harmonica_dit.files import load_tensors
from harmonica_dit.load import read_checkpoint
from harmonica_dit.published_routers import load_published_router


@pytest.mark.parametrize("name", files.TARGETS)
def test_a_few_changed_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, random, whole, path = files.TARGETS[name], Random(name), files.corpus(name), tmp_path
    past = []
    for _ in range(25 if name == "csv" else 100):
        path = tmp_path / target.file
        path.write_bytes(target.change(random.choice(whole), random))
        past.append(target(path).past)
    assert sum(past) > len(past) / 2, "most files have to get past the first check"


@pytest.mark.parametrize("name", arguments.TARGETS)
def test_a_few_arguments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, strategy = arguments.TARGETS[name]
    few = settings(max_examples=60, deadline=None, database=None, phases=[Phase.generate],
                   suppress_health_check=list(HealthCheck))
    few(given(strategy)(lambda drawn: run(drawn) and None))()


def changed(name: str, change, tmp_path):
    """What becomes of a target's file, by default the first one, after a change of its content."""
    name, _, file = name.partition("/")
    target, path = files.TARGETS[name], tmp_path / files.TARGETS[name].file
    data = (files.CORPUS / name / f"{file}.safetensors").read_bytes() if file else files.corpus(name)[0]
    content = json.loads(data) if path.suffix == ".json" else Tensors(data)
    change(content)
    path.write_bytes(json.dumps(content).encode() if path.suffix == ".json" else content.pack())
    return str(target(path).error)


def metadata(**values):
    return lambda content: content.metadata.update(values)


@pytest.mark.parametrize("name, change, words", [
    ("router", metadata(model="\ud800"), "surrogates not allowed"),
    ("router", lambda content: Tensors.resize(content.tensors["logits"], "F32", [1001, 4]), "got 1001 steps"),
    ("forecast", metadata(forecaster=[]), "forecaster: got .*, expected its settings"),
    ("forecast", metadata(forecaster={"order": 1.0}), "order: got 1.0"),
    ("forecast/learned", metadata(forecaster={"size": None, "origin": ""}), "forecaster.size"),
    ("forecast/learned", metadata(forecaster={"size": 10**400, "origin": ""}), "forecaster.size"),
    ("forecast/learned", metadata(forecaster={"size": 1, "origin": 5}), "forecaster.origin"),
    ("prompts", metadata(texts=["a", 5]), "is no text"), ("prompts", metadata(model=None), "is no text"),
    ("encoded", metadata(about=5), "not a whole file of encoded prompts"),
    ("encoded", metadata(entries={"a": {"tensor": "9"}}), "not a whole file of encoded prompts"),
    ("encoded", metadata(entries={"a": {"tuple": 5}}), "not a whole file of encoded prompts"),
    ("training", lambda content: Tensors.resize(content.tensors["optimizer.0.step"], "BOOL", []), "optimizer: step is"),
    ("samples", metadata(labels=5), "no whole batch"), ("samples", metadata(seconds="a"), "no whole batch"),
    ("samples", lambda content: content.tensors.clear(), "no whole batch"),
    ("samples", lambda content: Tensors.resize(content.tensors["images"], "F32", [2, 1, 5, 4]), "no whole batch"),
    ("reference", metadata(count=None), "no reference: of None images"),
    ("reference", lambda content: Tensors.resize(content.tensors["covariance"], "F64", [3, 2]), "its covariance"),
    ("reference", lambda content: Tensors.resize(content.tensors["kept"], "F16", [4, 2]), "it keeps"),
    ("costs", lambda content: content.update(fixed=10**400), "finite numbers"),
    ("costs", lambda content: content.update(fixed=0, branches=[0] * 4), "not all 0"),
])
def test_what_the_campaigns_found_in_files(name, change, words, tmp_path):
    assert re.search(words, changed(name, change, tmp_path))


@pytest.mark.parametrize("shape", [[0, 1 << 63], [0, 3, 1 << 62, 5]])
def test_a_shape_beyond_64_bits(shape, tmp_path):
    header = json.dumps({"a": dict(dtype="F32", shape=shape, data_offsets=[0, 0])}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="a.safetensors is not a whole safetensors file"):
        load_tensors(tmp_path / "a.safetensors")


def test_json_that_is_too_deep_is_no_table_of_seconds(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="costs.json is no table of seconds"):
        files.Seconds.load(path)


@pytest.mark.parametrize("line", ["a,b", "1,2", "nan" + ",0.5" * 8, "1e300" + ",0.5" * 8, "\xff", "1.5" + ",0.5" * 8])
def test_a_log_that_is_none(line, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(files.corpus("csv")[0].splitlines(keepends=True)[0] + line.encode("latin-1") + b"\r\n")
    with pytest.raises(ValueError, match="log.csv is no log of a training"):
        files.read_log(path)


def rewrite(path, change=lambda name, content: content, kept=zipfile.ZIP_STORED):
    """Writes an archive once more, each record as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kept) as archive:
        for name, content in found.items():
            archive.writestr(name, change(name, content))


def test_a_checkpoint_cannot_ask_for_memory(tmp_path):
    """torch's safe reader would take all three."""
    path, tensor = tmp_path / "r.pt", torch.zeros(1 << 16)

    def check_refusal(words):
        with pytest.raises(ValueError, match=f"r.pt is not a checkpoint of plain tensors.*{words}"):
            read_checkpoint(path)

    torch.save(tensor, path)
    rewrite(path, kept=zipfile.ZIP_DEFLATED)
    check_refusal("records are larger")
    torch.save(tensor, path, _use_new_zipfile_serialization=False)
    check_refusal("no archive")
    torch.save({}, path)
    rewrite(path, lambda name, content: pickle.dumps(Payload("bytearray"), 2) if "data.pkl" in name else content)
    check_refusal("bytearray")


def test_settings_that_hold_themselves(tmp_path):
    """Their repr would not end."""
    settings = argparse.Namespace(model="DiT-XL/2")
    settings.image_size = settings
    torch.save({"routers": {f"{i}.prob": torch.zeros(56) for i in range(2)}, "args": settings}, tmp_path / "r.pt")
    with pytest.raises(ValueError, match="r.pt: was made for the model 'DiT-XL/2' at Namespace pixels"):
        load_published_router(tmp_path / "r.pt")


def test_the_page_has_the_campaigns_figures(pytestconfig):
    assert table(read()) in (pytestconfig.rootpath / "docs" / "reliability.md").read_text()
