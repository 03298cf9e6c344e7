"""Behind the pass `emit`: how the module of a stage is written.

`stage_class` and `block_class` write the classes, `lines` the lines of their functions, `weights` their attributes.
`spelling` writes an operator's call, `naming` names its result by the model's own source, which `statements` reads;
`scope` holds the names in use. Open `stage_class.py` first.
"""
