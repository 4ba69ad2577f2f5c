"""What ends a completion, and what is kept of it: ids, log-probs and text."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rloo_fast.records import Rollout, Sampling
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.stops import KeptRows, Stops, StopStringCriterion
from tests.rollout.test_hf import PROMPTS, SAMPLING, draw, make_engine
from tests.support.fake_engine import FakeEngine
from tests.support.tiny import make_tokenizer, require_vllm

# pieces of text as byte-level tokens: "Ġ" is a space, "Ċ" a line break, "Ã" and "©" the bytes of é
PIECES = ["<eos>", "<end>", "4", "2", "2</", "</", "answer", ">", ">Ċ", "Ġ</", "Ġ", "Ã", "©", "a"]
EOS, END, FOUR, TWO, TWO_OPEN, OPEN, ANSWER, CLOSE, CLOSE_BREAK, SPACE_OPEN, SPACE, E1, E2, A = (
    range(len(PIECES))
)
STOP = "</answer>"


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", additional_special_tokens=["<end>"]
    )


def make_stops(*strings: str, tokenizer=None, include=True, min_tokens=0, stop_ids=(EOS,)) -> Stops:
    sampling = Sampling(
        1.0, 1.0, 0, None, 1.0, 16, stop_ids, {"min_new_tokens": min_tokens}, strings, include
    )
    return Stops(sampling, tokenizer or bytes_tokenizer())


@pytest.mark.parametrize(
    ("ids", "with_it", "without"),
    [
        ([FOUR, TWO, OPEN, ANSWER, CLOSE], (5, "42</answer>"), (2, "42")),
        ([FOUR, TWO_OPEN, ANSWER, CLOSE], (4, "42</answer>"), (2, "42")),
        ([FOUR, TWO, OPEN, ANSWER, CLOSE_BREAK], (5, "42</answer>"), (2, "42")),
        ([FOUR, SPACE_OPEN, ANSWER, CLOSE], (4, "4 </answer>"), (1, "4 ")),
        ([FOUR, SPACE, OPEN, ANSWER, CLOSE], (5, "4 </answer>"), (2, "4 ")),
        ([E1, E2, OPEN, ANSWER, CLOSE], (5, "é</answer>"), (2, "é")),
        ([OPEN, ANSWER, CLOSE], (3, "</answer>"), (0, "")),
        ([FOUR, END, OPEN, ANSWER, CLOSE], (5, "4</answer>"), (1, "4")),
        ([FOUR, OPEN, ANSWER, CLOSE, TWO, TWO, EOS], (4, "4</answer>"), (1, "4")),
    ],
    ids=["tokens", "begins inside", "ends inside", "space inside", "space", "bytes", "nothing else",
         "special", "engine went on"],
)  # fmt: skip
def test_ids_and_text_end_at_a_stop_string(ids, with_it, without):
    for include, (count, text) in ((True, with_it), (False, without)):
        kept = make_stops(STOP, include=include).keep([A], ids, "length")
        assert kept == (count, "stop", text), include


@pytest.mark.parametrize(
    ("ids", "reason", "kept"),
    [
        ([FOUR, TWO, EOS], "stop", (3, "stop", None)),
        ([FOUR, TWO, EOS], "length", (3, "stop", None)),
        ([FOUR, EOS, TWO], "length", (2, "stop", None)),
        ([FOUR, TWO], "length", (2, "length", None)),
        ([FOUR, TWO], "stop", (2, "stop", None)),
        ([FOUR, OPEN, ANSWER], "length", (3, "length", None)),
        ([ANSWER, CLOSE], "length", (2, "length", None)),
        ([OPEN, ANSWER, EOS], "stop", (3, "stop", None)),
    ],
    ids=["EOS", "EOS, says length", "behind EOS", "cut", "own end", "a part of it", "the prompt's",
         "EOS in it"],
)  # fmt: skip
def test_what_ends_without_a_stop_string(ids, reason, kept):
    assert make_stops(STOP).keep([A, OPEN], ids, reason) == kept


def test_the_stop_string_that_ends_first_is_the_one():
    ids = [FOUR, OPEN, ANSWER, CLOSE]
    assert make_stops(">", "</", STOP).keep([A], ids, "length") == (2, "stop", "4</")
    assert make_stops("r>", "wer>", include=False).keep([A], ids, "length").text == "4</answe"


def test_no_stop_string_ends_within_min_new_tokens():
    ids = [FOUR, OPEN, TWO, TWO_OPEN]
    assert make_stops("</", min_tokens=1).keep([A], ids, "length").num_tokens == 2
    assert make_stops("</", min_tokens=2).keep([A], ids, "length").num_tokens == 4
    assert make_stops("</", min_tokens=4).keep([A], ids, "length") == (4, "length", None)


def test_a_tokenizer_without_a_stream_decodes_alike():
    core = bytes_tokenizer()
    slow = SimpleNamespace(decode=core.decode)
    draw = random.Random(0)
    for _ in range(200):
        ids = draw.choices(range(1, len(PIECES)), k=8)
        for include in (True, False):
            fast = make_stops("</a", "2", "é", include=include, tokenizer=core)
            assert fast.keep([A], ids, "length") == make_stops(
                "</a", "2", "é", include=include, tokenizer=slow
            ).keep([A], ids, "length")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("include", [True, False])
def test_text_and_last_token_are_those_of_vllm(include):
    require_vllm()
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    tokenizer, draw, found = bytes_tokenizer(), random.Random(0), 0
    for _ in range(500):
        strings = draw.choice([[STOP], ["</", "2<", "42"], ["é", "aa"], ["> ", "answer"]])
        ids, min_tokens = draw.choices(range(1, len(PIECES)), k=12), draw.choice([0, 0, 3])
        stops = make_stops(*strings, include=include, tokenizer=tokenizer, min_tokens=min_tokens)
        params = SamplingParams(
            stop=strings, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=12
        )
        request = SimpleNamespace(request_id="0", prompt_token_ids=[A], sampling_params=params)
        theirs = FastIncrementalDetokenizer(tokenizer, request)
        end = next((n for n, i in enumerate(ids, 1) if theirs.update([i], False)), None)
        assert stops.end([A], ids) == end
        if end is not None:
            found += 1
            assert stops.keep([A], ids, "length").text == theirs.output_text
    assert found > 100


# --- rows of a rollout


def test_ids_and_log_probs_are_cut_alike():
    rows = [[FOUR, TWO, OPEN, ANSWER, CLOSE], [FOUR, EOS], [TWO]]
    logps = [[-float(i) for i in range(len(ids))] for ids in rows]
    versions = [[2, 3, 3, 3, 3], [1, 3], [3]]
    sampled = Rollout(rows, ["stop", "stop", "length"], logps, 3, versions)
    kept = KeptRows(make_stops(STOP, include=False), [[A]] * 3)
    got = kept.rollout(sampled)
    assert got == Rollout(
        [[FOUR, TWO], [FOUR, EOS], [TWO]], ["stop", "stop", "length"],
        [[0.0, -1.0], [0.0, -1.0], [0.0]], 3, [[2, 3], [1, 3], [3]],
    )  # fmt: skip
    assert kept.texts == {0: "42"}
    none = kept.rollout(replace(sampled, logps=None, token_versions=None))
    assert none.logps is None
    assert none.token_versions is None


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="need the tokenizer"):
        draw(make_engine(), sampling=replace(SAMPLING, stop_strings=("w1",)))


# --- in transformers' generate


@pytest.mark.parametrize("sharing", [True, False])
def test_transformers_stops_at_the_token_that_completes_a_stop_string(sharing):
    engine, tokenizer = make_engine(tokenizer=make_tokenizer()), make_tokenizer()
    engine.cache_can_be_copied = sharing
    sampling = replace(SAMPLING, max_new_tokens=24, stop_token_ids=(1,))
    free = draw(engine, sampling=sampling)
    stopped = draw(engine, sampling=replace(sampling, stop_strings=("w3 w", "w1")))
    shorter = 0
    for i, (ids, logps) in enumerate(zip(stopped.completion_ids, stopped.logps, strict=True)):
        # the same draws, up to the token after which a stop string is there
        assert ids == free.completion_ids[i][: len(ids)]
        assert logps == pytest.approx(free.logps[i][: len(ids)], abs=1e-5)
        text, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids[:-1]))
        assert "w3 w" not in before
        assert "w1" not in before
        by_string = "w1" in text or "w3 w" in text
        assert (stopped.finish_reasons[i] == "stop") == (by_string or ids[-1] == 1)
        shorter += len(ids) < len(free.completion_ids[i])
    assert shorter > 4


@pytest.mark.parametrize("extra", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_search_by_transformers_stops_too(extra):
    engine, tokenizer = make_engine(tokenizer=make_tokenizer()), make_tokenizer()
    sampling = replace(SAMPLING, stop_token_ids=(1,), stop_strings=("w1",), extra=extra)
    rollout = draw(engine, PROMPTS[:1] if "num_beams" not in extra else PROMPTS, sampling)
    for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
        assert "w1" not in tokenizer.decode(ids[:-1])
        assert (reason == "stop") == (ids[-1] == 1 or "w1" in tokenizer.decode(ids))


def test_rows_that_change_places_are_read_anew():
    stops = make_stops("42")
    criterion = StopStringCriterion(stops, [[A], [A]], 1, reorders=True)
    rows = torch.tensor([[A, FOUR], [A, TWO], [A, FOUR], [A, FOUR]])
    assert criterion(rows, None).tolist() == [False] * 4
    swapped = torch.cat([rows[[1, 0, 2, 3]], torch.tensor([[TWO], [TWO], [A], [TWO]])], 1)
    assert criterion(swapped, None).tolist() == [False, True, False, True]


# --- engines of a user's own


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"completion_ids": [[5]]}, "was given 2 prompts and returned 1 completions, 2 finish_"),
        ({"finish_reasons": ["stop"]}, "returned 2 completions, 1 finish_reasons and log-probs of"),
        ({"finish_reasons": ["eos_token", None]}, r"\['None', 'eos_token'\]: 'stop' is expected"),
        ({"logps": [[-1.0], []]}, "0 log-probs for a completion of 1 tokens"),
        ({"token_versions": [[0], []]}, "token_versions of another shape than the completions'"),
        (
            {"completion_ids": [[5, 6], [6]], "logps": None, "token_versions": [[1, 0], [1]]},
            r"versions \[1, 0\] of the weights drew the tokens of completion 0: expected",
        ),
        ({"token_versions": [[0], [2]]}, r"versions \[2\] .* completion 1: .* up to 1\."),
    ],
    ids=str,
)
def test_a_rollout_that_is_none_says_what_is_expected(change, sentence):
    rollout = Rollout([[5], [6]], ["stop", "length"], [[-1.0], [-2.0]])

    class Mine(FakeEngine):
        def _generate(self, *args):
            return replace(rollout, **change)

    engine = Mine()
    engine.wake(("weights",))
    engine.load_weights(1, ())
    engine.wake(("kv_cache",))
    with pytest.raises(EngineError, match=sentence):
        engine.generate([[4]] * 2, SAMPLING, [0, 1], version=1)
