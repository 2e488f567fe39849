"""When an answer is right. The rule is in docs/GRADING.md.

`correct(texts, golds)` grades a batch; `last_boxed` finds an answer; `normalize` gives it one
spelling; `clusters` says which answers of a group are the same.
"""

from grading.answers import is_equiv
from grading.spelling import last_boxed, lenient_answer, normalize
from grading.workers import Grader, clusters, correct, grader

__all__ = ["Grader", "clusters", "correct", "grader"]
__all__ += ["is_equiv", "last_boxed", "lenient_answer", "normalize"]
