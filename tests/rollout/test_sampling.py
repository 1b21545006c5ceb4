import numpy as np
import torch

from nft_megatron.rollout.sampling import draw, keep_top_p, stream_keys, uniforms


def test_uniforms_are_uniform_and_uncorrelated_within_and_across_streams():
    keys = stream_keys(list(range(400)))  # neighbouring seeds, as a run may use
    table = np.stack([uniforms(keys, np.full(400, count)) for count in range(500)], axis=1)  # [seed, token]
    assert table.min() >= 0
    assert table.max() < 1
    # χ² of 200,000 numbers in 1,000 bins: mean 999, standard deviation 44.7.
    counts = np.bincount((table.ravel() * 1000).astype(int), minlength=1000)
    assert abs(((counts - 200) ** 2 / 200).sum() - 999) < 4 * 44.7
    # Correlation of 200,000 independent pairs has standard deviation 0.0022.
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.01
    assert len(np.unique(table)) == table.size


def test_uniforms_are_splitmix64_started_at_the_key():
    def splitmix64(state: int, count: int) -> int:  # Vigna's public reference, in Python's integers
        mask = (1 << 64) - 1
        z = (state + (count + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    keys = stream_keys([0, 1, 2**63 - 1, -5])
    for count in (0, 1, 4095):
        expected = [(splitmix64(int(key), count) >> 12) / 2**52 for key in keys]
        assert uniforms(keys, np.full(4, count)).tolist() == expected
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published first output for this seed


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0]], dtype=torch.float64)
    logits = probs.log().float().expand(6, 5)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 2.0**-52], dtype=torch.float64)
    tokens, logprobs = draw(logits, uniform, temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # never a token of probability 0, not even at the end
    assert torch.allclose(logprobs.double(), probs[0, tokens].log(), atol=1e-6)


def test_top_p_keeps_the_smallest_nucleus_and_renormalises():
    probs = torch.tensor([[0.05, 0.4, 0.2, 0.35]])
    kept = keep_top_p(probs.log(), top_p=0.7).exp()
    assert torch.allclose(kept, torch.tensor([[0, 0.4 / 0.75, 0, 0.35 / 0.75]]), atol=1e-6)
    assert torch.allclose(keep_top_p(probs.log(), top_p=1e-9).exp(), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_a_certain_token_has_log_prob_zero_and_no_log_prob_is_positive():
    logits = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)) * 100
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, logprobs = draw(logits, uniform, temperature=0.3, top_p=1.0)
    assert logprobs.max() == 0
    assert logprobs.dtype == torch.float32
