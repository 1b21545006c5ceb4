"""The embedded engine in one process, compared with Hugging Face's own forward pass and ``generate``."""

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Request, Sampling
from nft_megatron.rollout.decode import Decoder
from nft_megatron.rollout.embedded import EmbeddedEngine
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.weights import read_shape
from nft_megatron.weights.fingerprint import weights_fingerprint

VOCAB = 61
SIZES: dict = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from uniform, so that a wrong key or position is noticed
}


def build(config_class, model_class, **changes):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **changes})
    config.architectures = [model_class.__name__]
    return model_class(config).eval().float()


@pytest.fixture(scope="module")
def model():
    return build(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.config.save_pretrained(path)
    return path


def make_engine(folder, model, batch_size=16):
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=0, batch_size=batch_size)
    engine.load(model.named_parameters(), version=7)
    return engine


def make_requests(num=12, answers=3, seed=0):
    """Prompts of 1 to 30 tokens, so that batches are ragged."""
    rng = np.random.default_rng(seed)
    lengths = [1, 30, *rng.integers(1, 30, num - 2)]
    return [
        Request(i, rng.integers(0, VOCAB, length).astype(np.int32), tuple(1000 * i + k for k in range(answers)))
        for i, length in enumerate(lengths)
    ]


def reference_logprobs(model, prompt, tokens, temperature, top_p):
    """Log-probs of one answer from one full forward pass without a cache, in float64 after the logits."""
    row = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt) - 1 : -1].double() / (temperature or 1.0)
    logprobs = torch.log_softmax(logits, dim=-1)
    if top_p < 1:
        for position in range(len(tokens)):
            order = logprobs[position].argsort(descending=True)
            total, kept = 0.0, []
            for token in order.tolist():
                kept.append(token)
                total += float(logprobs[position, token].exp())
                if total >= top_p:
                    break
            mask = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
            mask[kept] = logprobs[position, kept] - np.log(total)
            logprobs[position] = mask
    return logprobs[torch.arange(len(tokens)), torch.from_numpy(tokens).long()].numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (0.6, 0.7), (0.0, 1.0)])
def test_logprobs_equal_a_full_forward_pass(model, folder, temperature, top_p):
    requests = make_requests()
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=20, stop_token_ids=(5,))
    completions = list(make_engine(folder, model).generate(requests, sampling))
    assert sorted((c.request_id, c.index) for c in completions) == [(i, k) for i in range(12) for k in range(3)]
    for completion in completions:
        expected = reference_logprobs(
            model, requests[completion.request_id].prompt_tokens, completion.tokens, temperature, top_p
        )
        # Relative beyond 1 nat: on some processors float32 is 1.1e-5 off at a log-prob of −8.3.
        assert (np.abs(completion.logprobs - expected) < 1e-5 * np.maximum(1, np.abs(expected))).all()
        assert completion.logprobs.dtype == np.float32
        assert completion.tokens.dtype == np.int32
        assert completion.weight_version == 7


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)],
)
def test_untied_models_of_several_families(config_class, model_class, tmp_path):
    model = build(config_class, model_class, tie_word_embeddings=False, head_dim=16)
    model.config.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, batch_size=8)
    decoder.load(model.named_parameters(), version=1)
    requests = make_requests(num=5)
    for completion in decoder.generate(requests, Sampling(max_tokens=12)):
        expected = reference_logprobs(model, requests[completion.request_id].prompt_tokens, completion.tokens, 1.0, 1.0)
        assert np.abs(completion.logprobs - expected).max() < 1e-5


def test_bfloat16_is_as_close_to_float32_as_transformers(model, folder):
    decoder = Decoder(folder, batch_size=16, dtype=torch.bfloat16)
    decoder.load(model.named_parameters(), version=1)
    rounded = Qwen2ForCausalLM(model.config).eval().bfloat16()
    rounded.load_state_dict(model.state_dict())
    requests, ours, theirs = make_requests(), [], []
    for completion in decoder.generate(requests, Sampling(max_tokens=20)):
        prompt, tokens = requests[completion.request_id].prompt_tokens, completion.tokens
        exact = reference_logprobs(model, prompt, tokens, 1.0, 1.0)
        ours.append(np.abs(completion.logprobs - exact).mean())
        theirs.append(np.abs(reference_logprobs(rounded, prompt, tokens, 1.0, 1.0) - exact).mean())
    assert 1e-3 < np.mean(ours) < 1.3 * np.mean(theirs)


def test_greedy_equals_generate(model, folder):
    requests = make_requests(answers=1)
    answers = {c.request_id: c for c in make_engine(folder, model).generate(requests, Sampling(temperature=0, max_tokens=24))}
    for request in requests:
        row = torch.from_numpy(request.prompt_tokens).long()[None]
        expected = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answers[request.request_id].tokens.tolist() == expected[0, row.shape[1] :].tolist()
        assert answers[request.request_id].finish_reason == "length"


def test_answers_depend_on_neither_batch_size_nor_order(model, folder):
    requests = make_requests(num=24, answers=4)
    sampling = Sampling(max_tokens=20, stop_token_ids=(5, 6, 7))

    def tokens_by_answer(batch_size, requests):
        completions = make_engine(folder, model, batch_size).generate(requests, sampling)
        return {(c.request_id, c.index): (c.tokens.tolist(), c.finish_reason) for c in completions}

    one_by_one = tokens_by_answer(1, requests)
    assert len(one_by_one) == 96
    assert len({tuple(tokens) for tokens, _ in one_by_one.values()}) > 90
    assert tokens_by_answer(7, requests) == one_by_one
    assert tokens_by_answer(64, requests) == one_by_one
    assert tokens_by_answer(7, [requests[i] for i in np.random.default_rng(1).permutation(24)]) == one_by_one


def test_a_call_repeats_bit_for_bit(model, folder):
    engine, sampling = make_engine(folder, model, 7), Sampling(max_tokens=20, stop_token_ids=(5, 6))
    first, second = (list(engine.generate(make_requests(), sampling)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.request_id, a.index, a.tokens.tolist()) == (b.request_id, b.index, b.tokens.tolist())
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_first_tokens_follow_the_softmax(model, folder):
    prompt = np.array([3, 1, 4, 1, 5], dtype=np.int32)
    num_answers, temperature = 6000, 0.7
    request = Request(0, prompt, tuple(range(num_answers)))
    completions = make_engine(folder, model, 256).generate([request], Sampling(temperature=temperature, max_tokens=1))
    counts = np.bincount([c.tokens[0] for c in completions], minlength=VOCAB)
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt).long()[None]).logits[0, -1].double()
    probs = torch.softmax(logits / temperature, dim=-1).numpy()

    def p_value(probs):
        common = probs * num_answers >= 5
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(probs[common], probs[~common].sum()) * num_answers
        statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-12)).sum()
        freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
        return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))

    assert p_value(probs) > 1e-3
    # The test has power: it detects a temperature that is off by a sixth.
    assert p_value(torch.softmax(logits / (temperature * 7 / 6), dim=-1).numpy()) < 1e-6


def test_stop_tokens_are_kept_and_end_the_answer(model, folder):
    stop = (5, 6, 7, 8, 9, 10)
    completions = list(make_engine(folder, model).generate(make_requests(20, 4), Sampling(max_tokens=15, stop_token_ids=stop)))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        *body, last = completion.tokens.tolist()
        assert not set(body) & set(stop)
        assert (last in stop) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.tokens) == 15


def test_stop_texts_end_the_answer_with_the_token_that_completes_them(model, folder, tmp_path):
    from tokenizers import Tokenizer, decoders, models

    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)]  # a…z, aa…zz, aaa…
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(letters)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    model.config.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    requests, stop = make_requests(20, 4), ("ab", "cc", "xyz", "e")
    free = {
        (c.request_id, c.index): c.tokens.tolist()
        for c in make_engine(tmp_path, model).generate(requests, Sampling(max_tokens=15))
    }
    stopped = list(make_engine(tmp_path, model).generate(requests, Sampling(max_tokens=15, stop=stop)))
    assert {c.finish_reason for c in stopped} == {"stop", "length"}
    for completion in stopped:
        whole = free[completion.request_id, completion.index]
        texts = ["".join(letters[token] for token in whole[:length]) for length in range(1, 16)]
        ends = [length for length, text in enumerate(texts, start=1) if any(s in text for s in stop)]
        assert completion.tokens.tolist() == whole[: ends[0] if ends else 15]
        assert completion.finish_reason == ("stop" if ends else "length")


def test_answers_arrive_while_others_are_still_being_generated(model, folder):
    sampling = Sampling(max_tokens=60, stop_token_ids=tuple(range(8)))
    lengths = [len(c.tokens) for c in make_engine(folder, model, 32).generate(make_requests(8, 4), sampling)]
    assert lengths == sorted(lengths)  # all start together, so the shortest is yielded first
    assert lengths[0] < lengths[-1]


def test_the_fingerprint_is_that_of_the_stream_in_any_order(model, folder):
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=0, batch_size=2)
    expected = weights_fingerprint(model.named_parameters())
    assert engine.load(reversed(list(model.named_parameters())), version=1) == expected
    changed = {name: tensor.clone() for name, tensor in model.named_parameters()}
    changed["model.norm.weight"][3] += 1e-3
    assert engine.load(changed.items(), version=2) != expected


@pytest.mark.parametrize("fault", ["missing", "unexpected", "repeated", "shape"])
def test_a_faulty_stream_is_rejected_and_leaves_no_weights(model, folder, fault):
    engine = make_engine(folder, model)
    stream = list(model.named_parameters())
    name, tensor = stream[4]
    if fault == "missing":
        del stream[4]
    elif fault == "unexpected":
        name = "lm_head.weight"
        stream.append((name, tensor))
    elif fault == "repeated":
        stream.append((name, tensor))
    else:
        stream[4] = (name, tensor.detach()[..., :-1])
    with pytest.raises(UserError, match=name):
        engine.load(stream, version=8)
    with pytest.raises(EngineFault, match="no weights"):
        engine.generate(make_requests(), Sampling())


def test_weights_that_are_not_finite_are_a_fault(model, folder):
    engine = EmbeddedEngine(folder, read_shape(folder), num_processes=0, batch_size=2)
    engine.load(((name, tensor * float("nan")) for name, tensor in model.named_parameters()), version=3)
    with pytest.raises(EngineFault, match="not finite with the weights of version 3"):
        list(engine.generate(make_requests(), Sampling(max_tokens=4)))


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([1] * 100, Sampling(max_tokens=29), "rollout.max_answer_tokens = 29.*at most 28"),
        ([], Sampling(), "no tokens"),
        ([VOCAB], Sampling(), "outside the vocabulary"),
        ([1], Sampling(top_p=0.0), "top_p"),
        ([1], Sampling(temperature=-1.0), "temperature"),
        ([1], Sampling(max_tokens=0), "rollout.max_answer_tokens"),
    ],
)
def test_requests_that_cannot_be_answered_are_rejected_at_once(model, folder, prompt, sampling, message):
    with pytest.raises(UserError, match=message):
        make_engine(folder, model).generate([Request(0, np.array(prompt, dtype=np.int32), (1,))], sampling)


def test_an_answer_may_fill_the_context(model, folder):
    request = Request(0, np.ones(100, dtype=np.int32), (1, 2))
    assert [len(c.tokens) for c in make_engine(folder, model).generate([request], Sampling(max_tokens=28))] == [28, 28]


def test_sliding_windows_are_rejected(tmp_path):
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sliding"):
        Decoder(tmp_path, batch_size=2)
