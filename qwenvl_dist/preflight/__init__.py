"""What goes wrong an hour into a run, looked for in a minute before it. Imports no torch until a check needs it.

checks.py      what a check is, in which order checks run, how the verdicts of all ranks become one
environment.py, storage.py, data.py, model.py, network.py, step.py, saving.py: the checks, by group
registry.py    all of them, in order, and those that `train` makes itself
"""
