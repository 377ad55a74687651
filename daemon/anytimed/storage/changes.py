"""What changed between two checkpoints, as far as their manifests tell: no weights are read.

`changes` compares them field by field; `ancestry` follows the parents from the later one back to the earlier one.
Evaluations are compared only where their hold-out is the same, by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from anytimed.contracts import Evaluation, Json

from .manifest import Manifest

_COUNTS = ("records", "held_out", "rejected", "tokens")
"""What a source's lineage counts, in the order in which a person asks."""


def changes(a: Manifest, b: Manifest) -> Json:
    """From A to B, as JSON. Numbers that are the same are left out, but for step, tokens and time."""
    return {
        "a": _told(a),
        "b": _told(b),
        "step": b.step - a.step,
        "tokens": b.tokens - a.tokens,
        "seconds": b.created_s - a.created_s,
        "same_run": a.run_id == b.run_id,
        "config_changed": a.config_digest != b.config_digest,
        "optimizer": differing(a.optimizer, b.optimizer),
        "lineage": _lineage(a.lineage, b.lineage),
        "evaluation": _evaluation(a.evaluation, b.evaluation),
        "interventions": _beyond(a.interventions, b.interventions),
        "flags": {"gone": _beyond(b.flags, a.flags), "new": _beyond(a.flags, b.flags)},
        "files": _files(a, b),
    }


def ancestry(a: Manifest, b: Manifest, published: Sequence[Manifest]) -> Json:
    """`chain`: the ids from B back to A, both with it; `whole`: whether it reaches A. It ends early where a checkpoint
    between is not published any more, or where B does not descend from A."""
    by_id = {manifest.id: manifest for manifest in published if manifest.run_id == b.run_id}
    by_id[b.id] = b
    if a.run_id == b.run_id:
        by_id[a.id] = a
    chain = [b.id]
    while chain[-1] != a.id and (at := by_id.get(chain[-1])) is not None and at.parent and at.parent not in chain:
        chain.append(at.parent)
    return {"chain": chain, "whole": chain[-1] == a.id and a.run_id == b.run_id}


def differing(a: Any, b: Any, path: str = "") -> dict[str, list[Any]]:
    """Leaves of two JSON values that differ, by their path with dots: [in A, in B], null where one is not there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, list[Any]] = {}
        for key in sorted(a.keys() | b.keys(), key=str):
            found |= differing(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if a == b else {path: [a, b]}


# --- within -----------------------------------------------------------------------------------------------------------


def _told(m: Manifest) -> Json:
    names = ("id", "run_id", "term", "seq", "step", "tokens", "created", "parent", "config_digest")
    return {name: getattr(m, name) for name in names}


def _lineage(a: Mapping[str, Any], b: Mapping[str, Any]) -> Json:
    """By source what was read between, and what else of its rule or place changed."""
    found: Json = {}
    for name in sorted(a.keys() | b.keys()):
        ours, theirs = (side.get(name) if isinstance(side.get(name), dict) else None for side in (a, b))
        before, after = ours or {}, theirs or {}
        read = {count: _number(after.get(count)) - _number(before.get(count)) for count in _COUNTS}
        settled = {k: v for k, v in before.items() if k not in (*_COUNTS, "place", "identity")}
        settles = {k: v for k, v in after.items() if k not in (*_COUNTS, "place", "identity")}
        found[name] = {
            "in": "both" if ours is not None and theirs is not None else "b" if theirs is not None else "a",
            **read,
            "changed": differing(settled, settles) if ours is not None and theirs is not None else {},
            "place": [before.get("place"), after.get("place")],
        }
    return found


def _evaluation(a: Evaluation | None, b: Evaluation | None) -> Json | None:
    if a is None and b is None:
        return None
    told: Json = {
        "comparable": a is not None and b is not None and a.holdout == b.holdout,
        "holdout": [e.holdout if e else None for e in (a, b)],
        "at_step": [e.step if e else None for e in (a, b)],
        "targets": [e.tokens if e else None for e in (a, b)],
    }
    for which in ("loss_x", "loss_y", "loss_z"):
        told[which] = [getattr(e, which) if e else None for e in (a, b)]
    if told["comparable"] and a is not None and b is not None:
        told["by_source"] = {
            name: [a.by_source[name].loss_x if name in a.by_source else None, losses.loss_x]
            for name, losses in sorted(b.by_source.items())
        }
    return told


def _files(a: Manifest, b: Manifest) -> Json:
    """By name: the sizes where the content differs; null where a file is in one only."""
    ours, theirs = ({entry.name: entry for entry in m.files} for m in (a, b))
    return {
        name: [ours[name].size if name in ours else None, theirs[name].size if name in theirs else None]
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].sha256 != theirs[name].sha256
    }


def _beyond(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """What is in B and not in A, in B's order."""
    known = {json.dumps(item, sort_keys=True) for item in a}
    return [item for item in b if json.dumps(item, sort_keys=True) not in known]


def _number(value: object) -> int:
    return value if type(value) is int else 0
