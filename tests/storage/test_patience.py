"""One budget for an operation: what is tried again, for how long, and by nobody else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tenacity import stop_after_attempt

from anytimed.storage import patience
from anytimed.storage.patience import passes, patiently
from anytimed.storage.store import Store, StoreError
from tests.faults import servers
from tests.faults.proxy import Do, proxy
from tests.faults.servers import BUCKET


def test_what_may_pass_is_tried_again_and_an_answer_is_not() -> None:
    tried = []

    def flaky() -> str:
        tried.append(1)
        if len(tried) < 3:
            raise ConnectionResetError
        return "done"

    assert patiently(flaky, 10.0) == "done" and len(tried) == 3
    for answer in (FileNotFoundError(), PermissionError(), FileExistsError(), OSError(22, "refused"), ValueError()):
        assert not passes(answer)
        with pytest.raises(type(answer)):
            patiently(lambda answer=answer: _raise(answer), 10.0)  # type: ignore[misc]


def test_the_budget_ends_it_with_the_last_failure() -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        patiently(lambda: _raise(ConnectionResetError()), 0.5)
    assert time.monotonic() - began < 5


def test_below_us_nobody_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own retries off, a request that is refused is made once, by s3fs and botocore together."""
    with servers.moto(tmp_path) as server, proxy(server.port) as between:
        store = Store(f"s3://{BUCKET}/p", server.options(between.port), deadline_s=20.0)
        store.replace("a", b"1")
        policy = patience._policy

        def once(budget_s: float) -> dict[str, Any]:
            return {**policy(budget_s), "stop": stop_after_attempt(1)}

        for status in (500, 503):
            between.play(lambda seen, status=status: Do(refuse=status if seen.n <= 3 else None))  # type: ignore[misc]
            assert store.read("a", 10) == b"1" and len(between.seen) == 4, "three of ours, then the answer"
            with monkeypatch.context() as patch:
                patch.setattr(patience, "_policy", once)
                between.play(lambda _, status=status: Do(refuse=status))  # type: ignore[misc]
                with pytest.raises(StoreError):
                    store.read("a", 10)
                assert len(between.seen) == 1
        between.play(lambda seen: Do(before=seen.n <= 2))
        assert store.read("a", 10) == b"1" and len(between.seen) == 3, "a broken connection too"


def _raise(error: BaseException) -> Any:
    raise error
