"""Callbacks: code of a user's own that is called at set points of the loop.

```
train_step:  forward, backward, update
             on_step       each record that has arrived, `guard.lag_steps` after its step
             on_rollback   where the ladder rolled the run back
             on_eval       after an evaluation
             on_saved      once a checkpoint is committed, or has failed
the end:     on_end        however the run ended
```
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from harness.checkpoint import SaveOutcome
from harness.config import TrainConfig
from harness.data import Loader, Task
from harness.dist import World
from harness.records import StepRecord
from harness.stop import StopRequest
from harness.training.counters import Counters
from harness.user_code import load_function, made_by_user, user_code

__all__ = ["Callback", "Callbacks", "InFlight", "Rollback", "Training", "load_callbacks"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InFlight:
    """What the host knows of a step in flight: its record is still on its way."""

    step_s: float
    """Wall time of the step."""
    samples: tuple[int, int]
    """First and one past the last position of its samples in the order of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """The run went back to an earlier state."""

    step: int
    """The step that comes next."""
    record: StepRecord
    """The step that was one too many."""
    skipped_samples: int
    """How many samples of the global order are stepped over."""


class Training(Protocol):
    """The run as a callback sees it."""

    @property
    def config(self) -> TrainConfig: ...

    @property
    def world(self) -> World: ...

    @property
    def directory(self) -> Path:
        """Of the run; rank 0 alone writes there."""
        ...

    @property
    def task(self) -> Task: ...

    @property
    def model(self) -> nn.Module:
        """As it is trained: plain, under DDP, or sharded by FSDP2."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that steps all parameters, or with Muon what Muon does not."""
        ...

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...

    @property
    def loader(self) -> Loader: ...

    @property
    def counters(self) -> Counters:
        """What was done so far; `counters.step` is the next step, and ahead of the record of `on_step`."""
        ...

    @property
    def in_flight(self) -> Mapping[int, InFlight]:
        """What the host noted of each step whose record has not been handled, by number."""
        ...

    @property
    def stop(self) -> StopRequest:
        """Ends the run in order within a few steps, from any rank: `stop.finish(reason)` as done, with exit
        code 0; `stop.requested = True` as stopped, with 75, which asks launchers to go on later."""
        ...

    def learning_rate(self, step: int) -> float:
        """The schedule's value at `step`."""
        ...

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Puts scalars into the run's log and its mirrors; rank 0's, other ranks' calls do nothing."""
        ...


class Callback:
    """Override what is needed; everything else does nothing.

    All hooks are called on all ranks at the same step with values that are equal on all ranks, so a hook may
    call collectives if it does so on every rank. What a hook raises ends the run with an error that names it.
    The hooks are on the trainer's time: one that reads a tensor waits for the device.

    `state_dict` goes into every checkpoint, rank 0's of all ranks', and comes back when the run is resumed or
    rolled back; a checkpoint from before the callback was added has none for it.
    """

    def __init__(self, config: TrainConfig | None = None) -> None:
        """`--callbacks` calls it with the run's configuration."""

    def on_step(self, run: Training, record: StepRecord) -> None:
        """A step whose record has arrived, `guard.lag_steps` after it; every step once, in order. The ladder
        has not acted on it yet."""

    def on_eval(self, run: Training, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after the step numbered `step`."""

    def on_saved(self, run: Training, outcome: SaveOutcome) -> None:
        """A checkpoint is committed, or has failed. `outcome`'s times are this rank's. Not called of saves
        that end after an error has ended the run, nor of a last one that fails: `on_end` follows."""

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        """The run is back at an earlier step: model, optimizer and this callback's own state are of then."""

    def on_end(self, run: Training, status: str) -> None:
        """The run ended. Unless `status` is `finished` or `stopped` other ranks may be gone: no
        collectives."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, strings, tensors, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""


class Callbacks(Callback):
    """Several as one, called in their order: the trainer's `own`, then the user's. What a user's raises
    becomes a `TaskError` with its name, under which its state is kept too."""

    may_be_missing = True
    """In a checkpoint: those of before the callbacks have no state for them."""

    def __init__(self, users: Sequence[Callback]) -> None:
        self.own: list[Callback] = []
        self._users = _named(users)
        self._has_ended = False

    def on_step(self, run: Training, record: StepRecord) -> None:
        self._call("on_step", lambda callback: callback.on_step(run, record))

    def on_eval(self, run: Training, step: int, metrics: Mapping[str, float]) -> None:
        self._call("on_eval", lambda callback: callback.on_eval(run, step, metrics))

    def on_saved(self, run: Training, outcome: SaveOutcome) -> None:
        self._call("on_saved", lambda callback: callback.on_saved(run, outcome))

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        self._call("on_rollback", lambda callback: callback.on_rollback(run, rollback))

    def on_end(self, run: Training, status: str) -> None:
        self._has_ended = True
        self._call("on_end", lambda callback: callback.on_end(run, status))

    def end_after_error(self, run: Training, status: str) -> None:
        """`on_end` of a run that an error ended, unless it was called; what goes wrong in it is logged, and
        does not take the error's place."""
        if self._has_ended:
            return
        self._has_ended = True
        for callback in (*self.own, *self._users.values()):
            try:
                callback.on_end(run, status)
            except (Exception, SystemExit):
                logger.exception("%s.on_end failed", type(callback).__qualname__)

    def state_dict(self) -> dict[str, Any]:
        states = {}
        for name, callback in self._users.items():
            with _code_of(name, "state_dict"):
                states[name] = callback.state_dict()
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, callback in self._users.items():
            if name in state:
                with _code_of(name, "load_state_dict"):
                    callback.load_state_dict(state[name])
        for name in state.keys() - self._users.keys():
            logger.warning("the checkpoint has state of the callback %s, which this attempt has not", name)

    def _call(self, hook: str, call: Callable[[Callback], None]) -> None:
        for callback in self.own:
            call(callback)
        for name, callback in self._users.items():
            with _code_of(name, hook):
                call(callback)


def load_callbacks(config: TrainConfig) -> list[Callback]:
    """Those that `config.callbacks` names; called by all ranks.

    Raises:
        ConfigError: one cannot be found, or is no `Callback`.
        TaskError: its code raised something.
    """
    return list(_loaded(config))


def _loaded(config: TrainConfig) -> Iterator[Callback]:
    for spec in config.callbacks:
        make = load_function(spec, key="callbacks")
        rule = "it is a subclass of harness.Callback, or a function (TrainConfig) that returns one"
        yield made_by_user(f"callback {spec!r}", make, config, kind=Callback, rule=rule)


def _named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """By class, and by number where there are several of one."""
    seen: Counter[str] = Counter()
    named = {}
    for callback in callbacks:
        name = f"{type(callback).__module__}:{type(callback).__qualname__}"
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name}#{seen[name]}"] = callback
    return named


def _code_of(name: str, hook: str) -> Any:
    return user_code(f"the callback {name}.{hook}", rule="what a callback raises ends the run")
