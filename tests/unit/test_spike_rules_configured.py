"""A spike rule and its settings in the configuration: what is wrong is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import StepGuard, TrainConfig
from harness.config import GuardConfig
from harness.data import Task
from harness.errors import HarnessError
from harness.stability.detectors import SpikeDetection, SpikeRule, configured_rule
from harness.stability.rules.base import no_limit
from harness.stability.rules.zclip import ZClipRule
from tests.support.own_tasks import own_config, points_task, run_loop

HERE = "tests.unit.test_spike_rules_configured"


class CeilingRule(SpikeRule):
    """Flags every loss above a ceiling."""

    def __init__(self, *, ceiling: float = 10.0, verbose: bool = False) -> None:
        super().__init__()
        if ceiling <= 0:
            raise ValueError(f"the ceiling is {ceiling}")
        self.ceiling, self.verbose = ceiling, verbose

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        return {"num_flagged": torch.zeros((), dtype=torch.float64, device=device)}

    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        state = self._on(loss_t.device)
        flagged = trusted_t & (loss_t > self.ceiling)
        state["num_flagged"] = state["num_flagged"] + flagged
        zero = torch.zeros_like(state["num_flagged"])
        return SpikeDetection(
            flagged=flagged,
            is_incident=flagged,
            scores=torch.stack([zero, loss_t.double() / self.ceiling]),
            usual=torch.full((2,), torch.nan, dtype=torch.float64, device=zero.device),
            norm_limit=no_limit(zero),
            num_in_a_row=zero,
        )


def points(config: TrainConfig) -> Task:
    return points_task()


def test_a_rule_of_ones_own_judges_a_guarded_loop_with_its_settings() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {
        "spike_rule": f"{HERE}:CeilingRule",
        "spike_args": ["ceiling=3", "verbose=true"],
    }
    with StepGuard(model, optimizer, lag_steps=0, **settings) as guard:
        spikes = []
        for loss in (1.0, 2.9, 3.1):
            (model(torch.ones(1, 1)).sum() * 0.1).backward()
            guard.step(torch.tensor(loss))
            spikes += [record.is_spike for record in guard.drain()]
        assert spikes == [False, False, True]
        assert guard.state_dict()["spike_rule"]["num_flagged"].item() == 1


def test_the_settings_of_a_bundled_rule_reach_it_in_its_own_types() -> None:
    rule = configured_rule(GuardConfig(spike_rule="zclip", spike_args=("threshold = 3", "warmup=9")))
    assert isinstance(rule, ZClipRule)
    assert (rule.threshold, rule.warmup, rule.decay) == (3.0, 9, 0.97)
    assert isinstance(rule.warmup, int)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guard.spike_rule=typo"], ["guard.spike_rule", "typo", "robust, zclip, persistent, sigma"]),
        (["--guard.spike_rule=zclip", "--guard.spike_args=[decay]"], ["guard.spike_args", "name=value"]),
        (["--guard.spike_args=[decay=1]"], ["guard.spike_args", "robust", "guard.spike_threshold"]),
        (
            ["--guard.spike_rule=zclip", "--guard.spike_threshold=3"],
            ["guard.spike_threshold", "zclip", "--guard.spike_args '[threshold=3.0]'"],
        ),
        (
            ["--guard.spike_rule=zclip", "--guard.spike_args=[sigmas=1]"],
            ["zclip has no setting sigmas", "decay"],
        ),
        (["--guard.spike_rule=zclip", "--guard.spike_args=[warmup=2.5]"], ["warmup=2.5", "type int"]),
        (["--guard.spike_rule=zclip", "--guard.spike_args=[decay=2]"], ["guard.spike_args.decay is 2.0"]),
        (["--guard.spike_rule=sigma", "--guard.spike_args=[window=1]"], ["guard.spike_args.window is 1"]),
        (["--guard.spike_rule=persistent", "--guard.spike_args=[factor=-1]"], ["guard.spike_args.factor"]),
        (["--guard.spike_rule=no.such:Rule"], ["guard.spike_rule 'no.such:Rule'", "no module 'no'"]),
        ([f"--guard.spike_rule={HERE}:points"], ["is no spike rule", "SpikeRule"]),
        (
            [f"--guard.spike_rule={HERE}:CeilingRule", "--guard.spike_args=[ceiling=-1]"],
            ["the ceiling is -1"],
        ),
        ([f"--guard.spike_rule={HERE}:CeilingRule", "--guard.spike_args=[verbose=2]"], ["verbose=2", "bool"]),
    ],
)
def test_a_wrong_name_or_value_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(HarnessError) as caught:
        run_loop(own_config(tmp_path, points, *arguments))
    assert [word for word in words if word not in str(caught.value)] == []
    assert not (tmp_path / "runs").exists()
