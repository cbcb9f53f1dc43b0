"""Products on 8-bit tensor cores with an MXFP4 weight, which loses nothing.

``product`` chooses and launches. ``weight`` decodes to e4m3 with one power of two per row, ``lowered`` prepares
kernels that decode as they multiply, and ``kernels`` quantizes rows of x and recomputes flagged columns.
"""
