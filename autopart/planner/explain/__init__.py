"""Questions about a plan: why it, why not another, what it costs by its decisions alone, who takes its bytes, which
mesh is best, and whether its numbers hold. Open `why.py` first.
"""
