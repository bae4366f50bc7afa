"""Tests the tasks' cases and scores without a model, and one task through the command."""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from support.model_directory import byte_tokenizer
from support.tiny import tiny_model

from minikv_jax.evaluation import Case, Evaluator
from minikv_jax.evaluation.task import fill
from minikv_jax.evaluation.tasks import TASKS, metrics
from minikv_jax.evaluation.tasks.cases import Cases
from minikv_jax.evaluation.tasks.gsm8k import GSM8K
from minikv_jax.evaluation.tasks.infinitebench import InfiniteBench
from minikv_jax.evaluation.tasks.kv_retrieval import KVRetrieval
from minikv_jax.evaluation.tasks.longbench import LongBench
from minikv_jax.evaluation.tasks.longeval import LongEval
from minikv_jax.evaluation.tasks.multi_question import MultiQuestion
from minikv_jax.evaluation.tasks.needle import Needle
from minikv_jax.evaluation.tasks.number_string import NumberString
from minikv_jax.evaluation.tasks.passkey import Passkey
from minikv_jax.evaluation.tasks.perplexity import Perplexity, book_windows
from minikv_jax.evaluation.tasks.retrieval import Retrieval
from minikv_jax.evaluation.tasks.variable_tracking import VariableTracking
from minikv_jax.evaluation.tasks.word_extraction import CommonWordsExtraction

TOKENIZER = byte_tokenizer()
GENERATED = [Needle, Passkey, NumberString, KVRetrieval, LongEval]


def text(case: Case) -> str:
    return str(TOKENIZER.decode(list(case.prompt)))


def answer(case: Case) -> str:
    return str(TOKENIZER.decode(list(case.continuation)))


@pytest.mark.parametrize("task", GENERATED)
def test_generated_cases_fill_the_context_and_hide_the_fact_at_its_depth(task: type[Retrieval]):
    cases = task(context=(900, 1500), samples=2).cases(TOKENIZER, 2000)
    assert len(cases) == 2 * 2 * 5
    assert len({case.name for case in cases}) == len({case.prompt for case in cases}) == len(cases)
    for case in cases:
        context, depth = case.tags["context"], case.tags["depth"]
        assert context - 120 < len(case.prompt) <= context
        assert text(case).startswith("<|user|>")
        (reference,) = case.answers
        before, _, after = text(case).partition(reference)
        assert before
        assert after
        if depth in (0.0, 1.0):  # words of facts and question do not occur in the filler
            assert (len(before) < 300) if depth == 0 else (len(after) < 300)
        else:
            assert abs(len(before) / len(text(case)) - depth) < 0.25
        assert reference in answer(case)
        assert case.max_new_tokens > len(case.continuation)


@pytest.mark.parametrize("task", GENERATED)
def test_generated_cases_are_a_function_of_the_seed(task: type[Retrieval]):
    first, same, other = (task(context=(900,), seed=seed).cases(TOKENIZER, 2000) for seed in (0, 0, 1))
    assert first == same
    assert all(a.answers != b.answers for a, b in zip(first, other, strict=True))
    assert task(context=(900,), limit=3).cases(TOKENIZER, 2000) == first[:3]
    plain = task(context=(900,), chat_template=False).cases(TOKENIZER, 2000)[0]
    assert "<|user|>" not in text(plain)


def test_needles_of_each_kind():
    multikey = Needle(kind="multikey", needles=5, context=(1500,)).cases(TOKENIZER, 2000)[2]
    facts = [line for line in text(multikey).split(".") if "special number of" in line and " is " in line]
    assert len(facts) >= 5
    assert sum(multikey.answers[0] in fact for fact in facts) == 1

    multivalue = Needle(kind="multivalue", needles=3, context=(1500,)).cases(TOKENIZER, 2000)[2]
    assert len(multivalue.answers) == 3
    places = [text(multivalue).index(value) for value in multivalue.answers]
    assert places == sorted(places)
    assert answer(multivalue) == " " + ", ".join(multivalue.answers)
    task = Needle(kind="multivalue")
    assert task.score(multivalue, f"{multivalue.answers[0]} and {multivalue.answers[2]}") == pytest.approx(2 / 3)


@pytest.mark.parametrize("chat", [True, False])
def test_questions_about_one_text_share_its_tokens(chat: bool):
    """The same tokens whether the questions are compressed or not, and a number and a question for every depth."""
    task = MultiQuestion(context=(1100,), depths=(0.1, 0.5, 0.9), samples=2, chat_template=chat)
    cases = task.cases(TOKENIZER, 2000)
    aware = dataclasses.replace(task, query_aware=True).cases(TOKENIZER, 2000)
    assert [case.name for case in cases] == [case.name for case in aware]
    assert len(cases) == 2 * 3
    assert len({case.prompt for case in cases}) == 2
    for case, known in zip(cases, aware, strict=True):
        assert case.prompt + case.question == known.prompt
        assert known.question == ()
        assert 950 < len(known.prompt) <= 1100
        before, _, after = text(case).partition(case.answers[0])
        assert abs(len(before) / len(text(case)) - case.tags["depth"]) < 0.15
        assert after
        key = re.findall(r"number of ([\w-]+) is $", before)[0]
        question = str(TOKENIZER.decode(list(case.question)))
        assert question.startswith(f"What is the special number of {key} that")
        assert question.endswith(f"The special number of {key} is")
        assert answer(case) == f" {case.answers[0]}"
        assert task.score(case, f"It is {case.answers[0]}.") == 1.0
    assert len({case.answers for case in cases}) == 6


@pytest.mark.parametrize("chat", [True, False])
def test_variables_are_tracked_through_their_chain(chat: bool):
    """Every chain stands in the text, in order, and the answers are the variables of the one that is asked for."""
    task = VariableTracking(context=(900, 1400), samples=2, chains=3, hops=2, chat_template=chat)
    cases = task.cases(TOKENIZER, 2000)
    assert [case.tags["context"] for case in cases] == [900, 1400] * 2
    assert len({case.prompt for case in cases}) == len({case.name for case in cases}) == 4
    for case in cases:
        assert case.tags["context"] - 120 < len(case.prompt) + len(case.question) <= case.tags["context"]
        values: dict[str, str] = {}
        for name, _, source in re.findall(r"VAR (\w+) = (VAR )?(\w+)\.", text(case)):
            assert name not in values
            values[name] = str(values.get(source, source))  # a variable's assignment stands before its use
        assert sorted(collections.Counter(values.values()).values()) == [3, 3, 3]
        question = str(TOKENIZER.decode(list(case.question)))
        (value,) = set(re.findall(r"\d{5}", question))
        assert question.endswith(f"The variables with the value {value} are VAR")
        assert case.answers == tuple(name for name in values if values[name] == value)
        assert answer(case) == " " + ", VAR ".join(case.answers)
        assert case.max_new_tokens == len(case.continuation) + 3 * 8
        assert task.score(case, f"{case.answers[2]}, {case.answers[0].lower()}, XXXXX") == pytest.approx(2 / 3)


def test_common_words_are_those_that_the_list_has_most_often():
    """The list is as long as the context allows: another word would not fit."""
    task = CommonWordsExtraction(context=(700, 1500), samples=2, words=3, frequency=9, other_frequency=2)
    cases = task.cases(TOKENIZER, 2000)
    assert len({case.prompt for case in cases}) == len(cases) == 4
    for case in cases:
        room = case.tags["context"] - len(case.prompt) - len(case.question)
        assert 0 <= room < 2 * len("100. bababa ")
        listed = re.findall(r"(\d+)\. ([a-z]+)", text(case))
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = collections.Counter(word for _, word in listed)
        assert {word for word, _ in counts.most_common(3)} == set(case.answers)
        assert sorted(counts.values(), reverse=True) == [9] * 3 + [2] * (len(counts) - 3)
        assert len(counts) > 3
        assert [word for _, word in listed] != sorted(word for _, word in listed)
        assert answer(case) == " " + ", ".join(case.answers)
        assert task.score(case, f"{case.answers[0]} and {case.answers[1]}") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "task", [VariableTracking(context=(900,)), CommonWordsExtraction(context=(900,), words=2, frequency=8)]
)
def test_texts_and_their_questions_are_a_function_of_the_seed(task: VariableTracking | CommonWordsExtraction):
    """With the question or without it, the tokens are the same."""
    (first,), (same,) = task.cases(TOKENIZER, 2000), task.cases(TOKENIZER, 2000)
    (other,) = dataclasses.replace(task, seed=1).cases(TOKENIZER, 2000)
    (aware,) = dataclasses.replace(task, query_aware=True).cases(TOKENIZER, 2000)
    assert first == same
    assert other.answers != first.answers
    assert aware.prompt == first.prompt + first.question
    assert aware.question == ()
    assert (aware.continuation, aware.answers) == (first.continuation, first.answers)


def test_needles_in_a_text_of_ones_own(tmp_path: pathlib.Path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence {number} of the book." for number in range(200)))
    case = Needle(haystack=book, context=(800,)).cases(TOKENIZER, 2000)[2]
    assert "of the book. The special number of" in text(case)
    book.write_text("Too short.")
    with pytest.raises(ValueError, match="haystack is too short to fill 800 tokens"):
        Needle(haystack=book, context=(800,)).cases(TOKENIZER, 2000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "many"}, "kind='many': expected one of single, multikey, multivalue"),
        ({"context": (3000,)}, "context=3000 exceeds the model's 2000 positions"),
        ({"context": (50,)}, "context=50: the question alone has more tokens"),
        ({"depths": (1.5,)}, "depths="),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Needle(context=(900,)), **fields).cases(TOKENIZER, 2000)


def test_common_words_without_room_are_refused():
    message = "context=900: words=10 of frequency=30 leave no room for another word"
    with pytest.raises(ValueError, match=message):
        CommonWordsExtraction(context=(900,)).cases(TOKENIZER, 2000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: Needle(kind="many"), "kind='many'"),
        (lambda _: Needle(needles=0), "needles=0: expected at least 1"),
        (lambda path: Needle(haystack=path / "none"), "none does not exist"),
        (lambda _: VariableTracking(chains=0), "chains=0: expected at least 1"),
        (lambda _: VariableTracking(hops=0), "hops=0: expected at least 1"),
        (lambda path: VariableTracking(haystack=path / "none"), "none does not exist"),
        (lambda _: CommonWordsExtraction(words=0), "words=0: expected at least 1"),
        (lambda _: CommonWordsExtraction(words=10**6), "words=1000000: expected at most 171500"),
        (lambda _: CommonWordsExtraction(other_frequency=0), "other_frequency=0: expected at least 1"),
        (lambda _: CommonWordsExtraction(frequency=3), "frequency=3: expected at least 4"),
        (lambda _: Passkey(limit=0), "limit=0: expected at least 1"),
        (lambda path: Perplexity(text=path / "none"), "none does not exist"),
        (lambda _: Perplexity(text=pathlib.Path(__file__), continuation=0), "continuation=0: expected at least 1"),
        (lambda path: Cases(data=path / "none"), "none does not exist"),
        (lambda path: GSM8K(data=path), "lacks test.jsonl, train.jsonl"),
        (lambda path: GSM8K(data=path, shots=-1), "shots=-1: expected at least 0"),
        (lambda path: LongBench(data=path), "has none of narrativeqa.jsonl"),
        (lambda path: InfiniteBench(data=path), "lacks prompts.json"),
    ],
)
def test_options_are_checked_when_a_task_is_made(
    tmp_path: pathlib.Path, make: Callable[[pathlib.Path], Any], message: str
):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        make(tmp_path)


def write_rows(path: pathlib.Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def longbench(tmp_path: pathlib.Path) -> pathlib.Path:
    prompts = {"qasper": "Read: {context}\nQ: {input}\nA:", "trec": "{context}\n{input}", "lcc": "{context}Next:\n"}
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(prompts))
    row = {"context": "x" * 3000, "input": "why?", "answers": ["so", "the reason"], "all_classes": None, "_id": "a"}
    write_rows(tmp_path / "qasper.jsonl", row | {"context": "short"}, row)
    write_rows(tmp_path / "trec_e.jsonl", row | {"answers": ["Food"], "all_classes": ["Food", "Other food"]})
    write_rows(tmp_path / "lcc.jsonl", {"prompt": "a = 1\nNext:\n", "answers": ["b = 2"], "id": "b"})
    return tmp_path


def test_longbench_prompts_templates_and_truncation(longbench: pathlib.Path):
    short, long, code = LongBench(data=longbench, context=300).cases(TOKENIZER, 1024)
    assert text(short) == "<|user|>Read: short\nQ: why?\nA:<|end|>\n<|assistant|>"
    assert answer(short) == "so"
    assert short.max_new_tokens == 128
    assert len(long.prompt) == 300
    assert text(long).startswith("<|user|>Read: xxx")
    assert text(long).endswith("xxx\nQ: why?\nA:<|end|>\n<|assistant|>")
    assert text(code) == "a = 1\nNext:\n"  # code has no chat template
    assert answer(code) == "b = 2"
    assert (code.name, code.group) == ("lcc b", "lcc")

    (few,) = LongBench(data=longbench, e=True, context=100).cases(TOKENIZER, 1024)
    assert few.tags == {"classes": ["Food", "Other food"]}
    longest = LongBench(data=longbench, limit=2, datasets=("qasper",)).cases(TOKENIZER, 1024)[1]
    assert len(longest.prompt) == 1024 - 128


def test_longbench_scores(longbench: pathlib.Path):
    task = LongBench(data=longbench)
    qa = Case("", (1,), answers=("so", "the reason"), group="qasper")
    assert task.score(qa, "A reason, it is") == pytest.approx(2 * 1 / (3 + 1))
    few = Case("", (1,), answers=("Food",), group="trec", tags={"classes": ["Food", "Place"]})
    assert task.score(few, "\nFood\nPlace") == 1
    assert task.score(few, "Food Place") == 0.5
    code = Case("", (1,), answers=("b = 2",), group="lcc")
    assert task.score(code, "# two\nb = 2") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"datasets": ("hotpotqa",)}, "lacks hotpotqa.jsonl: they come from the LongBench repository"),
        ({"datasets": ("dureader",)}, "dataset 'dureader': expected one of narrativeqa"),
        ({"data": "nosuch"}, "has none of narrativeqa.jsonl"),
        ({"datasets": ("qasper",), "context": 1000}, "context=1000: beside the answer .* room for 896"),
    ],
)
def test_longbench_errors_say_what_is_wanted(longbench: pathlib.Path, fields: dict[str, Any], message: str):
    if "data" in fields:
        fields = fields | {"data": longbench / fields["data"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataclasses.replace(LongBench(data=longbench), **fields).cases(TOKENIZER, 1024)


def test_longbench_rows_are_checked(longbench: pathlib.Path):
    row = {"context": "x", "input": "y", "answers": ["y"]}
    few = {**row, "answers": ["Food"]}
    for rows, message in (
        (
            {"context": "x", "answers": ["y"]},
            "qasper.jsonl, line 1: lacks input: expected context and input, or prompt",
        ),
        ({"prompt": "x", "answers": []}, "qasper.jsonl, line 1: answers is []; accepted: at least 1 items"),
        ({"prompt": "x"}, "qasper.jsonl, line 1 lacks answers"),
        (row | {"answers": "y"}, "qasper.jsonl, line 1: answers is 'y'; accepted: a list"),
        (row | {"answers": [5]}, "qasper.jsonl, line 1: answers[0] is 5; accepted: text"),
        (row | {"context": None}, "qasper.jsonl, line 1: context is None; accepted: text"),
        (row | {"context": ""}, "qasper.jsonl, line 1: context is ''; accepted: text of at least 1 characters"),
        (row | {"input": "\ud800"}, r"qasper.jsonl, line 1: '\ud800' is half a character"),
        (row | {"_id": [1]}, "qasper.jsonl, line 1: _id is [1]; accepted: text or an integer"),
        (row | {"all_classes": {}}, "qasper.jsonl, line 1: all_classes is {}; accepted: a list"),
    ):
        write_rows(longbench / "qasper.jsonl", rows)
        with pytest.raises(ValueError, match=re.escape(message)):
            LongBench(data=longbench)
    write_rows(longbench / "trec_e.jsonl", few)
    with pytest.raises(ValueError, match=r"trec_e.jsonl, line 1: all_classes is None; accepted: a list of the classes"):
        LongBench(data=longbench, e=True)
    write_rows(longbench / "qasper.jsonl", row)
    for templates, message in (
        ({"qasper": 5}, "dataset2prompt.json: qasper is 5; accepted: text"),
        ({"qasper": "Read: {text}"}, "dataset2prompt.json: qasper is 'Read: {text}'; accepted: a text with {context}"),
        ({}, "dataset2prompt.json lacks qasper"),
    ):
        (longbench / "dataset2prompt.json").write_text(json.dumps(templates))
        with pytest.raises(ValueError, match=re.escape(message)):
            LongBench(data=longbench)
    (longbench / "dataset2prompt.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks dataset2prompt.json"):
        LongBench(data=longbench)


def test_cases_of_one_name_are_refused(longbench: pathlib.Path):
    """Names identify the rows of a sweep."""
    row = {"prompt": "x", "answers": ["y"], "id": "same"}
    write_rows(longbench / "qasper.jsonl", row, row)
    task = LongBench(data=longbench, datasets=("qasper",))
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    with pytest.raises(ValueError, match="2 cases have the name 'qasper same': expected one of each name"):
        Evaluator.create(model, TOKENIZER, task)


def test_infinitebench(tmp_path: pathlib.Path):
    prompts = {"passkey": "{context}\n{input}", "longbook_choice_eng": "{context} {question} {OPTION_A} {OPTION_B}"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    write_rows(tmp_path / "passkey.jsonl", {"id": 7, "context": "x" * 900, "input": "key?", "answer": ["123"]})
    row = {"context": "book", "input": "who?", "answer": ["Bob"], "options": ["Ann", "Bob", "Cat", "Dan"]}
    write_rows(tmp_path / "longbook_choice_eng.jsonl", row)
    task = InfiniteBench(data=tmp_path, datasets=("passkey", "longbook_choice_eng"), context=500)
    key, choice = task.cases(TOKENIZER, 1024)
    assert len(key.prompt) == 500
    assert text(key).endswith("key?<|end|>\n<|assistant|>")
    assert (key.name, key.max_new_tokens, key.answers) == ("passkey 7", 6, ("123",))
    assert "book who? Ann Bob<|end|>" in text(choice)
    assert (choice.answers, answer(choice)) == (("B",), "B")
    assert task.score(key, "It is 123, not 45") == 1
    assert task.score(key, "45 or 123") == 0
    assert task.score(choice, "The answer is B. Bob") == 1
    with pytest.raises(FileNotFoundError, match=r"lacks kv_retrieval.jsonl: the data come from"):
        dataclasses.replace(task, datasets=("kv_retrieval",))
    for changes, message in (
        ({"answer": ["Eve"]}, "longbook_choice_eng.jsonl, line 1: answer is 'Eve'; accepted: one of the options"),
        ({"options": ["Ann", "Bob"]}, "line 1: options is ['Ann', 'Bob']; accepted: a list of 4 texts"),
        ({"options": None}, "line 1: options is None; accepted: a list of 4 texts"),
        ({"options": [1, 2, 3, 4]}, "line 1: options[0] is 1; accepted: text (and 3 more)"),
        ({"answer": []}, "line 1: answer is []; accepted: text or an integer or at least 1 items"),
        ({"answer": 1.5}, "line 1: answer is 1.5; accepted: text or an integer or a list"),
        ({"input": 3}, "line 1: input is 3; accepted: text"),
    ):
        write_rows(tmp_path / "longbook_choice_eng.jsonl", row | changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            dataclasses.replace(task)
    (tmp_path / "prompts.json").write_text(json.dumps({"passkey": "{context}"}))
    with pytest.raises(ValueError, match=r"prompts.json lacks longbook_choice_eng"):
        dataclasses.replace(task)


def test_what_is_filled_in_is_not_filled_again():
    assert fill("{context} {input} {other}", {"context": "a {input}", "input": "b"}) == "a {input} b {other}"


def test_gsm8k(tmp_path: pathlib.Path):
    solved = {"question": "1+1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}
    write_rows(tmp_path / "train.jsonl", solved, solved)
    write_rows(tmp_path / "test.jsonl", {"question": "500*2?", "answer": "Double.\n#### 1,000"})
    task = GSM8K(data=tmp_path, shots=1, max_new_tokens=20)
    (case,) = task.cases(TOKENIZER, 1024)
    expected = "Question: 1+1?\nAnswer: It is 1+1=2.\n#### 2\n\nQuestion: 500*2?\nAnswer:"
    assert text(case) == f"<|user|>{expected}<|end|>\n<|assistant|>"
    assert answer(case) == "Double.\n#### 1,000"
    assert case.answers == ("1000",)
    assert task.score(case, "So\n#### 1000\nQuestion: 3?\n#### 7") == 1
    assert task.score(case, "500 twice is 1,000.") == 1
    assert task.score(case, "1000.50") == 0
    assert task.score(case, "$1,000.00") == 1
    million = dataclasses.replace(case, answers=("1234567",))
    assert task.score(million, "#### 1,234,567.0") == 1
    assert task.score(million, "#### 1,234,567.5") == 0
    assert task.score(case, "none") == 0
    with pytest.raises(ValueError, match=r"train.jsonl has 2 rows: shots=3"):
        dataclasses.replace(task, shots=3).cases(TOKENIZER, 1024)
    for row, message in (
        ({"question": "?", "answer": "5"}, "test.jsonl, line 1: answer is '5'; accepted: text with '#### NUMBER'"),
        ({"question": 5, "answer": "#### 5"}, "test.jsonl, line 1: question is 5; accepted: text"),
        ({"question": "?"}, "test.jsonl, line 1 lacks answer"),
    ):
        write_rows(tmp_path / "test.jsonl", row)
        with pytest.raises(ValueError, match=re.escape(message)):
            dataclasses.replace(task)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test.jsonl: they come from the grade-school-math"):
        dataclasses.replace(task)


def test_metrics_by_hand():
    assert metrics.qa_f1("The cat sat.", "a cat, sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert metrics.qa_f1("", "x") == 0
    assert metrics.rouge_l("the cat sat on it", "the dog sat") == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))
    assert metrics.rouge_l(" .", "x") == 0
    assert metrics.code_similarity("`x`\nabcd", "abce") == 0.75
    assert metrics.classification("Group of people", "Group of people", ["Group", "Group of people", "City"]) == 1
    assert metrics.share_of_numbers("3 or 4", "4") == 0.5
    assert metrics.paragraph("It is Paragraph 12", "Paragraph 12") == 1
    assert metrics.paragraph("12", "none") == 0
    assert metrics.first_number("key 12 or 13", "12") == 1
    assert metrics.has_word('"ab-1", sir', "ab-1") == 1
    assert metrics.choice("I say C", "C") == 1
    assert metrics.choice("ABCD", "A") == 0


def test_every_file_of_tasks_that_defines_one_is_a_task():
    files = {path.stem for path in pathlib.Path(metrics.__file__).parent.glob("*.py")}
    assert {task.__module__.rsplit(".", 1)[1] for task in TASKS.values()} == files - {
        "__init__",
        "kvpress_metrics",
        "metrics",
        "retrieval",
    }
    assert all(task.name == name for name, task in TASKS.items())


def test_every_task_is_in_the_documentation():
    page = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"
    documented = page.read_text(encoding="utf-8")
    assert [name for name in TASKS if f"`{name}`" not in documented] == []


def test_windows_do_not_overlap():
    windows = book_windows(range(100), prompt=20, continuation=5, count=4)
    assert [prompt[0] for prompt, _ in windows] == [0, 25, 50, 75]
    assert all(continuation == list(range(p[0] + 20, p[0] + 25)) for p, continuation in windows)
    with pytest.raises(ValueError, match="100 tokens: 5 windows of 25 need 125"):
        book_windows(range(100), prompt=20, continuation=5, count=5)
    with pytest.raises(ValueError, match="count=0"):
        book_windows(range(100), prompt=20, continuation=5, count=0)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of jieba, where it is compiled
def test_code_is_scored_as_the_harness_scores_it():
    from lm_eval.tasks.longbench.metrics import code_sim_score

    reference = "        if (projectID==null || issueTypeID==null) {"
    for text in ("\n    if (issueTypeID == null) {\n    }", "# a comment\nreturn projectID;", reference):
        assert metrics.code_similarity(text, reference) == pytest.approx(code_sim_score(text, reference))
