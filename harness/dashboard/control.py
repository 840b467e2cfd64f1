"""The tabs that change something: the configuration as a form, and real runs started, stopped, resumed.

What a button does is checked here once more, whatever the page shows: without leave to control, none of them
does anything.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from typing import Any, get_args

import gradio as gr

from harness.config import TrainConfig, flatten
from harness.config.plain_yaml import plain_yaml
from harness.dashboard import commands, forks, form, programs
from harness.dashboard.access import Access
from harness.dashboard.run_index import RunIndex
from harness.dashboard.tensorboard import TensorBoard
from harness.errors import ConfigError, HarnessError, LaunchError

__all__ = [
    "CHOICE_OF_RUNS",
    "Form",
    "choice_of_runs",
    "configuration_tab",
    "guarded",
    "known_runs",
    "own_element",
    "tensorboard_tab",
    "training_tab",
]

CHOICE_OF_RUNS = "h-choice-of-runs"
"""Class of the lists of runs, which `page` keeps up to date."""
SMALL: dict[str, Any] = {"scale": 0, "min_width": 130, "size": "md"}
"""A button as wide as its words, beside fields."""
QUIET: dict[str, Any] = {"show_progress": "hidden"}
OPEN_SECTIONS = ("", "loop", "optim")
SHOW_RUN = """
const show = () => { const it = element.querySelector('NAME'); if (it && props.value) it.run = props.value; };
customElements.whenDefined('NAME').then(show);
watch('value', show);
"""


def own_element(name: str, **more: Any) -> gr.HTML:
    """One of the page's own elements; its value is the run that it shows."""
    return gr.HTML(
        value=None,
        html_template=f"<{name}></{name}>",
        js_on_load=SHOW_RUN.replace("NAME", name),
        apply_default_css=False,
        **more,
    )


def choice_of_runs(label: str, elem_id: str, **more: Any) -> gr.Dropdown:
    """A list of runs, empty until it is opened."""
    return gr.Dropdown(
        label=label, choices=[], interactive=True, elem_id=elem_id, elem_classes=CHOICE_OF_RUNS, **more
    )


def _order(label: str, elem_id: str, access: Access, **more: Any) -> gr.Button:
    """A button that changes something."""
    return gr.Button(label, interactive=access.controls, elem_id=elem_id, **SMALL, **more)


def guarded(access: Access, action: Callable[..., Any]) -> Callable[..., Any]:
    """An action for a button: refused without leave to control, its errors shown as one sentence."""

    @functools.wraps(action)
    def act(*arguments: Any) -> Any:
        if not access.controls:
            raise gr.Error("this dashboard only shows: start it with --control", print_exception=False)
        return told(*arguments)

    told = _told(action)
    return act


class Form:
    """Every key of the schema as a component, in the order of `form.sections`."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.components: list[Any] = []
        for section in form.sections():
            with (
                gr.Accordion(section.title, open=section.name in OPEN_SECTIONS),
                gr.Row(elem_classes="h-fields"),
            ):
                for field in section.fields:
                    self.keys.append(field.key)
                    self.components.append(_component(field))

    def read(self, values: Sequence[Any]) -> TrainConfig:
        """What is filled in; refused in the words of the command line."""
        return form.read(dict(zip(self.keys, values, strict=True)))

    def show(self, config: TrainConfig) -> list[Any]:
        """The components' values for a configuration."""
        values = form.values_of(config)
        return [_shown(values[key]) for key in self.keys]


def configuration_tab(access: Access) -> Form:
    """The form, the YAML that it stands for, and the configurations to start from."""
    with gr.Row(elem_classes="h-orders"):
        preset = gr.Dropdown(
            form.presets(), value=form.DEFAULTS, label="Start from", elem_id="preset", interactive=True
        )
        name = gr.Textbox(label="Save as configs/NAME.yaml", placeholder="NAME", elem_id="save-name")
        overwrite = gr.Checkbox(label="overwrite")
        save = _order("Save", "save", access)
    with gr.Row():
        with gr.Column(scale=3, min_width=480):
            fields = Form()
        with gr.Column(scale=2, min_width=320, elem_classes="h-verdict"):
            verdict = gr.Markdown("This can be run.", elem_id="verdict")
            text = gr.Code(
                form.yaml_of(TrainConfig(), only_changes=True),
                language="yaml",
                label="as YAML, without what is set by default",
                interactive=False,
            )

    def check(*values: Any) -> tuple[str, Any]:
        try:
            return "This can be run.", form.yaml_of(fields.read(values), only_changes=True)
        except HarnessError as error:
            return f"```\n{_one_line(error)}\n```", gr.skip()

    def load(chosen: str) -> list[Any]:
        return fields.show(form.preset(chosen))

    def keep(called: str, replace: bool, *values: Any) -> Any:
        path = form.save(fields.read(values), called, overwrite=replace)
        gr.Info(_text(f"saved as {path}"))
        return gr.update(choices=form.presets())

    for component in fields.components:
        event = component.blur if isinstance(component, gr.Textbox) else component.input
        event(check, fields.components, [verdict, text], **QUIET, trigger_mode="always_last")
    preset.focus(lambda: gr.update(choices=form.presets()), None, preset, **QUIET)
    loaded = preset.input(_told(load), preset, fields.components, **QUIET)
    loaded.then(check, fields.components, [verdict, text], **QUIET)
    save.click(guarded(access, keep), [name, overwrite, *fields.components], preset, **QUIET)
    return fields


def training_tab(run_index: RunIndex, access: Access, fields: Form) -> gr.Dropdown:
    """Start the form's run or the demonstration, follow what it prints, stop it, go on with it.

    Returns the list of runs.
    """
    gr.Markdown(
        f"Runs are started in {_code(run_index.root)} as programs that go on when the dashboard ends."
        if access.controls
        else "This dashboard only shows; `--control` lets it start and stop runs."
    )
    chosen = choice_of_runs("Run", "controlled-run", allow_custom_value=True, render=False)
    output = own_element("harness-output", render=False)
    processes = _starting(run_index, access, fields, shown=[chosen, output])
    _going_on(run_index, access, chosen, output)
    _forking(run_index, access, chosen, output)
    output.render()
    _spelling(fields, processes)
    chosen.input(lambda run: run, chosen, output, **QUIET)
    return chosen


def _starting(run_index: RunIndex, access: Access, fields: Form, *, shown: list[Any]) -> gr.Number:
    """Begins runs, which are then `shown`. Returns the number of processes."""
    with gr.Row(elem_classes="h-orders"):
        processes = gr.Number(1, label="Processes", precision=0, minimum=1, elem_id="processes")
        start = _order("Start the run of the form", "start", access, variant="primary")
        demonstrate = _order("Start the demonstration", "demonstrate", access)

    def begin(config: TrainConfig, count: float) -> tuple[Any, str]:
        program = programs.start(config, runs_dir=run_index.root, processes=int(count or 1))
        gr.Info(_text(f"{program.name} is started"))
        return _chosen(run_index, program.name), program.name

    def start_form(count: float, *values: Any) -> tuple[Any, str]:
        return begin(fields.read(values), count)

    def start_demonstration(count: float) -> tuple[Any, str]:
        return begin(TrainConfig(), count)

    start.click(guarded(access, start_form), [processes, *fields.components], shown, **QUIET)
    demonstrate.click(guarded(access, start_demonstration), processes, shown, **QUIET)
    return processes


def _going_on(run_index: RunIndex, access: Access, chosen: gr.Dropdown, output: gr.HTML) -> None:
    with gr.Row(elem_classes="h-orders"):
        chosen.render()
        steps = gr.Number(None, label="New number of steps (0: as it was)", precision=0, elem_id="new-steps")
        stop = _order("Stop with a checkpoint", "stop", access)
        resume = _order("Resume", "resume", access)
        kill = _order("Kill", "kill", access, variant="stop")

    def ask_to_stop(run: str) -> None:
        programs.stop(_directory(run_index, run), within=run_index.root)
        gr.Info(
            _text(f"{run} finishes its step, saves a checkpoint and leaves; while it loads, it ends at once")
        )

    def go_on(run: str, new_steps: float | None) -> str:
        new = None if not new_steps else int(new_steps)
        programs.resume(_directory(run_index, run), steps=new, within=run_index.root)
        gr.Info(_text(f"{run} goes on"))
        return run

    def end_at_once(run: str) -> None:
        programs.kill(_directory(run_index, run), within=run_index.root)
        gr.Info(_text(f"{run} is killed"))

    stop.click(guarded(access, ask_to_stop), chosen, **QUIET)
    resume.click(guarded(access, go_on), [chosen, steps], output, **QUIET)
    kill.click(guarded(access, end_at_once), chosen, **QUIET)


def _forking(run_index: RunIndex, access: Access, chosen: gr.Dropdown, output: gr.HTML) -> None:
    with gr.Accordion("Fork the run with changes", open=False), gr.Row(elem_classes="h-orders"):
        name = gr.Textbox(label="Name of the new run", elem_id="fork-name")
        changes = gr.Textbox(
            label="Changes, a line each",
            placeholder="optim.lr: 0.001",
            lines=3,
            elem_id="fork-changes",
        )
        step = gr.Textbox(
            label="From the checkpoint of step", placeholder="empty: from the beginning", elem_id="fork-step"
        )
        fork = _order("Fork", "fork", access)

    def branch(run: str, called: str, text: str, at: str) -> tuple[Any, str]:
        where = _directory(run_index, run)
        program = forks.fork(where, called.strip(), _changes(text), step=_steps(at), within=run_index.root)
        gr.Info(_text(f"{program.name} is started as a fork of {run}"))
        return _chosen(run_index, program.name), program.name

    fork.click(guarded(access, branch), [chosen, name, changes, step], [chosen, output], **QUIET)


def _spelling(fields: Form, processes: gr.Number) -> None:
    """The command alone, which anybody may see."""
    with gr.Accordion("The command, to start the form's run elsewhere", open=False):
        with gr.Row(elem_classes="h-orders"):
            launcher = gr.Dropdown(
                list(get_args(commands.Launcher)),
                value="python",
                label="Launcher",
                interactive=True,
                elem_id="launcher",
            )
            nodes = gr.Number(1, label="Nodes", precision=0, minimum=1, elem_id="nodes")
            spell = gr.Button("Show the command", elem_id="spell", **SMALL)
        spelled = gr.Code(language="shell", label="command", interactive=False, elem_id="command")

    def spell_out(how: Any, count: float, num_nodes: float, *values: Any) -> str:
        config = fields.read(values)
        return commands.command(config, how, processes=int(count or 1), nodes=int(num_nodes or 1))

    spell.click(_told(spell_out), [launcher, processes, nodes, *fields.components], spelled, **QUIET)


def tensorboard_tab(run_index: RunIndex, access: Access, tensorboard: TensorBoard) -> gr.Dropdown:
    """Start TensorBoard for chosen runs, link to it, stop it. Returns the list of runs."""
    gr.Markdown("TensorBoard opens behind this page's own address; it ends with the dashboard.")
    with gr.Row(elem_classes="h-orders"):
        chosen = choice_of_runs("Runs", "tensorboard-runs", multiselect=True)
        start = _order("Show in TensorBoard", "tensorboard-start", access)
        stop = _order("Stop TensorBoard", "tensorboard-stop", access)
    link = gr.HTML(_tensorboard_link(tensorboard), elem_id="tensorboard-link")

    def begin(runs: list[str]) -> str:
        tensorboard.show({run: run_index.directory(run) for run in runs or []})
        return _tensorboard_link(tensorboard)

    def end() -> str:
        tensorboard.stop()
        return _tensorboard_link(tensorboard)

    start.click(guarded(access, begin), chosen, link)
    stop.click(guarded(access, end), None, link, **QUIET)
    return chosen


def _tensorboard_link(tensorboard: TensorBoard) -> str:
    runs = html.escape(", ".join(tensorboard.runs))
    if not runs:
        return "<p>TensorBoard is not running.</p>"
    return f'<p><a href="/tensorboard/" target="_blank" rel="noopener">Open TensorBoard</a>: {runs}</p>'


def _component(field: form.Field) -> Any:
    label, common = field.key, {"info": field.help or None, "min_width": 220, "elem_id": f"field-{field.key}"}
    if field.kind == "bool":
        return gr.Checkbox(field.default, label=label, interactive=True, **common)
    if field.kind == "choice":
        choices = [*([("null", None)] if field.optional else []), *((one, one) for one in field.choices)]
        return gr.Dropdown(choices, value=field.default, label=label, interactive=True, **common)
    lines = 3 if field.kind == "list" else 1
    return gr.Textbox(_shown(field.default), label=label, lines=lines, interactive=True, **common)


def _shown(value: Any) -> Any:
    """Numbers as text: what is typed is read by the same rules as on the command line."""
    return value if isinstance(value, bool | str) else "" if value is None else str(value)


def _told(action: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(action)
    def act(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except HarnessError as error:
            raise gr.Error(_text(error), title=type(error).__name__, print_exception=False) from error

    return act


def _text(of: object) -> str:
    """For a message, which Gradio would take for HTML."""
    return html.escape(str(of), quote=False)


def _code(text: object) -> str:
    return f"<code>{html.escape(str(text))}</code>"


def _changes(text: str) -> dict[str, Any]:
    """Lines of `key: value`."""
    read = plain_yaml(text or "", name="the field of changes") or {}
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise ConfigError("the changes are no lines of `key: value`", remedy="for example optim.lr: 0.001")
    return flatten(read)


def _steps(text: str) -> int | None:
    if not text.strip():
        return None
    if not text.strip().isdecimal():
        raise ConfigError(f"the checkpoint is {text!r}", rule="it is named by its number of steps")
    return int(text)


def _one_line(error: HarnessError) -> str:
    return " ".join(str(error).replace("`", "'").split())


def known_runs(run_index: RunIndex) -> list[str]:
    """What was started here, be it a run yet or not, newest first, and the runs that a search has found."""
    started = [program.name for program in programs.programs(run_index.root)]
    return list(dict.fromkeys([*started, *run_index.names()]))


def _chosen(run_index: RunIndex, run: str) -> Any:
    return gr.update(choices=known_runs(run_index), value=run)


def _directory(run_index: RunIndex, run: str | None) -> Any:
    if not run:
        raise LaunchError("no run is chosen", remedy="choose one in the field beside the button")
    return programs.run_directory(run_index.root, run)
