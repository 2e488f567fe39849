"""Models from GGUF files, against the model that the file was written from."""

import json

import numpy as np
import pytest
import torch

from harness import gguf
from harness.errors import UserError
from harness.loading import load_model, load_tokenizer

TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(path, model, words):
    """Write a random Qwen2 as a GGUF file in float32, with a vocabulary of single characters."""
    writer = pytest.importorskip("gguf").GGUFWriter(path, "qwen2")
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(words) - 1)
    for name, tensor in model.state_dict().items():
        new = OUTER.get(name)
        if new is None:
            _, _, layer, *middle, kind = name.split(".")
            new = f"blk.{layer}.{TENSORS['.'.join(middle)]}.{kind}"
        writer.add_tensor(new, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_written_from(model_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf, "CACHE", tmp_path / "cache")
    original = load_model(model_folders["qwen2"])
    for weight in original.parameters():
        weight.data = weight.data.bfloat16().float()  # so that storing it in bf16 loses nothing
    size = original.config.vocab_size
    words = [*"abcdefghij", "ab", *(f"w{i}" for i in range(size - 12)), "<|end|>"]
    path = tmp_path / "some model.gguf"
    write_gguf(path, original, words)
    loaded = load_model(str(path))
    tokens = torch.arange(12)[None]
    theirs, ours = original(tokens).logits, loaded(tokens).logits
    assert torch.allclose(theirs, ours, atol=1e-5)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("abj", add_special_tokens=False)["input_ids"] == [10, 9]
    assert tokenizer.eos_token_id == size - 1
    assert capsys.readouterr().out.count("converting") == 1  # once
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"


def test_what_is_no_gguf_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="no such file"):
        load_model(str(tmp_path / "a.gguf"))
    bad = tmp_path / "bad.gguf"
    for content in (b"", b"GGUF", b"text" * 100):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.gguf") as error:
            load_tokenizer(str(bad))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    bad.write_bytes(b"other")
    with pytest.raises(UserError, match="pip install gguf"):
        load_model(str(bad))
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True
