"""T7 and the one-sided bounds once more, one number at a time, in 40 digits, from the text of docs/second-moments.md.

Nothing of the package is imported: constants are written as the page writes them. Bounds that are the largest solution
of an inequality are given as the inequality ("admits"), so that a number can be told to lie on the right side of it.
"""

from dataclasses import dataclass
from fractions import Fraction

from mpmath import mp, mpf

mp.dps = 40


# Lemmas 3 to 5


def deviation(q, F, lam, B2, delta):
    """a of lemma 3."""
    F, lam, B2, delta = mpf(F), mpf(lam), mpf(B2), mpf(delta)
    lam = min(lam, F)
    a_2 = F * mp.sqrt(2 * q * (q - 1) * (1 / delta - 1))
    pairs, others, fours = mp.binomial(q, 2), mp.binomial(q - 2, 2), mp.binomial(q, 4)
    K_4 = 16 * (
        3 * pairs * others * F**4
        + 72 * fours * lam**2 * F**2
        + 9 * q * (q - 1) * (q - 2) * lam * B2 * F**2
        + pairs * B2**2 * F**2
    )
    return min(a_2, mp.root(K_4 / delta, 4))


def error(trace, q, F, lam, B2, delta):
    """e_q of lemma 3."""
    return mp.sqrt(mpf(trace) / q + deviation(q, F, lam, B2, delta) / (q * (q - 1)))


@dataclass
class Blocks:
    """What lemma 4 takes of the samples."""

    eigenvalue: float
    fourth: float
    rows: int
    blocks: int
    fewest: int
    shift: float = 0.0


def spectral_admits(y, seen, B2, k, delta):
    """Whether lemma 4 lets lambda be y <= k."""
    y, B2, delta, theta = mpf(y), mpf(B2), mpf(delta), mpf(85) / 100
    t_a, t_b = mp.log(1 / (mpf(9) / 10 * delta)), mp.log(2 * seen.blocks / (delta / 10))
    omega = -mp.log(1 - theta) - theta
    c = mp.sqrt(2 * y * t_b / seen.fewest) + mp.sqrt(B2) * t_b / (3 * seen.fewest)
    if theta * y >= B2:
        return False
    return -mp.log(1 - theta * y / B2) <= (
        t_a / seen.rows
        + theta * (mpf(seen.eigenvalue) + c**2) / B2
        + omega * (mp.root(mpf(seen.fourth), 4) + c + mpf(seen.shift)) ** 4 / (k * B2)
    )


@dataclass
class Halves:
    """What lemma 5 takes of the samples: blocks of one size."""

    block_rows: int
    blocks: int
    lambda_A: float
    a2: float
    w: float


def kl(a, b):
    """Relative entropy of two coins."""
    a, b = mpf(a), mpf(b)
    value = mpf(0)
    if a > 0:
        value += a * mp.log(a / b)
    if a < 1:
        value += (1 - a) * mp.log((1 - a) / (1 - b)) if b < 1 else mp.inf
    return value


def mean_admits(y, average, ceiling, samples, t):
    """Whether the mean of independent numbers in [0, ceiling] may be y, their average being at most ``average``."""
    return average >= y or samples * kl(average / ceiling, mpf(y) / ceiling) <= t


def crossed(halves, k, delta):
    """Z_u of lemma 5; the left side of the inequality grows beyond w."""
    t, R = mp.log(1 / (mpf(4) / 10 * mpf(delta))), mpf(halves.lambda_A) * (k + mpf(halves.a2))
    others = halves.blocks * (halves.block_rows - halves.block_rows // 2)
    return largest(lambda y: mean_admits(y, mpf(halves.w), R, others, t), min(mpf(halves.w), R), R)


def frobenius_admits(y, halves, lam, B2, k, delta, Z_u=None):
    """Whether lemma 5 lets F^2 be y <= lambda min(k, B^2)."""
    y, lam, B2, delta = mpf(y), mpf(lam), mpf(B2), mpf(delta)
    Z_u = crossed(halves, k, delta) if Z_u is None else Z_u
    m_A = halves.block_rows // 2
    markov = (lam * B2 * y / mpf(m_A) ** 3 + (y**2 + 2 * lam**2 * y) / mpf(m_A) ** 2) / (delta / 5)
    return mean_admits(y, Z_u + mp.sqrt(markov), lam * B2, halves.blocks * m_A, mp.log(1 / (mpf(4) / 10 * delta)))


def largest(admits, low, high, points=200, digits=20):
    """The largest y of [low, high] that ``admits``: a scan from the top, then bisection."""
    if admits(high):
        return high
    low = max(low, high * mpf(10) ** -9)
    step = (low / high) ** (mpf(1) / points)
    outside, inside = high, high * step
    while not admits(inside):
        if inside <= low:
            return low
        outside, inside = inside, inside * step
    while outside > inside * (1 + mpf(10) ** -digits):
        middle = (outside + inside) / 2
        outside, inside = (outside, middle) if admits(middle) else (middle, inside)
    return inside


# The events and their shares


SHARES = {"error": mpf(4) / 10, "spectral": mpf(2) / 10, "frobenius": mpf(15) / 100, "deflated": mpf(25) / 100}


def level(event, alpha_7, planned, look):
    """What an event pays at a look: the planned one has 3/4, the earlier ones share 1/4; alone it has all."""
    early = [512 * 2**j for j in range(40) if 512 * 2**j < planned]
    if not early:
        part = mpf(1)
    else:
        part = mpf(3) / 4 if look == planned else mpf(1) / 4 / len(early)
        assert look == planned or look in early
    return SHARES[event] * mpf(alpha_7) * part


def c(r):
    """sqrt(exp(r^2) - 1)."""
    return mp.sqrt(mp.expm1(mpf(r) ** 2))


def sure(k, norm, e):
    """B^2 = k + ||p||^2 from ||p|| <= ||p^|| + e_q and lemma 2."""
    return k + min(mpf(k), (mpf(norm) + mpf(e)) ** 2)


# The one-sided bounds, as inequalities of a lower bound m for the mean; those above are mirrored


def hoeffding(mean, q, delta):
    """The lower bound, before it is cut at 0."""
    return mpf(mean) - mp.sqrt(mp.log(1 / mpf(delta)) / (2 * q))


def tail(q, hits, m):
    """P(Bin(q, m) >= hits)."""
    m = mpf(m)
    return mp.fsum(mp.binomial(q, i) * m**i * (1 - m) ** (q - i) for i in range(hits, q + 1))


def quantile(p):
    """Phi^-1."""
    p = mpf(p)
    return -mp.inf if p <= 0 else mp.inf if p >= 1 else mp.sqrt(2) * mp.erfinv(2 * p - 1)


# Exact costs and eigenvalues, in rational numbers


def cost(leaving, entering):
    """min over t of sum (leaving - t)_+^2 + sum (t - entering)_+^2, a Fraction: between two kinks it is a parabola."""
    leaving, entering = [Fraction(a) for a in leaving], [Fraction(b) for b in entering]
    kinks = sorted({*leaving, *entering})
    best = None
    for low, high in zip([kinks[0] - 1, *kinks], [*kinks, kinks[-1] + 1], strict=True):
        active = [a for a in leaving if a >= high] + [b for b in entering if b <= low]
        t = min(max(sum(active) / len(active), low), high) if active else low
        value = sum(max(a - t, 0) ** 2 for a in leaving) + sum(max(t - b, 0) ** 2 for b in entering)
        best = value if best is None or value < best else best
    return best


def bounds_eigenvalues(bound, matrix):
    """Whether no eigenvalue of a symmetric matrix exceeds ``bound``: elimination of bound I - matrix, in fractions."""
    size = len(matrix)
    rest = [[Fraction(bound) * (i == j) - Fraction(matrix[i][j]) for j in range(size)] for i in range(size)]
    for i in range(size):
        if rest[i][i] < 0:
            return False
        if rest[i][i] == 0:
            if any(rest[j][i] for j in range(i + 1, size)):
                return False
            continue
        for j in range(i + 1, size):
            factor = rest[j][i] / rest[i][i]
            rest[j] = [a - factor * b for a, b in zip(rest[j], rest[i], strict=True)]
    return True
