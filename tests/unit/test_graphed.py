"""What `Graphed` keeps in order around a CUDA graph: inputs, results and memory.

The graph itself is replaced by one that notes operators and repeats them; tests/gpu has the real one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.stability.credible import CredibleNorm
from harness.stability.detectors import RULES, make_rule
from harness.stability.graphed import Graphed


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        result = function(*args, **kwargs)
        self.notes.append((function, args, kwargs, result))
        return result


class _Graph:
    """Like a CUDA graph: recording changes nothing, and a replay works at the addresses of the recording."""

    def capture_begin(self, capture_error_mode: str) -> None:
        self._mode = _Noting()
        self._mode.__enter__()

    def capture_end(self) -> None:
        self._mode.__exit__(None, None, None)
        for tensor, value in reversed(self._mode.before):
            tensor.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, result in self._mode.notes:
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                pairs = [(result, again)] if isinstance(again, Tensor) else zip(result, again, strict=True)
                for place, value in pairs:
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)


@pytest.fixture
def _noting_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Graphed, "_can_record", lambda self, _: self._was_called and not self._refused)


def judged(name: str, *, graphed: bool) -> list[list[float]]:
    """Three hundred samples with spikes and NaN, the memory replaced by its own copy and by an empty one."""
    rule = make_rule(name)

    def judge(norm: Tensor, loss: Tensor, trusted: Tensor) -> tuple[Tensor, ...]:
        verdict = rule.detect(norm, loss, trusted)
        return verdict.flagged, verdict.score, verdict.norm_limit

    call = Graphed(judge, state=lambda: rule.live_state) if graphed else judge
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(300):
        norm = torch.randn((), generator=generator, dtype=torch.float64) * 0.1
        norm += 5.0 if step in (90, 91, 150, 260) else 0.0
        loss = torch.full((), torch.nan) if step == 120 else 3.0 - 0.001 * step + 0.01 * norm
        seen.append([float(value) for value in call(norm, loss.double(), loss.isfinite())])
        if step == 170:
            rule.load_state_dict(rule.state_dict())
        if step == 200:
            rule.load_state_dict({})
    if graphed:
        assert call._recording is not None
    return seen


@pytest.mark.usefixtures("_noting_graphs")
@pytest.mark.parametrize("name", RULES)
def test_a_replayed_rule_judges_as_one_that_is_called(name: str) -> None:
    assert str(judged(name, graphed=True)) == str(judged(name, graphed=False))


@pytest.mark.usefixtures("_noting_graphs")
def test_what_is_credible_is_replayed_as_it_is_called() -> None:
    def absurd(*, graphed: bool) -> list[bool]:
        bound = CredibleNorm(1e4)
        call = Graphed(bound.check) if graphed else bound.check
        seen, state = [], bound.state_dict()
        for step in range(60):
            norm = torch.tensor(1e6 if step % 10 == 9 else 1.0, dtype=torch.float64)
            seen.append(bool(call(norm, torch.tensor(True))[0]))
            if step == 25:
                state = bound.state_dict()
            if step in (30, 45):
                bound.load_state_dict(state if step == 30 else {})
        assert not graphed or call._recording is not None
        return seen

    assert absurd(graphed=True) == absurd(graphed=False)
    assert sum(absurd(graphed=False)) == 5  # not at step 49, which has only three before it


@pytest.mark.usefixtures("_noting_graphs")
def test_a_function_that_cannot_be_recorded_is_called_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: _Graph) -> None:
        _Graph.capture_end(self)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Refusing", (_Graph,), {"capture_end": refuse}))
    memory = {"count": torch.zeros(())}

    def count(step: Tensor) -> tuple[Tensor]:
        memory["count"] = memory["count"] + step
        return (memory["count"].clone(),)

    call = Graphed(count, state=lambda: memory)
    assert [call(torch.ones(()))[0].item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1
