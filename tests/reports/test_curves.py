"""Curves: what is drawn, where, and what is refused."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from rloo_fast.reports.curves import plot_curves
from rloo_fast.reports.drawing import COLORS
from rloo_fast.reports.metrics_file import MetricsWriter


def make_run(run_dir, steps=60, slope=1.0, with_eval=True, **constant):
    writer = MetricsWriter(run_dir)
    for step in range(1, steps + 1):
        noise = (-1) ** step * 0.1
        row = {"reward": slope * step + noise, "entropy": 1.0, "completions/mean_length": 50.0}
        writer.write(step, row | constant)
        if with_eval and step % 20 == 0:
            writer.write(step, {"eval_accuracy": step / steps})
    return Path(run_dir)


@pytest.fixture
def figures(monkeypatch):
    """The figures that plot_curves saves, still as objects."""
    saved, savefig = [], Figure.savefig

    def spy(figure, *args, **kwargs):
        saved.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_curves_are_a_png_of_readme_size(tmp_path):
    plot_curves([make_run(tmp_path / "run", kl=0.1)], tmp_path / "plots/curves.png")
    with Image.open(tmp_path / "plots/curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1000, 600))


def test_every_logged_metric_has_a_panel_with_its_unit(tmp_path, figures):
    run = make_run(tmp_path / "run", kl=0.1)
    plot_curves([run], tmp_path / "curves.png")
    units = {title: axes.get_ylabel() for title, axes in panels(figures[0]).items()}
    assert units == {
        "Reward": "mean per completion",
        "Accuracy": "share correct",
        "KL to the reference": "nats per token",
        "Entropy": "nats per token",
        "Completion length": "tokens",
    }


def test_a_metric_that_was_not_logged_has_no_panel(tmp_path, figures):
    plot_curves([make_run(tmp_path / "run", with_eval=False, kl=None)], tmp_path / "curves.png")
    assert list(panels(figures[0])) == ["Reward", "Entropy", "Completion length"]


def test_the_light_line_is_the_log_and_the_bold_one_its_mean(tmp_path, figures):
    plot_curves([make_run(tmp_path / "run")], tmp_path / "curves.png")
    light, bold = panels(figures[0])["Reward"].lines
    steps = np.arange(1, 61)
    logged = steps + (-1.0) ** steps * 0.1
    np.testing.assert_allclose(light.get_ydata(), logged)
    # a fifteenth of 60 logs: the mean of five
    np.testing.assert_allclose(bold.get_ydata()[2:-2], np.convolve(logged, np.ones(5) / 5, "valid"))


def test_missing_values_are_marked_gaps_not_zeros(tmp_path, figures):
    writer = MetricsWriter(tmp_path)
    for step, reward in [(1, 0.5), (2, math.nan), (3, 0.7)]:
        writer.write(step, {"reward": reward})
        writer.write(step, {"eval_accuracy": 0.5})  # a row without a reward is no gap
    plot_curves([tmp_path], tmp_path / "curves.png")
    axes = panels(figures[0])["Reward"]
    line, dots, gaps = axes.lines
    assert list(line.get_xdata()) == [1, 2, 3]
    np.testing.assert_array_equal(line.get_ydata(), [0.5, math.nan, 0.7])
    assert list(dots.get_xdata()) == [1, 3]  # between gaps, no line shows them
    assert list(gaps.get_xdata()) == [2]
    assert "NaN or infinite" in legend_of(figures[0])


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_an_evaluation_is_drawn_beside_training(tmp_path, figures):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, {"reward": 0.1 * step, "kl": 0.0})
        writer.write(step, {"eval_reward": 0.2 * step, "eval_runtime": 1.0})
        writer.write(step, {"eval_math_reward": 0.3 * step, "eval_math_runtime": 1.0})
    plot_curves([tmp_path], tmp_path / "curves.png")
    assert list(panels(figures[0])) == ["Reward", "KL to the reference"]
    lines = {line.get_label(): line for line in panels(figures[0])["Reward"].lines}
    values = {"training": [0.1, 0.2], "evaluation": [0.2, 0.4], "evaluation on math": [0.3, 0.6]}
    for name, expected in values.items():
        np.testing.assert_allclose(lines[name].get_ydata(), expected)
    assert legend_of(figures[0]) == ["training", "evaluation", "evaluation on math"]


def test_evaluations_of_several_runs_have_panels_of_their_own(tmp_path, figures):
    runs = [make_run(tmp_path / name, eval_reward=0.5, eval_kl=0.1, kl=0.1) for name in "ab"]
    plot_curves(runs, tmp_path / "curves.png")
    titles = list(panels(figures[0]))
    assert titles[:4] == ["Reward", "Reward, evaluation", "Accuracy, evaluation",
                          "KL to the reference"]  # fmt: skip
    assert "KL to the reference, evaluation" not in titles


def test_the_users_metrics_have_panels(tmp_path, figures):
    many = {f"mine/{i}": float(i) for i in range(8)}
    run = make_run(tmp_path / "run", **many, **{"update/tokens_run": 5.0, "time/policy_s": 1.0})
    plot_curves([run], tmp_path / "curves.png")
    titles = list(panels(figures[0]))
    assert titles[2:8] == [f"mine/{i}" for i in range(6)]
    assert not [title for title in titles if "tokens_run" in title or "policy_s" in title]
    assert legend_of(figures[0])[-1] == "not shown, see --keys: mine/6, mine/7"


def test_what_shows_whether_a_run_is_healthy_has_panels(tmp_path, figures):
    more = {
        "loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-6, "completions/clipped_ratio": 0.1,
        "throughput/completion_tokens_per_s": 5000.0, "clip_ratio/region_mean": 0.2,
    }  # fmt: skip
    plot_curves([make_run(tmp_path / "run", **more)], tmp_path / "curves.png")
    titles = {"Loss", "Gradient norm", "Learning rate", "Cut at the length limit", "Speed"}
    assert titles | {"Importance ratios clipped"} < set(panels(figures[0]))


def test_where_nothing_can_be_clipped_there_is_no_panel_for_it(tmp_path, figures):
    plot_curves([make_run(tmp_path / "run", **{"clip_ratio/region_mean": 0.0})], tmp_path / "x.png")
    assert "Importance ratios clipped" not in panels(figures[0])


def test_lengths_of_599_to_6_are_a_flat_line(tmp_path, figures):
    """What is a hundredth of a token must not fill the axis."""
    rng = np.random.default_rng(0)
    lengths = [6.0 - 0.01 * (rng.random() < 0.2) for _ in range(80)]
    writer = MetricsWriter(tmp_path)
    for step, length in enumerate(lengths, start=1):
        writer.write(step, {"completions/mean_length": length})
    plot_curves([tmp_path], tmp_path / "curves.png")
    low, high = panels(figures[0])["Completion length"].get_ylim()
    assert high - low >= 2
    assert low < 5.99 < 6 < high


def test_a_spike_is_marked_and_does_not_flatten_the_rest(tmp_path, figures):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 101):
        writer.write(step, {"grad_norm": 1e5 if step == 50 else 1.0 + 0.01 * (step % 7)})
    plot_curves([tmp_path], tmp_path / "curves.png")
    axes = panels(figures[0])["Gradient norm"]
    assert axes.get_ylim()[1] < 2
    bold = axes.lines[1].get_ydata()
    assert max(bold) < 2
    (mark,) = [line for line in axes.lines if line.get_gid() == "spikes"]
    assert (list(mark.get_xdata()), [text.get_text() for text in axes.texts]) == ([50], ["1e+05"])
    assert "beyond the axis" in legend_of(figures[0])


def test_a_run_resumed_into_another_directory_begins_where_it_did(tmp_path, figures):
    for name, first in (("resumed", 500), ("whole", 1)):
        writer = MetricsWriter(tmp_path / name)
        for step in range(first, 1001, 100):
            writer.write(step, {"reward": 0.5})
        plot_curves([tmp_path / name], tmp_path / "curves.png")
    left = [panels(figure)["Reward"].get_xlim()[0] for figure in figures]
    assert left[0] == pytest.approx(490)
    assert left[1] <= 0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_short_run_is_points(tmp_path, figures, steps):
    plot_curves([make_run(tmp_path / "run", steps=steps)], tmp_path / "curves.png")
    _, dots = panels(figures[0])["Reward"].lines
    assert list(dots.get_xdata()) == [*range(1, steps + 1)]


def test_reward_functions_are_drawn_beside_their_sum(tmp_path, figures):
    parts = {"rewards/accuracy/mean": 0.2, "rewards/format/mean": 0.3}
    plot_curves([make_run(tmp_path / "run", **parts)], tmp_path / "curves.png")
    legend = panels(figures[0])["Reward"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "weighted sum",
        "accuracy",
        "format",
    ]


def test_several_runs_share_panels_and_have_a_legend(tmp_path, figures):
    runs = [make_run(tmp_path / "slow"), make_run(tmp_path / "fast", slope=2.0, steps=40)]
    plot_curves(runs, tmp_path / "curves.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["slow", "fast"]
    assert len({axes.get_xlim() for axes in figures[0].axes}) == 1
    pixels = {
        tuple(c) for c in np.asarray(Image.open(tmp_path / "curves.png"))[..., :3].reshape(-1, 3)
    }
    for color in COLORS[:2]:
        assert tuple(bytes.fromhex(color[1:])) in pixels


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path, figures):
    runs = [make_run(tmp_path / "a/out"), make_run(tmp_path / "b/out")]
    plot_curves(runs, tmp_path / "curves.png")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names[:2] == [os.path.join("a", "out"), os.path.join("b", "out")]


def test_keys_choose_the_panels_and_their_order(tmp_path, figures):
    run = make_run(tmp_path / "run", grad_norm=2.0)
    plot_curves([run], tmp_path / "curves.png", keys=["grad_norm", "entropy"])
    assert list(panels(figures[0])) == ["Gradient norm", "Entropy"]


def test_an_unknown_key_is_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"\['rewrad'\].*'entropy', 'eval_accuracy', 'reward'"):
        plot_curves([make_run(tmp_path / "run")], tmp_path / "x.png", keys=["reward", "rewrad"])


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "re'], ids=["none", "empty", "cut"])
def test_a_directory_without_metrics_is_refused(tmp_path, content):
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty/metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"No metrics in .*empty"):
        plot_curves([make_run(tmp_path / "run"), tmp_path / "empty"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_run_of_nothing_but_nan_is_refused(tmp_path):
    MetricsWriter(tmp_path / "nan").write(1, {"reward": math.nan, "epoch": 0.5})
    with pytest.raises(ValueError, match=r"nan has nothing to draw: all its metrics are NaN"):
        plot_curves([make_run(tmp_path / "run"), tmp_path / "nan"], tmp_path / "curves.png")


def test_a_metric_that_is_only_nan_is_told_from_one_that_is_not_logged(tmp_path):
    MetricsWriter(tmp_path / "run").write(1, {"reward": math.nan, "step_time": 0.5})
    with pytest.raises(ValueError, match=r"logged are \['step_time'\]. Only NaN .*: \['reward'\]"):
        plot_curves([tmp_path / "run"], tmp_path / "curves.png")


def test_a_run_given_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"given more than once: .*run, .*run; give each once"):
        plot_curves([run, tmp_path / "x/../run"], tmp_path / "curves.png")


def test_drawing_changes_no_global_matplotlib_state(tmp_path):
    before = dict(rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_curves([make_run(tmp_path / "run")], tmp_path / "curves.png")
    assert dict(rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def make_seed(run_dir, values, **columns):
    """A run of few logs, at steps 2, 4, ...; its lines are drawn as logged."""
    writer = MetricsWriter(run_dir)
    for number, value in enumerate(values, start=1):
        more = {name: column[number - 1] for name, column in columns.items()}
        writer.write(2 * number, {"reward": value} | more)
    return Path(run_dir)


def test_runs_of_equal_label_are_their_mean_in_a_band(tmp_path, figures):
    values = {"a": [0.0, 0.2, 0.4], "b": [0.2, 0.6, 0.5], "c": [0.1, 0.1, 0.9], "d": [1, 1, 1]}
    runs = [make_seed(tmp_path / name, column) for name, column in values.items()]
    plot_curves(runs, tmp_path / "curves.png", labels=["rloo", "rloo", "rloo", "grpo"])
    axes = panels(figures[0])["Reward"]
    mean = axes.lines[0]
    np.testing.assert_allclose(mean.get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.3, 0.6])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    edges = {x: corners[corners[:, 0] == x][:, 1] for x in (2, 4, 6)}
    assert [edges[x].min() for x in (2, 4, 6)] == [0.0, 0.1, 0.4]
    assert [edges[x].max() for x in (2, 4, 6)] == [0.2, 0.6, 0.9]
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["rloo (mean of 3 runs)", "grpo", "band: least to largest"]


def test_a_mean_goes_as_far_as_all_its_runs_and_over_the_steps_of_each(tmp_path, figures):
    long = make_seed(tmp_path / "long", [0.0, 0.2, 0.4, 0.6])
    short = MetricsWriter(tmp_path / "short")
    for step, reward in [(1, 1.0), (3, 0.8), (5, 0.6)]:
        short.write(step, {"reward": reward})
    plot_curves([long, tmp_path / "short"], tmp_path / "x.png", labels=["m", "m"])
    (mean,) = panels(figures[0])["Reward"].lines
    np.testing.assert_allclose(mean.get_xdata(), [2, 3, 4, 5])
    np.testing.assert_allclose(mean.get_ydata(), [0.45, 0.45, 0.45, 0.45])


def test_labels_are_one_for_each_directory(tmp_path):
    run = make_seed(tmp_path / "run", [1.0])
    with pytest.raises(ValueError, match=r"2 labels for 1 directories: expected one for each"):
        plot_curves([run], tmp_path / "curves.png", labels=["a", "b"])


@pytest.mark.parametrize(
    ("x", "places", "name"),
    [
        ("step", [2, 4, 6], "optimizer step"),
        ("num_tokens", [100, 250, 300], "tokens of prompts and completions"),
        ("time", [2, 3, 13], "time in steps, evaluations left out (minutes)"),
    ],
)
def test_the_x_axis_is_what_was_asked_for(tmp_path, figures, x, places, name):
    columns = {"num_tokens": [100, 250, 300], "step_time": [60.0, 30.0, 300.0]}
    run = make_seed(tmp_path / "run", [0.1, 0.2, 0.3], **columns)
    plot_curves([run], tmp_path / "curves.png", x=x)
    axes = panels(figures[0])["Reward"]
    assert list(axes.lines[0].get_xdata()) == places
    assert axes.get_xlabel() == name


@pytest.mark.parametrize("x", ["num_tokens", "time"])
def test_an_evaluation_stands_where_the_step_before_it_does(tmp_path, figures, x):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"reward": 0.1, "num_tokens": 10 * step, "step_time": 10.0})
    writer.write(3, {"eval_accuracy": 0.5, "eval_num_tokens": 30})
    plot_curves([tmp_path], tmp_path / "curves.png", x=x)
    assert list(panels(figures[0])["Accuracy"].lines[0].get_xdata()) == [30]
