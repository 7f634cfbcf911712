"""Tiny random language models and drafters that the decode host must get the same text from, whatever they guess."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, Tree, attach_drafter

VOCABULARY = 40
NEW = 24
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # so that texts vary
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_dynamic": lambda: LlamaConfig(
        **SIZES | {"max_position_embeddings": 20},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    ),
    "llama_long": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 20,
        },
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, layer_types=["full_attention"] * 2),
    "qwen2_sliding": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=12, layer_types=["full_attention", "sliding_attention"]
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral_sliding": lambda: MistralConfig(**SIZES, sliding_window=12),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=33,  # learned, and there are no more
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "phi": lambda: PhiConfig(**SIZES, partial_rotary_factor=0.5),
}
TREES = {
    "root": Tree.chain(0),
    "chain": Tree.chain(4),
    "wide": Tree.dense([6]),
    "dense": Tree.dense([3, 2, 2]),
    "sixty_four": Tree.from_choices([(i,) for i in range(21)] + [(i, j) for i in range(21) for j in range(2)]),
}


@functools.cache
def tiny_model(kind: str = "llama", attention: str = "sdpa", vocabulary: int = VOCABULARY) -> Any:
    """A random model in float32; the same one for all who ask, who leave it as it was."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def prompts(batch: int, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts, all but the first left-padded with 0, as unequally as it goes."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : min(2 * row + 1, length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def texts(inputs: dict[str, Tensor], sequences: Tensor) -> list[list[int]]:
    """Prompts and outputs without padding in front."""
    starts = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    return [row[start:] for row, start in zip(sequences.tolist(), starts, strict=True)]


def plain(model: Any, **call: Any) -> Any:
    """Plain decoding, whatever is attached."""
    return type(model).generate(model, **call)


def both(model: Any, drafter: Any, **call: Any) -> tuple[Any, Any, Any]:
    """Plain and drafted decoding of the same call, and what the handle counted."""
    want = plain(model, **call)
    with attach_drafter(model, drafter) as handle:
        got = model.generate(**call)
    return want, got, handle.counts


class Random(Drafter):
    """Guesses anything, now and then nothing; reads the hidden state and leaves the global generator alone."""

    def __init__(self, tree: Tree, vocabulary: int = VOCABULARY) -> None:
        self.tree, self.vocabulary = tree, vocabulary
        self.generator = torch.Generator().manual_seed(0)

    def propose(self, state: DraftState) -> Draft:
        assert state.hidden is not None
        assert state.hidden.shape == (len(state.rows), SIZES["hidden_size"])
        assert [row[-1] for row, on in zip(state.rows, state.active, strict=True) if on] == [
            token for token, on in zip(state.root.tolist(), state.active, strict=True) if on
        ]
        shape = (len(state.rows), len(self.tree) - 1)
        return Draft(self.tree, torch.randint(-1, self.vocabulary, shape, generator=self.generator))

    def memory_bytes(self) -> int:
        return 0


class Knowing(Drafter):
    """Knows the texts.  Guesses them down to `right` levels on one branch (each level's last sibling of it), another
    token everywhere else; with `twins` all siblings carry the right one."""

    needs_hidden = False

    def __init__(self, tree: Tree, known: Sequence[Sequence[int]], right: int = 99, twins: bool = False) -> None:
        self.tree, self.known, self.right, self.twins = tree, known, right, twins
        spine = [0]
        while tree.children[spine[-1]]:
            spine.append(max(tree.children[spine[-1]], key=lambda node: (bool(tree.children[node]), node)))
        self.spine = set(spine)

    def propose(self, state: DraftState) -> Draft:
        tokens = []
        for known, row in zip(self.known, state.rows, strict=True):
            guesses = []
            for node, depth in enumerate(self.tree.depths[1:], start=1):
                at = len(row) + depth - 1
                token = known[at] if at < len(known) else 0
                good = depth <= self.right and (self.twins or node in self.spine)
                guesses.append(token if good else (token + 1) % VOCABULARY)
            tokens.append(guesses)
        return Draft(self.tree, torch.tensor(tokens, dtype=torch.long).reshape(len(tokens), len(self.tree) - 1))

    def memory_bytes(self) -> int:
        return 0


class Ragged(Drafter):
    """A tree of its own for each sequence: chains of what is known, wide trees of nonsense."""

    needs_hidden = False

    def __init__(self, known: Sequence[Sequence[int]]) -> None:
        self.known = known

    def propose(self, state: DraftState) -> Draft:
        trees, tokens = [], []
        for index, (known, row) in enumerate(zip(self.known, state.rows, strict=True)):
            chain = index % 2 == 0
            trees.append(Tree.chain(3) if chain else Tree.from_choices([(0,), (1,), (0, 0)]))
            guesses = (list(known[len(row) : len(row) + 3]) + [-1] * 3)[:3]
            tokens.append(guesses if chain else [guesses[0], 5, guesses[1]])
        return Draft(tuple(trees), torch.tensor(tokens))

    def memory_bytes(self) -> int:
        return 0
