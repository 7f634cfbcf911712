"""Language models come frozen, in the dtype asked for, with a tokenizer that pads on the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modules.language_models import load_model
from tests.tiny_language import save_tiny_llama, tiny_llama, tiny_tokenizer


def refusal(name: str, **arguments: Any) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_model(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_is_frozen_and_the_same(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = load_model(str(save_tiny_llama(tmp_path)), dtype=dtype)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    theirs = tiny_llama().state_dict()
    assert all(torch.equal(value, theirs[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert model.dtype == getattr(torch, dtype)
    text = "def f(x):\n\treturn '\u00e4\u20ac\U0001f600'\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_generation_in_a_batch_equals_generation_one_by_one(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(save_tiny_llama(tmp_path)))
    prompts = ["import", "a much longer prompt", "x"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        want = model.generate(**alone, max_new_tokens=8, do_sample=False)[0, alone.input_ids.shape[1] :]
        assert torch.equal(row[: len(want)], want)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|endoftext|>")
    bare.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1].pad_token == "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer).save_pretrained(tmp_path)
    assert "neither a padding nor an end token" in refusal(str(tmp_path))


def test_what_cannot_be_loaded_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    assert refusal(str(tmp_path)) == f"the folder '{tmp_path}' holds no language model: it has no config.json"
    assert refusal(str(tmp_path), dtype="fp32") == "backbone.dtype is 'fp32': it must be float32, bfloat16 or float16"
    tiny_llama().save_pretrained(tmp_path)
    assert "tokenizer cannot be read" in refusal(str(tmp_path))
    monkeypatch.setattr("modules.embedded.EMBEDDED_FOLDER", tmp_path)
    assert refusal("embedded:lama") == "backbone.name is 'embedded:lama', but the embedded language models are none"
    save_tiny_llama(tmp_path / "llama")
    assert refusal("embedded:lama").endswith("the embedded language models are llama")
