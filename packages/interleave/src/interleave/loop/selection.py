"""Which attempt of a step the story shows."""

import math
from collections.abc import Sequence

from interleave.loop.config import Selection
from interleave.records import Attempt


def select_attempt(rule: Selection, attempts: Sequence[Attempt]) -> Attempt | None:
    """One of the accepted attempts, or of all that have an image where none was accepted; None without an image.

    Of equal ones the earliest wins.
    """
    generated = [attempt for attempt in attempts if attempt.image_id is not None]
    accepted = [attempt for attempt in generated if attempt.status == "accepted"]
    pool = accepted or generated
    if not pool:
        return None
    match rule:
        case "last":
            return pool[-1]
        case "first_success":
            return accepted[0] if accepted else pool[-1]
        case "best_by_judge":
            return max(pool, key=_overall_score)
        case "best_by_verdict_probability":
            return max(pool, key=lambda a: -1.0 if a.success_probability is None else a.success_probability)


def _overall_score(attempt: Attempt) -> float:
    """sqrt(semantics * quality); below every score where the judge gave none."""
    return math.sqrt(attempt.scores.semantics * attempt.scores.quality) if attempt.scores else -1.0
