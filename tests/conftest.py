"""Small random models of the supported shapes, shared material, and what a GPU test needs."""

import harness  # noqa: F401  (before torch: see harness/__init__.py)

# isort: split

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
torch.set_num_threads(1)  # with small tensors a second thread costs more than it saves
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA: make test-gpu"))


@pytest.fixture(scope="session")
def shared():
    """The folder of reference material beside the checkout. Skips the test if there is none."""
    if not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


def small_config(family: str, **changes):
    """A two-layer config of a supported family, with grouped-query attention."""
    from transformers import LlamaConfig, Olmo2Config, Qwen2Config

    cls = {"qwen2": Qwen2Config, "llama": LlamaConfig, "olmo2": Olmo2Config}[family]
    values = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=family == "qwen2",
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=3,
    )
    return cls(**{**values, **changes})


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Family -> folder of a random model, with weights large enough to spread the logits."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for i, family in enumerate(("qwen2", "llama", "olmo2")):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_config(small_config(family, initializer_range=0.15))
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
    return {family: str(folder) for family, folder in folders.items()}


@pytest.fixture(scope="session")
def tiny_random(tmp_path_factory):
    """The tiny world with an untrained base model, which is built in no time."""
    from tasks import tiny

    folder = tmp_path_factory.mktemp("tiny") / "world"
    tiny.build("tiny", folder, steps=1)
    return str(folder)


def run_config(world: str, folder, **changes):
    """Settings of a run of 32 rollouts per step on the untrained tiny world, with `changes`."""
    from settings import Config

    values = dict(
        model=world,
        quant="none",
        lora_r=4,
        lora_alpha=8,
        gradient_checkpointing=False,
        train_data=world,
        eval_data=world,
        prompt="none",
        max_prompt_tokens=32,
        max_new_tokens=12,
        reward="random(0.5)",
        steps=2,
        prompts_per_step=4,
        group_size=8,
        micro_batch_tokens=200,
        lr=1e-2,
        eval_every=0,
        eval_n=10,
        save_every=0,
        device="cpu",
        dtype="float32",
        out_dir=str(folder),
    )
    return Config(**values | changes)


TIMINGS = ("seconds", "tokens_per_s", "peak_memory")


def comparable(history: list[dict]) -> list[dict]:
    """The metrics of a run without those that differ between equal runs."""
    return [{k: v for k, v in m.items() if not k.startswith(TIMINGS)} for m in history]


def made_up(chat_template: str | None, *special: str):
    """A tokenizer with one token per character, special tokens, and a chat template or None."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<s>", "</s>", "<t>", *special)
    characters = [chr(i) for i in (10, *range(32, 127))]
    vocab = {token: i for i, token in enumerate((*special, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_state(folder: Path, steps_done: int) -> None:
    """Write the records of a run's checkpoint and adapter, without their weights."""
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "nanorlvr.json").write_text(json.dumps({"steps_done": steps_done}))
    metadata = {"steps_done": str(steps_done)}
    save_file({"nothing": torch.zeros(1)}, folder / "state.safetensors", metadata)


def batch(generator_seed: int, n: int = 5, prompt: int = 9, response: int = 14, vocab: int = 97):
    """A right-padded batch of random tokens: tokens [n, T], prompt_len [n], length [n]."""
    g = torch.Generator().manual_seed(generator_seed)
    prompt_len = torch.randint(1, prompt + 1, (n,), generator=g)
    length = torch.randint(1, response + 1, (n,), generator=g)
    tokens = torch.randint(4, vocab, (n, int((prompt_len + length).max())), generator=g)
    return tokens, prompt_len, length
