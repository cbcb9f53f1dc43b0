"""What every op stands on: how it is registered, what its verb checks, and how its kernels are launched.

``register`` makes a function an op, with operands that are contiguous and aligned; ``arguments`` holds the checks
of the verbs, ``operands`` the tuples that launchers take; ``launch`` starts kernels, ``tiles`` has the tiles of
all of them, and ``replay`` repeats what an op launched.
"""
