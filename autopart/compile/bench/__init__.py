"""Step times of a model under autopart's plans and under PyTorch's own ways to train on several ranks."""
