import numpy as np

from nft_megatron.base.records import Sampling
from nft_megatron.rollout.stopping import StopRule


def test_stop_texts_are_found_across_tokens_and_within_characters(byte_tokenizer, tmp_path):
    rule = StopRule(Sampling(stop=("。\n", "答えは")), len(byte_tokenizer), tmp_path)
    texts = ["これで。\nおわり", "では答えは7", "🙂。\n", "答え は。 \n"]
    rows = [byte_tokenizer(text)["input_ids"] for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows)) + 1), dtype=np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    ends = [len("これで。\n".encode()), len("では答えは".encode()), len("🙂。\n".encode()), None]
    for row, end in enumerate(ends):
        found = [
            bool(rule.find(tokens, np.array([count if r == row else 1 for r in range(len(rows))]))[row])
            for count in range(1, (end or len(rows[row])) + 1)
        ]
        assert found == [count == end for count in range(1, len(found) + 1)]


def test_stop_tokens_beyond_the_vocabulary_never_match(tmp_path):
    rule = StopRule(Sampling(stop_token_ids=(3, 99)), vocab_size=5, folder=tmp_path)
    assert rule.find(np.array([[0, 3], [3, 4]]), np.array([2, 2])).tolist() == [True, False]
    assert rule.find(np.array([[0, 3], [3, 4]]), np.array([1, 1])).tolist() == [False, True]
