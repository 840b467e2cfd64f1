"""What is not installed is named with its extra."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT

PROGRAM = """
import importlib, sys
from pathlib import Path

for package in "transformers lightning trackio sklearn pandas pyarrow gradio".split():
    sys.modules[package] = None  # for Python that is: not there

from harness.cli.main import main
from harness.config import DataConfig
from harness.data.images import load_images
from harness.runlog.reader import Run
from harness.runlog.writer import RunLog
from harness.tracking.export import export_run

RunLog(Path("run")).close()
for use in (
    lambda: importlib.import_module("harness.integrations.transformers"),
    lambda: importlib.import_module("harness.integrations.lightning"),
    lambda: importlib.import_module("harness.tracking.trackio"),
    lambda: load_images(DataConfig()),
    lambda: Run(Path("run")).to_pandas(),
    lambda: export_run("run", format="parquet"),
):
    try:
        use()
    except Exception as error:
        print(error, flush=True)
sys.stderr = sys.stdout
main(["dashboard"])
"""


def test_what_is_missing_is_named_with_an_extra_that_brings_it(tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    said = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True, cwd=tmp_path).splitlines()
    named = [re.findall(r"stability-harness\[(\w+)\]", line) for line in said]
    assert named == [
        ["hf"],
        ["lightning"],
        ["trackio"],
        ["vision"],
        ["analysis"],
        ["analysis"],
        ["dashboard"],
    ]
    brought = ["transformers", "lightning", "trackio", "scikit-learn", "pandas", "pyarrow", "gradio"]
    for [extra], package in zip(named, brought, strict=True):
        assert package in re.findall(r"^[\w-]+", extras[extra], re.MULTILINE)
