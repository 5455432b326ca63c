"""The ring of weight versions of one pipeline stage."""

from nesterov_pp.stash.leaves import gathers_itself
from nesterov_pp.stash.ring import Backward, Beside, WeightStash

__all__ = ["Backward", "Beside", "WeightStash", "gathers_itself"]
