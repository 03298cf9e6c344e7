"""Behind the pass `emit`: names of emitted values, spelling of operators, and equal blocks as classes.

Open `spelling.py` first.
"""
