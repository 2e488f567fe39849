"""What tests/test_ranks.py starts by torchrun: train on each configuration of a JSON file."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from harness import ranks
from harness.errors import run
from settings import Config


@ranks.together()
def main(argv: list[str]) -> None:
    for values in json.loads(Path(argv[0]).read_text()):
        train.train(Config(**values))


run(main)
