"""One model under several prompt formats and temperatures: what it does without any training.

The best of them is the untuned baseline. A trained model that does not beat it may have learned no
more than a better prompt would have given (arXiv 2509.21882).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import PROMPTS, Problem, prepare
from evaluation.report import percent, with_error
from evaluation.scores import per_problem
from evaluation.statistics import Difference, paired_difference, standard_error
from harness.errors import UserError

Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids

# Qwen2.5-Math-7B on MATH-500, percent: accuracy, and the share with a box that can be read. They
# are figures of "Spurious Rewards" (arXiv 2506.10947), not of this code.
PUBLISHED = {
    "qwen_math": "49.4 (78.9)",
    "math_problem": "55.8 (72.1)",
    "simplerl": "63.2 (85.4)",
    "sober": "61.6 (93.1)",
    "spurious": "68.8 (84.1)",
    "none": "69 to 72",
}
PUBLISHED_NOTE = (
    "Published: Qwen2.5-Math-7B on MATH-500, greedy, percent (with a readable box), not ours."
)


@dataclass
class Setting:
    """A prompt format and a temperature, with what came of them."""

    prompt: str
    temperature: float
    summary: dict
    rows: list[dict]

    @property
    def name(self) -> str:
        return f"{self.prompt} at temperature {self.temperature:g}"

    def error(self, measure: str) -> float | None:
        """The standard error over problems of a measure of scores.MEASURES."""
        values = per_problem(self.rows, measure)
        return None if values is None else standard_error(values)


def names_of(prompts: str, default: str) -> list[str]:
    """The formats in a list such as none,simplerl. Raises UserError for an unknown one."""
    names = [name.strip() for name in (prompts or default).split(",") if name.strip()]
    for name in names:
        if name not in PROMPTS:
            raise UserError(f"prompts: unknown format {name!r}: it is one of {', '.join(PROMPTS)}")
    return list(dict.fromkeys(names))


def temperatures_of(temperatures: str, default: float) -> list[float]:
    """The numbers in a list such as 0,0.6,1. Raises UserError for what is no temperature."""
    try:
        values = [float(text) for text in temperatures.split(",") if text.strip()] or [default]
    except ValueError:
        raise UserError(f"temperatures={temperatures}: not a list of numbers: 0,0.6,1") from None
    if not all(0 <= value < float("inf") for value in values):
        raise UserError(f"temperatures={temperatures}: each must be 0 (greedy) or more")
    return list(dict.fromkeys(values))


def items_by_prompt(
    names: list[str], problems: list[Problem], tokenizer: Any, max_prompt_tokens: int
) -> dict[str, Items]:
    """The problems under each format that this tokenizer can write: the same problems under all.

    A line names each format that it cannot write, and says how many problems are too long under
    some format. Raises UserError if no format or no problem is left.
    """
    written: dict[str, Items] = {}
    for name in names:
        try:
            written[name], _ = prepare(problems, name, tokenizer, max_prompt_tokens)
        except UserError as error:
            if len(names) == 1:
                raise
            print(f"left out: {error}")
    if not written:
        raise UserError(f"prompts={','.join(names)}: this tokenizer can write none of them")
    fit = [{id(problem) for problem, _ in items} for items in written.values()]
    shared = set.intersection(*fit)
    if not shared:
        raise UserError(f"max_prompt_tokens={max_prompt_tokens}: no problem fits under all formats")
    if len(shared) < len(problems):
        print(f"{len(problems) - len(shared)} problems dropped: too long under some prompt format")
    return {name: [one for one in its if id(one[0]) in shared] for name, its in written.items()}


def try_all(
    cfg: Any,
    problems: list[Problem],
    tokenizer: Any,
    measure: Callable[[Any, Items, Path], tuple[dict, list[dict]]],
    folder: Path,
) -> list[Setting]:
    """Measure one model under each format and temperature of cfg.prompts and cfg.temperatures.

    measure(cfg, items, folder) is called with the cfg of one setting and its own folder.
    """
    names = names_of(cfg.prompts, cfg.prompt)
    values = temperatures_of(cfg.temperatures, cfg.temperature)
    by_prompt = items_by_prompt(names, problems, tokenizer, cfg.max_prompt_tokens)
    settings = []
    for name, items in by_prompt.items():
        for value in values:
            one = replace(cfg, prompt=name, temperature=value, prompts="", temperatures="")
            summary, rows = measure(one, items, folder / f"{name}-t{value:g}")
            settings.append(Setting(name, value, summary, rows))
            print(f"{settings[-1].name}: {with_error(summary['accuracy'], summary['stderr'])}")
    return settings


def best_of(settings: list[Setting]) -> Setting:
    """The setting with the highest accuracy; of equal ones, the first."""
    return max(settings, key=lambda one: one.summary["accuracy"])


def gain(settings: list[Setting]) -> Difference:
    """The best setting less the first one, over the same problems."""
    best = best_of(settings)
    return paired_difference(
        per_problem(settings[0].rows, "accuracy"), per_problem(best.rows, "accuracy")
    )


def prompt_table(settings: list[Setting], data: str) -> str:
    """A markdown table of the settings, and the untuned baseline below it.

    data is the name of the data set. Published figures are shown for MATH-500 alone.
    """
    published = "math500" in data.casefold().replace("-", "")
    head = ["prompt", "temperature", "k", "accuracy", "lenient", "boxed", "code", "truncated"]
    head += ["published"] if published else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for one in settings:
        s = one.summary
        shares = [
            with_error(s[key], one.error(key)) for key in ("boxed", "code_frequency", "truncated")
        ]
        cells = [one.prompt, f"{one.temperature:g}", str(s["k"])]
        cells += [with_error(s["accuracy"], s["stderr"])]
        cells += [with_error(s["lenient_accuracy"], s["lenient_stderr"]), *shares]
        if published:
            cells.append(PUBLISHED.get(one.prompt, "") if one.temperature == 0 else "")
        lines.append("| " + " | ".join(map(str.strip, cells)) + " |")
    best, d = best_of(settings), gain(settings)
    notes = [
        f"{settings[0].summary['n']} problems; ± 1 standard error over problems."
        + (f" {PUBLISHED_NOTE}" if published else ""),
        f"Untuned baseline: {best.name}, {percent(best.summary['accuracy']).strip()}"
        + (f", {difference(d)} against {settings[0].name}" if best is not settings[0] else "")
        + ".",
    ]
    if best is not settings[0]:
        notes.append(
            f"It is the best of {len(settings)} settings on these problems, so part of the "
            "difference is chance: measure it again on other problems."
        )
    return "\n".join(lines) + "\n\n" + "\n".join(notes)


def difference(d: Difference) -> str:
    """A difference in points, with its interval."""
    text = f"{100 * d.mean:+.1f} points"
    if d.low is not None:
        text += f" (95 % interval {100 * d.low:+.1f} to {100 * d.high:+.1f})"
    return text
