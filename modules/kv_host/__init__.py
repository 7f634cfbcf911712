"""The KV-cache host: selectors choose which tokens stay, codecs how they are stored, `generate` is called as before."""

from modules.kv_host.attach import KVHandle, KVHost, attach_cache
from modules.kv_host.cache import KVCache
from modules.kv_host.layer import HeldUnits, NewTokens
from modules.kv_host.policy import CachePolicy
from modules.kv_host.roles import AttentionSite, attention_sites
from modules.kv_host.units import HeadGroup

__all__ = [
    "AttentionSite",
    "CachePolicy",
    "HeadGroup",
    "HeldUnits",
    "KVCache",
    "KVHandle",
    "KVHost",
    "NewTokens",
    "attach_cache",
    "attention_sites",
]
