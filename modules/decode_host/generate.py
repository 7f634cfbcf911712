"""The decode loop: draft, verify, commit, emit; a `custom_generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from modules.contracts import Drafter
from modules.decode_host.backbone import Backbone, stepping
from modules.decode_host.counts import Counts
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.output import Output
from modules.decode_host.rules import Exact, Rule, Sampled
from modules.decode_host.tree import Tree, TreeTables
from modules.decode_host.verify import Verdict, Verifier

ROOT_ALONE = Tree.chain(0)
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class DraftedDecoding:
    """Greedy decoding and sampling of a causal language model, sped up by a drafter.

    Goes into `model.generate(..., custom_generate=...)`; `attach_drafter` makes that the model's default.  Greedy text
    is that of plain decoding, sampled text has its law.

    Attributes:
        counts: what was done so far.
    """

    def __init__(self, drafter: Drafter, sampling: Rule | None = None) -> None:
        """`sampling`: acceptance when sampling, where it is not to be exact."""
        self.drafter, self.sampling, self.counts = drafter, sampling, Counts()

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What transformers calls, with what it has prepared.

        Raises:
            ValueError: a request that drafted decoding cannot serve, in one sentence.
        """
        config = generation_config
        _check(model, config, synced_gpus)
        output = Output(
            input_ids, model_kwargs.get("attention_mask"), stopping_criteria, config, streamer, model.device
        )
        rule = (self.sampling or Sampled()) if config.do_sample else Exact()
        keeps = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        verifier = Verifier(rule, logits_processor, len(input_ids), keeps)
        backbone = Backbone(model, self.drafter.needs_hidden, self.drafter.hidden_layers)
        self.counts.generations += 1
        self.drafter.begin(output.rows)
        with backbone.decoding(), model._optimize_model_for_decode(), ExitStack() as steps:
            logits = backbone.prefill(input_ids, config, model_kwargs)
            steps.enter_context(stepping())
            vocabulary = logits.shape[-1]
            trees, tokens = [ROOT_ALONE], input_ids[:, -1:].to(logits.device)
            verdict = verifier(logits, tokens, trees, ROOT_ALONE.tables(logits.device), output.context, output.active)
            self._emit(output, verdict, verifier, logits, trees)
            while any(output.active):
                trees, tokens = self._draft(output, verdict, backbone)
                tables = trees[0].tables(tokens.device) if len(trees) == 1 else TreeTables.of(trees, tokens.device)
                logits = backbone(tokens.clamp(0, vocabulary - 1), tables)
                active = output.active
                verdict = verifier(logits, tokens, trees, tables, output.context, active)
                taken = self._emit(output, verdict, verifier, logits, trees)
                self._count(taken, trees, active)
                paths = [_tree(trees, row).paths[verdict.last[row]][:count] for row, count in enumerate(taken)]
                backbone.commit(paths, output.active)
        self.drafter.end(output.rows)
        return output.result(config, backbone.finish())

    def _draft(self, output: Output, verdict: Verdict, backbone: Backbone) -> tuple[list[Tree], Tensor]:
        """The trees and tokens [B, M] of the next step, the root's token first."""
        root, depth = verdict.root[:, None], backbone.depth(output.room - 1)
        if depth == 0 or backbone.room == 1:
            return [ROOT_ALONE], root
        hidden = backbone.hidden
        if hidden is not None:
            hidden = _at(hidden, verdict.last)
        draft = self.drafter.propose(DraftState(output.rows, verdict.root, hidden, output.active, depth + 1))
        trees = [draft.tree] if isinstance(draft.tree, Tree) else list(draft.tree)
        _check_draft(draft, trees, len(root), type(self.drafter).__name__)
        kept = min(len(tree.no_deeper(depth)) for tree in trees)
        if backbone.room is not None:
            kept = min(kept, backbone.room)
        tokens = torch.cat([root, draft.tokens[:, : kept - 1].to(root.device)], dim=1)
        return [tree.prefix(kept) for tree in trees], tokens

    def _emit(
        self, output: Output, verdict: Verdict, verifier: Verifier, logits: Tensor, trees: Sequence[Tree]
    ) -> list[int]:
        """Hands the kept tokens out; returns how many of each sequence."""
        taken = []
        for row, active in enumerate(output.active):
            if active and verdict.scores is not None:
                path = list(_tree(trees, row).paths[verdict.last[row]])
                output.record(row, verdict.scores[row], logits[row, path].float())
            taken.append(output.take(row, verdict.tokens[row]) if active else 0)
        verifier.rule.advance([count for count in taken if count])
        output.stream()
        return taken

    def _count(self, taken: Sequence[int], trees: Sequence[Tree], active: Sequence[bool]) -> None:
        grown = [count for count, grew in zip(taken, active, strict=True) if grew]
        self.counts.steps += 1
        self.counts.sequence_steps += len(grown)
        self.counts.tokens += sum(grown)
        self.counts.nodes += len(grown) * len(trees[0])
        self.counts.accepted.update(count - 1 for count in grown)


def _at(hidden: Tensor, nodes: Sequence[int]) -> Tensor:
    """[B, D] at a node of each sequence."""
    if len(nodes) == 1:
        return hidden[:, nodes[0]]
    rows = torch.arange(len(nodes), device=hidden.device)
    return hidden[rows, torch.tensor(nodes, device=hidden.device)]


def _tree(trees: Sequence[Tree], row: int) -> Tree:
    return trees[row if len(trees) > 1 else 0]


def _check(model: Any, config: Any, synced_gpus: bool) -> None:
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise ValueError(
            f"drafted decoding is for greedy decoding and sampling, and this is {mode.value}: leave custom_generate out"
        )
    if model.config.is_encoder_decoder:
        raise ValueError("drafted decoding is for decoder-only models, and this is an encoder-decoder")
    if synced_gpus:
        raise ValueError("drafted decoding cannot keep sharded replicas in step: set synced_gpus=False")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("drafted decoding has no attentions or hidden states per token to return: leave them out")


def _check_draft(draft: Draft, trees: Sequence[Tree], batch: int, name: str) -> None:
    shape = (batch, len(trees[0]) - 1)
    if draft.tokens.shape != shape or len(trees) not in (1, batch) or len({len(tree) for tree in trees}) > 1:
        raise ValueError(
            f"{name} proposes tokens {tuple(draft.tokens.shape)} for {len(trees)} trees of "
            f"{sorted({len(tree) for tree in trees})} nodes: give [sequences, nodes - 1] = {shape}"
        )
