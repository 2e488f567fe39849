"""The figures of an eval as text."""

import json
from pathlib import Path


def percent(x: float | None) -> str:
    return "   -  " if x is None else f"{100 * x:5.1f}%"


def with_error(x: float | None, stderr: float | None) -> str:
    """A share in percent, with its standard error in points."""
    return percent(x) + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def print_summary(summary: dict, folder: Path | None) -> None:
    """Print the figures. The last line is the summary as one JSON object."""
    s = summary
    greedy = "greedy accuracy" if s.get("temperature") == 0 else f"avg@{s['k']}"
    interval = ""
    if s["low"] is not None:
        interval = f" (standard error); 95 % interval {100 * s['low']:.1f} to {100 * s['high']:.1f}"
    print(f"{greedy:<16}{with_error(s['accuracy'], s['stderr'])}{interval}")
    print(f"  with code     {percent(s['accuracy_code'])}")
    print(f"  without       {percent(s['accuracy_language'])}")
    if "lenient_accuracy" in s:
        print(f"lenient         {with_error(s['lenient_accuracy'], s['lenient_stderr'])}")
    if s["k"] > 1 and "maj_at_k" in s:
        print(f"maj@{s['k']:<12}{with_error(s['maj_at_k'], s['maj_stderr'])}")
        shown = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < len(s["pass_curve"])]
        for k in (*shown, len(s["pass_curve"])):
            print(f"pass@{k:<11}{with_error(*s['pass_curve'][k - 1])}")
    for key in ("boxed", "code_frequency", "truncated", "repetition", "agreement"):
        if key in s:
            print(f"{key:<16}{percent(s[key])}")
    print(f"length          {_lengths(s)}")
    for key in ("level", "subject"):
        for name, part in s.get(f"by_{key}", {}).items():
            shown = with_error(part["accuracy"], part["stderr"])
            print(f"{key} {name:<26}{shown}, {part['n']} problems")
    if batch := s.get("batch"):
        print(_batch(batch))
    print(f"problems x k    {s['n']} x {s['k']}")
    if folder:
        print(f"saved           {folder}/completions.jsonl, summary.json")
    print(json.dumps(summary))


def _lengths(s: dict) -> str:
    """The mean length, and that of right and of wrong responses."""
    parts = [("", s["length"]), ("right ", s["length_right"]), ("wrong ", s["length_wrong"])]
    shown = ", ".join(f"{name}{value:.1f}" for name, value in parts if value is not None)
    return f"{shown} {s['length_unit']}"


def _batch(batch: dict) -> str:
    """What the batch changes (evaluation/invariance.py)."""
    return (
        f"batch           {batch['rows']} responses sampled again, one at a time and in reverse "
        f"order: {batch['same']} have the same tokens, {batch['verdicts_differ']} another verdict; "
        f"log-probabilities differ by at most {batch['logprob_gap']:.1e} ({batch['dtype']})"
    )
