"""Has the model seen these problems before? Problems cut short, and how well it goes on.

    python -m tools.contamination --model=Qwen/Qwen2.5-Math-1.5B --data=math500 --n=100
    python -m tools.contamination --run=out/random_reward-tiny-seed0

Each problem's first 40, 60 and 80 % of words are given bare, without a prompt format, and continued
greedily. Printed are the share that goes on word for word, ROUGE-L of the rest, and the share of
right answers from the part alone, for the set and for generated problems that no model can have
seen (tasks/arithmetic.py, or a fresh tiny world). Then the perplexity of the problem and of its
gold answer in a box, under the base and the trained model: according to arXiv 2601.11061 a run that
recalls its problems makes the answer likelier and the problem less likely. The last line printed is
one JSON object.
"""

import json
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data import Problem, render_prompt
from evaluation import probe
from harness.configurator import configure
from harness.errors import UserError, run
from harness.runfiles import read_config
from tasks import answers, tiny
from tasks.datasets import load_problems, subset
from tools.parts import pair as pairs
from tools.parts.pair import Pair, PairConfig
from tools.parts.style import BLUE, FIGURE_STYLE, VERMILION, save_figure
from tools.parts.tables import markdown_table

FIGURES = {"exact": "exact match", "rouge_l": "ROUGE-L", "answer": "answer right"}
TINY_LEAD = r"In my head: the answer is \boxed{"  # as the tiny base model writes it
TINY_STREAM = 303  # first key of the generator of fresh tiny problems


@dataclass
class ContaminationConfig(PairConfig):
    """Has the model seen these problems before?"""

    # Which problems
    data: str = "math500"  # math500, gsm8k, a .jsonl file, a folder, a hub id, tiny
    split: Literal["test", "train"] = "test"  # where the data set has both
    against: str = "arithmetic_5"  # generated problems to compare with; tiny: a fresh tiny world
    n: int = 100  # problems of either set, drawn with a fixed seed; 0 = all
    shares: tuple[float, ...] = (0.4, 0.6, 0.8)  # of a problem's words that the model is given
    lead: str = r"\boxed{"  # text between the prompt and the gold answer, for its perplexity


def fill(cfg: ContaminationConfig, given: dict) -> ContaminationConfig:
    """Fill in what was not given; the problems of a run are those of its eval set."""
    cfg = pairs.fill(cfg, given)
    if cfg.run and "data" not in given:
        cfg.data = read_config(cfg.run)["eval_data"]
    elif tiny.is_tiny(cfg.model) and "data" not in given:
        cfg.data = cfg.model
    if tiny.is_tiny(cfg.model):
        cfg.against = given.get("against", "tiny")
        cfg.lead = given.get("lead", TINY_LEAD)
    return cfg


def generated(cfg: ContaminationConfig, problems: list[Problem]) -> list[Problem]:
    """Problems that no model can have seen, as many as those of the set."""
    if cfg.against != "tiny":
        return subset(load_problems(cfg.against, "test"), len(problems))
    draw = np.random.default_rng((TINY_STREAM, cfg.seed))
    seen = {p.problem for p in load_problems(tiny.resolve(cfg.data), cfg.split)}
    hard = True if cfg.data.endswith("_hard") else None
    return tiny.make_problems(len(problems), draw, seen, hard)


def parts(problems: list[Problem], share: float, tokenizer) -> tuple[list[list[int]], list[str]]:
    """The token ids of each problem's first part, and the text of the rest."""
    prompts, rests = [], []
    for problem in problems:
        text = problem.problem
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        kept = max(1, probe.tokens_before(offsets, probe.cut(text, share)))
        whole = render_prompt(text, "none", tokenizer)  # with what starts a text, such as BOS
        prompts.append(whole[: len(whole) - len(ids) + kept])
        rests.append(text[offsets[kept - 1][1] :])
    return prompts, rests


def complete(
    pair: Pair,
    name: str,
    problems: list[Problem],
    share: float,
    cfg: ContaminationConfig,
    desc: str,
) -> tuple[dict, list[dict]]:
    """The figures of one model at one share, and a row for each problem."""
    prompts, rests = parts(problems, share, pair.tokenizer)
    texts = pairs.sample(pair, name, prompts, 1, 0.0, cfg, desc).text
    right = answers.correct(texts, problems)
    rows = [
        {
            "id": problem.id,
            "rest": rest,
            "completion": text,
            "exact": probe.exact(text, rest),
            "rouge_l": probe.rouge_l(text, rest),
            "answer": bool(ok),
        }
        for problem, rest, text, ok in zip(problems, rests, texts, right, strict=True)
    ]
    figures = {
        key: probe.share_with_interval([float(row[key]) for row in rows], cfg.seed)
        for key in FIGURES
    }
    return figures, rows


def likelihoods(pair: Pair, problems: list[Problem], cfg: ContaminationConfig) -> dict:
    """Perplexities of problem and answer under both models.

    The problem is scored bare, from its second token on. The answer is scored behind the prompt in
    the run's format and cfg.lead, which opens a box, so no working comes before it.
    """
    tokenizer = pair.tokenizer
    lead = tokenizer(cfg.lead, add_special_tokens=False)["input_ids"]
    bare, boxed = [], []
    for problem in problems:
        ids = render_prompt(problem.problem, "none", tokenizer)
        bare.append((ids[:1], ids[1:]))
        gold = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
        boxed.append((render_prompt(problem.problem, cfg.prompt, tokenizer) + lead, gold))
    found = {}
    for what, pieces in (("problem", bare), ("answer", boxed)):
        logp = {
            name: pairs.score_texts(pair, name, pieces, f"{what}, {name}") for name in pair.names
        }
        found[what] = probe.perplexities(logp["base"], logp.get("trained"), cfg.seed)
    return found


def usable(
    problems: list[Problem], name: str, pair: Pair, cfg: ContaminationConfig
) -> list[Problem]:
    """The problems that can be cut and that fit. Raises UserError if none is left."""
    kept = [
        p
        for p in problems
        if len(p.problem.split()) > 1
        and len(render_prompt(p.problem, cfg.prompt, pair.tokenizer)) <= cfg.max_prompt_tokens
    ]
    if not kept:
        raise UserError(
            f"{name}: no problem has two words and at most "
            f"max_prompt_tokens={cfg.max_prompt_tokens} tokens"
        )
    if len(kept) < len(problems):
        print(f"{name}: {len(problems) - len(kept)} problems left out: one word, or too long")
    return kept


def measure(cfg: ContaminationConfig) -> tuple[dict, dict]:
    """The result, and the completions by set, model and share."""
    pair = Pair(cfg)
    if not pair.tokenizer.is_fast:
        raise UserError(f"model={cfg.model}: its tokenizer does not tell where its tokens stand")
    problems = subset(load_problems(tiny.resolve(cfg.data), cfg.split), cfg.n)
    sets = {cfg.data: problems, f"generated ({cfg.against})": generated(cfg, problems)}
    result: dict = {"sets": {}}
    rows: dict = {}
    for which, chosen in sets.items():
        chosen = usable(chosen, which, pair, cfg)
        found: dict = {"n": len(chosen), "shares": {}}
        for share in cfg.shares:
            for name in pair.names:
                desc = f"{which}, {share:.0%}, {name}"
                figures, ours = complete(pair, name, chosen, share, cfg, desc)
                found["shares"].setdefault(f"{share:g}", {})[name] = figures
                rows.setdefault(which, {}).setdefault(name, {})[f"{share:g}"] = ours
        found["perplexity"] = likelihoods(pair, chosen, cfg)
        result["sets"][which] = found
    return result, rows


def table(result: dict) -> str:
    """Both tables: what was completed, and perplexities."""

    def cell(one: dict) -> str:
        text = f"{100 * one['mean']:.1f}"
        return (
            text
            if one["low"] is None
            else f"{text} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
        )

    head = ["set", "n", "given", "model", *FIGURES.values()]
    lines = [
        [which, str(found["n"]), f"{float(share):.0%}", name]
        + [cell(figures[key]) for key in FIGURES]
        for which, found in result["sets"].items()
        for share, models in found["shares"].items()
        for name, figures in models.items()
    ]
    text = [markdown_table(head, lines, left=(0, 3)), "Percent, with 95 % intervals.", ""]
    head = ["set", "perplexity of", "base", "trained", "change of log p, nats a token"]
    lines = []
    for which, found in result["sets"].items():
        for what, one in found["perplexity"].items():
            change = one.get("change")
            cells = ["-", "-"]
            if change:
                interval = (
                    ""
                    if change["low"] is None
                    else f" ({change['low']:+.3f} to {change['high']:+.3f})"
                )
                cells = [f"{one['trained']:.3g}", f"{change['mean']:+.3f}{interval}"]
            lines.append([which, what, f"{one['base']:.3g}", *cells])
    return "\n".join([*text, markdown_table(head, lines, left=(0, 1))])


def draw(result: dict, path) -> None:
    """Each figure against the share given: a panel a figure, a colour a set, a line a model."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        axes = figure.subplots(1, len(FIGURES), sharey=True)
        for panel, (key, label) in zip(axes, FIGURES.items(), strict=True):
            for (which, found), colour in zip(
                result["sets"].items(), (VERMILION, BLUE), strict=True
            ):
                shares = list(found["shares"])
                for name, line in (("base", "-"), ("trained", "--")):
                    if name in found["shares"][shares[0]]:
                        means = [100 * found["shares"][s][name][key]["mean"] for s in shares]
                        x = [100 * float(s) for s in shares]
                        panel.plot(
                            x, means, line, marker="o", color=colour, label=f"{which}, {name}"
                        )
            panel.set_title(label)
            panel.set_xlabel("words given, percent")
        axes[0].set_ylabel("percent")
        axes[0].set_ylim(bottom=-2)
        axes[-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    cfg, sources = configure(ContaminationConfig, argv)
    cfg = fill(cfg, sources.given)
    if not cfg.shares or not all(0 < share < 1 for share in cfg.shares):
        raise UserError(f"shares={cfg.shares}: wants numbers between 0 and 1, such as 0.4,0.6")
    result, rows = measure(cfg)
    path = pairs.save(result | {"completions": rows}, cfg, "contamination")
    draw(result, path.with_suffix(".png"))
    print(table(result))
    print(f"saved: {path}, {path.with_suffix('.png').name}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
