"""Tests configurations of the Pallas kernels: what is accepted and recorded, and how the best is found."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import autotune, hopper, tuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tuning.Config):
    width: int = tuning.choice(8, 16, 64, default=16)
    stages: int = tuning.choice(2, 4, default=2)


def _scratch(config: Config, head_dim: int) -> dict[str, Any]:
    return {"ring": jax.ShapeDtypeStruct((config.stages, config.width, 1024), jnp.float32)}


TOY = autotune.Op(
    Config,
    _scratch,
    ({"head_dim": 64}, {"head_dim": 128}),
    lambda head_dim: autotune.Problem(f"H{head_dim}", lambda config: lambda x: x * config.width, (jnp.ones(2),)),
)


def _time(program: Any, x: jax.Array) -> float:
    """Pretends that a width of 8 is fastest."""
    return float(program(x)[0]) / 8


def test_a_value_that_is_not_a_choice_is_named() -> None:
    with pytest.raises(ValueError, match="stages=3: expected 2 or 4"):
        Config(stages=3)


def test_candidates_are_all_combinations() -> None:
    assert {(config.width, config.stages) for config in tuning.candidates(Config)} == {
        (8, 2), (8, 4), (16, 2), (16, 4), (64, 2), (64, 4)
    }  # fmt: skip


def test_tune_times_what_fits_and_returns_the_fastest() -> None:
    record = autotune.tune(TOY, {"head_dim": 128}, _time)
    assert record["config"]["width"] == 8
    assert (record["case"], record["shape"], record["ms"]) == ({"head_dim": 128}, "H128", 1.0)
    tried = {(row["config"]["width"], row["config"]["stages"]) for row in record["tried"]}
    assert tried == {(8, 2), (8, 4), (16, 2)}  # a ring of 64 x 4 KB exceeds shared memory
    assert [row["ms"] for row in record["tried"]] == sorted(row["ms"] for row in record["tried"])


def test_merge_replaces_an_ops_records_of_a_device_and_no_others() -> None:
    def record(op: str, device: str, head_dim: int, ms: float) -> dict[str, Any]:
        return {"op": op, "device": device, "case": {"head_dim": head_dim}, "ms": ms}

    old = [record("a", "x", 64, 1.0), record("a", "x", 128, 1.0), record("a", "y", 64, 1.0), record("b", "x", 64, 1.0)]
    new = [record("a", "x", 64, 2.0)]
    merged = autotune.merge(old, new)
    assert merged == [record("a", "x", 64, 2.0), record("b", "x", 64, 1.0), record("a", "y", 64, 1.0)]


def test_the_winner_of_this_device_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    record = {"op": "toy", "device": "this", "case": {"head_dim": 64}, "config": {"width": 8, "stages": 4}}
    (tmp_path / "tuned.json").write_text(json.dumps([record | {"device": "that", "config": {"width": 64}}, record]))
    monkeypatch.setattr(tuning, "WINNERS", tmp_path / "tuned.json")
    monkeypatch.setattr(hopper, "device_kind", lambda: "this")
    tuning.recorded.cache_clear()
    try:
        assert tuning.winner("toy", Config, head_dim=64) == Config(width=8, stages=4)
        assert tuning.winner("toy", Config, head_dim=128) is None
        assert tuning.winner("other", Config, head_dim=64) is None
        monkeypatch.setattr(hopper, "device_kind", lambda: None)
        assert tuning.winner("toy", Config, head_dim=64) is None
    finally:
        tuning.recorded.cache_clear()


@pytest.mark.parametrize("record", tuning.recorded(), ids=lambda r: f"{r['op']} {r['case']} on {r['device']}")
def test_recorded_winners_are_configs_that_fit_and_the_fastest_tried(record: dict[str, Any]) -> None:
    op = autotune.OPS[record["op"]]
    assert record["case"] in op.cases
    config = op.config(**record["config"])
    hopper.check_shared_memory(op.scratch(config, **record["case"]), config)
    assert record["ms"] == min(row["ms"] for row in record["tried"])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_the_command_says_why_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        autotune.main([])
    assert "need an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_writes_winners(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "OPS", {"toy": TOY})
    autotune.main(["--output", str(tmp_path / "tuned.json")])
    records = json.loads((tmp_path / "tuned.json").read_text())
    assert [record["case"] for record in records] == [{"head_dim": 64}, {"head_dim": 128}]
    assert {record["device"] for record in records} == {hopper.device_kind()}
    assert all(record["ms"] == min(row["ms"] for row in record["tried"]) > 0 for record in records)
