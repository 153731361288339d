"""One page on a run's data: what each source gave, what was left out, what the model reads."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from svend.data.corpus import Corpus
from svend.data.stream import PackedSequences

SAMPLES = 10
BINS = 40
STYLE = (
    "body{font:14px sans-serif;max-width:60em;margin:1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:3px 8px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em}mark{background:#d4efd4}"
    "svg text{font:11px sans-serif}"
)


def source_table(corpus: Corpus) -> pd.DataFrame:
    """Return a row per source: documents, tokens, lengths, and what was left out."""
    rows = []
    for number, count in enumerate(corpus.counts):
        lengths = corpus.train.lengths[corpus.train.sources == number]
        quantiles = np.quantile(lengths, [0.5, 0.95, 1.0]) if len(lengths) else [0, 0, 0]
        rows.append({
            "source": count.source, "kind": count.kind,
            "train documents": count.train_documents, "train tokens": count.train_tokens,
            "held-out documents": count.heldout_documents,
            "held-out tokens": count.heldout_tokens,
            "median length": int(quantiles[0]), "95%": int(quantiles[1]),
            "longest": int(quantiles[2]),
            "left out, leaked": count.leaked_documents,
            "left out, repeated": count.duplicate_documents,
            "left out, broken": count.dropped_rows,
        })
    return pd.DataFrame(rows)


def data_report_html(corpus: Corpus, sequences: PackedSequences) -> str:
    """Return the page; it needs nothing beside itself."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Data</title><style>{STYLE}</style>",
        "<h1>Data</h1>",
        f"<p>Fingerprint <code>{corpus.fingerprint}</code>, tokenizer of "
        f"{corpus.tokenizer.size:,} entries ({html.escape(corpus.tokenizer.origin)}).</p>",
        source_table(corpus).to_html(index=False, border=0),
        f"<p>An epoch is {len(sequences):,} sequences; {sequences.padding:.2%} of their places are "
        f"padding. Documents longer than a sequence: {sequences.split_documents:,} cut, "
        f"{sequences.dropped_documents:,} left out.</p>",
    ]
    for number, count in enumerate(corpus.counts):
        lengths = corpus.train.lengths[corpus.train.sources == number]
        identity = ", ".join(f"{k} {v}" for k, v in count.identity.items() if v is not None)
        parts.append(f"<h2>{html.escape(count.source)}</h2><p>{html.escape(identity)}</p>")
        if len(lengths):
            parts.append(_histogram(lengths))
        if count.named_rows:
            listed = "\n".join(count.named_rows)
            parts.append(f"<p>Rows left out, the first:</p><pre>{html.escape(listed)}</pre>")
    parts.append(
        "<h2>As the model reads it</h2><p>Ten documents; what it learns to say is marked.</p>"
    )
    parts += [f"<pre>{sample}</pre>" for sample in _samples(corpus, sequences)]
    return "\n".join(parts)


def _samples(corpus: Corpus, sequences: PackedSequences) -> Iterator[str]:
    """Yield documents of the first sequences, one of each, with marks around what is learnt."""
    for number in range(min(SAMPLES, len(sequences))):
        batch = sequences.batch(number, 1)
        in_first = batch.documents_BT[0] == 0
        ids = batch.tokens_BT[0][in_first].tolist()
        learnt = [False, *(batch.labels_BT[0][in_first] >= 0).tolist()][: len(ids)]
        text, begin = "", 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or learnt[end] != learnt[begin]:
                piece = html.escape(corpus.tokenizer.decode(ids[begin:end]))
                text += f"<mark>{piece}</mark>" if learnt[begin] else piece
                begin = end
        yield text


def _histogram(lengths: Any) -> str:
    """Return documents by length as a picture."""
    width, height, foot = 600, 120, 18
    counts, edges = np.histogram(lengths, bins=min(BINS, int(lengths.max())))
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" width="{step - 1:.1f}" '
        f'y="{height * (1 - count / counts.max()):.1f}" '
        f'height="{height * count / counts.max():.1f}" fill="#4a7fb5"/>'
        for i, count in enumerate(counts)
    )
    return (
        f'<svg width="{width}" height="{height + foot}" role="img" '
        f'aria-label="documents by length in tokens">{bars}'
        f'<text x="0" y="{height + 13}">{edges[0]:.0f} tokens</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{edges[-1]:.0f} tokens, '
        f"the highest bar {counts.max():,} documents</text></svg>"
    )
