"""The labels of a model's segments: the path of the module that a segment is of."""


def is_block(label: str) -> bool:
    """Whether the label is of a numbered block, such as ``"model.layers.3"``."""
    return label.rpartition(".")[2].isdigit()
