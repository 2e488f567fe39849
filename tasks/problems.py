"""Choose the problems that a run trains on.

Drops held-out problems, requires labels where the reward needs them, and picks one problem for
one-shot training.
"""

from data import Problem
from harness.errors import UserError
from harness.expressions import Reward
from tasks import tiny
from tasks.datasets import drop_overlap, load_problems
from tasks.labels import label_is_right

# The training problem of "one-shot RLVR" (pi_1 of Wang et al., arXiv 2504.20571), in our own words.
# P = k A V^3 gives V = 2048^(1/3) = 12.699. The paper trains on the label 12.8, and so do we.
PI_1 = Problem(
    problem="The pressure P of the wind on a sail varies jointly as the sail's area A and the cube "
    "of the wind's speed V. At V = 8 miles per hour it is P = 4 pounds on A = 2 square feet. At "
    "which speed, in miles per hour, is it 32 pounds on 4 square feet? Write the answer as a "
    "decimal.",
    answer="12.8",
    id="pi_1",
)


def pick_one(problems: list[Problem], which: str) -> Problem:
    """Find the problem with the id `which`, or the only one whose text contains it in any case.

    pi_1 is DeepScaleR's problem about a sail, or PI_1 if the data does not hold it. Raises
    UserError if `which` fits no problem or more than one.
    """
    wanted = "on a sail" if which == "pi_1" else which.casefold()
    found = [p for p in problems if p.id == which]
    found = found or [p for p in problems if wanted in p.problem.casefold()]
    if which == "pi_1" and len(found) != 1:
        return PI_1
    if len(found) != 1:
        raise UserError(
            f"one_shot={which}: {len(found) or 'no'} problems of train_data have this id or "
            "contain this text: give an id, more of the text, or pi_1"
        )
    return found[0]


def training_problems(
    source: str,
    held_out: list[Problem],
    reward: Reward,
    one_shot: str = "",
    model: str = "",
    keep_duplicates: bool = False,
) -> tuple[list[Problem], str]:
    """Load the problems to train on. Also return a line that says what was dropped.

    These are dropped:
     - duplicates, unless keep_duplicates (load_problems prints their number);
     - problems of the eval set;
     - problems without a majority label, if the reward compares with it;
     - problems whose label is right or may be right (labels.label_is_right), for `incorrect`;
     - all problems but one, with one_shot.
    Raises UserError if no problem is left. Its message names `model` as the one to label with.
    """
    in_tiny_world, labels = tiny.is_tiny(source), "label" in reward.needs
    if labels and in_tiny_world and not source.endswith("_labels"):
        source += "_labels"  # the tiny world makes its own labels
    problems = load_problems(tiny.resolve(source), "train", keep_duplicates and not one_shot)
    problems, overlap = drop_overlap(problems, held_out)
    dropped = [f"{overlap} in the eval set"]
    if labels:
        labelled = [p for p in problems if p.label]
        if not labelled:
            raise UserError(
                f"reward={reward}: train_data={source} has no majority labels: make them with "
                f"`python eval.py --labels=labels.jsonl --model={model} --data={source}`, then "
                "--train_data=labels.jsonl"
            )
        dropped.append(f"{len(problems) - len(labelled)} without a label")
        problems = labelled
    if "incorrect" in reward.names:
        golds = [p.answer for p in problems]
        strict, lenient = label_is_right([p.label for p in problems], golds)
        problems = [p for p, right in zip(problems, lenient, strict=True) if not right]
        doubtful = sum(lenient) - sum(strict)
        counts = f"{sum(strict)} with a right label, {doubtful} right by a lenient rule only"
        if not problems:
            raise UserError(
                f"reward={reward}: every label in train_data={source} is right, or may be: {counts}"
            )
        dropped.append(counts)
    if one_shot:
        if one_shot == "pi_1" and in_tiny_world:
            one_shot = problems[0].id  # the tiny world has no sail problem: take its first problem
        problems = [pick_one(problems, one_shot)]
        print(f"one problem, duplicated: {problems[0].problem!r}, answer {problems[0].answer!r}")
    return problems, ", ".join(dropped)
