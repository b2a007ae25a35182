"""Comparing two samples while they grow: moments, Welch's t-test, and a bound for every look.

Differences are always the second sample's mean minus the first's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream of numbers (Welford's recurrence)."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        delta = value - self.mean
        self.mean += delta / self.n
        self.m2 += delta * (value - self.mean)

    def join(self, other: Moments) -> None:
        """As if the other's numbers had been added."""
        if other.n:
            delta, n = other.mean - self.mean, self.n + other.n
            self.m2 += other.m2 + delta * delta * self.n * other.n / n
            self.mean += delta * other.n / n
            self.n = n

    @property
    def variance(self) -> float:
        """The sample's variance; 0 while there are fewer than two values."""
        return self.m2 / (self.n - 1) if self.n > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Welch:
    """Welch's t-test of two means with unequal variances, and Cohen's d (pooled deviation)."""

    difference: float
    t: float
    df: float
    p: float
    """Two-sided."""
    low: float
    high: float
    """The difference's confidence interval."""
    d: float


def welch(strata: Iterable[tuple[Moments, Moments]], confidence: float = 0.95) -> Welch | None:
    """Each stratum's difference weighed by its information; one stratum is the usual test.

    None where there is nothing to compare: in every stratum a sample with fewer than two values, or no
    spread.
    """
    usable = [(a, b) for a, b in strata if min(a.n, b.n) > 1 and a.variance + b.variance > 0.0]
    if not usable:
        return None
    errors = [(a.variance / a.n, b.variance / b.n) for a, b in usable]
    total = sum(1.0 / (va + vb) for va, vb in errors)
    weights = [1.0 / (va + vb) / total for va, vb in errors]
    pairs = list(zip(weights, usable, errors, strict=True))
    difference = sum(w * (b.mean - a.mean) for w, (a, b), _ in pairs)
    error = math.sqrt(1.0 / total)
    spread = sum(w**4 * (va**2 / (a.n - 1) + vb**2 / (b.n - 1)) for w, (a, b), (va, vb) in pairs)
    df, t = error**4 / spread, difference / error
    half = t_quantile(0.5 + confidence / 2, df) * error
    freedom = sum(a.n + b.n - 2 for a, b in usable)
    pooled = math.sqrt(sum(a.m2 + b.m2 for a, b in usable) / freedom)
    p = 2 * t_tail(abs(t), df)
    return Welch(difference, t, df, p, difference - half, difference + half, difference / pooled)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A difference, how much is known of it, and an interval that holds at every look.

    `information` is the inverse of the estimate's variance.
    """

    difference: float
    information: float
    low: float
    high: float


def anytime(
    strata: Iterable[tuple[Moments, Moments]],
    *,
    alpha: float,
    effect: float,
    min_samples: int = 20,
    floor: float = 0.0,
) -> Estimate | None:
    """The difference of means over `strata`, with an interval that covers it at all looks together
    with probability 1 - alpha.

    Each stratum's difference is weighed by its information, so that a share of traffic that changes
    between strata cannot pass for a difference. The interval is the asymptotic confidence sequence
    of a normal mixture (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas: Time-uniform central limit
    theory), narrowest where a difference of `effect` is about four standard errors.

    Args:
        min_samples: strata with fewer in either sample say nothing: the bound is asymptotic.
        floor: least variance of a single value, for samples that are all alike.
    """
    information = weighted = 0.0
    for a, b in strata:
        if min(a.n, b.n) < max(2, min_samples):
            continue
        weight = 1.0 / max(1e-12, max(a.variance, floor) / a.n + max(b.variance, floor) / b.n)
        information += weight
        weighted += weight * (b.mean - a.mean)
    if information == 0.0:
        return None
    spread = -2 * math.log(alpha)
    rho2 = (spread + math.log(spread + 1)) / (4 / effect) ** 2
    scaled = information * rho2 + 1
    radius = math.sqrt(2 * scaled / (information**2 * rho2) * math.log(math.sqrt(scaled) / alpha))
    difference = weighted / information
    return Estimate(difference, information, difference - radius, difference + radius)


# ------------------------------------------------------------------- Student's t


def t_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0."""
    return 0.5 * _beta_share(df / (df + t * t), df / 2, 0.5)


def t_quantile(q: float, df: float) -> float:
    """The value that T stays below with probability `q`, for q in [0.5, 1)."""
    low, high = 0.0, 2.0
    while t_tail(high, df) > 1 - q:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - q else (low, middle)
    return (low + high) / 2


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_share(1.0 - x, b, a)  # the fraction converges fast on this side only
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return math.exp(log_front) / a * _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Its continued fraction, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            result *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return result


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
