"""The decode-loop host: drafters guess, the backbone verifies a tree of guesses per call, transformers generates."""

from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.tree import Tree, TreeTables, order_choices

__all__ = ["Draft", "DraftState", "Tree", "TreeTables", "order_choices"]
