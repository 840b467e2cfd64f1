"""Is all well for a training, before it starts?"""

from harness.doctor.finding import Finding, Site, Verdict, worst
from harness.doctor.machine import examine

__all__ = ["Finding", "Site", "Verdict", "examine", "worst"]
