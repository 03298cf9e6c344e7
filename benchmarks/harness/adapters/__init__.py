"""One file for each rival that has to know the model: `build(setting) -> (step, note)`."""
