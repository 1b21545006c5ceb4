"""Same as ``nft-megatron convert check``; see README.md."""

import sys

from nft_megatron.cli.main import main

if __name__ == "__main__":
    main(["convert", "check", *sys.argv[1:]])
