"""Bad inputs by the room that they spoil; `tests/test_troubleshooting.py` runs a command on each of them."""
