"""What the arms of a made-up metrics.json are, after their names, as a run saves it."""

import re

NAME = re.compile(r"(?P<method>.+?)(_k(?P<k>\d+))?(_seed(?P<seed>\d+))?")


def identified(arms):
    """The same with role, method, group and seed in every recipe that does not have them."""
    return {name: {**arm, "training": _training(name, arm.get("training") or {})} for name, arm in arms.items()}


def _training(name, training):
    parts = NAME.fullmatch(name).groupdict()
    method, k, recipe = parts["method"], parts["k"], training.get("recipe") or {}
    role = "sweep" if k else "baseline" if method == "baseline" else "named"
    own = {"role": role, "method": method, "group": f"{method}_k{k}" if k else method}
    own |= {key: int(parts[key]) for key in ("k", "seed") if parts[key]}
    return {**training, "recipe": {**own, **recipe}}
