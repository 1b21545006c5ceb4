"""The prompts that a run began with, in its folder: a resumed run asks them, whatever the date, the template or the rules by
which data are read have become since. Other data files are another matter: those the run refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Prompt
from nft_megatron.base.untrusted import parse_json
from nft_megatron.data.prompts import PromptSet

_KEY = b"nft_megatron.prompts"


@dataclass(frozen=True)
class KeptPrompts:
    """The prompts, the time of the run's first start, which templates print, and the digest of the data files.

    ``is_v0_1``: version 0.1 began the run, so its held-out questions are also asked as that version did.
    """

    prompts: PromptSet
    started: datetime
    digest: str
    is_v0_1: bool = False

    def write(self, path: Path) -> None:
        """Replace ``path`` atomically."""
        asked, counts = self.prompts.prompts, self.prompts
        meta = {
            "started": self.started.isoformat(),
            "digest": self.digest,
            "is_v0_1": self.is_v0_1,
            "num_conflicting": counts.num_conflicting,
            "num_overlong": counts.num_overlong,
            "num_rows": counts.num_rows,
            "unmatched": dict(counts.unmatched),
        }
        columns = {
            "question_id": pa.array([prompt.question_id for prompt in asked], pa.string()),
            "question": pa.array([prompt.question for prompt in asked], pa.string()),
            "gold": pa.array([prompt.gold for prompt in asked], pa.string()),
            "tokens": pa.array([prompt.tokens for prompt in asked], pa.list_(pa.int32())),
        }
        table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(meta)})
        with atomic_file(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    @classmethod
    def read(cls, path: Path) -> KeptPrompts | None:
        """What :meth:`write` wrote; None without a file: runs of earlier versions have none."""
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            meta = parse_json((table.schema.metadata or {})[_KEY])
            tokens = [row.values.to_numpy().copy() for row in table["tokens"]]
            texts = (table[name].to_pylist() for name in ("question_id", "question", "gold"))
            prompts = tuple(Prompt(*row) for row in zip(*texts, tokens, strict=True))
            started, digest = datetime.fromisoformat(meta.pop("started")), meta.pop("digest")
            is_v0_1 = meta.pop("is_v0_1", True)
            return cls(PromptSet(prompts, **meta), started, digest, is_v0_1)
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"is damaged: {(str(error) or 'empty').splitlines()[0]}"
            raise UserError("run_dir", path, problem, "restore it, or delete it: the prompts are then made anew") from error


def digest_of(files: Iterable[Path]) -> str:
    """A digest of the contents of ``files``, whatever they are called."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
