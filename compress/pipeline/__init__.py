"""A run: plan, calibration, the walk over the layers, output, evaluation."""
