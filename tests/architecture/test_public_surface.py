"""What `import harness` offers and costs."""

import subprocess
import sys

import harness


def test_the_public_names_are_these() -> None:
    assert sorted(harness.__all__) == [
        "Callback",
        "Checkpointer",
        "ExperimentConfig",
        "ExperimentTracker",
        "StepGuard",
        "StepRecord",
        "TrainConfig",
        "TrainResult",
        "TrainingMetrics",
        "train",
    ]


def test_every_public_name_can_be_imported() -> None:
    for name in harness.__all__:
        assert getattr(harness, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, harness; print(sorted({'torch', 'numpy', 'wandb', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
