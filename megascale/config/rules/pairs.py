"""Encoder–decoders: sources, targets, and the objectives that pair them."""

from __future__ import annotations

from megascale.config.rules.rule import Rule, pair
from megascale.config.schema import Config
from megascale.config.spans import SENTINELS, Spans, longest_window

PAIR_RULES: tuple[Rule, ...] = (
    Rule(
        "pair_keys",
        (
            "model.family",
            "model.encoder_layers",
            "model.share_embeddings",
            "model.source_vocab_size",
            "train.source_len",
            "data.objective",
            "data.source_tokenizer",
            "data.start_token",
        ),
        lambda c, n: not pair(c) and _speaks_of_sources(c),
        "only an encoder_decoder has a source sequence",
        "leave these keys out, or use family encoder_decoder",
    ),
    Rule(
        "pair_packing",
        ("model.family", "train.packing"),
        lambda c, n: pair(c) and c.train.packing != "concat",
        "each sample is one source with its target, so packing does not apply",
        "leave packing out",
    ),
    Rule(
        "source_vocabulary",
        ("model.share_embeddings", "model.source_vocab_size", "data.source_tokenizer"),
        lambda c, n: (
            pair(c) and c.model.share_embeddings and (c.model.source_vocab_size is not None or c.data.source_tokenizer is not None)
        ),
        "with a shared embedding both sides use one vocabulary",
        "set share_embeddings to false, or leave source_vocab_size and source_tokenizer out",
    ),
    Rule(
        "span_vocabulary",
        ("data.objective", "model.share_embeddings"),
        lambda c, n: spans_asked(c) and not c.model.share_embeddings,
        "under span_corruption source and target come from one text and share the vocabulary",
        "leave share_embeddings out",
    ),
    Rule(
        "span_keys",
        ("data.mean_span", "data.mark_token", "data.objective"),
        lambda c, n: (c.data.mean_span is not None or c.data.mark_token is not None) and not spans_asked(c),
        "mean_span and mark_token are used by span corruption only",
        "remove mean_span and mark_token, or use objective span_corruption with family encoder_decoder",
    ),
    Rule(
        "span_room",
        ("data.objective", "data.mask_fraction", "data.mean_span", "train.source_len", "train.seq_len"),
        lambda c, n: spans_asked(c) and not _spans_fit(c),
        f"the longest window that fills a source needs a target of at most seq_len tokens and at most {SENTINELS} spans (a source of 512 "
        "tokens with 15 % hidden in spans of 3 takes a window of 568 and a target of 114)",
        "choose a longer seq_len, a shorter source_len, a smaller mask_fraction or a longer mean_span",
    ),
    Rule(
        "tp_source",
        ("parallel.tp", "train.source_len"),
        lambda c, n: pair(c) and c.parallel.tp_sequence and c.train.source_length % c.parallel.tp != 0,
        "with tp_sequence sources are split over the tensor ranks",
        "choose a source_len that is a multiple of tp, or tp_sequence false",
    ),
)


def _speaks_of_sources(config: Config) -> bool:
    m, d = config.model, config.data
    given = (m.encoder_layers, m.source_vocab_size, config.train.source_len, d.objective, d.source_tokenizer, d.start_token)
    return not m.share_embeddings or any(x is not None for x in given)


def spans_asked(config: Config) -> bool:
    return pair(config) and config.data.objective == "span_corruption"


def spans_in(config: Config) -> Spans | None:
    """Spans in every sample; None if a source is too short for any."""
    return longest_window(config.train.source_length, config.data.masked, config.data.mean_span or 3.0)


def _spans_fit(config: Config) -> bool:
    spans = spans_in(config)
    return spans is not None and spans.target <= config.train.seq_len and spans.spans <= SENTINELS
