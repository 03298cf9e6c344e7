"""The shell: one file a family of commands.

Imports any room; nothing imports this one. `main` lists the commands, `shared` holds the options that several have.
Open `main.py` first.
"""
