"""The table of what fp8 costs a reference's log-probs."""

import json

from benchmarks.tuning import fp8


def test_the_tables_errors_are_ordered_as_the_roundings_are(tmp_path, capsys):
    arguments = ["--sizes", "96,2003", "--sequences", "8", "--length", "32"]
    assert fp8.main([*arguments, "--json", str(tmp_path / "fp8.json")]) == 0
    rows = json.loads((tmp_path / "fp8.json").read_text())["rows"]
    assert {row["hidden"] for row in rows} == {"plain", "outliers"}
    for kind in ("plain", "outliers"):
        mean = {row["way"]: row["mean"] for row in rows if row["hidden"] == kind}
        ours = mean["fp8, reference_logprob_fp8"]
        assert mean["bf16, linear_logprob"] < ours < mean["fp8, the token's logit too"]
        assert 0 < ours < 0.1
    assert "| 96 x 2003 | outliers | bf16, eager |" in capsys.readouterr().out


def test_the_exact_log_probs_are_those_of_the_sampled_tokens():
    hidden, weight = fp8.make_head(32, 101, 70, False, 0)
    ids, logps = fp8.exact_logprobs(hidden, weight, 1)
    whole = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert (whole.gather(-1, ids[:, None])[:, 0] - logps).abs().max() < 1e-12
    assert logps.exp().max() > 0.99  # sure tokens
    assert logps.exp().min() < 0.3  # and others
