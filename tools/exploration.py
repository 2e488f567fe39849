"""Does a model search systematically? Its traces over the permutations of a list, by rules.

    python -m tools.exploration --model=FOLDER --sizes=20,60,200 --lists=10
    python -m tools.exploration --completions=FILE     (problem, answer = the list, completions)
    python -m tools.exploration --build=cache/tiny_permutations   (a tiny base model to train)
    python train.py config/study/coverage.py config/model/tiny_permutations.py
    python -m tools.exploration --run=out/coverage-tiny_permutations-seed0

The rules are those of evaluation/exploration.py; a trace is cut off (no END) where the budget of
tokens is too small for it, so the tokens of a full trace are printed too. The last line printed is
one JSON object.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from data import Problem, prepare
from evaluation.exploration import Audit, audit, permutation_count, reference, summarize
from harness.configurator import configure
from harness.errors import UserError, run
from harness.runfiles import read_config
from tasks import permutations, tiny
from tasks.datasets import load_completions, load_problems, subset
from tools.parts import pair as pairs
from tools.parts.pair import Pair, PairConfig
from tools.parts.style import BLUE, FIGURE_STYLE, VERMILION, save_figure
from tools.parts.tables import markdown_table

MODEL_COLOURS = {"base": BLUE, "trained": VERMILION, "file": BLUE}
COLUMNS = {  # key of summarize -> head of a column, in percent
    "complete": "complete",
    "valid": "valid",
    "effective": "effective",
    "necessary": "necessary",
    "invalid_moves": "invalid moves",
    "repeated_states": "repeated states",
    "early_end": "early END",
    "no_end": "no END",
}


@dataclass
class ExplorationConfig(PairConfig):
    """Does a model search systematically?"""

    # What is audited
    build: str = ""  # make the tiny permutations world in this new folder, and nothing else
    completions: str = ""  # .jsonl of saved traces: problem, answer (the list), completions
    data: str = ""  # problems of the kind permutations; "" = those of the run, or made lists
    sizes: tuple[int, ...] = permutations.SIZES  # wanted numbers of permutations of made lists
    lists: int = 8  # made lists of each size
    n: int = 0  # problems of data, drawn with a fixed seed; 0 = all
    samples: int = 1  # traces of each model for each list
    temperature: float = 1.0  # 0 = greedy


def load(cfg: ExplorationConfig) -> list[Problem]:
    """The lists to permute. Raises UserError where the data hold other problems."""
    data = cfg.data
    if not data and cfg.run:
        saved = read_config(cfg.run)["eval_data"]
        kinds = {p.kind for p in load_problems(tiny.resolve(saved), "test")}
        data = saved if kinds == {permutations.KIND} else ""
    if not data:
        if cfg.n:
            raise UserError(f"n={cfg.n} has no effect on made lists: use --lists and --sizes")
        return permutations.make_problems(cfg.sizes, cfg.lists, cfg.seed)
    problems = load_problems(tiny.resolve(data), "test")
    if {p.kind for p in problems} != {permutations.KIND}:
        raise UserError(f"data={data}: not all of its problems have the kind {permutations.KIND}")
    return subset(problems, cfg.n)


def traces(cfg: ExplorationConfig) -> tuple[dict[str, list[tuple[str, str]]], dict[int, int]]:
    """(list, trace) pairs by model, and the tokens of a full trace by size."""
    if cfg.completions:
        rows = load_completions(cfg.completions)
        if odd := next((row for row in rows if not row["answer"].isalnum()), None):
            raise UserError(
                f"completions={cfg.completions}: the answer {odd['answer']!r} is no list of "
                "letters, such as aab"
            )
        return {"file": [(row["answer"], text) for row in rows for text in row["completions"]]}, {}
    pair = Pair(cfg)
    items, dropped = prepare(load(cfg), cfg.prompt, pair.tokenizer, cfg.max_prompt_tokens)
    if dropped:
        print(f"{dropped} lists left out: their prompts exceed {cfg.max_prompt_tokens} tokens")
    prompts = [ids for _, ids in items]
    asked = [problem.answer for problem, _ in items for _ in range(cfg.samples)]
    found = {}
    for name in pair.names:
        texts = pairs.sample(pair, name, prompts, cfg.samples, cfg.temperature, cfg, name).text
        found[name] = list(zip(asked, texts, strict=True))
    needs: dict[int, int] = {}
    for problem, _ in items:
        full = pair.tokenizer(reference(problem.answer), add_special_tokens=False)["input_ids"]
        size = permutation_count(problem.answer)
        needs[size] = max(needs.get(size, 0), len(full))
    return found, needs


def measure(cfg: ExplorationConfig) -> tuple[dict, list[dict]]:
    """The figures by model and size, and a row for each trace."""
    found, needs = traces(cfg)
    result: dict = {"full_trace_tokens": needs, "models": {}}
    rows = []
    for name, pairs_ in found.items():
        by_size: dict[int, list[Audit]] = {}
        for items, text in pairs_:
            one = audit(text, items)
            by_size.setdefault(one.goals, []).append(one)
            rows.append({"model": name, "list": items, "trace": text, **asdict(one)})
        everything = [one for audits in by_size.values() for one in audits]
        sizes = {str(size): summarize(by_size[size]) for size in sorted(by_size)}
        result["models"][name] = {"all": summarize(everything), "sizes": sizes}
    return result, rows


def table(result: dict) -> str:
    """A row a model and size."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    rows = []
    for name, found in result["models"].items():
        for size, one in [*found["sizes"].items(), ("all", found["all"])]:
            error = one["coverage_stderr"]
            coverage = percent(one["coverage"]) + (f" ± {100 * error:.1f}" if error else "")
            full = result["full_trace_tokens"].get(int(size)) if size != "all" else None
            cells = [name, size, str(one["n"]), coverage, *(percent(one[key]) for key in COLUMNS)]
            rows.append([*cells, str(full or "-")])
    head = ["model", "permutations", "traces", "coverage", *COLUMNS.values(), "full trace, tokens"]
    return (
        f"{markdown_table(head, rows)}\n\nPercent of traces, ± 1 standard error over traces; "
        "invalid moves are of all moves, repeated states of all CHECKs."
    )


def draw(result: dict, path: Path) -> None:
    """Coverage against the number of permutations, a line a model."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        for name, found in result["models"].items():
            sizes = [int(size) for size in found["sizes"]]
            means = [100 * one["coverage"] for one in found["sizes"].values()]
            errors = [100 * (one["coverage_stderr"] or 0) for one in found["sizes"].values()]
            axes.errorbar(
                sizes, means, errors, marker="o", capsize=3, color=MODEL_COLOURS[name], label=name
            )
        axes.set_xscale("log")
        ticks = sorted({int(s) for found in result["models"].values() for s in found["sizes"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("distinct permutations of the list")
        axes.set_ylabel("coverage, percent")
        axes.set_ylim(0, 102)
        axes.legend(frameon=False)
    save_figure(figure, path)


def check(cfg: ExplorationConfig) -> None:
    """Raises UserError for settings that cannot work."""
    if not cfg.sizes or min(cfg.sizes) < 2 or max(cfg.sizes) > 10_000:
        raise UserError(f"sizes={cfg.sizes}: wants numbers of permutations from 2 to 10000")
    if min(cfg.lists, cfg.samples) < 1 or cfg.temperature < 0:
        raise UserError("lists and samples must be at least 1, temperature not negative")
    if cfg.samples > 1 and cfg.temperature == 0:
        raise UserError(f"samples={cfg.samples}: greedy traces (temperature=0) are all the same")


def refuse_idle(cfg: ExplorationConfig, given: dict) -> None:
    """Raises UserError for a setting that was given and would do nothing."""
    idle = set()
    if cfg.build:
        idle, why = set(given) - {"build", "seed"}, "build=FOLDER only makes the tiny world"
    elif cfg.completions:
        idle, why = set(given) - {"completions", "out"}, "completions=FILE holds the traces"
    elif cfg.data:
        idle, why = {"sizes", "lists"} & set(given), "data=... names the lists"
    if idle:
        raise UserError(f"{sorted(idle)[0]} has no effect: {why}: leave one of them out")


def main(argv: list[str]) -> None:
    cfg, sources = configure(ExplorationConfig, argv)
    check(cfg)
    refuse_idle(cfg, sources.given)
    if cfg.build:
        permutations.build(Path(cfg.build), cfg.seed)
        print(f"made {cfg.build}: train on it by")
        print("python train.py config/study/coverage.py config/model/tiny_permutations.py")
        return
    if cfg.completions:
        cfg.model = cfg.model or Path(cfg.completions).stem
    else:
        cfg = pairs.fill(cfg, sources.given)
        if not cfg.run and "prompt" not in sources.given:
            cfg.prompt = "none"  # the other formats ask for a boxed answer
    result, rows = measure(cfg)
    path = pairs.save(result | {"traces": rows}, cfg, "exploration")
    draw(result, path.with_suffix(".png"))
    print(table(result))
    print(f"saved: {path}, {path.with_suffix('.png').name}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
