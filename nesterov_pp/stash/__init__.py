"""The ring of weight versions of one pipeline stage."""

from nesterov_pp.stash.leaves import gathers_itself
from nesterov_pp.stash.ring import LineariseAt, Shadow, WeightStash

__all__ = ["LineariseAt", "Shadow", "WeightStash", "gathers_itself"]
