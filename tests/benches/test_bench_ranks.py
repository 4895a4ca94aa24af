"""bench/ranks.py: a row a number of ranks."""

import json

from bench import ranks as bench


def test_other_numbers_of_ranks_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "OUT", tmp_path / "ranks.json")
    for world, seconds in ((2, 1.0), (1, 3.0), (2, 2.0)):
        monkeypatch.setattr(bench.ranks, "world", lambda world=world: world)
        bench.write([("trajectory", 9, 1296, seconds)])
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert {world: entry["rows"][0]["seconds"] for world, entry in found.items()} == {"2": 2.0, "1": 3.0}
    assert found["1"]["rows"] == [dict(what="trajectory", means=9, bytes=1296, seconds=3.0)]
