"""Give random input to every parser of something that a user or a stranger writes.

    python -m tools.fuzz_parsers --n=100000
    python -m tools.fuzz_parsers --only=reward --seed=1

A parser may return a value or raise UserError with a message of one line. Anything else is a fault:
another exception, a message of several lines, or more than --seconds for one input. The parsers:

    reward    a reward expression
    config    a config file
    command   the arguments of a command line
    data      a file of problems
    rows      a file of saved completions
    adapter   adapter_config.json
    metrics   metrics.jsonl, with the step that a state names
    run       config.json of a run

Half of the inputs are made of pieces of valid ones. The others are valid ones with random bytes
changed, or values replaced by values of another type. The last line printed is one JSON object. The
exit status is 1 if there is a fault.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import rewards
from harness.adapters import read_adapter_config
from harness.configurator import configure
from harness.errors import UserError, printable, run
from harness.runfiles import over_its_base, read_history
from sample import SampleConfig
from settings import Config, check, read_settings
from tasks.datasets import load_completions, load_problems

PARSERS = ("reward", "config", "command", "data", "rows", "adapter", "metrics", "run")


@dataclass
class FuzzConfig:
    """Give random input to every parser of something that a user or a stranger writes."""

    n: int = 100_000  # inputs for each parser
    only: str = ""  # one parser; "" = all
    seconds: float = 5.0  # longest time for one input, of this process
    seed: int = 0  # seed of the inputs
    show: int = 5  # faults printed for each parser


# ---------------------------------------------------------------------------------------- inputs

WORDS = """
format python ground_truth random length constant contains majority self_certainty base neg_entropy
none True False None nan inf nf4 tiny adamw base lr steps seed reward model step problem answer
completions correct label prompt content role user config r lora_alpha peft_type LORA bias eval_k
""".split()
SIGNS = [
    *"()[]{}+-*/&|~=,.:;'\"\\#@!<>^%$ \n\t0123456789_",
    *r"** // == 0x 1e9 1e999 -- := lambda: \x00 \ud800".split(),
    *("\x1b[31m", "\0", "\ud800", "\r", "\u2028", "\N{GRINNING FACE}", "\N{DEGREE SIGN}"),
]
LONG = ["(" * 90, "[" * 2000, '{"a":' * 2000, "9" * 5000, "-" * 90, "~" * 90, "x" * 300, "a." * 90]
VALUES = [
    *(None, True, False, 0, -1, 1, 2.5, 1e300, 10**30, 10**400, float("nan"), float("inf")),
    *(
        "",
        "x",
        "x" * 300,
        "\0",
        "\x1b[2J",
        "\ud800",
        "a\nb",
        "1",
        "none",
        "nf4",
        "\N{GRINNING FACE}",
    ),
    *([], [1], ["x"], [[]], {}, {"a": 1}, {"": None}, [None], [{"role": "user", "content": "x"}]),
]


def text(rng: random.Random) -> str:
    """Random text made of words, signs, and now and then something long."""
    parts = rng.choices(WORDS + SIGNS, k=rng.choice((1, 3, 8, 20, 60)))
    if rng.random() < 0.02:
        parts.insert(rng.randrange(len(parts)), rng.choice(LONG))
    return rng.choice(("", " ")).join(parts)


def value(rng: random.Random, depth: int = 0):
    """A random JSON value."""
    if depth < 3 and rng.random() < 0.2:
        return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if depth < 3 and rng.random() < 0.2:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice(VALUES)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, deleted, repeated or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not data:
            break
        i, kind = rng.randrange(len(data)), rng.randrange(5)
        if kind == 0:
            data[i] = rng.randrange(256)
        elif kind == 1:
            del data[i : i + rng.randrange(1, 9)]
        elif kind == 2:
            data[i:i] = data[i : i + rng.randrange(1, 99)]
        elif kind == 3:
            data[i:i] = text(rng).encode(errors="surrogatepass")
        else:
            del data[i:]
    return bytes(data)


def json_input(valid: dict, rng: random.Random) -> bytes:
    """A JSON object like the valid one, with odd values or damaged bytes, or other text."""
    kind = rng.random()
    if kind < 0.1:
        return text(rng).encode(errors="surrogatepass")
    changed = dict(valid)
    if kind < 0.7:
        for _ in range(rng.randrange(4)):
            key = rng.choice([*valid, rng.choice(WORDS)])
            changed[key] = value(rng)
            if rng.random() < 0.2:
                del changed[key]
    try:
        line = json.dumps(changed).encode()
    except ValueError:  # more digits than Python writes
        line = b'{"a": ' + b"9" * 5000 + b"}"
    return damaged(line, rng) if kind > 0.6 else line


# --------------------------------------------------------------------------------------- parsers

EXPRESSIONS = ["format & ~python", "ground_truth + 0.1*length", "random(0.3) - constant(1)"]
EXPRESSIONS += ["self_certainty(base)", "0.5*majority & format", "contains('x') + -0.5*python"]
CONFIG = '"""A run."""\n\nreward = "format"\nlr = 1e-5\nsteps = 20\nadam_betas = (0.9, 0.95)\n'
ROW = {"problem": "1+1?", "answer": "2", "id": "a", "level": 3, "solution": "\\boxed{2}"}
SAVED = {"problem": "x", "answer": "2", "completions": ["a", "b"], "correct": [True, False]}
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
PLAIN |= {"base_model_name_or_path": "tiny", "target_modules": ["q_proj"], "lora_dropout": 0.0}


def parsers(folder: Path) -> dict[str, Callable[[random.Random], Callable[[], object]]]:
    """Name -> a function that prepares an input and returns the call that parses it."""
    config = asdict(Config())

    def written(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    def reward(rng):
        expression = text(rng)
        if rng.random() < 0.5:
            expression = damaged(rng.choice(EXPRESSIONS).encode(), rng).decode(errors="replace")
        return lambda: rewards.parse(expression)

    def config_file(rng):
        content = damaged(CONFIG.encode(), rng)
        if rng.random() < 0.5:
            content = f"{rng.choice(WORDS)} = {text(rng)}\n".encode(errors="surrogatepass")
        path = written("x.py", content)
        return lambda: check(configure(Config, [str(path)])[0])

    def command(rng):
        keys = [*config, *WORDS]
        args = [f"--{rng.choice(keys)}={text(rng)}" for _ in range(rng.randrange(1, 3))]
        return lambda: check(configure(Config, args)[0])

    def data(rng):
        lines = [json_input(ROW, rng) for _ in range(rng.randrange(1, 3))]
        path = written("train.jsonl", b"\n".join(lines))
        return lambda: load_problems(str(path), "train")

    def rows(rng):
        path = written("saved.jsonl", json_input(SAVED, rng))
        return lambda: load_completions(str(path))

    def adapter(rng):
        written("adapter_config.json", json_input(PLAIN, rng))
        cfg = SampleConfig(adapter=str(folder))
        return lambda: (over_its_base(cfg, {}), read_adapter_config(folder))

    def metrics(rng):
        lines = [json_input({"step": i, "reward": 0.5}, rng) for i in range(1, 4)]
        written("metrics.jsonl", b"\n".join(lines) + b"\n")
        return lambda: read_history(folder, {"steps_done": "3", "logged": "3"})

    def run_config(rng):
        written("config.json", b'{"config": ' + json_input(config, rng) + b"}")
        return lambda: read_settings(folder)["model"]

    functions = (reward, config_file, command, data, rows, adapter, metrics, run_config)
    return dict(zip(PARSERS, functions, strict=True))


def fault_of(call: Callable[[], object], seconds: float) -> str:
    """What is wrong with how a parser takes an input; "" if nothing is."""
    started = time.process_time()
    try:
        call()
    except UserError as error:
        if "\n" in str(error):
            return f"several lines: {str(error)!r}"[:200]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    taken = time.process_time() - started
    return f"took {taken:.1f} s" if taken > seconds else ""


def fuzz(name: str, cfg: FuzzConfig, folder: Path) -> list[tuple[int, str]]:
    """Give cfg.n inputs to a parser. Return its faults, as (number of the input, what is wrong)."""
    prepare, faults = parsers(folder)[name], []
    for i in range(cfg.n):
        call = prepare(random.Random(f"{cfg.seed} {name} {i}"))
        if fault := fault_of(call, cfg.seconds):
            faults.append((i, fault))
    return faults


def main(argv: list[str]) -> None:
    cfg, _ = configure(FuzzConfig, argv)
    if cfg.only and cfg.only not in PARSERS:
        raise UserError(f"only={cfg.only}: there are {', '.join(PARSERS)}")
    counts = {}
    for name in [cfg.only] if cfg.only else PARSERS:
        with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
            terminal = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = nowhere  # parsers print notes
            try:
                faults = fuzz(name, cfg, Path(folder))
            finally:
                sys.stdout, sys.stderr = terminal
        counts[name] = len(faults)
        print(f"{name:10}{cfg.n:>10,} inputs {len(faults):>6,} faults", flush=True)
        for i, fault in faults[: cfg.show]:
            print(f"    input {i}: {printable(fault)}")
    print(json.dumps({"inputs": cfg.n, "faults": counts}))
    if any(counts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
