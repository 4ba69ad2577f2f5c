"""Which completions a run shows, and what is said of them."""

import pytest

from rloo_fast.records import CompletionTexts
from rloo_fast.reports.samples import Samples, heading


def texts(*completions, prompts=None, **extra):
    n = len(completions)
    return CompletionTexts(prompts or ["p"] * n, [*completions], {"score": [0.5] * n}, extra)


def add(samples, mode, batch, step, advantages=None):
    samples.add(mode, batch, step)
    samples.add_advantages(mode, advantages or [1.0] * len(batch.completions))


def marks(frame):
    names = ["step", "mode", "sampled_after_step", "row", "num_rows"]
    assert list(frame.columns)[:5] == names
    return frame[names].to_numpy().tolist()


def test_training_shows_the_newest_generation_batch():
    samples = Samples(unique_prompts=False)
    add(samples, "train", texts("a", "b"), step=0)
    add(samples, "train", texts("c", "d"), step=1)
    frame = samples.take("train", step=2)
    assert frame["completion"].tolist() == ["c", "d"]
    assert marks(frame) == [[2, "train", 1, 0, 2], [2, "train", 1, 1, 2]]


def test_samples_of_training_are_taken_once():
    """Later steps of the same generation batch, and a user's own log, would repeat them."""
    samples = Samples(unique_prompts=False)
    add(samples, "train", texts("a"), step=0)
    assert samples.take("train", step=1) is not None
    assert samples.take("train", step=2) is None


def test_an_evaluation_shows_rows_of_all_its_batches():
    samples = Samples(unique_prompts=False)
    add(samples, "eval", texts("a", "b"), step=4)
    add(samples, "eval", texts("c", note=["n"]), step=4)
    frame = samples.take("eval", step=4)
    assert frame["completion"].tolist() == ["a", "b", "c"]
    assert frame["note"].fillna("").tolist() == ["", "", "n"]
    assert list(frame.columns)[-1] == "advantage"
    assert [row[3:] for row in marks(frame)] == [[0, 3], [1, 3], [2, 3]]


def test_an_evaluation_does_not_become_the_next_steps_samples():
    """A generation batch serves several steps, and between two of them comes an evaluation."""
    samples = Samples(unique_prompts=False)
    add(samples, "train", texts("trained"), step=0)
    samples.take("train", step=1)
    add(samples, "eval", texts("evaluated"), step=1)
    assert samples.take("eval_math", step=1)["mode"].tolist() == ["eval_math"]
    assert samples.take("train", step=2) is None
    assert samples.table("train", step=2)["completion"].tolist() == ["trained"]


def test_a_second_evaluation_starts_anew():
    samples = Samples(unique_prompts=False)
    for step in (5, 10):
        add(samples, "eval", texts(f"at {step}"), step)
        assert samples.take("eval", step)["completion"].tolist() == [f"at {step}"]


def test_repeats_that_even_out_an_evaluations_batch_are_left_out():
    samples = Samples(unique_prompts=False)
    add(samples, "eval", texts("a", "b", "b again", "b again"), 3, advantages=[0.1, 0.2])
    assert samples.take("eval", 3)["advantage"].tolist() == [0.1, 0.2]


def test_unique_prompts_keep_the_first_completion_and_its_number():
    samples = Samples(unique_prompts=True)
    add(samples, "train", texts("a", "b", "c", "d", prompts=["p", "p", "q", "q"]), step=0)
    frame = samples.take("train", step=1)
    assert frame["completion"].tolist() == ["a", "c"]
    assert [row[3:] for row in marks(frame)] == [[0, 4], [2, 4]]


@pytest.mark.parametrize(
    ("label", "sampled_after", "title", "note"),
    [
        ("train", 6, "Step 7", ""),
        ("train", 4, "Step 7", ", sampled after step 4"),
        ("eval", 7, "Evaluation after step 7", ""),
        ("eval_math", 7, "Evaluation of math after step 7", ""),
        ("test", 7, "Evaluation of test after step 7", ""),
    ],
)
def test_a_table_says_what_it_shows(label, sampled_after, title, note):
    samples = Samples(unique_prompts=False)
    add(samples, "train" if label == "train" else "eval", texts("a", "b"), sampled_after)
    assert heading(samples.take(label, 7)) == (2, title, note)
