"""The tabs that change something: the configuration as a form, and real runs started, stopped, resumed.

What a button does is checked once more when it is pressed, whatever the page shows: a read-only dashboard
refuses all of it.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from harness.config import TrainConfig, flatten
from harness.config.plain_yaml import plain_yaml
from harness.dashboard import commands, forks, form, programs
from harness.dashboard.access import Access
from harness.dashboard.records import Program
from harness.dashboard.run_index import RunIndex
from harness.dashboard.tensorboard import TensorBoard
from harness.errors import ConfigError, HarnessError, LaunchError

__all__ = [
    "RUN_LIST",
    "Form",
    "all_runs",
    "configuration_tab",
    "custom_element",
    "run_list",
    "tensorboard_tab",
    "training_tab",
]

RUN_LIST = "h-run-list"
"""Class of the lists of runs, which `page` keeps up to date."""
SMALL: dict[str, Any] = {"scale": 0, "min_width": 130, "size": "md"}
"""A button as wide as its label, beside fields."""
QUIET: dict[str, Any] = {"show_progress": "hidden"}
LATEST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""What is chosen while an earlier choice is being answered counts too; by default it would be dropped."""
MAX_PROCESSES = 1024
OPEN_SECTIONS = ("", "loop", "optim")
VALID = "This configuration is valid."
SHOW_RUN = """
const show = () => { const it = element.querySelector('NAME'); if (it && props.value) it.run = props.value; };
customElements.whenDefined('NAME').then(show);
watch('value', show);
"""


def custom_element(name: str, **more: Any) -> gr.HTML:
    """One of the elements of `assets/`; its value is the run that it shows."""
    script = SHOW_RUN.replace("NAME", name)
    template = f"<{name}></{name}>"
    return gr.HTML(None, html_template=template, js_on_load=script, apply_default_css=False, **more)


def run_list(label: str, elem_id: str, **more: Any) -> gr.Dropdown:
    """A list of runs, empty until it is opened."""
    return gr.Dropdown([], label=label, interactive=True, elem_id=elem_id, elem_classes=RUN_LIST, **more)


def all_runs(run_index: RunIndex) -> list[str]:
    """What was started here, whether or not it has made a run yet, newest first; then the other runs."""
    started = [program.name for program in programs.programs(run_index.root)]
    return list(dict.fromkeys([*started, *run_index.names()]))


class Form:
    """Every key of the schema as a component, in the order of `form.sections`."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.components: list[Any] = []
        for section in form.sections():
            is_open = section.name in OPEN_SECTIONS
            with gr.Accordion(section.title, open=is_open), gr.Row(elem_classes="h-fields"):
                for field in section.fields:
                    self.keys.append(field.key)
                    self.components.append(_component(field))

    def read(self, values: Sequence[Any]) -> TrainConfig:
        """What is filled in; refused with the error messages of the command line."""
        return form.read(dict(zip(self.keys, values, strict=True)))

    def show(self, config: TrainConfig) -> list[Any]:
        """The components' values for a configuration."""
        values = form.values_of(config)
        return [_shown(values[key]) for key in self.keys]


def configuration_tab(access: Access) -> Form:
    """The form, the YAML that it stands for, and the configurations to start from."""
    with gr.Row(elem_classes="h-buttons"):
        preset = gr.Dropdown(
            form.presets(), value=form.DEFAULTS, label="Start from", elem_id="preset", interactive=True
        )
        name = gr.Textbox(
            label=f"Save as {form.configs_folder()}/NAME.yaml", placeholder="NAME", elem_id="save-name"
        )
        overwrite = gr.Checkbox(label="overwrite")
        save = _control_button("Save", "save", access)
    with gr.Row():
        with gr.Column(scale=3, min_width=480):
            fields = Form()
        with gr.Column(scale=2, min_width=320, elem_classes="h-preview"):
            verdict = gr.Markdown(VALID, elem_id="verdict")
            text = gr.Code(
                form.yaml_of(TrainConfig(), only_changes=True),
                language="yaml",
                label="YAML (only what differs from the defaults)",
                interactive=False,
            )

    def save_preset(preset_name: str, replace: bool, *values: Any) -> Any:
        path = form.save(fields.read(values), preset_name, overwrite=replace)
        gr.Info(_text(f"saved as {path}"))
        return gr.update(choices=form.presets())

    check = functools.partial(_check, fields)
    for component in fields.components:
        event = component.blur if isinstance(component, gr.Textbox) else component.input
        event(check, fields.components, [verdict, text], **QUIET, trigger_mode="always_last")
    preset.focus(lambda: gr.update(choices=form.presets()), None, preset, **QUIET)
    load = _reporting_errors(lambda chosen: fields.show(form.preset(chosen)))
    loaded = preset.input(load, preset, fields.components, **LATEST)
    loaded.then(check, fields.components, [verdict, text], **QUIET)
    save.click(_needing_control(access, save_preset), [name, overwrite, *fields.components], preset, **QUIET)
    return fields


def training_tab(run_index: RunIndex, access: Access, fields: Form) -> gr.Dropdown:
    """Start runs, follow their output, stop, resume and fork them. Returns the list of runs."""
    gr.Markdown(
        f"Runs are started in {_code(run_index.root)} as separate processes, which keep running when the "
        "dashboard ends."
        if access.controls
        else "This dashboard is read-only; started with `--control`, it can start and stop runs."
    )
    chosen = run_list("Run", "controlled-run", allow_custom_value=True, render=False)
    output = custom_element("harness-output", render=False)
    processes = _start_row(run_index, access, fields, shown=[chosen, output])
    _run_row(run_index, access, chosen, output)
    _fork_row(run_index, access, chosen, output)
    output.render()
    _command_row(fields, processes)
    chosen.input(lambda run: run, chosen, output, **LATEST)
    return chosen


def _start_row(run_index: RunIndex, access: Access, fields: Form, *, shown: list[Any]) -> gr.Number:
    """Starts runs, which are then `shown`. Returns the number of processes."""
    with gr.Row(elem_classes="h-buttons"):
        processes = gr.Number(1, label="Processes", precision=0, elem_id="processes")
        start = _control_button("Start the configured run", "start", access, variant="primary")
        demo = _control_button("Start the demo run", "demonstrate", access)

    def start_config(config: TrainConfig, count: float) -> tuple[Any, str]:
        program = programs.start(config, runs_dir=run_index.root, processes=_processes(count))
        return _started(run_index, program, "")

    def start_form(count: float, *values: Any) -> tuple[Any, str]:
        return start_config(fields.read(values), count)

    def start_demo(count: float) -> tuple[Any, str]:
        return start_config(TrainConfig(), count)

    start.click(_needing_control(access, start_form), [processes, *fields.components], shown, **QUIET)
    demo.click(_needing_control(access, start_demo), processes, shown, **QUIET)
    return processes


def _run_row(run_index: RunIndex, access: Access, chosen: gr.Dropdown, output: gr.HTML) -> None:
    """Stops, resumes and kills the chosen run."""
    with gr.Row(elem_classes="h-buttons"):
        chosen.render()
        steps = gr.Number(None, label="New total steps (0: unchanged)", precision=0, elem_id="new-steps")
        stop = _control_button("Stop with a checkpoint", "stop", access)
        resume = _control_button("Resume", "resume", access)
        kill = _control_button("Kill", "kill", access, variant="stop")
    with gr.Row(visible=False, elem_classes="h-buttons") as question:
        asked = gr.Markdown(elem_id="kill-question")
        sure = _control_button("Kill it", "kill-it", access, variant="stop")
        spare = _control_button("Let it run", "spare-it", access)

    def ask(run: str) -> tuple[Any, str]:
        directory = _directory(run_index, run)
        words = f"Kill {_code(directory.name)}? It saves nothing: steps since its last checkpoint are lost."
        return gr.update(visible=True), words

    def stop_run(run: str) -> None:
        programs.stop(_directory(run_index, run), within=run_index.root)
        gr.Info(
            _text(
                f"{run} will finish its step, save a checkpoint and exit; while it starts, it exits at once"
            )
        )

    def resume_run(run: str, new_steps: float | None) -> str:
        total = int(new_steps) if new_steps else None
        programs.resume(_directory(run_index, run), steps=total, within=run_index.root)
        gr.Info(_text(f"{run} is resumed"))
        return run

    def kill_run(run: str) -> Any:
        programs.kill(_directory(run_index, run), within=run_index.root)
        gr.Info(_text(f"{run} is killed"))
        return gr.update(visible=False)

    stop.click(_needing_control(access, stop_run), chosen, **QUIET)
    resume.click(_needing_control(access, resume_run), [chosen, steps], output, **QUIET)
    kill.click(_needing_control(access, ask), chosen, [question, asked], **QUIET)
    sure.click(_needing_control(access, kill_run), chosen, question, **QUIET)
    spare.click(lambda: gr.update(visible=False), None, question, **QUIET)
    chosen.change(lambda: gr.update(visible=False), None, question, **QUIET)


def _fork_row(run_index: RunIndex, access: Access, chosen: gr.Dropdown, output: gr.HTML) -> None:
    """Starts a new run from the chosen one, or from one of its checkpoints, with changes."""
    with gr.Accordion("Fork the run with changes", open=False), gr.Row(elem_classes="h-buttons"):
        name = gr.Textbox(label="Name of the new run", elem_id="fork-name")
        changes = gr.Textbox(
            label="Changes, one per line", placeholder="optim.lr: 0.001", lines=3, elem_id="fork-changes"
        )
        step = gr.Textbox(
            label="From the checkpoint at step", placeholder="empty: from the beginning", elem_id="fork-step"
        )
        fork = _control_button("Fork", "fork", access)

    def fork_run(run: str, new_name: str, text: str, at: str) -> tuple[Any, str]:
        parent, overrides = _directory(run_index, run), _changes(text)
        program = forks.fork(parent, new_name.strip(), overrides, step=_step(at), within=run_index.root)
        return _started(run_index, program, f" as a fork of {run}")

    action = _needing_control(access, fork_run)
    fork.click(action, [chosen, name, changes, step], [chosen, output], **QUIET)


def _command_row(fields: Form, processes: gr.Number) -> None:
    """The command line of the configured run, which a read-only dashboard shows too."""
    with gr.Accordion("Command to start the configured run elsewhere", open=False):
        with gr.Row(elem_classes="h-buttons"):
            launcher = gr.Dropdown(
                list(get_args(commands.Launcher)),
                value="python",
                label="Launcher",
                interactive=True,
                elem_id="launcher",
            )
            nodes = gr.Number(1, label="Nodes", precision=0, elem_id="nodes")
            show = gr.Button("Show the command", elem_id="show-command", **SMALL)
        command = gr.Code(language="shell", label="command", interactive=False, elem_id="command")

    def command_text(how: Any, count: float, num_nodes: float, *values: Any) -> str:
        config = fields.read(values)
        return commands.command(config, how, processes=_processes(count), nodes=_whole(num_nodes, "nodes"))

    inputs = [launcher, processes, nodes, *fields.components]
    show.click(_reporting_errors(command_text), inputs, command, **QUIET)


def tensorboard_tab(run_index: RunIndex, access: Access, tensorboard: TensorBoard) -> gr.Dropdown:
    """Start TensorBoard for chosen runs, link to it, stop it. Returns the list of runs."""
    gr.Markdown("TensorBoard opens at this dashboard's own address, and ends with the dashboard.")
    with gr.Row(elem_classes="h-buttons"):
        chosen = run_list("Runs", "tensorboard-runs", multiselect=True)
        start = _control_button("Show in TensorBoard", "tensorboard-start", access)
        stop = _control_button("Stop TensorBoard", "tensorboard-stop", access)
    # A function: what runs is asked when the page is opened.
    link = gr.HTML(lambda: _tensorboard_link(tensorboard), elem_id="tensorboard-link")

    def show_runs(runs: list[str]) -> str:
        tensorboard.show({run: run_index.directory(run) for run in runs or []})
        return _tensorboard_link(tensorboard)

    def stop_it() -> str:
        tensorboard.stop()
        return _tensorboard_link(tensorboard)

    start.click(_needing_control(access, show_runs), chosen, link)
    stop.click(_needing_control(access, stop_it), None, link, **QUIET)
    return chosen


def _tensorboard_link(tensorboard: TensorBoard) -> str:
    runs = html.escape(", ".join(tensorboard.runs))
    if not runs:
        return "<p>TensorBoard is not running.</p>"
    return f'<p><a href="/tensorboard/" target="_blank" rel="noopener">Open TensorBoard</a>: {runs}</p>'


def _check(fields: Form, *values: Any) -> tuple[str, Any]:
    """Whether the form can be run, or why not; and its YAML."""
    try:
        return VALID, form.yaml_of(fields.read(values), only_changes=True)
    except HarnessError as error:
        return f"```\n{' '.join(str(error).replace('`', chr(39)).split())}\n```", gr.skip()


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


def _control_button(label: str, elem_id: str, access: Access, **more: Any) -> gr.Button:
    """A button that changes something."""
    return gr.Button(label, interactive=access.controls, elem_id=elem_id, **SMALL, **more)


def _needing_control(access: Access, action: Callable[..., Any]) -> Callable[..., Any]:
    """An action that a read-only dashboard refuses."""

    def refuse(*arguments: Any) -> Any:
        raise gr.Error("this dashboard is read-only: start it with --control", print_exception=False)

    return _reporting_errors(action) if access.controls else refuse


def _reporting_errors(action: Callable[..., Any]) -> Callable[..., Any]:
    """An action whose errors for users are shown in the page's corner."""

    @functools.wraps(action)
    def act(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except HarnessError as error:
            raise gr.Error(_text(error), title=type(error).__name__, print_exception=False) from error

    return act


def _started(run_index: RunIndex, program: Program, origin: str) -> tuple[Any, str]:
    """Says so; values for the list of runs and the output."""
    gr.Info(_text(f"{program.name} is started{origin}"))
    return gr.update(choices=all_runs(run_index), value=program.name), program.name


def _processes(count: float | None) -> int:
    return _whole(count, "processes")


def _whole(count: float | None, what: str) -> int:
    """A number of processes, or of nodes. Refused here: Gradio would not say which field is meant."""
    if count is None or not 1 <= count <= MAX_PROCESSES or count != int(count):
        number = "empty" if count is None else f"{count:g}"
        rule = f"it is a whole number from 1 to {MAX_PROCESSES}"
        raise ConfigError(f"the number of {what} is {number}", rule=rule)
    return int(count)


def _directory(run_index: RunIndex, run: str | None) -> Path:
    if not run:
        raise LaunchError("no run is chosen", remedy="choose one in the list beside the button")
    return programs.run_directory(run_index.root, run)


def _changes(text: str) -> dict[str, Any]:
    """Lines of `key: value`."""
    read = plain_yaml(text or "", name="the field of changes") or {}
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise ConfigError(
            "the changes are not lines of `key: value`", remedy="write, for example, optim.lr: 0.001"
        )
    return flatten(read)


def _step(text: str) -> int | None:
    if text.strip() and not text.strip().isdecimal():
        raise ConfigError(f"the checkpoint is {text!r}", rule="a checkpoint is named by its step, a number")
    return int(text) if text.strip() else None


def _text(of: object) -> str:
    """For a message, which Gradio would take for HTML."""
    return html.escape(str(of), quote=False)


def _code(text: object) -> str:
    return f"<code>{html.escape(str(text))}</code>"
