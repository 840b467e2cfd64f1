"""What `import harness` offers and costs."""

import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

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


def test_importing_the_package_loads_one_file() -> None:
    """In about 5 ms: the clock is not asked, what is loaded is."""
    code = "import sys, typing; before = {*sys.modules}; import harness; print(*{*sys.modules} - before)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["harness"]


ALONE = ["xxhash"]
"""What a checkpointer needs besides torch and numpy; a guard needs nothing."""

PARTS_ALONE = """
import sys, torch, numpy
from torch.distributed import fsdp, checkpoint
before = set(sys.modules)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters())

from harness import StepGuard
with StepGuard(model, optimizer, max_norm=1.0) as guard:
    loss = model(torch.ones(3, 2)).mean()
    loss.backward()
    guard.step(loss)
print(*set(sys.modules) - before)

from harness import Checkpointer
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(0, {"model": model, "optimizer": optimizer})
    checkpointer.wait()
    checkpointer.load({"model": model, "optimizer": optimizer})
print(*set(sys.modules) - before)
"""


def test_guard_and_checkpointer_alone_need_few_packages_besides_torch_and_numpy(tmp_path: Path) -> None:
    said = subprocess.check_output([sys.executable, "-c", PARTS_ALONE, str(tmp_path)], text=True)
    guard, both = ({name.partition(".")[0] for name in line.split()} for line in said.splitlines())
    of_torch = {"torch", "triton", "colorama"}  # the last one it takes where it is installed
    foreign = set(packages_distributions()) - {"harness", "numpy"} - of_torch
    assert guard & foreign == set()
    assert both & foreign == set(ALONE)
    sizes = [file.size or 0 for name in ALONE for file in distribution(name).files or ()]
    assert 0 < sum(sizes) < 5_000_000


def test_the_documentation_names_what_has_to_be_installed_for_guard_and_checkpointer_alone() -> None:
    page = (Path(__file__).parents[2] / "docs" / "three-lines.md").read_text()
    lines = re.findall(r"^pip install (?!--no-deps)([\w -]+?) +#", page, re.MULTILINE)
    assert " ".join(lines).split() == ["torch", "numpy", *ALONE]
