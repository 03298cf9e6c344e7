"""Measures the devices and links of this machine, and writes what was found as a file of rows.

`run` starts as many ranks as are asked for; they all measure the same at the same time, as they will train, over rounds
that go through everything, so that whatever else the machine does is spread over all of it. Open `run.py` first.

    compute_cases.py, communication_cases.py   what is timed
    measure.py                                 all of it in turn, round after round
    profile.py                                 medians and spreads -> rows of the tables of devices and links -> TOML
    worker.py                                  one rank
"""

from .run import calibrate as calibrate
