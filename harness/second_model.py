"""A frozen second model that scores the policy's responses: the input of the cross_model reward."""

import torch
from transformers import PreTrainedTokenizerBase

from data import PROMPTS, Rollouts, partition, render_prompt
from harness import ranks
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from model import token_stats


def default_second_model(model: str) -> str:
    """The second model if cross_model names none. It is of another family than the policy."""
    other = {"tiny": "tiny_bad", "tiny_bad": "tiny"}
    return other.get(model, "Qwen/Qwen2.5-1.5B")


class SecondModel:
    """Computes mean_t log q(y_t) of responses under a model q at temperature 1 (CME, 2605.29009).

    If q has the policy's vocabulary, it reads the sampled prompt and response tokens as they are.
    Otherwise it reads the problem in its own prompt format and the text of the response, both as
    its own tokens. A finished response gets q's end token. The mean is then over q's tokens.
    """

    def __init__(
        self,
        name: str,
        policy_tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        quant: str = "none",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """Load a hub id or folder. prompt is a format of data.PROMPTS, used by another vocabulary.

        Raises UserError if there is no such model, or if it cannot read the prompt.
        """
        self.name = name
        self.tokenizer = load_tokenizer(name)
        self.same = self.tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.prompt = prompt
        if not self.same:
            render_prompt("a problem", prompt, self.tokenizer)  # raises without a chat template
            if self.tokenizer.eos_token_id is None:
                raise UserError(f"model {name!r}: its tokenizer names no end token")
        threads = torch.get_num_threads()
        self.model = load_model(name, quant, dtype, device)
        torch.set_num_threads(threads)  # the policy decides it, and load_model may have changed it
        self.positions = getattr(self.model.config, "max_position_embeddings", None)

    def check_budget(self, max_prompt_tokens: int, max_new_tokens: int) -> None:
        """Compare the longest text of the run, in the policy's tokens, with the model's positions.

        Raises UserError if it does not fit. With another vocabulary the text may have fewer tokens,
        so this only warns, and mean_logp raises UserError for a text that does not fit.
        """
        longest = max_prompt_tokens + max_new_tokens
        if not self.positions or longest <= self.positions:
            return
        message = (
            f"cross_model: max_prompt_tokens + max_new_tokens = {longest} exceeds the "
            f"{self.positions} positions of {self.name}: lower one of them or name another model"
        )
        if self.same:
            raise UserError(message)
        print(f"warning: {message} (its tokens differ, so the texts may still fit)")

    @torch.no_grad()
    def mean_logp(self, rollouts: Rollouts, micro_batch_tokens: int) -> torch.Tensor:
        """Score the responses: float32 [B], nats per token.

        A micro-batch holds at most micro_batch_tokens padded tokens. Raises UserError if a prompt
        and its response are longer than the model's positions.
        """
        tokens, prompt_len, length = (
            (rollouts.tokens, rollouts.prompt_len, rollouts.length)
            if self.same
            else self._own_tokens(rollouts)
        )
        longest = int((prompt_len + length).max())
        if self.positions and longest > self.positions:
            raise UserError(
                f"cross_model: a prompt and its response have {longest} tokens, but {self.name} "
                f"has {self.positions} positions: lower max_new_tokens or name another model"
            )
        device = next(self.model.parameters()).device
        mean = torch.zeros(len(rollouts.text))
        parts = partition((prompt_len + length).tolist(), 1, micro_batch_tokens, 0, 0)
        for part in ranks.deal(parts)[0]:
            batch = (t[part].to(device) for t in (tokens, prompt_len, length))
            logp = token_stats(self.model, *batch, also=()).logp  # [b, R], 0 beyond length
            mean[part] = logp.sum(1).cpu() / length[part]
        ranks.add([mean])  # each rank has filled its rows
        return mean

    def _own_tokens(self, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The texts in the second model's tokens.

        Returns tokens [B, T] (right-padded), prompt_len [B] and length [B].
        """
        problems = {p.problem: None for p in rollouts.problem}
        prompts = {p: render_prompt(p, self.prompt, self.tokenizer) for p in problems}
        prefix = PROMPTS[self.prompt].prefix  # part of the rendered prompt
        responses = [text.removeprefix(prefix) for text in rollouts.text]
        texts = self.tokenizer(responses, add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        responses = [
            ids + end if finished or not ids else ids
            for ids, finished in zip(texts, rollouts.finished.tolist(), strict=True)
        ]
        heads = [prompts[p.problem] for p in rollouts.problem]
        tokens = [torch.tensor(h + r) for h, r in zip(heads, responses, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return padded, torch.tensor([*map(len, heads)]), torch.tensor([*map(len, responses)])
