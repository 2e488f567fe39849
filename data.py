"""Problems, prompts, the batch of rollouts, and the order in which they are used.

Every random draw here is a pure function of (seed, step). Resuming therefore needs no state, and
the same run uses the same data in the same order on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.errors import UserError

# The first key of each generator. Different uses of randomness never share a stream.
ORDER, PARTITION = 102, 103


@dataclass(frozen=True)
class Prompt:
    """A prompt format: how a problem is written for the model."""

    system: str = ""  # if empty, many chat templates, such as Qwen's, insert their own
    user: str = "{problem}"
    chat: bool = True  # False: the bare problem, without a chat template
    # The response begins with this text. It stands in the prompt's tokens, so no loss is computed
    # on it, but rewards and grader read it as a part of the response.
    prefix: str = ""


BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
# The template of lighteval, which "A Sober Look at Progress" (arXiv 2504.07086) evaluates with.
SOBER = (
    "Solve the following math problem efficiently and clearly. The last line of your response "
    r"should be of the following format: 'Therefore, the final answer is: $\boxed{ANSWER}$. I hope "
    "it is correct' (without quotes) where ANSWER is just the final number or expression that "
    "solves the problem. Think step by step before answering.\n\n{problem}"
)
# The first paragraph of LaTeX's filler text (\lipsum[1]), which says nothing about the problem.
LIPSUM = (
    "Lorem ipsum dolor sit amet, consectetuer adipiscing elit. Ut purus elit, vestibulum ut, "
    "placerat ac, adipiscing vitae, felis. Curabitur dictum gravida mauris. Nam arcu libero, "
    "nonummy eget, consectetuer id, vulputate a, magna. Donec vehicula augue eu neque. "
    "Pellentesque habitant morbi tristique senectus et netus et malesuada fames ac turpis egestas. "
    "Mauris ut leo. Cras viverra metus rhoncus sem. Nulla et lectus vestibulum urna fringilla "
    "ultrices. Phasellus eu tellus sit amet tortor gravida placerat. Integer sapien est, iaculis "
    "in, pretium quis, viverra ac, nunc. Praesent eget sem vel leo ultrices bibendum. Aenean "
    "faucibus. Morbi dolor nulla, malesuada eu, pulvinar at, mollis ac, nulla. Curabitur auctor "
    "semper nulla. Donec varius orci eget risus. Duis nibh mi, congue eu, accumsan eleifend, "
    "sagittis quis, diam. Duis eget orci sit amet orci dignissim rutrum."
)
EXAMPLES = r"""Answer each question with one line.

Question: Tom has 3 pens and buys 4 more. How many pens has he?
Answer: 3 + 4 = \boxed{7}

Question: A box of 12 eggs is shared by 4 people. How many eggs does each get?
Answer: 12 / 4 = \boxed{3}

Question: {problem}"""
PROMPTS: dict[str, Prompt] = {
    # Shao et al., "Spurious Rewards" (arXiv 2506.10947) and its code
    "qwen_math": Prompt(BOXED),
    "none": Prompt(chat=False),
    "simplerl": Prompt(user="{problem}\n" + BOXED),
    "math_problem": Prompt("You are a helpful Assistant.", "Math Problem: {problem}"),
    "sober": Prompt(user=SOBER),
    "spurious": Prompt(user=LIPSUM + "\n\n{problem}"),
    "code_forced": Prompt(BOXED, prefix="Let's solve this using Python."),
    # For small instruct models (docs/LOG.md, "Prompts for small real models")
    "few_shot": Prompt(user=EXAMPLES, prefix="Answer: "),
    "code_habit": Prompt(prefix="I will solve this using"),
    "lets": Prompt(prefix="Let's"),
}


@dataclass
class Problem:
    """One problem with a checkable answer."""

    problem: str
    answer: str  # the gold answer alone, without \boxed and $
    id: str
    subject: str = ""
    level: str = ""  # such as "5", in this form for every source
    kind: str = "math"  # how answers are checked: tasks/answers.py
    label: str = ""  # the majority answer of a base model (eval.py --labels); "" = no label


@dataclass
class Rollouts:
    """The B = prompts x group_size responses of one step. Row i belongs to prompt i // group_size.

    R is the length of the longest response. Column j of a [B, R] tensor belongs to token
    prompt_len + j. Raises ValueError if shapes disagree.
    """

    tokens: torch.Tensor  # int64 [B, T], prompt + response, right-padded
    prompt_len: torch.Tensor  # int64 [B], tokens
    length: torch.Tensor  # int64 [B], response tokens, including the first EOS
    text: list[str]  # the responses, decoded without special tokens, the prompt's prefix included
    problem: list[Problem]
    finished: torch.Tensor  # bool [B], an end token was sampled before the budget ran out
    group_size: int
    seed: int
    step: int
    # The responses with their special tokens, for example a <think> that is a special token.
    # Padding and the end token of a finished response are left out, so raw_text differs from text
    # only by special tokens within the response.
    raw_text: list[str] | None = None
    sampler_logp: torch.Tensor | None = None  # float32 [B, R], computed by the sampler
    # Filled by scoring, float32 [B, R].
    old_logp: torch.Tensor | None = None  # for the loss; from the same micro-batches as the update
    logp: torch.Tensor | None = None  # for rewards; like old_logp, but shared by equal responses
    ref_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    self_certainty: torch.Tensor | None = None
    base_self_certainty: torch.Tensor | None = None  # the same under the base model
    # Filled by the update if tokens are logged: logp - old_logp at the row's own update, else nan.
    log_ratio: torch.Tensor | None = None
    # Name of a second model -> float32 [B], its mean log-likelihood of each response
    # (harness/second_model.py). Filled only if the reward needs it.
    cross_logp: dict[str, torch.Tensor] = field(default_factory=dict)
    # int64 [B], which answers are equivalent (grading.clusters). Filled by the first reward that
    # needs it.
    cluster: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        by_token = ("sampler_logp", "old_logp", "logp", "ref_logp", "entropy", "self_certainty")
        by_token += ("base_self_certainty", "log_ratio")
        shapes = dict.fromkeys(("prompt_len", "length", "finished"), (rows,))
        shapes |= dict.fromkeys(by_token, (rows, int(self.length.max())))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {shape}")
        for name in ("text", "problem", "raw_text"):
            value = getattr(self, name)
            if value is not None and len(value) != rows:
                raise ValueError(f"{name} has {len(value)} rows, not {rows}")
        if rows % self.group_size:
            raise ValueError(f"{rows} rows are not whole groups of {self.group_size}")
        if int((self.prompt_len + self.length).max()) > width:
            raise ValueError(f"tokens is {width} wide: too narrow for a prompt and its response")

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, R], True at response tokens. It uses lengths, since padding may equal EOS."""
        columns = torch.arange(int(self.length.max()), device=self.length.device)
        return columns < self.length[:, None]

    @property
    def twin(self) -> torch.Tensor:
        """int64 [B], the first row of the group with the same response (often the row itself)."""
        first: dict[tuple, int] = {}
        twin = []
        for i, (p, n) in enumerate(
            zip(self.prompt_len.tolist(), self.length.tolist(), strict=True)
        ):
            response = self.tokens[i, p : p + n].tolist()
            twin.append(first.setdefault((i // self.group_size, *response), i))
        return torch.tensor(twin)

    def share_scores_of_twins(self) -> None:
        """Give equal responses of a group the scores of the first of them. This also fills logp.

        Equal responses may be scored in different micro-batches, and then their scores differ by
        rounding. The standard deviation of such a group would be this noise alone, and the
        advantage would divide by it.
        """
        twin = self.twin
        self.logp = self.old_logp[twin]
        for name in ("entropy", "self_certainty", "base_self_certainty"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[twin])
        self.cross_logp = {name: values[twin] for name, values in self.cross_logp.items()}

    @property
    def label(self) -> list[str] | None:
        """The majority label of each row's problem, or None if any problem lacks a label."""
        labels = [problem.label for problem in self.problem]
        return labels if all(labels) else None

    @property
    def to_permute(self) -> list[str] | None:
        """The list that each row's problem permutes, or None if a problem is of another kind."""
        kinds = {problem.kind for problem in self.problem}
        return [p.answer for p in self.problem] if kinds == {"permutations"} else None

    @property
    def prompt_index(self) -> torch.Tensor:
        """int64 [B], the number of the row's prompt in this step."""
        return torch.arange(len(self.text), device=self.length.device) // self.group_size

    @property
    def sample_index(self) -> torch.Tensor:
        """int64 [B], the row's place in its group."""
        return torch.arange(len(self.text), device=self.length.device) % self.group_size


# ---- prompts


def render_prompt(problem: str, prompt: str, tokenizer: Any) -> list[int]:
    """Write the problem in a prompt format of PROMPTS. Return the tokens before the response.

    They end with the format's response prefix. Raises UserError for an unknown format. Raises it
    also if this tokenizer cannot write the chat format: it has no chat template, or the template
    raises an error, or the template leaves out the system text or the problem. The message names
    the formats that work.
    """
    if prompt not in PROMPTS:
        raise UserError(f"unknown prompt {prompt!r}: choose one of {', '.join(PROMPTS)}")
    if not PROMPTS[prompt].chat:
        return _raw(problem, tokenizer)
    try:
        text = _chat(problem, prompt, tokenizer)
    except ValueError as error:
        working = " or ".join(name for name in PROMPTS if _works(problem, name, tokenizer))
        raise UserError(
            f"prompt={prompt}: this tokenizer has {error}: use prompt={working}"
        ) from None
    # The template has already written the BOS, if there is one. Do not add a second one.
    text += PROMPTS[prompt].prefix
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _raw(problem: str, tokenizer: Any) -> list[int]:
    """The tokens of the problem, after the special tokens that start a text (such as BOS).

    Special tokens that a tokenizer adds at the end (such as EOS) are left out, because they would
    end the response before it starts.
    """
    with_special = list(tokenizer(problem)["input_ids"])
    own = list(tokenizer(problem, add_special_tokens=False)["input_ids"])
    n = len(own)
    starts = (i for i in range(len(with_special) - n + 1) if with_special[i : i + n] == own)
    return with_special[: next(starts, 0)] + own


def _chat(problem: str, prompt: str, tokenizer: Any) -> str:
    """Write the problem in a chat format, as text.

    Raises ValueError if that fails. Its message fits after the words "this tokenizer has". Any
    exception is caught, because templates are foreign code. transformers runs them in a sandbox.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("no chat template")
    system = PROMPTS[prompt].system
    user = PROMPTS[prompt].user.replace("{problem}", problem)
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"a chat template that fails ({reason})") from None
    rest = text
    for name, content in (("system text", system), ("problem", user)):
        content = content.strip()  # many templates strip it
        if content not in rest:
            raise ValueError(f"a chat template that leaves out or changes the {name}")
        rest = rest.replace(content, "", 1)
    return text


def _works(problem: str, prompt: str, tokenizer: Any) -> bool:
    """Whether the problem can be written in this format."""
    try:
        return not PROMPTS[prompt].chat or bool(_chat(problem, prompt, tokenizer))
    except ValueError:
        return False


def prepare(
    problems: list[Problem], prompt: str, tokenizer: Any, max_prompt_tokens: int
) -> tuple[list[tuple[Problem, list[int]]], int]:
    """Render all prompts and drop those longer than max_prompt_tokens.

    Returns [(problem, token ids of its prompt)] and the number of dropped problems. Raises
    UserError if no problem is left.
    """
    rendered = [(p, render_prompt(p.problem, prompt, tokenizer)) for p in problems]
    kept = [(p, ids) for p, ids in rendered if len(ids) <= max_prompt_tokens]
    if not kept:
        shortest = min((len(ids) for _, ids in rendered), default=0)
        raise UserError(
            f"max_prompt_tokens={max_prompt_tokens}: the shortest prompt has {shortest}: raise it"
        )
    return kept, len(rendered) - len(kept)


# ---- order


def rng(*keys: int) -> np.random.Generator:
    """Make a generator from keys. The first key tells what the generator is used for.

    Raises UserError for a negative key.
    """
    if min(keys) < 0:
        raise UserError(f"seed={min(keys)}: a seed is 0 or more")
    return np.random.default_rng(keys)


def batch_indices(n: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """Choose the problems of a step: prompts_per_step of the numbers 0 to n - 1.

    Steps count from 0. Each epoch is a new permutation of the problems, and the steps go through
    the epochs in order. No problem is used again before all have been used. A step may span several
    epochs.
    """
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    epochs = {place // n for place in places}
    orders = {epoch: rng(ORDER, seed, epoch).permutation(n).tolist() for epoch in epochs}
    return [orders[place // n][place % n] for place in places]


def partition(
    total_len: Sequence[int] | np.ndarray,
    updates: int,
    micro_batch_tokens: int,
    seed: int,
    step: int,
    idle: Sequence[bool] | np.ndarray | None = None,
) -> list[list[list[int]]]:
    """Split a step's B rows into mini-batches and micro-batches: [updates][micro-batches][rows].

    total_len is [B], prompt + response tokens. Mini-batches are drawn at random. Every row is in
    exactly one, and their sizes differ by at most one. Each mini-batch is sorted by decreasing
    length and cut into micro-batches of at most micro_batch_tokens padded tokens (rows x longest).
    A longer row is a micro-batch of its own. idle is bool [B], the rows whose gradient is 0. They
    get micro-batches of their own, which the update can leave out. The mini-batches do not depend
    on it. Raises UserError if there are fewer rows than updates.
    """
    lengths = np.asarray(total_len)
    idle = np.zeros(len(lengths), bool) if idle is None else np.asarray(idle)
    if len(lengths) < updates:
        raise UserError(f"updates={updates}: a step has only {len(lengths)} rollouts to share out")
    steps = []
    for rows in np.array_split(rng(PARTITION, seed, step).permutation(len(lengths)), updates):
        micro_batches: list[list[int]] = []
        for row in rows[np.lexsort((-lengths[rows], idle[rows]))].tolist():  # stable; idle last
            current = micro_batches[-1] if micro_batches else []
            fits = (len(current) + 1) * lengths[current[0]] <= micro_batch_tokens if current else 0
            if fits and idle[current[0]] == idle[row]:
                current.append(row)
            else:
                micro_batches.append([row])
        steps.append(micro_batches)
    return steps
