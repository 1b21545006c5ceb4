"""A small LM head with padding, and float64 formulas on its full logits: the reference for tests of the chunked versions."""

import torch

HIDDEN, VOCAB = 16, 50


def problem(num_tokens=37, padded=64, dtype=torch.float32, scale=1.0, seed=0):
    """Hidden states, an LM head with non-zero padding rows, targets, and incoming gradients for log-probs and entropy."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    upstream = torch.randn(2, num_tokens, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, upstream.to(torch.promote_types(dtype, torch.float32))


def full_logprobs(hidden, weight, temperature):
    """Log-probs of the whole vocabulary without padding, [tokens, VOCAB]."""
    return (hidden @ weight[:VOCAB].T / temperature).log_softmax(-1)


def reference(hidden, weight, targets, upstream, temperature, entropy="value"):
    """In float64, by automatic differentiation: log-probs, entropy, and the gradients of hidden states and weight."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    all_logprobs = full_logprobs(hidden, weight, temperature)
    logprob = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    total = (logprob * upstream[0].double()).sum()
    if entropy == "gradient":
        total = total + (entropies * upstream[1].double()).sum()
    return logprob.detach(), entropies.detach(), *torch.autograd.grad(total, (hidden, weight))


def assert_all_close(actual, expected, tolerance):
    """Assert, per tensor, a largest difference below ``tolerance`` times the reference's largest value."""
    for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - e).abs().max().item() / max(1.0, e.abs().max().item())
        assert error < tolerance, (position, error)
