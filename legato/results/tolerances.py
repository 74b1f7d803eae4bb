"""Tolerance within which two SAEs count as equal in cost, for all tables, notes and figures."""

SAME = 0.02  # relative to the baseline's: L0, FVU, CE score and alive latents this close are the same
