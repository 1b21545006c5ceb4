"""Same as ``nft-megatron convert to-megatron``; see README.md."""

import sys

from nft_megatron.cli.main import main

if __name__ == "__main__":
    main(["convert", "to-megatron", *sys.argv[1:]])
