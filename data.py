"""Problems, prompts, the batch of rollouts, and the order in which all of these are used.

Whatever is drawn here is a pure function of (seed, step): resuming needs no state, and the same
run walks the same data on any machine.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from harness.errors import UserError

# The first key of every generator: two uses of randomness never share a stream.
SUBSET, ORDER, PARTITION = 101, 102, 103

# Short names of data sets on the Hugging Face hub, as owner/name or owner/name:config.
HUB = {
    "math500": "HuggingFaceH4/MATH-500",
    "math_train": "DigitalLearningGmbH/MATH-lighteval",  # train is Hendrycks' 7,500 rows
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset",
    "gsm8k": "openai/gsm8k:main",
}

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


# Columns that hold a problem as plain text, in the order in which they are looked up.
PROBLEM_COLUMNS = ("problem", "question", "prompt")


@dataclass
class Problem:
    """One problem with a checkable answer."""

    problem: str
    answer: str  # the gold answer, bare: no \boxed, no $
    id: str
    subject: str = ""
    level: str = ""  # "5", however the source writes it
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


# ---- reading problems


def load_problems(
    source: str, split: Literal["train", "test"], keep_duplicates: bool = False
) -> list[Problem]:
    """The problems of a .jsonl or .json file, of a folder with {split}.jsonl, of a name in HUB,
    or of a hub id (owner/name or owner/name:config; cached copies serve without a network).

    A problem that stands in several rows is taken once, from the first of them, unless
    keep_duplicates; a line says how many are distinct. A hub data set with a single split is read
    whatever `split` says. UserError where there is nothing to read, or where a row has no problem
    or no answer (on the hub: left out, counted).
    """
    path = Path(source).expanduser()
    local = source not in HUB and path.exists()
    problems, faults, chats = [], [], 0
    for i, (where, row) in enumerate(
        _file_rows(path, split) if local else _hub_rows(source, split)
    ):
        try:
            problems.append(_problem(row, f"{path.stem}/{i}"))
            chats += not _first(row, *PROBLEM_COLUMNS)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            if local:  # a user can mend a file of theirs
                raise UserError(faults[0]) from None
    if not problems:
        raise UserError(
            faults[0] if faults else f"{source}: empty: it needs one JSON object a line"
        )
    if faults:
        print(f"{source}: {len(faults)} rows left out, such as {faults[0]}", file=sys.stderr)
    if chats:
        print(
            f"{source}: {chats} prompts are chat messages: the user turn is the problem, with any "
            "instructions in it; a system turn is left out, as the prompt format has its own",
            file=sys.stderr,
        )
    return _distinct(problems, source, keep_duplicates)


def _distinct(problems: list[Problem], source: str, keep_duplicates: bool) -> list[Problem]:
    """The first of each distinct problem, or all if asked; a line says how many are distinct."""
    keys = [_key(problem) for problem in problems]
    first: dict[str, Problem] = {}
    for key, problem in zip(keys, problems, strict=True):
        first.setdefault(key, problem)
    if len(first) < len(problems):
        differ = sum(p.answer != first[key].answer for key, p in zip(keys, problems, strict=True))
        print(
            f"{source}: {len(problems)} rows hold {len(first)} distinct problems: "
            + ("all rows are used" if keep_duplicates else "each is used once, by its first row")
            + (f"; {differ} rows give a repeated problem another answer" if differ else ""),
            file=sys.stderr,
        )
    return problems if keep_duplicates else list(first.values())


def _key(problem: Problem) -> str:
    """What two rows with the same problem share: its text, but for case and white space."""
    return " ".join(problem.problem.split()).casefold()


def _file_rows(path: Path, split: str) -> Iterable[tuple[str, Any]]:
    """(where, row) of a file of JSON lines or of one JSON list, or of a folder's {split} file."""
    if path.is_dir():
        folder, path = path, path / f"{split}.jsonl"
        path = path if path.exists() else folder / f"{split}.json"
        if not path.exists():
            raise UserError(f"{folder}: the folder has no {split}.jsonl: name the file itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    line = 1
    try:
        if text.lstrip().startswith("["):
            for i, row in enumerate(json.loads(text), start=1):
                yield f"{path}: row {i}", row
        else:
            for line, content in enumerate(text.split("\n"), start=1):
                if content.strip():
                    yield f"{path}:{line}", json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not JSON: {error.msg}") from None


def _hub_rows(source: str, split: str) -> Iterable[tuple[str, Any]]:
    """(where, row) of a data set on the Hugging Face hub, or of its cached copy."""
    repo, _, config = HUB.get(source, source).partition(":")
    option = f"--{'train' if split == 'train' else 'eval'}_data=path/to/{split}.jsonl"
    advice = f"name a local .jsonl file or folder instead, as in {option}"
    if not re.fullmatch(r"(?!.*\.jsonl?$)[\w.-]+/[\w.-]+", repo):
        names = ", ".join(HUB)
        raise UserError(f"{source}: no such file or folder, nor a hub name (owner/name, {names})")
    import datasets  # slow to import, and of no use to local files
    import huggingface_hub

    was_offline, reached = datasets.config.HF_HUB_OFFLINE, True
    try:
        # asked here because `datasets` retries for 23 s before it gives up
        huggingface_hub.HfApi().dataset_info(repo, timeout=5)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"{source}: no file, folder or public hub data set: {advice}") from None
    except Exception:  # no network, hub down, HF_HUB_OFFLINE=1: a cached copy will do
        datasets.config.HF_HUB_OFFLINE, reached = True, False
    try:
        splits = datasets.load_dataset(repo, config or None)
    except Exception as error:
        reason = str(error).split("\n")[0] if reached else "no hub within reach, no cached copy"
        raise UserError(f"{source} ({repo}): {reason}: {advice}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    if split not in splits and len(splits) > 1:
        raise UserError(f"{source} ({repo}): no split {split!r}, only {', '.join(splits)}")
    rows = splits[split] if split in splits else next(iter(splits.values()))
    for i, row in enumerate(rows):
        yield f"{source}: row {i}", row


def _problem(row: Any, default_id: str) -> Problem:
    """A row of any of the sources. ValueError where it lacks a problem or an answer.

    DAPO-Math-17k has chat messages as its prompt, and the answer in reward_model.ground_truth.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    problem = _first(row, *PROBLEM_COLUMNS) or _user_turn(row.get("prompt"))
    if not problem:
        raise ValueError("the row has no problem (nor question, nor prompt)")
    answer = _first(row, "answer", "final_answer").strip()
    if not answer and isinstance(row.get("reward_model"), dict):
        answer = _first(row["reward_model"], "ground_truth").strip()
    # beside an answer, a label is what a model says; alone, it is the answer
    label = _first(row, "label").strip()
    if not answer:
        answer, label = label, ""
    if "####" in answer:  # GSM8K: the working, then the answer
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if "\\boxed" in answer:  # a sentence with a box: the box; with several, the last one
        answer = last_box(answer)
    answer = answer or last_box(_first(row, "solution"))
    if not answer:
        raise ValueError("the row has no answer (nor a solution with a \\boxed one)")
    return Problem(
        problem=problem,
        answer=answer,
        id=_first(row, "unique_id", "id") or default_id,
        subject=_first(row, "subject", "type"),
        level=_level(_first(row, "level")),
        label=label,
    )


def _user_turn(prompt: Any) -> str:
    """The text of the one user turn in chat messages, "" where it is no such list.

    ValueError where there are several user turns, or turns of the assistant: the problem would
    lose what was said before.
    """
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return ""
    turns = [turn for turn in prompt if turn.get("role") not in ("system", "developer")]
    if [turn.get("role") for turn in turns] != ["user"]:
        raise ValueError("its prompt is a list of messages with other turns than one of the user")
    return _first(turns[0], "content")


def _first(row: dict[str, Any], *keys: str) -> str:
    """The first of the columns that holds something, as text; "" where none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # AMC writes 27.0
        if isinstance(value, str | int | float) and value == value and str(value).strip():
            return str(value)
    return ""


def _level(text: str) -> str:
    return text.lower().removeprefix("level").strip().removesuffix(".0")


def last_box(text: str) -> str:
    r"""What stands in the last \boxed{...} of a solution, "" where there is none.

    MATH also writes a few answers without braces, as `\boxed 2$`.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return ""
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest)[0].rstrip(".")
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip()
    return ""


def load_completions(file: str) -> list[dict]:
    """Rows of a .jsonl of saved completions: problem, answer (str), completions (list of str) and,
    where there are any, correct (one for each completion) and other columns.

    Raises UserError naming the line that is no such row.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--completions={file}: cannot be read as text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from error
        texts = row.get("completions") if isinstance(row, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{file}:{number}: wants completions, a list of one or more strings")
        if row.get("answer") is None:
            raise UserError(f"{file}:{number}: wants an answer")
        correct = row.get("correct")
        if correct is not None and (not isinstance(correct, list) or len(correct) != len(texts)):
            raise UserError(f"{file}:{number}: wants as many of correct as of completions")
        rows.append({"problem": "", **row, "answer": str(row["answer"])})
    if not rows:
        raise UserError(f"{file}: holds no completions")
    return rows


def subset(
    problems: list[Problem], n: int = 0, level: str = "", subject: str = "", seed: int = 0
) -> list[Problem]:
    """Those of a level and a subject (any case), then n of them drawn without replacement.

    File order is kept. n = 0, or more than there are, takes all. UserError where none is left.
    """
    for name, wanted in (("level", _level(level)), ("subject", subject.strip().casefold())):
        kept = [p for p in problems if not wanted or getattr(p, name).casefold() == wanted]
        if not kept:
            there = ", ".join(sorted({getattr(p, name) for p in problems} - {""})) or "none at all"
            raise UserError(f"no problem has {name} {wanted!r}: there is {there}")
        problems = kept
    if not 0 < n < len(problems):
        return problems
    chosen = _rng(SUBSET, seed).choice(len(problems), size=n, replace=False)
    return [problems[i] for i in sorted(chosen)]


def drop_overlap(train: list[Problem], held_out: list[Problem]) -> tuple[list[Problem], int]:
    """train without the problems of held_out (but for case and white space), how many went.

    Four problems of MATH-500 stand word for word in DeepScaleR (arXiv 2506.10947). UserError where
    none is left.
    """
    seen = {_key(p) for p in held_out}
    kept = [p for p in train if _key(p) not in seen]
    if not kept:
        raise UserError("train_data: every problem is in eval_data too: name another one of them")
    return kept, len(train) - len(kept)


# ---- prompts


def render(problem: str, prompt: str, tokenizer: Any) -> list[int]:
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
    rendered = [(p, render(p.problem, prompt, tokenizer)) for p in problems]
    kept = [(p, ids) for p, ids in rendered if len(ids) <= max_prompt_tokens]
    if not kept:
        shortest = min((len(ids) for _, ids in rendered), default=0)
        raise UserError(
            f"max_prompt_tokens={max_prompt_tokens}: the shortest prompt has {shortest}: raise it"
        )
    return kept, len(rendered) - len(kept)


# ---- order


def _rng(*keys: int) -> np.random.Generator:
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
    orders = {epoch: _rng(ORDER, seed, epoch).permutation(n).tolist() for epoch in epochs}
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
    for rows in np.array_split(_rng(PARTITION, seed, step).permutation(len(lengths)), updates):
        micro_batches: list[list[int]] = []
        for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
            current = micro_batches[-1] if micro_batches else []
            if current and (len(current) + 1) * lengths[current[0]] <= micro_batch_tokens:
                current.append(row)
            else:
                micro_batches.append([row])
        steps.append(micro_batches)
    return steps
