"""Arms, plots and the papers' figures: grouping, errors and counts by hand, on made-up runs."""

import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from harness.configurator import PROJECT
from harness.errors import UserError
from harness.runfiles import save_rows
from tools import figures, plot
from tools.parts.arms import Arm, load_arms
from tools.parts.panels import draw_metrics
from tools.parts.published import GAIN, PUBLISHED
from tools.parts.style import BLUE, CLIP_COLOURS, PINK, REWARD_STYLES, arm_styles
from tools.parts.tables import FEW_SEEDS, markdown_table
from tools.parts.transitions import CLASSES, count_transitions

ACCURACY = {0: (0.5, 0.9, 0.1), 1: (0.5, 0.7, 0.2), 2: (0.5, 0.8, 0.6)}  # at steps 0, 2, 4


def write_run(folder, seed=0, last=4, **config):
    """A run folder with made-up metrics: evals at steps 0, 2, 4, training rows from step 1."""
    folder.mkdir(parents=True)
    config = {"reward": "format", "clip": "both", "seed": seed, "out_dir": str(folder), **config}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rows = [{"step": step} for step in range(last + 1)]
    for row in rows[1:]:
        row |= {"accuracy": 0.1 * row["step"], "kl": None, "clip_frac_low": 0.0}
        row["clip_frac_high"] = 0.0 if row["step"] == 1 else 0.002
    evals = {"eval_stderr": 0.02, "eval_code_frequency": 0.65, "eval_boxed": 0.8}
    for row, value in zip(rows[::2], ACCURACY[seed], strict=False):
        row |= evals | {"eval_accuracy": value}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in range(3)]
    return [*runs, write_run(tmp_path / "off", clip="off")]


# ---- plot


def test_runs_that_differ_only_in_seed_are_one_arm(folders):
    arms = load_arms(folders)
    assert [arm.label for arm in arms] == ["format, clip=both", "format, clip=off"]
    assert [len(arm.runs) for arm in arms] == [3, 1]
    assert load_arms(folders[:3])[0].label == "format"  # nothing differs


def test_mean_and_standard_error_by_hand(folders):
    three, one = load_arms(folders)
    steps, mean, error = three.curve("eval_accuracy")
    assert steps.tolist() == [0, 2, 4]
    assert mean == pytest.approx([0.5, 0.8, 0.3])
    # of .9 .7 .8: variance (.01 + .01) / 2; of .1 .2 .6: (.04 + .01 + .09) / 2. Before training all
    # seeds measure the same model on the same samples, which is no estimate of an error.
    assert error[1:] == pytest.approx([(0.01 / 3) ** 0.5, (0.07 / 3) ** 0.5])
    assert np.isnan(error[0])
    assert one.curve("eval_accuracy")[2] == pytest.approx(0.02)  # one seed: over problems
    assert np.isnan(one.curve("accuracy")[2]).all()
    assert three.curve("clip_frac")[1] == pytest.approx([0, 0.002, 0.002, 0.002])
    assert three.curve("accuracy", 3)[1] == pytest.approx([0.1, 0.15, 0.2, 0.3])
    assert len(three.curve("kl")[0]) == 0  # null throughout


def test_mean_ends_where_the_shortest_run_ends(tmp_path):
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, last=2)]
    steps, mean, _ = load_arms(runs)[0].curve("eval_accuracy")
    assert steps.tolist() == [0, 2]
    assert mean == pytest.approx([0.5, 0.8])


def test_figure_and_table(folders, tmp_path, capsys):
    out = tmp_path / "new" / "figure.png"
    plot.main([*map(str, folders), f"--out={out}"])
    pixels = imread(out)
    assert pixels.shape[1] == 1600
    assert pixels.std() > 0.05  # something is drawn
    printed = capsys.readouterr().out
    assert "| format, clip=both | 3 | 50.0 | 30.0 ± 15.3 | 65.0 | 65.0 |" in printed
    assert "| format, clip=off | 1 | 50.0 ± 2.0 | 10.0 ± 2.0 | 65.0 | 65.0 |" in printed


def test_errors_of_plot_are_one_line(folders, tmp_path):
    empty, no_metrics, copy = (tmp_path / name for name in ("empty", "none", "copy"))
    (write_run(empty) / "metrics.jsonl").write_text("")
    (write_run(no_metrics) / "metrics.jsonl").unlink()
    write_run(copy)
    a = str(folders[0])
    for argv, words in [
        ([], "tools.plot out/a out/b"),
        ([str(tmp_path / "absent")], "absent"),
        ([str(empty)], "empty/metrics.jsonl"),
        ([str(no_metrics)], "none/metrics.jsonl"),
        ([a, str(copy)], "copy: .*a0"),
        ([a, "--metrics=acuracy"], "--metrics: acuracy: .* accuracy"),
        ([a, "--metrics=kl"], "--metrics: kl"),
        ([a, f"--out={tmp_path}/figure.xyz"], "--out=.*figure.xyz"),
        ([a, "out=figure.png"], "--out=figure.png"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            plot.main(argv)
        assert "\n" not in str(error.value)


def write_bins(folder, seed, clip="both", **config):
    """A made-up run of two steps whose tokens are binned in three bins, the middle one empty."""
    write_run(folder, seed, clip=clip, clip_high=0.25, **config)
    bins = [([0.2, 0.0, 0.8], [0.1, None, 0.0]), ([0.6, 0.0, 0.4], [0.5, None, 0.01 * seed])]
    low = {"clip_low_bins": [0.0, None, 0.0], "clip_pull_high": 1e-4, "clip_pull_low": -1e-4}
    rows = [{"step": 0, "eval_accuracy": 0.5}]
    for step, (share, high) in enumerate(bins, start=1):
        rows.append({"step": step, "prob_bins": share, "clip_high_bins": high, **low})
    save_rows(rows, folder / "metrics.jsonl")
    return folder


def test_clip_fraction_by_bin_is_weighted_by_the_tokens(tmp_path):
    runs = [write_bins(tmp_path / str(seed), seed) for seed in (0, 2)]
    (arm,) = load_arms(runs)
    high = arm.by_bin("clip_high_bins")
    # (.2 x .1 + .6 x .5) / (.2 + .6) = .4; the last bin of seed 2: .4 x .02 / (.8 + .4)
    assert high[:, 0] == pytest.approx([0.4, 0.4])
    assert high[:, 2] == pytest.approx([0, 0.008 / 1.2])
    assert np.isnan(high[:, 1]).all()
    assert arm.by_bin("no_bins").size == 0
    assert len(arm.curve("clip_high_bins")[0]) == 0  # a list is no number, and no error


def test_a_bin_that_a_seed_lacks_is_the_mean_of_the_others(tmp_path):
    runs = [write_bins(tmp_path / str(seed), seed) for seed in range(3)]
    row = {"step": 1, "prob_bins": [1.0, 0.0, 0.0]}  # no token in the last bin
    row |= {"clip_high_bins": [0.1, None, None], "clip_low_bins": [0.0, None, None]}
    save_rows([row], runs[0] / "metrics.jsonl")
    figure = draw_metrics(load_arms(runs), ("clip_bins",))
    high, _ = figure.axes[0].patches
    # seeds 1 and 2: .4 x .01 and .4 x .02, of .8 + .4
    assert high.get_data().values == pytest.approx([0.3, np.nan, 0.005], nan_ok=True)
    _, _, (bars,) = figure.axes[0].containers[0].lines
    assert np.ptp(bars.get_segments()[2][:, 1]) == pytest.approx(0.4 * 0.01 / 1.2)


def test_clip_panels_draw_both_sides_and_the_line(folders, tmp_path):
    runs = [write_bins(tmp_path / f"b{seed}", seed) for seed in range(3)]
    runs += [write_bins(tmp_path / f"g{seed}", seed, loss="gspo", clip="high") for seed in range(3)]
    figure = draw_metrics(load_arms(runs), ("clip_bins", "clip_pull"))
    bins, pull = figure.axes
    assert [text.get_text() for text in bins.texts] == ["1/(1+0.25)"]  # a token ratio's alone
    verticals = [line.get_xdata()[0] for line in bins.lines if line.get_linestyle() == ":"]
    assert verticals == pytest.approx([0.8])
    assert len(bins.patches) == 4 and len(pull.collections) == 4  # two arms x two sides
    assert "token_mean" in figure.legends[0].get_title().get_text()
    for key in ("clip_bins", "clip_pull"):
        with pytest.raises(UserError, match=key):
            draw_metrics(load_arms(folders), (key,))


def test_a_figure_says_that_seeds_are_too_few(folders):
    def title(runs):
        return draw_metrics(load_arms(runs), ("accuracy",)).get_suptitle()

    assert title(folders[:3]) == ""
    assert title(folders) == title(folders[:2]) == FEW_SEEDS


def colours(*configs):
    """The colours of arms with these configurations, in order."""
    arms = [Arm("", [], [], {"clip": "both"} | config) for config in configs]
    return [style["color"] for style in arm_styles(arms)]


def test_a_reward_looks_the_same_in_every_figure():
    """Every reward of config/, whatever stands beside it; `constant` alone has no fixed style."""
    files = sorted((PROJECT / "config").glob("*.py"))
    rewards = {re.search(r'^reward = "(.*)"', file.read_text(), re.MULTILINE) for file in files}
    rewards = sorted({found[1] for found in rewards if found} - {"constant"})
    assert len({REWARD_STYLES[reward] for reward in rewards}) == len(rewards) > 15
    for order in (rewards, rewards[::-1], [*rewards[3:8], "other"], ["constant", *rewards[:3]]):
        found = arm_styles([Arm("", [], [], {"clip": "both", "reward": name}) for name in order])
        looks = [(style["color"], style["linestyle"]) for style in found]
        assert len(set(looks)) == len(order)
        for name, look in zip(order, looks, strict=True):
            assert REWARD_STYLES.get(name, look) == look
    assert REWARD_STYLES["random"] == REWARD_STYLES["random(0.5)"]


def test_arms_of_one_reward_are_coloured_by_their_clip():
    clips = ["off", "both", "high", "low"]
    assert colours(*({"clip": clip} for clip in clips)) == [CLIP_COLOURS[clip] for clip in clips]
    one_update = {"clip": "off", "updates_per_step": 1}
    off, both, other = colours({"clip": "off"}, {"clip": "both"}, one_update)
    assert (off, both) == (PINK, BLUE) and other not in (PINK, BLUE)


def test_no_two_arms_look_alike():
    arms = [Arm("", [], [], {"reward": "format", "lr": i, "clip": "both"}) for i in range(21)]
    looks = {tuple(style.items()) for style in arm_styles(arms)}
    assert len(looks) == 21


def test_a_reward_with_a_bar_is_one_cell_of_a_table():
    table = markdown_table(["reward", "n"], [["format | python", "3"]])
    assert table.splitlines()[1:] == ["| --- | --: |", "| format \\| python | 3 |"]


# ---- the papers' figures


def write_evals(folder, before, after):
    """Evals of one problem a list: (text, correct) a sample, before and after."""
    for step, problems in ((0, before), (20, before), (40, after)):
        rows = []
        for i, samples in enumerate(problems):
            texts, marks = zip(*samples, strict=True)
            correct = [bool(mark) for mark in marks]
            rows.append({"problem": f"p{i}", "completions": texts, "correct": correct})
        save_rows(rows, folder / "eval" / f"step_{step:05d}.jsonl")


def test_transitions_by_hand(tmp_path):
    before = [[("Python", 0), ("so", 0)], [("python", 1), ("so", 1)], [("so", 0), ("so", 0)]]
    after = [[("python", 1), ("python", 1)], [("so", 0), ("so", 1)], [("python", 1), ("so", 0)]]
    write_evals(write_run(tmp_path / "a"), before, after)
    found = count_transitions([tmp_path / "a"])
    names = CLASSES  # code to code, code to language, language to code, language to language
    assert [found.n[name] for name in names] == [1, 1, 2, 2]
    assert [found.gained[name] for name in names] == [1, 0, 2, 0]
    assert [found.lost[name] for name in names] == [0, 1, 0, 0]
    assert [found.share(name) for name in names] == [1 / 2, -1 / 2, 1, 0]
    assert found.gains == [2, -1, 1]  # one run: a problem each
    write_evals(write_run(tmp_path / "b", 1), before, before)
    pair = count_transitions([tmp_path / "a", tmp_path / "b"])
    assert pair.gains == [2, 0] and pair.n["code to code"] == 3
    assert count_transitions([tmp_path / "b"]).share("code to code") is None


def test_transition_table_says_undefined_and_what_is_noise(tmp_path, capsys):
    sure = [[("so", 0)], [("so", 0)]], [[("python", 1)], [("python", 1)]]
    for seed in range(3):
        write_evals(write_run(tmp_path / f"a{seed}", seed), sure[0], sure[1])
        write_evals(write_run(tmp_path / f"b{seed}", seed, clip="off"), sure[0], sure[0])
    out = tmp_path / "new" / "t.md"
    figures.main(["transitions", *map(str, sorted(tmp_path.glob("[ab]?"))), f"--out={out}"])
    text = out.read_text()
    assert text in capsys.readouterr().out + "\n"
    assert "| format, clip=both | 3 | language to code | 6 | 6 | 0 | 100.0 % |" in text
    assert "| format, clip=both | 3 | all | 6 | 6 | 0 | +100.0 points |" in text
    assert "| format, clip=off | 3 | language to language | 6 | 0 | 0 | undefined |" in text
    (warning,) = [line for line in text.splitlines() if line.startswith("warning:")]
    assert "clip=off" in warning and "+0 of 6" in warning
    assert f"| *{PUBLISHED}* |  | language to code |  |  |  | 58.3 % |" in text
    assert FEW_SEEDS.capitalize() not in text


@pytest.fixture
def random_runs(tmp_path):
    """Folders of three seeds each: random(0), random(0.5), and random(0.5) without the clip."""
    settings = {
        "none": {"reward": "random(0)"},
        "half": {"reward": "random"},
        "off": {"reward": "random", "clip": "off"},
    }
    runs = {}
    for name, changes in settings.items():
        runs[name] = []
        for seed in range(3):
            folder = write_run(tmp_path / f"{name}{seed}", seed, **changes)
            rows = load_arms([folder])[0].runs[0]
            for row in rows[::2]:
                row |= {"eval_accuracy_code": 0.7, "eval_accuracy_language": 0.1}
            for row in rows[1:]:
                row["code_frequency"] = 0.6
            save_rows(rows, folder / "metrics.jsonl")
            runs[name].append(str(folder))
    return runs


@pytest.mark.parametrize("name", ["rewards", "code", "gamma"])
def test_published_figures_are_beside_ours_and_marked(name, random_runs):
    arms = load_arms([*random_runs["none"], *random_runs["half"]])
    figure = figures.FIGURES[name](arms)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[-1].endswith(PUBLISHED)
    assert not any("published" in title for title in titles[:-1])
    assert figure.get_suptitle() == ""


def test_bars_are_the_gains(random_runs):
    arms = load_arms([*random_runs["half"], *random_runs["none"]])
    _, ours, published = figures.rewards_figure(arms).axes
    gains = [patch.get_width() for patch in ours.patches]
    assert gains == pytest.approx([-20, -20])  # .9 .7 .8 less .5 at step 2; .1 .2 .6 at step 4
    drawn = [to_hex(patch.get_facecolor()).upper() for patch in ours.patches]
    assert drawn == [style["color"] for style in arm_styles(arms)]
    assert [patch.get_width() for patch in published.patches] == list(GAIN.values())


def test_gamma_figure_by_hand(random_runs):
    axis, *_ = figures.gamma_figure(load_arms([*random_runs["none"], *random_runs["half"]])).axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "0.5"]
    half = 4.302653 * np.std([10, 20, 60], ddof=1) / 3**0.5  # t of 2 degrees of freedom
    segments = axis.containers[0].lines[2][0].get_segments()
    assert segments[0][:, 1] == pytest.approx([30 - half, 30 + half], rel=1e-5)
    few = figures.gamma_figure(load_arms(random_runs["none"][:2]))
    assert few.get_suptitle() == FEW_SEEDS


def test_the_command_saves_the_clip_figure(random_runs, tmp_path):
    runs = [*random_runs["half"], *random_runs["off"]]
    figures.main(["clip", *runs, f"--out={tmp_path}/clip.png"])
    assert (tmp_path / "clip.png").stat().st_size > 10_000


@pytest.mark.parametrize("changes", [{"clip_high": 0.28}, {"loss": "gspo"}, {"loss": "cispo"}])
def test_the_clip_figure_compares_whatever_sets_the_clip(changes, folders, tmp_path):
    run = write_run(tmp_path / "other", **changes)
    figure = figures.clip_figure(load_arms([folders[0], run]))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 2


def test_the_clip_figure_refuses_equal_clips(folders, tmp_path):
    old = write_run(tmp_path / "old", 1, clip_high=0.2)  # the default, which the others do not name
    with pytest.raises(UserError, match="loss=grpo, clip=both, clip_low=0.2"):
        figures.main(["clip", str(folders[0]), str(old)])


def test_errors_of_figures_are_one_line(folders, tmp_path):
    a, b = str(folders[0]), str(folders[1])
    write_evals(folders[1], [[("so", 0)]], [[("so", 1), ("so", 1)]])
    bare = write_run(tmp_path / "bare")
    save_rows([{"step": 1, "reward": 0.5}], bare / "metrics.jsonl")
    late = write_run(tmp_path / "late")
    start = {"step": 0, "eval_accuracy": None, "eval_code_frequency": 0.5}
    save_rows([start, {"step": 2, "eval_accuracy": 0.5}], late / "metrics.jsonl")
    half = str(write_run(tmp_path / "half", reward="random(0.5)"))
    short = str(write_run(tmp_path / "short", reward="random"))
    (tmp_path / "file").write_text("")
    write_evals(folders[2], [[("so", 0)]], [[("so", 1)]])
    for argv, words in [
        ([], "rewards, code, clip, gamma, transitions"),
        (["reward", a], "reward: .*rewards"),
        (["rewards"], "tools.figures rewards out/a"),
        (["rewards", str(bare)], "bare: .*eval_accuracy"),
        (["rewards", str(late)], "late: .*eval_accuracy"),
        (["clip", a, b], "loss=grpo, clip=both"),
        (["gamma", half, short], r"short: .*random\(0.5\) of .*half"),
        (["gamma", a], "a0: .*format"),
        (["transitions", a], "eval/step_00000.jsonl"),
        (["transitions", b], "step_00040.jsonl: .*step_00000.jsonl"),
        (["transitions", str(folders[2]), f"--out={tmp_path}/file/t.md"], "--out: .*file/t.md"),
        (["code", a, "--outt=x"], "outt"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            figures.main(argv)
        assert "\n" not in str(error.value)
