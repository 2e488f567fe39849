"""Compare two sets of completions on the same problems: is a gain a gain?

    python -m tools.compare out/base-eval out/random_reward-tiny-seed0
    python -m tools.compare A.jsonl B.jsonl --examples=2 --out=out/compare.md
    python -m tools.compare out/random_reward-tiny-seed0       its first eval against its last

A and B are files of completions, folders of evals, or folders of runs (their last eval). So base
stands against trained, prompt against prompt, or temperature against temperature. Both sides are
graded anew, by one rule. The last line printed is one JSON object.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from evaluation.comparison import (
    as_json,
    completions_of,
    first_and_last,
    load_side,
    pair_up,
    report,
)
from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.published import PARTS_OF_GAIN
from tools.parts.tables import save_text


@dataclass
class CompareConfig:
    """python -m tools.compare A B [--examples=1] [--out=FILE]"""

    examples: int = 1  # shown of each kind of transition; 0 = none
    out: str = ""  # file for the report in markdown; "" = only printed


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    cfg, _ = configure(CompareConfig, options)
    named = [arg for arg in argv if arg not in options]
    if not 1 <= len(named) <= 2:
        raise UserError(f"{len(named)} things named: python -m tools.compare A B, or one run")
    if cfg.examples < 0:
        raise UserError(f"examples={cfg.examples}: must not be negative")
    if len(named) == 2:
        files = [completions_of(one) for one in named]
    else:
        files = list(first_and_last(named[0]))
    pair = pair_up(*map(load_side, files))
    text = report(pair, PARTS_OF_GAIN, cfg.examples)
    print(text)
    if cfg.out:
        save_text(text, Path(cfg.out))
        print(f"\nsaved: {cfg.out}")
    print(json.dumps(as_json(pair)))


if __name__ == "__main__":
    run(main)
