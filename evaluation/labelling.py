"""`eval.py --labels=FILE`: make a file of majority labels, or continue it (tasks/labels.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import PROMPTS, prepare
from harness.errors import UserError
from harness.loading import check_positions, choose_device, load_tokenizer
from tasks import labels, tiny
from tasks.datasets import load_problems, subset

# Settings that no label depends on
FREE = ("run", "completions", "out", "labels", "label_by", "rollout_rows", "device", "prompts")
FREE += ("temperatures", "check_batch")


def make_labels(cfg: Any, load: Callable[[Any], tuple]) -> None:
    """Make the file cfg.labels, continue it, or report again what is in it.

    cfg is eval.py's configuration, and load(cfg) returns its model and tokenizer.
    """
    if cfg.k < 2 or cfg.temperature <= 0:
        raise UserError("labels: a majority wants k of 2 or more and a temperature above 0")
    name = tiny.resolve(cfg.model)
    tokenizer = load_tokenizer(name)
    problems = subset(load_problems(tiny.resolve(cfg.data), "train"), cfg.n, cfg.level, cfg.subject)
    items, too_long = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    settings = {key: value for key, value in vars(cfg).items() if key not in FREE}
    # The tiny model's folder is named after its recipe.
    settings["model"] = Path(name).name if tiny.is_tiny(cfg.model) else cfg.model
    settings["dtype"] = str(choose_device(cfg.device, cfg.dtype, name)[1])
    settings["problems"] = labels.fingerprint(items)
    with labels.LabelFile(cfg.labels, settings, len(items)) as file:
        if len(file.rows) < len(items):
            model, _ = load(cfg)
            check_positions(model, cfg.max_prompt_tokens, cfg.max_new_tokens)
            for rows in labels.label(
                model,
                tokenizer,
                items,
                cfg.k,
                cfg.max_new_tokens,
                cfg.seed,
                cfg.temperature,
                cfg.top_p,
                cfg.top_k,
                cfg.rollout_rows,
                first=len(file.rows),
                prefix=PROMPTS[cfg.prompt].prefix,
            ):
                file.add(rows)
        file.finish(cfg.label_by)
    labels.print_labels(labels.summarize(file.rows, cfg.label_by, too_long), file.path)
