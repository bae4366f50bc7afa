"""Tests the documentation: its Python runs, and its tables match the code."""

import pathlib
import re
from typing import Any

import pytest
from support.model_directory import byte_tokenizer

from minikv_jax.methods.registry import BUDGETS, METHODS, QUANTIZERS, SCORERS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def python_of(page: pathlib.Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


PAGES = sorted(page for page in DOCS.rglob("*.md") if python_of(page))


def run_page(name: str, model: pathlib.Path | str = "") -> dict[str, Any]:
    """Runs a page's Python with `model` as the demo model, and returns the names it defines."""
    names: dict[str, Any] = {"__name__": name}
    code = python_of(DOCS / name).replace("smollm2-135m-instruct", str(model))
    exec(compile(code, name, "exec", dont_inherit=True), names)
    return names


def test_these_pages_have_python():
    assert [page.name for page in PAGES] == [
        "add-a-method.md",
        "add-a-model-family.md",
        "add-a-task.md",
        "lm-eval.md",
        "memory.md",
        "scale.md",
    ]


def test_a_method_of_ones_own(model_directory: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    names = run_page("add-a-method.md", model_directory)
    assert capsys.readouterr().out.endswith(" tokens per layer\n")
    assert METHODS["my-method"] == names["method"]


def test_a_family_of_ones_own():
    family = run_page("add-a-model-family.md")["FAMILY"]
    assert family.design.qk_norm == "head"
    assert family.fields.model_fields["max_position_embeddings"].default == 32768


def test_a_task_of_ones_own():
    task = run_page("add-a-task.md")["Capitals"](limit=1)
    (case,) = task.cases(byte_tokenizer(), 1024)
    assert (case.name, case.max_new_tokens) == ("France", 8)
    assert byte_tokenizer().decode(list(case.continuation)) == "Paris"
    assert (task.score(case, "It is Paris."), task.score(case, "It is Rome.")) == (1.0, 0.0)


def test_a_language_model_for_the_harness(model_directory: pathlib.Path):
    lm = run_page("lm-eval.md", model_directory)["lm"]
    assert (lm.method.name, lm.batch_size, len(lm.tok_encode("lamp"))) == ("minikv", 8, 4)


def test_a_mesh(model_directory: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    run_page("scale.md", model_directory)
    assert capsys.readouterr().out.startswith("(1, 2, ")


def test_the_bytes_of_a_cache(capsys: pytest.CaptureFixture[str]):
    """The page's Python and `minikv memory` report the same bytes."""
    report, page = run_page("memory.md")["report"], (DOCS / "memory.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{report.bytes:,} of {report.full_bytes:,} bytes\n"
    for label, count in (("allocated in all", report.bytes), ("full cache", report.full_bytes)):
        assert re.search(rf"{label} +{count:,} bytes", page)


def test_the_methods_page_lists_every_method_with_its_paper_and_source():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = {
        match[1]: match[0] for match in re.finditer(r"^\| `([\w-]+)` \|.*\]\(\.\./minikv_jax/.*$", page, re.MULTILINE)
    }
    assert set(rows) == {name for name in METHODS if METHODS.is_built_in(name)}
    for name, row in rows.items():
        (source,) = re.findall(r"\]\(\.\./(minikv_jax/methods/\w+\.py)\)", row)
        assert f'name="{name}"' in (ROOT / source).read_text(encoding="utf-8")
        for number in re.findall(r"arXiv (\d+\.\d+)", METHODS[name].citation)[-1:]:
            assert f"https://arxiv.org/abs/{number}" in row


def test_the_methods_page_lists_every_component():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for registry in (SCORERS, BUDGETS, QUANTIZERS):
        assert [name for name in registry if f"`{name}`" not in page and name != "none"] == []
