"""How fast the kit is beside its neighbours and the bounds of the machine: `python -m benchmarks.speed`."""
