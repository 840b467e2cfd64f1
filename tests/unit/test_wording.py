"""What is said of the size of a step: the signal, its value, its usual value, the ratio and the score."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from harness.stability.verdict import Summary
from harness.stability.wording import describe_size

CALM = {field.name: 0.0 for field in fields(Summary)} | {"loss": 2.0, "grad_norm": 1.0}
USUAL = {"usual_norm": 0.5, "usual_loss": 1.6}
NORM = {"norm_score": 9.21, "grad_norm": 4.0}
LOSS = {"loss_score": 12.0, "loss": 8.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        (NORM | LOSS, None),
        ({"is_outlier": 1.0} | NORM, "outlier batch: gradient norm 4, 8 times its usual 0.5 (score 9.2)"),
        ({"is_spike": 1.0} | LOSS, "spike: loss 8, 5 times its usual 1.6 (score 12.0)"),
        (
            {"is_spike": 1.0, "num_in_a_row": 3.0} | NORM | LOSS,
            "spike: loss 8, 5 times its usual 1.6 (score 12.0); gradient norm 4, 8 times its usual 0.5 "
            "(score 9.2); disturbed since step 40",
        ),
        ({"is_outlier": 1.0, "num_in_a_row": 2.0} | NORM | {"loss_score": 3.0}, "score 9.2)"),
        (
            {"is_outlier": 1.0, "usual_loss": -0.25} | LOSS,
            "outlier batch: loss 8, usually -0.25 (score 12.0)",
        ),
        ({"is_outlier": 1.0, "usual_norm": math.nan} | NORM, "outlier batch: gradient norm 4 (score 9.2)"),
        (
            {"is_spike": 1.0, "is_absurd": 1.0, "grad_norm": 1.5e20},
            "absurd gradient: gradient norm 1.5e+20, 3e+20 times its usual 0.5, more than "
            "guard.absurd_norm_ratio",
        ),
    ],
)
def test_the_words_of_a_size(values: dict[str, Any], expected: str | None) -> None:
    said = describe_size(42, Summary(**{**CALM, **USUAL, **values}))
    assert said == expected or (said is not None and expected is not None and said.endswith(expected))
