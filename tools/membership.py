"""Did a run memorise its problems? How well its behaviour tells them from held-out ones.

    python -m tools.membership --run=out/ground_truth-tiny-seed0
    python -m tools.membership --run=FOLDER --held_out=unseen
    python -m tools.membership --model=BASE --trained=TRAINED --members=A.jsonl --held_out=B.jsonl

The base and the trained model each answer every prompt several times. Printed is an AUROC for each
score of evaluation/membership.py: 0.5 is chance, 1 means that every training problem shows. The
first row, the success of the base model, is a control: if it is far from 0.5, the two sets differ
before any training, and so may the other rows for that reason alone. The last line printed is one
JSON object.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data import Problem, batch_indices, prepare
from evaluation import membership
from evaluation.membership import separation
from harness.configurator import configure
from harness.errors import UserError, run
from harness.loading import load_tokenizer
from harness.runfiles import read_config, read_state
from rewards import parse
from settings import Config
from tasks import answers, tiny
from tasks.datasets import load_problems, subset
from tasks.problems import training_problems
from tools.parts import pair as pairs
from tools.parts.pair import Items, Pair, PairConfig
from tools.parts.style import BLUE, FIGURE_STYLE, VERMILION, save_figure
from tools.parts.tables import markdown_table

LABELS = {
    "base_success": "success of the base model (control)",
    "gain": "gain of success",
    "drift": "drift of token probabilities",
    "both": "gain and drift (DIBA)",
    "nearness": "nearness (Min-kNN, no base)",
    "nearness_gain": "nearness less that of the base",
}


@dataclass
class MembershipConfig(PairConfig):
    """Did a run memorise its problems?"""

    # Which problems
    members: str = ""  # problems trained on, as --train_data; "" = those that the run has reached
    held_out: str = ""  # others; "" = the run's eval set; unseen = training problems not reached
    n: int = 100  # problems of each, drawn with a fixed seed; 0 = all
    # How they are compared
    samples: int = 16  # responses of each model to each prompt
    nearest: int = 0  # k of the Min-kNN distance; 0 = all samples
    temperature: float = 1.0  # of sampling and scoring


def run_problems(folder: str) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """A run's training problems that it has reached, those that it has not, and its eval set.

    The order of problems is a function of the run's config (data.batch_indices), so nothing else
    is needed. Raises UserError for a folder that is no run or has no checkpoint.
    """
    known = {key: value for key, value in read_config(folder).items() if hasattr(Config, key)}
    cfg = Config(**known)
    state = read_state(folder)
    if state is None:
        raise UserError(f"run={folder}: holds no checkpoint yet: wait for it")
    held_out = load_problems(tiny.resolve(cfg.eval_data), "test")
    problems, _ = training_problems(
        cfg.train_data, held_out, parse(cfg.reward), cfg.one_shot, cfg.model, cfg.keep_duplicates
    )
    tokenizer = load_tokenizer(tiny.resolve(cfg.model))
    items, _ = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    reached = {
        i
        for step in range(int(state["steps_done"]))
        for i in batch_indices(len(items), cfg.prompts_per_step, cfg.seed, step)
    }
    seen = [p for i, (p, _) in enumerate(items) if i in reached]
    unseen = [p for i, (p, _) in enumerate(items) if i not in reached]
    return seen, unseen, held_out


def load_sets(cfg: MembershipConfig) -> tuple[list[Problem], list[Problem]]:
    """Members and held-out problems, at most cfg.n of each. Raises UserError if one is empty."""
    seen, unseen, held_out = run_problems(cfg.run) if cfg.run else ([], [], [])
    if not cfg.run and not (cfg.members and cfg.held_out):
        raise UserError("without a run, name both sets: --members=FILE --held_out=FILE")
    if cfg.held_out == "unseen":
        if not unseen:
            raise UserError("held_out=unseen: the run has reached all its training problems")
        held_out = unseen
    elif cfg.held_out:
        held_out = load_problems(tiny.resolve(cfg.held_out), "test")
    if cfg.members:
        seen = load_problems(tiny.resolve(cfg.members), "train")
    texts = {p.problem for p in seen}
    overlap = sum(p.problem in texts for p in held_out)
    if overlap:
        print(f"{overlap} held-out problems are members too and were left out")
    held_out = [p for p in held_out if p.problem not in texts]
    if min(len(seen), len(held_out)) < 2:
        raise UserError(f"{len(seen)} members and {len(held_out)} held-out: 2 or more are needed")
    return subset(seen, cfg.n), subset(held_out, cfg.n)


def scores(pair: Pair, items: Items, cfg: MembershipConfig) -> dict[str, np.ndarray]:
    """Every score of every prompt, [n] each."""
    prompts, copies = [ids for _, ids in items], cfg.samples
    asked = [problem for problem, _ in items for _ in range(copies)]
    samples, correct, nearness = {}, {}, {}
    for name in pair.names:
        samples[name] = pairs.sample(pair, name, prompts, copies, cfg.temperature, cfg, name)
        verdicts = answers.correct(samples[name].text, asked)
        correct[name] = np.array(verdicts, float).reshape(-1, copies)
        bar = tqdm(range(len(items)), desc=f"distances, {name}", unit="prompt", leave=False)
        distances = [
            membership.min_knn_distance(samples[name].responses(i), cfg.nearest) for i in bar
        ]
        nearness[name] = -np.array(distances)
    g = samples["trained"].generation
    logp = {
        name: pairs.score(
            pair, name, g.tokens, g.prompt_len, g.length, cfg.temperature, f"scores, {name}"
        )
        for name in pair.names
    }
    gain = membership.gains(correct["base"], correct["trained"])
    drift = membership.drifts(logp["trained"], logp["base"], g.length, copies)
    return {
        "base_success": correct["base"].mean(1),
        "gain": gain,
        "drift": drift,
        "both": membership.both(gain, drift),
        "nearness": nearness["trained"],
        "nearness_gain": nearness["trained"] - nearness["base"],
    }


def measure(cfg: MembershipConfig) -> tuple[dict, dict[str, np.ndarray], np.ndarray]:
    """The result, every score of every prompt, and which prompts are members, bool [n]."""
    seen, held_out = load_sets(cfg)
    pair = Pair(cfg)
    items, dropped = prepare(seen + held_out, cfg.prompt, pair.tokenizer, cfg.max_prompt_tokens)
    if dropped:
        print(f"{dropped} problems longer than {cfg.max_prompt_tokens} prompt tokens dropped")
    texts = {p.problem for p in seen}
    member = np.array([p.problem in texts for p, _ in items])
    if min(member.sum(), (~member).sum()) < 2:
        raise UserError(f"max_prompt_tokens={cfg.max_prompt_tokens} leaves too few problems")
    found = scores(pair, items, cfg)
    rows = {key: separation(found[key], member, cfg.seed) for key in LABELS}
    result = {
        "members": int(member.sum()),
        "held_out": int((~member).sum()),
        "samples": cfg.samples,
        "scores": rows,
        "memorised": bool(membership.memorised(rows)),
    }
    return result, found, member


def table(result: dict) -> str:
    """The scores as a table, and the answer in a sentence."""
    rows = [
        [label, f"{row['members']:.4g}", f"{row['held_out']:.4g}"]
        + [f"{row['auroc']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['p']:.2g}"]
        for key, label in LABELS.items()
        for row in [result["scores"][key]]
    ]
    head = ["score", "members", "held out", "AUROC", "95 % interval", "p"]
    control = result["scores"]["base_success"]
    lines = [markdown_table(head, rows), ""]
    if not control["low"] <= 0.5 <= control["high"]:
        lines.append(
            "warning: the base model already tells the two sets apart, so they differ in more "
            "than training: compare problems of one source, such as --held_out=unseen"
        )
    verdict = "no sign of it"
    if telling := membership.memorised(result["scores"]):
        verdict = f"yes, by {' and '.join(LABELS[key] for key in telling)}"
    lines.append(f"Did the run memorise its problems? {verdict}.")
    lines.append("(One-sided Mann-Whitney tests of gain, drift and both, Bonferroni, 5 %.)")
    return "\n".join(lines)


def draw(found: dict[str, np.ndarray], member: np.ndarray, path: Path) -> None:
    """Each prompt's drift against its gain of success; one colour for each set."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.subplots()
        jitter = np.random.default_rng(0).uniform(-0.015, 0.015, len(member))  # gains are few
        for chosen, colour, label in ((~member, BLUE, "held out"), (member, VERMILION, "members")):
            x, y = (found["gain"] + jitter)[chosen], found["drift"][chosen]
            axes.scatter(x, y, s=18, color=colour, alpha=0.6, label=f"{label} ({chosen.sum()})")
        axes.set_xlabel("gain of success over the base model")
        axes.set_ylabel("drift: mean change of token probability")
        axes.legend(frameon=False)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    cfg, sources = configure(MembershipConfig, argv)
    cfg = pairs.fill(cfg, sources.given)
    if not (cfg.run or cfg.adapter or cfg.trained):
        raise UserError("nothing to compare: name --run, or --adapter or --trained beside --model")
    if cfg.samples < 2 or cfg.temperature <= 0:
        raise UserError("samples must be 2 or more and temperature above 0")
    if not 0 <= cfg.nearest <= cfg.samples:
        raise UserError(f"nearest={cfg.nearest}: must be 0 (all) to samples={cfg.samples}")
    result, found, member = measure(cfg)
    per_prompt = {key: values.tolist() for key, values in found.items()}
    path = pairs.save(result | {"member": member.tolist(), **per_prompt}, cfg, "membership")
    draw(found, member, path.with_suffix(".png"))
    print(table(result))
    print(f"saved: {path}, {path.with_suffix('.png').name}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
