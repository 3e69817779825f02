"""What evaluations print."""

from collections.abc import Mapping, Sequence

from gemma4_jax.eval.exact_match import ExactMatch, Wrong
from gemma4_jax.tables import percent, table


def scores(result: ExactMatch, name: str = "exact match") -> str:
    """Right answers by task and overall."""
    rows = [(task, score.correct, score.total, percent(score.accuracy)) for task, score in result.tasks.items()]
    if len(rows) > 1:
        rows.append(("overall", result.overall.correct, result.overall.total, percent(result.overall.accuracy)))
    return table(("task", "right", "of", name), rows)


def losses(values: Mapping[str, float]) -> str:
    """What `evaluate_loss` returns, in one line."""
    return (
        f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.3f}  "
        f"next-token accuracy {percent(values['accuracy'])}  over {values['tokens']:,.0f} tokens"
    )


def wrong_answers(wrong: Sequence[Wrong], most: int = 5) -> str:
    """The first wrong answers, three lines each."""
    shown = [
        f"row {one.index + 1} ({one.task})\n  asked   {_line(one.asked)}\n  wanted  {_line(one.wanted)}\n  got     {_line(one.got)}"
        for one in wrong[:most]
    ]
    if len(wrong) > most:
        shown.append(f"and {len(wrong) - most} more")
    return "\n".join(shown)


def _line(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
