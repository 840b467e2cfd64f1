"""The guard and the tracker in other people's trainers, a module for each; import the one that you need.

accelerate      `step_guard(accelerator, model, optimizer)` for loops of Hugging Face Accelerate
transformers    `guarded(Trainer)` for transformers' Trainer and TRL's trainers; `TrackerCallback`
lightning       `guarded_precision()`, a plugin for Lightning's Trainer; `GuardCallback`; `TrackerLogger`
"""
