"""Remakes the small backbones that the repository ships, from nothing but installed packages.

python -m trainers.backbones pixart out=outputs/backbones/pixart
python -m trainers.backbones dit out=outputs/backbones/dit
python -m trainers.backbones llama out=outputs/backbones/llama
python -m trainers.backbones needle out=outputs/backbones/needle
"""
