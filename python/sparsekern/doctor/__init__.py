"""``python -m sparsekern doctor``: does every kernel compute the right numbers on this machine?

``cases`` says what is tried; ``check`` does it, against float64; ``command`` is the command line.
"""
