"""An adapter for lm-eval (extra `evaluation`): its tasks on a checkpoint of ours, of any layout, or a Hugging Face folder.

from megascale.evaluation.harness import harness
with harness("runs/mine") as model:
    lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megascale.errors import UsageError
from megascale.evaluation.opened import OpenModel, opened
from megascale.evaluation.requests import Request, prefix_token, rolling
from megascale.generation.run import Sampling, generate

LONGEST = 256  # tokens of a continuation, lm-eval's own default


@contextmanager
def harness(
    checkpoint: str | Path, tokenizer: str | Path | None = None, batch: int = 8, dtype: str | None = None, device: str = "auto"
) -> Iterator[Any]:
    """An `lm_eval.api.model.LM`. Raises UsageError if lm-eval is missing or the path is no decoder."""
    with opened(Path(checkpoint), None if tokenizer is None else Path(tokenizer), batch, dtype, device) as model:
        yield adapter()(model)


def adapter() -> type[Any]:
    """The class, which exists only with lm-eval."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UsageError("lm-eval is not installed: pip install 'megascale[evaluation]'") from None

    class Megascale(TemplateLM):  # type: ignore[misc]
        backend = "causal"

        def __init__(self, opened: OpenModel) -> None:
            super().__init__()
            self.opened = opened

        @property
        def eot_token_id(self) -> int:
            return self.opened.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_token(self.opened.tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            tokenizer = self.opened.tokenizer
            if add_special_tokens is False:
                return [int(i) for i in tokenizer.encode_batch([string])[0]]
            return tokenizer.encode_prompt(string)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            scores = self.opened.scorer.scores([Request(context, wanted) for _, context, wanted in requests])
            return [(score.log_likelihood, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            cut = [rolling(self.opened.tokenizer, r.args[0], self.opened.scorer.length) for r in requests]
            scores = iter(self.opened.scorer.scores([window for some in cut for window in some]))
            return [sum(next(scores).log_likelihood for _ in some) for some in cut]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return [self._continue(*r.args) for r in requests]

        def _continue(self, context: str, options: dict[str, Any]) -> str:
            """Greedy, or with the task's temperature, until a stop text."""
            tokenizer, stops = self.opened.tokenizer, options.get("until") or []
            most = int(options.get("max_gen_toks", LONGEST))
            room = self.opened.scorer.length - most
            if room < 1:
                raise UsageError(f"a task asks for {most} tokens, and the model knows {self.opened.scorer.length}: lower max_gen_toks")
            ends = self.opened.ends or frozenset({tokenizer.eos_id})
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            made = generate(self.opened.model, [tokenizer.encode_prompt(context)[-room:]], Sampling(most, temperature, ends=ends))[0]
            text = tokenizer.decode(made[:-1] if made and made[-1] in ends else made)
            found = [place for stop in ([stops] if isinstance(stops, str) else stops) if stop and (place := text.find(stop)) >= 0]
            return text[: min(found, default=len(text))]

    return Megascale
