"""A plan as data: what was decided and what it costs, as JSON, as text, on a clock, and as other systems' settings.

Pipeline schedules are here too. Imports `errors`, `hardware`, `sharding`, `ir` and `cost`; makes no decision.
Open `data.py` first.
"""
