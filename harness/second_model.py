"""A frozen second model that scores the policy's responses: the input of the cross_model reward."""

import torch
from transformers import PreTrainedTokenizerBase

from data import PROMPTS, Rollouts, partition, render_prompt
from harness import ranks
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer
from model import token_stats


def default_second_model(model: str) -> str:
    """The second model where cross_model names none: another family than the trained one."""
    other = {"tiny": "tiny_bad", "tiny_bad": "tiny"}
    return other.get(model, "Qwen/Qwen2.5-1.5B")


class SecondModel:
    """mean_t log q(y_t) of responses under a model q (CME, arXiv 2605.29009), at temperature 1.

    With the policy's own vocabulary, q reads the sampled tokens, prompt included, as they are. With
    another one it reads the problem through its own prompt and the response's text as its own
    tokens, an end token behind a finished one; the mean is then over q's tokens.
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
        """name: hub id or folder; prompt: a format of data.PROMPTS, for another vocabulary.

        Raises UserError where there is no such model, or none that can read the prompt.
        """
        self.tokenizer = load_tokenizer(name)
        self.same = self.tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.prompt = prompt
        if not self.same:
            render_prompt("a problem", prompt, self.tokenizer)  # no chat template? say so now
            if self.tokenizer.eos_token_id is None:
                raise UserError(f"model {name!r}: its tokenizer names no end token")
        self.model = load_model(name, quant, dtype, device)

    @torch.no_grad()
    def mean_logp(self, rollouts: Rollouts, micro_batch_tokens: int) -> torch.Tensor:
        """float32 [B], nats a token; a micro-batch holds at most so many padded tokens."""
        tokens, prompt_len, length = (
            (rollouts.tokens, rollouts.prompt_len, rollouts.length)
            if self.same
            else self._own_tokens(rollouts)
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
        """tokens [B, T] right-padded, prompt_len [B], length [B] in the second model's tokens."""
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
