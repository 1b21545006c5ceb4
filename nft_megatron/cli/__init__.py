"""The command line, one file a command; :mod:`nft_megatron.cli.main` lists them.

A file has one function, ``add_arguments(parser)``: it says what the command is for, what it takes, and what runs it. It is
imported when its command is given, and what is heavy only when that runs, so that help comes at once.
"""
