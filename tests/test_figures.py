"""Arms, plots and the papers' figures: grouping, errors and counts by hand, on made-up runs."""

import json

import numpy as np
import pytest

from harness.checkpoint import save_rows
from harness.errors import UserError
from tools import figures, plot

ACCURACY = {0: (0.5, 0.9, 0.1), 1: (0.5, 0.7, 0.2), 2: (0.5, 0.8, 0.6)}  # at steps 0, 2, 4


def write_run(folder, seed=0, last=4, **config):
    """A run folder with made-up metrics: evals at steps 0, 2, 4, training rows from step 1."""
    folder.mkdir(parents=True)
    config = {"reward": "format", "clip": "both", "seed": seed, "out_dir": str(folder), **config}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rows = [{"step": step} for step in range(last + 1)]
    for row in rows[1:]:
        row |= {"accuracy": 0.1 * row["step"], "kl": None, "clip_frac_low": 0.0,
                "clip_frac_high": 0.0 if row["step"] == 1 else 0.002}  # fmt: skip
    for row, value in zip(rows[::2], ACCURACY[seed], strict=False):
        row |= {"eval_accuracy": value, "eval_stderr": 0.02, "eval_code_frequency": 0.65,
                "eval_boxed": 0.8}  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed) for seed in range(3)]
    return [*runs, write_run(tmp_path / "off", clip="off")]


# ---- plot


def test_runs_that_differ_only_in_seed_are_one_arm(folders):
    arms = plot.load_arms(folders)
    assert [arm.label for arm in arms] == ["format, clip=both", "format, clip=off"]
    assert [len(arm.runs) for arm in arms] == [3, 1]
    assert plot.load_arms(folders[:3])[0].label == "format"  # nothing differs


def test_mean_and_standard_error_by_hand(folders):
    three, one = plot.load_arms(folders)
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
    steps, mean, _ = plot.load_arms(runs)[0].curve("eval_accuracy")
    assert steps.tolist() == [0, 2]
    assert mean == pytest.approx([0.5, 0.8])


def test_figure_and_table(folders, tmp_path, capsys):
    from matplotlib.image import imread

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
        ([], "no runs named"),
        ([str(tmp_path / "absent")], "absent"),
        ([str(empty)], "holds no metrics"),
        ([str(no_metrics)], "cannot be read"),
        ([a, str(copy)], "the same configuration and seed"),
        ([a, "--metrics=acuracy"], "did you mean accuracy"),
        ([a, "--metrics=kl"], "no values"),
        ([a, f"--out={tmp_path}/figure.xyz"], "cannot be written"),
        ([a, "out=figure.png"], "write --out=figure.png"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            plot.main(argv)
        assert "\n" not in str(error.value)


def write_bins(folder, seed, clip="both", **config):
    """A made-up run of two steps whose tokens are binned in three bins, the middle one empty."""
    write_run(folder, seed, clip=clip, clip_high=0.25, **config)
    bins = [([0.2, 0.0, 0.8], [0.1, None, 0.0]), ([0.6, 0.0, 0.4], [0.5, None, 0.01 * seed])]
    rows = [{"step": step + 1, "prob_bins": share, "clip_high_bins": high,
             "clip_low_bins": [0.0, None, 0.0], "clip_pull_high": 1e-4, "clip_pull_low": -1e-4}
            for step, (share, high) in enumerate(bins)]  # fmt: skip
    save_rows([{"step": 0, "eval_accuracy": 0.5}, *rows], folder / "metrics.jsonl")
    return folder


def test_clip_fraction_by_bin_is_weighted_by_the_tokens(tmp_path):
    runs = [write_bins(tmp_path / str(seed), seed) for seed in (0, 2)]
    (arm,) = plot.load_arms(runs)
    high = arm.by_bin("clip_high_bins")
    # (.2 x .1 + .6 x .5) / (.2 + .6) = .4; the last bin of seed 2: .4 x .02 / (.8 + .4)
    assert high[:, 0] == pytest.approx([0.4, 0.4])
    assert high[:, 2] == pytest.approx([0, 0.008 / 1.2])
    assert np.isnan(high[:, 1]).all()
    assert arm.by_bin("no_bins").size == 0
    assert len(arm.curve("clip_high_bins")[0]) == 0  # a list is no number, and no error


def test_a_bin_that_a_seed_lacks_is_the_mean_of_the_others(tmp_path):
    runs = [write_bins(tmp_path / str(seed), seed) for seed in range(3)]
    row = {"step": 1, "prob_bins": [1.0, 0.0, 0.0], "clip_high_bins": [0.1, None, None],
           "clip_low_bins": [0.0, None, None]}  # fmt: skip
    save_rows([row], runs[0] / "metrics.jsonl")  # no token in the last bin
    figure = plot.draw(plot.load_arms(runs), tmp_path / "f.png", ("clip_bins",))
    high, _ = figure.axes[0].patches
    # seeds 1 and 2: .4 x .01 and .4 x .02, of .8 + .4
    assert high.get_data().values == pytest.approx([0.3, np.nan, 0.005], nan_ok=True)
    _, _, (bars,) = figure.axes[0].containers[0].lines
    assert np.ptp(bars.get_segments()[2][:, 1]) == pytest.approx(0.4 * 0.01 / 1.2)


def test_clip_panels_draw_both_sides_and_the_line(folders, tmp_path):
    runs = [write_bins(tmp_path / f"b{seed}", seed) for seed in range(3)]
    runs += [write_bins(tmp_path / f"g{seed}", seed, loss="gspo", clip="high") for seed in range(3)]
    figure = plot.draw(plot.load_arms(runs), tmp_path / "f.png", ("clip_bins", "clip_pull"))
    bins, pull = figure.axes
    assert [text.get_text() for text in bins.texts] == ["1/(1+0.25)"]  # a token ratio's alone
    verticals = [line.get_xdata()[0] for line in bins.lines if line.get_linestyle() == ":"]
    assert verticals == pytest.approx([0.8])
    assert len(bins.patches) == 4 and len(pull.collections) == 4  # two arms x two sides
    assert "likeliest" in pull.get_title()
    assert "clip pull: per token" in figure.legends[0].get_title().get_text()
    for key in ("clip_bins", "clip_pull"):
        with pytest.raises(UserError, match="has no values in these runs"):
            plot.draw(plot.load_arms(folders), tmp_path / "f.png", (key,))


def test_too_few_seeds_are_on_the_face_of_a_figure(folders, monkeypatch):
    monkeypatch.setattr(plot, "save", lambda figure, path: None)

    def title(runs):
        return plot.draw(plot.load_arms(runs), "f.png").get_suptitle()

    assert title(folders[:3]) == ""
    assert title(folders) == title(folders[:2]) == "fewer than 3 seeds: no conclusion"


# ---- the papers' figures


def write_evals(folder, before, after):
    """Evals of one problem a list: (text, correct) a sample, before and after."""
    for step, problems in ((0, before), (20, before), (40, after)):
        rows = [{"problem": f"p{i}", "completions": [text for text, _ in samples],
                 "correct": [bool(right) for _, right in samples]}
                for i, samples in enumerate(problems)]  # fmt: skip
        save_rows(rows, folder / "eval" / f"step_{step:05d}.jsonl")


def test_transitions_by_hand(tmp_path):
    before = [[("Python", 0), ("so", 0)], [("python", 1), ("so", 1)], [("so", 0), ("so", 0)]]
    after = [[("python", 1), ("python", 1)], [("so", 0), ("so", 1)], [("python", 1), ("so", 0)]]
    write_evals(write_run(tmp_path / "a"), before, after)
    found = figures.transitions([tmp_path / "a"])
    names = list(figures.CLASSES)  # code to code, code to language, language to code, to language
    assert [found.n[name] for name in names] == [1, 1, 2, 2]
    assert [found.gained[name] for name in names] == [1, 0, 2, 0]
    assert [found.lost[name] for name in names] == [0, 1, 0, 0]
    assert [found.share(name) for name in names] == [1 / 2, -1 / 2, 1, 0]
    assert found.gains == [2, -1, 1]  # one run: a problem each
    write_evals(write_run(tmp_path / "b", 1), before, before)
    pair = figures.transitions([tmp_path / "a", tmp_path / "b"])
    assert pair.gains == [2, 0] and pair.n["code to code"] == 3
    assert figures.transitions([tmp_path / "b"]).share("code to code") is None


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
    assert text.count("warning:") == 1 and "clip=off: the total gain, +0 of 6" in text
    assert "*published, Qwen2.5-Math-7B, not ours* | | language to code | | | | 58.3 % |" in text
    assert "conclusion" not in text


def test_figures_are_drawn_beside_the_published(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, "save", lambda figure, out: saved.append(figure))
    runs = {}
    for name, changes in {"none": {"reward": "random(0)"}, "half": {"reward": "random"},
                          "off": {"reward": "random", "clip": "off"}}.items():  # fmt: skip
        runs[name] = []
        for seed in range(3):
            folder = write_run(tmp_path / f"{name}{seed}", seed, **changes)
            rows = plot.load_arms([folder])[0].runs[0]
            for row in rows[::2]:
                row |= {"eval_accuracy_code": 0.7, "eval_accuracy_language": 0.1}
            for row in rows[1:]:
                row["code_frequency"] = 0.6
            save_rows(rows, folder / "metrics.jsonl")
            runs[name].append(str(folder))
    for name in ("rewards", "code", "gamma"):
        figures.main([name, *runs["none"], *runs["half"]])
        titles = [axis.get_title() for axis in saved[-1].axes]
        assert titles[-1].endswith("published, Qwen2.5-Math-7B, not ours")
        assert not any("published" in title for title in titles[:-1])
        assert saved[-1].get_suptitle() == ""
    gains = [patch.get_width() for patch in saved[0].axes[1].patches]
    assert gains == pytest.approx([-20, -20])  # .9 .7 .8 less .5 at step 2; .1 .2 .6 at step 4
    assert [patch.get_width() for patch in saved[0].axes[2].patches] == list(figures.GAIN.values())
    places = [tick.get_text() for tick in saved[2].axes[0].get_xticklabels()]
    assert places == ["0", "0.5"]
    half = 4.302653 * np.std([10, 20, 60], ddof=1) / 3**0.5  # t of 2 degrees of freedom
    segments = saved[2].axes[0].containers[0].lines[2][0].get_segments()
    assert segments[0][:, 1] == pytest.approx([30 - half, 30 + half], rel=1e-5)
    figures.main(["gamma", *runs["none"][:2]])
    assert saved[-1].get_suptitle() == plot.FEW_SEEDS
    figures.main(["clip", *runs["half"], *runs["off"], f"--out={tmp_path}/clip.png"])
    assert (tmp_path / "clip.png").stat().st_size > 10_000


def test_the_clip_figure_compares_whatever_sets_the_clip(folders, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plot, "save", lambda figure, path: saved.append(path))
    others = {"higher": {"clip_high": 0.28}, "gspo": {"loss": "gspo"}, "cispo": {"loss": "cispo"}}
    for name, changes in others.items():
        run = write_run(tmp_path / name, **changes)
        figures.main(["clip", str(folders[0]), str(run), f"--out={name}.png"])
    assert saved == ["higher.png", "gspo.png", "cispo.png"]
    old = write_run(tmp_path / "old", 1, clip_high=0.2)  # the default, which the others do not name
    with pytest.raises(UserError, match="all runs have loss=grpo, clip=both, clip_low=0.2"):
        figures.main(["clip", str(folders[0]), str(old)])


def test_errors_of_figures_are_one_line(folders, tmp_path):
    a, b = str(folders[0]), str(folders[1])
    write_evals(folders[1], [[("so", 0)]], [[("so", 1), ("so", 1)]])
    bare = write_run(tmp_path / "bare")
    save_rows([{"step": 1, "reward": 0.5}], bare / "metrics.jsonl")
    late = write_run(tmp_path / "late")
    start = {"step": 0, "eval_accuracy": None, "eval_code_frequency": 0.5}
    save_rows([start, {"step": 2, "eval_accuracy": 0.5}], late / "metrics.jsonl")
    half, short = (str(write_run(tmp_path / name, reward=reward))
                   for name, reward in (("half", "random(0.5)"), ("short", "random")))  # fmt: skip
    for argv, words in [
        ([], "no figure named: name one of rewards"),
        (["reward", a], "reward: name one of rewards"),
        (["rewards"], "no runs named"),
        (["rewards", str(bare)], "bare: has no eval_accuracy before training"),
        (["rewards", str(late)], "late: has no eval_accuracy before training"),
        (["clip", a, b], "all runs have loss=grpo, clip=both"),
        (["gamma", half, short], r"short: random is random\(0.5\) of .*half, written otherwise"),
        (["gamma", a], "its reward is format"),
        (["transitions", a], "no eval/step_00000.jsonl"),
        (["transitions", b], "step_00040.jsonl: not the problems and samples of step_00000.jsonl"),
        (["code", a, "--outt=x"], "unknown key 'outt'"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            figures.main(argv)
        assert "\n" not in str(error.value)
