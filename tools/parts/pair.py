"""What the audits share: base and trained model, samples, scores, and where a result goes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import Problem
from engine import EVAL_NOISE, Generation, decode, generate
from eval import load_for_eval
from harness.errors import UserError
from harness.loading import check_positions, load_model
from harness.progress import Progress
from harness.runfiles import over_its_base, read_config, stale, trained_weights, write_json
from lora import adapter_off
from model import end_token_ids, token_stats
from tasks import tiny

Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids
MICRO_BATCH_TOKENS = 8192  # padded tokens scored at once


@dataclass
class PairConfig:
    """The settings that every audit has."""

    # Which models: a run, or a base model, alone or with what was trained from it
    run: str = ""  # folder of a training run; gives base and trained model, data, prompt, lengths
    model: str = ""  # base model: hub id, folder, or tiny / tiny_bad
    adapter: str = ""  # the trained model as an adapter over the base model, in PEFT's format
    trained: str = ""  # the trained model as a hub id or folder of its own
    quant: Literal["none", "nf4"] = "none"  # nf4: 4-bit weights; not given: as in the adapter
    # How they are asked
    prompt: str = "qwen_math"  # prompt format: qwen_math, simplerl, math_problem, none
    max_prompt_tokens: int = 1024  # longer prompts are dropped; their number is printed
    max_new_tokens: int = 512  # longest response, in tokens
    rollout_rows: int = 64  # responses decoded at once; this bounds the KV cache
    seed: int = 0  # seed of the samples and of the bootstrap
    device: str = "auto"  # auto = cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on cuda, else float32
    out: str = ""  # folder of the JSON file and the figure; "" = the run's, or out/audits-MODEL


def fill(cfg: PairConfig, given: dict) -> PairConfig:
    """Fill in what was not given, from the run's config.json or for the tiny world.

    Raises UserError if no model is named, or if two trained models are.
    """
    if bool(cfg.run) + bool(cfg.trained) + bool(cfg.adapter) > 1:
        raise UserError("run, adapter and trained each name a trained model: keep one of them")
    if cfg.trained and cfg.quant != "none":
        raise UserError(f"quant={cfg.quant}: with trained=... both models are loaded plain")
    values: dict = {}
    if cfg.run:
        saved = read_config(cfg.run)
        same = ("model", "quant", "prompt", "dtype", "max_prompt_tokens", "max_new_tokens")
        values = {key: saved[key] for key in (*same, "rollout_rows")}
        made = trained_weights(cfg.run)
        values["trained" if "model" in made else "adapter"] = next(iter(made.values()))
    elif cfg.adapter:
        cfg = over_its_base(cfg, given)
    if not cfg.run and tiny.is_tiny(cfg.model):
        values = {"prompt": "none", "max_prompt_tokens": 32, "rollout_rows": 1024}
        values["max_new_tokens"] = tiny.RESPONSE_TOKENS
    cfg = replace(cfg, **{key: value for key, value in values.items() if key not in given})
    if not cfg.model:
        raise UserError("nothing to audit: name --run=FOLDER, or --model=...")
    for key in ("max_prompt_tokens", "max_new_tokens", "rollout_rows"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    return cfg


def out_folder(cfg: PairConfig) -> Path:
    """Where an audit writes."""
    if cfg.out:
        return Path(cfg.out)
    return Path(cfg.run) / "audits" if cfg.run else Path("out") / f"audits-{Path(cfg.model).name}"


def save(result: dict, cfg: PairConfig, name: str) -> Path:
    """Write a result as NAME.json beside its settings. Raises UserError if it cannot be written."""
    path = out_folder(cfg) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": vars(cfg), **json.loads(json.dumps(result))})
    except OSError as error:
        raise UserError(f"out={path.parent}: cannot be written: {error}") from error
    return path


class Pair:
    """A base model and, if there is one, the model that was trained from it."""

    def __init__(self, cfg: PairConfig):
        self.model, self.tokenizer = load_for_eval(cfg)
        check_positions(self.model, cfg.max_prompt_tokens, cfg.max_new_tokens)
        self.other: nn.Module | None = None
        if cfg.trained:
            if warning := stale(cfg.trained):
                print(f"warning: {warning}")
            weights = next(self.model.parameters())
            self.other = load_model(
                tiny.resolve(cfg.trained), "none", self.model.dtype, weights.device
            )
            sizes = [m.get_output_embeddings().weight.shape[0] for m in (self.model, self.other)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"trained={cfg.trained}: its vocabulary has {sizes[1]} entries, that of "
                    f"{cfg.model} has {sizes[0]}: name the base model that it was trained from"
                )
        self.names = ("base", "trained") if cfg.trained or cfg.adapter else ("base",)

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """The model `base` or `trained`.

        The trained one runs through its adapter, never merged, so that sampling and scoring are
        those of the base to the bit if training has moved nothing.
        """
        if name == "trained" and self.other is not None:
            yield self.other
            return
        with adapter_off(self.model) if name == "base" else nullcontext():
            yield self.model


@dataclass
class Samples:
    """The responses to some prompts. Row i answers prompt i // copies."""

    generation: Generation
    text: list[str]
    copies: int

    def responses(self, prompt: int) -> list[list[int]]:
        """The token ids of each response to a prompt."""
        g = self.generation
        rows = range(prompt * self.copies, (prompt + 1) * self.copies)
        ends = [(i, int(g.prompt_len[i]), int(g.length[i])) for i in rows]
        return [g.tokens[i, p : p + n].tolist() for i, p, n in ends]


def sample(
    pair: Pair,
    name: str,
    prompts: list[list[int]],
    copies: int,
    temperature: float,
    cfg: PairConfig,
    desc: str,
) -> Samples:
    """Sample responses of one model. Both models get the same random numbers."""
    tokenizer: PreTrainedTokenizerBase = pair.tokenizer
    with pair.use(name) as model, Progress(len(prompts) * copies, desc, leave=False) as progress:
        g = generate(
            model,
            prompts,
            copies,
            cfg.max_new_tokens,
            end_token_ids(model, tokenizer),
            (EVAL_NOISE, cfg.seed),
            temperature,
            max_rows=cfg.rollout_rows,
            progress=progress,
        )
    return Samples(g, decode(tokenizer, g.tokens, g.prompt_len, g.length), copies)


@torch.no_grad()
def score(
    pair: Pair,
    name: str,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
    temperature: float,
    desc: str,
) -> torch.Tensor:
    """Log-probabilities float32 [B, R] of responses under one model, 0 beyond each length.

    tokens is int64 [B, T], right-padded prompt + response; prompt_len and length are int64 [B]. The
    micro-batches depend on the lengths alone, so both models score them in the same shapes.
    """
    found = torch.zeros(len(tokens), int(length.max()))
    total = (prompt_len + length).tolist()
    order = sorted(range(len(tokens)), key=lambda i: -total[i])
    with pair.use(name) as model, tqdm(total=len(order), desc=desc, unit="row", leave=False) as bar:
        while order:
            at_once = max(1, MICRO_BATCH_TOKENS // total[order[0]])
            rows, order = order[:at_once], order[at_once:]
            part = (t[rows].to(model.device) for t in (tokens, prompt_len, length))
            logp = token_stats(model, *part, temperature=temperature, also=()).logp.cpu()
            found[rows, : logp.shape[1]] = logp
            bar.update(len(rows))
    return found


def score_texts(
    pair: Pair, name: str, pieces: list[tuple[list[int], list[int]]], desc: str
) -> list[torch.Tensor]:
    """Log-probabilities of each scored part, given (context ids, scored ids), at temperature 1."""
    contexts, scored = zip(*pieces, strict=True)
    prompt_len = torch.tensor([len(ids) for ids in contexts])
    length = torch.tensor([len(ids) for ids in scored])
    tokens = torch.zeros(len(pieces), int((prompt_len + length).max()), dtype=torch.int64)
    for i, (context, ids) in enumerate(pieces):
        tokens[i, : len(context) + len(ids)] = torch.tensor(context + ids)
    logp = score(pair, name, tokens, prompt_len, length, 1.0, desc)
    return [row[:n] for row, n in zip(logp, length.tolist(), strict=True)]
