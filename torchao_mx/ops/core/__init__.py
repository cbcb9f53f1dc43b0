"""The ground every op stands on: registration, argument checks and kernel launches.

``register`` makes a function an op whose operands are contiguous and aligned. ``arguments`` holds the verbs'
checks, ``operands`` the tuples that launchers take. ``launch`` starts kernels, ``tiles`` lists the tiles of
all kernels, and ``replay`` repeats an op's launches.
"""
