"""Published methods as recipes over the existing parts. Importing this package registers them."""

from nesterov_pp.methods.nesterov import NESTEROV, NESTEROV_NO_STASH
from nesterov_pp.methods.pipedream import PIPEDREAM, PIPEDREAM_LR
from nesterov_pp.methods.synchronous import GPIPE, GPIPE_1

__all__ = ["GPIPE", "GPIPE_1", "NESTEROV", "NESTEROV_NO_STASH", "PIPEDREAM", "PIPEDREAM_LR"]
