"""What a configuration needs before it runs: memory of every rank, time of a step, layouts that fit. Arithmetic, no processes.

``hardware`` says what a GPU can do, ``models`` the sizes of public models, ``layouts`` who holds what and what cannot be,
``workload`` what a step trains on. ``activations``, ``memory``, ``compute``, ``time`` and ``generation`` are the arithmetic,
``estimate`` the plan of one layout and ``search`` of all of them, ``report`` and ``command`` what a user sees.
"""
