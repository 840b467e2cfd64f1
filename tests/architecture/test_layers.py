"""The floors of docs/architecture.md, read off the imports."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "harness"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))

FLOORS = {
    "atomic": 0,
    "errors": 0,
    "files": 0,
    "locks": 0,
    "logs": 0,
    "priority": 0,
    "records": 0,
    "stop": 0,
    "wrappers": 0,
    "env": 1,
    "network": 1,
    "runlog": 1,
    "helper": 2,
    "helper_main": 2,
    "parent": 2,
    "config": 2,
    "dist": 3,
    "user_code": 3,
    "data": 4,
    "models": 4,
    "stability": 4,
    "checkpoint": 4,
    "tasks": 5,
    "tracking": 5,
    "training": 6,
    "doctor": 6,
    "integrations": 6,
    "dashboard": 6,
    "experiment_tracking": 6,
    "replay": 7,
    "cli": 8,
    "gradio_experiment_tracking": 9,
    "agent": 9,
    "train": 9,
}

# Optional or heavy packages, each the business of one module.
SOLE_IMPORTERS = {
    "triton": {"harness/stability/kernels.py", "harness/stability/adamw_kernels.py"},
    "tensorboard": {"harness/tracking/tensorboard.py", "harness/dashboard/tensorboard_server.py"},
    "wandb": {"harness/tracking/wandb.py"},
    "trackio": {"harness/tracking/trackio.py"},
    "pynvml": {"harness/tracking/resources.py"},
    "jsonargparse": {"harness/config/parser.py"},
    "matplotlib": {"harness/tracking/plots.py", "harness/tracking/tracker_views.py"},
    "tqdm": {"harness/training/console.py"},
    "gradio": {"harness/dashboard/page.py", "harness/dashboard/control.py"},
    # Those of the task that is made of it: a tokenizer, a model, and what both are saved as.
    "transformers": {
        "harness/integrations/transformers.py",
        "harness/tasks/hf/tokenizer.py",
        "harness/tasks/hf/model.py",
    },
    "tokenizers": {"harness/tasks/hf/tokenizer.py"},
    "datasets": {"harness/tasks/hf/readers.py"},
    "peft": {"harness/tasks/hf/model.py"},
    "lightning": {"harness/integrations/lightning.py"},
}

COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
}
MAY_COMMUNICATE = ("harness/dist/", "harness/stability/hooks.py", "harness/stability/fsdp.py")

MAY_SYNCHRONISE = {
    "harness/stability/monitor.py",  # the guard's one drain
    "harness/stability/stepper.py",  # optimizers that are not fused; it says so
    "harness/stability/fused_check.py",  # a decision that lies on the CPU
    "harness/stability/buffers.py",  # which large buffers are constants, once that has arrived
    "harness/stability/rank_table.py",  # what the drain has brought to the host
    "harness/stability/record_builder.py",  # the same
    "harness/stability/checks/attention.py",  # like those that follow: `read`, of what is on the host
    "harness/stability/checks/constants.py",
    "harness/stability/checks/inputs.py",
    "harness/stability/checks/movement.py",
    "harness/stability/checks/precision.py",
    "harness/stability/checks/replicas.py",
    "harness/stability/checks/rows.py",
    "harness/stability/checks/samples.py",
    "harness/stability/checks/state.py",
    "harness/stability/checks/targets.py",
    "harness/stability/audits/all.py",
    "harness/stability/reference.py",  # tensors on the CPU only, as in the next one
    "harness/stability/native.py",
    "harness/training/evaluate.py",  # the one read of an evaluation
    "harness/training/parts.py",  # of a record, on the host
    "harness/training/recompute.py",  # `read`, of what is on the host
    "harness/training/rerun.py",  # passes over the micro-batch of an incident
    "harness/training/trial_checks.py",  # a trial before the run
}


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Everything in a module's syntax tree."""
    return tuple(ast.walk(ast.parse((ROOT / path).read_text())))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it, or names in a text, to import later."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "harness":
            yield from (f"harness.{alias.name}" for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.partition(":")[0]  # of `package.module:name`
            if is_module(module):
                yield module


def is_module(text: str) -> bool:
    """Whether a text is the full name of a module of this package."""
    file = ROOT.joinpath(*text.split(".")) if re.fullmatch(r"harness(\.\w+)+", text) else ROOT / "none"
    return file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()


def room(name: str) -> str | None:
    """The package or module directly under `harness` that a full module name lies in."""
    parts = name.split(".")
    return parts[1] if parts[0] == "harness" and len(parts) > 1 else None


def room_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_from_its_own_room_and_lower_floors_only(path: Path) -> None:
    if path == Path("harness/__init__.py"):
        return  # its names are loaded when they are used
    mine = room_of(path)
    rooms = {room(name) for name in imports(path)} - {None, mine}
    wrong = sorted(other for other in rooms if other is not None and FLOORS[other] >= FLOORS[mine])
    assert not wrong, f"{path} ({mine}, floor {FLOORS[mine]}) imports {wrong}"


@pytest.mark.parametrize(
    "package", [p.parent for p in MODULES if p.name == "__init__.py" and p.parts[1:-1]], ids=str
)
def test_a_lazy_name_leads_to_its_own_room_or_a_lower_floor(package: Path) -> None:
    """Whatever it takes to get there: its home may be spelled in a text."""
    module = importlib.import_module(".".join(package.parts))
    for name in getattr(module, "__all__", ()):
        home = room(getattr(getattr(module, name), "__module__", ""))
        assert home is None or home == room_of(package) or FLOORS[home] < FLOORS[room_of(package)], name


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(FLOORS)


def test_the_page_has_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert [int(floor) for floor, _ in rows] == sorted(int(floor) for floor, _ in rows)
    assert {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)} == FLOORS


def test_the_ground_floor_needs_the_standard_library_alone() -> None:
    for name in (name for name, floor in FLOORS.items() if floor <= 1 and name != "runlog"):
        foreign = {module.split(".")[0] for module in imports(Path(f"harness/{name}.py"))}
        assert not foreign & {"torch", "numpy", "yaml", "orjson", "harness.config"}, name


@pytest.mark.parametrize("package", SOLE_IMPORTERS)
def test_an_optional_package_is_the_business_of_one_module(package: str) -> None:
    importers = {
        str(path) for path in MODULES if any(name.split(".")[0] == package for name in imports(path))
    }
    assert importers <= SOLE_IMPORTERS[package]


def test_a_module_that_is_named_in_a_text_is_imported() -> None:
    assert "harness.tracking.wandb" in set(imports(Path("harness/tracking/registry.py")))
    assert "harness.tasks.hf" in set(imports(Path("harness/training/tasks.py")))


def attribute_names(path: Path) -> set[str]:
    return {node.attr for node in nodes_of(path) if isinstance(node, ast.Attribute)}


def test_the_environment_is_read_in_one_place() -> None:
    readers = [str(path) for path in MODULES if {"environ", "getenv"} & attribute_names(path)]
    assert readers == ["harness/env.py"]


def distributed_names(path: Path) -> set[str]:
    """Names taken from `torch.distributed`, under that name or as `dist`."""
    attributes = [node for node in nodes_of(path) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) in ("dist", "torch.distributed")}


def test_collectives_are_called_in_dist_and_the_gradient_hooks_only() -> None:
    callers = [str(path) for path in MODULES if COLLECTIVES & distributed_names(path)]
    assert [path for path in callers if not path.startswith(MAY_COMMUNICATE)] == []


def test_device_values_are_read_in_named_places_only() -> None:
    readers = {
        str(path)
        for path in MODULES
        if room_of(path) in ("training", "stability") and {"item", "tolist", "cpu"} & attribute_names(path)
    }
    assert readers <= MAY_SYNCHRONISE


# A page that shows runs cannot change them: it reads the log, and starts programs like anybody else.
DASHBOARD_MAY_USE = {"compare", "overview", "text"}


def test_what_a_run_leaves_behind_is_read_without_torch() -> None:
    for path in (path for path in MODULES if room_of(path) == "runlog"):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def test_the_dashboard_reads_logs_and_nothing_else() -> None:
    for path in (path for path in MODULES if room_of(path) == "dashboard"):
        names = [name.split(".") for name in imports(path)]
        assert not {parts[0] for parts in names} & {"torch"}, path
        used = {parts[2] for parts in names if parts[:2] == ["harness", "tracking"] and len(parts) > 2}
        assert used <= DASHBOARD_MAY_USE, path


def strings_of(path: Path) -> set[str]:
    return {
        node.value
        for node in nodes_of(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_locks_replaced_files_and_helper_processes_are_made_in_one_place_each() -> None:
    lockers = {str(path) for path in MODULES if "fcntl" in set(imports(path))}
    assert lockers == {"harness/locks.py"}
    folders = {"harness/checkpoint/store.py", "harness/data/prepared.py", "harness/dashboard/forks.py"}
    renamers = {str(path) for path in MODULES if {"rename", "link"} & attribute_names(path)}
    assert renamers <= folders | {"harness/atomic.py"}  # what is renamed elsewhere is a folder
    assert {str(path) for path in MODULES if {".new", ".tmp", ".unfinished"} & strings_of(path)} <= {
        "harness/atomic.py"
    }
    assert not {str(path) for path in MODULES if "-c" in strings_of(path)}


# What a run's directory holds, as `harness.runlog.paths` alone spells it.
FILES = {
    "config.yaml", "log", "tensorboard", "wandb", "nodes", "media", "mirrors", "settings.json",
    "wandb-run-id", "side.log", "checkpoints", "summary.json", "curves.png", "report.html",
    "manifest.json", "healthy", "incidents", "story.md", "tokenizer", "faults", "export",
}  # fmt: skip


def joined_to_paths(path: Path) -> set[str]:
    """The texts that a file appends to paths by `/`."""
    divisions = [
        node for node in nodes_of(path) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    ]
    return {node.right.value for node in divisions if isinstance(node.right, ast.Constant)}


def test_the_files_of_a_run_are_named_in_one_place() -> None:
    for path in (path for path in MODULES if path != Path("harness/runlog/paths.py")):
        assert not joined_to_paths(path) & FILES, path
        spelled = {text for text in strings_of(path) if re.match(r"\(?(step|hang)-([0-9\[%\\(*]|$)", text)}
        assert not spelled, path  # with a number to come, or a pattern of one
