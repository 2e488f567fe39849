"""Write completions as a sample log of lm-evaluation-harness.

    python -m tools.export out/run/eval/step_00300.jsonl samples_math500.jsonl

Nothing is needed for the other direction: commands that read completions read such logs too.
"""

import re
from dataclasses import dataclass

from evaluation.interop import write_lm_eval
from harness.configurator import configure
from harness.errors import UserError, run
from tasks.datasets import load_completions


@dataclass
class ExportConfig:
    """Write a sample log of lm-evaluation-harness: python -m tools.export COMPLETIONS OUT"""


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    files = [arg for arg in argv if arg not in options]
    configure(ExportConfig, options)
    if len(files) != 2:
        raise UserError("name a file of completions and a file to write, in this order")
    rows = load_completions(files[0])
    write_lm_eval(files[1], rows)
    print(f"{files[1]}: {len(rows)} problems, {sum(len(r['completions']) for r in rows)} answers")


if __name__ == "__main__":
    run(main)
