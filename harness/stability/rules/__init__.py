"""Spike rules, a module each; made by `harness.stability.detectors.make_rule`."""
