"""What a configuration needs, before it runs: memory per rank, time per step, layouts that fit. Arithmetic, no processes.

``hardware`` describes GPUs, ``models`` the sizes of public models, ``layouts`` which rank holds what and which layouts are
impossible, ``workload`` what a step trains on. ``activations``, ``memory``, ``compute``, ``time`` and ``generation`` do the
arithmetic, ``estimate`` plans one layout and ``search`` all of them, ``report`` and ``command`` are what a user sees.
"""
