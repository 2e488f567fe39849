"""Does a trace search systematically? Rules for traces that list the permutations of a list.

The task and its terms are those of "Wandering Solution Explorers" (arXiv 2505.20296). The items of
a list are single letters, some of them equal, such as `aab`. A state is a prefix of a permutation.
A trace has one move a line and starts at the empty prefix:

    CHECK(ab)==continue    go one item further; `done` instead where the permutation is complete
    BACKTRACK(a)           go back to a shorter prefix of the present state, () to the start
    END()                  all permutations are found

Prefixes may also be written with commas or spaces, CHECK(a, b). Lines that name no move are prose
and do not count. After a move that is not allowed, the trace goes on from the state which that move
names, if it is a state of this list. So one slip counts once.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

import numpy as np

MOVE = re.compile(r"CHECK\(([^()]*)\)\s*==\s*(continue|done)|BACKTRACK\(([^()]*)\)|(END)\(\)")
STARTED = re.compile(r"(?:CHECK|BACKTRACK|END)\s*\(")  # a line that tries to be a move

# Why a move is not allowed. The first reason that holds is counted.
INVALID = {
    "unreadable": "not one of the three forms",
    "after_end": "a move behind END()",
    "impossible": "uses an item that the list does not have (so often)",
    "jump": "CHECK of a state that is not one item beyond the present one",
    "verdict": "`done` before the permutation is complete, or `continue` when it is",
    "not_back": "BACKTRACK to a state that is not a shorter prefix of the present one",
}


@dataclass
class Audit:
    """What one trace did. Counts are of moves, or of CHECK moves where the name says so."""

    goals: int  # distinct permutations of the list
    found: int = 0  # distinct permutations checked with `done`
    moves: int = 0
    checks: int = 0
    invalid: dict[str, int] = field(default_factory=dict)  # reason -> moves
    repeated: int = 0  # checks of a state that was checked before
    needed: int = 0  # first checks of a state that leads to a permutation found
    ended: bool = False  # END() was written

    @property
    def coverage(self) -> float:
        """Distinct valid permutations / (n! / prod c_k!)."""
        return self.found / self.goals

    @property
    def valid(self) -> bool:
        """Whether each move is allowed."""
        return self.moves > 0 and not self.invalid

    @property
    def effective(self) -> bool:
        """Whether the trace reaches a goal."""
        return self.found > 0

    @property
    def necessary(self) -> bool:
        """Whether no state can be left out: none is repeated, each leads to a goal."""
        return self.checks > 0 and self.needed == self.checks

    @property
    def early_end(self) -> bool:
        """Whether the trace says that it is complete when it is not."""
        return self.ended and self.found < self.goals


def permutation_count(items: str) -> int:
    """The number of distinct permutations of a list: n! / prod c_k!."""
    return math.factorial(len(items)) // math.prod(
        math.factorial(count) for count in Counter(items).values()
    )


def read_moves(trace: str) -> list[tuple[str, str, str]]:
    """The moves of a trace, (kind, path, verdict), with kind check, back, end or unreadable."""
    moves = []
    for line in trace.splitlines():
        found = MOVE.search(line)
        if not found:
            if STARTED.search(line):
                moves.append(("unreadable", "", ""))
            continue
        path, verdict, back, end = found.groups()
        kind = "end" if end else "check" if verdict else "back"
        moves.append((kind, re.sub(r"[,\s]", "", path or back or ""), verdict or ""))
    return moves


def audit(trace: str, items: str) -> Audit:
    """Follow a trace over the list `items` by the rules at the head of this file."""
    result = Audit(permutation_count(items))
    left = Counter(items)
    here, seen, found = "", [], set()
    reasons: Counter[str] = Counter()
    for kind, path, verdict in read_moves(trace):
        result.moves += 1
        if fault := _fault(kind, path, verdict, here, items, left, result.ended):
            reasons[fault] += 1
        if kind == "end":
            result.ended = True
        if kind not in ("check", "back") or fault in ("after_end", "impossible"):
            result.checks += kind == "check"
            continue
        here = path
        if kind == "check":
            result.checks += 1
            seen.append(path)
            if len(path) == len(items) and verdict == "done":
                found.add(path)
    useful = {goal[:n] for goal in found for n in range(1, len(items) + 1)}
    distinct = set(seen)
    result.invalid = dict(reasons)
    result.found, result.repeated = len(found), len(seen) - len(distinct)
    result.needed = len(distinct & useful)
    return result


def _fault(
    kind: str, path: str, verdict: str, here: str, items: str, left: Counter, ended: bool
) -> str:
    """The first reason why a move is not allowed from the state `here`; "" if it is allowed."""
    if kind == "unreadable":
        return "unreadable"
    if ended:
        return "after_end"
    if kind == "end":
        return ""
    if Counter(path) - left:
        return "impossible"
    if kind == "back":
        shorter = here.startswith(path) and len(path) < len(here)
        return "" if shorter else "not_back"
    if path[:-1] != here or not path:
        return "jump"
    return "" if (verdict == "done") == (len(path) == len(items)) else "verdict"


def solved(trace: str, items: str) -> bool:
    """Whether a trace finds every permutation, by allowed moves alone, and ends."""
    one = audit(trace, items)
    return one.valid and one.ended and one.found == one.goals


def answer(trace: str) -> str | None:
    """The number of different prefixes that a trace calls `done`, as text; None without END()."""
    moves = read_moves(trace)
    if not any(kind == "end" for kind, _, _ in moves):
        return None
    return str(len({path for _, path, verdict in moves if verdict == "done"}))


def reference(items: str) -> str:
    """The trace of a depth-first search: valid, necessary, coverage 1."""
    lines, here = [], ""
    for goal in _orderings("".join(sorted(items))):
        shared = len(commonprefix([here, goal]))
        if here:
            lines.append(f"BACKTRACK({goal[:shared]})")
        for n in range(shared + 1, len(goal) + 1):
            lines.append(f"CHECK({goal[:n]})=={'done' if n == len(goal) else 'continue'}")
        here = goal
    return "\n".join([*lines, "END()"])


def _orderings(items: str) -> list[str]:
    """The distinct permutations of sorted items, in lexical order."""
    if not items:
        return [""]
    firsts = [i for i in range(len(items)) if i == 0 or items[i] != items[i - 1]]
    return [items[i] + rest for i in firsts for rest in _orderings(items[:i] + items[i + 1 :])]


def summarize(audits: Sequence[Audit]) -> dict:
    """Means over traces. Shares of moves and checks are over all traces together.

    Standard errors are over traces, None for a single one.
    """
    n = len(audits)
    coverage = np.array([a.coverage for a in audits])
    moves, checks = sum(a.moves for a in audits), sum(a.checks for a in audits)
    reasons: Counter[str] = Counter()
    for one in audits:
        reasons.update(one.invalid)
    return {
        "n": n,
        "coverage": float(coverage.mean()),
        "coverage_stderr": float(coverage.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "complete": float(np.mean([a.found == a.goals for a in audits])),
        "valid": float(np.mean([a.valid for a in audits])),
        "effective": float(np.mean([a.effective for a in audits])),
        "necessary": float(np.mean([a.necessary for a in audits])),
        "moves": moves / n,
        "invalid_moves": sum(reasons.values()) / moves if moves else None,
        "invalid_by_reason": {key: reasons[key] / moves for key in INVALID if reasons[key]},
        "repeated_states": sum(a.repeated for a in audits) / checks if checks else None,
        "needed_states": sum(a.needed for a in audits) / checks if checks else None,
        "early_end": float(np.mean([a.early_end for a in audits])),
        "no_end": float(np.mean([not a.ended for a in audits])),
    }
