"""The embedded `llama`, a language model of the standard library's text, and the small `llama_draft` beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data.stdlib_text import held_out_documents, training_documents
from data.text import IGNORED, Blocks, TokenStream
from trainers.backbones.language import CONTEXT, Loss, Recipe, build_model, stream_of, train, train_tokenizer
from trainers.backbones.loops import unlearn_loops
from trainers.run_folder import atomic_write
from trainers.text_quality import TextQuality, greedy_continuations, measure_text, repeated_share

VOCABULARY = 4096
BACKBONE = Recipe(minutes=45, hidden_size=256, intermediate_size=640, layers=6, heads=4, key_value_heads=2)
# A sixth of the backbone's time, and of its width and depth what assisted decoding can afford.
DRAFT = Recipe(minutes=7.5, hidden_size=96, intermediate_size=256, layers=2, heads=3, key_value_heads=1)
_WORSE_AT_MOST = 1.03  # bits per byte that may be paid for fewer loops
_JUDGED, _WEIGHED = 20_000, 60_000  # tokens that are judged by while training, and in the choice after it
_PROMPTS, _PROMPT, _NEW = 64, 128, 128


@dataclass(frozen=True)
class Material:
    """Tokenizer and text of both models; `state` is the folder that a killed run continues from."""

    state: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Made once, then read."""
        folder = self.state / "tokenizer"
        if not folder.is_dir():
            train_tokenizer([document.text for document in training_documents()], VOCABULARY).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    @cached_property
    def training(self) -> TokenStream:
        """What is learned from."""
        return stream_of(training_documents(), self.tokenizer)

    @cached_property
    def held_out(self) -> TokenStream:
        """What is judged by."""
        return stream_of(held_out_documents(), self.tokenizer)

    def quality(self, model: LlamaForCausalLM, tokens: int | None = None) -> TextQuality:
        """On the held-out documents, or on their first `tokens`."""
        stream = self.held_out if tokens is None else self.held_out.head(tokens)
        size = sum(len(document.text.encode()) for document in held_out_documents())
        return measure_text(model, stream, round(size * len(stream) / len(self.held_out)), CONTEXT)

    def repeats(self, model: LlamaForCausalLM) -> tuple[float, float]:
        """Repeated share of trigrams in greedy continuations of held-out prompts, and in the text that followed."""
        starts = torch.arange(_PROMPTS) * ((len(self.held_out) - _PROMPT - _NEW) // _PROMPTS)
        place = starts[:, None] + torch.arange(_PROMPT + _NEW)
        prompts, followed = self.held_out.ids[place].split([_PROMPT, _NEW], dim=1)
        return repeated_share(greedy_continuations(model, prompts, _NEW)), repeated_share(followed.tolist())


def train_backbone(material: Material, recipe: Recipe = BACKBONE) -> LlamaForCausalLM:
    """The language model before anything is done about loops."""
    model = build_model(recipe, material.tokenizer)

    def judge() -> str:
        return str(material.quality(model, _JUDGED))

    return train("llama", model, material.training, recipe, material.state / "llama.pt", judge=judge)


def without_loops(material: Material, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model after a phase against loops, taken only as far as the text is predicted (nearly) as well as before."""
    path = material.state / "llama_without_loops.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    most = _WORSE_AT_MOST * material.quality(model, _WEIGHED).bits_per_byte
    print(f"before the phase against loops: {material.repeats(model)[0]:.1%} repeated", flush=True)
    after = copy.deepcopy(unlearn_loops(model, material.training, material.state / "loops.pt").state_dict())
    # Between the weights of before and after, quality and loops change gradually (Wortsman et al. 2022).
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        model.load_state_dict({name: tensor.lerp(after[name], share) for name, tensor in before.items()})
        quality = material.quality(model, _WEIGHED)
        print(f"{share:.0%} of the way: {quality}, {material.repeats(model)[0]:.1%} repeated", flush=True)
        if quality.bits_per_byte <= most:
            break
    atomic_write(path, lambda file: torch.save(model.state_dict(), file))
    return model


def train_draft(material: Material, teacher: LlamaForCausalLM, recipe: Recipe = DRAFT) -> LlamaForCausalLM:
    """A model of the same tokens that says what the teacher would, at a tenth of its work."""
    model = build_model(recipe, material.tokenizer)
    return train("draft", model, material.training, recipe, material.state / "draft.pt", loss_of=_teaching(teacher))


def _teaching(teacher: LlamaForCausalLM) -> Loss:
    """KL divergence from the teacher's next-token distribution."""

    def loss(logits: Tensor, blocks: Blocks) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = teacher(**blocks.model_inputs()).logits[:, :-1]
        known = blocks.labels[:, 1:] != IGNORED
        own = logits[:, :-1][known].float().log_softmax(-1)
        return functional.kl_div(own, wanted[known].float().log_softmax(-1), log_target=True, reduction="batchmean")

    return loss


def made(state: Path, minutes: float) -> tuple[Material, LlamaForCausalLM, LlamaForCausalLM]:
    """Everything in its order: the text, the backbone, the draft.

    Args:
        state: folder of what is kept between runs; a finished part is not trained again.
        minutes: of one core, for the backbone; the draft has a sixth of it.
    """
    torch.set_num_threads(1)  # small matrices: a second thread waits more than it works
    material = Material(state)
    model = without_loops(material, train_backbone(material, replace(BACKBONE, minutes=minutes)))
    draft = train_draft(material, model.requires_grad_(False), replace(DRAFT, minutes=minutes / 6))
    return material, model, draft
