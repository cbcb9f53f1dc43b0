"""Products on 8-bit tensor cores with an MXFP4 weight that loses nothing.

``product`` chooses and launches; ``weight`` decodes to e4m3 with one power of two per row, ``lowered`` where that
power varies within a row; ``kernels`` quantizes the rows of x and computes flagged rows again.
"""
