"""What the fork server imports once: everything a run needs, single-threaded."""

import gc

import torch

torch.set_num_threads(1)

import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401

import nft_megatron.evaluate.folder  # noqa: E402
import nft_megatron.observe.report  # noqa: E402
import nft_megatron.rollout.decode  # noqa: E402
import nft_megatron.run.build  # noqa: E402
import nft_megatron.train  # noqa: E402, F401
from nft_megatron.model.cpu import adapt_to_cpu  # noqa: E402

if not torch.cuda.is_available():
    adapt_to_cpu()

# Garbage collection in a forked process would visit, and so copy, all of this: about two seconds per process.
gc.collect()
gc.freeze()
