"""Medusa: heads that guess the tokens after the next one (docs/methods/medusa.md)."""
