"""The compared algorithms' objectives as printed in their papers, one whole question at a time, in float64.

Written with one Python loop per answer and nothing shared with the package: the reference for tests/algorithms and for every
layout in tests/model.
"""

import torch


def literal_loss(name, logprobs, old_logprobs, is_correct, truncated, limit, options):
    """Σ over the answers of one question of their (unnormalised) loss; ``logprobs[k]`` are log π_θ of answer k's tokens.

    Returns one scalar per answer: what answer k adds to the sum.
    """
    num = len(logprobs)
    r = torch.tensor([float(c) for c in is_correct], dtype=torch.float64)
    rate = r.mean()
    ratios = [(logprobs[k] - old_logprobs[k]).exp() for k in range(num)]
    if name in ("nft", "rft"):
        return [_eq10(logprobs[k] - old_logprobs[k], is_correct[k], rate, name, options) for k in range(num)]
    if name == "infonca":
        s = torch.stack([ratio.log().sum() for ratio in ratios])
        share = r / r.sum() if r.sum() else r
        return list(-share * torch.softmax(options["beta"] * s, 0).log() - options["sft_weight"] * share * s)
    reward = r
    if name == "dapo":
        buffer = options["overlong_buffer"] * limit
        cut = [
            -1.0
            if truncated[k] or len(logprobs[k]) > limit
            else 0.0
            if len(logprobs[k]) <= limit - buffer
            else ((limit - buffer) - len(logprobs[k])) / buffer
            for k in range(num)
        ]
        reward = 2 * r - 1 + options["overlong_penalty"] * torch.tensor(cut, dtype=torch.float64)
    advantage = reward - reward.mean()
    if name != "dr_grpo" and (reward != reward[0]).any():
        advantage = advantage / ((reward - reward.mean()) ** 2).mean().sqrt()
    losses = []
    for k in range(num):
        if name == "gspo":  # the geometric mean of the ratios
            s = ratios[k].log().mean().exp()
            losses.append(
                -torch.minimum(s * advantage[k], s.clamp(1 - options["clip_low"], 1 + options["clip_high"]) * advantage[k])
            )
            continue
        if name == "cispo":
            weight = torch.minimum(ratios[k], torch.tensor(options["max_ratio"], dtype=torch.float64)).detach()
            losses.append(-(weight * advantage[k] * (logprobs[k] - old_logprobs[k])).sum())
            continue
        bounded = ratios[k].clamp(1 - options["clip_low"], 1 + options["clip_high"])
        loss = -torch.minimum(ratios[k] * advantage[k], bounded * advantage[k]).sum()
        losses.append(loss / len(ratios[k]) if options.get("per_answer_mean") else loss)
    return losses


def _eq10(delta, correct, rate, name, options):
    if name == "rft":
        return -delta.sum() * float(correct)
    if options["ratio_type"] == "sequence":  # Eq. 9: the answer is the one action
        delta = delta.sum(0, keepdim=True)
    if options["beyond_cap"] == "zero":  # the authors' code: R = exp(min(Δ, 10)), and r̂ in [margin, 1 − margin]
        delta = delta.clamp(max=10)
    rate = rate.clamp(options["rate_margin"], 1 - options["rate_margin"])
    ratio = delta.exp()
    omega = {"one": 1.0, "one_minus_rate": 1 - rate, "sqrt_odds": ((1 - rate) / rate).sqrt()}[options["prompt_weight"]]
    if correct:
        return -omega * ratio.log().sum()
    x = (1 - rate * ratio) / (1 - rate)
    max_v = (x.clamp(min=options["epsilon"]) - x).detach() + x
    return -omega * options["negative_weight"] * max_v.log().sum()
