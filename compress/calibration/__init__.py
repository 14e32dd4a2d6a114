"""Calibration data: corpora by name (`text`, `stdlib`), and windows cut from them (`windows`)."""
