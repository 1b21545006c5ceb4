"""``python -m nft_megatron``: the same as the command ``nft-megatron``, for torchrun and srun."""

from nft_megatron.cli.main import main

if __name__ == "__main__":
    main()
