"""What a GPU has to show, in one run: kernels, training steps, memory and calibration."""
