"""See every run in a browser, start one, stop one: `harness dashboard`.

Stands beside training: it reads logs through `harness.runlog.digest`, and starts runs as programs of their
own. Nothing here is imported by a run.
"""
