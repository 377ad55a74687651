"""anytimed: continual, anytime training. The reader's side from Python:

    import anytimed

    anytimed.latest("s3://bucket/prefix").step         # what is published now
    anytimed.pull("s3://bucket/prefix", "model").path  # a verified folder that from_pretrained loads

    for checkpoint in anytimed.watch("s3://bucket/prefix", to="model"):  # now, and whenever a newer one comes
        serve(checkpoint.path)

All three import no torch. The optimizers alone are in `anytimed.optim`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anytimed.storage.pull import latest, pull
    from anytimed.storage.watch import watch

__all__ = ["latest", "pull", "watch"]


def __getattr__(name: str) -> Any:
    # Looked up when first used, so that `import anytimed.optim` costs nothing of the store.
    if name == "watch":
        from anytimed.storage import watch as watching

        return watching.watch
    if name in __all__:
        from anytimed.storage import pull as reader

        return getattr(reader, name)
    raise AttributeError(f"module 'anytimed' has no attribute {name!r}")
