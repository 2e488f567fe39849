"""Measure how long a hostile answer can hold up the trainer, on answers made of pieces of LaTeX.

    python -m tools.fuzz_grader --n=100000

It times what runs in the trainer's process: finding the answer, the repetition check, and
`quick_verdict`. The rest runs in worker processes, which are killed after a second.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

from grading.answers import quick_verdict
from grading.spelling import last_boxed, lenient_answer, normalize
from rewards import repeats

PIECES = (
    r"""
\overrightarrow{AB} \cdot \frac{ \frac12 \sqrt[ \sqrt{ \text{ \text{and} \mbox{cm}^2 \mathrm{ {
} ( ) [ ] | , ; & \\ ^ _ ^{ _{ ^\circ \left( \right) \left\{ \right. \{ \} \pm \cup \in \le < >
= + - * / ! ' " . .. 0 1 2 9 12 1,234 9^{9999} 7^{9999} x y i e \pi \infty \begin{pmatrix}
\end{pmatrix} \begin{array}{cc} \, \! \ ~ $ \$ \% \text{ways} cm and or th st 5th \overline{3}
\binom{ \log_ \sin \approx : 1e9 1e-05 \boxed{ \mathbf{ \color{red}
""".split()
    + list("½²√−π°\N{MATHEMATICAL ITALIC SMALL X}\N{FULLWIDTH DIGIT ONE}")
)


def answers(seed: int) -> Iterator[str]:
    """Endless random answers. In one of three, a few pieces are repeated many times."""
    rng = random.Random(seed)
    while True:
        pieces = rng.choices(PIECES, k=rng.choice((3, 8, 20, 60)))
        if rng.random() < 1 / 3:
            unit = "".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 5)))) + rng.choice(("", " "))
            pieces.insert(rng.randrange(len(pieces)), unit * rng.choice((30, 100, 499)))
        yield rng.choice(("", " ")).join(pieces)[: rng.choice((100, 499, 500, 20_000))]


def longest(n: int, seed: int = 0) -> tuple[float, tuple[str, str]]:
    """The longest processor time of n pairs in the calling process, in seconds, and its pair."""
    found, worst, source = 0.0, ("", ""), answers(seed)
    for _ in range(n):
        answer, gold = next(source), next(source)[:500]
        text = rf"So it is $\boxed{{{answer}}}$."
        started = time.thread_time()
        box = last_boxed(text)
        lenient_answer(text)
        repeats(text)
        for pair in ((box, gold), (answer, gold), (gold, answer)):
            quick_verdict(*pair)
        normalize(gold)
        if (seconds := time.thread_time() - started) > found:
            found, worst = seconds, (answer, gold)
    return found, worst


if __name__ == "__main__":
    options = dict(option.removeprefix("--").split("=", 1) for option in sys.argv[1:])
    seconds, pair = longest(int(options.get("n", 100_000)), int(options.get("seed", 0)))
    print(f"longest time in the calling process: {1000 * seconds:.1f} ms, for {pair[0][:80]!r}")
