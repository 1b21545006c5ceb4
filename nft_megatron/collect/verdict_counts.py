"""What to say when answers give nothing to learn from: how they were judged, and one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nft_megatron.base.records import Group
from nft_megatron.data.wording import bare
from nft_megatron.verify.reasons import reason_of

_SHOWN_CHARS = 300  # of a question from its beginning, of an answer from its end


def describe_verdicts(groups: Sequence[Group]) -> str:
    """Verdicts and reasons with their counts, and one question with an answer that was judged as most of the wrong ones were.

    "0 right, 8 wrong, 0 unknown; no closed box: 8; for example '2+2?', gold '4', was answered 'It is 4.'"
    """
    answers = [(group, answer) for group in groups for answer in group.answers]
    if not answers:
        return "no answers"
    labels = Counter(answer.verdict.label for _, answer in answers)
    reasons = Counter(reason_of(answer.verdict) for _, answer in answers)
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    not_right = Counter(reason_of(answer.verdict) for _, answer in answers if answer.verdict.label != "correct")
    ((usual, _),) = (not_right or reasons).most_common(1)
    group, answer = next(pair for pair in answers if reason_of(pair[1].verdict) == usual)
    question = bare(group.prompt.question)
    asked = question if len(question) <= _SHOWN_CHARS else f"{question[:_SHOWN_CHARS]}…"
    said = answer.text if len(answer.text) <= _SHOWN_CHARS else f"…{answer.text[-_SHOWN_CHARS:]}"
    return (
        f"{labels['correct']} right, {labels['wrong']} wrong, {labels['unknown']} unknown; {counts}; "
        f"for example {asked!r}, gold {group.prompt.gold!r}, was answered {said!r}"
    )
