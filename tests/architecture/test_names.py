"""Names of metrics and events are spelled in `harness.runlog.names` and nowhere else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from harness.runlog.names import EventName, Metric, Prefix, page_names

ROOT = Path(__file__).parents[2]
MODULES = [path for path in (ROOT / "harness").rglob("*.py") if path != ROOT / "harness/runlog/names.py"]


def values_of(group: type) -> dict[str, str]:
    return {name: value for name, value in vars(group).items() if name.isupper()}


def strings(path: Path) -> Iterator[str]:
    """The strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_module_spells_the_name_of_a_metric() -> None:
    prefixes = tuple(values_of(Prefix).values())
    spelled = [(str(path.relative_to(ROOT)), text) for path in MODULES for text in strings(path)]
    wrong = [(path, text) for path, text in spelled if text.startswith(prefixes)]
    assert wrong == []


def test_no_script_of_the_page_spells_the_name_of_a_metric() -> None:
    for path in (ROOT / "harness/dashboard/assets").glob("*.js"):
        spelled = re.findall(rf"""["'`](?:{"|".join(values_of(Prefix).values())}|guard/)""", path.read_text())
        assert spelled == [], path.name


def spelled_events(tree: ast.AST) -> Iterator[str]:
    """Names of events in places where an event's name stands: compared with a `name`, or given as one."""
    names = values_of(EventName).values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and re.search(r"\bname\b", ast.unparse(node.left)):
            given = list(node.comparators)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "name"]
        else:
            continue
        constants = [part for one in given for part in ast.walk(one) if isinstance(part, ast.Constant)]
        yield from (part.value for part in constants if part.value in names)


def test_no_module_spells_the_name_of_an_event() -> None:
    wrong = [(path.name, name) for path in MODULES for name in spelled_events(ast.parse(path.read_text()))]
    assert wrong == []
    # Those that are no other word of the program are nowhere.
    own = {EventName.OUTLIER, EventName.CHECKPOINT_FAILED, EventName.ALERT}
    assert [(path.name, text) for path in MODULES for text in strings(path) if text in own] == []
    seen = (
        """values.get("name") == "stop", event.name in ("fault", 1), {"name": "resume"}, verdict == "stop\""""
    )
    assert list(spelled_events(ast.parse(seen))) == ["stop", "fault", "resume"]


def test_no_script_of_the_page_spells_the_name_of_an_event() -> None:
    names = "|".join(values_of(EventName).values())
    spelled = re.compile(rf"""name\W*[=!]==?\s*["'`](?:{names})["'`]|_counts(?:\.|\[["'`])(?:{names})\b""")
    for path in (ROOT / "harness/dashboard/assets").glob("*.js"):
        assert spelled.search(path.read_text()) is None, path.name
    assert spelled.search('event.name === "stop"')
    assert spelled.search("data.event_counts.incident")


def test_no_two_names_are_the_same_metric() -> None:
    for group in (Metric, Prefix, EventName):
        values = list(values_of(group).values())
        assert len(values) == len(set(values))


def test_the_page_gets_the_names() -> None:
    names = page_names()
    assert names["metric"] == values_of(Metric)
    assert names["metric"]["TRAIN_LOSS"] == "train/loss"
    assert names["event"]["INCIDENT"] == "incident"
    assert names["prefix"]["LAYERS"] == "layers/"
