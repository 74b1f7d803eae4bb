"""When two SAEs count as equal in what they cost, in every table, note and figure alike."""

SAME = 0.02  # relative to the baseline's: L0, FVU, CE score and alive latents this close are the same
