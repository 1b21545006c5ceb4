"""The model on Megatron-Core: the only package that imports it.

``topology`` places this process, ``build`` makes its part of the model, ``load`` fills it from a Hugging Face folder and
``export`` gives it back, ``logprob`` scores tokens, ``step`` trains, ``optimizer`` updates, ``checkpoint`` saves and restores.
"""

import warnings

# What Megatron-Core 0.16.1 makes every run say, about itself: fast paths it did not find (`nft-megatron doctor` lists them),
# and calls of its own that torch 2.13 deprecates.
for _message in (
    ".*(Apex is not installed|Apex are not installed).*",
    "full scope is deprecated",
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
):
    warnings.filterwarnings("ignore", message=_message)
