"""The page: its tabs. Those that change something are in `control`; the two alone import Gradio.

Pictures and tables are elements of `assets/`, which ask the server under /api themselves; Gradio carries the
tabs, the form and every button that changes something.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from fastapi import FastAPI

from harness.dashboard.access import Access
from harness.dashboard.control import (
    RUN_LIST,
    all_runs,
    configuration_tab,
    custom_element,
    run_list,
    tensorboard_tab,
    training_tab,
)
from harness.dashboard.run_index import RunIndex
from harness.dashboard.tensorboard import TensorBoard

__all__ = ["mount_page"]

HEAD = """
<link rel="stylesheet" href="/own/uPlot.min.css">
<link rel="stylesheet" href="/own/dashboard.css">
<script src="/own/uPlot.iife.min.js"></script>
<script type="module" src="/own/dashboard.js"></script>
"""
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
POLL_EVENTS_EVERY_S, POLL_PROGRESS_EVERY_S = 0.1, 5.0
# Lists of runs are updated when one is opened, and again while it stays open, so that a run that has just
# begun appears in it.
RUNS_SCRIPT = """
element.addEventListener('harness-open', (event) => trigger('open', { run: event.detail }));
const isRunList = (node) => Boolean(node?.closest?.('.RUN_LIST'));
document.addEventListener('focusin', (event) => isRunList(event.target) && trigger('choose'));
setInterval(() => !document.hidden && isRunList(document.activeElement) && trigger('choose'), 1500);
""".replace("RUN_LIST", RUN_LIST)

# Said to the element itself: a property that is set to what it was before is no change, and nobody is told,
# though another run has been opened since.
SHOW_CHOSEN = "(run) => { document.querySelector('harness-monitor').run = run; return []; }"


def mount_page(app: FastAPI, run_index: RunIndex, access: Access, tensorboard: TensorBoard) -> FastAPI:
    """Puts the page at the root of `app`."""
    page = _page(run_index, access, tensorboard)
    theme = gr.themes.Default(font=FONTS, font_mono=MONO)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        head=HEAD,
        footer_links=[],
        run_history=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=True,
    )
    # By default Gradio polls its queue 1,000 times a second for events, which costs a tenth of a core, and
    # for progress bars, of which there are none.
    page._queue.sleep_when_free = POLL_EVENTS_EVERY_S
    page._queue.progress_update_sleep_when_free = POLL_PROGRESS_EVERY_S
    return app


def _page(run_index: RunIndex, access: Access, tensorboard: TensorBoard) -> gr.Blocks:
    with gr.Blocks(title="Harness", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1 style='margin:0'>Harness</h1>", padding=False)
        with gr.Tabs():
            with gr.Tab("Runs", id="runs"):
                runs = gr.HTML(
                    html_template="<harness-runs></harness-runs>",
                    js_on_load=RUNS_SCRIPT,
                    apply_default_css=False,
                )
            with gr.Tab("Monitoring", id="monitoring"):
                chosen = run_list("Run", "chosen-run", value=None)
                custom_element("harness-monitor")
            with gr.Tab("Compare", id="compare"):
                custom_element("harness-compare")
            with gr.Tab("Configuration", id="configuration"):
                fields = configuration_tab(access)
            with gr.Tab("Training", id="training"):
                controlled = training_tab(run_index, access, fields)
            with gr.Tab("TensorBoard", id="tensorboard"):
                drawn = tensorboard_tab(run_index, access, tensorboard)

        runs.open(_choose_run(run_index), outputs=chosen, show_progress="hidden")
        chosen.input(None, chosen, None, js=SHOW_CHOSEN)
        sent = gr.State(None)
        choices = [sent, chosen, controlled, drawn]
        runs.choose(_update_run_lists(run_index), sent, choices, show_progress="hidden", trigger_mode="once")
    return page


def _update_run_lists(run_index: RunIndex) -> Any:
    """Sends the names of runs if they are new: an update of an open list would undo what is typed there."""

    def update(sent: Any) -> Any:
        found, with_started = run_index.names(), all_runs(run_index)
        if sent == (found, with_started):
            return gr.skip()
        return (found, with_started), *(gr.update(choices=runs) for runs in (found, with_started, found))

    return update


def _choose_run(run_index: RunIndex) -> Any:
    """The page has turned to the run by itself; the list follows."""

    def choose_run(event: gr.EventData) -> Any:
        run = str(event.run)
        run_index.directory(run)
        return gr.update(choices=run_index.names(), value=run)

    return choose_run
