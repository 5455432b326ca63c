"""Measurements of the step, as ratios within one run and never against absolute thresholds."""
