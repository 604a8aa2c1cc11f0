"""Who may spend which part of alpha. Fixed before sampling and stored with the certificate."""

import dataclasses

_LABEL, _MARGINAL, _MOMENT = 0.10, 0.45, 0.45


@dataclasses.dataclass(frozen=True)
class AlphaLedger:
    """Error probabilities of the three families of statements; together they hold with probability 1 - alpha.

    A part that is never read is not redistributed.

    Attributes:
        alpha: the whole.
        label: the prediction (T6). 0: this certificate makes no statement about the label.
        marginal: one-sided bounds of all elements, overlap and pixels (T3 - T5).
        moment: second moments (T7). 0: no such statement.
    """

    alpha: float
    label: float
    marginal: float
    moment: float

    @classmethod
    def allot(cls, alpha: float, *, bound: str, slack: int | None, second_moment: bool) -> "AlphaLedger":
        """The shares of `alpha`, in (0, 1).

        ``bound="hoeffding", slack=0, second_moment=False`` is the published procedure, which speaks of the overlap
        only: there the marginal part is the whole of alpha.
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
        if second_moment:
            return cls(alpha, _LABEL * alpha, _MARGINAL * alpha, _MOMENT * alpha)
        if bound == "hoeffding" and slack == 0:
            return cls(alpha, 0.0, alpha, 0.0)
        return cls(alpha, _LABEL * alpha, (_MARGINAL + _MOMENT) * alpha, 0.0)
