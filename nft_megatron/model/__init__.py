"""The model on Megatron-Core: the only package that imports it.

``topology`` places this process, ``build`` makes its part of the model, ``load`` fills it from a Hugging Face folder, ``export``
gives it back as Hugging Face tensors, ``optimizer`` updates it, ``checkpoint`` saves and restores all of it.
"""

import warnings

# Every Megatron module that looks for Apex or Transformer Engine warns when it finds none; `nft-megatron doctor` says it once.
warnings.filterwarnings("ignore", message=".*(Apex is not installed|Apex are not installed).*", category=UserWarning)
