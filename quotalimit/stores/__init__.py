"""Where counts live. Each store has a file of its own."""

from quotalimit.stores.base import Store
from quotalimit.stores.default import configure, store_from_url
from quotalimit.stores.memory import MemoryStore

__all__ = ["MemoryStore", "Store", "configure", "store_from_url"]
