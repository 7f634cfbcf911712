"""The folders of serving engines: what is written reads back bit for bit, and what is not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from checkpoints.load import load_adapter
from modules.medusa import MedusaHeads, OutputLayer, heads_of
from tests.test_medusa_heads import heads_for, scramble, small
from trainers import convert
from trainers.medusa.layouts import R_FILE, V_FILE, read_layout, write_layout

LLAMA = small("llama")
LAYER = OutputLayer.of(LLAMA)


def tensors_of(heads: MedusaHeads) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in heads.state_dict().items()}


def written(folder: Path, name: str, vocabulary: str, blocks: int = 1, layer: OutputLayer = LAYER) -> MedusaHeads:
    heads = scramble(heads_for(layer, vocabulary, num_heads=2, num_blocks=blocks))
    write_layout(name, folder, heads.config, tensors_of(heads), layer, "base/model")
    return heads


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "vocabulary", "blocks"),
    [
        ("tgi", "own", 1),
        ("tgi", "own", 2),
        ("tgi", "tied", 1),
        ("vllm", "own", 2),
        ("vllm", "tied", 2),
        ("vllm", "pruned", 1),
    ],
)
@torch.no_grad()
def test_what_is_written_reads_back_bit_for_bit(tmp_path: Path, name: str, vocabulary: str, blocks: int) -> None:
    heads = written(tmp_path / "out", name, vocabulary, blocks)
    config, tensors = read_layout(tmp_path / "out", LAYER)
    assert (config.num_heads, config.num_blocks, config.vocabulary) == (2, blocks, vocabulary)
    again, hidden = heads_of(config, tensors, LLAMA), torch.randn(3, 16)
    assert all(torch.equal(again(hidden, LAYER, head), heads(hidden, LAYER, head)) for head in range(2))
    if vocabulary == "pruned":
        assert torch.equal(again.token_ids, heads.token_ids)


@pytest.mark.parametrize("name", ["tgi", "vllm"])
@torch.no_grad()
def test_low_rank_heads_become_matrices_of_their_own(tmp_path: Path, name: str) -> None:
    heads = written(tmp_path / "out", name, "low_rank")
    config, tensors = read_layout(tmp_path / "out", LAYER)
    hidden = torch.randn(3, 16)
    assert config.vocabulary == "own"
    torch.testing.assert_close(heads_of(config, tensors, LLAMA)(hidden, LAYER, 1), heads(hidden, LAYER, 1))


def test_what_engines_stumble_over_is_in_the_config(tmp_path: Path) -> None:
    written(tmp_path / "tied_r", "tgi", "tied")
    assert config_of(tmp_path / "tied_r")["version"] == "2"
    written(tmp_path / "own_r", "tgi", "own", 2)
    config = config_of(tmp_path / "own_r")
    assert "version" not in config and (config["medusa_num_heads"], config["medusa_num_layers"]) == (2, 2)
    written(tmp_path / "tied_v", "vllm", "tied")
    config, tensors = config_of(tmp_path / "tied_v"), safetensors.torch.load_file(tmp_path / "tied_v" / V_FILE)
    assert config["medusa_fc_bias"] is True and config["original_lm_head"] is True
    assert torch.equal(tensors["lm_head.weight"], LAYER.weight)
    assert config["architectures"] == ["MedusaModel"] and config["model_type"] == "medusa"
    written(tmp_path / "pruned_v", "vllm", "pruned")
    config, tensors = config_of(tmp_path / "pruned_v"), safetensors.torch.load_file(tmp_path / "pruned_v" / V_FILE)
    assert (config["truncated_vocab_size"], config["vocab_size"]) == (8, 40) and len(tensors["token_map"]) == 8
    cohere = OutputLayer.of(small("cohere with a factor"))
    written(tmp_path / "scaled", "vllm", "own", layer=cohere)
    assert config_of(tmp_path / "scaled")["logit_scale"] == cohere.scale != 1
    for folder in tmp_path.iterdir():
        assert "vLLM" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "vocabulary", "blocks", "model", "words"),
    [
        ("tgi", "tied", 2, "llama", "1 block only, and these have 2"),
        ("tgi", "pruned", 1, "llama", "no place for the token map"),
        ("vllm", "own", 1, "phi with an output bias", "no place for the bias"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    tmp_path: Path, name: str, vocabulary: str, blocks: int, model: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path / "out", name, vocabulary, blocks, OutputLayer.of(small(model)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tgi", "vllm"])
@pytest.mark.parametrize("reads", ["root", "path"])
def test_engines_know_no_heads_that_read_tokens(tmp_path: Path, name: str, reads: str) -> None:
    heads = heads_for(LAYER, num_heads=2, reads=reads)
    with pytest.raises(ValueError, match="no place for the matrices with which these heads read"):
        write_layout(name, tmp_path / "out", heads.config, tensors_of(heads), LAYER, "base/model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tgi", "vllm"])
def test_engines_know_no_heads_that_read_other_layers(tmp_path: Path, name: str) -> None:
    heads = heads_for(LAYER, num_heads=2, layers=[1])
    with pytest.raises(ValueError, match=r"no place for what these heads read of layers \[1\]"):
        write_layout(name, tmp_path / "out", heads.config, tensors_of(heads), LAYER, "base/model")
    assert not (tmp_path / "out").exists()


def changed(folder: Path, file: str, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / file)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / file)


@pytest.mark.parametrize(
    ("name", "vocabulary", "change", "words"),
    [
        ("tgi", "own", lambda t: t.pop("1.0.linear.bias"), "lacks heads.1.blocks.0.linear.bias"),
        ("tgi", "own", lambda t: t.pop("0.1.weight"), "lacks heads.0.vocabulary.weight"),
        ("tgi", "own", lambda t: t.update({"norm.weight": torch.ones(2)}), "norm.weight, which is no part"),
        ("tgi", "own", lambda t: t.update({"0.0.linear.weight": torch.ones(16, 8)}), r"is \(16, 8\) in"),
        ("vllm", "own", lambda t: t.pop("blocks.0.layers.0.bias"), "lacks heads.0.blocks.0.linear.bias"),
        ("vllm", "tied", lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        ("vllm", "tied", lambda t: t["lm_head.weight"].add_(1), "is not this backbone's output matrix"),
        ("vllm", "own", lambda t: t.clear(), "no Medusa heads|no residual block"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    tmp_path: Path, name: str, vocabulary: str, change: Any, words: str
) -> None:
    written(tmp_path / "out", name, vocabulary)
    changed(tmp_path / "out", R_FILE if name == "tgi" else V_FILE, change)
    with pytest.raises(ValueError, match=words):
        read_layout(tmp_path / "out", LAYER)


def test_heads_without_biases_have_biases_of_zero(tmp_path: Path) -> None:
    written(tmp_path / "out", "vllm", "own")

    def bare(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    changed(tmp_path / "out", V_FILE, bare)
    _, tensors = read_layout(tmp_path / "out", LAYER)
    assert not tensors["heads.1.blocks.0.linear.bias"].any()


def test_a_pickle_is_named_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match="medusa_lm_head.pt, a pickle, which can run code") as caught:
        read_layout(tmp_path, LAYER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/nowhere/heads", "./heads", "heads", "some/where/heads"])
def test_a_missing_folder_is_named_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert convert.main([f"source={source}", "backbone.name=embedded:llama", "output=adapter"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: source is {source}, and there is no such folder or file: give medusa: folder")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.tiny_medusa import save_tiny

    return save_tiny(tmp_path_factory.mktemp("medusa"))


@pytest.mark.parametrize("name", ["tgi", "vllm"])
def test_published_heads_become_an_adapter(tmp_path: Path, saved: str, name: str, capsys: Any) -> None:
    from tests.tiny_language import tiny_llama

    model = tiny_llama()
    layer = OutputLayer.of(model)
    written(tmp_path / "published", name, "own", layer=layer)
    text = str(Path(saved).with_name("text.jsonl"))
    argv = [f"source={tmp_path / 'published'}", f"backbone.name={saved}", f"output={tmp_path / 'adapter'}"]
    assert convert.main([*argv, f"prompts={text}", "holdout=3", "new_tokens=8", "device=cpu"]) == 0
    with load_adapter(model, tmp_path / "adapter") as handle:
        assert handle.config.counts[0] > 0 and handle.config.vocabulary == "own"
        ids = torch.tensor([[5, 9, 30]])
        got = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, model.generate(input_ids=ids, max_new_tokens=12, do_sample=False))
    (tmp_path / "published" / R_FILE).unlink(missing_ok=True)
    (tmp_path / "published" / V_FILE).unlink(missing_ok=True)
    assert convert.main(argv) == 1
    assert "holds no Medusa heads" in capsys.readouterr().err
