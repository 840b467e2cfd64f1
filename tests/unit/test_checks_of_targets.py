"""Which targets and which micro-batches of sound loops are no error, and what looking at them costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness import StepGuard
from harness.config import GuardConfig
from harness.stability.audits.forward import ForwardWatch
from harness.stability.checks.targets import TargetsCheck
from tests.support.silent_errors import Speaker, adamw, found_in, next_token_loss, sentences


class ShiftsInside(nn.Module):
    """Predicts each token from those before it, and shifts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Speaker()

    def forward(self, labels: Tensor) -> Tensor:
        return self.inner(nn.functional.pad(labels[:, :-1], (1, 0)))


class Listener(nn.Module):
    """Takes sounds and labels, and gives logits of the labels, as Whisper does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 11), Speaker()

    def forward(self, input_features: Tensor, labels: Tensor) -> Tensor:
        shifted = nn.functional.pad(labels[:, :-1], (1, 0))
        return self.decoder(shifted) + self.encoder(input_features)[:, None]


@pytest.mark.parametrize("as_keyword", [False, True])
def test_labels_of_a_model_that_shifts_them_are_no_error(as_keyword: bool) -> None:
    model = ShiftsInside()

    def step(number: int, guard: StepGuard) -> Tensor:
        tokens = sentences(number)
        logits = model(labels=tokens) if as_keyword else model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.detach()

    assert found_in(model, adamw(model), step=step) == []


def test_labels_are_not_the_tokens_of_an_encoder_decoder_however_fast_it_learns() -> None:
    model = Listener()

    def step(number: int, guard: StepGuard) -> Tensor:
        tokens = torch.full((4, 20), 3) + (torch.arange(20) % 2)
        logits = model(input_features=torch.ones(4, 4), labels=tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.detach()

    found = found_in(model, adamw(model, lr=0.1), step=step)
    assert found == ["constant batch"]


def test_labels_shifted_twice_are_named_with_many_micro_batches() -> None:
    model = Speaker()

    def step(number: int, guard: StepGuard) -> Tensor:
        for place in range(12):
            loss = next_token_loss(model, sentences(20 * number + place), shift=2)
            (loss / 12).backward()
        return loss.detach()

    assert found_in(model, adamw(model), step=step) == ["targets"]


def test_random_masks_of_micro_batches_are_no_ragged_lengths() -> None:
    model = Speaker()

    def step(number: int, guard: StepGuard) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        for place in range(8):
            tokens = sentences(10 * number + place, length=24)
            is_masked = torch.rand(4, 24, generator=generator) < 0.15
            logits = model(tokens.masked_fill(is_masked, 0))
            targets = tokens.masked_fill(~is_masked, -100)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss / 8).backward()
        return loss.detach()

    assert found_in(model, adamw(model), step=step) == []


def test_looking_at_logits_copies_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Speaker()
    check = TargetsCheck(GuardConfig(), ForwardWatch())
    sizes: list[int] = []
    reshape = Tensor.reshape

    def noted(tensor: Tensor, *shape: int) -> Tensor:
        sizes.append(tensor.numel())
        return reshape(tensor, *shape)

    monkeypatch.setattr(Tensor, "reshape", noted)
    logits = model(sentences(0, length=200))[:, :-1]
    check._note(logits)
    logits.square().sum().backward()
    assert len(check._passes) == 1
    assert not [size for size in sizes if size >= logits.numel()]


def test_only_forward_passes_of_looks_are_looked_at() -> None:
    model = Speaker()
    steps: list[int] = []
    with StepGuard(model, adamw(model)) as guard:
        check = guard._checks._checks["targets"]
        for number in range(12):
            loss = next_token_loss(model, sentences(number))
            loss.backward()
            steps += [number] if check._num_passes else []  # type: ignore[attr-defined]
            guard.step(loss.detach())
            model.zero_grad()
    assert steps == [0, 9]
