"""Products on 8-bit tensor cores with an MXFP4 weight, which loses nothing.

``product`` chooses and launches. ``weight`` decodes to e4m3 with one power of two per row, and ``lowered``
serves kernels that decode as they multiply. ``kernels`` quantizes the rows of x and recomputes flagged
columns.
"""
