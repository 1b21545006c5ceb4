"""Same as ``nft-megatron convert to-hf``; see README.md."""

import sys

from nft_megatron.cli.main import main

if __name__ == "__main__":
    main(["convert", "to-hf", *sys.argv[1:]])
