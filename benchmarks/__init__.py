"""Measurements of the step; ratios in one run, never absolute bars."""
