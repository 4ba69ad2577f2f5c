"""The rewards that have a name."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rloo_fast.rewards import RewardError, load_reward_functions
from rloo_fast.rewards.accuracy import accuracy
from rloo_fast.rewards.builtin import completion_text, exact_match, format_think
from rloo_fast.rewards.format import Format
from rloo_fast.verifiers.accuracy import verify
from tests.rewards.gold_answers import GOLDS
from tests.support.rewards import NAN, assert_same, score


def test_completion_text_reads_both_formats():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text("ab") == "ab"
    assert completion_text([{"role": "assistant", "content": "ab"}]) == "ab"
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    assert completion_text([{"role": "assistant", "content": None}]) == ""


def test_completion_text_refuses_other_types():
    with pytest.raises(ValueError, match="string or a list"):
        completion_text(3)


@pytest.mark.parametrize("chat", [False, True], ids=["standard", "conversational"])
def test_exact_match(chat):
    rewards = score("exact_match", {"answer": [" two\n", "3", None]}, chat=chat)
    assert_same(rewards, [[1.0], [0.0], [NAN]])


def test_exact_match_reads_numbers():
    assert exact_match(["72 ", "72.0"], [72, 72]) == [1.0, 0.0]


MATH = [
    (r"so \boxed{\frac{2}{6}}", r"\frac{1}{3}", 1.0),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    ("The final answer is $72$.", "72", 1.0),
    ("no number", "72", 0.0),
    (r"\boxed{4}", "nothing to parse", None),
]


@pytest.mark.parametrize("column", ["solution", "answer"])
@pytest.mark.parametrize("timeout_s", [None, 60.0], ids=["main-thread", "worker-thread"])
def test_accuracy(column, timeout_s):
    pytest.importorskip("math_verify")
    completions, golds, expected = (list(x) for x in zip(*MATH, strict=True))
    rewards = load_reward_functions("accuracy", timeout_s=timeout_s)
    got = rewards(["?"] * 5, completions, [[]] * 5, {column: golds})[:, 0]
    assert_same(got, [NAN if e is None else e for e in expected])


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75", 1.0),
        (r"\boxed{\{3, 1, 2\}}", r"\{1, 2, 3\}", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{1, 2, 3\}", 0.0),
        (r"\boxed{10\text{ cm}}", "10", 1.0),
        (r"\boxed{10\,\mathrm{kg}}", "11", 0.0),
        (r"\boxed{1,234}", 1234, 1.0),
        (r"\boxed{1 + 2\sqrt{3}}", r"2\sqrt{3} + 1", 1.0),
        (r"\boxed{2}", r"2\sqrt{3} + 1", 0.0),
        (r"\boxed{(-\infty, 3]}", r"(-\infty, 3]", 1.0),
        (r"\boxed{3}", r"(-\infty, 3]", 0.0),
        (r"\boxed{50\%}", r"50\%", 1.0),
        (r"\boxed{50}", r"50\%", 1.0),
        (r"\boxed{7}", "With the (3 + 4) apples there are 7", 1.0),
        (r"\boxed{3}", r"so $x = \frac{6}{2}$", 1.0),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
        (r"\boxed{72}", 72.0, 1.0),
        ("the answer is 72", 72, 0.0),
        (r"\boxed{}", 72, 0.0),
        (r"\boxed{7", 7, 0.0),
    ],
)
def test_accuracy_of_boxed_answers(answer, gold, expected):
    pytest.importorskip("math_verify")
    assert accuracy([answer], answer=[gold]) == [expected]


@pytest.mark.parametrize("shape", GOLDS)
def test_accuracy_of_a_gold_letter_for_letter_in_other_forms_and_of_others(shape):
    """A part of the gold earns nothing: a number in it, what it begins with."""
    pytest.importorskip("math_verify")
    for gold, same, others in GOLDS[shape]:
        same_answers = [*(same or []), *([] if is_a_text(gold) else [gold])]
        boxed = [rf"So it is $\boxed{{{answer}}}$." for answer in [*same_answers, *others]]
        expected = [1.0] * len(same_answers) + [0.0] * len(others)
        if same is None:
            expected = [None] * len(boxed)
        got = accuracy(boxed, answer=[gold] * len(boxed))
        assert dict(zip(boxed, got, strict=True)) == dict(zip(boxed, expected, strict=True)), gold


def is_a_text(gold: str) -> bool:
    """A solution, which nobody writes into a box."""
    return "boxed" in gold or "####" in gold or gold.startswith(("The", "With", "so"))


def test_the_gold_answers_are_many():
    golds = [gold for rows in GOLDS.values() for gold, _, _ in rows]
    assert len({*golds}) == len(golds) >= 120


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (r"first \boxed{3}, then \boxed{5}", "5", 1.0),
        (r"first \boxed{3}, then \boxed{5}", "3", 0.0),
        (r"$x=\boxed{3}$ or $x=\boxed{5}$", "3, 5", 0.0),  # words are between them
        (r"\boxed{3} and \boxed{5}", "3, 5", 1.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\fbox{5}", "5", 1.0),
        (r"The final answer is $2n-1$.", "2n-1", 1.0),
        (r"The final answer is $2n-1$.", "1", 0.0),
        (r"Final answer: $3$ or $5$.", "3, 5", 1.0),
        (r"The answer is \(\frac12\).", r"\frac12", 1.0),
        (r"I add $2$ and $3$; it is $5$", "5", 0.0),  # nothing says that this is the answer
        (r"the answer is 5", "5", 0.0),
    ],
)
def test_accuracy_finds_the_answer_of_a_completion(completion, gold, expected):
    pytest.importorskip("math_verify")
    assert accuracy([completion], answer=[gold]) == [expected]


@pytest.mark.parametrize("value", [0.0, None])
def test_an_answer_over_a_limit_costs_itself_alone(value):
    """Outside the main thread, as with vLLM; the gold is not at fault, or it is."""
    pytest.importorskip("math_verify")
    logged = {}
    answers = ["5", "9^{9^{9^{9}}}", "10^{10^{10}}!", "(" * 900 + "5" + ")" * 900, "5"]
    golds = ["5"] * 4 + ["1 " * 4000 + "x"]  # too deep to be read, in time or not

    def call():
        return accuracy(
            [rf"\boxed{{{answer}}}" for answer in answers],
            answer=golds,
            time_limit_s=1.0,
            over_limit_reward=value,
            log_metric=logged.__setitem__,
        )

    with ThreadPoolExecutor(1) as thread:
        rewards = thread.submit(call).result()
    assert rewards[:3] == [1.0, value, value]
    assert rewards[3] in (0.0, 1.0, value)
    assert rewards[4] is None
    assert logged["over_limit"] in (3, 4)


LONG = 1_000_000
SLOW_TEXTS = {
    "boxes": r"\boxed{" * (LONG // 7),
    "joined boxes": r"\boxed{1}, " * (LONG // 11),
    "commas between boxes": r"\boxed{1}" + "," * LONG + r"x\boxed{2}",
    "answers": "answer $" * (LONG // 8),
    "formulas": "the answer is " + r"\(" * (LONG // 2),
    "dollars": "the answer is " + "$" * LONG,
    "braces": r"\boxed{" + "{" * (LONG // 2) + "}" * (LONG // 2 + 1),
    "spaces": r"\boxed{1" + " " * LONG + "a1}",
    "digits": r"\boxed{" + "9" * LONG + "}",
    "words": r"\boxed{" + "so x is " * (LONG // 8) + "}",
}


def test_reading_a_completion_takes_a_time_in_proportion_to_its_length():
    pytest.importorskip("math_verify")
    for name, text in SLOW_TEXTS.items():
        started = time.process_time()
        assert verify("5", text)[0] == 0, name
        assert time.process_time() - started < 5, name


def test_an_error_of_reading_is_a_wrong_answer_and_said():
    pytest.importorskip("math_verify")
    digits = "3" * 1900
    assert verify("5", rf"\boxed{{0.\overline{{{digits * 3}}}}}")[0] == 0.0
    assert verify("5", rf"\boxed{{10^{{4299}}\cdot 0.\overline{{{digits}}}}}")[0] == 0.0


@pytest.mark.parametrize("arguments", [{"time_limit_s": 0}, {"over_limit_reward": "0"}])
def test_limits_of_verifiers_are_checked(arguments):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=r"'accuracy': (time_limit_s|over_limit_reward) must be"):
        accuracy([], answer=[], **arguments)


def test_a_pattern_that_backtracks_without_end_costs_one_completion():
    logged = {}
    form = Format(r"(a+)+b", time_limit_s=0.5, over_limit_reward=None)
    texts = ["aab", "a" * 60, *["b"] * 70, "ab"]
    rewards = form(texts, log_metric=logged.__setitem__)
    assert rewards == [1.0, None, *[0.0] * 70, 1.0]
    assert logged == {"over_limit": 1}


def test_accuracy_equals_trl():
    pytest.importorskip("math_verify")
    trl_rewards = pytest.importorskip("trl.rewards")
    completions, golds, _ = (list(x) for x in zip(*MATH, strict=True))
    chat = [[{"role": "assistant", "content": c}] for c in completions]
    assert accuracy(chat, solution=golds) == trl_rewards.accuracy_reward(chat, golds)


def test_accuracy_skips_samples_without_a_gold_and_logs_what_it_read():
    pytest.importorskip("math_verify")
    logged = {}
    assert accuracy(
        [r"\boxed{4}", r"\boxed{4}"], solution=[4, None], log_extra=logged.__setitem__
    ) == [1.0, None]
    assert logged == {"gold": ["4", ""], "parsed_answer": ["4", "4"]}


def test_accuracy_needs_a_gold_column():
    pytest.importorskip("math_verify")
    with pytest.raises(RewardError, match="`solution` or `answer`"):
        score("accuracy")


def test_accuracy_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        accuracy(["4"], solution=["4"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n42", 1.0),
        ("\n<think></think>42\n", 1.0),
        ("<think>a</think> \n", 0.0),
        ("a <think>b</think>42", 0.0),
        ("<think>a 42", 0.0),
        ("a</think>42", 0.0),
        ("<think>a<think>b</think>42", 0.0),
        ("<think>a</think>b</think>42", 0.0),
        ("</think>42<think>", 0.0),
    ],
)
def test_format_think(text, expected):
    assert format_think([text, [{"role": "assistant", "content": text}]]) == [expected] * 2


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"<a>.*</a>", " <a>one\ntwo</a>\n", 1.0),
        (r"<a>.*</a>", "<a>one</a> two", 0.0),
        (r"Answer: \d+", "Answer: 42", 1.0),
        (r"Answer: \d+", "So. Answer: 42", 0.0),
        ("", "  ", 1.0),
    ],
)
def test_format(pattern, text, expected):
    chat = [{"role": "assistant", "content": text}]
    assert Format(pattern)([text, chat]) == [expected] * 2


def test_a_format_that_is_no_regular_expression_is_refused_at_load():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        load_reward_functions("format", reward_kwargs={"format": {"pattern": "("}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"target": 2}, [0.0, 0.0, -0.5, -1.0, -1.0]),
        ({"target": 2, "limit": 6}, [0.0, 0.0, -0.25, -0.5, -1.0]),
        ({"target": 0, "limit": 10}, [0.0, -0.2, -0.3, -0.4, -0.9]),
    ],
)
def test_length(given, expected):
    ids = [[5] * n for n in (0, 2, 3, 4, 9)]
    rewards = load_reward_functions("length", reward_kwargs={"length": given})
    assert rewards.names == ["length"]
    got = rewards(["p"] * 5, ["c"] * 5, ids, {})[:, 0]
    torch.testing.assert_close(got, torch.tensor(expected))
