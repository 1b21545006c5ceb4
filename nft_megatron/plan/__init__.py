"""What a configuration needs before it runs: memory of every rank, time of a step, layouts that fit. Arithmetic, no processes.

``hardware`` says what a GPU can do, ``models`` the sizes of public models, ``layouts`` who holds what and what cannot be,
``workload`` what a step trains on, ``memory``, ``compute``, ``time`` and ``generation`` the arithmetic, ``estimate`` the whole
plan of a configuration, ``search`` the layouts that fit, ``report`` the table on the terminal.
"""
