"""The history of a run as tests compare it: without what was measured on the way, such as its speed."""

import json

from kit.training.throughput import MEASURED


def computed(entry):
    """Return a log entry without what differs between two runs that compute the same, whatever stands before a name."""
    return {name: value for name, value in entry.items() if name.rpartition("/")[2] not in MEASURED}


def read_history(run):
    """Return the entries of a run directory's `metrics.jsonl`, of each what was computed."""
    return [computed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
