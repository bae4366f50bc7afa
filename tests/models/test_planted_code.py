"""Tests that no file of a checkpoint is imported or run, whatever the checkpoint or the user says."""

import pathlib

from support.planted import watched, write_sources


def test_no_code_of_a_checkpoint_is_run(tmp_path: pathlib.Path):
    """All four ways to load are tried, with consent on stdin. The control shows that a run would be detected."""
    marker = tmp_path / "marker"
    known = write_sources(tmp_path / "known", marker, "PreTrainedTokenizerFast")
    unknown = write_sources(tmp_path / "unknown", marker, "PlantedTokenizer")
    found = watched(tmp_path, known + unknown[:2], tmp_path / "known" / "hub", stdin="y\nyes\n")
    assert found["ours"] == {"seen": [], "modules": [], "marker": False}
    assert "custom code" not in found["stderr"]
    assert found["stderr"].count("kept per layer") == 2, "both lines of the standard input are messages"
    assert len(found["errors"]) == 2
    assert all("auto_map names code of the checkpoint, which is never run" in error for error in found["errors"])
    control = found["control"]
    assert control["marker"]
    assert any(name.endswith("planted") for name in control["modules"])
    assert any(event.startswith("exec ") and event.endswith("planted.py") for event in control["seen"])
