"""reasoning-gym problems as a dataset, and their verifier as a reward."""

import json
import logging

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rloo_fast.data.reasoning_gym_tasks import load_reasoning_gym
from rloo_fast.rewards import verified
from rloo_fast.rewards.reasoning_gym import reasoning_gym_reward
from rloo_fast.verifiers import gym_answers

TINY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 10 x 10 x (+, -)


@pytest.fixture(scope="module")
def sums():
    return load_reasoning_gym("chain_sum", 150, 3, **TINY)


def score(completions, rows):
    return reasoning_gym_reward(completions, task=rows["task"][:], entry=rows["entry"][:])


# --- the dataset ----------------------------------------------------------------------------------


def test_prompts_are_distinct_though_the_generator_repeats_itself(sums):
    assert len(set(sums["prompt"])) == 150


def test_answers_are_those_of_the_sums(sums):
    computed = [str(eval(prompt.split(": ")[1].rstrip(" ="))) for prompt in sums["prompt"]]
    assert sums["answer"][:] == computed


def test_the_same_seed_gives_the_same_rows_and_another_does_not(sums):
    again, other = (load_reasoning_gym("chain_sum", 150, seed, **TINY) for seed in (3, 4_000))
    assert again.to_dict() == sums.to_dict()
    assert other["prompt"][:] != sums["prompt"][:]


def test_problem_i_is_made_from_seed_plus_i():
    rows = load_reasoning_gym("spell_backward", 30, 100)
    later = load_reasoning_gym("spell_backward", 20, 110)
    assert rows["prompt"][10:] == later["prompt"][:]


def test_excluded_prompts_do_not_come(sums):
    rest = load_reasoning_gym("chain_sum", 40, 3, exclude_prompts=set(sums["prompt"]), **TINY)
    assert len({*sums["prompt"], *rest["prompt"]}) == 150 + 40


def test_a_task_that_has_no_more_prompts_says_so():
    with pytest.raises(ValueError, match=r"gave 200 prompts .* 201 were asked for: lower the size"):
        load_reasoning_gym("chain_sum", 201, 0, **TINY)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'chain_sums'\. Did you mean 'chain_sum'"):
        load_reasoning_gym("chain_sums", 1, 0)


def test_a_name_like_no_task_is_answered_with_all_tasks():
    with pytest.raises(ValueError, match=r"no task 'qqqq'.*'chain_sum'.*'spell_backward'"):
        load_reasoning_gym("qqqq", 1, 0)


def test_an_unknown_configuration_key_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'max_term'\. Did you mean 'max_terms'.* min_digits, "):
        load_reasoning_gym("chain_sum", 1, 0, max_term=3)


def test_a_bad_configuration_value_is_explained():
    with pytest.raises(ValueError, match=r"'chain_sum' refuses .*max_terms must be >= min_terms"):
        load_reasoning_gym("chain_sum", 1, 0, min_terms=3, max_terms=2)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        load_reasoning_gym("chain_sum", 0, 0)


def test_a_task_whose_verifier_needs_more_than_json_is_refused():
    with pytest.raises(ValueError, match="cannot score an entry that was stored as JSON"):
        load_reasoning_gym("arc_agi", 1, 0)


# --- the reward -----------------------------------------------------------------------------------


def test_right_answers_earn_one_and_wrong_ones_less(sums):
    assert score(sums["answer"][:], sums) == [1.0] * 150
    assert max(score([str(int(answer) + 1) for answer in sums["answer"]], sums)) < 0.1


def test_part_of_an_answer_earns_what_the_verifier_says():
    rows = load_reasoning_gym("spell_backward", 1, 0, min_word_len=5, max_word_len=5)
    assert score([rows["answer"][0][:4]], rows) == pytest.approx([0.8])


def test_blanks_around_an_answer_do_not_count():
    rows = load_reasoning_gym("spell_backward", 1, 0)
    assert score([f" {rows['answer'][0]}\n"], rows) == [1.0]


def test_conversational_completions(sums):
    said = [[{"role": "assistant", "content": answer}] for answer in sums["answer"]]
    assert score(said, sums) == [1.0] * 150


def test_each_completion_is_scored_by_its_own_task(sums):
    words = load_reasoning_gym("spell_backward", 1, 0)
    columns = {
        name: [sums[name][0], words[name][0], words[name][0]]
        for name in ("task", "entry", "answer")
    }
    completions = [columns["answer"][0], columns["answer"][1], columns["answer"][0]]
    right, also_right, swapped = reasoning_gym_reward(
        completions, columns["task"], columns["entry"]
    )
    assert (right, also_right) == (1.0, 1.0)
    assert swapped < 1


def test_the_verifier_has_the_configuration_of_the_problem():
    # the tolerance of decimal_arithmetic's verifier is one unit of the last configured place
    coarse = load_reasoning_gym("decimal_arithmetic", 1, 0, max_num_decimal_places=3)
    fine = load_reasoning_gym("decimal_arithmetic", 1, 0, max_num_decimal_places=9)
    near = [str(float(rows["answer"][0]) + 2e-6) for rows in (coarse, fine)]
    assert score(near[:1], coarse) == [1.0]
    assert score(near[1:], fine)[0] < 1


def test_the_verifier_of_a_task_is_made_once(sums, monkeypatch):
    made = []
    make = reasoning_gym.create_dataset
    monkeypatch.setattr(
        reasoning_gym, "create_dataset", lambda *a, **k: (made.append(a), make(*a, **k))[1]
    )
    monkeypatch.setattr(gym_answers, "_verifiers", {})
    for answer, entry in zip(sums["answer"], sums["entry"], strict=True):
        assert gym_answers.verify("chain_sum", json.loads(entry), answer) == [1.0, ""]
    assert len(made) == 1


def test_text_that_the_verifier_cannot_read_earns_nothing_and_is_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(verified, "_said", set())
    rows = load_reasoning_gym("prime_factorization", 3, 0)  # its verifier raises on words
    with caplog.at_level(logging.WARNING, logger="rloo_fast.rewards.verified"):
        rewards = score(["two", "three", rows["answer"][2]], rows)
    assert rewards == [0.0, 0.0, 1.0]
    assert [("'two'" in message) for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    "text", ["", "12", '{"answer": "12"}', '{"question": "1+1", "answer": "2", "metadata": {}}']
)
def test_an_entry_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="needs a column `entry` as load_reasoning_gym writes it"):
        reasoning_gym_reward(["2"], task=["chain_sum"], entry=[text])


def test_an_entry_of_another_task_is_refused():
    rows = load_reasoning_gym("chain_sum", 1, 0)
    with pytest.raises(ValueError, match="verifier of 'tower_of_hanoi' cannot score this entry"):
        reasoning_gym_reward(["2"], task=["tower_of_hanoi"], entry=rows["entry"][:])


def test_accuracy_is_logged_beside_the_reward():
    rows = load_reasoning_gym("spell_backward", 2, 0, min_word_len=5, max_word_len=5)
    logged = {}
    reasoning_gym_reward(
        [rows["answer"][0], rows["answer"][1][:4]],
        rows["task"][:],
        rows["entry"][:],
        log_metric=logged.__setitem__,
    )
    assert logged == {"accuracy": 0.5, "over_limit": 0}


def test_the_entry_is_the_librarys_own_and_knows_its_configuration(sums):
    entry = json.loads(sums["entry"][0])
    problems = DATASETS["chain_sum"][0](DATASETS["chain_sum"][1](seed=3, size=1, **TINY))
    assert entry == {**json.loads(json.dumps(problems[0])), "config": TINY}
