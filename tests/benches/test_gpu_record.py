"""What the GPU benchmark keeps of results that are wrong."""

from bench.gpu import attention
from bench.gpu.merge import ratio_line
from bench.gpu.record import Record


def test_what_is_wrong_is_timed_and_marked(tmp_path):
    for error in (0.2, float("nan")):
        with Record("kernels", tmp_path, tiny=True) as record:
            with record.attempt("wrong"):
                record.check("h", error, 0.1)
                record.row(case="wrong")
                record.ratio("wrong", 1.0, 1.0)
            with record.attempt("right"):
                record.check("h", 0.05, 0.1)
                record.row(case="right")
                record.ratio("right", 1.0, 1.0)
        assert [row.get("valid", True) for row in record.content["rows"]] == [False, True]
        assert [ratio["valid"] for ratio in record.content["ratios"]] == [False, True]
        assert "h" in record.failed and "NOT VALID" in ratio_line(record.content["ratios"][0])


def test_attempts_within_another_do_not_hide_what_is_wrong_there(tmp_path):
    with Record("kernels", tmp_path, tiny=True) as record, record.attempt("outer"):
        with record.attempt("wrong within"):
            assert not record.check("a", 0.2, 0.1)
            record.row(case="wrong within")
        record.row(case="outer, nothing wrong yet")
        assert not record.check("b", 0.2, 0.1)
        with record.attempt("right within"):
            assert record.check("c", 0.05, 0.1)
            record.row(case="right within a wrong one")
        record.row(case="outer")
    assert [row.get("valid", True) for row in record.content["rows"]] == [False, True, False, False]


def test_a_wrong_back_end_of_attention_is_timed_marked_and_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "back_ends", lambda tiny: {
        "PyTorch's choice": lambda q, k, v: 2 * attention.sdpa(q, k, v), "flash": attention.sdpa})
    monkeypatch.setattr(Record, "time", lambda self, group, candidates, *_, **__: {
        name: 1e-6 if name == "PyTorch's choice" else 2e-6 for name in candidates})  # the wrong one is faster
    with Record("attention", tmp_path, tiny=True) as record:
        attention.run(record)
    assert {(row["back_end"], row.get("valid", True)) for row in record.content["rows"]} == {
        ("PyTorch's choice", False), ("flash", True)}
    assert record.content["notes"]["fastest"] == "flash"
