"""Spikes as the guard acts on them, and what a NaN does to its judgement: nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import ConfigError, InstabilityError
from harness.records import StepRecord
from harness.stability import Incident, Ladder, StepGuard
from harness.stability.detectors import RULES
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

WARM = 80
"""Steps after which the default rule speaks."""


class _Run:
    """A guarded model whose gradients and losses are made up, step by step."""

    def __init__(self, **settings: Any) -> None:
        self.model = make_model()
        self.optimizer = OPTIMIZERS["adamw"](self.model.parameters())
        self.guard = StepGuard(self.model, self.optimizer, lag_steps=0, ladder=False, **settings)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, *, factor: float = 1.0, nan: bool = False) -> StepRecord:
        """One step with a gradient of norm about `factor`."""
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.grad = noise * factor / 11
        if nan:
            next(self.model.parameters()).grad.view(-1)[0] = math.nan
        loss = 2.0 + 0.01 * torch.randn((), generator=self.generator)
        self.guard.step(loss)
        (record,) = self.guard.drain()
        return record


def _warm(**settings: Any) -> _Run:
    run = _Run(max_norm=None, **settings)
    for _ in range(WARM):
        assert not run.step().is_spike
    return run


def test_warn_applies_the_step_and_says_why_it_stands_out() -> None:
    run = _warm(spike="warn")
    record = run.step(factor=100.0)
    assert (record.verdict, record.is_spike) == ("apply", True)
    assert record.reason is not None
    assert record.reason.startswith("spike: gradient norm")
    assert record.spike_score > 6


def test_clip_brings_a_spike_down_to_a_usual_norm() -> None:
    run = _warm(spike="clip")
    record = run.step(factor=100.0)
    assert (record.verdict, record.is_spike) == ("clip", True)
    assert 0.5 < record.grad_norm * record.clip_coef < 2
    assert run.step().verdict == "apply"


def test_skip_leaves_everything_as_it_was() -> None:
    run = _warm(spike="skip")
    before = snapshot(run.model, run.optimizer)
    assert run.step(factor=100.0).verdict == "skip"
    assert worst_difference(before, snapshot(run.model, run.optimizer)) == ""


def test_an_outlier_batch_is_a_note_and_no_incident() -> None:
    run = _warm(spike="warn")
    record = run.step(factor=8.0)
    assert (record.verdict, record.is_outlier, record.is_spike) == ("apply", True, False)
    assert record.reason is None
    assert record.note is not None
    assert record.note.startswith("outlier batch: gradient norm ")
    assert Incident.of(record) is None
    outlier = Incident.of(record, outliers=True)
    assert outlier is not None
    assert outlier.is_outlier
    assert run.step().note is None


def test_a_disturbance_of_three_steps_is_an_incident() -> None:
    run = _warm(spike="warn")
    records = [run.step(factor=8.0) for _ in range(4)]
    assert [r.is_outlier for r in records] == [True, True, False, False]
    assert [r.is_spike for r in records] == [False, False, True, True]
    assert records[2].reason is not None
    assert records[2].reason.endswith(f"disturbed since step {WARM}")


def test_clip_acts_on_outlier_batches_and_skip_makes_incidents_of_them() -> None:
    clipped = _warm(spike="clip").step(factor=8.0)
    assert (clipped.verdict, clipped.is_outlier, clipped.clipped_by_spike) == ("clip", True, True)
    assert 0.5 < clipped.grad_norm * clipped.clip_coef < 2
    skipped = _warm(spike="skip").step(factor=8.0)
    assert (skipped.verdict, skipped.is_outlier, skipped.is_spike) == ("skip", False, True)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_norm": None, "spike": "warn"}, "step {}: spike: {}; applied"),
        ({"max_norm": 3.0, "spike": "warn"}, "step {}: spike: {}; clipped to 3 as every step is"),
        ({"max_norm": 0.1, "spike": "clip"}, "step {}: spike: {}; clipped to 0.1 as every step is"),
        ({"max_norm": 50.0, "spike": "clip"}, "step {}: spike: {}; clipped to {usual} because of it"),
        ({"max_norm": 3.0, "spike": "skip"}, "step {} skipped: spike: {}"),
    ],
)
def test_the_words_say_what_stood_out_by_how_much_and_what_was_done(
    settings: dict[str, Any], what: str
) -> None:
    run = _Run(**settings)
    norms = [run.step().grad_norm for _ in range(WARM)]
    record = run.step(factor=100.0)
    usual = sorted(norms[-20:])[9]
    sizes = (
        f"gradient norm {record.grad_norm:.4g}, {record.grad_norm / usual:.3g} times its usual {usual:.4g}"
    )
    incident = Incident.of(record)
    assert incident is not None
    expected = what.format(
        run.guard.next_step - 1, f"{sizes} (score {record.spike_score:.1f})", usual=f"{usual:.4g}"
    )
    assert incident.summary().startswith(expected)


ABSURD = 1e20


@pytest.mark.parametrize("steps", [20, WARM + 20])
@pytest.mark.parametrize(
    "settings",
    [{"spike": "off"}, {"spike": "clip"}, {"nonfinite": "stop"}, *({"spike_rule": name} for name in RULES)],
    ids=str,
)
def test_an_absurd_gradient_is_left_out_whatever_the_rule(settings: dict[str, Any], steps: int) -> None:
    run = _Run(**settings)
    for _ in range(steps):
        run.step()
    before = snapshot(run.model, run.optimizer)
    memory = run.guard.state_dict()["spike_rule"]
    record = run.step(factor=ABSURD)
    assert (record.verdict, record.is_absurd, record.is_spike, record.is_outlier) == (
        "skip",
        True,
        True,
        False,
    )
    assert record.reason is not None
    assert "absurd gradient: gradient norm" in record.reason
    assert "guard.absurd_norm_ratio" in record.reason
    assert worst_difference(before, snapshot(run.model, run.optimizer)) == ""
    learned = run.guard.state_dict()["spike_rule"]
    for window in ("recent", "residuals", "mean", "losses"):
        assert str(learned.get(window)) == str(memory.get(window))
    assert not run.step().skipped


def test_absurd_gradients_are_applied_where_the_bound_is_off() -> None:
    run = _Run(absurd_norm_ratio=None)
    for _ in range(20):
        run.step()
    assert run.step(factor=ABSURD).verdict == "clip"


def test_what_is_absurd_survives_a_restart_and_a_state_that_does_not_know_it() -> None:
    run = _Run(spike="off")
    for _ in range(20):
        run.step()
    state = run.guard.state_dict()
    for kept, verdict in (
        (state, "skip"),
        ({k: v for k, v in state.items() if k != "credible_norm"}, "clip"),
    ):
        run.guard = StepGuard(run.model, run.optimizer, lag_steps=0, spike="off")
        run.guard.load_state_dict(kept)
        assert run.step(factor=ABSURD).verdict == verdict


def test_under_fp16_an_absurd_gradient_is_no_overflow_and_counts_on_the_ladder() -> None:
    run = _Run(precision=torch.float16, init_loss_scale=1024.0)
    ladder = Ladder(run.guard.config)
    for _ in range(20):
        ladder.observe(run.step())
    for _ in range(3):
        ladder.observe(run.step(factor=ABSURD))
    assert run.guard.loss_scale.item() == 1024.0
    with pytest.raises(InstabilityError, match="4 steps in a row"):
        ladder.observe(run.step(factor=ABSURD))


def test_off_says_nothing() -> None:
    run = _warm(spike="off")
    record = run.step(factor=100.0)
    assert (record.verdict, record.is_spike, record.spike_score) == ("apply", False, 0.0)


@pytest.mark.parametrize("steps_between", [0, 9, 99])
def test_a_nan_does_not_blind_the_rule(steps_between: int) -> None:
    run = _warm(spike="skip")
    bad = run.step(nan=True)
    assert (bad.verdict, bad.is_spike) == ("skip", False)
    for _ in range(steps_between):
        assert run.step().verdict == "apply"
    assert run.step(factor=10.0).is_spike
    assert not run.step().is_spike


def test_the_rules_memory_survives_a_restart() -> None:
    run = _warm(spike="skip")
    state = run.guard.state_dict()
    run.guard = StepGuard(run.model, run.optimizer, lag_steps=0, ladder=False, max_norm=None, spike="skip")
    run.guard.load_state_dict(state)
    assert run.step(factor=100.0).is_spike


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="no-such-rule"):
        _Run(spike_rule="no-such-rule")


def test_a_spike_does_not_move_the_loss_scale() -> None:
    run = _Run(max_norm=None, spike="skip", precision=torch.float16, init_loss_scale=1.0)
    for _ in range(WARM):
        run.step()
    run.step(factor=100.0)
    assert run.guard.loss_scale.item() == 1.0


def test_what_a_step_did_to_the_weights_is_sampled() -> None:
    model = make_model(width=16)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, sample_every=2, max_norm=None)

    def train(step: int) -> None:
        loss = nn.functional.mse_loss(model(batch(step)[0]), batch(step)[1])
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()

    for step in range(2):
        train(step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(2)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()}
    train(3)
    records = guard.drain(wait=True)
    assert [bool(r.sampled) for r in records] == [False, True, False, True]
    for name, live in model.named_parameters():
        parameter, moment = after[name], moments[live]
        sample = records[3].sampled[name]
        assert sample.weight_norm == pytest.approx(parameter.norm().item(), rel=1e-6)
        assert sample.update_norm == pytest.approx((parameter - before[name]).norm().item(), rel=1e-4)
        assert sample.update_ratio == pytest.approx(sample.update_norm / sample.weight_norm)
        assert sample.second_moment_max == pytest.approx(moment.max().item())
        assert sample.second_moment_min == pytest.approx(moment.min().item())
        assert sample.underflow_frac == 0.0


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_largest_attention_logit_of_each_layer_is_seen(kv_heads: int) -> None:
    torch.manual_seed(0)
    project = nn.Linear(8, 8)
    guard = StepGuard(project, OPTIMIZERS["sgd"](project.parameters()), sample_every=2)
    seen = []
    for _ in range(2):
        query, keys = project(torch.randn(2, 4, 10, 8)), torch.randn(2, kv_heads, 10, 8)
        with guard.watch_forward():
            for scale in (1.0, 7.0):
                out = nn.functional.scaled_dot_product_attention(
                    query * scale, keys, keys, is_causal=True, enable_gqa=True
                )
        out.sum().backward()
        guard.step(out.sum())
        logits = query @ keys.repeat_interleave(4 // kv_heads, dim=1).mT / 8**0.5
        largest = logits.where(torch.ones(10, 10).tril().bool(), -math.inf).max().item()
        seen.append(largest)
    records = guard.drain(wait=True)
    assert records[0].attention_logit_max == pytest.approx((seen[0], 7 * seen[0]))
    assert records[1].attention_logit_max == ()


def test_a_skipped_step_has_no_update_and_tiny_gradients_count_as_underflow() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = StepGuard(model, optimizer, sample_every=1, precision=torch.float16, init_loss_scale=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-5)
    model[0].weight.grad.view(-1)[0] = math.nan
    guard.step(torch.tensor(1.0))
    guard.step(torch.tensor(1.0))
    record, following = guard.drain(wait=True)
    sample = following.sampled["2.weight"]
    assert (record.verdict, sample.update_norm, sample.underflow_frac) == ("skip", 0.0, 1.0)
    assert sample.second_moment_max is None


class _Attends(nn.Module):
    """Two calls of attention, to be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        query = self.project(inputs)
        once = nn.functional.scaled_dot_product_attention(query, inputs, inputs)
        return nn.functional.scaled_dot_product_attention(once, inputs, inputs)


def test_watching_a_compiled_model_does_not_have_it_compiled_again() -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    model = _Attends()
    model.compile(backend=backend)
    guard = StepGuard(model, OPTIMIZERS["sgd"](model.parameters()), sample_every=2)
    for _ in range(6):
        with guard.watch_forward():
            loss = model(torch.randn(2, 4, 10, 8)).sum()
        loss.backward()
        guard.step(loss)
    assert len(compiled) == 1
