"""The command line, one file per command; :mod:`nft_megatron.cli.main` lists them.

A file has one function, ``add_arguments(parser)``, which sets the command's description, arguments and action. It is imported
when its command is given, and heavy modules only when that runs, so that help is instant.
"""
