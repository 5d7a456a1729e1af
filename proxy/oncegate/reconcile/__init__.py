"""Settles unknown keys by what the API says about them.

`janitor.py` takes one step of each open key when it is due, and `step.py` is that step: `progress.py` says whether it
is due, `pace.py` whether the API may be asked now, `questions.py` asks, and `answers.py` has what later requests get.
"""
