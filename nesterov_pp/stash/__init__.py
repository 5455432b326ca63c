"""The ring of weight versions of one pipeline stage."""

from nesterov_pp.stash.forms import FORMS, OldVersions, ring_bytes
from nesterov_pp.stash.leaves import gathers_itself
from nesterov_pp.stash.ring import LineariseAt, Shadow, WeightStash

__all__ = ["FORMS", "LineariseAt", "OldVersions", "Shadow", "WeightStash", "gathers_itself", "ring_bytes"]
