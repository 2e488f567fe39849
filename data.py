"""Problems, prompts, the batch of rollouts, and the order in which all of these are used.

Whatever is drawn here is a pure function of (seed, step): resuming needs no state, and the same
run walks the same data on any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.errors import UserError

# The first key of every generator: two uses of randomness never share a stream.
ORDER, PARTITION = 102, 103

# name -> (system, user) through the model's chat template, or None: the problem and nothing else.
# With an empty system many templates put in one of their own, Qwen's among them.
# Source: Shao et al., "Spurious Rewards" (arXiv 2506.10947) and its code.
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
PROMPTS: dict[str, tuple[str, str] | None] = {
    "qwen_math": (BOXED, "{problem}"),
    "none": None,
    "simplerl": ("", "{problem}\n" + BOXED),
    "math_problem": ("You are a helpful Assistant.", "Math Problem: {problem}"),
}


@dataclass
class Problem:
    """One problem with a checkable answer."""

    problem: str
    answer: str  # the gold answer, bare: no \boxed, no $
    id: str
    subject: str = ""
    level: str = ""  # "5", however the source writes it
    kind: str = "math"  # what a right answer is: tasks/answers.py
    label: str = ""  # the majority answer of a base model (eval.py --labels), "" = none made


@dataclass
class Rollouts:
    """The B = prompts x group_size responses of one step; row i belongs to prompt i // group_size.

    R is the longest response: column j of a [B, R] tensor belongs to token prompt_len + j.
    Raises ValueError where shapes disagree.
    """

    tokens: torch.Tensor  # int64 [B, T], prompt + response, right-padded
    prompt_len: torch.Tensor  # int64 [B], tokens
    length: torch.Tensor  # int64 [B], response tokens, the first EOS included
    text: list[str]  # the responses, decoded without special tokens
    problem: list[Problem]
    finished: torch.Tensor  # bool [B], an end token was sampled before the budget ran out
    group_size: int
    seed: int
    step: int
    # the responses with their special tokens, such as a <think> that is one; the end token of a
    # finished response and padding are left out, so that it differs from text by special tokens
    raw_text: list[str] | None = None
    sampler_logp: torch.Tensor | None = None  # float32 [B, R], as the sampler saw it
    # filled by scoring, float32 [B, R]
    old_logp: torch.Tensor | None = None  # of the update's own micro-batches: for the loss
    logp: torch.Tensor | None = None  # the same for rewards, equal for equal responses of a group
    ref_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    self_certainty: torch.Tensor | None = None
    base_self_certainty: torch.Tensor | None = None  # of the same tokens under the base model
    # filled where the reward asks for it: name of a second model -> float32 [B], its mean
    # log-likelihood of each response (harness/second_model.py)
    cross_logp: dict[str, torch.Tensor] = field(default_factory=dict)
    # int64 [B], which answers are the same (grading.clusters); filled by the first reward that asks
    cluster: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        by_token = ("sampler_logp", "old_logp", "logp", "ref_logp", "entropy", "self_certainty")
        by_token += ("base_self_certainty",)
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
        """bool [B, R], True at response tokens: from lengths, since pad may equal EOS."""
        columns = torch.arange(int(self.length.max()), device=self.length.device)
        return columns < self.length[:, None]

    @property
    def twin(self) -> torch.Tensor:
        """int64 [B], the first row of the group with the same response, often the row itself."""
        first: dict[tuple, int] = {}
        twin = []
        for i, (p, n) in enumerate(
            zip(self.prompt_len.tolist(), self.length.tolist(), strict=True)
        ):
            response = self.tokens[i, p : p + n].tolist()
            twin.append(first.setdefault((i // self.group_size, *response), i))
        return torch.tensor(twin)

    def share_scores_of_twins(self) -> None:
        """Give equal responses of a group equal scores, those of the first; fills logp.

        They are scored in several micro-batches, so their scores differ by rounding. A group's
        standard deviation would be made of that noise alone, and the advantage divides by it.
        """
        twin = self.twin
        self.logp = self.old_logp[twin]
        for name in ("entropy", "self_certainty", "base_self_certainty"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[twin])
        self.cross_logp = {name: values[twin] for name, values in self.cross_logp.items()}

    @property
    def label(self) -> list[str] | None:
        """The majority label of each row's problem, None where not every problem has one."""
        labels = [problem.label for problem in self.problem]
        return labels if all(labels) else None

    @property
    def prompt_index(self) -> torch.Tensor:
        """int64 [B], the row's prompt in this step."""
        return torch.arange(len(self.text), device=self.length.device) // self.group_size

    @property
    def sample_index(self) -> torch.Tensor:
        """int64 [B], the row's place in its group."""
        return torch.arange(len(self.text), device=self.length.device) % self.group_size


# ---- prompts


def render_prompt(problem: str, prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of the problem in the prompt format PROMPTS[prompt], ready for the response.

    UserError for an unknown format, and for a chat format that this tokenizer's template cannot
    write: without a template, where it raises, or where it leaves out the system text or the
    problem. The message names the formats that work.
    """
    if prompt not in PROMPTS:
        raise UserError(f"unknown prompt {prompt!r}: choose one of {', '.join(PROMPTS)}")
    if PROMPTS[prompt] is None:
        return _raw(problem, tokenizer)
    try:
        text = _chat(problem, prompt, tokenizer)
    except ValueError as error:
        working = " or ".join(name for name in PROMPTS if _works(problem, name, tokenizer))
        raise UserError(
            f"prompt={prompt}: this tokenizer has {error}: use prompt={working}"
        ) from None
    # the template has written the BOS, if any: a second one would be added here
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _raw(problem: str, tokenizer: Any) -> list[int]:
    """The problem's own tokens behind the special tokens that a text begins with (such as BOS).

    Those that a tokenizer puts at the end (such as EOS) would end the response before it began.
    """
    with_special = list(tokenizer(problem)["input_ids"])
    own = list(tokenizer(problem, add_special_tokens=False)["input_ids"])
    n = len(own)
    starts = (i for i in range(len(with_special) - n + 1) if with_special[i : i + n] == own)
    return with_special[: next(starts, 0)] + own


def _chat(problem: str, prompt: str, tokenizer: Any) -> str:
    """The problem in a chat format, as text. ValueError, to follow "it has", where it cannot be.

    Templates are foreign code: transformers runs them in a sandbox, and they may raise anything.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("no chat template")
    system, user = PROMPTS[prompt]
    user = user.replace("{problem}", problem)
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"a chat template that fails ({reason})") from None
    rest = text
    for name, content in (("system text", system), ("problem", user)):
        content = content.strip()  # as many templates do
        if content not in rest:
            raise ValueError(f"a chat template that leaves out or changes the {name}")
        rest = rest.replace(content, "", 1)
    return text


def _works(problem: str, prompt: str, tokenizer: Any) -> bool:
    """Whether the problem can be written in this format."""
    try:
        return PROMPTS[prompt] is None or bool(_chat(problem, prompt, tokenizer))
    except ValueError:
        return False


def prepare(
    problems: list[Problem], prompt: str, tokenizer: Any, max_prompt_tokens: int
) -> tuple[list[tuple[Problem, list[int]]], int]:
    """[(problem, its prompt's token ids)] without those over max_prompt_tokens, how many went.

    UserError where none is left.
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
    """A generator that is a function of its keys; the first says what it is used for."""
    if min(keys) < 0:
        raise UserError(f"seed={min(keys)}: a seed is 0 or more")
    return np.random.default_rng(keys)


def batch_indices(n: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """The prompts_per_step of n problems that step (from 0) trains on.

    Each epoch is a permutation of its own, and the steps walk through one after the other: no
    problem comes back before all have been used, and a step may lie across two epochs.
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
) -> list[list[list[int]]]:
    """[updates][micro-batches][row numbers]: how a step's B rows are shared out, drawn once.

    total_len: [B], prompt + response tokens. Mini-batches are drawn at random; their sizes differ
    by one at most and every row is in one. Inside each, rows go by falling length into
    micro-batches of at most micro_batch_tokens padded tokens (rows x longest), or of one row.
    """
    lengths = np.asarray(total_len)
    if len(lengths) < updates:
        raise UserError(f"updates={updates}: a step has only {len(lengths)} rollouts to share out")
    steps = []
    for rows in np.array_split(rng(PARTITION, seed, step).permutation(len(lengths)), updates):
        micro_batches: list[list[int]] = []
        for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
            current = micro_batches[-1] if micro_batches else []
            if current and (len(current) + 1) * lengths[current[0]] <= micro_batch_tokens:
                current.append(row)
            else:
                micro_batches.append([row])
        steps.append(micro_batches)
    return steps
