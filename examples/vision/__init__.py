"""The parts of `examples/train_vision.py`: data, runs, checkpoints, report."""
