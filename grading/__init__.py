"""Decide whether an answer is right. The rule is in docs/GRADING.md.

`correct` grades the last box of each text. `last_boxed` finds an answer, `normalize` gives it one
spelling, and `clusters` finds the equivalent answers of a group.
"""

from grading.answers import is_equiv
from grading.spelling import last_boxed, lenient_answer, normalize
from grading.workers import Grader, clusters, correct, grader

__all__ = ["Grader", "clusters", "correct", "grader"]
__all__ += ["is_equiv", "last_boxed", "lenient_answer", "normalize"]
