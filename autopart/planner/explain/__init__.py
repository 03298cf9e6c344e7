"""Questions about a plan: why it was chosen, why not another one, what its decisions cost, who owns its bytes, which
mesh is best, and whether its numbers are right. Open `why.py` first.
"""
